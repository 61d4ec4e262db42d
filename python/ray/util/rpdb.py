"""The debugger for tasks and actors."""

from __future__ import annotations


def set_trace(breakpoint_uuid: str | None = None) -> None:
    """Would stop the task here and wait for `ray debug`."""
    raise NotImplementedError("ray.util.rpdb.set_trace(): the distributed debugger is not built yet")


__all__ = ["set_trace"]
