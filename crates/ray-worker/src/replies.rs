//! Answers to calls: stores what came back, hands counts over, decides on retries.
//!
//! Invariants:
//! 1. Borrows that a reply lists are noted or relayed before the call's arguments lose their counts.
//! 2. A call ends once: its returns all have values, its arguments' counts are gone, its stream knows its end.

use std::sync::Arc;

use bytes::Bytes;
use ray_ids::{NodeId, ObjectId, TaskId, WorkerId};
use ray_ownership::references::Cover;
use ray_ownership::ReferenceCommand;
use ray_wire::layout::{ErrorValue, ERROR_OBJECT_LOST, ERROR_TASK_CANCELLED};
use ray_wire::{
    id_bytes, ReturnValue, TaskReply, REPLY_ARGUMENT_FAILED, REPLY_CANCELLED, REPLY_EXCEPTION, REPLY_OK,
    REPLY_STALE_INCARNATION, REPLY_STALE_LEASE, REPLY_UNKNOWN_TEMPLATE,
};

use crate::generators::{item_id, StreamItems};
use crate::inner::{Inner, State};
use crate::links::link_state;
use crate::slot::{lock, Slot, SlotValue, Wake};
use crate::submit::{PendingTask, TaskSpec};
use crate::value::{error_value, Contained, InlineValue};

/// Items that an attempt which was given up may have stored without anybody having been told.
const UNTOLD_ITEMS: u64 = 64;

impl Inner {
    /// A call was answered.
    pub fn on_task_reply(
        &self,
        state: &mut State,
        link: &Arc<ray_rpc::Link>,
        correlation: u64,
        task_id: TaskId,
        reply: TaskReply,
        mut payload: Bytes,
    ) {
        let said = link_state(link);
        let worker = said.peer_id.get().copied().unwrap_or(WorkerId::NIL);
        let node = said.peer.get().map_or(self.node_id, crate::connect::node_of);
        let Some(task) = state.tasks.get(&task_id).filter(|task| task.push == correlation) else {
            return self.on_late_reply(state, task_id, &reply, worker, node);
        };
        let spec = task.spec.clone();
        let actor = spec.actor;
        match reply.status {
            REPLY_STALE_LEASE if actor.is_none() => {
                // It was not started: another lease, free of charge.
                if let Some(task) = state.tasks.get_mut(&task_id) {
                    task.push = 0;
                }
                let lease = state.leases.lease_of(&task_id).map(|(lease, _)| lease);
                let mut commands = Vec::new();
                if let Some(lease) = lease {
                    state
                        .leases
                        .tasks_recalled(&[task_id], lease, self.now_ms(), &mut commands);
                    state.leases.recalled(lease, &mut commands);
                }
                return self.carry_out_leases(state, commands);
            }
            REPLY_UNKNOWN_TEMPLATE => {
                lock(&link_state(link).sent_templates).remove(&spec.template.id);
                return self.send_again(state, link, task_id, &spec);
            }
            REPLY_STALE_INCARNATION if actor.is_some() => {
                return self.retry_actor_call(state, task_id, &spec);
            }
            _ => {}
        }
        if let Some(actor) = actor {
            let retried =
                reply.status == REPLY_EXCEPTION && reply.retryable && self.retry_actor_exception(state, actor, &spec);
            if retried {
                return;
            }
            let known = state
                .actors
                .get_mut(&actor)
                .is_some_and(|entry| entry.calls.replied(task_id));
            if !known {
                return self.on_late_reply(state, task_id, &reply, worker, node);
            }
        } else {
            let mut commands = Vec::new();
            state
                .leases
                .replied(task_id, reply.worker_exits, self.now_us(), &mut commands);
            self.carry_out_leases(state, commands);
        }
        let Some(task) = state.tasks.get_mut(&task_id) else {
            return;
        };
        let retry =
            matches!(reply.status, REPLY_EXCEPTION) && reply.retryable && task.retries_left != 0 && !task.cancelled;
        if retry && actor.is_none() {
            if task.retries_left > 0 {
                task.retries_left -= 1;
            }
            task.attempt += 1;
            task.push = 0;
            self.relay_retained(state, &reply, worker);
            return self.enqueue(state, task_id);
        }
        match reply.status {
            REPLY_OK | REPLY_EXCEPTION | REPLY_ARGUMENT_FAILED => {}
            REPLY_CANCELLED => {
                self.relay_retained(state, &reply, worker);
                return self.finish_cancelled(state, task_id);
            }
            other => tracing::warn!("{} answered a call with the unknown status {other}", link.description()),
        }
        let Some(task) = state.tasks.remove(&task_id) else {
            return;
        };
        let mut wakes = Vec::new();
        let mut any_stored = false;
        for (index, returned) in reply.returns.iter().enumerate() {
            let object = spec.return_id(index as u32);
            any_stored |= returned.value.is_none();
            match self.accept_return(state, object, returned, &mut payload, task_id, worker, node, &mut wakes) {
                Ok(()) => {}
                Err(error) => {
                    let value = system_error(format!("the reply of {} is malformed: {error}", link.description()));
                    self.set_value(state, object, SlotValue::Inline(Arc::new(value)), &mut wakes);
                }
            }
        }
        self.relay_retained(state, &reply, worker);
        let failure = (reply.status != REPLY_OK)
            .then(|| self.first_failure(state, &spec))
            .flatten();
        let items = self.end_stream(state, task_id, reply.generator_items, failure.clone());
        wakes.extend(self.end_items_again(state, &task, failure));
        self.end_task(state, task, any_stored, items);
        if reply.wants_acknowledgement {
            let mut commands = Vec::new();
            state.refs.returns_read(task_id, worker, &mut commands);
            self.carry_out_references(state, commands);
        }
        self.deliver(state, wakes);
    }

