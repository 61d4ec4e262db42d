//! Jobs, key-value, requests and channels.

use bytes::Bytes;
use ray_gcs::{GcsMessage, GcsSettings};
use ray_ids::JobId;
use ray_wire::*;

use crate::world::*;

fn put(key: &'static [u8], value: &'static [u8], overwrite: bool) -> GcsCall {
    let (namespace, key, value) = (
        Bytes::from_static(b"n"),
        Bytes::from_static(key),
        Bytes::from_static(value),
    );
    GcsCall::KvPut(KvPut {
        namespace,
        key,
        value,
        overwrite,
        job_id: Bytes::new(),
    })
}

fn at(key: &'static [u8]) -> KvKey {
    KvKey {
        namespace: Bytes::from_static(b"n"),
        key: Bytes::from_static(key),
        prefix: false,
        wait_ms: 0,
    }
}

#[test]
fn jobs_count_from_one_and_a_driver_has_one() {
    let mut world = World::new();
    let node = world.add_node(1, 4);
    assert_eq!(world.add_job(node).int(), 1);
    assert_eq!(world.add_job(node).int(), 1);
    let second = AddJob {
        driver: Some(address(node, worker_id(2))),
        ..AddJob::default()
    };
    assert_eq!(world.ask(node, GcsCall::AddJob(second)).number, 2);
    let elsewhere = AddJob {
        driver: Some(address(node_id(9), worker_id(3))),
        ..AddJob::default()
    };
    assert_eq!(
        world.ask(node, GcsCall::AddJob(elsewhere)).error_kind,
        GCS_ERROR_INVALID
    );
    let wanted = AddJob {
        driver: Some(address(node, worker_id(4))),
        job_number: 7,
        ..AddJob::default()
    };
    assert_eq!(world.ask(node, GcsCall::AddJob(wanted)).number, 7);
    let next = AddJob {
        driver: Some(address(node, worker_id(5))),
        ..AddJob::default()
    };
    assert_eq!(world.ask(node, GcsCall::AddJob(next)).number, 8);
    let past = AddJob {
        driver: Some(address(node, worker_id(6))),
        job_number: 5,
        ..AddJob::default()
    };
    assert!(world.ask(node, GcsCall::AddJob(past)).error.contains("over"));
}

