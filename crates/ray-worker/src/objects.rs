//! Objects: put, get, wait, making them local, and making lost ones again.
//!
//! Invariants:
//! 1. A large value is written once, straight into the object store, and its reference is handed out only after it is
//!    sealed.
//! 2. A lost object that can be made again is; otherwise its slot holds an error that says why not.
//! 3. No lock is held while a thread waits, and every wait has a deadline or ends with what it waits for.

use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use bytes::Bytes;
use ray_ids::{NodeId, ObjectId, TaskId, WorkerId};
use ray_ownership::lineage::NotRebuildable;
use ray_rpc::{WaitOutcome, Waiter};
use ray_store::{Extent, Lookup, StoreError};
use ray_wire::layout::{ErrorValue, StoredLayout, ERROR_OBJECT_LOST, ERROR_RECONSTRUCTION_FAILED};
use ray_wire::{
    id_bytes, kinds, ExtentInfo, ExtentLent, FetchFailed, FetchObject, ReportLost, RequestExtent, ReturnExtents,
};

use crate::gcs::{interrupted, WAIT_SLICE};
use crate::generators::item_id;
use crate::inner::{CoreWorker, Inner, Pending, PendingEntry, Reference, Retry, State};
use crate::replies::system_error;
use crate::slot::{lock, Group, Slot, SlotValue, Wake};
use crate::value::{error_value, Serialized, StoredValue, Value};
use crate::WorkerError;

/// How long the raylet may take to find room before the caller is told that it did not answer.
const EXTENT_TIMEOUT: Duration = Duration::from_secs(120);
/// How long the raylet may take to read this client's ring.
const RING_TIMEOUT: Duration = Duration::from_secs(30);

/// A thread that waits for room in the object store.
#[derive(Debug, Default)]
pub(crate) struct ExtentWait {
    pub reply: Mutex<Option<Result<ExtentLent, String>>>,
    pub waiter: Waiter,
}

/// Why `get` gives no values.
#[derive(Debug)]
pub enum GetFailure {
    /// The time is over; how many values are still missing.
    TimedOut { missing: usize },
    /// The runtime failed, or a signal arrived.
    Worker(WorkerError),
}

impl From<WorkerError> for GetFailure {
    fn from(error: WorkerError) -> Self {
        Self::Worker(error)
    }
}

/// Which references are ready, by index, ascending.
#[derive(Debug)]
pub struct WaitResult {
    pub ready: Vec<usize>,
}

impl CoreWorker {
    /// Stores a value as a new object of ours.
    pub fn put_serialized(&self, value: Serialized, task: TaskId) -> Result<Reference, WorkerError> {
        let id = self.0.new_put_id(task);
        let inner: Vec<ObjectId> = value.contained.iter().map(|contained| contained.object).collect();
        let slot = if value.size() <= ray_wire::INLINE_LIMIT_BYTES {
            Slot::inline(value.into_inline())
        } else {
            // The previous objects' room is free for this one only once their drops are counted.
            drop(self.0.enter()?);
            let bytes = self.0.write_to_store(id, &value, self.0.worker_id)?;
            Slot::stored(bytes)
        };
        let stored = matches!(slot.value(), SlotValue::Stored { .. });
        let mut state = self.0.enter()?;
        state.refs.own(id, slot.clone());
        if stored {
            state.refs.add_location(&id, self.0.node_id);
        }
        state.refs.contain(id, &inner);
        Ok(Reference {
            id,
            slot,
            core: self.0.clone(),
        })
    }

    /// The values, in order. Waits with no lock held.
    pub fn get(&self, references: &[&Reference], deadline: Option<Instant>) -> Result<Vec<Value>, GetFailure> {
        let mut values: Vec<Option<Value>> = Vec::with_capacity(references.len());
        let mut missing = Vec::new();
        for (index, reference) in references.iter().enumerate() {
            let value = self.0.try_read(reference)?;
            if value.is_none() {
                missing.push(index);
            }
            values.push(value);
        }
        if !missing.is_empty() {
            self.0.check()?;
            let _blocked = self.0.blocked("get");
            while !missing.is_empty() {
                self.0.wait_for_values(references, &missing, deadline)?;
                let mut failure = None;
                missing.retain(|index| match self.0.try_read(references[*index]) {
                    Ok(Some(value)) => {
                        values[*index] = Some(value);
                        false
                    }
                    Ok(None) => true,
                    Err(error) => {
                        failure = Some(error);
                        true
                    }
                });
                if let Some(error) = failure {
                    return Err(error.into());
                }
            }
        }
        Ok(values.into_iter().flatten().collect())
    }

