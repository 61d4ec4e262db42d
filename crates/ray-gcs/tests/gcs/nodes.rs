//! Nodes: joining, reports, silence, death, draining.

use ray_gcs::{Command, Event, GcsMessage, GcsSettings, NodeMessage};
use ray_wire::*;

use crate::world::*;

fn died(world: &World, to: ray_ids::NodeId) -> Vec<NodeDied> {
    world.sent_to(to, |message| match message {
        GcsMessage::NodeDied(died) => Some(died.clone()),
        _ => None,
    })
}

fn updates(world: &World, to: ray_ids::NodeId) -> Vec<ClusterUpdate> {
    world.sent_to(to, |message| match message {
        GcsMessage::ClusterUpdate(update) => Some(update.clone()),
        _ => None,
    })
}

#[test]
fn a_node_that_joins_is_told_to_the_others_at_once_and_learns_of_all() {
    let mut world = World::new();
    let first = world.add_node(1, 4);
    let answer = world.register(registration(node_id(2), cpus(2)));
    assert_eq!(answer.nodes.len(), 2);
    assert_eq!(answer.cluster_id, world.gcs.cluster_id().as_bytes());
    let told = updates(&world, first);
    assert_eq!(
        told.last().unwrap().nodes[0].address.as_ref().unwrap().node().unwrap(),
        node_id(2)
    );
    assert_eq!(told.last().unwrap().nodes[0].available, cpus(2));
}

#[test]
fn changes_of_free_resources_are_told_together() {
    let mut world = World::new();
    let (first, second) = (world.add_node(1, 4), world.add_node(2, 4));
    world.pass(1_000);
    let before = updates(&world, first).len();
    world.report(second, 2, cpus(3), 0);
    world.pass(0);
    for sequence in 3..20 {
        world.report(second, sequence, cpus(i64::from(sequence as u32 % 3)), 0);
    }
    world.pass(200);
    let told = &updates(&world, first)[before..];
    assert_eq!(told.len(), 2, "one at once and one for all that followed");
    assert_eq!(told[1].nodes[0].available, cpus(19 % 3));
}

