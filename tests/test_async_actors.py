"""Actors with coroutines: concurrency, groups, cancellation, awaiting references."""

import asyncio
import time

import pytest

import ray

pytestmark = pytest.mark.usefixtures("ray_module")


@ray.remote(num_cpus=0)
class Meeting:
    def __init__(self):
        self.count = 0
        self.event = asyncio.Event()

    async def arrive(self, wanted):
        self.count += 1
        if self.count == wanted:
            self.event.set()
        await self.event.wait()
        return self.count

    async def fail(self):
        await asyncio.sleep(0)
        raise KeyError("lost")

    async def nested(self, reference):
        return await reference[0] + 1

    async def forever(self):
        await asyncio.sleep(1000)

    def plain(self):
        return "plain"

    async def where(self):
        return ray.get_runtime_context().get_actor_id(), ray.get_runtime_context().get_task_id()


def test_coroutines_run_at_once():
    meeting = Meeting.remote()
    assert ray.get([meeting.arrive.remote(50) for _ in range(50)], timeout=30) == [50] * 50


def test_max_concurrency_bounds_coroutines():
    @ray.remote(max_concurrency=3)
    class Bounded:
        def __init__(self):
            self.now = self.most = 0

        async def work(self):
            self.now += 1
            self.most = max(self.most, self.now)
            await asyncio.sleep(0.02)
            self.now -= 1
            return self.most

    bounded = Bounded.options(num_cpus=0).remote()
    assert max(ray.get([bounded.work.remote() for _ in range(12)], timeout=30)) == 3


def test_exceptions_and_plain_methods():
    meeting = Meeting.remote()
    with pytest.raises(KeyError, match="lost"):
        ray.get(meeting.fail.remote())
    assert ray.get(meeting.plain.remote()) == "plain"


def test_references_are_awaited_inside():
    assert ray.get(Meeting.remote().nested.remote([ray.put(4)]), timeout=20) == 5


def test_each_coroutine_knows_its_task():
    meeting = Meeting.remote()
    (first_actor, first), (second_actor, second) = ray.get([meeting.where.remote(), meeting.where.remote()])
    assert first_actor == second_actor and first != second


def test_cancel_reaches_a_coroutine():
    meeting = Meeting.remote()
    ray.get(meeting.plain.remote())
    reference = meeting.forever.remote()
    ready, _ = ray.wait([reference], timeout=0.3)
    assert not ready
    ray.cancel(reference)
    with pytest.raises(ray.exceptions.TaskCancelledError):
        ray.get(reference, timeout=20)
    assert ray.get(meeting.plain.remote()) == "plain"


def test_concurrency_groups():
    @ray.remote(concurrency_groups={"io": 2, "compute": 1}, num_cpus=0)
    class Grouped:
        def __init__(self):
            self.event = asyncio.Event()

        @ray.method(concurrency_group="io")
        async def wait(self):
            await self.event.wait()
            return "io"

        @ray.method(concurrency_group="compute")
        async def set(self):
            self.event.set()
            return "compute"

        async def default(self):
            return "default"

    actor = Grouped.remote()
    waiting = [actor.wait.remote() for _ in range(3)]
    assert ray.get(actor.default.remote(), timeout=20) == "default"
    assert ray.get(actor.set.remote(), timeout=20) == "compute"
    assert ray.get(waiting, timeout=20) == ["io"] * 3


def test_await_from_the_driver():
    meeting = Meeting.remote()

    async def main():
        return await asyncio.gather(*[meeting.arrive.remote(10) for _ in range(10)])

    assert asyncio.run(main()) == [10] * 10


def test_a_slow_call_does_not_hold_up_others():
    meeting = Meeting.remote()
    slow = meeting.forever.remote()
    started = time.monotonic()
    assert ray.get(meeting.plain.remote(), timeout=20) == "plain"
    assert time.monotonic() - started < 10
    ray.cancel(slow)
