//! Queries: owns the JSON in which the control plane's tables are shown, under the names that programs know.
//!
//! It refuses methods and arguments that it does not know, by name.
//!
//! Invariant: 1. A query changes nothing.

use ray_ids::{to_hex, ActorId, JobId, NodeId, PlacementGroupId, WorkerId};
use ray_sched::resource_set::BUNDLE_MARKER;
use ray_sched::ResourceSet;
use ray_wire::{Address, DeathCause, GcsReply, ResourceAmount};
use serde_json::{json, Map, Value};

use crate::actors::{ActorRow, Phase};
use crate::placement_groups::{GroupPhase, GroupRow};
use crate::state::{done, invalid, Gcs, Refusal};

const ACTOR_STATES: [&str; 5] = [
    "DEPENDENCIES_UNREADY",
    "PENDING_CREATION",
    "ALIVE",
    "RESTARTING",
    "DEAD",
];
const DEATH_KINDS: [&str; 13] = [
    "UNKNOWN",
    "INTENDED",
    "CRASHED",
    "NODE_DIED",
    "RAY_KILL",
    "OUT_OF_SCOPE",
    "OWNER_DIED",
    "CREATION_FAILED",
    "JOB_FINISHED",
    "UNSCHEDULABLE",
    "OUT_OF_MEMORY",
    "RUNTIME_ENV_FAILED",
    "PLACEMENT_GROUP_REMOVED",
];

fn add(set: &mut Map<String, Value>, name: &str, amount: f64) {
    let sum = set.get(name).and_then(Value::as_f64).unwrap_or_default() + amount;
    set.insert(name.to_string(), json!(sum));
}

/// Amounts as floats, without the names that placement groups make.
fn shown(resources: &ResourceSet) -> Map<String, Value> {
    let mut set = Map::new();
    for (name, amount) in resources.iter() {
        if name.group().is_none() && name.as_str() != BUNDLE_MARKER {
            add(&mut set, name.as_str(), amount.to_f64());
        }
    }
    set
}

fn amounts(resources: &[ResourceAmount]) -> Map<String, Value> {
    shown(&crate::nodes::resource_set(resources))
}

fn address(address: Option<&Address>) -> Value {
    match address {
        Some(address) => json!({
            "IPAddress": address.host,
            "Port": address.port,
            "NodeID": to_hex(&address.node_id),
            "WorkerID": to_hex(&address.worker_id),
        }),
        None => json!({
            "IPAddress": "",
            "Port": 0,
            "NodeID": NodeId::NIL.hex(),
            "WorkerID": WorkerId::NIL.hex(),
        }),
    }
}

fn death(cause: Option<&DeathCause>) -> Value {
    let Some(cause) = cause else { return Value::Null };
    json!({
        "kind": DEATH_KINDS.get(cause.kind as usize).copied().unwrap_or("UNKNOWN"),
        "message": cause.message,
        "exit_code": cause.exit_code,
        "signal": cause.signal,
        "pid": cause.pid,
        "log_tail": cause.log_tail,
    })
}

/// A node as `ray.nodes()` shows it.
pub(crate) fn node_json(gcs: &Gcs, id: NodeId) -> Value {
    let Some(row) = gcs.nodes.get(&id) else {
        return Value::Null;
    };
    let info = &row.info;
    let (host, port) = info
        .address
        .as_ref()
        .map(|at| (at.host.clone(), at.port))
        .unwrap_or_default();
    let labels: Map<String, Value> = info
        .labels
        .iter()
        .map(|label| (label.key.clone(), Value::from(label.value.clone())))
        .collect();
    let view = gcs.view.nodes.get(&id);
    let resources = if row.alive { shown(&row.total) } else { Map::new() };
    json!({
        "NodeID": id.hex(),
        "Alive": row.alive,
        "NodeManagerAddress": host,
        "NodeManagerHostname": info.hostname,
        "NodeManagerPort": port,
        // One port serves everything of a node, the transfer of objects too.
        "ObjectManagerPort": port,
        "ObjectStoreSocketName": info.store_path,
        "RayletSocketName": info.raylet_socket,
        // No such port is open on a node.
        "MetricsExportPort": -1,
        "MetricsAgentPort": -1,
        "DashboardAgentListenPort": -1,
        "RuntimeEnvAgentPort": -1,
        "NodeName": if info.node_name.is_empty() { host.clone() } else { info.node_name.clone() },
        "DeathReason": row.death_reason,
        "DeathReasonMessage": if row.alive { "" } else { info.death_reason.as_str() },
        "alive": row.alive,
        "Resources": resources,
        "Labels": labels,
        "Available": view.map(|view| shown(&view.available)).unwrap_or_default(),
        "IsHead": info.is_head,
        "Draining": !row.drain_reason.is_empty(),
        "DrainReason": row.drain_reason,
        "Connected": row.link_up,
        "Pid": info.pid,
        "StartTime": info.start_time_ms,
        "EndTime": info.end_time_ms,
        "IdleMs": row.idle_ms,
        "SessionDirectory": info.session_directory,
    })
}

