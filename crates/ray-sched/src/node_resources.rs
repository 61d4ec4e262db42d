//! One node's resources: owns what is given out to which lease, which devices they hold, and the bundles of placement
//! groups reserved on the node.
//!
//! It refuses (with a `Shortage`) whatever is not free, bundles that contradict one already reserved, and leases in a
//! bundle that is not committed. It never queues: who waits is the raylet's business.
//!
//! A bundle is reserved from the node's own resources (`prepare_bundle`), shown under its group names once committed,
//! and ends with `remove_bundle`. A demand without a bundle index draws from the group's bundles on the node, the
//! tightest that holds all of it first, and from several where none does: so the group's common name is always the
//! sum of its bundles and can never be sold twice.
//!
//! Invariants:
//! 1. Every ledger's own invariants hold (see `ledger.rs`): nothing is sold beyond its total except booked CPU debt.
//! 2. A bundle's ledger has exactly the resources reserved for it, on the same devices, and its marker.
//! 3. A bundle being removed has leases in it; once the last is released, what it had is the node's again.
//! 4. An allocation is released once: it is consumed by `release` and cannot be cloned.

use crate::allocation::{Allocation, Draw, Pool};
use crate::error::SchedError;
use crate::explain::Shortage;
use crate::labels::Labels;
use crate::ledger::{DeviceShare, Ledger, Slot};
use crate::quantity::Quantity;
use crate::reserved_bundle::{Bundle, BundleState};
use crate::resource_set::{ResourceName, ResourceSet, UnitResources, BUNDLE_MARKER};
use ray_ids::PlacementGroupId;
use std::collections::BTreeMap;

/// The resources of one node.
#[derive(Debug)]
pub struct NodeResources {
    pub(crate) ledger: Ledger,
    labels: Labels,
    pub(crate) bundles: BTreeMap<PlacementGroupId, Vec<Bundle>>,
    revision: u64,
}

impl NodeResources {
    /// A node with these totals, all free.
    pub fn new(total: &ResourceSet, labels: Labels, units: &UnitResources) -> Result<Self, SchedError> {
        let mut slots = Vec::with_capacity(total.len());
        for (name, quantity) in total.iter() {
            if name.group().is_some() || name.as_str() == BUNDLE_MARKER {
                return Err(SchedError::ReservedName { name: name.to_string() });
            }
            if !units.contains(name) {
                slots.push(Slot::plain(name.clone(), quantity));
                continue;
            }
            let whole = u32::try_from(quantity.whole_units())
                .ok()
                .filter(|_| quantity.is_whole());
            let Some(count) = whole else {
                let (resource, value) = (name.to_string(), quantity.to_f64());
                return Err(SchedError::FractionalDevices { resource, value });
            };
            slots.push(Slot::with_devices(
                name.clone(),
                (0..count).map(|index| DeviceShare {
                    index,
                    share: Quantity::ONE,
                }),
            ));
        }
        Ok(Self {
            ledger: Ledger::new(slots),
            labels,
            bundles: BTreeMap::new(),
            revision: 0,
        })
    }

    /// The node's labels.
    pub fn labels(&self) -> &Labels {
        &self.labels
    }

    /// Counts changes, so that a reporter knows whether there is anything new to say.
    pub fn revision(&self) -> u64 {
        self.revision
    }

    /// Takes `demand` all at once, or says what is missing and takes nothing.
    pub fn allocate(&mut self, demand: &ResourceSet) -> Result<Allocation, Shortage> {
        let mut allocation = Allocation::default();
        let mut complete = true;
        let mut common_names = false;
        // Names of single bundles come first: what they draw is part of what the group's common name asks for.
        for (name, wanted) in demand.iter() {
            match name.group() {
                None => complete = self.draw(&[Pool::Node], name, wanted, &mut allocation),
                Some(group) => match group.bundle_index {
                    None => common_names = true,
                    Some(index) => {
                        complete =
                            self.draw_in_bundle(group.placement_group, index, &group.base, wanted, &mut allocation)
                    }
                },
            }
            if !complete {
                break;
            }
        }
        if complete && common_names {
            complete = self.draw_from_groups(demand, &mut allocation);
        }
        if !complete {
            self.return_draws(&allocation);
            // A demand that the plain checks find no fault with failed on the devices' shares.
            return Err(self.shortage(demand).unwrap_or_else(|| self.device_shortage(demand)));
        }
        self.revision += 1;
        Ok(allocation)
    }

