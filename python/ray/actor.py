"""Actors: what ``@ray.remote`` makes of a class, handles to actors, and their methods."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from ray._private import function_manager, ray_constants
from ray._private.actor_metadata import (
    METHOD_OPTIONS_ATTRIBUTE,
    ActorMetadata,
    MethodInfo,
    class_methods,
    constructor_signature,
    has_async_methods,
)
from ray._private.context import SubmissionContext, current, ensure_context
from ray._private.object_ref_generator import ObjectRefGenerator, wrapper_of
from ray._private.options import (
    METHOD_OPTIONS,
    normalized_concurrency_groups,
    refuse_unbuilt_method_options,
    validate_actor_options,
    validate_method_options,
)
from ray._private.serialization import SerializationError, explain_arguments
from ray._private.signature import CallSignature
from ray._private.utils import function_display_name
from ray.exceptions import ActorAlreadyExistsError, AsyncioActorExit
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

if TYPE_CHECKING:
    from ray._private.ids import ActorID
    from ray._raylet import ActorCore


class ActorClassInheritanceException(TypeError):
    """A class inherits from an actor class."""


def method(*args: Any, **kwargs: Any) -> Any:
    """Gives a method of an actor class options.

    Args:
        num_returns: how many objects a call returns, "streaming" or "dynamic".
        concurrency_group: the group whose limit the calls share.
        max_task_retries: how often a call is repeated when the actor restarts.
        retry_exceptions: whether (or for which exceptions) a call that raised is repeated.

    Raises:
        AssertionError: used without options, or with one that is unknown.

    Example:
        >>> @ray.remote
        ... class Splitter:
        ...     @ray.method(num_returns=2)
        ...     def split(self, pair):
        ...         return pair
    """
    valid = list(METHOD_OPTIONS)
    if args:
        raise AssertionError(
            "The @ray.method decorator must be applied using no arguments or at least one of the arguments in the "
            f"list {valid}, for example '@ray.method(num_returns=2)'."
        )
    for name, value in kwargs.items():
        if name not in METHOD_OPTIONS:
            raise AssertionError(
                f"Unexpected keyword argument to @ray.method: '{name}'. The supported keyword arguments are {valid}"
            )
        METHOD_OPTIONS[name].validate(name, value)
    refuse_unbuilt_method_options(kwargs)

    def annotate_method(function: Callable[..., Any]) -> Callable[..., Any]:
        setattr(function, METHOD_OPTIONS_ATTRIBUTE, dict(kwargs))
        return function

    return annotate_method


class ActorMethod:
    """A method of an actor, called with `remote()`."""

    __slots__ = (
        "__weakref__",
        "_context",
        "_core",
        "_info",
        "_maximum",
        "_metadata",
        "_minimum",
        "_options",
        "_submit",
        "_template",
        "_wrap",
    )

    def __init__(self, core: ActorCore, metadata: ActorMetadata, info: MethodInfo, options: dict[str, Any]) -> None:
        # The handle is not kept: it keeps its methods, and a cycle would delay the end of the actor.
        self._core = core
        self._metadata = metadata
        self._info = info
        self._options = options
        self._context: SubmissionContext | None = None
        self._minimum = info.signature.minimum
        self._maximum = info.signature.maximum

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        name = self._info.name
        raise TypeError(
            f"Actor methods cannot be called directly. Instead of running 'object.{name}()', try "
            f"'object.{name}.remote()'."
        )

    def remote(self, *args: Any, **kwargs: Any) -> Any:
        """Submits a call.

        Returns:
            An ObjectRef; a list of them for several returns; None for none; an ObjectRefGenerator for generators.

        Raises:
            TypeError: the call does not fit the method's signature, or an argument cannot be pickled.
            PendingCallsLimitExceeded: the actor's `max_pending_calls` are under way.
        """
        if self._context is not current.context or self._context is None:
            self._bind()
        if kwargs:
            self._info.signature.check(args, kwargs)
        elif not self._minimum <= len(args) <= self._maximum:
            self._info.signature.check(args, kwargs)
        try:
            if self._wrap is None:
                return self._submit(self._core, self._template, args, kwargs or None)
            return self._wrap(self._submit(self._core, self._template, args, kwargs or None))
        except SerializationError as error:
            name = f"{self._metadata.full_name}.{self._info.name}"
            raise explain_arguments(error, args, kwargs, name) from None

    def options(self, **options: Any) -> ActorMethod:
        """This method with other options, among them `name`; those not given stay.

        Example:
            >>> handle.split.options(num_returns=3).remote(triple)
        """
        validate_method_options(options)
        return ActorMethod(self._core, self._metadata, self._info, {**self._options, **options})

    def bind(self, *args: Any, **kwargs: Any) -> Any:
        """A node of a graph (`ray.dag`) that makes this call when the graph is executed."""
        from ray.dag import PARENT_CLASS_NODE_KEY, ClassMethodNode

        handle = ActorHandle(self._core, self._metadata)
        options = {} if self._options is self._info.options else dict(self._options)
        return ClassMethodNode(self._info.name, args, kwargs, options, {PARENT_CLASS_NODE_KEY: handle})

    def _remote(self, args: Any = None, kwargs: Any = None, **options: Any) -> Any:
        """Submits a call with these options, for libraries that pass arguments as containers."""
        target = self.options(**options) if options else self
        return target.remote(*(args or ()), **(kwargs or {}))

    def _bind(self) -> None:
        context = ensure_context()
        self._template = self._metadata.template(context, self._info, self._options)
        self._submit = context.core.submit_actor_task
        self._wrap = wrapper_of(self._info.num_returns(self._options))
        self._context = context

    def __repr__(self) -> str:
        return f"ActorMethod({self._metadata.class_name}.{self._info.name})"

    def __reduce__(self) -> Any:
        handle = ActorHandle(self._core, self._metadata)
        own = {} if self._options is self._info.options else self._options
        return _rebuild_method, (handle, self._info.name, own)


def _rebuild_method(handle: ActorHandle, name: str, options: dict[str, Any]) -> ActorMethod:
    bound = getattr(handle, name)
    return bound.options(**options) if options else bound


class ActorHandle:
    """A handle to an actor: its attributes are the actor's methods.

    A handle counts: when the last one of an actor that is not detached is gone, the actor ends. Those from
    `ray.get_actor` do not count.

    Example:
        >>> counter = Counter.remote()
        >>> ray.get(counter.increment.remote())
        1
    """

    def __init__(
        self, core: ActorCore, metadata: ActorMetadata, name: str | None = None, namespace: str | None = None
    ) -> None:
        self._ray_core = core
        self._ray_metadata = metadata
        self._ray_name = name
        self._ray_namespace = namespace

    def __getattr__(self, name: str) -> ActorMethod:
        # Comes here once a method: the instance keeps what this returns.
        if name.startswith("_ray_"):
            raise AttributeError(name)
        metadata = self._ray_metadata
        info = metadata.methods.get(name)
        if info is None:
            raise AttributeError(
                f"'ActorHandle' object has no attribute '{name}': {metadata.class_name} has no such method"
            )
        bound = ActorMethod(self._ray_core, metadata, info, info.options)
        self.__dict__[name] = bound
        return bound

    @property
    def _actor_id(self) -> ActorID:
        from ray._private.ids import ActorID

        return ActorID(self._ray_core.actor_id())

    @property
    def _ray_actor_id(self) -> ActorID:
        return self._actor_id

    def _get_local_state(self) -> str | None:
        """The actor's state as this process knows it."""
        return self._ray_core.state().get("state")

    def __dir__(self) -> list[str]:
        return [*self._ray_metadata.methods]

    def __repr__(self) -> str:
        return f"Actor({self._ray_metadata.class_name}, {self._actor_id.hex()})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, ActorHandle) and self._ray_core.actor_id() == other._ray_core.actor_id()

    def __hash__(self) -> int:
        return hash(self._ray_core.actor_id())

    def __reduce__(self) -> Any:
        reference = self._ray_core.reference()
        return _rebuild_handle, (
            reference,
            self._ray_core.actor_id(),
            self._ray_metadata.pickled,
            self._ray_name,
            self._ray_namespace,
        )


