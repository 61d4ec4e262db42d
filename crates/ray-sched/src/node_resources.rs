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

use crate::error::SchedError;
use crate::explain::{Shortage, ShortageKind};
use crate::inline_vec::InlineVec;
use crate::labels::Labels;
use crate::ledger::{DeviceShare, Ledger, Slot};
use crate::quantity::Quantity;
use crate::resource_set::{ResourceName, ResourceSet, UnitResources, BUNDLE_MARKER, BUNDLE_MARKER_TOTAL};
use ray_ids::PlacementGroupId;
use std::collections::BTreeMap;

/// Where a draw was made: the node's own resources, or a bundle's.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
enum Pool {
    #[default]
    Node,
    Bundle(PlacementGroupId, u32),
}

/// One amount drawn from one pool, under its base name; `device` where it is a share of one.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
struct Draw {
    pool: Pool,
    name: ResourceName,
    quantity: Quantity,
    device: Option<u32>,
}

impl Draw {
    /// Whether a blocked worker gives it back for a while: CPU, unless someone declared that CPUs are devices.
    fn is_lendable_cpu(&self) -> bool {
        self.name.is_cpu() && self.device.is_none()
    }
}

/// What a lease holds. It must go back through `NodeResources::release`.
#[must_use = "what an allocation holds is lost to the node until it is released"]
#[derive(Debug, Default)]
pub struct Allocation {
    draws: InlineVec<Draw, 2>,
    cpu_given_back: bool,
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
struct Bundle {
    index: u32,
    state: BundleState,
    resources: ResourceSet,
    /// What it holds of the node.
    reserved: Allocation,
    ledger: Ledger,
    /// Of each slot of the ledger, the name in the bundle and the name in the group.
    names: Vec<(ResourceName, ResourceName)>,
    /// Draws not yet returned.
    draws: u32,
}

/// The resources of one node.
#[derive(Debug)]
pub struct NodeResources {
    ledger: Ledger,
    labels: Labels,
    bundles: BTreeMap<PlacementGroupId, Vec<Bundle>>,
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

    /// The total of one resource, also under a group name.
    pub fn total(&self, name: &ResourceName) -> Quantity {
        self.sum_of(name, |slot| slot.total)
    }

    /// What is free of one resource, also under a group name; debt counts as nothing free.
    pub fn available(&self, name: &ResourceName) -> Quantity {
        self.sum_of(name, |slot| slot.available.at_least_zero())
    }

    /// How much CPU is in use beyond the total, by resumed workers.
    pub fn cpu_debt(&self) -> Quantity {
        let ledgers = std::iter::once(&self.ledger).chain(self.bundles.values().flatten().map(|bundle| &bundle.ledger));
        ledgers
            .filter_map(|ledger| ledger.slot(&ResourceName::CPU))
            .map(|slot| slot.debt)
            .sum()
    }

    /// All totals, with the names of committed bundles.
    pub fn total_set(&self) -> ResourceSet {
        self.set_of(|slot| slot.total)
    }

    /// All that is free, with the names of committed bundles.
    pub fn available_set(&self) -> ResourceSet {
        self.set_of(|slot| slot.available.at_least_zero())
    }

    /// All that would be free if these allocations were released: leases kept by idle owners count as free in every
    /// view, because they are recalled before anyone hears "does not fit".
    pub fn available_if_released<'a>(&self, allocations: impl IntoIterator<Item = &'a Allocation>) -> ResourceSet {
        let mut freed: Vec<(Pool, &ResourceName, Quantity)> = Vec::new();
        for allocation in allocations {
            for draw in allocation
                .draws
                .iter()
                .filter(|draw| !(allocation.cpu_given_back && draw.is_lendable_cpu()))
            {
                match freed
                    .iter_mut()
                    .find(|(pool, name, _)| *pool == draw.pool && **name == draw.name)
                {
                    Some((_, _, quantity)) => *quantity += draw.quantity,
                    None => freed.push((draw.pool, &draw.name, draw.quantity)),
                }
            }
        }
        self.set_of_pools(|pool, slot| {
            let more = freed
                .iter()
                .find(|(freed_pool, name, _)| *freed_pool == pool && **name == slot.name);
            (slot.available + more.map_or(Quantity::ZERO, |(_, _, quantity)| *quantity)).at_least_zero()
        })
    }

