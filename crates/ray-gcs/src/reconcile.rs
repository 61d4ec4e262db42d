//! Registration: owns what happens when a node joins, and how two views of one node are made one when it joins again.
//!
//! It refuses nodes that were declared dead, and tells them so.
//!
//! What was sent over an earlier link and is not in the node's snapshot was lost with that link: links are ordered, so
//! a node that has read something says so in its snapshot. That is why nothing else needs to be repeated. What the node
//! told and the control plane did not acknowledge, deaths, is part of the registration.
//!
//! Invariants:
//! 1. After registration the node runs only instances and holds only bundles that the control plane has there, or it has
//!    been told to give them up.
//! 2. What the control plane has there and the node does not is restarted, placed again, or finished.

use std::collections::{BTreeMap, BTreeSet};

use ray_ids::{ActorId, JobId, NodeId, PlacementGroupId};
use ray_wire::{
    ActorCreated, Address, BundleKey, DeathCause, KillActorWorker, NodeInfo, NodeRegistered, RegisterNode,
    DEATH_CRASHED, DEATH_KILLED, DEATH_NODE,
};
use serde_json::json;

use crate::actors::Phase;
use crate::messages::GcsMessage;
use crate::nodes::NodeRow;
use crate::placement_groups::GroupPhase;
use crate::records::Table;
use crate::state::{id_field, Command, Gcs, Timer};

/// What a node says runs in an actor's instance there.
struct Instance {
    worker: Option<Address>,
    pid: u32,
}

impl Gcs {
    pub(crate) fn on_register_node(&mut self, id: NodeId, correlation: u64, message: RegisterNode) {
        let refusal = self.registration_refusal(id, &message);
        if let Some(reason) = refusal {
            let refused = NodeRegistered {
                refusal: reason.clone(),
                ..NodeRegistered::default()
            };
            let answer = GcsMessage::NodeRegistered {
                correlation,
                message: Box::new(refused),
            };
            self.push_command(Command::SendToNode {
                node: id,
                message: answer,
            });
            if self.nodes.get(&id).is_some_and(|row| !row.alive) {
                self.refuse_dead_node(id, reason);
            } else {
                self.push_command(Command::CloseNode { node: id, reason });
            }
            return;
        }
        let Some(info) = message.node.clone() else { return };
        let is_new = !self.nodes.contains_key(&id);
        // Questions of an earlier link are asked again over this one.
        self.kv_forget_node(id);
        self.group_waits_forget_node(id);
        self.enter_node(id, info, &message);
        // The answer is written after the books are in order, but it must be the first thing that the node reads.
        let before = self.mark();
        // Deaths come before the books are compared: a missing actor's death has a cause, which decides what follows.
        for report in message.deaths {
            self.on_worker_death(id, report);
        }
        let superseded = if is_new {
            self.all_superseded(&message.actors)
        } else {
            self.reconcile_actors(id, &message.actors)
        };
        self.reconcile_bundles(id, &message.bundles);
        self.reconcile_jobs(id, &message.driver_jobs);
        self.restore_watches(id, &message.watches);
        self.publish_snapshot(id);
        let finished = self.jobs.rows.iter().filter(|(_, row)| row.finished);
        let answer = NodeRegistered {
            cluster_id: id_field(self.cluster_id.as_bytes()),
            publisher_epoch: self.epoch,
            nodes: self.nodes.keys().filter_map(|node| self.node_info(*node)).collect(),
            refusal: String::new(),
            superseded,
            details_json: self.details_json(),
            finished_jobs: finished.map(|(job, _)| id_field(job.as_bytes())).collect(),
        };
        let answer = GcsMessage::NodeRegistered {
            correlation,
            message: Box::new(answer),
        };
        self.insert_command(
            before,
            Command::SendToNode {
                node: id,
                message: answer,
            },
        );
        self.resend_drain(id);
        if is_new {
            self.publish_node(id);
        }
        self.changed_nodes.insert(id);
        self.update_at_once = true;
        self.place_at_end = true;
    }

