//! Reference counts of one process: owns, for every object this process owns or borrows, who counts on it.
//!
//! It refuses to free an object while anybody counts on it, and to count a borrower's message twice.
//!
//! Counts pass hand over hand: a sender keeps its own count until the owner has acknowledged the receiver's.
//! - A worker that keeps a reference it got as an argument lists it in its reply (`retained`); the caller has the owner
//!   note the worker (`relay_borrow`) before it drops the argument's count.
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

/// What the shell must do.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ReferenceCommand {
    /// The object's value is nobody's any more: drop it here and in the stores of these nodes.
    FreeValue { object: ObjectId, nodes: Vec<NodeId> },
    /// Tell the owner that `borrower` counts on the object; `borrower_added` is called with its answer.
    AddBorrower { owner: WorkerId, object: ObjectId, borrower: WorkerId, generation: u64 },
    /// Tell the owner that this process no longer counts on it.
    RemoveBorrower { owner: WorkerId, object: ObjectId, generation: u64 },
    /// Tell the worker that what the task's returns contain is counted.
    AcknowledgeReturns { worker: WorkerId, task: TaskId },
    /// This process wants to hear of that one's death.
    Watch { worker: WorkerId },
    /// The task's specification is not needed to make anything again.
    ReleaseLineage { object: ObjectId },
    /// The owner of this borrowed object is dead.
    OwnerDied { object: ObjectId },
}

