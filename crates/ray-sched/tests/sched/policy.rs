//! Each strategy by small examples.

use crate::common::{cluster, group, id, labelled, node, numbers, seen, set};
use ray_ids::NodeId;
use ray_sched::{
    choose_node, choose_node_with, Choice, ClusterView, HybridSettings, Infeasibility, LabelOperator, LabelSelector,
    NodeView, ResourceSet, SchedulingStrategy, Unavailability,
};
use std::collections::BTreeSet;

fn choose(
    view: &ClusterView,
    demand: &ResourceSet,
    strategy: &SchedulingStrategy,
    preferred: Option<NodeId>,
) -> Choice {
    choose_node(view, demand, strategy, preferred, &mut numbers(1), &mut 0)
}

fn default(view: &ClusterView, demand: &[(&str, f64)], preferred: Option<NodeId>) -> Choice {
    choose(view, &set(demand), &SchedulingStrategy::Default, preferred)
}

fn affinity(node: NodeId, soft: bool, spill_on_unavailable: bool, fail_on_unavailable: bool) -> SchedulingStrategy {
    SchedulingStrategy::NodeAffinity {
        node,
        soft,
        spill_on_unavailable,
        fail_on_unavailable,
    }
}

const FOUR: &[(&str, f64)] = &[("CPU", 4.0)];
const ONE: &[(&str, f64)] = &[("CPU", 1.0)];

#[test]
fn default_packs_the_local_node_up_to_half() {
    let view = cluster([seen(FOUR, &[]), seen(FOUR, ONE), seen(FOUR, &[])]);
    assert_eq!(default(&view, ONE, Some(id(2))), Choice::Node(id(2)));
    assert_eq!(default(&view, ONE, Some(id(3))), Choice::Node(id(3)));
}

#[test]
fn default_without_a_local_node_packs_nodes_in_use_first() {
    let view = cluster([seen(FOUR, &[]), seen(FOUR, ONE), seen(FOUR, &[])]);
    assert_eq!(default(&view, ONE, None), Choice::Node(id(2)));
}

#[test]
fn default_leaves_the_local_node_at_half_for_a_less_used_one() {
    let view = cluster([seen(FOUR, &[("CPU", 2.0)]), seen(FOUR, ONE)]);
    assert_eq!(default(&view, ONE, Some(id(1))), Choice::Node(id(2)));
    let all_beyond = cluster([seen(FOUR, &[("CPU", 3.0)]), seen(FOUR, &[("CPU", 2.0)])]);
    assert_eq!(default(&all_beyond, ONE, Some(id(1))), Choice::Node(id(2)));
    let equal = cluster([seen(FOUR, &[("CPU", 2.0)]), seen(FOUR, &[("CPU", 2.0)])]);
    assert_eq!(
        default(&equal, ONE, Some(id(2))),
        Choice::Node(id(2)),
        "of equals the local one"
    );
}

#[test]
fn default_chooses_at_random_among_the_best_fifth() {
    let view = cluster((0..10).map(|_| seen(FOUR, &[])));
    let mut rng = numbers(7);
    let mut chosen = BTreeSet::new();
    for _ in 0..100 {
        match choose_node(&view, &set(ONE), &SchedulingStrategy::Default, None, &mut rng, &mut 0) {
            Choice::Node(node) => chosen.insert(node),
            other => panic!("{other:?}"),
        };
    }
    assert_eq!(chosen, BTreeSet::from([id(1), id(2)]));
}

#[test]
fn work_without_gpus_leaves_gpu_nodes_alone_while_others_are_free() {
    let gpu = &[("CPU", 4.0), ("GPU", 1.0)];
    let view = cluster([seen(gpu, &[]), seen(FOUR, &[("CPU", 3.0)])]);
    assert_eq!(default(&view, ONE, Some(id(1))), Choice::Node(id(2)));
    assert_eq!(default(&view, &[("CPU", 2.0)], None), Choice::Node(id(1)));
    assert_eq!(default(&view, &[("GPU", 1.0)], None), Choice::Node(id(1)));
    let settings = HybridSettings {
        avoid_gpu_nodes: false,
        ..HybridSettings::default()
    };
    let (any, strategy) = (LabelSelector::any(), SchedulingStrategy::Default);
    let local = Some(id(1));
    let choice = choose_node_with(
        &settings,
        &any,
        &view,
        &set(ONE),
        &strategy,
        local,
        &mut numbers(1),
        &mut 0,
    );
    assert_eq!(choice, Choice::Node(id(1)));
}

