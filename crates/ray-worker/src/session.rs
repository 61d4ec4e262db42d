//! Links between processes of different nodes break while both live: this carries out what `ray_ownership::session`
//! decides, so that a broken link delays frames and loses none.
//!
//! A session is the opener's: it opens a link, and opens it again until the other process is known to be dead. Each fresh
//! link begins with `SESSION_RESUME` both ways, which says how many frames were taken in; the rest is sent again.
//! Between processes of one node there is none of this: a Unix socket breaks with one of its two processes alone.
//!
//! It refuses frames of a link that a later one has replaced: their sender sends them again on that one.
//!
//! Invariants:
//! 1. A frame is handed to the session before the link, under one lock, so that both have the same order.
//! 2. A session ends with its peer's death, or when the peer's numbers make no sense; then it takes nothing in or out.

use std::sync::{Arc, Mutex};
use std::time::Duration;

use bytes::Bytes;
use ray_ids::{ActorId, WorkerId};
use ray_ownership::session::{Session, SessionError};
use ray_rpc::{CloseReason, Link, RpcError};
use ray_wire::{kinds, SessionAcknowledge, SessionResume, WatchWorker};

use crate::inner::{Inner, Retry, State};
use crate::links::{link_state, LinkState};
use crate::slot::lock;
use crate::WorkerError;

/// Frames that a link refuses are not retained. Smaller than the links' own limit by what a frame has besides.
const FRAME_LIMIT_BYTES: usize = (512 << 20) - 1024;
/// How soon a link that broke is opened again; the delay doubles with each failure.
const RECONNECT_DELAY: Duration = Duration::from_millis(20);
/// How long at most until it is tried again.
const LONGEST_RECONNECT_DELAY: Duration = Duration::from_secs(2);
/// How long a link may be broken before calls that wait for an answer over it are given up: they are retried elsewhere, or
/// fail with an error that says so. Frames are kept beyond that, until the process is known to be dead.
const PATIENCE: Duration = Duration::from_secs(10);
/// How long frames that were taken in may stay unacknowledged, which costs their sender memory.
const ACKNOWLEDGE_DELAY: Duration = Duration::from_secs(1);

#[derive(Debug)]
struct SentFrame {
    kind: u16,
    correlation: u64,
    header: Bytes,
    payload: Vec<Bytes>,
}

#[derive(Debug, Default)]
struct SessionState {
    session: Session<Arc<SentFrame>>,
    link: Option<Arc<Link>>,
    /// Every link of the session.
    links: Vec<u64>,
    /// Links that broke since the last that worked.
    failures: u32,
    acknowledgement_due: bool,
    ended: bool,
}

/// One process's end of a session.
#[derive(Debug)]
pub(crate) struct PeerSession {
    /// Who opens its links.
    pub opened_here: bool,
    state: Mutex<SessionState>,
}

/// What a frame of the session asks of the shell.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Taken {
    /// Handle it.
    Handle,
    /// Handle it, and acknowledge within a moment.
    HandleAndAcknowledge,
    /// It came over a link that was replaced.
    Drop,
}

impl PeerSession {
    /// A session that this process opened, over its first link; or one that the peer opened, which begins with its word.
    pub fn new(opened_here: bool, link: &Arc<Link>) -> Self {
        let mut state = SessionState {
            link: Some(link.clone()),
            links: vec![link.id()],
            ..SessionState::default()
        };
        if opened_here {
            // Nothing was sent before, so that nothing must be waited for; an error is impossible.
            let _ = state.session.resumed(0);
            let _ = say_resume(link, 0);
        }
        Self {
            opened_here,
            state: Mutex::new(state),
        }
    }

    fn send(&self, kind: u16, correlation: u64, header: Bytes, payload: &[Bytes]) -> Result<(), RpcError> {
        let mut state = lock(&self.state);
        let bytes = header.len() + payload.iter().map(Bytes::len).sum::<usize>();
        let link = state.link.clone();
        if let Some(link) = link.as_ref().filter(|_| state.ended || bytes > FRAME_LIMIT_BYTES) {
            // The link says why not.
            return link.send(kind, correlation, header, payload);
        }
        let frame = Arc::new(SentFrame {
            kind,
            correlation,
            header: header.clone(),
            payload: payload.to_vec(),
        });
        if state.session.send(frame) {
            if let Some(link) = link {
                // What the link does not take goes over the next one.
                let _ = link.send(kind, correlation, header, payload);
            }
        }
        Ok(())
    }

