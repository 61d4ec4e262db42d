//! What the test program is when a raylet or its zygote starts it: the raylet, or a worker.

use crate::bench::{Party, KIND_ANSWER, KIND_COMMAND};
use bytes::Bytes;
use ray_ids::WorkerId;
use ray_wire::{kinds, ActorCreated, CreateActor, LeaseAssigned, RegisterProcess, Welcome, ROLE_WORKER};
use serde_json::{json, Value};
use std::io::Write;
use std::os::unix::fs::FileExt;
use std::os::unix::process::CommandExt;
use std::sync::{Arc, Mutex};

#[test]
#[ignore = "started by other tests"]
fn raylet_process() {
    let Ok(config) = std::env::var("TEST_RAYLET") else {
        return;
    };
    std::env::remove_var("TEST_RAYLET");
    let config: ray_raylet::RayletConfig = serde_json::from_str(&config).unwrap();
    if let Err(error) = ray_raylet::run(config) {
        eprintln!("raylet: {error}");
        std::process::exit(2);
    }
    std::process::exit(0);
}

#[test]
#[ignore = "started by other tests"]
fn worker_process() {
    let Ok(config) = std::env::var("TEST_WORKER") else {
        return;
    };
    let config: Value = serde_json::from_str(&config).unwrap();
    let worker = WorkerId::from_hex(config["worker_id"].as_str().unwrap()).unwrap();
    let assigned: Arc<Mutex<LeaseAssigned>> = Arc::default();
    let first_config: Arc<Mutex<String>> = Arc::default();
    let (known, seen_config) = (assigned.clone(), first_config.clone());
    let party = Party::new(Some(Box::new(move |_, frame| {
        if frame.kind == kinds::LEASE_ASSIGNED {
            let lease: LeaseAssigned = ray_wire::decode("LeaseAssigned", frame.header.clone()).unwrap();
            if !lease.job_config_json.is_empty() {
                *seen_config.lock().unwrap() = lease.job_config_json.clone();
            }
            *known.lock().unwrap() = lease;
            return true;
        }
        if frame.kind == kinds::EXIT_PROCESS {
            std::process::exit(0);
        }
        false
    })));
    let session = config["session_directory"].as_str().unwrap();
    party
        .reactor
        .listen_unix(format!("{session}/sockets/{}", worker.hex()))
        .unwrap();
    let raylet = party
        .reactor
        .connect_unix(config["raylet_socket"].as_str().unwrap())
        .unwrap();
    let register = RegisterProcess {
        role: ROLE_WORKER,
        worker_id: Bytes::copy_from_slice(worker.as_bytes()),
        pid: std::process::id(),
        startup_token: config["startup_token"].as_u64().unwrap(),
        job_config_json: String::new(),
    };
    raylet
        .send(kinds::REGISTER_PROCESS, 1, ray_wire::encode(&register), &[])
        .unwrap();
    raylet.send(kinds::WORKER_LISTENING, 0, Bytes::new(), &[]).unwrap();
    let welcome: Welcome = party.inbox.wait(kinds::WELCOME);
    assert_eq!(welcome.refusal, "");
    let details: Value = serde_json::from_str(&welcome.details_json).unwrap();
    loop {
        if !raylet.is_open() {
            std::process::exit(1);
        }
        let (link, frame) = match party.inbox.poll(&[KIND_COMMAND, kinds::CREATE_ACTOR]) {
            Some(arrived) => arrived,
            None => continue,
        };
        if frame.kind == kinds::CREATE_ACTOR {
            let create: CreateActor = ray_wire::decode("CreateActor", frame.header).unwrap();
            // A constructor that waits until the file is gone that its class is named after.
            let class = create.creation.map(|creation| creation.class_name).unwrap_or_default();
            if class.starts_with('/') {
                crate::bench::until("the constructor may end", || !std::path::Path::new(&class).exists());
            }
            let created = ActorCreated {
                actor_id: create.actor_id,
                incarnation: create.incarnation,
                ..Default::default()
            };
            raylet
                .send(kinds::ACTOR_CREATED, 0, ray_wire::encode(&created), &[])
                .unwrap();
            continue;
        }
        let command: Value = serde_json::from_slice(&frame.header).unwrap();
        let answer = obey(
            &command,
            &assigned.lock().unwrap(),
            &first_config.lock().unwrap(),
            &details,
        );
        link.send(KIND_ANSWER, frame.correlation, Bytes::from(answer.to_string()), &[])
            .unwrap();
    }
}

fn obey(command: &Value, lease: &LeaseAssigned, job_config: &str, details: &Value) -> Value {
    if let Some(code) = command["exit"].as_i64() {
        std::process::exit(code as i32);
    }
    if let Some(text) = command["print"].as_str() {
        // The harness captures what print! prints.
        std::io::stdout().write_all(text.as_bytes()).unwrap();
        std::io::stdout().flush().unwrap();
    }
    if let Some(text) = command["complain"].as_str() {
        std::io::stderr().write_all(text.as_bytes()).unwrap();
    }
    if let Some(sequence) = command["evidence"].as_u64() {
        let file = std::fs::File::options()
            .write(true)
            .open(details["evidence_path"].as_str().unwrap())
            .unwrap();
        file.write_all_at(&sequence.to_le_bytes(), details["evidence_index"].as_u64().unwrap() * 8)
            .unwrap();
    }
    if command["spawn"].as_bool() == Some(true) {
        let mut child = std::process::Command::new("sleep");
        child.arg("1000");
        if command["session"].as_bool() == Some(true) {
            // SAFETY: setsid is async-signal-safe.
            unsafe {
                child.pre_exec(|| {
                    libc::setsid();
                    Ok(())
                });
            }
        }
        return json!({ "pid": child.spawn().unwrap().id() });
    }
    json!({ "pid": std::process::id(), "lease": ray_ids::to_hex(&lease.lease_id), "job_config": job_config })
}
