"""What this machine can do at best: the floors that the runtime's figures are read against.

A blocking and a polled round trip over pipes, a copy of memory, a fork: each as a rate a second, or bytes a second.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable


def _rate(step: Callable[[], None], seconds: float) -> float:
    """Steps a second: the median of five windows, after a warm-up."""
    for _ in range(3):
        step()
    rates = []
    for _ in range(5):
        count, started = 0, time.perf_counter()
        while (elapsed := time.perf_counter() - started) < seconds / 5:
            step()
            count += 1
        rates.append(count / elapsed)
    return sorted(rates)[2]


def _round_trip(seconds: float, polled: bool) -> float:
    to_child, to_parent = os.pipe(), os.pipe()
    if polled:
        for descriptor in (to_child[0], to_parent[0]):
            os.set_blocking(descriptor, False)

    def receive(descriptor: int) -> bytes:
        if not polled:
            return os.read(descriptor, 1)
        while True:
            try:
                return os.read(descriptor, 1)
            except BlockingIOError:
                pass

    child = os.fork()
    if child == 0:
        try:
            os.close(to_child[1])
            os.close(to_parent[0])
            if polled:
                # A polling child notices the end only by polling, so it looks at its parent from time to time.
                parent, spins = os.getppid(), 0
                while True:
                    try:
                        if not os.read(to_child[0], 1):
                            break
                        os.write(to_parent[1], b"x")
                    except BlockingIOError:
                        spins += 1
                        if spins % 100_000 == 0 and os.getppid() != parent:
                            break
            else:
                while os.read(to_child[0], 1):
                    os.write(to_parent[1], b"x")
        finally:
            os._exit(0)
    os.close(to_child[0])
    os.close(to_parent[1])

    def step() -> None:
        os.write(to_child[1], b"x")
        receive(to_parent[0])

    try:
        return _rate(step, seconds)
    finally:
        os.close(to_child[1])
        os.close(to_parent[0])
        os.waitpid(child, 0)


def pipe_blocking(seconds: float) -> float:
    """Round trips a second between two processes that sleep while they wait."""
    return _round_trip(seconds, polled=False)


def pipe_polled(seconds: float) -> float:
    """Round trips a second between two processes that poll; a number only where there are two cores."""
    if len(os.sched_getaffinity(0)) < 2:
        return 0.0
    return _round_trip(seconds, polled=True)


def memcpy_bytes(seconds: float) -> float:
    """Bytes a second of copying 256 MB that is warm."""
    source, target = bytearray(os.urandom(1 << 20) * 256), bytearray(256 << 20)

    def step() -> None:
        target[:] = source

    return _rate(step, seconds) * len(source)


def fork_and_exit(seconds: float) -> float:
    """Forks a second of this process, each ended and waited for."""

    def step() -> None:
        child = os.fork()
        if child == 0:
            os._exit(0)
        os.waitpid(child, 0)

    return _rate(step, seconds)


FLOORS: dict[str, tuple[Callable[[float], float], str]] = {
    "floor: pipe round trip, blocking": (pipe_blocking, "1/s"),
    "floor: pipe round trip, polled": (pipe_polled, "1/s"),
    "floor: memory copy": (memcpy_bytes, "B/s"),
    "floor: fork and exit": (fork_and_exit, "1/s"),
}
