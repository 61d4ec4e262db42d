//! Tests of server and clients together, in one process.

use std::path::PathBuf;
use std::sync::atomic::{AtomicU32, Ordering};

use proptest::prelude::*;
use ray_ids::{ObjectId, WorkerId};

use crate::*;

static NEXT_FILE: AtomicU32 = AtomicU32::new(0);

pub(crate) fn test_path() -> PathBuf {
    let name = format!(
        "ray-store-test-{}-{}",
        std::process::id(),
        NEXT_FILE.fetch_add(1, Ordering::Relaxed)
    );
    choose_path(&name, 1 << 28, &std::env::temp_dir()).0
}

pub(crate) fn server(capacity_bytes: u64, max_objects: u32) -> StoreServer {
    StoreServer::create(StoreConfig {
        path: test_path(),
        capacity_bytes,
        max_clients: 8,
        max_objects,
    })
    .unwrap()
}

pub(crate) fn attach(server: &mut StoreServer) -> StoreClient {
    let slot = server.register_client(WorkerId::from_random()).unwrap();
    StoreClient::attach(server.path(), slot).unwrap()
}

pub(crate) fn object(number: u32) -> ObjectId {
    let mut bytes = [9; 28];
    bytes[24..].copy_from_slice(&number.to_le_bytes());
    ObjectId::from_array(bytes)
}

pub(crate) fn content(number: u32, size: u64) -> Vec<u8> {
    (0..size)
        .map(|at| (at as u32).wrapping_mul(31).wrapping_add(number.wrapping_mul(17)) as u8)
        .collect()
}

/// Creates and seals, asking the server for memory as a raylet's link would.
pub(crate) fn put(server: &mut StoreServer, client: &StoreClient, number: u32, size: u64) -> Result<(), StoreError> {
    let mut writer = loop {
        match client.create(object(number), size) {
            Err(StoreError::NeedExtent { bytes }) => client.add_extent(server.lend_extent(client.slot(), bytes)?)?,
            other => break other?,
        }
    };
    writer.as_mut_slice().copy_from_slice(&content(number, size));
    loop {
        match writer.seal(number) {
            Ok(()) => return Ok(()),
            Err(unsealed) if matches!(unsealed.reason, StoreError::RingFull) => {
                server.lookup(&object(u32::MAX));
                writer = unsealed.writer;
            }
            Err(unsealed) => return Err(unsealed.reason),
        }
    }
}

pub(crate) fn get(client: &StoreClient, number: u32) -> Option<PinnedObject> {
    match client.get(&object(number)).unwrap() {
        Lookup::Found(pinned) => Some(pinned),
        Lookup::Absent => None,
    }
}

fn published(events: &[StoreEvent]) -> Vec<ObjectId> {
    let object = |event: &StoreEvent| match event {
        StoreEvent::Published(published) => Some(published.object),
        _ => None,
    };
    events.iter().filter_map(object).collect()
}

#[test]
fn what_one_client_puts_all_get() {
    let mut server = server(1 << 22, 100);
    let (a, b) = (attach(&mut server), attach(&mut server));
    put(&mut server, &a, 1, 100_000).unwrap();
    let own = get(&a, 1).expect("a client finds what it sealed before the server knows of it");
    assert_eq!((&own[..], own.metadata()), (&content(1, 100_000)[..], 1));
    assert_eq!(own.as_ptr() as usize % 64, 0);
    assert!(get(&b, 1).is_none());
    assert_eq!(server.lookup(&object(1)).unwrap().size, 100_000);
    let theirs = get(&b, 1).expect("a look-up of the server made it visible");
    assert_eq!(&theirs[..], &own[..]);
    assert_eq!(published(&server.drain_rings()), [object(1)]);
    assert_eq!(b.pinned_objects(), [object(1)]);
    server.validate().unwrap();
    fn is_shareable<T: Send + Sync>(_: &T) {}
    is_shareable(&theirs);
    is_shareable(&a);
}

