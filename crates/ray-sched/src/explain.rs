//! Why a demand does not fit: owns the sentences that a user reads, each with what is missing and what to do.
//!
//! It refuses to be vague: every infeasible choice of `policy` and `bundles` gets its reason from here.
//!
//! Invariants:
//! 1. `explain_infeasible` answers exactly when no working node could ever hold the demand under its strategy.
//! 2. A sentence names the resource, label, node or group that is missing, and the remedy.

use crate::labels::{LabelSelector, Labels};
use crate::policy::SchedulingStrategy;
use crate::quantity::Quantity;
use crate::resource_set::{demand_in_group, ResourceName, ResourceSet};
use crate::view::{ClusterView, NodeView};
use ray_ids::{NodeId, PlacementGroupId};
use std::collections::BTreeSet;
use std::fmt;

/// How a demand falls short on a node.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ShortageKind {
    /// The node never has that much.
    Infeasible,
    /// Others hold it now.
    Busy,
    /// Enough is free in sum, but not on single devices.
    Fragmented {
        /// The most that is free on one device.
        largest_share: Quantity,
    },
}

/// Why a demand does not fit on one node.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Shortage {
    /// What is missing.
    pub resource: ResourceName,
    /// How much is wanted.
    pub wanted: Quantity,
    /// How much the node has.
    pub total: Quantity,
    /// How much is free.
    pub available: Quantity,
    /// Whether waiting helps.
    pub kind: ShortageKind,
}

impl Shortage {
    /// Whether no waiting helps on this node.
    pub fn is_infeasible(&self) -> bool {
        self.kind == ShortageKind::Infeasible
    }
}

impl std::error::Error for Shortage {}

impl fmt::Display for Shortage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            resource,
            wanted,
            total,
            available,
            kind,
        } = self;
        match kind {
            ShortageKind::Infeasible => write!(f, "it needs {resource} {wanted} and the node has {total} in total"),
            ShortageKind::Busy => write!(f, "it needs {resource} {wanted} and {available} of {total} is free now"),
            ShortageKind::Fragmented { largest_share } => write!(
                f,
                "it needs {resource} {wanted} and {available} of {total} is free now, \
                 but spread over devices of which one has at most {largest_share} free"
            ),
        }
    }
}

/// Why the node of a hard affinity cannot be had.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Unavailability {
    /// The node is dead or was never known.
    Dead(NodeId),
    /// The node is about to leave.
    Draining(NodeId),
    /// The node is busy and the strategy says not to wait.
    Busy(NodeId, Shortage),
}

impl fmt::Display for Unavailability {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let soften = "use soft=True to let it run elsewhere";
        match self {
            Self::Dead(node) => write!(
                f,
                "node {node}, to which it has a hard affinity, is dead or unknown: {soften}"
            ),
            Self::Draining(node) => {
                write!(
                    f,
                    "node {node}, to which it has a hard affinity, is draining and takes no new work: {soften}"
                )
            }
            Self::Busy(node, shortage) => write!(
                f,
                "node {node}, to which it has a hard affinity that fails when unavailable, is busy: {shortage}"
            ),
        }
    }
}

