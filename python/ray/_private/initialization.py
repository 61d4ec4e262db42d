"""`ray.init` and `ray.shutdown`: finding or starting a cluster, and joining it as a driver."""

from __future__ import annotations

import atexit
import json
import logging
import os
import sys
import threading
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from ray import exceptions
from ray._private import ray_constants
from ray._private.context import SubmissionContext, current
from ray._private.ids import JobID
from ray._private.options import check_labels
from ray._private.ray_logger import set_up_ray_logger
from ray._private.utils import is_interactive
from ray._private.worker import check_namespace, global_worker

if TYPE_CHECKING:
    from ray._private.logging_config import LoggingConfig

logger = logging.getLogger(__name__)

_lock = threading.RLock()
# Arguments that only make sense where a cluster is started.
_CLUSTER_ARGUMENTS = (
    "num_cpus",
    "num_gpus",
    "resources",
    "labels",
    "object_store_memory",
    "system_config",
    "memory",
    "node_name",
    "node_ip_address",
)
_UNBUILT = {
    "local_mode": "running tasks in the driver itself is not built; a local cluster starts in a quarter of a second",
    "enable_resource_isolation": "isolation by control groups is not built yet",
    "cgroup_path": "isolation by control groups is not built yet",
    "system_reserved_cpu": "isolation by control groups is not built yet",
    "system_reserved_memory": "isolation by control groups is not built yet",
    "proxy_server_url": "a proxy in front of the dashboard is not built yet",
    "dashboard_port": "the dashboard is not built yet",
    "include_dashboard": "the dashboard is not built yet",
    "_enable_object_reconstruction": "it cannot be turned off; use max_retries=0 for the tasks concerned",
    "_redis_username": "storage of the control plane in Redis is not built yet",
    "_redis_password": "storage of the control plane in Redis is not built yet",
    "_driver_object_store_memory": "a limit of the driver's own is not built",
    "_metrics_export_port": "metrics are not built yet",
    "_tracing_startup_hook": "tracing is not built yet",
    "_object_spilling_directory": "spilling to another directory is not built yet",
}


class BaseContext:
    """What `ray.init` returns: facts of the connection, usable as a context manager."""

    dashboard_url: str | None
    python_version: str
    ray_version: str

    def __enter__(self) -> BaseContext:
        return self

    def __exit__(self, *_: object) -> None:
        self.disconnect()

    def disconnect(self) -> None:
        """Ends the connection."""
        raise NotImplementedError("BaseContext.disconnect(): a subclass says how")


class RayContext(BaseContext, Mapping[str, Any]):
    """The connection of a driver.

    Attributes:
        address_info: addresses and directories of the node.
        dashboard_url: empty while there is no dashboard.

    Example:
        >>> with ray.init() as context:
        ...     print(context.address_info["address"])
    """

    def __init__(self, address_info: dict[str, Any]) -> None:
        self.dashboard_url = address_info.get("webui_url") or ""
        self.python_version = "{}.{}.{}".format(*sys.version_info[:3])
        self.ray_version = ray_constants.RAY_VERSION
        self.ray_commit = ray_constants.RAY_COMMIT
        self.address_info = address_info

    def __getitem__(self, key: str) -> Any:
        return self.address_info[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self.address_info)

    def __len__(self) -> int:
        return len(self.address_info)

    def __repr__(self) -> str:
        return (
            f"RayContext(dashboard_url={self.dashboard_url!r}, python_version={self.python_version!r}, "
            f"ray_version={self.ray_version!r}, ray_commit={self.ray_commit!r})"
        )

    def disconnect(self) -> None:
        """Ends the connection, and the cluster where `ray.init` started it."""
        if global_worker.init_context is self:
            shutdown()


