//! Counts between processes: carries out what the reference table decides, answers other processes as owner.
//!
//! Invariant: 1. An `AddBorrower` whose link breaks is sent again until it is answered or the owner is known to be dead.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use ray_ids::{ActorId, NodeId, ObjectId, TaskId, WorkerId};
use ray_ownership::references::Cover;
use ray_ownership::ReferenceCommand;
use ray_rpc::Link;
use ray_wire::layout::{ErrorValue, ERROR_OBJECT_FREED, ERROR_OWNER_DIED};
use ray_wire::{
    id_bytes, kinds, ActorKey, AddBorrower, Address, BorrowerAdded, FreeObjects, GcsCall, GetObjectStatus,
    ObjectStatus, RemoveBorrower, ReturnsAcknowledged, WatchWorker, STATUS_FREED, STATUS_INLINE, STATUS_STORED,
};

use crate::inner::{CoreWorker, Inner, Pending, PendingEntry, Reference, Retry, State, TOUCHED_TOGETHER};
use crate::session::send;
use crate::slot::{Slot, SlotValue, Wake};
use crate::value::{error_value, Contained, InlineValue};
use crate::WorkerError;

/// How long to wait before a message to a process whose link broke is tried again.
pub(crate) const RETRY_DELAY: Duration = Duration::from_millis(50);
/// How long a dead borrower's objects are kept for those to whom it had passed them.
const LAST_WILL_DELAY: Duration = Duration::from_secs(1);
/// Freed objects gathered for one message, in bytes of ids.
const FREE_BATCH_BYTES: usize = 64 * ObjectId::SIZE;
/// How long freed objects may wait for others.
const FREE_DELAY: Duration = Duration::from_millis(2);

impl Inner {
    pub fn carry_out_references(&self, state: &mut State, commands: Vec<ReferenceCommand>) {
        for command in commands {
            match command {
                ReferenceCommand::FreeValue { object, nodes } => self.free_value(state, object, &nodes),
                ReferenceCommand::AddBorrower {
                    owner,
                    object,
                    borrower,
                    generation,
                } => {
                    self.send_add_borrower(state, owner, object, borrower, generation);
                }
                ReferenceCommand::RemoveBorrower {
                    owner,
                    object,
                    generation,
                } => {
                    let message = RemoveBorrower {
                        object_id: id_bytes(object.as_bytes()),
                        borrower_id: id_bytes(self.worker_id.as_bytes()),
                        generation,
                    };
                    if let Ok(link) = self.worker_link(state, owner) {
                        let _ = send(&link, kinds::REMOVE_BORROWER, 0, ray_wire::encode(&message), &[]);
                    }
                }
                ReferenceCommand::AcknowledgeReturns { worker, task } => {
                    if let Ok(link) = self.worker_link(state, worker) {
                        let message = ReturnsAcknowledged {
                            task_id: id_bytes(task.as_bytes()),
                        };
                        let _ = send(&link, kinds::RETURNS_ACKNOWLEDGED, 0, ray_wire::encode(&message), &[]);
                    }
                }
                ReferenceCommand::Watch { worker } => {
                    let message = WatchWorker {
                        worker: state.addresses.get(&worker).cloned(),
                    };
                    if message.worker.is_some() {
                        let _ = self
                            .raylet
                            .send(kinds::WATCH_WORKER, 0, ray_wire::encode(&message), &[]);
                    }
                }
                ReferenceCommand::ReleaseLineage { object } => {
                    let dropped = state.lineage.return_released(object.task_id());
                    self.drop_lineage(state, dropped.into_iter().collect());
                }
                ReferenceCommand::OwnerDied { object } => self.owner_died(state, object),
            }
        }
    }

    fn send_add_borrower(
        &self,
        state: &mut State,
        owner: WorkerId,
        object: ObjectId,
        borrower: WorkerId,
        generation: u64,
    ) {
        let again = Retry::AddBorrower {
            owner,
            object,
            borrower,
            generation,
        };
        let address = if borrower == self.worker_id {
            Some(self.me.clone())
        } else {
            state.addresses.get(&borrower).cloned()
        };
        let message = AddBorrower {
            object_id: id_bytes(object.as_bytes()),
            borrower: address,
            generation,
        };
        let correlation = self.correlation();
        match self.worker_link(state, owner) {
            Ok(link) => {
                state.pending.insert(
                    correlation,
                    PendingEntry {
                        what: Pending::Borrower,
                        link: link.id(),
                    },
                );
                let _ = send(&link, kinds::ADD_BORROWER, correlation, ray_wire::encode(&message), &[]);
            }
            Err(_) => self.retry_later(state, RETRY_DELAY, again),
        }
    }

