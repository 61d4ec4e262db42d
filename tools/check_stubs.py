"""Compares `python/ray/_raylet.pyi` with the module that was built.

Every name in the stub must be in the module, and each function's and method's parameters must have the stub's names in
the stub's order. Classes whose docstring says that the Python side makes them (`Hooks`, `Executor`) are contracts for
Python objects: the module need not have them. Prints each difference and exits with 1 if there is one.

    python tools/check_stubs.py
"""

from __future__ import annotations

import ast
import importlib
import inspect
import pathlib
import sys
from types import ModuleType

STUB = pathlib.Path(__file__).resolve().parent.parent / "python" / "ray" / "_raylet.pyi"
# Protocols that Python objects fulfil, and type variables: they exist for the reader of the stub only.
STUB_ONLY = {"Hooks", "Executor", "T"}
# Generic subscription is declared by the base class in the stub.
IGNORED_MEMBERS = {"__init__", "__new__"}


def stub_parameters(function: ast.FunctionDef | ast.AsyncFunctionDef) -> list[tuple[str, bool]]:
    """(name, has a default) of each parameter but self and cls."""
    arguments = function.args
    positional = arguments.posonlyargs + arguments.args
    defaults = [False] * (len(positional) - len(arguments.defaults)) + [True] * len(arguments.defaults)
    result = [(a.arg, d) for a, d in zip(positional, defaults, strict=True)]
    result += [(a.arg, d is not None) for a, d in zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True)]
    return [(name, default) for name, default in result if name not in ("self", "cls")]


def built_parameters(function: object) -> list[tuple[str, bool]] | None:
    """As `stub_parameters`, for a built function; None where it tells nothing about itself."""
    try:
        parameters = inspect.signature(function).parameters.values()  # type: ignore[arg-type]
    except (TypeError, ValueError):
        return None
    return [(p.name, p.default is not p.empty) for p in parameters if p.name not in ("self", "cls")]


def compare_function(where: str, stub: ast.FunctionDef | ast.AsyncFunctionDef, built: object) -> list[str]:
    """What differs between one function of the stub and the built one."""
    if not callable(built):
        return [f"{where} is not callable in the module"]
    if stub.name.startswith("__") and stub.name.endswith("__"):
        return []  # slots have signatures of their own
    wanted, found = stub_parameters(stub), built_parameters(built)
    if found is None:
        return [f"{where} has no text signature in the module"]
    if wanted != found:

        def show(parameters: list[tuple[str, bool]]) -> str:
            return ", ".join(name + ("=" if default else "") for name, default in parameters)

        return [f"{where}: the stub has ({show(wanted)}), the module has ({show(found)})"]
    return []


def compare_class(stub: ast.ClassDef, built: object) -> list[str]:
    """What differs between one class of the stub and the built one."""
    if not inspect.isclass(built):
        return [f"{stub.name} is not a class in the module"]
    problems = []
    for node in stub.body:
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            if node.name in IGNORED_MEMBERS:
                continue
            if not hasattr(built, node.name):
                problems.append(f"{stub.name}.{node.name} is missing in the module")
                continue
            problems += compare_function(f"{stub.name}.{node.name}", node, getattr(built, node.name))
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            if not hasattr(built, node.target.id):
                problems.append(f"{stub.name}.{node.target.id} is missing in the module")
    return problems


def compare(tree: ast.Module, module: ModuleType) -> list[str]:
    """Every difference between the stub and the module."""
    problems = []
    for node in tree.body:
        if isinstance(node, ast.ClassDef):
            if node.name in STUB_ONLY:
                continue
            if not hasattr(module, node.name):
                problems.append(f"{node.name} is missing in the module")
                continue
            problems += compare_class(node, getattr(module, node.name))
        elif isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            if not hasattr(module, node.name):
                problems.append(f"{node.name} is missing in the module")
                continue
            problems += compare_function(node.name, node, getattr(module, node.name))
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            if not hasattr(module, node.target.id):
                problems.append(f"{node.target.id} is missing in the module")
    return problems


def main() -> int:
    """Compares and reports."""
    try:
        module = importlib.import_module("ray._raylet")
    except ImportError as error:
        print(f"ray._raylet does not import: {error}", file=sys.stderr)
        return 1
    problems = compare(ast.parse(STUB.read_text()), module)
    for problem in problems:
        print(problem, file=sys.stderr)
    print(f"stub check: {len(problems)} differences")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
