//! Pulls: shared, resumed from other holders, ended with a reason; and under any order of events.

use ray_ids::{NodeId, ObjectId};
use ray_raylet::pull::{PullCommand, PullEvent, PullLimits, Pulls, WaiterId};
use ray_raylet::types::Random;
use std::collections::{BTreeMap, BTreeSet};

fn node(number: u8) -> NodeId {
    NodeId::from_array([number; 28])
}

fn limits() -> PullLimits {
    PullLimits {
        chunk_bytes: 10,
        window: 2,
        chunk_timeout_ms: 1_000,
        total_bytes: 60,
    }
}

fn asks(commands: &[PullCommand]) -> Vec<(NodeId, u64, u64)> {
    commands
        .iter()
        .filter_map(|command| match command {
            PullCommand::Ask {
                node, offset, length, ..
            } => Some((*node, *offset, *length)),
            _ => None,
        })
        .collect()
}

#[test]
fn two_waiters_share_one_pull_from_two_holders() {
    let mut pulls = Pulls::new(limits());
    let object = ObjectId::from_random();
    let fetch = |waiter| PullEvent::Fetch {
        object,
        waiter,
        locations: vec![node(1), node(2)],
    };
    assert_eq!(asks(&pulls.step(fetch(1), 0)), [(node(1), 0, 10)]);
    assert_eq!(asks(&pulls.step(fetch(2), 0)), []);
    let first = PullEvent::Chunk {
        object,
        node: node(1),
        offset: 0,
        length: 10,
        total_bytes: 25,
    };
    assert_eq!(
        pulls.step(first, 1),
        [PullCommand::MakeBuffer {
            object,
            total_bytes: 25
        }]
    );
    assert_eq!(
        asks(&pulls.step(PullEvent::BufferMade { object }, 2)),
        [(node(2), 10, 10), (node(1), 20, 5)]
    );
    // One holder fails: its chunk is asked of the other.
    let failed = PullEvent::ChunkFailed {
        object,
        node: node(2),
        offset: 10,
        absent: true,
        reason: "gone".into(),
    };
    assert_eq!(asks(&pulls.step(failed, 3)), [(node(1), 10, 10)]);
    // A chunk that nobody asked for is nothing.
    let stray = PullEvent::Chunk {
        object,
        node: node(2),
        offset: 10,
        length: 10,
        total_bytes: 25,
    };
    assert_eq!(pulls.step(stray, 3), []);
    let last = PullEvent::Chunk {
        object,
        node: node(1),
        offset: 20,
        length: 5,
        total_bytes: 25,
    };
    assert_eq!(pulls.step(last, 4), [PullCommand::Write { object, offset: 20 }]);
    let done = pulls.step(
        PullEvent::Chunk {
            object,
            node: node(1),
            offset: 10,
            length: 10,
            total_bytes: 25,
        },
        5,
    );
    let arrived = |waiter| PullCommand::Arrived {
        waiter,
        object,
        transferred: true,
    };
    assert_eq!(
        done,
        [
            PullCommand::Write { object, offset: 10 },
            PullCommand::Seal { object },
            arrived(1),
            arrived(2)
        ]
    );
    pulls.validate().unwrap();
    assert!(pulls.is_empty());
}

#[test]
fn a_pull_without_holders_ends_with_the_reason() {
    let mut pulls = Pulls::new(limits());
    let object = ObjectId::from_random();
    pulls.step(
        PullEvent::Fetch {
            object,
            waiter: 7,
            locations: vec![node(1), node(2)],
        },
        0,
    );
    pulls.step(
        PullEvent::NodeGone {
            node: node(1),
            dead: true,
        },
        1,
    );
    // The other holder is slow, thrice.
    let mut out = Vec::new();
    for round in 1..=3 {
        out = pulls.step(PullEvent::Tick, round * 2_000);
    }
    let PullCommand::Failed {
        waiter: 7,
        reason,
        absent,
        store_full: false,
        ..
    } = &out[0]
    else {
        panic!("{out:?}")
    };
    assert!(reason.contains("did not send a chunk within 1000 ms"), "{reason}");
    assert_eq!(absent, &[node(1)]);
    assert!(pulls.is_empty());
}

#[test]
fn a_full_store_is_said_and_the_next_is_admitted() {
    let mut pulls = Pulls::new(limits());
    let objects: Vec<ObjectId> = (0..2).map(|_| ObjectId::from_random()).collect();
    let fetch = |at: usize| PullEvent::Fetch {
        object: objects[at],
        waiter: at as u64,
        locations: vec![node(1)],
    };
    pulls.step(fetch(0), 0);
    pulls.step(
        PullEvent::Chunk {
            object: objects[0],
            node: node(1),
            offset: 0,
            length: 10,
            total_bytes: 55,
        },
        0,
    );
    // 55 of 60 bytes are arriving: the second waits.
    assert_eq!(pulls.step(fetch(1), 0), []);
    let out = pulls.step(
        PullEvent::BufferRefused {
            object: objects[0],
            reason: "full".into(),
        },
        1,
    );
    assert!(out.iter().any(|c| matches!(
        c,
        PullCommand::Failed {
            waiter: 0,
            store_full: true,
            ..
        }
    )));
    assert_eq!(asks(&out), [(node(1), 0, 10)]);
}

#[test]
fn every_waiter_is_answered_whatever_happens() {
    for seed in 1..=300 {
        walk(seed);
    }
}

