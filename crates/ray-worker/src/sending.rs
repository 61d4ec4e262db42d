//! Sending calls: carries out what the lease and actor machines decide, and writes the frames.
//!
//! Invariant: 1. A call whose argument is a failure is not sent: it fails with that failure.

use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use ray_ids::{ActorId, ObjectId, TaskId};
use ray_ownership::actor_calls::ActorCommand;
use ray_ownership::leases::LeaseCommand;
use ray_wire::layout::{ErrorValue, ERROR_ACTOR_DIED, ERROR_ACTOR_UNAVAILABLE, ERROR_WORKER_CRASHED};
use ray_wire::{
    id_bytes, kinds, Address, CancelLeaseRequest, PushTask, RecallTasks, ReferenceArgument, RequestLease, ReturnLease,
};

use crate::inner::{Inner, Pending, PendingEntry, Retry, State};
use crate::links::note_template;
use crate::replies::system_error;
use crate::slot::SlotValue;
use crate::value::error_value;
use crate::WorkerError;

use crate::submit::*;

/// How long a leased worker may refuse links before it is suspect.
const PUSH_LIMIT: Duration = Duration::from_secs(1);
/// When a call whose worker could not be reached is sent again.
const PUSH_RETRY_DELAY: Duration = Duration::from_millis(5);

impl Inner {
    pub fn carry_out_leases(&self, state: &mut State, commands: Vec<LeaseCommand>) {
        for command in commands {
            match command {
                LeaseCommand::Request {
                    request,
                    class,
                    raylet,
                    backlog,
                    preferred,
                } => {
                    let node = raylet.unwrap_or(self.node_id);
                    let correlation = self.correlation();
                    let message = RequestLease {
                        specification: state.class_specifications.get(class as usize).cloned(),
                        backlog,
                        preferred_node: preferred.map(|node| id_bytes(node.as_bytes())).unwrap_or_default(),
                        redirected: raylet.is_some(),
                        owner: Some(self.me.clone()),
                        parent_lease_id: self.execution.current_lease_bytes(),
                    };
                    match self.raylet_link(state, node) {
                        Ok(link) => {
                            state.pending.insert(
                                correlation,
                                PendingEntry {
                                    what: Pending::Lease(request),
                                    link: link.id(),
                                },
                            );
                            state.request_raylets.insert(request, (node, correlation));
                            let _ = link.send(kinds::REQUEST_LEASE, correlation, ray_wire::encode(&message), &[]);
                        }
                        Err(error) => {
                            tracing::warn!("no lease can be asked of node {node}: {error}");
                            let mut more = Vec::new();
                            state.leases.request_lost(request, self.now_ms(), &mut more);
                            self.carry_out_leases(state, more);
                        }
                    }
                }
                LeaseCommand::CancelRequest { request } => {
                    if let Some((node, correlation)) = state.request_raylets.remove(&request) {
                        // The answer may be under way; `granted` gives an unwanted lease back.
                        if let Ok(link) = self.raylet_link(state, node) {
                            let message = CancelLeaseRequest { request: correlation };
                            let _ = link.send(
                                kinds::CANCEL_LEASE_REQUEST,
                                correlation,
                                ray_wire::encode(&message),
                                &[],
                            );
                        }
                    }
                }
                LeaseCommand::Push { lease, task, sequence } => {
                    self.push_to_lease(state, lease, task, sequence, Instant::now() + PUSH_LIMIT);
                }
                LeaseCommand::Return { lease, worker_exits } => {
                    let node = state.lease_raylets.remove(&lease).unwrap_or(self.node_id);
                    if let Ok(link) = self.raylet_link(state, node) {
                        let message = ReturnLease {
                            lease_id: id_bytes(lease.as_bytes()),
                            worker_exits,
                        };
                        let _ = link.send(kinds::RETURN_LEASE, 0, ray_wire::encode(&message), &[]);
                    }
                }
                LeaseCommand::Recall { lease } => {
                    let worker = state.leases.lease(&lease).map(|lease| lease.worker);
                    if let Some(Ok(link)) = worker.map(|worker| self.worker_link(state, worker)) {
                        let message = RecallTasks {
                            lease_id: id_bytes(lease.as_bytes()),
                        };
                        let _ = crate::session::send(&link, kinds::RECALL_TASKS, 0, ray_wire::encode(&message), &[]);
                    }
                }
                LeaseCommand::AttemptFailed { task, .. } => self.attempt_failed(state, task),
            }
        }
        self.schedule_tick(state);
    }

    /// The lease machine wants to hear of the time, soon; it then says when next.
    fn schedule_tick(&self, state: &mut State) {
        if state.timer_due.is_none() {
            self.want_timer(
                state,
                Instant::now() + Duration::from_millis(ray_ownership::leases::STALL_MS),
            );
        }
    }

