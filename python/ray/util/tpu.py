"""Slices of TPUs: not built yet."""

from ray._private.unbuilt import NotBuiltError

raise NotBuiltError("ray.util.tpu: slices of TPUs are not built yet")
