//! Placement groups: the two phases, waiting, losing nodes, removal.

use ray_gcs::{GcsMessage, NodeMessage};
use ray_ids::{NodeId, PlacementGroupId};
use ray_wire::*;

use crate::world::*;

fn specification(number: u8, bundles: usize, strategy: u32) -> PlacementGroupSpecification {
    PlacementGroupSpecification {
        placement_group_id: bytes(group_id(number).as_bytes()),
        bundles: vec![
            BundleSpecification {
                resources: cpus(1),
                labels: Vec::new()
            };
            bundles
        ],
        strategy,
        job_id: bytes(&[1, 0, 0, 0]),
        ..PlacementGroupSpecification::default()
    }
}

fn prepares(world: &World, node: NodeId) -> Vec<PrepareBundles> {
    world.sent_to(node, |message| match message {
        GcsMessage::PrepareBundles(prepare) => Some(prepare.clone()),
        _ => None,
    })
}

fn returns(world: &World, node: NodeId) -> Vec<ReturnBundles> {
    world.sent_to(node, |message| match message {
        GcsMessage::ReturnBundles(message) => Some(message.clone()),
        _ => None,
    })
}

fn commits(world: &World, node: NodeId) -> usize {
    world
        .sent_to(node, |message| {
            matches!(message, GcsMessage::CommitBundles(_)).then_some(())
        })
        .len()
}

fn prepared(world: &mut World, node: NodeId, group: PlacementGroupId, attempt: u64, success: bool) {
    let placement_group_id = bytes(group.as_bytes());
    world.hear(
        node,
        NodeMessage::BundlesPrepared(BundlesPrepared {
            placement_group_id,
            attempt,
            success,
        }),
    );
}

fn committed(world: &mut World, node: NodeId, group: PlacementGroupId, attempt: u64) {
    let placement_group_id = bytes(group.as_bytes());
    world.hear(
        node,
        NodeMessage::BundlesCommitted(BundlesCommitted {
            placement_group_id,
            attempt,
        }),
    );
}

