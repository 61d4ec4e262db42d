//! Which leased worker a call is pushed to: owns an owner's queues by scheduling class, its leases and its requests.
//!
//! It refuses to push under a recalled lease, and to pipeline before the raylet has said that no further lease is to be
//! had now, or in a class that forbids it.
//!
//! Invariants:
//! 1. A call is in exactly one place: a class's queue, or unfinished on one lease.
//! 2. A recalled lease gets no further call and is returned when its last call ends.
//! 3. A class asks for at most as many further leases as it has queued calls, and never more than its cap at once.
//! 4. Without `queued` from a raylet each lease has at most one unfinished call.

mod queries;

use std::collections::VecDeque;

use ray_ids::{LeaseId, NodeId, TaskId, WorkerId};
use rustc_hash::FxHashMap;

/// Names a scheduling class within this process.
pub type ClassId = u64;
/// Names a request for a lease within this process.
pub type RequestId = u64;

/// How long an idle lease is kept, in milliseconds.
pub const IDLE_LEASE_MS: u64 = 1000;
/// How old an unstarted pushed call may get before it is offered to an idle lease, in milliseconds.
pub const STALL_MS: u64 = 5;
/// Requests of one class under way at once.
pub const MAX_REQUESTS: usize = 16;
/// Calls pushed ahead to one worker at most.
pub const MAX_PIPELINE: usize = 128;
/// What a pipeline may hold, in microseconds of expected run time.
const PIPELINE_BUDGET_US: u64 = 2000;

/// What the shell must do.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum LeaseCommand {
    /// Ask this raylet (`None`: our own) for a lease.
    Request {
        request: RequestId,
        class: ClassId,
        raylet: Option<NodeId>,
        backlog: u32,
        preferred: Option<NodeId>,
    },
    /// Withdraw a request.
    CancelRequest { request: RequestId },
    /// Send the call to the lease's worker.
    Push {
        lease: LeaseId,
        task: TaskId,
        sequence: u64,
    },
    /// Give the worker back.
    Return { lease: LeaseId, worker_exits: bool },
    /// Ask the worker for its unstarted calls.
    Recall { lease: LeaseId },
    /// The call's worker died while it ran, or may have: this attempt counts.
    AttemptFailed { task: TaskId, lease: LeaseId },
}

/// A worker at our disposal.
#[derive(Debug, Clone)]
pub struct Lease {
    class: ClassId,
    /// The worker.
    pub worker: WorkerId,
    /// Its node.
    pub node: NodeId,
    next_sequence: u64,
    /// Unfinished calls in the order of their sequences.
    pushed: VecDeque<(TaskId, u64)>,
    recalled: bool,
    recalling: bool,
    exits: bool,
    idle_since_ms: u64,
    progress_ms: u64,
}

impl Lease {
    /// The sequence under which the call was pushed; 0 where it was not.
    pub fn sequence_of(&self, task: &TaskId) -> u64 {
        self.pushed
            .iter()
            .find(|(pushed, _)| pushed == task)
            .map_or(0, |(_, sequence)| *sequence)
    }
}

#[derive(Debug)]
struct Request {
    class: ClassId,
    queued: bool,
}

#[derive(Debug)]
struct Class {
    queue: VecDeque<TaskId>,
    leases: Vec<LeaseId>,
    requests: usize,
    /// Requests that a raylet has put into its queue.
    queued_requests: usize,
    pipelined: bool,
    preferred: Option<NodeId>,
    /// Mean time between two replies of a busy worker, in microseconds; `None` before the first.
    mean_us: Option<u64>,
}

/// The owner's leases.
#[derive(Debug, Default)]
pub struct LeaseClient {
    classes: FxHashMap<ClassId, Class>,
    leases: FxHashMap<LeaseId, Lease>,
    requests: FxHashMap<RequestId, Request>,
    running: FxHashMap<TaskId, LeaseId>,
    next_request: RequestId,
    idle: usize,
}

