//! Restart: owns how stored rows become the state again.
//!
//! It refuses rows that cannot be read, by table; it never starts with half of what was stored.
//!
//! Invariants:
//! 1. Each life of the control plane has a higher epoch than the last, stored before anything else leaves it.
//! 2. Nodes that were alive are expected back; until each is, or the time is over, nothing is placed.
//! 3. Actors that lived are alive still; those that waited or were being created are again, once nodes have spoken.
//! 4. An attempt to reserve bundles does not survive: nodes are told to return what they reserved when they register.

use std::collections::BTreeMap;
use std::sync::Arc;

use bytes::Bytes;
use prost::Message;
use ray_ids::{ActorId, ClusterId, JobId, NodeId, PlacementGroupId};
use ray_wire::{ActorCreation, GcsReply, ACTOR_ALIVE, ACTOR_DEAD};

use crate::actors::{ActorRow, Phase};
use crate::error::GcsError;
use crate::kv::split_row_key;
use crate::nodes::NodeRow;
use crate::placement_groups::{GroupPhase, GroupRow};
use crate::placing::Wish;
use crate::records::{ActorRecord, GroupRecord, JobRecord, KeyValueRecord, MetaRecord, NodeRecord, Row, Table};
use crate::settings::GcsSettings;
use crate::state::{Command, Gcs, Timer};

fn bad(table: Table, reason: impl std::fmt::Display) -> GcsError {
    GcsError::Row {
        table: table.name(),
        reason: reason.to_string(),
    }
}

fn read<M: Message + Default>(row: &Row) -> Result<M, GcsError> {
    M::decode(row.value.clone()).map_err(|error| bad(row.table, error))
}

impl Gcs {
    /// The control plane that had stored `rows`, or a new one where there are none, and its first commands.
    pub fn restore(
        settings: GcsSettings,
        rows: Vec<Row>,
        now_ms: u64,
        random: &mut dyn FnMut() -> u64,
    ) -> Result<(Self, Vec<Command>), GcsError> {
        if rows.is_empty() {
            let mut gcs = Self::new(settings, now_ms, random);
            let commands = gcs.finish_step(random);
            return Ok((gcs, commands));
        }
        let mut gcs = Self::empty(settings, now_ms);
        let mut tables: BTreeMap<Table, Vec<Row>> = BTreeMap::new();
        for row in rows {
            tables.entry(row.table).or_default().push(row);
        }
        let mut take = |table: Table| tables.remove(&table).unwrap_or_default();
        gcs.restore_meta(&take(Table::Meta))?;
        gcs.restore_nodes(&take(Table::Nodes))?;
        gcs.restore_jobs(&take(Table::Jobs))?;
        gcs.restore_groups(&take(Table::PlacementGroups))?;
        gcs.restore_actors(&take(Table::Actors), take(Table::ActorCreations))?;
        for row in take(Table::KeyValue) {
            let key = split_row_key(&row.key).ok_or_else(|| bad(row.table, "its key is not one"))?;
            gcs.kv.insert(key, read::<KeyValueRecord>(&row)?);
        }
        for row in take(Table::Requests) {
            let id: [u8; 8] = row
                .key
                .as_ref()
                .try_into()
                .map_err(|_| bad(row.table, "its key is not a number"))?;
            gcs.requests.restore(u64::from_be_bytes(id), read::<GcsReply>(&row)?);
        }
        gcs.epoch += 1;
        gcs.store_meta();
        gcs.expected_nodes = gcs.nodes.values().filter(|row| row.alive).map(|row| row.id).collect();
        if !gcs.expected_nodes.is_empty() {
            gcs.set_timer(now_ms + gcs.settings.node_reconnect_grace_ms, Timer::Recovery);
        }
        gcs.place_at_end = true;
        let commands = gcs.finish_step(random);
        Ok((gcs, commands))
    }

    fn restore_meta(&mut self, rows: &[Row]) -> Result<(), GcsError> {
        let row = rows.first().ok_or_else(|| bad(Table::Meta, "it is missing"))?;
        let record: MetaRecord = read(row)?;
        self.cluster_id = ClusterId::from_binary(&record.cluster_id).map_err(|error| bad(Table::Meta, error))?;
        self.epoch = record.epoch;
        self.jobs.next_number = record.next_job.max(1);
        Ok(())
    }

    fn restore_nodes(&mut self, rows: &[Row]) -> Result<(), GcsError> {
        for stored in rows {
            let id = NodeId::from_binary(&stored.key).map_err(|error| bad(stored.table, error))?;
            let record: NodeRecord = read(stored)?;
            let mut row = NodeRow::new(id, record.info.unwrap_or_default());
            row.alive = row.info.alive;
            row.death_reason = record.death_reason;
            row.drain_reason = record.drain_reason;
            row.drain_deadline_ms = record.drain_deadline_ms;
            if row.alive && row.drain_deadline_ms != 0 {
                self.set_timer(row.drain_deadline_ms.max(self.now_ms), Timer::Drain(id));
            }
            self.nodes.insert(id, row);
            self.refresh_view(id);
        }
        let mut dead: Vec<(u64, NodeId)> = self
            .nodes
            .values()
            .filter(|row| !row.alive)
            .map(|row| (row.info.end_time_ms, row.id))
            .collect();
        dead.sort_unstable();
        self.dead_nodes = dead.into_iter().map(|(_, id)| id).collect();
        Ok(())
    }

