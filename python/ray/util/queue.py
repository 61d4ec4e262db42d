"""A first-in-first-out queue that tasks, actors and drivers share: an actor keeps the items."""

from __future__ import annotations

import asyncio
import queue
from collections.abc import Iterable
from typing import Any

import ray


class Empty(queue.Empty):
    """The queue has not enough items."""


class Full(queue.Full):
    """The queue has not enough room."""


class Queue:
    """A queue with the methods of `queue.Queue`, and asyncio ones. Handles to it can be passed to tasks and actors.

    Args:
        maxsize: how many items fit; 0 or less means no limit.
        actor_options: options of the actor that keeps the items.

    Example:
        >>> q = Queue(maxsize=10)
        >>> q.put(1)
        >>> q.get()
        1
    """

    def __init__(self, maxsize: int = 0, actor_options: dict[str, Any] | None = None) -> None:
        self.maxsize = maxsize
        self.actor = ray.remote(_QueueActor).options(**(actor_options or {})).remote(maxsize)

    def __len__(self) -> int:
        return self.size()

    def _actor(self) -> Any:
        if self.actor is None:
            raise RuntimeError("this Queue was shut down")
        return self.actor

    def size(self) -> int:
        """How many items are in it."""
        return ray.get(self._actor().qsize.remote())

    def qsize(self) -> int:
        """How many items are in it."""
        return self.size()

    def empty(self) -> bool:
        """Whether it has no items."""
        return ray.get(self._actor().empty.remote())

    def full(self) -> bool:
        """Whether it has no room."""
        return ray.get(self._actor().full.remote())

    def put(self, item: Any, block: bool = True, timeout: float | None = None) -> None:
        """Adds an item; waits for room, at most `timeout` seconds.

        Raises:
            Full: there is no room, or was none in time.
            ValueError: a negative timeout.
        """
        if not block:
            self.put_nowait(item)
            return
        _check_timeout(timeout)
        _result(self._actor().put.remote(item, timeout))

    async def put_async(self, item: Any, block: bool = True, timeout: float | None = None) -> None:
        """As `put`, for coroutines."""
        if not block:
            await _async_result(self._actor().put_nowait.remote(item))
            return
        _check_timeout(timeout)
        await _async_result(self._actor().put.remote(item, timeout))

    def get(self, block: bool = True, timeout: float | None = None) -> Any:
        """Takes the oldest item; waits for one, at most `timeout` seconds.

        Raises:
            Empty: there is no item, or was none in time.
            ValueError: a negative timeout.
        """
        if not block:
            return self.get_nowait()
        _check_timeout(timeout)
        return _result(self._actor().get.remote(timeout))

    async def get_async(self, block: bool = True, timeout: float | None = None) -> Any:
        """As `get`, for coroutines."""
        if not block:
            return await _async_result(self._actor().get_nowait.remote())
        _check_timeout(timeout)
        return await _async_result(self._actor().get.remote(timeout))

    def put_nowait(self, item: Any) -> None:
        """Adds an item. Raises Full where there is no room."""
        _result(self._actor().put_nowait.remote(item))

    def put_nowait_batch(self, items: Iterable[Any]) -> None:
        """Adds all of the items or none. Raises Full where there is not room for all."""
        if not isinstance(items, Iterable):
            raise TypeError("Argument 'items' must be an Iterable")
        _result(self._actor().put_nowait_batch.remote(list(items)))

    def get_nowait(self) -> Any:
        """Takes the oldest item. Raises Empty where there is none."""
        return _result(self._actor().get_nowait.remote())

    def get_nowait_batch(self, num_items: int) -> list[Any]:
        """Takes the oldest `num_items` items. Raises Empty where there are fewer."""
        if not isinstance(num_items, int) or isinstance(num_items, bool):
            raise TypeError("Argument 'num_items' must be an int")
        if num_items < 0:
            raise ValueError("'num_items' must be nonnegative")
        return _result(self._actor().get_nowait_batch.remote(num_items))

    def shutdown(self, force: bool = False, grace_period_s: int = 5) -> None:
        """Ends the actor; the items are lost. Without `force`, calls that were made may finish within the grace."""
        actor, self.actor = self.actor, None
        if actor is None:
            return
        if not force:
            done, _ = ray.wait([actor.__ray_terminate__.remote()], timeout=grace_period_s)
            if done:
                return
        ray.kill(actor, no_restart=True)


def _result(reference: Any) -> Any:
    # Full and Empty are answers rather than failures: without the traceback of the actor's code.
    try:
        return ray.get(reference)
    except (Full, Empty) as error:
        raise _cause(error) from None


async def _async_result(reference: Any) -> Any:
    try:
        return await reference
    except (Full, Empty) as error:
        raise _cause(error) from None


def _cause(error: BaseException) -> BaseException:
    return error.cause if isinstance(error, ray.exceptions.RayTaskError) else error


def _check_timeout(timeout: float | None) -> None:
    if timeout is not None and timeout < 0:
        raise ValueError("'timeout' must be a non-negative number")


class _QueueActor:
    """Keeps the items. It is an async actor, so that those who wait do not hold up the others."""

    def __init__(self, maxsize: int) -> None:
        self.maxsize = maxsize
        self.queue: asyncio.Queue[Any] = asyncio.Queue(max(0, maxsize))

    async def qsize(self) -> int:
        return self.queue.qsize()

    async def empty(self) -> bool:
        return self.queue.empty()

    async def full(self) -> bool:
        return self.queue.full()

    async def put(self, item: Any, timeout: float | None = None) -> None:
        try:
            await asyncio.wait_for(self.queue.put(item), timeout)
        except TimeoutError:
            raise Full from None

    async def get(self, timeout: float | None = None) -> Any:
        try:
            return await asyncio.wait_for(self.queue.get(), timeout)
        except TimeoutError:
            raise Empty from None

    async def put_nowait(self, item: Any) -> None:
        try:
            self.queue.put_nowait(item)
        except asyncio.QueueFull:
            raise Full from None

    async def put_nowait_batch(self, items: list[Any]) -> None:
        if self.maxsize > 0 and self.queue.qsize() + len(items) > self.maxsize:
            raise Full(
                f"Cannot add {len(items)} items to queue of size {self.queue.qsize()} and maxsize {self.maxsize}."
            )
        for item in items:
            self.queue.put_nowait(item)

    async def get_nowait(self) -> Any:
        try:
            return self.queue.get_nowait()
        except asyncio.QueueEmpty:
            raise Empty from None

    async def get_nowait_batch(self, num_items: int) -> list[Any]:
        if num_items > self.queue.qsize():
            raise Empty(f"Cannot get {num_items} items from queue of size {self.queue.qsize()}.")
        return [self.queue.get_nowait() for _ in range(num_items)]
