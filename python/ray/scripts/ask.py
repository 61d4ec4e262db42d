"""Commands that ask a cluster: status, list, get, summary actors, memory, logs, kill-actor."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from typing import Any

import click

from ray.scripts.start_stop import fail
from ray.scripts.unbuilt import NOT_BUILT_EXIT_CODE

_UNITS = {"B": 1, "KB": 2**10, "MB": 2**20, "GB": 2**30}


def answering(function: Callable[..., Any]) -> Callable[..., Any]:
    """Turns what a question raises into a line on standard error and an exit code."""
    import functools

    @functools.wraps(function)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        from ray.exceptions import RayError
        from ray.util.state.exception import RayStateApiException

        try:
            return function(*args, **kwargs)
        except NotImplementedError as error:
            raise fail(f"not built yet: {error}", NOT_BUILT_EXIT_CODE) from None
        except (ConnectionError, RayStateApiException, RayError, ValueError, FileNotFoundError) as error:
            raise fail(str(error)) from None

    return wrapped


def table(rows: list[dict[str, Any]], columns: Iterable[str]) -> str:
    """Rows as columns of text."""
    names = list(columns)
    if not rows:
        return "(none)"
    cells = [[name.upper() for name in names]]
    for row in rows:
        cells.append([_cell(row.get(name)) for name in names])
    widths = [max(len(line[index]) for line in cells) for index in range(len(names))]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(line, widths)).rstrip() for line in cells)


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, (dict, list)):
        return json.dumps(value)
    return str(value)


def _yaml(value: Any, indent: str = "") -> str:
    """Plain YAML of dictionaries, lists and scalars."""
    if isinstance(value, dict):
        if not value:
            return " {}\n"
        text = "\n" if indent else ""
        for key, item in value.items():
            text += f"{indent}{key}:{_yaml(item, indent + '  ')}"
        return text
    if isinstance(value, list):
        if not value:
            return " []\n"
        text = "\n" if indent else ""
        for item in value:
            inner = _yaml(item, indent + "  ")
            text += f"{indent}-{' ' + inner.lstrip() if isinstance(item, (dict, list)) else inner}"
        return text
    return f" {json.dumps(value)}\n"


def amount(name: str, value: float) -> str:
    """An amount of a resource for people: bytes in GiB."""
    if name in ("memory", "object_store_memory"):
        return f"{value / 2**30:.2f}GiB"
    return f"{value:g}"


@click.command()
@click.option("--address", default=None, help="HOST:PORT of the cluster's head node.")
@click.option("-v", "--verbose", count=True, help="Resources of each node too.")
@answering
def status(address: str | None, verbose: int) -> None:
    """Show the cluster's nodes, resources in use and demands that wait."""
    from ray._private import state_query

    with state_query.connect_tool(address) as tool:
        nodes = tool.gcs_query("nodes")
        total = tool.gcs_query("cluster_resources")
        available = tool.gcs_query("available_resources")
        pending = tool.gcs_query("pending")
        health = tool.gcs_query("health")
        config = tool.gcs_query("internal_config")
    click.echo(f"======== Cluster {config['session_name']} ========")
    click.echo(f"Nodes: {health['nodes_alive']} alive, {health['nodes_dead']} dead")
    for node in nodes:
        state = "alive" if node["Alive"] else f"dead ({node['DeathReasonMessage'] or 'no reason known'})"
        if node["Draining"]:
            state += f", draining ({node['DrainReason']})"
        head = " head" if node["IsHead"] else ""
        click.echo(f" {node['NodeID']} {node['NodeManagerAddress']}:{node['NodeManagerPort']}{head} {state}")
        if verbose and node["Alive"]:
            for name, value in sorted(node["Resources"].items()):
                if not name.startswith("node:"):
                    used = value - node["Available"].get(name, 0)
                    click.echo(f"   {amount(name, used)}/{amount(name, value)} {name}")
            if node["Labels"]:
                click.echo(f"   labels: {', '.join(f'{k}={v}' for k, v in sorted(node['Labels'].items()))}")
    click.echo("\nResources\n--------------------------------------------------------\nTotal Usage:")
    for name, value in sorted(total.items()):
        if not name.startswith("node:"):
            click.echo(f" {amount(name, value - available.get(name, 0))}/{amount(name, value)} {name}")
    click.echo("\nTotal Demands:")
    lines = []
    for demand in pending["demands"]:
        mark = ", which no node can ever satisfy" if demand["infeasible"] else ""
        lines.append(f" {json.dumps(demand['resources'])}: {demand['count']}+ pending tasks/actors{mark}")
    for actor in pending["actors"]:
        lines.append(
            f" {json.dumps(actor['demand'])}: actor {actor['class_name']}: {actor['reason'] or 'is being placed'}"
        )
    for group in pending["placement_groups"]:
        reason = group["pending_reason"] or "is being placed"
        lines.append(f" {json.dumps(list(group['bundles'].values()))} ({group['strategy']}): placement group: {reason}")
    click.echo("\n".join(lines) if lines else " (no resource demands)")
    if verbose:
        click.echo(f"\nJobs running: {health['jobs_running']}  actors: {health['actors']}  keys: {health['keys']}")


