"""The environment of tasks and actors: environment variables, and later code and packages.

A child inherits its parent's environment: variables merge by name, other fields are replaced.

Invariant: 1. What is not built raises `NotImplementedError` where it is asked for, before anything is submitted.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable
from copy import deepcopy
from typing import Any

# Fields that are known but not built, with what is missing.
_UNBUILT = {
    "working_dir": "directories shipped to workers",
    "py_modules": "modules shipped to workers",
    "excludes": "it belongs to working_dir, which is not built",
    "py_executable": "workers of another interpreter",
    "java_jars": "workers in Java",
    "pip": "packages installed by pip",
    "uv": "packages installed by uv",
    "conda": "conda environments",
    "container": "containers",
    "image_uri": "containers",
    "nsight": "profiling with Nsight",
    "rocprof_sys": "profiling with rocprof-sys",
    "worker_process_setup_hook": "a hook at the start of each worker",
    "mpi": "workers under MPI",
    "_nsight": "profiling with Nsight",
    "_rocprof_sys": "profiling with rocprof-sys",
}
_BUILT = ("env_vars", "config")
_VARIABLE = re.compile(r"\$\{([^}]+)\}")
DEFAULT_SETUP_TIMEOUT_S = 600


class RuntimeEnvConfig(dict):
    """How an environment is set up.

    Args:
        setup_timeout_seconds: how long setting up may take; -1 without limit.
        eager_install: whether a job's environment is made when the job starts.
        log_files: not built; must be empty.

    Raises:
        ValueError, TypeError: a field makes no sense.
    """

    known_fields = {"setup_timeout_seconds", "eager_install", "log_files"}

    def __init__(
        self,
        setup_timeout_seconds: int = DEFAULT_SETUP_TIMEOUT_S,
        eager_install: bool = True,
        log_files: list[str] | None = None,
    ) -> None:
        super().__init__()
        if not isinstance(setup_timeout_seconds, int) or isinstance(setup_timeout_seconds, bool):
            raise TypeError(f"setup_timeout_seconds must be of type int, got: {type(setup_timeout_seconds)}")
        if setup_timeout_seconds <= 0 and setup_timeout_seconds != -1:
            raise ValueError(
                f"setup_timeout_seconds must be greater than zero or equals to -1, got: {setup_timeout_seconds}"
            )
        if not isinstance(eager_install, bool):
            raise TypeError(f"eager_install must be a boolean. got {type(eager_install)}")
        if log_files:
            raise NotImplementedError("runtime_env config log_files: further log files are not built yet")
        self["setup_timeout_seconds"] = setup_timeout_seconds
        self["eager_install"] = eager_install
        self["log_files"] = []

    @staticmethod
    def parse_and_validate_runtime_env_config(config: dict[str, Any] | RuntimeEnvConfig) -> RuntimeEnvConfig:
        """The config of a dict. Raises TypeError, ValueError."""
        if isinstance(config, RuntimeEnvConfig):
            return config
        if not isinstance(config, dict):
            raise TypeError(f"runtime_env['config'] must be of type dict or RuntimeEnvConfig, got: {type(config)}")
        unknown = config.keys() - RuntimeEnvConfig.known_fields
        if unknown:
            raise ValueError(
                f"runtime_env['config'] has no field {sorted(unknown)}; it has {sorted(RuntimeEnvConfig.known_fields)}"
            )
        return RuntimeEnvConfig(**config)

    @classmethod
    def default_config(cls) -> RuntimeEnvConfig:
        """The defaults."""
        return cls()

    def build_proto_runtime_env_config(self) -> dict[str, Any]:
        """The config as messages carry it."""
        return self.to_dict()

    @classmethod
    def from_proto(cls, runtime_env_config: dict[str, Any]) -> RuntimeEnvConfig:
        """The config of `build_proto_runtime_env_config`."""
        return cls(**runtime_env_config)

    def to_dict(self) -> dict[str, Any]:
        """A plain dict."""
        return dict(deepcopy(self))


class RuntimeEnv(dict):
    """An environment of tasks and actors.

    Args:
        env_vars: environment variables, set before anything of the user's is imported. ``${NAME}`` stands for the
            value that the worker would have otherwise.
        config: how it is set up.

    Raises:
        TypeError, ValueError: a field makes no sense or is unknown.
        NotImplementedError: a field that is not built.

    Example:
        >>> @ray.remote(runtime_env=RuntimeEnv(env_vars={"OMP_NUM_THREADS": "4"}))
        ... def f(): ...
    """

    known_fields = {*_BUILT, *_UNBUILT}

    def __init__(
        self,
        *,
        py_modules: list[str] | None = None,
        py_executable: str | None = None,
        working_dir: str | None = None,
        pip: Any = None,
        conda: Any = None,
        container: Any = None,
        env_vars: dict[str, str] | None = None,
        worker_process_setup_hook: Any = None,
        nsight: Any = None,
        rocprof_sys: Any = None,
        config: dict[str, Any] | RuntimeEnvConfig | None = None,
        _validate: bool = True,
        image_uri: str | None = None,
        uv: Any = None,
        **kwargs: Any,
    ) -> None:
        super().__init__()
        del _validate  # It is always checked.
        fields = {
            "py_modules": py_modules,
            "py_executable": py_executable,
            "working_dir": working_dir,
            "pip": pip,
            "conda": conda,
            "container": container,
            "env_vars": env_vars,
            "worker_process_setup_hook": worker_process_setup_hook,
            "nsight": nsight,
            "rocprof_sys": rocprof_sys,
            "config": config,
            "image_uri": image_uri,
            "uv": uv,
            **kwargs,
        }
        for name, value in fields.items():
            if value is not None:
                self[name] = value

    def __setitem__(self, name: str, value: Any) -> None:
        super().__setitem__(name, _checked(name, value))

    def set(self, name: str, value: Any) -> None:
        """Sets a field; None takes it away."""
        if value is None:
            self.pop(name, None)
        else:
            self[name] = value

    def get(self, name: str, default: Any = None, data_class: type | None = None) -> Any:
        """A field, as `data_class` where one is given."""
        if name not in self:
            return default
        value = super().__getitem__(name)
        return value if data_class is None else data_class(**value) if isinstance(value, dict) else data_class(value)

    def serialize(self) -> str:
        """The environment as JSON with sorted keys: equal environments give equal text."""
        return json.dumps(self, sort_keys=True)

    @classmethod
    def deserialize(cls, serialized_runtime_env: str) -> RuntimeEnv:
        """The environment of `serialize`."""
        return cls(**json.loads(serialized_runtime_env or "{}"))

    def to_dict(self) -> dict[str, Any]:
        """A plain dict."""
        return deepcopy(dict(self))

    def env_vars(self) -> dict[str, str]:
        """The environment variables."""
        return dict(super().get("env_vars", {}))

    def working_dir(self) -> str:
        """The working directory; empty, because none can be set."""
        return super().get("working_dir", "")

    def working_dir_uri(self) -> str | None:
        """Where the working directory's package lies."""
        return super().get("working_dir")

    def has_working_dir(self) -> bool:
        """Whether a working directory is set."""
        return bool(super().get("working_dir"))

    def py_modules(self) -> list[str]:
        """Modules shipped to workers."""
        return list(super().get("py_modules", []))

    def py_modules_uris(self) -> list[str]:
        """Where the packages of modules lie."""
        return list(super().get("py_modules", []))

    def py_executable(self) -> str | None:
        """The interpreter of workers."""
        return super().get("py_executable")

    def plugin_uris(self) -> list[str]:
        """Packages of plugins."""
        return []

    def plugins(self) -> list[tuple[str, Any]]:
        """Fields that plugins handle."""
        return []

    def has_pip(self) -> bool:
        """Whether pip installs something."""
        return bool(super().get("pip"))

    def pip_config(self) -> dict[str, Any]:
        """What pip installs."""
        return dict(super().get("pip", {}))

    def pip_uri(self) -> str | None:
        """Where the environment that pip made lies."""
        return None

    def virtualenv_name(self) -> str | None:
        """Name of the virtual environment."""
        return None

    def has_uv(self) -> bool:
        """Whether uv installs something."""
        return bool(super().get("uv"))

    def uv_config(self) -> dict[str, Any]:
        """What uv installs."""
        return dict(super().get("uv", {}))

    def uv_uri(self) -> str | None:
        """Where the environment that uv made lies."""
        return None

    def has_conda(self) -> bool:
        """Whether conda makes an environment."""
        return bool(super().get("conda"))

    def conda_config(self) -> str | None:
        """What conda installs."""
        return super().get("conda")

    def conda_env_name(self) -> str | None:
        """Name of conda's environment."""
        return super().get("conda")

    def conda_uri(self) -> str | None:
        """Where conda's environment lies."""
        return None

    def image_uri(self) -> str | None:
        """The container's image."""
        return super().get("image_uri")

    def has_py_container(self) -> bool:
        """Whether workers run in a container."""
        return bool(super().get("container"))

    def py_container_image(self) -> str | None:
        """The container's image."""
        return None

    def py_container_worker_path(self) -> str | None:
        """The worker's program in the container."""
        return None

    def py_container_run_options(self) -> list[str]:
        """Options of the container's start."""
        return []

    def java_jars(self) -> list[str]:
        """Archives for workers in Java."""
        return []

    def nsight(self) -> Any:
        """Profiling with Nsight."""
        return super().get("nsight")

    def rocprof_sys(self) -> Any:
        """Profiling with rocprof-sys."""
        return super().get("rocprof_sys")

    def get_extension(self, key: str) -> Any:
        """A field that is not one of the known ones."""
        return super().get(key) if key not in self.known_fields else None


