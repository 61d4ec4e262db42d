"""`python -m benchmarks`: one run of floors, Python's own pools, this runtime, and with `--peer` another one.

    python -m benchmarks [--peer PYTHON] [--seconds 2] [--only REGEX] [--json FILE]

PYTHON is an interpreter that has another implementation of `ray`. Everything is measured in the same run, because
figures of different days on a shared machine do not compare.
"""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import platform
import subprocess
import sys
import tempfile
from typing import Any

CORE = pathlib.Path(__file__).with_name("core.py")
LOWER_IS_BETTER = {"s", "ms", "B", ""}


def shown(value: float | None, unit: str) -> str:
    """A figure for people."""
    if value is None:
        return "-"
    if unit in ("B", "B/s"):
        return f"{value / 1e6:,.1f} M{unit}" if value < 1e9 else f"{value / 1e9:,.2f} G{unit}"
    if unit in ("s", "ms"):
        return f"{value:,.3f} {unit}"
    return f"{value:,.0f} {unit}".rstrip()


def run_core(python: str, arguments: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """The figures of the implementation that `python` has.

    Raises:
        SystemExit: it failed; what it said was printed.
    """
    with tempfile.NamedTemporaryFile(suffix=".json") as file:
        command = [
            python,
            str(CORE),
            "--json",
            file.name,
            "--seconds",
            str(arguments.seconds),
            "--only",
            arguments.only,
        ]
        # Neither must see the other's package.
        environment = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "RAY_ADDRESS")}
        if subprocess.call(command, env=environment, cwd="/") != 0:
            raise SystemExit(f"the benchmarks failed with {python}")
        return json.loads(pathlib.Path(file.name).read_text())


def ratio(name: str, ours: dict[str, Any], theirs: dict[str, Any] | None) -> float | None:
    """How many times better ours is; above 1 is better, also where lower figures are."""
    if theirs is None or not ours["value"] or not theirs["value"]:
        return None
    if ours["unit"] in LOWER_IS_BETTER:
        return theirs["value"] / ours["value"]
    return ours["value"] / theirs["value"]


def print_table(rows: list[list[str]]) -> None:
    """Columns: the first to the left, the others to the right."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    for row in rows:
        cells = [row[0].ljust(widths[0])] + [cell.rjust(width) for cell, width in zip(row[1:], widths[1:])]
        print("  ".join(cells).rstrip())


def main() -> int:
    """Measures everything and prints tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer", help="an interpreter with another implementation of ray")
    parser.add_argument("--seconds", type=float, default=2.0, help="for each figure")
    parser.add_argument("--only", default="", help="only benchmarks whose name matches")
    parser.add_argument("--json", help="write every figure there")
    arguments = parser.parse_args()
    if arguments.seconds <= 0:
        parser.error("--seconds must be above 0")

    from benchmarks import floors, pools

    cpus = len(os.sched_getaffinity(0))
    print(f"{platform.machine()}, {cpus} CPUs, Python {platform.python_version()}, Linux {platform.release()}\n")
    floor_figures = {name: (measure(arguments.seconds), unit) for name, (measure, unit) in floors.FLOORS.items()}
    pool_figures = pools.measure(arguments.seconds, min(4, cpus))
    print("this runtime:")
    ours = run_core(sys.executable, arguments)
    peer = None
    if arguments.peer:
        print("the peer:")
        peer = run_core(arguments.peer, arguments)

    print("\nFloors of this machine")
    print_table([[name, shown(value, unit)] for name, (value, unit) in floor_figures.items()])
    print("\nPython's own pools")
    rows = []
    for pool, figures in pool_figures.items():
        rows += [[f"{pool}: {name}", shown(v, "s" if "seconds" in name else "1/s")] for name, v in figures.items()]
    print_table(rows)
    print("\nThis runtime" + (" and the peer (ratio above 1: this runtime is better)" if peer else ""))
    rows = [["", "ours"] + (["peer", "ratio"] if peer else [])]
    for name, figure in ours.items():
        row = [name, shown(figure["value"], figure["unit"])]
        if peer is not None:
            theirs = peer.get(name)
            factor = ratio(name, figure, theirs)
            row += [shown(theirs and theirs["value"], figure["unit"]), "-" if factor is None else f"{factor:.2f}"]
        rows.append(row)
    print_table(rows)
    if arguments.json:
        everything = {
            "machine": {"cpus": cpus, "python": platform.python_version(), "kernel": platform.release()},
            "floors": {name: {"value": value, "unit": unit} for name, (value, unit) in floor_figures.items()},
            "pools": pool_figures,
            "ours": ours,
            "peer": peer,
        }
        pathlib.Path(arguments.json).write_text(json.dumps(everything, indent=1))
    return 1 if any("error" in figure for figure in ours.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
