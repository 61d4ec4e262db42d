//! Dispatch: what each frame does. Runs on whichever thread leads the reactor; never blocks, never runs user code.
//!
//! Invariant: 1. A malformed frame closes its link with a sentence; it never ends the process.

use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use prost::Message;
use ray_ids::{LeaseId, NodeId, ObjectId, TaskId, WorkerId};
use ray_rpc::{CloseReason, Frame, Link, Service};
use ray_wire::{decode, kinds, *};

use crate::inner::{Inner, Pending, PendingEntry};
use crate::links::link_state;
use crate::slot::lock;
use crate::WorkerError;

/// Serves the links of a worker or driver.
pub(crate) struct WorkerService {
    pub(crate) core: Arc<Inner>,
}

impl WorkerService {
    pub fn new(core: Arc<Inner>) -> Self {
        Self { core }
    }

    fn dispatch(&self, link: &Arc<Link>, frame: Frame) -> Result<(), WorkerError> {
        let core = &*self.core;
        let correlation = frame.correlation;
        let (header, payload) = (frame.header, frame.payload);
        if is_for_raylets_alone(frame.kind)
            && link.id() != core.raylet.id()
            && link_state(link).raylet_of.get().is_none()
        {
            return Err(WorkerError::Invalid("only a raylet may say that".into()));
        }
        if core.on_session_frame(link, frame.kind, &header)? || !core.takes_frame(link) {
            return Ok(());
        }
        match frame.kind {
            kinds::PUSH_TASK => core.on_push_task(link, correlation, decode("PushTask", header)?, payload),
            kinds::TASK_REPLY => {
                let reply: TaskReply = decode("TaskReply", header)?;
                let mut state = core.lock();
                if let Some(PendingEntry {
                    what: Pending::Task(task),
                    ..
                }) = state.pending.remove(&correlation)
                {
                    core.on_task_reply(&mut state, link, correlation, task, reply, payload);
                }
                Ok(())
            }
            kinds::GENERATOR_ITEM => {
                let item = decode("GeneratorItem", header)?;
                self.core
                    .on_generator_item(&mut core.lock(), link, correlation, item, payload)
            }
            kinds::GENERATOR_CONSUMED => {
                let message: GeneratorConsumed = decode("GeneratorConsumed", header)?;
                core.on_generator_consumed(task_id(&message.task_id)?, message.consumed, message.abandoned);
                Ok(())
            }
            kinds::CANCEL_TASK => {
                let message: CancelTask = decode("CancelTask", header)?;
                if message.recursive {
                    core.cancel_children(task_id(&message.task_id)?, message.force);
                }
                core.on_cancel_task(&message)
            }
            kinds::RECALL_TASKS => {
                let message: RecallTasks = decode("RecallTasks", header)?;
                core.on_recall(link, lease_id(&message.lease_id)?);
                Ok(())
            }
            kinds::TASKS_RECALLED => {
                self.on_tasks_recalled(link, decode("TasksRecalled", header)?);
                Ok(())
            }
            kinds::GET_OBJECT_STATUS => {
                let message: GetObjectStatus = decode("GetObjectStatus", header)?;
                core.on_get_object_status(&mut core.lock(), link, correlation, object_id(&message.object_id)?);
                Ok(())
            }
            kinds::OBJECT_STATUS => {
                let status: ObjectStatus = decode("ObjectStatus", header)?;
                let mut state = core.lock();
                match state.pending.remove(&correlation) {
                    Some(PendingEntry {
                        what: Pending::ObjectStatus(object),
                        ..
                    }) => core.on_object_status(&mut state, object, status, payload),
                    _ => Ok(()),
                }
            }
            kinds::ADD_BORROWER => {
                core.on_add_borrower(&mut core.lock(), link, correlation, decode("AddBorrower", header)?)
            }
            kinds::BORROWER_ADDED => {
                let mut state = core.lock();
                state.pending.remove(&correlation);
                core.on_borrower_added(&mut state, &decode("BorrowerAdded", header)?)
            }
            kinds::REMOVE_BORROWER => {
                let message: RemoveBorrower = decode("RemoveBorrower", header)?;
                let (object, borrower) = (object_id(&message.object_id)?, worker_id(&message.borrower_id)?);
                let mut state = core.lock();
                let mut commands = Vec::new();
                state
                    .refs
                    .remove_borrower(object, borrower, message.generation, &mut commands);
                core.carry_out_references(&mut state, commands);
                Ok(())
            }
            kinds::RETURNS_ACKNOWLEDGED => {
                let message: ReturnsAcknowledged = decode("ReturnsAcknowledged", header)?;
                let mut state = core.lock();
                let mut commands = Vec::new();
                state
                    .refs
                    .returns_acknowledged(task_id(&message.task_id)?, &mut commands);
                core.carry_out_references(&mut state, commands);
                Ok(())
            }
            kinds::ADD_LOCATION => {
                let message: AddLocation = decode("AddLocation", header)?;
                let object = object_id(&message.object_id)?;
                let mut state = core.lock();
                if let Some(address) = message.node {
                    let node = address.node()?;
                    core.note_address(&mut state, &address);
                    if !state.refs.add_location(&object, node) {
                        core.free_on(&mut state, node, &object);
                    }
                }
                Ok(())
            }
            kinds::REPORT_LOST => {
                let message: ReportLost = decode("ReportLost", header)?;
                let nodes: Vec<NodeId> = message
                    .node_ids
                    .iter()
                    .filter_map(|id| NodeId::from_binary(id).ok())
                    .collect();
                core.locations_lost(&mut core.lock(), object_id(&message.object_id)?, &nodes);
                Ok(())
            }
            kinds::CALLER_HELLO => Ok(()),
            kinds::HAND_OVER => {
                if let Some(socket) = frame.descriptor {
                    core.reactor.adopt(socket)?;
                }
                Ok(())
            }
            _ => self.dispatch_raylet(link, frame.kind, correlation, header),
        }
    }

