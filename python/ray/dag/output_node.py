"""Several results of one graph."""

from __future__ import annotations

from typing import Any

from ray.dag.dag_node import DAGNode


class MultiOutputNode(DAGNode):
    """The results of several nodes; executing it gives the list of their references.

    Example:
        >>> both = MultiOutputNode([f.bind(1), g.bind(2)])
        >>> ray.get(both.execute())
    """

    def __init__(
        self,
        args: DAGNode | list[DAGNode] | tuple[DAGNode, ...],
        other_args_to_resolve: dict[str, Any] | None = None,
    ) -> None:
        if isinstance(args, tuple):
            args = list(args)
        if not isinstance(args, list):
            raise ValueError(f"Invalid input type for `args`, {type(args)}.")
        super().__init__((args,), {}, {}, other_args_to_resolve or {})

    def _copy_impl(
        self,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        options: dict[str, Any],
        other_args_to_resolve: dict[str, Any],
    ) -> DAGNode:
        return MultiOutputNode(args[0], other_args_to_resolve)

    def _execute_impl(self, args: tuple[Any, ...], kwargs: dict[str, Any], others: dict[str, Any], given: Any) -> Any:
        return args[0]

    def _body(self) -> str:
        return "MultiOutputNode"
