"""Ids: sizes, text forms, and how one names its ancestors."""

import pickle

import pytest

import ray
from ray._private import ids

ALL = [
    (ids.UniqueID, 28),
    (ids.NodeID, 28),
    (ids.WorkerID, 28),
    (ids.FunctionID, 28),
    (ids.ActorClassID, 28),
    (ids.JobID, 4),
    (ids.ActorID, 16),
    (ids.TaskID, 24),
    (ids.PlacementGroupID, 18),
]


@pytest.mark.parametrize(("cls", "size"), ALL)
def test_size_nil_and_round_trips(cls, size):
    assert cls.size() == size
    assert cls.nil().binary() == b"\xff" * size
    assert cls.nil().is_nil()
    one = cls.from_random()
    assert not one.is_nil()
    assert cls.from_binary(one.binary()) == one
    assert cls.from_hex(one.hex()) == one
    assert pickle.loads(pickle.dumps(one)) == one
    assert hash(cls(one.binary())) == hash(one)
    assert repr(one) == f"{cls.__name__}({one.hex()})"


@pytest.mark.parametrize(("cls", "size"), ALL)
def test_wrong_bytes_are_refused(cls, size):
    with pytest.raises(ValueError, match=f"needs to have length {size}, got 3"):
        cls(b"abc")
    with pytest.raises(TypeError, match="expected bytes"):
        cls("a" * size)
    with pytest.raises(ValueError, match="hexadecimal digits"):
        cls.from_hex("zz")


def test_kinds_are_never_equal():
    data = b"x" * 28
    assert ids.NodeID(data) != ids.WorkerID(data)
    assert len({ids.NodeID(data), ids.WorkerID(data)}) == 2


def test_job_number():
    assert repr(ray.JobID.from_int(1)) == "JobID(01000000)"
    assert ray.JobID.from_int(300).int() == 300


def test_an_id_names_its_ancestors():
    job = ray.JobID.from_int(7)
    driver = ray.TaskID.for_driver_task(job)
    assert driver.hex() == "ff" * 20 + "07000000"
    actor = ray.ActorID.of(job, driver, 1)
    assert actor.job_id == job
    assert ray.ActorID.of(job, driver, 1) == actor != ray.ActorID.of(job, driver, 2)
    creation = ray.TaskID.for_actor_creation_task(actor)
    assert creation.actor_id() == actor
    assert creation.job_id() == job
    call = ray.TaskID.for_actor_task(job, driver, 3, actor)
    assert call.actor_id() == actor
    plain = ray.TaskID.for_normal_task(job, driver, 1)
    assert plain.binary()[8:20] == b"\xff" * 12
    assert plain.job_id() == job
    assert ray.PlacementGroupID.of(job).binary().endswith(job.binary())


def test_shard_hash_depends_on_the_bytes_alone():
    assert ray.NodeID(b"n" * 28).redis_shard_hash() == ray.NodeID(b"n" * 28).redis_shard_hash()
    assert ray.NodeID(b"n" * 28).redis_shard_hash() != ray.NodeID(b"m" * 28).redis_shard_hash()
