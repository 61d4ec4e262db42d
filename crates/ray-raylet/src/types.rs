//! What goes into and comes out of the pure machines: events, commands and their limits.
//!
//! Plain Rust types and `ray-wire` messages; no bytes, no clock, no socket, so that a simulator can link the machines.
//!
//! Invariant: 1. Every limit has a name here and a unit in its name.

use ray_ids::{ActorId, JobId, LeaseId, NodeId, PlacementGroupId, WorkerId};
use ray_sched::{Labels, ResourceSet};
use ray_wire::{
    ActorCreated, BundleKey, CreateActor, DeathCause, KillActorWorker, LeaseSpecification, NodeInfo, ResourceAmount,
    Strategy,
};

/// Milliseconds since some fixed moment; never goes back.
pub type Milliseconds = u64;

/// Names a request for a lease: who asks, and under which correlation.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct RequestKey {
    pub process: WorkerId,
    pub correlation: u64,
}

/// What the local scheduler is to know of its node.
#[derive(Debug, Clone)]
pub struct SchedulerConfig {
    pub node_id: NodeId,
    pub total: ResourceSet,
    pub labels: Labels,
    /// Makes the ids of leases and workers, and breaks ties.
    pub random_seed: [u64; 4],
    pub limits: SchedulerLimits,
}

/// The scheduler's limits.
#[derive(Debug, Clone)]
pub struct SchedulerLimits {
    /// Workers that may be on their way at once.
    pub maximum_starting_workers: usize,
    /// Workers of any kind on this node.
    pub maximum_workers: usize,
    /// Idle workers kept; those beyond are asked to leave after `idle_worker_ms`.
    pub idle_workers_kept: usize,
    /// Fresh workers kept ready for a lease or an actor.
    pub spare_workers: usize,
    /// The same while actors are made one after the other, at most.
    pub maximum_spare_workers: usize,
    pub idle_worker_ms: u64,
    /// A worker that has not registered after this long is killed.
    pub worker_start_timeout_ms: u64,
    /// An actor or a bundle waits this long for recalled leases before it is refused.
    pub reservation_wait_ms: u64,
    /// A lease whose worker is known to run something is left alone for this long.
    pub busy_lease_quantum_ms: u64,
    /// A request that others overtook for this long gets the node's resources kept for it.
    pub starvation_ms: u64,
    /// A gracefully killed worker is killed for good after this long.
    pub graceful_exit_ms: u64,
    /// An idle lease that was recalled and did not come back after this long is taken from its owner.
    pub recall_deadline_ms: u64,
    /// The same, for a process that was told to leave at once.
    pub forced_exit_ms: u64,
}

impl Default for SchedulerLimits {
    fn default() -> Self {
        Self {
            maximum_starting_workers: 8,
            maximum_workers: 4_000,
            idle_workers_kept: 2,
            spare_workers: 1,
            maximum_spare_workers: 8,
            idle_worker_ms: 1_000,
            worker_start_timeout_ms: 60_000,
            reservation_wait_ms: 300,
            busy_lease_quantum_ms: 50,
            starvation_ms: 1_000,
            graceful_exit_ms: 30_000,
            recall_deadline_ms: 5_000,
            forced_exit_ms: 2_000,
        }
    }
}

/// What happens to the scheduler.
#[allow(clippy::large_enum_variant)] // An event is made, handed over and consumed; none is kept.
#[derive(Debug, Clone)]
pub enum Event {
    RequestLease {
        key: RequestKey,
        specification: LeaseSpecification,
        /// The node that holds most bytes of the arguments.
        preferred: Option<NodeId>,
        redirected: bool,
    },
    CancelRequest {
        key: RequestKey,
    },
    ReturnLease {
        owner: WorkerId,
        lease: LeaseId,
        worker_exits: bool,
    },
    /// A started worker registered.
    WorkerReady {
        worker: WorkerId,
    },
    /// A worker leaves of itself: it takes nothing more.
    WorkerExiting {
        worker: WorkerId,
        cause: Option<DeathCause>,
    },
    WorkerGone {
        worker: WorkerId,
        cause: DeathCause,
        started_sequence: Option<u64>,
    },
    /// A process that asked for leases is gone.
    OwnerGone {
        process: WorkerId,
    },
    Blocked {
        worker: WorkerId,
        lease: LeaseId,
        reason: String,
    },
    Unblocked {
        worker: WorkerId,
        lease: LeaseId,
    },
    /// What the workers' own words say of leases: running something, or not.
    Activity {
        idle: Vec<LeaseId>,
        busy: Vec<LeaseId>,
    },
    /// Nodes that are new or changed, this one possibly among them.
    ClusterChanged {
        nodes: Vec<NodeInfo>,
    },
    NodeGone {
        node: NodeId,
    },
    PrepareBundles {
        group: PlacementGroupId,
        bundles: Vec<BundleKey>,
        attempt: u64,
    },
    CommitBundles {
        group: PlacementGroupId,
        attempt: u64,
    },
    ReturnBundles {
        group: PlacementGroupId,
        /// These bundles; empty: every one.
        indices: Vec<u32>,
    },
    /// The control plane was asked about a placement group that no node shows.
    PlacementGroupRemoved {
        group: PlacementGroupId,
    },
    PlaceActor {
        message: CreateActor,
    },
    ActorAnswered {
        worker: WorkerId,
        message: ActorCreated,
    },
    KillActorWorker {
        message: KillActorWorker,
    },
    JobFinished {
        job: JobId,
    },
    Drain,
    Tick,
}

