//! The leader token: which thread of a process reads and dispatches its links.
//!
//! One thread at a time leads. Others that wait sleep on their own word until a handler notifies them or the leader
//! promotes them. When the last leader leaves, the alarm is armed, which wakes the background thread as soon as a link
//! has something. The token knows neither sockets nor epoll; the alarm is a trait, and this code runs under loom.
//!
//! Invariants:
//! 1. At most one thread holds the token.
//! 2. The token is free only while no unnotified waiter follows and, where there is a background thread, the alarm is
//!    armed or the background thread patrols: a wake-up cannot be lost.
//! 3. A follower that was promoted holds the token, whatever woke it, until it leaves.
//! 4. The alarm is armed and disarmed only under the token's lock, so the two never cross.
//! 5. A patrol begins and ends under the token's lock, and its end arms the alarm if the token is free.

use std::collections::VecDeque;
use std::time::Instant;

use crate::sync::{lock, Arc, Mutex, ParkingWord, SleepEnd};

const NOTIFIED: u32 = 1;
const PROMOTED: u32 = 2;
const SLEEPING: u32 = 4;
const POLLING: u32 = 8;
const STOPPED: u32 = 16;

/// What wakes the background thread while nobody leads.
pub trait Alarm {
    /// From now on the background thread wakes as soon as there is something to read, at once where there is already.
    fn arm(&self);
    /// A thread leads: the background thread may sleep.
    fn disarm(&self);
}

/// What gets a leader out of its sleep in the poller.
pub trait Nudge: Send + Sync {
    /// The sleep ends soon, or does not begin.
    fn nudge(&self);
}

struct WaiterInner {
    word: ParkingWord,
    nudge: Mutex<Option<Arc<dyn Nudge>>>,
}

/// One blocked user thread. Clones name the same thread's wait.
#[derive(Clone)]
pub struct Waiter(Arc<WaiterInner>);

impl std::fmt::Debug for Waiter {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Waiter({:#x})", self.0.word.bits())
    }
}

impl Default for Waiter {
    fn default() -> Self {
        Self::new()
    }
}

impl Waiter {
    /// A waiter that nobody has notified.
    pub fn new() -> Self {
        Self(Arc::new(WaiterInner {
            word: ParkingWord::default(),
            nudge: Mutex::new(None),
        }))
    }

    /// Ends the wait, or the next one if none is under way. Any thread, any time, never blocks.
    pub fn notify(&self) {
        let before = self.0.word.set(NOTIFIED);
        if before & NOTIFIED != 0 {
            return;
        }
        if before & SLEEPING != 0 {
            self.0.word.wake();
        }
        if before & POLLING != 0 {
            let nudge = lock(&self.0.nudge).clone();
            if let Some(nudge) = nudge {
                nudge.nudge();
            }
        }
    }

    /// Whether a notification waits to be taken.
    pub fn is_notified(&self) -> bool {
        self.0.word.bits() & NOTIFIED != 0
    }

    /// Takes the notification, if there is one.
    pub fn take_notified(&self) -> bool {
        self.is_notified() && self.0.word.clear(NOTIFIED) & NOTIFIED != 0
    }

    /// Says how a leader with this waiter is woken from the poller.
    pub fn set_nudge(&self, nudge: &Arc<dyn Nudge>) {
        let mut current = lock(&self.0.nudge);
        if !current.as_ref().is_some_and(|known| Arc::ptr_eq(known, nudge)) {
            *current = Some(Arc::clone(nudge));
        }
    }

    /// The leader is about to sleep in the poller; false if it must not, because it is notified.
    pub fn begin_poll(&self) -> bool {
        if self.0.word.set(POLLING) & NOTIFIED != 0 {
            self.0.word.clear(POLLING);
            return false;
        }
        true
    }

    /// The leader is out of the poller.
    pub fn end_poll(&self) {
        self.0.word.clear(POLLING);
    }

    /// Whether a follower has a reason to stop following.
    pub fn has_news(&self) -> bool {
        self.0.word.bits() & (NOTIFIED | PROMOTED | STOPPED) != 0
    }

    /// Sleeps as a follower until notified, promoted or stopped, at most until the deadline.
    pub fn sleep(&self, deadline: Option<Instant>) -> SleepEnd {
        let before = self.0.word.set(SLEEPING);
        let end = if before & (NOTIFIED | PROMOTED | STOPPED) != 0 {
            SleepEnd::Woken
        } else {
            self.0.word.sleep_while(before | SLEEPING, deadline)
        };
        self.0.word.clear(SLEEPING);
        end
    }

