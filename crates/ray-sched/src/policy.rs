//! On which node a task or actor goes: owns the scheduling strategies.
//!
//! It refuses to choose a node that does not fit by the view, that is dead or that is draining, and it never answers
//! without a node or a reason.
//!
//! Invariants:
//! 1. `Choice::Node` is working, satisfies the strategy's hard part, and has the demand free by the view.
//! 2. `Choice::Busy` is working, satisfies the hard part, and could hold the demand.
//! 3. The same parameters (and random numbers) give the same choice.

use crate::explain::{explain_infeasible, explain_on_any, shortages, Infeasibility, Unavailability};
use crate::labels::LabelSelector;
use crate::resource_set::{demand_in_group, ResourceName, ResourceSet};
use crate::view::{ClusterView, NodeView};
use ray_ids::{NodeId, PlacementGroupId};
use std::borrow::Cow;

/// What the caller wants of the node.
#[derive(Debug, Clone, Default, PartialEq, Eq, Hash)]
pub enum SchedulingStrategy {
    /// Hybrid: pack up to a utilization, preferring the local node, then the best few by utilization.
    #[default]
    Default,
    /// Round robin over the nodes.
    Spread,
    /// One given node.
    NodeAffinity {
        /// The node.
        node: NodeId,
        /// Whether another will do where this one is dead or too small.
        soft: bool,
        /// With `soft`: whether another will do already where this one is busy.
        spill_on_unavailable: bool,
        /// Without `soft`: whether to fail where it is busy rather than to wait.
        fail_on_unavailable: bool,
    },
    /// Nodes by label.
    NodeLabel {
        /// What a node must have.
        hard: LabelSelector,
        /// What is preferred among those.
        soft: LabelSelector,
    },
    /// In a placement group's bundles.
    PlacementGroup {
        /// The group.
        id: PlacementGroupId,
        /// The bundle; none is any (the API's -1).
        bundle_index: Option<u32>,
        /// Whether tasks made inside run in the group too. Submitters read it; it does not change the choice.
        capture_child_tasks: bool,
    },
}

/// The numbers of the hybrid strategy.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct HybridSettings {
    /// Up to this utilization nodes count as equally good and are packed.
    pub spread_threshold: f64,
    /// Among this share of all nodes the choice is random...
    pub top_k_fraction: f64,
    /// ...and at least among this many.
    pub top_k_absolute: usize,
    /// Whether work without GPUs leaves nodes with GPUs alone while others are free.
    pub avoid_gpu_nodes: bool,
}

impl Default for HybridSettings {
    fn default() -> Self {
        Self {
            spread_threshold: 0.5,
            top_k_fraction: 0.2,
            top_k_absolute: 1,
            avoid_gpu_nodes: true,
        }
    }
}

/// Where a demand goes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Choice {
    /// There: it fits now.
    Node(NodeId),
    /// It fits on some node, but on none now; this is the best to wait at.
    Busy(NodeId),
    /// No working node could ever hold it.
    Infeasible(Infeasibility),
    /// The node of a hard affinity cannot be had.
    Unavailable(Unavailability),
}

/// Chooses with the usual settings and no further labels; see `choose_node_with`.
pub fn choose_node(
    view: &ClusterView,
    demand: &ResourceSet,
    strategy: &SchedulingStrategy,
    preferred: Option<NodeId>,
    rng: &mut dyn FnMut() -> u64,
    spread_cursor: &mut u64,
) -> Choice {
    let any = LabelSelector::any();
    choose_node_with(
        &HybridSettings::default(),
        &any,
        view,
        demand,
        strategy,
        preferred,
        rng,
        spread_cursor,
    )
}

