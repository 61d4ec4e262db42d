//! What processes ask about placement groups: making, removing, waiting.
//!
//! It refuses names that are taken, groups of jobs that do not run, and more waiting than its limit.
//!
//! Invariants:
//! 1. Making or removing a group twice is doing it once.
//! 2. Every wait is answered: when the group is created, removed, or the time is over.

use ray_ids::{JobId, NodeId, PlacementGroupId};
use ray_wire::{GcsReply, PlacementGroupKey, PlacementGroupSpecification, GCS_ERROR_NAME_TAKEN, GCS_ERROR_NOT_FOUND};

use crate::placement_groups::{GroupPhase, GroupRow, GroupWaiter};
use crate::state::{done, invalid, refusal, Gcs, Refusal, Timer};

impl Gcs {
    pub(crate) fn create_group(&mut self, specification: PlacementGroupSpecification) -> GcsReply {
        let row = match GroupRow::new(specification, self.groups.next_order, self.now_ms) {
            Ok(row) => row,
            Err(problem) => return invalid(problem),
        };
        let id = row.id;
        if self.groups.rows.contains_key(&id) {
            return done();
        }
        if self.groups.was_removed(&id) {
            return invalid(format!("placement group {id} was removed"));
        }
        if let Some(holder) = row.name_key().and_then(|key| self.groups.names.get(&key)) {
            let name = &row.specification.name;
            return refusal(
                GCS_ERROR_NAME_TAKEN,
                format!("the name {name:?} is taken by placement group {holder}"),
            );
        }
        if let Ok(job) = JobId::from_binary(&row.specification.job_id) {
            if !self.jobs.runs(job) {
                return invalid(format!("job {job} of placement group {id} does not run"));
            }
        }
        self.groups.next_order += 1;
        self.groups.rows.insert(id, row);
        self.groups.index_name(id);
        self.store_group(id);
        self.place_at_end = true;
        done()
    }

    fn find_group(&self, key: &PlacementGroupKey) -> Result<PlacementGroupId, Refusal> {
        if !key.placement_group_id.is_empty() {
            return PlacementGroupId::from_binary(&key.placement_group_id)
                .map_err(|error| Refusal::invalid(error.to_string()));
        }
        let found = self
            .groups
            .names
            .get(&(key.namespace.clone(), key.name.clone()))
            .copied();
        found.ok_or_else(|| {
            let (name, namespace) = (&key.name, &key.namespace);
            Refusal::not_found(format!(
                "no placement group has the name {name:?} in namespace {namespace:?}"
            ))
        })
    }

    pub(crate) fn remove_group_request(&mut self, key: &PlacementGroupKey) -> GcsReply {
        let id = match self.find_group(key) {
            Ok(id) => id,
            Err(refusal) => return refusal.into(),
        };
        if !self.groups.rows.contains_key(&id) && !self.groups.was_removed(&id) {
            return refusal(GCS_ERROR_NOT_FOUND, format!("placement group {id} is not known"));
        }
        self.remove_group(id, "it was removed");
        done()
    }

    pub(crate) fn wait_group(&mut self, node: NodeId, correlation: u64, key: &PlacementGroupKey) -> Option<GcsReply> {
        let id = match self.find_group(key) {
            Ok(id) => id,
            Err(refusal) => return Some(refusal.into()),
        };
        let gone = || refusal(GCS_ERROR_NOT_FOUND, format!("placement group {id} was removed"));
        match self.groups.rows.get(&id).map(|row| &row.phase) {
            Some(GroupPhase::Created) => return Some(done()),
            Some(GroupPhase::Removed) => return Some(gone()),
            // Its registration may be under way, so that it is worth waiting for.
            Some(_) => {}
            None if self.groups.was_removed(&id) => return Some(gone()),
            None => {}
        }
        if key.wait_ms == 0 {
            return Some(GcsReply::default());
        }
        if self.groups.waiters.len() as u64 >= self.settings.maximum_waiting_questions {
            return Some(invalid(
                "too many questions wait for placement groups (maximum_waiting_questions)",
            ));
        }
        let waiter = self.groups.next_waiter;
        self.groups.next_waiter += 1;
        self.groups.waiters.insert(
            waiter,
            GroupWaiter {
                node,
                correlation,
                group: id,
            },
        );
        self.set_timer(self.now_ms.saturating_add(key.wait_ms), Timer::GroupWait(waiter));
        None
    }

    pub(crate) fn answer_group_waiters(&mut self, id: PlacementGroupId, reply: &GcsReply) {
        let ready: Vec<u64> = self
            .groups
            .waiters
            .iter()
            .filter(|(_, waiter)| waiter.group == id)
            .map(|(at, _)| *at)
            .collect();
        for at in ready {
            if let Some(waiter) = self.groups.waiters.remove(&at) {
                self.reply(waiter.node, waiter.correlation, reply.clone());
            }
        }
    }

    pub(crate) fn on_group_wait_over(&mut self, at: u64) {
        if let Some(waiter) = self.groups.waiters.remove(&at) {
            self.reply(waiter.node, waiter.correlation, GcsReply::default());
        }
    }

    pub(crate) fn group_waits_forget_node(&mut self, node: NodeId) {
        self.groups.waiters.retain(|_, waiter| waiter.node != node);
    }
}
