//! Actors: owns each actor's life from registration to death, its name, and who hosts and who owns it.
//!
//! It refuses names that are taken, actors of jobs that are over, and instances that are not the present incarnation
//! on the present node: those are killed where they are.
//!
//! Invariants:
//! 1. An actor has at most one instance that counts: (node, incarnation). An incarnation is never placed on two nodes,
//!    except after the first has refused it.
//! 2. A dead actor stays dead, has a cause, no name, no room held and no creation kept.
//! 3. A name belongs to one actor per namespace that is neither dead nor out of scope.
//! 4. An actor that waits is in `waiting`; one that is being created or alive is in its node's index.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::sync::Arc;

use ray_ids::{ActorId, JobId, NodeId, WorkerId};
use ray_sched::ResourceSet;
use ray_wire::{
    ActorCreated, ActorCreation, ActorState, Address, DeathCause, KillActorWorker, WorkerDeathReport, WorkerDied,
    ACTOR_ALIVE, ACTOR_DEAD, ACTOR_PENDING_CREATION, ACTOR_RESTARTING, DEATH_CONSTRUCTOR, DEATH_CRASHED,
    DEATH_INTENDED, DEATH_JOB, DEATH_KILLED, DEATH_NODE, DEATH_OUT_OF_SCOPE, DEATH_OWNER, DEATH_PLACEMENT_GROUP,
    DEATH_RUNTIME_ENV, DEATH_UNKNOWN, DEATH_UNSCHEDULABLE,
};

use crate::messages::GcsMessage;
use crate::nodes::{resource_set, HoldingKey};
use crate::placing::Wish;
use crate::records::{ActorRecord, Table};
use crate::state::{id_field, Gcs};

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Phase {
    /// For a node.
    Waiting,
    /// Sent to a node.
    Placing(NodeId),
    Alive(NodeId),
    Dead,
}

#[derive(Debug)]
pub(crate) struct ActorRow {
    pub(crate) id: ActorId,
    /// Of a dead actor without call and payload.
    pub(crate) creation: Arc<ActorCreation>,
    pub(crate) wish: Arc<Wish>,
    pub(crate) phase: Phase,
    pub(crate) incarnation: u64,
    pub(crate) restarts: u32,
    pub(crate) worker: Option<Address>,
    pub(crate) pid: u32,
    pub(crate) death: Option<DeathCause>,
    pub(crate) pending_reason: String,
    pub(crate) infeasible: bool,
    pub(crate) was_alive: bool,
    /// No handle is left: it ends once what is queued has run.
    pub(crate) out_of_scope: bool,
    pub(crate) order: u64,
    pub(crate) not_before_ms: u64,
    pub(crate) rejections: u32,
    pub(crate) start_time_ms: u64,
    pub(crate) end_time_ms: u64,
}

impl ActorRow {
    pub(crate) fn is_dead(&self) -> bool {
        self.phase == Phase::Dead
    }

    /// Where it is being created or runs.
    pub(crate) fn node(&self) -> Option<NodeId> {
        match self.phase {
            Phase::Placing(node) | Phase::Alive(node) => Some(node),
            Phase::Waiting | Phase::Dead => None,
        }
    }

    pub(crate) fn owner(&self) -> Option<(NodeId, WorkerId)> {
        let owner = self.creation.owner.as_ref()?;
        Some((owner.node().ok()?, owner.worker().ok()?))
    }

    fn name_key(&self) -> Option<(String, String)> {
        (!self.creation.name.is_empty()).then(|| (self.creation.namespace.clone(), self.creation.name.clone()))
    }

    /// Whether its name is its own now.
    pub(crate) fn holds_name(&self) -> bool {
        !self.creation.name.is_empty() && !self.is_dead() && !self.out_of_scope
    }

    pub(crate) fn state_number(&self) -> u32 {
        match self.phase {
            Phase::Dead => ACTOR_DEAD,
            Phase::Alive(_) => ACTOR_ALIVE,
            _ if self.was_alive || self.restarts > 0 => ACTOR_RESTARTING,
            _ => ACTOR_PENDING_CREATION,
        }
    }