    /// A registration is tried again, if it still matters.
    pub fn add_borrower_again(
        &self,
        state: &mut State,
        owner: WorkerId,
        object: ObjectId,
        borrower: WorkerId,
        generation: u64,
    ) {
        if state.refs.get(&object).is_some_and(|entry| !entry.owner_is_dead()) {
            self.send_add_borrower(state, owner, object, borrower, generation);
        }
    }

    /// A process is dead: its borrows end, after a while, in which those to whom it passed a reference, and whose reply
    /// it has not relayed, tell the owner themselves.
    pub fn worker_died(&self, state: &mut State, worker: WorkerId) {
        if !state.dead_workers.insert(worker) {
            return;
        }
        let borrowed = state.refs.borrowed_by(worker);
        for object in &borrowed {
            state.refs.hold(object);
        }
        if !borrowed.is_empty() {
            self.retry_later(state, LAST_WILL_DELAY, Retry::Release(borrowed));
        }
        let mut commands = Vec::new();
        state.refs.worker_died(worker, &mut commands);
        self.carry_out_references(state, commands);
        self.end_sessions_with(state, worker);
    }

    fn owner_died(&self, state: &mut State, object: ObjectId) {
        let error = ErrorValue {
            kind: ERROR_OWNER_DIED,
            message: format!("the owner of object {object} died"),
            object_id: id_bytes(object.as_bytes()),
            ..ErrorValue::default()
        };
        let Some(entry) = state.refs.get(&object) else { return };
        if entry.value.is_ready() && matches!(entry.value.value(), SlotValue::Inline(_)) {
            return;
        }
        self.set_and_tell(state, object, SlotValue::Inline(Arc::new(error_value(&error))));
    }

    fn free_value(&self, state: &mut State, object: ObjectId, nodes: &[NodeId]) {
        state.fetch_failures.remove(&object);
        let task = object.task_id();
        if object.index() == 1 && task.has_actor() && task == TaskId::for_actor_creation(task.actor_id()) {
            return self.actor_out_of_scope(state, task.actor_id());
        }
        for node in nodes {
            self.free_on(state, *node, &object);
        }
    }

    fn actor_out_of_scope(&self, state: &mut State, actor: ActorId) {
        let owned = state
            .actors
            .get(&actor)
            .is_some_and(|entry| entry.owned && !entry.detached);
        if owned && !self.shut_down.load(std::sync::atomic::Ordering::Relaxed) {
            let key = ActorKey {
                actor_id: id_bytes(actor.as_bytes()),
                ..ActorKey::default()
            };
            let _ = self.ask_gcs(state, GcsCall::ActorOutOfScope(key), Pending::Ignored);
        }
    }

    /// Lets a node's store drop its copy.
    pub fn free_on(&self, state: &mut State, node: NodeId, object: &ObjectId) {
        if node == self.node_id && self.store().is_ok_and(|store| store.request_delete(object).is_ok()) {
            // The raylet reads its clients' rings when it must, or when it is told to.
            state.ring_dirty = true;
            self.want_timer(state, std::time::Instant::now() + FREE_DELAY);
            return;
        }
        let batch = state.frees.entry(node).or_default();
        batch.extend_from_slice(object.as_bytes());
        if batch.len() >= FREE_BATCH_BYTES {
            self.flush_frees(state);
        } else {
            self.want_timer(state, std::time::Instant::now() + FREE_DELAY);
        }
    }

    /// Sends what was gathered by `free_on`.
    pub fn flush_frees(&self, state: &mut State) {
        if std::mem::take(&mut state.ring_dirty) {
            let _ = self.raylet.send(kinds::RING_DOORBELL, 0, Bytes::new(), &[]);
        }
        for (node, object_ids) in std::mem::take(&mut state.frees) {
            if let Ok(link) = self.raylet_link(state, node) {
                let message = FreeObjects {
                    object_ids: object_ids.into(),
                };
                let _ = link.send(kinds::FREE_OBJECTS, 0, ray_wire::encode(&message), &[]);
            }
        }
    }

