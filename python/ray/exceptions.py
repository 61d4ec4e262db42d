"""The exceptions of the runtime.

What a task raised arrives as a `RayTaskError` that is also an instance of the original type, so that
``except ValueError`` works; its text is the remote traceback and its `cause` the original exception.
"""

from __future__ import annotations

import logging
import os
import sys
import types
from typing import Any

logger = logging.getLogger(__name__)

__all__: list[str] = []  # Filled at the end of this module.


class RayError(Exception):
    """Base of every exception of the runtime."""

    def to_bytes(self) -> bytes:
        """Pickles this exception, for another process."""
        from ray._private.serialization import dump_exception

        return dump_exception(self)

    @staticmethod
    def from_bytes(b: bytes) -> RayError:
        """The exception that `to_bytes` pickled."""
        import pickle

        error = pickle.loads(b)
        if not isinstance(error, RayError):
            raise TypeError(f"the bytes hold a {type(error).__name__}, which is not a RayError")
        return error

    @staticmethod
    def from_ray_exception(ray_exception: RayError) -> RayError:
        """The exception itself: only Python exceptions travel in this runtime."""
        return ray_exception


class CrossLanguageError(RayError):
    """An exception of another language's worker."""

    def __init__(self, ray_exception: Any) -> None:
        super().__init__(f"An exception raised from another language:\n{ray_exception}")


class AuthenticationError(RayError):
    """A process could not prove that it knows the cluster's token."""

    def __init__(self, message: str) -> None:
        self.message = message
        super().__init__(message)

    def __str__(self) -> str:
        return (
            f"{self.message}. The cluster's token is looked for in the environment variable RAY_AUTH_TOKEN, in the "
            "file named by RAY_AUTH_TOKEN_PATH, and in ~/.ray/auth_token; copy the head node's token to one of them."
        )


class TaskCancelledError(RayError):
    """The task was cancelled with `ray.cancel`, or the task that called it was."""

    def __init__(self, task_id: Any = None, error_message: str | None = None) -> None:
        self.task_id = task_id
        self.error_message = error_message
        super().__init__(*(value for value in (task_id, error_message) if value is not None))

    def __str__(self) -> str:
        if self.task_id is None:
            return self.error_message or ""
        return f"Task: {self.task_id} was cancelled. {self.error_message or ''}"

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.task_id, self.error_message)


