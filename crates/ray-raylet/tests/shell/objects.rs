//! Objects through a raylet: room, spilling, restoring, transfer, and what a dead owner leaves.

use crate::bench::{until, Driver, Session};
use bytes::Bytes;
use ray_ids::{ObjectId, TaskId, WorkerId};
use ray_store::{ClientSlot, Extent, Lookup, StoreClient, StoreError};
use ray_wire::layout::{StoredLayout, FORMAT_BYTES};
use ray_wire::{kinds, ExtentLent, FetchFailed, FetchObject, FreeObjects, ObjectLocal, RequestExtent};
use serde_json::json;
use std::path::Path;
use std::sync::Arc;

pub struct Store<'a> {
    driver: &'a Driver,
    client: StoreClient,
}

pub fn attach(driver: &Driver) -> Store<'_> {
    let welcome = &driver.welcome;
    let slot = ClientSlot {
        number: welcome.store_slot,
        generation: welcome.store_slot_generation as u32,
    };
    let client = StoreClient::attach(Path::new(&welcome.store_path), slot).unwrap();
    if let Some(extent) = welcome.first_extent {
        client
            .add_extent(Extent {
                offset: extent.offset,
                len: extent.length,
                reserved: extent.reserved,
            })
            .unwrap();
    }
    Store { driver, client }
}

impl Store<'_> {
    fn extent(&self, bytes: u64) -> Result<(), String> {
        let correlation = self.driver.next();
        let message = RequestExtent {
            minimum_bytes: bytes,
            object_id: Bytes::new(),
        };
        self.driver
            .link
            .send(kinds::REQUEST_EXTENT, correlation, ray_wire::encode(&message), &[])
            .unwrap();
        let frame = self
            .driver
            .party
            .inbox
            .wait_for(kinds::EXTENT_LENT, |frame| frame.correlation == correlation)
            .1;
        let lent: ExtentLent = ray_wire::decode("ExtentLent", frame.header).unwrap();
        if !lent.error.is_empty() {
            return Err(lent.error);
        }
        let extent = lent.extent.unwrap_or_default();
        self.client
            .add_extent(Extent {
                offset: extent.offset,
                len: extent.length,
                reserved: extent.reserved,
            })
            .unwrap();
        Ok(())
    }

    pub fn put(&self, owner: WorkerId, fill: u8, bytes: usize) -> Result<ObjectId, String> {
        let object = ObjectId::of(TaskId::for_driver(self.driver.job), u32::from(fill) + 1);
        let layout = StoredLayout::plan(FORMAT_BYTES, owner, bytes, &[], 0);
        let mut writer = loop {
            match self.client.create(object, layout.total_bytes as u64) {
                Ok(writer) => break writer,
                Err(StoreError::NeedExtent { bytes }) => self.extent(bytes)?,
                Err(error) => panic!("{error}"),
            }
        };
        layout.write_header(writer.as_mut_slice(), &[]);
        writer.as_mut_slice()[layout.inband.0..layout.inband.0 + bytes].fill(fill);
        writer.seal(FORMAT_BYTES).unwrap();
        Ok(object)
    }

    fn fetch(&self, object: ObjectId, locations: Vec<ray_wire::Address>) -> Result<bool, FetchFailed> {
        self.fetch_of(None, object, locations)
    }

    pub fn fetch_of(
        &self,
        owner: Option<ray_wire::Address>,
        object: ObjectId,
        locations: Vec<ray_wire::Address>,
    ) -> Result<bool, FetchFailed> {
        let correlation = self.driver.next();
        let message = FetchObject {
            object_id: Bytes::copy_from_slice(object.as_bytes()),
            locations,
            owner,
        };
        self.driver
            .link
            .send(kinds::FETCH_OBJECT, correlation, ray_wire::encode(&message), &[])
            .unwrap();
        let inbox = &self.driver.party.inbox;
        let (_, frame) = inbox.wait_any(&[kinds::OBJECT_LOCAL, kinds::FETCH_FAILED], |frame| {
            frame.correlation == correlation
        });
        if frame.kind == kinds::FETCH_FAILED {
            return Err(ray_wire::decode("FetchFailed", frame.header).unwrap());
        }
        let local: ObjectLocal = ray_wire::decode("ObjectLocal", frame.header).unwrap();
        Ok(local.transferred)
    }

    /// Whether the object is whole and filled as it should be.
    fn check(&self, object: ObjectId, fill: u8, bytes: usize) {
        let Lookup::Found(pinned) = self.client.get(&object).unwrap() else {
            panic!("{object} is not here")
        };
        let layout = StoredLayout::read(&pinned).unwrap();
        assert_eq!(layout.inband.1, bytes);
        assert!(pinned[layout.inband.0..layout.inband.0 + bytes]
            .iter()
            .all(|byte| *byte == fill));
    }

    fn free(&self, objects: &[ObjectId]) {
        let ids: Vec<u8> = objects.iter().flat_map(|object| object.to_vec()).collect();
        let message = FreeObjects { object_ids: ids.into() };
        self.driver
            .link
            .send(kinds::FREE_OBJECTS, 0, ray_wire::encode(&message), &[])
            .unwrap();
    }

    pub fn memory(&self) -> serde_json::Value {
        self.driver.query(json!({"method": "memory"}))
    }
}