    fn is_same(&self, other: &Waiter) -> bool {
        Arc::ptr_eq(&self.0, &other.0)
    }
}

/// What a thread that wants to wait becomes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Entry {
    /// It holds the token.
    Lead,
    /// Somebody else does; sleep on the waiter, then call `stop_following`.
    Follow,
}

struct State {
    held: bool,
    armed: bool,
    background: bool,
    /// The background thread looks by itself every moment, so that leaving need not arm the alarm.
    patrolled: bool,
    followers: VecDeque<Waiter>,
}

/// The token.
pub struct LeaderToken<A: Alarm> {
    state: Mutex<State>,
    alarm: A,
}

impl<A: Alarm> LeaderToken<A> {
    /// A free token without a background thread.
    pub fn new(alarm: A) -> Self {
        Self {
            state: Mutex::new(State {
                held: false,
                armed: false,
                background: false,
                patrolled: false,
                followers: VecDeque::new(),
            }),
            alarm,
        }
    }

    /// The alarm.
    pub fn alarm(&self) -> &A {
        &self.alarm
    }

    /// Takes the token, or queues behind its holder.
    pub fn enter(&self, waiter: &Waiter) -> Entry {
        let mut state = lock(&self.state);
        if state.held {
            state.followers.push_back(waiter.clone());
            return Entry::Follow;
        }
        self.take(&mut state);
        Entry::Lead
    }

    /// Takes the token if it is free.
    pub fn try_enter(&self) -> bool {
        let mut state = lock(&self.state);
        if state.held {
            return false;
        }
        self.take(&mut state);
        true
    }

    fn take(&self, state: &mut State) {
        state.held = true;
        if state.armed {
            state.armed = false;
            self.alarm.disarm();
        }
    }

    /// Gives the token to a follower that still waits, or arms the alarm. Returns whether the token became free.
    pub fn leave(&self) -> bool {
        let mut state = lock(&self.state);
        debug_assert!(state.held, "only the holder leaves");
        // A follower that is notified is on its way out; promoting it would only pass the token through a late thread.
        let heir = state.followers.iter().position(|waiter| !waiter.is_notified());
        if let Some(heir) = heir.and_then(|index| state.followers.remove(index)) {
            if heir.0.word.set(PROMOTED) & SLEEPING != 0 {
                heir.0.word.wake();
            }
            return false;
        }
        state.held = false;
        self.watch(&mut state);
        true
    }

    /// A free token is watched by the alarm, where no patrol does.
    fn watch(&self, state: &mut State) {
        if state.background && !state.held && !state.armed && !state.patrolled {
            state.armed = true;
            self.alarm.arm();
        }
    }

    /// Until `end_patrol` the background thread looks by itself every moment. False: it does already, or there is none.
    pub fn begin_patrol(&self) -> bool {
        let mut state = lock(&self.state);
        state.background && !std::mem::replace(&mut state.patrolled, true)
    }

    /// Whether the background thread is to look by itself.
    pub fn is_patrolled(&self) -> bool {
        lock(&self.state).patrolled
    }

    /// The background thread relies on the alarm again.
    pub fn end_patrol(&self) {
        let mut state = lock(&self.state);
        state.patrolled = false;
        self.watch(&mut state);
    }

    /// Ends following. True if this thread was promoted meanwhile and holds the token now.
    pub fn stop_following(&self, waiter: &Waiter) -> bool {
        let mut state = lock(&self.state);
        if let Some(index) = state.followers.iter().position(|other| other.is_same(waiter)) {
            state.followers.remove(index);
        }
        waiter.0.word.clear(STOPPED);
        waiter.0.word.clear(PROMOTED) & PROMOTED != 0
    }

    /// From now on a background thread answers the alarm.
    pub fn enable_background(&self) {
        let mut state = lock(&self.state);
        state.background = true;
        self.watch(&mut state);
    }

    /// The background thread is gone.
    pub fn disable_background(&self) {
        let mut state = lock(&self.state);
        state.background = false;
        state.patrolled = false;
        if state.armed {
            state.armed = false;
            self.alarm.disarm();
        }
    }

    /// Wakes every follower without promoting any: the reactor stops.
    pub fn stop_followers(&self) {
        let state = lock(&self.state);
        for waiter in &state.followers {
            if waiter.0.word.set(STOPPED) & SLEEPING != 0 {
                waiter.0.word.wake();
            }
        }
    }

    /// Checks invariants that hold whenever no thread is inside a call.
    pub fn validate(&self) {
        let state = lock(&self.state);
        if !state.held {
            assert!(
                !state.background || state.armed || state.patrolled,
                "a free token is watched"
            );
            assert!(
                state.followers.iter().all(Waiter::is_notified),
                "nobody follows a free token"
            );
        } else {
            assert!(!state.armed, "a held token is not watched");
        }
    }
}
