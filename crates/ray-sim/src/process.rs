//! A driver or worker: owns what it counts, what it asked for, and what it runs.
//!
//! `owner` carries out what the reference table, the leases and the actors' calls decide; `executor` runs programs.
//!
//! Invariant: 1. After every change of a machine its `validate` holds.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::rc::Rc;

use ray_ids::{ActorId, JobId, LeaseId, NodeId, ObjectId, TaskId, WorkerId};
use ray_ownership::actor_calls::ActorCalls;
use ray_ownership::actor_order::{ActorOrder, CallKey};
use ray_ownership::leases::{LeaseClient, RequestId};
use ray_ownership::lineage::Lineage;
use ray_ownership::session::Session;
use ray_ownership::ReferenceTable;

use crate::model::{Call, Message, Push, Reference, Value};
use crate::program::Script;

/// The table's slot: what is known of a value.
#[derive(Debug, Clone, Default)]
pub struct Slot {
    pub value: Option<Value>,
    /// The owner was asked.
    pub asked: bool,
    /// A copy is being fetched.
    pub fetching: bool,
    /// Borrowers that asked and wait.
    pub remote: Vec<WorkerId>,
}

/// A call that is not over.
#[derive(Debug)]
pub struct Task {
    pub call: Rc<Call>,
    pub attempt: u32,
    pub retries_left: i32,
    pub unresolved: BTreeSet<ObjectId>,
    /// Handed to the leases or the actor's calls.
    pub submitted: bool,
    /// Whether an attempt of it was pushed (an actor's call that is pushed again is a further attempt).
    pub pushed: bool,
}

/// An actor, as one caller sees it.
#[derive(Debug)]
pub struct ActorEntry {
    pub calls: ActorCalls,
    pub worker: Option<WorkerId>,
    pub incarnation: u64,
    /// The owner's: the creation, whose arguments it counts until the actor is dead.
    pub creation: Option<Rc<Call>>,
    pub max_restarts: i32,
    pub registered: bool,
}

/// What a frame waits for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Waiting {
    No,
    Time,
    /// The value of an argument.
    Argument(usize),
    /// A `get`.
    Get(Reference),
}

/// A program's frame.
#[derive(Debug)]
pub struct Frame {
    pub script: Rc<Script>,
    pub next: usize,
    pub variables: Vec<Reference>,
    /// Top-level arguments, counted until the end.
    pub arguments: Vec<Reference>,
    pub waiting: Waiting,
    /// The call; none for a driver's program.
    pub push: Option<Push>,
    pub blocked: bool,
}

/// Who is told when a value is known.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Waiter {
    Frame(u64),
    Task(TaskId),
}

/// A process.
#[derive(Debug)]
pub struct Process {
    pub(crate) id: WorkerId,
    pub(crate) node: NodeId,
    pub(crate) job: Option<JobId>,
    pub(crate) is_driver: bool,
    pub(crate) table: ReferenceTable<Slot>,
    pub(crate) lineage: Lineage,
    pub(crate) retained: BTreeMap<TaskId, (Rc<Call>, u32)>,
    pub(crate) leases: LeaseClient,
    pub(crate) lease_nodes: BTreeMap<LeaseId, NodeId>,
    pub(crate) requests: BTreeMap<u64, (RequestId, NodeId)>,
    pub(crate) next_correlation: u64,
    pub(crate) tick_at: Option<u64>,
    pub(crate) tasks: BTreeMap<TaskId, Task>,
    pub(crate) actors: BTreeMap<ActorId, ActorEntry>,
    pub(crate) waiters: BTreeMap<ObjectId, Vec<Waiter>>,
    pub(crate) sessions: BTreeMap<WorkerId, Session<Message>>,
    pub(crate) dead_workers: BTreeSet<WorkerId>,
    pub(crate) dead_nodes: BTreeSet<NodeId>,
    // What it runs.
    pub(crate) lease: Option<LeaseId>,
    pub(crate) past_leases: BTreeSet<LeaseId>,
    pub(crate) early: Vec<Push>,
    pub(crate) queue: VecDeque<Push>,
    pub(crate) frames: BTreeMap<u64, Frame>,
    pub(crate) next_frame: u64,
    pub(crate) started_sequence: u64,
    pub(crate) order: Option<ActorOrder>,
    pub(crate) actor: Option<(ActorId, u64)>,
    pub(crate) arrived: BTreeMap<CallKey, Push>,
    pub(crate) kept: Vec<Reference>,
    pub(crate) exiting: bool,
    pub(crate) program_over: bool,
}

impl Process {
    pub(crate) fn new(id: WorkerId, node: NodeId, is_driver: bool) -> Self {
        Self {
            id,
            node,
            job: None,
            is_driver,
            table: ReferenceTable::new(id),
            lineage: Lineage::new(1_000),
            retained: BTreeMap::new(),
            leases: LeaseClient::new(),
            lease_nodes: BTreeMap::new(),
            requests: BTreeMap::new(),
            next_correlation: 1,
            tick_at: None,
            tasks: BTreeMap::new(),
            actors: BTreeMap::new(),
            waiters: BTreeMap::new(),
            sessions: BTreeMap::new(),
            dead_workers: BTreeSet::new(),
            dead_nodes: BTreeSet::new(),
            lease: None,
            past_leases: BTreeSet::new(),
            early: Vec::new(),
            queue: VecDeque::new(),
            frames: BTreeMap::new(),
            next_frame: 1,
            started_sequence: 0,
            order: None,
            actor: None,
            arrived: BTreeMap::new(),
            kept: Vec::new(),
            exiting: false,
            program_over: false,
        }
    }

    /// Calls that arrived and did not start.
    pub(crate) fn unstarted_pushes(&self) -> impl Iterator<Item = &Push> {
        self.early.iter().chain(&self.queue).chain(self.arrived.values())
    }

    /// What is left that should not be, if anything.
    pub(crate) fn leftover(&self) -> Option<String> {
        if !self.frames.is_empty() {
            let frames: Vec<_> = self.frames.values().map(|frame| (frame.waiting, frame.next)).collect();
            return Some(format!("frames: {frames:?}"));
        }
        if let Some((task, state)) = self.tasks.iter().next() {
            let (call, unresolved, submitted) = (&state.call.kind, &state.unresolved, state.submitted);
            return Some(format!(
                "call {task} ({call:?}, waits for {unresolved:?}, submitted {submitted}) is not over"
            ));
        }
        if !self.queue.is_empty() || !self.early.is_empty() || !self.arrived.is_empty() {
            return Some("calls that have not started".into());
        }
        if !self.table.is_quiet() {
            let counts: Vec<_> = self
                .table
                .iter()
                .map(|(object, entry)| (*object, entry.counts(), entry.is_owned()))
                .collect();
            return Some(format!(
                "counts (local, submitted, contained, holds, borrowers): {counts:?}, or holds in {:?}",
                self.table
            ));
        }
        if !self.leases.is_quiet() {
            return Some(format!("leases: {:?}", self.leases));
        }
        if let Some((actor, entry)) = self.actors.iter().find(|(_, entry)| entry.calls.pending() > 0) {
            return Some(format!("calls of actor {actor}: {:?}", entry.calls));
        }
        if self.order.as_ref().is_some_and(|order| order.unfinished() > 0) {
            return Some(format!("an actor's calls: {:?}", self.order));
        }
        if self.lineage.bytes() > 0 {
            return Some("lineage".into());
        }
        None
    }
}
