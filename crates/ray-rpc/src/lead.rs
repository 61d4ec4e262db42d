//! What the holder of the leader token does: chores, spinning, sleeping, reading and dispatch.
//!
//! Invariants:
//! 1. Whoever leads leaves. A handler's panic closes the link it served and reaches nobody else.
//! 2. The leader sleeps only after it has looked at everything that can be asked of it without a descriptor, and whoever
//!    asks later writes the wake descriptor.
//! 3. A link is finished (`on_closed`) once, after everything readable was delivered, unless it was closed from here.

use std::mem::MaybeUninit;
use std::panic::{catch_unwind, AssertUnwindSafe};
use std::sync::atomic::Ordering;
use std::sync::Arc;
use std::time::{Duration, Instant};

use rustix::event::epoll::{self, Event, EventData, EventFlags};
use rustix::event::Timespec;
use rustix::io::Errno;

use crate::config::{Peer, Service};
use crate::error::{CloseCause, CloseReason};
use crate::incoming::{Arrival, ReadEnd};
use crate::link::Link;
use crate::reactor::{Chore, Reactor, WaitOutcome, NEVER, TAG_LINK, TAG_SHIFT, TAG_SOURCE};
use crate::spin::SpinRecord;
use crate::stats::{add, count};
use crate::sync::lock;
use crate::token::Waiter;

const READ_BUFFER_BYTES: usize = 128 << 10;
const EVENTS: usize = 64;
/// What one link may bring before the others have their turn.
const READ_BUDGET_BYTES: usize = 2 << 20;
/// While spinning on the link that was last heard, the whole set is polled once in this many rounds.
const POLL_STRIDE: u32 = 8;
/// A spin without traffic that takes this much longer than meant lost its core to somebody.
const PREEMPTION_MARGIN: Duration = Duration::from_micros(500);
/// Closed TCP sockets are read to their end this long, so that the peer gets our last bytes and no reset.
const TCP_LINGER: Duration = Duration::from_secs(1);

/// Memory of the leader, whoever that is.
#[derive(Default)]
pub(crate) struct LeaderState {
    buffer: Vec<u8>,
    arrivals: Vec<Arrival>,
    hot: Option<Arc<Link>>,
    spins: SpinRecord,
}

type EventBuffer = [MaybeUninit<Event>; EVENTS];

fn event_buffer() -> EventBuffer {
    [MaybeUninit::uninit(); EVENTS]
}

struct Leadership<'a>(&'a Reactor);

impl Drop for Leadership<'_> {
    fn drop(&mut self) {
        self.0.leave_leadership();
    }
}

impl Reactor {
    /// Leads until the waiter is notified, the deadline passes or a signal arrives; leaves the leadership.
    pub(crate) fn lead(&self, waiter: Option<&Waiter>, deadline: Option<Instant>) -> WaitOutcome {
        let _leadership = Leadership(self);
        let _mark = self.set_leading();
        let mut state = lock(&self.leader);
        loop {
            self.housekeeping();
            if waiter.is_some_and(Waiter::is_notified) {
                return WaitOutcome::Notified;
            }
            if self.stopping.load(Ordering::SeqCst) {
                return WaitOutcome::Stopped;
            }
            if deadline.is_some_and(|deadline| Instant::now() >= deadline) {
                return WaitOutcome::TimedOut;
            }
            if self.may_spin && self.spin(&mut state, waiter, deadline) {
                continue;
            }
            if self.sleep(&mut state, waiter, deadline).is_err() {
                return WaitOutcome::Interrupted;
            }
        }
    }

    /// Serves what is there without blocking; leaves the leadership.
    pub(crate) fn lead_once(&self) {
        let _leadership = Leadership(self);
        let _mark = self.set_leading();
        let mut state = lock(&self.leader);
        self.housekeeping();
        if self.poll_events(&mut state) {
            self.housekeeping();
        }
    }

    /// Serves until nothing is left to read, for the background thread; leaves the leadership.
    pub(crate) fn lead_until_idle(&self) {
        let _leadership = Leadership(self);
        let _mark = self.set_leading();
        let mut state = lock(&self.leader);
        loop {
            self.housekeeping();
            // A user thread that came meanwhile is a follower and gets the token as soon as the background leaves.
            if !self.poll_events(&mut state) || self.stopping.load(Ordering::SeqCst) {
                break;
            }
        }
        self.housekeeping();
    }

