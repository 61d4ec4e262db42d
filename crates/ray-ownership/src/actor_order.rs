//! The actor's side of its calls: owns which call starts when, and what is done with one that was seen before.
//!
//! It refuses calls meant for another incarnation, runs no sequence of a caller twice, and starts nothing over a
//! concurrency group's limit. Threads and asyncio are alike to it: a limit says how many calls run at once.
//!
//! A caller numbers its calls from 1 within one incarnation. A fresh link begins with `hello`, which says the first
//! sequence that the link will carry: what the caller sent before and has not started here is not wanted any more (the
//! caller failed it, or sends it again under a new sequence), and gaps below are not waited for. A call that is sent again
//! under its old sequence is told from a new one and answered with what became of the first.
//!
//! Invariants:
//! 1. A sequence of a caller is run at most once.
//! 2. At most `limit` calls of a group run at once, and none waits that could run.
//! 3. Calls of one caller in one group start in the order of their sequences, unless execution is out of order; one whose
//!    arguments are not there yet holds back its caller's later ones in that group, and nobody else's.
//! 4. A call is in exactly one place: early (a lower sequence of its caller is missing), queued, or running.

use std::collections::{BTreeMap, BTreeSet, VecDeque};

use ray_ids::{TaskId, WorkerId};
use rustc_hash::{FxHashMap, FxHashSet};

/// The group of methods that name none.
pub const DEFAULT_GROUP: &str = "";

/// Names one push: its caller and its sequence among that caller's.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct CallKey {
    pub caller: WorkerId,
    pub sequence: u64,
}

/// A call that arrived.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ArrivedCall {
    pub key: CallKey,
    pub task: TaskId,
    /// The incarnation the caller means.
    pub incarnation: u64,
    /// The concurrency group; one that the class does not declare is treated as the default group.
    pub group: String,
    /// Whether its arguments are here; else `ready` is called when they are.
    pub ready: bool,
}

/// Why a call does not run.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RefusalReason {
    /// It was meant for another incarnation (`REPLY_STALE_INCARNATION`).
    StaleIncarnation,
    /// It was cancelled while it waited (`REPLY_CANCELLED`).
    Cancelled,
    /// Its caller gave it up with a fresh link (`hello`); nobody reads a reply.
    GivenUp,
    /// Its caller is dead; nobody reads a reply.
    CallerDied,
    /// The actor is leaving (`exit_actor`, `ray.kill`).
    Exiting,
}

/// What became of a call that is sent again.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SeenState {
    /// It waits or runs: its reply is to go over the link on which it came last.
    Unfinished,
    /// It is over: send its reply again, or `REPLY_DUPLICATE` where that is not kept.
    Finished,
}

/// What the shell must do.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum OrderCommand {
    /// Start it; `finished` is called when it is over.
    Run { key: CallKey, task: TaskId, group: String },
    /// Answer that it does not run, and let its arguments go.
    Refuse {
        key: CallKey,
        task: TaskId,
        reason: RefusalReason,
    },
    /// It was seen before.
    Duplicate {
        key: CallKey,
        task: TaskId,
        state: SeenState,
    },
}

/// Where a call is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum CallPlace {
    /// A lower sequence of its caller is missing.
    Early,
    /// Waits for its arguments.
    WaitsForArguments,
    /// Waits for its turn.
    Queued,
    Running,
}

#[derive(Debug)]
struct Queued {
    key: CallKey,
    task: TaskId,
    ready: bool,
}

#[derive(Debug)]
struct Group {
    limit: usize,
    running: FxHashMap<CallKey, TaskId>,
    queue: VecDeque<Queued>,
}

#[derive(Debug, Default)]
struct Caller {
    /// Every lower sequence was seen or is given up.
    floor: u64,
    /// Seen at or above the floor: where execution is out of order, or cancelled while a lower one was missing.
    seen: BTreeSet<u64>,
    /// Arrived ahead of a missing sequence (only where execution is in order).
    early: BTreeMap<u64, ArrivedCall>,
    dead: bool,
}

/// One incarnation's calls.
#[derive(Debug)]
pub struct ActorOrder {
    incarnation: u64,
    out_of_order: bool,
    exiting: bool,
    groups: BTreeMap<String, Group>,
    callers: FxHashMap<WorkerId, Caller>,
    unfinished: usize,
}

