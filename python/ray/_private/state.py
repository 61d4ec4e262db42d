"""Questions about the cluster: nodes, resources, actors."""

from __future__ import annotations

import json
from typing import Any

from ray._private.context import ensure_context


def query(method: str, **arguments: Any) -> Any:
    """What the control plane answers to a question; see its queries."""
    return json.loads(ensure_context().core.gcs_query(json.dumps({"method": method, **arguments})))


def nodes() -> list[dict[str, Any]]:
    """The nodes of the cluster, dead ones too.

    Example:
        >>> [node["NodeID"] for node in ray.nodes() if node["Alive"]]
    """
    return query("nodes")


def cluster_resources() -> dict[str, float]:
    """What all live nodes have together."""
    return query("cluster_resources")


def available_resources() -> dict[str, float]:
    """What of the cluster's resources nobody holds; names with nothing left are left out."""
    return {name: amount for name, amount in query("available_resources").items() if amount}


def list_named_actors(all_namespaces: bool = False) -> list[Any]:
    """The live named actors: names of this namespace, or with `all_namespaces` dicts of name and namespace."""
    found = query("named_actors", all_namespaces=all_namespaces, namespace=ensure_context().namespace)
    if all_namespaces:
        return [{"name": actor["name"], "namespace": actor["namespace"]} for actor in found]
    return [actor["name"] for actor in found]


def timeline(filename: str | None = None) -> list[dict[str, Any]] | None:
    """Would give the tasks' times in the format of Chrome's tracing."""
    raise NotImplementedError(f"ray.timeline({filename!r}): collecting the times of tasks is not built yet")
