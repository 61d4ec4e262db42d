//! Submitting calls: from a template and arguments to a frame on a leased worker's or an actor's link.
//!
//! Invariants:
//! 1. Every return of a submitted call is owned here with one local count for the reference that is handed out, before
//!    the call can be answered.
//! 2. The references among a call's arguments, top-level and inside values, are counted as submitted until its reply.
//! 3. A call is pushed only when every top-level reference among its arguments is known to have a value.

use std::sync::Arc;

use ray_ids::{ActorId, NodeId, ObjectId, TaskId};
use ray_wire::{DeathCause, NUM_RETURNS_DYNAMIC, NUM_RETURNS_STREAMING};

use crate::connect::node_of;
use crate::generators::Stream;
use crate::inner::{CoreWorker, Inner, Reference, State};
use crate::slot::{Slot, SlotValue, Wake};
use crate::template::Template;
use crate::value::{Contained, InlineValue, Serialized};
use crate::WorkerError;

/// A top-level reference among the arguments.
#[derive(Debug, Clone)]
pub struct PassedReference {
    pub index: u32,
    pub keyword: String,
    pub object: ObjectId,
}

/// A call's arguments.
#[derive(Debug, Default)]
pub struct Arguments {
    /// The pickled rest, or `None` where there are no by-value arguments.
    pub values: Option<Serialized>,
    pub references: Vec<PassedReference>,
}

/// What a submitted call gives.
pub enum Submitted {
    /// References to its returns.
    References(Vec<Reference>),
    /// A stream of items.
    Stream(Arc<Stream>),
}

/// A call's constant part after submission, kept for retries and lineage. A million of them may be queued, so that what
/// few calls have lies behind pointers.
#[derive(Debug)]
pub(crate) struct TaskSpec {
    pub task_id: TaskId,
    pub template: Arc<Template>,
    pub values: Option<Box<InlineValue>>,
    /// Where the pickled arguments are an object of their own.
    pub values_reference: Option<Box<ObjectId>>,
    pub references: Box<[PassedReference]>,
    /// Everything counted as submitted.
    pub pinned: Box<[ObjectId]>,
    pub parent: TaskId,
    pub depth: u32,
    pub actor: Option<ActorId>,
}

impl TaskSpec {
    /// How many fixed returns the call has.
    pub fn returns(&self) -> u32 {
        match self.template.message.num_returns {
            NUM_RETURNS_DYNAMIC | NUM_RETURNS_STREAMING => 1,
            count => count.max(0) as u32,
        }
    }

    pub fn return_id(&self, index: u32) -> ObjectId {
        ObjectId::of(self.task_id, index + 1)
    }

    pub fn bytes(&self) -> usize {
        256 + self.values.as_ref().map_or(0, |values| values.size()) + 64 * self.references.len()
    }

    fn dependencies(&self) -> impl Iterator<Item = &ObjectId> {
        self.references
            .iter()
            .map(|reference| &reference.object)
            .chain(self.values_reference.as_deref())
    }
}

/// A call that is not over.
#[derive(Debug)]
pub(crate) struct PendingTask {
    pub spec: Arc<TaskSpec>,
    pub unresolved: usize,
    pub attempt: u32,
    pub retries_left: i32,
    pub cancelled: bool,
    /// The correlation of the push whose answer counts; 0 while none is under way. Whatever else is said of the call is
    /// of an attempt that was given up.
    pub push: u64,
    /// What few calls have.
    trouble: Option<Box<Trouble>>,
}

/// What a call has of which an attempt failed.
#[derive(Debug, Default)]
pub(crate) struct Trouble {
    /// Why the last attempt failed.
    pub cause: Option<DeathCause>,
    /// Nodes where a given-up attempt may have stored results that nobody was told of.
    pub strays: Vec<NodeId>,
    /// The call runs again for lost items of a generator whose stream is over; it had so many.
    pub items_again: u64,
}

impl PendingTask {
    pub fn new(spec: Arc<TaskSpec>, unresolved: usize, attempt: u32, retries_left: i32) -> Self {
        Self {
            spec,
            unresolved,
            attempt,
            retries_left,
            cancelled: false,
            push: 0,
            trouble: None,
        }
    }

    pub fn trouble_mut(&mut self) -> &mut Trouble {
        self.trouble.get_or_insert_default()
    }

    pub fn cause(&self) -> Option<&DeathCause> {
        self.trouble.as_ref()?.cause.as_ref()
    }

    pub fn strays(&self) -> &[NodeId] {
        self.trouble.as_ref().map_or(&[], |trouble| &trouble.strays)
    }

    pub fn items_again(&self) -> u64 {
        self.trouble.as_ref().map_or(0, |trouble| trouble.items_again)
    }

    /// The push under way is given up: its answer counts no more, and what it may have stored on the node is freed when
    /// the call is over.
    pub fn give_up_push(&mut self, node: Option<NodeId>) {
        self.push = 0;
        if let Some(node) = node.filter(|node| !self.strays().contains(node)) {
            self.trouble_mut().strays.push(node);
        }
    }
}

