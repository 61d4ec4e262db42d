//! Placement groups: owns where each group's bundles are and the two phases in which they are reserved.
//!
//! It refuses answers to an older attempt, and bundles where there is no room.
//!
//! A group's unplaced bundles are placed all or none: `PrepareBundles` to every node chosen, and when all have agreed,
//! `CommitBundles`. One refusal gives back what the attempt had reserved, and the group is tried again later.
//!
//! Invariants:
//! 1. Attempts count up and survive a restart; only answers to the present attempt count.
//! 2. A group that is `Created` has every bundle on a node that is alive.
//! 3. Of a removed group no node holds a bundle once it has read `ReturnBundles`, and no actor in it lives.

use std::collections::{BTreeMap, BTreeSet, VecDeque};

use ray_ids::{ActorId, JobId, NodeId, PlacementGroupId};
use ray_sched::{place_bundles_with, BundleRequest, Placement, PlacementConstraints, PlacementStrategy};
use ray_wire::{
    BundleKey, BundlesCommitted, BundlesPrepared, CommitBundles, DeathCause, PlacementGroupSpecification,
    PrepareBundles, ReturnBundles, DEATH_PLACEMENT_GROUP, GCS_ERROR_NOT_FOUND,
};

use crate::messages::GcsMessage;
use crate::nodes::{resource_amounts, resource_set, HoldingKey};
use crate::placing::label_selector;
use crate::records::{GroupRecord, Table};
use crate::state::{done, id_field, refusal, Gcs};

#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum GroupPhase {
    /// For nodes.
    Waiting,
    /// Nodes that have not answered yet whether they hold their bundles.
    Preparing(BTreeSet<NodeId>),
    /// Nodes that have not said yet that their bundles are usable.
    Committing(BTreeSet<NodeId>),
    Created,
    Removed,
}

#[derive(Debug)]
pub(crate) struct Bundle {
    pub(crate) request: BundleRequest,
    pub(crate) node: Option<NodeId>,
    /// The attempt that is under way placed it.
    pub(crate) fresh: bool,
}

#[derive(Debug)]
pub(crate) struct GroupRow {
    pub(crate) id: PlacementGroupId,
    pub(crate) specification: PlacementGroupSpecification,
    pub(crate) strategy: PlacementStrategy,
    pub(crate) bundles: Vec<Bundle>,
    pub(crate) phase: GroupPhase,
    pub(crate) attempt: u64,
    pub(crate) was_created: bool,
    pub(crate) pending_reason: String,
    pub(crate) infeasible: bool,
    pub(crate) rejections: u32,
    pub(crate) not_before_ms: u64,
    pub(crate) order: u64,
    pub(crate) registered_ms: u64,
    pub(crate) created_ms: u64,
    pub(crate) highest_delay_ms: u64,
}

impl GroupRow {
    pub(crate) fn new(specification: PlacementGroupSpecification, order: u64, now_ms: u64) -> Result<Self, String> {
        let id = PlacementGroupId::from_binary(&specification.placement_group_id).map_err(|error| error.to_string())?;
        let strategy = match specification.strategy {
            0 => PlacementStrategy::Pack,
            1 => PlacementStrategy::Spread,
            2 => PlacementStrategy::StrictPack,
            3 => PlacementStrategy::StrictSpread,
            other => return Err(format!("placement strategy {other} is not known")),
        };
        let mut bundles = Vec::with_capacity(specification.bundles.len());
        for bundle in &specification.bundles {
            let resources = resource_set(&bundle.resources);
            let request = BundleRequest {
                resources,
                label_selector: label_selector(&bundle.labels)?,
            };
            bundles.push(Bundle {
                request,
                node: None,
                fresh: false,
            });
        }
        Ok(Self {
            id,
            specification,
            strategy,
            bundles,
            phase: GroupPhase::Waiting,
            attempt: 0,
            was_created: false,
            pending_reason: "it is about to be placed".into(),
            infeasible: false,
            rejections: 0,
            not_before_ms: 0,
            order,
            registered_ms: now_ms,
            created_ms: 0,
            highest_delay_ms: 0,
        })
    }

