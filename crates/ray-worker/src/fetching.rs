//! Making objects local, and making lost ones again.
//!
//! Invariants:
//! 1. An object is asked of the raylet once, however many threads wait for it.
//! 2. A lost object that can be made again is; otherwise its slot holds an error that says why not.

use std::sync::Arc;
use std::time::Duration;

use ray_ids::{NodeId, ObjectId};
use ray_ownership::lineage::NotRebuildable;
use ray_wire::layout::{ErrorValue, ERROR_OBJECT_LOST, ERROR_RECONSTRUCTION_FAILED};
use ray_wire::{id_bytes, kinds, FetchFailed, FetchObject, ReportLost};

use crate::generators::item_id;
use crate::inner::{Inner, Pending, PendingEntry, Retry, State};
use crate::slot::{Group, Slot, SlotValue};
use crate::value::error_value;

impl Inner {
    /// Has the raylet make an object local, once; the group hears of its coming.
    pub fn fetch(&self, state: &mut State, object: ObjectId, group: Option<&Arc<Group>>) {
        let waiting = state.fetches.get_mut(&object);
        if let Some(waiting) = waiting {
            let known = |group: &&Arc<Group>| waiting.iter().any(|other| Arc::ptr_eq(other, group));
            let new = group.filter(|group| !known(group)).cloned();
            waiting.extend(new);
            return;
        }
        state.fetches.insert(object, group.cloned().into_iter().collect());
        self.send_fetch(state, object);
    }

    pub fn send_fetch(&self, state: &mut State, object: ObjectId) {
        let Some(entry) = state.refs.get(&object) else {
            return self.end_fetch(state, object);
        };
        let SlotValue::Stored { locations, .. } = entry.value.value() else {
            return self.end_fetch(state, object);
        };
        let mut locations = locations.map(|locations| locations.to_vec()).unwrap_or_default();
        locations.extend(
            entry
                .locations()
                .iter()
                .filter_map(|node| state.nodes.get(node).cloned()),
        );
        let owner = self.owner_address(state, &object);
        let message = FetchObject {
            object_id: id_bytes(object.as_bytes()),
            locations,
            owner: Some(owner),
        };
        let correlation = self.correlation();
        state.pending.insert(
            correlation,
            PendingEntry {
                what: Pending::Fetch,
                link: self.raylet.id(),
            },
        );
        let _ = self
            .raylet
            .send(kinds::FETCH_OBJECT, correlation, ray_wire::encode(&message), &[]);
    }

    fn end_fetch(&self, state: &mut State, object: ObjectId) {
        for group in state.fetches.remove(&object).unwrap_or_default() {
            group.arrive();
        }
    }

    /// The raylet made an object local. It tells the owner of a new copy itself.
    pub fn on_object_local(&self, state: &mut State, object: ObjectId) {
        self.end_fetch(state, object);
    }

    /// The raylet could not.
    pub fn on_fetch_failed(&self, state: &mut State, object: ObjectId, failure: &FetchFailed) {
        let absent: Vec<NodeId> = failure
            .absent_nodes
            .iter()
            .filter_map(|node| NodeId::from_binary(node).ok())
            .collect();
        let Some(entry) = state.refs.get(&object) else {
            return self.end_fetch(state, object);
        };
        let slot = entry.value.clone();
        if failure.store_full {
            state.fetch_failures.insert(object, failure.reason.clone());
        } else if let Some(owner) = entry.borrowed_owner() {
            // The owner knows best: tell it, and ask again.
            let message = ReportLost {
                object_id: id_bytes(object.as_bytes()),
                node_ids: failure.absent_nodes.clone(),
            };
            if let Ok(link) = self.worker_link(state, owner) {
                let _ = crate::session::send(&link, kinds::REPORT_LOST, 0, ray_wire::encode(&message), &[]);
            }
            slot.forget();
            slot.note_asked();
            self.retry_later(state, Duration::from_millis(20), Retry::AskOwner(object));
        } else if absent.is_empty() && !entry.locations().is_empty() {
            // Nothing is known to be lost: the holders could not be reached just now.
            return self.retry_later(state, Duration::from_millis(100), Retry::Fetch(object));
        } else {
            self.locations_lost(state, object, &absent);
        }
        self.end_fetch(state, object);
    }

