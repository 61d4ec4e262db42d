"""Commands that exist by name and are not built yet: each says so and ends with exit code 2."""

from __future__ import annotations

import click

NOT_BUILT_EXIT_CODE = 2

# Command -> what it needs. A nested command is "group command".
UNBUILT = {
    "attach": "there is no cluster launcher",
    "check-open-ports": "it needs a service on the internet",
    "cluster-dump": "there is no cluster launcher",
    "cpp": "there is no C++ API",
    "dashboard": "there is no dashboard",
    "debug": "there is no distributed debugger",
    "disable-usage-stats": "no usage statistics are collected, so there is nothing to turn off",
    "down": "there is no cluster launcher",
    "enable-usage-stats": "no usage statistics are collected",
    "exec": "there is no cluster launcher",
    "get-head-ip": "there is no cluster launcher",
    "get-worker-ips": "there is no cluster launcher",
    "job delete": "there is no job submission",
    "job list": "there is no job submission",
    "job logs": "there is no job submission",
    "job status": "there is no job submission",
    "job stop": "there is no job submission",
    "job submit": "there is no job submission",
    "metrics launch-prometheus": "there is no metrics exporter",
    "metrics shutdown-prometheus": "there is no metrics exporter",
    "monitor": "there is no autoscaler",
    "rsync-down": "there is no cluster launcher",
    "rsync-up": "there is no cluster launcher",
    "serve build": "there is no Serve",
    "serve config": "there is no Serve",
    "serve controller-health": "there is no Serve",
    "serve deploy": "there is no Serve",
    "serve run": "there is no Serve",
    "serve shutdown": "there is no Serve",
    "serve start": "there is no Serve",
    "serve status": "there is no Serve",
    "stack": "there is no way to read other processes' stacks",
    "submit": "there is no cluster launcher",
    "summary objects": "the state of objects is not collected",
    "summary tasks": "the state of tasks is not collected",
    "symmetric-run": "it needs a launcher on each node",
    "timeline": "task events are not collected",
    "up": "there is no cluster launcher",
}


class UnbuiltCommand(click.Command):
    """Takes any arguments and refuses."""

    def __init__(self, name: str, path: str, reason: str) -> None:
        super().__init__(
            name,
            callback=self._refuse,
            params=[click.Argument(["arguments"], nargs=-1, type=click.UNPROCESSED)],
            help=f"Not built yet: {reason}.",
            short_help="(not built yet)",
            context_settings={"ignore_unknown_options": True, "allow_extra_args": True},
        )
        self._path = path
        self._reason = reason

    def _refuse(self, arguments: tuple[str, ...]) -> None:
        click.echo(f"not built yet: `ray {self._path}` ({self._reason})", err=True)
        raise click.exceptions.Exit(NOT_BUILT_EXIT_CODE)


def add_unbuilt_commands(group: click.Group) -> None:
    """Adds every command of `UNBUILT` to `group`, making nested groups where they are missing."""
    for path, reason in UNBUILT.items():
        *parents, name = path.split(" ")
        parent = group
        for part in parents:
            child = parent.commands.get(part)
            if child is None:
                child = click.Group(part, help=f"Commands of `{part}`.")
                parent.add_command(child)
            assert isinstance(child, click.Group)
            parent = child
        parent.add_command(UnbuiltCommand(name, path, reason))
