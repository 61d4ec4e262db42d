"""What a process knows of an actor class: its methods, their signatures and options.

Made once from the class, pickled into handles, shared by all handles of a class in a process.
"""

from __future__ import annotations

import hashlib
import inspect
import weakref
from collections.abc import Callable
from typing import Any

from ray._private import serialization
from ray._private.context import SubmissionContext
from ray._private.ray_constants import NUM_RETURNS_DYNAMIC, NUM_RETURNS_STREAMING
from ray._private.signature import CallSignature
from ray._private.utils import function_display_name

METHOD_OPTIONS_ATTRIBUTE = "__ray_method_options__"
# Methods that every actor has; the executor knows them.
RUNTIME_METHODS = ("__ray_ready__", "__ray_call__", "__ray_terminate__")


class MethodInfo:
    """One method: its signature, and the options that `@ray.method` gave it."""

    __slots__ = ("is_generator", "name", "options", "signature")

    def __init__(self, name: str, signature: CallSignature, is_generator: bool, options: dict[str, Any]) -> None:
        self.name = name
        self.signature = signature
        self.is_generator = is_generator
        self.options = options

    def __reduce__(self) -> tuple[Any, ...]:
        return MethodInfo, (self.name, self.signature, self.is_generator, self.options)

    def num_returns(self, options: dict[str, Any]) -> int:
        """How many returns a call with these options has; -1 dynamic, -2 streaming."""
        wanted = options.get("num_returns")
        if wanted is None:
            return NUM_RETURNS_STREAMING if self.is_generator else 1
        if wanted == "streaming":
            return NUM_RETURNS_STREAMING
        return NUM_RETURNS_DYNAMIC if wanted == "dynamic" else wanted


class ActorMetadata:
    """An actor class as its callers know it."""

    def __init__(self, state: dict[str, Any]) -> None:
        self.class_name: str = state["class_name"]
        self.full_name: str = state["full_name"]
        self.class_id: bytes = state["class_id"]
        self.methods: dict[str, MethodInfo] = state["methods"]
        self.max_task_retries: int = state["max_task_retries"]
        self.out_of_order: bool = state["out_of_order"]
        self.max_pending_calls: int = state["max_pending_calls"]
        self.concurrency_groups: tuple[str, ...] = state["concurrency_groups"]
        self.backpressure: int = state["backpressure"]
        self.enable_task_events: bool = state["enable_task_events"]
        # Templates of methods without options of the call, for one connection.
        self.templates: dict[str, tuple[SubmissionContext, Any]] = {}
        self.pickled: bytes = b""

    @staticmethod
    def build(
        cls: type, class_id: bytes, methods: dict[str, MethodInfo], options: dict[str, Any], groups: dict[str, int]
    ) -> ActorMetadata:
        """The metadata of `cls` under these options, shared with equal ones."""
        state = {
            "class_name": cls.__qualname__,
            "full_name": function_display_name(cls),
            "class_id": class_id,
            "methods": methods,
            "max_task_retries": options.get("max_task_retries") or 0,
            "out_of_order": bool(options.get("allow_out_of_order_execution")),
            "max_pending_calls": options.get("max_pending_calls") or -1,  # 0 is no limit, too.
            "concurrency_groups": tuple(groups),
            "backpressure": max(_default(options.get("_actor_generator_backpressure_num_objects"), 0), 0),
            "enable_task_events": options.get("enable_task_events", True),
        }
        return ActorMetadata.from_pickle(serialization.dumps(state))

    @staticmethod
    def from_pickle(pickled: bytes) -> ActorMetadata:
        """The metadata of its pickle; the same object for equal pickles while it lives."""
        key = hashlib.blake2b(pickled, digest_size=16).digest()
        known = _known.get(key)
        if known is None:
            known = ActorMetadata(serialization.loads(pickled))
            known.pickled = pickled
            _known[key] = known
        return known

    def template(self, context: SubmissionContext, info: MethodInfo, options: dict[str, Any]) -> Any:
        """The template of a method's calls; cached where the call has no options of its own."""
        cached = self.templates.get(info.name) if options is info.options else None
        if cached is not None and cached[0] is context:
            return cached[1]
        retries = options.get("max_task_retries")
        retry = options.get("retry_exceptions") or False
        backpressure = options.get("_generator_backpressure_num_objects")
        if backpressure is None:
            backpressure = self.backpressure
        events = options.get("enable_task_events")
        group = options.get("concurrency_group") or ""
        if group and group not in self.concurrency_groups and group != "_ray_system":
            raise ValueError(
                f"The actor class {self.full_name} has no concurrency group {group!r}; it has "
                f"{list(self.concurrency_groups)}. Groups are declared with @ray.remote(concurrency_groups={{...}})."
            )
        template = context.core.make_template(
            {
                "function_id": self.class_id,
                "function_blob": b"",
                "function_name": f"{self.full_name}.{info.name}",
                "name": options.get("name") or "",
                "num_returns": info.num_returns(options),
                "resources": {},
                "strategy": {"kind": "DEFAULT"},
                "max_retries": self.max_task_retries if retries is None else retries,
                "retry_exceptions": bool(retry),
                "retry_exception_types": serialization.dumps(tuple(retry))
                if isinstance(retry, (list, tuple)) and retry
                else b"",
                "runtime_env_json": "",
                "max_calls": 0,
                "generator_backpressure": max(backpressure, 0),
                "method_name": info.name,
                "concurrency_group": group,
                "enable_task_events": self.enable_task_events if events is None else events,
            }
        )
        if options is info.options:
            self.templates[info.name] = (context, template)
        return template


