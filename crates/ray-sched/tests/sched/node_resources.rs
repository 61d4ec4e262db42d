//! One node's books.

use crate::common::{group, node, set};
use ray_sched::resource_set::demand_in_group;
use ray_sched::{
    BundleState, Labels, NodeResources, Quantity, ResourceName, ResourceSet, SchedError, ShortageKind, UnitResources,
};

fn free(node: &NodeResources, name: &str) -> f64 {
    node.validate().unwrap();
    node.available(&ResourceName::new(name)).to_f64()
}

#[test]
fn what_is_taken_is_not_free_until_it_is_given_back() {
    let mut node = node(&[("CPU", 2.0), ("x", 1.0)]);
    let one = node.allocate(&set(&[("CPU", 1.5), ("x", 1.0)])).unwrap();
    assert_eq!((free(&node, "CPU"), free(&node, "x")), (0.5, 0.0));
    let shortage = node.allocate(&set(&[("CPU", 1.0)])).unwrap_err();
    assert_eq!(shortage.kind, ShortageKind::Busy);
    assert_eq!(shortage.to_string(), "it needs CPU 1 and 0.5 of 2 is free now");
    assert_eq!(one.resources(), set(&[("CPU", 1.5), ("x", 1.0)]));
    node.release(one);
    assert_eq!(node.available_set(), node.total_set());
}

#[test]
fn a_demand_that_fails_in_part_takes_nothing() {
    let mut node = node(&[("CPU", 2.0), ("GPU", 1.0)]);
    let held = node.allocate(&set(&[("GPU", 1.0)])).unwrap();
    assert!(node.allocate(&set(&[("CPU", 1.0), ("GPU", 1.0)])).is_err());
    assert_eq!(free(&node, "CPU"), 2.0);
    node.release(held);
}

#[test]
fn what_can_never_fit_is_said_before_what_is_busy() {
    let mut node = node(&[("CPU", 1.0)]);
    let held = node.allocate(&set(&[("CPU", 1.0)])).unwrap();
    let shortage = node.allocate(&set(&[("CPU", 1.0), ("TPU", 4.0)])).unwrap_err();
    assert!(shortage.is_infeasible());
    assert_eq!(shortage.to_string(), "it needs TPU 4 and the node has 0 in total");
    assert!(!node.is_feasible(&set(&[("TPU", 4.0)])));
    assert!(node.is_feasible(&set(&[("CPU", 1.0)])));
    node.release(held);
}

#[test]
fn fractions_share_a_gpu_and_whole_ones_have_theirs_alone() {
    let mut node = node(&[("GPU", 3.0)]);
    let half = || set(&[("GPU", 0.5)]);
    let (a, b) = (node.allocate(&half()).unwrap(), node.allocate(&half()).unwrap());
    assert_eq!((a.gpu_ids(), b.gpu_ids()), (vec![0], vec![0]));
    let two = node.allocate(&set(&[("GPU", 2.0)])).unwrap();
    assert_eq!(two.gpu_ids(), vec![1, 2]);
    assert!(node.allocate(&set(&[("GPU", 0.1)])).is_err());
    node.release(a);
    assert_eq!(free(&node, "GPU"), 0.5);
    let small = node.allocate(&set(&[("GPU", 0.3)])).unwrap();
    assert_eq!(small.gpu_ids(), vec![0]);
    for allocation in [b, two, small] {
        node.release(allocation);
    }
    assert_eq!(free(&node, "GPU"), 3.0);
}

#[test]
fn enough_in_sum_but_on_no_device_is_explained() {
    let mut node = node(&[("GPU", 2.0)]);
    let big = |_| set(&[("GPU", 0.6)]);
    let held: Vec<_> = (0..2).map(|at| node.allocate(&big(at)).unwrap()).collect();
    assert_eq!((held[0].gpu_ids(), held[1].gpu_ids()), (vec![0], vec![1]));
    let shortage = node.allocate(&set(&[("GPU", 0.7)])).unwrap_err();
    assert_eq!(
        shortage.kind,
        ShortageKind::Fragmented {
            largest_share: Quantity::from_raw(4_000)
        }
    );
    assert!(shortage.to_string().contains("at most 0.4 free"), "{shortage}");
    held.into_iter().for_each(|allocation| node.release(allocation));
}

#[test]
fn user_named_devices_have_numbers_too() {
    let units = UnitResources::with(&["dongle"]);
    let total = ResourceSet::from_user([("dongle", 2.0)], &units).unwrap();
    let mut node = NodeResources::new(&total, Labels::new(), &units).unwrap();
    let one = node
        .allocate(&ResourceSet::from_user([("dongle", 1.0)], &units).unwrap())
        .unwrap();
    assert_eq!(one.device_ids(&ResourceName::new("dongle")), vec![0]);
    assert_eq!(one.gpu_ids(), Vec::<u32>::new());
    node.release(one);
    let half = ResourceSet::new().with(ResourceName::GPU, Quantity::from_raw(15_000));
    let error = NodeResources::new(&half, Labels::new(), &units).unwrap_err();
    assert!(matches!(error, SchedError::FractionalDevices { .. }), "{error}");
}

