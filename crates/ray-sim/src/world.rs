//! Virtual time, links and faults: owns the queue of events, who is alive, and the ground truth that the checks read.
//!
//! A link delivers in order, each frame after a delay of its own. Links between processes of different nodes break and
//! come back: what was under way is lost, and `Session` sends it again. Links between a raylet and the control plane break
//! too, and the control plane is killed and restarted from what it had made durable.
//!
//! Invariants:
//! 1. The same seed and mutation give the same run.
//! 2. A dead place handles nothing and sends nothing more; what it sent before may still arrive.

use std::cmp::Reverse;
use std::collections::{BTreeMap, BTreeSet, BinaryHeap, VecDeque};
use std::rc::Rc;

use ray_ids::{LeaseId, NodeId, ObjectId, TaskId, WorkerId};

use crate::control::ControlPlane;
use crate::model::{Call, Message, Place};
use crate::mutation::Mutation;
use crate::node::Raylet;
use crate::process::Process;
use crate::random::Random;

/// Microseconds of virtual time.
pub type Time = u64;

/// One millisecond.
pub const MS: Time = 1_000;

/// A run's parameters.
#[derive(Debug, Clone, Copy)]
pub struct Config {
    pub seed: u64,
    pub mutation: Option<Mutation>,
    /// Whether every delivery is noted, for the report of a failure.
    pub trace: bool,
}

/// A fault that waits for its moment.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Ambush {
    /// A worker dies right after it sent a reply, which arrives late.
    Reply,
    /// A link of the control plane breaks with a notice of a death under way.
    Notice,
}

/// What travels on a link between two processes.
#[derive(Debug, Clone)]
pub(crate) enum Frame {
    Plain(Message),
    InSession(Message),
    Acknowledge(u64),
}

// The queue holds each event once, by number, so that its size matters little.
#[allow(clippy::large_enum_variant)]
#[derive(Debug)]
pub(crate) enum Event {
    Deliver {
        from: Place,
        to: Place,
        epoch: u64,
        frame: Frame,
    },
    FrameWake {
        worker: WorkerId,
        frame: u64,
    },
    ProcessTick(WorkerId),
    RayletTick(NodeId),
    RayletReport(NodeId),
    WorkerStarted {
        node: NodeId,
        worker: WorkerId,
    },
    WorkerEnded {
        node: NodeId,
        worker: WorkerId,
    },
    ConnectGcs(NodeId),
    GcsTick,
    GcsLinkDown {
        node: NodeId,
        epoch: u64,
    },
    GcsRestart,
    KillProcess(WorkerId),
    BreakGcsLink,
    LinkRestored {
        a: WorkerId,
        b: WorkerId,
    },
    Fault,
    NodeJoins,
    StartDriver(NodeId),
    Check,
}

#[derive(Debug, Default)]
struct Link {
    last: Time,
    epoch: u64,
}

/// What the checks know and no process does.
#[derive(Debug, Default)]
pub(crate) struct Truth {
    /// How often each attempt of a task was started.
    pub started: BTreeMap<(TaskId, u32), u32>,
    /// The owner that each lease was granted to.
    pub leases: BTreeMap<LeaseId, WorkerId>,
    /// Objects whose chain of counts was broken by a death.
    pub tainted: BTreeSet<ObjectId>,
    pub owners: BTreeMap<ObjectId, WorkerId>,
    pub contents: BTreeMap<ObjectId, Vec<ObjectId>>,
    /// Freed by their owners, with no chain broken.
    pub freed: BTreeSet<ObjectId>,
    /// The sequence that each actor's worker started last, by caller.
    pub sequences: BTreeMap<(WorkerId, WorkerId), u64>,
    pub finished: BTreeMap<TaskId, bool>,
    pub submitted: u64,
    pub deaths: u64,
    pub breaks: u64,
    pub cyclic: u64,
}

/// A run's result in numbers.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Summary {
    pub events: u64,
    pub calls: u64,
    pub deaths: u64,
    pub link_breaks: u64,
    /// Runs whose programs made references that count each other.
    pub cyclic: u64,
    pub virtual_ms: u64,
}

impl std::ops::Add for Summary {
    type Output = Self;

    fn add(self, other: Self) -> Self {
        Self {
            events: self.events + other.events,
            calls: self.calls + other.calls,
            deaths: self.deaths + other.deaths,
            link_breaks: self.link_breaks + other.link_breaks,
            cyclic: self.cyclic + other.cyclic,
            virtual_ms: self.virtual_ms + other.virtual_ms,
        }
    }
}

