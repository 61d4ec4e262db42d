"""Lists, single rows and summaries of a cluster's state, asked from the control plane and the raylets."""

from __future__ import annotations

import fnmatch
import os
import time
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

from ray._private import services, state_query
from ray.util.state.common import (
    DEFAULT_LIMIT,
    DEFAULT_RPC_TIMEOUT,
    ActorState,
    JobState,
    NodeState,
    PlacementGroupState,
    StateSchema,
    WorkerState,
)
from ray.util.state.exception import DataSourceUnavailable, RayStateApiException, ServerUnavailable

Filters = list[tuple[str, str, Any]]


def _ask(call: Callable[..., Any], *arguments: Any, **keywords: Any) -> Any:
    try:
        return call(*arguments, **keywords)
    except ConnectionError as error:
        raise ServerUnavailable(str(error)) from error


def _nodes(address: str | None) -> list[StateSchema]:
    return [
        NodeState(
            node_id=node["NodeID"],
            node_ip=node["NodeManagerAddress"],
            is_head_node=node["IsHead"],
            state="ALIVE" if node["Alive"] else "DEAD",
            state_message=node["DeathReasonMessage"] or node["DrainReason"] or None,
            node_name=node["NodeName"],
            resources_total=node["Resources"],
            labels=node["Labels"],
            start_time_ms=node["StartTime"],
            end_time_ms=node["EndTime"],
        )
        for node in _ask(state_query.gcs_query, "nodes", address)
    ]


def _actors(address: str | None) -> list[StateSchema]:
    return [
        ActorState(
            actor_id=actor["ActorID"],
            class_name=actor["ActorClassName"],
            state=actor["State"],
            job_id=actor["JobID"],
            name=actor["Name"],
            node_id=actor["NodeID"],
            pid=actor["Pid"],
            ray_namespace=actor["RayNamespace"],
            is_detached=actor["IsDetached"],
            required_resources=actor["RequiredResources"],
            death_cause=actor["DeathCause"],
            placement_group_id=actor["PlacementGroupID"],
            num_restarts=actor["NumRestarts"],
            pending_reason=actor["PendingReason"] or None,
            start_time_ms=actor["StartTime"],
            end_time_ms=actor["EndTime"],
        )
        for actor in _ask(state_query.gcs_query, "actors", address).values()
    ]


def _jobs(address: str | None) -> list[StateSchema]:
    rows: list[StateSchema] = []
    for job in _ask(state_query.gcs_query, "jobs", address):
        config = job["Config"] if isinstance(job["Config"], dict) else {}
        rows.append(
            JobState(
                job_id=job["JobID"],
                submission_id=None,
                entrypoint=job["Entrypoint"],
                type="DRIVER",
                # A driver's exit code is its own affair; what is known is whether it is connected.
                status="SUCCEEDED" if job["IsDead"] else "RUNNING",
                message=None,
                error_type=None,
                driver_info={
                    "id": job["JobID"],
                    "node_ip_address": job["DriverIPAddress"],
                    "pid": str(job["DriverPid"]),
                },
                start_time=job["StartTime"],
                end_time=job["EndTime"],
                metadata=config.get("metadata") or {},
                runtime_env=config.get("runtime_env") or {},
                driver_node_id=job["DriverNodeID"],
            )
        )
    return rows


def _placement_groups(address: str | None) -> list[StateSchema]:
    return [
        PlacementGroupState(
            placement_group_id=group["placement_group_id"],
            name=group["name"],
            creator_job_id=group["creator_job_id"],
            state=group["state"],
            bundles=[
                {
                    "bundle_id": {"placement_group_id": group["placement_group_id"], "bundle_index": int(index)},
                    "unit_resources": resources,
                    "node_id": group["bundles_to_node_id"][index],
                }
                for index, resources in sorted(group["bundles"].items(), key=lambda item: int(item[0]))
            ],
            is_detached=group["is_detached"],
            stats=group["stats"],
            pending_reason=group["pending_reason"] or None,
        )
        for group in _ask(state_query.gcs_query, "placement_groups", address).values()
    ]