#[test]
fn an_old_report_changes_nothing() {
    let mut world = World::new();
    let node = world.add_node(1, 4);
    world.report(node, 5, cpus(1), 0);
    world.report(node, 4, cpus(3), 0);
    assert_eq!(world.query(r#"{"method": "available_resources"}"#)["CPU"], 1.0);
}

#[test]
fn a_closed_link_is_death_once_and_late_messages_are_refused() {
    let mut world = World::new();
    let (first, second) = (world.add_node(1, 4), world.add_node(2, 4));
    world.kill_node(second);
    assert_eq!(died(&world, first).len(), 1);
    assert!(died(&world, first)[0].reason.contains("it was cut"));
    world.pass(5_000);
    world.hear(first, NodeMessage::Pong);
    assert_eq!(died(&world, first).len(), 1);
    world.report(second, 9, cpus(4), 0);
    let answers = world.sent_to(second, |message| match message {
        GcsMessage::DeclaredDead(dead) => Some(dead.clone()),
        _ => None,
    });
    assert_eq!(answers.len(), 1);
    assert_eq!(world.closed, [second]);
    let answer = world.register(registration(second, cpus(4)));
    assert!(answer.refusal.contains("declared dead"), "{}", answer.refusal);
}

#[test]
fn a_link_that_is_made_again_in_time_is_no_death() {
    let mut world = World::new();
    let (first, second) = (world.add_node(1, 4), world.add_node(2, 4));
    world.link_down(second);
    world.pass(world.settings.node_link_grace_ms - 1);
    assert_eq!(world.register(registration(second, cpus(4))).refusal, "");
    world.pass(1_000);
    assert!(died(&world, first).is_empty());
}

#[test]
fn a_link_that_flaps_has_the_whole_grace_each_time() {
    let mut world = World::new();
    let (first, second) = (world.add_node(1, 4), world.add_node(2, 4));
    let grace = world.settings.node_link_grace_ms;
    world.link_down(second);
    world.pass(grace / 2);
    assert_eq!(world.register(registration(second, cpus(4))).refusal, "");
    world.pass(grace / 2 - 2);
    world.link_down(second);
    // The grace of the first absence ends now, two milliseconds into the second one.
    world.pass(2);
    assert!(died(&world, first).is_empty());
    world.pass(grace - 3);
    assert!(died(&world, first).is_empty());
    world.pass(1);
    assert_eq!(died(&world, first).len(), 1);
}

#[test]
fn a_silent_node_dies_after_unanswered_questions() {
    let mut world = World::new();
    let (first, second) = (world.add_node(1, 4), world.add_node(2, 4));
    for _ in 0..8 {
        world.pass(world.settings.health_check_period_ms);
        world.hear(first, NodeMessage::Pong);
    }
    let pings = world.sent_to(second, |message| (*message == GcsMessage::Ping).then_some(()));
    assert_eq!(pings.len() as u64, world.settings.health_check_failure_threshold);
    assert_eq!(died(&world, first).len(), 1);
    assert!(world.gcs.is_connected(first));
}

#[test]
fn a_control_plane_that_was_stopped_does_not_blame_its_nodes() {
    let mut world = World::new();
    let first = world.add_node(1, 4);
    world.now += 3_600_000;
    world.step(Event::Tick);
    world.step(Event::Tick);
    assert!(world.gcs.is_connected(first));
}

#[test]
fn messages_before_a_registration_close_the_link() {
    let mut world = World::new();
    world.hear(node_id(9), NodeMessage::Pong);
    assert_eq!(world.closed, [node_id(9)]);
}

#[test]
fn a_drained_node_takes_nothing_and_leaves_as_expected() {
    let mut world = World::new();
    let (first, second) = (world.add_node(1, 1), world.add_node(2, 1));
    world.add_job(first);
    let drain = DrainNode {
        node_id: bytes(second.as_bytes()),
        reason: "scaled down".into(),
        deadline_ms: 0,
    };
    assert_eq!(world.ask(first, GcsCall::Drain(drain)).error, "");
    assert_eq!(
        world
            .sent_to(second, |message| matches!(message, GcsMessage::DrainNode(_))
                .then_some(()))
            .len(),
        1
    );
    assert_eq!(world.place(first, actor_id(1, 1), 1).0, first);
    world.register_actor(first, actor_id(1, 2), creation(address(first, worker_id(1)), 1));
    assert_eq!(world.last_placement(actor_id(1, 2)), None);
    world.link_down(second);
    let nodes = world.query(r#"{"method": "nodes"}"#);
    let left = nodes
        .as_array()
        .unwrap()
        .iter()
        .find(|node| node["NodeID"] == second.hex())
        .unwrap();
    assert_eq!(
        (&left["Alive"], &left["DeathReason"], &left["DeathReasonMessage"]),
        (&false.into(), &1.into(), &"scaled down".into())
    );
}

#[test]
fn a_drain_deadline_is_the_end() {
    let mut world = World::new();
    let (first, second) = (world.add_node(1, 1), world.add_node(2, 1));
    let deadline_ms = world.now + 100;
    let drain = DrainNode {
        node_id: bytes(second.as_bytes()),
        reason: "spot".into(),
        deadline_ms,
    };
    world.ask(first, GcsCall::Drain(drain));
    world.pass(99);
    assert!(died(&world, first).is_empty());
    world.pass(1);
    assert_eq!(died(&world, first).len(), 1);
}

#[test]
fn dead_nodes_are_forgotten_beyond_the_limit() {
    let settings = GcsSettings {
        maximum_gcs_dead_node_cached_count: 3,
        node_link_grace_ms: 0,
        ..GcsSettings::default()
    };
    let mut world = World::with(settings);
    world.add_node(1, 1);
    for number in 10..20 {
        let node = world.add_node(number, 1);
        world.link_down(node);
    }
    assert_eq!(world.query(r#"{"method": "nodes"}"#).as_array().unwrap().len(), 4);
    world.restart();
    assert_eq!(world.query(r#"{"method": "nodes"}"#).as_array().unwrap().len(), 4);
}

#[test]
fn the_same_history_gives_the_same_commands() {
    let run = || {
        let mut random = 3_u64;
        let mut gcs = ray_gcs::Gcs::new(GcsSettings::default(), 5, &mut || split_mix(&mut random));
        let mut all: Vec<Command> = Vec::new();
        for number in 1..5 {
            let message = Box::new(registration(node_id(number), cpus(2)));
            let message = NodeMessage::Register {
                correlation: 1,
                message,
            };
            let event = Event::FromNode {
                node: node_id(number),
                message,
            };
            all.extend(gcs.step(event, 10, &mut || split_mix(&mut random)));
        }
        all
    };
    assert_eq!(run(), run());
}
