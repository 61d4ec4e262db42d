//! The crate's errors: owns one sentence for each thing that can go wrong, with its numbers.
//!
//! It refuses to say only "full": whoever is told so learns how much was wanted and where the rest is.
//!
//! Invariants:
//! 1. Every limit that this crate enforces has a variant that names it.

use std::path::PathBuf;

use ray_ids::ObjectId;

use crate::{ClientSlot, Extent};

/// Why the store refused.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// The configuration makes no store.
    #[error("bad object store configuration: {0}")]
    BadConfig(&'static str),
    /// A system call failed.
    #[error("could not {what} the object store file {}: {source}", path.display())]
    Io {
        /// What was tried.
        what: &'static str,
        /// The file, empty where only its descriptor was at hand.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// The path's file belongs to a server that lives.
    #[error("the object store file {} belongs to a running raylet", path.display())]
    PathInUse {
        /// The file.
        path: PathBuf,
    },
    /// The file is not a store of this version.
    #[error("the file is not an object store: {reason}")]
    BadFile {
        /// What is wrong with it.
        reason: String,
    },
    /// The data area has no range that is long enough.
    #[error(
        "the object store is full: {needed} bytes needed, the longest free range has {longest_free} of {free} free \
         bytes; {lent_unused} are lent and unused, {evictable} are cached copies, {awaiting_unpin} are deleted but in use"
    )]
    Full {
        /// Bytes that were asked for.
        needed: u64,
        /// The longest free range.
        longest_free: u64,
        /// All free bytes.
        free: u64,
        /// Bytes that clients could give back.
        lent_unused: u64,
        /// Bytes of cached copies.
        evictable: u64,
        /// Bytes of deleted objects that are still pinned.
        awaiting_unpin: u64,
    },
    /// The file system has no memory for the pages.
    #[error("the file system of the object store has no room for {bytes} more bytes: {source}")]
    NoMemory {
        /// Bytes that were to be reserved.
        bytes: u64,
        /// What the system said.
        source: std::io::Error,
    },
    /// More clients than configured.
    #[error("the object store has {limit} clients, which is its limit")]
    TooManyClients {
        /// The limit.
        limit: u32,
    },
    /// More objects than configured.
    #[error("the object store holds {limit} objects, which is its limit")]
    TooManyObjects {
        /// The limit.
        limit: u64,
    },
    /// More pinned objects than a client has words for.
    #[error("this process holds {pinned} objects of the object store in use, which is its limit")]
    TooManyPins {
        /// How many are pinned.
        pinned: u64,
    },
    /// The slot is not registered, or belongs to a later holder.
    #[error("no client is registered as {slot:?}")]
    UnknownClient {
        /// The slot.
        slot: ClientSlot,
    },
    /// A client spoke of bytes that are not lent to it.
    #[error("{extent:?} is not lent to {slot:?}")]
    NotLent {
        /// The client.
        slot: ClientSlot,
        /// What it named.
        extent: Extent,
    },
    /// An object of this id is here already.
    #[error("object {object} is in the store already")]
    AlreadyExists {
        /// The object.
        object: ObjectId,
    },
    /// No object of this id is here.
    #[error("object {object} is not in the store")]
    NotFound {
        /// The object.
        object: ObjectId,
    },
    /// The client must be lent an extent of at least so many bytes.
    #[error("an extent of at least {bytes} bytes must be lent first")]
    NeedExtent {
        /// How long the extent must be.
        bytes: u64,
    },
    /// The raylet has not yet read what this client published before.
    #[error("the ring of published objects is full until the raylet reads it")]
    RingFull,
    /// The client was closed.
    #[error("this process has left the object store")]
    Closed,
    /// The process is a forked child of the one that attached.
    #[error("the object store cannot be used in a forked child of the process that attached to it")]
    Forked,
}