impl CoreWorker {
    /// Submits a call of a function.
    pub fn submit_task(
        &self,
        template: &Arc<Template>,
        arguments: Arguments,
        parent: TaskId,
    ) -> Result<Submitted, WorkerError> {
        let values = self.place_arguments(arguments.values, parent)?;
        let mut state = self.0.enter()?;
        if let Some(reason) = &state.raylet_gone {
            return Err(WorkerError::RayletGone(reason.clone()));
        }
        let task_id = self.0.new_task_id(None);
        self.submit(
            &mut state,
            template,
            task_id,
            values,
            arguments.references,
            parent,
            None,
            template.message.max_retries,
        )
    }

    /// Submits a call of an actor's method. `retries`: how often it may be sent again after a restart.
    pub fn submit_actor_task(
        &self,
        actor: ActorId,
        template: &Arc<Template>,
        arguments: Arguments,
        parent: TaskId,
    ) -> Result<Submitted, WorkerError> {
        let values = self.place_arguments(arguments.values, parent)?;
        let mut state = self.0.enter()?;
        if let Some(reason) = &state.raylet_gone {
            return Err(WorkerError::RayletGone(reason.clone()));
        }
        let entry = self.0.actor_entry(&mut state, actor)?;
        if entry.calls.is_full() {
            let (pending, limit) = (entry.calls.pending(), entry.max_pending_calls);
            return Err(WorkerError::PendingCallsLimit { pending, limit });
        }
        let task_id = self.0.new_task_id(Some(actor));
        let retries = template.message.max_retries;
        self.submit(
            &mut state,
            template,
            task_id,
            values,
            arguments.references,
            parent,
            Some(actor),
            retries,
        )
    }

    /// Small pickles travel with the call; a large one becomes an object of its own.
    pub(crate) fn place_arguments(&self, values: Option<Serialized>, parent: TaskId) -> Result<Placed, WorkerError> {
        let Some(values) = values else {
            return Ok(Placed {
                values: None,
                reference: None,
                contained: Vec::new(),
            });
        };
        let contained = values.contained.clone();
        if values.size() <= ray_wire::INLINE_LIMIT_BYTES {
            return Ok(Placed {
                values: Some(values.into_inline()),
                reference: None,
                contained,
            });
        }
        let reference = self.put_serialized(values, parent)?;
        Ok(Placed {
            values: None,
            reference: Some(reference),
            contained: Vec::new(),
        })
    }

    #[allow(clippy::too_many_arguments)]
    fn submit(
        &self,
        state: &mut State,
        template: &Arc<Template>,
        task_id: TaskId,
        placed: Placed,
        references: Vec<PassedReference>,
        parent: TaskId,
        actor: Option<ActorId>,
        retries: i32,
    ) -> Result<Submitted, WorkerError> {
        let spec = self
            .0
            .make_spec(state, template, task_id, placed, references, parent, actor);
        let count = spec.returns();
        let mut handed_out = Vec::with_capacity(count as usize);
        for index in 0..count {
            let id = spec.return_id(index);
            let slot = Slot::pending();
            state.refs.own(id, slot.clone());
            handed_out.push(Reference {
                id,
                slot,
                core: self.0.clone(),
            });
        }
        let streaming = template.message.num_returns == NUM_RETURNS_STREAMING;
        let stream = (template.message.num_returns < 0).then(|| {
            Stream::new(
                self.0.clone(),
                task_id,
                template.message.generator_backpressure,
                streaming,
            )
        });
        if let Some(stream) = &stream {
            state.streams.insert(task_id, stream.clone());
        }
        self.0.start(state, spec, 0, retries);
        match stream {
            Some(stream) if streaming => {
                if let Some(completed) = handed_out.pop() {
                    stream.set_completed(completed);
                }
                Ok(Submitted::Stream(stream))
            }
            _ => Ok(Submitted::References(handed_out)),
        }
    }
}

/// Arguments in their places.
pub(crate) struct Placed {
    pub values: Option<InlineValue>,
    pub reference: Option<Reference>,
    pub contained: Vec<Contained>,
}

impl Inner {
    #[allow(clippy::too_many_arguments)]
    pub fn make_spec(
        &self,
        state: &mut State,
        template: &Arc<Template>,
        task_id: TaskId,
        placed: Placed,
        references: Vec<PassedReference>,
        parent: TaskId,
        actor: Option<ActorId>,
    ) -> Arc<TaskSpec> {
        let count = references.len()
            + placed.contained.len()
            + usize::from(placed.reference.is_some())
            + usize::from(actor.is_some());
        let mut pinned: Vec<ObjectId> = Vec::with_capacity(count);
        pinned.extend(references.iter().map(|reference| reference.object));
        pinned.extend(placed.contained.iter().map(|contained| contained.object));
        pinned.extend(placed.reference.iter().map(|reference| reference.id));
        if let Some(actor) = actor {
            // A call keeps its actor in scope until it is answered.
            pinned.push(crate::actors::handle_object(actor));
        }
        for object in &pinned {
            state.refs.add_submitted(object);
        }
        Arc::new(TaskSpec {
            task_id,
            template: template.clone(),
            values: placed.values.map(Box::new),
            values_reference: placed.reference.as_ref().map(|reference| Box::new(reference.id)),
            references: references.into_boxed_slice(),
            pinned: pinned.into_boxed_slice(),
            parent,
            depth: self.execution.depth() + 1,
            actor,
        })
    }