    /// Everything that is due without any descriptor being ready.
    fn housekeeping(&self) {
        if self.wake_requested.load(Ordering::SeqCst) {
            self.wake_requested.store(false, Ordering::SeqCst);
            self.call_service("on_wake", |service| service.on_wake());
        }
        if self.next_due() != NEVER {
            self.run_due();
        }
        if self.has_closing.load(Ordering::SeqCst) {
            self.finish_closings(false);
        }
        if self.looks_after_corked() {
            self.flush_dirty();
        }
    }

    /// Whether corked links have unsent frames that the leader must send, because no background thread does.
    fn looks_after_corked(&self) -> bool {
        self.has_dirty.load(Ordering::SeqCst) && !self.background.is_running()
    }

    fn run_due(&self) {
        let now = Instant::now();
        let nanos = self.nanos(now);
        if self.chores_due.load(Ordering::SeqCst) <= nanos {
            self.chores_due.store(NEVER, Ordering::SeqCst);
            loop {
                let mut chores = lock(&self.chores);
                let Some(entry) = chores.first_entry() else { break };
                let due = self.nanos(entry.key().0);
                if due > nanos {
                    self.chores_due.fetch_min(due, Ordering::SeqCst);
                    break;
                }
                let chore = entry.remove();
                drop(chores);
                self.run_chore(chore);
            }
        }
        if self.timer_due.load(Ordering::SeqCst) <= nanos {
            self.timer_due.store(NEVER, Ordering::SeqCst);
            let next = self.call_service("on_timer", |service| service.on_timer(now));
            if let Some(next) = next.flatten() {
                self.timer_due.fetch_min(self.nanos(next), Ordering::SeqCst);
            }
        }
    }

    fn run_chore(&self, chore: Chore) {
        match chore {
            Chore::HelloDue(id) => {
                let link = lock(&self.links).get(&id).cloned();
                if let Some(link) = link.filter(|link| !link.is_ready()) {
                    let limit = self.config.hello_timeout;
                    let sentence = format!("{} did not say Hello within {limit:?}", link.description());
                    tracing::warn!("{sentence}");
                    link.begin_close(CloseReason::new(CloseCause::Timeout, sentence), false);
                }
            }
            Chore::Release(link) => link.release(self),
            Chore::SourceDue(id) => self.on_source_due(id),
            Chore::ResumeListener(id) => self.resume_listener(id),
            Chore::Look => self.has_closing.store(true, Ordering::SeqCst),
        }
    }

    /// Finishes links that are closing and have nothing left to send, or all of them.
    pub(crate) fn finish_closings(&self, all: bool) {
        // A handler of `on_closed` may close further links, which then wait in the list for the next round.
        loop {
            self.has_closing.store(false, Ordering::SeqCst);
            let closings = std::mem::take(&mut *lock(&self.closing));
            if closings.is_empty() {
                return;
            }
            let now = Instant::now();
            let mut waiting = Vec::new();
            for closing in closings {
                if all || !closing.graceful || closing.link.is_drained() || now >= closing.deadline {
                    self.finish(&closing.link);
                } else {
                    waiting.push(closing);
                }
            }
            if let Some(next) = waiting.iter().map(|closing| closing.deadline).min() {
                // Progress is also looked at whenever a closing link's socket takes bytes; this is the limit.
                self.add_chore_at(next, Chore::Look);
                lock(&self.closing).append(&mut waiting);
                return;
            }
        }
    }

    fn finish(&self, link: &Arc<Link>) {
        if link.delivers() {
            self.deliver_rest(link);
        }
        let Some((reason, socket)) = link.finish() else { return };
        lock(&self.links).remove(&link.id());
        if let Some(socket) = socket {
            let _ = epoll::delete(&self.inner, &*socket);
            if matches!(link.peer(), Peer::Tcp { .. }) && reason.cause == CloseCause::Local {
                self.linger(socket, TCP_LINGER);
            } else {
                let _ = rustix::net::shutdown(&*socket, rustix::net::Shutdown::Both);
            }
        }
        count(&self.stats.links_closed);
        self.call_service("on_closed", |service| service.on_closed(link, &reason));
    }

    /// Calls a handler. A panic ends there: it is logged, and the other links are served on.
    pub(crate) fn call_service<T>(&self, what: &str, call: impl FnOnce(&dyn Service) -> T) -> Option<T> {
        let service = self.service().ok()?;
        let result = catch_unwind(AssertUnwindSafe(|| call(&**service)));
        if result.is_err() {
            tracing::error!("the handler {what} panicked");
        }
        result.ok()
    }

