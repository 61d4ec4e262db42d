//! Streams of items: the consumer's end of a generator call.
//!
//! Invariants:
//! 1. Item `i` is the object of index `i + 2` of the call's task (index 1 is the call's own return), whoever yields it and
//!    however often.
//! 2. An item that arrived and was not taken is counted once, by the stream; taking it hands that count over.
//! 3. A failure of the call is its last item.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, OnceLock};
use std::time::Instant;

use bytes::Bytes;
use ray_ids::{NodeId, ObjectId, TaskId, WorkerId};
use ray_wire::{id_bytes, kinds, GeneratorConsumed, GeneratorItem, ReturnValue};

use crate::inner::{CoreWorker, Inner, Reference, State};
use crate::links::link_state;
use crate::replies::system_error;
use crate::session::send;
use crate::slot::{lock, CompletionsInner, Group, Slot, SlotValue};
use crate::value::InlineValue;
use crate::{Completions, WorkerError};

#[derive(Debug, Default)]
struct StreamState {
    /// Items that arrived and were not taken.
    arrived: BTreeMap<u64, Reference>,
    /// The next item to be taken.
    next: u64,
    /// How many items there are, once known.
    total: Option<u64>,
    /// Highest item number seen, plus one.
    seen: u64,
    waiters: Vec<Arc<Group>>,
    watchers: Vec<(Arc<CompletionsInner>, u64)>,
    worker: Option<WorkerId>,
    /// The push that yields, by its correlation.
    push: u64,
    /// Whether an item was large enough for the object store.
    any_stored: bool,
    abandoned: bool,
}

/// The consumer's end.
pub struct Stream {
    core: Arc<Inner>,
    task: TaskId,
    backpressure: u32,
    /// A dynamic call's items are handed out together, by its return.
    streaming: bool,
    state: Mutex<StreamState>,
    completed: OnceLock<Reference>,
}

impl std::fmt::Debug for Stream {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Stream({})", self.task)
    }
}

/// What a look at the stream finds.
pub enum NextItem {
    Item(Reference),
    End,
    /// Not known yet.
    Unknown,
}

impl Stream {
    pub(crate) fn new(core: Arc<Inner>, task: TaskId, backpressure: u32, streaming: bool) -> Arc<Self> {
        Arc::new(Self {
            core,
            task,
            backpressure,
            streaming,
            state: Mutex::default(),
            completed: OnceLock::new(),
        })
    }

    pub(crate) fn set_completed(&self, reference: Reference) {
        let _ = self.completed.set(reference);
    }

    /// The reference that resolves when the call is over.
    pub fn completed(&self) -> Option<&Reference> {
        self.completed.get()
    }

    /// The call.
    pub fn task_id(&self) -> TaskId {
        self.task
    }

    /// Items below this were taken.
    pub(crate) fn watermark(&self) -> u64 {
        lock(&self.state).next
    }

    /// Whether every item was taken.
    pub fn is_finished(&self) -> bool {
        let state = lock(&self.state);
        state.total.is_some_and(|total| state.next >= total)
    }

    /// The next item, if it is there.
    pub fn try_next(&self) -> NextItem {
        let (item, report) = {
            let mut state = lock(&self.state);
            let next = state.next;
            match state.arrived.remove(&next) {
                Some(reference) => {
                    state.next += 1;
                    let report = (self.backpressure > 0)
                        .then_some((state.worker, state.next))
                        .filter(|_| state.total.is_none());
                    (reference, report)
                }
                None if state.total.is_some_and(|total| next >= total) => return NextItem::End,
                None => return NextItem::Unknown,
            }
        };
        if let Some((Some(worker), consumed)) = report {
            self.tell(worker, consumed, false);
        }
        NextItem::Item(item)
    }

    /// The next item, or `None` at the end. Waits until the deadline.
    pub fn next(&self, deadline: Option<Instant>) -> Result<Option<Reference>, WorkerError> {
        let mut blocked = None;
        loop {
            match self.try_next() {
                NextItem::Item(reference) => return Ok(Some(reference)),
                NextItem::End => return Ok(None),
                NextItem::Unknown => {}
            }
            let group = Group::new(1);
            {
                let mut state = lock(&self.state);
                if state.arrived.contains_key(&state.next) || state.total.is_some() {
                    continue;
                }
                state.waiters.push(group.clone());
            }
            if blocked.is_none() {
                blocked = Some(self.core.blocked("next item of a generator"));
            }
            self.core.wait_for(&group.waiter, deadline, "the generator", || {
                group.is_done().then_some(())
            })?;
        }
    }

