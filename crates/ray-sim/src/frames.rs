//! Frames: runs programs' operations until they wait or end.
//!
//! Invariant: 1. What a return contains is held before the frame's references go.

use std::rc::Rc;

use ray_ids::{ActorId, ObjectId, TaskId, WorkerId};
use ray_ownership::actor_order::CallKey;
use ray_ownership::references::Cover;

use crate::model::{Call, CallKind, Failure, Message, Outcome, Place, Push, Reference, Reply, Value};
use crate::mutation::Mutation;
use crate::process::{Frame, Waiter, Waiting};
use crate::program::{Operation, Script};
use crate::world::{Ambush, Event, World};

impl World {
    pub(crate) fn start_call(&mut self, id: WorkerId, push: Push) {
        self.check_start(id, &push);
        let call: Rc<Call> = push.call.clone();
        let Some(process) = self.processes.get_mut(&id) else {
            return;
        };
        process.job = process.job.or(Some(call.task.job_id()));
        // A constructor's references are registered at once: no reply lists them, and the actor's owner counts its
        // arguments for as long as the actor may be created again.
        let cover = match call.kind {
            CallKind::Constructor { .. } => Cover::Outer(ObjectId::NIL),
            _ => Cover::Task(call.task),
        };
        for reference in call.by_value.iter().chain(&call.by_reference) {
            if push.caller == id {
                let object = reference.object;
                self.refs(id, |table, _| {
                    table.add_local(&object);
                });
            } else {
                self.borrow(id, *reference, cover);
            }
        }
        self.new_frame(id, call.script.clone(), Some(push), call.by_value.clone());
    }

    pub(crate) fn new_frame(
        &mut self,
        id: WorkerId,
        script: Rc<Script>,
        push: Option<Push>,
        variables: Vec<Reference>,
    ) {
        let arguments = push
            .as_ref()
            .map(|push| push.call.by_reference.clone())
            .unwrap_or_default();
        let waiting = if arguments.is_empty() {
            Waiting::No
        } else {
            Waiting::Argument(0)
        };
        let Some(process) = self.processes.get_mut(&id) else {
            return;
        };
        let number = process.next_frame;
        process.next_frame += 1;
        let frame = Frame {
            script,
            next: 0,
            variables,
            arguments,
            waiting,
            push,
            blocked: false,
        };
        process.frames.insert(number, frame);
        self.run_frame(id, number);
    }

    pub(crate) fn wake_frame(&mut self, id: WorkerId, number: u64) {
        let frame = self
            .processes
            .get_mut(&id)
            .and_then(|process| process.frames.get_mut(&number));
        if let Some(frame) = frame.filter(|frame| frame.waiting == Waiting::Time) {
            frame.waiting = Waiting::No;
            self.run_frame(id, number);
        }
    }

    pub(crate) fn frame(&mut self, id: WorkerId, number: u64) -> Option<&mut Frame> {
        self.processes.get_mut(&id)?.frames.get_mut(&number)
    }

    /// Runs a frame until it waits or ends.
    pub(crate) fn run_frame(&mut self, id: WorkerId, number: u64) {
        loop {
            let Some(frame) = self.frame(id, number) else { return };
            let (object, waiting) = match frame.waiting {
                Waiting::Time => return,
                Waiting::No => {
                    if !self.run_operation(id, number) {
                        return;
                    }
                    continue;
                }
                Waiting::Argument(index) => (frame.arguments[index], frame.waiting),
                Waiting::Get(reference) => (reference, frame.waiting),
            };
            match self.read(id, object.object) {
                None => {
                    if let Some(process) = self.processes.get_mut(&id) {
                        let waiters = process.waiters.entry(object.object).or_default();
                        if !waiters.contains(&Waiter::Frame(number)) {
                            waiters.push(Waiter::Frame(number));
                        }
                    }
                    return self.set_blocked(id, number, true);
                }
                Some(read) => {
                    self.set_blocked(id, number, false);
                    let failed = read.is_err();
                    for inner in read.unwrap_or_else(|_| Rc::from([])).iter() {
                        let reference = Reference {
                            waitable: inner.waitable && object.waitable,
                            ..*inner
                        };
                        self.borrow(id, reference, Cover::Outer(object.object));
                        if let Some(frame) = self.frame(id, number) {
                            frame.variables.push(reference);
                        }
                    }
                    let Some(frame) = self.frame(id, number) else { return };
                    frame.waiting = match waiting {
                        Waiting::Argument(_) if failed => {
                            return self.end_frame(id, number, Some(Failure::ArgumentFailed))
                        }
                        Waiting::Argument(index) if index + 1 < frame.arguments.len() => Waiting::Argument(index + 1),
                        _ => Waiting::No,
                    };
                }
            }
        }
    }

