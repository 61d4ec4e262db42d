//! The invariants, as a check that tests call after every step.

use ray_sched::Quantity;

use crate::actors::Phase;
use crate::error::GcsError;
use crate::placement_groups::GroupPhase;
use crate::state::Gcs;

type Check = Result<(), String>;

fn ensure(holds: bool, what: impl FnOnce() -> String) -> Check {
    if holds {
        Ok(())
    } else {
        Err(what())
    }
}

impl Gcs {
    /// Checks every invariant that can be seen between two steps.
    pub fn validate(&self) -> Result<(), GcsError> {
        let all = [
            Self::validate_nodes,
            Self::validate_actors,
            Self::validate_names,
            Self::validate_groups,
            Self::validate_jobs,
            Self::validate_bounds,
        ];
        all.iter()
            .try_for_each(|check| check(self))
            .map_err(GcsError::Inconsistent)?;
        self.kv.check().map_err(GcsError::Inconsistent)?;
        self.watches.check().map_err(GcsError::Inconsistent)
    }

    fn validate_nodes(&self) -> Check {
        for (id, row) in &self.nodes {
            ensure(row.alive == self.view.nodes.contains_key(id), || {
                format!("node {id} is alive or in the view only")
            })?;
            ensure(row.alive || !row.link_up, || format!("dead node {id} has a link"))?;
            ensure(row.alive || row.holdings.is_empty(), || {
                format!("room is held on dead node {id}")
            })?;
            let Some(view) = self.view.nodes.get(id) else { continue };
            for (name, _) in row.holdings.iter().flat_map(|holding| holding.resources.iter()) {
                let held: i64 = row
                    .holdings
                    .iter()
                    .map(|holding| holding.resources.get(name).raw())
                    .sum();
                // Bundles come and go, and what is held in one with them.
                let plain = name.group().is_none();
                ensure(!plain || Quantity::from_raw(held) <= view.total.get(name), || {
                    format!(
                        "{held} of {name} is held on node {id}, which has {}",
                        view.total.get(name)
                    )
                })?;
            }
            for (name, free) in view.available.iter().filter(|(name, _)| name.group().is_none()) {
                ensure(free <= view.total.get(name), || {
                    format!("node {id} has more {name} free than it has")
                })?;
            }
        }
        let dead = self.nodes.values().filter(|row| !row.alive).count();
        ensure(dead == self.dead_nodes.len(), || {
            format!("{dead} nodes are dead and {} listed", self.dead_nodes.len())
        })?;
        ensure(
            self.expected_nodes
                .iter()
                .all(|id| self.nodes.get(id).is_some_and(|row| row.alive)),
            || "a node that is not alive is expected back".into(),
        )
    }

    fn validate_actors(&self) -> Check {
        for (id, row) in &self.actors.rows {
            let waiting = self.actors.waiting.contains(&(row.order, *id));
            ensure(waiting == (row.phase == Phase::Waiting), || {
                format!("actor {id} and the waiting list disagree")
            })?;
            if let Some(node) = row.node() {
                ensure(self.nodes.get(&node).is_some_and(|row| row.alive), || {
                    format!("actor {id} is on dead node {node}")
                })?;
                let indexed = self.actors.by_node.get(&node).is_some_and(|actors| actors.contains(id));
                ensure(indexed, || format!("actor {id} is not in the index of its node {node}"))?;
            }
            ensure(row.incarnation > u64::from(row.restarts), || {
                format!("actor {id} restarted more than it lived")
            })?;
            if row.is_dead() {
                ensure(row.death.is_some(), || format!("actor {id} is dead without a cause"))?;
                ensure(row.creation.call.is_none(), || {
                    format!("actor {id} is dead and keeps its creation")
                })?;
                ensure(!self.watches.of_actor.contains_key(id), || {
                    format!("dead actor {id} is watched")
                })?;
            }
            if let Phase::Alive(node) = row.phase {
                let there = row.worker.as_ref().and_then(|worker| worker.node().ok());
                ensure(there.is_none_or(|there| there == node), || {
                    format!("actor {id} lives on another node than {node}")
                })?;
            }
            if let Some((group, _)) = row.wish.group.filter(|_| !row.is_dead()) {
                let removed = self
                    .groups
                    .rows
                    .get(&group)
                    .is_some_and(|row| row.phase == GroupPhase::Removed);
                ensure(!removed, || {
                    format!("actor {id} lives in removed placement group {group}")
                })?;
            }
            if let Some(owner) = row.owner().filter(|_| !row.is_dead() && !row.creation.detached) {
                ensure(!self.is_process_dead(owner), || {
                    format!("actor {id} outlives its owner")
                })?;
            }
        }
        let indexed: usize = self.actors.by_node.values().map(|actors| actors.len()).sum();
        let placed = self.actors.rows.values().filter(|row| row.node().is_some()).count();
        ensure(indexed == placed, || {
            format!("{placed} actors are on nodes and {indexed} are indexed")
        })
    }

