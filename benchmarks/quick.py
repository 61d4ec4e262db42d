"""`make bench-quick`: what calls cost the driver, compared with `benchmarks/quick.json`, in under a minute.

    python -m benchmarks.quick [--update] [--method callgrind|perf|ratio]

The best method that this machine has is taken:

- callgrind: instructions of the driver under valgrind; they do not depend on the machine's load. Allowed: 8 % more.
- perf: instructions in user mode by `perf stat`; waiting threads spin a little, so 20 % more are allowed.
- ratio: the best time of an operation over that of floors measured in the same run (a blocking round trip over a pipe
  for calls that wait, a Python loop for the rest), which a busy machine disturbs: 60 % more are allowed.

Exits with 1 where something costs more than it may, and says what. `--update` writes the baseline for this method.
A baseline belongs to a method, a Python version and a processor; where there is none, nothing is compared.
"""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from typing import Any

BASELINE = pathlib.Path(__file__).with_name("quick.json")
ALLOWED = {"callgrind": 1.08, "perf": 1.20, "ratio": 1.60}
METHODS = ("callgrind", "perf", "ratio")
PROGRAM_LIMIT_S = 120.0
# How often an operation is repeated in one measurement, by method.
REPEATS = {"callgrind": 240, "perf": 2000, "ratio": 400}
# Operations that wait for another process; the others only compute.
WAITS = {"actor call", "asyncio actor call", "task", "task, 50 KB argument"}


def operations() -> dict[str, Callable[[], Any]]:
    """What is measured, by name; needs a connection."""
    import numpy as np

    import ray

    @ray.remote
    def nothing(*_: Any) -> bytes:
        return b"ok"

    @ray.remote(num_cpus=0)
    class Plain:
        def nothing(self, *_: Any) -> bytes:
            return b"ok"

    @ray.remote(num_cpus=0)
    class Coroutines:
        async def nothing(self, *_: Any) -> bytes:
            return b"ok"

    plain, coroutines = Plain.remote(), Coroutines.remote()
    array = np.ones(50_000, dtype=np.uint8)
    small = ray.put(0)
    many = [ray.put(i) for i in range(100)]
    nested = ray.put([ray.put(1) for _ in range(100)])
    return {
        "actor call": lambda: ray.get(plain.nothing.remote()),
        "asyncio actor call": lambda: ray.get(coroutines.nothing.remote()),
        "task": lambda: ray.get(nothing.remote()),
        "task, 50 KB argument": lambda: ray.get(nothing.remote(array)),
        "put": lambda: ray.put(0),
        "get": lambda: ray.get(small),
        "get of 100": lambda: ray.get(many),
        "wait for one of 100": lambda: ray.wait(many),
        "get of a list of 100 references": lambda: ray.get(nested),
    }