    /// An attempt that was given up has ended all the same: nobody wants its results, wherever they are.
    fn on_late_reply(&self, state: &mut State, task_id: TaskId, reply: &TaskReply, worker: WorkerId, node: NodeId) {
        for (index, returned) in reply.returns.iter().enumerate() {
            if returned.value.is_none() {
                self.free_stray(state, task_id, ObjectId::of(task_id, index as u32 + 1), node);
            }
        }
        // What the worker keeps of its arguments is kept from now on by whoever owns it; the holds for us are over.
        self.relay_retained(state, reply, worker);
        if reply.wants_acknowledgement {
            let commands = vec![ReferenceCommand::AcknowledgeReturns { worker, task: task_id }];
            self.carry_out_references(state, commands);
        }
    }

    /// A copy that an attempt which was given up made. While the call is not over, a later attempt may make the same
    /// object on the same node, so that the copy goes only at the end.
    pub fn free_stray(&self, state: &mut State, task_id: TaskId, object: ObjectId, node: NodeId) {
        match state.tasks.get_mut(&task_id) {
            Some(task) if task.strays().contains(&node) => {}
            Some(task) => task.trouble_mut().strays.push(node),
            None => {
                if !self.is_located(state, &object, node) {
                    self.free_on(state, node, &object);
                }
            }
        }
    }

    fn is_located(&self, state: &State, object: &ObjectId, node: NodeId) -> bool {
        state
            .refs
            .get(object)
            .is_some_and(|entry| entry.locations().contains(&node))
    }

    /// Frees what attempts that were given up may have left behind, now that the call is over.
    fn free_strays(&self, state: &mut State, task: &PendingTask, items: std::ops::Range<u64>) {
        let returns = (0..task.spec.returns()).map(|index| task.spec.return_id(index));
        let items = items.map(|index| item_id(task.spec.task_id, index));
        let objects: Vec<ObjectId> = returns.chain(items).collect();
        for node in task.strays() {
            for object in &objects {
                if !self.is_located(state, object, *node) {
                    self.free_on(state, *node, object);
                }
            }
        }
    }

    fn first_failure(&self, state: &State, spec: &TaskSpec) -> Option<Arc<InlineValue>> {
        (0..spec.returns()).find_map(|index| match state.refs.get(&spec.return_id(index))?.value.value() {
            SlotValue::Inline(value) if value.is_failure() => Some(value),
            _ => None,
        })
    }

    /// A generator that ran again for lost items is over: those that it did not bring are lost for good.
    fn end_items_again(&self, state: &mut State, task: &PendingTask, failure: Option<Arc<InlineValue>>) -> Vec<Wake> {
        let mut wakes = Vec::new();
        for index in 0..task.items_again() {
            let object = item_id(task.spec.task_id, index);
            if state.refs.get(&object).is_none_or(|entry| entry.value.is_ready()) {
                continue;
            }
            let value = failure.clone().unwrap_or_else(|| {
                Arc::new(error_value(&ErrorValue {
                    kind: ERROR_OBJECT_LOST,
                    message: format!(
                        "object {object} is lost: {} ran again to make it and did not yield its item {index} this time",
                        task.spec.template.message.function_name
                    ),
                    object_id: id_bytes(object.as_bytes()),
                    ..ErrorValue::default()
                }))
            });
            self.set_value(state, object, SlotValue::Inline(value), &mut wakes);
        }
        wakes
    }

