//! What this node knows of its objects: owns whose each is and where its copy is, and the queue of those who wait for
//! room in the store.
//!
//! Invariants:
//! 1. An object has one owner; an owner without objects here is not kept.
//! 2. Room is given in the order of asking; who waits without any progress for too long is told so.

use crate::types::Milliseconds;
use ray_ids::{ObjectId, WorkerId};
use rustc_hash::{FxHashMap, FxHashSet};
use std::collections::VecDeque;

/// Whose objects are here, in memory or on disk.
#[derive(Debug, Default)]
pub struct Owners {
    owner_of: FxHashMap<ObjectId, (WorkerId, u64)>,
    objects_of: FxHashMap<WorkerId, FxHashSet<ObjectId>>,
}

impl Owners {
    /// An object is here.
    pub fn add(&mut self, object: ObjectId, owner: WorkerId, bytes: u64) {
        if let Some((before, _)) = self.owner_of.insert(object, (owner, bytes)) {
            if before != owner {
                self.take_from(&before, &object);
            }
        }
        self.objects_of.entry(owner).or_default().insert(object);
    }

    /// An object is nowhere here any more.
    pub fn remove(&mut self, object: &ObjectId) {
        if let Some((owner, _)) = self.owner_of.remove(object) {
            self.take_from(&owner, object);
        }
    }

    fn take_from(&mut self, owner: &WorkerId, object: &ObjectId) {
        if let Some(objects) = self.objects_of.get_mut(owner) {
            objects.remove(object);
            if objects.is_empty() {
                self.objects_of.remove(owner);
            }
        }
    }

    /// The objects of an owner.
    pub fn of(&self, owner: &WorkerId) -> Vec<ObjectId> {
        self.objects_of
            .get(owner)
            .map(|objects| objects.iter().copied().collect())
            .unwrap_or_default()
    }

    /// The owner of an object.
    pub fn owner(&self, object: &ObjectId) -> Option<WorkerId> {
        self.owner_of.get(object).map(|(owner, _)| *owner)
    }

    /// Each owner with its number of objects and their bytes, largest first.
    pub fn table(&self) -> Vec<(WorkerId, usize, u64)> {
        let bytes = |objects: &FxHashSet<ObjectId>| -> u64 {
            objects
                .iter()
                .filter_map(|object| self.owner_of.get(object))
                .map(|(_, bytes)| bytes)
                .sum()
        };
        let mut table: Vec<_> = self
            .objects_of
            .iter()
            .map(|(owner, objects)| (*owner, objects.len(), bytes(objects)))
            .collect();
        table.sort_by_key(|(owner, _, bytes)| (std::cmp::Reverse(*bytes), *owner));
        table
    }

    /// Checks the invariants.
    pub fn validate(&self) -> Result<(), String> {
        let counted: usize = self.objects_of.values().map(FxHashSet::len).sum();
        if counted != self.owner_of.len() || self.objects_of.values().any(FxHashSet::is_empty) {
            return Err(format!(
                "{} objects have an owner and owners have {counted}",
                self.owner_of.len()
            ));
        }
        Ok(())
    }
}

/// What room is wanted for.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum RoomFor {
    /// A client's extent: its process and correlation.
    Extent { process: WorkerId, correlation: u64 },
    /// A copy that arrives.
    Transfer { object: ObjectId },
    /// A spilled object that comes back.
    Restore { object: ObjectId },
}

/// Somebody who waits for room.
#[derive(Debug, Clone)]
pub struct Wanted {
    pub purpose: RoomFor,
    pub bytes: u64,
    pub since: Milliseconds,
}

/// Those who wait for room, in order.
#[derive(Debug, Default)]
pub struct RoomQueue {
    waiting: VecDeque<Wanted>,
    last_progress: Milliseconds,
}

impl RoomQueue {
    /// Joins the queue.
    pub fn push(&mut self, purpose: RoomFor, bytes: u64, now: Milliseconds) {
        if self.waiting.is_empty() {
            self.last_progress = now;
        }
        self.waiting.push_back(Wanted {
            purpose,
            bytes,
            since: now,
        });
    }

    /// Whoever is first.
    pub fn front(&self) -> Option<&Wanted> {
        self.waiting.front()
    }

    /// The first was served.
    pub fn served(&mut self, now: Milliseconds) -> Option<Wanted> {
        self.last_progress = now;
        self.waiting.pop_front()
    }

    /// Memory was freed or objects were spilled: there is hope.
    pub fn progress(&mut self, now: Milliseconds) {
        self.last_progress = now;
    }

    /// Takes the first out, if nothing has moved for so long while it waited.
    pub fn take_hopeless(&mut self, now: Milliseconds, limit_ms: u64) -> Option<Wanted> {
        let first = self.waiting.front()?;
        let stuck = now >= self.last_progress.max(first.since) + limit_ms;
        stuck.then(|| self.waiting.pop_front())?
    }

    /// Whoever this says no longer waits.
    pub fn retain(&mut self, keep: impl Fn(&RoomFor) -> bool) {
        self.waiting.retain(|wanted| keep(&wanted.purpose));
    }

    /// All, in order.
    pub fn iter(&self) -> impl Iterator<Item = &Wanted> {
        self.waiting.iter()
    }

    /// Whether nobody waits.
    pub fn is_empty(&self) -> bool {
        self.waiting.is_empty()
    }

    /// The bytes that are waited for.
    pub fn bytes(&self) -> u64 {
        self.waiting.iter().map(|wanted| wanted.bytes).sum()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn owners_are_forgotten_with_their_last_object() {
        let mut owners = Owners::default();
        let (a, b) = (WorkerId::from_array([1; 28]), WorkerId::from_array([2; 28]));
        let objects: Vec<ObjectId> = (0..2).map(|_| ObjectId::from_random()).collect();
        owners.add(objects[0], a, 5);
        owners.add(objects[1], b, 7);
        owners.add(objects[1], a, 7);
        owners.validate().unwrap();
        assert_eq!(owners.table(), [(a, 2, 12)]);
        owners.remove(&objects[0]);
        owners.remove(&objects[1]);
        owners.validate().unwrap();
        assert!(owners.table().is_empty());
    }

    #[test]
    fn only_a_wait_without_progress_ends() {
        let mut queue = RoomQueue::default();
        let purpose = |n: u64| RoomFor::Extent {
            process: WorkerId::NIL,
            correlation: n,
        };
        queue.push(purpose(1), 10, 100);
        queue.push(purpose(2), 10, 150);
        assert!(queue.take_hopeless(10_099, 10_000).is_none());
        queue.progress(9_000);
        assert!(queue.take_hopeless(10_100, 10_000).is_none());
        assert_eq!(queue.take_hopeless(19_000, 10_000).unwrap().purpose, purpose(1));
        assert_eq!(queue.front().unwrap().purpose, purpose(2));
    }
}
