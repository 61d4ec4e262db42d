"""Runtime environments, job configs, logging configs, and the printing of workers' lines."""

import io
import json
import logging

import pytest

import ray
from ray._private.log_printer import Deduplicator, LogPrinter
from ray.job_config import JobConfig
from ray.runtime_env import RuntimeEnv, RuntimeEnvConfig
from ray.runtime_env.runtime_env import merge_runtime_env, resolve_runtime_env


@pytest.mark.parametrize(
    ("fields", "error", "text"),
    [
        ({"env_vars": 3}, TypeError, "Dict"),
        ({"env_vars": {"a": 1}}, TypeError, "the value 1 is of type"),
        ({"env_vars": {1: "a"}}, TypeError, "the key 1 is of type"),
        ({"env_vars": {"a=b": "c"}}, ValueError, "a=b"),
        ({"foo": 1}, ValueError, "no field 'foo'"),
        ({"pip": ["numpy"]}, NotImplementedError, "pip"),
        ({"conda": "x"}, NotImplementedError, "conda"),
        ({"working_dir": "."}, NotImplementedError, "working_dir"),
        ({"py_modules": []}, NotImplementedError, "py_modules"),
        ({"config": 3}, TypeError, "config"),
        ({"config": {"setup_timeout_seconds": -5}}, ValueError, "-5"),
        ({"config": {"foo": 1}}, ValueError, "foo"),
    ],
)
def test_bad_environments(fields, error, text):
    with pytest.raises(error, match=text):
        RuntimeEnv(**fields)
    with pytest.raises(error, match=text):
        resolve_runtime_env({}, fields)


def test_an_environment_is_a_dict():
    env = RuntimeEnv(env_vars={"B": "2", "A": "1"}, config={"eager_install": False})
    assert env["env_vars"] == env.env_vars() == {"A": "1", "B": "2"}
    assert RuntimeEnv.deserialize(env.serialize()) == env
    assert env.get("config", data_class=RuntimeEnvConfig)["eager_install"] is False
    assert env.to_dict() is not env
    env.set("config", None)
    assert "config" not in env
    assert not env.has_pip()
    with pytest.raises(TypeError):
        env["env_vars"] = {"A": 1}


def test_children_inherit():
    job = RuntimeEnv(env_vars={"A": "1", "B": "2"})
    assert merge_runtime_env(job, None) == job
    child = merge_runtime_env(job, {"env_vars": {"B": "3", "C": "4"}})
    assert child["env_vars"] == {"A": "1", "B": "3", "C": "4"}
    assert merge_runtime_env(child, {"env_vars": {"A": "0"}})["env_vars"] == {"A": "0", "B": "3", "C": "4"}
    assert job["env_vars"] == {"A": "1", "B": "2"}
    assert resolve_runtime_env({}, None) == ""
    assert json.loads(resolve_runtime_env(job, {"env_vars": {"B": "3"}})) == {"env_vars": {"A": "1", "B": "3"}}


def test_job_config():
    config = JobConfig(metadata={"a": "b"}, ray_namespace="ns", runtime_env={"env_vars": {"a": "b"}})
    config.set_metadata("c", "d")
    assert config.to_dict()["metadata"] == {"a": "b", "c": "d"}
    assert config.to_dict()["namespace"] == "ns"
    assert JobConfig.from_json({"metadata": {"a": "b"}, "runtime_env": {}}).metadata == {"a": "b"}
    with pytest.raises(ValueError, match="detached"):
        JobConfig(default_actor_lifetime="x")
    with pytest.raises(ValueError, match="no field"):
        JobConfig.from_json({"foo": 1})
    with pytest.raises(NotImplementedError, match="Java"):
        JobConfig(jvm_options=["-Xmx1g"])


def test_logging_config():
    config = ray.LoggingConfig(encoding="JSON", log_level="DEBUG", additional_log_standard_attrs=["name"])
    assert ray.LoggingConfig.from_dict(config.to_dict()) == config
    with pytest.raises(ValueError, match="Invalid encoding type: x"):
        ray.LoggingConfig(encoding="x")
    with pytest.raises(ValueError, match="Invalid log level"):
        ray.LoggingConfig(log_level="loud")
    with pytest.raises(ValueError, match="Unknown python logging standard attribute: x"):
        ray.LoggingConfig(additional_log_standard_attrs=["x"])


def test_json_logs():
    from ray._private.logging_config import _Formatter

    record = logging.LogRecord("n", logging.INFO, "/a/b.py", 3, "hello %s", ("you",), None)
    record.extra = 5
    line = json.loads(_Formatter("JSON", ["name"]).format(record))
    assert line["message"] == "hello you"
    assert (line["levelname"], line["filename"], line["lineno"], line["name"]) == ("INFO", "b.py", 3, "n")
    assert line["extra"] == 5
    assert "hello you" in _Formatter("TEXT", []).format(record)


