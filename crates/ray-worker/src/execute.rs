//! Executing: the queue of what was pushed here, leases, replies, blocking and cancellation.
//!
//! Invariants:
//! 1. A call runs only under the worker's current lease, or, in an actor, for its present incarnation; others are refused
//!    and not started.
//! 2. Before user code of a lease's call runs, its sequence is in the evidence word.
//! 3. A plain task that waits holds no unstarted call of its owner: they go back first.
//! 4. A reply leaves after what its returns contain is held and what the worker keeps is listed.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, OnceLock};
use std::thread::ThreadId;
use std::time::{Duration, Instant};

use bytes::Bytes;
use ray_ids::{ActorId, JobId, LeaseId, ObjectId, TaskId, WorkerId};
use ray_rpc::{Link, WaitOutcome, Waiter};
use ray_wire::{
    id_bytes, kinds, ActorCreated, ActorCreation, Address, CancelTask, CreateActor, DeathCause, ExitProcess,
    GeneratorItem, LeaseAssigned, PushTask, ReferenceArgument, RetainedBorrow, ReturnValue, TaskReply, TaskTemplate,
    TasksRecalled, WorkerBlocked, WorkerExiting, WorkerUnblocked, REPLY_CANCELLED, REPLY_EXCEPTION, REPLY_OK,
    REPLY_STALE_INCARNATION, REPLY_STALE_LEASE, REPLY_UNKNOWN_TEMPLATE,
};
use rustc_hash::FxHashMap;

use crate::gcs::{interrupted, WAIT_SLICE};
use crate::generators::item_id;
use crate::inner::{CoreWorker, Inner, Reference};
use crate::links::link_state;
use crate::slot::{lock, Group, SlotValue};
use crate::value::{Contained, InlineValue, Serialized, Value};
use crate::WorkerError;

/// How long a call may wait for the lease that it names.
const EARLY_LIMIT: Duration = Duration::from_secs(5);
/// Templates remembered per link before they are forgotten and asked for again.
const MAX_TEMPLATES: usize = 10_000;
/// Leases remembered, so that calls under them are known to be stale.
const PAST_LEASES: usize = 64;

/// One argument that is a reference.
#[derive(Debug)]
pub struct ArgumentReference {
    pub index: u32,
    pub keyword: String,
    pub object: ObjectId,
    pub owner: Address,
    pub value: Option<InlineValue>,
    pub locations: Vec<Address>,
}

/// A call to run here.
#[derive(Debug)]
pub struct Incoming {
    pub task_id: TaskId,
    pub parent: TaskId,
    pub template: Arc<TaskTemplate>,
    pub values: Option<InlineValue>,
    pub values_reference: Option<ArgumentReference>,
    pub references: Vec<ArgumentReference>,
    pub caller: Address,
    pub caller_id: WorkerId,
    pub attempt: u32,
    pub depth: u32,
    pub sequence: u64,
    pub lease: Option<LeaseId>,
    pub watermark: u64,
    /// Set where the call makes this worker an actor.
    pub creation: Option<Box<ActorCreation>>,
    pub incarnation: u64,
    link: Arc<Link>,
    correlation: u64,
    items: GeneratorProgress,
}

impl Incoming {
    /// The object of one return.
    pub fn return_id(&self, index: u32) -> ObjectId {
        ObjectId::of(self.task_id, index + 1)
    }

    /// The object of one item of a generator.
    pub fn item_id(&self, index: u64) -> ObjectId {
        item_id(self.task_id, index)
    }

    /// How many values the call returns; a generator's own return is one.
    pub fn returns(&self) -> u32 {
        if self.template.num_returns < 0 {
            1
        } else {
            self.template.num_returns as u32
        }
    }
}

/// What the consumer of a generator has taken.
#[derive(Debug, Default)]
struct GeneratorProgress {
    state: Arc<Mutex<ProgressState>>,
}

#[derive(Debug, Default)]
struct ProgressState {
    sent: u64,
    consumed: u64,
    abandoned: bool,
    waiting: Option<Arc<Group>>,
}

/// What the main thread does next.
#[derive(Debug)]
pub enum Work {
    /// Run this.
    Task(Arc<Incoming>),
    /// A lease begins: devices, job and environment.
    Lease(Box<LeaseAssigned>),
    /// Cancel what runs on another thread or event loop.
    Cancel(TaskId),
    /// Leave.
    Exit(String),
}

/// How a call ended.
#[derive(Debug)]
pub enum Outcome {
    Returns(Vec<Serialized>),
    Exception { value: Serialized, retryable: bool },
    Cancelled,
}