const MIB: usize = 1 << 20;

#[test]
fn more_than_fits_is_spilled_restored_and_freed() {
    let session = Session::new("spill");
    let raylet = session.start_raylet(json!({"object_store_memory_bytes": 32 * MIB}));
    let driver = raylet.connect_driver();
    let store = attach(&driver);
    let objects: Vec<ObjectId> = (0..12)
        .map(|fill| store.put(driver.worker, fill, 5 * MIB).unwrap())
        .collect();
    assert!(store.memory()["spilled_bytes"].as_u64().unwrap() > 20 * MIB as u64);
    for (fill, object) in objects.iter().enumerate() {
        assert!(!store.fetch(*object, vec![]).unwrap());
        store.check(*object, fill as u8, 5 * MIB);
    }
    let spill = session.directory.join("spill");
    store.free(&objects);
    until("spill files are gone", || {
        let files = |directory: &Path| std::fs::read_dir(directory).unwrap().count();
        std::fs::read_dir(&spill)
            .unwrap()
            .flatten()
            .all(|node| files(&node.path()) == 0)
    });
    let memory = store.memory();
    assert_eq!(
        (&memory["spilled_objects"], &memory["ledger"]["objects"]),
        (&json!(0), &json!(0))
    );
    assert_eq!(memory["owners"], json!([]));
}

#[test]
fn what_can_never_fit_is_refused_at_once_and_what_does_not_with_a_table() {
    let session = Session::new("full");
    let config = json!({"object_store_memory_bytes": 32 * MIB, "system_config": {"object_store_full_wait_ms": 300}});
    let raylet = session.start_raylet(config);
    let driver = raylet.connect_driver();
    let store = attach(&driver);
    let error = store.put(driver.worker, 1, 100 * MIB).unwrap_err();
    assert!(
        error.contains("can never be stored") && error.contains(&(32 * MIB).to_string()),
        "{error}"
    );
    // What is pinned can neither be dropped nor moved.
    let object = store.put(driver.worker, 2, 20 * MIB).unwrap();
    store.fetch(object, vec![]).unwrap();
    let Lookup::Found(pinned) = store.client.get(&object).unwrap() else {
        panic!("it is here")
    };
    let error = store.put(driver.worker, 3, 20 * MIB).unwrap_err();
    assert!(
        error.contains("is full") && error.contains("Owners of the most bytes"),
        "{error}"
    );
    assert!(error.contains(&format!("pid {}", std::process::id())), "{error}");
    drop(pinned);
    store.put(driver.worker, 3, 20 * MIB).unwrap();
    store.fetch(object, vec![]).unwrap();
    store.check(object, 2, 20 * MIB);
}

