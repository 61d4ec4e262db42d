//! Transfer between raylets: owns the links to peers, chunks under way, buffers being filled, and who waits for what.
//!
//! A chunk is served straight from the store: the frame's payload is the object's memory, held while it is sent.
//!
//! Invariants:
//! 1. A waiter is answered once and then forgotten.
//! 2. A buffer that is being filled belongs to a pull; with the pull it goes.

use super::node::{LinkRole, Node};
use crate::objects::RoomFor;
use crate::pull::{PullCommand, PullEvent, WaiterId};
use bytes::Bytes;
use ray_ids::{NodeId, ObjectId};
use ray_rpc::{CloseReason, Frame, Link, Target};
use ray_store::{LocalBuffer, Role, StoredObject};
use ray_wire::{kinds, FetchFailed, ObjectChunk, ObjectLocal, PullChunk};
use std::net::ToSocketAddrs;
use std::sync::Arc;

/// Bytes queued on a link to a peer beyond which chunks are refused for the moment.
const QUEUED_LIMIT_BYTES: usize = 256 << 20;

/// What a waiter wants of an object once it is here.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum WaiterKind {
    /// To hear of it.
    Fetch,
    /// A chunk of it, for another node.
    Serve { offset: u64, length: u64 },
}

/// Somebody who waits for an object.
pub(super) struct Waiter {
    pub link: Arc<Link>,
    pub correlation: u64,
    pub object: ObjectId,
    pub kind: WaiterKind,
}

/// A chunk that was asked for.
#[derive(Debug, Clone, Copy)]
pub(super) struct AskedChunk {
    pub object: ObjectId,
    pub node: NodeId,
    pub offset: u64,
}

/// A part of a stored object, which is held while this lives.
struct Part {
    object: StoredObject,
    start: usize,
    end: usize,
}

impl AsRef<[u8]> for Part {
    fn as_ref(&self) -> &[u8] {
        &self.object[self.start..self.end]
    }
}

impl Node {
    pub(super) fn add_waiter(
        &mut self,
        link: &Arc<Link>,
        correlation: u64,
        object: ObjectId,
        kind: WaiterKind,
    ) -> WaiterId {
        self.next_waiter += 1;
        let waiter = Waiter {
            link: link.clone(),
            correlation,
            object,
            kind,
        };
        self.waiters.insert(self.next_waiter, waiter);
        self.next_waiter
    }

    pub(super) fn cancel_waiters(&mut self, which: impl Fn(&Waiter) -> bool) {
        let ids: Vec<WaiterId> = self
            .waiters
            .iter()
            .filter(|(_, waiter)| which(waiter))
            .map(|(id, _)| *id)
            .collect();
        for id in ids {
            self.waiters.remove(&id);
            // A restore goes on without waiters: it is nearly done, and the next reader is glad of it.
            for waiters in self.restoring.values_mut() {
                waiters.retain(|other| *other != id);
            }
            self.step_pulls(PullEvent::Cancel { waiter: id });
        }
    }

    pub(super) fn tell_local(&mut self, waiter: WaiterId, object: ObjectId, transferred: bool) {
        let Some(waiter) = self.waiters.remove(&waiter) else {
            return;
        };
        match waiter.kind {
            WaiterKind::Fetch => {
                let message = ObjectLocal {
                    object_id: ray_wire::id_bytes(object.as_bytes()),
                    transferred,
                };
                let _ = waiter
                    .link
                    .send(kinds::OBJECT_LOCAL, waiter.correlation, ray_wire::encode(&message), &[]);
            }
            WaiterKind::Serve { offset, length } => {
                self.send_chunk(&waiter.link, waiter.correlation, object, offset, length);
            }
        }
    }