    /// Why `demand` does not fit now: first what can never fit, then what is busy. `None` if it fits, apart from how
    /// devices are shared.
    pub fn shortage(&self, demand: &ResourceSet) -> Option<Shortage> {
        let short = |(name, wanted): (&ResourceName, Quantity)| {
            let (total, available) = (self.total(name), self.available(name));
            let kind = match (wanted > total, wanted > available) {
                (true, _) => ShortageKind::Infeasible,
                (false, true) => ShortageKind::Busy,
                (false, false) => return None,
            };
            Some(Shortage {
                resource: name.clone(),
                wanted,
                total,
                available,
                kind,
            })
        };
        let mut busy = None;
        for shortage in demand.iter().filter_map(short) {
            if shortage.kind == ShortageKind::Infeasible {
                return Some(shortage);
            }
            busy = busy.or(Some(shortage));
        }
        busy
    }

    /// Whether `demand` could fit on this node with nothing else running.
    pub fn is_feasible(&self, demand: &ResourceSet) -> bool {
        demand.iter().all(|(name, wanted)| self.total(name) >= wanted)
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

    fn sum_of(&self, name: &ResourceName, amount: impl Fn(&Slot) -> Quantity) -> Quantity {
        let Some(group) = name.group() else {
            return self.ledger.slot(name).map_or(Quantity::ZERO, amount);
        };
        let bundles = self.bundles.get(&group.placement_group).into_iter().flatten();
        bundles
            .filter(|bundle| bundle.state == BundleState::Committed)
            .filter(|bundle| group.bundle_index.is_none_or(|index| index == bundle.index))
            .filter_map(|bundle| bundle.ledger.slot(&group.base))
            .map(amount)
            .sum()
    }

    fn set_of(&self, amount: impl Fn(&Slot) -> Quantity) -> ResourceSet {
        self.set_of_pools(|_, slot| amount(slot))
    }

    fn set_of_pools(&self, amount: impl Fn(Pool, &Slot) -> Quantity) -> ResourceSet {
        let own = self
            .ledger
            .slots()
            .iter()
            .map(|slot| (slot.name.clone(), amount(Pool::Node, slot)));
        let mut set: ResourceSet = own.collect();
        for (id, group) in &self.bundles {
            for bundle in group.iter().filter(|bundle| bundle.state == BundleState::Committed) {
                for (slot, (in_bundle, in_group)) in bundle.ledger.slots().iter().zip(&bundle.names) {
                    let quantity = amount(Pool::Bundle(*id, bundle.index), slot);
                    set.set(in_bundle.clone(), quantity);
                    set.add(in_group, quantity);
                }
            }
        }
        set
    }

    fn device_shortage(&self, demand: &ResourceSet) -> Shortage {
        let with_devices =
            demand.iter().find_map(|(name, wanted)| {
                let base = name.group().map_or(name, |group| &group.base);
                let shares = self
                    .pools_of(name)
                    .filter_map(|ledger| ledger.slot(base)?.largest_device_share());
                let largest_share = shares.max()?;
                let needed = if wanted >= Quantity::ONE { Quantity::ONE } else { wanted };
                let whole_free: i64 = self
                    .pools_of(name)
                    .filter_map(|ledger| ledger.slot(base))
                    .map(free_devices)
                    .sum();
                (largest_share < needed || whole_free < wanted.whole_units() || !wanted.fraction().is_zero())
                    .then_some((name, wanted, largest_share))
            });
        let (name, wanted, largest_share) = match with_devices {
            Some(found) => found,
            // Only devices can fail where all sums suffice; were it otherwise, the first name is still true to say.
            None => demand.iter().next().map_or(
                (&ResourceName::CPU, Quantity::ZERO, Quantity::ZERO),
                |(name, wanted)| (name, wanted, Quantity::ZERO),
            ),
        };
        Shortage {
            resource: name.clone(),
            wanted,
            total: self.total(name),
            available: self.available(name),
            kind: ShortageKind::Fragmented { largest_share },
        }
    }

    fn pools_of<'a>(&'a self, name: &'a ResourceName) -> impl Iterator<Item = &'a Ledger> + 'a {
        let group = name.group();
        let own = group.is_none().then_some(&self.ledger);
        let bundles = group
            .and_then(|group| self.bundles.get(&group.placement_group))
            .into_iter()
            .flatten();
        let wanted = move |bundle: &&Bundle| {
            let index = group.and_then(|group| group.bundle_index);
            bundle.state == BundleState::Committed && index.is_none_or(|index| index == bundle.index)
        };
        own.into_iter()
            .chain(bundles.filter(wanted).map(|bundle| &bundle.ledger))
    }
}

fn free_devices(slot: &Slot) -> i64 {
    slot.devices
        .iter()
        .flatten()
        .filter(|device| device.free == Quantity::ONE)
        .count() as i64
}

impl Bundle {
    fn new(placement_group: PlacementGroupId, index: u32, resources: ResourceSet, reserved: Allocation) -> Self {
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

    fn validate(&self, placement_group: PlacementGroupId) -> Result<(), SchedError> {
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
