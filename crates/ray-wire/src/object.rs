//! Messages about objects: the node's store, transfer between nodes, and ownership between processes.
//!
//! Invariant: 1. Borrow messages carry the borrower's id and generation, so that duplicates and reordering are harmless.

use bytes::Bytes;

use crate::common::{Address, ReferenceInfo, ValueLayout};

/// A piece of the store's mapping.
#[derive(Clone, Copy, PartialEq, prost::Message)]
pub struct ExtentInfo {
    #[prost(uint64, tag = "1")]
    pub offset: u64,
    #[prost(uint64, tag = "2")]
    pub length: u64,
    /// Whether its pages have memory; where they do not, the client gives it to them before it allocates there.
    #[prost(bool, tag = "3")]
    pub reserved: bool,
}

/// Asks the raylet for room.
#[derive(Clone, PartialEq, prost::Message)]
pub struct RequestExtent {
    #[prost(uint64, tag = "1")]
    pub minimum_bytes: u64,
    /// What for, for errors and `why`.
    #[prost(bytes = "bytes", tag = "2")]
    pub object_id: Bytes,
}

/// Room, or why there is none.
#[derive(Clone, PartialEq, prost::Message)]
pub struct ExtentLent {
    #[prost(message, optional, tag = "1")]
    pub extent: Option<ExtentInfo>,
    /// Empty where an extent was lent; else a sentence for `ObjectStoreFullError` with the table of who holds what.
    #[prost(string, tag = "2")]
    pub error: String,
}

/// Gives unused room back.
#[derive(Clone, PartialEq, prost::Message)]
pub struct ReturnExtents {
    #[prost(message, repeated, tag = "1")]
    pub extents: Vec<ExtentInfo>,
}

/// The owner lets these go.
#[derive(Clone, PartialEq, prost::Message)]
pub struct FreeObjects {
    /// Object ids of 28 bytes each, one after the other.
    #[prost(bytes = "bytes", tag = "1")]
    pub object_ids: Bytes,
}

/// Asks for a copy in the local store.
#[derive(Clone, PartialEq, prost::Message)]
pub struct FetchObject {
    #[prost(bytes = "bytes", tag = "1")]
    pub object_id: Bytes,
    /// Raylets that should have it (`worker_id` nil).
    #[prost(message, repeated, tag = "2")]
    pub locations: Vec<Address>,
    #[prost(message, optional, tag = "3")]
    pub owner: Option<Address>,
}

/// The object is in the local store.
#[derive(Clone, PartialEq, prost::Message)]
pub struct ObjectLocal {
    #[prost(bytes = "bytes", tag = "1")]
    pub object_id: Bytes,
    /// Whether a copy was transferred for this. The raylet tells the owner of it.
    #[prost(bool, tag = "2")]
    pub transferred: bool,
}

/// The object could not be had.
#[derive(Clone, PartialEq, prost::Message)]
pub struct FetchFailed {
    #[prost(bytes = "bytes", tag = "1")]
    pub object_id: Bytes,
    #[prost(string, tag = "2")]
    pub reason: String,
    /// Nodes that said they do not have it, or are dead.
    #[prost(bytes = "bytes", repeated, tag = "3")]
    pub absent_nodes: Vec<Bytes>,
    /// Whether the local store is too full to take it.
    #[prost(bool, tag = "4")]
    pub store_full: bool,
}

/// Nobody waits for that copy any more.
#[derive(Clone, PartialEq, prost::Message)]
pub struct CancelFetch {
    #[prost(bytes = "bytes", tag = "1")]
    pub object_id: Bytes,
}

/// One raylet asks another for a piece.
#[derive(Clone, PartialEq, prost::Message)]
pub struct PullChunk {
    #[prost(bytes = "bytes", tag = "1")]
    pub object_id: Bytes,
    #[prost(uint64, tag = "2")]
    pub offset: u64,
    #[prost(uint64, tag = "3")]
    pub length: u64,
}