    fn registration_refusal(&self, id: NodeId, message: &RegisterNode) -> Option<String> {
        let Some(address) = message.node.as_ref().and_then(|node| node.address.as_ref()) else {
            return Some("the registration lacks the node's address".into());
        };
        if address.node().ok() != Some(id) {
            return Some(format!("the registration is of another node than {id}"));
        }
        let row = self.nodes.get(&id)?;
        if !row.alive {
            let reason = &row.info.death_reason;
            return Some(format!(
                "node {id} was declared dead ({reason}): a node that comes back needs a new id"
            ));
        }
        None
    }

    fn enter_node(&mut self, id: NodeId, mut info: NodeInfo, message: &RegisterNode) {
        info.alive = true;
        info.available.clear();
        info.death_reason.clear();
        info.end_time_ms = 0;
        if info.start_time_ms == 0 {
            info.start_time_ms = self.nodes.get(&id).map_or(self.now_ms, |row| row.info.start_time_ms);
        }
        let row = self.nodes.entry(id).or_insert_with(|| NodeRow::new(id, info.clone()));
        row.info = info;
        row.link_up = true;
        row.registered = true;
        row.heard = true;
        row.missed_pings = 0;
        row.report_sequence = 0;
        row.placements_sent = 0;
        row.holdings.clear();
        row.new_bundles.clear();
        let record = row.record();
        self.put_row(Table::Nodes, id.as_bytes(), &record);
        self.expected_nodes.remove(&id);
        let report = message.resources.clone().unwrap_or_default();
        if let Some(row) = self.nodes.get_mut(&id) {
            row.total = crate::nodes::resource_set(&row.info.total);
            row.available = row.total.clone();
        }
        if report.total.is_empty() && report.available.is_empty() {
            self.refresh_view(id);
        } else {
            self.on_resource_report(id, report);
        }
    }

    /// A node that is new to the control plane and runs actors belongs to a cluster whose storage was lost.
    fn all_superseded(&self, actors: &[ActorCreated]) -> Vec<KillActorWorker> {
        actors
            .iter()
            .map(|actor| superseded(actor, "the control plane does not know it"))
            .collect()
    }

    fn reconcile_actors(&mut self, node: NodeId, snapshot: &[ActorCreated]) -> Vec<KillActorWorker> {
        let mut kills = Vec::new();
        let mut there: BTreeMap<ActorId, Instance> = BTreeMap::new();
        for actor in snapshot {
            let id = ActorId::from_binary(&actor.actor_id).ok();
            let row = id.and_then(|id| self.actors.rows.get(&id));
            match (id, row) {
                (Some(id), Some(row)) if row.node() == Some(node) && row.incarnation == actor.incarnation => {
                    there.insert(
                        id,
                        Instance {
                            worker: actor.worker.clone(),
                            pid: actor.pid,
                        },
                    );
                }
                (_, Some(row)) if row.is_dead() => {
                    let cause = row.death.clone().unwrap_or_default();
                    kills.push(KillActorWorker {
                        cause: Some(cause),
                        ..superseded(actor, "")
                    });
                }
                _ => kills.push(superseded(actor, "another incarnation of the actor took its place")),
            }
        }
        for id in self.actors.on_node(node) {
            let Some(phase) = self.actors.rows.get(&id).map(|row| row.phase) else {
                continue;
            };
            match (there.remove(&id), phase) {
                (
                    Some(Instance {
                        worker: Some(worker),
                        pid,
                    }),
                    Phase::Placing(_),
                ) => {
                    self.actor_is_alive(node, id, Some(worker), pid);
                }
                (Some(Instance { worker: Some(_), .. }), _) => self.end_if_out_of_scope(id),
                (Some(Instance { worker: None, .. }), Phase::Placing(_)) => {}
                // The order to create it was lost with the link. The next one has another incarnation, so that a
                // creation which was under way all the same is told from it.
                (None, Phase::Placing(_)) => {
                    let message = "the order to create it was lost with its node's link".to_string();
                    self.actor_process_died(
                        id,
                        DeathCause {
                            kind: DEATH_NODE,
                            message,
                            ..DeathCause::default()
                        },
                    );
                }
                (_, Phase::Alive(_)) => {
                    let message = "its process died while its node had no link to the control plane".to_string();
                    self.actor_process_died(
                        id,
                        DeathCause {
                            kind: DEATH_CRASHED,
                            message,
                            ..DeathCause::default()
                        },
                    );
                }
                (_, Phase::Waiting | Phase::Dead) => {}
            }
        }
        kills
    }