class RayTaskError(RayError):
    """A task or method raised.

    Args:
        function_name: the function that raised.
        traceback_str: the remote traceback, which is this exception's text.
        cause: the exception that was raised.
        proctitle, pid, ip: the process it ran in; this one where they are left out.
        actor_repr, actor_id: the actor it ran in.

    Example:
        >>> try:
        ...     ray.get(fails.remote())
        ... except ValueError as error:
        ...     print(error.cause)
    """

    def __init__(
        self,
        function_name: str,
        traceback_str: str,
        cause: BaseException,
        proctitle: str | None = None,
        pid: int | None = None,
        ip: str | None = None,
        actor_repr: str | None = None,
        actor_id: str | None = None,
    ) -> None:
        super().__init__(function_name, traceback_str, cause, actor_repr, actor_id)
        self.function_name = function_name
        self.traceback_str = traceback_str
        self.cause = cause
        self.proctitle = proctitle or " ".join(sys.orig_argv)
        self.pid = pid or os.getpid()
        self.ip = ip or "127.0.0.1"
        self.actor_repr = actor_repr
        self._actor_id = actor_id

    @classmethod
    def from_exception(
        cls,
        function_name: str,
        cause: BaseException,
        *,
        ip: str,
        actor_repr: str | None = None,
        actor_id: str | None = None,
        skip_directories: tuple[str, ...] = (),
    ) -> RayTaskError:
        """The error for `cause`, raised just now in this process. Frames of files in
        `skip_directories` are left out of the text."""
        where = [f"pid={os.getpid()}", f"ip={ip}"]
        if actor_id:
            where += [f"actor_id={actor_id}"]
        if actor_repr:
            where += [f"repr={actor_repr}"]
        head = f"ray::{function_name}() ({', '.join(where)})"
        from ray._private.remote_traceback import format_remote_traceback

        text = format_remote_traceback(head, cause, skip_directories)
        return cls(function_name, text, cause, ip=ip, actor_repr=actor_repr, actor_id=actor_id)

    def as_instanceof_cause(self) -> RayTaskError:
        """This error as an instance of the cause's type too; this error alone where that type cannot be subclassed."""
        cause_type = type(self.cause)
        if not isinstance(self.cause, BaseException) or isinstance(self, cause_type):
            return self
        if issubclass(cause_type, RayTaskError):
            # A task that did not catch another task's failure: the first cause is what the user wants to catch.
            flat = RayTaskError(
                self.function_name,
                self.traceback_str,
                _first_cause(self.cause),
                self.proctitle,
                self.pid,
                self.ip,
                self.actor_repr,
                self._actor_id,
            )
            return flat.as_instanceof_cause()
        try:
            return self.make_dual_exception_instance()
        except Exception as error:
            logger.warning(
                "The type %s of the exception that a task raised cannot be subclassed (%s): it is raised as a "
                "RayTaskError alone; the original is its `cause`.",
                cause_type,
                error,
            )
            return self

    def make_dual_exception_instance(self) -> RayTaskError:
        """An instance of both `RayTaskError` and the cause's type.

        Raises:
            TypeError: the cause's type is final.
        """
        dual = _dual_type(type(self.cause))
        # The cause's own __init__ is not run: it may need arguments that nobody knows.
        instance: Any
        if isinstance(self.cause, BaseExceptionGroup):
            instance = dual.__new__(dual, self.cause.message, self.cause.exceptions)  # type: ignore[call-overload]
        else:
            instance = dual.__new__(dual)  # type: ignore[call-overload]
        for name, value in vars(self).items():
            object.__setattr__(instance, name, value)
        instance.args = (self.cause,)
        notes = getattr(self.cause, "__notes__", None)
        if notes is not None:
            instance.__notes__ = list(notes)
        return instance

    def __str__(self) -> str:
        return self.traceback_str

    def __reduce__(self) -> tuple[Any, ...]:
        arguments = (
            self.function_name,
            self.traceback_str,
            self.cause,
            self.proctitle,
            self.pid,
            self.ip,
            self.actor_repr,
            self._actor_id,
        )
        return _rebuild_task_error, (type(self) is not RayTaskError, arguments)


def _rebuild_task_error(dual: bool, arguments: tuple[Any, ...]) -> RayTaskError:
    error = RayTaskError(*arguments)
    return error.as_instanceof_cause() if dual else error


def _first_cause(error: BaseException) -> BaseException:
    while isinstance(error, RayTaskError):
        error = error.cause
    return error


_dual_types: dict[type, type] = {}


def _fields(cause_type: type) -> set[str]:
    """Names of what exceptions of this type keep outside their `__dict__`, such as `errno`."""
    return {
        name
        for cls in cause_type.__mro__
        if issubclass(cls, BaseException) and cls not in (Exception, BaseException)
        for name, value in vars(cls).items()
        if isinstance(value, (types.GetSetDescriptorType, types.MemberDescriptorType)) and not name.startswith("__")
    }


def _field_of_cause(name: str) -> property:
    def get(self: Any) -> Any:
        return getattr(self.__dict__["cause"], name)

    return property(get)


