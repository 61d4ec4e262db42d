//! Placement group strategies by small examples.

use crate::common::{cluster, id, labelled, numbers, seen, set};
use ray_ids::NodeId;
use ray_sched::{
    place_bundles, place_bundles_with, BundleRequest, ClusterView, Infeasibility, LabelSelector, NodeView, Placement,
    PlacementConstraints, PlacementStrategy,
};
use std::collections::BTreeSet;
use PlacementStrategy::{Pack, Spread, StrictPack, StrictSpread};

const FOUR: &[(&str, f64)] = &[("CPU", 4.0)];

fn bundles(cpus: &[f64]) -> Vec<BundleRequest> {
    cpus.iter().map(|cpus| set(&[("CPU", *cpus)]).into()).collect()
}

fn place(view: &ClusterView, cpus: &[f64], strategy: PlacementStrategy) -> Placement {
    place_bundles(view, &bundles(cpus), strategy, &mut numbers(5))
}

fn placed(placement: Placement) -> Vec<NodeId> {
    match placement {
        Placement::Placed(nodes) => nodes,
        other => panic!("not placed: {other:?}"),
    }
}

fn distinct(nodes: &[NodeId]) -> usize {
    nodes.iter().collect::<BTreeSet<_>>().len()
}

#[test]
fn names_are_the_interfaces() {
    for strategy in [Pack, Spread, StrictPack, StrictSpread] {
        assert_eq!(PlacementStrategy::from_name(strategy.name()), Some(strategy));
    }
    assert_eq!(PlacementStrategy::from_name("pack"), None);
}

#[test]
fn pack_uses_one_node_where_one_suffices_and_the_tightest() {
    let view = cluster([seen(&[("CPU", 8.0)], &[]), seen(FOUR, &[]), seen(&[("CPU", 2.0)], &[])]);
    assert_eq!(placed(place(&view, &[1.0, 1.0, 1.0], Pack)), vec![id(2); 3]);
    assert_eq!(placed(place(&view, &[1.0, 1.0], Pack)), vec![id(3); 2]);
}

#[test]
fn pack_uses_the_fewest_nodes_where_one_does_not_suffice() {
    let view = cluster([
        seen(&[("CPU", 1.0)], &[]),
        seen(FOUR, &[]),
        seen(&[("CPU", 3.0)], &[]),
        seen(&[("CPU", 1.0)], &[]),
    ]);
    let nodes = placed(place(&view, &[1.0; 7], Pack));
    assert_eq!(
        nodes.iter().copied().collect::<BTreeSet<_>>(),
        BTreeSet::from([id(2), id(3)])
    );
}

#[test]
fn pack_finds_what_a_greedy_pass_misses() {
    // Greedy puts 5 and 4 on the first node, which leaves 11 for the other; 5 + 3 + 2 and 4 + 4 + 2 is the way.
    let view = cluster([seen(&[("CPU", 10.0)], &[]), seen(&[("CPU", 10.0)], &[])]);
    let nodes = placed(place(&view, &[5.0, 4.0, 4.0, 3.0, 2.0, 2.0], Pack));
    assert_eq!((nodes[0], nodes[1]), (nodes[3], nodes[2]));
    let two_kinds = cluster([seen(&[("CPU", 5.0), ("x", 2.0)], &[]), seen(&[("CPU", 4.0)], &[])]);
    let mixed: Vec<BundleRequest> = [
        set(&[("CPU", 4.0)]),
        set(&[("CPU", 1.0), ("x", 1.0)]),
        set(&[("CPU", 4.0)]),
    ]
    .map(Into::into)
    .to_vec();
    let nodes = placed(place_bundles(&two_kinds, &mixed, Pack, &mut numbers(1)));
    assert_eq!(nodes[1], id(1));
    assert_eq!(distinct(&[nodes[0], nodes[2]]), 2);
}

#[test]
fn spread_uses_different_nodes_and_falls_back_evenly() {
    let view = cluster([seen(FOUR, &[]), seen(FOUR, &[]), seen(FOUR, &[])]);
    assert_eq!(distinct(&placed(place(&view, &[1.0; 3], Spread))), 3);
    let six = placed(place(&view, &[1.0; 6], Spread));
    for number in 1..=3 {
        assert_eq!(six.iter().filter(|node| **node == id(number)).count(), 2);
    }
    assert_eq!(
        placed(place(&cluster([seen(FOUR, &[])]), &[1.0, 1.0], Spread)),
        vec![id(1); 2]
    );
}