impl LeaseClient {
    /// No leases.
    pub fn new() -> Self {
        Self {
            next_request: 1,
            ..Self::default()
        }
    }

    /// A call is ready to run. `pipelined` says whether its class may be pushed ahead.
    pub fn submit(
        &mut self,
        task: TaskId,
        class: ClassId,
        pipelined: bool,
        preferred: Option<NodeId>,
        now_ms: u64,
        commands: &mut Vec<LeaseCommand>,
    ) {
        let entry = self.classes.entry(class).or_insert_with(|| Class {
            queue: VecDeque::new(),
            leases: Vec::new(),
            requests: 0,
            queued_requests: 0,
            pipelined,
            preferred: None,
            mean_us: None,
        });
        entry.preferred = preferred;
        entry.queue.push_back(task);
        self.feed(class, now_ms, commands);
    }

    fn depth(class: &Class) -> usize {
        if !class.pipelined || class.queued_requests == 0 {
            return 1;
        }
        match class.mean_us {
            None => 2,
            Some(mean_us) => ((PIPELINE_BUDGET_US / mean_us.max(1)) as usize).clamp(1, MAX_PIPELINE),
        }
    }

    /// Pushes what can be pushed and asks for what is missing.
    fn feed(&mut self, class_id: ClassId, now_ms: u64, commands: &mut Vec<LeaseCommand>) {
        let Some(class) = self.classes.get_mut(&class_id) else {
            return;
        };
        if class.queue.is_empty() {
            return;
        }
        // Idle leases first; then, where that is allowed, the shortest pipelines.
        let depth = Self::depth(class);
        let mut level = 0;
        while level < depth && !class.queue.is_empty() {
            for lease_id in &class.leases {
                let Some(lease) = self.leases.get_mut(lease_id) else {
                    continue;
                };
                if lease.recalled || lease.recalling || lease.exits || lease.pushed.len() > level {
                    continue;
                }
                if level > 0 && now_ms.saturating_sub(lease.progress_ms) >= STALL_MS {
                    // Nothing is put behind a call that takes long.
                    continue;
                }
                let Some(task) = class.queue.pop_front() else { break };
                if lease.pushed.is_empty() {
                    self.idle = self.idle.saturating_sub(1);
                    lease.progress_ms = now_ms;
                }
                let sequence = lease.next_sequence;
                lease.next_sequence += 1;
                lease.pushed.push_back((task, sequence));
                self.running.insert(task, *lease_id);
                commands.push(LeaseCommand::Push {
                    lease: *lease_id,
                    task,
                    sequence,
                });
            }
            level += 1;
        }
        while class.requests < class.queue.len().min(MAX_REQUESTS) {
            let request = self.next_request;
            self.next_request += 1;
            class.requests += 1;
            self.requests.insert(
                request,
                Request {
                    class: class_id,
                    queued: false,
                },
            );
            commands.push(LeaseCommand::Request {
                request,
                class: class_id,
                raylet: None,
                backlog: class.queue.len() as u32,
                preferred: class.preferred,
            });
        }
    }

    fn end_request(&mut self, request: RequestId) -> Option<ClassId> {
        let ended = self.requests.remove(&request)?;
        if let Some(class) = self.classes.get_mut(&ended.class) {
            class.requests -= 1;
            if ended.queued {
                class.queued_requests -= 1;
            }
        }
        Some(ended.class)
    }

    /// A raylet granted a lease. One that nobody asked for (any more) goes back at once.
    // Each argument is a field of the grant's message; a struct would only repeat that message.
    #[allow(clippy::too_many_arguments)]
    pub fn granted(
        &mut self,
        request: RequestId,
        lease: LeaseId,
        worker: WorkerId,
        node: NodeId,
        first_sequence: u64,
        now_ms: u64,
        commands: &mut Vec<LeaseCommand>,
    ) {
        let Some(class_id) = self.end_request(request) else {
            commands.push(LeaseCommand::Return {
                lease,
                worker_exits: false,
            });
            return;
        };
        let Some(class) = self.classes.get_mut(&class_id) else {
            return;
        };
        class.leases.push(lease);
        self.idle += 1;
        self.leases.insert(
            lease,
            Lease {
                class: class_id,
                worker,
                node,
                next_sequence: first_sequence,
                pushed: VecDeque::new(),
                recalled: false,
                recalling: false,
                exits: false,
                idle_since_ms: now_ms,
                progress_ms: now_ms,
            },
        );
        self.feed(class_id, now_ms, commands);
        self.rebalance(class_id, now_ms, commands);
    }

