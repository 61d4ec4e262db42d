"""Actors: state, order, names, lifetimes, restarts, handles that travel, threads."""

import os
import signal
import time

import pytest
from conftest import run_program, wait_for_condition

import ray

pytestmark = pytest.mark.usefixtures("ray_module")


@ray.remote
class Counter:
    """Counts."""

    def __init__(self, start=0):
        self.value = start

    def increment(self, by=1):
        self.value += by
        return self.value

    def get(self):
        return self.value

    def pid(self):
        return os.getpid()

    def fail(self):
        raise ValueError("asked to fail")


def test_state_is_kept_and_calls_are_in_order():
    counter = Counter.remote(10)
    results = [counter.increment.remote() for _ in range(100)]
    assert ray.get(results) == list(range(11, 111))
    assert ray.get(counter.get.remote()) == 110


def test_an_exception_does_not_end_the_actor():
    counter = Counter.remote()
    with pytest.raises(ValueError, match="asked to fail"):
        ray.get(counter.fail.remote())
    assert ray.get(counter.increment.remote()) == 1


def test_arguments_of_a_constructor_may_be_references():
    assert ray.get(Counter.remote(ray.put(5)).get.remote()) == 5


def test_a_failing_constructor_is_the_cause():
    @ray.remote
    class Bad:
        def __init__(self):
            raise RuntimeError("no luck")

        def method(self):
            return 1

    with pytest.raises(ray.exceptions.ActorDiedError, match="no luck"):
        ray.get(Bad.remote().method.remote(), timeout=30)


def test_handles_travel():
    counter = Counter.remote()

    @ray.remote
    def bump(handle, times):
        return [ray.get(handle.increment.remote()) for _ in range(times)]

    ray.get([bump.remote(counter, 5) for _ in range(3)])
    assert ray.get(counter.get.remote()) == 15

    @ray.remote
    class Holder:
        def __init__(self, inner):
            self.inner = inner

        def through(self):
            return ray.get(self.inner.increment.remote())

    assert ray.get(Holder.options(num_cpus=0).remote(counter).through.remote()) == 16


def test_an_actor_creates_actors():
    @ray.remote(num_cpus=0)
    class Parent:
        def __init__(self):
            self.child = Counter.options(num_cpus=0).remote(7)

        def child_value(self):
            return ray.get(self.child.get.remote())

        def give(self):
            return self.child

    parent = Parent.remote()
    assert ray.get(parent.child_value.remote()) == 7
    child = ray.get(parent.give.remote())
    assert ray.get(child.increment.remote()) == 8


def test_kill():
    counter = Counter.remote()
    pid = ray.get(counter.pid.remote())
    ray.kill(counter)
    with pytest.raises(ray.exceptions.RayActorError):
        ray.get(counter.get.remote(), timeout=20)
    wait_for_condition(lambda: not os.path.exists(f"/proc/{pid}"))


def test_out_of_scope_ends_it_after_queued_calls():
    counter = Counter.remote()
    pid = ray.get(counter.pid.remote())
    last = counter.increment.remote()
    del counter
    assert ray.get(last, timeout=20) == 1
    wait_for_condition(lambda: not os.path.exists(f"/proc/{pid}"))


def test_named_actors():
    counter = Counter.options(name="the counter").remote(3)
    assert ray.get(ray.get_actor("the counter").get.remote()) == 3
    with pytest.raises(ValueError):
        Counter.options(name="the counter").remote()
    again = Counter.options(name="the counter", get_if_exists=True).remote()
    assert ray.get(again.increment.remote()) == 4
    with pytest.raises(ValueError):
        ray.get_actor("nobody")
    assert "the counter" in ray.util.list_named_actors()
    ray.kill(counter)

    def is_free():
        try:
            ray.get_actor("the counter")
        except ValueError:
            return True
        return False

    wait_for_condition(is_free)
    assert ray.get(Counter.options(name="the counter").remote().get.remote()) == 0


def test_namespaces():
    first = Counter.options(name="same", namespace="one").remote(1)
    second = Counter.options(name="same", namespace="two").remote(2)
    assert ray.get(ray.get_actor("same", namespace="one").get.remote()) == 1
    assert ray.get(ray.get_actor("same", namespace="two").get.remote()) == 2
    with pytest.raises(ValueError):
        ray.get_actor("same")
    del first, second


def test_restart_after_a_crash_runs_the_constructor_again():
    @ray.remote(max_restarts=1)
    class Fragile:
        def __init__(self):
            self.calls = 0

        def call(self):
            self.calls += 1
            return self.calls, os.getpid()

    actor = Fragile.remote()
    assert ray.get(actor.call.remote())[0] == 1
    _, pid = ray.get(actor.call.remote())
    os.kill(pid, signal.SIGKILL)

    def is_back():
        return ray.get(actor.call.remote(), timeout=10)[1] != pid

    wait_for_condition(is_back, timeout=20)
    count, second = ray.get(actor.call.remote())
    assert count < 10 and second != pid
    os.kill(second, signal.SIGKILL)

    def is_dead():
        try:
            ray.get(actor.call.remote(), timeout=10)
        except ray.exceptions.ActorDiedError as error:
            return "SIGKILL" in str(error) or "signal" in str(error).lower()
        except ray.exceptions.RayActorError:
            return False
        return False

    wait_for_condition(is_dead, timeout=20)


