"""The command `ray`."""

from __future__ import annotations

import subprocess
import sys

import click

from ray.scripts import ask, start_stop
from ray.scripts.unbuilt import NOT_BUILT_EXIT_CODE, add_unbuilt_commands


def _print_version(context: click.Context, parameter: click.Parameter, value: bool) -> None:
    if value and not context.resilient_parsing:
        from ray._private.ray_constants import RAY_VERSION

        click.echo(f"ray, version {RAY_VERSION}")
        context.exit()


@click.group()
@click.option("--logging-level", default="info", help="Level of the command's own messages.")
@click.option("--logging-format", default=None, help="Format of the command's own messages.")
@click.option("--version", is_flag=True, callback=_print_version, expose_value=False, is_eager=True)
def cli(logging_level: str, logging_format: str | None) -> None:
    """Start and end nodes, and see what a cluster does."""
    from ray._private.ray_logger import set_up_ray_logger

    set_up_ray_logger(logging_level, logging_format)


@cli.command("get-auth-token")
@click.option("--generate", is_flag=True, help="Make a token where there is none.")
def get_auth_token(generate: bool) -> None:
    """Print the cluster's token."""
    from ray._private import authentication

    try:
        token = authentication.load_token()
        if token is None and generate:
            token = authentication.create_token_file()
    except (OSError, ValueError, NotImplementedError) as error:
        raise start_stop.fail(str(error)) from None
    if token is None:
        raise start_stop.fail(
            f"There is no token: {authentication.TOKEN_ENVIRONMENT_VARIABLE} and "
            f"{authentication.TOKEN_PATH_ENVIRONMENT_VARIABLE} are not set and {authentication.default_token_path()} "
            "does not exist. Make one by `ray get-auth-token --generate`."
        )
    click.echo(token)


@cli.command(context_settings={"ignore_unknown_options": True})
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
def microbenchmark(arguments: tuple[str, ...]) -> None:
    """Run the benchmarks; arguments as of `python -m benchmarks`, from a clone of the project."""
    import importlib.util

    if importlib.util.find_spec("benchmarks") is None:
        raise start_stop.fail("The benchmarks are not part of the package: run this in a clone of the project.")
    raise click.exceptions.Exit(subprocess.call([sys.executable, "-m", "benchmarks", *arguments]))


for _command in (
    start_stop.start,
    start_stop.stop,
    ask.status,
    ask.list_command,
    ask.get_command,
    ask.summary,
    ask.memory,
    ask.logs,
    ask.kill_actor,
):
    cli.add_command(_command)
add_unbuilt_commands(cli)


def main() -> None:
    """The console script `ray`."""
    # `python -m benchmarks` is found in the current directory.
    if "" not in sys.path:
        sys.path.insert(0, "")
    cli(prog_name="ray")


def serve() -> None:
    """The console script `serve`: not built yet."""
    click.echo("not built yet: `serve` (there is no Serve)", err=True)
    sys.exit(NOT_BUILT_EXIT_CODE)


def tune() -> None:
    """The console script `tune`: not built yet."""
    click.echo("not built yet: `tune` (there is no Tune)", err=True)
    sys.exit(NOT_BUILT_EXIT_CODE)


if __name__ == "__main__":
    main()