#[derive(Debug, Default)]
struct ExecutionState {
    work: VecDeque<Work>,
    lease: Option<LeaseId>,
    past_leases: VecDeque<LeaseId>,
    early: Vec<(Instant, Arc<Incoming>)>,
    actor: Option<(ActorId, u64)>,
    /// The actor's owner and the description of its methods.
    actor_origin: Option<(Address, Bytes)>,
    running: FxHashMap<TaskId, bool>,
    progress: FxHashMap<TaskId, Arc<Mutex<ProgressState>>>,
    calls: FxHashMap<Bytes, u32>,
    exiting: Option<String>,
    assigned: Option<Box<LeaseAssigned>>,
    main_task: Option<TaskId>,
    blocked: u32,
}

/// What was pushed to this worker.
#[derive(Debug, Default)]
pub(crate) struct ExecutionQueue {
    state: Mutex<ExecutionState>,
    waiter: Waiter,
    depth: AtomicU32,
    main_thread: OnceLock<(ThreadId, libc::pthread_t)>,
}

// SAFETY: a `pthread_t` names a thread; it is only used to signal it while the process lives.
unsafe impl Sync for ExecutionQueue {}
// SAFETY: as above.
unsafe impl Send for ExecutionQueue {}

impl ExecutionQueue {
    pub fn new() -> Self {
        Self::default()
    }

    /// Depth of the task that runs here; 0 in a driver.
    pub fn depth(&self) -> u32 {
        self.depth.load(Ordering::Relaxed)
    }

    /// The current lease as a message says it.
    pub fn current_lease_bytes(&self) -> Bytes {
        lock(&self.state)
            .lease
            .map(|lease| id_bytes(lease.as_bytes()))
            .unwrap_or_default()
    }

    fn push(&self, work: Work) {
        lock(&self.state).work.push_back(work);
        self.waiter.notify();
    }

    fn is_main_thread(&self) -> bool {
        self.main_thread
            .get()
            .is_some_and(|(thread, _)| *thread == std::thread::current().id())
    }
}

/// The node is gone: whatever runs here runs again elsewhere, so that nothing may go on, not even a subprocess.
pub(crate) fn end_with_node() -> ! {
    // SAFETY: signals and ends this process and, where it leads a group of its own, the group; nothing is needed any more.
    unsafe {
        if libc::getpgrp() == libc::getpid() {
            libc::kill(0, libc::SIGKILL);
        }
        libc::_exit(1)
    }
}

fn argument(message: ReferenceArgument, payload: &mut Bytes) -> Result<ArgumentReference, WorkerError> {
    let info = message.reference.unwrap_or_default();
    let passed = Contained::from_info(&info)?;
    let value = match &message.value {
        Some(layout) => Some(InlineValue::take(layout, payload, false)?),
        None => None,
    };
    Ok(ArgumentReference {
        index: message.index,
        keyword: message.keyword,
        object: passed.object,
        owner: passed.owner,
        value,
        locations: message.locations,
    })
}

impl Inner {
    fn incoming(
        &self,
        link: &Arc<Link>,
        correlation: u64,
        push: PushTask,
        mut payload: Bytes,
        template: Arc<TaskTemplate>,
    ) -> Result<Incoming, WorkerError> {
        let values = match &push.values {
            Some(layout) => Some(InlineValue::take(layout, &mut payload, false)?),
            None => None,
        };
        let values_reference = push
            .values_reference
            .map(|reference| argument(reference, &mut payload))
            .transpose()?;
        let references: Vec<ArgumentReference> = push
            .references
            .into_iter()
            .map(|reference| argument(reference, &mut payload))
            .collect::<Result<_, _>>()?;
        let caller = link_state(link).peer.get().cloned().unwrap_or_default();
        let lease = match push.lease_id.is_empty() {
            true => None,
            false => Some(LeaseId::from_binary(&push.lease_id).map_err(ray_wire::WireError::from)?),
        };
        Ok(Incoming {
            task_id: TaskId::from_binary(&push.task_id).map_err(ray_wire::WireError::from)?,
            parent: TaskId::from_binary(&push.parent_task_id).unwrap_or(TaskId::NIL),
            template,
            values,
            values_reference,
            references,
            caller_id: caller.worker().unwrap_or(WorkerId::NIL),
            caller,
            attempt: push.attempt,
            depth: push.depth,
            sequence: push.sequence,
            lease,
            watermark: push.generator_watermark,
            creation: None,
            incarnation: push.actor_incarnation,
            link: link.clone(),
            correlation,
            items: GeneratorProgress::default(),
        })
    }

