//! Registration: owns what a process must show before it is of this node, and what it is told then.
//!
//! It refuses a worker that nobody started, or a second one under the same token, and roles it does not know.
//!
//! Invariants: those of `processes`.

use super::node::{LinkRole, Node};
use super::processes::Process;
use ray_ids::{JobId, WorkerId};
use ray_rpc::{CloseReason, Link};
use ray_store::ClientSlot;
use ray_wire::{kinds, RegisterProcess, Welcome, ROLE_DRIVER, ROLE_TOOL, ROLE_WORKER};
use serde_json::json;
use std::path::PathBuf;
use std::sync::Arc;

impl Node {
    /// The first frame of a process.
    pub(super) fn register_process(
        &mut self,
        link: &Arc<Link>,
        correlation: u64,
        message: RegisterProcess,
    ) -> Result<(), String> {
        let worker = WorkerId::from_binary(&message.worker_id).map_err(|error| error.to_string())?;
        let refuse = |refusal: String| {
            let welcome = Welcome {
                refusal: refusal.clone(),
                ..Default::default()
            };
            let _ = link.send(kinds::WELCOME, correlation, ray_wire::encode(&welcome), &[]);
            Err(refusal)
        };
        // What the kernel says of a peer is better than what it says itself.
        let pid = match link.peer() {
            ray_rpc::Peer::Unix { pid: Some(pid), .. } => *pid,
            _ => message.pid,
        };
        match message.role {
            ROLE_TOOL => {
                self.links.insert(link.id(), (link.clone(), LinkRole::Tool));
                let welcome = self.welcome(worker, JobId::NIL, None, None);
                let _ = link.send(kinds::WELCOME, correlation, ray_wire::encode(&welcome), &[]);
                Ok(())
            }
            ROLE_WORKER => {
                let Some(process) = self
                    .processes
                    .get_mut(&worker)
                    .filter(|p| p.startup_token == message.startup_token)
                else {
                    return refuse(format!(
                        "worker {worker} was not started by this raylet, or it took too long"
                    ));
                };
                if process.registered || (process.pid != 0 && process.pid != pid && process.pid != message.pid) {
                    return refuse(format!("worker {worker} is registered already, by pid {}", process.pid));
                }
                process.registered = true;
                process.link = Some(link.clone());
                if process.pid == 0 {
                    // The zygote died between the fork and its report.
                    process.pid = message.pid;
                    let (token, job) = (process.startup_token, process.job);
                    self.pids.insert(message.pid, worker);
                    self.logs.add_worker(worker, job, message.pid);
                    self.zygote_backlog.remove(&token);
                }
                let evidence = self.processes.get(&worker).and_then(|process| process.evidence);
                let slot = match self.store.register_client(worker) {
                    Ok(slot) => slot,
                    Err(error) => return refuse(error.to_string()),
                };
                let job = self
                    .processes
                    .get(&worker)
                    .and_then(|process| process.job)
                    .unwrap_or(JobId::NIL);
                if let Some(process) = self.processes.get_mut(&worker) {
                    process.slot = Some(slot);
                }
                self.links.insert(link.id(), (link.clone(), LinkRole::Process(worker)));
                let welcome = self.welcome(worker, job, Some(slot), evidence);
                let _ = link.send(kinds::WELCOME, correlation, ray_wire::encode(&welcome), &[]);
                Ok(())
            }
            ROLE_DRIVER => {
                if self.processes.contains_key(&worker) {
                    return refuse(format!("driver {worker} is registered already"));
                }
                let process = Process {
                    role: ROLE_DRIVER,
                    pid,
                    link: Some(link.clone()),
                    job: None,
                    slot: None,
                    startup_token: 0,
                    evidence: None,
                    registered: true,
                    link_closed: false,
                    kill_cause: None,
                    exit_cause: None,
                    exit: None,
                    runtime_env_json: String::new(),
                    failure: None,
                };
                self.processes.insert(worker, process);
                self.pids.insert(pid, worker);
                self.links.insert(link.id(), (link.clone(), LinkRole::Process(worker)));
                self.add_job(worker, correlation, pid, message.job_config_json);
                Ok(())
            }
            other => refuse(format!("role {other} is not known to this version")),
        }
    }

    /// The control plane gave a driver its job.
    pub(super) fn job_added(
        &mut self,
        worker: WorkerId,
        correlation: u64,
        config_json: String,
        number: Result<u32, String>,
    ) {
        let Some(link) = self.processes.get(&worker).and_then(|process| process.link.clone()) else {
            if let Ok(number) = number {
                // The driver left before its job began.
                self.finish_job(JobId::from_int(number));
            }
            return;
        };
        let refuse = |refusal: String| {
            let welcome = Welcome {
                refusal: refusal.clone(),
                ..Default::default()
            };
            let _ = link.send(kinds::WELCOME, correlation, ray_wire::encode(&welcome), &[]);
            link.close(CloseReason::local(refusal));
        };
        let job = match number {
            Ok(number) => JobId::from_int(number),
            Err(reason) => return refuse(format!("the control plane did not add the job: {reason}")),
        };
        let slot = match self.store.register_client(worker) {
            Ok(slot) => slot,
            Err(error) => return refuse(error.to_string()),
        };
        self.jobs.configs.insert(job, config_json);
        self.jobs.drivers.insert(job, worker);
        if let Some(process) = self.processes.get_mut(&worker) {
            process.job = Some(job);
            process.slot = Some(slot);
        }
        let welcome = self.welcome(worker, job, Some(slot), None);
        let _ = link.send(kinds::WELCOME, correlation, ray_wire::encode(&welcome), &[]);
    }

    pub(super) fn welcome(
        &mut self,
        worker: WorkerId,
        job: JobId,
        slot: Option<ClientSlot>,
        evidence: Option<usize>,
    ) -> Welcome {
        let first_extent = slot.and_then(|slot| self.store.lend_extent(slot, 1).ok());
        let job_config = self.jobs.configs.get(&job).map_or("", String::as_str);
        let parsed: serde_json::Value = serde_json::from_str(job_config).unwrap_or_default();
        let details = json!({
            "session_name": self.session_name,
            "namespace": parsed.get("namespace"),
            "log_directory": self.log_directory,
            "config": self.config.system_config,
            "cluster_id": ray_ids::to_hex(&self.gcs.cluster_id),
            "cluster": self.gcs.details,
            "gcs_address": self.gcs_address(),
            "node_name": self.config.node_name,
            "node_ip": self.config.host,
            "is_head": self.config.is_head,
            "raylet_socket": self.socket_path,
            "python_path": self.config.python_path,
            "auth_token": self.config.auth_token,
            "evidence_path": evidence.map(|_| self.evidence.path().to_path_buf()),
            "evidence_index": evidence,
        });
        Welcome {
            address: Some(self.address_of(worker)),
            job_id: ray_wire::id_bytes(job.as_bytes()),
            store_path: slot
                .map(|_| path_text(self.store.path().to_path_buf()))
                .unwrap_or_default(),
            store_slot: slot.map_or(0, |slot| slot.number),
            store_slot_generation: slot.map_or(0, |slot| u64::from(slot.generation)),
            session_directory: path_text(self.config.session_directory.clone()),
            details_json: details.to_string(),
            first_extent: first_extent
                .filter(|extent| extent.len > 0)
                .map(|extent| ray_wire::ExtentInfo {
                    offset: extent.offset,
                    length: extent.len,
                    reserved: extent.reserved,
                }),
            refusal: String::new(),
        }
    }
}

fn path_text(path: PathBuf) -> String {
    path.to_string_lossy().into_owned()
}