    /// A call's process died while it ran, or may have.
    pub fn attempt_failed(&self, state: &mut State, task_id: TaskId) {
        let Some(task) = state.tasks.get_mut(&task_id) else {
            return;
        };
        if task.cancelled {
            return self.finish_cancelled(state, task_id);
        }
        if task.retries_left != 0 {
            if task.retries_left > 0 {
                task.retries_left -= 1;
            }
            task.attempt += 1;
            return self.enqueue(state, task_id);
        }
        let cause = task.cause().cloned().unwrap_or_default();
        let name = task.spec.template.message.function_name.clone();
        let kind = if cause.kind == ray_wire::DEATH_OUT_OF_MEMORY {
            ray_wire::layout::ERROR_OUT_OF_MEMORY
        } else if cause.kind == ray_wire::DEATH_NODE {
            ray_wire::layout::ERROR_NODE_DIED
        } else {
            ERROR_WORKER_CRASHED
        };
        let error = ErrorValue {
            kind,
            message: format!("The worker that ran {name} died: {}", cause.message),
            death: Some(cause),
            task_id: id_bytes(task_id.as_bytes()),
            name,
            ..ErrorValue::default()
        };
        self.finish_with(state, task_id, Arc::new(error_value(&error)));
    }

    /// Sends the call to its lease's worker. One that cannot be reached may be busy for a moment, so it is tried again
    /// `until` then; after that either its raylet has reported its death, or it is suspect.
    pub(crate) fn push_to_lease(
        &self,
        state: &mut State,
        lease: ray_ids::LeaseId,
        task: TaskId,
        sequence: u64,
        until: Instant,
    ) {
        let Some(worker) = state.leases.lease(&lease).map(|lease| lease.worker) else {
            return;
        };
        match self.worker_link(state, worker) {
            Ok(link) => self.push(state, &link, task, id_bytes(lease.as_bytes()), sequence, 0),
            Err(error) if Instant::now() < until => {
                tracing::debug!("worker {worker} cannot be reached yet: {error}");
                let retry = Retry::Push {
                    lease,
                    task,
                    sequence,
                    until,
                };
                self.retry_later(state, PUSH_RETRY_DELAY, retry);
            }
            Err(WorkerError::Rpc(error)) if error.is_own_limit() => {
                let message = format!("the call cannot be sent to its worker: {error}");
                self.finish_with(state, task, Arc::new(system_error(message)));
            }
            Err(error) => {
                tracing::debug!("worker {worker} cannot be reached: {error}");
                self.retry_later(state, Duration::ZERO, Retry::SuspectWorker(worker));
            }
        }
    }

    pub fn carry_out_actor(&self, state: &mut State, actor: ActorId, commands: Vec<ActorCommand>) {
        for command in commands {
            match command {
                ActorCommand::Push {
                    task,
                    worker,
                    incarnation,
                    sequence,
                } => {
                    if let Some(failure) = state
                        .tasks
                        .get(&task)
                        .and_then(|pending| self.failed_argument(state, &pending.spec))
                    {
                        self.finish_with(state, task, failure);
                        continue;
                    }
                    match self.worker_link(state, worker) {
                        Ok(link) => self.push(state, &link, task, Bytes::new(), sequence, incarnation),
                        Err(WorkerError::Rpc(error)) if error.is_own_limit() => {
                            let message = format!("the actor cannot be called: {error}");
                            self.finish_with(state, task, Arc::new(system_error(message)));
                        }
                        Err(error) => {
                            tracing::debug!("actor {actor} cannot be reached: {error}");
                            let mut more = Vec::new();
                            if let Some(entry) = state.actors.get_mut(&actor) {
                                entry.calls.disconnected(incarnation, &mut more);
                            }
                            self.carry_out_actor(state, actor, more);
                        }
                    }
                }
                ActorCommand::FailDead { task } => self.fail_actor_call(state, actor, task, ERROR_ACTOR_DIED),
                ActorCommand::FailUnavailable { task } => {
                    self.fail_actor_call(state, actor, task, ERROR_ACTOR_UNAVAILABLE)
                }
            }
        }
    }

