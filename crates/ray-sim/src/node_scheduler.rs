//! A raylet's scheduler: feeds it events, carries out its commands, and reads what processes send.
//!
//! Invariant: 1. A worker hears of its lease before its owner does: the assignment is sent first.

use ray_gcs::NodeMessage;
use ray_ids::{NodeId, WorkerId};
use ray_raylet::types::{Command, Event as SchedulerEvent};
use ray_wire::{id_bytes, ActorCreated, GcsCall, WorkerDeathReport};

use crate::model::{Message, Place};
use crate::mutation::Mutation;
use crate::node::{address, Asker};
use crate::world::{Event, World, MS};

impl World {
    pub(crate) fn raylet_tick(&mut self, node: NodeId) {
        if let Some(raylet) = self.raylets.get_mut(&node) {
            raylet.tick_at = None;
        }
        self.raylet_step(node, SchedulerEvent::Tick);
    }

    pub(crate) fn raylet_step(&mut self, node: NodeId, event: SchedulerEvent) {
        let now_ms = self.now / MS;
        let Some(raylet) = self.raylets.get_mut(&node) else {
            return;
        };
        let commands = raylet.scheduler.step(event, now_ms);
        if let Err(error) = raylet.scheduler.validate() {
            return self.fail(format!("the raylet of {node}: {error}"));
        }
        for command in commands {
            self.raylet_carry_out(node, command);
        }
        self.report_soon(node);
        let now = self.now;
        let Some(raylet) = self.raylets.get_mut(&node) else {
            return;
        };
        if let Some(at_ms) = raylet.scheduler.next_tick(now_ms) {
            let at = (at_ms * MS).max(now + 1);
            if raylet.tick_at.is_none_or(|known| at < known) {
                raylet.tick_at = Some(at);
                self.at(at - now, Event::RayletTick(node));
            }
        }
    }

    pub(crate) fn raylet_carry_out(&mut self, node: NodeId, command: Command) {
        let here = Place::Raylet(node);
        match command {
            Command::Grant {
                key,
                lease,
                worker,
                first_sequence,
            } => {
                let (correlation, to) = (key.correlation, Place::Process(key.process));
                let message = Message::LeaseGranted {
                    correlation,
                    lease,
                    worker,
                    node,
                    first_sequence,
                };
                if self.mutated_sometimes(Mutation::LoseGrant) {
                    return;
                }
                if self.mutated_sometimes(Mutation::DoubleGrant) {
                    self.grant_again(node, &message, key.process);
                }
                self.send(here, to, message);
            }
            Command::Redirect { key, node: to } => {
                let message = Message::LeaseRedirected {
                    correlation: key.correlation,
                    node: to,
                };
                self.send(here, Place::Process(key.process), message);
            }
            Command::Refuse { key, .. } => {
                let message = Message::LeaseRefused {
                    correlation: key.correlation,
                };
                self.send(here, Place::Process(key.process), message);
            }
            Command::Queued { key, .. } => {
                let message = Message::LeaseQueued {
                    correlation: key.correlation,
                };
                self.send(here, Place::Process(key.process), message);
            }
            Command::Recall { owner, lease } => self.send(here, Place::Process(owner), Message::RecallLease { lease }),
            Command::AssignLease { worker, lease, .. } => {
                self.send(
                    here,
                    Place::Process(worker),
                    Message::LeaseAssigned { lease: Some(lease) },
                );
            }
            Command::UnassignLease { worker } => {
                self.send(here, Place::Process(worker), Message::LeaseAssigned { lease: None });
            }
            Command::StartWorker { worker, .. } => {
                let delay = self.random.between(2, 40) * MS;
                self.at(delay, Event::WorkerStarted { node, worker });
            }
            Command::AskToExit { worker, .. } => self.send(here, Place::Process(worker), Message::ExitProcess),
            Command::KillWorker { worker, cause } => {
                let Some(raylet) = self.raylets.get_mut(&node) else {
                    return;
                };
                raylet.kill_causes.entry(worker).or_insert(cause);
                if self.processes.contains_key(&worker) {
                    self.kill_process(worker);
                } else {
                    // It has not registered yet, or is dead already.
                    self.at(MS, Event::WorkerEnded { node, worker });
                }
            }
            Command::LeaseBroken {
                owner,
                lease,
                started_sequence,
                ..
            } => {
                if !self.mutated(Mutation::LoseLeaseBroken) {
                    let message = Message::LeaseBroken {
                        lease,
                        started: started_sequence,
                    };
                    self.send(here, Place::Process(owner), message);
                }
            }
            Command::CreateActor { worker, message } => {
                self.send(here, Place::Process(worker), Message::CreateActor(message));
            }
            Command::AnswerActor(message) => self.answer_gcs(node, NodeMessage::ActorCreated(*message)),
            Command::ReportDeath { worker, cause, actor } => {
                let (actor_id, incarnation) = match actor {
                    Some((actor, incarnation)) => (id_bytes(actor.as_bytes()), incarnation),
                    None => (bytes::Bytes::new(), 0),
                };
                let worker = Some(address(node, worker));
                let report = WorkerDeathReport {
                    worker,
                    cause: Some(cause),
                    actor_id,
                    incarnation,
                    ..Default::default()
                };
                self.report_death(node, report);
            }
            Command::AnswerBundlesPrepared { .. }
            | Command::AnswerBundlesCommitted { .. }
            | Command::AskPlacementGroup { .. } => {
                self.fail("no program of the simulation makes placement groups");
            }
        }
    }

