"""How the driver and its workers log."""

from __future__ import annotations

import json
import logging
import sys
from dataclasses import dataclass, field
from typing import Any

from ray._private.ray_logger import set_up_ray_logger

_STANDARD_ATTRIBUTES = frozenset(
    vars(logging.LogRecord("", 0, "", 0, "", (), None)).keys() | {"message", "asctime", "taskName"}
)
_ALWAYS = ("asctime", "levelname", "message", "filename", "lineno")


@dataclass
class LoggingConfig:
    """Settings of Python's root logger in the driver and its workers.

    Args:
        encoding: "TEXT", or "JSON" for one object a line with the ids of job, node, worker, actor and task.
        log_level: level of the root logger.
        additional_log_standard_attrs: further attributes of log records to write.

    Raises:
        ValueError: an unknown encoding or attribute.

    Example:
        >>> ray.init(logging_config=ray.LoggingConfig(encoding="JSON", log_level="DEBUG"))
    """

    encoding: str = "TEXT"
    log_level: str = "INFO"
    additional_log_standard_attrs: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        if self.encoding not in ("TEXT", "JSON"):
            raise ValueError(f"Invalid encoding type: {self.encoding}. Valid encoding types are: ['TEXT', 'JSON']")
        if not isinstance(self.log_level, str) or not isinstance(logging.getLevelName(self.log_level.upper()), int):
            raise ValueError(f"Invalid log level: {self.log_level!r}. It is a name such as INFO or DEBUG.")
        for name in self.additional_log_standard_attrs:
            if name not in _STANDARD_ATTRIBUTES:
                raise ValueError(
                    f"Unknown python logging standard attribute: {name}. The valid attributes are: "
                    f"{sorted(_STANDARD_ATTRIBUTES)}"
                )

    @classmethod
    def from_dict(cls, d: dict[str, Any]) -> LoggingConfig:
        """The settings of `to_dict`."""
        return cls(**d)

    def to_dict(self) -> dict[str, Any]:
        """The settings in JSON's types."""
        return {
            "encoding": self.encoding,
            "log_level": self.log_level,
            "additional_log_standard_attrs": list(self.additional_log_standard_attrs),
        }

    def _apply(self) -> None:
        """Sets up this process's root logger."""
        handler = logging.StreamHandler(sys.stderr)
        handler.setFormatter(_Formatter(self.encoding, self.additional_log_standard_attrs))
        root = logging.getLogger()
        for old in [h for h in root.handlers if isinstance(h.formatter, _Formatter)]:
            root.removeHandler(old)
        root.addHandler(handler)
        root.setLevel(self.log_level.upper())
        logging.getLogger("ray").propagate = False
        set_up_ray_logger(self.log_level, None, handler)


class _Formatter(logging.Formatter):
    def __init__(self, encoding: str, attributes: list[str]) -> None:
        super().__init__()
        self.encoding = encoding
        self.attributes = [*_ALWAYS, *(name for name in attributes if name not in _ALWAYS)]

    def format(self, record: logging.LogRecord) -> str:
        record.asctime = self.formatTime(record)
        record.message = record.getMessage()
        if record.exc_info and not record.exc_text:
            record.exc_text = self.formatException(record.exc_info)
        ids = _current_ids()
        if self.encoding == "TEXT":
            head = f"{record.asctime}\t{record.levelname} {record.filename}:{record.lineno} -- {record.message}"
            more = "".join(f" {name}={getattr(record, name, None)}" for name in self.attributes if name not in _ALWAYS)
            text = head + more + "".join(f" {name}={value}" for name, value in ids.items())
            return f"{text}\n{record.exc_text}" if record.exc_text else text
        fields: dict[str, Any] = {name: getattr(record, name, None) for name in self.attributes}
        fields.update({k: v for k, v in vars(record).items() if k not in _STANDARD_ATTRIBUTES})
        if record.exc_text:
            fields["exc_text"] = record.exc_text
        return json.dumps({**fields, **ids}, default=str)


def _current_ids() -> dict[str, str]:
    from ray._private.context import current

    context = current.context
    if context is None:
        return {}
    core = context.core
    ids = {"job_id": core.job_id().hex(), "worker_id": core.worker_id().hex(), "node_id": core.node_id().hex()}
    actor, task = core.current_actor_id(), core.current_task_id()
    if actor and actor.strip(b"\xff"):
        ids["actor_id"] = actor.hex()
    if task and task.strip(b"\xff"):
        ids["task_id"] = task.hex()
    return ids
