"""`ray start` and `ray stop`: nodes that outlive the command that starts them."""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
from typing import Any

import click

from ray._private import authentication, node, services
from ray.scripts.unbuilt import NOT_BUILT_EXIT_CODE

# Options of `ray start` that exist by name: what is missing, and the values that ask for nothing that is.
_UNBUILT_START_OPTIONS: dict[str, tuple[str, tuple[Any, ...]]] = {
    "redis_username": ("storage in Redis", ()),
    "redis_password": ("storage in Redis", ()),
    "redis_shard_ports": ("storage in Redis", ()),
    "object_manager_port": ("a port of its own for objects: a node has one port", ()),
    "node_manager_port": ("a port of its own for the raylet: a node has one port", ()),
    "min_worker_port": ("ports of workers: a node has one port", ()),
    "max_worker_port": ("ports of workers: a node has one port", ()),
    "worker_port_list": ("ports of workers: a node has one port", ()),
    "ray_client_server_port": ("Ray Client", ()),
    "include_dashboard": ("the dashboard", (False,)),
    "dashboard_host": ("the dashboard", ()),
    "dashboard_port": ("the dashboard", ()),
    "dashboard_agent_listen_port": ("the dashboard", ()),
    "dashboard_agent_grpc_port": ("the dashboard", ()),
    "runtime_env_agent_port": ("an agent for runtime environments", ()),
    "plasma_directory": ("a choice of the store's directory", ()),
    "object_spilling_directory": ("a choice of the spilling directory", ()),
    "autoscaling_config": ("the autoscaler", ()),
    "no_redirect_output": ("output that is not redirected", (False,)),
    "enable_object_reconstruction": ("the option: reconstruction is always on", (False,)),
    "metrics_export_port": ("the metrics exporter", ()),
    "no_monitor": ("the monitor", (False,)),
    "tracing_startup_hook": ("tracing", ()),
    "ray_debugger_external": ("the debugger", (False,)),
    # No statistics are collected, so both values of this one are true to what it asks.
    "disable_usage_stats": ("usage statistics", (False, True)),
    "include_log_monitor": ("turning off the log monitor", (True,)),
    "enable_resource_isolation": ("isolation by control groups", (False,)),
    "system_reserved_cpu": ("isolation by control groups", ()),
    "system_reserved_memory": ("isolation by control groups", ()),
    "cgroup_path": ("isolation by control groups", ()),
    "proxy_server_url": ("a proxy server", ()),
}


def fail(message: str, code: int = 1) -> click.exceptions.Exit:
    """Says what is wrong; raise what it returns."""
    click.echo(message, err=True)
    return click.exceptions.Exit(code)


def _json_option(name: str, text: str | None) -> dict[str, Any] | None:
    if text is None:
        return None
    try:
        value = json.loads(text)
    except ValueError as error:
        message = f"{name} is not JSON: {error}. Use single quotes around it: --{name}='{{\"a\": 1}}'"
        raise click.BadParameter(message) from None
    if not isinstance(value, dict):
        raise click.BadParameter(f"{name} must be a JSON object, not {text!r}")
    return value


def parse_labels(text: str | None, path: str | None) -> dict[str, str] | None:
    """Labels of ``--labels key1=value1,key2=value2`` over those of a YAML or JSON file.

    Raises:
        click.BadParameter: it is neither.
    """
    labels: dict[str, str] = {}
    if path is not None:
        labels.update(_read_labels_file(path))
    for part in (text or "").split(","):
        if not part.strip():
            continue
        key, equals, value = part.partition("=")
        if not equals:
            raise click.BadParameter(f"labels must look like key1=value1,key2=value2, not {text!r}")
        labels[key.strip()] = value.strip().strip("\"'")
    return labels or None


def _read_labels_file(path: str) -> dict[str, str]:
    try:
        with open(path) as file:
            content = file.read()
    except OSError as error:
        raise click.BadParameter(f"the labels file cannot be read: {error}") from None
    try:
        value = json.loads(content)
    except ValueError:
        # The simple YAML of labels: one `key: value` a line.
        value = {}
        for line in content.splitlines():
            line = line.split("#", 1)[0].strip()
            if not line or line == "---":
                continue
            key, colon, text = line.partition(":")
            if not colon:
                raise click.BadParameter(f"the labels file has a line that is not `key: value`: {line!r}") from None
            value[key.strip().strip("\"'")] = text.strip().strip("\"'")
    if not isinstance(value, dict):
        raise click.BadParameter(f"the labels file {path} must be a mapping")
    return {str(key): str(text) for key, text in value.items()}


def _check_unbuilt(given: dict[str, Any]) -> None:
    for name, value in given.items():
        what, allowed = _UNBUILT_START_OPTIONS[name]
        if value is None or value is False or value in allowed:
            continue
        option = f"--{name.replace('_', '-')}"
        raise fail(f"not built yet: `ray start {option}` ({what})", NOT_BUILT_EXIT_CODE)


