//! The object store's side of the node: owns what is here in memory and on disk, who waits for room, and spilling and
//! restoring.
//!
//! When the store is full: cached copies go first, then primaries are spilled, and whoever needs room waits in turn. Who
//! waited without any progress for too long is told who holds what. An object larger than the store is refused at once.
//!
//! Invariants:
//! 1. Every request for room or for an object is answered, unless it was cancelled or its link is gone.
//! 2. What is on disk of an object that was freed is gone.

use super::node::{LinkRole, Node, Timer};
use super::spilling::Done;
use super::transfer::WaiterKind;
use crate::objects::{RoomFor, Wanted};
use crate::pull::{PullEvent, WaiterId};
use ray_ids::{ObjectId, WorkerId};
use ray_rpc::{CloseReason, Frame, Link};
use ray_store::{ClientSlot, EvictOutcome, Extent, LocalPurpose, Role, StoreError, StoreEvent};
use ray_wire::layout::StoredLayout;
use ray_wire::{kinds, CancelFetch, ExtentInfo, ExtentLent, FetchObject, FreeObjects, RequestExtent, ReturnExtents};
use std::sync::Arc;

/// How often those who wait for room try again while nothing tells of memory that clients let go.
const ROOM_RETRY_MS: u64 = 20;
/// How often clients are asked for unused memory while somebody waits.
const RECALL_EVERY_MS: u64 = 200;
/// After a write to disk failed spilling pauses for so long.
const SPILL_PAUSE_MS: u64 = 1_000;

/// Buffers up to here are given their memory by the thread that serves; it takes a third of a millisecond a MiB.
const PREPARED_HERE_BYTES: u64 = 1 << 20;

/// How an attempt to give room ended.
enum Attempt {
    Done,
    Full {
        needed: u64,
    },
    /// Another buffer of the same object is about to go.
    Later,
}

fn wire<M: prost::Message + Default>(name: &'static str, frame: &Frame) -> Result<M, String> {
    ray_wire::decode(name, frame.header.clone()).map_err(|error| error.to_string())
}

fn object_ids(bytes: &[u8]) -> Vec<ObjectId> {
    bytes
        .chunks(ObjectId::SIZE)
        .filter_map(|id| ObjectId::from_binary(id).ok())
        .collect()
}

impl Node {
    /// A frame about objects. Kinds that this version does not know are left alone.
    pub(super) fn on_object_frame(
        &mut self,
        link: &Arc<Link>,
        role: LinkRole,
        worker: WorkerId,
        frame: Frame,
    ) -> Result<(), String> {
        let slot = |node: &Self| {
            let slot = node.processes.get(&worker).and_then(|process| process.slot);
            slot.ok_or_else(|| format!("{} has no place in the object store", link.description()))
        };
        match frame.kind {
            kinds::REQUEST_EXTENT => {
                let message: RequestExtent = wire("RequestExtent", &frame)?;
                slot(self)?;
                self.drain_store();
                self.request_extent(worker, frame.correlation, message.minimum_bytes);
            }
            kinds::RETURN_EXTENTS => {
                let message: ReturnExtents = wire("ReturnExtents", &frame)?;
                let slot = slot(self)?;
                for extent in message.extents {
                    let extent = Extent {
                        offset: extent.offset,
                        len: extent.length,
                        reserved: extent.reserved,
                    };
                    self.store.give_back(slot, extent).map_err(|error| error.to_string())?;
                }
                self.serve_room();
            }
            kinds::RING_DOORBELL => {
                self.drain_store();
                self.serve_room();
            }
            kinds::FREE_OBJECTS => {
                let message: FreeObjects = wire("FreeObjects", &frame)?;
                self.drain_store();
                self.free_objects(&object_ids(&message.object_ids), "its owner freed it");
                self.serve_room();
            }
            kinds::FETCH_OBJECT => {
                let message: FetchObject = wire("FetchObject", &frame)?;
                let object = ObjectId::from_binary(&message.object_id).map_err(|error| error.to_string())?;
                if let (LinkRole::Unknown, true) = (role, worker.is_nil()) {
                    return Err("it asked for an object before it registered".into());
                }
                let owner = message
                    .owner
                    .as_ref()
                    .and_then(|owner| Some((owner.worker().ok()?, owner.node().ok()?)));
                if let Some((owner, node)) = owner.filter(|(_, node)| *node != self.node_id) {
                    // A copy that arrives is told to its owner by way of that node.
                    self.elsewhere.note(owner, node);
                }
                let locations = message
                    .locations
                    .iter()
                    .filter_map(|address| address.node().ok())
                    .collect();
                let waiter = self.add_waiter(link, frame.correlation, object, WaiterKind::Fetch);
                self.want_object(object, waiter, locations);
            }
            kinds::CANCEL_FETCH => {
                let message: CancelFetch = wire("CancelFetch", &frame)?;
                let object = ObjectId::from_binary(&message.object_id).map_err(|error| error.to_string())?;
                self.cancel_waiters(|waiter| waiter.link.id() == link.id() && waiter.object == object);
            }
            kinds::PULL_CHUNK => self.serve_chunk(link, &frame)?,
            kinds::OBJECT_CHUNK => self.chunk_arrived(frame)?,
            _ => {}
        }
        Ok(())
    }

