"""SIGKILL of workers, actors and the zygote: who runs again, who is charged, and what the errors say."""

import os
import time

import pytest
from chaos_helpers import actor_record, kill, lines, node_answer, note, until, wait_until_nothing_is_left, worker_pids

import ray

pytestmark = pytest.mark.timeout(60)


@pytest.fixture
def cluster(ray_start):
    ray_start(num_cpus=2, namespace="chaos")


@ray.remote
class Counter:
    """An actor that notes each call."""

    def __init__(self, path=None):
        self.value = 0
        if path:
            note(path, os.getpid())

    def next(self):
        self.value += 1
        return self.value

    def pid(self):
        return os.getpid()

    def sleep_once(self, path):
        note(path, os.getpid())
        if len(lines(path)) == 1:
            time.sleep(100)
        return len(lines(path))


def test_the_error_tells_the_signal_and_the_last_lines(cluster, tmp_path):
    @ray.remote(max_retries=0)
    def speak(path):
        print("the famous last words")
        note(path, os.getpid())
        time.sleep(100)

    path = str(tmp_path / "pid")
    reference = speak.remote(path)
    kill(int(until(lambda: lines(path))[0]))
    started = time.monotonic()
    with pytest.raises(ray.exceptions.WorkerCrashedError) as caught:
        ray.get(reference, timeout=30)
    assert time.monotonic() - started < 5
    assert "SIGKILL" in str(caught.value)
    assert "the famous last words" in str(caught.value)
    del reference, caught
    wait_until_nothing_is_left()


def test_retries_are_counted(cluster, tmp_path):
    @ray.remote(max_retries=2)
    def doomed(path):
        note(path, os.getpid())
        kill(os.getpid())
        time.sleep(100)

    path = str(tmp_path / "runs")
    with pytest.raises(ray.exceptions.WorkerCrashedError):
        ray.get(doomed.remote(path), timeout=30)
    assert len(lines(path)) == 3


def test_unstarted_calls_are_not_charged(cluster, tmp_path):
    # Behind the first calls others wait in the workers' pipelines. They may not be retried at all, so they come through
    # only if a call that had not started is resubmitted free of charge; and none may run twice.
    @ray.remote(max_retries=0)
    def block(path):
        note(path, os.getpid())
        time.sleep(100)

    @ray.remote(max_retries=0)
    def quick(path, i):
        note(path, i)
        return i

    blocked = str(tmp_path / "blocked")
    ran = str(tmp_path / "ran")
    ray.get([quick.remote(str(tmp_path / "warm"), i) for i in range(200)], timeout=30)
    for _ in range(3):
        for path in (blocked, ran):
            if os.path.exists(path):
                os.unlink(path)
        blockers = [block.remote(blocked) for _ in range(2)]
        references = [quick.remote(ran, i) for i in range(50)]
        until(lambda: len(lines(blocked)) == 2)
        for pid in lines(blocked):
            kill(int(pid))
        assert ray.get(references, timeout=30) == list(range(50))
        assert sorted(map(int, lines(ran))) == list(range(50))
        for blocker in blockers:
            with pytest.raises(ray.exceptions.WorkerCrashedError):
                ray.get(blocker, timeout=30)


def test_a_pipeline_of_one_class(cluster, tmp_path):
    # All calls are of one function, so that they share a lease's pipeline; one of them kills its worker.
    @ray.remote(max_retries=0)
    def work(path, i):
        note(path, i)
        if i == 100:
            time.sleep(0.05)  # The pipeline fills behind it.
            kill(os.getpid())
            time.sleep(100)
        return i

    path = str(tmp_path / "ran")
    references = [work.remote(path, i) for i in range(400)]
    failed = []
    for i, reference in enumerate(references):
        try:
            assert ray.get(reference, timeout=30) == i
        except ray.exceptions.WorkerCrashedError:
            failed.append(i)
    assert failed == [100]
    assert sorted(map(int, lines(path))) == list(range(400))
    del references, reference
    wait_until_nothing_is_left()


def test_results_in_the_store_outlive_their_worker(cluster):
    import numpy as np

    @ray.remote
    def make():
        return np.arange(300_000), os.getpid()

    @ray.remote(num_returns=2)
    def two():
        return np.arange(300_000), os.getpid()

    array, pid = two.remote()
    kill(ray.get(pid, timeout=30))
    assert int(ray.get(array, timeout=30)[-1]) == 299_999


def test_an_actor_restarts_as_often_as_allowed(cluster, tmp_path):
    path = str(tmp_path / "starts")
    actor = Counter.options(max_restarts=2, max_task_retries=-1).remote(path)
    for _ in range(2):
        pid = ray.get(actor.pid.remote(), timeout=30)
        kill(pid)
        assert ray.get(actor.next.remote(), timeout=30) == 1
    assert len(lines(path)) == 3
    kill(ray.get(actor.pid.remote(), timeout=30))
    with pytest.raises(ray.exceptions.ActorDiedError, match="SIGKILL"):
        ray.get(actor.next.remote(), timeout=30)
    assert len(lines(path)) == 3


def test_a_call_in_an_actor_is_retried(cluster, tmp_path):
    path = str(tmp_path / "calls")
    actor = Counter.options(max_restarts=1, max_task_retries=1).remote()
    reference = actor.sleep_once.remote(path)
    kill(int(until(lambda: lines(path))[0]))
    assert ray.get(reference, timeout=30) == 2


