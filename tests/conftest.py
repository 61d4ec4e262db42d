"""Fixtures of every Python test.

Clusters are shared by the tests of a module (`ray_module`) where they can be; a test that kills something or needs
its own settings starts one (`ray_start`). After each module, and after each test that starts its own cluster, a leak
check waits until no process, shared-memory file or socket of it is left.
"""

from __future__ import annotations

import contextlib
import glob
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

import ray

# Sessions of the tests lie apart from those of anybody else on the machine, so that the leak check sees only them and
# `ray.init()` never joins a cluster that is not ours.
_ROOT = tempfile.mkdtemp(prefix="heliostat-test-", dir=os.environ.get("HELIOSTAT_TEST_TMPDIR", "/tmp"))
os.environ["RAY_TMPDIR"] = _ROOT
os.environ.pop("RAY_ADDRESS", None)
# Neither the user's token nor his home is touched.
os.environ.setdefault("RAY_AUTH_TOKEN", "0" * 64)
# Workers import the test modules whose functions they run.
_HERE = os.path.dirname(os.path.abspath(__file__))
_TEST_DIRECTORIES = [_HERE, *(os.path.join(_HERE, name) for name in ("chaos", "cluster"))]
os.environ["PYTHONPATH"] = os.pathsep.join([*_TEST_DIRECTORIES, *filter(None, [os.environ.get("PYTHONPATH")])])
STORE_BYTES = 80 * 1024 * 1024
LEAK_TIMEOUT_S = 5.0


def pytest_sessionfinish() -> None:
    """Removes the sessions' directories, unless a test failed and its logs may be wanted."""
    if not os.environ.get("HELIOSTAT_KEEP_LOGS"):
        shutil.rmtree(_ROOT, ignore_errors=True)


def wait_for_condition(
    predicate: Callable[[], Any], timeout: float = 10.0, interval: float = 0.02, what: str | None = None
) -> Any:
    """Waits until `predicate()` is true and returns what it returned; fails the test after `timeout` seconds.

    Example:
        >>> wait_for_condition(lambda: os.path.exists(path), timeout=5)
    """
    deadline = time.monotonic() + timeout
    last: BaseException | None = None
    while True:
        try:
            value = predicate()
            if value:
                return value
            last = None
        except (AssertionError, KeyError, IndexError, OSError, ray.exceptions.RayError) as error:
            last = error
        if time.monotonic() > deadline:
            text = what or getattr(predicate, "__name__", "the condition")
            raise AssertionError(f"waited {timeout} s for {text} in vain; the last error: {last!r}")
        time.sleep(interval)


# --- leaks ---


def session_root() -> str:
    """The directory of every session of the tests."""
    return os.path.join(_ROOT, "ray")


def processes_of_sessions() -> dict[int, str]:
    """{pid: command line} of every process of a session of the tests, but this one.

    A daemon or worker knows its session: by its environment, which a fork inherits, or by its open files.
    """
    found = {}
    marker = f"RAY_TMPDIR={_ROOT}".encode()
    for entry in os.listdir("/proc"):
        if not entry.isdigit() or int(entry) == os.getpid():
            continue
        pid = int(entry)
        try:
            with open(f"/proc/{pid}/environ", "rb") as file:
                if marker not in file.read().split(b"\0"):
                    continue
            with open(f"/proc/{pid}/stat") as file:
                if file.read().rsplit(")", 1)[1].split()[0] in ("Z", "X"):
                    continue
            with open(f"/proc/{pid}/comm") as file:
                comm = file.read().strip()
            with open(f"/proc/{pid}/cmdline", "rb") as file:
                command = file.read().replace(b"\0", b" ").decode(errors="replace")[:120]
        except OSError:
            continue
        found[pid] = f"{comm}: {command}"
    return found


def shared_memory_files() -> set[str]:
    """The object stores in /dev/shm: every file that a process of the tests' sessions could have made there."""
    names = set()
    for path in glob.glob("/dev/shm/*"):
        name = os.path.basename(path)
        # A store is named by its session and the first 12 digits of its node's id.
        if any(node[:12] in name for node in _node_ids()):
            names.add(path)
    return names


_known_nodes: set[str] = set()


def _node_ids() -> set[str]:
    """Ids of nodes that the tests started, remembered when their records are gone."""
    for path in glob.glob(os.path.join(session_root(), "session_2*", "node-*.json")):
        _known_nodes.add(os.path.basename(path)[len("node-") : -len(".json")])
    return _known_nodes


def remember_nodes() -> None:
    """Notes which nodes run now, so that their shared memory can be looked for after they ended."""
    _node_ids()


def sockets_of_sessions() -> list[str]:
    """Socket files of the tests' sessions."""
    return glob.glob(os.path.join(session_root(), "session_2*", "sockets", "*"))