    /// A frame arrived.
    pub fn take(&self, link: &Arc<Link>) -> Taken {
        let mut state = lock(&self.state);
        if state.ended || state.link.as_ref().is_none_or(|current| current.id() != link.id()) {
            return Taken::Drop;
        }
        if let Some(count) = state.session.receive() {
            let message = SessionAcknowledge { received: count };
            let _ = link.send(kinds::SESSION_ACKNOWLEDGE, 0, ray_wire::encode(&message), &[]);
        } else if !std::mem::replace(&mut state.acknowledgement_due, true) {
            return Taken::HandleAndAcknowledge;
        }
        Taken::Handle
    }

    /// Tells the peer how much was taken in, now that some time has passed.
    fn acknowledge(&self) {
        let mut state = lock(&self.state);
        state.acknowledgement_due = false;
        if !state.session.is_connected() {
            return;
        }
        let message = SessionAcknowledge {
            received: state.session.take_in_count(),
        };
        if let Some(link) = &state.link {
            let _ = link.send(kinds::SESSION_ACKNOWLEDGE, 0, ray_wire::encode(&message), &[]);
        }
    }

    /// The peer took that many frames in.
    pub fn acknowledged(&self, link: &Arc<Link>, count: u64) -> Result<(), SessionError> {
        let mut state = lock(&self.state);
        match &state.link {
            Some(current) if current.id() == link.id() => state.session.acknowledged(count),
            _ => Ok(()),
        }
    }

    /// The peer's first word on a link: it took that many frames in. Sends the rest again. False: a later link has
    /// replaced this one.
    pub fn resumed(&self, link: &Arc<Link>, count: u64) -> Result<bool, SessionError> {
        let mut state = lock(&self.state);
        if state.ended {
            return Ok(false);
        }
        let is_current = state.link.as_ref().is_some_and(|current| current.id() == link.id());
        if self.opened_here {
            if !is_current {
                return Ok(false);
            }
            if state.session.is_connected() {
                // The answer on the first link.
                state.session.acknowledged(count)?;
                return Ok(true);
            }
        } else {
            // The opener has a fresh link, so that the last one is over, whether its end was seen here or not.
            state.session.broken();
            if let Some(old) = state.link.replace(link.clone()).filter(|_| !is_current) {
                old.close(CloseReason::local("its session goes on over another link"));
            }
            if !state.links.contains(&link.id()) {
                state.links.push(link.id());
            }
            let _ = say_resume(link, state.session.take_in_count());
        }
        state.failures = 0;
        for frame in state.session.resumed(count)? {
            let _ = link.send(frame.kind, frame.correlation, frame.header.clone(), &frame.payload);
        }
        Ok(true)
    }

    /// A link ended. If it was the current one, returns how long to wait before the next is opened, and whether this is
    /// the first failure in a row.
    fn broken(&self, link: &Arc<Link>) -> Option<(Duration, bool)> {
        let mut state = lock(&self.state);
        if state.ended || state.link.as_ref().is_none_or(|current| current.id() != link.id()) {
            return None;
        }
        state.session.broken();
        let delay = RECONNECT_DELAY * 2u32.pow(state.failures.min(10));
        state.failures += 1;
        Some((delay.min(LONGEST_RECONNECT_DELAY), state.failures == 1))
    }

    /// The next link of a session that this process opened: it begins with how much was taken in.
    fn begin_link(&self, link: &Arc<Link>) {
        let mut state = lock(&self.state);
        state.links.push(link.id());
        let _ = say_resume(link, state.session.take_in_count());
        state.link = Some(link.clone());
    }

    /// Whether frames leave at once.
    pub fn is_connected(&self) -> bool {
        lock(&self.state).session.is_connected()
    }

