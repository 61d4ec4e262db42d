//! What the tests of the machine share: a control plane with its stored rows, and builders of messages.

use std::collections::BTreeMap;

use bytes::Bytes;
use ray_gcs::{Command, Event, Gcs, GcsMessage, GcsSettings, NodeMessage, Row, Table};
use ray_ids::{ActorId, JobId, NodeId, PlacementGroupId, WorkerId};
use ray_wire::*;

pub fn node_id(number: u8) -> NodeId {
    NodeId::from_array([number; NodeId::SIZE])
}

pub fn worker_id(number: u8) -> WorkerId {
    WorkerId::from_array([number; WorkerId::SIZE])
}

pub fn actor_id(job: u32, number: u8) -> ActorId {
    ActorId::of(JobId::from_int(job), [number; 12])
}

pub fn group_id(number: u8) -> PlacementGroupId {
    let mut id = [number; PlacementGroupId::SIZE];
    id[14..].copy_from_slice(JobId::from_int(1).as_bytes());
    PlacementGroupId::from_array(id)
}

pub fn bytes(id: &[u8]) -> Bytes {
    Bytes::copy_from_slice(id)
}

pub fn address(node: NodeId, worker: WorkerId) -> Address {
    Address {
        node_id: bytes(node.as_bytes()),
        worker_id: bytes(worker.as_bytes()),
        host: "127.0.0.1".into(),
        port: 1,
    }
}

pub fn cpus(count: i64) -> Vec<ResourceAmount> {
    amount("CPU", count)
}

pub fn amount(name: &str, count: i64) -> Vec<ResourceAmount> {
    if count == 0 {
        return Vec::new();
    }
    vec![ResourceAmount {
        name: name.into(),
        amount_e4: count * 10_000,
    }]
}

pub fn registration(node: NodeId, total: Vec<ResourceAmount>) -> RegisterNode {
    let info = NodeInfo {
        address: Some(address(node, WorkerId::NIL)),
        total: total.clone(),
        ..NodeInfo::default()
    };
    let resources = ResourceReport {
        total: total.clone(),
        available: total,
        sequence: 1,
        ..ResourceReport::default()
    };
    RegisterNode {
        node: Some(info),
        resources: Some(resources),
        ..RegisterNode::default()
    }
}

pub fn creation(owner: Address, cpu: i64) -> ActorCreation {
    ActorCreation {
        call: Some(PushTask::default()),
        payload: Bytes::from_static(b"arguments"),
        owner: Some(owner),
        resources: cpus(cpu),
        placement_resources: cpus(cpu.max(1)),
        class_name: "A".into(),
        ..ActorCreation::default()
    }
}

pub fn split_mix(state: &mut u64) -> u64 {
    *state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let mut mixed = *state;
    mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    mixed ^ (mixed >> 31)
}

/// A control plane, what it stored and what it said.
pub struct World {
    pub gcs: Gcs,
    pub now: u64,
    pub random: u64,
    pub rows: BTreeMap<(Table, Bytes), Bytes>,
    pub sent: Vec<(NodeId, GcsMessage)>,
    pub replies: Vec<(NodeId, u64, GcsReply)>,
    pub closed: Vec<NodeId>,
    pub correlation: u64,
    pub request: u64,
    pub settings: GcsSettings,
}

impl World {
    pub fn new() -> Self {
        Self::with(GcsSettings::default())
    }

    pub fn with(settings: GcsSettings) -> Self {
        let mut random = 7;
        let (gcs, commands) =
            Gcs::restore(settings.clone(), Vec::new(), 1_000, &mut || split_mix(&mut random)).expect("a new one");
        let mut world = Self {
            gcs,
            now: 1_000,
            random,
            rows: BTreeMap::new(),
            sent: Vec::new(),
            replies: Vec::new(),
            closed: Vec::new(),
            correlation: 0,
            request: 0,
            settings,
        };
        world.carry_out(commands);
        world
    }

    /// The control plane dies and another begins with what was stored. Nobody is connected any more.
    pub fn restart(&mut self) {
        let rows = self.rows.iter();
        let rows = rows.map(|((table, key), value)| Row {
            table: *table,
            key: key.clone(),
            value: value.clone(),
        });
        let random = &mut self.random;
        let (gcs, commands) = Gcs::restore(self.settings.clone(), rows.collect(), self.now, &mut || {
            split_mix(random)
        })
        .expect("readable");
        self.gcs = gcs;
        self.carry_out(commands);
        self.gcs.validate().expect("a sound state after the restart");
    }

    fn carry_out(&mut self, commands: Vec<Command>) {
        for (at, command) in commands.into_iter().enumerate() {
            match command {
                Command::Persist(mutations) => {
                    assert_eq!(at, 0, "what is stored comes first");
                    for mutation in mutations {
                        let key = (mutation.table, mutation.key);
                        match mutation.value {
                            Some(value) => drop(self.rows.insert(key, value)),
                            None => drop(self.rows.remove(&key)),
                        }
                    }
                }
                Command::SendToNode { node, message } => self.sent.push((node, message)),
                Command::ReplyToNode {
                    node,
                    correlation,
                    reply,
                } => self.replies.push((node, correlation, *reply)),
                Command::CloseNode { node, .. } => self.closed.push(node),
            }
        }
    }

