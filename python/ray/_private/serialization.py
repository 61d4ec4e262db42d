"""Pickling of values and exceptions.

Values are pickled by cloudpickle with protocol 5; buffers go out of band. Serializers that users register are
consulted first.

Invariants:

1. What cannot be pickled raises `SerializationError`, a TypeError that names the path to the culprit.
2. An exception always travels: what of it cannot be pickled is replaced by its text.
"""

from __future__ import annotations

import functools
import io
import pickle
import types
from collections import ChainMap
from collections.abc import Callable
from typing import Any

import cloudpickle

from ray import exceptions

Serializer = Callable[[Any], Any]
Deserializer = Callable[[Any], Any]

_custom_reducers: dict[type, Callable[[Any], tuple[Any, ...]]] = {}


class SerializationError(TypeError):
    """A value cannot be pickled.

    Attributes:
        path: where in the value the culprit is, such as ``.d['lock']``; empty for the value itself.
        culprit: the innermost thing that cannot be pickled.
        reason: what the pickler said.
    """

    def __init__(self, message: str, path: str = "", culprit: Any = None, reason: str = "") -> None:
        super().__init__(message)
        self.path = path
        self.culprit = culprit
        self.reason = reason

    def __reduce__(self) -> tuple[Any, ...]:
        # The culprit cannot travel.
        return SerializationError, (str(self), self.path, repr(self.culprit), self.reason)


_reduce_anonymous_code = cloudpickle.Pickler.dispatch_table[types.CodeType]


def _reduce_code(code: types.CodeType) -> tuple[Any, ...]:
    # cloudpickle leaves the file's name out; tracebacks need it to show the source line.
    make, arguments = _reduce_anonymous_code(code)
    return make, tuple(code.co_filename if type(a) is str and a == "<dynamic-code>" else a for a in arguments)


def _reduce_cached_property(value: functools.cached_property[Any]) -> tuple[Any, ...]:
    # Its lock, which Python 3.11 still has, cannot travel, and need not.
    return functools.cached_property, (value.func,), {"attrname": value.attrname}, None, None, _set_attributes


def _set_attributes(value: Any, state: dict[str, Any]) -> None:
    vars(value).update(state)


class Pickler(cloudpickle.Pickler):
    """cloudpickle's pickler that knows the registered serializers."""

    dispatch_table = ChainMap(
        _custom_reducers,
        {types.CodeType: _reduce_code, functools.cached_property: _reduce_cached_property},
        cloudpickle.Pickler.dispatch_table,
    )


class StoredFailure:
    """Stands for a value that could not be made: whoever gets it sees the exception raised.

    Args:
        pickled: what `dump_exception` made.
    """

    __slots__ = ("pickled",)

    def __init__(self, pickled: bytes) -> None:
        self.pickled = pickled


def serialize_value(value: Any, buffer_callback: Callable[[pickle.PickleBuffer], Any] | None) -> bytes | tuple[bytes]:
    """As `serialize`; for a `StoredFailure` a tuple of its pickle, as the extension expects."""
    if type(value) is StoredFailure:
        return (value.pickled,)
    return serialize(value, buffer_callback)


def serialize(value: Any, buffer_callback: Callable[[pickle.PickleBuffer], Any] | None) -> bytes:
    """The in-band pickle of `value`; its buffers go to `buffer_callback`.

    Raises:
        SerializationError: it cannot be pickled.
    """
    file = io.BytesIO()
    try:
        Pickler(file, protocol=5, buffer_callback=buffer_callback).dump(value)
    except (exceptions.RayError, MemoryError):
        raise
    except Exception as error:
        raise explain_failure(value, error) from error
    return file.getvalue()


def dumps(value: Any) -> bytes:
    """Pickles `value` with everything in band. Raises SerializationError."""
    return serialize(value, None)


loads = pickle.loads


