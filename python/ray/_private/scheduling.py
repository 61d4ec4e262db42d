"""From options to what the runtime schedules by: resources and a strategy.

Invariants:

1. A task without explicit CPUs needs 1; an actor without any resources needs 1 to be placed and 0 to run.
2. With captured child tasks, a task without a strategy of its own runs in its parent's placement group.
"""

from __future__ import annotations

from typing import Any

from ray._private.options import parse_label_selector

DEFAULT_STRATEGY: dict[str, Any] = {"kind": "DEFAULT"}


def _add_common(resources: dict[str, float], options: dict[str, Any]) -> None:
    resources.update({name: float(quantity) for name, quantity in (options.get("resources") or {}).items()})
    for option, name in (("num_gpus", "GPU"), ("memory", "memory"), ("object_store_memory", "object_store_memory")):
        quantity = options.get(option)
        if quantity:
            resources[name] = float(quantity)
    accelerator = options.get("accelerator_type")
    if accelerator:
        # A sliver of a resource that only nodes with that accelerator have.
        resources[f"accelerator_type:{accelerator}"] = 0.001


def task_resources(options: dict[str, Any]) -> dict[str, float]:
    """What a task holds while it runs; amounts of zero are left out.

    Example:
        >>> task_resources({"num_gpus": 1})
        {'CPU': 1.0, 'GPU': 1.0}
    """
    resources: dict[str, float] = {}
    cpus = options.get("num_cpus")
    resources["CPU"] = 1.0 if cpus is None else float(cpus)
    _add_common(resources, options)
    return {name: quantity for name, quantity in resources.items() if quantity}


def actor_resources(options: dict[str, Any]) -> tuple[dict[str, float], dict[str, float]]:
    """What an actor holds while it lives, and what a node must have free for it to be placed there."""
    resources: dict[str, float] = {}
    cpus = options.get("num_cpus")
    if cpus is not None:
        resources["CPU"] = float(cpus)
    _add_common(resources, options)
    running = {name: quantity for name, quantity in resources.items() if quantity}
    only_cpus_missing = cpus is None and not any(
        options.get(name) is not None for name in ("num_gpus", "memory", "resources", "object_store_memory")
    )
    placement = {**running, "CPU": 1.0} if only_cpus_missing else running
    return running, placement


def resolve_strategy(
    options: dict[str, Any], resources: dict[str, float], captured_group: str | None, name: str
) -> dict[str, Any]:
    """The strategy for these options, as `make_template` takes it.

    Args:
        captured_group: hexadecimal id of the placement group that captures children of the current task, or None.
        name: what is scheduled, for errors.

    Raises:
        ValueError: options that contradict each other, or a request that fits no bundle of its placement group.
    """
    from ray.util.placement_group import PlacementGroup
    from ray.util.scheduling_strategies import (
        NodeAffinitySchedulingStrategy,
        NodeLabelSchedulingStrategy,
        PlacementGroupSchedulingStrategy,
    )

    strategy = options.get("scheduling_strategy")
    group = options.get("placement_group", "default")
    index = options.get("placement_group_bundle_index", -1)
    capture = options.get("placement_group_capture_child_tasks")
    selector = options.get("label_selector")

    if strategy is not None and (group not in ("default", None) or index != -1 or capture is not None):
        raise ValueError(
            "Placement groups should be specified via the scheduling_strategy option: use "
            "PlacementGroupSchedulingStrategy instead of placement_group, placement_group_bundle_index and "
            "placement_group_capture_child_tasks beside a scheduling_strategy."
        )
    if isinstance(strategy, PlacementGroupSchedulingStrategy):
        group = strategy.placement_group
        index = strategy.placement_group_bundle_index
        capture = strategy.placement_group_capture_child_tasks
        if group is None:
            strategy = None
    elif isinstance(strategy, str):
        if strategy not in ("DEFAULT", "SPREAD"):
            raise ValueError(
                f'Invalid scheduling_strategy value {strategy}. Valid values are "DEFAULT", "SPREAD", '
                "PlacementGroupSchedulingStrategy, NodeAffinitySchedulingStrategy and NodeLabelSchedulingStrategy."
            )
        if strategy == "SPREAD":
            return _with_selector({"kind": "SPREAD"}, selector)
        group = None
    elif isinstance(strategy, NodeAffinitySchedulingStrategy):
        return _with_selector(
            {
                "kind": "NODE_AFFINITY",
                "node_id": bytes.fromhex(strategy.node_id),
                "soft": strategy.soft,
                "spill_on_unavailable": strategy._spill_on_unavailable,
                "fail_on_unavailable": strategy._fail_on_unavailable,
            },
            selector,
        )
    elif isinstance(strategy, NodeLabelSchedulingStrategy):
        hard = [expression.condition() for expression in strategy.hard] + parse_label_selector(selector or {})
        soft = [expression.condition() for expression in strategy.soft]
        return {"kind": "NODE_LABEL", "hard": hard, "soft_labels": soft}

    if group == "default":
        if captured_group is not None and not selector:
            return {
                "kind": "PLACEMENT_GROUP",
                "placement_group_id": bytes.fromhex(captured_group),
                "bundle_index": -1,
                "capture_child_tasks": True,
            }
        group = None
    if group is None or (isinstance(group, PlacementGroup) and group.is_empty):
        if index != -1:
            raise ValueError("If placement group is not set, the value of bundle index must be -1.")
        return _with_selector(DEFAULT_STRATEGY, selector)
    if selector:
        raise ValueError(
            f"label_selector {selector!r} cannot be used inside a placement group: give the group a "
            "bundle_label_selector instead."
        )
    _check_fits_bundle(group, index, resources, name)
    return {
        "kind": "PLACEMENT_GROUP",
        "placement_group_id": group.id.binary(),
        "bundle_index": index,
        "capture_child_tasks": bool(captured_group is not None if capture is None else capture),
    }


def _with_selector(strategy: dict[str, Any], selector: dict[str, str] | None) -> dict[str, Any]:
    if not selector:
        return strategy
    conditions = parse_label_selector(selector)
    if strategy["kind"] == "DEFAULT":
        return {"kind": "NODE_LABEL", "hard": conditions}
    raise NotImplementedError(
        f"label_selector together with the {strategy['kind']} strategy is not built yet: use one of them, or "
        "NodeLabelSchedulingStrategy"
    )


def _check_fits_bundle(group: Any, index: int, resources: dict[str, float], name: str) -> None:
    bundles = group.bundle_specs
    if not bundles:
        return
    if index >= len(bundles) or index < -1:
        raise ValueError(
            f"placement group bundle index {index} is invalid. Valid placement group indexes: 0-{len(bundles) - 1}, "
            "or -1 for any"
        )
    candidates = bundles if index == -1 else [bundles[index]]
    if not any(all(bundle.get(key, 0) >= need for key, need in resources.items()) for bundle in candidates):
        where = "any bundles" if index == -1 else f"bundle {index}"
        raise ValueError(
            f"Cannot schedule {name} with the placement group because the resource request {resources} cannot fit "
            f"into {where} for the placement group, {bundles}."
        )
