//! The background thread: serves the links while no user thread does, and sends what corked links forgot.
//!
//! It sleeps on an outer epoll with two members: the link set, armed by whoever leaves the leadership, and a control
//! descriptor for stopping and for cork ticks.
//!
//! Invariants:
//! 1. It never holds the token while it sleeps.
//! 2. `sleeping_until` is stored before the due times are read a last time, so whoever makes a time due earlier either is
//!    seen here or sees that this thread sleeps too long.
//! 3. While any corked link has unsent frames and ticks were asked for, it looks every cork interval.
//! 4. While it patrols it looks at the links every patrol interval; it stops after one in which nobody led and left.

use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use rustix::event::epoll::{self, EventData, EventFlags};
use rustix::event::{eventfd, EventfdFlags};

use crate::error::RpcError;
use crate::reactor::{Reactor, NEVER};
use crate::stats::count;
use crate::sync::lock;

const CONTROL: u64 = 1;

/// The background thread's handle and what others tell it.
pub(crate) struct Background {
    control: OwnedFd,
    running: AtomicBool,
    ticking: AtomicBool,
    /// When it wakes of itself; 0 while it is awake or does not exist.
    sleeping_until: AtomicU64,
    thread: Mutex<Option<JoinHandle<()>>>,
}

impl Background {
    pub(crate) fn new(outer: &OwnedFd) -> Result<Self, RpcError> {
        let control = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)
            .map_err(|error| RpcError::io("create an eventfd", error))?;
        epoll::add(
            outer,
            &control,
            EventData::new_u64(CONTROL),
            EventFlags::IN | EventFlags::ET,
        )
        .map_err(|error| RpcError::io("fill an epoll", error))?;
        Ok(Self {
            control,
            running: AtomicBool::new(false),
            ticking: AtomicBool::new(false),
            sleeping_until: AtomicU64::new(0),
            thread: Mutex::new(None),
        })
    }

    /// Whether the thread sleeps and would sleep beyond `due`.
    pub(crate) fn sleeps_beyond(&self, due: u64) -> bool {
        due < self.sleeping_until.load(Ordering::SeqCst)
    }

    pub(crate) fn is_running(&self) -> bool {
        self.running.load(Ordering::SeqCst)
    }

    pub(crate) fn signal(&self) {
        // Edge-triggered like the wake descriptor: nobody needs to read it.
        let _ = rustix::io::write(&self.control, &1u64.to_ne_bytes());
    }
}

/// When the background thread looks by itself, and how many turns of others it had seen then.
#[derive(Default)]
struct Patrol {
    turns: u64,
    due: Option<u64>,
}

impl Patrol {
    /// When to look next; never where there is no patrol.
    fn next(&mut self, reactor: &Reactor) -> u64 {
        if self.due.is_none() && reactor.token.is_patrolled() {
            self.turns = reactor.turns.load(Ordering::Relaxed);
            let interval = Duration::from_micros(u64::from(reactor.config.patrol_us));
            self.due = Some(reactor.nanos(Instant::now() + interval));
        }
        self.due.unwrap_or(NEVER)
    }

    /// It is due. Whether to look, or else the patrol is over.
    fn goes_on(&mut self, reactor: &Reactor) -> bool {
        self.due = None;
        if reactor.turns.load(Ordering::Relaxed) != self.turns {
            return true;
        }
        // Nobody has led and left: either a thread leads all the time, or all are in user code.
        reactor.token.end_patrol();
        false
    }
}

impl Reactor {
    pub(crate) fn start_background_thread(&self) -> Result<(), RpcError> {
        let mut thread = lock(&self.background.thread);
        if thread.is_some() {
            return Ok(());
        }
        let reactor = self.this.upgrade().ok_or(RpcError::Stopped)?;
        self.background.running.store(true, Ordering::SeqCst);
        let handle = std::thread::Builder::new()
            .name("ray-links".into())
            .spawn(move || reactor.background_main())
            .map_err(|error| {
                self.background.running.store(false, Ordering::SeqCst);
                RpcError::io("start the background thread", error)
            })?;
        *thread = Some(handle);
        self.token.enable_background();
        Ok(())
    }

