//! Actors as their callers and owners see them: registration, news, and calls in order.
//!
//! Invariant: 1. The owner counts a constructor's arguments until the actor is dead, because it may be created again.

use std::rc::Rc;

use ray_ids::{ActorId, LeaseId, ObjectId, TaskId, WorkerId};
use ray_ownership::actor_calls::{ActorCalls, ActorCommand};
use ray_wire::{
    id_bytes, ActorCreation, ActorKey, ActorState, GcsCall, RegisterActor, ResourceAmount, ACTOR_ALIVE, ACTOR_DEAD,
    ACTOR_RESTARTING,
};

use crate::model::{Call, CallKind, Failure, Message, Place, Push, Value};
use crate::mutation::Mutation;
use crate::node::address;
use crate::process::ActorEntry;
use crate::world::World;

impl World {
    pub(crate) fn call_gcs(&mut self, id: WorkerId, call: GcsCall) {
        let node = self.node_of(Place::Process(id));
        self.send(
            Place::Process(id),
            Place::Raylet(node),
            Message::GcsCall { call: Box::new(call) },
        );
    }

    /// A handle is used here for the first time.
    pub(crate) fn know_actor(&mut self, id: WorkerId, actor: ActorId) {
        let Some(process) = self.processes.get_mut(&id) else {
            return;
        };
        if process.actors.contains_key(&actor) {
            return;
        }
        process.actors.insert(actor, new_entry(None, 0));
        self.watch_actor(id, actor);
    }

    pub(crate) fn watch_actor(&mut self, id: WorkerId, actor: ActorId) {
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

    pub(crate) fn register_actor(&mut self, id: WorkerId, actor: ActorId) {
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
    pub(crate) fn actor_calls(
        &mut self,
        id: WorkerId,
        actor: ActorId,
        act: impl FnOnce(&mut ActorCalls, &mut Vec<ActorCommand>),
    ) {
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
                ActorCommand::FailDead { task } => {
                    // The actor may run on for a moment after the control plane has declared it dead.
                    let call = self.calls.get(&task).cloned();
                    self.truth.tainted.extend(call.iter().flat_map(|call| call.counted()));
                    self.finish_failed(id, task, Failure::ActorDied);
                }
                ActorCommand::FailUnavailable { task } => self.finish_failed(id, task, Failure::ActorUnavailable),
            }
        }
    }

    pub(crate) fn on_actor_state(&mut self, id: WorkerId, state: &ActorState) {
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
                    // An instance whose creation was under way may come to be and is ended then.
                    self.truth.tainted.extend(call.counted());
                    for argument in call.counted() {
                        self.refs(id, |table, out| table.remove_submitted(&argument, out));
                    }
                }
            }
            _ => {}
        }
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
