//! The control plane: owns nodes, jobs, actors, placement groups, key-value and publications, and keeps them on disk.
//!
//! The decisions are in `Gcs`, a pure machine: `step(event, now_ms, random) -> commands`. It knows no socket, clock,
//! thread or file. `shell::run` feeds it frames and carries out its commands; `storage` keeps what it must not forget.
//!
//! Invariants (each file states its own):
//! 1. What is acknowledged is durable: a step's `Persist` comes before every send that depends on it.
//! 2. A node is declared dead once, and nothing that it sends afterwards changes anything.
//! 3. Every table is bounded and every wait has a deadline or a reason that a query shows.

pub mod actor_requests;
pub mod actors;
pub mod error;
pub mod group_requests;
pub mod jobs;
pub mod kv;
pub mod messages;
pub mod nodes;
pub mod placement_groups;
pub mod placing;
pub mod publish;
pub mod query;
pub mod reconcile;
pub mod records;
pub mod restore;
pub mod settings;
pub mod shell;
mod signals;
pub mod state;
pub mod storage;
pub mod validate;

pub use error::GcsError;
pub use messages::{GcsMessage, NodeMessage};
pub use records::{Mutation, Row, Table};
pub use settings::GcsSettings;
pub use shell::{run, GcsConfig};
pub use state::{Command, Event, Gcs};
pub use storage::{SqliteStorage, Storage, Synchronous};