/// A job.
pub(crate) fn job_json(gcs: &Gcs, id: JobId) -> Value {
    let Some(row) = gcs.jobs.rows.get(&id) else {
        return Value::Null;
    };
    let config: Value = serde_json::from_str(&row.config_json).unwrap_or(Value::Null);
    let driver = row.driver.as_ref();
    json!({
        "JobID": id.hex(),
        "DriverIPAddress": driver.map(|at| at.host.clone()).unwrap_or_default(),
        "DriverNodeID": driver.map(|at| to_hex(&at.node_id)).unwrap_or_default(),
        "DriverPid": row.pid,
        "Timestamp": if row.finished { row.end_time_ms } else { row.start_time_ms },
        "StartTime": row.start_time_ms,
        "EndTime": row.end_time_ms,
        "IsDead": row.finished,
        "Entrypoint": config.get("entrypoint").cloned().unwrap_or_else(|| json!("")),
        "Config": config,
    })
}

fn actor_json(row: &ActorRow) -> Value {
    let held = amounts(&row.creation.resources);
    let group = row.wish.group.map(|(id, _)| id.hex());
    json!({
        "ActorID": row.id.hex(),
        "ActorClassName": row.creation.class_name,
        "IsDetached": row.creation.detached,
        "Name": row.creation.name,
        "RayNamespace": row.creation.namespace,
        "JobID": row.id.job_id().hex(),
        "Address": address(row.worker.as_ref()),
        "OwnerAddress": address(row.creation.owner.as_ref()),
        "State": ACTOR_STATES[row.state_number() as usize],
        "NumRestarts": row.restarts,
        "MaxRestarts": row.creation.max_restarts,
        "Incarnation": row.incarnation,
        "Timestamp": row.start_time_ms.max(row.end_time_ms) as f64,
        "StartTime": row.start_time_ms,
        "EndTime": row.end_time_ms,
        "DeathCause": death(row.death.as_ref()),
        "Pid": row.pid,
        "NodeID": row.node().map(|node| node.hex()).unwrap_or_default(),
        "PendingReason": row.pending_reason,
        "Infeasible": row.infeasible,
        "OutOfScope": row.out_of_scope,
        "RequiredResources": held,
        "PlacementGroupID": group,
    })
}

fn group_json(row: &GroupRow) -> Value {
    let mut bundles = Map::new();
    let mut nodes = Map::new();
    for (index, bundle) in row.bundles.iter().enumerate() {
        bundles.insert(index.to_string(), Value::Object(shown(&bundle.request.resources)));
        let node = bundle.node.map(|node| node.hex()).unwrap_or_default();
        nodes.insert(index.to_string(), json!(node));
    }
    let scheduling_state = match &row.phase {
        GroupPhase::Created => "FINISHED",
        GroupPhase::Removed => "REMOVED",
        GroupPhase::Preparing(_) | GroupPhase::Committing(_) => "SCHEDULING_STARTED",
        GroupPhase::Waiting if row.infeasible => "INFEASIBLE",
        GroupPhase::Waiting if row.rejections > 0 => "FAILED_TO_COMMIT_RESOURCES",
        GroupPhase::Waiting => "NO_RESOURCES",
    };
    let latency = row.created_ms.saturating_sub(row.registered_ms) as f64;
    json!({
        "placement_group_id": row.id.hex(),
        "name": row.specification.name,
        "ray_namespace": row.specification.namespace,
        "bundles": bundles,
        "bundles_to_node_id": nodes,
        "strategy": row.strategy.name(),
        "state": row.state_name(),
        "is_detached": row.specification.detached,
        "creator_job_id": to_hex(&row.specification.job_id),
        "pending_reason": row.pending_reason,
        "infeasible": row.infeasible,
        "stats": {
            "end_to_end_creation_latency_ms": latency,
            "scheduling_latency_ms": latency,
            "scheduling_attempt": row.attempt,
            "highest_retry_delay_ms": row.highest_delay_ms as f64,
            "scheduling_state": scheduling_state,
        },
    })
}