#[test]
fn actors_that_need_nothing_are_dealt_over_all_nodes() {
    let view = cluster((0..4).map(|_| seen(FOUR, FOUR)));
    let mut rng = numbers(3);
    let chosen: BTreeSet<String> = (0..100)
        .map(|_| {
            format!(
                "{:?}",
                choose_node(&view, &set(&[]), &SchedulingStrategy::Default, None, &mut rng, &mut 0)
            )
        })
        .collect();
    assert_eq!(chosen.len(), 4);
}

#[test]
fn busy_names_where_to_wait_and_infeasible_says_why() {
    let view = cluster([seen(FOUR, FOUR), seen(FOUR, &[("CPU", 3.5)])]);
    assert_eq!(default(&view, ONE, None), Choice::Busy(id(2)));
    assert_eq!(default(&view, ONE, Some(id(1))), Choice::Busy(id(1)));
    assert!(matches!(
        default(&view, &[("CPU", 8.0)], None),
        Choice::Infeasible(Infeasibility::TooMuch { .. })
    ));
    assert_eq!(
        default(&cluster([]), ONE, None),
        Choice::Infeasible(Infeasibility::NoNodes { draining: 0 })
    );
    assert_eq!(
        default(&cluster([]), &[], None),
        Choice::Infeasible(Infeasibility::NoNodes { draining: 0 })
    );
}

#[test]
fn dead_and_draining_nodes_get_nothing() {
    let dead = NodeView {
        alive: false,
        ..seen(FOUR, &[])
    };
    let draining = NodeView {
        draining: true,
        ..seen(FOUR, &[])
    };
    let view = cluster([dead.clone(), draining.clone(), seen(FOUR, &[])]);
    for strategy in [SchedulingStrategy::Default, SchedulingStrategy::Spread] {
        assert_eq!(choose(&view, &set(ONE), &strategy, Some(id(1))), Choice::Node(id(3)));
        assert_eq!(choose(&view, &set(ONE), &strategy, Some(id(2))), Choice::Node(id(3)));
    }
    let hard = |node| choose(&view, &set(ONE), &affinity(node, false, false, false), None);
    assert_eq!(hard(id(1)), Choice::Unavailable(Unavailability::Dead(id(1))));
    assert_eq!(hard(id(2)), Choice::Unavailable(Unavailability::Draining(id(2))));
    let none = cluster([dead, draining]);
    assert_eq!(
        default(&none, ONE, None),
        Choice::Infeasible(Infeasibility::NoNodes { draining: 1 })
    );
}

#[test]
fn spread_goes_round_and_skips_what_is_full() {
    let view = cluster([
        seen(FOUR, &[]),
        seen(FOUR, FOUR),
        seen(FOUR, &[]),
        seen(&[("CPU", 0.5)], &[]),
    ]);
    let mut cursor = 0;
    let mut next = |view: &ClusterView| {
        choose_node(
            view,
            &set(ONE),
            &SchedulingStrategy::Spread,
            Some(id(1)),
            &mut numbers(1),
            &mut cursor,
        )
    };
    let turns = [next(&view), next(&view), next(&view), next(&view)];
    assert_eq!(turns, [id(1), id(3), id(1), id(3)].map(Choice::Node));
    let full = cluster([seen(FOUR, FOUR), seen(FOUR, FOUR)]);
    let waits = [next(&full), next(&full)];
    assert_ne!(waits[0], waits[1], "those that wait are dealt out too");
    assert!(waits.iter().all(|choice| matches!(choice, Choice::Busy(_))));
}