@pytest.mark.parametrize(
    ("arguments", "error", "text"),
    [
        ({"foo": 3}, RuntimeError, "Unknown keyword argument.*foo"),
        ({"num_cpus": -1}, ValueError, "nonnegative"),
        ({"num_cpus": "x"}, TypeError, "num_cpus"),
        ({"resources": {"CPU": 3}}, ValueError, "num_cpus"),
        ({"resources": 3}, TypeError, "resources"),
        ({"labels": {"a b": "c"}}, ValueError, "a b"),
        ({"namespace": 3}, TypeError, "namespace must be None or a string"),
        ({"namespace": ""}, ValueError, "not a valid namespace"),
        ({"runtime_env": 3}, TypeError, "runtime_env"),
        ({"runtime_env": {"pip": ["x"]}}, NotImplementedError, "pip"),
        ({"job_config": 3}, TypeError, "job_config"),
        ({"logging_config": 3}, TypeError, "LoggingConfig"),
        ({"local_mode": True}, NotImplementedError, "local_mode"),
        ({"include_dashboard": True}, NotImplementedError, "dashboard"),
        ({"dashboard_host": "0.0.0.0"}, NotImplementedError, "dashboard"),
        ({"_tracing_startup_hook": "x:y"}, NotImplementedError, "tracing"),
        ({"address": "ray://x:1"}, NotImplementedError, "Ray Client"),
        ({"address": 3}, TypeError, "address"),
    ],
)
def test_bad_arguments_of_init(arguments, error, text):
    with pytest.raises(error, match=text):
        ray.init(**arguments)
    assert not ray.is_initialized()


def test_other_languages_are_refused_by_name():
    with pytest.raises(NotImplementedError, match="Java"):
        ray.java_function("a", "b")
    with pytest.raises(NotImplementedError, match="Java"):
        ray.java_actor_class("a")


# --- lines of workers ---


def batch(pid, *lines, host="h", name="f", is_error=False):
    return {"pid": pid, "name": name, "host": host, "is_error": is_error, "lines": list(lines)}


def printed(entries):
    return [(entry[0]["pid"], entry[1], entry[2]) for entry in entries]


def test_equal_lines_of_several_processes_are_gathered():
    dedup = Deduplicator(window_s=5.0, allow=None, skip=None)
    assert printed(dedup.accept(batch(1, "step 1"), 0.0)) == [(1, "step 1", 0)]
    assert printed(dedup.accept(batch(2, "step 2"), 1.0)) == []
    assert printed(dedup.accept(batch(3, "step 7"), 2.0)) == []
    assert printed(dedup.due(4.9)) == []
    assert printed(dedup.due(5.0)) == [(3, "step 7", 2)]
    assert printed(dedup.accept(batch(1, "step 1"), 6.0)) == [(1, "step 1", 0)]


def test_one_process_that_repeats_itself_is_shown():
    dedup = Deduplicator(window_s=5.0, allow=None, skip=None)
    shown = [printed(dedup.accept(batch(1, f"progress {i}"), float(i))) for i in range(3)]
    assert shown == [[(1, f"progress {i}", 0)] for i in range(3)]


def test_nothing_held_back_is_lost():
    dedup = Deduplicator(window_s=5.0, allow=None, skip=None)
    dedup.accept(batch(1, "x"), 0.0)
    dedup.accept(batch(2, "x"), 0.0)
    assert printed(dedup.flush()) == [(2, "x", 1)]


def test_patterns():
    dedup = Deduplicator(window_s=5.0, allow="keep", skip="drop")
    dedup.accept(batch(1, "keep"), 0.0)
    assert printed(dedup.accept(batch(2, "keep", "drop this"), 0.0)) == [(2, "keep", 0)]


def test_prefixes():
    out, err = io.StringIO(), io.StringIO()
    printer = LogPrinter(core=None, out=out, err=err)
    printer.print_batch(batch(7, "hello", host=""), 0.0)
    printer.print_batch(batch(8, "bad", host="", name="Counter", is_error=True), 0.0)
    printer.print_batch(batch(9, "far", host="10.0.0.9"), 0.0)
    printer.print_batch({"level": "warning", "message": "no node has 3 GPUs"}, 0.0)
    assert out.getvalue() == "(f pid=7) hello\n(f pid=9, ip=10.0.0.9) far\n"
    assert err.getvalue() == "(Counter pid=8) bad\n(raylet) no node has 3 GPUs\n"


def test_repeats_are_noted_with_the_hint_once():
    out = io.StringIO()
    printer = LogPrinter(core=None, out=out)
    printer._print_all([(batch(1, host=""), "a", 3), (batch(1, host=""), "b", 2)])
    first, second = out.getvalue().splitlines()
    assert first.startswith("(f pid=1) a [repeated 3x across cluster] (Ray deduplicates")
    assert second == "(f pid=1) b [repeated 2x across cluster]"
