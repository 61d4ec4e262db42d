//! Counters of one reactor, for tests, metrics and the curious.
//!
//! Invariants:
//! 1. Counters only grow; a snapshot is a set of relaxed loads and not one instant.

use std::sync::atomic::{AtomicU64, Ordering};

macro_rules! counters {
    ($($(#[$doc:meta])* $name:ident),* $(,)?) => {
        /// The live counters.
        #[derive(Debug, Default)]
        pub struct Stats { $($(#[$doc])* pub(crate) $name: AtomicU64,)* }

        /// The counters as they were read.
        #[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
        pub struct StatsSnapshot { $($(#[$doc])* pub $name: u64,)* }

        impl Stats {
            /// Reads every counter.
            pub fn snapshot(&self) -> StatsSnapshot {
                StatsSnapshot { $($name: self.$name.load(Ordering::Relaxed),)* }
            }
        }
    };
}

counters! {
    /// `sendmsg` calls.
    writes,
    /// `recvmsg` calls, those that found nothing included.
    reads,
    /// Times the background thread woke.
    background_wakeups,
    /// Times a leader slept in `epoll_wait`.
    leader_sleeps,
    /// `epoll_wait` calls that did not sleep.
    polls,
    /// Frames handed to links for sending.
    frames_sent,
    /// Frames delivered to the service.
    frames_received,
    /// Bytes written.
    bytes_sent,
    /// Bytes read.
    bytes_received,
    /// Spins that saw traffic.
    spin_hits,
    /// Spins that ended without traffic.
    spin_misses,
    /// Times the background epoll was armed.
    arms,
    /// Writes to the wake descriptor.
    nudges,
    /// Links that became ready.
    links_ready,
    /// Links that closed.
    links_closed,
    /// Strangers turned away: wrong token, garbage, silence, wrong user, too many at once.
    handshakes_refused,
}

pub(crate) fn count(counter: &AtomicU64) {
    counter.fetch_add(1, Ordering::Relaxed);
}

pub(crate) fn add(counter: &AtomicU64, amount: u64) {
    counter.fetch_add(amount, Ordering::Relaxed);
}