    fn validate_names(&self) -> Check {
        let mut holders = 0;
        for (id, row) in self.actors.rows.iter().filter(|(_, row)| row.holds_name()) {
            let key = (row.creation.namespace.clone(), row.creation.name.clone());
            holders += 1;
            ensure(self.actors.names.get(&key) == Some(id), || {
                format!("actor {id} does not hold its name {key:?}")
            })?;
        }
        ensure(holders == self.actors.names.len(), || {
            "a name is held by an actor that is dead or out of scope".into()
        })
    }

    fn validate_groups(&self) -> Check {
        for (id, row) in &self.groups.rows {
            for node in row.nodes() {
                ensure(self.nodes.get(&node).is_some_and(|row| row.alive), || {
                    format!("placement group {id} has a bundle on dead node {node}")
                })?;
            }
            let (placed, fresh) = (
                row.bundles.iter().filter(|bundle| bundle.node.is_some()).count(),
                row.bundles.iter().filter(|bundle| bundle.fresh).count(),
            );
            match &row.phase {
                GroupPhase::Created => ensure(placed == row.bundles.len() && fresh == 0, || {
                    format!("placement group {id} is created with {placed} bundles placed")
                })?,
                GroupPhase::Removed => ensure(placed == 0, || format!("removed placement group {id} has bundles"))?,
                GroupPhase::Waiting => ensure(fresh == 0, || format!("waiting placement group {id} has an attempt"))?,
                GroupPhase::Preparing(nodes) | GroupPhase::Committing(nodes) => {
                    ensure(!nodes.is_empty() && fresh > 0, || {
                        format!("placement group {id} waits for nobody")
                    })?;
                    ensure(nodes.is_subset(&row.nodes()), || {
                        format!("placement group {id} waits for a stranger")
                    })?;
                }
            }
        }
        Ok(())
    }

    fn validate_jobs(&self) -> Check {
        for (job, _) in self.jobs.rows.iter().filter(|(_, row)| row.finished) {
            for id in self.actors.of_job(*job) {
                let lives = self
                    .actors
                    .rows
                    .get(&id)
                    .is_some_and(|row| !row.is_dead() && !row.creation.detached);
                ensure(!lives, || format!("actor {id} outlives its job {job}"))?;
            }
            let detached = self
                .actors
                .of_job(*job)
                .iter()
                .any(|id| self.actors.rows.get(id).is_some_and(|row| !row.is_dead()));
            ensure(detached || !self.kv.of_job.contains_key(job), || {
                format!("keys outlive their job {job}")
            })?;
            for row in self
                .groups
                .rows
                .values()
                .filter(|row| row.specification.job_id == job.as_bytes())
            {
                ensure(row.specification.detached || row.phase == GroupPhase::Removed, || {
                    format!("placement group {} outlives its job {job}", row.id)
                })?;
            }
        }
        ensure(
            self.jobs
                .rows
                .keys()
                .all(|job| job.int() >= 1 && job.int() < self.jobs.next_number),
            || "a job has a number that was not given yet".into(),
        )
    }

    fn validate_bounds(&self) -> Check {
        let within = |name: &str, count: usize, limit: u64| {
            ensure(count as u64 <= limit, || {
                format!("{count} {name} exceed the limit {limit}")
            })
        };
        let settings = &self.settings;
        within(
            "dead nodes",
            self.dead_nodes.len(),
            settings.maximum_gcs_dead_node_cached_count,
        )?;
        within(
            "dead actors",
            self.actors.dead.len(),
            settings.maximum_gcs_destroyed_actor_cached_count,
        )?;
        within(
            "removed groups",
            self.groups.removed.len(),
            settings.maximum_removed_placement_groups,
        )?;
        within("requests", self.requests.len(), settings.maximum_remembered_requests)?;
        let dead = self.actors.rows.values().filter(|row| row.is_dead()).count();
        ensure(dead == self.actors.dead.len(), || {
            format!("{dead} actors are dead and {} listed", self.actors.dead.len())
        })
    }
}
