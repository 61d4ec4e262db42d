"""ray.util: pools, queue, helpers, metrics, state; internal_kv; tqdm_ray."""

import asyncio
import time

import pytest
from conftest import wait_for_condition

import ray
from ray.util import ActorPool, as_completed, map_unordered
from ray.util.queue import Empty, Full, Queue

pytestmark = pytest.mark.usefixtures("ray_module")


@ray.remote(num_cpus=0)
class Doubler:
    def double(self, x):
        return 2 * x

    def after(self, seconds):
        time.sleep(seconds)
        return seconds

    def fail(self, x):
        raise ValueError(x)


@ray.remote
def square(x):
    return x * x


class TestActorPool:
    @pytest.fixture
    def pool(self):
        return ActorPool([Doubler.remote(), Doubler.remote()])

    def test_map(self, pool):
        assert list(pool.map(lambda actor, value: actor.double.remote(value), range(10))) == list(range(0, 20, 2))
        values = pool.map_unordered(lambda actor, value: actor.double.remote(value), range(10))
        assert sorted(values) == list(range(0, 20, 2))

    def test_order_and_mixing(self, pool):
        for value in (0.4, 0, 0):
            pool.submit(lambda actor, v: actor.after.remote(v), value)
        assert pool.get_next_unordered(timeout=20) == 0
        assert pool.get_next(timeout=20) == 0.4
        assert pool.get_next(timeout=20) == 0
        assert not pool.has_next()
        with pytest.raises(StopIteration):
            pool.get_next()
        with pytest.raises(StopIteration):
            pool.get_next_unordered()

    def test_timeouts(self, pool):
        pool.submit(lambda actor, v: actor.after.remote(v), 5)
        with pytest.raises(TimeoutError):
            pool.get_next(timeout=0.05)
        assert pool.has_next()
        with pytest.raises(TimeoutError, match="ignored"):
            pool.get_next(timeout=0.05, ignore_if_timedout=True)
        assert not pool.has_next() and pool.has_free()

    def test_failures_give_the_actor_back(self, pool):
        pool.submit(lambda actor, v: actor.fail.remote(v), "bad")
        with pytest.raises(ValueError, match="bad"):
            pool.get_next()
        assert pool.has_free()

    def test_push_and_pop(self, pool):
        first, second = pool.pop_idle(), pool.pop_idle()
        assert pool.pop_idle() is None and not pool.has_free()
        pool.submit(lambda actor, v: actor.double.remote(v), 4)
        pool.push(first)
        with pytest.raises(ValueError):
            pool.push(first)
        assert pool.get_next(timeout=20) == 8
        pool.push(second)
        assert pool.has_free()


class TestQueue:
    def test_order_and_sizes(self):
        queue = Queue(maxsize=2)
        assert queue.empty() and not queue.full()
        queue.put(1)
        queue.put(2)
        assert queue.full() and len(queue) == queue.size() == queue.qsize() == 2
        assert queue.get() == 1 and queue.get() == 2
        queue.shutdown()

    def test_full_and_empty(self):
        queue = Queue(maxsize=1)
        with pytest.raises(Empty):
            queue.get_nowait()
        with pytest.raises(Empty):
            queue.get(timeout=0.05)
        queue.put(1)
        with pytest.raises(Full):
            queue.put_nowait(2)
        with pytest.raises(Full):
            queue.put(2, timeout=0.05)
        with pytest.raises(Full):
            queue.put(2, block=False)
        with pytest.raises(ValueError):
            queue.get(timeout=-1)
        with pytest.raises(ValueError):
            queue.put(1, timeout=-1)
        queue.shutdown(force=True)

    def test_batches(self):
        queue = Queue(maxsize=3)
        queue.put_nowait_batch([1, 2])
        with pytest.raises(Full):
            queue.put_nowait_batch([3, 4])
        with pytest.raises(Empty):
            queue.get_nowait_batch(3)
        assert queue.get_nowait_batch(2) == [1, 2]
        with pytest.raises(TypeError):
            queue.put_nowait_batch(1)
        with pytest.raises(TypeError):
            queue.get_nowait_batch("1")
        queue.shutdown()

    def test_between_tasks(self):
        queue = Queue(maxsize=4)

        @ray.remote
        def produce(queue, n):
            for i in range(n):
                queue.put(i, timeout=30)

        @ray.remote
        def consume(queue, n):
            return sum(queue.get(timeout=30) for _ in range(n))

        producers = [produce.remote(queue, 20) for _ in range(2)]
        assert ray.get(consume.remote(queue, 40), timeout=60) == 380
        ray.get(producers, timeout=30)
        queue.shutdown()

    def test_async(self):
        queue = Queue()

        async def main():
            await asyncio.gather(*[queue.put_async(i) for i in range(5)])
            return sorted(await asyncio.gather(*[queue.get_async() for _ in range(5)]))

        assert asyncio.run(main()) == [0, 1, 2, 3, 4]
        queue.shutdown()
        with pytest.raises(RuntimeError):
            queue.size()


