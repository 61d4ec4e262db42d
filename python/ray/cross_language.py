"""Functions and actors of other languages, which are not built."""

from __future__ import annotations

from typing import Any


def java_function(class_name: str, function_name: str) -> Any:
    """Would name a function in Java."""
    raise NotImplementedError(f"java_function({class_name!r}, {function_name!r}): workers in Java are not built")


def java_actor_class(class_name: str) -> Any:
    """Would name an actor class in Java."""
    raise NotImplementedError(f"java_actor_class({class_name!r}): workers in Java are not built")


def cpp_function(function_name: str) -> Any:
    """Would name a function in C++."""
    raise NotImplementedError(f"cpp_function({function_name!r}): workers in C++ are not built")


__all__ = ["cpp_function", "java_actor_class", "java_function"]