    /// A call was pushed here.
    pub fn on_push_task(
        &self,
        link: &Arc<Link>,
        correlation: u64,
        mut push: PushTask,
        payload: Bytes,
    ) -> Result<(), WorkerError> {
        let template = {
            let mut templates = lock(&link_state(link).received_templates);
            match push.template.take() {
                Some(template) => {
                    if templates.len() >= MAX_TEMPLATES {
                        templates.clear();
                    }
                    let template = Arc::new(template);
                    templates.insert(push.template_id, template.clone());
                    Some(template)
                }
                None => templates.get(&push.template_id).cloned(),
            }
        };
        let Some(template) = template else {
            return self.refuse(
                link,
                correlation,
                REPLY_UNKNOWN_TEMPLATE,
                "that template is not known on this link",
            );
        };
        let incoming = Arc::new(self.incoming(link, correlation, push, payload, template)?);
        let mut state = lock(&self.execution.state);
        let refusal = match incoming.lease {
            Some(lease) if state.lease == Some(lease) => None,
            Some(lease) if state.past_leases.contains(&lease) => Some((REPLY_STALE_LEASE, "the lease is over")),
            Some(_) => {
                // Its assignment is on the way over another link.
                state.early.push((Instant::now(), incoming));
                return Ok(());
            }
            None => match state.actor {
                Some((_, incarnation)) if incarnation == incoming.incarnation => None,
                _ => Some((
                    REPLY_STALE_INCARNATION,
                    "this process is not that incarnation of the actor",
                )),
            },
        };
        if state.exiting.is_some() && refusal.is_none() {
            drop(state);
            let status = if incoming.lease.is_some() {
                REPLY_STALE_LEASE
            } else {
                REPLY_STALE_INCARNATION
            };
            return self.refuse(link, correlation, status, "the worker leaves");
        }
        if let Some((status, reason)) = refusal {
            drop(state);
            return self.refuse(link, correlation, status, reason);
        }
        self.admit(&mut state, incoming);
        drop(state);
        self.execution.waiter.notify();
        Ok(())
    }

    fn admit(&self, state: &mut ExecutionState, incoming: Arc<Incoming>) {
        if incoming.template.num_returns < 0 {
            state.progress.insert(incoming.task_id, incoming.items.state.clone());
        }
        state.work.push_back(Work::Task(incoming));
    }

    fn refuse(&self, link: &Arc<Link>, correlation: u64, status: u32, reason: &str) -> Result<(), WorkerError> {
        let reply = TaskReply {
            status,
            message: reason.into(),
            ..TaskReply::default()
        };
        link.send(kinds::TASK_REPLY, correlation, ray_wire::encode(&reply), &[])?;
        Ok(())
    }

    /// The raylet says whose calls are accepted from now on.
    pub fn on_lease_assigned(&self, assigned: LeaseAssigned) -> Result<(), WorkerError> {
        let lease = match assigned.lease_id.is_empty() {
            true => None,
            false => Some(LeaseId::from_binary(&assigned.lease_id).map_err(ray_wire::WireError::from)?),
        };
        if let Ok(job) = JobId::from_binary(&assigned.job_id) {
            if !job.is_nil() {
                let _ = self.job_id.set(job);
            }
        }
        let mut refused = Vec::new();
        {
            let mut state = lock(&self.execution.state);
            if let Some(past) = std::mem::replace(&mut state.lease, lease) {
                if Some(past) != lease {
                    state.past_leases.push_back(past);
                    if state.past_leases.len() > PAST_LEASES {
                        state.past_leases.pop_front();
                    }
                }
            }
            let (stale, kept): (VecDeque<Work>, VecDeque<Work>) = std::mem::take(&mut state.work)
                .into_iter()
                .partition(|work| matches!(work, Work::Task(task) if task.lease.is_some() && task.lease != lease));
            state.work = kept;
            refused.extend(stale.into_iter().filter_map(|work| match work {
                Work::Task(task) => Some(task),
                _ => None,
            }));
            if lease.is_some() {
                state.assigned = Some(Box::new(assigned.clone()));
                state.work.push_back(Work::Lease(Box::new(assigned)));
            }
            for (since, incoming) in std::mem::take(&mut state.early) {
                if incoming.lease == lease {
                    self.admit(&mut state, incoming);
                } else if since.elapsed() > EARLY_LIMIT {
                    refused.push(incoming);
                } else {
                    state.early.push((since, incoming));
                }
            }
        }
        for incoming in refused {
            self.refuse(
                &incoming.link,
                incoming.correlation,
                REPLY_STALE_LEASE,
                "the lease is over",
            )?;
        }
        self.execution.waiter.notify();
        Ok(())
    }

