//! The local scheduler of a node: owns its resources, the leases on its workers, who waits for one, the actors and the
//! bundles placed here.
//!
//! It is pure: `step(event, now)` gives commands. It refuses requests that name what is gone (a dead node of a hard
//! affinity, a removed placement group) and keeps what cannot be satisfied now, saying so to its owner.
//!
//! The parts: `queues` (who waits), `worker_pool` (who works), `leases` (one lease's life), `dispatch` (who gets what,
//! and what is recalled for whom), `actors` (actors and bundles), `report` (what others are told, and `validate`).
//!
//! Invariants:
//! 1. Whatever is given out of the node's resources is held by exactly one lease, actor or bundle.
//! 2. A lease has one worker or waits for one; a leased worker has one lease; an actor's worker one actor.
//! 3. A request is waiting, granted or answered; never two of these.
//! 4. Whoever waits has been told a reason.

use crate::placement::view_of;
use crate::queues::{Class, Queues};
use crate::types::{Command, Event, Milliseconds, Random, RequestKey, SchedulerConfig, SchedulerLimits};
use crate::worker_pool::WorkerPool;
use ray_ids::{ActorId, JobId, LeaseId, NodeId, PlacementGroupId, WorkerId};
use ray_sched::{Allocation, ClusterView, NodeResources, ResourceSet, SchedError, UnitResources};
use ray_wire::{ActorCreated, BundleKey, CreateActor, DeathCause, LeaseSpecification};
use rustc_hash::{FxHashMap, FxHashSet};
use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;

/// Whether a lease's worker runs something, as far as is known.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Activity {
    Unknown,
    Idle,
    Busy,
}

/// A lease.
#[derive(Debug)]
pub struct Lease {
    pub key: RequestKey,
    pub class: Arc<Class>,
    pub allocation: Allocation,
    pub worker: Option<WorkerId>,
    pub since: Milliseconds,
    pub first_sequence: u64,
    pub recalled_at: Option<Milliseconds>,
    /// What its worker waits for, while it is blocked.
    pub blocked: Option<String>,
    pub activity: Activity,
    /// Nobody waits for its end: the owner is gone, and its worker is being killed.
    pub abandoned: bool,
    /// Its owner heard that the worker takes long to start.
    pub told: bool,
}

/// How far an actor is on this node.
#[derive(Debug, Clone, PartialEq)]
pub enum ActorPhase {
    WaitsForWorker,
    Creating,
    Alive(Box<ActorCreated>),
    /// Told to leave.
    Leaving,
}

/// An actor on this node.
#[derive(Debug)]
pub struct Actor {
    pub message: CreateActor,
    pub incarnation: u64,
    pub demand: ResourceSet,
    pub allocation: Allocation,
    pub worker: Option<WorkerId>,
    pub phase: ActorPhase,
}

/// What waits for resources ahead of leases, because the control plane deemed them free.
#[derive(Debug)]
pub enum Reservation {
    Actor {
        message: Box<CreateActor>,
        demand: ResourceSet,
        deadline: Milliseconds,
    },
    Bundles {
        group: PlacementGroupId,
        bundles: Vec<BundleKey>,
        attempt: u64,
        demand: ResourceSet,
        deadline: Milliseconds,
    },
}

/// Who waits for a worker, resources in hand.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Awaiting {
    Lease(LeaseId),
    Actor(ActorId),
}

/// Resources that are kept for a class that others overtook for too long.
#[derive(Debug)]
pub struct Kept {
    pub class: Arc<Class>,
    pub until: Milliseconds,
    pub window_ms: u64,
}

/// The local scheduler.
#[derive(Debug)]
pub struct LocalScheduler {
    pub(crate) node_id: NodeId,
    pub(crate) limits: SchedulerLimits,
    pub(crate) node: NodeResources,
    pub(crate) units: UnitResources,
    pub(crate) view: ClusterView,
    pub(crate) random: Random,
    pub(crate) spread_cursor: u64,
    pub(crate) classes: FxHashMap<LeaseSpecification, Arc<Class>>,
    pub(crate) queues: Queues,
    pub(crate) leases: BTreeMap<LeaseId, Lease>,
    pub(crate) pool: WorkerPool,
    pub(crate) awaiting: VecDeque<(Awaiting, Milliseconds)>,
    pub(crate) reservations: VecDeque<Reservation>,
    pub(crate) actors: BTreeMap<ActorId, Actor>,
    pub(crate) actor_of_worker: FxHashMap<WorkerId, ActorId>,
    pub(crate) attempts: FxHashMap<PlacementGroupId, u64>,
    pub(crate) removed_groups: VecDeque<PlacementGroupId>,
    pub(crate) asked_groups: FxHashMap<PlacementGroupId, Milliseconds>,
    pub(crate) finished_jobs: FxHashSet<JobId>,
    /// Consecutive workers of an environment that died before they registered, with the last one's cause.
    pub(crate) start_failures: FxHashMap<String, (u32, DeathCause)>,
    pub(crate) kept: Option<Kept>,
    pub(crate) keep_not_before: Milliseconds,
    pub(crate) keep_window_ms: u64,
    pub(crate) next_lease: u64,
    pub(crate) draining: bool,
    pub(crate) prestart: bool,
    /// A pass over all requests for other nodes is due: the view changed.
    pub(crate) view_changed: bool,
}

/// How many removed placement groups are remembered.
const REMOVED_GROUPS_REMEMBERED: usize = 4_096;

