//! Whether a leader polls before it sleeps: a pure record of how spins fared.
//!
//! Invariants:
//! 1. A process whose spins keep failing spins rarely; one success, or a sleep so short that a spin would have met its
//!    end, lets it spin again.

use std::time::Duration;

const MISSES_BEFORE_DOUBT: u32 = 8;
const DOUBTFUL_STRIDE: u32 = 16;

/// How recent spins fared.
#[derive(Debug, Default)]
pub(crate) struct SpinRecord {
    misses_in_a_row: u32,
    skipped: u32,
}

impl SpinRecord {
    /// Whether to spin now.
    pub(crate) fn should_spin(&mut self) -> bool {
        if self.misses_in_a_row < MISSES_BEFORE_DOUBT {
            return true;
        }
        self.skipped += 1;
        if self.skipped >= DOUBTFUL_STRIDE {
            self.skipped = 0;
            return true;
        }
        false
    }

    pub(crate) fn on_hit(&mut self) {
        self.misses_in_a_row = 0;
        self.skipped = 0;
    }

    pub(crate) fn on_miss(&mut self) {
        self.misses_in_a_row = self.misses_in_a_row.saturating_add(1);
    }

    /// A spin lasted much longer than it was meant to: other threads want this core, so spinning only takes from them.
    pub(crate) fn on_preempted(&mut self) {
        self.misses_in_a_row = self.misses_in_a_row.max(MISSES_BEFORE_DOUBT);
    }

    /// A sleep ended with traffic after this long.
    pub(crate) fn on_sleep(&mut self, slept: Duration, spin: Duration) {
        if slept <= spin {
            self.on_hit();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn failing_spins_become_rare_and_recover() {
        let mut record = SpinRecord::default();
        for _ in 0..MISSES_BEFORE_DOUBT {
            assert!(record.should_spin());
            record.on_miss();
        }
        let spins = (0..DOUBTFUL_STRIDE * 4).filter(|_| record.should_spin()).count();
        assert_eq!(spins, 4);
        record.on_sleep(Duration::from_millis(9), Duration::from_micros(50));
        assert!(!record.should_spin());
        record.on_sleep(Duration::from_micros(20), Duration::from_micros(50));
        assert!(record.should_spin());
        record.on_preempted();
        assert!(!record.should_spin());
    }
}
