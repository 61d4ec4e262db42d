//! The leader token under loom: the shipping code with a played epoll.
//! Run: `RUSTFLAGS="--cfg loom" cargo test -p ray-rpc --release --test loom_token`.
#![cfg(loom)]

use std::sync::Arc;

use loom::sync::{Condvar, Mutex};
use loom::thread;
use ray_rpc::token::{Alarm, Entry, LeaderToken, Nudge, Waiter};

/// An epoll: events wait in it, a leader sleeps on it, and armed it wakes the background thread once.
#[derive(Default)]
struct Poller {
    state: Mutex<PollerState>,
    changed: Condvar,
}

#[derive(Default)]
struct PollerState {
    /// Indices of waiters whose answers have arrived.
    arrived: Vec<usize>,
    nudged: bool,
    armed: bool,
    ended: bool,
}

impl Poller {
    fn arrive(&self, answer: usize) {
        self.state.lock().unwrap().arrived.push(answer);
        self.changed.notify_all();
    }

    fn take(&self) -> Vec<usize> {
        let mut state = self.state.lock().unwrap();
        state.nudged = false;
        std::mem::take(&mut state.arrived)
    }

    fn sleep(&self) {
        let mut state = self.state.lock().unwrap();
        while state.arrived.is_empty() && !state.nudged {
            state = self.changed.wait(state).unwrap();
        }
    }

    /// The background thread's sleep: false when the test is over.
    fn sleep_armed(&self) -> bool {
        let mut state = self.state.lock().unwrap();
        loop {
            if state.ended {
                return false;
            }
            if state.armed && (!state.arrived.is_empty() || state.nudged) {
                // One shot.
                state.armed = false;
                return true;
            }
            state = self.changed.wait(state).unwrap();
        }
    }

    fn end(&self) {
        self.state.lock().unwrap().ended = true;
        self.changed.notify_all();
    }
}

impl Nudge for Poller {
    fn nudge(&self) {
        self.state.lock().unwrap().nudged = true;
        self.changed.notify_all();
    }
}

struct PollerAlarm(Arc<Poller>);

impl Alarm for PollerAlarm {
    fn arm(&self) {
        self.0.state.lock().unwrap().armed = true;
        self.0.changed.notify_all();
    }

    fn disarm(&self) {
        self.0.state.lock().unwrap().armed = false;
    }
}

struct Process {
    poller: Arc<Poller>,
    token: LeaderToken<PollerAlarm>,
    waiters: Vec<Waiter>,
    holders: Mutex<usize>,
}

impl Process {
    fn new(threads: usize) -> Arc<Self> {
        let poller = Arc::new(Poller::default());
        Arc::new(Self {
            token: LeaderToken::new(PollerAlarm(Arc::clone(&poller))),
            poller,
            waiters: (0..threads).map(|_| Waiter::new()).collect(),
            holders: Mutex::new(0),
        })
    }

    fn dispatch(&self) {
        {
            let mut holders = self.holders.lock().unwrap();
            *holders += 1;
            assert_eq!(*holders, 1, "one thread dispatches");
        }
        for answer in self.poller.take() {
            self.waiters[answer].notify();
        }
        *self.holders.lock().unwrap() -= 1;
    }

    /// `Reactor::wait` without sockets and time.
    fn wait(&self, own: usize, nudge: &Arc<dyn Nudge>) {
        let waiter = &self.waiters[own];
        waiter.set_nudge(nudge);
        loop {
            if waiter.take_notified() {
                return;
            }
            let leads = match self.token.enter(waiter) {
                Entry::Lead => true,
                Entry::Follow => {
                    waiter.sleep(None);
                    self.token.stop_following(waiter)
                }
            };
            if !leads {
                continue;
            }
            while !waiter.is_notified() {
                self.dispatch();
                if waiter.begin_poll() {
                    self.poller.sleep();
                    waiter.end_poll();
                }
            }
            self.token.leave();
        }
    }

    fn background(&self) {
        while self.poller.sleep_armed() {
            if self.token.try_enter() {
                self.dispatch();
                self.token.leave();
            }
        }
    }
}

fn check(preemptions: usize, body: impl Fn() + Sync + Send + 'static) {
    let mut builder = loom::model::Builder::new();
    builder.preemption_bound = Some(preemptions);
    builder.check(body);
}

/// Two threads wait, their answers arrive from a third: both return, whoever leads.
#[test]
fn every_waiter_gets_its_answer() {
    check(3, || {
        let process = Process::new(2);
        let nudge: Arc<dyn Nudge> = process.poller.clone();
        let other = {
            let (process, nudge) = (Arc::clone(&process), nudge.clone());
            thread::spawn(move || process.wait(1, &nudge))
        };
        let network = {
            let poller = Arc::clone(&process.poller);
            thread::spawn(move || {
                poller.arrive(1);
                poller.arrive(0);
            })
        };
        process.wait(0, &nudge);
        other.join().unwrap();
        network.join().unwrap();
        process.token.validate();
    });
}

/// A thread waits and leaves; what arrives then wakes the background thread: no wake-up is lost between leaving,
/// arming and sleeping.
#[test]
fn the_background_thread_serves_after_the_last_leader() {
    check(3, || {
        let process = Process::new(2);
        let nudge: Arc<dyn Nudge> = process.poller.clone();
        process.token.enable_background();
        let background = {
            let process = Arc::clone(&process);
            thread::spawn(move || process.background())
        };
        let network = {
            let poller = Arc::clone(&process.poller);
            thread::spawn(move || {
                poller.arrive(0);
                poller.arrive(1);
            })
        };
        process.wait(0, &nudge);
        // This thread is in user code now: only the background thread can notify the second waiter.
        network.join().unwrap();
        while !process.waiters[1].is_notified() {
            thread::yield_now();
        }
        process.poller.end();
        background.join().unwrap();
    });
}

/// A notification from outside the links reaches a leader in its sleep, a follower and a thread on its way in.
#[test]
fn a_notification_from_another_thread_is_never_lost() {
    check(3, || {
        let process = Process::new(2);
        let nudge: Arc<dyn Nudge> = process.poller.clone();
        let other = {
            let (process, nudge) = (Arc::clone(&process), nudge.clone());
            thread::spawn(move || process.wait(1, &nudge))
        };
        let notifier = {
            let waiters = process.waiters.clone();
            thread::spawn(move || {
                waiters[0].notify();
                waiters[1].notify();
            })
        };
        process.wait(0, &nudge);
        other.join().unwrap();
        notifier.join().unwrap();
        process.token.validate();
    });
}

/// While the background thread patrols, leaving arms nothing; the patrol's end does, whatever came before or after it.
#[test]
fn what_arrives_during_a_patrol_is_served_after_it() {
    check(3, || {
        let process = Process::new(2);
        let nudge: Arc<dyn Nudge> = process.poller.clone();
        process.token.enable_background();
        assert!(process.token.begin_patrol());
        let background = {
            let process = Arc::clone(&process);
            thread::spawn(move || {
                process.token.end_patrol();
                process.background();
            })
        };
        let network = {
            let poller = Arc::clone(&process.poller);
            thread::spawn(move || {
                poller.arrive(0);
                poller.arrive(1);
            })
        };
        process.wait(0, &nudge);
        network.join().unwrap();
        while !process.waiters[1].is_notified() {
            thread::yield_now();
        }
        process.token.validate();
        process.poller.end();
        background.join().unwrap();
    });
}