/// What protects a borrowed reference until its owner knows of this process.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Cover {
    /// It came with the arguments of this running task: the caller counts until the reply.
    Task(TaskId),
    /// It came out of this object, which is held meanwhile.
    Outer(ObjectId),
    /// It came inside the returns of this task, which `worker` executed and holds.
    Return { task: TaskId, worker: WorkerId },
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Registration {
    /// Only the cover protects it; the owner does not know of this process.
    Covered,
    /// `AddBorrower` is under way.
    Pending,
    /// The owner counts this process.
    Registered,
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum Kind {
    Owned {
        /// Who borrows, with the generation of the borrow.
        borrowers: Vec<(WorkerId, u64)>,
        /// Generations that were released, some perhaps before they were added.
        released: Vec<(WorkerId, u64)>,
        locations: Vec<NodeId>,
        /// Retained specifications of tasks that have this object as an argument.
        lineage_count: u32,
        freed: bool,
    },
    Borrowed { owner: WorkerId, generation: u64, registration: Registration, owner_dead: bool },
}

/// One object's counts, and the shell's slot for its value.
#[derive(Debug, Clone)]
pub struct Entry<V> {
    /// The shell's value.
    pub value: V,
    local: u32,
    submitted: u32,
    contained: u32,
    holds: u32,
    /// References inside this object that it counts.
    contains: Vec<ObjectId>,
    kind: Kind,
}

impl<V> Entry<V> {
    fn counted(&self) -> bool {
        self.local > 0 || self.submitted > 0 || self.contained > 0 || self.holds > 0
    }

    /// Whether this process owns the object.
    pub fn is_owned(&self) -> bool {
        matches!(self.kind, Kind::Owned { .. })
    }

    /// The owner, for a borrowed object.
    pub fn borrowed_owner(&self) -> Option<WorkerId> {
        match self.kind {
            Kind::Borrowed { owner, .. } => Some(owner),
            Kind::Owned { .. } => None,
        }
    }

    /// Whether the owner of a borrowed object is known to be dead.
    pub fn owner_is_dead(&self) -> bool {
        matches!(self.kind, Kind::Borrowed { owner_dead: true, .. })
    }

    /// Nodes known to have a copy of an owned object.
    pub fn locations(&self) -> &[NodeId] {
        match &self.kind {
            Kind::Owned { locations, .. } => locations,
            Kind::Borrowed { .. } => &[],
        }
    }

    /// (local, submitted, contained, holds, borrowers), for `ray memory`.
    pub fn counts(&self) -> (u32, u32, u32, u32, usize) {
        let borrowers = match &self.kind {
            Kind::Owned { borrowers, .. } => borrowers.len(),
            Kind::Borrowed { .. } => 0,
        };
        (self.local, self.submitted, self.contained, self.holds, borrowers)
    }
}

#[derive(Debug, Default)]
struct ReturnAcknowledgement {
    worker: WorkerId,
    /// Registrations that must be acknowledged first.
    waiting: FxHashSet<ObjectId>,
    /// The reply has been read whole.
    complete: bool,
}

/// The counts of one process.
#[derive(Debug)]
pub struct ReferenceTable<V> {
    me: WorkerId,
    entries: FxHashMap<ObjectId, Entry<V>>,
    next_generation: u64,
    /// Borrower to what it borrows of ours.
    borrowed_by: FxHashMap<WorkerId, FxHashSet<ObjectId>>,
    /// Owner to what we borrow of it.
    owned_by: FxHashMap<WorkerId, FxHashSet<ObjectId>>,
    watched: FxHashSet<WorkerId>,
    /// What is held until our own registration of a borrowed object is acknowledged.
    held_until_registered: FxHashMap<ObjectId, Vec<ObjectId>>,
    /// What we hold until the owner has noted another borrower: (object, borrower, generation).
    relays: FxHashSet<(ObjectId, WorkerId, u64)>,
    /// Returns we executed whose contents the caller has not acknowledged: task to (caller, objects held).
    return_holds: FxHashMap<TaskId, (WorkerId, Vec<ObjectId>)>,
    /// Returns we received whose contents are being registered.
    return_acknowledgements: FxHashMap<TaskId, ReturnAcknowledgement>,
    /// References covered by a running task.
    covered: FxHashMap<TaskId, Vec<ObjectId>>,
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
        }
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
        self.entries.insert(
            object,
            Entry {
                value,
                local: 1,
                submitted: 0,
                contained: 0,
                holds: 0,
                contains: Vec::new(),
                kind: Kind::Owned {
                    borrowers: Vec::new(),
                    released: Vec::new(),
                    locations: Vec::new(),
                    lineage_count: 0,
                    freed: false,
                },
            },
        );
    }

    /// The owned object holds these references until it is freed. References not ours must be borrowed already.
    pub fn contain(&mut self, outer: ObjectId, inner: &[ObjectId]) {
        if !self.entries.contains_key(&outer) {
            return;
        }
        for object in inner {
            if let Some(entry) = self.entries.get_mut(object) {
                entry.contained += 1;
            }
        }
        if let Some(entry) = self.entries.get_mut(&outer) {
            entry.contains.extend_from_slice(inner);
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

    /// A reference arrived in this process; counts it once as local.
    pub fn borrow(&mut self, object: ObjectId, owner: WorkerId, cover: Cover, value: V, commands: &mut Vec<ReferenceCommand>) {
        if let Some(entry) = self.entries.get_mut(&object) {
            entry.local += 1;
            let needs_registration = match (&mut entry.kind, cover) {
                (Kind::Borrowed { registration, .. }, Cover::Outer(_) | Cover::Return { .. })
                    if *registration == Registration::Covered =>
                {
                    *registration = Registration::Pending;
                    true
                }
                _ => false,
            };
            if needs_registration {
                self.send_registration(object, commands);
            }
        } else {
            let generation = self.next_generation;
            self.next_generation += 1;
            let registration = match cover {
                Cover::Task(_) => Registration::Covered,
                _ => Registration::Pending,
            };
            self.entries.insert(
                object,
                Entry {
                    value,
                    local: 1,
                    submitted: 0,
                    contained: 0,
                    holds: 0,
                    contains: Vec::new(),
                    kind: Kind::Borrowed { owner, generation, registration, owner_dead: false },
                },
            );
            self.owned_by.entry(owner).or_default().insert(object);
            self.watch(owner, commands);
            if registration == Registration::Pending {
                self.send_registration(object, commands);
            }
        }
        self.protect(object, cover);
    }

    fn send_registration(&mut self, object: ObjectId, commands: &mut Vec<ReferenceCommand>) {
        if let Some(Entry { kind: Kind::Borrowed { owner, generation, .. }, .. }) = self.entries.get(&object) {
            commands.push(ReferenceCommand::AddBorrower { owner: *owner, object, borrower: self.me, generation: *generation });
        }
    }

    /// Notes what stands in for the owner's count meanwhile.
    fn protect(&mut self, object: ObjectId, cover: Cover) {
        let Some(Entry { kind: Kind::Borrowed { registration, .. }, .. }) = self.entries.get(&object) else { return };
        match (cover, *registration) {
            (Cover::Task(task), Registration::Covered) => self.covered.entry(task).or_default().push(object),
            (Cover::Outer(outer), Registration::Pending) => {
                if let Some(entry) = self.entries.get_mut(&outer) {
                    entry.holds += 1;
                    self.held_until_registered.entry(object).or_default().push(outer);
                }
            }
            (Cover::Return { task, worker }, Registration::Pending) => {
                let acknowledgement = self.return_acknowledgements.entry(task).or_default();
                acknowledgement.worker = worker;
                acknowledgement.waiting.insert(object);
            }
            _ => {}
        }
    }

    /// The owner answered `AddBorrower`. Returns false where the owner no longer knew the object.
    pub fn borrower_added(&mut self, object: ObjectId, borrower: WorkerId, generation: u64, commands: &mut Vec<ReferenceCommand>) {
        if borrower != self.me {
            if self.relays.remove(&(object, borrower, generation)) {
                self.release_hold(object, commands);
            }
            return;
        }
        if let Some(Entry { kind: Kind::Borrowed { generation: current, registration, .. }, .. }) = self.entries.get_mut(&object) {
            if *current == generation && *registration == Registration::Pending {
                *registration = Registration::Registered;
            }
        }
        self.registration_settled(object, commands);
    }

    /// Whoever stood in for a registration need not any more.
    fn registration_settled(&mut self, object: ObjectId, commands: &mut Vec<ReferenceCommand>) {
        for outer in self.held_until_registered.remove(&object).unwrap_or_default() {
            self.release_hold(outer, commands);
        }
        let mut done = Vec::new();
        for (task, acknowledgement) in &mut self.return_acknowledgements {
            if acknowledgement.waiting.remove(&object) && acknowledgement.waiting.is_empty() && acknowledgement.complete {
                done.push(*task);
            }
        }
        for task in done {
            if let Some(acknowledgement) = self.return_acknowledgements.remove(&task) {
                commands.push(ReferenceCommand::AcknowledgeReturns { worker: acknowledgement.worker, task });
            }
        }
    }

    /// A reply with `wants_acknowledgement` has been read whole, its contents borrowed.
    pub fn returns_read(&mut self, task: TaskId, worker: WorkerId, commands: &mut Vec<ReferenceCommand>) {
        match self.return_acknowledgements.get_mut(&task) {
            Some(acknowledgement) if !acknowledgement.waiting.is_empty() => acknowledgement.complete = true,
            _ => {
                self.return_acknowledgements.remove(&task);
                commands.push(ReferenceCommand::AcknowledgeReturns { worker, task });
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

    /// A reply says that `borrower` keeps the reference: have the owner note it, holding our own count until it has.
    pub fn relay_borrow(&mut self, object: ObjectId, borrower: WorkerId, generation: u64, commands: &mut Vec<ReferenceCommand>) {
        let Some(entry) = self.entries.get_mut(&object) else { return };
        match entry.kind {
            Kind::Owned { .. } => {
                self.add_borrower(object, borrower, generation, commands);
            }
            Kind::Borrowed { owner, .. } => {
                if self.relays.insert((object, borrower, generation)) {
                    entry.holds += 1;
                    commands.push(ReferenceCommand::AddBorrower { owner, object, borrower, generation });
                }
            }
        }
    }

    /// As owner: a process counts on the object. Returns whether the object is still there.
    pub fn add_borrower(&mut self, object: ObjectId, borrower: WorkerId, generation: u64, commands: &mut Vec<ReferenceCommand>) -> bool {
        if borrower == self.me {
            return self.entries.contains_key(&object);
        }
        let Some(Entry { kind: Kind::Owned { borrowers, released, freed, .. }, .. }) = self.entries.get_mut(&object) else {
            return false;
        };
        if *freed {
            return false;
        }
        if released.iter().any(|(who, until)| *who == borrower && generation <= *until) {
            return true;
        }
        match borrowers.iter_mut().find(|(who, _)| *who == borrower) {
            Some((_, current)) => *current = (*current).max(generation),
            None => borrowers.push((borrower, generation)),
        }
        self.borrowed_by.entry(borrower).or_default().insert(object);
        self.watch(borrower, commands);
        true
    }

    /// As owner: a process no longer counts on the object.
    pub fn remove_borrower(&mut self, object: ObjectId, borrower: WorkerId, generation: u64, commands: &mut Vec<ReferenceCommand>) {
        let Some(Entry { kind: Kind::Owned { borrowers, released, .. }, .. }) = self.entries.get_mut(&object) else { return };
        match released.iter_mut().find(|(who, _)| *who == borrower) {
            Some((_, until)) => *until = (*until).max(generation),
            None => released.push((borrower, generation)),
        }
        let before = borrowers.len();
        borrowers.retain(|(who, current)| *who != borrower || *current > generation);
        if borrowers.len() != before {
            if let Some(objects) = self.borrowed_by.get_mut(&borrower) {
                objects.remove(&object);
            }
            self.settle(object, commands);
        }
    }

    fn watch(&mut self, worker: WorkerId, commands: &mut Vec<ReferenceCommand>) {
        if worker != self.me && self.watched.insert(worker) {
            commands.push(ReferenceCommand::Watch { worker });
        }
    }

    /// As executing worker: the returns of `task` contain these; hold them until the caller acknowledges.
    pub fn hold_return(&mut self, task: TaskId, caller: WorkerId, objects: &[ObjectId], commands: &mut Vec<ReferenceCommand>) {
        let held = self.return_holds.entry(task).or_insert_with(|| (caller, Vec::new()));
        for object in objects {
            if let Some(entry) = self.entries.get_mut(object) {
                entry.holds += 1;
                held.1.push(*object);
            }
        }
        self.watch(caller, commands);
    }

    /// The caller acknowledged the task's returns.
    pub fn returns_acknowledged(&mut self, task: TaskId, commands: &mut Vec<ReferenceCommand>) {
        if let Some((_, objects)) = self.return_holds.remove(&task) {
            for object in objects {
                self.release_hold(object, commands);
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

    /// A task's execution ends here: which borrows that it covered are kept. They count as registered from now on,
    /// because the caller keeps its own count until the owner knows.
    pub fn end_of_cover(&mut self, task: TaskId) -> Vec<(ObjectId, WorkerId, u64)> {
        let mut retained = Vec::new();
        for object in self.covered.remove(&task).unwrap_or_default() {
            let Some(entry) = self.entries.get_mut(&object) else { continue };
            if let Kind::Borrowed { owner, generation, registration, .. } = &mut entry.kind {
                if *registration == Registration::Covered {
                    *registration = Registration::Registered;
                    retained.push((object, *owner, *generation));
                }
            }
        }
        retained
    }

    /// A node has a copy of an owned object. Returns false where the object is gone: free that copy.
    pub fn add_location(&mut self, object: &ObjectId, node: NodeId) -> bool {
        match self.entries.get_mut(object) {
            Some(Entry { kind: Kind::Owned { locations, freed: false, .. }, .. }) => {
                if !locations.contains(&node) {
                    locations.push(node);
                }
                true
            }
            _ => false,
        }
    }

    /// A node has no copy of an owned object (any more). Returns how many copies are left.
    pub fn remove_location(&mut self, object: &ObjectId, node: NodeId) -> usize {
        match self.entries.get_mut(object) {
            Some(Entry { kind: Kind::Owned { locations, .. }, .. }) => {
                locations.retain(|location| *location != node);
                locations.len()
            }
            _ => 0,
        }
    }

    /// A retained task specification has this object as an argument.
    pub fn add_lineage(&mut self, object: &ObjectId) {
        if let Some(Entry { kind: Kind::Owned { lineage_count, .. }, .. }) = self.entries.get_mut(object) {
            *lineage_count += 1;
        }
    }

    /// That specification was dropped.
    pub fn remove_lineage(&mut self, object: &ObjectId, commands: &mut Vec<ReferenceCommand>) {
        if let Some(Entry { kind: Kind::Owned { lineage_count, .. }, .. }) = self.entries.get_mut(object) {
            *lineage_count = lineage_count.saturating_sub(1);
            self.settle(*object, commands);
        }
    }

    /// Whether the value was freed while the entry stays for lineage.
    pub fn is_freed(&self, object: &ObjectId) -> bool {
        match self.entries.get(object) {
            Some(Entry { kind: Kind::Owned { freed, .. }, .. }) => *freed,
            Some(_) => false,
            None => true,
        }
    }

    /// Lineage makes a freed value again: it counts as live until it is settled next.
    pub fn revive(&mut self, object: &ObjectId) {
        if let Some(Entry { kind: Kind::Owned { freed, .. }, .. }) = self.entries.get_mut(object) {
            *freed = false;
        }
    }

    /// A process is dead: its borrows end, what it owned has no owner, what we held for it is let go.
    pub fn worker_died(&mut self, worker: WorkerId, commands: &mut Vec<ReferenceCommand>) {
        for object in self.borrowed_by.remove(&worker).unwrap_or_default() {
            self.remove_borrower(object, worker, u64::MAX, commands);
        }
        let tasks: Vec<TaskId> = self.return_holds.iter().filter(|(_, (caller, _))| *caller == worker).map(|(task, _)| *task).collect();
        for task in tasks {
            self.returns_acknowledged(task, commands);
        }
        self.return_acknowledgements.retain(|_, acknowledgement| acknowledgement.worker != worker);
        for object in self.owned_by.get(&worker).cloned().unwrap_or_default() {
            if let Some(Entry { kind: Kind::Borrowed { owner_dead, registration, .. }, .. }) = self.entries.get_mut(&object) {
                *owner_dead = true;
                *registration = Registration::Registered;
                commands.push(ReferenceCommand::OwnerDied { object });
            }
            // No answer will come of this owner: whoever waits for one is let go.
            self.registration_settled(object, commands);
            let relayed: Vec<_> = self.relays.iter().filter(|(of, _, _)| *of == object).copied().collect();
            for relay in relayed {
                self.relays.remove(&relay);
                self.release_hold(object, commands);
            }
        }
        self.watched.remove(&worker);
    }

    /// Frees the object if nobody counts on it.
    fn settle(&mut self, object: ObjectId, commands: &mut Vec<ReferenceCommand>) {
        let Some(entry) = self.entries.get_mut(&object) else { return };
        if entry.counted() {
            return;
        }
        match &mut entry.kind {
            Kind::Owned { borrowers, locations, lineage_count, freed, .. } => {
                if !borrowers.is_empty() {
                    return;
                }
                if !*freed {
                    *freed = true;
                    commands.push(ReferenceCommand::FreeValue { object, nodes: std::mem::take(locations) });
                }
                let drop_entry = *lineage_count == 0;
                let inner = std::mem::take(&mut entry.contains);
                if drop_entry {
                    self.entries.remove(&object);
                    commands.push(ReferenceCommand::ReleaseLineage { object });
                }
                for contained in inner {
                    if let Some(entry) = self.entries.get_mut(&contained) {
                        entry.contained = entry.contained.saturating_sub(1);
                        self.settle(contained, commands);
                    }
                }
            }
            Kind::Borrowed { owner, generation, registration, owner_dead } => {
                let (owner, generation, registration, owner_dead) = (*owner, *generation, *registration, *owner_dead);
                // The end may be told before the beginning was acknowledged: the owner orders them by generation.
                self.entries.remove(&object);
                if let Some(objects) = self.owned_by.get_mut(&owner) {
                    objects.remove(&object);
                    if objects.is_empty() {
                        self.owned_by.remove(&owner);
                    }
                }
                self.registration_settled(object, commands);
                if !owner_dead && registration != Registration::Covered {
                    commands.push(ReferenceCommand::RemoveBorrower { owner, object, generation });
                }
                commands.push(ReferenceCommand::FreeValue { object, nodes: Vec::new() });
            }
        }
    }

    /// Checks the invariants; for tests and the simulator.
    pub fn validate(&self) -> Result<(), String> {
        let mut contained: FxHashMap<ObjectId, u32> = FxHashMap::default();
        for entry in self.entries.values() {
            for inner in &entry.contains {
                *contained.entry(*inner).or_default() += 1;
            }
        }
        for (object, entry) in &self.entries {
            let expected = contained.get(object).copied().unwrap_or(0);
            if entry.contained != expected {
                return Err(format!("{object:?} is contained {} times and {expected} objects contain it", entry.contained));
            }
            match &entry.kind {
                Kind::Owned { borrowers, lineage_count, freed, .. } => {
                    let live = entry.counted() || !borrowers.is_empty();
                    if !live && !(*freed && *lineage_count > 0) {
                        return Err(format!("{object:?} is owned, uncounted, and was not freed"));
                    }
                    for (borrower, _) in borrowers {
                        if !self.borrowed_by.get(borrower).is_some_and(|objects| objects.contains(object)) {
                            return Err(format!("{object:?}: borrower {borrower:?} is not indexed"));
                        }
                    }
                }
                Kind::Borrowed { owner, .. } => {
                    if !entry.counted() {
                        return Err(format!("{object:?} is borrowed and uncounted"));
                    }
                    if !self.owned_by.get(owner).is_some_and(|objects| objects.contains(object)) {
                        return Err(format!("{object:?}: owner {owner:?} is not indexed"));
                    }
                }
            }
        }
        for (object, ..) in &self.relays {
            if !self.entries.contains_key(object) {
                return Err(format!("a relay holds {object:?}, which is not counted"));
            }
        }
        Ok(())
    }
}