    /// Whether the peer is dead, or the session is over for another reason.
    pub fn has_ended(&self) -> bool {
        lock(&self.state).ended
    }

    /// Whether the link is or was one of the session's.
    pub fn has_link(&self, link: u64) -> bool {
        lock(&self.state).links.contains(&link)
    }

    fn end(&self) -> Option<Arc<Link>> {
        let mut state = lock(&self.state);
        state.ended = true;
        let links = std::mem::take(&mut state.links);
        let link = state.link.take();
        *state = SessionState {
            ended: true,
            link: link.clone(),
            links,
            ..SessionState::default()
        };
        link
    }
}

fn say_resume(link: &Arc<Link>, received: u64) -> Result<(), RpcError> {
    link.send(
        kinds::SESSION_RESUME,
        0,
        ray_wire::encode(&SessionResume { received }),
        &[],
    )
}

/// Sends a frame to whoever is at the other end of the link, over this link or the one that takes its place.
pub(crate) fn send(
    link: &Arc<Link>,
    kind: u16,
    correlation: u64,
    header: Bytes,
    payload: &[Bytes],
) -> Result<(), RpcError> {
    match link_state(link).session.get() {
        None => link.send(kind, correlation, header, payload),
        Some(session) => session.send(kind, correlation, header, payload),
    }
}

/// Whether what is sent may arrive: a session whose link is broken waits for the next.
pub(crate) fn is_alive(link: &Arc<Link>) -> bool {
    match link_state(link).session.get() {
        None => link.is_open(),
        Some(session) => !session.has_ended(),
    }
}

/// Whether what is sent leaves at once.
pub(crate) fn is_connected(link: &Arc<Link>) -> bool {
    match link_state(link).session.get() {
        None => link.is_open(),
        Some(session) => session.is_connected(),
    }
}

impl Inner {
    /// A frame of a session about the session itself. Returns false for all others.
    pub fn on_session_frame(&self, link: &Arc<Link>, kind: u16, header: &Bytes) -> Result<bool, WorkerError> {
        let Some(session) = link_state(link).session.get() else {
            return Ok(false);
        };
        match kind {
            kinds::SESSION_RESUME => {
                let message: SessionResume = ray_wire::decode("SessionResume", header.clone())?;
                match session.resumed(link, message.received) {
                    Ok(true) => self.session_resumed(link),
                    Ok(false) => {}
                    Err(error) => self.session_failed(link, &error),
                }
            }
            kinds::SESSION_ACKNOWLEDGE => {
                let message: SessionAcknowledge = ray_wire::decode("SessionAcknowledge", header.clone())?;
                if let Err(error) = session.acknowledged(link, message.received) {
                    self.session_failed(link, &error);
                }
            }
            _ => return Ok(false),
        }
        Ok(true)
    }

    /// Whether an ordinary frame counts; sees to its acknowledgement.
    pub fn takes_frame(&self, link: &Arc<Link>) -> bool {
        let said = link_state(link);
        let Some(session) = said.session.get() else {
            return true;
        };
        match session.take(link) {
            Taken::Handle => true,
            Taken::Drop => false,
            Taken::HandleAndAcknowledge => {
                let retry = Retry::Acknowledge(link.clone());
                self.retry_later(&mut self.lock(), ACKNOWLEDGE_DELAY, retry);
                true
            }
        }
    }

    /// Tells the peer how much was taken in.
    pub fn acknowledge_session(&self, link: &Arc<Link>) {
        if let Some(session) = link_state(link).session.get() {
            session.acknowledge();
        }
    }

    /// A link of a session ended: it is opened again by whoever opened it, and what is waited for waits on.
    pub fn session_broken(&self, state: &mut State, link: &Arc<Link>, session: &Arc<PeerSession>, worker: WorkerId) {
        if state.dead_workers.contains(&worker) {
            return self.end_session(state, link);
        }
        let Some((delay, first)) = session.broken(link) else {
            return;
        };
        let message = WatchWorker {
            worker: state.addresses.get(&worker).cloned(),
        };
        let _ = self
            .raylet
            .send(kinds::WATCH_WORKER, 0, ray_wire::encode(&message), &[]);
        if session.opened_here {
            self.retry_later(state, delay, Retry::Reconnect(link.clone()));
        }
        if first {
            self.retry_later(state, PATIENCE, Retry::LosePatience(link.clone()));
        }
    }

