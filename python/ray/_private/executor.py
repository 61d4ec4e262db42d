"""Runs calls in a worker: what the extension's task loop calls back into.

Plain tasks and the methods of plain actors run on the main thread, called by the extension itself. Threaded actors
use a pool for each concurrency group. Asyncio actors have one event loop, which runs on the main thread too: where it
would sleep it serves the links (`_LinkSelector`). Each of its groups admits as many calls as its limit.

Invariants:
1. A call that `run_elsewhere`, `admit` or `admit_when_fetched` took over ends with exactly one `CoreWorker.finish`.
2. The loop's own poller is looked at before it sleeps again, whenever it may have something.
"""

from __future__ import annotations

import contextlib
import gc
import inspect
import json
import logging
import os
import selectors
import sys
import time
import types
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from ray import exceptions
from ray._private import function_manager, ray_constants, serialization
from ray._private.context import SubmissionContext, current, current_task
from ray._private.ids import TaskID
from ray._private.object_ref_generator import DynamicObjectRefGenerator
from ray._private.worker import global_worker, watch_blocking_gets

if TYPE_CHECKING:
    import asyncio
    from concurrent.futures import ThreadPoolExecutor

    from ray._raylet import CoreWorker, EventLoop, RunningTask

logger = logging.getLogger(__name__)

# Frames of these directories are left out of what users see.
_OWN_FILES = (os.path.dirname(__file__) + os.sep,)
_DEFAULT_GROUP = ""
# How long an asyncio actor's `__ray_shutdown__` may take.
_SHUTDOWN_LIMIT_S = 30.0
_GENERATOR_TYPES = (types.GeneratorType, types.AsyncGeneratorType)


def _need_asyncio() -> None:
    # Most workers never have a loop, and the first worker of a node would be late by the time that the import takes.
    global asyncio
    import asyncio


def _is_cancellation(exception: BaseException) -> bool:
    # Where nobody imported asyncio, nobody raised its exception.
    module = sys.modules.get("asyncio")
    return isinstance(exception, KeyboardInterrupt) or (
        module is not None and isinstance(exception, module.CancelledError)
    )


class _LinkSelector(selectors.EpollSelector):
    """Sleeps in the runtime, which serves the links meanwhile and wakes for the loop's own poller as well."""

    # What sleeps and starts the calls that came; returns whether the poller may have events. None: not yet.
    step: Callable[[float | None], bool] | None = None
    # Whether the poller may have more than the last look showed.
    unsure = True

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        """What is ready, at once or after `timeout` seconds at most."""
        step = self.step
        if step is None:
            self.unsure = True
            return super().select(timeout)
        if step(0.0 if self.unsure else timeout) or self.unsure:
            events = super().select(0)
            self.unsure = bool(events)
            return events
        return []


def _shown(qualified_name: str) -> str:
    """A function's or class's name as tracebacks show it: without the function that it was defined in."""
    return qualified_name.rpartition("<locals>.")[2]


class _Group:
    """A concurrency group of an asyncio actor: how many calls run, and which wait."""

    __slots__ = ("limit", "running", "waiting")

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.running = 0
        self.waiting: deque[tuple[RunningTask, Callable[..., Any], list[Any], dict[str, Any]]] = deque()