def init(
    address: str | None = None,
    *,
    num_cpus: int | None = None,
    num_gpus: int | None = None,
    resources: dict[str, float] | None = None,
    labels: dict[str, str] | None = None,
    object_store_memory: int | None = None,
    local_mode: bool = False,
    ignore_reinit_error: bool = False,
    include_dashboard: bool | None = None,
    dashboard_host: str = "127.0.0.1",
    dashboard_port: int | None = None,
    job_config: Any = None,
    configure_logging: bool = True,
    logging_level: int | str = ray_constants.LOGGER_LEVEL,
    logging_format: str | None = None,
    logging_config: LoggingConfig | None = None,
    log_to_driver: bool | None = None,
    namespace: str | None = None,
    runtime_env: dict[str, Any] | None = None,
    enable_resource_isolation: bool = False,
    cgroup_path: str | None = None,
    system_reserved_cpu: float | None = None,
    system_reserved_memory: int | None = None,
    proxy_server_url: str | None = None,
    **kwargs: Any,
) -> RayContext:
    """Connects this program to a cluster, starting one on this machine where none is named.

    Args:
        address: "auto" for a cluster that runs on this machine, "host:port", "local" for a fresh one; else the
            environment variable RAY_ADDRESS, else a fresh one.
        num_cpus, num_gpus, resources, labels, object_store_memory: of a fresh cluster's node; found out by default.
        ignore_reinit_error: a second call returns the first one's context instead of raising.
        job_config: settings of the job.
        configure_logging, logging_level, logging_format: of the runtime's own messages.
        logging_config: of Python's root logger here and in workers.
        log_to_driver: whether what workers print is shown here.
        namespace: where named actors are found; a fresh one by default.
        runtime_env: environment of the job's tasks and actors.

    Raises:
        RuntimeError: called twice, or with an unknown argument.
        ConnectionError: there is no such cluster, or it does not answer.
        ValueError, TypeError: an argument makes no sense.
        NotImplementedError: an argument that is not built.

    Example:
        >>> ray.init(num_cpus=4, namespace="shop")
    """
    known = {"_system_config", "_temp_dir", "_memory", "_node_name", "_node_ip_address"}
    unknown = kwargs.keys() - known - _UNBUILT.keys()
    if unknown:
        raise RuntimeError(f"Unknown keyword argument(s): {', '.join(sorted(unknown))}")
    asked = {
        "local_mode": local_mode,
        "enable_resource_isolation": enable_resource_isolation,
        "cgroup_path": cgroup_path,
        "system_reserved_cpu": system_reserved_cpu,
        "system_reserved_memory": system_reserved_memory,
        "proxy_server_url": proxy_server_url,
        "dashboard_port": dashboard_port,
        "include_dashboard": include_dashboard,
        **{name: value for name, value in kwargs.items() if name in _UNBUILT},
    }
    for name, value in asked.items():
        if value:
            raise NotImplementedError(f"ray.init({name}=...): {_UNBUILT[name]}")
    if dashboard_host != "127.0.0.1":
        raise NotImplementedError(f"ray.init(dashboard_host={dashboard_host!r}): the dashboard is not built yet")

    with _lock:
        if current.context is not None:
            if not ignore_reinit_error:
                raise RuntimeError(
                    "Maybe you called ray.init twice by accident? This error can be suppressed by passing in "
                    "'ignore_reinit_error=True' or by calling 'ray.shutdown()' prior to 'ray.init()'."
                )
            logger.info("Calling ray.init() again after it has already been called.")
            return global_worker.init_context
        if configure_logging:
            set_up_ray_logger(logging_level, logging_format)
        config = _job_config(job_config, namespace, runtime_env, logging_config)
        for name, value in (("num_cpus", num_cpus), ("num_gpus", num_gpus)):
            _check_quantity(name, value)
        _check_resources(resources)
        if labels is not None:
            problem = check_labels(labels)
            if problem:
                raise ValueError(problem)
        parameters = {
            "num_cpus": num_cpus,
            "num_gpus": num_gpus,
            "resources": resources,
            "labels": labels,
            "object_store_memory": object_store_memory,
            **{name.removeprefix("_"): value for name, value in kwargs.items() if name in known},
        }
        return _connect(address, parameters, config, log_to_driver is not False)


