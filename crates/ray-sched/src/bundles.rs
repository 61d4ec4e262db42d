//! Where the bundles of a placement group go: owns the four placement strategies.
//!
//! It refuses to place a part of a group, to break a strict strategy, and to say "busy" of a group that it can show to
//! be impossible.
//!
//! A view counts devices in sum only. A group of fractional GPUs that fits in sum and not on the devices is refused by
//! the raylet when it prepares the bundle.
//!
//! Invariants:
//! 1. `Placed` names one working node for each bundle, in order; its labels match and the bundles placed on a node fit
//!    there together.
//! 2. STRICT_PACK uses one node; STRICT_SPREAD uses no node twice, occupied ones included.
//! 3. `Infeasible` is said only where no arrangement exists with every working node empty.

use crate::arrange::{arrange, Outcome, Site};
use crate::explain::{explain_on_any, Infeasibility};
use crate::labels::LabelSelector;
use crate::resource_set::ResourceSet;
use crate::view::{ClusterView, NodeView};
use ray_ids::NodeId;
use std::fmt;

/// How the bundles of a group are arranged.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash)]
pub enum PlacementStrategy {
    /// On as few nodes as possible.
    #[default]
    Pack,
    /// On different nodes as far as possible.
    Spread,
    /// On one node.
    StrictPack,
    /// Each on a node of its own.
    StrictSpread,
}

impl PlacementStrategy {
    /// The strategy with this name, as the API writes it.
    pub fn from_name(name: &str) -> Option<Self> {
        [Self::Pack, Self::Spread, Self::StrictPack, Self::StrictSpread]
            .into_iter()
            .find(|strategy| strategy.name() == name)
    }

    /// The name as the API writes it.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Pack => "PACK",
            Self::Spread => "SPREAD",
            Self::StrictPack => "STRICT_PACK",
            Self::StrictSpread => "STRICT_SPREAD",
        }
    }
}

impl fmt::Display for PlacementStrategy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// One bundle to place.
#[derive(Debug, Clone, Default, PartialEq, Eq, Hash)]
pub struct BundleRequest {
    /// What it reserves.
    pub resources: ResourceSet,
    /// Which nodes it may be on.
    pub label_selector: LabelSelector,
}

impl From<ResourceSet> for BundleRequest {
    fn from(resources: ResourceSet) -> Self {
        Self {
            resources,
            label_selector: LabelSelector::any(),
        }
    }
}

/// What else is known of the group.
#[derive(Debug, Clone, Copy, Default)]
pub struct PlacementConstraints<'a> {
    /// A node that STRICT_PACK tries first.
    pub soft_target_node: Option<NodeId>,
    /// Where bundles of the same group are already, when lost ones are placed again. STRICT_SPREAD and SPREAD keep
    /// away from these nodes, PACK goes there first, STRICT_PACK goes nowhere else.
    pub occupied: &'a [NodeId],
}

/// Where the bundles go.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Placement {
    /// One node for each bundle, in order.
    Placed(Vec<NodeId>),
    /// The cluster could hold them, but not now.
    Busy,
    /// The cluster as it is can never hold them.
    Infeasible(Infeasibility),
}

/// Places a new group; see `place_bundles_with`.
pub fn place_bundles(
    view: &ClusterView,
    bundles: &[BundleRequest],
    strategy: PlacementStrategy,
    rng: &mut dyn FnMut() -> u64,
) -> Placement {
    place_bundles_with(view, bundles, strategy, PlacementConstraints::default(), rng)
}

/// Places bundles, all or none. Among equally good nodes `rng` decides, so that groups made at once do not collide.
pub fn place_bundles_with(
    view: &ClusterView,
    bundles: &[BundleRequest],
    strategy: PlacementStrategy,
    constraints: PlacementConstraints<'_>,
    rng: &mut dyn FnMut() -> u64,
) -> Placement {
    if let Some(reason) = malformed(bundles) {
        return Placement::Infeasible(reason);
    }
    let mut sites = sites_of(view, constraints, |node| &node.available);
    if !sites.is_empty() {
        let turn = (rng() % sites.len() as u64) as usize;
        sites.rotate_left(turn);
    }
    if let Outcome::Found(chosen) = arrange(&sites, bundles, strategy, constraints) {
        return Placement::Placed(chosen.into_iter().map(|at| sites[at].id).collect());
    }
    match explain_unplaceable(view, bundles, strategy, constraints) {
        Some(reason) => Placement::Infeasible(reason),
        None => Placement::Busy,
    }
}

