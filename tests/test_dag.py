"""Graphs of calls: `bind` and `execute`."""

import asyncio
import os
import types

import pytest

import ray
from ray.dag import ClassMethodNode, ClassNode, DAGNode, FunctionNode, InputNode, MultiOutputNode

pytestmark = pytest.mark.usefixtures("ray_module")


@ray.remote
def add(x, y=1):
    return x + y


@ray.remote
class Counter:
    def __init__(self, value=0):
        self.value = value

    def increment(self, by):
        self.value += by

    def get(self):
        return self.value

    def added(self, x, y=0):
        return self.value + x + y


def test_functions():
    dag = add.bind(add.bind(1, 2), y=add.bind(3, 4))
    assert isinstance(dag, FunctionNode) and isinstance(dag.execute(), ray.ObjectRef)
    assert ray.get(dag.execute()) == 10
    assert ray.get(add.bind(ray.put(4), 1).execute()) == 5
    assert ray.get(add.options(num_cpus=0).bind(1).execute()) == 2


def test_the_input_and_its_parts():
    with InputNode() as data:
        whole = add.bind(data, 5)
        parts = add.bind(data[0], data.offset)
        items = add.bind(data["a"], data["b"])
        attributes = add.bind(data.a, data.b)
    assert ray.get([whole.execute(1), whole.execute(10)]) == [6, 15]
    assert ray.get(parts.execute(1, offset=5)) == 6
    assert ray.get([items.execute({"a": 1, "b": 2}), items.execute(a=1, b=2)]) == [3, 3]
    assert ray.get([attributes.execute(types.SimpleNamespace(a=1, b=2)), attributes.execute(a=1, b=2)]) == [3, 3]
    with pytest.raises(AttributeError, match="without an argument 'b'"):
        attributes.execute(1, a=2)
    with InputNode() as data:
        pair = add.bind(data[0], data[1])
    assert ray.get([pair.execute(1, 2), pair.execute([1, 2])]) == [3, 3]


def test_misused_inputs():
    with pytest.raises(AssertionError, match="context manager"):
        add.bind(InputNode(), 1).execute(3)
    with InputNode() as first, InputNode() as second:
        dag = add.bind(first, second)
    with pytest.raises(AssertionError, match="only have one unique InputNode"):
        dag.execute(3)
    with pytest.raises(ValueError, match="args or kwargs"):
        InputNode(3)


def test_a_node_is_executed_once_in_an_execution(tmp_path):
    @ray.remote
    def note(path):
        with open(path, "a") as file:
            file.write("x")
        return os.path.getsize(path)

    @ray.remote
    def pair(a, b):
        return a, b

    with InputNode() as path:
        once = note.bind(path)
        dag = pair.bind(once, once)
    path = str(tmp_path / "calls")
    assert ray.get(dag.execute(path)) == (1, 1)
    assert ray.get(dag.execute(path)) == (2, 2)


def test_actors_of_a_graph():
    first, second = Counter.bind(10), Counter.bind(add.bind(4, 6))
    assert isinstance(first, ClassNode)
    first.increment.bind(2)
    first.increment.bind(4)
    second.increment.bind(6)
    dag = add.bind(first.get.bind(), second.get.bind())
    # Calls of one node are in the order of binding; each execution has actors of its own.
    assert ray.get([dag.execute(), dag.execute()]) == [32, 32]
    handle = first.execute()
    assert isinstance(handle, ray.actor.ActorHandle) and ray.get(handle.get.remote()) == 10


def test_actors_that_live_already():
    counter = Counter.remote(5)
    with InputNode() as x:
        dag = counter.added.bind(x, y=1)
    assert isinstance(dag, ClassMethodNode) and dag.get_method_name() == "added"
    assert ray.get(dag.execute(1)) == 7
    ray.get(counter.increment.remote(1))
    assert ray.get(dag.execute(1)) == 8


def test_an_actor_as_an_argument():
    @ray.remote
    def use(handle):
        return ray.get(handle.get.remote())

    assert ray.get(use.bind(Counter.bind(4)).execute()) == 4


def test_several_outputs_and_containers():
    with InputNode() as x:
        dag = MultiOutputNode([add.bind(x, 1), add.bind(x, 2)])
    references = dag.execute(1)
    assert isinstance(references, list) and ray.get(references) == [2, 3]
    with pytest.raises(ValueError, match="Invalid input type"):
        MultiOutputNode(add.bind(1))

    @ray.remote
    def total(values):
        return sum(ray.get(values["refs"])) + values["number"]

    assert ray.get(total.bind({"refs": [add.bind(1), add.bind(2)], "number": 10}).execute()) == 15


def test_options_of_calls():
    @ray.remote
    def name():
        return ray.get_runtime_context().get_task_name()

    node = name.options(name="chosen").bind()
    assert ray.get(node.execute()) == "chosen" and node.get_options() == {"name": "chosen"}

    @ray.remote
    class Two:
        def two(self):
            return 1, 2

    first, second = Two.bind().two.options(num_returns=2).bind().execute()
    assert ray.get([first, second]) == [1, 2]


def test_failures_and_awaiting():
    @ray.remote
    def breaks():
        raise ValueError("in the graph")

    with pytest.raises(ValueError, match="in the graph"):
        ray.get(add.bind(breaks.bind()).execute())

    async def main():
        return await add.bind(1, 2).execute()

    assert asyncio.run(main()) == 3


def test_bad_use_is_said():
    with pytest.raises(TypeError, match="missing a required argument: 'x'"):
        add.bind().execute()
    with pytest.raises(AttributeError, match="nope"):
        _ = Counter.bind().nope
    with pytest.raises(AttributeError, match=r"Use \.bind\(\) instead"):
        Counter.bind().get.remote()
    with pytest.raises(NotImplementedError, match="compiled graphs"):
        add.bind(1).experimental_compile()


def test_walking_and_changing():
    dag = add.bind(add.bind(1, 2), add.bind(3, 4))
    seen: list[DAGNode] = []
    dag.traverse_and_apply(seen.append)
    assert len(seen) == 3 and seen[-1] is dag

    def raised(node):
        args = tuple(a + 10 if isinstance(a, int) else a for a in node.get_args())
        return node._copy(args, node.get_kwargs(), node.get_options(), node.get_other_args_to_resolve())

    changed = dag.apply_recursive(raised)
    assert changed.get_stable_uuid() == dag.get_stable_uuid()
    assert ray.get([dag.execute(), changed.execute()]) == [10, 50]
    assert "FunctionNode" in str(dag) and dag.get_stable_uuid() in str(dag)


def test_references_of_the_last_execution():
    dag = add.bind(add.bind(1), 2)
    result = dag.execute(_ray_cache_refs=True)
    kept = asyncio.run(dag.get_object_refs_from_last_execute())
    assert kept[dag.get_stable_uuid()] == result and len(kept) == 2
    dag.clear_cache()
    assert asyncio.run(dag.get_object_refs_from_last_execute()) == {}


def test_a_deep_graph():
    dag = add.bind(0)
    for _ in range(1500):
        dag = add.bind(dag)
    assert ray.get(dag.execute(), timeout=60) == 1501


def test_a_graph_travels():
    @ray.remote
    def run(graph):
        return ray.get(graph.execute())

    assert ray.get(run.remote(add.bind(1, 2))) == 3
