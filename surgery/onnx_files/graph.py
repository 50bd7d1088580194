"""What surgery asks of an ONNX graph: who makes a value and who reads it, which values are constants, what is a name of its own."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy
import torch
from torch import Tensor

if TYPE_CHECKING:
    from onnx import GraphProto, ModelProto, NodeProto, TensorProto

__all__ = ["Constant", "Graph", "Reader", "inner_graphs", "read_tensor", "tensor_dtype", "told", "true_inputs", "write_tensor"]

QUANTIZED = ("DequantizeLinear",)


@dataclass(frozen=True, slots=True)
class Reader:
    """One place where a value is read: an input of a node, by the node's place in the graph; of none where it is an output of the graph.

    ``inside`` says that it is read in a graph inside of that node.
    """

    node: int | None
    input: int | None
    inside: bool = False


@dataclass(frozen=True, slots=True, eq=False)
class Constant:
    """A tensor that the file holds, under the name of the initializer or ``Constant`` node that it is."""

    name: str
    tensor: TensorProto


class Graph:
    """The main graph of a model, looked at: a snapshot, to be made anew when the graph has changed.

    ``fixed`` are the values that no input of the graph has a part in: constants, and what is computed from them.
    """

    def __init__(self, model: ModelProto) -> None:
        graph = model.graph
        self.nodes: list[NodeProto] = list(graph.node)
        self.outputs = [value.name for value in graph.output]
        self.initializers: dict[str, TensorProto] = {tensor.name: tensor for tensor in graph.initializer}
        self.sparse = {tensor.values.name for tensor in graph.sparse_initializer}
        self.fixed = {*self.initializers, *self.sparse}
        self.makers: dict[str, int] = {}
        self.readers: dict[str, list[Reader]] = {}
        for index, node in enumerate(self.nodes):
            for name in node.output:
                self.makers[name] = index
            for place, name in enumerate(node.input):
                self.readers.setdefault(name, []).append(Reader(index, place))
            inner_ones = list(inner_graphs(node))
            for inner in inner_ones:
                for name in (*(name for n in inner.node for name in n.input), *(value.name for value in inner.output)):
                    self.readers.setdefault(name, []).append(Reader(index, None, inside=True))
            if not inner_ones and all(name in self.fixed for name in node.input if name):
                self.fixed.update(node.output)
        for name in self.outputs:
            self.readers.setdefault(name, []).append(Reader(None, None))

    def constant(self, name: str) -> Constant | str:
        """The constant that a value is, also by way of ``Identity`` nodes, or why it is none."""
        if name in self.initializers:
            return Constant(name, self.initializers[name])
        if name in self.sparse:
            return "sparse"
        if name not in self.makers:
            return "an input of the graph"
        node = self.nodes[self.makers[name]]
        if node.op_type == "Identity":
            return self.constant(node.input[0])
        if node.op_type == "Constant":
            value = next((a.t for a in node.attribute if a.name == "value"), None)
            return "sparse or a list" if value is None else Constant(name, value)
        if node.op_type in QUANTIZED:
            return f"quantized ({node.op_type})"
        return f"computed by {told(node)}"

    def readers_of_constant(self, name: str) -> list[Reader]:
        """Who reads a constant, directly or by way of ``Identity`` nodes."""
        found = []
        for reader in self.readers.get(name, []):
            node = None if reader.node is None or reader.inside else self.nodes[reader.node]
            if node is not None and node.op_type == "Identity":
                found += self.readers_of_constant(node.output[0])
            else:
                found.append(reader)
        return found

    def told_reader(self, reader: Reader) -> str:
        """A reader in words."""
        if reader.node is None:
            return "an output of the graph"
        return f"{'a graph inside ' if reader.inside else ''}{told(self.nodes[reader.node])}"

    def names(self) -> set[str]:
        """Every name of a value that is taken, in inner graphs too."""
        taken = {*self.initializers, *self.sparse, *self.makers, *self.readers}
        for node in self.nodes:
            for inner in inner_graphs(node):
                taken |= {tensor.name for tensor in inner.initializer} | {name for n in inner.node for name in n.output}
        return taken


def told(node: NodeProto) -> str:
    """A node in words."""
    return f"{node.name or (node.output[0] if node.output else 'a node')} ({node.op_type})"


def inner_graphs(node: NodeProto) -> Iterator[GraphProto]:
    """All graphs inside of a node, at any depth."""
    for attribute in node.attribute:
        for inner in ([attribute.g] if attribute.HasField("g") else []) + list(attribute.graphs):
            yield inner
            for deeper in inner.node:
                yield from inner_graphs(deeper)


def true_inputs(graph: GraphProto) -> list[str]:
    """Inputs that a caller must give: those which are no initializers' names."""
    defaults = {tensor.name for tensor in graph.initializer} | {tensor.values.name for tensor in graph.sparse_initializer}
    return [value.name for value in graph.input if value.name not in defaults]


def tensor_dtype(elem_type: int) -> torch.dtype | None:
    """Torch's dtype for a type of ONNX; None where it has none."""
    import onnx

    if elem_type == onnx.TensorProto.BFLOAT16:
        return torch.bfloat16
    try:
        return torch.from_numpy(numpy.empty(0, onnx.helper.tensor_dtype_to_np_dtype(elem_type))).dtype
    except (TypeError, KeyError):
        return None


def read_tensor(tensor: TensorProto) -> Tensor:
    """The numbers of a tensor, in storage of their own."""
    import onnx

    array = onnx.numpy_helper.to_array(tensor)
    if tensor.data_type == onnx.TensorProto.BFLOAT16:  # numpy has none
        if array.itemsize == 4:  # from an older onnx, which widens them
            return torch.from_numpy(array.copy()).bfloat16()
        return torch.from_numpy(array.view(numpy.int16).copy()).view(torch.bfloat16)
    return torch.from_numpy(array.copy())


def write_tensor(name: str, numbers: Tensor) -> TensorProto:
    """An initializer with these numbers."""
    import onnx

    plain = numbers.detach().cpu().contiguous()
    if plain.dtype == torch.bfloat16:
        return onnx.helper.make_tensor(name, onnx.TensorProto.BFLOAT16, plain.shape, plain.view(torch.int16).numpy().tobytes(), raw=True)
    return onnx.numpy_helper.from_array(plain.numpy(), name)