    /// As owner: these nodes have no copy.
    pub fn locations_lost(&self, state: &mut State, object: ObjectId, nodes: &[NodeId]) {
        for node in nodes {
            state.refs.remove_location(&object, *node);
        }
        let Some(slot) = state.refs.get(&object).map(|entry| entry.value.clone()) else {
            return;
        };
        self.rebuild_if_lost(state, object, &slot);
    }

    /// As owner: makes a stored object of which no copy is left again, or says why that cannot be.
    pub fn rebuild_if_lost(&self, state: &mut State, object: ObjectId, slot: &Arc<Slot>) {
        let Some(entry) = state.refs.get(&object) else { return };
        if !entry.is_owned() || !entry.locations().is_empty() || !matches!(slot.value(), SlotValue::Stored { .. }) {
            return;
        }
        let task_id = object.task_id();
        if let Some(task) = state.tasks.get_mut(&task_id) {
            // It runs, or runs again for another of its results; if it does not make this one as well, its end says so.
            let first_item = item_id(task_id, 0).index();
            let trouble = task.trouble_mut();
            trouble.items_again = trouble
                .items_again
                .max(u64::from(object.index().saturating_sub(first_item)) + 1);
            slot.forget();
            return;
        }
        let outcome = if object.index() >= ObjectId::FIRST_PUT_INDEX {
            Err((
                ERROR_OBJECT_LOST,
                "it was created by ray.put, and the only copies were on nodes that died".to_owned(),
            ))
        } else {
            match (
                state.lineage.begin_rebuild(task_id),
                state.lineage_specs.remove(&task_id),
            ) {
                (Ok((arguments, retries_left)), Some((spec, items))) => Ok((arguments, retries_left, spec, items)),
                (Err(NotRebuildable::NoRetriesLeft), _) => Err((
                    ERROR_RECONSTRUCTION_FAILED,
                    "its task has no retries left (max_retries) to run it once more".to_owned(),
                )),
                _ => Err((
                    ERROR_OBJECT_LOST,
                    "every copy was on nodes that died, and its task may not run again (max_retries=0, an actor's \
                     method, or its specification was evicted)"
                        .to_owned(),
                )),
            }
        };
        match outcome {
            Ok((arguments, retries_left, spec, items)) => {
                let mut commands = Vec::new();
                for argument in &arguments {
                    state.refs.revive(argument);
                    state.refs.add_submitted(argument);
                    state.refs.remove_lineage(argument, &mut commands);
                }
                let returns = (0..spec.returns()).map(|index| spec.return_id(index));
                for id in returns.chain((0..items).map(|index| item_id(task_id, index))) {
                    state.refs.revive(&id);
                    if let Some(entry) = state.refs.get(&id) {
                        if entry.locations().is_empty() && matches!(entry.value.value(), SlotValue::Stored { .. }) {
                            entry.value.forget();
                        }
                    }
                }
                self.carry_out_references(state, commands);
                tracing::info!(
                    "object {object} was lost; {} runs again",
                    spec.template.message.function_name
                );
                self.start(state, spec, 1, retries_left);
                if let Some(task) = state.tasks.get_mut(&task_id).filter(|_| items > 0) {
                    task.trouble_mut().items_again = items;
                }
            }
            Err((kind, reason)) => {
                let error = ErrorValue {
                    kind,
                    message: format!("object {object} is lost: {reason}"),
                    object_id: id_bytes(object.as_bytes()),
                    ..ErrorValue::default()
                };
                self.set_and_tell(state, object, SlotValue::Inline(Arc::new(error_value(&error))));
            }
        }
    }
}