    /// As owner: somebody counts on an object of ours.
    pub fn on_add_borrower(
        &self,
        state: &mut State,
        link: &Arc<Link>,
        correlation: u64,
        message: AddBorrower,
    ) -> Result<(), WorkerError> {
        let object = ObjectId::from_binary(&message.object_id).map_err(ray_wire::WireError::from)?;
        let borrower = message.borrower.unwrap_or_default();
        let borrower_id = borrower.worker()?;
        self.note_address(state, &borrower);
        let mut commands = Vec::new();
        let known = state
            .refs
            .add_borrower(object, borrower_id, message.generation, &mut commands);
        if known && state.dead_workers.contains(&borrower_id) {
            state.refs.worker_died(borrower_id, &mut commands);
        }
        self.carry_out_references(state, commands);
        let answer = BorrowerAdded {
            object_id: message.object_id,
            borrower_id: id_bytes(borrower_id.as_bytes()),
            generation: message.generation,
            known,
        };
        let _ = send(link, kinds::BORROWER_ADDED, correlation, ray_wire::encode(&answer), &[]);
        Ok(())
    }

    /// The owner noted a borrower.
    pub fn on_borrower_added(&self, state: &mut State, message: &BorrowerAdded) -> Result<(), WorkerError> {
        let object = ObjectId::from_binary(&message.object_id).map_err(ray_wire::WireError::from)?;
        let borrower = WorkerId::from_binary(&message.borrower_id).map_err(ray_wire::WireError::from)?;
        let mut commands = Vec::new();
        state
            .refs
            .borrower_added(object, borrower, message.generation, &mut commands);
        self.carry_out_references(state, commands);
        Ok(())
    }

    /// Asks the owner of a borrowed object for its value, unless that is under way.
    pub fn ask_owner_once(&self, state: &mut State, object: ObjectId, slot: &Arc<Slot>) {
        let Some(owner) = state.refs.get(&object).and_then(|entry| entry.borrowed_owner()) else {
            return;
        };
        if slot.note_asked() {
            self.ask_owner(state, object, owner);
        }
    }

    /// Asks the owner of a borrowed object for its value.
    pub fn ask_owner(&self, state: &mut State, object: ObjectId, owner: WorkerId) {
        if state.dead_workers.contains(&owner) {
            return self.owner_died(state, object);
        }
        let correlation = self.correlation();
        let message = GetObjectStatus {
            object_id: id_bytes(object.as_bytes()),
            after_version: 0,
        };
        match self.worker_link(state, owner) {
            Ok(link) => {
                state.pending.insert(
                    correlation,
                    PendingEntry {
                        what: Pending::ObjectStatus(object),
                        link: link.id(),
                    },
                );
                let _ = send(
                    &link,
                    kinds::GET_OBJECT_STATUS,
                    correlation,
                    ray_wire::encode(&message),
                    &[],
                );
            }
            Err(_) => self.retry_later(state, RETRY_DELAY, Retry::AskOwner(object)),
        }
    }

    /// As owner: a borrower asks for a value; the answer waits until it is known.
    pub fn on_get_object_status(&self, state: &mut State, link: &Arc<Link>, correlation: u64, object: ObjectId) {
        let Some(slot) = state.refs.get(&object).map(|entry| entry.value.clone()) else {
            return self.send_status(
                link,
                correlation,
                &ObjectStatus {
                    object_id: id_bytes(object.as_bytes()),
                    status: STATUS_FREED,
                    message: format!("object {object} was freed: its owner counts no reference to it"),
                    ..ObjectStatus::default()
                },
                &[],
            );
        };
        if slot.is_ready() {
            self.rebuild_if_lost(state, object, &slot);
        }
        // The wake-up carries no object, so that it is noted under its correlation.
        if slot.add_wake(Wake::Remote(link.clone(), correlation)) {
            state.pending.insert(
                remote_key(link, correlation),
                PendingEntry {
                    what: Pending::ObjectStatus(object),
                    link: link.id(),
                },
            );
            // An object borrowed in turn: its own owner must be asked.
            self.ask_owner_once(state, object, &slot);
        } else {
            self.send_value(state, link, correlation, object);
        }
    }

