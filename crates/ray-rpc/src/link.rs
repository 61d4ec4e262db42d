//! A link: ordered frames both ways between two processes.
//!
//! It owns the send queue and who writes it. Any thread sends; one writes at a time, and the others leave their frames in
//! the queue for it. It refuses frames once it is closing. Reading and the end of a link belong to the token's holder.
//!
//! Invariants:
//! 1. At most one thread writes (`writing`), and it leaves only when the queue is empty, the socket is full or dead.
//! 2. While the socket is full (`blocked`), its write readiness is watched, and nobody tries to write.
//! 3. The state moves Open → Closing → Closed only; the first reason stays.
//! 4. No lock of a link is held while user code runs.

use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, Weak};
use std::time::{Duration, Instant};

use bytes::Bytes;

use crate::config::{FaultAction, Peer, UserData};
use crate::error::{CloseCause, CloseReason, RpcError};
use crate::frame::{encode_prefix, FIXED_BYTES, FLAG_DESCRIPTOR, FLAG_INTERNAL, HELLO_MAGIC, KIND_HELLO, PREFIX_BYTES};
use crate::incoming::Incoming;
use crate::outgoing::{InFlight, SendQueue, WriteEnd};
use crate::reactor::Reactor;
use crate::stats::count;
use crate::sync::lock;

/// After this many writes in a row a sender leaves the rest to the thread that serves, so that it gets on with its work
/// however fast others send.
const WRITES_IN_A_ROW: u32 = 64;
/// How often a corked send looks at the clock.
const CORK_CLOCK_STRIDE: u32 = 8;

#[derive(Debug)]
pub(crate) enum State {
    Open,
    Closing(CloseReason),
    Closed(CloseReason),
}

#[derive(Debug)]
struct Outgoing {
    queue: SendQueue,
    state: State,
    corked: bool,
    writing: bool,
    blocked: bool,
    /// Nothing may be written yet: a TCP link that is not proven, or a fault's delay.
    held: bool,
    /// In the reactor's list of links with unsent frames, since then.
    dirty_since: Option<Instant>,
    sends_since_clock: u32,
}

/// A header, copied or shared.
#[derive(Clone, Copy)]
enum Header<'a> {
    Slice(&'a [u8]),
    Shared(&'a Bytes),
}

impl Header<'_> {
    fn len(self) -> usize {
        match self {
            Self::Slice(bytes) => bytes.len(),
            Self::Shared(bytes) => bytes.len(),
        }
    }
}

/// One link. Every method may be called from any thread.
pub struct Link {
    id: u64,
    peer: OnceLock<Peer>,
    description: OnceLock<String>,
    is_unix: bool,
    reactor: Weak<Reactor>,
    this: Weak<Link>,
    outgoing: Mutex<Outgoing>,
    inflight: Mutex<InFlight>,
    pub(crate) incoming: Mutex<Incoming>,
    queued_bytes: AtomicUsize,
    ready: AtomicBool,
    /// Whether what still arrives is delivered: not after a close from this side.
    delivers: AtomicBool,
    /// The socket ended or failed: what is still queued will never leave.
    dead: AtomicBool,
    user_data: OnceLock<UserData>,
}

impl std::fmt::Debug for Link {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Link({}, {})", self.id, self.description())
    }
}

