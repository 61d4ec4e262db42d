"""The object store: copies that are none, sizes, freeing, spilling, references that travel."""

import gc
import json

import numpy as np
import pytest
from conftest import wait_for_condition

import ray

pytestmark = pytest.mark.usefixtures("ray_module")
MEGABYTE = 1 << 20


def stored_bytes():
    """Bytes of objects in this node's store."""
    core = ray._private.worker.global_worker.core
    answer = json.loads(core.node_query(json.dumps({"method": "objects"})))
    objects = answer["objects"] if isinstance(answer, dict) else answer
    return sum(
        next(v for k, v in row.items() if k in ("size_bytes", "size", "bytes", "object_size")) for row in objects
    )


@pytest.mark.parametrize(
    "value",
    [
        None,
        True,
        0,
        -(2**70),
        1.5,
        "text",
        b"bytes",
        [1, [2, (3,)]],
        {"a": {1: {2, 3}}},
        range(3),
        b"x" * 200_000,
        "y" * 300_000,
        list(range(50_000)),
        bytearray(b"z" * 150_000),
    ],
    ids=lambda value: f"{type(value).__name__}-{len(value) if hasattr(value, '__len__') else value}",
)
def test_values_come_back_equal(value):
    assert ray.get(ray.put(value)) == value

    @ray.remote
    def echo(argument):
        return argument

    assert ray.get(echo.remote(value)) == value
    assert ray.get(echo.remote(ray.put(value))) == value


def test_an_array_is_read_only_and_shares_memory():
    array = np.arange(MEGABYTE, dtype=np.int64)
    reference = ray.put(array)
    first, second = ray.get(reference), ray.get(reference)
    assert np.array_equal(first, array) and first is not second
    assert not first.flags.writeable
    with pytest.raises(ValueError):
        first[0] = 1
    assert first.__array_interface__["data"][0] == second.__array_interface__["data"][0]
    assert first.__array_interface__["data"][0] % 64 == 0


def test_two_gets_give_two_objects():
    reference = ray.put([1, 2])
    first = ray.get(reference)
    first.append(3)
    assert ray.get(reference) == [1, 2]


def test_a_view_keeps_its_object():
    view = ray.get(ray.put(np.full(2 * MEGABYTE, 7, dtype=np.uint8)))[100:200]
    gc.collect()
    for _ in range(20):
        ray.put(np.zeros(8 * MEGABYTE, dtype=np.uint8))
    assert int(view.sum()) == 700


def test_arrow_tables_share_memory():
    arrow = pytest.importorskip("pyarrow")
    table = arrow.table({"x": np.arange(200_000)})
    result = ray.get(ray.put(table))
    assert result.equals(table)
    assert result.column("x").chunk(0).buffers()[1].size >= 1_600_000


def test_many_arrays_in_one_value():
    value = {str(i): np.full(1000 * (i + 1), i) for i in range(20)}
    result = ray.get(ray.put(value))
    assert all(np.array_equal(result[key], value[key]) for key in value)


def test_results_larger_than_the_inline_limit():
    @ray.remote
    def ones(n):
        return np.ones(n, dtype=np.uint8)

    for size in (0, 1, 100 * 1024, 100 * 1024 + 1, 5 * MEGABYTE):
        assert int(ray.get(ones.remote(size)).sum()) == size


def test_objects_go_when_the_last_reference_goes():
    gc.collect()
    wait_for_condition(lambda: stored_bytes() < MEGABYTE)
    references = [ray.put(np.zeros(4 * MEGABYTE, dtype=np.uint8)) for _ in range(4)]
    assert stored_bytes() >= 16 * MEGABYTE
    del references
    wait_for_condition(lambda: stored_bytes() < MEGABYTE)


def test_an_argument_is_kept_until_its_task_is_done():
    @ray.remote
    def total(array):
        return int(array.sum())

    results = [total.remote(ray.put(np.ones(MEGABYTE, dtype=np.uint8))) for _ in range(10)]
    gc.collect()
    assert ray.get(results, timeout=60) == [MEGABYTE] * 10
    del results
    wait_for_condition(lambda: stored_bytes() < MEGABYTE)


def test_references_inside_objects_keep_what_they_name():
    inner = ray.put(np.full(MEGABYTE, 3, dtype=np.uint8))
    outer = ray.put({"inner": inner})
    del inner
    gc.collect()
    found = ray.get(ray.get(outer)["inner"])
    assert int(found[0]) == 3
    del outer, found
    wait_for_condition(lambda: stored_bytes() < MEGABYTE)


def test_references_kept_in_an_actor_are_borrowed():
    @ray.remote(num_cpus=0)
    class Keeper:
        def keep(self, box):
            self.box = box

        def read(self):
            return int(ray.get(self.box[0])[0])

        def drop(self):
            del self.box

    keeper = Keeper.remote()
    reference = ray.put(np.full(MEGABYTE, 9, dtype=np.uint8))
    ray.get(keeper.keep.remote([reference]))
    del reference
    gc.collect()
    assert ray.get(keeper.read.remote()) == 9
    ray.get(keeper.drop.remote())
    wait_for_condition(lambda: stored_bytes() < MEGABYTE)


def test_more_than_the_store_holds_is_spilled_and_comes_back():
    arrays = [ray.put(np.full(8 * MEGABYTE, i, dtype=np.uint8)) for i in range(20)]  # twice the store
    for number, reference in enumerate(arrays):
        value = ray.get(reference, timeout=60)
        assert int(value[0]) == number and int(value[-1]) == number
        del value
    del arrays, reference
    wait_for_condition(lambda: stored_bytes() < MEGABYTE, timeout=20)


