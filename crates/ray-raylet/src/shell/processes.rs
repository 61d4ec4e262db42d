//! The node's processes: owns who is registered, how each dies, and who is told.
//!
//! A process's end is known when its link is closed and its exit status is there (or does not come in time): then its
//! memory, words and files are taken back, and its death is told once.
//!
//! It refuses a worker that nobody started, or a second one under the same token.
//!
//! Invariants:
//! 1. A process that is not a child keeps its slot of the store until it has truly ended.
//! 2. A death is told once to the scheduler, the control plane and those who watch.

use super::node::TOKEN_ZYGOTE;
use super::node::{LinkRole, Node, Timer, TOKEN_PID};
use super::signals::{self, ChildExit};
use super::zygote::{Zygote, ZygoteEvent};
use crate::types::{death, Event};
use bytes::Bytes;
use ray_ids::{JobId, WorkerId};
use ray_rpc::{CloseReason, Link};
use ray_store::ClientSlot;
use ray_wire::{
    kinds, Address, DeathCause, RegisterProcess, Welcome, WorkerDied, DEATH_CRASHED, DEATH_INTENDED, DEATH_RUNTIME_ENV,
    ROLE_DRIVER, ROLE_TOOL, ROLE_WORKER,
};
use rustc_hash::FxHashMap;
use serde_json::json;
use std::collections::VecDeque;
use std::path::PathBuf;
use std::sync::Arc;

/// A process of this node.
pub(super) struct Process {
    pub role: u32,
    /// 0 until it is known.
    pub pid: u32,
    pub link: Option<Arc<Link>>,
    pub job: Option<JobId>,
    pub slot: Option<ClientSlot>,
    pub startup_token: u64,
    pub evidence: Option<usize>,
    pub registered: bool,
    /// It had a link, which closed.
    pub link_closed: bool,
    /// Why we killed it.
    pub kill_cause: Option<DeathCause>,
    /// What it said of its own leaving.
    pub exit_cause: Option<DeathCause>,
    /// Its wait status, or `None` in it where it ended unseen.
    pub exit: Option<Option<i32>>,
    pub runtime_env_json: String,
    /// What the zygote said of a fork that failed.
    pub failure: Option<String>,
}

impl Process {
    /// Whether this raylet had it started.
    pub fn is_child(&self) -> bool {
        self.role == ROLE_WORKER
    }
}

/// The jobs with a driver here, and the configs of every job that has work here.
#[derive(Default)]
pub(super) struct Jobs {
    pub configs: FxHashMap<JobId, String>,
    pub drivers: FxHashMap<JobId, WorkerId>,
}

/// Who wants to hear of whose death, and who died.
#[derive(Default)]
pub(super) struct Watchers {
    waiting: FxHashMap<WorkerId, Vec<(Arc<Link>, u64)>>,
    dead: FxHashMap<WorkerId, WorkerDied>,
    order: VecDeque<WorkerId>,
}

impl Watchers {
    /// Notes a watcher, or answers where the process is dead already.
    pub fn watch(&mut self, worker: WorkerId, link: &Arc<Link>, correlation: u64) -> Option<WorkerDied> {
        if let Some(died) = self.dead.get(&worker) {
            return Some(died.clone());
        }
        self.waiting
            .entry(worker)
            .or_default()
            .push((link.clone(), correlation));
        None
    }

    /// A process died: who is to be told. The first word of a death counts.
    pub fn died(&mut self, worker: WorkerId, died: WorkerDied, remembered: u64) -> Vec<(Arc<Link>, u64)> {
        if self.dead.insert(worker, died).is_none() {
            self.order.push_back(worker);
            while self.order.len() as u64 > remembered {
                if let Some(oldest) = self.order.pop_front() {
                    self.dead.remove(&oldest);
                }
            }
        }
        self.waiting.remove(&worker).unwrap_or_default()
    }