    /// Frames of raylets.
    fn dispatch_raylet(&self, link: &Arc<Link>, kind: u16, correlation: u64, header: Bytes) -> Result<(), WorkerError> {
        let core = &*self.core;
        match kind {
            kinds::LEASE_GRANTED => self.on_lease_granted(link, correlation, decode("LeaseGranted", header)?),
            kinds::LEASE_REDIRECTED => {
                let message: LeaseRedirected = decode("LeaseRedirected", header)?;
                let mut state = core.lock();
                let Some(PendingEntry {
                    what: Pending::Lease(request),
                    ..
                }) = state.pending.remove(&correlation)
                else {
                    return Ok(());
                };
                let address = message.raylet.unwrap_or_default();
                core.note_address(&mut state, &address);
                let mut commands = Vec::new();
                state.leases.redirected(request, address.node()?, &mut commands);
                core.carry_out_leases(&mut state, commands);
                Ok(())
            }
            kinds::LEASE_REFUSED => {
                let message: LeaseRefused = decode("LeaseRefused", header)?;
                let mut state = core.lock();
                let Some(PendingEntry {
                    what: Pending::Lease(request),
                    ..
                }) = state.pending.remove(&correlation)
                else {
                    return Ok(());
                };
                let mut commands = Vec::new();
                let failed = state.leases.refused(request, &mut commands);
                core.carry_out_leases(&mut state, commands);
                for task in failed {
                    let error = layout::ErrorValue {
                        kind: message.error_kind,
                        message: message.message.clone(),
                        task_id: id_bytes(task.as_bytes()),
                        ..layout::ErrorValue::default()
                    };
                    core.finish_with(&mut state, task, Arc::new(crate::error_value(&error)));
                }
                Ok(())
            }
            kinds::LEASE_QUEUED => {
                let message: LeaseQueued = decode("LeaseQueued", header)?;
                let mut state = core.lock();
                let Some(PendingEntry {
                    what: Pending::Lease(request),
                    ..
                }) = state.pending.get(&correlation)
                else {
                    return Ok(());
                };
                let request = *request;
                let mut commands = Vec::new();
                state.leases.queued(request, core.now_ms(), &mut commands);
                core.carry_out_leases(&mut state, commands);
                if message.infeasible {
                    let text = format!("A call waits for what the cluster does not have: {}", message.reason);
                    core.logs.push(crate::logs::LogEntry::Message(DriverMessage {
                        level: "warning".into(),
                        message: text,
                    }));
                }
                Ok(())
            }
            kinds::RECALL_LEASE => {
                let message: RecallLease = decode("RecallLease", header)?;
                let mut state = core.lock();
                let mut commands = Vec::new();
                state.leases.recalled(lease_id(&message.lease_id)?, &mut commands);
                core.carry_out_leases(&mut state, commands);
                Ok(())
            }
            kinds::LEASE_BROKEN => {
                let message: LeaseBroken = decode("LeaseBroken", header)?;
                let lease = lease_id(&message.lease_id)?;
                let mut state = core.lock();
                self.lease_broken(&mut state, lease, message.started_sequence, message.cause);
                Ok(())
            }
            kinds::LEASE_ASSIGNED => core.on_lease_assigned(decode("LeaseAssigned", header)?),
            kinds::CREATE_ACTOR => core.on_create_actor(link, correlation, decode("CreateActor", header)?),
            kinds::EXIT_PROCESS => {
                core.on_exit_process(&decode("ExitProcess", header)?);
                Ok(())
            }
            kinds::INTERRUPT_TASK => {
                let message: InterruptTask = decode("InterruptTask", header)?;
                core.on_cancel_task(&CancelTask {
                    task_id: message.task_id,
                    force: message.force,
                    recursive: false,
                })
            }
            kinds::WORKER_DIED => {
                let message: WorkerDied = decode("WorkerDied", header)?;
                let worker = message.worker.unwrap_or_default().worker()?;
                let mut state = core.lock();
                core.worker_died(&mut state, worker);
                core.run_ready(&mut state);
                Ok(())
            }
            kinds::NODE_DIED => {
                let message: NodeDied = decode("NodeDied", header)?;
                let node = NodeId::from_binary(&message.node_id).map_err(WireError::from)?;
                self.node_died(&mut core.lock(), node, &message.reason);
                Ok(())
            }
            kinds::LOG_LINES => {
                core.logs
                    .push(crate::logs::LogEntry::Lines(decode("LogLines", header)?));
                Ok(())
            }
            kinds::DRIVER_MESSAGE => {
                core.logs
                    .push(crate::logs::LogEntry::Message(decode("DriverMessage", header)?));
                Ok(())
            }
            kinds::EXTENT_LENT => {
                let message: ExtentLent = decode("ExtentLent", header)?;
                if let Some(PendingEntry {
                    what: Pending::Extent(wait),
                    ..
                }) = core.lock().pending.remove(&correlation)
                {
                    *lock(&wait.reply) = Some(Ok(message));
                    wait.waiter.notify();
                }
                Ok(())
            }
            kinds::RECALL_EXTENTS => {
                let extents = core.store()?.unused(u64::MAX);
                let extents = extents
                    .iter()
                    .map(|extent| ExtentInfo {
                        offset: extent.offset,
                        length: extent.len,
                        reserved: extent.reserved,
                    })
                    .collect();
                link.send(kinds::RETURN_EXTENTS, 0, encode(&ReturnExtents { extents }), &[])?;
                Ok(())
            }
            kinds::OBJECT_LOCAL => {
                let message: ObjectLocal = decode("ObjectLocal", header)?;
                let mut state = core.lock();
                state.pending.remove(&correlation);
                core.on_object_local(&mut state, object_id(&message.object_id)?);
                Ok(())
            }
            kinds::FETCH_FAILED => {
                let message: FetchFailed = decode("FetchFailed", header)?;
                let mut state = core.lock();
                state.pending.remove(&correlation);
                core.on_fetch_failed(&mut state, object_id(&message.object_id)?, &message);
                Ok(())
            }
            kinds::GCS_REPLY => {
                let reply: GcsReply = decode("GcsReply", header)?;
                self.on_gcs_reply(correlation, reply)
            }
            kinds::NODE_ANSWER => {
                let answer: NodeAnswer = decode("NodeAnswer", header)?;
                if let Some(PendingEntry {
                    what: Pending::NodeQuery(wait),
                    ..
                }) = core.lock().pending.remove(&correlation)
                {
                    *lock(&wait.answer) = Some(Ok(answer));
                    wait.waiter.notify();
                }
                Ok(())
            }
            kinds::PUBLICATION => {
                let publication: Publication = decode("Publication", header)?;
                match publication.actor {
                    Some(actor) => core.on_actor_state(&mut core.lock(), actor),
                    None => Ok(()),
                }
            }
            other => {
                tracing::warn!(
                    "{} sent a frame of the unknown kind {other} ({})",
                    link.description(),
                    kinds::name(other)
                );
                Ok(())
            }
        }
    }