    pub fn step(&mut self, event: Event) {
        let random = &mut self.random;
        let commands = self.gcs.step(event.clone(), self.now, &mut || split_mix(random));
        self.carry_out(commands);
        if let Err(error) = self.gcs.validate() {
            panic!("after {event:?}: {error}");
        }
    }

    pub fn hear(&mut self, node: NodeId, message: NodeMessage) {
        self.step(Event::FromNode { node, message });
    }

    pub fn register(&mut self, message: RegisterNode) -> NodeRegistered {
        let node = message
            .node
            .as_ref()
            .and_then(|node| node.address.as_ref())
            .expect("an address")
            .node()
            .expect("an id");
        self.correlation += 1;
        let correlation = self.correlation;
        let from = self.sent.len();
        self.hear(
            node,
            NodeMessage::Register {
                correlation,
                message: Box::new(message),
            },
        );
        let mut answers = self.sent[from..].iter().filter_map(|(to, message)| match message {
            GcsMessage::NodeRegistered {
                correlation: answered,
                message,
            } if *answered == correlation => {
                assert_eq!(*to, node);
                Some(message.as_ref().clone())
            }
            _ => None,
        });
        answers.next().expect("an answer to the registration")
    }

    pub fn add_node(&mut self, number: u8, cpu: i64) -> NodeId {
        let node = node_id(number);
        assert_eq!(self.register(registration(node, cpus(cpu))).refusal, "");
        node
    }

    pub fn ask_as(&mut self, node: NodeId, worker: WorkerId, request_id: u64, call: GcsCall) -> Option<GcsReply> {
        self.correlation += 1;
        let correlation = self.correlation;
        let request = GcsRequest {
            request_id,
            sender: Some(address(node, worker)),
            call: Some(call),
        };
        self.hear(
            node,
            NodeMessage::Request {
                correlation,
                request: Box::new(request),
            },
        );
        self.answer(correlation)
    }

    pub fn ask(&mut self, node: NodeId, call: GcsCall) -> GcsReply {
        self.request += 1;
        let id = self.request;
        self.ask_as(node, worker_id(1), id, call).expect("an immediate answer")
    }

    pub fn answer(&mut self, correlation: u64) -> Option<GcsReply> {
        let at = self
            .replies
            .iter()
            .position(|(_, answered, _)| *answered == correlation)?;
        Some(self.replies.remove(at).2)
    }

    pub fn add_job(&mut self, node: NodeId) -> JobId {
        let add = AddJob {
            driver: Some(address(node, worker_id(1))),
            pid: 42,
            ..AddJob::default()
        };
        let reply = self.ask(node, GcsCall::AddJob(add));
        assert_eq!(reply.error, "");
        JobId::from_int(reply.number as u32)
    }

    pub fn register_actor(&mut self, node: NodeId, id: ActorId, creation: ActorCreation) -> GcsReply {
        let register = RegisterActor {
            actor_id: bytes(id.as_bytes()),
            creation: Some(creation),
            get_if_exists: false,
        };
        self.ask(node, GcsCall::RegisterActor(register))
    }

    /// Registers an actor of the driver on `node` and says where it was placed.
    pub fn place(&mut self, node: NodeId, id: ActorId, cpu: i64) -> (NodeId, u64) {
        let reply = self.register_actor(node, id, creation(address(node, worker_id(1)), cpu));
        assert_eq!(reply.error, "");
        self.last_placement(id).expect("it is placed at once")
    }

    pub fn last_placement(&self, id: ActorId) -> Option<(NodeId, u64)> {
        self.sent.iter().rev().find_map(|(node, message)| match message {
            GcsMessage::PlaceActor(create) if create.actor_id == id.as_bytes() => Some((*node, create.incarnation)),
            _ => None,
        })
    }

    pub fn created(&mut self, node: NodeId, id: ActorId, incarnation: u64, worker: u8) {
        let created = ActorCreated {
            actor_id: bytes(id.as_bytes()),
            incarnation,
            worker: Some(address(node, worker_id(worker))),
            pid: 100,
            ..ActorCreated::default()
        };
        self.hear(node, NodeMessage::ActorCreated(created));
    }

    pub fn create_failed(&mut self, node: NodeId, id: ActorId, incarnation: u64, kind: u32) {
        let failure = Some(DeathCause {
            kind,
            message: "it failed".into(),
            ..DeathCause::default()
        });
        let created = ActorCreated {
            actor_id: bytes(id.as_bytes()),
            incarnation,
            failure,
            ..ActorCreated::default()
        };
        self.hear(node, NodeMessage::ActorCreated(created));
    }

