"""Names of compiled graphs, which are not built: using one says so."""

from __future__ import annotations

from typing import Any

from ray.dag.class_node import ClassMethodNode


class _Unbuilt:
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        raise NotImplementedError(f"ray.dag.{type(self).__name__}: compiled graphs are not built yet")


class DAGContext(_Unbuilt):
    """Settings of compiled graphs."""

    @staticmethod
    def get_current() -> DAGContext:
        """The settings of this process."""
        raise NotImplementedError("ray.dag.DAGContext: compiled graphs are not built yet")


class DAGOperationFuture(_Unbuilt):
    """A value that an operation of a compiled graph will give."""

    def wait(self) -> Any:
        """Waits for the value."""
        raise NotImplementedError("ray.dag.DAGOperationFuture: compiled graphs are not built yet")


class GPUFuture(DAGOperationFuture):
    """A value that an operation on a device will give."""

    @staticmethod
    def add_gpu_future(fut_id: int, fut: GPUFuture) -> None:
        """Keeps a future."""
        raise NotImplementedError("ray.dag.GPUFuture: compiled graphs are not built yet")

    @staticmethod
    def remove_gpu_future(fut_id: int) -> None:
        """Forgets a future."""
        raise NotImplementedError("ray.dag.GPUFuture: compiled graphs are not built yet")

    def destroy_event(self) -> None:
        """Frees the device's event."""
        raise NotImplementedError("ray.dag.GPUFuture: compiled graphs are not built yet")


class CollectiveOutputNode(ClassMethodNode):
    """A return of a collective operation."""

    def __init__(
        self,
        method_name: str,
        method_args: tuple[Any, ...],
        method_kwargs: dict[str, Any],
        method_options: dict[str, Any],
        other_args_to_resolve: dict[str, Any],
    ) -> None:
        raise NotImplementedError("ray.dag.CollectiveOutputNode: compiled graphs are not built yet")

    @property
    def collective_op(self) -> Any:
        """The operation."""
        raise NotImplementedError("ray.dag.CollectiveOutputNode: compiled graphs are not built yet")


def plot(dag: Any, to_file: str | None = None) -> Any:
    """Would draw the graph."""
    raise NotImplementedError("ray.dag.plot(): drawing graphs is not built; print(dag) shows one as text")
