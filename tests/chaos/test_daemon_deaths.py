"""SIGKILL of the control plane, of a raylet and of drivers, and of a whole node under load."""

import os
import signal
import time

import numpy as np
import pytest
from chaos_helpers import (
    core,
    first_line_with,
    kill,
    lines,
    node,
    node_answer,
    note,
    until,
    wait_until_nothing_is_left,
)
from conftest import (
    STORE_BYTES,
    assert_no_leaks,
    remember_nodes,
    run_ray,
    running_program,
    sockets_of_sessions,
    wait_for_condition,
)

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

pytestmark = pytest.mark.timeout(60)


@pytest.fixture
def cluster(ray_start):
    ray_start(num_cpus=2, namespace="chaos")


@ray.remote(num_cpus=0)
class Counter:
    def __init__(self):
        self.value = 0

    def next(self):
        self.value += 1
        return self.value

    def pid(self):
        return os.getpid()

    def where(self):
        return ray.get_runtime_context().get_node_id()


@ray.remote
def add(x):
    return x + 1


# --- the control plane ---


def test_the_control_plane_comes_back_within_a_second(cluster):
    actor = Counter.options(name="kept", lifetime="detached").remote()
    assert ray.get(actor.next.remote(), timeout=30) == 1
    times = []
    for _ in range(3):
        before = node().pid("gcs_server")
        started = time.monotonic()
        kill(before)
        assert len(ray.nodes()) == 1
        times.append(time.monotonic() - started)
        assert node().pid("gcs_server") != before
    assert max(times) < 1.5, times
    assert ray.get(ray.get_actor("kept").next.remote(), timeout=30) == 2
    ray.kill(actor)


def test_work_goes_on_while_there_is_no_control_plane(cluster, tmp_path):
    from ray.experimental import internal_kv

    @ray.remote
    def sleep(path):
        note(path, os.getpid())
        time.sleep(0.5)
        return np.ones(200_000)

    actor = Counter.options(name="kept").remote()
    assert ray.get(actor.next.remote(), timeout=30) == 1
    internal_kv._internal_kv_put("key", "value")
    ray.get(add.remote(0), timeout=30)
    path = str(tmp_path / "runs")
    running = sleep.remote(path)
    until(lambda: lines(path))
    node().kill_gcs_server()
    assert not [name for name, _ in node().live_processes() if name == "gcs_server"]
    assert ray.get(running, timeout=10).sum() == 200_000
    assert ray.get([add.remote(i) for i in range(50)], timeout=10) == list(range(1, 51))
    assert ray.get([actor.next.remote() for _ in range(50)], timeout=10) == list(range(2, 52))
    assert ray.get(ray.put(np.ones(200_000)), timeout=10).sum() == 200_000
    # A new actor waits, and what it waits for can be asked.
    late = Counter.remote()
    reference = late.next.remote()
    assert not ray.wait([reference], timeout=0.5)[0]
    assert node_answer("why")["gcs"] != "connected"
    said = str(core().why())
    assert "control plane" in said or "GCS" in said or "actor" in said, said
    node().start_gcs_server()
    assert ray.get(reference, timeout=20) == 1
    assert ray.get(ray.get_actor("kept").next.remote(), timeout=20) == 52
    assert internal_kv._internal_kv_get("key") == b"value"
    assert len(lines(path)) == 1
    del running, reference, late, actor
    wait_until_nothing_is_left()


def test_actors_are_made_while_the_control_plane_dies_again_and_again(cluster):
    actors = []
    for i in range(10):
        actors.append(Counter.options(name=f"a{i}").remote())
        if i % 3 == 0:
            kill(node().pid("gcs_server"))
    assert ray.get([actor.next.remote() for actor in actors], timeout=50) == [1] * 10
    assert [ray.get(ray.get_actor(f"a{i}").next.remote(), timeout=30) for i in range(10)] == [2] * 10
    pids = ray.get([actor.pid.remote() for actor in actors], timeout=30)
    assert len(set(pids)) == 10
    # Exactly one process an actor, however often the placing was interrupted.
    wait_for_condition(
        lambda: len([w for w in node_answer("workers")["workers"] if w["state"] == "actor"]) == 10, timeout=10
    )
    del actors
    wait_until_nothing_is_left()


