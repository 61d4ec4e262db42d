//! The object store in words: what is full and who holds it, for errors and questions.
//!
//! Invariant: 1. Describing changes nothing but what the rings had to say anyway.

use super::node::Node;
use crate::objects::{RoomFor, Wanted};
use ray_ids::ObjectId;
use ray_store::Role;
use serde_json::{json, Value};

impl Node {
    pub(super) fn full_error(&mut self, wanted: &Wanted) -> String {
        let ledger = self.store.ledger();
        let (spilled_objects, spilled_bytes) = self.spilled.totals();
        let mut text = format!(
            "the object store of node {} is full: {} bytes are needed and nothing became free within {} s. \
             Of {} bytes, primary copies have {}, cached copies {}, objects being created {}, objects in transfer {}, \
             memory lent to processes and unused {}, deleted objects that are still in use {}, and {} are free in pieces. \
             {spilled_objects} objects ({spilled_bytes} bytes) are on disk.",
            self.node_id,
            wanted.bytes,
            self.limits.object_store_full_wait_ms / 1_000,
            ledger.capacity,
            ledger.primaries,
            ledger.cache,
            ledger.being_created,
            ledger.in_transfer,
            ledger.lent_unused,
            ledger.awaiting_unpin,
            ledger.free,
        );
        if let Some(error) = &self.spill_error {
            text.push_str(&format!(" Spilling failed: {error}."));
        } else {
            text.push_str(" What is neither on disk nor free is in use by a process: drop references and views to it.");
        }
        text.push_str("\nOwners of the most bytes:");
        for (owner, objects, bytes) in self.owners.table().into_iter().take(10) {
            let pid = self
                .processes
                .get(&owner)
                .map_or_else(|| "elsewhere".to_string(), |p| format!("pid {}", p.pid));
            text.push_str(&format!(
                "\n  {} ({pid}): {objects} object(s), {bytes} bytes",
                &owner.hex()[..12]
            ));
        }
        text
    }

    pub(super) fn describe_objects(&mut self) -> Value {
        self.drain_store();
        let mut rows: Vec<Value> = self
            .store
            .objects()
            .map(|entry| {
                json!({
                    "object_id": entry.object.hex(), "bytes": entry.size,
                    "role": if entry.role == Role::Primary { "primary" } else { "cache" },
                    "owner": self.owners.owner(&entry.object).map(|owner| owner.hex()),
                    "spilled": self.spilled.location(&entry.object).is_some(), "in_memory": true,
                })
            })
            .collect();
        let on_disk: Vec<(ObjectId, u64)> = self.spilled.objects().map(|(id, place)| (*id, place.length)).collect();
        for (object, bytes) in on_disk {
            if !self.store.contains(&object) {
                rows.push(json!({
                    "object_id": object.hex(), "bytes": bytes, "role": "primary", "spilled": true, "in_memory": false,
                    "owner": self.owners.owner(&object).map(|owner| owner.hex()),
                }));
            }
        }
        json!({ "node_id": self.node_id.hex(), "objects": rows })
    }

    pub(super) fn describe_memory(&mut self) -> Value {
        self.drain_store();
        let ledger = self.store.ledger();
        let (spilled_objects, spilled_bytes) = self.spilled.totals();
        let owners: Vec<Value> = self
            .owners
            .table()
            .into_iter()
            .map(|(owner, objects, bytes)| {
                let pid = self.processes.get(&owner).map(|process| process.pid);
                json!({ "owner": owner.hex(), "pid": pid, "objects": objects, "bytes": bytes })
            })
            .collect();
        json!({
            "node_id": self.node_id.hex(),
            "store_path": self.store.path(),
            "ledger": {
                "capacity": ledger.capacity, "primaries": ledger.primaries, "cache": ledger.cache,
                "being_created": ledger.being_created, "in_transfer": ledger.in_transfer,
                "lent_unused": ledger.lent_unused, "awaiting_unpin": ledger.awaiting_unpin, "free": ledger.free,
                "objects": ledger.objects, "clients": ledger.clients,
            },
            "spilled_objects": spilled_objects, "spilled_bytes": spilled_bytes,
            "waiting_bytes": self.room.bytes(),
            "spill_error": self.spill_error,
            "owners": owners,
        })
    }

    pub(super) fn describe_object_waits(&self) -> Value {
        let now = self.now();
        let room = self.room.iter().map(|wanted| {
            let what = match &wanted.purpose {
                RoomFor::Extent { process, .. } => format!("process {process}"),
                RoomFor::Transfer { object } => format!("transfer of {object}"),
                RoomFor::Restore { object } => format!("restore of {object}"),
            };
            json!({
                "kind": "room", "for": what, "bytes": wanted.bytes, "waiting_ms": now.saturating_sub(wanted.since),
                "reason": "the object store is full",
            })
        });
        let pulls = self.pulls.describe().into_iter().map(|(object, reason, here, total)| {
            json!({ "kind": "pull", "object_id": object.hex(), "reason": reason, "bytes_here": here, "bytes": total })
        });
        room.chain(pulls).collect::<Vec<Value>>().into()
    }
}
