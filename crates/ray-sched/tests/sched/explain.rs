//! What a user reads when something can never run.

use crate::common::{cluster, group, id, labelled, node, seen, set};
use ray_sched::{explain_infeasible, LabelOperator, LabelSelector, NodeView, SchedulingStrategy};

const FOUR: &[(&str, f64)] = &[("CPU", 4.0)];

fn explain(view: &ray_sched::ClusterView, demand: &[(&str, f64)], strategy: &SchedulingStrategy) -> String {
    explain_infeasible(view, &set(demand), strategy)
        .expect("it is infeasible")
        .to_string()
}

#[test]
fn each_cause_has_its_sentence_and_remedy() {
    let default = SchedulingStrategy::Default;
    let view = cluster([seen(FOUR, &[]), seen(&[("CPU", 1.0), ("GPU", 2.0)], &[])]);
    assert_eq!(
        explain(&view, &[("CPU", 8.0)], &default),
        "it needs CPU 8 on one node and the largest of 2 suitable node(s) has 4: \
         add a node with CPU 8, or ask for at most 4"
    );
    assert_eq!(
        explain(&view, &[("TPU", 1.0)], &default),
        "it needs TPU 1 and no suitable node has any TPU: add a node with TPU, or do not ask for it"
    );
    let text = explain(&view, &[("CPU", 2.0), ("GPU", 1.0)], &default);
    assert!(
        text.contains("it needs {CPU: 2, GPU: 1} on one node and no suitable node has all of it"),
        "{text}"
    );
    assert!(text.contains(&format!("on the closest, {}, ", id(1))), "{text}");
    assert!(text.contains("it needs GPU 1 and the node has 0 in total"), "{text}");
    assert_eq!(
        explain(&cluster([]), &[], &default),
        "no node is alive to take work: start a node"
    );
    let draining = cluster([NodeView {
        draining: true,
        ..seen(FOUR, &[])
    }]);
    assert_eq!(
        explain(&draining, &[], &default),
        "every live node (1) is draining: start another node"
    );
}

#[test]
fn labels_are_explained_with_what_there_is() {
    let view = cluster([
        labelled(seen(FOUR, &[]), &[("zone", "a")]),
        labelled(seen(FOUR, &[]), &[("zone", "b")]),
    ]);
    let hard = LabelSelector::any()
        .with("zone", LabelOperator::In(vec!["c".to_string()]))
        .with("disk", LabelOperator::Exists);
    let strategy = SchedulingStrategy::NodeLabel {
        hard,
        soft: LabelSelector::any(),
    };
    assert_eq!(
        explain(&view, &[("CPU", 1.0)], &strategy),
        "no live node has labels with zone in (c) and disk exists; no node has the label disk; zone is a, b on the \
         nodes there are: add a node with such labels, or change the selector"
    );
}

#[test]
fn affinity_and_groups_are_explained() {
    let view = cluster([seen(FOUR, &[])]);
    let hard = SchedulingStrategy::NodeAffinity {
        node: id(1),
        soft: false,
        spill_on_unavailable: false,
        fail_on_unavailable: false,
    };
    assert!(
        explain(&view, &[("CPU", 5.0)], &hard).contains("is too small, for it needs CPU 5 and the node has 4 in total")
    );

    let mut with_bundle = node(FOUR);
    with_bundle.add_bundle(group(1), 0, &set(&[("CPU", 2.0)])).unwrap();
    let view = cluster([NodeView::of(&with_bundle)]);
    let inside = |number, bundle_index| SchedulingStrategy::PlacementGroup {
        id: group(number),
        bundle_index,
        capture_child_tasks: true,
    };
    assert!(explain(&view, &[("CPU", 3.0)], &inside(1, Some(0))).starts_with("it needs CPU 3 and bundle 0 of"));
    assert!(explain(&view, &[("CPU", 3.0)], &inside(1, None)).contains("has at most 2 on one node"));
    assert!(explain(&view, &[("GPU", 1.0)], &inside(1, Some(0))).contains("has 0: make the group with more GPU"));
    assert!(explain(&view, &[("CPU", 1.0)], &inside(1, Some(1))).starts_with("no live node has bundle 1 of"));
    assert!(explain(&view, &[("CPU", 1.0)], &inside(2, None)).contains("wait until the group is ready"));
}

#[test]
fn what_is_only_busy_is_not_infeasible() {
    let view = cluster([seen(FOUR, FOUR)]);
    for strategy in [SchedulingStrategy::Default, SchedulingStrategy::Spread] {
        assert_eq!(explain_infeasible(&view, &set(FOUR), &strategy), None);
    }
}
