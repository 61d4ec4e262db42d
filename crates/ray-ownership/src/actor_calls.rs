//! The caller's side of an actor: owns the order in which its calls go out and what becomes of them when it dies.
//!
//! It refuses calls over `max_pending_calls`, and to push to an actor that is not known to be alive.
//!
//! Invariants:
//! 1. Calls of a concurrency group go out in the order of their submission: one whose arguments are not there yet holds
//!    back the later ones of its group, unless the actor executes out of order. Retries are unordered.
//! 2. Sequences of one incarnation grow by one from push to push.
//! 3. A call is in exactly one place: waiting, or sent and unanswered.

use std::collections::{BTreeMap, VecDeque};

use ray_ids::{TaskId, WorkerId};
use rustc_hash::FxHashMap;

/// The group of calls that are sent again after a loss; no class can declare one of that name.
const RETRIES: &str = "\u{0}retries";

/// What the caller knows of the actor.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ActorStatus {
    /// Being created, or created again.
    Pending,
    /// There, in this incarnation.
    Alive { worker: WorkerId, incarnation: u64 },
    /// For good.
    Dead,
}

/// What the shell must do.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ActorCommand {
    /// Send the call.
    Push {
        task: TaskId,
        worker: WorkerId,
        incarnation: u64,
        sequence: u64,
    },
    /// The call fails: the actor is dead for good.
    FailDead { task: TaskId },
    /// The call was sent, its fate is unknown, and it may not be retried: the actor restarts or is out of reach.
    FailUnavailable { task: TaskId },
}

#[derive(Debug)]
struct Waiting {
    task: TaskId,
    ready: bool,
}

#[derive(Debug)]
struct Sent {
    sequence: u64,
    retries_left: i32,
}

/// One actor, as one caller sees it.
#[derive(Debug)]
pub struct ActorCalls {
    status: ActorStatus,
    /// Highest incarnation seen: news of an older one is late.
    incarnation: u64,
    next_sequence: u64,
    groups: BTreeMap<String, VecDeque<Waiting>>,
    sent: FxHashMap<TaskId, Sent>,
    /// What each waiting call may be retried.
    retries: FxHashMap<TaskId, i32>,
    out_of_order: bool,
    /// -1 without limit.
    max_pending_calls: i32,
    waiting: usize,
}

impl ActorCalls {
    /// An actor that is being created.
    pub fn new(out_of_order: bool, max_pending_calls: i32) -> Self {
        Self {
            status: ActorStatus::Pending,
            incarnation: 0,
            next_sequence: 1,
            groups: BTreeMap::new(),
            sent: FxHashMap::default(),
            retries: FxHashMap::default(),
            out_of_order,
            max_pending_calls,
            waiting: 0,
        }
    }

    /// What is known of the actor.
    pub fn status(&self) -> &ActorStatus {
        &self.status
    }

    /// Calls that wait or are unanswered.
    pub fn pending(&self) -> usize {
        self.waiting + self.sent.len()
    }

