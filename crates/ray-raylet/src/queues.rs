//! Requests that wait for a lease: owns their order.
//!
//! Requests of one scheduling class form a queue of their own, inside it every owner has its line, and classes and
//! owners take turns: a request of a class that is granted sends its class, and its owner within the class, to the end.
//! Deeper classes (work that blocked work waits for) come first, the newest request of an owner first among those
//! of the same nested class, so that recursion finishes what it began.
//!
//! Invariants:
//! 1. A request is in exactly one line; lines and classes without requests do not exist.
//! 2. The rotation holds every class exactly once.

use crate::types::{Milliseconds, RequestKey};
use ray_ids::{NodeId, PlacementGroupId, WorkerId};
use ray_sched::{LabelSelector, ResourceSet, SchedulingStrategy};
use ray_wire::LeaseSpecification;
use rustc_hash::FxHashMap;
use std::collections::VecDeque;
use std::sync::Arc;

/// What the requests of one class have in common.
#[derive(Debug)]
pub struct Class {
    pub specification: LeaseSpecification,
    /// What a lease takes, under group names where it is inside a placement group.
    pub demand: ResourceSet,
    pub group: Option<PlacementGroupId>,
    pub strategy: SchedulingStrategy,
    /// The labels that a node must have beside what the strategy asks.
    pub labels: LabelSelector,
}

/// A request that waits.
#[derive(Debug, Clone)]
pub struct Request {
    pub key: RequestKey,
    pub class: Arc<Class>,
    pub preferred: Option<NodeId>,
    pub redirected: bool,
    pub queued_at: Milliseconds,
    /// What its owner was last told: the reason and whether it is infeasible.
    pub told: Option<(String, bool)>,
}

#[derive(Debug, Default)]
struct Lines {
    /// Owners in turn, each with its requests.
    owners: VecDeque<(WorkerId, VecDeque<RequestKey>)>,
}

/// The queues.
#[derive(Debug, Default)]
pub struct Queues {
    requests: FxHashMap<RequestKey, Request>,
    lines: FxHashMap<usize, Lines>,
    /// Classes in turn.
    rotation: VecDeque<Arc<Class>>,
}

/// Classes are interned: the address names one.
fn name(class: &Arc<Class>) -> usize {
    Arc::as_ptr(class) as usize
}

impl Queues {
    /// How many requests wait.
    pub fn len(&self) -> usize {
        self.requests.len()
    }

    /// Whether none waits.
    pub fn is_empty(&self) -> bool {
        self.requests.is_empty()
    }

    /// Whether that request waits.
    pub fn contains(&self, key: &RequestKey) -> bool {
        self.requests.contains_key(key)
    }

    /// The request of that name.
    pub fn get_mut(&mut self, key: &RequestKey) -> Option<&mut Request> {
        self.requests.get_mut(key)
    }

    /// Every request, in no order.
    pub fn iter(&self) -> impl Iterator<Item = &Request> {
        self.requests.values()
    }

    /// Puts a request at the end of its owner's line. A name that waits already is left as it is.
    pub fn push(&mut self, request: Request) {
        if self.requests.contains_key(&request.key) {
            return;
        }
        let lines = self.lines.entry(name(&request.class)).or_default();
        if lines.owners.is_empty() {
            self.rotation.push_back(request.class.clone());
        }
        match lines.owners.iter_mut().find(|(owner, _)| *owner == request.key.process) {
            Some((_, line)) => line.push_back(request.key),
            None => lines
                .owners
                .push_back((request.key.process, VecDeque::from([request.key]))),
        }
        self.requests.insert(request.key, request);
    }

    /// Takes a request out, wherever it is.
    pub fn remove(&mut self, key: &RequestKey) -> Option<Request> {
        let request = self.requests.remove(key)?;
        let class = name(&request.class);
        if let Some(lines) = self.lines.get_mut(&class) {
            if let Some(at) = lines.owners.iter().position(|(owner, _)| *owner == key.process) {
                lines.owners[at].1.retain(|other| other != key);
                if lines.owners[at].1.is_empty() {
                    lines.owners.remove(at);
                }
            }
            if lines.owners.is_empty() {
                self.lines.remove(&class);
                self.rotation.retain(|other| name(other) != class);
            }
        }
        Some(request)
    }

    /// Takes out every request of a process.
    pub fn remove_process(&mut self, process: &WorkerId) -> Vec<Request> {
        self.remove_where(|request| request.key.process == *process)
    }

    /// Takes out every request that `which` says.
    pub fn remove_where(&mut self, which: impl Fn(&Request) -> bool) -> Vec<Request> {
        let mut keys: Vec<RequestKey> = self
            .requests
            .values()
            .filter(|request| which(request))
            .map(|r| r.key)
            .collect();
        keys.sort_unstable();
        keys.iter().filter_map(|key| self.remove(key)).collect()
    }

