//! Queries: the names and kinds of what programs read.

use ray_wire::*;
use serde_json::Value;

use crate::world::*;

type IsKind = fn(&Value) -> bool;

#[test]
fn nodes_are_shown_as_programs_know_them() {
    let mut world = World::new();
    let node = node_id(1);
    let mut message = registration(
        node,
        [cpus(2), amount("memory", 7), amount("node:127.0.0.1", 1)].concat(),
    );
    let info = message.node.as_mut().unwrap();
    info.hostname = "host".into();
    info.raylet_socket = "/s/raylet".into();
    info.store_path = "/dev/shm/x".into();
    info.labels = vec![Label {
        key: "zone".into(),
        value: "a".into(),
    }];
    world.register(message);
    let shown = world.query(r#"{"method": "nodes"}"#)[0].clone();
    let kinds: Vec<(&str, IsKind)> = vec![
        ("NodeID", Value::is_string),
        ("Alive", Value::is_boolean),
        ("NodeManagerAddress", Value::is_string),
        ("NodeManagerHostname", Value::is_string),
        ("NodeManagerPort", Value::is_number),
        ("ObjectManagerPort", Value::is_number),
        ("ObjectStoreSocketName", Value::is_string),
        ("RayletSocketName", Value::is_string),
        ("MetricsExportPort", Value::is_number),
        ("MetricsAgentPort", Value::is_number),
        ("DashboardAgentListenPort", Value::is_number),
        ("NodeName", Value::is_string),
        ("RuntimeEnvAgentPort", Value::is_number),
        ("DeathReason", Value::is_number),
        ("DeathReasonMessage", Value::is_string),
        ("alive", Value::is_boolean),
        ("Resources", Value::is_object),
        ("Labels", Value::is_object),
    ];
    for (name, is_kind) in kinds {
        assert!(is_kind(&shown[name]), "{name} is {}", shown[name]);
    }
    assert_eq!(shown["Resources"]["CPU"], 2.0);
    assert!(shown["Resources"]["memory"].is_f64());
    assert_eq!(shown["Labels"]["zone"], "a");
    assert_eq!(
        (&shown["NodeManagerHostname"], &shown["NodeName"]),
        (&"host".into(), &"127.0.0.1".into())
    );
}

#[test]
fn resources_are_sums_of_what_users_know() {
    let mut world = World::new();
    let first = world.add_node(1, 4);
    world.add_node(2, 2);
    world.add_job(first);
    let group = PlacementGroupSpecification {
        placement_group_id: bytes(group_id(1).as_bytes()),
        bundles: vec![BundleSpecification {
            resources: cpus(3),
            labels: Vec::new(),
        }],
        job_id: bytes(&[1, 0, 0, 0]),
        ..PlacementGroupSpecification::default()
    };
    world.ask(first, GcsCall::CreatePlacementGroup(group));
    let placement_group_id = bytes(group_id(1).as_bytes());
    let prepared = BundlesPrepared {
        placement_group_id: placement_group_id.clone(),
        attempt: 1,
        success: true,
    };
    world.hear(first, ray_gcs::NodeMessage::BundlesPrepared(prepared));
    let committed = BundlesCommitted {
        placement_group_id,
        attempt: 1,
    };
    world.hear(first, ray_gcs::NodeMessage::BundlesCommitted(committed));
    assert_eq!(
        world.query(r#"{"method": "cluster_resources"}"#),
        serde_json::json!({"CPU": 6.0})
    );
    assert_eq!(
        world.query(r#"{"method": "available_resources"}"#),
        serde_json::json!({"CPU": 3.0})
    );
    let per_node = world.query(r#"{"method": "available_resources_per_node"}"#);
    assert_eq!(per_node[first.hex()]["CPU"], 1.0);
}

#[test]
fn actors_jobs_and_groups_have_their_fields() {
    let mut world = World::new();
    let node = world.add_node(1, 4);
    let add = AddJob {
        driver: Some(address(node, worker_id(1))),
        pid: 42,
        config_json: r#"{"entrypoint": "python a.py"}"#.into(),
        job_number: 0,
    };
    world.ask(node, GcsCall::AddJob(add));
    world.living(node, actor_id(1, 1), 9);
    let by_id = world.query(&format!(
        r#"{{"method": "actor", "actor_id": "{}"}}"#,
        actor_id(1, 1).hex()
    ));
    assert_eq!(
        (&by_id["State"], &by_id["ActorClassName"], &by_id["JobID"]),
        (&"ALIVE".into(), &"A".into(), &"01000000".into())
    );
    assert_eq!(by_id["Address"]["NodeID"], node.hex());
    let jobs = world.query(r#"{"method": "jobs"}"#);
    assert_eq!(
        (&jobs[0]["JobID"], &jobs[0]["Entrypoint"]),
        (&"01000000".into(), &"python a.py".into())
    );
    world.worker_died(node, 9, Some((actor_id(1, 1), 1)), DEATH_CRASHED);
    let dead = world.query(r#"{"method": "actors", "state": "DEAD"}"#);
    assert_eq!(dead[actor_id(1, 1).hex()]["DeathCause"]["kind"], "CRASHED");
    assert_eq!(
        world.query(r#"{"method": "actors", "state": "ALIVE"}"#),
        serde_json::json!({})
    );
    let config = world.query(r#"{"method": "internal_config"}"#);
    assert_eq!(config["limits"]["health_check_period_ms"], 3_000);
}

#[test]
fn named_actors_are_listed_by_namespace() {
    let mut world = World::new();
    let node = world.add_node(1, 4);
    world.add_job(node);
    for (number, namespace) in [(1, "n"), (2, "m")] {
        let named = ActorCreation {
            name: "a".into(),
            namespace: namespace.into(),
            ..creation(address(node, worker_id(1)), 0)
        };
        world.register_actor(node, actor_id(1, number), named);
    }
    let one = world.query(r#"{"method": "named_actors", "namespace": "n"}"#);
    assert_eq!((one.as_array().unwrap().len(), &one[0]["name"]), (1, &"a".into()));
    let all = world.query(r#"{"method": "named_actors", "all_namespaces": true}"#);
    assert_eq!(all.as_array().unwrap().len(), 2);
}

#[test]
fn what_is_not_known_is_refused_by_name() {
    let world = World::new();
    for (query, word) in [
        ("nodes", "not JSON"),
        ("{}", "no method"),
        (r#"{"method": "weather"}"#, "weather"),
        (r#"{"method": "actor"}"#, "actor_id"),
        (r#"{"method": "actor", "actor_id": "00"}"#, "ActorID"),
        (r#"{"method": "placement_group", "name": "g"}"#, "\"g\""),
    ] {
        let reply = world.gcs.query(query);
        assert!(reply.error.contains(word), "{query}: {}", reply.error);
    }
}
