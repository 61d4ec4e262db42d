"""Identifiers as Python sees them: immutable wrappers of bytes with Ray's class names, sizes and text forms.

Invariants:

1. A job is 4 bytes, an actor 16, a task 24, an object 28; unique ids are 28; a placement group is 18.
2. An actor id ends in its job's id; a task id ends in its actor's id; so each id names its ancestors.
3. The nil id of every kind is all ``ff``.

`ObjectRef` is not here: it is counted, so the extension owns it.
"""

from __future__ import annotations

import os
from typing import ClassVar, TypeVar

IdType = TypeVar("IdType", bound="BaseID")

__all__ = [
    "ActorClassID",
    "ActorID",
    "BaseID",
    "ClusterID",
    "FunctionID",
    "JobID",
    "NodeID",
    "PlacementGroupID",
    "TaskID",
    "UniqueID",
    "WorkerID",
]


class BaseID:
    """What all ids have in common. Ids of different classes are never equal."""

    SIZE: ClassVar[int] = 0
    __slots__ = ("_bytes",)

    def __init__(self, id: bytes) -> None:
        """Wraps exactly `SIZE` bytes.

        Raises:
            TypeError: `id` is not bytes.
            ValueError: `id` has another length.
        """
        if not isinstance(id, bytes):
            raise TypeError(f"Unsupported type: {type(id)}, expected bytes")
        if len(id) != self.SIZE:
            raise ValueError(f"ID string needs to have length {self.SIZE}, got {len(id)}")
        self._bytes = id

    @classmethod
    def from_binary(cls: type[IdType], id_bytes: bytes) -> IdType:
        """The id of these bytes.

        Example:
            >>> JobID.from_binary(b"\\x01\\x00\\x00\\x00")
            JobID(01000000)
        """
        return cls(id_bytes)

    @classmethod
    def from_hex(cls: type[IdType], hex_id: str | bytes) -> IdType:
        """The id of this hexadecimal text.

        Raises:
            ValueError: the text is not hexadecimal or has another length.
        """
        text = hex_id.decode("ascii") if isinstance(hex_id, bytes) else hex_id
        if not isinstance(text, str):
            raise TypeError(f"Unsupported type: {type(hex_id)}, expected str")
        try:
            return cls(bytes.fromhex(text))
        except ValueError as error:
            raise ValueError(f"{cls.__name__} needs {2 * cls.SIZE} hexadecimal digits, got {text!r}") from error

    @classmethod
    def from_random(cls: type[IdType]) -> IdType:
        """A fresh id from the operating system's random source."""
        return cls(os.urandom(cls.SIZE))

    @classmethod
    def nil(cls: type[IdType]) -> IdType:
        """The id that means "none"."""
        return cls(b"\xff" * cls.SIZE)

    @classmethod
    def size(cls) -> int:
        """Length in bytes."""
        return cls.SIZE

    def binary(self) -> bytes:
        """The bytes."""
        return self._bytes

    def hex(self) -> str:
        """Lower-case hexadecimal."""
        return self._bytes.hex()

    def is_nil(self) -> bool:
        """Whether this id means "none"."""
        return self._bytes == b"\xff" * self.SIZE

    def redis_shard_hash(self) -> int:
        """A number that depends on the bytes alone, the same in every process."""
        import hashlib

        return int.from_bytes(hashlib.blake2b(self._bytes, digest_size=8).digest(), "little")

    def __eq__(self, other: object) -> bool:
        return type(self) is type(other) and self._bytes == other._bytes

    def __ne__(self, other: object) -> bool:
        return not self == other

    def __hash__(self) -> int:
        return hash(self._bytes)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self._bytes.hex()})"

    __str__ = __repr__

    def __reduce__(self) -> tuple[type[BaseID], tuple[bytes]]:
        return type(self), (self._bytes,)


class UniqueID(BaseID):
    """An id of 28 random bytes."""

    SIZE = 28
    __slots__ = ()


class NodeID(UniqueID):
    """A node, that is one raylet's life."""

    __slots__ = ()


class WorkerID(UniqueID):
    """A worker or driver process."""

    __slots__ = ()


class FunctionID(UniqueID):
    """An exported function."""

    __slots__ = ()


class ActorClassID(UniqueID):
    """An exported actor class."""

    __slots__ = ()


class ClusterID(UniqueID):
    """A cluster."""

    __slots__ = ()


class JobID(BaseID):
    """A job: one driver's program."""

    SIZE = 4
    __slots__ = ()

    @classmethod
    def from_int(cls, value: int) -> JobID:
        """The job of this number.

        Raises:
            OverflowError: `value` does not fit 32 bits.
        """
        return cls(value.to_bytes(4, "little"))

    def int(self) -> int:
        """The job's number."""
        return int.from_bytes(self._bytes, "little")


class ActorID(BaseID):
    """An actor."""

    SIZE = 16
    __slots__ = ()

    @classmethod
    def of(cls, job_id: JobID, parent_task_id: TaskID, parent_task_counter: int) -> ActorID:
        """The id of the actor that this task created as its `parent_task_counter`-th."""
        return cls(_digest(12, job_id, parent_task_id, parent_task_counter) + job_id.binary())

    @property
    def job_id(self) -> JobID:
        """The job this actor belongs to."""
        return JobID(self._bytes[12:])


class TaskID(BaseID):
    """A task: a call of a function, an actor's creation, or a call of an actor's method."""

    SIZE = 24
    __slots__ = ()

    @classmethod
    def for_driver_task(cls, job_id: JobID) -> TaskID:
        """The root task of a driver's program."""
        return cls(b"\xff" * 20 + job_id.binary())

    @classmethod
    def for_fake_task(cls, job_id: JobID) -> TaskID:
        """A random task id in `job_id`."""
        return cls(os.urandom(20) + job_id.binary())

    @classmethod
    def for_actor_creation_task(cls, actor_id: ActorID) -> TaskID:
        """The task that creates `actor_id`."""
        return cls(b"\xff" * 8 + actor_id.binary())

    @classmethod
    def for_actor_task(
        cls, job_id: JobID, parent_task_id: TaskID, parent_task_counter: int, actor_id: ActorID
    ) -> TaskID:
        """The id of a call of a method of `actor_id`."""
        return cls(_digest(8, job_id, parent_task_id, parent_task_counter, actor_id.binary()) + actor_id.binary())

    @classmethod
    def for_normal_task(cls, job_id: JobID, parent_task_id: TaskID, parent_task_counter: int) -> TaskID:
        """The id of a call of a function."""
        return cls(_digest(8, job_id, parent_task_id, parent_task_counter) + b"\xff" * 12 + job_id.binary())

    def actor_id(self) -> ActorID:
        """The actor this task belongs to; its unique part is all ``ff`` where there is none."""
        return ActorID(self._bytes[8:])

    def job_id(self) -> JobID:
        """The job this task belongs to."""
        return JobID(self._bytes[20:])


class PlacementGroupID(BaseID):
    """A placement group."""

    SIZE = 18
    __slots__ = ()

    @classmethod
    def of(cls, job_id: JobID) -> PlacementGroupID:
        """A fresh placement group id in `job_id`."""
        return cls(os.urandom(14) + job_id.binary())


def _digest(size: int, job_id: JobID, parent_task_id: TaskID, counter: int, salt: bytes = b"") -> bytes:
    # It loads the cryptographic library, which few programs need here.
    import hashlib

    data = job_id.binary() + parent_task_id.binary() + counter.to_bytes(8, "little") + salt
    return hashlib.blake2b(data, digest_size=size).digest()
