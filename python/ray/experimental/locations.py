"""Where objects lie."""

from __future__ import annotations

from typing import Any

import ray
from ray._private.context import ensure_context


def get_local_object_locations(obj_refs: list[ray.ObjectRef[Any]]) -> dict[ray.ObjectRef[Any], dict[str, Any]]:
    """The nodes and the size of objects, as far as this process knows them; it asks nobody.

    Returns:
        For each reference {"node_ids": [hexadecimal ids], "object_size": bytes}; those of which it knows nothing are
        left out.

    Raises:
        TypeError: not a list of references.

    Example:
        >>> get_local_object_locations([ref])[ref]["object_size"]
        800143
    """
    _check(obj_refs)
    found = ensure_context().core.object_locations(obj_refs)
    return {
        reference: location
        for reference, location in zip(obj_refs, found, strict=True)
        if location["node_ids"] or location["object_size"] is not None
    }


def get_object_locations(
    obj_refs: list[ray.ObjectRef[Any]], timeout_ms: int = -1
) -> dict[ray.ObjectRef[Any], dict[str, Any]]:
    """The nodes and the size of objects that this process owns.

    Args:
        timeout_ms: how long to wait for objects that are not made yet; -1 does not wait.

    Returns:
        For each reference {"node_ids": [hexadecimal ids], "object_size": bytes}: no nodes and no size for an object
        that is not there yet.

    Raises:
        TypeError: not a list of references.
    """
    _check(obj_refs)
    core = ensure_context().core
    if timeout_ms > 0 and obj_refs:
        unique = list(dict.fromkeys(obj_refs))
        ray.wait(unique, num_returns=len(unique), timeout=timeout_ms / 1000, fetch_local=False)
    return dict(zip(obj_refs, core.object_locations(obj_refs), strict=True))


def _check(references: Any) -> None:
    if not isinstance(references, list) or not all(isinstance(item, ray.ObjectRef) for item in references):
        raise TypeError(f"obj_refs must be a list of ray.ObjectRef, got {references!r}")