    /// One watcher was answered.
    pub fn forget(&mut self, worker: &WorkerId, link: u64, correlation: u64) {
        if let Some(watchers) = self.waiting.get_mut(worker) {
            watchers.retain(|(watcher, number)| watcher.id() != link || *number != correlation);
            if watchers.is_empty() {
                self.waiting.remove(worker);
            }
        }
    }

    /// A watcher is gone.
    pub fn forget_link(&mut self, link: u64) {
        self.waiting.retain(|_, watchers| {
            watchers.retain(|(watcher, _)| watcher.id() != link);
            !watchers.is_empty()
        });
    }
}

impl Node {
    /// Has a worker forked.
    pub(super) fn start_worker(&mut self, worker: WorkerId, runtime_env_json: String, job: Option<JobId>) {
        let token = self.next_token;
        self.next_token += 1;
        let process = Process {
            role: ROLE_WORKER,
            pid: 0,
            link: None,
            job,
            slot: None,
            startup_token: token,
            evidence: self.evidence.take(),
            registered: false,
            link_closed: false,
            kill_cause: None,
            exit_cause: None,
            exit: None,
            runtime_env_json: runtime_env_json.clone(),
            failure: None,
        };
        let environment: serde_json::Value = serde_json::from_str(&runtime_env_json).unwrap_or_default();
        let mut env: serde_json::Map<String, serde_json::Value> = self
            .config
            .worker_env
            .iter()
            .map(|(key, value)| (key.clone(), json!(value)))
            .collect();
        if let Some(variables) = environment.get("env_vars").and_then(|variables| variables.as_object()) {
            env.extend(variables.clone());
        }
        let request = json!({
            "token": token,
            "worker_id": worker.hex(),
            "job_hex": job.map(|job| job.hex()),
            "env": env,
            "python_path": self.config.python_path,
            "python_executable": environment.get("py_executable"),
            "log_directory": self.log_directory,
            "config": {
                "raylet_socket": self.socket_path,
                "node_id": self.node_id.hex(),
                "session_directory": self.config.session_directory,
                "log_directory": self.log_directory,
                "runtime_env_json": runtime_env_json,
                "job_id": job.map(|job| job.hex()),
                "system_config": self.config.system_config,
            },
        });
        self.processes.insert(worker, process);
        self.tokens.insert(token, worker);
        if let Some(zygote) = &mut self.zygote {
            zygote.fork(token, request);
        } else {
            self.zygote_backlog.insert(token, request);
        }
        self.flush_zygote();
    }

    pub(super) fn flush_zygote(&mut self) {
        let waits = self.zygote.as_mut().is_some_and(Zygote::flush);
        if waits && !self.has_timer(Timer::FlushZygote) {
            self.at(5, Timer::FlushZygote);
        }
    }

    pub(super) fn start_zygote(&mut self) {
        self.zygote_starts += 1;
        let zygote = Zygote::start(&self.zygote_command);
        match zygote {
            Ok(mut zygote) => {
                let watched = self
                    .reactor
                    .watch_descriptor(zygote.descriptor(), TOKEN_ZYGOTE + self.zygote_starts);
                if let Err(error) = watched {
                    return self.stop(Some(error.into()));
                }
                for (token, request) in std::mem::take(&mut self.zygote_backlog) {
                    zygote.fork(token, request);
                }
                self.zygote = Some(zygote);
                self.flush_zygote();
            }
            Err(error) => {
                eprintln!("raylet: {error}");
                self.at(1_000, Timer::RestartZygote);
            }
        }
    }

    pub(super) fn on_zygote(&mut self, token: u64) {
        if token != TOKEN_ZYGOTE + self.zygote_starts {
            return self.reactor.unwatch_descriptor(token);
        }
        let events = self.zygote.as_mut().map(Zygote::receive).unwrap_or_default();
        for event in events {
            match event {
                ZygoteEvent::Ready => self.zygote_failures = 0,
                ZygoteEvent::Forked { token, pid } => self.worker_forked(token, pid),
                ZygoteEvent::ForkFailed { token, error } => {
                    if let Some(worker) = self.tokens.get(&token).copied() {
                        if let Some(process) = self.processes.get_mut(&worker) {
                            process.failure = Some(error);
                            process.exit = Some(None);
                        }
                        self.end_if_over(worker);
                    }
                }
                ZygoteEvent::Exited { pid, status } => self.child_ended(ChildExit { pid, status }),
                ZygoteEvent::Gone => return self.zygote_gone(token),
            }
        }
    }

