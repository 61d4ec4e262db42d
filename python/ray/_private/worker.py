"""The process's connection to a cluster, and the core calls: get, put, wait, kill, cancel, get_actor, remote."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar, overload

from ray._private import context as _context
from ray._private import ray_constants
from ray._private.context import current, ensure_context
from ray._private.ids import JobID, NodeID, TaskID, WorkerID
from ray._private.object_ref_generator import ObjectRefGenerator
from ray._private.ray_constants import LOCAL_MODE, SCRIPT_MODE, WORKER_MODE
from ray._raylet import ObjectRef

if TYPE_CHECKING:
    from ray._raylet import CoreWorker
    from ray.actor import ActorHandle

logger = logging.getLogger(__name__)
R = TypeVar("R")

_REF_TYPES = {ObjectRef}
_warned_blocking_get = False


class Worker:
    """What this process is and to what it is connected. There is one, `global_worker`."""

    def __init__(self) -> None:
        self.mode: int | None = None
        self.node: Any = None  # The NodeHandle that `init` used.
        self.owns_cluster = False
        self.namespace = ""
        self.session_name = ""
        self.runtime_env: dict[str, Any] = {}
        self.job_config: Any = None
        self.in_actor = False
        self.exiting = False  # `exit_actor` was called.
        self.actor_name = ""
        self.actor_creation: dict[str, Any] = {}
        self.executor: Any = None
        self.log_printer: Any = None
        self.init_context: Any = None
        self.pid = 0
        # Whether workers may print on its behalf.
        self.ran_something = False

    @property
    def connected(self) -> bool:
        """Whether this process is connected to a cluster."""
        return current.context is not None

    @property
    def core(self) -> CoreWorker:
        """The runtime in this process. Raises RuntimeError where it is not connected."""
        context = current.context
        if context is None:
            raise RuntimeError("Ray has not been started yet. You can start Ray with 'ray.init()'.")
        return context.core

    core_worker = core

    def check_connected(self) -> None:
        """Raises RuntimeError where this process is not connected."""
        _ = self.core

    @property
    def current_job_id(self) -> JobID:
        """The job that this process works for; nil where it is not connected."""
        return JobID(self.core.job_id()) if self.connected else JobID.nil()

    @property
    def current_node_id(self) -> NodeID:
        """The node of this process."""
        return NodeID(self.core.node_id())

    @property
    def worker_id(self) -> bytes:
        """This process's id."""
        return self.core.worker_id()

    @property
    def current_task_id(self) -> TaskID:
        """The task of this thread or coroutine."""
        task = _context.current_task.get()
        return TaskID(task.task_id if task is not None else self.core.current_task_id())

    @property
    def gcs_client(self) -> Any:
        """Not part of this runtime."""
        raise NotImplementedError("global_worker.gcs_client: use ray.experimental.internal_kv or ray.util.state")

    def worker_id_object(self) -> WorkerID:
        """This process's id."""
        return WorkerID(self.worker_id)


global_worker = Worker()


def is_initialized() -> bool:
    """Whether `ray.init` was called (or implied) and `ray.shutdown` was not since."""
    return current.context is not None


def auto_init() -> None:
    """Connects this process the way that a bare `ray.init()` does; for the first call that needs a cluster.

    Raises:
        RuntimeError: in a child that was forked from a connected process.
    """
    from ray._private.initialization import init

    if os.environ.get("RAY_ENABLE_AUTO_CONNECT", "1") in ("0", ""):
        raise RuntimeError("Ray has not been started yet. You can start Ray with 'ray.init()'.")
    init()


def _invalid_references(value: Any) -> ValueError:
    return ValueError(
        f"Invalid type of object refs, {type(value)}, is given. 'object_refs' must either be an ObjectRef or a list of "
        "ObjectRefs. "
    )


