//! The machine: owns the order in which an event's consequences happen, and what leaves a step.
//!
//! It refuses nothing itself; each table refuses what is its own. Time and randomness are parameters.
//!
//! Invariants:
//! 1. A step's commands begin with its `Persist`, if it has one; everything after it may depend on it.
//! 2. Time never goes back: an earlier `now_ms` counts as the latest one seen.
//! 3. Whatever waits for a time has a timer, and `next_deadline` is the earliest of them.
//! 4. The same rows, events, times and random numbers give the same commands.

use std::collections::{BTreeMap, BTreeSet, VecDeque};

use bytes::Bytes;
use prost::Message;
use ray_ids::{ActorId, ClusterId, NodeId, WorkerId};
use ray_sched::ClusterView;
use ray_wire::{encode, GcsCall, GcsReply, GcsRequest, GCS_ERROR_INVALID, GCS_ERROR_NOT_FOUND};
use rustc_hash::FxHashMap;

use crate::actors::Actors;
use crate::jobs::Jobs;
use crate::kv::KeyValues;
use crate::messages::{GcsMessage, NodeMessage};
use crate::nodes::NodeRow;
use crate::placement_groups::Groups;
use crate::publish::Watches;
use crate::records::{MetaRecord, Mutation, Table};
use crate::settings::GcsSettings;

/// Something that happened.
// An event is handed over once and not kept, so a large variant costs nothing that a box would save.
#[allow(clippy::large_enum_variant)]
#[derive(Debug, Clone, PartialEq)]
pub enum Event {
    /// A message of a node, over its current link. `Register` is the first of every link.
    FromNode { node: NodeId, message: NodeMessage },
    /// The node's current link closed.
    NodeLinkDown { node: NodeId, reason: String },
    /// Time has passed.
    Tick,
}

/// Something to do.
#[derive(Debug, Clone, PartialEq)]
pub enum Command {
    /// Make these durable before anything that follows is carried out.
    Persist(Vec<Mutation>),
    /// Send over the node's current link; without one it is dropped, which registration makes good.
    SendToNode { node: NodeId, message: GcsMessage },
    /// Answer that node's `Request`.
    ReplyToNode {
        node: NodeId,
        correlation: u64,
        reply: Box<GcsReply>,
    },
    /// Close the node's current link once what was sent before is out.
    CloseNode { node: NodeId, reason: String },
}

/// What wakes the machine at a time.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Timer {
    Health,
    ClusterUpdate,
    Place,
    Recovery,
    LinkGrace(NodeId),
    Drain(NodeId),
    Settle(NodeId),
    KvWait(u64),
    GroupWait(u64),
}

/// The answers of requests that were done.
#[derive(Debug, Default)]
pub(crate) struct RequestLog {
    replies: FxHashMap<u64, GcsReply>,
    /// Oldest first, and whether each is stored.
    order: VecDeque<(u64, bool)>,
}

impl RequestLog {
    pub(crate) fn restore(&mut self, id: u64, reply: GcsReply) {
        if self.replies.insert(id, reply).is_none() {
            self.order.push_back((id, true));
        }
    }

    pub(crate) fn len(&self) -> usize {
        self.order.len()
    }
}

/// A set that forgets its oldest members.
#[derive(Debug)]
pub(crate) struct BoundedSet<T> {
    members: BTreeSet<T>,
    order: VecDeque<T>,
    limit: usize,
}

impl<T: Ord + Copy> BoundedSet<T> {
    pub(crate) fn new(limit: u64) -> Self {
        Self {
            members: BTreeSet::new(),
            order: VecDeque::new(),
            limit: limit as usize,
        }
    }

    pub(crate) fn insert(&mut self, member: T) {
        if self.members.insert(member) {
            self.order.push_back(member);
        }
        while self.order.len() > self.limit {
            if let Some(oldest) = self.order.pop_front() {
                self.members.remove(&oldest);
            }
        }
    }

    pub(crate) fn contains(&self, member: &T) -> bool {
        self.members.contains(member)
    }

    pub(crate) fn len(&self) -> usize {
        self.members.len()
    }
}

