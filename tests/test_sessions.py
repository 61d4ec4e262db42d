"""One session after the other in one process: what is of the first means nothing in the second, and says so."""

import numpy as np
import pytest

import ray


@ray.remote
def identity(value):
    return value


@ray.remote(num_cpus=0)
class Actor:
    def call(self, value):
        return value


def test_references_do_not_outlive_their_session(ray_start):
    ray_start(num_cpus=1)
    small, large, returned = ray.put(1), ray.put(np.ones(1_000_000)), identity.remote(2)
    assert ray.get(returned, timeout=30) == 2
    view = ray.get(large, timeout=30)
    ray.shutdown()
    ray.init(num_cpus=1)
    uses = (
        lambda reference: ray.get(reference, timeout=10),
        lambda reference: ray.get([ray.put(1), reference], timeout=10),
        lambda reference: ray.wait([reference], timeout=10),
        lambda reference: identity.remote(reference),
        lambda reference: identity.remote([reference]),
        lambda reference: ray.put([reference]),
        lambda reference: reference.future(),
    )
    for reference in (small, large, returned):
        for use in uses:
            with pytest.raises(ValueError, match="session that was shut down"):
                use(reference)
    assert float(view.sum()) == 1_000_000, "a view stays valid"
    # The second session is undisturbed.
    assert ray.get(identity.remote(3), timeout=30) == 3


def test_actor_handles_do_not_outlive_their_session(ray_start):
    ray_start(num_cpus=1)
    actor = Actor.remote()
    assert ray.get(actor.call.remote(1), timeout=30) == 1
    ray.shutdown()
    ray.init(num_cpus=1)
    with pytest.raises(ValueError, match="session that was shut down"):
        actor.call.remote(2)
    fresh = Actor.remote()
    assert ray.get(fresh.call.remote(3), timeout=30) == 3
