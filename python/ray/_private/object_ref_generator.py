"""What calls of generators return: references that arrive one by one."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from ray._private.ray_constants import NUM_RETURNS_STREAMING
from ray._raylet import ObjectRef

if TYPE_CHECKING:
    from ray._raylet import StreamCore

T = TypeVar("T")


class DynamicObjectRefGenerator(Generic[T]):
    """The value of a ``num_returns="dynamic"`` call: a fixed list of references to iterate, any number of times.

    Example:
        >>> for ref in ray.get(split.options(num_returns="dynamic").remote(data)):
        ...     print(ray.get(ref))
    """

    def __init__(self, refs: list[ObjectRef[T]]) -> None:
        self._refs = refs

    def __iter__(self) -> Iterator[ObjectRef[T]]:
        yield from self._refs

    def __len__(self) -> int:
        return len(self._refs)

    def __getitem__(self, index: int) -> ObjectRef[T]:
        return self._refs[index]


class ObjectRefGenerator(Generic[T]):
    """The references of a streaming generator, each available once its item was yielded.

    Iterate it with ``for`` or ``async for``. A failure of the task is an item of its own: getting it raises.

    Args:
        generator_ref: the stream that the runtime made for the call.
        worker: unused; named for compatibility.

    Example:
        >>> for ref in numbers.remote(3):
        ...     print(ray.get(ref))
    """

    def __init__(self, generator_ref: StreamCore, worker: Any = None) -> None:
        del worker
        self._stream = generator_ref

    def __iter__(self) -> ObjectRefGenerator[T]:
        return self

    def __next__(self) -> ObjectRef[T]:
        return self._next_sync()

    def _next_sync(self, timeout_s: float | None = None) -> ObjectRef[T]:
        """The next reference; nil where the timeout passes first. Raises StopIteration at the end."""
        if timeout_s is None or timeout_s < 0:
            reference = self._stream.next(None)
        else:
            from ray.exceptions import GetTimeoutError

            try:
                reference = self._stream.next(timeout_s)
            except GetTimeoutError:
                return ObjectRef.nil()
        if reference is None:
            raise StopIteration
        return reference

    def __aiter__(self) -> ObjectRefGenerator[T]:
        return self

    async def __anext__(self) -> ObjectRef[T]:
        return await self._next_async()

    async def _next_async(self, timeout_s: float | None = None) -> ObjectRef[T]:
        """As `_next_sync`, for coroutines. Raises StopAsyncIteration at the end."""
        known, reference = self._stream.try_next()
        if not known:
            import asyncio

            from ray._private.async_compat import watch_stream

            waiter = watch_stream(self._stream)
            try:
                await asyncio.wait_for(waiter, timeout_s)
            except TimeoutError:
                return ObjectRef.nil()
            known, reference = self._stream.try_next()
        if reference is None:
            raise StopAsyncIteration
        return reference

    def completed(self) -> ObjectRef[Any]:
        """A reference that resolves when the task is over, and raises what the task raised."""
        return self._stream.completed_reference()

    def next_ready(self) -> bool:
        """Whether `next()` would return (or end) without waiting."""
        from ray._private.async_compat import stream_ready

        return stream_ready(self._stream)

    def is_finished(self) -> bool:
        """Whether every item was taken."""
        return self._stream.is_finished()

    def task_id(self) -> Any:
        """The id of the generator's task."""
        from ray._private.ids import TaskID

        return TaskID(self._stream.task_id())

    def close(self) -> None:
        """Gives up the rest: the task stops at its next item."""
        self._stream.abandon()

    async def aclose(self) -> None:
        """As `close`."""
        self._stream.abandon()

    def send(self, value: Any) -> Any:
        """Not possible: the generator runs in another process."""
        raise NotImplementedError("ObjectRefGenerator.send(): values cannot be sent into a remote generator")

    async def asend(self, value: Any) -> Any:
        """Not possible: the generator runs in another process."""
        raise NotImplementedError("ObjectRefGenerator.asend(): values cannot be sent into a remote generator")

    def throw(self, value: Any) -> Any:
        """Not possible: the generator runs in another process."""
        raise NotImplementedError("ObjectRefGenerator.throw(): exceptions cannot be thrown into a remote generator")

    async def athrow(self, value: Any) -> Any:
        """Not possible: the generator runs in another process."""
        raise NotImplementedError("ObjectRefGenerator.athrow(): exceptions cannot be thrown into a remote generator")

    def __reduce__(self) -> Any:
        raise TypeError(
            "You cannot return or pass a generator to other task. Serializing an ObjectRefGenerator is not allowed: "
            "pass the references that it yields."
        )


def wrapper_of(num_returns: int) -> Callable[[Any], Any] | None:
    """What is made of the extension's answer to a call with this many returns; None where it is passed on as it is."""
    return ObjectRefGenerator if num_returns == NUM_RETURNS_STREAMING else None


# Where users know them from.
ObjectRefGenerator.__module__ = "ray"
