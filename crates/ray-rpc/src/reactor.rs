//! The reactor: the links of one process and the calls that any thread may make on them.
//!
//! It owns the registries (links, listeners, strangers, watched descriptors), times that are due and the epolls. Who
//! leads is the token's business (`token`), what a leader does is in `lead`, strangers are in `sources`.
//!
//! Invariants:
//! 1. Ids of links and sources come from one counter and are never used twice, so a stale event finds nobody.
//! 2. `timer_due` and `chores_due` only ever move to an earlier time or to never-until-recomputed by the token's holder;
//!    whoever moves one earlier wakes whoever sleeps too long.
//! 3. No registry lock is held while a handler runs.

use std::cell::Cell;
use std::collections::BTreeMap;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, OnceLock, Weak};
use std::time::{Duration, Instant};

use rustc_hash::FxHashMap;
use rustix::event::epoll::{self, EventData, EventFlags};
use rustix::event::{eventfd, EventfdFlags};

use crate::background::Background;
use crate::config::{Config, Service};
use crate::error::{CloseReason, RpcError};
use crate::lead::LeaderState;
use crate::link::Link;
use crate::sources::Source;
use crate::stats::{count, Stats, StatsSnapshot};
use crate::sync::{lock, SleepEnd};
use crate::token::{Alarm, Entry, LeaderToken, Nudge, Waiter};

/// The pace of turns is looked at once in this many.
const TURNS_A_LOOK: u64 = 32;
/// Turns in one patrol interval that are worth a patrol.
const QUICK_TURNS: u64 = 4;
/// A time that never comes.
pub(crate) const NEVER: u64 = u64::MAX;
/// Epoll data: the upper byte says what the id names.
pub(crate) const TAG_SHIFT: u32 = 56;
pub(crate) const TAG_LINK: u64 = 0;
pub(crate) const TAG_SOURCE: u64 = 1;
pub(crate) const TAG_WAKE: u64 = 2;

thread_local! {
    /// The reactor (by address) that this thread leads right now.
    static LEADING: Cell<usize> = const { Cell::new(0) };
    /// The reactor (by address) for which this thread delivers several frames in a row right now.
    static BATCH: Cell<usize> = const { Cell::new(0) };
}

/// How a wait ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum WaitOutcome {
    /// The waiter was notified; the notification is taken.
    Notified,
    /// The deadline passed.
    TimedOut,
    /// A signal handler ran on this thread; the caller checks what it left.
    Interrupted,
    /// The reactor was stopped.
    Stopped,
}

pub(crate) struct WakeDescriptor {
    descriptor: OwnedFd,
    nudges: Arc<AtomicU64>,
}

impl Nudge for WakeDescriptor {
    fn nudge(&self) {
        self.nudges.fetch_add(1, Ordering::Relaxed);
        // Registered edge-triggered: every write is an event, and nobody ever needs to read. The counter could only
        // overflow after 2^64 nudges; until then the write cannot fail in a way that matters.
        let _ = rustix::io::write(&self.descriptor, &1u64.to_ne_bytes());
    }
}

pub(crate) struct EpollAlarm {
    pub(crate) outer: OwnedFd,
    inner: Arc<OwnedFd>,
    arms: Arc<AtomicU64>,
}

impl Alarm for EpollAlarm {
    fn arm(&self) {
        self.arms.fetch_add(1, Ordering::Relaxed);
        // The system checks readiness as it arms, so what arrived before is not missed.
        self.set(EventFlags::IN | EventFlags::ONESHOT);
    }

    fn disarm(&self) {
        self.set(EventFlags::ONESHOT);
    }
}

impl EpollAlarm {
    fn set(&self, flags: EventFlags) {
        if let Err(error) = epoll::modify(&self.outer, &*self.inner, EventData::new_u64(0), flags) {
            tracing::error!(%error, "the background epoll could not be changed");
        }
    }
}

/// Something to do at a time.
pub(crate) enum Chore {
    /// A link should have said Hello by now.
    HelloDue(u64),
    /// A fault's delay is over.
    Release(Arc<Link>),
    /// A stranger or lingering socket has had its time.
    SourceDue(u64),
    /// A listener that had run out of descriptors tries again.
    ResumeListener(u64),
    /// Look at the closing links.
    Look,
}

