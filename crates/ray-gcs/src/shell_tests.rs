//! Tests of the shell with a storage that fails when it is told to.

use std::os::fd::{FromRawFd, OwnedFd};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use ray_wire::{decode, Address, GcsCall, GcsRequest, JsonQuery, KvPut, NodeInfo, RegisterNode, GCS_ERROR_STORAGE};

use super::*;
use crate::records::Row;
use crate::GcsSettings;

#[path = "../tests/gcs/client.rs"]
#[allow(dead_code)] // Other tests use the rest of it.
mod client;
use client::Client;

#[derive(Default)]
struct Disk {
    full: AtomicBool,
    commits: AtomicUsize,
    mutations: AtomicUsize,
}

struct DiskStorage(Arc<Disk>);

impl Storage for DiskStorage {
    fn load(&mut self) -> Result<Vec<Row>, GcsError> {
        Ok(Vec::new())
    }

    fn commit(&mut self, mutations: &[Mutation]) -> Result<(), GcsError> {
        if self.0.full.load(Ordering::SeqCst) {
            let code = rusqlite::ffi::Error::new(rusqlite::ffi::SQLITE_FULL);
            return Err(GcsError::Storage {
                action: "committing",
                source: rusqlite::Error::SqliteFailure(code, None),
            });
        }
        self.0.commits.fetch_add(1, Ordering::SeqCst);
        self.0.mutations.fetch_add(mutations.len(), Ordering::SeqCst);
        Ok(())
    }

    fn description(&self) -> String {
        "a disk that can be full".into()
    }
}

struct Running {
    disk: Arc<Disk>,
    socket: PathBuf,
    parent: Option<OwnedFd>,
    thread: Option<std::thread::JoinHandle<Result<(), GcsError>>>,
}

impl Running {
    fn start(name: &str) -> Self {
        let disk = Arc::new(Disk::default());
        let socket = std::env::temp_dir().join(format!("gcs-{name}-{}", std::process::id()));
        let mut ends = [0; 2];
        // SAFETY: pipe2 writes two descriptors, which are owned from here on.
        let (reading, writing) = unsafe {
            assert_eq!(libc::pipe2(ends.as_mut_ptr(), libc::O_CLOEXEC | libc::O_NONBLOCK), 0);
            (OwnedFd::from_raw_fd(ends[0]), OwnedFd::from_raw_fd(ends[1]))
        };
        let mut random_state = 1;
        let gcs = Gcs::new(GcsSettings::default(), 1_000, &mut || split_mix(&mut random_state));
        let inner = Inner::new(gcs, Box::new(DiskStorage(disk.clone())), random_state);
        let at = socket.clone();
        let thread = std::thread::spawn(move || serve(inner, &at, (Instant::now(), 1_000), None, Some(reading)));
        Self {
            disk,
            socket,
            parent: Some(writing),
            thread: Some(thread),
        }
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        drop(self.parent.take());
        if let Some(thread) = self.thread.take() {
            let ended = thread.join();
            if !std::thread::panicking() {
                ended.unwrap().unwrap();
            }
        }
    }
}

fn send(client: &Client, message: &NodeMessage) {
    let (kind, correlation, header) = message.encode();
    client.link.send(kind, correlation, header, &[]).unwrap();
}

fn register(client: &Client) {
    let address = Address {
        node_id: bytes::Bytes::from(vec![1; 28]),
        ..Address::default()
    };
    let node = NodeInfo {
        address: Some(address),
        ..NodeInfo::default()
    };
    let message = Box::new(RegisterNode {
        node: Some(node),
        ..RegisterNode::default()
    });
    send(
        client,
        &NodeMessage::Register {
            correlation: 1,
            message,
        },
    );
    client
        .wait("the registration's answer", |frame| {
            (frame.kind == kinds::NODE_REGISTERED).then_some(())
        })
        .unwrap();
}

fn call(client: &Client, correlation: u64, request_id: u64, call: GcsCall) {
    let request = Box::new(GcsRequest {
        request_id,
        sender: None,
        call: Some(call),
    });
    send(client, &NodeMessage::Request { correlation, request });
}

fn reply(client: &Client) -> (u64, GcsReply) {
    let reply = client.wait("a reply", |frame| {
        let read = || decode::<GcsReply>("GcsReply", frame.header.clone()).unwrap();
        (frame.kind == kinds::GCS_REPLY).then(|| (frame.correlation, read()))
    });
    reply.unwrap()
}

fn put(key: &str) -> GcsCall {
    let key = bytes::Bytes::copy_from_slice(key.as_bytes());
    GcsCall::KvPut(KvPut {
        key,
        overwrite: true,
        ..KvPut::default()
    })
}

#[test]
fn a_full_disk_is_said_and_lived_through() {
    let running = Running::start("full");
    let client = Client::connect(&running.socket);
    register(&client);
    running.disk.full.store(true, Ordering::SeqCst);
    call(&client, 2, 2, put("held back"));
    // The next order finds the storage failing, at the latest when the first has been tried.
    let mut refused = None;
    for correlation in 3..2_000 {
        call(&client, correlation, correlation, put("refused"));
        let query = GcsCall::Query(JsonQuery {
            query_json: r#"{"method": "health"}"#.into(),
        });
        call(&client, 10_000 + correlation, 0, query);
        let (answered, first) = reply(&client);
        if answered < 10_000 {
            refused = Some(first);
            assert!(
                reply(&client).1.json.contains("epoch"),
                "questions are answered meanwhile"
            );
            break;
        }
    }
    let refused = refused.expect("a refusal");
    assert_eq!(refused.error_kind, GCS_ERROR_STORAGE);
    assert!(refused.error.contains("full"), "{}", refused.error);
    running.disk.full.store(false, Ordering::SeqCst);
    let (answered, first) = reply(&client);
    assert_eq!(
        (answered, first.error.as_str()),
        (2, ""),
        "what was held back is stored and answered"
    );
    call(&client, 30_000, 30_000, put("after"));
    loop {
        let (answered, last) = reply(&client);
        if answered == 30_000 {
            assert_eq!(last.error, "");
            break;
        }
    }
}

#[test]
fn requests_of_one_round_share_a_commit() {
    let running = Running::start("group");
    let client = Client::connect(&running.socket);
    register(&client);
    let before = running.disk.commits.load(Ordering::SeqCst);
    client.link.cork();
    for number in 0..500 {
        call(&client, 10 + number, 10 + number, put(&number.to_string()));
    }
    client.link.uncork();
    for number in 0..500 {
        assert_eq!(reply(&client).0, 10 + number);
    }
    let commits = running.disk.commits.load(Ordering::SeqCst) - before;
    assert!(commits < 250, "{commits} commits for 500 requests");
    assert!(running.disk.mutations.load(Ordering::SeqCst) >= 500);
}
