"""Utilities on top of the core. Each is imported when it is first used, so that ``import ray`` stays light."""

from __future__ import annotations

import importlib
from typing import Any

# The function of this name hides its module, as programs expect; so it cannot wait until it is first used.
from ray.util.placement_group import placement_group

_WHERE = {
    "ActorPool": "ray.util.actor_pool",
    "Queue": "ray.util.queue",
    "as_completed": "ray.util.helpers",
    "map_unordered": "ray.util.helpers",
    "deregister_serializer": "ray.util.serialization",
    "register_serializer": "ray.util.serialization",
    "disable_log_once_globally": "ray.util.debug",
    "enable_periodic_logging": "ray.util.debug",
    "log_once": "ray.util.debug",
    "get_current_placement_group": "ray.util.placement_group",
    "get_placement_group": "ray.util.placement_group",
    "placement_group_table": "ray.util.placement_group",
    "remove_placement_group": "ray.util.placement_group",
    "inspect_serializability": "ray.util.check_serialize",
    "list_named_actors": "ray._private.state",
    "get_node_ip_address": "ray._private.utils",
}
_MODULES = (
    "accelerators",
    "actor_pool",
    "check_serialize",
    "client",
    "collective",
    "dask",
    "debug",
    "helpers",
    "joblib",
    "metrics",
    "multiprocessing",
    "queue",
    "rpdb",
    "scheduling_strategies",
    "serialization",
    "spark",
    "state",
    "tpu",
)


def get_node_instance_id() -> str:
    """The cloud provider's name of this machine, from CLOUD_INSTANCE_ID; empty where it is not set."""
    import os

    return os.environ.get("CLOUD_INSTANCE_ID", "")


def __getattr__(name: str) -> Any:
    where = _WHERE.get(name)
    if where is not None:
        value = getattr(importlib.import_module(where), name)
    elif name in _MODULES:
        try:
            value = importlib.import_module(f"ray.util.{name}")
        except NotImplementedError as error:
            raise AttributeError(f"module 'ray.util' has no attribute {name!r}: {error}") from None
    else:
        raise AttributeError(f"module 'ray.util' has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_WHERE, *_MODULES})


__all__ = [
    "ActorPool",
    "as_completed",
    "deregister_serializer",
    "disable_log_once_globally",
    "enable_periodic_logging",
    "get_current_placement_group",
    "get_node_instance_id",
    "get_node_ip_address",
    "get_placement_group",
    "inspect_serializability",
    "list_named_actors",
    "log_once",
    "map_unordered",
    "placement_group",
    "placement_group_table",
    "register_serializer",
    "remove_placement_group",
]