#[test]
fn empty_objects_and_dropped_writers() {
    let mut server = server(1 << 20, 100);
    let a = attach(&mut server);
    put(&mut server, &a, 1, 0).unwrap();
    put(&mut server, &a, 2, 0).unwrap();
    assert_eq!(get(&a, 1).unwrap().len(), 0);
    drop(a.create(object(3), 500).unwrap());
    server.drain_rings();
    assert!(get(&a, 3).is_none());
    assert_eq!(server.ledger().primaries, 128);
    assert_eq!(server.ledger().being_created, 0);
    let writer = a.create(object(3), 500).unwrap();
    assert_eq!(server.ledger().being_created, 512);
    server.validate().unwrap();
    drop(writer);
}

#[test]
fn deleted_bytes_wait_for_those_who_use_them() {
    let mut server = server(1 << 20, 100);
    let (a, b) = (attach(&mut server), attach(&mut server));
    put(&mut server, &a, 1, 600_000).unwrap();
    server.drain_rings();
    let pinned = get(&b, 1).unwrap();
    let clone = pinned.clone();
    assert_eq!(server.delete(&object(1)), DeleteOutcome::DeferredUntilUnpinned);
    assert_eq!(server.delete(&object(1)), DeleteOutcome::Absent);
    assert!(get(&b, 1).is_none() && get(&a, 1).is_none());
    assert!(matches!(
        put(&mut server, &a, 2, 600_000),
        Err(StoreError::Full {
            awaiting_unpin: 600_000,
            ..
        })
    ));
    drop(pinned);
    server.collect();
    assert_eq!(server.ledger().awaiting_unpin, 600_000);
    assert_eq!(&clone[..], &content(1, 600_000)[..]);
    drop(clone);
    put(&mut server, &a, 2, 600_000).unwrap();
    server.validate().unwrap();
}

#[test]
fn a_pin_from_before_the_publication_was_read_counts() {
    let mut server = server(1 << 20, 100);
    let a = attach(&mut server);
    put(&mut server, &a, 1, 5000).unwrap();
    let pinned = get(&a, 1).unwrap();
    a.request_delete(&object(1)).unwrap();
    assert!(get(&a, 1).is_none(), "its owner let go of it");
    let events = server.drain_rings();
    let outcome = DeleteOutcome::DeferredUntilUnpinned;
    assert_eq!(
        events[1],
        StoreEvent::Deleted {
            object: object(1),
            slot: a.slot(),
            outcome
        }
    );
    put(&mut server, &a, 2, 5000).unwrap();
    assert_eq!(&pinned[..], &content(1, 5000)[..]);
    drop(pinned);
    server.collect();
    assert_eq!(server.ledger().awaiting_unpin, 0);
    server.validate().unwrap();
}

#[test]
fn deletions_find_objects_of_rings_that_are_read_later() {
    let mut server = server(1 << 20, 100);
    let (owner, creator) = (attach(&mut server), attach(&mut server));
    put(&mut server, &creator, 1, 5000).unwrap();
    owner.request_delete(&object(1)).unwrap();
    owner.request_delete(&object(2)).unwrap();
    let events = server.drain_rings();
    assert_eq!(published(&events), [object(1)]);
    let deleted = |number, outcome| StoreEvent::Deleted {
        object: object(number),
        slot: owner.slot(),
        outcome,
    };
    assert_eq!(
        events[1..],
        [deleted(1, DeleteOutcome::Deleted), deleted(2, DeleteOutcome::Absent)]
    );
    server.validate().unwrap();
}

