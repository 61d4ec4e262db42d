"""TCP links between living processes break: nothing is lost, nothing happens twice, and the order stays."""

import os
import socket
import stat
import threading
import time

import numpy as np
import pytest
from chaos_helpers import lines, note, until, wait_until_nothing_is_left
from conftest import STORE_BYTES, assert_no_leaks, remember_nodes

import ray
from ray.cluster_utils import Cluster

pytestmark = pytest.mark.timeout(90)


@pytest.fixture(scope="module")
def nodes():
    ray.shutdown()
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 2, "object_store_memory": STORE_BYTES})
    cluster.add_node(num_cpus=2, resources={"second": 1}, object_store_memory=STORE_BYTES)
    ray.init(address=cluster.address, log_to_driver=False, namespace="links")
    remember_nodes()
    yield cluster
    ray.shutdown()
    cluster.shutdown()
    assert_no_leaks()


@pytest.fixture(autouse=True)
def nothing_left(nodes):
    yield
    wait_until_nothing_is_left(timeout=15)


def break_links() -> int:
    """Ends every TCP connection of this process behind its back. Returns how many there were."""
    broken = 0
    for name in os.listdir("/proc/self/fd"):
        try:
            if not stat.S_ISSOCK(os.stat(f"/proc/self/fd/{name}").st_mode):
                continue
            with socket.socket(fileno=os.dup(int(name))) as connection:
                if connection.family in (socket.AF_INET, socket.AF_INET6) and connection.type == socket.SOCK_STREAM:
                    connection.getpeername()
                    connection.shutdown(socket.SHUT_RDWR)
                    broken += 1
        except OSError:
            continue
    return broken


@ray.remote(num_cpus=0, resources={"second": 0.01})
class Far:
    def __init__(self):
        self.seen = []
        self.box = None

    def see(self, number, blob=b""):
        self.seen.append(number)
        return number, len(blob)

    def all(self):
        return self.seen

    def wait_for(self, path, started):
        note(started, "started")
        while not os.path.exists(path):
            time.sleep(0.01)
        return "done"

    def make(self, count):
        return [ray.put(np.full(200_000, index, dtype=np.uint8)) for index in range(count)]

    def keep(self, box):
        self.box = box

    def read(self):
        return [int(np.asarray(ray.get(reference)).flat[0]) for reference in self.box]

    def drop(self):
        self.box = None

    def break_links(self):
        return break_links()

    @ray.method(num_returns="streaming")
    def items(self, count):
        for index in range(count):
            yield index


def test_a_call_under_way_is_answered(nodes, tmp_path):
    far = Far.remote()
    path, started = str(tmp_path / "go"), str(tmp_path / "started")
    call = far.wait_for.remote(path, started)
    until(lambda: lines(started))
    assert break_links() > 0
    note(path, "go")
    assert ray.get(call, timeout=20) == "done"
    assert lines(started) == ["started"]


@pytest.mark.parametrize("size", [0, 20_000])
def test_calls_run_once_and_in_order_whatever_breaks(nodes, size):
    far = Far.remote()
    assert ray.get(far.all.remote(), timeout=30) == []
    over = threading.Event()
    breaks = []

    def breaker():
        while not over.wait(0.05):
            breaks.append(break_links())

    thread = threading.Thread(target=breaker)
    thread.start()
    try:
        calls = []
        for number in range(600):
            calls.append(far.see.remote(number, b"x" * size))
            if number % 20 == 0:
                time.sleep(0.01)
        assert ray.get(calls, timeout=60) == [(number, size) for number in range(600)]
    finally:
        over.set()
        thread.join()
    assert sum(breaks) > 2
    assert ray.get(far.all.remote(), timeout=30) == list(range(600))


def test_links_broken_by_the_other_side(nodes):
    far = Far.remote()
    results = []
    for number in range(10):
        results.append(ray.get(far.see.remote(number), timeout=20)[0])
        call = far.break_links.remote()
        results.append(ray.get(far.see.remote(number), timeout=20)[0])
        assert ray.get(call, timeout=20) > 0
    assert results == [number for number in range(10) for _ in range(2)]


def test_borrowed_references_are_counted_and_let_go(nodes):
    far = Far.remote()
    for round_number in range(5):
        box = [ray.put(np.full(150_000, round_number, dtype=np.uint8)), ray.put(round_number)]
        kept = far.keep.remote(box)
        break_links()
        del box
        ray.get(kept, timeout=20)
        break_links()
        assert ray.get(far.read.remote(), timeout=20) == [round_number, round_number]
        dropped = far.drop.remote()
        break_links()
        ray.get(dropped, timeout=20)
        break_links()
    # The fixture finds whatever was not let go.


def test_references_of_the_other_side_are_held_and_let_go(nodes):
    far = Far.remote()
    for _ in range(5):
        made = far.make.remote(4)
        break_links()
        references = ray.get(made, timeout=20)
        break_links()
        assert [int(array[0]) for array in ray.get(references, timeout=20)] == [0, 1, 2, 3]
        del references, made
        break_links()


def test_a_stream_goes_on(nodes):
    far = Far.remote()
    values = []
    for index, reference in enumerate(far.items.remote(300)):
        values.append(ray.get(reference, timeout=20))
        if index % 40 == 0:
            break_links()
    assert values == list(range(300))
