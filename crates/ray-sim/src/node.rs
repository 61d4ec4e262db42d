//! The shell of a raylet: owns its scheduler, its node's store, who watches whom, and the link to the control plane.
//!
//! What the shell adds to the machines, and the real one must add too: it asks the raylet of a watched process again after
//! it was cut off from the control plane, because a notice of death may have been lost meanwhile.
//!
//! Invariant: 1. A worker hears of its lease before its owner does: the assignment is sent first.

use std::collections::{BTreeMap, BTreeSet};
use std::rc::Rc;

use ray_gcs::{GcsMessage, NodeMessage};
use ray_ids::{ActorId, JobId, NodeId, ObjectId, WorkerId};
use ray_raylet::scheduler::LocalScheduler;
use ray_raylet::types::{death, Command, Event as SchedulerEvent, SchedulerConfig, SchedulerLimits};
use ray_sched::{Labels, ResourceSet};
use ray_wire::{
    id_bytes, ActorCreated, Address, DeathCause, GcsCall, GcsReply, GcsRequest, JobKey, NodeInfo, ProcessWatches,
    RegisterNode, ResourceAmount, ResourceReport, WorkerDeathReport, DEATH_CRASHED,
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
enum Asker {
    Process(WorkerId),
    Driver(WorkerId),
    Nobody,
}

/// A raylet.
#[derive(Debug)]
pub struct Raylet {
    pub(crate) node: NodeId,
    pub(crate) scheduler: LocalScheduler,
    total: ResourceSet,
    tick_at: Option<u64>,
    report_due: bool,
    pub(crate) registered: bool,
    connecting: bool,
    ever_registered: bool,
    pending: BTreeMap<u64, (Asker, GcsRequest)>,
    next_correlation: u64,
    actor_watches: BTreeMap<WorkerId, BTreeSet<Vec<u8>>>,
    deaths: Vec<WorkerDeathReport>,
    report_sequence: u64,
    placements_seen: u64,
    last_report: Option<ResourceReport>,
    publisher: (u64, u64),
    watchers: BTreeMap<WorkerId, BTreeSet<WorkerId>>,
    /// Watches of other nodes' raylets on processes here.
    watchers_elsewhere: BTreeMap<WorkerId, BTreeSet<NodeId>>,
    dead: BTreeSet<WorkerId>,
    dead_nodes: BTreeSet<NodeId>,
    pub(crate) drivers: BTreeMap<WorkerId, JobId>,
    /// Processes of other nodes that asked for leases here.
    remote_owners: BTreeSet<WorkerId>,
    kill_causes: BTreeMap<WorkerId, DeathCause>,
    /// The workers' own words: the sequence started last.
    pub(crate) evidence: BTreeMap<WorkerId, u64>,
    pub(crate) store: BTreeMap<ObjectId, Copy>,
    pulls: BTreeMap<ObjectId, Pull>,
}

#[derive(Debug)]
struct Pull {
    waiters: BTreeSet<WorkerId>,
    candidates: Vec<NodeId>,
    absent: Vec<NodeId>,
    asked: NodeId,
}

impl Raylet {
    /// Processes whose deaths matter here.
    fn remote_interest(&self, node: NodeId) -> BTreeSet<WorkerId> {
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

fn amounts(set: &ResourceSet) -> Vec<ResourceAmount> {
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
            deaths: Vec::new(),
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

    // --- the control plane's link ---

    pub(crate) fn connect_gcs(&mut self, node: NodeId) {
        let Some(raylet) = self.raylets.get(&node) else { return };
        if raylet.registered || raylet.connecting {
            return;
        }
        if !self.control.is_up() {
            let delay = self.random.between(5, 50) * MS;
            return self.at(delay, Event::ConnectGcs(node));
        }
        self.cut(Place::Raylet(node), Place::Gcs);
        let epoch = self.link_epoch(Place::Raylet(node), Place::Gcs);
        self.gcs_link_up(node, epoch);
        let message = self.registration(node);
        self.to_gcs(
            node,
            NodeMessage::Register {
                correlation: 1,
                message: Box::new(message),
            },
        );
        if let Some(raylet) = self.raylets.get_mut(&node) {
            raylet.connecting = true;
        }
    }

    fn registration(&mut self, node: NodeId) -> RegisterNode {
        let is_head = node == self.head || self.head.is_nil();
        let Some(raylet) = self.raylets.get_mut(&node) else {
            return RegisterNode::default();
        };
        raylet.placements_seen = 0;
        raylet.report_sequence += 1;
        let mut report = raylet.scheduler.resource_report();
        report.sequence = raylet.report_sequence;
        let watches = raylet.actor_watches.iter().map(|(worker, actors)| ProcessWatches {
            worker_id: id_bytes(worker.as_bytes()),
            actor_ids: actors.iter().map(|actor| id_bytes(actor)).collect(),
            channels: Vec::new(),
        });
        RegisterNode {
            node: Some(NodeInfo {
                address: Some(address(node, WorkerId::NIL)),
                total: amounts(&raylet.total),
                available: amounts(&raylet.total),
                is_head,
                alive: true,
                ..NodeInfo::default()
            }),
            actors: raylet.scheduler.actors_here(),
            bundles: raylet.scheduler.bundle_keys(),
            resources: Some(report),
            driver_jobs: raylet.drivers.values().map(|job| id_bytes(job.as_bytes())).collect(),
            publisher_epoch: raylet.publisher.0,
            publisher_sequence: raylet.publisher.1,
            watches: watches.collect(),
        }
    }

    /// The raylet notices that its link is gone, and will open another.
    pub(crate) fn raylet_lost_gcs(&mut self, node: NodeId) {
        let Some(raylet) = self.raylets.get_mut(&node) else {
            return;
        };
        raylet.registered = false;
        raylet.connecting = false;
        raylet.last_report = None;
        let delay = self.random.between(2, 80) * MS;
        self.at(delay, Event::ConnectGcs(node));
    }

    /// The link breaks: both sides notice, each in its time.
    pub(crate) fn break_gcs_link(&mut self, node: NodeId) {
        if !self.control.is_up() || self.raylets.get(&node).is_none_or(|raylet| !raylet.registered) {
            return;
        }
        self.truth.breaks += 1;
        let epoch = self.link_epoch(Place::Raylet(node), Place::Gcs);
        self.cut(Place::Raylet(node), Place::Gcs);
        let delay = self.random.between(1, 50) * MS;
        self.at(delay, Event::GcsLinkDown { node, epoch });
        self.raylet_lost_gcs(node);
    }

    fn to_gcs(&mut self, node: NodeId, message: NodeMessage) {
        self.send(Place::Raylet(node), Place::Gcs, Message::ToGcs(Box::new(message)));
    }

    fn to_gcs_if_registered(&mut self, node: NodeId, message: NodeMessage) {
        if self.raylets.get(&node).is_some_and(|raylet| raylet.registered) {
            self.to_gcs(node, message);
        }
    }

    fn ask_gcs(&mut self, node: NodeId, asker: Asker, sender: WorkerId, call: GcsCall) {
        let request_id = self.random.next_u64().max(1);
        let Some(raylet) = self.raylets.get_mut(&node) else {
            return;
        };
        let request = GcsRequest {
            request_id,
            sender: Some(address(node, sender)),
            call: Some(call),
        };
        let correlation = raylet.next_correlation;
        raylet.next_correlation += 1;
        raylet.pending.insert(correlation, (asker, request.clone()));
        self.to_gcs_if_registered(
            node,
            NodeMessage::Request {
                correlation,
                request: Box::new(request),
            },
        );
    }

    fn gcs_registered(&mut self, node: NodeId, message: ray_wire::NodeRegistered) {
        if !message.refusal.is_empty() {
            return self.kill_node(node);
        }
        let forget = self.mutated(Mutation::ForgetWatchAfterReconnection);
        let forget_requests = self.mutated(Mutation::ForgetGcsRequest);
        let lose_reports = self.mutated(Mutation::LoseDeathReport);
        let Some(raylet) = self.raylets.get_mut(&node) else {
            return;
        };
        raylet.registered = true;
        raylet.connecting = false;
        if raylet.publisher.0 != message.publisher_epoch {
            raylet.publisher = (message.publisher_epoch, 0);
        }
        let again: Vec<(u64, GcsRequest)> = raylet
            .pending
            .iter()
            .map(|(id, (_, request))| (*id, request.clone()))
            .collect();
        let deaths = raylet.deaths.clone();
        let watched = raylet.remote_interest(node);
        let known = raylet.ever_registered;
        raylet.ever_registered = true;
        for info in &message.nodes {
            if let Some(id) = info
                .address
                .as_ref()
                .and_then(|address| address.node().ok())
                .filter(|_| !info.alive)
            {
                self.node_is_dead(node, id);
            }
        }
        self.raylet_step(node, SchedulerEvent::ClusterChanged { nodes: message.nodes });
        for message in message.superseded {
            self.raylet_step(node, SchedulerEvent::KillActorWorker { message });
        }
        for job in message
            .finished_jobs
            .iter()
            .filter_map(|job| JobId::from_binary(job).ok())
        {
            self.job_is_over(node, job);
        }
        if !(known && forget_requests) {
            for (correlation, request) in again {
                self.to_gcs(
                    node,
                    NodeMessage::Request {
                        correlation,
                        request: Box::new(request),
                    },
                );
            }
        }
        for report in deaths.into_iter().filter(|_| !lose_reports) {
            self.to_gcs(node, NodeMessage::WorkerDeath(report));
        }
        for worker in watched.into_iter().filter(|_| known && !forget) {
            self.watch_elsewhere(node, worker);
        }
        self.report_soon(node);
    }

    fn watch_elsewhere(&mut self, node: NodeId, worker: WorkerId) {
        let home = self.node_of(Place::Process(worker));
        if home == node {
            return;
        }
        let dead = self
            .raylets
            .get(&node)
            .is_some_and(|raylet| raylet.dead_nodes.contains(&home));
        if dead {
            return self.process_is_dead(node, worker);
        }
        self.send(
            Place::Raylet(node),
            Place::Raylet(home),
            Message::WatchElsewhere { worker },
        );
    }

    fn report_soon(&mut self, node: NodeId) {
        if let Some(raylet) = self.raylets.get_mut(&node) {
            if !std::mem::replace(&mut raylet.report_due, true) {
                self.at(10 * MS, Event::RayletReport(node));
            }
        }
    }

    pub(crate) fn raylet_report(&mut self, node: NodeId) {
        let Some(raylet) = self.raylets.get_mut(&node) else {
            return;
        };
        raylet.report_due = false;
        if !raylet.registered {
            return;
        }
        let mut report = raylet.scheduler.resource_report();
        report.placements_seen = raylet.placements_seen;
        if raylet.last_report.as_ref() == Some(&report) {
            return;
        }
        raylet.last_report = Some(report.clone());
        raylet.report_sequence += 1;
        report.sequence = raylet.report_sequence;
        self.to_gcs(node, NodeMessage::ResourceReport(report));
    }

    fn from_gcs(&mut self, node: NodeId, message: GcsMessage) {
        match message {
            GcsMessage::NodeRegistered { message, .. } => self.gcs_registered(node, *message),
            GcsMessage::ClusterUpdate(update) => {
                self.raylet_step(node, SchedulerEvent::ClusterChanged { nodes: update.nodes });
            }
            GcsMessage::NodeDied(died) => {
                if let Ok(dead) = NodeId::from_binary(&died.node_id) {
                    self.node_is_dead(node, dead);
                }
            }
            GcsMessage::Publication(publication) => {
                if let Some(raylet) = self.raylets.get_mut(&node) {
                    raylet.publisher = (publication.epoch, raylet.publisher.1.max(publication.sequence));
                }
                let Some(state) = publication.actor else { return };
                for worker in publication
                    .subscribers
                    .iter()
                    .filter_map(|id| WorkerId::from_binary(id).ok())
                {
                    let message = Message::Publication(Box::new(state.clone()));
                    self.send(Place::Raylet(node), Place::Process(worker), message);
                }
            }
            GcsMessage::PlaceActor(message) => {
                if let Some(raylet) = self.raylets.get_mut(&node) {
                    raylet.placements_seen += 1;
                }
                self.raylet_step(node, SchedulerEvent::PlaceActor { message: *message });
            }
            GcsMessage::KillActorWorker(message) => {
                if !self.mutated(Mutation::LoseKillActor) {
                    self.raylet_step(node, SchedulerEvent::KillActorWorker { message });
                }
            }
            GcsMessage::WorkerDied(died) => {
                if let Some(worker) = died.worker.as_ref().and_then(|address| address.worker().ok()) {
                    self.process_is_dead(node, worker);
                }
            }
            GcsMessage::JobFinished(message) => {
                if let Ok(job) = JobId::from_binary(&message.job_id) {
                    self.job_is_over(node, job);
                }
            }
            GcsMessage::DeclaredDead(_) => self.kill_node(node),
            GcsMessage::Ping => self.to_gcs(node, NodeMessage::Pong),
            _ => {}
        }
    }

    fn job_is_over(&mut self, node: NodeId, job: JobId) {
        let driver = self.raylets.get(&node).and_then(|raylet| {
            raylet
                .drivers
                .iter()
                .find(|(_, of)| **of == job)
                .map(|(driver, _)| *driver)
        });
        if let Some(driver) = driver {
            self.kill_process(driver);
        }
        self.raylet_step(node, SchedulerEvent::JobFinished { job });
    }

    fn gcs_answer(&mut self, node: NodeId, correlation: u64, reply: GcsReply) {
        let Some((asker, _)) = self
            .raylets
            .get_mut(&node)
            .and_then(|raylet| raylet.pending.remove(&correlation))
        else {
            return;
        };
        match asker {
            Asker::Process(worker) => {
                let message = Message::GcsAnswer { reply: Box::new(reply) };
                self.send(Place::Raylet(node), Place::Process(worker), message);
            }
            Asker::Driver(worker) => self.job_added(node, worker, JobId::from_int(reply.number as u32)),
            Asker::Nobody => {}
        }
    }

    // --- processes ---

    /// A driver registers here.
    pub(crate) fn add_driver(&mut self, node: NodeId, worker: WorkerId) {
        let add = ray_wire::AddJob {
            driver: Some(address(node, worker)),
            ..ray_wire::AddJob::default()
        };
        self.ask_gcs(node, Asker::Driver(worker), WorkerId::NIL, GcsCall::AddJob(add));
    }

    fn job_added(&mut self, node: NodeId, worker: WorkerId, job: JobId) {
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

    fn report_death(&mut self, node: NodeId, report: WorkerDeathReport) {
        // Kept for the next registration also where it is sent now: it may be lost with the link, and the control plane
        // takes it twice without harm.
        let Some(raylet) = self.raylets.get_mut(&node) else {
            return;
        };
        raylet.deaths.push(report.clone());
        self.to_gcs_if_registered(node, NodeMessage::WorkerDeath(report));
    }

    /// A process, of this node or another, is known to be dead.
    fn process_is_dead(&mut self, node: NodeId, worker: WorkerId) {
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

    fn node_is_dead(&mut self, node: NodeId, dead: NodeId) {
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

    // --- the scheduler ---

    pub(crate) fn raylet_tick(&mut self, node: NodeId) {
        if let Some(raylet) = self.raylets.get_mut(&node) {
            raylet.tick_at = None;
        }
        self.raylet_step(node, SchedulerEvent::Tick);
    }

    pub(crate) fn raylet_step(&mut self, node: NodeId, event: SchedulerEvent) {
        let now_ms = self.now / MS;
        let Some(raylet) = self.raylets.get_mut(&node) else {
            return;
        };
        let commands = raylet.scheduler.step(event, now_ms);
        if let Err(error) = raylet.scheduler.validate() {
            return self.fail(format!("the raylet of {node}: {error}"));
        }
        for command in commands {
            self.raylet_carry_out(node, command);
        }
        self.report_soon(node);
        let now = self.now;
        let Some(raylet) = self.raylets.get_mut(&node) else {
            return;
        };
        if let Some(at_ms) = raylet.scheduler.next_tick(now_ms) {
            let at = (at_ms * MS).max(now + 1);
            if raylet.tick_at.is_none_or(|known| at < known) {
                raylet.tick_at = Some(at);
                self.at(at - now, Event::RayletTick(node));
            }
        }
    }

    fn raylet_carry_out(&mut self, node: NodeId, command: Command) {
        let here = Place::Raylet(node);
        match command {
            Command::Grant {
                key,
                lease,
                worker,
                first_sequence,
            } => {
                let (correlation, to) = (key.correlation, Place::Process(key.process));
                let message = Message::LeaseGranted {
                    correlation,
                    lease,
                    worker,
                    node,
                    first_sequence,
                };
                if self.mutated_sometimes(Mutation::LoseGrant) {
                    return;
                }
                if self.mutated_sometimes(Mutation::DoubleGrant) {
                    self.grant_again(node, &message, key.process);
                }
                self.send(here, to, message);
            }
            Command::Redirect { key, node: to } => {
                let message = Message::LeaseRedirected {
                    correlation: key.correlation,
                    node: to,
                };
                self.send(here, Place::Process(key.process), message);
            }
            Command::Refuse { key, .. } => {
                let message = Message::LeaseRefused {
                    correlation: key.correlation,
                };
                self.send(here, Place::Process(key.process), message);
            }
            Command::Queued { key, .. } => {
                let message = Message::LeaseQueued {
                    correlation: key.correlation,
                };
                self.send(here, Place::Process(key.process), message);
            }
            Command::Recall { owner, lease } => self.send(here, Place::Process(owner), Message::RecallLease { lease }),
            Command::AssignLease { worker, lease, .. } => {
                self.send(
                    here,
                    Place::Process(worker),
                    Message::LeaseAssigned { lease: Some(lease) },
                );
            }
            Command::UnassignLease { worker } => {
                self.send(here, Place::Process(worker), Message::LeaseAssigned { lease: None });
            }
            Command::StartWorker { worker, .. } => {
                let delay = self.random.between(2, 40) * MS;
                self.at(delay, Event::WorkerStarted { node, worker });
            }
            Command::AskToExit { worker, .. } => self.send(here, Place::Process(worker), Message::ExitProcess),
            Command::KillWorker { worker, cause } => {
                let Some(raylet) = self.raylets.get_mut(&node) else {
                    return;
                };
                raylet.kill_causes.entry(worker).or_insert(cause);
                if self.processes.contains_key(&worker) {
                    self.kill_process(worker);
                } else {
                    // It has not registered yet, or is dead already.
                    self.at(MS, Event::WorkerEnded { node, worker });
                }
            }
            Command::LeaseBroken {
                owner,
                lease,
                started_sequence,
                ..
            } => {
                if !self.mutated(Mutation::LoseLeaseBroken) {
                    let message = Message::LeaseBroken {
                        lease,
                        started: started_sequence,
                    };
                    self.send(here, Place::Process(owner), message);
                }
            }
            Command::CreateActor { worker, message } => {
                self.send(here, Place::Process(worker), Message::CreateActor(message));
            }
            Command::AnswerActor(message) => self.to_gcs_if_registered(node, NodeMessage::ActorCreated(*message)),
            Command::ReportDeath { worker, cause, actor } => {
                let (actor_id, incarnation) = match actor {
                    Some((actor, incarnation)) => (id_bytes(actor.as_bytes()), incarnation),
                    None => (bytes::Bytes::new(), 0),
                };
                let worker = Some(address(node, worker));
                let report = WorkerDeathReport {
                    worker,
                    cause: Some(cause),
                    actor_id,
                    incarnation,
                    ..Default::default()
                };
                self.report_death(node, report);
            }
            Command::AnswerBundlesPrepared { .. }
            | Command::AnswerBundlesCommitted { .. }
            | Command::AskPlacementGroup { .. } => {
                self.fail("no program of the simulation makes placement groups");
            }
        }
    }

    /// The mutation that gives one lease to two owners.
    fn grant_again(&mut self, node: NodeId, message: &Message, first: WorkerId) {
        let other = self.processes.iter().find_map(|(id, process)| {
            let correlation = *process.requests.iter().find(|(_, (_, at))| *at == node)?.0;
            (*id != first).then_some((*id, correlation))
        });
        if let (
            Some((other, correlation)),
            Message::LeaseGranted {
                lease,
                worker,
                first_sequence,
                ..
            },
        ) = (other, message)
        {
            let again = Message::LeaseGranted {
                correlation,
                lease: *lease,
                worker: *worker,
                node,
                first_sequence: *first_sequence,
            };
            self.send(Place::Raylet(node), Place::Process(other), again);
        }
    }

    pub(crate) fn raylet_message(&mut self, node: NodeId, from: Place, message: Message) {
        let sender = match from {
            Place::Process(worker) => worker,
            _ => WorkerId::NIL,
        };
        match message {
            Message::RequestLease {
                key,
                specification,
                redirected,
            } => {
                if self.node_of(from) != node {
                    if let Some(raylet) = self.raylets.get_mut(&node) {
                        raylet.remote_owners.insert(sender);
                    }
                }
                let event = SchedulerEvent::RequestLease {
                    key,
                    specification,
                    preferred: None,
                    redirected,
                };
                self.raylet_step(node, event);
                // The owner may have died before its request arrived.
                if self
                    .raylets
                    .get(&node)
                    .is_some_and(|raylet| raylet.dead.contains(&sender))
                {
                    self.raylet_step(node, SchedulerEvent::OwnerGone { process: sender });
                }
            }
            Message::CancelRequest { key } => self.raylet_step(node, SchedulerEvent::CancelRequest { key }),
            Message::ReturnLease { lease, worker_exits } => {
                self.raylet_step(
                    node,
                    SchedulerEvent::ReturnLease {
                        owner: sender,
                        lease,
                        worker_exits,
                    },
                );
            }
            Message::WorkerBlocked { lease } => {
                self.raylet_step(
                    node,
                    SchedulerEvent::Blocked {
                        worker: sender,
                        lease,
                        reason: "get".into(),
                    },
                );
            }
            Message::WorkerUnblocked { lease } => {
                self.raylet_step(node, SchedulerEvent::Unblocked { worker: sender, lease });
            }
            Message::WatchWorker { worker } => self.watch(node, sender, worker),
            Message::GcsCall { call } => {
                if let GcsCall::WatchActor(key) = &*call {
                    if let Some(raylet) = self.raylets.get_mut(&node) {
                        raylet
                            .actor_watches
                            .entry(sender)
                            .or_default()
                            .insert(key.actor_id.to_vec());
                    }
                }
                self.ask_gcs(node, Asker::Process(sender), sender, *call);
            }
            Message::ActorCreated(created) => {
                let message = ActorCreated {
                    worker: Some(address(node, sender)),
                    ..created
                };
                self.raylet_step(
                    node,
                    SchedulerEvent::ActorAnswered {
                        worker: sender,
                        message,
                    },
                );
            }
            Message::FreeObjects { object } => {
                if let Some(raylet) = self.raylets.get_mut(&node) {
                    raylet.store.remove(&object);
                }
            }
            Message::FetchObject { object, locations } => self.fetch(node, sender, object, locations),
            Message::WatchElsewhere { worker } => {
                let Place::Raylet(other) = from else { return };
                let alive = self.processes.contains_key(&worker);
                let Some(raylet) = self.raylets.get_mut(&node) else {
                    return;
                };
                if alive || !raylet.dead.contains(&worker) {
                    raylet.watchers_elsewhere.entry(worker).or_default().insert(other);
                } else {
                    self.send(Place::Raylet(node), from, Message::DiedElsewhere { worker });
                }
            }
            Message::DiedElsewhere { worker } => self.process_is_dead(node, worker),
            Message::Pull { object } => {
                let contents = self.raylets.get(&node).and_then(|raylet| raylet.store.get(&object));
                let contents = contents.map(|copy| copy.contents.clone());
                self.send(Place::Raylet(node), from, Message::Pulled { object, contents });
            }
            Message::Pulled { object, contents } => {
                if let Place::Raylet(other) = from {
                    self.pull_answered(node, object, other, contents);
                }
            }
            Message::FromGcs(message) => self.from_gcs(node, *message),
            Message::GcsReply { correlation, reply } => self.gcs_answer(node, correlation, *reply),
            _ => self.fail(format!("a raylet got {message:?}")),
        }
    }

    fn watch(&mut self, node: NodeId, watcher: WorkerId, worker: WorkerId) {
        let home = self.node_of(Place::Process(worker));
        let gone_here = home == node && !self.processes.contains_key(&worker);
        let Some(raylet) = self.raylets.get_mut(&node) else {
            return;
        };
        let dead = raylet.dead.contains(&worker) || raylet.dead_nodes.contains(&home) || gone_here;
        if dead {
            if !self.mutated(Mutation::ForgetWatch) {
                self.send(
                    Place::Raylet(node),
                    Place::Process(watcher),
                    Message::WorkerDied { worker },
                );
            }
            return;
        }
        raylet.watchers.entry(worker).or_default().insert(watcher);
        if home != node {
            self.watch_elsewhere(node, worker);
        }
    }

    // --- the store ---

    fn fetch(&mut self, node: NodeId, process: WorkerId, object: ObjectId, locations: Vec<NodeId>) {
        let Some(raylet) = self.raylets.get_mut(&node) else {
            return;
        };
        if raylet.store.contains_key(&object) {
            let message = Message::ObjectLocal { object };
            return self.send(Place::Raylet(node), Place::Process(process), message);
        }
        if let Some(pull) = raylet.pulls.get_mut(&object) {
            pull.waiters.insert(process);
            return;
        }
        let waiters = BTreeSet::from([process]);
        let pull = Pull {
            waiters,
            candidates: locations,
            absent: Vec::new(),
            asked: NodeId::NIL,
        };
        raylet.pulls.insert(object, pull);
        self.pull_next(node, object);
    }

    fn pull_next(&mut self, node: NodeId, object: ObjectId) {
        loop {
            let Some(raylet) = self.raylets.get_mut(&node) else {
                return;
            };
            let Some(pull) = raylet.pulls.get_mut(&object) else {
                return;
            };
            let Some(next) = pull.candidates.pop() else {
                let Some(pull) = raylet.pulls.remove(&object) else {
                    return;
                };
                for process in pull.waiters {
                    let message = Message::FetchFailed {
                        object,
                        absent: pull.absent.clone(),
                    };
                    self.send(Place::Raylet(node), Place::Process(process), message);
                }
                return;
            };
            if next == node || raylet.dead_nodes.contains(&next) {
                pull.absent.push(next);
                continue;
            }
            pull.asked = next;
            return self.send(Place::Raylet(node), Place::Raylet(next), Message::Pull { object });
        }
    }

    fn pull_answered(&mut self, node: NodeId, object: ObjectId, from: NodeId, contents: Option<Rc<[Reference]>>) {
        let owner = self.truth_owner(&object);
        let Some(raylet) = self.raylets.get_mut(&node) else {
            return;
        };
        let Some(pull) = raylet.pulls.get_mut(&object).filter(|pull| pull.asked == from) else {
            return;
        };
        let Some(contents) = contents else {
            pull.absent.push(from);
            return self.pull_next(node, object);
        };
        let waiters = std::mem::take(&mut pull.waiters);
        raylet.pulls.remove(&object);
        // A copy whose owner is known to be dead would be freed by nobody. The owner hears of the copy from here and not
        // from whoever fetched it, because that process may die before it could say so.
        if !raylet.dead.contains(&owner) {
            raylet.store.insert(object, Copy { owner, contents });
            self.send(
                Place::Raylet(node),
                Place::Process(owner),
                Message::AddLocation { object, node },
            );
        }
        for process in waiters {
            self.send(
                Place::Raylet(node),
                Place::Process(process),
                Message::ObjectLocal { object },
            );
        }
    }

    /// A process of the node seals an object in its store.
    pub(crate) fn seal(&mut self, node: NodeId, object: ObjectId, owner: WorkerId, contents: Rc<[Reference]>) {
        if let Some(raylet) = self.raylets.get_mut(&node) {
            if !raylet.dead.contains(&owner) {
                raylet.store.insert(object, Copy { owner, contents });
            }
        }
    }
}

fn finish_job(job: JobId) -> GcsCall {
    GcsCall::FinishJob(JobKey {
        job_id: id_bytes(job.as_bytes()),
    })
}

/// The actor that a message names.
pub(crate) fn actor_of(bytes: &[u8]) -> Option<ActorId> {
    ActorId::from_binary(bytes).ok()
}
