"""A call of a remote function in a graph."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ray.dag.dag_node import DAGNode


class FunctionNode(DAGNode):
    """What `function.bind(...)` makes: a task that is submitted when the graph is executed."""

    def __init__(
        self,
        func_body: Callable[..., Any],
        func_args: tuple[Any, ...],
        func_kwargs: dict[str, Any],
        func_options: dict[str, Any],
        other_args_to_resolve: dict[str, Any] | None = None,
        *,
        remote_function: Any = None,
    ) -> None:
        super().__init__(func_args, func_kwargs, func_options, other_args_to_resolve or {})
        self._function = func_body
        if remote_function is None:
            import ray

            remote_function = ray.remote(func_body)
            if func_options:
                remote_function = remote_function.options(**func_options)
        # Kept, so that the function is captured and exported once.
        self._remote_function = remote_function

    def _copy_impl(
        self,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        options: dict[str, Any],
        other_args_to_resolve: dict[str, Any],
    ) -> DAGNode:
        return FunctionNode(
            self._function, args, kwargs, options, other_args_to_resolve, remote_function=self._remote_function
        )

    def _execute_impl(self, args: tuple[Any, ...], kwargs: dict[str, Any], others: dict[str, Any], given: Any) -> Any:
        return self._remote_function.remote(*args, **kwargs)

    def _body(self) -> str:
        return str(self._function)
