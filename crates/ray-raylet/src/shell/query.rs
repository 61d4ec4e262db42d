//! Answers what processes and tools ask of this node, in JSON.
//!
//! It refuses methods it does not know, by name, and log files outside the log directory.
//!
//! Invariant: 1. Answering changes nothing.

use super::node::Node;
use ray_rpc::Link;
use ray_wire::{kinds, NodeAnswer};
use serde_json::{json, Value};
use std::sync::Arc;

impl Node {
    pub(super) fn answer_query(&mut self, link: &Arc<Link>, correlation: u64, query_json: &str) {
        let answer = match self.query(query_json) {
            Ok(answer) => NodeAnswer {
                answer_json: answer.to_string(),
                error: String::new(),
            },
            Err(error) => NodeAnswer {
                answer_json: String::new(),
                error,
            },
        };
        let _ = link.send(kinds::NODE_ANSWER, correlation, ray_wire::encode(&answer), &[]);
    }

    fn query(&mut self, query_json: &str) -> Result<Value, String> {
        let query: Value =
            serde_json::from_str(query_json).map_err(|error| format!("the query is not JSON: {error}"))?;
        let method = query
            .get("method")
            .and_then(Value::as_str)
            .ok_or("the query has no method")?;
        match method {
            "leases" => Ok(self.scheduler.describe_leases(self.now())),
            "workers" => Ok(self.describe_workers()),
            "objects" => Ok(self.describe_objects()),
            "memory" => Ok(self.describe_memory()),
            "why" => Ok(json!({
                "node_id": self.node_id.hex(),
                "waiting": self.scheduler.describe_waiting(self.now()),
                "objects": self.describe_object_waits(),
                "gcs": if self.gcs.is_registered() { "connected" } else { "away: requests to it wait" },
            })),
            "logs" => self.list_logs(),
            "log_tail" => self.log_tail(&query),
            "stats" => Ok(self.describe_stats()),
            other => Err(format!(
                "a raylet knows no method {other:?}; it knows leases, workers, objects, memory, why, logs, log_tail, stats"
            )),
        }
    }

    fn describe_workers(&self) -> Value {
        let mut workers = self.scheduler.describe_workers();
        for worker in &mut workers {
            let id = worker
                .get("worker_id")
                .and_then(Value::as_str)
                .and_then(|hex| ray_ids::WorkerId::from_hex(hex).ok());
            if let (Some(process), Some(fields)) = (id.and_then(|id| self.processes.get(&id)), worker.as_object_mut()) {
                fields.insert("pid".into(), json!(process.pid));
                fields.insert("node_id".into(), json!(self.node_id.hex()));
            }
        }
        let drivers: Vec<Value> = self
            .jobs()
            .drivers
            .iter()
            .map(|(job, worker)| {
                let pid = self.processes.get(worker).map_or(0, |process| process.pid);
                json!({ "worker_id": worker.hex(), "job_id": job.hex(), "pid": pid, "state": "driver" })
            })
            .collect();
        json!({ "workers": workers, "drivers": drivers })
    }

    fn list_logs(&self) -> Result<Value, String> {
        let entries = std::fs::read_dir(&self.log_directory).map_err(|error| error.to_string())?;
        let mut logs: Vec<Value> = entries
            .flatten()
            .filter_map(|entry| {
                let metadata = entry.metadata().ok()?;
                metadata
                    .is_file()
                    .then(|| json!({ "name": entry.file_name().to_string_lossy(), "bytes": metadata.len() }))
            })
            .collect();
        logs.sort_by_key(|log| log["name"].to_string());
        Ok(json!({ "directory": self.log_directory, "logs": logs }))
    }

    fn log_tail(&self, query: &Value) -> Result<Value, String> {
        let name = query
            .get("name")
            .and_then(Value::as_str)
            .ok_or("log_tail needs the name of a log")?;
        if name.contains('/') || name == ".." || name == "." {
            return Err(format!("{name:?} is not the name of a file in the log directory"));
        }
        let lines = query.get("lines").and_then(Value::as_u64).unwrap_or(100).min(100_000) as usize;
        let path = self.log_directory.join(name);
        if !path.is_file() {
            return Err(format!("there is no log {name:?}"));
        }
        Ok(json!({ "name": name, "text": self.logs.tail_of(&path, lines) }))
    }

    fn describe_stats(&self) -> Value {
        let rpc = self.reactor.stats();
        json!({
            "node_id": self.node_id.hex(),
            "pid": std::process::id(),
            "uptime_ms": self.now(),
            "links": self.reactor.link_count(),
            "processes": self.processes.len(),
            "waiting": self.scheduler.waiting(),
            "zygote_pid": self.zygote.as_ref().map(|zygote| zygote.pid),
            "zygote_starts": self.zygote_starts,
            "rpc": format!("{rpc:?}"),
        })
    }
}