/// Why a demand, or a group of bundles, can never be placed in the cluster as it is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Infeasibility {
    /// No node takes work.
    NoNodes { draining: usize },
    /// No node has that much of one resource.
    TooMuch {
        resource: ResourceName,
        wanted: Quantity,
        largest: Quantity,
        nodes: usize,
    },
    /// Each resource is somewhere, but no node has all.
    NotTogether {
        demand: ResourceSet,
        closest: NodeId,
        missing: Vec<Shortage>,
    },
    /// No node has the labels.
    Labels {
        selector: LabelSelector,
        seen: Vec<(String, Vec<String>)>,
    },
    /// The node of a hard affinity is too small.
    AffinityNodeTooSmall { node: NodeId, shortage: Shortage },
    /// No working node has bundles of the group.
    GroupMissing { placement_group: PlacementGroupId },
    /// No working node has the bundle.
    BundleMissing {
        placement_group: PlacementGroupId,
        bundle_index: u32,
    },
    /// The demand is beyond the bundle, or (no index) beyond what the group has on any node.
    BeyondBundle {
        placement_group: PlacementGroupId,
        bundle_index: Option<u32>,
        resource: ResourceName,
        wanted: Quantity,
        largest: Quantity,
    },
    /// A demand for one group was given with another group's resource names.
    OtherGroup {
        placement_group: PlacementGroupId,
        named: PlacementGroupId,
    },
    /// One bundle of a group fits nowhere.
    Bundle {
        bundle_index: usize,
        reason: Box<Infeasibility>,
    },
    /// STRICT_PACK: all bundles together fit on no node.
    StrictPack { reason: Box<Infeasibility> },
    /// STRICT_SPREAD: fewer nodes can hold a bundle each than there are bundles.
    StrictSpread { bundles: usize, placeable: usize },
    /// The bundles ask for more than all nodes together have.
    ClusterTooSmall {
        resource: ResourceName,
        wanted: Quantity,
        total: Quantity,
    },
    /// Each bundle fits somewhere and the sums suffice, but no arrangement holds all.
    NoArrangement { bundles: usize },
    /// A group without bundles, or a bundle that asks for nothing.
    EmptyBundle { bundle_index: Option<usize> },
}

impl fmt::Display for Infeasibility {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NoNodes { draining: 0 } => f.write_str("no node is alive to take work: start a node"),
            Self::NoNodes { draining } => write!(f, "every live node ({draining}) is draining: start another node"),
            Self::TooMuch { resource, wanted, largest, .. } if largest.is_zero() => write!(
                f,
                "it needs {resource} {wanted} and no suitable node has any {resource}: add a node with {resource}, or do not ask for it"
            ),
            Self::TooMuch { resource, wanted, largest, nodes } => write!(
                f,
                "it needs {resource} {wanted} on one node and the largest of {nodes} suitable node(s) has {largest}: \
                 add a node with {resource} {wanted}, or ask for at most {largest}"
            ),
            Self::NotTogether { demand, closest, missing } => {
                write!(f, "it needs {demand} on one node and no suitable node has all of it; on the closest, {closest}, ")?;
                for (at, shortage) in missing.iter().enumerate() {
                    write!(f, "{}{shortage}", if at == 0 { "" } else { " and " })?;
                }
                f.write_str(": add a node that has all of it, or ask for less")
            }
            Self::Labels { selector, seen } => {
                write!(f, "no live node has labels with {selector}")?;
                for (key, values) in seen {
                    match values.is_empty() {
                        true => write!(f, "; no node has the label {key}")?,
                        false => write!(f, "; {key} is {} on the nodes there are", values.join(", "))?,
                    }
                }
                f.write_str(": add a node with such labels, or change the selector")
            }
            Self::AffinityNodeTooSmall { node, shortage } => write!(
                f,
                "node {node}, to which it has a hard affinity, is too small, for {shortage}: choose another node, use soft=True, or ask for less"
            ),
            Self::GroupMissing { placement_group } => write!(
                f,
                "no live node has bundles of placement group {placement_group}: wait until the group is ready, \
                 or make a new one if it was removed"
            ),
            Self::BundleMissing { placement_group, bundle_index } => write!(
                f,
                "no live node has bundle {bundle_index} of placement group {placement_group}: \
                 use an index that the group has, or wait until its lost bundle is placed again"
            ),
            Self::BeyondBundle { placement_group, bundle_index, resource, wanted, largest } => {
                write!(f, "it needs {resource} {wanted} and ")?;
                match bundle_index {
                    Some(index) => write!(f, "bundle {index} of placement group {placement_group} has {largest}")?,
                    None => write!(f, "placement group {placement_group} has at most {largest} on one node")?,
                }
                write!(f, ": make the group with more {resource}, or ask for at most {largest}")
            }
            Self::OtherGroup { placement_group, named } => write!(
                f,
                "its strategy names placement group {placement_group} and its resources placement group {named}: use one group"
            ),
            Self::Bundle { bundle_index, reason } => write!(f, "bundle {bundle_index} fits on no node, for {reason}"),
            Self::StrictPack { reason } => {
                write!(f, "STRICT_PACK puts all bundles on one node, which none can hold, for {reason}; PACK may use several nodes")
            }
            Self::StrictSpread { bundles, placeable } => write!(
                f,
                "STRICT_SPREAD needs {bundles} different nodes that can hold a bundle each and only {placeable} bundle(s) can get one: \
                 add {} suitable node(s), or use SPREAD",
                bundles - placeable
            ),
            Self::ClusterTooSmall { resource, wanted, total } => write!(
                f,
                "the bundles need {resource} {wanted} together and all suitable nodes have {total}: add nodes, or ask for less"
            ),
            Self::NoArrangement { bundles } => write!(
                f,
                "the {bundles} bundles each fit on some node, but no arrangement over the nodes holds all of them: \
                 add a node, or make the bundles smaller"
            ),
            Self::EmptyBundle { bundle_index: Some(index) } => {
                write!(f, "bundle {index} asks for no resource: every bundle needs at least one above 0")
            }
            Self::EmptyBundle { bundle_index: None } => f.write_str("the group has no bundle: give at least one"),
        }
    }
}

