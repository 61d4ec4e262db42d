"""What the extension calls: pickling, and turning stored failures into exceptions."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from typing import Any

from ray import exceptions
from ray._private import ids, serialization

# Kinds of stored failures, as the runtime numbers them.
ERROR_WORKER_CRASHED = 1
ERROR_ACTOR_DIED = 2
ERROR_ACTOR_UNAVAILABLE = 3
ERROR_OBJECT_LOST = 4
ERROR_OWNER_DIED = 5
ERROR_TASK_CANCELLED = 6
ERROR_RECONSTRUCTION_FAILED = 7
ERROR_NODE_DIED = 8
ERROR_RUNTIME_ENV = 9
ERROR_OUT_OF_MEMORY = 10
ERROR_TASK_UNSCHEDULABLE = 11
ERROR_ACTOR_UNSCHEDULABLE = 12
ERROR_OBJECT_FREED = 13
ERROR_STORE_FULL = 14
ERROR_OUT_OF_DISK = 15
ERROR_PLACEMENT_GROUP_REMOVED = 16
ERROR_GENERATOR_REPLAY = 17
ERROR_SYSTEM = 18
ERROR_END_OF_STREAM = 19

# Kinds of deaths.
DEATH_CRASHED = 2
DEATH_NODE = 3
DEATH_CONSTRUCTOR = 7
DEATH_UNSCHEDULABLE = 9
DEATH_OUT_OF_MEMORY = 10
DEATH_RUNTIME_ENV = 11
DEATH_PLACEMENT_GROUP = 12


class RuntimeHooks:
    """The object handed to `CoreWorker.connect`."""

    serialize = staticmethod(serialization.serialize_value)
    deserialize_exception = staticmethod(serialization.load_exception)

    @staticmethod
    def error_from_value(error: dict[str, Any]) -> BaseException:
        """The exception for a failure of the runtime. Never raises."""
        return error_from_value(error)

    @staticmethod
    def cross_language_dumps(value: Any) -> bytes:
        """MessagePack of a value of plain types."""
        import msgpack

        return msgpack.packb(value, use_bin_type=True)

    @staticmethod
    def cross_language_loads(data: bytes) -> Any:
        """The value of MessagePack."""
        import msgpack

        return msgpack.unpackb(data, raw=False, strict_map_key=False)


def describe_death(death: dict[str, Any] | None, told: str = "") -> str:
    """How a process died: cause, exit code or signal, pid, the tail of its log; without what `told` says already."""
    if not death:
        return ""
    message = (death.get("message") or "").rstrip(".")
    facts = []
    if death.get("pid"):
        facts.append(f"pid {death['pid']}")
    if death.get("exit_code") is not None:
        facts.append(f"exit code {death['exit_code']}")
    if death.get("signal") is not None:
        facts.append(f"signal {_signal_name(death['signal'])}")
    # "exited with code 3" says it already.
    known = f"{told} {message}"
    fresh = [fact for fact in facts if fact.removeprefix("exit ").split(" (")[0] not in known]
    text = "" if message in told else message
    if fresh:
        text = f"{text} ({', '.join(fresh)})".strip()
    if text:
        text += "."
    tail = (death.get("log_tail") or "").rstrip()
    if tail:
        lines = "\n".join("    " + line for line in tail.splitlines())
        text = _join(text, "The last lines of its log:\n" + lines)
    return text


def _signal_name(number: int) -> str:
    import signal

    try:
        return f"{number} ({signal.Signals(number).name})"
    except ValueError:
        return str(number)


def _join(*parts: str) -> str:
    return "\n".join(part for part in parts if part)


def error_from_value(error: dict[str, Any]) -> BaseException:
    """The exception for a FORMAT_ERROR value; see `Hooks.error_from_value` of the extension's stub."""
    make: Callable[[dict[str, Any]], BaseException] = _MAKERS.get(error.get("kind", 0), _system_error)
    return make(error)


def _details(error: dict[str, Any]) -> str:
    message = (error.get("message") or "").rstrip()
    death = error.get("death")
    if death and message.rstrip(".") == (death.get("message") or "").rstrip("."):
        message = ""
    return _join(message, describe_death(death, message))


def _worker_crashed(error: dict[str, Any]) -> BaseException:
    name = error.get("name")
    head = f"The worker died unexpectedly while executing this task{f' ({name})' if name else ''}."
    return exceptions.WorkerCrashedError(_join(head, _details(error)))


