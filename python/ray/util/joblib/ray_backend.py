"""The joblib backend: joblib's own pool backend, with this runtime's pool in it."""

from __future__ import annotations

from typing import Any

from joblib._parallel_backends import MultiprocessingBackend

import ray
from ray.util.multiprocessing.pool import Pool


class RayBackend(MultiprocessingBackend):
    """Runs joblib's batches on a pool of actors.

    Args:
        ray_remote_args: options of the actors.
    """

    supports_sharedmem = False

    def __init__(self, *args: Any, ray_remote_args: dict[str, Any] | None = None, **kwargs: Any) -> None:
        self.ray_remote_args = ray_remote_args
        super().__init__(*args, **kwargs)

    def configure(
        self, n_jobs: int = 1, parallel: Any = None, prefer: Any = None, require: Any = None, **pool_arguments: Any
    ) -> int:
        """Starts the pool; joblib calls it. `n_jobs` of -1 means the cluster's CPUs."""
        n_jobs = self.effective_n_jobs(n_jobs)
        self._pool: Any = Pool(n_jobs, ray_remote_args=self.ray_remote_args)
        self.parallel = parallel
        return n_jobs

    def effective_n_jobs(self, n_jobs: int | None) -> int:
        """How many actors for `n_jobs`; negative numbers count from the cluster's CPUs."""
        if n_jobs == 0:
            raise ValueError("n_jobs == 0 in Parallel has no meaning")
        if n_jobs is None:
            return 1
        if not ray.is_initialized():
            ray.init()
        cpus = int(ray.cluster_resources().get("CPU", 1))
        return n_jobs if n_jobs > 0 else max(1, cpus + 1 + n_jobs)

    def terminate(self) -> None:
        """Ends the pool; joblib calls it."""
        pool, self._pool = getattr(self, "_pool", None), None
        if pool is not None:
            pool.close()
            pool.terminate()


__all__ = ["RayBackend"]
