//! The index: owns the open-addressing table of sealed objects in shared words.
//!
//! It refuses nothing by lock: any number of clients look up while the server, its only writer, changes entries.
//!
//! An entry is eight words, one cache line: state and generation, 28 bytes of id and 4 of metadata, offset, size,
//! one spare. "Not found" is only advice: a client that misses asks the server, whose word is final.
//!
//! Invariants:
//! 1. Only the server stores into entries.
//! 2. Fields change only while the state is not SEALED or EVICTING, and a state word with a generation never comes
//!    back once its entry was removed, so equal state words before and after reading mean untorn fields.
//! 3. An entry never moves; a removed entry stays a tombstone while a later entry of its run is in use.
//! 4. No more than half of the table is in use, so every run ends.

use ray_ids::ObjectId;

use crate::sync::{fence, AtomicU64, Ordering, Party};

/// Words of an entry.
pub const ENTRY_WORDS: usize = 8;

const STATE_MASK: u64 = 3;
const EMPTY: u64 = 0;
const TOMBSTONE: u64 = 1;
const SEALED: u64 = 2;
const EVICTING: u64 = 3;

/// An object's id and metadata as four words.
pub fn key_words(object: &ObjectId, metadata: u32) -> [u64; 4] {
    let mut bytes = [0; 32];
    bytes[..28].copy_from_slice(object.as_bytes());
    bytes[28..].copy_from_slice(&metadata.to_le_bytes());
    let mut words = [0; 4];
    for (word, chunk) in words.iter_mut().zip(bytes.chunks_exact(8)) {
        let mut eight = [0; 8];
        eight.copy_from_slice(chunk);
        *word = u64::from_le_bytes(eight);
    }
    words
}

/// The id and metadata in four words.
pub fn key_of(words: [u64; 4]) -> (ObjectId, u32) {
    let mut bytes = [0; 28];
    for (chunk, word) in bytes.chunks_mut(8).zip(words) {
        chunk.copy_from_slice(&word.to_le_bytes()[..chunk.len()]);
    }
    (ObjectId::from_array(bytes), (words[3] >> 32) as u32)
}

const METADATA_MASK: u64 = !0 << 32;

fn same_object(left: &[u64; 4], right: &[u64; 4]) -> bool {
    left[..3] == right[..3] && (left[3] ^ right[3]) & !METADATA_MASK == 0
}

fn hash(words: &[u64; 4]) -> u64 {
    // Ids of one task's puts differ in their last four bytes alone, so every step folds both halves of a product.
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    for word in [words[0], words[1], words[2], words[3] & !METADATA_MASK] {
        let product = u128::from(state ^ word).wrapping_mul(0xa076_1d64_78bd_642f_e703_7ed1_a0b4_28db);
        state = (product as u64) ^ ((product >> 64) as u64);
    }
    state
}

/// What a look-up saw.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Found {
    /// Which entry.
    pub slot: usize,
    /// Its state word when it was read; `is_current` tells whether it still stands.
    pub state: u64,
    /// Where the object's bytes start in the data area.
    pub offset: u64,
    /// How many bytes it has.
    pub size: u64,
    /// Its creator's tag.
    pub metadata: u32,
}

/// The table over shared words.
pub struct Index<'a> {
    words: &'a [AtomicU64],
    mask: usize,
}

impl<'a> Index<'a> {
    /// Over these words, a power of two of entries.
    pub fn new(words: &'a [AtomicU64]) -> Self {
        let entries = words.len() / ENTRY_WORDS;
        debug_assert!(entries.is_power_of_two());
        Self {
            words,
            mask: entries - 1,
        }
    }

