"""What every node of a graph of calls is: bound arguments, options, and how a graph is walked and executed.

Invariants:

1. What a node is bound to never changes; what an execution makes belongs to that execution, not to the node.
2. In one execution every node is executed once, after the nodes that it depends on.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

T = TypeVar("T")

# Names of what nodes keep beside their arguments.
PARENT_CLASS_NODE_KEY = "parent_class_node"
PREV_CLASS_METHOD_CALL_KEY = "prev_class_method_call"
BIND_INDEX_KEY = "bind_index"
IS_CLASS_METHOD_OUTPUT_KEY = "is_class_method_output"
COLLECTIVE_OPERATION_KEY = "collective_op"
DAGNODE_TYPE_KEY = "__dag_node_type__"


class DAGNode:
    """A call, or an actor, that is to be made when the graph is executed.

    Args:
        args, kwargs: what the call is bound to; nodes among them, also inside lists, tuples, sets and dicts, stand for
            their results.
        options: options of the call.
        other_args_to_resolve: nodes beside the arguments that have to be executed before this one.

    Example:
        >>> with InputNode() as x:
        ...     dag = double.bind(increment.bind(x))
        >>> ray.get(dag.execute(3))
        8
    """

    def __init__(
        self,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        options: dict[str, Any],
        other_args_to_resolve: dict[str, Any],
    ) -> None:
        self._bound_args: tuple[Any, ...] = tuple(args or ())
        self._bound_kwargs: dict[str, Any] = dict(kwargs or {})
        self._bound_options: dict[str, Any] = dict(options or {})
        self._bound_other_args_to_resolve: dict[str, Any] = dict(other_args_to_resolve or {})
        self._stable_uuid = uuid.uuid4().hex
        self._last_execution: dict[str, Any] = {}

    # --- facts ---

    def get_args(self) -> tuple[Any, ...]:
        """The bound positional arguments."""
        return self._bound_args

    def get_kwargs(self) -> dict[str, Any]:
        """The bound keyword arguments."""
        return dict(self._bound_kwargs)

    def get_options(self) -> dict[str, Any]:
        """The options of the call."""
        return dict(self._bound_options)

    def get_other_args_to_resolve(self) -> dict[str, Any]:
        """What has to be executed before this node, beside its arguments."""
        return dict(self._bound_other_args_to_resolve)

    def get_stable_uuid(self) -> str:
        """This node's id, which stays the same when the node is copied."""
        return self._stable_uuid

    @property
    def type_hint(self) -> Any:
        """The type of channel of a compiled graph."""
        raise NotImplementedError("DAGNode.type_hint: compiled graphs are not built yet")

    def with_tensor_transport(self, transport: Any = "auto", **options: Any) -> DAGNode:
        """Would choose how a compiled graph moves tensors."""
        raise NotImplementedError("DAGNode.with_tensor_transport(): compiled graphs are not built yet")

    def experimental_compile(self, *args: Any, **options: Any) -> Any:
        """Would compile the graph into channels between actors."""
        raise NotImplementedError(
            "DAGNode.experimental_compile(): compiled graphs are not built yet; dag.execute() runs the graph as it is"
        )

    # --- walking ---

    def _children(self) -> list[DAGNode]:
        """The nodes that this one depends on, each once."""
        found: dict[int, DAGNode] = {}
        for value in (self._bound_other_args_to_resolve, self._bound_args, self._bound_kwargs):
            _find_nodes(value, found)
        return list(found.values())

    def _in_order(self) -> Iterator[DAGNode]:
        """This node and all that it depends on, dependencies first; each once. Not recursive: graphs may be deep."""
        done: set[int] = set()
        stack: list[tuple[DAGNode, bool]] = [(self, False)]
        while stack:
            node, ready = stack.pop()
            if id(node) in done:
                continue
            if ready:
                done.add(id(node))
                yield node
            else:
                stack.append((node, True))
                stack += [(child, False) for child in reversed(node._children()) if id(child) not in done]

    def traverse_and_apply(self, fn: Callable[[DAGNode], Any]) -> None:
        """Calls `fn` with this node and all that it depends on, dependencies first."""
        for node in self._in_order():
            fn(node)

    def apply_recursive(self, fn: Callable[[DAGNode], T]) -> T:
        """Calls `fn` with every node, dependencies first; what it returns takes that node's place in those that depend
        on it. Returns what it returned for this node."""
        results: dict[int, Any] = {}
        for node in self._in_order():
            results[id(node)] = fn(node._with_replaced(results))
        return results[id(self)]

    def apply_functional(
        self, source_input_list: Any, predicate_fn: Callable[[Any], bool], apply_fn: Callable[[Any], Any]
    ) -> Any:
        """`source_input_list` with `apply_fn(value)` in place of every value in it that satisfies `predicate_fn`."""
        if predicate_fn(source_input_list):
            return apply_fn(source_input_list)
        if type(source_input_list) in (list, tuple, set, frozenset):
            return type(source_input_list)(
                self.apply_functional(item, predicate_fn, apply_fn) for item in source_input_list
            )
        if type(source_input_list) is dict:
            return {key: self.apply_functional(item, predicate_fn, apply_fn) for key, item in source_input_list.items()}
        return source_input_list

    def _with_replaced(self, results: dict[int, Any]) -> DAGNode:
        """This node, or where something that it depends on was replaced, a copy that depends on that."""
        if all(results.get(id(child), child) is child for child in self._children()):
            return self
        return self._copy(
            _replaced(self._bound_args, results),
            _replaced(self._bound_kwargs, results),
            self._bound_options,
            _replaced(self._bound_other_args_to_resolve, results),
        )

    def _copy(
        self,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        options: dict[str, Any],
        other_args_to_resolve: dict[str, Any],
    ) -> DAGNode:
        node = self._copy_impl(args, kwargs, options, other_args_to_resolve)
        node._stable_uuid = self._stable_uuid
        return node

    def _copy_impl(
        self,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        options: dict[str, Any],
        other_args_to_resolve: dict[str, Any],
    ) -> DAGNode:
        raise NotImplementedError(f"{type(self).__name__} does not say how it is copied")

    # --- executing ---

    def execute(self, *args: Any, _ray_cache_refs: bool = False, **kwargs: Any) -> Any:
        """Makes the calls of the graph and returns what this node gives: an ObjectRef, a handle, or a list of them.

        Args:
            args, kwargs: what the graph's InputNode stands for.
            _ray_cache_refs: keeps the references of all nodes for `get_object_refs_from_last_execute`.

        Raises:
            AssertionError: the graph has several InputNodes, or one that was made outside a `with` statement.
        """
        from ray.dag.input_node import DAGInputData, InputNode

        nodes = list(self._in_order())
        inputs = [node for node in nodes if isinstance(node, InputNode)]
        if len(inputs) > 1:
            raise AssertionError("Each DAG should only have one unique InputNode.")
        for input_node in inputs:
            input_node._check_context()
        given: Any = args[0] if len(args) == 1 and not kwargs else DAGInputData(*args, **kwargs)
        results: dict[int, Any] = {}
        for node in nodes:
            results[id(node)] = node._execute_impl(
                _replaced(node._bound_args, results),
                _replaced(node._bound_kwargs, results),
                _replaced(node._bound_other_args_to_resolve, results),
                given,
            )
        if _ray_cache_refs:
            self._last_execution = {node._stable_uuid: results[id(node)] for node in nodes}
        return results[id(self)]

    def _execute_impl(self, args: tuple[Any, ...], kwargs: dict[str, Any], others: dict[str, Any], given: Any) -> Any:
        raise NotImplementedError(f"{type(self).__name__} does not say how it is executed")

    async def get_object_refs_from_last_execute(self) -> dict[str, Any]:
        """What each node gave in the last execution with `_ray_cache_refs`, by the node's id."""
        return dict(self._last_execution)

    def clear_cache(self) -> None:
        """Forgets what the last execution gave."""
        self._last_execution = {}

    # --- text ---

    def _body(self) -> str:
        return ""

    def __str__(self) -> str:
        return (
            f"({type(self).__name__}, {self._stable_uuid})(\n"
            f"    body={self._body()}\n"
            f"    args={_indented(list(self._bound_args))}\n"
            f"    kwargs={_indented(self._bound_kwargs)}\n"
            f"    options={_indented(self._bound_options)}\n"
            f"    other_args_to_resolve={_indented(self._bound_other_args_to_resolve)}\n"
            ")"
        )

    __repr__ = __str__


def _find_nodes(value: Any, found: dict[int, DAGNode]) -> None:
    if isinstance(value, DAGNode):
        found[id(value)] = value
    elif type(value) in (list, tuple, set, frozenset):
        for item in value:
            _find_nodes(item, found)
    elif type(value) is dict:
        for item in value.values():
            _find_nodes(item, found)


def _replaced(value: Any, results: dict[int, Any]) -> Any:
    """`value` with what stands in `results` in place of its nodes, also inside containers; others are kept as is."""
    if isinstance(value, DAGNode):
        return results.get(id(value), value)
    if type(value) in (list, tuple, set, frozenset):
        return type(value)(_replaced(item, results) for item in value)
    if type(value) is dict:
        return {key: _replaced(item, results) for key, item in value.items()}
    return value


def _indented(value: Any) -> str:
    if not value:
        return str(value)
    items = [f"{key}: {item}" for key, item in value.items()] if isinstance(value, dict) else [str(x) for x in value]
    lines = "\n".join(f"{item}," for item in items).splitlines()
    start, end = "{}" if isinstance(value, dict) else "[]"
    return "\n".join([start, *(f"        {line}" for line in lines), f"    {end}"])
