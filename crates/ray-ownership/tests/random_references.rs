//! Processes that pass references to each other at random: messages arrive in any order and borrow messages any number of
//! times, processes die. The ground truth is what the programs hold.
//!
//! Checked after every step: each table's invariants, and that no object is freed which a living program holds or which
//! is on its way to one, unless its chain of counts was broken by a death. At the end, when every program has dropped
//! what it held: that nothing is left.

use std::collections::{BTreeMap, BTreeSet};

use proptest::prelude::*;
use ray_ids::{ActorId, JobId, ObjectId, TaskId, WorkerId};
use ray_ownership::references::Cover;
use ray_ownership::{ReferenceCommand, ReferenceTable};

const PROCESSES: usize = 4;

type Reference = (ObjectId, usize);

#[derive(Debug, Clone)]
enum Message {
    Push {
        task: TaskId,
        references: Vec<Reference>,
    },
    Reply {
        task: TaskId,
        retained: Vec<(ObjectId, WorkerId, u64)>,
        contained: Vec<Reference>,
        holds: bool,
    },
    Add {
        object: ObjectId,
        borrower: WorkerId,
        generation: u64,
    },
    Added {
        object: ObjectId,
        borrower: WorkerId,
        generation: u64,
    },
    Remove {
        object: ObjectId,
        generation: u64,
    },
    Acknowledge {
        task: TaskId,
    },
    Get {
        object: ObjectId,
    },
    Value {
        object: ObjectId,
        contained: Vec<Reference>,
    },
    Died {
        who: usize,
    },
}

struct Running {
    task: TaskId,
    caller: usize,
    variables: Vec<Reference>,
}

struct Process {
    alive: bool,
    table: ReferenceTable<()>,
    variables: Vec<Reference>,
    /// Values of owned objects that are there: what they contain.
    values: BTreeMap<ObjectId, Vec<Reference>>,
    running: Vec<Running>,
    /// Calls under way: task, callee, arguments.
    calls: Vec<(TaskId, usize, Vec<Reference>)>,
    gets: Vec<ObjectId>,
    watches: BTreeSet<usize>,
}

struct World {
    processes: Vec<Process>,
    messages: Vec<(usize, usize, Message)>,
    next: u64,
    tainted: BTreeSet<ObjectId>,
    /// What happened, for whoever reads a failure.
    trace: Vec<String>,
}

fn worker(process: usize) -> WorkerId {
    WorkerId::from_array([process as u8; 28])
}

fn process_of(worker: WorkerId) -> usize {
    worker.as_bytes()[0] as usize
}

impl World {
    fn new() -> Self {
        let process = |index| Process {
            alive: true,
            table: ReferenceTable::new(worker(index)),
            variables: Vec::new(),
            values: BTreeMap::new(),
            running: Vec::new(),
            calls: Vec::new(),
            gets: Vec::new(),
            watches: BTreeSet::new(),
        };
        Self {
            processes: (0..PROCESSES).map(process).collect(),
            messages: Vec::new(),
            next: 1,
            tainted: BTreeSet::new(),
            trace: Vec::new(),
        }
    }

    fn fresh_task(&mut self) -> TaskId {
        self.next += 1;
        TaskId::of(ActorId::nil_in(JobId::from_int(1)), self.next.to_be_bytes())
    }

    fn send(&mut self, from: usize, to: usize, message: Message) {
        if self.processes[to].alive {
            self.messages.push((from, to, message));
        }
    }

    fn act(&mut self, at: usize, act: impl FnOnce(&mut ReferenceTable<()>, &mut Vec<ReferenceCommand>)) {
        let mut commands = Vec::new();
        act(&mut self.processes[at].table, &mut commands);
        if let Err(error) = self.processes[at].table.validate() {
            panic!("process {at}: {error}");
        }
        for command in commands {
            self.trace.push(format!("    [{at}] {command:?}"));
            match command {
                ReferenceCommand::AddBorrower {
                    owner,
                    object,
                    borrower,
                    generation,
                } => {
                    self.send(
                        at,
                        process_of(owner),
                        Message::Add {
                            object,
                            borrower,
                            generation,
                        },
                    );
                }
                ReferenceCommand::RemoveBorrower {
                    owner,
                    object,
                    generation,
                } => {
                    self.send(at, process_of(owner), Message::Remove { object, generation });
                }
                ReferenceCommand::AcknowledgeReturns { worker, task } => {
                    self.send(at, process_of(worker), Message::Acknowledge { task });
                }
                ReferenceCommand::Watch { worker } => {
                    let who = process_of(worker);
                    self.processes[at].watches.insert(who);
                    if !self.processes[who].alive {
                        self.messages.push((who, at, Message::Died { who }));
                    }
                }
                ReferenceCommand::FreeValue { object, .. } => self.freed(at, object),
                ReferenceCommand::OwnerDied { .. } | ReferenceCommand::ReleaseLineage { .. } => {}
            }
        }
    }