    pub(super) fn tell_failed(
        &mut self,
        waiter: WaiterId,
        object: ObjectId,
        reason: &str,
        absent: Vec<NodeId>,
        store_full: bool,
    ) {
        let Some(waiter) = self.waiters.remove(&waiter) else {
            return;
        };
        let object_id = ray_wire::id_bytes(object.as_bytes());
        match waiter.kind {
            WaiterKind::Fetch => {
                let absent_nodes = absent.iter().map(|node| ray_wire::id_bytes(node.as_bytes())).collect();
                let message = FetchFailed {
                    object_id,
                    reason: reason.into(),
                    absent_nodes,
                    store_full,
                };
                let _ = waiter
                    .link
                    .send(kinds::FETCH_FAILED, waiter.correlation, ray_wire::encode(&message), &[]);
            }
            WaiterKind::Serve { offset, .. } => {
                let absent = !store_full;
                let message = ObjectChunk {
                    object_id,
                    offset,
                    error: reason.into(),
                    absent,
                    ..Default::default()
                };
                let _ = waiter
                    .link
                    .send(kinds::OBJECT_CHUNK, waiter.correlation, ray_wire::encode(&message), &[]);
            }
        }
    }

    /// Another raylet wants a piece.
    pub(super) fn serve_chunk(&mut self, link: &Arc<Link>, frame: &Frame) -> Result<(), String> {
        let message: PullChunk =
            ray_wire::decode("PullChunk", frame.header.clone()).map_err(|error| error.to_string())?;
        let object = ObjectId::from_binary(&message.object_id).map_err(|error| error.to_string())?;
        if link.queued_bytes() > QUEUED_LIMIT_BYTES {
            let error = "too much waits to be sent to this node".to_string();
            let message = ObjectChunk {
                object_id: message.object_id,
                offset: message.offset,
                error,
                ..Default::default()
            };
            let _ = link.send(kinds::OBJECT_CHUNK, frame.correlation, ray_wire::encode(&message), &[]);
            return Ok(());
        }
        self.drain_store();
        if !self.store.contains(&object) && self.spilled.location(&object).is_some() {
            let kind = WaiterKind::Serve {
                offset: message.offset,
                length: message.length,
            };
            let waiter = self.add_waiter(link, frame.correlation, object, kind);
            self.want_object(object, waiter, Vec::new());
        } else {
            self.send_chunk(link, frame.correlation, object, message.offset, message.length);
        }
        Ok(())
    }

    fn send_chunk(&mut self, link: &Arc<Link>, correlation: u64, object: ObjectId, offset: u64, length: u64) {
        let object_id = ray_wire::id_bytes(object.as_bytes());
        let mut message = ObjectChunk {
            object_id,
            offset,
            ..Default::default()
        };
        let mut payload = Vec::new();
        match self.store.read(&object) {
            None => {
                message.absent = true;
                message.error = format!("node {} does not have it", self.node_id);
            }
            Some(stored) => {
                let total = stored.len();
                let start = usize::try_from(offset).unwrap_or(usize::MAX).min(total);
                let length = usize::try_from(length.min(self.limits.object_chunk_bytes.max(1))).unwrap_or(usize::MAX);
                let end = start.saturating_add(length).min(total);
                message.total_bytes = total as u64;
                payload.push(Bytes::from_owner(Part {
                    object: stored,
                    start,
                    end,
                }));
            }
        }
        let _ = link.send(kinds::OBJECT_CHUNK, correlation, ray_wire::encode(&message), &payload);
    }

    /// Another raylet answered.
    pub(super) fn chunk_arrived(&mut self, frame: Frame) -> Result<(), String> {
        let message: ObjectChunk = ray_wire::decode("ObjectChunk", frame.header).map_err(|error| error.to_string())?;
        let Some(asked) = self.asked_chunks.remove(&frame.correlation) else {
            return Ok(());
        };
        let (object, node, offset) = (asked.object, asked.node, asked.offset);
        if message.absent || !message.error.is_empty() {
            let (absent, reason) = (message.absent, message.error);
            self.step_pulls(PullEvent::ChunkFailed {
                object,
                node,
                offset,
                absent,
                reason,
            });
            return Ok(());
        }
        let length = frame.payload.len() as u64;
        self.arriving = Some(frame.payload);
        self.step_pulls(PullEvent::Chunk {
            object,
            node,
            offset,
            length,
            total_bytes: message.total_bytes,
        });
        self.arriving = None;
        Ok(())
    }

