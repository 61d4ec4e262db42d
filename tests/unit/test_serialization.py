"""Pickling of values, what is said of what cannot be pickled, and functions."""

import io
import pickle
import threading

import pytest

import ray
from ray._private import function_manager, ray_constants, serialization
from ray._private.signature import CallSignature
from ray.util.check_serialize import find_culprit


def round_trip(value):
    buffers = []
    data = serialization.serialize(value, buffers.append)
    return pickle.loads(data, buffers=buffers), buffers


def test_buffers_go_out_of_band():
    numpy = pytest.importorskip("numpy")
    value, buffers = round_trip({"a": numpy.arange(1000)})
    assert len(buffers) == 1
    assert (value["a"] == numpy.arange(1000)).all()


def test_functions_and_local_classes_travel():
    offset = 3

    class Local:
        def __init__(self, x):
            self.x = x

    value, _ = round_trip((lambda x: x + offset, Local(4)))
    assert value[0](1) == 4
    assert value[1].x == 4


def test_tracebacks_of_travelled_functions_name_their_file():
    def function():
        raise ValueError

    copy = serialization.loads(serialization.dumps(function))
    assert copy.__code__.co_filename == __file__


@pytest.mark.parametrize(
    ("make", "path"),
    [
        (lambda lock: lock, ""),
        (lambda lock: {"a": [1, lock]}, "['a'][1]"),
        (lambda lock: (1, {"x": {2: lock}}), "[1]['x'][2]"),
        (lambda lock: lambda: lock, " (closure variable 'lock')"),
    ],
)
def test_the_culprits_path_is_named(make, path):
    lock = threading.Lock()
    found, culprit, reason = find_culprit(make(lock))
    assert found == path
    assert culprit is lock
    assert "cannot pickle" in reason


class Deep:
    def __init__(self):
        self.d = {"lock": threading.Lock()}


def test_errors_name_value_path_and_remedy():
    with pytest.raises(TypeError) as caught:
        serialization.dumps(Deep())
    text = str(caught.value)
    assert ".d['lock']" in text
    assert "cannot pickle '_thread.lock'" in text
    assert "register_serializer" in text


def test_cycles_do_not_hang_the_search():
    value = {"lock": threading.Lock()}
    value["self"] = value
    assert "lock" in find_culprit(value)[0]


def test_arguments_are_named():
    lock = threading.Lock()
    args, kwargs = (1, 2), {"where": [lock]}
    with pytest.raises(serialization.SerializationError) as caught:
        serialization.dumps((list(args), kwargs))
    text = str(serialization.explain_arguments(caught.value, args, kwargs, "m.f"))
    assert "Could not serialize the argument where for a task or actor m.f" in text
    assert "[0]" in text


class Connection:
    def __init__(self, url):
        self.url = url
        self.lock = threading.Lock()


def test_registered_serializers():
    with pytest.raises(TypeError):
        round_trip(Connection("u"))
    ray.util.register_serializer(Connection, serializer=lambda c: c.url, deserializer=Connection)
    try:
        copy, _ = round_trip([Connection("u")])
        assert copy[0].url == "u"
    finally:
        ray.util.deregister_serializer(Connection)
    with pytest.raises(TypeError):
        round_trip(Connection("u"))


def test_inspect_serializability():
    out = io.StringIO()
    assert ray.util.inspect_serializability(3, print_file=out) == (True, set())
    fine, failures = ray.util.inspect_serializability(Deep(), name="deep", print_file=out)
    assert not fine
    assert [failure.path for failure in failures] == [".d['lock']"]
    assert "Checking Serializability of" in out.getvalue()
    assert "cannot pickle" in out.getvalue()


# --- exported functions ---


class KeyValue:
    def __init__(self):
        self.values = {}

    def kv_put(self, namespace, key, value, overwrite, job_scoped=False):
        self.values[namespace, key] = value
        return True

    def kv_get(self, namespace, key, wait_s=0.0):
        return self.values.get((namespace, key))


def test_small_functions_travel_with_their_calls():
    store = KeyValue()
    exported = function_manager.export(store, lambda: 5, "f", "function")
    assert store.values == {}
    assert len(exported.function_id) == 28
    assert function_manager.load(store, exported.function_id, exported.blob, "f")() == 5


