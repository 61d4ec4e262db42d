//! Messages of the control plane: nodes, jobs, actors, placement groups, key-value, publications.
//!
//! Invariants:
//! 1. A `GcsRequest` carries a unique `request_id`, so that one repeated after a reconnection is answered and not done twice.
//! 2. Publications of a channel carry (publisher epoch, sequence); a gap is answered by a snapshot.

use bytes::Bytes;

use crate::common::{Address, DeathCause, Label, ResourceAmount};
use crate::lease::ActorCreation;

/// A raylet joins, or joins again after the control plane restarted.
#[derive(Clone, PartialEq, prost::Message)]
pub struct RegisterNode {
    #[prost(message, optional, tag = "1")]
    pub node: Option<NodeInfo>,
    /// What runs there, for a control plane that restarted. One without `worker` is being created still.
    #[prost(message, repeated, tag = "2")]
    pub actors: Vec<crate::lease::ActorCreated>,
    #[prost(message, repeated, tag = "3")]
    pub bundles: Vec<BundleKey>,
    #[prost(message, optional, tag = "4")]
    pub resources: Option<ResourceReport>,
    /// Drivers connected there.
    #[prost(bytes = "bytes", repeated, tag = "5")]
    pub driver_jobs: Vec<Bytes>,
    /// Last publication seen, to resume: epoch and sequence.
    #[prost(uint64, tag = "6")]
    pub publisher_epoch: u64,
    #[prost(uint64, tag = "7")]
    pub publisher_sequence: u64,
    /// What the processes there watch, for a control plane that restarted and for news that were lost with a link.
    #[prost(message, repeated, tag = "8")]
    pub watches: Vec<ProcessWatches>,
    /// Deaths there that the control plane has not acknowledged; the answer to the registration acknowledges them.
    #[prost(message, repeated, tag = "9")]
    pub deaths: Vec<WorkerDeathReport>,
}

/// What one process watches.
#[derive(Clone, PartialEq, prost::Message)]
pub struct ProcessWatches {
    #[prost(bytes = "bytes", tag = "1")]
    pub worker_id: Bytes,
    #[prost(bytes = "bytes", repeated, tag = "2")]
    pub actor_ids: Vec<Bytes>,
    #[prost(string, repeated, tag = "3")]
    pub channels: Vec<String>,
}

/// A node.
#[derive(Clone, PartialEq, prost::Message)]
pub struct NodeInfo {
    /// The raylet's address; its `worker_id` is nil.
    #[prost(message, optional, tag = "1")]
    pub address: Option<Address>,
    #[prost(string, tag = "2")]
    pub hostname: String,
    #[prost(string, tag = "3")]
    pub node_name: String,
    #[prost(uint32, tag = "4")]
    pub pid: u32,
    #[prost(message, repeated, tag = "5")]
    pub total: Vec<ResourceAmount>,
    #[prost(message, repeated, tag = "6")]
    pub labels: Vec<Label>,
    #[prost(bool, tag = "7")]
    pub is_head: bool,
    #[prost(string, tag = "8")]
    pub store_path: String,
    #[prost(string, tag = "9")]
    pub session_directory: String,
    #[prost(bool, tag = "10")]
    pub alive: bool,
    #[prost(message, repeated, tag = "11")]
    pub available: Vec<ResourceAmount>,
    #[prost(uint64, tag = "12")]
    pub start_time_ms: u64,
    #[prost(uint64, tag = "13")]
    pub end_time_ms: u64,
    #[prost(string, tag = "14")]
    pub death_reason: String,
    #[prost(bool, tag = "15")]
    pub draining: bool,
    #[prost(string, tag = "16")]
    pub raylet_socket: String,
}