/// Chooses a node for `demand`.
///
/// `selector` (the `label_selector` option) must match in addition to what the strategy asks, except that a node of
/// affinity and a bundle were chosen by name. `preferred` is the local node, or the one that holds most of the
/// arguments. `spread_cursor` is where SPREAD goes on; keep it for the next call. A demand for a placement group may be
/// translated already; repeated demands should be, because translation builds names.
#[allow(clippy::too_many_arguments)] // Each is an independent input of one pure decision; a struct would only rename them.
pub fn choose_node_with(
    settings: &HybridSettings,
    selector: &LabelSelector,
    view: &ClusterView,
    demand: &ResourceSet,
    strategy: &SchedulingStrategy,
    preferred: Option<NodeId>,
    rng: &mut dyn FnMut() -> u64,
    spread_cursor: &mut u64,
) -> Choice {
    let mut chooser = Chooser {
        settings,
        view,
        preferred,
        rng,
    };
    match strategy {
        SchedulingStrategy::Default => chooser.hybrid_or_reason(demand, selector),
        SchedulingStrategy::Spread => chooser.spread(demand, selector, spread_cursor),
        SchedulingStrategy::NodeAffinity {
            node,
            soft: true,
            spill_on_unavailable,
            ..
        } => match view.working_node(*node) {
            Some(target) if target.fits_now(demand) => Choice::Node(*node),
            Some(target) if target.fits_ever(demand) && !spill_on_unavailable => Choice::Busy(*node),
            Some(target) if target.fits_ever(demand) => match chooser.hybrid(demand, selector) {
                Some(Choice::Node(other)) => Choice::Node(other),
                _ => Choice::Busy(*node),
            },
            _ => chooser.hybrid_or_reason(demand, selector),
        },
        SchedulingStrategy::NodeAffinity {
            node,
            soft: false,
            fail_on_unavailable,
            ..
        } => {
            let Some(target) = view.nodes.get(node).filter(|target| target.alive) else {
                return Choice::Unavailable(Unavailability::Dead(*node));
            };
            if target.draining {
                return Choice::Unavailable(Unavailability::Draining(*node));
            }
            if let Some(reason) = explain_infeasible(view, demand, strategy) {
                return Choice::Infeasible(reason);
            }
            match shortages(target, demand).into_iter().next() {
                None => Choice::Node(*node),
                Some(shortage) if *fail_on_unavailable => Choice::Unavailable(Unavailability::Busy(*node, shortage)),
                Some(_) => Choice::Busy(*node),
            }
        }
        SchedulingStrategy::NodeLabel { hard, soft } => {
            let hard = joined(hard, selector);
            let preferred_labels = joined(&hard, soft);
            match chooser.hybrid(demand, &preferred_labels) {
                Some(Choice::Node(node)) => Choice::Node(node),
                busy => match (busy, chooser.hybrid_or_reason(demand, &hard)) {
                    // Where all must wait, wait at a node with the preferred labels.
                    (Some(preferred), Choice::Busy(_)) => preferred,
                    (_, choice) => choice,
                },
            }
        }
        SchedulingStrategy::PlacementGroup { id, bundle_index, .. } => {
            let translated = match demand.placement_group() {
                Some(named) if named != *id => {
                    return Choice::Infeasible(Infeasibility::OtherGroup {
                        placement_group: *id,
                        named,
                    });
                }
                Some(_) => Cow::Borrowed(demand),
                None => Cow::Owned(demand_in_group(demand, *id, *bundle_index)),
            };
            chooser.hybrid_or_reason(&translated, &LabelSelector::any())
        }
    }
}

fn joined<'a>(first: &'a LabelSelector, second: &'a LabelSelector) -> Cow<'a, LabelSelector> {
    match (first.is_empty(), second.is_empty()) {
        (_, true) => Cow::Borrowed(first),
        (true, false) => Cow::Borrowed(second),
        (false, false) => {
            let constraints = first.constraints.iter().chain(&second.constraints).cloned().collect();
            Cow::Owned(LabelSelector { constraints })
        }
    }
}

struct Chooser<'a> {
    settings: &'a HybridSettings,
    view: &'a ClusterView,
    preferred: Option<NodeId>,
    rng: &'a mut dyn FnMut() -> u64,
}

/// A node as the hybrid strategy ranks it; lower is better.
#[derive(Clone, Copy)]
struct Ranked {
    node: NodeId,
    avoided: bool,
    score: f64,
    idle: bool,
    preferred: bool,
}

