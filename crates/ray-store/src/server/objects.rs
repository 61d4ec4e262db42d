//! Objects: owns entering, finding, deleting and evicting them, and the server's own reads and writes.
//!
//! It refuses to reuse a byte that a pin or a handle names, and to drop a primary copy for want of memory.
//!
//! Invariants:
//! 1. `primaries` and `cache` order exactly the sealed objects of their role by age.
//! 2. What is taken out of the index goes through `release`, which alone decides between free and deferred.

use std::collections::BTreeMap;

use ray_ids::ObjectId;
use rustc_hash::{FxHashMap, FxHashSet};

use super::{DeleteOutcome, EvictOutcome, Filling, LocalPurpose, ObjectEntry, Record, Released, Role, StoreServer};
use crate::allocator::{allocated_bytes, Temperature};
use crate::local::{Hold, LocalBuffer, StoredObject};
use crate::pins::free_fence;
use crate::sync::ServerParty;
use crate::StoreError;

impl StoreServer {
    pub(super) fn next_generation(&mut self) -> u64 {
        self.next_generation += 1;
        self.next_generation
    }

    fn order(&mut self, role: Role) -> (&mut BTreeMap<u64, ObjectId>, &mut u64) {
        match role {
            Role::Primary => (&mut self.primaries, &mut self.primary_bytes),
            Role::Cache => (&mut self.cache, &mut self.cache_bytes),
        }
    }

    /// Enters a sealed object that is not here yet; the caller made sure that the index has room.
    pub(super) fn enter(&mut self, entry: ObjectEntry) {
        let ObjectEntry {
            object,
            generation,
            offset,
            size,
            metadata,
            ..
        } = entry;
        let Some(index_slot) = self
            .index()
            .insert::<ServerParty>(&object, generation, offset, size, metadata)
        else {
            unreachable!("the index has at least twice as many entries as there may be objects");
        };
        self.next_age += 1;
        let age = self.next_age;
        self.objects.insert(
            object,
            Record {
                entry,
                index_slot,
                age,
                hold: Hold::new(true),
            },
        );
        let (order, bytes) = self.order(entry.role);
        order.insert(age, object);
        *bytes += allocated_bytes(size);
    }

    /// Takes an object out of the index. Its bytes must go through `release`.
    pub(super) fn take_out(&mut self, object: &ObjectId) -> Option<Released> {
        let record = self.objects.remove(object)?;
        self.index().remove::<ServerParty>(record.index_slot);
        let bytes = allocated_bytes(record.entry.size);
        let (order, total) = self.order(record.entry.role);
        order.remove(&record.age);
        *total -= bytes;
        Some(Released {
            offset: record.entry.offset,
            bytes,
            creator: record.entry.creator,
            hold: record.hold,
        })
    }

    /// Frees what nobody uses and defers the rest.
    pub(super) fn release(&mut self, released: Vec<Released>) -> Vec<DeleteOutcome> {
        let pinned = self.pinned_among(&released);
        let mut outcomes = Vec::with_capacity(released.len());
        for item in released {
            if pinned.as_ref().is_none_or(|pinned| pinned.contains(&item.offset)) || item.hold.is_held() {
                outcomes.push(DeleteOutcome::DeferredUntilUnpinned);
                self.deferred.push(item);
            } else {
                outcomes.push(DeleteOutcome::Deleted);
                self.free_or_return(item.offset, item.bytes, item.creator);
            }
        }
        outcomes
    }

    /// The offsets among these that are pinned, `None` where that cannot be known. Fences first.
    fn pinned_among(&mut self, released: &[Released]) -> Option<FxHashSet<u64>> {
        free_fence();
        let mut pinned = FxHashSet::default();
        let known = match released {
            [one] => self.scan_pins(|offset| {
                if offset == one.offset {
                    pinned.insert(offset);
                }
            }),
            many => {
                let wanted: FxHashSet<u64> = many.iter().map(|item| item.offset).collect();
                self.scan_pins(|offset| {
                    if wanted.contains(&offset) {
                        pinned.insert(offset);
                    }
                })
            }
        };
        known.then_some(pinned)
    }

    /// Frees deleted objects that nobody uses any more, and buffers that were dropped unsealed. The raylet calls it now
    /// and then; the store itself does before it says that it is full.
    pub fn collect(&mut self) {
        let abandoned = self
            .filling
            .iter()
            .filter(|(_, it)| !it.hold.is_held())
            .map(|(object, _)| *object);
        for object in abandoned.collect::<Vec<_>>() {
            self.stop_filling(&object);
        }
        if !self.deferred.is_empty() {
            let waiting = std::mem::take(&mut self.deferred);
            self.release(waiting);
        }
    }

