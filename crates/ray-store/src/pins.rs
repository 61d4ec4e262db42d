//! Pin words: owns the client's and the server's halves of the protocol that keeps an object's bytes in place.
//!
//! It refuses a pin whose object was taken away while the word was being written.
//!
//! A pin names the place of the bytes (their offset), not the generation of the index entry: that also covers an
//! object that its creator has sealed and the server has not yet entered into the index. The entry's generation is
//! what the client checks after it wrote the word. A word that is about to be undone can only delay a reuse.
//!
//! Invariants:
//! 1. A pin word has one writer, its client.
//! 2. Client: word stored, full fence, validity loaded. Server: validity taken away, full fence, words loaded. So of a
//!    client that pins and a server that frees at least one sees the other, and bytes in use are never reused.
//! 3. Every word that is in use lies below `high`, which is raised before the word is stored.
//! 4. Forgetting a dead client is storing zero into its words; nothing else refers to it.

use crate::sync::{fence, AtomicU64, Ordering, Party};

/// Bytes of a granule: objects start and end at multiples of it.
pub const GRANULE_BYTES: u64 = 64;

/// The word that pins the object at this offset; zero means "no pin".
pub const fn pin_value(offset: u64) -> u64 {
    offset / GRANULE_BYTES + 1
}

/// The offset that a pin word names.
pub const fn pinned_offset(value: u64) -> Option<u64> {
    match value {
        0 => None,
        value => Some((value - 1).wrapping_mul(GRANULE_BYTES)),
    }
}

/// One client's pin words.
pub struct PinWords<'a> {
    high: &'a AtomicU64,
    words: &'a [AtomicU64],
}

impl<'a> PinWords<'a> {
    /// Over these words.
    pub fn new(high: &'a AtomicU64, words: &'a [AtomicU64]) -> Self {
        Self { high, words }
    }

    /// Client: pins `value` with the word at `position`, where `high` words are in use with this one. `is_valid` loads
    /// what tells that the object is still there; where it is not, the pin is undone and this returns false.
    pub fn pin<P: Party>(&self, position: usize, high: u64, value: u64, is_valid: impl FnOnce() -> bool) -> bool {
        if self.high.load(Ordering::Relaxed) < high {
            P::store(self.high, high, Ordering::Relaxed);
        }
        P::store(&self.words[position], value, Ordering::Relaxed);
        fence(Ordering::SeqCst);
        if is_valid() {
            return true;
        }
        P::store(&self.words[position], 0, Ordering::Release);
        false
    }

    /// Client: the object is no longer used. Release: its last reads happen before the server's reuse.
    pub fn unpin<P: Party>(&self, position: usize, high: u64) {
        P::store(&self.words[position], 0, Ordering::Release);
        if self.high.load(Ordering::Relaxed) != high {
            P::store(self.high, high, Ordering::Release);
        }
    }

    /// Server, after it took the objects away and `free_fence`: how many words may be in use.
    pub fn high(&self) -> usize {
        // The client's number is only a claim; it cannot lead the server out of the array.
        self.high.load(Ordering::Acquire).min(self.words.len() as u64) as usize
    }

    /// Server: calls `found` with the offset of each pin below `high`.
    pub fn scan(&self, high: usize, mut found: impl FnMut(u64)) {
        for word in &self.words[..high] {
            if let Some(offset) = pinned_offset(word.load(Ordering::Acquire)) {
                found(offset);
            }
        }
    }

    /// Server: forgets a dead client's pins and tells how many there were.
    pub fn forget<P: Party>(&self, high: usize) -> u64 {
        let mut count = 0;
        for word in &self.words[..high] {
            if word.load(Ordering::Relaxed) != 0 {
                count += 1;
                P::store(word, 0, Ordering::Relaxed);
            }
        }
        P::store(self.high, 0, Ordering::Release);
        count
    }
}

/// Server: the fence between taking objects away and scanning for pins. One fence serves a whole batch.
pub fn free_fence() {
    fence(Ordering::SeqCst);
}