fn text<'a>(query: &'a Value, field: &str) -> Option<&'a str> {
    query.get(field).and_then(Value::as_str).filter(|text| !text.is_empty())
}

impl Gcs {
    /// Answers a question in JSON.
    pub fn query(&self, query_json: &str) -> GcsReply {
        let query: Value = match serde_json::from_str(query_json) {
            Ok(query) => query,
            Err(error) => return invalid(format!("the query is not JSON: {error}")),
        };
        match self.answer(&query) {
            Ok(answer) => GcsReply {
                json: answer.to_string(),
                ..done()
            },
            Err(refusal) => refusal.into(),
        }
    }

    fn answer(&self, query: &Value) -> Result<Value, Refusal> {
        let method = text(query, "method").ok_or_else(|| Refusal::invalid("the query names no method"))?;
        Ok(match method {
            "nodes" => self.nodes.keys().map(|id| node_json(self, *id)).collect(),
            "jobs" => self.jobs.rows.keys().map(|id| job_json(self, *id)).collect(),
            "actors" => self.query_actors(query)?,
            "actor" => self.query_actor(query)?,
            "named_actors" => self.query_named_actors(query),
            "placement_groups" => self
                .groups
                .rows
                .values()
                .map(|row| (row.id.hex(), group_json(row)))
                .collect::<Map<_, _>>()
                .into(),
            "placement_group" => self.query_group(query)?,
            "cluster_resources" => self.sum_of_nodes(|view| &view.total),
            "available_resources" => self.sum_of_nodes(|view| &view.available),
            "available_resources_per_node" => self
                .view
                .nodes
                .iter()
                .map(|(id, view)| (id.hex(), Value::Object(shown(&view.available))))
                .collect::<Map<_, _>>()
                .into(),
            "total_resources_per_node" => self
                .view
                .nodes
                .iter()
                .map(|(id, view)| (id.hex(), Value::Object(shown(&view.total))))
                .collect::<Map<_, _>>()
                .into(),
            "internal_config" => json!({
                "session_name": self.settings.session_name,
                "cluster_id": self.cluster_id.hex(),
                "system_config": self.settings.system_config,
                "limits": self.settings.numbers(),
            }),
            "pending" => self.query_pending(),
            "health" => self.query_health(),
            other => return Err(Refusal::invalid(format!("the control plane knows no query {other:?}"))),
        })
    }

    fn sum_of_nodes(&self, of: impl Fn(&ray_sched::NodeView) -> &ResourceSet) -> Value {
        let mut sum = ResourceSet::new();
        for view in self.view.nodes.values() {
            for (name, amount) in of(view).iter() {
                if name.group().is_none() && name.as_str() != BUNDLE_MARKER {
                    sum.add(name, amount);
                }
            }
        }
        Value::Object(shown(&sum))
    }

    fn query_actors(&self, query: &Value) -> Result<Value, Refusal> {
        let job = match text(query, "job_id") {
            Some(job) => Some(JobId::from_hex(job).map_err(|error| Refusal::invalid(error.to_string()))?),
            None => None,
        };
        let state = text(query, "state");
        let wanted = |row: &&ActorRow| {
            job.is_none_or(|job| row.id.job_id() == job)
                && state.is_none_or(|state| ACTOR_STATES[row.state_number() as usize] == state)
        };
        let rows = self.actors.rows.values().filter(wanted);
        Ok(rows
            .map(|row| (row.id.hex(), actor_json(row)))
            .collect::<Map<_, _>>()
            .into())
    }