    fn zygote_gone(&mut self, token: u64) {
        self.reactor.unwatch_descriptor(token);
        let Some(zygote) = self.zygote.take() else { return };
        // It may live still, having sent garbage. Its workers go on: this process is their reaper now.
        signals::kill_group(zygote.pid);
        self.zygote_failures += 1;
        self.zygote_backlog.extend(zygote.unanswered);
        let delay_ms = if self.zygote_failures <= 1 {
            0
        } else {
            200 << self.zygote_failures.min(5)
        };
        eprintln!(
            "raylet: the zygote (pid {}) ended; another is started in {delay_ms} ms",
            zygote.pid
        );
        if self.zygote_failures > 3 {
            let tail = self.logs.tail_of(
                &self.log_directory.join("zygote.err"),
                self.limits.log_tail_lines as usize,
            );
            for (token, _) in std::mem::take(&mut self.zygote_backlog) {
                let Some(worker) = self.tokens.get(&token).copied() else {
                    continue;
                };
                if let Some(process) = self.processes.get_mut(&worker) {
                    process.failure = Some(format!("the zygote that forks workers does not start:\n{tail}"));
                    process.exit = Some(None);
                }
                self.end_if_over(worker);
            }
        }
        self.at(delay_ms.max(1), Timer::RestartZygote);
    }

    fn worker_forked(&mut self, token: u64, pid: u32) {
        let Some(worker) = self.tokens.get(&token).copied() else {
            return signals::kill_group(pid);
        };
        let Some(process) = self.processes.get_mut(&worker) else {
            return;
        };
        process.pid = pid;
        let killed = process.kill_cause.is_some();
        let job = process.job;
        self.pids.insert(pid, worker);
        self.logs.add_worker(worker, job, pid);
        if killed {
            signals::kill_group(pid);
        }
    }

    /// A child of this process, or of the zygote, ended.
    pub(super) fn child_ended(&mut self, exit: ChildExit) {
        let Some(worker) = self.pids.get(&exit.pid).copied() else {
            return;
        };
        if let Some(process) = self.processes.get_mut(&worker) {
            process.exit = Some(Some(exit.status));
        }
        self.end_if_over(worker);
    }

    /// A watched pid ended that is no child: a driver.
    pub(super) fn watched_pid_ended(&mut self, token: u64) {
        self.reactor.unwatch_descriptor(token);
        let pid = (token ^ TOKEN_PID) as u32;
        let Some(worker) = self.pids.get(&pid).copied() else {
            return;
        };
        if let Some(process) = self.processes.get_mut(&worker) {
            process.exit.get_or_insert(None);
        }
        self.end_if_over(worker);
    }

    pub(super) fn process_link_closed(&mut self, worker: WorkerId, sentence: &str) {
        let Some(process) = self.processes.get_mut(&worker) else {
            return;
        };
        process.link = None;
        process.link_closed = true;
        if process.role == ROLE_DRIVER {
            self.driver_left(worker, sentence);
        }
        self.end_if_over(worker);
    }

    /// Ends a process once both its link and its exit say so; else gives what is missing a moment.
    fn end_if_over(&mut self, worker: WorkerId) {
        let Some(process) = self.processes.get(&worker) else {
            return;
        };
        let link_done = process.link_closed || !process.registered;
        match (link_done, process.exit) {
            (true, Some(_)) => self.process_ended(worker),
            (false, None) => {}
            // A driver may live on after it left; its slot waits for it.
            (true, None) if !process.is_child() => {}
            _ => {
                if !self.has_timer(Timer::ProcessEnd(worker)) {
                    self.at(self.limits.worker_exit_wait_ms, Timer::ProcessEnd(worker));
                }
            }
        }
    }

