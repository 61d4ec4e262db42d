"""Tasks: calls, options, several returns, nesting, references as arguments, closures, output, runtime context."""

import os
import sys
import threading
import time

import pytest
from conftest import run_program, wait_for_condition

import ray

pytestmark = pytest.mark.usefixtures("ray_module")


@ray.remote
def add(a, b=1):
    return a + b


@ray.remote
def identity(value):
    return value


def test_a_call_returns_a_reference_and_get_its_value():
    reference = add.remote(1, b=2)
    assert isinstance(reference, ray.ObjectRef)
    assert ray.get(reference) == 3
    assert ray.get(reference) == 3


def test_get_of_a_list_keeps_its_order():
    assert ray.get([add.remote(i) for i in range(50)]) == list(range(1, 51))
    assert ray.get([]) == []


def test_many_calls_from_many_threads():
    results = {}

    def call(number):
        results[number] = ray.get([add.remote(number, i) for i in range(20)])

    threads = [threading.Thread(target=call, args=(n,)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert results == {n: [n + i for i in range(20)] for n in range(8)}


def test_several_returns():
    @ray.remote(num_returns=3)
    def three():
        return 1, 2, 3

    @ray.remote
    def pair():
        return 1, 2

    references = three.remote()
    assert len(references) == 3 and ray.get(references) == [1, 2, 3]
    assert ray.get(pair.options(num_returns=2).remote()) == [1, 2]
    assert pair.options(num_returns=0).remote() is None


def test_a_wrong_number_of_returns_is_an_error():
    @ray.remote(num_returns=3)
    def two():
        return 1, 2

    with pytest.raises(ValueError, match="3"):
        ray.get(two.remote())


def test_references_as_arguments_arrive_as_values():
    assert ray.get(add.remote(add.remote(1), add.remote(2))) == 5
    reference = ray.put(10)
    assert ray.get(add.remote(reference, b=reference)) == 20


def test_references_inside_containers_arrive_as_references():
    @ray.remote
    def kinds(items):
        return [type(item).__name__ for item in items], ray.get(items[0])

    assert ray.get(kinds.remote([ray.put(7), 8])) == (["ObjectRef", "int"], 7)


def test_a_returned_reference_outlives_its_task():
    @ray.remote
    def make():
        return [ray.put("kept")]

    inner = ray.get(make.remote())[0]
    assert ray.get(inner) == "kept"


def test_a_long_chain():
    reference = add.remote(0)
    for _ in range(99):
        reference = add.remote(reference)
    assert ray.get(reference) == 100


def test_nested_tasks_do_not_deadlock_with_few_cpus():
    @ray.remote
    def fibonacci(n):
        if n < 2:
            return n
        return sum(ray.get([fibonacci.remote(n - 1), fibonacci.remote(n - 2)]))

    assert ray.get(fibonacci.remote(7), timeout=60) == 13


def test_closures_are_captured_at_the_first_call():
    factor = 3

    @ray.remote
    def scale(x):
        return x * factor

    assert ray.get(scale.remote(2)) == 6
    assert ray.get(ray.remote(lambda x: x + factor).remote(1)) == 4


def test_a_function_can_be_defined_again():
    for number in range(5):

        @ray.remote
        def current():
            return number  # noqa: B023

        assert ray.get(current.remote()) == number


def test_recursive_use_of_remote_functions_and_handles():
    @ray.remote
    def call(function, value):
        return ray.get(function.remote(value))

    assert ray.get(call.remote(add, 4)) == 5


def test_wait_splits_ready_from_not_ready():
    @ray.remote
    def after(seconds):
        time.sleep(seconds)
        return seconds

    slow, fast = after.remote(20), after.remote(0)
    ready, rest = ray.wait([slow, fast], num_returns=1, timeout=15)
    assert ready == [fast] and rest == [slow]
    ready, rest = ray.wait([slow], timeout=0)
    assert ready == [] and rest == [slow]
    ray.cancel(slow, force=True)


def test_wait_keeps_the_order_of_its_arguments():
    references = [ray.put(i) for i in range(10)]
    ready, rest = ray.wait(references, num_returns=10, timeout=10)
    assert ready == references and rest == []
    ready, rest = ray.wait(references, num_returns=4, timeout=10)
    assert len(ready) == 4 and ready + rest == references


def test_get_with_a_timeout():
    @ray.remote
    def forever():
        time.sleep(60)

    reference = forever.remote()
    started = time.monotonic()
    with pytest.raises(ray.exceptions.GetTimeoutError):
        ray.get(reference, timeout=0.2)
    assert time.monotonic() - started < 5
    with pytest.raises(TimeoutError):
        ray.get(reference, timeout=0)
    ray.cancel(reference, force=True)


def test_cancel_a_running_task():
    @ray.remote
    def sleep():
        time.sleep(60)

    reference = sleep.remote()
    wait_for_condition(lambda: ray.available_resources().get("CPU", 0) < 4)
    ray.cancel(reference)
    with pytest.raises(ray.exceptions.TaskCancelledError):
        ray.get(reference, timeout=20)


def test_cancel_a_queued_task():
    @ray.remote(num_cpus=4)
    def sleep():
        time.sleep(60)

    running, queued = sleep.remote(), sleep.remote()
    ray.cancel(queued)
    with pytest.raises(ray.exceptions.TaskCancelledError):
        ray.get(queued, timeout=20)
    ray.cancel(running, force=True)
    with pytest.raises((ray.exceptions.TaskCancelledError, ray.exceptions.WorkerCrashedError)):
        ray.get(running, timeout=20)


def test_resources_bound_how_much_runs_at_once():
    @ray.remote(num_cpus=2)
    class Counter:
        def __init__(self):
            self.now = self.most = 0

        def enter(self):
            self.now += 1
            self.most = max(self.most, self.now)

        def leave(self):
            self.now -= 1
            return self.most

        def peak(self):
            return self.most

    counter = Counter.options(num_cpus=0).remote()

    @ray.remote(num_cpus=2)
    def work():
        ray.get(counter.enter.remote())
        time.sleep(0.1)
        ray.get(counter.leave.remote())

    # A task that blocks in get gives back its CPU, so that more than two can be inside; never more than all six.
    ray.get([work.remote() for _ in range(6)], timeout=60)
    assert 1 <= ray.get(counter.peak.remote()) <= 6


def test_fractional_cpus_run_together():
    @ray.remote(num_cpus=0.5)
    def meet(path, wanted):
        import os
        import time

        open(os.path.join(path, str(os.getpid())), "w").close()
        deadline = time.monotonic() + 30
        while len(os.listdir(path)) < wanted:
            if time.monotonic() > deadline:
                return False
            time.sleep(0.01)
        return True

    import tempfile

    with tempfile.TemporaryDirectory() as path:
        assert all(ray.get([meet.remote(path, 8) for _ in range(8)], timeout=60))


def test_cluster_and_available_resources():
    total = ray.cluster_resources()
    assert total["CPU"] == 4
    assert total["object_store_memory"] == 80 * 1024 * 1024
    assert total["node:__internal_head__"] == 1
    wait_for_condition(lambda: ray.available_resources().get("CPU") == 4)

    @ray.remote(num_cpus=3)
    def hold(path):
        import os
        import time

        while not os.path.exists(path):
            time.sleep(0.01)

    import tempfile

    with tempfile.TemporaryDirectory() as directory:
        path = os.path.join(directory, "go")
        reference = hold.remote(path)
        wait_for_condition(lambda: ray.available_resources().get("CPU") == 1)
        open(path, "w").close()
        ray.get(reference, timeout=30)
    wait_for_condition(lambda: ray.available_resources().get("CPU") == 4)


def test_nodes():
    (node,) = ray.nodes()
    assert node["Alive"] and node["alive"]
    assert node["NodeID"] == ray.get_runtime_context().get_node_id()
    assert node["Resources"]["CPU"] == 4
    assert node["Labels"]["ray.io/node-id"] == node["NodeID"]


def test_runtime_context_in_a_task_and_in_the_driver():
    @ray.remote
    def facts():
        context = ray.get_runtime_context()
        return (
            context.get_job_id(),
            context.get_node_id(),
            context.get_task_id(),
            context.get_actor_id(),
            context.get_assigned_resources(),
            os.getpid(),
        )

    job, node, task, actor, resources, pid = ray.get(facts.remote())
    context = ray.get_runtime_context()
    assert job == context.get_job_id() and node == context.get_node_id()
    assert len(task) == 48 and actor is None
    assert resources["CPU"] == 1
    assert pid != os.getpid()
    assert context.get_task_id() is None or len(context.get_task_id()) == 48


def test_options_do_not_change_the_original():
    doubled = add.options(num_cpus=2, name="other")
    assert ray.get(doubled.remote(1)) == 2 and ray.get(add.remote(1)) == 2


def test_name_and_doc_are_kept():
    @ray.remote
    def documented():
        """Says what it does."""

    assert documented.__doc__ == "Says what it does." and documented.__name__ == "documented"


def test_await_and_future_of_a_reference():
    import asyncio

    async def main():
        first = await add.remote(1)
        rest = await asyncio.gather(*[add.remote(i) for i in range(5)])
        waited, _ = await asyncio.wait([asyncio.wrap_future(add.remote(9).future())])
        return first, rest, waited.pop().result()

    assert asyncio.run(main()) == (2, [1, 2, 3, 4, 5], 10)
    assert add.remote(3).future().result(timeout=20) == 4


def test_max_calls_replaces_the_worker():
    @ray.remote(max_calls=1)
    def pid():
        return os.getpid()

    pids = [ray.get(pid.remote()) for _ in range(4)]
    assert len(set(pids)) == 4


def test_num_gpus_of_a_node_and_ids(monkeypatch):
    result = run_program(
        """
import os, ray
ray.init("local", num_cpus=2, num_gpus=2, object_store_memory=80 << 20, log_to_driver=False)
@ray.remote(num_gpus=1)
def ids():
    return ray.get_gpu_ids(), os.environ["CUDA_VISIBLE_DEVICES"]
@ray.remote(num_gpus=0.5)
class Half:
    def ids(self):
        return ray.get_gpu_ids()
one, visible = ray.get(ids.remote())
assert [str(i) for i in one] == visible.split(",") and len(one) == 1, (one, visible)
halves = [Half.remote() for _ in range(4)]
found = sorted(str(ray.get(h.ids.remote())[0]) for h in halves)
assert found == ["0", "0", "1", "1"], found
print("good")
"""
    )
    assert "good" in result.stdout


def test_implicit_init_and_output_in_the_driver():
    result = run_program(
        """
import ray, sys
@ray.remote
def hello():
    print("hello from a worker")
    print("and from its standard error", file=sys.stderr)
    return 1
assert not ray.is_initialized()
assert ray.get(hello.remote()) == 1
assert ray.is_initialized()
import time
time.sleep(1)
"""
    )
    text = result.stdout + result.stderr
    assert "hello from a worker" in text and "and from its standard error" in text
    assert "pid=" in text


def test_modules_beside_the_script_can_be_imported(tmp_path):
    (tmp_path / "beside_the_script.py").write_text("VALUE = 42\ndef function(x):\n    return x + VALUE\n")
    (tmp_path / "program.py").write_text(
        "import ray\nimport beside_the_script\n"
        "print(ray.get(ray.remote(beside_the_script.function).remote(1)))\n"
        "class Here:\n    def __init__(self, v): self.v = v\n"
        "@ray.remote\ndef make(v): return Here(v)\n"
        "assert type(ray.get(make.remote(3))) is Here\nprint('same class')\n"
    )
    import subprocess

    result = subprocess.run(
        [sys.executable, str(tmp_path / "program.py")], capture_output=True, text=True, timeout=60, cwd="/"
    )
    assert result.returncode == 0, result.stderr
    assert "43" in result.stdout and "same class" in result.stdout


def test_ids_have_the_known_lengths_and_forms():
    reference = add.remote(1)
    assert len(reference.binary()) == 28 and len(reference.hex()) == 56
    assert reference.binary()[-4:] == (1).to_bytes(4, "little")
    assert reference.task_id().binary() == reference.binary()[:24]
    assert reference.job_id().binary() == reference.binary()[20:24]
    assert repr(reference) == f"ObjectRef({reference.hex()})"
    assert ray.ObjectRef(reference.binary()) == reference and hash(ray.ObjectRef(reference.binary())) == hash(reference)
    assert ray.JobID.from_int(7).binary() == b"\x07\0\0\0"
    assert ray.ActorID.nil().is_nil() and len(ray.ActorID.from_random().binary()) == 16


def test_a_function_is_captured_at_its_first_call_whatever_its_options():
    value = 1

    @ray.remote
    def read():
        return value

    value = 2
    assert ray.get(read.remote()) == 2
    value = 3
    assert ray.get([read.remote(), read.options(num_cpus=0).remote()]) == [2, 2]


def test_wait_takes_a_whole_float():
    ready, rest = ray.wait([ray.put(i) for i in range(4)], num_returns=4 / 2)
    assert (len(ready), len(rest)) == (2, 2)


def test_a_timeout_says_so():
    @ray.remote
    def never():
        threading.Event().wait()

    reference = never.remote()
    with pytest.raises(ray.exceptions.GetTimeoutError, match="Get timed out: some object"):
        ray.get(reference, timeout=0.1)
    ray.cancel(reference)


def test_every_worker_knows_the_jobs_namespace():
    # Fresh workers all the time: one that is given its first task while it still connects is no exception.
    result = run_program("""
import ray
ray.init("local", num_cpus=4, namespace="the job's", object_store_memory=80 << 20, log_to_driver=False)

@ray.remote(max_calls=1)
def namespace():
    return ray.get_runtime_context().namespace

print(set(ray.get([namespace.remote() for _ in range(40)], timeout=50)))
""")
    assert result.stdout.strip() == repr({"the job's"})


def test_libraries_use_as_many_threads_as_there_are_cpus_for_the_task():
    @ray.remote
    def threads():
        return os.environ.get("OMP_NUM_THREADS")

    @ray.remote
    class Actor:
        def threads(self):
            return os.environ.get("OMP_NUM_THREADS")

    if "OMP_NUM_THREADS" in os.environ:
        pytest.skip("OMP_NUM_THREADS is set, and what is set stays")
    wanted = [threads.options(num_cpus=n).remote() for n in (3, 1, 0.5, 0)]
    assert ray.get(wanted) == ["3", "1", "1", "1"]
    actors = [Actor.options(num_cpus=2).remote(), Actor.remote()]
    assert ray.get([actor.threads.remote() for actor in actors]) == ["2", "1"]
