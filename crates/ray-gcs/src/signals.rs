//! Signals: owns how SIGTERM and SIGINT become readable on a descriptor.
//!
//! A handler is used, not a mask, because a mask would have to be set in every thread of the process.
//!
//! Invariants:
//! 1. While a `Signals` lives, either signal makes its descriptor readable and does nothing else.
//! 2. Dropping it gives the signals back to whoever had them.

use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::sync::atomic::{AtomicI32, Ordering};

use crate::error::GcsError;

const SIGNALS: [i32; 2] = [libc::SIGTERM, libc::SIGINT];

/// Where the handler writes, or -1.
static DESCRIPTOR: AtomicI32 = AtomicI32::new(-1);

extern "C" fn on_signal(_signal: i32) {
    let descriptor = DESCRIPTOR.load(Ordering::SeqCst);
    if descriptor >= 0 {
        let one = 1_u64.to_ne_bytes();
        // SAFETY: write is async-signal-safe and the buffer is readable for its length; errno is put back, because the
        // interrupted code may be about to read it.
        unsafe {
            let errno = libc::__errno_location();
            let before = *errno;
            libc::write(descriptor, one.as_ptr().cast(), one.len());
            *errno = before;
        }
    }
}

/// The signals, as long as it lives.
pub(crate) struct Signals {
    descriptor: OwnedFd,
    before: [libc::sigaction; SIGNALS.len()],
}

impl Signals {
    /// Takes the signals over. One process runs one control plane, so a second taker is refused.
    pub(crate) fn new() -> Result<Self, GcsError> {
        let failed = |what: &str| GcsError::Links(format!("{what}: {}", std::io::Error::last_os_error()));
        // SAFETY: eventfd makes a descriptor that is owned from here on.
        let descriptor = unsafe {
            let number = libc::eventfd(0, libc::EFD_CLOEXEC | libc::EFD_NONBLOCK);
            if number < 0 {
                return Err(failed("making a descriptor for signals"));
            }
            OwnedFd::from_raw_fd(number)
        };
        let taken = DESCRIPTOR.compare_exchange(-1, descriptor.as_raw_fd(), Ordering::SeqCst, Ordering::SeqCst);
        if taken.is_err() {
            return Err(GcsError::Links("a control plane runs in this process already".into()));
        }
        // SAFETY: sigaction is plain data; the calls read the new action and write the old one.
        let before = unsafe {
            let mut action: libc::sigaction = std::mem::zeroed();
            action.sa_sigaction = on_signal as extern "C" fn(i32) as usize;
            action.sa_flags = libc::SA_RESTART;
            libc::sigemptyset(&mut action.sa_mask);
            let mut before: [libc::sigaction; SIGNALS.len()] = std::mem::zeroed();
            for (signal, old) in SIGNALS.into_iter().zip(&mut before) {
                libc::sigaction(signal, &action, old);
            }
            before
        };
        Ok(Self { descriptor, before })
    }

    /// Readable once a signal came.
    pub(crate) fn descriptor(&self) -> &OwnedFd {
        &self.descriptor
    }
}

impl Drop for Signals {
    fn drop(&mut self) {
        for (signal, old) in SIGNALS.into_iter().zip(&self.before) {
            // SAFETY: the old action was written by sigaction.
            unsafe { libc::sigaction(signal, old, std::ptr::null_mut()) };
        }
        DESCRIPTOR.store(-1, Ordering::SeqCst);
    }
}