    fn on_gcs_reply(&self, correlation: u64, reply: GcsReply) -> Result<(), WorkerError> {
        let core = &*self.core;
        let mut state = core.lock();
        let Some(entry) = state.pending.remove(&correlation) else {
            return Ok(());
        };
        match entry.what {
            Pending::Gcs(wait) => {
                *lock(&wait.reply) = Some(Ok(reply));
                wait.waiter.notify();
            }
            Pending::RegisterActor(actor) if !reply.error.is_empty() => {
                core.registration_failed(&mut state, actor, reply.error);
            }
            _ => {
                if !reply.error.is_empty() {
                    tracing::debug!("the control plane refused an order: {}", reply.error);
                }
                if let Some(actor) = reply.actor {
                    core.on_actor_state(&mut state, actor)?;
                }
            }
        }
        Ok(())
    }

    fn on_lease_granted(&self, link: &Arc<Link>, correlation: u64, message: LeaseGranted) -> Result<(), WorkerError> {
        let core = &*self.core;
        let mut state = core.lock();
        let lease = lease_id(&message.lease_id)?;
        let worker = message.worker.unwrap_or_default();
        core.note_address(&mut state, &worker);
        let granting = link_state(link).raylet_of.get().copied().unwrap_or(core.node_id);
        state.lease_raylets.insert(lease, granting);
        let request = match state.pending.remove(&correlation) {
            Some(PendingEntry {
                what: Pending::Lease(request),
                ..
            }) => {
                state.request_raylets.remove(&request);
                request
            }
            _ => 0,
        };
        let mut commands = Vec::new();
        let (id, node) = (worker.worker()?, worker.node()?);
        state.leases.granted(
            request,
            lease,
            id,
            node,
            message.first_sequence,
            core.now_ms(),
            &mut commands,
        );
        core.carry_out_leases(&mut state, commands);
        Ok(())
    }