def assert_no_leaks(before: set[int] | None = None, timeout: float = LEAK_TIMEOUT_S) -> None:
    """Waits until no process, shared memory or socket of the tests' sessions is left; fails with what is.

    `before`: processes that were there already and are not counted.
    """
    deadline = time.monotonic() + timeout
    while True:
        processes = {pid: text for pid, text in processes_of_sessions().items() if pid not in (before or set())}
        left: list[str] = [f"process {pid} {text}" for pid, text in processes.items()]
        left += sorted(shared_memory_files())
        left += sockets_of_sessions()
        if not left:
            return
        if time.monotonic() > deadline:
            raise AssertionError("left behind after the cluster ended:\n  " + "\n  ".join(left))
        time.sleep(0.05)


# --- clusters ---


class Cluster:
    """What `ray_start` gives: starts a cluster with chosen settings; one at a time."""

    def __call__(self, **options: Any) -> Any:
        options.setdefault("num_cpus", 2)
        options.setdefault("object_store_memory", STORE_BYTES)
        options.setdefault("log_to_driver", False)
        context = ray.init("local", **options)
        remember_nodes()
        return context


@pytest.fixture
def ray_start() -> Iterator[Cluster]:
    """Starts a cluster for one test: `ray_start(num_cpus=4)`. It is ended and checked for leaks afterwards."""
    ray.shutdown()
    yield Cluster()
    ray.shutdown()
    assert_no_leaks()


@pytest.fixture(scope="module")
def ray_module(request: pytest.FixtureRequest) -> Iterator[Any]:
    """A cluster for every test of a module: 4 CPUs unless the module has `RAY_OPTIONS`."""
    ray.shutdown()
    options = {
        "num_cpus": 4,
        "object_store_memory": STORE_BYTES,
        "log_to_driver": False,
        **getattr(request.module, "RAY_OPTIONS", {}),
    }
    context = ray.init("local", **options)
    remember_nodes()
    yield context
    ray.shutdown()
    assert_no_leaks()


@pytest.fixture
def shutdown_after() -> Iterator[None]:
    """For tests that call `ray.init` themselves: ends what they leave and checks for leaks."""
    ray.shutdown()
    yield
    remember_nodes()
    ray.shutdown()
    assert_no_leaks()


@pytest.fixture
def cluster_factory() -> Iterator[Callable[..., Any]]:
    """Makes `ray.cluster_utils.Cluster`s that are ended afterwards."""
    from ray.cluster_utils import Cluster as RayCluster

    ray.shutdown()
    clusters = []

    def make(**head: Any) -> Any:
        cluster = RayCluster(initialize_head=True, head_node_args={"object_store_memory": STORE_BYTES, **head})
        clusters.append(cluster)
        return cluster

    yield make
    remember_nodes()
    ray.shutdown()
    for cluster in clusters:
        cluster.shutdown()
    assert_no_leaks()


# --- programs ---


def run_program(
    source: str,
    *arguments: str,
    timeout: float = 60,
    check: bool = True,
    environment: dict[str, str] | None = None,
    cwd: str | None = None,
) -> subprocess.CompletedProcess[str]:
    """Runs a Python program in a process of its own, as a script, and returns what it printed."""
    with tempfile.TemporaryDirectory(dir=_ROOT) as directory:
        path = os.path.join(directory, "program.py")
        with open(path, "w") as file:
            file.write(source)
        result = subprocess.run(
            [sys.executable, path, *arguments],
            capture_output=True,
            text=True,
            timeout=timeout,
            env={**os.environ, **(environment or {})},
            cwd=cwd,
        )
    if check and result.returncode != 0:
        raise AssertionError(f"the program ended with {result.returncode}\n{result.stdout}\n{result.stderr}")
    return result


@contextlib.contextmanager
def running_program(source: str, *arguments: str, environment: dict[str, str] | None = None) -> Iterator[Any]:
    """A Python program that runs meanwhile; its standard output can be read line by line."""
    with tempfile.TemporaryDirectory(dir=_ROOT) as directory:
        path = os.path.join(directory, "program.py")
        with open(path, "w") as file:
            file.write(source)
        process = subprocess.Popen(
            [sys.executable, "-u", path, *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env={**os.environ, **(environment or {})},
        )
        try:
            yield process
        finally:
            if process.poll() is None:
                process.kill()
            process.wait(10)
            if process.stdout is not None:
                process.stdout.close()


def wait_for_line(program: Any, text: str) -> str:
    """The first line of a running program's output that has `text`; fails where it ends without one."""
    seen = []
    for line in program.stdout:
        seen.append(line)
        if text in line:
            return line
    raise AssertionError(f"the program ended without {text!r}:\n{''.join(seen)}")


def run_ray(*arguments: str, timeout: float = 60, environment: dict[str, str] | None = None) -> Any:
    """Runs the command `ray` and returns its result."""
    return subprocess.run(
        [sys.executable, "-m", "ray.scripts.scripts", *arguments],
        capture_output=True,
        text=True,
        timeout=timeout,
        env={**os.environ, **(environment or {})},
    )
