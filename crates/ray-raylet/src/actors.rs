//! Actors and bundles that the control plane places on this node: owns their resources from the order to their end.
//!
//! It refuses (`rejected`) an actor for which there is no room even after idle leases were recalled, and bundles all or
//! none. An order repeated is answered again and carried out once: an actor is named by (id, incarnation).
//!
//! Invariants: those of `scheduler`.

use crate::placement::{demand_of, set_from_wire};
use crate::scheduler::{Actor, ActorPhase, Awaiting, LocalScheduler, Reservation};
use crate::types::{death, Command, Milliseconds};
use crate::worker_pool::WorkerState;
use ray_ids::{ActorId, JobId, LeaseId, PlacementGroupId, WorkerId};
use ray_sched::{Allocation, ResourceSet};
use ray_wire::layout::ERROR_PLACEMENT_GROUP_REMOVED;
use ray_wire::{
    ActorCreated, BundleKey, CreateActor, DeathCause, KillActorWorker, DEATH_INTENDED, DEATH_JOB,
    DEATH_PLACEMENT_GROUP, DEATH_RUNTIME_ENV, DEATH_UNKNOWN, DEATH_UNSCHEDULABLE,
};

fn answer(actor: ActorId, incarnation: u64) -> ActorCreated {
    ActorCreated {
        actor_id: ray_wire::id_bytes(actor.as_bytes()),
        incarnation,
        ..Default::default()
    }
}

impl LocalScheduler {
    pub(crate) fn place_actor(&mut self, message: CreateActor, now: Milliseconds, out: &mut Vec<Command>) {
        let Ok(id) = ActorId::from_binary(&message.actor_id) else {
            return;
        };
        let failed = |kind: u32, sentence: String| {
            let failure = Some(death(kind, sentence));
            Command::AnswerActor(Box::new(ActorCreated {
                failure,
                ..answer(id, message.incarnation)
            }))
        };
        if self.finished_jobs.contains(&id.job_id()) && !is_detached(&message) {
            return out.push(failed(DEATH_JOB, "its job ended".into()));
        }
        if let Some(known) = self.actors.get(&id) {
            if known.incarnation == message.incarnation {
                if let ActorPhase::Alive(created) = &known.phase {
                    out.push(Command::AnswerActor(created.clone()));
                }
                return;
            }
            if known.incarnation > message.incarnation {
                return;
            }
            self.end_actor(id, death(DEATH_INTENDED, "a later incarnation replaced it"), out);
            self.forget_actor(id);
        }
        self.reservations.retain(|reservation| match reservation {
            Reservation::Actor { message, .. } => message.actor_id != id.as_bytes(),
            Reservation::Bundles { .. } => true,
        });
        let creation = message.creation.clone().unwrap_or_default();
        match demand_of(&creation.resources, creation.strategy.as_ref()) {
            Err(reason) => out.push(failed(DEATH_UNSCHEDULABLE, reason)),
            Ok((_, Some(group))) if self.removed_groups.contains(&group) => {
                out.push(failed(
                    DEATH_PLACEMENT_GROUP,
                    format!("placement group {group} was removed"),
                ));
            }
            Ok((demand, _)) => {
                let deadline = now + self.limits.reservation_wait_ms;
                self.reservations.push_back(Reservation::Actor {
                    message: Box::new(message),
                    demand,
                    deadline,
                });
            }
        }
    }

    pub(crate) fn prepare_bundles(
        &mut self,
        group: PlacementGroupId,
        bundles: Vec<BundleKey>,
        attempt: u64,
        now: Milliseconds,
        out: &mut Vec<Command>,
    ) {
        if self.attempts.get(&group).is_some_and(|known| *known > attempt) {
            return out.push(Command::AnswerBundlesPrepared {
                group,
                attempt,
                success: false,
            });
        }
        self.attempts.insert(group, attempt);
        let waits = |reservation: &Reservation| matches!(reservation, Reservation::Bundles { group: other, .. } if *other == group);
        self.reservations.retain(|reservation| !waits(reservation));
        let mut demand = ResourceSet::new();
        for bundle in &bundles {
            demand.add_all(&set_from_wire(&bundle.resources));
        }
        let deadline = now + self.limits.reservation_wait_ms;
        self.reservations.push_back(Reservation::Bundles {
            group,
            bundles,
            attempt,
            demand,
            deadline,
        });
    }