    fn on_tasks_recalled(&self, link: &Arc<Link>, message: TasksRecalled) {
        let core = &*self.core;
        let mut state = core.lock();
        let mut tasks = Vec::new();
        for correlation in message.correlations {
            if let Some(PendingEntry {
                what: Pending::Task(task),
                ..
            }) = state.pending.remove(&correlation)
            {
                if let Some(pending) = state.tasks.get_mut(&task).filter(|pending| pending.push == correlation) {
                    pending.push = 0;
                    tasks.push(task);
                }
            }
        }
        let Some(worker) = link_state(link).peer_id.get().copied() else {
            return;
        };
        let mut commands = Vec::new();
        for lease in state.leases.leases_of(worker) {
            let of_lease: Vec<TaskId> = tasks
                .iter()
                .copied()
                .filter(|task| state.leases.lease_of(task).is_some_and(|(held, _)| held == lease))
                .collect();
            state
                .leases
                .tasks_recalled(&of_lease, lease, core.now_ms(), &mut commands);
        }
        core.carry_out_leases(&mut state, commands);
    }
}

fn object_id(bytes: &Bytes) -> Result<ObjectId, WorkerError> {
    Ok(ObjectId::from_binary(bytes).map_err(WireError::from)?)
}

fn task_id(bytes: &Bytes) -> Result<TaskId, WorkerError> {
    Ok(TaskId::from_binary(bytes).map_err(WireError::from)?)
}

