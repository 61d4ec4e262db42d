//! Workers and the zygote: owns what a worker is started with, and what follows when the zygote dies.
//!
//! Invariants: those of `processes`.

use super::config::RayletError;
use super::node::TOKEN_ZYGOTE;
use super::node::{Node, Timer};
use super::processes::Process;
use super::signals::{self, ChildExit};
use super::zygote::{Zygote, ZygoteEvent};
use ray_ids::{JobId, WorkerId};
use ray_wire::ROLE_WORKER;
use serde_json::json;

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
        let request = json!({
            "token": token,
            "worker_id": worker.hex(),
            "job_hex": job.map(|job| job.hex()),
            "env": self.config.worker_env,
            "env_vars": environment.get("env_vars"),
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
        match Zygote::start(&self.zygote_command) {
            Ok(zygote) => {
                self.zygote = Some(zygote);
                if let Err(error) = self.adopt_zygote() {
                    self.stop(Some(error));
                }
            }
            Err(error) => {
                eprintln!("raylet: {error}");
                self.at(1_000, Timer::RestartZygote);
            }
        }
    }

    /// Watches the zygote that was just started, and asks it for the workers that wait.
    pub(super) fn adopt_zygote(&mut self) -> Result<(), RayletError> {
        self.zygote_starts += 1;
        let Some(zygote) = &mut self.zygote else { return Ok(()) };
        self.reactor
            .watch_descriptor(zygote.descriptor(), TOKEN_ZYGOTE + self.zygote_starts)?;
        for (token, request) in std::mem::take(&mut self.zygote_backlog) {
            zygote.fork(token, request);
        }
        self.flush_zygote();
        Ok(())
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

    pub(super) fn zygote_gone(&mut self, token: u64) {
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

    pub(super) fn worker_forked(&mut self, token: u64, pid: u32) {
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
}
