"""Names and limits that several modules share."""

from __future__ import annotations

import os

RAY_VERSION = "2.60.0"
RAY_COMMIT = "heliostat"

# Environment variables that `ray.init` reads.
RAY_ADDRESS_ENVIRONMENT_VARIABLE = "RAY_ADDRESS"
RAY_NAMESPACE_ENVIRONMENT_VARIABLE = "RAY_NAMESPACE"
RAY_RUNTIME_ENV_ENVIRONMENT_VARIABLE = "RAY_RUNTIME_ENV"
RAY_JOB_CONFIG_JSON_ENV_VAR = "RAY_JOB_CONFIG_JSON_ENV_VAR"

# Modes of a process.
SCRIPT_MODE = 0
WORKER_MODE = 1
LOCAL_MODE = 2
SPILL_WORKER_MODE = 3
RESTORE_WORKER_MODE = 4

# Exported functions and classes above this size go to the key-value store instead of travelling with each template.
INLINE_FUNCTION_LIMIT_BYTES = 256 * 1024
# A pickled function above this size is worth a warning, and above the other one it is refused.
FUNCTION_SIZE_WARN_THRESHOLD_BYTES = 10**7
FUNCTION_SIZE_ERROR_THRESHOLD_BYTES = int(os.environ.get("RAY_FUNCTION_SIZE_ERROR_THRESHOLD", 95 * 1024 * 1024))
FUNCTION_NAMESPACE = b"fun"
# A worker waits this long for an exported function that the key-value store does not have yet.
FUNCTION_FETCH_TIMEOUT_S = 30.0

DEFAULT_TASK_MAX_RETRIES = int(os.environ.get("RAY_TASK_MAX_RETRIES", 3))
DEFAULT_ACTOR_MAX_CONCURRENCY_ASYNC = 1000
# `num_returns` of generators.
NUM_RETURNS_DYNAMIC = -1
NUM_RETURNS_STREAMING = -2
# Quantities of resources are counted in ten-thousandths.
RESOURCE_PRECISION = 10_000

LOGGER_FORMAT = "%(asctime)s\t%(levelname)s %(filename)s:%(lineno)s -- %(message)s"
LOGGER_LEVEL = "info"
LOGGER_LEVEL_CHOICES = ["debug", "info", "warning", "error", "critical"]

# How long repeated log lines are held back, and how many distinct ones are remembered.
RAY_DEDUP_LOGS_AGG_WINDOW_S = float(os.environ.get("RAY_DEDUP_LOGS_AGG_WINDOW_S", 5))
RAY_DEDUP_LOGS_LIMIT = 10_000
LOG_PREFIX_ACTOR_NAME = ":actor_name:"
LOG_PREFIX_TASK_NAME = ":task_name:"

# Environment variables that carry a lease's devices, by resource name.
VISIBLE_DEVICES_VARIABLES = {"GPU": "CUDA_VISIBLE_DEVICES"}


def env_bool(name: str, default: bool) -> bool:
    """The truth value of environment variable `name` ("1" and "true" are true), or `default` where it is not set."""
    value = os.environ.get(name)
    return default if value is None else value.strip().lower() in ("1", "true")