def _checked(name: str, value: Any) -> Any:
    if name == "env_vars":
        if not isinstance(value, dict):
            raise TypeError(f"runtime_env['env_vars'] must be of type Dict[str, str], got {type(value)}")
        for key, item in value.items():
            if not isinstance(key, str):
                raise TypeError(
                    "runtime_env['env_vars'] must be of type Dict[str, str], but the key "
                    f"{key!r} is of type {type(key)}"
                )
            if not isinstance(item, str):
                raise TypeError(
                    "runtime_env['env_vars'] must be of type Dict[str, str], but the value "
                    f"{item!r} is of type {type(item)}"
                )
            if not key or "=" in key or "\0" in key + item:
                raise ValueError(f"runtime_env['env_vars'] cannot set {key!r}: no environment can hold that")
        return dict(value)
    if name == "config":
        return RuntimeEnvConfig.parse_and_validate_runtime_env_config(value)
    if name in _UNBUILT:
        raise NotImplementedError(f"runtime_env[{name!r}] is not built yet: {_UNBUILT[name]}")
    raise ValueError(
        f"runtime_env has no field {name!r}; it has {_names(_BUILT)} (and, not built yet, {_names(_UNBUILT)})"
    )


def _names(names: Iterable[str]) -> str:
    return ", ".join(sorted(name for name in names if not name.startswith("_")))