/// The node is in.
#[derive(Clone, PartialEq, prost::Message)]
pub struct NodeRegistered {
    #[prost(bytes = "bytes", tag = "1")]
    pub cluster_id: Bytes,
    #[prost(uint64, tag = "2")]
    pub publisher_epoch: u64,
    /// Every node known.
    #[prost(message, repeated, tag = "3")]
    pub nodes: Vec<NodeInfo>,
    /// Not empty: refused, for this reason.
    #[prost(string, tag = "4")]
    pub refusal: String,
    /// Actor incarnations that lost a race and are to be killed.
    #[prost(message, repeated, tag = "5")]
    pub superseded: Vec<KillActorWorker>,
    /// JSON: session name and system config of the cluster.
    #[prost(string, tag = "6")]
    pub details_json: String,
    /// Jobs that are over.
    #[prost(bytes = "bytes", repeated, tag = "7")]
    pub finished_jobs: Vec<Bytes>,
}

/// What a node has free and what waits there.
#[derive(Clone, PartialEq, prost::Message)]
pub struct ResourceReport {
    #[prost(message, repeated, tag = "1")]
    pub total: Vec<ResourceAmount>,
    /// Idle sticky leases count as free.
    #[prost(message, repeated, tag = "2")]
    pub available: Vec<ResourceAmount>,
    #[prost(message, repeated, tag = "3")]
    pub demands: Vec<Demand>,
    #[prost(uint64, tag = "4")]
    pub sequence: u64,
    #[prost(uint64, tag = "5")]
    pub idle_ms: u64,
    /// How many PLACE_ACTOR and PREPARE_BUNDLES of this link (since its REGISTER_NODE) the raylet had taken in when it
    /// wrote this: what they hold is no longer in `available`.
    #[prost(uint64, tag = "6")]
    pub placements_seen: u64,
}

/// Work that waits.
#[derive(Clone, PartialEq, prost::Message)]
pub struct Demand {
    #[prost(message, repeated, tag = "1")]
    pub resources: Vec<ResourceAmount>,
    #[prost(uint64, tag = "2")]
    pub count: u64,
    #[prost(bool, tag = "3")]
    pub infeasible: bool,
}

/// Nodes that changed.
#[derive(Clone, PartialEq, prost::Message)]
pub struct ClusterUpdate {
    #[prost(message, repeated, tag = "1")]
    pub nodes: Vec<NodeInfo>,
}

/// A question or order for the control plane.
#[derive(Clone, PartialEq, prost::Message)]
pub struct GcsRequest {
    /// Random, once per request; 0 for questions that change nothing.
    #[prost(uint64, tag = "1")]
    pub request_id: u64,
    /// The process that asks; the raylet fills it in.
    #[prost(message, optional, tag = "2")]
    pub sender: Option<Address>,
    #[prost(
        oneof = "GcsCall",
        tags = "10,11,12,13,14,15,16,17,18,19,20,21,22,23,24,25,26,27,28,29"
    )]
    pub call: Option<GcsCall>,
}

/// The calls.
// A call lives for the length of one decoding; the largest is the most frequent, so boxing it would only cost.
#[allow(clippy::large_enum_variant)]
#[derive(Clone, PartialEq, prost::Oneof)]
pub enum GcsCall {
    #[prost(message, tag = "10")]
    KvPut(KvPut),
    #[prost(message, tag = "11")]
    KvGet(KvKey),
    #[prost(message, tag = "12")]
    KvDelete(KvKey),
    #[prost(message, tag = "13")]
    KvKeys(KvKey),
    #[prost(message, tag = "14")]
    KvExists(KvKey),
    /// From a raylet for a driver that registered there.
    #[prost(message, tag = "15")]
    AddJob(AddJob),
    /// From a raylet for a driver that left or died.
    #[prost(message, tag = "16")]
    FinishJob(JobKey),
    #[prost(message, tag = "17")]
    RegisterActor(RegisterActor),
    /// Subscribes the sender to an actor's states; the current one is published at once.
    #[prost(message, tag = "18")]
    WatchActor(ActorKey),
    #[prost(message, tag = "19")]
    GetNamedActor(ActorName),
    #[prost(message, tag = "20")]
    KillActor(KillActor),
    /// The owner holds no handle any more.
    #[prost(message, tag = "21")]
    ActorOutOfScope(ActorKey),
    #[prost(message, tag = "22")]
    CreatePlacementGroup(PlacementGroupSpecification),
    #[prost(message, tag = "23")]
    RemovePlacementGroup(PlacementGroupKey),
    /// Answered when the group is created, removed, or the time is over.
    #[prost(message, tag = "24")]
    WaitPlacementGroup(PlacementGroupKey),
    /// `{"method": "nodes" | "actors" | "jobs" | "placement_groups" | "named_actors" | "cluster_resources" |
    /// "available_resources" | "placement_group" | "actor" | "internal_config" | …}`, answered in JSON.
    #[prost(message, tag = "25")]
    Query(JsonQuery),
    #[prost(message, tag = "26")]
    UnwatchActor(ActorKey),
    /// Subscribes the sender to a channel of `Publication`s.
    #[prost(message, tag = "27")]
    Subscribe(Subscribe),
    #[prost(message, tag = "28")]
    Drain(DrainNode),
    /// Something for the subscribers of a channel.
    #[prost(message, tag = "29")]
    Publish(Publish),
}