def program(repeats: int, address: str) -> None:
    """The process that is measured: names each measurement before it begins and waits for a line before and after."""
    import ray

    def mark(text: str) -> None:
        print(text, flush=True)
        sys.stdin.readline()

    ray.init(address, log_to_driver=False, logging_level="ERROR")
    for name, operation in operations().items():
        for _ in range(10):
            operation()
        mark(f"begin {name}")
        best = float("inf")
        for _ in range(4):
            started = time.perf_counter()
            for _ in range(repeats // 4):
                operation()
            best = min(best, (time.perf_counter() - started) / (repeats // 4))
        mark(f"end {best * 1e6:.3f}")
    ray.shutdown()


class _Counter:
    """Counts instructions of a running program between two marks."""

    def __init__(self, directory: pathlib.Path) -> None:
        self.directory = directory

    def command(self) -> list[str]:
        """What the program's command line begins with."""
        return []

    def begin(self, pid: int) -> None:
        """A measurement begins."""

    def end(self, pid: int) -> float:
        """It is over: how many instructions it took. 0 where this counts none."""
        return 0.0


class _Callgrind(_Counter):
    dumps = 0

    def command(self) -> list[str]:
        return ["valgrind", "--tool=callgrind", "-q", f"--callgrind-out-file={self.directory}/out"]

    def _dump(self, pid: int) -> float:
        self.dumps += 1
        subprocess.run(["callgrind_control", f"--dump={self.dumps}", str(pid)], check=True, capture_output=True)
        # The counters fall to zero with each dump; the last lines of its file have the sum.
        text = (self.directory / f"out.{self.dumps}").read_text()
        found = re.findall(r"^(?:totals|summary): (\d+)", text, re.MULTILINE)
        return float(found[-1])

    def begin(self, pid: int) -> None:
        self._dump(pid)

    def end(self, pid: int) -> float:
        return self._dump(pid)


class _Perf(_Counter):
    process: subprocess.Popen[bytes] | None = None

    def begin(self, pid: int) -> None:
        command = ["perf", "stat", "-x,", "-e", "instructions:u", "-o", f"{self.directory}/stat", "-p", str(pid)]
        self.process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        time.sleep(0.3)  # It says nowhere that it counts now.

    def end(self, pid: int) -> float:
        assert self.process is not None
        self.process.terminate()
        self.process.wait(10)
        return float((self.directory / "stat").read_text().split(",")[0].split()[-1])


def perf_counts() -> bool:
    """Whether this machine lets `perf` count instructions."""
    if shutil.which("perf") is None:
        return False
    command = ["perf", "stat", "-x,", "-e", "instructions:u", "true"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    return result.returncode == 0 and bool(re.match(r"\d+,", result.stderr))


def best_method() -> str:
    """The first method that works here."""
    if shutil.which("valgrind") and shutil.which("callgrind_control"):
        return "callgrind"
    return "perf" if perf_counts() else "ratio"


def measure(method: str) -> Iterator[tuple[str, float]]:
    """(name, cost of one operation): instructions, or microseconds with the method "ratio".

    Raises:
        RuntimeError: the program ended early.
    """
    import ray

    repeats = REPEATS[method]
    # The cluster is this process's: what is measured is a driver of it, and valgrind does not know how to start one.
    ray.init(num_cpus=2, log_to_driver=False, logging_level="ERROR", object_store_memory=200 << 20)
    address = ray.get_runtime_context().gcs_address
    with tempfile.TemporaryDirectory() as directory:
        kinds = {"callgrind": _Callgrind, "perf": _Perf, "ratio": _Counter}
        counter = kinds[method](pathlib.Path(directory))
        command = [
            *counter.command(),
            sys.executable,
            "-m",
            "benchmarks.quick",
            "--program",
            str(repeats),
            "--address",
            address,
        ]
        environment = {**os.environ, "PYTHONHASHSEED": "0", "OPENBLAS_NUM_THREADS": "1"}
        process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1, env=environment
        )
        assert process.stdin is not None and process.stdout is not None
        name, finished = "", False
        for line in process.stdout:
            kind, _, rest = line.strip().partition(" ")
            if kind == "begin":
                name = rest
                counter.begin(process.pid)
            elif kind == "end":
                counted = counter.end(process.pid)
                finished = True
                yield name, counted / repeats if counted else float(rest)
            else:
                continue
            process.stdin.write("\n")
            process.stdin.flush()
        if process.wait(PROGRAM_LIMIT_S) != 0 or not finished:
            raise RuntimeError(f"the measured program ended with {process.returncode}")
    ray.shutdown()


def floors() -> dict[bool, float]:
    """Microseconds of a blocking round trip over a pipe (True) and of a Python loop of 100 turns (False)."""
    from benchmarks.floors import _round_trip

    def loop() -> float:
        started = time.perf_counter()
        for _ in range(100):
            pass
        return (time.perf_counter() - started) * 1e6

    return {True: 1e6 / _round_trip(1.0, polled=False), False: min(loop() for _ in range(2000))}


def machine(method: str) -> str:
    """What a baseline belongs to."""
    major, minor, _ = platform.python_version_tuple()
    return f"{method}, Python {major}.{minor}, {platform.machine()}"


def main() -> int:
    """Measures and compares. Returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--update", action="store_true")
    parser.add_argument("--method", choices=METHODS)
    parser.add_argument("--program", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--address", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.program:
        program(arguments.program, arguments.address)
        return 0
    method = arguments.method or best_method()
    found = floors() if method == "ratio" else None
    costs = {}
    known = json.loads(BASELINE.read_text()) if BASELINE.exists() else {}
    baseline = known.get(machine(method), {})
    unit = "x the floor" if found else "instructions"
    print(f"{'operation':34s} {'baseline':>12s} {'now':>12s}   {unit} ({machine(method)})")
    worse = []
    for name, cost in measure(method):
        value = cost / found[name in WAITS] if found else cost
        costs[name] = round(value, 2) if found else round(value)
        before = baseline.get(name)
        verdict = ""
        if before is not None and value > before * ALLOWED[method]:
            verdict = f"{value / before - 1:+.0%}: more than the {ALLOWED[method] - 1:.0%} that are allowed"
            worse.append(name)
        print(
            f"{name:34s} {'-' if before is None else format(before, ',.6g'):>12s} {costs[name]:>12,.6g}   {verdict}",
            flush=True,
        )
    if arguments.update:
        known[machine(method)] = costs
        BASELINE.write_text(json.dumps(known, indent=1, sort_keys=True) + "\n")
        print(f"{BASELINE} is up to date")
        return 0
    if not baseline:
        print("There is no baseline for this method, Python and processor yet: --update writes one.")
    if worse:
        print(f"Regressed: {', '.join(worse)}. Where that is meant, --update writes the new baseline.")
    return 1 if worse else 0


if __name__ == "__main__":
    sys.exit(main())
