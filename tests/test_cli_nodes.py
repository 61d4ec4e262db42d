"""`ray start` and `ray stop`: nodes that join, outlive their drivers, and end without a trace."""

import json
import os
import re
import subprocess
import sys

import pytest
from conftest import (
    assert_no_leaks,
    remember_nodes,
    run_ray,
    session_root,
    wait_for_condition,
)

import ray

STORE = str(80 * 1024 * 1024)
NODE = ("--object-store-memory", STORE)


@pytest.fixture
def stopped():
    """Ends what a test started."""
    ray.shutdown()
    yield
    remember_nodes()
    ray.shutdown()
    result = run_ray("stop", "--force")
    assert result.returncode == 0, result.stderr
    assert_no_leaks()


def test_start_join_and_stop(stopped):
    result = run_ray("start", "--head", "--port", "0", "--num-cpus", "1", *NODE)
    assert result.returncode == 0, result.stderr
    address = re.search(r"--address='(\S+)'", result.stdout).group(1)
    joined = run_ray("start", "--address", address, "--num-cpus", "1", "--resources", '{"extra": 2}', *NODE)
    assert joined.returncode == 0, joined.stderr
    remember_nodes()
    ray.init(address, log_to_driver=False)
    assert ray.cluster_resources()["CPU"] == 2 and ray.cluster_resources()["extra"] == 2
    assert ray.get(ray.remote(lambda: 3).options(resources={"extra": 1}).remote(), timeout=30) == 3
    ray.shutdown()
    # The cluster goes on without its driver.
    assert "2 alive" in run_ray("status").stdout
    result = run_ray("stop", "-v")
    assert result.returncode == 0 and "raylet" in result.stdout, result.stderr
    assert_no_leaks()
    assert run_ray("status").returncode == 1
    assert "Did not find" in run_ray("stop").stdout
    assert not os.path.exists(os.path.join(session_root(), "ray_current_cluster"))


def test_stop_leaves_other_processes_alone(stopped):
    # Named like a daemon, and the record of a dead node names its pid: neither may cost it its life.
    bystander = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)", "raylet", "gcs_server"], env={})
    try:
        assert run_ray("start", "--head", "--port", "0", *NODE).returncode == 0
        remember_nodes()
        import glob

        # Programs that were killed in other tests left records too.
        paths = glob.glob(os.path.join(session_root(), "session_2*", "node-*.json"))
        records = {path: json.load(open(path)) for path in paths}
        (path,) = [path for path, record in records.items() if record["is_detached"]]
        record = json.load(open(path))
        record["processes"]["other"] = {"pid": bystander.pid, "start_time": 1}
        with open(path, "w") as file:
            json.dump(record, file)
        assert run_ray("stop").returncode == 0
        assert bystander.poll() is None
    finally:
        bystander.kill()
        bystander.wait()


def test_the_control_plane_of_a_detached_head_is_started_again(stopped):
    assert run_ray("start", "--head", "--port", "0", "--num-cpus", "1", *NODE).returncode == 0
    remember_nodes()
    ray.init("auto", namespace="kept", log_to_driver=False)
    actor = ray.remote(_Keeper).options(name="survivor", lifetime="detached").remote()
    assert ray.get(actor.value.remote(), timeout=30) == 1

    def control_plane():
        import glob

        for path in glob.glob(os.path.join(session_root(), "session_2*", "gcs_server.pid")):
            pid = int(open(path).read())
            if os.path.exists(f"/proc/{pid}"):
                return pid
        return None

    first = control_plane()
    os.kill(first, 9)
    wait_for_condition(lambda: control_plane() not in (None, first))
    assert ray.get(actor.value.remote(), timeout=30) == 2
    assert ray.get(ray.get_actor("survivor").value.remote(), timeout=30) == 3


class _Keeper:
    def __init__(self):
        self.count = 0

    def value(self):
        self.count += 1
        return self.count


def test_block(stopped):
    process = subprocess.Popen(
        [sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--port", "0", "--block", *NODE],
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        for line in process.stdout:
            if "--block" in line:
                break
        remember_nodes()
        process.terminate()
        assert process.wait(20) == 0
    finally:
        process.kill()
        process.wait()
        process.stdout.close()
    assert_no_leaks()