    pub(crate) fn state(&self) -> ActorState {
        ActorState {
            actor_id: id_field(self.id.as_bytes()),
            state: self.state_number(),
            worker: self.worker.clone(),
            incarnation: self.incarnation,
            death: self.death.clone(),
            restarts: self.restarts,
            max_restarts: self.creation.max_restarts,
            name: self.creation.name.clone(),
            namespace: self.creation.namespace.clone(),
            class_name: self.creation.class_name.clone(),
            handle_metadata: self.creation.handle_metadata.clone(),
            owner: self.creation.owner.clone(),
            max_task_retries: self.creation.max_task_retries,
            pending_reason: self.pending_reason.clone(),
            infeasible: self.infeasible,
            detached: self.creation.detached,
            pid: self.pid,
            out_of_order: self.creation.out_of_order,
            max_pending_calls: self.creation.max_pending_calls,
        }
    }
}

/// The actors and their indices.
#[derive(Debug, Default)]
pub(crate) struct Actors {
    pub(crate) rows: BTreeMap<ActorId, ActorRow>,
    pub(crate) names: BTreeMap<(String, String), ActorId>,
    pub(crate) by_owner: BTreeMap<(NodeId, WorkerId), BTreeSet<ActorId>>,
    pub(crate) by_node: BTreeMap<NodeId, BTreeSet<ActorId>>,
    pub(crate) by_job: BTreeMap<JobId, BTreeSet<ActorId>>,
    /// Those that wait for a node, in the order of registration.
    pub(crate) waiting: BTreeSet<(u64, ActorId)>,
    /// Oldest death first.
    pub(crate) dead: VecDeque<ActorId>,
    pub(crate) next_order: u64,
}

impl Actors {
    pub(crate) fn on_node(&self, node: NodeId) -> Vec<ActorId> {
        self.by_node.get(&node).into_iter().flatten().copied().collect()
    }

    pub(crate) fn of_job(&self, job: JobId) -> Vec<ActorId> {
        self.by_job.get(&job).into_iter().flatten().copied().collect()
    }

    /// Puts a row into every index it belongs to.
    pub(crate) fn index(&mut self, id: ActorId) {
        let Some(row) = self.rows.get(&id) else { return };
        self.by_job.entry(id.job_id()).or_default().insert(id);
        if row.is_dead() {
            return;
        }
        if let Some(key) = row.name_key().filter(|_| row.holds_name()) {
            self.names.insert(key, id);
        }
        if let Some(owner) = row.owner() {
            self.by_owner.entry(owner).or_default().insert(id);
        }
        match row.node() {
            Some(node) => drop(self.by_node.entry(node).or_default().insert(id)),
            None => drop(self.waiting.insert((row.order, id))),
        }
    }

    /// Takes a row out of every index but its job's.
    pub(crate) fn unindex(&mut self, id: ActorId) {
        let Some(row) = self.rows.get(&id) else { return };
        if let Some(key) = row.name_key().filter(|key| self.names.get(key) == Some(&id)) {
            self.names.remove(&key);
        }
        if let Some(owner) = row.owner() {
            remove_member(&mut self.by_owner, &owner, &id);
        }
        if let Some(node) = row.node() {
            remove_member(&mut self.by_node, &node, &id);
        }
        self.waiting.remove(&(row.order, id));
    }

    fn forget(&mut self, id: ActorId) {
        self.unindex(id);
        self.rows.remove(&id);
        remove_member(&mut self.by_job, &id.job_id(), &id);
    }
}

fn remove_member<K: Ord, V: Ord>(index: &mut BTreeMap<K, BTreeSet<V>>, key: &K, member: &V) {
    if let Some(members) = index.get_mut(key) {
        members.remove(member);
        if members.is_empty() {
            index.remove(key);
        }
    }
}

impl Gcs {
    pub(crate) fn actor_state(&self, id: ActorId) -> Option<ActorState> {
        self.actors.rows.get(&id).map(ActorRow::state)
    }

