"""Collective communication between actors: not built yet."""

from ray._private.unbuilt import NotBuiltError

raise NotBuiltError("ray.util.collective: collective communication between actors is not built yet")
