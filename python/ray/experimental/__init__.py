"""Interfaces that may change."""

from __future__ import annotations

from typing import Any

from ray._private.unbuilt import unbuilt_class, unbuilt_function
from ray.experimental.locations import get_local_object_locations, get_object_locations

_DEVICES = "transfers of tensors between devices are not built yet"

CommunicatorMetadata = unbuilt_class("ray.experimental.CommunicatorMetadata", _DEVICES)
RDTManager = unbuilt_class("ray.experimental.RDTManager", _DEVICES)
TensorTransportManager = unbuilt_class("ray.experimental.TensorTransportManager", _DEVICES)
TensorTransportMetadata = unbuilt_class("ray.experimental.TensorTransportMetadata", _DEVICES)
deregister_nixl_memory = unbuilt_function("ray.experimental.deregister_nixl_memory", _DEVICES)
register_nixl_memory = unbuilt_function("ray.experimental.register_nixl_memory", _DEVICES)
register_nixl_memory_pool = unbuilt_function("ray.experimental.register_nixl_memory_pool", _DEVICES)
register_tensor_transport = unbuilt_function("ray.experimental.register_tensor_transport", _DEVICES)
set_nixl_cuda_stream = unbuilt_function("ray.experimental.set_nixl_cuda_stream", _DEVICES)
set_target_device_for_ref = unbuilt_function("ray.experimental.set_target_device_for_ref", _DEVICES)
set_target_for_ref = unbuilt_function("ray.experimental.set_target_for_ref", _DEVICES)
wait_tensor_freed = unbuilt_function("ray.experimental.wait_tensor_freed", _DEVICES)


def set_resource(resource_name: str, capacity: float, node_id: str | None = None) -> None:
    """Not possible: a node's resources are what it was started with."""
    raise NotImplementedError(
        "ray.experimental.set_resource(): resources of a running node cannot be changed; give them to `ray start "
        "--resources` or `ray.init(resources=...)`"
    )


def __getattr__(name: str) -> Any:
    import importlib

    if name in ("internal_kv", "tqdm_ray"):
        return importlib.import_module(f"ray.experimental.{name}")
    raise AttributeError(f"module 'ray.experimental' has no attribute {name!r}")


__all__ = [
    "CommunicatorMetadata",
    "RDTManager",
    "TensorTransportManager",
    "TensorTransportMetadata",
    "deregister_nixl_memory",
    "get_local_object_locations",
    "get_object_locations",
    "register_nixl_memory",
    "register_nixl_memory_pool",
    "register_tensor_transport",
    "set_nixl_cuda_stream",
    "set_resource",
    "set_target_device_for_ref",
    "set_target_for_ref",
    "wait_tensor_freed",
]
