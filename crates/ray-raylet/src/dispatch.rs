//! Who gets what: owns the pass that grants, recalls, assigns workers and starts them, after every event.
//!
//! Actors and bundles come first (the control plane deemed their resources free), then lease requests class by class in
//! turn. A request that others overtook for too long has the node's resources kept for it, in windows that grow, so that
//! a large demand is met and nothing deadlocks on what is kept.
//!
//! What is short is recalled from sticky leases: idle ones at once and oldest first, busy ones after a moment, and only
//! as many as those who wait can use.
//!
//! Invariants: those of `scheduler`.

use crate::leases::Verdict;
use crate::placement::{helps_with, instances_json, overlap};
use crate::queues::Class;
use crate::scheduler::{Activity, ActorPhase, Awaiting, Kept, Lease, LocalScheduler, Reservation};
use crate::types::{death, Command, Milliseconds, RequestKey};
use crate::worker_pool::WorkerState;
use ray_ids::{JobId, LeaseId, NodeId, PlacementGroupId, WorkerId};
use ray_sched::{Allocation, ResourceSet};
use ray_wire::{DEATH_CRASHED, DEATH_INTENDED};
use std::collections::BTreeMap;
use std::sync::Arc;

/// A window in which resources are kept for a starving request, at first and at most.
const KEEP_WINDOW_MS: (u64, u64) = (1_000, 60_000);
/// Time between two such windows, in which others go on.
const KEEP_PAUSE_MS: u64 = 500;
/// How often the control plane is asked about a placement group that somebody waits for.
const ASK_GROUP_EVERY_MS: u64 = 2_000;
/// How long a lease waits for its worker before its owner hears of it.
const TELL_WORKER_WAIT_MS: u64 = 500;
/// Leases recalled in one pass at most.
const RECALLS_A_PASS: usize = 64;

impl LocalScheduler {
    pub(crate) fn dispatch(&mut self, now: Milliseconds, out: &mut Vec<Command>) {
        self.retire_workers(now, out);
        if std::mem::take(&mut self.view_changed) {
            self.reconsider(out);
        }
        self.try_reservations(now, out);
        self.grant(now);
        self.assign_workers(now, out);
        self.start_workers(now, out);
        self.tell_waiting(now, out);
        self.recall(now, out);
    }

    fn retire_workers(&mut self, now: Milliseconds, out: &mut Vec<Command>) {
        for worker in self.pool.surplus(now) {
            if let Some(entry) = self.pool.get_mut(&worker) {
                entry.state = WorkerState::Retired {
                    deadline: Some(now + self.limits.graceful_exit_ms),
                };
            }
            out.push(Command::AskToExit {
                worker,
                reason: "it was idle".into(),
            });
        }
        for (worker, starting) in self.pool.overdue(now) {
            let cause = if starting {
                let seconds = self.limits.worker_start_timeout_ms / 1_000;
                death(DEATH_CRASHED, format!("the worker did not register within {seconds} s"))
            } else {
                death(DEATH_INTENDED, "it was asked to leave and did not in time")
            };
            if let Some(entry) = self.pool.get_mut(&worker) {
                entry.state = if starting {
                    WorkerState::Starting { since: now }
                } else {
                    WorkerState::Retired {
                        deadline: Some(now + self.limits.forced_exit_ms),
                    }
                };
            }
            out.push(Command::KillWorker { worker, cause });
        }
        let deadline_ms = self.limits.recall_deadline_ms;
        let overdue = |lease: &Lease| {
            !lease.abandoned
                && lease.activity == Activity::Idle
                && lease.recalled_at.is_some_and(|at| now >= at + deadline_ms)
        };
        let fenced: Vec<WorkerId> = self
            .leases
            .values()
            .filter(|lease| overdue(lease))
            .filter_map(|l| l.worker)
            .collect();
        for worker in fenced {
            let message = format!("its idle lease was recalled and not given back within {deadline_ms} ms");
            out.push(Command::KillWorker {
                worker,
                cause: death(DEATH_INTENDED, message),
            });
        }
    }

