"""Starts and ends the daemons, and keeps the files by which other processes of this machine find them.

A session directory (``/tmp/ray/session_<date>_<pid>``, mode 0700) has ``logs``, ``sockets``, and one record a node,
``node-<id>.json``: the node's address and its daemons as (pid, start time). A pid alone proves nothing, because pids
are used again; with its start time it names one process for ever. Nothing here ever looks for a process by its name.
"""

from __future__ import annotations

import glob
import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from typing import Any

DEFAULT_TEMP_DIRECTORY = "/tmp/ray"
CURRENT_CLUSTER_FILE = "ray_current_cluster"
SESSION_LATEST = "session_latest"
OTHER_ROOTS_FILE = "other_temp_dirs"
START_TIMEOUT_S = float(os.environ.get("RAY_START_TIMEOUT_S", 30.0))
LOG_TAIL_LINES = 20
SESSIONS_KEPT = 64

# What `python -E -c` runs. It loads the extension from its file and nothing of the `ray` package, so that a daemon
# starts in about 10 ms. The configuration comes through standard input, because it holds the token and an argument
# list can be read by every user of the machine.
#
# A raylet's zygote is forked here, before anything else is done: its imports take longer than the whole start of the
# raylet, and a fork saves it the start of an interpreter and the loading of the extension. It keeps no descriptor but
# its socket, nor does it return.
_DAEMON_PROGRAM = """\
import sys, posix, _imp, _frozen_importlib, _frozen_importlib_external as external
name, path = sys.argv[1:3]
comm = posix.open("/proc/self/comm", posix.O_WRONLY)
posix.write(comm, name.encode())
posix.close(comm)
loader = external.ExtensionFileLoader("ray._raylet", path)
module = _imp.create_dynamic(_frozen_importlib.ModuleSpec("ray._raylet", loader, origin=path))
_imp.exec_dynamic(module)
zygote = ()
if name == "raylet":
    import _socket, gc
    own, its = _socket.socketpair()
    pid = posix.fork()
    if pid == 0:
        try:
            posix.setpgid(0, 0)
            own.close()
            logs, append = sys.argv[3] + "/zygote.", posix.O_WRONLY | posix.O_CREAT | posix.O_APPEND
            for number, file, flags in ((0, "/dev/null", 0), (1, logs + "out", append), (2, logs + "err", append)):
                opened = posix.open(file, flags, 0o644)
                posix.dup2(opened, number)
                posix.close(opened)
            posix.closerange(3, its.fileno())
            posix.closerange(its.fileno() + 1, 1 << 16)
            gc.disable()
            sys.modules["ray._raylet"] = module
            sys.path[:0] = sys.argv[4:]
            sys.argv[:] = ["ray::zygote"]
            from ray._private.zygote import serve
            serve(its.detach())
            posix._exit(0)
        except BaseException:
            sys.excepthook(*sys.exc_info())
        finally:
            posix._exit(1)
    its.close()
    zygote = (own.detach(), pid)
parts = []
while True:
    part = posix.read(0, 65536)
    if not part: break
    parts.append(part)
null = posix.open("/dev/null", posix.O_RDWR)
posix.dup2(null, 0)
posix.close(null)
getattr(module, {"gcs_server": "run_gcs", "raylet": "run_raylet"}[name])(b"".join(parts).decode(), *zygote)
# Nothing is left to be done that the interpreter's own end would do.
posix._exit(0)
"""


class NodeStartError(RuntimeError):
    """A daemon did not start; the message ends with the last lines of its log."""


def extension_path() -> str:
    """The file of the extension module, found without importing it.

    Raises:
        NodeStartError: it is not built.
    """
    module = sys.modules.get("ray._raylet")
    if module is not None and getattr(module, "__file__", None):
        return str(module.__file__)
    from importlib.machinery import EXTENSION_SUFFIXES

    directory = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    for suffix in EXTENSION_SUFFIXES:
        path = os.path.join(directory, "_raylet" + suffix)
        if os.path.exists(path):
            return path
    raise NodeStartError(
        f"the extension module ray._raylet is not in {directory}: build it, for example by `make build`"
    )


def package_root() -> str:
    """The directory from which `ray` is imported."""
    return os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))


# --- processes ---


def start_time(pid: int) -> int | None:
    """When process `pid` started, in clock ticks since boot; None where it is gone or a zombie."""
    try:
        with open(f"/proc/{pid}/stat") as file:
            fields = file.read().rsplit(")", 1)[1].split()
    except (OSError, IndexError):
        return None
    return None if fields[0] in ("Z", "X") else int(fields[19])


