//! What a lease holds of a node: owns the record of which pool, which amounts and which devices were drawn.
//!
//! It refuses to be copied: what it names can go back to the node once only.
//!
//! Invariants:
//! 1. A draw names its pool and the base name there; a draw of devices is one share of one device.
//! 2. It is made and consumed by `NodeResources` alone, which keeps the other side of these books.

use crate::inline_vec::InlineVec;
use crate::quantity::Quantity;
use crate::resource_set::{ResourceName, ResourceSet, BUNDLE_MARKER};
use ray_ids::PlacementGroupId;

/// Where a draw was made: the node's own resources, or a bundle's.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) enum Pool {
    #[default]
    Node,
    Bundle(PlacementGroupId, u32),
}

/// One amount drawn from one pool, under its base name; `device` where it is a share of one.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Draw {
    pub(crate) pool: Pool,
    pub(crate) name: ResourceName,
    pub(crate) quantity: Quantity,
    pub(crate) device: Option<u32>,
}

impl Draw {
    /// Whether a blocked worker gives it back for a while: CPU, unless someone declared that CPUs are devices.
    pub(crate) fn is_lendable_cpu(&self) -> bool {
        self.name.is_cpu() && self.device.is_none()
    }
}

/// What a lease holds. It must go back through `NodeResources::release`.
#[must_use = "what an allocation holds is lost to the node until it is released"]
#[derive(Debug, Default)]
pub struct Allocation {
    pub(crate) draws: InlineVec<Draw, 2>,
    pub(crate) cpu_given_back: bool,
}

impl Allocation {
    /// The indices of the GPUs held, ascending.
    pub fn gpu_ids(&self) -> Vec<u32> {
        self.device_ids(&ResourceName::GPU)
    }

    /// The indices of the devices of `name` held, ascending.
    pub fn device_ids(&self, name: &ResourceName) -> Vec<u32> {
        let mut ids: Vec<u32> = self
            .draws
            .iter()
            .filter(|draw| draw.name == *name)
            .filter_map(|draw| draw.device)
            .collect();
        ids.sort_unstable();
        ids.dedup();
        ids
    }

    /// What is held under base names (`CPU`, also where it is a bundle's), with CPU that was given back for a while.
    pub fn resources(&self) -> ResourceSet {
        let mut set = ResourceSet::new();
        for draw in self.draws.iter().filter(|draw| draw.name.as_str() != BUNDLE_MARKER) {
            set.add(&draw.name, draw.quantity);
        }
        set
    }

    /// The bundle drawn from; where a demand without an index took from several, the first.
    pub fn bundle(&self) -> Option<(PlacementGroupId, u32)> {
        self.draws.iter().find_map(|draw| match draw.pool {
            Pool::Node => None,
            Pool::Bundle(placement_group, bundle_index) => Some((placement_group, bundle_index)),
        })
    }

    /// Whether its CPU is given back for a while.
    pub fn is_cpu_given_back(&self) -> bool {
        self.cpu_given_back
    }

    /// Whether it holds nothing.
    pub fn is_empty(&self) -> bool {
        self.draws.is_empty()
    }
}