    /// Waits until `count` of the references are ready, or the deadline.
    ///
    /// The thread's group stays registered where the values are still missing, so that a loop that waits for one after
    /// the other looks at each reference but takes locks only for those it has not waited for before.
    pub fn wait(
        &self,
        references: &[&Reference],
        count: usize,
        deadline: Option<Instant>,
        fetch_local: bool,
    ) -> Result<WaitResult, WorkerError> {
        let group = Group::lasting();
        let mut ready = Vec::with_capacity(count.min(references.len()));
        let mut blocked = None;
        loop {
            group.begin(count);
            ready.clear();
            for (index, reference) in references.iter().enumerate() {
                if self.0.is_here(reference, fetch_local) {
                    ready.push(index);
                    if ready.len() == count {
                        break;
                    }
                }
            }
            if ready.len() >= count || deadline.is_some_and(|deadline| Instant::now() >= deadline) {
                return Ok(WaitResult { ready });
            }
            group.found(ready.len());
            self.0.register(references, &ready, &group, fetch_local)?;
            if blocked.is_none() {
                blocked = Some(self.0.blocked("wait"));
            }
            let outcome = self
                .0
                .wait_for(&group.waiter, deadline, "wait", || group.is_done().then_some(()));
            match outcome {
                Ok(()) | Err(WorkerError::Timeout { .. }) => {}
                Err(error) => return Err(error),
            }
        }
    }

    /// Lets the values go although they are counted: getting one says that it was freed.
    pub fn free(&self, references: &[Reference], local_only: bool) -> Result<(), WorkerError> {
        let mut state = self.0.enter()?;
        for reference in references {
            let Some(entry) = state.refs.get(&reference.id) else {
                continue;
            };
            if !entry.is_owned() || !reference.slot.is_ready() {
                continue;
            }
            let nodes: Vec<NodeId> = entry
                .locations()
                .iter()
                .copied()
                .filter(|node| !local_only || *node == self.0.node_id)
                .collect();
            for node in &nodes {
                state.refs.remove_location(&reference.id, *node);
                self.0.free_on(&mut state, *node, &reference.id);
            }
            if local_only {
                continue;
            }
            let error = ErrorValue {
                kind: ray_wire::layout::ERROR_OBJECT_FREED,
                message: format!("object {} was freed by ray.internal.free", reference.id),
                object_id: id_bytes(reference.id.as_bytes()),
                ..ErrorValue::default()
            };
            let mut wakes = Vec::new();
            reference
                .slot
                .set(SlotValue::Inline(Arc::new(error_value(&error))), &mut wakes);
            self.0.deliver(&mut state, wakes);
        }
        Ok(())
    }

    /// Has the queue told when the object's value is known.
    pub fn watch(&self, reference: &Reference, queue: &crate::Completions, token: u64) -> Result<(), WorkerError> {
        let mut state = self.0.enter()?;
        if !self
            .0
            .await_value(&mut state, reference.id, Wake::Queue(queue.0.clone(), token))
        {
            queue.push(token);
        }
        Ok(())
    }

    /// Writes a value into this node's store for `owner`, waiting for room. Returns its size.
    pub fn write_to_store(&self, object: ObjectId, value: &Serialized, owner: WorkerId) -> Result<u64, WorkerError> {
        self.0.write_to_store(object, value, owner)
    }
}

impl Inner {
    /// Whether the value can be read without waiting; where `local` says so, from this node.
    fn is_here(&self, reference: &Reference, local: bool) -> bool {
        if !reference.slot.is_ready() {
            return false;
        }
        if !local {
            return true;
        }
        match reference.slot.value() {
            SlotValue::Stored { .. } => self.store().is_ok_and(|store| store.contains(&reference.id)),
            _ => true,
        }
    }

    /// Has the group told of each reference that was not found ready.
    fn register(
        &self,
        references: &[&Reference],
        found: &[usize],
        group: &Arc<Group>,
        fetch_local: bool,
    ) -> Result<(), WorkerError> {
        let mut found = found.iter().copied().peekable();
        let mut entered = None;
        for (index, reference) in references.iter().enumerate() {
            if found.next_if_eq(&index).is_some() {
                continue;
            }
            if !reference.slot.is_ready() && reference.slot.is_registered(group) {
                continue;
            }
            let state = match &mut entered {
                Some(state) => state,
                None => entered.insert(self.enter()?),
            };
            if reference.slot.is_ready() {
                self.rebuild_if_lost(state, reference.id, &reference.slot);
            }
            if reference.slot.register(group) {
                self.ask_owner_once(state, reference.id, &reference.slot);
            } else if fetch_local && !self.is_here(reference, true) {
                self.fetch(state, reference.id, Some(group));
            } else {
                group.arrive();
            }
        }
        Ok(())
    }

