"""Two raylets on one machine: resources, objects, actors and groups cross between them; one dies."""

import os
import time

import numpy as np
import pytest
from conftest import remember_nodes, run_program, wait_for_condition

import ray
from ray.util.placement_group import placement_group, placement_group_table, remove_placement_group
from ray.util.scheduling_strategies import In, NodeAffinitySchedulingStrategy, NodeLabelSchedulingStrategy


@pytest.fixture(scope="module")
def two_nodes():
    """A head with 2 CPUs and a second node with 2 CPUs, the resource "second" and a label."""
    from conftest import STORE_BYTES, assert_no_leaks

    from ray.cluster_utils import Cluster

    ray.shutdown()
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 2, "object_store_memory": STORE_BYTES})
    second = cluster.add_node(
        num_cpus=2, resources={"second": 2}, labels={"zone": "b"}, object_store_memory=STORE_BYTES
    )
    ray.init(address=cluster.address, log_to_driver=False)
    remember_nodes()
    yield cluster, second
    ray.shutdown()
    cluster.shutdown()
    assert_no_leaks()


@ray.remote
def where():
    return ray.get_runtime_context().get_node_id()


@ray.remote
def make(n, value):
    return np.full(n, value, dtype=np.uint8)


@ray.remote
def total(array):
    return int(array.sum()), ray.get_runtime_context().get_node_id()


def test_the_sum_of_both(two_nodes):
    cluster, second = two_nodes
    cluster.wait_for_nodes()
    assert ray.cluster_resources()["CPU"] == 4 and ray.cluster_resources()["second"] == 2
    assert {node["NodeID"] for node in ray.nodes()} == {cluster.head_node.node_id, second.node_id}
    assert len({node.port for node in cluster.list_all_nodes()}) == 2
    assert cluster.remaining_processes_alive()


def test_resources_decide_where_work_runs(two_nodes):
    _, second = two_nodes
    assert ray.get(where.options(resources={"second": 1}).remote(), timeout=30) == second.node_id


def test_labels_and_affinity(two_nodes):
    cluster, second = two_nodes
    label = NodeLabelSchedulingStrategy(hard={"zone": In("b")})
    assert ray.get(where.options(scheduling_strategy=label).remote(), timeout=30) == second.node_id
    selected = where.options(label_selector={"zone": "b"})
    assert ray.get(selected.remote(), timeout=30) == second.node_id
    for node in (cluster.head_node, second):
        strategy = NodeAffinitySchedulingStrategy(node.node_id, soft=False)
        assert ray.get(where.options(scheduling_strategy=strategy).remote(), timeout=30) == node.node_id


def test_spread_uses_both(two_nodes):
    found = set(ray.get([where.options(scheduling_strategy="SPREAD").remote() for _ in range(8)], timeout=60))
    assert len(found) == 2


def test_work_spills_over_when_a_node_is_full(two_nodes):
    @ray.remote(num_cpus=2)
    def meet(path):

        node = ray.get_runtime_context().get_node_id()
        open(os.path.join(path, node), "w").close()
        deadline = time.monotonic() + 30
        while len(os.listdir(path)) < 2 and time.monotonic() < deadline:
            time.sleep(0.01)
        return node

    import tempfile

    with tempfile.TemporaryDirectory() as path:
        assert len(set(ray.get([meet.remote(path) for _ in range(2)], timeout=60))) == 2


def test_objects_cross_in_both_directions(two_nodes):
    cluster, second = two_nodes
    far = make.options(resources={"second": 1}).remote(20_000_000, 1)
    assert int(ray.get(far, timeout=60).sum()) == 20_000_000
    here = ray.put(np.full(20_000_000, 1, dtype=np.uint8))
    result = ray.get(total.options(resources={"second": 1}).remote(here), timeout=60)
    assert result == (20_000_000, second.node_id)
    local = NodeAffinitySchedulingStrategy(cluster.head_node.node_id, soft=False)
    assert ray.get(total.options(scheduling_strategy=local).remote(far), timeout=60)[0] == 20_000_000


def test_actors_on_both_and_calls_between_them(two_nodes):
    @ray.remote(num_cpus=0)
    class Node:
        def __init__(self, peer=None):
            self.peer = peer

        def where(self):
            return ray.get_runtime_context().get_node_id()

        def of_peer(self):
            return ray.get(self.peer.where.remote())

    _, second = two_nodes
    far = Node.options(resources={"second": 1}).remote()
    near = Node.remote(far)
    assert ray.get(near.of_peer.remote(), timeout=30) == second.node_id
    back = Node.options(resources={"second": 1}).remote(near)
    assert ray.get([back.of_peer.remote(), near.where.remote()], timeout=30)[0] == ray.get(near.where.remote())


def test_generators_cross(two_nodes):
    @ray.remote(resources={"second": 1})
    def items():
        for i in range(10):
            yield np.full(200_000, i, dtype=np.uint8)

    assert [int(ray.get(r, timeout=30)[0]) for r in items.remote()] == list(range(10))


def test_groups_over_both_nodes(two_nodes):
    spread = placement_group([{"CPU": 1}, {"CPU": 1}], strategy="STRICT_SPREAD")
    assert spread.wait(timeout_seconds=30)
    assert len(set(placement_group_table(spread)["bundles_to_node_id"].values())) == 2
    remove_placement_group(spread)
    wait_for_condition(lambda: ray.available_resources().get("CPU") == 4)
    packed = placement_group([{"CPU": 1}, {"CPU": 1}], strategy="STRICT_PACK")
    assert packed.wait(timeout_seconds=30)
    assert len(set(placement_group_table(packed)["bundles_to_node_id"].values())) == 1
    remove_placement_group(packed)


def test_a_second_driver(two_nodes):
    cluster, _ = two_nodes
    output = run_program(
        """
import ray, sys
ray.init(address=sys.argv[1], log_to_driver=False)
print(len(ray.nodes()), ray.get(ray.remote(lambda: 5).remote(), timeout=30))
""",
        cluster.address,
    ).stdout
    assert "2 5" in output


def test_a_wrong_token_is_refused(two_nodes):
    cluster, _ = two_nodes
    result = run_program(
        """
import ray, sys
try:
    ray.init(address=sys.argv[1])
except ray.exceptions.AuthenticationError as error:
    print("refused", error)
""",
        cluster.address,
        environment={"RAY_AUTH_TOKEN": "f" * 64},
    )
    assert "refused" in result.stdout
