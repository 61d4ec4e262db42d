//! The raylet's shell in a process of its own: leases, deaths, the zygote, the control plane's absence, the store.

mod bench;
mod elsewhere;
mod objects;
mod roles;

use bench::{alive, until, Session, LIMIT};
use bytes::Bytes;
use ray_ids::{ActorId, WorkerId};
use ray_wire::{
    kinds, ActorCreated, ActorCreation, CreateActor, GcsCall, GcsReply, GcsRequest, KillActorWorker, KvKey,
    LeaseBroken, LogLines, RegisterNode, WatchWorker, WorkerDeathReport, WorkerDied, DEATH_CRASHED,
};
use serde_json::json;
use std::time::Duration;

#[test]
fn a_lease_is_granted_used_and_granted_again() {
    let session = Session::new("lease");
    let raylet = session.start_raylet(json!({}));
    let driver = raylet.connect_driver();
    assert_eq!(driver.job.int(), 1);
    let lease = driver.lease(1.0);
    let address = lease.worker.clone().unwrap();
    let link = driver.connect_worker(&address);
    let status = driver.command(&link, json!({"status": true}));
    // The worker was told of its lease before the driver was.
    assert_eq!(status["lease"], ray_ids::to_hex(&lease.lease_id));
    assert_eq!(status["job_config"], "{\"namespace\": \"n\"}");
    assert_eq!(status["pid"], lease.worker_pid);
    driver.command(&link, json!({"print": ":task_name:f\nhello\n"}));
    let lines = driver.party.inbox.wait_for(kinds::LOG_LINES, |frame| {
        let lines: LogLines = ray_wire::decode("LogLines", frame.header.clone()).unwrap();
        lines.lines.contains(&"hello".to_string())
    });
    let lines: LogLines = ray_wire::decode("LogLines", lines.1.header).unwrap();
    assert_eq!((lines.name.as_str(), lines.pid), ("f", lease.worker_pid));
    driver.give_back(&lease);
    let again = driver.lease(1.0);
    assert_eq!(again.worker, lease.worker);
    assert!(again.first_sequence > lease.first_sequence);
    let workers = driver.query(json!({"method": "workers"}));
    assert_eq!(workers["drivers"][0]["job_id"], driver.job.hex());
}

#[test]
fn a_dead_worker_is_told_with_its_evidence_and_takes_its_children_along() {
    let session = Session::new("death");
    let raylet = session.start_raylet(json!({}));
    let driver = raylet.connect_driver();
    let lease = driver.lease(1.0);
    let address = lease.worker.clone().unwrap();
    let link = driver.connect_worker(&address);
    let child = driver.command(&link, json!({"spawn": true}))["pid"].as_u64().unwrap() as u32;
    assert!(alive(child));
    let watch = WatchWorker {
        worker: Some(address.clone()),
    };
    driver
        .link
        .send(kinds::WATCH_WORKER, 77, ray_wire::encode(&watch), &[])
        .unwrap();
    driver.command(&link, json!({"evidence": lease.first_sequence + 2}));
    driver.command(&link, json!({"complain": "the last words\n"}));
    link.send(bench::KIND_COMMAND, 0, Bytes::from(json!({"exit": 3}).to_string()), &[])
        .unwrap();
    let broken: LeaseBroken = driver.party.inbox.wait(kinds::LEASE_BROKEN);
    assert_eq!(broken.started_sequence, Some(lease.first_sequence + 2));
    let cause = broken.cause.unwrap();
    assert_eq!(
        (cause.kind, cause.exit_code, cause.pid),
        (DEATH_CRASHED, Some(3), lease.worker_pid)
    );
    assert!(cause.log_tail.contains("the last words"), "{}", cause.log_tail);
    let died: WorkerDied = driver.party.inbox.wait(kinds::WORKER_DIED);
    assert_eq!(died.worker.unwrap().worker_id, address.worker_id);
    let report: WorkerDeathReport = session.gcs().inbox.wait(kinds::WORKER_DEATH_REPORT);
    assert_eq!(report.worker.unwrap().worker_id, address.worker_id);
    until("the worker's child is gone", || !alive(child));
    // One who asks later is answered at once; its CPU serves others.
    driver
        .link
        .send(kinds::WATCH_WORKER, 78, ray_wire::encode(&watch), &[])
        .unwrap();
    driver
        .party
        .inbox
        .wait_for(kinds::WORKER_DIED, |frame| frame.correlation == 78);
    driver.lease(2.0);
}