@overload
def get(object_refs: list[Any], *, timeout: float | None = None, _use_object_store: bool = False) -> list[Any]: ...
@overload
def get(object_refs: Any, *, timeout: float | None = None, _use_object_store: bool = False) -> Any: ...
def get(object_refs: Any, *, timeout: float | None = None, _use_object_store: bool = False) -> Any:
    """The value of a reference, or the values of a list of references; waits for them.

    Args:
        object_refs: one reference or a list of them.
        timeout: seconds to wait at most; 0 does not wait; None waits without limit.

    Raises:
        GetTimeoutError: the time was over before every object was there.
        Exception: what the task raised, which is also a RayTaskError; or the failure that lost the object.

    Example:
        >>> ray.get([ray.put(1), ray.put(2)], timeout=5)
        [1, 2]
    """
    if _use_object_store:
        raise NotImplementedError("get(_use_object_store=True): transfers between devices are not built yet")
    context = current.context or ensure_context()
    if timeout is not None and timeout < 0:
        timeout = None
    if type(object_refs) is ObjectRef:
        if _context_is_coroutine is not None and _context_is_coroutine():
            _warn_blocking_get()
        return context.core.get_one(object_refs, timeout)
    if type(object_refs) is list:
        if {*map(type, object_refs)} <= _REF_TYPES:
            if _context_is_coroutine is not None and _context_is_coroutine():
                _warn_blocking_get()
            return context.core.get(object_refs, timeout)
    return _get_unusual(context.core, object_refs, timeout)


# Set in processes of asyncio actors: whether this thread runs an event loop.
_context_is_coroutine: Callable[[], bool] | None = None


def watch_blocking_gets(check: Callable[[], bool]) -> None:
    """Has `get` warn where `check` says that it blocks an event loop."""
    global _context_is_coroutine
    _context_is_coroutine = check


def _warn_blocking_get() -> None:
    global _warned_blocking_get
    if not _warned_blocking_get:
        _warned_blocking_get = True
        logger.warning(
            "Using blocking ray.get inside async actor. This blocks the event loop. Please use `await` on object ref "
            "with asyncio.gather if you want to yield execution to the event loop instead."
        )


def _get_unusual(core: CoreWorker, references: Any, timeout: float | None) -> Any:
    if isinstance(references, ObjectRef):
        return core.get_one(references, timeout)
    if isinstance(references, ObjectRefGenerator):
        return references
    if getattr(references, "_is_compiled_dag_ref", False):
        return references.get(timeout)
    if not isinstance(references, list):
        raise _invalid_references(references)
    for reference in references:
        if not isinstance(reference, ObjectRef):
            raise TypeError(f"Attempting to call `get` on the value {reference!r}, which is not an ray.ObjectRef.")
    return core.get(references, timeout)


def put(value: Any, *, _owner: Any = None, _tensor_transport: str = "object_store") -> ObjectRef:
    """Stores a value and returns a reference to it.

    Raises:
        TypeError: the value is a reference, or cannot be pickled.
        ObjectStoreFullError: it does not fit the store.

    Example:
        >>> ref = ray.put(numpy.zeros(1_000_000))
    """
    if isinstance(value, ObjectRef):
        raise TypeError(
            "Calling 'put' on an ray.ObjectRef is not allowed. If you really want to do this, you can wrap the "
            "ray.ObjectRef in a list and call 'put' on it."
        )
    if _owner is not None:
        raise NotImplementedError("put(_owner=...): objects that another actor owns are not built yet")
    if _tensor_transport.lower() != "object_store":
        raise NotImplementedError(f"put(_tensor_transport={_tensor_transport!r}): device transfers are not built yet")
    context = current.context or ensure_context()
    return context.core.put(value)