def _dual_type(cause_type: type) -> type:
    dual = _dual_types.get(cause_type)
    if dual is not None:
        return dual
    reserved = set(dir(RayTaskError)) | {"cause"}

    def __init__(self: Any, cause: BaseException) -> None:
        self.cause = cause
        self.args = (cause,)

    def __getattr__(self: Any, name: str) -> Any:
        # Attributes that the user's exception set on itself.
        if name.startswith("__") or name in reserved:
            raise AttributeError(name)
        return getattr(self.__dict__["cause"], name)

    def __repr__(self: Any) -> str:
        return f"{type(self).__name__}({self.cause!r})"

    name = f"RayTaskError({cause_type.__name__})"
    namespace: dict[str, Any] = {
        **{field: _field_of_cause(field) for field in _fields(cause_type) if field not in reserved},
        "__init__": __init__,
        "__getattr__": __getattr__,
        "__str__": RayTaskError.__str__,
        "__repr__": __repr__,
        "__reduce__": RayTaskError.__reduce__,
        "__module__": RayTaskError.__module__,
        "__qualname__": name,
        "__doc__": f"A task raised {cause_type.__qualname__}.",
    }
    metaclass = type(cause_type) if issubclass(type(cause_type), type(RayTaskError)) else type
    dual = metaclass(name, (RayTaskError, cause_type), namespace)
    _dual_types[cause_type] = dual
    return dual


class WorkerCrashedError(RayError):
    """The worker died while it ran the task, and no retry was left."""

    def __str__(self) -> str:
        return str(self.args[0]) if self.args else "The worker died unexpectedly while executing this task."


class LocalRayletDiedError(RayError):
    """The node's raylet died."""

    def __str__(self) -> str:
        return str(self.args[0]) if self.args else "The raylet of this node died. Its log is raylet.out."


class RayActorError(RayError):
    """The actor cannot serve the call: it is dead or, for the moment, unreachable.

    Args:
        actor_id: hexadecimal id of the actor.
        error_msg: the text.
        actor_init_failed: whether the constructor raised.
        preempted: whether its node was taken away.
    """

    BASE_ERROR_MSG = "The actor experienced an error before finishing this task."

    def __init__(
        self,
        actor_id: str | None = None,
        error_msg: str = BASE_ERROR_MSG,
        actor_init_failed: bool = False,
        preempted: bool = False,
    ) -> None:
        super().__init__(actor_id, error_msg, actor_init_failed, preempted)
        self.actor_id = actor_id
        self.error_msg = error_msg
        self._actor_init_failed = actor_init_failed
        self._preempted = preempted

    @property
    def preempted(self) -> bool:
        """Whether the actor's node was taken away."""
        return self._preempted

    @property
    def actor_init_failed(self) -> bool:
        """Whether the actor's constructor raised."""
        return self._actor_init_failed

    def __str__(self) -> str:
        return self.error_msg

    def __reduce__(self) -> tuple[Any, ...]:
        return _rebuild_by_state, (type(self), dict(vars(self)), self.args)


def _rebuild_by_state(cls: type[RayError], state: dict[str, Any], args: tuple[Any, ...]) -> RayError:
    error = cls.__new__(cls)
    error.args = args
    error.__dict__.update(state)
    return error


class ActorDiedError(RayActorError):
    """The actor is dead and will not be restarted."""

    BASE_ERROR_MSG = "The actor died unexpectedly before finishing this task."

    def __init__(self, cause: RayTaskError | str | None = None, actor_id: str | None = None) -> None:
        """`cause`: what its constructor raised, or the text that says how it died."""
        if isinstance(cause, RayTaskError):
            message = f"The actor died because of an error raised in its creation task, {cause}"
            super().__init__(cause._actor_id or actor_id, message, actor_init_failed=True)
            self.cause: BaseException | None = cause.cause
        else:
            super().__init__(actor_id, cause or self.BASE_ERROR_MSG)
            self.cause = None

    @staticmethod
    def from_task_error(task_error: RayTaskError) -> ActorDiedError:
        """The error for an actor whose constructor raised `task_error`."""
        return ActorDiedError(task_error)


class ActorUnavailableError(RayActorError):
    """The actor cannot be reached for the moment; the call may or may not have run."""

    def __init__(self, error_message: str, actor_id: bytes | None) -> None:
        name = actor_id.hex() if actor_id else "of unknown id"
        message = f"The actor {name} is unavailable: {error_message}. The task may or may not have been executed on it."
        super().__init__(name if actor_id else None, message)


