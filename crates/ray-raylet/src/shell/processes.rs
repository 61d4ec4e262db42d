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

use super::node::{Node, Timer, TOKEN_PID};
use super::signals::{self, ChildExit};
use crate::types::{death, Event};
use bytes::Bytes;
use ray_ids::{JobId, WorkerId};
use ray_rpc::{CloseReason, Link};
use ray_store::ClientSlot;
use ray_wire::{
    kinds, Address, DeathCause, WorkerDied, DEATH_CRASHED, DEATH_INTENDED, DEATH_RUNTIME_ENV, ROLE_DRIVER, ROLE_WORKER,
};
use rustc_hash::FxHashMap;
use std::collections::VecDeque;
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
        let watchers = self.waiting.entry(worker).or_default();
        // Raylets ask again whenever a notice may have been lost.
        let known = watchers
            .iter()
            .any(|(watcher, number)| watcher.id() == link.id() && *number == correlation);
        if !known {
            watchers.push((link.clone(), correlation));
        }
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

    /// Whether a process is known to be dead.
    pub fn is_dead(&self, worker: &WorkerId) -> bool {
        self.dead.contains_key(worker)
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
    pub(super) fn end_if_over(&mut self, worker: WorkerId) {
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
        let path = self.config.session_directory.join("sockets").join(worker.hex());
        let _ = std::fs::remove_file(ray_rpc::path_before_listening(&path));
        let _ = std::fs::remove_file(path);
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

    /// The address of a process of this node.
    pub(super) fn address_of(&self, worker: WorkerId) -> Address {
        Address {
            worker_id: Bytes::copy_from_slice(worker.as_bytes()),
            ..self.address.clone()
        }
    }
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