    /// The raylet has this worker become an actor.
    pub fn on_create_actor(&self, link: &Arc<Link>, correlation: u64, message: CreateActor) -> Result<(), WorkerError> {
        let mut creation = message.creation.unwrap_or_default();
        let mut call = creation.call.take().unwrap_or_default();
        let template = Arc::new(call.template.take().unwrap_or_default());
        let actor = ActorId::from_binary(&message.actor_id).map_err(ray_wire::WireError::from)?;
        let _ = self.job_id.set(actor.job_id());
        let payload = std::mem::take(&mut creation.payload);
        let owner = creation.owner.clone().unwrap_or_default();
        let mut incoming = self.incoming(link, correlation, call, payload, template)?;
        incoming.caller_id = owner.worker().unwrap_or(WorkerId::NIL);
        incoming.caller = owner;
        incoming.creation = Some(Box::new(creation));
        incoming.incarnation = message.incarnation;
        {
            let mut state = lock(&self.execution.state);
            state.actor = Some((actor, message.incarnation));
            let metadata = incoming
                .creation
                .as_ref()
                .map(|creation| creation.handle_metadata.clone());
            state.actor_origin = Some((incoming.caller.clone(), metadata.unwrap_or_default()));
            let mut assigned = state.assigned.take().unwrap_or_default();
            assigned.job_config_json.clone_from(&message.job_config_json);
            assigned.job_id = id_bytes(actor.job_id().as_bytes());
            state.assigned = Some(assigned.clone());
            state.work.push_back(Work::Lease(assigned));
            state.work.push_back(Work::Task(Arc::new(incoming)));
        }
        self.execution.waiter.notify();
        Ok(())
    }

    /// Gives back calls that have not started. `lease`: only those under it.
    pub fn give_back(&self, lease: Option<LeaseId>) {
        let mut back: Vec<Arc<Incoming>> = Vec::new();
        {
            let mut state = lock(&self.execution.state);
            let (returned, kept): (VecDeque<Work>, VecDeque<Work>) =
                std::mem::take(&mut state.work).into_iter().partition(|work| {
                    matches!(work, Work::Task(task) if task.lease.is_some() && (lease.is_none() || task.lease == lease))
                });
            state.work = kept;
            for work in returned {
                if let Work::Task(task) = work {
                    state.progress.remove(&task.task_id);
                    back.push(task);
                }
            }
        }
        let mut by_link: Vec<(Arc<Link>, TasksRecalled)> = Vec::new();
        for task in back {
            match by_link.iter_mut().find(|(link, _)| link.id() == task.link.id()) {
                Some((_, message)) => message.correlations.push(task.correlation),
                None => by_link.push((
                    task.link.clone(),
                    TasksRecalled {
                        correlations: vec![task.correlation],
                    },
                )),
            }
        }
        for (link, message) in by_link {
            let _ = link.send(kinds::TASKS_RECALLED, 0, ray_wire::encode(&message), &[]);
        }
    }

    /// The owner asks for what has not started; an answer goes out in any case.
    pub fn on_recall(&self, link: &Arc<Link>, lease: LeaseId) {
        self.give_back(Some(lease));
        let _ = link.send(
            kinds::TASKS_RECALLED,
            0,
            ray_wire::encode(&TasksRecalled::default()),
            &[],
        );
    }

    /// The caller wants a call given up.
    pub fn on_cancel_task(&self, message: &CancelTask) -> Result<(), WorkerError> {
        let task_id = TaskId::from_binary(&message.task_id).map_err(ray_wire::WireError::from)?;
        let mut state = lock(&self.execution.state);
        let queued = state
            .work
            .iter()
            .position(|work| matches!(work, Work::Task(task) if task.task_id == task_id));
        if let Some(Work::Task(task)) = queued.and_then(|at| state.work.remove(at)) {
            drop(state);
            return self.refuse(
                &task.link,
                task.correlation,
                REPLY_CANCELLED,
                "cancelled before it started",
            );
        }
        let on_main = state.main_task == Some(task_id);
        let Some(cancelled) = state.running.get_mut(&task_id) else {
            return Ok(());
        };
        *cancelled = true;
        if message.force {
            drop(state);
            let cause = DeathCause {
                kind: ray_wire::DEATH_KILLED,
                message: "the task was cancelled with force=True".into(),
                exit_code: Some(1),
                pid: std::process::id(),
                ..DeathCause::default()
            };
            let _ = self.raylet.send(
                kinds::WORKER_EXITING,
                0,
                ray_wire::encode(&WorkerExiting { cause: Some(cause) }),
                &[],
            );
            self.raylet.flush();
            // SAFETY: leaves at once, as the caller demands; nothing of this process is needed any more.
            unsafe { libc::_exit(1) };
        }
        if on_main {
            if let Some((_, thread)) = self.execution.main_thread.get() {
                // SAFETY: the main thread lives as long as the process.
                unsafe { libc::pthread_kill(*thread, libc::SIGINT) };
            }
        } else {
            state.work.push_front(Work::Cancel(task_id));
            drop(state);
            self.execution.waiter.notify();
        }
        Ok(())
    }

    /// The consumer of a generator took items, or is gone.
    pub fn on_generator_consumed(&self, task: TaskId, consumed: u64, abandoned: bool) {
        let Some(progress) = lock(&self.execution.state).progress.get(&task).cloned() else {
            return;
        };
        let mut progress = lock(&progress);
        progress.consumed = progress.consumed.max(consumed);
        progress.abandoned |= abandoned;
        if let Some(group) = progress.waiting.take() {
            group.arrive();
        }
    }

