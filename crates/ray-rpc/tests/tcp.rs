//! TCP links: the challenge, wrong tokens, garbage, silence, floods, hand-over of a socket to another process.
#![cfg(not(loom))]

mod common;

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use common::*;
use ray_ids::{NodeId, WorkerId};
use ray_rpc::{AuthToken, CloseCause, CloseReason, Config, Link, Peer, RpcError, Target, WaitOutcome, Waiter};

fn token() -> AuthToken {
    AuthToken::new(&b"a secret of the cluster"[..]).unwrap()
}

fn loopback() -> SocketAddr {
    "127.0.0.1:0".parse().unwrap()
}

fn listen(side: &Side, node: NodeId) -> SocketAddr {
    side.reactor
        .listen_tcp(loopback(), Target::raylet(node), token())
        .unwrap()
}

fn quick() -> Config {
    Config {
        handshake_timeout: Duration::from_millis(200),
        ..Config::default()
    }
}

#[track_caller]
fn wait_for_refusals(side: &Side, count: u64) {
    let limit = Instant::now() + LIMIT;
    while side.reactor.stats().handshakes_refused < count {
        assert!(
            Instant::now() < limit,
            "waited for {count} refusals, there are {:?}",
            side.reactor.stats()
        );
        std::thread::sleep(Duration::from_millis(1));
    }
}

#[test]
fn a_proven_peer_becomes_a_link_and_early_frames_arrive_in_order() {
    let node = NodeId::from_random();
    let server = Side::served(Config::default());
    let client = Side::with(Config::default(), notifying());
    for wanted in [node, NodeId::NIL] {
        let address = listen(&server, node);
        let link = client
            .reactor
            .connect_tcp(address, Target::raylet(wanted), token())
            .unwrap();
        for number in 0..10 {
            link.send(1, number, Bytes::new(), &[bytes(200_000)]).unwrap();
        }
        assert!(!link.is_ready());
        let served = Waiter::new();
        let limit = Instant::now() + LIMIT;
        while server.recorder.record.lock().unwrap().frames.len() < 10 {
            // The client has no background thread: it serves its links itself.
            client
                .reactor
                .wait(&served, Some(Instant::now() + Duration::from_millis(5)));
            assert!(Instant::now() < limit);
        }
        let record = &mut server.recorder.record.lock().unwrap();
        let frames = std::mem::take(&mut record.frames);
        assert!(frames
            .iter()
            .enumerate()
            .all(|(index, (_, frame))| frame.correlation == index as u64));
        assert!(frames.iter().all(|(_, frame)| frame.payload == bytes(200_000)));
        assert!(matches!(link.peer(), Peer::Tcp { address: there, .. } if *there == address));
    }
}

#[test]
fn sync_calls_over_tcp() {
    let server = Side::echo(Config::default());
    let client = Side::with(Config::default(), notifying());
    let node = NodeId::from_random();
    let address = listen(&server, node);
    let waiter = Waiter::new();
    let link = client
        .reactor
        .connect_tcp_with(address, Target::raylet(node), token(), |link| {
            link.set_user_data(Box::new(waiter.clone())).unwrap();
        })
        .unwrap();
    let start = Instant::now();
    for round in 0..1000 {
        link.send(1, round, Bytes::new(), &[]).unwrap();
        assert_eq!(
            client.reactor.wait(&waiter, Some(Instant::now() + LIMIT)),
            WaitOutcome::Notified
        );
    }
    println!(
        "sync ping-pong over TCP: {:.0}/s",
        1000.0 / start.elapsed().as_secs_f64()
    );
}

#[test]
fn a_wrong_token_is_refused_at_both_ends() {
    let node = NodeId::from_random();
    let server = Side::served(Config::default());
    let client = Side::served(Config::default());
    let address = listen(&server, node);
    let wrong = AuthToken::new(&b"a guess"[..]).unwrap();
    let link = client
        .reactor
        .connect_tcp(address, Target::raylet(node), wrong)
        .unwrap();
    let reason = client.recorder.wait_closed(link.id());
    assert_eq!(reason.cause, CloseCause::Authentication);
    assert!(reason.sentence.contains("the cluster tokens differ"), "{reason}");
    assert!(reason.sentence.contains(&address.to_string()), "{reason}");
    wait_for_refusals(&server, 1);
    let record = server.recorder.record.lock().unwrap();
    assert!(
        record.ready.is_empty() && record.closed.is_empty(),
        "the stranger never was a link"
    );
    assert!(matches!(
        link.send(1, 1, Bytes::new(), &[]),
        Err(RpcError::LinkClosed { .. })
    ));
}

