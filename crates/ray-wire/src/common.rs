//! What several messages share: addresses, resources, values, scheduling strategies, causes of death.
//!
//! Invariant: 1. An `Address` names a process for ever: its worker id is never reused.

use bytes::Bytes;
use ray_ids::{NodeId, WorkerId};

use crate::WireError;

/// Where a process is. On the same node its socket is `<session>/sockets/<worker hex>`; elsewhere it is reached
/// through its node's single port.
#[derive(Clone, PartialEq, Eq, Hash, prost::Message)]
pub struct Address {
    #[prost(bytes = "bytes", tag = "1")]
    pub node_id: Bytes,
    #[prost(bytes = "bytes", tag = "2")]
    pub worker_id: Bytes,
    /// Host of the node's single port.
    #[prost(string, tag = "3")]
    pub host: String,
    #[prost(uint32, tag = "4")]
    pub port: u32,
}

impl Address {
    /// The node's id.
    pub fn node(&self) -> Result<NodeId, WireError> {
        Ok(NodeId::from_binary(&self.node_id)?)
    }

    /// The process's id.
    pub fn worker(&self) -> Result<WorkerId, WireError> {
        Ok(WorkerId::from_binary(&self.worker_id)?)
    }
}

/// An amount of one resource, in ten-thousandths.
#[derive(Clone, PartialEq, prost::Message)]
pub struct ResourceAmount {
    #[prost(string, tag = "1")]
    pub name: String,
    #[prost(sint64, tag = "2")]
    pub amount_e4: i64,
}

/// A label of a node.
#[derive(Clone, PartialEq, prost::Message)]
pub struct Label {
    #[prost(string, tag = "1")]
    pub key: String,
    #[prost(string, tag = "2")]
    pub value: String,
}

/// One condition on a node's labels.
#[derive(Clone, PartialEq, prost::Message)]
pub struct LabelCondition {
    #[prost(string, tag = "1")]
    pub key: String,
    /// 0 in, 1 not in, 2 exists, 3 does not exist.
    #[prost(uint32, tag = "2")]
    pub operator: u32,
    #[prost(string, repeated, tag = "3")]
    pub values: Vec<String>,
}

/// Where work may run.
#[derive(Clone, PartialEq, prost::Message)]
pub struct Strategy {
    /// See the `STRATEGY_*` constants.
    #[prost(uint32, tag = "1")]
    pub kind: u32,
    /// Node affinity: the node.
    #[prost(bytes = "bytes", tag = "2")]
    pub node_id: Bytes,
    #[prost(bool, tag = "3")]
    pub soft: bool,
    #[prost(bool, tag = "4")]
    pub spill_on_unavailable: bool,
    #[prost(bool, tag = "5")]
    pub fail_on_unavailable: bool,
    #[prost(message, repeated, tag = "6")]
    pub hard_labels: Vec<LabelCondition>,
    #[prost(message, repeated, tag = "7")]
    pub soft_labels: Vec<LabelCondition>,
    /// Placement group: its id.
    #[prost(bytes = "bytes", tag = "8")]
    pub placement_group_id: Bytes,
    /// Placement group: the bundle, or -1 for any.
    #[prost(sint32, tag = "9")]
    pub bundle_index: i32,
    #[prost(bool, tag = "10")]
    pub capture_child_tasks: bool,
}

/// Hybrid: pack, then spread.
pub const STRATEGY_DEFAULT: u32 = 0;
/// Round robin.
pub const STRATEGY_SPREAD: u32 = 1;
/// One node.
pub const STRATEGY_NODE_AFFINITY: u32 = 2;
/// Nodes with labels.
pub const STRATEGY_NODE_LABEL: u32 = 3;
/// A placement group's bundle.
pub const STRATEGY_PLACEMENT_GROUP: u32 = 4;

/// How a value lies in a payload: first the in-band bytes, then each buffer.
#[derive(Clone, PartialEq, prost::Message)]
pub struct ValueLayout {
    /// See the `FORMAT_*` constants of `layout`.
    #[prost(uint32, tag = "1")]
    pub format: u32,
    #[prost(uint64, tag = "2")]
    pub inband_length: u64,
    #[prost(uint64, repeated, tag = "3")]
    pub buffer_lengths: Vec<u64>,
    /// The references pickled inside the value.
    #[prost(message, repeated, tag = "4")]
    pub contained: Vec<ReferenceInfo>,
}

/// A reference and who owns it.
#[derive(Clone, PartialEq, prost::Message)]
pub struct ReferenceInfo {
    #[prost(bytes = "bytes", tag = "1")]
    pub object_id: Bytes,
    #[prost(message, optional, tag = "2")]
    pub owner: Option<Address>,
}

/// Why a process, an actor or a node is dead.
#[derive(Clone, PartialEq, Eq, Hash, prost::Message)]
pub struct DeathCause {
    /// See the `DEATH_*` constants.
    #[prost(uint32, tag = "1")]
    pub kind: u32,
    /// A sentence: which process, which signal or exit code, which limit.
    #[prost(string, tag = "2")]
    pub message: String,
    #[prost(sint32, optional, tag = "3")]
    pub exit_code: Option<i32>,
    #[prost(uint32, optional, tag = "4")]
    pub signal: Option<u32>,
    #[prost(uint32, tag = "5")]
    pub pid: u32,
    /// The last lines of its log.
    #[prost(string, tag = "6")]
    pub log_tail: String,
    /// A pickled exception, where an actor's constructor raised.
    #[prost(bytes = "bytes", tag = "7")]
    pub exception: Bytes,
}

/// Nothing is known.
pub const DEATH_UNKNOWN: u32 = 0;
/// It left of itself as intended.
pub const DEATH_INTENDED: u32 = 1;
/// The process crashed or was killed from outside.
pub const DEATH_CRASHED: u32 = 2;
/// Its node died.
pub const DEATH_NODE: u32 = 3;
/// `ray.kill`.
pub const DEATH_KILLED: u32 = 4;
/// Every handle went out of scope.
pub const DEATH_OUT_OF_SCOPE: u32 = 5;
/// Its owner died.
pub const DEATH_OWNER: u32 = 6;
/// The actor's constructor raised.
pub const DEATH_CONSTRUCTOR: u32 = 7;
/// Its job ended.
pub const DEATH_JOB: u32 = 8;
/// It can never be placed.
pub const DEATH_UNSCHEDULABLE: u32 = 9;
/// Out of memory.
pub const DEATH_OUT_OF_MEMORY: u32 = 10;
/// Its runtime environment could not be made.
pub const DEATH_RUNTIME_ENV: u32 = 11;
/// Its placement group was removed.
pub const DEATH_PLACEMENT_GROUP: u32 = 12;
