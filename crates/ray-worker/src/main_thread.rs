//! The thread that runs work: takes it from the queue, says what starts, frees its CPU while it waits.
//!
//! Invariants:
//! 1. Before user code of a lease's call runs, its sequence is in the evidence word.
//! 2. A plain task that waits holds no unstarted call of its owner: they go back first.
//! 3. Where an event loop runs on this thread, its poller's news are noted before the thread is woken, and taken before
//!    the poller is looked at, so that none is missed.

use std::os::fd::BorrowedFd;
use std::sync::atomic::Ordering;
use std::sync::Arc;
use std::time::Instant;

use bytes::Bytes;
use ray_ids::{ActorId, LeaseId, TaskId};
use ray_rpc::WaitOutcome;
use ray_wire::{id_bytes, kinds, LeaseAssigned, WorkerBlocked, WorkerUnblocked};

use crate::gcs::{interrupted, WAIT_SLICE};
use crate::inner::{CoreWorker, Inner, Reference};
use crate::slot::{lock, SlotValue};
use crate::value::Value;
use crate::WorkerError;

use crate::execute::*;

/// Under which the reactor watches an event loop's poller.
const TOKEN_EVENT_LOOP: u64 = 1;

impl Inner {
    /// A descriptor that is watched has news: there is only the event loop's poller.
    pub fn on_descriptor_ready(&self, token: u64) {
        if token == TOKEN_EVENT_LOOP {
            self.execution.poller_has_news.store(true, Ordering::Release);
            self.execution.waiter.notify();
        }
    }

    /// A thread is about to wait. A plain task on the main thread frees its CPU and gives back what it has not started.
    pub fn blocked(&self, what: &str) -> Blocked<'_> {
        let lease = {
            let state = lock(&self.execution.state);
            let plain = state.actor.is_none() && state.main_task.is_some() && self.execution.is_main_thread();
            state.lease.filter(|_| plain)
        };
        let Some(lease) = lease else {
            return Blocked {
                core: self,
                lease: None,
            };
        };
        let first = {
            let mut state = lock(&self.execution.state);
            state.blocked += 1;
            state.blocked == 1
        };
        if !first {
            lock(&self.execution.state).blocked -= 1;
            return Blocked {
                core: self,
                lease: None,
            };
        }
        self.give_back(None);
        let message = WorkerBlocked {
            lease_id: id_bytes(lease.as_bytes()),
            reason: what.into(),
        };
        let _ = self
            .raylet
            .send(kinds::WORKER_BLOCKED, 0, ray_wire::encode(&message), &[]);
        Blocked {
            core: self,
            lease: Some(lease),
        }
    }
}

/// While it lives, this worker's CPU is free.
pub(crate) struct Blocked<'a> {
    core: &'a Inner,
    lease: Option<LeaseId>,
}

impl Drop for Blocked<'_> {
    fn drop(&mut self) {
        if let Some(lease) = self.lease {
            lock(&self.core.execution.state).blocked -= 1;
            let message = WorkerUnblocked {
                lease_id: id_bytes(lease.as_bytes()),
            };
            let _ = self
                .core
                .raylet
                .send(kinds::WORKER_UNBLOCKED, 0, ray_wire::encode(&message), &[]);
        }
    }
}

impl CoreWorker {
    /// Makes the calling thread the one that runs work.
    pub fn begin_execution(&self) {
        // SAFETY: asks for the calling thread's own name.
        let thread = unsafe { libc::pthread_self() };
        let _ = self.0.execution.main_thread.set((std::thread::current().id(), thread));
    }

    /// What to do next, if it is here already.
    pub fn next_work_here(&self) -> Option<Work> {
        let mut state = lock(&self.0.execution.state);
        let work = state.work.pop_front();
        if let Some(Work::Task(task)) = &work {
            state.running.insert(task.task_id, false);
        }
        work
    }

    /// What to do next; waits for it. `None` after a signal, so that the language can look at it.
    pub fn next_work(&self) -> Option<Work> {
        loop {
            if let Some(work) = self.next_work_here().or_else(|| self.reason_to_exit()) {
                return Some(work);
            }
            let limit = Instant::now() + 10 * WAIT_SLICE;
            match self.0.reactor.wait(&self.0.execution.waiter, Some(limit)) {
                WaitOutcome::Interrupted | WaitOutcome::TimedOut if interrupted() => return None,
                WaitOutcome::Stopped => return Some(Work::Exit("the runtime was stopped".into())),
                _ => {}
            }
        }
    }

    /// Why no further work can come, as work.
    pub fn reason_to_exit(&self) -> Option<Work> {
        if self.0.shut_down.load(Ordering::Acquire) {
            return Some(Work::Exit("the runtime was shut down".into()));
        }
        let state = self.0.lock();
        let reason = state.raylet_gone.as_ref()?;
        Some(Work::Exit(format!("the raylet is gone: {reason}")))
    }

    /// An event loop runs on the thread that runs work; `poller` is what it sleeps on for everything else.
    pub fn watch_event_loop(&self, poller: BorrowedFd<'_>) -> Result<(), WorkerError> {
        self.0.reactor.watch_descriptor_edges(poller, TOKEN_EVENT_LOOP)?;
        self.0.execution.runs_event_loop.store(true, Ordering::Release);
        Ok(())
    }