#[test]
fn hard_affinity_goes_there_waits_there_or_fails() {
    let view = cluster([seen(FOUR, FOUR), seen(FOUR, &[])]);
    let at = |node, fail| choose(&view, &set(ONE), &affinity(node, false, false, fail), None);
    assert_eq!(at(id(2), false), Choice::Node(id(2)));
    assert_eq!(at(id(1), false), Choice::Busy(id(1)));
    let Choice::Unavailable(reason) = at(id(1), true) else {
        panic!("it fails rather than to wait")
    };
    assert!(
        reason.to_string().contains("needs CPU 1 and 0 of 4 is free now"),
        "{reason}"
    );
    let Choice::Unavailable(reason) = at(id(9), false) else {
        panic!("an unknown node cannot be had")
    };
    assert!(reason.to_string().contains("dead or unknown"), "{reason}");
    let big = choose(&view, &set(&[("CPU", 5.0)]), &affinity(id(1), false, false, true), None);
    assert!(
        matches!(big, Choice::Infeasible(Infeasibility::AffinityNodeTooSmall { .. })),
        "{big:?}"
    );
}

#[test]
fn soft_affinity_prefers_its_node_and_falls_back() {
    let view = cluster([seen(FOUR, FOUR), seen(&[("CPU", 8.0)], &[])]);
    let at = |node, demand, spill| choose(&view, &set(demand), &affinity(node, true, spill, false), None);
    assert_eq!(
        at(id(1), ONE, false),
        Choice::Busy(id(1)),
        "soft alone waits for a busy node"
    );
    assert_eq!(at(id(1), ONE, true), Choice::Node(id(2)));
    assert_eq!(at(id(1), &[("CPU", 5.0)], false), Choice::Node(id(2)), "too small");
    assert_eq!(at(id(9), ONE, false), Choice::Node(id(2)), "dead");
    assert!(matches!(at(id(1), &[("CPU", 9.0)], false), Choice::Infeasible(_)));
    let all_busy = cluster([seen(FOUR, FOUR), seen(FOUR, FOUR)]);
    let wait = choose(&all_busy, &set(ONE), &affinity(id(2), true, true, false), None);
    assert_eq!(wait, Choice::Busy(id(2)));
}

#[test]
fn labels_filter_hard_and_prefer_soft() {
    let view = cluster([
        labelled(seen(FOUR, &[]), &[("region", "us")]),
        labelled(seen(FOUR, &[]), &[("region", "eu"), ("disk", "ssd")]),
        labelled(seen(FOUR, &[]), &[("region", "eu")]),
    ]);
    let region = |value: &str| LabelSelector::any().with("region", LabelOperator::In(vec![value.to_string()]));
    let ssd = || LabelSelector::any().with("disk", LabelOperator::In(vec!["ssd".to_string()]));
    let by =
        |view: &ClusterView, hard, soft| choose(view, &set(ONE), &SchedulingStrategy::NodeLabel { hard, soft }, None);
    assert_eq!(by(&view, region("us"), ssd()), Choice::Node(id(1)));
    assert_eq!(by(&view, region("eu"), ssd()), Choice::Node(id(2)));
    let hdd = LabelSelector::any().with("disk", LabelOperator::DoesNotExist);
    assert_eq!(by(&view, region("eu"), hdd), Choice::Node(id(3)));
    assert!(matches!(
        by(&view, region("asia"), ssd()),
        Choice::Infeasible(Infeasibility::Labels { .. })
    ));

    let mut busy = view.clone();
    busy.nodes.get_mut(&id(2)).unwrap().available = set(&[]);
    assert_eq!(
        by(&busy, region("eu"), ssd()),
        Choice::Node(id(3)),
        "a free node before a preferred one that is busy"
    );
    busy.nodes.get_mut(&id(3)).unwrap().available = set(&[]);
    assert_eq!(
        by(&busy, region("eu"), ssd()),
        Choice::Busy(id(2)),
        "to wait, the preferred one"
    );
    let no_ssd = LabelSelector::any().with("disk", LabelOperator::DoesNotExist);
    assert_eq!(
        by(&busy, region("eu"), no_ssd),
        Choice::Busy(id(3)),
        "whichever id it has"
    );
}

