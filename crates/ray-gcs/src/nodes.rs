//! Nodes: owns who is in the cluster, what each has free by the control plane's own optimistic view, and who is dead.
//!
//! It refuses messages of dead nodes, a second node of the same id elsewhere, and reports that are older than one seen.
//!
//! What was sent to a node and is not in its reports yet is a `Holding`: it is subtracted from what the node last said,
//! so that a burst of placements spreads and does not oversell between two reports.
//!
//! Invariants:
//! 1. A node dies once; its row stays dead, and its id is refused as long as it is remembered.
//! 2. The view holds exactly the nodes that are alive, and offers those that have a link and have registered.
//! 3. What is free in the view is what was reported, less the holdings, and never below zero.
//! 4. Silence alone kills only after several unanswered questions, so that a control plane that was itself stopped for
//!    a while does not blame its nodes.
//! 5. A missing link kills only after it was missing for the whole grace without a break.

use ray_ids::{ActorId, NodeId, PlacementGroupId};
use ray_sched::{bundle_resources, Labels, NodeView, ResourceSet};
use ray_wire::{
    ClusterUpdate, DeathCause, Demand, DrainNode, GcsReply, LeavesCluster, NodeDied, NodeInfo, ResourceAmount,
    ResourceReport, DEATH_NODE, DEATH_OWNER, GCS_ERROR_NOT_FOUND,
};

use crate::messages::GcsMessage;
use crate::records::{NodeRecord, Table};
use crate::state::{done, id_field, invalid, refusal, Command, Gcs, Timer};

/// The node is alive, or the reason is unknown.
pub const DEATH_REASON_UNSPECIFIED: u32 = 0;
/// It left as intended.
pub const DEATH_REASON_EXPECTED_TERMINATION: u32 = 1;
/// It was lost.
pub const DEATH_REASON_UNEXPECTED_TERMINATION: u32 = 2;
/// It was drained for preemption or at its deadline.
pub const DEATH_REASON_AUTOSCALER_DRAIN_PREEMPTED: u32 = 3;

/// For whom room is held.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum HoldingKey {
    Actor(ActorId),
    Bundle(PlacementGroupId, u32),
}

/// Room that was given away and that the node's reports may not show yet.
#[derive(Debug, Clone)]
pub(crate) struct Holding {
    pub(crate) key: HoldingKey,
    pub(crate) resources: ResourceSet,
    /// Which placement on the node's link this was, from 1.
    pub(crate) number: u64,
    pub(crate) since_ms: u64,
    /// The node has answered: its next report shows it.
    pub(crate) answered: bool,
}

#[derive(Debug)]
pub(crate) struct NodeRow {
    pub(crate) id: NodeId,
    pub(crate) info: NodeInfo,
    pub(crate) alive: bool,
    pub(crate) link_up: bool,
    /// When the present absence of its link began.
    pub(crate) link_down_since_ms: u64,
    /// Has registered with this life of the control plane.
    pub(crate) registered: bool,
    pub(crate) heard: bool,
    pub(crate) missed_pings: u64,
    pub(crate) report_sequence: u64,
    pub(crate) total: ResourceSet,
    pub(crate) available: ResourceSet,
    pub(crate) demands: Vec<Demand>,
    pub(crate) idle_ms: u64,
    pub(crate) holdings: Vec<Holding>,
    /// Bundles committed there that no report shows yet.
    pub(crate) new_bundles: Vec<(PlacementGroupId, u32, ResourceSet)>,
    pub(crate) placements_sent: u64,
    pub(crate) publication_sequence: u64,
    pub(crate) drain_reason: String,
    pub(crate) drain_deadline_ms: u64,
    pub(crate) death_reason: u32,
}

impl NodeRow {
    pub(crate) fn new(id: NodeId, info: NodeInfo) -> Self {
        let total = resource_set(&info.total);
        Self {
            id,
            alive: true,
            link_up: false,
            link_down_since_ms: 0,
            registered: false,
            heard: true,
            missed_pings: 0,
            report_sequence: 0,
            available: total.clone(),
            total,
            demands: Vec::new(),
            idle_ms: 0,
            holdings: Vec::new(),
            new_bundles: Vec::new(),
            placements_sent: 0,
            publication_sequence: 0,
            drain_reason: String::new(),
            drain_deadline_ms: 0,
            death_reason: DEATH_REASON_UNSPECIFIED,
            info,
        }
    }

    pub(crate) fn record(&self) -> NodeRecord {
        NodeRecord {
            info: Some(self.info.clone()),
            death_reason: self.death_reason,
            drain_deadline_ms: self.drain_deadline_ms,
            drain_reason: self.drain_reason.clone(),
        }
    }
}

