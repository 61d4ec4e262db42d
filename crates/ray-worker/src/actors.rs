//! Actors as a caller and as a creator see them: handles, creation, news of their lives.
//!
//! Invariants:
//! 1. A handle is an object: `ObjectId::of(TaskId::for_actor_creation(actor), 1)`, counted like any other.
//! 2. News of an actor comes from the control plane; a broken link only says that calls must wait for news.
//! 3. A constructor's arguments stay counted while the actor may be created again.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use ray_ids::{ActorId, ObjectId, TaskId, WorkerId};
use ray_wire::layout::ErrorValue;
use ray_wire::{
    id_bytes, ActorCreation, ActorKey, ActorName, ActorState, DeathCause, GcsCall, KillActor, RegisterActor, Strategy,
    ACTOR_ALIVE, ACTOR_DEAD, ACTOR_RESTARTING,
};

use crate::actor_entry::{error_kind_of_death, ActorEntry};
use crate::inner::{CoreWorker, Inner, Pending, Reference, State};
use crate::slot::Slot;
use crate::submit::Arguments;
use crate::template::{amounts, Template};
use crate::value::{error_value, InlineValue};
use crate::WorkerError;

/// What an actor is made with.
#[derive(Debug, Clone, Default)]
pub struct ActorOptions {
    pub resources: Vec<(String, i64)>,
    pub placement_resources: Vec<(String, i64)>,
    pub strategy: Strategy,
    pub max_restarts: i32,
    pub max_task_retries: i32,
    pub max_concurrency: u32,
    pub is_async: bool,
    pub concurrency_groups_json: String,
    pub detached: bool,
    pub name: String,
    pub namespace: String,
    pub get_if_exists: bool,
    pub out_of_order: bool,
    pub class_name: String,
    pub runtime_env_json: String,
    pub handle_metadata: Bytes,
    pub max_pending_calls: i32,
}

/// An actor as it was found.
#[derive(Debug)]
pub struct ActorView {
    pub actor_id: ActorId,
    pub handle_metadata: Bytes,
}

/// The handle's object.
pub(crate) fn handle_object(actor: ActorId) -> ObjectId {
    ObjectId::of(TaskId::for_actor_creation(actor), 1)
}

/// The value of a handle's object: nobody reads it.
fn handle_value() -> InlineValue {
    InlineValue {
        format: ray_wire::layout::FORMAT_NONE,
        inband: Bytes::new(),
        buffers: Box::default(),
        contained: Box::default(),
    }
}