/// The control plane's state.
#[derive(Debug)]
pub struct Gcs {
    pub(crate) settings: GcsSettings,
    pub(crate) cluster_id: ClusterId,
    pub(crate) epoch: u64,
    pub(crate) now_ms: u64,
    pub(crate) nodes: BTreeMap<NodeId, NodeRow>,
    pub(crate) dead_nodes: VecDeque<NodeId>,
    pub(crate) view: ClusterView,
    pub(crate) changed_nodes: BTreeSet<NodeId>,
    /// Whether the changes are to be told at the end of this step.
    pub(crate) update_at_once: bool,
    pub(crate) last_update_ms: u64,
    /// Whether a timer for the next update is set.
    pub(crate) update_timer_set: bool,
    pub(crate) jobs: Jobs,
    pub(crate) actors: Actors,
    pub(crate) groups: Groups,
    pub(crate) kv: KeyValues,
    pub(crate) watches: Watches,
    pub(crate) requests: RequestLog,
    pub(crate) dead_processes: BoundedSet<(NodeId, WorkerId)>,
    pub(crate) tombstones: BoundedSet<ActorId>,
    /// Nodes that are expected back after a restart; until they are or the time is over, nothing is placed.
    pub(crate) expected_nodes: BTreeSet<NodeId>,
    pub(crate) spread_cursor: u64,
    pub(crate) place_at_end: bool,
    timers: BTreeSet<(u64, Timer)>,
    out: Vec<Command>,
    mutations: Vec<Mutation>,
}

impl Gcs {
    /// An empty control plane for a new cluster. It stores nothing before its first step.
    pub fn new(settings: GcsSettings, now_ms: u64, random: &mut dyn FnMut() -> u64) -> Self {
        let mut id = [0_u8; ClusterId::SIZE];
        for chunk in id.chunks_mut(8) {
            let bytes = random().to_le_bytes();
            chunk.copy_from_slice(&bytes[..chunk.len()]);
        }
        let mut gcs = Self::empty(settings, now_ms);
        gcs.cluster_id = ClusterId::from_array(id);
        gcs.epoch = 1;
        gcs.store_meta();
        gcs
    }

    pub(crate) fn empty(settings: GcsSettings, now_ms: u64) -> Self {
        let mut gcs = Self {
            cluster_id: ClusterId::NIL,
            epoch: 0,
            now_ms,
            nodes: BTreeMap::new(),
            dead_nodes: VecDeque::new(),
            view: ClusterView::default(),
            changed_nodes: BTreeSet::new(),
            update_at_once: false,
            last_update_ms: 0,
            update_timer_set: false,
            jobs: Jobs::default(),
            actors: Actors::default(),
            groups: Groups::default(),
            kv: KeyValues::default(),
            watches: Watches::default(),
            requests: RequestLog::default(),
            dead_processes: BoundedSet::new(settings.maximum_dead_processes),
            tombstones: BoundedSet::new(settings.maximum_actor_tombstones),
            expected_nodes: BTreeSet::new(),
            spread_cursor: 0,
            place_at_end: false,
            timers: BTreeSet::new(),
            out: Vec::new(),
            mutations: Vec::new(),
            settings,
        };
        gcs.set_timer(now_ms + gcs.settings.health_check_period_ms, Timer::Health);
        gcs
    }

    /// Takes one event in and says what to do.
    pub fn step(&mut self, event: Event, now_ms: u64, random: &mut dyn FnMut() -> u64) -> Vec<Command> {
        self.now_ms = self.now_ms.max(now_ms);
        match event {
            Event::FromNode { node, message } => self.on_node_message(node, message),
            Event::NodeLinkDown { node, reason } => self.on_link_down(node, &reason),
            Event::Tick => {}
        }
        self.fire_timers();
        self.finish_step(random)
    }

    /// When a `Tick` is due at the latest.
    pub fn next_deadline(&self) -> Option<u64> {
        self.timers.first().map(|(at, _)| *at)
    }

    /// The cluster's id.
    pub fn cluster_id(&self) -> ClusterId {
        self.cluster_id
    }

    /// Which life of the control plane this is, from 1.
    pub fn epoch(&self) -> u64 {
        self.epoch
    }

    /// Whether a node is alive and has a link.
    pub fn is_connected(&self, node: NodeId) -> bool {
        self.nodes.get(&node).is_some_and(|row| row.alive && row.link_up)
    }

    pub(crate) fn finish_step(&mut self, random: &mut dyn FnMut() -> u64) -> Vec<Command> {
        // Placing may kill an actor or remove a group, whose consequences may free room: then it goes round again.
        // Each round that asks for another has made something final, so the rounds are finite.
        while std::mem::take(&mut self.place_at_end) {
            self.place_groups(random);
            self.place_actors(random);
        }
        self.flush_cluster_update();
        let mut commands = Vec::with_capacity(self.out.len() + 1);
        if !self.mutations.is_empty() {
            commands.push(Command::Persist(std::mem::take(&mut self.mutations)));
        }
        commands.append(&mut self.out);
        commands
    }

