//! One lease's life: asked for, granted, recalled, returned or broken; and what its worker does meanwhile.
//!
//! Invariants: those of `scheduler`.

use crate::queues::Request;
use crate::scheduler::{Activity, Awaiting, Lease, LocalScheduler};
use crate::types::{death, Command, Milliseconds, RequestKey};
use crate::worker_pool::WorkerState;
use ray_ids::{JobId, LeaseId, NodeId, WorkerId};
use ray_sched::{choose_node_with, Choice, HybridSettings, Infeasibility, NodeView};
use ray_wire::layout::{ERROR_PLACEMENT_GROUP_REMOVED, ERROR_RUNTIME_ENV, ERROR_SYSTEM, ERROR_TASK_UNSCHEDULABLE};
use ray_wire::{DeathCause, LeaseSpecification, DEATH_INTENDED, DEATH_JOB, DEATH_OWNER, DEATH_RUNTIME_ENV};

/// Where a request goes.
#[derive(Debug, PartialEq)]
pub(crate) enum Verdict {
    Here,
    Elsewhere(NodeId),
    /// It waits here, though it can never be served as the cluster stands (or, false, is not ready yet).
    Waits {
        reason: String,
        infeasible: bool,
    },
    Refused {
        error_kind: u32,
        message: String,
    },
}

/// Workers of one environment that may die before they register until those who wait for one are refused.
const START_FAILURES_LIMIT: u32 = 3;

impl LocalScheduler {
    pub(crate) fn request_lease(
        &mut self,
        key: RequestKey,
        specification: LeaseSpecification,
        preferred: Option<NodeId>,
        redirected: bool,
        now: Milliseconds,
        out: &mut Vec<Command>,
    ) {
        let known = self.queues.contains(&key) || self.leases.values().any(|lease| lease.key == key);
        if known {
            // A repeated request is answered by the first one's answer.
            return;
        }
        let class = match self.intern(specification) {
            Ok(class) => class,
            Err(message) => {
                return out.push(Command::Refuse {
                    key,
                    error_kind: ERROR_TASK_UNSCHEDULABLE,
                    message,
                })
            }
        };
        let mut request = Request {
            key,
            class,
            preferred,
            redirected,
            queued_at: now,
            told: None,
        };
        match self.judge(&request) {
            Verdict::Here => self.queues.push(request),
            Verdict::Elsewhere(node) => self.redirect(&request, node, out),
            Verdict::Waits { reason, infeasible } => {
                request.told = Some((reason.clone(), infeasible));
                self.queues.push(request);
                out.push(Command::Queued {
                    key,
                    reason,
                    infeasible,
                });
            }
            Verdict::Refused { error_kind, message } => out.push(Command::Refuse {
                key,
                error_kind,
                message,
            }),
        }
    }

    /// Where a request goes, by what is known now.
    pub(crate) fn judge(&mut self, request: &Request) -> Verdict {
        let class = &request.class;
        if let Some(group) = class.group {
            if self.removed_groups.contains(&group) {
                let message = format!("placement group {group} was removed");
                return Verdict::Refused {
                    error_kind: ERROR_PLACEMENT_GROUP_REMOVED,
                    message,
                };
            }
        }
        let mut own = NodeView::of(&self.node);
        own.draining = self.draining;
        let feasible_here = own.takes_work() && own.fits_ever(&class.demand);
        self.view.nodes.insert(self.node_id, own);
        let preferred = request.preferred.filter(|node| self.view.working_node(*node).is_some());
        let random = &mut self.random;
        let choice = choose_node_with(
            &HybridSettings::default(),
            &class.labels,
            &self.view,
            &class.demand,
            &class.strategy,
            Some(preferred.unwrap_or(self.node_id)),
            &mut || random.next_u64(),
            &mut self.spread_cursor,
        );
        match choice {
            Choice::Node(node) | Choice::Busy(node) if node == self.node_id => Verdict::Here,
            // Once redirected, a request stays where it can be served at all.
            Choice::Node(_) | Choice::Busy(_) if request.redirected && feasible_here => Verdict::Here,
            // Waiting is done at home as long as home can serve it.
            Choice::Busy(_) if feasible_here && class.strategy == ray_sched::SchedulingStrategy::Default => {
                Verdict::Here
            }
            Choice::Node(node) | Choice::Busy(node) => Verdict::Elsewhere(node),
            Choice::Infeasible(reason) => {
                // A group that is not placed yet is no lasting obstacle.
                let infeasible = !matches!(
                    reason,
                    Infeasibility::GroupMissing { .. } | Infeasibility::BundleMissing { .. }
                );
                Verdict::Waits {
                    reason: reason.to_string(),
                    infeasible,
                }
            }
            Choice::Unavailable(reason) => Verdict::Refused {
                error_kind: ERROR_TASK_UNSCHEDULABLE,
                message: reason.to_string(),
            },
        }
    }

