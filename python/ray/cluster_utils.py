"""Several nodes on one machine, for tests: each is a raylet with its own object store and port.

cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
node = cluster.add_node(num_cpus=2, resources={"special": 1})
ray.init(address=cluster.address)
cluster.remove_node(node)
cluster.shutdown()
"""

from __future__ import annotations

import atexit
import time
from typing import Any

from ray._private.node import NodeHandle, start_node
from ray._private.state_query import Tool

_DEFAULT_NODE_ARGUMENTS: dict[str, Any] = {"num_cpus": 1, "num_gpus": 0, "object_store_memory": 150 * 1024 * 1024}
# Names of Ray's arguments whose only built value is the default one.
_ONLY_DEFAULTS: dict[str, Any] = {
    "include_dashboard": False,
    "dashboard_host": None,
    "dashboard_port": None,
    "redis_password": None,
}
_RENAMED = {"_system_config": "system_config", "_temp_dir": "temp_dir", "env_vars": "worker_env"}


class Cluster:
    """A cluster whose nodes are started and ended one by one.

    Args:
        initialize_head: start a head node now, with `head_node_args`.
        connect: connect this process to it as a driver.
        head_node_args: as the keyword arguments of `add_node`.
        shutdown_at_exit: end what is left when the interpreter ends.

    Raises:
        NodeStartError: the head did not start, with the last lines of its log.
    """

    def __init__(
        self,
        initialize_head: bool = False,
        connect: bool = False,
        head_node_args: dict[str, Any] | None = None,
        shutdown_at_exit: bool = True,
    ) -> None:
        self.head_node: NodeHandle | None = None
        self.worker_nodes: set[NodeHandle] = set()
        self.connected = False
        self._tool: Tool | None = None
        self._shutdown_at_exit = shutdown_at_exit
        if shutdown_at_exit:
            atexit.register(self.shutdown)
        if initialize_head:
            self.add_node(**(head_node_args or {}))
            if connect:
                self.connect()
        elif connect or head_node_args:
            raise ValueError("connect and head_node_args need initialize_head=True")

    @property
    def address(self) -> str:
        """ "host:port" of the head node. Raises RuntimeError before there is one."""
        if self.head_node is None:
            raise RuntimeError("the cluster has no head node: add_node starts one")
        return self.head_node.address

    gcs_address = address

    def connect(self, namespace: str | None = None) -> None:
        """Connects this process to the cluster as a driver."""
        import ray

        ray.init(address=self.address, namespace=namespace, ignore_reinit_error=True)
        self.connected = True

    def add_node(self, wait: bool = True, **node_args: Any) -> NodeHandle:
        """Starts a node; the first is the head.

        `node_args`: num_cpus (1), num_gpus (0), object_store_memory (150 MiB), memory, resources, labels, node_name,
        node_ip_address, port, env_vars (of workers), _system_config (head only), _temp_dir (head only).

        The node has registered when this returns, with or without `wait`.

        Raises:
            NotImplementedError: an argument that is not built.
            NodeStartError: it did not start, with the last lines of its log.
        """
        params = dict(_DEFAULT_NODE_ARGUMENTS)
        for name, value in node_args.items():
            if name in _ONLY_DEFAULTS:
                if value != _ONLY_DEFAULTS[name]:
                    raise NotImplementedError(f"the argument {name}={value!r} of a node is not built yet")
                continue
            params[_RENAMED.get(name, name)] = value
        if self.head_node is None:
            node = self.head_node = start_node(params)
        else:
            for name in ("system_config", "temp_dir"):
                if params.get(name):
                    raise ValueError(f"_{name} is the head node's alone")
            params["session_directory"] = self.head_node.session_directory
            node = start_node(params, head_address=self.head_node.address)
            self.worker_nodes.add(node)
        if wait:
            self._wait_for_node(node, alive=True, timeout_s=30)
        return node

    def remove_node(self, node: NodeHandle, allow_graceful: bool = True) -> None:
        """Ends a node; without `allow_graceful` by SIGKILL. Returns once the control plane counts it as dead.

        Raises:
            ValueError: the node is not of this cluster, or is the head of a cluster that has other nodes.
        """
        if node is self.head_node:
            if self.worker_nodes:
                raise ValueError("the head node is removed last: remove the other nodes first")
            self._close_tool()
            node.shutdown(allow_graceful)
            self.head_node = None
            return
        if node not in self.worker_nodes:
            raise ValueError(f"{node} is not a node of this cluster")
        self.worker_nodes.discard(node)
        node.shutdown(allow_graceful)
        self._wait_for_node(node, alive=False, timeout_s=30)

    def list_all_nodes(self) -> list[NodeHandle]:
        """Every node, the head first."""
        return ([self.head_node] if self.head_node else []) + list(self.worker_nodes)

    @property
    def nodes(self) -> list[NodeHandle]:
        """Every node, the head first."""
        return self.list_all_nodes()

    def remaining_processes_alive(self) -> bool:
        """Whether every daemon of every node still runs."""
        return all(len(node.live_processes()) == (2 if node.is_head else 1) for node in self.list_all_nodes())

    def wait_for_nodes(self, timeout: float = 30) -> None:
        """Waits until the control plane counts exactly this cluster's nodes as alive.

        Raises:
            TimeoutError: it does not within `timeout` seconds.
        """
        wanted = {node.node_id for node in self.list_all_nodes()}
        self._wait(lambda alive: alive == wanted, timeout, f"{len(wanted)} nodes to be alive")

    def _wait_for_node(self, node: NodeHandle, alive: bool, timeout_s: float) -> None:
        if self.head_node is None or not any(name == "gcs_server" for name, _ in self.head_node.live_processes()):
            return  # Nobody to ask: a test killed the control plane.
        what = f"node {node.node_id} to be {'alive' if alive else 'dead'}"
        self._wait(lambda nodes: (node.node_id in nodes) == alive, timeout_s, what)

    def _wait(self, is_done: Any, timeout_s: float, what: str) -> None:
        deadline = time.monotonic() + timeout_s
        while True:
            alive = {node["NodeID"] for node in self._query("nodes") if node["Alive"]}
            if is_done(alive):
                return
            if time.monotonic() > deadline:
                raise TimeoutError(f"Timed out after {timeout_s} s waiting for {what}; alive are {sorted(alive)}.")
            time.sleep(0.01)

    def _query(self, method: str) -> Any:
        if self._tool is None:
            if self.head_node is None:
                raise RuntimeError("the cluster has no head node: add_node starts one")
            self._tool = Tool(self.head_node)
        return self._tool.gcs_query(method)

    def _close_tool(self) -> None:
        tool, self._tool = self._tool, None
        if tool is not None:
            tool.close()

    def shutdown(self) -> None:
        """Ends every node; the head last. Can be called twice."""
        if self._shutdown_at_exit:
            atexit.unregister(self.shutdown)
        self._close_tool()
        for node in list(self.worker_nodes):
            node.shutdown()
        self.worker_nodes.clear()
        if self.head_node is not None:
            self.head_node.shutdown()
            self.head_node = None


class AutoscalingCluster:
    """A cluster that grows and shrinks with demand: not built yet.

    Raises:
        NotImplementedError: always.
    """

    def __init__(
        self,
        head_resources: dict[str, Any],
        worker_node_types: dict[str, Any],
        autoscaler_v2: bool = False,
        **config_kwargs: Any,
    ) -> None:
        raise NotImplementedError("ray.cluster_utils.AutoscalingCluster is not built yet: there is no autoscaler")

    def start(self, _system_config: dict[str, Any] | None = None, override_env: dict[str, str] | None = None) -> None:
        """Not built."""
        raise NotImplementedError("ray.cluster_utils.AutoscalingCluster is not built yet: there is no autoscaler")

    def shutdown(self) -> None:
        """Not built."""
        raise NotImplementedError("ray.cluster_utils.AutoscalingCluster is not built yet: there is no autoscaler")
