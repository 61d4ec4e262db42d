//! Publications: owns who watches which actor and which channel, and the order in which each node is told.
//!
//! It refuses watches beyond a process's limit.
//!
//! Invariants:
//! 1. Each node's publications count up from 1 within an epoch without a gap. News may be lost with a link, and so may
//!    wishes to watch: a node that registers again says what it watches and is told the present states anew.
//! 2. The watches of a dead process or node are gone. A watched actor that is dead is watched by nobody.
//! 3. Who watches is told the present state at once.

use std::collections::{BTreeMap, BTreeSet};

use bytes::Bytes;
use ray_ids::{ActorId, JobId, NodeId, WorkerId};
use ray_wire::{
    ActorKey, ActorState, DeathCause, GcsReply, Publication, Publish, ACTOR_DEAD, ACTOR_DEPENDENCIES_UNREADY,
    DEATH_JOB, DEATH_OWNER, DEATH_UNKNOWN,
};

use crate::messages::GcsMessage;
use crate::query;
use crate::state::{done, id_field, invalid, Gcs};

type Process = (NodeId, WorkerId);

#[derive(Debug, Default)]
pub(crate) struct Watches {
    pub(crate) of_actor: BTreeMap<ActorId, BTreeSet<Process>>,
    pub(crate) by_process: BTreeMap<Process, BTreeSet<ActorId>>,
    pub(crate) of_channel: BTreeMap<String, BTreeSet<Process>>,
    /// Watched actors that are not registered yet, by the owner that is to do it.
    pub(crate) unregistered: BTreeMap<Process, BTreeSet<ActorId>>,
}

impl Watches {
    fn add_actor(&mut self, process: Process, actor: ActorId) {
        self.of_actor.entry(actor).or_default().insert(process);
        self.by_process.entry(process).or_default().insert(actor);
    }

    fn remove_actor(&mut self, process: Process, actor: ActorId) {
        if let Some(watchers) = self.of_actor.get_mut(&actor) {
            watchers.remove(&process);
            if watchers.is_empty() {
                self.of_actor.remove(&actor);
            }
        }
        if let Some(actors) = self.by_process.get_mut(&process) {
            actors.remove(&actor);
            if actors.is_empty() {
                self.by_process.remove(&process);
            }
        }
    }

    fn drop_actor(&mut self, actor: ActorId) {
        for process in self.of_actor.get(&actor).cloned().unwrap_or_default() {
            self.remove_actor(process, actor);
        }
        self.registered(actor);
    }

    /// The actor is no longer one of which only the owner is known.
    pub(crate) fn registered(&mut self, actor: ActorId) {
        self.unregistered.retain(|_, actors| {
            actors.remove(&actor);
            !actors.is_empty()
        });
    }

    fn forget(&mut self, gone: impl Fn(&Process) -> bool) {
        let processes: Vec<Process> = self
            .by_process
            .keys()
            .filter(|process| gone(process))
            .copied()
            .collect();
        for process in processes {
            for actor in self.by_process.get(&process).cloned().unwrap_or_default() {
                self.remove_actor(process, actor);
            }
        }
        self.of_channel.retain(|_, processes| {
            processes.retain(|process| !gone(process));
            !processes.is_empty()
        });
    }

    pub(crate) fn check(&self) -> Result<(), String> {
        for (actor, watchers) in &self.of_actor {
            for process in watchers {
                if !self
                    .by_process
                    .get(process)
                    .is_some_and(|actors| actors.contains(actor))
                {
                    return Err(format!("the watch of {actor} by {process:?} is in one index only"));
                }
            }
        }
        let one: usize = self.of_actor.values().map(BTreeSet::len).sum();
        let other: usize = self.by_process.values().map(BTreeSet::len).sum();
        if one != other {
            return Err(format!("{one} watches by actor and {other} by process"));
        }
        Ok(())
    }
}

