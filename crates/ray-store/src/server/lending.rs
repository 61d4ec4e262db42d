//! Lending: owns how much memory a client gets, and where freed memory goes.
//!
//! It refuses to lend a page that has no memory behind it.
//!
//! Invariants:
//! 1. What is lent to a client is in its `lent`, and nowhere else.
//! 2. Freed memory goes back to the client that created its object (whose pages are warm and who needs no message for
//!    it) as long as that client does not gather more than its share and nobody waits for memory.

use super::StoreServer;
use crate::allocator::{allocated_bytes, Allocation, Temperature};
use crate::ranges::RangeSet;
use crate::sync::ServerParty;
use crate::{ClientSlot, Extent, StoreError};

/// A client's first extent; each further one is twice as long, up to its share.
pub(super) const FIRST_LEND_BYTES: u64 = 1 << 20;
const SMALLEST_LEND_BYTES: u64 = 256 << 10;
const LARGEST_LEND_BYTES: u64 = 16 << 20;
const LARGEST_KEPT_BYTES: u64 = 64 << 20;
/// Up to here the server gives pages their memory itself (it takes a third of a millisecond a MiB).
const SERVER_RESERVES_BYTES: u64 = 1 << 20;
/// A client that asks again and again gets more, up to here, so that it asks less often. Not more, because what it
/// writes again and again should stay in a core's cache.
const WORKING_SET_BYTES: u64 = 2 << 20;

impl StoreServer {
    /// Lends memory to a client that needs at least so many bytes in one piece. The first thing it does is to read the
    /// rings: where that already returned enough to the client, the extent is empty, and the client finds the memory
    /// when it tries again.
    pub fn lend_extent(&mut self, slot: ClientSlot, minimum_bytes: u64) -> Result<Extent, StoreError> {
        self.client(slot)?;
        let minimum = allocated_bytes(minimum_bytes);
        self.drain_all();
        let share = self.share(16, SMALLEST_LEND_BYTES, LARGEST_LEND_BYTES);
        let returned = self.returned_and_not_seen(slot).longest() >= minimum;
        let client = self.client(slot)?;
        let enough = client.next_lend_bytes.min(share).min(WORKING_SET_BYTES);
        let wanted = client.next_lend_bytes.min(share).max(minimum);
        if returned && client.lent.bytes() >= enough {
            return Ok(Extent::default());
        }
        let (allocation, reserved) = match self.allocate(minimum, wanted) {
            Err(_) if returned => return Ok(Extent::default()),
            other => other?,
        };
        let Allocation { offset, len, .. } = allocation;
        let client = self.client(slot)?;
        client.next_lend_bytes = (client.next_lend_bytes * 2).min(LARGEST_LEND_BYTES);
        client.lent.insert(offset, len);
        if !reserved {
            client.unreserved.insert(offset, len);
        }
        Ok(Extent { offset, len, reserved })
    }

    /// A client gives back what it was lent and did not use.
    pub fn give_back(&mut self, slot: ClientSlot, extent: Extent) -> Result<(), StoreError> {
        let client = self.client(slot)?;
        if !client.lent.remove(extent.offset, extent.len) {
            return Err(StoreError::NotLent { slot, extent });
        }
        client.next_lend_bytes = FIRST_LEND_BYTES;
        let mut unreserved = std::mem::take(&mut client.unreserved);
        // It comes back as it was lent where the client found no memory for it.
        self.memory_is_short |= !extent.reserved;
        self.take_back(&mut unreserved, extent.offset, extent.len);
        self.client(slot)?.unreserved = unreserved;
        Ok(())
    }

    /// Makes lent memory free again. What the client was to give memory to may have none, so that counts as cold.
    pub(super) fn take_back(&mut self, unreserved: &mut RangeSet, offset: u64, len: u64) {
        let mut at = offset;
        for (start, bytes) in unreserved.cut(offset, len) {
            self.allocator.free(at, start - at, Temperature::Warm);
            self.allocator.free(start, bytes, Temperature::Cold);
            at = start + bytes;
        }
        self.allocator.free(at, offset + len - at, Temperature::Warm);
    }

    /// What part of the capacity one of the present clients may have.
    fn share(&self, divisor: u64, smallest: u64, largest: u64) -> u64 {
        let capacity = self.mapping.geometry().data_bytes;
        (capacity / (divisor * self.client_count.max(1))).clamp(smallest, largest)
    }

    /// Allocates and, unless that would take long, reserves; tells whether it did.
    pub(super) fn allocate(&mut self, minimum: u64, wanted: u64) -> Result<(Allocation, bool), StoreError> {
        let result = match self.try_allocate(minimum, wanted) {
            Err(StoreError::Full { .. }) => {
                self.collect();
                self.try_allocate(minimum, wanted)
            }
            // The file system is smaller than the store. Now that this is known, warm memory and the least will do.
            Err(StoreError::NoMemory { .. }) => self.try_allocate(minimum, wanted),
            other => other,
        };
        self.under_pressure = result.is_err();
        result
    }

