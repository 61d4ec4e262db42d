//! What an owner decides, pure: who counts on an object, how to make it again, which lease a call is pushed to, and in
//! which order an actor's calls go out. It knows neither clock nor socket nor bytes of values.
//!
//! It refuses to decide from a message twice: borrow messages carry generations, replies carry what they answer.
//!
//! Invariants are numbered in the modules: `references`, `lineage`, `leases`, `actor_calls`, `actor_order`, `session`.

pub mod actor_calls;
pub mod actor_order;
mod borrowing;
mod entry;
pub mod leases;
pub mod lineage;
mod reference_check;
pub mod references;
pub mod session;

pub use references::{ReferenceCommand, ReferenceTable};