def test_max_task_retries_runs_the_lost_call_again(tmp_path):
    @ray.remote(max_restarts=-1, max_task_retries=2)
    class Fragile:
        def die_once(self, path):
            if not os.path.exists(path):
                open(path, "w").close()
                os._exit(1)
            return "second attempt"

    assert ray.get(Fragile.remote().die_once.remote(str(tmp_path / "died")), timeout=40) == "second attempt"


def test_a_call_lost_in_a_crash_is_an_error_without_retries():
    @ray.remote(max_restarts=-1)
    class Fragile:
        def die(self):
            os._exit(3)

        def fine(self):
            return 1

    actor = Fragile.remote()
    with pytest.raises(ray.exceptions.RayActorError):
        ray.get(actor.die.remote(), timeout=30)
    wait_for_condition(lambda: ray.get(actor.fine.remote(), timeout=20) == 1, timeout=30)


def test_exit_actor():
    @ray.remote
    class Leaver:
        def leave(self):
            ray.actor.exit_actor()

    actor = Leaver.remote()
    with pytest.raises(ray.exceptions.RayActorError):
        ray.get(actor.leave.remote(), timeout=20)


def test_ready_call_and_terminate():
    counter = Counter.remote(2)
    assert ray.get(counter.__ray_ready__.remote(), timeout=20)
    assert ray.get(counter.__ray_call__.remote(lambda self, by: self.value + by, 3)) == 5
    pid = ray.get(counter.pid.remote())
    counter.__ray_terminate__.remote()
    wait_for_condition(lambda: not os.path.exists(f"/proc/{pid}"))


def test_threaded_actors_run_calls_at_once():
    @ray.remote(max_concurrency=4)
    class Threaded:
        def __init__(self):
            import threading

            self.barrier = threading.Barrier(4)

        def meet(self):
            return self.barrier.wait(20)

    actor = Threaded.remote()
    assert sorted(ray.get([actor.meet.remote() for _ in range(4)], timeout=40)) == [0, 1, 2, 3]


def test_method_options():
    @ray.remote
    class Several:
        @ray.method(num_returns=2)
        def two(self):
            return 1, 2

        def three(self):
            return 1, 2, 3

    actor = Several.remote()
    assert ray.get(actor.two.remote()) == [1, 2]
    assert ray.get(actor.three.options(num_returns=3).remote()) == [1, 2, 3]


def test_inheritance_and_class_and_static_methods():
    class Base:
        def base(self):
            return "base"

    @ray.remote
    class Child(Base):
        @staticmethod
        def static(x):
            return x + 1

        @classmethod
        def name(cls):
            return cls.__name__

        def parent(self):
            return super().base()

    child = Child.remote()
    assert ray.get([child.base.remote(), child.static.remote(1), child.parent.remote()]) == ["base", 2, "base"]
    assert "Child" in ray.get(child.name.remote())


def test_runtime_context_in_an_actor():
    @ray.remote(num_cpus=1, resources={})
    class Facts:
        def facts(self):
            context = ray.get_runtime_context()
            return context.get_actor_id(), context.get_actor_name(), context.was_current_actor_reconstructed

        def me(self):
            return ray.get_runtime_context().current_actor

    actor = Facts.options(name="facts").remote()
    actor_id, name, reconstructed = ray.get(actor.facts.remote())
    assert actor_id == actor._actor_id.hex() and name == "facts" and reconstructed is False
    assert ray.get(ray.get(actor.me.remote()).facts.remote())[0] == actor_id


def test_an_idle_actor_takes_no_cpu():
    actors = [Counter.remote() for _ in range(10)]
    assert ray.get([a.get.remote() for a in actors], timeout=60) == [0] * 10


def test_actors_with_cpus_wait_for_room():
    @ray.remote(num_cpus=2)
    class Big:
        def ping(self):
            return 1

    first, second = Big.remote(), Big.remote()
    assert ray.get([first.ping.remote(), second.ping.remote()], timeout=30) == [1, 1]
    third = Big.remote()
    ready, _ = ray.wait([third.ping.remote()], timeout=0.5)
    assert not ready
    ray.kill(first)
    assert ray.get(third.ping.remote(), timeout=30) == 1


