"""Where the runtime's own messages go. Apart from `logging_config`, because every process needs this at its start."""

from __future__ import annotations

import logging
import sys

from ray._private import ray_constants


def set_up_ray_logger(level: str | int | None, log_format: str | None, handler: logging.Handler | None = None) -> None:
    """Has the runtime's own messages written to standard error, once."""
    ray_logger = logging.getLogger("ray")
    for old in list(ray_logger.handlers):
        ray_logger.removeHandler(old)
    if handler is None:
        handler = logging.StreamHandler(sys.stderr)
        handler.setFormatter(logging.Formatter(log_format or ray_constants.LOGGER_FORMAT))
    ray_logger.addHandler(handler)
    ray_logger.propagate = False
    if level is None:
        level = ray_constants.LOGGER_LEVEL
    ray_logger.setLevel(level.upper() if isinstance(level, str) else level)
