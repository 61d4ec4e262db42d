"""The same calls on Python's own pools: `multiprocessing.Pool` and `concurrent.futures.ProcessPoolExecutor`."""

from __future__ import annotations

import concurrent.futures
import multiprocessing
import time
from collections.abc import Callable
from typing import Any

from benchmarks.floors import _rate


def nothing(*_: Any) -> bytes:
    """What every benchmark calls."""
    return b"ok"


def _measure(call: Callable[[], Any], batch: Callable[[int], Any], seconds: float) -> dict[str, float]:
    return {
        "task, one at a time": _rate(call, seconds),
        "tasks, 1000 at once": 1000 * _rate(lambda: batch(1000), seconds),
    }


def measure(seconds: float, processes: int) -> dict[str, dict[str, float]]:
    """{pool: {benchmark: rate a second}}."""
    context = multiprocessing.get_context("forkserver")
    result = {}
    started = time.perf_counter()
    with context.Pool(processes) as pool:
        pool.apply(nothing)
        first = time.perf_counter() - started
        result["multiprocessing.Pool"] = _measure(
            lambda: pool.apply(nothing),
            lambda n: [r.get() for r in [pool.apply_async(nothing) for _ in range(n)]],
            seconds,
        )
        result["multiprocessing.Pool"]["start and first task, seconds"] = first
    started = time.perf_counter()
    with concurrent.futures.ProcessPoolExecutor(processes, mp_context=context) as executor:
        executor.submit(nothing).result()
        first = time.perf_counter() - started
        result["ProcessPoolExecutor"] = _measure(
            lambda: executor.submit(nothing).result(),
            lambda n: [f.result() for f in [executor.submit(nothing) for _ in range(n)]],
            seconds,
        )
        result["ProcessPoolExecutor"]["start and first task, seconds"] = first
    return result