#[test]
fn spread_moves_a_bundle_aside_for_one_that_has_no_other_node() {
    let view = cluster([seen(&[("CPU", 2.0), ("x", 1.0)], &[]), seen(&[("CPU", 3.0)], &[])]);
    let pair: Vec<BundleRequest> = [set(&[("CPU", 2.0)]), set(&[("CPU", 1.0), ("x", 0.1)])]
        .map(Into::into)
        .to_vec();
    for strategy in [Spread, StrictSpread] {
        assert_eq!(
            placed(place_bundles(&view, &pair, strategy, &mut numbers(1))),
            vec![id(2), id(1)]
        );
    }
}

#[test]
fn strict_pack_is_one_node_or_none() {
    let view = cluster([seen(FOUR, &[("CPU", 2.0)]), seen(FOUR, &[("CPU", 1.0)])]);
    assert_eq!(placed(place(&view, &[1.0, 2.0], StrictPack)), vec![id(2); 2]);
    assert_eq!(place(&view, &[2.0, 2.0], StrictPack), Placement::Busy);
    let Placement::Infeasible(reason) = place(&view, &[3.0, 2.0], StrictPack) else {
        panic!("5 CPUs are on no node")
    };
    let text = reason.to_string();
    assert!(
        text.contains("STRICT_PACK") && text.contains("CPU 5") && text.contains("has 4"),
        "{text}"
    );
    assert_eq!(placed(place(&view, &[2.0, 3.0], Pack)).len(), 2);
}

#[test]
fn strict_pack_tries_its_soft_target_first() {
    let view = cluster([
        seen(FOUR, &[]),
        seen(FOUR, &[("CPU", 2.0)]),
        seen(FOUR, &[("CPU", 4.0)]),
    ]);
    let at = |number| {
        let constraints = PlacementConstraints {
            soft_target_node: Some(id(number)),
            ..Default::default()
        };
        placed(place_bundles_with(
            &view,
            &bundles(&[1.0, 1.0]),
            StrictPack,
            constraints,
            &mut numbers(2),
        ))
    };
    assert_eq!(at(1), vec![id(1); 2]);
    assert_eq!(at(2), vec![id(2); 2]);
    assert_eq!(at(3), vec![id(2); 2], "a full target is passed over");
    assert_eq!(at(9), vec![id(2); 2], "an unknown target too");
}

#[test]
fn strict_spread_needs_a_node_for_each() {
    let view = cluster([seen(FOUR, &[]), seen(FOUR, &[("CPU", 4.0)]), seen(&[("CPU", 1.0)], &[])]);
    assert_eq!(distinct(&placed(place(&view, &[1.0, 1.0], StrictSpread))), 2);
    assert_eq!(place(&view, &[1.0, 1.0, 1.0], StrictSpread), Placement::Busy);
    assert_eq!(
        place(&view, &[1.0; 4], StrictSpread),
        Placement::Infeasible(Infeasibility::StrictSpread {
            bundles: 4,
            placeable: 3
        })
    );
    assert_eq!(
        place(&view, &[2.0; 3], StrictSpread),
        Placement::Infeasible(Infeasibility::StrictSpread {
            bundles: 3,
            placeable: 2
        })
    );
}

#[test]
fn all_or_nothing_and_busy_is_told_from_never() {
    let view = cluster([seen(FOUR, &[("CPU", 3.0)]), seen(FOUR, &[])]);
    assert_eq!(place(&view, &[4.0, 2.0], Pack), Placement::Busy);
    assert!(matches!(
        place(&view, &[4.0, 4.0, 1.0], Pack),
        Placement::Infeasible(Infeasibility::ClusterTooSmall { .. })
    ));
    assert!(matches!(
        place(&view, &[3.0, 3.0, 2.0], Spread),
        Placement::Infeasible(Infeasibility::NoArrangement { .. })
    ));
    let Placement::Infeasible(reason) = place(&view, &[1.0, 5.0], Pack) else {
        panic!("5 CPUs are on no node")
    };
    assert!(
        reason
            .to_string()
            .starts_with("bundle 1 fits on no node, for it needs CPU 5"),
        "{reason}"
    );
    assert!(matches!(
        place(&cluster([]), &[1.0], Pack),
        Placement::Infeasible(Infeasibility::NoNodes { .. })
    ));
    assert!(matches!(
        place(&view, &[], Pack),
        Placement::Infeasible(Infeasibility::EmptyBundle { bundle_index: None })
    ));
    assert!(matches!(
        place(&view, &[1.0, 0.0], Pack),
        Placement::Infeasible(Infeasibility::EmptyBundle { bundle_index: Some(1) })
    ));
}