def _unbuilt_options(function: Any) -> Any:
    flags = {
        "no_redirect_output",
        "enable_object_reconstruction",
        "no_monitor",
        "ray_debugger_external",
        "disable_usage_stats",
        "enable_resource_isolation",
    }
    booleans = {"include_dashboard", "include_log_monitor"}
    for name in reversed(_UNBUILT_START_OPTIONS):
        option = "--" + name.replace("_", "-")
        if name in flags:
            function = click.option(option, is_flag=True, default=False, hidden=True)(function)
        elif name in booleans:
            function = click.option(option, type=bool, default=None, hidden=True)(function)
        else:
            function = click.option(option, type=str, default=None, hidden=True)(function)
    return function


@click.command()
@click.option("--head", is_flag=True, help="Start the head node of a new cluster.")
@click.option("--address", default=None, help="Join the cluster whose head node is at HOST:PORT.")
@click.option("--port", type=int, default=None, help="The node's one port; the head's is 6379 by default.")
@click.option("--node-ip-address", default=None, help="The address to listen on. Default: loopback.")
@click.option("--node-name", default=None, help="A name for the node. Default: its address.")
@click.option("--num-cpus", type=int, default=None, help="CPUs to offer. Default: all.")
@click.option("--num-gpus", type=int, default=None, help="GPUs to offer. Default: all.")
@click.option("--memory", type=int, default=None, help="Bytes of memory for tasks and actors.")
@click.option("--object-store-memory", type=int, default=None, help="Bytes of the object store.")
@click.option("--resources", default=None, help="Custom resources as JSON, such as '{\"disk\": 1}'.")
@click.option("--labels", default=None, help="Labels of the node: key1=value1,key2=value2.")
@click.option("--labels-file", default=None, help="A YAML or JSON file with labels of the node.")
@click.option("--block", is_flag=True, help="Stay in the foreground until the node ends.")
@click.option("--temp-dir", default=None, help="The directory of sessions. Default: /tmp/ray.")
@click.option("--system-config", default=None, help="Settings of the runtime as JSON; of the head only.")
@click.option("--log-style", type=click.Choice(["auto", "record", "pretty"]), default="auto", hidden=True)
@click.option("--log-color", type=click.Choice(["auto", "false", "true"]), default="auto", hidden=True)
@click.option("-v", "--verbose", count=True, hidden=True)
@_unbuilt_options
def start(
    head: bool,
    address: str | None,
    port: int | None,
    node_ip_address: str | None,
    node_name: str | None,
    num_cpus: int | None,
    num_gpus: int | None,
    memory: int | None,
    object_store_memory: int | None,
    resources: str | None,
    labels: str | None,
    labels_file: str | None,
    block: bool,
    temp_dir: str | None,
    system_config: str | None,
    log_style: str,
    log_color: str,
    verbose: int,
    **unbuilt: Any,
) -> None:
    """Start a node on this machine: the head of a new cluster, or one that joins a cluster."""
    _check_unbuilt(unbuilt)
    if head == (address is not None):
        raise fail("Say either --head or --address=HOST:PORT.", 2)
    if address is not None:
        if port is not None:
            raise fail("--port is an option of --head: a node that joins takes any free port.", 2)
        if system_config is not None:
            raise fail("--system-config is an option of --head.", 2)
    params: dict[str, Any] = {
        "num_cpus": num_cpus,
        "num_gpus": num_gpus,
        "memory": memory,
        "object_store_memory": object_store_memory,
        "resources": _json_option("resources", resources),
        "labels": parse_labels(labels, labels_file),
        "node_name": node_name,
        "node_ip_address": node_ip_address,
        "temp_dir": temp_dir,
        "system_config": _json_option("system-config", system_config),
    }
    if head:
        params["port"] = node.DEFAULT_PORT if port is None else port
    root = services.temp_root(temp_dir)
    try:
        if head:
            _check_port_is_free(params.get("node_ip_address") or node.LOOPBACK, params["port"])
            handle = node.start_node(params, detached=not block)
        else:
            assert address is not None
            handle = _join(address, params, root, detached=not block)
    except (services.NodeStartError, ConnectionError, OSError, ValueError, TypeError, NotImplementedError) as error:
        raise fail(f"The node did not start: {error}" if "did not start" not in str(error) else str(error)) from None
    if head:
        _remember_cluster(root, handle.address)
        click.echo(f"Local node IP: {handle.host}\n\nThe head node has started.\n")
        click.echo(
            f"To add another node on this machine or one that reaches it:\n  ray start --address='{handle.address}'"
        )
        click.echo("To connect a program on this machine:\n  import ray\n  ray.init()")
        click.echo("To end the nodes on this machine:\n  ray stop\nTo see them:\n  ray status")
    else:
        click.echo(f"Local node IP: {handle.host}\n\nThe node has started and joined the cluster at {handle.address}.")
        click.echo("To end the nodes on this machine:\n  ray stop")
    sys.stdout.flush()
    if block:
        _block(handle)