    /// The worker did not know the template's number: send the call again, with it.
    fn send_again(&self, state: &mut State, link: &Arc<ray_rpc::Link>, task_id: TaskId, spec: &Arc<TaskSpec>) {
        let (lease, sequence, incarnation) = match spec.actor.and_then(|actor| state.actors.get(&actor)) {
            Some(entry) => (Bytes::new(), 0, entry.incarnation()),
            None => match state.leases.lease_of(&task_id) {
                Some((lease, held)) => (id_bytes(lease.as_bytes()), held.sequence_of(&task_id), 0),
                None => return,
            },
        };
        let correlation = self.correlation();
        let Some(task) = state.tasks.get_mut(&task_id) else {
            return;
        };
        task.push = correlation;
        let attempt = task.attempt;
        let (message, payload) = self.push_message(state, spec, Some(link), lease, sequence, incarnation, attempt);
        let entry = crate::inner::PendingEntry {
            what: crate::inner::Pending::Task(task_id),
            link: link.id(),
        };
        state.pending.insert(correlation, entry);
        let _ = crate::session::send(
            link,
            ray_wire::kinds::PUSH_TASK,
            correlation,
            ray_wire::encode(&message),
            &payload,
        );
    }

    fn retry_actor_call(&self, state: &mut State, task_id: TaskId, spec: &Arc<TaskSpec>) {
        let Some(actor) = spec.actor else { return };
        let mut commands = Vec::new();
        if let Some(entry) = state.actors.get_mut(&actor) {
            // The call did not run, so that sending it again costs no retry.
            if entry.calls.replied(task_id) {
                let retries = state.tasks.get(&task_id).map_or(0, |task| task.retries_left);
                let group = &spec.template.message.concurrency_group;
                entry.calls.submit(task_id, group, true, retries, &mut commands);
            }
        }
        self.carry_out_actor(state, actor, commands);
    }

    fn retry_actor_exception(&self, state: &mut State, actor: ray_ids::ActorId, spec: &Arc<TaskSpec>) -> bool {
        let mut commands = Vec::new();
        let retried = state.actors.get_mut(&actor).is_some_and(|entry| {
            entry
                .calls
                .retry_after_exception(spec.task_id, &spec.template.message.concurrency_group, &mut commands)
        });
        if retried {
            if let Some(task) = state.tasks.get_mut(&spec.task_id) {
                task.attempt += 1;
            }
        }
        self.carry_out_actor(state, actor, commands);
        retried
    }

    /// Has owners note what the worker keeps.
    fn relay_retained(&self, state: &mut State, reply: &TaskReply, worker: WorkerId) {
        let mut commands = Vec::new();
        for retained in &reply.retained {
            let Some(reference) = &retained.reference else { continue };
            if let Ok(object) = ObjectId::from_binary(&reference.object_id) {
                state
                    .refs
                    .relay_borrow(object, worker, retained.generation, &mut commands);
            }
        }
        self.carry_out_references(state, commands);
    }

    /// Stores one return or item. Adds who is to be woken to `wakes`.
    #[allow(clippy::too_many_arguments)]
    pub fn accept_return(
        &self,
        state: &mut State,
        object: ObjectId,
        returned: &ReturnValue,
        payload: &mut Bytes,
        task: TaskId,
        worker: WorkerId,
        node: NodeId,
        wakes: &mut Vec<Wake>,
    ) -> Result<(), ray_wire::WireError> {
        if let Some(layout) = &returned.value {
            // Many calls return the same small value, `None` above all: they share it.
            if let Some(same) = state.last_return.as_ref().filter(|last| last.is_next(layout, payload)) {
                self.set_value(state, object, SlotValue::Inline(same.clone()), wakes);
                return Ok(());
            }
        }
        let value = match &returned.value {
            Some(layout) => Some(Arc::new(InlineValue::take(layout, payload, true)?)),
            None => None,
        };
        let contained = value.as_ref().map_or(&returned.contained[..], |value| &value.contained);
        self.count_contained(state, object, contained, Cover::Return { task, worker })?;
        match value {
            Some(value) => {
                if value.is_shareable() {
                    state.last_return = Some(value.clone());
                }
                self.set_value(state, object, SlotValue::Inline(value), wakes);
            }
            None => {
                if !state.refs.add_location(&object, node) {
                    // Nobody wants it any more.
                    self.free_on(state, node, &object);
                }
                let stored = SlotValue::Stored {
                    bytes: returned.stored_bytes,
                    locations: None,
                };
                self.set_value(state, object, stored, wakes);
            }
        }
        Ok(())
    }

    /// Counts what a new object of ours contains, for as long as it lives.
    pub fn count_contained(
        &self,
        state: &mut State,
        outer: ObjectId,
        contained: &[ray_wire::ReferenceInfo],
        cover: Cover,
    ) -> Result<(), ray_wire::WireError> {
        let mut commands = Vec::new();
        for info in contained {
            let inner = Contained::from_info(info)?;
            let owner = inner.owner.worker()?;
            if owner == self.worker_id {
                state.refs.contain(outer, &[inner.object]);
            } else {
                self.note_address(state, &inner.owner);
                state
                    .refs
                    .borrow(inner.object, owner, cover, Slot::pending(), &mut commands);
                state.refs.contain(outer, &[inner.object]);
                state.refs.remove_local(&inner.object, &mut commands);
            }
        }
        self.carry_out_references(state, commands);
        Ok(())
    }

