//! Randomized histories: raylets that behave as the protocol says, over links that are cut, with nodes and processes
//! that die and a control plane that restarts. After every step the machine is sound; at the end of the unrest both
//! sides agree, and nothing waits that could run.

use std::collections::{BTreeMap, BTreeSet, VecDeque};

use bytes::Bytes;
use ray_gcs::{Event, GcsMessage, GcsSettings, NodeMessage};
use ray_ids::{ActorId, JobId, NodeId, PlacementGroupId, WorkerId};
use ray_sched::{demand_in_group, Allocation, BundleState, NodeResources, ResourceSet, UnitResources};
use ray_wire::*;

use crate::world::*;

struct Instance {
    incarnation: u64,
    worker: WorkerId,
    creating: bool,
    held: Allocation,
}

/// A raylet that does what it is told.
struct Raylet {
    resources: NodeResources,
    instances: BTreeMap<ActorId, Instance>,
    drivers: BTreeSet<u32>,
    watches: BTreeMap<WorkerId, BTreeSet<ActorId>>,
    seen: (u64, u64),
    /// News before were lost with the last link.
    first_news: bool,
    placements_seen: u64,
    report_sequence: u64,
    linked: bool,
    gone: bool,
    up: VecDeque<NodeMessage>,
    down: VecDeque<GcsMessage>,
    /// Reports that must survive a lost link: deaths.
    deaths: Vec<WorkerDeathReport>,
    known: BTreeMap<ActorId, u32>,
}

