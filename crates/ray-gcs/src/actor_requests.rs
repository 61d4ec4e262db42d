//! What processes ask about actors: registering, killing, looking up by name, letting go.
//!
//! It refuses names that are taken, actors of jobs that do not run, and ids that are not known.
//!
//! Invariants:
//! 1. Every request may be repeated: the second answer is the first one's, and nothing happens twice.
//! 2. Who registers an actor that cannot live is told so by a state that is dead with its cause, never by silence.

use std::sync::Arc;

use ray_ids::ActorId;
use ray_wire::{
    ActorKey, ActorName, Address, DeathCause, GcsReply, KillActor, RegisterActor, DEATH_KILLED, DEATH_OWNER,
    GCS_ERROR_NAME_TAKEN, GCS_ERROR_NOT_FOUND,
};

use crate::actors::{out_of_scope_cause, ActorRow, Phase};
use crate::placing::{group_removed_cause, Wish};
use crate::records::Table;
use crate::state::{done, invalid, refusal, Gcs};

impl Gcs {
    fn actor_reply(&self, id: ActorId) -> GcsReply {
        GcsReply {
            actor: self.actor_state(id),
            ..done()
        }
    }

    pub(crate) fn register_actor(&mut self, sender: Option<Address>, register: RegisterActor) -> GcsReply {
        let Ok(id) = ActorId::from_binary(&register.actor_id) else {
            return invalid("an actor id has 16 bytes");
        };
        let Some(mut creation) = register.creation else {
            return invalid("the actor has no creation");
        };
        if self.actors.rows.contains_key(&id) {
            return self.actor_reply(id);
        }
        if creation.owner.is_none() {
            creation.owner = sender;
        }
        if !creation.name.is_empty() {
            let key = (creation.namespace.clone(), creation.name.clone());
            if let Some(holder) = self.actors.names.get(&key).copied() {
                if register.get_if_exists {
                    return self.actor_reply(holder);
                }
                let error = format!(
                    "the name {:?} is taken in namespace {:?} by actor {holder}: choose another name, or use get_if_exists=True",
                    key.1, key.0
                );
                return refusal(GCS_ERROR_NAME_TAKEN, error);
            }
        }
        if self.tombstones.contains(&id) {
            return invalid(format!("actor {id} is dead"));
        }
        if !self.jobs.runs(id.job_id()) {
            return invalid(format!("job {} of actor {id} does not run", id.job_id()));
        }
        let wish = match Wish::of(&creation) {
            Ok(wish) => Arc::new(wish),
            Err(problem) => return invalid(problem),
        };
        let order = self.actors.next_order;
        self.actors.next_order += 1;
        let owner_died = !creation.detached
            && creation
                .owner
                .as_ref()
                .is_some_and(|owner| match (owner.node(), owner.worker()) {
                    (Ok(node), Ok(worker)) => self.is_process_dead((node, worker)),
                    _ => false,
                });
        self.put_row(Table::ActorCreations, id.as_bytes(), &creation);
        let row = ActorRow {
            id,
            creation: Arc::new(creation),
            wish,
            phase: Phase::Waiting,
            incarnation: 1,
            restarts: 0,
            worker: None,
            pid: 0,
            death: None,
            pending_reason: "it is about to be placed".into(),
            infeasible: false,
            was_alive: false,
            out_of_scope: false,
            order,
            not_before_ms: 0,
            rejections: 0,
            start_time_ms: 0,
            end_time_ms: 0,
        };
        self.actors.rows.insert(id, row);
        self.actors.index(id);
        self.watches.registered(id);
        if owner_died {
            let message = "its owner died before it was registered".to_string();
            self.kill_actor(
                id,
                DeathCause {
                    kind: DEATH_OWNER,
                    message,
                    ..DeathCause::default()
                },
            );
        } else if let Some(cause) = self.group_is_gone(id) {
            self.kill_actor(id, cause);
        } else {
            self.actor_changed(id);
        }
        self.place_at_end = true;
        self.actor_reply(id)
    }

    /// Why an actor cannot live any more, where its placement group was removed.
    fn group_is_gone(&self, id: ActorId) -> Option<DeathCause> {
        let (group, _) = self.actors.rows.get(&id)?.wish.group?;
        self.groups.is_removed(&group).then(|| group_removed_cause(group))
    }

    pub(crate) fn kill_actor_request(&mut self, kill: &KillActor) -> GcsReply {
        let Ok(id) = ActorId::from_binary(&kill.actor_id) else {
            return invalid("an actor id has 16 bytes");
        };
        let Some(row) = self.actors.rows.get(&id) else {
            return refusal(GCS_ERROR_NOT_FOUND, format!("actor {id} is not known"));
        };
        let message = "it was killed by `ray.kill`".to_string();
        let cause = DeathCause {
            kind: DEATH_KILLED,
            message,
            ..DeathCause::default()
        };
        let (node, incarnation) = (row.node(), row.incarnation);
        if kill.no_restart {
            self.kill_actor(id, cause);
        } else if let Some(node) = node {
            // Its death report decides whether it is restarted. One that waits for a node has nothing to be killed.
            self.send_kill(node, id, incarnation, cause, false);
        }
        done()
    }

    pub(crate) fn actor_out_of_scope(&mut self, key: &ActorKey) -> GcsReply {
        let Ok(id) = ActorId::from_binary(&key.actor_id) else {
            return invalid("an actor id has 16 bytes");
        };
        let Some(row) = self.actors.rows.get(&id) else {
            return refusal(GCS_ERROR_NOT_FOUND, format!("actor {id} is not known"));
        };
        if row.is_dead() || row.out_of_scope || row.creation.detached {
            return done();
        }
        // Calls may be queued at its owner, so one that waits for room is created still; one without hope is not.
        let hopeless = row.infeasible;
        self.change_actor(id, |row| row.out_of_scope = true);
        if hopeless {
            let cause = out_of_scope_cause(&DeathCause::default());
            self.actor_is_dead(id, cause);
        } else {
            self.actor_changed(id);
            self.end_if_out_of_scope(id);
        }
        done()
    }

    pub(crate) fn get_named_actor(&self, name: ActorName) -> GcsReply {
        match self.actors.names.get(&(name.namespace.clone(), name.name.clone())) {
            Some(id) => self.actor_reply(*id),
            None => {
                let ActorName { name, namespace } = name;
                refusal(
                    GCS_ERROR_NOT_FOUND,
                    format!("no actor has the name {name:?} in namespace {namespace:?}"),
                )
            }
        }
    }
}
