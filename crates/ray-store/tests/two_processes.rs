//! Server and clients in different processes, and clients that are killed while they write.
//!
//! The test starts itself again as the client; a pipe each way stands for the link to the raylet.
#![cfg(not(loom))]

use std::io::{BufRead, BufReader, Write};
use std::path::PathBuf;
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::mpsc::{channel, Receiver};
use std::time::{Duration, Instant};

use ray_ids::{ObjectId, WorkerId};
use ray_store::{
    choose_path, ClientSlot, DeleteOutcome, Extent, LocalPurpose, Lookup, StoreClient, StoreConfig, StoreError,
    StoreEvent, StoreServer,
};

const CHILD: &str = "RAY_STORE_TEST_CHILD";
const LIMIT: Duration = Duration::from_secs(60);
/// What the child's lines start with, as the test harness prints lines of its own.
const MARK: &str = "@";

fn object(number: u32) -> ObjectId {
    let mut bytes = [5; 28];
    bytes[24..].copy_from_slice(&number.to_le_bytes());
    ObjectId::from_array(bytes)
}

fn content(number: u32, size: u64) -> Vec<u8> {
    (0..size)
        .map(|at| (at as u32 ^ number.wrapping_mul(0x9e37_79b9)) as u8)
        .collect()
}

fn size_of(number: u32) -> u64 {
    u64::from(number % 50) * 2011
}

/// The client's end of the link.
struct Raylet {
    client: StoreClient,
    lines: std::io::Lines<std::io::StdinLock<'static>>,
}

impl Raylet {
    fn ask(&mut self, question: String) -> String {
        println!("{MARK}{question}");
        self.lines
            .next()
            .expect("the raylet answers")
            .expect("its answer can be read")
    }

    fn put(&mut self, number: u32) {
        let size = size_of(number);
        let mut writer = loop {
            match self.client.create(object(number), size) {
                Ok(writer) => break writer,
                Err(StoreError::NeedExtent { bytes }) => {
                    let answer = self.ask(format!("lend {bytes}"));
                    let fields: Vec<u64> = answer.split(' ').map(|field| field.parse().unwrap()).collect();
                    let extent = Extent {
                        offset: fields[0],
                        len: fields[1],
                        reserved: fields[2] == 1,
                    };
                    self.client.add_extent(extent).unwrap();
                }
                Err(error) => panic!("{error}"),
            }
        };
        writer.as_mut_slice().copy_from_slice(&content(number, size));
        while let Err(unsealed) = writer.seal(number) {
            self.ask("nudge".into());
            writer = unsealed.writer;
        }
    }

    fn delete(&mut self, number: u32) {
        while self.client.request_delete(&object(number)).is_err() {
            self.ask("nudge".into());
        }
    }
}

/// The client's process; it does nothing unless it was started as one.
#[test]
fn child_process() {
    let Ok(role) = std::env::var(CHILD) else { return };
    let fields: Vec<&str> = role.split(',').collect();
    let slot = ClientSlot {
        number: fields[1].parse().unwrap(),
        generation: fields[2].parse().unwrap(),
    };
    let client = StoreClient::attach(&PathBuf::from(fields[3]), slot).unwrap();
    let mut raylet = Raylet {
        client,
        lines: std::io::stdin().lines(),
    };
    match fields[0] {
        "put" => {
            (0..200).for_each(|number| raylet.put(number));
            raylet.ask("done".into());
        }
        "get" => {
            let mut views = Vec::new();
            for number in 0..200 {
                let Lookup::Found(view) = raylet.client.get(&object(number)).unwrap() else {
                    panic!("{number}")
                };
                assert_eq!(view[..], content(number, size_of(number))[..]);
                assert_eq!(view.metadata(), number);
                views.push(view);
            }
            raylet.ask("done".into());
        }
        "churn" => {
            // Until it is killed.
            let mut kept = Vec::new();
            for number in 1000.. {
                raylet.put(number);
                if let Lookup::Found(view) = raylet.client.get(&object(number)).unwrap() {
                    kept.push(view);
                }
                if kept.len() > 20 {
                    kept.remove(0);
                }
                if number >= 1010 {
                    raylet.delete(number - 10);
                }
                if number % 64 == 0 {
                    for extent in raylet.client.unused(1 << 20) {
                        raylet.ask(format!("back {} {}", extent.offset, extent.len));
                    }
                }
            }
        }
        other => panic!("unknown role {other}"),
    }
}

struct ChildClient {
    process: Child,
    slot: ClientSlot,
    stdin: ChildStdin,
    lines: Receiver<String>,
}