    /// The object's value is known. Adds who is to be woken to `wakes`.
    pub fn set_value(&self, state: &State, object: ObjectId, value: SlotValue, wakes: &mut Vec<Wake>) {
        if let Some(entry) = state.refs.get(&object) {
            entry.value.set(value, wakes);
        }
    }

    /// The object's value is known: whoever waited is woken.
    pub fn set_and_tell(&self, state: &mut State, object: ObjectId, value: SlotValue) {
        let mut wakes = Vec::new();
        self.set_value(state, object, value, &mut wakes);
        self.deliver(state, wakes);
    }

    /// Wakes whoever waited.
    pub fn deliver(&self, state: &mut State, wakes: Vec<Wake>) {
        for wake in wakes {
            match wake {
                Wake::Group(group) => group.arrive(),
                Wake::Queue(queue, token) => queue.push(token),
                Wake::Task(task) => self.argument_arrived(state, task),
                Wake::Remote(link, correlation) => self.answer_status(state, &link, correlation),
            }
        }
        self.run_ready(state);
    }

    /// A call ends here: its arguments lose their counts, its specification is kept where its returns may be lost.
    pub fn end_task(&self, state: &mut State, task: PendingTask, any_stored: bool, items: StreamItems) {
        if !task.strays().is_empty() {
            // How many items a lost attempt had stored and not yet told of is not known; few are ever under way.
            let untold = if task.spec.template.message.num_returns < 0 {
                items.seen..items.seen + UNTOLD_ITEMS
            } else {
                0..0
            };
            self.free_strays(state, &task, untold);
        }
        let items_seen = items.seen.max(task.items_again());
        let any_stored = any_stored || items.any_stored || task.items_again() > 0;
        let spec = task.spec;
        let mut commands = Vec::new();
        if any_stored && spec.actor.is_none() && spec.template.message.max_retries != 0 {
            let returns = (0..spec.returns()).map(|index| spec.return_id(index));
            let items = (0..items_seen).map(|index| item_id(spec.task_id, index));
            let live = returns
                .chain(items)
                .filter(|object| state.refs.get(object).is_some())
                .count();
            for object in &spec.pinned {
                state.refs.add_lineage(object);
            }
            let dropped = state.lineage.retain(
                spec.task_id,
                spec.pinned.to_vec(),
                live as u32,
                spec.bytes(),
                task.retries_left,
            );
            state.lineage_specs.insert(spec.task_id, (spec.clone(), items_seen));
            self.drop_lineage(state, dropped);
        }
        for object in &spec.pinned {
            state.refs.remove_submitted(object, &mut commands);
        }
        self.carry_out_references(state, commands);
    }

    pub fn drop_lineage(&self, state: &mut State, dropped: Vec<ray_ownership::lineage::Dropped>) {
        let mut commands = Vec::new();
        for dropped in dropped {
            state.lineage_specs.remove(&dropped.task);
            for object in &dropped.arguments {
                state.refs.remove_lineage(object, &mut commands);
            }
        }
        self.carry_out_references(state, commands);
    }

    /// A call that never ran, or whose outcome is the runtime's own: every return gets the value.
    pub fn finish_with(&self, state: &mut State, task_id: TaskId, value: Arc<InlineValue>) {
        let Some(task) = state.tasks.remove(&task_id) else {
            return;
        };
        let spec = task.spec.clone();
        let mut wakes = Vec::new();
        for index in 0..spec.returns() {
            let object = spec.return_id(index);
            self.set_value(state, object, SlotValue::Inline(value.clone()), &mut wakes);
        }
        let items = self.end_stream(state, task_id, 0, Some(value.clone()));
        wakes.extend(self.end_items_again(state, &task, Some(value)));
        self.end_task(state, task, false, items);
        self.deliver(state, wakes);
    }

    /// The call was cancelled.
    pub fn finish_cancelled(&self, state: &mut State, task_id: TaskId) {
        let name = state
            .tasks
            .get(&task_id)
            .map(|task| task.spec.template.message.function_name.clone())
            .unwrap_or_default();
        let error = ErrorValue {
            kind: ERROR_TASK_CANCELLED,
            message: format!("{name} was cancelled"),
            task_id: id_bytes(task_id.as_bytes()),
            name,
            ..ErrorValue::default()
        };
        self.finish_with(state, task_id, Arc::new(error_value(&error)));
    }
}

/// A failure of the runtime itself.
pub(crate) fn system_error(message: String) -> InlineValue {
    error_value(&ErrorValue {
        kind: ray_wire::layout::ERROR_SYSTEM,
        message,
        ..ErrorValue::default()
    })
}
