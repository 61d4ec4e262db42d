//! Reference counts of one process: owns, for every object this process owns or borrows, who counts on it.
//!
//! It refuses to free an object while anybody counts on it, and to count a borrower's message twice.
//!
//! Counts pass hand over hand: a sender keeps its own count until the owner has acknowledged the receiver's.
//! - A worker that keeps a reference it got as an argument lists it in its reply (`retained`); the caller has the owner
//!   note the worker (`relay_borrow`) before it drops the argument's count.
//!   Should the caller die before that, the worker tells the owner itself (`passed_by`).
//! - A reference found inside an object that was read (`Cover::Outer`) is registered with its owner at once, and the outer
//!   object is held until the owner has acknowledged.
//! - References inside a call's returns are held by the executing worker (`hold_return`) until the caller, having
//!   registered itself with each owner, acknowledges the task.
//!
//! Invariants:
//! 1. An owned object whose counts are all zero and that has no borrower is freed in the same step, once.
//! 2. A borrowed entry lives while any local count is positive; its end is told to the owner iff the owner may know
//!    of it.
//! 3. A message about (borrower, generation) that is not newer than one that was released changes nothing.
//! 4. Contained references are counted once for each live outer object that this process owns.

use ray_ids::{NodeId, ObjectId, TaskId, WorkerId};
use rustc_hash::{FxHashMap, FxHashSet};

pub use crate::entry::{Cover, Entry, ReferenceCommand};
use crate::entry::{Kind, Owned, Registration};

#[derive(Debug, Default)]
pub(crate) struct ReturnAcknowledgement {
    pub(crate) worker: WorkerId,
    /// Registrations that must be acknowledged first.
    pub(crate) waiting: FxHashSet<ObjectId>,
    /// The reply has been read whole.
    pub(crate) complete: bool,
}

/// What one caller passed to calls here that is kept.
#[derive(Debug, Default)]
pub(crate) struct Passed {
    /// Objects with the generation of their borrow; some may be over.
    pub(crate) borrows: Vec<(ObjectId, u64)>,
    /// How many were left when those that are over were dropped last.
    pub(crate) kept: usize,
}

/// The counts of one process.
#[derive(Debug)]
pub struct ReferenceTable<V> {
    pub(crate) me: WorkerId,
    pub(crate) entries: FxHashMap<ObjectId, Entry<V>>,
    pub(crate) next_generation: u64,
    /// Borrower to what it borrows of ours.
    pub(crate) borrowed_by: FxHashMap<WorkerId, FxHashSet<ObjectId>>,
    /// Owner to what we borrow of it.
    pub(crate) owned_by: FxHashMap<WorkerId, FxHashSet<ObjectId>>,
    pub(crate) watched: FxHashSet<WorkerId>,
    /// What is held until our own registration of a borrowed object is acknowledged.
    pub(crate) held_until_registered: FxHashMap<ObjectId, Vec<ObjectId>>,
    /// What we hold until the owner has noted another borrower: (object, borrower, generation).
    pub(crate) relays: FxHashSet<(ObjectId, WorkerId, u64)>,
    /// Returns we executed whose contents the caller has not acknowledged: task to (caller, objects held).
    pub(crate) return_holds: FxHashMap<TaskId, (WorkerId, Vec<ObjectId>)>,
    /// Returns we received whose contents are being registered.
    pub(crate) return_acknowledgements: FxHashMap<TaskId, ReturnAcknowledgement>,
    /// References covered by a running task.
    pub(crate) covered: FxHashMap<TaskId, Vec<ObjectId>>,
    /// How often an object stands in `covered`: while another running task covers it, its end need not list it.
    pub(crate) cover_counts: FxHashMap<ObjectId, u32>,
    /// Caller to what it passed to calls here that is kept, by object and generation: it relays that, unless it dies.
    pub(crate) passed: FxHashMap<WorkerId, Passed>,
}

impl<V: Default> ReferenceTable<V> {
    /// An empty table of process `me`.
    pub fn new(me: WorkerId) -> Self {
        Self {
            me,
            entries: FxHashMap::default(),
            next_generation: 1,
            borrowed_by: FxHashMap::default(),
            owned_by: FxHashMap::default(),
            watched: FxHashSet::default(),
            held_until_registered: FxHashMap::default(),
            relays: FxHashSet::default(),
            return_holds: FxHashMap::default(),
            return_acknowledgements: FxHashMap::default(),
            covered: FxHashMap::default(),
            cover_counts: FxHashMap::default(),
            passed: FxHashMap::default(),
        }
    }