def _job_config(job_config: Any, namespace: Any, runtime_env: Any, logging_config: Any) -> Any:
    from ray.job_config import JobConfig

    if job_config is None:
        text = os.environ.get(ray_constants.RAY_JOB_CONFIG_JSON_ENV_VAR)
        job_config = JobConfig.from_json(text) if text else JobConfig()
    elif isinstance(job_config, dict):
        job_config = JobConfig.from_json(job_config)
    elif not isinstance(job_config, JobConfig):
        raise TypeError(f"job_config must be a ray.job_config.JobConfig or a dict, got {job_config!r}")
    if namespace is None and job_config.ray_namespace is None:
        namespace = os.environ.get(ray_constants.RAY_NAMESPACE_ENVIRONMENT_VARIABLE)
    if namespace is not None:
        check_namespace(namespace)
        job_config.set_ray_namespace(namespace)
    if runtime_env is None and not job_config.runtime_env:
        text = os.environ.get(ray_constants.RAY_RUNTIME_ENV_ENVIRONMENT_VARIABLE)
        runtime_env = json.loads(text) if text else None
    if runtime_env is not None:
        job_config.set_runtime_env(runtime_env)
    if logging_config is not None:
        from ray._private.logging_config import LoggingConfig

        if not isinstance(logging_config, LoggingConfig):
            raise TypeError(f"logging_config must be a ray.LoggingConfig, got {logging_config!r}")
        job_config.set_py_logging_config(logging_config)
    return job_config


def _check_quantity(name: str, value: Any) -> None:
    if value is None:
        return
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be a number, got {value!r}")
    if value < 0:
        raise ValueError(f"Resource quantities must be nonnegative, got {name}={value!r}")


def _check_resources(resources: Any) -> None:
    if resources is None:
        return
    if not isinstance(resources, dict):
        raise TypeError(f"resources must be a dict of names and quantities, got {resources!r}")
    for name, quantity in resources.items():
        if name in ("CPU", "GPU", "memory", "object_store_memory"):
            option = {"CPU": "num_cpus", "GPU": "num_gpus", "memory": "_memory"}.get(name, name)
            raise ValueError(
                f"`{name}` cannot be a custom resource: use `{option}` instead, got resources={resources!r}"
            )
        _check_quantity(f"resource {name}", quantity)


def _import_ahead() -> None:
    """Imports what joining and the first calls need, while the daemons start on the other cores."""
    import hmac  # noqa: F401
    import uuid  # noqa: F401

    from ray import actor, remote_function  # noqa: F401
    from ray._private import function_manager, hooks  # noqa: F401


def _connect(address: str | None, parameters: dict[str, Any], config: Any, log_to_driver: bool) -> RayContext:
    from ray._private import node as node_module

    if address is None:
        address = os.environ.get(ray_constants.RAY_ADDRESS_ENVIRONMENT_VARIABLE) or None
    if address is not None and not isinstance(address, str):
        raise TypeError(f"address must be a string, got {address!r}")
    if address is not None and address.startswith("ray://"):
        raise NotImplementedError(f"ray.init({address!r}): Ray Client is not built yet; give host:port of a node here")
    owned = False
    # "local" starts a cluster; no address joins one that `ray start` left on this machine, else starts one.
    node: Any = None if address == "local" else node_module.find_cluster(address, parameters.get("temp_dir"))
    if node is None:
        node = node_module.start_local_cluster(parameters, _import_ahead)
        owned = True
    else:
        given = [name for name in _CLUSTER_ARGUMENTS if parameters.get(name) is not None]
        if given:
            raise ValueError(
                "When connecting to an existing cluster, num_cpus and num_gpus must not be provided, nor other "
                f"settings of a node; got {', '.join(given)} for the cluster at {node.address}. "
                'ray.init("local") starts a cluster of its own.'
            )
    try:
        return _join(node, owned, config, log_to_driver)
    except BaseException:
        if owned:
            node.shutdown()
        raise


def _driver_paths() -> dict[str, Any]:
    """Where workers find the driver's modules: its script's directory, and its working directory."""
    script = getattr(sys.modules.get("__main__"), "__file__", None)
    paths = []
    if script and not is_interactive():
        paths.append(os.path.dirname(os.path.abspath(script)))
    paths.append(os.getcwd())
    return {"py_driver_sys_path": paths, "cwd": os.getcwd(), "script": script or ""}