    /// Looks at every waiting request again, because the cluster changed.
    fn reconsider(&mut self, out: &mut Vec<Command>) {
        for class in self.queues.classes() {
            let keys: Vec<RequestKey> = self.queues.of_class(&class).map(|request| request.key).collect();
            for key in keys {
                let Some(request) = self.queues.get_mut(&key).map(|request| request.clone()) else {
                    continue;
                };
                match self.judge(&request) {
                    Verdict::Here => {
                        if request.told.as_ref().is_some_and(|(_, infeasible)| *infeasible) {
                            self.tell(key, "it is feasible now and waits for its turn".into(), false, out);
                        }
                        break;
                    }
                    Verdict::Elsewhere(node) => {
                        let free_there = |node: &NodeId| {
                            self.view
                                .working_node(*node)
                                .is_some_and(|view| view.fits_now(&class.demand))
                        };
                        if !self.node.is_feasible(&class.demand) || self.draining || free_there(&node) {
                            self.queues.remove(&key);
                            self.redirect(&request, node, out);
                        } else {
                            break;
                        }
                    }
                    Verdict::Waits { reason, infeasible } => self.tell(key, reason, infeasible, out),
                    Verdict::Refused { error_kind, message } => {
                        self.queues.remove(&key);
                        out.push(Command::Refuse {
                            key,
                            error_kind,
                            message,
                        });
                    }
                }
            }
        }
    }

    /// Tells an owner why its request waits, if that is news.
    fn tell(&mut self, key: RequestKey, reason: String, infeasible: bool, out: &mut Vec<Command>) {
        if let Some(request) = self.queues.get_mut(&key) {
            let news = request.told.as_ref().is_none_or(|(_, told)| *told != infeasible);
            request.told = Some((reason.clone(), infeasible));
            if news {
                out.push(Command::Queued {
                    key,
                    reason,
                    infeasible,
                });
            }
        }
    }

    fn grant(&mut self, now: Milliseconds) {
        if self.queues.is_empty() {
            self.kept = None;
            return;
        }
        self.choose_kept(now);
        loop {
            let mut granted = false;
            for class in self.queues.classes() {
                if self.is_held_back(&class) || (self.draining && !self.is_hard_here(&class)) {
                    continue;
                }
                let Ok(allocation) = self.node.allocate(&class.demand) else {
                    continue;
                };
                let Some(request) = self.queues.grant_head(&class) else {
                    self.node.release(allocation);
                    continue;
                };
                granted = true;
                if self.kept.as_ref().is_some_and(|kept| Arc::ptr_eq(&kept.class, &class)) {
                    self.kept = None;
                }
                let id = self.new_lease_id();
                let lease = Lease {
                    key: request.key,
                    class,
                    allocation,
                    worker: None,
                    since: now,
                    first_sequence: 0,
                    recalled_at: None,
                    blocked: None,
                    activity: Activity::Unknown,
                    abandoned: false,
                    told: false,
                };
                self.leases.insert(id, lease);
                self.awaiting.push_back((Awaiting::Lease(id), now));
            }
            if !granted {
                return;
            }
        }
    }

    /// Work for a draining node that can run nowhere else: it is inside a bundle here.
    fn is_hard_here(&self, class: &Class) -> bool {
        class.group.is_some()
    }

    fn new_lease_id(&mut self) -> LeaseId {
        self.next_lease += 1;
        let mut bytes: [u8; 16] = self.random.bytes();
        // The count comes first, so that leases are iterated in the order of their making.
        bytes[..8].copy_from_slice(&self.next_lease.to_be_bytes());
        LeaseId::from_array(bytes)
    }

    /// Whether others, who wait longer or come first, are kept what this class wants.
    fn is_held_back(&self, class: &Arc<Class>) -> bool {
        let depth = class.specification.depth;
        if let Some(kept) = &self.kept {
            let other = !Arc::ptr_eq(&kept.class, class);
            if other && depth <= kept.class.specification.depth && overlap(&kept.class.demand, &class.demand) {
                return true;
            }
        }
        self.reservations.iter().any(|reservation| {
            let (Reservation::Actor { demand, .. } | Reservation::Bundles { demand, .. }) = reservation;
            overlap(demand, &class.demand)
        })
    }