    /// Opens the next link of a session.
    pub fn reconnect_session(&self, state: &mut State, old: &Arc<Link>) {
        let said = link_state(old);
        let (Some(session), Some(worker), Some(address)) = (said.session.get(), said.peer_id.get(), said.peer.get())
        else {
            return;
        };
        if session.has_ended() || session.is_connected() {
            return;
        }
        if state.dead_workers.contains(worker) {
            return self.end_session(state, old);
        }
        match self.open_tcp(address, *worker) {
            Ok(link) => {
                // A link is new, so that nothing hangs on it yet.
                let _ = link.set_user_data(Box::new(said.clone()));
                session.begin_link(&link);
            }
            Err(error) => {
                tracing::debug!("the link to {worker} cannot be opened again: {error}");
                self.retry_later(state, LONGEST_RECONNECT_DELAY, Retry::Reconnect(old.clone()));
            }
        }
    }

    /// The peer is back: calls that were given up for want of a link go out again.
    fn session_resumed(&self, link: &Arc<Link>) {
        if let Some(worker) = link_state(link).peer_id.get() {
            let mut state = self.lock();
            self.actor_link_restored(&mut state, *worker);
        }
    }

    fn session_failed(&self, link: &Arc<Link>, error: &SessionError) {
        tracing::warn!("the session with {} is over: {error}", link.description());
        self.end_session(&mut self.lock(), link);
    }

    /// A link has been broken for long: calls that wait for an answer over it are given up, unless it is back.
    pub fn lose_patience(&self, state: &mut State, link: &Arc<Link>) {
        let said = link_state(link);
        let (Some(session), Some(worker)) = (said.session.get(), said.peer_id.get()) else {
            return;
        };
        if session.is_connected() || session.has_ended() {
            return;
        }
        self.actor_link_lost(state, *worker);
        let unreachable: Vec<ActorId> = state
            .actors
            .iter()
            .filter(|(_, entry)| entry.worker == Some(*worker) && !entry.unavailable.is_empty())
            .map(|(actor, _)| *actor)
            .collect();
        for actor in unreachable {
            self.fail_unavailable(state, actor);
        }
        self.retry_later(state, Duration::ZERO, Retry::SuspectWorker(*worker));
    }

    /// The peer is dead: nothing more comes, and nothing is kept for it.
    pub fn end_session(&self, state: &mut State, link: &Arc<Link>) {
        let said = link_state(link);
        let Some(session) = said.session.get() else { return };
        if session.has_ended() {
            return;
        }
        if let Some(link) = session.end() {
            link.close(CloseReason::local("its process is dead"));
        }
        self.drop_calls_of(|other| session.has_link(other));
        if let Some(worker) = said.peer_id.get().copied() {
            if state.links.get(&worker).is_some_and(|held| session.has_link(held.id())) {
                state.links.remove(&worker);
            }
            if state.accepted.get(&worker).is_some_and(|held| same(held, said)) {
                state.accepted.remove(&worker);
            }
            let lost = |entry: &crate::inner::PendingEntry| session.has_link(entry.link);
            self.requests_of_link_lost(state, worker, lost);
        }
    }

    /// Ends every session with a process that is dead.
    pub fn end_sessions_with(&self, state: &mut State, worker: WorkerId) {
        let opened = state.links.get(&worker).cloned();
        let accepted = state.accepted.get(&worker).and_then(|said| {
            let session = said.session.get()?;
            lock(&session.state).link.clone()
        });
        for link in opened.into_iter().chain(accepted) {
            self.end_session(state, &link);
        }
    }
}

fn same(one: &Arc<LinkState>, other: &Arc<LinkState>) -> bool {
    Arc::ptr_eq(one, other)
}
