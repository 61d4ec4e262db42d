//! One object's counts in one process, and what the reference table asks of its shell.
//!
//! It refuses nothing by itself: `references` keeps the invariants; this file names the states.
//!
//! Invariants:
//! 1. A borrowed entry's generation never changes; a reference that comes again after its end gets a new one.
//! 2. What few objects have lies behind a pointer: a program holds millions of entries, and nearly all of them are counts
//!    and nothing else.

use ray_ids::{NodeId, ObjectId, TaskId, WorkerId};

/// What the shell must do.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ReferenceCommand {
    /// The object's value is nobody's any more: drop it here and in the stores of these nodes.
    FreeValue { object: ObjectId, nodes: Vec<NodeId> },
    /// Tell the owner that `borrower` counts on the object; `borrower_added` is called with its answer.
    AddBorrower {
        owner: WorkerId,
        object: ObjectId,
        borrower: WorkerId,
        generation: u64,
    },
    /// Tell the owner that this process no longer counts on it.
    RemoveBorrower {
        owner: WorkerId,
        object: ObjectId,
        generation: u64,
    },
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
pub(crate) enum Registration {
    /// Only the cover protects it; the owner does not know of this process.
    Covered,
    /// `AddBorrower` is under way.
    Pending,
    /// The owner counts this process.
    Registered,
}

/// What few owned objects have.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Details {
    /// Who borrows, with the generation of the borrow.
    pub(crate) borrowers: Vec<(WorkerId, u64)>,
    /// Generations that were released, some perhaps before they were added.
    pub(crate) released: Vec<(WorkerId, u64)>,
    pub(crate) locations: Vec<NodeId>,
    /// References inside this object that it counts.
    pub(crate) contains: Vec<ObjectId>,
}

/// An object of this process.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Owned {
    pub(crate) details: Option<Box<Details>>,
    /// Retained specifications of tasks that have this object as an argument.
    pub(crate) lineage_count: u32,
    pub(crate) freed: bool,
}

impl Owned {
    pub(crate) fn details_mut(&mut self) -> &mut Details {
        self.details.get_or_insert_default()
    }

    pub(crate) fn borrowers(&self) -> &[(WorkerId, u64)] {
        self.details.as_ref().map_or(&[], |details| &details.borrowers)
    }

    pub(crate) fn locations(&self) -> &[NodeId] {
        self.details.as_ref().map_or(&[], |details| &details.locations)
    }

    pub(crate) fn contains(&self) -> &[ObjectId] {
        self.details.as_ref().map_or(&[], |details| &details.contains)
    }
}

/// An object of another process.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Borrowed {
    pub(crate) owner: WorkerId,
    pub(crate) generation: u64,
    pub(crate) registration: Registration,
    pub(crate) owner_dead: bool,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Kind {
    Owned(Owned),
    Borrowed(Box<Borrowed>),
}

/// One object's counts, and the shell's slot for its value.
#[derive(Debug, Clone)]
pub struct Entry<V> {
    /// The shell's value.
    pub value: V,
    pub(crate) local: u32,
    pub(crate) submitted: u32,
    pub(crate) contained: u32,
    pub(crate) holds: u32,
    pub(crate) kind: Kind,
}

impl<V> Entry<V> {
    /// An entry with one local count.
    pub(crate) fn new(value: V, kind: Kind) -> Self {
        Self {
            value,
            local: 1,
            submitted: 0,
            contained: 0,
            holds: 0,
            kind,
        }
    }

    pub(crate) fn owned(&self) -> Option<&Owned> {
        match &self.kind {
            Kind::Owned(owned) => Some(owned),
            Kind::Borrowed(_) => None,
        }
    }

    pub(crate) fn owned_mut(&mut self) -> Option<&mut Owned> {
        match &mut self.kind {
            Kind::Owned(owned) => Some(owned),
            Kind::Borrowed(_) => None,
        }
    }

    pub(crate) fn borrowed(&self) -> Option<&Borrowed> {
        match &self.kind {
            Kind::Borrowed(borrowed) => Some(borrowed),
            Kind::Owned(_) => None,
        }
    }

    pub(crate) fn borrowed_mut(&mut self) -> Option<&mut Borrowed> {
        match &mut self.kind {
            Kind::Borrowed(borrowed) => Some(borrowed),
            Kind::Owned(_) => None,
        }
    }

    pub(crate) fn counted(&self) -> bool {
        self.local > 0 || self.submitted > 0 || self.contained > 0 || self.holds > 0
    }

    /// Whether this process owns the object.
    pub fn is_owned(&self) -> bool {
        self.owned().is_some()
    }

    /// The owner, for a borrowed object.
    pub fn borrowed_owner(&self) -> Option<WorkerId> {
        self.borrowed().map(|borrowed| borrowed.owner)
    }

    /// Whether this is the borrow of that generation.
    pub(crate) fn is_borrowed_as(&self, wanted: u64) -> bool {
        matches!(&self.kind, Kind::Borrowed(borrowed) if borrowed.generation == wanted)
    }

    /// Whether the owner of a borrowed object is known to be dead.
    pub fn owner_is_dead(&self) -> bool {
        self.borrowed().is_some_and(|borrowed| borrowed.owner_dead)
    }

    /// Nodes known to have a copy of an owned object.
    pub fn locations(&self) -> &[NodeId] {
        self.owned().map_or(&[], Owned::locations)
    }

    /// (local, submitted, contained, holds, borrowers), for `ray memory`.
    pub fn counts(&self) -> (u32, u32, u32, u32, usize) {
        let borrowers = self.owned().map_or(0, |owned| owned.borrowers().len());
        (self.local, self.submitted, self.contained, self.holds, borrowers)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_entry_is_small() {
        // A million queued calls have a million entries, in a table that may be half empty.
        assert!(std::mem::size_of::<Entry<usize>>() <= 40);
    }
}