    pub(crate) fn name_key(&self) -> Option<(String, String)> {
        let PlacementGroupSpecification { name, namespace, .. } = &self.specification;
        (!name.is_empty()).then(|| (namespace.clone(), name.clone()))
    }

    pub(crate) fn state_name(&self) -> &'static str {
        match self.phase {
            GroupPhase::Created => "CREATED",
            GroupPhase::Removed => "REMOVED",
            _ if self.was_created => "RESCHEDULING",
            _ => "PENDING",
        }
    }

    pub(crate) fn nodes(&self) -> BTreeSet<NodeId> {
        self.bundles.iter().filter_map(|bundle| bundle.node).collect()
    }

    /// The bundles that the attempt under way put on `node`.
    fn fresh_on(&self, node: NodeId) -> Vec<u32> {
        let here = |bundle: &&Bundle| bundle.fresh && bundle.node == Some(node);
        (0_u32..)
            .zip(&self.bundles)
            .filter(|(_, bundle)| here(bundle))
            .map(|(index, _)| index)
            .collect()
    }

    fn key(&self, index: u32) -> BundleKey {
        BundleKey {
            placement_group_id: id_field(self.id.as_bytes()),
            index,
            resources: resource_amounts(&self.bundles[index as usize].request.resources),
            committed: false,
        }
    }
}

#[derive(Debug)]
pub(crate) struct GroupWaiter {
    pub(crate) node: NodeId,
    pub(crate) correlation: u64,
    pub(crate) group: PlacementGroupId,
}

#[derive(Debug, Default)]
pub(crate) struct Groups {
    pub(crate) rows: BTreeMap<PlacementGroupId, GroupRow>,
    pub(crate) names: BTreeMap<(String, String), PlacementGroupId>,
    pub(crate) removed: VecDeque<PlacementGroupId>,
    /// Removed before that list was cut: ids only, and only as many.
    forgotten: VecDeque<PlacementGroupId>,
    pub(crate) waiters: BTreeMap<u64, GroupWaiter>,
    pub(crate) next_waiter: u64,
    pub(crate) next_order: u64,
}

impl Groups {
    /// Removed and no longer remembered.
    pub(crate) fn was_removed(&self, id: &PlacementGroupId) -> bool {
        self.forgotten.contains(id)
    }

    /// Removed, remembered or not.
    pub(crate) fn is_removed(&self, id: &PlacementGroupId) -> bool {
        match self.rows.get(id) {
            Some(row) => row.phase == GroupPhase::Removed,
            None => self.was_removed(id),
        }
    }

    pub(crate) fn waiting(&self) -> usize {
        self.waiters.len()
    }

    pub(crate) fn index_name(&mut self, id: PlacementGroupId) {
        if let Some(key) = self
            .rows
            .get(&id)
            .filter(|row| row.phase != GroupPhase::Removed)
            .and_then(GroupRow::name_key)
        {
            self.names.insert(key, id);
        }
    }
}

impl Gcs {
    pub(crate) fn store_group(&mut self, id: PlacementGroupId) {
        let Some(row) = self.groups.rows.get(&id) else { return };
        // What an attempt only tries is not stored: after a restart it is tried anew.
        let kept = |bundle: &Bundle| bundle.node.filter(|_| !bundle.fresh);
        let node = |bundle: &Bundle| kept(bundle).map(|node| id_field(node.as_bytes())).unwrap_or_default();
        let record = GroupRecord {
            specification: Some(row.specification.clone()),
            nodes: row.bundles.iter().map(node).collect(),
            attempt: row.attempt,
            was_created: row.was_created,
            removed: row.phase == GroupPhase::Removed,
            order: row.order,
            registered_ms: row.registered_ms,
            created_ms: row.created_ms,
        };
        self.put_row(Table::PlacementGroups, id.as_bytes(), &record);
    }

