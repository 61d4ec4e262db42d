"""Actors with coroutines: concurrency, groups, cancellation, awaiting references."""

import asyncio
import socket
import threading
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


@ray.remote(num_cpus=0)
class Looper:
    """Uses what an event loop has besides calls."""

    async def start_server(self):
        async def echo(reader, writer):
            while line := await reader.readline():
                writer.write(line.upper())
                await writer.drain()
            writer.close()

        self.server = await asyncio.start_server(echo, "127.0.0.1", 0, limit=4 << 20)
        return self.server.sockets[0].getsockname()

    async def from_thread(self):
        loop = asyncio.get_running_loop()
        future = loop.create_future()
        threading.Timer(0.05, loop.call_soon_threadsafe, (future.set_result, "thread")).start()
        return await future

    async def from_subprocess(self):
        process = await asyncio.create_subprocess_exec("echo", "child", stdout=asyncio.subprocess.PIPE)
        output, _ = await process.communicate()
        return output.decode().strip()

    async def block(self, seconds):
        time.sleep(seconds)
        return "blocked"

    def get_blocking(self, references):
        return ray.get(references[0])

    async def tasks_of_children(self):
        async def child():
            return ray.get_runtime_context().get_task_id()

        return ray.get_runtime_context().get_task_id(), await asyncio.create_task(child())

    async def stop_loop(self):
        asyncio.get_running_loop().stop()

    async def leave(self):
        ray.actor.exit_actor()


def test_an_idle_actor_serves_its_sockets():
    looper = Looper.remote()
    with socket.create_connection(ray.get(looper.start_server.remote(), timeout=20), timeout=20) as connection:
        lines = connection.makefile("rw")
        for word in ("one", "two", "three"):
            print(word, file=lines, flush=True)
            assert lines.readline().strip() == word.upper()
        # More than the loop reads in one turn, while calls come too.
        text = "x" * 2_000_000
        sender = threading.Thread(target=lambda: print(text, file=lines, flush=True))
        sender.start()
        answers = ray.get([looper.from_thread.remote() for _ in range(5)], timeout=20)
        assert answers == ["thread"] * 5
        assert lines.readline().strip() == text.upper()
        sender.join(timeout=20)


def test_threads_and_subprocesses_wake_the_loop():
    looper = Looper.remote()
    assert ray.get([looper.from_thread.remote(), looper.from_subprocess.remote()], timeout=20) == ["thread", "child"]


def test_calls_that_come_while_the_loop_is_blocked_run_after_it():
    looper = Looper.remote()
    answers = [looper.block.remote(0.3), *[looper.from_thread.remote() for _ in range(20)]]
    assert ray.get(answers, timeout=20) == ["blocked", *["thread"] * 20]


def test_a_blocking_get_in_a_coroutine_sees_values_of_others():
    looper = Looper.remote()

    @ray.remote(num_cpus=0)
    def late():
        time.sleep(0.2)
        return "late"

    assert ray.get(looper.get_blocking.remote([late.remote()]), timeout=20) == "late"


def test_asyncio_tasks_of_a_call_belong_to_it():
    own, child = ray.get(Looper.remote().tasks_of_children.remote(), timeout=20)
    assert own == child


def test_an_actor_that_stops_its_loop_goes_on():
    looper = Looper.remote()
    ray.get(looper.stop_loop.remote(), timeout=20)
    assert ray.get(looper.from_thread.remote(), timeout=20) == "thread"


def test_exit_actor_in_a_coroutine():
    looper = Looper.remote()
    with pytest.raises(ray.exceptions.ActorDiedError):
        ray.get(looper.leave.remote(), timeout=20)
    with pytest.raises(ray.exceptions.ActorDiedError):
        ray.get(looper.from_thread.remote(), timeout=20)


def test_arguments_by_reference_keep_the_order_of_calls():
    @ray.remote(num_cpus=0)
    class Log:
        def __init__(self):
            self.seen = []

        async def add(self, value, size=None):
            self.seen.append(value)

        async def all(self):
            return self.seen

    log = Log.remote()
    large = ray.put(b"x" * 500_000)
    for i in range(20):
        log.add.remote(i, large if i % 3 == 0 else None)
    assert ray.get(log.all.remote(), timeout=20) == list(range(20))
