//! Resource names and sets of amounts by name: owns how a demand is written and how one inside a placement group is
//! translated.
//!
//! It refuses empty names, repeated names and, where the user names resources, the names that the runtime makes
//! itself (`CPU_group_…`, `bundle`).
//!
//! Names follow what programs see in `ray.cluster_resources()`: `CPU`, `GPU`, `memory`, `object_store_memory`, custom
//! names, `node:<ip>`, `node:__internal_head__`; and for bundle 0 of a placement group with id H: `CPU_group_0_H` and
//! `CPU_group_H`, which is all of the group's CPU on the node. The marker `bundle_group_…` (1000 in each bundle, of
//! which a demand takes 0.001) holds a demand of 0 CPUs to the group's nodes.
//!
//! An actor without explicit CPUs needs 1 to be placed and 0 to run. That is two sets of the caller: it gives the
//! placement demand to `choose_node` and the running demand to `NodeResources::allocate`; nothing here knows of it.
//!
//! Invariants:
//! 1. A set is sorted by name, has no name twice and no amount of zero or below.
//! 2. The same text gives equal names, and a name that reads as a group's always knows its parts.

use crate::error::SchedError;
use crate::inline_vec::InlineVec;
use crate::quantity::Quantity;
use ray_ids::PlacementGroupId;
use std::cmp::Ordering;
use std::fmt;
use std::hash::{Hash, Hasher};
use std::sync::Arc;

/// The resource that only the head node has.
pub const HEAD_NODE_RESOURCE: &str = "node:__internal_head__";
/// The base name of a bundle's marker.
pub const BUNDLE_MARKER: &str = "bundle";
/// How much of the marker one bundle has.
pub const BUNDLE_MARKER_TOTAL: Quantity = Quantity::from_int(1000);
/// How much of the marker one demand takes.
pub const BUNDLE_MARKER_DEMAND: Quantity = Quantity::from_raw(10);

/// The resource of the node with this address, of which the node has 1.
pub fn node_resource_name(ip: &str) -> ResourceName {
    ResourceName::new(&format!("node:{ip}"))
}

/// The name of a resource, cheap to clone and to compare.
#[derive(Clone)]
pub struct ResourceName(Name);

#[derive(Clone)]
enum Name {
    Cpu,
    Gpu,
    Memory,
    ObjectStoreMemory,
    Custom(Arc<str>),
    Group(Arc<GroupName>),
}

/// The parts of a placement group's resource name.
#[derive(Debug)]
pub struct GroupName {
    text: String,
    /// What is reserved, such as `CPU`.
    pub base: ResourceName,
    /// Whose it is.
    pub placement_group: PlacementGroupId,
    /// In which bundle; none means all of the group's bundles on the node together.
    pub bundle_index: Option<u32>,
}

impl ResourceName {
    /// CPUs.
    pub const CPU: Self = Self(Name::Cpu);
    /// GPUs.
    pub const GPU: Self = Self(Name::Gpu);
    /// Bytes of heap memory.
    pub const MEMORY: Self = Self(Name::Memory);
    /// Bytes of the object store.
    pub const OBJECT_STORE_MEMORY: Self = Self(Name::ObjectStoreMemory);

    /// The name with this text; texts of placement groups are taken apart.
    pub fn new(text: &str) -> Self {
        match text {
            "CPU" => Self::CPU,
            "GPU" => Self::GPU,
            "memory" => Self::MEMORY,
            "object_store_memory" => Self::OBJECT_STORE_MEMORY,
            _ => match GroupName::parse(text) {
                Some(group) => Self(Name::Group(Arc::new(group))),
                None => Self(Name::Custom(Arc::from(text))),
            },
        }
    }