#[test]
fn cache_goes_oldest_first_and_primaries_stay() {
    let mut server = server(1 << 20, 100);
    let a = attach(&mut server);
    for number in 0..6 {
        let mut buffer = server
            .create_local(object(number), 1000, LocalPurpose::Transfer)
            .unwrap();
        buffer.writable().unwrap().copy_from_slice(&content(number, 1000));
        assert_eq!(server.ledger().in_transfer, 1024);
        server
            .seal(buffer, 7, if number == 0 { Role::Primary } else { Role::Cache })
            .unwrap();
    }
    let pinned = get(&a, 1).unwrap();
    let held = server.read(&object(2)).unwrap();
    assert_eq!((&held[..], held.metadata()), (&content(2, 1000)[..], 7));
    assert_eq!(server.evict_cache(1500), [object(3), object(4)]);
    assert_eq!(server.evict_cache(1 << 20), [object(5)]);
    assert_eq!(&pinned[..], &content(1, 1000)[..]);
    assert!(
        get(&a, 1).is_some(),
        "an eviction that was given up leaves the object as it was"
    );
    drop((pinned, held));
    server.set_primary(&object(1), true).unwrap();
    assert_eq!(server.evict_cache(1), [object(2)]);
    assert_eq!(server.spill_candidates(1025), [object(0), object(1)]);
    let held = server.read(&object(0)).unwrap();
    assert_eq!(server.spill_candidates(1), [object(1)]);
    assert_eq!(server.try_evict(&object(0)), EvictOutcome::InUse);
    drop(held);
    assert_eq!(server.try_evict(&object(0)), EvictOutcome::Evicted);
    assert_eq!(server.try_evict(&object(0)), EvictOutcome::Absent);
    assert!(server.set_primary(&object(0), true).is_err());
    server.validate().unwrap();
}

#[test]
fn local_buffers_can_be_dropped_or_overtaken() {
    let mut server = server(1 << 20, 100);
    let a = attach(&mut server);
    let buffer = server.create_local(object(1), 1000, LocalPurpose::Restore).unwrap();
    assert_eq!(server.ledger().being_created, 1024);
    assert!(matches!(
        server.create_local(object(1), 1000, LocalPurpose::Restore),
        Err(StoreError::AlreadyExists { .. })
    ));
    put(&mut server, &a, 1, 1000).unwrap();
    assert!(matches!(
        server.seal(buffer, 0, Role::Cache),
        Err(StoreError::AlreadyExists { .. })
    ));
    drop(server.create_local(object(2), 1000, LocalPurpose::Restore).unwrap());
    let buffer = server.create_local(object(2), 1000, LocalPurpose::Restore).unwrap();
    server.abort(buffer);
    assert_eq!(server.ledger().being_created, 0);
    server.validate().unwrap();
}

#[test]
fn a_full_ring_and_a_full_index_hold_clients_back() {
    let mut server = server(1 << 22, 300);
    let a = attach(&mut server);
    a.add_extent(server.lend_extent(a.slot(), 1 << 20).unwrap()).unwrap();
    let seal = |number| a.create(object(number), 10).unwrap().seal(0);
    (0..PUBLICATION_RECORDS as u32).for_each(|number| seal(number).unwrap());
    let unsealed = seal(900).unwrap_err();
    assert!(matches!(unsealed.reason, StoreError::RingFull));
    assert!(matches!(a.request_delete(&object(0)), Err(StoreError::RingFull)));
    assert_eq!(published(&server.drain_rings()).len(), 256);
    unsealed.writer.seal(0).unwrap();
    (256..400).for_each(|number| seal(number).unwrap());
    let events = server.drain_rings();
    assert_eq!(published(&events).len(), 44);
    assert_eq!(events.last(), Some(&StoreEvent::IndexFull { slot: a.slot() }));
    assert_eq!(server.drain_rings(), [], "it is told once");
    assert!(matches!(
        server.create_local(object(901), 1, LocalPurpose::Restore),
        Err(StoreError::TooManyObjects { limit: 300 })
    ));
    let gone: Vec<ObjectId> = (0..200).map(object).collect();
    assert!(server
        .delete_many(&gone)
        .iter()
        .all(|outcome| *outcome == DeleteOutcome::Deleted));
    assert_eq!(published(&server.drain_rings()).len(), 101);
    server.validate().unwrap();
}