def _workers(address: str | None) -> list[StateSchema]:
    answers, missing = _ask(state_query.node_queries, "workers", address)
    if missing:
        raise DataSourceUnavailable(
            f"workers can be listed on the nodes of this machine only so far, not on {', '.join(missing)}"
        )
    hosts = {node.node_id: node.node_ip for node in _nodes(address)}  # type: ignore[attr-defined]
    rows: list[StateSchema] = []
    for node_id, answer in answers.items():
        for kind, workers in (("WORKER", answer["workers"]), ("DRIVER", answer["drivers"])):
            for worker in workers:
                rows.append(
                    WorkerState(
                        worker_id=worker["worker_id"],
                        is_alive=True,
                        worker_type=kind,
                        exit_type=None,
                        node_id=node_id,
                        ip=hosts.get(node_id, ""),
                        pid=worker.get("pid", 0),
                        exit_detail=None,
                        state=worker.get("state"),
                    )
                )
    return rows


def _not_built(what: str) -> Callable[[str | None], list[StateSchema]]:
    def refuse(address: str | None) -> list[StateSchema]:
        raise NotImplementedError(f"the state of {what} is not built yet")

    return refuse


_SOURCES: dict[str, Callable[[str | None], list[StateSchema]]] = {
    "actors": _actors,
    "nodes": _nodes,
    "jobs": _jobs,
    "placement_groups": _placement_groups,
    "workers": _workers,
    "tasks": _not_built("tasks"),
    "objects": _not_built("objects"),
    "runtime_envs": _not_built("runtime environments"),
    "cluster_events": _not_built("cluster events"),
}
_ID_FIELDS = {
    "actors": "actor_id",
    "nodes": "node_id",
    "jobs": "job_id",
    "placement_groups": "placement_group_id",
    "workers": "worker_id",
}
RESOURCES = tuple(_SOURCES)


def _same(value: Any, wanted: Any) -> bool:
    if isinstance(value, bool):
        return str(value).lower() == str(wanted).lower()
    return value == wanted or str(value).lower() == str(wanted).lower()


def _filtered(rows: list[StateSchema], filters: Filters | None) -> list[StateSchema]:
    for item in filters or []:
        if not isinstance(item, (tuple, list)) or len(item) != 3:
            raise ValueError(f"a filter is (key, predicate, value), not {item!r}")
        key, predicate, wanted = item
        if predicate not in ("=", "!="):
            raise ValueError(f"the predicate of a filter is '=' or '!=', not {predicate!r}")
        if rows and key not in rows[0].keys():
            raise ValueError(f"there is no field {key!r}; the fields are {', '.join(rows[0].keys())}")
        rows = [row for row in rows if _same(row[key], wanted) == (predicate == "=")]
    return rows


def _list(
    resource: str,
    address: str | None,
    filters: Filters | None,
    limit: int,
    timeout: float,
    detail: bool,
    raise_on_missing_output: bool,
    _explain: bool,
) -> list[Any]:
    if resource not in _SOURCES:
        raise ValueError(f"there is no resource {resource!r}; there are {', '.join(RESOURCES)}")
    if not isinstance(limit, int) or limit < 1:
        raise ValueError(f"limit must be a whole number above 0, not {limit!r}")
    if timeout <= 0:
        raise ValueError(f"timeout must be above 0, not {timeout!r}")
    if _explain:
        raise NotImplementedError("_explain is not built")
    rows = _filtered(_SOURCES[resource](address), filters)
    if len(rows) > limit:
        if raise_on_missing_output:
            raise RayStateApiException(
                f"There are {len(rows)} rows, more than the limit of {limit}: raise the limit, filter, or pass "
                "raise_on_missing_output=False."
            )
        rows = rows[:limit]
    if not detail:
        for row in rows:
            base = set(row.base_columns())
            for name in row.keys():
                if name not in base:
                    setattr(row, name, None)
    return rows


