"""A worker process: joins its node, then runs what it is given until it is told to leave.

The zygote calls `main` in the forked child, after it has set up descriptors, environment and directory.
"""

from __future__ import annotations

import atexit
import faulthandler
import io
import os
import signal
import sys
from typing import TYPE_CHECKING, Any

from ray._private import ray_constants

if TYPE_CHECKING:
    from ray._raylet import CoreWorker

# How long calls on threads and the event loop may take after the worker was told to leave.
DRAIN_LIMIT_S = 60.0


class _NamingStream(io.TextIOWrapper):
    """A log stream that says which task the lines after it are of, where that changed since the last line."""

    def __init__(self, descriptor: int, core: CoreWorker) -> None:
        raw = io.FileIO(descriptor, "w", closefd=False)
        super().__init__(io.BufferedWriter(raw), "utf-8", "backslashreplace", line_buffering=True)
        self._current_task = core.current_task
        self._name = ""

    def write(self, text: str) -> int:
        task = self._current_task()
        if task is not None and not task.method_name:
            name = task.name if task.name != task.function_name else task.name.rpartition(".")[2]
            if name != self._name and name != "__init__":
                self._name = name
                super().write(f"{ray_constants.LOG_PREFIX_TASK_NAME}{name}\n")
        return super().write(text)


def _id_bytes(value: str | bytes | None) -> bytes | None:
    return bytes.fromhex(value) if isinstance(value, str) and value else value or None


def main(config: dict[str, Any]) -> int:
    """Runs a worker until it is told to leave; returns its exit code.

    Args:
        config: raylet_socket, session_directory, worker_id (hexadecimal), startup_token.
    """
    faulthandler.enable()
    from ray._private.context import SubmissionContext, current
    from ray._private.executor import Executor
    from ray._private.hooks import RuntimeHooks
    from ray._private.ray_logger import set_up_ray_logger
    from ray._private.worker import global_worker
    from ray._raylet import CoreWorker

    set_up_ray_logger(None, None)
    core = CoreWorker.connect(
        {
            "raylet_socket": config["raylet_socket"],
            "role": "worker",
            "worker_id": _id_bytes(config.get("worker_id")),
            "startup_token": config.get("startup_token", 0),
            "session_directory": config.get("session_directory", ""),
            "connect_timeout_s": float(config.get("connect_timeout_s", 30.0)),
        },
        RuntimeHooks(),
    )
    sys.stdout = sys.__stdout__ = _NamingStream(1, core)  # type: ignore[misc]
    sys.stderr = sys.__stderr__ = _NamingStream(2, core)  # type: ignore[misc]
    set_up_ray_logger(None, None)
    global_worker.mode = ray_constants.WORKER_MODE
    global_worker.pid = os.getpid()
    global_worker.session_name = core.details().get("session_name", "")
    executor = global_worker.executor = Executor(core)

    def interrupt(_signum: int, _frame: Any) -> None:
        # A cancellation that comes after its task's own code must not hit the runtime's.
        if core.is_interrupt_wanted():
            raise KeyboardInterrupt

    signal.signal(signal.SIGINT, interrupt)
    current.context = SubmissionContext(core, core.job_id(), "", {})
    while True:
        try:
            core.run_task_loop(executor)
            break
        except KeyboardInterrupt:
            # The interrupt of a task that had just ended.
            continue
    # An actor that leaves because nobody holds a handle finishes what it was given; the raylet has a limit of its own.
    executor.drain(0.0 if global_worker.exiting else DRAIN_LIMIT_S)
    if executor.instance is not None:
        executor.end_actor()
    current.context = None
    # The zygote ends the process without the interpreter's own end; what user code registered runs all the same.
    atexit._run_exitfuncs()
    core.shutdown()
    return 0