#[test]
fn more_pins_than_a_page_and_not_more_than_there_are_words() {
    let mut server = server(1 << 23, 40_000);
    let (a, b) = (attach(&mut server), attach(&mut server));
    let mut pins = Vec::new();
    for number in 0..=MAX_PINS as u32 {
        put(&mut server, &a, number, 8).unwrap();
        if number % 128 == 127 {
            server.drain_rings();
            pins.extend((number - 127..=number).map(|number| get(&b, number).unwrap()));
        }
    }
    server.drain_rings();
    let last = object(MAX_PINS as u32);
    assert!(matches!(
        b.get(&last),
        Err(StoreError::TooManyPins { pinned: MAX_PINS })
    ));
    let all: Vec<ObjectId> = (0..=MAX_PINS as u32).map(object).collect();
    let outcomes = server.delete_many(&all);
    assert_eq!(
        outcomes
            .iter()
            .filter(|it| **it == DeleteOutcome::DeferredUntilUnpinned)
            .count() as u64,
        MAX_PINS
    );
    drop(pins);
    server.collect();
    assert_eq!((server.ledger().awaiting_unpin, server.ledger().primaries), (0, 0));
    put(&mut server, &a, 1, 8).unwrap();
    server.drain_rings();
    let pin = get(&b, 1).unwrap();
    let forgotten = server.forget_client(b.slot()).unwrap();
    assert_eq!(forgotten.pins_dropped, 1);
    server.validate().unwrap();
    drop(pin);
}

#[test]
fn lies_are_rejected() {
    let mut server = server(1 << 22, 100);
    let (a, b) = (attach(&mut server), attach(&mut server));
    let extent = server.lend_extent(a.slot(), 1 << 20).unwrap();
    // The second client pretends that the first one's extent is its own.
    b.add_extent(extent).unwrap();
    b.create(object(1), 100).unwrap().seal(0).unwrap();
    let events = server.drain_rings();
    assert!(
        matches!(&events[..], [StoreEvent::Rejected { slot, .. }] if *slot == b.slot()),
        "{events:?}"
    );
    assert!(server.give_back(b.slot(), extent).is_err());
    assert!(server
        .give_back(
            a.slot(),
            Extent {
                offset: u64::MAX,
                len: 2,
                reserved: true
            }
        )
        .is_err());
    assert!(b
        .add_extent(Extent {
            offset: u64::MAX,
            len: 64,
            reserved: true
        })
        .is_err());
    server.give_back(a.slot(), extent).unwrap();
    let stale = ClientSlot {
        generation: 99,
        ..a.slot()
    };
    assert!(matches!(
        server.lend_extent(stale, 1),
        Err(StoreError::UnknownClient { .. })
    ));
    assert!(matches!(
        StoreClient::attach(server.path(), stale),
        Err(StoreError::UnknownClient { .. })
    ));
    server.validate().unwrap();
}

#[test]
fn a_second_copy_of_an_object_is_dropped() {
    let mut server = server(1 << 22, 100);
    let (a, b) = (attach(&mut server), attach(&mut server));
    b.add_extent(server.lend_extent(b.slot(), 1000).unwrap()).unwrap();
    put(&mut server, &a, 1, 1000).unwrap();
    put(&mut server, &b, 1, 1000).unwrap();
    let own = get(&b, 1).unwrap();
    let events = server.drain_rings();
    assert_eq!(
        events[1],
        StoreEvent::Duplicate {
            object: object(1),
            slot: b.slot()
        }
    );
    assert_eq!(
        server.ledger().awaiting_unpin,
        1024,
        "the second copy is in use by its creator"
    );
    drop(own);
    server.collect();
    assert_eq!(server.ledger().awaiting_unpin, 0);
    assert!(get(&b, 1).is_some());
    server.validate().unwrap();
}