impl ActorOrder {
    /// An actor without calls. `max_concurrency` is the default group's limit; `groups` the named ones'. A limit of zero
    /// would never run anything and counts as one.
    pub fn new(incarnation: u64, out_of_order: bool, max_concurrency: usize, groups: &[(String, usize)]) -> Self {
        let group = |limit: usize| Group {
            limit: limit.max(1),
            running: FxHashMap::default(),
            queue: VecDeque::new(),
        };
        let mut all: BTreeMap<String, Group> = groups
            .iter()
            .map(|(name, limit)| (name.clone(), group(*limit)))
            .collect();
        all.insert(DEFAULT_GROUP.to_owned(), group(max_concurrency));
        Self {
            incarnation,
            out_of_order,
            exiting: false,
            groups: all,
            callers: FxHashMap::default(),
            unfinished: 0,
        }
    }

    /// Which life of the actor this is.
    pub fn incarnation(&self) -> u64 {
        self.incarnation
    }

    /// A caller's fresh link: `next_sequence` is the first that it will carry.
    pub fn hello(&mut self, caller: WorkerId, next_sequence: u64, commands: &mut Vec<OrderCommand>) {
        let state = self.callers.entry(caller).or_insert_with(|| Caller {
            floor: 1,
            ..Caller::default()
        });
        let kept = state.early.split_off(&next_sequence);
        let given_up = std::mem::replace(&mut state.early, kept);
        state.seen = state.seen.split_off(&next_sequence);
        state.floor = state.floor.max(next_sequence);
        self.unfinished -= given_up.len();
        for call in given_up.into_values() {
            commands.push(OrderCommand::Refuse {
                key: call.key,
                task: call.task,
                reason: RefusalReason::GivenUp,
            });
        }
        self.drop_queued(
            |queued| queued.key.caller == caller && queued.key.sequence < next_sequence,
            RefusalReason::GivenUp,
            commands,
        );
        self.admit_early(caller);
        self.start(commands);
    }

    /// A call arrived.
    pub fn push(&mut self, call: ArrivedCall, commands: &mut Vec<OrderCommand>) {
        let refuse = |reason| OrderCommand::Refuse {
            key: call.key,
            task: call.task,
            reason,
        };
        if call.incarnation != self.incarnation {
            commands.push(refuse(RefusalReason::StaleIncarnation));
            return;
        }
        let caller = self.callers.entry(call.key.caller).or_insert_with(|| Caller {
            floor: 1,
            ..Caller::default()
        });
        if caller.dead {
            commands.push(refuse(RefusalReason::CallerDied));
            return;
        }
        let sequence = call.key.sequence;
        if sequence < caller.floor || caller.seen.contains(&sequence) || caller.early.contains_key(&sequence) {
            let state = if self.place(call.key).is_some() {
                SeenState::Unfinished
            } else {
                SeenState::Finished
            };
            commands.push(OrderCommand::Duplicate {
                key: call.key,
                task: call.task,
                state,
            });
            return;
        }
        if self.exiting {
            commands.push(refuse(RefusalReason::Exiting));
            return;
        }
        self.unfinished += 1;
        if self.out_of_order {
            caller.seen.insert(sequence);
            while caller.seen.remove(&caller.floor) {
                caller.floor += 1;
            }
            self.enqueue(call);
        } else if sequence == caller.floor {
            caller.floor += 1;
            let caller = call.key.caller;
            self.enqueue(call);
            self.admit_early(caller);
        } else {
            caller.early.insert(sequence, call);
            return;
        }
        self.start(commands);
    }

    fn enqueue(&mut self, call: ArrivedCall) {
        let name = if self.groups.contains_key(&call.group) {
            call.group.as_str()
        } else {
            DEFAULT_GROUP
        };
        if let Some(group) = self.groups.get_mut(name) {
            group.queue.push_back(Queued {
                key: call.key,
                task: call.task,
                ready: call.ready,
            });
        }
    }

    /// What waited for a missing sequence that came, or is not waited for any more, joins its group's queue.
    fn admit_early(&mut self, caller: WorkerId) {
        while let Some(state) = self.callers.get_mut(&caller) {
            if !state.seen.remove(&state.floor) {
                let Some(call) = state.early.remove(&state.floor) else {
                    return;
                };
                state.floor += 1;
                self.enqueue(call);
            } else {
                state.floor += 1;
            }
        }
    }

    /// The arguments of a call are here.
    pub fn ready(&mut self, key: CallKey, commands: &mut Vec<OrderCommand>) {
        for group in self.groups.values_mut() {
            if let Some(queued) = group.queue.iter_mut().find(|queued| queued.key == key) {
                queued.ready = true;
            }
        }
        if let Some(call) = self
            .callers
            .get_mut(&key.caller)
            .and_then(|caller| caller.early.get_mut(&key.sequence))
        {
            call.ready = true;
        }
        self.start(commands);
    }

