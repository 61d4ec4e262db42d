//! The node's workers: owns which state each is in, which are idle, and when one is started or asked to leave.
//!
//! A worker starts without a job (unless its runtime environment needs a start of its own), serves one job, and never
//! another. It refuses to start more at once, or more in all, than the limits say.
//!
//! Invariants:
//! 1. A worker is in exactly one state; a leased worker names its lease, an actor's worker its actor.
//! 2. A worker with a job never serves another.
//! 3. At most `maximum_starting_workers` start at once.

use crate::types::{Milliseconds, Random, SchedulerLimits};
use ray_ids::{ActorId, JobId, LeaseId, WorkerId};
use std::collections::BTreeMap;

/// What a worker is doing.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum WorkerState {
    /// Started, not yet registered.
    Starting { since: Milliseconds },
    /// Ready for a lease.
    Idle { since: Milliseconds },
    /// Under a lease.
    Leased(LeaseId),
    /// It is, or is becoming, that actor.
    Actor(ActorId),
    /// It takes no work and leaves when it can; killed at the deadline, if there is one.
    Retired { deadline: Option<Milliseconds> },
}

/// A worker.
#[derive(Debug, Clone)]
pub struct Worker {
    pub state: WorkerState,
    /// The job it serves, once it has one.
    pub job: Option<JobId>,
    pub runtime_env_json: String,
    /// How many leases it has had, for the first sequence of the next.
    pub leases_served: u64,
    /// What it said of its own leaving.
    pub exit_cause: Option<ray_wire::DeathCause>,
    pub registered: bool,
}

/// The workers.
#[derive(Debug)]
pub struct WorkerPool {
    workers: BTreeMap<WorkerId, Worker>,
    limits: SchedulerLimits,
    /// Actors that took a worker in a row, each within `idle_worker_ms` of the one before, and when the last did.
    actors_in_a_row: usize,
    last_actor_at: Option<Milliseconds>,
}

impl WorkerPool {
    /// No workers yet.
    pub fn new(limits: SchedulerLimits) -> Self {
        Self {
            workers: BTreeMap::new(),
            limits,
            actors_in_a_row: 0,
            last_actor_at: None,
        }
    }

    /// Every worker.
    pub fn iter(&self) -> impl Iterator<Item = (&WorkerId, &Worker)> {
        self.workers.iter()
    }

    /// One worker.
    pub fn get(&self, worker: &WorkerId) -> Option<&Worker> {
        self.workers.get(worker)
    }

    /// One worker, to change.
    pub fn get_mut(&mut self, worker: &WorkerId) -> Option<&mut Worker> {
        self.workers.get_mut(worker)
    }

    /// How many there are.
    pub fn len(&self) -> usize {
        self.workers.len()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.workers.is_empty()
    }

    /// The best idle worker for this job and environment: one that served the job, newest idle first; else a fresh one.
    pub fn find_idle(&self, job: JobId, runtime_env_json: &str) -> Option<WorkerId> {
        let candidates = self.workers.iter().filter_map(|(id, worker)| match worker.state {
            WorkerState::Idle { since }
                if worker.runtime_env_json == runtime_env_json && worker.job.is_none_or(|own| own == job) =>
            {
                Some((worker.job.is_some(), since, *id))
            }
            _ => None,
        });
        candidates.max().map(|(_, _, id)| id)
    }

    /// Notes a worker as starting and gives it its id.
    pub fn start(
        &mut self,
        runtime_env_json: &str,
        job: Option<JobId>,
        random: &mut Random,
        now: Milliseconds,
    ) -> WorkerId {
        let id = WorkerId::from_array(random.bytes());
        let worker = Worker {
            state: WorkerState::Starting { since: now },
            job,
            runtime_env_json: runtime_env_json.to_string(),
            leases_served: 0,
            exit_cause: None,
            registered: false,
        };
        self.workers.insert(id, worker);
        id
    }

    /// Whether any worker is ready for a lease.
    pub fn has_idle(&self) -> bool {
        self.workers
            .values()
            .any(|worker| matches!(worker.state, WorkerState::Idle { .. }))
    }