#[test]
fn memory_comes_back_to_its_last_user_without_a_message() {
    let mut server = server(64 << 20, 100);
    let a = attach(&mut server);
    put(&mut server, &a, 0, 200_000).unwrap();
    for number in 1..1000 {
        a.request_delete(&object(number - 1)).unwrap();
        put(&mut server, &a, number, 200_000).unwrap();
        if number % 3 == 0 {
            server.drain_rings();
        }
    }
    let ledger = server.ledger();
    assert!(ledger.capacity - ledger.free <= 4 << 20, "{ledger:?}");
    server.drain_rings();
    let extents = a.unused(u64::MAX);
    for extent in extents {
        server.give_back(a.slot(), extent).unwrap();
    }
    assert_eq!(server.ledger().lent_unused, 0);
    assert_eq!(server.ledger().free, (64 << 20) - 200_000);
    server.validate().unwrap();
}

#[test]
fn waiting_creators_come_before_the_last_user() {
    let mut server = server(64 << 20, 100);
    let a = attach(&mut server);
    put(&mut server, &a, 0, 200_000).unwrap();
    server.drain_rings();
    server.set_creators_waiting(true);
    let before = server.ledger().lent_unused;
    server.delete(&object(0));
    assert_eq!(server.ledger().lent_unused, before);
    server.validate().unwrap();
}

#[test]
fn recalled_memory_serves_others() {
    let mut server = server(1 << 20, 100);
    let (a, b) = (attach(&mut server), attach(&mut server));
    put(&mut server, &a, 1, 1000).unwrap();
    assert!(matches!(put(&mut server, &b, 2, 900_000), Err(StoreError::Full { .. })));
    let (slot, _, lent) = server.lent_by_client()[0];
    assert_eq!(slot, a.slot());
    assert!(lent > 0);
    for extent in a.close() {
        server.give_back(slot, extent).unwrap();
    }
    put(&mut server, &b, 2, 900_000).unwrap();
    assert!(matches!(a.create(object(3), 1), Err(StoreError::Closed)));
    server.validate().unwrap();
}

#[test]
fn warming_and_trimming_change_no_account() {
    let mut server = server(8 << 20, 100);
    assert_eq!(server.warm_free_bytes(), 0);
    assert_eq!(server.prefault_step(1 << 20), 1 << 20);
    assert_eq!(server.warm_free_bytes(), 1 << 20);
    let a = attach(&mut server);
    put(&mut server, &a, 1, 3 << 20).unwrap();
    assert_eq!(server.delete(&object(1)), DeleteOutcome::Deleted);
    let warm = server.warm_free_bytes();
    assert!(warm > 3 << 20);
    assert_eq!(server.trim(u64::MAX).unwrap(), warm);
    assert_eq!(server.warm_free_bytes(), 0);
    put(&mut server, &a, 2, 3 << 20).unwrap();
    assert_eq!(&get(&a, 2).unwrap()[..], &content(2, 3 << 20)[..]);
    server.validate().unwrap();
}

#[test]
fn clients_come_and_go() {
    let mut server = server(1 << 22, 100);
    let clients: Vec<StoreClient> = (0..8).map(|_| attach(&mut server)).collect();
    assert!(matches!(
        server.register_client(WorkerId::from_random()),
        Err(StoreError::TooManyClients { limit: 8 })
    ));
    put(&mut server, &clients[3], 1, 1000).unwrap();
    let view = get(&clients[3], 1).unwrap();
    let forgotten = server.forget_client(clients[3].slot()).unwrap();
    assert_eq!((forgotten.pins_dropped, forgotten.lost), (1, vec![]));
    assert!(server.contains(&object(1)), "what was published stays");
    assert!(server.forget_client(clients[3].slot()).is_err());
    let next = attach(&mut server);
    assert_eq!(next.slot().number, 3);
    assert_ne!(next.slot(), clients[3].slot());
    drop(view);
    put(&mut server, &next, 2, 1000).unwrap();
    assert!(get(&next, 2).is_some());
    server.validate().unwrap();
}

