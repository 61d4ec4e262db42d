//! What a decision maker knows of the cluster: owns the last reported resources of each node.
//!
//! It refuses nothing. It is a view: a node may have changed since, and says so when the work arrives.
//!
//! Invariants:
//! 1. Work is placed only on nodes that are alive and not draining.
//! 2. Nodes are iterated in the order of their ids, so that a decision depends on nothing but its parameters.

use crate::labels::Labels;
use crate::node_resources::NodeResources;
use crate::quantity::Quantity;
use crate::resource_set::{ResourceName, ResourceSet};
use ray_ids::NodeId;
use std::collections::BTreeMap;

/// What is known of one node.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct NodeView {
    /// What the node has.
    pub total: ResourceSet,
    /// What is free.
    pub available: ResourceSet,
    /// Its labels.
    pub labels: Labels,
    /// Whether it is alive.
    pub alive: bool,
    /// Whether it is about to leave and takes no new work.
    pub draining: bool,
}

impl NodeView {
    /// A live node of which everything is free.
    pub fn idle(total: ResourceSet) -> Self {
        Self {
            available: total.clone(),
            total,
            labels: Labels::new(),
            alive: true,
            draining: false,
        }
    }

    /// What `node` would report of itself now.
    pub fn of(node: &NodeResources) -> Self {
        let (total, available) = (node.total_set(), node.available_set());
        Self {
            total,
            available,
            labels: node.labels().clone(),
            alive: true,
            draining: false,
        }
    }

    /// Whether new work may go there.
    pub fn takes_work(&self) -> bool {
        self.alive && !self.draining
    }

    /// Whether `demand` is free there now.
    pub fn fits_now(&self, demand: &ResourceSet) -> bool {
        self.available.covers(demand)
    }

    /// Whether `demand` could be free there with nothing else running.
    pub fn fits_ever(&self, demand: &ResourceSet) -> bool {
        self.total.covers(demand)
    }

    /// Whether it has GPUs, which work without GPUs should leave free.
    pub fn has_gpus(&self) -> bool {
        !self.total.get(&ResourceName::GPU).is_zero()
    }

    /// The share in use, from 0 to 1, of the scarcest among CPU, memory, object store and what `demand` names.
    pub fn utilization(&self, demand: &ResourceSet) -> f64 {
        let basic = [
            ResourceName::CPU,
            ResourceName::MEMORY,
            ResourceName::OBJECT_STORE_MEMORY,
        ];
        let others = demand.iter().map(|(name, _)| name).filter(|name| !basic.contains(name));
        let names = basic.iter().chain(others);
        names.map(|name| self.utilization_of(name)).fold(0.0, f64::max)
    }

    fn utilization_of(&self, name: &ResourceName) -> f64 {
        let (total, available) = (self.total.get(name), self.available.get(name));
        if total.is_zero() {
            return 0.0;
        }
        (total - available).max(Quantity::ZERO).raw() as f64 / total.raw() as f64
    }
}

/// What is known of every node.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct ClusterView {
    /// The nodes, dead ones too while someone remembers them.
    pub nodes: BTreeMap<NodeId, NodeView>,
}

impl ClusterView {
    /// Nodes that take work, in the order of their ids.
    pub fn working_nodes(&self) -> impl Iterator<Item = (NodeId, &NodeView)> + '_ {
        self.nodes
            .iter()
            .filter(|(_, node)| node.takes_work())
            .map(|(id, node)| (*id, node))
    }

    /// The node with this id, if it takes work.
    pub fn working_node(&self, id: NodeId) -> Option<&NodeView> {
        self.nodes.get(&id).filter(|node| node.takes_work())
    }
}

impl FromIterator<(NodeId, NodeView)> for ClusterView {
    fn from_iter<I: IntoIterator<Item = (NodeId, NodeView)>>(nodes: I) -> Self {
        Self {
            nodes: nodes.into_iter().collect(),
        }
    }
}