/// What the shell is to do.
#[derive(Debug, Clone, PartialEq)]
pub enum Command {
    Grant {
        key: RequestKey,
        lease: LeaseId,
        worker: WorkerId,
        first_sequence: u64,
    },
    Redirect {
        key: RequestKey,
        node: NodeId,
    },
    Refuse {
        key: RequestKey,
        error_kind: u32,
        message: String,
    },
    Queued {
        key: RequestKey,
        reason: String,
        infeasible: bool,
    },
    Recall {
        owner: WorkerId,
        lease: LeaseId,
    },
    /// Tells a worker whose calls it takes from now on. It comes before the grant.
    AssignLease {
        worker: WorkerId,
        lease: LeaseId,
        job: JobId,
        resources: Vec<ResourceAmount>,
        strategy: Option<Strategy>,
        instances_json: String,
        runtime_env_json: String,
        first_sequence: u64,
        /// The worker has not served this job yet: it needs the job's config.
        first_of_job: bool,
    },
    /// Tells a worker to refuse every call.
    UnassignLease {
        worker: WorkerId,
    },
    StartWorker {
        worker: WorkerId,
        runtime_env_json: String,
        job: Option<JobId>,
    },
    /// Asks a process to leave when it can.
    AskToExit {
        worker: WorkerId,
        reason: String,
    },
    KillWorker {
        worker: WorkerId,
        cause: DeathCause,
    },
    LeaseBroken {
        owner: WorkerId,
        lease: LeaseId,
        cause: DeathCause,
        started_sequence: Option<u64>,
    },
    CreateActor {
        worker: WorkerId,
        message: Box<CreateActor>,
    },
    /// The answer to the control plane's `PLACE_ACTOR`.
    AnswerActor(Box<ActorCreated>),
    ReportDeath {
        worker: WorkerId,
        cause: DeathCause,
        actor: Option<(ActorId, u64)>,
    },
    AnswerBundlesPrepared {
        group: PlacementGroupId,
        attempt: u64,
        success: bool,
    },
    AnswerBundlesCommitted {
        group: PlacementGroupId,
        attempt: u64,
    },
    /// Ask the control plane whether this group exists still.
    AskPlacementGroup {
        group: PlacementGroupId,
    },
}

/// A cause with a sentence and nothing else.
pub fn death(kind: u32, message: impl Into<String>) -> DeathCause {
    DeathCause {
        kind,
        message: message.into(),
        ..Default::default()
    }
}

/// A small generator of numbers for ids and ties (xoshiro256**); the seed comes from outside.
#[derive(Debug, Clone)]
pub struct Random([u64; 4]);

impl Random {
    /// A generator; a seed of zeros is replaced, because it would give zeros for ever.
    pub fn new(seed: [u64; 4]) -> Self {
        Self(if seed == [0; 4] { [1, 2, 3, 4] } else { seed })
    }

    /// The next number.
    pub fn next_u64(&mut self) -> u64 {
        let state = &mut self.0;
        let result = state[1].wrapping_mul(5).rotate_left(7).wrapping_mul(9);
        let shifted = state[1] << 17;
        state[2] ^= state[0];
        state[3] ^= state[1];
        state[1] ^= state[2];
        state[0] ^= state[3];
        state[2] ^= shifted;
        state[3] = state[3].rotate_left(45);
        result
    }

    /// `N` bytes.
    pub fn bytes<const N: usize>(&mut self) -> [u8; N] {
        let mut bytes = [0; N];
        for chunk in bytes.chunks_mut(8) {
            chunk.copy_from_slice(&self.next_u64().to_le_bytes()[..chunk.len()]);
        }
        bytes
    }
}
