"""What is named by Ray's interface and not built here: using it says so."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


class NotBuiltError(NotImplementedError, ImportError):
    """A module is not built. It is an ImportError too, so that programs that can do without go on."""


def unbuilt_function(name: str, reason: str, *parameters: str) -> Callable[..., Any]:
    """A function that raises NotImplementedError with its name and the reason."""

    def function(*args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError(f"{name}(): {reason}")

    function.__name__ = function.__qualname__ = name.rpartition(".")[2]
    function.__module__ = name.rpartition(".")[0]
    function.__doc__ = f"Not built: {reason}."
    return function


def unbuilt_class(name: str, reason: str) -> type:
    """A class whose making raises NotImplementedError with its name and the reason."""

    def refuse(self: Any, *args: Any, **kwargs: Any) -> None:
        raise NotImplementedError(f"{name}: {reason}")

    module, _, short = name.rpartition(".")
    return type(short, (), {"__init__": refuse, "__module__": module, "__doc__": f"Not built: {reason}."})