    /// A plain task that waits gives its CPU back meanwhile.
    pub(crate) fn set_blocked(&mut self, id: WorkerId, number: u64, blocked: bool) {
        let forget = self.mutated(Mutation::ForgetBlocked);
        let Some(process) = self.processes.get_mut(&id) else {
            return;
        };
        let (node, lease) = (process.node, process.lease);
        let Some(frame) = process.frames.get_mut(&number) else {
            return;
        };
        if frame.blocked == blocked {
            return;
        }
        frame.blocked = blocked;
        let plain = frame
            .push
            .as_ref()
            .is_some_and(|push| matches!(push.call.kind, CallKind::Plain { .. }));
        let Some(lease) = lease.filter(|_| plain && !forget) else {
            return;
        };
        let message = if blocked {
            Message::WorkerBlocked { lease }
        } else {
            Message::WorkerUnblocked { lease }
        };
        self.send(Place::Process(id), Place::Raylet(node), message);
    }

    /// Runs one operation. False where the frame waits or is over.
    pub(crate) fn run_operation(&mut self, id: WorkerId, number: u64) -> bool {
        let Some(frame) = self.frame(id, number) else {
            return false;
        };
        let script = frame.script.clone();
        let Some(operation) = script.operations.get(frame.next) else {
            self.end_frame(id, number, None);
            return false;
        };
        frame.next += 1;
        let variables = frame.variables.clone();
        let picked = |pick: usize| (!variables.is_empty()).then(|| variables[pick % variables.len()]);
        let all = |picks: &[usize]| -> Vec<Reference> { picks.iter().filter_map(|pick| picked(*pick)).collect() };
        match operation {
            Operation::Work(time) => {
                frame.waiting = Waiting::Time;
                self.at(
                    *time,
                    Event::FrameWake {
                        worker: id,
                        frame: number,
                    },
                );
                return false;
            }
            Operation::Put(picks) => {
                let contents = all(picks);
                let object = ObjectId::of(self.fresh_task(id), ObjectId::FIRST_PUT_INDEX);
                self.own(id, object, Some(Value::Inline(contents.clone().into())));
                self.contain(id, object, &contents);
                self.add_variable(
                    id,
                    number,
                    Reference {
                        object,
                        owner: id,
                        waitable: true,
                    },
                );
            }
            Operation::Call {
                script,
                by_value,
                by_reference,
                cpus,
                retries,
                stored,
            } => {
                let call = Call {
                    task: self.fresh_task(id),
                    kind: CallKind::Plain { cpus: *cpus },
                    script: script.clone(),
                    by_value: all(by_value),
                    by_reference: all(by_reference).into_iter().filter(is_plain_value).collect(),
                    retries: *retries,
                    stored: *stored,
                };
                let object = call.result();
                self.submit(id, Rc::new(call));
                self.add_variable(
                    id,
                    number,
                    Reference {
                        object,
                        owner: id,
                        waitable: true,
                    },
                );
            }
            Operation::CreateActor {
                script,
                by_value,
                max_restarts,
                max_concurrency,
            } => {
                let job = self
                    .processes
                    .get(&id)
                    .and_then(|process| process.job)
                    .unwrap_or_default();
                let actor = ActorId::of(job, self.random.bytes());
                let call = Call {
                    task: TaskId::for_actor_creation(actor),
                    kind: CallKind::Constructor {
                        actor,
                        max_concurrency: *max_concurrency,
                    },
                    script: script.clone(),
                    by_value: all(by_value),
                    by_reference: Vec::new(),
                    retries: 0,
                    stored: false,
                };
                let object = call.result();
                self.create_actor(id, Rc::new(call), actor, *max_restarts);
                self.add_variable(
                    id,
                    number,
                    Reference {
                        object,
                        owner: id,
                        waitable: false,
                    },
                );
            }
            Operation::CallActor {
                pick,
                script,
                by_value,
                by_reference,
                retries,
            } => {
                let handles: Vec<Reference> = variables
                    .iter()
                    .filter(|reference| is_handle(reference))
                    .copied()
                    .collect();
                if handles.is_empty() {
                    return true;
                }
                let handle = handles[pick % handles.len()];
                let actor = handle.object.task_id().actor_id();
                let call = Call {
                    task: TaskId::of(actor, self.random.bytes()),
                    kind: CallKind::Method { actor, handle },
                    script: script.clone(),
                    by_value: all(by_value),
                    by_reference: all(by_reference).into_iter().filter(is_plain_value).collect(),
                    retries: *retries,
                    stored: false,
                };
                let object = call.result();
                self.submit(id, Rc::new(call));
                self.add_variable(
                    id,
                    number,
                    Reference {
                        object,
                        owner: id,
                        waitable: true,
                    },
                );
            }
            Operation::Get(pick) => {
                if let Some(reference) = picked(*pick).filter(is_plain_value) {
                    if let Some(frame) = self.frame(id, number) {
                        frame.waiting = Waiting::Get(reference);
                    }
                }
            }
            Operation::Drop(pick) => {
                if !variables.is_empty() {
                    if let Some(frame) = self.frame(id, number) {
                        frame.variables.remove(pick % variables.len());
                    }
                    let object = variables[pick % variables.len()].object;
                    self.refs(id, |table, out| table.remove_local(&object, out));
                }
            }
            Operation::Keep(pick) => {
                if !variables.is_empty() {
                    if let Some(frame) = self.frame(id, number) {
                        frame.variables.remove(pick % variables.len());
                    }
                    if let Some(process) = self.processes.get_mut(&id) {
                        process.kept.push(variables[pick % variables.len()]);
                    }
                }
            }
            Operation::TakeKept(pick) => {
                let kept = self
                    .processes
                    .get(&id)
                    .map(|process| process.kept.clone())
                    .unwrap_or_default();
                if !kept.is_empty() {
                    let reference = Reference {
                        waitable: false,
                        ..kept[pick % kept.len()]
                    };
                    let object = reference.object;
                    self.refs(id, |table, _| {
                        table.add_local(&object);
                    });
                    if let Some(frame) = self.frame(id, number) {
                        frame.variables.push(reference);
                    }
                }
            }
            Operation::DropKept(pick) => {
                let Some(process) = self.processes.get_mut(&id) else {
                    return false;
                };
                if !process.kept.is_empty() {
                    let index = pick % process.kept.len();
                    let object = process.kept.remove(index).object;
                    self.refs(id, |table, out| table.remove_local(&object, out));
                }
            }
        }
        true
    }