pub(crate) struct Closing {
    pub(crate) link: Arc<Link>,
    pub(crate) graceful: bool,
    pub(crate) deadline: Instant,
}

/// The links of one process. Made once, shared by all its threads.
pub struct Reactor {
    pub(crate) config: Config,
    pub(crate) stats: Stats,
    nudges: Arc<AtomicU64>,
    arms: Arc<AtomicU64>,
    pub(crate) epoch: Instant,
    pub(crate) inner: Arc<OwnedFd>,
    pub(crate) wake: Arc<WakeDescriptor>,
    nudge: Arc<dyn Nudge>,
    pub(crate) token: LeaderToken<EpollAlarm>,
    service: OnceLock<Arc<dyn Service>>,
    hello: Mutex<Vec<u8>>,
    pub(crate) links: Mutex<FxHashMap<u64, Arc<Link>>>,
    pub(crate) sources: Mutex<FxHashMap<u64, Source>>,
    next_id: AtomicU64,
    pub(crate) half_open: AtomicUsize,
    pub(crate) dirty: Mutex<Vec<Arc<Link>>>,
    pub(crate) has_dirty: AtomicBool,
    pub(crate) closing: Mutex<Vec<Closing>>,
    pub(crate) has_closing: AtomicBool,
    pub(crate) chores: Mutex<BTreeMap<(Instant, u64), Chore>>,
    pub(crate) chores_due: AtomicU64,
    pub(crate) timer_due: AtomicU64,
    pub(crate) wake_requested: AtomicBool,
    pub(crate) stopping: AtomicBool,
    pub(crate) leader: Mutex<LeaderState>,
    pub(crate) may_spin: bool,
    /// How often a waiting thread has led and left, and when that was last looked at.
    pub(crate) turns: AtomicU64,
    turns_seen_at: AtomicU64,
    pub(crate) background: Background,
    pub(crate) this: Weak<Reactor>,
}