/// A piece; its bytes are the payload.
#[derive(Clone, PartialEq, prost::Message)]
pub struct ObjectChunk {
    #[prost(bytes = "bytes", tag = "1")]
    pub object_id: Bytes,
    #[prost(uint64, tag = "2")]
    pub offset: u64,
    /// Size of the whole object.
    #[prost(uint64, tag = "3")]
    pub total_bytes: u64,
    /// Why there is none, or empty.
    #[prost(string, tag = "4")]
    pub error: String,
    /// Bytes so far present, where the sender is itself still receiving.
    #[prost(bool, tag = "5")]
    pub absent: bool,
}

/// Asks an owner what has become of an object; answered when that is known.
#[derive(Clone, PartialEq, prost::Message)]
pub struct GetObjectStatus {
    #[prost(bytes = "bytes", tag = "1")]
    pub object_id: Bytes,
    /// The version of the last answer that turned out wrong, or 0.
    #[prost(uint64, tag = "2")]
    pub after_version: u64,
}

/// What an owner knows of an object. An inline value lies in the payload.
#[derive(Clone, PartialEq, prost::Message)]
pub struct ObjectStatus {
    #[prost(bytes = "bytes", tag = "1")]
    pub object_id: Bytes,
    /// See the `STATUS_*` constants.
    #[prost(uint32, tag = "2")]
    pub status: u32,
    #[prost(message, optional, tag = "3")]
    pub value: Option<ValueLayout>,
    #[prost(message, repeated, tag = "4")]
    pub locations: Vec<Address>,
    #[prost(uint64, tag = "5")]
    pub stored_bytes: u64,
    #[prost(uint64, tag = "6")]
    pub version: u64,
    #[prost(string, tag = "7")]
    pub message: String,
}

/// The value is in the payload.
pub const STATUS_INLINE: u32 = 1;
/// The value is in the stores of `locations`.
pub const STATUS_STORED: u32 = 2;
/// The owner does not know it, or freed it.
pub const STATUS_FREED: u32 = 3;

/// A process counts on an object from now on.
#[derive(Clone, PartialEq, prost::Message)]
pub struct AddBorrower {
    #[prost(bytes = "bytes", tag = "1")]
    pub object_id: Bytes,
    #[prost(message, optional, tag = "2")]
    pub borrower: Option<Address>,
    #[prost(uint64, tag = "3")]
    pub generation: u64,
}

/// The owner has noted the borrower.
#[derive(Clone, PartialEq, prost::Message)]
pub struct BorrowerAdded {
    #[prost(bytes = "bytes", tag = "1")]
    pub object_id: Bytes,
    #[prost(bytes = "bytes", tag = "2")]
    pub borrower_id: Bytes,
    #[prost(uint64, tag = "3")]
    pub generation: u64,
    /// Whether the object still existed.
    #[prost(bool, tag = "4")]
    pub known: bool,
}

/// A process no longer counts on an object.
#[derive(Clone, PartialEq, prost::Message)]
pub struct RemoveBorrower {
    #[prost(bytes = "bytes", tag = "1")]
    pub object_id: Bytes,
    #[prost(bytes = "bytes", tag = "2")]
    pub borrower_id: Bytes,
    #[prost(uint64, tag = "3")]
    pub generation: u64,
}

/// The caller counts on everything inside the returns of that task.
#[derive(Clone, PartialEq, prost::Message)]
pub struct ReturnsAcknowledged {
    #[prost(bytes = "bytes", tag = "1")]
    pub task_id: Bytes,
}

/// A node has a copy.
#[derive(Clone, PartialEq, prost::Message)]
pub struct AddLocation {
    #[prost(bytes = "bytes", tag = "1")]
    pub object_id: Bytes,
    #[prost(message, optional, tag = "2")]
    pub node: Option<Address>,
    /// To whom it is to be told, where the owner's raylet passes it on.
    #[prost(message, optional, tag = "3")]
    pub owner: Option<Address>,
}

/// Nodes do not have the copy that they should have.
#[derive(Clone, PartialEq, prost::Message)]
pub struct ReportLost {
    #[prost(bytes = "bytes", tag = "1")]
    pub object_id: Bytes,
    #[prost(bytes = "bytes", repeated, tag = "2")]
    pub node_ids: Vec<Bytes>,
}

/// A list of references (hidden payload of several messages).
#[derive(Clone, PartialEq, prost::Message)]
pub struct ReferenceList {
    #[prost(message, repeated, tag = "1")]
    pub references: Vec<ReferenceInfo>,
}