class ObjectLostError(RayError):
    """The object is lost: every copy is gone and it cannot be made again.

    Args:
        object_ref_hex: hexadecimal id of the object.
        owner_address: the owner's address.
        call_site: where the reference was made.
    """

    REASON = "All copies of it were lost with the nodes that held them."

    def __init__(self, object_ref_hex: str, owner_address: Any, call_site: str, reason: str = "") -> None:
        super().__init__(object_ref_hex, owner_address, call_site)
        self.object_ref_hex = object_ref_hex
        self.owner_address = owner_address
        self.call_site = call_site.replace("  ", "\n  ") if call_site else ""
        self.reason = reason

    def _base(self) -> str:
        text = f"Failed to retrieve object {self.object_ref_hex}."
        return f"{text} The ObjectRef was created at: {self.call_site}" if self.call_site else text

    def __str__(self) -> str:
        return f"{self._base()}\n\n{self.reason or self.REASON}"

    def __reduce__(self) -> tuple[Any, ...]:
        return _rebuild_by_state, (type(self), dict(vars(self)), self.args)


class ObjectFetchTimedOutError(ObjectLostError):
    """Nobody who should have the object answered in time."""

    REASON = "Fetching it timed out: no node that is known to hold it answered."


class OwnerDiedError(ObjectLostError):
    """The process that created the reference is gone, and the object with it."""

    REASON = (
        "The object's owner has exited. That is the process that created the ObjectRef with `.remote()` or "
        "`ray.put()`; its log in the session's logs directory says why it ended."
    )


class ObjectReconstructionFailedError(ObjectLostError):
    """The object is lost and the task that made it cannot be run again."""

    REASON = "It cannot be made again: the task that made it has no retries left or is no longer known."

    def __init__(
        self,
        object_ref_hex: str,
        reason: Any = None,
        reason_message: str = "",
        owner_address: Any = None,
        call_site: str = "",
    ) -> None:
        super().__init__(object_ref_hex, owner_address, call_site, reason_message or (str(reason) if reason else ""))
        self.reason_code = reason
        self.reason_message = reason_message


class ObjectFreedError(ObjectLostError):
    """The object was freed by an explicit `free`."""

    REASON = "The object was freed by an explicit call of `free` while a reference to it was still in use."


class ReferenceCountingAssertionError(ObjectLostError, AssertionError):
    """The object was deleted although a reference to it exists, which is a defect of the runtime."""

    REASON = "It was deleted by the reference counting protocol although this reference exists; please report it."


class GetTimeoutError(RayError, TimeoutError):
    """`ray.get` waited for its timeout and the object was not there."""


class PlasmaObjectNotAvailable(RayError):
    """The object is not in this node's store."""


class ObjectRefStreamEndOfStreamError(RayError):
    """A streaming generator has no more items."""


class OufOfBandObjectRefSerializationException(RayError):
    """A reference was pickled outside the runtime while that is forbidden."""


class PendingCallsLimitExceeded(RayError):
    """The actor has `max_pending_calls` unfinished calls of this caller."""


class ObjectStoreFullError(RayError):
    """The object does not fit the node's store, and nothing more can be evicted or spilled."""

    def __str__(self) -> str:
        return (
            f"{super().__str__()}\nThe local object store is full of objects that are still in scope. "
            "`ray memory` lists them; a larger store is had with `ray.init(object_store_memory=...)`."
        )


class OutOfDiskError(RayError):
    """The object cannot be spilled: the disk is full."""

    def __str__(self) -> str:
        return (
            f"{super().__str__()}\nThe object cannot be created because the local object store is full and so is the "
            "disk it spills to. `df` shows the disk and `ray memory` the store."
        )


class OutOfMemoryError(RayError):
    """The node was short of memory, and this task's worker was killed to save the others."""

    def __init__(self, message: str) -> None:
        self.message = message
        super().__init__(message)


