"""What a node has: detects CPUs, memory and GPUs, and checks what the user says instead."""

from __future__ import annotations

import json
import logging
import math
import os
import re
from numbers import Real
from typing import Any

from ray._private.utils import get_num_cpus

logger = logging.getLogger("ray")

OBJECT_STORE_MINIMUM_BYTES = 75 * 1024 * 1024
OBJECT_STORE_MAXIMUM_BYTES = 200 * 10**9
OBJECT_STORE_PROPORTION = float(os.environ.get("RAY_DEFAULT_OBJECT_STORE_MEMORY_PROPORTION", 0.3))
HEAD_RESOURCE = "node:__internal_head__"
NODE_PREFIX = "node:"
OVERRIDE_RESOURCES = "RAY_OVERRIDE_RESOURCES"
_OPTIONS_OF_RESOURCES = {
    "CPU": "num_cpus",
    "GPU": "num_gpus",
    "memory": "memory",
    "object_store_memory": "object_store_memory",
}
_NVIDIA_DIRECTORY = "/proc/driver/nvidia/gpus"
_LABEL_VALUE = re.compile(r"(?:[A-Za-z0-9](?:[A-Za-z0-9_.-]{0,61}[A-Za-z0-9])?)?")
_LABEL_NAME = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9_.-]{0,61}[A-Za-z0-9])?")
_LABEL_PREFIX = re.compile(r"[a-z0-9](?:[a-z0-9.-]{0,251}[a-z0-9])?")


def _read_number(path: str) -> int | None:
    try:
        with open(path) as file:
            text = file.read().strip()
    except OSError:
        return None
    return int(text) if text.isdigit() else None


def _group_directories() -> list[tuple[str, str]]:
    """(limit file, usage file) of every memory control group above this process, as far as they are visible."""
    files = []
    try:
        with open("/proc/self/cgroup") as file:
            lines = file.read().splitlines()
    except OSError:
        return []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            root, names = "/sys/fs/cgroup", ("memory.max", "memory.current")
        elif "memory" in controllers.split(","):
            root, names = "/sys/fs/cgroup/memory", ("memory.limit_in_bytes", "memory.usage_in_bytes")
        else:
            continue
        parts = [part for part in path.split("/") if part]
        for length in range(len(parts) + 1):
            directory = os.path.join(root, *parts[:length])
            files.append((os.path.join(directory, names[0]), os.path.join(directory, names[1])))
    return files


def available_memory_bytes() -> int:
    """Memory that new work can have: the machine's, or what this process's control groups leave."""
    available = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")
    try:
        with open("/proc/meminfo") as file:
            for line in file:
                if line.startswith("MemAvailable:"):
                    available = int(line.split()[1]) * 1024
                    break
    except OSError:
        pass
    for limit_file, usage_file in _group_directories():
        limit = _read_number(limit_file)
        if limit is not None:
            available = min(available, max(0, limit - (_read_number(usage_file) or 0)))
    return available


def shared_memory_bytes() -> int:
    """Room in /dev/shm; 0 where there is none."""
    try:
        status = os.statvfs("/dev/shm")
    except OSError:
        return 0
    return status.f_bavail * status.f_frsize


def default_object_store_bytes(available: int) -> int:
    """30 % of the available memory, at most what /dev/shm holds, at most 200 GB, at least 75 MiB."""
    wanted = int(available * OBJECT_STORE_PROPORTION)
    shared = int(shared_memory_bytes() * 0.95)
    if shared >= OBJECT_STORE_MINIMUM_BYTES:
        wanted = min(wanted, shared)
    else:
        # A tiny /dev/shm: the store lies on disk, and is kept small for that reason.
        wanted = min(wanted, OBJECT_STORE_MINIMUM_BYTES)
    return max(OBJECT_STORE_MINIMUM_BYTES, min(wanted, OBJECT_STORE_MAXIMUM_BYTES))


def visible_gpus() -> list[str] | None:
    """The ids in ``CUDA_VISIBLE_DEVICES``, or None where it is not set."""
    text = os.environ.get("CUDA_VISIBLE_DEVICES")
    if text is None:
        return None
    if text in ("", "NoDevFiles", "-1"):
        return []
    return [part.strip() for part in text.split(",") if part.strip()]


def detect_gpus() -> tuple[int, str | None]:
    """(how many GPUs, their type such as "H100" or None)."""
    try:
        devices = sorted(os.listdir(_NVIDIA_DIRECTORY))
    except OSError:
        devices = []
    visible = visible_gpus()
    count = len(devices) if visible is None else min(len(visible), len(devices))
    if not count:
        return 0, None
    try:
        with open(os.path.join(_NVIDIA_DIRECTORY, devices[0], "information")) as file:
            match = re.search(r"^Model:\s*(.+)$", file.read(), re.MULTILINE)
    except OSError:
        match = None
    return count, accelerator_type(match.group(1)) if match else None


def accelerator_type(model: str) -> str | None:
    """The short name of an NVIDIA model.

    Example:
        >>> accelerator_type("NVIDIA H100 80GB HBM3"), accelerator_type("Tesla V100-SXM2-16GB")
        ('H100', 'V100')
    """
    match = re.match(r"(?:NVIDIA|Tesla)\s+(?:Tesla\s+)?([A-Za-z0-9]+)", model.strip())
    return match.group(1) if match else None


def _number(name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"the amount of resource {name!r} must be a number, not {type(value).__name__} ({value!r})")
    number = float(value)
    if not math.isfinite(number):
        raise ValueError(f"the amount of resource {name!r} must be finite, not {value!r}")
    if number < 0:
        raise ValueError(f"Resource quantities must be nonnegative: {name!r} is {value!r}.")
    return number


