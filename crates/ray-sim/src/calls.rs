//! A process's calls: owns their way from submission over arguments and leases to their end.
//!
//! Invariants:
//! 1. Borrows that a reply lists are noted or relayed before the call's arguments lose their counts.
//! 2. A reply counts only for the attempt that is under way.

use std::rc::Rc;

use ray_ids::{TaskId, WorkerId};
use ray_ownership::leases::LeaseCommand;
use ray_ownership::references::Cover;
use ray_raylet::types::RequestKey;
use ray_wire::{id_bytes, LeaseSpecification, ResourceAmount};

use crate::model::{Call, CallKind, Failure, Message, Outcome, Place, Push, Reference, Reply, Value};
use crate::mutation::Mutation;
use crate::process::{Task, Waiter};
use crate::world::{Event, World, MS};

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

    pub(crate) fn begin_task(&mut self, id: WorkerId, call: Rc<Call>, attempt: u32, retries_left: i32) {
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
    pub(crate) fn resolve(&mut self, id: WorkerId, task: TaskId) {
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

    pub(crate) fn withdraw_method(&mut self, id: WorkerId, task: TaskId) {
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

    pub(crate) fn enqueue(&mut self, id: WorkerId, task: TaskId) {
        let now_ms = self.now / MS;
        let Some(CallKind::Plain { cpus }) = self.task_kind(id, task) else {
            return;
        };
        self.leases(id, |leases, out| {
            leases.submit(task, u64::from(cpus), true, None, now_ms, out)
        });
    }

    pub(crate) fn task_kind(&self, id: WorkerId, task: TaskId) -> Option<CallKind> {
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

    pub(crate) fn schedule_tick(&mut self, id: WorkerId) {
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

    pub(crate) fn carry_out_lease(&mut self, id: WorkerId, command: LeaseCommand) {
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
            LeaseCommand::AttemptFailed { task, lease } => {
                // The worker may have sealed the result before it died; nobody else knows of that copy.
                let node = process.lease_nodes.get(&lease).copied();
                let stored = process.tasks.get(&task).filter(|state| state.call.stored);
                let result = stored.map(|state| state.call.result());
                if let (Some(node), Some(result)) = (node, result) {
                    if !self.mutated(Mutation::ForgetCopyOfFailedAttempt) {
                        self.free_on(id, node, result);
                    }
                }
                self.attempt_failed(id, task);
            }
        }
    }

    pub(crate) fn attempt_failed(&mut self, id: WorkerId, task: TaskId) {
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

    pub(crate) fn finish_failed(&mut self, id: WorkerId, task: TaskId, failure: Failure) {
        self.end_task(id, task, Value::Failed(failure), false);
    }

    /// A call is over.
    pub(crate) fn end_task(&mut self, id: WorkerId, task: TaskId, value: Value, stored: bool) {
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
        let keep = failed && self.mutated(Mutation::KeepArgumentsOfFailedCall);
        let released = self.mutated(Mutation::ReleaseBeforeRelay);
        if !keep && !released {
            self.release_arguments(id, &call);
        }
        self.set_value(id, call.result(), value);
    }

    pub(crate) fn release_arguments(&mut self, id: WorkerId, call: &Call) {
        if self.mutated(Mutation::ForgetSubmitted) {
            return;
        }
        for argument in call.counted() {
            self.refs(id, |table, out| table.remove_submitted(&argument, out));
        }
    }

    pub(crate) fn retain_lineage(&mut self, id: WorkerId, call: &Rc<Call>, attempt: u32, retries_left: i32) {
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

    pub(crate) fn on_reply(&mut self, id: WorkerId, worker: WorkerId, reply: Reply) {
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
}