#[test]
fn views_outlive_client_and_server() {
    let mut server = server(1 << 20, 100);
    let a = attach(&mut server);
    put(&mut server, &a, 1, 1000).unwrap();
    let view = get(&a, 1).unwrap();
    let path = server.path().to_path_buf();
    drop(a);
    drop(server);
    assert!(!path.exists());
    assert_eq!(&view[..], &content(1, 1000)[..]);
}

#[test]
fn files_of_dead_servers_are_replaced_and_others_kept() {
    use std::os::unix::fs::PermissionsExt;
    let live = server(1 << 20, 10);
    let config = StoreConfig {
        path: live.path().into(),
        capacity_bytes: 1 << 20,
        max_clients: 1,
        max_objects: 10,
    };
    assert!(matches!(
        StoreServer::create(config.clone()),
        Err(StoreError::PathInUse { .. })
    ));
    assert_eq!(
        std::fs::metadata(live.path()).unwrap().permissions().mode() & 0o777,
        0o600
    );

    let directory = std::env::temp_dir().join(format!("ray-store-stale-{}", std::process::id()));
    std::fs::create_dir_all(&directory).unwrap();
    let stale = directory.join("store-stale");
    std::fs::copy(live.path(), &stale).unwrap();
    let other = directory.join("store-other");
    std::fs::write(&other, "something else entirely").unwrap();
    assert!(matches!(remove_if_stale(&other), Err(StoreError::BadFile { .. })));
    let replaced = StoreServer::create(StoreConfig {
        path: stale.clone(),
        ..config
    })
    .unwrap();
    assert_eq!(remove_stale_stores(&directory, "store").unwrap(), Vec::<PathBuf>::new());
    drop(replaced);
    std::fs::copy(live.path(), &stale).unwrap();
    assert_eq!(remove_stale_stores(&directory, "store").unwrap(), [stale]);
    assert!(matches!(
        StoreClient::attach(
            &other,
            ClientSlot {
                number: 0,
                generation: 1
            }
        ),
        Err(StoreError::BadFile { .. })
    ));
    std::fs::remove_dir_all(&directory).unwrap();
}

#[test]
fn a_forked_child_changes_nothing() {
    let mut server = server(1 << 20, 100);
    let a = attach(&mut server);
    put(&mut server, &a, 1, 1000).unwrap();
    server.drain_rings();
    let view = get(&a, 1).unwrap();
    let wanted = content(1, 1000);
    // SAFETY: the child only runs code of this crate that neither allocates nor takes locks, and leaves with _exit.
    let child = unsafe { libc::fork() };
    if child == 0 {
        let right = view[..] == wanted[..];
        drop(view);
        let refused = matches!(a.get(&object(1)), Err(StoreError::Forked))
            && matches!(a.create(object(2), 1), Err(StoreError::Forked))
            && matches!(a.request_delete(&object(1)), Err(StoreError::Forked))
            && a.close().is_empty();
        drop(server);
        // SAFETY: it ends the child without running anything of the parent's.
        unsafe { libc::_exit(if right && refused { 0 } else { 1 }) };
    }
    let mut status = 0;
    // SAFETY: it waits for the child that was just started.
    assert_eq!(unsafe { libc::waitpid(child, &mut status, 0) }, child);
    assert!(
        libc::WIFEXITED(status) && libc::WEXITSTATUS(status) == 0,
        "status {status}"
    );
    assert!(server.path().exists());
    assert_eq!(
        server.delete(&object(1)),
        DeleteOutcome::DeferredUntilUnpinned,
        "the parent's pin still stands"
    );
    drop(view);
    server.collect();
    assert_eq!(server.ledger().awaiting_unpin, 0);
}

