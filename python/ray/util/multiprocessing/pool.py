"""A pool with the methods of `multiprocessing.Pool` whose processes are actors, on any node of the cluster."""

from __future__ import annotations

import itertools
import os
import queue
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from multiprocessing import TimeoutError
from typing import Any

import ray

RAY_ADDRESS_ENV = "RAY_ADDRESS"


class _Failure:
    """An exception that the user's function raised, as a value, so that the other results of a chunk arrive."""

    def __init__(self, exception: Exception) -> None:
        self.exception = exception


class _PoolActor:
    """One process of a pool."""

    def __init__(self, initializer: Callable[..., Any] | None, initargs: tuple[Any, ...]) -> None:
        if initializer is not None:
            initializer(*initargs)

    def ping(self) -> None:
        """Answers once the initializer has run."""

    def run_batch(self, function: Callable[..., Any], batch: list[tuple[tuple[Any, ...], dict[str, Any]]]) -> list[Any]:
        """Results in order; a call that raises gives a `_Failure`."""
        results: list[Any] = []
        for arguments, keywords in batch:
            try:
                results.append(function(*arguments, **keywords))
            except Exception as error:
                results.append(_Failure(error))
        return results


class AsyncResult:
    """A result that is being made. Returned by the `_async` methods."""

    def __init__(
        self,
        references: list[Any],
        callback: Callable[[Any], Any] | None = None,
        error_callback: Callable[[Exception], Any] | None = None,
        is_single: bool = False,
    ) -> None:
        self._references = references
        self._is_single = is_single
        self._event = threading.Event()
        self._results: list[Any] = []
        self._error: Exception | None = None
        self._thread = threading.Thread(
            target=self._collect, args=(callback, error_callback), name="ray-pool-result", daemon=True
        )
        self._thread.start()

    def _collect(
        self, callback: Callable[[Any], Any] | None, error_callback: Callable[[Exception], Any] | None
    ) -> None:
        try:
            for batch in ray.get(self._references):
                for result in batch:
                    if isinstance(result, _Failure):
                        raise result.exception
                    self._results.append(result)
        except Exception as error:
            self._error = error
        self._event.set()
        if self._error is not None:
            if error_callback is not None:
                error_callback(self._error)
        elif callback is not None:
            callback(self._value())

    def _value(self) -> Any:
        return self._results[0] if self._is_single else self._results

    def wait(self, timeout: float | None = None) -> None:
        """Waits for the result, at most `timeout` seconds."""
        self._event.wait(timeout)

    def get(self, timeout: float | None = None) -> Any:
        """The result.

        Raises:
            TimeoutError: it is not there within `timeout` seconds.
            Exception: what the function raised.
        """
        self.wait(timeout)
        if not self._event.is_set():
            raise TimeoutError
        if self._error is not None:
            raise self._error
        return self._value()

    def ready(self) -> bool:
        """Whether the result is there."""
        return self._event.is_set()

    def successful(self) -> bool:
        """Whether the calls ended without an exception. Raises ValueError where they have not ended."""
        if not self.ready():
            raise ValueError(f"{self!r} not ready")
        return self._error is None


class _ResultIterator:
    """What `imap` and `imap_unordered` return: an iterator whose `next` takes a timeout."""

    def __init__(self, pool: Pool, function: Callable[..., Any], iterable: Iterable[Any], chunksize: int) -> None:
        if chunksize < 1:
            raise ValueError("chunksize must be >= 1")
        self._pool = pool
        self._function = function
        self._chunks = _chunks(iterable, chunksize)
        self._pending: list[Any] = []
        self._ready: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._is_exhausted = False
        # As many chunks at once as there are actors: a lazy iterable stays lazy.
        self._fill()

    def _fill(self) -> None:
        while not self._is_exhausted and len(self._pending) < 2 * self._pool._processes:
            chunk = next(self._chunks, None)
            if chunk is None:
                self._is_exhausted = True
                return
            self._pending.append(self._pool._submit(self._function, [((item,), {}) for item in chunk]))

    def _take(self, timeout: float | None) -> Any:
        raise NotImplementedError

    def __iter__(self) -> _ResultIterator:
        return self

    def __next__(self) -> Any:
        return self.next()

    def next(self, timeout: float | None = None) -> Any:
        """The next result.

        Raises:
            StopIteration: there is none.
            TimeoutError: it is not there within `timeout` seconds.
            Exception: what the function raised for it.
        """
        if self._ready.empty():
            if not self._pending:
                raise StopIteration
            reference = self._take(timeout)
            self._pending.remove(reference)
            self._fill()
            for result in ray.get(reference):
                self._ready.put(result)
        result = self._ready.get()
        if isinstance(result, _Failure):
            raise result.exception
        return result


