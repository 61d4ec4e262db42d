//! What a process does with each message, and with the deaths it hears of.
//!
//! Invariant: 1. A message about something that is gone changes nothing.

use ray_ids::{ActorId, LeaseId, NodeId, ObjectId, TaskId, WorkerId};

use crate::model::{Failure, Message, Place, Value};
use crate::mutation::Mutation;
use crate::world::{World, MS};

impl World {
    pub(crate) fn lose_requests(&mut self, id: WorkerId, node: NodeId) {
        let now_ms = self.now / MS;
        let Some(process) = self.processes.get_mut(&id) else {
            return;
        };
        let lost: Vec<(u64, u64)> = process
            .requests
            .iter()
            .filter(|(_, (_, at))| *at == node)
            .map(|(id, (request, _))| (*id, *request))
            .collect();
        for (correlation, request) in lost {
            if let Some(process) = self.processes.get_mut(&id) {
                process.requests.remove(&correlation);
            }
            self.leases(id, |leases, out| leases.request_lost(request, now_ms, out));
        }
    }

    pub(crate) fn on_worker_died(&mut self, id: WorkerId, worker: WorkerId) {
        let Some(process) = self.processes.get_mut(&id) else {
            return;
        };
        process.dead_workers.insert(worker);
        if !self.mutated(Mutation::IgnoreWorkerDied) {
            self.refs(id, |table, out| table.worker_died(worker, out));
        }
        let Some(process) = self.processes.get(&id) else { return };
        let hosted: Vec<(ActorId, u64)> = process
            .actors
            .iter()
            .filter(|(_, entry)| entry.worker == Some(worker))
            .map(|(actor, entry)| (*actor, entry.incarnation))
            .collect();
        for (actor, incarnation) in hosted {
            self.actor_calls(id, actor, |calls, out| calls.disconnected(incarnation, out));
        }
        self.caller_died(id, worker);
    }

    pub(crate) fn on_node_died(&mut self, id: WorkerId, node: NodeId) {
        if self.mutated(Mutation::IgnoreNodeDied) {
            return;
        }
        let now_ms = self.now / MS;
        let Some(process) = self.processes.get_mut(&id) else {
            return;
        };
        process.dead_nodes.insert(node);
        process.lease_nodes.retain(|_, at| *at != node);
        let stored: Vec<ObjectId> = process
            .table
            .iter()
            .filter(|(_, entry)| entry.locations().contains(&node))
            .map(|(id, _)| *id)
            .collect();
        for object in stored {
            self.refs(id, |table, _| {
                table.remove_location(&object, node);
            });
        }
        self.leases(id, |leases, out| leases.node_died(node, now_ms, out));
        self.lose_requests(id, node);
    }

    pub(crate) fn on_granted(&mut self, id: WorkerId, correlation: u64, granted: (LeaseId, WorkerId, NodeId, u64)) {
        let (lease, worker, node, first_sequence) = granted;
        let now_ms = self.now / MS;
        if let Some(other) = self.truth.leases.insert(lease, id).filter(|other| *other != id) {
            return self.fail(format!("lease {lease} was granted to {other} and to {id}"));
        }
        let Some(process) = self.processes.get_mut(&id) else {
            return;
        };
        // A request that was withdrawn has the number of none.
        let request = process.requests.remove(&correlation).map_or(0, |(request, _)| request);
        process.lease_nodes.insert(lease, node);
        if process.dead_nodes.contains(&node) {
            process.lease_nodes.remove(&lease);
            self.leases(id, |leases, out| leases.request_lost(request, now_ms, out));
            return;
        }
        self.leases(id, |leases, out| {
            leases.granted(request, lease, worker, node, first_sequence, now_ms, out)
        });
    }