    pub(crate) fn commit_bundles(&mut self, group: PlacementGroupId, attempt: u64, out: &mut Vec<Command>) {
        let indices: Vec<u32> = self
            .node
            .bundles()
            .filter(|(id, ..)| *id == group)
            .map(|(_, index, ..)| index)
            .collect();
        let done = !indices.is_empty()
            && indices
                .iter()
                .all(|index| self.node.commit_bundle(group, *index).is_ok());
        if done {
            self.view_changed = true;
            out.push(Command::AnswerBundlesCommitted { group, attempt });
        }
    }

    pub(crate) fn return_bundles(&mut self, group: PlacementGroupId, indices: &[u32], out: &mut Vec<Command>) {
        let of_group = |reservation: &Reservation| matches!(reservation, Reservation::Bundles { group: other, .. } if *other == group);
        self.reservations.retain(|reservation| !of_group(reservation));
        self.asked_groups.remove(&group);
        let returned = |index: u32| indices.is_empty() || indices.contains(&index);
        let here: Vec<u32> = self
            .node
            .bundles()
            .filter(|(id, ..)| *id == group)
            .map(|(_, index, ..)| index)
            .collect();
        if indices.is_empty() {
            self.attempts.remove(&group);
        }
        for index in here.into_iter().filter(|index| returned(*index)) {
            self.node.remove_bundle(group, index);
        }
        let in_them = |allocation: &Allocation| {
            allocation
                .bundle()
                .is_some_and(|(id, index)| id == group && returned(index))
        };
        let cause = death(
            DEATH_PLACEMENT_GROUP,
            format!("its placement group {group} was removed from this node"),
        );
        let leases: Vec<(LeaseId, Option<WorkerId>)> = self
            .leases
            .iter()
            .filter(|(_, lease)| in_them(&lease.allocation))
            .map(|(id, lease)| (*id, lease.worker))
            .collect();
        for (id, worker) in leases {
            match worker {
                Some(worker) => self.kill(worker, cause.clone(), out),
                None => {
                    if let Some(lease) = self.drop_lease(&id) {
                        let message = cause.message.clone();
                        out.push(Command::Refuse {
                            key: lease.key,
                            error_kind: ERROR_PLACEMENT_GROUP_REMOVED,
                            message,
                        });
                    }
                }
            }
        }
        let actors: Vec<ActorId> = self
            .actors
            .iter()
            .filter(|(_, actor)| in_them(&actor.allocation))
            .map(|(id, _)| *id)
            .collect();
        for id in actors {
            self.end_actor(id, cause.clone(), out);
        }
        self.view_changed = true;
    }

    /// Refuses what waits for placement groups that were removed.
    pub(crate) fn refuse_removed(&mut self, out: &mut Vec<Command>) {
        let removed = self.removed_groups.clone();
        let gone = self
            .queues
            .remove_where(|request| request.class.group.is_some_and(|group| removed.contains(&group)));
        for request in gone {
            let group = request.class.group.unwrap_or(PlacementGroupId::NIL);
            self.asked_groups.remove(&group);
            let message = format!("placement group {group} was removed");
            out.push(Command::Refuse {
                key: request.key,
                error_kind: ERROR_PLACEMENT_GROUP_REMOVED,
                message,
            });
        }
    }

    pub(crate) fn try_reservations(&mut self, now: Milliseconds, out: &mut Vec<Command>) {
        if self.reservations.is_empty() {
            return;
        }
        let mut still = std::collections::VecDeque::new();
        while let Some(reservation) = self.reservations.pop_front() {
            if let Some(waiting) = self.try_reservation(reservation, now, out) {
                still.push_back(waiting);
            }
        }
        self.reservations = still;
    }