class _Items:
    """The returns of a call that a generator makes, one after the other.

    What it made before it raised stays: only the others raise. With retries the call fails as a whole, so that it is
    made again.
    """

    def __init__(self, executor: Executor, task: RunningTask) -> None:
        self.executor = executor
        self.task = task
        self.dynamic = task.num_returns == ray_constants.NUM_RETURNS_DYNAMIC
        self.items: list[Any] = []

    def add(self, item: Any) -> bool:
        """Takes an item. False where there is no return left for it."""
        if self.dynamic:
            self.items.append(self.executor.core.put(item))
            return True
        if len(self.items) == self.task.num_returns:
            logger.error(
                "The generator of %s yields more than its num_returns=%d values; the rest is dropped.",
                self.task.function_name,
                self.task.num_returns,
            )
            return False
        self.items.append(item)
        return True

    def fail(self, error: Exception) -> None:
        """Notes what the generator raised. Raises it where the call fails as a whole."""
        task, executor = self.task, self.executor
        if executor.core.is_cancelled(task) or not self.items:
            raise error
        if task.retry_exceptions and (
            not task.retry_exception_types or executor.is_retryable(task, error, task.retry_exception_types)
        ):
            raise error
        failure = serialization.StoredFailure(executor.dump_exception(task, error))
        if self.dynamic:
            self.items.append(executor.core.put(failure))
        else:
            self.items += [failure] * (task.num_returns - len(self.items))

    def result(self) -> Any:
        """What the call returns."""
        if self.dynamic:
            return DynamicObjectRefGenerator(self.items)
        wanted, made = self.task.num_returns, len(self.items)
        if made < wanted:
            self.fail(ValueError(f"Task returned {made} objects, but num_returns={wanted}."))
        return self.items[0] if wanted == 1 else self.items