    /// The waiting classes in the order in which they are to be tried: deeper first, then in turn.
    pub fn classes(&self) -> Vec<Arc<Class>> {
        let mut classes: Vec<Arc<Class>> = self.rotation.iter().cloned().collect();
        classes.sort_by_key(|class| std::cmp::Reverse(class.specification.depth));
        classes
    }

    /// The request of a class whose turn it is.
    pub fn head(&self, class: &Arc<Class>) -> Option<&Request> {
        let (_, line) = self.lines.get(&name(class))?.owners.front()?;
        let key = if class.specification.depth > 1 {
            line.back()
        } else {
            line.front()
        }?;
        self.requests.get(key)
    }

    /// The requests of a class in about the order of their turns.
    pub fn of_class(&self, class: &Arc<Class>) -> impl Iterator<Item = &Request> {
        let owners = self.lines.get(&name(class)).map(|lines| &lines.owners);
        owners
            .into_iter()
            .flatten()
            .flat_map(|(_, line)| line)
            .filter_map(|key| self.requests.get(key))
    }

    /// How many requests of a class wait.
    pub fn count(&self, class: &Arc<Class>) -> usize {
        self.lines
            .get(&name(class))
            .map_or(0, |lines| lines.owners.iter().map(|(_, line)| line.len()).sum())
    }

    /// Takes out the head of a class, and sends its owner and its class to the end of their turns.
    pub fn grant_head(&mut self, class: &Arc<Class>) -> Option<Request> {
        let key = self.head(class)?.key;
        let request = self.remove(&key)?;
        if let Some(lines) = self.lines.get_mut(&name(class)) {
            if lines.owners.front().is_some_and(|(owner, _)| *owner == key.process) {
                lines.owners.rotate_left(1);
            }
        }
        if let Some(at) = self.rotation.iter().position(|other| Arc::ptr_eq(other, class)) {
            if let Some(turn) = self.rotation.remove(at) {
                self.rotation.push_back(turn);
            }
        }
        Some(request)
    }

    /// Checks the invariants.
    pub fn validate(&self) -> Result<(), String> {
        let mut seen = 0;
        for (class, lines) in &self.lines {
            if lines.owners.is_empty() || lines.owners.iter().any(|(_, line)| line.is_empty()) {
                return Err("a line without requests is kept".into());
            }
            for (owner, line) in &lines.owners {
                for key in line {
                    seen += 1;
                    let request = self
                        .requests
                        .get(key)
                        .ok_or("a line names a request that is not there")?;
                    if request.key.process != *owner || name(&request.class) != *class {
                        return Err(format!("{key:?} stands in a line that is not its own"));
                    }
                }
            }
        }
        if seen != self.requests.len() {
            return Err(format!("{} requests and {seen} places in lines", self.requests.len()));
        }
        if self.rotation.len() != self.lines.len() || !self.rotation.iter().all(|c| self.lines.contains_key(&name(c))) {
            return Err("the rotation is not the set of waiting classes".into());
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn class(depth: u32, function: &str) -> Arc<Class> {
        let specification = LeaseSpecification {
            depth,
            function_name: function.into(),
            ..Default::default()
        };
        Arc::new(crate::placement::class_of(specification).unwrap())
    }

    fn request(class: &Arc<Class>, owner: u8, correlation: u64) -> Request {
        let key = RequestKey {
            process: WorkerId::from_array([owner; 28]),
            correlation,
        };
        Request {
            key,
            class: class.clone(),
            preferred: None,
            redirected: false,
            queued_at: 0,
            told: None,
        }
    }

    #[test]
    fn classes_and_owners_take_turns() {
        let (a, b) = (class(0, "a"), class(0, "b"));
        let mut queues = Queues::default();
        for correlation in 0..3 {
            queues.push(request(&a, 1, correlation));
        }
        queues.push(request(&a, 2, 10));
        queues.push(request(&b, 1, 20));
        queues.validate().unwrap();
        let mut order = Vec::new();
        while let Some(first) = queues.classes().first() {
            order.push(queues.grant_head(first).unwrap().key.correlation);
            queues.validate().unwrap();
        }
        assert_eq!(order, [0, 20, 10, 1, 2]);
    }

    #[test]
    fn deeper_classes_come_first_and_newest_first() {
        let (shallow, deep) = (class(0, "a"), class(3, "b"));
        let mut queues = Queues::default();
        queues.push(request(&shallow, 1, 0));
        queues.push(request(&deep, 2, 1));
        queues.push(request(&deep, 2, 2));
        assert!(Arc::ptr_eq(&queues.classes()[0], &deep));
        assert_eq!(queues.grant_head(&deep).unwrap().key.correlation, 2);
        assert_eq!(queues.remove_process(&WorkerId::from_array([2; 28])).len(), 1);
        queues.validate().unwrap();
        assert_eq!(queues.len(), 1);
    }
}