def test_helpers():
    assert sorted(as_completed([square.remote(i) for i in range(25)])) == sorted(i * i for i in range(25))
    assert sorted(map_unordered(square, range(25), backpressure_size=3)) == sorted(i * i for i in range(25))
    references = list(map_unordered(square, range(3), yield_obj_refs=True))
    assert sorted(ray.get(references)) == [0, 1, 4]
    with pytest.raises(ValueError):
        list(map_unordered(square, [1], backpressure_size=0))


class TestPool:
    @pytest.fixture
    def pool(self):
        from ray.util.multiprocessing import Pool

        pool = Pool(2)
        yield pool
        pool.terminate()

    def test_maps(self, pool):
        assert pool.map(lambda x: x * x, range(20)) == [x * x for x in range(20)]
        assert pool.starmap(pow, [(2, 3), (3, 2)]) == [8, 9]
        assert list(pool.imap(lambda x: x + 1, range(10), chunksize=3)) == list(range(1, 11))
        assert sorted(pool.imap_unordered(lambda x: x + 1, range(10))) == list(range(1, 11))
        assert pool.apply(pow, (2, 5)) == 32
        assert pool.map(abs, []) == []

    def test_async_and_callbacks(self, pool):
        seen = []
        result = pool.map_async(abs, [-1, -2], callback=seen.append)
        assert result.get(timeout=20) == [1, 2] and result.ready() and result.successful()
        wait_for_condition(lambda: seen == [[1, 2]])
        errors = []

        def bad(x):
            raise ValueError("bad")

        failed = pool.apply_async(bad, (1,), error_callback=errors.append)
        with pytest.raises(ValueError, match="bad"):
            failed.get(timeout=20)
        assert not failed.successful()
        wait_for_condition(lambda: len(errors) == 1)
        with pytest.raises(ValueError):
            pool.map(bad, [1])

    def test_timeouts(self, pool):
        from ray.util.multiprocessing import TimeoutError as PoolTimeoutError

        result = pool.apply_async(time.sleep, (10,))
        with pytest.raises(PoolTimeoutError):
            result.get(timeout=0.05)
        with pytest.raises(ValueError):
            result.successful()

    def test_close_and_join(self, pool):
        with pytest.raises(ValueError):
            pool.join()
        result = pool.map_async(abs, [-3])
        pool.close()
        with pytest.raises(ValueError):
            pool.map(abs, [1])
        pool.join()
        assert result.get(timeout=10) == [3]

    def test_initializer_and_sizes(self):
        from ray.util.multiprocessing import Pool

        def remember(value):
            import builtins

            builtins.pool_value = value

        with Pool(1, initializer=remember, initargs=(5,)) as pool:
            assert pool.apply(lambda: __import__("builtins").pool_value) == 5
        with pytest.raises(ValueError):
            Pool(-1)
        with pytest.raises(ValueError, match="CPUs"):
            Pool(1000)


def test_joblib():
    joblib = pytest.importorskip("joblib")
    from ray.util.joblib import register_ray

    register_ray()
    with joblib.parallel_config(backend="ray", n_jobs=2):
        assert joblib.Parallel()(joblib.delayed(pow)(i, 2) for i in range(10)) == [i * i for i in range(10)]


def test_metrics():
    from ray.util.metrics import Counter, Gauge, Histogram, collect

    counter = Counter("test_requests", "requests", tag_keys=("route",))
    counter.inc(tags={"route": "/"})
    counter.inc(2, tags={"route": "/"})
    for bad in (0, -1):
        with pytest.raises(ValueError):
            counter.inc(bad, tags={"route": "/"})
    with pytest.raises(ValueError):
        counter.inc()
    with pytest.raises(ValueError):
        counter.inc(tags={"other": "x"})
    with pytest.raises(TypeError):
        counter.inc(tags={"route": 1})
    counter.set_default_tags({"route": "/x"}).inc()
    gauge = Gauge("test_length")
    gauge.set(3)
    gauge.set(2)
    histogram = Histogram("test_latency", boundaries=[1.0, 10.0])
    for value in (0.5, 5, 50):
        histogram.observe(value)
    values = {entry["name"]: entry for entry in collect()}
    assert {v["tags"]["route"]: v["value"] for v in values["test_requests"]["values"]} == {"/": 3, "/x": 1}
    assert values["test_length"]["values"][0]["value"] == 2
    assert values["test_latency"]["values"][0]["value"] == {"counts": [1, 1, 1], "sum": 55.5, "count": 3}
    for bad in ([], [0], [2, 1]):
        with pytest.raises(ValueError):
            Histogram("test_bad", boundaries=bad)
    with pytest.raises(ValueError):
        Counter("")
    with pytest.raises(TypeError):
        Counter("test_tags", tag_keys="route")
    assert counter.info["tag_keys"] == ("route",)


