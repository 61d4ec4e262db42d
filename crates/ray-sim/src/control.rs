//! The shell of the control plane: owns the machine while it is up, what it made durable, and each node's link to it.
//!
//! Invariant: 1. What a step persists is durable before anything else of the step is carried out, also when the control
//! plane is killed right afterwards.

use std::collections::BTreeMap;

use bytes::Bytes;
use ray_gcs::{Command, Event as GcsEvent, Gcs, GcsMessage, GcsSettings, NodeMessage, Row, Table};
use ray_ids::NodeId;

use crate::model::{Message, Place};
use crate::mutation::Mutation;
use crate::random::Random;
use crate::world::{Ambush, Event, World, MS};

/// The control plane and its disk.
#[derive(Debug)]
pub struct ControlPlane {
    gcs: Option<Gcs>,
    rows: BTreeMap<(Table, Bytes), Bytes>,
    random: Random,
    tick_at: Option<u64>,
    /// Nodes whose present link is open, with the link's epoch.
    connected: BTreeMap<NodeId, u64>,
}

fn settings() -> GcsSettings {
    GcsSettings {
        node_reconnect_grace_ms: 3_000,
        ..GcsSettings::default()
    }
}

impl ControlPlane {
    /// A control plane for a new cluster.
    pub fn new(random: &mut Random) -> Self {
        let mut random = Random::new(random.next_u64());
        let gcs = Gcs::new(settings(), 0, &mut || random.next_u64());
        Self {
            gcs: Some(gcs),
            rows: BTreeMap::new(),
            random,
            tick_at: None,
            connected: BTreeMap::new(),
        }
    }

    /// Whether it runs.
    pub fn is_up(&self) -> bool {
        self.gcs.is_some()
    }
}

impl World {
    /// A node opened a link.
    pub(crate) fn gcs_link_up(&mut self, node: NodeId, epoch: u64) {
        self.control.connected.insert(node, epoch);
    }

    pub(crate) fn gcs_link_down(&mut self, node: NodeId, epoch: u64) {
        if self.control.connected.get(&node) == Some(&epoch) {
            self.control.connected.remove(&node);
            self.gcs_step(GcsEvent::NodeLinkDown {
                node,
                reason: "it broke".into(),
            });
        }
    }

    pub(crate) fn gcs_message(&mut self, from: Place, message: Message) {
        let (Place::Raylet(node), Message::ToGcs(message)) = (from, message) else {
            return;
        };
        let message = match *message {
            NodeMessage::Request { correlation, request } => NodeMessage::Request { correlation, request },
            other => other,
        };
        self.gcs_step(GcsEvent::FromNode { node, message });
    }

    pub(crate) fn gcs_tick(&mut self) {
        self.control.tick_at = None;
        self.gcs_step(GcsEvent::Tick);
    }

    fn gcs_step(&mut self, event: GcsEvent) {
        let now_ms = self.now / MS;
        let control = &mut self.control;
        let Some(gcs) = control.gcs.as_mut() else { return };
        let random = &mut control.random;
        let commands = gcs.step(event, now_ms, &mut || random.next_u64());
        if let Err(error) = gcs.validate() {
            return self.fail(format!("the control plane: {error}"));
        }
        self.gcs_carry_out(commands);
    }

    fn gcs_carry_out(&mut self, commands: Vec<Command>) {
        for command in commands {
            match command {
                Command::Persist(mutations) => {
                    for mutation in mutations {
                        let actor = mutation.table == Table::Actors && self.mutated_sometimes(Mutation::ForgetPersist);
                        if actor {
                            continue;
                        }
                        let key = (mutation.table, mutation.key);
                        match mutation.value {
                            Some(value) => drop(self.control.rows.insert(key, value)),
                            None => drop(self.control.rows.remove(&key)),
                        }
                    }
                }
                Command::SendToNode { node, message } => {
                    self.gcs_send(node, Message::FromGcs(Box::new(message)));
                }
                Command::ReplyToNode {
                    node,
                    correlation,
                    reply,
                } => {
                    self.gcs_send(node, Message::GcsReply { correlation, reply });
                }
                Command::CloseNode { node, .. } => {
                    if self.control.connected.remove(&node).is_some() {
                        self.at(20 * MS, Event::ConnectGcs(node));
                    }
                }
            }
        }
        self.gcs_schedule();
    }

    fn gcs_send(&mut self, node: NodeId, message: Message) {
        if self.control.connected.contains_key(&node) {
            let notice = matches!(&message, Message::FromGcs(inner) if matches!(**inner, GcsMessage::WorkerDied(_)));
            self.send(Place::Gcs, Place::Raylet(node), message);
            if notice && self.ambush(Ambush::Notice) {
                self.break_gcs_link(node);
            }
        }
    }

    fn gcs_schedule(&mut self) {
        let Some(deadline_ms) = self.control.gcs.as_ref().and_then(Gcs::next_deadline) else {
            return;
        };
        let at = (deadline_ms * MS).max(self.now + 1);
        if self.control.tick_at.is_none_or(|known| at < known) {
            self.control.tick_at = Some(at);
            self.at(at - self.now, Event::GcsTick);
        }
    }

    /// Kills the control plane; it starts again after a while.
    pub(crate) fn kill_gcs(&mut self) {
        if self.control.gcs.take().is_none() {
            return;
        }
        self.truth.deaths += 1;
        self.control.tick_at = None;
        let nodes: Vec<NodeId> = self.raylets.keys().copied().collect();
        self.control.connected.clear();
        for node in nodes {
            self.cut(Place::Raylet(node), Place::Gcs);
            self.raylet_lost_gcs(node);
        }
        let delay = self.random.between(5, 1_500) * MS;
        self.at(delay, Event::GcsRestart);
    }

    pub(crate) fn restart_gcs(&mut self) {
        let rows = self
            .control
            .rows
            .iter()
            .map(|((table, key), value)| Row {
                table: *table,
                key: key.clone(),
                value: value.clone(),
            })
            .collect();
        let now_ms = self.now / MS;
        let random = &mut self.control.random;
        match Gcs::restore(settings(), rows, now_ms, &mut || random.next_u64()) {
            Ok((gcs, commands)) => {
                self.control.gcs = Some(gcs);
                self.gcs_carry_out(commands);
            }
            Err(error) => self.fail(format!("the control plane did not start again: {error}")),
        }
    }
}
