"""Streaming and dynamic generators of tasks and actors."""

import asyncio
import os
import time

import numpy as np
import pytest
from conftest import wait_for_condition

import ray

pytestmark = pytest.mark.usefixtures("ray_module")


@ray.remote
def count(n):
    for i in range(n):
        yield i


def test_generator_functions_stream_by_default():
    generator = count.remote(5)
    assert isinstance(generator, ray.ObjectRefGenerator)
    assert [ray.get(reference) for reference in generator] == [0, 1, 2, 3, 4]
    with pytest.raises(StopIteration):
        next(generator)


def test_explicit_streaming():
    assert [ray.get(r) for r in count.options(num_returns="streaming").remote(3)] == [0, 1, 2]


def test_items_arrive_while_the_task_runs(tmp_path):
    @ray.remote
    def paced(path):
        yield "first"
        while not os.path.exists(path):
            time.sleep(0.01)
        yield "second"

    path = str(tmp_path / "go")
    generator = paced.remote(path)
    assert ray.get(next(generator), timeout=20) == "first"
    open(path, "w").close()
    assert ray.get(next(generator), timeout=20) == "second"


def test_large_items():
    @ray.remote
    def arrays(n):
        for i in range(n):
            yield np.full(500_000, i, dtype=np.uint8)

    total = 0
    for reference in arrays.remote(30):
        total += int(ray.get(reference, timeout=30)[0])
        del reference
    assert total == sum(range(30))


def test_an_exception_ends_the_stream():
    @ray.remote
    def broken():
        yield 1
        raise ValueError("half way")

    generator = broken.remote()
    assert ray.get(next(generator)) == 1
    with pytest.raises(ValueError, match="half way"):
        ray.get(next(generator))
    with pytest.raises(StopIteration):
        next(generator)


def test_wait_on_a_generator():
    generator = count.remote(2)
    ready, rest = ray.wait([generator], timeout=20)
    assert ready == [generator] and rest == []


def test_completed():
    generator = count.remote(3)
    ray.get(generator.completed(), timeout=20)
    assert not generator.is_finished()
    list(generator)
    assert generator.is_finished()


def test_back_pressure(tmp_path):
    @ray.remote(_generator_backpressure_num_objects=2)
    def counted(path):
        for i in range(20):
            with open(path, "a") as file:
                file.write("x")
            yield i

    path = str(tmp_path / "made")
    generator = counted.remote(path)
    assert ray.get(next(generator), timeout=20) == 0

    def made():
        return len(open(path).read())

    wait_for_condition(lambda: made() >= 2)
    # It stands still: give it the time that all twenty would need by far.
    deadline = time.monotonic() + 0.5
    while time.monotonic() < deadline:
        assert made() <= 4
        time.sleep(0.05)
    assert [ray.get(r) for r in generator] == list(range(1, 20))


def test_dynamic_returns_one_reference_to_a_generator():
    @ray.remote(num_returns="dynamic")
    def split(n):
        yield from range(n)

    reference = split.remote(4)
    assert isinstance(reference, ray.ObjectRef)
    assert [ray.get(r) for r in ray.get(reference, timeout=20)] == [0, 1, 2, 3]
    assert [ray.get(r) for r in split.remote(3)] == [0, 1, 2]


def test_actor_generators():
    @ray.remote(num_cpus=0)
    class Maker:
        def plain(self, n):
            for i in range(n):
                yield i

        async def asynchronous(self, n):
            for i in range(n):
                await asyncio.sleep(0)
                yield i * 10

    @ray.remote(num_cpus=0)
    class Plain:
        def plain(self, n):
            yield from range(n)

    assert [ray.get(r) for r in Plain.remote().plain.remote(4)] == [0, 1, 2, 3]
    maker = Maker.remote()
    assert [ray.get(r) for r in maker.asynchronous.remote(3)] == [0, 10, 20]
    assert [ray.get(r) for r in maker.plain.options(num_returns="streaming").remote(2)] == [0, 1]


def test_async_iteration():
    async def main():
        return [await reference async for reference in count.remote(4)]

    assert asyncio.run(main()) == [0, 1, 2, 3]


def test_a_generator_is_consumed_while_it_is_passed_on():
    @ray.remote
    def total(references):
        return sum(ray.get(references))

    assert ray.get(total.remote(list(count.remote(10))), timeout=30) == 45


def test_dropping_a_generator_ends_its_task(tmp_path):
    @ray.remote
    def endless(path):
        try:
            i = 0
            while True:
                yield i
                i += 1
                time.sleep(0.01)
        finally:
            open(path, "w").close()

    path = str(tmp_path / "ended")
    generator = endless.remote(path)
    next(generator)
    del generator
    wait_for_condition(lambda: os.path.exists(path), timeout=20)


def test_an_empty_generator():
    assert list(count.remote(0)) == []


def test_a_fixed_number_of_returns_keeps_what_came_before_a_failure():
    @ray.remote(num_returns=3)
    def breaks():
        yield 1
        raise ValueError("after one")

    first, second, third = breaks.remote()
    assert ray.get(first) == 1
    for reference in (second, third):
        with pytest.raises(ValueError, match="after one"):
            ray.get(reference)


def test_a_fixed_number_of_returns_and_another_number_of_items():
    first, second = count.options(num_returns=2).remote(1)
    assert ray.get(first) == 0
    with pytest.raises(ValueError, match="returned 1 objects, but num_returns=2"):
        ray.get(second)
    # What is too much is dropped.
    assert ray.get(count.options(num_returns=2).remote(5)) == [0, 1]
    assert ray.get(count.options(num_returns=1).remote(5)) == 0


def test_a_failure_that_is_retried_is_one_of_the_whole_call(tmp_path):
    @ray.remote(num_returns=2, max_retries=3, retry_exceptions=[ValueError])
    def breaks_once(path):
        yield 1
        if not os.path.exists(path):
            open(path, "w").close()
            raise ValueError("once")
        yield 2

    assert ray.get(breaks_once.remote(str(tmp_path / "broken"))) == [1, 2]


def test_a_dynamic_call_keeps_what_came_before_a_failure():
    @ray.remote(num_returns="dynamic")
    def breaks():
        yield 1
        yield 2
        raise ValueError("after two")

    first, second, third = ray.get(breaks.remote())
    assert ray.get([first, second]) == [1, 2]
    with pytest.raises(ValueError, match="after two"):
        ray.get(third)


def test_async_generators_with_a_fixed_number_of_returns():
    @ray.remote
    class Async:
        @ray.method(num_returns=2)
        async def breaks(self):
            yield 1
            raise ValueError("after one")

    actor = Async.remote()
    first, second = actor.breaks.remote()
    assert ray.get(first) == 1
    with pytest.raises(ValueError, match="after one"):
        ray.get(second)


def test_back_pressure_of_one_makes_an_item_when_one_was_taken(tmp_path):
    @ray.remote(_generator_backpressure_num_objects=1)
    def counted(path):
        for i in range(5):
            with open(path, "a") as file:
                file.write("x")
            yield i

    path = str(tmp_path / "made")
    generator = counted.remote(path)
    wait_for_condition(lambda: os.path.exists(path))
    for taken in range(5):
        # Nothing is made in advance: give it the time in which it would be.
        deadline = time.monotonic() + 0.2
        while time.monotonic() < deadline:
            assert os.path.getsize(path) <= taken + 1
            time.sleep(0.02)
        assert ray.get(next(generator), timeout=20) == taken
