"""The control plane's key-value store. Keys and values are bytes; str is encoded as UTF-8."""

from __future__ import annotations

from typing import Any

from ray._private.context import current

_client: Any = None


def _bytes(value: Any, what: str) -> bytes:
    if isinstance(value, str):
        return value.encode()
    if isinstance(value, bytes):
        return value
    raise TypeError(f"{what} must be bytes or str, not {type(value).__name__}")


def _namespace(namespace: str | bytes | None) -> bytes:
    return b"" if namespace is None else _bytes(namespace, "the namespace")


def _core() -> Any:
    context = current.context
    if context is None:
        raise RuntimeError("Ray has not been started yet. You can start Ray with 'ray.init()'.")
    return context.core


def _internal_kv_initialized() -> bool:
    """Whether this process is connected."""
    return current.context is not None


def _internal_kv_get(key: str | bytes, *, namespace: str | bytes | None = None) -> bytes | None:
    """The value of `key`; None where there is none."""
    return _core().kv_get(_namespace(namespace), _bytes(key, "a key"))


def _internal_kv_exists(key: str | bytes, *, namespace: str | bytes | None = None) -> bool:
    """Whether `key` has a value."""
    return _core().kv_exists(_namespace(namespace), _bytes(key, "a key"))


def _pin_runtime_env_uri(uri: str, *, expiration_s: int) -> None:
    """Not built."""
    raise NotImplementedError("_pin_runtime_env_uri is not built yet: runtime environments have no packages")


def _internal_kv_put(
    key: str | bytes, value: str | bytes, overwrite: bool = True, *, namespace: str | bytes | None = None
) -> bool:
    """Stores a value. Returns whether the key had one before; without `overwrite` that one is kept."""
    is_new = _core().kv_put(_namespace(namespace), _bytes(key, "a key"), _bytes(value, "a value"), overwrite)
    return not is_new


def _internal_kv_del(key: str | bytes, *, del_by_prefix: bool = False, namespace: str | bytes | None = None) -> int:
    """Removes `key`, or every key that starts with it. Returns how many were removed."""
    return _core().kv_delete(_namespace(namespace), _bytes(key, "a key"), del_by_prefix)


def _internal_kv_list(prefix: str | bytes, *, namespace: str | bytes | None = None) -> list[bytes]:
    """The keys that start with `prefix`."""
    return _core().kv_keys(_namespace(namespace), _bytes(prefix, "a prefix"))