    fn try_reservation(
        &mut self,
        reservation: Reservation,
        now: Milliseconds,
        out: &mut Vec<Command>,
    ) -> Option<Reservation> {
        match reservation {
            Reservation::Actor {
                message,
                demand,
                deadline,
            } => {
                let Ok(id) = ActorId::from_binary(&message.actor_id) else {
                    return None;
                };
                match self.node.allocate(&demand) {
                    Ok(allocation) => {
                        let incarnation = message.incarnation;
                        let phase = ActorPhase::WaitsForWorker;
                        let actor = Actor {
                            message: *message,
                            incarnation,
                            demand,
                            allocation,
                            worker: None,
                            phase,
                        };
                        self.actors.insert(id, actor);
                        self.awaiting.push_back((Awaiting::Actor(id), now));
                        None
                    }
                    Err(shortage) if shortage.is_infeasible() || now >= deadline || self.draining => {
                        let rejected = ActorCreated {
                            rejected: true,
                            ..answer(id, message.incarnation)
                        };
                        out.push(Command::AnswerActor(Box::new(rejected)));
                        None
                    }
                    Err(_) => Some(Reservation::Actor {
                        message,
                        demand,
                        deadline,
                    }),
                }
            }
            Reservation::Bundles {
                group,
                bundles,
                attempt,
                demand,
                deadline,
            } => {
                let mut made = Vec::new();
                let mut failure = None;
                for bundle in &bundles {
                    let fresh = self.node.bundle_state(group, bundle.index).is_none();
                    match self
                        .node
                        .prepare_bundle(group, bundle.index, &set_from_wire(&bundle.resources))
                    {
                        Ok(()) if fresh => made.push(bundle.index),
                        Ok(()) => {}
                        Err(error) => {
                            failure = Some(error);
                            break;
                        }
                    }
                }
                let Some(error) = failure else {
                    out.push(Command::AnswerBundlesPrepared {
                        group,
                        attempt,
                        success: true,
                    });
                    return None;
                };
                for index in made {
                    self.node.remove_bundle(group, index);
                }
                let hopeless = match &error {
                    ray_sched::SchedError::BundleDoesNotFit { shortage, .. } => shortage.is_infeasible(),
                    // Leases in a bundle that is being removed end soon.
                    ray_sched::SchedError::BundleRemoving { .. } => false,
                    _ => true,
                };
                if hopeless || now >= deadline || self.draining {
                    out.push(Command::AnswerBundlesPrepared {
                        group,
                        attempt,
                        success: false,
                    });
                    return None;
                }
                Some(Reservation::Bundles {
                    group,
                    bundles,
                    attempt,
                    demand,
                    deadline,
                })
            }
        }
    }

    pub(crate) fn actor_answered(
        &mut self,
        worker: WorkerId,
        message: ActorCreated,
        now: Milliseconds,
        out: &mut Vec<Command>,
    ) {
        let Some(id) = self.actor_of_worker.get(&worker).copied() else {
            return;
        };
        let Some(actor) = self
            .actors
            .get_mut(&id)
            .filter(|actor| actor.incarnation == message.incarnation)
        else {
            return;
        };
        if actor.phase != ActorPhase::Creating {
            return;
        }
        let failed = message.failure.is_some() || message.rejected;
        actor.phase = if failed {
            ActorPhase::Leaving
        } else {
            ActorPhase::Alive(Box::new(message.clone()))
        };
        out.push(Command::AnswerActor(Box::new(message)));
        if failed {
            // The control plane knows of its end: its death is no news of the actor.
            self.forget_actor(id);
            self.retire(
                worker,
                now + self.limits.forced_exit_ms,
                "its actor's constructor failed",
                out,
            );
        }
    }

    fn retire(&mut self, worker: WorkerId, deadline: Milliseconds, reason: &str, out: &mut Vec<Command>) {
        if let Some(entry) = self.pool.get_mut(&worker) {
            entry.state = WorkerState::Retired {
                deadline: Some(deadline),
            };
            out.push(Command::AskToExit {
                worker,
                reason: reason.into(),
            });
        }
    }

