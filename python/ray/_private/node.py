"""A node as the process that started it, or joins it, sees it.

`start_local_cluster` starts a head node for one driver, `start_node` any node, and `find_cluster` finds one that runs
already. Ending is safe whatever happens to the starter: its daemons hold a pipe from it and leave at end-of-file.
"""

from __future__ import annotations

import os
import select
import sys
import threading
import time
import weakref
from collections.abc import Callable
from typing import Any

from ray._private import authentication, resource_spec, services

NODE_ID_BYTES = 28
DEFAULT_PORT = 6379
LOOPBACK = "127.0.0.1"
SHUTDOWN_TIMEOUT_S = 3.0
# The control plane is started again after a crash, unless it crashes this often within this time.
GCS_RESTARTS_LIMIT = 20
GCS_RESTARTS_WINDOW_S = 60.0

_SUPPORTED_PARAMETERS = {
    "num_cpus",
    "num_gpus",
    "memory",
    "object_store_memory",
    "resources",
    "labels",
    "node_name",
    "node_ip_address",
    "port",
    "temp_dir",
    "system_config",
    "session_directory",
    "worker_env",
}
_handles: weakref.WeakSet[NodeHandle] = weakref.WeakSet()


def _in_forked_child() -> None:
    # The child must not keep the daemons alive after its parent, and must not end them either.
    for handle in list(_handles):
        handle._forget()


os.register_at_fork(after_in_child=_in_forked_child)


