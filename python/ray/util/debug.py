"""Small aids for debugging."""

from __future__ import annotations

import time
from typing import Any

_logged: set[str] = set()
_is_disabled = False
_period_s: float | None = None
_last: dict[str, float] = {}


def log_once(key: str) -> bool:
    """True the first time it is called with `key` in this process (or since a minute, after
    `enable_periodic_logging`), and False after that.

    Example:
        >>> if log_once("slow_path"):
        ...     logger.warning("taking the slow path")
    """
    if _is_disabled:
        return False
    if key not in _logged:
        _logged.add(key)
        _last[key] = time.monotonic()
        return True
    if _period_s is not None and time.monotonic() - _last.get(key, 0.0) > _period_s:
        _last[key] = time.monotonic()
        return True
    return False


def disable_log_once_globally() -> None:
    """Makes `log_once` return False from now on, in this process."""
    global _is_disabled
    _is_disabled = True


def enable_periodic_logging() -> None:
    """Makes `log_once` return True again each minute, in this process."""
    global _is_disabled, _period_s
    _is_disabled = False
    _period_s = 60.0


def reset_log_once(key: str | None = None) -> None:
    """Forgets that `key`, or every key, was logged."""
    if key is None:
        _logged.clear()
        _last.clear()
    else:
        _logged.discard(key)
        _last.pop(key, None)


class Suspect:
    """A place that may leak memory: not built yet.

    Raises:
        NotImplementedError: always.
    """

    def __init__(self, traceback: Any, memory_increase: int, slope: float, rvalue: float, hist: list[int]) -> None:
        raise NotImplementedError("ray.util.debug.Suspect: the search for memory leaks is not built yet")
