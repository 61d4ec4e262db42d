"""What submitting depends on in this process, as one object that is replaced whole when any part changes.

Functions and methods cache a template with the `SubmissionContext` it was made under; a call compares identity and
goes on. That is why nothing here is ever changed in place.
"""

from __future__ import annotations

from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ray._raylet import CoreWorker, RunningTask

# The call that runs in this coroutine, where it is one of an asyncio actor's.
current_task: ContextVar[RunningTask | None] = ContextVar("ray_current_task", default=None)


class SubmissionContext:
    """The connection, and what children inherit: the runtime environment and a placement group that captures them."""

    __slots__ = ("captured_group", "core", "default_detached", "job_id", "namespace", "runtime_env")

    def __init__(
        self,
        core: CoreWorker,
        job_id: bytes,
        namespace: str,
        runtime_env: dict[str, Any],
        captured_group: str | None = None,
        default_detached: bool = False,
    ) -> None:
        self.core = core
        self.job_id = job_id
        self.namespace = namespace
        self.runtime_env = runtime_env
        self.captured_group = captured_group
        self.default_detached = default_detached


class _Current:
    """Holds this process's context; None while it is not connected."""

    __slots__ = ("context",)

    def __init__(self) -> None:
        self.context: SubmissionContext | None = None


current = _Current()


def ensure_context() -> SubmissionContext:
    """This process's context, connecting first where it is not connected.

    Raises:
        RuntimeError: in a forked child of a connected process.
    """
    context = current.context
    if context is None:
        from ray._private.worker import auto_init

        auto_init()
        context = current.context
        if context is None:
            raise RuntimeError("ray.init() did not connect this process")
    return context
