//! Key-value: owns values by namespace and key, who waits for one, and which keys go with a job.
//!
//! It refuses values beyond its limit.
//!
//! Invariants:
//! 1. A key bound to a job is in that job's list as long as it exists.
//! 2. Every waiter has a deadline and a node to answer to.

use std::collections::{BTreeMap, BTreeSet};

use bytes::Bytes;
use ray_ids::{JobId, NodeId};
use ray_wire::{GcsReply, KvKey, KvPut};

use crate::records::{KeyValueRecord, Table};
use crate::state::{done, invalid, Gcs, Timer};

type FullKey = (Bytes, Bytes);

#[derive(Debug)]
pub(crate) struct KvWaiter {
    node: NodeId,
    correlation: u64,
    key: FullKey,
    deadline_ms: u64,
}

#[derive(Debug, Default)]
pub(crate) struct KeyValues {
    pub(crate) values: BTreeMap<FullKey, KeyValueRecord>,
    pub(crate) of_job: BTreeMap<JobId, BTreeSet<FullKey>>,
    waiters: BTreeMap<u64, KvWaiter>,
    next_waiter: u64,
}

impl KeyValues {
    pub(crate) fn insert(&mut self, key: FullKey, record: KeyValueRecord) {
        self.remove(&key);
        if let Ok(job) = JobId::from_binary(&record.job_id) {
            self.of_job.entry(job).or_default().insert(key.clone());
        }
        self.values.insert(key, record);
    }

    fn remove(&mut self, key: &FullKey) -> bool {
        let Some(record) = self.values.remove(key) else {
            return false;
        };
        if let Ok(job) = JobId::from_binary(&record.job_id) {
            if let Some(keys) = self.of_job.get_mut(&job) {
                keys.remove(key);
                if keys.is_empty() {
                    self.of_job.remove(&job);
                }
            }
        }
        true
    }

    fn with_prefix<'a>(&'a self, namespace: &'a Bytes, prefix: &'a Bytes) -> impl Iterator<Item = &'a FullKey> + 'a {
        let start = (namespace.clone(), prefix.clone());
        let inside = move |key: &&FullKey| key.0 == *namespace && key.1.starts_with(prefix);
        self.values.range(start..).map(|(key, _)| key).take_while(inside)
    }

    pub(crate) fn waiting(&self) -> usize {
        self.waiters.len()
    }

    pub(crate) fn check(&self) -> Result<(), String> {
        for (job, keys) in &self.of_job {
            for key in keys {
                let bound = self
                    .values
                    .get(key)
                    .is_some_and(|record| record.job_id == job.as_bytes());
                if !bound {
                    return Err(format!("key {key:?} is listed for job {job} and not bound to it"));
                }
            }
        }
        let listed: usize = self.of_job.values().map(BTreeSet::len).sum();
        let bound = self
            .values
            .values()
            .filter(|record| JobId::from_binary(&record.job_id).is_ok())
            .count();
        if listed != bound {
            return Err(format!("{bound} keys are bound to jobs and {listed} are listed"));
        }
        Ok(())
    }
}

/// The stored form of a namespace and key.
pub(crate) fn row_key(namespace: &[u8], key: &[u8]) -> Vec<u8> {
    let mut row = Vec::with_capacity(4 + namespace.len() + key.len());
    row.extend_from_slice(&(namespace.len() as u32).to_be_bytes());
    row.extend_from_slice(namespace);
    row.extend_from_slice(key);
    row
}

/// Reads what `row_key` wrote.
pub(crate) fn split_row_key(row: &Bytes) -> Option<FullKey> {
    let length: [u8; 4] = row.get(..4)?.try_into().ok()?;
    let end = 4_usize.checked_add(u32::from_be_bytes(length) as usize)?;
    (end <= row.len()).then(|| (row.slice(4..end), row.slice(end..)))
}

