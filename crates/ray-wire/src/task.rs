//! Messages between a caller and the process that executes: calls, replies, generators, cancellation.
//!
//! Invariant: 1. What is the same for every call of a function is in its `TaskTemplate`, sent once a link under a number
//! that the caller chose; a later `PushTask` holds the number alone.

use bytes::Bytes;

use crate::common::{Address, DeathCause, ReferenceInfo, ResourceAmount, Strategy, ValueLayout};

/// What every call of a function or method has in common.
#[derive(Clone, PartialEq, prost::Message)]
pub struct TaskTemplate {
    #[prost(bytes = "bytes", tag = "1")]
    pub job_id: Bytes,
    /// Id of the exported function or class.
    #[prost(bytes = "bytes", tag = "2")]
    pub function_id: Bytes,
    /// `module.qualname`, for errors, logs and the state API.
    #[prost(string, tag = "3")]
    pub function_name: String,
    /// The pickled function, where it is small; else it is fetched from the control plane by its id.
    #[prost(bytes = "bytes", tag = "4")]
    pub function_blob: Bytes,
    /// Name shown to people (`options(name=…)`), or empty.
    #[prost(string, tag = "5")]
    pub name: String,
    /// Number of returns; -1 dynamic, -2 streaming.
    #[prost(sint32, tag = "6")]
    pub num_returns: i32,
    #[prost(message, repeated, tag = "7")]
    pub resources: Vec<ResourceAmount>,
    #[prost(message, optional, tag = "8")]
    pub strategy: Option<Strategy>,
    /// -1 means without limit.
    #[prost(sint32, tag = "9")]
    pub max_retries: i32,
    /// Whether any exception of the function is retried.
    #[prost(bool, tag = "10")]
    pub retry_exceptions: bool,
    /// Pickled tuple of exception types that are retried, or empty.
    #[prost(bytes = "bytes", tag = "11")]
    pub retry_exception_types: Bytes,
    #[prost(string, tag = "12")]
    pub runtime_env_json: String,
    /// Calls after which the worker leaves; 0 without limit.
    #[prost(uint32, tag = "13")]
    pub max_calls: u32,
    /// The actor, for a method's call.
    #[prost(bytes = "bytes", tag = "14")]
    pub actor_id: Bytes,
    #[prost(string, tag = "15")]
    pub method_name: String,
    #[prost(string, tag = "16")]
    pub concurrency_group: String,
    /// Items a streaming generator may run ahead of its consumer; 0 without limit.
    #[prost(uint32, tag = "17")]
    pub generator_backpressure: u32,
    /// Names the scheduling class: equal keys share leases.
    #[prost(uint64, tag = "18")]
    pub scheduling_class: u64,
    #[prost(bool, tag = "19")]
    pub enable_task_events: bool,
    /// Node labels wanted (`label_selector`), as `Strategy.hard_labels` says it.
    #[prost(bool, tag = "20")]
    pub is_actor_creation: bool,
}

/// `num_returns="dynamic"`.
pub const NUM_RETURNS_DYNAMIC: i32 = -1;
/// `num_returns="streaming"`.
pub const NUM_RETURNS_STREAMING: i32 = -2;

/// A top-level reference among a call's arguments.
#[derive(Clone, PartialEq, prost::Message)]
pub struct ReferenceArgument {
    /// Position, for a positional argument.
    #[prost(uint32, tag = "1")]
    pub index: u32,
    /// Name, for a keyword argument; empty for a positional one.
    #[prost(string, tag = "2")]
    pub keyword: String,
    #[prost(message, optional, tag = "3")]
    pub reference: Option<ReferenceInfo>,
    /// The value, where the caller inlined it: it lies in the payload.
    #[prost(message, optional, tag = "4")]
    pub value: Option<ValueLayout>,
    /// Nodes known to have it in their store.
    #[prost(message, repeated, tag = "5")]
    pub locations: Vec<Address>,
}

/// One call. The payload holds the by-value arguments' pickle (`values`), then each inlined reference's value in order.
#[derive(Clone, PartialEq, prost::Message)]
pub struct PushTask {
    #[prost(bytes = "bytes", tag = "1")]
    pub task_id: Bytes,
    #[prost(uint32, tag = "2")]
    pub template_id: u32,
    #[prost(message, optional, tag = "3")]
    pub template: Option<TaskTemplate>,
    /// The lease the call runs under; empty for an actor's method.
    #[prost(bytes = "bytes", tag = "4")]
    pub lease_id: Bytes,
    /// Order of the call: on its lease, or among its caller's calls to the actor.
    #[prost(uint64, tag = "5")]
    pub sequence: u64,
    #[prost(uint32, tag = "6")]
    pub attempt: u32,
    #[prost(bytes = "bytes", tag = "7")]
    pub parent_task_id: Bytes,
    /// Pickle of (list of positional arguments, dict of keyword arguments) with `None` where a reference stands.
    #[prost(message, optional, tag = "8")]
    pub values: Option<ValueLayout>,
    /// Where the pickle is too large to travel: the object that holds it.
    #[prost(message, optional, tag = "9")]
    pub values_reference: Option<ReferenceArgument>,
    #[prost(message, repeated, tag = "10")]
    pub references: Vec<ReferenceArgument>,
    /// The actor's incarnation the caller means.
    #[prost(uint64, tag = "11")]
    pub actor_incarnation: u64,
    /// A replayed generator's items below this index were consumed or freed and are not sent again.
    #[prost(uint64, tag = "12")]
    pub generator_watermark: u64,
    /// Depth of nesting, for the order of blocked work.
    #[prost(uint32, tag = "13")]
    pub depth: u32,
}