    /// That raylet is a better one to ask.
    pub fn redirected(&mut self, request: RequestId, raylet: NodeId, commands: &mut Vec<LeaseCommand>) {
        let Some(entry) = self.requests.get_mut(&request) else {
            return;
        };
        let class_id = entry.class;
        if std::mem::replace(&mut entry.queued, false) {
            if let Some(class) = self.classes.get_mut(&class_id) {
                class.queued_requests -= 1;
            }
        }
        if let Some(class) = self.classes.get(&class_id) {
            commands.push(LeaseCommand::Request {
                request,
                class: class_id,
                raylet: Some(raylet),
                backlog: class.queue.len() as u32,
                preferred: class.preferred,
            });
        }
    }

    /// The raylet that was asked is gone: ask our own again.
    pub fn request_lost(&mut self, request: RequestId, now_ms: u64, commands: &mut Vec<LeaseCommand>) {
        if let Some(class) = self.end_request(request) {
            self.feed(class, now_ms, commands);
        }
    }

    /// No lease will come of the request: every queued call of its class fails. Returns them.
    pub fn refused(&mut self, request: RequestId, commands: &mut Vec<LeaseCommand>) -> Vec<TaskId> {
        let Some(class_id) = self.end_request(request) else {
            return Vec::new();
        };
        let Some(class) = self.classes.get_mut(&class_id) else {
            return Vec::new();
        };
        let failed = class.queue.drain(..).collect();
        self.withdraw_requests(class_id, commands);
        failed
    }

    /// The request waits at its raylet: pipelining is allowed from now on.
    pub fn queued(&mut self, request: RequestId, now_ms: u64, commands: &mut Vec<LeaseCommand>) {
        let Some(entry) = self.requests.get_mut(&request) else {
            return;
        };
        if std::mem::replace(&mut entry.queued, true) {
            return;
        }
        let class_id = entry.class;
        if let Some(class) = self.classes.get_mut(&class_id) {
            class.queued_requests += 1;
        }
        self.feed(class_id, now_ms, commands);
    }

    /// The raylet wants the lease back.
    pub fn recalled(&mut self, lease_id: LeaseId, commands: &mut Vec<LeaseCommand>) {
        let Some(lease) = self.leases.get_mut(&lease_id) else {
            return;
        };
        lease.recalled = true;
        if lease.pushed.len() > 1 && !lease.recalling {
            lease.recalling = true;
            commands.push(LeaseCommand::Recall { lease: lease_id });
        }
        self.return_if_done(lease_id, commands);
    }

    fn return_if_done(&mut self, lease_id: LeaseId, commands: &mut Vec<LeaseCommand>) {
        let Some(lease) = self.leases.get(&lease_id) else {
            return;
        };
        if !(lease.recalled || lease.exits) || !lease.pushed.is_empty() {
            return;
        }
        let exits = lease.exits;
        self.remove_lease(lease_id);
        commands.push(LeaseCommand::Return {
            lease: lease_id,
            worker_exits: exits,
        });
    }

    fn remove_lease(&mut self, lease_id: LeaseId) -> Option<Lease> {
        let lease = self.leases.remove(&lease_id)?;
        if lease.pushed.is_empty() {
            self.idle = self.idle.saturating_sub(1);
        }
        if let Some(class) = self.classes.get_mut(&lease.class) {
            class.leases.retain(|id| *id != lease_id);
        }
        Some(lease)
    }

