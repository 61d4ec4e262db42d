"""Programs of the kind that people write: patterns of tasks and actors, and features of classes and of the language."""

import asyncio
import dataclasses
import enum
import functools
import os
import threading
import time
import typing
from abc import ABC, abstractmethod

import numpy as np
import pytest
from conftest import wait_for_condition

import ray

pytestmark = pytest.mark.usefixtures("ray_module")


@ray.remote
def identity(value):
    return value


@ray.remote(num_cpus=0)
class Counter:
    """Counts."""

    step = 1

    def __init__(self, value=0):
        self.value = value

    def increment(self):
        self.value += self.step
        return self.value

    @classmethod
    def name_and(cls, x):
        return cls.__name__, cls.step, x

    @staticmethod
    def double(x):
        return 2 * x

    @property
    def current(self):
        return self.value

    def __len__(self):
        return 7

    def __call__(self, x):
        return x, self.value

    def _hidden(self):
        return "hidden"


# --- patterns of tasks ---


def test_a_tree_of_sums():
    @ray.remote
    def add(a, b):
        return a + b

    values = [ray.put(i) for i in range(16)]
    while len(values) > 1:
        values = [*values[2:], add.remote(values[0], values[1])]
    assert ray.get(values[0]) == 120


def test_results_as_they_come():
    @ray.remote
    def paced(i):
        time.sleep(0.01 * (i % 3))
        return i

    waiting, results = [paced.remote(i) for i in range(20)], []
    while waiting:
        done, waiting = ray.wait(waiting)
        results += ray.get(done)
    assert sorted(results) == list(range(20))


def test_only_so_many_tasks_at_once():
    waiting, results = [], []
    for i in range(50):
        if len(waiting) >= 5:
            done, waiting = ray.wait(waiting, num_returns=1)
            results += ray.get(done)
        waiting.append(identity.remote(i))
    assert sorted(results + ray.get(waiting)) == list(range(50))


def test_nested_tasks_that_wait_for_more_than_the_node_has_room_for():
    @ray.remote
    def leaf():
        return 1

    @ray.remote
    def middle():
        return sum(ray.get([leaf.remote() for _ in range(3)]))

    @ray.remote
    def top():
        return sum(ray.get([middle.remote() for _ in range(8)]))

    assert ray.get(top.remote(), timeout=60) == 24


def test_recursion():
    @ray.remote
    def fibonacci(n):
        return n if n < 2 else sum(ray.get([fibonacci.remote(n - 1), fibonacci.remote(n - 2)]))

    assert ray.get(fibonacci.remote(8), timeout=60) == 21


def test_references_and_handles_in_closures():
    numbers, counter = ray.put(np.arange(5)), Counter.remote()

    @ray.remote
    def use():
        return int(ray.get(numbers).sum()), ray.get(counter.increment.remote())

    assert sorted(ray.get([use.remote() for _ in range(3)])) == [(10, 1), (10, 2), (10, 3)]


