//! Objects that arrive from other nodes: owns which are pulled, from where, and who waits for each.
//!
//! Several waiters share one pull. Chunks are asked of all known holders in turn, a window at a time; a holder that does
//! not have the object, fails or is too slow is left for another. How many bytes arrive at once is limited; further
//! pulls wait their turn.
//!
//! It refuses chunks that were not asked for.
//!
//! Invariants:
//! 1. An object has at most one pull; a waiter waits in at most one.
//! 2. A chunk is asked of one holder at a time; a pull without holders, chunks under way or a wait for room is over.
//! 3. The sizes of admitted pulls sum to at most the limit, but one is always admitted.

use crate::types::Milliseconds;
use ray_ids::{NodeId, ObjectId};
use std::collections::{BTreeMap, BTreeSet, VecDeque};

/// Names whoever waits for an object; the shell knows who that is.
pub type WaiterId = u64;

/// The limits of pulls.
#[derive(Debug, Clone)]
pub struct PullLimits {
    pub chunk_bytes: u64,
    /// Chunks of one object asked for at once.
    pub window: usize,
    pub chunk_timeout_ms: u64,
    /// Bytes that arrive at once, of all objects.
    pub total_bytes: u64,
}

/// What happens to pulls.
#[derive(Debug, Clone)]
pub enum PullEvent {
    Fetch {
        object: ObjectId,
        waiter: WaiterId,
        locations: Vec<NodeId>,
    },
    /// A waiter no longer waits.
    Cancel {
        waiter: WaiterId,
    },
    /// A chunk arrived; its bytes are in the shell's hands.
    Chunk {
        object: ObjectId,
        node: NodeId,
        offset: u64,
        length: u64,
        total_bytes: u64,
    },
    /// A holder does not have it, or failed.
    ChunkFailed {
        object: ObjectId,
        node: NodeId,
        offset: u64,
        absent: bool,
        reason: String,
    },
    /// The link to a node closed: what was asked of it does not come. Dead: it is no holder either.
    NodeGone {
        node: NodeId,
        dead: bool,
    },
    /// The buffer is there.
    BufferMade {
        object: ObjectId,
    },
    /// There can be no buffer.
    BufferRefused {
        object: ObjectId,
        reason: String,
    },
    /// The object is here, by whatever way.
    Local {
        object: ObjectId,
    },
    /// Its owner let go of it or died.
    Freed {
        object: ObjectId,
        reason: String,
    },
    Tick,
}

/// What the shell is to do.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum PullCommand {
    Ask {
        object: ObjectId,
        node: NodeId,
        offset: u64,
        length: u64,
    },
    /// Make a buffer of this size, when there is room, and answer with `BufferMade` or `BufferRefused`. The bytes of the
    /// chunk that just arrived are kept until then.
    MakeBuffer { object: ObjectId, total_bytes: u64 },
    /// Copy the bytes of the chunk that just arrived to their place.
    Write { object: ObjectId, offset: u64 },
    /// Everything is there.
    Seal { object: ObjectId },
    /// Give the buffer up.
    Abort { object: ObjectId },
    Arrived {
        waiter: WaiterId,
        object: ObjectId,
        transferred: bool,
    },
    Failed {
        waiter: WaiterId,
        object: ObjectId,
        reason: String,
        absent: Vec<NodeId>,
        store_full: bool,
    },
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Phase {
    /// Not admitted yet.
    Waiting,
    /// The first chunk is under way: it tells the size.
    Probing,
    /// The first chunk is here and there is no buffer yet.
    Room,
    Receiving,
}

#[derive(Debug)]
struct Pull {
    phase: Phase,
    waiters: Vec<WaiterId>,
    /// Holders to ask, in turn.
    holders: VecDeque<NodeId>,
    absent: BTreeSet<NodeId>,
    /// Holders that failed, with the last reason; they are asked again if nobody else is left.
    failed: BTreeMap<NodeId, u32>,
    last_reason: String,
    total_bytes: u64,
    /// Offsets asked for and not here: of whom, how long, since when.
    under_way: BTreeMap<u64, (NodeId, u64, Milliseconds)>,
    /// Offsets that must be asked for again, with their lengths.
    again: BTreeMap<u64, u64>,
    next_offset: u64,
    received: u64,
}

/// How often a holder may fail before it is given up.
const FAILURES_A_HOLDER: u32 = 3;

/// The pulls.
#[derive(Debug)]
pub struct Pulls {
    limits: PullLimits,
    pulls: BTreeMap<ObjectId, Pull>,
    turn: VecDeque<ObjectId>,
    waiter_of: BTreeMap<WaiterId, ObjectId>,
}

