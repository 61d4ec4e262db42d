//! The raylet: a node's leases, workers, object store and transfer.
//!
//! The decisions are in pure machines (`scheduler` with its parts, `objects` with its parts); `shell` carries them out.
//!
//! Invariants are stated in each module; here: 1. no machine knows a clock or a socket.

mod actors;
mod dispatch;
pub mod elsewhere;
mod leases;
pub mod objects;
pub mod placement;
pub mod pull;
pub mod queues;
mod report;
pub mod scheduler;
pub mod shell;
pub mod spill;
pub mod types;
pub mod worker_pool;

pub use shell::{run, RayletConfig, RayletError};