#[test]
fn a_blocked_worker_lends_its_cpu_and_resumes_on_debt() {
    let mut node = node(&[("CPU", 1.0), ("GPU", 1.0)]);
    let mut blocked = node.allocate(&set(&[("CPU", 1.0), ("GPU", 1.0)])).unwrap();
    assert!(node.give_back_cpu(&mut blocked));
    assert!(!node.give_back_cpu(&mut blocked), "it is given back once");
    assert_eq!((free(&node, "CPU"), free(&node, "GPU")), (1.0, 0.0));
    let child = node.allocate(&set(&[("CPU", 1.0)])).unwrap();
    assert!(node.take_back_cpu(&mut blocked));
    assert!(!node.take_back_cpu(&mut blocked), "it is taken again once");
    assert_eq!((free(&node, "CPU"), node.cpu_debt().to_f64()), (0.0, 1.0));
    node.release(child);
    assert_eq!((free(&node, "CPU"), node.cpu_debt().to_f64()), (0.0, 0.0));
    node.release(blocked);
    assert_eq!(free(&node, "CPU"), 1.0);
}

#[test]
fn a_worker_that_dies_while_blocked_returns_its_cpu_once() {
    let mut node = node(&[("CPU", 2.0)]);
    let mut blocked = node.allocate(&set(&[("CPU", 2.0)])).unwrap();
    node.give_back_cpu(&mut blocked);
    node.release(blocked);
    assert_eq!(free(&node, "CPU"), 2.0);
}

#[test]
fn a_bundle_turns_base_resources_into_group_resources() {
    let mut node = node(&[("CPU", 4.0), ("GPU", 2.0)]);
    node.prepare_bundle(group(1), 0, &set(&[("CPU", 2.0), ("GPU", 1.0)]))
        .unwrap();
    assert_eq!(node.bundle_state(group(1), 0), Some(BundleState::Prepared));
    assert_eq!((free(&node, "CPU"), node.total_set().len()), (2.0, 2));
    let inside = demand_in_group(&set(&[("CPU", 1.0), ("GPU", 0.5)]), group(1), Some(0));
    assert!(
        node.allocate(&inside).unwrap_err().is_infeasible(),
        "a prepared bundle is not open yet"
    );
    node.commit_bundle(group(1), 0).unwrap();
    node.commit_bundle(group(1), 0).unwrap();
    let hex = group(1).hex();
    for name in [format!("CPU_group_{hex}"), format!("CPU_group_0_{hex}")] {
        assert_eq!(
            (free(&node, &name), node.total(&ResourceName::new(&name)).to_f64()),
            (2.0, 2.0)
        );
    }
    assert_eq!(free(&node, &format!("bundle_group_{hex}")), 1000.0);
    assert_eq!(node.total(&ResourceName::CPU).to_f64(), 4.0);

    let lease = node.allocate(&inside).unwrap();
    assert_eq!(lease.bundle(), Some((group(1), 0)));
    assert_eq!(lease.resources(), set(&[("CPU", 1.0), ("GPU", 0.5)]));
    assert_eq!(lease.gpu_ids(), vec![0]);
    assert_eq!(free(&node, &format!("CPU_group_{hex}")), 1.0);
    assert_eq!(free(&node, &format!("bundle_group_0_{hex}")), 999.999);
    let outside = node.allocate(&set(&[("GPU", 1.0)])).unwrap();
    assert_eq!(outside.gpu_ids(), vec![1], "the bundle's device is the bundle's");
    node.release(outside);

    assert!(!node.remove_bundle(group(1), 0), "a lease is in it");
    assert_eq!(node.bundle_state(group(1), 0), Some(BundleState::Removing));
    assert!(node.allocate(&inside).is_err());
    let again = node.prepare_bundle(group(1), 0, &set(&[("CPU", 2.0)])).unwrap_err();
    assert!(matches!(again, SchedError::BundleRemoving { .. }), "{again}");
    node.release(lease);
    assert_eq!(node.bundle_state(group(1), 0), None);
    assert_eq!(node.available_set(), set(&[("CPU", 4.0), ("GPU", 2.0)]));
    assert!(node.remove_bundle(group(1), 0), "removing what is gone is harmless");
}