impl Reactor {
    /// A reactor with no links and no background thread.
    pub fn new(config: Config) -> Result<Arc<Self>, RpcError> {
        let fail = |action: &str| {
            let action = action.to_string();
            move |error: rustix::io::Errno| RpcError::io(action, error)
        };
        let inner = Arc::new(epoll::create(epoll::CreateFlags::CLOEXEC).map_err(fail("create an epoll"))?);
        let outer = epoll::create(epoll::CreateFlags::CLOEXEC).map_err(fail("create an epoll"))?;
        let descriptor =
            eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK).map_err(fail("create an eventfd"))?;
        let wake_data = EventData::new_u64(TAG_WAKE << TAG_SHIFT);
        epoll::add(&inner, &descriptor, wake_data, EventFlags::IN | EventFlags::ET).map_err(fail("fill an epoll"))?;
        epoll::add(&outer, &*inner, EventData::new_u64(0), EventFlags::ONESHOT).map_err(fail("fill an epoll"))?;
        let background = Background::new(&outer)?;
        let nudges = Arc::new(AtomicU64::new(0));
        let arms = Arc::new(AtomicU64::new(0));
        let wake = Arc::new(WakeDescriptor {
            descriptor,
            nudges: Arc::clone(&nudges),
        });
        let cores = std::thread::available_parallelism().map_or(1, usize::from);
        Ok(Arc::new_cyclic(|this| Self {
            may_spin: config.spin_us > 0 && cores > 1,
            config,
            stats: Stats::default(),
            nudges,
            arms: Arc::clone(&arms),
            epoch: Instant::now(),
            inner: Arc::clone(&inner),
            nudge: wake.clone(),
            wake,
            token: LeaderToken::new(EpollAlarm { outer, inner, arms }),
            service: OnceLock::new(),
            hello: Mutex::default(),
            links: Mutex::default(),
            sources: Mutex::default(),
            next_id: AtomicU64::new(1),
            half_open: AtomicUsize::new(0),
            dirty: Mutex::default(),
            has_dirty: AtomicBool::new(false),
            closing: Mutex::default(),
            has_closing: AtomicBool::new(false),
            chores: Mutex::default(),
            chores_due: AtomicU64::new(NEVER),
            timer_due: AtomicU64::new(NEVER),
            wake_requested: AtomicBool::new(false),
            stopping: AtomicBool::new(false),
            leader: Mutex::new(LeaderState::default()),
            turns: AtomicU64::new(0),
            turns_seen_at: AtomicU64::new(0),
            background,
            this: this.clone(),
        }))
    }

    /// Sets who serves the links, once, before the first listen, connect or adopt.
    pub fn set_service(&self, service: Arc<dyn Service>) -> Result<(), RpcError> {
        self.service.set(service).map_err(|_| RpcError::ServiceAlreadySet)
    }

    /// Sets what links made from now on say in their Hello.
    pub fn set_hello(&self, hello: Vec<u8>) {
        *lock(&self.hello) = hello;
    }

    pub(crate) fn hello_bytes(&self) -> Vec<u8> {
        lock(&self.hello).clone()
    }

    pub(crate) fn service(&self) -> Result<&Arc<dyn Service>, RpcError> {
        self.service.get().ok_or(RpcError::NoService)
    }

    /// The counters.
    pub fn stats(&self) -> StatsSnapshot {
        let mut snapshot = self.stats.snapshot();
        snapshot.nudges = self.nudges.load(Ordering::Relaxed);
        snapshot.arms = self.arms.load(Ordering::Relaxed);
        snapshot
    }

    /// Checks the token's invariants; for tests, whenever they like.
    #[doc(hidden)]
    pub fn token_is_consistent(&self) {
        self.token.validate();
    }

    /// How many links there are, unfinished ones included.
    pub fn link_count(&self) -> usize {
        lock(&self.links).len()
    }

    pub(crate) fn ensure_usable(&self) -> Result<(), RpcError> {
        self.service()?;
        if self.stopping.load(Ordering::SeqCst) {
            return Err(RpcError::Stopped);
        }
        Ok(())
    }

    pub(crate) fn new_id(&self) -> u64 {
        self.next_id.fetch_add(1, Ordering::Relaxed)
    }

    /// Waits until `waiter` is notified, serving the links meanwhile or leaving that to the thread that does already.
    ///
    /// A signal that arrives in the microseconds between a handler's end and the sleep is not seen by the sleep; a caller
    /// that must answer signals passes deadlines of a fraction of a second and waits again.
    pub fn wait(&self, waiter: &Waiter, deadline: Option<Instant>) -> WaitOutcome {
        if self.is_leading() {
            // A handler must not wait: nobody else could ever serve what it waits for.
            tracing::error!("a handler called wait; handlers must not wait");
            return WaitOutcome::Interrupted;
        }
        waiter.set_nudge(&self.nudge);
        loop {
            if waiter.take_notified() {
                return WaitOutcome::Notified;
            }
            if self.stopping.load(Ordering::SeqCst) {
                return WaitOutcome::Stopped;
            }
            if self.has_dirty.load(Ordering::Acquire) {
                self.flush_dirty();
            }
            let leads = match self.token.enter(waiter) {
                Entry::Lead => true,
                Entry::Follow => match self.follow(waiter, deadline) {
                    Ok(leads) => leads,
                    Err(outcome) => return outcome,
                },
            };
            if leads {
                let outcome = self.lead(Some(waiter), deadline);
                self.note_turn();
                if outcome == WaitOutcome::Stopped {
                    self.close_everything();
                }
                // A notification that came while leaving is the caller's, not the next wait's.
                return if waiter.take_notified() {
                    WaitOutcome::Notified
                } else {
                    outcome
                };
            }
        }
    }

    /// Follows until promoted (true), until there is news to look at (false), or until the wait is over.
    fn follow(&self, waiter: &Waiter, deadline: Option<Instant>) -> Result<bool, WaitOutcome> {
        let mut end = SleepEnd::Woken;
        if !self.spin_as_follower(waiter) {
            // Stopping sets its mark before it wakes the followers, so either we see it here or we are woken.
            if !self.stopping.load(Ordering::SeqCst) {
                end = waiter.sleep(deadline);
            }
        }
        let leads = self.token.stop_following(waiter);
        if waiter.take_notified() {
            if leads {
                self.leave_leadership();
            }
            return Err(WaitOutcome::Notified);
        }
        match end {
            SleepEnd::Woken => Ok(leads),
            SleepEnd::TimedOut | SleepEnd::Interrupted => {
                if leads {
                    self.leave_leadership();
                }
                Err(if end == SleepEnd::TimedOut {
                    WaitOutcome::TimedOut
                } else {
                    WaitOutcome::Interrupted
                })
            }
        }
    }

    /// Serves what is there, without blocking. Returns false if another thread leads.
    pub fn poll(&self) -> bool {
        if self.is_leading() || self.stopping.load(Ordering::SeqCst) || !self.token.try_enter() {
            return false;
        }
        self.lead_once();
        true
    }

    /// Leads until `stop`; for daemons, whose main thread does nothing else.
    pub fn run(&self) {
        let waiter = Waiter::new();
        while !self.stopping.load(Ordering::SeqCst) {
            let _ = self.wait(&waiter, None);
        }
        self.close_everything();
    }

    /// Starts the thread that serves the links while no other thread does.
    pub fn start_background(&self) -> Result<(), RpcError> {
        self.ensure_usable()?;
        self.start_background_thread()
    }

    /// Ends `run`, every wait and the background thread, and closes every link.
    pub fn stop(&self) {
        if self.stopping.swap(true, Ordering::SeqCst) {
            return;
        }
        self.token.stop_followers();
        self.nudge();
        self.stop_background_thread();
        if !self.is_leading() {
            self.close_everything();
        }
    }

    /// Whether `stop` was called.
    pub fn is_stopping(&self) -> bool {
        self.stopping.load(Ordering::SeqCst)
    }

    /// Has [`Service::on_wake`] called soon by the thread that leads. Any thread, never blocks.
    pub fn wake(&self) {
        if !self.wake_requested.swap(true, Ordering::SeqCst) {
            self.nudge_unless_leading();
        }
    }

    /// Has [`Service::on_timer`] called at `at`, if no earlier call is due.
    pub fn request_timer(&self, at: Instant) {
        let at = self.nanos(at);
        if self.timer_due.fetch_min(at, Ordering::SeqCst) > at {
            self.nudge_unless_leading();
        }
    }

    /// Time as the due words count it.
    pub(crate) fn nanos(&self, at: Instant) -> u64 {
        at.saturating_duration_since(self.epoch)
            .as_nanos()
            .min(u128::from(NEVER - 1)) as u64
    }

    pub(crate) fn next_due(&self) -> u64 {
        self.chores_due
            .load(Ordering::SeqCst)
            .min(self.timer_due.load(Ordering::SeqCst))
    }

    pub(crate) fn add_chore(&self, after: Duration, chore: Chore) {
        self.add_chore_at(Instant::now() + after, chore);
    }

    pub(crate) fn add_chore_at(&self, at: Instant, chore: Chore) {
        lock(&self.chores).insert((at, self.new_id()), chore);
        let due = self.nanos(at);
        if self.chores_due.fetch_min(due, Ordering::SeqCst) > due {
            self.nudge_unless_leading();
        }
    }

    pub(crate) fn release_link_at(&self, link: Arc<Link>, at: Instant) {
        self.add_chore_at(at, Chore::Release(link));
    }

    pub(crate) fn schedule_close(&self, link: Arc<Link>, graceful: bool) {
        let deadline = Instant::now() + self.config.linger_timeout;
        lock(&self.closing).push(Closing {
            link,
            graceful,
            deadline,
        });
        self.has_closing.store(true, Ordering::SeqCst);
        self.nudge_unless_leading();
    }

    /// A closing link has sent its last byte.
    pub(crate) fn look_at_closings(&self) {
        self.has_closing.store(true, Ordering::SeqCst);
        self.nudge_unless_leading();
    }

    pub(crate) fn add_dirty(&self, link: Option<Arc<Link>>, ask_background: bool) {
        let Some(link) = link else { return };
        lock(&self.dirty).push(link);
        self.has_dirty.store(true, Ordering::SeqCst);
        if ask_background {
            self.ask_for_cork_ticks();
        }
    }

    pub(crate) fn flush_dirty(&self) {
        self.has_dirty.store(false, Ordering::SeqCst);
        let links = std::mem::take(&mut *lock(&self.dirty));
        for link in links {
            link.flush_dirty(self);
        }
    }

    pub(crate) fn nudge(&self) {
        self.wake.nudge();
    }

    /// Gets whoever serves to look at what changed; the leader itself looks anyway before it sleeps.
    pub(crate) fn nudge_unless_leading(&self) {
        if !self.is_leading() {
            self.nudge();
        }
    }

    fn address(&self) -> usize {
        std::ptr::from_ref(self) as usize
    }

    pub(crate) fn is_leading(&self) -> bool {
        LEADING.get() == self.address()
    }

    pub(crate) fn set_leading(&self) -> LeadingMark {
        LeadingMark {
            before: LEADING.replace(self.address()),
        }
    }

    pub(crate) fn is_dispatching_batch(&self) -> bool {
        BATCH.get() == self.address()
    }

    pub(crate) fn set_batch(&self) -> BatchMark<'_> {
        BatchMark {
            reactor: self,
            before: BATCH.replace(self.address()),
        }
    }

    /// Gives the token on. Whoever sleeps in the background learns of what became due and of what this leader's last
    /// handlers asked for; an heir looks at that anyway.
    pub(crate) fn leave_leadership(&self) {
        let became_free = self.token.leave();
        if became_free
            && (self.background.sleeps_beyond(self.next_due())
                || self.wake_requested.load(Ordering::SeqCst)
                || self.has_closing.load(Ordering::SeqCst))
        {
            self.nudge();
        }
    }

    /// A waiting thread has led and left. Where that goes on in quick turns, arming the alarm each time costs more than
    /// the background thread's looking now and then.
    fn note_turn(&self) {
        let turns = self.turns.fetch_add(1, Ordering::Relaxed) + 1;
        let patrol_us = u64::from(self.config.patrol_us);
        if turns % TURNS_A_LOOK != 0 || patrol_us == 0 || !self.background.is_running() {
            return;
        }
        let now = self.nanos(Instant::now());
        let before = self.turns_seen_at.swap(now, Ordering::Relaxed);
        let quick = now.saturating_sub(before) < patrol_us * 1000 * TURNS_A_LOOK / QUICK_TURNS;
        if quick && self.token.begin_patrol() {
            self.background.signal();
        }
    }

    pub(crate) fn close_everything(&self) {
        // The last leader may still be on its way out; followers of it are woken by the stop.
        let limit = Instant::now() + Duration::from_secs(5);
        while !self.token.try_enter() {
            if Instant::now() >= limit {
                tracing::warn!("a thread still serves the links 5 s after the stop; it closes them");
                return;
            }
            std::thread::sleep(Duration::from_micros(200));
        }
        let _mark = self.set_leading();
        lock(&self.sources).clear();
        let links: Vec<Arc<Link>> = lock(&self.links).values().cloned().collect();
        for link in links {
            let sentence = format!(
                "the link to {} was closed because this process stops",
                link.description()
            );
            link.close(CloseReason::local(sentence));
        }
        self.finish_closings(true);
        self.token.leave();
    }

    pub(crate) fn count_refusal(&self) {
        count(&self.stats.handshakes_refused);
    }
}

impl AsFd for Reactor {
    /// Readable when a link has something: for an embedder's own poller.
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.inner.as_fd()
    }
}

/// Marks this thread as the leader while it lives.
pub(crate) struct LeadingMark {
    before: usize,
}

impl Drop for LeadingMark {
    fn drop(&mut self) {
        LEADING.set(self.before);
    }
}

/// Marks this thread as delivering a batch while it lives; what the batch's handlers sent leaves together at its end.
pub(crate) struct BatchMark<'a> {
    reactor: &'a Reactor,
    before: usize,
}

impl Drop for BatchMark<'_> {
    fn drop(&mut self) {
        BATCH.set(self.before);
        if self.reactor.has_dirty.load(Ordering::Acquire) {
            self.reactor.flush_dirty();
        }
    }
}