impl Gcs {
    pub(crate) fn watch_actor(&mut self, node: NodeId, worker: WorkerId, key: &ActorKey) -> GcsReply {
        let Ok(actor) = ActorId::from_binary(&key.actor_id) else {
            return invalid("an actor id has 16 bytes");
        };
        let process = (node, worker);
        let watched = self.watches.by_process.get(&process).map_or(0, BTreeSet::len) as u64;
        if watched >= self.settings.maximum_watches_per_process {
            return invalid("this process watches too many actors (maximum_watches_per_process)");
        }
        let owner = key
            .owner
            .as_ref()
            .and_then(|owner| Some((owner.node().ok()?, owner.worker().ok()?)));
        self.watches.add_actor(process, actor);
        let state = self.actor_state_or_guess(actor, owner);
        if state.state == ACTOR_DEPENDENCIES_UNREADY {
            if let Some(owner) = owner {
                self.watches.unregistered.entry(owner).or_default().insert(actor);
            }
        }
        let dead = state.state == ACTOR_DEAD;
        self.publish_to(node, vec![worker], Some(state.clone()), "", "");
        if dead {
            self.watches.remove_actor(process, actor);
        }
        GcsReply {
            actor: Some(state),
            ..done()
        }
    }

    pub(crate) fn unwatch_actor(&mut self, node: NodeId, worker: WorkerId, key: &ActorKey) -> GcsReply {
        let Ok(actor) = ActorId::from_binary(&key.actor_id) else {
            return invalid("an actor id has 16 bytes");
        };
        self.watches.remove_actor((node, worker), actor);
        done()
    }

    pub(crate) fn subscribe(&mut self, node: NodeId, worker: WorkerId, channel: String) -> GcsReply {
        if channel.is_empty() {
            return invalid("a channel has a name");
        }
        self.watches
            .of_channel
            .entry(channel)
            .or_default()
            .insert((node, worker));
        done()
    }

    pub(crate) fn publish_request(&mut self, publish: &Publish) -> GcsReply {
        if publish.channel.is_empty() {
            return invalid("a channel has a name");
        }
        self.publish_channel(&publish.channel, &publish.json);
        done()
    }

    /// What is known of an actor that may not be registered.
    fn actor_state_or_guess(&self, actor: ActorId, owner: Option<Process>) -> ActorState {
        if let Some(state) = self.actor_state(actor) {
            return state;
        }
        let owner_died = owner.is_some_and(|owner| self.is_process_dead(owner));
        let job = actor.job_id();
        let (kind, message) = if self.tombstones.contains(&actor) {
            (
                DEATH_UNKNOWN,
                "it died so long ago that the cause is no longer remembered".to_string(),
            )
        } else if owner_died {
            (DEATH_OWNER, "its owner died before it registered the actor".to_string())
        } else if self.jobs.is_over(job) {
            (DEATH_JOB, format!("its job {job} is over"))
        } else {
            return ActorState {
                actor_id: id_field(actor.as_bytes()),
                state: ACTOR_DEPENDENCIES_UNREADY,
                pending_reason: "its owner has not registered it yet: its constructor's arguments are not ready".into(),
                ..ActorState::default()
            };
        };
        ActorState {
            actor_id: id_field(actor.as_bytes()),
            state: ACTOR_DEAD,
            death: Some(DeathCause {
                kind,
                message,
                ..DeathCause::default()
            }),
            ..ActorState::default()
        }
    }

    /// Whether a process is known to be dead.
    pub(crate) fn is_process_dead(&self, process: Process) -> bool {
        self.dead_processes.contains(&process) || self.nodes.get(&process.0).is_some_and(|row| !row.alive)
    }

    /// Owners that died leave nobody waiting for actors that they had not registered.
    pub(crate) fn unregistered_owner_died(&mut self, died: impl Fn(NodeId, WorkerId) -> bool) {
        let owners: Vec<Process> = self
            .watches
            .unregistered
            .keys()
            .filter(|(node, worker)| died(*node, *worker))
            .copied()
            .collect();
        for owner in owners {
            for actor in self.watches.unregistered.remove(&owner).unwrap_or_default() {
                let state = self.actor_state_or_guess(actor, Some(owner));
                self.publish_state(actor, state);
            }
        }
    }

    pub(crate) fn unregistered_job_over(&mut self, job: JobId) {
        let actors: Vec<ActorId> = self
            .watches
            .of_actor
            .keys()
            .filter(|actor| actor.job_id() == job)
            .copied()
            .collect();
        for actor in actors {
            if !self.actors.rows.contains_key(&actor) {
                let state = self.actor_state_or_guess(actor, None);
                self.publish_state(actor, state);
            }
        }
    }

    /// Tells everyone who watches what an actor's state is now.
    pub(crate) fn publish_actor(&mut self, actor: ActorId) {
        if let Some(state) = self.actor_state(actor) {
            self.publish_state(actor, state);
        }
    }