    /// Learns what clients published and deleted.
    pub(super) fn drain_store(&mut self) {
        for event in self.store.drain_rings() {
            match event {
                StoreEvent::Published(published) => self.object_is_here(published.object),
                StoreEvent::Deleted { object, .. } => self.object_freed(&object, "its owner freed it"),
                StoreEvent::Duplicate { .. } => {}
                StoreEvent::IndexFull { .. } => {
                    let evicted = self.store.evict_cache(1 << 20);
                    self.forget_evicted(&evicted);
                }
                StoreEvent::Rejected { slot, reason } => {
                    let broken = self.processes.values().find(|process| process.slot == Some(slot));
                    if let Some(link) = broken.and_then(|process| process.link.clone()) {
                        link.close(CloseReason::local(format!(
                            "its ring of the object store is broken: {reason}"
                        )));
                    }
                }
            }
        }
    }

    /// An object is in the store now: notes its owner and tells those who wait for it.
    pub(super) fn object_is_here(&mut self, object: ObjectId) {
        if let Some(stored) = self.store.read(&object) {
            let owner = StoredLayout::read(&stored).map_or(WorkerId::NIL, |layout| layout.owner);
            self.owners.add(object, owner, stored.len() as u64);
        }
        self.step_pulls(PullEvent::Local { object });
    }

    fn object_freed(&mut self, object: &ObjectId, reason: &str) {
        self.owners.remove(object);
        if let Some(file) = self.spilled.free(object) {
            self.spiller.remove(file);
        }
        if let Some(waiters) = self.restoring.remove(object) {
            self.room
                .retain(|purpose| *purpose != RoomFor::Restore { object: *object });
            for waiter in waiters {
                self.tell_failed(waiter, *object, reason, Vec::new(), false);
            }
        }
        self.step_pulls(PullEvent::Freed {
            object: *object,
            reason: reason.into(),
        });
    }

    pub(super) fn free_objects(&mut self, objects: &[ObjectId], reason: &str) {
        self.store.delete_many(objects);
        for object in objects {
            self.object_freed(object, reason);
        }
    }

    /// A process is dead: what it owned here is nobody's.
    pub(super) fn owner_of_objects_died(&mut self, worker: WorkerId) {
        self.drain_store();
        let objects = self.owners.of(&worker);
        if !objects.is_empty() {
            self.free_objects(&objects, "its owner died");
            self.serve_room();
        }
    }

    pub(super) fn forget_store_client(&mut self, worker: WorkerId, slot: ClientSlot) {
        if let Err(error) = self.store.forget_client(slot) {
            eprintln!("raylet: {error}");
        }
        self.room
            .retain(|purpose| !matches!(purpose, RoomFor::Extent { process, .. } if *process == worker));
        self.owner_of_objects_died(worker);
        self.serve_room();
    }

    /// Cached copies that were dropped; one that is on disk is here still.
    fn forget_evicted(&mut self, objects: &[ObjectId]) {
        for object in objects {
            if self.spilled.location(object).is_none() {
                self.owners.remove(object);
            }
        }
    }

    fn request_extent(&mut self, worker: WorkerId, correlation: u64, bytes: u64) {
        let capacity = self.store.ledger().capacity;
        if bytes > capacity {
            let error = format!(
                "an object of {bytes} bytes can never be stored: the object store of this node has {capacity} bytes in all; \
                 start the node with a larger object_store_memory, or store less at once"
            );
            return self.answer_extent(worker, correlation, Err(error));
        }
        self.room.push(
            RoomFor::Extent {
                process: worker,
                correlation,
            },
            bytes,
            self.now(),
        );
        self.serve_room();
    }

    fn answer_extent(&self, worker: WorkerId, correlation: u64, result: Result<Extent, String>) {
        let answer = match result {
            Ok(extent) => ExtentLent {
                extent: Some(ExtentInfo {
                    offset: extent.offset,
                    length: extent.len,
                    reserved: extent.reserved,
                }),
                error: String::new(),
            },
            Err(error) => ExtentLent { extent: None, error },
        };
        self.send_to(&worker, kinds::EXTENT_LENT, correlation, ray_wire::encode(&answer));
    }

