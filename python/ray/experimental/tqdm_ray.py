"""Progress bars for tasks and actors: what they print reaches the driver as lines of their output.

A bar prints a line at most every `flush_interval_s` seconds, because lines of several processes share one terminal.
"""

from __future__ import annotations

import builtins
import sys
import time
from collections.abc import Iterable, Iterator
from typing import Any

from ray.util.debug import log_once

_WIDTH = 20


def safe_print(*args: Any, **kwargs: Any) -> None:
    """`print`, which needs nothing special here: a bar never moves the cursor."""
    builtins.print(*args, **kwargs)


class tqdm:
    """A progress bar with the main methods of `tqdm.tqdm`.

    Args:
        iterable: what to iterate over; `total` is its length where it has one.
        desc: what is shown before the bar.
        total: how many steps there are.
        unit: what a step is.
        position: only None or 0: each bar prints lines of its own.
        flush_interval_s: least time between two lines.

    Example:
        >>> for item in tqdm(items, desc="reading"):
        ...     read(item)
    """

    DEFAULT_FLUSH_INTERVAL_SECONDS = 1.0

    def __init__(
        self,
        iterable: Iterable[Any] | None = None,
        desc: str | None = None,
        total: int | None = None,
        unit: str | None = None,
        *,
        position: int | None = None,
        flush_interval_s: float | None = None,
    ) -> None:
        if position not in (None, 0):
            raise NotImplementedError("tqdm_ray.tqdm(position=…) is not built: each bar prints lines of its own")
        if total is None and iterable is not None:
            try:
                total = len(iterable)  # type: ignore[arg-type]
            except TypeError:
                pass
        self._iterable = iterable
        self._desc = desc or ""
        self.total = total
        self.n = 0
        self._unit = unit or "it"
        self._interval_s = self.DEFAULT_FLUSH_INTERVAL_SECONDS if flush_interval_s is None else flush_interval_s
        self._started = time.monotonic()
        self._last_flush = self._started
        self._last_line = ""
        self._is_closed = False

    def set_description(self, desc: str) -> None:
        """Changes what is shown before the bar."""
        self._desc = desc

    def update(self, n: int = 1) -> None:
        """Counts `n` steps, and prints when the last line is old enough."""
        self.n += n
        if time.monotonic() - self._last_flush >= self._interval_s:
            self.refresh()

    def refresh(self) -> None:
        """Prints now, unless nothing changed."""
        line = self._line()
        self._last_flush = time.monotonic()
        if line != self._last_line:
            self._last_line = line
            safe_print(line, file=sys.stderr, flush=True)

    def close(self) -> None:
        """Prints the last state."""
        if not self._is_closed:
            self._is_closed = True
            self.refresh()

    def _line(self) -> str:
        elapsed = max(time.monotonic() - self._started, 1e-9)
        head = f"{self._desc}: " if self._desc else ""
        rate = f"{self.n / elapsed:.1f} {self._unit}/s"
        if not self.total:
            return f"{head}{self.n} {self._unit} ({rate})"
        done = min(1.0, self.n / self.total)
        bar = "#" * int(done * _WIDTH)
        return f"{head}{done:4.0%} |{bar:<{_WIDTH}}| {self.n}/{self.total} ({rate})"

    def __iter__(self) -> Iterator[Any]:
        if self._iterable is None:
            raise ValueError("No iterable provided")
        for item in self._iterable:
            yield item
            self.update(1)
        self.close()

    def __enter__(self) -> tqdm:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


__all__ = ["log_once", "safe_print", "tqdm"]
