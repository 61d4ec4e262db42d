"""Prints in the driver what workers print, each line with who printed it, repeated ones gathered.

Invariants:

1. A line is printed when it is first seen; equal lines (numbers aside) of several processes within a window are held
   back and printed once, with their count.
2. Nothing that was held back is lost: the rest is printed when the window ends and at shutdown.
"""

from __future__ import annotations

import os
import re
import sys
import threading
import time
from collections import OrderedDict
from typing import TYPE_CHECKING, Any, TextIO

from ray._private import ray_constants

if TYPE_CHECKING:
    from ray._raylet import CoreWorker

_NUMBERS = re.compile(r"0x[0-9a-fA-F]+|\d+")
_HINT = (
    " (Ray deduplicates logs by default. Set RAY_DEDUP_LOGS=0 to disable log deduplication, or RAY_DEDUP_LOGS_AGG_"
    "WINDOW_S to change how long repeated lines are gathered.)"
)
_CYAN, _YELLOW, _GREEN, _RESET = "\033[36m", "\033[33m", "\033[32m", "\033[0m"

# At the end of the program: the raylet looks at logs at intervals, so silence shorter than one means nothing.
_DRAIN_QUIET_S = 0.1
_DRAIN_LIMIT_S = 1.0


class _Group:
    """Lines that are equal but for their numbers."""

    __slots__ = ("count", "last", "sources", "since")

    def __init__(self, now: float, source: tuple[Any, ...]) -> None:
        self.since = now
        self.count = 0
        self.last: tuple[dict[str, Any], str] | None = None
        self.sources = {source}


class Deduplicator:
    """Decides which lines are printed; time is an argument."""

    def __init__(
        self,
        window_s: float = ray_constants.RAY_DEDUP_LOGS_AGG_WINDOW_S,
        allow: str | None = os.environ.get("RAY_DEDUP_LOGS_ALLOW_REGEX"),
        skip: str | None = os.environ.get("RAY_DEDUP_LOGS_SKIP_REGEX"),
    ) -> None:
        self.window_s = window_s
        self.allow = re.compile(allow) if allow else None
        self.skip = re.compile(skip) if skip else None
        self.groups: OrderedDict[str, _Group] = OrderedDict()

    def accept(self, batch: dict[str, Any], now: float) -> list[tuple[dict[str, Any], str, int]]:
        """Lines to print now, each with how often it was held back before (0: not at all)."""
        out = self.due(now)
        source = (batch.get("host"), batch.get("pid"))
        for line in batch["lines"]:
            if self.skip is not None and self.skip.search(line):
                continue
            if self.allow is not None and self.allow.search(line):
                out.append((batch, line, 0))
                continue
            key = _NUMBERS.sub("", line).strip()
            if not key:
                out.append((batch, line, 0))
                continue
            group = self.groups.get(key)
            if group is None:
                self.groups[key] = _Group(now, source)
                if len(self.groups) > ray_constants.RAY_DEDUP_LOGS_LIMIT:
                    _, oldest = self.groups.popitem(last=False)
                    out += _emit(oldest)
                out.append((batch, line, 0))
            elif source in group.sources and len(group.sources) == 1:
                # One process that repeats itself is not gathered: it may be showing progress.
                group.since = now
                self.groups.move_to_end(key)
                out.append((batch, line, 0))
            else:
                group.sources.add(source)
                group.count += 1
                group.last = (batch, line)
        return out

    def due(self, now: float) -> list[tuple[dict[str, Any], str, int]]:
        """Lines whose window is over."""
        out = []
        while self.groups:
            key, group = next(iter(self.groups.items()))
            if now - group.since < self.window_s:
                break
            del self.groups[key]
            out += _emit(group)
        return out

    def flush(self) -> list[tuple[dict[str, Any], str, int]]:
        """Everything that is held back."""
        out = [entry for group in self.groups.values() for entry in _emit(group)]
        self.groups.clear()
        return out


def _emit(group: _Group) -> list[tuple[dict[str, Any], str, int]]:
    return [(*group.last, group.count)] if group.last is not None else []


