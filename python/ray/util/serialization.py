"""Serializers that users register for their own types."""

from __future__ import annotations

from typing import Any

from ray._private.serialization import (
    SerializationContext,
    deregister_serializer,
    dumps,
    loads,
    register_serializer,
)


class StandaloneSerializationContext(SerializationContext):
    """Pickles as the runtime does, without a cluster."""

    def serialize(self, value: Any) -> bytes:
        """The pickle of `value`. Raises TypeError."""
        return dumps(value)

    def deserialize(self, data: bytes) -> Any:
        """The value of a pickle."""
        return loads(data)


__all__ = ["StandaloneSerializationContext", "deregister_serializer", "register_serializer"]