class OrderedIMapIterator(_ResultIterator):
    """Results in the order of the arguments."""

    def _take(self, timeout: float | None) -> Any:
        ready, _ = ray.wait(self._pending[:1], timeout=timeout)
        if not ready:
            raise TimeoutError
        return ready[0]


class UnorderedIMapIterator(_ResultIterator):
    """Results as they become ready."""

    def _take(self, timeout: float | None) -> Any:
        ready, _ = ray.wait(self._pending, num_returns=1, timeout=timeout)
        if not ready:
            raise TimeoutError
        return ready[0]


def _chunks(iterable: Iterable[Any], size: int) -> Iterator[list[Any]]:
    iterator = iter(iterable)
    while chunk := list(itertools.islice(iterator, size)):
        yield chunk


class Pool:
    """A pool of actors.

    Args:
        processes: how many actors; the cluster's CPUs where it is not given.
        initializer, initargs: called once in each actor.
        maxtasksperchild: an actor is replaced after this many chunks.
        context: not built.
        ray_address: the cluster to connect to, where this process is not connected.
        ray_remote_args: options of the actors.

    Raises:
        ValueError: `processes` is not above 0, or above the cluster's CPUs.

    Example:
        >>> with Pool(2) as pool:
        ...     pool.map(abs, [-1, 2])
        [1, 2]
    """

    def __init__(
        self,
        processes: int | None = None,
        initializer: Callable[..., Any] | None = None,
        initargs: Iterable[Any] | None = None,
        maxtasksperchild: int | None = None,
        context: Any = None,
        ray_address: str | None = None,
        ray_remote_args: dict[str, Any] | None = None,
    ) -> None:
        if context is not None:
            raise NotImplementedError("ray.util.multiprocessing.Pool(context=…) is not built: processes are actors")
        if maxtasksperchild is not None and maxtasksperchild < 1:
            raise ValueError("maxtasksperchild must be above 0")
        self._closed = False
        self._terminated = False
        self._initializer = initializer
        self._initargs = tuple(initargs or ())
        self._maximum_tasks = maxtasksperchild
        self._remote_args = dict(ray_remote_args or {})
        self._actor_class = ray.remote(_PoolActor)
        self._processes = self._connect(processes, ray_address)
        self._actors: list[tuple[Any, int]] = []
        self._next_actor = 0
        self._pending: list[Any] = []
        self._lock = threading.Lock()
        for _ in range(self._processes):
            self._actors.append((self._new_actor(), 0))
        ray.get([actor.ping.remote() for actor, _ in self._actors])

    def _connect(self, processes: int | None, ray_address: str | None) -> int:
        if processes is not None and processes <= 0:
            raise ValueError("Processes in the pool must be >0.")
        if not ray.is_initialized():
            address = ray_address or os.environ.get(RAY_ADDRESS_ENV)
            if address is None:
                ray.init(num_cpus=processes)
            else:
                ray.init(address=address)
        cpus = int(ray.cluster_resources().get("CPU", 0))
        if processes is None:
            processes = cpus
        if processes <= 0:
            raise ValueError("Processes in the pool must be >0.")
        if cpus < processes:
            raise ValueError(
                f"Tried to start a pool with {processes} processes on an existing ray cluster, but there are only "
                f"{cpus} CPUs in the ray cluster."
            )
        return processes

    def _new_actor(self) -> Any:
        return self._actor_class.options(**self._remote_args).remote(self._initializer, self._initargs)

    def _submit(self, function: Callable[..., Any], batch: list[tuple[tuple[Any, ...], dict[str, Any]]]) -> Any:
        with self._lock:
            index = self._next_actor
            self._next_actor = (index + 1) % self._processes
            actor, count = self._actors[index]
            reference = actor.run_batch.remote(_plain(function), batch)
            count += 1
            if self._maximum_tasks is not None and count >= self._maximum_tasks:
                # Queued calls still run; the last handle that goes ends the actor.
                actor.__ray_terminate__.remote()
                self._actors[index] = (self._new_actor(), 0)
            else:
                self._actors[index] = (actor, count)
            if len(self._pending) > 64:
                _, self._pending = ray.wait(self._pending, num_returns=len(self._pending), timeout=0, fetch_local=False)
            self._pending.append(reference)
            return reference

    def _submit_all(
        self, function: Callable[..., Any], iterable: Iterable[Any], chunksize: int | None, unpack: bool
    ) -> list[Any]:
        items = list(iterable)
        if chunksize is None:
            chunksize, rest = divmod(len(items), self._processes * 4)
            chunksize += bool(rest)
        chunksize = max(1, chunksize)
        return [
            self._submit(function, [(tuple(item) if unpack else (item,), {}) for item in chunk])
            for chunk in _chunks(items, chunksize)
        ]

    def _check_running(self) -> None:
        if self._closed:
            raise ValueError("Pool not running")

    def apply(
        self, func: Callable[..., Any], args: tuple[Any, ...] | None = None, kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Calls `func(*args, **kwargs)` in an actor and waits for its result."""
        return self.apply_async(func, args, kwargs).get()

    def apply_async(
        self,
        func: Callable[..., Any],
        args: tuple[Any, ...] | None = None,
        kwargs: dict[str, Any] | None = None,
        callback: Callable[[Any], Any] | None = None,
        error_callback: Callable[[Exception], Any] | None = None,
    ) -> AsyncResult:
        """As `apply`, without waiting. A callback is called with the result, or the other one with the exception."""
        self._check_running()
        reference = self._submit(func, [(tuple(args or ()), dict(kwargs or {}))])
        return AsyncResult([reference], callback, error_callback, is_single=True)

    def map(self, func: Callable[..., Any], iterable: Iterable[Any], chunksize: int | None = None) -> list[Any]:
        """`[func(item) for item in iterable]`. Raises what the first failing call raised."""
        return self.map_async(func, iterable, chunksize).get()

    def map_async(
        self,
        func: Callable[..., Any],
        iterable: Iterable[Any],
        chunksize: int | None = None,
        callback: Callable[[list[Any]], Any] | None = None,
        error_callback: Callable[[Exception], Any] | None = None,
    ) -> AsyncResult:
        """As `map`, without waiting."""
        self._check_running()
        return AsyncResult(self._submit_all(func, iterable, chunksize, False), callback, error_callback)

    def starmap(
        self, func: Callable[..., Any], iterable: Iterable[Iterable[Any]], chunksize: int | None = None
    ) -> list[Any]:
        """`[func(*item) for item in iterable]`."""
        self._check_running()
        return AsyncResult(self._submit_all(func, iterable, chunksize, True)).get()

    def starmap_async(
        self,
        func: Callable[..., Any],
        iterable: Iterable[Iterable[Any]],
        callback: Callable[[list[Any]], Any] | None = None,
        error_callback: Callable[[Exception], Any] | None = None,
    ) -> AsyncResult:
        """As `starmap`, without waiting."""
        self._check_running()
        return AsyncResult(self._submit_all(func, iterable, None, True), callback, error_callback)

    def imap(self, func: Callable[..., Any], iterable: Iterable[Any], chunksize: int | None = 1) -> OrderedIMapIterator:
        """An iterator over the results, in order; arguments are taken as results are."""
        self._check_running()
        return OrderedIMapIterator(self, func, iterable, chunksize or 1)

    def imap_unordered(
        self, func: Callable[..., Any], iterable: Iterable[Any], chunksize: int | None = 1
    ) -> UnorderedIMapIterator:
        """As `imap`, but each result as soon as it is there."""
        self._check_running()
        return UnorderedIMapIterator(self, func, iterable, chunksize or 1)

    def close(self) -> None:
        """No further calls; those that were made end."""
        self._closed = True

    def terminate(self) -> None:
        """Ends the actors now; calls that have not ended fail."""
        self._closed = True
        if not self._terminated:
            self._terminated = True
            for actor, _ in self._actors:
                ray.kill(actor)
            self._actors = []

    def join(self) -> None:
        """Waits for the calls that were made, and ends the actors. Raises ValueError before `close`."""
        if not self._closed:
            raise ValueError("Pool is still running")
        if self._terminated:
            return
        if self._pending:
            ray.wait(self._pending, num_returns=len(self._pending), fetch_local=False)
        # Gently first, so that what an actor's `atexit` does is done.
        ended = [actor.__ray_terminate__.remote() for actor, _ in self._actors]
        deadline = time.monotonic() + 5
        ray.wait(ended, num_returns=len(ended), timeout=max(0.0, deadline - time.monotonic()))
        self.terminate()

    def __enter__(self) -> Pool:
        self._check_running()
        return self

    def __exit__(self, *exception: object) -> None:
        self.terminate()


def _plain(function: Any) -> Callable[..., Any]:
    """The function itself, also where a remote function was given."""
    return getattr(function, "_function", function)
