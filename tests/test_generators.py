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
