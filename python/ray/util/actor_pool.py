"""A fixed set of actors that share a stream of work."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any, TypeVar

import ray

if TYPE_CHECKING:
    from ray.actor import ActorHandle

V = TypeVar("V")


class ActorPool:
    """Hands each value to an actor that is free, and queues values while none is.

    Example:
        >>> pool = ActorPool([Doubler.remote(), Doubler.remote()])
        >>> list(pool.map(lambda actor, value: actor.double.remote(value), [1, 2, 3]))
        [2, 4, 6]
    """

    def __init__(self, actors: list[Any]) -> None:
        self._idle_actors: list[Any] = list(actors)
        # Reference of a call that was submitted -> (its number, its actor).
        self._running: dict[Any, tuple[int, Any]] = {}
        # Number -> reference, for those whose results were not taken.
        self._by_number: dict[int, Any] = {}
        self._next_number = 0
        self._next_to_return = 0
        self._waiting: list[tuple[Callable[[Any, Any], Any], Any]] = []

    def map(self, fn: Callable[[ActorHandle, V], Any], values: Iterable[V]) -> Iterator[Any]:
        """Results of `fn(actor, value)` in the order of `values`. Results left over from earlier calls are dropped.

        `fn` returns a reference, as `actor.method.remote(value)` does.
        """
        return self._map(fn, values, self.get_next)

    def map_unordered(self, fn: Callable[[ActorHandle, V], Any], values: Iterable[V]) -> Iterator[Any]:
        """As `map`, but each result as soon as it is there."""
        return self._map(fn, values, self.get_next_unordered)

    def _map(self, fn: Callable[[Any, Any], Any], values: Iterable[Any], take: Callable[..., Any]) -> Iterator[Any]:
        while self.has_next():
            try:
                self.get_next_unordered(timeout=0, ignore_if_timedout=True)
            except Exception:  # Nobody asked for what is left over, nor for its failure.
                pass
        for value in values:
            self.submit(fn, value)

        def results() -> Iterator[Any]:
            while self.has_next():
                yield take()

        return results()

    def submit(self, fn: Callable[[ActorHandle, V], Any], value: V) -> None:
        """Starts `fn(actor, value)` on a free actor, or queues it until one is free."""
        if not self._idle_actors:
            self._waiting.append((fn, value))
            return
        actor = self._idle_actors.pop()
        reference = fn(actor, value)
        self._running[tuple(reference) if isinstance(reference, list) else reference] = (self._next_number, actor)
        self._by_number[self._next_number] = reference
        self._next_number += 1

    def has_next(self) -> bool:
        """Whether results are due."""
        return bool(self._running)

    def get_next(self, timeout: float | None = None, ignore_if_timedout: bool = False) -> Any:
        """The next result in the order of submission.

        Raises:
            StopIteration: no result is due.
            TimeoutError: it is not there within `timeout` seconds; with `ignore_if_timedout` it is given up.
        """
        if not self.has_next():
            raise StopIteration("No more results to get")
        # Numbers that get_next_unordered took leave gaps.
        while self._next_to_return not in self._by_number:
            self._next_to_return += 1
        reference = self._by_number[self._next_to_return]
        message = "Timed out waiting for result"
        given_up = False
        if timeout is not None:
            ready, _ = ray.wait(_flat(reference), num_returns=len(_flat(reference)), timeout=timeout)
            if len(ready) < len(_flat(reference)):
                if not ignore_if_timedout:
                    raise TimeoutError(message)
                message += f". The task {reference} has been ignored."
                given_up = True
        del self._by_number[self._next_to_return]
        self._next_to_return += 1
        _, actor = self._running.pop(_key(reference))
        self._return_actor(actor)
        if given_up:
            raise TimeoutError(message)
        return ray.get(reference)

    def get_next_unordered(self, timeout: float | None = None, ignore_if_timedout: bool = False) -> Any:
        """Whichever result is there first.

        Raises:
            StopIteration: no result is due.
            TimeoutError: none is there within `timeout` seconds; with `ignore_if_timedout` one is given up.
        """
        if not self.has_next():
            raise StopIteration("No more results to get")
        heads = {_flat(key)[0]: key for key in self._running}
        ready, _ = ray.wait(list(heads), num_returns=1, timeout=timeout)
        message = "Timed out waiting for result"
        if ready:
            key = heads[ready[0]]
        elif not ignore_if_timedout:
            raise TimeoutError(message)
        else:
            key = next(iter(self._running))
            message += f". The task {key} has been ignored."
        number, actor = self._running.pop(key)
        reference = self._by_number.pop(number)
        self._return_actor(actor)
        if not ready:
            raise TimeoutError(message)
        return ray.get(reference)

    def _return_actor(self, actor: Any) -> None:
        self._idle_actors.append(actor)
        if self._waiting:
            self.submit(*self._waiting.pop(0))

    def has_free(self) -> bool:
        """Whether an actor is free and nothing waits for one."""
        return bool(self._idle_actors) and not self._waiting

    def pop_idle(self) -> Any:
        """Takes a free actor out of the pool; None where none is free."""
        return self._idle_actors.pop() if self.has_free() else None

    def push(self, actor: Any) -> None:
        """Adds an actor.

        Raises:
            ValueError: it is in the pool already.
        """
        busy = [running for _, running in self._running.values()]
        if actor in self._idle_actors or actor in busy:
            raise ValueError("Actor already belongs to current ActorPool")
        self._return_actor(actor)


def _key(reference: Any) -> Any:
    return tuple(reference) if isinstance(reference, list) else reference


def _flat(reference: Any) -> list[Any]:
    return list(reference) if isinstance(reference, (list, tuple)) else [reference]
