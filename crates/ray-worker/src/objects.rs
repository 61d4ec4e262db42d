//! Objects: put, get, wait and free.
//!
//! Invariants:
//! 1. A large value is written once, straight into the object store, and its reference is handed out only after it is
//!    sealed.
//! 2. No lock is held while a thread waits, and every wait has a deadline or ends with what it waits for.

use std::sync::Arc;
use std::time::Instant;

use ray_ids::{NodeId, ObjectId, TaskId, WorkerId};
use ray_rpc::WaitOutcome;
use ray_store::Lookup;
use ray_wire::id_bytes;
use ray_wire::layout::{ErrorValue, StoredLayout};

use crate::gcs::{interrupted, WAIT_SLICE};
use crate::inner::{CoreWorker, Inner, Reference};
use crate::replies::system_error;
use crate::slot::{Group, Slot, SlotValue, Wake};
use crate::value::{error_value, Serialized, StoredValue, Value};
use crate::WorkerError;

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
            // A signal that came between two sleeps interrupts none of them: it is found at the end of the slice.
            let woken = self.reactor.wait(&group.waiter, Some(slice));
            if matches!(woken, WaitOutcome::Interrupted | WaitOutcome::TimedOut) && interrupted() {
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
}
