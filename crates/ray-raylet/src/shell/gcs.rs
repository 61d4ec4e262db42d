//! The link to the control plane: owns registration, what is relayed there for the node's processes, what was asked and
//! not answered, and coming back after the control plane was away.
//!
//! Requests keep their `request_id` and are sent again after a reconnection, so that they are done once. Watches and
//! deaths that were not acknowledged are told again with the registration. News that were lost with a link come again:
//! of nodes with the answer to the registration, of processes elsewhere by asking their raylets (`elsewhere`).
//!
//! Invariants:
//! 1. Nothing but the registration is sent before the control plane answered it.
//! 2. A pending request is answered once: by a reply, or with an error when its process's link is gone (then nobody is).
//! 3. A death is kept until the control plane has acknowledged it. A node's death is told to the processes here once.

use super::config::RayletError;
use super::node::{LinkRole, Node, Timer};
use super::processes::Jobs;
use crate::placement::set_to_wire;
use crate::types::Event;
use bytes::Bytes;
use ray_ids::{JobId, NodeId, PlacementGroupId, WorkerId};
use ray_rpc::{CloseReason, Frame, Link, Target};
use ray_wire::{
    kinds, BundlesCommitted, BundlesPrepared, ClusterUpdate, CommitBundles, CreateActor, DeathCause, DrainNode,
    JobFinished, KillActorWorker, Label, LeavesCluster, NodeDied, NodeInfo, NodeRegistered, PrepareBundles,
    ProcessWatches, RegisterNode, ResourceReport, ReturnBundles, WorkerDeathReport, WorkerDied,
};
use rustc_hash::{FxHashMap, FxHashSet};
use serde_json::Value;
use std::collections::BTreeMap;
use std::net::ToSocketAddrs;
use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};

/// Who waits for the answer to a request.
pub(super) enum Asker {
    /// A process of this node, under its own correlation.
    Link {
        link: Arc<Link>,
        correlation: u64,
    },
    /// A driver's registration.
    AddJob {
        worker: WorkerId,
        correlation: u64,
        config_json: String,
    },
    FinishJob,
    Group(PlacementGroupId),
    Nobody,
}

pub(super) struct Pending {
    pub(super) asker: Asker,
    pub(super) header: Bytes,
    pub(super) payload: Bytes,
}

#[derive(Default)]
pub(super) struct Watches {
    pub(super) actors: FxHashSet<Bytes>,
    pub(super) channels: FxHashSet<String>,
}

/// The state of the link.
#[derive(Default)]
pub(super) struct GcsLink {
    pub(super) link: Option<Arc<Link>>,
    pub(super) registered: bool,
    pub(super) ever_registered: bool,
    pub(super) attempts: u32,
    pub(super) pending: BTreeMap<u64, Pending>,
    pub(super) next_correlation: u64,
    pub(super) watches: FxHashMap<WorkerId, Watches>,
    /// The last publication seen.
    pub(super) epoch: u64,
    pub(super) sequence: u64,
    pub(super) report_sequence: u64,
    pub(super) last_report: Option<ResourceReport>,
    pub last_report_ms: u64,
    pub(super) placements_seen: u64,
    /// Under which correlation the control plane asked for an actor.
    pub(super) placements: FxHashMap<(Bytes, u64), u64>,
    pub(super) prepared: FxHashMap<(PlacementGroupId, u64), u64>,
    pub(super) committed: FxHashMap<(PlacementGroupId, u64), u64>,
    /// Answers that came about after the present registration was sent, and which it does not show: they follow its answer.
    pub(super) held: Vec<(u16, u64, Bytes)>,
    /// Deaths that the control plane has not acknowledged, by the correlation under which each is told.
    pub(super) deaths: BTreeMap<u64, WorkerDeathReport>,
    /// The last of them that the present registration holds.
    pub(super) deaths_registered: u64,
    /// Nodes whose deaths were told here.
    pub(super) dead_nodes: FxHashSet<NodeId>,
    pub cluster_id: Vec<u8>,
    pub details: Value,
    pub(super) idle_since_ms: Option<u64>,
}

