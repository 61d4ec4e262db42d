//! A raylet's end of a real link, for tests: sends messages, collects what comes, waits for conditions within a limit.

use std::collections::VecDeque;
use std::os::fd::OwnedFd;
use std::path::Path;
use std::sync::{Arc, Condvar, Mutex};
use std::time::{Duration, Instant};

use ray_rpc::{CloseReason, Config, Frame, Link, Reactor, Service};

/// No wait of a test takes longer, however busy the machine.
pub const LIMIT: Duration = Duration::from_secs(60);

#[derive(Default)]
struct Inbox {
    frames: VecDeque<Frame>,
    closed: bool,
}

#[derive(Default)]
struct Receiver {
    inbox: Mutex<Inbox>,
    changed: Condvar,
}

impl Service for Receiver {
    fn on_frame(&self, _link: &Arc<Link>, frame: Frame) {
        self.inbox.lock().unwrap().frames.push_back(frame);
        self.changed.notify_all();
    }

    fn on_ready(&self, _link: &Arc<Link>, _peer_hello: &[u8]) {}

    fn on_closed(&self, _link: &Arc<Link>, _reason: &CloseReason) {
        self.inbox.lock().unwrap().closed = true;
        self.changed.notify_all();
    }
}

/// One link.
pub struct Client {
    receiver: Arc<Receiver>,
    reactor: Arc<Reactor>,
    pub link: Arc<Link>,
}

impl Drop for Client {
    fn drop(&mut self) {
        self.reactor.stop();
    }
}

impl Client {
    fn with(open: impl FnOnce(&Arc<Reactor>) -> Arc<Link>) -> Self {
        let receiver = Arc::new(Receiver::default());
        let reactor = Reactor::new(Config {
            spin_us: 0,
            ..Config::default()
        })
        .unwrap();
        reactor.set_service(receiver.clone()).unwrap();
        let link = open(&reactor);
        reactor.start_background().unwrap();
        Self {
            receiver,
            reactor,
            link,
        }
    }

    /// Connects, as soon as somebody listens.
    pub fn connect(path: &Path) -> Self {
        let limit = Instant::now() + LIMIT;
        Self::with(|reactor| loop {
            match reactor.connect_unix(path) {
                Ok(link) => return link,
                Err(error) => assert!(Instant::now() < limit, "nobody listens on {}: {error}", path.display()),
            }
            std::thread::sleep(Duration::from_millis(5));
        })
    }

    /// Speaks over a socket that is connected already.
    pub fn over(socket: OwnedFd) -> Self {
        Self::with(|reactor| reactor.adopt(socket).unwrap())
    }

    /// Waits for a frame that `pick` picks; it and those before it are taken. None where the link closed first.
    pub fn wait<T>(&self, what: &str, mut pick: impl FnMut(&Frame) -> Option<T>) -> Option<T> {
        let limit = Instant::now() + LIMIT;
        let mut inbox = self.receiver.inbox.lock().unwrap();
        loop {
            while let Some(frame) = inbox.frames.pop_front() {
                if let Some(found) = pick(&frame) {
                    return Some(found);
                }
            }
            if inbox.closed {
                return None;
            }
            let left = limit.saturating_duration_since(Instant::now());
            assert!(!left.is_zero(), "waited {LIMIT:?} for {what}");
            inbox = self.receiver.changed.wait_timeout(inbox, left).unwrap().0;
        }
    }
}
