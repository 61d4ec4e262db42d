//! `CoreWorker`: the control plane's key-value store, queries, placement groups.

use std::collections::BTreeMap;
use std::time::Duration;

use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;
use pyo3::types::{PyBytes, PyDict};
use ray_ids::PlacementGroupId;
use ray_wire::{
    id_bytes, BundleSpecification, DrainNode, GcsCall, GcsReply, JsonQuery, KvKey, KvPut, PlacementGroupKey,
    PlacementGroupSpecification, ResourceAmount,
};

use crate::conversion::{bytes_field, field, optional};
use crate::core::{message_bytes, CoreWorker};
use crate::error::worker_error;

/// What a group's wait may take where no limit was given, a slice at a time.
const WAIT_SLICE_S: f64 = 10.0;

impl CoreWorker {
    fn gcs(&self, py: Python<'_>, call: GcsCall, extra: Duration) -> PyResult<GcsReply> {
        let worker = &self.runtime.worker;
        py.detach(|| worker.gcs_call(call, extra))
            .map_err(|error| worker_error(py, error))
    }

    fn key(namespace: &[u8], key: &[u8]) -> KvKey {
        KvKey {
            namespace: message_bytes(namespace),
            key: message_bytes(key),
            ..KvKey::default()
        }
    }
}

#[pymethods]
impl CoreWorker {
    #[pyo3(signature = (namespace, key, value, overwrite, job_scoped = false))]
    fn kv_put(
        &self,
        py: Python<'_>,
        namespace: &[u8],
        key: &[u8],
        value: &[u8],
        overwrite: bool,
        job_scoped: bool,
    ) -> PyResult<bool> {
        let job_id = if job_scoped {
            id_bytes(self.runtime.worker.job_id().as_bytes())
        } else {
            Default::default()
        };
        let put = KvPut {
            namespace: message_bytes(namespace),
            key: message_bytes(key),
            value: message_bytes(value),
            overwrite,
            job_id,
        };
        Ok(self.gcs(py, GcsCall::KvPut(put), Duration::ZERO)?.found)
    }

