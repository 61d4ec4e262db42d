"""The submission of jobs: not built yet."""

from ray._private.unbuilt import NotBuiltError

raise NotBuiltError("ray.job_submission: the submission of jobs is not built yet")
