//! A process as executor: runs drivers' programs, plain tasks one at a time under the present lease, and an actor's calls
//! as its order says.
//!
//! Invariants:
//! 1. A call under any lease but the present one is not started.
//! 2. What a return contains is held before the frame's references go.

use ray_ids::{ActorId, LeaseId, NodeId, TaskId, WorkerId};
use ray_ownership::actor_order::{ActorOrder, ArrivedCall, CallKey, OrderCommand, RefusalReason};
use ray_wire::{ActorCreated, CreateActor};

use crate::model::{CallKind, Message, Outcome, Place, Push};
use crate::mutation::Mutation;
use crate::process::Process;
use crate::program::Generator;
use crate::world::World;

impl World {
    pub(crate) fn start_driver(&mut self, node: NodeId) {
        self.drivers_to_start -= 1;
        if !self.raylets.contains_key(&node) {
            return;
        }
        let worker = WorkerId::from_array(self.random.bytes());
        self.home.insert(worker, node);
        self.processes.insert(worker, Process::new(worker, node, true));
        self.drivers.push(worker);
        self.add_driver(node, worker);
    }

    /// A driver has its job: its program begins.
    pub(crate) fn begin_driver(&mut self, id: WorkerId, job: ray_ids::JobId) {
        let budget = self.random.between(10, 200) as usize;
        let script = Generator {
            random: &mut self.random,
            budget,
        }
        .driver();
        let Some(process) = self.processes.get_mut(&id) else {
            return;
        };
        process.job = Some(job);
        self.new_frame(id, script, None, Vec::new());
    }

    pub(crate) fn new_worker(&mut self, node: NodeId, worker: WorkerId) {
        self.processes.insert(worker, Process::new(worker, node, false));
    }

    /// The raylet asks a process to leave.
    pub(crate) fn on_exit(&mut self, id: WorkerId) {
        if let Some(process) = self.processes.get_mut(&id) {
            process.exiting = true;
        }
        self.leave_if_done(id);
    }

    /// A worker leaves of itself only when nothing of it is needed any more; an actor when its calls are over.
    pub(crate) fn leave_if_done(&mut self, id: WorkerId) {
        let Some(process) = self.processes.get(&id).filter(|process| process.exiting) else {
            return;
        };
        let calls_over =
            process.frames.is_empty() && process.order.as_ref().is_none_or(|order| order.unfinished() == 0);
        let is_actor = process.actor.is_some();
        if calls_over && (is_actor || process.leftover().is_none()) {
            self.kill_process(id);
        }
    }

    pub(crate) fn on_push(&mut self, id: WorkerId, push: Push) {
        if matches!(push.call.kind, CallKind::Method { .. }) {
            return self.on_method(id, push);
        }
        let any = self.mutated(Mutation::AcceptStaleLease);
        let Some(process) = self.processes.get_mut(&id) else {
            return;
        };
        if process.lease == Some(push.lease) || any {
            process.queue.push_back(push);
            self.start_next(id);
        } else if process.past_leases.contains(&push.lease) {
            self.reply(id, &push, Outcome::StaleLease, Vec::new(), false);
        } else {
            // The assignment is under way on another link.
            process.early.push(push);
        }
    }

    pub(crate) fn on_assigned(&mut self, id: WorkerId, lease: Option<LeaseId>) {
        self.check_assignment(id);
        let Some(process) = self.processes.get_mut(&id) else {
            return;
        };
        let old = std::mem::replace(&mut process.lease, lease);
        process.past_leases.extend(old);
        let early = std::mem::take(&mut process.early);
        let queued = std::mem::take(&mut process.queue);
        for push in queued.into_iter().chain(early) {
            self.on_push(id, push);
        }
    }

    pub(crate) fn on_recall_tasks(&mut self, id: WorkerId, owner: WorkerId, lease: LeaseId) {
        let keep = self.mutated(Mutation::RunRecalledCalls);
        let Some(process) = self.processes.get_mut(&id) else {
            return;
        };
        let mut tasks = Vec::new();
        process.queue.retain(|push| {
            let recalled = push.lease == lease && push.caller == owner;
            if recalled {
                tasks.push((push.call.task, push.sequence));
            }
            !recalled || keep
        });
        self.send(
            Place::Process(id),
            Place::Process(owner),
            Message::TasksRecalled { lease, tasks },
        );
    }

