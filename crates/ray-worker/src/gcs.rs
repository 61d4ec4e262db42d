//! Questions to the control plane and to the raylet, which relays them.
//!
//! Invariant: 1. Each question ends: with its answer, with the end of the raylet's link, or at its deadline.

use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, OnceLock};
use std::time::{Duration, Instant};

use ray_rpc::{WaitOutcome, Waiter};
use ray_wire::{kinds, GcsCall, GcsReply, GcsRequest, NodeAnswer, NodeQuery};

use crate::inner::{CoreWorker, Inner, Pending, PendingEntry, State};
use crate::slot::lock;
use crate::WorkerError;

/// How long the control plane may take before the caller is told.
pub(crate) const GCS_TIMEOUT: Duration = Duration::from_secs(60);
/// How often a waiting thread looks whether what it waits for can still come.
pub(crate) const WAIT_SLICE: Duration = Duration::from_secs(1);

static INTERRUPT_CHECK: OnceLock<fn() -> bool> = OnceLock::new();

/// Installs what a waiting thread asks after a signal: whether it is to give up its wait.
pub fn set_interrupt_check(check: fn() -> bool) {
    let _ = INTERRUPT_CHECK.set(check);
}

pub(crate) fn interrupted() -> bool {
    INTERRUPT_CHECK.get().is_some_and(|check| check())
}

/// A thread that waits for an answer.
#[derive(Debug, Default)]
pub(crate) struct GcsWait {
    pub reply: Mutex<Option<Result<GcsReply, String>>>,
    pub answer: Mutex<Option<Result<NodeAnswer, String>>>,
    pub waiter: Waiter,
}

impl Inner {
    /// Sends a question without waiting. Its answer goes to `what`.
    pub fn ask_gcs(&self, state: &mut State, call: GcsCall, what: Pending) -> Result<(), WorkerError> {
        let correlation = self.correlation();
        let request_id = ray_ids::LeaseId::from_random();
        let request = GcsRequest {
            request_id: u64::from_le_bytes(request_id.as_bytes()[..8].try_into().unwrap_or_default()) | 1,
            sender: Some(self.me.clone()),
            call: Some(call),
        };
        state.pending.insert(
            correlation,
            PendingEntry {
                what,
                link: self.raylet.id(),
            },
        );
        self.tell_raylet(kinds::GCS_REQUEST, correlation, ray_wire::encode(&request))
    }

    /// Waits on `waiter` until `done` answers, in slices, so that the end of the raylet or of the runtime is noticed.
    pub fn wait_for<T>(
        &self,
        waiter: &Waiter,
        deadline: Option<Instant>,
        what: &str,
        mut done: impl FnMut() -> Option<T>,
    ) -> Result<T, WorkerError> {
        let started = Instant::now();
        loop {
            if let Some(result) = done() {
                return Ok(result);
            }
            self.check()?;
            if let Some(reason) = &self.lock().raylet_gone {
                return Err(WorkerError::RayletGone(reason.clone()));
            }
            let now = Instant::now();
            if deadline.is_some_and(|deadline| now >= deadline) {
                return Err(WorkerError::Timeout {
                    what: what.to_owned(),
                    limit_s: started.elapsed().as_secs_f64(),
                });
            }
            let slice = deadline.map_or(now + WAIT_SLICE, |deadline| deadline.min(now + WAIT_SLICE));
            match self.reactor.wait(waiter, Some(slice)) {
                // A signal that came between two sleeps interrupts none of them: it is found at the end of the slice.
                WaitOutcome::Interrupted | WaitOutcome::TimedOut if interrupted() => {
                    return Err(WorkerError::Interrupted);
                }
                WaitOutcome::Stopped if self.shut_down.load(Ordering::Acquire) => return Err(WorkerError::ShutDown),
                _ => {}
            }
        }
    }
}

impl CoreWorker {
    /// Asks the control plane and waits for its answer, `extra` longer than usual.
    pub fn gcs_call(&self, call: GcsCall, extra: Duration) -> Result<GcsReply, WorkerError> {
        let wait = Arc::new(GcsWait::default());
        {
            let mut state = self.0.enter()?;
            self.0.ask_gcs(&mut state, call, Pending::Gcs(wait.clone()))?;
        }
        let deadline = Instant::now() + GCS_TIMEOUT + extra;
        let reply = self
            .0
            .wait_for(&wait.waiter, Some(deadline), "the control plane", || {
                lock(&wait.reply).take()
            })?
            .map_err(WorkerError::RayletGone)?;
        if reply.error.is_empty() {
            Ok(reply)
        } else {
            Err(WorkerError::Gcs {
                kind: reply.error_kind,
                message: reply.error,
            })
        }
    }

    /// Sends an order to the control plane without waiting for the answer.
    pub fn gcs_send(&self, call: GcsCall) -> Result<(), WorkerError> {
        let mut state = self.0.enter()?;
        self.0.ask_gcs(&mut state, call, Pending::Ignored)
    }

    /// Asks the local raylet what it knows (JSON).
    pub fn node_query(&self, query_json: &str) -> Result<String, WorkerError> {
        let wait = Arc::new(GcsWait::default());
        {
            let mut state = self.0.enter()?;
            let correlation = self.0.correlation();
            state.pending.insert(
                correlation,
                PendingEntry {
                    what: Pending::NodeQuery(wait.clone()),
                    link: self.0.raylet.id(),
                },
            );
            let query = NodeQuery {
                query_json: query_json.to_owned(),
            };
            self.0
                .tell_raylet(kinds::NODE_QUERY, correlation, ray_wire::encode(&query))?;
        }
        let deadline = Instant::now() + GCS_TIMEOUT;
        let answer = self
            .0
            .wait_for(&wait.waiter, Some(deadline), "the raylet", || lock(&wait.answer).take())?
            .map_err(WorkerError::RayletGone)?;
        if answer.error.is_empty() {
            Ok(answer.answer_json)
        } else {
            Err(WorkerError::Invalid(answer.error))
        }
    }
}