def wait(
    ray_waitables: list[Any], *, num_returns: int = 1, timeout: float | None = None, fetch_local: bool = True
) -> tuple[list[Any], list[Any]]:
    """Waits until some references are ready.

    Args:
        ray_waitables: references, or generators whose next item is meant; each at most once.
        num_returns: how many must be ready.
        timeout: seconds to wait at most; None waits without limit.
        fetch_local: whether "ready" means that the object is on this node.

    Returns:
        The ready ones, at most `num_returns`, and the others; both in the order given.

    Raises:
        TypeError: not a list of references.
        ValueError: repeated references, a bad number or a negative timeout.

    Example:
        >>> ready, rest = ray.wait(refs, num_returns=2, timeout=1.0)
    """
    if (
        type(ray_waitables) is list
        and type(num_returns) is int
        and 0 < num_returns <= len(ray_waitables)
        and (timeout is None or timeout >= 0)
    ):
        context = current.context or ensure_context()
        result = context.core.wait(ray_waitables, num_returns, timeout, bool(fetch_local))
        if result is not None:
            return result
    # Something is unusual: say what, or wait for generators.
    if isinstance(ray_waitables, (ObjectRef, ObjectRefGenerator)):
        raise TypeError(
            "wait() expected a list of ray.ObjectRef or ray.ObjectRefGenerator, got a single ray.ObjectRef or "
            f"ray.ObjectRefGenerator {ray_waitables}"
        )
    if not isinstance(ray_waitables, list):
        raise TypeError(f"wait() expected a list of ray.ObjectRef or ray.ObjectRefGenerator, got {type(ray_waitables)}")
    if timeout is not None and timeout < 0:
        raise ValueError(f"The 'timeout' argument must be nonnegative. Received {timeout}")
    plain = True
    for waitable in ray_waitables:
        if isinstance(waitable, ObjectRefGenerator):
            plain = False
        elif not isinstance(waitable, ObjectRef):
            raise TypeError(
                "wait() expected a list of ray.ObjectRef or ray.ObjectRefGenerator, got list containing "
                f"{type(waitable)}"
            )
    context = current.context or ensure_context()
    if not ray_waitables:
        return [], []
    if len(set(ray_waitables)) != len(ray_waitables):
        raise ValueError("Wait requires a list of unique ray_waitables.")
    if type(num_returns) is float and num_returns == int(num_returns):
        num_returns = int(num_returns)  # What a division gave.
    if not isinstance(num_returns, int) or isinstance(num_returns, bool):
        raise TypeError(f"num_returns must be an int, got {num_returns!r}")
    if num_returns <= 0:
        raise ValueError(f"Invalid number of objects to return {num_returns}.")
    if num_returns > len(ray_waitables):
        raise ValueError("num_returns cannot be greater than the number of ray_waitables provided to ray.wait.")
    if plain:
        result = context.core.wait(list(ray_waitables), num_returns, timeout, bool(fetch_local))
        if result is None:
            raise ValueError("Wait requires a list of unique ray_waitables.")
        return result
    return _wait_mixed(context.core, ray_waitables, num_returns, timeout)


def _wait_mixed(
    core: CoreWorker, waitables: list[Any], num_returns: int, timeout: float | None
) -> tuple[list[Any], list[Any]]:
    """`wait` where generators are among what is waited for."""
    from ray._raylet import CompletionQueue

    queue = CompletionQueue(core)
    for token, waitable in enumerate(waitables):
        if isinstance(waitable, ObjectRefGenerator):
            waitable._stream.watch_next(queue, token)
        else:
            queue.watch(waitable, token)
    deadline = None if timeout is None else time.monotonic() + timeout
    done: set[int] = set()
    while True:
        done.update(queue.drain())
        left = 60.0 if deadline is None else deadline - time.monotonic()
        if len(done) >= num_returns or left < 0:
            break
        if not queue.wait(left) and deadline is not None:
            done.update(queue.drain())
            break
    ready = sorted(done)[:num_returns]
    chosen = set(ready)
    return [waitables[i] for i in ready], [w for i, w in enumerate(waitables) if i not in chosen]


def kill(actor: ActorHandle, *, no_restart: bool = True) -> None:
    """Ends an actor at once, without waiting for what it does; calls on it then raise ActorDiedError.

    Args:
        actor: a handle.
        no_restart: whether it stays dead even where `max_restarts` would bring it back.

    Raises:
        ValueError: not an actor handle.
    """
    from ray.actor import ActorHandle

    if not isinstance(actor, ActorHandle):
        raise ValueError(f"ray.kill() only supported for actors. For tasks, try ray.cancel(). Got: {type(actor)}.")
    ensure_context().core.kill_actor(actor._ray_core.actor_id(), no_restart)


def cancel(ray_waitable: Any, *, force: bool = False, recursive: bool = True) -> None:
    """Cancels a task: one that waits is dropped, one that runs is interrupted. Getting its result then raises
    TaskCancelledError. Does nothing where the task is over.

    Args:
        ray_waitable: the task's reference, or its generator.
        force: kills the worker instead of interrupting it.
        recursive: cancels the tasks that it submitted too.

    Raises:
        TypeError: not a reference.
        ValueError: `force` for an actor's method.
    """
    reference = ray_waitable
    if isinstance(ray_waitable, ObjectRefGenerator):
        reference = ray_waitable.completed()
    if not isinstance(reference, ObjectRef):
        raise TypeError(
            f"ray.cancel() only supported for object refs. For actors, try ray.kill(). Got: {type(ray_waitable)}."
        )
    if force and reference.binary()[8:20] != b"\xff" * 12:
        raise ValueError("force=True is not supported for actor tasks.")
    ensure_context().core.cancel(reference, force, recursive)