#[test]
fn a_damaged_spill_file_is_an_error_that_names_it() {
    let session = Session::new("damage");
    let raylet = session.start_raylet(json!({"object_store_memory_bytes": 32 * MIB}));
    let driver = raylet.connect_driver();
    let store = attach(&driver);
    let objects: Vec<ObjectId> = (0..8)
        .map(|fill| store.put(driver.worker, fill, 8 * MIB).unwrap())
        .collect();
    let node = std::fs::read_dir(session.directory.join("spill"))
        .unwrap()
        .flatten()
        .next()
        .unwrap()
        .path();
    let mut damaged = 0;
    for file in std::fs::read_dir(&node).unwrap().flatten() {
        use std::os::unix::fs::FileExt;
        let target = std::fs::File::options().write(true).open(file.path()).unwrap();
        target.write_all_at(b"damage", 5 * MIB as u64).unwrap();
        damaged += 1;
    }
    assert!(damaged > 0);
    let failures: Vec<FetchFailed> = objects
        .iter()
        .filter_map(|object| store.fetch(*object, vec![]).err())
        .collect();
    assert!(!failures.is_empty());
    assert!(failures
        .iter()
        .all(|failed| failed.reason.contains("checksum") && failed.reason.contains("spill-")));
}

#[test]
fn an_object_is_pulled_from_another_node_and_its_owners_death_frees_it() {
    let session = Session::new("pull");
    let small = json!({"object_chunk_bytes": 256 * 1024, "object_chunk_window": 3});
    let first = session.start_raylet(json!({"system_config": small}));
    let second = session.start_raylet(json!({"system_config": small, "is_head": false}));
    let here = first.connect_driver();
    let there = second.connect_driver();
    let (source, target) = (attach(&here), attach(&there));
    let owner = there.worker;
    let object = source.put(here.worker, 9, 10 * MIB + 17).unwrap();
    let owned_there = source.put(owner, 10, 3 * MIB).unwrap();
    let location = ray_wire::Address {
        worker_id: Bytes::copy_from_slice(WorkerId::NIL.as_bytes()),
        ..here.welcome.address.clone().unwrap()
    };
    // The second raylet must have heard of the first.
    assert!(target.fetch(object, vec![location.clone()]).unwrap());
    target.check(object, 9, 10 * MIB + 17);
    assert!(!target.fetch(object, vec![location.clone()]).unwrap());
    let missing = ObjectId::of(TaskId::for_driver(here.job), 99);
    let failed = target.fetch(missing, vec![location.clone()]).unwrap_err();
    assert_eq!(failed.absent_nodes, [Bytes::copy_from_slice(first.node_id.as_bytes())]);
    assert!(target.fetch(owned_there, vec![location]).unwrap());
    target.check(owned_there, 10, 3 * MIB);
    // The owner dies: the copy on the other node goes when the control plane tells of it.
    let gcs = session.gcs().inbox.links_of(kinds::REGISTER_NODE);
    let died = ray_wire::WorkerDied {
        worker: Some(there.welcome.address.clone().unwrap()),
        cause: None,
    };
    for link in gcs {
        link.send(kinds::WORKER_DEATH_NOTICE, 0, ray_wire::encode(&died), &[])
            .unwrap();
    }
    until("the dead owner's object is gone", || {
        source.memory()["ledger"]["objects"] == json!(1)
    });
}

#[test]
fn a_connection_for_a_worker_is_handed_over() {
    let session = Session::new("hand");
    let raylet = session.start_raylet(json!({}));
    let driver = raylet.connect_driver();
    let lease = driver.lease(1.0);
    let address = lease.worker.unwrap();
    let socket = std::net::SocketAddr::new(address.host.parse().unwrap(), address.port as u16);
    let target = ray_rpc::Target {
        node: raylet.node_id,
        process: address.worker().unwrap(),
    };
    let token = ray_rpc::AuthToken::new(b"a token for tests".to_vec()).unwrap();
    let link: Arc<ray_rpc::Link> = driver.party.reactor.connect_tcp(socket, target, token).unwrap();
    assert_eq!(driver.command(&link, json!({"status": true}))["pid"], lease.worker_pid);
}
