"""Channels of compiled graphs: not built yet."""

from ray._private.unbuilt import NotBuiltError

raise NotBuiltError("ray.experimental.channel: channels of compiled graphs are not built yet")
