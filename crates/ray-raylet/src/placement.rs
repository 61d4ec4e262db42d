//! From messages to decisions: owns how a lease's specification becomes a demand and a strategy, and what a node's
//! description becomes in the view.
//!
//! It refuses specifications that name things badly, with a sentence for the owner.
//!
//! Invariant: 1. A demand inside a placement group is under the group's names.

use crate::queues::Class;
use ray_ids::{NodeId, PlacementGroupId};
use ray_sched::{
    demand_in_group, Allocation, LabelConstraint, LabelOperator, LabelSelector, NodeView, ResourceName, ResourceSet,
    SchedulingStrategy, UnitResources,
};
use ray_wire::{
    LabelCondition, LeaseSpecification, NodeInfo, ResourceAmount, Strategy, STRATEGY_DEFAULT, STRATEGY_NODE_AFFINITY,
    STRATEGY_NODE_LABEL, STRATEGY_PLACEMENT_GROUP, STRATEGY_SPREAD,
};

/// Amounts as a message holds them.
pub fn set_from_wire(amounts: &[ResourceAmount]) -> ResourceSet {
    ResourceSet::from_raw(amounts.iter().map(|amount| (amount.name.as_str(), amount.amount_e4)))
}

/// Amounts for a message.
pub fn set_to_wire(set: &ResourceSet) -> Vec<ResourceAmount> {
    set.iter()
        .map(|(name, amount)| ResourceAmount {
            name: name.to_string(),
            amount_e4: amount.raw(),
        })
        .collect()
}

fn selector(conditions: &[LabelCondition]) -> Result<LabelSelector, String> {
    let read = |condition: &LabelCondition| {
        let operator = match condition.operator {
            0 => LabelOperator::In(condition.values.clone()),
            1 => LabelOperator::NotIn(condition.values.clone()),
            2 => LabelOperator::Exists,
            3 => LabelOperator::DoesNotExist,
            other => {
                return Err(format!(
                    "a label condition on {} has the unknown operator {other}",
                    condition.key
                ))
            }
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

/// What a strategy means to the scheduler, and the labels wanted beside it.
pub fn strategy_from_wire(strategy: Option<&Strategy>) -> Result<(SchedulingStrategy, LabelSelector), String> {
    let Some(strategy) = strategy else {
        return Ok((SchedulingStrategy::Default, LabelSelector::any()));
    };
    let beside = || selector(&strategy.hard_labels);
    Ok(match strategy.kind {
        STRATEGY_DEFAULT => (SchedulingStrategy::Default, beside()?),
        STRATEGY_SPREAD => (SchedulingStrategy::Spread, beside()?),
        STRATEGY_NODE_AFFINITY => {
            let node = NodeId::from_binary(&strategy.node_id).map_err(|error| error.to_string())?;
            let affinity = SchedulingStrategy::NodeAffinity {
                node,
                soft: strategy.soft,
                spill_on_unavailable: strategy.spill_on_unavailable,
                fail_on_unavailable: strategy.fail_on_unavailable,
            };
            (affinity, beside()?)
        }
        STRATEGY_NODE_LABEL => {
            let labels = SchedulingStrategy::NodeLabel {
                hard: beside()?,
                soft: selector(&strategy.soft_labels)?,
            };
            (labels, LabelSelector::any())
        }
        STRATEGY_PLACEMENT_GROUP => {
            let id = PlacementGroupId::from_binary(&strategy.placement_group_id).map_err(|error| error.to_string())?;
            let bundle_index = u32::try_from(strategy.bundle_index).ok();
            let capture_child_tasks = strategy.capture_child_tasks;
            (
                SchedulingStrategy::PlacementGroup {
                    id,
                    bundle_index,
                    capture_child_tasks,
                },
                LabelSelector::any(),
            )
        }
        other => return Err(format!("scheduling strategy {other} is not known to this version")),
    })
}

/// The demand of `amounts` under a strategy, and the placement group it is in.
pub fn demand_of(
    amounts: &[ResourceAmount],
    strategy: Option<&Strategy>,
) -> Result<(ResourceSet, Option<PlacementGroupId>), String> {
    let set = set_from_wire(amounts);
    if let Some(group) = set.placement_group() {
        return Ok((set, Some(group)));
    }
    match strategy_from_wire(strategy)?.0 {
        SchedulingStrategy::PlacementGroup { id, bundle_index, .. } => {
            Ok((demand_in_group(&set, id, bundle_index), Some(id)))
        }
        _ => Ok((set, None)),
    }
}

/// The class of a specification.
pub fn class_of(specification: LeaseSpecification) -> Result<Class, String> {
    let (demand, group) = demand_of(&specification.resources, specification.strategy.as_ref())?;
    let (strategy, labels) = strategy_from_wire(specification.strategy.as_ref())?;
    Ok(Class {
        specification,
        demand,
        group,
        strategy,
        labels,
    })
}

/// A node as the view holds it.
pub fn view_of(node: &NodeInfo) -> NodeView {
    NodeView {
        total: set_from_wire(&node.total),
        available: set_from_wire(&node.available),
        labels: node
            .labels
            .iter()
            .map(|label| (label.key.clone(), label.value.clone()))
            .collect(),
        alive: node.alive,
        draining: node.draining,
    }
}

/// The devices of an allocation as `LeaseAssigned.resource_instances_json` says them: `{"GPU": [[0, 1.0]]}`.
pub fn instances_json(allocation: &Allocation, units: &UnitResources) -> String {
    let mut entries = serde_json::Map::new();
    for (name, amount) in allocation.resources().iter() {
        if !units.contains(name) {
            continue;
        }
        let share = if amount.whole_units() >= 1 {
            1.0
        } else {
            amount.to_f64()
        };
        let devices: Vec<serde_json::Value> = allocation
            .device_ids(name)
            .iter()
            .map(|device| serde_json::json!([device, share]))
            .collect();
        entries.insert(name.to_string(), devices.into());
    }
    serde_json::Value::Object(entries).to_string()
}

/// Whether two demands want some of the same resource.
pub fn overlap(first: &ResourceSet, second: &ResourceSet) -> bool {
    first.iter().any(|(name, _)| !second.get(name).is_zero())
}

/// Whether giving back `held` (the demand of a lease, in `group`) could help with a shortage of `name`.
pub fn helps_with(
    name: &ResourceName,
    held: &ResourceSet,
    group: Option<PlacementGroupId>,
    allocation: &Allocation,
) -> bool {
    match name.group() {
        None => group.is_none() && !held.get(name).is_zero(),
        Some(wanted) => group == Some(wanted.placement_group) && !allocation.resources().get(&wanted.base).is_zero(),
    }
}