    /// Stores and publishes what an actor has become.
    pub(crate) fn actor_changed(&mut self, id: ActorId) {
        let Some(row) = self.actors.rows.get(&id) else { return };
        let record = ActorRecord {
            state: Some(row.state()),
            node_id: row.node().map(|node| id_field(node.as_bytes())).unwrap_or_default(),
            was_alive: row.was_alive,
            out_of_scope: row.out_of_scope,
            start_time_ms: row.start_time_ms,
            end_time_ms: row.end_time_ms,
            order: row.order,
        };
        self.put_row(Table::Actors, id.as_bytes(), &record);
        self.publish_actor(id);
    }

    /// Changes an actor and keeps its indices right.
    pub(crate) fn change_actor(&mut self, id: ActorId, change: impl FnOnce(&mut ActorRow)) {
        self.actors.unindex(id);
        if let Some(row) = self.actors.rows.get_mut(&id) {
            change(row);
        }
        self.actors.index(id);
    }

    /// A node says how a creation ended.
    pub(crate) fn on_actor_created(&mut self, node: NodeId, created: ActorCreated) {
        let Ok(id) = ActorId::from_binary(&created.actor_id) else {
            return;
        };
        let row = self.actors.rows.get(&id);
        let expected = row.filter(|row| row.node() == Some(node) && row.incarnation == created.incarnation);
        let Some(row) = expected else {
            // An instance that lost a race: nobody will ever call it.
            if created.failure.is_none() && !created.rejected {
                let message = "another incarnation of the actor took its place".to_string();
                let cause = DeathCause {
                    kind: DEATH_KILLED,
                    message,
                    ..DeathCause::default()
                };
                self.send_kill(node, id, created.incarnation, cause, false);
            }
            return;
        };
        if matches!(row.phase, Phase::Alive(_)) {
            return;
        }
        let busy = created
            .failure
            .as_ref()
            .is_some_and(|cause| cause.kind == DEATH_UNKNOWN && cause.message.is_empty());
        match created.failure {
            _ if created.rejected || busy => self.actor_rejected(node, id),
            Some(cause) => self.actor_process_died(id, cause),
            None => self.actor_is_alive(node, id, created.worker, created.pid),
        }
    }

    pub(crate) fn actor_is_alive(&mut self, node: NodeId, id: ActorId, worker: Option<Address>, pid: u32) {
        let now = self.now_ms;
        self.settle_holding(node, HoldingKey::Actor(id));
        self.change_actor(id, |row| {
            row.phase = Phase::Alive(node);
            row.worker = worker;
            row.pid = pid;
            row.was_alive = true;
            row.rejections = 0;
            row.pending_reason.clear();
            row.infeasible = false;
            row.start_time_ms = if row.start_time_ms == 0 { now } else { row.start_time_ms };
        });
        self.actor_changed(id);
        self.end_if_out_of_scope(id);
    }

    fn actor_rejected(&mut self, node: NodeId, id: ActorId) {
        self.drop_holding(node, HoldingKey::Actor(id));
        let rejections = self.actors.rows.get(&id).map_or(0, |row| row.rejections);
        let not_before_ms = self.back_off(rejections);
        self.change_actor(id, |row| {
            row.phase = Phase::Waiting;
            row.rejections += 1;
            row.not_before_ms = not_before_ms;
            row.pending_reason = format!("node {node} had no room for it after all: it is placed again");
        });
        self.actor_changed(id);
    }

