//! Atomics: owns the choice between the real ones and loom's, and the two parties that write shared words.
//!
//! It refuses any other way of storing into shared words, so that a test can count, and stop at, each of them.
//!
//! Invariants:
//! 1. Every store that a client makes into shared words goes through `ClientParty`, every store of the server through
//!    `ServerParty`.
//! 2. In tests a client that was killed stores nothing more, whatever destructors run afterwards.

#[cfg(loom)]
pub use loom::sync::atomic::{fence, AtomicU64, Ordering};
#[cfg(not(loom))]
pub use std::sync::atomic::{fence, AtomicU64, Ordering};

/// Who stores: a word has exactly one party that writes it.
pub trait Party {
    /// Stores `value`.
    fn store(word: &AtomicU64, value: u64, order: Ordering);
}

/// A worker's or driver's process.
pub struct ClientParty;

/// The raylet's process.
pub struct ServerParty;

impl Party for ClientParty {
    #[inline]
    fn store(word: &AtomicU64, value: u64, order: Ordering) {
        #[cfg(all(test, not(loom)))]
        if kill_switch::stops_store() {
            return;
        }
        word.store(value, order);
    }
}

impl Party for ServerParty {
    #[inline]
    fn store(word: &AtomicU64, value: u64, order: Ordering) {
        word.store(value, order);
    }
}

/// The test's way to kill a client between any two of its shared stores.
#[cfg(all(test, not(loom)))]
pub mod kill_switch {
    use std::cell::Cell;

    /// What unwinds when the client is killed.
    pub struct Killed;

    thread_local! {
        static REMAINING: Cell<Option<u64>> = const { Cell::new(None) };
        static DEAD: Cell<bool> = const { Cell::new(false) };
    }

    /// Runs `life` and kills it before its store number `stores` (from 0). Tells whether it lived to its end.
    pub fn run(stores: u64, life: impl FnOnce()) -> bool {
        REMAINING.with(|remaining| remaining.set(Some(stores)));
        DEAD.with(|dead| dead.set(false));
        let result = std::panic::catch_unwind(std::panic::AssertUnwindSafe(life));
        REMAINING.with(|remaining| remaining.set(None));
        DEAD.with(|dead| dead.set(false));
        match result {
            Ok(()) => true,
            Err(payload) if payload.is::<Killed>() => false,
            Err(payload) => std::panic::resume_unwind(payload),
        }
    }

    /// Whether this store must not happen; unwinds at the one that the test chose.
    pub fn stops_store() -> bool {
        if DEAD.with(Cell::get) {
            return true;
        }
        match REMAINING.with(Cell::get) {
            None => false,
            Some(0) => {
                DEAD.with(|dead| dead.set(true));
                std::panic::resume_unwind(Box::new(Killed));
            }
            Some(count) => {
                REMAINING.with(|remaining| remaining.set(Some(count - 1)));
                false
            }
        }
    }
}