class NodeDiedError(RayError):
    """The node died."""

    def __init__(self, message: str) -> None:
        self.message = message
        super().__init__(message)


class RpcError(RayError):
    """A process did not answer, or not as it should."""

    def __init__(self, message: str, rpc_code: int | None = None) -> None:
        self.message = message
        self.rpc_code = rpc_code
        super().__init__(message)

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.message, self.rpc_code)


class RaySystemError(RayError):
    """The runtime itself failed."""

    def __init__(self, client_exc: Any, traceback_str: str | None = None) -> None:
        super().__init__(client_exc, *(() if traceback_str is None else (traceback_str,)))
        self.client_exc = client_exc
        self.traceback_str = traceback_str

    def __str__(self) -> str:
        text = f"System error: {self.client_exc}"
        return f"{text}\ntraceback: {self.traceback_str}" if self.traceback_str else text

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.client_exc, self.traceback_str)


class StreamingGeneratorReplayInconsistentError(RaySystemError):
    """A streaming generator was run again after a failure and yielded something else than before."""


class RayChannelError(RaySystemError):
    """A channel of a compiled graph failed."""


class RayChannelTimeoutError(RayChannelError, TimeoutError):
    """A channel of a compiled graph did not answer in time."""


class RayCgraphCapacityExceeded(RaySystemError):
    """A compiled graph has too many executions under way."""


class RayDirectTransportError(RaySystemError):
    """A transfer between devices failed."""


class UnserializableException(RayError):
    """What the task raised could not be unpickled here; this is its text."""

    def __init__(self, original_stack_trace: str) -> None:
        super().__init__(original_stack_trace)
        self._original_stack_trace = original_stack_trace

    def __str__(self) -> str:
        return (
            "The exception that the task raised could not be unpickled in this process: its class may be missing "
            f"here, or its __reduce__ wrong.\nOriginal exception:\n{self._original_stack_trace}"
        )


class UserCodeException(RayError):
    """User code that a library ran raised."""


class RuntimeEnvSetupError(RayError):
    """The runtime environment could not be made."""

    def __init__(self, error_message: str | None = None) -> None:
        super().__init__(*(() if error_message is None else (error_message,)))
        self.error_message = error_message

    def __str__(self) -> str:
        text = "Failed to set up runtime environment."
        return f"{text}\n{self.error_message}" if self.error_message else text


class TaskPlacementGroupRemoved(RayError):
    """The task's placement group was removed."""

    def __str__(self) -> str:
        return "The placement group corresponding to this task has been removed."


class ActorPlacementGroupRemoved(RayError):
    """The actor's placement group was removed."""

    def __str__(self) -> str:
        return "The placement group corresponding to this Actor has been removed."


class TaskUnschedulableError(RayError):
    """The task can never be scheduled."""

    def __init__(self, error_message: str) -> None:
        super().__init__(error_message)
        self.error_message = error_message

    def __str__(self) -> str:
        return f"The task is not schedulable: {self.error_message}"


class ActorUnschedulableError(RayError):
    """The actor can never be scheduled."""

    def __init__(self, error_message: str) -> None:
        super().__init__(error_message)
        self.error_message = error_message

    def __str__(self) -> str:
        return f"The actor is not schedulable: {self.error_message}"


class ActorAlreadyExistsError(ValueError, RayError):
    """The actor's name is taken in its namespace."""

    def __init__(self, error_message: str) -> None:
        super().__init__(error_message)
        self.error_message = error_message


class ActorHandleNotFoundError(ValueError, RayError):
    """The actor handle is not of this cluster session."""

    def __init__(self, error_message: str) -> None:
        super().__init__(error_message)
        self.error_message = error_message


class AsyncioActorExit(RayError):
    """Raised inside an asyncio actor to leave it (`exit_actor`)."""


__all__ += [name for name, value in list(globals().items()) if isinstance(value, type) and issubclass(value, RayError)]