def _check_port_is_free(host: str, port: int) -> None:
    for record in services.live_records(services.temp_root()):
        if record["is_head"] and port and record["port"] == port and record["host"] == host:
            raise ConnectionError(
                f"a cluster runs at {host}:{port} already: join it by `ray start --address={host}:{port}`, end it by "
                "`ray stop`, or choose another --port"
            )


def _join(address: str, params: dict[str, Any], root: str, detached: bool) -> node.NodeHandle:
    if address == "auto":
        connection = node.find_cluster("auto")
        assert connection is not None
        address = connection.address
    else:
        node._split_address(address)
    record = node._find_record(root, *node._split_address(address))
    if record is not None:
        # A second node on the head's machine shares its session, as one machine's logs belong together.
        node._check_token(record)
        params["session_directory"] = record["session_directory"]
    elif authentication.load_token() is None:
        raise ConnectionError(
            "this machine has no token: copy ~/.ray/auth_token from the head node, or set RAY_AUTH_TOKEN"
        )
    return node.start_node(params, head_address=address, detached=detached)


def _remember_cluster(root: str, address: str) -> None:
    # Where a program looks that was told nothing; and where one looks that was given the same directory.
    services.remember_root(root)
    for directory in {root, services.temp_root()}:
        path = os.path.join(directory, services.CURRENT_CLUSTER_FILE)
        temporary = f"{path}.{os.getpid()}"
        with open(temporary, "w") as file:
            file.write(address)
        os.replace(temporary, path)


def _block(handle: node.NodeHandle) -> None:
    asked = threading.Event()

    def ask(*_: object) -> None:
        asked.set()

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, ask)
    click.echo("\n--block: this command ends when the node does; Ctrl-C ends the node.")
    sys.stdout.flush()
    code = 0
    while not asked.wait(0.2):
        names = {name for name, _ in handle.live_processes()}
        if "raylet" not in names:
            click.echo(handle._daemons["raylet"].ending(), err=True)
            code = 1
            break
    handle.shutdown()
    _forget_cluster(os.path.dirname(handle.session_directory))
    raise click.exceptions.Exit(code)


def _forget_cluster(root: str) -> None:
    """Removes the note of the current cluster where no node of it runs here any more."""
    for directory in {root, *services.known_roots(services.temp_root())}:
        _forget_in(directory)


def _forget_in(root: str) -> None:
    address = node.current_cluster_address(root)
    if address is not None and node._find_record(root, *node._split_address(address)) is None:
        try:
            os.unlink(os.path.join(root, services.CURRENT_CLUSTER_FILE))
        except OSError:
            pass


def _stop_order(processes: dict[str, Any]) -> list[tuple[str, dict[str, int]]]:
    # The supervisor first: it would start the control plane again. Then raylets, which end their workers.
    order = {"supervisor": 0, "raylet": 1, "gcs_server": 2}
    return sorted(processes.items(), key=lambda item: order.get(item[0], 1))


@click.command()
@click.option("-f", "--force", is_flag=True, help="SIGKILL at once.")
@click.option("-g", "--grace-period", type=click.IntRange(0), default=16, help="Seconds before SIGKILL.")
@click.option("--log-style", type=click.Choice(["auto", "record", "pretty"]), default="auto", hidden=True)
@click.option("--log-color", type=click.Choice(["auto", "false", "true"]), default="auto", hidden=True)
@click.option("-v", "--verbose", count=True, hidden=True)
def stop(force: bool, grace_period: int, log_style: str, log_color: str, verbose: int) -> None:
    """End the nodes that `ray start` started on this machine, and nothing else.

    Ends exactly the processes that the sessions' records name, each known by its pid and start time. A cluster that a
    program started by `ray.init()` ends with that program.
    """
    root = services.temp_root()
    records = [
        record
        for directory in services.known_roots(root)
        for session in services.sessions(directory)
        for record in services.read_records(session)
        if record.get("is_detached")
    ]
    # Nodes that joined end before the head: they can still say goodbye to it.
    records.sort(key=lambda record: bool(record["is_head"]))
    ended = failed = 0
    deadline = time.monotonic() + grace_period
    for record in records:
        for name, process in _stop_order(record["processes"]):
            if not services.is_alive(process):
                continue
            grace_s = 0.0 if force else max(0.0, deadline - time.monotonic())
            if services.end_recorded_process(process, grace_s):
                ended += 1
                if verbose:
                    click.echo(f"Ended {name} (pid {process['pid']}).")
            else:
                failed += 1
                click.echo(f"{name} (pid {process['pid']}) does not end.", err=True)
        others = [r for r in services.read_records(record["session_directory"]) if r["node_id"] != record["node_id"]]
        is_last = not any(services.record_is_alive(other) for other in others)
        services.remove_leftovers(record["session_directory"], record["node_id"], is_last)
    _forget_cluster(root)
    if failed:
        raise fail(f"Ended {ended} processes; {failed} did not end.")
    click.echo(f"Stopped all {ended} Ray processes." if ended else "Did not find any active Ray processes.")