    /// The mutation that gives one lease to two owners.
    pub(crate) fn grant_again(&mut self, node: NodeId, message: &Message, first: WorkerId) {
        let other = self.processes.iter().find_map(|(id, process)| {
            let correlation = *process.requests.iter().find(|(_, (_, at))| *at == node)?.0;
            (*id != first).then_some((*id, correlation))
        });
        if let (
            Some((other, correlation)),
            Message::LeaseGranted {
                lease,
                worker,
                first_sequence,
                ..
            },
        ) = (other, message)
        {
            let again = Message::LeaseGranted {
                correlation,
                lease: *lease,
                worker: *worker,
                node,
                first_sequence: *first_sequence,
            };
            self.send(Place::Raylet(node), Place::Process(other), again);
        }
    }

    pub(crate) fn raylet_message(&mut self, node: NodeId, from: Place, message: Message) {
        let sender = match from {
            Place::Process(worker) => worker,
            _ => WorkerId::NIL,
        };
        match message {
            Message::RequestLease {
                key,
                specification,
                redirected,
            } => {
                if self.node_of(from) != node {
                    if let Some(raylet) = self.raylets.get_mut(&node) {
                        raylet.remote_owners.insert(sender);
                    }
                }
                let event = SchedulerEvent::RequestLease {
                    key,
                    specification,
                    preferred: None,
                    redirected,
                };
                self.raylet_step(node, event);
                // The owner may have died before its request arrived.
                if self
                    .raylets
                    .get(&node)
                    .is_some_and(|raylet| raylet.dead.contains(&sender))
                {
                    self.raylet_step(node, SchedulerEvent::OwnerGone { process: sender });
                }
            }
            Message::CancelRequest { key } => self.raylet_step(node, SchedulerEvent::CancelRequest { key }),
            Message::ReturnLease { lease, worker_exits } => {
                self.raylet_step(
                    node,
                    SchedulerEvent::ReturnLease {
                        owner: sender,
                        lease,
                        worker_exits,
                    },
                );
            }
            Message::WorkerBlocked { lease } => {
                self.raylet_step(
                    node,
                    SchedulerEvent::Blocked {
                        worker: sender,
                        lease,
                        reason: "get".into(),
                    },
                );
            }
            Message::WorkerUnblocked { lease } => {
                self.raylet_step(node, SchedulerEvent::Unblocked { worker: sender, lease });
            }
            Message::WatchWorker { worker } => self.watch(node, sender, worker),
            Message::GcsCall { call } => {
                if let GcsCall::WatchActor(key) = &*call {
                    if let Some(raylet) = self.raylets.get_mut(&node) {
                        raylet
                            .actor_watches
                            .entry(sender)
                            .or_default()
                            .insert(key.actor_id.to_vec());
                    }
                }
                self.ask_gcs(node, Asker::Process(sender), sender, *call);
            }
            Message::ActorCreated(created) => {
                let message = ActorCreated {
                    worker: Some(address(node, sender)),
                    ..created
                };
                self.raylet_step(
                    node,
                    SchedulerEvent::ActorAnswered {
                        worker: sender,
                        message,
                    },
                );
            }
            Message::FreeObjects { object } => {
                if let Some(raylet) = self.raylets.get_mut(&node) {
                    raylet.store.remove(&object);
                }
            }
            Message::FetchObject { object, locations } => self.fetch(node, sender, object, locations),
            Message::WatchElsewhere { worker } => {
                let Place::Raylet(other) = from else { return };
                let alive = self.processes.contains_key(&worker);
                let Some(raylet) = self.raylets.get_mut(&node) else {
                    return;
                };
                if alive || !raylet.dead.contains(&worker) {
                    raylet.watchers_elsewhere.entry(worker).or_default().insert(other);
                } else {
                    self.send(Place::Raylet(node), from, Message::DiedElsewhere { worker });
                }
            }
            Message::DiedElsewhere { worker } => self.process_is_dead(node, worker),
            Message::Pull { object } => {
                let contents = self.raylets.get(&node).and_then(|raylet| raylet.store.get(&object));
                let contents = contents.map(|copy| copy.contents.clone());
                self.send(Place::Raylet(node), from, Message::Pulled { object, contents });
            }
            Message::Pulled { object, contents } => {
                if let Place::Raylet(other) = from {
                    self.pull_answered(node, object, other, contents);
                }
            }
            Message::FromGcs(message) => self.on_gcs_message(node, *message),
            Message::GcsReply { correlation, reply } => self.gcs_answer(node, correlation, *reply),
            _ => self.fail(format!("a raylet got {message:?}")),
        }
    }

    pub(crate) fn watch(&mut self, node: NodeId, watcher: WorkerId, worker: WorkerId) {
        let home = self.node_of(Place::Process(worker));
        let gone_here = home == node && !self.processes.contains_key(&worker);
        let Some(raylet) = self.raylets.get_mut(&node) else {
            return;
        };
        let dead = raylet.dead.contains(&worker) || raylet.dead_nodes.contains(&home) || gone_here;
        if dead {
            if !self.mutated(Mutation::ForgetWatch) {
                self.send(
                    Place::Raylet(node),
                    Place::Process(watcher),
                    Message::WorkerDied { worker },
                );
            }
            return;
        }
        raylet.watchers.entry(worker).or_default().insert(watcher);
        if home != node {
            self.watch_elsewhere(node, worker);
        }
    }
}
