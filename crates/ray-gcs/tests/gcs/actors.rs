//! Actors: registration, placing, life, death, names, owners, watches.

use ray_gcs::{GcsMessage, GcsSettings};
use ray_ids::{ActorId, NodeId};
use ray_wire::*;

use crate::world::*;

fn start() -> (World, NodeId) {
    let mut world = World::new();
    let node = world.add_node(1, 4);
    world.add_job(node);
    (world, node)
}

fn named(name: &str, node: NodeId) -> ActorCreation {
    ActorCreation {
        name: name.into(),
        namespace: "n".into(),
        ..creation(address(node, worker_id(1)), 1)
    }
}

fn key(id: ActorId) -> ActorKey {
    ActorKey {
        actor_id: bytes(id.as_bytes()),
        owner: None,
    }
}

fn states(world: &World, node: NodeId) -> Vec<u32> {
    world
        .publications(node)
        .into_iter()
        .filter_map(|news| news.actor)
        .map(|actor| actor.state)
        .collect()
}

#[test]
fn an_actor_is_placed_created_and_published() {
    let (mut world, node) = start();
    let id = actor_id(1, 1);
    world.watch(node, 7, id);
    let (at, incarnation) = world.place(node, id, 1);
    assert_eq!((at, incarnation), (node, 1));
    let order = world
        .sent
        .iter()
        .position(|(_, message)| matches!(message, GcsMessage::PlaceActor(_)));
    assert!(order.is_some());
    world.created(node, id, 1, 9);
    let state = world.state(id);
    assert_eq!((state.state, state.restarts, state.pid), (ACTOR_ALIVE, 0, 100));
    assert_eq!(state.worker.unwrap().worker().unwrap(), worker_id(9));
    let seen = states(&world, node);
    assert_eq!(
        seen,
        [
            ACTOR_DEPENDENCIES_UNREADY,
            ACTOR_PENDING_CREATION,
            ACTOR_PENDING_CREATION,
            ACTOR_ALIVE
        ]
    );
    let sequences: Vec<u64> = world.publications(node).iter().map(|news| news.sequence).collect();
    assert!(sequences.windows(2).all(|pair| pair[0] < pair[1]), "{sequences:?}");
    assert_eq!(
        world.publications(node)[0].subscribers,
        [bytes(worker_id(7).as_bytes())]
    );
}

#[test]
fn registering_twice_is_registering_once() {
    let (mut world, node) = start();
    let id = actor_id(1, 1);
    world.place(node, id, 1);
    let again = world.register_actor(node, id, creation(address(node, worker_id(1)), 1));
    assert_eq!(again.actor.unwrap().state, ACTOR_PENDING_CREATION);
    let placed = world.sent_to(node, |message| {
        matches!(message, GcsMessage::PlaceActor(_)).then_some(())
    });
    assert_eq!(placed.len(), 1);
}