impl Chooser<'_> {
    fn hybrid_or_reason(&mut self, demand: &ResourceSet, selector: &LabelSelector) -> Choice {
        match self.hybrid(demand, selector) {
            Some(choice) => choice,
            None => reason(self.view, demand, selector),
        }
    }

    /// A node or where to wait, or `None` where no working node could ever hold the demand.
    fn hybrid(&mut self, demand: &ResourceSet, selector: &LabelSelector) -> Option<Choice> {
        if let Some(node) = self.preferred_at_once(demand, selector) {
            return Some(Choice::Node(node));
        }
        let view = self.view;
        let suitable = || view.working_nodes().filter(|(_, node)| selector.matches(&node.labels));
        if demand.is_empty() && self.preferred.is_none() {
            // An actor that needs nothing says nothing about load: such actors are dealt over all nodes.
            let nodes: Vec<NodeId> = suitable().map(|(id, _)| id).collect();
            return (!nodes.is_empty()).then(|| Choice::Node(nodes[pick(self.rng, nodes.len())]));
        }
        let fitting = suitable().filter(|(_, node)| node.fits_now(demand));
        let mut ranked: Vec<Ranked> = fitting.map(|(id, node)| self.rank(id, node, demand)).collect();
        if ranked.is_empty() {
            let feasible = suitable().filter(|(_, node)| node.fits_ever(demand));
            let best = feasible.map(|(id, node)| self.rank(id, node, demand)).min_by(|a, b| {
                // To wait, the local node is best, and else the least used.
                b.preferred.cmp(&a.preferred).then(a.order(b))
            });
            return best.map(|best| Choice::Busy(best.node));
        }
        // The choice is random among the best few so that many deciders with one view do not rush to one node; but
        // not across the line between nodes with GPUs, which are avoided, and others.
        let share = (view.working_nodes().count() as f64 * self.settings.top_k_fraction) as usize;
        let avoided = ranked.iter().all(|other| other.avoided);
        let alike = ranked.iter().filter(|other| other.avoided == avoided).count();
        let top = share.max(self.settings.top_k_absolute).max(1).min(alike);
        // Only the best few need to be in order.
        ranked.select_nth_unstable_by(top - 1, Ranked::order);
        ranked.truncate(top);
        ranked.sort_unstable_by(Ranked::order);
        let chosen = if ranked[0].preferred { 0 } else { pick(self.rng, top) };
        Some(Choice::Node(ranked[chosen].node))
    }

    /// The preferred node where it fits, is used below the threshold and is not to be avoided: the common case, which
    /// needs no look at other nodes.
    fn preferred_at_once(&self, demand: &ResourceSet, selector: &LabelSelector) -> Option<NodeId> {
        let id = self.preferred?;
        let node = self.view.working_node(id)?;
        let good = selector.matches(&node.labels)
            && !self.is_avoided(node, demand)
            && node.fits_now(demand)
            && (demand.is_empty() || node.utilization(demand) < self.settings.spread_threshold);
        good.then_some(id)
    }

    fn is_avoided(&self, node: &NodeView, demand: &ResourceSet) -> bool {
        self.settings.avoid_gpu_nodes
            && node.has_gpus()
            && demand.get(&ResourceName::GPU).is_zero()
            && demand.placement_group().is_none()
    }

    fn rank(&self, id: NodeId, node: &NodeView, demand: &ResourceSet) -> Ranked {
        let utilization = node.utilization(demand);
        Ranked {
            node: id,
            avoided: self.is_avoided(node, demand),
            score: if utilization < self.settings.spread_threshold {
                0.0
            } else {
                utilization
            },
            idle: utilization == 0.0,
            preferred: self.preferred == Some(id),
        }
    }

    fn spread(&mut self, demand: &ResourceSet, selector: &LabelSelector, cursor: &mut u64) -> Choice {
        let suitable = |(_, node): &(NodeId, &NodeView)| selector.matches(&node.labels) && node.fits_ever(demand);
        let feasible: Vec<(NodeId, &NodeView)> = self.view.working_nodes().filter(suitable).collect();
        if feasible.is_empty() {
            return reason(self.view, demand, selector);
        }
        let count = feasible.len();
        let start = (*cursor % count as u64) as usize;
        let in_turn = (start..start + count).map(|at| at % count);
        let free = in_turn.into_iter().find(|at| feasible[*at].1.fits_now(demand));
        let chosen = free.unwrap_or(start);
        // Waiting demands are dealt out in turn too.
        *cursor = chosen as u64 + 1;
        if free.is_some() {
            Choice::Node(feasible[chosen].0)
        } else {
            Choice::Busy(feasible[chosen].0)
        }
    }
}

impl Ranked {
    /// Best first: not avoided, below the threshold or least used, the preferred, in use already (so that idle nodes
    /// can leave), and then by id.
    fn order(&self, other: &Self) -> std::cmp::Ordering {
        let key = |ranked: &Self| (!ranked.preferred, ranked.idle, ranked.node);
        self.avoided
            .cmp(&other.avoided)
            .then(self.score.total_cmp(&other.score))
            .then_with(|| key(self).cmp(&key(other)))
    }
}

fn reason(view: &ClusterView, demand: &ResourceSet, selector: &LabelSelector) -> Choice {
    match explain_on_any(view, demand, selector) {
        Some(reason) => Choice::Infeasible(reason),
        // Callers come here only when no working node could hold it, which is exactly when there is a reason.
        None => unreachable!("a demand without a feasible node has a reason"),
    }
}

fn pick(rng: &mut dyn FnMut() -> u64, count: usize) -> usize {
    (rng() % count as u64) as usize
}