    /// A wake-up for a borrower that asked.
    pub fn answer_status(&self, state: &mut State, link: &Arc<Link>, correlation: u64) {
        if let Some(PendingEntry {
            what: Pending::ObjectStatus(object),
            ..
        }) = state.pending.remove(&remote_key(link, correlation))
        {
            self.send_value(state, link, correlation, object);
        }
    }

    fn send_value(&self, state: &State, link: &Arc<Link>, correlation: u64, object: ObjectId) {
        let mut status = ObjectStatus {
            object_id: id_bytes(object.as_bytes()),
            ..ObjectStatus::default()
        };
        let mut payload = Vec::new();
        match state
            .refs
            .get(&object)
            .map(|entry| (entry.value.value(), entry.locations()))
        {
            Some((SlotValue::Inline(value), _)) => {
                status.status = STATUS_INLINE;
                status.value = Some(value.layout());
                value.append(&mut payload);
            }
            Some((SlotValue::Stored { bytes, locations }, nodes)) => {
                status.status = STATUS_STORED;
                status.stored_bytes = bytes;
                status.locations = locations.map(|locations| locations.to_vec()).unwrap_or_default();
                status
                    .locations
                    .extend(nodes.iter().filter_map(|node| state.nodes.get(node).cloned()));
            }
            _ => {
                status.status = STATUS_FREED;
                status.message = format!("object {object} was freed");
            }
        }
        self.send_status(link, correlation, &status, &payload);
    }

    fn send_status(&self, link: &Arc<Link>, correlation: u64, status: &ObjectStatus, payload: &[Bytes]) {
        let _ = send(
            link,
            kinds::OBJECT_STATUS,
            correlation,
            ray_wire::encode(status),
            payload,
        );
    }

    /// The owner answered.
    pub fn on_object_status(
        &self,
        state: &mut State,
        object: ObjectId,
        status: ObjectStatus,
        mut payload: Bytes,
    ) -> Result<(), WorkerError> {
        let value = match status.status {
            STATUS_INLINE => {
                let layout = status.value.unwrap_or_default();
                SlotValue::Inline(Arc::new(InlineValue::take(&layout, &mut payload, true)?))
            }
            STATUS_STORED => {
                for location in &status.locations {
                    self.note_address(state, location);
                }
                SlotValue::Stored {
                    bytes: status.stored_bytes,
                    locations: Some(Arc::new(status.locations)),
                }
            }
            _ => SlotValue::Inline(Arc::new(error_value(&ErrorValue {
                kind: ERROR_OBJECT_FREED,
                message: status.message,
                object_id: id_bytes(object.as_bytes()),
                ..ErrorValue::default()
            }))),
        };
        self.set_and_tell(state, object, value);
        Ok(())
    }
}

/// What stands in for the owner's count of a reference that has just arrived.
fn cover_of(task: Option<TaskId>, outer: Option<ObjectId>) -> Cover {
    match (task, outer) {
        (_, Some(outer)) => Cover::Outer(outer),
        (Some(task), None) => Cover::Task(task),
        (None, None) => Cover::Outer(ObjectId::NIL),
    }
}

/// Questions of others are kept beside our own requests: their keys have the upper bit, and their link's id in them.
fn remote_key(link: &Arc<Link>, correlation: u64) -> u64 {
    (1 << 63) | ((link.id() & 0x7fff_ffff) << 32) | (correlation & 0xffff_ffff)
}

impl CoreWorker {
    /// A reference that arrived in this process, counted. `cover`: the running task whose arguments it came with, or the
    /// object it was read from.
    pub fn receive_reference(
        &self,
        object: ObjectId,
        owner: &Address,
        task: Option<TaskId>,
        outer: Option<ObjectId>,
    ) -> Result<Reference, WorkerError> {
        let mut state = self.0.enter()?;
        self.receive(&mut state, object, owner, owner.worker()?, cover_of(task, outer))
    }

