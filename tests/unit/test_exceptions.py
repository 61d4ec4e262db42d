"""Exceptions: dual types, what travels, and the causes that messages name."""

import pickle
import threading

import pytest

import ray
from ray import exceptions
from ray._private import hooks, serialization
from ray._private.remote_traceback import format_remote_traceback


class Odd(Exception):
    """Its arguments are not those of its constructor."""

    def __init__(self, a, b):
        super().__init__("odd")
        self.a = a
        self.b = b


class Final(Exception):
    def __init_subclass__(cls):
        raise TypeError("final")


class Holder(Exception):
    def __init__(self):
        super().__init__("held", threading.Lock())
        self.lock = threading.Lock()
        self.kept = 5


class Slippery(Exception):
    """Its class cannot be found again."""


def raised(cause):
    try:
        raise cause
    except type(cause) as error:
        return exceptions.RayTaskError.from_exception("f", error, ip="127.0.0.1")


def travel(error):
    return serialization.load_exception(serialization.dump_exception(error))


def test_a_task_error_is_of_the_causes_type():
    error = travel(raised(ValueError("boo")))
    assert isinstance(error, ValueError)
    assert isinstance(error, exceptions.RayTaskError)
    assert type(error).__name__ == "RayTaskError(ValueError)"
    assert repr(error) == "RayTaskError(ValueError)(ValueError('boo'))"
    assert str(error).startswith("ray::f() (pid=")
    assert str(error).endswith("ValueError: boo")
    assert error.cause.args == ("boo",)
    assert pickle.loads(pickle.dumps(error)).cause.args == ("boo",)


def test_an_odd_constructor_does_no_harm():
    error = travel(raised(Odd(1, 2)))
    assert isinstance(error, Odd)
    assert (error.a, error.b) == (1, 2)
    assert error.cause.args == ("odd",)


def test_a_final_type_is_the_cause_alone():
    error = travel(raised(Final("x")))
    assert type(error) is exceptions.RayTaskError
    assert isinstance(error.cause, Final)


def test_nested_task_errors_keep_the_first_type():
    inner = travel(raised(ValueError("boo")))
    error = travel(raised(inner))
    assert isinstance(error, ValueError)
    assert error.cause.args == ("boo",)
    assert "RayTaskError(ValueError)" in str(error)


def test_what_cannot_be_pickled_becomes_text():
    error = travel(raised(Holder()))
    assert isinstance(error, Holder)
    assert error.kept == 5
    assert "lock" in error.lock
    assert error.cause.args[0] == "held"


def test_a_class_that_is_missing_here_becomes_text(monkeypatch):
    data = serialization.dump_exception(raised(Slippery("where am I")))
    monkeypatch.delattr(f"{__name__}.Slippery")
    error = serialization.load_exception(data)
    assert isinstance(error, exceptions.RayTaskError)
    assert isinstance(error.cause, exceptions.UnserializableException)
    assert "Slippery: where am I" in str(error)


def test_errors_of_the_runtime_travel_as_they_are():
    error = travel(exceptions.ActorDiedError("gone", "ab"))
    assert type(error) is exceptions.ActorDiedError
    assert (str(error), error.actor_id) == ("gone", "ab")


def test_to_bytes():
    error = exceptions.RayError.from_bytes(pickle.dumps(exceptions.GetTimeoutError("late")))
    assert isinstance(error, TimeoutError)