    /// A process's link is gone: what it pushed and has not started is nobody's.
    pub fn drop_calls_of(&self, link: &Arc<Link>) {
        let mut state = lock(&self.execution.state);
        state
            .work
            .retain(|work| !matches!(work, Work::Task(task) if task.creation.is_none() && task.link.id() == link.id()));
        state.early.retain(|(_, task)| task.link.id() != link.id());
    }

    /// This process is to leave.
    pub fn on_exit_process(&self, message: &ExitProcess) {
        if message.force {
            // SAFETY: leaves at once, as the raylet demands.
            unsafe { libc::_exit(1) };
        }
        lock(&self.execution.state)
            .exiting
            .get_or_insert_with(|| message.reason.clone());
        self.execution.push(Work::Exit(message.reason.clone()));
    }

    /// A thread is about to wait. A plain task on the main thread frees its CPU and gives back what it has not started.
    pub fn blocked(&self, what: &str) -> Blocked<'_> {
        let lease = {
            let state = lock(&self.execution.state);
            let plain = state.actor.is_none() && state.main_task.is_some() && self.execution.is_main_thread();
            state.lease.filter(|_| plain)
        };
        let Some(lease) = lease else {
            return Blocked {
                core: self,
                lease: None,
            };
        };
        let first = {
            let mut state = lock(&self.execution.state);
            state.blocked += 1;
            state.blocked == 1
        };
        if !first {
            lock(&self.execution.state).blocked -= 1;
            return Blocked {
                core: self,
                lease: None,
            };
        }
        self.give_back(None);
        let message = WorkerBlocked {
            lease_id: id_bytes(lease.as_bytes()),
            reason: what.into(),
        };
        let _ = self
            .raylet
            .send(kinds::WORKER_BLOCKED, 0, ray_wire::encode(&message), &[]);
        Blocked {
            core: self,
            lease: Some(lease),
        }
    }
}

/// While it lives, this worker's CPU is free.
pub(crate) struct Blocked<'a> {
    core: &'a Inner,
    lease: Option<LeaseId>,
}

impl Drop for Blocked<'_> {
    fn drop(&mut self) {
        if let Some(lease) = self.lease {
            lock(&self.core.execution.state).blocked -= 1;
            let message = WorkerUnblocked {
                lease_id: id_bytes(lease.as_bytes()),
            };
            let _ = self
                .core
                .raylet
                .send(kinds::WORKER_UNBLOCKED, 0, ray_wire::encode(&message), &[]);
        }
    }
}

impl CoreWorker {
    /// Makes the calling thread the one that runs work.
    pub fn begin_execution(&self) {
        // SAFETY: asks for the calling thread's own name.
        let thread = unsafe { libc::pthread_self() };
        let _ = self.0.execution.main_thread.set((std::thread::current().id(), thread));
    }

    /// What to do next; waits for it. `None` after a signal, so that the language can look at it.
    pub fn next_work(&self) -> Option<Work> {
        loop {
            {
                let mut state = lock(&self.0.execution.state);
                if let Some(work) = state.work.pop_front() {
                    if let Work::Task(task) = &work {
                        state.running.insert(task.task_id, false);
                    }
                    return Some(work);
                }
                if self.0.shut_down.load(Ordering::Acquire) {
                    return Some(Work::Exit("the runtime was shut down".into()));
                }
            }
            if let Some(reason) = &self.0.lock().raylet_gone {
                return Some(Work::Exit(format!("the raylet is gone: {reason}")));
            }
            match self
                .0
                .reactor
                .wait(&self.0.execution.waiter, Some(Instant::now() + 10 * WAIT_SLICE))
            {
                WaitOutcome::Interrupted if interrupted() => return None,
                WaitOutcome::Stopped => return Some(Work::Exit("the runtime was stopped".into())),
                _ => {}
            }
        }
    }

    /// User code of the call begins, on the main thread or elsewhere. False: it was cancelled before.
    #[must_use]
    pub fn starting(&self, task: &Incoming, on_main: bool) -> bool {
        self.0.execution.depth.store(task.depth, Ordering::Relaxed);
        if let Some(evidence) = self.0.evidence.get().filter(|_| task.lease.is_some()) {
            evidence.starting(task.sequence);
        }
        let mut state = lock(&self.0.execution.state);
        if state.running.get(&task.task_id).copied().unwrap_or(false) {
            return false;
        }
        if on_main {
            state.main_task = Some(task.task_id);
        }
        true
    }

    /// User code on the main thread is over: an interrupt that comes now is too late.
    pub fn user_code_ended(&self) {
        lock(&self.0.execution.state).main_task = None;
    }