def _join(node: Any, owned: bool, config: Any, log_to_driver: bool) -> RayContext:
    from ray._private.hooks import RuntimeHooks
    from ray._raylet import CoreWorker, RayletError

    if config.ray_namespace is None:
        import uuid

        config.set_ray_namespace(str(uuid.uuid4()))
    settings = config.to_dict()
    own = _driver_paths()
    settings["py_driver_sys_path"] = [*config._py_driver_sys_path, *own["py_driver_sys_path"]]
    settings["cwd"] = own["cwd"]
    settings["entrypoint"] = " ".join(sys.orig_argv)
    settings["log_to_driver"] = log_to_driver
    try:
        core = CoreWorker.connect(
            {
                "raylet_socket": node.raylet_socket,
                "role": "driver",
                "session_directory": node.session_directory,
                "job_config_json": json.dumps(settings),
                "connect_timeout_s": 30.0,
            },
            RuntimeHooks(),
        )
    except RayletError as error:
        raise ConnectionError(f"could not join the cluster: {error}") from error
    details = core.details()
    worker = global_worker
    worker.mode = ray_constants.SCRIPT_MODE
    worker.node = node
    worker.owns_cluster = owned
    worker.namespace = settings["namespace"]
    worker.runtime_env = dict(config.runtime_env)
    worker.job_config = config
    worker.session_name = details.get("session_name") or os.path.basename(node.session_directory)
    worker.pid = os.getpid()
    current.context = SubmissionContext(
        core,
        core.job_id(),
        worker.namespace,
        worker.runtime_env,
        default_detached=settings["default_actor_lifetime"] == "detached",
    )
    if log_to_driver:
        from ray._private.log_printer import LogPrinter

        worker.log_printer = LogPrinter(core)
        worker.log_printer.start()
    if config.py_logging_config is not None:
        config.py_logging_config._apply()
    address = node.address
    host, _, _ = address.rpartition(":")
    worker.init_context = RayContext(
        {
            "node_ip_address": host,
            "node_id": node.node_id,
            "address": address,
            "gcs_address": address,
            "raylet_socket_name": node.raylet_socket,
            "webui_url": "",
            "session_dir": node.session_directory,
            "session_name": worker.session_name,
            "metrics_export_port": None,
        }
    )
    _register_at_exit()
    if owned:
        logger.info("Started a local Ray instance.")
    else:
        logger.info("Connected to the Ray cluster at %s.", address)
    return worker.init_context


_registered = False


def _register_at_exit() -> None:
    global _registered
    if not _registered:
        _registered = True
        atexit.register(_shutdown_at_exit)


def _shutdown_at_exit() -> None:
    # A forked child inherits this registration, and the connection is its parent's.
    if global_worker.pid == os.getpid():
        shutdown(_exiting_interpreter=True)


def shutdown(wait_for_processes: bool = False, _exiting_interpreter: bool = False) -> None:
    """Ends the connection, and the cluster where `ray.init` started it. Does nothing where there is none.

    Values that were got stay valid; references do not.

    Args:
        wait_for_processes: has no effect of its own: processes are always waited for, within a limit.
    """
    del wait_for_processes, _exiting_interpreter
    with _lock:
        context = current.context
        if context is None:
            return
        if global_worker.pid != os.getpid():
            # A forked child: the connection and the cluster are its parent's.
            current.context = None
            return
        if global_worker.ran_something and global_worker.log_printer is not None:
            global_worker.log_printer.drain()
        current.context = None
        try:
            context.core.shutdown()
            async_compat = sys.modules.get("ray._private.async_compat")
            if async_compat is not None:
                async_compat.shutdown()
            if global_worker.log_printer is not None:
                global_worker.log_printer.join()
        finally:
            node, owned = global_worker.node, global_worker.owns_cluster
            global_worker.__init__()  # type: ignore[misc]
            if owned and node is not None:
                node.shutdown()


__all__ = ["BaseContext", "JobID", "RayContext", "exceptions", "init", "shutdown"]