/// What ends or directs this process, or answers what it asked a raylet. Any process of the node can open a link here, so
/// such a frame counts only on a link that this process opened to a raylet itself.
fn is_for_raylets_alone(kind: u16) -> bool {
    matches!(
        kind,
        kinds::LEASE_ASSIGNED
            | kinds::CREATE_ACTOR
            | kinds::EXIT_PROCESS
            | kinds::INTERRUPT_TASK
            | kinds::WORKER_DIED
            | kinds::NODE_DIED
            | kinds::LOG_LINES
            | kinds::DRIVER_MESSAGE
            | kinds::EXTENT_LENT
            | kinds::RECALL_EXTENTS
            | kinds::OBJECT_LOCAL
            | kinds::FETCH_FAILED
            | kinds::GCS_REPLY
            | kinds::NODE_ANSWER
            | kinds::PUBLICATION
    )
}

fn worker_id(bytes: &Bytes) -> Result<WorkerId, WorkerError> {
    Ok(WorkerId::from_binary(bytes).map_err(WireError::from)?)
}

fn lease_id(bytes: &Bytes) -> Result<LeaseId, WorkerError> {
    Ok(LeaseId::from_binary(bytes).map_err(WireError::from)?)
}

impl Service for WorkerService {
    fn on_frame(&self, link: &Arc<Link>, frame: Frame) {
        let kind = frame.kind;
        if let Err(error) = self.dispatch(link, frame) {
            tracing::warn!("a {} of {} was refused: {error}", kinds::name(kind), link.description());
            if matches!(error, WorkerError::Wire(_)) {
                link.close(CloseReason::local(format!(
                    "a malformed {}: {error}",
                    kinds::name(kind)
                )));
            }
        }
    }

    fn on_ready(&self, link: &Arc<Link>, peer_hello: &[u8]) {
        if peer_hello.is_empty() {
            return;
        }
        let Ok(address) = Address::decode(peer_hello) else {
            return;
        };
        let Ok(worker) = address.worker() else { return };
        let mut state = self.core.lock();
        self.core.note_address(&mut state, &address);
        if !worker.is_nil() {
            self.core.accepted_state(&mut state, link, worker);
        }
        let said = link_state(link);
        if worker.is_nil() || said.raylet_of.get().is_some() {
            return;
        }
        let _ = said.peer.set(address);
        let _ = said.peer_id.set(worker);
        state.links.entry(worker).or_insert_with(|| link.clone());
    }

    fn on_closed(&self, link: &Arc<Link>, reason: &CloseReason) {
        self.link_closed(link, reason);
    }

    fn on_descriptor_ready(&self, token: u64) {
        self.core.on_descriptor_ready(token);
    }

    fn on_timer(&self, now: Instant) -> Option<Instant> {
        let core = &*self.core;
        let mut state = core.lock();
        state.timer_due = None;
        core.count_drops(&mut state);
        core.flush_frees(&mut state);
        let (due, later): (Vec<_>, Vec<_>) = std::mem::take(&mut state.retries)
            .into_iter()
            .partition(|(at, _)| *at <= now);
        state.retries = later;
        for (_, retry) in due {
            self.retry(&mut state, retry);
        }
        let mut commands = Vec::new();
        let now_ms = core.now_ms();
        let next_tick = state.leases.tick(now_ms, &mut commands);
        core.carry_out_leases(&mut state, commands);
        let next = next_tick.map(|at| now + Duration::from_millis(at.saturating_sub(now_ms)));
        let next = state
            .retries
            .iter()
            .map(|(at, _)| *at)
            .chain(next)
            .chain(state.timer_due)
            .min();
        state.timer_due = next;
        next
    }
}
