"""Ray Client, through which a program uses a cluster as a remote: not built. Programs may ask whether they use it."""

from __future__ import annotations

from typing import Any

from ray.job_config import JobConfig

_REASON = "Ray Client is not built yet; ray.init(address='host:port') on a node of the cluster joins it"


class RayAPIStub:
    """What stands for a connection through Ray Client: there never is one."""

    def is_connected(self) -> bool:
        """Whether this program uses a cluster through Ray Client: no."""
        return False

    def is_default(self) -> bool:
        """Whether the connection of this thread is the process's first: there is no other."""
        return True

    def get_context(self) -> Any:
        """Would give the connection."""
        raise NotImplementedError(f"ray.util.client: {_REASON}")

    def set_context(self, cxt: Any) -> Any:
        """Would choose a connection."""
        raise NotImplementedError(f"ray.util.client: {_REASON}")

    def connect(self, *args: Any, **kwargs: Any) -> Any:
        """Would connect."""
        raise NotImplementedError(f"ray.util.client: {_REASON}")

    def init(self, *args: Any, **kwargs: Any) -> Any:
        """Would start a cluster and connect to it."""
        raise NotImplementedError(f"ray.util.client: {_REASON}")

    def disconnect(self, *args: Any, **kwargs: Any) -> None:
        """Ends the connection, of which there is none."""

    def shutdown(self, *args: Any, **kwargs: Any) -> None:
        """Ends a cluster that the connection started, of which there is none."""

    def remote(self, *args: Any, **kwargs: Any) -> Any:
        """Would make a remote function of that cluster."""
        raise NotImplementedError(f"ray.util.client: {_REASON}")


ray = RayAPIStub()


def num_connected_contexts() -> int:
    """How many connections through Ray Client there are: none."""
    return 0


__all__ = ["JobConfig", "RayAPIStub", "num_connected_contexts", "ray"]