def test_a_call_without_retries_fails_and_the_actor_comes_back(cluster, tmp_path):
    path = str(tmp_path / "calls")
    actor = Counter.options(max_restarts=1).remote()
    running = actor.sleep_once.remote(path)
    kill(int(until(lambda: lines(path))[0]))
    with pytest.raises(ray.exceptions.RayActorError):
        ray.get(running, timeout=30)

    def answers():
        try:
            return ray.get(actor.next.remote(), timeout=10)
        except ray.exceptions.ActorUnavailableError:
            return None

    assert until(answers, timeout=20) == 1


def test_the_cause_of_an_actors_death(cluster):
    actor = Counter.remote()
    pid = ray.get(actor.pid.remote(), timeout=30)
    kill(pid)
    until(lambda one=actor: actor_record(one)["State"] == "DEAD")
    cause = actor_record(actor)["DeathCause"]
    assert cause["signal"] == 9 and cause["pid"] == pid
    with pytest.raises(ray.exceptions.ActorDiedError) as caught:
        ray.get(actor.next.remote(), timeout=30)
    assert "SIGKILL" in str(caught.value) and str(pid) in str(caught.value)
    del actor, caught
    wait_until_nothing_is_left()


def test_an_actor_killed_in_its_constructor(cluster, tmp_path):
    @ray.remote(max_restarts=1, max_task_retries=-1)
    class Slow:
        def __init__(self, path):
            note(path, os.getpid())
            if len(lines(path)) == 1:
                time.sleep(100)

        def runs(self, path):
            return len(lines(path))

    path = str(tmp_path / "starts")
    actor = Slow.remote(path)
    reference = actor.runs.remote(path)
    kill(int(until(lambda: lines(path))[0]))
    assert ray.get(reference, timeout=30) == 2


def test_the_zygote_twice(cluster):
    actor = Counter.options(num_cpus=0).remote()
    pid = ray.get(actor.pid.remote(), timeout=30)
    for _ in range(2):
        zygote = until(lambda: node_answer("stats")["zygote_pid"])
        before = worker_pids()
        kill(zygote)
        until(lambda: node_answer("stats")["zygote_pid"] not in (None, zygote))  # noqa: B023
        assert ray.get(actor.pid.remote(), timeout=30) == pid
        # The raylet keeps some workers ready, so that only more actors than those need the new zygote.
        fresh = [Counter.options(num_cpus=0).remote() for _ in range(len(before) + 2)]
        pids = ray.get([one.pid.remote() for one in fresh], timeout=30)
        assert len(set(pids)) == len(fresh) and len(set(pids) - before) >= 2
        kill(pids[0])
        with pytest.raises(ray.exceptions.RayActorError):
            while True:
                ray.get(fresh[0].pid.remote(), timeout=10)
        del fresh
    del actor
    wait_until_nothing_is_left()


def test_adopted_workers_die_visibly(cluster, tmp_path):
    # After the zygote's death its workers are the raylet's to reap.
    @ray.remote(max_retries=0)
    def wait(path):
        note(path, os.getpid())
        time.sleep(100)

    path = str(tmp_path / "pid")
    reference = wait.remote(path)
    pid = int(until(lambda: lines(path))[0])
    zygote = node_answer("stats")["zygote_pid"]
    kill(zygote)
    until(lambda: node_answer("stats")["zygote_pid"] not in (None, zygote))
    kill(pid)
    with pytest.raises(ray.exceptions.WorkerCrashedError, match="SIGKILL"):
        ray.get(reference, timeout=30)
    until(lambda: not os.path.exists(f"/proc/{pid}"))


def test_a_worker_that_owned_a_borrowed_object(cluster):
    import numpy as np

    @ray.remote
    class Owner:
        def make(self):
            return [ray.put(np.ones(200_000))], os.getpid()

    owner = Owner.remote()
    (reference,), pid = ray.get(owner.make.remote(), timeout=30)
    assert ray.get(reference, timeout=30).sum() == 200_000
    kill(pid)
    until(lambda: pid not in worker_pids())
    with pytest.raises(ray.exceptions.OwnerDiedError):
        while True:
            ray.get(reference, timeout=20)
            time.sleep(0.05)
    del reference, owner
    wait_until_nothing_is_left()


def test_a_killed_borrower_counts_as_done(cluster):
    import numpy as np

    @ray.remote
    class Keeper:
        def keep(self, references):
            self.references = references
            return os.getpid()

    reference = ray.put(np.ones(200_000))
    keeper = Keeper.remote()
    pid = ray.get(keeper.keep.remote([reference]), timeout=30)
    del reference
    time.sleep(0.2)
    assert node_answer("memory")["ledger"]["primaries"] > 0
    kill(pid)
    del keeper
    wait_until_nothing_is_left()


def test_a_generator_goes_on_after_its_worker(cluster, tmp_path):
    @ray.remote(max_retries=2)
    def items(path):
        for i in range(10):
            if i == 5 and not lines(path):
                note(path, os.getpid())
                time.sleep(100)
            yield i

    path = str(tmp_path / "pid")
    stream = items.remote(path)
    assert [ray.get(next(stream), timeout=30) for _ in range(5)] == list(range(5))
    kill(int(until(lambda: lines(path))[0]))
    assert [ray.get(reference, timeout=30) for reference in stream] == list(range(5, 10))
    del stream
    wait_until_nothing_is_left()
