//! What the scheduler tells of itself: the resource report, the snapshot for a control plane that restarted, answers to
//! questions, and `validate`.
//!
//! Invariants: those of `scheduler`, which `validate` checks.

use crate::actors::serves_actor;
use crate::placement::set_to_wire;
use crate::queues::Class;
use crate::scheduler::{ActorPhase, Awaiting, LocalScheduler, Reservation};
use crate::types::Milliseconds;
use crate::worker_pool::WorkerState;
use ray_ids::{JobId, LeaseId, WorkerId};
use ray_sched::{BundleState, ResourceSet};
use ray_wire::{ActorCreated, BundleKey, Demand, ResourceReport};
use rustc_hash::FxHashMap;
use std::sync::Arc;

impl LocalScheduler {
    /// What the node has free and what waits; idle leases count as free.
    pub fn resource_report(&self) -> ResourceReport {
        let mut demands: Vec<Demand> = Vec::new();
        for class in self.queues.classes() {
            let infeasible = self
                .queues
                .head(&class)
                .and_then(|head| head.told.as_ref())
                .is_some_and(|told| told.1);
            demands.push(Demand {
                resources: set_to_wire(&class.demand),
                count: self.queues.count(&class) as u64,
                infeasible,
            });
        }
        let mut available = self.node.available_if_released(self.idle_allocations());
        for reservation in &self.reservations {
            // What the control plane has placed here and waits for recalled leases is spoken for.
            let (Reservation::Actor { demand, .. } | Reservation::Bundles { demand, .. }) = reservation;
            for (name, amount) in demand.iter() {
                available.set(name.clone(), available.get(name) - amount);
            }
        }
        ResourceReport {
            total: set_to_wire(&self.node.total_set()),
            available: set_to_wire(&available),
            demands,
            ..Default::default()
        }
    }

    /// Whether nothing runs or waits here.
    pub fn is_idle(&self) -> bool {
        self.leases.is_empty() && self.actors.is_empty() && self.queues.is_empty() && self.reservations.is_empty()
    }

    /// The node's resources as they are now, for tests and the simulator.
    pub fn available(&self) -> ResourceSet {
        self.node.available_set()
    }

    /// The actors here, for a control plane that restarted; one that is being created still has no worker. Those that
    /// wait for room are here too: the control plane would place what is not named a second time.
    pub fn actors_here(&self) -> Vec<ActorCreated> {
        let told = self.actors.iter().filter_map(|(id, actor)| match &actor.phase {
            ActorPhase::Alive(created) => Some((**created).clone()),
            ActorPhase::Leaving => None,
            _ => Some(ActorCreated {
                actor_id: ray_wire::id_bytes(id.as_bytes()),
                incarnation: actor.incarnation,
                ..Default::default()
            }),
        });
        let waiting = self.reservations.iter().filter_map(|reservation| match reservation {
            Reservation::Actor { message, .. } => Some(ActorCreated {
                actor_id: message.actor_id.clone(),
                incarnation: message.incarnation,
                ..Default::default()
            }),
            Reservation::Bundles { .. } => None,
        });
        told.chain(waiting).collect()
    }

    /// How many actors and bundles this node has taken in that wait for resources still.
    pub fn reservations_waiting(&self) -> usize {
        self.reservations.len()
    }

    /// Counts changes of the resources.
    pub fn revision(&self) -> u64 {
        self.node.revision()
    }

    /// The bundles here, for a control plane that restarted.
    pub fn bundle_keys(&self) -> Vec<BundleKey> {
        self.node
            .bundles()
            .filter(|(_, _, state, _)| *state != BundleState::Removing)
            .map(|(group, index, state, resources)| BundleKey {
                placement_group_id: ray_wire::id_bytes(group.as_bytes()),
                index,
                resources: set_to_wire(resources),
                committed: state == BundleState::Committed,
            })
            .collect()
    }

    /// The lease a worker serves, with the first sequence of it.
    pub fn lease_of_worker(&self, worker: &WorkerId) -> Option<(LeaseId, u64)> {
        match self.pool.get(worker)?.state {
            WorkerState::Leased(id) => Some((id, self.leases.get(&id)?.first_sequence)),
            _ => None,
        }
    }

    /// The job a worker serves.
    pub fn job_of_worker(&self, worker: &WorkerId) -> Option<JobId> {
        self.pool.get(worker)?.job
    }

    /// Whether that worker is one of this node's.
    pub fn knows_worker(&self, worker: &WorkerId) -> bool {
        self.pool.get(worker).is_some()
    }

    /// Every lease with a worker, with the first sequence of it.
    pub fn active_leases(&self) -> Vec<(LeaseId, WorkerId, u64)> {
        self.leases
            .iter()
            .filter_map(|(id, lease)| Some((*id, lease.worker?, lease.first_sequence)))
            .collect()
    }

    /// How many requests wait.
    pub fn waiting(&self) -> usize {
        self.queues.len() + self.reservations.len() + self.awaiting.len()
    }

    /// Leases in JSON, waiting requests included.
    pub fn describe_leases(&self, now: Milliseconds) -> serde_json::Value {
        let leases: Vec<serde_json::Value> = self
            .leases
            .iter()
            .map(|(id, lease)| {
                serde_json::json!({
                    "lease_id": id.hex(),
                    "owner": lease.key.process.hex(),
                    "worker_id": lease.worker.map(|worker| worker.hex()),
                    "function_name": lease.class.specification.function_name,
                    "resources": amounts_json(&lease.class.demand),
                    "age_ms": now.saturating_sub(lease.since),
                    "recalled": lease.recalled_at.is_some(),
                    "blocked_on": lease.blocked,
                    "activity": format!("{:?}", lease.activity).to_lowercase(),
                })
            })
            .collect();
        serde_json::json!({ "leases": leases, "waiting": self.describe_waiting(now) })
    }