def _rebuild_handle(
    reference: Any, actor_id: bytes, pickled: bytes, name: str | None, namespace: str | None
) -> ActorHandle:
    """The handle that travelled: counted through its reference, or weak by its name."""
    context = ensure_context()
    metadata = ActorMetadata.from_pickle(pickled)
    if reference is None:
        if not name:
            raise ValueError(
                f"the handle of actor {actor_id.hex()} is weak and has no name, so it cannot be passed on; pass the "
                "handle that .remote() returned"
            )
        core, _ = context.core.get_named_actor(name, namespace if namespace is not None else context.namespace)
        return ActorHandle(core, metadata, name, namespace)
    core = context.core.actor_from_reference(
        reference,
        {
            "actor_id": actor_id,
            "class_name": metadata.class_name,
            "max_task_retries": metadata.max_task_retries,
            "max_pending_calls": metadata.max_pending_calls,
            "out_of_order": metadata.out_of_order,
        },
    )
    return ActorHandle(core, metadata, name, namespace)


class ActorClass:
    """A class whose instances are actors: what ``@ray.remote`` makes of a class.

    Example:
        >>> @ray.remote(num_cpus=1)
        ... class Counter:
        ...     def __init__(self):
        ...         self.value = 0
        ...     def increment(self):
        ...         self.value += 1
        ...         return self.value
        >>> counter = Counter.remote()
    """

    def __init__(self, name: str, bases: tuple[Any, ...], attr: dict[str, Any]) -> None:
        """Comes here only where a class statement names an actor class as its base."""
        for base in bases:
            if isinstance(base, ActorClass):
                raise ActorClassInheritanceException(
                    f"Attempted to define subclass '{name}' of actor class '{base._class_name}'. Inheriting from actor "
                    "classes is not currently supported. You can instead inherit from a non-actor base class and make "
                    "the derived class an actor class (with @ray.remote)."
                )
        raise TypeError("ActorClass is made by @ray.remote, not directly")

    @classmethod
    def _from_class(
        cls, target: type, options: dict[str, Any], capture: function_manager.Capture | None = None
    ) -> ActorClass:
        self = cls.__new__(cls)
        self._setup(target, options, capture)
        return self

    def _setup(self, target: type, options: dict[str, Any], capture: function_manager.Capture | None = None) -> None:
        self._capture = capture or function_manager.Capture()
        self._class = target
        self._options = options
        self._class_name = target.__name__
        for attribute in ("__name__", "__qualname__", "__module__", "__doc__"):
            value = getattr(target, attribute, None)
            if value is not None:
                setattr(self, attribute, value)
        self.__wrapped__ = target
        self._forget()

    def _forget(self) -> None:
        self._context: SubmissionContext | None = None
        self._template: Any = None
        self._creation: dict[str, Any] = {}
        self._metadata: ActorMetadata | None = None
        self._signature: CallSignature | None = None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        raise TypeError(
            f"Actors cannot be instantiated directly. Instead of '{self._class_name}()', use "
            f"'{self._class_name}.remote()'."
        )

    def __getattr__(self, name: str) -> Any:
        state = self.__dict__.pop("_pending_state", None)
        if state is not None:
            self._setup(*state)
            return getattr(self, name)
        target = self.__dict__.get("_class")
        if target is None or (name.startswith("__") and name.endswith("__")):
            raise AttributeError(name)
        try:
            return getattr(target, name)
        except AttributeError:
            raise AttributeError(f"'ActorClass({target.__name__})' object has no attribute '{name}'") from None

    def remote(self, *args: Any, **kwargs: Any) -> ActorHandle:
        """Makes an actor with these arguments for its constructor.

        Raises:
            TypeError: the arguments do not fit the constructor, or cannot be pickled.
            ActorAlreadyExistsError: the name is taken.
        """
        if self._context is not current.context or self._context is None:
            self._bind()
        context, creation, metadata = self._context, self._creation, self._metadata
        assert context is not None and metadata is not None and self._signature is not None
        self._signature.check(args, kwargs)
        try:
            core = context.core.create_actor(self._template, args, kwargs or None, creation)
        except ActorAlreadyExistsError:
            raise
        except SerializationError as error:
            raise explain_arguments(error, args, kwargs, f"{metadata.full_name}.__init__") from None
        except ValueError as error:
            name = creation["name"]
            if not name or "taken" not in str(error):
                raise
            raise ActorAlreadyExistsError(
                f"The name {name} (namespace={creation['namespace']}) is already taken. Please use a different name "
                f"or get the existing actor using ray.get_actor('{name}', namespace='{creation['namespace']}')"
            ) from None
        return ActorHandle(core, metadata, creation["name"] or None, creation["namespace"])

    def options(self, **actor_options: Any) -> ActorClass:
        """This actor class with other options; those not given stay.

        Raises:
            ValueError, TypeError: an option is unknown, of the wrong type or out of range.

        Example:
            >>> Counter.options(name="hits", lifetime="detached").remote()
        """
        merged = {**self._options, **actor_options}
        # `get_if_exists` may come with the name that was given at definition.
        validate_actor_options({**_only_name(merged), **actor_options}, in_options=True)
        if "scheduling_strategy" in actor_options and "placement_group" not in actor_options:
            for name in ("placement_group", "placement_group_bundle_index", "placement_group_capture_child_tasks"):
                merged.pop(name, None)
        return ActorClass._from_class(self._class, merged, self._capture)

    def bind(self, *args: Any, **kwargs: Any) -> Any:
        """A node of a graph (`ray.dag`) that makes an actor when the graph is executed; its attributes are methods to
        bind.

        Example:
            >>> counter = Counter.bind()
            >>> ray.get(counter.increment.bind().execute())
            1
        """
        from ray.dag import ClassNode

        return ClassNode(self._class, args, kwargs, dict(self._options), actor_class=self)

    @property
    def _default_options(self) -> dict[str, Any]:
        return dict(self._options)

    def _remote(self, args: Any = None, kwargs: Any = None, **actor_options: Any) -> ActorHandle:
        """Makes an actor with these options, for libraries that pass arguments as containers."""
        target = self.options(**actor_options) if actor_options else self
        return target.remote(*(args or ()), **(kwargs or {}))

    def _bind(self) -> None:
        from ray._private import scheduling
        from ray.runtime_env.runtime_env import resolve_runtime_env

        context = ensure_context()
        target, options = self._class, self._options
        full_name = function_display_name(target)
        groups = normalized_concurrency_groups(options.get("concurrency_groups"))
        is_async = has_async_methods(target)
        limit = options.get("max_concurrency")
        if not limit:  # 0 is the default, too.
            limit = ray_constants.DEFAULT_ACTOR_MAX_CONCURRENCY_ASYNC if is_async else 1
        resources, placement = scheduling.actor_resources(options)
        strategy = scheduling.resolve_strategy(options, placement, context.captured_group, full_name)
        exported = self._capture.export(context.core, target, full_name, "actor class")
        metadata = ActorMetadata.build(target, exported.function_id, class_methods(target), options, groups)
        for info in metadata.methods.values():
            group = info.options.get("concurrency_group")
            if group and group not in groups:
                raise ValueError(
                    f"{full_name}.{info.name} names the concurrency group {group!r}, which the class does not declare; "
                    f"it declares {list(groups)}."
                )
        lifetime = options.get("lifetime")
        detached = lifetime == "detached" or (lifetime is None and context.default_detached)
        namespace = options.get("namespace")
        runtime_env_json = resolve_runtime_env(context.runtime_env, options.get("runtime_env"))
        self._template = context.core.make_template(
            {
                "function_id": exported.function_id,
                "function_blob": exported.blob,
                "function_name": f"{full_name}.__init__",
                "name": "",
                "num_returns": 1,
                "resources": resources,
                "strategy": strategy,
                "max_retries": 0,
                "retry_exceptions": False,
                "retry_exception_types": b"",
                "runtime_env_json": runtime_env_json,
                "max_calls": 0,
                "generator_backpressure": 0,
                "enable_task_events": options.get("enable_task_events", True),
            }
        )
        self._creation = {
            "resources": resources,
            "placement_resources": placement,
            "strategy": strategy,
            "max_restarts": options.get("max_restarts") or 0,
            "max_task_retries": metadata.max_task_retries,
            "max_concurrency": limit,
            "is_async": is_async,
            "concurrency_groups": groups,
            "detached": detached,
            "name": options.get("name") or "",
            "namespace": context.namespace if namespace is None else namespace,
            "get_if_exists": bool(options.get("get_if_exists")),
            "out_of_order": metadata.out_of_order,
            "class_name": target.__qualname__,
            "runtime_env_json": runtime_env_json,
            "handle_metadata": metadata.pickled,
            "max_pending_calls": metadata.max_pending_calls,
        }
        self._metadata = metadata
        self._signature = constructor_signature(target)
        self._context = context

    def __getstate__(self) -> tuple[type, dict[str, Any]]:
        return self._class, self._options

    def __setstate__(self, state: tuple[type, dict[str, Any]]) -> None:
        # A class that names itself needs the object before its state.
        self.__dict__["_pending_state"] = state

    def __reduce__(self) -> Any:
        return _new_actor_class, (), self.__getstate__()

    def __repr__(self) -> str:
        return f"ActorClass({self._class_name})"


