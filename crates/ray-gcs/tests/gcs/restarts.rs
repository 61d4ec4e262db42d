//! Restarts: what was stored is there again, and nodes and control plane agree anew.

use bytes::Bytes;
use ray_gcs::{GcsMessage, NodeMessage};
use ray_ids::NodeId;
use ray_wire::*;

use crate::world::*;

fn running(node: NodeId, number: u8, incarnation: u64, worker: u8) -> ActorCreated {
    ActorCreated {
        actor_id: bytes(actor_id(1, number).as_bytes()),
        incarnation,
        worker: Some(address(node, worker_id(worker))),
        pid: 100,
        ..ActorCreated::default()
    }
}

fn back(node: NodeId, actors: Vec<ActorCreated>) -> RegisterNode {
    RegisterNode {
        actors,
        driver_jobs: vec![bytes(&[1, 0, 0, 0])],
        ..registration(node, cpus(4))
    }
}

#[test]
fn answers_are_the_same_after_a_restart() {
    let mut world = World::new();
    let (first, second) = (world.add_node(1, 4), world.add_node(2, 4));
    world.add_job(first);
    world.living(first, actor_id(1, 1), 9);
    let named = ActorCreation {
        name: "a".into(),
        namespace: "n".into(),
        ..creation(address(first, worker_id(1)), 1)
    };
    world.register_actor(first, actor_id(1, 2), named);
    world.place(first, actor_id(1, 3), 1);
    world.create_failed(
        world.last_placement(actor_id(1, 3)).unwrap().0,
        actor_id(1, 3),
        1,
        DEATH_CONSTRUCTOR,
    );
    let put = KvPut {
        namespace: Bytes::from_static(b"\0n"),
        key: Bytes::from_static(b"k"),
        value: Bytes::from_static(b"v"),
        overwrite: true,
        job_id: bytes(&[1, 0, 0, 0]),
    };
    world.ask(first, GcsCall::KvPut(put));
    world.kill_node(second);
    let epoch = world.gcs.epoch();
    let cluster = world.gcs.cluster_id();
    let fields = |value: serde_json::Value| {
        let mut rows: Vec<serde_json::Value> = value.as_object().unwrap().values().cloned().collect();
        // Why something waits is found anew.
        rows.iter_mut()
            .for_each(|row| drop(row.as_object_mut().unwrap().remove("PendingReason")));
        rows
    };
    let before = fields(world.query(r#"{"method": "actors"}"#));
    let jobs = world.query(r#"{"method": "jobs"}"#);
    let names = world.query(r#"{"method": "named_actors", "all_namespaces": true}"#);
    world.restart();
    assert_eq!((world.gcs.epoch(), world.gcs.cluster_id()), (epoch + 1, cluster));
    assert_eq!(fields(world.query(r#"{"method": "actors"}"#)), before);
    assert_eq!(world.query(r#"{"method": "jobs"}"#), jobs);
    assert_eq!(
        world.query(r#"{"method": "named_actors", "all_namespaces": true}"#),
        names
    );
    let refused = world.register(registration(second, cpus(4)));
    assert!(refused.refusal.contains("declared dead"));
    world.register(back(first, vec![running(first, 1, 1, 9)]));
    let get = KvKey {
        namespace: Bytes::from_static(b"\0n"),
        key: Bytes::from_static(b"k"),
        ..KvKey::default()
    };
    assert_eq!(world.ask(first, GcsCall::KvGet(get)).value, "v");
    assert_eq!(world.state(actor_id(1, 1)).state, ACTOR_ALIVE);
}

fn death(node: NodeId, worker: u8, actor: u8, kind: u32) -> WorkerDeathReport {
    WorkerDeathReport {
        worker: Some(address(node, worker_id(worker))),
        cause: Some(DeathCause {
            kind,
            message: "it left".into(),
            ..DeathCause::default()
        }),
        actor_id: bytes(actor_id(1, actor).as_bytes()),
        incarnation: 1,
        ..WorkerDeathReport::default()
    }
}

/// An actor that left of itself must not be restarted because the word of its leaving was lost with a link.
#[test]
fn deaths_that_come_with_a_registration_have_their_causes() {
    let mut world = World::new();
    let (first, second) = (world.add_node(1, 4), world.add_node(2, 4));
    world.add_job(first);
    let lasting = ActorCreation {
        max_restarts: -1,
        ..creation(address(first, worker_id(1)), 1)
    };
    for number in 1..=2 {
        world.register_actor(first, actor_id(1, number), lasting.clone());
        let (at, incarnation) = world.last_placement(actor_id(1, number)).unwrap();
        world.created(at, actor_id(1, number), incarnation, 8 + number);
    }
    let (left, crashed) = (actor_id(1, 1), actor_id(1, 2));
    let at: Vec<NodeId> = [left, crashed].map(|id| world.last_placement(id).unwrap().0).into();
    world.restart();
    for node in [first, second] {
        let actors = Vec::new();
        let mut deaths = Vec::new();
        if at[0] == node {
            deaths.push(death(node, 9, 1, DEATH_INTENDED));
        }
        if at[1] == node {
            deaths.push(death(node, 10, 2, DEATH_CRASHED));
        }
        let message = RegisterNode {
            deaths,
            ..back(node, actors)
        };
        let message = if node == first {
            message
        } else {
            RegisterNode {
                driver_jobs: Vec::new(),
                ..message
            }
        };
        // Once more makes no difference.
        world.register(message.clone());
        world.register(message);
    }
    let state = world.state(left);
    assert_eq!((state.state, state.death.unwrap().kind), (ACTOR_DEAD, DEATH_INTENDED));
    let state = world.state(crashed);
    assert_eq!((state.incarnation, state.restarts), (2, 1), "{state:?}");
    let told = |node| {
        world.sent_to(node, |message| match message {
            GcsMessage::WorkerDied(died) => Some(died.worker.clone().unwrap().worker().unwrap()),
            _ => None,
        })
    };
    let all: Vec<_> = [first, second].into_iter().flat_map(told).collect();
    assert!(
        all.len() <= 2,
        "each death is told to the other node at most once: {all:?}"
    );
}

#[test]
fn nothing_is_placed_before_the_known_nodes_are_back_or_given_up() {
    let mut world = World::new();
    let (first, second) = (world.add_node(1, 1), world.add_node(2, 4));
    world.add_job(first);
    world.restart();
    world.register(RegisterNode {
        driver_jobs: vec![bytes(&[1, 0, 0, 0])],
        ..registration(first, cpus(1))
    });
    world.register_actor(first, actor_id(1, 1), creation(address(first, worker_id(1)), 1));
    assert_eq!(world.last_placement(actor_id(1, 1)), None);
    assert!(world.state(actor_id(1, 1)).pending_reason.contains("restarted"));
    // Whoever is back stays, silent or not, until the time for the others is over.
    for _ in 0..8 {
        world.hear(first, NodeMessage::Pong);
        world.pass(world.settings.node_reconnect_grace_ms / 8);
    }
    assert!(world.last_placement(actor_id(1, 1)).is_some());
    let died = world.sent_to(first, |message| match message {
        GcsMessage::NodeDied(died) => Some(died.node_id.clone()),
        _ => None,
    });
    assert_eq!(died, [bytes(second.as_bytes())]);
}

#[test]
fn a_creation_that_ended_meanwhile_is_taken_as_it_is() {
    let mut world = World::new();
    let node = world.add_node(1, 4);
    world.add_job(node);
    world.place(node, actor_id(1, 1), 1);
    world.place(node, actor_id(1, 2), 1);
    world.place(node, actor_id(1, 3), 1);
    let placed = world.sent.len();
    world.restart();
    let creating = ActorCreated {
        worker: None,
        ..running(node, 2, 1, 0)
    };
    let stranger = running(node, 77, 3, 50);
    let answer = world.register(back(node, vec![running(node, 1, 1, 9), creating, stranger]));
    assert_eq!(answer.superseded.len(), 1);
    assert_eq!(answer.superseded[0].actor_id, actor_id(1, 77).as_bytes());
    assert_eq!(world.state(actor_id(1, 1)).state, ACTOR_ALIVE);
    assert_eq!(world.state(actor_id(1, 2)).state, ACTOR_PENDING_CREATION);
    let again: Vec<_> = world.sent[placed..]
        .iter()
        .filter_map(|(_, message)| match message {
            GcsMessage::PlaceActor(create) => Some((create.actor_id.clone(), create.incarnation)),
            _ => None,
        })
        .collect();
    assert_eq!(
        again,
        [(bytes(actor_id(1, 3).as_bytes()), 2)],
        "the order that was lost is given again"
    );
    world.created(node, actor_id(1, 2), 1, 10);
    assert_eq!(world.state(actor_id(1, 2)).state, ACTOR_ALIVE);
}

#[test]
fn an_actor_that_died_meanwhile_restarts_and_a_driver_that_left_ends_its_job() {
    let mut world = World::new();
    let node = world.add_node(1, 4);
    world.add_job(node);
    let detached = ActorCreation {
        detached: true,
        max_restarts: 1,
        ..creation(address(node, worker_id(1)), 1)
    };
    world.register_actor(node, actor_id(1, 1), detached);
    world.created(node, actor_id(1, 1), 1, 9);
    world.living(node, actor_id(1, 2), 10);
    world.restart();
    let answer = world.register(registration(node, cpus(4)));
    assert_eq!(answer.finished_jobs, [bytes(&[1, 0, 0, 0])]);
    assert_eq!(world.last_placement(actor_id(1, 1)), Some((node, 2)));
    assert_eq!(world.state(actor_id(1, 2)).state, ACTOR_DEAD);
}

#[test]
fn bundles_of_an_unfinished_attempt_are_returned_and_whole_groups_stay() {
    let mut world = World::new();
    let node = world.add_node(1, 4);
    world.add_job(node);
    let make = |number, count| PlacementGroupSpecification {
        placement_group_id: bytes(group_id(number).as_bytes()),
        bundles: vec![
            BundleSpecification {
                resources: cpus(1),
                labels: Vec::new()
            };
            count
        ],
        job_id: bytes(&[1, 0, 0, 0]),
        ..PlacementGroupSpecification::default()
    };
    world.ask(node, GcsCall::CreatePlacementGroup(make(1, 2)));
    let placement_group_id = bytes(group_id(1).as_bytes());
    let prepared = BundlesPrepared {
        placement_group_id: placement_group_id.clone(),
        attempt: 1,
        success: true,
    };
    world.hear(node, NodeMessage::BundlesPrepared(prepared));
    world.hear(
        node,
        NodeMessage::BundlesCommitted(BundlesCommitted {
            placement_group_id,
            attempt: 1,
        }),
    );
    world.ask(node, GcsCall::CreatePlacementGroup(make(2, 1)));
    world.restart();
    let key = |number, index, committed| BundleKey {
        placement_group_id: bytes(group_id(number).as_bytes()),
        index,
        resources: cpus(1),
        committed,
    };
    let bundles = vec![key(1, 0, true), key(1, 1, true), key(2, 0, false)];
    let from = world.sent.len();
    world.register(RegisterNode {
        bundles,
        ..back(node, Vec::new())
    });
    let after: Vec<&GcsMessage> = world.sent[from..].iter().map(|(_, message)| message).collect();
    let returned = after
        .iter()
        .position(|message| matches!(message, GcsMessage::ReturnBundles(_)))
        .unwrap();
    let prepared = after
        .iter()
        .position(|message| matches!(message, GcsMessage::PrepareBundles(_)))
        .unwrap();
    assert!(returned < prepared);
    let GcsMessage::ReturnBundles(message) = after[returned] else {
        unreachable!("found above")
    };
    assert_eq!(
        (message.placement_group_id.clone(), message.indices.clone()),
        (bytes(group_id(2).as_bytes()), vec![0])
    );
    let GcsMessage::PrepareBundles(message) = after[prepared] else {
        unreachable!("found above")
    };
    assert_eq!(message.attempt, 2, "attempts count on over a restart");
    let groups = world.query(r#"{"method": "placement_groups"}"#);
    assert_eq!(groups[group_id(1).hex()]["state"], "CREATED");
}

#[test]
fn watches_are_taken_up_again() {
    let mut world = World::new();
    let node = world.add_node(1, 4);
    world.add_job(node);
    world.living(node, actor_id(1, 1), 9);
    world.watch(node, 7, actor_id(1, 1));
    world.restart();
    let watches = vec![ProcessWatches {
        worker_id: bytes(worker_id(7).as_bytes()),
        actor_ids: vec![bytes(actor_id(1, 1).as_bytes())],
        channels: vec!["jobs".into()],
    }];
    let from = world.publications(node).len();
    world.register(RegisterNode {
        watches,
        publisher_epoch: 1,
        publisher_sequence: 1,
        ..back(node, vec![running(node, 1, 1, 9)])
    });
    let snapshot = world.publications(node)[from..].to_vec();
    assert_eq!((snapshot.len(), snapshot[0].epoch, snapshot[0].sequence), (1, 2, 1));
    world.worker_died(node, 9, Some((actor_id(1, 1), 1)), DEATH_CRASHED);
    assert_eq!(
        world.publications(node).last().unwrap().actor.as_ref().unwrap().state,
        ACTOR_DEAD
    );
}

#[test]
fn a_restart_at_any_point_restores_the_same_rows() {
    let mut world = World::new();
    let node = world.add_node(1, 4);
    world.add_job(node);
    for number in 0..10 {
        world.register_actor(node, actor_id(1, number), creation(address(node, worker_id(1)), 1));
        let rows = world.rows.len();
        world.restart();
        assert_eq!(world.rows.len(), rows);
        world.register(RegisterNode {
            driver_jobs: vec![bytes(&[1, 0, 0, 0])],
            ..registration(node, cpus(4))
        });
    }
    assert_eq!(world.query(r#"{"method": "actors"}"#).as_object().unwrap().len(), 10);
}
