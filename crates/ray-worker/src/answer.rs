//! Answering calls: returns, items of generators, constructors, and what the worker keeps of a call's borrows.
//!
//! Invariants:
//! 1. A reply leaves after what its returns contain is held and what the worker keeps is listed.
//! 2. A generator's item waits while its consumer is too far behind, and never for a consumer that is gone.

use std::sync::atomic::Ordering;
use std::time::Instant;

use bytes::Bytes;
use ray_ids::ObjectId;
use ray_wire::{
    id_bytes, kinds, ActorCreated, DeathCause, GeneratorItem, RetainedBorrow, ReturnValue, TaskReply, WorkerExiting,
    REPLY_CANCELLED, REPLY_EXCEPTION, REPLY_OK,
};

use crate::gcs::WAIT_SLICE;
use crate::inner::CoreWorker;
use crate::session::{is_alive, send};
use crate::slot::{lock, Group};
use crate::value::{Contained, Serialized};
use crate::WorkerError;

use crate::execute::*;

impl CoreWorker {
    /// Sends one item of a generator, then waits while its consumer is too far behind for another to be made. False: the
    /// consumer is gone.
    pub fn send_item(&self, task: &Incoming, index: u64, value: Serialized) -> Result<bool, WorkerError> {
        {
            let mut progress = lock(&task.items.state);
            if progress.abandoned {
                return Ok(false);
            }
            progress.sent = index + 1;
        }
        if index < task.watermark {
            return Ok(true);
        }
        let object = task.item_id(index);
        let (item, payload) = self.return_value(task, object, value)?;
        let message = GeneratorItem {
            task_id: id_bytes(task.task_id.as_bytes()),
            index,
            item: Some(item),
            attempt: task.attempt,
        };
        send(
            &task.link,
            kinds::GENERATOR_ITEM,
            task.correlation,
            ray_wire::encode(&message),
            &payload,
        )?;
        self.wait_for_consumer(task, index + 1)
    }

    /// Waits until the item of this index may be made. False: the consumer is gone.
    fn wait_for_consumer(&self, task: &Incoming, next: u64) -> Result<bool, WorkerError> {
        let backpressure = u64::from(task.template.generator_backpressure);
        loop {
            let group = Group::new(1);
            {
                let mut progress = lock(&task.items.state);
                if progress.abandoned {
                    return Ok(false);
                }
                if backpressure == 0 || next < progress.consumed + backpressure {
                    return Ok(true);
                }
                progress.waiting = Some(group.clone());
            }
            if self.is_cancelled(&task.task_id) {
                return Ok(false);
            }
            let slice = Instant::now() + WAIT_SLICE;
            match self.0.wait_for(&group.waiter, Some(slice), "the consumer", || {
                group.is_done().then_some(())
            }) {
                Ok(()) | Err(WorkerError::Timeout { .. }) if is_alive(&task.link) => {}
                Ok(()) | Err(WorkerError::Timeout { .. }) => return Ok(false),
                Err(error) => return Err(error),
            }
        }
    }

    /// How many items were sent.
    pub fn items_sent(&self, task: &Incoming) -> u64 {
        lock(&task.items.state).sent
    }

    /// One return in its place: inline, or in the store for the caller; what it contains is held.
    fn return_value(
        &self,
        task: &Incoming,
        object: ObjectId,
        value: Serialized,
    ) -> Result<(ReturnValue, Vec<Bytes>), WorkerError> {
        let inner: Vec<ObjectId> = value.contained.iter().map(|contained| contained.object).collect();
        let mut payload = Vec::new();
        let returned = if value.size() <= ray_wire::INLINE_LIMIT_BYTES {
            let value = value.into_inline();
            value.append(&mut payload);
            ReturnValue {
                value: Some(value.layout()),
                object_id: id_bytes(object.as_bytes()),
                ..ReturnValue::default()
            }
        } else {
            let bytes = self.0.write_to_store(object, &value, task.caller_id)?;
            ReturnValue {
                stored_bytes: bytes,
                contained: value.contained.iter().map(Contained::info).collect(),
                object_id: id_bytes(object.as_bytes()),
                ..ReturnValue::default()
            }
        };
        if !inner.is_empty() {
            let mut state = self.0.enter()?;
            let mut commands = Vec::new();
            self.0.note_address(&mut state, &task.caller);
            state
                .refs
                .hold_return(task.task_id, task.caller_id, &inner, &mut commands);
            self.0.carry_out_references(&mut state, commands);
        }
        Ok((returned, payload))
    }

    /// Answers a call. An error means that no answer was sent yet: answer again with an exception. `corked`: the answer
    /// may wait for others, until `flush_replies`.
    pub fn reply(&self, task: &Incoming, outcome: Outcome, corked: bool) -> Result<(), WorkerError> {
        if task.creation.is_some() {
            return self.reply_creation(task, outcome);
        }
        let mut reply = TaskReply::default();
        let mut payload = Vec::new();
        match outcome {
            Outcome::Returns(values) => {
                for (index, value) in values.into_iter().enumerate() {
                    reply.wants_acknowledgement |= !value.contained.is_empty();
                    let placed = self.return_value(task, task.return_id(index as u32), value);
                    let (returned, segments) = placed.inspect_err(|_| self.take_back_returns(task, &reply.returns))?;
                    reply.returns.push(returned);
                    payload.extend(segments);
                }
                reply.status = REPLY_OK;
            }
            Outcome::Exception { value, retryable } => {
                for index in 0..task.returns() {
                    let (returned, segments) = self.return_value(task, task.return_id(index), value.clone())?;
                    reply.returns.push(returned);
                    payload.extend(segments);
                }
                reply.wants_acknowledgement = !value.contained.is_empty();
                reply.status = REPLY_EXCEPTION;
                reply.retryable = retryable;
            }
            Outcome::Cancelled => reply.status = REPLY_CANCELLED,
        }
        reply.generator_items = self.items_sent(task);
        reply.wants_acknowledgement |= task.template.num_returns < 0 && reply.generator_items > 0;
        reply.retained = self.end_cover(task);
        // Where an event loop runs the calls, the next one's answer may be long in coming.
        let next_waits = self.end_execution(task, &mut reply);
        let more = corked || (next_waits && !self.0.execution.runs_event_loop.load(Ordering::Acquire));
        if more {
            task.link.cork();
        }
        let sent = send(
            &task.link,
            kinds::TASK_REPLY,
            task.correlation,
            ray_wire::encode(&reply),
            &payload,
        );
        if !more {
            task.link.uncork();
        }
        if let Err(error) = sent {
            // The caller is gone, and with it whoever wanted the answer.
            tracing::debug!("an answer could not be sent: {error}");
        }
        Ok(())
    }