    fn stop_filling(&mut self, object: &ObjectId) {
        if let Some(filling) = self.filling.remove(object) {
            let temperature = if filling.hold.is_reserved() {
                Temperature::Warm
            } else {
                Temperature::Cold
            };
            self.memory_is_short |= filling.hold.found_no_memory();
            self.allocator.free(filling.offset, filling.bytes, temperature);
        }
    }

    /// Finds a sealed object. Before it says that there is none it reads the rings.
    pub fn lookup(&mut self, object: &ObjectId) -> Option<ObjectEntry> {
        if !self.objects.contains_key(object) {
            self.drain_all();
        }
        self.objects.get(object).map(|record| record.entry)
    }

    /// Whether a sealed object is here.
    pub fn contains(&mut self, object: &ObjectId) -> bool {
        self.lookup(object).is_some()
    }

    /// The sealed objects.
    pub fn objects(&self) -> impl Iterator<Item = &ObjectEntry> {
        self.objects.values().map(|record| &record.entry)
    }

    /// Makes a copy one that must survive, or one that may be dropped. Age stays.
    pub fn set_primary(&mut self, object: &ObjectId, primary: bool) -> Result<(), StoreError> {
        let role = if primary { Role::Primary } else { Role::Cache };
        if self.lookup(object).is_none() {
            return Err(StoreError::NotFound { object: *object });
        }
        let Some(record) = self.objects.get_mut(object) else {
            return Err(StoreError::NotFound { object: *object });
        };
        let (before, age, bytes) = (record.entry.role, record.age, allocated_bytes(record.entry.size));
        record.entry.role = role;
        let (order, total) = self.order(before);
        order.remove(&age);
        *total -= bytes;
        let (order, total) = self.order(role);
        order.insert(age, *object);
        *total += bytes;
        Ok(())
    }

    /// Deletes an object whose owner let go of it.
    pub fn delete(&mut self, object: &ObjectId) -> DeleteOutcome {
        self.delete_many(std::slice::from_ref(object))[0]
    }

    /// Deletes objects whose owners let go of them, with one fence and one look at the pins for all.
    pub fn delete_many(&mut self, objects: &[ObjectId]) -> Vec<DeleteOutcome> {
        if objects.iter().any(|object| !self.objects.contains_key(object)) {
            self.drain_all();
        }
        let mut outcomes = vec![DeleteOutcome::Absent; objects.len()];
        let mut released = Vec::new();
        let mut positions = Vec::new();
        for (position, object) in objects.iter().enumerate() {
            if let Some(gone) = self.take_out(object) {
                released.push(gone);
                positions.push(position);
            }
        }
        if !released.is_empty() {
            for (position, outcome) in positions.into_iter().zip(self.release(released)) {
                outcomes[position] = outcome;
            }
        }
        outcomes
    }

    /// Drops the oldest cached copies that nobody uses until `bytes_wanted` are free of them.
    pub fn evict_cache(&mut self, bytes_wanted: u64) -> Vec<ObjectId> {
        let mut evicted = Vec::new();
        let mut bytes = 0;
        let mut after = 0;
        while bytes < bytes_wanted {
            // Candidates are taken in batches, so that many small objects need few looks at the pins.
            let mut batch = Vec::new();
            let mut planned = 0;
            for (&age, object) in self.cache.range(after..) {
                if bytes + planned >= bytes_wanted {
                    break;
                }
                after = age + 1;
                planned += self
                    .objects
                    .get(object)
                    .map_or(0, |record| allocated_bytes(record.entry.size));
                batch.push(*object);
            }
            if batch.is_empty() {
                break;
            }
            for (object, outcome) in batch.iter().zip(self.evict_batch(&batch)) {
                if let Some(freed) = outcome {
                    bytes += freed;
                    evicted.push(*object);
                }
            }
        }
        evicted
    }

    /// Drops this copy whatever its role, unless somebody uses it: for a primary that has been spilled.
    pub fn try_evict(&mut self, object: &ObjectId) -> EvictOutcome {
        if self.lookup(object).is_none() {
            return EvictOutcome::Absent;
        }
        match self.evict_batch(std::slice::from_ref(object))[0] {
            Some(_) => EvictOutcome::Evicted,
            None => EvictOutcome::InUse,
        }
    }

