//! Processes of other nodes that matter here: owns where each lives, and whose death the raylet there was asked to tell.
//!
//! The control plane tells every raylet of every death, once. A notice is lost where its link breaks or the control plane
//! restarts in that moment, and then nobody would free what the dead process owned or waited for. So the raylet of each
//! process whose death matters is asked as well; what was asked over a link that closed is asked again.
//!
//! Invariants:
//! 1. A process has one home, which is another node.
//! 2. Whoever is watched has a home.

use ray_ids::{NodeId, WorkerId};
use rustc_hash::FxHashMap;
use std::collections::{BTreeMap, BTreeSet};

/// Processes of other nodes.
#[derive(Debug, Default)]
pub struct Elsewhere {
    home: FxHashMap<WorkerId, NodeId>,
    watched: BTreeMap<NodeId, BTreeSet<WorkerId>>,
}

impl Elsewhere {
    /// A process was heard of.
    pub fn note(&mut self, worker: WorkerId, node: NodeId) {
        self.home.entry(worker).or_insert(node);
    }

    /// A process's death matters. True if its raylet is to be asked.
    pub fn watch(&mut self, worker: WorkerId, node: NodeId) -> bool {
        let home = *self.home.entry(worker).or_insert(node);
        self.watched.entry(home).or_default().insert(worker)
    }

    /// Where a process lives.
    pub fn home(&self, worker: &WorkerId) -> Option<NodeId> {
        self.home.get(worker).copied()
    }

    /// Those who are watched on a node.
    pub fn watched_on(&self, node: &NodeId) -> Vec<WorkerId> {
        self.watched
            .get(node)
            .map(|workers| workers.iter().copied().collect())
            .unwrap_or_default()
    }

    /// The nodes on which somebody is watched.
    pub fn nodes(&self) -> Vec<NodeId> {
        self.watched.keys().copied().collect()
    }

    /// Whether somebody is watched on a node.
    pub fn concerns(&self, node: &NodeId) -> bool {
        self.watched.contains_key(node)
    }

    /// A process is dead.
    pub fn forget(&mut self, worker: &WorkerId) {
        let Some(node) = self.home.remove(worker) else { return };
        if let Some(workers) = self.watched.get_mut(&node) {
            workers.remove(worker);
            if workers.is_empty() {
                self.watched.remove(&node);
            }
        }
    }

    /// A node is dead, and with it those of its processes that are known here.
    pub fn node_died(&mut self, node: &NodeId) -> Vec<WorkerId> {
        self.watched.remove(node);
        let gone: Vec<WorkerId> = self
            .home
            .iter()
            .filter(|(_, home)| *home == node)
            .map(|(worker, _)| *worker)
            .collect();
        for worker in &gone {
            self.home.remove(worker);
        }
        gone
    }

    /// Checks the invariants.
    pub fn validate(&self) -> Result<(), String> {
        for (node, workers) in &self.watched {
            if workers.is_empty() {
                return Err(format!("nobody is watched on {node}"));
            }
            if let Some(worker) = workers.iter().find(|worker| self.home.get(worker) != Some(node)) {
                return Err(format!("{worker} is watched on {node}, which is not its home"));
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn whoever_is_watched_is_asked_for_once_until_it_is_gone() {
        let mut elsewhere = Elsewhere::default();
        let workers: Vec<WorkerId> = (1..=3).map(|n| WorkerId::from_array([n; 28])).collect();
        let (a, b) = (NodeId::from_array([1; 28]), NodeId::from_array([2; 28]));
        elsewhere.note(workers[0], a);
        assert!(elsewhere.watch(workers[0], a));
        assert!(!elsewhere.watch(workers[0], a));
        assert!(elsewhere.watch(workers[1], a));
        assert!(elsewhere.watch(workers[2], b));
        elsewhere.validate().unwrap();
        assert_eq!(elsewhere.nodes(), [a, b]);
        assert_eq!(elsewhere.watched_on(&a), workers[..2]);
        elsewhere.forget(&workers[2]);
        assert!(!elsewhere.concerns(&b));
        let mut gone = elsewhere.node_died(&a);
        gone.sort();
        assert_eq!(gone, workers[..2]);
        elsewhere.validate().unwrap();
        assert_eq!((elsewhere.nodes(), elsewhere.home(&workers[0])), (vec![], None));
    }
}