    /// The other half of a process's end did not come in time.
    pub(super) fn process_end_overdue(&mut self, worker: WorkerId) {
        let Some(process) = self.processes.get_mut(&worker) else {
            return;
        };
        if process.exit.is_some() {
            // Dead, yet its link is open: a process that it forked holds the socket. What it says is not the worker's.
            if let Some(link) = process.link.take() {
                link.close(CloseReason::local("the process that owned this link is dead"));
            }
            process.link_closed = true;
            return self.process_ended(worker);
        }
        let pid = process.pid;
        process
            .kill_cause
            .get_or_insert_with(|| death(DEATH_CRASHED, "its link to the raylet closed and it did not end"));
        if pid != 0 {
            signals::kill_group(pid);
        }
        self.at(self.limits.worker_exit_wait_ms, Timer::ProcessEnd(worker));
        // Where the signal of its end was lost, its status may be there all the same.
        while let Some(exit) = signals::reap_one() {
            self.child_ended(exit);
        }
        let gone = pid == 0 || !std::path::Path::new(&format!("/proc/{pid}")).exists();
        if gone && self.processes.contains_key(&worker) {
            if let Some(process) = self.processes.get_mut(&worker) {
                process.exit = Some(None);
            }
            self.process_ended(worker);
        }
    }

    fn process_ended(&mut self, worker: WorkerId) {
        self.cancel_timer(Timer::ProcessEnd(worker));
        let Some(process) = self.processes.remove(&worker) else {
            return;
        };
        self.pids.remove(&process.pid);
        self.tokens.remove(&process.startup_token);
        self.reactor.unwatch_descriptor(TOKEN_PID | u64::from(process.pid));
        if let Some(slot) = process.slot {
            self.forget_store_client(worker, slot);
        }
        let _ = std::fs::remove_file(self.config.session_directory.join("sockets").join(worker.hex()));
        if !process.is_child() {
            return;
        }
        let cause = self.cause_of(&worker, &process);
        let started = process.evidence.map(|index| self.evidence.started(index));
        if let Some(index) = process.evidence {
            self.evidence.give_back(index);
        }
        self.read_logs();
        self.logs.remove_worker(&worker);
        self.gcs.forget_process(&worker);
        self.step(Event::OwnerGone { process: worker });
        self.step(Event::WorkerGone {
            worker,
            cause: cause.clone(),
            started_sequence: started,
        });
        self.tell_death(worker, cause);
    }

    /// Tells those of this node who watch.
    pub(super) fn tell_death(&mut self, worker: WorkerId, cause: DeathCause) {
        let died = WorkerDied {
            worker: Some(self.address_of(worker)),
            cause: Some(cause),
        };
        let header = ray_wire::encode(&died);
        for (link, correlation) in self.watchers.died(worker, died, self.limits.deaths_remembered) {
            let _ = link.send(kinds::WORKER_DIED, correlation, header.clone(), &[]);
        }
    }

    fn cause_of(&mut self, worker: &WorkerId, process: &Process) -> DeathCause {
        let tail = self.logs.tail(worker, self.limits.log_tail_lines as usize);
        let (exit_code, signal) = match process.exit.flatten() {
            Some(status) if libc::WIFEXITED(status) => (Some(libc::WEXITSTATUS(status)), None),
            Some(status) if libc::WIFSIGNALED(status) => (None, Some(libc::WTERMSIG(status) as u32)),
            _ => (None, None),
        };
        let how = match (exit_code, signal) {
            (Some(code), _) => format!("exited with code {code}"),
            (_, Some(signal)) => format!("was killed by signal {signal} ({})", signal_name(signal)),
            _ => "ended; its exit status is not known".into(),
        };
        let mut cause = if let Some(cause) = &process.kill_cause {
            cause.clone()
        } else if let Some(failure) = &process.failure {
            let kind = if process.runtime_env_json.is_empty() {
                DEATH_CRASHED
            } else {
                DEATH_RUNTIME_ENV
            };
            death(kind, failure.clone())
        } else if let Some(cause) = &process.exit_cause {
            cause.clone()
        } else if exit_code == Some(0) {
            death(DEATH_INTENDED, format!("worker {worker} (pid {}) {how}", process.pid))
        } else {
            death(DEATH_CRASHED, format!("worker {worker} (pid {}) {how}", process.pid))
        };
        cause.pid = process.pid;
        cause.exit_code = exit_code;
        cause.signal = signal;
        if cause.log_tail.is_empty() {
            cause.log_tail = tail;
        }
        cause
    }