def is_alive(process: dict[str, int] | None) -> bool:
    """Whether a recorded process ({"pid", "start_time"}) still runs."""
    return process is not None and start_time(process["pid"]) == process["start_time"]


def describe_process(pid: int) -> dict[str, int]:
    """The record of a process that runs."""
    return {"pid": pid, "start_time": start_time(pid) or 0}


def end_recorded_process(process: dict[str, int], grace_s: float) -> bool:
    """Ends one recorded process, gently and then for good. False where it is not that process any more.

    The pidfd is opened before the start time is compared, so that the signal cannot reach another process.
    """
    try:
        descriptor = os.pidfd_open(process["pid"])
    except ProcessLookupError:
        return False
    try:
        if not is_alive(process):
            return False
        poll = select.poll()
        poll.register(descriptor, select.POLLIN)
        for number, wait_s in ((signal.SIGTERM, grace_s), (signal.SIGKILL, 5.0)):
            try:
                signal.pidfd_send_signal(descriptor, number)
            except ProcessLookupError:
                return True
            if wait_s > 0 and poll.poll(wait_s * 1000):
                return True
        return not is_alive(process)
    finally:
        os.close(descriptor)


# --- directories and records ---


def temp_root(temp_directory: str | None = None) -> str:
    """The directory of all sessions: the argument, else ``$RAY_TMPDIR/ray``, else ``/tmp/ray``."""
    if temp_directory:
        return os.path.abspath(temp_directory)
    if root := os.environ.get("RAY_TMPDIR"):
        return os.path.join(os.path.abspath(root), "ray")
    return DEFAULT_TEMP_DIRECTORY


def make_session_directory(root: str) -> str:
    """A fresh session directory under `root`, and ``session_latest`` pointing there."""
    if not os.path.isdir(root):
        os.makedirs(root, exist_ok=True)
        try:
            # Several users share it, as they share /tmp. Each session is its owner's alone.
            os.chmod(root, 0o1777)
        except PermissionError:
            pass
    while True:
        now = time.time()
        stamp = time.strftime("%Y-%m-%d_%H-%M-%S", time.localtime(now))
        directory = os.path.join(root, f"session_{stamp}_{int(now * 1e6) % 1_000_000:06d}_{os.getpid()}")
        try:
            os.mkdir(directory, 0o700)
            break
        except FileExistsError:
            continue
    for name in ("logs", "sockets"):
        os.mkdir(os.path.join(directory, name), 0o700)
    link = os.path.join(root, SESSION_LATEST)
    temporary = f"{link}.{os.getpid()}"
    try:
        os.symlink(directory, temporary)
        os.replace(temporary, link)
    except OSError:
        # Another user's link in the shared directory: the session works without it.
        try:
            os.unlink(temporary)
        except OSError:
            pass
    return directory


def record_path(session_directory: str, node_id: str) -> str:
    """Where a node's record is."""
    return os.path.join(session_directory, f"node-{node_id}.json")


def write_record(session_directory: str, record: dict[str, Any]) -> None:
    """Writes a node's record whole, readable by its owner alone."""
    path = record_path(session_directory, record["node_id"])
    temporary = f"{path}.{os.getpid()}.tmp"
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with os.fdopen(descriptor, "w") as file:
        json.dump(record, file)
    os.replace(temporary, path)


def read_records(session_directory: str) -> list[dict[str, Any]]:
    """The records of a session's nodes on this machine, the head's first; those of other users are not trusted."""
    records = []
    for path in glob.glob(os.path.join(glob.escape(session_directory), "node-*.json")):
        try:
            with open(path) as file:
                if os.fstat(file.fileno()).st_uid not in (0, os.geteuid()):
                    continue
                record = json.load(file)
        except (OSError, ValueError):
            continue
        if isinstance(record, dict) and "node_id" in record and "processes" in record:
            records.append(record)
    return sorted(records, key=lambda record: (not record.get("is_head"), record.get("started_at", 0)))


def record_is_alive(record: dict[str, Any]) -> bool:
    """Whether the node's raylet runs."""
    return is_alive(record["processes"].get("raylet"))


def sessions(root: str) -> list[str]:
    """Session directories under `root`, the newest first."""
    return sorted(
        (path for path in glob.glob(os.path.join(glob.escape(root), "session_*")) if not os.path.islink(path)),
        key=os.path.basename,
        reverse=True,
    )


def live_records(root: str) -> list[dict[str, Any]]:
    """The records of every node of ours that runs on this machine, the newest session's first."""
    return [
        record
        for directory in known_roots(root)
        for session in sessions(directory)
        for record in read_records(session)
        if record_is_alive(record)
    ]