/// The amounts of a message.
pub(crate) fn resource_set(amounts: &[ResourceAmount]) -> ResourceSet {
    ResourceSet::from_raw(amounts.iter().map(|amount| (amount.name.as_str(), amount.amount_e4)))
}

/// Amounts for a message.
pub(crate) fn resource_amounts(set: &ResourceSet) -> Vec<ResourceAmount> {
    set.iter()
        .map(|(name, amount)| ResourceAmount {
            name: name.to_string(),
            amount_e4: amount.raw(),
        })
        .collect()
}

fn labels_of(info: &NodeInfo) -> Labels {
    info.labels
        .iter()
        .map(|label| (label.key.clone(), label.value.clone()))
        .collect()
}

impl Gcs {
    pub(crate) fn refuse_dead_node(&mut self, node: NodeId, reason: String) {
        let message = GcsMessage::DeclaredDead(LeavesCluster { reason: reason.clone() });
        self.push_command(Command::SendToNode { node, message });
        self.push_command(Command::CloseNode { node, reason });
    }

    /// The node as messages show it.
    pub(crate) fn node_info(&self, id: NodeId) -> Option<NodeInfo> {
        let row = self.nodes.get(&id)?;
        let mut info = row.info.clone();
        info.alive = row.alive;
        info.draining = !row.drain_reason.is_empty();
        match self.view.nodes.get(&id) {
            Some(view) => {
                info.total = resource_amounts(&view.total);
                info.available = resource_amounts(&view.available);
            }
            None => info.available = Vec::new(),
        }
        Some(info)
    }

    /// Recomputes what the view says of a node; work that waits is looked at again where something may have got free.
    pub(crate) fn refresh_view(&mut self, id: NodeId) {
        let Some(row) = self.nodes.get(&id) else { return };
        if !row.alive {
            self.view.nodes.remove(&id);
            return;
        }
        let (mut total, mut available) = (row.total.clone(), row.available.clone());
        for (_, _, resources) in &row.new_bundles {
            total.add_all(resources);
            available.add_all(resources);
        }
        for holding in &row.holdings {
            for (name, amount) in holding.resources.iter() {
                available.set(name.clone(), available.get(name) - amount);
            }
        }
        let view = NodeView {
            total,
            available,
            labels: labels_of(&row.info),
            alive: row.link_up && row.registered,
            draining: !row.drain_reason.is_empty(),
        };
        if self.view.nodes.get(&id) != Some(&view) {
            self.view.nodes.insert(id, view);
            self.place_at_end = true;
            self.mark_changed(id);
        }
    }

    /// The node is told of in the next update.
    pub(crate) fn mark_changed(&mut self, id: NodeId) {
        self.changed_nodes.insert(id);
        if !self.update_at_once && !std::mem::replace(&mut self.update_timer_set, true) {
            let at = (self.last_update_ms + self.settings.cluster_update_period_ms).max(self.now_ms);
            self.set_timer(at, Timer::ClusterUpdate);
        }
    }

    pub(crate) fn flush_cluster_update(&mut self) {
        if !std::mem::take(&mut self.update_at_once) {
            return;
        }
        self.last_update_ms = self.now_ms;
        let changed = std::mem::take(&mut self.changed_nodes);
        let infos: Vec<(NodeId, NodeInfo)> = changed
            .into_iter()
            .filter_map(|id| self.node_info(id).map(|info| (id, info)))
            .collect();
        let all: Vec<NodeId> = self
            .nodes
            .values()
            .filter(|row| row.alive && row.link_up)
            .map(|row| row.id)
            .collect();
        for node in all {
            // A node knows itself better than it could be told.
            let others = infos.iter().filter(|(id, _)| *id != node);
            let nodes: Vec<NodeInfo> = others.map(|(_, info)| info.clone()).collect();
            if !nodes.is_empty() {
                self.send(node, GcsMessage::ClusterUpdate(ClusterUpdate { nodes }));
            }
        }
    }

    pub(crate) fn on_resource_report(&mut self, id: NodeId, report: ResourceReport) {
        let Some(row) = self.nodes.get_mut(&id) else { return };
        if report.sequence != 0 && report.sequence <= row.report_sequence {
            return;
        }
        row.report_sequence = report.sequence;
        if !report.total.is_empty() {
            row.total = resource_set(&report.total);
        }
        row.available = resource_set(&report.available);
        row.demands = report.demands;
        row.idle_ms = report.idle_ms;
        let seen = report.placements_seen;
        row.holdings
            .retain(|holding| !holding.answered && holding.number > seen);
        let total = &row.total;
        row.new_bundles
            .retain(|(_, _, resources)| resources.iter().any(|(name, _)| total.get(name).is_zero()));
        self.refresh_view(id);
    }