impl CoreWorker {
    /// Creates an actor. Waits only where it has a name. `None` for the reference: the name's actor existed already.
    pub fn create_actor(
        &self,
        template: &Arc<Template>,
        arguments: Arguments,
        options: ActorOptions,
        parent: TaskId,
    ) -> Result<(ActorId, Option<Reference>, Option<ActorView>), WorkerError> {
        let placed = self.place_arguments(arguments.values, parent)?;
        let actor = self.new_actor_id();
        let named = !options.name.is_empty();
        let (name, namespace, get_if_exists) = (options.name.clone(), options.namespace.clone(), options.get_if_exists);
        let reference = {
            let mut state = self.0.enter()?;
            if let Some(reason) = &state.raylet_gone {
                return Err(WorkerError::RayletGone(reason.clone()));
            }
            let task_id = TaskId::for_actor_creation(actor);
            let spec = self.0.make_spec(
                &mut state,
                template,
                task_id,
                placed,
                arguments.references,
                parent,
                None,
            );
            let mut entry = ActorEntry::new(options.out_of_order, options.max_pending_calls);
            entry.owned = true;
            entry.detached = options.detached;
            entry.class_name.clone_from(&options.class_name);
            entry.creation_pins = spec.pinned.to_vec();
            entry.creation = Some(Box::new(ActorCreation {
                owner: Some(self.0.me.clone()),
                resources: amounts(&options.resources),
                placement_resources: amounts(&options.placement_resources),
                strategy: Some(options.strategy),
                max_restarts: options.max_restarts,
                max_task_retries: options.max_task_retries,
                max_concurrency: options.max_concurrency,
                is_async: options.is_async,
                concurrency_groups_json: options.concurrency_groups_json,
                detached: options.detached,
                name: options.name,
                namespace: options.namespace,
                out_of_order: options.out_of_order,
                class_name: options.class_name,
                runtime_env_json: options.runtime_env_json,
                handle_metadata: options.handle_metadata,
                max_pending_calls: options.max_pending_calls,
                ..ActorCreation::default()
            }));
            state.actors.insert(actor, entry);
            let id = handle_object(actor);
            let slot = Slot::inline(handle_value());
            state.refs.own(id, slot.clone());
            self.0.watch_actor(&mut state, actor);
            self.0.start_creation(&mut state, spec, named);
            Reference {
                id,
                slot,
                core: self.0.clone(),
            }
        };
        if !named {
            return Ok((actor, Some(reference), None));
        }
        // A name is taken or free: only the control plane knows. It is asked in `start_creation`'s stead, here.
        let registration = self
            .0
            .lock()
            .actors
            .get_mut(&actor)
            .and_then(|entry| entry.creation.take());
        let Some(creation) = registration else {
            return Ok((actor, Some(reference), None));
        };
        let register = RegisterActor {
            actor_id: id_bytes(actor.as_bytes()),
            creation: Some(*creation),
            get_if_exists,
        };
        match self.gcs_call(GcsCall::RegisterActor(register), Duration::ZERO) {
            Ok(reply) => {
                let Some(found) = reply.actor.filter(|found| found.actor_id != actor.as_bytes()) else {
                    return Ok((actor, Some(reference), None));
                };
                self.0.forget_actor(actor);
                drop(reference);
                let existing = ActorId::from_binary(&found.actor_id).map_err(ray_wire::WireError::from)?;
                Ok((existing, None, Some(self.adopt_actor(existing, &found)?)))
            }
            Err(error) => {
                self.0.forget_actor(actor);
                drop(reference);
                Err(match error {
                    WorkerError::Gcs {
                        kind: ray_wire::GCS_ERROR_NAME_TAKEN,
                        message,
                    } => WorkerError::Gcs {
                        kind: ray_wire::GCS_ERROR_NAME_TAKEN,
                        message: if message.is_empty() {
                            format!("the actor name {name:?} is taken in namespace {namespace:?}")
                        } else {
                            message
                        },
                    },
                    other => other,
                })
            }
        }
    }

    fn adopt_actor(&self, actor: ActorId, found: &ActorState) -> Result<ActorView, WorkerError> {
        let mut state = self.0.enter()?;
        let entry = self.0.actor_entry(&mut state, actor)?;
        entry.calls.configure(found.out_of_order, found.max_pending_calls);
        entry.max_pending_calls = found.max_pending_calls;
        entry.class_name.clone_from(&found.class_name);
        Ok(ActorView {
            actor_id: actor,
            handle_metadata: found.handle_metadata.clone(),
        })
    }

    /// Finds a named actor.
    pub fn get_named_actor(&self, name: &str, namespace: &str) -> Result<ActorView, WorkerError> {
        let call = GcsCall::GetNamedActor(ActorName {
            name: name.into(),
            namespace: namespace.into(),
        });
        let reply = self.gcs_call(call, Duration::ZERO)?;
        let found = reply.actor.ok_or_else(|| WorkerError::Gcs {
            kind: ray_wire::GCS_ERROR_NOT_FOUND,
            message: format!("no actor is named {name:?} in namespace {namespace:?}"),
        })?;
        let actor = ActorId::from_binary(&found.actor_id).map_err(ray_wire::WireError::from)?;
        self.adopt_actor(actor, &found)
    }

    /// Makes this process listen to an actor whose handle arrived.
    pub fn know_actor(
        &self,
        actor: ActorId,
        class_name: &str,
        out_of_order: bool,
        max_pending_calls: i32,
    ) -> Result<(), WorkerError> {
        let mut state = self.0.enter()?;
        let entry = self.0.actor_entry(&mut state, actor)?;
        if entry.class_name.is_empty() {
            entry.class_name = class_name.to_owned();
            entry.calls.configure(out_of_order, max_pending_calls);
            entry.max_pending_calls = max_pending_calls;
        }
        Ok(())
    }

