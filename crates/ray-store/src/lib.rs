//! The shared memory object store of one node: owns the mapped file, which bytes of it belong to whom, and the
//! protocols by which processes create, find, pin and free objects in it without asking each other.
//!
//! It refuses to open sockets or to know of messages: the raylet is the `StoreServer`, workers and drivers are
//! `StoreClient`s of the same file, and what must be said between them (lend, recall) their links carry as plain data.
//!
//! How it is used:
//! * Raylet: [`StoreServer::create`], then [`register_client`](StoreServer::register_client) for each process, whose
//!   [`ClientSlot`] and file path travel to it. [`lend_extent`](StoreServer::lend_extent) when a client needs memory;
//!   [`drain_rings`](StoreServer::drain_rings) regularly, to learn what was published and deleted.
//! * Worker: [`StoreClient::attach`], [`create`](StoreClient::create) → fill → [`ObjectWriter::seal`], and
//!   [`get`](StoreClient::get) → [`PinnedObject`]. `Absent` means "ask the raylet", whose
//!   [`lookup`](StoreServer::lookup) drains the rings before it answers; then get again.
//! * A process that ended in whatever way: [`forget_client`](StoreServer::forget_client), once it has truly ended. A
//!   process that only shuts its runtime down calls [`close`](StoreClient::close) and keeps its slot, and with it the
//!   pins of views that are still alive, until it ends.
//!
//! Invariants:
//! 1. Every shared word has one writer. There are no shared locks, so a client killed at any instruction is undone by
//!    forgetting its words.
//! 2. Every byte of the data area is in exactly one of: free, lent, an object, a local buffer, waiting to be unpinned.
//! 3. Bytes are reused only when no pin names them. Generations never repeat.
//! 4. No page is touched before it was reserved, so a full file system is an error and never a signal.

#[cfg(loom)]
pub mod index;
#[cfg(loom)]
pub mod pins;
#[cfg(loom)]
pub mod ring;
#[cfg(loom)]
pub mod sync;

#[cfg(not(loom))]
mod index;
#[cfg(not(loom))]
mod pins;
#[cfg(not(loom))]
mod ring;
#[cfg(not(loom))]
mod sync;

mod allocator;
mod client;
mod client_state;
mod copy;
mod error;
mod fork;
mod layout;
mod local;
mod mapping;
mod ranges;
mod server;
mod stream;

#[cfg(all(test, not(loom)))]
mod kill_tests;
#[cfg(all(test, not(loom)))]
mod store_tests;

use std::path::{Path, PathBuf};

pub use client::{Lookup, ObjectWriter, PinnedObject, StoreClient, Unsealed};
pub use copy::{copy_into, PARALLEL_COPY_BYTES};
pub use error::StoreError;
pub use layout::{MAX_PINS, PUBLICATION_RECORDS};
pub use local::{LocalBuffer, StoredObject};
pub use mapping::{available_bytes, remove_if_stale};
pub use pins::GRANULE_BYTES;
pub use server::{
    DeleteOutcome, EvictOutcome, Forgotten, Ledger, LocalPurpose, ObjectEntry, Published, Role, StoreEvent, StoreServer,
};

/// What a store is made of.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StoreConfig {
    /// The file to create; see [`choose_path`].
    pub path: PathBuf,
    /// Bytes for objects.
    pub capacity_bytes: u64,
    /// How many processes can be attached at once.
    pub max_clients: u32,
    /// How many objects there can be at once. The index takes 128 bytes of memory for each.
    pub max_objects: u32,
}

/// A registered client's place in the shared mapping.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct ClientSlot {
    /// Which client area.
    pub number: u32,
    /// Which of the area's successive holders.
    pub generation: u32,
}

/// A range of the data area that a client may allocate from.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub struct Extent {
    /// Where it starts.
    pub offset: u64,
    /// How long it is; zero where what the client needs is already on its way through its ring of returned memory.
    pub len: u64,
    /// Whether its pages have memory. Where they do not, because giving them memory takes long, the client does it in
    /// `add_extent` before anything is allocated from it, so that the raylet's thread never stands still.
    pub reserved: bool,
}

/// Where a store of this capacity belongs: in `/dev/shm`, or in `fallback_directory` where that is too small. Tells
/// whether the path is in memory.
pub fn choose_path(name: &str, capacity_bytes: u64, fallback_directory: &Path) -> (PathBuf, bool) {
    let shared = Path::new("/dev/shm");
    match available_bytes(shared) {
        Ok(available) if available >= capacity_bytes => (shared.join(name), true),
        _ => (fallback_directory.join(name), false),
    }
}

/// Removes the files of this prefix in a directory whose servers are dead, and returns their paths. A server that is
/// killed cannot remove its own.
pub fn remove_stale_stores(directory: &Path, prefix: &str) -> Result<Vec<PathBuf>, StoreError> {
    let failed = |source| StoreError::Io {
        what: "list",
        path: directory.to_path_buf(),
        source,
    };
    let mut removed = Vec::new();
    for entry in std::fs::read_dir(directory).map_err(failed)? {
        let path = entry.map_err(failed)?.path();
        let named = path
            .file_name()
            .and_then(|name| name.to_str())
            .is_some_and(|name| name.starts_with(prefix));
        // Files that live, or that are not stores or not ours, are exactly those that must stay.
        if named && path.is_file() && remove_if_stale(&path).is_ok() {
            removed.push(path);
        }
    }
    Ok(removed)
}
