//! Messages between a process and its raylet: registration, leases, life and death, logs.
//!
//! Invariant: 1. A lease's id is never reused, and a worker refuses calls under any lease but its current one.

use bytes::Bytes;

use crate::common::{Address, DeathCause, ResourceAmount, Strategy};
use crate::task::PushTask;

/// A process presents itself to its raylet.
#[derive(Clone, PartialEq, prost::Message)]
pub struct RegisterProcess {
    /// See the `ROLE_*` constants.
    #[prost(uint32, tag = "1")]
    pub role: u32,
    #[prost(bytes = "bytes", tag = "2")]
    pub worker_id: Bytes,
    #[prost(uint32, tag = "3")]
    pub pid: u32,
    /// For a worker: the token it was started with, which ties it to the raylet's request for it.
    #[prost(uint64, tag = "4")]
    pub startup_token: u64,
    /// For a driver: JSON of its job's config (namespace, runtime_env, metadata, entrypoint, code search path).
    #[prost(string, tag = "5")]
    pub job_config_json: String,
}

/// A driver.
pub const ROLE_DRIVER: u32 = 1;
/// A worker that the raylet had started.
pub const ROLE_WORKER: u32 = 2;
/// A tool that only asks (`ray status`): it gets no job and no store.
pub const ROLE_TOOL: u32 = 3;

/// What a process needs to know of its node and job.
#[derive(Clone, PartialEq, prost::Message)]
pub struct Welcome {
    #[prost(message, optional, tag = "1")]
    pub address: Option<Address>,
    #[prost(bytes = "bytes", tag = "2")]
    pub job_id: Bytes,
    #[prost(string, tag = "3")]
    pub store_path: String,
    #[prost(uint32, tag = "4")]
    pub store_slot: u32,
    #[prost(uint64, tag = "5")]
    pub store_slot_generation: u64,
    #[prost(string, tag = "6")]
    pub session_directory: String,
    /// JSON: session name, namespace, log directory, config, ray address, cluster id.
    #[prost(string, tag = "7")]
    pub details_json: String,
    #[prost(message, optional, tag = "8")]
    pub first_extent: Option<crate::object::ExtentInfo>,
    /// Not empty: the registration is refused, for this reason.
    #[prost(string, tag = "9")]
    pub refusal: String,
}

/// What the calls of one scheduling class need.
#[derive(Clone, PartialEq, Eq, Hash, prost::Message)]
pub struct LeaseSpecification {
    #[prost(bytes = "bytes", tag = "1")]
    pub job_id: Bytes,
    #[prost(message, repeated, tag = "2")]
    pub resources: Vec<ResourceAmount>,
    #[prost(message, optional, tag = "3")]
    pub strategy: Option<Strategy>,
    #[prost(string, tag = "4")]
    pub runtime_env_json: String,
    /// For errors and `why`.
    #[prost(string, tag = "5")]
    pub function_name: String,
    /// Depth of nesting: deeper work is granted first when workers block.
    #[prost(uint32, tag = "6")]
    pub depth: u32,
    /// Whether calls are retried when the worker is killed (the memory monitor prefers those).
    #[prost(bool, tag = "7")]
    pub retriable: bool,
}

impl Eq for ResourceAmount {}
impl std::hash::Hash for ResourceAmount {
    fn hash<H: std::hash::Hasher>(&self, state: &mut H) {
        self.name.hash(state);
        self.amount_e4.hash(state);
    }
}
impl Eq for Strategy {}
impl std::hash::Hash for Strategy {
    fn hash<H: std::hash::Hasher>(&self, state: &mut H) {
        self.kind.hash(state);
        self.node_id.hash(state);
        self.placement_group_id.hash(state);
        self.bundle_index.hash(state);
    }
}

/// Asks for one lease. The correlation names the request.
#[derive(Clone, PartialEq, prost::Message)]
pub struct RequestLease {
    #[prost(message, optional, tag = "1")]
    pub specification: Option<LeaseSpecification>,
    /// Calls of that class that wait at the owner, this one included.
    #[prost(uint32, tag = "2")]
    pub backlog: u32,
    /// The node that holds most bytes of the arguments, or empty.
    #[prost(bytes = "bytes", tag = "3")]
    pub preferred_node: Bytes,
    /// Whether another raylet sent the owner here: it must not be redirected again unless this one can never serve it.
    #[prost(bool, tag = "4")]
    pub redirected: bool,
    #[prost(message, optional, tag = "5")]
    pub owner: Option<Address>,
    /// The owner is itself a blocked worker's or driver's process; workers name their lease, for depth and debt.
    #[prost(bytes = "bytes", tag = "6")]
    pub parent_lease_id: Bytes,
}

/// A worker for the owner's use.
#[derive(Clone, PartialEq, prost::Message)]
pub struct LeaseGranted {
    #[prost(bytes = "bytes", tag = "1")]
    pub lease_id: Bytes,
    #[prost(message, optional, tag = "2")]
    pub worker: Option<Address>,
    #[prost(uint32, tag = "3")]
    pub worker_pid: u32,
    /// The first sequence that a push under this lease carries.
    #[prost(uint64, tag = "4")]
    pub first_sequence: u64,
}

