//! A client is killed before each of its shared stores in turn, and the server must recover every byte.

use std::cell::RefCell;

use crate::store_tests::{attach, content, get, object, put, server};
use crate::sync::kill_switch;
use crate::*;

/// A life that does everything a client can do, with the server reading its rings now and then.
fn life(server: &RefCell<StoreServer>, client: &StoreClient) {
    let put = |number, size| put(&mut server.borrow_mut(), client, number, size).unwrap();
    put(1, 3000);
    put(2, 70_000);
    let early = get(client, 1).unwrap();
    server.borrow_mut().drain_rings();
    let late = get(client, 2).unwrap();
    let shared = late.clone();
    let unfinished = client.create(object(3), 5000).unwrap();
    drop(client.create(object(4), 600).unwrap());
    client.request_delete(&object(1)).unwrap();
    drop(late);
    server.borrow_mut().drain_rings();
    drop(early);
    server.borrow_mut().collect();
    put(5, 3000);
    drop(shared);
    client.request_delete(&object(5)).unwrap();
    server.borrow_mut().drain_rings();
    put(6, 600_000);
    let pinned = get(client, 6).unwrap();
    for extent in client.unused(10_000) {
        server.borrow_mut().give_back(client.slot(), extent).unwrap();
    }
    unfinished.seal(0).unwrap();
    drop(pinned);
    put(7, 100);
    let _kept_until_death = get(client, 7).unwrap();
}

#[test]
fn a_client_killed_at_any_store_is_undone() {
    let mut stores = 0;
    loop {
        let server = RefCell::new(server(3 << 20, 100));
        let client = attach(&mut server.borrow_mut());
        let witness = attach(&mut server.borrow_mut());
        put(&mut server.borrow_mut(), &witness, 50, 4000).unwrap();
        server.borrow_mut().drain_rings();
        let seen = get(&witness, 50).unwrap();
        let slot = client.slot();
        let lived = kill_switch::run(stores, || {
            // The client's own handles go with it, and store nothing once it is dead.
            let client = client;
            life(&server, &client);
            kill_switch::stops_store();
        });
        let mut server = server.into_inner();
        server.validate().unwrap();
        server.forget_client(slot).unwrap();
        server.validate().unwrap();

        // What it published is whole.
        let objects: Vec<ObjectEntry> = server.objects().copied().collect();
        for entry in &objects {
            let number = u32::from_le_bytes(entry.object.as_bytes()[24..].try_into().unwrap());
            if number != 3 {
                assert_eq!(
                    &server.read(&entry.object).unwrap()[..],
                    &content(number, entry.size)[..]
                );
            }
        }
        // What it held is free, and its successor finds a clean slot.
        let ledger = server.ledger();
        assert_eq!(
            (ledger.being_created, ledger.awaiting_unpin),
            (0, 0),
            "killed before store {stores}"
        );
        let successor = attach(&mut server);
        assert_eq!(successor.slot().number, slot.number);
        put(&mut server, &successor, 60, 1_200_000).unwrap();
        assert_eq!(&get(&successor, 60).unwrap()[..], &content(60, 1_200_000)[..]);
        assert_eq!(&seen[..], &content(50, 4000)[..]);
        drop(seen);
        server.drain_rings();
        let all: Vec<_> = server.objects().map(|entry| entry.object).collect();
        assert!(server
            .delete_many(&all)
            .iter()
            .all(|outcome| *outcome == DeleteOutcome::Deleted));
        for client in [&successor, &witness] {
            server.forget_client(client.slot()).unwrap();
        }
        assert_eq!(
            server.ledger().free,
            server.ledger().capacity,
            "killed before store {stores}"
        );
        server.validate().unwrap();
        if lived {
            break;
        }
        stores += 1;
    }
    assert!(stores > 100, "the life has only {stores} stores");
}