    fn choose_kept(&mut self, now: Milliseconds) {
        if let Some(kept) = &self.kept {
            if self.queues.count(&kept.class) == 0 {
                self.kept = None;
            } else if now >= kept.until {
                self.keep_window_ms = (kept.window_ms * 2).min(KEEP_WINDOW_MS.1);
                self.keep_not_before = now + KEEP_PAUSE_MS;
                self.kept = None;
            }
            return;
        }
        if now < self.keep_not_before {
            return;
        }
        let mut oldest: Option<(Milliseconds, Arc<Class>)> = None;
        for class in self.queues.classes() {
            let Some(head) = self.queues.head(&class) else { continue };
            let starving = now >= head.queued_at + self.limits.starvation_ms && self.node.is_feasible(&class.demand);
            if starving && oldest.as_ref().is_none_or(|(at, _)| head.queued_at < *at) {
                oldest = Some((head.queued_at, class));
            }
        }
        if let Some((_, class)) = oldest {
            let window_ms = self.keep_window_ms.max(KEEP_WINDOW_MS.0);
            self.kept = Some(Kept {
                class,
                until: now + window_ms,
                window_ms,
            });
        } else {
            self.keep_window_ms = KEEP_WINDOW_MS.0;
        }
    }

    fn assign_workers(&mut self, now: Milliseconds, out: &mut Vec<Command>) {
        if self.awaiting.is_empty() || !self.pool.has_idle() {
            return;
        }
        let waiting: Vec<Awaiting> = self.awaiting.iter().map(|(who, _)| *who).collect();
        for who in waiting {
            let Some((job, environment)) = self.wants(who) else {
                self.awaiting.retain(|(other, _)| *other != who);
                continue;
            };
            let Some(worker) = self.pool.find_idle(job, &environment) else {
                continue;
            };
            self.awaiting.retain(|(other, _)| *other != who);
            self.assign(who, worker, job, now, out);
            if !self.pool.has_idle() {
                return;
            }
        }
    }

    fn assign(&mut self, who: Awaiting, worker: WorkerId, job: JobId, now: Milliseconds, out: &mut Vec<Command>) {
        let Some(entry) = self.pool.get_mut(&worker) else {
            return;
        };
        let first_of_job = entry.leases_served == 0;
        entry.job = Some(job);
        entry.leases_served += 1;
        // Sequences of a worker's leases never meet, so its one word of evidence speaks of every lease.
        let first_sequence = entry.leases_served << 32;
        match who {
            Awaiting::Lease(lease_id) => {
                entry.state = WorkerState::Leased(lease_id);
                let Some(lease) = self.leases.get_mut(&lease_id) else {
                    return;
                };
                lease.worker = Some(worker);
                lease.since = now;
                lease.first_sequence = first_sequence;
                out.push(Command::AssignLease {
                    worker,
                    lease: lease_id,
                    job,
                    resources: lease.class.specification.resources.clone(),
                    strategy: lease.class.specification.strategy.clone(),
                    instances_json: instances_json(&lease.allocation, &self.units),
                    runtime_env_json: lease.class.specification.runtime_env_json.clone(),
                    first_sequence,
                    first_of_job,
                });
                out.push(Command::Grant {
                    key: lease.key,
                    lease: lease_id,
                    worker,
                    first_sequence,
                });
            }
            Awaiting::Actor(actor_id) => {
                entry.state = WorkerState::Actor(actor_id);
                let lease = self.new_lease_id();
                let Some(actor) = self.actors.get_mut(&actor_id) else {
                    return;
                };
                actor.worker = Some(worker);
                actor.phase = ActorPhase::Creating;
                self.actor_of_worker.insert(worker, actor_id);
                self.pool.actor_took_worker(now);
                let creation = actor.message.creation.as_ref();
                out.push(Command::AssignLease {
                    worker,
                    lease,
                    job,
                    resources: creation.map(|creation| creation.resources.clone()).unwrap_or_default(),
                    strategy: creation.and_then(|creation| creation.strategy.clone()),
                    instances_json: instances_json(&actor.allocation, &self.units),
                    runtime_env_json: creation
                        .map(|creation| creation.runtime_env_json.clone())
                        .unwrap_or_default(),
                    first_sequence,
                    first_of_job,
                });
                out.push(Command::CreateActor {
                    worker,
                    message: Box::new(actor.message.clone()),
                });
            }
        }
    }