    /// A later return could not be placed, so that the call fails: those placed before are nobody's.
    fn take_back_returns(&self, task: &Incoming, placed: &[ReturnValue]) {
        let Ok(mut state) = self.0.enter() else { return };
        for (index, returned) in placed.iter().enumerate() {
            if returned.value.is_none() {
                let object = task.return_id(index as u32);
                self.0.free_on(&mut state, self.0.node_id, &object);
            }
        }
        let mut commands = Vec::new();
        state.refs.returns_acknowledged(task.task_id, &mut commands);
        self.0.carry_out_references(&mut state, commands);
    }

    /// Sends answers that wait for others on the link that the call came by.
    pub fn flush_replies(&self, task: &Incoming) {
        task.link.uncork();
    }

    /// What of the call's borrows this worker keeps.
    fn end_cover(&self, task: &Incoming) -> Vec<RetainedBorrow> {
        let Ok(mut state) = self.0.enter() else {
            return Vec::new();
        };
        let retained = state.refs.end_of_cover(task.task_id);
        if !retained.is_empty() {
            let mut commands = Vec::new();
            self.0.note_address(&mut state, &task.caller);
            state.refs.passed_by(task.caller_id, &retained, &mut commands);
            self.0.carry_out_references(&mut state, commands);
        }
        retained
            .into_iter()
            .map(|(object, owner, generation)| RetainedBorrow {
                reference: Some(ray_wire::ReferenceInfo {
                    object_id: id_bytes(object.as_bytes()),
                    owner: state.addresses.get(&owner).cloned(),
                }),
                generation,
            })
            .collect()
    }

    /// Notes that the call is over. Returns whether another one waits on the same link.
    fn end_execution(&self, task: &Incoming, reply: &mut TaskReply) -> bool {
        let mut state = lock(&self.0.execution.state);
        state.running.remove(&task.task_id);
        state.progress.remove(&task.task_id);
        if state.main_task == Some(task.task_id) {
            state.main_task = None;
        }
        if let Some(evidence) = self.0.evidence.get().filter(|_| task.lease.is_some()) {
            evidence.finished(task.sequence);
        }
        let limit = task.template.max_calls;
        if limit > 0 && task.lease.is_some() {
            let calls = state.calls.entry(task.template.function_id.clone()).or_default();
            *calls += 1;
            if *calls >= limit {
                state.exiting = Some(format!(
                    "{} ran max_calls={limit} times here",
                    task.template.function_name
                ));
            }
        }
        reply.worker_exits = state.exiting.is_some();
        if state.exiting.is_some() {
            let reason = state.exiting.clone().unwrap_or_default();
            state.work.push_back(Work::Exit(reason));
        }
        matches!(state.work.front(), Some(Work::Task(next)) if next.link.id() == task.link.id())
    }

    fn reply_creation(&self, task: &Incoming, outcome: Outcome) -> Result<(), WorkerError> {
        let failure = match outcome {
            Outcome::Returns(_) => None,
            Outcome::Exception { value, .. } => Some(DeathCause {
                kind: ray_wire::DEATH_CONSTRUCTOR,
                message: format!("the constructor of {} raised an exception", task.template.function_name),
                pid: std::process::id(),
                exception: Bytes::copy_from_slice(&value.inband),
                ..DeathCause::default()
            }),
            Outcome::Cancelled => Some(DeathCause {
                kind: ray_wire::DEATH_KILLED,
                message: "the constructor was cancelled".into(),
                pid: std::process::id(),
                ..DeathCause::default()
            }),
        };
        self.end_execution(task, &mut TaskReply::default());
        let created = ActorCreated {
            actor_id: id_bytes(task.task_id.actor_id().as_bytes()),
            incarnation: task.incarnation,
            worker: Some(self.0.me.clone()),
            pid: std::process::id(),
            failure,
            rejected: false,
        };
        task.link
            .send(kinds::ACTOR_CREATED, task.correlation, ray_wire::encode(&created), &[])?;
        Ok(())
    }

    /// Tells the raylet that this worker leaves of itself.
    pub fn announce_exit(&self, reason: &str) {
        let cause = DeathCause {
            kind: ray_wire::DEATH_INTENDED,
            message: reason.to_owned(),
            exit_code: Some(0),
            pid: std::process::id(),
            ..DeathCause::default()
        };
        let _ = self.0.raylet.send(
            kinds::WORKER_EXITING,
            0,
            ray_wire::encode(&WorkerExiting { cause: Some(cause) }),
            &[],
        );
        self.0.raylet.flush();
    }
}