/// The answer to a `GcsRequest`.
#[derive(Clone, PartialEq, prost::Message)]
pub struct GcsReply {
    /// Not empty: it failed, for this reason.
    #[prost(string, tag = "1")]
    pub error: String,
    /// See the `GCS_ERROR_*` constants.
    #[prost(uint32, tag = "2")]
    pub error_kind: u32,
    /// KvGet: whether the key was there. KvPut: whether it was new. KvExists, KvDelete, WaitPlacementGroup: yes or no.
    #[prost(bool, tag = "3")]
    pub found: bool,
    #[prost(bytes = "bytes", tag = "4")]
    pub value: Bytes,
    #[prost(bytes = "bytes", repeated, tag = "5")]
    pub keys: Vec<Bytes>,
    /// AddJob, KvDelete by prefix: a number.
    #[prost(uint64, tag = "6")]
    pub number: u64,
    #[prost(string, tag = "7")]
    pub json: String,
    #[prost(message, optional, tag = "8")]
    pub actor: Option<ActorState>,
}

/// Not one of the others.
pub const GCS_ERROR_OTHER: u32 = 1;
/// The actor's name is taken.
pub const GCS_ERROR_NAME_TAKEN: u32 = 2;
/// No such thing.
pub const GCS_ERROR_NOT_FOUND: u32 = 3;
/// The request makes no sense.
pub const GCS_ERROR_INVALID: u32 = 4;
/// The cluster's storage failed.
pub const GCS_ERROR_STORAGE: u32 = 5;

/// Stores a value.
#[derive(Clone, PartialEq, prost::Message)]
pub struct KvPut {
    #[prost(bytes = "bytes", tag = "1")]
    pub namespace: Bytes,
    #[prost(bytes = "bytes", tag = "2")]
    pub key: Bytes,
    #[prost(bytes = "bytes", tag = "3")]
    pub value: Bytes,
    #[prost(bool, tag = "4")]
    pub overwrite: bool,
    /// The job with which the key goes, or empty.
    #[prost(bytes = "bytes", tag = "5")]
    pub job_id: Bytes,
}

/// Names a key, or a prefix of keys.
#[derive(Clone, PartialEq, prost::Message)]
pub struct KvKey {
    #[prost(bytes = "bytes", tag = "1")]
    pub namespace: Bytes,
    #[prost(bytes = "bytes", tag = "2")]
    pub key: Bytes,
    #[prost(bool, tag = "3")]
    pub prefix: bool,
    /// KvGet of a key that is not there yet waits this long for it.
    #[prost(uint32, tag = "4")]
    pub wait_ms: u32,
}