def _whole(name: str, value: Any) -> float:
    number = _number(name, value)
    if number != int(number):
        raise ValueError(f"A node's amount of {name} must be a whole number, not {value!r}.")
    return number


def check_custom_resources(resources: Any) -> dict[str, float]:
    """The user's custom resources, checked.

    Raises:
        TypeError: not a dictionary of names and numbers.
        ValueError: a name that has an option of its own, or a negative or too fine amount.
    """
    if resources is None:
        return {}
    if not isinstance(resources, dict):
        raise TypeError(f"resources must be a dict, not {type(resources).__name__}")
    result = {}
    for name, value in resources.items():
        if not isinstance(name, str) or not name:
            raise TypeError(f"the name of a resource must be a non-empty str, not {name!r}")
        if name in _OPTIONS_OF_RESOURCES:
            raise ValueError(f"{name!r} cannot be a custom resource: use {_OPTIONS_OF_RESOURCES[name]} instead")
        result[name] = _number(name, value)
    return result


def check_labels(labels: Any) -> dict[str, str]:
    """The user's labels, checked by the rules for Kubernetes labels.

    Raises:
        TypeError: not a dictionary of strings.
        ValueError: a key or value with characters that labels cannot have, or with the reserved prefix ``ray.io/``.
    """
    if labels is None:
        return {}
    if not isinstance(labels, dict):
        raise TypeError(f"labels must be a dict, not {type(labels).__name__}")
    for key, value in labels.items():
        if not isinstance(key, str) or not isinstance(value, str):
            raise TypeError(f"a label's key and value must be str, not {key!r}: {value!r}")
        prefix, slash, name = key.rpartition("/")
        if slash and not _LABEL_PREFIX.fullmatch(prefix) or not _LABEL_NAME.fullmatch(name):
            raise ValueError(f"{key!r} cannot be the key of a label")
        if prefix == "ray.io" and name == "node-id":
            raise ValueError(f"the label {key!r} is set by the runtime")
        if not _LABEL_VALUE.fullmatch(value):
            raise ValueError(f"{value!r} cannot be the value of the label {key!r}")
    return dict(labels)


def _override() -> dict[str, Any]:
    text = os.environ.get(OVERRIDE_RESOURCES)
    if not text:
        return {}
    try:
        override = json.loads(text)
    except ValueError as error:
        raise ValueError(f"{OVERRIDE_RESOURCES} is not JSON: {error}") from None
    if not isinstance(override, dict):
        raise ValueError(f"{OVERRIDE_RESOURCES} must be a JSON object, not {text!r}")
    return override


def resolve(
    *,
    num_cpus: float | None = None,
    num_gpus: float | None = None,
    memory: float | None = None,
    object_store_memory: float | None = None,
    resources: dict[str, float] | None = None,
    labels: dict[str, str] | None = None,
    host: str = "127.0.0.1",
    is_head: bool = False,
) -> tuple[dict[str, float], dict[str, str], int]:
    """(resources, labels, bytes of the object store) of this node: what the user says, the rest detected.

    Raises:
        TypeError, ValueError: an amount or a label that cannot be, naming it.

    Example:
        >>> resources, labels, store = resolve(num_cpus=2, num_gpus=0, resources={"disk": 1})
        >>> resources["CPU"], resources["disk"]
        (2.0, 1.0)
    """
    custom = check_custom_resources(resources)
    override = _override()
    num_cpus = override.pop("CPU", num_cpus)
    num_gpus = override.pop("GPU", num_gpus)
    memory = override.pop("memory", memory)
    object_store_memory = override.pop("object_store_memory", object_store_memory)
    custom.update({name: _number(name, value) for name, value in override.items()})

    result: dict[str, float] = {}
    cpus = float(get_num_cpus()) if num_cpus is None else _whole("CPU", num_cpus)
    detected_gpus, gpu_type = detect_gpus()
    visible = visible_gpus()
    gpus = float(detected_gpus) if num_gpus is None else _whole("GPU", num_gpus)
    if num_gpus is not None and visible is not None and gpus > len(visible):
        raise ValueError(
            f"Attempting to start a node with {int(gpus)} GPUs, but CUDA_VISIBLE_DEVICES contains "
            f"{','.join(visible) or 'none'}."
        )
    available = None
    if object_store_memory is None:
        available = available_memory_bytes()
        store = default_object_store_bytes(available)
    else:
        store = int(_whole("object_store_memory", object_store_memory))
        if store < OBJECT_STORE_MINIMUM_BYTES:
            raise ValueError(
                f"Attempting to cap object store memory usage at {store} bytes, but the minimum allowed is "
                f"{OBJECT_STORE_MINIMUM_BYTES} bytes."
            )
    if memory is None:
        available = available_memory_bytes() if available is None else available
        memory_bytes = float(max(0, available - store))
    else:
        memory_bytes = _whole("memory", memory)
    if cpus:
        result["CPU"] = cpus
    if gpus:
        result["GPU"] = gpus
    if memory_bytes:
        result["memory"] = memory_bytes
    result["object_store_memory"] = float(store)
    result[f"{NODE_PREFIX}{host}"] = 1.0
    if is_head:
        result[HEAD_RESOURCE] = 1.0
    node_labels = check_labels(labels)
    if gpus and gpu_type:
        result[f"accelerator_type:{gpu_type}"] = 1.0
        node_labels.setdefault("ray.io/accelerator-type", gpu_type)
    result.update(custom)
    return result, node_labels, store