_known: weakref.WeakValueDictionary[bytes, ActorMetadata] = weakref.WeakValueDictionary()


def _default(value: Any, default: Any) -> Any:
    return default if value is None else value


def _is_method(value: Any) -> bool:
    return (
        inspect.isfunction(value)
        or inspect.ismethod(value)
        or (
            inspect.isroutine(value)
            and getattr(value, "__objclass__", None) is not object
            and not inspect.isbuiltin(value)
        )
    )


def class_methods(cls: type) -> dict[str, MethodInfo]:
    """The methods of `cls` that can be called remotely, by name."""
    methods: dict[str, MethodInfo] = {}
    for name, value in inspect.getmembers(cls, _is_method):
        if name in ("__init__", "__new__", "__init_subclass__", "__subclasshook__", "__class_getitem__"):
            continue
        static = inspect.getattr_static(cls, name)
        signature = CallSignature.of(
            value, f"{cls.__qualname__}.{name}", skip_first=not isinstance(static, (staticmethod, classmethod))
        )
        methods[name] = MethodInfo(name, signature, is_generator(value), dict(_method_options(value)))
    ready = CallSignature("__ray_ready__", ())
    call = CallSignature("__ray_call__", (("fn", 0, False), ("args", 2, False), ("kwargs", 4, False)))
    methods["__ray_ready__"] = MethodInfo("__ray_ready__", ready, False, {})
    methods["__ray_call__"] = MethodInfo("__ray_call__", call, False, {})
    methods["__ray_terminate__"] = MethodInfo("__ray_terminate__", CallSignature("__ray_terminate__", ()), False, {})
    return methods


def _method_options(function: Callable[..., Any]) -> dict[str, Any]:
    return getattr(function, METHOD_OPTIONS_ATTRIBUTE, {})


def is_generator(function: Any) -> bool:
    """Whether calling `function` makes a generator or an async generator."""
    return inspect.isgeneratorfunction(function) or inspect.isasyncgenfunction(function)


def has_async_methods(cls: type) -> bool:
    """Whether `cls` is an asyncio actor's class."""
    return any(
        inspect.iscoroutinefunction(value) or inspect.isasyncgenfunction(value)
        for _, value in inspect.getmembers(cls, inspect.isroutine)
    )


def constructor_signature(cls: type) -> CallSignature:
    """The signature of the constructor, without the instance."""
    name = f"{cls.__qualname__}.__init__"
    if cls.__init__ is not object.__init__:  # type: ignore[misc]
        return CallSignature.of(cls.__init__, name, skip_first=True)  # type: ignore[misc]
    return CallSignature(name, ()) if cls.__new__ is object.__new__ else CallSignature.anything(name)
