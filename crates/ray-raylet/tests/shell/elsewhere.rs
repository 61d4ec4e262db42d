//! Deaths and copies that must not be lost with a link: told again, asked of other raylets, told to owners.

use crate::bench::{until, Driver, RayletProcess, Session};
use crate::objects::attach;
use bytes::Bytes;
use ray_ids::{ActorId, NodeId, WorkerId};
use ray_wire::{
    kinds, ActorCreated, ActorCreation, AddLocation, Address, CreateActor, GcsReply, LeaseBroken, LeaseGranted,
    NodeDied, NodeInfo, NodeRegistered, RegisterNode, WatchWorker, WorkerDeathReport, WorkerDied,
};
use serde_json::json;

fn kill(lease: &LeaseGranted) {
    let pid = rustix::process::Pid::from_raw(lease.worker_pid as i32).unwrap();
    rustix::process::kill_process(pid, rustix::process::Signal::KILL).unwrap();
}

fn deaths(register: &RegisterNode) -> Vec<WorkerId> {
    let told = register.deaths.iter();
    told.map(|report| report.worker.as_ref().unwrap().worker().unwrap())
        .collect()
}

fn raylet_address(raylet: &RayletProcess, driver: &Driver) -> Address {
    Address {
        node_id: Bytes::copy_from_slice(raylet.node_id.as_bytes()),
        worker_id: Bytes::copy_from_slice(WorkerId::NIL.as_bytes()),
        ..driver.welcome.address.clone().unwrap()
    }
}

fn watch(driver: &Driver, worker: &Address, correlation: u64) {
    let message = WatchWorker {
        worker: Some(worker.clone()),
    };
    driver
        .link
        .send(kinds::WATCH_WORKER, correlation, ray_wire::encode(&message), &[])
        .unwrap();
}

#[test]
fn a_death_is_told_with_each_registration_until_it_is_acknowledged() {
    let mut session = Session::new("untold");
    let raylet = session.start_raylet(json!({}));
    let driver = raylet.connect_driver();
    let first: RegisterNode = session.gcs().inbox.wait(kinds::REGISTER_NODE);
    assert_eq!(deaths(&first), []);
    let (lost, heard) = (driver.lease(1.0), driver.lease(1.0));
    let id = |lease: &LeaseGranted| lease.worker.as_ref().unwrap().worker().unwrap();
    // The control plane goes with the report in its hands.
    kill(&lost);
    session.gcs().inbox.wait_for(kinds::WORKER_DEATH_REPORT, |_| true);
    session.gcs = None;
    session.start_gcs();
    let again: RegisterNode = session.gcs().inbox.wait(kinds::REGISTER_NODE);
    assert_eq!(deaths(&again), [id(&lost)]);
    // That registration was answered. Another death is acknowledged by itself.
    kill(&heard);
    let (link, frame) = session.gcs().inbox.wait_for(kinds::WORKER_DEATH_REPORT, |_| true);
    let report: WorkerDeathReport = ray_wire::decode("WorkerDeathReport", frame.header).unwrap();
    assert_eq!(report.worker.unwrap().worker().unwrap(), id(&heard));
    let done = ray_wire::encode(&GcsReply::default());
    link.send(kinds::GCS_REPLY, frame.correlation, done, &[]).unwrap();
    // Once it answers this, it has read the acknowledgement, which came first.
    link.send(kinds::PING, 5, Bytes::new(), &[]).unwrap();
    session
        .gcs()
        .inbox
        .wait_for(kinds::PONG, |frame| frame.correlation == 5);
    session.gcs = None;
    session.start_gcs();
    let last: RegisterNode = session.gcs().inbox.wait(kinds::REGISTER_NODE);
    assert_eq!(deaths(&last), []);
}

#[test]
fn a_creation_that_ends_while_the_registration_is_under_way_is_told_after_it() {
    let mut session = Session::new("between");
    let raylet = session.start_raylet(json!({}));
    let driver = raylet.connect_driver();
    let (gcs, _) = session.gcs().inbox.wait_for(kinds::REGISTER_NODE, |_| true);
    let block = session.directory.join("block");
    std::fs::write(&block, "").unwrap();
    let message = CreateActor {
        actor_id: Bytes::copy_from_slice(ActorId::random_in(driver.job).as_bytes()),
        incarnation: 1,
        creation: Some(ActorCreation {
            class_name: block.to_str().unwrap().into(),
            ..Default::default()
        }),
        job_config_json: String::new(),
    };
    gcs.send(kinds::PLACE_ACTOR, 9, ray_wire::encode(&message), &[])
        .unwrap();
    gcs.send(kinds::PING, 5, Bytes::new(), &[]).unwrap();
    session
        .gcs()
        .inbox
        .wait_for(kinds::PONG, |frame| frame.correlation == 5);
    session.gcs = None;
    session.start_silent_gcs();
    let (link, frame) = session.gcs().inbox.wait_for(kinds::REGISTER_NODE, |_| true);
    let register: RegisterNode = ray_wire::decode("RegisterNode", frame.header).unwrap();
    assert_eq!(register.actors.len(), 1);
    assert_eq!(register.actors[0].worker, None);
    // Now the constructor ends, and the registration is answered once the raylet has heard of that.
    let actor = || {
        let workers = driver.query(json!({"method": "workers"}));
        let workers = workers["workers"].as_array().unwrap();
        let actor = workers.iter().find(|worker| worker["state"] == "actor")?;
        Some(WorkerId::from_hex(actor["worker_id"].as_str().unwrap()).unwrap())
    };
    until("the actor has its worker", || actor().is_some());
    let worker = actor().unwrap();
    std::fs::remove_file(&block).unwrap();
    let to_worker = driver.connect_worker(&Address {
        worker_id: Bytes::copy_from_slice(worker.as_bytes()),
        ..Address::default()
    });
    driver.command(&to_worker, json!({"status": true}));
    // What the worker sent before that answer is read by the raylet before it has answered twice.
    driver.query(json!({"method": "stats"}));
    driver.query(json!({"method": "stats"}));
    let answer = NodeRegistered {
        cluster_id: Bytes::from_static(&[1; 28]),
        publisher_epoch: 2,
        ..Default::default()
    };
    link.send(
        kinds::NODE_REGISTERED,
        frame.correlation,
        ray_wire::encode(&answer),
        &[],
    )
    .unwrap();
    let created: ActorCreated = session.gcs().inbox.wait(kinds::ACTOR_CREATED);
    assert_eq!((created.actor_id, created.failure), (message.actor_id, None));
}

