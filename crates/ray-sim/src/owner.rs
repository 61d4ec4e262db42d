//! A process as owner and borrower: carries out what its reference table, leases and actors' calls decide.
//!
//! Invariants:
//! 1. Borrows that a reply lists are noted or relayed before the call's arguments lose their counts.
//! 2. A reply counts only for the attempt that is under way.

use std::rc::Rc;

use ray_ids::{ActorId, LeaseId, NodeId, ObjectId, TaskId, WorkerId};
use ray_ownership::actor_calls::{ActorCalls, ActorCommand};
use ray_ownership::leases::LeaseCommand;
use ray_ownership::references::Cover;
use ray_ownership::{ReferenceCommand, ReferenceTable};
use ray_raylet::types::RequestKey;
use ray_wire::{
    id_bytes, ActorCreation, ActorKey, ActorState, GcsCall, LeaseSpecification, RegisterActor, ResourceAmount,
    ACTOR_ALIVE, ACTOR_DEAD, ACTOR_RESTARTING,
};

use crate::model::{Call, CallKind, Failure, Message, Outcome, Place, Push, Reference, Reply, Value};
use crate::mutation::Mutation;
use crate::node::address;
use crate::process::{ActorEntry, Slot, Task, Waiter};
use crate::world::{Event, World, MS};

pub(crate) type Table = ReferenceTable<Slot>;

fn specification(job: &[u8], cpus: u32) -> LeaseSpecification {
    LeaseSpecification {
        job_id: id_bytes(job),
        resources: vec![ResourceAmount {
            name: "CPU".into(),
            amount_e4: i64::from(cpus) * 10_000,
        }],
        ..LeaseSpecification::default()
    }
}