def test_an_actor_that_dies_while_the_control_plane_is_away(cluster):
    actor = Counter.options(max_restarts=1, max_task_retries=-1).remote()
    pid = ray.get(actor.pid.remote(), timeout=30)
    node().kill_gcs_server()
    kill(pid)
    reference = actor.next.remote()
    ready, _ = ray.wait([reference], timeout=0.3)
    assert not ready
    node().start_gcs_server()
    assert ray.get(reference, timeout=30) == 1


def test_a_detached_head_restarts_its_control_plane(tmp_path):
    ray.shutdown()
    started = run_ray("start", "--head", "--num-cpus=2", "--port=0", f"--object-store-memory={STORE_BYTES}")
    try:
        assert started.returncode == 0, started.stdout + started.stderr
        remember_nodes()
        ray.init("auto", namespace="n", log_to_driver=False)
        actor = Counter.options(name="kept", lifetime="detached").remote()
        assert ray.get(actor.next.remote(), timeout=30) == 1
        directory = node().session_directory
        from ray._private import services

        def pid():
            return services.read_records(directory)[0]["processes"]["gcs_server"]["pid"]

        before = pid()
        kill(before)
        wait_for_condition(lambda: pid() != before, timeout=5)
        assert ray.get(ray.get_actor("kept").next.remote(), timeout=20) == 2
        assert ray.get(Counter.remote().next.remote(), timeout=20) == 1
    finally:
        ray.shutdown()
        run_ray("stop", "--force")
    assert_no_leaks()


# --- the driver ---

_ATTACHED = """
import os, signal, time
import numpy as np
import ray
ray.init("auto", namespace="n", log_to_driver=False)
@ray.remote(num_cpus=0)
class Actor:
    def pid(self): return os.getpid()
    def hold(self): self.kept = ray.put(np.ones(300000)); return os.getpid()
@ray.remote(num_cpus=0)
def forever(): time.sleep(1000)
detached = Actor.options(name="detached", lifetime="detached").remote()
plain = Actor.options(name="plain").remote()
pids = ray.get([detached.pid.remote(), plain.hold.remote()], timeout=30)
running = forever.remote()
kept = ray.put(np.ones(300000))
print("ready", *pids, flush=True)
{end}
"""


@pytest.mark.parametrize("end", ["os.kill(os.getpid(), signal.SIGKILL)", "os._exit(3)"], ids=["SIGKILL", "_exit"])
def test_a_driver_of_a_cluster_that_stays(end):
    ray.shutdown()
    started = run_ray("start", "--head", "--num-cpus=2", "--port=0", f"--object-store-memory={STORE_BYTES}")
    try:
        assert started.returncode == 0, started.stdout + started.stderr
        remember_nodes()
        with running_program(_ATTACHED.format(end=end)) as program:
            detached, plain = map(int, first_line_with(program, "ready").split()[1:])
            program.wait(30)
        # What was the driver's is gone within five seconds; what is detached stays.
        wait_for_condition(lambda: not os.path.exists(f"/proc/{plain}"), timeout=5)
        ray.init("auto", namespace="n", log_to_driver=False)
        assert ray.get(ray.get_actor("detached").pid.remote(), timeout=30) == detached
        with pytest.raises(ValueError):
            ray.get_actor("plain")
        wait_for_condition(lambda: node_answer("memory")["ledger"]["primaries"] == 0, timeout=5)
        wait_for_condition(lambda: not node_answer("leases")["leases"], timeout=5)
        wait_for_condition(lambda: ray.available_resources()["CPU"] == 2, timeout=5)
        ray.kill(ray.get_actor("detached"))
        wait_for_condition(lambda: not os.path.exists(f"/proc/{detached}"), timeout=5)
    finally:
        ray.shutdown()
        run_ray("stop", "--force")
    assert_no_leaks()


_LOADED = """
import os, signal, sys, threading, time
import numpy as np
import ray
ray.init("local", num_cpus=2, object_store_memory={store}, log_to_driver=False)
@ray.remote
def work(array): return array * 2
@ray.remote(num_cpus=0)
class Actor:
    def echo(self, x): return x
actors = [Actor.remote() for _ in range(3)]
ray.get([actor.echo.remote(1) for actor in actors])
print("ready", flush=True)
end = time.monotonic() + {seconds}
def stop():
    time.sleep({seconds})
    {end}
threading.Thread(target=stop, daemon=True).start()
while True:
    references = [work.remote(np.ones(100000)) for _ in range(4)] + [a.echo.remote(1) for a in actors]
    ray.get(references)
"""