impl GcsLink {
    pub fn is_link(&self, id: u64) -> bool {
        self.link.as_ref().is_some_and(|link| link.id() == id)
    }

    /// The link, for what is handed over on the head node.
    pub fn link(&self) -> Option<Arc<Link>> {
        self.link.clone()
    }

    /// Whether the control plane knows this node.
    pub fn is_registered(&self) -> bool {
        self.registered
    }

    pub(super) fn send(&self, kind: u16, correlation: u64, header: Bytes) {
        if let Some(link) = self.link.as_ref().filter(|_| self.registered) {
            // A closed link is noticed by `on_closed`.
            let _ = link.send(kind, correlation, header, &[]);
        }
    }

    /// Answers what the control plane asked. An answer that the registration under way does not show follows it.
    pub(super) fn answer(&mut self, kind: u16, correlation: u64, header: Bytes) {
        if self.registered {
            self.send(kind, correlation, header);
        } else if self.link.is_some() {
            self.held.push((kind, correlation, header));
        }
    }

    /// A process is gone: nobody waits for its answers, and it watches nothing.
    pub fn forget_process(&mut self, worker: &WorkerId) {
        self.watches.remove(worker);
    }
}

pub(super) fn random_request_id() -> u64 {
    let id = WorkerId::from_random();
    let mut bytes = [0; 8];
    bytes.copy_from_slice(&id.as_bytes()[..8]);
    u64::from_le_bytes(bytes).max(1)
}

/// The death that a node's entry tells of, if it is dead.
fn death_of(info: &NodeInfo) -> Option<NodeDied> {
    let id = info.address.as_ref()?.node().ok().filter(|_| !info.alive)?;
    Some(NodeDied {
        node_id: ray_wire::id_bytes(id.as_bytes()),
        reason: info.death_reason.clone(),
    })
}

impl Node {
    /// The address under which others find the control plane.
    pub(super) fn gcs_address(&self) -> String {
        match &self.config.gcs_address {
            Some(address) => address.clone(),
            None => format!("{}:{}", self.config.host, self.address.port),
        }
    }

    pub(super) fn connect_gcs(&mut self) {
        if self.stopping || self.gcs.link.is_some() {
            return;
        }
        let attempt = self.try_connect_gcs();
        match attempt {
            Ok(link) => {
                self.gcs.link = Some(link.clone());
                let register = self.registration();
                let _ = link.send(kinds::REGISTER_NODE, 0, ray_wire::encode(&register), &[]);
            }
            Err(_) => self.retry_gcs(),
        }
    }

    fn try_connect_gcs(&self) -> Result<Arc<Link>, RayletError> {
        if let Some(path) = &self.config.gcs_socket {
            return Ok(self.reactor.connect_unix(path)?);
        }
        let text = self.gcs_address();
        let resolved = text
            .to_socket_addrs()
            .map_err(|error| RayletError::io(format!("resolve {text}"), error))?
            .next();
        let address = resolved.ok_or_else(|| RayletError::Config(format!("{text} has no address")))?;
        Ok(self
            .reactor
            .connect_tcp(address, Target::gcs(NodeId::NIL), self.token.clone())?)
    }

    fn retry_gcs(&mut self) {
        self.gcs.attempts += 1;
        // The first attempts come quickly: at the start the control plane is about to listen.
        let base = (5_u64 << self.gcs.attempts.min(8)).min(self.limits.gcs_retry_maximum_ms);
        let jitter = random_request_id() % (base / 2 + 1);
        if !self.has_timer(Timer::ConnectGcs) {
            self.at(base / 2 + jitter, Timer::ConnectGcs);
        }
        if !self.has_timer(Timer::GcsAway) {
            self.at(self.limits.gcs_away_limit_ms, Timer::GcsAway);
        }
    }