    /// The process that was, or was to become, the actor is no more: restart it or let it be dead.
    pub(crate) fn actor_process_died(&mut self, id: ActorId, cause: DeathCause) {
        let Some(row) = self.actors.rows.get(&id).filter(|row| !row.is_dead()) else {
            return;
        };
        let is_final = matches!(
            cause.kind,
            DEATH_CONSTRUCTOR
                | DEATH_INTENDED
                | DEATH_OUT_OF_SCOPE
                | DEATH_OWNER
                | DEATH_JOB
                | DEATH_UNSCHEDULABLE
                | DEATH_RUNTIME_ENV
                | DEATH_PLACEMENT_GROUP
        );
        // A node that dies before the constructor ended costs the actor nothing: it has not lived yet.
        let free = cause.kind == DEATH_NODE && matches!(row.phase, Phase::Placing(_));
        let allowed = row.creation.max_restarts < 0 || (row.restarts as i64) < i64::from(row.creation.max_restarts);
        if is_final || row.out_of_scope || !(allowed || free) {
            let ended_well = matches!(
                cause.kind,
                DEATH_UNKNOWN | DEATH_INTENDED | DEATH_KILLED | DEATH_OUT_OF_SCOPE
            );
            let cause = if row.out_of_scope && ended_well {
                out_of_scope_cause(&cause)
            } else {
                cause
            };
            self.actor_is_dead(id, cause);
            return;
        }
        if let Some(node) = row.node() {
            self.drop_holding(node, HoldingKey::Actor(id));
        }
        self.change_actor(id, |row| {
            row.phase = Phase::Waiting;
            row.incarnation += 1;
            row.restarts += u32::from(!free);
            row.worker = None;
            row.pid = 0;
            row.death = Some(cause);
            row.not_before_ms = 0;
            row.pending_reason = "its last process died and it is placed again".into();
        });
        self.actor_changed(id);
        self.place_at_end = true;
    }

    /// The end. The worker, if any, must be told by the caller.
    pub(crate) fn actor_is_dead(&mut self, id: ActorId, cause: DeathCause) {
        let now = self.now_ms;
        let Some(row) = self.actors.rows.get(&id).filter(|row| !row.is_dead()) else {
            return;
        };
        if let Some(node) = row.node() {
            // A worker that lived holds its room until it is gone, which the node's reports show.
            match row.phase {
                Phase::Alive(_) => self.settle_holding(node, HoldingKey::Actor(id)),
                _ => self.drop_holding(node, HoldingKey::Actor(id)),
            }
        }
        self.change_actor(id, |row| {
            row.phase = Phase::Dead;
            row.death = Some(cause);
            row.end_time_ms = now;
            row.pending_reason.clear();
            row.infeasible = false;
            // What only a further creation would need is given up.
            let creation = Arc::make_mut(&mut row.creation);
            creation.call = None;
            creation.payload = bytes::Bytes::new();
            creation.handle_metadata = bytes::Bytes::new();
        });
        if let Some(creation) = self.actors.rows.get(&id).map(|row| row.creation.clone()) {
            self.put_row(Table::ActorCreations, id.as_bytes(), creation.as_ref());
        }
        self.actor_changed(id);
        self.actors.dead.push_back(id);
        self.remove_groups_of_actor(id);
        self.drop_keys_of_finished_job(id.job_id());
        self.forget_old_actors();
    }

    pub(crate) fn forget_old_actors(&mut self) {
        while self.actors.dead.len() as u64 > self.settings.maximum_gcs_destroyed_actor_cached_count {
            if let Some(oldest) = self.actors.dead.pop_front() {
                self.actors.forget(oldest);
                self.tombstones.insert(oldest);
                self.delete_row(Table::Actors, oldest.as_bytes());
                self.delete_row(Table::ActorCreations, oldest.as_bytes());
            }
        }
    }

    pub(crate) fn send_kill(&mut self, node: NodeId, id: ActorId, incarnation: u64, cause: DeathCause, graceful: bool) {
        let actor_id = id_field(id.as_bytes());
        self.send(
            node,
            GcsMessage::KillActorWorker(KillActorWorker {
                actor_id,
                incarnation,
                cause: Some(cause),
                graceful,
            }),
        );
    }

    /// Ends an actor for good and at once.
    pub(crate) fn kill_actor(&mut self, id: ActorId, cause: DeathCause) {
        let Some(row) = self.actors.rows.get(&id).filter(|row| !row.is_dead()) else {
            return;
        };
        let (node, incarnation) = (row.node(), row.incarnation);
        self.actor_is_dead(id, cause.clone());
        if let Some(node) = node {
            self.send_kill(node, id, incarnation, cause, false);
        }
    }

