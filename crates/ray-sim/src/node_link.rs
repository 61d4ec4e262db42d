//! A raylet's link to the control plane: registration, what is asked and told, and coming back.
//!
//! Invariant: 1. Nothing but the registration is sent before the control plane answered it.

use ray_gcs::{GcsMessage, NodeMessage};
use ray_ids::{JobId, NodeId, WorkerId};
use ray_raylet::types::Event as SchedulerEvent;
use ray_wire::{id_bytes, GcsCall, GcsReply, GcsRequest, NodeInfo, ProcessWatches, RegisterNode};

use crate::model::{Message, Place};
use crate::mutation::Mutation;
use crate::node::{address, amounts, Asker};
use crate::world::{Event, World, MS};

impl World {
    pub(crate) fn connect_gcs(&mut self, node: NodeId) {
        let Some(raylet) = self.raylets.get(&node) else { return };
        if raylet.registered || raylet.connecting {
            return;
        }
        if !self.control.is_up() {
            let delay = self.random.between(5, 50) * MS;
            return self.at(delay, Event::ConnectGcs(node));
        }
        self.cut(Place::Raylet(node), Place::Gcs);
        let epoch = self.link_epoch(Place::Raylet(node), Place::Gcs);
        self.gcs_link_up(node, epoch);
        let message = self.registration(node);
        self.tell_gcs(
            node,
            NodeMessage::Register {
                correlation: 1,
                message: Box::new(message),
            },
        );
        if let Some(raylet) = self.raylets.get_mut(&node) {
            raylet.connecting = true;
        }
    }

    pub(crate) fn registration(&mut self, node: NodeId) -> RegisterNode {
        let lose_reports = self.mutated(Mutation::LoseDeathReport);
        let is_head = node == self.head || self.head.is_nil();
        let Some(raylet) = self.raylets.get_mut(&node) else {
            return RegisterNode::default();
        };
        raylet.placements_seen = 0;
        raylet.deaths_registered = raylet.next_correlation - 1;
        raylet.held.clear();
        raylet.report_sequence += 1;
        let mut report = raylet.scheduler.resource_report();
        report.sequence = raylet.report_sequence;
        let watches = raylet.actor_watches.iter().map(|(worker, actors)| ProcessWatches {
            worker_id: id_bytes(worker.as_bytes()),
            actor_ids: actors.iter().map(|actor| id_bytes(actor)).collect(),
            channels: Vec::new(),
        });
        RegisterNode {
            node: Some(NodeInfo {
                address: Some(address(node, WorkerId::NIL)),
                total: amounts(&raylet.total),
                available: amounts(&raylet.total),
                is_head,
                alive: true,
                ..NodeInfo::default()
            }),
            actors: raylet.scheduler.actors_here(),
            bundles: raylet.scheduler.bundle_keys(),
            resources: Some(report),
            driver_jobs: raylet.drivers.values().map(|job| id_bytes(job.as_bytes())).collect(),
            publisher_epoch: raylet.publisher.0,
            publisher_sequence: raylet.publisher.1,
            watches: watches.collect(),
            deaths: raylet.deaths.values().filter(|_| !lose_reports).cloned().collect(),
        }
    }

    /// The raylet notices that its link is gone, and will open another.
    pub(crate) fn raylet_lost_gcs(&mut self, node: NodeId) {
        let Some(raylet) = self.raylets.get_mut(&node) else {
            return;
        };
        raylet.registered = false;
        raylet.connecting = false;
        raylet.last_report = None;
        let delay = self.random.between(2, 80) * MS;
        self.at(delay, Event::ConnectGcs(node));
    }

    /// The link breaks: both sides notice, each in its time.
    pub(crate) fn break_gcs_link(&mut self, node: NodeId) {
        if !self.control.is_up() || self.raylets.get(&node).is_none_or(|raylet| !raylet.registered) {
            return;
        }
        self.truth.breaks += 1;
        let epoch = self.link_epoch(Place::Raylet(node), Place::Gcs);
        self.cut(Place::Raylet(node), Place::Gcs);
        let delay = self.random.between(1, 50) * MS;
        self.at(delay, Event::GcsLinkDown { node, epoch });
        self.raylet_lost_gcs(node);
    }

    pub(crate) fn tell_gcs(&mut self, node: NodeId, message: NodeMessage) {
        self.send(Place::Raylet(node), Place::Gcs, Message::ToGcs(Box::new(message)));
    }

