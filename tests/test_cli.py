"""The command `ray`: start, stop, status, list, logs, and what is not built."""

import json
import os
import re
import subprocess
import sys
import time

import pytest
from conftest import (
    assert_no_leaks,
    remember_nodes,
    run_program,
    run_ray,
    wait_for_condition,
)

import ray

STORE = str(80 * 1024 * 1024)
NODE = ("--object-store-memory", STORE)


@pytest.fixture(scope="module")
def head():
    """A head node that `ray start` left running, for the tests that only ask."""
    ray.shutdown()
    result = run_ray("start", "--head", "--port", "0", "--num-cpus", "2", *NODE, "--labels", "zone=a")
    assert result.returncode == 0, result.stdout + result.stderr
    address = re.search(r"--address='(\S+)'", result.stdout).group(1)
    remember_nodes()
    yield address
    result = run_ray("stop")
    assert result.returncode == 0, result.stderr
    assert_no_leaks()


def test_status(head):
    result = run_ray("status", "-v")
    assert result.returncode == 0, result.stderr
    assert "1 alive" in result.stdout and "0/2 CPU" in result.stdout and "zone=a" in result.stdout
    assert run_ray("status", "--address", head).returncode == 0
    assert run_ray("status", "--address", "127.0.0.1:1").returncode == 1


def test_list_and_get(head):
    rows = json.loads(run_ray("list", "nodes", "--format", "json").stdout)
    assert len(rows) == 1 and rows[0]["state"] == "ALIVE"
    text = run_ray("get", "nodes", rows[0]["node_id"]).stdout
    assert rows[0]["node_id"] in text and "resources_total" in text
    assert run_ray("get", "nodes", "00").returncode == 1
    for resource in ("actors", "jobs", "placement-groups", "workers"):
        for output in ("json", "yaml", "table"):
            result = run_ray("list", resource, "--format", output)
            assert result.returncode == 0, result.stderr
    assert run_ray("list", "nothing").returncode == 1
    assert run_ray("list", "nodes", "-f", "state=DEAD", "--format", "json").stdout.strip() == "[]"
    assert run_ray("summary", "actors").returncode == 0


def test_programs_find_it_and_named_actors_can_be_ended(head):
    program = """
import ray, sys
ray.init(sys.argv[1] if len(sys.argv) > 1 else None, namespace="cli", log_to_driver=False)
@ray.remote
class Keeper:
    def value(self): return 5
actor = Keeper.options(name="kept", lifetime="detached", get_if_exists=True).remote()
print(ray.get(actor.value.remote()), ray.cluster_resources()["CPU"])
"""
    assert "5 2" in run_program(program).stdout
    assert "5 2" in run_program(program, "auto").stdout
    assert "5 2" in run_program(program, head).stdout
    assert "5 2" in run_program(program, environment={"RAY_ADDRESS": head}).stdout
    rows = json.loads(run_ray("list", "actors", "--format", "json", "-f", "name=kept").stdout)
    assert len(rows) == 1 and rows[0]["class_name"] == "Keeper"
    result = run_ray("kill-actor", "--name", "kept", "--namespace", "cli", "--force", "--no-restart")
    assert result.returncode == 0, result.stderr
    wait_for_condition(
        lambda: (
            json.loads(run_ray("list", "actors", "--format", "json", "-f", "name=kept").stdout)[0]["state"] == "DEAD"
        )
    )
    assert run_ray("kill-actor", "--name", "nobody", "--namespace", "cli", "--force").returncode == 1


def test_memory_and_logs(head):
    assert "Object store" in run_ray("memory").stdout
    assert json.loads(run_ray("memory", "--no-format").stdout)["memory"]
    assert "raylet.err" in run_ray("logs").stdout
    assert run_ray("logs", "cluster", "raylet.err").returncode == 0
    assert run_ray("logs", "nothing*").returncode == 1


def test_a_second_head_at_the_same_port_is_refused(head):
    result = run_ray("start", "--head", "--port", head.rpartition(":")[2], *NODE)
    assert result.returncode == 1 and "already" in result.stderr


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["start"], "--head"),
        (["start", "--head", "--address", "127.0.0.1:1"], "--head"),
        (["start", "--head", "--resources", "{"], "JSON"),
        (["start", "--head", "--resources", "[1]"], "object"),
        (["start", "--head", "--num-cpus", "-1", "--port", "0"], "nonnegative"),
        (["start", "--head", "--labels", "a", "--port", "0"], "key1=value1"),
        (["start", "--address", "nonsense"], "host:port"),
        (["start", "--address", "127.0.0.1:6000", "--port", "1"], "--port"),
        (["start", "--nonsense"], "nonsense"),
        (["nonsense"], "nonsense"),
        (["list", "nodes", "-f", "x"], "key=value"),
        (["logs", "actor"], "--id"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else value,
)
def test_what_is_refused(arguments, text):
    started = time.monotonic()
    result = run_ray(*arguments)
    assert result.returncode != 0 and text in result.stderr + result.stdout
    assert time.monotonic() - started < 30


@pytest.mark.parametrize(
    "arguments",
    [
        ["up", "cluster.yaml"],
        ["job", "submit", "--", "python", "x.py"],
        ["serve", "run", "app:app"],
        ["timeline"],
        ["stack"],
        ["summary", "tasks"],
        ["logs", "task", "--id", "x"],
        ["start", "--head", "--dashboard-port", "8265"],
        ["start", "--head", "--include-dashboard", "true"],
        ["start", "--head", "--redis-password", "x"],
    ],
    ids=" ".join,
)
def test_what_is_not_built(arguments):
    result = run_ray(*arguments)
    assert result.returncode == 2 and result.stderr.startswith("not built yet:")


def test_every_command_of_the_interface_exists():
    commands = (
        "attach check-open-ports cluster-dump cpp dashboard debug disable-usage-stats down enable-usage-stats exec get "
        "get-auth-token get-head-ip get-worker-ips job kill-actor list logs memory metrics microbenchmark monitor "
        "rsync-down rsync-up serve stack start status stop submit summary symmetric-run timeline up"
    ).split()
    text = run_ray("--help").stdout
    assert [name for name in commands if not re.search(rf"^  {name}\b", text, re.MULTILINE)] == []
    assert "2." in run_ray("--version").stdout


def test_tokens(tmp_path):
    environment = {"HOME": str(tmp_path), "RAY_AUTH_TOKEN_PATH": ""}
    clean = {key: value for key, value in os.environ.items() if key != "RAY_AUTH_TOKEN"}
    clean.update(environment)

    def ask(*arguments, **more):
        return subprocess.run(
            [sys.executable, "-m", "ray.scripts.scripts", "get-auth-token", *arguments],
            capture_output=True,
            text=True,
            timeout=30,
            env={**clean, **more},
        )

    assert ask().returncode == 1
    made = ask("--generate")
    assert made.returncode == 0 and len(made.stdout.strip()) == 64
    path = tmp_path / ".ray" / "auth_token"
    assert path.stat().st_mode & 0o777 == 0o600
    assert ask().stdout == made.stdout == ask("--generate").stdout
    assert ask(RAY_AUTH_TOKEN="given").stdout.strip() == "given"
    (tmp_path / "other").write_text("from a file\n")
    assert ask(RAY_AUTH_TOKEN_PATH=str(tmp_path / "other")).stdout.strip() == "from a file"
    assert ask(RAY_AUTH_TOKEN_PATH=str(tmp_path / "missing")).returncode == 1