impl LocalScheduler {
    /// A node with everything free and no workers.
    pub fn new(config: SchedulerConfig) -> Result<Self, SchedError> {
        let units = UnitResources::default();
        let node = NodeResources::new(&config.total, config.labels.clone(), &units)?;
        Ok(Self {
            node_id: config.node_id,
            pool: WorkerPool::new(config.limits.clone()),
            limits: config.limits,
            node,
            units,
            view: ClusterView::default(),
            random: Random::new(config.random_seed),
            spread_cursor: 0,
            classes: FxHashMap::default(),
            queues: Queues::default(),
            leases: BTreeMap::new(),
            awaiting: VecDeque::new(),
            reservations: VecDeque::new(),
            actors: BTreeMap::new(),
            actor_of_worker: FxHashMap::default(),
            attempts: FxHashMap::default(),
            removed_groups: VecDeque::new(),
            asked_groups: FxHashMap::default(),
            finished_jobs: FxHashSet::default(),
            start_failures: FxHashMap::default(),
            kept: None,
            keep_not_before: 0,
            keep_window_ms: 0,
            next_lease: 0,
            draining: false,
            prestart: true,
            view_changed: false,
        })
    }

    /// Takes in what happened and says what is to be done.
    pub fn step(&mut self, event: Event, now: Milliseconds) -> Vec<Command> {
        let mut out = Vec::new();
        match event {
            Event::RequestLease {
                key,
                specification,
                preferred,
                redirected,
            } => {
                self.request_lease(key, specification, preferred, redirected, now, &mut out);
            }
            Event::CancelRequest { key } => self.cancel_request(key),
            Event::ReturnLease {
                owner,
                lease,
                worker_exits,
            } => {
                self.return_lease(owner, lease, worker_exits, now, &mut out);
            }
            Event::WorkerReady { worker } => self.worker_ready(worker, now, &mut out),
            Event::WorkerExiting { worker, cause } => self.worker_exiting(worker, cause),
            Event::WorkerGone {
                worker,
                cause,
                started_sequence,
            } => {
                self.worker_gone(worker, cause, started_sequence, &mut out);
            }
            Event::OwnerGone { process } => self.owner_gone(process, &mut out),
            Event::Blocked { worker, lease, reason } => self.blocked(worker, lease, reason),
            Event::Unblocked { worker, lease } => self.unblocked(worker, lease),
            Event::Activity { idle, busy } => {
                self.note_activity(&idle, Activity::Idle);
                self.note_activity(&busy, Activity::Busy);
            }
            Event::ClusterChanged { nodes } => {
                for node in &nodes {
                    let id = node.address.as_ref().and_then(|address| address.node().ok());
                    if let Some(id) = id.filter(|id| *id != self.node_id) {
                        self.view.nodes.insert(id, view_of(node));
                    }
                }
                self.view_changed = true;
            }
            Event::NodeGone { node } => {
                if let Some(view) = self.view.nodes.get_mut(&node) {
                    view.alive = false;
                }
                self.view_changed = true;
            }
            Event::PrepareBundles {
                group,
                bundles,
                attempt,
            } => {
                self.prepare_bundles(group, bundles, attempt, now, &mut out);
            }
            Event::CommitBundles { group, attempt } => self.commit_bundles(group, attempt, &mut out),
            Event::ReturnBundles { group, indices } => self.return_bundles(group, &indices, &mut out),
            Event::PlacementGroupRemoved { group } => {
                self.remember_removed(group);
                self.refuse_removed(&mut out);
            }
            Event::PlaceActor { message } => self.place_actor(message, now, &mut out),
            Event::ActorAnswered { worker, message } => self.actor_answered(worker, message, now, &mut out),
            Event::KillActorWorker { message } => self.kill_actor_worker(message, now, &mut out),
            Event::JobFinished { job } => self.job_finished(job, &mut out),
            Event::Drain => {
                self.draining = true;
                self.view_changed = true;
            }
            Event::Tick => {}
        }
        self.dispatch(now, &mut out);
        out
    }

    /// When `Tick` is due, if anything here depends on time.
    pub fn next_tick(&self, now: Milliseconds) -> Option<Milliseconds> {
        let mut next: Option<Milliseconds> = None;
        let mut consider = |at: Option<Milliseconds>| {
            if let Some(at) = at {
                next = Some(next.map_or(at, |known| known.min(at)));
            }
        };
        consider(self.pool.next_surplus_at());
        consider(self.pool.next_overdue_at());
        if !self.queues.is_empty() || !self.reservations.is_empty() {
            consider(Some(now + 10));
        }
        if !self.awaiting.is_empty() {
            consider(Some(now + 200));
        }
        for reservation in &self.reservations {
            let (Reservation::Actor { deadline, .. } | Reservation::Bundles { deadline, .. }) = reservation;
            consider(Some(*deadline));
        }
        if self.leases.values().any(|lease| lease.recalled_at.is_some()) {
            consider(Some(now + 500));
        }
        next.map(|at| at.max(now + 1))
    }

    pub(crate) fn remember_removed(&mut self, group: PlacementGroupId) {
        if !self.removed_groups.contains(&group) {
            self.removed_groups.push_back(group);
        }
        if self.removed_groups.len() > REMOVED_GROUPS_REMEMBERED {
            self.removed_groups.pop_front();
        }
    }

    /// The class of a specification; equal ones share it.
    pub(crate) fn intern(&mut self, specification: LeaseSpecification) -> Result<Arc<Class>, String> {
        if let Some(class) = self.classes.get(&specification) {
            return Ok(class.clone());
        }
        if self.classes.len() > 1_024 {
            // Classes that nobody waits in or holds a lease of are forgotten, so that the table stays small.
            self.classes.retain(|_, class| Arc::strong_count(class) > 1);
        }
        let class = Arc::new(crate::placement::class_of(specification.clone())?);
        self.classes.insert(specification, class.clone());
        Ok(class)
    }
}
