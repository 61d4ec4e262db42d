"""The options of tasks, actors and methods: their names, types and ranges.

Each option is checked once, when a function is decorated or `.options()` is called; what `remote()` submits is not
checked again. What is not built raises `NotImplementedError` naming it; nothing is accepted and ignored.

Invariants:

1. An unknown option raises `ValueError` that lists the valid ones.
2. An option of the wrong type raises `TypeError`, one out of range `ValueError`; both name the value.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from ray._private import ray_constants

Check = Callable[[Any], str | None]


class Option(NamedTuple):
    """One option: which types it takes, what it is where it is not given, and what else must hold."""

    types: tuple[type, ...]
    default: Any = None
    check: Check | None = None

    def validate(self, name: str, value: Any) -> None:
        """Raises TypeError or ValueError, naming `name` and what is wrong with `value`."""
        if not isinstance(value, self.types) or (isinstance(value, bool) and bool not in self.types):
            expected = self.types[0] if len(self.types) == 1 else self.types
            raise TypeError(
                f"The type of keyword '{name}' must be {expected}, but received type {type(value)} (value: {value!r})"
            )
        if self.check is not None:
            problem = self.check(value)
            if problem:
                raise ValueError(problem)


NONE = type(None)


def _quantity(name: str) -> Check:
    def check(value: Any) -> str | None:
        if value is None:
            return None
        if value != value or value < 0:
            return f"The quantity of resource {name} cannot be negative (got {value!r})"
        if 0 < value < 1 / ray_constants.RESOURCE_PRECISION:
            return (
                f"The precision of the fractional quantity of resource {name} cannot go beyond "
                f"{1 / ray_constants.RESOURCE_PRECISION} (got {value!r})"
            )
        return None

    return check


def _gpus(value: Any) -> str | None:
    problem = _quantity("num_gpus")(value)
    if problem is None and value is not None and value > 1 and value != int(value):
        problem = f"Resource quantities >1 must be whole numbers, got num_gpus={value!r}"
    return problem


def _namespace(value: Any) -> str | None:
    return '"" is not a valid namespace. Pass None to not specify a namespace.' if value == "" else None


def _count_or_infinite(name: str) -> Check:
    def check(value: Any) -> str | None:
        if value is None or value >= -1:
            return None
        return (
            f"The keyword '{name}' only accepts None, 0, -1 or a positive integer, where -1 represents infinity "
            f"(got {value!r})."
        )

    return check


def _resources(value: Any) -> str | None:
    for name, quantity in (value or {}).items():
        if not isinstance(name, str):
            return f"The names in 'resources' must be strings, got {name!r}"
        if name in ("CPU", "GPU"):
            return "Use the 'num_cpus' and 'num_gpus' keyword instead of 'CPU' and 'GPU' in 'resources' keyword"
        if name in ("memory", "object_store_memory"):
            return f"Use the '{name}' keyword instead of '{name}' in 'resources' keyword"
        if isinstance(quantity, bool) or not isinstance(quantity, (int, float)):
            return f"The quantity of resource {name} must be a number, got {quantity!r}"
        problem = _quantity(name)(quantity)
        if problem:
            return problem
    return None


def _num_returns(value: Any) -> str | None:
    if value is None or value in ("dynamic", "streaming") or (isinstance(value, int) and value >= 0):
        return None
    return (
        "The keyword 'num_returns' only accepts None, a non-negative integer, 'streaming' (for generators), or "
        f"'dynamic' (got {value!r})."
    )


def _retry_exceptions(value: Any) -> str | None:
    if isinstance(value, bool):
        return None
    if all(isinstance(item, type) and issubclass(item, BaseException) for item in value):
        return None
    return f"retry_exceptions must be either a boolean or a list of exceptions (got {value!r})"


def _backpressure(name: str) -> Check:
    def check(value: Any) -> str | None:
        if value is None or value == -1 or value > 0:
            return None
        return (
            f"{name}={value} is not allowed. Use a value > 0: with 1 the generator makes one object each time the "
            "consumer asks for the next one. Use -1 to disable this feature."
        )

    return check


_LABEL_NAME = r"[a-zA-Z0-9]([a-zA-Z0-9_.\-]{0,61}[a-zA-Z0-9])?"
_LABEL_KEY = re.compile(rf"([a-zA-Z0-9.\-/]{{1,253}}/)?{_LABEL_NAME}")
_LABEL_VALUE = re.compile(rf"({_LABEL_NAME})?")
_LABEL_SELECTOR = re.compile(rf"!?({_LABEL_NAME})?|!?in\(\s*({_LABEL_NAME})?(\s*,\s*({_LABEL_NAME})?)*\s*\)")
_LABEL_RULE = (
    "at most 63 characters that begin and end with a letter or digit, with dashes (-), underscores (_), dots (.) "
    "and letters and digits between"
)


def check_labels(labels: Any, what: str = "labels") -> str | None:
    """Why `labels` are not labels of a node, or None."""
    if not isinstance(labels, Mapping):
        return f"{what} must be a dict of strings, got {labels!r}"
    for key, value in labels.items():
        if not isinstance(key, str) or not _LABEL_KEY.fullmatch(key):
            return f"Invalid label key {key!r} in {what}. A key is {_LABEL_RULE}, after an optional prefix and a slash."
        if not isinstance(value, str) or not _LABEL_VALUE.fullmatch(value):
            return f"Invalid label value {value!r} in {what}. A value is {_LABEL_RULE}."
    return None


def check_label_selector(selector: Any) -> str | None:
    """Why `selector` is not a label selector, or None."""
    for key, value in (selector or {}).items():
        if not isinstance(key, str) or not _LABEL_KEY.fullmatch(key):
            return (
                f"Invalid label key name {key!r} in label_selector. A key is {_LABEL_RULE}, after an optional prefix "
                "and a slash."
            )
        if not isinstance(value, str):
            return f"The value of label {key!r} in label_selector must be a string, got {value!r}"
        if not _LABEL_SELECTOR.fullmatch(value):
            return (
                f"Invalid label selector value `{value}`. It is a label value or `in(a,b)`, after an optional `!` "
                f"that negates it. A value is {_LABEL_RULE}."
            )
    return None


def parse_label_selector(selector: Mapping[str, str]) -> list[tuple[str, str, list[str]]]:
    """The conditions (key, "in" or "not_in", values) that a valid selector means."""
    conditions = []
    for key, value in selector.items():
        operator = "not_in" if value.startswith("!") else "in"
        text = value.removeprefix("!")
        if text.startswith("in(") and text.endswith(")"):
            values = [item.strip() for item in text[3:-1].split(",")]
        else:
            values = [text]
        conditions.append((key, operator, values))
    return conditions


def _lifetime(value: Any) -> str | None:
    if value in (None, "detached", "non_detached"):
        return None
    return f"actor `lifetime` argument must be one of 'detached', 'non_detached' and 'None' (got {value!r})."


def _actor_name(value: Any) -> str | None:
    return "Actor name cannot be an empty string." if value == "" else None


def _max_calls(value: Any) -> str | None:
    if value is None or value >= 0:
        return None
    return f"The keyword 'max_calls' only accepts None, 0 or a positive integer (got {value!r})."


def _no_task_store_memory(value: Any) -> str | None:
    return None if value is None else "Setting 'object_store_memory' is not implemented for tasks"


def _concurrency_groups(value: Any) -> str | None:
    if value is None:
        return None
    groups = value if isinstance(value, dict) else None
    if groups is None:
        if not all(isinstance(item, dict) and "name" in item and "max_concurrency" in item for item in value):
            return f"concurrency_groups as a list needs dicts with 'name' and 'max_concurrency' (got {value!r})"
        groups = {item["name"]: item["max_concurrency"] for item in value}
    for name, limit in groups.items():
        if not isinstance(name, str) or not isinstance(limit, int) or isinstance(limit, bool) or limit < 1:
            return f"concurrency_groups needs names and positive integers (got {name!r}: {limit!r})"
    return None


def _runtime_env(value: Any) -> str | None:
    return None  # Its fields are checked by `ray.runtime_env` where the option is resolved.


_strategy_types: tuple[type, ...] | None = None


def scheduling_strategy_types() -> tuple[type, ...]:
    """What the option `scheduling_strategy` takes."""
    global _strategy_types
    if _strategy_types is None:
        from ray.util.scheduling_strategies import (
            NodeAffinitySchedulingStrategy,
            NodeLabelSchedulingStrategy,
            PlacementGroupSchedulingStrategy,
        )

        _strategy_types = (
            NONE,
            str,
            PlacementGroupSchedulingStrategy,
            NodeAffinitySchedulingStrategy,
            NodeLabelSchedulingStrategy,
        )
    return _strategy_types


_COMMON: dict[str, Option] = {
    "label_selector": Option((dict, NONE), None, check_label_selector),
    "fallback_strategy": Option((list, NONE)),
    "accelerator_type": Option((str, NONE)),
    "memory": Option((int, float, NONE), None, _quantity("memory")),
    "name": Option((str, NONE)),
    "num_cpus": Option((float, int, NONE), None, _quantity("num_cpus")),
    "num_gpus": Option((float, int, NONE), None, _gpus),
    "object_store_memory": Option((int, NONE), None, _quantity("object_store_memory")),
    "placement_group": Option((object,), "default"),
    "placement_group_bundle_index": Option((int,), -1),
    "placement_group_capture_child_tasks": Option((bool, NONE)),
    "resources": Option((dict, NONE), None, _resources),
    "runtime_env": Option((dict, NONE), None, _runtime_env),
    "scheduling_strategy": Option((object,)),
    "enable_task_events": Option((bool,), True),
    "_labels": Option((dict, NONE)),
}

TASK_OPTIONS: dict[str, Option] = {
    **_COMMON,
    "object_store_memory": Option((int, NONE), None, _no_task_store_memory),
    "max_calls": Option((int, NONE), None, _max_calls),
    "max_retries": Option((int, NONE), None, _count_or_infinite("max_retries")),
    "num_returns": Option((int, str, NONE), None, _num_returns),
    "retry_exceptions": Option((bool, list, tuple), False, _retry_exceptions),
    "_generator_backpressure_num_objects": Option(
        (int, NONE), None, _backpressure("_generator_backpressure_num_objects")
    ),
    "_num_objects_per_yield": Option((int, NONE)),
}

ACTOR_OPTIONS: dict[str, Option] = {
    **_COMMON,
    "name": Option((str, NONE), None, _actor_name),
    "concurrency_groups": Option((list, dict, NONE), None, _concurrency_groups),
    "enable_tensor_transport": Option((bool, NONE)),
    "lifetime": Option((str, NONE), None, _lifetime),
    "max_concurrency": Option((int, NONE)),
    "max_restarts": Option((int, NONE), 0, _count_or_infinite("max_restarts")),
    "max_task_retries": Option((int, NONE), 0, _count_or_infinite("max_task_retries")),
    "max_pending_calls": Option((int, NONE), -1, _count_or_infinite("max_pending_calls")),
    "namespace": Option((str, NONE), None, _namespace),
    "get_if_exists": Option((bool,), False),
    "allow_out_of_order_execution": Option((bool, NONE)),
    "_actor_generator_backpressure_num_objects": Option(
        (int, NONE), None, _backpressure("_actor_generator_backpressure_num_objects")
    ),
}

METHOD_OPTIONS: dict[str, Option] = {
    "num_returns": Option((int, str, NONE), None, _num_returns),
    "concurrency_group": Option((str, NONE)),
    "max_task_retries": Option((int, NONE), None, _count_or_infinite("max_task_retries")),
    "retry_exceptions": Option((bool, list, tuple, NONE), None, lambda v: None if v is None else _retry_exceptions(v)),
    "_generator_backpressure_num_objects": Option(
        (int, NONE), None, _backpressure("_generator_backpressure_num_objects")
    ),
    "_num_objects_per_yield": Option((int, NONE)),
    "enable_task_events": Option((bool, NONE)),
    "tensor_transport": Option((str, NONE)),
}


def validate_task_options(options: dict[str, Any]) -> None:
    """Checks the options of a remote function.

    Raises:
        ValueError: unknown, out of range, or contradictory.
        TypeError: of the wrong type.
        NotImplementedError: what is not built.
    """
    _validate(options, TASK_OPTIONS, "remote functions")
    _refuse_unbuilt(options)


def validate_actor_options(options: dict[str, Any], *, in_options: bool) -> None:
    """Checks the options of an actor class; `in_options` where they come from `.options()`. Raises as for tasks."""
    _validate(options, ACTOR_OPTIONS, "actors")
    if in_options and options.get("concurrency_groups") is not None:
        raise ValueError("Setting 'concurrency_groups' is not supported in '.options()'.")
    limit = options.get("max_concurrency")
    if limit is not None and limit < 0:
        raise ValueError(f"The keyword 'max_concurrency' only accepts None, 0 or a positive integer (got {limit}).")
    if options.get("get_if_exists") and not options.get("name"):
        raise ValueError("The actor name must be specified to use `get_if_exists`.")
    if options.get("enable_tensor_transport"):
        raise NotImplementedError("enable_tensor_transport: transfers between devices are not built yet")
    _refuse_unbuilt(options)


def validate_method_options(options: dict[str, Any]) -> None:
    """Checks the options of `ActorMethod.options`. Raises TypeError for an unknown one, else as for tasks."""
    known = METHOD_OPTIONS.keys() | {"name"}
    for name, value in options.items():
        if name not in known:
            raise TypeError(
                f"options() of an actor's method got an unexpected keyword argument {name!r}; valid: {sorted(known)}"
            )
        if name == "name":
            Option((str, NONE)).validate(name, value)
        else:
            METHOD_OPTIONS[name].validate(name, value)
    refuse_unbuilt_method_options(options)


def refuse_unbuilt_method_options(options: Mapping[str, Any]) -> None:
    """Raises NotImplementedError for options of methods that are not built."""
    if options.get("_num_objects_per_yield") not in (None, 1):
        raise NotImplementedError("_num_objects_per_yield: several objects for each yield are not built yet")
    transport = options.get("tensor_transport")
    if transport is not None and transport.lower() != "object_store":
        raise NotImplementedError(f"tensor_transport={transport!r}: transfers between devices are not built yet")


def _validate(options: dict[str, Any], known: dict[str, Option], what: str) -> None:
    for name, value in options.items():
        option = known.get(name)
        if option is None:
            raise ValueError(f"Invalid option keyword {name} for {what}. Valid ones are {list(known)}.")
        option.validate(name, value)
    strategy = options.get("scheduling_strategy")
    if not isinstance(strategy, scheduling_strategy_types()):
        raise TypeError(
            f"The type of keyword 'scheduling_strategy' must be {scheduling_strategy_types()}, but received type "
            f"{type(strategy)} (value: {strategy!r})"
        )
    group = options.get("placement_group", "default")
    if group is not None and group != "default":
        from ray.util.placement_group import PlacementGroup

        if not isinstance(group, PlacementGroup):
            raise TypeError(
                f"The type of keyword 'placement_group' must be {PlacementGroup}, 'default' or None, but received type "
                f"{type(group)} (value: {group!r})"
            )


def _refuse_unbuilt(options: dict[str, Any]) -> None:
    if options.get("fallback_strategy"):
        raise NotImplementedError("fallback_strategy: selectors for when the first fits no node are not built yet")
    if options.get("_labels"):
        raise NotImplementedError("_labels: labels of tasks and actors are not built yet")
    if options.get("_num_objects_per_yield") not in (None, 1):
        raise NotImplementedError("_num_objects_per_yield: several objects for each yield are not built yet")


def normalized_concurrency_groups(value: Any) -> dict[str, int]:
    """Concurrency groups as {name: limit}, from either way to write them."""
    if value is None:
        return {}
    if isinstance(value, dict):
        return dict(value)
    return {item["name"]: item["max_concurrency"] for item in value}