class NodeHandle:
    """A node that this process started. `shutdown` ends it; so does the end of this process unless it is detached.

    Attributes:
        raylet_socket: path of the raylet's socket.
        session_directory: the session's directory.
        session_name: its last part.
        address: "host:port" of the head node, by which others join.
        node_id: hexadecimal.
        host, port: the node's own single port.
        is_head: whether the control plane runs here.
    """

    def __init__(
        self,
        session_directory: str,
        node_id: str,
        is_head: bool,
        daemons: dict[str, services.Daemon],
        pipe_write_fd: int | None,
        pipe_read_fd: int | None,
        host: str,
        head_address: str | None,
        auth_token: str,
    ) -> None:
        self.session_directory = session_directory
        self.session_name = os.path.basename(session_directory)
        self.node_id = node_id
        self.is_head = is_head
        self.host = host
        self.port = 0
        self.raylet_socket = ""
        self.address = head_address or ""
        self._daemons = daemons
        self._pipe_write_fd = pipe_write_fd
        self._pipe_read_fd = pipe_read_fd
        self._auth_token = auth_token
        self._owner_pid = os.getpid()
        self._lock = threading.RLock()
        self._is_stopped = False
        self._supervise = True
        self._supervisor: threading.Thread | None = None
        self._wake_fds: tuple[int, int] | None = None
        self._restarts: list[float] = []
        _handles.add(self)

    # --- Ray's names for some of the attributes ---

    @property
    def unique_id(self) -> str:
        """The node's id, hexadecimal."""
        return self.node_id

    @property
    def raylet_socket_name(self) -> str:
        """The path of the raylet's socket."""
        return self.raylet_socket

    @property
    def gcs_address(self) -> str:
        """ "host:port" of the head node."""
        return self.address

    @property
    def node_ip_address(self) -> str:
        """The host of the node's port."""
        return self.host

    # --- starting ---

    def _became_ready(self, ready: dict[str, Any]) -> None:
        if ready.get("node_id") != self.node_id:
            raise services.NodeStartError(f"the raylet says that it is node {ready.get('node_id')}, not {self.node_id}")
        self.port = int(ready["port"])
        self.raylet_socket = ready["socket"]
        if self.is_head:
            self.address = f"{self.host}:{self.port}"
        self._write_record()

    def _write_record(self) -> None:
        detached = self._pipe_write_fd is None
        processes = {name: daemon.record() for name, daemon in self._daemons.items()}
        if "supervisor" in processes:
            with open(services.supervised_pid_path(self.session_directory)) as file:
                processes["gcs_server"] = services.describe_process(int(file.read()))
        services.write_record(
            self.session_directory,
            {
                "node_id": self.node_id,
                "is_head": self.is_head,
                "is_detached": detached,
                "address": self.address,
                "host": self.host,
                "port": self.port,
                "raylet_socket": self.raylet_socket,
                "session_directory": self.session_directory,
                "token_fingerprint": authentication.fingerprint(self._auth_token, self.session_name),
                "starter": services.describe_process(os.getpid()),
                "processes": processes,
                "started_at": time.time(),
            },
        )

    # --- the control plane's supervision ---

    def start_supervisor(self) -> None:
        """Watches the control plane from a thread and starts it again when it ends unasked."""
        if not self.is_head or self._supervisor is not None:
            return
        self._wake_fds = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        self._supervisor = threading.Thread(target=self._supervise_gcs, name="ray-gcs-supervisor", daemon=True)
        self._supervisor.start()

    def _supervise_gcs(self) -> None:
        assert self._wake_fds is not None
        wake = self._wake_fds[0]
        while True:
            daemon = self._daemons["gcs_server"]
            try:
                descriptor = os.pidfd_open(daemon.process.pid)
            except ProcessLookupError:
                descriptor = -1
            poll = select.poll()
            poll.register(wake, select.POLLIN)
            if descriptor >= 0:
                poll.register(descriptor, select.POLLIN)
                try:
                    events = dict(poll.poll())
                finally:
                    os.close(descriptor)
                if wake in events:
                    if self._is_stopped:
                        return
                    try:
                        os.read(wake, 64)
                    except BlockingIOError:
                        pass
            delay_s = self._restart_delay_s()
            if delay_s:
                pause = select.poll()
                pause.register(wake, select.POLLIN)
                pause.poll(delay_s * 1000)
            with self._lock:
                if self._is_stopped:
                    return
                if daemon.is_alive():
                    continue
                if not self._supervise:
                    may_restart = False
                else:
                    may_restart = self._may_restart_gcs()
                    if may_restart:
                        with open(daemon.err_path, "a") as log:
                            log.write(f"{daemon.name} (pid {daemon.process.pid}) ended unasked; it is started again\n")
                        self.start_gcs_server()
            if not may_restart:
                if self._supervise:
                    print(
                        f"ray: the control plane ended {GCS_RESTARTS_LIMIT} times within {GCS_RESTARTS_WINDOW_S:.0f} s "
                        f"and is not started again. {daemon.ending()}",
                        file=sys.stderr,
                    )
                # Wait until somebody starts it by hand, or the node stops.
                poll = select.poll()
                poll.register(wake, select.POLLIN)
                poll.poll()

    def _may_restart_gcs(self) -> bool:
        now = time.monotonic()
        self._restarts = [at for at in self._restarts if now - at < GCS_RESTARTS_WINDOW_S]
        self._restarts.append(now)
        return len(self._restarts) <= GCS_RESTARTS_LIMIT

    def _restart_delay_s(self) -> float:
        # The first crashes are answered at once; one that repeats must not keep a core busy.
        return 0.0 if len(self._restarts) <= 3 else min(1.0, 0.01 * 2 ** (len(self._restarts) - 3))

    def _wake_supervisor(self) -> None:
        if self._wake_fds is not None:
            try:
                os.write(self._wake_fds[1], b"w")
            except (BlockingIOError, OSError):
                pass

    # --- ending ---

    def kill_gcs_server(self, restart: bool = False) -> None:
        """SIGKILL to the control plane. Unless `restart`, it stays down until `start_gcs_server`.

        Raises:
            ValueError: this is no head node.
        """
        if not self.is_head:
            raise ValueError("the control plane runs on the head node only")
        with self._lock:
            self._supervise = restart
            process = self._daemons["gcs_server"].process
        process.kill()
        process.wait(10)

    def start_gcs_server(self) -> None:
        """Starts the control plane again after it ended; it finds its cluster in its storage.

        Raises:
            ValueError: this is no head node.
        """
        if not self.is_head:
            raise ValueError("the control plane runs on the head node only")
        with self._lock:
            daemon = self._daemons["gcs_server"]
            if not daemon.is_alive():
                daemon.restart(() if self._pipe_read_fd is None else (self._pipe_read_fd,))
                self._write_record()
            self._supervise = True
        self._wake_supervisor()

    def kill_raylet(self) -> None:
        """SIGKILL to the raylet: the node is lost as if by a power cut."""
        self._daemons["raylet"].kill()

    def pid(self, name: str) -> int:
        """The process id of the daemon "raylet" or "gcs_server".

        Raises:
            KeyError: this node has no such daemon.
        """
        return self._daemons[name].process.pid

    def live_processes(self) -> list[tuple[str, int]]:
        """(name, pid) of each daemon that runs."""
        return [(name, daemon.process.pid) for name, daemon in self._daemons.items() if daemon.is_alive()]

    def shutdown(self, allow_graceful: bool = True) -> None:
        """Ends the node: afterwards none of its processes, sockets and shared memory is left. Can be called twice.

        In a forked child of the process that started the node it does nothing.
        """
        if os.getpid() != self._owner_pid:
            return
        with self._lock:
            if self._is_stopped:
                return
            self._is_stopped = True
        self._wake_supervisor()
        deadline = time.monotonic() + SHUTDOWN_TIMEOUT_S
        raylet = self._daemons.get("raylet")
        gcs = self._daemons.get("gcs_server") or self._daemons.get("supervisor")
        # Old sessions' logs go while the daemons end.
        pruning = threading.Thread(target=services.prune_sessions, args=(os.path.dirname(self.session_directory),))
        pruning.start()
        if raylet is not None:
            if allow_graceful:
                raylet.terminate()
                if gcs is not None:
                    # It ends with its head node, so it need not wait for the raylet's end.
                    gcs.terminate()
                raylet.stop(deadline - 0.5)
            else:
                raylet.kill()
        self._close_pipe()
        if gcs is not None:
            gcs.stop(deadline)
        supervisor = self._supervisor
        if supervisor is not None and supervisor is not threading.current_thread():
            supervisor.join(1.0)
        if self._wake_fds is not None:
            for descriptor in self._wake_fds:
                os.close(descriptor)
            self._wake_fds = None
        others = [r for r in services.read_records(self.session_directory) if r["node_id"] != self.node_id]
        is_last = not any(services.record_is_alive(record) for record in others)
        services.remove_leftovers(self.session_directory, self.node_id, is_last)
        pruning.join()

    def _close_pipe(self) -> None:
        for name in ("_pipe_write_fd", "_pipe_read_fd"):
            descriptor = getattr(self, name)
            if descriptor is not None:
                setattr(self, name, None)
                os.close(descriptor)

    def _forget(self) -> None:
        # In a forked child: only the descriptors are this process's own.
        self._close_pipe()
        self._is_stopped = True

    def __repr__(self) -> str:
        return f"<{'head' if self.is_head else 'worker'} node {self.node_id} at {self.host}:{self.port}>"