#[derive(Debug, Clone)]
enum Step {
    Put { client: usize, number: u32, size: u64 },
    Get { client: usize, number: u32 },
    Unpin { position: prop::sample::Index },
    Delete { number: u32 },
    RequestDelete { client: usize, number: u32 },
    Drain,
    Evict { bytes: u64 },
    Local { number: u32, size: u64 },
    Recall { client: usize, bytes: u64 },
    Forget { client: usize },
    Collect,
}

fn step() -> impl Strategy<Value = Step> {
    let (client, number, size) = (0usize..3, 0u32..12, 0u64..60_000);
    prop_oneof![
        6 => (client.clone(), number.clone(), size.clone())
            .prop_map(|(client, number, size)| Step::Put { client, number, size }),
        4 => (client.clone(), number.clone()).prop_map(|(client, number)| Step::Get { client, number }),
        3 => any::<prop::sample::Index>().prop_map(|position| Step::Unpin { position }),
        2 => number.clone().prop_map(|number| Step::Delete { number }),
        2 => (client.clone(), number.clone()).prop_map(|(client, number)| Step::RequestDelete { client, number }),
        2 => Just(Step::Drain),
        1 => (0u64..100_000).prop_map(|bytes| Step::Evict { bytes }),
        2 => (number, size).prop_map(|(number, size)| Step::Local { number, size }),
        1 => (client.clone(), 0u64..200_000).prop_map(|(client, bytes)| Step::Recall { client, bytes }),
        1 => client.prop_map(|client| Step::Forget { client }),
        1 => Just(Step::Collect),
    ]
}

fn is_content(bytes: &[u8], number: u32) -> bool {
    bytes == content(number, bytes.len() as u64)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]
    #[test]
    fn no_byte_is_lost_and_no_view_changes(steps in proptest::collection::vec(step(), 1..120)) {
        let mut server = server(1 << 20, 64);
        let mut clients: Vec<StoreClient> = (0..3).map(|_| attach(&mut server)).collect();
        let mut views: Vec<(usize, u32, PinnedObject)> = Vec::new();
        for step in steps {
            match step {
                Step::Put { client, number, size } => match put(&mut server, &clients[client], number, size) {
                    Ok(()) | Err(StoreError::Full { .. }) => {}
                    Err(error) => panic!("{error}"),
                },
                Step::Get { client, number } => {
                    views.extend(get(&clients[client], number).map(|view| (client, number, view)));
                }
                Step::Unpin { position } if !views.is_empty() => {
                    views.swap_remove(position.index(views.len()));
                }
                Step::Unpin { .. } => {}
                Step::Delete { number } => {
                    server.delete(&object(number));
                }
                Step::RequestDelete { client, number } => clients[client].request_delete(&object(number)).unwrap(),
                Step::Drain => {
                    let events = server.drain_rings();
                    let rejected = events.iter().any(|event| matches!(event, StoreEvent::Rejected { .. }));
                    prop_assert!(!rejected, "{events:?}");
                }
                Step::Evict { bytes } => {
                    server.evict_cache(bytes);
                }
                Step::Local { number, size } => {
                    if let Ok(mut buffer) = server.create_local(object(number), size, LocalPurpose::Transfer) {
                        buffer.writable().unwrap().copy_from_slice(&content(number, size));
                        server.seal(buffer, number, Role::Cache).unwrap();
                    }
                }
                Step::Recall { client, bytes } => {
                    for extent in clients[client].unused(bytes) {
                        server.give_back(clients[client].slot(), extent).unwrap();
                    }
                }
                Step::Forget { client } => {
                    // A process that ended has no views either.
                    views.retain(|(holder, _, _)| *holder != client);
                    server.forget_client(clients[client].slot()).unwrap();
                    clients[client] = attach(&mut server);
                }
                Step::Collect => server.collect(),
            }
            prop_assert_eq!(server.validate(), Ok(()));
            for (_, number, view) in &views {
                prop_assert!(is_content(view, *number));
            }
        }
        views.clear();
        server.drain_rings();
        let all: Vec<ObjectId> = (0..12).map(object).collect();
        server.delete_many(&all);
        for client in &clients {
            server.forget_client(client.slot()).unwrap();
        }
        let ledger = server.ledger();
        prop_assert_eq!((ledger.free, ledger.objects), (ledger.capacity, 0));
    }
}

