//! What holds for every sequence and every cluster.

use crate::common::{cluster, group, id, node, numbers, set};
use proptest::prelude::*;
use ray_sched::{
    choose_node, demand_in_group, explain_infeasible, place_bundles_with, Allocation, BundleRequest, Choice,
    ClusterView, LabelOperator, LabelSelector, NodeResources, NodeView, Placement, PlacementConstraints,
    PlacementStrategy, Quantity, ResourceName, ResourceSet, SchedulingStrategy,
};
use std::collections::{BTreeMap, BTreeSet};

#[derive(Debug, Clone)]
enum Step {
    Allocate {
        demand: ResourceSet,
        group: Option<(u8, Option<u32>)>,
    },
    Release(usize),
    GiveBackCpu(usize),
    TakeBackCpu(usize),
    Prepare {
        group: u8,
        index: u32,
        resources: ResourceSet,
    },
    Commit {
        group: u8,
        index: u32,
    },
    Remove {
        group: u8,
        index: u32,
    },
}

fn any_amounts() -> impl Strategy<Value = ResourceSet> {
    let gpus = prop_oneof![3 => Just(0), 1 => 1u32..10_000, 1 => (1u32..3).prop_map(|whole| whole * 10_000)];
    (0u32..25_000, gpus, 0u32..3).prop_map(|(cpu, gpu, x)| {
        let raw = |raw: u32| Quantity::from_raw(i64::from(raw));
        ResourceSet::new()
            .with(ResourceName::CPU, raw(cpu))
            .with(ResourceName::GPU, raw(gpu))
            .with(ResourceName::new("x"), raw(x * 10_000))
    })
}

fn any_step() -> impl Strategy<Value = Step> {
    let in_group = || proptest::option::of((1u8..3, proptest::option::of(0u32..3)));
    prop_oneof![
        4 => (any_amounts(), in_group()).prop_map(|(demand, group)| Step::Allocate { demand, group }),
        3 => any::<usize>().prop_map(Step::Release),
        1 => any::<usize>().prop_map(Step::GiveBackCpu),
        1 => any::<usize>().prop_map(Step::TakeBackCpu),
        2 => (1u8..3, 0u32..3, any_amounts()).prop_map(|(group, index, resources)| Step::Prepare { group, index, resources }),
        2 => (1u8..3, 0u32..3).prop_map(|(group, index)| Step::Commit { group, index }),
        1 => (1u8..3, 0u32..3).prop_map(|(group, index)| Step::Remove { group, index }),
    ]
}

/// What all holders have of each device together must not be more than the device.
fn check_devices(held: &[(Allocation, ResourceSet)]) -> Result<(), TestCaseError> {
    let mut whole_holders: BTreeMap<u32, usize> = BTreeMap::new();
    let mut holders: BTreeMap<u32, usize> = BTreeMap::new();
    for (allocation, demand) in held {
        let gpus = demand.get(&ResourceName::GPU);
        let ids = allocation.gpu_ids();
        let expected = gpus.whole_units() as usize + usize::from(!gpus.is_whole());
        prop_assert_eq!(ids.len(), expected, "a demand of {} GPUs has its devices", gpus);
        for device in ids {
            *holders.entry(device).or_default() += 1;
            if gpus >= Quantity::ONE {
                *whole_holders.entry(device).or_default() += 1;
            }
        }
    }
    for (device, count) in whole_holders {
        prop_assert!(
            count == 1 && holders[&device] == 1,
            "device {} is one lease's alone",
            device
        );
    }
    Ok(())
}

/// The books must agree with the sum of what is held.
fn check_sums(node: &NodeResources, held: &[(Allocation, ResourceSet)]) -> Result<(), TestCaseError> {
    for name in [ResourceName::CPU, ResourceName::GPU, ResourceName::new("x")] {
        let outside = |allocation: &Allocation| allocation.bundle().is_none();
        let lent = |allocation: &Allocation| name.is_cpu() && allocation.is_cpu_given_back();
        let used: Quantity = held
            .iter()
            .filter(|(allocation, _)| outside(allocation) && !lent(allocation))
            .map(|(_, demand)| demand.get(&name))
            .sum();
        let reserved: Quantity = node.bundles().map(|(_, _, _, resources)| resources.get(&name)).sum();
        let free = node.total(&name) - used - reserved;
        prop_assert_eq!(node.available(&name), free.at_least_zero(), "free {}", name);
        prop_assert!(
            name.is_cpu() || !free.is_negative(),
            "only CPU is ever sold beyond its total"
        );
    }
    Ok(())
}

