"""The zygote: a process with Python and ray imported that forks the node's workers, reaps them and reports their ends.

A raylet forks its first zygote before it becomes a raylet (see `services`). Where that one died it starts another by
``python -E -c``, with a connected Unix socket whose descriptor number is in ``HELIOSTAT_ZYGOTE_FD``.

Messages both ways are a length of 4 bytes (little-endian) and JSON:

* ``{"fork": {...}}``: fork a worker. Answered by ``{"forked": {"token", "pid"}}`` or
  ``{"fork_failed": {"token", "error"}}``.
* ``{"exited": {"pid", "status"}}``: a worker ended, with its wait status.

It owns the moment of forking. It refuses to fork while it has more than one thread, because a child has only the thread
that forked and a lock held by another would stay held for ever. End-of-file on the socket ends it.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import select
import signal
import socket
import struct
import sys
import traceback
from typing import Any

_LENGTH = struct.Struct("<I")
_MAXIMUM_MESSAGE_BYTES = 64 << 20
_LOADER_VARIABLES = ("LD_PRELOAD", "LD_LIBRARY_PATH", "PYTHONHASHSEED", "LD_AUDIT")
# What a worker cannot start or run its first task without: imported before the first fork.
_NEEDED = (
    "ray",
    "ray._raylet",
    "ray._private.worker_main",
    "ray._private.worker",
    "ray._private.context",
    "ray._private.executor",
    "ray._private.hooks",
    "ray._private.ray_logger",
    "cloudpickle",
    "faulthandler",
    "threading",
    "traceback",
    "logging",
)
# What many workers need later. It is imported after the first fork, one at a time while nobody asks for a worker, so
# that a node's first task does not wait for it.
_USEFUL = (
    "inspect",
    "ray.remote_function",
    "ray.actor",
    "ray._private.function_manager",
    "ray._private.logging_config",
    "hashlib",
    "uuid",
    "concurrent.futures.thread",
    "subprocess",
    "ssl",
    "asyncio.base_events",
    "asyncio",
    "ray._private.async_compat",
)


class _Connection:
    """Length-prefixed JSON over the socket to the raylet."""

    def __init__(self, connected: socket.socket) -> None:
        self.socket = connected
        self._received = bytearray()

    def receive(self) -> list[dict[str, Any]] | None:
        """Messages that have arrived; None at end-of-file."""
        try:
            data = self.socket.recv(1 << 16)
        except (BlockingIOError, InterruptedError):
            return []
        except ConnectionResetError:
            return None
        if not data:
            return None
        self._received += data
        messages = []
        while len(self._received) >= _LENGTH.size:
            (length,) = _LENGTH.unpack_from(self._received)
            if length > _MAXIMUM_MESSAGE_BYTES:
                raise ValueError(f"the raylet sent a message of {length} bytes")
            end = _LENGTH.size + length
            if len(self._received) < end:
                break
            messages.append(json.loads(bytes(self._received[_LENGTH.size : end])))
            del self._received[:end]
        return messages

    def send(self, message: dict[str, Any]) -> None:
        """Sends a message whole."""
        data = json.dumps(message).encode()
        data = _LENGTH.pack(len(data)) + data
        while data:
            try:
                sent = self.socket.send(data)
                data = data[sent:]
            except BlockingIOError:
                select.select([], [self.socket], [], 1.0)


def _thread_count() -> int:
    return len(os.listdir("/proc/self/task"))


def _preimport(name: str) -> None:
    """Imports a module for the workers to come; says so in the log where it cannot be had."""
    try:
        importlib.import_module(name)
    except ImportError as error:
        print(f"zygote: not imported: {name}: {error}", file=sys.stderr)


def _freeze() -> None:
    """What was imported is shared with every child; a collection would only dirty its pages."""
    gc.collect()
    gc.freeze()


def _open_descriptors_closed() -> None:
    """Closes every descriptor above standard error that is open."""
    for name in os.listdir("/proc/self/fd"):
        descriptor = int(name)
        if descriptor > 2:
            try:
                os.close(descriptor)
            except OSError:
                # It was the listing's own, which is closed already.
                pass


def _open_log(path: str, descriptor: int) -> None:
    log = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)
    os.dup2(log, descriptor, inheritable=True)
    os.close(log)


def _become_worker(request: dict[str, Any]) -> int:
    """Runs in the child: makes a clean process of the fork and runs the worker. Returns the exit code."""
    gc.enable()
    os.setsid()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGCHLD, signal.SIGPIPE, signal.SIGHUP, signal.SIGUSR1):
        signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGPIPE, signal.SIG_IGN)
    signal.set_wakeup_fd(-1)
    signal.pthread_sigmask(signal.SIG_SETMASK, ())
    os.umask(int(request.get("umask", 0o022)))

    pid = os.getpid()
    name = f"worker-{request['worker_id']}-{request.get('job_hex') or 'ffffffff'}-{pid}"
    directory = request["log_directory"]
    out, err = os.path.join(directory, name + ".out"), os.path.join(directory, name + ".err")
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, 0, inheritable=True)
    _open_log(out, 1)
    _open_log(err, 2)
    _open_descriptors_closed()
    # Python's own stream objects still hold what the zygote's had buffered and how it was buffered.
    sys.stdin = open(0, encoding="utf-8", closefd=False)  # noqa: SIM115
    sys.stdout = open(1, "w", buffering=1, encoding="utf-8", errors="backslashreplace", closefd=False)  # noqa: SIM115
    sys.stderr = open(2, "w", buffering=1, encoding="utf-8", errors="backslashreplace", closefd=False)  # noqa: SIM115
    sys.__stdin__, sys.__stdout__, sys.__stderr__ = sys.stdin, sys.stdout, sys.stderr  # type: ignore[misc]

    os.environ.update(request.get("env") or {})
    variables = request.get("env_vars") or {}
    if any("${" in value for value in variables.values()):
        from ray.runtime_env.runtime_env import expand_variables

        variables = expand_variables(variables)
    os.environ.update(variables)
    for entry in reversed(request.get("python_path") or []):
        if entry not in sys.path:
            sys.path.insert(0, entry)
    directory = request.get("cwd")
    if directory:
        try:
            os.chdir(directory)
        except OSError as error:
            print(f"the worker stays in {os.getcwd()}: {error}", file=sys.stderr)
    sys.argv = [f"ray::IDLE_{request['worker_id'][:8]}"]
    random = sys.modules.get("random")
    if random is not None:
        random.seed()
    config = dict(request.get("config") or {})
    config.update(worker_id=request["worker_id"], startup_token=request["token"], log_out=out, log_err=err)

    worker_main = importlib.import_module("ray._private.worker_main")
    code = worker_main.main(config)
    return int(code or 0)


def _run_child(request: dict[str, Any]) -> None:
    """Never returns: the child must not run what the zygote would do after the fork."""
    code = 1
    try:
        code = _become_worker(request)
    except SystemExit as stop:
        if stop.code is None:
            code = 0
        elif isinstance(stop.code, int):
            code = stop.code
        else:
            print(stop.code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
    finally:
        try:
            sys.stdout.flush()
            sys.stderr.flush()
        except (OSError, ValueError):
            # The log's disk may be full; the exit code still tells.
            pass
        os._exit(code & 0xFF)


def _refusal(request: dict[str, Any]) -> str | None:
    """Why this worker cannot be forked from here, or None."""
    for name in (*(request.get("env") or {}), *(request.get("env_vars") or {})):
        if name in _LOADER_VARIABLES or name.startswith("MALLOC_"):
            return (
                f"runtime_env sets {name}, which only has an effect in a process that is started afresh; "
                "workers are forked, and starting them afresh is not implemented yet"
            )
    if request.get("python_executable") not in (None, "", sys.executable):
        return (
            f"the worker needs the interpreter {request['python_executable']}, but workers are forked from "
            f"{sys.executable}; starting another interpreter is not implemented yet"
        )
    return None


class Zygote:
    """The loop: forks on request, reaps, reports.

    Example:
        >>> Zygote(connected_socket).run()  # doctest: +SKIP
    """

    def __init__(self, connected: socket.socket) -> None:
        self._connection = _Connection(connected)
        self._children: set[int] = set()
        self._to_import = list(_USEFUL)
        self._has_forked = False

    def run(self) -> None:
        """Serves until the raylet closes the socket.

        Raises:
            RuntimeError: if something that was imported started a thread.
        """
        wake_read, wake_write = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        signal.set_wakeup_fd(wake_write, warn_on_full_buffer=False)
        signal.signal(signal.SIGCHLD, lambda _number, _frame: None)
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        self._connection.socket.setblocking(False)
        self._connection.send({"ready": {"pid": os.getpid()}})
        poller = select.poll()
        poller.register(self._connection.socket, select.POLLIN)
        poller.register(wake_read, select.POLLIN)
        while True:
            events = poller.poll(0 if self._to_import and self._has_forked else None)
            if not events:
                self._import_one()
            for descriptor, _events in events:
                if descriptor == wake_read:
                    try:
                        os.read(wake_read, 4096)
                    except BlockingIOError:
                        pass
            self._reap()
            messages = self._connection.receive()
            if messages is None:
                return
            for message in messages:
                if "fork" in message:
                    self._fork(message["fork"])

    def _import_one(self) -> None:
        _preimport(self._to_import.pop(0))
        if not self._to_import:
            _freeze()

    def _fork(self, request: dict[str, Any]) -> None:
        self._has_forked = True
        token = request["token"]
        error = _refusal(request)
        if error is None and _thread_count() != 1:
            names = ", ".join(sorted(os.listdir("/proc/self/task")))
            error = f"the zygote has several threads ({names}), so a fork could deadlock: an import started one"
        pid = -1
        if error is None:
            try:
                pid = os.fork()
            except OSError as failure:
                error = f"fork failed: {failure}"
        if error is not None:
            self._connection.send({"fork_failed": {"token": token, "error": error}})
            return
        if pid == 0:
            _run_child(request)
        self._children.add(pid)
        self._connection.send({"forked": {"token": token, "pid": pid}})

    def _reap(self) -> None:
        while self._children:
            try:
                ended = os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
            except ChildProcessError:
                return
            if ended is None:
                return
            pid = ended.si_pid
            if pid in self._children:
                try:
                    # Before the number can be used again: what the worker started ends with it.
                    os.killpg(pid, signal.SIGKILL)
                except (ProcessLookupError, PermissionError):
                    pass
            _, status = os.waitpid(pid, 0)
            if pid in self._children:
                self._children.discard(pid)
                self._connection.send({"exited": {"pid": pid, "status": status}})


def main() -> None:
    """Entry point of a zygote process that was started afresh."""
    serve(int(os.environ.pop("HELIOSTAT_ZYGOTE_FD")))


def serve(descriptor: int) -> None:
    """Becomes the zygote, whose socket to the raylet is `descriptor`, until the raylet closes it."""
    connected = socket.socket(fileno=descriptor)
    connected.set_inheritable(False)
    # Collections would find nothing while modules are imported, and later they would dirty what children share.
    gc.disable()
    with open("/proc/self/comm", "w") as name:
        name.write("ray::zygote")
    for module in _NEEDED:
        _preimport(module)
    # The extension is loaded before its package where the zygote is a fork of the raylet.
    if (extension := sys.modules.get("ray._raylet")) is not None:
        sys.modules["ray"]._raylet = extension  # type: ignore[attr-defined]
    gc.freeze()
    try:
        Zygote(connected).run()
    finally:
        connected.close()


if __name__ == "__main__":
    main()