def merge_runtime_env(parent: dict[str, Any], child: dict[str, Any] | None) -> dict[str, Any]:
    """The environment of a child: its own fields over its parent's, variables merged by name.

    Example:
        >>> merge_runtime_env({"env_vars": {"A": "1", "B": "2"}}, {"env_vars": {"B": "3"}})
        {'env_vars': {'A': '1', 'B': '3'}}
    """
    if not child:
        return dict(parent)
    checked = child if isinstance(child, RuntimeEnv) else RuntimeEnv(**child)
    merged = {**parent, **checked}
    variables = {**parent.get("env_vars", {}), **checked.get("env_vars", {})}
    if variables:
        merged["env_vars"] = variables
    return merged


def resolve_runtime_env(parent: dict[str, Any], child: dict[str, Any] | None) -> str:
    """As `merge_runtime_env`, as JSON; empty text for an empty environment. Raises what `RuntimeEnv` raises."""
    merged = merge_runtime_env(parent, child)
    merged.pop("config", None)
    return json.dumps(merged, sort_keys=True) if merged else ""


def expand_variables(variables: dict[str, str]) -> dict[str, str]:
    """`variables` with each ``${NAME}`` replaced by this process's value of it; names that it has not stay as they are.

    Example:
        >>> expand_variables({"PATH": "/opt/tool:${PATH}"})  # doctest: +SKIP
        {'PATH': '/opt/tool:/usr/bin:/bin'}
    """

    def current(match: re.Match[str]) -> str:
        return os.environ.get(match.group(1), match.group(0))

    # In one pass: what a value brings in is not looked at again.
    return {key: _VARIABLE.sub(current, value) for key, value in variables.items()}