def _parse_filters(filters: tuple[str, ...]) -> list[tuple[str, str, str]]:
    result = []
    for text in filters:
        predicate = "!=" if "!=" in text else "="
        key, found, value = text.partition(predicate)
        if not found or not key.strip():
            raise click.BadParameter(f"a filter looks like key=value or key!=value, not {text!r}")
        result.append((key.strip(), predicate, value.strip()))
    return result


def _print_rows(rows: list[Any], output: str, title: str) -> None:
    dictionaries = [{k: v for k, v in row.asdict().items()} for row in rows]
    if output == "json":
        click.echo(json.dumps(dictionaries))
    elif output == "yaml":
        click.echo("---\n" + (_yaml(dictionaries) if dictionaries else "[]\n"), nl=False)
    else:
        columns = [k for k in (dictionaries[0] if dictionaries else {}) if any(d[k] is not None for d in dictionaries)]
        click.echo(f"======== List: {title} ========\nTotal: {len(rows)}\n")
        click.echo(table(dictionaries, columns))


@click.command("list")
@click.argument("resource")
@click.option("--format", "output", type=click.Choice(["default", "json", "yaml", "table"]), default="default")
@click.option("-f", "--filter", "filters", multiple=True, help="key=value or key!=value; may be given several times.")
@click.option("--limit", type=int, default=100, help="How many rows at most.")
@click.option("--detail", is_flag=True, help="Every field.")
@click.option("--timeout", type=int, default=30, help="Seconds to wait at most.")
@click.option("--address", default=None, help="HOST:PORT of the cluster's head node.")
@answering
def list_command(
    resource: str, output: str, filters: tuple[str, ...], limit: int, detail: bool, timeout: int, address: str | None
) -> None:
    """List actors, nodes, jobs, placement-groups or workers."""
    from ray.util.state import api

    name = resource.replace("-", "_")
    rows = api._list(name, address, _parse_filters(filters), limit, timeout, detail, False, False)
    if output == "default":
        output = "yaml" if detail else "table"
    _print_rows(rows, output, resource)


@click.command("get")
@click.argument("resource")
@click.argument("id")
@click.option("--address", default=None, help="HOST:PORT of the cluster's head node.")
@click.option("--timeout", type=int, default=30, help="Seconds to wait at most.")
@answering
def get_command(resource: str, id: str, address: str | None, timeout: int) -> None:
    """Show one of the actors, nodes, jobs, placement-groups or workers by its id."""
    from ray.util.state import api

    row = api.StateApiClient(address).get(resource.replace("-", "_"), id)
    if row is None:
        raise fail(f"There is none of the {resource} with the id {id}.")
    click.echo("---\n" + _yaml(row.asdict()), nl=False)


@click.group()
def summary() -> None:
    """Summaries of the cluster's state."""


@summary.command("actors")
@click.option("--timeout", type=int, default=30)
@click.option("--address", default=None, help="HOST:PORT of the cluster's head node.")
@answering
def summary_actors(timeout: int, address: str | None) -> None:
    """How many actors of each class are in each state."""
    from ray.util.state import summarize_actors

    answer = summarize_actors(address, timeout)["cluster"]
    click.echo(f"======== Actors Summary ========\nTotal Actors: {answer['total_actors']}\n")
    rows = [
        {
            "class_name": entry["class_name"],
            "state_counts": ", ".join(f"{k}: {v}" for k, v in entry["state_counts"].items()),
        }
        for entry in answer["summary"].values()
    ]
    click.echo(table(rows, ("class_name", "state_counts")))