def test_log_once():
    from ray.util.debug import log_once, reset_log_once

    reset_log_once("key of the test")
    assert log_once("key of the test") and not log_once("key of the test")


def test_internal_kv():
    from ray.experimental import internal_kv as kv

    assert kv._internal_kv_initialized()
    assert kv._internal_kv_put("key a", "1") is False
    assert kv._internal_kv_put(b"key a", b"2") is True
    assert kv._internal_kv_get("key a") == b"2"
    assert kv._internal_kv_put("key a", "3", overwrite=False) is True
    assert kv._internal_kv_get("key a") == b"2"
    assert kv._internal_kv_exists("key a") and not kv._internal_kv_exists("key b")
    assert kv._internal_kv_get("key a", namespace="other") is None
    kv._internal_kv_put("key b", "4")
    assert sorted(kv._internal_kv_list("key ")) == [b"key a", b"key b"]
    assert kv._internal_kv_del("key ", del_by_prefix=True) == 2
    assert kv._internal_kv_get("key a") is None
    with pytest.raises(TypeError):
        kv._internal_kv_put(1, "x")

    @ray.remote
    def read():
        return kv._internal_kv_get("from the driver")

    kv._internal_kv_put("from the driver", "seen")
    assert ray.get(read.remote(), timeout=20) == b"seen"


def test_tqdm(capsys):
    from ray.experimental import tqdm_ray

    assert list(tqdm_ray.tqdm(range(5), desc="counting", flush_interval_s=0)) == list(range(5))
    assert "counting" in capsys.readouterr().err


def test_state_of_nodes_actors_jobs_groups_and_workers():
    from ray.util import state
    from ray.util.placement_group import placement_group, remove_placement_group

    (node,) = state.list_nodes(detail=True)
    assert node.state == "ALIVE" and node["is_head_node"] and node.resources_total["CPU"] == 4
    assert state.get_node(node.node_id).node_id == node.node_id
    actor = Doubler.options(name="seen", namespace="state").remote()
    ray.get(actor.double.remote(1))
    (row,) = state.list_actors(filters=[("name", "=", "seen"), ("state", "=", "ALIVE")], detail=True)
    assert row.class_name == "Doubler" and row.pid > 0 and row.ray_namespace == "state"
    assert state.get_actor(row.actor_id).name == "seen"
    assert state.list_actors(filters=[("name", "=", "nobody")]) == []
    assert state.summarize_actors()["cluster"]["total_actors"] >= 1
    assert any(job.status == "RUNNING" for job in state.list_jobs())
    group = placement_group([{"CPU": 1}], name="seen")
    ray.get(group.ready(), timeout=20)
    (found,) = state.list_placement_groups(filters=[("name", "=", "seen")], detail=True)
    assert found.state == "CREATED" and found.placement_group_id == group.id.hex()
    remove_placement_group(group)
    workers = state.list_workers()
    assert row.pid in {worker.pid for worker in workers}
    with pytest.raises(NotImplementedError):
        state.list_tasks()
    with pytest.raises(ValueError):
        state.list_actors(filters=[("name", "like", "x")])
    with pytest.raises(ValueError):
        state.list_actors(limit=0)
    with pytest.raises(Exception, match="limit"):
        Doubler.remote()
        state.list_actors(limit=1)
    ray.kill(actor)


def test_logs():
    from ray.util import state

    @ray.remote(num_cpus=0)
    class Talker:
        def talk(self):
            import os

            print("a line for the log", flush=True)
            return os.getpid()

    talker = Talker.remote()
    pid = ray.get(talker.talk.remote())
    files = state.list_logs()
    assert "raylet" in files and "gcs_server" in files
    wait_for_condition(lambda: "a line for the log" in "".join(state.get_log(pid=pid)))
    assert "a line for the log" in "".join(state.get_log(actor_id=talker._actor_id.hex(), tail=10))
    with pytest.raises(FileNotFoundError):
        list(state.get_log(filename="nothing"))
    with pytest.raises(ValueError):
        state.get_log(filename="../gcs")


def test_full_and_empty_are_plain():
    shared = Queue(maxsize=1, actor_options={"num_cpus": 0})
    with pytest.raises(Empty) as caught:
        shared.get_nowait()
    assert type(caught.value) is Empty
    shared.put(1)
    for full in (lambda: shared.put_nowait(2), lambda: shared.put(2, timeout=0.05)):
        with pytest.raises(Full) as caught:
            full()
        assert type(caught.value) is Full
    shared.shutdown(force=True)
