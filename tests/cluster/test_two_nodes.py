"""Two raylets on one machine: objects, references, actors, groups and streams cross between them."""

import asyncio
import os
import time

import numpy as np
import pytest
from chaos_helpers import every_node_answers, wait_until_nothing_is_left
from conftest import STORE_BYTES, assert_no_leaks, remember_nodes, run_program, wait_for_condition

import ray
from ray.cluster_utils import Cluster
from ray.util.placement_group import placement_group, placement_group_table, remove_placement_group
from ray.util.scheduling_strategies import (
    In,
    NodeAffinitySchedulingStrategy,
    NodeLabelSchedulingStrategy,
    PlacementGroupSchedulingStrategy,
)

pytestmark = pytest.mark.timeout(60)
SECOND = {"second": 0.01}


@pytest.fixture(scope="module")
def nodes():
    """(head's id, second's id, cluster). The stores hold two objects of 50 MB."""
    ray.shutdown()
    memory = 2 * STORE_BYTES
    cluster = Cluster(
        initialize_head=True, head_node_args={"num_cpus": 2, "resources": {"first": 1}, "object_store_memory": memory}
    )
    second = cluster.add_node(num_cpus=2, resources={"second": 1}, labels={"zone": "two"}, object_store_memory=memory)
    ray.init(address=cluster.address, log_to_driver=False, namespace="two")
    remember_nodes()
    yield cluster.head_node.node_id, second.node_id, cluster
    ray.shutdown()
    cluster.shutdown()
    assert_no_leaks()


@pytest.fixture(autouse=True)
def nothing_left(nodes):
    yield
    wait_until_nothing_is_left(timeout=10)


@ray.remote
def where(*_):
    return ray.get_runtime_context().get_node_id()


@ray.remote
def make(n, value=1):
    return np.full(n, value, dtype=np.uint8)


@ray.remote(max_retries=0)
def fails():
    return 1 // 0


@ray.remote
def total(array):
    return int(array.sum(dtype=np.int64)), ray.get_runtime_context().get_node_id()


@ray.remote(num_cpus=0)
class Holder:
    def __init__(self):
        self.kept = []

    def where(self):
        return ray.get_runtime_context().get_node_id()

    def make(self, n):
        return [ray.put(np.ones(n, dtype=np.uint8))]

    def keep(self, references):
        self.kept = references

    def total(self):
        return [int(array.sum(dtype=np.int64)) for array in ray.get(self.kept)]

    def give(self):
        return self.kept

    def drop(self):
        self.kept = []


@pytest.mark.parametrize("size", [100, 1_000_000, 50_000_000], ids=["small", "1MB", "50MB"])
def test_objects_in_both_directions(nodes, size):
    head, second, _ = nodes
    far = make.options(resources=SECOND).remote(size)
    assert int(ray.get(far, timeout=30).sum(dtype=np.int64)) == size
    near = NodeAffinitySchedulingStrategy(head, soft=False)
    assert ray.get(total.options(scheduling_strategy=near).remote(far), timeout=30) == (size, head)
    del far
    here = ray.put(np.ones(size, dtype=np.uint8))
    assert ray.get(total.options(resources=SECOND).remote(here), timeout=30) == (size, second)


def test_many_objects_both_ways_at_once(nodes):
    far = [make.options(resources={"second": 0.001}).remote(200_000 + i, i % 7) for i in range(60)]
    here = [ray.put(np.full(200_000 + i, i % 5, dtype=np.uint8)) for i in range(60)]
    sums = [total.options(resources={"second": 0.001}).remote(reference) for reference in here]
    assert [int(a.sum(dtype=np.int64)) for a in ray.get(far, timeout=30)] == [
        (200_000 + i) * (i % 7) for i in range(60)
    ]
    assert [s for s, _ in ray.get(sums, timeout=30)] == [(200_000 + i) * (i % 5) for i in range(60)]


def test_tasks_run_where_their_large_argument_is(nodes):
    _, second, _ = nodes
    far = make.options(resources=SECOND).remote(10_000_000)
    ray.wait([far], timeout=30, fetch_local=False)
    # The nodes hear of each other's load a little later than it changes, and a node that is half full is no longer
    # preferred; each attempt asks for a lease of its own, because its resources make it a class of its own.
    attempts = iter(range(1, 100))
    wait_for_condition(
        lambda: ray.get(where.options(num_cpus=0.5 + next(attempts) / 1000).remote(far), timeout=30) == second,
        timeout=3,
        interval=0.1,
    )


def test_a_borrowed_reference_outlives_the_owners(nodes):
    holder = Holder.options(resources=SECOND).remote()
    reference = ray.put(np.ones(1_000_000, dtype=np.uint8))
    ray.get(holder.keep.remote([reference]), timeout=30)
    del reference
    time.sleep(0.3)
    assert ray.get(holder.total.remote(), timeout=30) == [1_000_000]
    (back,) = ray.get(holder.give.remote(), timeout=30)
    ray.get(holder.drop.remote(), timeout=30)
    assert int(ray.get(back, timeout=30).sum()) == 1_000_000