    /// Has the queue told when the next item, or the end, is known.
    pub fn watch_next(&self, queue: &Completions, token: u64) {
        let mut state = lock(&self.state);
        if state.arrived.contains_key(&state.next) || state.total.is_some() {
            drop(state);
            queue.push(token);
        } else {
            state.watchers.push((queue.0.clone(), token));
        }
    }

    /// The consumer wants no more.
    pub fn abandon(&self) {
        let (worker, consumed) = {
            let mut state = lock(&self.state);
            if state.abandoned || state.total.is_some() {
                state.arrived.clear();
                return;
            }
            state.abandoned = true;
            state.arrived.clear();
            (state.worker, state.next)
        };
        if let Some(worker) = worker {
            self.tell(worker, consumed, true);
        }
    }

    fn tell(&self, worker: WorkerId, consumed: u64, abandoned: bool) {
        let Ok(mut state) = self.core.enter() else { return };
        if let Ok(link) = self.core.worker_link(&mut state, worker) {
            let message = GeneratorConsumed {
                task_id: id_bytes(self.task.as_bytes()),
                consumed,
                abandoned,
            };
            let _ = send(&link, kinds::GENERATOR_CONSUMED, 0, ray_wire::encode(&message), &[]);
        }
    }

    fn wake(state: &mut StreamState) {
        for group in state.waiters.drain(..) {
            group.arrive();
        }
        for (queue, token) in state.watchers.drain(..) {
            queue.push(token);
        }
    }

    fn arrived(&self, index: u64, reference: Reference) {
        let mut state = lock(&self.state);
        state.seen = state.seen.max(index + 1);
        if !state.abandoned {
            state.arrived.insert(index, reference);
            Self::wake(&mut state);
        }
    }

    fn ended(&self, total: u64) {
        let mut state = lock(&self.state);
        if state.total.is_none() {
            state.total = Some(total);
        }
        Self::wake(&mut state);
    }
}

/// What a stream had when it ended.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct StreamItems {
    pub seen: u64,
    pub any_stored: bool,
}

/// The object of a generator's item.
pub(crate) fn item_id(task: TaskId, index: u64) -> ObjectId {
    ObjectId::of(task, index as u32 + 2)
}

impl Inner {
    /// An item arrived.
    pub fn on_generator_item(
        self: &Arc<Self>,
        state: &mut State,
        link: &Arc<ray_rpc::Link>,
        correlation: u64,
        item: GeneratorItem,
        mut payload: Bytes,
    ) -> Result<(), WorkerError> {
        let task = TaskId::from_binary(&item.task_id).map_err(ray_wire::WireError::from)?;
        let said = link_state(link);
        let worker = said.peer_id.get().copied().unwrap_or(WorkerId::NIL);
        let node = said.peer.get().map_or(self.node_id, crate::connect::node_of);
        let object = item_id(task, item.index);
        let returned = item.item.unwrap_or_default();
        let stored = returned.value.is_none();
        if state.tasks.get(&task).is_none_or(|task| task.push != correlation) {
            // An attempt that was given up still yields.
            if stored {
                self.free_stray(state, task, object, node);
            }
            return Ok(());
        }
        let Some(stream) = state.streams.get(&task).cloned() else {
            let consumed = GeneratorConsumed {
                task_id: item.task_id.clone(),
                consumed: item.index + 1,
                abandoned: false,
            };
            let _ = send(link, kinds::GENERATOR_CONSUMED, 0, ray_wire::encode(&consumed), &[]);
            return self.on_item_again(state, object, &returned, &mut payload, (task, worker, node));
        };
        let (known, tell) = {
            let mut inner = lock(&stream.state);
            inner.worker = Some(worker);
            let first = std::mem::replace(&mut inner.push, correlation) != correlation;
            inner.any_stored |= stored;
            // What was taken while nobody yielded is news to whoever yields now.
            let tell = first && (inner.abandoned || inner.next > 0);
            let known = item.index < inner.next || inner.arrived.contains_key(&item.index);
            (known, tell.then_some((inner.next, inner.abandoned)))
        };
        if let Some((consumed, abandoned)) = tell {
            let message = GeneratorConsumed {
                task_id: item.task_id.clone(),
                consumed,
                abandoned,
            };
            let _ = send(link, kinds::GENERATOR_CONSUMED, 0, ray_wire::encode(&message), &[]);
        }
        if known {
            // A replay brings what arrived before.
            return self.on_item_again(state, object, &returned, &mut payload, (task, worker, node));
        }
        let reference = self.own_item(state, object);
        let mut wakes = Vec::new();
        self.accept_return(state, object, &returned, &mut payload, task, worker, node, &mut wakes)?;
        self.deliver(state, wakes);
        stream.arrived(item.index, reference);
        Ok(())
    }

