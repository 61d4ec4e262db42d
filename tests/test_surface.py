"""Names of the interface: what is not built says so, and what asks for little is there."""

import importlib

import numpy as np
import pytest

import ray
from ray import experimental


@pytest.mark.parametrize(
    "module",
    [
        "ray.autoscaler.sdk",
        "ray.experimental.channel",
        "ray.experimental.collective",
        "ray.job_submission",
        "ray.util.collective",
        "ray.util.dask",
        "ray.util.spark",
        "ray.util.tpu",
    ],
)
def test_modules_that_are_not_built_say_so(module):
    for kind in (NotImplementedError, ImportError):
        with pytest.raises(kind, match=f"{module}: .* not built yet"):
            importlib.import_module(module)
    parent, _, name = module.rpartition(".")
    assert not hasattr(importlib.import_module(parent), name)


def test_functions_that_are_not_built_say_so():
    with pytest.raises(NotImplementedError, match=r"ray\.experimental\.register_nixl_memory\(\): "):
        experimental.register_nixl_memory(None)
    with pytest.raises(NotImplementedError, match=r"ray\.experimental\.RDTManager: "):
        experimental.RDTManager()
    with pytest.raises(NotImplementedError, match="cannot be changed"):
        experimental.set_resource("a", 1)
    with pytest.raises(NotImplementedError, match="debugger"):
        ray.util.rpdb.set_trace()
    with pytest.raises(NotImplementedError, match="Ray Client"):
        ray.util.client.ray.connect("localhost")
    assert not ray.util.client.ray.is_connected() and ray.util.client.num_connected_contexts() == 0


def test_names_of_accelerators():
    from ray.util.accelerators import NVIDIA_TESLA_V100

    @ray.remote(accelerator_type=NVIDIA_TESLA_V100)
    def f():
        pass

    assert f._options["accelerator_type"] == "V100"


@pytest.mark.usefixtures("ray_module")
def test_where_objects_are():
    @ray.remote
    def large():
        return np.zeros(1_000_000)

    @ray.remote
    def waits(reference):
        ray.get(reference)

    here = ray.get_runtime_context().get_node_id()
    small, big = ray.put(1), large.remote()
    found = experimental.get_object_locations([small, big], timeout_ms=20_000)
    assert found[big]["node_ids"] == [here] and found[big]["object_size"] > 8_000_000
    assert found[small]["object_size"] > 0
    assert experimental.get_local_object_locations([big])[big] == found[big]
    blocked = waits.options(resources={"nowhere": 1}).remote([small])
    assert experimental.get_object_locations([blocked])[blocked] == {"node_ids": [], "object_size": None}
    assert experimental.get_local_object_locations([blocked]) == {}
    ray.cancel(blocked)
    with pytest.raises(TypeError, match="list"):
        experimental.get_object_locations(big)