    pub(crate) fn kill_actor_worker(&mut self, message: KillActorWorker, now: Milliseconds, out: &mut Vec<Command>) {
        let Ok(id) = ActorId::from_binary(&message.actor_id) else {
            return;
        };
        let same = |incarnation: u64| message.incarnation == 0 || incarnation == message.incarnation;
        self.reservations.retain(|reservation| match reservation {
            Reservation::Actor { message: waiting, .. } => {
                waiting.actor_id != id.as_bytes() || !same(waiting.incarnation)
            }
            Reservation::Bundles { .. } => true,
        });
        let Some(actor) = self.actors.get_mut(&id).filter(|actor| same(actor.incarnation)) else {
            return;
        };
        let cause = message
            .cause
            .unwrap_or_else(|| death(DEATH_UNKNOWN, "the control plane ended it"));
        let graceful = message.graceful && matches!(actor.phase, ActorPhase::Alive(_));
        match actor.worker.filter(|_| graceful) {
            None => self.end_actor(id, cause, out),
            Some(worker) => {
                actor.phase = ActorPhase::Leaving;
                self.retire(worker, now + self.limits.graceful_exit_ms, &cause.message, out);
            }
        }
    }

    /// Ends an actor at once: its worker is killed and its resources are freed when it is dead.
    pub(crate) fn end_actor(&mut self, id: ActorId, cause: DeathCause, out: &mut Vec<Command>) {
        let Some(actor) = self.actors.get_mut(&id) else { return };
        match actor.worker {
            None => drop(self.forget_actor(id)),
            Some(worker) => {
                actor.phase = ActorPhase::Leaving;
                out.push(Command::KillWorker { worker, cause });
            }
        }
    }

    /// Frees what an actor holds; its worker, if it lives, is nobody's any more and leaves.
    pub(crate) fn forget_actor(&mut self, id: ActorId) -> Option<Actor> {
        let mut actor = self.actors.remove(&id)?;
        self.awaiting.retain(|(who, _)| *who != Awaiting::Actor(id));
        let allocation: Allocation = std::mem::take(&mut actor.allocation);
        self.node.release(allocation);
        if let Some(worker) = actor.worker {
            self.actor_of_worker.remove(&worker);
            if let Some(entry) = self.pool.get_mut(&worker) {
                entry.state = WorkerState::Retired { deadline: None };
            }
        }
        Some(actor)
    }

    /// A dead worker's actor, for the report.
    pub(crate) fn actor_worker_gone(
        &mut self,
        worker: WorkerId,
        _cause: &DeathCause,
        _out: &mut Vec<Command>,
    ) -> Option<(ActorId, u64)> {
        let id = self.actor_of_worker.remove(&worker)?;
        let actor = self.forget_actor(id)?;
        Some((id, actor.incarnation))
    }

    pub(crate) fn actor_start_failed(
        &mut self,
        id: ActorId,
        environment: &str,
        cause: &DeathCause,
        out: &mut Vec<Command>,
    ) {
        let wants = |actor: &Actor| {
            actor
                .message
                .creation
                .as_ref()
                .map_or("", |creation| creation.runtime_env_json.as_str())
                == environment
        };
        if !self.actors.get(&id).is_some_and(wants) {
            return;
        }
        if let Some(actor) = self.forget_actor(id) {
            let kind = if cause.kind == DEATH_RUNTIME_ENV {
                DEATH_RUNTIME_ENV
            } else {
                cause.kind
            };
            let failure = Some(DeathCause { kind, ..cause.clone() });
            out.push(Command::AnswerActor(Box::new(ActorCreated {
                failure,
                ..answer(id, actor.incarnation)
            })));
        }
    }

    pub(crate) fn end_actors_of(&mut self, job: JobId, cause: &DeathCause, out: &mut Vec<Command>) {
        self.reservations.retain(|reservation| match reservation {
            Reservation::Actor { message, .. } => {
                is_detached(message) || ActorId::from_binary(&message.actor_id).is_ok_and(|id| id.job_id() != job)
            }
            Reservation::Bundles { .. } => true,
        });
        let ends = |id: &ActorId, actor: &Actor| id.job_id() == job && !is_detached(&actor.message);
        let ids: Vec<ActorId> = self
            .actors
            .iter()
            .filter(|(id, actor)| ends(id, actor))
            .map(|(id, _)| *id)
            .collect();
        for id in ids {
            self.end_actor(id, cause.clone(), out);
        }
    }
}

fn is_detached(message: &CreateActor) -> bool {
    message.creation.as_ref().is_some_and(|creation| creation.detached)
}

/// The state of a worker that serves an actor, for `validate`.
pub(crate) fn serves_actor(state: &WorkerState) -> Option<ActorId> {
    match state {
        WorkerState::Actor(id) => Some(*id),
        _ => None,
    }
}