    /// Gives everything back.
    pub fn release(&mut self, allocation: Allocation) {
        self.return_draws(&allocation);
        self.finish_removals();
        self.revision += 1;
    }

    /// Gives back the CPU of a worker that blocks, also a bundle's, and nothing else. False if it is back already.
    pub fn give_back_cpu(&mut self, allocation: &mut Allocation) -> bool {
        if allocation.cpu_given_back {
            return false;
        }
        for draw in allocation.draws.iter().filter(|draw| draw.is_lendable_cpu()) {
            if let Some(slot) = self.slot_mut(draw.pool, &draw.name) {
                slot.put_back(draw.quantity);
            }
        }
        allocation.cpu_given_back = true;
        self.revision += 1;
        true
    }

    /// Takes again the CPU of a worker that resumes. It never waits: what is not free is booked as debt, and no new
    /// demand is granted until the debt is paid. False if nothing was given back.
    pub fn take_back_cpu(&mut self, allocation: &mut Allocation) -> bool {
        if !allocation.cpu_given_back {
            return false;
        }
        for draw in allocation.draws.iter().filter(|draw| draw.is_lendable_cpu()) {
            if let Some(slot) = self.slot_mut(draw.pool, &draw.name) {
                slot.take_on_debt(draw.quantity);
            }
        }
        allocation.cpu_given_back = false;
        self.revision += 1;
        true
    }

    /// Reserves a bundle without showing it. Repeating it is harmless.
    pub fn prepare_bundle(
        &mut self,
        placement_group: PlacementGroupId,
        bundle_index: u32,
        resources: &ResourceSet,
    ) -> Result<(), SchedError> {
        if let Some(bundle) = self.bundle(placement_group, bundle_index) {
            return match bundle.state {
                BundleState::Removing => Err(SchedError::BundleRemoving {
                    placement_group,
                    bundle_index,
                    leases: bundle.draws,
                }),
                _ if bundle.resources == *resources => Ok(()),
                _ => Err(SchedError::BundleConflict {
                    placement_group,
                    bundle_index,
                }),
            };
        }
        if resources.is_empty() {
            return Err(SchedError::EmptyBundle { bundle_index });
        }
        if let Some((name, _)) = resources
            .iter()
            .find(|(name, _)| name.group().is_some() || name.as_str() == BUNDLE_MARKER)
        {
            return Err(SchedError::ReservedName { name: name.to_string() });
        }
        let reserved = self
            .allocate(resources)
            .map_err(|shortage| SchedError::BundleDoesNotFit {
                placement_group,
                bundle_index,
                shortage,
            })?;
        let bundle = Bundle::new(placement_group, bundle_index, resources.clone(), reserved);
        let group = self.bundles.entry(placement_group).or_default();
        let at = group.partition_point(|other| other.index < bundle_index);
        group.insert(at, bundle);
        Ok(())
    }

    /// Shows a prepared bundle and opens it to leases. Repeating it is harmless.
    pub fn commit_bundle(&mut self, placement_group: PlacementGroupId, bundle_index: u32) -> Result<(), SchedError> {
        let unknown = SchedError::BundleUnknown {
            placement_group,
            bundle_index,
        };
        let bundle = self.bundle_mut(placement_group, bundle_index).ok_or(unknown)?;
        if bundle.state == BundleState::Removing {
            return Err(SchedError::BundleRemoving {
                placement_group,
                bundle_index,
                leases: bundle.draws,
            });
        }
        bundle.state = BundleState::Committed;
        self.revision += 1;
        Ok(())
    }

    /// Prepares and commits in one step.
    pub fn add_bundle(
        &mut self,
        placement_group: PlacementGroupId,
        bundle_index: u32,
        resources: &ResourceSet,
    ) -> Result<(), SchedError> {
        self.prepare_bundle(placement_group, bundle_index, resources)?;
        self.commit_bundle(placement_group, bundle_index)
    }

    /// Ends a bundle, prepared or committed: at once (true), or with the last lease in it (false), until when it is
    /// `Removing` and the raylet ends those leases' workers. Removing what is not there is harmless (true).
    pub fn remove_bundle(&mut self, placement_group: PlacementGroupId, bundle_index: u32) -> bool {
        if let Some(bundle) = self.bundle_mut(placement_group, bundle_index) {
            bundle.state = BundleState::Removing;
            self.finish_removals();
            self.revision += 1;
        }
        self.bundle_state(placement_group, bundle_index).is_none()
    }

