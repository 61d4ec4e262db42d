"""The autoscaler and the cluster launcher: not built yet."""

from ray._private.unbuilt import NotBuiltError

raise NotBuiltError("ray.autoscaler.sdk: the autoscaler and the cluster launcher are not built yet")