    /// One round over the groups that wait, in the order of their registration.
    pub(crate) fn place_groups(&mut self, random: &mut dyn FnMut() -> u64) {
        let rows = self.groups.rows.values().filter(|row| row.phase == GroupPhase::Waiting);
        let mut waiting: Vec<(u64, PlacementGroupId)> = rows.map(|row| (row.order, row.id)).collect();
        waiting.sort_unstable();
        let blocked = self.placing_blocked();
        for (_, id) in waiting {
            let Some(row) = self.groups.rows.get_mut(&id) else {
                continue;
            };
            if let Some(reason) = &blocked {
                row.pending_reason.clone_from(reason);
                continue;
            }
            if row.not_before_ms > self.now_ms {
                continue;
            }
            let missing: Vec<usize> = (0..row.bundles.len())
                .filter(|at| row.bundles[*at].node.is_none())
                .collect();
            let requests: Vec<BundleRequest> = missing.iter().map(|at| row.bundles[*at].request.clone()).collect();
            let occupied: Vec<NodeId> = row.nodes().into_iter().collect();
            let soft_target_node = NodeId::from_binary(&row.specification.soft_target_node_id).ok();
            let constraints = PlacementConstraints {
                soft_target_node,
                occupied: &occupied,
            };
            match place_bundles_with(&self.view, &requests, row.strategy, constraints, random) {
                Placement::Placed(nodes) => self.prepare_group(id, &missing, &nodes),
                Placement::Busy => {
                    row.pending_reason = "it waits for resources to be free for its bundles".into();
                    row.infeasible = false;
                }
                Placement::Infeasible(reason) => {
                    row.pending_reason = reason.to_string();
                    row.infeasible = true;
                }
            }
        }
    }

    fn prepare_group(&mut self, id: PlacementGroupId, missing: &[usize], nodes: &[NodeId]) {
        let Some(row) = self.groups.rows.get_mut(&id) else {
            return;
        };
        row.attempt += 1;
        row.infeasible = false;
        row.pending_reason = "its bundles are being reserved".into();
        for (at, node) in missing.iter().zip(nodes) {
            row.bundles[*at].node = Some(*node);
            row.bundles[*at].fresh = true;
        }
        let chosen: BTreeSet<NodeId> = nodes.iter().copied().collect();
        row.phase = GroupPhase::Preparing(chosen.clone());
        self.store_group(id);
        for node in chosen {
            self.count_placement(node);
            let Some(row) = self.groups.rows.get(&id) else { return };
            let fresh = row.fresh_on(node);
            let bundles = fresh.iter().map(|index| row.key(*index)).collect();
            let attempt = row.attempt;
            let held: Vec<_> = fresh
                .iter()
                .map(|index| (*index, row.bundles[*index as usize].request.resources.clone()))
                .collect();
            for (index, resources) in held {
                self.hold(node, HoldingKey::Bundle(id, index), resources);
            }
            self.send(node, GcsMessage::PrepareBundles(PrepareBundles { bundles, attempt }));
        }
    }

    pub(crate) fn on_bundles_prepared(&mut self, node: NodeId, message: &BundlesPrepared) {
        let Ok(id) = PlacementGroupId::from_binary(&message.placement_group_id) else {
            return;
        };
        let Some(row) = self
            .groups
            .rows
            .get_mut(&id)
            .filter(|row| row.attempt == message.attempt)
        else {
            return;
        };
        let GroupPhase::Preparing(waiting) = &mut row.phase else {
            return;
        };
        if !waiting.contains(&node) {
            return;
        }
        if !message.success {
            let reason = format!("node {node} had no room for its bundles after all");
            self.undo_attempt(id, &reason, Some(node));
            return;
        }
        waiting.remove(&node);
        let all = waiting.is_empty();
        let attempt = row.attempt;
        for index in row.fresh_on(node) {
            self.settle_holding(node, HoldingKey::Bundle(id, index));
        }
        if !all {
            return;
        }
        let Some(row) = self.groups.rows.get_mut(&id) else {
            return;
        };
        let nodes: BTreeSet<NodeId> = row
            .bundles
            .iter()
            .filter(|bundle| bundle.fresh)
            .filter_map(|bundle| bundle.node)
            .collect();
        row.phase = GroupPhase::Committing(nodes.clone());
        for node in nodes {
            let placement_group_id = id_field(id.as_bytes());
            self.send(
                node,
                GcsMessage::CommitBundles(CommitBundles {
                    placement_group_id,
                    attempt,
                }),
            );
        }
    }