    pub(crate) fn end_if_out_of_scope(&mut self, id: ActorId) {
        let Some(row) = self.actors.rows.get(&id).filter(|row| row.out_of_scope) else {
            return;
        };
        if let Phase::Alive(node) = row.phase {
            let (incarnation, cause) = (row.incarnation, out_of_scope_cause(&DeathCause::default()));
            self.send_kill(node, id, incarnation, cause, true);
        }
    }

    /// A node reports the death of one of its processes. It does so again with each registration until it has read the
    /// acknowledgement, so a repeat must change nothing.
    pub(crate) fn on_worker_death(&mut self, node: NodeId, report: WorkerDeathReport) {
        let cause = report.cause.unwrap_or_else(|| DeathCause {
            kind: DEATH_CRASHED,
            ..DeathCause::default()
        });
        if let Some(worker) = report.worker.as_ref().and_then(|address| address.worker().ok()) {
            // Who had no link when it was told first asks the dead process's raylet itself.
            if !self.dead_processes.contains(&(node, worker)) {
                self.process_died((node, worker), &cause);
                let died = WorkerDied {
                    worker: report.worker.clone(),
                    cause: Some(cause.clone()),
                };
                self.send_to_all(Some(node), &GcsMessage::WorkerDied(died));
            }
        }
        if let Ok(id) = ActorId::from_binary(&report.actor_id) {
            let present = self
                .actors
                .rows
                .get(&id)
                .is_some_and(|row| row.node() == Some(node) && row.incarnation == report.incarnation);
            if present {
                self.actor_process_died(id, cause);
            }
        }
        if let Ok(job) = JobId::from_binary(&report.driver_job_id) {
            self.finish_job(job);
        }
    }

    /// A process is dead: it owns, watches and waits no more.
    pub(crate) fn process_died(&mut self, process: (NodeId, WorkerId), cause: &DeathCause) {
        self.dead_processes.insert(process);
        self.watches_forget_process(process);
        let why = if cause.message.is_empty() {
            String::new()
        } else {
            format!(": {}", cause.message)
        };
        let message = format!("its owner, process {} on node {}, died{why}", process.1, process.0);
        let cause = DeathCause {
            kind: DEATH_OWNER,
            message,
            ..DeathCause::default()
        };
        self.owners_died(|node, worker| (node, worker) == process, &cause);
    }

    /// Ends the actors of owners that died, except detached ones.
    pub(crate) fn owners_died(&mut self, died: impl Fn(NodeId, WorkerId) -> bool, cause: &DeathCause) {
        let owned: Vec<ActorId> = self
            .actors
            .by_owner
            .iter()
            .filter(|((node, worker), _)| died(*node, *worker))
            .flat_map(|(_, actors)| actors.iter().copied())
            .collect();
        for id in owned {
            if self.actors.rows.get(&id).is_some_and(|row| !row.creation.detached) {
                self.kill_actor(id, cause.clone());
            }
        }
        self.unregistered_owner_died(died);
    }

    /// When something that was rejected this often may be tried again.
    pub(crate) fn back_off(&mut self, rejections: u32) -> u64 {
        let initial = self.settings.placement_backoff_initial_ms.max(1);
        let wait = initial
            .saturating_mul(1 << rejections.min(16))
            .min(self.settings.placement_backoff_max_ms.max(1));
        let at = self.now_ms + wait;
        self.set_timer(at, crate::state::Timer::Place);
        at
    }

    /// What the actor holds where it runs, under its group's names where it is in one.
    pub(crate) fn held_resources(row: &ActorRow) -> ResourceSet {
        row.wish.translate(&resource_set(&row.creation.resources))
    }
}

pub(crate) fn out_of_scope_cause(cause: &DeathCause) -> DeathCause {
    let message = "every handle to it went out of scope".to_string();
    DeathCause {
        kind: DEATH_OUT_OF_SCOPE,
        message,
        ..cause.clone()
    }
}
