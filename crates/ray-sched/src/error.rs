//! The crate's errors: owns why a resource, a label or a bundle is refused.
//!
//! It holds no reason why a valid demand does not fit: that is `Shortage` (one node) and `Infeasibility` (a cluster).

use crate::explain::Shortage;
use ray_ids::PlacementGroupId;

/// Why something given to the scheduler is refused.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub enum SchedError {
    /// The amount is NaN or infinite.
    #[error("{resource} is {value}, which is not a finite number")]
    NotANumber { resource: String, value: f64 },
    /// The amount is below zero.
    #[error("{resource} is {value}, which is negative: give 0 or more")]
    Negative { resource: String, value: f64 },
    /// The amount is finer than a ten-thousandth.
    #[error("{resource} is {value}, which is finer than 0.0001: give at most 4 decimals")]
    TooPrecise { resource: String, value: f64 },
    /// The amount is beyond what is counted.
    #[error("{resource} is {value}, which is too large to be counted")]
    TooLarge { resource: String, value: f64 },
    /// The amount of a resource that comes in devices is above one and not whole.
    #[error("{resource} is {value}, but an amount of {resource} above 1 must be a whole number")]
    FractionalUnits { resource: String, value: f64 },
    /// A node's total of a resource that comes in devices is not whole.
    #[error("the node's total of {resource} is {value}, but {resource} comes in whole devices")]
    FractionalDevices { resource: String, value: f64 },
    /// A resource has no name.
    #[error("a resource's name is empty")]
    EmptyName,
    /// A name that the runtime makes itself was given where the user names resources.
    #[error("the resource name {name:?} is reserved for placement groups: choose another name")]
    ReservedName { name: String },
    /// The same resource was given twice.
    #[error("the resource {name:?} is given twice")]
    RepeatedName { name: String },
    /// A bundle asks for nothing.
    #[error("bundle {bundle_index} asks for no resource: every bundle needs at least one above 0")]
    EmptyBundle { bundle_index: u32 },
    /// The bundle cannot be reserved here now.
    #[error("bundle {bundle_index} of placement group {placement_group} cannot be reserved: {shortage}")]
    BundleDoesNotFit {
        placement_group: PlacementGroupId,
        bundle_index: u32,
        shortage: Shortage,
    },
    /// The bundle is reserved already with other resources.
    #[error("bundle {bundle_index} of placement group {placement_group} is reserved already with other resources")]
    BundleConflict {
        placement_group: PlacementGroupId,
        bundle_index: u32,
    },
    /// The bundle is not reserved here.
    #[error("bundle {bundle_index} of placement group {placement_group} is not reserved on this node")]
    BundleUnknown {
        placement_group: PlacementGroupId,
        bundle_index: u32,
    },
    /// The bundle is being removed and waits for its last lease.
    #[error("bundle {bundle_index} of placement group {placement_group} is being removed and waits for {leases} lease(s) in it")]
    BundleRemoving {
        placement_group: PlacementGroupId,
        bundle_index: u32,
        leases: u32,
    },
    /// A label or a label selector cannot be read.
    #[error("label {key:?}: {problem}")]
    BadLabel { key: String, problem: String },
    /// An invariant of the books does not hold, which is a defect of this program.
    #[error("the resource books are inconsistent: {0}")]
    Inconsistent(String),
}