    /// A call is over (whatever its outcome). Returns whether it was known.
    pub fn replied(&mut self, task: TaskId, worker_exits: bool, now_us: u64, commands: &mut Vec<LeaseCommand>) -> bool {
        let Some(lease_id) = self.running.remove(&task) else {
            return false;
        };
        let now_ms = now_us / 1000;
        let Some(lease) = self.leases.get_mut(&lease_id) else {
            return true;
        };
        let class_id = lease.class;
        lease.pushed.retain(|(pushed, _)| *pushed != task);
        if lease.pushed.is_empty() {
            lease.idle_since_ms = now_ms;
            self.idle += 1;
        }
        let elapsed_ms = now_ms.saturating_sub(lease.progress_ms);
        lease.progress_ms = now_ms;
        lease.exits |= worker_exits;
        if let Some(class) = self.classes.get_mut(&class_id) {
            // Whole milliseconds do for a budget of two: what is faster than one counts as 15 µs.
            let sample_us = if elapsed_ms == 0 { 15 } else { elapsed_ms * 1000 };
            class.mean_us = Some(match class.mean_us {
                None => sample_us,
                Some(mean_us) if sample_us > mean_us => (mean_us + sample_us) / 2,
                Some(mean_us) => (mean_us * 7 + sample_us) / 8,
            });
        }
        self.return_if_done(lease_id, commands);
        self.feed(class_id, now_ms, commands);
        self.withdraw_idle_requests(class_id, commands);
        true
    }

    /// The worker gave these back unstarted: they are queued again in front, free of charge. One that is not pushed under
    /// that lease any more is none of its business: it was answered, or runs elsewhere since.
    pub fn tasks_recalled(
        &mut self,
        tasks: &[TaskId],
        lease_id: LeaseId,
        now_ms: u64,
        commands: &mut Vec<LeaseCommand>,
    ) {
        let Some(lease) = self.leases.get_mut(&lease_id) else {
            return;
        };
        lease.recalling = false;
        let class_id = lease.class;
        let busy = !lease.pushed.is_empty();
        let mut back = Vec::new();
        lease.pushed.retain(|(task, _)| {
            let recalled = tasks.contains(task);
            if recalled {
                back.push(*task);
            }
            !recalled
        });
        if busy && lease.pushed.is_empty() {
            lease.idle_since_ms = now_ms;
            self.idle += 1;
        }
        if let Some(class) = self.classes.get_mut(&class_id) {
            for task in back.iter().rev() {
                self.running.remove(task);
                class.queue.push_front(*task);
            }
        }
        self.return_if_done(lease_id, commands);
        self.feed(class_id, now_ms, commands);
    }

    /// The worker does not know the lease (`REPLY_STALE_LEASE` to this call): the call is queued again in front, free of
    /// charge, and nothing more is pushed under the lease.
    pub fn stale(&mut self, task: TaskId, lease_id: LeaseId, now_ms: u64, commands: &mut Vec<LeaseCommand>) {
        if let Some(lease) = self.leases.get_mut(&lease_id) {
            lease.recalled = true;
        }
        self.tasks_recalled(&[task], lease_id, now_ms, commands);
    }

    /// A worker died. `started`: the highest sequence it had started, if known. Calls above it are queued again, free of
    /// charge; the others' attempts count.
    pub fn broken(&mut self, lease_id: LeaseId, started: Option<u64>, now_ms: u64, commands: &mut Vec<LeaseCommand>) {
        let Some(lease) = self.remove_lease(lease_id) else {
            return;
        };
        for (task, sequence) in lease.pushed.iter().rev() {
            self.running.remove(task);
            if started.is_some_and(|started| *sequence > started) {
                if let Some(class) = self.classes.get_mut(&lease.class) {
                    class.queue.push_front(*task);
                }
            } else {
                commands.push(LeaseCommand::AttemptFailed {
                    task: *task,
                    lease: lease_id,
                });
            }
        }
        self.feed(lease.class, now_ms, commands);
    }