/// A driver's job begins. The answer's `number` is the job's.
#[derive(Clone, PartialEq, prost::Message)]
pub struct AddJob {
    #[prost(message, optional, tag = "1")]
    pub driver: Option<Address>,
    #[prost(uint32, tag = "2")]
    pub pid: u32,
    #[prost(string, tag = "3")]
    pub config_json: String,
    /// The number wanted, for a driver that a restarted control plane does not know; 0 for a new one.
    #[prost(uint32, tag = "4")]
    pub job_number: u32,
}

/// Names a job.
#[derive(Clone, PartialEq, prost::Message)]
pub struct JobKey {
    #[prost(bytes = "bytes", tag = "1")]
    pub job_id: Bytes,
}

/// Makes an actor known and has it placed.
#[derive(Clone, PartialEq, prost::Message)]
pub struct RegisterActor {
    #[prost(bytes = "bytes", tag = "1")]
    pub actor_id: Bytes,
    #[prost(message, optional, tag = "2")]
    pub creation: Option<ActorCreation>,
    /// If the name is taken, answer with the actor that has it.
    #[prost(bool, tag = "3")]
    pub get_if_exists: bool,
}

/// Names an actor.
#[derive(Clone, PartialEq, prost::Message)]
pub struct ActorKey {
    #[prost(bytes = "bytes", tag = "1")]
    pub actor_id: Bytes,
    /// For `WatchActor`: the owner as the handle names it, so that an owner that died before it registered the actor
    /// leaves nobody waiting.
    #[prost(message, optional, tag = "2")]
    pub owner: Option<Address>,
}

/// Names a named actor.
#[derive(Clone, PartialEq, prost::Message)]
pub struct ActorName {
    #[prost(string, tag = "1")]
    pub name: String,
    #[prost(string, tag = "2")]
    pub namespace: String,
}

/// `ray.kill`.
#[derive(Clone, PartialEq, prost::Message)]
pub struct KillActor {
    #[prost(bytes = "bytes", tag = "1")]
    pub actor_id: Bytes,
    #[prost(bool, tag = "2")]
    pub no_restart: bool,
}

/// Orders a raylet to end an actor's worker.
#[derive(Clone, PartialEq, prost::Message)]
pub struct KillActorWorker {
    #[prost(bytes = "bytes", tag = "1")]
    pub actor_id: Bytes,
    #[prost(uint64, tag = "2")]
    pub incarnation: u64,
    #[prost(message, optional, tag = "3")]
    pub cause: Option<DeathCause>,
    /// Let what runs finish first (out of scope), within a limit.
    #[prost(bool, tag = "4")]
    pub graceful: bool,
}

/// A process of a node is dead, and what it was.
#[derive(Clone, PartialEq, prost::Message)]
pub struct WorkerDeathReport {
    #[prost(message, optional, tag = "1")]
    pub worker: Option<Address>,
    #[prost(message, optional, tag = "2")]
    pub cause: Option<DeathCause>,
    /// The actor it was, or empty.
    #[prost(bytes = "bytes", tag = "3")]
    pub actor_id: Bytes,
    #[prost(uint64, tag = "4")]
    pub incarnation: u64,
    /// The job it drove, or empty.
    #[prost(bytes = "bytes", tag = "5")]
    pub driver_job_id: Bytes,
}

/// A job is over: its workers leave.
#[derive(Clone, PartialEq, prost::Message)]
pub struct JobFinished {
    #[prost(bytes = "bytes", tag = "1")]
    pub job_id: Bytes,
}