    pub(crate) fn start_next(&mut self, id: WorkerId) {
        let Some(process) = self.processes.get_mut(&id) else {
            return;
        };
        if process.frames.is_empty() {
            if let Some(push) = process.queue.pop_front() {
                process.started_sequence = push.sequence;
                self.start_call(id, push);
            }
        }
    }

    pub(crate) fn on_create_actor(&mut self, id: WorkerId, message: &CreateActor) {
        let (Ok(actor), Some(creation)) = (ActorId::from_binary(&message.actor_id), &message.creation) else {
            return;
        };
        let task = creation
            .call
            .as_ref()
            .and_then(|call| TaskId::from_binary(&call.task_id).ok());
        let Some(call) = task.and_then(|task| self.calls.get(&task)).cloned() else {
            return self.fail(format!("the constructor of {actor} is not known"));
        };
        let Some(process) = self.processes.get_mut(&id) else {
            return;
        };
        process.actor = Some((actor, message.incarnation));
        process.job = Some(actor.job_id());
        let push = Push {
            caller: creation
                .owner
                .as_ref()
                .and_then(|owner| owner.worker().ok())
                .unwrap_or_default(),
            call,
            attempt: message.incarnation as u32,
            lease: LeaseId::NIL,
            sequence: 0,
            incarnation: message.incarnation,
        };
        self.start_call(id, push);
    }

    pub(crate) fn constructor_over(&mut self, id: WorkerId, push: &Push, failed: bool) {
        let CallKind::Constructor { actor, max_concurrency } = push.call.kind else {
            return;
        };
        let Some(process) = self.processes.get_mut(&id) else {
            return;
        };
        let node = process.node;
        process.order = Some(ActorOrder::new(push.incarnation, false, max_concurrency, &[]));
        let failure = failed.then(|| ray_raylet::types::death(ray_wire::DEATH_CONSTRUCTOR, "an argument was lost"));
        let created = ActorCreated {
            actor_id: ray_wire::id_bytes(actor.as_bytes()),
            incarnation: push.incarnation,
            failure,
            ..ActorCreated::default()
        };
        self.send(Place::Process(id), Place::Raylet(node), Message::ActorCreated(created));
    }

    pub(crate) fn on_method(&mut self, id: WorkerId, push: Push) {
        let key = CallKey {
            caller: push.caller,
            sequence: push.sequence,
        };
        if self.mutated(Mutation::ActorIgnoresOrder) {
            return self.start_call(id, push);
        }
        let arrived = ArrivedCall {
            key,
            task: push.call.task,
            incarnation: push.incarnation,
            group: String::new(),
            ready: true,
        };
        let Some(process) = self.processes.get_mut(&id) else {
            return;
        };
        if process.order.is_none() {
            return self.reply(id, &push, Outcome::StaleIncarnation, Vec::new(), false);
        }
        process.arrived.entry(key).or_insert(push);
        self.order(id, |order, out| order.push(arrived, out));
    }

    /// Changes an actor's order, checks it, and carries out what follows.
    pub(crate) fn order(&mut self, id: WorkerId, act: impl FnOnce(&mut ActorOrder, &mut Vec<OrderCommand>)) {
        let Some(order) = self.processes.get_mut(&id).and_then(|process| process.order.as_mut()) else {
            return;
        };
        let mut commands = Vec::new();
        act(order, &mut commands);
        if let Err(error) = order.validate() {
            return self.fail(format!("the order of the actor in {id}: {error}"));
        }
        for command in commands {
            match command {
                OrderCommand::Run { key, .. } => {
                    let push = self
                        .processes
                        .get_mut(&id)
                        .and_then(|process| process.arrived.remove(&key));
                    if let Some(push) = push {
                        self.check_order(id, &push);
                        self.start_call(id, push);
                    }
                }
                OrderCommand::Refuse { key, reason, .. } => {
                    let push = self
                        .processes
                        .get_mut(&id)
                        .and_then(|process| process.arrived.remove(&key));
                    if let Some(push) = push.filter(|_| reason == RefusalReason::StaleIncarnation) {
                        self.reply(id, &push, Outcome::StaleIncarnation, Vec::new(), false);
                    }
                }
                OrderCommand::Duplicate { .. } => {}
            }
        }
    }

    pub(crate) fn caller_died(&mut self, id: WorkerId, caller: WorkerId) {
        self.order(id, |order, out| order.caller_died(caller, out));
        self.leave_if_done(id);
    }
}
