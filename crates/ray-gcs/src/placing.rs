//! Where waiting actors go: owns how a creation's wishes are read, and each round of choosing nodes.
//!
//! It refuses creations whose strategy cannot be read, and ends actors that no waiting can help.
//!
//! Invariants:
//! 1. Nothing is placed while known nodes are still expected back after a restart.
//! 2. A round takes actors in the order of their registration; a wish that failed is not tried twice in a round.
//! 3. Every actor that waits says why.

use std::collections::HashMap;
use std::sync::Arc;

use ray_ids::{ActorId, NodeId, PlacementGroupId};
use ray_sched::{
    choose_node_with, demand_in_group, Choice, HybridSettings, LabelConstraint, LabelOperator, LabelSelector,
    ResourceSet, SchedulingStrategy, Unavailability,
};
use ray_wire::{
    ActorCreation, CreateActor, DeathCause, LabelCondition, Strategy, DEATH_PLACEMENT_GROUP, DEATH_UNSCHEDULABLE,
    STRATEGY_DEFAULT, STRATEGY_NODE_AFFINITY, STRATEGY_NODE_LABEL, STRATEGY_PLACEMENT_GROUP, STRATEGY_SPREAD,
};

use crate::actors::Phase;
use crate::messages::GcsMessage;
use crate::nodes::{resource_set, HoldingKey};
use crate::placement_groups::GroupPhase;
use crate::state::{id_field, Gcs};

/// What an actor asks of its node.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(crate) struct Wish {
    /// What must be free there, under its group's names where it is in one.
    pub(crate) demand: ResourceSet,
    pub(crate) strategy: SchedulingStrategy,
    pub(crate) selector: LabelSelector,
    /// Its group and bundle.
    pub(crate) group: Option<(PlacementGroupId, Option<u32>)>,
    /// The node that is best where others are as good.
    pub(crate) preferred: Option<NodeId>,
}

impl Wish {
    pub(crate) fn of(creation: &ActorCreation) -> Result<Self, String> {
        let strategy = creation.strategy.clone().unwrap_or_default();
        let holds = resource_set(&creation.resources);
        let mut demand = resource_set(&creation.placement_resources);
        // Room for what it will hold is needed in any case.
        for (name, amount) in holds.iter() {
            demand.set(name.clone(), demand.get(name).max(amount));
        }
        let mut selector = LabelSelector::any();
        let mut preferred = creation.owner.as_ref().and_then(|owner| owner.node().ok());
        let chosen = match strategy.kind {
            // What holds nothing while it runs would all be packed on one node, whose reports never show it: it is
            // dealt out in turn instead.
            STRATEGY_DEFAULT if holds.is_empty() => SchedulingStrategy::Spread,
            STRATEGY_DEFAULT => SchedulingStrategy::Default,
            STRATEGY_SPREAD => SchedulingStrategy::Spread,
            STRATEGY_NODE_AFFINITY => SchedulingStrategy::NodeAffinity {
                node: NodeId::from_binary(&strategy.node_id).map_err(|error| error.to_string())?,
                soft: strategy.soft,
                spill_on_unavailable: strategy.spill_on_unavailable,
                fail_on_unavailable: strategy.fail_on_unavailable,
            },
            STRATEGY_NODE_LABEL => SchedulingStrategy::NodeLabel {
                hard: label_selector(&strategy.hard_labels)?,
                soft: label_selector(&strategy.soft_labels)?,
            },
            STRATEGY_PLACEMENT_GROUP => SchedulingStrategy::PlacementGroup {
                id: group_of(&strategy)?,
                bundle_index: bundle_of(&strategy),
                capture_child_tasks: strategy.capture_child_tasks,
            },
            other => return Err(format!("scheduling strategy {other} is not known")),
        };
        if strategy.kind != STRATEGY_NODE_LABEL {
            selector = label_selector(&strategy.hard_labels)?;
        }
        let group = match strategy.kind {
            STRATEGY_PLACEMENT_GROUP => Some((group_of(&strategy)?, bundle_of(&strategy))),
            _ => None,
        };
        if let Some((id, bundle)) = group {
            demand = demand_in_group(&demand, id, bundle);
            preferred = None;
        }
        Ok(Self {
            demand,
            strategy: chosen,
            selector,
            group,
            preferred,
        })
    }

    /// Resources under the names of the actor's group.
    pub(crate) fn translate(&self, resources: &ResourceSet) -> ResourceSet {
        match self.group {
            Some((id, bundle)) => demand_in_group(resources, id, bundle),
            None => resources.clone(),
        }
    }
}

fn group_of(strategy: &Strategy) -> Result<PlacementGroupId, String> {
    PlacementGroupId::from_binary(&strategy.placement_group_id).map_err(|error| error.to_string())
}

fn bundle_of(strategy: &Strategy) -> Option<u32> {
    u32::try_from(strategy.bundle_index).ok()
}

/// Reads label conditions.
pub(crate) fn label_selector(conditions: &[LabelCondition]) -> Result<LabelSelector, String> {
    let read = |condition: &LabelCondition| {
        let values = condition.values.clone();
        let operator = match condition.operator {
            0 => LabelOperator::In(values),
            1 => LabelOperator::NotIn(values),
            2 => LabelOperator::Exists,
            3 => LabelOperator::DoesNotExist,
            other => return Err(format!("label operator {other} is not known")),
        };
        Ok(LabelConstraint {
            key: condition.key.clone(),
            operator,
        })
    };
    Ok(LabelSelector {
        constraints: conditions.iter().map(read).collect::<Result<_, _>>()?,
    })
}