/// The cluster.
pub struct World {
    pub(crate) config: Config,
    pub(crate) now: Time,
    queue: BinaryHeap<Reverse<(Time, u64)>>,
    events: BTreeMap<u64, Event>,
    next_event: u64,
    handled: u64,
    pub(crate) random: Random,
    pub(crate) processes: BTreeMap<WorkerId, Process>,
    pub(crate) raylets: BTreeMap<NodeId, Raylet>,
    pub(crate) control: ControlPlane,
    /// The node of every process that ever was.
    pub(crate) home: BTreeMap<WorkerId, NodeId>,
    pub(crate) calls: BTreeMap<TaskId, Rc<Call>>,
    links: BTreeMap<(Place, Place), Link>,
    broken: BTreeSet<(WorkerId, WorkerId)>,
    pub(crate) truth: Truth,
    violation: Option<String>,
    trace: VecDeque<String>,
    pub(crate) faults_left: usize,
    pub(crate) drivers: Vec<WorkerId>,
    pub(crate) drivers_to_start: usize,
    pub(crate) head: NodeId,
    mutation_count: u64,
    deadline: Time,
    pub(crate) jobs_ended: bool,
    pub(crate) calm_since: Option<Time>,
    pub(crate) ambushes: Vec<Ambush>,
    /// The next frame takes long.
    pub(crate) slow_next: bool,
}

impl World {
    /// A cluster made up from the seed.
    pub fn new(config: Config) -> Self {
        let mut random = Random::new(config.seed);
        let control = ControlPlane::new(&mut random);
        let mut world = Self {
            config,
            now: 0,
            queue: BinaryHeap::new(),
            events: BTreeMap::new(),
            next_event: 0,
            handled: 0,
            random,
            processes: BTreeMap::new(),
            raylets: BTreeMap::new(),
            control,
            home: BTreeMap::new(),
            calls: BTreeMap::new(),
            links: BTreeMap::new(),
            broken: BTreeSet::new(),
            truth: Truth::default(),
            violation: None,
            trace: VecDeque::new(),
            faults_left: 0,
            drivers: Vec::new(),
            drivers_to_start: 0,
            head: NodeId::NIL,
            mutation_count: 0,
            deadline: 0,
            jobs_ended: false,
            calm_since: None,
            ambushes: Vec::new(),
            slow_next: false,
        };
        world.build();
        world
    }

    fn build(&mut self) {
        let nodes = self.random.between(1, 4);
        for index in 0..nodes {
            let node = self.join_node();
            if index == 0 {
                self.head = node;
            }
        }
        let drivers = self.random.between(1, 3) as usize;
        self.drivers_to_start = drivers;
        let all: Vec<NodeId> = self.raylets.keys().copied().collect();
        for index in 0..drivers {
            let node = if index == 0 {
                self.head
            } else {
                all[self.random.below(all.len())]
            };
            self.at(20 * MS, Event::StartDriver(node));
        }
        // Every fourth seed has no faults: there every count must hold for every object.
        self.faults_left = if self.config.seed % 4 == 0 {
            0
        } else {
            self.random.between(1, 20) as usize
        };
        if self.faults_left > 0 {
            let first = self.random.between(40, 200) * MS;
            self.at(first, Event::Fault);
        }
        self.at(50 * MS, Event::Check);
        self.deadline = 120_000 * MS;
    }

    /// Runs to the end. An error says what was violated, with the last events where they are traced.
    pub fn run(mut self) -> Result<Summary, String> {
        while let Some(Reverse((at, id))) = self.queue.pop() {
            let Some(event) = self.events.remove(&id) else { continue };
            self.now = self.now.max(at);
            self.handled += 1;
            if self.config.trace {
                let line = format!("{:>9} {event:?}", self.now);
                self.note(line);
            }
            let done = self.handle(event);
            if let Some(violation) = self.violation.take() {
                let mut report = String::new();
                for line in &self.trace {
                    report.push_str(line);
                    report.push('\n');
                }
                return Err(format!("{report}at {} µs: {violation}", self.now));
            }
            if done {
                return Ok(Summary {
                    events: self.handled,
                    calls: self.truth.submitted,
                    deaths: self.truth.deaths,
                    link_breaks: self.truth.breaks,
                    cyclic: self.truth.cyclic,
                    virtual_ms: self.now / MS,
                });
            }
        }
        Err(format!(
            "at {} µs: nothing happens any more: {}",
            self.now,
            self.what_is_left()
        ))
    }

    fn handle(&mut self, event: Event) -> bool {
        match event {
            Event::Deliver { from, to, epoch, frame } => self.deliver(from, to, epoch, frame),
            Event::FrameWake { worker, frame } => self.wake_frame(worker, frame),
            Event::ProcessTick(worker) => self.process_tick(worker),
            Event::RayletTick(node) => self.raylet_tick(node),
            Event::RayletReport(node) => self.raylet_report(node),
            Event::WorkerStarted { node, worker } => self.worker_started(node, worker),
            Event::WorkerEnded { node, worker } => self.worker_ended(node, worker),
            Event::ConnectGcs(node) => self.connect_gcs(node),
            Event::GcsTick => self.gcs_tick(),
            Event::GcsLinkDown { node, epoch } => self.gcs_link_down(node, epoch),
            Event::GcsRestart => self.restart_gcs(),
            Event::KillProcess(worker) => self.kill_process(worker),
            Event::BreakGcsLink => self.break_some_gcs_link(),
            Event::LinkRestored { a, b } => self.restore_link(a, b),
            Event::Fault => self.fault(),
            Event::NodeJoins => drop(self.join_node()),
            Event::StartDriver(node) => self.start_driver(node),
            Event::Check => return self.check_progress(),
        }
        false
    }