    /// How far a bundle is, if it is here.
    pub fn bundle_state(&self, placement_group: PlacementGroupId, bundle_index: u32) -> Option<BundleState> {
        self.bundle(placement_group, bundle_index).map(|bundle| bundle.state)
    }

    /// Every bundle here, as a restarted control plane asks for them.
    pub fn bundles(&self) -> impl Iterator<Item = (PlacementGroupId, u32, BundleState, &ResourceSet)> + '_ {
        self.bundles.iter().flat_map(|(id, group)| {
            group
                .iter()
                .map(|bundle| (*id, bundle.index, bundle.state, &bundle.resources))
        })
    }

    /// Checks every invariant.
    pub fn validate(&self) -> Result<(), SchedError> {
        self.ledger.validate()?;
        for (id, group) in &self.bundles {
            let sorted = group.windows(2).all(|pair| pair[0].index < pair[1].index);
            if group.is_empty() || !sorted {
                return Err(SchedError::Inconsistent(format!(
                    "the bundles of {id} are not sorted or none"
                )));
            }
            for bundle in group {
                bundle.validate(*id)?;
            }
        }
        Ok(())
    }

    fn bundle(&self, placement_group: PlacementGroupId, bundle_index: u32) -> Option<&Bundle> {
        self.bundles
            .get(&placement_group)?
            .iter()
            .find(|bundle| bundle.index == bundle_index)
    }

    fn bundle_mut(&mut self, placement_group: PlacementGroupId, bundle_index: u32) -> Option<&mut Bundle> {
        self.bundles
            .get_mut(&placement_group)?
            .iter_mut()
            .find(|bundle| bundle.index == bundle_index)
    }

    fn slot(&self, pool: Pool, name: &ResourceName) -> Option<&Slot> {
        match pool {
            Pool::Node => self.ledger.slot(name),
            Pool::Bundle(placement_group, index) => self.bundle(placement_group, index)?.ledger.slot(name),
        }
    }

    fn slot_mut(&mut self, pool: Pool, name: &ResourceName) -> Option<&mut Slot> {
        match pool {
            Pool::Node => self.ledger.slot_mut(name),
            Pool::Bundle(placement_group, index) => self.bundle_mut(placement_group, index)?.ledger.slot_mut(name),
        }
    }

    fn draw_in_bundle(
        &mut self,
        placement_group: PlacementGroupId,
        index: u32,
        base: &ResourceName,
        wanted: Quantity,
        allocation: &mut Allocation,
    ) -> bool {
        let committed = self.bundle_state(placement_group, index) == Some(BundleState::Committed);
        committed && self.draw(&[Pool::Bundle(placement_group, index)], base, wanted, allocation)
    }

    /// Draws what a demand asks for under the common names of groups beyond what it drew from single bundles.
    fn draw_from_groups(&mut self, demand: &ResourceSet, allocation: &mut Allocation) -> bool {
        let drawn_from_bundles = |common: &ResourceName| -> Quantity {
            let Some(common) = common.group() else {
                return Quantity::ZERO;
            };
            let same = |name: &ResourceName| {
                name.group().is_some_and(|group| {
                    group.bundle_index.is_some()
                        && group.placement_group == common.placement_group
                        && group.base == common.base
                })
            };
            demand
                .iter()
                .filter(|(name, _)| same(name))
                .map(|(_, quantity)| quantity)
                .sum()
        };
        let mut rest: Vec<(&ResourceName, PlacementGroupId, Quantity)> = Vec::new();
        for (name, wanted) in demand.iter() {
            if let Some(group) = name.group().filter(|group| group.bundle_index.is_none()) {
                let beyond = wanted - drawn_from_bundles(name);
                if beyond > Quantity::ZERO {
                    rest.push((&group.base, group.placement_group, beyond));
                }
            }
        }
        while let Some((_, placement_group, _)) = rest.first() {
            let placement_group = *placement_group;
            let (now, later) = rest.into_iter().partition(|(_, group, _)| *group == placement_group);
            rest = later;
            let now: Vec<(&ResourceName, PlacementGroupId, Quantity)> = now;
            let pools = self.group_pools(placement_group, &now);
            if !now
                .iter()
                .all(|(base, _, wanted)| self.draw(&pools, base, *wanted, allocation))
            {
                return false;
            }
        }
        true
    }

    /// The committed bundles of a group in the order to draw from: first those that hold everything wanted, and of
    /// those first the tightest by what is free.
    fn group_pools(&self, id: PlacementGroupId, wanted: &[(&ResourceName, PlacementGroupId, Quantity)]) -> Vec<Pool> {
        let mut pools: Vec<(bool, Quantity, Pool)> = Vec::new();
        for bundle in self.bundles.get(&id).into_iter().flatten() {
            if bundle.state == BundleState::Committed {
                let free = |base: &ResourceName| bundle.ledger.slot(base).map_or(Quantity::ZERO, |slot| slot.available);
                let partial = !wanted.iter().all(|(base, _, quantity)| free(base) >= *quantity);
                let left = wanted.iter().map(|(base, _, _)| free(base)).sum();
                pools.push((partial, left, Pool::Bundle(id, bundle.index)));
            }
        }
        pools.sort_by_key(|(partial, left, _)| (*partial, *left));
        pools.into_iter().map(|(_, _, pool)| pool).collect()
    }

    /// Draws `wanted` from the first pools that have it; what it drew before it failed is in `allocation`.
    fn draw(&mut self, pools: &[Pool], name: &ResourceName, wanted: Quantity, allocation: &mut Allocation) -> bool {
        let has_devices = pools
            .iter()
            .any(|pool| self.slot(*pool, name).is_some_and(|slot| slot.devices.is_some()));
        if has_devices {
            return self.draw_devices(pools, name, wanted, allocation);
        }
        let mut missing = wanted;
        for pool in pools {
            let Some(slot) = self.slot_mut(*pool, name) else {
                continue;
            };
            let quantity = if pools.len() == 1 {
                missing
            } else {
                missing.min(slot.available.at_least_zero())
            };
            if quantity > Quantity::ZERO && slot.take(quantity) {
                missing -= quantity;
                self.note_draw(*pool, name, quantity, None, allocation);
            }
            if missing.is_zero() {
                return true;
            }
        }
        missing.is_zero()
    }

    /// Draws whole devices one by one and then the fraction, each from the pool and device where it fits tightest.
    fn draw_devices(
        &mut self,
        pools: &[Pool],
        name: &ResourceName,
        wanted: Quantity,
        allocation: &mut Allocation,
    ) -> bool {
        let whole = std::iter::repeat_n(
            Quantity::ONE,
            usize::try_from(wanted.whole_units()).unwrap_or(usize::MAX),
        );
        let fraction = Some(wanted.fraction()).filter(|fraction| !fraction.is_zero());
        for share in whole.chain(fraction) {
            let best = pools
                .iter()
                .filter_map(|pool| Some((*pool, self.slot(*pool, name)?.tightest_device(share)?)))
                .min_by_key(|(_, device)| device.share);
            let Some((pool, device)) = best else { return false };
            if let Some(slot) = self.slot_mut(pool, name) {
                slot.take_device(device.index, share);
            }
            self.note_draw(pool, name, share, Some(device.index), allocation);
        }
        true
    }

    fn note_draw(
        &mut self,
        pool: Pool,
        name: &ResourceName,
        quantity: Quantity,
        device: Option<u32>,
        allocation: &mut Allocation,
    ) {
        if let Pool::Bundle(placement_group, index) = pool {
            if let Some(bundle) = self.bundle_mut(placement_group, index) {
                bundle.draws += 1;
            }
        }
        allocation.draws.push(Draw {
            pool,
            name: name.clone(),
            quantity,
            device,
        });
    }

    fn return_draws(&mut self, allocation: &Allocation) {
        for draw in allocation.draws.iter() {
            if let Some(slot) = self.slot_mut(draw.pool, &draw.name) {
                match draw.device {
                    Some(device) => slot.put_back_device(device, draw.quantity),
                    None if allocation.cpu_given_back && draw.is_lendable_cpu() => {}
                    None => slot.put_back(draw.quantity),
                }
            }
            if let Pool::Bundle(placement_group, index) = draw.pool {
                if let Some(bundle) = self.bundle_mut(placement_group, index) {
                    bundle.draws -= 1;
                }
            }
        }
    }

    /// Gives the node what removed bundles without leases held.
    fn finish_removals(&mut self) {
        let ended = |bundle: &Bundle| bundle.state == BundleState::Removing && bundle.draws == 0;
        if !self.bundles.values().flatten().any(ended) {
            return;
        }
        let mut reserved = Vec::new();
        for group in self.bundles.values_mut() {
            while let Some(at) = group.iter().position(ended) {
                reserved.push(group.remove(at).reserved);
            }
        }
        self.bundles.retain(|_, group| !group.is_empty());
        for allocation in reserved {
            self.return_draws(&allocation);
        }
    }
}