    fn try_read(&self, reference: &Reference) -> Result<Option<Value>, WorkerError> {
        if !reference.slot.is_ready() {
            return Ok(None);
        }
        match reference.slot.value() {
            SlotValue::Pending => Ok(None),
            SlotValue::Inline(value) => Ok(Some(Value::Inline(value))),
            SlotValue::Stored { .. } => self.read_stored(&reference.id),
        }
    }

    /// Reads an object of this node's store, if it is there.
    pub fn read_stored(&self, object: &ObjectId) -> Result<Option<Value>, WorkerError> {
        match self.store()?.get(object)? {
            Lookup::Found(pinned) => match StoredLayout::read(&pinned) {
                Some(layout) => Ok(Some(Value::Stored(StoredValue { pinned, layout }))),
                None => {
                    let value = system_error(format!("object {object} is damaged in the object store"));
                    Ok(Some(Value::Inline(Arc::new(value))))
                }
            },
            Lookup::Absent => Ok(None),
        }
    }

    /// Waits until something can be read of each of the missing values, or has changed.
    fn wait_for_values(
        &self,
        references: &[&Reference],
        missing: &[usize],
        deadline: Option<Instant>,
    ) -> Result<(), GetFailure> {
        let group = Group::new(1);
        let mut registered = Vec::new();
        {
            let mut state = self.enter()?;
            if let Some(reason) = &state.raylet_gone {
                return Err(WorkerError::RayletGone(reason.clone()).into());
            }
            for index in missing {
                let reference = references[*index];
                if state.refs.get(&reference.id).is_none() {
                    if reference.slot.is_ready() {
                        continue;
                    }
                    return Err(WorkerError::UnknownObject(reference.id.hex()).into());
                }
                group.add(1);
                if self.await_value(&mut state, reference.id, Wake::Group(group.clone())) {
                    registered.push(*index);
                } else if !matches!(reference.slot.value(), SlotValue::Stored { .. })
                    || self.store().is_ok_and(|store| store.contains(&reference.id))
                {
                    group.arrive();
                } else {
                    if let Some(failure) = state.fetch_failures.remove(&reference.id) {
                        return Err(WorkerError::StoreFull(failure).into());
                    }
                    self.fetch(&mut state, reference.id, Some(&group));
                }
            }
        }
        group.arrive();
        let outcome = loop {
            if group.is_done() {
                break Ok(());
            }
            if let Err(error) = self.check() {
                break Err(error.into());
            }
            if let Some(reason) = &self.lock().raylet_gone {
                break Err(WorkerError::RayletGone(reason.clone()).into());
            }
            let now = Instant::now();
            if deadline.is_some_and(|deadline| now >= deadline) {
                let missing = missing
                    .iter()
                    .filter(|index| !references[**index].slot.is_ready())
                    .count();
                break Err(GetFailure::TimedOut {
                    missing: missing.max(1),
                });
            }
            let slice = deadline.map_or(now + WAIT_SLICE, |deadline| deadline.min(now + WAIT_SLICE));
            if self.reactor.wait(&group.waiter, Some(slice)) == WaitOutcome::Interrupted && interrupted() {
                break Err(WorkerError::Interrupted.into());
            }
        };
        if outcome.is_err() {
            for index in registered {
                references[index].slot.remove_group(&group);
            }
        }
        outcome
    }

    /// Has the raylet make an object local, once; the group hears of its coming.
    pub fn fetch(&self, state: &mut State, object: ObjectId, group: Option<&Arc<Group>>) {
        let waiting = state.fetches.get_mut(&object);
        if let Some(waiting) = waiting {
            let known = |group: &&Arc<Group>| waiting.iter().any(|other| Arc::ptr_eq(other, group));
            let new = group.filter(|group| !known(group)).cloned();
            waiting.extend(new);
            return;
        }
        state.fetches.insert(object, group.cloned().into_iter().collect());
        self.send_fetch(state, object);
    }