    fn reconcile_bundles(&mut self, node: NodeId, snapshot: &[BundleKey]) {
        let mut there: BTreeMap<PlacementGroupId, BTreeMap<u32, bool>> = BTreeMap::new();
        for bundle in snapshot {
            if let Ok(group) = PlacementGroupId::from_binary(&bundle.placement_group_id) {
                there.entry(group).or_default().insert(bundle.index, bundle.committed);
            }
        }
        let concerned =
            |row: &&crate::placement_groups::GroupRow| row.phase != GroupPhase::Removed && row.nodes().contains(&node);
        let groups: Vec<PlacementGroupId> = self.groups.rows.values().filter(concerned).map(|row| row.id).collect();
        for id in groups {
            let Some(row) = self.groups.rows.get(&id) else { continue };
            let here = there.get(&id);
            let kept = (0_u32..)
                .zip(&row.bundles)
                .filter(|(_, bundle)| bundle.node == Some(node))
                .all(|(index, bundle)| !bundle.fresh && here.is_some_and(|here| here.get(&index) == Some(&true)));
            if kept {
                continue;
            }
            // An attempt whose messages may have been lost is given up, and so are bundles that are not there whole.
            self.bundles_lost(node, id, &format!("node {node} lost its link or its bundles"));
        }
        for (id, bundles) in there {
            let row = self.groups.rows.get(&id);
            let attempt = row.map_or(0, |row| row.attempt);
            let ours: BTreeSet<u32> = row
                .filter(|row| row.phase != GroupPhase::Removed)
                .into_iter()
                .flat_map(|row| (0_u32..).zip(&row.bundles))
                .filter(|(_, bundle)| bundle.node == Some(node))
                .map(|(index, _)| index)
                .collect();
            let surplus: Vec<u32> = bundles.into_keys().filter(|index| !ours.contains(index)).collect();
            if !surplus.is_empty() {
                self.return_bundles(node, id, attempt, surplus);
            }
        }
    }

    fn reconcile_jobs(&mut self, node: NodeId, driver_jobs: &[bytes::Bytes]) {
        let connected: Vec<JobId> = driver_jobs
            .iter()
            .filter_map(|job| JobId::from_binary(job).ok())
            .collect();
        self.finish_jobs_of_node(node, Some(&connected));
    }

    fn resend_drain(&mut self, id: NodeId) {
        let Some(row) = self.nodes.get(&id).filter(|row| !row.drain_reason.is_empty()) else {
            return;
        };
        let (reason, deadline_ms) = (row.drain_reason.clone(), row.drain_deadline_ms);
        let node_id = id_field(id.as_bytes());
        self.send(
            id,
            GcsMessage::DrainNode(ray_wire::DrainNode {
                node_id,
                reason,
                deadline_ms,
            }),
        );
        if deadline_ms != 0 {
            self.set_timer(deadline_ms.max(self.now_ms), Timer::Drain(id));
        }
    }

    fn details_json(&self) -> String {
        json!({
            "session_name": self.settings.session_name,
            "system_config": self.settings.system_config,
            "cluster_id": self.cluster_id.hex(),
        })
        .to_string()
    }
}

fn superseded(actor: &ActorCreated, message: &str) -> KillActorWorker {
    let cause = DeathCause {
        kind: DEATH_KILLED,
        message: message.to_string(),
        ..DeathCause::default()
    };
    KillActorWorker {
        actor_id: actor.actor_id.clone(),
        incarnation: actor.incarnation,
        cause: Some(cause),
        graceful: false,
    }
}
