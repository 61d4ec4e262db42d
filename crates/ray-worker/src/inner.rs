//! The core worker's state and the handle to it.
//!
//! Invariants:
//! 1. `State` is the only mutable state apart from slots, links and the execution queue; it is locked for one step at a
//!    time and never while the language runs or a thread waits.
//! 2. Dropping a `Reference` takes no lock: it may happen inside any lock, in the garbage collector, or at exit.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock};
use std::time::{Duration, Instant};

use ray_ids::{ActorId, JobId, NodeId, ObjectId, TaskId, WorkerId};
use ray_ownership::leases::{ClassId, LeaseClient, RequestId};
use ray_ownership::lineage::Lineage;
use ray_ownership::ReferenceTable;
use ray_rpc::{Link, Reactor};
use ray_store::StoreClient;
use ray_wire::{Address, LeaseSpecification};
use rustc_hash::FxHashMap;

use crate::actor_entry::ActorEntry;
use crate::connect::Role;
use crate::execute::ExecutionQueue;
use crate::gcs::GcsWait;
use crate::generators::Stream;
use crate::room::ExtentWait;
use crate::slot::{lock, Group, Slot};
use crate::submit::{PendingTask, TaskSpec};
use crate::template::Template;
use crate::value::InlineValue;
use crate::WorkerError;

/// What an answer with that correlation belongs to.
#[derive(Debug)]
pub(crate) enum Pending {
    Task(TaskId),
    Lease(RequestId),
    ObjectStatus(ObjectId),
    Borrower,
    Fetch,
    Gcs(Arc<GcsWait>),
    Extent(Arc<ExtentWait>),
    NodeQuery(Arc<GcsWait>),
    /// A registration whose failure kills the actor.
    RegisterActor(ActorId),
    /// Nobody waits.
    Ignored,
}

/// A request under way: what it is for and the link that it went out on.
#[derive(Debug)]
pub(crate) struct PendingEntry {
    pub what: Pending,
    pub link: u64,
}

/// What is to be tried again after a link broke, or checked on.
#[derive(Debug)]
pub(crate) enum Retry {
    AskOwner(ObjectId),
    AddBorrower {
        owner: WorkerId,
        object: ObjectId,
        borrower: WorkerId,
        generation: u64,
    },
    /// The link to that worker broke; if its raylet does not report it dead soon, its leases are given up.
    SuspectWorker(WorkerId),
    /// The worker could not be reached for this call, which is its lease's still.
    Push {
        lease: ray_ids::LeaseId,
        task: TaskId,
        sequence: u64,
        until: Instant,
    },
    Fetch(ObjectId),
    /// These are held no longer.
    Release(Vec<ObjectId>),
    /// The link of a session broke: open the next.
    Reconnect(Arc<Link>),
    /// That was some time ago.
    LosePatience(Arc<Link>),
    /// Frames of the link's session are to be acknowledged.
    Acknowledge(Arc<Link>),
}

pub(crate) struct State {
    pub refs: ReferenceTable<Arc<Slot>>,
    pub tasks: FxHashMap<TaskId, PendingTask>,
    pub lineage: Lineage,
    /// What may be run again, and how many items it yielded.
    pub lineage_specs: FxHashMap<TaskId, (Arc<TaskSpec>, u64)>,
    pub leases: LeaseClient,
    /// Which raylet granted a lease.
    pub lease_raylets: FxHashMap<ray_ids::LeaseId, NodeId>,
    /// Which raylet a request is at, and its correlation there.
    pub request_raylets: FxHashMap<RequestId, (NodeId, u64)>,
    pub classes: FxHashMap<LeaseSpecification, ClassId>,
    pub class_specifications: Vec<LeaseSpecification>,
    pub actors: FxHashMap<ActorId, ActorEntry>,
    pub links: FxHashMap<WorkerId, Arc<Link>>,
    /// What was said on the links that processes of other nodes opened to this one.
    pub accepted: FxHashMap<WorkerId, Arc<crate::links::LinkState>>,
    pub raylets: FxHashMap<NodeId, Arc<Link>>,
    pub addresses: FxHashMap<WorkerId, Address>,
    pub nodes: FxHashMap<NodeId, Address>,
    pub pending: FxHashMap<u64, PendingEntry>,
    pub streams: FxHashMap<TaskId, Arc<Stream>>,
    /// The small value that came last, for others that are the same.
    pub last_return: Option<Arc<InlineValue>>,
    /// Objects being made local, and the threads that wait for them.
    pub fetches: FxHashMap<ObjectId, Vec<Arc<Group>>>,
    /// Why an object could not be made local, for the threads that were woken.
    pub fetch_failures: FxHashMap<ObjectId, String>,
    /// Calls whose arguments are all there.
    pub ready: VecDeque<TaskId>,
    pub retries: Vec<(Instant, Retry)>,
    /// Objects to free on other nodes.
    pub frees: FxHashMap<NodeId, Vec<u8>>,
    /// This process let go of objects through its ring since the raylet was last told to read it.
    pub ring_dirty: bool,
    /// Why the raylet's link ended.
    pub raylet_gone: Option<String>,
    pub timer_due: Option<Instant>,
    /// Processes whose death was heard of, for late messages about them.
    pub dead_workers: rustc_hash::FxHashSet<WorkerId>,
}

