"""The extension module: ids of objects, the core worker, and the daemons' entry points.

This stub is the contract between the Rust runtime and the Python API. Only modules of `ray._private` import
`ray._raylet`; everything else imports from them. Ids cross this border as `bytes`.
"""

from collections.abc import Callable, Sequence
from contextvars import ContextVar
from typing import Any, Generic, TypeVar

T = TypeVar("T")

NUM_RETURNS_DYNAMIC: int  # -1
NUM_RETURNS_STREAMING: int  # -2

# `format` of a value, as `deserialize` and `serialize` hooks see it.
FORMAT_BYTES: int
FORMAT_PICKLE: int
FORMAT_EXCEPTION: int
FORMAT_ERROR: int
FORMAT_CROSS_LANGUAGE: int
FORMAT_NONE: int

__version__: str

class RayletError(Exception):
    """Every failure of the runtime that has no more specific Python exception; `ray.exceptions` wraps it."""

# Raised by the extension by name, looked up in `ray.exceptions` when first needed: GetTimeoutError, RaySystemError,
# ObjectStoreFullError, PendingCallsLimitExceeded, and those that `Hooks.error_from_value` makes.

def rebuild_array(code: str, shape: tuple[int, ...], buffer: Any) -> Any:
    """The array that pickles of arguments have: element type, shape, and its bytes."""

def run_gcs(config_json: str) -> None:
    """Runs the control plane on this thread until SIGTERM or the end of its parent's pipe."""

def run_raylet(config_json: str, zygote_fd: int | None = None, zygote_pid: int | None = None) -> None:
    """Runs a node's daemon on this thread until SIGTERM or the end of its parent's pipe. The zygote is one that was
    forked for it already, and the socket to it."""

class ObjectRef(Generic[T]):
    """A reference to an object: counted while it lives, awaitable, hashable, equal by id.

    `future()`, `as_future()`, `__await__` and `_on_completed` delegate to `ray._private.async_compat`.
    """

    def __init__(self, id: bytes) -> None: ...
    @classmethod
    def from_binary(cls, id_bytes: bytes) -> ObjectRef[Any]: ...
    @classmethod
    def from_hex(cls, hex_id: str) -> ObjectRef[Any]: ...
    @classmethod
    def from_random(cls) -> ObjectRef[Any]: ...
    @classmethod
    def nil(cls) -> ObjectRef[Any]: ...
    @classmethod
    def size(cls) -> int: ...
    def binary(self) -> bytes: ...
    def hex(self) -> str: ...
    def is_nil(self) -> bool: ...
    def task_id(self) -> Any: ...  # ray.TaskID
    def job_id(self) -> Any: ...  # ray.JobID
    def owner_address(self) -> bytes: ...
    def call_site(self) -> str: ...
    def tensor_transport(self) -> None: ...
    def redis_shard_hash(self) -> int: ...
    def future(self) -> Any: ...  # concurrent.futures.Future
    def as_future(self, _internal: bool = False) -> Any: ...  # asyncio.Future
    def _on_completed(self, callback: Callable[[Any], None]) -> None: ...
    def __await__(self) -> Any: ...

class DynamicObjectRef(ObjectRef[T]):
    """What a call with num_returns="dynamic" returns: iterating it waits for its value and iterates that."""

    def __iter__(self) -> Any: ...

class TaskTemplate:
    """What is the same for every call of one function (or method) with one set of options. Made once, used often."""

class ActorCore:
    """This process's counted handle to an actor; holding one keeps the actor in scope unless it is weak."""

    def actor_id(self) -> bytes: ...
    def reference(self) -> ObjectRef[Any] | None: ...  # None for a weak handle (from get_actor)
    def is_weak(self) -> bool: ...
    def state(self) -> dict[str, Any]: ...  # {"state": "ALIVE", "incarnation": 1, "death": …}

class StreamCore:
    """The consumer's end of a streaming generator, made by `submit_task` where num_returns is streaming or dynamic."""

    def next(self, timeout_s: float | None = None) -> ObjectRef[Any] | None:
        """The next item's reference once it (or the end) is known; None at the end. Waits with the GIL released.

        A task's failure is an item of its own, then the end. Raises GetTimeoutError.
        """

    def try_next(self) -> tuple[bool, ObjectRef[Any] | None]:
        """(known, reference or None at the end), without waiting."""

    def completed_reference(self) -> ObjectRef[Any]: ...  # resolves when the task is over
    def is_finished(self) -> bool: ...
    def task_id(self) -> bytes: ...
    def watch_next(self, queue: CompletionQueue, token: int) -> None: ...
    def abandon(self) -> None: ...

