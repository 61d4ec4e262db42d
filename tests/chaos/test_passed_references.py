"""References that are passed on by somebody who ends, or by an actor to itself: whoever keeps one keeps its object."""

import asyncio
import os
import signal
import time

import pytest
from chaos_helpers import kill, lines, note, until, wait_until_nothing_is_left

import ray

pytestmark = pytest.mark.timeout(60)


@pytest.fixture
def cluster(ray_start):
    ray_start(num_cpus=2, namespace="chaos")


@ray.remote(num_cpus=0)
class Owner:
    """Makes objects and keeps none."""

    def make(self, value):
        return [ray.put(value)]


@ray.remote(num_cpus=0)
class Keeper:
    def __init__(self, box=None):
        self.box = box
        self.calls = 0

    def keep(self, box, started, path):
        note(started, "started")
        while not os.path.exists(path):
            time.sleep(0.01)
        self.box = box
        self.calls += 1

    def count(self):
        return self.calls

    def read(self):
        return ray.get(self.box[0], timeout=10)


def test_what_an_actor_passes_to_itself_is_kept_for_its_caller_too(cluster, tmp_path):
    @ray.remote(num_cpus=0)
    class Recursive:
        async def first(self, box, path):
            me = ray.get_runtime_context().current_actor
            self.second_call = me.second.remote(box, path)

        async def second(self, box, path):
            while not os.path.exists(path):
                await asyncio.sleep(0.01)
            self.box = box

        async def read(self):
            await self.second_call
            return await self.box[0]

    owner, actor, path = Owner.remote(), Recursive.remote(), str(tmp_path / "go")
    box = ray.get(owner.make.remote("kept"), timeout=30)
    ray.get(actor.first.remote(box, path), timeout=30)
    del box
    # Time for the driver's count to reach the owner: nothing can be waited for, because nothing may happen.
    time.sleep(1)
    note(path, "go")
    assert ray.get(actor.read.remote(), timeout=30) == "kept"
    del owner, actor
    wait_until_nothing_is_left()


def test_a_reference_outlives_a_caller_that_died_before_it_read_the_answer(cluster, tmp_path):
    @ray.remote(max_retries=0)
    def pass_on(owner, keeper, path, started, go):
        box = ray.get(owner.make.remote("kept"))
        keeper.keep.remote(box, started, go)
        del box
        note(path, os.getpid())
        time.sleep(100)

    owner, keeper = Owner.remote(), Keeper.remote()
    path, started, go = str(tmp_path / "pid"), str(tmp_path / "started"), str(tmp_path / "go")
    call = pass_on.remote(owner, keeper, path, started, go)
    pid = int(until(lambda: lines(started) and lines(path))[0])
    os.kill(pid, signal.SIGSTOP)
    note(go, "go")
    assert ray.get(keeper.count.remote(), timeout=30) == 1
    kill(pid)
    with pytest.raises(ray.exceptions.WorkerCrashedError):
        ray.get(call, timeout=30)
    # Longer than the owner waits for the heirs of a dead borrower.
    time.sleep(2.5)
    assert ray.get(keeper.read.remote(), timeout=30) == "kept"
    del owner, keeper, call
    wait_until_nothing_is_left()


def test_a_constructors_references_are_kept(cluster):
    owner = Owner.remote()
    box = ray.get(owner.make.remote("kept"), timeout=30)
    keeper = Keeper.remote(box)
    del box
    assert ray.get(keeper.count.remote(), timeout=30) == 0
    time.sleep(1)
    assert ray.get(keeper.read.remote(), timeout=30) == "kept"
    del owner, keeper
    wait_until_nothing_is_left()
