"""Failures of user code and of workers: types, causes, tracebacks, retries."""

import os
import signal
import sys

import pytest

import ray

pytestmark = pytest.mark.usefixtures("ray_module")


class Odd(Exception):
    """An exception whose constructor takes other arguments than its args say."""

    def __init__(self, code, *, reason):
        super().__init__(f"{code}: {reason}")
        self.code = code


def test_the_type_the_cause_and_the_traceback():
    @ray.remote
    def deep():
        def inner_function_of_the_task():
            raise ValueError("the reason")

        inner_function_of_the_task()

    with pytest.raises(ValueError) as caught:
        ray.get(deep.remote())
    error = caught.value
    assert isinstance(error, ray.exceptions.RayTaskError) and isinstance(error, ray.exceptions.RayError)
    assert isinstance(error.cause, ValueError) and str(error.cause) == "the reason"
    assert "inner_function_of_the_task" in str(error) and "pid=" in str(error)


@pytest.mark.parametrize("kind", [KeyError, StopIteration, OSError, ZeroDivisionError, AssertionError])
def test_builtin_exceptions(kind):
    @ray.remote
    def fail():
        raise kind("x")

    with pytest.raises(kind):
        ray.get(fail.remote())


def test_an_odd_constructor():
    @ray.remote
    def fail():
        raise Odd(7, reason="odd")

    with pytest.raises(Odd) as caught:
        ray.get(fail.remote())
    assert "7: odd" in str(caught.value)


def test_an_exception_that_cannot_be_pickled():
    @ray.remote
    def fail():
        error = RuntimeError("cannot travel")
        error.lock = __import__("threading").Lock()
        raise error

    with pytest.raises(ray.exceptions.RayError, match="cannot travel"):
        ray.get(fail.remote())


def test_an_error_passes_through_dependent_tasks():
    @ray.remote
    def fail():
        raise ValueError("at the root")

    @ray.remote
    def use(value):
        return value

    with pytest.raises(ValueError, match="at the root"):
        ray.get(use.remote(use.remote(fail.remote())))


def test_an_error_in_a_nested_task():
    @ray.remote
    def fail():
        raise ValueError("inner")

    @ray.remote
    def outer():
        return ray.get(fail.remote())

    with pytest.raises(ValueError, match="inner"):
        ray.get(outer.remote())


def test_a_result_that_cannot_be_pickled():
    @ray.remote
    def lock():
        return __import__("threading").Lock()

    with pytest.raises(TypeError):
        ray.get(lock.remote())


def test_sys_exit_in_a_task():
    @ray.remote(max_retries=0)
    def leave():
        sys.exit(3)

    with pytest.raises(ray.exceptions.RayError):
        ray.get(leave.remote(), timeout=30)


def test_a_crash_names_the_exit_code():
    @ray.remote(max_retries=0)
    def crash():
        print("last words")
        sys.stdout.flush()
        os._exit(7)

    with pytest.raises(ray.exceptions.WorkerCrashedError, match="7"):
        ray.get(crash.remote(), timeout=30)


def test_a_crash_names_the_signal():
    @ray.remote(max_retries=0)
    def crash():
        os.kill(os.getpid(), signal.SIGSEGV)

    with pytest.raises(ray.exceptions.WorkerCrashedError, match="SIGSEGV|signal 11"):
        ray.get(crash.remote(), timeout=30)


def test_a_crashed_task_is_tried_again(tmp_path):
    @ray.remote(max_retries=2)
    def crash_twice(path):
        with open(path, "a") as file:
            file.write("x")
        if len(open(path).read()) < 3:
            os._exit(1)
        return len(open(path).read())

    assert ray.get(crash_twice.remote(str(tmp_path / "tries")), timeout=60) == 3


def test_retries_end(tmp_path):
    @ray.remote(max_retries=1)
    def crash(path):
        with open(path, "a") as file:
            file.write("x")
        os._exit(1)

    path = tmp_path / "tries"
    with pytest.raises(ray.exceptions.WorkerCrashedError):
        ray.get(crash.remote(str(path)), timeout=60)
    assert path.read_text() == "xx"