class CompletionQueue:
    """Completions for an event loop or a thread: tokens appear here when what they watch is done."""

    def __init__(self, core: CoreWorker) -> None: ...
    def fileno(self) -> int: ...  # an eventfd, readable when tokens wait
    def watch(self, reference: ObjectRef[Any], token: int) -> None: ...
    def drain(self) -> list[int]: ...
    def wait(self, timeout_s: float) -> bool: ...  # blocks with the GIL released

class RunningTask:
    """A call being executed; handed to the executor's hooks, and to `finish`."""

    task_id: bytes
    job_id: bytes
    actor_id: bytes
    parent_task_id: bytes
    function_name: str  # "module.qualname"
    name: str  # options(name=…) or the function's name
    method_name: str
    concurrency_group: str
    attempt: int
    function_id: bytes
    generator_backpressure: int
    retry_exceptions: bool
    retry_exception_types: bytes  # a pickled tuple; empty for every type
    num_returns: int
    caller: bytes  # worker id
    depth: int

class CoreWorker:
    """The runtime in this process. Every method may be called from any thread; those that wait release the GIL."""

    @staticmethod
    def connect(config: dict[str, Any], hooks: Any) -> CoreWorker:
        """Connects to the raylet.

        `config`: raylet_socket (str), role ("driver" | "worker" | "tool"), worker_id (bytes, optional),
        startup_token (int, workers), session_directory (str), job_config_json (str, drivers), connect_timeout_s.
        `hooks`: an object with the attributes of `Hooks` below. Raises RayletError saying what did not answer.
        """

    # --- facts ---
    def job_id(self) -> bytes: ...
    def worker_id(self) -> bytes: ...
    def node_id(self) -> bytes: ...
    def session_directory(self) -> str: ...
    def details(self) -> dict[str, Any]: ...  # Welcome.details_json: session_name, namespace, log_directory, …
    def address(self) -> bytes: ...
    def current_task_id(self) -> bytes: ...  # of this thread or coroutine; the driver's root task outside
    def current_actor_id(self) -> bytes: ...  # nil where none
    def assigned_resources(self) -> dict[str, float]: ...
    def resource_instances(self) -> dict[str, list[tuple[int, float]]]: ...  # {"GPU": [(0, 1.0)]}
    def current_strategy(self) -> dict[str, Any]: ...  # of the lease: placement_group_id, bundle_index, capture…
    def shutdown(self) -> None: ...

    # --- submitting ---
    def make_template(self, options: dict[str, Any]) -> TaskTemplate:
        """`options`: function_id (bytes 28), function_blob (bytes), function_name, name, num_returns (int),
        resources ({name: float}), strategy (dict: kind "DEFAULT" | "SPREAD" | "NODE_AFFINITY" (node_id bytes, soft,
        spill_on_unavailable, fail_on_unavailable) | "NODE_LABEL" (hard, soft: list of (key, operator "in" | "not_in" |
        "exists" | "does_not_exist", values)) | "PLACEMENT_GROUP" (placement_group_id bytes, bundle_index,
        capture_child_tasks)), max_retries, retry_exceptions (bool), retry_exception_types (bytes, pickled tuple),
        runtime_env_json, max_calls, generator_backpressure, and for methods: method_name, concurrency_group.
        A label_selector is given as strategy hard labels.
        """

    def submit_task(self, template: TaskTemplate, args: tuple[Any, ...], kwargs: dict[str, Any] | None = None) -> Any:
        """Submits a call. Returns None for num_returns=0, an ObjectRef for 1, a list for more, a StreamCore for
        streaming, and for dynamic an ObjectRef whose value is a list of references.

        Top-level ObjectRefs among the arguments are dependencies and arrive as values. The rest is serialized here.
        Raises TypeError (with the path to the culprit, from the serialize hook) for what cannot be pickled.
        """

    def create_actor(
        self, template: TaskTemplate, args: tuple[Any, ...], kwargs: dict[str, Any] | None, options: dict[str, Any]
    ) -> ActorCore:
        """`options`: resources and placement_resources ({name: float}), strategy, max_restarts, max_task_retries,
        max_concurrency, is_async, concurrency_groups ({name: int}), detached, name, namespace, get_if_exists,
        out_of_order, class_name, runtime_env_json, handle_metadata (bytes), max_pending_calls.
        Waits only for a named actor's registration. Raises ValueError where the name is taken.
        """

    def submit_actor_task(
        self, actor: ActorCore, template: TaskTemplate, args: tuple[Any, ...], kwargs: dict[str, Any] | None = None
    ) -> Any:
        """As `submit_task`. Raises PendingCallsLimitExceeded."""

    def actor_from_reference(self, reference: ObjectRef[Any], metadata: dict[str, Any]) -> ActorCore:
        """A counted handle from the handle reference that travelled (pickled handles)."""

    def get_named_actor(self, name: str, namespace: str) -> tuple[ActorCore, bytes]:
        """A weak handle and the handle metadata. Raises ValueError where there is none."""

    def kill_actor(self, actor_id: bytes, no_restart: bool) -> None: ...
    def cancel(self, reference: ObjectRef[Any], force: bool, recursive: bool) -> None: ...

    # --- objects ---
    def put(self, value: Any) -> ObjectRef[Any]: ...
    def get(self, references: Sequence[ObjectRef[Any]], timeout_s: float | None = None) -> list[Any]:
        """The values, in order. Raises the first failure (the task's own exception type, GetTimeoutError, …)."""

    def get_one(self, reference: ObjectRef[Any], timeout_s: float | None = None) -> Any: ...
    def wait(
        self, references: list[ObjectRef[Any]], num_returns: int, timeout_s: float | None, fetch_local: bool
    ) -> (
        tuple[list[ObjectRef[Any]], list[ObjectRef[Any]]] | None
    ): ...  # None: a repetition, or an item that is no reference
    def free(self, references: Sequence[ObjectRef[Any]], local_only: bool) -> None: ...
    def reference_counts(self) -> dict[str, dict[str, Any]]: ...  # hex id -> counts, for `ray memory` and tests
    def object_locations(self, references: Sequence[ObjectRef[Any]]) -> list[dict[str, Any]]: ...
    def why(self) -> list[dict[str, Any]]: ...  # what each thread and queued call of this process waits for

    # --- control plane ---
    def kv_put(self, namespace: bytes, key: bytes, value: bytes, overwrite: bool, job_scoped: bool = False) -> bool: ...
    def kv_get(self, namespace: bytes, key: bytes, wait_s: float = 0.0) -> bytes | None: ...
    def kv_delete(self, namespace: bytes, key: bytes, prefix: bool = False) -> int: ...
    def kv_keys(self, namespace: bytes, prefix: bytes) -> list[bytes]: ...
    def kv_exists(self, namespace: bytes, key: bytes) -> bool: ...
    def gcs_query(self, query_json: str) -> str: ...  # JsonQuery of ray-wire
    def node_query(self, query_json: str) -> str: ...  # NodeQuery to the local raylet
    def create_placement_group(self, specification: dict[str, Any]) -> None:
        """placement_group_id (bytes 18), bundles ([{name: float}]), strategy ("PACK" …), name, detached, namespace,
        soft_target_node_id (bytes or b""), bundle_label_selector."""
    def remove_placement_group(self, placement_group_id: bytes) -> None: ...
    def wait_placement_group(self, placement_group_id: bytes, timeout_s: float | None = None) -> bool: ...
    def new_placement_group_id(self) -> bytes: ...
    def drain_node(self, node_id: bytes, reason: str, deadline_s: float) -> None: ...

    # --- executing, in workers ---
    def run_task_loop(self, executor: Any) -> None:
        """Runs what is pushed to this worker on the calling (main) thread until it is told to leave.

        `executor` has the attributes of `Executor` below.
        """

    def finish(self, task: RunningTask, value: Any, exception: BaseException | None, corked: bool = False) -> None:
        """Ends a call that the executor took over (coroutines, pool threads).

        `corked`: its answer may wait for others, until `flush_replies` on the same thread."""

    def flush_replies(self) -> None: ...
    def put_generator_item(self, task: RunningTask, value: Any) -> bool:
        """Sends one item of a streaming generator, waiting (GIL released) while the consumer is too far behind.
        False where the consumer is gone: stop."""

    def set_current_task(self, task: RunningTask | None) -> None:
        """Makes `task` this thread's current one (pool threads; coroutines set a context variable instead)."""

    def set_task_variable(self, variable: ContextVar[RunningTask | None]) -> None:
        """Where no current task is set, it is looked for in this context variable. Raises TypeError for what is none."""

    def current_task(self) -> RunningTask | None:
        """The call that runs on this thread."""

    def current_actor_handle(self) -> tuple[ActorCore, bytes]:
        """A counted handle to the actor that this process is, and its handle metadata. Raises RaySystemError elsewhere."""

    def exit_worker(self, reason: str) -> None:
        """Leaves after the current call (`exit_actor`, `__ray_terminate__`)."""

    def is_interrupt_wanted(self) -> bool:
        """Whether a signal on the main thread is the cancellation of what runs there."""

    def is_cancelled(self, task: RunningTask) -> bool: ...
    def next_log_line(self, timeout_s: float) -> list[dict[str, Any]] | None:
        """In a driver: log lines and messages of the runtime ({"pid", "name", "host", "is_error", "lines"} or
        {"level", "message"}); None after shutdown. Called by the one thread that prints them."""