def _make_list(resource: str, title: str) -> Callable[..., list[Any]]:
    def list_rows(
        address: str | None = None,
        filters: Filters | None = None,
        limit: int = DEFAULT_LIMIT,
        timeout: int = DEFAULT_RPC_TIMEOUT,
        detail: bool = False,
        raise_on_missing_output: bool = True,
        _explain: bool = False,
    ) -> list[Any]:
        return _list(resource, address, filters, limit, timeout, detail, raise_on_missing_output, _explain)

    list_rows.__name__ = list_rows.__qualname__ = f"list_{resource}"
    list_rows.__doc__ = f"""The {title} of the cluster at `address`, or of the one that this process is connected to.

    Args:
        address: "host:port" of the head node; None for this process's cluster.
        filters: (key, "=" or "!=", value) each; a row must pass all.
        limit: how many rows at most.
        timeout: seconds to wait at most.
        detail: fill every field.
        raise_on_missing_output: raise where there are more rows than `limit`.

    Raises:
        ServerUnavailable: there is no such cluster.
        RayStateApiException: rows are missing.
        ValueError: a filter, limit or timeout that cannot be.
        NotImplementedError: the state of {title} is not built yet.

    Example:
        >>> list_{resource}(limit=10)
    """
    return list_rows


list_actors = _make_list("actors", "actors")
list_nodes = _make_list("nodes", "nodes")
list_jobs = _make_list("jobs", "jobs")
list_placement_groups = _make_list("placement_groups", "placement groups")
list_workers = _make_list("workers", "workers")
list_tasks = _make_list("tasks", "tasks")
list_objects = _make_list("objects", "objects")
list_runtime_envs = _make_list("runtime_envs", "runtime environments")
list_cluster_events = _make_list("cluster_events", "cluster events")


def _make_get(resource: str, title: str) -> Callable[..., Any]:
    def get_row(id: str, address: str | None = None, timeout: int = DEFAULT_RPC_TIMEOUT, _explain: bool = False) -> Any:
        if resource not in _ID_FIELDS:
            raise NotImplementedError(f"the state of {title} is not built yet")
        rows = _list(resource, address, [(_ID_FIELDS[resource], "=", id)], 1, timeout, True, True, _explain)
        return rows[0] if rows else None

    get_row.__doc__ = f"""One of the {title} by its id, with every field; None where there is none.

    Raises:
        ServerUnavailable: there is no such cluster.
        NotImplementedError: the state of {title} is not built yet.
    """
    return get_row


get_actor = _make_get("actors", "actors")
get_node = _make_get("nodes", "nodes")
get_job = _make_get("jobs", "jobs")
get_placement_group = _make_get("placement_groups", "placement groups")
get_worker = _make_get("workers", "workers")
get_task = _make_get("tasks", "tasks")
get_objects = _make_get("objects", "objects")


def summarize_actors(
    address: str | None = None,
    timeout: int = DEFAULT_RPC_TIMEOUT,
    raise_on_missing_output: bool = True,
    _explain: bool = False,
) -> dict[str, Any]:
    """How many actors of each class are in each state.

    Raises:
        ServerUnavailable: there is no such cluster.

    Example:
        >>> summarize_actors()["cluster"]["total_actors"]
        0
    """
    actors = _list("actors", address, None, 10**9, timeout, True, raise_on_missing_output, _explain)
    summary: dict[str, dict[str, Any]] = {}
    for actor in actors:
        entry = summary.setdefault(actor.class_name, {"class_name": actor.class_name, "state_counts": Counter()})
        entry["state_counts"][actor.state] += 1
    for entry in summary.values():
        entry["state_counts"] = dict(entry["state_counts"])
    return {"cluster": {"summary": summary, "total_actors": len(actors), "summary_by": "class"}}


