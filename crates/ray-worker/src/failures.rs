//! What happens when a link, a worker, a node or the raylet is gone.
//!
//! Invariants:
//! 1. A call on a broken lease is queued again or counts as an attempt, by the evidence of starting.
//! 2. A broken link alone proves no death: what was asked on it is asked again.

use std::sync::Arc;
use std::time::Duration;

use ray_ids::{LeaseId, NodeId, ObjectId, WorkerId};
use ray_rpc::{CloseReason, Link};
use ray_wire::{kinds, *};

use crate::inner::{Inner, Pending, PendingEntry, Retry, State};
use crate::links::link_state;
use crate::slot::lock;

use crate::service::WorkerService;

/// How long a broken link to a leased worker may go unexplained by its raylet.
const SUSPECT_DELAY: Duration = Duration::from_secs(2);

impl Inner {
    /// What was asked over links that are over is asked again, or its process is suspect.
    pub fn requests_of_link_lost(&self, state: &mut State, worker: WorkerId, lost: impl Fn(&PendingEntry) -> bool) {
        let broken: Vec<u64> = state
            .pending
            .iter()
            .filter(|(_, entry)| lost(entry))
            .map(|(correlation, _)| *correlation)
            .collect();
        let mut suspect = false;
        for correlation in broken {
            match state.pending.remove(&correlation).map(|entry| entry.what) {
                Some(Pending::ObjectStatus(object)) if correlation >> 63 == 0 => {
                    self.retry_later(state, crate::borrowing::RETRY_DELAY, Retry::AskOwner(object));
                }
                Some(Pending::Borrower) => suspect = true,
                Some(Pending::Task(_)) => suspect = true,
                _ => {}
            }
        }
        self.actor_link_lost(state, worker);
        if suspect || !state.leases.leases_of(worker).is_empty() {
            self.retry_later(state, SUSPECT_DELAY, Retry::SuspectWorker(worker));
        }
    }
}

impl WorkerService {
    pub(crate) fn lease_broken(
        &self,
        state: &mut State,
        lease: LeaseId,
        started: Option<u64>,
        cause: Option<DeathCause>,
    ) {
        let core = &*self.core;
        state.lease_raylets.remove(&lease);
        let died_with_node = cause.as_ref().is_some_and(|cause| cause.kind == DEATH_NODE);
        let node = state.leases.lease(&lease).map(|lease| lease.node);
        for task in state.leases.pushed_under(&lease) {
            if let Some(task) = state.tasks.get_mut(&task) {
                task.trouble_mut().cause.clone_from(&cause);
                task.give_up_push(node.filter(|_| !died_with_node));
            }
        }
        let mut commands = Vec::new();
        state.leases.broken(lease, started, core.now_ms(), &mut commands);
        core.carry_out_leases(state, commands);
    }

    pub(crate) fn node_died(&self, state: &mut State, node: NodeId, reason: &str) {
        let core = &*self.core;
        let cause = DeathCause {
            kind: DEATH_NODE,
            message: format!("its node {node} died: {reason}"),
            ..DeathCause::default()
        };
        for lease in state.leases.leases_on(node) {
            self.lease_broken(state, lease, None, Some(cause.clone()));
        }
        let lost: Vec<ObjectId> = state
            .refs
            .iter()
            .filter(|(_, entry)| entry.locations().contains(&node))
            .map(|(object, _)| *object)
            .collect();
        for object in lost {
            // Made again when somebody wants it.
            state.refs.remove_location(&object, node);
        }
        let dead: Vec<WorkerId> = state
            .addresses
            .iter()
            .filter(|(_, address)| crate::connect::node_of(address) == node)
            .map(|(worker, _)| *worker)
            .collect();
        for worker in dead {
            core.worker_died(state, worker);
        }
        if let Some(link) = state.raylets.remove(&node) {
            link.close(CloseReason::local("the node died"));
        }
        let requests: Vec<u64> = state
            .request_raylets
            .iter()
            .filter(|(_, (at, _))| *at == node)
            .map(|(request, _)| *request)
            .collect();
        self.requests_lost(state, requests);
        core.run_ready(state);
    }

    pub(crate) fn requests_lost(&self, state: &mut State, requests: Vec<u64>) {
        let mut commands = Vec::new();
        for request in requests {
            if let Some((_, correlation)) = state.request_raylets.remove(&request) {
                state.pending.remove(&correlation);
            }
            state.leases.request_lost(request, self.core.now_ms(), &mut commands);
        }
        self.core.carry_out_leases(state, commands);
    }