@click.command()
@click.option("--address", default=None, help="HOST:PORT of the cluster's head node.")
@click.option("--group-by", type=click.Choice(["NODE_ADDRESS", "STACK_TRACE"]), default=None)
@click.option("--sort-by", type=click.Choice(["PID", "OBJECT_SIZE", "REFERENCE_TYPE"]), default=None)
@click.option("--units", type=click.Choice(list(_UNITS)), default="B", help="Units of sizes.")
@click.option("--no-format", is_flag=True, help="JSON.")
@click.option("--stats-only", is_flag=True, help="Only the sums of each node.")
@click.option("--num-entries", "--n", "num_entries", type=int, default=None, help="How many objects at most.")
@answering
def memory(
    address: str | None,
    group_by: str | None,
    sort_by: str | None,
    units: str,
    no_format: bool,
    stats_only: bool,
    num_entries: int | None,
) -> None:
    """Show what the object stores hold."""
    if group_by == "STACK_TRACE" or sort_by in ("PID", "REFERENCE_TYPE"):
        raise NotImplementedError("ray memory by stack trace, pid or type of reference: call sites are not recorded")
    from ray._private import state_query

    answers, missing = state_query.node_queries("memory", address)
    objects, _ = state_query.node_queries("objects", address)
    if no_format:
        click.echo(json.dumps({"memory": answers, "objects": {} if stats_only else objects}))
        return
    for node_id, answer in answers.items():
        click.echo(f"======== Object store of node {node_id} ========")
        for key, value in answer.items():
            if isinstance(value, (int, float)) and not isinstance(value, bool) and "byte" in key:
                click.echo(f" {key.replace('_bytes', '').replace('_', ' ')}: {value / _UNITS[units]:.10g} {units}")
            elif not isinstance(value, (dict, list)):
                click.echo(f" {key.replace('_', ' ')}: {value}")
        if stats_only:
            continue
        rows = objects.get(node_id, [])
        rows = rows.get("objects", []) if isinstance(rows, dict) else rows
        size = next((name for name in ("size_bytes", "bytes", "size", "object_size") if rows and name in rows[0]), None)
        if size is not None:
            rows = sorted(rows, key=lambda row: -row[size])
        if num_entries is not None:
            rows = rows[:num_entries]
        if rows:
            click.echo(table(rows, rows[0]))
        else:
            click.echo(" (no objects)")
    for node_id in missing:
        click.echo(f"node {node_id} is on another machine and was not asked", err=True)


# --- logs ---


class LogsGroup(click.Group):
    """`ray logs GLOB` is short for `ray logs cluster GLOB`."""

    def resolve_command(self, context: click.Context, args: list[str]) -> Any:
        """Finds the command; anything that is none is a glob for `cluster`."""
        if args and args[0] not in self.commands and not args[0].startswith("-"):
            return "cluster", self.commands["cluster"], args
        return super().resolve_command(context, args)


@click.group(cls=LogsGroup, invoke_without_command=True)
@click.pass_context
def logs(context: click.Context) -> None:
    """Show log files, or what is in one."""
    if context.invoked_subcommand is None:
        context.invoke(context.command.commands["cluster"])  # type: ignore[attr-defined]


def _log_options(function: Any) -> Any:
    for option in (
        click.option("--address", default=None, help="HOST:PORT of the cluster's head node."),
        click.option("--follow", "-f", is_flag=True, help="Go on while the file grows."),
        click.option("--tail", type=int, default=None, help="Only the last lines. Default: 1000; -1 for all."),
        click.option("--interval", type=float, default=None, help="Seconds between two looks, with --follow."),
        click.option("--timeout", type=int, default=30, help="Seconds to wait at most."),
    ):
        function = option(function)
    return function


def _node_options(function: Any) -> Any:
    function = click.option("--node-id", "-id", "node_id", default=None, help="The node.")(function)
    return click.option("--node-ip", "-ip", "node_ip", default=None, help="The node's address.")(function)


def _show(**arguments: Any) -> None:
    from ray.util.state import get_log

    for piece in get_log(**arguments):
        click.echo(piece, nl=False)


