"""Runs Python programs on many cores and machines: tasks, actors, and objects shared between them.

Example:
    >>> import ray
    >>> @ray.remote
    ... def square(x):
    ...     return x * x
    >>> ray.get([square.remote(i) for i in range(4)])
    [0, 1, 4, 9]
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from ray._private.ids import (
    ActorClassID,
    ActorID,
    ClusterID,
    FunctionID,
    JobID,
    NodeID,
    PlacementGroupID,
    TaskID,
    UniqueID,
    WorkerID,
)
from ray._private.ray_constants import (
    LOCAL_MODE,
    RAY_COMMIT,
    RAY_VERSION,
    RESTORE_WORKER_MODE,
    SCRIPT_MODE,
    SPILL_WORKER_MODE,
    WORKER_MODE,
)
from ray._raylet import ObjectRef

if TYPE_CHECKING:
    from ray import actor, exceptions, util
    from ray._private.initialization import init, shutdown
    from ray._private.logging_config import LoggingConfig
    from ray._private.object_ref_generator import DynamicObjectRefGenerator, ObjectRefGenerator
    from ray._private.state import available_resources, cluster_resources, nodes, timeline
    from ray._private.worker import (
        cancel,
        get,
        get_actor,
        get_gpu_ids,
        is_initialized,
        kill,
        put,
        remote,
        wait,
    )
    from ray.actor import method
    from ray.cross_language import java_actor_class, java_function
    from ray.runtime_context import get_runtime_context

__version__ = RAY_VERSION
__commit__ = RAY_COMMIT

ObjectID = ObjectRef


class Language:
    """Languages of workers; this runtime has Python's."""

    PYTHON: Language
    JAVA: Language
    CPP: Language

    def __init__(self, number: int, name: str) -> None:
        self._number = number
        self._name = name

    def value(self) -> int:
        """The language's number."""
        return self._number

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Language) and self._number == other._number

    def __hash__(self) -> int:
        return hash(self._number)

    def __repr__(self) -> str:
        return self._name

    def __reduce__(self) -> tuple[Any, ...]:
        return Language, (self._number, self._name)


Language.PYTHON, Language.JAVA, Language.CPP = Language(0, "PYTHON"), Language(1, "JAVA"), Language(2, "CPP")


class _Config:
    """Settings of the cluster that this process is connected to."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        from ray._private import state

        settings = state.query("internal_config")
        found = {**settings.get("limits", {}), **settings.get("system_config", {})}
        if name not in found:
            raise AttributeError(f"the cluster has no setting {name!r}; it has {sorted(found)}")
        return lambda: found[name]


_config = _Config()

# Where names live that are imported when first used: importing them all would cost every program some tens of ms.
_WHERE = {
    **dict.fromkeys(("init", "shutdown"), "ray._private.initialization"),
    **dict.fromkeys(
        ("cancel", "get", "get_actor", "get_gpu_ids", "is_initialized", "kill", "put", "remote", "wait"),
        "ray._private.worker",
    ),
    **dict.fromkeys(("available_resources", "cluster_resources", "nodes", "timeline"), "ray._private.state"),
    **dict.fromkeys(("DynamicObjectRefGenerator", "ObjectRefGenerator"), "ray._private.object_ref_generator"),
    **dict.fromkeys(("java_actor_class", "java_function"), "ray.cross_language"),
    "LoggingConfig": "ray._private.logging_config",
    "get_runtime_context": "ray.runtime_context",
    "method": "ray.actor",
}
_MODULES = (
    "actor",
    "autoscaler",
    "cloudpickle",
    "cluster_utils",
    "cross_language",
    "dag",
    "data",
    "exceptions",
    "experimental",
    "job_config",
    "job_submission",
    "remote_function",
    "rllib",
    "runtime_context",
    "runtime_env",
    "serve",
    "train",
    "tune",
    "util",
    "workflow",
)


def __getattr__(name: str) -> Any:
    where = _WHERE.get(name)
    if where is not None:
        value = getattr(importlib.import_module(where), name)
    elif name in _MODULES:
        try:
            value = importlib.import_module(f"ray.{name}")
        except ModuleNotFoundError as error:
            if error.name != f"ray.{name}":
                raise
            raise AttributeError(f"module 'ray' has no attribute {name!r}: ray.{name} is not built yet") from None
        except NotImplementedError as error:
            raise AttributeError(f"module 'ray' has no attribute {name!r}: {error}") from None
    else:
        raise AttributeError(f"module 'ray' has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_WHERE, *_MODULES})


__all__ = [
    "LOCAL_MODE",
    "RESTORE_WORKER_MODE",
    "SCRIPT_MODE",
    "SPILL_WORKER_MODE",
    "WORKER_MODE",
    "ActorClassID",
    "ActorID",
    "ClusterID",
    "DynamicObjectRefGenerator",
    "FunctionID",
    "JobID",
    "Language",
    "LoggingConfig",
    "NodeID",
    "ObjectID",
    "ObjectRef",
    "ObjectRefGenerator",
    "PlacementGroupID",
    "TaskID",
    "UniqueID",
    "WorkerID",
    "__commit__",
    "__version__",
    "_config",
    "actor",
    "available_resources",
    "cancel",
    "cluster_resources",
    "exceptions",
    "get",
    "get_actor",
    "get_gpu_ids",
    "get_runtime_context",
    "init",
    "is_initialized",
    "java_actor_class",
    "java_function",
    "kill",
    "method",
    "nodes",
    "put",
    "remote",
    "shutdown",
    "timeline",
    "util",
    "wait",
]
