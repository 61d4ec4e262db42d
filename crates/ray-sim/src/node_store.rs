//! A node's store: copies, pulls from other nodes, and who hears of a copy.
//!
//! Invariant: 1. The owner hears of every copy, or its raylet knows that the owner is dead.

use std::collections::BTreeSet;
use std::rc::Rc;

use ray_ids::{NodeId, ObjectId, WorkerId};

use crate::model::{Message, Place, Reference};
use crate::node::{Copy, Pull};
use crate::world::World;

impl World {
    pub(crate) fn fetch(&mut self, node: NodeId, process: WorkerId, object: ObjectId, locations: Vec<NodeId>) {
        let Some(raylet) = self.raylets.get_mut(&node) else {
            return;
        };
        if raylet.store.contains_key(&object) {
            let message = Message::ObjectLocal { object };
            return self.send(Place::Raylet(node), Place::Process(process), message);
        }
        if let Some(pull) = raylet.pulls.get_mut(&object) {
            pull.waiters.insert(process);
            return;
        }
        let waiters = BTreeSet::from([process]);
        let pull = Pull {
            waiters,
            candidates: locations,
            absent: Vec::new(),
            asked: NodeId::NIL,
        };
        raylet.pulls.insert(object, pull);
        self.pull_next(node, object);
    }

    pub(crate) fn pull_next(&mut self, node: NodeId, object: ObjectId) {
        loop {
            let Some(raylet) = self.raylets.get_mut(&node) else {
                return;
            };
            let Some(pull) = raylet.pulls.get_mut(&object) else {
                return;
            };
            let Some(next) = pull.candidates.pop() else {
                let Some(pull) = raylet.pulls.remove(&object) else {
                    return;
                };
                for process in pull.waiters {
                    let message = Message::FetchFailed {
                        object,
                        absent: pull.absent.clone(),
                    };
                    self.send(Place::Raylet(node), Place::Process(process), message);
                }
                return;
            };
            if next == node || raylet.dead_nodes.contains(&next) {
                pull.absent.push(next);
                continue;
            }
            pull.asked = next;
            return self.send(Place::Raylet(node), Place::Raylet(next), Message::Pull { object });
        }
    }

    pub(crate) fn pull_answered(
        &mut self,
        node: NodeId,
        object: ObjectId,
        from: NodeId,
        contents: Option<Rc<[Reference]>>,
    ) {
        let owner = self.truth_owner(&object);
        let Some(raylet) = self.raylets.get_mut(&node) else {
            return;
        };
        let Some(pull) = raylet.pulls.get_mut(&object).filter(|pull| pull.asked == from) else {
            return;
        };
        let Some(contents) = contents else {
            pull.absent.push(from);
            return self.pull_next(node, object);
        };
        let waiters = std::mem::take(&mut pull.waiters);
        raylet.pulls.remove(&object);
        // A copy whose owner is known to be dead would be freed by nobody. The owner hears of the copy from here and not
        // from whoever fetched it, because that process may die before it could say so.
        if !raylet.dead.contains(&owner) {
            raylet.store.insert(object, Copy { owner, contents });
            self.send(
                Place::Raylet(node),
                Place::Process(owner),
                Message::AddLocation { object, node },
            );
        }
        for process in waiters {
            self.send(
                Place::Raylet(node),
                Place::Process(process),
                Message::ObjectLocal { object },
            );
        }
    }

    /// A process of the node seals an object in its store.
    pub(crate) fn seal(&mut self, node: NodeId, object: ObjectId, owner: WorkerId, contents: Rc<[Reference]>) {
        if let Some(raylet) = self.raylets.get_mut(&node) {
            if !raylet.dead.contains(&owner) {
                raylet.store.insert(object, Copy { owner, contents });
            }
        }
    }
}