impl Pulls {
    /// None.
    pub fn new(limits: PullLimits) -> Self {
        Self {
            limits,
            pulls: BTreeMap::new(),
            turn: VecDeque::new(),
            waiter_of: BTreeMap::new(),
        }
    }

    /// Whether an object is being pulled.
    pub fn contains(&self, object: &ObjectId) -> bool {
        self.pulls.contains_key(object)
    }

    /// How many objects are pulled or wait to be.
    pub fn len(&self) -> usize {
        self.pulls.len()
    }

    /// Whether none is.
    pub fn is_empty(&self) -> bool {
        self.pulls.is_empty()
    }

    /// Each pull in words: its object, what it waits for, bytes here and in all.
    pub fn describe(&self) -> Vec<(ObjectId, String, u64, u64)> {
        let state = |pull: &Pull| match pull.phase {
            Phase::Waiting => "it waits until less arrives at once".to_string(),
            Phase::Probing => "its first chunk is asked for".to_string(),
            Phase::Room => "it waits for room in the object store".to_string(),
            Phase::Receiving => format!("{} chunk(s) are under way", pull.under_way.len()),
        };
        self.pulls
            .iter()
            .map(|(id, pull)| (*id, state(pull), pull.received, pull.total_bytes))
            .collect()
    }

    /// When `Tick` is due.
    pub fn next_tick(&self) -> Option<Milliseconds> {
        let since = self
            .pulls
            .values()
            .flat_map(|pull| pull.under_way.values().map(|(_, _, since)| *since));
        since.min().map(|since| since + self.limits.chunk_timeout_ms)
    }

    /// Takes in what happened.
    pub fn step(&mut self, event: PullEvent, now: Milliseconds) -> Vec<PullCommand> {
        let mut out = Vec::new();
        match event {
            PullEvent::Fetch {
                object,
                waiter,
                locations,
            } => self.fetch(object, waiter, locations),
            PullEvent::Cancel { waiter } => self.cancel(waiter, &mut out),
            PullEvent::Chunk {
                object,
                node,
                offset,
                length,
                total_bytes,
            } => {
                self.chunk(object, node, offset, length, total_bytes, &mut out);
            }
            PullEvent::ChunkFailed {
                object,
                node,
                offset,
                absent,
                reason,
            } => {
                self.chunk_failed(object, node, offset, absent, reason);
            }
            PullEvent::NodeGone { node, dead } => self.node_gone(node, dead),
            PullEvent::BufferMade { object } => {
                if let Some(pull) = self.pulls.get_mut(&object).filter(|pull| pull.phase == Phase::Room) {
                    pull.phase = Phase::Receiving;
                    self.note_received(object, &mut out);
                }
            }
            PullEvent::BufferRefused { object, reason } => self.end(object, &reason, true, &mut out),
            PullEvent::Local { object } => {
                if let Some(pull) = self.remove(&object) {
                    if matches!(pull.phase, Phase::Receiving | Phase::Room) {
                        out.push(PullCommand::Abort { object });
                    }
                    for waiter in pull.waiters {
                        out.push(PullCommand::Arrived {
                            waiter,
                            object,
                            transferred: false,
                        });
                    }
                }
            }
            PullEvent::Freed { object, reason } => self.end(object, &reason, false, &mut out),
            PullEvent::Tick => self.time_out(now),
        }
        self.go_on(now, &mut out);
        out
    }

    fn fetch(&mut self, object: ObjectId, waiter: WaiterId, locations: Vec<NodeId>) {
        self.waiter_of.insert(waiter, object);
        let turn = &mut self.turn;
        let pull = self.pulls.entry(object).or_insert_with(|| {
            turn.push_back(object);
            Pull {
                phase: Phase::Waiting,
                waiters: Vec::new(),
                holders: VecDeque::new(),
                absent: BTreeSet::new(),
                failed: BTreeMap::new(),
                last_reason: String::new(),
                total_bytes: 0,
                under_way: BTreeMap::new(),
                again: BTreeMap::new(),
                next_offset: 0,
                received: 0,
            }
        });
        pull.waiters.push(waiter);
        for node in locations {
            // Whoever names a holder knows more than an earlier refusal does.
            pull.absent.remove(&node);
            pull.failed.remove(&node);
            if !pull.holders.contains(&node) {
                pull.holders.push_back(node);
            }
        }
    }