def get_actor(name: str, namespace: str | None = None) -> ActorHandle:
    """A handle to a named actor. It does not keep the actor alive.

    Args:
        name: the actor's name.
        namespace: its namespace; this process's own where it is left out.

    Raises:
        ValueError: there is no such actor.
    """
    from ray._private.actor_metadata import ActorMetadata
    from ray.actor import ActorHandle

    if not name:
        raise ValueError("Please supply a non-empty value to get_actor")
    if not isinstance(name, str):
        raise TypeError(f"the name of an actor is a string, got {name!r}")
    if namespace is not None:
        check_namespace(namespace)
    context = ensure_context()
    global_worker.ran_something = True
    where = context.namespace if namespace is None else namespace
    try:
        core, metadata = context.core.get_named_actor(name, where)
    except ValueError:
        raise ValueError(
            f"Failed to look up actor with name '{name}'. This could because 1. You are trying to look up a named "
            "actor you didn't create. 2. The named actor died. 3. You did not use a namespace matching the namespace "
            f"of the actor (looked in {where!r})."
        ) from None
    return ActorHandle(core, ActorMetadata.from_pickle(metadata), name, where)


def check_namespace(namespace: Any) -> None:
    """Raises TypeError or ValueError for what is not a namespace."""
    if not isinstance(namespace, str):
        raise TypeError("namespace must be None or a string.")
    if namespace == "":
        raise ValueError('"" is not a valid namespace. Pass None to not specify a namespace.')


def get_gpu_ids() -> list[Any]:
    """The GPUs that this task or actor was given: their numbers, or what CUDA_VISIBLE_DEVICES names them.

    Empty in a driver, which holds no resources.
    """
    if global_worker.mode != WORKER_MODE:
        return []
    assigned = [index for index, amount in global_worker.core.resource_instances().get("GPU", []) if amount > 0]
    if global_worker.executor is not None:
        return global_worker.executor.device_names("GPU", assigned)
    return assigned


def remote(*args: Any, **kwargs: Any) -> Any:
    """Makes a function run elsewhere, or a class an actor class; with options or without.

    Raises:
        AssertionError: used with positional arguments, or with parentheses and no options.
        TypeError: not a function or class; an option of the wrong type.
        ValueError: an unknown option, or one out of range.

    Example:
        >>> @ray.remote
        ... def f(x): return x
        >>> @ray.remote(num_cpus=2, max_restarts=1)
        ... class A: ...
    """
    if len(args) == 1 and not kwargs and callable(args[0]):
        return _make_remote(args[0], {})
    if args or not kwargs:
        from ray._private.options import ACTOR_OPTIONS, TASK_OPTIONS

        raise AssertionError(
            "The @ray.remote decorator must be applied either with no arguments and no parentheses, for example "
            f"'@ray.remote', or it must be applied using some of the arguments in the list "
            f"{list({**TASK_OPTIONS, **ACTOR_OPTIONS})}, for example '@ray.remote(num_returns=2, resources="
            '{"CustomResource": 1})\'.'
        )
    return lambda target: _make_remote(target, kwargs)


def _make_remote(target: Any, options: dict[str, Any]) -> Any:
    import inspect

    from ray._private.options import validate_task_options
    from ray.actor import make_actor_class
    from ray.remote_function import RemoteFunction

    if inspect.isclass(target):
        return make_actor_class(target, dict(options))
    if inspect.isfunction(target) or _is_cython_function(target):
        validate_task_options(options)
        return RemoteFunction(None, target, None, dict(options))
    raise TypeError(
        f"The @ray.remote decorator must be applied to either a function or a class. (got {type(target).__name__}"
        f" {target!r})"
    )


def _is_cython_function(target: Any) -> bool:
    return callable(target) and hasattr(target, "__code__") and hasattr(target, "__name__")


def get_context() -> _context.SubmissionContext:
    """What this process submits with, connecting first where need be."""
    return ensure_context()


def __getattr__(name: str) -> Any:
    # `init` and `shutdown` are looked for here; they live in a module that few processes need.
    if name in ("init", "shutdown", "RayContext", "BaseContext"):
        from ray._private import initialization

        return getattr(initialization, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


__all__ = [
    "LOCAL_MODE",
    "SCRIPT_MODE",
    "WORKER_MODE",
    "Worker",
    "auto_init",
    "cancel",
    "get",
    "get_actor",
    "get_gpu_ids",
    "global_worker",
    "is_initialized",
    "kill",
    "put",
    "ray_constants",
    "remote",
    "wait",
]