    /// Takes room from a node in the view until its reports show it.
    pub(crate) fn hold(&mut self, id: NodeId, key: HoldingKey, resources: ResourceSet) {
        let now = self.now_ms;
        let settle = self.settings.placement_settle_ms;
        let Some(row) = self.nodes.get_mut(&id) else { return };
        let number = row.placements_sent;
        row.holdings.push(Holding {
            key,
            resources,
            number,
            since_ms: now,
            answered: false,
        });
        self.set_timer(now + settle, Timer::Settle(id));
        // Less is free than before, which is no reason to look again at what waits.
        let place_at_end = self.place_at_end;
        self.refresh_view(id);
        self.place_at_end = place_at_end;
    }

    /// Counts a message that reserves something on the node.
    pub(crate) fn count_placement(&mut self, id: NodeId) {
        if let Some(row) = self.nodes.get_mut(&id) {
            row.placements_sent += 1;
        }
    }

    /// The node has answered and holds the room itself now.
    pub(crate) fn settle_holding(&mut self, id: NodeId, key: HoldingKey) {
        if let Some(row) = self.nodes.get_mut(&id) {
            row.holdings
                .iter_mut()
                .filter(|holding| holding.key == key)
                .for_each(|holding| holding.answered = true);
        }
    }

    /// The room was not taken after all.
    pub(crate) fn drop_holding(&mut self, id: NodeId, key: HoldingKey) {
        if let Some(row) = self.nodes.get_mut(&id) {
            row.holdings.retain(|holding| holding.key != key);
            self.refresh_view(id);
        }
    }

    /// A node that does not count what it has seen has surely reported after this long.
    pub(crate) fn settle_old_placements(&mut self, id: NodeId) {
        let (now, settle) = (self.now_ms, self.settings.placement_settle_ms);
        if let Some(row) = self.nodes.get_mut(&id) {
            row.holdings.retain(|holding| holding.since_ms + settle > now);
            self.refresh_view(id);
        }
    }

    /// Shows a committed bundle before the node's own report does.
    pub(crate) fn show_bundle(&mut self, id: NodeId, group: PlacementGroupId, index: u32, resources: &ResourceSet) {
        if let Some(row) = self.nodes.get_mut(&id) {
            let shown = bundle_resources(resources, group, index);
            if shown.iter().any(|(name, _)| row.total.get(name).is_zero()) {
                row.new_bundles.push((group, index, shown));
            }
            self.refresh_view(id);
        }
    }

    pub(crate) fn hide_bundle(&mut self, id: NodeId, group: PlacementGroupId, index: u32) {
        if let Some(row) = self.nodes.get_mut(&id) {
            row.new_bundles.retain(|(shown, at, _)| (*shown, *at) != (group, index));
            self.drop_holding(id, HoldingKey::Bundle(group, index));
        }
    }

    pub(crate) fn check_health(&mut self) {
        self.set_timer(self.now_ms + self.settings.health_check_period_ms, Timer::Health);
        let threshold = self.settings.health_check_failure_threshold;
        let (mut lost, mut silent) = (Vec::new(), Vec::new());
        for row in self.nodes.values_mut().filter(|row| row.alive && row.link_up) {
            if std::mem::take(&mut row.heard) {
                row.missed_pings = 0;
            } else if row.missed_pings >= threshold {
                lost.push(row.id);
            } else {
                row.missed_pings += 1;
                silent.push(row.id);
            }
        }
        for node in silent {
            self.send(node, GcsMessage::Ping);
        }
        for node in lost {
            let period = self.settings.health_check_period_ms;
            let reason = format!("it did not answer {threshold} health checks in a row, one every {period} ms");
            self.node_died(node, DEATH_REASON_UNEXPECTED_TERMINATION, &reason);
        }
    }

    pub(crate) fn on_link_down(&mut self, id: NodeId, reason: &str) {
        let grace = self.settings.node_link_grace_ms;
        let now = self.now_ms;
        let Some(row) = self.nodes.get_mut(&id) else { return };
        if !row.alive || !row.link_up {
            return;
        }
        row.link_up = false;
        row.link_down_since_ms = now;
        if !row.drain_reason.is_empty() {
            let reason = row.drain_reason.clone();
            self.node_died(id, DEATH_REASON_EXPECTED_TERMINATION, &reason);
            return;
        }
        row.info.death_reason = format!("its link to the control plane closed: {reason}");
        self.kv_forget_node(id);
        self.group_waits_forget_node(id);
        if grace == 0 {
            self.on_link_grace_over(id);
            return;
        }
        self.set_timer(now + grace, Timer::LinkGrace(id));
        self.refresh_view(id);
    }

