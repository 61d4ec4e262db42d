//! The shell, over real sockets: registration, hand-over, signals, and a control plane that is killed while it writes.

use std::io::Read;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use bytes::Bytes;
use ray_gcs::{GcsConfig, GcsMessage, NodeMessage};
use ray_ids::NodeId;
use ray_wire::*;

use crate::client::{Client, LIMIT};
use crate::storage::TestDirectory;
use crate::world::{address, cpus, node_id, registration, worker_id};

const CONFIG_VARIABLE: &str = "GCS_TEST_CONFIG";

/// Not a test of its own: the process that the others start.
#[test]
#[ignore = "started by other tests as a process of its own"]
fn control_plane_process() {
    let Ok(config) = std::env::var(CONFIG_VARIABLE) else {
        return;
    };
    let result = ray_gcs::run(GcsConfig::from_json(&config).unwrap());
    if let Err(error) = result {
        eprintln!("{error}");
        std::process::exit(3);
    }
    std::process::exit(0);
}

struct ControlPlane {
    child: Child,
    socket: PathBuf,
}

impl Drop for ControlPlane {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl ControlPlane {
    fn start(directory: &TestDirectory, parent_fd: Option<i32>) -> Self {
        let config = serde_json::json!({
            "session_directory": directory.0,
            "session_name": "session_x",
            "system_config": {"node_link_grace_ms": 0},
            "parent_fd": parent_fd,
        });
        let child = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "shell::control_plane_process", "--ignored", "--nocapture"])
            .env(CONFIG_VARIABLE, config.to_string())
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        Self {
            child,
            socket: directory.0.join("sockets").join("gcs"),
        }
    }

    /// How it ended and what it said.
    fn end(mut self) -> (Option<i32>, String) {
        let limit = Instant::now() + LIMIT;
        let status = loop {
            if let Some(status) = self.child.try_wait().unwrap() {
                break status;
            }
            assert!(Instant::now() < limit, "the control plane does not end");
            std::thread::sleep(Duration::from_millis(5));
        };
        let mut said = String::new();
        self.child.stderr.take().unwrap().read_to_string(&mut said).unwrap();
        (status.code(), said)
    }
}

fn send(client: &Client, message: &NodeMessage) {
    let (kind, correlation, header) = message.encode();
    // A control plane that was killed meanwhile takes no more.
    let _ = client.link.send(kind, correlation, header, &[]);
}

fn register(client: &Client, node: NodeId) -> NodeRegistered {
    send(
        client,
        &NodeMessage::Register {
            correlation: 1,
            message: Box::new(registration(node, cpus(4))),
        },
    );
    let answer = client.wait("the registration's answer", |frame| {
        match GcsMessage::decode(frame.kind, frame.correlation, frame.header.clone()) {
            Ok(GcsMessage::NodeRegistered { message, .. }) => Some(*message),
            _ => None,
        }
    });
    answer.expect("an answer")
}

fn request(correlation: u64, call: GcsCall) -> NodeMessage {
    let sender = Some(address(node_id(1), worker_id(1)));
    let request = GcsRequest {
        request_id: correlation,
        sender,
        call: Some(call),
    };
    NodeMessage::Request {
        correlation,
        request: Box::new(request),
    }
}

fn ask(client: &Client, correlation: u64, call: GcsCall) -> GcsReply {
    send(client, &request(correlation, call));
    let reply = client.wait("a reply", |frame| {
        (frame.kind == kinds::GCS_REPLY && frame.correlation == correlation)
            .then(|| decode::<GcsReply>("GcsReply", frame.header.clone()).unwrap())
    });
    reply.expect("a reply")
}

fn put(number: u64) -> GcsCall {
    GcsCall::KvPut(KvPut {
        namespace: Bytes::from_static(b"n"),
        key: Bytes::copy_from_slice(&number.to_be_bytes()),
        value: Bytes::copy_from_slice(&number.to_le_bytes()),
        overwrite: true,
        job_id: Bytes::new(),
    })
}

fn keys() -> GcsCall {
    GcsCall::KvKeys(KvKey {
        namespace: Bytes::from_static(b"n"),
        prefix: true,
        ..KvKey::default()
    })
}

#[test]
fn a_node_registers_asks_and_hands_over_the_socket_of_another() {
    let directory = TestDirectory::new("shell");
    let gcs = ControlPlane::start(&directory, None);
    let head = Client::connect(&gcs.socket);
    let answer = register(&head, node_id(1));
    let details: serde_json::Value = serde_json::from_str(&answer.details_json).unwrap();
    assert_eq!((&details["session_name"], answer.nodes.len()), (&"session_x".into(), 1));
    assert!(ask(&head, 2, put(1)).found);
    let (ours, theirs) = std::os::unix::net::UnixStream::pair().unwrap();
    let header = encode(&HandOver { peer: "node 2".into() });
    head.link
        .send_with_descriptor(kinds::HAND_OVER, 0, header, theirs.into())
        .unwrap();
    let other = Client::over(ours.into());
    assert_eq!(register(&other, node_id(2)).nodes.len(), 2);
    assert_eq!(ask(&other, 3, keys()).keys.len(), 1);
    let told = head.wait("news of the other node", |frame| {
        (frame.kind == kinds::CLUSTER_UPDATE)
            .then(|| decode::<ClusterUpdate>("ClusterUpdate", frame.header.clone()).unwrap())
    });
    assert_eq!(
        told.unwrap().nodes[0].address.as_ref().unwrap().node().unwrap(),
        node_id(2)
    );
    drop(other);
    let died = head.wait("the other node's death", |frame| {
        (frame.kind == kinds::NODE_DIED).then(|| decode::<NodeDied>("NodeDied", frame.header.clone()).unwrap())
    });
    assert_eq!(died.unwrap().node_id, node_id(2).as_bytes());
}

