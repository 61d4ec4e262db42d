"""Where tasks and actors may run: values for the option ``scheduling_strategy``."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ray.util.placement_group import PlacementGroup

_NODE_ID = re.compile(r"[0-9a-f]{56}")


class PlacementGroupSchedulingStrategy:
    """Runs the work in a placement group.

    Args:
        placement_group: the group; None means none, also where the parent's group would capture the work.
        placement_group_bundle_index: the bundle, or -1 for any.
        placement_group_capture_child_tasks: whether tasks that this work submits run in the group too.

    Example:
        >>> f.options(scheduling_strategy=PlacementGroupSchedulingStrategy(group, 0)).remote()
    """

    def __init__(
        self,
        placement_group: PlacementGroup | None,
        placement_group_bundle_index: int = -1,
        placement_group_capture_child_tasks: bool | None = None,
    ) -> None:
        from ray.util.placement_group import PlacementGroup

        if placement_group is not None and not isinstance(placement_group, PlacementGroup):
            raise TypeError(f"placement_group must be a PlacementGroup or None, got {placement_group!r}")
        if not isinstance(placement_group_bundle_index, int):
            raise TypeError(f"placement_group_bundle_index must be an int, got {placement_group_bundle_index!r}")
        self.placement_group = placement_group
        self.placement_group_bundle_index = placement_group_bundle_index
        self.placement_group_capture_child_tasks = placement_group_capture_child_tasks


class NodeAffinitySchedulingStrategy:
    """Runs the work on one node.

    Args:
        node_id: hexadecimal id of the node.
        soft: whether another node will do where that one is dead or can never run the work.
        _spill_on_unavailable: with `soft`: whether another node will do where that one has no room now.
        _fail_on_unavailable: without `soft`: whether to fail at once where that node has no room now.

    Raises:
        ValueError: `node_id` is not one, or the flags contradict each other.
    """

    def __init__(
        self, node_id: str, soft: bool, _spill_on_unavailable: bool = False, _fail_on_unavailable: bool = False
    ) -> None:
        text = node_id if isinstance(node_id, str) else node_id.hex() if hasattr(node_id, "hex") else None
        if text is None or not _NODE_ID.fullmatch(text):
            raise ValueError(
                f"Invalid node_id {node_id!r}. Node ID must be a valid hex string of 56 digits; ray.nodes() lists "
                "those of the cluster."
            )
        if _spill_on_unavailable and not soft:
            raise ValueError(
                "_spill_on_unavailable cannot be set when soft is False. Please set soft to True to use it."
            )
        if _fail_on_unavailable and soft:
            raise ValueError(
                "_fail_on_unavailable cannot be set when soft is True. Please set soft to False to use it."
            )
        self.node_id = text
        self.soft = bool(soft)
        self._spill_on_unavailable = _spill_on_unavailable
        self._fail_on_unavailable = _fail_on_unavailable


def _check_values(values: tuple[Any, ...], operator: str) -> list[str]:
    if not values:
        raise ValueError(
            f"The variadic parameter of the {operator} operator must be a non-empty tuple: e.g. "
            f'{operator}("value1", "value2").'
        )
    for position, value in enumerate(values):
        if not isinstance(value, str):
            raise ValueError(
                f"Type of value in position {position} for the {operator} operator must be str (e.g. "
                f'{operator}("value1", "value2")) but got {value!r} of type {type(value)}.'
            )
    return list(values)


class In:
    """The node has the label with one of these values."""

    def __init__(self, *values: str) -> None:
        self.values = _check_values(values, "In")


class NotIn:
    """The node has the label with none of these values."""

    def __init__(self, *values: str) -> None:
        self.values = _check_values(values, "NotIn")


class Exists:
    """The node has the label."""


class DoesNotExist:
    """The node does not have the label."""


class _LabelMatchExpression:
    """One condition on a node's labels."""

    def __init__(self, key: str, operator: In | NotIn | Exists | DoesNotExist) -> None:
        self.key = key
        self.operator = operator

    def condition(self) -> tuple[str, str, list[str]]:
        """The condition as the runtime takes it."""
        name = {In: "in", NotIn: "not_in", Exists: "exists", DoesNotExist: "does_not_exist"}[type(self.operator)]
        return self.key, name, getattr(self.operator, "values", [])


class NodeLabelSchedulingStrategy:
    """Runs the work on a node whose labels fit.

    Args:
        hard: conditions that must hold.
        soft: conditions that are preferred.

    Example:
        >>> NodeLabelSchedulingStrategy(hard={"zone": In("a", "b")}, soft={"ssd": Exists()})
    """

    def __init__(self, hard: dict[str, Any], *, soft: dict[str, Any] | None = None) -> None:
        self.hard = _expressions(hard, "hard")
        self.soft = _expressions(soft, "soft")
        if not self.hard and not self.soft:
            raise ValueError("The `hard` and `soft` parameter of NodeLabelSchedulingStrategy cannot both be empty.")


def _expressions(conditions: Any, name: str) -> list[_LabelMatchExpression]:
    if conditions is None:
        return []
    if not isinstance(conditions, dict):
        raise ValueError(
            f'The {name} parameter must be a map (e.g. {{"key1": In("value1")}}) but got type {type(conditions)}.'
        )
    expressions = []
    for key, operator in conditions.items():
        if not isinstance(key, str):
            raise ValueError(
                f'The map key of the {name} parameter must be of type str (e.g. {{"key1": In("value1")}}) but got '
                f"{key!r} of type {type(key)}."
            )
        if not isinstance(operator, (In, NotIn, Exists, DoesNotExist)):
            raise ValueError(
                f"The map value for key {key} of the {name} parameter must be one of the `In`, `NotIn`, `Exists` or "
                f'`DoesNotExist` operator (e.g. {{"key1": In("value1")}}) but got {operator!r} of type '
                f"{type(operator)}."
            )
        expressions.append(_LabelMatchExpression(key, operator))
    return expressions


SchedulingStrategyT = (
    None | str | PlacementGroupSchedulingStrategy | NodeAffinitySchedulingStrategy | NodeLabelSchedulingStrategy
)