    /// Feeds the pulls and carries out what they say.
    pub(super) fn step_pulls(&mut self, event: PullEvent) {
        let now = self.now();
        let commands = self.pulls.step(event, now);
        for command in commands {
            match command {
                PullCommand::Ask {
                    object,
                    node,
                    offset,
                    length,
                } => self.ask_chunk(object, node, offset, length),
                PullCommand::MakeBuffer { object, total_bytes } => {
                    self.held_chunks
                        .insert(object, self.arriving.clone().unwrap_or_default());
                    let capacity = self.store.ledger().capacity;
                    if total_bytes > capacity {
                        self.held_chunks.remove(&object);
                        let reason = format!("it has {total_bytes} bytes and the object store of this node {capacity}");
                        self.later.push_back(PullEvent::BufferRefused { object, reason });
                    } else {
                        self.room.push(RoomFor::Transfer { object }, total_bytes, now);
                    }
                }
                PullCommand::Write { object, offset } => {
                    if let (Some(buffer), Some(bytes)) = (self.buffers.get_mut(&object), self.arriving.as_ref()) {
                        if let Err(reason) = write_at(buffer, offset, bytes) {
                            self.later.push_back(PullEvent::BufferRefused { object, reason });
                        }
                    }
                }
                PullCommand::Seal { object } => self.seal_pulled(object),
                PullCommand::Abort { object } => {
                    self.held_chunks.remove(&object);
                    self.room.retain(|purpose| *purpose != RoomFor::Transfer { object });
                    if let Some(buffer) = self.buffers.remove(&object) {
                        self.store.abort(buffer);
                    }
                }
                PullCommand::Arrived {
                    waiter,
                    object,
                    transferred,
                } => self.tell_local(waiter, object, transferred),
                PullCommand::Failed {
                    waiter,
                    object,
                    reason,
                    absent,
                    store_full,
                } => {
                    self.tell_failed(waiter, object, &reason, absent, store_full);
                }
            }
        }
        // What the commands led to: never inside a step, so that the order of commands is the pulls'.
        while let Some(event) = self.later.pop_front() {
            self.step_pulls(event);
        }
        if !self.room.is_empty() {
            self.serve_room();
        }
    }

    fn seal_pulled(&mut self, object: ObjectId) {
        let Some(mut buffer) = self.buffers.remove(&object) else {
            return;
        };
        // Clients tag what they publish with its format, which its header repeats.
        let mut format = 0;
        if let Ok(bytes) = buffer.writable() {
            if let Some(layout) = ray_wire::layout::StoredLayout::read(bytes) {
                format = layout.format;
                self.owners.add(object, layout.owner, bytes.len() as u64);
            }
        }
        // A copy that a local process published meanwhile is as good.
        match self.store.seal(buffer, format, Role::Cache) {
            Ok(_) => self.tell_location(object),
            Err(ray_store::StoreError::AlreadyExists { .. }) => {}
            Err(error) => eprintln!("raylet: a received object could not be kept: {error}"),
        }
    }

    /// There is room for an object that arrives, or there is none after all.
    pub(super) fn buffer_made(&mut self, object: ObjectId, mut buffer: LocalBuffer, error: Option<String>) {
        let Some(first) = self.held_chunks.remove(&object) else {
            // Nobody waits for it any more.
            return self.store.abort(buffer);
        };
        self.room.retain(|purpose| *purpose != RoomFor::Transfer { object });
        let failure = error.or_else(|| write_at(&mut buffer, 0, &first).err());
        if let Some(reason) = failure {
            self.store.abort(buffer);
            self.later.push_back(PullEvent::BufferRefused { object, reason });
        } else {
            self.buffers.insert(object, buffer);
            self.later.push_back(PullEvent::BufferMade { object });
        }
        self.run_later_soon();
    }

