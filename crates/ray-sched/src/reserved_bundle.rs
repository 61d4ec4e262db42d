//! One bundle reserved on a node: owns what it took from the node and the books of the leases in it.
//!
//! It refuses nothing: `NodeResources` decides who may draw.
//!
//! Invariants:
//! 1. Its ledger has exactly the resources reserved for it, on the same devices, and its marker.
//! 2. While no draw is open, all of it is free.
//! 3. While it is being removed, a draw is open.

use crate::allocation::Allocation;
use crate::error::SchedError;
use crate::ledger::{DeviceShare, Ledger, Slot};
use crate::quantity::Quantity;
use crate::resource_set::{ResourceName, ResourceSet, BUNDLE_MARKER, BUNDLE_MARKER_TOTAL};
use ray_ids::PlacementGroupId;

/// How far a bundle is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum BundleState {
    /// Reserved, and not yet to be used.
    Prepared,
    /// Leases may draw from it.
    Committed,
    /// No lease is granted in it; it ends with its last lease.
    Removing,
}

#[derive(Debug)]
pub(crate) struct Bundle {
    pub(crate) index: u32,
    pub(crate) state: BundleState,
    pub(crate) resources: ResourceSet,
    /// What it holds of the node.
    pub(crate) reserved: Allocation,
    pub(crate) ledger: Ledger,
    /// Of each slot of the ledger, the name in the bundle and the name in the group.
    pub(crate) names: Vec<(ResourceName, ResourceName)>,
    /// Draws not yet returned.
    pub(crate) draws: u32,
}

impl Bundle {
    pub(crate) fn new(
        placement_group: PlacementGroupId,
        index: u32,
        resources: ResourceSet,
        reserved: Allocation,
    ) -> Self {
        let mut slots = vec![Slot::plain(ResourceName::new(BUNDLE_MARKER), BUNDLE_MARKER_TOTAL)];
        for (name, quantity) in resources.iter() {
            let mut shares: Vec<DeviceShare> = reserved
                .draws
                .iter()
                .filter(|draw| draw.name == *name)
                .filter_map(|draw| {
                    draw.device.map(|index| DeviceShare {
                        index,
                        share: draw.quantity,
                    })
                })
                .collect();
            shares.sort_by_key(|share| share.index);
            slots.push(if shares.is_empty() {
                Slot::plain(name.clone(), quantity)
            } else {
                Slot::with_devices(name.clone(), shares)
            });
        }
        let ledger = Ledger::new(slots);
        let in_both = |slot: &Slot| {
            (
                slot.name.in_group(placement_group, Some(index)),
                slot.name.in_group(placement_group, None),
            )
        };
        let names = ledger.slots().iter().map(in_both).collect();
        Self {
            index,
            state: BundleState::Prepared,
            resources,
            reserved,
            ledger,
            names,
            draws: 0,
        }
    }

    pub(crate) fn validate(&self, placement_group: PlacementGroupId) -> Result<(), SchedError> {
        self.ledger.validate()?;
        let wrong = |what: &str| {
            let place = format!("bundle {} of {placement_group}", self.index);
            Err(SchedError::Inconsistent(format!("{place}: {what}")))
        };
        let mut totals: ResourceSet = self
            .ledger
            .slots()
            .iter()
            .map(|slot| (slot.name.clone(), slot.total))
            .collect();
        totals.set(ResourceName::new(BUNDLE_MARKER), Quantity::ZERO);
        if totals != self.resources || self.reserved.resources() != self.resources {
            return wrong("its totals are not what is reserved for it");
        }
        if self.state == BundleState::Removing && self.draws == 0 {
            return wrong("it is being removed and has no lease");
        }
        let unused = self.ledger.slots().iter().all(|slot| slot.available == slot.total);
        if self.draws == 0 && !unused {
            return wrong("no lease draws from it and yet not all is free");
        }
        Ok(())
    }
}
