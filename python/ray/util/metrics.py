"""Metrics that a program counts itself. Each process keeps its own; `collect` shows them.

There is no exporter yet: a value is read with `collect()` where it was recorded, for example by a method of the actor
that records it.
"""

from __future__ import annotations

import bisect
import re
import threading
from typing import Any

_NAME = re.compile(r"[a-zA-Z_:][a-zA-Z0-9_:]*")
_lock = threading.Lock()
_registry: dict[str, Metric] = {}

TagValues = tuple[tuple[str, str], ...]


class Metric:
    """What counters, gauges and histograms share: a name, a description, and tags.

    Metrics of one name in one process share their values.
    """

    kind = "metric"

    def __init__(self, name: str, description: str = "", tag_keys: tuple[str, ...] | None = None) -> None:
        if not isinstance(name, str):
            raise TypeError(f"the name of a metric must be a str, not {type(name).__name__}")
        if not name:
            raise ValueError("Empty name is not allowed. Please provide a metric name.")
        if not _NAME.fullmatch(name):
            raise ValueError(f"Invalid metric name: {name}. It must match {_NAME.pattern}.")
        tag_keys = () if tag_keys is None else tag_keys
        if not isinstance(tag_keys, tuple):
            raise TypeError(f"tag_keys should be a tuple type, got: {type(tag_keys)}")
        for key in tag_keys:
            if not isinstance(key, str):
                raise TypeError(f"Tag keys must be str, got {type(key)}.")
        if ":" in name:
            raise ValueError(f"Invalid metric name: {name}. Colons are kept for rules.")
        self._name = name
        self._description = description
        self._tag_keys = tag_keys
        self._default_tags: dict[str, str] = {}
        with _lock:
            existing = _registry.get(name)
            if existing is not None and existing.kind != self.kind:
                raise ValueError(f"the metric {name!r} exists already and is a {existing.kind}, not a {self.kind}")
            self._values: dict[TagValues, Any] = existing._values if existing is not None else {}
            if existing is None:
                _registry[name] = self

    def set_default_tags(self, default_tags: dict[str, str]) -> Metric:
        """Tags for records that do not give their own. Returns the metric.

        Raises:
            ValueError: a key that is not of this metric.
            TypeError: a value that is no str.
        """
        for key, value in default_tags.items():
            if key not in self._tag_keys:
                raise ValueError(f"Unrecognized tag key {key}.")
            if not isinstance(value, str):
                raise TypeError(f"Tag values must be str, got {type(value)}.")
        self._default_tags = dict(default_tags)
        return self

    def _tags(self, tags: dict[str, str] | None) -> TagValues:
        if tags is not None:
            for value in tags.values():
                if not isinstance(value, str):
                    raise TypeError(f"Tag values must be str, got {type(value)}.")
        # A key that was not declared is one more.
        merged = {**self._default_tags, **(tags or {})}
        missing = [key for key in self._tag_keys if key not in merged]
        if missing:
            raise ValueError(f"Missing value for tag key(s): {','.join(missing)}.")
        return tuple(sorted(merged.items()))

    @property
    def info(self) -> dict[str, Any]:
        """Name, description, tag_keys and default_tags."""
        return {
            "name": self._name,
            "description": self._description,
            "tag_keys": self._tag_keys,
            "default_tags": self._default_tags,
        }

    def __reduce__(self) -> Any:
        return _rebuild, (type(self), self.info, getattr(self, "boundaries", None))


def _rebuild(cls: type[Metric], info: dict[str, Any], boundaries: list[float] | None) -> Metric:
    arguments: dict[str, Any] = {"description": info["description"], "tag_keys": info["tag_keys"]}
    if boundaries is not None:
        arguments["boundaries"] = boundaries
    return cls(info["name"], **arguments).set_default_tags(info["default_tags"])


class Counter(Metric):
    """A sum that only grows.

    Example:
        >>> requests = Counter("requests", tag_keys=("route",))
        >>> requests.inc(tags={"route": "/"})
    """

    kind = "counter"

    def inc(self, value: int | float = 1.0, tags: dict[str, str] | None = None) -> None:
        """Adds `value`, which must be above 0.

        Raises:
            TypeError, ValueError: a value or tags that cannot be.
        """
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise TypeError(f"value must be int or float, got {type(value)}.")
        if value <= 0:
            raise ValueError(f"value must be >0, got {value}")
        key = self._tags(tags)
        with _lock:
            self._values[key] = self._values.get(key, 0.0) + value


class Gauge(Metric):
    """A value that goes up and down.

    Example:
        >>> Gauge("queue_length").set(3)
    """

    kind = "gauge"

    def set(self, value: int | float | None, tags: dict[str, str] | None = None) -> None:
        """Sets the value; None changes nothing.

        Raises:
            TypeError, ValueError: a value or tags that cannot be.
        """
        if value is None:
            return
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise TypeError(f"value must be int or float, got {type(value)}.")
        key = self._tags(tags)
        with _lock:
            self._values[key] = float(value)


class Histogram(Metric):
    """Counts of values by range. `boundaries` are the upper ends of the ranges; the last range has no end.

    Example:
        >>> Histogram("latency_s", boundaries=[0.01, 0.1, 1]).observe(0.05)
    """

    kind = "histogram"

    def __init__(
        self,
        name: str,
        description: str = "",
        boundaries: list[float] | None = None,
        tag_keys: tuple[str, ...] | None = None,
    ) -> None:
        if not boundaries:
            raise ValueError(
                "boundaries argument should be provided when using the Histogram class. "
                'e.g., Histogram("name", boundaries=[1.0, 2.0])'
            )
        for index, boundary in enumerate(boundaries):
            if boundary <= 0:
                raise ValueError(
                    f"Invalid `boundaries` argument at index {index}, {boundaries}. "
                    "Use positive values for the arguments."
                )
        if sorted(boundaries) != list(boundaries):
            raise ValueError(f"Invalid `boundaries` argument, {boundaries}. They must grow.")
        super().__init__(name, description, tag_keys)
        self.boundaries = list(boundaries)

    def observe(self, value: int | float, tags: dict[str, str] | None = None) -> None:
        """Counts `value`.

        Raises:
            TypeError, ValueError: a value or tags that cannot be.
        """
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise TypeError(f"value must be int or float, got {type(value)}.")
        key = self._tags(tags)
        with _lock:
            entry = self._values.setdefault(key, {"counts": [0] * (len(self.boundaries) + 1), "sum": 0.0, "count": 0})
            entry["counts"][bisect.bisect_left(self.boundaries, value)] += 1
            entry["sum"] += value
            entry["count"] += 1

    @property
    def info(self) -> dict[str, Any]:
        """As of every metric, and boundaries."""
        return {**super().info, "boundaries": self.boundaries}


def collect() -> list[dict[str, Any]]:
    """Every metric of this process: name, kind, description, and values as a list of {"tags", "value"}."""
    with _lock:
        return [
            {
                "name": metric._name,
                "kind": metric.kind,
                "description": metric._description,
                "values": [
                    {"tags": dict(tags), "value": dict(value) if isinstance(value, dict) else value}
                    for tags, value in metric._values.items()
                ],
            }
            for metric in _registry.values()
        ]


__all__ = ["Counter", "Gauge", "Histogram", "collect"]