    pub fn send_fetch(&self, state: &mut State, object: ObjectId) {
        let Some(entry) = state.refs.get(&object) else {
            return self.end_fetch(state, object);
        };
        let SlotValue::Stored { locations, .. } = entry.value.value() else {
            return self.end_fetch(state, object);
        };
        let mut locations = locations.map(|locations| locations.to_vec()).unwrap_or_default();
        locations.extend(
            entry
                .locations()
                .iter()
                .filter_map(|node| state.nodes.get(node).cloned()),
        );
        let owner = self.owner_address(state, &object);
        let message = FetchObject {
            object_id: id_bytes(object.as_bytes()),
            locations,
            owner: Some(owner),
        };
        let correlation = self.correlation();
        state.pending.insert(
            correlation,
            PendingEntry {
                what: Pending::Fetch,
                link: self.raylet.id(),
            },
        );
        let _ = self
            .raylet
            .send(kinds::FETCH_OBJECT, correlation, ray_wire::encode(&message), &[]);
    }

    fn end_fetch(&self, state: &mut State, object: ObjectId) {
        for group in state.fetches.remove(&object).unwrap_or_default() {
            group.arrive();
        }
    }

    /// The raylet made an object local. It tells the owner of a new copy itself.
    pub fn on_object_local(&self, state: &mut State, object: ObjectId) {
        self.end_fetch(state, object);
    }

    /// The raylet could not.
    pub fn on_fetch_failed(&self, state: &mut State, object: ObjectId, failure: &FetchFailed) {
        let absent: Vec<NodeId> = failure
            .absent_nodes
            .iter()
            .filter_map(|node| NodeId::from_binary(node).ok())
            .collect();
        let Some(entry) = state.refs.get(&object) else {
            return self.end_fetch(state, object);
        };
        let slot = entry.value.clone();
        if failure.store_full {
            state.fetch_failures.insert(object, failure.reason.clone());
        } else if let Some(owner) = entry.borrowed_owner() {
            // The owner knows best: tell it, and ask again.
            let message = ReportLost {
                object_id: id_bytes(object.as_bytes()),
                node_ids: failure.absent_nodes.clone(),
            };
            if let Ok(link) = self.worker_link(state, owner) {
                let _ = crate::session::send(&link, kinds::REPORT_LOST, 0, ray_wire::encode(&message), &[]);
            }
            slot.forget();
            slot.note_asked();
            self.retry_later(state, Duration::from_millis(20), Retry::AskOwner(object));
        } else if absent.is_empty() && !entry.locations().is_empty() {
            // Nothing is known to be lost: the holders could not be reached just now.
            return self.retry_later(state, Duration::from_millis(100), Retry::Fetch(object));
        } else {
            self.locations_lost(state, object, &absent);
        }
        self.end_fetch(state, object);
    }

    /// As owner: these nodes have no copy.
    pub fn locations_lost(&self, state: &mut State, object: ObjectId, nodes: &[NodeId]) {
        for node in nodes {
            state.refs.remove_location(&object, *node);
        }
        let Some(slot) = state.refs.get(&object).map(|entry| entry.value.clone()) else {
            return;
        };
        self.rebuild_if_lost(state, object, &slot);
    }

    /// As owner: makes a stored object of which no copy is left again, or says why that cannot be.
    pub fn rebuild_if_lost(&self, state: &mut State, object: ObjectId, slot: &Arc<Slot>) {
        let Some(entry) = state.refs.get(&object) else { return };
        if !entry.is_owned() || !entry.locations().is_empty() || !matches!(slot.value(), SlotValue::Stored { .. }) {
            return;
        }
        let task_id = object.task_id();
        if let Some(task) = state.tasks.get_mut(&task_id) {
            // It runs, or runs again for another of its results; if it does not make this one as well, its end says so.
            let first_item = item_id(task_id, 0).index();
            let trouble = task.trouble_mut();
            trouble.items_again = trouble
                .items_again
                .max(u64::from(object.index().saturating_sub(first_item)) + 1);
            slot.forget();
            return;
        }
        let outcome = if object.index() >= ObjectId::FIRST_PUT_INDEX {
            Err((
                ERROR_OBJECT_LOST,
                "it was created by ray.put, and the only copies were on nodes that died".to_owned(),
            ))
        } else {
            match (
                state.lineage.begin_rebuild(task_id),
                state.lineage_specs.remove(&task_id),
            ) {
                (Ok((arguments, retries_left)), Some((spec, items))) => Ok((arguments, retries_left, spec, items)),
                (Err(NotRebuildable::NoRetriesLeft), _) => Err((
                    ERROR_RECONSTRUCTION_FAILED,
                    "its task has no retries left (max_retries) to run it once more".to_owned(),
                )),
                _ => Err((
                    ERROR_OBJECT_LOST,
                    "every copy was on nodes that died, and its task may not run again (max_retries=0, an actor's \
                     method, or its specification was evicted)"
                        .to_owned(),
                )),
            }
        };
        match outcome {
            Ok((arguments, retries_left, spec, items)) => {
                let mut commands = Vec::new();
                for argument in &arguments {
                    state.refs.revive(argument);
                    state.refs.add_submitted(argument);
                    state.refs.remove_lineage(argument, &mut commands);
                }
                let returns = (0..spec.returns()).map(|index| spec.return_id(index));
                for id in returns.chain((0..items).map(|index| item_id(task_id, index))) {
                    state.refs.revive(&id);
                    if let Some(entry) = state.refs.get(&id) {
                        if entry.locations().is_empty() && matches!(entry.value.value(), SlotValue::Stored { .. }) {
                            entry.value.forget();
                        }
                    }
                }
                self.carry_out_references(state, commands);
                tracing::info!(
                    "object {object} was lost; {} runs again",
                    spec.template.message.function_name
                );
                self.start(state, spec, 1, retries_left);
                if let Some(task) = state.tasks.get_mut(&task_id).filter(|_| items > 0) {
                    task.trouble_mut().items_again = items;
                }
            }
            Err((kind, reason)) => {
                let error = ErrorValue {
                    kind,
                    message: format!("object {object} is lost: {reason}"),
                    object_id: id_bytes(object.as_bytes()),
                    ..ErrorValue::default()
                };
                self.set_and_tell(state, object, SlotValue::Inline(Arc::new(error_value(&error))));
            }
        }
    }