#[test]
fn a_burst_spreads_and_does_not_oversell() {
    let mut world = World::new();
    let nodes: Vec<NodeId> = (1..=4).map(|number| world.add_node(number, 4)).collect();
    world.add_job(nodes[0]);
    let mut counts = std::collections::BTreeMap::new();
    for number in 0..20 {
        world.register_actor(
            nodes[0],
            actor_id(1, number),
            creation(address(nodes[0], worker_id(1)), 1),
        );
        if let Some((node, _)) = world.last_placement(actor_id(1, number)) {
            *counts.entry(node).or_insert(0) += 1;
        }
    }
    assert_eq!(counts.into_values().collect::<Vec<_>>(), [4, 4, 4, 4]);
    let pending = world.query(r#"{"method": "pending"}"#);
    assert_eq!(pending["actors"].as_array().unwrap().len(), 20);
    let waiting = world.state(actor_id(1, 19));
    assert!(
        waiting.pending_reason.contains("CPU: 1") && !waiting.infeasible,
        "{}",
        waiting.pending_reason
    );
}

#[test]
fn actors_that_hold_nothing_are_dealt_over_the_nodes() {
    let mut world = World::new();
    let nodes: Vec<NodeId> = (1..=3).map(|number| world.add_node(number, 1)).collect();
    world.add_job(nodes[0]);
    let mut counts = std::collections::BTreeMap::new();
    for number in 0..30 {
        *counts
            .entry(world.place(nodes[0], actor_id(1, number), 0).0)
            .or_insert(0) += 1;
    }
    assert_eq!(counts.into_values().collect::<Vec<_>>(), [10, 10, 10]);
}

#[test]
fn what_a_report_has_seen_is_no_longer_held() {
    let (mut world, node) = start();
    let free = |world: &mut World| world.query(r#"{"method": "available_resources"}"#)["CPU"].as_f64();
    world.place(node, actor_id(1, 1), 1);
    world.place(node, actor_id(1, 2), 1);
    assert_eq!(free(&mut world), Some(2.0));
    world.report(node, 2, cpus(3), 1);
    assert_eq!(
        free(&mut world),
        Some(2.0),
        "the report had seen the first placement only"
    );
    world.report(node, 3, cpus(2), 2);
    assert_eq!(free(&mut world), Some(2.0));
}

#[test]
fn a_node_that_does_not_count_is_believed_after_a_while() {
    let (mut world, node) = start();
    world.place(node, actor_id(1, 1), 1);
    world.report(node, 2, cpus(3), 0);
    let free = |world: &mut World| world.query(r#"{"method": "available_resources"}"#)["CPU"].as_f64();
    assert_eq!(free(&mut world), Some(2.0));
    world.pass(world.settings.placement_settle_ms);
    assert_eq!(free(&mut world), Some(3.0));
}

#[test]
fn a_rejected_actor_is_placed_again_after_a_moment() {
    let (mut world, node) = start();
    let id = actor_id(1, 1);
    world.place(node, id, 1);
    for _ in 0..5 {
        let before = world.sent.len();
        world.rejected(node, id, 1);
        assert!(world.state(id).pending_reason.contains("no room"));
        assert!(!world.sent[before..]
            .iter()
            .any(|(_, message)| matches!(message, GcsMessage::PlaceActor(_))));
        world.pass(400);
        assert!(world.sent[before..]
            .iter()
            .any(|(_, message)| matches!(message, GcsMessage::PlaceActor(_))));
    }
    world.created(node, id, 1, 9);
    assert_eq!(world.state(id).state, ACTOR_ALIVE);
}

#[test]
fn an_infeasible_actor_says_why_and_is_placed_when_a_node_joins() {
    let (mut world, node) = start();
    let id = actor_id(1, 1);
    world.watch(node, 7, id);
    world.register_actor(node, id, creation(address(node, worker_id(1)), 64));
    let state = world.state(id);
    assert!(
        state.infeasible && state.pending_reason.contains("64"),
        "{}",
        state.pending_reason
    );
    let told = world.publications(node).pop().unwrap().actor.unwrap();
    assert!(told.infeasible);
    let big = world.add_node(2, 64);
    assert_eq!(world.last_placement(id), Some((big, 1)));
}

#[test]
fn a_crash_restarts_as_often_as_allowed() {
    let (mut world, node) = start();
    let id = actor_id(1, 1);
    world.register_actor(
        node,
        id,
        ActorCreation {
            max_restarts: 2,
            ..creation(address(node, worker_id(1)), 1)
        },
    );
    for incarnation in 1..=3 {
        assert_eq!(world.last_placement(id), Some((node, incarnation)));
        world.created(node, id, incarnation, 9 + incarnation as u8);
        world.worker_died(node, 9 + incarnation as u8, Some((id, incarnation)), DEATH_CRASHED);
    }
    let state = world.state(id);
    assert_eq!((state.state, state.restarts), (ACTOR_DEAD, 2));
    assert_eq!(state.death.unwrap().message, "it is gone");
}

#[test]
fn without_a_limit_it_always_restarts_and_the_constructor_is_told() {
    let (mut world, node) = start();
    let id = actor_id(1, 1);
    world.register_actor(
        node,
        id,
        ActorCreation {
            max_restarts: -1,
            ..creation(address(node, worker_id(1)), 1)
        },
    );
    for incarnation in 1..20 {
        world.created(node, id, incarnation, 9);
        world.worker_died(
            node,
            100 + incarnation as u8,
            Some((id, incarnation)),
            DEATH_OUT_OF_MEMORY,
        );
        assert_eq!(world.state(id).state, ACTOR_RESTARTING);
    }
    let attempts = world.sent_to(node, |message| match message {
        GcsMessage::PlaceActor(create) => Some(create.creation.as_ref().unwrap().call.as_ref().unwrap().attempt),
        _ => None,
    });
    assert_eq!(attempts, (0..20).collect::<Vec<_>>());
}

#[test]
fn deaths_that_were_meant_or_cannot_be_helped_are_final() {
    for (kind, while_creating) in [
        (DEATH_CONSTRUCTOR, true),
        (DEATH_RUNTIME_ENV, true),
        (DEATH_INTENDED, false),
    ] {
        let (mut world, node) = start();
        let id = actor_id(1, 1);
        world.register_actor(
            node,
            id,
            ActorCreation {
                max_restarts: -1,
                ..creation(address(node, worker_id(1)), 1)
            },
        );
        if while_creating {
            world.create_failed(node, id, 1, kind);
        } else {
            world.created(node, id, 1, 9);
            world.worker_died(node, 9, Some((id, 1)), kind);
        }
        let state = world.state(id);
        assert_eq!((state.state, state.death.unwrap().kind), (ACTOR_DEAD, kind));
    }
}

#[test]
fn kill_without_restart_is_final_at_once_and_with_restart_restarts() {
    let (mut world, node) = start();
    let id = actor_id(1, 1);
    world.register_actor(
        node,
        id,
        ActorCreation {
            max_restarts: 1,
            ..creation(address(node, worker_id(1)), 1)
        },
    );
    world.created(node, id, 1, 9);
    world.ask(
        node,
        GcsCall::KillActor(KillActor {
            actor_id: bytes(id.as_bytes()),
            no_restart: false,
        }),
    );
    assert_eq!(world.state(id).state, ACTOR_ALIVE);
    assert_eq!(world.kills(node).len(), 1);
    world.worker_died(node, 9, Some((id, 1)), DEATH_KILLED);
    assert_eq!(world.state(id).state, ACTOR_RESTARTING);
    world.created(node, id, 2, 10);
    world.ask(
        node,
        GcsCall::KillActor(KillActor {
            actor_id: bytes(id.as_bytes()),
            no_restart: true,
        }),
    );
    assert_eq!(world.state(id).death.unwrap().kind, DEATH_KILLED);
    assert_eq!(world.kills(node).last().unwrap().incarnation, 2);
    let unknown = KillActor {
        actor_id: bytes(actor_id(1, 77).as_bytes()),
        no_restart: true,
    };
    assert_eq!(
        world.ask(node, GcsCall::KillActor(unknown)).error_kind,
        GCS_ERROR_NOT_FOUND
    );
}

#[test]
fn a_late_instance_of_a_dead_actor_is_killed_where_it_is() {
    let (mut world, node) = start();
    let id = actor_id(1, 1);
    world.place(node, id, 1);
    world.ask(
        node,
        GcsCall::KillActor(KillActor {
            actor_id: bytes(id.as_bytes()),
            no_restart: true,
        }),
    );
    let before = world.kills(node).len();
    world.created(node, id, 1, 9);
    assert_eq!(world.state(id).state, ACTOR_DEAD);
    assert_eq!(world.kills(node).len(), before + 1);
}

#[test]
fn out_of_scope_ends_gracefully_and_frees_the_name() {
    let (mut world, node) = start();
    let id = actor_id(1, 1);
    world.register_actor(
        node,
        id,
        ActorCreation {
            max_restarts: -1,
            ..named("a", node)
        },
    );
    world.created(node, id, 1, 9);
    world.ask(node, GcsCall::ActorOutOfScope(key(id)));
    let kill = world.kills(node).pop().unwrap();
    assert!(kill.graceful);
    assert_eq!(world.state(id).state, ACTOR_ALIVE, "what is queued runs first");
    assert_eq!(world.register_actor(node, actor_id(1, 2), named("a", node)).error, "");
    world.worker_died(node, 9, Some((id, 1)), DEATH_INTENDED);
    let state = world.state(id);
    assert_eq!(
        (state.state, state.death.unwrap().kind),
        (ACTOR_DEAD, DEATH_OUT_OF_SCOPE)
    );
}

#[test]
fn out_of_scope_before_it_lives_waits_for_it_unless_there_is_no_hope() {
    let (mut world, node) = start();
    let (hopeful, hopeless) = (actor_id(1, 1), actor_id(1, 2));
    world.place(node, hopeful, 1);
    world.ask(node, GcsCall::ActorOutOfScope(key(hopeful)));
    assert!(world.kills(node).is_empty());
    world.created(node, hopeful, 1, 9);
    assert!(world.kills(node)[0].graceful);
    world.register_actor(node, hopeless, creation(address(node, worker_id(1)), 99));
    world.ask(node, GcsCall::ActorOutOfScope(key(hopeless)));
    assert_eq!(world.state(hopeless).state, ACTOR_DEAD);
}

#[test]
fn names_are_unique_in_a_namespace() {
    let (mut world, node) = start();
    assert_eq!(world.register_actor(node, actor_id(1, 1), named("a", node)).error, "");
    let taken = world.register_actor(node, actor_id(1, 2), named("a", node));
    assert_eq!(taken.error_kind, GCS_ERROR_NAME_TAKEN);
    let other = ActorCreation {
        namespace: "m".into(),
        ..named("a", node)
    };
    assert_eq!(world.register_actor(node, actor_id(1, 3), other).error, "");
    let register = RegisterActor {
        actor_id: bytes(actor_id(1, 4).as_bytes()),
        creation: Some(named("a", node)),
        get_if_exists: true,
    };
    let existing = world.ask(node, GcsCall::RegisterActor(register)).actor.unwrap();
    assert_eq!(existing.actor_id, actor_id(1, 1).as_bytes());
    let name = ActorName {
        name: "a".into(),
        namespace: "n".into(),
    };
    let found = world.ask(node, GcsCall::GetNamedActor(name.clone())).actor.unwrap();
    assert_eq!(found.actor_id, actor_id(1, 1).as_bytes());
    world.created(node, actor_id(1, 1), 1, 9);
    world.worker_died(node, 9, Some((actor_id(1, 1), 1)), DEATH_CRASHED);
    assert_eq!(
        world.ask(node, GcsCall::GetNamedActor(name)).error_kind,
        GCS_ERROR_NOT_FOUND
    );
    assert_eq!(world.register_actor(node, actor_id(1, 5), named("a", node)).error, "");
}

#[test]
fn an_owners_death_ends_what_is_not_detached() {
    let (mut world, node) = start();
    let owner = address(node, worker_id(30));
    let (plain, detached) = (actor_id(1, 1), actor_id(1, 2));
    world.register_actor(node, plain, creation(owner.clone(), 1));
    world.register_actor(
        node,
        detached,
        ActorCreation {
            detached: true,
            name: "d".into(),
            ..creation(owner.clone(), 1)
        },
    );
    world.created(node, plain, 1, 9);
    world.created(node, detached, 1, 10);
    let other = world.add_node(2, 1);
    world.worker_died(node, 30, None, DEATH_CRASHED);
    assert_eq!(world.state(plain).death.unwrap().kind, DEATH_OWNER);
    assert_eq!(world.state(detached).state, ACTOR_ALIVE);
    let notices = world.sent_to(other, |message| match message {
        GcsMessage::WorkerDied(died) => died.worker.clone(),
        _ => None,
    });
    assert_eq!(notices, std::slice::from_ref(&owner));
    let late = world.register_actor(node, actor_id(1, 3), creation(owner, 1));
    assert_eq!(
        late.actor.unwrap().state,
        ACTOR_DEAD,
        "an owner that is dead registers nothing that lives"
    );
}

#[test]
fn a_dead_nodes_actors_restart_elsewhere_or_die_with_the_cause() {
    let mut world = World::new();
    let (first, second) = (world.add_node(1, 1), world.add_node(2, 4));
    world.add_job(first);
    let (keeps, ends, unborn) = (actor_id(1, 1), actor_id(1, 2), actor_id(1, 3));
    let on_second = |max_restarts| ActorCreation {
        max_restarts,
        ..creation(address(first, worker_id(1)), 1)
    };
    world.register_actor(first, actor_id(1, 9), on_second(0));
    let (at, _) = world.last_placement(actor_id(1, 9)).unwrap();
    world.created(at, actor_id(1, 9), 1, 50);
    for id in [keeps, ends, unborn] {
        world.register_actor(first, id, on_second(i32::from(id == keeps)));
    }
    assert_eq!(world.last_placement(keeps), Some((second, 1)));
    world.created(second, keeps, 1, 9);
    world.created(second, ends, 1, 10);
    let third = world.add_node(3, 4);
    world.kill_node(second);
    assert_eq!(world.last_placement(keeps), Some((third, 2)));
    assert_eq!(world.state(keeps).restarts, 1);
    assert_eq!(world.state(ends).death.unwrap().kind, DEATH_NODE);
    assert_eq!(
        world.last_placement(unborn),
        Some((third, 2)),
        "one that had not lived yet is placed again for free"
    );
    assert_eq!(world.state(unborn).restarts, 0);
}

#[test]
fn a_hard_affinity_to_a_dead_node_is_the_end() {
    let mut world = World::new();
    let (first, second) = (world.add_node(1, 4), world.add_node(2, 4));
    world.add_job(first);
    let strategy = Strategy {
        kind: STRATEGY_NODE_AFFINITY,
        node_id: bytes(second.as_bytes()),
        ..Strategy::default()
    };
    let wish = ActorCreation {
        strategy: Some(strategy),
        max_restarts: -1,
        ..creation(address(first, worker_id(1)), 1)
    };
    world.register_actor(first, actor_id(1, 1), wish.clone());
    assert_eq!(world.last_placement(actor_id(1, 1)), Some((second, 1)));
    world.created(second, actor_id(1, 1), 1, 9);
    world.link_down(second);
    world.register_actor(first, actor_id(1, 2), wish);
    assert!(
        world.state(actor_id(1, 2)).pending_reason.contains("link"),
        "it may come back"
    );
    world.pass(world.settings.node_link_grace_ms);
    for number in [1, 2] {
        let death = world.state(actor_id(1, number)).death.unwrap();
        assert_eq!(death.kind, DEATH_UNSCHEDULABLE);
        assert!(death.message.contains(&second.hex()));
    }
}

#[test]
fn watching_never_waits_in_vain() {
    let (mut world, node) = start();
    let owner = address(node, worker_id(30));
    let watch = ActorKey {
        actor_id: bytes(actor_id(1, 1).as_bytes()),
        owner: Some(owner),
    };
    let reply = world.ask_as(node, worker_id(7), 0, GcsCall::WatchActor(watch)).unwrap();
    assert_eq!(reply.actor.unwrap().state, ACTOR_DEPENDENCIES_UNREADY);
    world.worker_died(node, 30, None, DEATH_CRASHED);
    let last = world.publications(node).pop().unwrap().actor.unwrap();
    assert_eq!((last.state, last.death.unwrap().kind), (ACTOR_DEAD, DEATH_OWNER));
    world.watch(node, 7, actor_id(1, 2));
    world.ask(
        node,
        GcsCall::FinishJob(JobKey {
            job_id: bytes(&[1, 0, 0, 0]),
        }),
    );
    let last = world.publications(node).pop().unwrap().actor.unwrap();
    assert_eq!(
        (last.actor_id, last.death.unwrap().kind),
        (bytes(actor_id(1, 2).as_bytes()), DEATH_JOB)
    );
}

#[test]
fn news_lost_with_a_link_are_made_good_by_a_snapshot() {
    let (mut world, node) = start();
    let other = world.add_node(2, 4);
    let id = actor_id(1, 1);
    let at = world.living(node, id, 9);
    let watcher = if at == node { other } else { node };
    world.watch(watcher, 7, id);
    let seen = world.publications(watcher).pop().unwrap();
    world.link_down(watcher);
    let mut back = registration(watcher, cpus(4));
    if watcher == node {
        back.driver_jobs = vec![bytes(&[1, 0, 0, 0])];
    }
    (back.publisher_epoch, back.publisher_sequence) = (seen.epoch, seen.sequence);
    let (worker_id, actor_ids) = (bytes(worker_id(7).as_bytes()), vec![bytes(id.as_bytes())]);
    back.watches = vec![ProcessWatches {
        worker_id,
        actor_ids,
        channels: Vec::new(),
    }];
    world.register(back.clone());
    assert_eq!(world.publications(watcher).len(), 2, "the present state once more");
    world.link_down(watcher);
    world.worker_died(at, 9, Some((id, 1)), DEATH_CRASHED);
    assert_eq!(world.publications(watcher).len(), 2);
    world.register(back);
    let news = world.publications(watcher).pop().unwrap();
    assert_eq!(news.actor.unwrap().state, ACTOR_DEAD);
    assert!(news.sequence > seen.sequence + 1);
}

#[test]
fn dead_actors_are_bounded_and_their_ids_remembered() {
    let settings = GcsSettings {
        maximum_gcs_destroyed_actor_cached_count: 2,
        ..GcsSettings::default()
    };
    let mut world = World::with(settings);
    let node = world.add_node(1, 4);
    world.add_job(node);
    for number in 0..6 {
        world.place(node, actor_id(1, number), 0);
        world.create_failed(node, actor_id(1, number), 1, DEATH_CONSTRUCTOR);
    }
    assert_eq!(world.query(r#"{"method": "actors"}"#).as_object().unwrap().len(), 2);
    let forgotten = world.state(actor_id(1, 0));
    assert_eq!(forgotten.state, ACTOR_DEAD);
    assert!(world
        .register_actor(node, actor_id(1, 0), creation(address(node, worker_id(1)), 1))
        .error
        .contains("dead"));
    world.restart();
    assert_eq!(world.query(r#"{"method": "actors"}"#).as_object().unwrap().len(), 2);
}
