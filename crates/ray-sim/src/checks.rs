//! What must hold: owns the ground truth's rules at each step and at the end, and the faults.
//!
//! Rules:
//! 1. No object is freed by its owner while a living program holds a reference to it, or before one that is under way
//!    arrives, unless a death broke the chain of counts.
//! 2. No attempt of a call is started twice, and no attempt beyond those that its retries allow.
//! 3. A lease has one owner. An actor runs no more calls at once than it may, each caller's in order.
//! 4. When every program is over: no call is unfinished; nothing is counted, held, leased, reserved or stored.

use std::collections::BTreeSet;

use ray_ids::{NodeId, ObjectId, TaskId, WorkerId};

use crate::model::{CallKind, Place, Push, Reference};
use crate::world::{Ambush, Event, World, MS};

/// How long after the last program's end everything must be gone.
const CLEAN_WITHIN: u64 = 60_000 * MS;

impl World {
    /// The owner lets go of an object.
    pub(crate) fn check_free(&mut self, owner: WorkerId, object: ObjectId) {
        let contents = self.truth.contents.get(&object).cloned().unwrap_or_default();
        if self.truth.tainted.contains(&object) {
            // Whoever still reads it reads its contents without a cover.
            self.truth.tainted.extend(contents);
            return;
        }
        self.truth.freed.insert(object);
        let mut holder = None;
        for process in self.processes.values() {
            let frames = process
                .frames
                .values()
                .flat_map(|frame| frame.variables.iter().chain(&frame.arguments));
            if frames.chain(&process.kept).any(|reference| reference.object == object) {
                holder = Some(process.id);
            }
        }
        if let Some(holder) = holder {
            self.fail(format!("{owner} freed {object}, which a program in {holder} holds"));
        }
    }

    /// A reference arrives: its object must be there still.
    pub(crate) fn check_arrival(&mut self, process: WorkerId, reference: &Reference) {
        let object = reference.object;
        if self.truth.freed.contains(&object) && !self.truth.tainted.contains(&object) {
            self.fail(format!(
                "{object} was freed before a reference to it arrived in {process}"
            ));
        }
    }

    /// User code of a call starts.
    pub(crate) fn check_start(&mut self, worker: WorkerId, push: &Push) {
        let task = push.call.task;
        let starts = self.truth.started.entry((task, push.attempt)).or_default();
        *starts += 1;
        if *starts > 1 {
            let attempt = push.attempt;
            return self.fail(format!(
                "attempt {attempt} of {task} was started twice, the second time in {worker}"
            ));
        }
        let is_constructor = matches!(push.call.kind, CallKind::Constructor { .. });
        if !is_constructor && push.call.retries >= 0 && i64::from(push.attempt) > i64::from(push.call.retries) {
            self.fail(format!(
                "{task} was started for the {}th time with {} retries",
                push.attempt + 1,
                push.call.retries
            ));
        }
        if let CallKind::Plain { .. } = push.call.kind {
            let granted_to = self.truth.leases.get(&push.lease).copied();
            if granted_to.is_some_and(|owner| owner != push.caller) {
                self.fail(format!(
                    "{worker} runs a call of {} under a lease of {granted_to:?}",
                    push.caller
                ));
            }
            let present = self.processes.get(&worker).and_then(|process| process.lease);
            if present != Some(push.lease) {
                self.fail(format!(
                    "{worker} starts {task} under lease {} and its lease is {present:?}",
                    push.lease
                ));
            }
        }
        if let CallKind::Method { actor, .. } = push.call.kind {
            let Some(process) = self.processes.get(&worker) else {
                return;
            };
            if process.actor != Some((actor, push.incarnation)) {
                let is = process.actor;
                return self.fail(format!("{task} for {actor} ({}) runs in {is:?}", push.incarnation));
            }
            let creation = self.calls.get(&TaskId::for_actor_creation(actor)).cloned();
            let limit = match creation.map(|call| call.kind.clone()) {
                Some(CallKind::Constructor { max_concurrency, .. }) => max_concurrency,
                _ => 1,
            };
            if process.frames.len() >= limit {
                self.fail(format!(
                    "actor {actor} runs {} calls and may run {limit}",
                    process.frames.len() + 1
                ));
            }
        }
    }