    pub(crate) fn on_bundles_committed(&mut self, node: NodeId, message: &BundlesCommitted) {
        let Ok(id) = PlacementGroupId::from_binary(&message.placement_group_id) else {
            return;
        };
        let Some(row) = self
            .groups
            .rows
            .get_mut(&id)
            .filter(|row| row.attempt == message.attempt)
        else {
            return;
        };
        let GroupPhase::Committing(waiting) = &mut row.phase else {
            return;
        };
        if !waiting.remove(&node) {
            return;
        }
        let all = waiting.is_empty();
        for index in row.fresh_on(node) {
            let Some(row) = self.groups.rows.get(&id) else { return };
            let resources = row.bundles[index as usize].request.resources.clone();
            self.show_bundle(node, id, index, &resources);
        }
        if all {
            self.group_is_created(id);
        }
    }

    pub(crate) fn group_is_created(&mut self, id: PlacementGroupId) {
        let now = self.now_ms;
        let Some(row) = self.groups.rows.get_mut(&id) else {
            return;
        };
        row.phase = GroupPhase::Created;
        row.was_created = true;
        row.rejections = 0;
        row.pending_reason.clear();
        row.infeasible = false;
        row.created_ms = if row.created_ms == 0 { now } else { row.created_ms };
        row.bundles.iter_mut().for_each(|bundle| bundle.fresh = false);
        self.store_group(id);
        self.answer_group_waiters(id, &done());
        self.place_at_end = true;
    }

    /// Gives back what the present attempt reserved, and lets the group wait for another.
    pub(crate) fn undo_attempt(&mut self, id: PlacementGroupId, reason: &str, refused_by: Option<NodeId>) {
        let Some(row) = self.groups.rows.get_mut(&id) else {
            return;
        };
        if !matches!(row.phase, GroupPhase::Preparing(_) | GroupPhase::Committing(_)) {
            return;
        }
        let attempt = row.attempt;
        let fresh: BTreeSet<NodeId> = row
            .bundles
            .iter()
            .filter(|bundle| bundle.fresh)
            .filter_map(|bundle| bundle.node)
            .collect();
        let returned: Vec<(NodeId, Vec<u32>)> = fresh.into_iter().map(|node| (node, row.fresh_on(node))).collect();
        for bundle in row.bundles.iter_mut().filter(|bundle| bundle.fresh) {
            bundle.node = None;
            bundle.fresh = false;
        }
        row.phase = GroupPhase::Waiting;
        row.pending_reason = format!("{reason}: it is placed again");
        let rejections = row.rejections;
        row.rejections += 1;
        let not_before_ms = self.back_off(rejections);
        if let Some(row) = self.groups.rows.get_mut(&id) {
            row.not_before_ms = not_before_ms;
            row.highest_delay_ms = row.highest_delay_ms.max(not_before_ms.saturating_sub(self.now_ms));
        }
        self.store_group(id);
        for (node, indices) in returned {
            for index in &indices {
                self.hide_bundle(node, id, *index);
            }
            if refused_by != Some(node) {
                self.return_bundles(node, id, attempt, indices);
            }
        }
    }

    pub(crate) fn return_bundles(&mut self, node: NodeId, id: PlacementGroupId, attempt: u64, indices: Vec<u32>) {
        let placement_group_id = id_field(id.as_bytes());
        self.send(
            node,
            GcsMessage::ReturnBundles(ReturnBundles {
                placement_group_id,
                attempt,
                indices,
            }),
        );
    }

    /// Bundles that a node no longer has are placed again.
    pub(crate) fn bundles_lost(&mut self, node: NodeId, id: PlacementGroupId, reason: &str) {
        self.undo_attempt_on(node, id, reason);
        let Some(row) = self
            .groups
            .rows
            .get_mut(&id)
            .filter(|row| row.phase != GroupPhase::Removed)
        else {
            return;
        };
        let mut lost = Vec::new();
        for (index, bundle) in (0_u32..).zip(&mut row.bundles) {
            if bundle.node == Some(node) {
                bundle.node = None;
                bundle.fresh = false;
                lost.push(index);
            }
        }
        if lost.is_empty() {
            return;
        }
        // Other bundles' attempt under way goes on no longer: the group is placed anew as a whole.
        self.undo_attempt(id, reason, None);
        if let Some(row) = self.groups.rows.get_mut(&id) {
            row.phase = GroupPhase::Waiting;
            row.not_before_ms = self.now_ms;
            row.pending_reason = format!("{reason}: its lost bundles are placed again");
        }
        for index in lost {
            self.hide_bundle(node, id, index);
        }
        self.store_group(id);
        self.place_at_end = true;
    }