#[test]
fn a_killed_worker_names_its_signal() {
    let session = Session::new("signal");
    let raylet = session.start_raylet(json!({}));
    let driver = raylet.connect_driver();
    let lease = driver.lease(1.0);
    let pid = rustix::process::Pid::from_raw(lease.worker_pid as i32).unwrap();
    rustix::process::kill_process(pid, rustix::process::Signal::KILL).unwrap();
    let broken: LeaseBroken = driver.party.inbox.wait(kinds::LEASE_BROKEN);
    assert_eq!(broken.cause.unwrap().signal, Some(9));
    assert_eq!(broken.started_sequence, Some(0));
}

#[test]
fn nothing_is_left_after_sigterm_or_the_parents_end() {
    let session = Session::new("end");
    for by_parent in [false, true] {
        let mut raylet = session.start_raylet(json!({}));
        let driver = raylet.connect_driver();
        let lease = driver.lease(1.0);
        let link = driver.connect_worker(lease.worker.as_ref().unwrap());
        let child = driver.command(&link, json!({"spawn": true}))["pid"].as_u64().unwrap() as u32;
        let runaway = driver.command(&link, json!({"spawn": true, "session": true}))["pid"]
            .as_u64()
            .unwrap() as u32;
        let zygote = driver.query(json!({"method": "stats"}))["zygote_pid"].as_u64().unwrap() as u32;
        let took = if by_parent {
            raylet.parent = None;
            raylet.wait_for_end()
        } else {
            raylet.terminate()
        };
        assert!(took < Duration::from_secs(3), "it took {took:?}");
        for pid in [child, runaway, zygote, lease.worker_pid] {
            until("a process of the node is gone", || !alive(pid));
        }
        assert!(!raylet.socket.exists());
        assert_eq!(session.shared_files(), Vec::<String>::new());
        drop(driver);
    }
}

#[test]
fn a_dead_zygote_is_replaced_and_workers_go_on() {
    let session = Session::new("zygote");
    let raylet = session.start_raylet(json!({}));
    let driver = raylet.connect_driver();
    let lease = driver.lease(1.0);
    let link = driver.connect_worker(lease.worker.as_ref().unwrap());
    let zygote = driver.query(json!({"method": "stats"}))["zygote_pid"].as_i64().unwrap() as i32;
    rustix::process::kill_process(
        rustix::process::Pid::from_raw(zygote).unwrap(),
        rustix::process::Signal::KILL,
    )
    .unwrap();
    until("another zygote runs", || {
        driver.query(json!({"method": "stats"}))["zygote_pid"]
            .as_i64()
            .is_some_and(|pid| pid != i64::from(zygote))
    });
    // The old worker lives, its death is still seen, and new workers come from the new zygote.
    assert_eq!(driver.command(&link, json!({"status": true}))["pid"], lease.worker_pid);
    let pid = rustix::process::Pid::from_raw(lease.worker_pid as i32).unwrap();
    rustix::process::kill_process(pid, rustix::process::Signal::KILL).unwrap();
    let broken: LeaseBroken = driver.party.inbox.wait(kinds::LEASE_BROKEN);
    assert_eq!(broken.cause.unwrap().signal, Some(9));
    let leases = [driver.lease(1.0), driver.lease(1.0)];
    assert_ne!(leases[0].worker, leases[1].worker);
}

fn gcs_request(driver: &bench::Driver, key: &'static [u8], correlation: u64) {
    let key = KvKey {
        key: Bytes::from_static(key),
        ..Default::default()
    };
    let request = GcsRequest {
        request_id: 0,
        sender: None,
        call: Some(GcsCall::KvGet(key)),
    };
    driver
        .link
        .send(kinds::GCS_REQUEST, correlation, ray_wire::encode(&request), &[])
        .unwrap();
}

#[test]
fn the_control_plane_may_go_and_come_back() {
    let mut session = Session::new("gcs");
    let raylet = session.start_raylet(json!({}));
    let driver = raylet.connect_driver();
    gcs_request(&driver, b"quick", 5);
    let (_, frame) = driver
        .party
        .inbox
        .wait_for(kinds::GCS_REPLY, |frame| frame.correlation == 5);
    let reply: GcsReply = ray_wire::decode("GcsReply", frame.header).unwrap();
    assert_eq!(reply.value, Bytes::from_static(b"quick"));
    // A request that is not answered before the control plane goes is asked again of the next one.
    gcs_request(&driver, b"slow", 6);
    let slow = |frame: &ray_rpc::Frame| {
        let request: GcsRequest = ray_wire::decode("GcsRequest", frame.header.clone()).unwrap();
        matches!(request.call, Some(GcsCall::KvGet(key)) if key.key.as_ref() == b"slow")
    };
    let (_, first) = session.gcs().inbox.wait_for(kinds::GCS_REQUEST, slow);
    session.gcs = None;
    // Leases are granted meanwhile.
    driver.lease(1.0);
    session.start_gcs();
    let register: RegisterNode = session.gcs().inbox.wait(kinds::REGISTER_NODE);
    assert_eq!(register.driver_jobs, [Bytes::copy_from_slice(driver.job.as_bytes())]);
    let (link, again) = session.gcs().inbox.wait_for(kinds::GCS_REQUEST, slow);
    assert_eq!(again.header, first.header);
    link.send(
        kinds::GCS_REPLY,
        again.correlation,
        ray_wire::encode(&GcsReply::default()),
        &[],
    )
    .unwrap();
    driver
        .party
        .inbox
        .wait_for(kinds::GCS_REPLY, |frame| frame.correlation == 6);
}