    pub(super) fn gcs_lost(&mut self, sentence: &str) {
        if self.stopping {
            return;
        }
        if self.gcs.registered {
            eprintln!("raylet: the link to the control plane closed: {sentence}; trying again");
        }
        self.gcs.link = None;
        self.gcs.registered = false;
        self.gcs.last_report = None;
        self.retry_gcs();
    }

    pub(super) fn gcs_away_too_long(&mut self) {
        if !self.gcs.registered {
            self.stop(Some(RayletError::ControlPlaneGone(
                self.limits.gcs_away_limit_ms / 1_000,
            )));
        }
    }

    fn node_info(&self) -> NodeInfo {
        let mut labels: Vec<Label> = self
            .config
            .labels
            .iter()
            .map(|(key, value)| Label {
                key: key.clone(),
                value: value.clone(),
            })
            .collect();
        labels.sort_by(|a, b| a.key.cmp(&b.key));
        NodeInfo {
            address: Some(self.address.clone()),
            hostname: rustix::system::uname().nodename().to_string_lossy().into_owned(),
            node_name: self.config.node_name.clone(),
            pid: std::process::id(),
            total: set_to_wire(&self.total),
            available: set_to_wire(&self.total),
            labels,
            is_head: self.config.is_head,
            store_path: self.store.path().to_string_lossy().into_owned(),
            session_directory: self.config.session_directory.to_string_lossy().into_owned(),
            alive: true,
            start_time_ms: self.start_time_ms,
            raylet_socket: self.socket_path.to_string_lossy().into_owned(),
            ..Default::default()
        }
    }

    fn registration(&mut self) -> RegisterNode {
        self.gcs.placements_seen = 0;
        self.gcs.deaths_registered = self.gcs.next_correlation;
        self.gcs.held.clear();
        self.gcs.report_sequence += 1;
        let mut report = self.scheduler.resource_report();
        report.sequence = self.gcs.report_sequence;
        let watches = self.gcs.watches.iter().map(|(worker, watches)| ProcessWatches {
            worker_id: ray_wire::id_bytes(worker.as_bytes()),
            actor_ids: watches.actors.iter().cloned().collect(),
            channels: watches.channels.iter().cloned().collect(),
        });
        RegisterNode {
            node: Some(self.node_info()),
            actors: self.scheduler.actors_here(),
            bundles: self.scheduler.bundle_keys(),
            resources: Some(report),
            driver_jobs: self
                .jobs
                .drivers
                .keys()
                .map(|job| ray_wire::id_bytes(job.as_bytes()))
                .collect(),
            publisher_epoch: self.gcs.epoch,
            publisher_sequence: self.gcs.sequence,
            watches: watches.collect(),
            deaths: self.gcs.deaths.values().cloned().collect(),
        }
    }

    /// A frame of the control plane.
    pub(super) fn on_gcs_frame(&mut self, frame: Frame) {
        if let Err(error) = self.handle_gcs_frame(frame) {
            if let Some(link) = self.gcs.link.clone() {
                link.close(CloseReason::new(ray_rpc::CloseCause::Protocol, error.to_string()));
            }
        }
    }