    fn cancel(&mut self, waiter: WaiterId, out: &mut Vec<PullCommand>) {
        let Some(object) = self.waiter_of.remove(&waiter) else {
            return;
        };
        let Some(pull) = self.pulls.get_mut(&object) else {
            return;
        };
        pull.waiters.retain(|other| *other != waiter);
        if pull.waiters.is_empty() {
            if pull.phase == Phase::Receiving || pull.phase == Phase::Room {
                out.push(PullCommand::Abort { object });
            }
            self.remove(&object);
        }
    }

    fn remove(&mut self, object: &ObjectId) -> Option<Pull> {
        let pull = self.pulls.remove(object)?;
        self.turn.retain(|other| other != object);
        for waiter in &pull.waiters {
            self.waiter_of.remove(waiter);
        }
        Some(pull)
    }

    fn end(&mut self, object: ObjectId, reason: &str, store_full: bool, out: &mut Vec<PullCommand>) {
        let Some(pull) = self.remove(&object) else { return };
        if pull.phase == Phase::Receiving || pull.phase == Phase::Room {
            out.push(PullCommand::Abort { object });
        }
        let absent: Vec<NodeId> = pull.absent.iter().copied().collect();
        for waiter in pull.waiters {
            let (reason, absent) = (reason.to_string(), absent.clone());
            out.push(PullCommand::Failed {
                waiter,
                object,
                reason,
                absent,
                store_full,
            });
        }
    }

    fn chunk(
        &mut self,
        object: ObjectId,
        node: NodeId,
        offset: u64,
        length: u64,
        total: u64,
        out: &mut Vec<PullCommand>,
    ) {
        let Some(pull) = self.pulls.get_mut(&object) else {
            return;
        };
        let asked = pull.under_way.get(&offset).is_some_and(|(asked, _, _)| *asked == node);
        if !asked {
            return;
        }
        let wanted = pull.under_way.remove(&offset).map_or(0, |(_, wanted, _)| wanted);
        let expected = wanted.min(total.saturating_sub(offset));
        let known = pull.phase != Phase::Probing;
        if length != expected || (known && total != pull.total_bytes) {
            pull.last_reason =
                format!("node {node} sent {length} bytes at {offset} of {total}, where {expected} were due");
            pull.again.insert(offset, wanted);
            *pull.failed.entry(node).or_default() += 1;
            return;
        }
        pull.received += length;
        if pull.phase == Phase::Probing {
            pull.total_bytes = total;
            pull.next_offset = length;
            pull.phase = Phase::Room;
            out.push(PullCommand::MakeBuffer {
                object,
                total_bytes: total,
            });
        } else {
            out.push(PullCommand::Write { object, offset });
            self.note_received(object, out);
        }
    }

    fn note_received(&mut self, object: ObjectId, out: &mut Vec<PullCommand>) {
        let complete = self
            .pulls
            .get(&object)
            .is_some_and(|pull| pull.phase == Phase::Receiving && pull.received == pull.total_bytes);
        if !complete {
            return;
        }
        let Some(pull) = self.remove(&object) else { return };
        out.push(PullCommand::Seal { object });
        for waiter in pull.waiters {
            out.push(PullCommand::Arrived {
                waiter,
                object,
                transferred: true,
            });
        }
    }

    fn chunk_failed(&mut self, object: ObjectId, node: NodeId, offset: u64, absent: bool, reason: String) {
        let Some(pull) = self.pulls.get_mut(&object) else {
            return;
        };
        if pull.under_way.get(&offset).is_none_or(|(asked, _, _)| *asked != node) {
            return;
        }
        if let Some((_, length, _)) = pull.under_way.remove(&offset) {
            pull.again.insert(offset, length);
        }
        pull.last_reason = reason;
        if absent {
            pull.absent.insert(node);
        } else {
            *pull.failed.entry(node).or_default() += 1;
        }
    }

    fn node_gone(&mut self, node: NodeId, dead: bool) {
        for pull in self.pulls.values_mut() {
            let lost: Vec<u64> = pull
                .under_way
                .iter()
                .filter(|(_, (asked, _, _))| *asked == node)
                .map(|(offset, _)| *offset)
                .collect();
            for offset in &lost {
                if let Some((_, length, _)) = pull.under_way.remove(offset) {
                    pull.again.insert(*offset, length);
                }
            }
            if dead {
                if pull.holders.contains(&node) {
                    pull.absent.insert(node);
                    pull.last_reason = format!("node {node} died");
                }
            } else if !lost.is_empty() {
                pull.last_reason = format!("the link to node {node} closed");
                *pull.failed.entry(node).or_default() += 1;
            }
        }
    }