def summarize_tasks(
    address: str | None = None,
    timeout: int = DEFAULT_RPC_TIMEOUT,
    raise_on_missing_output: bool = True,
    _explain: bool = False,
) -> dict[str, Any]:
    """Not built. Raises NotImplementedError."""
    raise NotImplementedError("the state of tasks is not built yet")


def summarize_objects(
    address: str | None = None,
    timeout: int = DEFAULT_RPC_TIMEOUT,
    raise_on_missing_output: bool = True,
    _explain: bool = False,
) -> dict[str, Any]:
    """Not built. Raises NotImplementedError."""
    raise NotImplementedError("the state of objects is not built yet")


# --- logs ---


def _log_directory(address: str | None, node_id: str | None, node_ip: str | None) -> str:
    """The log directory of a node of this machine. Nodes of one session share it."""
    from ray._private.node import find_cluster

    core = state_query._connected_core(address)
    if core is not None:
        session = core.session_directory()
    else:
        connection = _ask(find_cluster, address or "auto")
        if connection is None:
            raise ServerUnavailable("Could not find any running Ray instance.")
        session = connection.session_directory
    records = services.read_records(session)
    if node_id is not None and node_id not in {record["node_id"] for record in records}:
        raise NotImplementedError(f"logs of node {node_id} cannot be read yet: it is not on this machine")
    if node_ip is not None and node_ip not in {record["host"] for record in records}:
        raise NotImplementedError(f"logs of {node_ip} cannot be read yet: it is not this machine")
    return os.path.join(session, "logs")


def list_logs(
    address: str | None = None,
    node_id: str | None = None,
    node_ip: str | None = None,
    glob_filter: str | None = None,
    timeout: int = DEFAULT_RPC_TIMEOUT,
) -> dict[str, list[str]]:
    """Names of the log files by component: gcs_server, raylet, worker_out, worker_err, internal.

    Raises:
        ServerUnavailable: there is no such cluster.
        NotImplementedError: the node is on another machine.
    """
    result: dict[str, list[str]] = {}
    for name in sorted(os.listdir(_log_directory(address, node_id, node_ip))):
        if glob_filter is not None and not fnmatch.fnmatch(name, glob_filter):
            continue
        if name.startswith("worker-"):
            component = "worker_out" if name.endswith(".out") else "worker_err"
        elif name.startswith("gcs_server"):
            component = "gcs_server"
        elif name.startswith("raylet"):
            component = "raylet"
        else:
            component = "internal"
        result.setdefault(component, []).append(name)
    return result


def get_log(
    address: str | None = None,
    node_id: str | None = None,
    node_ip: str | None = None,
    filename: str | None = None,
    actor_id: str | None = None,
    task_id: str | None = None,
    pid: int | None = None,
    follow: bool = False,
    tail: int = -1,
    timeout: int = DEFAULT_RPC_TIMEOUT,
    suffix: str = "out",
    encoding: str | None = "utf-8",
    errors: str | None = "strict",
    submission_id: str | None = None,
    attempt_number: int = 0,
    _interval: float | None = None,
    filter_ansi_code: bool = False,
) -> Iterator[str]:
    """Pieces of a log: of a file by name, of an actor, or of the worker with a pid.

    Args:
        follow: go on while the file grows.
        tail: only this many last lines; -1 for all.
        suffix: "out" or "err", for actors and workers.

    Raises:
        FileNotFoundError: there is no such log.
        ServerUnavailable: there is no such cluster.
        NotImplementedError: logs of tasks and jobs, and nodes of other machines.
    """
    if task_id is not None or submission_id is not None or attempt_number:
        raise NotImplementedError("logs of tasks and submitted jobs are not built yet")
    if filter_ansi_code:
        raise NotImplementedError("filter_ansi_code is not built yet")
    if suffix not in ("out", "err"):
        raise ValueError(f"suffix must be 'out' or 'err', not {suffix!r}")
    directory = _log_directory(address, node_id, node_ip)
    if actor_id is not None:
        actor = get_actor(actor_id, address, timeout)
        if actor is None:
            raise FileNotFoundError(f"there is no actor {actor_id}")
        pid = actor.pid
    if pid is not None:
        names = [n for n in os.listdir(directory) if n.startswith("worker-") and n.endswith(f"-{pid}.{suffix}")]
        if not names:
            raise FileNotFoundError(f"there is no log of a worker with pid {pid}")
        filename = names[0]
    if filename is None:
        raise ValueError("say which log: filename, actor_id or pid")
    if os.path.basename(filename) != filename:
        raise ValueError(f"{filename!r} is not the name of a file in the log directory")
    path = os.path.join(directory, filename)
    if not os.path.isfile(path):
        raise FileNotFoundError(f"there is no log {filename}")
    return _pieces(path, tail, follow, 0.5 if _interval is None else _interval, encoding, errors)