def explain_failure(value: Any, error: BaseException, what: str = "the value") -> SerializationError:
    """The error to raise for `value`, whose pickling raised `error`: it names the path to the culprit."""
    from ray.util.check_serialize import find_culprit

    reason = f"{type(error).__name__}: {error}"
    if isinstance(error, RecursionError):
        reason += " (the value is nested too deeply)"
    path, culprit, inner = find_culprit(value)
    shown = _short(value)
    message = f"Could not serialize {what} {shown}: {inner or reason}"
    if path:
        message += f"\nThe culprit is at {path.strip()}: {_short(culprit)}"
    message += "\nray.util.inspect_serializability() shows more; ray.util.register_serializer() can teach a type."
    return SerializationError(message, path, culprit, inner or reason)


def explain_arguments(
    error: SerializationError, args: tuple[Any, ...], kwargs: dict[str, Any], name: str
) -> SerializationError:
    """`error`, raised for the arguments of a call of `name`, as one that names the argument."""
    from ray.util.check_serialize import cannot_pickle

    for label, value in [*((str(index), value) for index, value in enumerate(args)), *kwargs.items()]:
        if cannot_pickle(value) is not None:
            cause = error.__cause__ or error
            return explain_failure(value, cause, f"the argument {label} for a task or actor {name}:")
    return error


def _short(value: Any) -> str:
    try:
        text = repr(value)
    except Exception as error:
        text = f"<{type(value).__name__}, whose repr raised {type(error).__name__}>"
    return text if len(text) <= 200 else text[:197] + "..."


def register_serializer(cls: type, *, serializer: Serializer, deserializer: Deserializer) -> None:
    """Pickles instances of exactly `cls` with `serializer`; `deserializer` makes them again, in any process.

    Example:
        >>> ray.util.register_serializer(Connection, serializer=lambda c: c.url, deserializer=Connection)
    """
    if not isinstance(cls, type):
        raise TypeError(f"register_serializer needs a class, got {cls!r}")

    def reduce(value: Any) -> tuple[Any, ...]:
        return deserializer, (serializer(value),)

    _custom_reducers[cls] = reduce


def deregister_serializer(cls: type) -> None:
    """Forgets the serializer of `cls`; there need not be one."""
    _custom_reducers.pop(cls, None)


# --- exceptions ---


def _rebuild_exception(
    cls: type[BaseException], args: tuple[Any, ...], state: dict[str, Any], slots: dict[str, Any] | None = None
) -> BaseException:
    # Neither `__init__` nor a constructor's signature matters: what they left behind is put back.
    try:
        error = cls.__new__(cls, *args)
    except Exception:
        error = cls.__new__(cls)
    if isinstance(cls.__init__, types.WrapperDescriptorType):
        # Builtin constructors fill fields that no attribute does, such as a UnicodeDecodeError's position.
        try:
            cls.__init__(error, *args)
        except Exception:
            pass
    error.args = args
    error.__dict__.update(state)
    for name, value in (slots or {}).items():
        setattr(error, name, value)
    return error


def _slots(error: BaseException) -> dict[str, Any]:
    """What an exception keeps in `__slots__`, by name."""
    values = {}
    for cls in type(error).__mro__:
        names = cls.__dict__.get("__slots__", ())
        for name in (names,) if isinstance(names, str) else names:
            if name.startswith("__") and not name.endswith("__"):
                name = f"_{cls.__name__.lstrip('_')}{name}"
            if name not in ("__dict__", "__weakref__") and hasattr(error, name):
                values[name] = getattr(error, name)
    return values


def _reduces_as_usual(error: BaseException) -> bool:
    cls = type(error)
    return (
        cls.__reduce__ is BaseException.__reduce__
        and cls.__reduce_ex__ is object.__reduce_ex__
        and getattr(cls, "__setstate__", None) is BaseException.__setstate__
    )


