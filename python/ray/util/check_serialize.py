"""Finds out why a value cannot be pickled."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

_MAX_DEPTH = 12
_MAX_NODES = 2_000


class FailureTuple:
    """Something that cannot be pickled.

    Attributes:
        obj: the thing.
        name: how it is called where it was found.
        path: how to reach it from the value that was inspected.
        parent: what holds it.
    """

    def __init__(self, obj: Any, name: str, parent: Any, path: str = "") -> None:
        self.obj = obj
        self.name = name
        self.parent = parent
        self.path = path

    def __repr__(self) -> str:
        return f"FailTuple({self.name} [obj={self.obj}, parent={self.parent}])"


def cannot_pickle(value: Any) -> str | None:
    """Why `value` cannot be pickled, or None."""
    from ray._private.serialization import Pickler

    class Sink:
        def write(self, data: bytes) -> int:
            return len(data)

    try:
        Pickler(Sink(), protocol=5, buffer_callback=lambda buffer: None).dump(value)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return None


def _parts(value: Any) -> Iterator[tuple[str, Any]]:
    """What `value` is made of, each with how to reach it from there."""
    if isinstance(value, dict):
        for key, item in value.items():
            yield f"[{key!r}]", item
        for key in value:
            yield f" (key {key!r})", key
    elif isinstance(value, (list, tuple)):
        for index, item in enumerate(value):
            yield f"[{index}]", item
    elif isinstance(value, (set, frozenset)):
        for item in value:
            yield " (an element)", item
    elif inspect.ismethod(value):
        yield ".__self__", value.__self__
        yield ".__func__", value.__func__
    elif inspect.isfunction(value):
        closure = inspect.getclosurevars(value)
        for name, item in closure.nonlocals.items():
            yield f" (closure variable {name!r})", item
        for name, item in closure.globals.items():
            yield f" (global {name!r})", item
        for index, item in enumerate(value.__defaults__ or ()):
            yield f" (default {index})", item
    elif inspect.isclass(value):
        for name, item in vars(value).items():
            if name in ("__dict__", "__weakref__", "__doc__", "__module__", "__qualname__"):
                continue
            yield f".{name}", item.__func__ if isinstance(item, (staticmethod, classmethod)) else item
    else:
        state = getattr(value, "__dict__", None)
        if isinstance(state, dict):
            for name, item in state.items():
                yield f".{name}", item
        for cls in type(value).__mro__:
            slots = vars(cls).get("__slots__", ())
            for name in (slots,) if isinstance(slots, str) else slots:
                with suppress(AttributeError):
                    yield f".{name}", getattr(value, name)


def find_culprit(value: Any) -> tuple[str, Any, str | None]:
    """Path to the innermost part that cannot be pickled, that part, and what the pickler says of it.

    Example:
        >>> find_culprit({"a": [threading.Lock()]})[0]
        "['a'][0]"
    """
    path, culprit, reason = "", value, cannot_pickle(value)
    seen: set[int] = set()
    budget = _MAX_NODES
    for _ in range(_MAX_DEPTH):
        found = None
        try:
            for step, part in _parts(culprit):
                budget -= 1
                if budget < 0:
                    break
                if id(part) in seen:
                    continue
                inner = cannot_pickle(part)
                if inner is not None:
                    found = (step, part, inner)
                    break
        except Exception:
            break
        if found is None:
            break
        seen.add(id(culprit))
        path, culprit, reason = path + found[0], found[1], found[2]
    return path, culprit, reason


def inspect_serializability(
    base_obj: Any, name: str | None = None, depth: int = 3, print_file: Any = None
) -> tuple[bool, set[FailureTuple]]:
    """Says whether a value can be pickled, and prints what in it cannot.

    Args:
        base_obj: the value.
        name: how to call it in what is printed.
        depth: how deep to look.
        print_file: where to print; standard output by default.

    Returns:
        Whether it can be pickled, and the innermost failures found.

    Example:
        >>> inspect_serializability(threading.Lock(), name="lock")
    """
    file = print_file or sys.stdout
    title = f"Checking Serializability of {base_obj!r}"
    width = min(len(title), 120)
    print("=" * width, title, "=" * width, sep="\n", file=file)
    failures: set[FailureTuple] = set()
    fine = _inspect(base_obj, name or str(getattr(base_obj, "__name__", base_obj)), depth, None, "", failures, file, 0)
    if not fine:
        print("=" * width, file=file)
        for failure in failures:
            print(f"Cannot be pickled: {failure}", file=file)
        print("=" * width, file=file)
    return fine, failures


def _inspect(
    value: Any, name: str, depth: int, parent: Any, path: str, failures: set[FailureTuple], file: Any, indent: int
) -> bool:
    reason = cannot_pickle(value)
    if reason is None:
        return True
    print(f"{' ' * indent}!!! FAIL serialization: {reason}", file=file)
    blamed = False
    if depth > 0:
        for step, part in _parts(value):
            if cannot_pickle(part) is not None:
                print(f"{' ' * (indent + 4)}Serializing{step} {part!r}...", file=file)
                _inspect(part, step.strip(" .()"), depth - 1, value, path + step, failures, file, indent + 4)
                blamed = True
    if not blamed:
        failures.add(FailureTuple(value, name, parent, path))
    return False


__all__ = ["FailureTuple", "find_culprit", "inspect_serializability"]