    #[pyo3(signature = (namespace, key, wait_s = 0.0))]
    fn kv_get<'py>(
        &self,
        py: Python<'py>,
        namespace: &[u8],
        key: &[u8],
        wait_s: f64,
    ) -> PyResult<Option<Bound<'py, PyBytes>>> {
        let wait =
            Duration::try_from_secs_f64(wait_s.max(0.0)).map_err(|error| PyValueError::new_err(error.to_string()))?;
        let key = KvKey {
            wait_ms: u32::try_from(wait.as_millis()).unwrap_or(u32::MAX),
            ..Self::key(namespace, key)
        };
        let reply = self.gcs(py, GcsCall::KvGet(key), wait)?;
        Ok(reply.found.then(|| PyBytes::new(py, &reply.value)))
    }

    #[pyo3(signature = (namespace, key, prefix = false))]
    fn kv_delete(&self, py: Python<'_>, namespace: &[u8], key: &[u8], prefix: bool) -> PyResult<u64> {
        let key = KvKey {
            prefix,
            ..Self::key(namespace, key)
        };
        Ok(self.gcs(py, GcsCall::KvDelete(key), Duration::ZERO)?.number)
    }

    fn kv_keys<'py>(&self, py: Python<'py>, namespace: &[u8], prefix: &[u8]) -> PyResult<Vec<Bound<'py, PyBytes>>> {
        let key = KvKey {
            prefix: true,
            ..Self::key(namespace, prefix)
        };
        let reply = self.gcs(py, GcsCall::KvKeys(key), Duration::ZERO)?;
        Ok(reply.keys.iter().map(|key| PyBytes::new(py, key)).collect())
    }

    fn kv_exists(&self, py: Python<'_>, namespace: &[u8], key: &[u8]) -> PyResult<bool> {
        Ok(self
            .gcs(py, GcsCall::KvExists(Self::key(namespace, key)), Duration::ZERO)?
            .found)
    }

    fn gcs_query(&self, py: Python<'_>, query_json: String) -> PyResult<String> {
        Ok(self
            .gcs(py, GcsCall::Query(JsonQuery { query_json }), Duration::ZERO)?
            .json)
    }

    fn node_query(&self, py: Python<'_>, query_json: String) -> PyResult<String> {
        let worker = &self.runtime.worker;
        py.detach(|| worker.node_query(&query_json))
            .map_err(|error| worker_error(py, error))
    }

    fn new_placement_group_id<'py>(&self, py: Python<'py>) -> Bound<'py, PyBytes> {
        PyBytes::new(py, PlacementGroupId::random_in(self.runtime.worker.job_id()).as_bytes())
    }

    fn create_placement_group(&self, py: Python<'_>, specification: &Bound<'_, PyDict>) -> PyResult<()> {
        let strategy = match field::<String>(specification, "strategy")?.as_str() {
            "" | "PACK" => 0,
            "SPREAD" => 1,
            "STRICT_PACK" => 2,
            "STRICT_SPREAD" => 3,
            other => {
                return Err(PyValueError::new_err(format!(
                    "{other:?} is no strategy of placement groups"
                )))
            }
        };
        if specification.contains("bundle_label_selector")?
            && specification
                .get_item("bundle_label_selector")?
                .is_some_and(|value| value.is_truthy().unwrap_or(true))
        {
            return Err(pyo3::exceptions::PyNotImplementedError::new_err(
                "bundle_label_selector of placement groups is not built yet",
            ));
        }
        let bundles = optional::<Vec<BTreeMap<String, f64>>>(specification, "bundles")?.unwrap_or_default();
        let creator = self
            .runtime
            .worker
            .actor()
            .map(|(actor, _)| id_bytes(actor.as_bytes()))
            .unwrap_or_default();
        let message = PlacementGroupSpecification {
            placement_group_id: bytes_field(specification, "placement_group_id")?,
            bundles: bundles
                .into_iter()
                .map(|bundle| BundleSpecification {
                    resources: bundle
                        .into_iter()
                        .map(|(name, amount)| ResourceAmount {
                            name,
                            amount_e4: (amount * 1e4).round() as i64,
                        })
                        .collect(),
                    labels: Vec::new(),
                })
                .collect(),
            strategy,
            name: field(specification, "name")?,
            detached: field(specification, "detached")?,
            job_id: id_bytes(self.runtime.worker.job_id().as_bytes()),
            creator_actor_id: creator,
            soft_target_node_id: bytes_field(specification, "soft_target_node_id")?,
            namespace: field(specification, "namespace")?,
        };
        if message.name.is_empty() {
            // Only a name can be refused, so that nobody waits for groups without one.
            return self
                .runtime
                .worker
                .gcs_send(GcsCall::CreatePlacementGroup(message))
                .map_err(|error| worker_error(py, error));
        }
        self.gcs(py, GcsCall::CreatePlacementGroup(message), Duration::ZERO)
            .map(|_| ())
    }

    fn remove_placement_group(&self, py: Python<'_>, placement_group_id: &[u8]) -> PyResult<()> {
        let key = PlacementGroupKey {
            placement_group_id: message_bytes(placement_group_id),
            ..PlacementGroupKey::default()
        };
        self.gcs(py, GcsCall::RemovePlacementGroup(key), Duration::ZERO)
            .map(|_| ())
    }

    #[pyo3(signature = (placement_group_id, timeout_s = None))]
    fn wait_placement_group(
        &self,
        py: Python<'_>,
        placement_group_id: &[u8],
        timeout_s: Option<f64>,
    ) -> PyResult<bool> {
        let started = std::time::Instant::now();
        loop {
            let left = timeout_s.map_or(WAIT_SLICE_S, |limit| {
                (limit - started.elapsed().as_secs_f64()).clamp(0.0, WAIT_SLICE_S)
            });
            let key = PlacementGroupKey {
                placement_group_id: message_bytes(placement_group_id),
                wait_ms: (left * 1e3) as u64,
                ..PlacementGroupKey::default()
            };
            let reply = self.gcs(py, GcsCall::WaitPlacementGroup(key), Duration::from_secs_f64(left))?;
            if reply.found || timeout_s.is_some_and(|limit| started.elapsed().as_secs_f64() >= limit) {
                return Ok(reply.found);
            }
            py.check_signals()?;
        }
    }

    fn drain_node(&self, py: Python<'_>, node_id: &[u8], reason: String, deadline_s: f64) -> PyResult<()> {
        let drain = DrainNode {
            node_id: message_bytes(node_id),
            reason,
            deadline_ms: (deadline_s.max(0.0) * 1e3) as u64,
        };
        self.gcs(py, GcsCall::Drain(drain), Duration::ZERO).map(|_| ())
    }
}