def test_references_are_borrowed_onwards(nodes):
    first = Holder.options(resources=SECOND).remote()
    last = Holder.options(resources={"first": 0.01}).remote()

    @ray.remote(num_cpus=0)
    def hand_on(references, to):
        ray.get(to.keep.remote(references))

    ray.get(first.keep.remote(ray.get(first.make.remote(300_000), timeout=30)), timeout=30)
    ray.get(hand_on.options(resources=SECOND).remote(ray.get(first.give.remote(), timeout=30), last), timeout=30)
    ray.get(first.drop.remote(), timeout=30)
    time.sleep(0.3)
    assert ray.get(last.total.remote(), timeout=30) == [300_000]
    ray.get(last.drop.remote(), timeout=30)
    wait_for_condition(
        lambda: all(answer["ledger"]["primaries"] == 0 for answer in every_node_answers("memory").values())
    )


def test_nested_references_returned_from_the_other_node(nodes):
    @ray.remote(num_cpus=0)
    def nest(n):
        return {"deep": [ray.put([ray.put(np.ones(n, dtype=np.uint8))])]}

    for n in (10, 500_000):
        outer = ray.get(nest.options(resources=SECOND).remote(n), timeout=30)
        inner = ray.get(outer["deep"][0], timeout=30)
        del outer
        assert int(ray.get(inner[0], timeout=30).sum()) == n
        del inner


def test_the_only_copy_and_the_owner_are_remote(nodes):
    # The owner is an actor of the second node, and the driver learns of its object only by reference.
    holder = Holder.options(resources=SECOND).remote()
    (reference,) = ray.get(holder.make.remote(2_000_000), timeout=30)
    ready, _ = ray.wait([reference], timeout=30)
    assert ready == [reference]
    assert int(ray.get(reference, timeout=30).sum()) == 2_000_000
    near = NodeAffinitySchedulingStrategy(nodes[0], soft=False)
    assert ray.get(total.options(scheduling_strategy=near).remote(reference), timeout=30)[0] == 2_000_000
    del ready, _


def test_actors_on_the_other_node(nodes):
    head, second, _ = nodes
    far = Holder.options(resources=SECOND, name="far").remote()
    assert ray.get(far.where.remote(), timeout=30) == second
    assert ray.get(ray.get_actor("far").where.remote(), timeout=30) == second
    # A process of another driver and a task of the other node find it by its name too.
    found = ray.remote(num_cpus=0)(lambda: ray.get(ray.get_actor("far").where.remote()))
    for resources in ({"first": 0.01}, SECOND):
        assert ray.get(found.options(resources=resources).remote(), timeout=30) == second
    output = run_program(
        "import ray, sys\nray.init(address=sys.argv[1], namespace='two', log_to_driver=False)\n"
        "print(ray.get(ray.get_actor('far').where.remote(), timeout=30))",
        nodes[2].address,
    ).stdout
    assert second in output
    ray.kill(far)
    wait_for_condition(lambda: _is_gone("far"))


def _is_gone(name):
    try:
        ray.get_actor(name)
    except ValueError:
        return True
    return False


def test_calls_keep_their_order_across_nodes(nodes):
    @ray.remote(num_cpus=0)
    class Log:
        def __init__(self):
            self.seen = []

        def add(self, i, *_):
            self.seen.append(i)

        def all(self):
            return self.seen

    log = Log.options(resources=SECOND).remote()
    slow = ray.remote(lambda: time.sleep(0.2)).remote()
    for i in range(500):
        log.add.remote(i, *([slow] if i == 100 else []))
    assert ray.get(log.all.remote(), timeout=30) == list(range(500))


@pytest.mark.parametrize("strategy, count", [("STRICT_SPREAD", 2), ("STRICT_PACK", 1), ("SPREAD", 2), ("PACK", 1)])
def test_groups(nodes, strategy, count):
    group = placement_group([{"CPU": 1}, {"CPU": 1}], strategy=strategy)
    assert group.wait(timeout_seconds=30)
    told = placement_group_table(group)["bundles_to_node_id"]
    assert len(set(told.values())) == count
    ran = [
        ray.get(
            where.options(
                num_cpus=1,
                scheduling_strategy=PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=index),
            ).remote(),
            timeout=30,
        )
        for index in range(2)
    ]
    assert ran == [told[0], told[1]]
    remove_placement_group(group)
    wait_for_condition(lambda: ray.available_resources().get("CPU") == 4)


def test_a_group_that_needs_three_nodes_waits(nodes):
    group = placement_group([{"CPU": 1}] * 3, strategy="STRICT_SPREAD")
    assert not group.wait(timeout_seconds=0.5)
    assert ray.available_resources()["CPU"] == 4
    remove_placement_group(group)