#[test]
fn the_random_choice_keeps_to_the_local_node_and_off_gpu_nodes() {
    let half = &[("CPU", 2.0)];
    let equal = cluster((0..10).map(|_| seen(FOUR, half)));
    let gpu = &[("CPU", 4.0), ("GPU", 1.0)];
    let mixed = cluster((0..10).map(|at| if at == 4 { seen(FOUR, half) } else { seen(gpu, &[]) }));
    let mut rng = numbers(9);
    for _ in 0..50 {
        let mut choose =
            |view, local| choose_node(view, &set(ONE), &SchedulingStrategy::Default, local, &mut rng, &mut 0);
        assert_eq!(choose(&equal, Some(id(2))), Choice::Node(id(2)));
        assert_eq!(choose(&mixed, None), Choice::Node(id(5)));
    }
}

#[test]
fn a_selector_joins_any_strategy() {
    let view = cluster([seen(FOUR, &[]), labelled(seen(FOUR, &[]), &[("disk", "ssd")])]);
    let selector = LabelSelector::from_option([("disk", "ssd")]).unwrap();
    for strategy in [
        SchedulingStrategy::Default,
        SchedulingStrategy::Spread,
        affinity(id(9), true, false, false),
    ] {
        let settings = HybridSettings::default();
        let local = Some(id(1));
        let choice = choose_node_with(
            &settings,
            &selector,
            &view,
            &set(ONE),
            &strategy,
            local,
            &mut numbers(1),
            &mut 0,
        );
        assert_eq!(choice, Choice::Node(id(2)), "{strategy:?}");
    }
}

#[test]
fn a_placement_group_is_followed_to_its_bundles() {
    let mut first = node(FOUR);
    let mut second = node(FOUR);
    first.add_bundle(group(1), 0, &set(&[("CPU", 2.0)])).unwrap();
    second.add_bundle(group(1), 1, &set(&[("CPU", 1.0)])).unwrap();
    let held = second
        .allocate(&ray_sched::demand_in_group(&set(ONE), group(1), Some(1)))
        .unwrap();
    let view = cluster([NodeView::of(&first), NodeView::of(&second)]);
    let inside = |demand: &[(&str, f64)], bundle_index| {
        let strategy = SchedulingStrategy::PlacementGroup {
            id: group(1),
            bundle_index,
            capture_child_tasks: false,
        };
        choose(&view, &set(demand), &strategy, None)
    };
    assert_eq!(inside(ONE, Some(0)), Choice::Node(id(1)));
    assert_eq!(inside(ONE, Some(1)), Choice::Busy(id(2)));
    assert_eq!(inside(ONE, None), Choice::Node(id(1)));
    assert_eq!(
        inside(&[], Some(1)),
        Choice::Node(id(2)),
        "a demand of nothing goes to its bundle all the same"
    );
    assert!(matches!(
        inside(ONE, Some(2)),
        Choice::Infeasible(Infeasibility::BundleMissing { bundle_index: 2, .. })
    ));
    assert!(matches!(
        inside(&[("CPU", 3.0)], Some(0)),
        Choice::Infeasible(Infeasibility::BeyondBundle { .. })
    ));
    let strategy = SchedulingStrategy::PlacementGroup {
        id: group(2),
        bundle_index: None,
        capture_child_tasks: false,
    };
    let missing = choose(&view, &set(ONE), &strategy, None);
    assert!(
        matches!(missing, Choice::Infeasible(Infeasibility::GroupMissing { .. })),
        "{missing:?}"
    );
    let mixed = choose(
        &view,
        &ray_sched::demand_in_group(&set(ONE), group(1), None),
        &strategy,
        None,
    );
    assert!(
        matches!(mixed, Choice::Infeasible(Infeasibility::OtherGroup { .. })),
        "{mixed:?}"
    );
    second.release(held);
}