    fn try_allocate(&mut self, minimum: u64, wanted: u64) -> Result<(Allocation, bool), StoreError> {
        let allocation = if self.memory_is_short {
            if let Some(warm) = self.allocator.allocate_warm(minimum, wanted) {
                return Ok((warm, true));
            }
            // Pages that lie free in pieces that are too short give their memory to those that are about to be used.
            self.trim(minimum)?;
            self.allocator.allocate(minimum)
        } else {
            self.allocator.allocate_between(minimum, wanted)
        };
        let Some(allocation) = allocation else {
            let ledger = self.ledger();
            return Err(StoreError::Full {
                needed: minimum,
                longest_free: self.allocator.largest(),
                free: ledger.free,
                lent_unused: ledger.lent_unused,
                evictable: ledger.cache,
                awaiting_unpin: ledger.awaiting_unpin,
            });
        };
        let Allocation {
            offset,
            len,
            temperature,
        } = allocation;
        let reserved = temperature == Temperature::Warm || len <= SERVER_RESERVES_BYTES;
        if reserved && temperature == Temperature::Cold {
            if let Err(error) = self.mapping.reserve_data(offset, len) {
                self.allocator.free(offset, len, Temperature::Cold);
                self.memory_is_short = true;
                return Err(error);
            }
            self.memory_is_short = false;
        }
        Ok((allocation, reserved))
    }

    /// The raylet has creators in its queue that wait for memory: until it says otherwise freed memory is for all.
    pub fn set_creators_waiting(&mut self, waiting: bool) {
        self.creators_wait = waiting;
    }

    /// Gives freed memory to whoever used it last, or to all.
    pub(super) fn free_or_return(&mut self, offset: u64, bytes: u64, creator: Option<ClientSlot>) {
        let returned = creator
            .is_some_and(|slot| !self.under_pressure && !self.creators_wait && self.return_to(slot, offset, bytes));
        if !returned {
            self.allocator.free(offset, bytes, Temperature::Warm);
        }
    }

    fn return_to(&mut self, slot: ClientSlot, offset: u64, bytes: u64) -> bool {
        let kept = self.share(8, FIRST_LEND_BYTES, LARGEST_KEPT_BYTES);
        let Ok(client) = self.client(slot) else { return false };
        if client.broken || client.lent.bytes() + bytes > kept {
            return false;
        }
        let tail = client.returned_tail;
        if !self.returns(slot.number).push::<ServerParty>(tail, &[offset, bytes]) {
            return false;
        }
        let Ok(client) = self.client(slot) else { return false };
        client.returned_tail += 1;
        client.lent.insert(offset, bytes);
        true
    }

    /// What was returned to a client that has not taken it yet.
    fn returned_and_not_seen(&mut self, slot: ClientSlot) -> RangeSet {
        let mut ranges = RangeSet::default();
        let Ok(client) = self.client(slot) else { return ranges };
        let tail = client.returned_tail;
        let ring = self.returns(slot.number);
        // The head is the client's word: if it is a lie, the client merely asks again.
        let head = ring.consumed().clamp(tail.saturating_sub(ring.capacity()), tail);
        for position in head..tail {
            if let Ok(Some([offset, len])) = ring.peek(position) {
                ranges.insert(offset, len);
            }
        }
        ranges
    }

    /// Warms up to `budget_bytes` of memory that was never used, and tells how many. It blocks for that long (about a
    /// millisecond for some hundred KB), so an idle raylet calls it with small budgets.
    pub fn prefault_step(&mut self, budget_bytes: u64) -> u64 {
        let Some(allocation) = self.allocator.allocate_cold(budget_bytes) else {
            return 0;
        };
        let warm = self.mapping.populate_data(allocation.offset, allocation.len).is_ok();
        let temperature = if warm { Temperature::Warm } else { Temperature::Cold };
        self.allocator.free(allocation.offset, allocation.len, temperature);
        if warm {
            allocation.len
        } else {
            0
        }
    }

    /// Free memory that is warm: what `prefault_step` is there to keep at some level.
    pub fn warm_free_bytes(&self) -> u64 {
        self.allocator.warm_bytes()
    }

    /// Gives up to `bytes` of free warm memory back to the system, and tells how many it were.
    pub fn trim(&mut self, bytes: u64) -> Result<u64, StoreError> {
        let mut trimmed = 0;
        let mut failure = None;
        for (offset, len) in self.allocator.take_warm(bytes) {
            let result = self.mapping.release_data(offset, len);
            let temperature = if result.is_ok() {
                Temperature::Cold
            } else {
                Temperature::Warm
            };
            self.allocator.free(offset, len, temperature);
            match result {
                Ok(()) => trimmed += len,
                Err(error) => failure = Some(error),
            }
        }
        failure.map_or(Ok(trimmed), Err)
    }
}