    /// `ray.kill`.
    pub fn kill_actor(&self, actor: ActorId, no_restart: bool) -> Result<(), WorkerError> {
        let mut state = self.0.enter()?;
        let kill = KillActor {
            actor_id: id_bytes(actor.as_bytes()),
            no_restart,
        };
        self.0.ask_gcs(&mut state, GcsCall::KillActor(kill), Pending::Ignored)?;
        // What is called from now on must not reach the process that is about to end: it waits for news.
        let mut commands = Vec::new();
        self.0.give_up_actor_pushes(&mut state, actor);
        if let Some(entry) = state.actors.get_mut(&actor) {
            let incarnation = entry.incarnation;
            entry.killed_incarnation = Some(incarnation);
            entry.calls.disconnected(incarnation, &mut commands);
        }
        self.0.carry_out_actor(&mut state, actor, commands);
        Ok(())
    }

    /// State, incarnation and death of an actor, as known here.
    pub fn actor_state(&self, actor: ActorId) -> Result<(u32, u64, Option<DeathCause>, String), WorkerError> {
        let state = self.0.enter()?;
        Ok(state
            .actors
            .get(&actor)
            .map_or((0, 0, None, "nothing is known of it".to_owned()), |entry| {
                (entry.state, entry.incarnation, entry.death.clone(), entry.describe())
            }))
    }
}