#[test]
fn what_belongs_to_a_job_goes_with_it() {
    let mut world = World::new();
    let node = world.add_node(1, 8);
    let job = world.add_job(node);
    let owner = || address(node, worker_id(1));
    let (plain, detached) = (actor_id(1, 1), actor_id(1, 2));
    world.living(node, plain, 9);
    world.register_actor(
        node,
        detached,
        ActorCreation {
            detached: true,
            name: "d".into(),
            ..creation(owner(), 1)
        },
    );
    world.created(node, detached, 1, 10);
    let group = PlacementGroupSpecification {
        placement_group_id: bytes(group_id(1).as_bytes()),
        bundles: vec![BundleSpecification {
            resources: cpus(1),
            labels: Vec::new(),
        }],
        job_id: bytes(job.as_bytes()),
        ..PlacementGroupSpecification::default()
    };
    world.ask(node, GcsCall::CreatePlacementGroup(group));
    let bound = KvPut {
        namespace: Bytes::from_static(b"n"),
        key: Bytes::from_static(b"function"),
        value: Bytes::from_static(b"blob"),
        overwrite: true,
        job_id: bytes(job.as_bytes()),
    };
    world.ask(node, GcsCall::KvPut(bound.clone()));
    world.ask(node, put(b"free", b"1", true));
    world.ask(
        node,
        GcsCall::FinishJob(JobKey {
            job_id: bytes(job.as_bytes()),
        }),
    );
    assert_eq!(world.state(plain).death.unwrap().kind, DEATH_JOB);
    assert_eq!(world.state(detached).state, ACTOR_ALIVE);
    let finished = world.sent_to(node, |message| {
        matches!(message, GcsMessage::JobFinished(_)).then_some(())
    });
    assert_eq!(finished.len(), 1);
    let groups = world.query(r#"{"method": "placement_groups"}"#);
    assert_eq!(groups[group_id(1).hex()]["state"], "REMOVED");
    assert!(
        world.ask(node, GcsCall::KvExists(at(b"function"))).found,
        "the detached actor may be created again"
    );
    world.worker_died(node, 10, Some((detached, 1)), DEATH_CRASHED);
    assert!(!world.ask(node, GcsCall::KvExists(at(b"function"))).found);
    assert!(world.ask(node, GcsCall::KvExists(at(b"free"))).found);
    assert!(world.ask(node, GcsCall::KvPut(bound)).error.contains("over"));
    let late = world.register_actor(node, actor_id(1, 5), creation(owner(), 1));
    assert_eq!(late.error_kind, GCS_ERROR_INVALID);
}

#[test]
fn a_drivers_death_and_its_nodes_death_end_its_job() {
    let mut world = World::new();
    let (first, second) = (world.add_node(1, 4), world.add_node(2, 4));
    let add = |node, worker| {
        GcsCall::AddJob(AddJob {
            driver: Some(address(node, worker_id(worker))),
            ..AddJob::default()
        })
    };
    world.ask(first, add(first, 1));
    world.ask(second, add(second, 2));
    let report = WorkerDeathReport {
        worker: Some(address(first, worker_id(1))),
        driver_job_id: bytes(JobId::from_int(1).as_bytes()),
        ..WorkerDeathReport::default()
    };
    world.hear(first, ray_gcs::NodeMessage::WorkerDeath { correlation: 0, report });
    world.kill_node(second);
    let jobs = world.query(r#"{"method": "jobs"}"#);
    assert!(
        jobs.as_array().unwrap().iter().all(|job| job["IsDead"] == true),
        "{jobs}"
    );
}

#[test]
fn keys_are_put_found_listed_and_deleted() {
    let mut world = World::new();
    let node = world.add_node(1, 4);
    assert!(world.ask(node, put(b"a/1", b"x", false)).found, "it is new");
    assert!(!world.ask(node, put(b"a/1", b"y", false)).found);
    assert_eq!(world.ask(node, GcsCall::KvGet(at(b"a/1"))).value, "x");
    assert!(!world.ask(node, put(b"a/1", b"z", true)).found);
    assert_eq!(world.ask(node, GcsCall::KvGet(at(b"a/1"))).value, "z");
    world.ask(node, put(b"a/2", b"", true));
    world.ask(node, put(b"b", b"", true));
    let prefix = KvKey {
        prefix: true,
        ..at(b"a/")
    };
    assert_eq!(world.ask(node, GcsCall::KvKeys(prefix.clone())).keys, ["a/1", "a/2"]);
    let elsewhere = KvKey {
        namespace: Bytes::from_static(b"m"),
        ..prefix.clone()
    };
    assert!(world.ask(node, GcsCall::KvKeys(elsewhere)).keys.is_empty());
    let deleted = world.ask(node, GcsCall::KvDelete(prefix));
    assert_eq!((deleted.number, deleted.found), (2, true));
    assert_eq!(world.ask(node, GcsCall::KvDelete(at(b"a/1"))).number, 0);
    assert!(world.ask(node, GcsCall::KvExists(at(b"b"))).found);
}

#[test]
fn a_question_for_a_key_waits_for_it_and_not_for_ever() {
    let mut world = World::new();
    let node = world.add_node(1, 4);
    let wait = GcsCall::KvGet(KvKey {
        wait_ms: 100,
        ..at(b"k")
    });
    assert_eq!(world.ask_as(node, worker_id(1), 0, wait.clone()), None);
    let first = world.correlation;
    world.ask(node, put(b"k", b"v", true));
    assert_eq!(world.answer(first).unwrap().value, "v");
    world.ask(node, GcsCall::KvDelete(at(b"k")));
    assert_eq!(world.ask_as(node, worker_id(1), 0, wait), None);
    let second = world.correlation;
    world.pass(99);
    assert_eq!(world.answer(second), None);
    world.pass(1);
    assert!(!world.answer(second).unwrap().found);
}

#[test]
fn a_value_beyond_the_limit_is_refused() {
    let mut world = World::with(GcsSettings {
        kv_value_limit_bytes: 3,
        ..GcsSettings::default()
    });
    let node = world.add_node(1, 4);
    assert!(world
        .ask(node, put(b"k", b"1234", true))
        .error
        .contains("kv_value_limit_bytes"));
    assert_eq!(world.ask(node, put(b"k", b"123", true)).error, "");
}

#[test]
fn a_repeated_request_is_answered_and_not_done_twice_even_after_a_restart() {
    let settings = GcsSettings {
        maximum_remembered_requests: 3,
        ..GcsSettings::default()
    };
    let mut world = World::with(settings);
    let node = world.add_node(1, 4);
    let call = put(b"k", b"v", false);
    assert!(world.ask_as(node, worker_id(1), 900, call.clone()).unwrap().found);
    assert!(
        world.ask_as(node, worker_id(1), 900, call.clone()).unwrap().found,
        "the first answer again"
    );
    world.restart();
    world.register(registration(node, cpus(4)));
    assert!(world.ask_as(node, worker_id(1), 900, call.clone()).unwrap().found);
    for id in 1..=3 {
        world
            .ask_as(node, worker_id(1), id, GcsCall::KvDelete(at(b"other")))
            .unwrap();
    }
    assert!(
        !world.ask_as(node, worker_id(1), 900, call).unwrap().found,
        "forgotten, beyond the limit"
    );
}

#[test]
fn channels_reach_their_subscribers() {
    let mut world = World::new();
    let (first, second) = (world.add_node(1, 4), world.add_node(2, 4));
    for channel in ["jobs", "nodes", "errors"] {
        let subscribe = GcsCall::Subscribe(Subscribe {
            channel: channel.into(),
        });
        world.ask_as(first, worker_id(5), 0, subscribe).unwrap();
    }
    world.add_job(second);
    world.ask(
        second,
        GcsCall::Publish(Publish {
            channel: "errors".into(),
            json: "\"boo\"".into(),
        }),
    );
    world.kill_node(second);
    let news: Vec<(String, String)> = world
        .publications(first)
        .into_iter()
        .map(|news| (news.channel, news.json))
        .collect();
    let channels: Vec<&str> = news.iter().map(|(channel, _)| channel.as_str()).collect();
    assert_eq!(channels, ["jobs", "errors", "nodes", "jobs"]);
    assert_eq!(news[1].1, "\"boo\"");
    world.worker_died(first, 5, None, DEATH_CRASHED);
    let before = world.publications(first).len();
    world.ask(
        first,
        GcsCall::Publish(Publish {
            channel: "errors".into(),
            json: String::new(),
        }),
    );
    assert_eq!(world.publications(first).len(), before);
}

#[test]
fn a_driver_whose_registration_was_lost_with_a_link_gets_a_job_that_runs() {
    let mut world = World::new();
    let node = world.add_node(1, 4);
    let add = || {
        GcsCall::AddJob(AddJob {
            driver: Some(address(node, worker_id(1))),
            ..AddJob::default()
        })
    };
    assert_eq!(world.ask_as(node, worker_id(1), 77, add()).unwrap().number, 1);
    world.link_down(node);
    // The answer did not arrive, so the node names no driver and asks again.
    world.register(registration(node, cpus(4)));
    let again = world.ask_as(node, worker_id(1), 77, add()).unwrap();
    assert_eq!((again.error.as_str(), again.number), ("", 2));
    assert_eq!(world.query(r#"{"method": "health"}"#)["jobs_running"], 1);
}