    pub(crate) fn redirect(&mut self, request: &Request, node: NodeId, out: &mut Vec<Command>) {
        // Until that node reports again, what was sent there counts as taken.
        if let Some(view) = self.view.nodes.get_mut(&node) {
            view.available.checked_sub(&request.class.demand);
        }
        out.push(Command::Redirect { key: request.key, node });
    }

    pub(crate) fn cancel_request(&mut self, key: RequestKey) {
        if self.queues.remove(&key).is_some() {
            return;
        }
        let waiting = self
            .leases
            .iter()
            .find(|(_, lease)| lease.key == key && lease.worker.is_none());
        if let Some(id) = waiting.map(|(id, _)| *id) {
            self.drop_lease(&id);
        }
    }

    /// Ends a lease and frees what it held; its worker is the caller's business.
    pub(crate) fn drop_lease(&mut self, id: &LeaseId) -> Option<Lease> {
        let mut lease = self.leases.remove(id)?;
        self.awaiting.retain(|(who, _)| *who != Awaiting::Lease(*id));
        self.node.release(std::mem::take(&mut lease.allocation));
        Some(lease)
    }

    pub(crate) fn return_lease(
        &mut self,
        owner: WorkerId,
        id: LeaseId,
        worker_exits: bool,
        now: Milliseconds,
        out: &mut Vec<Command>,
    ) {
        if self.leases.get(&id).is_none_or(|lease| lease.key.process != owner) {
            return;
        }
        let Some(lease) = self.drop_lease(&id) else { return };
        let Some(worker) = lease.worker else { return };
        let exits = worker_exits;
        if let Some(entry) = self.pool.get_mut(&worker) {
            if entry.state != WorkerState::Leased(id) {
                return;
            }
            if exits {
                entry.state = WorkerState::Retired { deadline: None };
                return;
            }
            entry.state = WorkerState::Idle { since: now };
            let job = entry.job;
            out.push(Command::UnassignLease { worker });
            if job.is_some_and(|job| self.finished_jobs.contains(&job)) {
                self.kill(worker, death(DEATH_JOB, "its job ended"), out);
            }
        }
    }

    pub(crate) fn kill(&mut self, worker: WorkerId, cause: DeathCause, out: &mut Vec<Command>) {
        if let Some(entry) = self.pool.get_mut(&worker) {
            if matches!(entry.state, WorkerState::Idle { .. } | WorkerState::Starting { .. }) {
                entry.state = WorkerState::Retired { deadline: None };
            }
            out.push(Command::KillWorker { worker, cause });
        }
    }

    pub(crate) fn worker_ready(&mut self, worker: WorkerId, now: Milliseconds, out: &mut Vec<Command>) {
        if !self.pool.ready(&worker, now) {
            return;
        }
        let Some(entry) = self.pool.get(&worker) else { return };
        let job = entry.job;
        self.start_failures.remove(&entry.runtime_env_json);
        if job.is_some_and(|job| self.finished_jobs.contains(&job)) {
            self.kill(worker, death(DEATH_JOB, "its job ended"), out);
        }
    }

    pub(crate) fn worker_exiting(&mut self, worker: WorkerId, cause: Option<DeathCause>) {
        let Some(entry) = self.pool.get_mut(&worker) else {
            return;
        };
        entry.exit_cause = cause;
        if matches!(entry.state, WorkerState::Idle { .. } | WorkerState::Starting { .. }) {
            entry.state = WorkerState::Retired { deadline: None };
        }
    }

    pub(crate) fn worker_gone(
        &mut self,
        worker: WorkerId,
        cause: DeathCause,
        started_sequence: Option<u64>,
        out: &mut Vec<Command>,
    ) {
        let Some(entry) = self.pool.remove(&worker) else { return };
        let actor = self.actor_worker_gone(worker, &cause, out);
        if let WorkerState::Leased(id) = entry.state {
            if let Some(lease) = self.drop_lease(&id) {
                if !lease.abandoned {
                    let (owner, cause) = (lease.key.process, cause.clone());
                    out.push(Command::LeaseBroken {
                        owner,
                        lease: id,
                        cause,
                        started_sequence,
                    });
                }
            }
        }
        if entry.registered {
            out.push(Command::ReportDeath { worker, cause, actor });
            return;
        }
        let failed = matches!(entry.state, WorkerState::Starting { .. }) || cause.kind == DEATH_RUNTIME_ENV;
        if failed && !matches!(cause.kind, DEATH_INTENDED | DEATH_JOB) {
            self.start_failed(&entry.runtime_env_json, cause, out);
        }
    }

