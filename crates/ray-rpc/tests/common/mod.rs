//! What the tests of links share: a service that records, waiting for conditions, temporary directories.
#![allow(dead_code)]

use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::sync::{Arc, Condvar, Mutex, OnceLock};
use std::time::{Duration, Instant};

use bytes::Bytes;
use ray_rpc::{CloseReason, Config, Frame, Link, Reactor, Service, Target, Waiter};

/// No condition of a test takes longer than this, however busy the machine.
pub const LIMIT: Duration = Duration::from_secs(60);

#[derive(Debug, Default)]
pub struct Record {
    pub frames: Vec<(u64, Frame)>,
    pub ready: Vec<(u64, Vec<u8>)>,
    pub closed: Vec<(u64, CloseReason)>,
    pub strangers: Vec<(OwnedFd, Target)>,
    pub wakes: usize,
    pub timers: usize,
    pub descriptors: Vec<u64>,
    pub links: Vec<Arc<Link>>,
}

type OnFrame = Box<dyn Fn(&Arc<Link>, &Frame) -> bool + Send + Sync>;
type OnClosed = Box<dyn Fn(&Arc<Link>) + Send + Sync>;
type OnDescriptor = Box<dyn Fn(u64) + Send + Sync>;
type OnTimer = Box<dyn Fn(Instant) -> Option<Instant> + Send + Sync>;

/// Records what happens; `on_frame` may take a frame instead (true).
#[derive(Default)]
pub struct Recorder {
    pub record: Mutex<Record>,
    changed: Condvar,
    pub on_frame: OnceLock<OnFrame>,
    pub on_timer: OnceLock<OnTimer>,
    pub on_closed: OnceLock<OnClosed>,
    pub on_descriptor: OnceLock<OnDescriptor>,
}

impl Recorder {
    pub fn change(&self, change: impl FnOnce(&mut Record)) {
        change(&mut self.record.lock().unwrap());
        self.changed.notify_all();
    }

    /// Waits until the record satisfies the condition.
    #[track_caller]
    pub fn wait_for<T>(&self, what: &str, mut condition: impl FnMut(&mut Record) -> Option<T>) -> T {
        let limit = Instant::now() + LIMIT;
        let mut record = self.record.lock().unwrap();
        loop {
            if let Some(value) = condition(&mut record) {
                return value;
            }
            let left = limit.saturating_duration_since(Instant::now());
            assert!(!left.is_zero(), "waited {LIMIT:?} for {what}; there is {record:?}");
            record = self.changed.wait_timeout(record, left).unwrap().0;
        }
    }

    #[track_caller]
    pub fn wait_closed(&self, id: u64) -> CloseReason {
        self.wait_for("a close", |record| {
            record
                .closed
                .iter()
                .find(|(link, _)| *link == id)
                .map(|(_, reason)| reason.clone())
        })
    }

    #[track_caller]
    pub fn wait_ready(&self, id: u64) {
        self.wait_for("a Hello", |record| {
            record.ready.iter().any(|(link, _)| *link == id).then_some(())
        });
    }
}

impl Service for Recorder {
    fn on_frame(&self, link: &Arc<Link>, frame: Frame) {
        if self.on_frame.get().is_some_and(|handler| handler(link, &frame)) {
            return;
        }
        self.change(|record| record.frames.push((link.id(), frame)));
    }

    fn on_ready(&self, link: &Arc<Link>, peer_hello: &[u8]) {
        self.change(|record| {
            record.ready.push((link.id(), peer_hello.to_vec()));
            record.links.push(Arc::clone(link));
        });
    }

    fn on_closed(&self, link: &Arc<Link>, reason: &CloseReason) {
        if let Some(handler) = self.on_closed.get() {
            handler(link);
        }
        self.change(|record| {
            record.links.retain(|known| known.id() != link.id());
            record.closed.push((link.id(), reason.clone()));
        });
    }

    fn on_stranger(&self, socket: OwnedFd, target: Target) {
        self.change(|record| record.strangers.push((socket, target)));
    }

    fn on_wake(&self) {
        self.change(|record| record.wakes += 1);
    }

    fn on_timer(&self, now: Instant) -> Option<Instant> {
        self.change(|record| record.timers += 1);
        self.on_timer.get().and_then(|handler| handler(now))
    }

    fn on_descriptor_ready(&self, token: u64) {
        if let Some(handler) = self.on_descriptor.get() {
            handler(token);
        }
        self.change(|record| record.descriptors.push(token));
    }
}

/// A reactor with a recorder, stopped at the end of the test.
pub struct Side {
    pub reactor: Arc<Reactor>,
    pub recorder: Arc<Recorder>,
}

impl Side {
    pub fn new(config: Config) -> Self {
        Self::with(config, Recorder::default())
    }

    pub fn with(config: Config, recorder: Recorder) -> Self {
        let reactor = Reactor::new(config).unwrap();
        let recorder = Arc::new(recorder);
        reactor.set_service(recorder.clone()).unwrap();
        reactor.set_hello(b"hello".to_vec());
        Self { reactor, recorder }
    }

    /// A side whose background thread serves it.
    pub fn served(config: Config) -> Self {
        let side = Self::new(config);
        side.reactor.start_background().unwrap();
        side
    }

    /// A served side that answers every frame with the same frame.
    pub fn echo(config: Config) -> Self {
        let side = Self::new(config);
        let _ = side.recorder.on_frame.set(Box::new(echo_frame));
        side.reactor.start_background().unwrap();
        side
    }
}

impl Drop for Side {
    fn drop(&mut self) {
        self.reactor.stop();
    }
}

pub fn echo_frame(link: &Arc<Link>, frame: &Frame) -> bool {
    // The link may be closing already, and then nobody waits for the answer.
    let _ = link.send(
        frame.kind,
        frame.correlation,
        frame.header.clone(),
        std::slice::from_ref(&frame.payload),
    );
    true
}

/// A recorder that notifies the waiter hung on a link when a frame comes.
pub fn notifying() -> Recorder {
    let recorder = Recorder::default();
    let _ = recorder.on_frame.set(Box::new(|link, _| {
        if let Some(waiter) = link.user_data_as::<Waiter>() {
            waiter.notify();
        }
        true
    }));
    recorder
}

/// A directory that is removed when the test ends.
pub struct Directory(pub PathBuf);

impl Directory {
    pub fn new() -> Self {
        use std::sync::atomic::{AtomicU32, Ordering};
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let name = format!(
            "ray-rpc-{}-{}",
            std::process::id(),
            NEXT.fetch_add(1, Ordering::Relaxed)
        );
        let path = std::env::temp_dir().join(name);
        std::fs::create_dir(&path).unwrap();
        Self(path)
    }

    pub fn socket(&self) -> PathBuf {
        self.0.join("s")
    }
}

impl Drop for Directory {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

pub fn bytes(length: usize) -> Bytes {
    Bytes::from((0..length).map(|index| (index * 31 % 251) as u8).collect::<Vec<_>>())
}