    /// The process whose counts these are.
    pub fn me(&self) -> WorkerId {
        self.me
    }

    /// Whether nothing is counted, held, covered or awaited any more.
    pub fn is_quiet(&self) -> bool {
        self.entries.is_empty()
            && self.held_until_registered.is_empty()
            && self.relays.is_empty()
            && self.return_holds.is_empty()
            && self.return_acknowledgements.is_empty()
            && self.covered.is_empty()
            && self.cover_counts.is_empty()
            && self.borrowed_by.is_empty()
            && self.owned_by.is_empty()
    }

    /// The entry of an object, if this process counts on it.
    pub fn get(&self, object: &ObjectId) -> Option<&Entry<V>> {
        self.entries.get(object)
    }

    /// The entry of an object, for its value.
    pub fn get_mut(&mut self, object: &ObjectId) -> Option<&mut Entry<V>> {
        self.entries.get_mut(object)
    }

    /// Every entry.
    pub fn iter(&self) -> impl Iterator<Item = (&ObjectId, &Entry<V>)> {
        self.entries.iter()
    }

    /// How many objects are counted.
    pub fn len(&self) -> usize {
        self.entries.len()
    }

    /// Whether nothing is counted.
    pub fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    /// A new object of ours (a put, or a return of a task being submitted), with one local count.
    pub fn own(&mut self, object: ObjectId, value: V) {
        self.entries
            .insert(object, Entry::new(value, Kind::Owned(Owned::default())));
    }

    /// The owned object holds these references until it is freed. References not ours must be borrowed already; one that
    /// is not counted here is left out.
    pub fn contain(&mut self, outer: ObjectId, inner: &[ObjectId]) {
        if inner.is_empty() || !self.entries.get(&outer).is_some_and(Entry::is_owned) {
            return;
        }
        let mut counted = Vec::with_capacity(inner.len());
        for object in inner {
            if let Some(entry) = self.entries.get_mut(object) {
                entry.contained += 1;
                counted.push(*object);
            }
        }
        if let Some(owned) = self.entries.get_mut(&outer).and_then(Entry::owned_mut) {
            let contains = &mut owned.details_mut().contains;
            contains.reserve_exact(counted.len());
            contains.extend_from_slice(&counted);
        }
    }

    /// One more language-level reference. Returns whether the object is counted here at all.
    pub fn add_local(&mut self, object: &ObjectId) -> bool {
        match self.entries.get_mut(object) {
            Some(entry) => {
                entry.local += 1;
                true
            }
            None => false,
        }
    }

    /// One language-level reference fewer.
    pub fn remove_local(&mut self, object: &ObjectId, commands: &mut Vec<ReferenceCommand>) {
        if let Some(entry) = self.entries.get_mut(object) {
            entry.local = entry.local.saturating_sub(1);
            if entry.local == 0 {
                self.settle(*object, commands);
            }
        }
    }

    /// A running task counts on the object as an argument.
    pub fn add_submitted(&mut self, object: &ObjectId) {
        if let Some(entry) = self.entries.get_mut(object) {
            entry.submitted += 1;
        }
    }

    /// It ended. Borrows that its reply listed must have been relayed before.
    pub fn remove_submitted(&mut self, object: &ObjectId, commands: &mut Vec<ReferenceCommand>) {
        if let Some(entry) = self.entries.get_mut(object) {
            entry.submitted = entry.submitted.saturating_sub(1);
            if entry.submitted == 0 {
                self.settle(*object, commands);
            }
        }
    }

    /// One hold more, for a wait or a transfer of the shell's own; `release_hold` ends it.
    pub fn hold(&mut self, object: &ObjectId) -> bool {
        match self.entries.get_mut(object) {
            Some(entry) => {
                entry.holds += 1;
                true
            }
            None => false,
        }
    }

    /// One hold fewer.
    pub fn release_hold(&mut self, object: ObjectId, commands: &mut Vec<ReferenceCommand>) {
        if let Some(entry) = self.entries.get_mut(&object) {
            entry.holds = entry.holds.saturating_sub(1);
            self.settle(object, commands);
        }
    }

    /// A node has a copy of an owned object. Returns false where the object is gone: free that copy.
    pub fn add_location(&mut self, object: &ObjectId, node: NodeId) -> bool {
        match self.entries.get_mut(object).and_then(Entry::owned_mut) {
            Some(owned) if !owned.freed => {
                let locations = &mut owned.details_mut().locations;
                if !locations.contains(&node) {
                    // Most objects have one copy for ever.
                    locations.reserve_exact(1);
                    locations.push(node);
                }
                true
            }
            _ => false,
        }
    }