@logs.command("cluster")
@click.argument("glob_filter", required=False, default="*")
@click.option("--encoding", default="utf-8")
@click.option("--encoding-errors", default="replace")
@_log_options
@_node_options
@answering
def logs_cluster(
    glob_filter: str,
    address: str | None,
    node_id: str | None,
    node_ip: str | None,
    follow: bool,
    tail: int | None,
    interval: float | None,
    timeout: int,
    encoding: str,
    encoding_errors: str,
) -> None:
    """List the log files that match GLOB_FILTER; if it is one, show it."""
    from ray.util.state import list_logs

    files = list_logs(address, node_id, node_ip, glob_filter, timeout)
    names = [name for group in files.values() for name in group]
    if not names:
        raise fail(f"No log file matches {glob_filter!r}.")
    if len(names) == 1 and glob_filter != "*":
        _show(
            address=address,
            filename=names[0],
            follow=follow,
            tail=1000 if tail is None else tail,
            encoding=encoding,
            errors=encoding_errors,
            _interval=interval,
        )
        return
    for component, group in files.items():
        click.echo(f"{component}:")
        for name in group:
            click.echo(f"  - {name}")


@logs.command("actor")
@click.option("--id", "-a", "actor_id", default=None, help="The actor.")
@click.option("--pid", "-pid", "pid", type=int, default=None, help="Its process.")
@click.option("--err", is_flag=True, help="Standard error instead of output.")
@_log_options
@_node_options
@answering
def logs_actor(
    actor_id: str | None,
    pid: int | None,
    err: bool,
    address: str | None,
    node_id: str | None,
    node_ip: str | None,
    follow: bool,
    tail: int | None,
    interval: float | None,
    timeout: int,
) -> None:
    """Show what an actor printed."""
    if (actor_id is None) == (pid is None):
        raise fail("Say either --id or --pid.", 2)
    _show(
        address=address,
        actor_id=actor_id,
        pid=pid,
        node_id=node_id,
        node_ip=node_ip,
        follow=follow,
        tail=1000 if tail is None else tail,
        suffix="err" if err else "out",
        errors="replace",
        _interval=interval,
    )


@logs.command("worker")
@click.option("--pid", "-pid", "pid", type=int, required=True, help="The worker's process.")
@click.option("--err", is_flag=True, help="Standard error instead of output.")
@_log_options
@_node_options
@answering
def logs_worker(
    pid: int,
    err: bool,
    address: str | None,
    node_id: str | None,
    node_ip: str | None,
    follow: bool,
    tail: int | None,
    interval: float | None,
    timeout: int,
) -> None:
    """Show what a worker printed."""
    _show(
        address=address,
        pid=pid,
        node_id=node_id,
        node_ip=node_ip,
        follow=follow,
        tail=1000 if tail is None else tail,
        suffix="err" if err else "out",
        errors="replace",
        _interval=interval,
    )


@logs.command("job", context_settings={"ignore_unknown_options": True})
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
def logs_job(arguments: tuple[str, ...]) -> None:
    """Logs of submitted jobs (not built yet)."""
    raise fail("not built yet: `ray logs job` (there is no job submission)", NOT_BUILT_EXIT_CODE)


@logs.command("task", context_settings={"ignore_unknown_options": True})
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
def logs_task(arguments: tuple[str, ...]) -> None:
    """Logs of one task (not built yet)."""
    raise fail("not built yet: `ray logs task` (logs are kept by worker)", NOT_BUILT_EXIT_CODE)


@click.command("kill-actor")
@click.option("--address", default=None, help="HOST:PORT of the cluster's head node.")
@click.option("--name", required=True, help="The actor's name.")
@click.option("--namespace", required=True, help="Its namespace.")
@click.option("--force", is_flag=True, help="Now, rather than after the calls that are queued.")
@click.option("--no-restart", is_flag=True, help="Not even where it has restarts left.")
@answering
def kill_actor(address: str | None, name: str, namespace: str, force: bool, no_restart: bool) -> None:
    """End an actor by its name."""
    import ray

    ray.init(address=address or "auto", log_to_driver=False, configure_logging=False, namespace=namespace)
    try:
        actor = ray.get_actor(name, namespace=namespace)
        if force:
            ray.kill(actor, no_restart=no_restart)
        elif no_restart:
            # The last call in its queue makes it leave for good.
            ray.wait([actor.__ray_terminate__.remote()], timeout=30)
        else:
            raise NotImplementedError("ending an actor gently so that it restarts; add --force or --no-restart")
    finally:
        ray.shutdown()
    click.echo(f"Ended actor {name!r} of namespace {namespace!r}.")