def test_affinity_labels_and_resources_decide(nodes):
    head, second, _ = nodes
    for node in (head, second):
        hard = NodeAffinitySchedulingStrategy(node, soft=False)
        assert ray.get([where.options(scheduling_strategy=hard).remote() for _ in range(5)], timeout=30) == [node] * 5
        actor = Holder.options(scheduling_strategy=hard).remote()
        assert ray.get(actor.where.remote(), timeout=30) == node
        del actor
    label = NodeLabelSchedulingStrategy(hard={"zone": In("two")})
    assert ray.get(where.options(scheduling_strategy=label).remote(), timeout=30) == second
    assert ray.get(where.options(resources={"first": 0.5}).remote(), timeout=30) == head
    assert ray.get(where.options(resources={"second": 0.5}).remote(), timeout=30) == second


def test_a_stream_from_the_other_node(nodes):
    @ray.remote(num_cpus=0, resources=SECOND)
    def items(n, size):
        for i in range(n):
            yield np.full(size, i, dtype=np.int64)

    for size in (10, 50_000):
        stream = items.remote(50, size)
        assert [int(ray.get(reference, timeout=30)[-1]) for reference in stream] == list(range(50))
        del stream
    # A consumer that stops early leaves nothing behind.
    stream = items.remote(50, 50_000)
    assert int(ray.get(next(stream), timeout=30)[0]) == 0
    del stream


def test_a_stream_with_back_pressure_from_the_other_node(nodes, tmp_path):
    path = str(tmp_path / "made")

    @ray.remote(num_cpus=0, resources=SECOND, _generator_backpressure_num_objects=2)
    def items():
        for i in range(10):
            with open(path, "a") as file:
                file.write(f"{i}\n")
            yield i

    stream = items.remote()
    assert ray.get(next(stream), timeout=30) == 0
    wait_for_condition(lambda: os.path.exists(path))
    time.sleep(0.3)
    assert len(open(path).read().split()) <= 4
    assert [ray.get(reference, timeout=30) for reference in stream] == list(range(1, 10))
    del stream


def test_errors_cross(nodes):
    @ray.remote(num_cpus=0, resources=SECOND, max_retries=0)
    def fail():
        raise KeyError("over there")

    @ray.remote(num_cpus=0, resources=SECOND, max_retries=0)
    def crash():
        print("said over there")
        os._exit(9)

    with pytest.raises(KeyError, match="over there"):
        ray.get(fail.remote(), timeout=30)
    with pytest.raises(ray.exceptions.WorkerCrashedError, match="said over there"):
        ray.get(crash.remote(), timeout=30)


def test_cancel_on_the_other_node(nodes):
    @ray.remote(num_cpus=0, resources=SECOND)
    def forever():
        time.sleep(1000)

    for force in (False, True):
        reference = forever.remote()
        ray.wait([reference], timeout=0.5)
        ray.cancel(reference, force=force)
        with pytest.raises((ray.exceptions.TaskCancelledError, ray.exceptions.WorkerCrashedError)):
            ray.get(reference, timeout=20)
        del reference


def test_arguments_on_their_way_stop_neither_the_loop_nor_the_order(nodes):
    """An asyncio actor's loop goes on while the arguments of a call come from another node."""

    @ray.remote(num_cpus=0, resources={"first": 0.01})
    class Log:
        def __init__(self):
            self.seen = []
            self.ticks = 0

        async def tick(self):
            while True:
                self.ticks += 1
                await asyncio.sleep(0.001)

        async def add(self, value, array=None):
            self.seen.append((value, 0 if array is None else int(array[-1])))
            return self.ticks

        async def all(self):
            return self.seen

    log = Log.remote()
    ticking = log.tick.remote()
    # Made on the other node, so that they are fetched when they are used.
    arrays = [make.options(resources=SECOND).remote(4_000_000, i + 1) for i in range(4)]
    ray.wait(arrays, num_returns=4, timeout=30, fetch_local=False)
    before = ray.get(log.add.remote(-1), timeout=30)
    calls = [log.add.remote(i, arrays[i // 3] if i % 3 == 0 else None) for i in range(12)]
    assert ray.get(calls, timeout=30)[-1] >= before
    seen = ray.get(log.all.remote(), timeout=30)
    assert seen[1:] == [(i, i // 3 + 1 if i % 3 == 0 else 0) for i in range(12)]
    # A failed argument fails its call alone.
    lost = fails.options(resources=SECOND).remote()
    with pytest.raises(ZeroDivisionError):
        ray.get(log.add.remote(0, lost), timeout=30)
    assert ray.get(log.add.remote(1), timeout=30) > before
    ray.cancel(ticking)
    with pytest.raises(ray.exceptions.TaskCancelledError):
        ray.get(ticking, timeout=30)
    ray.kill(log)