/// Why these bundles can never be placed with the nodes there are, or `None` where they can or where that would take
/// too long to find out.
pub fn explain_unplaceable(
    view: &ClusterView,
    bundles: &[BundleRequest],
    strategy: PlacementStrategy,
    constraints: PlacementConstraints<'_>,
) -> Option<Infeasibility> {
    if let Some(reason) = malformed(bundles) {
        return Some(reason);
    }
    for (bundle_index, bundle) in bundles.iter().enumerate() {
        if let Some(reason) = explain_on_any(view, &bundle.resources, &bundle.label_selector) {
            return Some(match reason {
                Infeasibility::NoNodes { .. } => reason,
                reason => Infeasibility::Bundle {
                    bundle_index,
                    reason: Box::new(reason),
                },
            });
        }
    }
    let sites = sites_of(view, constraints, |node| &node.total);
    let Outcome::Impossible { placeable } = arrange(&sites, bundles, strategy, constraints) else {
        return None;
    };
    Some(match strategy {
        PlacementStrategy::StrictPack => explain_strict_pack(view, bundles, constraints),
        PlacementStrategy::StrictSpread => Infeasibility::StrictSpread {
            bundles: bundles.len(),
            placeable,
        },
        PlacementStrategy::Pack | PlacementStrategy::Spread => {
            let (wanted, total) = (
                sum(bundles.iter().map(|bundle| &bundle.resources)),
                sum(sites.iter().map(|site| &site.free)),
            );
            let lacking = wanted.iter().find(|(name, quantity)| total.get(name) < *quantity);
            match lacking {
                Some((name, wanted)) => Infeasibility::ClusterTooSmall {
                    resource: name.clone(),
                    wanted,
                    total: total.get(name),
                },
                None => Infeasibility::NoArrangement { bundles: bundles.len() },
            }
        }
    })
}

fn malformed(bundles: &[BundleRequest]) -> Option<Infeasibility> {
    if bundles.is_empty() {
        return Some(Infeasibility::EmptyBundle { bundle_index: None });
    }
    let empty = bundles.iter().position(|bundle| bundle.resources.is_empty());
    empty.map(|index| Infeasibility::EmptyBundle {
        bundle_index: Some(index),
    })
}

fn explain_strict_pack(
    view: &ClusterView,
    bundles: &[BundleRequest],
    constraints: PlacementConstraints<'_>,
) -> Infeasibility {
    let all = sum(bundles.iter().map(|bundle| &bundle.resources));
    let constraints_of = bundles
        .iter()
        .flat_map(|bundle| bundle.label_selector.constraints.iter().cloned());
    let selector = LabelSelector {
        constraints: constraints_of.collect(),
    };
    let only_occupied: ClusterView = match constraints.occupied.first() {
        Some(node) => view
            .nodes
            .iter()
            .filter(|(id, _)| *id == node)
            .map(|(id, node)| (*id, node.clone()))
            .collect(),
        None => view.clone(),
    };
    match explain_on_any(&only_occupied, &all, &selector) {
        Some(reason) => Infeasibility::StrictPack {
            reason: Box::new(reason),
        },
        // One node could hold all, and yet there is no arrangement: the survivors are on several nodes.
        None => Infeasibility::NoArrangement { bundles: bundles.len() },
    }
}

fn sites_of<'a>(
    view: &'a ClusterView,
    constraints: PlacementConstraints<'_>,
    free: impl Fn(&'a NodeView) -> &'a ResourceSet,
) -> Vec<Site<'a>> {
    let occupants = |id: NodeId| constraints.occupied.iter().filter(|occupied| **occupied == id).count();
    let site = |(id, node): (NodeId, &'a NodeView)| Site {
        id,
        node,
        free: free(node).clone(),
        bundles: occupants(id),
    };
    view.working_nodes().map(site).collect()
}

fn sum<'a>(sets: impl Iterator<Item = &'a ResourceSet>) -> ResourceSet {
    let mut total = ResourceSet::new();
    sets.for_each(|set| total.add_all(set));
    total
}
