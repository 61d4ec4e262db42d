//! What the owner's leases say of themselves: look-ups, what waits, and the check of the invariants. It changes nothing.

use ray_ids::{LeaseId, NodeId, TaskId, WorkerId};
use rustc_hash::FxHashMap;

use super::{ClassId, Lease, LeaseClient};

impl LeaseClient {
    /// The lease a call is pushed under.
    pub fn lease_of(&self, task: &TaskId) -> Option<(LeaseId, &Lease)> {
        let lease = self.running.get(task)?;
        Some((*lease, self.leases.get(lease)?))
    }

    /// The leases on a worker.
    pub fn leases_of(&self, worker: WorkerId) -> Vec<LeaseId> {
        self.leases
            .iter()
            .filter(|(_, lease)| lease.worker == worker)
            .map(|(id, _)| *id)
            .collect()
    }

    /// The leases on a node.
    pub fn leases_on(&self, node: NodeId) -> Vec<LeaseId> {
        self.leases
            .iter()
            .filter(|(_, lease)| lease.node == node)
            .map(|(id, _)| *id)
            .collect()
    }

    /// The unfinished calls of a lease.
    pub fn pushed_under(&self, lease: &LeaseId) -> Vec<TaskId> {
        self.leases
            .get(lease)
            .map(|lease| lease.pushed.iter().map(|(task, _)| *task).collect())
            .unwrap_or_default()
    }

    /// A lease.
    pub fn lease(&self, lease: &LeaseId) -> Option<&Lease> {
        self.leases.get(lease)
    }

    /// Whether there is no call, no lease and no request.
    pub fn is_quiet(&self) -> bool {
        self.leases.is_empty()
            && self.requests.is_empty()
            && self.running.is_empty()
            && self.classes.values().all(|class| class.queue.is_empty())
    }

    /// How many leases have nothing to do.
    pub fn idle_leases(&self) -> usize {
        self.idle
    }

    /// Calls waiting for a lease: class, count, whether a raylet has queued a request of theirs.
    pub fn waiting(&self) -> Vec<(ClassId, usize, bool)> {
        self.classes
            .iter()
            .filter(|(_, class)| !class.queue.is_empty())
            .map(|(id, class)| (*id, class.queue.len(), class.queued_requests > 0))
            .collect()
    }

    /// Checks the invariants.
    pub fn validate(&self) -> Result<(), String> {
        let mut seen: FxHashMap<TaskId, &str> = FxHashMap::default();
        for (id, class) in &self.classes {
            for task in &class.queue {
                if seen.insert(*task, "queued").is_some() {
                    return Err(format!("{task:?} is in two places"));
                }
            }
            let requests = self.requests.values().filter(|request| request.class == *id).count();
            if requests != class.requests {
                return Err(format!(
                    "class {id} counts {} requests and has {requests}",
                    class.requests
                ));
            }
            let queued = self
                .requests
                .values()
                .filter(|request| request.class == *id && request.queued)
                .count();
            if queued != class.queued_requests {
                return Err(format!(
                    "class {id} counts {} queued requests and has {queued}",
                    class.queued_requests
                ));
            }
        }
        let mut idle = 0;
        for (id, lease) in &self.leases {
            idle += usize::from(lease.pushed.is_empty());
            for (task, _) in &lease.pushed {
                if seen.insert(*task, "pushed").is_some() {
                    return Err(format!("{task:?} is in two places"));
                }
                if self.running.get(task) != Some(id) {
                    return Err(format!("{task:?} runs on {id:?} and is indexed elsewhere"));
                }
            }
            if lease.recalled && lease.pushed.is_empty() {
                return Err(format!("{id:?} is recalled, idle and was not returned"));
            }
        }
        if idle != self.idle {
            return Err(format!("{idle} leases are idle and {} are counted", self.idle));
        }
        if self.running.len() != seen.values().filter(|place| **place == "pushed").count() {
            return Err("the index of running calls is stale".into());
        }
        Ok(())
    }
}
