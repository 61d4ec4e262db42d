"""Collective operations of compiled graphs: not built yet."""

from ray._private.unbuilt import NotBuiltError

raise NotBuiltError("ray.experimental.collective: collective operations of compiled graphs are not built yet")
