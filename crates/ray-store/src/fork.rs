//! Forked children: owns the knowledge whether this process is the one that attached.
//!
//! A child shares its parent's words. If it dropped the objects it inherited it would unpin them for its parent, so in
//! a child everything of this crate that stores into shared words is inert.
//!
//! Invariants:
//! 1. The generation differs from the parent's in every forked child, without a system call at each use.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::Once;

static GENERATION: AtomicU64 = AtomicU64::new(0);
static INSTALLED: Once = Once::new();

extern "C" fn count_fork() {
    GENERATION.fetch_add(1, Ordering::Relaxed);
}

/// This process's generation; remember it when attaching.
pub fn generation() -> u64 {
    INSTALLED.call_once(|| {
        // SAFETY: the handler is a plain function that only adds to an atomic, which is allowed after a fork.
        let code = unsafe { libc::pthread_atfork(None, None, Some(count_fork)) };
        // It fails only for want of memory, where nothing else would work either.
        assert_eq!(code, 0, "pthread_atfork registers a handler");
    });
    GENERATION.load(Ordering::Relaxed)
}

/// Whether this process is a forked child of the one that had this generation.
pub fn is_child_of(generation: u64) -> bool {
    GENERATION.load(Ordering::Relaxed) != generation
}
