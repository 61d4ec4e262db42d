"""The text of an exception as the driver sees it."""

from __future__ import annotations

import traceback


def format_remote_traceback(head: str, error: BaseException, skip_directories: tuple[str, ...] = ()) -> str:
    """The text of `error` as a driver sees it: `head`, the frames outside these directories, the error's own line."""
    summary = traceback.TracebackException.from_exception(error, capture_locals=False)
    _drop_frames(summary, skip_directories)
    lines = list(summary.format())
    if lines and lines[0].startswith("Traceback (most recent call last)") and summary.__cause__ is None:
        if summary.__context__ is None or summary.__suppress_context__:
            lines = lines[1:]
    return head + "\n" + "".join(lines).rstrip("\n")


def _drop_frames(summary: traceback.TracebackException | None, skip_directories: tuple[str, ...]) -> None:
    seen: set[int] = set()
    pending = [summary]
    while pending:
        current = pending.pop()
        if current is None or id(current) in seen:
            continue
        seen.add(id(current))
        if skip_directories:
            current.stack[:] = [frame for frame in current.stack if not frame.filename.startswith(skip_directories)]
        pending += [current.__cause__, current.__context__]