    fn on_node_message(&mut self, node: NodeId, message: NodeMessage) {
        if let NodeMessage::Register { correlation, message } = message {
            self.on_register_node(node, correlation, *message);
            return;
        }
        match self.nodes.get_mut(&node) {
            Some(row) if row.alive && row.link_up => {
                row.heard = true;
                row.missed_pings = 0;
            }
            // Before its registration on this link, or after its death: nothing that it says counts.
            Some(row) if !row.alive => {
                let reason = row.info.death_reason.clone();
                self.refuse_dead_node(node, reason);
                return;
            }
            _ => {
                self.out.push(Command::CloseNode {
                    node,
                    reason: "the node has not registered on this link".into(),
                });
                return;
            }
        }
        match message {
            NodeMessage::Register { .. } => unreachable!("registration was handled above"),
            NodeMessage::ResourceReport(report) => self.on_resource_report(node, report),
            NodeMessage::Request { correlation, request } => self.on_request(node, correlation, *request),
            NodeMessage::ActorCreated(created) => self.on_actor_created(node, created),
            NodeMessage::WorkerDeath { correlation, report } => {
                self.on_worker_death(node, report);
                if correlation != 0 {
                    self.reply(node, correlation, done());
                }
            }
            NodeMessage::BundlesPrepared(message) => self.on_bundles_prepared(node, &message),
            NodeMessage::BundlesCommitted(message) => self.on_bundles_committed(node, &message),
            NodeMessage::Ping { correlation } => self.send(node, GcsMessage::Pong { correlation }),
            NodeMessage::Pong => {}
        }
    }

    fn on_request(&mut self, node: NodeId, correlation: u64, request: GcsRequest) {
        let id = request.request_id;
        if id != 0 {
            if let Some(reply) = self.requests.replies.get(&id) {
                let reply = reply.clone();
                self.reply(node, correlation, reply);
                return;
            }
        }
        let sender = request.sender;
        let worker = sender
            .as_ref()
            .and_then(|sender| sender.worker().ok())
            .unwrap_or(WorkerId::NIL);
        let Some(call) = request.call else {
            self.reply(
                node,
                correlation,
                invalid("the request holds no call that this control plane knows"),
            );
            return;
        };
        // Repeating the others is harmless by their own keys; these answer differently the second time.
        let store = match &call {
            GcsCall::KvPut(put) => !put.overwrite,
            GcsCall::KvDelete(_) => true,
            _ => false,
        };
        // A job is found by its driver, so its registration need not be remembered, and must not: see `add_job`.
        let remember = id != 0 && !matches!(call, GcsCall::AddJob(_));
        let reply = match call {
            GcsCall::KvPut(put) => Some(self.kv_put(put)),
            GcsCall::KvGet(key) => self.kv_get(node, correlation, key),
            GcsCall::KvDelete(key) => Some(self.kv_delete(key)),
            GcsCall::KvKeys(key) => Some(self.kv_keys(&key)),
            GcsCall::KvExists(key) => Some(self.kv_exists(&key)),
            GcsCall::AddJob(job) => Some(self.add_job(node, job)),
            GcsCall::FinishJob(job) => Some(self.finish_job_request(&job)),
            GcsCall::RegisterActor(actor) => Some(self.register_actor(sender, actor)),
            GcsCall::WatchActor(key) => Some(self.watch_actor(node, worker, &key)),
            GcsCall::UnwatchActor(key) => Some(self.unwatch_actor(node, worker, &key)),
            GcsCall::GetNamedActor(name) => Some(self.get_named_actor(name)),
            GcsCall::KillActor(kill) => Some(self.kill_actor_request(&kill)),
            GcsCall::ActorOutOfScope(key) => Some(self.actor_out_of_scope(&key)),
            GcsCall::CreatePlacementGroup(group) => Some(self.create_group(group)),
            GcsCall::RemovePlacementGroup(key) => Some(self.remove_group_request(&key)),
            GcsCall::WaitPlacementGroup(key) => self.wait_group(node, correlation, &key),
            GcsCall::Query(query) => Some(self.query(&query.query_json)),
            GcsCall::Subscribe(subscribe) => Some(self.subscribe(node, worker, subscribe.channel)),
            GcsCall::Publish(publish) => Some(self.publish_request(&publish)),
            GcsCall::Drain(drain) => Some(self.drain_node(drain)),
        };
        let Some(reply) = reply else { return };
        if remember {
            self.remember_request(id, reply.clone(), store);
        }
        self.reply(node, correlation, reply);
    }

    fn remember_request(&mut self, id: u64, reply: GcsReply, store: bool) {
        if store {
            self.put_row(Table::Requests, &id.to_be_bytes(), &reply);
        }
        if self.requests.replies.insert(id, reply).is_none() {
            self.requests.order.push_back((id, store));
        }
        while self.requests.order.len() as u64 > self.settings.maximum_remembered_requests {
            let Some((oldest, stored)) = self.requests.order.pop_front() else {
                break;
            };
            self.requests.replies.remove(&oldest);
            if stored {
                self.delete_row(Table::Requests, &oldest.to_be_bytes());
            }
        }
    }