    /// A running call is over. Returns false where it was not running.
    pub fn finished(&mut self, key: CallKey, commands: &mut Vec<OrderCommand>) -> bool {
        let found = self
            .groups
            .values_mut()
            .any(|group| group.running.remove(&key).is_some());
        if found {
            self.unfinished -= 1;
            self.forget_dead(key.caller);
            self.start(commands);
        }
        found
    }

    /// Starts what may start.
    fn start(&mut self, commands: &mut Vec<OrderCommand>) {
        for (name, group) in &mut self.groups {
            let mut held_back: FxHashSet<WorkerId> = FxHashSet::default();
            let mut index = 0;
            while group.running.len() < group.limit && index < group.queue.len() {
                let queued = &group.queue[index];
                if queued.ready && !held_back.contains(&queued.key.caller) {
                    let Some(going) = group.queue.remove(index) else { break };
                    group.running.insert(going.key, going.task);
                    commands.push(OrderCommand::Run {
                        key: going.key,
                        task: going.task,
                        group: name.clone(),
                    });
                } else {
                    if !self.out_of_order {
                        held_back.insert(queued.key.caller);
                    }
                    index += 1;
                }
            }
        }
    }

    fn drop_queued(
        &mut self,
        unwanted: impl Fn(&Queued) -> bool,
        reason: RefusalReason,
        commands: &mut Vec<OrderCommand>,
    ) {
        for group in self.groups.values_mut() {
            let before = group.queue.len();
            group.queue.retain(|queued| {
                let drop = unwanted(queued);
                if drop {
                    commands.push(OrderCommand::Refuse {
                        key: queued.key,
                        task: queued.task,
                        reason,
                    });
                }
                !drop
            });
            self.unfinished -= before - group.queue.len();
        }
    }

    /// Takes a task's calls that have not started out. Returns where the task was found first, if anywhere: one that
    /// runs goes on, and interrupting it is the shell's.
    pub fn cancel(&mut self, task: TaskId, commands: &mut Vec<OrderCommand>) -> Option<CallPlace> {
        let place = self.find(task);
        self.drop_queued(|queued| queued.task == task, RefusalReason::Cancelled, commands);
        let mut cancelled = Vec::new();
        for (id, caller) in &self.callers {
            let early = caller.early.iter().filter(|(_, call)| call.task == task);
            cancelled.extend(early.map(|(sequence, _)| CallKey {
                caller: *id,
                sequence: *sequence,
            }));
        }
        cancelled.sort_unstable();
        for key in cancelled {
            commands.push(OrderCommand::Refuse {
                key,
                task,
                reason: RefusalReason::Cancelled,
            });
            if let Some(caller) = self.callers.get_mut(&key.caller) {
                // Its sequence counts as seen, or its place in the order would be waited for.
                caller.early.remove(&key.sequence);
                caller.seen.insert(key.sequence);
                self.unfinished -= 1;
            }
        }
        self.start(commands);
        place
    }

    /// A caller is dead: what it sent and has not started is dropped; what runs goes on.
    pub fn caller_died(&mut self, caller: WorkerId, commands: &mut Vec<OrderCommand>) {
        if let Some(state) = self.callers.get_mut(&caller) {
            state.dead = true;
            let early = std::mem::take(&mut state.early);
            state.seen.clear();
            self.unfinished -= early.len();
            for call in early.into_values() {
                commands.push(OrderCommand::Refuse {
                    key: call.key,
                    task: call.task,
                    reason: RefusalReason::CallerDied,
                });
            }
        }
        self.drop_queued(
            |queued| queued.key.caller == caller,
            RefusalReason::CallerDied,
            commands,
        );
        self.forget_dead(caller);
        self.start(commands);
    }

    /// A dead caller's numbers are kept only while something of it runs: its process can send nothing more.
    fn forget_dead(&mut self, caller: WorkerId) {
        let runs = self
            .groups
            .values()
            .any(|group| group.running.keys().any(|key| key.caller == caller));
        if !runs && self.callers.get(&caller).is_some_and(|state| state.dead) {
            self.callers.remove(&caller);
        }
    }

    /// The actor leaves: nothing more starts, and whatever waits is refused.
    pub fn exit(&mut self, commands: &mut Vec<OrderCommand>) {
        self.exiting = true;
        for caller in self.callers.values_mut() {
            let early = std::mem::take(&mut caller.early);
            self.unfinished -= early.len();
            for call in early.into_values() {
                commands.push(OrderCommand::Refuse {
                    key: call.key,
                    task: call.task,
                    reason: RefusalReason::Exiting,
                });
            }
        }
        self.drop_queued(|_| true, RefusalReason::Exiting, commands);
    }