    fn entry(&self, slot: usize) -> &'a [AtomicU64] {
        &self.words[slot * ENTRY_WORDS..(slot + 1) * ENTRY_WORDS]
    }

    /// Any party: finds a sealed object.
    pub fn find(&self, object: &ObjectId) -> Option<Found> {
        let wanted = key_words(object, 0);
        let mut slot = hash(&wanted) as usize & self.mask;
        for _ in 0..=self.mask {
            let entry = self.entry(slot);
            // Acquire: the fields, and the object's bytes, were stored before this state.
            let state = entry[0].load(Ordering::Acquire);
            match state & STATE_MASK {
                EMPTY => return None,
                SEALED => {
                    let key: [u64; 4] = std::array::from_fn(|i| entry[1 + i].load(Ordering::Relaxed));
                    let offset = entry[5].load(Ordering::Relaxed);
                    let size = entry[6].load(Ordering::Relaxed);
                    if same_object(&key, &wanted) {
                        fence(Ordering::Acquire);
                        if entry[0].load(Ordering::Relaxed) == state {
                            return Some(Found {
                                slot,
                                state,
                                offset,
                                size,
                                metadata: (key[3] >> 32) as u32,
                            });
                        }
                    }
                }
                _ => {}
            }
            slot = (slot + 1) & self.mask;
        }
        None
    }

    /// Client, after its pin word and a full fence: whether the entry is still as `find` saw it.
    pub fn is_current(&self, found: &Found) -> bool {
        self.entry(found.slot)[0].load(Ordering::Acquire) == found.state
    }

    /// Server: enters a sealed object and returns its entry, or `None` where no entry is left. The object must not be
    /// in the table.
    pub fn insert<P: Party>(
        &self,
        object: &ObjectId,
        generation: u64,
        offset: u64,
        size: u64,
        metadata: u32,
    ) -> Option<usize> {
        let key = key_words(object, metadata);
        let mut slot = hash(&key) as usize & self.mask;
        for _ in 0..=self.mask {
            let entry = self.entry(slot);
            if matches!(entry[0].load(Ordering::Relaxed) & STATE_MASK, EMPTY | TOMBSTONE) {
                // Whoever reads one of the new fields under the old state word will see, at its second look, that the
                // state has changed.
                fence(Ordering::Release);
                for (word, value) in entry[1..].iter().zip(key.into_iter().chain([offset, size])) {
                    P::store(word, value, Ordering::Relaxed);
                }
                P::store(&entry[0], generation << 2 | SEALED, Ordering::Release);
                return Some(slot);
            }
            slot = (slot + 1) & self.mask;
        }
        None
    }

    /// Server: the entry's object can no longer be pinned. `free_fence` must follow before pins are scanned.
    pub fn mark_evicting<P: Party>(&self, slot: usize, generation: u64) {
        P::store(&self.entry(slot)[0], generation << 2 | EVICTING, Ordering::Relaxed);
    }

    /// Server: somebody pins the object that was to be evicted, so it stays.
    pub fn unmark_evicting<P: Party>(&self, slot: usize, generation: u64) {
        P::store(&self.entry(slot)[0], generation << 2 | SEALED, Ordering::Release);
    }

    /// Server: removes the entry; as for `mark_evicting`, no pin can succeed from here on.
    pub fn remove<P: Party>(&self, slot: usize) {
        P::store(&self.entry(slot)[0], TOMBSTONE, Ordering::Relaxed);
        // At the end of a run tombstones guard nothing; without this they would fill the table.
        let next = (slot + 1) & self.mask;
        if self.entry(next)[0].load(Ordering::Relaxed) & STATE_MASK != EMPTY {
            return;
        }
        let mut slot = slot;
        for _ in 0..self.mask {
            if self.entry(slot)[0].load(Ordering::Relaxed) != TOMBSTONE {
                break;
            }
            P::store(&self.entry(slot)[0], EMPTY, Ordering::Relaxed);
            slot = slot.wrapping_sub(1) & self.mask;
        }
    }

    /// How many tombstones there are.
    #[cfg(all(test, not(loom)))]
    pub fn tombstones(&self) -> usize {
        (0..=self.mask)
            .filter(|&slot| self.entry(slot)[0].load(Ordering::Relaxed) == TOMBSTONE)
            .count()
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;
    use crate::sync::ServerParty;
    use proptest::prelude::*;
    use std::collections::HashMap;

    fn object(number: u32) -> ObjectId {
        let mut bytes = [7; 28];
        bytes[24..].copy_from_slice(&number.to_le_bytes());
        ObjectId::from_array(bytes)
    }

    #[test]
    fn key_words_round_trip() {
        let id = ObjectId::from_random();
        assert_eq!(key_of(key_words(&id, 0xdead_beef)), (id, 0xdead_beef));
    }

    #[test]
    fn tombstones_vanish_when_all_is_removed() {
        let words: Vec<AtomicU64> = (0..64 * ENTRY_WORDS).map(|_| AtomicU64::new(0)).collect();
        let index = Index::new(&words);
        let mut generation = 1;
        for _ in 0..100 {
            let slots: Vec<usize> = (0..32)
                .map(|n| {
                    generation += 1;
                    index.insert::<ServerParty>(&object(n), generation, 64, 1, 0).unwrap()
                })
                .collect();
            slots.into_iter().for_each(|slot| index.remove::<ServerParty>(slot));
            assert_eq!(index.find(&object(3)), None);
        }
        assert_eq!(index.tombstones(), 0);
    }

    proptest! {
        #[test]
        fn it_agrees_with_a_map(steps in proptest::collection::vec((0u32..24, any::<bool>()), 1..400)) {
            let words: Vec<AtomicU64> = (0..32 * ENTRY_WORDS).map(|_| AtomicU64::new(0)).collect();
            let index = Index::new(&words);
            let mut model: HashMap<u32, (usize, u64)> = HashMap::new();
            let mut generation = 0;
            for (number, insert) in steps {
                generation += 1;
                if insert && !model.contains_key(&number) && model.len() < 16 {
                    let offset = generation * 64;
                    let slot = index.insert::<ServerParty>(&object(number), generation, offset, 5, number).unwrap();
                    model.insert(number, (slot, offset));
                } else if let Some((slot, _)) = model.remove(&number) {
                    index.remove::<ServerParty>(slot);
                }
                for number in 0..24 {
                    let found = index.find(&object(number)).map(|found| (found.slot, found.offset));
                    prop_assert_eq!(found, model.get(&number).copied());
                }
            }
        }
    }
}
