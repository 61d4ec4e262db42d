"""Starting processes: what workers find around them, what is imported when, and what limits of the system do."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
from conftest import assert_no_leaks, remember_nodes, run_program

import ray
from ray.runtime_env.runtime_env import expand_variables


@ray.remote
def variables(*names: str) -> dict[str, str | None]:
    return {name: os.environ.get(name) for name in names}


def test_expansion_is_one_pass_and_leaves_unknown_names(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HELIOSTAT_A", "a${HELIOSTAT_B}")
    monkeypatch.setenv("HELIOSTAT_B", "b")
    assert expand_variables({"X": "<${HELIOSTAT_A}|${HELIOSTAT_B}|${HELIOSTAT_NONE}|$HELIOSTAT_B>"}) == {
        "X": "<a${HELIOSTAT_B}|b|${HELIOSTAT_NONE}|$HELIOSTAT_B>"
    }


def test_names_in_env_vars_are_expanded_where_the_worker_runs(ray_module: object) -> None:
    environment = {"PATH": "/opt/tool/bin:${PATH}", "HELIOSTAT_C": "${HELIOSTAT_C}/c", "HELIOSTAT_D": "${HOME}/d"}
    found = ray.get(variables.options(runtime_env={"env_vars": environment}).remote(*environment), timeout=30)
    plain = ray.get(variables.remote("PATH", "HOME"), timeout=30)
    assert found["PATH"] == f"/opt/tool/bin:{plain['PATH']}"
    assert found["HELIOSTAT_C"] == "${HELIOSTAT_C}/c"
    assert found["HELIOSTAT_D"] == f"{plain['HOME']}/d"


def test_the_first_fork_waits_for_little(tmp_path: object) -> None:
    # What is imported before the first worker is forked is what the first task of a program waits for.
    program = (
        "import json, os, sys\n"
        "from ray._private import zygote\n"
        "for name in zygote._NEEDED: zygote._preimport(name)\n"
        "early = sorted(sys.modules)\n"
        "for name in zygote._USEFUL: zygote._preimport(name)\n"
        "print(json.dumps([early, sorted(sys.modules), len(os.listdir('/proc/self/task'))]))\n"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=60)
    assert result.stderr == ""
    early, late, threads = json.loads(result.stdout)
    assert not {"asyncio", "ssl", "subprocess", "concurrent.futures", "numpy"} & set(early)
    assert {"cloudpickle", "ray._private.executor", "ray._private.function_manager"} <= set(early)
    assert "asyncio" in late and "numpy" not in late
    assert threads == 1


LIMIT_PROGRAM = """
import json, resource
resource.setrlimit(resource.RLIMIT_NOFILE, (256, 2048))
import ray
ray.init(num_cpus=1, object_store_memory=80 << 20, log_to_driver=False)

@ray.remote
def limit():
    import resource
    return resource.getrlimit(resource.RLIMIT_NOFILE)

print(json.dumps([ray.get(limit.remote(), timeout=30), resource.getrlimit(resource.RLIMIT_NOFILE)]))
"""


def test_the_limit_of_open_files_is_raised_to_the_hard_one() -> None:
    worker, driver = json.loads(run_program(LIMIT_PROGRAM).stdout)
    assert worker == [2048, 2048]
    assert driver == [2048, 2048]


EXHAUSTED_PROGRAM = """
import os, resource
import ray
ray.init(num_cpus=1, object_store_memory=80 << 20, log_to_driver=False)

@ray.remote(num_cpus=0)
class Actor:
    def ping(self):
        return 1

first = Actor.remote()
assert ray.get(first.ping.remote(), timeout=30) == 1
used = max(int(name) for name in os.listdir("/proc/self/fd"))
before = resource.getrlimit(resource.RLIMIT_NOFILE)
resource.setrlimit(resource.RLIMIT_NOFILE, (used + 4, before[1]))
actors = [Actor.remote() for _ in range(12)]
texts = []
for actor in actors:
    try:
        ray.get(actor.ping.remote(), timeout=30)
    except Exception as error:
        texts.append(f"{type(error).__name__}: {error}")
resource.setrlimit(resource.RLIMIT_NOFILE, before)
assert texts and all("RLIMIT_NOFILE" in text and "ulimit -n" in text for text in texts), texts
# What works again does so at once.
assert ray.get(first.ping.remote(), timeout=30) == 1
later = Actor.remote()
assert ray.get(later.ping.remote(), timeout=30) == 1
print("done", len(texts))
"""


def test_where_files_run_out_an_error_names_the_limit_and_the_remedy() -> None:
    result = run_program(EXHAUSTED_PROGRAM, timeout=120)
    assert "done" in result.stdout


SCALE = 1_000
SCALE_LIMIT_S = 15.0
SCALE_PSS_LIMIT_BYTES = 5 << 20


@ray.remote(num_cpus=0)
class Small:
    def __init__(self, number: int) -> None:
        self.number = number

    def who(self) -> tuple[int, int]:
        return self.number, os.getpid()


def pss_bytes(pid: int) -> int:
    """Memory of a process, shared pages divided among those that share them."""
    with open(f"/proc/{pid}/smaps_rollup") as file:
        return sum(int(line.split()[1]) * 1024 for line in file if line.startswith("Pss:"))


@pytest.mark.slow
def test_a_thousand_actors_live_at_once(shutdown_after: None) -> None:
    import time

    ray.init("local", num_cpus=2, object_store_memory=200 << 20, log_to_driver=False)
    remember_nodes()
    start = time.monotonic()
    actors = [Small.remote(number) for number in range(SCALE)]
    told = ray.get([actor.who.remote() for actor in actors], timeout=120)
    took_s = time.monotonic() - start
    pids = {pid for _, pid in told}
    assert [number for number, _ in told] == list(range(SCALE)) and len(pids) == SCALE
    sizes = sorted(pss_bytes(pid) for pid in pids)
    mean = sum(sizes) / len(sizes)
    print(f"{SCALE} actors in {took_s:.1f} s, {mean / 1e6:.2f} MB each, the largest {sizes[-1] / 1e6:.2f} MB")
    # Every one still answers.
    assert ray.get([actor.who.remote() for actor in actors], timeout=60) == told
    assert mean < SCALE_PSS_LIMIT_BYTES
    assert took_s < SCALE_LIMIT_S
    start = time.monotonic()
    ray.shutdown()
    print(f"shut down in {time.monotonic() - start:.1f} s")
    assert_no_leaks(timeout=10)
