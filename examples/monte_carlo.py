"""Pi by throwing darts, with results that stream in while the tasks still run.

Each task is a generator: it yields its counts after every batch. The program shows the estimate as it gets better,
stops early once its error is small enough, and cancels what is left.

    python examples/monte_carlo.py [--tasks 4] [--error 0.001]
"""

from __future__ import annotations

import argparse
import math
import random
import time
from collections.abc import Iterator

import ray


@ray.remote
def throw(seed: int, batches: int, darts: int) -> Iterator[tuple[int, int]]:
    """Yields (darts thrown, darts inside the quarter circle) of one batch after another."""
    source = random.Random(seed)
    for _ in range(batches):
        inside = 0
        for _ in range(darts):
            x, y = source.random(), source.random()
            inside += x * x + y * y <= 1.0
        yield darts, inside


def main() -> int:
    """Runs until the standard error is below the wanted one."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tasks", type=int, default=4)
    parser.add_argument("--batches", type=int, default=500)
    parser.add_argument("--darts", type=int, default=20_000)
    parser.add_argument("--error", type=float, default=0.002)
    arguments = parser.parse_args()

    ray.init()
    started = time.perf_counter()
    streams = [throw.remote(seed, arguments.batches, arguments.darts) for seed in range(arguments.tasks)]
    running = list(streams)
    thrown = inside = batches = 0
    error = math.inf
    next_report = 0.0
    while running:
        # A generator is ready when its next item is.
        ready, _ = ray.wait(running, num_returns=1)
        for stream in ready:
            try:
                darts, hits = ray.get(next(stream))
            except StopIteration:
                running.remove(stream)
                continue
            thrown += darts
            inside += hits
            batches += 1
        if thrown:
            share = inside / thrown
            error = 4 * math.sqrt(share * (1 - share) / thrown)
        now = time.perf_counter() - started
        if now >= next_report:
            next_report = now + 0.5
            print(f"{now:6.2f} s  {thrown:>10} darts  pi = {4 * inside / max(thrown, 1):.5f} +- {error:.5f}")
        if error <= arguments.error:
            break
    for stream in running:
        ray.cancel(stream)
    estimate = 4 * inside / thrown
    print(f"{thrown} darts in {batches} batches: pi = {estimate:.5f}, off by {abs(estimate - math.pi):.5f}")
    ray.shutdown()
    # Five standard errors: a right program is this far off once in a million runs.
    return 0 if abs(estimate - math.pi) < 5 * error else 1


if __name__ == "__main__":
    raise SystemExit(main())
