//! What a client knows for itself: owns its free memory, its pin words' use, and what it sealed but the server has not
//! read yet. One process-local lock guards it.
//!
//! It refuses to touch shared words; the client stores what this says.
//!
//! Invariants:
//! 1. A pin position is either in use, or in `free_positions`, or was never used.
//! 2. `high` is one more than the highest position in use.
//! 3. `sealed` has only objects whose records were not consumed at the last look.

use std::cmp::Reverse;
use std::collections::{BTreeSet, BinaryHeap, VecDeque};
use std::sync::Weak;

use ray_ids::ObjectId;
use rustc_hash::FxHashMap;

use crate::allocator::Allocator;
use crate::client::Pin;
use crate::layout::{MAX_PINS, PAGE_BYTES, PINS_A_PAGE};

/// An object in the publication ring.
#[derive(Debug, Clone, Copy)]
pub(crate) struct SealedHere {
    pub sequence: u64,
    pub offset: u64,
    pub size: u64,
    pub metadata: u32,
}

/// Pages of the data area that this process has mapped by writing to them.
#[derive(Debug)]
pub(crate) struct PageSet {
    words: Vec<u64>,
}

impl PageSet {
    pub fn new(data_bytes: u64) -> Self {
        // Zeroed memory of the allocator takes no pages until it is used.
        Self {
            words: vec![0; data_bytes.div_ceil(PAGE_BYTES * 64) as usize],
        }
    }

    /// Marks the pages of this range and returns the range from the first to the last that was not marked.
    pub fn mark(&mut self, offset: u64, len: u64) -> Option<(u64, u64)> {
        let (first, last) = (offset / PAGE_BYTES, (offset + len - 1) / PAGE_BYTES);
        let mut missing: Option<(u64, u64)> = None;
        for index in first / 64..=last / 64 {
            let from = first.max(index * 64) % 64;
            let to = last.min(index * 64 + 63) % 64;
            let mask = (!0 << from) & (!0 >> (63 - to));
            let Some(word) = self.words.get_mut(index as usize) else {
                break;
            };
            let new = mask & !*word;
            *word |= mask;
            if new != 0 {
                let low = index * 64 + u64::from(new.trailing_zeros());
                let high = index * 64 + 63 - u64::from(new.leading_zeros());
                missing = Some((missing.map_or(low, |(first, _)| first), high));
            }
        }
        missing.map(|(first, last)| (first * PAGE_BYTES, (last - first + 1) * PAGE_BYTES))
    }
}

#[derive(Debug)]
pub(crate) struct ClientState {
    pub free: Allocator,
    pub published_tail: u64,
    pub returned_head: u64,
    pub creating_bytes: u64,
    pub closed: bool,
    /// The raylet was asked to read the ring when it had consumed so much.
    pub nudged_at: Option<u64>,
    /// The most free memory since then, to see that it runs low.
    pub free_high: u64,
    pub reserved_pins: u64,
    pub populated: PageSet,
    pins: FxHashMap<u64, (usize, Weak<Pin>)>,
    positions_in_use: BTreeSet<usize>,
    free_positions: BinaryHeap<Reverse<usize>>,
    next_position: usize,
    sealed: FxHashMap<ObjectId, SealedHere>,
    sealed_order: VecDeque<(u64, ObjectId)>,
}

impl ClientState {
    pub fn new(data_bytes: u64) -> Self {
        Self {
            populated: PageSet::new(data_bytes),
            free: Allocator::default(),
            published_tail: 0,
            returned_head: 0,
            creating_bytes: 0,
            closed: false,
            nudged_at: None,
            free_high: 0,
            reserved_pins: PINS_A_PAGE,
            pins: FxHashMap::default(),
            positions_in_use: BTreeSet::new(),
            free_positions: BinaryHeap::new(),
            next_position: 0,
            sealed: FxHashMap::default(),
            sealed_order: VecDeque::new(),
        }
    }

    /// The pin on the bytes at this offset, if there is one.
    pub fn pin_at(&self, offset: u64) -> Option<std::sync::Arc<Pin>> {
        self.pins.get(&offset)?.1.upgrade()
    }

    /// How many objects are pinned.
    pub fn pinned(&self) -> u64 {
        self.positions_in_use.len() as u64
    }

    /// The pins that live.
    pub fn live_pins(&self) -> Vec<std::sync::Arc<Pin>> {
        self.pins.values().filter_map(|(_, pin)| pin.upgrade()).collect()
    }

    /// The lowest free pin position, which keeps what the server must scan short.
    pub fn take_position(&mut self) -> Option<usize> {
        let position = match self.free_positions.pop() {
            Some(Reverse(position)) => position,
            None if (self.next_position as u64) < MAX_PINS => {
                self.next_position += 1;
                self.next_position - 1
            }
            None => return None,
        };
        self.positions_in_use.insert(position);
        Some(position)
    }

    /// A position is not used (any more).
    pub fn give_position(&mut self, position: usize) {
        if self.positions_in_use.remove(&position) {
            self.free_positions.push(Reverse(position));
        }
    }

    /// How many pin words may be in use.
    pub fn high(&self) -> u64 {
        self.positions_in_use.last().map_or(0, |position| *position as u64 + 1)
    }

    /// Remembers a pin, to share it.
    pub fn remember_pin(&mut self, offset: u64, position: usize, pin: Weak<Pin>) {
        self.pins.insert(offset, (position, pin));
    }

    /// Forgets a pin, unless another word has taken its place meanwhile.
    pub fn forget_pin(&mut self, offset: u64, position: usize) {
        if self.pins.get(&offset).is_some_and(|(current, _)| *current == position) {
            self.pins.remove(&offset);
        }
        self.give_position(position);
    }

    /// Remembers an object whose record was just pushed, and forgets those before `consumed`.
    pub fn remember_sealed(&mut self, object: ObjectId, sealed: SealedHere, consumed: u64) {
        while let Some(&(sequence, old)) = self.sealed_order.front() {
            if sequence >= consumed {
                break;
            }
            self.sealed_order.pop_front();
            if self.sealed.get(&old).is_some_and(|entry| entry.sequence == sequence) {
                self.sealed.remove(&old);
            }
        }
        self.sealed.insert(object, sealed);
        self.sealed_order.push_back((sealed.sequence, object));
    }

    /// The object that this client sealed and whose record may be waiting.
    pub fn sealed_here(&self, object: &ObjectId) -> Option<SealedHere> {
        self.sealed.get(object).copied()
    }

    /// The object's record was consumed, or its deletion was asked for.
    pub fn forget_sealed(&mut self, object: &ObjectId) {
        self.sealed.remove(object);
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;

    #[test]
    fn pages_are_missing_until_they_are_marked() {
        const PAGE: u64 = PAGE_BYTES;
        let mut pages = PageSet::new(1000 * PAGE);
        assert_eq!(pages.mark(70 * PAGE + 5, 10), Some((70 * PAGE, PAGE)));
        assert_eq!(pages.mark(70 * PAGE, PAGE), None);
        assert_eq!(pages.mark(69 * PAGE + 1, 2 * PAGE), Some((69 * PAGE, 3 * PAGE)));
        assert_eq!(pages.mark(60 * PAGE, 200 * PAGE), Some((60 * PAGE, 200 * PAGE)));
        assert_eq!(pages.mark(60 * PAGE, 200 * PAGE), None);
        assert_eq!(pages.mark(999 * PAGE, PAGE), Some((999 * PAGE, PAGE)));
        assert_eq!(pages.mark(0, 1000 * PAGE), Some((0, 999 * PAGE)));
    }
}