def _pieces(
    path: str, tail: int, follow: bool, interval_s: float, encoding: str | None, errors: str | None
) -> Iterator[str]:
    with open(path, encoding=encoding or "utf-8", errors=errors or "strict") as file:
        if tail >= 0:
            lines = file.readlines()
            if tail:
                yield "".join(lines[-tail:])
        while True:
            text = file.read(1 << 20)
            if text:
                yield text
            elif follow:
                time.sleep(interval_s)
            else:
                return


class StateApiClient:
    """The same questions as methods.

    Args:
        address: "host:port" of the head node; None for this process's cluster.
        cookies, headers: not built; there is no web server to send them to.
    """

    def __init__(
        self, address: str | None = None, cookies: dict[str, Any] | None = None, headers: dict[str, Any] | None = None
    ) -> None:
        if cookies or headers:
            raise NotImplementedError("StateApiClient: cookies and headers are not built: there is no web server")
        self._address = address

    def get_address(self) -> str:
        """The address asked."""
        if self._address is None:
            connection = _ask(state_query.connect_tool)
            try:
                return connection.node.address
            finally:
                connection.close()
        return self._address

    def get_version(self) -> str:
        """The version of the programming interface."""
        from ray._private.ray_constants import RAY_VERSION

        return RAY_VERSION

    def get(self, resource: Any, id: str, options: Any = None, _explain: bool = False) -> Any:
        """One row by its id; None where there is none."""
        name = getattr(resource, "value", resource)
        timeout = getattr(options, "timeout", DEFAULT_RPC_TIMEOUT)
        if name not in _ID_FIELDS:
            raise NotImplementedError(f"the state of {name} is not built yet")
        rows = _list(name, self._address, [(_ID_FIELDS[name], "=", id)], 1, timeout, True, True, _explain)
        return rows[0] if rows else None

    def list(
        self, resource: Any, options: Any = None, raise_on_missing_output: bool = True, _explain: bool = False
    ) -> list[Any]:
        """Rows. `options` may have filters, limit, timeout and detail."""
        name = getattr(resource, "value", resource)
        return _list(
            name,
            self._address,
            getattr(options, "filters", None),
            getattr(options, "limit", DEFAULT_LIMIT),
            getattr(options, "timeout", DEFAULT_RPC_TIMEOUT),
            getattr(options, "detail", False),
            raise_on_missing_output,
            _explain,
        )

    def summary(
        self, resource: Any, options: Any = None, raise_on_missing_output: bool = True, _explain: bool = False
    ) -> dict[str, Any]:
        """A summary of "actors". Raises NotImplementedError for others."""
        name = getattr(resource, "value", resource)
        if name != "actors":
            raise NotImplementedError(f"a summary of {name} is not built yet")
        timeout = getattr(options, "timeout", DEFAULT_RPC_TIMEOUT)
        return summarize_actors(self._address, timeout, raise_on_missing_output, _explain)