    fn handle_gcs_frame(&mut self, frame: Frame) -> Result<(), ray_wire::WireError> {
        let (correlation, header) = (frame.correlation, frame.header);
        match frame.kind {
            kinds::NODE_REGISTERED => self.gcs_registered(ray_wire::decode("NodeRegistered", header)?),
            kinds::CLUSTER_UPDATE => {
                let update: ClusterUpdate = ray_wire::decode("ClusterUpdate", header)?;
                self.cluster_changed(update.nodes);
            }
            kinds::GCS_REPLY => self.gcs_reply(correlation, header, frame.payload)?,
            kinds::PUBLICATION => self.publish(header, frame.payload)?,
            kinds::PING => self.gcs.send(kinds::PONG, correlation, Bytes::new()),
            kinds::PLACE_ACTOR => {
                self.gcs.placements_seen += 1;
                let message: CreateActor = ray_wire::decode("CreateActor", header)?;
                let actor = ray_ids::ActorId::from_binary(&message.actor_id)?;
                self.gcs
                    .placements
                    .insert((message.actor_id.clone(), message.incarnation), correlation);
                if !message.job_config_json.is_empty() {
                    self.jobs
                        .configs
                        .entry(actor.job_id())
                        .or_insert_with(|| message.job_config_json.clone());
                }
                self.step(Event::PlaceActor { message });
            }
            kinds::KILL_ACTOR_WORKER => {
                let message: KillActorWorker = ray_wire::decode("KillActorWorker", header)?;
                self.step(Event::KillActorWorker { message });
            }
            kinds::PREPARE_BUNDLES => {
                self.gcs.placements_seen += 1;
                let message: PrepareBundles = ray_wire::decode("PrepareBundles", header)?;
                let Some(first) = message.bundles.first() else {
                    return Ok(());
                };
                let group = PlacementGroupId::from_binary(&first.placement_group_id)?;
                self.gcs.prepared.insert((group, message.attempt), correlation);
                self.step(Event::PrepareBundles {
                    group,
                    bundles: message.bundles,
                    attempt: message.attempt,
                });
            }
            kinds::COMMIT_BUNDLES => {
                let message: CommitBundles = ray_wire::decode("CommitBundles", header)?;
                let group = PlacementGroupId::from_binary(&message.placement_group_id)?;
                self.gcs.committed.insert((group, message.attempt), correlation);
                self.step(Event::CommitBundles {
                    group,
                    attempt: message.attempt,
                });
            }
            kinds::RETURN_BUNDLES => {
                let message: ReturnBundles = ray_wire::decode("ReturnBundles", header)?;
                let group = PlacementGroupId::from_binary(&message.placement_group_id)?;
                self.gcs.prepared.retain(|(other, _), _| *other != group);
                self.gcs.committed.retain(|(other, _), _| *other != group);
                self.step(Event::ReturnBundles {
                    group,
                    indices: message.indices,
                });
            }
            kinds::WORKER_DEATH_NOTICE => {
                let died: WorkerDied = ray_wire::decode("WorkerDied", header)?;
                if let Some(worker) = died.worker.as_ref().and_then(|address| address.worker().ok()) {
                    self.remote_process_died(worker, died);
                }
            }
            kinds::NODE_DIED => {
                let died: NodeDied = ray_wire::decode("NodeDied", header)?;
                self.node_died(&died);
            }
            kinds::JOB_FINISHED => {
                let message: JobFinished = ray_wire::decode("JobFinished", header)?;
                self.job_is_over(JobId::from_binary(&message.job_id)?);
            }
            kinds::DRAIN_NODE => {
                let message: DrainNode = ray_wire::decode("DrainNode", header)?;
                eprintln!("raylet: this node drains: {}", message.reason);
                if message.deadline_ms > 0 {
                    let now_ms = SystemTime::now()
                        .duration_since(UNIX_EPOCH)
                        .unwrap_or_default()
                        .as_millis() as u64;
                    self.at(message.deadline_ms.saturating_sub(now_ms), Timer::LeaveAfterDrain);
                }
                self.step(Event::Drain);
            }
            kinds::DECLARED_DEAD => {
                let message: LeavesCluster = ray_wire::decode("LeavesCluster", header)?;
                self.stop(Some(RayletError::Refused(message.reason)));
            }
            // A later version may say more than this one knows.
            _ => {}
        }
        Ok(())
    }