    /// Many references that arrived together: each object with its owner's place in `owners`.
    pub fn receive_references(
        &self,
        objects: &[(ObjectId, usize)],
        owners: &[Address],
        task: Option<TaskId>,
        outer: Option<ObjectId>,
    ) -> Result<Vec<Reference>, WorkerError> {
        let workers: Vec<WorkerId> = owners.iter().map(Address::worker).collect::<Result<_, _>>()?;
        let cover = cover_of(task, outer);
        let mut state = self.0.enter()?;
        let mut references = Vec::with_capacity(objects.len());
        for together in objects.chunks(TOUCHED_TOGETHER) {
            state.touch(together.iter().map(|(object, _)| object));
            for (object, place) in together {
                let (Some(owner), Some(worker)) = (owners.get(*place), workers.get(*place)) else {
                    return Err(WorkerError::Invalid(
                        "a list of references names an owner that it lacks".into(),
                    ));
                };
                references.push(self.receive(&mut state, *object, owner, *worker, cover)?);
            }
        }
        Ok(references)
    }

    fn receive(
        &self,
        state: &mut State,
        object: ObjectId,
        owner: &Address,
        owner_id: WorkerId,
        cover: Cover,
    ) -> Result<Reference, WorkerError> {
        let counted = |slot: Arc<Slot>| Reference {
            id: object,
            slot,
            core: self.0.clone(),
        };
        let cover = match cover {
            // What this process passes to itself it counts already: no other caller stands in for its owner's count.
            Cover::Task(task) if state.tasks.contains_key(&task) && state.refs.add_local(&object) => {
                let slot = state.refs.get(&object).map(|entry| entry.value.clone());
                return Ok(counted(slot.unwrap_or_default()));
            }
            // No reply of a constructor goes to its caller, so that nobody could relay what it keeps: its owner is told
            // at once, while the creator still counts it.
            Cover::Task(task) if task.has_actor() && task == TaskId::for_actor_creation(task.actor_id()) => {
                Cover::Outer(ObjectId::NIL)
            }
            cover => cover,
        };
        let known = state
            .refs
            .get(&object)
            .filter(|entry| owner_id == self.0.worker_id || entry.is_owned())
            .map(|entry| entry.value.clone());
        if let Some(slot) = known {
            state.refs.add_local(&object);
            return Ok(counted(slot));
        }
        if owner_id == self.0.worker_id {
            // It was freed meanwhile; getting it says so.
            let error = ErrorValue {
                kind: ERROR_OBJECT_FREED,
                message: format!("object {object} was freed: its owner counts no reference to it"),
                object_id: id_bytes(object.as_bytes()),
                ..ErrorValue::default()
            };
            return Ok(counted(Slot::inline(error_value(&error))));
        }
        self.0.note_address(state, owner);
        let mut commands = Vec::new();
        state
            .refs
            .borrow(object, owner_id, cover, Slot::pending(), &mut commands);
        if state.dead_workers.contains(&owner_id) {
            state.refs.worker_died(owner_id, &mut commands);
        }
        self.0.carry_out_references(state, commands);
        let slot = state
            .refs
            .get(&object)
            .map(|entry| entry.value.clone())
            .unwrap_or_default();
        Ok(counted(slot))
    }

    /// As `describe_reference` for many: each object with its owner's place in the list of owners.
    pub fn describe_references(&self, references: &[&Reference]) -> (Vec<(ObjectId, usize)>, Vec<Address>) {
        let state = self.0.lock();
        let mut places = Vec::with_capacity(references.len());
        let mut workers: Vec<WorkerId> = Vec::new();
        let mut owners = Vec::new();
        for reference in references {
            let worker = state
                .refs
                .get(&reference.id)
                .and_then(|entry| entry.borrowed_owner())
                .unwrap_or(self.0.worker_id);
            let place = workers.iter().rposition(|known| *known == worker).unwrap_or_else(|| {
                workers.push(worker);
                owners.push(self.0.owner_address(&state, &reference.id));
                workers.len() - 1
            });
            places.push((reference.id, place));
        }
        (places, owners)
    }

    /// How a reference travels: the object and its owner.
    pub fn describe_reference(&self, reference: &Reference) -> Contained {
        let state = self.0.lock();
        Contained {
            object: reference.id,
            owner: self.0.owner_address(&state, &reference.id),
        }
    }

    /// A reference that left the runtime's sight (pickled by something else) keeps its object until the job ends.
    pub fn pin_for_job(&self, object: &ObjectId) {
        self.0.lock().refs.hold(object);
    }
}