class LogPrinter:
    """The driver's thread that prints."""

    def __init__(self, core: CoreWorker, out: TextIO | None = None, err: TextIO | None = None) -> None:
        self._core = core
        self._out = out
        self._err = err
        self._hinted = False
        self._received_at = 0.0
        self._dedup = Deduplicator() if ray_constants.env_bool("RAY_DEDUP_LOGS", True) else None
        self._host = ""
        self._thread = threading.Thread(target=self._run, name="ray-log-printer", daemon=True)

    def start(self) -> None:
        """Starts printing."""
        self._thread.start()

    def join(self) -> None:
        """Waits until what was received is printed; after the core's shutdown, at most 2 s."""
        if self._thread is not threading.current_thread():
            self._thread.join(2.0)

    def drain(self) -> None:
        """Gives lines that are under way a moment to arrive: until none came for a while, within a limit."""
        start = time.monotonic()
        while self._thread.is_alive():
            now = time.monotonic()
            quiet_s = now - max(start, self._received_at)
            if quiet_s >= _DRAIN_QUIET_S or now - start >= _DRAIN_LIMIT_S:
                return
            self._thread.join(_DRAIN_QUIET_S - quiet_s)

    def _run(self) -> None:
        while True:
            try:
                batches = self._core.next_log_line(0.2)
            except Exception as error:
                self._write(sys.stderr, f"the log printer stopped: {error}\n")
                break
            if batches is None:
                break
            now = time.monotonic()
            for batch in batches:
                self.print_batch(batch, now)
            if batches:
                self._received_at = now
            elif self._dedup is not None:
                self._print_all(self._dedup.due(now))
        if self._dedup is not None:
            self._print_all(self._dedup.flush())

    def print_batch(self, batch: dict[str, Any], now: float) -> None:
        """Prints a batch of lines, or a message of the runtime."""
        if "message" in batch:
            stream = self._err or sys.stderr
            color = _YELLOW if _has_colors(stream) else ""
            self._write(stream, f"{color}(raylet){_RESET if color else ''} {batch['message']}\n")
            return
        if self._dedup is None:
            self._print_all([(batch, line, 0) for line in batch["lines"]])
        else:
            self._print_all(self._dedup.accept(batch, now))

    def _print_all(self, lines: list[tuple[dict[str, Any], str, int]]) -> None:
        for batch, line, count in lines:
            stream = (self._err or sys.stderr) if batch.get("is_error") else (self._out or sys.stdout)
            self._write(stream, self._format(batch, line, count, _has_colors(stream)) + "\n")

    def _format(self, batch: dict[str, Any], line: str, count: int, colors: bool) -> str:
        who = batch.get("name") or ""
        host = batch.get("host") or ""
        where = f", ip={host}" if host and host != self.local_host else ""
        prefix = f"({who + ' ' if who else ''}pid={batch.get('pid')}{where})"
        note = ""
        if count:
            note = f" [repeated {count}x across cluster]"
            if not self._hinted:
                self._hinted = True
                note += _HINT
        if colors:
            return f"{_CYAN}{prefix}{_RESET} {line}" + (f"{_GREEN}{note}{_RESET}" if note else "")
        return f"{prefix} {line}{note}"

    @property
    def local_host(self) -> str:
        """The address of this node, which prefixes leave out."""
        if not self._host:
            from ray._private.worker import global_worker

            context = global_worker.init_context
            self._host = context.address_info.get("node_ip_address", "") if context is not None else ""
        return self._host

    @staticmethod
    def _write(stream: TextIO, text: str) -> None:
        try:
            stream.write(text)
            stream.flush()
        except (OSError, ValueError):
            # Standard output may be closed already; the text is in the worker's log all the same.
            return


def _has_colors(stream: TextIO) -> bool:
    if os.environ.get("RAY_COLOR_PREFIX") == "0" or os.environ.get("NO_COLOR"):
        return False
    try:
        return stream.isatty()
    except ValueError:
        return False