fn apply(node: &mut NodeResources, held: &mut Vec<(Allocation, ResourceSet)>, step: Step) -> Result<(), TestCaseError> {
    match step {
        Step::Allocate { demand, group: within } => {
            let translated = match within {
                Some((number, index)) => demand_in_group(&demand, group(number), index),
                None => demand.clone(),
            };
            let fits_in_sum = node.shortage(&translated).is_none();
            let before = node.available_set();
            match node.allocate(&translated) {
                Ok(allocation) => {
                    prop_assert!(fits_in_sum);
                    prop_assert_eq!(allocation.resources(), demand.clone());
                    let mut after = before;
                    prop_assert!(after.checked_sub(&translated) || within.is_some());
                    held.push((allocation, demand));
                }
                Err(shortage) => {
                    prop_assert_eq!(node.available_set(), before, "what is refused changes nothing");
                    prop_assert!(!shortage.to_string().is_empty());
                    let gpu = demand.get(&ResourceName::GPU);
                    prop_assert!(
                        !fits_in_sum || !gpu.is_zero(),
                        "{} fits and was refused: {}",
                        demand,
                        shortage
                    );
                }
            }
        }
        Step::Release(at) if !held.is_empty() => node.release(held.swap_remove(at % held.len()).0),
        Step::GiveBackCpu(at) if !held.is_empty() => {
            let at = at % held.len();
            node.give_back_cpu(&mut held[at].0);
        }
        Step::TakeBackCpu(at) if !held.is_empty() => {
            let at = at % held.len();
            node.take_back_cpu(&mut held[at].0);
        }
        Step::Release(_) | Step::GiveBackCpu(_) | Step::TakeBackCpu(_) => {}
        Step::Prepare {
            group: number,
            index,
            resources,
        } => {
            // A refusal (no room, another bundle there) is as good an answer; the checks after the step judge it.
            let _ = node.prepare_bundle(group(number), index, &resources);
        }
        Step::Commit { group: number, index } => {
            let present = node.bundle_state(group(number), index).is_some();
            prop_assert!(node.commit_bundle(group(number), index).is_err() || present);
        }
        Step::Remove { group: number, index } => {
            let gone = node.remove_bundle(group(number), index);
            prop_assert_eq!(gone, node.bundle_state(group(number), index).is_none());
        }
    }
    Ok(())
}

fn any_node() -> impl Strategy<Value = NodeView> {
    (0u32..5, 0u32..3, 0u32..5, 0u32..3, 0u8..3, 0u8..12).prop_map(|(cpu, gpu, cpu_used, gpu_used, zone, fate)| {
        let amounts = |cpu: u32, gpu: u32| set(&[("CPU", f64::from(cpu)), ("GPU", f64::from(gpu))]);
        NodeView {
            total: amounts(cpu, gpu),
            available: amounts(cpu.saturating_sub(cpu_used), gpu.saturating_sub(gpu_used)),
            labels: [("zone".to_string(), zone.to_string())].into(),
            alive: fate != 0,
            draining: fate == 1,
        }
    })
}

fn any_cluster() -> impl Strategy<Value = ClusterView> {
    proptest::collection::vec(any_node(), 0..7).prop_map(cluster)
}

fn any_demand() -> impl Strategy<Value = ResourceSet> {
    (0u32..6, 0u32..3).prop_map(|(cpu, gpu)| set(&[("CPU", f64::from(cpu)), ("GPU", f64::from(gpu))]))
}

fn in_zone(zone: u8) -> LabelSelector {
    LabelSelector::any().with("zone", LabelOperator::In(vec![zone.to_string()]))
}

fn any_strategy() -> impl Strategy<Value = SchedulingStrategy> {
    prop_oneof![
        Just(SchedulingStrategy::Default),
        Just(SchedulingStrategy::Spread),
        (1u8..9, any::<bool>(), any::<bool>(), any::<bool>()).prop_map(|(node, soft, spill, fail)| {
            SchedulingStrategy::NodeAffinity {
                node: id(node),
                soft,
                spill_on_unavailable: spill,
                fail_on_unavailable: fail,
            }
        }),
        (0u8..4, 0u8..4).prop_map(|(hard, soft)| SchedulingStrategy::NodeLabel {
            hard: in_zone(hard),
            soft: in_zone(soft)
        }),
        proptest::option::of(0u32..2).prop_map(|bundle_index| SchedulingStrategy::PlacementGroup {
            id: group(1),
            bundle_index,
            capture_child_tasks: false,
        }),
    ]
}