    fn run_later_soon(&mut self) {
        // `serve_room` runs inside or outside a step; outside, nobody else takes what waits.
        if !self.has_timer(super::node::Timer::Later) {
            self.at(0, super::node::Timer::Later);
        }
    }

    /// Takes what waited for the end of a step.
    pub(super) fn run_later(&mut self) {
        while let Some(event) = self.later.pop_front() {
            self.step_pulls(event);
        }
    }

    fn ask_chunk(&mut self, object: ObjectId, node: NodeId, offset: u64, length: u64) {
        let failed = |reason: String, absent: bool| PullEvent::ChunkFailed {
            object,
            node,
            offset,
            absent,
            reason,
        };
        let link = match self.peer_link(node) {
            Ok(link) => link,
            Err((reason, absent)) => {
                self.later.push_back(failed(reason, absent));
                return self.run_later_soon();
            }
        };
        self.next_chunk += 1;
        let message = PullChunk {
            object_id: ray_wire::id_bytes(object.as_bytes()),
            offset,
            length,
        };
        match link.send(kinds::PULL_CHUNK, self.next_chunk, ray_wire::encode(&message), &[]) {
            Ok(()) => {
                self.asked_chunks
                    .insert(self.next_chunk, AskedChunk { object, node, offset });
            }
            Err(error) => {
                self.later.push_back(failed(error.to_string(), false));
                self.run_later_soon();
            }
        }
    }

    /// The link to another raylet, opened where there is none. The flag beside a failure: the node is not there at all.
    pub(super) fn peer_link(&mut self, node: NodeId) -> Result<Arc<Link>, (String, bool)> {
        if let Some(link) = self.peers.get(&node).filter(|link| link.is_open()) {
            return Ok(link.clone());
        }
        let Some(address) = self.nodes.get(&node).and_then(|info| info.address.clone()) else {
            return Err((format!("node {node} is not in the cluster"), true));
        };
        let host = (address.host.as_str(), address.port as u16);
        let resolved = host.to_socket_addrs().ok().and_then(|mut addresses| addresses.next());
        let Some(resolved) = resolved else {
            return Err((format!("{}:{} has no address", address.host, address.port), false));
        };
        let link = self
            .reactor
            .connect_tcp(resolved, Target::raylet(node), self.token.clone())
            .map_err(|error| (error.to_string(), false))?;
        self.links.insert(link.id(), (link.clone(), LinkRole::Raylet(node)));
        self.peers.insert(node, link.clone());
        Ok(link)
    }

    /// A link to another raylet closed.
    pub(super) fn peer_closed(&mut self, node: NodeId, link: &Arc<Link>) {
        if self.peers.get(&node).is_some_and(|known| known.id() == link.id()) {
            self.peers.remove(&node);
            self.asked_chunks.retain(|_, asked| asked.node != node);
            self.step_pulls(PullEvent::NodeGone { node, dead: false });
            self.elsewhere_link_closed(&node);
        }
    }

    /// A node is dead: nothing comes from it.
    pub(super) fn objects_node_died(&mut self, node: NodeId) {
        if let Some(link) = self.peers.remove(&node) {
            link.close(CloseReason::local(format!("node {node} is dead")));
        }
        self.asked_chunks.retain(|_, asked| asked.node != node);
        self.step_pulls(PullEvent::NodeGone { node, dead: true });
    }
}

fn write_at(buffer: &mut LocalBuffer, offset: u64, bytes: &[u8]) -> Result<(), String> {
    let start = offset as usize;
    let target = buffer.writable().map_err(|error| error.to_string())?;
    // The pulls let only chunks through that lie inside the object.
    let target = target
        .get_mut(start..start + bytes.len())
        .ok_or("a chunk lies outside its object")?;
    target.copy_from_slice(bytes);
    Ok(())
}