    /// A node died with every lease on it, and no evidence of what was started.
    pub fn node_died(&mut self, node: NodeId, now_ms: u64, commands: &mut Vec<LeaseCommand>) {
        let lost: Vec<LeaseId> = self
            .leases
            .iter()
            .filter(|(_, lease)| lease.node == node)
            .map(|(id, _)| *id)
            .collect();
        for lease in lost {
            self.broken(lease, None, now_ms, commands);
        }
    }

    /// Takes a call out of its queue. Returns false where it is pushed already or unknown.
    pub fn cancel_queued(&mut self, task: TaskId, class: ClassId, commands: &mut Vec<LeaseCommand>) -> bool {
        let Some(entry) = self.classes.get_mut(&class) else {
            return false;
        };
        let before = entry.queue.len();
        entry.queue.retain(|queued| *queued != task);
        let found = entry.queue.len() != before;
        if found {
            self.withdraw_idle_requests(class, commands);
        }
        found
    }

    /// Withdraws requests that have nothing to run any more.
    fn withdraw_idle_requests(&mut self, class_id: ClassId, commands: &mut Vec<LeaseCommand>) {
        let Some(class) = self.classes.get(&class_id) else {
            return;
        };
        if !class.queue.is_empty() || class.requests == 0 {
            return;
        }
        // What is pushed ahead may still need a worker of its own.
        let ahead = class
            .leases
            .iter()
            .any(|id| self.leases.get(id).is_some_and(|lease| lease.pushed.len() > 1));
        if !ahead {
            self.withdraw_requests(class_id, commands);
        }
    }

    fn withdraw_requests(&mut self, class_id: ClassId, commands: &mut Vec<LeaseCommand>) {
        let requests: Vec<RequestId> = self
            .requests
            .iter()
            .filter(|(_, request)| request.class == class_id)
            .map(|(id, _)| *id)
            .collect();
        for request in requests {
            self.end_request(request);
            commands.push(LeaseCommand::CancelRequest { request });
        }
    }

    /// Pipelines of the class that stall give back what they have not started: it waits for a worker of its own.
    fn rebalance(&mut self, class_id: ClassId, now_ms: u64, commands: &mut Vec<LeaseCommand>) {
        let Some(class) = self.classes.get(&class_id) else {
            return;
        };
        for id in &class.leases {
            let Some(lease) = self.leases.get_mut(id) else { continue };
            if lease.pushed.len() > 1 && !lease.recalling && now_ms.saturating_sub(lease.progress_ms) >= STALL_MS {
                lease.recalling = true;
                commands.push(LeaseCommand::Recall { lease: *id });
            }
        }
    }

    /// Time passes: idle leases go back, stalled pipelines are shared out. Returns when to be called next, if at all.
    pub fn tick(&mut self, now_ms: u64, commands: &mut Vec<LeaseCommand>) -> Option<u64> {
        let mut next: Option<u64> = None;
        let mut expired = Vec::new();
        let mut stalled = Vec::new();
        for (id, lease) in &self.leases {
            if lease.pushed.is_empty() {
                let until = lease.idle_since_ms + IDLE_LEASE_MS;
                if until <= now_ms {
                    expired.push(*id);
                } else {
                    next = Some(next.map_or(until, |at: u64| at.min(until)));
                }
            } else if lease.pushed.len() > 1 {
                let until = lease.progress_ms + STALL_MS;
                if until <= now_ms {
                    stalled.push(lease.class);
                }
                let again = until.max(now_ms + STALL_MS);
                next = Some(next.map_or(again, |at: u64| at.min(again)));
            }
        }
        for id in expired {
            self.remove_lease(id);
            commands.push(LeaseCommand::Return {
                lease: id,
                worker_exits: false,
            });
        }
        stalled.sort_unstable();
        stalled.dedup();
        for class in stalled {
            self.rebalance(class, now_ms, commands);
        }
        next
    }
}