    /// The name of this resource in one bundle of a placement group, or (no index) in all of them on a node.
    pub fn in_group(&self, placement_group: PlacementGroupId, bundle_index: Option<u32>) -> Self {
        let text = match bundle_index {
            Some(index) => format!("{self}_group_{index}_{placement_group}"),
            None => format!("{self}_group_{placement_group}"),
        };
        Self(Name::Group(Arc::new(GroupName {
            text,
            base: self.clone(),
            placement_group,
            bundle_index,
        })))
    }

    /// The name as people write it.
    pub fn as_str(&self) -> &str {
        match &self.0 {
            Name::Cpu => "CPU",
            Name::Gpu => "GPU",
            Name::Memory => "memory",
            Name::ObjectStoreMemory => "object_store_memory",
            Name::Custom(text) => text,
            Name::Group(group) => &group.text,
        }
    }

    /// Its parts, where it is a placement group's.
    pub fn group(&self) -> Option<&GroupName> {
        match &self.0 {
            Name::Group(group) => Some(group),
            _ => None,
        }
    }

    /// Whether it is `CPU` itself.
    pub fn is_cpu(&self) -> bool {
        matches!(self.0, Name::Cpu)
    }

    fn rank(&self) -> u8 {
        match self.0 {
            Name::Cpu => 0,
            Name::Gpu => 1,
            Name::Memory => 2,
            Name::ObjectStoreMemory => 3,
            Name::Custom(_) | Name::Group(_) => 4,
        }
    }
}

impl GroupName {
    fn parse(text: &str) -> Option<Self> {
        let (base, rest) = text.rsplit_once("_group_")?;
        let (bundle_index, hex) = match rest.split_once('_') {
            Some((index, hex)) => (Some(index), hex),
            None => (None, rest),
        };
        let placement_group = PlacementGroupId::from_hex(hex).ok()?;
        let bundle_index = match bundle_index {
            Some(digits) => Some(digits.parse::<u32>().ok().filter(|index| index.to_string() == digits)?),
            None => None,
        };
        if base.is_empty() || placement_group.hex() != hex {
            return None;
        }
        let base = ResourceName::new(base);
        Some(Self {
            text: text.to_string(),
            base,
            placement_group,
            bundle_index,
        })
    }
}

impl PartialEq for ResourceName {
    fn eq(&self, other: &Self) -> bool {
        self.cmp(other) == Ordering::Equal
    }
}

impl Eq for ResourceName {}

impl PartialOrd for ResourceName {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl Ord for ResourceName {
    fn cmp(&self, other: &Self) -> Ordering {
        match (&self.0, &other.0) {
            (Name::Custom(a), Name::Custom(b)) if Arc::ptr_eq(a, b) => Ordering::Equal,
            (Name::Group(a), Name::Group(b)) if Arc::ptr_eq(a, b) => Ordering::Equal,
            _ => match (self.rank(), other.rank()) {
                (4, 4) => self.as_str().cmp(other.as_str()),
                (a, b) => a.cmp(&b),
            },
        }
    }
}

impl Hash for ResourceName {
    fn hash<H: Hasher>(&self, state: &mut H) {
        let rank = self.rank();
        state.write_u8(rank);
        if rank == 4 {
            self.as_str().hash(state);
        }
    }
}

impl Default for ResourceName {
    fn default() -> Self {
        Self::CPU
    }
}

impl fmt::Display for ResourceName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

impl fmt::Debug for ResourceName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// The resources that come in numbered devices, of which an amount above 1 must be whole.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct UnitResources(Vec<ResourceName>);

impl Default for UnitResources {
    /// GPUs and the accelerators whose visible devices are set for each lease.
    fn default() -> Self {
        Self::with(&["TPU", "NPU", "HPU", "neuron_cores"])
    }
}

impl UnitResources {
    /// GPUs and these names.
    pub fn with(names: &[&str]) -> Self {
        let custom = names
            .iter()
            .map(|name| ResourceName::new(name))
            .filter(|name| *name != ResourceName::GPU);
        Self(std::iter::once(ResourceName::GPU).chain(custom).collect())
    }