def test_detached_actors_outlive_their_driver(ray_module):
    address = ray_module.address_info["address"]
    program = """
import ray, sys
ray.init(address=sys.argv[1], namespace="shop", log_to_driver=False)
@ray.remote
class Keeper:
    def __init__(self): self.n = 41
    def next(self):
        self.n += 1
        return self.n
if sys.argv[2] == "make":
    print(ray.get(Keeper.options(name="keeper", lifetime="detached").remote().next.remote()))
    plain = Keeper.options(name="plain").remote()
    ray.get(plain.next.remote())
else:
    keeper = ray.get_actor("keeper")
    print(ray.get(keeper.next.remote()))
    try:
        ray.get_actor("plain")
    except ValueError:
        print("plain is gone")
    ray.kill(keeper)
"""
    assert "42" in run_program(program, address, "make").stdout

    def is_gone():
        try:
            ray.get_actor("plain", namespace="shop")
        except ValueError:
            return True
        return False

    wait_for_condition(is_gone)
    output = run_program(program, address, "use").stdout
    assert "43" in output and "plain is gone" in output


def test_max_pending_calls():
    @ray.remote(max_pending_calls=2)
    class Slow:
        def wait(self):
            time.sleep(30)

    actor = Slow.remote()
    with pytest.raises(ray.exceptions.PendingCallsLimitExceeded):
        for _ in range(10):
            actor.wait.remote()
    ray.kill(actor)


def test_creating_many_actors():
    actors = [Counter.options(num_cpus=0).remote(i) for i in range(30)]
    assert ray.get([a.get.remote() for a in actors], timeout=60) == list(range(30))


def test_cancel_of_queued_actor_calls():
    @ray.remote
    class Slow:
        def sleep(self, seconds):
            time.sleep(seconds)
            return seconds

    actor = Slow.remote()
    running, queued = actor.sleep.remote(1), actor.sleep.remote(0)
    ray.cancel(queued)
    with pytest.raises(ray.exceptions.TaskCancelledError):
        ray.get(queued, timeout=20)
    assert ray.get(running, timeout=20) == 1


@pytest.mark.parametrize("is_async", [False, True])
def test_an_actor_that_goes_out_of_scope_cleans_up(tmp_path, is_async):
    class Sync:
        def __init__(self, directory):
            self.directory = directory

        def ready(self):
            return True

        def __ray_shutdown__(self):
            (self.directory / "shut_down").touch()

        def __del__(self):
            if self.directory is not None:
                (self.directory / "deleted").touch()

    class Async(Sync):
        async def ready(self):
            return True

        async def __ray_shutdown__(self):
            super().__ray_shutdown__()

    actor = ray.remote(Async if is_async else Sync).remote(tmp_path)
    assert ray.get(actor.ready.remote())
    assert not list(tmp_path.iterdir())
    del actor
    wait_for_condition(lambda: {path.name for path in tmp_path.iterdir()} == {"shut_down", "deleted"})


def test_a_cleanup_that_raises_keeps_nothing_from_ending(tmp_path):
    @ray.remote
    class Bad:
        def pid(self):
            return os.getpid()

        def __ray_shutdown__(self):
            raise ValueError("in the cleanup")

    actor = Bad.remote()
    pid = ray.get(actor.pid.remote())
    del actor
    wait_for_condition(lambda: not os.path.exists(f"/proc/{pid}"))


def test_a_class_is_captured_when_it_is_first_used():
    limit = [1]

    @ray.remote
    class Reader:
        seen = limit

        def read(self):
            return self.seen

    first, second = Reader.remote(), None
    assert ray.get(first.read.remote()) == [1]
    limit.append(2)
    second = Reader.options(num_cpus=0).remote()
    assert ray.get(second.read.remote()) == [1]


def test_a_class_with_a_cached_property():
    import functools

    @ray.remote
    class Lazy:
        made = 0

        @functools.cached_property
        def value(self):
            self.made += 1
            return 5

        def read(self):
            return self.value, self.value, self.made

    actor = Lazy.remote()
    assert ray.get(actor.read.remote()) == (5, 5, 1)


def test_why_an_actor_left_is_said_to_later_calls():
    @ray.remote
    class Leaves:
        def leave(self):
            ray.actor.exit_actor()

        def ping(self):
            return 1

    actor = Leaves.remote()
    with pytest.raises(ray.exceptions.ActorDiedError, match="exit_actor"):
        ray.get(actor.leave.remote(), timeout=20)
    with pytest.raises(ray.exceptions.ActorDiedError, match="exit_actor"):
        ray.get(actor.ping.remote(), timeout=20)


def test_get_if_exists_from_many_workers_makes_one_actor():
    @ray.remote(num_cpus=0)
    class Single:
        def __init__(self):
            self.calls = 0

        def count(self):
            self.calls += 1
            return self.calls

    @ray.remote(num_cpus=0)
    def use():
        single = Single.options(name="the only one", get_if_exists=True, lifetime="detached").remote()
        return ray.get(single.count.remote())

    assert sorted(ray.get([use.remote() for _ in range(10)], timeout=30)) == list(range(1, 11))
    ray.kill(ray.get_actor("the only one"))