    fn query_actor(&self, query: &Value) -> Result<Value, Refusal> {
        let id = match (text(query, "actor_id"), text(query, "name")) {
            (Some(id), _) => ActorId::from_hex(id).map_err(|error| Refusal::invalid(error.to_string()))?,
            (None, Some(name)) => {
                let key = (
                    text(query, "namespace").unwrap_or_default().to_string(),
                    name.to_string(),
                );
                let id = self.actors.names.get(&key).copied();
                id.ok_or_else(|| Refusal::not_found(format!("no actor has the name {name:?}")))?
            }
            (None, None) => {
                return Err(Refusal::invalid(
                    "the query names no actor: give actor_id, or name and namespace",
                ))
            }
        };
        let row = self.actors.rows.get(&id);
        row.map(actor_json)
            .ok_or_else(|| Refusal::not_found(format!("actor {id} is not known")))
    }

    fn query_named_actors(&self, query: &Value) -> Value {
        let all = query.get("all_namespaces").and_then(Value::as_bool).unwrap_or(false);
        let namespace = text(query, "namespace").unwrap_or_default();
        let names = self.actors.names.iter().filter(|((of, _), _)| all || of == namespace);
        names
            .map(|((of, name), id)| json!({"name": name, "namespace": of, "actor_id": id.hex()}))
            .collect()
    }

    fn query_group(&self, query: &Value) -> Result<Value, Refusal> {
        let id = match (text(query, "placement_group_id"), text(query, "name")) {
            (Some(id), _) => PlacementGroupId::from_hex(id).map_err(|error| Refusal::invalid(error.to_string()))?,
            (None, Some(name)) => {
                let key = (
                    text(query, "namespace").unwrap_or_default().to_string(),
                    name.to_string(),
                );
                let id = self.groups.names.get(&key).copied();
                id.ok_or_else(|| Refusal::not_found(format!("no placement group has the name {name:?}")))?
            }
            (None, None) => {
                return Err(Refusal::invalid(
                    "the query names no group: give placement_group_id, or name and namespace",
                ))
            }
        };
        let row = self.groups.rows.get(&id);
        row.map(group_json)
            .ok_or_else(|| Refusal::not_found(format!("placement group {id} is not known")))
    }

    fn query_pending(&self) -> Value {
        let waits = |row: &&ActorRow| matches!(row.phase, Phase::Waiting | Phase::Placing(_));
        let actors = self.actors.rows.values().filter(waits).map(|row| {
            json!({
                "actor_id": row.id.hex(),
                "class_name": row.creation.class_name,
                "name": row.creation.name,
                "demand": shown(&crate::nodes::resource_set(&row.creation.placement_resources)),
                "reason": row.pending_reason,
                "infeasible": row.infeasible,
                "state": ACTOR_STATES[row.state_number() as usize],
            })
        });
        let open = |row: &&GroupRow| !matches!(row.phase, GroupPhase::Created | GroupPhase::Removed);
        let groups = self.groups.rows.values().filter(open).map(group_json);
        let demands = self
            .nodes
            .values()
            .flat_map(|row| row.demands.iter().map(move |demand| (row.id, demand)));
        let demands = demands.map(|(node, demand)| {
            json!({
                "node_id": node.hex(),
                "resources": amounts(&demand.resources),
                "count": demand.count,
                "infeasible": demand.infeasible,
            })
        });
        json!({
            "actors": actors.collect::<Vec<_>>(),
            "placement_groups": groups.collect::<Vec<_>>(),
            "demands": demands.collect::<Vec<_>>(),
            "blocked": self.placing_blocked(),
        })
    }

    fn query_health(&self) -> Value {
        let alive = self.nodes.values().filter(|row| row.alive).count();
        json!({
            "cluster_id": self.cluster_id.hex(),
            "epoch": self.epoch,
            "nodes_alive": alive,
            "nodes_dead": self.nodes.len() - alive,
            "nodes_expected": self.expected_nodes.len(),
            "actors": self.actors.rows.len(),
            "actors_waiting": self.actors.waiting.len(),
            "placement_groups": self.groups.rows.len(),
            "jobs_running": self.jobs.rows.values().filter(|row| !row.finished).count(),
            "keys": self.kv.values.len(),
            "questions_waiting": self.kv.waiting() + self.groups.waiting(),
            "requests_remembered": self.requests.len(),
            "dead_processes_remembered": self.dead_processes.len(),
            "timers": self.timer_count(),
        })
    }
}
