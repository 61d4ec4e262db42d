"""Checks calls against signatures where they are made, so that a wrong call fails in the caller's own line.

A signature is kept as parameter names and kinds alone: defaults and annotations need not be picklable.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from typing import Any

Parameters = tuple[tuple[str, int, bool], ...]

_NEVER = -1
_UNLIMITED = sys.maxsize


class CallSignature:
    """What a function accepts.

    A call of positional arguments alone is right where `minimum <= len(args) <= maximum`; callers test that inline
    and come to `check` for all else.
    """

    __slots__ = ("_known", "_signature", "maximum", "minimum", "name", "parameters")

    def __init__(self, name: str, parameters: Parameters) -> None:
        self.name = name
        self.parameters = parameters
        self._signature: inspect.Signature | None = None
        self._known: set[tuple[Any, ...]] = set()
        minimum = maximum = 0
        for _, kind, has_default in parameters:
            if kind == inspect.Parameter.VAR_POSITIONAL:
                maximum = _UNLIMITED
            elif kind == inspect.Parameter.KEYWORD_ONLY:
                if not has_default:
                    minimum, maximum = _UNLIMITED, _NEVER
            elif kind != inspect.Parameter.VAR_KEYWORD:
                if maximum != _NEVER:
                    maximum = min(maximum + 1, _UNLIMITED)
                    minimum += 0 if has_default else 1
        self.minimum = minimum
        self.maximum = maximum

    @classmethod
    def of(cls, function: Callable[..., Any], name: str, *, skip_first: bool = False) -> CallSignature:
        """The signature of `function`, without its first parameter for a method; anything goes where it has none."""
        try:
            signature = inspect.signature(function)
        except (TypeError, ValueError):
            return cls.anything(name)
        parameters = list(signature.parameters.values())
        if (
            skip_first
            and parameters
            and parameters[0].kind
            in (
                inspect.Parameter.POSITIONAL_ONLY,
                inspect.Parameter.POSITIONAL_OR_KEYWORD,
            )
        ):
            parameters = parameters[1:]
        return cls(name, tuple((p.name, int(p.kind), p.default is not p.empty) for p in parameters))

    @classmethod
    def anything(cls, name: str) -> CallSignature:
        """The signature that accepts every call."""
        return cls(name, (("args", 2, False), ("kwargs", 4, False)))

    def check(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Raises TypeError saying what is wrong with a call."""
        shape = (len(args), *kwargs)
        if shape in self._known:
            return
        if self._signature is None:
            self._signature = inspect.Signature(
                [
                    inspect.Parameter(name, inspect._ParameterKind(kind), **({"default": ...} if default else {}))
                    for name, kind, default in self.parameters
                ],
                __validate_parameters__=False,
            )
        try:
            self._signature.bind(*args, **kwargs)
        except TypeError as error:
            raise TypeError(f"{error} (in a call of {self.name}{self._signature_text()})") from None
        if len(self._known) < 1000:
            self._known.add(shape)

    def _signature_text(self) -> str:
        return str(self._signature).replace("=Ellipsis", "=...")

    def __reduce__(self) -> tuple[Any, ...]:
        return CallSignature, (self.name, self.parameters)
