//! Borrowing, both sides: references that arrive, owners that are told, returns that are held, deaths.
//!
//! It refuses to take a message twice: (borrower, generation) orders what is said about one borrow.
//!
//! Invariants: 2 and 3 of `references`, and: 1. Whatever stands in for a registration that is under way is held until the
//! owner has answered, the reference is dropped, or the owner is dead.

use ray_ids::{ObjectId, TaskId, WorkerId};

use crate::entry::{Borrowed, Cover, Entry, Kind, ReferenceCommand, Registration};
use crate::references::ReferenceTable;

/// How many borrows one caller may have passed before those that are over are looked for.
const PASSED_BEFORE_PRUNING: usize = 64;

impl<V: Default> ReferenceTable<V> {
    /// Whether an `AddBorrower` of this process for the object is unanswered: a constructor's end is told only after that.
    pub fn is_registering(&self, object: &ObjectId) -> bool {
        self.entries
            .get(object)
            .and_then(Entry::borrowed)
            .is_some_and(|borrowed| borrowed.registration == Registration::Pending)
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
                (Kind::Borrowed(borrowed), Cover::Outer(_) | Cover::Return { .. })
                    if borrowed.registration == Registration::Covered =>
                {
                    borrowed.registration = Registration::Pending;
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
            let borrowed = Borrowed {
                owner,
                generation,
                registration,
                owner_dead: lost,
            };
            self.entries
                .insert(object, Entry::new(value, Kind::Borrowed(Box::new(borrowed))));
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

    pub(crate) fn send_registration(&mut self, object: ObjectId, commands: &mut Vec<ReferenceCommand>) {
        if let Some(borrowed) = self.entries.get(&object).and_then(Entry::borrowed) {
            commands.push(ReferenceCommand::AddBorrower {
                owner: borrowed.owner,
                object,
                borrower: self.me,
                generation: borrowed.generation,
            });
        }
    }

    /// Notes what stands in for the owner's count meanwhile.
    pub(crate) fn protect(&mut self, object: ObjectId, cover: Cover) {
        let Some(borrowed) = self.entries.get(&object).and_then(Entry::borrowed) else {
            return;
        };
        match (cover, borrowed.registration) {
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
        if let Some(borrowed) = self.entries.get_mut(&object).and_then(Entry::borrowed_mut) {
            if borrowed.generation == generation && borrowed.registration == Registration::Pending {
                borrowed.registration = Registration::Registered;
                self.registration_settled(object, commands);
            }
        }
    }

    /// Whoever stood in for a registration need not any more.
    pub(crate) fn registration_settled(&mut self, object: ObjectId, commands: &mut Vec<ReferenceCommand>) {
        for outer in self.held_until_registered.remove(&object).unwrap_or_default() {
            self.release_hold(outer, commands);
        }
        self.return_registration_settled(object, commands);
    }

    pub(crate) fn return_registration_settled(&mut self, object: ObjectId, commands: &mut Vec<ReferenceCommand>) {
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
        match &entry.kind {
            Kind::Owned(_) => {
                self.add_borrower(object, borrower, generation, commands);
            }
            // A dead owner would never answer, and what this process keeps of its own call it counts already.
            Kind::Borrowed(borrowed) if borrowed.owner_dead => {}
            Kind::Borrowed(_) if borrower == self.me => {}
            Kind::Borrowed(borrowed) => {
                if self.relays.insert((object, borrower, generation)) {
                    entry.holds += 1;
                    commands.push(ReferenceCommand::AddBorrower {
                        owner: borrowed.owner,
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
        let Some(owned) = self.entries.get_mut(&object).and_then(Entry::owned_mut) else {
            return false;
        };
        if owned.freed {
            return false;
        }
        let details = owned.details_mut();
        if details
            .released
            .iter()
            .any(|(who, until)| *who == borrower && generation <= *until)
        {
            return true;
        }
        match details.borrowers.iter_mut().find(|(who, _)| *who == borrower) {
            Some((_, current)) => *current = (*current).max(generation),
            None => details.borrowers.push((borrower, generation)),
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
        let Some(owned) = self.entries.get_mut(&object).and_then(Entry::owned_mut) else {
            return;
        };
        let details = owned.details_mut();
        match details.released.iter_mut().find(|(who, _)| *who == borrower) {
            Some((_, until)) => *until = (*until).max(generation),
            None => details.released.push((borrower, generation)),
        }
        let before = details.borrowers.len();
        details
            .borrowers
            .retain(|(who, current)| *who != borrower || *current > generation);
        if details.borrowers.len() != before {
            if let Some(objects) = self.borrowed_by.get_mut(&borrower) {
                objects.remove(&object);
                if objects.is_empty() {
                    self.borrowed_by.remove(&borrower);
                }
            }
            self.settle(object, commands);
        }
    }

    pub(crate) fn watch(&mut self, worker: WorkerId, commands: &mut Vec<ReferenceCommand>) {
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

    /// A task's execution ends here: which borrows that it covered are kept. They count as registered from now on,
    /// because the caller keeps its own count until the owner knows. What another running task covers as well is left
    /// to that task's end. A borrow whose own registration is under way is listed where this process relays borrows of
    /// others as well: for those its caller's count is the only protection that is left.
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
            if let Some(borrowed) = self.entries.get_mut(&object).and_then(Entry::borrowed_mut) {
                match borrowed.registration {
                    Registration::Covered => borrowed.registration = Registration::Registered,
                    Registration::Pending if self.relays.iter().any(|(of, _, _)| *of == object) => {}
                    _ => continue,
                }
                retained.push((object, borrowed.owner, borrowed.generation));
            }
        }
        retained
    }

    /// The reply to `caller` says that these are kept, and `caller` is trusted to have their owners note it. Should it
    /// die before it has, this process tells them itself (`worker_died`).
    pub fn passed_by(
        &mut self,
        caller: WorkerId,
        retained: &[(ObjectId, WorkerId, u64)],
        commands: &mut Vec<ReferenceCommand>,
    ) {
        if caller == self.me {
            return;
        }
        let passed = self.passed.entry(caller).or_default();
        // Its own objects go with it.
        passed.borrows.extend(
            retained
                .iter()
                .filter(|(_, owner, _)| *owner != caller)
                .map(|(object, _, generation)| (*object, *generation)),
        );
        if passed.borrows.len() >= PASSED_BEFORE_PRUNING + 2 * passed.kept {
            let entries = &self.entries;
            passed.borrows.retain(|(object, generation)| {
                entries
                    .get(object)
                    .is_some_and(|entry| entry.is_borrowed_as(*generation))
            });
            passed.kept = passed.borrows.len();
        }
        self.watch(caller, commands);
    }

    /// How many borrows are noted that this caller passed, with those that are over and not forgotten yet.
    pub fn passed_noted(&self, caller: WorkerId) -> usize {
        self.passed.get(&caller).map_or(0, |passed| passed.borrows.len())
    }

    /// As owner: what a process borrows of ours.
    pub fn borrowed_by(&self, worker: WorkerId) -> Vec<ObjectId> {
        self.borrowed_by
            .get(&worker)
            .map(|objects| objects.iter().copied().collect())
            .unwrap_or_default()
    }

    /// A caller is dead, perhaps before it relayed what this process keeps of its calls.
    fn tell_owners_of_passed(&mut self, caller: WorkerId, commands: &mut Vec<ReferenceCommand>) {
        for (object, generation) in self.passed.remove(&caller).unwrap_or_default().borrows {
            let Some(entry) = self.entries.get_mut(&object) else {
                continue;
            };
            if let Kind::Borrowed(borrowed) = &mut entry.kind {
                let registered = borrowed.registration == Registration::Registered && !borrowed.owner_dead;
                if registered && borrowed.generation == generation {
                    borrowed.registration = Registration::Pending;
                    self.send_registration(object, commands);
                }
            }
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
            if let Some(borrowed) = self.entries.get_mut(&object).and_then(Entry::borrowed_mut) {
                borrowed.owner_dead = true;
                borrowed.registration = Registration::Registered;
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
        self.tell_owners_of_passed(worker, commands);
        self.watched.remove(&worker);
    }
}
