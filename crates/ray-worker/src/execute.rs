//! Executing: the queue of what was pushed here, leases, replies, blocking and cancellation.
//!
//! Invariants:
//! 1. A call runs only under the worker's current lease, or, in an actor, for its present incarnation; others are refused
//!    and not started.
//! 2. Before user code of a lease's call runs, its sequence is in the evidence word.
//! 3. A plain task that waits holds no unstarted call of its owner: they go back first.
//! 4. A reply leaves after what its returns contain is held and what the worker keeps is listed.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, Mutex, OnceLock};
use std::thread::ThreadId;
use std::time::{Duration, Instant};

use bytes::Bytes;
use ray_ids::{ActorId, JobId, LeaseId, ObjectId, TaskId, WorkerId};
use ray_rpc::{Link, Waiter};
use ray_wire::{
    id_bytes, kinds, ActorCreation, Address, CreateActor, ExitProcess, LeaseAssigned, PushTask, ReferenceArgument,
    TaskReply, TaskTemplate, TasksRecalled, REPLY_STALE_INCARNATION, REPLY_STALE_LEASE, REPLY_UNKNOWN_TEMPLATE,
};
use rustc_hash::FxHashMap;

use crate::generators::item_id;
use crate::inner::Inner;
use crate::links::link_state;
use crate::slot::{lock, Group};
use crate::value::{Contained, InlineValue, Serialized};
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
    pub(crate) link: Arc<Link>,
    pub(crate) correlation: u64,
    pub(crate) items: GeneratorProgress,
}

impl Incoming {
    /// Whether both calls came by the same link.
    pub fn shares_link(&self, other: &Incoming) -> bool {
        self.link.id() == other.link.id()
    }

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
pub(crate) struct GeneratorProgress {
    pub(crate) state: Arc<Mutex<ProgressState>>,
}

#[derive(Debug, Default)]
pub(crate) struct ProgressState {
    pub(crate) sent: u64,
    pub(crate) consumed: u64,
    pub(crate) abandoned: bool,
    pub(crate) waiting: Option<Arc<Group>>,
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
pub(crate) struct ExecutionState {
    pub(crate) work: VecDeque<Work>,
    pub(crate) lease: Option<LeaseId>,
    pub(crate) past_leases: VecDeque<LeaseId>,
    pub(crate) early: Vec<(Instant, Arc<Incoming>)>,
    pub(crate) actor: Option<(ActorId, u64)>,
    /// The actor's owner and the description of its methods.
    pub(crate) actor_origin: Option<(Address, Bytes)>,
    pub(crate) running: FxHashMap<TaskId, bool>,
    pub(crate) progress: FxHashMap<TaskId, Arc<Mutex<ProgressState>>>,
    pub(crate) calls: FxHashMap<Bytes, u32>,
    pub(crate) exiting: Option<String>,
    pub(crate) assigned: Option<Box<LeaseAssigned>>,
    pub(crate) main_task: Option<TaskId>,
    pub(crate) blocked: u32,
}

/// What was pushed to this worker.
#[derive(Debug, Default)]
pub(crate) struct ExecutionQueue {
    pub(crate) state: Mutex<ExecutionState>,
    pub(crate) waiter: Waiter,
    pub(crate) depth: AtomicU32,
    /// Calls run on an event loop of the main thread.
    pub(crate) runs_event_loop: AtomicBool,
    pub(crate) poller_has_news: AtomicBool,
    pub(crate) main_thread: OnceLock<(ThreadId, libc::pthread_t)>,
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

    pub(crate) fn push(&self, work: Work) {
        lock(&self.state).work.push_back(work);
        self.waiter.notify();
    }

    pub(crate) fn is_main_thread(&self) -> bool {
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
            // What the consumer took from an earlier attempt counts as taken from this one.
            lock(&incoming.items.state).consumed = incoming.watermark;
            state.progress.insert(incoming.task_id, incoming.items.state.clone());
        }
        state.work.push_back(Work::Task(incoming));
    }

    pub(crate) fn refuse(
        &self,
        link: &Arc<Link>,
        correlation: u64,
        status: u32,
        reason: &str,
    ) -> Result<(), WorkerError> {
        let reply = TaskReply {
            status,
            message: reason.into(),
            ..TaskReply::default()
        };
        crate::session::send(link, kinds::TASK_REPLY, correlation, ray_wire::encode(&reply), &[])?;
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
            if !message.job_config_json.is_empty() {
                // The lease may have brought it already, and an order without it takes nothing away.
                assigned.job_config_json.clone_from(&message.job_config_json);
            }
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
            let _ = crate::session::send(&link, kinds::TASKS_RECALLED, 0, ray_wire::encode(&message), &[]);
        }
    }

    /// The owner asks for what has not started; an answer goes out in any case.
    pub fn on_recall(&self, link: &Arc<Link>, lease: LeaseId) {
        self.give_back(Some(lease));
        let _ = crate::session::send(
            link,
            kinds::TASKS_RECALLED,
            0,
            ray_wire::encode(&TasksRecalled::default()),
            &[],
        );
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

    /// A process's link is gone: what it pushed and has not started is nobody's. `gone` says whether a link is one of its.
    pub fn drop_calls_of(&self, gone: impl Fn(u64) -> bool) {
        let mut state = lock(&self.execution.state);
        state
            .work
            .retain(|work| !matches!(work, Work::Task(task) if task.creation.is_none() && gone(task.link.id())));
        state.early.retain(|(_, task)| !gone(task.link.id()));
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
}
