"""Clusters on Spark: not built yet."""

from ray._private.unbuilt import NotBuiltError

raise NotBuiltError("ray.util.spark: clusters on Spark are not built yet")
