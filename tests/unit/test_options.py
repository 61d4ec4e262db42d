"""Options of tasks, actors and methods, and what is scheduled by them."""

import pytest

import ray
from ray._private import options, scheduling
from ray.util.placement_group import PlacementGroup
from ray.util.scheduling_strategies import (
    DoesNotExist,
    Exists,
    In,
    NodeAffinitySchedulingStrategy,
    NodeLabelSchedulingStrategy,
    NotIn,
    PlacementGroupSchedulingStrategy,
)


@pytest.fixture
def function():
    return ray.remote(lambda x: x)


@pytest.fixture
def actor():
    class Plain:
        def m(self, x):
            return x

        @ray.method(num_returns=2)
        def two(self):
            return 1, 2

    return ray.remote(Plain)


@pytest.mark.parametrize(
    ("given", "error", "text"),
    [
        ({"foo": 1}, ValueError, "Invalid option keyword foo for remote functions. Valid ones are .*num_cpus"),
        ({"max_restarts": 1}, ValueError, "Invalid option keyword max_restarts"),
        ({"num_cpus": -1}, ValueError, "num_cpus cannot be negative.*-1"),
        ({"num_cpus": float("nan")}, ValueError, "num_cpus"),
        ({"num_cpus": "x"}, TypeError, "'num_cpus' must be .*'x'"),
        ({"num_cpus": True}, TypeError, "num_cpus"),
        ({"num_cpus": 0.00001}, ValueError, "precision"),
        ({"num_gpus": 1.5}, ValueError, "whole numbers.*1.5"),
        ({"num_returns": -1}, ValueError, "num_returns.*-1"),
        ({"num_returns": "foo"}, ValueError, "num_returns.*foo"),
        ({"max_retries": -2}, ValueError, "max_retries.*-2"),
        ({"max_retries": 1.5}, TypeError, "max_retries"),
        ({"max_calls": -1}, ValueError, "max_calls"),
        ({"resources": {"CPU": 1}}, ValueError, "num_cpus"),
        ({"resources": {"x": -1}}, ValueError, "resource x cannot be negative"),
        ({"resources": {"x": "y"}}, ValueError, "'y'"),
        ({"resources": {3: 1}}, ValueError, "3"),
        ({"resources": [1]}, TypeError, "resources"),
        ({"scheduling_strategy": 3}, TypeError, "scheduling_strategy"),
        ({"placement_group": 3}, TypeError, "placement_group"),
        ({"retry_exceptions": 3}, TypeError, "retry_exceptions"),
        ({"retry_exceptions": [3]}, ValueError, "list of exceptions"),
        ({"runtime_env": 3}, TypeError, "runtime_env"),
        ({"label_selector": {"a b": "x"}}, ValueError, "a b"),
        ({"label_selector": {"a": "in(x,y"}}, ValueError, "in\\(x,y"),
        ({"label_selector": {"a": 3}}, ValueError, "3"),
        ({"object_store_memory": 3}, ValueError, "not implemented for tasks"),
        ({"enable_task_events": 3}, TypeError, "enable_task_events"),
        ({"_generator_backpressure_num_objects": 0}, ValueError, "not allowed"),
        ({"fallback_strategy": [{"label_selector": {}}]}, NotImplementedError, "fallback_strategy"),
        ({"_labels": {"a": "b"}}, NotImplementedError, "_labels"),
        ({"_num_objects_per_yield": 2}, NotImplementedError, "_num_objects_per_yield"),
    ],
)
def test_bad_options_of_tasks(function, given, error, text):
    with pytest.raises(error, match=text):
        function.options(**given)
    with pytest.raises(error, match=text):
        ray.remote(**given)(lambda: 1)


@pytest.mark.parametrize(
    "given",
    [
        {"num_cpus": 0},
        {"num_cpus": 0.5, "num_gpus": 0.25, "memory": 100},
        {"num_returns": "dynamic"},
        {"num_returns": 0},
        {"max_retries": -1, "retry_exceptions": [ValueError]},
        {"label_selector": {"ray.io/zone": "!in(a,b)", "c": ""}},
        {"scheduling_strategy": "SPREAD"},
        {"fallback_strategy": []},
    ],
)
def test_good_options_of_tasks(function, given):
    assert function.options(**given)._options.items() >= given.items()