    /// Something happens later.
    pub(crate) fn at(&mut self, delay: Time, event: Event) {
        let id = self.next_event;
        self.next_event += 1;
        self.queue.push(Reverse((self.now + delay, id)));
        self.events.insert(id, event);
    }

    /// The first violation counts.
    pub(crate) fn fail(&mut self, violation: impl Into<String>) {
        if self.violation.is_none() {
            self.violation = Some(violation.into());
        }
    }

    pub(crate) fn note(&mut self, line: String) {
        if self.config.trace {
            self.trace.push_back(line);
            if self.trace.len() > 20_000 {
                self.trace.pop_front();
            }
        }
    }

    /// Whether the shell is to do this wrong.
    pub(crate) fn mutated(&self, mutation: Mutation) -> bool {
        self.config.mutation == Some(mutation)
    }

    /// Whether the shell is to do this wrong this time: every third time.
    pub(crate) fn mutated_sometimes(&mut self, mutation: Mutation) -> bool {
        if !self.mutated(mutation) {
            return false;
        }
        self.mutation_count += 1;
        self.mutation_count % 3 == 0
    }

    pub(crate) fn is_alive(&self, place: Place) -> bool {
        match place {
            Place::Process(worker) => self.processes.contains_key(&worker),
            Place::Raylet(node) => self.raylets.contains_key(&node),
            Place::Gcs => self.control.is_up(),
        }
    }

    fn pair(a: WorkerId, b: WorkerId) -> (WorkerId, WorkerId) {
        (a.min(b), a.max(b))
    }

    /// Sends a message; between processes through their session.
    pub(crate) fn send(&mut self, from: Place, to: Place, message: Message) {
        if !self.is_alive(to) {
            return;
        }
        if let (Place::Process(a), Place::Process(b)) = (from, to) {
            let broken = self.broken.contains(&Self::pair(a, b));
            let Some(process) = self.processes.get_mut(&a) else {
                return;
            };
            let session = process.sessions.entry(b).or_default();
            if !session.is_connected() && !broken {
                // The first link: nothing was sent before it.
                if session.resumed(0).is_err() {
                    return self.fail("a session could not be opened");
                }
            }
            if session.send(message.clone()) {
                self.transmit(from, to, Frame::InSession(message));
            }
            return;
        }
        self.transmit(from, to, Frame::Plain(message));
    }

    /// Puts a frame on the link.
    pub(crate) fn transmit(&mut self, from: Place, to: Place, frame: Frame) {
        let same_node = self.node_of(from) == self.node_of(to);
        let spread = if same_node { 300 } else { 4 * MS };
        let delay = if std::mem::take(&mut self.slow_next) {
            self.random.between(30, 150) * MS
        } else if self.random.chance(3) {
            self.random.between(1, 60) * MS
        } else {
            self.random.between(20, spread)
        };
        let link = self.links.entry((from, to)).or_default();
        let arrives = (self.now + delay).max(link.last + 1);
        link.last = arrives;
        let epoch = link.epoch;
        self.at(arrives - self.now, Event::Deliver { from, to, epoch, frame });
    }

    pub(crate) fn node_of(&self, place: Place) -> NodeId {
        match place {
            Place::Process(worker) => self.home.get(&worker).copied().unwrap_or(NodeId::NIL),
            Place::Raylet(node) => node,
            Place::Gcs => self.head,
        }
    }

    /// Which life of the link between two places this is.
    pub(crate) fn link_epoch(&mut self, from: Place, to: Place) -> u64 {
        self.links.entry((from, to)).or_default().epoch
    }

    /// Whether such a fault waits for this moment; it happens once.
    pub(crate) fn ambush(&mut self, ambush: Ambush) -> bool {
        let waits = self.ambushes.iter().position(|known| *known == ambush);
        waits.map(|index| self.ambushes.swap_remove(index)).is_some()
    }

    /// What is under way both ways is lost.
    pub(crate) fn cut(&mut self, a: Place, b: Place) {
        for pair in [(a, b), (b, a)] {
            self.links.entry(pair).or_default().epoch += 1;
        }
    }