    fn undo_attempt_on(&mut self, node: NodeId, id: PlacementGroupId, reason: &str) {
        let concerned = self
            .groups
            .rows
            .get(&id)
            .is_some_and(|row| !row.fresh_on(node).is_empty());
        if concerned {
            self.undo_attempt(id, reason, Some(node));
        }
    }

    pub(crate) fn groups_lost_node(&mut self, node: NodeId) {
        let concerned = |row: &&GroupRow| row.phase != GroupPhase::Removed && row.nodes().contains(&node);
        let groups: Vec<PlacementGroupId> = self.groups.rows.values().filter(concerned).map(|row| row.id).collect();
        for id in groups {
            self.bundles_lost(node, id, &format!("node {node} died"));
        }
    }

    /// Removes a group with the actors in it. Repeating it is harmless.
    pub(crate) fn remove_group(&mut self, id: PlacementGroupId, reason: &str) {
        let Some(row) = self
            .groups
            .rows
            .get_mut(&id)
            .filter(|row| row.phase != GroupPhase::Removed)
        else {
            return;
        };
        let nodes = row.nodes();
        let attempt = row.attempt;
        let count = row.bundles.len() as u32;
        row.phase = GroupPhase::Removed;
        row.pending_reason = reason.to_string();
        row.infeasible = false;
        for bundle in &mut row.bundles {
            bundle.node = None;
            bundle.fresh = false;
        }
        if let Some(key) = row.name_key() {
            self.groups.names.remove(&key);
        }
        self.store_group(id);
        let message = format!("its placement group {id} is gone: {reason}");
        let cause = DeathCause {
            kind: DEATH_PLACEMENT_GROUP,
            message,
            ..DeathCause::default()
        };
        let inside = self
            .actors
            .rows
            .values()
            .filter(|row| !row.is_dead() && row.wish.group.is_some_and(|(group, _)| group == id));
        let inside: Vec<ActorId> = inside.map(|row| row.id).collect();
        for actor in inside {
            self.kill_actor(actor, cause.clone());
            for node in &nodes {
                self.drop_holding(*node, HoldingKey::Actor(actor));
            }
        }
        for node in nodes {
            for index in 0..count {
                self.hide_bundle(node, id, index);
            }
            self.return_bundles(node, id, attempt, Vec::new());
        }
        let error = format!("placement group {id} is gone: {reason}");
        self.answer_group_waiters(id, &refusal(GCS_ERROR_NOT_FOUND, error));
        self.groups.removed.push_back(id);
        self.forget_old_groups();
    }

    pub(crate) fn forget_old_groups(&mut self) {
        let limit = self.settings.maximum_removed_placement_groups as usize;
        while self.groups.removed.len() > limit {
            if let Some(oldest) = self.groups.removed.pop_front() {
                self.groups.rows.remove(&oldest);
                self.groups.forgotten.push_back(oldest);
                self.delete_row(Table::PlacementGroups, oldest.as_bytes());
            }
        }
        while self.groups.forgotten.len() > limit {
            self.groups.forgotten.pop_front();
        }
    }

    pub(crate) fn remove_groups_of_job(&mut self, job: JobId) {
        let of_job = |row: &&GroupRow| row.specification.job_id == job.as_bytes() && !row.specification.detached;
        let groups: Vec<PlacementGroupId> = self.groups.rows.values().filter(of_job).map(|row| row.id).collect();
        groups
            .into_iter()
            .for_each(|id| self.remove_group(id, &format!("its job {job} is over")));
    }

    pub(crate) fn remove_groups_of_actor(&mut self, actor: ActorId) {
        let of_actor =
            |row: &&GroupRow| row.specification.creator_actor_id == actor.as_bytes() && !row.specification.detached;
        let groups: Vec<PlacementGroupId> = self.groups.rows.values().filter(of_actor).map(|row| row.id).collect();
        groups
            .into_iter()
            .for_each(|id| self.remove_group(id, &format!("actor {actor}, which made it, is dead")));
    }
}