    /// The job and environment of a worker that is waited for.
    fn wants(&self, who: Awaiting) -> Option<(JobId, String)> {
        match who {
            Awaiting::Lease(id) => {
                let specification = &self.leases.get(&id)?.class.specification;
                let job = JobId::from_binary(&specification.job_id).unwrap_or(JobId::NIL);
                Some((job, specification.runtime_env_json.clone()))
            }
            Awaiting::Actor(id) => {
                let creation = self.actors.get(&id)?.message.creation.as_ref();
                Some((
                    id.job_id(),
                    creation
                        .map(|creation| creation.runtime_env_json.clone())
                        .unwrap_or_default(),
                ))
            }
        }
    }

    fn start_workers(&mut self, now: Milliseconds, out: &mut Vec<Command>) {
        let mut room = self.pool.room_to_start();
        if room == 0 {
            return;
        }
        // An environment of its own is made for one job; the plain one serves whoever comes first.
        let mut wanted: BTreeMap<(String, Option<JobId>), usize> = BTreeMap::new();
        for (who, _) in &self.awaiting {
            if let Some((job, environment)) = self.wants(*who) {
                let job = Some(job).filter(|_| !environment.is_empty());
                *wanted.entry((environment, job)).or_default() += 1;
            }
        }
        for ((environment, job), count) in wanted {
            let missing = count.saturating_sub(self.pool.starting_for(job, &environment));
            for _ in 0..missing.min(room) {
                self.start_one(environment.clone(), job, now, out);
                room -= 1;
            }
        }
        while self.prestart && room > 0 && self.pool.fresh() < self.pool.spares_wanted(now) {
            self.start_one(String::new(), None, now, out);
            room -= 1;
        }
    }

    fn start_one(&mut self, runtime_env_json: String, job: Option<JobId>, now: Milliseconds, out: &mut Vec<Command>) {
        let worker = self.pool.start(&runtime_env_json, job, &mut self.random, now);
        out.push(Command::StartWorker {
            worker,
            runtime_env_json,
            job,
        });
    }

    fn tell_waiting(&mut self, now: Milliseconds, out: &mut Vec<Command>) {
        let untold: Vec<(RequestKey, Arc<Class>)> = self
            .queues
            .iter()
            .filter(|request| request.told.is_none())
            .map(|request| (request.key, request.class.clone()))
            .collect();
        for (key, class) in untold {
            let reason = self.waiting_reason(&class);
            self.tell(key, reason, false, out);
        }
        let mut groups: Vec<PlacementGroupId> = Vec::new();
        for class in self.queues.classes() {
            if let Some(group) = class.group.filter(|group| !groups.contains(group)) {
                groups.push(group);
            }
        }
        for group in groups {
            let due = self
                .asked_groups
                .get(&group)
                .is_none_or(|at| now >= *at + ASK_GROUP_EVERY_MS);
            let here = self.node.bundles().any(|(id, ..)| id == group);
            if due && !here {
                self.asked_groups.insert(group, now);
                out.push(Command::AskPlacementGroup { group });
            }
        }
        for (who, since) in &self.awaiting {
            let Awaiting::Lease(id) = who else { continue };
            let Some(lease) = self.leases.get_mut(id) else { continue };
            if !lease.told && now >= since + TELL_WORKER_WAIT_MS {
                lease.told = true;
                let reason = "its resources are reserved and its worker is starting".to_string();
                out.push(Command::Queued {
                    key: lease.key,
                    reason,
                    infeasible: false,
                });
            }
        }
    }

    /// Why a class waits here, in a sentence.
    pub(crate) fn waiting_reason(&self, class: &Arc<Class>) -> String {
        match self.node.shortage(&class.demand) {
            Some(shortage) if !self.leases.is_empty() => {
                format!("{shortage}; {} lease(s) hold the rest", self.leases.len())
            }
            Some(shortage) => shortage.to_string(),
            None if self.is_held_back(class) => "its resources are kept for work that waits longer".into(),
            None => "it waits for its turn".into(),
        }
    }

