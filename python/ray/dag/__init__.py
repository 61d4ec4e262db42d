"""Graphs of calls: tasks and actors' methods bound to one another, executed as often as wanted.

Example:
    >>> with InputNode() as x:
    ...     dag = double.bind(increment.bind(x))
    >>> ray.get(dag.execute(3))
    8
"""

from ray.dag.class_node import ClassMethodNode, ClassNode
from ray.dag.dag_node import (
    BIND_INDEX_KEY,
    COLLECTIVE_OPERATION_KEY,
    DAGNODE_TYPE_KEY,
    IS_CLASS_METHOD_OUTPUT_KEY,
    PARENT_CLASS_NODE_KEY,
    PREV_CLASS_METHOD_CALL_KEY,
    DAGNode,
)
from ray.dag.function_node import FunctionNode
from ray.dag.input_node import DAGInputData, InputAttributeNode, InputNode
from ray.dag.output_node import MultiOutputNode
from ray.dag.unbuilt import CollectiveOutputNode, DAGContext, DAGOperationFuture, GPUFuture, plot

__all__ = [
    "BIND_INDEX_KEY",
    "COLLECTIVE_OPERATION_KEY",
    "DAGNODE_TYPE_KEY",
    "IS_CLASS_METHOD_OUTPUT_KEY",
    "PARENT_CLASS_NODE_KEY",
    "PREV_CLASS_METHOD_CALL_KEY",
    "ClassMethodNode",
    "ClassNode",
    "CollectiveOutputNode",
    "DAGContext",
    "DAGInputData",
    "DAGNode",
    "DAGOperationFuture",
    "FunctionNode",
    "GPUFuture",
    "InputAttributeNode",
    "InputNode",
    "MultiOutputNode",
    "plot",
]