/// Why an actor of a removed group is dead.
pub(crate) fn group_removed_cause(group: PlacementGroupId) -> DeathCause {
    let message = format!("its placement group {group} was removed");
    DeathCause {
        kind: DEATH_PLACEMENT_GROUP,
        message,
        ..DeathCause::default()
    }
}

/// What became of trying to place an actor.
enum Outcome {
    Placed(NodeId),
    Waits { reason: String, infeasible: bool },
    Hopeless(DeathCause),
}

impl Gcs {
    /// Whether work may be placed, or why not yet.
    pub(crate) fn placing_blocked(&self) -> Option<String> {
        (!self.expected_nodes.is_empty()).then(|| {
            let count = self.expected_nodes.len();
            format!("the control plane restarted and waits for {count} known node(s) to come back")
        })
    }

    /// One round over the actors that wait.
    pub(crate) fn place_actors(&mut self, random: &mut dyn FnMut() -> u64) {
        let waiting: Vec<ActorId> = self.actors.waiting.iter().map(|(_, id)| *id).collect();
        let blocked = self.placing_blocked();
        let mut failed: HashMap<Arc<Wish>, (String, bool)> = HashMap::new();
        for id in waiting {
            let Some(row) = self.actors.rows.get(&id).filter(|row| row.phase == Phase::Waiting) else {
                continue;
            };
            if let Some(reason) = &blocked {
                self.note_pending(id, reason.clone(), false);
                continue;
            }
            if row.not_before_ms > self.now_ms {
                continue;
            }
            let wish = row.wish.clone();
            if let Some((reason, infeasible)) = failed.get(&wish) {
                let (reason, infeasible) = (reason.clone(), *infeasible);
                self.note_pending(id, reason, infeasible);
                continue;
            }
            match self.try_placing(&wish, random) {
                Outcome::Placed(node) => self.place_actor(id, node),
                Outcome::Waits { reason, infeasible } => {
                    self.note_pending(id, reason.clone(), infeasible);
                    failed.insert(wish, (reason, infeasible));
                }
                Outcome::Hopeless(cause) => self.kill_actor(id, cause),
            }
        }
    }

    fn try_placing(&mut self, wish: &Wish, random: &mut dyn FnMut() -> u64) -> Outcome {
        let waits = |reason: String| Outcome::Waits {
            reason,
            infeasible: false,
        };
        if let Some((group, bundle)) = wish.group {
            if self.groups.is_removed(&group) {
                return Outcome::Hopeless(group_removed_cause(group));
            }
            let Some(row) = self.groups.rows.get(&group) else {
                return waits(format!("its placement group {group} is not registered yet"));
            };
            let count = row.bundles.len();
            if let Some(bundle) = bundle.filter(|bundle| *bundle as usize >= count) {
                let message = format!("its placement group {group} has {count} bundle(s) and no bundle {bundle}");
                return Outcome::Hopeless(DeathCause {
                    kind: DEATH_UNSCHEDULABLE,
                    message,
                    ..DeathCause::default()
                });
            }
            if row.phase != GroupPhase::Created {
                let reason = format!("its placement group {group} is not ready: {}", row.pending_reason);
                return Outcome::Waits {
                    reason,
                    infeasible: row.infeasible,
                };
            }
        }
        let settings = HybridSettings::default();
        let (view, cursor) = (&self.view, &mut self.spread_cursor);
        let choice = choose_node_with(
            &settings,
            &wish.selector,
            view,
            &wish.demand,
            &wish.strategy,
            wish.preferred,
            random,
            cursor,
        );
        match choice {
            Choice::Node(node) => Outcome::Placed(node),
            Choice::Busy(_) => waits(format!("it waits for {} to be free on a suitable node", wish.demand)),
            Choice::Infeasible(reason) => Outcome::Waits {
                reason: reason.to_string(),
                infeasible: true,
            },
            Choice::Unavailable(unavailable) => {
                let linkless = match &unavailable {
                    Unavailability::Dead(node) => self.nodes.get(node).is_some_and(|row| row.alive),
                    Unavailability::Draining(_) | Unavailability::Busy(..) => false,
                };
                if linkless {
                    return waits("its node's link to the control plane is being made again".to_string());
                }
                let message = unavailable.to_string();
                Outcome::Hopeless(DeathCause {
                    kind: DEATH_UNSCHEDULABLE,
                    message,
                    ..DeathCause::default()
                })
            }
        }
    }

    /// Keeps why an actor waits, and tells those who watch when that is news to them.
    fn note_pending(&mut self, id: ActorId, reason: String, infeasible: bool) {
        let Some(row) = self.actors.rows.get_mut(&id) else {
            return;
        };
        if row.pending_reason == reason && row.infeasible == infeasible {
            return;
        }
        row.pending_reason = reason;
        row.infeasible = infeasible;
        self.publish_actor(id);
    }

    fn place_actor(&mut self, id: ActorId, node: NodeId) {
        self.change_actor(id, |row| {
            row.phase = Phase::Placing(node);
            row.pending_reason = format!("it is being created on node {node}");
            row.infeasible = false;
        });
        let Some(row) = self.actors.rows.get(&id) else { return };
        let mut creation = row.creation.as_ref().clone();
        if let Some(call) = creation.call.as_mut() {
            // The constructor can tell whether the actor lived before.
            call.attempt = row.restarts;
        }
        let (incarnation, held) = (row.incarnation, Self::held_resources(row));
        let message = CreateActor {
            actor_id: id_field(id.as_bytes()),
            incarnation,
            creation: Some(creation),
            job_config_json: self.job_config(id.job_id()),
        };
        self.actor_changed(id);
        self.count_placement(node);
        self.hold(node, HoldingKey::Actor(id), held);
        self.send(node, GcsMessage::PlaceActor(Box::new(message)));
    }
}