pub(crate) struct Inner {
    pub reactor: Arc<Reactor>,
    pub role: Role,
    pub me: Address,
    pub worker_id: WorkerId,
    pub node_id: NodeId,
    pub job_id: OnceLock<JobId>,
    pub session_directory: String,
    pub details_json: String,
    pub auth_token: Option<ray_rpc::AuthToken>,
    pub raylet: Arc<Link>,
    /// Tools have none.
    pub store: Option<StoreClient>,
    pub state: Mutex<State>,
    pub dropped: crossbeam_queue::SegQueue<ObjectId>,
    pub drops_noted: AtomicBool,
    pub next_correlation: AtomicU64,
    pub next_template: AtomicU32,
    pub task_seed: u64,
    pub next_task: AtomicU64,
    pub put_seed: u32,
    pub next_put: AtomicU32,
    pub execution: ExecutionQueue,
    pub started: Instant,
    pub shut_down: AtomicBool,
    pub logs: crate::logs::LogQueue,
    pub evidence: OnceLock<crate::evidence::Evidence>,
}

/// The runtime in this process. Clones are the same runtime.
#[derive(Clone)]
pub struct CoreWorker(pub(crate) Arc<Inner>);

/// A counted reference to an object.
pub struct Reference {
    pub(crate) id: ObjectId,
    pub(crate) slot: Arc<Slot>,
    pub(crate) core: Arc<Inner>,
}

impl Reference {
    /// The object.
    pub fn id(&self) -> ObjectId {
        self.id
    }

    /// What is known of its value.
    pub fn slot(&self) -> &Arc<Slot> {
        &self.slot
    }

    /// Whether the runtime that it is counted by was shut down: it means nothing in a later one.
    pub fn is_of_the_past(&self) -> bool {
        self.core.shut_down.load(Ordering::Relaxed)
    }

    /// The runtime it is counted by.
    pub fn core(&self) -> CoreWorker {
        CoreWorker(self.core.clone())
    }
}

impl Clone for Reference {
    fn clone(&self) -> Self {
        self.core.lock().refs.add_local(&self.id);
        Self {
            id: self.id,
            slot: self.slot.clone(),
            core: self.core.clone(),
        }
    }
}

impl Drop for Reference {
    fn drop(&mut self) {
        self.core.dropped.push(self.id);
        if !self.core.drops_noted.swap(true, Ordering::AcqRel) && !self.core.shut_down.load(Ordering::Relaxed) {
            self.core.reactor.request_timer(Instant::now() + DROP_DELAY);
        }
    }
}

impl std::fmt::Debug for Reference {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Reference({})", self.id)
    }
}

/// How many entries are looked at ahead of their use.
pub(crate) const TOUCHED_TOGETHER: usize = 16;

impl State {
    /// Reads the entries and slots of objects that are about to be counted, one after the other with nothing between, so
    /// that the processor waits for their memory at the same time instead of in turn.
    pub fn touch<'a>(&self, objects: impl Iterator<Item = &'a ObjectId>) {
        let ready = objects
            .filter(|object| self.refs.get(object).is_some_and(|entry| entry.value.is_ready()))
            .count();
        std::hint::black_box(ready);
    }
}

/// How long a dropped reference may wait to be counted, if nothing else happens.
const DROP_DELAY: Duration = Duration::from_millis(5);