def test_large_functions_go_to_the_store():
    store = KeyValue()
    data = bytes(ray_constants.INLINE_FUNCTION_LIMIT_BYTES + 1)
    exported = function_manager.export(store, lambda: len(data), "f", "function")
    assert exported.blob == b""
    assert list(store.values) == [(b"fun", exported.function_id)]
    assert function_manager.load(store, exported.function_id, b"", "f")() == len(data)


def test_a_loaded_function_keeps_its_id():
    store = KeyValue()
    exported = function_manager.export(store, lambda: 5, "f", "function")
    loaded = function_manager.load(store, exported.function_id, exported.blob, "f")
    assert function_manager.export(store, loaded, "f", "function") == exported


def test_equal_functions_have_one_id_and_others_another():
    store = KeyValue()

    def make(n):
        return lambda: n

    first, again, other = (function_manager.export(store, make(n), "f", "function") for n in (1, 1, 2))
    assert first == again
    assert first.function_id != other.function_id


def test_functions_that_cannot_travel():
    lock = threading.Lock()
    store = KeyValue()
    with pytest.raises(TypeError, match=r"(?s)Could not serialize the function m\.f.*closure variable 'lock'"):
        function_manager.export(store, lambda: lock, "m.f", "function")
    with pytest.raises(RuntimeError, match="could not be fetched"):
        function_manager.load(store, b"x" * 28, b"", "m.f")
    with pytest.raises(RuntimeError, match="failed to import on the worker"):
        function_manager.load(store, b"x" * 28, b"cno_such_module_xyz\nf\n.", "m.f")


def test_too_large_functions_are_refused(monkeypatch):
    monkeypatch.setattr(ray_constants, "FUNCTION_SIZE_ERROR_THRESHOLD_BYTES", 1000)
    data = bytes(2000)
    with pytest.raises(ValueError, match=r"(?s)too large.*ray\.put"):
        function_manager.export(KeyValue(), lambda: data, "f", "function")


def test_remote_functions_and_actor_classes_travel():
    @ray.remote(num_cpus=2)
    def function(x):
        return function if x else None

    copy = serialization.loads(serialization.dumps(function))
    assert copy._options == {"num_cpus": 2}
    assert copy.options(num_cpus=3)._options == {"num_cpus": 3}
    assert copy._function(0) is None
    assert isinstance(copy._function(1), type(function))

    @ray.remote(max_restarts=1)
    class Actor:
        def make(self):
            return Actor

    twin = serialization.loads(serialization.dumps(Actor))
    assert twin._options == {"max_restarts": 1}
    assert twin._class.__qualname__.endswith("Actor")


# --- signatures ---


def checks(function, *args, **kwargs):
    signature = CallSignature.of(function, "f")
    if not kwargs and signature.minimum <= len(args) <= signature.maximum:
        return
    signature.check(args, kwargs)


def test_right_calls_pass():
    checks(lambda: 0)
    checks(lambda a, b=1: 0, 1)
    checks(lambda a, b=1: 0, 1, 2)
    checks(lambda a, b=1: 0, 1, b=2)
    checks(lambda *a: 0, *range(100))
    checks(lambda a, *, c: 0, 1, c=2)
    checks(lambda **k: 0, z=1)
    checks(dict, 1, 2, 3)  # It has no signature, so anything goes.


@pytest.mark.parametrize(
    ("function", "args", "kwargs", "text"),
    [
        (lambda: 0, (1,), {}, "too many positional arguments"),
        (lambda a: 0, (), {}, "missing a required argument: 'a'"),
        (lambda a: 0, (), {"b": 1}, "missing a required argument|unexpected keyword"),
        (lambda a: 0, (1,), {"b": 1}, "unexpected keyword argument 'b'"),
        (lambda a, *, c: 0, (1,), {}, "missing a required argument: 'c'|'c'"),
        (lambda a: 0, (1,), {"a": 1}, "multiple values"),
    ],
)
def test_wrong_calls_raise(function, args, kwargs, text):
    with pytest.raises(TypeError, match=text):
        checks(function, *args, **kwargs)


def test_signatures_travel_without_defaults():
    lock = threading.Lock()

    def function(a, b=lock):
        return a

    copy = pickle.loads(pickle.dumps(CallSignature.of(function, "f")))
    copy.check((1,), {"b": 2})
    with pytest.raises(TypeError):
        copy.check((), {})