impl Link {
    pub(crate) fn new(reactor: &Arc<Reactor>, id: u64, peer: Peer, hello: &[u8]) -> Arc<Self> {
        let config = &reactor.config;
        let is_unix = matches!(peer, Peer::Unix { .. });
        let link = Arc::new_cyclic(|this| Self {
            id,
            description: OnceLock::from(peer.to_string()),
            peer: OnceLock::from(peer),
            is_unix,
            reactor: Arc::downgrade(reactor),
            this: this.clone(),
            outgoing: Mutex::new(Outgoing {
                queue: SendQueue::default(),
                state: State::Open,
                corked: false,
                writing: false,
                blocked: false,
                held: true,
                dirty_since: None,
                sends_since_clock: 0,
            }),
            inflight: Mutex::new(InFlight::default()),
            incoming: Mutex::new(Incoming::new(
                is_unix,
                config.frame_limit_bytes,
                config.protocol_versions,
            )),
            queued_bytes: AtomicUsize::new(0),
            ready: AtomicBool::new(false),
            delivers: AtomicBool::new(true),
            dead: AtomicBool::new(false),
            user_data: OnceLock::new(),
        });
        let mut header = HELLO_MAGIC.to_vec();
        header.extend_from_slice(&config.protocol_versions.0.to_le_bytes());
        header.extend_from_slice(&config.protocol_versions.1.to_le_bytes());
        let mut outgoing = lock(&link.outgoing);
        link.push(
            &mut outgoing,
            KIND_HELLO,
            FLAG_INTERNAL,
            0,
            Header::Slice(&header),
            &[Bytes::copy_from_slice(hello)],
            None,
        );
        drop(outgoing);
        link
    }

    /// The id of this link in its reactor; never used twice.
    pub fn id(&self) -> u64 {
        self.id
    }

    /// Who is at the other end.
    pub fn peer(&self) -> &Peer {
        self.peer.get().expect("set when the link was made")
    }

    /// Who is at the other end, in words.
    pub fn description(&self) -> &str {
        self.description.get().expect("set when the link was made")
    }

    /// Whether the peer's Hello has arrived.
    pub fn is_ready(&self) -> bool {
        self.ready.load(Ordering::Acquire)
    }

    /// Whether the link takes frames.
    pub fn is_open(&self) -> bool {
        matches!(lock(&self.outgoing).state, State::Open)
    }

    /// Bytes that were sent by the user and not yet taken by the operating system.
    pub fn queued_bytes(&self) -> usize {
        self.queued_bytes.load(Ordering::Relaxed)
    }

    /// Hangs the user's data on the link, once; gives it back if there is some already.
    pub fn set_user_data(&self, data: UserData) -> Result<(), UserData> {
        self.user_data.set(data)
    }

    /// What was hung on the link.
    pub fn user_data(&self) -> Option<&(dyn std::any::Any + Send + Sync)> {
        self.user_data.get().map(|data| &**data)
    }

