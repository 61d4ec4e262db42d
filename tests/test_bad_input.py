"""What is refused: each thing by its name, quickly, and the runtime goes on."""

import glob
import json
import os
import re
import signal
import socket
import struct
import sys
import threading
import time

import numpy as np
import pytest
from conftest import STORE_BYTES, run_program, running_program, wait_for_condition, wait_for_line

import ray

pytestmark = pytest.mark.usefixtures("ray_module")


@ray.remote
def echo(value=None):
    return value


def test_an_argument_that_cannot_be_pickled_is_named():
    with pytest.raises(TypeError) as caught:
        echo.remote({"outer": [1, {"inner": threading.Lock()}]})
    text = str(caught.value)
    assert "inner" in text and "lock" in text.lower()
    with pytest.raises(TypeError):
        ray.put(threading.Lock())


def test_calling_directly():
    with pytest.raises(TypeError, match="remote"):
        echo(1)

    @ray.remote
    class Actor:
        def method(self):
            return 1

    with pytest.raises(TypeError, match="remote"):
        Actor()
    with pytest.raises(TypeError, match="remote"):
        Actor.remote().method()


def test_get_and_wait_of_something_else():
    for bad in (1, "x", None, [1], [ray.put(1), 2], {ray.put(1)}):
        with pytest.raises((ValueError, TypeError)):
            ray.get(bad)
    with pytest.raises(TypeError):
        ray.wait(ray.put(1))
    reference = ray.put(1)
    with pytest.raises(ValueError):
        ray.wait([reference, reference])
    with pytest.raises(ValueError):
        ray.wait([reference], num_returns=2)
    with pytest.raises(ValueError):
        ray.wait([reference], num_returns=0)
    with pytest.raises((ValueError, TypeError)):
        ray.wait([reference], timeout=-1)


@pytest.mark.parametrize(
    "options",
    [
        {"nonsense": 1},
        {"num_cpus": "many"},
        {"num_cpus": -1},
        {"num_gpus": -1},
        {"num_gpus": 1.5},
        {"memory": -1},
        {"resources": {"CPU": 1}},
        {"resources": {"x": -1}},
        {"resources": [1]},
        {"num_returns": -5},
        {"num_returns": "many"},
        {"max_retries": -2},
        {"max_retries": "x"},
        {"max_calls": -1},
        {"retry_exceptions": 3},
        {"scheduling_strategy": "NOWHERE"},
        {"runtime_env": 3},
        {"max_restarts": 1},
    ],
    ids=str,
)
def test_options_of_tasks(options):
    with pytest.raises((ValueError, TypeError)):
        echo.options(**options).remote()
    with pytest.raises((ValueError, TypeError)):
        ray.remote(**options)(lambda: 1).remote()


@pytest.mark.parametrize(
    "options",
    [
        {"nonsense": 1},
        {"max_restarts": -2},
        {"max_concurrency": -1},
        {"max_concurrency": "x"},
        {"lifetime": "forever"},
        {"name": ""},
        {"name": 3},
        {"namespace": ""},
        {"max_task_retries": -2},
        {"max_pending_calls": "x"},
        {"num_returns": 2},
        {"max_calls": 1},
        {"get_if_exists": True},
    ],
    ids=str,
)
def test_options_of_actors(options):
    class Plain:
        pass

    with pytest.raises((ValueError, TypeError)):
        ray.remote(Plain).options(**options).remote()


def test_remote_of_something_else():
    with pytest.raises((TypeError, AssertionError)):
        ray.remote(1)
    with pytest.raises((TypeError, AssertionError)):
        ray.remote(num_cpus=1)(3)


def test_wrong_argument_counts():
    @ray.remote
    def two(a, b):
        return a + b

    with pytest.raises(TypeError, match="b"):
        two.remote(1)
    with pytest.raises(TypeError):
        two.remote(1, 2, 3)
    with pytest.raises(TypeError):
        two.remote(1, c=2)

    @ray.remote
    class Actor:
        def __init__(self, x):
            pass

        def method(self, y):
            pass

    with pytest.raises(TypeError):
        Actor.remote()
    with pytest.raises(TypeError):
        Actor.remote(1).method.remote()
    with pytest.raises(AttributeError):
        Actor.remote(1).nothing.remote()


def test_infeasible_demand_is_said_within_seconds():
    result = run_program(
        """
import ray, time, sys
ray.init("local", num_cpus=1, object_store_memory=80 << 20)
@ray.remote(resources={"unobtainium": 1})
def f(): pass
r = f.remote()
ready, _ = ray.wait([r], timeout=4)
assert not ready
print([w for w in ray._private.worker.global_worker.core.why()])
"""
    )
    assert "unobtainium" in result.stdout + result.stderr