@pytest.mark.parametrize("seconds", [0.0, 0.05, 0.5])
@pytest.mark.parametrize("end", ["os.kill(os.getpid(), signal.SIGKILL)", "os._exit(3)"], ids=["SIGKILL", "_exit"])
def test_a_driver_under_load(end, seconds):
    ray.shutdown()
    with running_program(_LOADED.format(store=STORE_BYTES, end=end, seconds=seconds)) as program:
        first_line_with(program, "ready")
        remember_nodes()
        program.wait(30)
    assert_no_leaks()


def test_a_driver_killed_while_it_starts():
    ray.shutdown()
    for delay_s in (0.05, 0.1, 0.15, 0.2, 0.25, 0.3):
        with running_program("import ray\nray.init('local', num_cpus=2)\nprint('up', flush=True)\n") as program:
            time.sleep(delay_s)
            remember_nodes()
            program.kill()
            program.wait(10)
        remember_nodes()
        assert_no_leaks()


# --- the raylet ---


def test_the_raylet_of_a_driver(cluster, tmp_path):
    @ray.remote(num_cpus=0)
    def forever(path):
        note(path, os.getpid())
        time.sleep(1000)

    path = str(tmp_path / "pid")
    actor = Counter.remote()
    ray.get(actor.next.remote(), timeout=30)
    running = forever.remote(path)
    pid = int(until(lambda: lines(path))[0])
    started = time.monotonic()
    kill(node().pid("raylet"))
    # Everything that waits ends, with the one error that says why.
    with pytest.raises(ray.exceptions.LocalRayletDiedError):
        ray.get(running, timeout=20)
    assert time.monotonic() - started < 2
    for attempt in (
        lambda: ray.get(add.remote(1), timeout=10),
        lambda: ray.get(ray.put(np.ones(300_000)), timeout=10),
        lambda: ray.get(Counter.remote().next.remote(), timeout=10),
        lambda: ray.get(actor.next.remote(), timeout=10),
        lambda: ray.nodes(),
        lambda: ray.available_resources(),
        lambda: ray.get_actor("nobody"),
    ):
        with pytest.raises(ray.exceptions.LocalRayletDiedError):
            attempt()
            # A process that has its object or its actor at hand may still serve a call or two.
            until(lambda: attempt() and False, timeout=3)  # noqa: B023
    assert time.monotonic() - started < 30
    wait_for_condition(lambda: not os.path.exists(f"/proc/{pid}"), timeout=5)
    started = time.monotonic()
    ray.shutdown()
    assert time.monotonic() - started < 5
    assert_no_leaks()
    # The process can start another one.
    ray.init("local", num_cpus=1, object_store_memory=STORE_BYTES, log_to_driver=False)
    remember_nodes()
    assert ray.get(add.remote(1), timeout=30) == 2


# --- a node under load ---