    /// What was hung on the link, if it is a `T`.
    pub fn user_data_as<T: 'static>(&self) -> Option<&T> {
        self.user_data()?.downcast_ref()
    }

    /// Sends a frame behind all that were sent before. Never blocks; what the socket does not take stays queued.
    pub fn send(&self, kind: u16, correlation: u64, header: Bytes, payload: &[Bytes]) -> Result<(), RpcError> {
        self.send_frame(kind, correlation, Header::Shared(&header), payload, None)
    }

    /// `send` for a header that is not in `Bytes`.
    pub fn send_slice(&self, kind: u16, correlation: u64, header: &[u8], payload: &[Bytes]) -> Result<(), RpcError> {
        self.send_frame(kind, correlation, Header::Slice(header), payload, None)
    }

    /// Sends a frame that brings a descriptor; Unix sockets only.
    pub fn send_with_descriptor(
        &self,
        kind: u16,
        correlation: u64,
        header: Bytes,
        descriptor: OwnedFd,
    ) -> Result<(), RpcError> {
        if !self.is_unix {
            return Err(RpcError::DescriptorOverTcp {
                peer: self.description().into(),
            });
        }
        self.send_frame(kind, correlation, Header::Shared(&header), &[], Some(descriptor))
    }

    fn send_frame(
        &self,
        kind: u16,
        correlation: u64,
        header: Header<'_>,
        payload: &[Bytes],
        descriptor: Option<OwnedFd>,
    ) -> Result<(), RpcError> {
        let Some(reactor) = self.reactor.upgrade() else {
            return Err(RpcError::Stopped);
        };
        let payload_bytes: usize = payload.iter().map(Bytes::len).sum();
        let length = FIXED_BYTES + header.len() + payload_bytes;
        let limit_bytes = reactor.config.frame_limit_bytes.min(u32::MAX as usize);
        if length > limit_bytes {
            return Err(RpcError::FrameTooLarge {
                peer: self.description().into(),
                bytes: length,
                limit_bytes,
            });
        }
        let mut delay = None;
        if let Some(faults) = &reactor.config.faults {
            match faults.on_send(self, kind) {
                FaultAction::Deliver => {}
                FaultAction::Drop => return Ok(()),
                FaultAction::Delay(duration) => delay = Some(duration),
                FaultAction::Close(sentence) => {
                    self.begin_close(CloseReason::new(CloseCause::Fault, sentence), false);
                    return Ok(());
                }
            }
        }
        let mut outgoing = lock(&self.outgoing);
        match &outgoing.state {
            State::Open => {}
            State::Closing(reason) | State::Closed(reason) => {
                return Err(RpcError::LinkClosed {
                    peer: self.description().into(),
                    reason: reason.to_string(),
                })
            }
        }
        count(&reactor.stats.frames_sent);
        let flags = if descriptor.is_some() { FLAG_DESCRIPTOR } else { 0 };
        self.push(&mut outgoing, kind, flags, correlation, header, payload, descriptor);
        if let Some(delay) = delay {
            outgoing.held = true;
            drop(outgoing);
            self.release_later(&reactor, delay);
            return Ok(());
        }
        let in_batch = reactor.is_dispatching_batch();
        if !outgoing.corked && !in_batch {
            self.flush_locked(&reactor, outgoing);
            return Ok(());
        }
        self.note_dirty(&reactor, outgoing, in_batch);
        Ok(())
    }

    #[allow(clippy::too_many_arguments)]
    fn push(
        &self,
        outgoing: &mut Outgoing,
        kind: u16,
        flags: u16,
        correlation: u64,
        header: Header<'_>,
        payload: &[Bytes],
        descriptor: Option<OwnedFd>,
    ) {
        let payload_bytes: usize = payload.iter().map(Bytes::len).sum();
        let length = FIXED_BYTES + header.len() + payload_bytes;
        if let Some(descriptor) = descriptor {
            outgoing.queue.push_descriptor(descriptor);
        }
        outgoing
            .queue
            .push_copy(&encode_prefix(kind, flags, correlation, header.len(), length));
        match header {
            Header::Slice(bytes) => outgoing.queue.push_copy(bytes),
            Header::Shared(bytes) => outgoing.queue.push(bytes),
        }
        for segment in payload {
            outgoing.queue.push(segment);
        }
        self.queued_bytes
            .fetch_add(length - FIXED_BYTES + PREFIX_BYTES, Ordering::Relaxed);
    }

    /// A corked or batched send: remembers the link for the next flush, or flushes if enough waits.
    fn note_dirty(&self, reactor: &Arc<Reactor>, mut outgoing: MutexGuard<'_, Outgoing>, in_batch: bool) {
        let limit = &reactor.config;
        let mut over = self.queued_bytes() >= limit.cork_limit_bytes;
        match outgoing.dirty_since {
            None => {
                outgoing.dirty_since = Some(Instant::now());
                outgoing.sends_since_clock = 0;
                reactor.add_dirty(self.this.upgrade(), !in_batch);
            }
            Some(since) if !in_batch => {
                outgoing.sends_since_clock += 1;
                if outgoing.sends_since_clock >= CORK_CLOCK_STRIDE {
                    outgoing.sends_since_clock = 0;
                    over |= since.elapsed() >= Duration::from_micros(u64::from(limit.cork_limit_us));
                    if over {
                        // It stays in the list; what is queued from now on has waited since now.
                        outgoing.dirty_since = Some(Instant::now());
                    }
                }
            }
            Some(_) => {}
        }
        if over {
            self.flush_locked(reactor, outgoing);
        }
    }

    /// From now on sends only queue, until `uncork`, the cork limits or a wait of the reactor.
    pub fn cork(&self) {
        lock(&self.outgoing).corked = true;
    }

    /// Sends what was queued, and from now on every frame at once.
    pub fn uncork(&self) {
        let mut outgoing = lock(&self.outgoing);
        outgoing.corked = false;
        if let Some(reactor) = self.reactor.upgrade() {
            self.flush_locked(&reactor, outgoing);
        }
    }

    /// Sends what is queued now, corked or not.
    pub fn flush(&self) {
        if let Some(reactor) = self.reactor.upgrade() {
            self.flush_locked(&reactor, lock(&self.outgoing));
        }
    }

    /// Flushes as a member of the reactor's dirty list, which it has just left.
    pub(crate) fn flush_dirty(&self, reactor: &Reactor) {
        let mut outgoing = lock(&self.outgoing);
        outgoing.dirty_since = None;
        self.flush_locked(reactor, outgoing);
    }

    /// When the oldest frame of a dirty link was queued.
    pub(crate) fn dirty_since(&self) -> Option<Instant> {
        lock(&self.outgoing).dirty_since
    }

    fn flush_locked<'a>(&'a self, reactor: &Reactor, mut outgoing: MutexGuard<'a, Outgoing>) {
        if outgoing.writing || outgoing.blocked || outgoing.held || matches!(outgoing.state, State::Closed(_)) {
            return;
        }
        outgoing.writing = true;
        let mut writes = 0;
        loop {
            writes += 1;
            let mut inflight = lock(&self.inflight);
            inflight.take_from(&mut outgoing.queue);
            if inflight.is_empty() {
                outgoing.writing = false;
                return;
            }
            drop(outgoing);
            let end = inflight.write(&reactor.stats, |bytes| {
                self.queued_bytes.fetch_sub(bytes, Ordering::Relaxed);
            });
            let recycled = inflight.take_recycled();
            drop(inflight);
            outgoing = lock(&self.outgoing);
            outgoing.queue.keep_spare(recycled);
            match end {
                WriteEnd::Drained if outgoing.queue.is_empty() => {
                    outgoing.writing = false;
                    let closing = matches!(outgoing.state, State::Closing(_));
                    drop(outgoing);
                    if closing {
                        reactor.look_at_closings();
                    }
                    return;
                }
                WriteEnd::Drained if writes < WRITES_IN_A_ROW => {}
                WriteEnd::Drained | WriteEnd::Blocked => {
                    outgoing.writing = false;
                    outgoing.blocked = true;
                    self.watch(reactor, true);
                    return;
                }
                WriteEnd::Failed(error) => {
                    outgoing.writing = false;
                    outgoing.blocked = true;
                    self.dead.store(true, Ordering::Release);
                    let error = std::io::Error::from(error);
                    let peer = self.description();
                    let gone = matches!(
                        error.kind(),
                        std::io::ErrorKind::BrokenPipe | std::io::ErrorKind::ConnectionReset
                    );
                    let reason = if gone {
                        CloseReason::new(
                            CloseCause::PeerClosed,
                            format!("{peer} closed the link or died ({error})"),
                        )
                    } else {
                        CloseReason::new(CloseCause::Io, format!("writing to {peer} failed: {error}"))
                    };
                    drop(outgoing);
                    self.begin_close(reason, false);
                    return;
                }
            }
        }
    }

    fn watch(&self, reactor: &Reactor, for_write: bool) {
        let socket = lock(&self.inflight).socket.clone();
        if let Some(socket) = socket {
            reactor.watch_link(&socket, self.id, for_write);
        }
    }

    /// Asks for write readiness again, where the socket was full before it was watched.
    pub(crate) fn rewatch(&self, reactor: &Reactor) {
        let outgoing = lock(&self.outgoing);
        if outgoing.blocked {
            self.watch(reactor, true);
        }
    }

    /// The socket takes bytes again. Holder of the token only.
    pub(crate) fn on_writable(&self, reactor: &Reactor) {
        let mut outgoing = lock(&self.outgoing);
        if outgoing.blocked && !matches!(outgoing.state, State::Closed(_)) {
            outgoing.blocked = false;
            self.watch(reactor, false);
            self.flush_locked(reactor, outgoing);
        }
    }

    /// Gives the link its proven socket and sends what waited for it.
    pub(crate) fn attach(&self, reactor: &Reactor, socket: &Arc<OwnedFd>) {
        lock(&self.incoming).socket = Some(Arc::clone(socket));
        let mut outgoing = lock(&self.outgoing);
        lock(&self.inflight).socket = Some(Arc::clone(socket));
        outgoing.held = false;
        self.flush_locked(reactor, outgoing);
    }

    fn release_later(&self, reactor: &Arc<Reactor>, delay: Duration) {
        if let Some(link) = self.this.upgrade() {
            reactor.release_link_at(link, Instant::now() + delay);
        }
    }

    /// Ends a fault's delay.
    pub(crate) fn release(&self, reactor: &Reactor) {
        let mut outgoing = lock(&self.outgoing);
        if lock(&self.inflight).socket.is_some() {
            outgoing.held = false;
            self.flush_locked(reactor, outgoing);
        }
    }

    /// Closes the link: what is queued is still sent, within `Config::linger_timeout`; nothing more is delivered.
    /// `on_closed` follows on the thread that leads.
    pub fn close(&self, reason: CloseReason) {
        self.delivers.store(false, Ordering::Release);
        self.begin_close(reason, true);
    }

    pub(crate) fn begin_close(&self, reason: CloseReason, graceful: bool) {
        let mut outgoing = lock(&self.outgoing);
        if !matches!(outgoing.state, State::Open) {
            return;
        }
        outgoing.state = State::Closing(reason);
        let Some(reactor) = self.reactor.upgrade() else { return };
        if graceful {
            self.flush_locked(&reactor, outgoing);
        } else {
            drop(outgoing);
        }
        if let Some(link) = self.this.upgrade() {
            reactor.schedule_close(link, graceful);
        }
    }

    /// The stream from the peer is over.
    pub(crate) fn set_dead(&self) {
        self.dead.store(true, Ordering::Release);
    }

    pub(crate) fn is_dead(&self) -> bool {
        self.dead.load(Ordering::Acquire)
    }

    pub(crate) fn set_ready(&self) {
        self.ready.store(true, Ordering::Release);
    }

    pub(crate) fn delivers(&self) -> bool {
        self.delivers.load(Ordering::Acquire)
    }

    pub(crate) fn stop_delivery(&self) {
        self.delivers.store(false, Ordering::Release);
    }

    /// Whether everything queued has left, or never will.
    pub(crate) fn is_drained(&self) -> bool {
        let outgoing = lock(&self.outgoing);
        let inflight = lock(&self.inflight);
        self.dead.load(Ordering::Acquire)
            || inflight.socket.is_none()
            || (!outgoing.writing && outgoing.queue.is_empty() && inflight.is_empty())
    }

    /// Takes the sockets away. The reason, if this call closed the link. Holder of the token only.
    pub(crate) fn finish(&self) -> Option<(CloseReason, Option<Arc<OwnedFd>>)> {
        let mut outgoing = lock(&self.outgoing);
        let reason = match &outgoing.state {
            State::Closed(_) => return None,
            State::Closing(reason) => reason.clone(),
            State::Open => CloseReason::local(format!("the link to {} was closed by this process", self.description())),
        };
        outgoing.state = State::Closed(reason.clone());
        outgoing.queue.clear();
        drop(outgoing);
        let mut inflight = lock(&self.inflight);
        inflight.clear();
        let socket = inflight.socket.take();
        drop(inflight);
        self.set_dead();
        lock(&self.incoming).socket = None;
        self.queued_bytes.store(0, Ordering::Relaxed);
        Some((reason, socket))
    }
}