    fn deliver(&mut self, from: Place, to: Place, epoch: u64, frame: Frame) {
        if self.link_epoch(from, to) != epoch || !self.is_alive(to) {
            return;
        }
        let message = match frame {
            Frame::Plain(message) => message,
            Frame::InSession(message) => {
                let (Place::Process(sender), Place::Process(receiver)) = (from, to) else {
                    return;
                };
                let Some(process) = self.processes.get_mut(&receiver) else {
                    return;
                };
                let due = process.sessions.entry(sender).or_default().receive();
                if let Some(count) = due.filter(|_| self.is_alive(from)) {
                    self.transmit(to, from, Frame::Acknowledge(count));
                }
                message
            }
            Frame::Acknowledge(count) => {
                let (Place::Process(sender), Place::Process(receiver)) = (from, to) else {
                    return;
                };
                let known = self
                    .processes
                    .get_mut(&receiver)
                    .and_then(|process| process.sessions.get_mut(&sender));
                if let Some(Err(error)) = known.map(|session| session.acknowledged(count)) {
                    if !self.mutated(Mutation::ResendWithoutDedupe) && !self.mutated(Mutation::ForgetResend) {
                        self.fail(error.to_string());
                    }
                }
                return;
            }
        };
        match to {
            Place::Process(worker) => self.process_message(worker, from, message),
            Place::Raylet(node) => self.raylet_message(node, from, message),
            Place::Gcs => self.gcs_message(from, message),
        }
    }

    /// The link between two processes breaks, and is opened again after a while.
    pub(crate) fn break_link(&mut self, a: WorkerId, b: WorkerId) {
        if !self.broken.insert(Self::pair(a, b)) {
            return;
        }
        self.truth.breaks += 1;
        self.cut(Place::Process(a), Place::Process(b));
        for (one, other) in [(a, b), (b, a)] {
            if let Some(process) = self.processes.get_mut(&one) {
                process.sessions.entry(other).or_default().broken();
            }
        }
        let (a, b) = Self::pair(a, b);
        let delay = self.random.between(1, 200) * MS;
        self.at(delay, Event::LinkRestored { a, b });
    }

    fn restore_link(&mut self, a: WorkerId, b: WorkerId) {
        self.broken.remove(&(a, b));
        if !self.is_alive(Place::Process(a)) || !self.is_alive(Place::Process(b)) {
            return;
        }
        let mut received = BTreeMap::new();
        for (one, other) in [(a, b), (b, a)] {
            if let Some(process) = self.processes.get_mut(&one) {
                received.insert(one, process.sessions.entry(other).or_default().take_in_count());
            }
        }
        for (one, other) in [(a, b), (b, a)] {
            let count = received.get(&other).copied().unwrap_or(0);
            let everything = self.mutated(Mutation::ResendWithoutDedupe);
            let nothing = self.mutated(Mutation::ForgetResend);
            let Some(session) = self
                .processes
                .get_mut(&one)
                .and_then(|process| process.sessions.get_mut(&other))
            else {
                continue;
            };
            let all: Vec<Message> = session.retained().cloned().collect();
            match session.resumed(count) {
                Ok(rest) => {
                    let again = if everything { all } else { rest };
                    for message in again.into_iter().filter(|_| !nothing) {
                        self.transmit(Place::Process(one), Place::Process(other), Frame::InSession(message));
                    }
                }
                Err(error) => {
                    if !everything && !nothing {
                        self.fail(error.to_string());
                    }
                }
            }
        }
    }

    /// Kills a process at this instant. What it sent arrives, or the last part of it is lost.
    pub(crate) fn kill_process(&mut self, worker: WorkerId) {
        let Some(process) = self.processes.remove(&worker) else {
            return;
        };
        self.truth.deaths += 1;
        self.taint(&process);
        for other in process.sessions.keys().copied().collect::<Vec<_>>() {
            if self.random.chance(50) {
                self.cut(Place::Process(worker), Place::Process(other));
            }
        }
        let node = process.node;
        if let Some(raylet) = self.raylets.get_mut(&node) {
            raylet.evidence.insert(worker, process.started_sequence);
            let delay = self.random.between(1, 20) * MS;
            self.at(delay, Event::WorkerEnded { node, worker });
        }
    }

    /// Whatever a dead process counted may have had no other cover.
    pub(crate) fn taint(&mut self, process: &Process) {
        self.truth
            .tainted
            .extend(process.table.iter().map(|(object, _)| *object));
        for push in process.unstarted_pushes() {
            self.truth.tainted.extend(push.call.counted());
        }
        for task in process.tasks.values() {
            self.truth.tainted.extend(task.call.counted());
        }
    }

    pub(crate) fn truth_owner(&self, object: &ObjectId) -> WorkerId {
        self.truth.owners.get(object).copied().unwrap_or(WorkerId::NIL)
    }

    pub(crate) fn deadline_passed(&self) -> bool {
        self.now > self.deadline
    }
}