    /// A node has no copy of an owned object (any more). Returns how many copies are left.
    pub fn remove_location(&mut self, object: &ObjectId, node: NodeId) -> usize {
        let owned = self.entries.get_mut(object).and_then(Entry::owned_mut);
        owned.and_then(|owned| owned.details.as_mut()).map_or(0, |details| {
            details.locations.retain(|location| *location != node);
            details.locations.len()
        })
    }

    /// A retained task specification has this object as an argument.
    pub fn add_lineage(&mut self, object: &ObjectId) {
        if let Some(owned) = self.entries.get_mut(object).and_then(Entry::owned_mut) {
            owned.lineage_count += 1;
        }
    }

    /// That specification was dropped.
    pub fn remove_lineage(&mut self, object: &ObjectId, commands: &mut Vec<ReferenceCommand>) {
        if let Some(owned) = self.entries.get_mut(object).and_then(Entry::owned_mut) {
            owned.lineage_count = owned.lineage_count.saturating_sub(1);
            self.settle(*object, commands);
        }
    }

    /// Whether the value was freed while the entry stays for lineage.
    pub fn is_freed(&self, object: &ObjectId) -> bool {
        self.entries
            .get(object)
            .is_none_or(|entry| entry.owned().is_some_and(|owned| owned.freed))
    }

    /// Lineage makes a freed value again: it counts as live until it is settled next.
    pub fn revive(&mut self, object: &ObjectId) {
        if let Some(owned) = self.entries.get_mut(object).and_then(Entry::owned_mut) {
            owned.freed = false;
        }
    }

    /// Frees the object if nobody counts on it, and then what it contained. Without recursion, because programs build
    /// chains of references longer than any stack.
    pub(crate) fn settle(&mut self, object: ObjectId, commands: &mut Vec<ReferenceCommand>) {
        let mut due = Vec::new();
        self.settle_one(object, &mut due, commands);
        while let Some(next) = due.pop() {
            self.settle_one(next, &mut due, commands);
        }
    }

    pub(crate) fn settle_one(
        &mut self,
        object: ObjectId,
        due: &mut Vec<ObjectId>,
        commands: &mut Vec<ReferenceCommand>,
    ) {
        let Some(entry) = self.entries.get_mut(&object) else {
            return;
        };
        if entry.counted() {
            return;
        }
        match &mut entry.kind {
            Kind::Owned(owned) => {
                if !owned.borrowers().is_empty() {
                    return;
                }
                let mut details = owned.details.take();
                if !owned.freed {
                    owned.freed = true;
                    commands.push(ReferenceCommand::FreeValue {
                        object,
                        nodes: details
                            .as_mut()
                            .map(|details| std::mem::take(&mut details.locations))
                            .unwrap_or_default(),
                    });
                }
                let inner = details
                    .as_mut()
                    .map(|details| std::mem::take(&mut details.contains))
                    .unwrap_or_default();
                if owned.lineage_count == 0 {
                    self.entries.remove(&object);
                    commands.push(ReferenceCommand::ReleaseLineage { object });
                } else {
                    owned.details = details;
                }
                for contained in inner {
                    if let Some(entry) = self.entries.get_mut(&contained) {
                        entry.contained = entry.contained.saturating_sub(1);
                        due.push(contained);
                    }
                }
            }
            Kind::Borrowed(borrowed) => {
                let (owner, generation, registration, owner_dead) = (
                    borrowed.owner,
                    borrowed.generation,
                    borrowed.registration,
                    borrowed.owner_dead,
                );
                // The end may be told before the beginning was acknowledged: the owner orders them by generation.
                self.entries.remove(&object);
                if let Some(objects) = self.owned_by.get_mut(&owner) {
                    objects.remove(&object);
                    if objects.is_empty() {
                        self.owned_by.remove(&owner);
                    }
                }
                // Nothing stands in for this registration any more.
                for outer in self.held_until_registered.remove(&object).unwrap_or_default() {
                    if let Some(entry) = self.entries.get_mut(&outer) {
                        entry.holds = entry.holds.saturating_sub(1);
                        due.push(outer);
                    }
                }
                self.return_registration_settled(object, commands);
                if !owner_dead && registration != Registration::Covered {
                    commands.push(ReferenceCommand::RemoveBorrower {
                        owner,
                        object,
                        generation,
                    });
                }
                commands.push(ReferenceCommand::FreeValue {
                    object,
                    nodes: Vec::new(),
                });
            }
        }
    }
}