    /// A worker's lease changes: nothing may run under the old one.
    pub(crate) fn check_assignment(&mut self, worker: WorkerId) {
        let runs = self
            .processes
            .get(&worker)
            .is_some_and(|process| !process.frames.is_empty());
        if runs {
            self.fail(format!("the lease of {worker} changes while a call runs under it"));
        }
    }

    /// A method starts: after every earlier one of its caller.
    pub(crate) fn check_order(&mut self, worker: WorkerId, push: &Push) {
        let last = self.truth.sequences.entry((worker, push.caller)).or_default();
        if push.sequence <= *last {
            let last = *last;
            return self.fail(format!(
                "{worker} starts call {} of {} after {last}",
                push.sequence, push.caller
            ));
        }
        *last = push.sequence;
    }

    /// Looks whether all is over and clean. True at the end.
    pub(crate) fn check_progress(&mut self) -> bool {
        let over = self.drivers_to_start == 0
            && self
                .drivers
                .iter()
                .all(|driver| self.processes.get(driver).is_none_or(|process| process.program_over));
        let calm = over && self.faults_left == 0;
        if !calm {
            if self.deadline_passed() {
                self.fail(format!("the programs are not over: {}", self.what_is_left()));
            }
        } else {
            let since = *self.calm_since.get_or_insert(self.now);
            if self.now > since + 1_000 * MS {
                self.actors_forget();
            }
            let left = self.what_is_left();
            if left.is_empty() {
                if self.jobs_ended {
                    return true;
                }
                self.jobs_ended = true;
                self.calm_since = None;
                for driver in self.drivers.clone() {
                    self.driver_leaves(driver);
                }
            } else if self.now > since + CLEAN_WITHIN {
                if self.has_cycle() {
                    self.truth.cyclic += 1;
                    return true;
                }
                self.fail(format!("left behind: {left}"));
            }
        }
        self.at(50 * MS, Event::Check);
        false
    }

    /// Programs are over when their actors' states are gone too: actors that keep each other's handles would live for
    /// ever.
    fn actors_forget(&mut self) {
        let actors: Vec<WorkerId> = self
            .processes
            .values()
            .filter(|process| !process.kept.is_empty())
            .map(|process| process.id)
            .collect();
        for id in actors {
            let kept = self
                .processes
                .get_mut(&id)
                .map(|process| std::mem::take(&mut process.kept))
                .unwrap_or_default();
            for reference in kept {
                self.refs(id, |table, out| table.remove_local(&reference.object, out));
            }
        }
    }

    /// Counts free no object that contains itself: an actor may put a call's own result into what the call returns, and
    /// an actor's arguments, counted until it is dead, may contain its handle by way of a result. Such programs are told
    /// apart by what contains what.
    fn has_cycle(&self) -> bool {
        let inside = |object: &ObjectId| {
            let mut inner = self.truth.contents.get(object).cloned().unwrap_or_default();
            let task = object.task_id();
            if task.has_actor() && task == TaskId::for_actor_creation(task.actor_id()) {
                inner.extend(self.calls.get(&task).map(|call| call.counted()).unwrap_or_default());
            }
            inner
        };
        let reaches = |from: &ObjectId| {
            let (mut seen, mut next) = (BTreeSet::new(), vec![*from]);
            while let Some(object) = next.pop() {
                next.extend(inside(&object).into_iter().filter(|inner| seen.insert(*inner)));
            }
            seen.contains(from)
        };
        let all: BTreeSet<ObjectId> = self
            .processes
            .values()
            .flat_map(|process| process.table.iter().map(|(object, _)| *object))
            .collect();
        all.iter().any(reaches)
    }