/// What a pretended shell knows: questions under way, buffers wanted and made, waiters not answered.
#[derive(Default)]
struct Shell {
    asked: Vec<(ObjectId, NodeId, u64, u64)>,
    wanted: Vec<ObjectId>,
    buffers: BTreeMap<ObjectId, BTreeSet<u64>>,
    waiting: BTreeSet<WaiterId>,
}

impl Shell {
    fn take(&mut self, commands: Vec<PullCommand>, sizes: &BTreeMap<ObjectId, u64>) {
        for command in commands {
            match command {
                PullCommand::Ask {
                    object,
                    node,
                    offset,
                    length,
                } => self.asked.push((object, node, offset, length)),
                PullCommand::MakeBuffer { object, total_bytes } => {
                    assert_eq!(total_bytes, sizes[&object]);
                    self.wanted.push(object);
                }
                PullCommand::Write { object, offset } => {
                    assert!(
                        self.buffers.get_mut(&object).unwrap().insert(offset),
                        "a chunk was written twice"
                    );
                }
                PullCommand::Seal { object } => {
                    let chunks = self.buffers.remove(&object).unwrap();
                    assert_eq!(
                        chunks.len() as u64,
                        sizes[&object].div_ceil(10),
                        "it was sealed with a hole"
                    );
                }
                PullCommand::Abort { object } => {
                    self.buffers.remove(&object);
                    self.wanted.retain(|other| *other != object);
                }
                PullCommand::Arrived { waiter, .. } | PullCommand::Failed { waiter, .. } => {
                    assert!(self.waiting.remove(&waiter), "a waiter was answered twice");
                }
            }
        }
    }
}

fn walk(seed: u64) {
    let mut random = Random::new([seed, 5, seed << 9, 1]);
    let mut pick = move |limit: u64| random.next_u64() % limit;
    let mut pulls = Pulls::new(limits());
    let sizes: BTreeMap<ObjectId, u64> = (0..4_u32)
        .map(|number| (ObjectId::of(ray_ids::TaskId::NIL, number), 7 + 13 * u64::from(number)))
        .collect();
    let objects: Vec<ObjectId> = sizes.keys().copied().collect();
    let mut shell = Shell::default();
    let mut now = 0;
    let mut next_waiter = 0;
    for round in 0..400 {
        now += pick(50);
        let draining = round > 300;
        let event = match pick(if draining { 6 } else { 10 }) {
            0..=2 if !shell.asked.is_empty() => {
                let at = pick(shell.asked.len() as u64) as usize;
                let (object, node, offset, length) = shell.asked.swap_remove(at);
                match pick(4) {
                    0 => PullEvent::ChunkFailed {
                        object,
                        node,
                        offset,
                        absent: pick(2) == 0,
                        reason: "no".into(),
                    },
                    1 if pick(3) == 0 => PullEvent::Chunk {
                        object,
                        node,
                        offset,
                        length: length / 2,
                        total_bytes: sizes[&object],
                    },
                    _ => {
                        let total_bytes = sizes[&object];
                        PullEvent::Chunk {
                            object,
                            node,
                            offset,
                            length: length.min(total_bytes - offset),
                            total_bytes,
                        }
                    }
                }
            }
            3 | 4 if !shell.wanted.is_empty() => {
                let object = shell.wanted.remove(pick(shell.wanted.len() as u64) as usize);
                if pick(5) == 0 {
                    PullEvent::BufferRefused {
                        object,
                        reason: "full".into(),
                    }
                } else {
                    shell.buffers.insert(object, BTreeSet::from([0]));
                    PullEvent::BufferMade { object }
                }
            }
            5 => PullEvent::Tick,
            6 => PullEvent::NodeGone {
                node: node(pick(4) as u8),
                dead: pick(2) == 0,
            },
            7 if !shell.waiting.is_empty() => {
                let waiter = *shell
                    .waiting
                    .iter()
                    .nth(pick(shell.waiting.len() as u64) as usize)
                    .unwrap();
                shell.waiting.remove(&waiter);
                PullEvent::Cancel { waiter }
            }
            8 => {
                let object = objects[pick(4) as usize];
                match pick(2) {
                    0 => PullEvent::Local { object },
                    _ => PullEvent::Freed {
                        object,
                        reason: "freed".into(),
                    },
                }
            }
            9 => {
                next_waiter += 1;
                shell.waiting.insert(next_waiter);
                let locations = (0..pick(4)).map(|_| node(pick(4) as u8)).collect();
                PullEvent::Fetch {
                    object: objects[pick(4) as usize],
                    waiter: next_waiter,
                    locations,
                }
            }
            _ => PullEvent::Tick,
        };
        let commands = pulls.step(event, now);
        shell.take(commands, &sizes);
        pulls
            .validate()
            .unwrap_or_else(|problem| panic!("seed {seed}: {problem}"));
    }
    // Nothing answers any more: time alone ends every wait for a node, and refused buffers the rest.
    for _ in 0..200 {
        now += 2_000;
        let event = match shell.wanted.pop() {
            Some(object) => PullEvent::BufferRefused {
                object,
                reason: "full".into(),
            },
            None => PullEvent::Tick,
        };
        let commands = pulls.step(event, now);
        shell.take(commands, &sizes);
    }
    assert!(
        shell.waiting.is_empty() && pulls.is_empty() && shell.buffers.is_empty(),
        "seed {seed}"
    );
}
