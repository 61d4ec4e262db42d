//! The synchronization primitives of the leader token: the operating system's in production, loom's under `--cfg loom`.
//!
//! It owns the one sleeping primitive, a word that threads sleep on. Under loom the word is the same and the futex is
//! played by a mutex and a condition variable, which give exactly its promise: compare and sleep are one step.

use std::time::Instant;

#[cfg(loom)]
pub use loom::sync::{
    atomic::{fence, AtomicU32, Ordering},
    Condvar, Mutex, MutexGuard,
};
/// Reference counts are the standard library's under loom too: the protocol does not rest on them.
pub use std::sync::Arc;
#[cfg(not(loom))]
pub use std::sync::{
    atomic::{fence, AtomicU32, Ordering},
    Condvar, Mutex, MutexGuard,
};

/// How a sleep on a word ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SleepEnd {
    /// The word changed, or somebody woke us; look again.
    Woken,
    /// The deadline passed.
    TimedOut,
    /// A signal was handled on this thread.
    Interrupted,
}

/// A word to sleep on.
#[derive(Debug)]
pub struct ParkingWord {
    word: AtomicU32,
    #[cfg(loom)]
    futex: (Mutex<()>, Condvar),
}

impl Default for ParkingWord {
    fn default() -> Self {
        Self {
            word: AtomicU32::new(0),
            #[cfg(loom)]
            futex: (Mutex::new(()), Condvar::new()),
        }
    }
}

impl ParkingWord {
    /// The word's bits.
    pub fn bits(&self) -> u32 {
        self.word.load(Ordering::SeqCst)
    }

    /// Sets bits; returns those that were set before.
    pub fn set(&self, bits: u32) -> u32 {
        self.word.fetch_or(bits, Ordering::SeqCst)
    }

    /// Clears bits; returns those that were set before.
    pub fn clear(&self, bits: u32) -> u32 {
        self.word.fetch_and(!bits, Ordering::SeqCst)
    }

    /// Sleeps while the word is exactly `expected`.
    #[cfg(not(loom))]
    pub fn sleep_while(&self, expected: u32, deadline: Option<Instant>) -> SleepEnd {
        use rustix::thread::futex;
        let timeout = match deadline {
            None => None,
            Some(deadline) => {
                let left = deadline.saturating_duration_since(Instant::now());
                if left.is_zero() {
                    return SleepEnd::TimedOut;
                }
                Some(rustix::fs::Timespec {
                    tv_sec: left.as_secs().min(i64::MAX as u64) as i64,
                    tv_nsec: left.subsec_nanos() as _,
                })
            }
        };
        match futex::wait(&self.word, futex::Flags::PRIVATE, expected, timeout.as_ref()) {
            Err(rustix::io::Errno::INTR) => SleepEnd::Interrupted,
            Err(rustix::io::Errno::TIMEDOUT) => SleepEnd::TimedOut,
            // AGAIN says that the word differs already; whatever else, the caller looks at the word again.
            Ok(()) | Err(_) => SleepEnd::Woken,
        }
    }

    /// Wakes whoever sleeps on the word.
    #[cfg(not(loom))]
    pub fn wake(&self) {
        let _ = rustix::thread::futex::wake(&self.word, rustix::thread::futex::Flags::PRIVATE, u32::MAX >> 1);
    }

    /// Sleeps while the word is exactly `expected`; time does not pass under loom.
    #[cfg(loom)]
    pub fn sleep_while(&self, expected: u32, _deadline: Option<Instant>) -> SleepEnd {
        let mut guard = lock(&self.futex.0);
        while self.bits() == expected {
            guard = self
                .futex
                .1
                .wait(guard)
                .unwrap_or_else(|poisoned| poisoned.into_inner());
        }
        SleepEnd::Woken
    }

    /// Wakes whoever sleeps on the word.
    #[cfg(loom)]
    pub fn wake(&self) {
        let _guard = lock(&self.futex.0);
        self.futex.1.notify_all();
    }
}

/// Locks, also where a panicking thread left the lock poisoned: no critical section of this crate leaves its data
/// half changed, and one handler's panic must not end the service of all links.
pub fn lock<T: ?Sized>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
}