    /// Whether `name` comes in devices.
    pub fn contains(&self, name: &ResourceName) -> bool {
        self.0.contains(name)
    }
}

/// Amounts by resource name.
#[derive(Clone, Default)]
pub struct ResourceSet {
    entries: InlineVec<(ResourceName, Quantity), 3>,
}

impl ResourceSet {
    /// The set that asks for nothing.
    pub fn new() -> Self {
        Self::default()
    }

    /// `cpus` CPUs and nothing else.
    pub fn cpus(cpus: u32) -> Self {
        Self::new().with(ResourceName::CPU, Quantity::from_int(cpus))
    }

    /// What a user wrote, checked; amounts of 0 are left out.
    pub fn from_user<'a>(
        amounts: impl IntoIterator<Item = (&'a str, f64)>,
        units: &UnitResources,
    ) -> Result<Self, SchedError> {
        let mut seen: Vec<ResourceName> = Vec::new();
        let mut set = Self::new();
        for (text, value) in amounts {
            if text.is_empty() {
                return Err(SchedError::EmptyName);
            }
            let name = ResourceName::new(text);
            if name.group().is_some() || text == BUNDLE_MARKER {
                return Err(SchedError::ReservedName { name: text.to_string() });
            }
            if seen.contains(&name) {
                return Err(SchedError::RepeatedName { name: text.to_string() });
            }
            let quantity = Quantity::from_f64(text, value)?;
            if units.contains(&name) && quantity > Quantity::ONE && !quantity.is_whole() {
                return Err(SchedError::FractionalUnits {
                    resource: text.to_string(),
                    value,
                });
            }
            set.set(name.clone(), quantity);
            seen.push(name);
        }
        Ok(set)
    }

    /// What a message carried: pairs of name and ten-thousandths, where what is not above zero is left out.
    pub fn from_raw<'a>(amounts: impl IntoIterator<Item = (&'a str, i64)>) -> Self {
        amounts
            .into_iter()
            .map(|(name, raw)| (ResourceName::new(name), Quantity::from_raw(raw)))
            .collect()
    }

    /// This set with `name` at `quantity`.
    pub fn with(mut self, name: ResourceName, quantity: Quantity) -> Self {
        self.set(name, quantity);
        self
    }

    /// The amount of `name`, zero where it is absent.
    pub fn get(&self, name: &ResourceName) -> Quantity {
        self.find(name).map_or(Quantity::ZERO, |at| self.entries[at].1)
    }

    /// Puts `name` at `quantity`; zero or less removes it.
    pub fn set(&mut self, name: ResourceName, quantity: Quantity) {
        match (self.find(&name), quantity > Quantity::ZERO) {
            (Ok(at), true) => self.entries[at].1 = quantity,
            (Ok(at), false) => drop(self.entries.remove(at)),
            (Err(at), true) => self.entries.insert(at, (name, quantity)),
            (Err(_), false) => {}
        }
    }

    /// Adds to the amount of `name`.
    pub fn add(&mut self, name: &ResourceName, quantity: Quantity) {
        self.set(name.clone(), self.get(name) + quantity);
    }

    /// Adds every amount of `other`.
    pub fn add_all(&mut self, other: &Self) {
        for (name, quantity) in other.iter() {
            self.add(name, quantity);
        }
    }

    /// Takes `other` away if all of it is there; says whether it was.
    pub fn checked_sub(&mut self, other: &Self) -> bool {
        if !self.covers(other) {
            return false;
        }
        for (name, quantity) in other.iter() {
            self.set(name.clone(), self.get(name) - quantity);
        }
        true
    }

    /// Whether there is at least as much of everything as in `demand`.
    pub fn covers(&self, demand: &Self) -> bool {
        // Both are sorted, so one pass over both is enough.
        let mut have = self.entries.iter();
        demand.iter().all(|(name, wanted)| {
            have.by_ref()
                .find(|(held, _)| held >= name)
                .is_some_and(|(held, amount)| held == name && *amount >= wanted)
        })
    }

    /// The amounts in the order of their names.
    pub fn iter(&self) -> impl Iterator<Item = (&ResourceName, Quantity)> + '_ {
        self.entries.iter().map(|(name, quantity)| (name, *quantity))
    }

    /// How many names it has.
    pub fn len(&self) -> usize {
        self.entries.len()
    }

    /// Whether it asks for nothing.
    pub fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    /// The placement group whose resources it asks for, if any.
    pub fn placement_group(&self) -> Option<PlacementGroupId> {
        self.iter()
            .find_map(|(name, _)| name.group())
            .map(|group| group.placement_group)
    }

    fn find(&self, name: &ResourceName) -> Result<usize, usize> {
        self.entries.binary_search_by(|(held, _)| held.cmp(name))
    }

    /// Checks invariant 1.
    pub fn validate(&self) -> Result<(), SchedError> {
        let sorted = self.entries.windows(2).all(|pair| pair[0].0 < pair[1].0);
        if sorted && self.iter().all(|(_, quantity)| quantity > Quantity::ZERO) {
            return Ok(());
        }
        Err(SchedError::Inconsistent(format!(
            "{self:?} is not a sorted set of amounts above 0"
        )))
    }
}

