//! One object's counts in one process, and what the reference table asks of its shell.
//!
//! It refuses nothing by itself: `references` keeps the invariants; this file names the states.
//!
//! Invariant: 1. A borrowed entry's generation never changes; a reference that comes again after its end gets a new one.

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

#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Kind {
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
    Borrowed {
        owner: WorkerId,
        generation: u64,
        registration: Registration,
        owner_dead: bool,
    },
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
    /// References inside this object that it counts.
    pub(crate) contains: Vec<ObjectId>,
    pub(crate) kind: Kind,
}

impl<V> Entry<V> {
    pub(crate) fn counted(&self) -> bool {
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