    /// Begins a call, or begins it again to make lost objects.
    pub fn start(&self, state: &mut State, spec: Arc<TaskSpec>, attempt: u32, retries_left: i32) {
        let task_id = spec.task_id;
        let mut unresolved = 0;
        let dependencies: Vec<ObjectId> = spec.dependencies().copied().collect();
        for object in dependencies {
            if self.await_value(state, object, Wake::Task(task_id)) {
                unresolved += 1;
            }
        }
        let ready = unresolved == 0;
        let task = PendingTask::new(spec, unresolved, attempt, retries_left);
        let (actor, group) = (task.spec.actor, task.spec.template.message.concurrency_group.clone());
        state.tasks.insert(task_id, task);
        match actor {
            Some(actor) => {
                let mut commands = Vec::new();
                if let Some(entry) = state.actors.get_mut(&actor) {
                    entry.calls.submit(task_id, &group, ready, retries_left, &mut commands);
                }
                self.carry_out_actor(state, actor, commands);
            }
            None if ready => self.enqueue(state, task_id),
            None => {}
        }
    }

    /// Registers a wake-up for the object's value; asks its owner where nobody has. Returns false where it is known.
    pub fn await_value(&self, state: &mut State, object: ObjectId, wake: Wake) -> bool {
        let Some(slot) = state.refs.get(&object).map(|entry| entry.value.clone()) else {
            return false;
        };
        if slot.is_ready() {
            self.rebuild_if_lost(state, object, &slot);
        }
        if !slot.add_wake(wake) {
            return false;
        }
        self.ask_owner_once(state, object, &slot);
        true
    }

    /// A wake-up for a call: one of its arguments is there.
    pub fn argument_arrived(&self, state: &mut State, task_id: TaskId) {
        let Some(task) = state.tasks.get_mut(&task_id) else {
            return;
        };
        task.unresolved = task.unresolved.saturating_sub(1);
        if task.unresolved == 0 {
            state.ready.push_back(task_id);
        }
    }

    /// Sends on every call whose arguments have come.
    pub fn run_ready(&self, state: &mut State) {
        while let Some(task_id) = state.ready.pop_front() {
            let Some(task) = state.tasks.get(&task_id) else {
                continue;
            };
            if let Some(actor) = task.spec.actor {
                let group = task.spec.template.message.concurrency_group.clone();
                let mut commands = Vec::new();
                if let Some(entry) = state.actors.get_mut(&actor) {
                    entry.calls.ready(task_id, &group, &mut commands);
                }
                self.carry_out_actor(state, actor, commands);
            } else if task_id == TaskId::for_actor_creation(task_id.actor_id()) && task_id.has_actor() {
                self.register_created_actor(state, task_id);
            } else {
                self.enqueue(state, task_id);
            }
        }
    }

    /// The node that holds most of a call's stored arguments.
    fn preferred_node(&self, state: &State, spec: &TaskSpec) -> Option<NodeId> {
        if spec.references.is_empty() || state.nodes.len() < 2 {
            return None;
        }
        let mut bytes_on: Vec<(NodeId, u64)> = Vec::new();
        for object in spec.dependencies() {
            let Some(entry) = state.refs.get(object) else { continue };
            let SlotValue::Stored { bytes, locations } = entry.value.value() else {
                continue;
            };
            let told = locations.iter().flat_map(|locations| locations.iter()).map(node_of);
            for node in entry.locations().iter().copied().chain(told) {
                match bytes_on.iter_mut().find(|(other, _)| *other == node) {
                    Some((_, sum)) => *sum += bytes,
                    None => bytes_on.push((node, bytes)),
                }
            }
        }
        bytes_on
            .into_iter()
            .max_by_key(|(_, bytes)| *bytes)
            .map(|(node, _)| node)
    }

    /// A plain call's arguments are there: it waits for a lease.
    pub fn enqueue(&self, state: &mut State, task_id: TaskId) {
        let Some(task) = state.tasks.get(&task_id) else { return };
        if let Some(failure) = self.failed_argument(state, &task.spec) {
            return self.finish_with(state, task_id, failure);
        }
        let spec = &state.tasks[&task_id].spec;
        let preferred = self.preferred_node(state, spec);
        let (class, pipelined) = (spec.template.class, spec.template.pipelined);
        let mut commands = Vec::new();
        state
            .leases
            .submit(task_id, class, pipelined, preferred, self.now_ms(), &mut commands);
        self.carry_out_leases(state, commands);
    }

    /// An argument that is a failure fails the call.
    pub(crate) fn failed_argument(&self, state: &State, spec: &TaskSpec) -> Option<Arc<InlineValue>> {
        spec.dependencies()
            .find_map(|object| match state.refs.get(object)?.value.value() {
                SlotValue::Inline(value) if value.is_failure() => Some(value),
                _ => None,
            })
    }
}