@pytest.mark.parametrize(
    "error",
    [
        exceptions.TaskCancelledError(ray.TaskID.nil(), "why"),
        exceptions.RayActorError("ab", "gone", True, True),
        exceptions.ActorUnavailableError("busy", b"a" * 16),
        exceptions.ObjectLostError("ab" * 28, b"", "site"),
        exceptions.OwnerDiedError("ab" * 28, b"", ""),
        exceptions.ObjectReconstructionFailedError("ab" * 28, reason_message="no retries"),
        exceptions.RaySystemError("sick", "trace"),
        exceptions.RuntimeEnvSetupError("no pip"),
        exceptions.OutOfMemoryError("oom"),
        exceptions.NodeDiedError("node"),
        exceptions.RpcError("rpc", 3),
        exceptions.TaskUnschedulableError("no"),
        exceptions.ActorUnschedulableError("no"),
        exceptions.UnserializableException("trace"),
        exceptions.ActorAlreadyExistsError("taken"),
        exceptions.AuthenticationError("token"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_every_exception_survives_pickling(error):
    copy = pickle.loads(pickle.dumps(error))
    assert type(copy) is type(error)
    assert str(copy) == str(error)
    assert vars(copy) == vars(error)


def test_hierarchy():
    assert issubclass(exceptions.GetTimeoutError, TimeoutError)
    assert issubclass(exceptions.ActorDiedError, exceptions.RayActorError)
    assert issubclass(exceptions.OwnerDiedError, exceptions.ObjectLostError)
    assert issubclass(exceptions.ReferenceCountingAssertionError, AssertionError)
    assert issubclass(exceptions.ActorAlreadyExistsError, ValueError)
    assert issubclass(exceptions.RayChannelTimeoutError, TimeoutError)
    assert {"RayError", "RayTaskError", "WorkerCrashedError"} <= set(exceptions.__all__)


# --- failures of the runtime ---


def failure(kind, **fields):
    base = {"kind": kind, "message": "", "death": None, "actor_id": b"", "task_id": b"", "object_id": b"", "name": ""}
    return hooks.error_from_value({**base, **fields})


def test_every_kind_has_its_exception():
    expected = {
        1: exceptions.WorkerCrashedError,
        2: exceptions.ActorDiedError,
        3: exceptions.ActorUnavailableError,
        4: exceptions.ObjectLostError,
        5: exceptions.OwnerDiedError,
        6: exceptions.TaskCancelledError,
        7: exceptions.ObjectReconstructionFailedError,
        8: exceptions.NodeDiedError,
        9: exceptions.RuntimeEnvSetupError,
        10: exceptions.OutOfMemoryError,
        11: exceptions.TaskUnschedulableError,
        12: exceptions.ActorUnschedulableError,
        13: exceptions.ObjectFreedError,
        14: exceptions.ObjectStoreFullError,
        15: exceptions.OutOfDiskError,
        16: exceptions.TaskPlacementGroupRemoved,
        17: exceptions.StreamingGeneratorReplayInconsistentError,
        18: exceptions.RaySystemError,
        19: exceptions.ObjectRefStreamEndOfStreamError,
        99: exceptions.RaySystemError,
    }
    for kind, cls in expected.items():
        error = failure(kind, message="because of this", object_id=b"o" * 28)
        assert type(error) is cls
        if kind not in (16, 19):
            assert "because of this" in str(error)


def test_a_death_names_its_cause():
    death = {
        "kind": 2, "message": "The worker was killed", "exit_code": None, "signal": 9, "pid": 77,
        "log_tail": "line one\nline two\n", "exception": b"",
    }  # fmt: skip
    text = str(failure(1, name="f", death=death))
    for part in ("(f)", "The worker was killed", "pid 77", "SIGKILL", "line one", "line two"):
        assert part in text


def test_a_constructors_exception_is_shown_with_the_death():
    pickled = serialization.dump_exception(raised(KeyError("missing")))
    death = {
        "kind": 7,
        "message": "",
        "exit_code": None,
        "signal": None,
        "pid": 1,
        "log_tail": "",
        "exception": pickled,
    }
    error = failure(2, death=death, actor_id=b"a" * 16)
    assert isinstance(error, exceptions.ActorDiedError)
    assert error.actor_init_failed
    assert "error raised in its creation task" in str(error)
    assert "KeyError: 'missing'" in str(error)


def test_unschedulable_actors():
    death = {"kind": 9, "message": "no node has 3 GPUs", "log_tail": "", "exception": b""}
    assert isinstance(failure(2, death=death), exceptions.ActorUnschedulableError)
    assert isinstance(failure(16, actor_id=b"a" * 16), exceptions.ActorPlacementGroupRemoved)


def test_remote_text_leaves_frames_out():
    def inner():
        raise ValueError("deep")

    try:
        inner()
    except ValueError as error:
        whole = format_remote_traceback("head", error)
        without = format_remote_traceback("head", error, (__file__,))
    assert "in inner" in whole
    assert without == "head\nValueError: deep"


def test_remote_text_shows_causes():
    try:
        try:
            raise KeyError("first")
        except KeyError as error:
            raise ValueError("second") from error
    except ValueError as error:
        text = format_remote_traceback("head", error)
    assert "KeyError: 'first'" in text
    assert "direct cause" in text