    fn gcs_registered(&mut self, message: NodeRegistered) {
        if !message.refusal.is_empty() {
            return self.stop(Some(RayletError::Refused(message.refusal)));
        }
        self.gcs.registered = true;
        self.gcs.attempts = 0;
        for (kind, correlation, header) in std::mem::take(&mut self.gcs.held) {
            self.gcs.send(kind, correlation, header);
        }
        self.cancel_timer(Timer::GcsAway);
        self.gcs.cluster_id = message.cluster_id.to_vec();
        if self.gcs.epoch != message.publisher_epoch {
            self.gcs.epoch = message.publisher_epoch;
            self.gcs.sequence = 0;
        }
        self.gcs.details = serde_json::from_str(&message.details_json).unwrap_or_default();
        let died: Vec<NodeDied> = message.nodes.iter().filter_map(death_of).collect();
        self.cluster_changed(message.nodes);
        for message in died {
            self.node_died(&message);
        }
        for message in message.superseded {
            self.step(Event::KillActorWorker { message });
        }
        for job in message
            .finished_jobs
            .iter()
            .filter_map(|job| JobId::from_binary(job).ok())
        {
            self.job_is_over(job);
        }
        let again: Vec<(u64, Bytes, Bytes)> = self
            .gcs
            .pending
            .iter()
            .map(|(id, pending)| (*id, pending.header.clone(), pending.payload.clone()))
            .collect();
        for (correlation, header, payload) in again {
            self.send_request(correlation, header, payload);
        }
        // The registration told of those that were known when it was sent, and its answer acknowledges them.
        let told = self.gcs.deaths_registered;
        self.gcs.deaths.retain(|correlation, _| *correlation > told);
        for (correlation, report) in &self.gcs.deaths {
            self.gcs
                .send(kinds::WORKER_DEATH_REPORT, *correlation, ray_wire::encode(report));
        }
        if self.gcs.ever_registered {
            self.ask_elsewhere_again();
        }
        self.report_soon();
        if !self.gcs.ever_registered {
            self.gcs.ever_registered = true;
            self.say_ready();
        }
    }

    fn say_ready(&mut self) {
        let Some(descriptor) = self.config.ready_fd else { return };
        use std::os::fd::FromRawFd;
        let line = serde_json::json!({
            "node_id": self.node_id.hex(), "port": self.address.port, "socket": self.socket_path,
        });
        // SAFETY: whoever started the raylet left this descriptor open for it, and nobody else here uses it.
        let mut file = unsafe { std::fs::File::from_raw_fd(descriptor) };
        use std::io::Write;
        // Whoever stopped listening does not need to know.
        let _ = writeln!(file, "{line}");
    }

    fn cluster_changed(&mut self, nodes: Vec<NodeInfo>) {
        for node in &nodes {
            if let Some(id) = node.address.as_ref().and_then(|address| address.node().ok()) {
                if node.alive {
                    self.nodes.insert(id, node.clone());
                } else {
                    self.nodes.remove(&id);
                }
            }
        }
        self.step(Event::ClusterChanged { nodes });
    }

    /// A node is dead. The control plane says so once when it dies, and again with each answer to a registration.
    fn node_died(&mut self, message: &NodeDied) {
        let Ok(node) = NodeId::from_binary(&message.node_id) else {
            return;
        };
        if node == self.node_id || !self.gcs.dead_nodes.insert(node) {
            return;
        }
        self.nodes.remove(&node);
        let header = ray_wire::encode(message);
        for process in self.processes.values() {
            if let Some(link) = process.link.as_ref().filter(|_| process.registered) {
                let _ = link.send(kinds::NODE_DIED, 0, header.clone(), &[]);
            }
        }
        for (link, role) in self.links.values() {
            if *role == LinkRole::Raylet(node) {
                link.close(CloseReason::local(format!("node {node} is dead: {}", message.reason)));
            }
        }
        self.objects_node_died(node);
        self.processes_died_with_node(&node);
        self.step(Event::NodeGone { node });
    }

    fn job_is_over(&mut self, job: JobId) {
        if let Some(driver) = self.jobs.drivers.get(&job).copied() {
            // The control plane ended it while its driver still lives here.
            if let Some(link) = self.processes.get(&driver).and_then(|process| process.link.clone()) {
                link.close(CloseReason::local(format!("job {job} is over")));
            }
        }
        self.jobs.configs.remove(&job);
        self.step(Event::JobFinished { job });
    }