class Hooks:
    """What the extension calls. The Python side makes an object with these attributes (`ray._private.worker`)."""

    def serialize(self, value: Any, buffer_callback: Callable[[Any], None]) -> bytes | tuple[bytes]:
        """In-band pickle of `value` (cloudpickle, registered serializers). A tuple holds what `dump_exception` pickled: a
        failure that takes the value's place. Raises TypeError with the culprit's path."""

    def deserialize_exception(self, pickled: bytes) -> BaseException:
        """The exception to raise for a FORMAT_EXCEPTION value (already the dual exception with the cause's type)."""

    def error_from_value(self, error: dict[str, Any]) -> BaseException:
        """The exception for a FORMAT_ERROR value: {"kind": int (ERROR_* of ray-wire/src/layout.rs), "message",
        "death": {"kind", "message", "exit_code", "signal", "pid", "log_tail", "exception"} or None, "actor_id",
        "task_id", "object_id" (bytes), "name"}."""

    def cross_language_dumps(self, value: Any) -> bytes: ...
    def cross_language_loads(self, data: bytes) -> Any: ...

class EventLoop:
    """What the selector of an asyncio actor's loop calls, on the main thread."""

    def watch_poller(self, descriptor: int) -> None:
        """Has `step` return when this poller may have events."""

    def step(self, timeout_s: float | None) -> bool:
        """Sends answers that wait, waits for something to do (GIL released) and starts the calls that came. Whether the
        loop's own poller may have events."""

    def load(self, task: RunningTask) -> tuple[Callable[..., Any], list[Any], dict[str, Any]]:
        """Function and arguments of a call, fetched where need be. Raises the failure that an argument is. Any thread."""

    def caught_up(self) -> None:
        """No call waits behind another's arguments any more."""