impl FromIterator<(ResourceName, Quantity)> for ResourceSet {
    fn from_iter<I: IntoIterator<Item = (ResourceName, Quantity)>>(amounts: I) -> Self {
        let mut set = Self::new();
        for (name, quantity) in amounts {
            set.set(name, quantity);
        }
        set
    }
}

impl PartialEq for ResourceSet {
    fn eq(&self, other: &Self) -> bool {
        self.entries[..] == other.entries[..]
    }
}

impl Eq for ResourceSet {}

impl Hash for ResourceSet {
    fn hash<H: Hasher>(&self, state: &mut H) {
        self.entries[..].hash(state);
    }
}

impl fmt::Display for ResourceSet {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("{")?;
        for (at, (name, quantity)) in self.iter().enumerate() {
            write!(f, "{}{name}: {quantity}", if at == 0 { "" } else { ", " })?;
        }
        f.write_str("}")
    }
}

impl fmt::Debug for ResourceSet {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{self}")
    }
}

/// What a node shows once it has committed this bundle: each resource under its two group names, and the marker.
pub fn bundle_resources(bundle: &ResourceSet, placement_group: PlacementGroupId, bundle_index: u32) -> ResourceSet {
    let marker = (&ResourceName::new(BUNDLE_MARKER), BUNDLE_MARKER_TOTAL);
    in_group(bundle.iter().chain([marker]), placement_group, Some(bundle_index))
}

/// The demand inside a placement group: in bundle `bundle_index`, or (-1 is none) in any of its bundles.
pub fn demand_in_group(
    demand: &ResourceSet,
    placement_group: PlacementGroupId,
    bundle_index: Option<u32>,
) -> ResourceSet {
    let marker = (&ResourceName::new(BUNDLE_MARKER), BUNDLE_MARKER_DEMAND);
    in_group(demand.iter().chain([marker]), placement_group, bundle_index)
}

fn in_group<'a>(
    amounts: impl Iterator<Item = (&'a ResourceName, Quantity)>,
    placement_group: PlacementGroupId,
    bundle_index: Option<u32>,
) -> ResourceSet {
    let mut set = ResourceSet::new();
    for (name, quantity) in amounts {
        set.set(name.in_group(placement_group, None), quantity);
        if bundle_index.is_some() {
            set.set(name.in_group(placement_group, bundle_index), quantity);
        }
    }
    set
}

#[cfg(test)]
mod tests {
    use super::*;

    fn group_id() -> PlacementGroupId {
        PlacementGroupId::from_array([0xab; 18])
    }