    pub(crate) fn tell_gcs_if_registered(&mut self, node: NodeId, message: NodeMessage) {
        if self.raylets.get(&node).is_some_and(|raylet| raylet.registered) {
            self.tell_gcs(node, message);
        }
    }

    /// Answers what the control plane asked; after the registration, where one is under way that does not show it.
    pub(crate) fn answer_gcs(&mut self, node: NodeId, message: NodeMessage) {
        let forget = self.mutated(Mutation::ForgetHeldAnswers);
        match self.raylets.get_mut(&node) {
            Some(raylet) if raylet.registered => self.tell_gcs(node, message),
            Some(raylet) if raylet.connecting && !forget => raylet.held.push(message),
            _ => {}
        }
    }

    pub(crate) fn ask_gcs(&mut self, node: NodeId, asker: Asker, sender: WorkerId, call: GcsCall) {
        let request_id = self.random.next_u64().max(1);
        let Some(raylet) = self.raylets.get_mut(&node) else {
            return;
        };
        let request = GcsRequest {
            request_id,
            sender: Some(address(node, sender)),
            call: Some(call),
        };
        let correlation = raylet.next_correlation;
        raylet.next_correlation += 1;
        raylet.pending.insert(correlation, (asker, request.clone()));
        self.tell_gcs_if_registered(
            node,
            NodeMessage::Request {
                correlation,
                request: Box::new(request),
            },
        );
    }

    pub(crate) fn gcs_registered(&mut self, node: NodeId, message: ray_wire::NodeRegistered) {
        if !message.refusal.is_empty() {
            return self.kill_node(node);
        }
        let forget = self.mutated(Mutation::ForgetWatchAfterReconnection);
        let forget_requests = self.mutated(Mutation::ForgetGcsRequest);
        let lose_reports = self.mutated(Mutation::LoseDeathReport);
        let Some(raylet) = self.raylets.get_mut(&node) else {
            return;
        };
        raylet.registered = true;
        raylet.connecting = false;
        if raylet.publisher.0 != message.publisher_epoch {
            raylet.publisher = (message.publisher_epoch, 0);
        }
        let again: Vec<(u64, GcsRequest)> = raylet
            .pending
            .iter()
            .map(|(id, (_, request))| (*id, request.clone()))
            .collect();
        let told = raylet.deaths_registered;
        raylet.deaths.retain(|correlation, _| *correlation > told);
        let deaths = raylet.deaths.clone();
        let watched = raylet.remote_interest(node);
        let known = raylet.ever_registered;
        raylet.ever_registered = true;
        for held in std::mem::take(&mut raylet.held) {
            self.tell_gcs(node, held);
        }
        for info in &message.nodes {
            if let Some(id) = info
                .address
                .as_ref()
                .and_then(|address| address.node().ok())
                .filter(|_| !info.alive)
            {
                self.node_is_dead(node, id);
            }
        }
        self.raylet_step(node, SchedulerEvent::ClusterChanged { nodes: message.nodes });
        for message in message.superseded {
            self.raylet_step(node, SchedulerEvent::KillActorWorker { message });
        }
        for job in message
            .finished_jobs
            .iter()
            .filter_map(|job| JobId::from_binary(job).ok())
        {
            self.job_is_over(node, job);
        }
        if !(known && forget_requests) {
            for (correlation, request) in again {
                self.tell_gcs(
                    node,
                    NodeMessage::Request {
                        correlation,
                        request: Box::new(request),
                    },
                );
            }
        }
        for (correlation, report) in deaths.into_iter().filter(|_| !lose_reports) {
            self.tell_gcs(node, NodeMessage::WorkerDeath { correlation, report });
        }
        for worker in watched.into_iter().filter(|_| known && !forget) {
            self.watch_elsewhere(node, worker);
        }
        self.report_soon(node);
    }

    pub(crate) fn watch_elsewhere(&mut self, node: NodeId, worker: WorkerId) {
        let home = self.node_of(Place::Process(worker));
        if home == node {
            return;
        }
        let dead = self
            .raylets
            .get(&node)
            .is_some_and(|raylet| raylet.dead_nodes.contains(&home));
        if dead {
            return self.process_is_dead(node, worker);
        }
        self.send(
            Place::Raylet(node),
            Place::Raylet(home),
            Message::WatchElsewhere { worker },
        );
    }