    /// Whether a signal on the main thread is a cancellation of what runs there.
    pub fn is_interrupt_wanted(&self) -> bool {
        let state = lock(&self.0.execution.state);
        state
            .main_task
            .is_some_and(|task| state.running.get(&task).copied().unwrap_or(false))
    }

    /// Whether the call was cancelled while it ran.
    pub fn is_cancelled(&self, task: &TaskId) -> bool {
        lock(&self.0.execution.state)
            .running
            .get(task)
            .copied()
            .unwrap_or(false)
    }

    /// Leaves after what runs now.
    pub fn exit_after_call(&self, reason: &str) {
        lock(&self.0.execution.state).exiting = Some(reason.to_owned());
    }

    /// Whether the worker is to leave.
    pub fn is_exiting(&self) -> Option<String> {
        lock(&self.0.execution.state).exiting.clone()
    }

    /// The lease's resources, instances and job, as the raylet last said.
    pub fn assigned(&self) -> Option<LeaseAssigned> {
        lock(&self.0.execution.state).assigned.as_deref().cloned()
    }

    /// The actor that this worker is, with its incarnation.
    pub fn actor(&self) -> Option<(ActorId, u64)> {
        lock(&self.0.execution.state).actor
    }

    /// A counted handle to the actor that this worker is, and the description of its methods.
    pub fn own_actor_handle(&self) -> Result<(ActorId, Reference, Bytes), WorkerError> {
        let (actor, origin) = {
            let state = lock(&self.0.execution.state);
            (state.actor, state.actor_origin.clone())
        };
        let (Some((actor, _)), Some((owner, metadata))) = (actor, origin) else {
            return Err(WorkerError::Invalid("this process is no actor".into()));
        };
        let reference = self.receive_reference(crate::actors::handle_object(actor), &owner, None, None)?;
        Ok((actor, reference, metadata))
    }

    /// The value of an argument, and the reference that keeps it while the call runs.
    pub fn resolve_argument(
        &self,
        task: &Incoming,
        argument: &ArgumentReference,
    ) -> Result<(Value, Option<Reference>), crate::GetFailure> {
        if let Some(value) = &argument.value {
            return Ok((Value::Inline(Arc::new(value.clone())), None));
        }
        let reference = self.receive_reference(argument.object, &argument.owner, Some(task.task_id), None)?;
        if !argument.locations.is_empty() && !reference.slot.is_ready() {
            let mut state = self.0.enter()?;
            for location in &argument.locations {
                self.0.note_address(&mut state, location);
            }
            let stored = SlotValue::Stored {
                bytes: 0,
                locations: argument.locations.clone(),
            };
            let wakes = self.0.set_value(&mut state, argument.object, stored);
            self.0.deliver(&mut state, wakes);
        }
        let value = self.get(&[&reference], None)?.pop();
        value
            .map(|value| (value, Some(reference)))
            .ok_or_else(|| crate::GetFailure::Worker(WorkerError::UnknownObject(argument.object.hex())))
    }

    /// Sends one item of a generator, waiting while its consumer is too far behind. False: the consumer is gone.
    pub fn send_item(&self, task: &Incoming, index: u64, value: Serialized) -> Result<bool, WorkerError> {
        let backpressure = u64::from(task.template.generator_backpressure);
        loop {
            let group = Group::new(1);
            {
                let mut progress = lock(&task.items.state);
                if progress.abandoned {
                    return Ok(false);
                }
                if backpressure == 0 || index < progress.consumed + backpressure {
                    progress.sent = index + 1;
                    break;
                }
                progress.waiting = Some(group.clone());
            }
            if self.is_cancelled(&task.task_id) {
                return Ok(false);
            }
            let slice = Instant::now() + WAIT_SLICE;
            match self.0.wait_for(&group.waiter, Some(slice), "the consumer", || {
                group.is_done().then_some(())
            }) {
                Ok(()) | Err(WorkerError::Timeout { .. }) if task.link.is_open() => {}
                Ok(()) | Err(WorkerError::Timeout { .. }) => return Ok(false),
                Err(error) => return Err(error),
            }
        }
        if index < task.watermark {
            return Ok(true);
        }
        let object = task.item_id(index);
        let (item, payload) = self.return_value(task, object, value)?;
        let message = GeneratorItem {
            task_id: id_bytes(task.task_id.as_bytes()),
            index,
            item: Some(item),
            attempt: task.attempt,
        };
        task.link.send(
            kinds::GENERATOR_ITEM,
            task.correlation,
            ray_wire::encode(&message),
            &payload,
        )?;
        Ok(true)
    }

    /// How many items were sent.
    pub fn items_sent(&self, task: &Incoming) -> u64 {
        lock(&task.items.state).sent
    }