    fn fire_timers(&mut self) {
        while let Some((at, timer)) = self.timers.first().copied() {
            if at > self.now_ms {
                break;
            }
            self.timers.pop_first();
            match timer {
                Timer::Health => self.check_health(),
                Timer::ClusterUpdate => {
                    self.update_timer_set = false;
                    self.update_at_once = true;
                }
                Timer::Place => self.place_at_end = true,
                Timer::Recovery => self.end_recovery(),
                Timer::LinkGrace(node) => self.on_link_grace_over(node),
                Timer::Drain(node) => self.on_drain_deadline(node),
                Timer::Settle(node) => self.settle_old_placements(node),
                Timer::KvWait(waiter) => self.on_kv_wait_over(waiter),
                Timer::GroupWait(waiter) => self.on_group_wait_over(waiter),
            }
        }
    }

    pub(crate) fn set_timer(&mut self, at_ms: u64, timer: Timer) {
        self.timers.insert((at_ms, timer));
    }

    pub(crate) fn timer_count(&self) -> usize {
        self.timers.len()
    }

    /// Sends to a node that is alive and has a link; what is lost otherwise is made good when it registers again.
    pub(crate) fn send(&mut self, node: NodeId, message: GcsMessage) {
        if self.nodes.get(&node).is_some_and(|row| row.alive && row.link_up) {
            self.out.push(Command::SendToNode { node, message });
        }
    }

    pub(crate) fn send_to_all(&mut self, except: Option<NodeId>, message: &GcsMessage) {
        let all: Vec<NodeId> = self
            .nodes
            .values()
            .filter(|row| row.alive && row.link_up)
            .map(|row| row.id)
            .collect();
        for node in all.into_iter().filter(|node| Some(*node) != except) {
            self.out.push(Command::SendToNode {
                node,
                message: message.clone(),
            });
        }
    }

    /// Where the next command will stand.
    pub(crate) fn mark(&self) -> usize {
        self.out.len()
    }

    /// Puts a command where a mark was taken.
    pub(crate) fn insert_command(&mut self, at: usize, command: Command) {
        self.out.insert(at, command);
    }

    pub(crate) fn push_command(&mut self, command: Command) {
        self.out.push(command);
    }

    pub(crate) fn reply(&mut self, node: NodeId, correlation: u64, reply: GcsReply) {
        if self.nodes.get(&node).is_some_and(|row| row.alive && row.link_up) {
            self.out.push(Command::ReplyToNode {
                node,
                correlation,
                reply: Box::new(reply),
            });
        }
    }

    pub(crate) fn put_row(&mut self, table: Table, key: &[u8], value: &impl Message) {
        let (key, value) = (Bytes::copy_from_slice(key), Some(encode(value)));
        self.mutations.push(Mutation { table, key, value });
    }

    pub(crate) fn delete_row(&mut self, table: Table, key: &[u8]) {
        self.mutations.push(Mutation {
            table,
            key: Bytes::copy_from_slice(key),
            value: None,
        });
    }

    pub(crate) fn store_meta(&mut self) {
        let record = MetaRecord {
            cluster_id: Bytes::copy_from_slice(self.cluster_id.as_bytes()),
            epoch: self.epoch,
            next_job: self.jobs.next_number,
        };
        self.put_row(Table::Meta, b"meta", &record);
    }
}

/// A reply that says only "done".
pub(crate) fn done() -> GcsReply {
    GcsReply {
        found: true,
        ..GcsReply::default()
    }
}

/// Why something is refused: its kind and a sentence.
#[derive(Debug)]
pub(crate) struct Refusal(pub(crate) u32, pub(crate) String);

impl Refusal {
    pub(crate) fn invalid(error: impl Into<String>) -> Self {
        Self(GCS_ERROR_INVALID, error.into())
    }

    pub(crate) fn not_found(error: impl Into<String>) -> Self {
        Self(GCS_ERROR_NOT_FOUND, error.into())
    }
}

impl From<Refusal> for GcsReply {
    fn from(Refusal(error_kind, error): Refusal) -> Self {
        refusal(error_kind, error)
    }
}

/// A reply that refuses.
pub(crate) fn refusal(error_kind: u32, error: impl Into<String>) -> GcsReply {
    GcsReply {
        error: error.into(),
        error_kind,
        ..GcsReply::default()
    }
}

/// A reply to a request that makes no sense.
pub(crate) fn invalid(error: impl Into<String>) -> GcsReply {
    refusal(GCS_ERROR_INVALID, error)
}

/// An id as a message's bytes.
pub(crate) fn id_field(bytes: &[u8]) -> Bytes {
    Bytes::copy_from_slice(bytes)
}
