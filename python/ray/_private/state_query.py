"""Questions to a cluster's control plane and raylets, from a connected driver or from a tool that only asks."""

from __future__ import annotations

import json
import threading
from typing import Any

from ray._private import services
from ray._private.node import ClusterConnection, find_cluster

CONNECT_TIMEOUT_S = 10.0


class Tool:
    """A connection that only asks: no job, no work. Close it, or use it in a `with` statement."""

    def __init__(self, node: Any, timeout_s: float = CONNECT_TIMEOUT_S) -> None:
        from ray._private.hooks import RuntimeHooks
        from ray._raylet import CoreWorker

        self.node = node
        self._core: Any = CoreWorker.connect(
            {
                "raylet_socket": node.raylet_socket,
                "role": "tool",
                "session_directory": node.session_directory,
                "connect_timeout_s": timeout_s,
            },
            RuntimeHooks(),
        )
        self._lock = threading.Lock()

    @property
    def core(self) -> Any:
        """The core worker. Raises RuntimeError once it is closed."""
        if self._core is None:
            raise RuntimeError("this connection is closed")
        return self._core

    def close(self) -> None:
        """Ends the connection."""
        with self._lock:
            core, self._core = self._core, None
        if core is not None:
            core.shutdown()

    def gcs_query(self, method: str, **arguments: Any) -> Any:
        """The control plane's answer to `method`."""
        return json.loads(self.core.gcs_query(json.dumps({"method": method, **arguments})))

    def node_query(self, method: str, **arguments: Any) -> Any:
        """The raylet's answer to `method`."""
        return json.loads(self.core.node_query(json.dumps({"method": method, **arguments})))

    def __enter__(self) -> Tool:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def connect_tool(address: str | None = None, timeout_s: float = CONNECT_TIMEOUT_S) -> Tool:
    """A tool's connection to the cluster at `address` ("auto" and None find one that runs here).

    Raises:
        ConnectionError: there is none.
    """
    connection = find_cluster(address or "auto")
    if connection is None:
        raise ConnectionError("Could not find any running Ray instance.")
    return Tool(connection, timeout_s)


def _connected_core(address: str | None) -> Any:
    """This process's own connection, where it is to the cluster that is asked about."""
    from ray._private.context import current
    from ray._private.worker import global_worker

    if current.context is None:
        return None
    node = global_worker.node
    if address in (None, "auto") or node is None or getattr(node, "address", None) == address:
        return current.context.core
    return None


def gcs_query(method: str, address: str | None = None, **arguments: Any) -> Any:
    """The control plane's answer, over this process's connection or one made for this question.

    Raises:
        ConnectionError: there is no cluster.
        RayletError: the control plane refused the question, with its reason.

    Example:
        >>> [node["NodeID"] for node in gcs_query("nodes")]
    """
    core = _connected_core(address)
    if core is not None:
        return json.loads(core.gcs_query(json.dumps({"method": method, **arguments})))
    with connect_tool(address) as tool:
        return tool.gcs_query(method, **arguments)


def node_queries(method: str, address: str | None = None, **arguments: Any) -> tuple[dict[str, Any], list[str]]:
    """({node id: its raylet's answer}, nodes that run and could not be asked because they are on other machines)."""
    core = _connected_core(address)
    if core is not None:
        session_directory = core.session_directory()
    else:
        connection = find_cluster(address or "auto")
        if connection is None:
            raise ConnectionError("Could not find any running Ray instance.")
        session_directory = connection.session_directory
    own = core.node_id().hex() if core is not None else None
    answers = {}
    for record in services.read_records(session_directory):
        if not services.record_is_alive(record):
            continue
        if record["node_id"] == own:
            answers[own] = json.loads(core.node_query(json.dumps({"method": method, **arguments})))
            continue
        with Tool(ClusterConnection(record)) as tool:
            answers[record["node_id"]] = tool.node_query(method, **arguments)
    alive = {node["NodeID"] for node in gcs_query("nodes", address) if node["Alive"]}
    return answers, sorted(alive - set(answers))