/// Whether the strategy's hard part allows the node.
fn allows(strategy: &SchedulingStrategy, node: ray_ids::NodeId, view: &NodeView) -> bool {
    match strategy {
        SchedulingStrategy::NodeAffinity {
            node: wanted,
            soft: false,
            ..
        } => *wanted == node,
        SchedulingStrategy::NodeLabel { hard, .. } => hard.matches(&view.labels),
        _ => true,
    }
}

/// Whether any arrangement exists, by trying all of them.
fn arrangement_exists(
    free: &mut BTreeMap<ray_ids::NodeId, ResourceSet>,
    view: &ClusterView,
    bundles: &[BundleRequest],
    used: &mut Vec<ray_ids::NodeId>,
    strategy: PlacementStrategy,
) -> bool {
    let Some((bundle, rest)) = bundles.split_first() else {
        return true;
    };
    let nodes: Vec<ray_ids::NodeId> = free.keys().copied().collect();
    nodes.into_iter().any(|node| {
        let allowed = match strategy {
            PlacementStrategy::StrictPack => used.iter().all(|other| *other == node),
            PlacementStrategy::StrictSpread => !used.contains(&node),
            PlacementStrategy::Pack | PlacementStrategy::Spread => true,
        };
        if !allowed || !bundle.label_selector.matches(&view.nodes[&node].labels) {
            return false;
        }
        let before = free[&node].clone();
        let mut after = before.clone();
        if !after.checked_sub(&bundle.resources) {
            return false;
        }
        free.insert(node, after);
        used.push(node);
        let exists = arrangement_exists(free, view, rest, used, strategy);
        used.pop();
        free.insert(node, before);
        exists
    })
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 400, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn nothing_is_oversold_and_everything_returns(steps in proptest::collection::vec(any_step(), 0..60)) {
        let mut node = node(&[("CPU", 6.0), ("GPU", 3.0), ("x", 4.0)]);
        let start = node.total_set();
        let mut held = Vec::new();
        for step in steps {
            apply(&mut node, &mut held, step)?;
            node.validate().unwrap();
            check_devices(&held)?;
            check_sums(&node, &held)?;
            let all_released = node.available_if_released(held.iter().map(|(allocation, _)| allocation));
            let bundles: Vec<_> = node.bundles().map(|(_, _, _, resources)| resources.clone()).collect();
            let mut whole = all_released;
            bundles.iter().for_each(|bundle| whole.add_all(bundle));
            prop_assert_eq!(whole.get(&ResourceName::CPU), start.get(&ResourceName::CPU));
        }
        for (allocation, _) in held {
            node.release(allocation);
            node.validate().unwrap();
        }
        let bundles: Vec<_> = node.bundles().map(|(id, index, _, _)| (id, index)).collect();
        for (id, index) in bundles {
            prop_assert!(node.remove_bundle(id, index));
        }
        prop_assert_eq!(node.available_set(), start.clone());
        prop_assert_eq!(node.total_set(), start);
        prop_assert_eq!(node.cpu_debt(), Quantity::ZERO);
        node.validate().unwrap();
    }

    #[test]
    fn a_choice_fits_or_has_a_reason(
        mut view in any_cluster(),
        demand in any_demand(),
        strategy in any_strategy(),
        preferred in proptest::option::of(1u8..9),
        with_bundle in any::<bool>(),
        seed in any::<u64>(),
        cursor in any::<u64>(),
    ) {
        if let Some(first) = view.nodes.values_mut().next().filter(|_| with_bundle) {
            let bundle = ray_sched::bundle_resources(&set(&[("CPU", 2.0)]), group(1), 0);
            first.total.add_all(&bundle);
            first.available.add_all(&bundle);
        }
        let wanted = match &strategy {
            SchedulingStrategy::PlacementGroup { id, bundle_index, .. } => demand_in_group(&demand, *id, *bundle_index),
            _ => demand.clone(),
        };
        let could = |ever: bool| {
            let suitable = |(id, node): &(&ray_ids::NodeId, &NodeView)| {
                node.takes_work() && allows(&strategy, **id, node) && if ever { node.fits_ever(&wanted) } else { node.fits_now(&wanted) }
            };
            view.nodes.iter().any(|entry| suitable(&entry))
        };
        let preferred = preferred.map(id);
        let mut moving = cursor;
        let choice = choose_node(&view, &demand, &strategy, preferred, &mut numbers(seed), &mut moving);
        match &choice {
            Choice::Node(node) => {
                let chosen = &view.nodes[node];
                prop_assert!(chosen.takes_work() && chosen.fits_now(&wanted) && allows(&strategy, *node, chosen));
            }
            Choice::Busy(node) => {
                let chosen = &view.nodes[node];
                prop_assert!(chosen.takes_work() && chosen.fits_ever(&wanted) && allows(&strategy, *node, chosen));
                let soft_wait = matches!(strategy, SchedulingStrategy::NodeAffinity { soft: true, spill_on_unavailable: false, .. });
                prop_assert!(soft_wait || !could(false), "busy though a node is free");
            }
            Choice::Infeasible(reason) => {
                prop_assert!(!could(true), "infeasible though a node could hold it: {}", reason);
                prop_assert!(!reason.to_string().is_empty());
                prop_assert!(explain_infeasible(&view, &demand, &strategy).is_some());
            }
            Choice::Unavailable(reason) => {
                prop_assert!(!could(false), "unavailable though it fits: {}", reason);
                let hard = matches!(strategy, SchedulingStrategy::NodeAffinity { soft: false, .. });
                prop_assert!(hard);
            }
        }
        let mut again = cursor;
        prop_assert_eq!(choose_node(&view, &demand, &strategy, preferred, &mut numbers(seed), &mut again), choice);
        prop_assert_eq!(again, moving);
    }

    #[test]
    fn placements_respect_their_strategy_and_refusals_are_true(
        view in any_cluster(),
        wanted in proptest::collection::vec((any_demand(), proptest::option::weighted(0.2, 0u8..3)), 1..5),
        strategy in prop_oneof![
            Just(PlacementStrategy::Pack),
            Just(PlacementStrategy::Spread),
            Just(PlacementStrategy::StrictPack),
            Just(PlacementStrategy::StrictSpread),
        ],
        occupied in proptest::collection::vec(1u8..8, 0..2),
        seed in any::<u64>(),
    ) {
        let bundles: Vec<BundleRequest> = wanted
            .into_iter()
            .map(|(resources, zone)| BundleRequest { resources, label_selector: zone.map(in_zone).unwrap_or_default() })
            .collect();
        let occupied: Vec<ray_ids::NodeId> = occupied.into_iter().map(id).collect();
        let constraints = PlacementConstraints { soft_target_node: None, occupied: &occupied };
        let placement = place_bundles_with(&view, &bundles, strategy, constraints, &mut numbers(seed));
        let exists = |amount: fn(&NodeView) -> &ResourceSet| {
            let mut free = view.working_nodes().map(|(id, node)| (id, amount(node).clone())).collect();
            arrangement_exists(&mut free, &view, &bundles, &mut occupied.clone(), strategy)
        };
        let empty = bundles.iter().any(|bundle| bundle.resources.is_empty());
        match placement {
            Placement::Placed(nodes) => {
                prop_assert_eq!(nodes.len(), bundles.len());
                let mut sums: BTreeMap<ray_ids::NodeId, ResourceSet> = BTreeMap::new();
                for (node, bundle) in nodes.iter().zip(&bundles) {
                    prop_assert!(bundle.label_selector.matches(&view.nodes[node].labels));
                    sums.entry(*node).or_default().add_all(&bundle.resources);
                }
                for (node, sum) in &sums {
                    prop_assert!(view.nodes[node].takes_work() && view.nodes[node].fits_now(sum));
                }
                let all: Vec<_> = nodes.iter().chain(&occupied).collect();
                let different = all.iter().collect::<BTreeSet<_>>().len();
                match strategy {
                    PlacementStrategy::StrictPack => prop_assert_eq!(different, 1),
                    PlacementStrategy::StrictSpread => prop_assert_eq!(different, all.len()),
                    PlacementStrategy::Pack => {
                        // Where one node could hold all of a new group, one is used.
                        let mut free = view.working_nodes().map(|(id, node)| (id, node.available.clone())).collect();
                        let mut none = Vec::new();
                        let one = arrangement_exists(&mut free, &view, &bundles, &mut none, PlacementStrategy::StrictPack);
                        prop_assert!(!one || sums.len() == 1);
                    }
                    PlacementStrategy::Spread => {
                        // Where a new group could have a node for each, it has.
                        let mut free = view.working_nodes().map(|(id, node)| (id, node.available.clone())).collect();
                        let mut used = occupied.clone();
                        let each = arrangement_exists(&mut free, &view, &bundles, &mut used, PlacementStrategy::StrictSpread);
                        prop_assert!(!each || different == all.len());
                    }
                }
            }
            Placement::Busy => {
                prop_assert!(!empty && !exists(|node| &node.available), "busy though an arrangement is free");
                prop_assert!(exists(|node| &node.total), "busy though no arrangement exists at all");
            }
            Placement::Infeasible(reason) => {
                prop_assert!(empty || !exists(|node| &node.total), "infeasible though it could be placed: {}", reason);
                prop_assert!(!reason.to_string().is_empty());
            }
        }
    }
}