    fn restore_jobs(&mut self, rows: &[Row]) -> Result<(), GcsError> {
        for stored in rows {
            let id = JobId::from_binary(&stored.key).map_err(|error| bad(stored.table, error))?;
            self.jobs.rows.insert(id, read::<JobRecord>(stored)?);
        }
        let finished = self.jobs.rows.iter().filter(|(_, row)| row.finished);
        let mut finished: Vec<(u64, JobId)> = finished.map(|(id, row)| (row.end_time_ms, *id)).collect();
        finished.sort_unstable();
        self.jobs.finished = finished.into_iter().map(|(_, id)| id).collect();
        Ok(())
    }

    fn restore_groups(&mut self, rows: &[Row]) -> Result<(), GcsError> {
        for stored in rows {
            let id = PlacementGroupId::from_binary(&stored.key).map_err(|error| bad(stored.table, error))?;
            let record: GroupRecord = read(stored)?;
            let specification = record
                .specification
                .ok_or_else(|| bad(stored.table, "it has no specification"))?;
            let made = GroupRow::new(specification, record.order, record.registered_ms);
            let mut row = made.map_err(|problem| bad(stored.table, problem))?;
            row.attempt = record.attempt;
            row.was_created = record.was_created;
            row.created_ms = record.created_ms;
            if record.removed {
                row.phase = GroupPhase::Removed;
                row.pending_reason.clear();
                self.groups.removed.push_back(id);
            } else if record.was_created {
                for (bundle, node) in row.bundles.iter_mut().zip(&record.nodes) {
                    let alive = |node: &NodeId| self.nodes.get(node).is_some_and(|row| row.alive);
                    bundle.node = NodeId::from_binary(node).ok().filter(alive);
                }
                if row.bundles.iter().all(|bundle| bundle.node.is_some()) {
                    row.phase = GroupPhase::Created;
                    row.pending_reason.clear();
                }
            }
            self.groups.next_order = self.groups.next_order.max(record.order + 1);
            self.groups.rows.insert(id, row);
            self.groups.index_name(id);
        }
        Ok(())
    }

    fn restore_actors(&mut self, rows: &[Row], creations: Vec<Row>) -> Result<(), GcsError> {
        let mut creations: BTreeMap<Bytes, Bytes> = creations.into_iter().map(|row| (row.key, row.value)).collect();
        for stored in rows {
            let id = ActorId::from_binary(&stored.key).map_err(|error| bad(stored.table, error))?;
            let record: ActorRecord = read(stored)?;
            let state = record.state.ok_or_else(|| bad(stored.table, "it has no state"))?;
            let creation = creations.remove(&stored.key);
            let creation = creation.ok_or_else(|| bad(Table::ActorCreations, format!("actor {id} has none")))?;
            let creation = ActorCreation::decode(creation).map_err(|error| bad(Table::ActorCreations, error))?;
            let node = NodeId::from_binary(&record.node_id).ok();
            let phase = match (state.state, node) {
                (ACTOR_DEAD, _) => Phase::Dead,
                (ACTOR_ALIVE, Some(node)) => Phase::Alive(node),
                (_, Some(node)) => Phase::Placing(node),
                (_, None) => Phase::Waiting,
            };
            let wish = Wish::of(&creation).map_err(|problem| bad(Table::ActorCreations, problem))?;
            let row = ActorRow {
                id,
                creation: Arc::new(creation),
                wish: Arc::new(wish),
                phase,
                incarnation: state.incarnation,
                restarts: state.restarts,
                worker: state.worker,
                pid: state.pid,
                death: state.death,
                pending_reason: state.pending_reason,
                infeasible: false,
                was_alive: record.was_alive,
                out_of_scope: record.out_of_scope,
                order: record.order,
                not_before_ms: 0,
                rejections: 0,
                start_time_ms: record.start_time_ms,
                end_time_ms: record.end_time_ms,
            };
            self.actors.next_order = self.actors.next_order.max(record.order + 1);
            self.actors.rows.insert(id, row);
            self.actors.index(id);
        }
        let dead = self.actors.rows.values().filter(|row| row.is_dead());
        let mut dead: Vec<(u64, ActorId)> = dead.map(|row| (row.end_time_ms, row.id)).collect();
        dead.sort_unstable();
        self.actors.dead = dead.into_iter().map(|(_, id)| id).collect();
        Ok(())
    }
}
