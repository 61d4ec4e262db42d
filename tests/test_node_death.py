"""Nodes that come, go and die: what runs there is tried again, rebuilt or named as lost."""

import os
import time

import numpy as np
import pytest
from conftest import remember_nodes, wait_for_condition

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy


@ray.remote
def where():
    return ray.get_runtime_context().get_node_id()


@ray.remote
def make(n, value):
    return np.full(n, value, dtype=np.uint8)


def test_a_killed_node_is_noticed_and_its_tasks_run_elsewhere(cluster_factory, tmp_path):
    cluster = cluster_factory(num_cpus=1)
    ray.init(address=cluster.address, log_to_driver=False)
    second = cluster.add_node(num_cpus=1, resources={"spot": 1})
    third = cluster.add_node(num_cpus=1)
    remember_nodes()
    path = str(tmp_path / "runs")

    @ray.remote(num_cpus=1, max_retries=3)
    def work(path, first):
        node = ray.get_runtime_context().get_node_id()
        with open(path, "a") as file:
            file.write(node + "\n")
        while node == first:
            time.sleep(0.05)
        return node

    soft = NodeAffinitySchedulingStrategy(second.node_id, soft=True)
    reference = work.options(scheduling_strategy=soft).remote(path, second.node_id)
    wait_for_condition(lambda: os.path.exists(path) and second.node_id in open(path).read(), timeout=30)
    cluster.remove_node(second, allow_graceful=False)
    assert ray.get(reference, timeout=60) in (cluster.head_node.node_id, third.node_id)
    assert [n["Alive"] for n in ray.nodes() if n["NodeID"] == second.node_id] == [False]


def test_lost_objects_are_made_again(cluster_factory):
    cluster = cluster_factory(num_cpus=1)
    ray.init(address=cluster.address, log_to_driver=False)
    second = cluster.add_node(num_cpus=1, resources={"maker": 1})
    remember_nodes()
    first = make.options(resources={"maker": 1}, max_retries=2).remote(1_000_000, 1)
    doubled = ray.remote(lambda array: array * 2).options(resources={"maker": 1}, max_retries=2).remote(first)
    ray.wait([doubled], timeout=30, fetch_local=False)
    cluster.remove_node(second, allow_graceful=False)
    cluster.add_node(num_cpus=1, resources={"maker": 1})
    remember_nodes()
    assert int(ray.get(doubled, timeout=60).sum()) == 2_000_000


def test_a_lost_put_says_why(cluster_factory):
    cluster = cluster_factory(num_cpus=1)
    ray.init(address=cluster.address, log_to_driver=False)
    second = cluster.add_node(num_cpus=1, resources={"holder": 1})
    remember_nodes()

    @ray.remote(num_cpus=0, resources={"holder": 1})
    class Holder:
        def hold(self):
            self.reference = ray.put(np.zeros(1_000_000, dtype=np.uint8))
            return [self.reference]

    reference = ray.get(Holder.remote().hold.remote(), timeout=30)[0]
    cluster.remove_node(second, allow_graceful=False)
    with pytest.raises(ray.exceptions.ObjectLostError):
        ray.get(reference, timeout=60)


def test_actors_restart_on_another_node(cluster_factory):
    cluster = cluster_factory(num_cpus=1)
    ray.init(address=cluster.address, log_to_driver=False)
    second = cluster.add_node(num_cpus=1, resources={"home": 1})
    remember_nodes()

    @ray.remote(num_cpus=0, resources={"home": 1}, max_restarts=1, max_task_retries=3)
    class Mover:
        def where(self):
            return ray.get_runtime_context().get_node_id()

    mover = Mover.remote()
    assert ray.get(mover.where.remote(), timeout=30) == second.node_id
    third = cluster.add_node(num_cpus=1, resources={"home": 1})
    remember_nodes()
    cluster.remove_node(second, allow_graceful=False)
    assert ray.get(mover.where.remote(), timeout=60) == third.node_id


def test_waiting_work_starts_when_a_node_joins(cluster_factory):
    cluster = cluster_factory(num_cpus=1)
    ray.init(address=cluster.address, log_to_driver=False)
    remember_nodes()
    reference = where.options(resources={"late": 1}).remote()
    ready, _ = ray.wait([reference], timeout=0.5)
    assert not ready
    late = cluster.add_node(num_cpus=1, resources={"late": 1})
    remember_nodes()
    assert ray.get(reference, timeout=30) == late.node_id


def test_graceful_removal(cluster_factory):
    cluster = cluster_factory(num_cpus=1)
    second = cluster.add_node(num_cpus=1)
    ray.init(address=cluster.address, log_to_driver=False)
    remember_nodes()
    cluster.remove_node(second)
    wait_for_condition(lambda: ray.cluster_resources()["CPU"] == 1)
    with pytest.raises(ValueError):
        cluster.remove_node(second)


def test_arguments(cluster_factory):
    from ray.cluster_utils import AutoscalingCluster, Cluster

    with pytest.raises(NotImplementedError):
        AutoscalingCluster({}, {})
    with pytest.raises(ValueError):
        Cluster(initialize_head=False, connect=True)
    cluster = cluster_factory(num_cpus=1)
    with pytest.raises(NotImplementedError):
        cluster.add_node(nonsense=1)
