//! What a process knows of an actor, and which news of it is late.
//!
//! It refuses news of a life that is over.
//!
//! Invariant: 1. `incarnation` never falls, and nothing follows death.

use ray_ids::{ObjectId, TaskId, WorkerId};
use ray_ownership::actor_calls::ActorCalls;
use ray_wire::layout::{ERROR_ACTOR_DIED, ERROR_ACTOR_UNSCHEDULABLE, ERROR_PLACEMENT_GROUP_REMOVED, ERROR_RUNTIME_ENV};
use ray_wire::{ActorCreation, ActorState, DeathCause, ACTOR_ALIVE, ACTOR_DEAD, ACTOR_RESTARTING};

/// What this process knows of an actor.
#[derive(Debug)]
pub(crate) struct ActorEntry {
    pub calls: ActorCalls,
    pub death: Option<DeathCause>,
    pub state: u32,
    /// The highest incarnation that was alive, as far as is known here.
    pub incarnation: u64,
    pub was_alive: bool,
    /// Where that was.
    pub worker: Option<WorkerId>,
    pub pending_reason: String,
    pub class_name: String,
    pub max_pending_calls: i32,
    pub owned: bool,
    pub detached: bool,
    pub watched: bool,
    /// `ray.kill` was called for this incarnation: it takes no further calls, whatever is said of it.
    pub killed_incarnation: Option<u64>,
    /// The call that creates it, until it is registered.
    pub creation: Option<Box<ActorCreation>>,
    /// Counted while it may be created again.
    pub creation_pins: Vec<ObjectId>,
    /// Unanswered calls of an incarnation that is gone; news decides what they fail with.
    pub unavailable: Vec<TaskId>,
}

impl ActorEntry {
    pub fn new(out_of_order: bool, max_pending_calls: i32) -> Self {
        Self {
            calls: ActorCalls::new(out_of_order, max_pending_calls),
            death: None,
            state: ray_wire::ACTOR_DEPENDENCIES_UNREADY,
            incarnation: 0,
            was_alive: false,
            worker: None,
            pending_reason: String::new(),
            class_name: String::new(),
            max_pending_calls,
            owned: false,
            detached: false,
            watched: false,
            killed_incarnation: None,
            creation: None,
            creation_pins: Vec::new(),
            unavailable: Vec::new(),
        }
    }

    /// Whether the news is older than what is known. `incarnation` is the highest that was alive; the control plane gives
    /// a restart the number after it before that is alive.
    pub fn is_late(&self, news: &ActorState) -> bool {
        if self.state == ACTOR_DEAD || news.incarnation < self.incarnation {
            return true;
        }
        match news.state {
            ACTOR_ALIVE => self.killed_incarnation.is_some_and(|killed| news.incarnation <= killed),
            ACTOR_RESTARTING => self.was_alive && news.incarnation == self.incarnation,
            _ => false,
        }
    }

    pub fn incarnation(&self) -> u64 {
        self.incarnation
    }

    /// What the actor is doing, in words.
    pub fn describe(&self) -> String {
        let state = match self.state {
            ray_wire::ACTOR_DEPENDENCIES_UNREADY => "its constructor's arguments are not there yet",
            ray_wire::ACTOR_PENDING_CREATION => "it is being created",
            ACTOR_ALIVE => "it is alive",
            ACTOR_RESTARTING => "it is being restarted",
            _ => "it is dead",
        };
        if self.pending_reason.is_empty() {
            state.to_owned()
        } else {
            format!("{state}: {}", self.pending_reason)
        }
    }
}

/// The kind of error that a call to a dead actor gets.
pub(crate) fn error_kind_of_death(death: u32) -> u32 {
    match death {
        ray_wire::DEATH_UNSCHEDULABLE => ERROR_ACTOR_UNSCHEDULABLE,
        ray_wire::DEATH_RUNTIME_ENV => ERROR_RUNTIME_ENV,
        ray_wire::DEATH_PLACEMENT_GROUP => ERROR_PLACEMENT_GROUP_REMOVED,
        _ => ERROR_ACTOR_DIED,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use ray_ownership::actor_calls::{ActorCommand, ActorStatus};

    fn news(state: u32, incarnation: u64) -> ActorState {
        ActorState {
            state,
            incarnation,
            ..ActorState::default()
        }
    }

    #[test]
    fn news_of_a_restart_that_is_over_is_late() {
        let worker = WorkerId::from_random();
        let mut entry = ActorEntry::new(false, -1);
        let mut commands = Vec::new();
        assert!(!entry.is_late(&news(ACTOR_RESTARTING, 1)));
        entry.calls.restarting(1, &mut commands);
        assert!(!entry.is_late(&news(ACTOR_ALIVE, 1)));
        (entry.incarnation, entry.was_alive, entry.state) = (1, true, ACTOR_ALIVE);
        entry.calls.alive(worker, 1, &mut commands);
        // The answer to `WatchActor` may overtake a publication, or be overtaken.
        assert!(entry.is_late(&news(ACTOR_RESTARTING, 1)));
        assert!(
            !entry.is_late(&news(ACTOR_ALIVE, 1)),
            "said twice, or after a broken link"
        );
        assert!(!entry.is_late(&news(ACTOR_RESTARTING, 2)));
        entry.calls.restarting(2, &mut commands);
        assert_eq!(*entry.calls.status(), ActorStatus::Pending);
        assert!(!entry.is_late(&news(ACTOR_ALIVE, 2)));
        entry.calls.alive(worker, 2, &mut commands);
        let task = TaskId::random_in(ray_ids::ActorId::random_in(ray_ids::JobId::from_int(1)));
        entry.calls.submit(task, "", true, 0, &mut commands);
        let pushed = ActorCommand::Push {
            task,
            worker,
            incarnation: 2,
            sequence: 1,
        };
        assert_eq!(
            commands,
            [pushed],
            "a call goes to the incarnation that the control plane named"
        );
    }

    #[test]
    fn an_actor_that_was_killed_takes_no_calls_before_its_next_life() {
        let mut entry = ActorEntry::new(false, -1);
        (entry.incarnation, entry.was_alive, entry.state) = (3, true, ACTOR_ALIVE);
        entry.killed_incarnation = Some(3);
        assert!(entry.is_late(&news(ACTOR_ALIVE, 3)));
        assert!(!entry.is_late(&news(ACTOR_RESTARTING, 4)));
        assert!(!entry.is_late(&news(ACTOR_ALIVE, 4)));
        assert!(!entry.is_late(&news(ACTOR_DEAD, 3)));
        assert!(entry.is_late(&news(ACTOR_DEAD, 2)));
    }
}