    /// How many more may be started now.
    pub fn room_to_start(&self) -> usize {
        let starting = self.count(|worker| matches!(worker.state, WorkerState::Starting { .. }));
        let free = self.limits.maximum_starting_workers.saturating_sub(starting);
        free.min(self.limits.maximum_workers.saturating_sub(self.workers.len()))
    }

    /// Workers on their way that will fit this job and environment.
    pub fn starting_for(&self, job: Option<JobId>, runtime_env_json: &str) -> usize {
        self.count(|worker| {
            matches!(worker.state, WorkerState::Starting { .. })
                && worker.runtime_env_json == runtime_env_json
                && (worker.job.is_none() || worker.job == job)
        })
    }

    /// Fresh workers, idle or on their way.
    pub fn fresh(&self) -> usize {
        self.count(|worker| {
            worker.job.is_none() && matches!(worker.state, WorkerState::Starting { .. } | WorkerState::Idle { .. })
        })
    }

    /// An actor took a worker, which is lost to others. Where actors come in a row, more workers are kept ready.
    pub fn actor_took_worker(&mut self, now: Milliseconds) {
        self.actors_in_a_row = if self.is_row_over(now) {
            1
        } else {
            self.actors_in_a_row + 1
        };
        self.last_actor_at = Some(now);
    }

    fn is_row_over(&self, now: Milliseconds) -> bool {
        self.last_actor_at
            .is_none_or(|at| now >= at + self.limits.idle_worker_ms)
    }

    /// How many fresh workers are to be ready or on their way.
    pub fn spares_wanted(&self, now: Milliseconds) -> usize {
        let ahead = if self.is_row_over(now) { 0 } else { self.actors_in_a_row };
        ahead
            .min(self.limits.maximum_spare_workers)
            .max(self.limits.spare_workers)
    }

    /// A worker registered. False if nobody started it, or it registered before.
    pub fn ready(&mut self, worker: &WorkerId, now: Milliseconds) -> bool {
        match self.workers.get_mut(worker) {
            Some(known) if matches!(known.state, WorkerState::Starting { .. }) => {
                known.state = WorkerState::Idle { since: now };
                known.registered = true;
                true
            }
            _ => false,
        }
    }

    /// Forgets a worker that is dead.
    pub fn remove(&mut self, worker: &WorkerId) -> Option<Worker> {
        self.workers.remove(worker)
    }

    /// Idle workers that nobody needs, oldest first: of those that served a job and of fresh ones, what is beyond the
    /// number kept and was idle for long enough.
    pub fn surplus(&self, now: Milliseconds) -> Vec<WorkerId> {
        let mut surplus = Vec::new();
        for (fresh, kept) in [
            (false, self.limits.idle_workers_kept),
            (true, self.limits.spare_workers),
        ] {
            let idle = self.idle_since(fresh);
            let beyond = idle.len().saturating_sub(kept);
            let due = idle
                .into_iter()
                .take(beyond)
                .filter(|(since, _)| now >= self.surplus_at(fresh, *since));
            surplus.extend(due.map(|(_, id)| id));
        }
        surplus
    }

    /// When `surplus` may next have something to say.
    pub fn next_surplus_at(&self) -> Option<Milliseconds> {
        let oldest = |(fresh, kept): (bool, usize)| {
            let idle = self.idle_since(fresh);
            idle.first()
                .filter(|_| idle.len() > kept)
                .map(|(since, _)| self.surplus_at(fresh, *since))
        };
        [
            (false, self.limits.idle_workers_kept),
            (true, self.limits.spare_workers),
        ]
        .into_iter()
        .filter_map(oldest)
        .min()
    }

    /// Fresh workers stay while actors come in a row.
    fn surplus_at(&self, fresh: bool, since: Milliseconds) -> Milliseconds {
        let from = since.max(self.last_actor_at.filter(|_| fresh).unwrap_or(0));
        from + self.limits.idle_worker_ms
    }