def test_init_twice():
    with pytest.raises(RuntimeError, match="twice"):
        ray.init()
    assert ray.init(ignore_reinit_error=True) is not None


@pytest.mark.parametrize(
    "arguments",
    [
        {"num_cpus": -1},
        {"num_cpus": "x"},
        {"resources": {"CPU": 2}},
        {"resources": {"a": -1}},
        {"object_store_memory": 1000},
        {"nonsense": 1},
        {"labels": {"a b": "c"}},
        {"namespace": ""},
    ],
    ids=str,
)
def test_arguments_of_init(arguments):
    source = f"""
import ray
try:
    ray.init("local", **{arguments!r})
except (ValueError, TypeError, RuntimeError) as error:
    print("refused", error)
"""
    result = run_program(source)
    assert "refused" in result.stdout
    assert any(word in result.stdout for word in (*arguments, "CPU", "'a'", "store", "label", "nonnegative"))


def test_addresses_that_lead_nowhere():
    source = """
import ray
for address, kind in (("127.0.0.1:1", ConnectionError), ("auto", ConnectionError), ("nonsense", ValueError),
                      ("ray://127.0.0.1:10001", NotImplementedError)):
    try:
        ray.init(address)
    except kind as error:
        print("refused", error)
    else:
        raise SystemExit(address)
"""
    result = run_program(source, environment={"RAY_TMPDIR": "/tmp/heliostat-test-nothing-here"})
    assert result.stdout.count("refused") == 4


def test_a_fork_after_init_is_told_so():
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            ray.get(echo.remote(1), timeout=5)
        except Exception as error:
            code = 0 if "fork" in str(error).lower() else 2
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    assert ray.get(echo.remote(2)) == 2


def test_multiprocessing_with_fork_after_init():
    import multiprocessing

    view = ray.get(ray.put(np.arange(1_000_000)))
    queue = multiprocessing.get_context("fork").SimpleQueue()
    child = multiprocessing.get_context("fork").Process(target=lambda: queue.put(int(view.sum())))
    child.start()
    child.join(30)
    assert child.exitcode == 0 and queue.get() == int(view.sum())
    assert ray.get(echo.remote(3)) == 3


def test_ctrl_c_in_get():
    source = """
import ray, time
ray.init("local", num_cpus=1, object_store_memory=80 << 20, log_to_driver=False)
@ray.remote
def forever(): time.sleep(1000)
r = forever.remote()
print("waiting", flush=True)
try:
    ray.get(r)
except KeyboardInterrupt:
    print("interrupted", flush=True)
"""
    with running_program(source) as program:
        assert "waiting" in wait_for_line(program, "waiting")
        time.sleep(0.3)  # The signal must hit the wait itself, not the line before it.
        program.send_signal(signal.SIGINT)
        output, _ = program.communicate(timeout=20)
    assert "interrupted" in output and program.returncode == 0


@pytest.mark.parametrize(
    ("limit", "outcome"),
    [
        (64, "worked"),
        # The node's daemons cannot start with so few, which is known for certain when their time is over.
        pytest.param(20, "worked|said .*(open files|descriptors)", marks=pytest.mark.slow),
    ],
)
def test_few_file_descriptors(limit, outcome):
    result = run_program(
        """
import resource, sys
limit = int(sys.argv[1])
resource.setrlimit(resource.RLIMIT_NOFILE, (limit, limit))
import ray
try:
    ray.init("local", num_cpus=1, object_store_memory=80 << 20, log_to_driver=False)
    @ray.remote
    def f(x): return x
    print("worked", ray.get([f.remote(i) for i in range(20)], timeout=40))
except (OSError, RuntimeError, ray.exceptions.RayError) as error:
    print("said", type(error).__name__, error)
""",
        str(limit),
        timeout=80,
    )
    assert re.search(outcome, result.stdout, re.DOTALL), result.stdout


def test_a_store_larger_than_shared_memory_goes_to_disk_or_says_so():
    free = os.statvfs("/dev/shm")
    size = free.f_blocks * free.f_frsize + (1 << 30)
    disk = os.statvfs("/tmp")
    if disk.f_bavail * disk.f_frsize < size:
        pytest.skip("the disk is too small for a store larger than /dev/shm")
    result = run_program(
        f"""
import ray
import numpy as np
ray.init("local", num_cpus=1, object_store_memory={size}, log_to_driver=False)
a = np.arange(1000000)
assert (ray.get(ray.put(a)) == a).all()
print("works")
"""
    )
    assert "works" in result.stdout