/// The control plane of this test tells nobody of any death.
#[test]
fn a_death_on_another_node_is_told_by_its_raylet() {
    let session = Session::new("elsewhere");
    let first = session.start_raylet(json!({}));
    let here = first.connect_driver();
    let second = session.start_raylet(json!({"is_head": false}));
    let there = second.connect_driver();
    let lease = here.lease(1.0);
    let worker = lease.worker.clone().unwrap();
    watch(&there, &worker, 77);
    // Asked after it, and answered after it was heard.
    there.query(json!({"method": "stats"}));
    kill(&lease);
    let told = |correlation: u64| {
        let inbox = &there.party.inbox;
        let (_, frame) = inbox.wait_for(kinds::WORKER_DIED, |frame| frame.correlation == correlation);
        let died: WorkerDied = ray_wire::decode("WorkerDied", frame.header).unwrap();
        died.worker.unwrap().worker().unwrap()
    };
    assert_eq!(told(77), worker.worker().unwrap());
    // One that died before anybody asked.
    here.party.inbox.wait::<LeaseBroken>(kinds::LEASE_BROKEN);
    let lease = here.lease(1.0);
    let worker = lease.worker.clone().unwrap();
    kill(&lease);
    here.party.inbox.wait::<LeaseBroken>(kinds::LEASE_BROKEN);
    watch(&there, &worker, 78);
    assert_eq!(told(78), worker.worker().unwrap());
}

#[test]
fn a_node_that_died_while_the_control_plane_was_away_is_told_to_the_processes() {
    let mut session = Session::new("nodegone");
    let raylet = session.start_raylet(json!({}));
    let driver = raylet.connect_driver();
    session.gcs = None;
    let gone = NodeId::from_random();
    let info = NodeInfo {
        address: Some(Address {
            node_id: Bytes::copy_from_slice(gone.as_bytes()),
            worker_id: Bytes::copy_from_slice(WorkerId::NIL.as_bytes()),
            ..Address::default()
        }),
        death_reason: "it burnt down".into(),
        ..NodeInfo::default()
    };
    session.start_gcs_that_knows(vec![info]);
    let died: NodeDied = driver.party.inbox.wait(kinds::NODE_DIED);
    assert_eq!(died.node_id, gone.as_bytes());
    assert_eq!(died.reason, "it burnt down");
}

#[test]
fn the_raylet_that_received_a_copy_tells_its_owner() {
    let session = Session::new("location");
    let first = session.start_raylet(json!({}));
    let here = first.connect_driver();
    let second = session.start_raylet(json!({"is_head": false}));
    let there = second.connect_driver();
    let (source, target) = (attach(&here), attach(&there));
    let location = raylet_address(&first, &here);
    let object = source.put(here.worker, 1, 1 << 20).unwrap();
    let owner = here.welcome.address.clone();
    assert!(target.fetch_of(owner, object, vec![location.clone()]).unwrap());
    let told: AddLocation = here.party.inbox.wait(kinds::ADD_LOCATION);
    assert_eq!(told.object_id, object.as_bytes());
    assert_eq!(told.node.unwrap().node().unwrap(), second.node_id);
    // An owner of that node hears of it in the same way.
    let own = source.put(there.worker, 2, 1 << 20).unwrap();
    assert!(target
        .fetch_of(there.welcome.address.clone(), own, vec![location.clone()])
        .unwrap());
    let told: AddLocation = there.party.inbox.wait(kinds::ADD_LOCATION);
    assert_eq!(told.object_id, own.as_bytes());
    // The copy of an owner that is gone is freed by nobody, and so it is not kept.
    let gone = WorkerId::from_random();
    let orphan = source.put(gone, 3, 1 << 20).unwrap();
    let owner = Address {
        worker_id: Bytes::copy_from_slice(gone.as_bytes()),
        ..location.clone()
    };
    assert!(target.fetch_of(Some(owner), orphan, vec![location]).unwrap());
    until("the orphan's copy is gone", || {
        target.memory()["ledger"]["objects"] == json!(2)
    });
}