    /// Evicts those of these objects that nobody uses, and tells the bytes of each that it did.
    fn evict_batch(&mut self, objects: &[ObjectId]) -> Vec<Option<u64>> {
        let places: Vec<Option<(usize, u64, u64)>> = objects
            .iter()
            .map(|object| {
                let record = self.objects.get(object).filter(|record| !record.hold.is_held())?;
                Some((record.index_slot, record.entry.generation, record.entry.offset))
            })
            .collect();
        for &(slot, generation, _) in places.iter().flatten() {
            self.index().mark_evicting::<ServerParty>(slot, generation);
        }
        free_fence();
        let wanted: FxHashSet<u64> = places.iter().flatten().map(|(_, _, offset)| *offset).collect();
        let mut pinned = FxHashSet::default();
        let known = self.scan_pins(|offset| {
            if wanted.contains(&offset) {
                pinned.insert(offset);
            }
        });
        let mut outcomes = Vec::with_capacity(objects.len());
        for (object, place) in objects.iter().zip(places) {
            let Some((slot, generation, offset)) = place else {
                outcomes.push(None);
                continue;
            };
            if !known || pinned.contains(&offset) {
                self.index().unmark_evicting::<ServerParty>(slot, generation);
                outcomes.push(None);
                continue;
            }
            outcomes.push(self.take_out(object).map(|gone| {
                self.allocator.free(gone.offset, gone.bytes, Temperature::Warm);
                gone.bytes
            }));
        }
        outcomes
    }

    /// The oldest primaries that nobody uses, enough for `bytes_wanted` where there are so many. Spill them, then
    /// `try_evict`.
    pub fn spill_candidates(&mut self, bytes_wanted: u64) -> Vec<ObjectId> {
        let mut pinned = FxHashMap::default();
        if !self.scan_pins(|offset| *pinned.entry(offset).or_insert(0) += 1) {
            return Vec::new();
        }
        let mut candidates = Vec::new();
        let mut bytes = 0;
        for object in self.primaries.values() {
            if bytes >= bytes_wanted {
                break;
            }
            let Some(record) = self.objects.get(object) else {
                continue;
            };
            if !pinned.contains_key(&record.entry.offset) && !record.hold.is_held() {
                bytes += allocated_bytes(record.entry.size);
                candidates.push(*object);
            }
        }
        candidates
    }

    /// Reads a sealed object. While any clone of the handle lives its bytes stay. A cached copy counts as used now.
    pub fn read(&mut self, object: &ObjectId) -> Option<StoredObject> {
        self.lookup(object)?;
        self.next_age += 1;
        let age = self.next_age;
        let record = self.objects.get_mut(object)?;
        if record.entry.role == Role::Cache {
            self.cache.remove(&record.age);
            self.cache.insert(age, *object);
            record.age = age;
        }
        Some(StoredObject {
            mapping: self.mapping.clone(),
            offset: record.entry.offset,
            size: record.entry.size,
            metadata: record.entry.metadata,
            _hold: record.hold.clone(),
        })
    }

    /// Starts an object that the server fills itself.
    pub fn create_local(
        &mut self,
        object: ObjectId,
        size: u64,
        purpose: LocalPurpose,
    ) -> Result<LocalBuffer, StoreError> {
        if self.lookup(&object).is_some() {
            return Err(StoreError::AlreadyExists { object });
        }
        if self.filling.contains_key(&object) {
            self.collect();
            if self.filling.contains_key(&object) {
                return Err(StoreError::AlreadyExists { object });
            }
        }
        if !self.has_room_in_index() {
            return Err(StoreError::TooManyObjects {
                limit: self.max_objects,
            });
        }
        let bytes = allocated_bytes(size);
        let (allocation, reserved) = self.allocate(bytes, bytes)?;
        let filling = Filling {
            offset: allocation.offset,
            bytes,
            purpose,
            hold: Hold::new(reserved),
        };
        let buffer = LocalBuffer {
            mapping: self.mapping.clone(),
            object,
            offset: allocation.offset,
            size,
            hold: filling.hold.clone(),
        };
        self.filling.insert(object, filling);
        Ok(buffer)
    }

    /// Seals what `create_local` started. Where a client published the same object meanwhile, this copy is dropped and
    /// the error says so.
    pub fn seal(&mut self, mut buffer: LocalBuffer, metadata: u32, role: Role) -> Result<ObjectEntry, StoreError> {
        let (object, offset, size) = (buffer.object, buffer.offset, buffer.size);
        buffer.writable()?;
        if self.filling.get(&object).is_none_or(|filling| filling.offset != offset) {
            return Err(StoreError::NotFound { object });
        }
        if self.lookup(&object).is_some() {
            self.abort(buffer);
            return Err(StoreError::AlreadyExists { object });
        }
        drop(buffer);
        self.filling.remove(&object);
        let generation = self.next_generation();
        let entry = ObjectEntry {
            object,
            offset,
            size,
            metadata,
            role,
            generation,
            creator: None,
        };
        self.enter(entry);
        Ok(entry)
    }

    /// Gives up what `create_local` started.
    pub fn abort(&mut self, buffer: LocalBuffer) {
        let ours = self
            .filling
            .get(&buffer.object)
            .is_some_and(|filling| filling.offset == buffer.offset);
        if ours {
            let object = buffer.object;
            drop(buffer);
            self.stop_filling(&object);
        }
    }
}