class Executor:
    """What `run_task_loop` calls, always with the GIL, on the main thread."""

    def load_function(self, task: RunningTask, blob: bytes) -> Callable[..., Any]:
        """Unpickles an exported function or class; cached by the extension under its id."""

    def prepare_lease(self, lease: dict[str, Any]) -> None:
        """Before the first call of a lease: {"resource_instances", "job_config_json", "job_id", "runtime_env_json"}:
        sys.path, visible devices, environment."""

    def create_actor(
        self, task: RunningTask, cls: Any, args: list[Any], kwargs: dict[str, Any], creation: dict[str, Any]
    ) -> None:
        """Makes the instance and keeps it. `creation`: class_name, is_async, max_concurrency, concurrency_groups,
        name, namespace, detached, incarnation. Raises what the constructor raises."""

    def method(self, task: RunningTask) -> tuple[Callable[..., Any], str]:
        """The bound method and how to run it: "main" (called right here by the extension), "thread" (handed to
        `run_elsewhere`) or "async" (handed to `admit`). Cached by the extension per method name."""

    def run_elsewhere(
        self, task: RunningTask, function: Callable[..., Any], args: list[Any], kwargs: dict[str, Any]
    ) -> None:
        """Starts the call on a pool thread; it must end with `CoreWorker.finish`."""

    runs_event_loop: bool

    def run_event_loop(self, links: EventLoop) -> None:
        """Runs the actor's event loop, whose selector calls `EventLoop.step`, until `stop_event_loop`."""

    def stop_event_loop(self) -> None: ...
    def admit(self, task: RunningTask, function: Callable[..., Any], args: list[Any], kwargs: dict[str, Any]) -> None:
        """Starts the call on the event loop; it must end with `CoreWorker.finish`."""

    def admit_when_fetched(self, task: RunningTask) -> None:
        """As `admit`, after `EventLoop.load` on a thread; calls `EventLoop.caught_up` when no call waits behind."""

    def run_generator(self, task: RunningTask, generator: Any) -> None:
        """Drives a generator or async generator on this thread: `put_generator_item` for each item."""

    def dump_exception(self, task: RunningTask, exception: BaseException) -> bytes:
        """Pickles the RayTaskError for a call that raised."""

    def is_retryable(self, task: RunningTask, exception: BaseException, types_pickle: bytes) -> bool: ...
    def cancel_elsewhere(self, task_id: bytes) -> None:
        """Cancels a coroutine that runs."""