    fn fail_actor_call(&self, state: &mut State, actor: ActorId, task: TaskId, kind: u32) {
        // Whether an unanswered call's actor is dead for good is often known a moment later than its link's end.
        if let Some(entry) = state.actors.get_mut(&actor).filter(|entry| entry.death.is_none()) {
            if kind == ERROR_ACTOR_UNAVAILABLE {
                entry.unavailable.push(task);
                return;
            }
        }
        let entry = state.actors.get(&actor);
        let death = entry.and_then(|entry| entry.death.clone());
        let message = match &death {
            Some(death) => death.message.clone(),
            None => "the actor is restarting or cannot be reached; whether the call ran is not known".to_owned(),
        };
        let error = ErrorValue {
            kind: death
                .as_ref()
                .map_or(kind, |death| crate::actor_entry::error_kind_of_death(death.kind)),
            message,
            death,
            actor_id: id_bytes(actor.as_bytes()),
            task_id: id_bytes(task.as_bytes()),
            name: entry.map(|entry| entry.class_name.clone()).unwrap_or_default(),
            ..ErrorValue::default()
        };
        self.finish_with(state, task, Arc::new(error_value(&error)));
    }

    /// Writes the call's frame.
    fn push(
        &self,
        state: &mut State,
        link: &Arc<ray_rpc::Link>,
        task_id: TaskId,
        lease_id: Bytes,
        sequence: u64,
        incarnation: u64,
    ) {
        let correlation = self.correlation();
        let Some(task) = state.tasks.get_mut(&task_id) else {
            return;
        };
        task.push = correlation;
        let spec = task.spec.clone();
        let attempt = task.attempt;
        let (message, payload) = self.push_message(state, &spec, Some(link), lease_id, sequence, incarnation, attempt);
        state.pending.insert(
            correlation,
            PendingEntry {
                what: Pending::Task(task_id),
                link: link.id(),
            },
        );
        if let Err(error) = crate::session::send(
            link,
            kinds::PUSH_TASK,
            correlation,
            ray_wire::encode(&message),
            &payload,
        ) {
            // The link's end is handled where it is reported.
            tracing::debug!("a call could not be sent: {error}");
        }
    }

    /// The message of a call. Without a link (an actor's creation) the template is always inside.
    #[allow(clippy::too_many_arguments)]
    pub fn push_message(
        &self,
        state: &State,
        spec: &TaskSpec,
        link: Option<&Arc<ray_rpc::Link>>,
        lease_id: Bytes,
        sequence: u64,
        incarnation: u64,
        attempt: u32,
    ) -> (PushTask, Vec<Bytes>) {
        let mut payload = Vec::new();
        let values = spec.values.as_ref().map(|values| {
            values.append(&mut payload);
            values.layout()
        });
        let values_reference = spec.values_reference.as_deref().map(|object| {
            let passed = PassedReference {
                index: 0,
                keyword: String::new(),
                object: *object,
            };
            self.reference_argument(state, &passed, &mut payload)
        });
        let references = spec
            .references
            .iter()
            .map(|passed| self.reference_argument(state, passed, &mut payload))
            .collect();
        let with_template = link.is_none_or(|link| note_template(link, spec.template.id));
        let message = PushTask {
            task_id: id_bytes(spec.task_id.as_bytes()),
            template_id: spec.template.id,
            template: with_template.then(|| spec.template.message.clone()),
            lease_id,
            sequence,
            attempt,
            parent_task_id: id_bytes(spec.parent.as_bytes()),
            values,
            values_reference,
            references,
            actor_incarnation: incarnation,
            generator_watermark: state.streams.get(&spec.task_id).map_or(0, |stream| stream.watermark()),
            depth: spec.depth,
        };
        (message, payload)
    }

    fn reference_argument(
        &self,
        state: &State,
        passed: &PassedReference,
        payload: &mut Vec<Bytes>,
    ) -> ReferenceArgument {
        let mut argument = ReferenceArgument {
            index: passed.index,
            keyword: passed.keyword.clone(),
            reference: Some(ray_wire::ReferenceInfo {
                object_id: id_bytes(passed.object.as_bytes()),
                owner: Some(self.owner_address(state, &passed.object)),
            }),
            value: None,
            locations: Vec::new(),
        };
        let Some(entry) = state.refs.get(&passed.object) else {
            return argument;
        };
        match entry.value.value() {
            SlotValue::Inline(value) => {
                value.append(payload);
                argument.value = Some(value.layout());
            }
            SlotValue::Stored { locations, .. } => {
                argument.locations = locations.map(|locations| locations.to_vec()).unwrap_or_default();
                argument.locations.extend(
                    entry
                        .locations()
                        .iter()
                        .filter_map(|node| state.nodes.get(node).cloned()),
                );
            }
            SlotValue::Pending => {}
        }
        argument
    }

    /// The owner of an object, as far as this process knows: itself, or whom it borrows from.
    pub fn owner_address(&self, state: &State, object: &ObjectId) -> Address {
        state
            .refs
            .get(object)
            .and_then(|entry| entry.borrowed_owner())
            .and_then(|owner| state.addresses.get(&owner).cloned())
            .unwrap_or_else(|| self.me.clone())
    }
}