def _actor_died(error: dict[str, Any]) -> BaseException:
    death = error.get("death") or {}
    actor_id = (error.get("actor_id") or b"").hex() or None
    pickled = death.get("exception")
    if death.get("kind") == DEATH_CONSTRUCTOR and pickled:
        try:
            cause = serialization.load_exception(pickled)
        except (pickle.PickleError, ValueError, TypeError, EOFError):
            cause = None
        if isinstance(cause, exceptions.RayTaskError):
            return exceptions.ActorDiedError(cause, actor_id)
        if isinstance(cause, exceptions.RayError):
            return cause
    kind = death.get("kind")
    if kind == DEATH_UNSCHEDULABLE:
        return exceptions.ActorUnschedulableError(_details(error))
    if kind == DEATH_RUNTIME_ENV:
        return exceptions.RuntimeEnvSetupError(_details(error))
    if kind == DEATH_PLACEMENT_GROUP:
        return exceptions.ActorPlacementGroupRemoved()
    lines = [exceptions.ActorDiedError.BASE_ERROR_MSG]
    if error.get("name"):
        lines.append(f"\tclass_name: {error['name']}")
    if actor_id:
        lines.append(f"\tactor_id: {actor_id}")
    if death.get("pid"):
        lines.append(f"\tpid: {death['pid']}")
    details = _details(error)
    if details:
        details = f"The actor is dead: {details}"
    died = exceptions.ActorDiedError(_join(*lines, details), actor_id)
    died._preempted = kind == DEATH_NODE and "preempt" in (death.get("message") or "").lower()
    return died


def _actor_unavailable(error: dict[str, Any]) -> BaseException:
    return exceptions.ActorUnavailableError(_details(error) or "it cannot be reached", error.get("actor_id") or None)


def _object_error(cls: type[exceptions.ObjectLostError]) -> Callable[[dict[str, Any]], BaseException]:
    def make(error: dict[str, Any]) -> BaseException:
        reason = _join(cls.REASON, _details(error))
        return cls((error.get("object_id") or b"").hex(), None, "", reason=reason)

    return make


def _reconstruction_failed(error: dict[str, Any]) -> BaseException:
    cls = exceptions.ObjectReconstructionFailedError
    reason = _details(error) or cls.REASON
    return cls((error.get("object_id") or b"").hex(), reason_message=reason)


def _cancelled(error: dict[str, Any]) -> BaseException:
    task_id = error.get("task_id")
    return exceptions.TaskCancelledError(ids.TaskID(task_id) if task_id else None, _details(error) or None)


def _placement_group_removed(error: dict[str, Any]) -> BaseException:
    return exceptions.ActorPlacementGroupRemoved() if error.get("actor_id") else exceptions.TaskPlacementGroupRemoved()


def _system_error(error: dict[str, Any]) -> BaseException:
    return exceptions.RaySystemError(_details(error) or f"failure of unknown kind {error.get('kind')}")


def _with_details(cls: Callable[[str], BaseException]) -> Callable[[dict[str, Any]], BaseException]:
    return lambda error: cls(_details(error))


_MAKERS: dict[int, Callable[[dict[str, Any]], BaseException]] = {
    ERROR_WORKER_CRASHED: _worker_crashed,
    ERROR_ACTOR_DIED: _actor_died,
    ERROR_ACTOR_UNAVAILABLE: _actor_unavailable,
    ERROR_OBJECT_LOST: _object_error(exceptions.ObjectLostError),
    ERROR_OWNER_DIED: _object_error(exceptions.OwnerDiedError),
    ERROR_TASK_CANCELLED: _cancelled,
    ERROR_RECONSTRUCTION_FAILED: _reconstruction_failed,
    ERROR_NODE_DIED: _with_details(exceptions.NodeDiedError),
    ERROR_RUNTIME_ENV: _with_details(exceptions.RuntimeEnvSetupError),
    ERROR_OUT_OF_MEMORY: _with_details(exceptions.OutOfMemoryError),
    ERROR_TASK_UNSCHEDULABLE: _with_details(exceptions.TaskUnschedulableError),
    ERROR_ACTOR_UNSCHEDULABLE: _with_details(exceptions.ActorUnschedulableError),
    ERROR_OBJECT_FREED: _object_error(exceptions.ObjectFreedError),
    ERROR_STORE_FULL: _with_details(exceptions.ObjectStoreFullError),
    ERROR_OUT_OF_DISK: _with_details(exceptions.OutOfDiskError),
    ERROR_PLACEMENT_GROUP_REMOVED: _placement_group_removed,
    ERROR_GENERATOR_REPLAY: _with_details(exceptions.StreamingGeneratorReplayInconsistentError),
    ERROR_SYSTEM: _system_error,
    ERROR_END_OF_STREAM: lambda error: exceptions.ObjectRefStreamEndOfStreamError("The stream has no more items."),
}