    /// One return in its place: inline, or in the store for the caller; what it contains is held.
    fn return_value(
        &self,
        task: &Incoming,
        object: ObjectId,
        value: Serialized,
    ) -> Result<(ReturnValue, Vec<Bytes>), WorkerError> {
        let inner: Vec<ObjectId> = value.contained.iter().map(|contained| contained.object).collect();
        let mut payload = Vec::new();
        let returned = if value.size() <= ray_wire::INLINE_LIMIT_BYTES {
            let value = value.into_inline();
            value.append(&mut payload);
            ReturnValue {
                value: Some(value.layout()),
                object_id: id_bytes(object.as_bytes()),
                ..ReturnValue::default()
            }
        } else {
            let bytes = self.0.write_to_store(object, &value, task.caller_id)?;
            ReturnValue {
                stored_bytes: bytes,
                contained: value.contained.iter().map(Contained::info).collect(),
                object_id: id_bytes(object.as_bytes()),
                ..ReturnValue::default()
            }
        };
        if !inner.is_empty() {
            let mut state = self.0.enter()?;
            let mut commands = Vec::new();
            self.0.note_address(&mut state, &task.caller);
            state
                .refs
                .hold_return(task.task_id, task.caller_id, &inner, &mut commands);
            self.0.carry_out_references(&mut state, commands);
        }
        Ok((returned, payload))
    }

    /// Answers a call. An error means that no answer was sent yet: answer again with an exception.
    pub fn reply(&self, task: &Incoming, outcome: Outcome) -> Result<(), WorkerError> {
        if task.creation.is_some() {
            return self.reply_creation(task, outcome);
        }
        let mut reply = TaskReply::default();
        let mut payload = Vec::new();
        match outcome {
            Outcome::Returns(values) => {
                for (index, value) in values.into_iter().enumerate() {
                    reply.wants_acknowledgement |= !value.contained.is_empty();
                    let (returned, segments) = self.return_value(task, task.return_id(index as u32), value)?;
                    reply.returns.push(returned);
                    payload.extend(segments);
                }
                reply.status = REPLY_OK;
            }
            Outcome::Exception { value, retryable } => {
                for index in 0..task.returns() {
                    let (returned, segments) = self.return_value(task, task.return_id(index), value.clone())?;
                    reply.returns.push(returned);
                    payload.extend(segments);
                }
                reply.wants_acknowledgement = !value.contained.is_empty();
                reply.status = REPLY_EXCEPTION;
                reply.retryable = retryable;
            }
            Outcome::Cancelled => reply.status = REPLY_CANCELLED,
        }
        reply.generator_items = self.items_sent(task);
        reply.wants_acknowledgement |= task.template.num_returns < 0 && reply.generator_items > 0;
        reply.retained = self.end_cover(task);
        let more = self.end_execution(task, &mut reply);
        if more {
            task.link.cork();
        }
        let sent = task
            .link
            .send(kinds::TASK_REPLY, task.correlation, ray_wire::encode(&reply), &payload);
        if !more {
            task.link.uncork();
        }
        if let Err(error) = sent {
            // The caller is gone, and with it whoever wanted the answer.
            tracing::debug!("an answer could not be sent: {error}");
        }
        Ok(())
    }

    /// What of the call's borrows this worker keeps.
    fn end_cover(&self, task: &Incoming) -> Vec<RetainedBorrow> {
        let Ok(mut state) = self.0.enter() else {
            return Vec::new();
        };
        let retained = state.refs.end_of_cover(task.task_id);
        retained
            .into_iter()
            .map(|(object, owner, generation)| RetainedBorrow {
                reference: Some(ray_wire::ReferenceInfo {
                    object_id: id_bytes(object.as_bytes()),
                    owner: state.addresses.get(&owner).cloned(),
                }),
                generation,
            })
            .collect()
    }

    /// Notes that the call is over. Returns whether another one waits on the same link.
    fn end_execution(&self, task: &Incoming, reply: &mut TaskReply) -> bool {
        let mut state = lock(&self.0.execution.state);
        state.running.remove(&task.task_id);
        state.progress.remove(&task.task_id);
        if state.main_task == Some(task.task_id) {
            state.main_task = None;
        }
        if let Some(evidence) = self.0.evidence.get().filter(|_| task.lease.is_some()) {
            evidence.finished(task.sequence);
        }
        let limit = task.template.max_calls;
        if limit > 0 && task.lease.is_some() {
            let calls = state.calls.entry(task.template.function_id.clone()).or_default();
            *calls += 1;
            if *calls >= limit {
                state.exiting = Some(format!(
                    "{} ran max_calls={limit} times here",
                    task.template.function_name
                ));
            }
        }
        reply.worker_exits = state.exiting.is_some();
        if state.exiting.is_some() {
            let reason = state.exiting.clone().unwrap_or_default();
            state.work.push_back(Work::Exit(reason));
        }
        matches!(state.work.front(), Some(Work::Task(next)) if next.link.id() == task.link.id())
    }