    fn publish_state(&mut self, actor: ActorId, state: ActorState) {
        let mut by_node: BTreeMap<NodeId, Vec<WorkerId>> = BTreeMap::new();
        for (node, worker) in self.watches.of_actor.get(&actor).into_iter().flatten() {
            by_node.entry(*node).or_default().push(*worker);
        }
        let dead = state.state == ACTOR_DEAD;
        for (node, workers) in by_node {
            self.publish_to(node, workers, Some(state.clone()), "", "");
        }
        if dead {
            self.watches.drop_actor(actor);
        }
    }

    pub(crate) fn publish_channel(&mut self, channel: &str, json: &str) {
        let mut by_node: BTreeMap<NodeId, Vec<WorkerId>> = BTreeMap::new();
        for (node, worker) in self.watches.of_channel.get(channel).into_iter().flatten() {
            by_node.entry(*node).or_default().push(*worker);
        }
        for (node, workers) in by_node {
            self.publish_to(node, workers, None, channel, json);
        }
    }

    pub(crate) fn publish_node(&mut self, node: NodeId) {
        if self.watches.of_channel.contains_key("nodes") {
            let json = query::node_json(self, node).to_string();
            self.publish_channel("nodes", &json);
        }
    }

    pub(crate) fn publish_job(&mut self, job: JobId) {
        if self.watches.of_channel.contains_key("jobs") {
            let json = query::job_json(self, job).to_string();
            self.publish_channel("jobs", &json);
        }
        if self.jobs.is_over(job) {
            self.unregistered_job_over(job);
        }
    }

    fn publish_to(
        &mut self,
        node: NodeId,
        workers: Vec<WorkerId>,
        actor: Option<ActorState>,
        channel: &str,
        json: &str,
    ) {
        let epoch = self.epoch;
        let Some(row) = self.nodes.get_mut(&node).filter(|row| row.alive) else {
            return;
        };
        // Counted even without a link: the gap is what makes the node's next registration ask for a snapshot.
        row.publication_sequence += 1;
        let subscribers: Vec<Bytes> = workers.iter().map(|worker| id_field(worker.as_bytes())).collect();
        let publication = Publication {
            epoch,
            sequence: row.publication_sequence,
            subscribers,
            actor,
            channel: channel.to_string(),
            json: json.to_string(),
        };
        self.send(node, GcsMessage::Publication(Box::new(publication)));
    }

    /// Publishes the present states of everything that processes of a node watch.
    pub(crate) fn publish_snapshot(&mut self, node: NodeId) {
        let mut watched: BTreeMap<ActorId, Vec<WorkerId>> = BTreeMap::new();
        for ((at, worker), actors) in self.watches.by_process.range((node, WorkerId::from_array([0; 28]))..) {
            if *at != node {
                break;
            }
            for actor in actors {
                watched.entry(*actor).or_default().push(*worker);
            }
        }
        for (actor, workers) in watched {
            let state = self.actor_state_or_guess(actor, None);
            let dead = state.state == ACTOR_DEAD;
            self.publish_to(node, workers.clone(), Some(state), "", "");
            if dead {
                workers
                    .into_iter()
                    .for_each(|worker| self.watches.remove_actor((node, worker), actor));
            }
        }
    }

    /// Takes in what a node's processes watch, as the node tells it when it registers again: it knows of processes that
    /// died meanwhile, and of news that were lost with the link. A node that says nothing keeps what it had.
    pub(crate) fn restore_watches(&mut self, node: NodeId, watches: &[ray_wire::ProcessWatches]) {
        if !watches.is_empty() {
            self.watches_forget_node(node);
        }
        for watch in watches {
            let Ok(worker) = WorkerId::from_binary(&watch.worker_id) else {
                continue;
            };
            for actor in watch.actor_ids.iter().filter_map(|id| ActorId::from_binary(id).ok()) {
                self.watches.add_actor((node, worker), actor);
            }
            for channel in &watch.channels {
                self.watches
                    .of_channel
                    .entry(channel.clone())
                    .or_default()
                    .insert((node, worker));
            }
        }
    }

    pub(crate) fn watches_forget_node(&mut self, node: NodeId) {
        self.watches.forget(|(at, _)| *at == node);
    }

    pub(crate) fn watches_forget_process(&mut self, process: Process) {
        self.watches.forget(|at| *at == process);
    }
}