    /// A driver's link closed: its job is over.
    fn driver_left(&mut self, worker: WorkerId, sentence: &str) {
        let (job, pid) = match self.processes.get(&worker) {
            Some(process) => (process.job, process.pid),
            None => return,
        };
        self.gcs.forget_process(&worker);
        self.step(Event::OwnerGone { process: worker });
        let alive = std::path::Path::new(&format!("/proc/{pid}")).exists();
        let cause = DeathCause {
            pid,
            ..death(
                DEATH_INTENDED,
                format!(
                    "the driver (pid {pid}) left{}: {sentence}",
                    if alive { "" } else { " and ended" }
                ),
            )
        };
        if let Some(job) = job {
            self.jobs.drivers.remove(&job);
            self.finish_job(job);
            self.report_driver_death(worker, job, cause.clone());
            self.step(Event::JobFinished { job });
        }
        self.tell_death(worker, cause);
        // The slot of the store stays until the process has ended, for views that it still holds.
        if !self.watch_pid(pid) {
            if let Some(process) = self.processes.get_mut(&worker) {
                process.exit = Some(None);
            }
        }
    }

    /// Watches for the end of a process that is no child. False if it has ended.
    fn watch_pid(&mut self, pid: u32) -> bool {
        let Some(number) = i32::try_from(pid).ok().and_then(rustix::process::Pid::from_raw) else {
            return false;
        };
        let Ok(descriptor) = rustix::process::pidfd_open(number, rustix::process::PidfdFlags::empty()) else {
            return false;
        };
        use std::os::fd::AsFd;
        self.reactor
            .watch_descriptor(descriptor.as_fd(), TOKEN_PID | u64::from(pid))
            .is_ok()
    }

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
                self.starting_to_listen.push(worker);
                self.check_listening();
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

    /// A worker is ready once others can connect to it: it listens after it was welcomed.
    pub(super) fn check_listening(&mut self) {
        let sockets = self.config.session_directory.join("sockets");
        for worker in std::mem::take(&mut self.starting_to_listen) {
            if !self.processes.contains_key(&worker) {
                continue;
            }
            if sockets.join(worker.hex()).exists() {
                self.step(Event::WorkerReady { worker });
            } else {
                self.starting_to_listen.push(worker);
            }
        }
        if !self.starting_to_listen.is_empty() && !self.has_timer(Timer::CheckListening) {
            self.at(1, Timer::CheckListening);
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

    fn welcome(&mut self, worker: WorkerId, job: JobId, slot: Option<ClientSlot>, evidence: Option<usize>) -> Welcome {
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

    /// The address of a process of this node.
    pub(super) fn address_of(&self, worker: WorkerId) -> Address {
        Address {
            worker_id: Bytes::copy_from_slice(worker.as_bytes()),
            ..self.address.clone()
        }
    }
}

fn path_text(path: PathBuf) -> String {
    path.to_string_lossy().into_owned()
}

fn signal_name(signal: u32) -> &'static str {
    match signal as i32 {
        libc::SIGKILL => "SIGKILL: killed from outside, by the kernel where memory ran out",
        libc::SIGSEGV => "SIGSEGV: a bad memory access, most often in an extension module",
        libc::SIGABRT => "SIGABRT",
        libc::SIGBUS => "SIGBUS",
        libc::SIGTERM => "SIGTERM",
        libc::SIGINT => "SIGINT",
        libc::SIGFPE => "SIGFPE",
        libc::SIGILL => "SIGILL",
        _ => "see signal(7)",
    }
}