    /// The owner let go: nobody may hold the object, or be about to.
    fn freed(&mut self, at: usize, object: ObjectId) {
        let Some(contents) = self.processes[at].values.remove(&object) else {
            return;
        };
        if self.tainted.contains(&object) {
            // Whoever reads it still reads its contents without a cover.
            self.tainted.extend(contents.into_iter().map(|(inner, _)| inner));
            return;
        }
        for (index, process) in self.processes.iter().enumerate().filter(|(_, process)| process.alive) {
            let frames = process.running.iter().flat_map(|running| &running.variables);
            if process.variables.iter().chain(frames).any(|(held, _)| *held == object) {
                panic!(
                    "{}\nprocess {at} freed {object:?}, which process {index} holds",
                    self.trace.join("\n")
                );
            }
        }
        for (_, to, message) in self.messages.iter().filter(|(_, to, _)| self.processes[*to].alive) {
            let under_way = match message {
                Message::Push { references, .. } => references,
                Message::Reply { contained, .. } | Message::Value { contained, .. } => contained,
                _ => continue,
            };
            if under_way.iter().any(|(held, _)| *held == object) {
                panic!(
                    "{}\nprocess {at} freed {object:?}, which is on its way to process {to}",
                    self.trace.join("\n")
                );
            }
        }
    }

    fn pick(&self, at: usize, by: usize) -> Option<Reference> {
        let variables = &self.processes[at].variables;
        (!variables.is_empty()).then(|| variables[by % variables.len()])
    }

    fn put(&mut self, at: usize, by: usize) {
        let object = ObjectId::of(self.fresh_task(), 1);
        let inner: Vec<Reference> = [self.pick(at, by), self.pick(at, by / 7)]
            .into_iter()
            .flatten()
            .collect();
        self.processes[at].table.own(object, ());
        let ids: Vec<ObjectId> = inner.iter().map(|(id, _)| *id).collect();
        self.processes[at].table.contain(object, &ids);
        self.processes[at].values.insert(object, inner);
        self.processes[at].variables.push((object, at));
        self.act(at, |_, _| ());
    }

    fn call(&mut self, at: usize, by: usize) {
        let to = by % PROCESSES;
        if to == at || !self.processes[to].alive {
            return;
        }
        let task = self.fresh_task();
        let references: Vec<Reference> = [self.pick(at, by / 3), self.pick(at, by / 11)]
            .into_iter()
            .flatten()
            .collect();
        for (object, _) in &references {
            self.processes[at].table.add_submitted(object);
        }
        let result = ObjectId::of(task, 1);
        self.processes[at].table.own(result, ());
        self.processes[at].variables.push((result, at));
        self.processes[at].calls.push((task, to, references.clone()));
        self.send(at, to, Message::Push { task, references });
        // The caller hears of the callee's death.
        self.processes[at].watches.insert(to);
        self.act(at, |_, _| ());
    }

    fn finish(&mut self, at: usize, by: usize) {
        if self.processes[at].running.is_empty() {
            return;
        }
        let index = by % self.processes[at].running.len();
        let Running {
            task,
            caller,
            variables,
        } = self.processes[at].running.remove(index);
        let mut contained: Vec<Reference> = Vec::new();
        if by % 3 == 0 {
            contained.extend(variables.first());
        }
        if by % 5 == 0 {
            contained.extend(self.pick(at, by / 5));
        }
        let ids: Vec<ObjectId> = contained.iter().map(|(object, _)| *object).collect();
        if !ids.is_empty() {
            self.act(at, |table, out| table.hold_return(task, worker(caller), &ids, out));
        }
        for (number, reference) in variables.into_iter().enumerate() {
            if (by >> (number + 4)) & 1 == 1 {
                self.processes[at].variables.push(reference);
            } else {
                self.act(at, |table, out| table.remove_local(&reference.0, out));
            }
        }
        let retained = self.processes[at].table.end_of_cover(task);
        self.act(at, |_, _| ());
        let holds = !ids.is_empty();
        self.send(
            at,
            caller,
            Message::Reply {
                task,
                retained,
                contained,
                holds,
            },
        );
    }

    fn get(&mut self, at: usize, by: usize) {
        let Some((object, owner)) = self.pick(at, by) else {
            return;
        };
        if owner == at {
            if let Some(contained) = self.processes[at].values.get(&object).cloned() {
                self.read(at, object, contained);
            }
        } else if self.processes[owner].alive {
            self.processes[at].table.hold(&object);
            self.processes[at].gets.push(object);
            self.processes[at].watches.insert(owner);
            self.send(at, owner, Message::Get { object });
        }
    }

