//! A process as owner and borrower: carries out what its reference table decides, and answers for values.
//!
//! Invariant: 1. A value that is known wakes whoever waits for it, once.

use std::rc::Rc;

use ray_ids::{NodeId, ObjectId, TaskId, WorkerId};
use ray_ownership::references::Cover;
use ray_ownership::{ReferenceCommand, ReferenceTable};
use ray_wire::{id_bytes, ActorKey, GcsCall};

use crate::model::{Failure, Message, Place, Reference, Value};
use crate::mutation::Mutation;
use crate::process::{Slot, Waiter};
use crate::world::World;

pub(crate) type Table = ReferenceTable<Slot>;

impl World {
    /// Changes a process's counts, checks them, and carries out what follows.
    pub(crate) fn refs(&mut self, id: WorkerId, act: impl FnOnce(&mut Table, &mut Vec<ReferenceCommand>)) {
        let Some(process) = self.processes.get_mut(&id) else {
            return;
        };
        let mut commands = Vec::new();
        act(&mut process.table, &mut commands);
        if let Err(error) = process.table.validate() {
            return self.fail(format!("the counts of {id}: {error}"));
        }
        for command in commands {
            if self.config.trace {
                let line = format!("            {id} {command:?}");
                self.note(line);
            }
            self.carry_out_reference(id, command);
        }
    }

    pub(crate) fn carry_out_reference(&mut self, id: WorkerId, command: ReferenceCommand) {
        let one = self.mutated(Mutation::IgnoreGeneration);
        match command {
            ReferenceCommand::AddBorrower {
                owner,
                object,
                borrower,
                generation,
            } => {
                let generation = if one { 1 } else { generation };
                if !self.mutated_sometimes(Mutation::LoseAddBorrower) {
                    let message = Message::AddBorrower {
                        object,
                        borrower,
                        generation,
                    };
                    self.send(Place::Process(id), Place::Process(owner), message);
                }
            }
            ReferenceCommand::RemoveBorrower {
                owner,
                object,
                generation,
            } => {
                let generation = if one { 1 } else { generation };
                if !self.mutated_sometimes(Mutation::LoseRemoveBorrower) {
                    let message = Message::RemoveBorrower { object, generation };
                    self.send(Place::Process(id), Place::Process(owner), message);
                }
            }
            ReferenceCommand::AcknowledgeReturns { worker, task } => {
                if !self.mutated(Mutation::DropReturnsAcknowledged) {
                    self.send(
                        Place::Process(id),
                        Place::Process(worker),
                        Message::ReturnsAcknowledged { task },
                    );
                }
            }
            ReferenceCommand::Watch { worker } => {
                let node = self.node_of(Place::Process(id));
                self.send(Place::Process(id), Place::Raylet(node), Message::WatchWorker { worker });
            }
            ReferenceCommand::FreeValue { object, nodes } => self.value_freed(id, object, &nodes),
            ReferenceCommand::ReleaseLineage { object } => {
                let Some(process) = self.processes.get_mut(&id) else {
                    return;
                };
                let dropped = process.lineage.return_released(object.task_id());
                self.drop_lineage(id, dropped.into_iter().collect());
            }
            ReferenceCommand::OwnerDied { object } => self.set_value(id, object, Value::Failed(Failure::OwnerDied)),
        }
    }

    pub(crate) fn drop_lineage(&mut self, id: WorkerId, dropped: Vec<ray_ownership::lineage::Dropped>) {
        for dropped in dropped {
            if let Some(process) = self.processes.get_mut(&id) {
                process.retained.remove(&dropped.task);
            }
            for argument in dropped.arguments {
                self.refs(id, |table, out| table.remove_lineage(&argument, out));
            }
        }
    }

    pub(crate) fn value_freed(&mut self, id: WorkerId, object: ObjectId, nodes: &[NodeId]) {
        if self.truth_owner(&object) == id {
            self.check_free(id, object);
        }
        for node in nodes {
            self.free_on(id, *node, object);
        }
        let task = object.task_id();
        let is_handle = task.has_actor() && task == TaskId::for_actor_creation(task.actor_id());
        if is_handle && self.truth_owner(&object) == id && !self.mutated(Mutation::LoseOutOfScope) {
            let key = ActorKey {
                actor_id: id_bytes(task.actor_id().as_bytes()),
                owner: None,
            };
            self.call_gcs(id, GcsCall::ActorOutOfScope(key));
        }
    }