class ClusterConnection:
    """A node that somebody else started; the attributes are those of `NodeHandle`, and `shutdown` ends nothing."""

    def __init__(self, record: dict[str, Any]) -> None:
        self.session_directory: str = record["session_directory"]
        self.session_name = os.path.basename(self.session_directory)
        self.node_id: str = record["node_id"]
        self.is_head: bool = record["is_head"]
        self.host: str = record["host"]
        self.port: int = record["port"]
        self.raylet_socket: str = record["raylet_socket"]
        self.address: str = record["address"]

    def shutdown(self, allow_graceful: bool = True) -> None:
        """Does nothing: the cluster is not this process's."""

    def __repr__(self) -> str:
        return f"<connection to node {self.node_id} of the cluster at {self.address}>"


def _check_system_config(config: Any) -> dict[str, Any]:
    if config is None:
        return {}
    if not isinstance(config, dict) or not all(isinstance(key, str) for key in config):
        raise TypeError("_system_config must be a dict with str keys")
    return config


def start_node(
    params: dict[str, Any],
    *,
    head_address: str | None = None,
    detached: bool = False,
    gcs_socket: str | None = None,
    meanwhile: Callable[[], None] | None = None,
) -> NodeHandle:
    """Starts a head node, or with `head_address` a node that joins that cluster.

    `params`: num_cpus, num_gpus, memory, object_store_memory, resources, labels, node_name, node_ip_address, port,
    temp_dir, system_config, session_directory (to share another node's), worker_env. None means the default.
    A `detached` node outlives this process. `meanwhile` is called while the daemons start.

    Raises:
        TypeError, ValueError: a parameter that cannot be.
        NotImplementedError: a parameter that is not built.
        NodeStartError: a daemon did not start, with the last lines of its log.

    Example:
        >>> node = start_node({"num_cpus": 2})
        >>> node.shutdown()
    """
    params = {key: value for key, value in params.items() if value is not None}
    for name in params:
        if name not in _SUPPORTED_PARAMETERS:
            raise NotImplementedError(f"the option {name} of a node is not built yet")
    is_head = head_address is None and gcs_socket is None
    host = params.get("node_ip_address", LOOPBACK)
    if not isinstance(host, str) or not host:
        raise TypeError(f"node_ip_address must be a str, not {host!r}")
    port = params.get("port", 0)
    if isinstance(port, bool) or not isinstance(port, int) or not 0 <= port < 65536:
        raise ValueError(f"port must be a whole number from 0 to 65535, not {port!r}")
    resources, labels, store_bytes = resource_spec.resolve(
        num_cpus=params.get("num_cpus"),
        num_gpus=params.get("num_gpus"),
        memory=params.get("memory"),
        object_store_memory=params.get("object_store_memory"),
        resources=params.get("resources"),
        labels=params.get("labels"),
        host=host,
        is_head=is_head,
    )
    system_config = _check_system_config(params.get("system_config"))
    services.extension_path()  # says clearly that it is not built, before anything starts
    token = authentication.load_or_create_token()
    root = services.temp_root(params.get("temp_dir"))
    session_directory = params.get("session_directory") or services.make_session_directory(root)
    node_id = os.urandom(NODE_ID_BYTES).hex()
    labels["ray.io/node-id"] = node_id

    pipe_read, pipe_write = (None, None) if detached else os.pipe2(os.O_CLOEXEC)
    ready_read, ready_write = os.pipe2(os.O_CLOEXEC)
    daemons: dict[str, services.Daemon] = {}
    parent_fds = () if pipe_read is None else (pipe_read,)
    handle = NodeHandle(session_directory, node_id, is_head, daemons, pipe_write, pipe_read, host, head_address, token)
    try:
        if is_head:
            # Both start at once; the raylet tries until the control plane's socket is there.
            config = services.gcs_config(session_directory, pipe_read, system_config)
            if detached:
                daemons["supervisor"] = services.start_supervised_gcs(session_directory, node_id, config)
            else:
                daemons["gcs_server"] = services.Daemon("gcs_server", session_directory, config, parent_fds)
            gcs_socket = config["socket_path"]
        raylet_config = {
            "node_id": node_id,
            "session_directory": session_directory,
            "gcs_socket": gcs_socket,
            "gcs_address": None if gcs_socket else head_address,
            "host": host,
            "port": port,
            "auth_token": token,
            "is_head": is_head,
            "node_name": params.get("node_name", host),
            "resources": resources,
            "labels": labels,
            "object_store_memory_bytes": store_bytes,
            "python_executable": sys.executable,
            "python_path": _python_path(),
            "worker_env": params.get("worker_env", {}),
            "ready_fd": ready_write,
            "parent_fd": pipe_read,
            "system_config": system_config,
        }
        daemons["raylet"] = services.Daemon("raylet", session_directory, raylet_config, (*parent_fds, ready_write))
        os.close(ready_write)
        ready_write = -1
        if meanwhile is not None:
            meanwhile()
        handle._became_ready(services.wait_until_ready(list(daemons.values()), ready_read, services.START_TIMEOUT_S))
    except BaseException:
        handle.shutdown(allow_graceful=False)
        raise
    finally:
        os.close(ready_read)
        if ready_write >= 0:
            os.close(ready_write)
    if is_head and not detached:
        handle.start_supervisor()
    return handle