def test_an_object_larger_than_the_store_says_so_or_works():
    big = np.zeros(200 * MEGABYTE, dtype=np.uint8)
    try:
        reference = ray.put(big)
    except ray.exceptions.ObjectStoreFullError as error:
        assert "store" in str(error).lower()
    else:
        assert ray.get(reference, timeout=60).nbytes == big.nbytes


def test_put_of_a_reference_is_refused():
    with pytest.raises(TypeError):
        ray.put(ray.put(1))


def test_a_reference_pickled_by_hand_still_works():
    reference = ray.put("value")
    assert ray.get(ray.cloudpickle.loads(ray.cloudpickle.dumps(reference))) == "value"


def test_custom_serializers():
    class Handle:
        def __init__(self, value):
            self.value = value
            self.lock = __import__("threading").Lock()

    ray.util.register_serializer(Handle, serializer=lambda h: h.value, deserializer=Handle)
    try:
        assert ray.get(ray.put(Handle(5))).value == 5
    finally:
        ray.util.deregister_serializer(Handle)
    with pytest.raises(TypeError):
        ray.put(Handle(5))


def test_long_lists_of_references_of_several_owners_travel():
    @ray.remote
    def make(count):
        return [ray.put(number) for number in range(count)]

    @ray.remote
    def through(holder):
        return sum(ray.get(holder[0])), holder[0]

    theirs = ray.get(make.remote(40))
    mixed = ray.put([ray.put(-number) for number in range(40)] + theirs)
    del theirs
    gc.collect()
    read = ray.get(mixed)
    assert ray.get(read) == [-number for number in range(40)] + list(range(40))
    total, back = ray.get(through.remote([read]))
    assert total == 0
    del read, mixed
    gc.collect()
    assert ray.get(back) == [-number for number in range(40)] + list(range(40))


def test_a_long_list_with_a_repeated_reference_keeps_its_identity():
    read = ray.get(ray.put([ray.put(7)] * 30))
    assert len(read) == 30
    assert all(item is read[0] for item in read)
    assert ray.get(read[0]) == 7


def test_references_read_from_a_list_are_counted():
    def counts():
        gc.collect()
        return ray._private.worker.global_worker.core.reference_counts()

    def local(count):
        return lambda: all(counts()[key]["local"] == count for key in keys)

    references = [ray.put(number) for number in range(30)]
    keys = [reference.hex() for reference in references]
    outer = ray.put(references)
    read = ray.get(outer)
    wait_for_condition(local(2), timeout=10)
    del read
    wait_for_condition(local(1), timeout=10)
    del references, outer
    wait_for_condition(lambda: not set(keys) & set(counts()), timeout=10)


def test_waiting_for_one_after_the_other_finds_each_once():
    @ray.remote
    def value(number):
        return number

    left = [value.remote(number) for number in range(200)]
    found = []
    while left:
        ready, left = ray.wait(left, timeout=30)
        found += ray.get(ready)
    assert sorted(found) == list(range(200))
    twice = ray.put(1)
    with pytest.raises(ValueError, match="unique"):
        ray.wait([twice, twice])


@pytest.mark.parametrize(
    "array",
    [
        np.arange(20_000, dtype=np.uint8),
        np.arange(3_000, dtype=np.complex128).reshape(10, 300),
        np.arange(12, dtype=np.int16).reshape(3, 4),
        np.asfortranarray(np.arange(6_000.0).reshape(20, 300)),
        np.arange(6_000)[::2],
        np.arange(6_000, dtype=">i4"),
        np.zeros((0, 3), dtype=np.float32),
        np.array(3.5),
        np.array([True, False] * 3_000),
        np.array(["a", "bc"] * 1_000),
        np.array([(1, 2.0)] * 1_000, dtype=[("x", "i4"), ("y", "f8")]),
        np.array(["2020-01-01"] * 1_000, dtype="datetime64[D]"),
        np.array([None, "x"], dtype=object),
        np.arange(40_000, dtype=np.longdouble),
    ],
    ids=lambda array: f"{array.dtype}{array.shape}",
)
def test_arrays_arrive_as_they_are(ray_module, array):
    @ray.remote
    def same(positional, number, keyword=None):
        for found in (positional, keyword):
            assert type(found) is np.ndarray
            assert found.flags.aligned
        return positional, keyword, positional.flags.writeable

    positional, keyword, writeable = ray.get(same.remote(array, 1, keyword=array[:1] if array.ndim else array.copy()))
    for found, sent in ((positional, array), (keyword, array[:1] if array.ndim else array)):
        assert found.dtype == sent.dtype and found.shape == sent.shape
        assert np.array_equal(found, sent)
    if array.flags.c_contiguous and array.dtype.kind in "biufc":
        # Its memory is the message's own, which is nobody's to write.
        assert not writeable


def test_an_array_that_is_passed_twice_stays_one_array(ray_module):
    @ray.remote
    def are_same(first, second, nested):
        return first is second, first is nested[0]

    array = np.arange(10_000)
    assert ray.get(are_same.remote(array, array, [array])) == (True, True)


def test_an_array_is_passed_as_it_is_at_the_call(ray_module):
    @ray.remote
    def total(array):
        return int(array.sum())

    array = np.ones(10_000, dtype=np.int64)
    results = []
    for i in range(50):
        array[:] = i
        results.append(total.remote(array))
    array[:] = -1
    assert ray.get(results) == [10_000 * i for i in range(50)]


def test_an_array_outlives_its_reference(ray_module):
    @ray.remote
    def make(i):
        return np.full(10_000, i, dtype=np.int64)

    arrays = [ray.get(make.remote(i)) for i in range(30)]
    assert [int(array[-1]) for array in arrays] == list(range(30))
    assert not any(array.flags.writeable for array in arrays)
