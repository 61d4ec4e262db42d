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
use crate::layout::{MAX_PINS, PINS_A_PAGE};

/// An object in the publication ring.
#[derive(Debug, Clone, Copy)]
pub(crate) struct SealedHere {
    pub sequence: u64,
    pub offset: u64,
    pub size: u64,
    pub metadata: u32,
}

#[derive(Debug)]
pub(crate) struct ClientState {
    pub free: Allocator,
    pub published_tail: u64,
    pub returned_head: u64,
    pub creating_bytes: u64,
    pub closed: bool,
    pub reserved_pins: u64,
    pins: FxHashMap<u64, (usize, Weak<Pin>)>,
    positions_in_use: BTreeSet<usize>,
    free_positions: BinaryHeap<Reverse<usize>>,
    next_position: usize,
    sealed: FxHashMap<ObjectId, SealedHere>,
    sealed_order: VecDeque<(u64, ObjectId)>,
}

impl ClientState {
    pub fn new() -> Self {
        Self {
            free: Allocator::default(),
            published_tail: 0,
            returned_head: 0,
            creating_bytes: 0,
            closed: false,
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