def test_a_node_under_load(cluster_factory, tmp_path):
    cluster = cluster_factory(num_cpus=2)
    second = cluster.add_node(num_cpus=2, resources={"spot": 1}, object_store_memory=STORE_BYTES)
    ray.init(address=cluster.address, log_to_driver=False)
    remember_nodes()
    there = NodeAffinitySchedulingStrategy(second.node_id, soft=True)
    path = str(tmp_path / "runs")

    @ray.remote(max_retries=3)
    def work(path, i):
        note(path, f"{i} {ray.get_runtime_context().get_node_id()}")
        time.sleep(0.02)
        return i, np.full(50_000, i)

    @ray.remote(max_retries=2)
    def make(n):
        return np.full(200_000, n)

    @ray.remote(num_cpus=0, max_restarts=2, max_task_retries=-1)
    class Mover:
        def where(self):
            return ray.get_runtime_context().get_node_id()

        def put(self):
            return [ray.put(np.ones(300_000))]

    @ray.remote(num_cpus=0)
    class Fixed:
        def where(self):
            return ray.get_runtime_context().get_node_id()

    mover = Mover.options(scheduling_strategy=there).remote()
    fixed = Fixed.options(scheduling_strategy=there).remote()
    assert ray.get([mover.where.remote(), fixed.where.remote()], timeout=30) == [second.node_id] * 2
    (lost,) = ray.get(mover.put.remote(), timeout=30)
    chain = make.options(scheduling_strategy=there).remote(1)
    for _ in range(2):
        chain = ray.remote(max_retries=2)(lambda array: array + 1).options(scheduling_strategy=there).remote(chain)
    ray.wait([chain], timeout=30, fetch_local=False)
    tasks = [work.options(num_returns=2, scheduling_strategy="SPREAD").remote(path, i) for i in range(60)]
    until(lambda: any(second.node_id in line for line in lines(path)))
    started = time.monotonic()
    second.kill_raylet()
    assert [ray.get(first, timeout=30) for first, _ in tasks] == list(range(60))
    for i, (_, array) in enumerate(tasks):
        assert int(ray.get(array, timeout=30)[-1]) == i
    assert int(ray.get(chain, timeout=30)[0]) == 3
    assert ray.get(mover.where.remote(), timeout=30) == cluster.head_node.node_id
    with pytest.raises((ray.exceptions.ObjectLostError, ray.exceptions.OwnerDiedError)):
        ray.get(lost, timeout=30)
    with pytest.raises(ray.exceptions.ActorDiedError, match="node"):
        ray.get(fixed.where.remote(), timeout=30)
    assert time.monotonic() - started < 40
    wait_for_condition(lambda: ray.cluster_resources()["CPU"] == 2)
    cluster.remove_node(second, allow_graceful=False)
    del tasks, chain, lost, mover, fixed, array, _
    wait_until_nothing_is_left()


def test_a_put_object_whose_only_copy_was_on_a_dead_node(cluster_factory):
    cluster = cluster_factory(num_cpus=1)
    second = cluster.add_node(num_cpus=1, resources={"spot": 1}, object_store_memory=STORE_BYTES)
    ray.init(address=cluster.address, log_to_driver=False)
    remember_nodes()

    @ray.remote(resources={"spot": 1}, max_retries=0)
    def make():
        return np.ones(300_000)

    once = make.remote()
    ray.wait([once], timeout=30, fetch_local=False)
    cluster.remove_node(second, allow_graceful=False)
    with pytest.raises(ray.exceptions.ObjectLostError) as caught:
        ray.get(once, timeout=30)
    assert once.hex() in str(caught.value)


def test_a_node_that_is_frozen_is_declared_dead(cluster_factory, tmp_path):
    cluster = cluster_factory(num_cpus=1, _system_config={"health_check_timeout_ms": 2000})
    ray.init(address=cluster.address, log_to_driver=False)
    second = cluster.add_node(num_cpus=1, resources={"spot": 1}, object_store_memory=STORE_BYTES)
    remember_nodes()
    path = str(tmp_path / "runs")

    @ray.remote(max_retries=1)
    def work(path, frozen):
        here = ray.get_runtime_context().get_node_id()
        note(path, here)
        if here == frozen:
            time.sleep(100)
        return here

    soft = NodeAffinitySchedulingStrategy(second.node_id, soft=True)
    reference = work.options(scheduling_strategy=soft).remote(path, second.node_id)
    until(lambda: lines(path), timeout=20)
    os.kill(second.pid("raylet"), signal.SIGSTOP)
    try:
        assert ray.get(reference, timeout=45) == cluster.head_node.node_id
    finally:
        os.kill(second.pid("raylet"), signal.SIGCONT)
    # It learns that it is dead, and leaves.
    wait_for_condition(lambda: not second.live_processes(), timeout=10)


def test_no_socket_of_a_dead_worker_stays(cluster):
    @ray.remote(max_retries=0)
    def die():
        kill(os.getpid())
        time.sleep(100)

    ray.get(add.remote(1), timeout=30)
    for _ in range(5):
        with pytest.raises(ray.exceptions.WorkerCrashedError):
            ray.get(die.remote(), timeout=30)

    def sockets_are_of_the_living():
        names = {os.path.basename(path) for path in sockets_of_sessions()}
        living = {worker["worker_id"] for worker in node_answer("workers")["workers"]}
        living |= {driver["worker_id"] for driver in node_answer("workers")["drivers"]}
        return not {name for name in names if not name.startswith(("raylet", "gcs"))} - living

    wait_for_condition(sockets_are_of_the_living, timeout=5)