/// What is known of an actor.
#[derive(Clone, PartialEq, prost::Message)]
pub struct ActorState {
    #[prost(bytes = "bytes", tag = "1")]
    pub actor_id: Bytes,
    /// See the `ACTOR_*` constants.
    #[prost(uint32, tag = "2")]
    pub state: u32,
    #[prost(message, optional, tag = "3")]
    pub worker: Option<Address>,
    #[prost(uint64, tag = "4")]
    pub incarnation: u64,
    #[prost(message, optional, tag = "5")]
    pub death: Option<DeathCause>,
    #[prost(uint32, tag = "6")]
    pub restarts: u32,
    #[prost(sint32, tag = "7")]
    pub max_restarts: i32,
    #[prost(string, tag = "8")]
    pub name: String,
    #[prost(string, tag = "9")]
    pub namespace: String,
    #[prost(string, tag = "10")]
    pub class_name: String,
    #[prost(bytes = "bytes", tag = "11")]
    pub handle_metadata: Bytes,
    #[prost(message, optional, tag = "12")]
    pub owner: Option<Address>,
    #[prost(sint32, tag = "13")]
    pub max_task_retries: i32,
    /// Why it is not placed yet, for `why`.
    #[prost(string, tag = "14")]
    pub pending_reason: String,
    #[prost(bool, tag = "15")]
    pub infeasible: bool,
    #[prost(bool, tag = "16")]
    pub detached: bool,
    #[prost(uint32, tag = "17")]
    pub pid: u32,
    #[prost(bool, tag = "18")]
    pub out_of_order: bool,
    #[prost(sint32, tag = "19")]
    pub max_pending_calls: i32,
}

/// `DEPENDENCIES_UNREADY`.
pub const ACTOR_DEPENDENCIES_UNREADY: u32 = 0;
/// `PENDING_CREATION`.
pub const ACTOR_PENDING_CREATION: u32 = 1;
/// `ALIVE`.
pub const ACTOR_ALIVE: u32 = 2;
/// `RESTARTING`.
pub const ACTOR_RESTARTING: u32 = 3;
/// `DEAD`.
pub const ACTOR_DEAD: u32 = 4;

/// A placement group to make.
#[derive(Clone, PartialEq, prost::Message)]
pub struct PlacementGroupSpecification {
    #[prost(bytes = "bytes", tag = "1")]
    pub placement_group_id: Bytes,
    #[prost(message, repeated, tag = "2")]
    pub bundles: Vec<BundleSpecification>,
    /// 0 PACK, 1 SPREAD, 2 STRICT_PACK, 3 STRICT_SPREAD.
    #[prost(uint32, tag = "3")]
    pub strategy: u32,
    #[prost(string, tag = "4")]
    pub name: String,
    #[prost(bool, tag = "5")]
    pub detached: bool,
    #[prost(bytes = "bytes", tag = "6")]
    pub job_id: Bytes,
    #[prost(bytes = "bytes", tag = "7")]
    pub creator_actor_id: Bytes,
    #[prost(bytes = "bytes", tag = "8")]
    pub soft_target_node_id: Bytes,
    #[prost(string, tag = "9")]
    pub namespace: String,
}

/// One bundle.
#[derive(Clone, PartialEq, prost::Message)]
pub struct BundleSpecification {
    #[prost(message, repeated, tag = "1")]
    pub resources: Vec<ResourceAmount>,
    #[prost(message, repeated, tag = "2")]
    pub labels: Vec<crate::common::LabelCondition>,
}

/// Names a placement group.
#[derive(Clone, PartialEq, prost::Message)]
pub struct PlacementGroupKey {
    #[prost(bytes = "bytes", tag = "1")]
    pub placement_group_id: Bytes,
    /// For `WaitPlacementGroup`: at most this long.
    #[prost(uint64, tag = "2")]
    pub wait_ms: u64,
    /// Or by name and namespace.
    #[prost(string, tag = "3")]
    pub name: String,
    #[prost(string, tag = "4")]
    pub namespace: String,
}

/// Names a bundle.
#[derive(Clone, PartialEq, prost::Message)]
pub struct BundleKey {
    #[prost(bytes = "bytes", tag = "1")]
    pub placement_group_id: Bytes,
    #[prost(uint32, tag = "2")]
    pub index: u32,
    #[prost(message, repeated, tag = "3")]
    pub resources: Vec<ResourceAmount>,
    #[prost(bool, tag = "4")]
    pub committed: bool,
}

