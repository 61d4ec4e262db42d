"""kill -9 of every kind of process: what is promised happens, and nothing is left behind."""

import os
import random
import signal
import time

import numpy as np
import pytest
from conftest import (
    STORE_BYTES,
    assert_no_leaks,
    processes_of_sessions,
    remember_nodes,
    running_program,
    wait_for_condition,
    wait_for_line,
)

import ray


def core():
    return ray._private.worker.global_worker.core


def node():
    return ray._private.worker.global_worker.node


def node_answer(method):
    import json

    return json.loads(core().node_query(json.dumps({"method": method})))


def worker_pids():
    """Pids of the workers that the raylet knows."""
    return {worker["pid"] for worker in node_answer("workers")["workers"] if worker.get("pid")}


@ray.remote
def add(x):
    return x + 1


@pytest.fixture
def cluster(ray_start):
    """A cluster of two CPUs for one test."""
    ray_start(num_cpus=2, namespace="chaos")


def test_a_worker_in_a_task(cluster, tmp_path):
    @ray.remote(max_retries=1)
    def slow(path):
        with open(path, "a") as file:
            file.write(f"{os.getpid()}\n")
        if len(open(path).read().split()) == 1:
            time.sleep(60)
        return "done"

    path = str(tmp_path / "pids")
    reference = slow.remote(path)
    pid = wait_for_condition(lambda: os.path.exists(path) and int(open(path).read().split()[0]))
    os.kill(pid, signal.SIGKILL)
    assert ray.get(reference, timeout=30) == "done"
    assert len(open(path).read().split()) == 2


def test_a_worker_in_a_task_without_retries(cluster, tmp_path):
    @ray.remote(max_retries=0)
    def slow(path):
        with open(path, "w") as file:
            file.write(str(os.getpid()))
        time.sleep(60)

    path = str(tmp_path / "pid")
    reference = slow.remote(path)
    pid = wait_for_condition(lambda: os.path.exists(path) and int(open(path).read()))
    os.kill(pid, signal.SIGKILL)
    with pytest.raises(ray.exceptions.WorkerCrashedError, match="SIGKILL|signal 9"):
        ray.get(reference, timeout=30)
    assert ray.get(add.remote(1), timeout=30) == 2
    wait_for_condition(lambda: ray.available_resources().get("CPU") == 2)


def test_an_actor(cluster):
    @ray.remote(max_restarts=0)
    class Plain:
        def pid(self):
            return os.getpid()

    actor = Plain.remote()
    os.kill(ray.get(actor.pid.remote()), signal.SIGKILL)

    def is_dead():
        try:
            ray.get(actor.pid.remote(), timeout=10)
        except ray.exceptions.ActorDiedError as error:
            assert "SIGKILL" in str(error) or "signal 9" in str(error)
            return True
        except ray.exceptions.RayActorError:
            return False
        return False

    wait_for_condition(is_dead)


def test_a_grandchild_dies_with_its_worker(cluster):
    @ray.remote(max_retries=0)
    def spawn():
        import subprocess

        return subprocess.Popen(["sleep", "1000"]).pid, os.getpid()

    child, worker = ray.get(spawn.remote(), timeout=30)
    os.kill(worker, signal.SIGKILL)
    wait_for_condition(lambda: not os.path.exists(f"/proc/{child}") or _is_zombie(child))


def _is_zombie(pid):
    try:
        return open(f"/proc/{pid}/stat").read().rsplit(")", 1)[1].split()[0] == "Z"
    except OSError:
        return True


def test_the_zygote(cluster):
    @ray.remote
    class Counter:
        def __init__(self):
            self.value = 0

        def next(self):
            self.value += 1
            return self.value

    counter = Counter.remote()
    assert ray.get(counter.next.remote(), timeout=30) == 1
    first = node_answer("stats")["zygote_pid"]
    os.kill(first, signal.SIGKILL)
    # Workers that run are undisturbed; new ones come from the next zygote.
    assert ray.get(counter.next.remote(), timeout=30) == 2
    others = [Counter.options(num_cpus=0).remote() for _ in range(4)]
    assert ray.get([other.next.remote() for other in others], timeout=60) == [1] * 4
    assert node_answer("stats")["zygote_pid"] not in (None, first)
    assert ray.get(counter.next.remote(), timeout=30) == 3


def test_the_control_plane(cluster):
    @ray.remote
    class Counter:
        def __init__(self):
            self.value = 0

        def next(self):
            self.value += 1
            return self.value

    counter = Counter.options(name="counter").remote()
    assert ray.get(counter.next.remote(), timeout=30) == 1
    from ray.experimental import internal_kv

    internal_kv._internal_kv_put("kept", "value")
    for _ in range(3):
        before = node().pid("gcs_server")
        os.kill(before, signal.SIGKILL)
        # Calls and tasks go on while it is away.
        assert ray.get(counter.next.remote(), timeout=30) > 1
        assert ray.get([add.remote(i) for i in range(10)], timeout=30) == list(range(1, 11))
        wait_for_condition(lambda: node().pid("gcs_server") != before)  # noqa: B023
        assert ray.get(ray.get_actor("counter").next.remote(), timeout=30) > 1
        assert internal_kv._internal_kv_get("kept") == b"value"
        fresh = Counter.options(num_cpus=0).remote()
        assert ray.get(fresh.next.remote(), timeout=60) == 1
    assert len([n for n in ray.nodes() if n["Alive"]]) == 1