#[test]
fn preparing_again_is_harmless_and_a_contradiction_is_refused() {
    let mut node = node(&[("CPU", 4.0)]);
    let two = set(&[("CPU", 2.0)]);
    node.prepare_bundle(group(1), 0, &two).unwrap();
    node.prepare_bundle(group(1), 0, &two).unwrap();
    assert_eq!(free(&node, "CPU"), 2.0);
    let other = node.prepare_bundle(group(1), 0, &set(&[("CPU", 1.0)])).unwrap_err();
    assert!(matches!(other, SchedError::BundleConflict { .. }), "{other}");
    let big = node.prepare_bundle(group(1), 1, &set(&[("CPU", 3.0)])).unwrap_err();
    assert!(
        big.to_string().contains("it needs CPU 3 and 2 of 4 is free now"),
        "{big}"
    );
    assert!(matches!(
        node.prepare_bundle(group(1), 1, &set(&[])),
        Err(SchedError::EmptyBundle { .. })
    ));
    assert!(matches!(
        node.commit_bundle(group(1), 7),
        Err(SchedError::BundleUnknown { .. })
    ));
    assert!(
        node.remove_bundle(group(1), 0),
        "a prepared bundle is cancelled at once"
    );
    assert_eq!(free(&node, "CPU"), 4.0);
}

#[test]
fn a_demand_without_an_index_draws_from_the_tightest_bundle_and_never_twice() {
    let mut node = node(&[("CPU", 5.0)]);
    node.add_bundle(group(1), 0, &set(&[("CPU", 3.0)])).unwrap();
    node.add_bundle(group(1), 1, &set(&[("CPU", 2.0)])).unwrap();
    let any = |cpus| demand_in_group(&set(&[("CPU", cpus)]), group(1), None);
    let first = node.allocate(&any(2.0)).unwrap();
    assert_eq!(first.bundle(), Some((group(1), 1)));
    let indexed = demand_in_group(&set(&[("CPU", 1.0)]), group(1), Some(1));
    assert!(
        node.allocate(&indexed).is_err(),
        "its bundle is used up by the demand without an index"
    );
    let second = node.allocate(&any(3.0)).unwrap();
    assert_eq!(second.bundle(), Some((group(1), 0)));
    assert!(node.allocate(&any(0.5)).is_err());
    node.release(first);
    node.release(second);
    let both = node.allocate(&any(4.0)).unwrap();
    assert_eq!(
        both.resources(),
        set(&[("CPU", 4.0)]),
        "where no one bundle holds it, several do"
    );
    node.release(both);
    let nothing = node.allocate(&any(0.0)).unwrap();
    assert!(nothing.resources().is_empty() && !nothing.is_empty());
    node.release(nothing);
    assert_eq!(free(&node, &format!("CPU_group_{}", group(1))), 5.0);
}

#[test]
fn a_blocked_worker_lends_its_bundles_cpu() {
    let mut node = node(&[("CPU", 1.0)]);
    node.add_bundle(group(1), 0, &set(&[("CPU", 1.0)])).unwrap();
    let demand = demand_in_group(&set(&[("CPU", 1.0)]), group(1), Some(0));
    let mut parent = node.allocate(&demand).unwrap();
    node.give_back_cpu(&mut parent);
    let child = node.allocate(&demand).unwrap();
    node.take_back_cpu(&mut parent);
    assert_eq!(node.cpu_debt().to_f64(), 1.0);
    assert_eq!(free(&node, "CPU"), 0.0, "the node itself lends nothing");
    node.remove_bundle(group(1), 0);
    node.release(parent);
    node.release(child);
    assert_eq!(free(&node, "CPU"), 1.0);
}

#[test]
fn leases_kept_by_idle_owners_count_as_free_in_a_view() {
    let mut node = node(&[("CPU", 2.0), ("GPU", 1.0)]);
    let idle = node.allocate(&set(&[("CPU", 1.0), ("GPU", 1.0)])).unwrap();
    let busy = node.allocate(&set(&[("CPU", 1.0)])).unwrap();
    assert_eq!(node.available_set(), set(&[]));
    assert_eq!(node.available_if_released([&idle]), set(&[("CPU", 1.0), ("GPU", 1.0)]));
    assert_eq!(node.available_if_released([&idle, &busy]), node.total_set());
    node.release(idle);
    node.release(busy);
}

#[test]
fn every_change_has_a_new_revision() {
    let mut node = node(&[("CPU", 1.0)]);
    let before = node.revision();
    let mut lease = node.allocate(&set(&[("CPU", 1.0)])).unwrap();
    let allocated = node.revision();
    node.give_back_cpu(&mut lease);
    let lent = node.revision();
    assert!(before < allocated && allocated < lent);
    assert!(node.allocate(&set(&[("CPU", 2.0)])).is_err());
    assert_eq!(node.revision(), lent, "what is refused changes nothing");
    node.release(lease);
    assert!(node.revision() > lent);
}

#[test]
fn names_of_the_runtime_are_no_node_resources() {
    let reserved = ResourceSet::new().with(ResourceName::CPU.in_group(group(1), None), Quantity::ONE);
    let error = NodeResources::new(&reserved, Labels::new(), &UnitResources::default()).unwrap_err();
    assert!(matches!(error, SchedError::ReservedName { .. }), "{error}");
    let mut node = node(&[("CPU", 1.0)]);
    assert!(matches!(
        node.prepare_bundle(group(1), 0, &reserved),
        Err(SchedError::ReservedName { .. })
    ));
}
