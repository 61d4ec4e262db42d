//! Single-producer single-consumer ring of fixed records in shared words: owns the order of its stores.
//!
//! It refuses to trust the other side: positions each side needs of its own are kept in its private memory and passed
//! in, and a tail that lies outside the ring is reported as corrupt instead of followed.
//!
//! Invariants:
//! 1. A record is visible only once complete: its words are stored before the tail that covers it.
//! 2. A record is overwritten only once consumed: the producer never passes the head by more than the ring's length.
//! 3. A producer that dies at any store leaves a ring whose covered records are all complete.

use crate::sync::{AtomicU64, Ordering, Party};

/// The other side's tail lies outside of the ring.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CorruptRing {
    /// Where this side reads next.
    pub head: u64,
    /// What the other side claims to have written.
    pub tail: u64,
}

/// A ring of records of `N` words.
pub struct Ring<'a, const N: usize> {
    tail: &'a AtomicU64,
    head: &'a AtomicU64,
    slots: &'a [AtomicU64],
    capacity: u64,
}

impl<'a, const N: usize> Ring<'a, N> {
    /// A ring over these words; `slots` holds a power of two of records.
    pub fn new(tail: &'a AtomicU64, head: &'a AtomicU64, slots: &'a [AtomicU64]) -> Self {
        let capacity = (slots.len() / N) as u64;
        debug_assert!(capacity.is_power_of_two());
        Self {
            tail,
            head,
            slots,
            capacity,
        }
    }

    fn record(&self, position: u64) -> &'a [AtomicU64] {
        let start = (position & (self.capacity - 1)) as usize * N;
        &self.slots[start..start + N]
    }

    /// Producer: appends `record` at its own position `tail`; false where the ring is full. The producer adds one to
    /// its position on true.
    pub fn push<P: Party>(&self, tail: u64, record: &[u64; N]) -> bool {
        // Acquire: the consumer's reads of the record that stood here happen before it is overwritten.
        let head = self.head.load(Ordering::Acquire);
        if tail.wrapping_sub(head) >= self.capacity {
            return false;
        }
        for (word, value) in self.record(tail).iter().zip(record) {
            P::store(word, *value, Ordering::Relaxed);
        }
        // Release: whoever sees this tail sees the record, and the object's bytes that were written before it.
        P::store(self.tail, tail + 1, Ordering::Release);
        true
    }

    /// Consumer: the record at its own position `head`, not yet consumed.
    pub fn peek(&self, head: u64) -> Result<Option<[u64; N]>, CorruptRing> {
        let tail = self.tail.load(Ordering::Acquire);
        let waiting = tail.wrapping_sub(head);
        if waiting == 0 {
            return Ok(None);
        }
        if waiting > self.capacity {
            return Err(CorruptRing { head, tail });
        }
        let mut record = [0; N];
        for (value, word) in record.iter_mut().zip(self.record(head)) {
            *value = word.load(Ordering::Relaxed);
        }
        Ok(Some(record))
    }

    /// Consumer: everything before `head` is consumed. Release: what the consumer did with the records (inserted them
    /// into the index) is visible to a producer that sees this head.
    pub fn consume_until<P: Party>(&self, head: u64) {
        P::store(self.head, head, Ordering::Release);
    }

    /// Producer: how far the consumer has come.
    pub fn consumed(&self) -> u64 {
        self.head.load(Ordering::Acquire)
    }

    /// How many records the ring holds.
    pub fn capacity(&self) -> u64 {
        self.capacity
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;
    use crate::sync::{ClientParty, ServerParty};

    #[test]
    fn records_come_out_in_order_and_a_full_ring_refuses() {
        let (tail, head) = (AtomicU64::new(0), AtomicU64::new(0));
        let slots: Vec<AtomicU64> = (0..8).map(|_| AtomicU64::new(0)).collect();
        let ring = Ring::<2>::new(&tail, &head, &slots);
        let (mut written, mut read) = (0, 0);
        for round in 0..5 {
            while ring.push::<ClientParty>(written, &[written, round]) {
                written += 1;
            }
            assert_eq!(written - read, ring.capacity());
            while let Some(record) = ring.peek(read).unwrap() {
                assert_eq!(record, [read, round]);
                read += 1;
                ring.consume_until::<ServerParty>(read);
            }
            assert_eq!(ring.consumed(), written);
        }
    }

    #[test]
    fn a_tail_outside_the_ring_is_reported() {
        let (tail, head) = (AtomicU64::new(77), AtomicU64::new(0));
        let slots: Vec<AtomicU64> = (0..8).map(|_| AtomicU64::new(0)).collect();
        assert_eq!(
            Ring::<2>::new(&tail, &head, &slots).peek(3),
            Err(CorruptRing { head: 3, tail: 77 })
        );
    }
}