    /// An item that arrived before came again: it takes the place of one that was lost, or is one copy more.
    fn on_item_again(
        &self,
        state: &mut State,
        object: ObjectId,
        returned: &ReturnValue,
        payload: &mut Bytes,
        (task, worker, node): (TaskId, WorkerId, NodeId),
    ) -> Result<(), WorkerError> {
        let wanted = state.refs.get(&object).is_some_and(|entry| {
            let lost = entry.locations().is_empty() && matches!(entry.value.value(), SlotValue::Stored { .. });
            entry.is_owned() && (lost || !entry.value.is_ready())
        });
        if wanted {
            let mut wakes = Vec::new();
            self.accept_return(state, object, returned, payload, task, worker, node, &mut wakes)?;
            self.deliver(state, wakes);
        } else if returned.value.is_none() && !state.refs.add_location(&object, node) {
            self.free_on(state, node, &object);
        }
        Ok(())
    }

    fn own_item(self: &Arc<Self>, state: &mut State, object: ObjectId) -> Reference {
        let slot = Slot::pending();
        state.refs.own(object, slot.clone());
        Reference {
            id: object,
            slot,
            core: self.clone(),
        }
    }

    /// The call is over: its stream knows its end. A failure becomes the last item of a streaming call.
    pub fn end_stream(
        &self,
        state: &mut State,
        task: TaskId,
        items: u64,
        failure: Option<Arc<InlineValue>>,
    ) -> StreamItems {
        let Some(stream) = state.streams.remove(&task) else {
            return StreamItems::default();
        };
        let had = {
            let inner = lock(&stream.state);
            StreamItems {
                seen: inner.seen.max(inner.next),
                any_stored: inner.any_stored,
            }
        };
        if !stream.streaming {
            // Its items belong to its return; the stream's own counts go.
            lock(&stream.state).arrived.clear();
            stream.ended(items);
            return had;
        }
        let failure = failure.or_else(|| {
            let abandoned = lock(&stream.state).abandoned;
            (items < had.seen && !abandoned).then(|| {
                let message = format!(
                    "the generator was run again after a failure and yielded {items} items, but {} had arrived before",
                    had.seen
                );
                Arc::new(system_error(message))
            })
        });
        let Some(failure) = failure else {
            stream.ended(items);
            return had;
        };
        let index = had.seen;
        let object = item_id(task, index);
        let slot = Slot::known(SlotValue::Inline(failure));
        state.refs.own(object, slot.clone());
        stream.arrived(
            index,
            Reference {
                id: object,
                slot,
                core: stream.core.clone(),
            },
        );
        stream.ended(index + 1);
        had
    }
}

impl CoreWorker {
    /// The nodes that have an object, and its size where it is in a store.
    pub fn locations(&self, object: &ObjectId) -> (Vec<NodeId>, Option<u64>) {
        let state = self.0.lock();
        let Some(entry) = state.refs.get(object) else {
            return (Vec::new(), None);
        };
        match entry.value.value() {
            SlotValue::Stored { bytes, .. } => (entry.locations().to_vec(), Some(bytes)),
            SlotValue::Inline(value) => (vec![self.0.node_id], Some(value.size() as u64)),
            SlotValue::Pending => (Vec::new(), None),
        }
    }
}
