//! Cancelling calls: our own, wherever they are, and those of others that run here.
//!
//! Invariant: 1. A call is signalled only while its own code runs, under the same lock that says so.

use ray_ids::{ObjectId, TaskId};
use ray_wire::{id_bytes, kinds, CancelTask, DeathCause, WorkerExiting, REPLY_CANCELLED};

use crate::inner::{CoreWorker, Inner};
use crate::slot::lock;
use crate::WorkerError;

use crate::execute::*;

impl Inner {
    /// The caller wants a call given up.
    pub fn on_cancel_task(&self, message: &CancelTask) -> Result<(), WorkerError> {
        let task_id = TaskId::from_binary(&message.task_id).map_err(ray_wire::WireError::from)?;
        let mut state = lock(&self.execution.state);
        let queued = state
            .work
            .iter()
            .position(|work| matches!(work, Work::Task(task) if task.task_id == task_id));
        if let Some(Work::Task(task)) = queued.and_then(|at| state.work.remove(at)) {
            drop(state);
            return self.refuse(
                &task.link,
                task.correlation,
                REPLY_CANCELLED,
                "cancelled before it started",
            );
        }
        let on_main = state.main_task == Some(task_id);
        let Some(cancelled) = state.running.get_mut(&task_id) else {
            return Ok(());
        };
        *cancelled = true;
        if message.force {
            drop(state);
            let cause = DeathCause {
                kind: ray_wire::DEATH_KILLED,
                message: "the task was cancelled with force=True".into(),
                exit_code: Some(1),
                pid: std::process::id(),
                ..DeathCause::default()
            };
            let _ = self.raylet.send(
                kinds::WORKER_EXITING,
                0,
                ray_wire::encode(&WorkerExiting { cause: Some(cause) }),
                &[],
            );
            self.raylet.flush();
            // SAFETY: leaves at once, as the caller demands; nothing of this process is needed any more.
            unsafe { libc::_exit(1) };
        }
        if on_main {
            if let Some((_, thread)) = self.execution.main_thread.get() {
                // SAFETY: the main thread lives as long as the process.
                unsafe { libc::pthread_kill(*thread, libc::SIGINT) };
            }
        } else {
            state.work.push_front(Work::Cancel(task_id));
            drop(state);
            self.execution.waiter.notify();
        }
        Ok(())
    }
}

impl CoreWorker {
    /// Cancels a call of ours. With `force` its worker is killed; with `recursive` what it called is cancelled too.
    pub fn cancel(&self, object: &ObjectId, force: bool, recursive: bool) -> Result<(), WorkerError> {
        let mut state = self.0.enter()?;
        self.0.cancel_task(&mut state, object.task_id(), force, recursive);
        Ok(())
    }
}

impl Inner {
    /// Cancels a pending call of this process, wherever it is.
    pub fn cancel_task(&self, state: &mut crate::inner::State, task_id: TaskId, force: bool, recursive: bool) {
        let Some(task) = state.tasks.get_mut(&task_id) else {
            return;
        };
        task.cancelled = true;
        task.retries_left = 0;
        let spec = task.spec.clone();
        if let Some(actor) = spec.actor {
            if state
                .actors
                .get_mut(&actor)
                .is_some_and(|entry| entry.calls.cancel_waiting(task_id))
            {
                return self.finish_cancelled(state, task_id);
            }
        } else {
            let mut commands = Vec::new();
            let queued = state.leases.cancel_queued(task_id, spec.template.class, &mut commands);
            self.carry_out_leases(state, commands);
            if queued || state.tasks.get(&task_id).is_some_and(|task| task.unresolved > 0) {
                return self.finish_cancelled(state, task_id);
            }
        }
        let worker = match spec.actor.and_then(|actor| state.actors.get(&actor)) {
            Some(entry) => match entry.calls.status() {
                ray_ownership::actor_calls::ActorStatus::Alive { worker, .. } => Some(*worker),
                _ => None,
            },
            None => state.leases.lease_of(&task_id).map(|(_, lease)| lease.worker),
        };
        if let Some(Ok(link)) = worker.map(|worker| self.worker_link(state, worker)) {
            let message = CancelTask {
                task_id: id_bytes(task_id.as_bytes()),
                force,
                recursive,
            };
            let _ = crate::session::send(&link, kinds::CANCEL_TASK, 0, ray_wire::encode(&message), &[]);
        }
    }

    /// Cancels what a task called.
    pub fn cancel_children(&self, parent: TaskId, force: bool) {
        let mut state = self.lock();
        let children: Vec<TaskId> = state
            .tasks
            .iter()
            .filter(|(_, task)| task.spec.parent == parent)
            .map(|(id, _)| *id)
            .collect();
        for child in children {
            self.cancel_task(&mut state, child, force, true);
        }
    }
}
