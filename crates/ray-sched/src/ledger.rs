//! The books of one pool of resources (a node, or one bundle on it): owns totals, what is free, booked debt, and the
//! devices of resources that come in units.
//!
//! It refuses nothing by itself beyond "that much is not free"; who may draw is decided by `NodeResources`.
//!
//! Invariants:
//! 1. Slots are sorted by name; 0 <= total; available <= total.
//! 2. Available is below zero only by exactly the booked debt, and a resource with devices has no debt.
//! 3. The devices' capacities sum to the total and their free shares to what is available; each device has
//!    0 <= free <= capacity <= 1.

use crate::error::SchedError;
use crate::quantity::Quantity;
use crate::resource_set::ResourceName;

/// One device and what of it is free.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Device {
    pub(crate) index: u32,
    pub(crate) capacity: Quantity,
    pub(crate) free: Quantity,
}

/// A share of one device.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct DeviceShare {
    pub(crate) index: u32,
    pub(crate) share: Quantity,
}

/// One resource's books.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Slot {
    pub(crate) name: ResourceName,
    pub(crate) total: Quantity,
    pub(crate) available: Quantity,
    pub(crate) debt: Quantity,
    pub(crate) devices: Option<Vec<Device>>,
}

impl Slot {
    pub(crate) fn plain(name: ResourceName, total: Quantity) -> Self {
        Self {
            name,
            total,
            available: total,
            debt: Quantity::ZERO,
            devices: None,
        }
    }

    pub(crate) fn with_devices(name: ResourceName, shares: impl IntoIterator<Item = DeviceShare>) -> Self {
        let devices: Vec<Device> = shares
            .into_iter()
            .map(|device| Device {
                index: device.index,
                capacity: device.share,
                free: device.share,
            })
            .collect();
        let total = devices.iter().map(|device| device.capacity).sum();
        Self {
            name,
            total,
            available: total,
            debt: Quantity::ZERO,
            devices: Some(devices),
        }
    }

    /// Takes away what is free at once; says whether it could.
    pub(crate) fn take(&mut self, quantity: Quantity) -> bool {
        let fits = quantity <= self.available;
        if fits {
            self.available -= quantity;
        }
        fits
    }

    /// Takes away though it may not be free, and books what is missing as debt.
    pub(crate) fn take_on_debt(&mut self, quantity: Quantity) {
        self.available -= quantity;
        if self.available.is_negative() {
            self.debt = -self.available;
        }
    }

    /// Puts back; debt is paid first.
    pub(crate) fn put_back(&mut self, quantity: Quantity) {
        self.available += quantity;
        if !self.debt.is_zero() {
            self.debt = (-self.available).at_least_zero();
        }
    }

    /// The device on which `share` fits most tightly and how much is free there: full shares are kept for those who
    /// need a whole device.
    pub(crate) fn tightest_device(&self, share: Quantity) -> Option<DeviceShare> {
        let devices = self.devices.as_ref()?.iter();
        let fitting = devices.filter(|device| device.free >= share);
        fitting
            .min_by_key(|device| (device.free, device.index))
            .map(|device| DeviceShare {
                index: device.index,
                share: device.free,
            })
    }

    /// The most that is free on any one device.
    pub(crate) fn largest_device_share(&self) -> Option<Quantity> {
        self.devices.as_ref()?.iter().map(|device| device.free).max()
    }

    /// Takes `share` of a device that `tightest_device` named.
    pub(crate) fn take_device(&mut self, index: u32, share: Quantity) {
        self.change_device(index, -share);
        self.available -= share;
    }

    /// Puts back the share of a device.
    pub(crate) fn put_back_device(&mut self, index: u32, share: Quantity) {
        self.change_device(index, share);
        self.available += share;
    }

    fn change_device(&mut self, index: u32, change: Quantity) {
        let device = self.devices.iter_mut().flatten().find(|device| device.index == index);
        debug_assert!(
            device.is_some(),
            "a share is only taken from and put back to a device of the same slot"
        );
        if let Some(device) = device {
            device.free += change;
        }
    }

    fn validate(&self) -> Result<(), SchedError> {
        let wrong = |what: &str| Err(SchedError::Inconsistent(format!("{what} in {self:?}")));
        if self.total.is_negative() || self.available > self.total {
            return wrong("available is above the total");
        }
        if self.debt.is_negative()
            || (self.available.is_negative() || !self.debt.is_zero()) && -self.available != self.debt
        {
            return wrong("available is below zero by other than the booked debt");
        }
        let Some(devices) = &self.devices else { return Ok(()) };
        if !self.debt.is_zero() {
            return wrong("a resource with devices has debt");
        }
        let sound = |device: &Device| {
            Quantity::ZERO <= device.free && device.free <= device.capacity && device.capacity <= Quantity::ONE
        };
        if !devices.iter().all(sound) || !devices.windows(2).all(|pair| pair[0].index < pair[1].index) {
            return wrong("a device is given out beyond its capacity or listed twice");
        }
        if devices.iter().map(|device| device.free).sum::<Quantity>() != self.available
            || devices.iter().map(|device| device.capacity).sum::<Quantity>() != self.total
        {
            return wrong("the devices do not sum to the slot");
        }
        Ok(())
    }
}

/// Slots by name.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Ledger {
    slots: Vec<Slot>,
}

impl Ledger {
    pub(crate) fn new(mut slots: Vec<Slot>) -> Self {
        slots.sort_by(|a, b| a.name.cmp(&b.name));
        Self { slots }
    }

    pub(crate) fn slots(&self) -> &[Slot] {
        &self.slots
    }

    pub(crate) fn slot(&self, name: &ResourceName) -> Option<&Slot> {
        self.slots
            .binary_search_by(|slot| slot.name.cmp(name))
            .ok()
            .map(|at| &self.slots[at])
    }

    pub(crate) fn slot_mut(&mut self, name: &ResourceName) -> Option<&mut Slot> {
        self.slots
            .binary_search_by(|slot| slot.name.cmp(name))
            .ok()
            .map(|at| &mut self.slots[at])
    }

    pub(crate) fn validate(&self) -> Result<(), SchedError> {
        if !self.slots.windows(2).all(|pair| pair[0].name < pair[1].name) {
            return Err(SchedError::Inconsistent(format!(
                "slots are not sorted: {:?}",
                self.slots
            )));
        }
        self.slots.iter().try_for_each(Slot::validate)
    }
}
