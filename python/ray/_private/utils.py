"""Small things that several modules need."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from typing import Any


def function_display_name(function: Callable[..., Any] | type) -> str:
    """`module.qualname`, as names are shown and kept."""
    module = getattr(function, "__module__", None) or "__main__"
    qualname = getattr(function, "__qualname__", None) or getattr(function, "__name__", None) or repr(function)
    return f"{module}.{qualname}"


def get_node_ip_address(address: str = "8.8.8.8:53") -> str:
    """The address by which this machine reaches `address`; loopback where it has no network.

    Nothing is sent: the socket is only asked which way it would go.
    """
    import socket

    host, _, port = address.rpartition(":")
    try:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            probe.connect((host or address, int(port or 53)))
            return probe.getsockname()[0]
    except (OSError, ValueError):
        return "127.0.0.1"


def is_interactive() -> bool:
    """Whether this process is a shell or notebook rather than a script."""
    return hasattr(sys, "ps1") or bool(getattr(sys.flags, "interactive", 0)) or "ipykernel" in sys.modules


def get_system_memory() -> int:
    """Bytes of memory that this process may use: the machine's, or its control group's limit."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for path in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        try:
            with open(path) as file:
                text = file.read().strip()
        except OSError:
            continue
        if text.isdigit():
            total = min(total, int(text))
    return total


def get_num_cpus() -> int:
    """CPUs that this process may use: affinity, and the control group's share rounded up."""
    count = len(os.sched_getaffinity(0))
    try:
        with open("/sys/fs/cgroup/cpu.max") as file:
            quota, period = file.read().split()
        if quota != "max":
            count = min(count, max(1, -(-int(quota) // int(period))))
    except (OSError, ValueError):
        pass
    return max(1, count)