    /// Waiting requests, actors and bundles in JSON, each with its reason.
    pub fn describe_waiting(&self, now: Milliseconds) -> Vec<serde_json::Value> {
        let reason = |class: &Arc<Class>, told: &Option<(String, bool)>| match told {
            Some((reason, true)) => reason.clone(),
            _ => self.waiting_reason(class),
        };
        let mut waiting: Vec<serde_json::Value> = self
            .queues
            .iter()
            .map(|request| {
                serde_json::json!({
                    "kind": "lease",
                    "owner": request.key.process.hex(),
                    "function_name": request.class.specification.function_name,
                    "resources": amounts_json(&request.class.demand),
                    "waiting_ms": now.saturating_sub(request.queued_at),
                    "infeasible": request.told.as_ref().is_some_and(|told| told.1),
                    "reason": reason(&request.class, &request.told),
                })
            })
            .collect();
        for (who, since) in &self.awaiting {
            let name = match who {
                Awaiting::Lease(id) => format!("lease {id}"),
                Awaiting::Actor(id) => format!("actor {id}"),
            };
            waiting.push(serde_json::json!({
                "kind": "worker", "for": name, "waiting_ms": now.saturating_sub(*since),
                "reason": "its resources are reserved and its worker is starting",
            }));
        }
        waiting
    }

    /// Workers in JSON.
    pub fn describe_workers(&self) -> Vec<serde_json::Value> {
        self.pool
            .iter()
            .map(|(id, worker)| {
                let state = match worker.state {
                    WorkerState::Starting { .. } => "starting".to_string(),
                    WorkerState::Idle { .. } => "idle".to_string(),
                    WorkerState::Leased(_) => "leased".to_string(),
                    WorkerState::Actor(_) => "actor".to_string(),
                    WorkerState::Retired { .. } => "retired".to_string(),
                };
                let actor = self.actor_of_worker.get(id).map(|actor| actor.hex());
                serde_json::json!({
                    "worker_id": id.hex(), "state": state, "job_id": worker.job.map(|job| job.hex()),
                    "actor_id": actor, "leases_served": worker.leases_served,
                })
            })
            .collect()
    }

    /// Checks the invariants.
    pub fn validate(&self) -> Result<(), String> {
        self.node.validate().map_err(|error| error.to_string())?;
        self.queues.validate()?;
        for (id, lease) in &self.leases {
            match lease.worker {
                Some(worker) => {
                    let state = self.pool.get(&worker).map(|worker| worker.state);
                    if state != Some(WorkerState::Leased(*id)) {
                        return Err(format!("lease {id} names a worker that is {state:?}"));
                    }
                }
                None => {
                    let places = self
                        .awaiting
                        .iter()
                        .filter(|(who, _)| *who == Awaiting::Lease(*id))
                        .count();
                    if places != 1 {
                        return Err(format!(
                            "lease {id} has no worker and {places} places among those who wait"
                        ));
                    }
                }
            }
            if self.queues.contains(&lease.key) {
                return Err(format!("{:?} waits and is granted", lease.key));
            }
        }
        let mut keys: FxHashMap<_, usize> = FxHashMap::default();
        for lease in self.leases.values() {
            *keys.entry(lease.key).or_default() += 1;
        }
        if let Some((key, _)) = keys.iter().find(|(_, count)| **count > 1) {
            return Err(format!("{key:?} was granted twice"));
        }
        for (id, worker) in self.pool.iter() {
            if let WorkerState::Leased(lease) = worker.state {
                if self.leases.get(&lease).and_then(|lease| lease.worker) != Some(*id) {
                    return Err(format!(
                        "worker {id} says that it is under lease {lease}, which says otherwise"
                    ));
                }
            }
            if let Some(actor) = serves_actor(&worker.state) {
                if self.actors.get(&actor).and_then(|actor| actor.worker) != Some(*id) {
                    return Err(format!(
                        "worker {id} says that it is actor {actor}, which says otherwise"
                    ));
                }
            }
        }
        for (id, actor) in &self.actors {
            match actor.worker {
                Some(worker) if self.actor_of_worker.get(&worker) != Some(id) => {
                    return Err(format!("actor {id} is not its worker's actor"));
                }
                None if !self.awaiting.iter().any(|(who, _)| *who == Awaiting::Actor(*id)) => {
                    return Err(format!("actor {id} has no worker and waits for none"));
                }
                _ => {}
            }
        }
        if self.actor_of_worker.len() != self.actors.values().filter(|actor| actor.worker.is_some()).count() {
            return Err("workers name actors that are not there".into());
        }
        self.validate_conservation()
    }

    /// Releasing everything that is held must give back everything there is.
    fn validate_conservation(&self) -> Result<(), String> {
        let held = self.leases.values().map(|lease| &lease.allocation);
        let held = held.chain(self.actors.values().map(|actor| &actor.allocation));
        let free = self.node.available_if_released(held);
        let mut expected = self.node.total_set();
        for (_, _, _, resources) in self.node.bundles() {
            if !expected.checked_sub(resources) {
                return Err("bundles hold more than the node has".into());
            }
        }
        if free != expected {
            return Err(format!(
                "with everything given back {free} would be free and not {expected}"
            ));
        }
        Ok(())
    }
}

fn amounts_json(set: &ResourceSet) -> serde_json::Value {
    set.iter()
        .map(|(name, amount)| (name.to_string(), serde_json::json!(amount.to_f64())))
        .collect::<serde_json::Map<_, _>>()
        .into()
}
