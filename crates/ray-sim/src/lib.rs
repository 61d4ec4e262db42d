//! The simulator: a whole cluster in one process and in virtual time, made of the shipping state machines.
//!
//! It links `ray_ownership` (reference tables, lineage, leases, actors' calls and order, sessions), `ray_raylet`'s local
//! scheduler with `ray_sched`, and `ray_gcs`'s control plane, and puts shells of its own around them: they run programs
//! made up from a seed, deliver the wire protocol's messages with delays, break links, and kill workers, nodes, drivers
//! and the control plane. `checks` says what must hold at each step and at the end; `mutation` names the planted faults
//! that the checks must find.
//!
//! Invariants:
//! 1. No machine is modelled: a decision that ships is made by the code that ships.
//! 2. A seed and a mutation name one run.

mod actors;
mod calls;
mod checks;
mod control;
mod executor;
mod frames;
mod inbox;
pub mod model;
mod mutation;
mod node;
mod node_link;
mod node_scheduler;
mod node_store;
mod owner;
mod process;
mod program;
mod random;
mod world;

pub use mutation::Mutation;
pub use world::{Config, Summary, World};

/// Runs one seed. An error says what was violated.
pub fn run(seed: u64, mutation: Option<Mutation>) -> Result<Summary, String> {
    World::new(Config {
        seed,
        mutation,
        trace: false,
    })
    .run()
}