def _python_path() -> list[str]:
    """What workers need to import `ray` from where this process did, and what PYTHONPATH says: `-E` ignores that."""
    path = [services.package_root()]
    path += [part for part in os.environ.get("PYTHONPATH", "").split(os.pathsep) if part]
    return path


def start_local_cluster(params: dict[str, Any], meanwhile: Callable[[], None] | None = None) -> NodeHandle:
    """Starts a one-node cluster that belongs to this process. See `start_node` for the parameters and errors."""
    return start_node(params, meanwhile=meanwhile)


def _split_address(address: str) -> tuple[str, int]:
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit() or not 0 < int(port) < 65536:
        raise ValueError(f"an address must look like host:port, not {address!r}")
    return host, int(port)


def _is_same_address(record: dict[str, Any], host: str, port: int) -> bool:
    record_host, record_port = _split_address(record["address"])
    if record_port != port:
        return False
    loopback = {"localhost", "127.0.0.1", "::1", "0.0.0.0"}
    return record_host == host or (record_host in loopback and host in loopback)


def _check_token(record: dict[str, Any]) -> None:
    token = authentication.load_token()
    if token is None:
        return  # No token here: the directory's mode already proved that this is the session's owner.
    name = os.path.basename(record["session_directory"])
    if authentication.fingerprint(token, name) != record["token_fingerprint"]:
        from ray.exceptions import AuthenticationError

        raise AuthenticationError(f"The token of this process is not the one of the cluster at {record['address']}")


