"""What an attempt leaves behind that died or was given up: its stored results, and the items its generator yielded."""

import mmap
import os
import time

import numpy as np
import pytest
from chaos_helpers import kill, lines, note, until, wait_until_nothing_is_left
from conftest import STORE_BYTES, remember_nodes, wait_for_condition

import ray

pytestmark = pytest.mark.timeout(90)
LARGE = 400_000


@pytest.fixture
def cluster(ray_start):
    ray_start(num_cpus=2, namespace="chaos")


def fatal_array(path):
    """An array that cannot be read: whoever copies it dies of SIGBUS, because its file ended behind its back."""
    with open(path, "wb+") as file:
        file.truncate(LARGE)
        mapped = mmap.mmap(file.fileno(), LARGE, prot=mmap.PROT_READ)
        file.truncate(0)
    return np.frombuffer(mapped, dtype=np.uint8)


@pytest.mark.parametrize("retries", [0, 1])
def test_a_stored_result_of_a_dead_attempt_is_freed(cluster, tmp_path, retries):
    @ray.remote(num_returns=2, max_retries=retries)
    def dies_between_two_results(directory):
        note(os.path.join(directory, "attempts"), os.getpid())
        if len(lines(os.path.join(directory, "attempts"))) == 1:
            return np.ones(LARGE, dtype=np.uint8), fatal_array(os.path.join(directory, "array"))
        return "small", "small"

    first, second = dies_between_two_results.remote(str(tmp_path))
    if retries:
        assert ray.get([first, second], timeout=30) == ["small", "small"]
    else:
        with pytest.raises(ray.exceptions.WorkerCrashedError):
            ray.get(first, timeout=30)
    del first, second
    wait_until_nothing_is_left()


def test_a_stored_result_of_a_dead_actor_is_freed(cluster, tmp_path):
    @ray.remote(num_cpus=0, max_restarts=1, max_task_retries=1)
    class Actor:
        @ray.method(num_returns=2)
        def results(self, directory):
            note(os.path.join(directory, "attempts"), os.getpid())
            if len(lines(os.path.join(directory, "attempts"))) == 1:
                return np.ones(LARGE, dtype=np.uint8), fatal_array(os.path.join(directory, "array"))
            return "small", "small"

    actor = Actor.remote()
    assert ray.get(actor.results.remote(str(tmp_path)), timeout=30) == ["small", "small"]
    del actor
    wait_until_nothing_is_left()


def test_results_before_one_that_does_not_fit_are_freed(cluster):
    @ray.remote(num_returns=2, max_retries=0)
    def two():
        return np.ones(LARGE, dtype=np.uint8), np.ones(4 * STORE_BYTES, dtype=np.uint8)

    first, second = two.remote()
    with pytest.raises(ray.exceptions.RayError):
        ray.get(first, timeout=60)
    del first, second
    wait_until_nothing_is_left()


@pytest.mark.parametrize("backpressure", [None, 1, 3])
@pytest.mark.parametrize("size", [1, LARGE], ids=["inline", "stored"])
def test_a_generator_is_replayed_behind_its_consumer(cluster, tmp_path, backpressure, size):
    options = {} if backpressure is None else {"_generator_backpressure_num_objects": backpressure}

    @ray.remote(max_retries=2, **options)
    def items(path):
        for i in range(12):
            if i == 6 and not lines(path):
                note(path, os.getpid())
                time.sleep(100)
            yield np.full(size, i, dtype=np.uint8)

    path = str(tmp_path / "pid")
    stream = items.remote(path)
    # As many as it takes for the generator to come to the point where it waits.
    taken = {None: 5, 1: 6, 3: 4}[backpressure]
    values = [int(ray.get(next(stream), timeout=30)[0]) for _ in range(taken)]
    kill(int(until(lambda: lines(path))[0]))
    # Whatever had arrived is still there, what comes again is dropped, and the rest follows.
    values += [int(ray.get(reference, timeout=30)[0]) for reference in stream]
    assert values == list(range(12))
    del stream
    wait_until_nothing_is_left()


def test_items_that_were_kept_or_dropped_are_not_disturbed_by_a_replay(cluster, tmp_path):
    @ray.remote(max_retries=1)
    def items(path):
        for i in range(8):
            if i == 6 and not lines(path):
                note(path, os.getpid())
                time.sleep(100)
            yield np.full(LARGE, i, dtype=np.uint8)

    path = str(tmp_path / "pid")
    stream = items.remote(path)
    kept = [next(stream) for _ in range(4)]
    view = ray.get(kept[2], timeout=30)
    del kept[0]
    kill(int(until(lambda: lines(path))[0]))
    rest = list(stream)
    assert [int(ray.get(reference, timeout=30)[0]) for reference in [*kept, *rest]] == [1, 2, 3, 4, 5, 6, 7]
    assert int(view.sum()) == 2 * LARGE
    del kept, rest, stream, view
    wait_until_nothing_is_left()


def test_a_replay_with_fewer_items_is_an_error(cluster, tmp_path):
    @ray.remote(max_retries=1)
    def items(path):
        again = bool(lines(path))
        for i in range(2 if again else 5):
            yield i
        if not again:
            note(path, os.getpid())
            time.sleep(100)

    path = str(tmp_path / "pid")
    stream = items.remote(path)
    pid = int(until(lambda: lines(path))[0])
    assert ray.get(next(stream), timeout=30) == 0
    kill(pid)
    values = []
    with pytest.raises(ray.exceptions.RayError, match="yielded 2 items, but 5 had arrived"):
        for reference in stream:
            values.append(ray.get(reference, timeout=30))
    assert values == [1, 2, 3, 4]
    del stream, reference
    wait_until_nothing_is_left()


def test_a_generator_with_retried_exceptions_and_backpressure(cluster, tmp_path):
    @ray.remote(max_retries=2, retry_exceptions=True, _generator_backpressure_num_objects=2)
    def items(path):
        for i in range(8):
            if i == 4 and len(lines(path)) < 2:
                note(path, i)
                raise ValueError(i)
            yield i

    stream = items.remote(str(tmp_path / "attempts"))
    assert [ray.get(reference, timeout=30) for reference in stream] == list(range(8))
    del stream
    wait_until_nothing_is_left()


def test_lost_items_of_a_finished_generator_are_made_again(cluster_factory, tmp_path):
    cluster = cluster_factory(num_cpus=1)
    node = cluster.add_node(num_cpus=1, resources={"spot": 1}, object_store_memory=STORE_BYTES)
    ray.init(address=cluster.address, log_to_driver=False)
    remember_nodes()
    path = str(tmp_path / "runs")

    @ray.remote(resources={"spot": 1}, max_retries=3, _generator_backpressure_num_objects=2)
    def items():
        note(path, os.getpid())
        for i in range(6):
            yield np.full(LARGE, i, dtype=np.uint8)

    stream = items.remote()
    references = list(stream)
    del references[1]
    cluster.remove_node(node, allow_graceful=False)
    node = cluster.add_node(num_cpus=1, resources={"spot": 1}, object_store_memory=STORE_BYTES)
    remember_nodes()
    assert [int(array[0]) for array in ray.get(references, timeout=40)] == [0, 2, 3, 4, 5]
    assert len(lines(path)) == 2
    del references, stream
    wait_for_condition(lambda: ray.cluster_resources().get("spot") == 1)
    wait_until_nothing_is_left()