impl Gcs {
    pub(crate) fn kv_put(&mut self, put: KvPut) -> GcsReply {
        let limit = self.settings.kv_value_limit_bytes;
        if put.value.len() as u64 > limit {
            let size = put.value.len();
            return invalid(format!(
                "the value has {size} bytes and kv_value_limit_bytes is {limit}"
            ));
        }
        if let Ok(job) = JobId::from_binary(&put.job_id) {
            if self.jobs.is_over(job) {
                return invalid(format!("job {job}, to which the key would be bound, is over"));
            }
        }
        let key = (put.namespace, put.key);
        let is_new = !self.kv.values.contains_key(&key);
        if is_new || put.overwrite {
            let record = KeyValueRecord {
                value: put.value,
                job_id: put.job_id,
            };
            self.put_row(Table::KeyValue, &row_key(&key.0, &key.1), &record);
            let value = record.value.clone();
            self.kv.insert(key.clone(), record);
            self.answer_kv_waiters(&key, &value);
        }
        GcsReply {
            found: is_new,
            ..GcsReply::default()
        }
    }

    fn answer_kv_waiters(&mut self, key: &FullKey, value: &Bytes) {
        let ready: Vec<u64> = self
            .kv
            .waiters
            .iter()
            .filter(|(_, waiter)| waiter.key == *key)
            .map(|(id, _)| *id)
            .collect();
        for id in ready {
            if let Some(waiter) = self.kv.waiters.remove(&id) {
                let reply = GcsReply {
                    value: value.clone(),
                    ..done()
                };
                self.reply(waiter.node, waiter.correlation, reply);
            }
        }
    }

    pub(crate) fn kv_get(&mut self, node: NodeId, correlation: u64, get: KvKey) -> Option<GcsReply> {
        let key = (get.namespace, get.key);
        if let Some(record) = self.kv.values.get(&key) {
            return Some(GcsReply {
                value: record.value.clone(),
                ..done()
            });
        }
        let wait = u64::from(get.wait_ms).min(self.settings.kv_wait_limit_ms);
        if wait == 0 {
            return Some(GcsReply::default());
        }
        if self.kv.waiters.len() as u64 >= self.settings.maximum_waiting_questions {
            return Some(invalid("too many questions wait for keys (maximum_waiting_questions)"));
        }
        let id = self.kv.next_waiter;
        self.kv.next_waiter += 1;
        let deadline_ms = self.now_ms + wait;
        self.kv.waiters.insert(
            id,
            KvWaiter {
                node,
                correlation,
                key,
                deadline_ms,
            },
        );
        self.set_timer(deadline_ms, Timer::KvWait(id));
        None
    }

    pub(crate) fn on_kv_wait_over(&mut self, id: u64) {
        if let Some(waiter) = self.kv.waiters.remove(&id) {
            debug_assert!(waiter.deadline_ms <= self.now_ms);
            self.reply(waiter.node, waiter.correlation, GcsReply::default());
        }
    }

    pub(crate) fn kv_forget_node(&mut self, node: NodeId) {
        self.kv.waiters.retain(|_, waiter| waiter.node != node);
    }

    fn kv_remove(&mut self, key: &FullKey) -> bool {
        let removed = self.kv.remove(key);
        if removed {
            self.delete_row(Table::KeyValue, &row_key(&key.0, &key.1));
        }
        removed
    }

    pub(crate) fn kv_delete(&mut self, delete: KvKey) -> GcsReply {
        let keys: Vec<FullKey> = if delete.prefix {
            self.kv.with_prefix(&delete.namespace, &delete.key).cloned().collect()
        } else {
            vec![(delete.namespace, delete.key)]
        };
        let count = keys.iter().filter(|key| self.kv_remove(key)).count();
        GcsReply {
            found: count > 0,
            number: count as u64,
            ..GcsReply::default()
        }
    }

    pub(crate) fn kv_keys(&self, list: &KvKey) -> GcsReply {
        let keys = self
            .kv
            .with_prefix(&list.namespace, &list.key)
            .map(|(_, key)| key.clone())
            .collect();
        GcsReply { keys, ..done() }
    }

    pub(crate) fn kv_exists(&self, exists: &KvKey) -> GcsReply {
        let found = if exists.prefix {
            self.kv.with_prefix(&exists.namespace, &exists.key).next().is_some()
        } else {
            self.kv
                .values
                .contains_key(&(exists.namespace.clone(), exists.key.clone()))
        };
        GcsReply {
            found,
            ..GcsReply::default()
        }
    }

    pub(crate) fn kv_drop_job(&mut self, job: JobId) {
        let keys: Vec<FullKey> = self.kv.of_job.get(&job).into_iter().flatten().cloned().collect();
        for key in keys {
            self.kv_remove(&key);
        }
    }
}
