//! What a raylet is started with, its limits by name, and its errors.
//!
//! It refuses a configuration that names no control plane, bad ids and unknown limits, by name.
//!
//! Invariant: 1. Every limit of the shell is a field of `Limits`, with a default, and can be set by `system_config`.

use serde::Deserialize;
use std::collections::BTreeMap;
use std::path::PathBuf;

/// Why the raylet could not start, or had to stop.
#[derive(Debug, thiserror::Error)]
pub enum RayletError {
    #[error("the raylet's configuration is unusable: {0}")]
    Config(String),
    #[error("cannot {what}: {source}")]
    Io { what: String, source: std::io::Error },
    #[error(transparent)]
    Rpc(#[from] ray_rpc::RpcError),
    #[error("the object store: {0}")]
    Store(#[from] ray_store::StoreError),
    #[error("the node's resources: {0}")]
    Resources(#[from] ray_sched::SchedError),
    #[error("the control plane refused this node: {0}")]
    Refused(String),
    #[error("the control plane was unreachable for {0} s")]
    ControlPlaneGone(u64),
}

impl RayletError {
    pub(crate) fn io(what: impl Into<String>, source: impl Into<std::io::Error>) -> Self {
        Self::Io {
            what: what.into(),
            source: source.into(),
        }
    }
}

/// How a raylet is started; JSON.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RayletConfig {
    /// Hexadecimal; made at random where it is absent.
    #[serde(default)]
    pub node_id: Option<String>,
    pub session_directory: PathBuf,
    /// Default: `<session>/sockets/raylet-<node hex>`.
    #[serde(default)]
    pub socket_path: Option<PathBuf>,
    /// The control plane's socket, on the head node.
    #[serde(default)]
    pub gcs_socket: Option<PathBuf>,
    /// The head node's `host:port`, elsewhere.
    #[serde(default)]
    pub gcs_address: Option<String>,
    #[serde(default = "default_host")]
    pub host: String,
    /// The node's one TCP port; 0 takes any.
    #[serde(default)]
    pub port: u16,
    pub auth_token: String,
    #[serde(default)]
    pub is_head: bool,
    #[serde(default)]
    pub node_name: String,
    #[serde(default)]
    pub resources: BTreeMap<String, f64>,
    #[serde(default)]
    pub labels: BTreeMap<String, String>,
    pub object_store_memory_bytes: u64,
    /// Default: in `/dev/shm`, or the session directory where that is too small.
    #[serde(default)]
    pub store_path: Option<PathBuf>,
    pub python_executable: PathBuf,
    /// Put before the zygote's `sys.path`.
    #[serde(default)]
    pub python_path: Vec<String>,
    #[serde(default)]
    pub worker_env: BTreeMap<String, String>,
    /// Default: `<session>/logs`.
    #[serde(default)]
    pub log_directory: Option<PathBuf>,
    /// One line of JSON is written here once the node is registered.
    #[serde(default)]
    pub ready_fd: Option<i32>,
    /// End-of-file here means that whoever started the raylet is gone: it leaves.
    #[serde(default)]
    pub parent_fd: Option<i32>,
    #[serde(default)]
    pub system_config: BTreeMap<String, serde_json::Value>,
    /// Socket and pid of a zygote that was forked for this raylet before; else it starts one.
    #[serde(skip)]
    pub zygote: Option<(i32, u32)>,
}

fn default_host() -> String {
    "127.0.0.1".into()
}

macro_rules! limits {
    ($($(#[$doc:meta])* $name:ident: $default:expr;)*) => {
        /// The shell's limits; each can be set by name in `system_config`.
        #[derive(Debug, Clone)]
        pub struct Limits { $($(#[$doc])* pub $name: u64,)* }

        impl Default for Limits {
            fn default() -> Self {
                Self { $($name: $default,)* }
            }
        }

        impl Limits {
            /// Sets one by name. False where there is no such limit.
            pub fn set(&mut self, name: &str, value: u64) -> bool {
                match name {
                    $(stringify!($name) => self.$name = value,)*
                    _ => return false,
                }
                true
            }
        }
    };
}

limits! {
    /// Least time between two resource reports.
    resource_report_interval_ms: 20;
    /// How long after a worker's link closed its exit status may take, before it is killed.
    worker_exit_wait_ms: 1_000;
    /// How long the control plane may be away before a raylet gives up.
    gcs_away_limit_ms: 60_000;
    /// Longest wait between two attempts to reach the control plane.
    gcs_retry_maximum_ms: 1_000;
    /// How long a request for room in the object store waits without progress.
    object_store_full_wait_ms: 10_000;
    /// Length of a chunk in transfer between nodes.
    object_chunk_bytes: 4 << 20;
    /// Chunks of one object asked for at once.
    object_chunk_window: 4;
    /// How long a chunk may take before another location is tried.
    object_chunk_timeout_ms: 30_000;
    /// Bytes of objects that arrive at once, at most; one object may always arrive.
    object_pull_bytes: 1 << 30;
    /// Least size of a spill file, where there is that much to spill.
    spill_file_bytes: 64 << 20;
    /// Time between two readings of a log file that changes.
    log_interval_ms: 20;
    /// Bytes of one log file that are sent at once.
    log_batch_bytes: 1 << 20;
    /// Lines of a dead worker's log that its cause of death holds.
    log_tail_lines: 20;
    /// Deaths that are remembered for those who ask later.
    deaths_remembered: 10_000;
    /// How long after a link to another raylet was lost it is asked again.
    elsewhere_retry_ms: 500;
    /// Processes that may use the object store at once.
    maximum_store_clients: 4_096;
    /// Objects in the store at once. 0: as many as the store can hold, as what is stored has more than 100 KiB each.
    maximum_objects: 0;
    /// Workers on this node at once.
    maximum_workers: 4_000;
    /// Fresh workers kept ready.
    spare_workers: 0;
    /// Workers started at once.
    maximum_starting_workers: 0;
    /// How long a worker may take to register.
    worker_start_timeout_ms: 60_000;
    /// How long a worker that was asked to leave may take.
    graceful_exit_ms: 30_000;
    /// How long an idle worker beyond those kept stays.
    idle_worker_ms: 1_000;
}

/// Memory of the index is taken before anybody is served, so it is not made larger than the objects can fill.
const LEAST_BYTES_AN_OBJECT: u64 = 64 << 10;

impl RayletConfig {
    /// How many objects the store's index has room for.
    pub fn maximum_objects(&self, limits: &Limits) -> u32 {
        let number = match limits.maximum_objects {
            0 => (self.object_store_memory_bytes / LEAST_BYTES_AN_OBJECT).clamp(4_096, 1 << 20),
            number => number,
        };
        u32::try_from(number).unwrap_or(u32::MAX)
    }

    /// Where logs are written.
    pub fn log_directory(&self) -> PathBuf {
        self.log_directory
            .clone()
            .unwrap_or_else(|| self.session_directory.join("logs"))
    }

    /// The limits with what `system_config` sets. Names that are no limits of a raylet belong to others.
    pub fn limits(&self) -> Result<Limits, RayletError> {
        let mut limits = Limits::default();
        for (name, value) in &self.system_config {
            if let Some(number) = value.as_u64() {
                limits.set(name, number);
            }
        }
        if limits.object_chunk_bytes == 0 || limits.object_chunk_window == 0 {
            return Err(RayletError::Config(
                "object_chunk_bytes and object_chunk_window must be above 0".into(),
            ));
        }
        Ok(limits)
    }
}
