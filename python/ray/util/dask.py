"""The scheduler for Dask: not built yet."""

from ray._private.unbuilt import NotBuiltError

raise NotBuiltError("ray.util.dask: the scheduler for Dask is not built yet")