#[test]
fn gpu_nodes_are_left_to_bundles_with_gpus() {
    let gpu = &[("CPU", 4.0), ("GPU", 2.0)];
    let view = cluster([seen(gpu, &[]), seen(FOUR, &[])]);
    for strategy in [Pack, Spread, StrictPack, StrictSpread] {
        assert_eq!(placed(place(&view, &[1.0], strategy)), vec![id(2)], "{strategy}");
    }
    let both: Vec<BundleRequest> = [set(&[("CPU", 1.0)]), set(&[("CPU", 1.0), ("GPU", 1.0)])]
        .map(Into::into)
        .to_vec();
    assert_eq!(
        placed(place_bundles(&view, &both, Spread, &mut numbers(1))),
        vec![id(2), id(1)]
    );
    assert_eq!(
        placed(place_bundles(&view, &both, Pack, &mut numbers(1))),
        vec![id(1), id(1)]
    );
}

#[test]
fn bundles_follow_their_label_selectors() {
    let view = cluster([
        labelled(seen(FOUR, &[]), &[("zone", "a")]),
        labelled(seen(FOUR, &[]), &[("zone", "b")]),
    ]);
    let zone = |name: &str| BundleRequest {
        resources: set(&[("CPU", 1.0)]),
        label_selector: LabelSelector::from_option([("zone", name)]).unwrap(),
    };
    for strategy in [Pack, Spread, StrictSpread] {
        assert_eq!(
            placed(place_bundles(&view, &[zone("b"), zone("a")], strategy, &mut numbers(1))),
            vec![id(2), id(1)]
        );
    }
    let Placement::Infeasible(reason) = place_bundles(&view, &[zone("b"), zone("a")], StrictPack, &mut numbers(1))
    else {
        panic!("no node is in both zones")
    };
    assert!(reason.to_string().contains("zone in (b) and zone in (a)"), "{reason}");
    let Placement::Infeasible(reason) = place_bundles(&view, &[zone("c")], Pack, &mut numbers(1)) else {
        panic!("no node is in zone c")
    };
    assert!(
        reason.to_string().contains("zone is a, b on the nodes there are"),
        "{reason}"
    );
}

#[test]
fn lost_bundles_are_placed_with_regard_to_the_survivors() {
    let view = cluster([seen(FOUR, &[("CPU", 1.0)]), seen(FOUR, &[]), seen(FOUR, &[])]);
    let again = |strategy, occupied: &[NodeId]| {
        let constraints = PlacementConstraints {
            occupied,
            ..Default::default()
        };
        place_bundles_with(&view, &bundles(&[1.0]), strategy, constraints, &mut numbers(4))
    };
    assert_eq!(placed(again(Pack, &[id(1)])), vec![id(1)]);
    assert_eq!(placed(again(Pack, &[id(2)])), vec![id(2)]);
    assert_eq!(placed(again(Pack, &[id(3)])), vec![id(3)]);
    assert_eq!(placed(again(StrictPack, &[id(3)])), vec![id(3)]);
    assert_eq!(placed(again(StrictSpread, &[id(1), id(2)])), vec![id(3)]);
    assert_eq!(placed(again(Spread, &[id(1), id(3)])), vec![id(2)]);
    let full = again(StrictSpread, &[id(1), id(2), id(3)]);
    assert_eq!(
        full,
        Placement::Infeasible(Infeasibility::StrictSpread {
            bundles: 1,
            placeable: 0
        })
    );
    assert!(matches!(again(StrictPack, &[id(1), id(2)]), Placement::Infeasible(_)));
    assert!(matches!(
        again(StrictPack, &[id(9)]),
        Placement::Infeasible(Infeasibility::StrictPack { .. })
    ));
}

#[test]
fn dead_and_draining_nodes_get_no_bundle() {
    let dead = NodeView {
        alive: false,
        ..seen(FOUR, &[])
    };
    let draining = NodeView {
        draining: true,
        ..seen(FOUR, &[])
    };
    let view = cluster([dead, draining, seen(FOUR, &[])]);
    assert_eq!(placed(place(&view, &[1.0, 1.0], Spread)), vec![id(3); 2]);
    assert!(matches!(
        place(&view, &[1.0, 1.0], StrictSpread),
        Placement::Infeasible(_)
    ));
}

#[test]
fn equal_nodes_are_chosen_at_random() {
    let view = cluster((0..5).map(|_| seen(FOUR, &[])));
    let mut rng = numbers(11);
    let chosen: BTreeSet<NodeId> = (0..100)
        .map(|_| placed(place_bundles(&view, &bundles(&[1.0]), Pack, &mut rng))[0])
        .collect();
    assert_eq!(chosen.len(), 5);
}

#[test]
fn a_large_group_on_a_large_cluster_is_placed() {
    let view = cluster((0..200).map(|at| seen(&[("CPU", 8.0)], &[("CPU", f64::from(at % 8))])));
    let cpus = vec![1.0; 300];
    for strategy in [Pack, Spread] {
        assert_eq!(placed(place(&view, &cpus, strategy)).len(), 300);
    }
    assert_eq!(distinct(&placed(place(&view, &[1.0; 200], StrictSpread))), 200);
}
