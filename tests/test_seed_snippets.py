"""Programs as the documents that describe Ray show them, run as they stand."""

import asyncio
import math

import numpy as np
import pytest
from conftest import run_program, wait_for_condition

import ray

pytestmark = pytest.mark.usefixtures("ray_module")


def test_counter():
    @ray.remote
    class Counter:
        def __init__(self, start=0):
            self.value = start

        def increment(self):
            self.value += 1
            return self.value

    counter = Counter.remote(start=10)
    assert ray.get(counter.increment.remote()) == 11


def test_streaming_generator():
    @ray.remote(num_returns="streaming")
    def generate():
        for i in range(10):
            yield i

    gen = generate.remote()
    assert [ray.get(ref) for ref in gen] == list(range(10))


def test_dynamic_generator_iterated_directly():
    @ray.remote(num_returns="dynamic")
    def generate_data(n):
        for i in range(n):
            yield ray.put(i)

    gen = generate_data.remote(100)
    values = []
    for ref in gen:
        value = ray.get(ref)
        values.append(ray.get(value) if isinstance(value, ray.ObjectRef) else value)
    assert values == list(range(100))


def test_runtime_context():
    @ray.remote
    def facts():
        ctx = ray.get_runtime_context()
        return (
            ctx.get_node_id(),
            ctx.get_task_id(),
            ctx.get_actor_id(),
            ctx.get_job_id(),
            ctx.get_runtime_env(),
        )

    node, task, actor, job, env = ray.get(facts.remote())
    assert node and task and job and actor is None and isinstance(env, dict)
    assert isinstance(ray.get_runtime_context().get_runtime_env(), dict)


def test_was_reconstructed_in_the_driver_is_false():
    assert ray.get_runtime_context().was_current_actor_reconstructed is False


def test_parallel_tasks():
    @ray.remote
    def train_model(config):
        return {"loss": 0.1, "config": config}

    futures = [train_model.remote({"lr": lr}) for lr in [0.1, 0.01, 0.001, 0.0001]]
    results = ray.get(futures)
    assert [result["config"]["lr"] for result in results] == [0.1, 0.01, 0.001, 0.0001]


def test_resource_options_can_be_declared_and_overridden():
    @ray.remote(num_cpus=4)
    def cpu_task(): ...

    @ray.remote(num_gpus=1)
    def gpu_task(): ...

    @ray.remote(num_gpus=2, memory=16 * 1024**3)
    def large_gpu_task(): ...

    @ray.remote(resources={"TPU": 1})
    def tpu_task(): ...

    assert ray.get(cpu_task.remote(), timeout=30) is None
    assert ray.get(gpu_task.options(num_gpus=0).remote(), timeout=30) is None
    assert large_gpu_task is not None and tpu_task is not None


def test_task_options():
    @ray.remote(num_cpus=1, num_gpus=0, memory=0, max_retries=3, retry_exceptions=[ConnectionError])
    def robust():
        return "ok"

    assert ray.get(robust.remote(), timeout=30) == "ok"


def test_objects():
    @ray.remote
    def process(data):
        return float(data.sum())

    large_data = ray.put(np.zeros((1000, 1000)))
    result = process.remote(large_data)
    assert ray.get(result) == 0.0
    futures = [process.remote(large_data) for _ in range(3)]
    ready, not_ready = ray.wait(futures, num_returns=1, timeout=5.0)
    assert len(ready) == 1 and len(not_ready) == 2


def test_arrays_from_the_store_are_read_only():
    array = ray.get(ray.put(np.zeros(100_000)))
    with pytest.raises(ValueError, match="read-only"):
        array[0] = 1
    copy = array.copy()
    copy[0] = 1


def test_named_detached_actor():
    @ray.remote
    class Counter:
        def get(self):
            return 42

    counter = Counter.options(name="global_counter", lifetime="detached").remote()
    counter = ray.get_actor("global_counter")
    assert ray.get(counter.get.remote()) == 42
    ray.kill(counter)


def test_async_actor():
    @ray.remote(max_concurrency=10)
    class AsyncWorker:
        async def fetch(self, url):
            await asyncio.sleep(0.01)
            return url

    worker = AsyncWorker.remote()
    assert ray.get([worker.fetch.remote(i) for i in range(20)]) == list(range(20))


def test_register_serializer():
    class MyClass:
        def __init__(self, x):
            self.x = x

    def my_serialize(value):
        return value.x

    def my_deserialize(data):
        return MyClass(data)

    ray.util.register_serializer(MyClass, serializer=my_serialize, deserializer=my_deserialize)
    assert ray.get(ray.put(MyClass(3))).x == 3
    ray.util.deregister_serializer(MyClass)


def test_placement_group_snippet():
    from ray.util.placement_group import placement_group, remove_placement_group
    from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

    pg = placement_group([{"CPU": 1}] * 4, strategy="PACK")
    ray.get(pg.ready(), timeout=30)

    @ray.remote(num_cpus=1)
    def train_worker(rank):
        return rank

    futures = [
        train_worker.options(
            scheduling_strategy=PlacementGroupSchedulingStrategy(placement_group=pg, placement_group_bundle_index=i)
        ).remote(i)
        for i in range(4)
    ]
    assert ray.get(futures, timeout=30) == [0, 1, 2, 3]
    remove_placement_group(pg)
    wait_for_condition(lambda: ray.available_resources().get("CPU") == 4)


def test_node_affinity_snippet():
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    @ray.remote
    def task():
        return 1

    assert ray.get(task.options(scheduling_strategy="DEFAULT").remote()) == 1
    assert ray.get(task.options(scheduling_strategy="SPREAD").remote()) == 1
    strategy = NodeAffinitySchedulingStrategy(node_id=ray.get_runtime_context().get_node_id(), soft=False)
    assert ray.get(task.options(scheduling_strategy=strategy).remote()) == 1


def test_exceptions_of_the_documents_exist():
    for name in (
        "RayError RayTaskError RayActorError ObjectLostError ObjectFetchTimedOutError GetTimeoutError "
        "TaskCancelledError"
    ).split():
        assert issubclass(getattr(ray.exceptions, name), Exception)


def test_a_program_that_estimates_pi():
    output = run_program(
        """
import random
import ray

ray.init("local", num_cpus=2, object_store_memory=80 << 20)

@ray.remote
class ProgressActor:
    def __init__(self, total):
        self.total, self.done = total, {}
    def report_progress(self, task, done):
        self.done[task] = done
    def get_progress(self):
        return sum(self.done.values()) / self.total

@ray.remote
def sample(n, task, progress):
    inside = 0
    for i in range(n):
        x, y = random.uniform(-1, 1), random.uniform(-1, 1)
        if math.hypot(x, y) <= 1:
            inside += 1
        if (i + 1) % 1000 == 0:
            progress.report_progress.remote(task, i + 1)
    progress.report_progress.remote(task, n)
    return inside

import math
progress = ProgressActor.remote(4 * 5000)
results = [sample.remote(5000, i, progress) for i in range(4)]
inside = sum(ray.get(results))
while ray.get(progress.get_progress.remote()) < 1:
    pass
print("pi is", 4 * inside / 20000)
ray.shutdown()
"""
    ).stdout
    estimate = float(output.split("pi is")[1].split()[0])
    assert abs(estimate - math.pi) < 0.1
