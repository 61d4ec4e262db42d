//! The raylet's shell: carries out what the pure machines decide, over links, processes and files.
//!
//! One thread serves everything; handlers never block. Files of spilled objects are read and written by a thread of
//! their own. It refuses frames that make no sense by closing their link with a sentence.
//!
//! The parts: `node` (state, routing of frames, timers), `commands` (what the scheduler says), `processes` (who is
//! registered, and how they die), `gcs` (the control plane's link), `zygote`, `memory` (the object store), `transfer`
//! (between raylets), `elsewhere` (what raylets tell each other of processes and copies), `spilling` (the thread that writes files), `logs`, `query`, `evidence`, `config`.
//!
//! Invariants:
//! 1. After `run` returns, no process, socket, store or evidence file that it made is left.

mod commands;
pub mod config;
mod elsewhere;
mod evidence;
mod gcs;
mod logs;
mod memory;
mod memory_report;
mod node;
mod processes;
mod query;
mod registration;
mod relay;
mod setup;
mod signals;
mod spilling;
mod transfer;
mod workers;
mod zygote;

pub use config::{Limits, RayletConfig, RayletError};

use node::Node;
use ray_rpc::{CloseReason, Frame, Link, Reactor, Service, Target};
use std::os::fd::{FromRawFd, OwnedFd};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

/// Serves the reactor. The lock is never contended: one thread leads, and the spill thread only wakes it.
struct Shell {
    node: Mutex<Node>,
}

impl Shell {
    fn node(&self) -> MutexGuard<'_, Node> {
        self.node.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Service for Shell {
    fn on_frame(&self, link: &Arc<Link>, frame: Frame) {
        let mut node = self.node();
        node.on_frame(link, frame);
        node.after();
    }

    fn on_ready(&self, link: &Arc<Link>, peer_hello: &[u8]) {
        let mut node = self.node();
        node.on_ready(link, peer_hello);
        node.after();
    }

    fn on_closed(&self, link: &Arc<Link>, reason: &CloseReason) {
        let mut node = self.node();
        node.on_closed(link, reason);
        node.after();
    }

    fn on_stranger(&self, socket: OwnedFd, target: Target) {
        self.node().on_stranger(socket, target);
    }

    fn on_wake(&self) {
        let mut node = self.node();
        node.on_wake();
        node.after();
    }

    fn on_timer(&self, now: Instant) -> Option<Instant> {
        let mut node = self.node();
        node.on_timer(now);
        node.next_due()
    }

    fn on_descriptor_ready(&self, token: u64) {
        let mut node = self.node();
        node.on_descriptor(token);
        node.after();
    }
}

/// Runs a raylet on this thread until SIGTERM, SIGINT, the end of its parent's pipe, or an error that it cannot outlive.
pub fn run(config: RayletConfig) -> Result<(), RayletError> {
    let signals = signals::Signals::block()?;
    rustix::process::set_child_subreaper(Some(rustix::process::getpid()))
        .map_err(|error| RayletError::io("become the reaper of orphaned workers", error))?;
    // First of all, because its imports take longer than everything else that this process does before it is ready.
    let command = zygote::ZygoteCommand::of(&config);
    std::fs::create_dir_all(&command.log_directory)
        .map_err(|error| RayletError::io(format!("make {}", command.log_directory.display()), error))?;
    let zygote = match config.zygote {
        Some((descriptor, pid)) => {
            // SAFETY: whoever forked the zygote left this descriptor open for it, and nobody else uses it.
            zygote::Zygote::adopt(unsafe { OwnedFd::from_raw_fd(descriptor) }, pid)?
        }
        None => zygote::Zygote::start(&command)?,
    };
    let rpc = ray_rpc::Config {
        spin_us: 0,
        ..Default::default()
    };
    let reactor = Reactor::new(rpc)?;
    let node = Node::new(config, reactor.clone(), signals, zygote)?;
    let shell = Arc::new(Shell { node: Mutex::new(node) });
    reactor.set_service(shell.clone())?;
    let started = {
        let mut node = shell.node();
        let started = node.start();
        node.after();
        started
    };
    if started.is_ok() {
        reactor.run();
    }
    let mut node = shell.node();
    node.shut_down();
    started.and(node.take_outcome())
}