/// Ask there instead.
#[derive(Clone, PartialEq, prost::Message)]
pub struct LeaseRedirected {
    /// The other raylet (`worker_id` nil).
    #[prost(message, optional, tag = "1")]
    pub raylet: Option<Address>,
}

/// No lease will come of that request.
#[derive(Clone, PartialEq, prost::Message)]
pub struct LeaseRefused {
    /// An `ERROR_*` kind of `layout`.
    #[prost(uint32, tag = "1")]
    pub error_kind: u32,
    #[prost(string, tag = "2")]
    pub message: String,
}

/// The request waits.
#[derive(Clone, PartialEq, prost::Message)]
pub struct LeaseQueued {
    /// For `why`: what it waits for.
    #[prost(string, tag = "1")]
    pub reason: String,
    /// It can never be satisfied as the cluster stands.
    #[prost(bool, tag = "2")]
    pub infeasible: bool,
}

/// The owner no longer wants what it asked for under that correlation.
#[derive(Clone, PartialEq, prost::Message)]
pub struct CancelLeaseRequest {
    #[prost(uint64, tag = "1")]
    pub request: u64,
}

/// The owner gives a worker back.
#[derive(Clone, PartialEq, prost::Message)]
pub struct ReturnLease {
    #[prost(bytes = "bytes", tag = "1")]
    pub lease_id: Bytes,
    /// The worker leaves of itself (`max_calls`): do not lease it again.
    #[prost(bool, tag = "2")]
    pub worker_exits: bool,
}

/// The raylet wants a worker back.
#[derive(Clone, PartialEq, prost::Message)]
pub struct RecallLease {
    #[prost(bytes = "bytes", tag = "1")]
    pub lease_id: Bytes,
}

/// A leased worker is gone.
#[derive(Clone, PartialEq, prost::Message)]
pub struct LeaseBroken {
    #[prost(bytes = "bytes", tag = "1")]
    pub lease_id: Bytes,
    #[prost(message, optional, tag = "2")]
    pub cause: Option<DeathCause>,
    /// The highest sequence that was started, by the worker's own word; pushes above it were not. Absent where the
    /// evidence is lost: then every attempt counts.
    #[prost(uint64, optional, tag = "3")]
    pub started_sequence: Option<u64>,
}

/// What the worker's current lease is.
#[derive(Clone, PartialEq, prost::Message)]
pub struct LeaseAssigned {
    /// Empty: none, refuse every call.
    #[prost(bytes = "bytes", tag = "1")]
    pub lease_id: Bytes,
    #[prost(bytes = "bytes", tag = "2")]
    pub job_id: Bytes,
    /// JSON: resource name to its instances' indices and amounts (`{"GPU": [[0, 1.0]]}`).
    #[prost(string, tag = "3")]
    pub resource_instances_json: String,
    /// JSON of the job's config, on a worker's first lease for a job.
    #[prost(string, tag = "4")]
    pub job_config_json: String,
    #[prost(uint64, tag = "5")]
    pub first_sequence: u64,
    #[prost(message, repeated, tag = "6")]
    pub resources: Vec<ResourceAmount>,
    #[prost(message, optional, tag = "7")]
    pub strategy: Option<Strategy>,
    /// The runtime environment of the lease, which the worker was started for.
    #[prost(string, tag = "8")]
    pub runtime_env_json: String,
}

/// A plain task waits.
#[derive(Clone, PartialEq, prost::Message)]
pub struct WorkerBlocked {
    #[prost(bytes = "bytes", tag = "1")]
    pub lease_id: Bytes,
    /// What it waits for, for `why`.
    #[prost(string, tag = "2")]
    pub reason: String,
}

/// It goes on.
#[derive(Clone, PartialEq, prost::Message)]
pub struct WorkerUnblocked {
    #[prost(bytes = "bytes", tag = "1")]
    pub lease_id: Bytes,
}

/// A worker leaves of itself.
#[derive(Clone, PartialEq, prost::Message)]
pub struct WorkerExiting {
    #[prost(message, optional, tag = "1")]
    pub cause: Option<DeathCause>,
}

/// A process is to leave.
#[derive(Clone, PartialEq, prost::Message)]
pub struct ExitProcess {
    #[prost(string, tag = "1")]
    pub reason: String,
    /// At once, without finishing what runs.
    #[prost(bool, tag = "2")]
    pub force: bool,
}

/// Tell me of that process's death.
#[derive(Clone, PartialEq, prost::Message)]
pub struct WatchWorker {
    #[prost(message, optional, tag = "1")]
    pub worker: Option<Address>,
}

/// A process is dead.
#[derive(Clone, PartialEq, prost::Message)]
pub struct WorkerDied {
    #[prost(message, optional, tag = "1")]
    pub worker: Option<Address>,
    #[prost(message, optional, tag = "2")]
    pub cause: Option<DeathCause>,
}

/// A node is dead.
#[derive(Clone, PartialEq, prost::Message)]
pub struct NodeDied {
    #[prost(bytes = "bytes", tag = "1")]
    pub node_id: Bytes,
    #[prost(string, tag = "2")]
    pub reason: String,
}