impl Inner {
    pub fn lock(&self) -> MutexGuard<'_, State> {
        lock(&self.state)
    }

    /// Locks the state after counting what was dropped.
    pub fn enter(&self) -> Result<MutexGuard<'_, State>, WorkerError> {
        self.check()?;
        let mut state = self.lock();
        self.count_drops(&mut state);
        Ok(state)
    }

    /// This node's object store. Tools have none.
    pub fn store(&self) -> Result<&StoreClient, WorkerError> {
        self.store
            .as_ref()
            .ok_or_else(|| WorkerError::Invalid("a tool holds no objects".into()))
    }

    /// Whether this process may use the runtime.
    pub fn check(&self) -> Result<(), WorkerError> {
        if crate::connect::is_forked() {
            return Err(WorkerError::Forked);
        }
        if self.shut_down.load(Ordering::Acquire) {
            return Err(WorkerError::ShutDown);
        }
        Ok(())
    }

    pub fn count_drops(&self, state: &mut State) {
        if !self.drops_noted.load(Ordering::Acquire) {
            return;
        }
        self.drops_noted.store(false, Ordering::Release);
        let mut commands = Vec::new();
        let mut together: [ObjectId; TOUCHED_TOGETHER] = [ObjectId::NIL; TOUCHED_TOGETHER];
        loop {
            let mut count = 0;
            while count < TOUCHED_TOGETHER {
                let Some(object) = self.dropped.pop() else { break };
                together[count] = object;
                count += 1;
            }
            let objects = &together[..count];
            if count > 1 {
                state.touch(objects.iter());
            }
            for object in objects {
                state.refs.remove_local(object, &mut commands);
            }
            if count < TOUCHED_TOGETHER {
                break;
            }
        }
        self.carry_out_references(state, commands);
    }

    pub fn now_us(&self) -> u64 {
        self.started.elapsed().as_micros() as u64
    }

    pub fn now_ms(&self) -> u64 {
        self.now_us() / 1000
    }

    pub fn correlation(&self) -> u64 {
        self.next_correlation.fetch_add(1, Ordering::Relaxed)
    }

    pub fn job(&self) -> JobId {
        self.job_id.get().copied().unwrap_or(JobId::NIL)
    }

    /// A fresh task id of the actor, or of none. Distinct within the process by its counter, between processes by the
    /// random seed.
    pub fn new_task_id(&self, actor: Option<ActorId>) -> TaskId {
        let mut word = self
            .task_seed
            .wrapping_add(self.next_task.fetch_add(1, Ordering::Relaxed));
        // splitmix64, a bijection: no two counters give the same word.
        word ^= word >> 30;
        word = word.wrapping_mul(0xbf58_476d_1ce4_e5b9);
        word ^= word >> 27;
        word = word.wrapping_mul(0x94d0_49bb_1331_11eb);
        word ^= word >> 31;
        TaskId::of(actor.unwrap_or_else(|| ActorId::nil_in(self.job())), word.to_le_bytes())
    }

    /// A fresh id for a put by `task`.
    pub fn new_put_id(&self, task: TaskId) -> ObjectId {
        let count = self
            .put_seed
            .wrapping_add(self.next_put.fetch_add(1, Ordering::Relaxed));
        ObjectId::of(task, ObjectId::FIRST_PUT_INDEX | count)
    }

    /// Asks for the timer at `at` at the latest.
    pub fn want_timer(&self, state: &mut State, at: Instant) {
        if state.timer_due.is_none_or(|due| at < due) {
            state.timer_due = Some(at);
            self.reactor.request_timer(at);
        }
    }

    /// Tries something again after `delay`.
    pub fn retry_later(&self, state: &mut State, delay: Duration, retry: Retry) {
        let at = Instant::now() + delay;
        state.retries.push((at, retry));
        self.want_timer(state, at);
    }
}

impl CoreWorker {
    /// The job of this process; nil in a worker that has not had work yet.
    pub fn job_id(&self) -> JobId {
        self.0.job()
    }

    /// This process.
    pub fn worker_id(&self) -> WorkerId {
        self.0.worker_id
    }

    /// This node.
    pub fn node_id(&self) -> NodeId {
        self.0.node_id
    }

    /// This process's address.
    pub fn address(&self) -> &Address {
        &self.0.me
    }

    /// The session's directory.
    pub fn session_directory(&self) -> &str {
        &self.0.session_directory
    }

    /// JSON of what the raylet told of itself.
    pub fn details_json(&self) -> &str {
        &self.0.details_json
    }