    fn read(&mut self, at: usize, outer: ObjectId, contained: Vec<Reference>) {
        for (object, owner) in contained {
            self.act(at, |table, out| {
                table.borrow(object, worker(owner), Cover::Outer(outer), (), out)
            });
            self.processes[at].variables.push((object, owner));
        }
    }

    fn drop_variable(&mut self, at: usize, by: usize) {
        if self.processes[at].variables.is_empty() {
            return;
        }
        let index = by % self.processes[at].variables.len();
        let (object, _) = self.processes[at].variables.swap_remove(index);
        self.act(at, |table, out| table.remove_local(&object, out));
    }

    fn die(&mut self, at: usize) {
        if !self.processes[at].alive || self.processes.iter().filter(|process| process.alive).count() < 3 {
            return;
        }
        let counted: Vec<ObjectId> = self.processes[at].table.iter().map(|(object, _)| *object).collect();
        self.tainted.extend(counted);
        // What it sent and nobody has read yet still counts as held by it.
        for (from, to, message) in &self.messages {
            if let Message::Push { references, .. } = message {
                if *from == at || *to == at {
                    self.tainted.extend(references.iter().map(|(object, _)| *object));
                }
            }
        }
        self.trace.push(format!("{at} dies"));
        self.processes[at].alive = false;
        self.messages.retain(|(_, to, _)| *to != at);
        for other in 0..PROCESSES {
            if self.processes[other].watches.contains(&at) {
                self.messages.push((at, other, Message::Died { who: at }));
            }
        }
    }

    fn deliver(&mut self, by: usize, duplicate: bool) {
        if self.messages.is_empty() {
            return;
        }
        let index = by % self.messages.len();
        let (from, to, message) = self.messages[index].clone();
        let idempotent = matches!(
            message,
            Message::Add { .. } | Message::Added { .. } | Message::Remove { .. } | Message::Acknowledge { .. }
        );
        // Word of a death comes after everything that the dead one sent.
        if matches!(message, Message::Died { .. }) {
            if let Some(before) = self
                .messages
                .iter()
                .position(|(f, t, m)| *f == from && *t == to && !matches!(m, Message::Died { .. }))
            {
                return self.deliver(before, duplicate);
            }
        }
        if !(duplicate && idempotent) {
            self.messages.remove(index);
        }
        self.handle(from, to, message);
    }

    fn handle(&mut self, from: usize, to: usize, message: Message) {
        self.trace.push(format!("{from} -> {to}: {message:?}"));
        match message {
            Message::Push { task, references } => {
                for (object, owner) in &references {
                    let owner = worker(*owner);
                    self.act(to, |table, out| {
                        table.borrow(*object, owner, Cover::Task(task), (), out)
                    });
                }
                self.processes[to].running.push(Running {
                    task,
                    caller: from,
                    variables: references,
                });
            }
            Message::Reply {
                task,
                retained,
                contained,
                holds,
            } => {
                let Some(index) = self.processes[to].calls.iter().position(|(called, ..)| *called == task) else {
                    return;
                };
                let (_, _, arguments) = self.processes[to].calls.remove(index);
                let executor = worker(from);
                for (object, _, generation) in retained {
                    self.act(to, |table, out| table.relay_borrow(object, executor, generation, out));
                }
                let result = ObjectId::of(task, 1);
                let cover = Cover::Return { task, worker: executor };
                for (object, owner) in &contained {
                    self.act(to, |table, out| table.borrow(*object, worker(*owner), cover, (), out));
                }
                if self.processes[to].table.get(&result).is_some() {
                    let ids: Vec<ObjectId> = contained.iter().map(|(object, _)| *object).collect();
                    self.processes[to].table.contain(result, &ids);
                    self.processes[to].values.insert(result, contained.clone());
                }
                for (object, _) in contained {
                    self.act(to, |table, out| table.remove_local(&object, out));
                }
                if holds {
                    self.act(to, |table, out| table.returns_read(task, executor, out));
                }
                for (object, _) in arguments {
                    self.act(to, |table, out| table.remove_submitted(&object, out));
                }
            }
            Message::Add {
                object,
                borrower,
                generation,
            } => {
                self.act(to, |table, out| {
                    table.add_borrower(object, borrower, generation, out);
                });
                self.send(
                    to,
                    from,
                    Message::Added {
                        object,
                        borrower,
                        generation,
                    },
                );
            }
            Message::Added {
                object,
                borrower,
                generation,
            } => {
                self.act(to, |table, out| table.borrower_added(object, borrower, generation, out));
            }
            Message::Remove { object, generation } => {
                self.act(to, |table, out| {
                    table.remove_borrower(object, worker(from), generation, out)
                });
            }
            Message::Acknowledge { task } => self.act(to, |table, out| table.returns_acknowledged(task, out)),
            Message::Get { object } => {
                let contained = self.processes[to].values.get(&object).cloned().unwrap_or_default();
                self.send(to, from, Message::Value { object, contained });
            }
            Message::Value { object, contained } => {
                if let Some(index) = self.processes[to].gets.iter().position(|got| *got == object) {
                    self.processes[to].gets.remove(index);
                    self.read(to, object, contained);
                    self.act(to, |table, out| table.release_hold(object, out));
                }
            }
            Message::Died { who } => {
                self.processes[to].watches.remove(&who);
                self.act(to, |table, out| table.worker_died(worker(who), out));
                let lost: Vec<_> = self.processes[to]
                    .calls
                    .iter()
                    .filter(|(_, callee, _)| *callee == who)
                    .cloned()
                    .collect();
                self.processes[to].calls.retain(|(_, callee, _)| *callee != who);
                for (_, _, arguments) in lost {
                    for (object, _) in arguments {
                        self.act(to, |table, out| table.remove_submitted(&object, out));
                    }
                }
                // Gets from the dead are answered by nobody.
                let gets = std::mem::take(&mut self.processes[to].gets);
                for object in gets {
                    let entry = self.processes[to].table.get(&object);
                    if entry.is_some_and(|entry| entry.borrowed_owner() == Some(worker(who))) {
                        self.act(to, |table, out| table.release_hold(object, out));
                    } else {
                        self.processes[to].gets.push(object);
                    }
                }
            }
        }
    }

