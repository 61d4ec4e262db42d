//! The crate's one error type.

/// What can go wrong in the core worker, apart from failures that are values of objects.
#[derive(Debug, thiserror::Error)]
pub enum WorkerError {
    /// The raylet could not be reached or refused this process.
    #[error("could not connect to the raylet at {socket}: {reason}")]
    Connect { socket: String, reason: String },
    /// The link to the raylet is gone.
    #[error("the raylet of this node is gone: {0}")]
    RayletGone(String),
    /// A wait took longer than it may.
    #[error("{what} did not answer within {limit_s} s")]
    Timeout { what: String, limit_s: f64 },
    /// The control plane refused.
    #[error("{message}")]
    Gcs { kind: u32, message: String },
    /// The object store could not take the value.
    #[error("{0}")]
    StoreFull(String),
    /// The object store failed.
    #[error(transparent)]
    Store(#[from] ray_store::StoreError),
    /// A link failed.
    #[error(transparent)]
    Rpc(#[from] ray_rpc::RpcError),
    /// A message was malformed.
    #[error(transparent)]
    Wire(#[from] ray_wire::WireError),
    /// A call over `max_pending_calls`.
    #[error("the actor has {pending} pending calls, which is its limit (max_pending_calls={limit})")]
    PendingCallsLimit { pending: usize, limit: i32 },
    /// The object is not known here.
    #[error("object {0} is not known to this process: its reference was deleted, or it came from another cluster")]
    UnknownObject(String),
    /// Nothing of the sort can be done here.
    #[error("{0}")]
    Invalid(String),
    /// The process was forked: the runtime belongs to the parent.
    #[error(
        "this process was forked from one that uses ray; the runtime belongs to the parent. Call ray.init() in a fresh \
         process, or start processes with the \"spawn\" method"
    )]
    Forked,
    /// A signal arrived: the caller looks what it left.
    #[error("interrupted by a signal")]
    Interrupted,
    /// `shutdown` was called.
    #[error("ray was shut down")]
    ShutDown,
    /// The operating system refused.
    #[error("could not {what}: {source}")]
    Io { what: &'static str, source: std::io::Error },
}