    pub(crate) fn report_soon(&mut self, node: NodeId) {
        if let Some(raylet) = self.raylets.get_mut(&node) {
            if !std::mem::replace(&mut raylet.report_due, true) {
                self.at(10 * MS, Event::RayletReport(node));
            }
        }
    }

    pub(crate) fn raylet_report(&mut self, node: NodeId) {
        let Some(raylet) = self.raylets.get_mut(&node) else {
            return;
        };
        raylet.report_due = false;
        if !raylet.registered {
            return;
        }
        let mut report = raylet.scheduler.resource_report();
        report.placements_seen = raylet.placements_seen;
        if raylet.last_report.as_ref() == Some(&report) {
            return;
        }
        raylet.last_report = Some(report.clone());
        raylet.report_sequence += 1;
        report.sequence = raylet.report_sequence;
        self.tell_gcs(node, NodeMessage::ResourceReport(report));
    }

    pub(crate) fn on_gcs_message(&mut self, node: NodeId, message: GcsMessage) {
        match message {
            GcsMessage::NodeRegistered { message, .. } => self.gcs_registered(node, *message),
            GcsMessage::ClusterUpdate(update) => {
                self.raylet_step(node, SchedulerEvent::ClusterChanged { nodes: update.nodes });
            }
            GcsMessage::NodeDied(died) => {
                if let Ok(dead) = NodeId::from_binary(&died.node_id) {
                    self.node_is_dead(node, dead);
                }
            }
            GcsMessage::Publication(publication) => {
                if let Some(raylet) = self.raylets.get_mut(&node) {
                    raylet.publisher = (publication.epoch, raylet.publisher.1.max(publication.sequence));
                }
                let Some(state) = publication.actor else { return };
                for worker in publication
                    .subscribers
                    .iter()
                    .filter_map(|id| WorkerId::from_binary(id).ok())
                {
                    let message = Message::Publication(Box::new(state.clone()));
                    self.send(Place::Raylet(node), Place::Process(worker), message);
                }
            }
            GcsMessage::PlaceActor(message) => {
                if let Some(raylet) = self.raylets.get_mut(&node) {
                    raylet.placements_seen += 1;
                }
                self.raylet_step(node, SchedulerEvent::PlaceActor { message: *message });
            }
            GcsMessage::KillActorWorker(_) if self.mutated(Mutation::LoseKillActor) => {}
            GcsMessage::KillActorWorker(message) => {
                self.raylet_step(node, SchedulerEvent::KillActorWorker { message });
            }
            GcsMessage::WorkerDied(died) => {
                if let Some(worker) = died.worker.as_ref().and_then(|address| address.worker().ok()) {
                    self.process_is_dead(node, worker);
                }
            }
            GcsMessage::JobFinished(message) => {
                if let Ok(job) = JobId::from_binary(&message.job_id) {
                    self.job_is_over(node, job);
                }
            }
            GcsMessage::DeclaredDead(_) => self.kill_node(node),
            GcsMessage::Ping => self.tell_gcs(node, NodeMessage::Pong),
            _ => {}
        }
    }

    pub(crate) fn job_is_over(&mut self, node: NodeId, job: JobId) {
        let driver = self.raylets.get(&node).and_then(|raylet| {
            raylet
                .drivers
                .iter()
                .find(|(_, of)| **of == job)
                .map(|(driver, _)| *driver)
        });
        if let Some(driver) = driver {
            self.kill_process(driver);
        }
        self.raylet_step(node, SchedulerEvent::JobFinished { job });
    }

    pub(crate) fn gcs_answer(&mut self, node: NodeId, correlation: u64, reply: GcsReply) {
        let Some((asker, _)) = self
            .raylets
            .get_mut(&node)
            .and_then(|raylet| raylet.pending.remove(&correlation))
        else {
            if let Some(raylet) = self.raylets.get_mut(&node) {
                raylet.deaths.remove(&correlation);
            }
            return;
        };
        match asker {
            Asker::Process(worker) => {
                let message = Message::GcsAnswer { reply: Box::new(reply) };
                self.send(Place::Raylet(node), Place::Process(worker), message);
            }
            Asker::Driver(worker) => self.job_added(node, worker, JobId::from_int(reply.number as u32)),
            Asker::Nobody => {}
        }
    }
}
