"""What the chaos tests share: questions to the runtime, and the check that nothing is left over inside a cluster.

Workers import this module too, so that it imports the tests' `conftest` only where a test asks for it.
"""

from __future__ import annotations

import gc
import json
import os
import signal
from collections.abc import Callable
from typing import Any

import ray


def core() -> Any:
    """This driver's connection."""
    return ray._private.worker.global_worker.core


def node() -> Any:
    """The node that this driver started."""
    return ray._private.worker.global_worker.node


def node_answer(method: str, **arguments: Any) -> Any:
    """The answer of this driver's raylet to a question."""
    return json.loads(core().node_query(json.dumps({"method": method, **arguments})))


def every_node_answers(method: str) -> dict[str, Any]:
    """{node id: answer} of every raylet of the session."""
    from ray._private.state_query import node_queries

    return node_queries(method)[0]


def worker_pids() -> set[int]:
    """Pids of the workers that the raylet knows."""
    return {worker["pid"] for worker in node_answer("workers")["workers"] if worker.get("pid")}


def actor_record(actor: Any) -> dict[str, Any]:
    """What the control plane says of an actor."""
    return json.loads(core().gcs_query(json.dumps({"method": "actor", "actor_id": actor._actor_id.hex()})))


def kill(pid: int) -> None:
    """SIGKILL, unless it is gone already."""
    try:
        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:
        pass


def lines(path: str) -> list[str]:
    """The lines of a file to which tasks append; none where there is no such file yet."""
    try:
        with open(path) as file:
            return file.read().split("\n")[:-1]
    except FileNotFoundError:
        return []


def note(path: str, text: object) -> None:
    """Appends one line, whole."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    os.write(descriptor, f"{text}\n".encode())
    os.close(descriptor)


def left_over() -> list[str]:
    """Everything that an idle cluster must not have, in words."""
    from conftest import processes_of_sessions

    gc.collect()
    left = []
    counts = core().reference_counts()
    if counts:
        left.append(f"references {counts}")
    for node_id, memory in every_node_answers("memory").items():
        ledger = memory["ledger"]
        for name in ("primaries", "objects", "being_created", "in_transfer", "awaiting_unpin"):
            # Cache that nobody uses may stay until room is wanted; primary copies may not.
            if ledger[name] and not (name == "objects" and ledger["cache"]):
                left.append(f"{name} {ledger[name]} on node {node_id[:8]}: {memory['owners']}")
        if memory["spilled_objects"] or memory["waiting_bytes"]:
            left.append(f"spilled or waiting on node {node_id[:8]}: {memory}")
    for node_id, answer in every_node_answers("leases").items():
        if answer["leases"] or answer["waiting"]:
            left.append(f"leases on node {node_id[:8]}: {answer}")
    available, total = ray.available_resources(), ray.cluster_resources()
    for name in ("CPU", *[name for name in total if name.islower() and name not in ("memory",)]):
        if available.get(name) != total.get(name):
            left.append(f"{name}: {available.get(name)} of {total.get(name)} available")
    known = set()
    for answer in every_node_answers("workers").values():
        known |= {worker["pid"] for worker in [*answer["workers"], *answer["drivers"]]}
    for answer in every_node_answers("stats").values():
        known |= {answer["pid"], answer["zygote_pid"]}
    for pid, command in processes_of_sessions().items():
        if pid not in known and "gcs_server" not in command:
            left.append(f"process {pid} {command}")
    return left


def wait_until_nothing_is_left(timeout: float = 20) -> None:
    """Fails with what is still there after `timeout` seconds."""
    from conftest import wait_for_condition

    state: list[str] = []

    def is_clean() -> bool:
        state[:] = left_over()
        return not state

    try:
        wait_for_condition(is_clean, timeout=timeout, interval=0.1)
    except AssertionError as error:
        raise AssertionError("left over in the cluster:\n  " + "\n  ".join(state)) from error


def first_line_with(program: Any, word: str) -> str:
    """Reads a program's output up to the line that has `word`."""
    seen = []
    for line in program.stdout:
        seen.append(line)
        if word in line:
            return line
    raise AssertionError(f"the program ended without {word!r}:\n" + "".join(seen))


def until(predicate: Callable[[], Any], timeout: float = 10) -> Any:
    """`wait_for_condition` under a short name."""
    from conftest import wait_for_condition

    return wait_for_condition(predicate, timeout=timeout)