fn state(world: &mut World, number: u8) -> String {
    let groups = world.query(r#"{"method": "placement_groups"}"#);
    groups[group_id(number).hex()]["state"].as_str().unwrap().to_string()
}

fn start(nodes: u8, cpu: i64) -> (World, Vec<NodeId>) {
    let mut world = World::new();
    let nodes: Vec<NodeId> = (1..=nodes).map(|number| world.add_node(number, cpu)).collect();
    world.add_job(nodes[0]);
    (world, nodes)
}

/// Makes a STRICT_SPREAD group of so many bundles through both phases, and says on which nodes it is.
fn make(world: &mut World, nodes: &[NodeId], number: u8, bundles: usize) -> Vec<NodeId> {
    assert_eq!(
        world
            .ask(
                nodes[0],
                GcsCall::CreatePlacementGroup(specification(number, bundles, 3))
            )
            .error,
        ""
    );
    let used: Vec<NodeId> = nodes
        .iter()
        .copied()
        .filter(|node| !prepares(world, *node).is_empty())
        .collect();
    assert_eq!(used.len(), bundles);
    for node in &used {
        prepared(world, *node, group_id(number), 1, true);
    }
    for node in &used {
        committed(world, *node, group_id(number), 1);
    }
    assert_eq!(state(world, number), "CREATED");
    used
}

fn wait(world: &mut World, node: NodeId, number: u8, wait_ms: u64) -> (u64, Option<GcsReply>) {
    let key = PlacementGroupKey {
        placement_group_id: bytes(group_id(number).as_bytes()),
        wait_ms,
        ..Default::default()
    };
    let reply = world.ask_as(node, worker_id(1), 0, GcsCall::WaitPlacementGroup(key));
    (world.correlation, reply)
}

#[test]
fn nothing_is_committed_before_all_have_prepared() {
    let (mut world, nodes) = start(2, 1);
    world.ask(nodes[0], GcsCall::CreatePlacementGroup(specification(1, 2, 3)));
    let (waiter, none) = wait(&mut world, nodes[0], 1, 10_000);
    assert_eq!(none, None);
    assert_eq!(prepares(&world, nodes[0])[0].bundles.len(), 1);
    prepared(&mut world, nodes[0], group_id(1), 1, true);
    assert_eq!(commits(&world, nodes[0]), 0);
    prepared(&mut world, nodes[1], group_id(1), 1, true);
    assert_eq!((commits(&world, nodes[0]), commits(&world, nodes[1])), (1, 1));
    committed(&mut world, nodes[0], group_id(1), 1);
    assert_eq!(state(&mut world, 1), "PENDING");
    assert_eq!(world.answer(waiter), None);
    committed(&mut world, nodes[1], group_id(1), 1);
    assert_eq!(state(&mut world, 1), "CREATED");
    assert!(world.answer(waiter).unwrap().found);
    assert!(wait(&mut world, nodes[0], 1, 0).1.unwrap().found);
}

#[test]
fn one_refusal_gives_everything_back_and_is_tried_again() {
    let (mut world, nodes) = start(2, 1);
    world.ask(nodes[0], GcsCall::CreatePlacementGroup(specification(1, 2, 3)));
    prepared(&mut world, nodes[0], group_id(1), 1, true);
    prepared(&mut world, nodes[1], group_id(1), 1, false);
    assert_eq!(returns(&world, nodes[0]).len(), 1);
    assert_eq!(returns(&world, nodes[0])[0].attempt, 1);
    assert!(returns(&world, nodes[1]).is_empty(), "who refused holds nothing");
    world.pass(1_000);
    assert_eq!(prepares(&world, nodes[1]).last().unwrap().attempt, 2);
    prepared(&mut world, nodes[0], group_id(1), 1, true);
    prepared(&mut world, nodes[1], group_id(1), 1, true);
    assert_eq!(commits(&world, nodes[0]), 0, "answers to an older attempt do not count");
}

#[test]
fn groups_of_one_moment_do_not_oversell() {
    let (mut world, nodes) = start(1, 3);
    for number in 1..=3 {
        world.ask(nodes[0], GcsCall::CreatePlacementGroup(specification(number, 2, 0)));
    }
    assert_eq!(prepares(&world, nodes[0]).len(), 1);
    let groups = world.query(r#"{"method": "placement_groups"}"#);
    assert_eq!(groups[group_id(3).hex()]["stats"]["scheduling_state"], "NO_RESOURCES");
}

#[test]
fn an_infeasible_group_says_why() {
    let (mut world, nodes) = start(1, 3);
    world.ask(nodes[0], GcsCall::CreatePlacementGroup(specification(1, 2, 3)));
    let groups = world.query(r#"{"method": "placement_groups"}"#);
    let group = &groups[group_id(1).hex()];
    assert_eq!(group["stats"]["scheduling_state"], "INFEASIBLE");
    assert!(group["pending_reason"].as_str().unwrap().contains("STRICT_SPREAD"));
    let (waiter, _) = wait(&mut world, nodes[0], 1, 100);
    world.pass(100);
    let over = world.answer(waiter).unwrap();
    assert!(!over.found && over.error.is_empty());
    world.add_node(2, 1);
    assert_eq!(prepares(&world, node_id(2)).len(), 1);
}

#[test]
fn an_actor_waits_for_its_group_and_goes_into_its_bundle() {
    let (mut world, nodes) = start(2, 2);
    let strategy = |index| Strategy {
        kind: STRATEGY_PLACEMENT_GROUP,
        placement_group_id: bytes(group_id(1).as_bytes()),
        bundle_index: index,
        ..Strategy::default()
    };
    let owner = address(nodes[0], worker_id(1));
    let inside = |index| ActorCreation {
        strategy: Some(strategy(index)),
        ..creation(owner.clone(), 1)
    };
    world.register_actor(nodes[0], actor_id(1, 1), inside(1));
    assert!(world.state(actor_id(1, 1)).pending_reason.contains("not registered"));
    make(&mut world, &nodes, 1, 2);
    let (at, _) = world
        .last_placement(actor_id(1, 1))
        .expect("placed as soon as the group is there");
    let groups = world.query(r#"{"method": "placement_groups"}"#);
    assert_eq!(groups[group_id(1).hex()]["bundles_to_node_id"]["1"], at.hex());
    world.register_actor(nodes[0], actor_id(1, 2), inside(1));
    assert_eq!(world.last_placement(actor_id(1, 2)), None, "the bundle is full");
    world.register_actor(nodes[0], actor_id(1, 3), inside(7));
    let death = world.state(actor_id(1, 3)).death.unwrap();
    assert_eq!(death.kind, DEATH_UNSCHEDULABLE);
    world.created(at, actor_id(1, 1), 1, 9);
    let key = PlacementGroupKey {
        placement_group_id: bytes(group_id(1).as_bytes()),
        ..Default::default()
    };
    world.ask(nodes[0], GcsCall::RemovePlacementGroup(key));
    for number in [1, 2] {
        assert_eq!(
            world.state(actor_id(1, number)).death.unwrap().kind,
            DEATH_PLACEMENT_GROUP
        );
    }
    assert_eq!(world.kills(at).len(), 1);
    world.register_actor(nodes[0], actor_id(1, 4), inside(0));
    assert_eq!(world.state(actor_id(1, 4)).death.unwrap().kind, DEATH_PLACEMENT_GROUP);
}

#[test]
fn removal_returns_every_bundle_and_answers_who_waits() {
    let (mut world, nodes) = start(2, 1);
    make(&mut world, &nodes, 1, 2);
    world.ask(nodes[0], GcsCall::CreatePlacementGroup(specification(2, 2, 3)));
    let (waiter, _) = wait(&mut world, nodes[0], 2, 10_000);
    for number in [1, 2] {
        let key = PlacementGroupKey {
            placement_group_id: bytes(group_id(number).as_bytes()),
            ..Default::default()
        };
        assert_eq!(world.ask(nodes[0], GcsCall::RemovePlacementGroup(key)).error, "");
    }
    for node in nodes {
        let all = returns(&world, node);
        assert!(all.iter().all(|message| message.indices.is_empty()));
        assert!(all
            .iter()
            .any(|message| message.placement_group_id == group_id(1).as_bytes()));
    }
    assert_eq!(world.answer(waiter).unwrap().error_kind, GCS_ERROR_NOT_FOUND);
    assert_eq!(state(&mut world, 1), "REMOVED");
}

#[test]
fn a_lost_node_moves_its_bundles_only() {
    let (mut world, nodes) = start(3, 1);
    let used = make(&mut world, &nodes, 1, 2);
    let spare = *nodes.iter().find(|node| !used.contains(node)).unwrap();
    let lost = used[1];
    assert_ne!(lost, nodes[0], "the driver's node stays");
    world.kill_node(lost);
    assert_eq!(state(&mut world, 1), "RESCHEDULING");
    let again = prepares(&world, spare).pop().unwrap();
    assert_eq!((again.bundles.len(), again.attempt), (1, 2));
    prepared(&mut world, spare, group_id(1), 2, true);
    committed(&mut world, spare, group_id(1), 2);
    assert_eq!(state(&mut world, 1), "CREATED");
    assert!(returns(&world, used[0]).is_empty());
}

#[test]
fn names_of_groups_are_unique_and_found() {
    let (mut world, nodes) = start(1, 8);
    let named = |number| PlacementGroupSpecification {
        name: "g".into(),
        namespace: "n".into(),
        ..specification(number, 1, 0)
    };
    assert_eq!(world.ask(nodes[0], GcsCall::CreatePlacementGroup(named(1))).error, "");
    assert_eq!(
        world.ask(nodes[0], GcsCall::CreatePlacementGroup(named(2))).error_kind,
        GCS_ERROR_NAME_TAKEN
    );
    let query = r#"{"method": "placement_group", "name": "g", "namespace": "n"}"#;
    assert_eq!(world.query(query)["placement_group_id"], group_id(1).hex());
    let key = PlacementGroupKey {
        name: "g".into(),
        namespace: "n".into(),
        ..Default::default()
    };
    assert_eq!(world.ask(nodes[0], GcsCall::RemovePlacementGroup(key)).error, "");
    assert_eq!(world.ask(nodes[0], GcsCall::CreatePlacementGroup(named(3))).error, "");
}

#[test]
fn a_group_goes_with_the_actor_that_made_it() {
    let (mut world, nodes) = start(1, 8);
    world.living(nodes[0], actor_id(1, 1), 9);
    let creator_actor_id = bytes(actor_id(1, 1).as_bytes());
    let by_actor = PlacementGroupSpecification {
        creator_actor_id: creator_actor_id.clone(),
        ..specification(1, 1, 0)
    };
    let detached = PlacementGroupSpecification {
        detached: true,
        creator_actor_id,
        ..specification(2, 1, 0)
    };
    world.ask(nodes[0], GcsCall::CreatePlacementGroup(by_actor));
    world.ask(nodes[0], GcsCall::CreatePlacementGroup(detached));
    world.worker_died(nodes[0], 9, Some((actor_id(1, 1), 1)), DEATH_CRASHED);
    assert_eq!(
        (state(&mut world, 1), state(&mut world, 2)),
        ("REMOVED".into(), "PENDING".into())
    );
}
