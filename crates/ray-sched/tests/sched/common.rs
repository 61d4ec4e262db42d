//! Small makers of what the tests need.

use ray_ids::{NodeId, PlacementGroupId};
use ray_sched::{ClusterView, Labels, NodeResources, NodeView, ResourceSet, UnitResources};

pub fn set(amounts: &[(&str, f64)]) -> ResourceSet {
    ResourceSet::from_user(amounts.iter().copied(), &UnitResources::default()).unwrap()
}

pub fn node(amounts: &[(&str, f64)]) -> NodeResources {
    NodeResources::new(&set(amounts), Labels::new(), &UnitResources::default()).unwrap()
}

pub fn id(number: u8) -> NodeId {
    NodeId::from_array([number; 28])
}

pub fn group(number: u8) -> PlacementGroupId {
    PlacementGroupId::from_array([number; 18])
}

/// A node of the view: what it has, and what of it is in use.
pub fn seen(total: &[(&str, f64)], used: &[(&str, f64)]) -> NodeView {
    let mut view = NodeView::idle(set(total));
    assert!(
        view.available.checked_sub(&set(used)),
        "no more is in use than there is"
    );
    view
}

/// Nodes with ids 1, 2, 3...
pub fn cluster(nodes: impl IntoIterator<Item = NodeView>) -> ClusterView {
    nodes
        .into_iter()
        .enumerate()
        .map(|(at, node)| (id(at as u8 + 1), node))
        .collect()
}

pub fn labelled(mut view: NodeView, labels: &[(&str, &str)]) -> NodeView {
    view.labels = labels
        .iter()
        .map(|(key, value)| (key.to_string(), value.to_string()))
        .collect();
    view
}

/// A small generator of numbers that look random (SplitMix64).
pub fn numbers(seed: u64) -> impl FnMut() -> u64 {
    let mut state = seed;
    move || {
        state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = (state ^ (state >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    }
}
