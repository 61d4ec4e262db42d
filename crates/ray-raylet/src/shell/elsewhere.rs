//! What raylets tell each other of processes and copies: owns asking the raylets of processes whose deaths matter here,
//! and telling owners of the copies that arrived.
//!
//! The raylet that received a copy tells the owner itself. Were it the process that fetched it, a process that dies in
//! that moment would leave a copy that its owner does not know and never frees.
//!
//! Invariants:
//! 1. Whatever was asked or told over a link that closed is asked and told again, until the other node is dead.
//! 2. A copy whose owner is known to be dead is not kept.

use super::node::{LinkRole, Node, Timer};
use crate::types::{death, Event};
use ray_ids::{NodeId, ObjectId, WorkerId};
use ray_rpc::Link;
use ray_wire::{kinds, AddLocation, Address, WatchWorker, WorkerDied, DEATH_NODE, DEATH_UNKNOWN};
use std::sync::Arc;

impl Node {
    /// A process's death matters here: where it lives on another node, the raylet there is asked to tell.
    pub(super) fn watch_elsewhere(&mut self, worker: WorkerId, node: NodeId) {
        if node == self.node_id || node.is_nil() || worker.is_nil() {
            return;
        }
        if self.gcs.dead_nodes.contains(&node) {
            let cause = death(DEATH_NODE, format!("its node {node} is dead"));
            return self.remote_process_died(worker, self.death_notice(worker, node, cause));
        }
        if self.elsewhere.watch(worker, node) {
            self.ask_elsewhere(node, &[worker]);
        }
    }

    fn death_notice(&self, worker: WorkerId, node: NodeId, cause: ray_wire::DeathCause) -> WorkerDied {
        WorkerDied {
            worker: Some(address(worker, node)),
            cause: Some(cause),
        }
    }

    /// Asks the raylet of a node for the deaths of these, and tells it of the copies here that they own.
    fn ask_elsewhere(&mut self, node: NodeId, workers: &[WorkerId]) {
        let Ok(link) = self.peer_link(node) else {
            // It may not be known here yet, or not be reachable now.
            return self.ask_elsewhere_later();
        };
        for worker in workers {
            let message = WatchWorker {
                worker: Some(address(*worker, node)),
            };
            // A link that closes is noticed, and all is asked again.
            let _ = link.send(kinds::WATCH_WORKER, 0, ray_wire::encode(&message), &[]);
            for object in self.owners.of(worker) {
                self.send_location(&link, object, *worker, node);
            }
        }
    }

    /// Asks everything again: notices may have been lost with the link to the control plane.
    pub(super) fn ask_elsewhere_again(&mut self) {
        for node in self.elsewhere.nodes() {
            let workers = self.elsewhere.watched_on(&node);
            self.ask_elsewhere(node, &workers);
        }
    }

    fn ask_elsewhere_later(&mut self) {
        if !self.has_timer(Timer::AskElsewhere) {
            self.at(self.limits.elsewhere_retry_ms, Timer::AskElsewhere);
        }
    }

    /// A link to another raylet closed: what was asked over it is asked again.
    pub(super) fn elsewhere_link_closed(&mut self, node: &NodeId) {
        if self.elsewhere.concerns(node) {
            self.ask_elsewhere_later();
        }
    }

    /// Asks those raylets again to which no link is open.
    pub(super) fn ask_where_no_link_is(&mut self) {
        for node in self.elsewhere.nodes() {
            if !self.peers.get(&node).is_some_and(|link| link.is_open()) {
                let workers = self.elsewhere.watched_on(&node);
                self.ask_elsewhere(node, &workers);
            }
        }
    }

    /// A copy arrived from another node: its owner is to hear of it.
    pub(super) fn tell_location(&mut self, object: ObjectId) {
        let Some(owner) = self.owners.owner(&object).filter(|owner| !owner.is_nil()) else {
            return;
        };
        if let Some(process) = self.processes.get(&owner) {
            if let Some(link) = process.link.clone() {
                self.send_location(&link, object, owner, self.node_id);
            }
            return;
        }
        let home = self.elsewhere.home(&owner);
        if self.watchers.is_dead(&owner) || home.is_some_and(|home| self.gcs.dead_nodes.contains(&home)) {
            return self.owner_of_objects_died(owner);
        }
        let Some(home) = home else { return };
        if self.elsewhere.watch(owner, home) {
            // This tells of its copies too.
            self.ask_elsewhere(home, &[owner]);
        } else if let Ok(link) = self.peer_link(home) {
            self.send_location(&link, object, owner, home);
        } else {
            self.ask_elsewhere_later();
        }
    }

    fn send_location(&self, link: &Arc<Link>, object: ObjectId, owner: WorkerId, home: NodeId) {
        let message = AddLocation {
            object_id: ray_wire::id_bytes(object.as_bytes()),
            node: Some(self.address.clone()),
            owner: Some(address(owner, home)),
        };
        let _ = link.send(kinds::ADD_LOCATION, 0, ray_wire::encode(&message), &[]);
    }

    /// Another raylet has a copy of what a process here owns, or owned.
    pub(super) fn pass_location(
        &mut self,
        link: &Arc<Link>,
        role: LinkRole,
        message: &AddLocation,
    ) -> Result<(), String> {
        if !matches!(role, LinkRole::Raylet(_)) {
            return Err("only a raylet tells of copies".into());
        }
        let owner = message.owner.as_ref().ok_or("an AddLocation names no owner")?;
        let worker = owner.worker().map_err(|error| error.to_string())?;
        if let Some(process) = self.processes.get(&worker) {
            if let Some(to) = &process.link {
                let _ = to.send(kinds::ADD_LOCATION, 0, ray_wire::encode(message), &[]);
                return Ok(());
            }
        }
        let cause = death(
            DEATH_UNKNOWN,
            format!("process {worker} is not on node {} any more", self.node_id),
        );
        let died = self.death_notice(worker, self.node_id, cause);
        let _ = link.send(kinds::WORKER_DIED, 0, ray_wire::encode(&died), &[]);
        Ok(())
    }

    /// Another raylet answers that a process of it is dead.
    pub(super) fn died_elsewhere(&mut self, role: LinkRole, died: WorkerDied) -> Result<(), String> {
        if !matches!(role, LinkRole::Raylet(_)) {
            return Err("only a raylet tells of deaths".into());
        }
        let address = died.worker.as_ref().ok_or("a WorkerDied names nobody")?;
        let worker = address.worker().map_err(|error| error.to_string())?;
        self.remote_process_died(worker, died);
        Ok(())
    }

    /// Processes of a dead node own and ask for nothing here any more.
    pub(super) fn processes_died_with_node(&mut self, node: &NodeId) {
        for worker in self.elsewhere.node_died(node) {
            self.step(Event::OwnerGone { process: worker });
            self.owner_of_objects_died(worker);
        }
    }
}

fn address(worker: WorkerId, node: NodeId) -> Address {
    Address {
        node_id: ray_wire::id_bytes(node.as_bytes()),
        worker_id: ray_wire::id_bytes(worker.as_bytes()),
        ..Address::default()
    }
}
