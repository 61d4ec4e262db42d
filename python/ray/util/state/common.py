"""The rows that the state API returns, under the field names that programs know."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, fields
from typing import Any

DEFAULT_LIMIT = 100
DEFAULT_RPC_TIMEOUT = 30
RAY_MAX_LIMIT_FROM_API_SERVER = 10_000
# A field with this in its metadata is filled only when detail is asked for.
DETAIL = {"detail": True}


@dataclass
class StateSchema:
    """A row: its fields are attributes, and items by their names."""

    def __getitem__(self, name: str) -> Any:
        try:
            return getattr(self, name)
        except AttributeError:
            raise KeyError(name) from None

    def get(self, name: str, default: Any = None) -> Any:
        """A field, or `default` where there is none of that name."""
        return getattr(self, name, default)

    def asdict(self) -> dict[str, Any]:
        """Every field."""
        return {f.name: getattr(self, f.name) for f in fields(self)}

    def __iter__(self) -> Iterator[str]:
        return iter(f.name for f in fields(self))

    def keys(self) -> list[str]:
        """The names of the fields."""
        return [f.name for f in fields(self)]

    @classmethod
    def base_columns(cls) -> list[str]:
        """The fields that are filled without detail."""
        return [f.name for f in fields(cls) if not f.metadata.get("detail")]


@dataclass
class NodeState(StateSchema):
    """A node."""

    node_id: str
    node_ip: str
    is_head_node: bool
    state: str
    state_message: str | None
    node_name: str
    resources_total: dict[str, float]
    labels: dict[str, str]
    start_time_ms: int | None = field(default=None, metadata=DETAIL)
    end_time_ms: int | None = field(default=None, metadata=DETAIL)


@dataclass
class ActorState(StateSchema):
    """An actor."""

    actor_id: str
    class_name: str
    state: str
    job_id: str
    name: str
    node_id: str
    pid: int
    ray_namespace: str
    is_detached: bool | None = field(default=None, metadata=DETAIL)
    required_resources: dict[str, float] | None = field(default=None, metadata=DETAIL)
    death_cause: dict[str, Any] | None = field(default=None, metadata=DETAIL)
    placement_group_id: str | None = field(default=None, metadata=DETAIL)
    num_restarts: int | None = field(default=None, metadata=DETAIL)
    pending_reason: str | None = field(default=None, metadata=DETAIL)
    start_time_ms: int | None = field(default=None, metadata=DETAIL)
    end_time_ms: int | None = field(default=None, metadata=DETAIL)


@dataclass
class JobState(StateSchema):
    """A job: a driver that is, or was, connected."""

    job_id: str
    submission_id: str | None
    entrypoint: str
    type: str
    status: str
    message: str | None
    error_type: str | None
    driver_info: dict[str, Any]
    start_time: int | None = field(default=None, metadata=DETAIL)
    end_time: int | None = field(default=None, metadata=DETAIL)
    metadata: dict[str, str] | None = field(default=None, metadata=DETAIL)
    runtime_env: dict[str, Any] | None = field(default=None, metadata=DETAIL)
    driver_node_id: str | None = field(default=None, metadata=DETAIL)


@dataclass
class PlacementGroupState(StateSchema):
    """A placement group."""

    placement_group_id: str
    name: str
    creator_job_id: str
    state: str
    bundles: list[dict[str, Any]] | None = field(default=None, metadata=DETAIL)
    is_detached: bool | None = field(default=None, metadata=DETAIL)
    stats: dict[str, Any] | None = field(default=None, metadata=DETAIL)
    pending_reason: str | None = field(default=None, metadata=DETAIL)


@dataclass
class WorkerState(StateSchema):
    """A worker process, or a driver."""

    worker_id: str
    is_alive: bool
    worker_type: str
    exit_type: str | None
    node_id: str
    ip: str
    pid: int
    exit_detail: str | None = field(default=None, metadata=DETAIL)
    state: str | None = field(default=None, metadata=DETAIL)
