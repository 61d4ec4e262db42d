"""What a graph is given when it is executed."""

from __future__ import annotations

from typing import Any

from ray.dag.dag_node import DAGNode


class DAGInputData:
    """Several arguments of an execution: `data[0]` and `data.name` are the positional and keyword ones."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._args = list(args)
        self._kwargs = kwargs

    def __getitem__(self, key: int | str) -> Any:
        if isinstance(key, int):
            return self._args[key]
        if isinstance(key, str):
            return self._kwargs[key]
        raise ValueError(
            f"Please only use int index or str as first-level key to access fields of the input, got {key!r}"
        )

    def __getattr__(self, name: str) -> Any:
        try:
            return self.__dict__["_kwargs"][name]
        except KeyError:
            raise AttributeError(f"the graph was executed without an argument {name!r}") from None


class InputNode(DAGNode):
    """Stands for what `execute` is given; its items and attributes for parts of that.

    Example:
        >>> with InputNode() as data:
        ...     dag = add.bind(data[0], data.offset)
        >>> ray.get(dag.execute(1, offset=2))
        3
    """

    def __init__(
        self, *args: Any, input_type: Any = None, _other_args_to_resolve: dict[str, Any] | None = None, **kwargs: Any
    ) -> None:
        if args or kwargs:
            raise ValueError("InputNode should not take any args or kwargs.")
        super().__init__((), {}, {}, _other_args_to_resolve or {})
        self._input_type = input_type
        self._entered = False

    def __enter__(self) -> InputNode:
        self._entered = True
        return self

    def __exit__(self, *exception: object) -> None:
        return None

    def set_context(self, key: str, val: Any) -> None:
        """Notes something for who builds the graph."""
        if not hasattr(self, "_notes"):
            self._notes: dict[str, Any] = {}
        self._notes[key] = val

    def get_result_type(self) -> Any:
        """The type of the input, where it was given."""
        return self._input_type

    def __getattr__(self, name: str) -> InputAttributeNode:
        if name.startswith("_"):
            raise AttributeError(name)
        return InputAttributeNode(self, name, "__getattr__")

    def __getitem__(self, key: int | str) -> InputAttributeNode:
        if not isinstance(key, (int, str)):
            raise ValueError(
                f"Please only use int index or str as first-level key to access fields of the input, got {key!r}"
            )
        return InputAttributeNode(self, key, "__getitem__")

    def _check_context(self) -> None:
        if not self._entered:
            raise AssertionError(
                "InputNode is a singleton instance that should be only used in context manager for dag building and "
                "execution. See the docstring of class InputNode for examples."
            )

    def _copy_impl(
        self,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        options: dict[str, Any],
        other_args_to_resolve: dict[str, Any],
    ) -> DAGNode:
        node = InputNode(input_type=self._input_type, _other_args_to_resolve=other_args_to_resolve)
        node._entered = self._entered
        return node

    def _execute_impl(self, args: tuple[Any, ...], kwargs: dict[str, Any], others: dict[str, Any], given: Any) -> Any:
        return given

    def _body(self) -> str:
        return "InputNode"


class InputAttributeNode(DAGNode):
    """A part of the input: an item or an attribute of it, or one of several arguments."""

    def __init__(self, dag_input_node: InputNode, key: int | str, accessor_method: str, input_type: Any = None) -> None:
        super().__init__((), {}, {}, {"dag_input_node": dag_input_node, "key": key, "accessor_method": accessor_method})
        self._key = key
        self._accessor_method = accessor_method
        self._input_type = input_type

    @property
    def key(self) -> int | str:
        """The item's key, or the attribute's name."""
        return self._key

    def get_result_type(self) -> Any:
        """The part's type, where it was given."""
        return self._input_type

    def _copy_impl(
        self,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        options: dict[str, Any],
        other_args_to_resolve: dict[str, Any],
    ) -> DAGNode:
        return InputAttributeNode(
            other_args_to_resolve["dag_input_node"], self._key, self._accessor_method, self._input_type
        )

    def _execute_impl(self, args: tuple[Any, ...], kwargs: dict[str, Any], others: dict[str, Any], given: Any) -> Any:
        value = others["dag_input_node"]
        if self._accessor_method == "__getitem__":
            return value[self._key]
        return getattr(value, str(self._key))

    def _body(self) -> str:
        return f"{self._accessor_method}({self._key!r})"
