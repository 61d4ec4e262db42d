//! Measures links between two processes over a Unix socket: sync calls, corked one-way frames, bulk bytes.
//! `cargo run --release -p ray-rpc --example link_rates`
#![cfg(not(loom))]

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use ray_rpc::{CloseReason, Config, Frame, Link, Reactor, Service, Waiter};

const PING: u16 = 1;
const COUNT: u16 = 2;
const ASK: u16 = 3;

#[derive(Default)]
struct Peer {
    counted: AtomicU64,
    waiter: Waiter,
    serves: bool,
}

impl Service for Peer {
    fn on_frame(&self, link: &Arc<Link>, frame: Frame) {
        if !self.serves {
            self.waiter.notify();
        } else if frame.kind == COUNT {
            self.counted.fetch_add(1, Ordering::Relaxed);
        } else {
            let answer = if frame.kind == ASK {
                self.counted.load(Ordering::Relaxed)
            } else {
                frame.correlation
            };
            // A client that is gone needs no answer.
            let _ = link.send(frame.kind, answer, frame.header, &[]);
        }
    }

    fn on_ready(&self, _link: &Arc<Link>, _hello: &[u8]) {}

    fn on_closed(&self, _link: &Arc<Link>, _reason: &CloseReason) {
        if self.serves {
            std::process::exit(0);
        }
    }
}

fn main() -> Result<(), Box<dyn std::error::Error>> {
    if let Some(path) = std::env::args().nth(1) {
        let reactor = Reactor::new(Config::default())?;
        reactor.set_service(Arc::new(Peer {
            serves: true,
            ..Peer::default()
        }))?;
        reactor.listen_unix(&path)?;
        reactor.run();
        return Ok(());
    }
    let path = std::env::temp_dir().join(format!("link-rates-{}", std::process::id()));
    let mut server = std::process::Command::new(std::env::current_exe()?)
        .arg(&path)
        .spawn()?;
    let limit = Instant::now() + Duration::from_secs(10);
    while !path.exists() && Instant::now() < limit {
        std::thread::sleep(Duration::from_millis(1));
    }
    let reactor = Reactor::new(Config::default())?;
    let peer = Arc::new(Peer::default());
    reactor.set_service(peer.clone())?;
    reactor.start_background()?;
    let link = reactor.connect_unix(&path)?;
    std::fs::remove_file(&path)?;
    let wait = || {
        let outcome = reactor.wait(&peer.waiter, Some(Instant::now() + Duration::from_secs(30)));
        assert_eq!(outcome, ray_rpc::WaitOutcome::Notified, "the server answers");
    };
    for _ in 0..3 {
        let (rounds, before, start) = (50_000, reactor.stats(), Instant::now());
        for round in 0..rounds {
            link.send(PING, round, Bytes::from_static(b"a small header"), &[])?;
            wait();
        }
        let after = reactor.stats();
        println!(
            "sync ping-pong {:>9.0}/s   (reads {} polls {} sleeps {} background wake-ups {} spin misses {})",
            rounds as f64 / start.elapsed().as_secs_f64(),
            after.reads - before.reads,
            after.polls - before.polls,
            after.leader_sleeps - before.leader_sleeps,
            after.background_wakeups - before.background_wakeups,
            after.spin_misses - before.spin_misses,
        );
        let (frames, before, start) = (1_000_000u64, reactor.stats(), Instant::now());
        link.cork();
        for number in 0..frames {
            link.send(COUNT, number, Bytes::from_static(b"a small header"), &[])?;
        }
        let submitted = start.elapsed();
        link.uncork();
        link.send(ASK, 0, Bytes::new(), &[])?;
        wait();
        println!(
            "corked one-way {:>9.0}/s   (submitted at {:.0}/s, {} writes)",
            frames as f64 / start.elapsed().as_secs_f64(),
            frames as f64 / submitted.as_secs_f64(),
            reactor.stats().writes - before.writes,
        );
        let (megabytes, payload, start) = (1024, Bytes::from(vec![1; 16 << 20]), Instant::now());
        for _ in 0..megabytes / 16 {
            link.send(COUNT, 0, Bytes::new(), std::slice::from_ref(&payload))?;
        }
        link.send(ASK, 0, Bytes::new(), &[])?;
        wait();
        println!(
            "bulk           {:>9.0} MB/s",
            megabytes as f64 / start.elapsed().as_secs_f64()
        );
    }
    link.close(CloseReason::local("measured"));
    reactor.stop();
    server.wait()?;
    Ok(())
}
