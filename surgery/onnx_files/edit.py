"""Changes of an ONNX graph: nodes that become others, their constants, and what is then read no more. All of it can be taken back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor

from passes.host import Undo
from surgery.onnx_files.graph import Graph, write_tensor

if TYPE_CHECKING:
    from onnx import ModelProto, NodeProto

__all__ = ["Edit", "apply_edits"]

INPUTS_HOLD_ALL = 4
"""Before this version of ONNX's IR every initializer had to be an input as well."""


@dataclass(frozen=True, slots=True, eq=False)
class Edit:
    """Nodes, by place, that others take the place of, and the names of the weights that they read."""

    nodes: tuple[int, ...]
    instead: tuple[NodeProto, ...]
    weights: tuple[str, ...]


def apply_edits(model: ModelProto, graph: Graph, edits: Sequence[Edit], new: Mapping[str, Tensor], undo: Undo) -> None:
    """Make all changes to a model.

    Args:
        model: changed in place.
        graph: the snapshot of it that the edits speak of.
        edits: none of which touches a node of another.
        new: constants of the new nodes, by name.
        undo: is told how to take it all back.
    """
    proto = model.graph
    for held in (proto.node, proto.initializer, proto.input, proto.value_info, proto.quantization_annotation):
        undo.later(_restorer(held))
    gone = {index for edit in edits for index in edit.nodes}
    instead = {edit.nodes[-1]: edit.instead for edit in edits}
    nodes: list[NodeProto] = []
    for index, node in enumerate(graph.nodes):
        nodes += instead.get(index, ()) if index in gone else [node]
    _set(proto.node, nodes)
    for name, numbers in new.items():
        proto.initializer.append(write_tensor(name, numbers))
        if model.ir_version < INPUTS_HOLD_ALL:
            _declare(proto, name)
    _drop_unread(model, [name for edit in edits for name in edit.weights], keep=new)


def _drop_unread(model: ModelProto, names: Sequence[str], keep: Mapping[str, Any]) -> None:
    """Take out what is read no more: constants, the nodes that only handed them on, and what is said of values that are gone."""
    proto = model.graph
    graph = Graph(model)
    unread = {name for name in names if name not in keep and not graph.readers.get(name)}
    waiting = list(unread)
    dead: set[int] = set()
    while waiting:
        name = waiting.pop()
        index = graph.makers.get(name)
        if index is None or graph.nodes[index].op_type not in ("Identity", "Constant"):
            continue
        dead.add(index)
        for read in graph.nodes[index].input:
            if all(reader.node in dead for reader in graph.readers[read]):
                unread.add(read)
                waiting.append(read)
    made = {name for index, node in enumerate(graph.nodes) if index not in dead for name in node.output}
    _set(proto.node, [node for index, node in enumerate(graph.nodes) if index not in dead])
    defaults = {name for name in unread if name in graph.initializers}
    _set(proto.initializer, [tensor for tensor in proto.initializer if tensor.name not in unread])
    _set(proto.input, [value for value in proto.input if value.name not in defaults])
    present = made | {value.name for value in proto.input} | {tensor.name for tensor in proto.initializer}
    _set(proto.value_info, [value for value in proto.value_info if value.name in present])
    _set(proto.quantization_annotation, [a for a in proto.quantization_annotation if a.tensor_name in present])


def _declare(graph: Any, name: str) -> None:
    """Make an initializer an input as well."""
    import onnx

    tensor = graph.initializer[-1]
    graph.input.append(onnx.helper.make_tensor_value_info(name, tensor.data_type, list(tensor.dims)))


def _set(held: Any, items: Sequence[Any]) -> None:
    if len(held) != len(items) or any(a is not b for a, b in zip(held, items, strict=True)):
        del held[:]
        held.extend(items)


def _restorer(held: Any) -> Any:
    before = list(held)
    return lambda: _set(held, before)