@pytest.mark.parametrize(
    ("given", "error", "text"),
    [
        ({"num_returns": 2}, ValueError, "for actors"),
        ({"max_restarts": -2}, ValueError, "max_restarts"),
        ({"max_restarts": 1.0}, TypeError, "max_restarts"),
        ({"max_task_retries": -2}, ValueError, "max_task_retries"),
        ({"max_concurrency": -1}, ValueError, "0 or a positive integer"),
        ({"name": ""}, ValueError, "empty string"),
        ({"name": 3}, TypeError, "name"),
        ({"namespace": 3}, TypeError, "namespace"),
        ({"namespace": ""}, ValueError, "not a valid namespace"),
        ({"lifetime": "foo"}, ValueError, "detached"),
        ({"get_if_exists": True}, ValueError, "name must be specified"),
        ({"max_pending_calls": -2}, ValueError, "max_pending_calls"),
        ({"concurrency_groups": {"a": 1}}, ValueError, "not supported in '.options\\(\\)'"),
        ({"enable_tensor_transport": True}, NotImplementedError, "enable_tensor_transport"),
    ],
)
def test_bad_options_of_actors(actor, given, error, text):
    with pytest.raises(error, match=text):
        actor.options(**given)


def test_concurrency_groups_need_limits():
    with pytest.raises(ValueError, match="positive integers"):
        ray.remote(concurrency_groups={"io": 0})(type("A", (), {}))
    assert options.normalized_concurrency_groups([{"name": "io", "max_concurrency": 2}]) == {"io": 2}


def test_get_if_exists_with_the_name_given_before(actor):
    assert actor.options(name="a").options(get_if_exists=True)._options["name"] == "a"


def test_options_do_not_change_the_original(function):
    function.options(num_cpus=3)
    assert function._options == {}


def test_direct_calls_are_refused(function, actor):
    with pytest.raises(TypeError, match=r"\.remote\(\)"):
        function(1)
    with pytest.raises(TypeError, match=r"use 'Plain\.remote\(\)'"):
        actor()


def test_inheritance_from_an_actor_class_is_refused(actor):
    with pytest.raises(ray.actor.ActorClassInheritanceException, match="subclass 'Derived' of actor class 'Plain'"):

        class Derived(actor):
            pass


def test_attributes_of_the_class_are_seen(actor):
    assert callable(actor.m)
    with pytest.raises(AttributeError, match="nothing"):
        _ = actor.nothing


@pytest.mark.parametrize("given", [(1,), (1, 2), ()])
def test_remote_without_a_function(given):
    with pytest.raises(AssertionError, match="@ray.remote decorator must be applied"):
        ray.remote(*given)


def test_remote_of_what_is_neither(function, actor):
    for target in (function, actor):
        with pytest.raises(TypeError, match="either a function or a class"):
            ray.remote(target)


def test_coroutine_functions_are_no_tasks():
    async def coroutine():
        return 1

    with pytest.raises(ValueError, match="async def"):
        ray.remote(coroutine)


def test_method_decorator():
    with pytest.raises(AssertionError, match="Unexpected keyword argument to @ray.method: 'foo'"):
        ray.method(foo=1)
    with pytest.raises(AssertionError, match="no arguments or at least one"):
        ray.method(3)
    with pytest.raises(NotImplementedError, match="tensor_transport"):
        ray.method(tensor_transport="nccl")


# --- resources ---


def test_resources_of_tasks():
    assert scheduling.task_resources({}) == {"CPU": 1.0}
    assert scheduling.task_resources({"num_cpus": 0}) == {}
    assert scheduling.task_resources({"num_gpus": 2, "memory": 10, "resources": {"x": 1}}) == {
        "CPU": 1.0,
        "GPU": 2.0,
        "memory": 10.0,
        "x": 1.0,
    }
    assert scheduling.task_resources({"accelerator_type": "A100"})["accelerator_type:A100"] == 0.001


def test_resources_of_actors():
    # Without any it needs a CPU to be placed and none to run.
    assert scheduling.actor_resources({}) == ({}, {"CPU": 1.0})
    assert scheduling.actor_resources({"num_cpus": 0}) == ({}, {})
    assert scheduling.actor_resources({"num_cpus": 2}) == ({"CPU": 2.0}, {"CPU": 2.0})
    assert scheduling.actor_resources({"num_gpus": 1}) == ({"GPU": 1.0}, {"GPU": 1.0})


