"""Actors in a graph, and calls of their methods."""

from __future__ import annotations

from typing import Any

from ray.dag.dag_node import (
    BIND_INDEX_KEY,
    COLLECTIVE_OPERATION_KEY,
    IS_CLASS_METHOD_OUTPUT_KEY,
    PARENT_CLASS_NODE_KEY,
    PREV_CLASS_METHOD_CALL_KEY,
    DAGNode,
)


class ClassNode(DAGNode):
    """What `ActorClass.bind(...)` makes: an actor, made anew by each execution. Its attributes are its methods.

    Methods that were bound before another on the same node are called before it.

    Example:
        >>> counter = Counter.bind(10)
        >>> counter.increment.bind(5)
        >>> ray.get(counter.get.bind().execute())
        15
    """

    def __init__(
        self,
        cls: type,
        cls_args: tuple[Any, ...],
        cls_kwargs: dict[str, Any],
        cls_options: dict[str, Any],
        other_args_to_resolve: dict[str, Any] | None = None,
        *,
        actor_class: Any = None,
    ) -> None:
        super().__init__(cls_args, cls_kwargs, cls_options, other_args_to_resolve or {})
        self._cls = cls
        if actor_class is None:
            import ray

            actor_class = ray.remote(cls)
            if cls_options:
                actor_class = actor_class.options(**cls_options)
        self._actor_class = actor_class
        self._last_call: ClassMethodNode | None = None

    def __getattr__(self, name: str) -> _UnboundClassMethodNode:
        if name.startswith("_"):
            raise AttributeError(name)
        if not callable(getattr(self._cls, name, None)):
            raise AttributeError(f"type object '{self._cls.__name__}' has no attribute '{name}'")
        return _UnboundClassMethodNode(self, name, {})

    def _copy_impl(
        self,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        options: dict[str, Any],
        other_args_to_resolve: dict[str, Any],
    ) -> DAGNode:
        return ClassNode(self._cls, args, kwargs, options, other_args_to_resolve, actor_class=self._actor_class)

    def _execute_impl(self, args: tuple[Any, ...], kwargs: dict[str, Any], others: dict[str, Any], given: Any) -> Any:
        return self._actor_class.remote(*args, **kwargs)

    def _body(self) -> str:
        return str(self._cls)


class _UnboundClassMethodNode:
    """A method of an actor of a graph, to be bound."""

    def __init__(self, actor: ClassNode, method_name: str, options: dict[str, Any]) -> None:
        self._actor = actor
        self._method_name = method_name
        self._options = options

    def bind(self, *args: Any, **kwargs: Any) -> ClassMethodNode:
        """A node that calls the method with these arguments."""
        others = {PARENT_CLASS_NODE_KEY: self._actor, PREV_CLASS_METHOD_CALL_KEY: self._actor._last_call}
        node = ClassMethodNode(self._method_name, args, kwargs, dict(self._options), others)
        self._actor._last_call = node
        return node

    def options(self, **options: Any) -> _UnboundClassMethodNode:
        """The method with options for its call."""
        from ray._private.options import validate_method_options

        validate_method_options(options)
        return _UnboundClassMethodNode(self._actor, self._method_name, {**self._options, **options})

    def __getattr__(self, name: str) -> Any:
        if name == "remote":
            raise AttributeError(
                ".remote() cannot be used on ClassMethodNodes. Use .bind() instead to express an symbolic actor call."
            )
        raise AttributeError(name)


class ClassMethodNode(DAGNode):
    """What `actor.method.bind(...)` makes: a call of a method of an actor, of the graph or alive already."""

    def __init__(
        self,
        method_name: str,
        method_args: tuple[Any, ...],
        method_kwargs: dict[str, Any],
        method_options: dict[str, Any],
        other_args_to_resolve: dict[str, Any],
    ) -> None:
        super().__init__(method_args, method_kwargs, method_options, other_args_to_resolve)
        self._method_name = method_name
        if PARENT_CLASS_NODE_KEY not in self._bound_other_args_to_resolve:
            raise ValueError(f"the call of {method_name} needs the actor as {PARENT_CLASS_NODE_KEY!r}")

    def get_method_name(self) -> str:
        """The method's name."""
        return self._method_name

    @property
    def num_returns(self) -> int:
        """How many objects the call returns."""
        return self._bound_options.get("num_returns") or 1

    @property
    def is_class_method_call(self) -> bool:
        """Whether this calls a method: always."""
        return not self.is_class_method_output

    @property
    def is_class_method_output(self) -> bool:
        """Whether this is one of several returns of a call; only compiled graphs have such nodes."""
        return bool(self._bound_other_args_to_resolve.get(IS_CLASS_METHOD_OUTPUT_KEY, False))

    @property
    def class_method_call(self) -> ClassMethodNode | None:
        """The call whose return this is; None for a call."""
        return None

    @property
    def output_idx(self) -> int | None:
        """Which return of a call this is; None for a call."""
        return None

    def _copy_impl(
        self,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        options: dict[str, Any],
        other_args_to_resolve: dict[str, Any],
    ) -> DAGNode:
        return type(self)(self._method_name, args, kwargs, options, other_args_to_resolve)

    def _execute_impl(self, args: tuple[Any, ...], kwargs: dict[str, Any], others: dict[str, Any], given: Any) -> Any:
        method = getattr(others[PARENT_CLASS_NODE_KEY], self._method_name)
        if self._bound_options:
            method = method.options(**self._bound_options)
        return method.remote(*args, **kwargs)

    def _body(self) -> str:
        return f"{self._method_name}()"


__all__ = ["BIND_INDEX_KEY", "COLLECTIVE_OPERATION_KEY", "ClassMethodNode", "ClassNode"]