    /// What is not over or not gone, in words; empty at the end.
    pub(crate) fn what_is_left(&self) -> String {
        let mut left = Vec::new();
        for (id, process) in &self.processes {
            if let Some(leftover) = process.leftover() {
                left.push(format!("in {id} on {}: {leftover}", process.node));
            } else if process.actor.is_some() {
                left.push(format!("{id} is an actor still"));
            } else if self.jobs_ended && process.job.is_some() {
                left.push(format!("{id} lives on after its job"));
            }
        }
        for (node, raylet) in &self.raylets {
            if let Some(leftover) = raylet.leftover() {
                left.push(format!("on {node}: {leftover}"));
            }
        }
        if !self.is_alive(Place::Gcs) {
            left.push("the control plane is not up again".into());
        }
        left.join("; ")
    }

    // --- faults ---

    pub(crate) fn fault(&mut self) {
        if self.faults_left == 0 {
            return;
        }
        self.faults_left -= 1;
        match self.random.below(100) {
            0..=19 => self.kill_some_worker(),
            20..=24 => self.ambushes.extend([Ambush::Reply; 4]),
            25..=29 => {
                self.ambushes.push(Ambush::Notice);
                self.kill_some_worker();
            }
            30..=34 => self.lose_some_copies(),
            35..=44 => self.kill_some_node(),
            45..=56 => self.kill_gcs(),
            57..=62 => self.break_some_gcs_link(),
            63..=68 => {
                // A death that is told while a link breaks.
                self.kill_some_worker();
                let delay = self.random.between(1, 30) * MS;
                self.at(delay, Event::BreakGcsLink);
            }
            69..=72 => self.kill_some_driver(),
            _ => {
                for _ in 0..3 {
                    self.break_some_link();
                }
            }
        }
        if self.faults_left > 0 {
            let delay = self.random.between(1, 150) * MS;
            self.at(delay, Event::Fault);
        }
    }

    fn kill_some_worker(&mut self) {
        let busy: Vec<WorkerId> = self
            .processes
            .values()
            .filter(|process| !process.is_driver && (!process.frames.is_empty() || process.actor.is_some()))
            .map(|process| process.id)
            .collect();
        let any: Vec<WorkerId> = self
            .processes
            .values()
            .filter(|process| !process.is_driver)
            .map(|process| process.id)
            .collect();
        let from = if busy.is_empty() || self.random.chance(20) {
            any
        } else {
            busy
        };
        if !from.is_empty() {
            let worker = from[self.random.below(from.len())];
            self.kill_process(worker);
        }
    }

    fn kill_some_driver(&mut self) {
        let living: Vec<WorkerId> = self
            .drivers
            .iter()
            .filter(|driver| self.processes.contains_key(driver))
            .copied()
            .collect();
        if living.len() > 1 {
            let driver = living[self.random.below(living.len())];
            self.kill_process(driver);
        }
    }

    fn kill_some_node(&mut self) {
        let others: Vec<NodeId> = self
            .raylets
            .keys()
            .filter(|node| **node != self.head)
            .copied()
            .collect();
        if !others.is_empty() {
            let node = others[self.random.below(others.len())];
            self.kill_node(node);
            let delay = self.random.between(10, 2_000) * MS;
            self.at(delay, Event::NodeJoins);
        }
    }

    /// Copies are gone from a node's store: evicted, or their file is.
    fn lose_some_copies(&mut self) {
        for raylet in self.raylets.values_mut() {
            let lost = raylet.store.keys().next().copied();
            lost.map(|object| raylet.store.remove(&object));
        }
    }

    pub(crate) fn break_some_gcs_link(&mut self) {
        let nodes: Vec<NodeId> = self.raylets.keys().copied().collect();
        if nodes.is_empty() {
            return self.fail("no node is left, not even the head");
        }
        let node = nodes[self.random.below(nodes.len())];
        self.break_gcs_link(node);
    }

    fn break_some_link(&mut self) {
        let mut pairs = Vec::new();
        for process in self.processes.values() {
            for other in process.sessions.keys() {
                let apart = self
                    .processes
                    .get(other)
                    .is_some_and(|other| other.node != process.node);
                if apart && process.id < *other {
                    pairs.push((process.id, *other));
                }
            }
        }
        if !pairs.is_empty() {
            let (a, b) = pairs[self.random.below(pairs.len())];
            self.break_link(a, b);
        }
    }
}
