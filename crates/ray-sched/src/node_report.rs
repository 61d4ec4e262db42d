//! What a node says of itself: owns totals, free amounts and shortages, under base names and group names.
//!
//! It changes nothing. It refuses to show bundles that are not committed.
//!
//! Invariants:
//! 1. The amount under a group's common name is the sum over its committed bundles on the node.
//! 2. Debt shows as nothing free, never as a negative amount.

use crate::allocation::{Allocation, Pool};
use crate::explain::{Shortage, ShortageKind};
use crate::ledger::{Ledger, Slot};
use crate::node_resources::NodeResources;
use crate::quantity::Quantity;
use crate::reserved_bundle::{Bundle, BundleState};
use crate::resource_set::{ResourceName, ResourceSet};

impl NodeResources {
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

    pub(crate) fn device_shortage(&self, demand: &ResourceSet) -> Shortage {
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
