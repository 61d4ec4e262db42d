"""The settings of a job: one driver's program."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from ray.runtime_env import RuntimeEnv

if TYPE_CHECKING:
    from ray._private.logging_config import LoggingConfig

_LIFETIMES = ("detached", "non_detached")


class JobConfig:
    """What a driver tells the cluster of its job.

    Args:
        jvm_options: not built; must be empty.
        code_search_path: directories that workers look for modules in.
        runtime_env: the environment of the job's tasks and actors.
        metadata: texts shown with the job.
        ray_namespace: where the job's named actors are found; a fresh one by default.
        default_actor_lifetime: "detached" or "non_detached".

    Raises:
        ValueError, TypeError: a field makes no sense.

    Example:
        >>> ray.init(job_config=JobConfig(ray_namespace="shop", metadata={"team": "search"}))
    """

    def __init__(
        self,
        jvm_options: list[str] | None = None,
        code_search_path: list[str] | None = None,
        runtime_env: dict[str, Any] | None = None,
        _client_job: bool = False,
        metadata: dict[str, str] | None = None,
        ray_namespace: str | None = None,
        default_actor_lifetime: str = "non_detached",
        _disable_job_level_lineage_reconstruction: bool = False,
        _py_driver_sys_path: list[str] | None = None,
    ) -> None:
        if jvm_options:
            raise NotImplementedError("jvm_options: workers in Java are not built")
        if _client_job:
            raise NotImplementedError("_client_job: Ray Client is not built yet")
        if _disable_job_level_lineage_reconstruction:
            raise NotImplementedError("_disable_job_level_lineage_reconstruction is not built yet; use max_retries=0")
        if isinstance(code_search_path, str):
            raise TypeError(
                f"The type of code search path is incorrect: it must be a list of strings, got {code_search_path!r}"
            )
        self.jvm_options: list[str] = []
        self.code_search_path = list(code_search_path or [])
        self._client_job = False
        self.metadata = dict(metadata or {})
        self.ray_namespace = ray_namespace
        self.py_logging_config: LoggingConfig | None = None
        self._py_driver_sys_path = list(_py_driver_sys_path or [])
        self.runtime_env: dict[str, Any] = {}
        self.set_runtime_env(runtime_env)
        self.set_default_actor_lifetime(default_actor_lifetime)

    def set_metadata(self, key: str, value: str) -> None:
        """Adds a text that is shown with the job."""
        self.metadata[key] = value

    def set_ray_namespace(self, ray_namespace: str) -> None:
        """Sets the namespace of the job's named actors."""
        self.ray_namespace = ray_namespace

    def set_default_actor_lifetime(self, default_actor_lifetime: str) -> None:
        """Sets the lifetime of actors whose options do not say one. Raises ValueError."""
        if default_actor_lifetime not in _LIFETIMES:
            raise ValueError(
                f"Default actor lifetime must be one of `detached`, `non_detached` (got {default_actor_lifetime!r})"
            )
        self._default_actor_lifetime = default_actor_lifetime

    def set_runtime_env(self, runtime_env: dict[str, Any] | RuntimeEnv | None, validate: bool = False) -> None:
        """Sets the environment of the job's tasks and actors. Raises ValueError, TypeError, NotImplementedError."""
        del validate  # It is always checked.
        if runtime_env is None:
            self.runtime_env = {}
        elif isinstance(runtime_env, dict):
            self.runtime_env = RuntimeEnv(**runtime_env)
        else:
            raise TypeError(f"runtime_env must be a dict, got {runtime_env!r}")

    def set_py_logging_config(self, logging_config: LoggingConfig | None = None) -> None:
        """Sets how the driver and its workers log."""
        self.py_logging_config = logging_config

    def ensure_logging_config(self, logging_config: LoggingConfig | None = None) -> None:
        """As `set_py_logging_config`, where none is set yet."""
        if self.py_logging_config is None:
            self.py_logging_config = logging_config

    @classmethod
    def from_json(cls, job_config_json: dict[str, Any] | str) -> JobConfig:
        """The settings of JSON, as text or parsed.

        Raises:
            ValueError: an unknown field.
        """
        fields = json.loads(job_config_json) if isinstance(job_config_json, str) else dict(job_config_json)
        names = {"namespace": "ray_namespace", "py_driver_sys_path": "_py_driver_sys_path"}
        known = {
            "jvm_options",
            "code_search_path",
            "runtime_env",
            "metadata",
            "ray_namespace",
            "default_actor_lifetime",
            "_py_driver_sys_path",
        }
        arguments = {names.get(key, key): value for key, value in fields.items()}
        unknown = arguments.keys() - known
        if unknown:
            raise ValueError(f"a job config has no field {sorted(unknown)}; it has {sorted(known)}")
        return cls(**arguments)

    def to_dict(self) -> dict[str, Any]:
        """The settings as the cluster stores them, in JSON's types."""
        return {
            "namespace": self.ray_namespace or "",
            "runtime_env": dict(self.runtime_env),
            "metadata": self.metadata,
            "code_search_path": self.code_search_path,
            "py_driver_sys_path": self._py_driver_sys_path,
            "default_actor_lifetime": self._default_actor_lifetime,
            "logging_config": self.py_logging_config.to_dict() if self.py_logging_config else None,
        }


__all__ = ["JobConfig", "LoggingConfig"]