    /// Calls that were sent and are unanswered.
    pub fn sent(&self) -> impl Iterator<Item = TaskId> + '_ {
        self.sent.keys().copied()
    }

    /// Whether a further call would exceed the limit.
    pub fn is_full(&self) -> bool {
        self.max_pending_calls >= 0 && self.pending() >= self.max_pending_calls as usize
    }

    /// What a handle made from `get_actor` learns later than its first call.
    pub fn configure(&mut self, out_of_order: bool, max_pending_calls: i32) {
        self.out_of_order = out_of_order;
        self.max_pending_calls = max_pending_calls;
    }

    /// A call. `ready`: whether its arguments are there. `retries`: how often it may be sent again; -1 without limit.
    pub fn submit(&mut self, task: TaskId, group: &str, ready: bool, retries: i32, commands: &mut Vec<ActorCommand>) {
        if self.status == ActorStatus::Dead {
            commands.push(ActorCommand::FailDead { task });
            return;
        }
        if ready && self.waiting == 0 {
            // The common case: nothing holds it back.
            if let ActorStatus::Alive { worker, incarnation } = self.status {
                self.push(task, worker, incarnation, retries, commands);
                return;
            }
        }
        self.retries.insert(task, retries);
        self.waiting += 1;
        match self.groups.get_mut(group) {
            Some(queue) => queue.push_back(Waiting { task, ready }),
            None => {
                self.groups
                    .insert(group.to_owned(), VecDeque::from([Waiting { task, ready }]));
            }
        }
        self.flush(commands);
    }

    fn push(
        &mut self,
        task: TaskId,
        worker: WorkerId,
        incarnation: u64,
        retries_left: i32,
        commands: &mut Vec<ActorCommand>,
    ) {
        let sequence = self.next_sequence;
        self.next_sequence += 1;
        self.sent.insert(task, Sent { sequence, retries_left });
        commands.push(ActorCommand::Push {
            task,
            worker,
            incarnation,
            sequence,
        });
    }

    /// The call's arguments are there.
    pub fn ready(&mut self, task: TaskId, group: &str, commands: &mut Vec<ActorCommand>) {
        if let Some(waiting) = self
            .groups
            .get_mut(group)
            .and_then(|queue| queue.iter_mut().find(|waiting| waiting.task == task))
        {
            waiting.ready = true;
        }
        self.flush(commands);
    }

    fn flush(&mut self, commands: &mut Vec<ActorCommand>) {
        let ActorStatus::Alive { worker, incarnation } = self.status else {
            return;
        };
        // Retries first: they were submitted before whatever waits.
        let mut going: Vec<TaskId> = match self.groups.get_mut(RETRIES) {
            Some(queue) => queue.drain(..).map(|waiting| waiting.task).collect(),
            None => Vec::new(),
        };
        for queue in self.groups.values_mut() {
            if self.out_of_order {
                going.extend(queue.iter().filter(|waiting| waiting.ready).map(|waiting| waiting.task));
                queue.retain(|waiting| !waiting.ready);
            } else {
                while queue.front().is_some_and(|waiting| waiting.ready) {
                    going.extend(queue.pop_front().map(|waiting| waiting.task));
                }
            }
        }
        self.waiting -= going.len();
        for task in going {
            let retries = self.retries.remove(&task).unwrap_or(0);
            self.push(task, worker, incarnation, retries, commands);
        }
    }

    /// A call was answered. Returns false where it was not under way.
    pub fn replied(&mut self, task: TaskId) -> bool {
        self.sent.remove(&task).is_some()
    }

    /// The method raised what its options retry: send it again. Returns false where no retries are left.
    pub fn retry_after_exception(&mut self, task: TaskId, group: &str, commands: &mut Vec<ActorCommand>) -> bool {
        match self.sent.remove(&task) {
            Some(sent) if sent.retries_left != 0 => {
                let left = if sent.retries_left < 0 {
                    -1
                } else {
                    sent.retries_left - 1
                };
                self.submit(task, group, true, left, commands);
                true
            }
            Some(sent) => {
                self.sent.insert(task, sent);
                false
            }
            None => false,
        }
    }

    /// Takes back a call that was not sent. Returns false where it was.
    pub fn cancel_waiting(&mut self, task: TaskId) -> bool {
        for queue in self.groups.values_mut() {
            let before = queue.len();
            queue.retain(|waiting| waiting.task != task);
            if queue.len() != before {
                self.waiting -= 1;
                self.retries.remove(&task);
                return true;
            }
        }
        false
    }

    /// The actor is there. Late news of an older incarnation is ignored.
    pub fn alive(&mut self, worker: WorkerId, incarnation: u64, commands: &mut Vec<ActorCommand>) {
        if self.status == ActorStatus::Dead || incarnation < self.incarnation {
            return;
        }
        if self.status == (ActorStatus::Alive { worker, incarnation }) {
            return;
        }
        if incarnation > self.incarnation {
            self.lost(commands);
            self.next_sequence = 1;
        }
        self.incarnation = incarnation;
        self.status = ActorStatus::Alive { worker, incarnation };
        self.flush(commands);
    }

    /// The actor's process is gone, or the link to it; whether it comes back is not known yet.
    pub fn disconnected(&mut self, incarnation: u64, commands: &mut Vec<ActorCommand>) {
        if self.status == ActorStatus::Dead || incarnation < self.incarnation {
            return;
        }
        self.status = ActorStatus::Pending;
        self.lost(commands);
    }

    /// The control plane creates it again. Late news of the life before is ignored from now on.
    pub fn restarting(&mut self, next_incarnation: u64, commands: &mut Vec<ActorCommand>) {
        if self.status == ActorStatus::Dead || next_incarnation <= self.incarnation {
            return;
        }
        self.status = ActorStatus::Pending;
        self.incarnation = next_incarnation;
        self.next_sequence = 1;
        self.lost(commands);
    }

    /// The first sequence that a fresh link to the actor will carry, for `CallerHello`.
    pub fn next_sequence(&self) -> u64 {
        self.next_sequence
    }

    /// What was sent and not answered is sent again, or fails.
    fn lost(&mut self, commands: &mut Vec<ActorCommand>) {
        let mut sent: Vec<(TaskId, Sent)> = self.sent.drain().collect();
        sent.sort_unstable_by_key(|(_, sent)| sent.sequence);
        for (task, sent) in sent {
            if sent.retries_left == 0 {
                commands.push(ActorCommand::FailUnavailable { task });
                continue;
            }
            let left = if sent.retries_left < 0 {
                -1
            } else {
                sent.retries_left - 1
            };
            self.retries.insert(task, left);
            self.waiting += 1;
            // Retries are unordered; a group of their own keeps them from being held back.
            self.groups
                .entry(RETRIES.to_owned())
                .or_default()
                .push_back(Waiting { task, ready: true });
        }
    }

    /// The actor is dead for good: everything fails.
    pub fn dead(&mut self, commands: &mut Vec<ActorCommand>) {
        self.status = ActorStatus::Dead;
        let mut tasks: Vec<TaskId> = self.sent.drain().map(|(task, _)| task).collect();
        for queue in self.groups.values_mut() {
            tasks.extend(queue.drain(..).map(|waiting| waiting.task));
        }
        self.groups.clear();
        self.retries.clear();
        self.waiting = 0;
        tasks.sort_unstable();
        commands.extend(tasks.into_iter().map(|task| ActorCommand::FailDead { task }));
    }

    /// Checks the invariants.
    pub fn validate(&self) -> Result<(), String> {
        let waiting: usize = self.groups.values().map(VecDeque::len).sum();
        if waiting != self.waiting {
            return Err(format!("{waiting} calls wait and {} are counted", self.waiting));
        }
        for queue in self.groups.values() {
            for entry in queue {
                if self.sent.contains_key(&entry.task) {
                    return Err(format!("{:?} waits and is sent", entry.task));
                }
                if !self.retries.contains_key(&entry.task) {
                    return Err(format!("{:?} waits and has no retries noted", entry.task));
                }
            }
        }
        if self.status == ActorStatus::Dead && self.pending() > 0 {
            return Err("a dead actor has pending calls".into());
        }
        Ok(())
    }
}
