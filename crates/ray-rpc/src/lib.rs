//! Links between processes: ordered frames both ways over Unix sockets on a node and TCP between nodes, served by
//! whichever thread waits, with no hop between threads and no asynchronous runtime.
//!
//! It owns sockets, framing, the Hello, the TCP challenge, who reads (the leader token), when threads spin or sleep, and
//! why links close. It refuses peers that cannot prove themselves, frames that contradict themselves and handlers that
//! wait. What frames mean belongs to its users.
//!
//! Invariants:
//! 1. Frames of a link are delivered in the order they were sent, between `on_ready` and `on_closed`, each exactly once.
//! 2. At most one thread reads and dispatches; while a background thread runs, somebody always does or will be woken to.
//! 3. No call blocks in a write or a connect.
//! 4. Nothing a peer sends makes this process panic or reserve memory beyond the frame limit.

#[doc(hidden)]
pub mod sync;
#[doc(hidden)]
pub mod token;

#[cfg(not(loom))]
mod auth;
#[cfg(not(loom))]
mod background;
#[cfg(not(loom))]
mod config;
#[cfg(not(loom))]
mod descriptors;
#[cfg(not(loom))]
mod error;
#[cfg(not(loom))]
pub mod frame;
#[cfg(not(loom))]
mod incoming;
#[cfg(not(loom))]
mod lead;
#[cfg(not(loom))]
mod link;
#[cfg(not(loom))]
mod outgoing;
#[cfg(not(loom))]
mod reactor;
#[cfg(not(loom))]
mod registry;
#[cfg(not(loom))]
mod socket;
#[cfg(not(loom))]
mod sources;
#[cfg(not(loom))]
mod spin;
#[cfg(not(loom))]
mod stats;

#[cfg(not(loom))]
pub use auth::AuthToken;
#[cfg(not(loom))]
pub use config::{Config, FaultAction, FaultPolicy, Peer, Service, SharedSpinSlots, SpinGate, Target, UserData};
#[cfg(not(loom))]
pub use descriptors::raise_descriptor_limit;
#[cfg(not(loom))]
pub use error::{CloseCause, CloseReason, RpcError};
#[cfg(not(loom))]
pub use frame::Frame;
#[cfg(not(loom))]
pub use link::Link;
#[cfg(not(loom))]
pub use reactor::{Reactor, WaitOutcome};
#[cfg(not(loom))]
pub use socket::path_before_listening;
#[cfg(not(loom))]
pub use stats::{Stats, StatsSnapshot};
#[cfg(not(loom))]
pub use token::Waiter;