/// One return of a call.
#[derive(Clone, PartialEq, prost::Message)]
pub struct ReturnValue {
    /// The value lies in the payload.
    #[prost(message, optional, tag = "1")]
    pub value: Option<ValueLayout>,
    /// Or in the executing node's store, with this many bytes.
    #[prost(uint64, tag = "2")]
    pub stored_bytes: u64,
    /// References inside a stored value (an inline one names them in its layout).
    #[prost(message, repeated, tag = "3")]
    pub contained: Vec<ReferenceInfo>,
    #[prost(bytes = "bytes", tag = "4")]
    pub object_id: Bytes,
}

/// A borrow that the worker keeps after the task: the owner learns of it before the argument's count goes.
#[derive(Clone, PartialEq, prost::Message)]
pub struct RetainedBorrow {
    #[prost(message, optional, tag = "1")]
    pub reference: Option<ReferenceInfo>,
    /// The borrower's generation for this object.
    #[prost(uint64, tag = "2")]
    pub generation: u64,
}

/// The answer to `PushTask`.
#[derive(Clone, PartialEq, prost::Message)]
pub struct TaskReply {
    /// See the `REPLY_*` constants.
    #[prost(uint32, tag = "1")]
    pub status: u32,
    #[prost(message, repeated, tag = "2")]
    pub returns: Vec<ReturnValue>,
    #[prost(message, repeated, tag = "3")]
    pub retained: Vec<RetainedBorrow>,
    /// Items a generator yielded in all.
    #[prost(uint64, tag = "4")]
    pub generator_items: u64,
    /// For a refusal: why.
    #[prost(string, tag = "5")]
    pub message: String,
    /// The worker leaves after this call (`max_calls`, `exit_actor`).
    #[prost(bool, tag = "6")]
    pub worker_exits: bool,
    /// Whether the exception that was raised is to be retried under `retry_exceptions`.
    #[prost(bool, tag = "7")]
    pub retryable: bool,
    /// The worker holds counts on references inside the returns until `RETURNS_ACKNOWLEDGED`.
    #[prost(bool, tag = "8")]
    pub wants_acknowledgement: bool,
    #[prost(message, optional, tag = "9")]
    pub death: Option<DeathCause>,
}

/// The returns are the function's.
pub const REPLY_OK: u32 = 0;
/// The function raised: each return holds the exception.
pub const REPLY_EXCEPTION: u32 = 1;
/// Not started: the lease is not this worker's current one. Queue again, free of charge.
pub const REPLY_STALE_LEASE: u32 = 2;
/// Cancelled before or while running.
pub const REPLY_CANCELLED: u32 = 3;
/// Not started: the call was meant for another incarnation of the actor.
pub const REPLY_STALE_INCARNATION: u32 = 4;
/// Seen already by the actor (a resent call): its first reply counts.
pub const REPLY_DUPLICATE: u32 = 5;
/// An argument could not be had; `message` says why and returns hold the error.
pub const REPLY_ARGUMENT_FAILED: u32 = 6;
/// The template's number was not known on this link: send it again with its template.
pub const REPLY_UNKNOWN_TEMPLATE: u32 = 7;

/// Asks an executing process to give up a call.
#[derive(Clone, PartialEq, prost::Message)]
pub struct CancelTask {
    #[prost(bytes = "bytes", tag = "1")]
    pub task_id: Bytes,
    #[prost(bool, tag = "2")]
    pub force: bool,
    #[prost(bool, tag = "3")]
    pub recursive: bool,
}

/// Asks for calls that have not started.
#[derive(Clone, PartialEq, prost::Message)]
pub struct RecallTasks {
    #[prost(bytes = "bytes", tag = "1")]
    pub lease_id: Bytes,
}

/// The calls given back, by their correlations: they will not run.
#[derive(Clone, PartialEq, prost::Message)]
pub struct TasksRecalled {
    #[prost(uint64, repeated, tag = "1")]
    pub correlations: Vec<u64>,
}

/// One item of a streaming generator; the correlation is the call's.
#[derive(Clone, PartialEq, prost::Message)]
pub struct GeneratorItem {
    #[prost(bytes = "bytes", tag = "1")]
    pub task_id: Bytes,
    /// From 0.
    #[prost(uint64, tag = "2")]
    pub index: u64,
    #[prost(message, optional, tag = "3")]
    pub item: Option<ReturnValue>,
    #[prost(uint32, tag = "4")]
    pub attempt: u32,
}

/// The consumer has taken items below `consumed`.
#[derive(Clone, PartialEq, prost::Message)]
pub struct GeneratorConsumed {
    #[prost(bytes = "bytes", tag = "1")]
    pub task_id: Bytes,
    #[prost(uint64, tag = "2")]
    pub consumed: u64,
    /// The consumer is gone: stop.
    #[prost(bool, tag = "3")]
    pub abandoned: bool,
}

/// The first frame of a caller to an actor on a fresh link.
#[derive(Clone, PartialEq, prost::Message)]
pub struct CallerHello {
    #[prost(message, optional, tag = "1")]
    pub caller: Option<Address>,
    /// The first sequence that this link will carry.
    #[prost(uint64, tag = "2")]
    pub next_sequence: u64,
    #[prost(bytes = "bytes", tag = "3")]
    pub actor_id: Bytes,
}

/// The first word of a process on a link to a process of another node: what it took in over the links before. The rest is
/// sent again.
#[derive(Clone, Copy, PartialEq, prost::Message)]
pub struct SessionResume {
    #[prost(uint64, tag = "1")]
    pub received: u64,
}

/// So many frames were taken in, so that the sender need not keep them.
#[derive(Clone, Copy, PartialEq, prost::Message)]
pub struct SessionAcknowledge {
    #[prost(uint64, tag = "1")]
    pub received: u64,
}