    pub(crate) fn free_on(&mut self, id: WorkerId, node: NodeId, object: ObjectId) {
        if !self.mutated(Mutation::ForgetFreeObjects) {
            self.send(Place::Process(id), Place::Raylet(node), Message::FreeObjects { object });
        }
    }

    /// A new object of a process's own.
    pub(crate) fn own(&mut self, id: WorkerId, object: ObjectId, value: Option<Value>) {
        self.truth.owners.insert(object, id);
        self.refs(id, |table, _| {
            table.own(
                object,
                Slot {
                    value,
                    ..Slot::default()
                },
            )
        });
    }

    /// The owned object counts what it contains.
    pub(crate) fn contain(&mut self, id: WorkerId, outer: ObjectId, inner: &[Reference]) {
        let ids: Vec<ObjectId> = inner.iter().map(|reference| reference.object).collect();
        self.truth.contents.entry(outer).or_default().extend(&ids);
        if self.mutated(Mutation::ForgetContained) {
            return;
        }
        self.refs(id, |table, _| table.contain(outer, &ids));
    }

    /// A reference arrives in a process.
    pub(crate) fn borrow(&mut self, id: WorkerId, reference: Reference, cover: Cover) {
        let Reference { object, owner, .. } = reference;
        self.check_arrival(id, &reference);
        let cover = match cover {
            Cover::Outer(_) if self.mutated(Mutation::FreeBeforeAcknowledge) => Cover::Outer(ObjectId::NIL),
            other => other,
        };
        self.refs(id, |table, out| {
            table.borrow(object, owner, cover, Slot::default(), out)
        });
    }

    /// A value is known: whoever waits for it goes on.
    pub(crate) fn set_value(&mut self, id: WorkerId, object: ObjectId, value: Value) {
        let Some(process) = self.processes.get_mut(&id) else {
            return;
        };
        let Some(entry) = process.table.get_mut(&object) else {
            return;
        };
        let known_failure = matches!(entry.value.value, Some(Value::Inline(_)));
        if known_failure && matches!(value, Value::Failed(_)) {
            // The value was here before its owner died.
            return;
        }
        entry.value.value = Some(value);
        entry.value.fetching = false;
        let remote = std::mem::take(&mut entry.value.remote);
        for borrower in remote {
            self.answer_status(id, borrower, object);
        }
        self.wake_waiters(id, object);
    }

    pub(crate) fn wake_waiters(&mut self, id: WorkerId, object: ObjectId) {
        let Some(process) = self.processes.get_mut(&id) else {
            return;
        };
        for waiter in process.waiters.remove(&object).unwrap_or_default() {
            match waiter {
                Waiter::Frame(frame) => self.run_frame(id, frame),
                Waiter::Task(task) => self.resolve(id, task),
            }
        }
    }

    /// What a process knows of a value now; asks for it where nothing is known. Stored values are read from the node's
    /// store, or fetched there.
    pub(crate) fn read(&mut self, id: WorkerId, object: ObjectId) -> Option<Result<Rc<[Reference]>, Failure>> {
        let process = self.processes.get_mut(&id)?;
        let node = process.node;
        let Some(entry) = process.table.get_mut(&object) else {
            return Some(Err(Failure::Freed));
        };
        match entry.value.value.clone() {
            Some(Value::Inline(contents)) => Some(Ok(contents)),
            Some(Value::Failed(failure)) => Some(Err(failure)),
            Some(Value::Stored(nodes)) => {
                if let Some(copy) = self.raylets.get(&node).and_then(|raylet| raylet.store.get(&object)) {
                    return Some(Ok(copy.contents.clone()));
                }
                let owned = entry.is_owned();
                let locations = if owned { entry.locations().to_vec() } else { nodes };
                if !std::mem::replace(&mut entry.value.fetching, true) {
                    if owned && locations.is_empty() {
                        entry.value.fetching = false;
                        self.rebuild(id, object);
                        return self.known_failure(id, object);
                    }
                    self.send(
                        Place::Process(id),
                        Place::Raylet(node),
                        Message::FetchObject { object, locations },
                    );
                }
                None
            }
            None => {
                if let Some(owner) = entry.borrowed_owner().filter(|_| !entry.value.asked) {
                    entry.value.asked = true;
                    self.send(
                        Place::Process(id),
                        Place::Process(owner),
                        Message::GetObjectStatus { object },
                    );
                }
                None
            }
        }
    }