class Executor:
    """What `CoreWorker.run_task_loop` is given."""

    def __init__(self, core: CoreWorker) -> None:
        self.core = core
        self.instance: Any = None
        self.creation: dict[str, Any] = {}
        self._job_id = b""
        self._job_config_json = ""
        self._job_config: dict[str, Any] = {}
        self._runtime_env_json = ""
        self._context: SubmissionContext | None = None
        self._qualnames: dict[str, str] = {}
        self._retryable: dict[bytes, tuple[type[BaseException], ...]] = {}
        self._pools: dict[str, ThreadPoolExecutor] = {}
        self._groups: dict[str, _Group] = {}
        self._loop: asyncio.AbstractEventLoop | None = None
        self._selector: _LinkSelector | None = None
        self._links: EventLoop | None = None
        self._coroutines: dict[bytes, asyncio.Task[None]] = {}
        # The call whose arguments are being fetched, and those that came after it.
        self._unfetched: deque[RunningTask] = deque()
        self._fetcher: ThreadPoolExecutor | None = None
        # Which devices the node lets its workers see at all, before any lease narrows it down.
        self._node_devices = {
            name: os.environ.get(variable) for name, variable in ray_constants.VISIBLE_DEVICES_VARIABLES.items()
        }
        self._own_threads = "OMP_NUM_THREADS" not in os.environ

    # --- loading ---

    def load_function(self, task: RunningTask, blob: bytes) -> Any:
        """The function or class of an export. Raises RuntimeError where it cannot be had here."""
        target = function_manager.load(self.core, task.function_id, blob, task.function_name)
        self._qualnames[task.function_name] = _shown(getattr(target, "__qualname__", task.function_name))
        return target

    def prepare_lease(self, lease: dict[str, Any]) -> None:
        """Sets up the process for a lease: module path, devices, threads, and what children inherit."""
        config = lease.get("job_config_json") or ""
        if config and config != self._job_config_json:
            self._job_config_json = config
            self._job_config = json.loads(config)
            self._apply_job_config()
        job_id = lease.get("job_id") or self.core.job_id()
        runtime_env_json = lease.get("runtime_env_json") or ""
        self._set_devices(lease.get("resource_instances") or {})
        strategy = self.core.current_strategy() or {}
        captured = None
        if strategy.get("capture_child_tasks") and strategy.get("placement_group_id"):
            captured = strategy["placement_group_id"].hex()
        # The context that the process began with knows no job's settings, even where the job is the same.
        known = self._context
        if (
            known is not None
            and known.job_id == job_id
            and known.captured_group == captured
            and self._runtime_env_json == runtime_env_json
        ):
            return
        self._runtime_env_json = runtime_env_json
        if runtime_env_json:
            runtime_env = json.loads(runtime_env_json)
        else:
            runtime_env = dict(self._job_config.get("runtime_env") or {})
        namespace = self._job_config.get("namespace") or ""
        global_worker.namespace = namespace
        global_worker.runtime_env = runtime_env
        self._context = current.context = SubmissionContext(
            self.core,
            job_id,
            namespace,
            runtime_env,
            captured,
            self._job_config.get("default_actor_lifetime") == "detached",
        )

    def _apply_job_config(self) -> None:
        paths = [*self._job_config.get("code_search_path", []), *self._job_config.get("py_driver_sys_path", [])]
        for path in reversed(paths):
            if path not in sys.path:
                sys.path.insert(0, path)
        directory = self._job_config.get("cwd")
        if directory and os.path.isdir(directory):
            # Relative paths mean here what they mean in the driver; on another machine the directory may be missing.
            os.chdir(directory)
        logging_config = self._job_config.get("logging_config")
        if logging_config:
            from ray._private.logging_config import LoggingConfig

            LoggingConfig.from_dict(logging_config)._apply()

    def _set_devices(self, instances: dict[str, list[Any]]) -> None:
        for name, variable in ray_constants.VISIBLE_DEVICES_VARIABLES.items():
            indices = [index for index, amount in instances.get(name, []) if amount > 0]
            if indices or self._node_devices[name] is not None or os.environ.get(variable) is not None:
                os.environ[variable] = ",".join(str(device) for device in self.device_names(name, indices))
        if self._own_threads:
            cpus = self.core.assigned_resources().get("CPU", 0)
            os.environ["OMP_NUM_THREADS"] = str(max(1, int(cpus)))

    def device_names(self, name: str, indices: list[int]) -> list[Any]:
        """The devices of these indices, as the node's own variable names them."""
        visible = self._node_devices.get(name)
        if visible is None:
            return indices
        names = [device.strip() for device in visible.split(",") if device.strip()]
        return [names[index] if index < len(names) else index for index in indices]

    # --- actors ---

    def create_actor(
        self, task: RunningTask, cls: Any, args: list[Any], kwargs: dict[str, Any], creation: dict[str, Any]
    ) -> None:
        """Makes the actor of this process. Raises what its constructor raises."""
        self.creation = creation
        global_worker.in_actor = True
        global_worker.actor_name = creation.get("name") or ""
        global_worker.actor_creation = creation
        self._announce(cls.__name__)
        limit = creation.get("max_concurrency") or 1
        groups = dict(creation.get("concurrency_groups") or {})
        if creation.get("is_async"):
            self._start_loop()
            self._groups = {_DEFAULT_GROUP: _Group(limit), **{name: _Group(size) for name, size in groups.items()}}
            self.instance = self._on_loop(task, cls, args, kwargs)
        else:
            self.instance = cls(*args, **kwargs)
            if limit > 1 or groups:
                from concurrent.futures import ThreadPoolExecutor

                sizes = {_DEFAULT_GROUP: limit, **groups}
                self._pools = {
                    name: ThreadPoolExecutor(size, thread_name_prefix=f"ray-{name or 'default'}")
                    for name, size in sizes.items()
                }
        if type(self.instance).__repr__ is not object.__repr__:
            self._announce(self._repr())

    def _announce(self, name: str) -> None:
        # The log monitor takes this line as the name for the lines that follow, and shows it to nobody.
        for stream in (sys.stdout, sys.stderr):
            print(f"{ray_constants.LOG_PREFIX_ACTOR_NAME}{name}", file=stream, flush=True)

    def _repr(self) -> str:
        try:
            return repr(self.instance)
        except Exception as error:
            return f"<{type(self.instance).__name__}, whose repr raised {type(error).__name__}>"

    def method(self, task: RunningTask) -> tuple[Callable[..., Any], str]:
        """The bound method of a call, and where it runs: "main", "thread" or "async". Raises AttributeError."""
        name = task.method_name
        if name == "__ray_ready__":
            function: Callable[..., Any] = self._ready
        elif name == "__ray_call__":
            function = self._call
        elif name == "__ray_terminate__":
            function = self._terminate
        else:
            function = getattr(self.instance, name)
        if self._loop is not None:
            return function, "async"
        return function, "thread" if self._pools else "main"

    def _ready(self) -> bool:
        return True

    def _call(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        return function(self.instance, *args, **kwargs)

    def _terminate(self) -> None:
        from ray.actor import exit_actor

        exit_actor()

    def run_elsewhere(
        self, task: RunningTask, function: Callable[..., Any], args: list[Any], kwargs: dict[str, Any]
    ) -> None:
        """Starts a call on a pool's thread."""
        group = task.concurrency_group
        pool = self._pools.get(group)
        if pool is None:
            self.core.finish(task, None, self._no_group(group))
        else:
            pool.submit(self._run_on_thread, task, function, args, kwargs)

    def _no_group(self, group: str) -> ValueError:
        known = [name for name in (*self._pools, *self._groups) if name]
        return ValueError(f"the actor has no concurrency group {group!r}; it has {known}")

    # --- threads ---

    def _run_on_thread(
        self, task: RunningTask, function: Callable[..., Any], args: list[Any], kwargs: dict[str, Any]
    ) -> None:
        self.core.set_current_task(task)
        value, error = None, None
        try:
            if self.core.is_cancelled(task):
                raise exceptions.TaskCancelledError(TaskID(task.task_id))
            value = function(*args, **kwargs)
            if inspect.isgenerator(value) or inspect.isasyncgen(value):
                value = self.run_generator(task, value)
        except BaseException as caught:
            value, error = None, caught
        finally:
            self.core.set_current_task(None)
        self.core.finish(task, value, error)

    # --- the event loop ---

    def _start_loop(self) -> None:
        _need_asyncio()
        self._selector = _LinkSelector()
        loop = self._loop = asyncio.SelectorEventLoop(self._selector)
        asyncio.set_event_loop(loop)
        self.core.set_task_variable(current_task)

        def blocks() -> bool:
            return asyncio._get_running_loop() is loop

        watch_blocking_gets(blocks)

    def _on_loop(self, task: RunningTask, cls: Any, args: list[Any], kwargs: dict[str, Any]) -> Any:
        """Runs the constructor in the loop, which it may use. No call comes before it is done."""

        async def construct() -> Any:
            current_task.set(task)
            return cls(*args, **kwargs)

        assert self._loop is not None
        return self._loop.run_until_complete(construct())

    @property
    def runs_event_loop(self) -> bool:
        """Whether this worker is an asyncio actor, which `run_event_loop` serves."""
        return self._loop is not None

    def run_event_loop(self, links: EventLoop) -> None:
        """Runs the loop until `stop_event_loop`. Raises SystemExit and KeyboardInterrupt of asyncio tasks of the
        actor's own."""
        assert self._loop is not None and self._selector is not None
        if self._links is None:
            links.watch_poller(self._selector.fileno())
        self._links = links
        self._selector.unsure = True
        self._selector.step = links.step
        try:
            self._loop.run_forever()
        finally:
            self._selector.step = None

    def stop_event_loop(self) -> None:
        """Ends `run_event_loop` after this turn."""
        assert self._loop is not None
        self._loop.stop()

    def admit_when_fetched(self, task: RunningTask) -> None:
        """Starts a call whose arguments are on their way, or that came after such a one."""
        self._unfetched.append(task)
        if len(self._unfetched) == 1:
            self._fetch_next()

    def _fetch_next(self) -> None:
        assert self._loop is not None and self._links is not None
        if self._fetcher is None:
            from concurrent.futures import ThreadPoolExecutor

            self._fetcher = ThreadPoolExecutor(1, thread_name_prefix="ray-arguments")
        self._loop.run_in_executor(self._fetcher, self._links.load, self._unfetched[0]).add_done_callback(self._fetched)

    def _fetched(self, loaded: asyncio.Future[tuple[Callable[..., Any], list[Any], dict[str, Any]]]) -> None:
        assert self._links is not None
        task = self._unfetched.popleft()
        error = loaded.exception()
        if error is not None:
            self.core.finish(task, None, error)
        else:
            self.admit(task, *loaded.result())
        if self._unfetched:
            self._fetch_next()
        else:
            self._links.caught_up()

    def admit(self, task: RunningTask, function: Callable[..., Any], args: list[Any], kwargs: dict[str, Any]) -> None:
        """Starts a call on the event loop, or has it wait for its turn in its concurrency group."""
        group = self._groups.get(task.concurrency_group)
        if group is None:
            self.core.finish(task, None, self._no_group(task.concurrency_group))
        elif group.running >= group.limit:
            group.waiting.append((task, function, args, kwargs))
        else:
            self._start(group, task, function, args, kwargs)

    def _start(
        self, group: _Group, task: RunningTask, function: Callable[..., Any], args: list[Any], kwargs: dict[str, Any]
    ) -> None:
        assert self._loop is not None
        group.running += 1
        coroutine = self._run_on_loop(group, task, function, args, kwargs)
        started = self._loop.create_task(coroutine)
        self._coroutines[task.task_id] = started

    async def _run_on_loop(
        self, group: _Group, task: RunningTask, function: Callable[..., Any], args: list[Any], kwargs: dict[str, Any]
    ) -> None:
        current_task.set(task)
        core = self.core
        value, error = None, None
        try:
            if core.is_cancelled(task):
                raise asyncio.CancelledError
            value = function(*args, **kwargs)
            awaited = type(value) is types.CoroutineType
            if awaited:
                value = await value
            if type(value) in _GENERATOR_TYPES or (not awaited and inspect.isawaitable(value)):
                value = await self._settle_on_loop(task, value, awaited)
        except BaseException as caught:
            value, error = None, caught
        self._coroutines.pop(task.task_id, None)
        group.running -= 1
        while group.waiting and group.running < group.limit:
            self._start(group, *group.waiting.popleft())
        if self._coroutines:
            # Others may end in this turn of the loop too: one write for all their answers, before its next turn.
            core.finish(task, value, error, True)
        else:
            core.finish(task, value, error)

    async def _settle_on_loop(self, task: RunningTask, value: Any, awaited: bool) -> Any:
        """What a method returned may have to be awaited, or give items."""
        if not awaited and inspect.isawaitable(value):
            value = await value
        if inspect.isasyncgen(value):
            return await self._drive_on_loop(task, value)
        if inspect.isgenerator(value):
            return self.run_generator(task, value)
        return value

    async def _drive_on_loop(self, task: RunningTask, generator: Any) -> Any:
        if task.num_returns != ray_constants.NUM_RETURNS_STREAMING:
            return await self._collect_async(task, generator)
        # With back-pressure the item waits for its consumer, which must not stop the loop.
        waits = bool(getattr(task, "generator_backpressure", 0))
        loop = asyncio.get_running_loop()
        async for item in generator:
            if waits:
                wanted = await loop.run_in_executor(None, self.core.put_generator_item, task, item)
            else:
                wanted = self.core.put_generator_item(task, item)
            if not wanted:
                await generator.aclose()
                break
        return None

    def cancel_elsewhere(self, task_id: bytes) -> None:
        """Cancels a coroutine that runs or waits for its turn. Threads cannot be interrupted."""
        if self._loop is not None:
            self._cancel(task_id)

    def _cancel(self, task_id: bytes) -> None:
        running = self._coroutines.get(task_id)
        if running is not None:
            running.cancel()
            return
        for group in self._groups.values():
            for call in group.waiting:
                if call[0].task_id == task_id:
                    group.waiting.remove(call)
                    self.core.finish(call[0], None, asyncio.CancelledError())
                    return

    def drain(self, limit_s: float) -> None:
        """Waits until calls that run or wait on threads and the loop are done; the process leaves afterwards."""
        deadline = time.monotonic() + limit_s
        for pool in self._pools.values():
            pool.shutdown(wait=False)
        for pool in self._pools.values():
            for thread in list(pool._threads):
                thread.join(max(0.0, deadline - time.monotonic()))
        if self._loop is not None:

            async def wait_for_calls() -> None:
                while self._unfetched or self._coroutines or any(group.waiting for group in self._groups.values()):
                    running = [*self._coroutines.values()]
                    if running:
                        await asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED)
                    # What they admitted starts with the loop's next turn; arguments come from a thread.
                    await asyncio.sleep(0 if running else 0.01)
                    self.core.flush_replies()

            left = max(0.0, deadline - time.monotonic())
            with contextlib.suppress(asyncio.TimeoutError):
                self._loop.run_until_complete(asyncio.wait_for(wait_for_calls(), left))
            self.core.flush_replies()

    # --- generators ---

    def run_generator(self, task: RunningTask, generator: Any) -> Any:
        """Drives a generator (async ones on a loop of this thread): sends its items, or returns what it collects."""
        if inspect.isasyncgen(generator):
            _need_asyncio()
            return asyncio.run(self._drive_on_loop(task, generator))
        if task.num_returns != ray_constants.NUM_RETURNS_STREAMING:
            return self._collect(task, generator)
        for item in generator:
            if not self.core.put_generator_item(task, item):
                generator.close()
                break
        return None

    def _collect(self, task: RunningTask, generator: Any) -> Any:
        """What a call returns whose generator makes all of its returns."""
        items = _Items(self, task)
        try:
            for item in generator:
                if not items.add(item):
                    generator.close()
                    break
        except Exception as error:
            items.fail(error)
        return items.result()

    async def _collect_async(self, task: RunningTask, generator: Any) -> Any:
        items = _Items(self, task)
        try:
            async for item in generator:
                if not items.add(item):
                    await generator.aclose()
                    break
        except Exception as error:
            items.fail(error)
        return items.result()

    # --- the end ---

    def end_actor(self) -> None:
        """Lets the actor clean up: its `__ray_shutdown__`, then, as the last reference goes, its `__del__`."""
        instance, self.instance = self.instance, None
        shutdown = getattr(type(instance), "__ray_shutdown__", None)
        if shutdown is not None:
            try:
                result = shutdown(instance)
                if inspect.isawaitable(result):
                    self._await_on_loop(result)
            except Exception:
                logger.exception("__ray_shutdown__ of the actor raised")
        del instance
        self._links = None  # It keeps the actor's bound methods.
        gc.collect()

    def _await_on_loop(self, awaitable: Any) -> None:
        _need_asyncio()

        async def wait() -> None:
            await asyncio.wait_for(awaitable, _SHUTDOWN_LIMIT_S)

        if self._loop is None:
            asyncio.run(wait())
        else:
            self._loop.run_until_complete(wait())

    # --- failures ---

    def dump_exception(self, task: RunningTask, exception: BaseException) -> bytes:
        """Pickles what a call raised, as its references hold it."""
        in_actor = bool(task.method_name) or bool(self.creation.get("class_name"))
        if in_actor and isinstance(exception, (SystemExit, exceptions.AsyncioActorExit)):
            called = "sys.exit()" if type(exception) is SystemExit else "exit_actor()"
            died = exceptions.ActorDiedError(
                f"{exceptions.ActorDiedError.BASE_ERROR_MSG}\n\tclass_name: {self.creation.get('class_name', '')}\n"
                f"\tactor_id: {task.actor_id.hex()}\n\tpid: {os.getpid()}\n"
                f"The actor is dead because {called} was called in it.",
                task.actor_id.hex(),
            )
            return serialization.dump_exception(died)
        cause = exception
        if _is_cancellation(exception) and self.core.is_cancelled(task):
            cause = exceptions.TaskCancelledError(TaskID(task.task_id))
            cause.__traceback__ = exception.__traceback__
        if in_actor:
            name = f"{_shown(self.creation.get('class_name', ''))}.{task.method_name or '__init__'}"
        else:
            name = self._qualnames.get(task.function_name, task.function_name)
        error = exceptions.RayTaskError.from_exception(
            name,
            cause,
            ip=self._node_ip(),
            actor_repr=self._repr() if in_actor and self.instance is not None else None,
            actor_id=task.actor_id.hex() if in_actor else None,
            skip_directories=_OWN_FILES,
        )
        error.proctitle = f"ray::{name}()"
        return serialization.dump_exception(error)

    def _node_ip(self) -> str:
        return self.core.details().get("node_ip") or "127.0.0.1"

    def is_retryable(self, task: RunningTask, exception: BaseException, types_pickle: bytes) -> bool:
        """Whether `exception` is one of the pickled types."""
        del task
        types = self._retryable.get(types_pickle)
        if types is None:
            types = self._retryable[types_pickle] = tuple(serialization.loads(types_pickle))
        return isinstance(exception, types)