    /// What a peer sent before a write to it failed is still delivered.
    fn deliver_rest(&self, link: &Arc<Link>) {
        let mut buffer = vec![0; READ_BUFFER_BYTES];
        let mut arrivals = Vec::new();
        loop {
            let end = lock(&link.incoming).read_once(link.description(), &mut buffer, &mut arrivals);
            self.deliver(link, &mut arrivals);
            match end {
                ReadEnd::Read { .. } if link.delivers() => {}
                _ => return,
            }
        }
    }

    /// Polls for a while. True if there was something, or something else to look at.
    fn spin(&self, state: &mut LeaderState, waiter: Option<&Waiter>, deadline: Option<Instant>) -> bool {
        if !state.spins.should_spin() {
            return false;
        }
        if let Some(gate) = &self.config.spin_gate {
            if !gate.try_claim() {
                return false;
            }
        }
        let before = Instant::now();
        let hit = self.spin_claimed(state, waiter, deadline);
        if let Some(gate) = &self.config.spin_gate {
            gate.release();
        }
        if hit {
            count(&self.stats.spin_hits);
            state.spins.on_hit();
        } else {
            count(&self.stats.spin_misses);
            state.spins.on_miss();
            let meant = Duration::from_micros(u64::from(self.config.spin_us));
            if before.elapsed() > meant * 4 + PREEMPTION_MARGIN {
                state.spins.on_preempted();
            }
        }
        hit
    }

    fn spin_claimed(&self, state: &mut LeaderState, waiter: Option<&Waiter>, deadline: Option<Instant>) -> bool {
        let mut end = Instant::now() + Duration::from_micros(u64::from(self.config.spin_us));
        if let Some(deadline) = deadline {
            end = end.min(deadline);
        }
        let mut round = 0u32;
        loop {
            match state.hot.clone() {
                Some(hot) => {
                    if self.read_link(state, &hot) {
                        return true;
                    }
                    if round % POLL_STRIDE == POLL_STRIDE - 1 && self.poll_events(state) {
                        return true;
                    }
                }
                None => {
                    if self.poll_events(state) {
                        return true;
                    }
                }
            }
            if waiter.is_some_and(Waiter::is_notified) {
                return true;
            }
            if Instant::now() >= end {
                return false;
            }
            round = round.wrapping_add(1);
            std::hint::spin_loop();
        }
    }

    /// A follower watches its word for a moment before it sleeps on it. True if there is news.
    pub(crate) fn spin_as_follower(&self, waiter: &Waiter) -> bool {
        if !self.may_spin || self.config.spin_gate.as_ref().is_some_and(|gate| !gate.try_claim()) {
            return waiter.has_news();
        }
        let mut news = waiter.has_news();
        // Short: the leader spins too, and a process should not burn two cores.
        let end = Instant::now() + Duration::from_micros(u64::from(self.config.spin_us / 8));
        while !news && Instant::now() < end {
            for _ in 0..16 {
                std::hint::spin_loop();
            }
            news = waiter.has_news();
        }
        if let Some(gate) = &self.config.spin_gate {
            gate.release();
        }
        news
    }

    /// Takes events that are there without sleeping. True if there were any.
    fn poll_events(&self, state: &mut LeaderState) -> bool {
        count(&self.stats.polls);
        let mut events = event_buffer();
        let zero = Timespec { tv_sec: 0, tv_nsec: 0 };
        match epoll::wait(&self.inner, &mut events[..], Some(&zero)) {
            Ok((events, _)) if !events.is_empty() => {
                self.dispatch(state, events);
                true
            }
            _ => false,
        }
    }

    fn sleep(
        &self,
        state: &mut LeaderState,
        waiter: Option<&Waiter>,
        deadline: Option<Instant>,
    ) -> Result<(), Interrupted> {
        let due = self
            .next_due()
            .min(deadline.map_or(NEVER, |deadline| self.nanos(deadline)));
        let timeout = self.timeout_until(due);
        if waiter.is_some_and(|waiter| !waiter.begin_poll()) {
            return Ok(());
        }
        // Whoever asked before this load is seen here; whoever asks after it writes the wake descriptor.
        let asked = self.wake_requested.load(Ordering::SeqCst)
            || self.has_closing.load(Ordering::SeqCst)
            || self.looks_after_corked()
            || self.next_due() < due;
        let mut events = event_buffer();
        let result = if asked {
            Ok(0)
        } else {
            count(&self.stats.leader_sleeps);
            let before = Instant::now();
            let result = epoll::wait(&self.inner, &mut events[..], timeout.as_ref()).map(|(events, _)| events.len());
            if matches!(result, Ok(1..)) {
                let spin = Duration::from_micros(u64::from(self.config.spin_us));
                state.spins.on_sleep(before.elapsed(), spin);
            }
            result
        };
        if let Some(waiter) = waiter {
            waiter.end_poll();
        }
        match result {
            Ok(0) => Ok(()),
            Ok(filled) => {
                // SAFETY: the system filled this many entries, and `Event` is plain data.
                let filled: Vec<Event> = events[..filled]
                    .iter()
                    .map(|event| unsafe { event.assume_init() })
                    .collect();
                self.dispatch(state, &filled);
                Ok(())
            }
            Err(Errno::INTR) => Err(Interrupted),
            Err(error) => {
                tracing::error!(%error, "waiting for links failed");
                Ok(())
            }
        }
    }