def test_exceptions_are_not_retried_unless_asked(tmp_path):
    def attempts(**options):
        path = tmp_path / str(len(list(tmp_path.iterdir())))

        @ray.remote(**options)
        def fail(name):
            with open(name, "a") as file:
                file.write("x")
            raise KeyError("again")

        with pytest.raises(KeyError):
            ray.get(fail.remote(str(path)), timeout=60)
        return len(path.read_text())

    assert attempts(max_retries=2) == 1
    assert attempts(max_retries=2, retry_exceptions=True) == 3
    assert attempts(max_retries=2, retry_exceptions=[KeyError]) == 3
    assert attempts(max_retries=2, retry_exceptions=[ValueError]) == 1


def test_exception_groups_and_causes():
    @ray.remote
    def fail():
        try:
            raise KeyError("first")
        except KeyError as error:
            raise ValueError("second") from error

    with pytest.raises(ValueError, match="second"):
        ray.get(fail.remote())


def test_the_first_failure_of_a_list_is_raised():
    @ray.remote
    def fail(text):
        raise ValueError(text)

    with pytest.raises(ValueError, match="a"):
        ray.get([ray.put(1), fail.remote("a")])


class Slotted(Exception):
    """Keeps something outside its `__dict__`."""

    __slots__ = ("where",)


def test_fields_that_are_no_attributes_are_there():
    @ray.remote
    def fails(kind):
        if kind == "os":
            open("/no/such/file")
        if kind == "unicode":
            b"ab\xff".decode()
        if kind == "import":
            import no_such_module  # noqa: F401
        error = Slotted("text")
        error.where = "here"
        raise error

    with pytest.raises(FileNotFoundError) as caught:
        ray.get(fails.remote("os"))
    assert (caught.value.errno, caught.value.filename) == (2, "/no/such/file") == (2, caught.value.cause.filename)
    with pytest.raises(UnicodeDecodeError) as caught:
        ray.get(fails.remote("unicode"))
    assert caught.value.start == caught.value.cause.start == 2 and "0xff" in str(caught.value.cause)
    with pytest.raises(ModuleNotFoundError) as caught:
        ray.get(fails.remote("import"))
    assert caught.value.name == caught.value.cause.name == "no_such_module"
    with pytest.raises(Slotted) as caught:
        ray.get(fails.remote("slots"))
    assert caught.value.where == caught.value.cause.where == "here"


def test_exception_groups_can_be_taken_apart():
    @ray.remote
    def fails():
        raise ExceptionGroup("several", [ValueError("one"), TypeError("two")])

    seen = []
    try:
        ray.get(fails.remote())
    except* ValueError as group:
        seen += group.exceptions
    except* TypeError as group:
        seen += group.exceptions
    assert [str(error) for error in seen] == ["one", "two"]
    with pytest.raises(ExceptionGroup) as caught:
        ray.get(fails.remote())
    assert isinstance(caught.value, ray.exceptions.RayTaskError) and caught.value.message == "several"


def test_notes_travel():
    @ray.remote
    def fails():
        error = ValueError("text")
        error.add_note("look at the input")
        raise error

    with pytest.raises(ValueError) as caught:
        ray.get(fails.remote())
    assert caught.value.__notes__ == caught.value.cause.__notes__ == ["look at the input"]
    assert "look at the input" in str(caught.value)


def test_the_function_is_named_without_where_it_was_defined():
    @ray.remote
    def fails():
        raise ValueError("text")

    @ray.remote
    class Actor:
        def fails(self):
            raise ValueError("text")

    with pytest.raises(ValueError, match=r"^ray::fails\(\)"):
        ray.get(fails.remote())
    actor = Actor.remote()
    with pytest.raises(ValueError, match=r"^ray::Actor\.fails\(\)"):
        ray.get(actor.fails.remote())