#[test]
fn another_node_at_the_address_is_refused() {
    let server = Side::served(Config::default());
    let client = Side::served(Config::default());
    let address = listen(&server, NodeId::from_random());
    let link = client
        .reactor
        .connect_tcp(address, Target::raylet(NodeId::from_random()), token())
        .unwrap();
    let reason = client.recorder.wait_closed(link.id());
    assert!(reason.sentence.contains("was wanted"), "{reason}");
}

#[test]
fn nobody_listening_and_silent_listeners_close_with_sentences() {
    let client = Side::served(quick());
    let listener = TcpListener::bind(loopback()).unwrap();
    let silent = listener.local_addr().unwrap();
    let gone = TcpListener::bind(loopback()).unwrap().local_addr().unwrap();
    let target = Target::raylet(NodeId::NIL);
    let to_silent = client.reactor.connect_tcp(silent, target, token()).unwrap();
    let reason = client.recorder.wait_closed(to_silent.id());
    assert_eq!(reason.cause, CloseCause::Timeout);
    assert!(reason.sentence.contains("did not complete the challenge"), "{reason}");
    match client.reactor.connect_tcp(gone, target, token()) {
        Ok(link) => assert!(client.recorder.wait_closed(link.id()).sentence.contains("refused")),
        Err(error) => assert!(error.to_string().contains("refused"), "{error}"),
    }
}

#[test]
fn garbage_and_silence_are_turned_away_and_the_listener_lives_on() {
    let node = NodeId::from_random();
    let server = Side::served(quick());
    let address = listen(&server, node);
    let mut garbage = TcpStream::connect(address).unwrap();
    garbage.write_all(&[b'x'; 500]).unwrap();
    let mut http = TcpStream::connect(address).unwrap();
    http.write_all(
        format!(
            "GET / HTTP/1.1\r\nHost: {address}\r\nUser-Agent: {}\r\n\r\n",
            "a".repeat(100)
        )
        .as_bytes(),
    )
    .unwrap();
    let mut silent = TcpStream::connect(address).unwrap();
    let mut hung_up = TcpStream::connect(address).unwrap();
    hung_up.write_all(b"HLA1").unwrap();
    drop(hung_up);
    wait_for_refusals(&server, 4);
    let mut rest = Vec::new();
    silent.set_read_timeout(Some(LIMIT)).unwrap();
    assert_eq!(
        silent.read_to_end(&mut rest).unwrap(),
        0,
        "the silent stranger is cut off without a word"
    );
    let client = Side::served(Config::default());
    let link = client
        .reactor
        .connect_tcp(address, Target::raylet(node), token())
        .unwrap();
    client.recorder.wait_ready(link.id());
    assert_eq!(server.reactor.link_count(), 1);
}

#[test]
fn a_flood_of_half_open_strangers_is_capped_and_passes() {
    let node = NodeId::from_random();
    let server = Side::served(Config {
        max_half_open: 8,
        ..quick()
    });
    let address = listen(&server, node);
    let strangers: Vec<_> = (0..40).map(|_| TcpStream::connect(address).unwrap()).collect();
    wait_for_refusals(&server, 40);
    drop(strangers);
    let client = Side::served(Config::default());
    let link = client
        .reactor
        .connect_tcp(address, Target::raylet(node), token())
        .unwrap();
    client.recorder.wait_ready(link.id());
}

#[test]
fn a_flood_of_silent_strangers_shuts_nobody_out() {
    let node = NodeId::from_random();
    let server = Side::served(Config {
        max_half_open: 8,
        handshake_timeout: Duration::from_secs(3_600),
        ..Config::default()
    });
    let address = listen(&server, node);
    let mut strangers: Vec<_> = (0..40).map(|_| TcpStream::connect(address).unwrap()).collect();
    // The oldest had to go, one for each beyond the limit.
    wait_for_refusals(&server, 32);
    for stranger in &mut strangers[..32] {
        stranger.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
        assert_eq!(stranger.read(&mut [0; 1]).unwrap(), 0);
    }
    for stranger in &mut strangers[32..] {
        stranger.set_nonblocking(true).unwrap();
        let error = stranger.read(&mut [0; 1]).unwrap_err();
        assert_eq!(error.kind(), std::io::ErrorKind::WouldBlock);
    }
    let client = Side::served(Config::default());
    let link = client
        .reactor
        .connect_tcp(address, Target::raylet(node), token())
        .unwrap();
    client.recorder.wait_ready(link.id());
    wait_for_refusals(&server, 33);
}