    pub(crate) fn link_closed(&self, link: &Arc<Link>, reason: &CloseReason) {
        let core = &*self.core;
        let mut state = core.lock();
        if link.id() == core.raylet.id() {
            state.raylet_gone = Some(reason.to_string());
            for (_, entry) in std::mem::take(&mut state.pending) {
                match entry.what {
                    Pending::Gcs(wait) => {
                        *lock(&wait.reply) = Some(Err(reason.to_string()));
                        wait.waiter.notify();
                    }
                    Pending::NodeQuery(wait) => {
                        *lock(&wait.answer) = Some(Err(reason.to_string()));
                        wait.waiter.notify();
                    }
                    Pending::Extent(wait) => {
                        *lock(&wait.reply) = Some(Err(reason.to_string()));
                        wait.waiter.notify();
                    }
                    _ => {}
                }
            }
            drop(state);
            if core.role == crate::connect::Role::Worker && !core.shut_down.load(std::sync::atomic::Ordering::Acquire) {
                crate::execute::end_with_node();
            }
            return;
        }
        let said = link_state(link);
        if let (Some(session), Some(worker)) = (said.session.get(), said.peer_id.get()) {
            return core.session_broken(&mut state, link, session, *worker);
        }
        core.drop_calls_of(|other| other == link.id());
        if let Some(node) = said.raylet_of.get() {
            if state.raylets.get(node).is_some_and(|held| held.id() == link.id()) {
                state.raylets.remove(node);
            }
            let requests: Vec<u64> = state
                .request_raylets
                .iter()
                .filter(|(_, (at, _))| at == node)
                .map(|(request, _)| *request)
                .collect();
            self.requests_lost(&mut state, requests);
        }
        let Some(worker) = said.peer_id.get().copied() else {
            return;
        };
        if state.links.get(&worker).is_some_and(|held| held.id() == link.id()) {
            state.links.remove(&worker);
        }
        core.requests_of_link_lost(&mut state, worker, |entry| entry.link == link.id());
    }

    pub(crate) fn retry(&self, state: &mut State, retry: Retry) {
        let core = &*self.core;
        match retry {
            Retry::AskOwner(object) => {
                let entry = state
                    .refs
                    .get(&object)
                    .map(|entry| (entry.value.clone(), entry.borrowed_owner()));
                if let Some((slot, Some(owner))) = entry {
                    if !slot.is_ready() {
                        core.ask_owner(state, object, owner);
                    }
                }
            }
            Retry::AddBorrower {
                owner,
                object,
                borrower,
                generation,
            } => {
                core.add_borrower_again(state, owner, object, borrower, generation);
            }
            Retry::SuspectWorker(worker) => {
                // The raylet has had its time to report the death: the leases are given up.
                let cause = DeathCause {
                    kind: DEATH_CRASHED,
                    message: "the link to the worker broke and its raylet has not said why".into(),
                    ..DeathCause::default()
                };
                for lease in state.leases.leases_of(worker) {
                    let node = state.lease_raylets.get(&lease).copied().unwrap_or(core.node_id);
                    if state.links.get(&worker).is_some_and(crate::session::is_connected) {
                        continue;
                    }
                    self.lease_broken(state, lease, None, Some(cause.clone()));
                    if let Ok(link) = core.raylet_link(state, node) {
                        let message = ReturnLease {
                            lease_id: id_bytes(lease.as_bytes()),
                            worker_exits: true,
                        };
                        let _ = link.send(kinds::RETURN_LEASE, 0, encode(&message), &[]);
                    }
                }
            }
            Retry::Push {
                lease,
                task,
                sequence,
                until,
            } => {
                let holds = state.leases.lease(&lease).map(|lease| lease.sequence_of(&task));
                if holds == Some(sequence) {
                    core.push_to_lease(state, lease, task, sequence, until);
                }
            }
            Retry::Fetch(object) => core.send_fetch(state, object),
            Retry::Reconnect(link) => core.reconnect_session(state, &link),
            Retry::LosePatience(link) => core.lose_patience(state, &link),
            Retry::Acknowledge(link) => core.acknowledge_session(&link),
            Retry::Release(objects) => {
                let mut commands = Vec::new();
                for object in objects {
                    state.refs.release_hold(object, &mut commands);
                }
                core.carry_out_references(state, commands);
            }
        }
    }
}