    #[test]
    fn names_are_what_programs_see() {
        let hex = "ab".repeat(18);
        assert_eq!(
            ResourceName::CPU.in_group(group_id(), Some(2)).as_str(),
            format!("CPU_group_2_{hex}")
        );
        assert_eq!(
            ResourceName::CPU.in_group(group_id(), None).as_str(),
            format!("CPU_group_{hex}")
        );
        let read = ResourceName::new(&format!("my_group_x_group_7_{hex}"));
        let group = read.group().unwrap();
        assert_eq!((group.base.as_str(), group.bundle_index), ("my_group_x", Some(7)));
        assert_eq!(read, ResourceName::new("my_group_x").in_group(group_id(), Some(7)));
        assert!(ResourceName::new("CPU_group_1").group().is_none());
        assert!(ResourceName::new(&format!("CPU_group_01_{hex}")).group().is_none());
    }

    #[test]
    fn a_demand_in_a_bundle_asks_under_both_names_and_for_the_marker() {
        let demand = demand_in_group(&ResourceSet::cpus(2), group_id(), Some(1));
        let at = |name: &str, index| {
            demand
                .get(&ResourceName::new(name).in_group(group_id(), index))
                .to_f64()
        };
        assert_eq!((at("CPU", Some(1)), at("CPU", None)), (2.0, 2.0));
        assert_eq!((at("bundle", Some(1)), at("bundle", None)), (0.001, 0.001));
        let any = demand_in_group(&ResourceSet::new(), group_id(), None);
        assert_eq!(any.len(), 1);
        assert_eq!(any.placement_group(), Some(group_id()));
        assert!(bundle_resources(&ResourceSet::cpus(2), group_id(), 1).covers(&demand));
    }

    #[test]
    fn what_users_write_is_checked() {
        let units = UnitResources::default();
        let read = |amounts: &[(&'static str, f64)]| ResourceSet::from_user(amounts.iter().copied(), &units);
        let set = read(&[("GPU", 0.5), ("CPU", 1.0), ("x", 0.0)]).unwrap();
        assert_eq!(set.to_string(), "{CPU: 1, GPU: 0.5}");
        let error = read(&[("GPU", 1.5)]).unwrap_err().to_string();
        assert_eq!(error, "GPU is 1.5, but an amount of GPU above 1 must be a whole number");
        assert!(matches!(read(&[("", 1.0)]), Err(SchedError::EmptyName)));
        assert!(matches!(
            read(&[("CPU", 1.0), ("CPU", 2.0)]),
            Err(SchedError::RepeatedName { .. })
        ));
        assert!(matches!(read(&[("bundle", 1.0)]), Err(SchedError::ReservedName { .. })));
        let reserved = format!("CPU_group_{}", group_id());
        assert!(ResourceSet::from_user([(reserved.as_str(), 1.0)], &units).is_err());
    }

    #[test]
    fn a_set_covers_what_is_less() {
        let big = ResourceSet::cpus(4)
            .with(ResourceName::GPU, Quantity::ONE)
            .with(ResourceName::new("a"), Quantity::ONE);
        assert!(big.covers(&ResourceSet::cpus(4)));
        assert!(big.covers(&ResourceSet::new().with(ResourceName::new("a"), Quantity::ONE)));
        assert!(!big.covers(&ResourceSet::cpus(5)));
        assert!(!big.covers(&ResourceSet::new().with(ResourceName::new("b"), Quantity::ONE)));
        assert!(!big.covers(&ResourceSet::new().with(ResourceName::MEMORY, Quantity::ONE)));
        let mut rest = big.clone();
        assert!(rest.checked_sub(&ResourceSet::cpus(4)));
        assert_eq!(rest.to_string(), "{GPU: 1, a: 1}");
        assert!(!rest.checked_sub(&ResourceSet::cpus(1)));
    }
}