# --- strategies ---


def resolve(given, captured=None):
    return scheduling.resolve_strategy(given, scheduling.task_resources(given), captured, "f")


def test_strategies():
    assert resolve({})["kind"] == "DEFAULT"
    assert resolve({"scheduling_strategy": "SPREAD"})["kind"] == "SPREAD"
    with pytest.raises(ValueError, match="Invalid scheduling_strategy value FOO"):
        resolve({"scheduling_strategy": "FOO"})
    affinity = resolve({"scheduling_strategy": NodeAffinitySchedulingStrategy("ab" * 28, soft=True)})
    assert affinity["node_id"] == b"\xab" * 28
    assert affinity["soft"] is True
    labels = NodeLabelSchedulingStrategy(
        {"a": In("x", "y"), "b": NotIn("z")}, soft={"c": Exists(), "d": DoesNotExist()}
    )
    resolved = resolve({"scheduling_strategy": labels})
    assert resolved["hard"] == [("a", "in", ["x", "y"]), ("b", "not_in", ["z"])]
    assert resolved["soft_labels"] == [("c", "exists", []), ("d", "does_not_exist", [])]
    selected = resolve({"label_selector": {"zone": "!in(a, b)", "disk": "ssd"}})
    assert selected == {"kind": "NODE_LABEL", "hard": [("zone", "not_in", ["a", "b"]), ("disk", "in", ["ssd"])]}


def test_placement_groups():
    group = PlacementGroup(ray.PlacementGroupID.from_random(), [{"CPU": 1.0}, {"GPU": 1.0}])
    resolved = resolve({"scheduling_strategy": PlacementGroupSchedulingStrategy(group, 0)})
    assert resolved["kind"] == "PLACEMENT_GROUP"
    assert resolved["placement_group_id"] == group.id.binary()
    assert resolved["bundle_index"] == 0
    assert resolved["capture_child_tasks"] is False
    assert resolve({"placement_group": group})["placement_group_id"] == group.id.binary()
    with pytest.raises(ValueError, match="bundle index 5 is invalid"):
        resolve({"scheduling_strategy": PlacementGroupSchedulingStrategy(group, 5)})
    with pytest.raises(ValueError, match="cannot fit into any bundles"):
        resolve({"scheduling_strategy": PlacementGroupSchedulingStrategy(group), "num_cpus": 3})
    with pytest.raises(ValueError, match="bundle index must be -1"):
        resolve({"placement_group_bundle_index": 2})
    with pytest.raises(ValueError, match="scheduling_strategy option"):
        resolve({"placement_group": group, "scheduling_strategy": "SPREAD"})


def test_children_are_captured_unless_they_say_otherwise():
    parent = ray.PlacementGroupID.from_random()
    assert resolve({}, parent.hex())["placement_group_id"] == parent.binary()
    assert resolve({}, parent.hex())["capture_child_tasks"] is True
    assert resolve({"placement_group": None}, parent.hex())["kind"] == "DEFAULT"
    assert resolve({"scheduling_strategy": "DEFAULT"}, parent.hex())["kind"] == "DEFAULT"
    assert resolve({"scheduling_strategy": PlacementGroupSchedulingStrategy(None)}, parent.hex())["kind"] == "DEFAULT"


def test_bad_strategies():
    with pytest.raises(ValueError, match="Invalid node_id 'aa'"):
        NodeAffinitySchedulingStrategy("aa", False)
    with pytest.raises(ValueError, match="_spill_on_unavailable"):
        NodeAffinitySchedulingStrategy("aa" * 28, False, _spill_on_unavailable=True)
    with pytest.raises(ValueError, match="_fail_on_unavailable"):
        NodeAffinitySchedulingStrategy("aa" * 28, True, _fail_on_unavailable=True)
    with pytest.raises(ValueError, match="cannot both be empty"):
        NodeLabelSchedulingStrategy({})
    with pytest.raises(ValueError, match="must be of type str"):
        NodeLabelSchedulingStrategy({3: In("a")})
    with pytest.raises(ValueError, match="must be one of the `In`"):
        NodeLabelSchedulingStrategy({"a": 3})
    with pytest.raises(ValueError, match="non-empty tuple"):
        In()
    with pytest.raises(TypeError, match="placement_group"):
        PlacementGroupSchedulingStrategy(3)