    pub(super) fn send_report(&mut self) {
        if !self.gcs.registered {
            return;
        }
        self.sample_activity();
        let now = self.now();
        let mut report = self.scheduler.resource_report();
        let idle = self.scheduler.is_idle() && self.jobs.drivers.is_empty();
        self.gcs.idle_since_ms = if idle {
            self.gcs.idle_since_ms.or(Some(now))
        } else {
            None
        };
        report.placements_seen = self.gcs.placements_seen;
        if self.gcs.last_report.as_ref() == Some(&report) {
            return;
        }
        self.gcs.last_report = Some(report.clone());
        self.gcs.last_report_ms = now;
        self.gcs.report_sequence += 1;
        report.sequence = self.gcs.report_sequence;
        report.idle_ms = self.gcs.idle_since_ms.map_or(0, |since| now - since);
        self.gcs.send(kinds::RESOURCE_REPORT, 0, ray_wire::encode(&report));
    }

    /// Answers PLACE_ACTOR.
    pub(super) fn answer_actor(&mut self, message: ray_wire::ActorCreated) {
        let key = (message.actor_id.clone(), message.incarnation);
        let correlation = self.gcs.placements.remove(&key).unwrap_or(0);
        self.gcs
            .answer(kinds::ACTOR_CREATED, correlation, ray_wire::encode(&message));
    }

    pub(super) fn answer_prepared(&mut self, group: PlacementGroupId, attempt: u64, success: bool) {
        let correlation = self.gcs.prepared.remove(&(group, attempt)).unwrap_or(0);
        let message = BundlesPrepared {
            placement_group_id: ray_wire::id_bytes(group.as_bytes()),
            attempt,
            success,
        };
        self.gcs
            .answer(kinds::BUNDLES_PREPARED, correlation, ray_wire::encode(&message));
    }

    pub(super) fn answer_committed(&mut self, group: PlacementGroupId, attempt: u64) {
        let correlation = self.gcs.committed.remove(&(group, attempt)).unwrap_or(0);
        let message = BundlesCommitted {
            placement_group_id: ray_wire::id_bytes(group.as_bytes()),
            attempt,
        };
        self.gcs
            .answer(kinds::BUNDLES_COMMITTED, correlation, ray_wire::encode(&message));
    }

    /// Tells the control plane of a death, now and with each registration until it has acknowledged it.
    pub(super) fn report_death(&mut self, report: WorkerDeathReport) {
        self.gcs.next_correlation += 1;
        let correlation = self.gcs.next_correlation;
        self.gcs
            .send(kinds::WORKER_DEATH_REPORT, correlation, ray_wire::encode(&report));
        self.gcs.deaths.insert(correlation, report);
        while self.gcs.deaths.len() as u64 > self.limits.deaths_remembered {
            self.gcs.deaths.pop_first();
        }
    }

    pub(super) fn report_driver_death(&mut self, worker: WorkerId, job: JobId, cause: DeathCause) {
        let worker = Some(self.address_of(worker));
        let driver_job_id = ray_wire::id_bytes(job.as_bytes());
        self.report_death(WorkerDeathReport {
            worker,
            cause: Some(cause),
            driver_job_id,
            ..Default::default()
        });
    }

    /// A process elsewhere died: who watches it hears of it, and what it owned here goes.
    pub(super) fn remote_process_died(&mut self, worker: WorkerId, died: WorkerDied) {
        if self.processes.contains_key(&worker) {
            return;
        }
        self.elsewhere.forget(&worker);
        let header = ray_wire::encode(&died);
        for (link, correlation) in self.watchers.died(worker, died, self.limits.deaths_remembered) {
            let _ = link.send(kinds::WORKER_DIED, correlation, header.clone(), &[]);
        }
        self.step(Event::OwnerGone { process: worker });
        self.owner_of_objects_died(worker);
    }

    /// Jobs known here, for questions.
    pub(super) fn jobs(&self) -> &Jobs {
        &self.jobs
    }
}