#[test]
fn a_tcp_link_carries_no_descriptors() {
    let node = NodeId::from_random();
    let server = Side::served(Config::default());
    let client = Side::served(Config::default());
    let address = listen(&server, node);
    let link = client
        .reactor
        .connect_tcp(address, Target::raylet(node), token())
        .unwrap();
    let descriptor = std::fs::File::open("/dev/null").unwrap().into();
    assert!(matches!(
        link.send_with_descriptor(1, 1, Bytes::new(), descriptor),
        Err(RpcError::DescriptorOverTcp { .. })
    ));
}

/// The raylet accepts, proves and hands the socket to the worker over their Unix link; early frames of the client, sent
/// before anybody adopted the socket, reach the worker and nobody else.
#[test]
fn a_stranger_is_handed_over_with_its_first_bytes_unread() {
    let directory = Directory::new();
    let node = NodeId::from_random();
    let worker_id = WorkerId::from_random();
    let raylet = Side::served(Config::default());
    let worker = Side::new(Config::default());
    let reactor = Arc::clone(&worker.reactor);
    let _ = worker.recorder.on_frame.set(Box::new(move |link: &Arc<Link>, frame| {
        if frame.kind != 77 {
            return echo_frame(link, frame);
        }
        let socket = frame.descriptor.as_ref().unwrap().try_clone().unwrap();
        reactor.adopt(socket).unwrap();
        true
    }));
    worker.reactor.start_background().unwrap();
    raylet.reactor.listen_unix(directory.socket()).unwrap();
    let address = listen(&raylet, node);
    worker.reactor.connect_unix(directory.socket()).unwrap();
    let to_worker = raylet
        .recorder
        .wait_for("the worker's link", |record| record.links.first().cloned());

    let client = Side::served(Config::default());
    let link = client
        .reactor
        .connect_tcp(
            address,
            Target {
                node,
                process: worker_id,
            },
            token(),
        )
        .unwrap();
    for number in 0..20 {
        link.send(5, number, Bytes::new(), &[bytes(50_000)]).unwrap();
    }
    let (socket, target) = raylet.recorder.wait_for("a stranger", |record| record.strangers.pop());
    assert_eq!(
        target,
        Target {
            node,
            process: worker_id
        }
    );
    to_worker.send_with_descriptor(77, 0, Bytes::new(), socket).unwrap();
    client
        .recorder
        .wait_for("all answers", |record| (record.frames.len() == 20).then_some(()));
    let record = client.recorder.record.lock().unwrap();
    assert!(record
        .frames
        .iter()
        .enumerate()
        .all(|(index, (_, frame))| frame.correlation == index as u64));
    assert!(
        raylet.recorder.record.lock().unwrap().frames.is_empty(),
        "the raylet saw not one byte of it"
    );
}

#[test]
fn a_local_close_over_tcp_loses_nothing_that_was_sent() {
    let node = NodeId::from_random();
    let server = Side::served(Config::default());
    let client = Side::served(Config::default());
    let address = listen(&server, node);
    let link = client
        .reactor
        .connect_tcp(address, Target::raylet(node), token())
        .unwrap();
    client.recorder.wait_ready(link.id());
    let back = server
        .recorder
        .wait_for("a link", |record| record.links.first().cloned());
    // The other end sends too, so that bytes lie unread here when we close; that must not reset the link.
    for number in 0..100 {
        link.send(1, number, Bytes::new(), &[bytes(30_000)]).unwrap();
        back.send(1, number, Bytes::new(), &[bytes(30_000)]).unwrap();
    }
    link.close(CloseReason::local("done"));
    let count = server
        .recorder
        .wait_for("the close", |record| record.closed.first().map(|_| record.frames.len()));
    assert_eq!(count, 100);
}