#[test]
fn what_is_not_a_registration_closes_the_link() {
    let directory = TestDirectory::new("stranger");
    let gcs = ControlPlane::start(&directory, None);
    for (kind, header) in [
        (kinds::PING, Bytes::new()),
        (kinds::PUSH_TASK, Bytes::new()),
        (kinds::REGISTER_NODE, Bytes::from_static(b"\xff\xff")),
    ] {
        let client = Client::connect(&gcs.socket);
        client.link.send(kind, 1, header, &[]).unwrap();
        assert_eq!(client.wait("the end", |_| Some(())), None);
    }
}

#[test]
fn a_second_control_plane_says_what_to_do() {
    let directory = TestDirectory::new("second");
    let gcs = ControlPlane::start(&directory, None);
    drop(Client::connect(&gcs.socket));
    let (code, said) = ControlPlane::start(&directory, None).end();
    assert_eq!(code, Some(3));
    assert!(
        said.contains("in use by another control plane") && said.contains("data directory of its own"),
        "{said}"
    );
    register(&Client::connect(&gcs.socket), node_id(1));
}

#[test]
fn sigterm_ends_it_cleanly_and_everything_is_there_again() {
    let directory = TestDirectory::new("sigterm");
    let gcs = ControlPlane::start(&directory, None);
    let client = Client::connect(&gcs.socket);
    let first = register(&client, node_id(1));
    for number in 0..100 {
        ask(&client, 10 + number, put(number));
    }
    // SAFETY: signals a child of ours that has not been waited for.
    unsafe { libc::kill(gcs.child.id() as i32, libc::SIGTERM) };
    let socket = gcs.socket.clone();
    let (code, said) = gcs.end();
    assert_eq!(code, Some(0), "{said}");
    assert!(!socket.exists());
    let gcs = ControlPlane::start(&directory, None);
    let client = Client::connect(&gcs.socket);
    let again = register(&client, node_id(1));
    assert_eq!(
        (again.cluster_id, again.publisher_epoch),
        (first.cluster_id, first.publisher_epoch + 1)
    );
    assert_eq!(ask(&client, 1_000, keys()).keys.len(), 100);
}

#[test]
fn it_ends_with_the_process_that_needed_it() {
    let directory = TestDirectory::new("parent");
    let mut ends = [0; 2];
    // SAFETY: pipe2 writes two descriptors, which are owned from here on.
    assert_eq!(unsafe { libc::pipe2(ends.as_mut_ptr(), libc::O_CLOEXEC) }, 0);
    // SAFETY: as above.
    let (reading, writing) = unsafe { (OwnedFd::from_raw_fd(ends[0]), OwnedFd::from_raw_fd(ends[1])) };
    // SAFETY: the reading end is open; the child is to inherit a duplicate of it that survives exec.
    let inherited = unsafe { OwnedFd::from_raw_fd(libc::dup(reading.as_raw_fd())) };
    let gcs = ControlPlane::start(&directory, Some(inherited.as_raw_fd()));
    drop(inherited);
    register(&Client::connect(&gcs.socket), node_id(1));
    drop(writing);
    assert_eq!(gcs.end().0, Some(0));
}

#[test]
fn killed_while_it_writes_it_loses_nothing_acknowledged() {
    let directory = TestDirectory::new("kill");
    let mut acknowledged = Vec::new();
    let mut next = 0;
    for round in 0..6_u64 {
        let mut gcs = ControlPlane::start(&directory, None);
        let client = Client::connect(&gcs.socket);
        let answer = register(&client, node_id(1));
        assert_eq!(answer.publisher_epoch, round + 1);
        let there = ask(&client, u64::MAX - 1, keys()).keys;
        for number in &acknowledged {
            assert!(
                there.contains(&Bytes::copy_from_slice(&u64::to_be_bytes(*number))),
                "{number} is lost"
            );
        }
        // Many requests are under way when it is killed, so that commits of several are cut at any point.
        let until = acknowledged.len() + 150 + 40 * round as usize;
        let mut killed = false;
        for _ in 0..600 {
            send(&client, &request(1 + next, put(next)));
            next += 1;
        }
        while let Some(number) = client.wait("an acknowledgement", |frame| {
            (frame.kind == kinds::GCS_REPLY).then_some(frame.correlation - 1)
        }) {
            if number != u64::MAX - 2 {
                acknowledged.push(number);
            }
            if acknowledged.len() >= until && !killed {
                gcs.child.kill().unwrap();
                killed = true;
            }
        }
        assert!(killed);
    }
    assert!(acknowledged.len() > 900);
}
