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

pub use crate::entry::{Cover, Entry, ReferenceCommand};
use crate::entry::{Kind, Registration};

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
    /// How often an object stands in `covered`: while another running task covers it, its end need not list it.
    cover_counts: FxHashMap<ObjectId, u32>,
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

    /// Whether an `AddBorrower` of this process for the object is unanswered: a constructor's end is told only after that.
    pub fn is_registering(&self, object: &ObjectId) -> bool {
        matches!(
            self.entries.get(object),
            Some(Entry {
                kind: Kind::Borrowed {
                    registration: Registration::Pending,
                    ..
                },
                ..
            })
        )
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

    /// The owned object holds these references until it is freed. References not ours must be borrowed already; one that
    /// is not counted here is left out.
    pub fn contain(&mut self, outer: ObjectId, inner: &[ObjectId]) {
        if !self.entries.contains_key(&outer) {
            return;
        }
        let mut counted = Vec::with_capacity(inner.len());
        for object in inner {
            if let Some(entry) = self.entries.get_mut(object) {
                entry.contained += 1;
                counted.push(*object);
            }
        }
        if let Some(entry) = self.entries.get_mut(&outer) {
            entry.contains.extend_from_slice(&counted);
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
    ///
    /// What a process sends itself (an actor that calls its own method) is not borrowed: use `add_local`, because the
    /// caller whose count would be the cover is this very process.
    pub fn borrow(
        &mut self,
        object: ObjectId,
        owner: WorkerId,
        cover: Cover,
        value: V,
        commands: &mut Vec<ReferenceCommand>,
    ) {
        // An object of our own that contains the reference counts it in this very table: it adds no protection, and what
        // protects the reference so far must go on doing so.
        let own_outer = matches!(cover, Cover::Outer(outer) if self.entries.get(&outer).is_some_and(Entry::is_owned));
        if own_outer && self.add_local(&object) {
            return;
        }
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
            // An object of ours that is not counted here was freed: nobody can be asked for it any more.
            let lost = owner == self.me;
            let registration = match cover {
                _ if lost => Registration::Registered,
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
                    kind: Kind::Borrowed {
                        owner,
                        generation,
                        registration,
                        owner_dead: lost,
                    },
                },
            );
            self.owned_by.entry(owner).or_default().insert(object);
            self.watch(owner, commands);
            if lost {
                commands.push(ReferenceCommand::OwnerDied { object });
            }
            if registration == Registration::Pending {
                self.send_registration(object, commands);
            }
        }
        self.protect(object, cover);
    }

    fn send_registration(&mut self, object: ObjectId, commands: &mut Vec<ReferenceCommand>) {
        if let Some(Entry {
            kind: Kind::Borrowed { owner, generation, .. },
            ..
        }) = self.entries.get(&object)
        {
            commands.push(ReferenceCommand::AddBorrower {
                owner: *owner,
                object,
                borrower: self.me,
                generation: *generation,
            });
        }
    }

    /// Notes what stands in for the owner's count meanwhile.
    fn protect(&mut self, object: ObjectId, cover: Cover) {
        let Some(Entry {
            kind: Kind::Borrowed { registration, .. },
            ..
        }) = self.entries.get(&object)
        else {
            return;
        };
        match (cover, *registration) {
            (Cover::Task(task), Registration::Covered) => {
                self.covered.entry(task).or_default().push(object);
                *self.cover_counts.entry(object).or_default() += 1;
            }
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

    /// The owner answered `AddBorrower`. An answer to a borrow that is over changes nothing: the reference may have come
    /// again since, under another generation, whose own answer is still to come.
    pub fn borrower_added(
        &mut self,
        object: ObjectId,
        borrower: WorkerId,
        generation: u64,
        commands: &mut Vec<ReferenceCommand>,
    ) {
        if borrower != self.me {
            if self.relays.remove(&(object, borrower, generation)) {
                self.release_hold(object, commands);
            }
            return;
        }
        if let Some(Entry {
            kind:
                Kind::Borrowed {
                    generation: current,
                    registration,
                    ..
                },
            ..
        }) = self.entries.get_mut(&object)
        {
            if *current == generation && *registration == Registration::Pending {
                *registration = Registration::Registered;
                self.registration_settled(object, commands);
            }
        }
    }

    /// Whoever stood in for a registration need not any more.
    fn registration_settled(&mut self, object: ObjectId, commands: &mut Vec<ReferenceCommand>) {
        for outer in self.held_until_registered.remove(&object).unwrap_or_default() {
            self.release_hold(outer, commands);
        }
        self.return_registration_settled(object, commands);
    }

    fn return_registration_settled(&mut self, object: ObjectId, commands: &mut Vec<ReferenceCommand>) {
        let mut done = Vec::new();
        for (task, acknowledgement) in &mut self.return_acknowledgements {
            if acknowledgement.waiting.remove(&object) && acknowledgement.waiting.is_empty() && acknowledgement.complete
            {
                done.push(*task);
            }
        }
        for task in done {
            if let Some(acknowledgement) = self.return_acknowledgements.remove(&task) {
                commands.push(ReferenceCommand::AcknowledgeReturns {
                    worker: acknowledgement.worker,
                    task,
                });
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
    pub fn relay_borrow(
        &mut self,
        object: ObjectId,
        borrower: WorkerId,
        generation: u64,
        commands: &mut Vec<ReferenceCommand>,
    ) {
        let Some(entry) = self.entries.get_mut(&object) else {
            return;
        };
        match entry.kind {
            Kind::Owned { .. } => {
                self.add_borrower(object, borrower, generation, commands);
            }
            // A dead owner would never answer, and what this process keeps of its own call it counts already.
            Kind::Borrowed { owner_dead: true, .. } => {}
            Kind::Borrowed { .. } if borrower == self.me => {}
            Kind::Borrowed { owner, .. } => {
                if self.relays.insert((object, borrower, generation)) {
                    entry.holds += 1;
                    commands.push(ReferenceCommand::AddBorrower {
                        owner,
                        object,
                        borrower,
                        generation,
                    });
                }
            }
        }
    }

    /// As owner: a process counts on the object. Returns whether the object is still there.
    pub fn add_borrower(
        &mut self,
        object: ObjectId,
        borrower: WorkerId,
        generation: u64,
        commands: &mut Vec<ReferenceCommand>,
    ) -> bool {
        if borrower == self.me {
            return self.entries.contains_key(&object);
        }
        let Some(Entry {
            kind:
                Kind::Owned {
                    borrowers,
                    released,
                    freed,
                    ..
                },
            ..
        }) = self.entries.get_mut(&object)
        else {
            return false;
        };
        if *freed {
            return false;
        }
        if released
            .iter()
            .any(|(who, until)| *who == borrower && generation <= *until)
        {
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
    pub fn remove_borrower(
        &mut self,
        object: ObjectId,
        borrower: WorkerId,
        generation: u64,
        commands: &mut Vec<ReferenceCommand>,
    ) {
        let Some(Entry {
            kind: Kind::Owned {
                borrowers, released, ..
            },
            ..
        }) = self.entries.get_mut(&object)
        else {
            return;
        };
        match released.iter_mut().find(|(who, _)| *who == borrower) {
            Some((_, until)) => *until = (*until).max(generation),
            None => released.push((borrower, generation)),
        }
        let before = borrowers.len();
        borrowers.retain(|(who, current)| *who != borrower || *current > generation);
        if borrowers.len() != before {
            if let Some(objects) = self.borrowed_by.get_mut(&borrower) {
                objects.remove(&object);
                if objects.is_empty() {
                    self.borrowed_by.remove(&borrower);
                }
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
    pub fn hold_return(
        &mut self,
        task: TaskId,
        caller: WorkerId,
        objects: &[ObjectId],
        commands: &mut Vec<ReferenceCommand>,
    ) {
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
    /// because the caller keeps its own count until the owner knows. What another running task covers as well is left
    /// to that task's end.
    pub fn end_of_cover(&mut self, task: TaskId) -> Vec<(ObjectId, WorkerId, u64)> {
        let mut retained = Vec::new();
        for object in self.covered.remove(&task).unwrap_or_default() {
            if let Some(count) = self.cover_counts.get_mut(&object) {
                *count -= 1;
                if *count > 0 {
                    continue;
                }
                self.cover_counts.remove(&object);
            }
            let Some(entry) = self.entries.get_mut(&object) else {
                continue;
            };
            if let Kind::Borrowed {
                owner,
                generation,
                registration,
                ..
            } = &mut entry.kind
            {
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
            Some(Entry {
                kind:
                    Kind::Owned {
                        locations,
                        freed: false,
                        ..
                    },
                ..
            }) => {
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
            Some(Entry {
                kind: Kind::Owned { locations, .. },
                ..
            }) => {
                locations.retain(|location| *location != node);
                locations.len()
            }
            _ => 0,
        }
    }

    /// A retained task specification has this object as an argument.
    pub fn add_lineage(&mut self, object: &ObjectId) {
        if let Some(Entry {
            kind: Kind::Owned { lineage_count, .. },
            ..
        }) = self.entries.get_mut(object)
        {
            *lineage_count += 1;
        }
    }

    /// That specification was dropped.
    pub fn remove_lineage(&mut self, object: &ObjectId, commands: &mut Vec<ReferenceCommand>) {
        if let Some(Entry {
            kind: Kind::Owned { lineage_count, .. },
            ..
        }) = self.entries.get_mut(object)
        {
            *lineage_count = lineage_count.saturating_sub(1);
            self.settle(*object, commands);
        }
    }

    /// Whether the value was freed while the entry stays for lineage.
    pub fn is_freed(&self, object: &ObjectId) -> bool {
        match self.entries.get(object) {
            Some(Entry {
                kind: Kind::Owned { freed, .. },
                ..
            }) => *freed,
            Some(_) => false,
            None => true,
        }
    }

    /// Lineage makes a freed value again: it counts as live until it is settled next.
    pub fn revive(&mut self, object: &ObjectId) {
        if let Some(Entry {
            kind: Kind::Owned { freed, .. },
            ..
        }) = self.entries.get_mut(object)
        {
            *freed = false;
        }
    }

    /// A process is dead: its borrows end, what it owned has no owner, what we held for it is let go.
    pub fn worker_died(&mut self, worker: WorkerId, commands: &mut Vec<ReferenceCommand>) {
        for object in self.borrowed_by.remove(&worker).unwrap_or_default() {
            self.remove_borrower(object, worker, u64::MAX, commands);
        }
        let tasks: Vec<TaskId> = self
            .return_holds
            .iter()
            .filter(|(_, (caller, _))| *caller == worker)
            .map(|(task, _)| *task)
            .collect();
        for task in tasks {
            self.returns_acknowledged(task, commands);
        }
        self.return_acknowledgements
            .retain(|_, acknowledgement| acknowledgement.worker != worker);
        for object in self.owned_by.get(&worker).cloned().unwrap_or_default() {
            if let Some(Entry {
                kind:
                    Kind::Borrowed {
                        owner_dead,
                        registration,
                        ..
                    },
                ..
            }) = self.entries.get_mut(&object)
            {
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

    /// Frees the object if nobody counts on it, and then what it contained. Without recursion, because programs build
    /// chains of references longer than any stack.
    fn settle(&mut self, object: ObjectId, commands: &mut Vec<ReferenceCommand>) {
        let mut due = Vec::new();
        self.settle_one(object, &mut due, commands);
        while let Some(next) = due.pop() {
            self.settle_one(next, &mut due, commands);
        }
    }

    fn settle_one(&mut self, object: ObjectId, due: &mut Vec<ObjectId>, commands: &mut Vec<ReferenceCommand>) {
        let Some(entry) = self.entries.get_mut(&object) else {
            return;
        };
        if entry.counted() {
            return;
        }
        match &mut entry.kind {
            Kind::Owned {
                borrowers,
                locations,
                lineage_count,
                freed,
                ..
            } => {
                if !borrowers.is_empty() {
                    return;
                }
                if !*freed {
                    *freed = true;
                    commands.push(ReferenceCommand::FreeValue {
                        object,
                        nodes: std::mem::take(locations),
                    });
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
                        due.push(contained);
                    }
                }
            }
            Kind::Borrowed {
                owner,
                generation,
                registration,
                owner_dead,
            } => {
                let (owner, generation, registration, owner_dead) = (*owner, *generation, *registration, *owner_dead);
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
                return Err(format!(
                    "{object:?} is contained {} times and {expected} objects contain it",
                    entry.contained
                ));
            }
            match &entry.kind {
                Kind::Owned {
                    borrowers,
                    lineage_count,
                    freed,
                    ..
                } => {
                    let live = entry.counted() || !borrowers.is_empty();
                    let kept_for_lineage = *freed && *lineage_count > 0;
                    if !live && !kept_for_lineage {
                        return Err(format!("{object:?} is owned, uncounted, and was not freed"));
                    }
                    for (borrower, _) in borrowers {
                        if !self
                            .borrowed_by
                            .get(borrower)
                            .is_some_and(|objects| objects.contains(object))
                        {
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
        let mut holds: FxHashMap<ObjectId, u32> = FxHashMap::default();
        for (object, ..) in &self.relays {
            *holds.entry(*object).or_default() += 1;
        }
        for (_, objects) in self.return_holds.values() {
            for object in objects {
                *holds.entry(*object).or_default() += 1;
            }
        }
        for (inner, outers) in &self.held_until_registered {
            if !self.is_registering(inner) {
                return Err(format!(
                    "{outers:?} are held for the registration of {inner:?}, which is not under way"
                ));
            }
            for outer in outers {
                *holds.entry(*outer).or_default() += 1;
            }
        }
        for (object, expected) in holds {
            // The shell may have further holds of its own.
            let held = self.entries.get(&object).map_or(0, |entry| entry.holds);
            if held < expected {
                return Err(format!(
                    "{object:?} is held {held} times and {expected} reasons hold it"
                ));
            }
        }
        for (task, acknowledgement) in &self.return_acknowledgements {
            if let Some(object) = acknowledgement
                .waiting
                .iter()
                .find(|object| !self.is_registering(object))
            {
                return Err(format!(
                    "{task:?} waits for the registration of {object:?}, which is not under way"
                ));
            }
        }
        let covers: u32 = self.covered.values().map(|objects| objects.len() as u32).sum();
        if covers != self.cover_counts.values().sum::<u32>() {
            return Err("the covers of running tasks are miscounted".into());
        }
        Ok(())
    }
}
