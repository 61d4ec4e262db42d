//! What the server tells: owns the plain data of its answers.
//!
//! It refuses to hold anything that must be given back; handles are in `local`.
//!
//! Invariants:
//! 1. A ledger's parts sum to its capacity.

use ray_ids::{ObjectId, WorkerId};

use crate::{ClientSlot, Extent};

/// Whether the node may drop an object for want of memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Role {
    /// The copy that must survive: it is spilled before it is dropped.
    Primary,
    /// A received copy: it is dropped first.
    Cache,
}

/// Why the server creates an object itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum LocalPurpose {
    /// A copy arrives from another node.
    Transfer,
    /// A spilled object comes back.
    Restore,
}

/// An object in the store.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ObjectEntry {
    /// Which object.
    pub object: ObjectId,
    /// Where its bytes start in the data area.
    pub offset: u64,
    /// How many it has.
    pub size: u64,
    /// Its creator's tag.
    pub metadata: u32,
    /// Whether it may be dropped.
    pub role: Role,
    /// Never the same for two entries of the store's life.
    pub generation: u64,
    /// The client that created it, also after that client is gone; `None` where the server did.
    pub creator: Option<ClientSlot>,
}

/// An object that a client published.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Published {
    /// Which object.
    pub object: ObjectId,
    /// Who created it.
    pub slot: ClientSlot,
    /// Where its bytes start in the data area.
    pub offset: u64,
    /// How many it has.
    pub size: u64,
    /// Its creator's tag.
    pub metadata: u32,
}

/// What the rings said, in order for each client.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum StoreEvent {
    /// An object is here now, as a primary copy.
    Published(Published),
    /// An object's owner let go of it. It is deleted here; copies elsewhere, on disk or on other nodes, are the
    /// raylet's to delete.
    Deleted {
        /// Which object.
        object: ObjectId,
        /// Who asked.
        slot: ClientSlot,
        /// What became of the copy in this store.
        outcome: DeleteOutcome,
    },
    /// A published object exists here already; the new copy was dropped.
    Duplicate {
        /// Which object.
        object: ObjectId,
        /// Who created it again.
        slot: ClientSlot,
    },
    /// A record or a ring makes no sense; the client is broken and nothing was done.
    Rejected {
        /// Whose.
        slot: ClientSlot,
        /// What is wrong.
        reason: String,
    },
    /// The index has its limit of objects: this client's objects wait in its ring until some are deleted or evicted.
    IndexFull {
        /// Whose ring waits.
        slot: ClientSlot,
    },
}

/// What became of an object that was to be deleted.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum DeleteOutcome {
    /// Its bytes are free.
    Deleted,
    /// It cannot be found any more; its bytes become free when those who use them let go.
    DeferredUntilUnpinned,
    /// It was not here.
    Absent,
}

/// What became of an object that was to be evicted.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum EvictOutcome {
    /// Its bytes are free.
    Evicted,
    /// Somebody uses it, so it stays.
    InUse,
    /// It was not here.
    Absent,
}

/// What a client left behind.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Forgotten {
    /// Whose process it was.
    pub worker: WorkerId,
    /// Objects in its ring for which the index had no room; they are lost.
    pub lost: Vec<ObjectId>,
    /// Bytes of objects that it had begun and never published.
    pub unpublished_bytes: u64,
    /// How many objects it had pinned.
    pub pins_dropped: u64,
    /// The memory that it was lent, which is free again.
    pub extents: Vec<Extent>,
}

/// Who has the bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Ledger {
    /// All bytes for objects.
    pub capacity: u64,
    /// Sealed objects that must survive.
    pub primaries: u64,
    /// Sealed objects that may be dropped.
    pub cache: u64,
    /// Objects that clients (by their own word) or restores are filling.
    pub being_created: u64,
    /// Objects that arrive from other nodes.
    pub in_transfer: u64,
    /// Lent to clients and not used for an object.
    pub lent_unused: u64,
    /// Deleted, but still in use by somebody.
    pub awaiting_unpin: u64,
    /// Nobody's.
    pub free: u64,
    /// How many sealed objects there are.
    pub objects: u64,
    /// How many clients are registered.
    pub clients: u64,
}

impl Ledger {
    /// The sum of all parts, which is the capacity.
    pub fn total(&self) -> u64 {
        self.primaries
            + self.cache
            + self.being_created
            + self.in_transfer
            + self.lent_unused
            + self.awaiting_unpin
            + self.free
    }
}