#[test]
fn an_actor_is_created_killed_and_reported() {
    let session = Session::new("actor");
    let raylet = session.start_raylet(json!({}));
    let driver = raylet.connect_driver();
    let (gcs, _) = session.gcs().inbox.wait_for(kinds::REGISTER_NODE, |_| true);
    let actor = ActorId::random_in(driver.job);
    let message = CreateActor {
        actor_id: Bytes::copy_from_slice(actor.as_bytes()),
        incarnation: 1,
        creation: Some(ActorCreation {
            class_name: "A".into(),
            ..Default::default()
        }),
        job_config_json: String::new(),
    };
    gcs.send(kinds::PLACE_ACTOR, 9, ray_wire::encode(&message), &[])
        .unwrap();
    let (_, frame) = session
        .gcs()
        .inbox
        .wait_for(kinds::ACTOR_CREATED, |frame| frame.correlation == 9);
    let created: ActorCreated = ray_wire::decode("ActorCreated", frame.header).unwrap();
    assert_eq!((created.failure, created.rejected), (None, false));
    assert!(alive(created.pid));
    let kill = KillActorWorker {
        actor_id: message.actor_id.clone(),
        incarnation: 1,
        cause: None,
        graceful: false,
    };
    gcs.send(kinds::KILL_ACTOR_WORKER, 0, ray_wire::encode(&kill), &[])
        .unwrap();
    let report: WorkerDeathReport = session.gcs().inbox.wait(kinds::WORKER_DEATH_REPORT);
    assert_eq!((report.actor_id, report.incarnation), (message.actor_id, 1));
    until("the actor's process is gone", || !alive(created.pid));
}

#[test]
fn a_drivers_end_ends_its_workers() {
    let session = Session::new("driver");
    let raylet = session.start_raylet(json!({}));
    let other = raylet.connect_driver();
    let driver = raylet.connect_driver();
    let lease = driver.lease(1.0);
    let waiting = driver.ask_lease(2.0);
    driver
        .party
        .inbox
        .wait_for(kinds::LEASE_QUEUED, |frame| frame.correlation == waiting);
    drop(driver);
    until("the worker is gone", || !alive(lease.worker_pid));
    other.lease(2.0);
}

#[test]
fn a_worker_that_was_not_started_here_is_refused() {
    let session = Session::new("refuse");
    let raylet = session.start_raylet(json!({}));
    let party = bench::Party::new(None);
    let link = party.reactor.connect_unix(&raylet.socket).unwrap();
    let register = ray_wire::RegisterProcess {
        role: ray_wire::ROLE_WORKER,
        worker_id: Bytes::copy_from_slice(WorkerId::from_random().as_bytes()),
        pid: std::process::id(),
        startup_token: 1,
        job_config_json: String::new(),
    };
    link.send(kinds::REGISTER_PROCESS, 1, ray_wire::encode(&register), &[])
        .unwrap();
    let welcome: ray_wire::Welcome = party.inbox.wait(kinds::WELCOME);
    assert!(
        welcome.refusal.contains("was not started by this raylet"),
        "{}",
        welcome.refusal
    );
    party.inbox.wait_closed(link.id());
}

#[test]
fn actors_are_created_fast_enough() {
    let session = Session::new("speed");
    let raylet = session.start_raylet(json!({}));
    let driver = raylet.connect_driver();
    let (gcs, _) = session.gcs().inbox.wait_for(kinds::REGISTER_NODE, |_| true);
    let count = 60;
    let started = std::time::Instant::now();
    for number in 0..count {
        let actor = ActorId::random_in(driver.job);
        let message = CreateActor {
            actor_id: Bytes::copy_from_slice(actor.as_bytes()),
            incarnation: 1,
            creation: Some(ActorCreation::default()),
            job_config_json: String::new(),
        };
        gcs.send(kinds::PLACE_ACTOR, 1_000 + number, ray_wire::encode(&message), &[])
            .unwrap();
    }
    for number in 0..count {
        session
            .gcs()
            .inbox
            .wait_for(kinds::ACTOR_CREATED, |frame| frame.correlation == 1_000 + number);
    }
    let took = started.elapsed();
    println!(
        "{count} actors in {took:?}: {:.0} a second",
        count as f64 / took.as_secs_f64()
    );
    assert!(took < LIMIT);
}