    pub fn rejected(&mut self, node: NodeId, id: ActorId, incarnation: u64) {
        let created = ActorCreated {
            actor_id: bytes(id.as_bytes()),
            incarnation,
            rejected: true,
            ..ActorCreated::default()
        };
        self.hear(node, NodeMessage::ActorCreated(created));
    }

    /// An actor of the driver on `node` that lives as `worker`.
    pub fn living(&mut self, node: NodeId, id: ActorId, worker: u8) -> NodeId {
        let (at, incarnation) = self.place(node, id, 1);
        self.created(at, id, incarnation, worker);
        assert_eq!(self.state(id).state, ACTOR_ALIVE);
        at
    }

    pub fn worker_died(&mut self, node: NodeId, worker: u8, actor: Option<(ActorId, u64)>, kind: u32) {
        let report = WorkerDeathReport {
            worker: Some(address(node, worker_id(worker))),
            cause: Some(DeathCause {
                kind,
                message: "it is gone".into(),
                ..DeathCause::default()
            }),
            actor_id: actor.map(|(id, _)| bytes(id.as_bytes())).unwrap_or_default(),
            incarnation: actor.map_or(0, |(_, incarnation)| incarnation),
            driver_job_id: Bytes::new(),
        };
        self.correlation += 1;
        let correlation = self.correlation;
        self.hear(node, NodeMessage::WorkerDeath { correlation, report });
        assert!(self.answer(correlation).is_some(), "a death is acknowledged");
    }

    /// What the control plane knows of an actor, by the state that watching it gives.
    pub fn state(&mut self, id: ActorId) -> ActorState {
        let node = self.any_node();
        let watch = ActorKey {
            actor_id: bytes(id.as_bytes()),
            owner: None,
        };
        let reply = self
            .ask_as(node, worker_id(250), 0, GcsCall::WatchActor(watch.clone()))
            .expect("an answer");
        self.ask_as(node, worker_id(250), 0, GcsCall::UnwatchActor(watch));
        self.sent.retain(|(_, message)| match message {
            GcsMessage::Publication(news) => news.subscribers != [bytes(worker_id(250).as_bytes())],
            _ => true,
        });
        reply.actor.expect("a state")
    }

    fn any_node(&mut self) -> NodeId {
        let nodes = self.query(r#"{"method": "health"}"#);
        assert!(nodes["nodes_alive"].as_u64() > Some(0));
        (1..=255)
            .map(node_id)
            .find(|id| self.gcs.is_connected(*id))
            .expect("a node with a link")
    }

    pub fn query(&mut self, text: &str) -> serde_json::Value {
        let reply = self.gcs.query(text);
        assert_eq!(reply.error, "");
        serde_json::from_str(&reply.json).expect("JSON")
    }

    pub fn link_down(&mut self, node: NodeId) {
        self.step(Event::NodeLinkDown {
            node,
            reason: "it was cut".into(),
        });
    }

    /// Lets time pass, ticking whenever the machine wants to be woken.
    pub fn pass(&mut self, ms: u64) {
        let end = self.now + ms;
        while let Some(at) = self.gcs.next_deadline().filter(|at| *at <= end) {
            self.now = self.now.max(at);
            self.step(Event::Tick);
        }
        self.now = end;
        self.step(Event::Tick);
    }

    pub fn kill_node(&mut self, node: NodeId) {
        self.link_down(node);
        self.pass(self.settings.node_link_grace_ms);
    }

    pub fn report(&mut self, node: NodeId, sequence: u64, available: Vec<ResourceAmount>, seen: u64) {
        let report = ResourceReport {
            available,
            sequence,
            placements_seen: seen,
            ..ResourceReport::default()
        };
        self.hear(node, NodeMessage::ResourceReport(report));
    }

    /// The messages sent to `node` so far that `pick` picks.
    pub fn sent_to<T>(&self, node: NodeId, pick: impl Fn(&GcsMessage) -> Option<T>) -> Vec<T> {
        self.sent
            .iter()
            .filter(|(to, _)| *to == node)
            .filter_map(|(_, message)| pick(message))
            .collect()
    }

    pub fn kills(&self, node: NodeId) -> Vec<KillActorWorker> {
        self.sent_to(node, |message| match message {
            GcsMessage::KillActorWorker(kill) => Some(kill.clone()),
            _ => None,
        })
    }

    pub fn publications(&self, node: NodeId) -> Vec<Publication> {
        self.sent_to(node, |message| match message {
            GcsMessage::Publication(publication) => Some(publication.as_ref().clone()),
            _ => None,
        })
    }

    pub fn watch(&mut self, node: NodeId, worker: u8, id: ActorId) {
        let key = ActorKey {
            actor_id: bytes(id.as_bytes()),
            owner: None,
        };
        self.ask_as(node, worker_id(worker), 0, GcsCall::WatchActor(key))
            .expect("an answer");
    }
}
