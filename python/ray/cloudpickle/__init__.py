"""cloudpickle as this runtime uses it: with the registered serializers, and names of files in tracebacks."""

from __future__ import annotations

import io
import pickle
from collections.abc import Callable
from typing import IO, Any

from cloudpickle import (
    DEFAULT_PROTOCOL,
    register_pickle_by_value,
    unregister_pickle_by_value,
)

from ray._private.serialization import Pickler

CloudPickler = Pickler
load = pickle.load
loads = pickle.loads


def dump(
    obj: Any, file: IO[bytes], protocol: int | None = None, buffer_callback: Callable[[Any], Any] | None = None
) -> None:
    """Writes the pickle of `obj` to `file`. Raises what the pickler raises for what cannot be pickled."""
    Pickler(file, protocol=protocol, buffer_callback=buffer_callback).dump(obj)


def dumps(obj: Any, protocol: int | None = None, buffer_callback: Callable[[Any], Any] | None = None) -> bytes:
    """The pickle of `obj`; functions and classes of ``__main__`` by value.

    Example:
        >>> ray.cloudpickle.loads(ray.cloudpickle.dumps(lambda x: x + 1))(2)
        3
    """
    file = io.BytesIO()
    dump(obj, file, protocol, buffer_callback)
    return file.getvalue()


__all__ = [
    "DEFAULT_PROTOCOL",
    "CloudPickler",
    "Pickler",
    "dump",
    "dumps",
    "load",
    "loads",
    "register_pickle_by_value",
    "unregister_pickle_by_value",
]
