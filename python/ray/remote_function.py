"""Functions that run elsewhere: what ``@ray.remote`` makes of a function."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from ray._private import function_manager, ray_constants
from ray._private.context import SubmissionContext, current, ensure_context
from ray._private.object_ref_generator import ObjectRefGenerator, wrapper_of
from ray._private.options import validate_task_options
from ray._private.ray_constants import NUM_RETURNS_DYNAMIC, NUM_RETURNS_STREAMING
from ray._private.serialization import SerializationError, explain_arguments
from ray._private.signature import CallSignature
from ray._private.utils import function_display_name
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy


class RemoteFunction:
    """A function whose calls with `remote()` run in workers.

    Args:
        language: always Python.
        function: the function.
        function_descriptor: unused; named for compatibility.
        task_options: validated options.

    Example:
        >>> @ray.remote
        ... def square(x):
        ...     return x * x
        >>> ray.get(square.remote(3))
        9
    """

    def __init__(
        self, language: Any, function: Callable[..., Any], function_descriptor: Any, task_options: dict[str, Any]
    ) -> None:
        del function_descriptor
        if inspect.iscoroutinefunction(function):
            raise ValueError(
                f"'async def' should not be used for remote tasks ({function!r}). You can wrap the async function "
                "with `asyncio.run(f())`, or make it a method of an actor."
            )
        self._language = language
        self._function = function
        self._options = task_options
        self._name = function_display_name(function)
        self._is_generator = inspect.isgeneratorfunction(function) or inspect.isasyncgenfunction(function)
        self._capture = function_manager.Capture()
        self._forget()
        for attribute in ("__name__", "__qualname__", "__module__", "__doc__", "__annotations__"):
            value = getattr(function, attribute, None)
            if value is not None:
                setattr(self, attribute, value)
        self.__wrapped__ = function

    def _forget(self) -> None:
        # What `_bind` makes of the options in one connection.
        self._context: SubmissionContext | None = None
        self._template: Any = None
        self._submit: Any = None
        self._minimum, self._maximum = 0, -1
        self._wrap: Callable[[Any], Any] | None = None
        self._signature: CallSignature | None = None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        raise TypeError(
            f"Remote functions cannot be called directly. Instead of running '{self._name}()', try "
            f"'{self._name}.remote()'."
        )

    def remote(self, *args: Any, **kwargs: Any) -> Any:
        """Submits a call.

        Returns:
            An ObjectRef; a list of them for several returns; None for none; an ObjectRefGenerator for generators.

        Raises:
            TypeError: the call does not fit the function's signature, or an argument cannot be pickled.
        """
        if self._context is not current.context or self._context is None:
            self._bind()
        if kwargs:
            self._signature.check(args, kwargs)  # type: ignore[union-attr]
        elif not self._minimum <= len(args) <= self._maximum:
            self._signature.check(args, kwargs)  # type: ignore[union-attr]
        try:
            if self._wrap is None:
                return self._submit(self._template, args, kwargs or None)
            return self._wrap(self._submit(self._template, args, kwargs or None))
        except SerializationError as error:
            raise explain_arguments(error, args, kwargs, self._name) from None

    def options(self, **task_options: Any) -> RemoteFunction:
        """This function with other options; those not given stay.

        Raises:
            ValueError, TypeError: an option is unknown, of the wrong type or out of range.

        Example:
            >>> square.options(num_cpus=2).remote(3)
        """
        validate_task_options(task_options)
        merged = {**self._options, **task_options}
        other = RemoteFunction.__new__(RemoteFunction)
        other.__dict__.update(self.__dict__)
        if "scheduling_strategy" in task_options and "placement_group" not in task_options:
            # A strategy given now replaces a placement group given at definition.
            for name in ("placement_group", "placement_group_bundle_index", "placement_group_capture_child_tasks"):
                merged.pop(name, None)
        other._options = merged
        other._forget()
        return other

    def bind(self, *args: Any, **kwargs: Any) -> Any:
        """A node of a graph (`ray.dag`) that makes this call when the graph is executed.

        Example:
            >>> dag = square.bind(square.bind(3))
            >>> ray.get(dag.execute())
            81
        """
        from ray.dag import FunctionNode

        return FunctionNode(self._function, args, kwargs, dict(self._options), remote_function=self)

    @property
    def _function_name(self) -> str:
        return self._name

    @property
    def _default_options(self) -> dict[str, Any]:
        return dict(self._options)

    def _remote(self, args: Any = None, kwargs: Any = None, **task_options: Any) -> Any:
        """Submits a call with these options, for libraries that pass arguments as containers."""
        target = self.options(**task_options) if task_options else self
        return target.remote(*(args or ()), **(kwargs or {}))

    def _resolved_num_returns(self) -> int:
        wanted = self._options.get("num_returns")
        if wanted is None:
            return NUM_RETURNS_STREAMING if self._is_generator else 1
        if wanted == "streaming":
            return NUM_RETURNS_STREAMING
        return NUM_RETURNS_DYNAMIC if wanted == "dynamic" else wanted

    def _bind(self) -> None:
        """Makes the template for this process's connection, connecting first where need be."""
        from ray._private import scheduling, serialization
        from ray.runtime_env.runtime_env import resolve_runtime_env

        context = ensure_context()
        options = self._options
        signature = CallSignature.of(self._function, self._name)
        num_returns = self._resolved_num_returns()
        resources = scheduling.task_resources(options)
        strategy = scheduling.resolve_strategy(options, resources, context.captured_group, self._name)
        max_calls = options.get("max_calls")
        if max_calls is None:
            # A worker that used a device is not used again: what it left there would be in the next one's way.
            max_calls = 1 if resources.get("GPU") else 0
        retries = options.get("max_retries")
        retry = options.get("retry_exceptions", False)
        exported = self._capture.export(context.core, self._function, self._name, "remote function")
        backpressure = options.get("_generator_backpressure_num_objects")
        self._template = context.core.make_template(
            {
                "function_id": exported.function_id,
                "function_blob": exported.blob,
                "function_name": self._name,
                "name": options.get("name") or "",
                "num_returns": num_returns,
                "resources": resources,
                "strategy": strategy,
                "max_retries": ray_constants.DEFAULT_TASK_MAX_RETRIES if retries is None else retries,
                "retry_exceptions": bool(retry),
                "retry_exception_types": serialization.dumps(tuple(retry))
                if isinstance(retry, (list, tuple)) and retry
                else b"",
                "runtime_env_json": resolve_runtime_env(context.runtime_env, options.get("runtime_env")),
                "max_calls": max_calls,
                "generator_backpressure": 0 if backpressure in (None, -1) else backpressure,
                "enable_task_events": options.get("enable_task_events", True),
            }
        )
        self._signature = signature
        self._minimum, self._maximum = signature.minimum, signature.maximum
        self._submit = context.core.submit_task
        self._wrap = wrapper_of(num_returns)
        self._context = context

    def __getstate__(self) -> dict[str, Any]:
        return {"language": self._language, "function": self._function, "options": self._options}

    def __setstate__(self, state: dict[str, Any]) -> None:
        # `__reduce__` is not used: a function that names itself needs the object before its state.
        self.__dict__["_pending_state"] = state

    def __getattr__(self, name: str) -> Any:
        state = self.__dict__.pop("_pending_state", None)
        if state is None:
            raise AttributeError(f"'RemoteFunction' object has no attribute {name!r}")
        self.__init__(state["language"], state["function"], None, state["options"])  # type: ignore[misc]
        return getattr(self, name)

    def __repr__(self) -> str:
        return f"RemoteFunction({self._name})"


__all__ = ["ObjectRefGenerator", "PlacementGroupSchedulingStrategy", "RemoteFunction"]
