//! The shell of a raylet: owns its scheduler, its node's store, who watches whom, and the link to the control plane.
//!
//! What the shell adds to the machines, and the real one must add too: it asks the raylet of a watched process again after
//! it was cut off from the control plane, because a notice of death may have been lost meanwhile.
//!
//! Invariant: 1. A worker hears of its lease before its owner does: the assignment is sent first.

use std::collections::{BTreeMap, BTreeSet};
use std::rc::Rc;

use ray_gcs::NodeMessage;
use ray_ids::{ActorId, JobId, NodeId, ObjectId, WorkerId};
use ray_raylet::scheduler::LocalScheduler;
use ray_raylet::types::{death, Event as SchedulerEvent, SchedulerConfig, SchedulerLimits};
use ray_sched::{Labels, ResourceSet};
use ray_wire::{
    id_bytes, Address, DeathCause, GcsCall, GcsRequest, JobKey, ResourceAmount, ResourceReport, WorkerDeathReport,
    DEATH_CRASHED,
};

use crate::model::{Message, Place, Reference};
use crate::mutation::Mutation;
use crate::world::{Event, World, MS};

/// A stored copy.
#[derive(Debug, Clone)]
pub(crate) struct Copy {
    pub owner: WorkerId,
    pub contents: Rc<[Reference]>,
}

/// Who waits for the control plane's answer.
#[derive(Debug, Clone)]
pub(crate) enum Asker {
    Process(WorkerId),
    Driver(WorkerId),
    Nobody,
}

/// A raylet.
#[derive(Debug)]
pub struct Raylet {
    pub(crate) node: NodeId,
    pub(crate) scheduler: LocalScheduler,
    pub(crate) total: ResourceSet,
    pub(crate) tick_at: Option<u64>,
    pub(crate) report_due: bool,
    pub(crate) registered: bool,
    pub(crate) connecting: bool,
    pub(crate) ever_registered: bool,
    pub(crate) pending: BTreeMap<u64, (Asker, GcsRequest)>,
    pub(crate) next_correlation: u64,
    pub(crate) actor_watches: BTreeMap<WorkerId, BTreeSet<Vec<u8>>>,
    /// Answers that the registration under way does not show: they follow its answer.
    pub(crate) held: Vec<NodeMessage>,
    /// Deaths that the control plane has not acknowledged, by the correlation under which each is told.
    pub(crate) deaths: BTreeMap<u64, WorkerDeathReport>,
    pub(crate) deaths_registered: u64,
    pub(crate) report_sequence: u64,
    pub(crate) placements_seen: u64,
    pub(crate) last_report: Option<ResourceReport>,
    pub(crate) publisher: (u64, u64),
    pub(crate) watchers: BTreeMap<WorkerId, BTreeSet<WorkerId>>,
    /// Watches of other nodes' raylets on processes here.
    pub(crate) watchers_elsewhere: BTreeMap<WorkerId, BTreeSet<NodeId>>,
    pub(crate) dead: BTreeSet<WorkerId>,
    pub(crate) dead_nodes: BTreeSet<NodeId>,
    pub(crate) drivers: BTreeMap<WorkerId, JobId>,
    /// Processes of other nodes that asked for leases here.
    pub(crate) remote_owners: BTreeSet<WorkerId>,
    pub(crate) kill_causes: BTreeMap<WorkerId, DeathCause>,
    /// The workers' own words: the sequence started last.
    pub(crate) evidence: BTreeMap<WorkerId, u64>,
    pub(crate) store: BTreeMap<ObjectId, Copy>,
    pub(crate) pulls: BTreeMap<ObjectId, Pull>,
}

#[derive(Debug)]
pub(crate) struct Pull {
    pub(crate) waiters: BTreeSet<WorkerId>,
    pub(crate) candidates: Vec<NodeId>,
    pub(crate) absent: Vec<NodeId>,
    pub(crate) asked: NodeId,
}

impl Raylet {
    /// Processes whose deaths matter here.
    pub(crate) fn remote_interest(&self, node: NodeId) -> BTreeSet<WorkerId> {
        debug_assert_eq!(node, self.node);
        let owners = self.store.values().map(|copy| copy.owner);
        let of_others = self
            .watchers
            .keys()
            .copied()
            .chain(owners)
            .chain(self.remote_owners.iter().copied());
        of_others.filter(|worker| !self.dead.contains(worker)).collect()
    }

    /// What is left that should not be, if anything.
    pub(crate) fn leftover(&self) -> Option<String> {
        if !self.registered {
            return Some("not registered with the control plane".into());
        }
        if !self.scheduler.is_idle() {
            return Some(format!("leases: {}", self.scheduler.describe_leases(0)));
        }
        if self.scheduler.available() != self.total {
            return Some(format!("{} of {} are free", self.scheduler.available(), self.total));
        }
        if let Some((object, _)) = self.store.iter().next() {
            return Some(format!("the store holds {object}"));
        }
        if !self.pulls.is_empty() {
            return Some("pulls are under way".into());
        }
        if !self.pending.is_empty() {
            return Some(format!("requests to the control plane: {:?}", self.pending));
        }
        if !self.deaths.is_empty() {
            return Some(format!("deaths that were not acknowledged: {:?}", self.deaths));
        }
        None
    }
}