#[test]
fn many_threads_put_get_and_delete_while_the_server_evicts() {
    use std::sync::atomic::AtomicBool;
    use std::sync::mpsc;
    const THREADS: u32 = 4;
    const ROUNDS: u32 = 1500;
    let mut server = server(4 << 20, 4096);
    let clients = [attach(&mut server), attach(&mut server)];
    let (ask, asked) = mpsc::channel::<(ClientSlot, u64, mpsc::Sender<Option<Extent>>)>();
    let failed = AtomicBool::new(false);
    std::thread::scope(|scope| {
        for thread in 0..THREADS {
            let (ask, failed) = (ask.clone(), &failed);
            let (own, other) = (&clients[thread as usize % 2], &clients[(thread as usize + 1) % 2]);
            scope.spawn(move || {
                let run = || {
                    let mut views = Vec::new();
                    for round in 0..ROUNDS {
                        let number = thread * ROUNDS + round;
                        let size = u64::from(number % 7) * 1009 + 1;
                        let lend = |bytes| {
                            let (reply, replied) = mpsc::channel();
                            ask.send((own.slot(), bytes, reply)).unwrap();
                            replied.recv().unwrap()
                        };
                        let mut writer = loop {
                            match own.create(object(number), size) {
                                Ok(writer) => break writer,
                                Err(StoreError::NeedExtent { bytes }) => {
                                    if let Some(extent) = lend(bytes) {
                                        own.add_extent(extent).unwrap();
                                    }
                                    views.clear();
                                }
                                Err(error) => panic!("{error}"),
                            }
                        };
                        writer.as_mut_slice().copy_from_slice(&content(number, size));
                        while let Err(unsealed) = writer.seal(number) {
                            lend(0);
                            writer = unsealed.writer;
                        }
                        for number in [number, number.wrapping_sub(3), (number + ROUNDS) % (THREADS * ROUNDS)] {
                            for client in [own, other] {
                                if let Some(view) = get(client, number) {
                                    assert_eq!(view.metadata(), number);
                                    views.push(view);
                                }
                            }
                        }
                        if round >= 5 {
                            while own.request_delete(&object(number - 5)).is_err() {
                                lend(0);
                            }
                        }
                        if views.len() > 40 {
                            for view in views.drain(..20) {
                                assert!(is_content(&view, view.metadata()));
                            }
                        }
                    }
                };
                if std::panic::catch_unwind(std::panic::AssertUnwindSafe(run)).is_err() {
                    failed.store(true, Ordering::Relaxed);
                }
            });
        }
        drop(ask);
        while let Ok((slot, bytes, reply)) = asked.recv() {
            for event in server.drain_rings() {
                assert!(!matches!(event, StoreEvent::Rejected { .. }), "{event:?}");
                if let StoreEvent::Published(published) = event {
                    // Half of the objects may be evicted at any time.
                    if published.metadata % 2 == 0 {
                        let _ = server.set_primary(&published.object, false);
                    }
                }
            }
            server.collect();
            server.evict_cache(20_000);
            let extent = if bytes == 0 {
                None
            } else {
                server.lend_extent(slot, bytes).ok()
            };
            let _ = reply.send(extent);
        }
    });
    assert!(!failed.load(Ordering::Relaxed));
    server.validate().unwrap();
    server.drain_rings();
    server.validate().unwrap();
    let rest: Vec<ObjectId> = server.objects().map(|entry| entry.object).collect();
    server.delete_many(&rest);
    for client in &clients {
        assert_eq!(server.forget_client(client.slot()).unwrap().pins_dropped, 0);
    }
    assert_eq!(server.ledger().free, server.ledger().capacity);
}