    /// Calls that wait or run.
    pub fn unfinished(&self) -> usize {
        self.unfinished
    }

    /// Calls that run.
    pub fn running(&self) -> usize {
        self.groups.values().map(|group| group.running.len()).sum()
    }

    /// Where a push is, unless it is over or unknown.
    pub fn place(&self, key: CallKey) -> Option<CallPlace> {
        for group in self.groups.values() {
            if group.running.contains_key(&key) {
                return Some(CallPlace::Running);
            }
            if let Some(queued) = group.queue.iter().find(|queued| queued.key == key) {
                return Some(if queued.ready {
                    CallPlace::Queued
                } else {
                    CallPlace::WaitsForArguments
                });
            }
        }
        self.callers
            .get(&key.caller)?
            .early
            .get(&key.sequence)
            .map(|_| CallPlace::Early)
    }

    /// Where a task is; running before waiting, where a retry waits beside its first attempt.
    pub fn find(&self, task: TaskId) -> Option<CallPlace> {
        let mut found = None;
        for group in self.groups.values() {
            if group.running.values().any(|running| *running == task) {
                return Some(CallPlace::Running);
            }
            if let Some(queued) = group.queue.iter().find(|queued| queued.task == task) {
                found = Some(if queued.ready {
                    CallPlace::Queued
                } else {
                    CallPlace::WaitsForArguments
                });
            }
        }
        let early = || {
            self.callers
                .values()
                .any(|caller| caller.early.values().any(|call| call.task == task))
        };
        found.or_else(|| early().then_some(CallPlace::Early))
    }

    /// Each group's name, limit, running and waiting calls, for `why` and the state API.
    pub fn groups(&self) -> impl Iterator<Item = (&str, usize, usize, usize)> {
        self.groups
            .iter()
            .map(|(name, group)| (name.as_str(), group.limit, group.running.len(), group.queue.len()))
    }

    /// Every call that has not started, with its place, group by group in the order of the queues.
    pub fn waiting(&self) -> Vec<(CallKey, TaskId, CallPlace)> {
        let mut waiting = Vec::new();
        for group in self.groups.values() {
            for queued in &group.queue {
                let place = if queued.ready {
                    CallPlace::Queued
                } else {
                    CallPlace::WaitsForArguments
                };
                waiting.push((queued.key, queued.task, place));
            }
        }
        let mut early: Vec<_> = self
            .callers
            .values()
            .flat_map(|caller| caller.early.values())
            .map(|call| (call.key, call.task))
            .collect();
        early.sort_unstable();
        waiting.extend(early.into_iter().map(|(key, task)| (key, task, CallPlace::Early)));
        waiting
    }

    /// Checks the invariants.
    pub fn validate(&self) -> Result<(), String> {
        let mut seen: FxHashSet<CallKey> = FxHashSet::default();
        let early = self
            .callers
            .values()
            .flat_map(|caller| caller.early.values())
            .map(|call| call.key);
        let queued = self
            .groups
            .values()
            .flat_map(|group| group.queue.iter())
            .map(|queued| queued.key);
        let running = self.groups.values().flat_map(|group| group.running.keys().copied());
        for key in early.chain(queued).chain(running) {
            if !seen.insert(key) {
                return Err(format!("{key:?} is in two places"));
            }
        }
        if seen.len() != self.unfinished {
            return Err(format!(
                "{} calls are unfinished and {} are counted",
                seen.len(),
                self.unfinished
            ));
        }
        for (name, group) in &self.groups {
            if group.running.len() > group.limit {
                return Err(format!(
                    "{} calls of group {name:?} run, over its limit {}",
                    group.running.len(),
                    group.limit
                ));
            }
            let mut last: FxHashMap<WorkerId, u64> = FxHashMap::default();
            let mut held_back: FxHashSet<WorkerId> = FxHashSet::default();
            for queued in &group.queue {
                let caller = queued.key.caller;
                if !self.out_of_order
                    && last
                        .insert(caller, queued.key.sequence)
                        .is_some_and(|s| s >= queued.key.sequence)
                {
                    return Err(format!("{:?} is queued out of its caller's order", queued.key));
                }
                let startable = queued.ready && (self.out_of_order || !held_back.contains(&caller));
                if startable && group.running.len() < group.limit {
                    return Err(format!("{:?} could run and waits", queued.key));
                }
                held_back.insert(caller);
            }
        }
        for (id, caller) in &self.callers {
            if caller.early.contains_key(&caller.floor) {
                return Err(format!("{id:?}: sequence {} waits for nothing", caller.floor));
            }
        }
        Ok(())
    }
}