def _new_actor_class() -> ActorClass:
    return ActorClass.__new__(ActorClass)


def _only_name(options: dict[str, Any]) -> dict[str, Any]:
    return {"name": options["name"]} if options.get("name") else {}


def make_actor_class(target: type, options: dict[str, Any]) -> ActorClass:
    """The actor class of `target`. Raises what the options' checks raise, and TypeError for what cannot be one."""
    validate_actor_options(options, in_options=False)
    return ActorClass._from_class(target, options)


class ActorExit(SystemExit):
    """Leaves the actor's process after the call that raised it."""


def exit_actor() -> None:
    """Ends the actor from inside one of its methods, once what it has begun is done.

    Raises:
        TypeError: not called in an actor.

    Example:
        >>> class Worker:
        ...     def stop(self):
        ...         ray.actor.exit_actor()
    """
    from ray._private.context import current_task
    from ray._private.worker import global_worker

    if not global_worker.in_actor:
        raise TypeError(
            f"exit_actor API is called on a non-actor worker, {global_worker.mode}. Call this API inside an actor "
            "methods if you'd like to exit the actor gracefully."
        )
    global_worker.exiting = True
    global_worker.core.exit_worker("exit_actor() is called.")
    if current_task.get() is not None:
        raise AsyncioActorExit("exit_actor() is called.")
    raise ActorExit(0)


__all__ = [
    "ActorAlreadyExistsError",
    "ActorClass",
    "ActorClassInheritanceException",
    "ActorHandle",
    "ActorMethod",
    "AsyncioActorExit",
    "ObjectRefGenerator",
    "PlacementGroupSchedulingStrategy",
    "exit_actor",
    "method",
]