    /// Serves those who wait for room, in turn, as far as room can be made.
    pub(super) fn serve_room(&mut self) {
        if self.serving_room {
            return;
        }
        self.serving_room = true;
        while let Some(wanted) = self.room.front().cloned() {
            match self.try_serve(&wanted) {
                Attempt::Done => {
                    let now = self.now();
                    if self.room.front().is_some_and(|first| first.purpose == wanted.purpose) {
                        self.room.served(now);
                    }
                }
                Attempt::Later => break,
                Attempt::Full { needed } => {
                    if !self.make_room(needed) {
                        break;
                    }
                    let now = self.now();
                    self.room.progress(now);
                }
            }
        }
        self.serving_room = false;
        if !self.room.is_empty() && !self.has_timer(Timer::Room) {
            self.at(ROOM_RETRY_MS, Timer::Room);
        }
    }

    /// Somebody has waited for room for a moment.
    pub(super) fn room_timer(&mut self) {
        self.drain_store();
        self.serve_room();
        let now = self.now();
        if self.spilled.is_busy() {
            // A file that is being written is hope, however slow the disk: it ends, well or not.
            self.room.progress(now);
        }
        while let Some(wanted) = self.room.take_hopeless(now, self.limits.object_store_full_wait_ms) {
            let error = self.full_error(&wanted);
            self.refuse_room(wanted.purpose, error);
        }
    }

    fn refuse_room(&mut self, purpose: RoomFor, error: String) {
        match purpose {
            RoomFor::Extent { process, correlation } => self.answer_extent(process, correlation, Err(error)),
            RoomFor::Transfer { object } => {
                self.held_chunks.remove(&object);
                self.step_pulls(PullEvent::BufferRefused { object, reason: error });
            }
            RoomFor::Restore { object } => {
                for waiter in self.restoring.remove(&object).unwrap_or_default() {
                    self.tell_failed(waiter, object, &error, Vec::new(), true);
                }
            }
        }
    }

    fn try_serve(&mut self, wanted: &Wanted) -> Attempt {
        let full = |error: &StoreError| match error {
            StoreError::Full { needed, .. } => Some(*needed),
            StoreError::NoMemory { .. } | StoreError::TooManyObjects { .. } => Some(wanted.bytes.max(1)),
            _ => None,
        };
        match wanted.purpose {
            RoomFor::Extent { process, correlation } => {
                let Some(slot) = self.processes.get(&process).and_then(|process| process.slot) else {
                    return Attempt::Done;
                };
                match self.store.lend_extent(slot, wanted.bytes) {
                    Ok(extent) => self.answer_extent(process, correlation, Ok(extent)),
                    Err(error) => match full(&error) {
                        Some(needed) => return Attempt::Full { needed },
                        None => self.answer_extent(process, correlation, Err(error.to_string())),
                    },
                }
            }
            RoomFor::Transfer { object } => match self.store.create_local(object, wanted.bytes, LocalPurpose::Transfer)
            {
                Ok(buffer) if wanted.bytes <= PREPARED_HERE_BYTES => self.buffer_made(object, buffer, None),
                Ok(buffer) => self.spiller.prepare(object, buffer),
                Err(StoreError::AlreadyExists { .. }) if self.store.contains(&object) => self.object_is_here(object),
                Err(StoreError::AlreadyExists { .. }) => return Attempt::Later,
                Err(error) => match full(&error) {
                    Some(needed) => return Attempt::Full { needed },
                    None => self.refuse_room(wanted.purpose.clone(), error.to_string()),
                },
            },
            RoomFor::Restore { object } => {
                let Some(location) = self.spilled.location(&object) else {
                    return Attempt::Done;
                };
                match self.store.create_local(object, wanted.bytes, LocalPurpose::Restore) {
                    Ok(buffer) => self.spiller.read(object, location, buffer),
                    Err(StoreError::AlreadyExists { .. }) if self.store.contains(&object) => self.restored(object),
                    Err(StoreError::AlreadyExists { .. }) => return Attempt::Later,
                    Err(error) => match full(&error) {
                        Some(needed) => return Attempt::Full { needed },
                        None => self.refuse_room(wanted.purpose.clone(), error.to_string()),
                    },
                }
            }
        }
        Attempt::Done
    }

