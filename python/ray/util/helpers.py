"""Iterators over results as they become ready."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import ray


def as_completed(
    refs: Sequence[Any], *, chunk_size: int = 10, yield_obj_refs: bool = False, **kwargs: Any
) -> Iterator[Any]:
    """Yields results (or with `yield_obj_refs` references) as they become ready.

    Args:
        refs: references to wait for.
        chunk_size: take up to this many ready results at once.
        yield_obj_refs: yield references rather than values.
        kwargs: for `ray.wait`, such as `timeout` and `fetch_local`. Iteration ends where a wait times out.

    Example:
        >>> sorted(as_completed([square.remote(i) for i in range(4)]))
        [0, 1, 4, 9]
    """
    if chunk_size < 1:
        raise ValueError("`chunk_size` must be >= 1")
    if "num_returns" in kwargs:
        raise ValueError("Use the `chunk_size` argument instead of `num_returns`.")
    pending = list(refs)
    while pending:
        # At least one, then whatever else is ready already: waiting for a whole chunk would hold back what is there.
        ready, pending = ray.wait(pending, num_returns=1, **kwargs)
        if not ready:
            return
        if pending and chunk_size > 1:
            more, pending = ray.wait(pending, num_returns=min(chunk_size - 1, len(pending)), **{**kwargs, "timeout": 0})
            ready += more
        yield from (ready if yield_obj_refs else ray.get(ready))


def map_unordered(
    fn: Any,
    items: Iterable[Any],
    *,
    backpressure_size: int | None = 100,
    chunk_size: int = 10,
    yield_obj_refs: bool = False,
    **kwargs: Any,
) -> Iterator[Any]:
    """Calls the remote function on each item and yields results as they become ready.

    Args:
        fn: a remote function.
        items: its arguments, taken lazily.
        backpressure_size: at most this many calls at once; None for no limit.
        chunk_size, yield_obj_refs, kwargs: as for `as_completed`.

    Example:
        >>> sorted(map_unordered(square, range(4)))
        [0, 1, 4, 9]
    """
    if backpressure_size is None:
        backpressure_size = 2**63
    elif backpressure_size <= 0:
        raise ValueError("backpressure_size must be positive.")
    if chunk_size < 1:
        raise ValueError("`chunk_size` must be >= 1")
    remaining = iter(items)
    pending: list[Any] = []
    is_exhausted = False
    while True:
        while not is_exhausted and len(pending) < backpressure_size:
            try:
                item = next(remaining)
            except StopIteration:
                is_exhausted = True
                break
            pending.append(fn.remote(item))
        if not pending:
            return
        ready, pending = ray.wait(pending, num_returns=1, **kwargs)
        if not ready:
            return
        if pending and chunk_size > 1:
            more, pending = ray.wait(pending, num_returns=min(chunk_size - 1, len(pending)), **{**kwargs, "timeout": 0})
            ready += more
        yield from (ready if yield_obj_refs else ray.get(ready))
