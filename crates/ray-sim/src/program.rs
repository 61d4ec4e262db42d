//! The programs that run in the simulation: owns their operations and how they are made up from a seed.
//!
//! A script is a list of operations on the references that its frame holds. It refuses to make programs that wait for
//! themselves: an actor's methods wait for nothing, and what comes out of an actor's keeping is not waited for.

use std::rc::Rc;

use crate::random::Random;

/// One operation. A number picks one of the references that the frame holds at that moment.
#[derive(Debug)]
pub enum Operation {
    /// Computes for so many microseconds.
    Work(u64),
    /// Puts an object that contains the picked references.
    Put(Vec<usize>),
    /// Calls a function.
    Call {
        script: Rc<Script>,
        by_value: Vec<usize>,
        by_reference: Vec<usize>,
        cpus: u32,
        retries: i32,
        stored: bool,
    },
    /// Makes an actor.
    CreateActor {
        script: Rc<Script>,
        by_value: Vec<usize>,
        max_restarts: i32,
        max_concurrency: usize,
    },
    /// Calls a method of a picked actor.
    CallActor {
        pick: usize,
        script: Rc<Script>,
        by_value: Vec<usize>,
        by_reference: Vec<usize>,
        retries: i32,
    },
    /// Waits for a picked object and takes the references that it contains.
    Get(usize),
    /// Drops a picked reference.
    Drop(usize),
    /// In an actor: keeps a picked reference in the actor's state.
    Keep(usize),
    /// In an actor: takes a copy of a kept reference.
    TakeKept(usize),
    /// In an actor: drops a kept reference.
    DropKept(usize),
}

/// A function's body.
pub struct Script {
    pub operations: Vec<Operation>,
    /// Picks of what the result contains.
    pub returns: Vec<usize>,
}

impl std::fmt::Debug for Script {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Script({} operations)", self.operations.len())
    }
}

/// What a program is made up from.
#[derive(Debug)]
pub struct Generator<'a> {
    pub random: &'a mut Random,
    /// Calls that may still be made up.
    pub budget: usize,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Where {
    Driver,
    Task,
    Actor,
}

impl Generator<'_> {
    /// A driver's program.
    pub fn driver(&mut self) -> Rc<Script> {
        let length = self.random.between(10, 120) as usize;
        self.script(Where::Driver, length, 4)
    }

    fn picks(&mut self, most: usize) -> Vec<usize> {
        (0..self.random.below(most + 1))
            .map(|_| self.random.below(1 << 20))
            .collect()
    }

    fn script(&mut self, place: Where, length: usize, depth: usize) -> Rc<Script> {
        let operations = (0..length).map(|_| self.operation(place, depth)).collect();
        let returns = if place == Where::Driver {
            Vec::new()
        } else {
            self.picks(2)
        };
        Rc::new(Script { operations, returns })
    }

    fn child(&mut self, place: Where, depth: usize) -> Rc<Script> {
        let length = self.random.between(0, 8) as usize;
        self.script(place, length, depth.saturating_sub(1))
    }

    fn operation(&mut self, place: Where, depth: usize) -> Operation {
        let calls = depth > 0 && self.budget > 0;
        loop {
            let kind = self.random.below(100);
            let pick = self.random.below(1 << 20);
            return match kind {
                0..=11 => Operation::Work(self.random.between(100, 40_000)),
                12..=25 => Operation::Put(self.picks(3)),
                26..=47 if calls => {
                    self.budget -= 1;
                    Operation::Call {
                        script: self.child(Where::Task, depth),
                        by_value: self.picks(2),
                        by_reference: if self.random.chance(40) {
                            self.picks(1)
                        } else {
                            Vec::new()
                        },
                        cpus: if self.random.chance(15) { 2 } else { 1 },
                        retries: [0, 1, 2, 3, -1][self.random.below(5)],
                        stored: self.random.chance(40),
                    }
                }
                48..=53 if calls && place != Where::Actor => {
                    self.budget -= 1;
                    Operation::CreateActor {
                        script: self.child(Where::Actor, depth),
                        by_value: self.picks(2),
                        max_restarts: [0, 0, 1, 2, -1][self.random.below(5)],
                        max_concurrency: [1, 1, 1, 3][self.random.below(4)],
                    }
                }
                54..=69 if calls && place != Where::Actor => {
                    self.budget -= 1;
                    Operation::CallActor {
                        pick,
                        script: self.child(Where::Actor, depth),
                        by_value: self.picks(2),
                        by_reference: if self.random.chance(30) {
                            self.picks(1)
                        } else {
                            Vec::new()
                        },
                        retries: [0, 0, 1, -1][self.random.below(4)],
                    }
                }
                70..=81 if place != Where::Actor => Operation::Get(pick),
                82..=91 => Operation::Drop(pick),
                92..=95 if place == Where::Actor => Operation::Keep(pick),
                96..=97 if place == Where::Actor => Operation::TakeKept(pick),
                98..=99 if place == Where::Actor => Operation::DropKept(pick),
                _ => continue,
            };
        }
    }
}