    pub(crate) fn fresh_task(&mut self, id: WorkerId) -> TaskId {
        let job = self
            .processes
            .get(&id)
            .and_then(|process| process.job)
            .unwrap_or_default();
        TaskId::of(ActorId::nil_in(job), self.random.bytes())
    }

    pub(crate) fn add_variable(&mut self, id: WorkerId, number: u64, reference: Reference) {
        if let Some(frame) = self.frame(id, number) {
            frame.variables.push(reference);
        }
    }

    /// A frame is over: its result goes to the caller, its references go.
    pub(crate) fn end_frame(&mut self, id: WorkerId, number: u64, failure: Option<Failure>) {
        let Some(frame) = self
            .processes
            .get_mut(&id)
            .and_then(|process| process.frames.remove(&number))
        else {
            return;
        };
        let Frame {
            script,
            variables,
            arguments,
            push,
            ..
        } = frame;
        let Some(push) = push else {
            for reference in variables {
                self.refs(id, |table, out| table.remove_local(&reference.object, out));
            }
            if let Some(process) = self.processes.get_mut(&id) {
                process.program_over = true;
            }
            return;
        };
        let (task, caller) = (push.call.task, push.caller);
        let pick = |pick: &usize| (!variables.is_empty()).then(|| variables[pick % variables.len()]);
        let is_constructor = matches!(push.call.kind, CallKind::Constructor { .. });
        let contents: Vec<Reference> = if failure.is_some() || is_constructor {
            Vec::new()
        } else {
            script.returns.iter().filter_map(pick).collect()
        };
        let ids: Vec<ObjectId> = contents.iter().map(|reference| reference.object).collect();
        if !ids.is_empty() && !self.mutated(Mutation::ForgetReturnHold) {
            self.refs(id, |table, out| table.hold_return(task, caller, &ids, out));
        }
        if is_constructor {
            if let Some(process) = self.processes.get_mut(&id) {
                process.kept.extend(variables);
            }
        } else {
            for reference in variables {
                self.refs(id, |table, out| table.remove_local(&reference.object, out));
            }
        }
        for reference in arguments {
            self.refs(id, |table, out| table.remove_local(&reference.object, out));
        }
        let mut retained = Vec::new();
        if !is_constructor {
            self.refs(id, |table, _| retained = table.end_of_cover(task));
        }
        let Some(process) = self.processes.get(&id) else { return };
        let node = process.node;
        let wants_acknowledgement = !ids.is_empty();
        let outcome = match failure {
            Some(failure) => Outcome::Failed(failure),
            None if push.call.stored => {
                let contents: Rc<[Reference]> = contents.into();
                self.seal(node, push.call.result(), caller, contents.clone());
                Outcome::ReturnedStored(node, contents)
            }
            None => Outcome::Returned(contents.into()),
        };
        match push.call.kind {
            CallKind::Constructor { .. } => self.constructor_over(id, &push, failure.is_some()),
            CallKind::Method { .. } => {
                self.reply(id, &push, outcome, retained, wants_acknowledgement);
                let key = CallKey {
                    caller,
                    sequence: push.sequence,
                };
                self.order(id, |order, out| {
                    order.finished(key, out);
                });
            }
            CallKind::Plain { .. } => {
                self.reply(id, &push, outcome, retained, wants_acknowledgement);
                self.start_next(id);
            }
        }
        self.leave_if_done(id);
    }

    pub(crate) fn reply(
        &mut self,
        id: WorkerId,
        push: &Push,
        outcome: Outcome,
        retained: Vec<(ObjectId, WorkerId, u64)>,
        wants_acknowledgement: bool,
    ) {
        let (task, attempt, lease) = (push.call.task, push.attempt, push.lease);
        let reply = Reply {
            task,
            attempt,
            lease,
            outcome,
            retained,
            wants_acknowledgement,
        };
        let plain = matches!(push.call.kind, CallKind::Plain { .. });
        let ambush = plain && self.ambush(Ambush::Reply);
        self.slow_next = ambush;
        self.send(Place::Process(id), Place::Process(push.caller), Message::Reply(reply));
        self.slow_next = false;
        if ambush {
            self.at(1, Event::KillProcess(id));
        }
    }
}

/// Whether a reference is an actor's handle.
fn is_handle(reference: &Reference) -> bool {
    let task = reference.object.task_id();
    task.has_actor() && task == TaskId::for_actor_creation(task.actor_id())
}

/// Whether a program may wait for it.
fn is_plain_value(reference: &Reference) -> bool {
    reference.waitable && !is_handle(reference)
}