/// Why no working node could ever hold `demand` under `strategy`, or `None` where one could. A hard affinity to a node
/// that does not work is no matter of resources and is answered by `choose_node` as `Unavailable`.
pub fn explain_infeasible(
    view: &ClusterView,
    demand: &ResourceSet,
    strategy: &SchedulingStrategy,
) -> Option<Infeasibility> {
    match strategy {
        SchedulingStrategy::Default | SchedulingStrategy::Spread => explain_on_any(view, demand, &LabelSelector::any()),
        SchedulingStrategy::NodeLabel { hard, .. } => explain_on_any(view, demand, hard),
        SchedulingStrategy::NodeAffinity { node, soft: false, .. } => {
            let shortage = lasting_shortages(view.working_node(*node)?, demand)
                .into_iter()
                .next()?;
            Some(Infeasibility::AffinityNodeTooSmall { node: *node, shortage })
        }
        SchedulingStrategy::NodeAffinity { .. } => explain_on_any(view, demand, &LabelSelector::any()),
        SchedulingStrategy::PlacementGroup { id, bundle_index, .. } => match demand.placement_group() {
            Some(named) if named != *id => Some(Infeasibility::OtherGroup {
                placement_group: *id,
                named,
            }),
            Some(_) => explain_on_any(view, demand, &LabelSelector::any()),
            None => explain_on_any(
                view,
                &demand_in_group(demand, *id, *bundle_index),
                &LabelSelector::any(),
            ),
        },
    }
}