    fn idle_since(&self, fresh: bool) -> Vec<(Milliseconds, WorkerId)> {
        let idle = |(id, worker): (&WorkerId, &Worker)| match worker.state {
            WorkerState::Idle { since } if worker.job.is_none() == fresh => Some((since, *id)),
            _ => None,
        };
        let mut idle: Vec<(Milliseconds, WorkerId)> = self.workers.iter().filter_map(idle).collect();
        idle.sort_unstable();
        idle
    }

    /// Workers that did not register in time, or did not leave in time.
    pub fn overdue(&self, now: Milliseconds) -> Vec<(WorkerId, bool)> {
        let late = |(id, worker): (&WorkerId, &Worker)| match worker.state {
            WorkerState::Starting { since } if now >= since + self.limits.worker_start_timeout_ms => Some((*id, true)),
            WorkerState::Retired {
                deadline: Some(deadline),
            } if now >= deadline => Some((*id, false)),
            _ => None,
        };
        self.workers.iter().filter_map(late).collect()
    }

    /// When `overdue` may next have something to say.
    pub fn next_overdue_at(&self) -> Option<Milliseconds> {
        let due = |worker: &Worker| match worker.state {
            WorkerState::Starting { since } => Some(since + self.limits.worker_start_timeout_ms),
            WorkerState::Retired { deadline } => deadline,
            _ => None,
        };
        self.workers.values().filter_map(due).min()
    }

    fn count(&self, which: impl Fn(&Worker) -> bool) -> usize {
        self.workers.values().filter(|worker| which(worker)).count()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_worker_of_the_job_is_preferred_and_of_another_never_taken() {
        let mut pool = WorkerPool::new(SchedulerLimits::default());
        let mut random = Random::new([1; 4]);
        let (first, second) = (JobId::from_int(1), JobId::from_int(2));
        let fresh = pool.start("", None, &mut random, 0);
        let used = pool.start("", None, &mut random, 0);
        assert_eq!(pool.room_to_start(), 6);
        assert!(pool.find_idle(first, "").is_none());
        assert!(pool.ready(&fresh, 5) && pool.ready(&used, 1));
        assert!(!pool.ready(&used, 1));
        pool.get_mut(&used).unwrap().job = Some(first);
        assert_eq!(pool.find_idle(first, ""), Some(used));
        assert_eq!(pool.find_idle(second, ""), Some(fresh));
        assert_eq!(pool.find_idle(second, "{}"), None);
    }

    #[test]
    fn idle_workers_beyond_the_limit_leave_after_a_while() {
        let mut pool = WorkerPool::new(SchedulerLimits::default());
        let mut random = Random::new([1; 4]);
        let workers: Vec<WorkerId> = (0..3).map(|_| pool.start("", None, &mut random, 0)).collect();
        for (at, worker) in workers.iter().enumerate() {
            pool.ready(worker, at as u64);
        }
        assert!(pool.surplus(999).is_empty());
        assert_eq!(pool.next_surplus_at(), Some(1_000));
        assert_eq!(pool.surplus(1_001), workers[..2]);
    }

    #[test]
    fn actors_in_a_row_keep_more_workers_ready_and_for_a_while_only() {
        let mut pool = WorkerPool::new(SchedulerLimits::default());
        let mut random = Random::new([1; 4]);
        assert_eq!(pool.spares_wanted(0), 1);
        for at in 0..20 {
            pool.actor_took_worker(at);
        }
        assert_eq!(pool.spares_wanted(20), 8);
        let workers: Vec<WorkerId> = (0..3).map(|_| pool.start("", None, &mut random, 5)).collect();
        for worker in &workers {
            pool.ready(worker, 5);
        }
        assert_eq!(pool.next_surplus_at(), Some(1_019));
        assert!(pool.surplus(1_018).is_empty());
        assert_eq!(pool.surplus(1_019).len(), 2);
        assert_eq!(pool.spares_wanted(1_019), 1);
        pool.actor_took_worker(2_000);
        assert_eq!(pool.spares_wanted(2_001), 1);
    }
}