/// First phase: reserve these on this node.
#[derive(Clone, PartialEq, prost::Message)]
pub struct PrepareBundles {
    #[prost(message, repeated, tag = "1")]
    pub bundles: Vec<BundleKey>,
    /// Which attempt to place the group this is; an answer to an older one is ignored.
    #[prost(uint64, tag = "2")]
    pub attempt: u64,
}

/// The answer: all or none.
#[derive(Clone, PartialEq, prost::Message)]
pub struct BundlesPrepared {
    #[prost(bytes = "bytes", tag = "1")]
    pub placement_group_id: Bytes,
    #[prost(uint64, tag = "2")]
    pub attempt: u64,
    #[prost(bool, tag = "3")]
    pub success: bool,
}

/// Second phase: make them usable.
#[derive(Clone, PartialEq, prost::Message)]
pub struct CommitBundles {
    #[prost(bytes = "bytes", tag = "1")]
    pub placement_group_id: Bytes,
    #[prost(uint64, tag = "2")]
    pub attempt: u64,
}

/// Done.
#[derive(Clone, PartialEq, prost::Message)]
pub struct BundlesCommitted {
    #[prost(bytes = "bytes", tag = "1")]
    pub placement_group_id: Bytes,
    #[prost(uint64, tag = "2")]
    pub attempt: u64,
}

/// Give up bundles of the group on this node.
#[derive(Clone, PartialEq, prost::Message)]
pub struct ReturnBundles {
    #[prost(bytes = "bytes", tag = "1")]
    pub placement_group_id: Bytes,
    #[prost(uint64, tag = "2")]
    pub attempt: u64,
    /// These bundles; empty: every one.
    #[prost(uint32, repeated, tag = "3")]
    pub indices: Vec<u32>,
}

/// A question in JSON.
#[derive(Clone, PartialEq, prost::Message)]
pub struct JsonQuery {
    #[prost(string, tag = "1")]
    pub query_json: String,
}

/// Subscribes to a channel (`"jobs"`, `"nodes"`, `"errors"`, `"logs"`).
#[derive(Clone, PartialEq, prost::Message)]
pub struct Subscribe {
    #[prost(string, tag = "1")]
    pub channel: String,
}

/// Something for the subscribers of a channel.
#[derive(Clone, PartialEq, prost::Message)]
pub struct Publish {
    #[prost(string, tag = "1")]
    pub channel: String,
    #[prost(string, tag = "2")]
    pub json: String,
}

/// The node was declared dead: a raylet that reads it exits.
#[derive(Clone, PartialEq, prost::Message)]
pub struct LeavesCluster {
    #[prost(string, tag = "1")]
    pub reason: String,
}

/// The descriptor that travels with this frame is an authenticated socket of a peer that wants the receiver.
#[derive(Clone, PartialEq, prost::Message)]
pub struct HandOver {
    /// Who is at its other end, for logs.
    #[prost(string, tag = "1")]
    pub peer: String,
}

/// No new work there; it leaves at the deadline.
#[derive(Clone, PartialEq, prost::Message)]
pub struct DrainNode {
    #[prost(bytes = "bytes", tag = "1")]
    pub node_id: Bytes,
    #[prost(string, tag = "2")]
    pub reason: String,
    /// Milliseconds since 1970; 0 without limit.
    #[prost(uint64, tag = "3")]
    pub deadline_ms: u64,
}

/// News, from the control plane to those who asked for it.
#[derive(Clone, PartialEq, prost::Message)]
pub struct Publication {
    #[prost(uint64, tag = "1")]
    pub epoch: u64,
    #[prost(uint64, tag = "2")]
    pub sequence: u64,
    /// The processes of the node it is for; empty: every one that asked for that actor or channel.
    #[prost(bytes = "bytes", repeated, tag = "3")]
    pub subscribers: Vec<Bytes>,
    #[prost(message, optional, tag = "4")]
    pub actor: Option<ActorState>,
    #[prost(string, tag = "5")]
    pub channel: String,
    #[prost(string, tag = "6")]
    pub json: String,
}