    fn step(&mut self, kind: u8, by: usize) {
        let at = by % PROCESSES;
        if !self.processes[at].alive && kind < 24 {
            return;
        }
        match kind {
            0..=2 => self.put(at, by / PROCESSES),
            3..=7 => self.call(at, by / PROCESSES),
            8..=11 => self.finish(at, by / PROCESSES),
            12..=15 => self.get(at, by / PROCESSES),
            16..=22 => self.drop_variable(at, by / PROCESSES),
            23 => {
                if by % 3 == 0 {
                    self.die(at);
                }
            }
            24..=27 => self.deliver(by, true),
            _ => self.deliver(by, false),
        }
    }

    /// Every program ends and drops what it has; then nothing may be left.
    fn end(&mut self) {
        while !self.messages.is_empty() || self.processes.iter().any(|p| p.alive && !p.running.is_empty()) {
            self.deliver(0, false);
            for at in 0..PROCESSES {
                if self.processes[at].alive {
                    self.finish(at, 0);
                }
            }
        }
        for at in 0..PROCESSES {
            while self.processes[at].alive && !self.processes[at].variables.is_empty() {
                self.drop_variable(at, 0);
            }
        }
        while !self.messages.is_empty() {
            self.deliver(0, false);
        }
        let cyclic = self.kept_by_cycles();
        for (index, process) in self.processes.iter().enumerate().filter(|(_, process)| process.alive) {
            if cyclic.is_empty() {
                assert!(process.table.is_quiet(), "process {index} keeps {:#?}", process.table);
                assert!(
                    process.values.is_empty(),
                    "process {index} has values that nobody counts on"
                );
            }
            if let Some((object, entry)) = process.table.iter().find(|(object, _)| !cyclic.contains(object)) {
                panic!(
                    "{}\nprocess {index} keeps {object:?}: {entry:#?}",
                    self.trace.join("\n")
                );
            }
        }
    }

    /// Counts cannot free an object that contains itself (an actor may put a call's own result into what the call
    /// returns), nor what such an object contains.
    fn kept_by_cycles(&self) -> BTreeSet<ObjectId> {
        let inside = |object: &ObjectId| -> Vec<ObjectId> {
            let values = self
                .processes
                .iter()
                .filter(|p| p.alive)
                .filter_map(|process| process.values.get(object));
            values.flatten().map(|(inner, _)| *inner).collect()
        };
        let reachable = |from: ObjectId| {
            let (mut seen, mut next) = (BTreeSet::new(), vec![from]);
            while let Some(object) = next.pop() {
                next.extend(inside(&object).into_iter().filter(|inner| seen.insert(*inner)));
            }
            seen
        };
        let mut kept = BTreeSet::new();
        for object in self.processes.iter().flat_map(|process| process.values.keys()) {
            let below = reachable(*object);
            if below.contains(object) {
                kept.extend(below);
            }
        }
        kept
    }
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]
    #[test]
    fn nothing_is_freed_too_early_and_nothing_is_left(steps in prop::collection::vec((0u8..40, any::<u32>()), 1..500)) {
        let mut world = World::new();
        for (kind, by) in steps {
            world.step(kind, by as usize);
        }
        world.end();
    }
}
