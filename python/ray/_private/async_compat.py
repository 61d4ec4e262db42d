"""References in coroutines and futures.

An event loop reads the eventfd of a completion queue; without a loop one thread, started when first needed and gone
when nothing is pending, drains another. The extension delegates `ObjectRef`'s `future`, `as_future`, `__await__` and
`_on_completed` to this module.

Invariant: 1. A callback runs once, also where the runtime shuts down first: then with an exception.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import itertools
import logging
import threading
import weakref
from collections.abc import Callable, Generator
from typing import TYPE_CHECKING, Any

from ray import exceptions
from ray._private.context import ensure_context

if TYPE_CHECKING:
    from ray._raylet import CompletionQueue, CoreWorker, ObjectRef, StreamCore

logger = logging.getLogger(__name__)

_tokens = itertools.count(1)
_IDLE_S = 5.0


def _fetch(core: CoreWorker, reference: ObjectRef[Any]) -> tuple[Any, BaseException | None]:
    try:
        return core.get_one(reference, 0.0), None
    except exceptions.GetTimeoutError:
        # Known, but its bytes are not here yet.
        raise
    except BaseException as error:
        return None, error


class _LoopWaiter:
    """Completions for one event loop in one connection."""

    def __init__(self, core: CoreWorker, loop: asyncio.AbstractEventLoop) -> None:
        from ray._raylet import CompletionQueue

        self.core = core
        self.queue: CompletionQueue = CompletionQueue(core)
        self.pending: dict[int, Callable[[], None]] = {}
        loop.add_reader(self.queue.fileno(), self.drain)

    def drain(self) -> None:
        for token in self.queue.drain():
            callback = self.pending.pop(token, None)
            if callback is not None:
                callback()


_waiters: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, _LoopWaiter] = weakref.WeakKeyDictionary()


def _loop_waiter(loop: asyncio.AbstractEventLoop) -> _LoopWaiter:
    core = ensure_context().core
    waiter = _waiters.get(loop)
    if waiter is None or waiter.core is not core:
        if waiter is not None:
            loop.remove_reader(waiter.queue.fileno())
        waiter = _waiters[loop] = _LoopWaiter(core, loop)
    return waiter


def as_future(reference: ObjectRef[Any], _internal: bool = False) -> asyncio.Future[Any]:
    """An asyncio future of the running loop, done when the object is there."""
    del _internal
    loop = asyncio.get_running_loop()
    waiter = _loop_waiter(loop)
    future: asyncio.Future[Any] = loop.create_future()
    token = next(_tokens)

    def settle(value: Any, error: BaseException | None) -> None:
        if future.done():
            return
        if error is None:
            future.set_result(value)
        elif isinstance(error, StopIteration):
            future.set_exception(RuntimeError(f"task raised {error!r}"))
        else:
            future.set_exception(error)

    def done() -> None:
        if future.done():
            return
        try:
            value, error = _fetch(waiter.core, reference)
        except exceptions.GetTimeoutError:
            # It is on its way from another node: a thread waits for it, the loop goes on.
            pulling = loop.run_in_executor(None, waiter.core.get_one, reference, None)
            pulling.add_done_callback(
                lambda finished: settle(None if finished.exception() else finished.result(), finished.exception())
            )
            return
        settle(value, error)

    waiter.pending[token] = done
    future.add_done_callback(lambda _: waiter.pending.pop(token, None))
    waiter.queue.watch(reference, token)
    return future


def await_reference(reference: ObjectRef[Any]) -> Generator[Any, None, Any]:
    """What `await reference` runs."""
    return as_future(reference).__await__()


def watch_stream(stream: StreamCore) -> asyncio.Future[None]:
    """An asyncio future, done when the stream's next item or its end is known."""
    loop = asyncio.get_running_loop()
    waiter = _loop_waiter(loop)
    future: asyncio.Future[None] = loop.create_future()
    token = next(_tokens)
    waiter.pending[token] = lambda: None if future.done() else future.set_result(None)
    future.add_done_callback(lambda _: waiter.pending.pop(token, None))
    stream.watch_next(waiter.queue, token)
    return future