impl Raylet {
    fn new(cpu: u32) -> Self {
        let total = ResourceSet::cpus(cpu);
        Self {
            resources: NodeResources::new(&total, Default::default(), &UnitResources::default()).unwrap(),
            instances: BTreeMap::new(),
            drivers: BTreeSet::new(),
            watches: BTreeMap::new(),
            seen: (0, 0),
            first_news: true,
            placements_seen: 0,
            report_sequence: 0,
            linked: false,
            gone: false,
            up: VecDeque::new(),
            down: VecDeque::new(),
            deaths: Vec::new(),
            known: BTreeMap::new(),
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

    fn report(&mut self) -> ResourceReport {
        self.report_sequence += 1;
        ResourceReport {
            total: Self::amounts(&self.resources.total_set()),
            available: Self::amounts(&self.resources.available_set()),
            sequence: self.report_sequence,
            placements_seen: self.placements_seen,
            ..ResourceReport::default()
        }
    }

    fn registration(&mut self, id: NodeId) -> RegisterNode {
        (self.placements_seen, self.report_sequence) = (0, 0);
        let actors = self.instances.iter().map(|(actor, instance)| ActorCreated {
            actor_id: bytes(actor.as_bytes()),
            incarnation: instance.incarnation,
            worker: (!instance.creating).then(|| address(id, instance.worker)),
            ..ActorCreated::default()
        });
        let bundles = self
            .resources
            .bundles()
            .filter(|(_, _, state, _)| *state != BundleState::Removing);
        let bundles = bundles.map(|(group, index, state, resources)| BundleKey {
            placement_group_id: bytes(group.as_bytes()),
            index,
            resources: Self::amounts(resources),
            committed: state == BundleState::Committed,
        });
        let watches = self.watches.iter().map(|(worker, actors)| ProcessWatches {
            worker_id: bytes(worker.as_bytes()),
            actor_ids: actors.iter().map(|actor| bytes(actor.as_bytes())).collect(),
            channels: Vec::new(),
        });
        let (actors, bundles, watches) = (actors.collect(), bundles.collect(), watches.collect());
        let plain = |set: &ResourceSet| {
            Self::amounts(set)
                .into_iter()
                .filter(|amount| amount.name == "CPU")
                .collect::<Vec<_>>()
        };
        RegisterNode {
            actors,
            bundles,
            watches,
            driver_jobs: self
                .drivers
                .iter()
                .map(|job| bytes(JobId::from_int(*job).as_bytes()))
                .collect(),
            resources: Some(self.report()),
            publisher_epoch: self.seen.0,
            publisher_sequence: self.seen.1,
            deaths: std::mem::take(&mut self.deaths),
            ..registration(id, plain(&self.resources.total_set()))
        }
    }

    fn end_instance(&mut self, id: NodeId, actor: ActorId, cause: DeathCause) {
        let Some(instance) = self.instances.remove(&actor) else {
            return;
        };
        self.resources.release(instance.held);
        self.died(WorkerDeathReport {
            worker: Some(address(id, instance.worker)),
            cause: Some(cause),
            actor_id: bytes(actor.as_bytes()),
            incarnation: instance.incarnation,
            driver_job_id: Bytes::new(),
        });
    }

    /// Deaths that were under way are reported again: whoever died stays dead.
    fn take_back_deaths(&mut self) {
        for message in self.up.drain(..) {
            match message {
                NodeMessage::WorkerDeath { report, .. } => self.deaths.push(report),
                NodeMessage::Register { message, .. } => self.deaths.extend(message.deaths),
                _ => {}
            }
        }
    }

    fn died(&mut self, report: WorkerDeathReport) {
        if let Some(worker) = report.worker.as_ref().and_then(|worker| worker.worker().ok()) {
            self.watches.remove(&worker);
        }
        self.deaths.push(report);
        self.tell();
    }

    fn tell(&mut self) {
        if self.linked {
            let deaths = self.deaths.drain(..);
            self.up
                .extend(deaths.map(|report| NodeMessage::WorkerDeath { correlation: 0, report }));
            let report = self.report();
            self.up.push_back(NodeMessage::ResourceReport(report));
        }
    }

    fn take(&mut self, id: NodeId, message: GcsMessage, worker: WorkerId) {
        match message {
            GcsMessage::NodeRegistered { message, .. } => {
                assert_eq!(message.refusal, "", "a node that lives is not refused");
                for kill in message.superseded {
                    self.kill(id, kill);
                }
                for job in message.finished_jobs {
                    self.drivers.remove(&JobId::from_binary(&job).unwrap().int());
                }
                self.tell();
            }
            GcsMessage::PlaceActor(create) => self.place(id, *create, worker),
            GcsMessage::KillActorWorker(kill) => self.kill(id, kill),
            GcsMessage::PrepareBundles(prepare) => self.prepare(prepare),
            GcsMessage::CommitBundles(commit) => {
                let group = PlacementGroupId::from_binary(&commit.placement_group_id).unwrap();
                let prepared = |(of, _, state, _): &(PlacementGroupId, u32, BundleState, &ResourceSet)| {
                    *of == group && *state == BundleState::Prepared
                };
                let indices: Vec<u32> = self
                    .resources
                    .bundles()
                    .filter(prepared)
                    .map(|(_, index, _, _)| index)
                    .collect();
                for index in indices {
                    self.resources.commit_bundle(group, index).unwrap();
                }
                let CommitBundles {
                    placement_group_id,
                    attempt,
                } = commit;
                self.up.push_back(NodeMessage::BundlesCommitted(BundlesCommitted {
                    placement_group_id,
                    attempt,
                }));
                self.tell();
            }
            GcsMessage::ReturnBundles(message) => self.give_back(id, &message),
            GcsMessage::Publication(news) => {
                if !self.first_news && news.epoch == self.seen.0 {
                    assert_eq!(news.sequence, self.seen.1 + 1, "a link loses no publication");
                }
                self.first_news = false;
                self.seen = (news.epoch, news.sequence);
                if let Some(actor) = news.actor {
                    self.known
                        .insert(ActorId::from_binary(&actor.actor_id).unwrap(), actor.state);
                }
            }
            GcsMessage::Ping => self.up.push_back(NodeMessage::Pong),
            GcsMessage::DeclaredDead(dead) => panic!("node {id} lives and was declared dead: {}", dead.reason),
            _ => {}
        }
    }

    fn place(&mut self, id: NodeId, create: CreateActor, worker: WorkerId) {
        self.placements_seen += 1;
        let actor = ActorId::from_binary(&create.actor_id).unwrap();
        let creation = create.creation.unwrap();
        let amounts = creation
            .resources
            .iter()
            .map(|amount| (amount.name.as_str(), amount.amount_e4));
        let mut demand = ResourceSet::from_raw(amounts);
        if let Some(strategy) = creation
            .strategy
            .filter(|strategy| strategy.kind == STRATEGY_PLACEMENT_GROUP)
        {
            let group = PlacementGroupId::from_binary(&strategy.placement_group_id).unwrap();
            demand = demand_in_group(&demand, group, u32::try_from(strategy.bundle_index).ok());
        }
        if let Some(old) = self.instances.get(&actor) {
            assert!(old.incarnation < create.incarnation, "an incarnation is placed once");
            self.end_instance(
                id,
                actor,
                DeathCause {
                    kind: DEATH_KILLED,
                    ..DeathCause::default()
                },
            );
        }
        let answer = ActorCreated {
            actor_id: create.actor_id.clone(),
            incarnation: create.incarnation,
            ..ActorCreated::default()
        };
        match self.resources.allocate(&demand) {
            Ok(held) => {
                let instance = Instance {
                    incarnation: create.incarnation,
                    worker,
                    creating: true,
                    held,
                };
                self.instances.insert(actor, instance);
            }
            Err(_) => self.up.push_back(NodeMessage::ActorCreated(ActorCreated {
                rejected: true,
                ..answer
            })),
        }
        self.tell();
    }

    fn finish_creation(&mut self, id: NodeId, actor: ActorId) {
        let Some(instance) = self.instances.get_mut(&actor).filter(|instance| instance.creating) else {
            return;
        };
        instance.creating = false;
        let created = ActorCreated {
            actor_id: bytes(actor.as_bytes()),
            incarnation: instance.incarnation,
            worker: Some(address(id, instance.worker)),
            pid: 1,
            ..ActorCreated::default()
        };
        if self.linked {
            self.up.push_back(NodeMessage::ActorCreated(created));
        }
    }

    fn kill(&mut self, id: NodeId, kill: KillActorWorker) {
        let actor = ActorId::from_binary(&kill.actor_id).unwrap();
        if self
            .instances
            .get(&actor)
            .is_some_and(|instance| instance.incarnation == kill.incarnation)
        {
            self.end_instance(id, actor, kill.cause.unwrap_or_default());
        }
    }

    fn prepare(&mut self, prepare: PrepareBundles) {
        self.placements_seen += 1;
        let group = PlacementGroupId::from_binary(&prepare.bundles[0].placement_group_id).unwrap();
        let mut done = Vec::new();
        let mut success = true;
        for bundle in &prepare.bundles {
            let amounts = bundle
                .resources
                .iter()
                .map(|amount| (amount.name.as_str(), amount.amount_e4));
            if self
                .resources
                .prepare_bundle(group, bundle.index, &ResourceSet::from_raw(amounts))
                .is_err()
            {
                success = false;
                break;
            }
            done.push(bundle.index);
        }
        if !success {
            for index in done {
                self.resources.remove_bundle(group, index);
            }
        }
        let placement_group_id = bytes(group.as_bytes());
        let attempt = prepare.attempt;
        self.up.push_back(NodeMessage::BundlesPrepared(BundlesPrepared {
            placement_group_id,
            attempt,
            success,
        }));
        self.tell();
    }

    fn give_back(&mut self, id: NodeId, message: &ReturnBundles) {
        let group = PlacementGroupId::from_binary(&message.placement_group_id).unwrap();
        let here: Vec<u32> = self
            .resources
            .bundles()
            .filter(|bundle| bundle.0 == group)
            .map(|bundle| bundle.1)
            .collect();
        for index in here {
            if !message.indices.is_empty() && !message.indices.contains(&index) {
                continue;
            }
            let inside = |instance: &Instance| instance.held.bundle() == Some((group, index));
            let actors: Vec<ActorId> = self
                .instances
                .iter()
                .filter(|(_, instance)| inside(instance))
                .map(|(actor, _)| *actor)
                .collect();
            for actor in actors {
                let cause = DeathCause {
                    kind: DEATH_PLACEMENT_GROUP,
                    ..DeathCause::default()
                };
                self.end_instance(id, actor, cause);
            }
            assert!(
                self.resources.remove_bundle(group, index),
                "nothing holds the bundle any more"
            );
        }
        self.tell();
    }
}

struct History {
    world: World,
    raylets: BTreeMap<NodeId, Raylet>,
    seed: u64,
    next_node: u8,
    next_worker: u8,
    next_actor: u8,
    next_group: u8,
    groups: Vec<u8>,
    actors: Vec<ActorId>,
    jobs: BTreeMap<u32, (NodeId, WorkerId)>,
    next_driver: u8,
    /// The node that is never killed and has the first driver.
    head: NodeId,
}

impl History {
    fn new(seed: u64) -> Self {
        let settings = GcsSettings {
            node_reconnect_grace_ms: 2_000,
            maximum_gcs_destroyed_actor_cached_count: 5,
            maximum_gcs_dead_node_cached_count: 3,
            maximum_removed_placement_groups: 3,
            ..GcsSettings::default()
        };
        let mut history = Self {
            world: World::with(settings),
            raylets: BTreeMap::new(),
            seed,
            next_node: 1,
            next_worker: 0,
            next_actor: 0,
            next_group: 0,
            groups: Vec::new(),
            actors: Vec::new(),
            jobs: BTreeMap::new(),
            next_driver: 0,
            head: node_id(1),
        };
        history.world.random = seed;
        for _ in 0..3 {
            history.add_node();
        }
        history.deliver_all();
        history.add_job(node_id(1));
        history
    }

    fn pick(&mut self, count: usize) -> usize {
        (split_mix(&mut self.seed) % count as u64) as usize
    }

    fn add_node(&mut self) {
        if self.next_node > 40 {
            return;
        }
        let id = node_id(self.next_node);
        self.next_node += 1;
        let cpu = 1 + self.pick(4) as u32;
        self.raylets.insert(id, Raylet::new(cpu));
        self.link(id);
    }

    fn link(&mut self, id: NodeId) {
        let Some(raylet) = self.raylets.get_mut(&id).filter(|raylet| !raylet.gone) else {
            return;
        };
        raylet.linked = true;
        raylet.first_news = true;
        raylet.up.clear();
        raylet.down.clear();
        let message = Box::new(raylet.registration(id));
        raylet.up.push_back(NodeMessage::Register {
            correlation: 1,
            message,
        });
        raylet.tell();
    }

    fn cut(&mut self, id: NodeId) {
        let Some(raylet) = self.raylets.get_mut(&id).filter(|raylet| raylet.linked) else {
            return;
        };
        raylet.linked = false;
        raylet.take_back_deaths();
        raylet.down.clear();
        self.world.step(Event::NodeLinkDown {
            node: id,
            reason: "cut".into(),
        });
        self.collect();
    }

    fn kill_node(&mut self, id: NodeId) {
        self.cut(id);
        if let Some(raylet) = self.raylets.get_mut(&id) {
            raylet.gone = true;
        }
        self.jobs.retain(|_, (node, _)| *node != id);
    }

    fn add_job(&mut self, node: NodeId) {
        let Some(raylet) = self
            .raylets
            .get(&node)
            .filter(|raylet| raylet.linked && raylet.up.is_empty())
        else {
            return;
        };
        assert!(!raylet.gone);
        self.next_driver += 1;
        let driver = worker_id(100 + self.next_driver);
        let add = AddJob {
            driver: Some(address(node, driver)),
            ..AddJob::default()
        };
        self.world.request += 1;
        let id = 1_000_000 + self.world.request;
        let reply = self
            .world
            .ask_as(node, driver, id, GcsCall::AddJob(add))
            .expect("an answer");
        self.collect();
        if reply.error.is_empty() {
            let number = reply.number as u32;
            self.jobs.insert(number, (node, driver));
            self.raylets.get_mut(&node).expect("it is there").drivers.insert(number);
        }
    }

    /// Moves what the control plane said onto the links.
    fn collect(&mut self) {
        for (node, message) in std::mem::take(&mut self.world.sent) {
            if let Some(raylet) = self.raylets.get_mut(&node).filter(|raylet| raylet.linked) {
                raylet.down.push_back(message);
            }
        }
        self.world.replies.clear();
        self.world.closed.clear();
    }

    fn ask(&mut self, node: NodeId, worker: WorkerId, call: GcsCall) {
        self.world.request += 1;
        let request_id = 2_000_000 + self.world.request;
        let request = GcsRequest {
            request_id,
            sender: Some(address(node, worker)),
            call: Some(call),
        };
        if let Some(raylet) = self.raylets.get_mut(&node).filter(|raylet| raylet.linked) {
            raylet.up.push_back(NodeMessage::Request {
                correlation: request_id,
                request: Box::new(request),
            });
        }
    }

    fn deliver_up(&mut self, id: NodeId) -> bool {
        let message = self
            .raylets
            .get_mut(&id)
            .filter(|raylet| raylet.linked)
            .and_then(|raylet| raylet.up.pop_front());
        let Some(message) = message else { return false };
        self.world.hear(id, message);
        self.collect();
        true
    }

    fn deliver_down(&mut self, id: NodeId) -> bool {
        self.next_worker = self.next_worker.wrapping_add(1) % 90;
        // Worker ids are never reused, so they carry a number of their own besides.
        let mut worker = [0; WorkerId::SIZE];
        worker[0] = self.next_worker + 1;
        worker[1..9].copy_from_slice(&split_mix(&mut self.seed).to_le_bytes());
        let raylet = self.raylets.get_mut(&id).filter(|raylet| raylet.linked);
        let message = raylet.and_then(|raylet| raylet.down.pop_front());
        let Some(message) = message else { return false };
        if let Some(raylet) = self.raylets.get_mut(&id) {
            raylet.take(id, message, WorkerId::from_array(worker));
        }
        true
    }

    fn deliver_all(&mut self) {
        let ids: Vec<NodeId> = self.raylets.keys().copied().collect();
        for _ in 0..100_000 {
            let mut any = false;
            for id in &ids {
                any |= self.deliver_up(*id) | self.deliver_down(*id);
            }
            if !any {
                return;
            }
        }
        panic!("the messages never end");
    }

    fn random_node(&mut self) -> NodeId {
        let ids: Vec<NodeId> = self
            .raylets
            .iter()
            .filter(|(_, raylet)| !raylet.gone)
            .map(|(id, _)| *id)
            .collect();
        ids[self.pick(ids.len())]
    }

    fn random_job(&mut self) -> Option<(u32, NodeId, WorkerId)> {
        let jobs: Vec<_> = self
            .jobs
            .iter()
            .map(|(job, (node, worker))| (*job, *node, *worker))
            .collect();
        (!jobs.is_empty()).then(|| jobs[self.pick(jobs.len())])
    }

    fn register_actor(&mut self) {
        let Some((job, node, driver)) = self.random_job() else {
            return;
        };
        if self.next_actor == u8::MAX {
            return;
        }
        self.next_actor += 1;
        let id = actor_id(job, self.next_actor);
        let mut creation = creation(address(node, driver), self.pick(3) as i64);
        creation.max_restarts = [0, 1, -1][self.pick(3)];
        creation.detached = self.pick(4) == 0;
        if self.pick(4) == 0 {
            creation.name = format!("name{}", self.pick(3));
        }
        match self.pick(6) {
            0 => {
                let target = self.random_node();
                creation.strategy = Some(Strategy {
                    kind: STRATEGY_NODE_AFFINITY,
                    node_id: bytes(target.as_bytes()),
                    soft: self.pick(2) == 0,
                    ..Strategy::default()
                });
            }
            1 if !self.groups.is_empty() => {
                let group = self.some_group();
                creation.strategy = Some(Strategy {
                    kind: STRATEGY_PLACEMENT_GROUP,
                    placement_group_id: bytes(group_id(group).as_bytes()),
                    bundle_index: self.pick(3) as i32 - 1,
                    ..Strategy::default()
                });
            }
            2 => {
                creation.strategy = Some(Strategy {
                    kind: STRATEGY_SPREAD,
                    ..Strategy::default()
                })
            }
            _ => {}
        }
        self.actors.push(id);
        let register = RegisterActor {
            actor_id: bytes(id.as_bytes()),
            creation: Some(creation),
            get_if_exists: self.pick(3) == 0,
        };
        self.ask(node, driver, GcsCall::RegisterActor(register));
    }

    fn some_group(&mut self) -> u8 {
        let at = self.pick(self.groups.len());
        self.groups[at]
    }

    fn some_actor(&mut self) -> Option<ActorId> {
        if self.actors.is_empty() {
            return None;
        }
        let at = self.pick(self.actors.len());
        Some(self.actors[at])
    }

    fn act(&mut self) {
        let node = self.random_node();
        match self.pick(40) {
            0..=9 => drop(self.deliver_up(node)),
            10..=19 => drop(self.deliver_down(node)),
            20..=22 => self.register_actor(),
            23..=25 => {
                let raylet = &self.raylets[&node];
                let creating: Vec<ActorId> = raylet
                    .instances
                    .iter()
                    .filter(|(_, one)| one.creating)
                    .map(|(id, _)| *id)
                    .collect();
                if !creating.is_empty() {
                    let actor = creating[self.pick(creating.len())];
                    self.raylets
                        .get_mut(&node)
                        .expect("it is there")
                        .finish_creation(node, actor);
                }
            }
            26 => {
                let ids: Vec<ActorId> = self.raylets[&node].instances.keys().copied().collect();
                if !ids.is_empty() {
                    let actor = ids[self.pick(ids.len())];
                    let cause = DeathCause {
                        kind: DEATH_CRASHED,
                        ..DeathCause::default()
                    };
                    self.raylets
                        .get_mut(&node)
                        .expect("it is there")
                        .end_instance(node, actor, cause);
                }
            }
            27 => {
                if let (Some(actor), Some((_, node, driver))) = (self.some_actor(), self.random_job()) {
                    let actor_id = bytes(actor.as_bytes());
                    let call = match self.pick(3) {
                        0 => GcsCall::KillActor(KillActor {
                            actor_id,
                            no_restart: true,
                        }),
                        1 => GcsCall::KillActor(KillActor {
                            actor_id,
                            no_restart: false,
                        }),
                        _ => GcsCall::ActorOutOfScope(ActorKey { actor_id, owner: None }),
                    };
                    self.ask(node, driver, call);
                }
            }
            28 => {
                if let (Some(actor), Some((_, node, driver))) = (self.some_actor(), self.random_job()) {
                    let raylet = self.raylets.get_mut(&node).expect("it is there");
                    raylet.watches.entry(driver).or_default().insert(actor);
                    self.ask(
                        node,
                        driver,
                        GcsCall::WatchActor(ActorKey {
                            actor_id: bytes(actor.as_bytes()),
                            owner: None,
                        }),
                    );
                }
            }
            29 | 30 => {
                if self.next_group < 60 {
                    self.create_group();
                }
            }
            31 => {
                if let (false, Some((_, node, driver))) = (self.groups.is_empty(), self.random_job()) {
                    let group = self.some_group();
                    let placement_group_id = bytes(group_id(group).as_bytes());
                    let key = PlacementGroupKey {
                        placement_group_id,
                        ..PlacementGroupKey::default()
                    };
                    self.ask(node, driver, GcsCall::RemovePlacementGroup(key));
                }
            }
            32 => {
                let wait = self.pick(40) as u64;
                self.world.pass(wait);
                self.collect();
            }
            33 => {
                self.cut(node);
                self.link(node);
            }
            34 if self.pick(3) == 0 && node != self.head => self.kill_node(node),
            34 | 35 => {
                if self.pick(3) == 0 {
                    self.add_node();
                }
            }
            36 if self.pick(4) == 0 => self.restart(),
            37 if self.pick(3) == 0 => self.end_job(),
            38 => self.add_job(node),
            _ => {
                let namespace = Bytes::from_static(b"n");
                let key = Bytes::from(vec![self.pick(5) as u8]);
                if let Some((job, node, driver)) = self.random_job() {
                    let job_id = if self.pick(2) == 0 {
                        bytes(JobId::from_int(job).as_bytes())
                    } else {
                        Bytes::new()
                    };
                    let (value, overwrite) = (key.clone(), self.pick(2) == 0);
                    self.ask(
                        node,
                        driver,
                        GcsCall::KvPut(KvPut {
                            namespace,
                            key,
                            value,
                            overwrite,
                            job_id,
                        }),
                    );
                }
            }
        }
    }

    fn create_group(&mut self) {
        let Some((job, node, driver)) = self.random_job() else {
            return;
        };
        self.next_group += 1;
        self.groups.push(self.next_group);
        let bundles = 1 + self.pick(3);
        let specification = PlacementGroupSpecification {
            placement_group_id: bytes(group_id(self.next_group).as_bytes()),
            bundles: vec![
                BundleSpecification {
                    resources: cpus(1),
                    labels: Vec::new()
                };
                bundles
            ],
            strategy: self.pick(4) as u32,
            detached: self.pick(3) == 0,
            job_id: bytes(JobId::from_int(job).as_bytes()),
            ..PlacementGroupSpecification::default()
        };
        self.ask(node, driver, GcsCall::CreatePlacementGroup(specification));
    }

    fn end_job(&mut self) {
        let Some((job, node, driver)) = self.random_job().filter(|(job, ..)| *job != 1) else {
            return;
        };
        self.jobs.remove(&job);
        let raylet = self.raylets.get_mut(&node).expect("it is there");
        raylet.drivers.remove(&job);
        raylet.died(WorkerDeathReport {
            worker: Some(address(node, driver)),
            cause: Some(DeathCause {
                kind: DEATH_INTENDED,
                ..DeathCause::default()
            }),
            driver_job_id: bytes(JobId::from_int(job).as_bytes()),
            ..WorkerDeathReport::default()
        });
    }

    fn restart(&mut self) {
        let nodes: Vec<NodeId> = self.raylets.keys().copied().collect();
        for raylet in self.raylets.values_mut().filter(|raylet| raylet.linked) {
            raylet.linked = false;
            raylet.take_back_deaths();
            raylet.down.clear();
        }
        self.world.restart();
        self.collect();
        for node in nodes {
            self.link(node);
        }
    }

    /// Lets everything come to rest: every link works, constructors end, time passes.
    fn settle(&mut self) {
        for _ in 0..60 {
            self.deliver_all();
            let nodes: Vec<NodeId> = self.raylets.keys().copied().collect();
            for node in nodes {
                let raylet = self.raylets.get_mut(&node).expect("it is there");
                let ids: Vec<ActorId> = raylet.instances.keys().copied().collect();
                for actor in ids {
                    raylet.finish_creation(node, actor);
                }
            }
            self.deliver_all();
            self.world.pass(500);
            self.collect();
        }
        self.deliver_all();
    }

    fn check_agreement(&mut self) {
        let actors = self.world.query(r#"{"method": "actors"}"#);
        let mut alive = BTreeMap::new();
        for (id, actor) in actors.as_object().unwrap() {
            match actor["State"].as_str().unwrap() {
                "ALIVE" => {
                    let at = (
                        actor["NodeID"].as_str().unwrap().to_string(),
                        actor["Incarnation"].as_u64().unwrap(),
                    );
                    alive.insert(id.clone(), at);
                }
                "DEAD" => {}
                state => {
                    let reason = actor["PendingReason"].as_str().unwrap();
                    let waits =
                        actor["Infeasible"] == true || reason.contains("to be free") || reason.contains("group");
                    assert!(waits, "actor {id} is {state} for no lasting reason: {reason}");
                }
            }
        }
        let mut there = BTreeMap::new();
        for (node, raylet) in self.raylets.iter().filter(|(_, raylet)| !raylet.gone) {
            raylet.resources.validate().unwrap();
            for (id, instance) in &raylet.instances {
                assert!(!instance.creating);
                there.insert(id.hex(), (node.hex(), instance.incarnation));
            }
            for (driver, watched) in &raylet.watches {
                for actor in watched {
                    let state = actors.get(actor.hex()).map(|actor| actor["State"].as_str().unwrap());
                    let known = raylet.known.get(actor).copied();
                    match state {
                        Some("ALIVE") => assert_eq!(known, Some(ACTOR_ALIVE), "{driver} was not told of {actor}"),
                        Some("DEAD") => assert_eq!(known, Some(ACTOR_DEAD), "{driver} was not told of {actor}"),
                        _ => {}
                    }
                }
            }
        }
        assert_eq!(alive, there, "the control plane and the nodes know the same instances");
        let groups = self.world.query(r#"{"method": "placement_groups"}"#);
        let mut placed = BTreeSet::new();
        for (id, group) in groups.as_object().unwrap() {
            let reason = group["pending_reason"].as_str().unwrap();
            let state = group["state"].as_str().unwrap();
            let lasting = group["infeasible"] == true || reason.contains("to be free");
            assert!(
                ["CREATED", "REMOVED"].contains(&state) || lasting,
                "group {id} is {state}: {reason}"
            );
            for (index, node) in group["bundles_to_node_id"].as_object().unwrap() {
                let node = node.as_str().unwrap();
                if !node.is_empty() {
                    placed.insert((id.clone(), index.parse::<u32>().unwrap(), node.to_string()));
                }
            }
        }
        let mut held = BTreeSet::new();
        for (node, raylet) in self.raylets.iter().filter(|(_, raylet)| !raylet.gone) {
            for (group, index, state, _) in raylet.resources.bundles() {
                assert_eq!(state, BundleState::Committed);
                held.insert((group.hex(), index, node.hex()));
            }
        }
        assert_eq!(placed, held, "the control plane and the nodes know the same bundles");
        // With everything reported, the optimistic view is the real one.
        let available = self.world.query(r#"{"method": "available_resources_per_node"}"#);
        for (node, raylet) in self.raylets.iter().filter(|(_, raylet)| !raylet.gone) {
            let free = raylet.resources.available(&ray_sched::ResourceName::CPU).to_f64();
            assert_eq!(
                available[node.hex()]["CPU"].as_f64().unwrap_or(0.0),
                free,
                "of node {node}"
            );
        }
    }
}

fn run(seed: u64, steps: usize) {
    let mut history = History::new(seed);
    for round in 0..3 {
        for _ in 0..steps {
            history.act();
        }
        let unlinked: Vec<NodeId> = history.raylets.keys().copied().collect();
        for node in unlinked {
            if !history.raylets[&node].linked {
                history.link(node);
            }
        }
        history.settle();
        let result = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| history.check_agreement()));
        assert!(result.is_ok(), "seed {seed}, round {round}");
    }
}

#[test]
fn control_plane_and_nodes_agree_after_any_unrest() {
    let first: u64 = std::env::var("GCS_HISTORY_SEED")
        .ok()
        .and_then(|text| text.parse().ok())
        .unwrap_or(1);
    let count: u64 = std::env::var("GCS_HISTORIES")
        .ok()
        .and_then(|text| text.parse().ok())
        .unwrap_or(15);
    for seed in first..first + count {
        run(seed, 400);
    }
}