    fn time_out(&mut self, now: Milliseconds) {
        let limit_ms = self.limits.chunk_timeout_ms;
        for pull in self.pulls.values_mut() {
            let late: Vec<(u64, NodeId)> = pull
                .under_way
                .iter()
                .filter(|(_, (_, _, since))| now >= since + limit_ms)
                .map(|(offset, (node, _, _))| (*offset, *node))
                .collect();
            for (offset, node) in late {
                if let Some((_, length, _)) = pull.under_way.remove(&offset) {
                    pull.again.insert(offset, length);
                }
                pull.last_reason = format!("node {node} did not send a chunk within {limit_ms} ms");
                *pull.failed.entry(node).or_default() += 1;
            }
        }
    }

    /// Admits, asks for what is due, and ends what has no holder left.
    fn go_on(&mut self, now: Milliseconds, out: &mut Vec<PullCommand>) {
        let size = |pull: &Pull, chunk: u64| if pull.total_bytes > 0 { pull.total_bytes } else { chunk };
        let chunk_bytes = self.limits.chunk_bytes;
        let mut arriving: u64 = self
            .pulls
            .values()
            .filter(|pull| pull.phase != Phase::Waiting)
            .map(|pull| size(pull, chunk_bytes))
            .sum();
        let mut over: Vec<ObjectId> = Vec::new();
        for object in &self.turn {
            let Some(pull) = self.pulls.get_mut(object) else {
                continue;
            };
            if pull.phase == Phase::Waiting {
                if arriving > 0 && arriving + chunk_bytes > self.limits.total_bytes {
                    break;
                }
                arriving += chunk_bytes;
                pull.phase = Phase::Probing;
                pull.again.insert(0, chunk_bytes);
            }
            if pull.phase == Phase::Room {
                continue;
            }
            while pull.under_way.len() < self.limits.window {
                let due = match pull.again.pop_first() {
                    Some(due) => due,
                    None if pull.phase == Phase::Receiving && pull.next_offset < pull.total_bytes => {
                        let length = chunk_bytes.min(pull.total_bytes - pull.next_offset);
                        let due = (pull.next_offset, length);
                        pull.next_offset += length;
                        due
                    }
                    None => break,
                };
                let Some(node) = pull.next_holder() else {
                    pull.again.insert(due.0, due.1);
                    break;
                };
                pull.under_way.insert(due.0, (node, due.1, now));
                out.push(PullCommand::Ask {
                    object: *object,
                    node,
                    offset: due.0,
                    length: due.1,
                });
            }
            if pull.under_way.is_empty() {
                over.push(*object);
            }
        }
        for object in over {
            let Some(pull) = self.pulls.get(&object) else { continue };
            let reason = match pull.last_reason.as_str() {
                "" => "no node is known to have it".to_string(),
                reason => format!("no node is left that has it: {reason}"),
            };
            self.end(object, &reason, false, out);
        }
    }

    /// Checks the invariants.
    pub fn validate(&self) -> Result<(), String> {
        let mut waiters = 0;
        for (object, pull) in &self.pulls {
            waiters += pull.waiters.len();
            if pull.waiters.is_empty() {
                return Err(format!("nobody waits for {object}"));
            }
            if pull
                .waiters
                .iter()
                .any(|waiter| self.waiter_of.get(waiter) != Some(object))
            {
                return Err(format!("a waiter of {object} does not know it"));
            }
            let idle = pull.under_way.is_empty();
            if idle && matches!(pull.phase, Phase::Probing | Phase::Receiving) {
                return Err(format!("{object} is pulled and nothing is under way"));
            }
            if pull.received > pull.total_bytes {
                return Err(format!("{object} has more bytes than it has"));
            }
        }
        if waiters != self.waiter_of.len() || self.turn.len() != self.pulls.len() {
            return Err("waiters or turns without pulls".into());
        }
        let admitted: Vec<u64> = self
            .pulls
            .values()
            .filter(|pull| pull.phase == Phase::Probing)
            .map(|_| self.limits.chunk_bytes)
            .collect();
        if admitted.len() > 1 && admitted.iter().sum::<u64>() > self.limits.total_bytes {
            return Err("more pulls are admitted than may be".into());
        }
        Ok(())
    }
}

impl Pull {
    /// The next holder in turn that may be asked.
    fn next_holder(&mut self) -> Option<NodeId> {
        for _ in 0..self.holders.len() {
            let node = *self.holders.front()?;
            self.holders.rotate_left(1);
            let failures = self.failed.get(&node).copied().unwrap_or(0);
            if !self.absent.contains(&node) && failures < FAILURES_A_HOLDER {
                return Some(node);
            }
        }
        None
    }
}
