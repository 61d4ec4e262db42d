"""Where the running code is: its job, node, task, actor, and what was assigned to it."""

from __future__ import annotations

import json
import logging
from typing import Any

from ray._private import ids
from ray._private.context import ensure_context
from ray._private.ray_constants import WORKER_MODE
from ray._private.worker import global_worker
from ray.runtime_env import RuntimeEnv

logger = logging.getLogger(__name__)


class RuntimeContext:
    """Facts of the running code; `ray.get_runtime_context` makes it.

    Example:
        >>> ray.get_runtime_context().get_node_id()
    """

    def __init__(self, worker: Any) -> None:
        self.worker = worker

    # --- this process ---

    def get(self) -> dict[str, Any]:
        """Job, node and namespace, and in a task its and its actor's ids."""
        context: dict[str, Any] = {"job_id": self.job_id, "node_id": self.node_id, "namespace": self.namespace}
        if self._in_worker:
            context["task_id"] = self.task_id
            if self.actor_id is not None:
                context["actor_id"] = self.actor_id
        return context

    @property
    def _in_worker(self) -> bool:
        return self.worker.mode == WORKER_MODE

    @property
    def job_id(self) -> ids.JobID:
        """Id of the job; `get_job_id` gives its text."""
        return ids.JobID(self.worker.core.job_id())

    def get_job_id(self) -> str:
        """Hexadecimal id of the job."""
        return self.worker.core.job_id().hex()

    @property
    def node_id(self) -> ids.NodeID:
        """Id of the node; `get_node_id` gives its text."""
        return ids.NodeID(self.worker.core.node_id())

    def get_node_id(self) -> str:
        """Hexadecimal id of the node."""
        return self.worker.core.node_id().hex()

    def get_worker_id(self) -> str:
        """Hexadecimal id of this process."""
        return self.worker.core.worker_id().hex()

    def get_session_name(self) -> str:
        """Name of the cluster's session."""
        return self.worker.session_name

    def get_temp_dir(self) -> str:
        """The directory that holds the sessions' directories."""
        return self.worker.core.session_directory().rpartition("/")[0]

    @property
    def namespace(self) -> str:
        """Where this job's named actors are found."""
        return self.worker.namespace

    @property
    def gcs_address(self) -> str:
        """The address by which processes elsewhere join the cluster."""
        if self.worker.node is not None:
            return self.worker.node.address
        return self.worker.core.details().get("gcs_address") or ""

    def get_node_labels(self) -> dict[str, str]:
        """Labels of the node."""
        from ray._private.state import nodes

        mine = self.get_node_id()
        for node in nodes():
            if node["NodeID"] == mine:
                return dict(node["Labels"])
        raise RuntimeError(f"the control plane does not know this node {mine}")

    # --- the task ---

    def _current_task(self) -> Any:
        """The call that runs here, or None."""
        from ray._private.context import current_task

        if not self._in_worker:
            return None
        return current_task.get() or self.worker.core.current_task()

    def _only_in_worker(self) -> bool:
        if not self._in_worker:
            logger.warning(
                "This method is only available when the process is a worker. Current mode: %s", self.worker.mode
            )
        return self._in_worker

    @property
    def task_id(self) -> ids.TaskID:
        """Id of the running task. Raises AssertionError in a driver."""
        assert self._in_worker, f"This method is only available in a worker. Current mode: {self.worker.mode}"
        return self.worker.current_task_id

    def get_task_id(self) -> str | None:
        """Hexadecimal id of the running task; None in a driver."""
        return self.worker.current_task_id.hex() if self._only_in_worker() else None

    def get_task_name(self) -> str | None:
        """Name of the running task: its option `name`, or its function's; None in a driver."""
        task = self._current_task() if self._only_in_worker() else None
        if task is None:
            return None
        if task.name != task.function_name:
            return task.name
        # Without a name of its own: the function's, without its module.
        parts = task.function_name.split(".")
        return ".".join(parts[-2:] if task.method_name else parts[-1:])

    def get_task_function_name(self) -> str | None:
        """Module and name of the running function; None in a driver."""
        task = self._current_task() if self._only_in_worker() else None
        return None if task is None else task.function_name

    def is_canceled(self) -> bool:
        """Whether the running task was cancelled; for threads and long loops that look.

        Raises:
            RuntimeError: in a driver.
        """
        if not self._in_worker:
            raise RuntimeError(
                f"This method is only available when the process is a worker. Current mode: {self.worker.mode}"
            )
        task = self._current_task()
        return task is not None and self.worker.core.is_cancelled(task)

    def get_assigned_resources(self) -> dict[str, float]:
        """What the running task or actor holds. Raises AssertionError in a driver."""
        assert self._in_worker, f"This method is only available in a worker. Current mode: {self.worker.mode}"
        return dict(self.worker.core.assigned_resources())

    def get_accelerator_ids(self) -> dict[str, list[str]]:
        """The devices that the running task or actor was given, by kind."""
        from ray._private.worker import get_gpu_ids

        return {"GPU": [str(device) for device in get_gpu_ids()]}

    def get_resource_ids(self) -> dict[str, list[str]]:
        """As `get_accelerator_ids`."""
        return self.get_accelerator_ids()

    # --- the actor ---

    @property
    def actor_id(self) -> ids.ActorID | None:
        """Id of this actor; None in a task. Raises AssertionError in a driver."""
        assert self._in_worker, f"This method is only available in a worker. Current mode: {self.worker.mode}"
        return self._actor_id()

    def _actor_id(self) -> ids.ActorID | None:
        actor_id = self.worker.core.current_actor_id() if self.worker.in_actor else b""
        if not actor_id or actor_id[:12] == b"\xff" * 12:
            return None
        return ids.ActorID(actor_id)

    def get_actor_id(self) -> str | None:
        """Hexadecimal id of this actor; None outside one."""
        actor_id = self._actor_id()
        return None if actor_id is None else actor_id.hex()

    def get_actor_name(self) -> str | None:
        """Name of this actor, empty where it has none; None outside one."""
        if not self._only_in_worker() or not self.worker.in_actor:
            return None
        return self.worker.actor_name

    @property
    def current_actor(self) -> Any:
        """A handle to this actor. Raises RuntimeError outside one."""
        actor_id = self._actor_id()
        if actor_id is None:
            raise RuntimeError("This method is only available in an actor.")
        from ray._private.actor_metadata import ActorMetadata
        from ray.actor import ActorHandle

        core, metadata = self.worker.core.current_actor_handle()
        creation = self.worker.actor_creation
        return ActorHandle(
            core, ActorMetadata.from_pickle(metadata), creation.get("name") or None, creation.get("namespace")
        )

    @property
    def was_current_actor_reconstructed(self) -> bool:
        """Whether this actor was restarted at least once; False outside one."""
        return self._in_worker and self.worker.in_actor and int(self.worker.actor_creation.get("incarnation", 1)) > 1

    # --- inherited ---

    def get_placement_group_id(self) -> str | None:
        """Hexadecimal id of the placement group that the running work is in; None outside one."""
        group = self.current_placement_group_id
        return None if group.is_nil() else group.hex()

    @property
    def current_placement_group_id(self) -> ids.PlacementGroupID:
        """Id of the placement group that the running work is in; nil outside one."""
        strategy = self.worker.core.current_strategy() if self._in_worker else None
        group = (strategy or {}).get("placement_group_id")
        return ids.PlacementGroupID(group) if group else ids.PlacementGroupID.nil()

    @property
    def should_capture_child_tasks_in_placement_group(self) -> bool:
        """Whether tasks that this code submits run in its placement group."""
        context = ensure_context()
        return context.captured_group is not None

    def get_runtime_env_string(self) -> str:
        """The environment that children inherit, as JSON."""
        return json.dumps(ensure_context().runtime_env, sort_keys=True)

    @property
    def runtime_env(self) -> RuntimeEnv:
        """The environment that children inherit."""
        return RuntimeEnv.deserialize(self.get_runtime_env_string())

    def get_runtime_env(self) -> RuntimeEnv:
        """The environment that children inherit."""
        return self.runtime_env


def get_runtime_context() -> RuntimeContext:
    """Facts of the running code; connects first where the process is not connected."""
    ensure_context()
    return RuntimeContext(global_worker)


__all__ = ["RuntimeContext", "RuntimeEnv", "get_runtime_context"]