/// Why no working node with the labels could ever hold `demand`, or `None` where one could.
pub(crate) fn explain_on_any(
    view: &ClusterView,
    demand: &ResourceSet,
    selector: &LabelSelector,
) -> Option<Infeasibility> {
    let working: Vec<(NodeId, &NodeView)> = view.working_nodes().collect();
    if working.is_empty() {
        let draining = view.nodes.values().filter(|node| node.alive && node.draining).count();
        return Some(Infeasibility::NoNodes { draining });
    }
    let suitable: Vec<(NodeId, &NodeView)> = working
        .iter()
        .copied()
        .filter(|(_, node)| selector.matches(&node.labels))
        .collect();
    if suitable.is_empty() {
        return Some(explain_labels(&working, selector));
    }
    if suitable.iter().any(|(_, node)| node.fits_ever(demand)) {
        return None;
    }
    let largest = |name: &ResourceName| {
        suitable
            .iter()
            .map(|(_, node)| node.total.get(name))
            .max()
            .unwrap_or_default()
    };
    let too_much = demand.iter().filter(|(name, wanted)| largest(name) < *wanted);
    // A bundle says more than its group's common name, which misses the same.
    let is_common = |name: &ResourceName| name.group().is_some_and(|group| group.bundle_index.is_none());
    if let Some((name, wanted)) = too_much.min_by_key(|(name, _)| is_common(name)) {
        return Some(explain_one_name(&suitable, name, wanted, largest(name)));
    }
    let shortages = suitable.iter().map(|(id, node)| (*id, lasting_shortages(node, demand)));
    let (closest, missing) = shortages.min_by_key(|(_, missing)| missing.len())?;
    Some(Infeasibility::NotTogether {
        demand: demand.clone(),
        closest,
        missing,
    })
}

fn explain_one_name(
    suitable: &[(NodeId, &NodeView)],
    name: &ResourceName,
    wanted: Quantity,
    largest: Quantity,
) -> Infeasibility {
    let Some(group) = name.group() else {
        return Infeasibility::TooMuch {
            resource: name.clone(),
            wanted,
            largest,
            nodes: suitable.len(),
        };
    };
    let placement_group = group.placement_group;
    let shown = |index: Option<u32>| {
        let same = |name: &ResourceName| {
            name.group().is_some_and(|other| {
                other.placement_group == placement_group && (index.is_none() || other.bundle_index == index)
            })
        };
        suitable
            .iter()
            .any(|(_, node)| node.total.iter().any(|(name, _)| same(name)))
    };
    match group.bundle_index {
        _ if !shown(None) => Infeasibility::GroupMissing { placement_group },
        Some(bundle_index) if !shown(Some(bundle_index)) => Infeasibility::BundleMissing {
            placement_group,
            bundle_index,
        },
        bundle_index => {
            let resource = group.base.clone();
            Infeasibility::BeyondBundle {
                placement_group,
                bundle_index,
                resource,
                wanted,
                largest,
            }
        }
    }
}

fn explain_labels(working: &[(NodeId, &NodeView)], selector: &LabelSelector) -> Infeasibility {
    let keys: BTreeSet<&str> = selector
        .constraints
        .iter()
        .map(|constraint| constraint.key.as_str())
        .collect();
    let values = |key: &str| -> Vec<String> {
        let labels = working.iter().map(|(_, node)| &node.labels);
        let values: BTreeSet<&String> = labels.filter_map(|labels: &Labels| labels.get(key)).collect();
        values.into_iter().cloned().collect()
    };
    let seen = keys.into_iter().map(|key| (key.to_string(), values(key))).collect();
    Infeasibility::Labels {
        selector: selector.clone(),
        seen,
    }
}

/// What of `demand` the node never has.
fn lasting_shortages(node: &NodeView, demand: &ResourceSet) -> Vec<Shortage> {
    shortages(node, demand)
        .into_iter()
        .filter(Shortage::is_infeasible)
        .collect()
}

/// What of `demand` the node does not have free, with what it never has first.
pub fn shortages(node: &NodeView, demand: &ResourceSet) -> Vec<Shortage> {
    let short = |(name, wanted): (&ResourceName, Quantity)| {
        let (total, available) = (node.total.get(name), node.available.get(name));
        let kind = if wanted > total {
            ShortageKind::Infeasible
        } else {
            ShortageKind::Busy
        };
        let shortage = Shortage {
            resource: name.clone(),
            wanted,
            total,
            available,
            kind,
        };
        (wanted > total || wanted > available).then_some(shortage)
    };
    let mut all: Vec<Shortage> = demand.iter().filter_map(short).collect();
    all.sort_by_key(|shortage| !shortage.is_infeasible());
    all
}
