"""The benchmarks themselves, written against the programming interface alone, so that any implementation can run them.

    PYTHON benchmarks/core.py --json FILE [--seconds 2] [--only REGEX]

This file imports nothing of the project: `python -m benchmarks --peer PYTHON` runs it with another interpreter.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import statistics
import time
from collections.abc import Callable
from typing import Any

_IMPORT_STARTED = time.perf_counter()
import ray  # noqa: E402

IMPORT_S = time.perf_counter() - _IMPORT_STARTED
# A benchmark sets up and returns (what to repeat, how many operations one repetition is).
Setup = Callable[[], tuple[Callable[[], Any], float]]
BENCHMARKS: dict[str, tuple[Setup, str]] = {}


def benchmark(name: str, unit: str = "1/s") -> Callable[[Setup], Setup]:
    """Registers a benchmark."""

    def register(setup: Setup) -> Setup:
        BENCHMARKS[name] = (setup, unit)
        return setup

    return register


@ray.remote
def nothing(*_: Any) -> bytes:
    """The smallest task."""
    return b"ok"


@ray.remote(num_cpus=0)
class Plain:
    """The smallest actor."""

    def nothing(self, *_: Any) -> bytes:
        """Returns at once."""
        return b"ok"

    def call(self, others: list[Any], count: int) -> None:
        """Calls other actors in turn, `count` times."""
        ray.get([others[i % len(others)].nothing.remote() for i in range(count)])

    def tasks(self, count: int) -> None:
        """Runs `count` tasks."""
        ray.get([nothing.remote() for _ in range(count)])


@ray.remote(num_cpus=0)
class Coroutines:
    """The smallest async actor."""

    async def nothing(self, *_: Any) -> bytes:
        """Returns at once."""
        return b"ok"


@benchmark("task, one at a time")
def _() -> tuple[Callable[[], Any], float]:
    return lambda: ray.get(nothing.remote()), 1


@benchmark("tasks, 1000 at once")
def _() -> tuple[Callable[[], Any], float]:
    return lambda: ray.get([nothing.remote() for _ in range(1000)]), 1000


@benchmark("tasks of two submitters")
def _() -> tuple[Callable[[], Any], float]:
    submitters = [Plain.remote() for _ in range(2)]
    return lambda: ray.get([submitter.tasks.remote(500) for submitter in submitters]), 1000


@benchmark("tasks in a chain")
def _() -> tuple[Callable[[], Any], float]:
    def chain() -> None:
        reference = nothing.remote()
        for _ in range(99):
            reference = nothing.remote(reference)
        ray.get(reference)

    return chain, 100


@benchmark("tasks with one stored argument of 1 MB")
def _() -> tuple[Callable[[], Any], float]:
    reference = ray.put(bytes(1_000_000))
    return lambda: ray.get([nothing.remote(reference) for _ in range(100)]), 100


@benchmark("tasks with an argument of 50 KB")
def _() -> tuple[Callable[[], Any], float]:
    argument = bytes(50_000)
    return lambda: ray.get([nothing.remote(argument) for _ in range(100)]), 100


@benchmark("tasks of functions never seen before")
def _() -> tuple[Callable[[], Any], float]:
    def fresh() -> None:
        @ray.remote
        def function(x: int) -> int:
            return x

        ray.get(function.remote(1))

    return fresh, 1


@benchmark("actor call, one at a time")
def _() -> tuple[Callable[[], Any], float]:
    actor = Plain.remote()
    return lambda: ray.get(actor.nothing.remote()), 1


@benchmark("actor calls, 1000 at once")
def _() -> tuple[Callable[[], Any], float]:
    actor = Plain.remote()
    return lambda: ray.get([actor.nothing.remote() for _ in range(1000)]), 1000


@benchmark("actor calls, two callers and two actors")
def _() -> tuple[Callable[[], Any], float]:
    servers = [Plain.remote() for _ in range(2)]
    callers = [Plain.remote() for _ in range(2)]
    return lambda: ray.get([caller.call.remote(servers, 500) for caller in callers]), 1000


@benchmark("async actor call, one at a time")
def _() -> tuple[Callable[[], Any], float]:
    actor = Coroutines.remote()
    return lambda: ray.get(actor.nothing.remote()), 1


@benchmark("async actor calls, 1000 at once")
def _() -> tuple[Callable[[], Any], float]:
    actor = Coroutines.remote()
    return lambda: ray.get([actor.nothing.remote() for _ in range(1000)]), 1000


@benchmark("actors made, called and killed")
def _() -> tuple[Callable[[], Any], float]:
    def make() -> None:
        actors = [Plain.remote() for _ in range(8)]
        ray.get([actor.nothing.remote() for actor in actors])
        for actor in actors:
            ray.kill(actor)

    return make, 8


@benchmark("items of a streaming generator")
def _() -> tuple[Callable[[], Any], float]:
    @ray.remote(num_returns="streaming")
    def items(count: int) -> Any:
        yield from range(count)

    return lambda: [ray.get(reference) for reference in items.remote(500)], 500


@benchmark("put of a small value")
def _() -> tuple[Callable[[], Any], float]:
    return lambda: ray.put(0), 1


@benchmark("put of 200 KB")
def _() -> tuple[Callable[[], Any], float]:
    value = bytearray(200_000)
    return lambda: ray.put(value), 1


@benchmark("put of 400 MB", unit="B/s")
def _() -> tuple[Callable[[], Any], float]:
    numpy = _numpy()
    value = numpy.ones(50_000_000, dtype=numpy.int64)
    return lambda: ray.put(value), value.nbytes


@benchmark("get of 200 KB")
def _() -> tuple[Callable[[], Any], float]:
    reference = ray.put(bytes(200_000))
    return lambda: ray.get(reference), 1


@benchmark("get of 1000 references")
def _() -> tuple[Callable[[], Any], float]:
    references = [ray.put(i) for i in range(1000)]
    return lambda: ray.get(references), 1


@benchmark("get of an object with 10000 references")
def _() -> tuple[Callable[[], Any], float]:
    reference = ray.put([ray.put(1) for _ in range(10_000)])
    return lambda: ray.get(reference), 1


@benchmark("wait for 1000 tasks one by one")
def _() -> tuple[Callable[[], Any], float]:
    def drain() -> None:
        left = [nothing.remote() for _ in range(1000)]
        while left:
            _, left = ray.wait(left)

    return drain, 1


@benchmark("placement groups made and removed")
def _() -> tuple[Callable[[], Any], float]:
    from ray.util.placement_group import placement_group, remove_placement_group

    def groups() -> None:
        made = [placement_group([{"CPU": 0.01}]) for _ in range(20)]
        for group in made:
            group.wait(timeout_seconds=30)
        for group in made:
            remove_placement_group(group)

    return groups, 20


def _numpy() -> Any:
    import numpy

    return numpy


def rate(step: Callable[[], Any], operations: float, seconds: float) -> float:
    """Operations a second: the median of five windows, after a warm-up."""
    for _ in range(2):
        step()
    rates = []
    for _ in range(5):
        count, started = 0, time.perf_counter()
        while (elapsed := time.perf_counter() - started) < seconds / 5:
            step()
            count += 1
        rates.append(count * operations / elapsed)
    return statistics.median(rates)


def percentile_99_ms(step: Callable[[], Any], seconds: float) -> float:
    """The time that 99 of 100 steps stay below, in milliseconds."""
    step()
    times: list[float] = []
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        started = time.perf_counter()
        step()
        times.append(time.perf_counter() - started)
    return sorted(times)[min(len(times) - 1, int(len(times) * 0.99))] * 1e3


def processes() -> set[int]:
    """Pids of every process of this machine."""
    return {int(name) for name in os.listdir("/proc") if name.isdigit()}


def memory_bytes(pids: set[int]) -> int:
    """Proportional set sizes added up: pages that several share are split among them."""
    total = 0
    for pid in pids:
        try:
            with open(f"/proc/{pid}/smaps_rollup") as file:
                total += sum(int(line.split()[1]) * 1024 for line in file if line.startswith("Pss:"))
        except OSError:
            pass
    return total


def main() -> None:
    """Measures, and writes {"name": {"value", "unit"}}."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", required=True)
    parser.add_argument("--seconds", type=float, default=2.0)
    parser.add_argument("--only", default="")
    parser.add_argument("--num-cpus", type=int, default=4)
    arguments = parser.parse_args()
    results: dict[str, dict[str, Any]] = {}

    def report(name: str, value: float, unit: str) -> None:
        results[name] = {"value": value, "unit": unit}
        print(f"  {name}: {value:,.3f} {unit}", flush=True)

    report("import, seconds", IMPORT_S, "s")
    before, own = processes(), memory_bytes({os.getpid()})
    started = time.perf_counter()
    ray.init(num_cpus=arguments.num_cpus, object_store_memory=2 << 30, log_to_driver=False, logging_level="ERROR")
    report("init, seconds", time.perf_counter() - started, "s")
    started = time.perf_counter()
    ray.get(nothing.remote())
    report("first task, seconds", time.perf_counter() - started, "s")
    time.sleep(1)
    runtime = processes() - before - {os.getpid()}
    report("memory when idle", memory_bytes(runtime | {os.getpid()}) - own, "B")
    report("processes when idle", len(runtime), "")
    for name, (setup, unit) in BENCHMARKS.items():
        if re.search(arguments.only, name):
            try:
                step, operations = setup()
                report(name, rate(step, operations, arguments.seconds), unit)
                del step
            except Exception as error:  # One missing feature must not cost the other figures.
                print(f"  {name}: FAILED: {error!r}", flush=True)
                results[name] = {"value": 0.0, "unit": unit, "error": repr(error)}
    if re.search(arguments.only, "actor call, 99th percentile"):
        actor = Plain.remote()
        value = percentile_99_ms(lambda: ray.get(actor.nothing.remote()), arguments.seconds)
        report("actor call, 99th percentile", value, "ms")
    started = time.perf_counter()
    ray.shutdown()
    report("shutdown, seconds", time.perf_counter() - started, "s")
    with open(arguments.json, "w") as file:
        json.dump(results, file, indent=1)


if __name__ == "__main__":
    main()
