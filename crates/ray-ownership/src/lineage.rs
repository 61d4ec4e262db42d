//! How to make a lost object again: owns, per finished task whose returns may be lost, what it needed and what is left of
//! its retries. The specifications themselves are the shell's; this says when to keep and when to drop them.
//!
//! It refuses to grow beyond its limit of bytes: the oldest specifications go first, and what they made cannot be rebuilt.
//!
//! Invariants:
//! 1. A specification is retained while one of its task's returns is counted, and not longer.
//! 2. The sum of retained bytes is at most the limit, or one specification alone is larger.

use std::collections::VecDeque;

use ray_ids::{ObjectId, TaskId};
use rustc_hash::FxHashMap;

/// A specification that was let go, and the arguments that it counted for lineage.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Dropped {
    pub task: TaskId,
    pub arguments: Vec<ObjectId>,
}

#[derive(Debug)]
struct Retained {
    arguments: Vec<ObjectId>,
    live_returns: u32,
    bytes: usize,
    retries_left: i32,
}

/// Why an object cannot be made again.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum NotRebuildable {
    /// It came from `put`, or its task is not retained (never retriable, or evicted).
    NoLineage,
    /// Its task has no retries left.
    NoRetriesLeft,
}

/// The retained specifications.
#[derive(Debug)]
pub struct Lineage {
    tasks: FxHashMap<TaskId, Retained>,
    order: VecDeque<TaskId>,
    bytes: usize,
    limit_bytes: usize,
}

impl Lineage {
    /// Retains at most `limit_bytes` of specifications.
    pub fn new(limit_bytes: usize) -> Self {
        Self {
            tasks: FxHashMap::default(),
            order: VecDeque::new(),
            bytes: 0,
            limit_bytes,
        }
    }

    /// A task is over and some of its returns could be lost: keep its specification. `retries_left` is -1 for no limit.
    pub fn retain(
        &mut self,
        task: TaskId,
        arguments: Vec<ObjectId>,
        live_returns: u32,
        bytes: usize,
        retries_left: i32,
    ) -> Vec<Dropped> {
        if live_returns == 0 {
            return vec![Dropped { task, arguments }];
        }
        self.bytes += bytes;
        self.tasks.insert(
            task,
            Retained {
                arguments,
                live_returns,
                bytes,
                retries_left,
            },
        );
        self.order.push_back(task);
        let mut dropped = Vec::new();
        while self.bytes > self.limit_bytes && self.tasks.len() > 1 {
            match self.order.pop_front() {
                Some(oldest) => dropped.extend(self.remove(oldest)),
                None => break,
            }
        }
        dropped
    }

    fn remove(&mut self, task: TaskId) -> Option<Dropped> {
        let retained = self.tasks.remove(&task)?;
        self.bytes -= retained.bytes;
        if self.order.len() > 64 && self.order.len() > 2 * self.tasks.len() {
            let tasks = &self.tasks;
            self.order.retain(|task| tasks.contains_key(task));
        }
        Some(Dropped {
            task,
            arguments: retained.arguments,
        })
    }

    /// One of the task's returns is counted no more.
    pub fn return_released(&mut self, task: TaskId) -> Option<Dropped> {
        let retained = self.tasks.get_mut(&task)?;
        retained.live_returns = retained.live_returns.saturating_sub(1);
        if retained.live_returns > 0 {
            return None;
        }
        self.remove(task)
    }

    /// Takes the task out to run it again; the caller retains it once more when it is over.
    pub fn begin_rebuild(&mut self, task: TaskId) -> Result<(Vec<ObjectId>, i32), NotRebuildable> {
        let retained = self.tasks.get(&task).ok_or(NotRebuildable::NoLineage)?;
        if retained.retries_left == 0 {
            return Err(NotRebuildable::NoRetriesLeft);
        }
        let left = if retained.retries_left < 0 {
            -1
        } else {
            retained.retries_left - 1
        };
        let dropped = self.remove(task).ok_or(NotRebuildable::NoLineage)?;
        Ok((dropped.arguments, left))
    }

    /// Whether the task's specification is retained.
    pub fn contains(&self, task: &TaskId) -> bool {
        self.tasks.contains_key(task)
    }

    /// Bytes retained.
    pub fn bytes(&self) -> usize {
        self.bytes
    }

    /// Checks the invariants.
    pub fn validate(&self) -> Result<(), String> {
        let sum: usize = self.tasks.values().map(|retained| retained.bytes).sum();
        if sum != self.bytes {
            return Err(format!("lineage says {} bytes and holds {sum}", self.bytes));
        }
        if self.bytes > self.limit_bytes && self.tasks.len() > 1 {
            return Err(format!(
                "lineage holds {} bytes over its limit of {}",
                self.bytes, self.limit_bytes
            ));
        }
        if self.tasks.values().any(|retained| retained.live_returns == 0) {
            return Err("lineage retains a task none of whose returns is counted".into());
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use ray_ids::{ActorId, JobId};

    fn task() -> TaskId {
        TaskId::random_in(ActorId::nil_in(JobId::from_int(1)))
    }

    #[test]
    fn a_specification_goes_with_the_last_return() {
        let mut lineage = Lineage::new(1000);
        let (t, argument) = (task(), ObjectId::of(task(), 1));
        assert!(lineage.retain(t, vec![argument], 2, 100, 3).is_empty());
        assert_eq!(lineage.return_released(t), None);
        assert_eq!(
            lineage.return_released(t),
            Some(Dropped {
                task: t,
                arguments: vec![argument]
            })
        );
        assert!(!lineage.contains(&t));
        lineage.validate().unwrap();
    }

    #[test]
    fn the_oldest_goes_when_the_limit_is_reached() {
        let mut lineage = Lineage::new(250);
        let tasks = [task(), task(), task()];
        for t in tasks {
            lineage.retain(t, vec![], 1, 100, 3);
            lineage.validate().unwrap();
        }
        assert!(!lineage.contains(&tasks[0]));
        assert_eq!(lineage.begin_rebuild(tasks[0]), Err(NotRebuildable::NoLineage));
        assert_eq!(lineage.begin_rebuild(tasks[2]), Ok((vec![], 2)));
    }

    #[test]
    fn retries_run_out() {
        let mut lineage = Lineage::new(250);
        let t = task();
        lineage.retain(t, vec![], 1, 10, 1);
        let (_, left) = lineage.begin_rebuild(t).unwrap();
        lineage.retain(t, vec![], 1, 10, left);
        assert_eq!(lineage.begin_rebuild(t), Err(NotRebuildable::NoRetriesLeft));
    }
}