pub(crate) fn address(node: NodeId, worker: WorkerId) -> Address {
    Address {
        node_id: id_bytes(node.as_bytes()),
        worker_id: id_bytes(worker.as_bytes()),
        ..Address::default()
    }
}

pub(crate) fn amounts(set: &ResourceSet) -> Vec<ResourceAmount> {
    set.iter()
        .map(|(name, amount)| ResourceAmount {
            name: name.to_string(),
            amount_e4: amount.raw(),
        })
        .collect()
}

impl World {
    /// A node joins.
    pub(crate) fn join_node(&mut self) -> NodeId {
        let node = NodeId::from_array(self.random.bytes());
        let cpus = self.random.between(2, 4) as i64 * 10_000;
        let total = ResourceSet::from_raw([("CPU", cpus), ("seat", 1_000 * 10_000)]);
        let limits = SchedulerLimits {
            worker_start_timeout_ms: 5_000,
            graceful_exit_ms: 5_000,
            ..SchedulerLimits::default()
        };
        let random_seed = [(); 4].map(|()| self.random.next_u64());
        let config = SchedulerConfig {
            node_id: node,
            total: total.clone(),
            labels: Labels::default(),
            random_seed,
            limits,
        };
        let scheduler = match LocalScheduler::new(config) {
            Ok(scheduler) => scheduler,
            Err(error) => {
                self.fail(error.to_string());
                return node;
            }
        };
        let raylet = Raylet {
            node,
            scheduler,
            total,
            tick_at: None,
            report_due: false,
            registered: false,
            connecting: false,
            ever_registered: false,
            pending: BTreeMap::new(),
            next_correlation: 1,
            actor_watches: BTreeMap::new(),
            held: Vec::new(),
            deaths: BTreeMap::new(),
            deaths_registered: 0,
            report_sequence: 0,
            placements_seen: 0,
            last_report: None,
            publisher: (0, 0),
            watchers: BTreeMap::new(),
            watchers_elsewhere: BTreeMap::new(),
            dead: BTreeSet::new(),
            dead_nodes: BTreeSet::new(),
            drivers: BTreeMap::new(),
            remote_owners: BTreeSet::new(),
            kill_causes: BTreeMap::new(),
            evidence: BTreeMap::new(),
            store: BTreeMap::new(),
            pulls: BTreeMap::new(),
        };
        self.raylets.insert(node, raylet);
        self.at(MS, Event::ConnectGcs(node));
        self.raylet_step(node, SchedulerEvent::Tick);
        node
    }

    /// Kills a node with everything on it.
    pub(crate) fn kill_node(&mut self, node: NodeId) {
        let workers: Vec<WorkerId> = self
            .processes
            .values()
            .filter(|process| process.node == node)
            .map(|process| process.id)
            .collect();
        for worker in workers {
            self.kill_process(worker);
        }
        if let Some(raylet) = self.raylets.remove(&node) {
            // Values that are gone with the store break their contents' chains for whoever was about to read them.
            for (object, copy) in &raylet.store {
                self.truth.tainted.insert(*object);
                self.truth
                    .tainted
                    .extend(copy.contents.iter().map(|inner| inner.object));
            }
            self.truth.deaths += 1;
            let epoch = self.link_epoch(Place::Raylet(node), Place::Gcs);
            let delay = self.random.between(1, 10) * MS;
            self.at(delay, Event::GcsLinkDown { node, epoch });
        }
    }

    /// A driver registers here.
    pub(crate) fn add_driver(&mut self, node: NodeId, worker: WorkerId) {
        let add = ray_wire::AddJob {
            driver: Some(address(node, worker)),
            ..ray_wire::AddJob::default()
        };
        self.ask_gcs(node, Asker::Driver(worker), WorkerId::NIL, GcsCall::AddJob(add));
    }

    pub(crate) fn job_added(&mut self, node: NodeId, worker: WorkerId, job: JobId) {
        if !self.processes.contains_key(&worker) {
            return self.ask_gcs(node, Asker::Nobody, WorkerId::NIL, finish_job(job));
        }
        if let Some(raylet) = self.raylets.get_mut(&node) {
            raylet.drivers.insert(worker, job);
        }
        self.begin_driver(worker, job);
    }

    /// A driver leaves after its program.
    pub(crate) fn driver_leaves(&mut self, worker: WorkerId) {
        self.kill_process(worker);
    }

    /// A worker registers, its start over.
    pub(crate) fn worker_started(&mut self, node: NodeId, worker: WorkerId) {
        if !self
            .raylets
            .get(&node)
            .is_some_and(|raylet| raylet.scheduler.knows_worker(&worker))
        {
            return;
        }
        self.home.insert(worker, node);
        self.new_worker(node, worker);
        self.raylet_step(node, SchedulerEvent::WorkerReady { worker });
    }