    fn reply_creation(&self, task: &Incoming, outcome: Outcome) -> Result<(), WorkerError> {
        let failure = match outcome {
            Outcome::Returns(_) => None,
            Outcome::Exception { value, .. } => Some(DeathCause {
                kind: ray_wire::DEATH_CONSTRUCTOR,
                message: format!("the constructor of {} raised an exception", task.template.function_name),
                pid: std::process::id(),
                exception: Bytes::copy_from_slice(&value.inband),
                ..DeathCause::default()
            }),
            Outcome::Cancelled => Some(DeathCause {
                kind: ray_wire::DEATH_KILLED,
                message: "the constructor was cancelled".into(),
                pid: std::process::id(),
                ..DeathCause::default()
            }),
        };
        // Borrows of the constructor are known to nobody else: their owners are told directly.
        let retained = self.end_cover(task);
        {
            let mut state = self.0.enter()?;
            for borrow in &retained {
                let Some(info) = &borrow.reference else { continue };
                let contained = Contained::from_info(info)?;
                let owner = contained.owner.worker()?;
                self.0.carry_out_references(
                    &mut state,
                    vec![ray_ownership::ReferenceCommand::AddBorrower {
                        owner,
                        object: contained.object,
                        borrower: self.0.worker_id,
                        generation: borrow.generation,
                    }],
                );
            }
        }
        self.end_execution(task, &mut TaskReply::default());
        let created = ActorCreated {
            actor_id: id_bytes(task.task_id.actor_id().as_bytes()),
            incarnation: task.incarnation,
            worker: Some(self.0.me.clone()),
            pid: std::process::id(),
            failure,
            rejected: false,
        };
        task.link
            .send(kinds::ACTOR_CREATED, task.correlation, ray_wire::encode(&created), &[])?;
        Ok(())
    }

    /// Tells the raylet that this worker leaves of itself.
    pub fn announce_exit(&self, reason: &str) {
        let cause = DeathCause {
            kind: ray_wire::DEATH_INTENDED,
            message: reason.to_owned(),
            exit_code: Some(0),
            pid: std::process::id(),
            ..DeathCause::default()
        };
        let _ = self.0.raylet.send(
            kinds::WORKER_EXITING,
            0,
            ray_wire::encode(&WorkerExiting { cause: Some(cause) }),
            &[],
        );
        self.0.raylet.flush();
    }

    /// Cancels a call of ours. With `force` its worker is killed; with `recursive` what it called is cancelled too.
    pub fn cancel(&self, object: &ObjectId, force: bool, recursive: bool) -> Result<(), WorkerError> {
        let mut state = self.0.enter()?;
        self.0.cancel_task(&mut state, object.task_id(), force, recursive);
        Ok(())
    }
}

impl Inner {
    /// Cancels a pending call of this process, wherever it is.
    pub fn cancel_task(&self, state: &mut crate::inner::State, task_id: TaskId, force: bool, recursive: bool) {
        let Some(task) = state.tasks.get_mut(&task_id) else {
            return;
        };
        task.cancelled = true;
        task.retries_left = 0;
        let spec = task.spec.clone();
        if let Some(actor) = spec.actor {
            if state
                .actors
                .get_mut(&actor)
                .is_some_and(|entry| entry.calls.cancel_waiting(task_id))
            {
                return self.finish_cancelled(state, task_id);
            }
        } else {
            let mut commands = Vec::new();
            let queued = state.leases.cancel_queued(task_id, spec.template.class, &mut commands);
            self.carry_out_leases(state, commands);
            if queued || state.tasks.get(&task_id).is_some_and(|task| task.unresolved > 0) {
                return self.finish_cancelled(state, task_id);
            }
        }
        let worker = match spec.actor.and_then(|actor| state.actors.get(&actor)) {
            Some(entry) => match entry.calls.status() {
                ray_ownership::actor_calls::ActorStatus::Alive { worker, .. } => Some(*worker),
                _ => None,
            },
            None => state.leases.lease_of(&task_id).map(|(_, lease)| lease.worker),
        };
        if let Some(Ok(link)) = worker.map(|worker| self.worker_link(state, worker)) {
            let message = CancelTask {
                task_id: id_bytes(task_id.as_bytes()),
                force,
                recursive,
            };
            let _ = link.send(kinds::CANCEL_TASK, 0, ray_wire::encode(&message), &[]);
        }
    }

    /// Cancels what a task called.
    pub fn cancel_children(&self, parent: TaskId, force: bool) {
        let mut state = self.lock();
        let children: Vec<TaskId> = state
            .tasks
            .iter()
            .filter(|(_, task)| task.spec.parent == parent)
            .map(|(id, _)| *id)
            .collect();
        for child in children {
            self.cancel_task(&mut state, child, force, true);
        }
    }
}