impl ChildClient {
    fn start(server: &mut StoreServer, role: &str) -> Self {
        let slot = server.register_client(WorkerId::from_random()).unwrap();
        let role = format!("{role},{},{},{}", slot.number, slot.generation, server.path().display());
        let mut process = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "child_process", "--nocapture", "--test-threads=1"])
            .env(CHILD, role)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let stdin = process.stdin.take().unwrap();
        let stdout = BufReader::new(process.stdout.take().unwrap());
        let (send, lines) = channel();
        std::thread::spawn(move || {
            for line in stdout.lines().map_while(Result::ok) {
                if let Some((_, line)) = line.split_once(MARK) {
                    if send.send(line.to_string()).is_err() {
                        break;
                    }
                }
            }
        });
        Self {
            process,
            slot,
            stdin,
            lines,
        }
    }

    /// Answers one question; false when the child is done or gone.
    fn serve(&mut self, server: &mut StoreServer) -> bool {
        let Ok(line) = self.lines.recv_timeout(LIMIT) else {
            return false;
        };
        let fields: Vec<&str> = line.split(' ').collect();
        let answer = match fields[0] {
            "lend" => {
                let extent = server.lend_extent(self.slot, fields[1].parse().unwrap()).unwrap();
                format!("{} {} {}", extent.offset, extent.len, u8::from(extent.reserved))
            }
            "nudge" | "done" => {
                for event in server.drain_rings() {
                    assert!(!matches!(event, StoreEvent::Rejected { .. }), "{event:?}");
                }
                server.collect();
                String::new()
            }
            "back" => {
                let (offset, len) = (fields[1].parse().unwrap(), fields[2].parse().unwrap());
                server
                    .give_back(
                        self.slot,
                        Extent {
                            offset,
                            len,
                            reserved: true,
                        },
                    )
                    .unwrap();
                String::new()
            }
            other => panic!("the child says {other}"),
        };
        if fields[0] == "done" {
            return false;
        }
        // A child that is being killed need not take its answer.
        let _ = writeln!(self.stdin, "{answer}");
        true
    }

    fn finish(mut self) -> ClientSlot {
        let _ = writeln!(self.stdin);
        assert!(self.process.wait().unwrap().success());
        self.slot
    }
}

fn server(capacity_bytes: u64, name: &str) -> StoreServer {
    let name = format!("ray-store-processes-{name}-{}", std::process::id());
    let (path, _) = choose_path(&name, 1 << 28, &std::env::temp_dir());
    StoreServer::create(StoreConfig {
        path,
        capacity_bytes,
        max_clients: 8,
        max_objects: 4096,
    })
    .unwrap()
}

#[test]
fn one_process_puts_and_another_gets() {
    let mut server = server(64 << 20, "put-get");
    let mut writer = ChildClient::start(&mut server, "put");
    while writer.serve(&mut server) {}
    server.validate().unwrap();
    assert_eq!(server.ledger().objects, 200);
    let slot = writer.finish();
    server.forget_client(slot).unwrap();

    let mut reader = ChildClient::start(&mut server, "get");
    while reader.serve(&mut server) {}
    // The reader holds all of them in use and waits for its answer.
    let all: Vec<ObjectId> = (0..200).map(object).collect();
    let outcomes = server.delete_many(&all);
    assert!(outcomes
        .iter()
        .all(|outcome| *outcome == DeleteOutcome::DeferredUntilUnpinned));
    reader.process.kill().unwrap();
    reader.process.wait().unwrap();
    let forgotten = server.forget_client(reader.slot).unwrap();
    assert_eq!(forgotten.pins_dropped, 200);
    assert_eq!(server.ledger().free, server.ledger().capacity);
    server.validate().unwrap();
}

#[test]
fn killed_clients_leave_nothing_behind() {
    let mut server = server(16 << 20, "killed");
    for round in 0_u64..12 {
        let mut child = ChildClient::start(&mut server, "churn");
        // It is killed after some questions and then some microseconds, so at any instruction.
        for _ in 0..round * 5 + 3 {
            assert!(child.serve(&mut server), "the child ended by itself");
        }
        let until = Instant::now() + Duration::from_micros(round * 37 % 400);
        while Instant::now() < until {
            std::hint::spin_loop();
        }
        child.process.kill().unwrap();
        child.process.wait().unwrap();
        server.validate().unwrap();
        server.forget_client(child.slot).unwrap();
        for event in server.drain_rings() {
            assert!(!matches!(event, StoreEvent::Rejected { .. }), "{event:?}");
        }
        server.validate().unwrap();
        let entries: Vec<_> = server.objects().copied().collect();
        for entry in entries {
            let view = server.read(&entry.object).unwrap();
            assert_eq!(view[..], content(entry.metadata, entry.size)[..]);
            assert_eq!(entry.object, object(entry.metadata));
            drop(view);
            assert_eq!(server.delete(&entry.object), DeleteOutcome::Deleted);
        }
        server.collect();
        assert_eq!(server.ledger().free, server.ledger().capacity);
        // All of it can be used at once.
        let buffer = server
            .create_local(object(1), server.ledger().capacity, LocalPurpose::Restore)
            .unwrap();
        server.abort(buffer);
    }
}