    /// A worker never registered: after some in a row those who wait for one are told, instead of waiting for ever.
    fn start_failed(&mut self, environment: &str, cause: DeathCause, out: &mut Vec<Command>) {
        let failures = self
            .start_failures
            .entry(environment.to_string())
            .or_insert((0, cause.clone()));
        failures.0 += 1;
        failures.1 = cause.clone();
        let broken_environment = cause.kind == DEATH_RUNTIME_ENV;
        if failures.0 < START_FAILURES_LIMIT && !broken_environment {
            return;
        }
        self.start_failures.remove(environment);
        let waiting: Vec<Awaiting> = self.awaiting.iter().map(|(who, _)| *who).collect();
        for who in waiting {
            match who {
                Awaiting::Lease(id) => {
                    let same = |lease: &Lease| lease.class.specification.runtime_env_json == environment;
                    if !self.leases.get(&id).is_some_and(same) {
                        continue;
                    }
                    if let Some(lease) = self.drop_lease(&id) {
                        let (error_kind, message) = if broken_environment {
                            (ERROR_RUNTIME_ENV, cause.message.clone())
                        } else {
                            (
                                ERROR_SYSTEM,
                                format!("workers do not start: {}\n{}", cause.message, cause.log_tail),
                            )
                        };
                        out.push(Command::Refuse {
                            key: lease.key,
                            error_kind,
                            message,
                        });
                    }
                }
                Awaiting::Actor(id) => self.actor_start_failed(id, environment, &cause, out),
            }
        }
    }

    pub(crate) fn owner_gone(&mut self, process: WorkerId, out: &mut Vec<Command>) {
        self.queues.remove_process(&process);
        self.abandon_where(
            |lease| lease.key.process == process,
            death(DEATH_OWNER, "the process that leased it died"),
            out,
        );
    }

    /// Ends every lease that `which` says, without an owner to tell: workers that may run its calls are killed.
    pub(crate) fn abandon_where(&mut self, which: impl Fn(&Lease) -> bool, cause: DeathCause, out: &mut Vec<Command>) {
        let ids: Vec<LeaseId> = self
            .leases
            .iter()
            .filter(|(_, lease)| which(lease))
            .map(|(id, _)| *id)
            .collect();
        for id in ids {
            let worker = self.leases.get(&id).and_then(|lease| lease.worker);
            match worker {
                None => drop(self.drop_lease(&id)),
                Some(worker) => {
                    if let Some(lease) = self.leases.get_mut(&id) {
                        if !lease.abandoned {
                            lease.abandoned = true;
                            self.kill(worker, cause.clone(), out);
                        }
                    }
                }
            }
        }
    }

    pub(crate) fn blocked(&mut self, worker: WorkerId, id: LeaseId, reason: String) {
        if let Some(lease) = self.leases.get_mut(&id).filter(|lease| lease.worker == Some(worker)) {
            lease.blocked = Some(reason);
            self.node.give_back_cpu(&mut lease.allocation);
        }
    }

    pub(crate) fn unblocked(&mut self, worker: WorkerId, id: LeaseId) {
        if let Some(lease) = self.leases.get_mut(&id).filter(|lease| lease.worker == Some(worker)) {
            lease.blocked = None;
            self.node.take_back_cpu(&mut lease.allocation);
        }
    }

    pub(crate) fn note_activity(&mut self, leases: &[LeaseId], activity: Activity) {
        for id in leases {
            if let Some(lease) = self.leases.get_mut(id) {
                lease.activity = activity;
            }
        }
    }

    pub(crate) fn job_finished(&mut self, job: JobId, out: &mut Vec<Command>) {
        self.finished_jobs.insert(job);
        let of_job = |specification: &LeaseSpecification| specification.job_id == job.as_bytes();
        self.queues.remove_where(|request| of_job(&request.class.specification));
        let cause = death(DEATH_JOB, "its job ended");
        self.abandon_where(|lease| of_job(&lease.class.specification), cause.clone(), out);
        self.end_actors_of(job, &cause, out);
        let workers: Vec<WorkerId> = self
            .pool
            .iter()
            .filter(|(id, worker)| worker.job == Some(job) && !self.actor_of_worker.contains_key(*id))
            .filter(|(_, worker)| !matches!(worker.state, WorkerState::Leased(_)))
            .map(|(id, _)| *id)
            .collect();
        for worker in workers {
            self.kill(worker, cause.clone(), out);
        }
    }
}