def known_roots(root: str) -> list[str]:
    """`root`, and the other directories in which `ray start --temp-dir` started nodes."""
    roots = [root]
    try:
        with open(os.path.join(root, OTHER_ROOTS_FILE)) as file:
            roots += [line for line in file.read().splitlines() if os.path.isdir(line) and line not in roots]
    except OSError:
        pass
    return roots


def remember_root(root: str) -> None:
    """Notes that nodes were started in `root`, where that is not the usual directory."""
    usual = temp_root()
    if root in known_roots(usual):
        return
    os.makedirs(usual, exist_ok=True)
    with open(os.path.join(usual, OTHER_ROOTS_FILE), "a") as file:
        file.write(root + "\n")


def prune_sessions(root: str) -> None:
    """Removes the oldest sessions' directories (their logs) beyond those kept, where nothing of them runs."""
    import shutil

    for session in sessions(root)[SESSIONS_KEPT:]:
        try:
            if os.stat(session).st_uid != os.geteuid() or time.time() - os.stat(session).st_mtime < 60:
                continue
        except OSError:
            continue
        if not any(record_is_alive(record) for record in read_records(session)):
            shutil.rmtree(session, ignore_errors=True)


def log_tail(path: str, lines: int = LOG_TAIL_LINES) -> str:
    """The last lines of a log file; empty where there is none."""
    try:
        with open(path, "rb") as file:
            file.seek(0, os.SEEK_END)
            file.seek(max(0, file.tell() - 16384))
            text = file.read().decode(errors="replace")
    except OSError:
        return ""
    return "\n".join(text.splitlines()[-lines:])


def log_paths(session_directory: str, name: str) -> tuple[str, str]:
    """(.out, .err) of a daemon: ``raylet.out``, and ``raylet.1.out`` for the second raylet of a session."""
    directory = os.path.join(session_directory, "logs")
    number = 0
    while True:
        stem = os.path.join(directory, f"{name}.{number}" if number else name)
        try:
            os.close(os.open(stem + ".out", os.O_CREAT | os.O_EXCL, 0o600))
            return stem + ".out", stem + ".err"
        except FileExistsError:
            number += 1


# --- daemons ---


def daemon_command(name: str, session_directory: str = "", python_path: Sequence[str] = ()) -> list[str]:
    """The command line of the daemon "gcs_server", or of "raylet", which needs to know how its zygote starts."""
    python = sys.executable or "python3"
    if name == "raylet":
        # Its zygote is forked from it, and workers need what `site` adds to the path.
        start = [python, "-E", "-c", _DAEMON_PROGRAM, name, extension_path()]
        return [*start, os.path.join(session_directory, "logs"), *python_path]
    return [python, "-S", "-E", "-c", _DAEMON_PROGRAM, name, extension_path()]


def start_supervised_gcs(session_directory: str, node_id: str, config: dict[str, Any]) -> Daemon:
    """Starts the control plane under a supervisor that outlives this process. Returns the supervisor."""
    program = os.path.join(os.path.dirname(os.path.abspath(__file__)), "supervisor.py")
    job = {
        "command": daemon_command("gcs_server"),
        "config": config,
        "pid_path": supervised_pid_path(session_directory),
        "record_path": record_path(session_directory, node_id),
    }
    command = [sys.executable or "python3", "-S", "-E", program]
    return Daemon("gcs_server", session_directory, job, (), command)


def supervised_pid_path(session_directory: str) -> str:
    """Where a supervisor writes the pid of the control plane."""
    return os.path.join(session_directory, "gcs_server.pid")


