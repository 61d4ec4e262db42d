"""Placement groups: creation, capture, removal, names, and scheduling strategies on one node."""

import pytest
from conftest import wait_for_condition

import ray
from ray.util.placement_group import (
    get_current_placement_group,
    get_placement_group,
    placement_group,
    placement_group_table,
    remove_placement_group,
)
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy, PlacementGroupSchedulingStrategy

pytestmark = pytest.mark.usefixtures("ray_module")


@pytest.fixture
def group():
    """A group of two bundles, removed afterwards."""
    made = placement_group([{"CPU": 1}, {"CPU": 2}])
    yield made
    remove_placement_group(made)
    wait_for_condition(lambda: ray.available_resources().get("CPU") == 4)


@ray.remote
def current():
    found = get_current_placement_group()
    return None if found is None else found.id.hex()


def inside(group, index=-1, capture=False):
    return PlacementGroupSchedulingStrategy(
        placement_group=group, placement_group_bundle_index=index, placement_group_capture_child_tasks=capture
    )


def test_ready_and_wait(group):
    assert group.wait(timeout_seconds=20)
    ray.get(group.ready(), timeout=20)
    assert group.bundle_count == 2 and group.bundle_specs == [{"CPU": 1}, {"CPU": 2}]


def test_it_reserves(group):
    ray.get(group.ready(), timeout=20)
    wait_for_condition(lambda: ray.available_resources().get("CPU") == 1)


def test_tasks_and_actors_inside(group):
    ray.get(group.ready(), timeout=20)
    assert ray.get(current.options(scheduling_strategy=inside(group)).remote(), timeout=20) == group.id.hex()
    assert ray.get(current.remote(), timeout=20) is None

    @ray.remote(num_cpus=2)
    class Inside:
        def where(self):
            return get_current_placement_group().id.hex()

    actor = Inside.options(scheduling_strategy=inside(group, 1)).remote()
    assert ray.get(actor.where.remote(), timeout=20) == group.id.hex()


def test_capture_of_child_tasks(group):
    ray.get(group.ready(), timeout=20)

    @ray.remote
    def parent():
        return ray.get(current.remote())

    assert (
        ray.get(parent.options(scheduling_strategy=inside(group, capture=True)).remote(), timeout=30) == group.id.hex()
    )
    assert ray.get(parent.options(scheduling_strategy=inside(group)).remote(), timeout=30) is None


def test_what_does_not_fit_a_bundle(group):
    ray.get(group.ready(), timeout=20)
    with pytest.raises(ValueError):
        current.options(num_cpus=3, scheduling_strategy=inside(group)).remote()
    with pytest.raises(ValueError):
        current.options(scheduling_strategy=inside(group, 5)).remote()


def test_names():
    made = placement_group([{"CPU": 1}], name="by name")
    ray.get(made.ready(), timeout=20)
    assert get_placement_group("by name").id == made.id
    table = placement_group_table(made)
    assert table["state"] == "CREATED" and table["name"] == "by name" and table["strategy"] == "PACK"
    remove_placement_group(made)
    wait_for_condition(lambda: placement_group_table(made)["state"] == "REMOVED")
    with pytest.raises(ValueError):
        get_placement_group("by name")


def test_an_infeasible_group_waits_and_says_why():
    made = placement_group([{"CPU": 100}])
    assert not made.wait(timeout_seconds=0.3)
    table = placement_group_table(made)
    assert table["state"] == "PENDING"
    remove_placement_group(made)


def test_removal_ends_what_runs_inside():
    made = placement_group([{"CPU": 1}])
    ray.get(made.ready(), timeout=20)

    @ray.remote(num_cpus=1)
    class Inside:
        def ping(self):
            return 1

    actor = Inside.options(scheduling_strategy=inside(made)).remote()
    assert ray.get(actor.ping.remote(), timeout=20) == 1
    remove_placement_group(made)

    def is_dead():
        try:
            ray.get(actor.ping.remote(), timeout=10)
        except (ray.exceptions.RayActorError, ray.exceptions.ActorPlacementGroupRemoved):
            return True
        return False

    wait_for_condition(is_dead)


def test_pending_groups_are_created_when_room_appears(group):
    ray.get(group.ready(), timeout=20)
    second = placement_group([{"CPU": 2}])
    assert not second.wait(timeout_seconds=0.3)
    remove_placement_group(group)
    assert second.wait(timeout_seconds=20)
    remove_placement_group(second)


@pytest.mark.parametrize("bundles", [[], [{}], [{"CPU": -1}], [{"CPU": "x"}], "CPU", [1], [{"CPU": 0}]], ids=str)
def test_bundles_that_cannot_be(bundles):
    with pytest.raises((ValueError, TypeError)):
        placement_group(bundles)


def test_strategies_that_cannot_be():
    with pytest.raises(ValueError):
        placement_group([{"CPU": 1}], strategy="ANYHOW")
    with pytest.raises(ValueError):
        placement_group([{"CPU": 1}], lifetime="forever")


@pytest.mark.parametrize("strategy", ["PACK", "SPREAD", "STRICT_PACK"])
def test_strategies_on_one_node(strategy):
    made = placement_group([{"CPU": 1}, {"CPU": 1}], strategy=strategy)
    assert made.wait(timeout_seconds=20)
    remove_placement_group(made)


def test_strict_spread_needs_more_nodes():
    made = placement_group([{"CPU": 1}, {"CPU": 1}], strategy="STRICT_SPREAD")
    assert not made.wait(timeout_seconds=0.3)
    remove_placement_group(made)


def test_many_groups_at_once():
    groups = [placement_group([{"CPU": 0.01}]) for _ in range(40)]
    assert all(made.wait(timeout_seconds=30) for made in groups)
    for made in groups:
        remove_placement_group(made)
    wait_for_condition(lambda: ray.available_resources().get("CPU") == 4)


def test_node_affinity():
    here = ray.get_runtime_context().get_node_id()

    @ray.remote
    def where():
        return ray.get_runtime_context().get_node_id()

    strategy = NodeAffinitySchedulingStrategy(node_id=here, soft=False)
    assert ray.get(where.options(scheduling_strategy=strategy).remote(), timeout=20) == here
    nowhere = NodeAffinitySchedulingStrategy(node_id="00" * 28, soft=False)
    with pytest.raises(ray.exceptions.TaskUnschedulableError):
        ray.get(where.options(scheduling_strategy=nowhere).remote(), timeout=20)
    soft = NodeAffinitySchedulingStrategy(node_id="00" * 28, soft=True)
    assert ray.get(where.options(scheduling_strategy=soft).remote(), timeout=20) == here
    for strategy in ("DEFAULT", "SPREAD"):
        assert ray.get(where.options(scheduling_strategy=strategy).remote(), timeout=20) == here