def test_a_small_shared_memory(tmp_path):
    import subprocess

    program = tmp_path / "program.py"
    program.write_text(
        """
import numpy as np
import ray
ray.init(num_cpus=1, log_to_driver=False)
references = [ray.put(np.full(10_000_000, i, dtype=np.uint8)) for i in range(20)]
assert [int(ray.get(r)[-1]) for r in references] == list(range(20))
@ray.remote
def make(i):
    return np.full(10_000_000, i, dtype=np.uint8)
assert [int(ray.get(make.remote(i))[0]) for i in range(10)] == list(range(10))
print("works")
"""
    )
    small = "mount -t tmpfs -o size=64m tmpfs /dev/shm && exec "
    if subprocess.run(["unshare", "-m", "sh", "-c", small + "true"], capture_output=True).returncode != 0:
        pytest.skip("mounts cannot be unshared here")
    result = subprocess.run(
        ["unshare", "-m", "sh", "-c", f"{small} {sys.executable} {program}"], capture_output=True, text=True, timeout=80
    )
    assert "works" in result.stdout, result.stdout + result.stderr


def sockets():
    """Every Unix socket of this cluster."""
    directory = ray._private.worker.global_worker.core.session_directory()
    return glob.glob(os.path.join(directory, "sockets", "*"))


def connect(path):
    connection = socket.socket(socket.AF_UNIX)
    connection.settimeout(5)
    directory = os.open(os.path.dirname(path), os.O_PATH)
    try:
        connection.connect(f"/proc/self/fd/{directory}/{os.path.basename(path)}")
    finally:
        os.close(directory)
    return connection


GARBAGE = [
    b"\0" * 64,
    b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n",
    b"\xff" * 4096,
    struct.pack("<I", 0xFFFFFFFF) + b"x" * 100,
    struct.pack("<Q", 1 << 40) + b"x" * 100,
    os.urandom(65536),
]


@pytest.mark.parametrize("garbage", range(len(GARBAGE)))
def test_garbage_on_every_unix_socket(garbage):
    paths = sockets()
    assert len(paths) >= 2
    for path in paths:
        connection = connect(path)
        try:
            connection.sendall(GARBAGE[garbage])
            connection.shutdown(socket.SHUT_WR)
            while connection.recv(65536):
                pass
        except (BrokenPipeError, ConnectionResetError):
            pass
        finally:
            connection.close()
    assert ray.get(echo.remote("alive"), timeout=20) == "alive"


@pytest.mark.parametrize("garbage", range(len(GARBAGE)))
def test_garbage_on_the_port(garbage):
    (node,) = ray.nodes()
    connection = socket.create_connection((node["NodeManagerAddress"], node["NodeManagerPort"]), timeout=5)
    try:
        connection.sendall(GARBAGE[garbage])
        connection.shutdown(socket.SHUT_WR)
        received = b""
        while part := connection.recv(65536):
            received += part
        assert os.environ["RAY_AUTH_TOKEN"].encode() not in received
    except TimeoutError:
        raise AssertionError("a connection that sent garbage stayed open") from None
    except OSError:
        pass  # Closed before all of it was sent or read.
    finally:
        connection.close()
    assert ray.get(echo.remote("alive"), timeout=20) == "alive"


def test_silent_connections_do_no_harm():
    (node,) = ray.nodes()
    silent = [connect(path) for path in sockets() for _ in range(5)]
    silent += [
        socket.create_connection((node["NodeManagerAddress"], node["NodeManagerPort"]), timeout=5) for _ in range(20)
    ]
    assert ray.get([echo.remote(i) for i in range(20)], timeout=20) == list(range(20))
    for connection in silent:
        connection.close()


def test_everything_above_left_the_store_alone():
    core = ray._private.worker.global_worker.core
    assert json.loads(core.node_query(json.dumps({"method": "memory"})))
    assert ray.cluster_resources()["object_store_memory"] == STORE_BYTES
    wait_for_condition(lambda: ray.available_resources().get("CPU") == 4)


def test_recursion_without_end_is_an_error():
    @ray.remote(max_retries=0)
    def recurse(n):
        return recurse_plain(n)

    def recurse_plain(n):
        return recurse_plain(n + 1)

    with pytest.raises(RecursionError):
        ray.get(recurse.remote(0), timeout=30)