    /// Makes room by dropping what may be dropped. True if something was: try again. False: wait.
    fn make_room(&mut self, needed: u64) -> bool {
        self.store.collect();
        let evicted = self.store.evict_cache(needed);
        if !evicted.is_empty() {
            self.forget_evicted(&evicted);
            return true;
        }
        self.recall_extents();
        let batch = needed.max(self.limits.spill_file_bytes);
        let candidates = self.store.spill_candidates(batch);
        let mut dropped = false;
        let mut bytes = 0;
        for object in &candidates {
            // What is on disk already only needs to go from memory; no more of it than is needed.
            let Some(location) = self.spilled.location(object).filter(|_| bytes < needed) else {
                continue;
            };
            if self.store.try_evict(object) == EvictOutcome::Evicted {
                bytes += location.length;
                dropped = true;
            }
        }
        if dropped {
            return true;
        }
        if self.spilled.is_busy() || self.now() < self.spill_not_before {
            return false;
        }
        if let Some((file, chosen)) = self.spilled.begin(&candidates) {
            let objects = chosen
                .iter()
                .filter_map(|object| Some((*object, self.store.read(object)?)))
                .collect();
            self.spiller.write(file, objects);
        }
        false
    }

    fn recall_extents(&mut self) {
        let now = self.now();
        if now < self.last_extent_recall_ms + RECALL_EVERY_MS {
            return;
        }
        self.last_extent_recall_ms = now;
        for (_, worker, bytes) in self.store.lent_by_client() {
            if bytes > 0 {
                self.send_to(&worker, kinds::RECALL_EXTENTS, 0, bytes::Bytes::new());
            }
        }
    }

    /// What the spill thread has done.
    pub(super) fn take_spilled(&mut self) {
        for done in self.spiller.take_done() {
            match done {
                Done::Written { file, results, error } => {
                    if let Some(error) = error {
                        eprintln!("raylet: spilling failed: {error}");
                        self.spill_error = Some(error);
                        self.spill_not_before = self.now() + SPILL_PAUSE_MS;
                    } else {
                        self.spill_error = None;
                    }
                    let (objects, gone) = self.spilled.written(file, results);
                    if gone {
                        self.spiller.remove(file);
                    }
                    let mut dropped = false;
                    for object in objects {
                        // One that is in use stays in memory too, and goes when it is next a candidate.
                        dropped |= self.store.try_evict(&object) == EvictOutcome::Evicted;
                    }
                    if dropped {
                        let now = self.now();
                        self.room.progress(now);
                    }
                }
                Done::Read {
                    object,
                    location,
                    buffer,
                    error,
                } => self.restore_read(object, location, buffer, error),
                Done::Prepared { object, buffer, error } => {
                    self.buffer_made(object, buffer, error);
                    self.run_later();
                }
            }
        }
        self.serve_room();
    }

    fn restore_read(
        &mut self,
        object: ObjectId,
        location: crate::spill::Location,
        buffer: ray_store::LocalBuffer,
        error: Option<String>,
    ) {
        if self.spilled.location(&object) != Some(location) {
            // It was freed meanwhile, and its waiters were told.
            return self.store.abort(buffer);
        }
        if let Some(error) = error {
            self.store.abort(buffer);
            eprintln!("raylet: {error}");
            if let Some(file) = self.spilled.free(&object) {
                self.spiller.remove(file);
            }
            if !self.store.contains(&object) {
                self.owners.remove(&object);
            }
            for waiter in self.restoring.remove(&object).unwrap_or_default() {
                self.tell_failed(waiter, object, &error, vec![self.node_id], false);
            }
            return;
        }
        match self.store.seal(buffer, location.metadata, Role::Cache) {
            Ok(_) | Err(StoreError::AlreadyExists { .. }) => self.restored(object),
            Err(error) => {
                for waiter in self.restoring.remove(&object).unwrap_or_default() {
                    self.tell_failed(waiter, object, &error.to_string(), Vec::new(), false);
                }
            }
        }
    }

    fn restored(&mut self, object: ObjectId) {
        for waiter in self.restoring.remove(&object).unwrap_or_default() {
            self.tell_local(waiter, object, false);
        }
    }

    /// Somebody wants an object in the local store.
    pub(super) fn want_object(&mut self, object: ObjectId, waiter: WaiterId, locations: Vec<ray_ids::NodeId>) {
        self.drain_store();
        if self.store.contains(&object) {
            return self.tell_local(waiter, object, false);
        }
        if let Some(location) = self.spilled.location(&object) {
            let waiters = self.restoring.entry(object).or_default();
            waiters.push(waiter);
            if waiters.len() == 1 {
                self.room.push(
                    RoomFor::Restore { object },
                    location.length,
                    self.start.elapsed().as_millis() as u64,
                );
            }
            return self.serve_room();
        }
        // This node itself is no holder, whatever is said.
        let locations = locations.into_iter().filter(|node| *node != self.node_id).collect();
        self.step_pulls(PullEvent::Fetch {
            object,
            waiter,
            locations,
        });
    }
}