def test_the_raylet(cluster):
    reference = ray.put(np.zeros(1_000_000))
    view = ray.get(reference)
    assert ray.get(add.remote(1), timeout=30) == 2
    started = time.monotonic()
    os.kill(node().pid("raylet"), signal.SIGKILL)
    with pytest.raises(ray.exceptions.RayError):
        for _ in range(1000):
            ray.get(add.remote(1), timeout=20)
    assert time.monotonic() - started < 25
    assert view.sum() == 0
    del view
    ray.shutdown()
    assert_no_leaks()


DRIVER = """
import os, signal, sys, time
import numpy as np
import ray
ray.init("local", num_cpus=2, object_store_memory={store}, log_to_driver=False)
@ray.remote
def work(x):
    import subprocess
    subprocess.Popen(["sleep", "1000"])
    time.sleep(1000)
@ray.remote
class Actor:
    def ping(self): return np.zeros(1000000)
actor = Actor.options(num_cpus=0).remote()
kept = ray.get(actor.ping.remote())
running = [work.remote(i) for i in range(2)]
kept = ray.put(np.zeros(1000000))
print("ready", flush=True)
{end}
"""


@pytest.mark.parametrize(
    "end",
    [
        "os.kill(os.getpid(), signal.SIGKILL)",
        "os._exit(3)",
        "sys.exit(0)",
        "raise RuntimeError('bye')",
        "os.kill(os.getpid(), signal.SIGTERM); time.sleep(60)",
        "os.kill(os.getpid(), signal.SIGSEGV)",
        "os.execv('/bin/true', ['/bin/true'])",
    ],
    ids=["SIGKILL", "_exit", "exit", "exception", "SIGTERM", "SIGSEGV", "exec"],
)
def test_the_driver(end):
    ray.shutdown()
    with running_program(DRIVER.format(store=STORE_BYTES, end=end)) as program:
        wait_for_line(program, "ready")
        remember_nodes()
        program.wait(30)
    assert_no_leaks()


def test_ctrl_c_twice():
    ray.shutdown()
    with running_program(DRIVER.format(store=STORE_BYTES, end="ray.get(running)")) as program:
        wait_for_line(program, "ready")
        remember_nodes()
        program.send_signal(signal.SIGINT)
        time.sleep(0.05)
        program.send_signal(signal.SIGINT)
        program.wait(30)
    assert_no_leaks()


def test_a_stopped_driver_is_not_a_dead_one(cluster):
    # A process that is merely stopped for a while keeps its cluster.
    with running_program(DRIVER.format(store=STORE_BYTES, end="print(ray.get(actor.ping.remote()).sum())")) as program:
        wait_for_line(program, "ready")
        remember_nodes()
        program.send_signal(signal.SIGSTOP)
        time.sleep(1.0)
        program.send_signal(signal.SIGCONT)
        assert "0.0" in program.stdout.read()
        assert program.wait(30) == 0


def random_kills(kills, seed):
    """Kills workers at random while tasks and actors run; everything must still be right, and nothing left over."""
    randomness = random.Random(seed)

    @ray.remote(max_retries=-1)
    def work(x, array):
        time.sleep(0.005)
        return x + int(array[0]), np.full(20_000, x, dtype=np.int64)

    @ray.remote(max_restarts=-1, max_task_retries=-1, num_cpus=0)
    class Echo:
        def echo(self, x):
            return x

    array = ray.put(np.ones(200_000, dtype=np.int64))
    actors = [Echo.remote() for _ in range(2)]
    done = 0
    batch = 0
    deadline = time.monotonic() + 20 + kills
    while done < kills:
        assert time.monotonic() < deadline, f"only {done} of {kills} kills in time"
        batch += 1
        tasks = [work.options(num_returns=2).remote(i, array) for i in range(20)]
        calls = [actor.echo.remote(batch) for actor in actors for _ in range(5)]
        for _ in range(2):
            pids = sorted(worker_pids())
            if pids:
                try:
                    os.kill(randomness.choice(pids), signal.SIGKILL)
                    done += 1
                except ProcessLookupError:
                    pass
            time.sleep(randomness.random() * 0.02)
        assert ray.get([first for first, _ in tasks], timeout=60) == [i + 1 for i in range(20)]
        for i, (_, second) in enumerate(tasks):
            assert int(ray.get(second, timeout=60)[-1]) == i
        assert ray.get(calls, timeout=60) == [batch] * 10
    del array, tasks, calls, second, actors

    def is_clean():
        objects = node_answer("objects")
        objects = objects["objects"] if isinstance(objects, dict) else objects
        leases = node_answer("leases")["leases"]
        busy = [lease for lease in leases if lease.get("activity") not in ("idle", None)]
        return not objects and not busy and ray.available_resources().get("CPU") == 2

    wait_for_condition(is_clean, timeout=20, what="no object, no busy lease and both CPUs free")


def test_random_worker_kills(cluster):
    random_kills(30, seed=1)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_many_random_worker_kills(cluster):
    random_kills(300, seed=2)


def test_a_shutdown_under_load_leaves_nothing(cluster):
    @ray.remote
    def spin():
        while True:
            pass

    @ray.remote(num_cpus=0)
    class Stubborn:
        def ignore(self):
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            return os.getpid()

    stubborn = Stubborn.remote()
    ray.get(stubborn.ignore.remote(), timeout=30)
    running = [spin.remote() for _ in range(4)]
    ray.wait(running, timeout=0.2)
    assert processes_of_sessions()
    started = time.monotonic()
    ray.shutdown()
    assert time.monotonic() - started < 5
    assert_no_leaks()
