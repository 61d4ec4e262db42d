"""Exports functions and classes to workers, and loads them there.

A function is captured when it is first called: its pickle's hash is its id. A pickle up to 256 KiB travels with the
call's template; a larger one is put into the key-value store under its id, where workers fetch it once.

Invariant: 1. A function that a worker loaded is exported again under the id it came with, so that recursion does not
make new ids on every level.
"""

from __future__ import annotations

import hashlib
import logging
import weakref
from typing import TYPE_CHECKING, Any, NamedTuple

from ray._private import ray_constants, serialization
from ray._private.worker import global_worker

if TYPE_CHECKING:
    from ray._raylet import CoreWorker

logger = logging.getLogger(__name__)


class Exported(NamedTuple):
    """An exported function or class; the blob is empty where it lies in the key-value store."""

    function_id: bytes
    blob: bytes


# What this worker loaded, by object.
_loaded: weakref.WeakKeyDictionary[Any, Exported] = weakref.WeakKeyDictionary()


def export(core: CoreWorker, target: Any, name: str, kind: str) -> Exported:
    """Pickles a function or class for workers.

    Args:
        kind: "function" or "actor class", for errors.

    Raises:
        TypeError: it cannot be pickled; the message names the path to the culprit.
        ValueError: its pickle is too large.
    """
    global_worker.ran_something = True
    try:
        known = _loaded.get(target)
    except TypeError:  # No weak references to it.
        known = None
    if known is not None:
        return known
    try:
        blob = serialization.dumps(target)
    except serialization.SerializationError as error:
        cause = error.__cause__ or error
        raise serialization.explain_failure(target, cause, f"the {kind} {name}, that is") from None
    if len(blob) > ray_constants.FUNCTION_SIZE_ERROR_THRESHOLD_BYTES:
        raise ValueError(
            f"The {kind} {name} is too large ({len(blob) / 2**20:.0f} MiB > FUNCTION_SIZE_ERROR_THRESHOLD="
            f"{ray_constants.FUNCTION_SIZE_ERROR_THRESHOLD_BYTES / 2**20:.0f} MiB). Check that its definition does "
            "not capture a large array or other object; put large objects into the object store with ray.put()."
        )
    if len(blob) > ray_constants.FUNCTION_SIZE_WARN_THRESHOLD_BYTES:
        logger.warning(
            "The %s %s is very large (%d MiB). Check that its definition does not capture a large array or other "
            "object; put large objects into the object store with ray.put().",
            kind,
            name,
            len(blob) >> 20,
        )
    function_id = hashlib.blake2b(blob, digest_size=28).digest()
    if len(blob) > ray_constants.INLINE_FUNCTION_LIMIT_BYTES:
        core.kv_put(ray_constants.FUNCTION_NAMESPACE, function_id, blob, True)
        blob = b""
    return Exported(function_id, blob)


class Capture:
    """A function or class as it was when it was first called; shared by all that `.options()` makes of it."""

    __slots__ = ("_core", "_exported")

    def __init__(self) -> None:
        self._core: CoreWorker | None = None
        self._exported: Exported | None = None

    def export(self, core: CoreWorker, target: Any, name: str, kind: str) -> Exported:
        """As `export`, once for each connection."""
        if self._exported is None or self._core is not core:
            self._exported = export(core, target, name, kind)
            self._core = core
        return self._exported


def load(core: CoreWorker, function_id: bytes, blob: bytes, name: str) -> Any:
    """The function or class of an export.

    Raises:
        RuntimeError: it cannot be fetched, or unpickling it raised, as where a module is missing here.
    """
    travelled = blob
    if not blob:
        fetched = core.kv_get(ray_constants.FUNCTION_NAMESPACE, function_id, ray_constants.FUNCTION_FETCH_TIMEOUT_S)
        if fetched is None:
            raise RuntimeError(
                f"The remote function {name} could not be fetched: the control plane does not have its definition "
                f"(id {function_id.hex()}) after {ray_constants.FUNCTION_FETCH_TIMEOUT_S:.0f} s."
            )
        blob = fetched
    try:
        target = serialization.loads(blob)
    except Exception as error:
        raise RuntimeError(
            f"The remote function {name} failed to import on the worker ({type(error).__name__}: {error}). A library "
            "that it needs may be missing in the worker's environment, or a module that the driver sees may not be on "
            "the worker's path."
        ) from error
    try:
        _loaded[target] = Exported(function_id, travelled)
    except TypeError:
        logger.debug("%r takes no weak references", target)
    return target