    /// The timeout until a due time; none where it never comes.
    pub(crate) fn timeout_until(&self, due: u64) -> Option<Timespec> {
        if due == NEVER {
            return None;
        }
        let left = due.saturating_sub(self.nanos(Instant::now()));
        Some(Timespec {
            tv_sec: (left / 1_000_000_000) as i64,
            tv_nsec: (left % 1_000_000_000) as _,
        })
    }

    fn dispatch(&self, state: &mut LeaderState, events: &[Event]) {
        for event in events {
            let flags = event.flags;
            let data: EventData = event.data;
            let data = data.u64();
            let id = data & ((1 << TAG_SHIFT) - 1);
            match data >> TAG_SHIFT {
                TAG_LINK => {
                    let link = lock(&self.links).get(&id).cloned();
                    let Some(link) = link else { continue };
                    if flags.contains(EventFlags::OUT) {
                        link.on_writable(self);
                    }
                    if flags.intersects(EventFlags::IN | EventFlags::HUP | EventFlags::ERR | EventFlags::RDHUP) {
                        self.read_link(state, &link);
                    }
                }
                TAG_SOURCE => self.on_source_event(id, flags),
                // The wake descriptor: being awake is all it asks for.
                _ => {}
            }
        }
    }

    /// Reads a link and delivers what came. True if anything came or the link ended.
    fn read_link(&self, state: &mut LeaderState, link: &Arc<Link>) -> bool {
        if state.buffer.is_empty() {
            state.buffer = vec![0; READ_BUFFER_BYTES];
        }
        let mut total = 0;
        loop {
            count(&self.stats.reads);
            let end = lock(&link.incoming).read_once(link.description(), &mut state.buffer, &mut state.arrivals);
            self.deliver(link, &mut state.arrivals);
            match end {
                ReadEnd::WouldBlock => {
                    if link.is_dead() {
                        // A finished link is forgotten, and with it what its user hung on it.
                        state.hot = None;
                    }
                    return total > 0;
                }
                ReadEnd::Read { bytes, maybe_more } => {
                    add(&self.stats.bytes_received, bytes as u64);
                    total += bytes;
                    if !state.hot.as_ref().is_some_and(|hot| Arc::ptr_eq(hot, link)) {
                        state.hot = Some(Arc::clone(link));
                    }
                    if !maybe_more || total >= READ_BUDGET_BYTES {
                        return true;
                    }
                }
                ReadEnd::Ended(reason) => {
                    if state.hot.as_ref().is_some_and(|hot| Arc::ptr_eq(hot, link)) {
                        state.hot = None;
                    }
                    if reason.cause == CloseCause::Protocol {
                        tracing::warn!("{reason}");
                    }
                    link.stop_delivery();
                    link.set_dead();
                    link.begin_close(reason, false);
                    self.finish_closings(false);
                    return true;
                }
            }
        }
    }

    fn deliver(&self, link: &Arc<Link>, arrivals: &mut Vec<Arrival>) {
        if arrivals.is_empty() {
            return;
        }
        // Answers to several frames that came together leave together.
        let _batch = (arrivals.len() > 1).then(|| self.set_batch());
        for arrival in arrivals.drain(..) {
            if !link.delivers() {
                continue;
            }
            let served = match arrival {
                Arrival::Ready(hello) => {
                    count(&self.stats.links_ready);
                    link.set_ready();
                    self.call_service("on_ready", |service| service.on_ready(link, &hello))
                }
                Arrival::Frame(frame) => {
                    count(&self.stats.frames_received);
                    self.call_service("on_frame", |service| service.on_frame(link, frame))
                }
            };
            if served.is_none() {
                // What the handler left undone would be waited for in vain; a closed link says so to both ends.
                let sentence = format!(
                    "the link to {} was closed because a handler of this process panicked",
                    link.description()
                );
                link.close(CloseReason::local(sentence));
            }
        }
    }
}

/// A signal handler ran.
struct Interrupted;