    /// Recalls sticky leases for those who wait, as many as they can use.
    fn recall(&mut self, now: Milliseconds, out: &mut Vec<Command>) {
        if self.leases.is_empty() || (self.queues.is_empty() && self.reservations.is_empty()) {
            return;
        }
        if !self.leases.values().any(is_recallable) {
            return;
        }
        let mut claimed = ResourceSet::new();
        let mut budget = RECALLS_A_PASS;
        let reserved: Vec<ResourceSet> = self
            .reservations
            .iter()
            .map(|reservation| {
                let (Reservation::Actor { demand, .. } | Reservation::Bundles { demand, .. }) = reservation;
                demand.clone()
            })
            .collect();
        for demand in reserved {
            self.recall_for(&demand, None, &mut claimed, &mut budget, now, out);
        }
        for class in self.queues.classes() {
            if !self.node.is_feasible(&class.demand) {
                continue;
            }
            let owners: Vec<WorkerId> = self
                .queues
                .of_class(&class)
                .map(|request| request.key.process)
                .collect();
            for owner in owners {
                if budget == 0
                    || !self.recall_for(
                        &class.demand,
                        Some((owner, &class)),
                        &mut claimed,
                        &mut budget,
                        now,
                        out,
                    )
                {
                    break;
                }
            }
        }
    }

    /// Recalls for one demand. False if no lease is left that could help it.
    fn recall_for(
        &mut self,
        demand: &ResourceSet,
        requester: Option<(WorkerId, &Arc<Class>)>,
        claimed: &mut ResourceSet,
        budget: &mut usize,
        now: Milliseconds,
        out: &mut Vec<Command>,
    ) -> bool {
        let mut needed = claimed.clone();
        needed.add_all(demand);
        let held_by = |owner: WorkerId| self.leases.values().filter(|lease| lease.key.process == owner).count();
        let requester_holds = requester.map_or(0, |(owner, _)| held_by(owner));
        let mut chosen: Vec<LeaseId> = Vec::new();
        loop {
            let coming = self
                .leases
                .iter()
                .filter(|(id, lease)| lease.recalled_at.is_some() || lease.abandoned || chosen.contains(id));
            let future = self
                .node
                .available_if_released(coming.map(|(_, lease)| &lease.allocation));
            let Some((short, _)) = needed.iter().find(|(name, wanted)| future.get(name) < *wanted) else {
                break;
            };
            let candidates = self.leases.iter().filter(|(id, lease)| {
                is_recallable(lease)
                    && !chosen.contains(id)
                    && helps_with(short, &lease.class.demand, lease.class.group, &lease.allocation)
                    && requester.is_none_or(|(owner, class)| {
                        let same_class = Arc::ptr_eq(class, &lease.class);
                        let other = lease.key.process != owner;
                        match lease.activity {
                            Activity::Idle => other || !same_class,
                            // A fresh lease is in use before its worker says so.
                            _ if now < lease.since + self.limits.busy_lease_quantum_ms => false,
                            _ if same_class => other && held_by(lease.key.process) > requester_holds,
                            _ => true,
                        }
                    })
            });
            let best = candidates.min_by_key(|(_, lease)| (lease.activity != Activity::Idle, lease.since));
            let Some((id, _)) = best else { return false };
            chosen.push(*id);
            if chosen.len() >= *budget {
                break;
            }
        }
        *budget -= chosen.len();
        *claimed = needed;
        for id in chosen {
            if let Some(lease) = self.leases.get_mut(&id) {
                lease.recalled_at = Some(now);
                out.push(Command::Recall {
                    owner: lease.key.process,
                    lease: id,
                });
            }
        }
        true
    }

    /// The allocations of leases that are known to run nothing.
    pub(crate) fn idle_allocations(&self) -> impl Iterator<Item = &Allocation> {
        self.leases
            .values()
            .filter(|lease| lease.activity == Activity::Idle)
            .map(|lease| &lease.allocation)
    }
}

fn is_recallable(lease: &Lease) -> bool {
    lease.worker.is_some() && lease.recalled_at.is_none() && !lease.abandoned && lease.blocked.is_none()
}