class Daemon:
    """One daemon that this process started: its process, its logs and the configuration it was given."""

    def __init__(
        self,
        name: str,
        session_directory: str,
        config: dict[str, Any],
        pass_fds: tuple[int, ...],
        command: list[str] | None = None,
    ) -> None:
        self.name = name
        self.config = config
        self.out_path, self.err_path = log_paths(session_directory, name)
        self._command = command or daemon_command(name, session_directory, config.get("python_path", ()))
        self.process = self._start(pass_fds)

    def _start(self, pass_fds: tuple[int, ...]) -> subprocess.Popen[bytes]:
        environment = {key: value for key, value in os.environ.items() if key != "RAY_AUTH_TOKEN"}
        with open(self.out_path, "ab") as out, open(self.err_path, "ab") as err:
            process = subprocess.Popen(
                self._command,
                stdin=subprocess.PIPE,
                stdout=out,
                stderr=err,
                cwd="/",
                env=environment,
                pass_fds=pass_fds,
                # A Ctrl-C in the terminal is for the program, which then ends its daemons in order.
                start_new_session=True,
            )
        assert process.stdin is not None
        try:
            process.stdin.write(json.dumps(self.config).encode())
            process.stdin.close()
        except BrokenPipeError:
            pass  # It died at once; whoever waits for it says why.
        return process

    def restart(self, pass_fds: tuple[int, ...]) -> None:
        """Starts it again, with the same configuration, after it ended."""
        self.process = self._start(pass_fds)

    def record(self) -> dict[str, int]:
        """(pid, start time)."""
        return describe_process(self.process.pid)

    def is_alive(self) -> bool:
        """Whether it runs."""
        return self.process.poll() is None

    def ending(self) -> str:
        """How it ended, with the last lines of its log."""
        status = self.process.poll()
        if status is None:
            how = "runs"
        elif status < 0:
            try:
                how = f"was ended by {signal.Signals(-status).name}"
            except ValueError:
                how = f"was ended by signal {-status}"
        else:
            how = f"ended with exit code {status}"
        tail = log_tail(self.err_path) or log_tail(self.out_path)
        text = f"{self.name} (pid {self.process.pid}) {how}"
        return (
            f"{text}. The last lines of {self.err_path}:\n{tail}"
            if tail
            else f"{text}. Its log {self.err_path} is empty."
        )

    def terminate(self) -> None:
        """SIGTERM, without waiting for the end."""
        if self.process.poll() is None:
            self.process.terminate()

    def stop(self, deadline: float) -> None:
        """SIGTERM, and SIGKILL at `deadline` (monotonic time)."""
        if self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.wait(max(0.05, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                self.kill()

    def kill(self) -> None:
        """SIGKILL, and waits for the end."""
        if self.process.poll() is None:
            self.process.kill()
            try:
                self.process.wait(5)
            except subprocess.TimeoutExpired:
                pass  # Stuck in the kernel; nothing more can be done from here.


def gcs_config(session_directory: str, parent_fd: int | None, system_config: dict[str, Any]) -> dict[str, Any]:
    """The control plane's configuration (`GcsConfig` of the crate ray-gcs)."""
    return {
        "session_name": os.path.basename(session_directory),
        "session_directory": session_directory,
        "data_directory": os.path.join(session_directory, "gcs"),
        "socket_path": os.path.join(session_directory, "sockets", "gcs"),
        "parent_fd": parent_fd,
        "system_config": system_config,
    }


def wait_until_ready(daemons: list[Daemon], ready_fd: int, timeout_s: float) -> dict[str, Any]:
    """Reads the raylet's line from `ready_fd` while watching that every daemon lives.

    Raises:
        NodeStartError: one ended, or none answered in time; with the log's last lines.
    """
    deadline = time.monotonic() + timeout_s
    poll = select.poll()
    poll.register(ready_fd, select.POLLIN)
    watched = {}
    line = b""
    try:
        for daemon in daemons:
            try:
                descriptor = os.pidfd_open(daemon.process.pid)
            except ProcessLookupError:
                raise NodeStartError(f"The node did not start: {daemon.ending()}") from None
            watched[descriptor] = daemon
            poll.register(descriptor, select.POLLIN)
        while not line.endswith(b"\n"):
            left_s = deadline - time.monotonic()
            if left_s <= 0:
                text = "\n".join(daemon.ending() for daemon in daemons)
                raise NodeStartError(f"The node did not start within {timeout_s:.0f} s.\n{text}")
            events = dict(poll.poll(left_s * 1000))
            if ready_fd in events:
                part = os.read(ready_fd, 4096)
                if part:
                    line += part
                    continue
                poll.unregister(ready_fd)
            for descriptor, daemon in watched.items():
                if descriptor in events:
                    daemon.process.wait()
                    raise NodeStartError(f"The node did not start: {daemon.ending()}")
        return json.loads(line)
    finally:
        for descriptor in watched:
            os.close(descriptor)


def remove_leftovers(session_directory: str, node_id: str, is_last: bool) -> None:
    """Removes what a killed raylet could not: its socket and shared memory, and for the last node the directory of
    sockets and the control plane's storage. Logs stay.
    """
    # The raylet names its store by the session and the first 12 digits of its id.
    store = f"ray-{os.path.basename(session_directory)}-{node_id[:12]}*"
    sockets = os.path.join(glob.escape(session_directory), "sockets", f"*{node_id}*")
    for pattern in (f"/dev/shm/{store}", os.path.join(glob.escape(session_directory), store), sockets):
        for path in glob.glob(pattern):
            try:
                os.unlink(path)
            except OSError:
                pass
    try:
        os.unlink(record_path(session_directory, node_id))
    except OSError:
        pass
    if is_last:
        import shutil

        shutil.rmtree(os.path.join(session_directory, "sockets"), ignore_errors=True)
        shutil.rmtree(os.path.join(session_directory, "gcs"), ignore_errors=True)
