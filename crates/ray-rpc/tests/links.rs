//! Links over Unix sockets: delivery, waiting threads, corking, closing, big frames, faults, descriptors.
#![cfg(not(loom))]

mod common;

use std::io::{Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use common::*;
use ray_rpc::frame::encode_prefix;
use ray_rpc::{CloseCause, CloseReason, Config, FaultAction, FaultPolicy, Link, RpcError, WaitOutcome, Waiter};

fn connect_pair(server: &Side, client: &Side, directory: &Directory) -> Arc<Link> {
    server.reactor.listen_unix(directory.socket()).unwrap();
    client.reactor.connect_unix(directory.socket()).unwrap()
}

#[test]
fn sync_calls_are_answered_and_their_rate_is_printed() {
    let directory = Directory::new();
    let server = Side::echo(Config::default());
    let client = Side::with(Config::default(), notifying());
    let link = connect_pair(&server, &client, &directory);
    let waiter = Waiter::new();
    link.set_user_data(Box::new(waiter.clone())).unwrap();
    let rounds = 2_000;
    let start = Instant::now();
    for round in 0..rounds {
        link.send(
            1,
            round,
            Bytes::from_static(b"header"),
            &[Bytes::from_static(b"payload")],
        )
        .unwrap();
        assert_eq!(
            client.reactor.wait(&waiter, Some(Instant::now() + LIMIT)),
            WaitOutcome::Notified
        );
    }
    println!("sync ping-pong: {:.0}/s", rounds as f64 / start.elapsed().as_secs_f64());
    assert_eq!(client.reactor.stats().frames_received, rounds);
    assert!(link.is_ready());
    assert_eq!(client.recorder.record.lock().unwrap().ready[0].1, b"hello");
    client.reactor.token_is_consistent();
}

#[test]
fn several_threads_wait_at_once_and_each_gets_its_answers() {
    let directory = Directory::new();
    let server = Side::echo(Config::default());
    let client = Side::with(Config::default(), notifying());
    server.reactor.listen_unix(directory.socket()).unwrap();
    client.reactor.start_background().unwrap();
    std::thread::scope(|scope| {
        for _ in 0..6 {
            scope.spawn(|| {
                let link = client.reactor.connect_unix(directory.socket()).unwrap();
                let waiter = Waiter::new();
                link.set_user_data(Box::new(waiter.clone())).unwrap();
                for round in 0..500 {
                    link.send(1, round, Bytes::new(), &[]).unwrap();
                    assert_eq!(
                        client.reactor.wait(&waiter, Some(Instant::now() + LIMIT)),
                        WaitOutcome::Notified
                    );
                }
            });
        }
    });
    assert_eq!(client.reactor.stats().frames_received, 3000);
}

#[test]
fn a_notification_from_another_thread_ends_a_leaders_sleep_and_a_deadline_does_too() {
    let side = Side::new(Config::default());
    let waiter = Waiter::new();
    std::thread::scope(|scope| {
        scope.spawn(|| {
            while side.reactor.stats().leader_sleeps == 0 {
                std::thread::yield_now();
            }
            waiter.notify();
        });
        assert_eq!(
            side.reactor.wait(&waiter, Some(Instant::now() + LIMIT)),
            WaitOutcome::Notified
        );
    });
    let start = Instant::now();
    assert_eq!(
        side.reactor.wait(&waiter, Some(start + Duration::from_millis(20))),
        WaitOutcome::TimedOut
    );
    assert!(start.elapsed() >= Duration::from_millis(20));
}

#[test]
fn a_follower_times_out_and_is_promoted_when_the_leader_leaves() {
    let directory = Directory::new();
    let server = Side::echo(Config::default());
    let client = Side::with(Config::default(), notifying());
    let link = connect_pair(&server, &client, &directory);
    let follower = Waiter::new();
    link.set_user_data(Box::new(follower.clone())).unwrap();
    let leader = Waiter::new();
    std::thread::scope(|scope| {
        let leading = scope.spawn(|| client.reactor.wait(&leader, Some(Instant::now() + LIMIT)));
        while client.reactor.stats().leader_sleeps == 0 {
            std::thread::yield_now();
        }
        let short = Instant::now() + Duration::from_millis(20);
        assert_eq!(client.reactor.wait(&follower, Some(short)), WaitOutcome::TimedOut);
        let following = scope.spawn(|| client.reactor.wait(&follower, Some(Instant::now() + LIMIT)));
        leader.notify();
        assert_eq!(leading.join().unwrap(), WaitOutcome::Notified);
        link.send(1, 1, Bytes::new(), &[]).unwrap();
        assert_eq!(
            following.join().unwrap(),
            WaitOutcome::Notified,
            "nobody but the follower can have served"
        );
    });
}

#[test]
fn the_background_thread_serves_while_the_user_thread_is_elsewhere() {
    let directory = Directory::new();
    let server = Side::echo(Config::default());
    let client = Side::served(Config::default());
    let link = connect_pair(&server, &client, &directory);
    for round in 0..50u64 {
        link.send(7, round, Bytes::new(), &[bytes(100)]).unwrap();
        // This thread does not touch the reactor: only the background thread can have received the answer.
        let frame = client.recorder.wait_for("an answer", |record| record.frames.pop());
        assert_eq!(
            (frame.1.kind, frame.1.correlation, &frame.1.payload),
            (7, round, &bytes(100))
        );
    }
    assert!(client.reactor.stats().background_wakeups > 0);
}

#[test]
fn quick_turns_arm_no_alarm_and_what_comes_after_them_is_served() {
    let directory = Directory::new();
    let server = Side::echo(Config::default());
    // A slow patrol, so that a busy machine's turns are quick beside it.
    let config = Config {
        patrol_us: 50_000,
        ..Config::default()
    };
    let client = Side::with(config, notifying());
    let link = connect_pair(&server, &client, &directory);
    client.reactor.start_background().unwrap();
    let waiter = Waiter::new();
    link.set_user_data(Box::new(waiter.clone())).unwrap();
    let rounds = 2_000;
    let before = client.reactor.stats().arms;
    for round in 0..rounds {
        link.send(1, round, Bytes::new(), &[]).unwrap();
        let outcome = client.reactor.wait(&waiter, Some(Instant::now() + LIMIT));
        assert_eq!(outcome, WaitOutcome::Notified);
    }
    let arms = client.reactor.stats().arms - before;
    assert!(arms < rounds / 2, "{arms} alarms in {rounds} quick turns");
    // From here on only the background thread serves: by its patrol first, then woken by the alarm.
    for round in rounds..rounds + 5 {
        link.send(1, round, Bytes::new(), &[]).unwrap();
        let limit = Instant::now() + LIMIT;
        while client.reactor.stats().frames_received <= round {
            assert!(Instant::now() < limit, "the answer to {round} was not served");
            std::thread::sleep(Duration::from_millis(1));
        }
        std::thread::sleep(Duration::from_millis(30));
    }
    client.reactor.token_is_consistent();
    assert!(client.reactor.stats().arms > before + arms, "the patrol ends");
}

#[test]
fn corked_frames_share_writes_and_leave_when_told() {
    let directory = Directory::new();
    let server = Side::served(Config::default());
    let client = Side::new(Config {
        cork_limit_us: 10_000_000,
        ..Config::default()
    });
    let link = connect_pair(&server, &client, &directory);
    let before = client.reactor.stats().writes;
    link.cork();
    for number in 0..1000 {
        link.send(1, number, Bytes::from_static(b"0123456789"), &[]).unwrap();
    }
    assert_eq!(
        client.reactor.stats().writes,
        before,
        "1000 frames of 30 bytes stay below the cork limit"
    );
    assert!(link.queued_bytes() >= 30_000);
    link.uncork();
    let writes = client.reactor.stats().writes - before;
    assert!(writes <= 3, "{writes} writes for 1000 corked frames");
    server
        .recorder
        .wait_for("all frames", |record| (record.frames.len() == 1000).then_some(()));
    let record = server.recorder.record.lock().unwrap();
    assert!(record
        .frames
        .iter()
        .enumerate()
        .all(|(index, (_, frame))| frame.correlation == index as u64));
}

#[test]
fn corked_frames_leave_by_size_by_waiting_and_by_the_background_thread() {
    let directory = Directory::new();
    let server = Side::served(Config::default());
    let client = Side::new(Config {
        cork_limit_us: 1000,
        ..Config::default()
    });
    let link = connect_pair(&server, &client, &directory);
    link.cork();
    link.send(1, 0, Bytes::new(), &[bytes(70_000)]).unwrap();
    server
        .recorder
        .wait_for("a frame over the limit", |record| record.frames.pop());
    link.send(1, 1, Bytes::new(), &[]).unwrap();
    assert!(link.queued_bytes() > 0);
    client.reactor.wait(&Waiter::new(), Some(Instant::now()));
    server
        .recorder
        .wait_for("a frame flushed by a wait", |record| record.frames.pop());
    client.reactor.start_background().unwrap();
    for number in 0..20 {
        link.send(1, number, Bytes::new(), &[]).unwrap();
        server
            .recorder
            .wait_for("a frame flushed by the background thread", |record| record.frames.pop());
    }
}

#[test]
fn big_payloads_cross_both_ways_at_once() {
    let directory = Directory::new();
    let server = Side::served(Config::default());
    let client = Side::served(Config::default());
    let link = connect_pair(&server, &client, &directory);
    let back = server
        .recorder
        .wait_for("a link", |record| record.links.first().cloned());
    let payload = bytes(64 << 20);
    link.send(1, 1, bytes(5000), &[payload.clone(), payload.slice(..1000)])
        .unwrap();
    back.send(2, 2, bytes(10), &[payload.slice(..100), payload.clone()])
        .unwrap();
    let (_, there) = server
        .recorder
        .wait_for("the payload there", |record| record.frames.pop());
    let (_, here) = client
        .recorder
        .wait_for("the payload back", |record| record.frames.pop());
    assert_eq!(there.header, bytes(5000));
    assert_eq!(there.payload.len(), payload.len() + 1000);
    assert!(there.payload[..payload.len()] == payload[..] && here.payload[100..] == payload[..]);
    assert_eq!((link.queued_bytes(), back.queued_bytes()), (0, 0));
}

#[test]
fn closing_sends_what_is_queued_and_reports_once_after_the_last_frame() {
    let directory = Directory::new();
    let server = Side::served(Config::default());
    let client = Side::served(Config::default());
    let link = connect_pair(&server, &client, &directory);
    for number in 0..200 {
        link.send(1, number, Bytes::new(), &[bytes(100_000)]).unwrap();
    }
    link.close(CloseReason::local("the test is over"));
    link.close(CloseReason::local("closed twice"));
    let error = link.send(1, 1, Bytes::new(), &[]).unwrap_err();
    assert!(
        matches!(&error, RpcError::LinkClosed { reason, .. } if reason == "the test is over"),
        "{error}"
    );
    assert_eq!(client.recorder.wait_closed(link.id()).sentence, "the test is over");
    let (count, reason) = server.recorder.wait_for("the close at the other end", |record| {
        record
            .closed
            .first()
            .map(|(_, reason)| (record.frames.len(), reason.clone()))
    });
    assert_eq!(count, 200, "the close came after the last frame");
    assert_eq!(reason.cause, CloseCause::PeerClosed);
    assert!(reason.sentence.contains("pid"), "{reason}");
    assert_eq!(client.recorder.record.lock().unwrap().closed.len(), 1);
    assert_eq!((client.reactor.link_count(), server.reactor.link_count()), (0, 0));
}

#[test]
fn handlers_may_send_connect_and_close() {
    let directory = Directory::new();
    let server = Side::echo(Config::default());
    server.reactor.listen_unix(directory.socket()).unwrap();
    let client = Side::new(Config::default());
    let reactor = Arc::clone(&client.reactor);
    let path = directory.socket();
    let connects = AtomicUsize::new(0);
    let _ = client.recorder.on_frame.set(Box::new(move |link, frame| {
        if connects.fetch_add(1, Ordering::Relaxed) < 5 {
            let next = reactor.connect_unix(&path).unwrap();
            next.send(1, frame.correlation + 1, Bytes::new(), &[]).unwrap();
        }
        link.close(CloseReason::local("answered"));
        true
    }));
    client.reactor.start_background().unwrap();
    client
        .reactor
        .connect_unix(directory.socket())
        .unwrap()
        .send(1, 0, Bytes::new(), &[])
        .unwrap();
    client
        .recorder
        .wait_for("six closes", |record| (record.closed.len() == 6).then_some(()));
}

fn raw_after_hello(server: &Side, directory: &Directory) -> UnixStream {
    server.reactor.listen_unix(directory.socket()).unwrap();
    let mut stream = UnixStream::connect(directory.socket()).unwrap();
    stream.write_all(&encode_prefix(0, 0x8000, 0, 8, 24)).unwrap();
    stream.write_all(b"HELI\x01\x00\x01\x00").unwrap();
    server
        .recorder
        .wait_for("a Hello", |record| (!record.ready.is_empty()).then_some(()));
    stream
}

fn only_close(server: &Side) -> CloseReason {
    server.recorder.wait_for("a close", |record| {
        record.closed.first().map(|(_, reason)| reason.clone())
    })
}

#[test]
fn garbage_before_the_hello_closes_with_a_sentence() {
    let directory = Directory::new();
    let server = Side::served(Config::default());
    server.reactor.listen_unix(directory.socket()).unwrap();
    for garbage in [
        &b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n"[..],
        &[0xff; 100],
        &[0; 100],
    ] {
        let mut stream = UnixStream::connect(directory.socket()).unwrap();
        stream.write_all(garbage).unwrap();
        let (id, reason) = server.recorder.wait_for("a close", |record| record.closed.pop());
        assert_eq!(reason.cause, CloseCause::Protocol, "{id} {reason}");
        assert!(reason.sentence.contains("broke the protocol"), "{reason}");
        let mut rest = Vec::new();
        let _ = stream.read_to_end(&mut rest);
    }
    let mut stream = UnixStream::connect(directory.socket()).unwrap();
    stream.write_all(&encode_prefix(0, 0x8000, 0, 8, 24)).unwrap();
    stream.write_all(b"HELI\x07\x00\x09\x00").unwrap();
    let (_, reason) = server.recorder.wait_for("a close", |record| record.closed.pop());
    assert!(reason.sentence.contains("versions 7 to 9"), "{reason}");
    assert!(server.recorder.record.lock().unwrap().frames.is_empty());
}

#[test]
fn oversized_frames_close_with_a_sentence() {
    let directory = Directory::new();
    let server = Side::served(Config {
        frame_limit_bytes: 10_000,
        ..Config::default()
    });
    let mut stream = raw_after_hello(&server, &directory);
    stream.write_all(&encode_prefix(1, 0, 0, 0, 10_001)).unwrap();
    assert!(only_close(&server)
        .sentence
        .contains("a frame of 10001 bytes exceeds the limit of 10000 bytes"));
}

#[test]
fn truncated_frames_close_with_a_sentence() {
    let directory = Directory::new();
    let server = Side::served(Config::default());
    let mut stream = raw_after_hello(&server, &directory);
    stream.write_all(&encode_prefix(1, 0, 0, 4, 100)).unwrap();
    stream.write_all(b"head and some").unwrap();
    drop(stream);
    let reason = only_close(&server);
    assert!(
        reason.sentence.contains("in the middle of a frame, 33 of 104 bytes"),
        "{reason}"
    );
}

#[test]
fn a_header_longer_than_its_frame_closes_with_a_sentence() {
    let directory = Directory::new();
    let server = Side::served(Config::default());
    let mut stream = raw_after_hello(&server, &directory);
    // A good frame ahead of it is delivered first.
    stream.write_all(&encode_prefix(9, 0, 5, 0, 16)).unwrap();
    stream.write_all(&encode_prefix(1, 0, 0, 85, 100)).unwrap();
    let reason = only_close(&server);
    assert!(
        reason.sentence.contains("a header of 85 bytes does not fit"),
        "{reason}"
    );
    assert_eq!(server.recorder.record.lock().unwrap().frames[0].1.kind, 9);
}

#[test]
fn a_frame_over_the_limit_is_refused_to_its_sender() {
    let directory = Directory::new();
    let server = Side::served(Config::default());
    let client = Side::served(Config {
        frame_limit_bytes: 1000,
        ..Config::default()
    });
    let link = connect_pair(&server, &client, &directory);
    let error = link.send(1, 1, Bytes::new(), &[bytes(1000)]).unwrap_err();
    assert!(error.to_string().contains("exceeds the limit of 1000 bytes"), "{error}");
    link.send(1, 2, Bytes::new(), &[bytes(900)]).unwrap();
    server
        .recorder
        .wait_for("the allowed frame", |record| record.frames.pop());
}

#[test]
fn silence_instead_of_a_hello_closes() {
    let directory = Directory::new();
    let server = Side::served(Config {
        hello_timeout: Duration::from_millis(50),
        ..Config::default()
    });
    server.reactor.listen_unix(directory.socket()).unwrap();
    let _stream = UnixStream::connect(directory.socket()).unwrap();
    let reason = only_close(&server);
    assert_eq!(reason.cause, CloseCause::Timeout);
    assert!(reason.sentence.contains("did not say Hello"), "{reason}");
}

#[test]
fn descriptors_travel_with_their_frames() {
    let directory = Directory::new();
    let server = Side::served(Config::default());
    let client = Side::served(Config::default());
    let link = connect_pair(&server, &client, &directory);
    link.cork();
    let mut ends = Vec::new();
    for number in 0..20u64 {
        let (here, there) = UnixStream::pair().unwrap();
        ends.push(here);
        link.send(1, number, bytes(3000), &[bytes(20_000)]).unwrap();
        link.send_with_descriptor(2, number, bytes(10), OwnedFd::from(there))
            .unwrap();
    }
    link.uncork();
    let frames = server.recorder.wait_for("the frames", |record| {
        (record.frames.len() == 40).then(|| std::mem::take(&mut record.frames))
    });
    for (_, frame) in frames {
        if frame.kind == 1 {
            assert!(frame.descriptor.is_none());
            continue;
        }
        let mut stream = UnixStream::from(frame.descriptor.unwrap());
        stream.write_all(&[frame.correlation as u8]).unwrap();
        let mut byte = [0];
        ends[frame.correlation as usize].read_exact(&mut byte).unwrap();
        assert_eq!(byte[0], frame.correlation as u8);
    }
}

#[test]
fn a_frame_that_announces_a_missing_descriptor_closes() {
    let directory = Directory::new();
    let server = Side::served(Config::default());
    let mut stream = raw_after_hello(&server, &directory);
    stream.write_all(&encode_prefix(1, 1, 0, 0, 16)).unwrap();
    assert!(only_close(&server)
        .sentence
        .contains("announces a descriptor, and none came"));
}

#[test]
fn a_truncated_control_message_closes_with_a_sentence() {
    use rustix::net::{sendmsg, SendAncillaryBuffer, SendAncillaryMessage, SendFlags};
    let directory = Directory::new();
    let server = Side::served(Config::default());
    let stream = raw_after_hello(&server, &directory);
    let (one, _other) = UnixStream::pair().unwrap();
    let descriptors = [one.as_fd(); 16];
    let mut space = [std::mem::MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(16))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    assert!(control.push(SendAncillaryMessage::ScmRights(&descriptors)));
    let frame = encode_prefix(1, 1, 0, 0, 16);
    sendmsg(
        &stream,
        &[std::io::IoSlice::new(&frame)],
        &mut control,
        SendFlags::empty(),
    )
    .unwrap();
    assert!(only_close(&server).sentence.contains("control message was truncated"));
}

struct ByKind;

impl FaultPolicy for ByKind {
    fn on_send(&self, _link: &Link, kind: u16) -> FaultAction {
        match kind {
            1 => FaultAction::Drop,
            2 => FaultAction::Delay(Duration::from_millis(30)),
            3 => FaultAction::Close("the fault policy cut the link".into()),
            _ => FaultAction::Deliver,
        }
    }
}

#[test]
fn faults_drop_delay_and_close() {
    let directory = Directory::new();
    let server = Side::served(Config::default());
    let client = Side::served(Config {
        faults: Some(Arc::new(ByKind)),
        ..Config::default()
    });
    let link = connect_pair(&server, &client, &directory);
    client.recorder.wait_ready(link.id());
    let start = Instant::now();
    for kind in [0, 1, 2, 4] {
        link.send(kind, 0, Bytes::new(), &[]).unwrap();
    }
    let kinds: Vec<u16> = server.recorder.wait_for("three frames", |record| {
        (record.frames.len() == 3).then(|| record.frames.iter().map(|(_, frame)| frame.kind).collect())
    });
    assert_eq!(kinds, [0, 2, 4], "a delay keeps order");
    assert!(start.elapsed() >= Duration::from_millis(30));
    link.send(3, 0, Bytes::new(), &[]).unwrap();
    let reason = client.recorder.wait_closed(link.id());
    assert_eq!(
        (reason.cause, reason.sentence.as_str()),
        (CloseCause::Fault, "the fault policy cut the link")
    );
}

#[test]
fn wakes_timers_and_watched_descriptors_reach_the_service() {
    let side = Side::new(Config::default());
    let (mut here, there) = UnixStream::pair().unwrap();
    there.set_nonblocking(true).unwrap();
    let reading = there.try_clone().unwrap();
    let _ = side.recorder.on_descriptor.set(Box::new(move |_| {
        let mut buffer = [0; 16];
        let _ = (&reading).read(&mut buffer);
    }));
    let again = AtomicBool::new(true);
    let _ = side.recorder.on_timer.set(Box::new(move |now| {
        again
            .swap(false, Ordering::Relaxed)
            .then(|| now + Duration::from_millis(5))
    }));
    side.reactor.start_background().unwrap();
    side.reactor.wake();
    side.recorder
        .wait_for("a wake", |record| (record.wakes > 0).then_some(()));
    side.reactor.request_timer(Instant::now() + Duration::from_millis(5));
    side.recorder
        .wait_for("two timer calls", |record| (record.timers == 2).then_some(()));
    side.reactor.watch_descriptor(there.as_fd(), 42).unwrap();
    here.write_all(b"x").unwrap();
    side.recorder.wait_for("a readable descriptor", |record| {
        record.descriptors.contains(&42).then_some(())
    });
    side.reactor.unwatch_descriptor(42);
    let seen = side.recorder.record.lock().unwrap().descriptors.len();
    here.write_all(b"x").unwrap();
    side.reactor.wake();
    side.recorder
        .wait_for("another wake", |record| (record.wakes > 1).then_some(()));
    assert_eq!(side.recorder.record.lock().unwrap().descriptors.len(), seen);
}

#[test]
fn a_daemon_runs_on_its_main_thread_until_stopped() {
    let directory = Directory::new();
    let daemon = Side::new(Config::default());
    let _ = daemon.recorder.on_frame.set(Box::new(echo_frame));
    daemon.reactor.listen_unix(directory.socket()).unwrap();
    let client = Side::served(Config::default());
    std::thread::scope(|scope| {
        let running = scope.spawn(|| daemon.reactor.run());
        let link = client.reactor.connect_unix(directory.socket()).unwrap();
        link.send(1, 5, Bytes::new(), &[]).unwrap();
        client.recorder.wait_for("an answer", |record| record.frames.pop());
        daemon.reactor.stop();
        running.join().unwrap();
        assert_eq!(client.recorder.wait_closed(link.id()).cause, CloseCause::PeerClosed);
    });
    assert_eq!(daemon.reactor.link_count(), 0);
    assert_eq!(
        daemon.recorder.record.lock().unwrap().closed.len(),
        1,
        "stopping reports every link"
    );
    assert!(matches!(
        daemon.reactor.connect_unix(directory.socket()),
        Err(RpcError::Stopped)
    ));
}

#[test]
fn stopping_ends_every_wait() {
    let side = Side::served(Config::default());
    std::thread::scope(|scope| {
        let waits: Vec<_> = (0..3)
            .map(|_| scope.spawn(|| side.reactor.wait(&Waiter::new(), Some(Instant::now() + LIMIT))))
            .collect();
        while side.reactor.stats().leader_sleeps == 0 {
            std::thread::yield_now();
        }
        side.reactor.stop();
        for wait in waits {
            assert_eq!(wait.join().unwrap(), WaitOutcome::Stopped);
        }
    });
}

#[test]
fn long_socket_paths_work() {
    let directory = Directory::new();
    let deep = directory.0.join("d".repeat(100)).join("e".repeat(100));
    std::fs::create_dir_all(&deep).unwrap();
    let server = Side::echo(Config::default());
    let client = Side::served(Config::default());
    server.reactor.listen_unix(deep.join("socket")).unwrap();
    let link = client.reactor.connect_unix(deep.join("socket")).unwrap();
    link.send(1, 1, Bytes::new(), &[]).unwrap();
    client.recorder.wait_for("an answer", |record| record.frames.pop());
}

#[test]
fn a_panicking_handler_closes_its_link_and_the_others_are_served_on() {
    let directory = Directory::new();
    let server = Side::new(Config::default());
    let _ = server.recorder.on_frame.set(Box::new(|link, frame| {
        assert!(frame.kind != 13, "a planted panic");
        echo_frame(link, frame)
    }));
    server.reactor.start_background().unwrap();
    let client = Side::served(Config::default());
    let unlucky = connect_pair(&server, &client, &directory);
    let other = client.reactor.connect_unix(directory.socket()).unwrap();
    unlucky.send(13, 0, Bytes::new(), &[]).unwrap();
    client.recorder.wait_closed(unlucky.id());
    assert!(only_close(&server)
        .sentence
        .contains("a handler of this process panicked"));
    other.send(1, 1, Bytes::new(), &[]).unwrap();
    client
        .recorder
        .wait_for("an answer after the panic", |record| record.frames.pop());
}

/// Threads that wait, wait with deadlines, poll and are in user code at random, all at once: every answer is delivered,
/// whoever leads at that moment.
#[test]
fn no_answer_is_lost_between_leaders() {
    let directory = Directory::new();
    let server = Side::echo(Config::default());
    let client = Side::with(Config::default(), Recorder::default());
    let _ = client.recorder.on_frame.set(Box::new(|link, _| {
        let (answers, waiter) = link.user_data_as::<(AtomicUsize, Waiter)>().unwrap();
        answers.fetch_add(1, Ordering::SeqCst);
        waiter.notify();
        true
    }));
    server.reactor.listen_unix(directory.socket()).unwrap();
    client.reactor.start_background().unwrap();
    std::thread::scope(|scope| {
        for thread in 0..5u64 {
            let (client, directory) = (&client, &directory);
            scope.spawn(move || {
                let waiter = Waiter::new();
                let link = client
                    .reactor
                    .connect_unix_with(directory.socket(), |link| {
                        link.set_user_data(Box::new((AtomicUsize::new(0), waiter.clone())))
                            .unwrap();
                    })
                    .unwrap();
                let (answers, _) = link.user_data_as::<(AtomicUsize, Waiter)>().unwrap();
                let mut random = thread + 1;
                for round in 1..=1500 {
                    random = random
                        .wrapping_mul(6_364_136_223_846_793_005)
                        .wrapping_add(1_442_695_040_888_963_407);
                    link.send(1, round, Bytes::new(), &[]).unwrap();
                    let limit = Instant::now() + LIMIT;
                    while answers.load(Ordering::SeqCst) < round as usize {
                        assert!(
                            Instant::now() < limit,
                            "an answer is lost: {:?}",
                            client.reactor.stats()
                        );
                        match random >> 61 {
                            0 => drop(client.reactor.poll()),
                            1 => std::thread::yield_now(),
                            2 => drop(
                                client
                                    .reactor
                                    .wait(&waiter, Some(Instant::now() + Duration::from_micros(50))),
                            ),
                            _ => drop(client.reactor.wait(&waiter, Some(limit))),
                        }
                    }
                }
            });
        }
    });
    client.reactor.token_is_consistent();
}

#[test]
fn an_idle_process_sleeps() {
    let directory = Directory::new();
    let server = Side::echo(Config::default());
    let client = Side::served(Config::default());
    let link = connect_pair(&server, &client, &directory);
    link.cork();
    for round in 0..100 {
        link.send(1, round, Bytes::new(), &[]).unwrap();
    }
    client
        .recorder
        .wait_for("all answers", |record| (record.frames.len() == 100).then_some(()));
    // The cork ticks end by themselves: two looks a moment apart see the same counters.
    let limit = Instant::now() + LIMIT;
    loop {
        let before = (client.reactor.stats(), server.reactor.stats());
        std::thread::sleep(Duration::from_millis(50));
        if before == (client.reactor.stats(), server.reactor.stats()) {
            break;
        }
        assert!(
            Instant::now() < limit,
            "an idle process does not come to rest: {:?}",
            client.reactor.stats()
        );
    }
}

/// A service that stops its own reactor from a handler, on whichever thread that runs.
#[test]
fn a_handler_may_stop_the_reactor() {
    for background in [true, false] {
        let directory = Directory::new();
        let server = Side::echo(Config::default());
        server.reactor.listen_unix(directory.socket()).unwrap();
        let client = Side::new(Config::default());
        let reactor = Arc::downgrade(&client.reactor);
        let _ = client.recorder.on_frame.set(Box::new(move |_, _| {
            if let Some(reactor) = reactor.upgrade() {
                reactor.stop();
            }
            true
        }));
        if background {
            client.reactor.start_background().unwrap();
        }
        let link = client.reactor.connect_unix(directory.socket()).unwrap();
        link.send(1, 1, Bytes::new(), &[]).unwrap();
        if !background {
            let outcome = client.reactor.wait(&Waiter::new(), Some(Instant::now() + LIMIT));
            assert_eq!(outcome, WaitOutcome::Stopped);
        }
        client.recorder.wait_closed(link.id());
        assert_eq!(client.reactor.link_count(), 0);
    }
}

/// A leader and a follower both come out of their sleep when a handler ran on their thread, as the caller needs it to
/// answer Ctrl-C.
#[test]
fn a_signal_interrupts_leaders_and_followers() {
    extern "C" fn nothing(_signal: libc::c_int) {}
    // SAFETY: a zeroed sigaction is a valid one with an empty mask and no flags (so without SA_RESTART), and the handler
    // does nothing at all.
    unsafe {
        let mut action: libc::sigaction = std::mem::zeroed();
        action.sa_sigaction = nothing as *const () as usize;
        assert_eq!(libc::sigaction(libc::SIGUSR1, &action, std::ptr::null_mut()), 0);
    }
    let side = Side::new(Config::default());
    std::thread::scope(|scope| {
        let wait = || {
            let (sender, receiver) = std::sync::mpsc::channel();
            let reactor = &side.reactor;
            let waiting = scope.spawn(move || {
                // SAFETY: only asks for the calling thread's own handle.
                sender.send(unsafe { libc::pthread_self() }).unwrap();
                reactor.wait(&Waiter::new(), Some(Instant::now() + LIMIT))
            });
            (receiver.recv().unwrap(), waiting)
        };
        let (leader, leading) = wait();
        while side.reactor.stats().leader_sleeps == 0 {
            std::thread::yield_now();
        }
        let (follower, following) = wait();
        for (thread, waiting) in [(follower, following), (leader, leading)] {
            // A signal in the moment before the sleep is not seen by it, so it is sent until it is.
            while !waiting.is_finished() {
                // SAFETY: the thread was not joined yet, so its handle is valid.
                unsafe { libc::pthread_kill(thread, libc::SIGUSR1) };
                std::thread::sleep(Duration::from_millis(1));
            }
            assert_eq!(waiting.join().unwrap(), WaitOutcome::Interrupted);
        }
    });
}