impl Inner {
    /// What is known of an actor; begins to listen where nothing is.
    pub fn actor_entry<'a>(&self, state: &'a mut State, actor: ActorId) -> Result<&'a mut ActorEntry, WorkerError> {
        if let std::collections::hash_map::Entry::Vacant(vacant) = state.actors.entry(actor) {
            vacant.insert(ActorEntry::new(false, -1));
            self.watch_actor(state, actor);
        }
        state
            .actors
            .get_mut(&actor)
            .ok_or_else(|| WorkerError::Invalid(format!("actor {actor} is not known")))
    }

    fn watch_actor(&self, state: &mut State, actor: ActorId) {
        let owner = state
            .refs
            .get(&handle_object(actor))
            .map(|_| self.owner_address(state, &handle_object(actor)));
        let Some(entry) = state.actors.get_mut(&actor) else {
            return;
        };
        if std::mem::replace(&mut entry.watched, true) {
            return;
        }
        let owner = if entry.owned { None } else { owner };
        let key = ActorKey {
            actor_id: id_bytes(actor.as_bytes()),
            owner,
        };
        let _ = self.ask_gcs(state, GcsCall::WatchActor(key), Pending::Ignored);
    }

    /// An actor whose name was taken never was.
    fn forget_actor(&self, actor: ActorId) {
        let mut state = self.lock();
        let Some(mut entry) = state.actors.remove(&actor) else {
            return;
        };
        let mut commands = Vec::new();
        for object in entry.creation_pins.drain(..) {
            state.refs.remove_submitted(&object, &mut commands);
        }
        self.carry_out_references(&mut state, commands);
    }

    /// Registers the actor once its constructor's arguments are there. A named one is registered by the caller, who
    /// needs the answer; its arguments are then awaited where it runs.
    fn start_creation(&self, state: &mut State, spec: Arc<crate::submit::TaskSpec>, named: bool) {
        let task_id = spec.task_id;
        if named {
            self.fill_creation(state, &spec);
            return;
        }
        self.start_creation_task(state, spec, task_id);
    }

    fn start_creation_task(&self, state: &mut State, spec: Arc<crate::submit::TaskSpec>, task_id: TaskId) {
        let mut unresolved = 0;
        let dependencies: Vec<ObjectId> = spec
            .references
            .iter()
            .map(|reference| reference.object)
            .chain(spec.values_reference.as_deref().copied())
            .collect();
        for object in dependencies {
            if self.await_value(state, object, crate::slot::Wake::Task(task_id)) {
                unresolved += 1;
            }
        }
        let task = crate::submit::PendingTask::new(spec, unresolved, 0, 0);
        state.tasks.insert(task_id, task);
        if unresolved == 0 {
            self.register_created_actor(state, task_id);
        }
    }

    fn fill_creation(&self, state: &mut State, spec: &crate::submit::TaskSpec) {
        let (mut call, payload) = self.push_message(state, spec, None, Bytes::new(), 0, 0, 0);
        if let Some(template) = &mut call.template {
            template.is_actor_creation = true;
            template.num_returns = 0;
        }
        let joined: Vec<u8> = payload.concat();
        if let Some(creation) = state
            .actors
            .get_mut(&spec.task_id.actor_id())
            .and_then(|entry| entry.creation.as_mut())
        {
            creation.call = Some(call);
            creation.payload = joined.into();
        }
    }

    /// A constructor's arguments are there: the control plane takes over.
    pub fn register_created_actor(&self, state: &mut State, task_id: TaskId) {
        let Some(task) = state.tasks.remove(&task_id) else {
            return;
        };
        let actor = task_id.actor_id();
        self.fill_creation(state, &task.spec);
        let Some(creation) = state.actors.get_mut(&actor).and_then(|entry| entry.creation.take()) else {
            return;
        };
        let register = RegisterActor {
            actor_id: id_bytes(actor.as_bytes()),
            creation: Some(*creation),
            get_if_exists: false,
        };
        let _ = self.ask_gcs(state, GcsCall::RegisterActor(register), Pending::RegisterActor(actor));
    }

    /// The control plane refused to make the actor.
    pub fn registration_failed(&self, state: &mut State, actor: ActorId, message: String) {
        let death = DeathCause {
            kind: ray_wire::DEATH_UNKNOWN,
            message,
            ..DeathCause::default()
        };
        self.actor_died(state, actor, death);
    }

    /// News of an actor.
    pub fn on_actor_state(&self, state: &mut State, news: ActorState) -> Result<(), WorkerError> {
        let actor = ActorId::from_binary(&news.actor_id).map_err(ray_wire::WireError::from)?;
        if let Some(worker) = &news.worker {
            if news.state == ACTOR_ALIVE {
                self.note_address(state, worker);
            }
        }
        let Some(entry) = state.actors.get_mut(&actor).filter(|entry| !entry.is_late(&news)) else {
            return Ok(());
        };
        if news.state != ACTOR_ALIVE || news.incarnation > entry.incarnation {
            self.give_up_actor_pushes(state, actor);
        }
        let Some(entry) = state.actors.get_mut(&actor) else {
            return Ok(());
        };
        entry.state = news.state;
        entry.pending_reason.clone_from(&news.pending_reason);
        if !news.class_name.is_empty() {
            entry.class_name.clone_from(&news.class_name);
        }
        match news.state {
            ACTOR_ALIVE => {
                let Some(worker) = news.worker else { return Ok(()) };
                let worker = worker.worker()?;
                let newer = news.incarnation > entry.incarnation;
                entry.incarnation = news.incarnation;
                entry.was_alive = true;
                entry.worker = Some(worker);
                let mut commands = Vec::new();
                entry.calls.alive(worker, news.incarnation, &mut commands);
                self.carry_out_actor(state, actor, commands);
                if newer {
                    self.fail_unavailable(state, actor);
                }
            }
            ACTOR_RESTARTING => {
                let mut commands = Vec::new();
                entry.calls.restarting(news.incarnation, &mut commands);
                self.carry_out_actor(state, actor, commands);
                self.fail_unavailable(state, actor);
            }
            ACTOR_DEAD => self.actor_died(state, actor, news.death.unwrap_or_default()),
            _ => {}
        }
        Ok(())
    }

    /// Unanswered calls of an incarnation that is gone, now that it is known not to be the last.
    pub fn fail_unavailable(&self, state: &mut State, actor: ActorId) {
        let Some(entry) = state.actors.get_mut(&actor) else {
            return;
        };
        let tasks = std::mem::take(&mut entry.unavailable);
        let name = entry.class_name.clone();
        let death = entry.death.clone();
        for task in tasks {
            let error = ErrorValue {
                kind: death
                    .as_ref()
                    .map_or(ray_wire::layout::ERROR_ACTOR_UNAVAILABLE, |death| {
                        error_kind_of_death(death.kind)
                    }),
                message: death.as_ref().map_or_else(
                    || {
                        "the actor restarts or cannot be reached; the call was under way and may have run \
                         (max_task_retries=0)"
                            .into()
                    },
                    |death| death.message.clone(),
                ),
                death: death.clone(),
                actor_id: id_bytes(actor.as_bytes()),
                task_id: id_bytes(task.as_bytes()),
                name: name.clone(),
                ..ErrorValue::default()
            };
            self.finish_with(state, task, Arc::new(error_value(&error)));
        }
    }

    /// The actor's process is gone, or is taken for gone: what it still answers counts no more, and what its unfinished
    /// calls may have stored is freed when they are over.
    pub fn give_up_actor_pushes(&self, state: &mut State, actor: ActorId) {
        let Some(entry) = state.actors.get(&actor) else { return };
        let ray_ownership::actor_calls::ActorStatus::Alive { worker, .. } = entry.calls.status() else {
            return;
        };
        let node = state.addresses.get(worker).map(crate::connect::node_of);
        for task in entry.calls.sent() {
            if let Some(task) = state.tasks.get_mut(&task) {
                task.give_up_push(node);
            }
        }
    }

    fn actor_died(&self, state: &mut State, actor: ActorId, death: DeathCause) {
        let Some(entry) = state.actors.get_mut(&actor) else {
            return;
        };
        entry.state = ACTOR_DEAD;
        entry.death = Some(death);
        entry.creation = None;
        let mut commands = Vec::new();
        entry.calls.dead(&mut commands);
        let pins = std::mem::take(&mut entry.creation_pins);
        state.tasks.remove(&TaskId::for_actor_creation(actor));
        self.carry_out_actor(state, actor, commands);
        self.fail_unavailable(state, actor);
        let mut commands = Vec::new();
        for object in pins {
            state.refs.remove_submitted(&object, &mut commands);
        }
        self.carry_out_references(state, commands);
    }

    /// A process is within reach again. Its actors' calls need not wait for news: it lived all the time.
    pub fn actor_link_restored(&self, state: &mut State, worker: WorkerId) {
        let there: Vec<(ActorId, u64)> = state
            .actors
            .iter()
            .filter(|(_, entry)| {
                let killed = entry
                    .killed_incarnation
                    .is_some_and(|killed| entry.incarnation <= killed);
                entry.worker == Some(worker) && entry.state == ACTOR_ALIVE && !killed
            })
            .map(|(actor, entry)| (*actor, entry.incarnation))
            .collect();
        for (actor, incarnation) in there {
            let mut commands = Vec::new();
            if let Some(entry) = state.actors.get_mut(&actor) {
                entry.calls.alive(worker, incarnation, &mut commands);
            }
            self.carry_out_actor(state, actor, commands);
            self.fail_unavailable(state, actor);
        }
    }

    /// The link to an actor's process broke: its calls wait for news.
    pub fn actor_link_lost(&self, state: &mut State, worker: WorkerId) {
        let lost: Vec<(ActorId, u64)> = state
            .actors
            .iter()
            .filter_map(|(actor, entry)| match entry.calls.status() {
                ray_ownership::actor_calls::ActorStatus::Alive {
                    worker: alive,
                    incarnation,
                } if *alive == worker => Some((*actor, *incarnation)),
                _ => None,
            })
            .collect();
        for (actor, incarnation) in lost {
            self.give_up_actor_pushes(state, actor);
            let mut commands = Vec::new();
            if let Some(entry) = state.actors.get_mut(&actor) {
                entry.calls.disconnected(incarnation, &mut commands);
            }
            self.carry_out_actor(state, actor, commands);
        }
    }
}