    /// Writes a value into this node's store, waiting for room. Returns its size.
    pub fn write_to_store(&self, object: ObjectId, value: &Serialized, owner: WorkerId) -> Result<u64, WorkerError> {
        self.check()?;
        let (layout, contained) = value.plan(owner);
        let size = layout.total_bytes as u64;
        let mut writer = loop {
            match self.store()?.create(object, size) {
                Ok(writer) => break writer,
                Err(StoreError::NeedExtent { bytes }) => self.request_extent(bytes, object)?,
                Err(error) => return Err(error.into()),
            }
        };
        value.write(&layout, &contained, writer.as_mut_slice());
        let deadline = Instant::now() + RING_TIMEOUT;
        while let Err(unsealed) = writer.seal(layout.format) {
            if !matches!(unsealed.reason, StoreError::RingFull) {
                return Err(unsealed.reason.into());
            }
            if Instant::now() >= deadline {
                return Err(WorkerError::Timeout {
                    what: "the raylet".into(),
                    limit_s: RING_TIMEOUT.as_secs_f64(),
                });
            }
            self.tell_raylet(kinds::RING_DOORBELL, 0, Bytes::new())?;
            // The raylet's answer is that the ring has room; there is no frame to wait for.
            std::thread::sleep(Duration::from_micros(100));
            writer = unsealed.writer;
        }
        Ok(size)
    }

    fn request_extent(&self, bytes: u64, object: ObjectId) -> Result<(), WorkerError> {
        let wait = Arc::new(ExtentWait::default());
        {
            let mut state = self.enter()?;
            self.flush_frees(&mut state);
            let correlation = self.correlation();
            state.pending.insert(
                correlation,
                PendingEntry {
                    what: Pending::Extent(wait.clone()),
                    link: self.raylet.id(),
                },
            );
            let message = RequestExtent {
                minimum_bytes: bytes,
                object_id: id_bytes(object.as_bytes()),
            };
            self.tell_raylet(kinds::REQUEST_EXTENT, correlation, ray_wire::encode(&message))?;
        }
        let deadline = Instant::now() + EXTENT_TIMEOUT;
        let lent = self
            .wait_for(&wait.waiter, Some(deadline), "the raylet's object store", || {
                lock(&wait.reply).take()
            })?
            .map_err(WorkerError::RayletGone)?;
        if !lent.error.is_empty() {
            return Err(WorkerError::StoreFull(lent.error));
        }
        self.take_extent(&lent.extent.unwrap_or_default())
    }

    /// Takes room that the raylet lent. Where its pages cannot be had it goes back at once.
    pub fn take_extent(&self, lent: &ExtentInfo) -> Result<(), WorkerError> {
        let extent = Extent {
            offset: lent.offset,
            len: lent.length,
            reserved: lent.reserved,
        };
        let Err(error) = self.store()?.add_extent(extent) else {
            return Ok(());
        };
        let message = ReturnExtents { extents: vec![*lent] };
        self.tell_raylet(kinds::RETURN_EXTENTS, 0, ray_wire::encode(&message))?;
        Err(WorkerError::StoreFull(error.to_string()))
    }
}