    pub(crate) fn known_failure(&self, id: WorkerId, object: ObjectId) -> Option<Result<Rc<[Reference]>, Failure>> {
        match &self.processes.get(&id)?.table.get(&object)?.value.value {
            Some(Value::Failed(failure)) => Some(Err(*failure)),
            _ => None,
        }
    }

    /// Whether a value is known well enough for a call that needs it to be pushed.
    pub(crate) fn is_resolved(&mut self, id: WorkerId, object: ObjectId) -> Option<Result<(), Failure>> {
        let process = self.processes.get_mut(&id)?;
        let Some(entry) = process.table.get(&object) else {
            return Some(Err(Failure::Freed));
        };
        match &entry.value.value {
            Some(Value::Failed(failure)) => Some(Err(*failure)),
            Some(_) => Some(Ok(())),
            None => self.read(id, object).map(|known| known.map(drop)),
        }
    }

    pub(crate) fn answer_status(&mut self, id: WorkerId, borrower: WorkerId, object: ObjectId) {
        let Some(entry) = self.processes.get(&id).and_then(|process| process.table.get(&object)) else {
            let value = Value::Failed(Failure::Freed);
            return self.send(
                Place::Process(id),
                Place::Process(borrower),
                Message::ObjectStatus { object, value },
            );
        };
        let value = match &entry.value.value {
            Some(Value::Stored(_)) if entry.is_owned() => Value::Stored(entry.locations().to_vec()),
            Some(value) => value.clone(),
            None => return,
        };
        self.send(
            Place::Process(id),
            Place::Process(borrower),
            Message::ObjectStatus { object, value },
        );
    }

    pub(crate) fn status_asked(&mut self, id: WorkerId, borrower: WorkerId, object: ObjectId) {
        if self
            .processes
            .get(&id)
            .is_some_and(|process| process.table.is_freed(&object))
        {
            let value = Value::Failed(Failure::Freed);
            return self.send(
                Place::Process(id),
                Place::Process(borrower),
                Message::ObjectStatus { object, value },
            );
        }
        let lost = self
            .processes
            .get(&id)
            .and_then(|process| process.table.get(&object))
            .is_some_and(|entry| {
                matches!(entry.value.value, Some(Value::Stored(_))) && entry.is_owned() && entry.locations().is_empty()
            });
        if lost {
            self.rebuild(id, object);
        }
        let Some(entry) = self
            .processes
            .get_mut(&id)
            .and_then(|process| process.table.get_mut(&object))
        else {
            return;
        };
        match entry.value.value {
            Some(_) => self.answer_status(id, borrower, object),
            None => {
                entry.value.remote.push(borrower);
                // Borrowed in turn: its own owner is asked.
                self.read(id, object);
            }
        }
    }

    /// Makes a lost value again, or says that it is lost.
    pub(crate) fn rebuild(&mut self, id: WorkerId, object: ObjectId) {
        let task = object.task_id();
        let Some(process) = self.processes.get_mut(&id) else {
            return;
        };
        if process.tasks.contains_key(&task) {
            return;
        }
        let whole = process
            .retained
            .get(&task)
            .map(|(call, attempt)| (call.clone(), *attempt));
        let usable = whole.filter(|(call, _)| call.counted().iter().all(|argument| !process.table.is_freed(argument)));
        let Some((call, attempt)) = usable else {
            return self.set_value(id, object, Value::Failed(Failure::Lost));
        };
        let Ok((arguments, retries_left)) = process.lineage.begin_rebuild(task) else {
            return self.set_value(id, object, Value::Failed(Failure::Lost));
        };
        process.retained.remove(&task);
        if let Some(entry) = process.table.get_mut(&object) {
            entry.value = Slot {
                remote: std::mem::take(&mut entry.value.remote),
                ..Slot::default()
            };
        }
        for argument in call.counted() {
            self.refs(id, |table, _| table.add_submitted(&argument));
        }
        for argument in arguments {
            self.refs(id, |table, out| table.remove_lineage(&argument, out));
        }
        self.begin_task(id, call, attempt + 1, retries_left);
    }
}
