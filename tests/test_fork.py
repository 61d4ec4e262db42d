"""User code forks: the child has no runtime, and whatever it drops stays its parent's."""

import gc
import os
import signal

import numpy as np
import pytest

import ray

MEGABYTE = 1 << 20


def in_child(action):
    """Runs `action` in a forked child. Returns what it returned, as text, or the exception's type and text."""
    read_end, write_end = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            text = str(action())
        except BaseException as error:
            text = f"{type(error).__name__}: {error}"
        os.write(write_end, text.encode())
        os.kill(os.getpid(), signal.SIGKILL)
    os.close(write_end)
    with os.fdopen(read_end) as answer:
        text = answer.read()
    os.waitpid(pid, 0)
    return text


def check_views(views):
    """Fills the store with other objects and looks whether the views are still what they were."""
    for value in range(20):
        reference = ray.put(np.full(3 * MEGABYTE, 100 + value, dtype=np.uint8))
        del reference
    return all(bool((view == index).all()) for index, view in enumerate(views))


def use_in_children():
    references = [ray.put(np.full(MEGABYTE, index, dtype=np.uint8)) for index in range(4)]
    views = ray.get(references)
    kept = list(views)

    def drop():
        views.clear()
        kept.clear()
        references.clear()
        gc.collect()
        return "dropped"

    def look():
        return [int(view[0]) for view in views]

    answers = [
        in_child(look),
        in_child(drop),
        in_child(lambda: ray.get(references[0])),
        in_child(lambda: ray.put(1)),
    ]
    references.clear()
    return answers, check_views(views)


EXPECTED = ["[0, 1, 2, 3]", "dropped"]


def assert_answers(answers, valid):
    assert answers[:2] == EXPECTED
    for refused in answers[2:]:
        assert "forked" in refused, refused
    assert valid


@pytest.mark.timeout(60)
def test_children_of_a_driver_and_of_a_worker(ray_start):
    ray_start(num_cpus=1)
    assert_answers(*use_in_children())
    answers, valid = ray.get(ray.remote(use_in_children).remote(), timeout=40)
    assert_answers(answers, valid)