def stream_ready(stream: StreamCore) -> bool:
    """Whether the stream's next item or its end is known already."""
    from ray._raylet import CompletionQueue

    queue = CompletionQueue(ensure_context().core)
    stream.watch_next(queue, 1)
    return queue.wait(0.0)


class _CompletionThread:
    """Drains one completion queue while something is pending."""

    def __init__(self, core: CoreWorker) -> None:
        from ray._raylet import CompletionQueue

        self.core = core
        self.queue: CompletionQueue = CompletionQueue(core)
        self.lock = threading.Lock()
        self.pending: dict[int, Callable[[], None]] = {}
        self.running = False
        self.closed = False

    def watch(self, reference: ObjectRef[Any], callback: Callable[[], None]) -> None:
        token = next(_tokens)
        with self.lock:
            if self.closed:
                raise RuntimeError("the runtime was shut down")
            self.pending[token] = callback
            start, self.running = not self.running, True
        self.queue.watch(reference, token)
        if start:
            threading.Thread(target=self.run, name="ray-completions", daemon=True).start()

    def run(self) -> None:
        while True:
            woken = self.queue.wait(_IDLE_S)
            for token in self.queue.drain():
                with self.lock:
                    callback = self.pending.pop(token, None)
                if callback is not None:
                    try:
                        callback()
                    except Exception:
                        logger.exception("a callback of an ObjectRef raised")
            with self.lock:
                if self.closed or (not woken and not self.pending):
                    self.running = False
                    return

    def close(self) -> None:
        with self.lock:
            self.closed = True
            pending, self.pending = self.pending, {}
        for callback in pending.values():
            callback()


_thread: _CompletionThread | None = None
_thread_lock = threading.Lock()


def _completion_thread() -> _CompletionThread:
    global _thread
    core = ensure_context().core
    with _thread_lock:
        if _thread is None or _thread.core is not core:
            _thread = _CompletionThread(core)
        return _thread


def on_completed(reference: ObjectRef[Any], callback: Callable[[Any], None]) -> None:
    """Calls `callback` with the value, or with the exception, once the object is there; on a thread of its own."""
    thread = _completion_thread()

    def done() -> None:
        try:
            value = thread.core.get_one(reference, None)
        except BaseException as error:
            value = error
        callback(value)

    thread.watch(reference, done)


def future(reference: ObjectRef[Any]) -> concurrent.futures.Future[Any]:
    """A future of `concurrent.futures`, done when the object is there."""
    result: concurrent.futures.Future[Any] = concurrent.futures.Future()
    result.set_running_or_notify_cancel()
    result.object_ref = reference  # type: ignore[attr-defined]
    thread = _completion_thread()

    def done() -> None:
        try:
            value = thread.core.get_one(reference, None)
        except BaseException as error:
            result.set_exception(error)
        else:
            result.set_result(value)

    thread.watch(reference, done)
    return result


def shutdown() -> None:
    """Settles what is pending when the connection ends: each callback runs, with the exception of the ended runtime."""
    global _thread
    with _thread_lock:
        thread, _thread = _thread, None
    if thread is not None:
        thread.close()
    for loop, waiter in list(_waiters.items()):
        if not loop.is_closed():
            callbacks = list(waiter.pending.values())
            waiter.pending.clear()

            def settle(waiter: _LoopWaiter = waiter, loop: Any = loop, callbacks: Any = callbacks) -> None:
                loop.remove_reader(waiter.queue.fileno())
                for callback in callbacks:
                    callback()

            try:
                loop.call_soon_threadsafe(settle)
            except RuntimeError:  # Closed in the meantime.
                continue
    _waiters.clear()