def test_threads_of_a_task_and_of_the_driver_submit():
    def many():
        results = []
        threads = [threading.Thread(target=lambda i=i: results.append(ray.get(identity.remote(i)))) for i in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return sorted(results)

    assert many() == ray.get(ray.remote(many).remote(), timeout=30) == [0, 1, 2, 3]


def test_a_task_that_uses_multiprocessing():
    @ray.remote
    def parallel():
        import multiprocessing

        with multiprocessing.get_context("spawn").Pool(1) as pool:
            return pool.map(abs, [-1, 2])

    assert ray.get(parallel.remote(), timeout=60) == [1, 2]


# --- patterns of actors ---


def test_a_parameter_server():
    @ray.remote(num_cpus=0)
    class Server:
        def __init__(self, size):
            self.weights = np.zeros(size)

        def push(self, gradient):
            self.weights = self.weights + gradient

        def pull(self):
            return self.weights

    @ray.remote
    def work(server, rounds):
        for _ in range(rounds):
            weights = ray.get(server.pull.remote())
            ray.get(server.push.remote(np.ones_like(weights)))

    server = Server.remote(50_000)
    ray.get([work.remote(server, 3) for _ in range(3)], timeout=60)
    assert (ray.get(server.pull.remote()) == 9).all()


def test_a_supervisor_and_its_workers_end_together():
    @ray.remote(num_cpus=0)
    class Supervisor:
        def __init__(self):
            self.workers = [Counter.remote(i) for i in range(3)]

        def total(self):
            return sum(ray.get([worker.increment.remote() for worker in self.workers]))

        def hand_out(self):
            return self.workers

    supervisor = Supervisor.remote()
    assert ray.get(supervisor.total.remote()) == 6
    first, *_ = ray.get(supervisor.hand_out.remote())
    assert ray.get(first.increment.remote()) == 2
    ray.kill(supervisor)

    def has_ended():
        try:
            ray.get(first.increment.remote(), timeout=10)
        except ray.exceptions.ActorDiedError as error:
            return "owner" in str(error)
        return False

    wait_for_condition(has_ended)


def test_an_actor_that_calls_itself_through_its_handle():
    @ray.remote
    class Loop:
        async def start(self):
            return await ray.get_runtime_context().current_actor.ping.remote()

        async def ping(self):
            return "pong"

    loop = Loop.remote()
    assert ray.get(loop.start.remote(), timeout=20) == "pong"


def test_an_asyncio_actor_that_gathers():
    @ray.remote
    class Gather:
        async def all_of(self, references):
            return await asyncio.gather(*references)

        async def survives(self):
            @ray.remote
            def fails():
                raise KeyError("key")

            try:
                await fails.remote()
            except KeyError as error:
                return type(error.cause)

    gather = Gather.remote()
    assert ray.get(gather.all_of.remote([identity.remote(i) for i in range(3)])) == [0, 1, 2]
    assert ray.get(gather.survives.remote()) is KeyError


# --- classes ---


def test_kinds_of_methods():
    counter = Counter.remote(5)
    assert ray.get(counter.name_and.remote(3)) == ("Counter", 1, 3)
    assert ray.get(counter.double.remote(3)) == 6
    assert ray.get(counter._hidden.remote()) == "hidden"
    assert ray.get([counter.__len__.remote(), counter.__call__.remote(3)]) == [7, (3, 5)]
    assert ray.get(counter.__ray_call__.remote(lambda self, a, b=0: self.current + a + b, 1, b=2)) == 8
    for missing in ("current", "step", "nothing"):
        with pytest.raises(AttributeError, match=f"'ActorHandle' object has no attribute '{missing}'"):
            getattr(counter, missing)
    assert Counter.double(2) == 4 and Counter.step == 1 and Counter.__doc__ == "Counts."


def test_inheritance():
    class Base(ABC):
        @abstractmethod
        def who(self): ...

        def both(self):
            return f"base and {self.who()}"

    class Child(Base):
        def who(self):
            return "child"

        def both(self):
            return super().both() + "!"

    child = ray.remote(Child).remote()
    assert ray.get([child.who.remote(), child.both.remote()]) == ["child", "base and child!"]
    abstract = ray.remote(Base).remote()
    with pytest.raises(ray.exceptions.ActorDiedError, match="abstract"):
        ray.get(abstract.both.remote())


def test_odd_classes():
    T = typing.TypeVar("T")

    class Slotted(typing.Generic[T]):
        __slots__ = ("arguments",)

        def __new__(cls, *arguments):
            self = super().__new__(cls)
            self.arguments = arguments
            return self

        def __getattr__(self, name):
            return lambda: name

        def look(self):
            return self.arguments, self.anything()

    @dataclasses.dataclass
    class Data:
        x: int
        y: int = 2

        def total(self):
            return self.x + self.y

    assert ray.get(ray.remote(Slotted).remote(1, 2).look.remote()) == ((1, 2), "anything")
    assert ray.get(ray.remote(Data).remote(3).total.remote()) == 5
    with pytest.raises(TypeError, match="'x'"):
        ray.remote(Data).remote()


def test_decorated_methods():
    def twice(method):
        @functools.wraps(method)
        def wrapper(*args, **kwargs):
            return [method(*args, **kwargs)] * 2

        return wrapper

    @ray.remote
    class Decorated:
        @twice
        def add(self, x, y=2):
            return x + y

        part = functools.partialmethod(lambda self, a, b: (a, b), 1)

    decorated = Decorated.remote()
    assert ray.get(decorated.add.remote(1)) == [3, 3]
    with pytest.raises(TypeError, match="'x'"):
        decorated.add.remote()


# --- values and the language ---


class Color(enum.Enum):
    RED = 1


class Pair(typing.NamedTuple):
    left: int
    right: str = "x"


class Reduced:
    def __init__(self, value):
        self.value = value

    def __reduce__(self):
        return Reduced, (self.value + 1,)


def test_types_of_the_program():
    assert ray.get(identity.remote(Color.RED)) is Color.RED
    assert ray.get(identity.remote(Pair(1))) == Pair(1)
    assert ray.get(ray.put(Reduced(1))).value == 2
    loop = [1]
    loop.append(loop)
    back = ray.get(identity.remote(loop))
    assert back[1] is back
    first, second = ray.get(ray.put([array := np.arange(100_000), array]))
    assert first is second


def test_code_of_a_notebook():
    cells = {"ray": ray, "__name__": "__main__"}
    for i in range(3):
        exec(f"@ray.remote\ndef cell(): return {i}\nresult = ray.get(cell.remote())", cells)
        assert cells["result"] == i
    exec(
        "@ray.remote\nclass A:\n    def get(self): return 1\nold = A.remote()\nfirst = ray.get(old.get.remote())", cells
    )
    exec("@ray.remote\nclass A:\n    def get(self): return 2\nsecond = ray.get(A.remote().get.remote())", cells)
    exec("again = ray.get(old.get.remote())", cells)
    assert (cells["first"], cells["second"], cells["again"]) == (1, 2, 1)


def test_newer_language_features():
    @ray.remote
    def match(x):
        match x:
            case {"a": int(v)}:
                return v
            case [1, *rest]:
                return rest
        return None

    assert ray.get([match.remote({"a": 5}), match.remote([1, 2, 3]), match.remote("")]) == [5, [2, 3], None]

    async def await_it(reference):
        return await reference

    async def main():
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(await_it(identity.remote(i))) for i in range(3)]
        return [task.result() for task in tasks]

    assert asyncio.run(main()) == [0, 1, 2]


def test_await_with_a_timeout(tmp_path):
    @ray.remote
    def waits(path):
        while not os.path.exists(path):
            time.sleep(0.01)
        return "done"

    path = str(tmp_path / "go")

    async def main():
        reference = waits.remote(path)
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.1):
                await reference
        open(path, "w").close()
        return await reference

    assert asyncio.run(main()) == "done"