def current_cluster_address(root: str) -> str | None:
    """What the last ``ray start`` on this machine left in ``ray_current_cluster``; None where there is nothing."""
    try:
        with open(os.path.join(root, services.CURRENT_CLUSTER_FILE)) as file:
            return file.read().strip() or None
    except OSError:
        return None


def find_cluster(address: str | None, temp_dir: str | None = None) -> ClusterConnection | None:
    """The node of this machine through which to join a cluster that runs.

    `address`: "host:port" of the head node; "auto": the environment variable RAY_ADDRESS, what the last ``ray start``
    left, or the newest session that runs; None: as "auto", but only what was asked for by RAY_ADDRESS or ``ray
    start``, and None where there is nothing (then a new cluster is to be started). "local" gives None.

    Raises:
        ConnectionError: there is no such cluster, or this machine runs no node of it.
        ValueError: an address that is none.
        AuthenticationError: this process has another token.
        NotImplementedError: ``ray://`` and other kinds of address.

    Example:
        >>> connection = find_cluster("auto")
        >>> connection.raylet_socket
    """
    root = services.temp_root(temp_dir)
    wanted = address
    if address is None or address == "auto":
        wanted = os.environ.get("RAY_ADDRESS") or None
        if wanted == "auto":
            wanted = None
    if wanted == "local":
        return None
    if wanted and "://" in wanted:
        raise NotImplementedError(
            f"connecting to {wanted!r} is not built yet; use host:port on a machine of the cluster"
        )
    if not wanted and (remembered := current_cluster_address(root)):
        record = _find_record(root, *_split_address(remembered))
        if record is not None:
            _check_token(record)
            return ClusterConnection(record)
        # The file is of a cluster that is gone.
    if not wanted:
        if address is None:
            return None
        records = services.live_records(root)
        if not records:
            raise ConnectionError(
                "Could not find any running Ray instance. Please specify the one to connect to by setting `--address` "
                "flag or `RAY_ADDRESS` environment variable."
            )
        _check_token(records[0])
        return ClusterConnection(records[0])
    host, port = _split_address(wanted)
    record = _find_record(root, host, port)
    if record is None:
        raise ConnectionError(
            f"This machine runs no node of a cluster at {wanted}. Start one here by `ray start --address={wanted}`, or "
            "check that the cluster still runs."
        )
    _check_token(record)
    return ClusterConnection(record)


def _find_record(root: str, host: str, port: int) -> dict[str, Any] | None:
    for record in services.live_records(root):
        if _is_same_address(record, host, port):
            return record
    return None
