//! Slots: where a process keeps what it knows of an object's value, and who waits for it.
//!
//! Invariants:
//! 1. `ready` is true iff the value is known (inline, or stored somewhere).
//! 2. Whoever registers a wake-up on a slot that is not ready is woken exactly once, when it becomes ready.
//! 3. `registered` names a group only while that group is among the wake-ups, or the slot is becoming ready.
//! 4. A slot that one thread waits for allocates nothing: a program waits for a million at once.

use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::sync::atomic::{AtomicBool, AtomicI64, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use ray_ids::TaskId;
use ray_rpc::{Link, Waiter};
use ray_wire::Address;

use crate::value::InlineValue;
use crate::WorkerError;

pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // No invariant of ours spans a panic: handlers do not unwind halfway through a step.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// What is known of a value.
#[derive(Debug, Clone, Default)]
pub enum SlotValue {
    /// Nothing yet.
    #[default]
    Pending,
    /// Here.
    Inline(Arc<InlineValue>),
    /// In object stores. `locations` is what a borrower was told; an owner keeps its own list.
    Stored {
        bytes: u64,
        locations: Option<Arc<Vec<Address>>>,
    },
}

/// Who is told when a slot becomes ready.
#[derive(Debug, Clone)]
pub(crate) enum Wake {
    /// A thread that waits for several.
    Group(Arc<Group>),
    /// An event loop.
    Queue(Arc<CompletionsInner>, u64),
    /// A call that has this object as an argument.
    Task(TaskId),
    /// A borrower that asked; the correlation of its question.
    Remote(Arc<Link>, u64),
}

/// The wake-ups of one slot: nearly always none, or one thread.
#[derive(Debug, Default)]
pub(crate) enum Wakes {
    #[default]
    None,
    Group(Arc<Group>),
    // The pointer keeps slots small.
    #[allow(clippy::box_collection)]
    Several(Box<Vec<Wake>>),
}

impl Wakes {
    fn push(&mut self, wake: Wake) {
        *self = match (std::mem::take(self), wake) {
            (Self::None, Wake::Group(group)) => Self::Group(group),
            (Self::None, wake) => Self::Several(Box::new(vec![wake])),
            (Self::Group(group), wake) => Self::Several(Box::new(vec![Wake::Group(group), wake])),
            (Self::Several(mut wakes), wake) => {
                wakes.push(wake);
                Self::Several(wakes)
            }
        };
    }

    fn has_group(&self, group: &Arc<Group>) -> bool {
        match self {
            Self::None => false,
            Self::Group(other) => Arc::ptr_eq(other, group),
            Self::Several(wakes) => wakes.iter().any(|wake| wake.is_group(group)),
        }
    }

    fn remove_group(&mut self, group: &Arc<Group>) {
        match self {
            Self::None => {}
            Self::Group(other) if Arc::ptr_eq(other, group) => *self = Self::None,
            Self::Group(_) => {}
            Self::Several(wakes) => wakes.retain(|wake| !wake.is_group(group)),
        }
    }

    fn take(&mut self, into: &mut Vec<Wake>) {
        match std::mem::take(self) {
            Self::None => {}
            Self::Group(group) => into.push(Wake::Group(group)),
            Self::Several(wakes) => into.extend(*wakes),
        }
    }
}

impl Wake {
    fn is_group(&self, group: &Arc<Group>) -> bool {
        matches!(self, Self::Group(other) if Arc::ptr_eq(other, group))
    }
}

#[derive(Debug, Default)]
struct SlotInner {
    value: SlotValue,
    wakes: Wakes,
}

/// What a process knows of one object's value.
#[derive(Debug, Default)]
pub struct Slot {
    ready: AtomicBool,
    /// The owner was asked and has not answered.
    asked: AtomicBool,
    /// The last scan over a list that came by: one that comes by twice has the reference twice.
    scan: AtomicU64,
    /// The number of the thread's group that registered last; 0 for none.
    registered: AtomicU64,
    inner: Mutex<SlotInner>,
}

impl Slot {
    /// Nothing is known.
    pub fn pending() -> Arc<Self> {
        Arc::default()
    }

    /// A value that is known.
    pub(crate) fn known(value: SlotValue) -> Arc<Self> {
        Arc::new(Self {
            ready: AtomicBool::new(true),
            inner: Mutex::new(SlotInner {
                value,
                wakes: Wakes::None,
            }),
            ..Self::default()
        })
    }

    /// A value that is here.
    pub fn inline(value: InlineValue) -> Arc<Self> {
        Self::known(SlotValue::Inline(Arc::new(value)))
    }

    /// A value that is in this node's store.
    pub fn stored(bytes: u64) -> Arc<Self> {
        Self::known(SlotValue::Stored { bytes, locations: None })
    }

    /// Whether the value is known.
    pub fn is_ready(&self) -> bool {
        self.ready.load(Ordering::Acquire)
    }

    /// What is known.
    pub fn value(&self) -> SlotValue {
        lock(&self.inner).value.clone()
    }

    /// Notes that the owner is asked for the value. Returns false where it was asked already and has not answered.
    pub(crate) fn note_asked(&self) -> bool {
        !self.asked.swap(true, Ordering::AcqRel)
    }

    /// The value is known now. Adds who is to be told to `wakes`.
    pub(crate) fn set(&self, value: SlotValue, wakes: &mut Vec<Wake>) {
        let mut inner = lock(&self.inner);
        inner.value = value;
        self.asked.store(false, Ordering::Release);
        self.ready.store(true, Ordering::Release);
        self.registered.store(0, Ordering::Relaxed);
        inner.wakes.take(wakes);
    }

    /// The value that was known is lost. Nobody waits for it yet.
    pub(crate) fn forget(&self) {
        let mut inner = lock(&self.inner);
        inner.value = SlotValue::Pending;
        self.asked.store(false, Ordering::Release);
        self.ready.store(false, Ordering::Release);
    }

    /// Registers a wake-up, unless the value is known. Returns whether it was registered.
    pub(crate) fn add_wake(&self, wake: Wake) -> bool {
        let mut inner = lock(&self.inner);
        if self.is_ready() {
            return false;
        }
        inner.wakes.push(wake);
        true
    }

    /// Whether this is the first time that the scan comes by. One scan runs on one thread, and two scans that run at the
    /// same time may hide a repetition from each other, so callers let only one run (they hold the interpreter's lock).
    pub fn is_first_in(&self, scan: u64) -> bool {
        let first = self.scan.load(Ordering::Relaxed) != scan;
        self.scan.store(scan, Ordering::Relaxed);
        first
    }

    /// Registers a thread's lasting group once, unless the value is known. Returns whether it is registered.
    pub(crate) fn register(&self, group: &Arc<Group>) -> bool {
        let mut inner = lock(&self.inner);
        if self.is_ready() {
            return false;
        }
        if !inner.wakes.has_group(group) {
            inner.wakes.push(Wake::Group(group.clone()));
        }
        self.registered.store(group.number, Ordering::Relaxed);
        true
    }

    /// Whether the group need not be registered: it will hear, or has heard, of the value.
    pub(crate) fn is_registered(&self, group: &Group) -> bool {
        self.registered.load(Ordering::Relaxed) == group.number
    }

    /// Takes back the wake-ups of a group whose thread waits no more.
    pub(crate) fn remove_group(&self, group: &Arc<Group>) {
        lock(&self.inner).wakes.remove_group(group);
    }
}

/// A number for one scan over a list of references; see `Slot::is_first_in`.
pub fn next_scan() -> u64 {
    static NEXT: AtomicU64 = AtomicU64::new(1);
    NEXT.fetch_add(1, Ordering::Relaxed)
}

thread_local! {
    /// The group that stays registered where its thread has waited, so that the next wait need not register again.
    static LASTING: Arc<Group> = Group::new(0);
}

/// A thread that waits until so many things have happened.
#[derive(Debug)]
pub(crate) struct Group {
    /// Below zero where more happened than was waited for.
    remaining: AtomicI64,
    number: u64,
    pub waiter: Waiter,
}

impl Group {
    pub fn new(count: usize) -> Arc<Self> {
        static NEXT: AtomicU64 = AtomicU64::new(1);
        Arc::new(Self {
            remaining: AtomicI64::new(count as i64),
            number: NEXT.fetch_add(1, Ordering::Relaxed),
            waiter: Waiter::new(),
        })
    }

    /// The calling thread's lasting group.
    pub fn lasting() -> Arc<Self> {
        LASTING.with(Arc::clone)
    }

    /// Begins a wait of a lasting group. Whatever becomes ready after this is counted; a look at the slots after this
    /// sees whatever became ready before, because both this and `arrive` read and write the word.
    pub fn begin(&self, count: usize) {
        self.remaining.swap(count as i64, Ordering::AcqRel);
    }

    /// One thing more to wait for; call it before the thing can happen.
    pub fn add(&self, count: usize) {
        self.remaining.fetch_add(count as i64, Ordering::AcqRel);
    }

    /// One of the things happened.
    pub fn arrive(&self) {
        if self.remaining.fetch_sub(1, Ordering::AcqRel) == 1 {
            self.waiter.notify();
        }
    }

    /// The waiting thread found so many of the things itself.
    pub fn found(&self, count: usize) {
        self.remaining.fetch_sub(count as i64, Ordering::AcqRel);
    }

    pub fn is_done(&self) -> bool {
        self.remaining.load(Ordering::Acquire) <= 0
    }
}

/// Tokens of what is done, for an event loop or a thread, with a descriptor to sleep on.
#[derive(Debug)]
pub(crate) struct CompletionsInner {
    tokens: crossbeam_queue::SegQueue<u64>,
    signalled: AtomicBool,
    descriptor: OwnedFd,
}

impl CompletionsInner {
    pub fn push(&self, token: u64) {
        self.tokens.push(token);
        if !self.signalled.swap(true, Ordering::AcqRel) {
            // A full counter is readable too, so that a failed write loses nothing.
            let _ = rustix::io::write(&self.descriptor, &1u64.to_ne_bytes());
        }
    }
}

/// Tokens of what is done. Clones are the same queue.
#[derive(Debug, Clone)]
pub struct Completions(pub(crate) Arc<CompletionsInner>);

impl Completions {
    /// An empty queue.
    pub fn new() -> Result<Self, WorkerError> {
        use rustix::event::{eventfd, EventfdFlags};
        let descriptor =
            eventfd(0, EventfdFlags::NONBLOCK | EventfdFlags::CLOEXEC).map_err(|source| WorkerError::Io {
                what: "create an eventfd",
                source: source.into(),
            })?;
        Ok(Self(Arc::new(CompletionsInner {
            tokens: crossbeam_queue::SegQueue::new(),
            signalled: AtomicBool::new(false),
            descriptor,
        })))
    }

    /// A descriptor that is readable when tokens wait.
    pub fn descriptor(&self) -> RawFd {
        self.0.descriptor.as_raw_fd()
    }

    /// Adds a token.
    pub fn push(&self, token: u64) {
        self.0.push(token);
    }

    /// Takes every token.
    pub fn drain(&self) -> Vec<u64> {
        // The flag falls before the tokens are read, so that a token pushed meanwhile signals again.
        let mut counter = [0; 8];
        let _ = rustix::io::read(&self.0.descriptor, &mut counter);
        self.0.signalled.store(false, Ordering::Release);
        let mut tokens = Vec::new();
        while let Some(token) = self.0.tokens.pop() {
            tokens.push(token);
        }
        tokens
    }
}

impl Completions {
    /// Waits until tokens are there. False: the time is over.
    pub fn wait(&self, limit: std::time::Duration) -> Result<bool, WorkerError> {
        use rustix::event::{poll, PollFd, PollFlags, Timespec};
        let mut descriptors = [PollFd::new(&self.0.descriptor, PollFlags::IN)];
        let limit = Timespec::try_from(limit).unwrap_or(Timespec {
            tv_sec: i64::MAX / 2,
            tv_nsec: 0,
        });
        match poll(&mut descriptors, Some(&limit)) {
            Ok(ready) => Ok(ready > 0),
            Err(rustix::io::Errno::INTR) => Ok(false),
            Err(source) => Err(WorkerError::Io {
                what: "wait for completions",
                source: source.into(),
            }),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_slot_is_small() {
        // With the counts of its `Arc` it fits the allocator's class of 88 bytes.
        assert!(std::mem::size_of::<Slot>() <= 72);
    }

    #[test]
    fn everybody_who_waits_is_told_once() {
        let slot = Slot::pending();
        let (first, second) = (Group::new(1), Group::new(1));
        let task = TaskId::random_in(ray_ids::ActorId::nil_in(ray_ids::JobId::from_int(1)));
        assert!(slot.add_wake(Wake::Group(first.clone())));
        assert!(slot.add_wake(Wake::Task(task)));
        assert!(slot.register(&second));
        assert!(slot.register(&second));
        slot.remove_group(&first);
        let mut wakes = Vec::new();
        slot.set(
            SlotValue::Stored {
                bytes: 1,
                locations: None,
            },
            &mut wakes,
        );
        assert!(
            matches!(&wakes[..], [Wake::Task(told), Wake::Group(group)] if *told == task && Arc::ptr_eq(group, &second))
        );
        assert!(!slot.add_wake(Wake::Group(first)));
    }

    #[test]
    fn one_waiting_thread_can_take_itself_back() {
        let slot = Slot::pending();
        let group = Group::new(1);
        assert!(slot.register(&group));
        slot.remove_group(&group);
        let mut wakes = Vec::new();
        slot.set(
            SlotValue::Inline(Arc::new(crate::replies::system_error(String::new()))),
            &mut wakes,
        );
        assert!(wakes.is_empty());
        assert!(slot.is_ready());
    }
}