    /// The raylet notices that a process of its node has ended.
    pub(crate) fn worker_ended(&mut self, node: NodeId, worker: WorkerId) {
        let forget = self.mutated(Mutation::ForgetResourcesOnDeath);
        let wrong = self.mutated(Mutation::WrongEvidence);
        let lost = self.random.chance(10);
        let Some(raylet) = self.raylets.get_mut(&node) else {
            return;
        };
        let killed = raylet.kill_causes.remove(&worker);
        let cause = killed.unwrap_or_else(|| death(DEATH_CRASHED, "it was killed"));
        let started = raylet.evidence.remove(&worker);
        let started = if wrong { Some(0) } else { started.filter(|_| !lost) };
        if let Some(job) = raylet.drivers.remove(&worker) {
            let report = WorkerDeathReport {
                worker: Some(address(node, worker)),
                cause: Some(cause.clone()),
                driver_job_id: id_bytes(job.as_bytes()),
                ..WorkerDeathReport::default()
            };
            self.report_death(node, report);
            self.ask_gcs(node, Asker::Nobody, WorkerId::NIL, finish_job(job));
        } else if !forget {
            self.raylet_step(
                node,
                SchedulerEvent::WorkerGone {
                    worker,
                    cause,
                    started_sequence: started,
                },
            );
        }
        self.process_is_dead(node, worker);
    }

    pub(crate) fn report_death(&mut self, node: NodeId, report: WorkerDeathReport) {
        // Kept until it is acknowledged: it may be lost with the link, and the control plane takes it twice without harm.
        let Some(raylet) = self.raylets.get_mut(&node) else {
            return;
        };
        let correlation = raylet.next_correlation;
        raylet.next_correlation += 1;
        raylet.deaths.insert(correlation, report.clone());
        self.tell_gcs_if_registered(node, NodeMessage::WorkerDeath { correlation, report });
    }

    /// A process, of this node or another, is known to be dead.
    pub(crate) fn process_is_dead(&mut self, node: NodeId, worker: WorkerId) {
        let forget = self.mutated(Mutation::ForgetWatch);
        let keep_leases = self.mutated(Mutation::ForgetLeasesOfDeadOwner);
        let Some(raylet) = self.raylets.get_mut(&node) else {
            return;
        };
        if !raylet.dead.insert(worker) {
            return;
        }
        raylet.actor_watches.remove(&worker);
        let watchers = raylet.watchers.remove(&worker).unwrap_or_default();
        for others in raylet.watchers.values_mut() {
            others.remove(&worker);
        }
        let elsewhere = raylet.watchers_elsewhere.remove(&worker).unwrap_or_default();
        let owned: Vec<ObjectId> = raylet
            .store
            .iter()
            .filter(|(_, copy)| copy.owner == worker)
            .map(|(object, _)| *object)
            .collect();
        for object in owned {
            raylet.store.remove(&object);
        }
        for watcher in watchers.into_iter().filter(|_| !forget) {
            self.send(
                Place::Raylet(node),
                Place::Process(watcher),
                Message::WorkerDied { worker },
            );
        }
        for other in elsewhere {
            self.send(
                Place::Raylet(node),
                Place::Raylet(other),
                Message::DiedElsewhere { worker },
            );
        }
        if !keep_leases {
            self.raylet_step(node, SchedulerEvent::OwnerGone { process: worker });
        }
    }

    pub(crate) fn node_is_dead(&mut self, node: NodeId, dead: NodeId) {
        let Some(raylet) = self.raylets.get_mut(&node) else {
            return;
        };
        if node == dead || !raylet.dead_nodes.insert(dead) {
            return;
        }
        let stuck: Vec<ObjectId> = raylet
            .pulls
            .iter()
            .filter(|(_, pull)| pull.asked == dead)
            .map(|(object, _)| *object)
            .collect();
        let here: Vec<WorkerId> = self
            .processes
            .values()
            .filter(|process| process.node == node)
            .map(|process| process.id)
            .collect();
        for worker in here {
            self.send(
                Place::Raylet(node),
                Place::Process(worker),
                Message::NodeDied { node: dead },
            );
        }
        let gone: Vec<WorkerId> = self
            .home
            .iter()
            .filter(|(_, home)| **home == dead)
            .map(|(worker, _)| *worker)
            .collect();
        for worker in gone {
            self.process_is_dead(node, worker);
        }
        self.raylet_step(node, SchedulerEvent::NodeGone { node: dead });
        for object in stuck {
            self.pull_answered(node, object, dead, None);
        }
    }
}

pub(crate) fn finish_job(job: JobId) -> GcsCall {
    GcsCall::FinishJob(JobKey {
        job_id: id_bytes(job.as_bytes()),
    })
}

/// The actor that a message names.
pub(crate) fn actor_of(bytes: &[u8]) -> Option<ActorId> {
    ActorId::from_binary(bytes).ok()
}
