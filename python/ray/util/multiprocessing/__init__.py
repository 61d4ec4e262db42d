"""`multiprocessing.Pool` on actors: `from ray.util.multiprocessing import Pool`."""

from multiprocessing import JoinableQueue, TimeoutError

from ray.util.multiprocessing.pool import AsyncResult, Pool

__all__ = ["AsyncResult", "JoinableQueue", "Pool", "TimeoutError"]