    pub(crate) fn on_link_grace_over(&mut self, id: NodeId) {
        let (now, grace) = (self.now_ms, self.settings.node_link_grace_ms);
        if let Some(row) = self.nodes.get(&id) {
            // The link may have come back and gone again since the timer was set; that absence has a timer of its own.
            let over = !row.link_up && now >= row.link_down_since_ms + grace;
            if row.alive && over && !self.expected_nodes.contains(&id) {
                let reason = row.info.death_reason.clone();
                self.node_died(id, DEATH_REASON_UNEXPECTED_TERMINATION, &reason);
            }
        }
    }

    /// The time in which known nodes come back after a restart is over.
    pub(crate) fn end_recovery(&mut self) {
        let missing = std::mem::take(&mut self.expected_nodes);
        for node in missing {
            let wait = self.settings.node_reconnect_grace_ms;
            let reason = format!("it did not come back within {wait} ms after the control plane restarted");
            self.node_died(node, DEATH_REASON_UNEXPECTED_TERMINATION, &reason);
        }
        self.place_at_end = true;
    }

    pub(crate) fn drain_node(&mut self, drain: DrainNode) -> GcsReply {
        let Ok(id) = NodeId::from_binary(&drain.node_id) else {
            return invalid(format!("a node id has {} bytes", NodeId::SIZE));
        };
        let Some(row) = self.nodes.get_mut(&id).filter(|row| row.alive) else {
            return refusal(GCS_ERROR_NOT_FOUND, format!("node {id} is not alive"));
        };
        row.drain_reason = if drain.reason.is_empty() {
            "it was drained".to_string()
        } else {
            drain.reason.clone()
        };
        row.drain_deadline_ms = drain.deadline_ms;
        let record = row.record();
        self.put_row(Table::Nodes, id.as_bytes(), &record);
        if drain.deadline_ms != 0 {
            self.set_timer(drain.deadline_ms.max(self.now_ms), Timer::Drain(id));
        }
        self.send(id, GcsMessage::DrainNode(drain));
        self.refresh_view(id);
        self.update_at_once = true;
        done()
    }

    pub(crate) fn on_drain_deadline(&mut self, id: NodeId) {
        let Some(row) = self.nodes.get(&id) else { return };
        if row.alive && row.drain_deadline_ms != 0 && row.drain_deadline_ms <= self.now_ms {
            let reason = format!("its time to drain is over: {}", row.drain_reason);
            self.node_died(id, DEATH_REASON_AUTOSCALER_DRAIN_PREEMPTED, &reason);
        }
    }

    /// Declares a node dead, once, with everything that follows.
    pub(crate) fn node_died(&mut self, id: NodeId, death_reason: u32, reason: &str) {
        let now = self.now_ms;
        let Some(row) = self.nodes.get_mut(&id).filter(|row| row.alive) else {
            return;
        };
        tracing::info!(node = %id, reason, "node died");
        let had_link = row.link_up;
        row.alive = false;
        row.link_up = false;
        row.death_reason = death_reason;
        row.info.alive = false;
        row.info.death_reason = reason.to_string();
        row.info.end_time_ms = now;
        row.holdings.clear();
        row.new_bundles.clear();
        row.demands.clear();
        let record = row.record();
        self.put_row(Table::Nodes, id.as_bytes(), &record);
        self.dead_nodes.push_back(id);
        self.expected_nodes.remove(&id);
        if had_link {
            self.refuse_dead_node(id, reason.to_string());
        }
        self.refresh_view(id);
        self.changed_nodes.insert(id);
        self.update_at_once = true;
        let notice = NodeDied {
            node_id: id_field(id.as_bytes()),
            reason: reason.to_string(),
        };
        self.send_to_all(Some(id), &GcsMessage::NodeDied(notice));
        self.publish_node(id);
        self.watches_forget_node(id);
        self.kv_forget_node(id);
        self.group_waits_forget_node(id);
        // Owners first: an actor whose owner died there must not be restarted.
        let message = format!("its owner's node {id} died: {reason}");
        self.owners_died(
            |node, _| node == id,
            &DeathCause {
                kind: DEATH_OWNER,
                message,
                ..DeathCause::default()
            },
        );
        self.finish_jobs_of_node(id, None);
        let message = format!("its node {id} died: {reason}");
        let cause = DeathCause {
            kind: DEATH_NODE,
            message,
            ..DeathCause::default()
        };
        for actor in self.actors.on_node(id) {
            self.actor_process_died(actor, cause.clone());
        }
        self.groups_lost_node(id);
        self.forget_old_nodes();
        self.place_at_end = true;
    }

    pub(crate) fn forget_old_nodes(&mut self) {
        while self.dead_nodes.len() as u64 > self.settings.maximum_gcs_dead_node_cached_count {
            if let Some(oldest) = self.dead_nodes.pop_front() {
                self.nodes.remove(&oldest);
                self.delete_row(Table::Nodes, oldest.as_bytes());
            }
        }
    }
}
