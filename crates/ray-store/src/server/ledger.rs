//! The ledger: owns the account of every byte, and the proof that it is right.
//!
//! It refuses to guess: each part is counted where it is kept, and only the split of lent bytes into used and unused
//! rests on the clients' word, which is capped by what they were lent.
//!
//! Invariants:
//! 1. The parts sum to the capacity at any time.

use super::{LocalPurpose, Role, StoreServer};
use crate::allocator::allocated_bytes;
use crate::layout::control;
use crate::sync::Ordering;
use crate::Ledger;

impl StoreServer {
    /// Who has the bytes.
    pub fn ledger(&self) -> Ledger {
        let mut ledger = Ledger {
            capacity: self.mapping.geometry().data_bytes,
            primaries: self.primary_bytes,
            cache: self.cache_bytes,
            awaiting_unpin: self.deferred.iter().map(|item| item.bytes).sum(),
            free: self.allocator.free_bytes(),
            objects: self.objects.len() as u64,
            clients: self.client_count,
            ..Ledger::default()
        };
        for filling in self.filling.values() {
            match filling.purpose {
                LocalPurpose::Transfer => ledger.in_transfer += filling.bytes,
                LocalPurpose::Restore => ledger.being_created += filling.bytes,
            }
        }
        for client in self.clients.iter().flatten() {
            let creating = self
                .control(client.slot.number, control::CREATING)
                .load(Ordering::Relaxed);
            let creating = creating.min(client.lent.bytes());
            ledger.being_created += creating;
            ledger.lent_unused += client.lent.bytes() - creating;
        }
        ledger
    }

    /// Checks every invariant that can be checked without the clients; for tests, as it looks at everything.
    pub fn validate(&self) -> Result<(), String> {
        self.allocator.validate()?;
        let mut spans: Vec<(u64, u64, &str)> = self.allocator.iter().map(|(at, len, _)| (at, len, "free")).collect();
        for client in self.clients.iter().flatten() {
            spans.extend(client.lent.iter().map(|(at, len)| (at, len, "lent")));
        }
        spans.extend(self.filling.values().map(|it| (it.offset, it.bytes, "filling")));
        spans.extend(self.deferred.iter().map(|it| (it.offset, it.bytes, "deferred")));
        for (object, record) in &self.objects {
            spans.push((record.entry.offset, allocated_bytes(record.entry.size), "object"));
            let found = self
                .index()
                .find(object)
                .ok_or(format!("{object} is not in the index"))?;
            let entry = (found.slot, found.offset, found.size, found.metadata);
            let wanted = (
                record.index_slot,
                record.entry.offset,
                record.entry.size,
                record.entry.metadata,
            );
            if entry != wanted {
                return Err(format!("{object} is {entry:?} in the index and {wanted:?} here"));
            }
            let order = if record.entry.role == Role::Primary {
                &self.primaries
            } else {
                &self.cache
            };
            if order.get(&record.age) != Some(object) {
                return Err(format!("{object} is missing from the order of its role"));
            }
        }
        if self.primaries.len() + self.cache.len() != self.objects.len() {
            return Err("the orders hold objects that are gone".into());
        }
        spans.sort_unstable();
        let mut end = 0;
        let mut last = "start";
        for (offset, len, what) in spans {
            if offset != end {
                return Err(format!("{last} ends at {end} and {what} starts at {offset}"));
            }
            end = offset + len;
            last = what;
        }
        let ledger = self.ledger();
        if end != ledger.capacity || ledger.total() != ledger.capacity {
            return Err(format!("ranges end at {end}: {ledger:?} sums to {}", ledger.total()));
        }
        Ok(())
    }
}