class _ExceptionPickler(Pickler):
    """Pickles exceptions by type, arguments and attributes, so that an odd `__init__` does no harm."""

    def reducer_override(self, value: Any) -> Any:
        if isinstance(value, BaseException) and not isinstance(value, exceptions.RayError) and _reduces_as_usual(value):
            return _rebuild_exception, (type(value), value.args, dict(vars(value)), _slots(value))
        return super().reducer_override(value)


def _dump(value: Any) -> bytes:
    file = io.BytesIO()
    _ExceptionPickler(file, protocol=5).dump(value)
    return file.getvalue()


def _travels(value: Any) -> bool:
    try:
        pickle.loads(_dump(value))
    except Exception:
        return False
    return True


def dump_cause(cause: BaseException) -> bytes:
    """Pickles an exception that user code raised; degrades what cannot be pickled to text."""
    try:
        data = _dump(cause)
        if isinstance(pickle.loads(data), BaseException):
            return data
    except Exception:
        pass
    if _travels(type(cause)):
        args = tuple(value if _travels(value) else _short(value) for value in cause.args)
        state = {key: value if _travels(value) else _short(value) for key, value in vars(cause).items()}
        slots = {key: value if _travels(value) else _short(value) for key, value in _slots(cause).items()}
        try:
            data = _dump_parts(type(cause), args, state, slots)
            if isinstance(pickle.loads(data), BaseException):
                return data
        except Exception:
            pass
    name = f"{type(cause).__module__}.{type(cause).__qualname__}"
    return _dump(exceptions.UnserializableException(f"{name}: {_text(cause)}"))


class _Parts:
    def __init__(self, *parts: Any) -> None:
        self.parts = parts

    def __reduce__(self) -> tuple[Any, ...]:
        return _rebuild_exception, self.parts


def _dump_parts(cls: type[BaseException], args: tuple[Any, ...], state: dict[str, Any], slots: dict[str, Any]) -> bytes:
    return _dump(_Parts(cls, args, state, slots))


def _text(error: BaseException) -> str:
    try:
        return str(error)
    except Exception as inner:
        return f"<its text raised {type(inner).__name__}>"


_TASK_ERROR = "task_error"
_OTHER_ERROR = "error"


def dump_exception(error: BaseException) -> bytes:
    """Pickles what a reference of a failed task holds.

    The fields of a `RayTaskError` and its cause are pickled apart, so that the text arrives even where the cause's
    class is missing.
    """
    if isinstance(error, exceptions.RayTaskError):
        fields = (
            error.function_name,
            error.traceback_str,
            error.proctitle,
            error.pid,
            error.ip,
            error.actor_repr,
            error._actor_id,
        )
        return pickle.dumps((_TASK_ERROR, fields, dump_cause(error.cause)), protocol=5)
    return pickle.dumps((_OTHER_ERROR, (type(error).__name__, _text(error)), dump_cause(error)), protocol=5)


def load_exception(data: bytes) -> BaseException:
    """The exception to raise for what `dump_exception` pickled: of the cause's type too, where that is possible."""
    kind, fields, pickled = pickle.loads(data)
    try:
        cause = pickle.loads(pickled)
    except Exception as error:
        text = f"{fields[1]}\n(unpickling it here raised {type(error).__name__}: {error})"
        cause = exceptions.UnserializableException(text)
    if kind != _TASK_ERROR:
        return cause
    name, text, proctitle, pid, ip, actor_repr, actor_id = fields
    return exceptions.RayTaskError(name, text, cause, proctitle, pid, ip, actor_repr, actor_id).as_instanceof_cause()


class SerializationContext:
    """The registered serializers, under the name that libraries look for."""

    def _register_cloudpickle_serializer(
        self, cls: type, custom_serializer: Serializer, custom_deserializer: Deserializer
    ) -> None:
        register_serializer(cls, serializer=custom_serializer, deserializer=custom_deserializer)

    def _unregister_cloudpickle_reducer(self, cls: type) -> None:
        deregister_serializer(cls)