    /// What this process is.
    pub fn role(&self) -> Role {
        self.0.role
    }

    /// A fresh unique actor id.
    pub fn new_actor_id(&self) -> ActorId {
        ActorId::random_in(self.0.job())
    }

    /// A template for calls.
    pub fn make_template(&self, options: crate::TemplateOptions) -> Result<Template, WorkerError> {
        let mut state = self.0.enter()?;
        let job = ray_wire::id_bytes(self.0.job().as_bytes());
        let specification = options.specification(job.clone(), self.0.execution.depth() + 1);
        let class = match state.classes.get(&specification) {
            Some(class) => *class,
            None => {
                let class = state.class_specifications.len() as ClassId;
                state.class_specifications.push(specification.clone());
                state.classes.insert(specification.clone(), class);
                class
            }
        };
        let pipelined = options.is_pipelined();
        let message = ray_wire::TaskTemplate {
            job_id: job,
            function_id: options
                .function_id
                .map(|id| ray_wire::id_bytes(id.as_bytes()))
                .unwrap_or_default(),
            function_name: options.function_name,
            function_blob: options.function_blob,
            name: options.name,
            num_returns: options.num_returns,
            resources: specification.resources,
            strategy: Some(options.strategy),
            max_retries: options.max_retries,
            retry_exceptions: options.retry_exceptions,
            retry_exception_types: options.retry_exception_types,
            runtime_env_json: options.runtime_env_json,
            max_calls: options.max_calls,
            actor_id: options
                .actor_id
                .map(|id| ray_wire::id_bytes(id.as_bytes()))
                .unwrap_or_default(),
            method_name: options.method_name,
            concurrency_group: options.concurrency_group,
            generator_backpressure: options.generator_backpressure,
            scheduling_class: class,
            enable_task_events: true,
            is_actor_creation: false,
        };
        Ok(Template {
            id: self.0.next_template.fetch_add(1, Ordering::Relaxed),
            class,
            message,
            pipelined,
        })
    }

    /// What this process knows of its counts: id, (local, submitted, contained, holds, borrowers), whether it owns it,
    /// and whether the value is known.
    #[allow(clippy::type_complexity)]
    pub fn reference_counts(&self) -> Result<Vec<(ObjectId, (u32, u32, u32, u32, usize), bool, bool)>, WorkerError> {
        let state = self.0.enter()?;
        Ok(state
            .refs
            .iter()
            .map(|(id, entry)| (*id, entry.counts(), entry.is_owned(), entry.value.is_ready()))
            .collect())
    }

    /// What each queued call and each request of this process waits for, a sentence each.
    pub fn why(&self) -> Result<Vec<String>, WorkerError> {
        let state = self.0.enter()?;
        let mut reasons = Vec::new();
        for (class, count, queued) in state.leases.waiting() {
            let specification = &state.class_specifications[class as usize];
            let resources: Vec<String> = specification
                .resources
                .iter()
                .map(|amount| format!("{}: {}", amount.name, amount.amount_e4 as f64 / 1e4))
                .collect();
            reasons.push(format!(
                "{count} calls of {} wait for a lease of {{{}}}{}",
                specification.function_name,
                resources.join(", "),
                if queued { ", which the raylet has queued" } else { "" }
            ));
        }
        for task in state.tasks.values().filter(|task| task.unresolved > 0) {
            reasons.push(format!(
                "{} ({}) waits for {} of its arguments",
                task.spec.template.message.function_name, task.spec.task_id, task.unresolved
            ));
        }
        for (id, entry) in &state.actors {
            if entry.calls.pending() > 0 {
                reasons.push(format!(
                    "{} calls wait for actor {id}: {}",
                    entry.calls.pending(),
                    entry.describe()
                ));
            }
        }
        for object in state.fetches.keys() {
            reasons.push(format!("object {object} is being fetched to this node"));
        }
        Ok(reasons)
    }

    /// Whether `shutdown` was called.
    pub fn is_shut_down(&self) -> bool {
        self.0.shut_down.load(Ordering::Relaxed)
    }

    /// Leaves the cluster: nothing of this process is counted any more. Views of objects stay valid.
    pub fn shutdown(&self) {
        if self.0.shut_down.swap(true, Ordering::AcqRel) {
            return;
        }
        self.0.logs.close();
        if let Ok(store) = self.0.store() {
            store.close();
        }
        self.0.reactor.stop();
    }
}
