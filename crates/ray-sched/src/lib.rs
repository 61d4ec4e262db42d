//! Resources and placement: owns how much of what a node has, who holds it, and on which node work goes.
//!
//! It is pure. It has no clock, no thread and no input or output; randomness is a parameter. It refuses amounts that are
//! not exact, leases beyond what is there, and never answers "no" without a reason that can be shown to a user.
//!
//! Invariants (each file states its own):
//! 1. Nothing is sold beyond its total, except the CPU debt of resumed workers, which is booked.
//! 2. A device is given out to at most one whole.
//! 3. A chosen node is alive, not draining and has what is asked for; a choice that is not a node has an explanation.

mod allocation;
mod arrange;
pub mod bundles;
pub mod error;
pub mod explain;
mod inline_vec;
pub mod labels;
mod ledger;
mod node_report;
pub mod node_resources;
pub mod policy;
pub mod quantity;
mod reserved_bundle;
pub mod resource_set;
pub mod view;

pub use allocation::Allocation;
pub use bundles::{
    place_bundles, place_bundles_with, BundleRequest, Placement, PlacementConstraints, PlacementStrategy,
};
pub use error::SchedError;
pub use explain::{explain_infeasible, Infeasibility, Shortage, ShortageKind, Unavailability};
pub use labels::{LabelConstraint, LabelOperator, LabelSelector, Labels};
pub use node_resources::NodeResources;
pub use policy::{choose_node, choose_node_with, Choice, HybridSettings, SchedulingStrategy};
pub use quantity::Quantity;
pub use reserved_bundle::BundleState;
pub use resource_set::{
    bundle_resources, demand_in_group, node_resource_name, ResourceName, ResourceSet, UnitResources, HEAD_NODE_RESOURCE,
};
pub use view::{ClusterView, NodeView};