    pub(crate) fn process_message(&mut self, id: WorkerId, from: Place, message: Message) {
        let now_ms = self.now / MS;
        let sender = match from {
            Place::Process(worker) => worker,
            _ => WorkerId::NIL,
        };
        let request_of = |world: &Self, correlation: u64| {
            world
                .processes
                .get(&id)
                .and_then(|process| process.requests.get(&correlation))
                .map(|(request, _)| *request)
        };
        match message {
            Message::Push(push) => self.on_push(id, push),
            Message::Reply(reply) => self.on_reply(id, sender, reply),
            Message::RecallTasks { lease } => self.on_recall_tasks(id, sender, lease),
            Message::TasksRecalled { lease, tasks } => {
                let tasks: Vec<TaskId> = tasks.into_iter().map(|(task, _)| task).collect();
                self.leases(id, |leases, out| leases.tasks_recalled(&tasks, lease, now_ms, out));
            }
            Message::AddBorrower {
                object,
                borrower,
                generation,
            } => {
                self.refs(id, |table, out| {
                    table.add_borrower(object, borrower, generation, out);
                });
                let known_dead = self
                    .processes
                    .get(&id)
                    .is_some_and(|process| process.dead_workers.contains(&borrower));
                if known_dead && !self.mutated(Mutation::IgnoreWorkerDied) {
                    self.refs(id, |table, out| table.worker_died(borrower, out));
                }
                if !self.mutated_sometimes(Mutation::LoseAddBorrower) {
                    let answer = Message::BorrowerAdded {
                        object,
                        borrower,
                        generation,
                    };
                    self.send(Place::Process(id), from, answer);
                }
            }
            Message::BorrowerAdded {
                object,
                borrower,
                generation,
            } => {
                self.refs(id, |table, out| table.borrower_added(object, borrower, generation, out));
            }
            Message::RemoveBorrower { object, generation } => {
                self.refs(id, |table, out| table.remove_borrower(object, sender, generation, out));
            }
            Message::ReturnsAcknowledged { task } => self.refs(id, |table, out| table.returns_acknowledged(task, out)),
            Message::GetObjectStatus { object } => self.status_asked(id, sender, object),
            Message::ObjectStatus { object, value } => {
                if let Some(entry) = self
                    .processes
                    .get_mut(&id)
                    .and_then(|process| process.table.get_mut(&object))
                {
                    entry.value.asked = false;
                    self.set_value(id, object, value);
                }
            }
            Message::AddLocation { object, node } => {
                let Some(process) = self.processes.get_mut(&id) else {
                    return;
                };
                if !process.table.add_location(&object, node) {
                    self.free_on(id, node, object);
                }
            }
            Message::ReportLost { object, nodes } => {
                for node in nodes {
                    self.refs(id, |table, _| {
                        table.remove_location(&object, node);
                    });
                }
            }
            Message::LeaseGranted {
                correlation,
                lease,
                worker,
                node,
                first_sequence,
            } => {
                self.on_granted(id, correlation, (lease, worker, node, first_sequence));
            }
            Message::LeaseRedirected { correlation, node } => {
                if let Some(request) = request_of(self, correlation) {
                    if let Some(process) = self.processes.get_mut(&id) {
                        process.requests.remove(&correlation);
                    }
                    self.leases(id, |leases, out| leases.redirected(request, node, out));
                }
            }
            Message::LeaseRefused { correlation } => {
                if let Some(request) = request_of(self, correlation) {
                    if let Some(process) = self.processes.get_mut(&id) {
                        process.requests.remove(&correlation);
                    }
                    let failed = self
                        .leases(id, |leases, out| leases.refused(request, out))
                        .unwrap_or_default();
                    for task in failed {
                        self.finish_failed(id, task, Failure::Unschedulable);
                    }
                }
            }
            Message::LeaseQueued { correlation } => {
                if let Some(request) = request_of(self, correlation) {
                    self.leases(id, |leases, out| leases.queued(request, now_ms, out));
                }
            }
            Message::RecallLease { lease } => {
                self.leases(id, |leases, out| leases.recalled(lease, out));
            }
            Message::LeaseBroken { lease, started } => {
                self.leases(id, |leases, out| leases.broken(lease, started, now_ms, out));
                if let Some(process) = self.processes.get_mut(&id) {
                    process.lease_nodes.remove(&lease);
                }
            }
            Message::LeaseAssigned { lease } => self.on_assigned(id, lease),
            Message::WorkerDied { worker } => self.on_worker_died(id, worker),
            Message::NodeDied { node } => self.on_node_died(id, node),
            Message::ExitProcess => self.on_exit(id),
            Message::CreateActor(message) => self.on_create_actor(id, &message),
            Message::Publication(state) => self.on_actor_state(id, &state),
            Message::GcsAnswer { reply } => {
                if let Some(state) = &reply.actor {
                    self.on_actor_state(id, state);
                }
                if !reply.error.is_empty() {
                    self.note(format!("{id} was answered {}", reply.error));
                }
            }
            Message::ObjectLocal { object } => self.on_local(id, object),
            Message::FetchFailed { object, absent } => self.on_fetch_failed(id, object, absent),
            other => self.fail(format!("a process got {other:?}")),
        }
    }

    pub(crate) fn on_local(&mut self, id: WorkerId, object: ObjectId) {
        if let Some(entry) = self
            .processes
            .get_mut(&id)
            .and_then(|process| process.table.get_mut(&object))
        {
            entry.value.fetching = false;
        }
        self.wake_waiters(id, object);
    }

    pub(crate) fn on_fetch_failed(&mut self, id: WorkerId, object: ObjectId, absent: Vec<NodeId>) {
        let Some(process) = self.processes.get_mut(&id) else {
            return;
        };
        let Some(entry) = process.table.get_mut(&object) else {
            return;
        };
        entry.value.fetching = false;
        let forget = self.config.mutation == Some(Mutation::ForgetReportLost);
        match entry.borrowed_owner() {
            None => {
                for node in absent.into_iter().filter(|_| !forget) {
                    self.refs(id, |table, _| {
                        table.remove_location(&object, node);
                    });
                }
            }
            Some(owner) => {
                if !entry.owner_is_dead() {
                    entry.value.value = None;
                    entry.value.asked = false;
                } else {
                    entry.value.value = Some(Value::Failed(Failure::OwnerDied));
                }
                if !forget {
                    let message = Message::ReportLost { object, nodes: absent };
                    self.send(Place::Process(id), Place::Process(owner), message);
                }
            }
        }
        // Whoever waits asks again.
        self.wake_waiters(id, object);
    }
}