impl World {
    // --- references ---

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
            self.carry_out_reference(id, command);
        }
    }

    fn carry_out_reference(&mut self, id: WorkerId, command: ReferenceCommand) {
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

    fn drop_lineage(&mut self, id: WorkerId, dropped: Vec<ray_ownership::lineage::Dropped>) {
        for dropped in dropped {
            if let Some(process) = self.processes.get_mut(&id) {
                process.retained.remove(&dropped.task);
            }
            for argument in dropped.arguments {
                self.refs(id, |table, out| table.remove_lineage(&argument, out));
            }
        }
    }

    fn value_freed(&mut self, id: WorkerId, object: ObjectId, nodes: &[NodeId]) {
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

    // --- values ---

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

    fn known_failure(&self, id: WorkerId, object: ObjectId) -> Option<Result<Rc<[Reference]>, Failure>> {
        match &self.processes.get(&id)?.table.get(&object)?.value.value {
            Some(Value::Failed(failure)) => Some(Err(*failure)),
            _ => None,
        }
    }

    /// Whether a value is known well enough for a call that needs it to be pushed.
    fn is_resolved(&mut self, id: WorkerId, object: ObjectId) -> Option<Result<(), Failure>> {
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

    fn answer_status(&mut self, id: WorkerId, borrower: WorkerId, object: ObjectId) {
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

    fn status_asked(&mut self, id: WorkerId, borrower: WorkerId, object: ObjectId) {
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
    fn rebuild(&mut self, id: WorkerId, object: ObjectId) {
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

    // --- calls ---

    /// A program calls: its result is owned, its arguments are counted.
    pub(crate) fn submit(&mut self, id: WorkerId, call: Rc<Call>) {
        self.truth.submitted += 1;
        self.calls.insert(call.task, call.clone());
        self.own(id, call.result(), None);
        if !self.mutated(Mutation::ForgetSubmitted) {
            for argument in call.counted() {
                self.refs(id, |table, _| table.add_submitted(&argument));
            }
        }
        if let CallKind::Method { actor, .. } = &call.kind {
            let (actor, task, retries) = (*actor, call.task, call.retries);
            let ready = call.by_reference.is_empty();
            self.begin_task(id, call, 0, retries);
            self.know_actor(id, actor);
            self.actor_calls(id, actor, |calls, out| calls.submit(task, "", ready, retries, out));
            if !ready {
                self.resolve(id, task);
            }
        } else {
            let retries = call.retries;
            self.begin_task(id, call, 0, retries);
        }
    }

    fn begin_task(&mut self, id: WorkerId, call: Rc<Call>, attempt: u32, retries_left: i32) {
        let unresolved = call.by_reference.iter().map(|reference| reference.object).collect();
        let task = call.task;
        let plain = !matches!(call.kind, CallKind::Method { .. });
        let state = Task {
            call,
            attempt,
            retries_left,
            unresolved,
            submitted: false,
            pushed: false,
        };
        let Some(process) = self.processes.get_mut(&id) else {
            return;
        };
        process.tasks.insert(task, state);
        if plain {
            self.resolve(id, task);
        }
    }

    /// Looks whether a call's arguments are there; the call goes on, waits, or fails.
    fn resolve(&mut self, id: WorkerId, task: TaskId) {
        let Some(state) = self.processes.get(&id).and_then(|process| process.tasks.get(&task)) else {
            return;
        };
        if state.submitted {
            return;
        }
        for object in state.unresolved.clone() {
            match self.is_resolved(id, object) {
                None => {
                    if let Some(process) = self.processes.get_mut(&id) {
                        let waiters = process.waiters.entry(object).or_default();
                        if !waiters.contains(&Waiter::Task(task)) {
                            waiters.push(Waiter::Task(task));
                        }
                    }
                    return;
                }
                Some(Err(_)) => {
                    self.withdraw_method(id, task);
                    return self.finish_failed(id, task, Failure::ArgumentFailed);
                }
                Some(Ok(())) => {
                    if let Some(state) = self
                        .processes
                        .get_mut(&id)
                        .and_then(|process| process.tasks.get_mut(&task))
                    {
                        state.unresolved.remove(&object);
                    }
                }
            }
        }
        let Some(state) = self
            .processes
            .get_mut(&id)
            .and_then(|process| process.tasks.get_mut(&task))
        else {
            return;
        };
        state.submitted = true;
        match state.call.kind.clone() {
            CallKind::Plain { .. } => self.enqueue(id, task),
            CallKind::Method { actor, .. } => self.actor_calls(id, actor, |calls, out| calls.ready(task, "", out)),
            CallKind::Constructor { actor, .. } => self.register_actor(id, actor),
        }
    }

    fn withdraw_method(&mut self, id: WorkerId, task: TaskId) {
        let Some(process) = self.processes.get_mut(&id) else {
            return;
        };
        let Some(CallKind::Method { actor, .. }) = process.tasks.get(&task).map(|state| state.call.kind.clone()) else {
            return;
        };
        if let Some(entry) = process.actors.get_mut(&actor) {
            entry.calls.cancel_waiting(task);
        }
        // Those that it held back may go now.
        self.actor_calls(id, actor, |calls, out| calls.ready(task, "", out));
    }

    fn enqueue(&mut self, id: WorkerId, task: TaskId) {
        let now_ms = self.now / MS;
        let Some(CallKind::Plain { cpus }) = self.task_kind(id, task) else {
            return;
        };
        self.leases(id, |leases, out| {
            leases.submit(task, u64::from(cpus), true, None, now_ms, out)
        });
    }

    fn task_kind(&self, id: WorkerId, task: TaskId) -> Option<CallKind> {
        Some(self.processes.get(&id)?.tasks.get(&task)?.call.kind.clone())
    }

    /// Changes a process's leases, checks them, and carries out what follows.
    pub(crate) fn leases<R>(
        &mut self,
        id: WorkerId,
        act: impl FnOnce(&mut ray_ownership::leases::LeaseClient, &mut Vec<LeaseCommand>) -> R,
    ) -> Option<R> {
        let process = self.processes.get_mut(&id)?;
        let mut commands = Vec::new();
        let result = act(&mut process.leases, &mut commands);
        if let Err(error) = process.leases.validate() {
            self.fail(format!("the leases of {id}: {error}"));
            return None;
        }
        for command in commands {
            self.carry_out_lease(id, command);
        }
        self.schedule_tick(id);
        Some(result)
    }

    fn schedule_tick(&mut self, id: WorkerId) {
        // A tick is cheap; the machine itself says when it has nothing to wait for.
        let Some(process) = self.processes.get_mut(&id) else {
            return;
        };
        if process.tick_at.is_none() && !process.leases.is_quiet() {
            process.tick_at = Some(self.now + 5 * MS);
            self.at(5 * MS, Event::ProcessTick(id));
        }
    }

    pub(crate) fn process_tick(&mut self, id: WorkerId) {
        let now_ms = self.now / MS;
        if let Some(process) = self.processes.get_mut(&id) {
            process.tick_at = None;
        }
        self.leases(id, |leases, out| leases.tick(now_ms, out));
    }

    fn carry_out_lease(&mut self, id: WorkerId, command: LeaseCommand) {
        let Some(process) = self.processes.get_mut(&id) else {
            return;
        };
        let here = Place::Process(id);
        match command {
            LeaseCommand::Request {
                request, class, raylet, ..
            } => {
                let node = raylet.unwrap_or(process.node);
                let correlation = process.next_correlation;
                process.next_correlation += 1;
                process.requests.retain(|_, (known, _)| *known != request);
                process.requests.insert(correlation, (request, node));
                let job = process.job.unwrap_or_default();
                let specification = specification(job.as_bytes(), class as u32);
                if process.dead_nodes.contains(&node) {
                    return self.lose_requests(id, node);
                }
                let key = RequestKey {
                    process: id,
                    correlation,
                };
                let message = Message::RequestLease {
                    key,
                    specification,
                    redirected: raylet.is_some(),
                };
                self.send(here, Place::Raylet(node), message);
            }
            LeaseCommand::CancelRequest { request } => {
                let known = process.requests.iter().find(|(_, (known, _))| *known == request);
                let Some((correlation, node)) = known.map(|(correlation, (_, node))| (*correlation, *node)) else {
                    return;
                };
                process.requests.remove(&correlation);
                let key = RequestKey {
                    process: id,
                    correlation,
                };
                self.send(here, Place::Raylet(node), Message::CancelRequest { key });
            }
            LeaseCommand::Push { lease, task, sequence } => {
                let Some(worker) = process.leases.lease(&lease).map(|lease| lease.worker) else {
                    return;
                };
                let Some(state) = process.tasks.get(&task) else {
                    return self.fail(format!("{task} is pushed and is not a call of {id}"));
                };
                let (call, attempt) = (state.call.clone(), state.attempt);
                let push = Push {
                    call,
                    caller: id,
                    attempt,
                    lease,
                    sequence,
                    incarnation: 0,
                };
                self.send(here, Place::Process(worker), Message::Push(push));
            }
            LeaseCommand::Return { lease, worker_exits } => {
                let Some(node) = process.lease_nodes.remove(&lease) else {
                    return;
                };
                if !self.mutated_sometimes(Mutation::LoseReturnLease) {
                    self.send(here, Place::Raylet(node), Message::ReturnLease { lease, worker_exits });
                }
            }
            LeaseCommand::Recall { lease } => {
                let Some(worker) = process.leases.lease(&lease).map(|lease| lease.worker) else {
                    return;
                };
                self.send(here, Place::Process(worker), Message::RecallTasks { lease });
            }
            LeaseCommand::AttemptFailed { task, .. } => self.attempt_failed(id, task),
        }
    }

    fn attempt_failed(&mut self, id: WorkerId, task: TaskId) {
        let uncounted = self.mutated(Mutation::RetryWithoutCounting);
        let Some(state) = self
            .processes
            .get_mut(&id)
            .and_then(|process| process.tasks.get_mut(&task))
        else {
            return;
        };
        if state.retries_left == 0 {
            return self.finish_failed(id, task, Failure::WorkerDied);
        }
        if state.retries_left > 0 {
            state.retries_left -= 1;
        }
        if !uncounted {
            state.attempt += 1;
        }
        self.enqueue(id, task);
    }

    fn finish_failed(&mut self, id: WorkerId, task: TaskId, failure: Failure) {
        self.end_task(id, task, Value::Failed(failure), false);
    }

    /// A call is over.
    fn end_task(&mut self, id: WorkerId, task: TaskId, value: Value, stored: bool) {
        let failed = matches!(value, Value::Failed(_));
        let Some(process) = self.processes.get_mut(&id) else {
            return;
        };
        let Some(state) = process.tasks.remove(&task) else {
            return;
        };
        self.truth.finished.insert(task, !failed);
        let call = state.call;
        if stored && !matches!(call.kind, CallKind::Method { .. }) {
            self.retain_lineage(id, &call, state.attempt, state.retries_left);
        }
        if !(failed && self.mutated(Mutation::KeepArgumentsOfFailedCall)) && !self.mutated(Mutation::ReleaseBeforeRelay)
        {
            self.release_arguments(id, &call);
        }
        self.set_value(id, call.result(), value);
    }

    fn release_arguments(&mut self, id: WorkerId, call: &Call) {
        if self.mutated(Mutation::ForgetSubmitted) {
            return;
        }
        for argument in call.counted() {
            self.refs(id, |table, out| table.remove_submitted(&argument, out));
        }
    }

    fn retain_lineage(&mut self, id: WorkerId, call: &Rc<Call>, attempt: u32, retries_left: i32) {
        let Some(process) = self.processes.get_mut(&id) else {
            return;
        };
        if retries_left == 0 || process.table.get(&call.result()).is_none() {
            return;
        }
        let arguments = call.counted();
        for argument in &arguments {
            process.table.add_lineage(argument);
        }
        process.retained.insert(call.task, (call.clone(), attempt));
        let dropped = process.lineage.retain(call.task, arguments, 1, 100, retries_left);
        if let Err(error) = process.lineage.validate() {
            self.fail(format!("the lineage of {id}: {error}"));
        }
        self.drop_lineage(id, dropped);
    }

    fn on_reply(&mut self, id: WorkerId, worker: WorkerId, reply: Reply) {
        let now = self.now;
        let accept_stale = self.mutated(Mutation::AcceptStaleReply);
        let task = reply.task;
        let Some(process) = self.processes.get(&id) else { return };
        let state = process.tasks.get(&task);
        let current = state.filter(|state| accept_stale || state.attempt == reply.attempt);
        let is_method = current.is_some_and(|state| matches!(state.call.kind, CallKind::Method { .. }));
        let on_lease = process.leases.lease_of(&task).map(|(lease, _)| lease);
        let under_way = is_method || accept_stale || on_lease == Some(reply.lease);
        let Some(call) = current.filter(|_| under_way).map(|state| state.call.clone()) else {
            // An attempt that was given up: its worker died, or is taken for dead.
            return;
        };
        match (&call.kind, &reply.outcome) {
            (CallKind::Plain { .. }, Outcome::StaleLease) => {
                self.leases(id, |leases, out| leases.stale(task, reply.lease, now / MS, out));
                return;
            }
            (CallKind::Method { actor, .. }, Outcome::StaleIncarnation) => {
                let retries = call.retries;
                self.actor_calls(id, *actor, |calls, out| {
                    if calls.replied(task) {
                        calls.submit(task, "", true, retries, out);
                    }
                });
                return;
            }
            (CallKind::Method { actor, .. }, _) => {
                let known = self
                    .processes
                    .get_mut(&id)
                    .and_then(|process| process.actors.get_mut(actor));
                if !known.is_some_and(|entry| entry.calls.replied(task)) {
                    return;
                }
            }
            _ => {
                self.leases(id, |leases, out| leases.replied(task, false, now, out));
            }
        }
        if self.mutated(Mutation::ReleaseBeforeRelay) {
            self.release_arguments(id, &call);
        }
        if !self.mutated(Mutation::ForgetRetained) {
            for (object, _, generation) in &reply.retained {
                let (object, generation) = (*object, *generation);
                self.refs(id, |table, out| table.relay_borrow(object, worker, generation, out));
            }
        }
        let result = call.result();
        let (value, stored, contents): (Value, bool, Rc<[Reference]>) = match reply.outcome {
            Outcome::Returned(contents) => (Value::Inline(contents.clone()), false, contents),
            Outcome::ReturnedStored(node, contents) => {
                let Some(process) = self.processes.get_mut(&id) else {
                    return;
                };
                if !process.table.add_location(&result, node) {
                    self.free_on(id, node, result);
                }
                (Value::Stored(Vec::new()), true, contents)
            }
            Outcome::Failed(failure) => (Value::Failed(failure), false, Rc::from([])),
            Outcome::StaleLease | Outcome::StaleIncarnation => return,
        };
        let cover = Cover::Return { task, worker };
        for reference in contents.iter() {
            self.borrow(id, *reference, cover);
        }
        self.contain(id, result, &contents);
        for reference in contents.iter() {
            let object = reference.object;
            self.refs(id, |table, out| table.remove_local(&object, out));
        }
        if reply.wants_acknowledgement {
            self.refs(id, |table, out| table.returns_read(task, worker, out));
        }
        self.end_task(id, task, value, stored);
    }

    // --- actors ---

    pub(crate) fn call_gcs(&mut self, id: WorkerId, call: GcsCall) {
        let node = self.node_of(Place::Process(id));
        self.send(
            Place::Process(id),
            Place::Raylet(node),
            Message::GcsCall { call: Box::new(call) },
        );
    }

    /// A handle is used here for the first time.
    fn know_actor(&mut self, id: WorkerId, actor: ActorId) {
        let Some(process) = self.processes.get_mut(&id) else {
            return;
        };
        if process.actors.contains_key(&actor) {
            return;
        }
        process.actors.insert(actor, new_entry(None, 0));
        self.watch_actor(id, actor);
    }

    fn watch_actor(&mut self, id: WorkerId, actor: ActorId) {
        let owner = self.truth_owner(&ObjectId::of(TaskId::for_actor_creation(actor), 1));
        let owner = Some(address(self.node_of(Place::Process(owner)), owner));
        let key = ActorKey {
            actor_id: id_bytes(actor.as_bytes()),
            owner,
        };
        self.call_gcs(id, GcsCall::WatchActor(key));
    }

    /// A program makes an actor: its handle is an object.
    pub(crate) fn create_actor(&mut self, id: WorkerId, call: Rc<Call>, actor: ActorId, max_restarts: i32) {
        self.truth.submitted += 1;
        self.calls.insert(call.task, call.clone());
        self.own(id, call.result(), Some(Value::Inline(Rc::from([]))));
        for argument in call.counted() {
            self.refs(id, |table, _| table.add_submitted(&argument));
        }
        if let Some(process) = self.processes.get_mut(&id) {
            process.actors.insert(actor, new_entry(Some(call), max_restarts));
        }
        self.register_actor(id, actor);
    }

    fn register_actor(&mut self, id: WorkerId, actor: ActorId) {
        let node = self.node_of(Place::Process(id));
        let Some(entry) = self
            .processes
            .get_mut(&id)
            .and_then(|process| process.actors.get_mut(&actor))
        else {
            return;
        };
        let Some(call) = entry.creation.clone() else { return };
        entry.registered = true;
        let max_concurrency = match call.kind {
            CallKind::Constructor { max_concurrency, .. } => max_concurrency as u32,
            _ => 1,
        };
        let seat = |name: &str, amount: i64| ResourceAmount {
            name: name.into(),
            amount_e4: amount,
        };
        let creation = ActorCreation {
            call: Some(ray_wire::PushTask {
                task_id: id_bytes(call.task.as_bytes()),
                ..Default::default()
            }),
            owner: Some(address(node, id)),
            resources: vec![seat("seat", 10_000)],
            placement_resources: vec![seat("CPU", 10_000), seat("seat", 10_000)],
            max_restarts: entry.max_restarts,
            max_concurrency,
            ..ActorCreation::default()
        };
        let register = RegisterActor {
            actor_id: id_bytes(actor.as_bytes()),
            creation: Some(creation),
            get_if_exists: false,
        };
        self.call_gcs(id, GcsCall::RegisterActor(register));
        self.watch_actor(id, actor);
    }

    /// Changes what a process knows of an actor's calls, checks it, and carries out what follows.
    fn actor_calls(&mut self, id: WorkerId, actor: ActorId, act: impl FnOnce(&mut ActorCalls, &mut Vec<ActorCommand>)) {
        let Some(entry) = self
            .processes
            .get_mut(&id)
            .and_then(|process| process.actors.get_mut(&actor))
        else {
            return;
        };
        let mut commands = Vec::new();
        act(&mut entry.calls, &mut commands);
        if let Err(error) = entry.calls.validate() {
            return self.fail(format!("the calls of {actor} by {id}: {error}"));
        }
        for command in commands {
            match command {
                ActorCommand::Push {
                    task,
                    worker,
                    incarnation,
                    sequence,
                } => {
                    let uncounted = self.mutated(Mutation::RetryWithoutCounting);
                    let Some(state) = self
                        .processes
                        .get_mut(&id)
                        .and_then(|process| process.tasks.get_mut(&task))
                    else {
                        return self.fail(format!("{task} is pushed and is not a call of {id}"));
                    };
                    if std::mem::replace(&mut state.pushed, true) && !uncounted {
                        state.attempt += 1;
                    }
                    let (call, attempt) = (state.call.clone(), state.attempt);
                    let push = Push {
                        call,
                        caller: id,
                        attempt,
                        lease: LeaseId::NIL,
                        sequence,
                        incarnation,
                    };
                    self.send(Place::Process(id), Place::Process(worker), Message::Push(push));
                }
                ActorCommand::FailDead { task } => self.finish_failed(id, task, Failure::ActorDied),
                ActorCommand::FailUnavailable { task } => self.finish_failed(id, task, Failure::ActorUnavailable),
            }
        }
    }

    fn on_actor_state(&mut self, id: WorkerId, state: &ActorState) {
        let Some(actor) = crate::node::actor_of(&state.actor_id) else {
            return;
        };
        let ignore = self.mutated(Mutation::IgnoreIncarnation);
        let incarnation = if ignore { 1 } else { state.incarnation };
        let Some(entry) = self
            .processes
            .get_mut(&id)
            .and_then(|process| process.actors.get_mut(&actor))
        else {
            return;
        };
        match state.state {
            ACTOR_ALIVE => {
                let Some(worker) = state.worker.as_ref().and_then(|worker| worker.worker().ok()) else {
                    return;
                };
                entry.worker = Some(worker);
                entry.incarnation = incarnation;
                self.actor_calls(id, actor, |calls, out| calls.alive(worker, incarnation, out));
                // Its death is to be heard of even where the control plane is away.
                let node = self.node_of(Place::Process(id));
                self.send(Place::Process(id), Place::Raylet(node), Message::WatchWorker { worker });
            }
            ACTOR_RESTARTING => self.actor_calls(id, actor, |calls, out| calls.restarting(incarnation, out)),
            ACTOR_DEAD => {
                let creation = entry.creation.take();
                self.actor_calls(id, actor, |calls, out| calls.dead(out));
                if let Some(call) = creation {
                    for argument in call.counted() {
                        self.refs(id, |table, out| table.remove_submitted(&argument, out));
                    }
                }
            }
            _ => {}
        }
    }

    // --- messages ---

    fn lose_requests(&mut self, id: WorkerId, node: NodeId) {
        let now_ms = self.now / MS;
        let Some(process) = self.processes.get_mut(&id) else {
            return;
        };
        let lost: Vec<(u64, u64)> = process
            .requests
            .iter()
            .filter(|(_, (_, at))| *at == node)
            .map(|(id, (request, _))| (*id, *request))
            .collect();
        for (correlation, request) in lost {
            if let Some(process) = self.processes.get_mut(&id) {
                process.requests.remove(&correlation);
            }
            self.leases(id, |leases, out| leases.request_lost(request, now_ms, out));
        }
    }

    fn on_worker_died(&mut self, id: WorkerId, worker: WorkerId) {
        let Some(process) = self.processes.get_mut(&id) else {
            return;
        };
        process.dead_workers.insert(worker);
        if !self.mutated(Mutation::IgnoreWorkerDied) {
            self.refs(id, |table, out| table.worker_died(worker, out));
        }
        let Some(process) = self.processes.get(&id) else { return };
        let hosted: Vec<(ActorId, u64)> = process
            .actors
            .iter()
            .filter(|(_, entry)| entry.worker == Some(worker))
            .map(|(actor, entry)| (*actor, entry.incarnation))
            .collect();
        for (actor, incarnation) in hosted {
            self.actor_calls(id, actor, |calls, out| calls.disconnected(incarnation, out));
        }
        self.caller_died(id, worker);
    }

    fn on_node_died(&mut self, id: WorkerId, node: NodeId) {
        if self.mutated(Mutation::IgnoreNodeDied) {
            return;
        }
        let now_ms = self.now / MS;
        let Some(process) = self.processes.get_mut(&id) else {
            return;
        };
        process.dead_nodes.insert(node);
        process.lease_nodes.retain(|_, at| *at != node);
        let stored: Vec<ObjectId> = process
            .table
            .iter()
            .filter(|(_, entry)| entry.locations().contains(&node))
            .map(|(id, _)| *id)
            .collect();
        for object in stored {
            self.refs(id, |table, _| {
                table.remove_location(&object, node);
            });
        }
        self.leases(id, |leases, out| leases.node_died(node, now_ms, out));
        self.lose_requests(id, node);
    }

    fn on_granted(&mut self, id: WorkerId, correlation: u64, granted: (LeaseId, WorkerId, NodeId, u64)) {
        let (lease, worker, node, first_sequence) = granted;
        let now_ms = self.now / MS;
        if let Some(other) = self.truth.leases.insert(lease, id).filter(|other| *other != id) {
            return self.fail(format!("lease {lease} was granted to {other} and to {id}"));
        }
        let Some(process) = self.processes.get_mut(&id) else {
            return;
        };
        // A request that was withdrawn has the number of none.
        let request = process.requests.remove(&correlation).map_or(0, |(request, _)| request);
        process.lease_nodes.insert(lease, node);
        if process.dead_nodes.contains(&node) {
            process.lease_nodes.remove(&lease);
            self.leases(id, |leases, out| leases.request_lost(request, now_ms, out));
            return;
        }
        self.leases(id, |leases, out| {
            leases.granted(request, lease, worker, node, first_sequence, now_ms, out)
        });
    }

    pub(crate) fn process_message(&mut self, id: WorkerId, from: Place, message: Message) {
        let now_ms = self.now / MS;
        let sender = match from {
            Place::Process(worker) => worker,
            _ => WorkerId::NIL,
        };
        let request_of = |world: &Self, correlation: u64| {
            world
                .processes
                .get(&id)
                .and_then(|process| process.requests.get(&correlation))
                .map(|(request, _)| *request)
        };
        match message {
            Message::Push(push) => self.on_push(id, push),
            Message::Reply(reply) => self.on_reply(id, sender, reply),
            Message::RecallTasks { lease } => self.on_recall_tasks(id, sender, lease),
            Message::TasksRecalled { lease, tasks } => {
                let tasks: Vec<TaskId> = tasks.into_iter().map(|(task, _)| task).collect();
                self.leases(id, |leases, out| leases.tasks_recalled(&tasks, lease, now_ms, out));
            }
            Message::AddBorrower {
                object,
                borrower,
                generation,
            } => {
                self.refs(id, |table, out| {
                    table.add_borrower(object, borrower, generation, out);
                });
                let known_dead = self
                    .processes
                    .get(&id)
                    .is_some_and(|process| process.dead_workers.contains(&borrower));
                if known_dead && !self.mutated(Mutation::IgnoreWorkerDied) {
                    self.refs(id, |table, out| table.worker_died(borrower, out));
                }
                if !self.mutated_sometimes(Mutation::LoseAddBorrower) {
                    let answer = Message::BorrowerAdded {
                        object,
                        borrower,
                        generation,
                    };
                    self.send(Place::Process(id), from, answer);
                }
            }
            Message::BorrowerAdded {
                object,
                borrower,
                generation,
            } => {
                self.refs(id, |table, out| table.borrower_added(object, borrower, generation, out));
            }
            Message::RemoveBorrower { object, generation } => {
                self.refs(id, |table, out| table.remove_borrower(object, sender, generation, out));
            }
            Message::ReturnsAcknowledged { task } => self.refs(id, |table, out| table.returns_acknowledged(task, out)),
            Message::GetObjectStatus { object } => self.status_asked(id, sender, object),
            Message::ObjectStatus { object, value } => {
                if let Some(entry) = self
                    .processes
                    .get_mut(&id)
                    .and_then(|process| process.table.get_mut(&object))
                {
                    entry.value.asked = false;
                    self.set_value(id, object, value);
                }
            }
            Message::AddLocation { object, node } => {
                let Some(process) = self.processes.get_mut(&id) else {
                    return;
                };
                if !process.table.add_location(&object, node) {
                    self.free_on(id, node, object);
                }
            }
            Message::ReportLost { object, nodes } => {
                for node in nodes {
                    self.refs(id, |table, _| {
                        table.remove_location(&object, node);
                    });
                }
            }
            Message::LeaseGranted {
                correlation,
                lease,
                worker,
                node,
                first_sequence,
            } => {
                self.on_granted(id, correlation, (lease, worker, node, first_sequence));
            }
            Message::LeaseRedirected { correlation, node } => {
                if let Some(request) = request_of(self, correlation) {
                    if let Some(process) = self.processes.get_mut(&id) {
                        process.requests.remove(&correlation);
                    }
                    self.leases(id, |leases, out| leases.redirected(request, node, out));
                }
            }
            Message::LeaseRefused { correlation } => {
                if let Some(request) = request_of(self, correlation) {
                    if let Some(process) = self.processes.get_mut(&id) {
                        process.requests.remove(&correlation);
                    }
                    let failed = self
                        .leases(id, |leases, out| leases.refused(request, out))
                        .unwrap_or_default();
                    for task in failed {
                        self.finish_failed(id, task, Failure::Unschedulable);
                    }
                }
            }
            Message::LeaseQueued { correlation } => {
                if let Some(request) = request_of(self, correlation) {
                    self.leases(id, |leases, out| leases.queued(request, now_ms, out));
                }
            }
            Message::RecallLease { lease } => {
                self.leases(id, |leases, out| leases.recalled(lease, out));
            }
            Message::LeaseBroken { lease, started } => {
                if let Some(process) = self.processes.get_mut(&id) {
                    process.lease_nodes.remove(&lease);
                }
                self.leases(id, |leases, out| leases.broken(lease, started, now_ms, out));
            }
            Message::LeaseAssigned { lease } => self.on_assigned(id, lease),
            Message::WorkerDied { worker } => self.on_worker_died(id, worker),
            Message::NodeDied { node } => self.on_node_died(id, node),
            Message::ExitProcess => self.on_exit(id),
            Message::CreateActor(message) => self.on_create_actor(id, &message),
            Message::Publication(state) => self.on_actor_state(id, &state),
            Message::GcsAnswer { reply } => {
                if let Some(state) = &reply.actor {
                    self.on_actor_state(id, state);
                }
                if !reply.error.is_empty() {
                    self.note(format!("{id} was answered {}", reply.error));
                }
            }
            Message::ObjectLocal { object } => self.on_local(id, object),
            Message::FetchFailed { object, absent } => self.on_fetch_failed(id, object, absent),
            other => self.fail(format!("a process got {other:?}")),
        }
    }

    fn on_local(&mut self, id: WorkerId, object: ObjectId) {
        if let Some(entry) = self
            .processes
            .get_mut(&id)
            .and_then(|process| process.table.get_mut(&object))
        {
            entry.value.fetching = false;
        }
        self.wake_waiters(id, object);
    }

    fn on_fetch_failed(&mut self, id: WorkerId, object: ObjectId, absent: Vec<NodeId>) {
        let Some(process) = self.processes.get_mut(&id) else {
            return;
        };
        let Some(entry) = process.table.get_mut(&object) else {
            return;
        };
        entry.value.fetching = false;
        let forget = self.config.mutation == Some(Mutation::ForgetReportLost);
        match entry.borrowed_owner() {
            None => {
                for node in absent.into_iter().filter(|_| !forget) {
                    self.refs(id, |table, _| {
                        table.remove_location(&object, node);
                    });
                }
            }
            Some(owner) => {
                if !entry.owner_is_dead() {
                    entry.value.value = None;
                    entry.value.asked = false;
                } else {
                    entry.value.value = Some(Value::Failed(Failure::OwnerDied));
                }
                if !forget {
                    let message = Message::ReportLost { object, nodes: absent };
                    self.send(Place::Process(id), Place::Process(owner), message);
                }
            }
        }
        // Whoever waits asks again.
        self.wake_waiters(id, object);
    }
}

fn new_entry(creation: Option<Rc<Call>>, max_restarts: i32) -> ActorEntry {
    ActorEntry {
        calls: ActorCalls::new(false, -1),
        worker: None,
        incarnation: 0,
        creation,
        max_restarts,
        registered: false,
    }
}