    /// Waits for work or for news of the event loop's poller, at most until the deadline, or until a signal.
    pub fn wait_for_event_loop(&self, deadline: Option<Instant>) {
        let execution = &self.0.execution;
        let longest = Instant::now() + 10 * WAIT_SLICE;
        let deadline = deadline.map_or(longest, |deadline| deadline.min(longest));
        while !execution.poller_has_news.load(Ordering::Acquire) && !self.has_work() {
            match self.0.reactor.wait(&execution.waiter, Some(deadline)) {
                WaitOutcome::Notified => {}
                _ => return,
            }
        }
    }

    /// Whether work is here.
    pub fn has_work(&self) -> bool {
        !lock(&self.0.execution.state).work.is_empty()
    }

    /// Whether the event loop's poller may have something since this was asked last.
    pub fn take_poller_news(&self) -> bool {
        self.0.execution.poller_has_news.swap(false, Ordering::AcqRel)
    }

    /// Whether every argument of the call can be read without waiting for another node or the disk.
    pub fn arguments_are_here(&self, task: &Incoming) -> bool {
        let mut arguments = task.references.iter().chain(&task.values_reference);
        arguments.all(|argument| {
            argument.value.is_some() || self.0.store().is_ok_and(|store| store.contains(&argument.object))
        })
    }

    /// User code of the call begins, on the main thread or elsewhere. False: it was cancelled before.
    #[must_use]
    pub fn starting(&self, task: &Incoming, on_main: bool) -> bool {
        self.0.execution.depth.store(task.depth, Ordering::Relaxed);
        if let Some(evidence) = self.0.evidence.get().filter(|_| task.lease.is_some()) {
            evidence.starting(task.sequence);
        }
        let mut state = lock(&self.0.execution.state);
        if state.running.get(&task.task_id).copied().unwrap_or(false) {
            return false;
        }
        if on_main {
            state.main_task = Some(task.task_id);
        }
        true
    }

    /// User code on the main thread is over: an interrupt that comes now is too late.
    pub fn user_code_ended(&self) {
        lock(&self.0.execution.state).main_task = None;
    }

    /// Whether a signal on the main thread is a cancellation of what runs there.
    pub fn is_interrupt_wanted(&self) -> bool {
        let state = lock(&self.0.execution.state);
        state
            .main_task
            .is_some_and(|task| state.running.get(&task).copied().unwrap_or(false))
    }

    /// Whether the call was cancelled while it ran.
    pub fn is_cancelled(&self, task: &TaskId) -> bool {
        lock(&self.0.execution.state)
            .running
            .get(task)
            .copied()
            .unwrap_or(false)
    }

    /// Leaves after what runs now.
    pub fn exit_after_call(&self, reason: &str) {
        // The first reason is the cause of those after it: `exit_actor` raises SystemExit.
        let mut state = lock(&self.0.execution.state);
        state.exiting.get_or_insert_with(|| reason.to_owned());
    }

    /// Whether the worker is to leave.
    pub fn is_exiting(&self) -> Option<String> {
        lock(&self.0.execution.state).exiting.clone()
    }

    /// The lease's resources, instances and job, as the raylet last said.
    pub fn assigned(&self) -> Option<LeaseAssigned> {
        lock(&self.0.execution.state).assigned.as_deref().cloned()
    }

    /// The actor that this worker is, with its incarnation.
    pub fn actor(&self) -> Option<(ActorId, u64)> {
        lock(&self.0.execution.state).actor
    }

    /// A counted handle to the actor that this worker is, and the description of its methods.
    pub fn own_actor_handle(&self) -> Result<(ActorId, Reference, Bytes), WorkerError> {
        let (actor, origin) = {
            let state = lock(&self.0.execution.state);
            (state.actor, state.actor_origin.clone())
        };
        let (Some((actor, _)), Some((owner, metadata))) = (actor, origin) else {
            return Err(WorkerError::Invalid("this process is no actor".into()));
        };
        let reference = self.receive_reference(crate::actors::handle_object(actor), &owner, None, None)?;
        Ok((actor, reference, metadata))
    }

    /// The value of an argument, and the reference that keeps it while the call runs.
    pub fn resolve_argument(
        &self,
        task: &Incoming,
        argument: &ArgumentReference,
    ) -> Result<(Value, Option<Reference>), crate::GetFailure> {
        if let Some(value) = &argument.value {
            return Ok((Value::Inline(Arc::new(value.clone())), None));
        }
        let reference = self.receive_reference(argument.object, &argument.owner, Some(task.task_id), None)?;
        if !argument.locations.is_empty() && !reference.slot.is_ready() {
            let mut state = self.0.enter()?;
            for location in &argument.locations {
                self.0.note_address(&mut state, location);
            }
            let stored = SlotValue::Stored {
                bytes: 0,
                locations: Some(Arc::new(argument.locations.clone())),
            };
            self.0.set_and_tell(&mut state, argument.object, stored);
        }
        let value = self.get(&[&reference], None)?.pop();
        value
            .map(|value| (value, Some(reference)))
            .ok_or_else(|| crate::GetFailure::Worker(WorkerError::UnknownObject(argument.object.hex())))
    }
}
