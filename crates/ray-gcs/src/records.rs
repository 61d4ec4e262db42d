//! What is stored: owns the tables' numbers and the records that no message of `ray-wire` has already.
//!
//! Invariants:
//! 1. A table's number and a record's field numbers are never reused.
//! 2. A row is written whole; a later one of the same key replaces it.

use bytes::Bytes;
use ray_wire::{ActorState, NodeInfo, PlacementGroupSpecification};

/// A stored table.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Table {
    /// One row under the key "meta": `MetaRecord`.
    Meta = 1,
    /// Node id to `NodeRecord`.
    Nodes = 2,
    /// Job id to `JobRecord`.
    Jobs = 3,
    /// Actor id to `ActorRecord`.
    Actors = 4,
    /// Actor id to `ray_wire::ActorCreation`; of a dead actor without what only another creation would need.
    ActorCreations = 5,
    /// Placement group id to `GroupRecord`.
    PlacementGroups = 6,
    /// Namespace length, namespace and key to `KeyValueRecord`.
    KeyValue = 7,
    /// Request id to the `ray_wire::GcsReply` it got, for requests that must not be done twice.
    Requests = 8,
}

impl Table {
    /// Every table.
    pub const ALL: [Self; 8] = [
        Self::Meta,
        Self::Nodes,
        Self::Jobs,
        Self::Actors,
        Self::ActorCreations,
        Self::PlacementGroups,
        Self::KeyValue,
        Self::Requests,
    ];

    /// The name, for errors.
    pub fn name(self) -> &'static str {
        match self {
            Self::Meta => "meta",
            Self::Nodes => "nodes",
            Self::Jobs => "jobs",
            Self::Actors => "actors",
            Self::ActorCreations => "actor_creations",
            Self::PlacementGroups => "placement_groups",
            Self::KeyValue => "key_value",
            Self::Requests => "requests",
        }
    }

    /// The table of this number.
    pub fn from_number(number: i64) -> Option<Self> {
        Self::ALL.into_iter().find(|table| *table as i64 == number)
    }
}

/// One change of what is stored.
#[derive(Debug, Clone, PartialEq)]
pub struct Mutation {
    /// Where.
    pub table: Table,
    /// Which row.
    pub key: Bytes,
    /// Its new content; none deletes it.
    pub value: Option<Bytes>,
}

/// One stored row.
#[derive(Debug, Clone, PartialEq)]
pub struct Row {
    /// Where.
    pub table: Table,
    /// Which row.
    pub key: Bytes,
    /// Its content.
    pub value: Bytes,
}

/// What is known of the whole cluster.
#[derive(Clone, PartialEq, prost::Message)]
pub struct MetaRecord {
    #[prost(bytes = "bytes", tag = "1")]
    pub cluster_id: Bytes,
    /// Counts the control plane's lives.
    #[prost(uint64, tag = "2")]
    pub epoch: u64,
    /// The number of the next job.
    #[prost(uint32, tag = "3")]
    pub next_job: u32,
}

/// A node.
#[derive(Clone, PartialEq, prost::Message)]
pub struct NodeRecord {
    #[prost(message, optional, tag = "1")]
    pub info: Option<NodeInfo>,
    /// See `nodes::DEATH_REASON_*`.
    #[prost(uint32, tag = "2")]
    pub death_reason: u32,
    #[prost(uint64, tag = "3")]
    pub drain_deadline_ms: u64,
    #[prost(string, tag = "4")]
    pub drain_reason: String,
}

/// A job.
#[derive(Clone, PartialEq, prost::Message)]
pub struct JobRecord {
    #[prost(message, optional, tag = "1")]
    pub driver: Option<ray_wire::Address>,
    #[prost(uint32, tag = "2")]
    pub pid: u32,
    #[prost(string, tag = "3")]
    pub config_json: String,
    #[prost(uint64, tag = "4")]
    pub start_time_ms: u64,
    #[prost(uint64, tag = "5")]
    pub end_time_ms: u64,
    #[prost(bool, tag = "6")]
    pub finished: bool,
}

/// An actor's changing part.
#[derive(Clone, PartialEq, prost::Message)]
pub struct ActorRecord {
    #[prost(message, optional, tag = "1")]
    pub state: Option<ActorState>,
    /// Where it is being created or runs, or empty.
    #[prost(bytes = "bytes", tag = "2")]
    pub node_id: Bytes,
    #[prost(bool, tag = "3")]
    pub was_alive: bool,
    #[prost(bool, tag = "4")]
    pub out_of_scope: bool,
    #[prost(uint64, tag = "5")]
    pub start_time_ms: u64,
    #[prost(uint64, tag = "6")]
    pub end_time_ms: u64,
    /// Order of registration, in which waiting actors are placed.
    #[prost(uint64, tag = "7")]
    pub order: u64,
}

/// A placement group.
#[derive(Clone, PartialEq, prost::Message)]
pub struct GroupRecord {
    #[prost(message, optional, tag = "1")]
    pub specification: Option<PlacementGroupSpecification>,
    /// The node of each bundle, or empty.
    #[prost(bytes = "bytes", repeated, tag = "2")]
    pub nodes: Vec<Bytes>,
    #[prost(uint64, tag = "3")]
    pub attempt: u64,
    #[prost(bool, tag = "4")]
    pub was_created: bool,
    #[prost(bool, tag = "5")]
    pub removed: bool,
    #[prost(uint64, tag = "6")]
    pub order: u64,
    #[prost(uint64, tag = "7")]
    pub registered_ms: u64,
    #[prost(uint64, tag = "8")]
    pub created_ms: u64,
}

/// A stored value.
#[derive(Clone, PartialEq, prost::Message)]
pub struct KeyValueRecord {
    #[prost(bytes = "bytes", tag = "1")]
    pub value: Bytes,
    #[prost(bytes = "bytes", tag = "2")]
    pub job_id: Bytes,
}