    pub(crate) fn stop_background_thread(&self) {
        let handle = lock(&self.background.thread).take();
        let Some(handle) = handle else { return };
        self.background.signal();
        if handle.thread().id() == std::thread::current().id() {
            // Stopped by a handler that this very thread runs; it ends when the handler returns.
            return;
        }
        if handle.join().is_err() {
            tracing::error!("the background thread ended with a panic");
        }
    }

    /// A corked link has unsent frames: have them looked after, should its user fall silent.
    pub(crate) fn ask_for_cork_ticks(&self) {
        if self.background.running.load(Ordering::SeqCst) {
            if !self.background.ticking.swap(true, Ordering::SeqCst) {
                self.background.signal();
            }
        } else {
            // No background thread: a daemon's leader looks after it before it sleeps again.
            self.nudge_unless_leading();
        }
    }

    fn background_main(self: Arc<Self>) {
        let mut events = Vec::with_capacity(4);
        let mut ignore_due = false;
        let mut patrol = Patrol::default();
        while !self.is_stopping() {
            let tick_ns = u64::from(self.config.cork_limit_us).max(1) * 1000;
            let ticking = self.background.ticking.load(Ordering::SeqCst);
            let mut due = if ignore_due { NEVER } else { self.next_due() };
            if ticking {
                due = due.min(self.nanos(Instant::now()) + tick_ns);
            }
            let patrol_due = patrol.next(&self);
            due = due.min(patrol_due);
            self.background.sleeping_until.store(due, Ordering::SeqCst);
            if !ignore_due && self.next_due() < due {
                self.background.sleeping_until.store(0, Ordering::SeqCst);
                continue;
            }
            events.clear();
            let timeout = self.timeout_until(due);
            let result = epoll::wait(
                &self.token.alarm().outer,
                rustix::buffer::spare_capacity(&mut events),
                timeout.as_ref(),
            );
            self.background.sleeping_until.store(0, Ordering::SeqCst);
            count(&self.stats.background_wakeups);
            if let Err(error) = result {
                if error != rustix::io::Errno::INTR {
                    tracing::error!(%error, "the background thread cannot wait for links");
                    std::thread::sleep(Duration::from_millis(100));
                }
                continue;
            }
            let links_call = events.iter().any(|event| {
                let data: EventData = event.data;
                data.u64() != CONTROL
            });
            if ticking {
                self.flush_stale();
            }
            ignore_due = false;
            let looks = patrol_due <= self.nanos(Instant::now()) && patrol.goes_on(&self);
            if links_call || looks || self.next_due() <= self.nanos(Instant::now()) {
                if self.token.try_enter() {
                    self.lead_until_idle();
                } else {
                    // Somebody leads and does what is due; it nudges when it leaves earlier than what is due then.
                    ignore_due = true;
                }
            }
        }
        self.background.running.store(false, Ordering::SeqCst);
        self.token.disable_background();
        // Where a handler on this thread called `stop`, nobody else closes the links.
        self.close_everything();
    }

    /// Flushes corked links whose oldest frame has waited too long; ends the ticks when no link is left.
    fn flush_stale(&self) {
        if !self.has_dirty.load(Ordering::SeqCst) {
            self.background.ticking.store(false, Ordering::SeqCst);
            // A link may have become dirty between the two; its sender saw the ticks on and did not signal.
            if self.has_dirty.load(Ordering::SeqCst) {
                self.background.ticking.store(true, Ordering::SeqCst);
            }
            return;
        }
        let limit = Duration::from_micros(u64::from(self.config.cork_limit_us));
        let links = std::mem::take(&mut *lock(&self.dirty));
        let (stale, fresh): (Vec<_>, Vec<_>) = links
            .into_iter()
            .partition(|link| link.dirty_since().is_none_or(|since| since.elapsed() >= limit));
        if fresh.is_empty() {
            self.has_dirty.store(false, Ordering::SeqCst);
        }
        let mut dirty = lock(&self.dirty);
        dirty.extend(fresh);
        if !dirty.is_empty() {
            self.has_dirty.store(true, Ordering::SeqCst);
        }
        drop(dirty);
        for link in stale {
            link.flush_dirty(self);
        }
    }
}