/// Lines that a worker printed.
#[derive(Clone, PartialEq, prost::Message)]
pub struct LogLines {
    #[prost(uint32, tag = "1")]
    pub pid: u32,
    /// The task's or actor's name that the prefix shows, or empty.
    #[prost(string, tag = "2")]
    pub name: String,
    #[prost(string, tag = "3")]
    pub host: String,
    #[prost(bool, tag = "4")]
    pub is_error: bool,
    #[prost(string, repeated, tag = "5")]
    pub lines: Vec<String>,
    #[prost(bytes = "bytes", tag = "6")]
    pub job_id: Bytes,
}

/// A message of the runtime for the driver's standard error.
#[derive(Clone, PartialEq, prost::Message)]
pub struct DriverMessage {
    #[prost(string, tag = "1")]
    pub level: String,
    #[prost(string, tag = "2")]
    pub message: String,
}

/// An actor to create on this node, in this worker.
#[derive(Clone, PartialEq, prost::Message)]
pub struct CreateActor {
    #[prost(bytes = "bytes", tag = "1")]
    pub actor_id: Bytes,
    /// Which life of the actor this is, from 1.
    #[prost(uint64, tag = "2")]
    pub incarnation: u64,
    #[prost(message, optional, tag = "3")]
    pub creation: Option<ActorCreation>,
    /// JSON of the job's config.
    #[prost(string, tag = "4")]
    pub job_config_json: String,
}

/// How to make an actor, the same for each of its lives.
#[derive(Clone, PartialEq, prost::Message)]
pub struct ActorCreation {
    /// The constructor's call; its payload is `payload`.
    #[prost(message, optional, tag = "1")]
    pub call: Option<PushTask>,
    #[prost(bytes = "bytes", tag = "2")]
    pub payload: Bytes,
    #[prost(message, optional, tag = "3")]
    pub owner: Option<Address>,
    /// What it needs while it runs.
    #[prost(message, repeated, tag = "4")]
    pub resources: Vec<ResourceAmount>,
    /// What a node must have free for it to be placed there.
    #[prost(message, repeated, tag = "5")]
    pub placement_resources: Vec<ResourceAmount>,
    #[prost(message, optional, tag = "6")]
    pub strategy: Option<Strategy>,
    #[prost(sint32, tag = "7")]
    pub max_restarts: i32,
    #[prost(sint32, tag = "8")]
    pub max_task_retries: i32,
    #[prost(uint32, tag = "9")]
    pub max_concurrency: u32,
    #[prost(bool, tag = "10")]
    pub is_async: bool,
    /// JSON: concurrency group to its limit.
    #[prost(string, tag = "11")]
    pub concurrency_groups_json: String,
    #[prost(bool, tag = "12")]
    pub detached: bool,
    #[prost(string, tag = "13")]
    pub name: String,
    #[prost(string, tag = "14")]
    pub namespace: String,
    #[prost(bool, tag = "15")]
    pub out_of_order: bool,
    #[prost(string, tag = "16")]
    pub class_name: String,
    #[prost(string, tag = "17")]
    pub runtime_env_json: String,
    /// Pickled description of the class's methods, from which `get_actor` makes a handle.
    #[prost(bytes = "bytes", tag = "18")]
    pub handle_metadata: Bytes,
    #[prost(sint32, tag = "19")]
    pub max_pending_calls: i32,
}

/// A constructor ended.
#[derive(Clone, PartialEq, prost::Message)]
pub struct ActorCreated {
    #[prost(bytes = "bytes", tag = "1")]
    pub actor_id: Bytes,
    #[prost(uint64, tag = "2")]
    pub incarnation: u64,
    #[prost(message, optional, tag = "3")]
    pub worker: Option<Address>,
    #[prost(uint32, tag = "4")]
    pub pid: u32,
    /// Set: it failed; `DEATH_UNKNOWN` with no message means "busy, place it elsewhere".
    #[prost(message, optional, tag = "5")]
    pub failure: Option<DeathCause>,
    /// The node has no room for it now: place it again.
    #[prost(bool, tag = "6")]
    pub rejected: bool,
}

/// Asks a raylet what it knows.
#[derive(Clone, PartialEq, prost::Message)]
pub struct NodeQuery {
    /// JSON: `{"method": "…", …}`.
    #[prost(string, tag = "1")]
    pub query_json: String,
}

/// What it knows.
#[derive(Clone, PartialEq, prost::Message)]
pub struct NodeAnswer {
    #[prost(string, tag = "1")]
    pub answer_json: String,
    #[prost(string, tag = "2")]
    pub error: String,
}

/// Interrupts the running task of a worker (raises `KeyboardInterrupt` there), or kills the worker.
#[derive(Clone, PartialEq, prost::Message)]
pub struct InterruptTask {
    #[prost(bytes = "bytes", tag = "1")]
    pub task_id: Bytes,
    #[prost(message, optional, tag = "2")]
    pub worker: Option<Address>,
    #[prost(bool, tag = "3")]
    pub force: bool,
}
