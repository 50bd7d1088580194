"""Shapes of all values in an ONNX graph for given sizes of its inputs, and what the network takes in MACs, by shape inference."""

from __future__ import annotations

from collections.abc import Mapping
from math import prod
from typing import TYPE_CHECKING

from passes.errors import SurgeryError
from surgery.onnx_files.graph import Graph, true_inputs
from surgery.onnx_files.nodes import layer_node, weight_place

if TYPE_CHECKING:
    from onnx import ModelProto, NodeProto

__all__ = ["Shapes", "declared_shapes", "network_macs", "unknown_values", "value_shapes"]

Shapes = Mapping[str, tuple[int, ...]]
LARGE = 1024  # numbers; a tensor of more holds no sizes that a node could compute with
PRODUCTS = ("Gemm", "MatMul", "FusedGemm", "FusedMatMul", "MatMulInteger", "QLinearMatMul")
RECURRENT = ("LSTM", "GRU", "RNN")


def declared_shapes(model: ModelProto) -> dict[str, tuple[int | None, ...] | None]:
    """Shape of each input as the file declares it: None for an open dimension, or where nothing is said."""
    wanted, found = set(true_inputs(model.graph)), {}
    for value in model.graph.input:
        if value.name in wanted:
            kind = value.type.tensor_type
            known = value.type.HasField("tensor_type") and kind.HasField("shape")
            found[value.name] = tuple(d.dim_value if d.dim_value > 0 else None for d in kind.shape.dim) if known else None
    return found


def value_shapes(model: ModelProto, inputs: Shapes) -> dict[str, tuple[int, ...]]:
    """Shape of every value that ``onnx.shape_inference`` tells, where inputs have these shapes; those that stay open are absent.

    Raises:
        SurgeryError: the inference refuses the file.
    """
    import onnx

    light = _without_weights(model)
    for value in light.graph.input:
        if value.name in inputs:
            value.type.tensor_type.shape.CopyFrom(onnx.helper.make_tensor_type_proto(1, inputs[value.name]).tensor_type.shape)
    try:
        done = onnx.shape_inference.infer_shapes(light, data_prop=True)
    except (onnx.shape_inference.InferenceError, RuntimeError) as error:
        raise SurgeryError(f"the shapes in this file do not fit together: {str(error).strip().splitlines()[0]}") from error
    found = {}
    for value in (*done.graph.input, *done.graph.value_info, *done.graph.output):
        dims = value.type.tensor_type.shape.dim
        if value.type.tensor_type.HasField("shape") and all(d.HasField("dim_value") for d in dims):
            found[value.name] = tuple(d.dim_value for d in dims)
    for tensor in model.graph.initializer:
        found[tensor.name] = tuple(tensor.dims)
    return found


def unknown_values(model: ModelProto, shapes: Shapes) -> list[str]:
    """Values that layers and products read or make and whose shapes are not known."""
    needed = [name for node in Graph(model).nodes if _counts(node) for name in (*node.input, node.output[0]) if name]
    return [name for name in dict.fromkeys(needed) if name not in shapes]


def network_macs(model: ModelProto, shapes: Shapes) -> int | None:
    """MACs of the main graph: convolutions, products of matrices, recurrent layers; None where a shape is not known."""
    graph, total = Graph(model), 0
    for node in graph.nodes:
        macs = _macs(node, shapes)
        if macs is None:
            return None
        total += macs
    return total


def _counts(node: NodeProto) -> bool:
    return weight_place(node) is not None or node.op_type in RECURRENT


def _macs(node: NodeProto, shapes: Shapes) -> int | None:
    if not _counts(node):
        return 0
    place = weight_place(node)
    given = [shapes.get(name) for name in node.input]
    if node.op_type in RECURRENT:
        if given[0] is None or given[1] is None or given[2] is None:
            return None
        return prod(given[0][:2]) * (prod(given[1]) + prod(given[2]))
    weight, made = given[place] if place is not None else None, shapes.get(node.output[0])
    if given[0] is None or weight is None or made is None:
        return None
    if node.op_type in PRODUCTS:
        transposed = any(a.name == "transA" and a.i for a in node.attribute)
        return prod(made) * (given[0][-2] if transposed else given[0][-1])
    layer = layer_node(node, weight)
    return 0 if layer is None else layer.geometry.macs(given[0])


def _without_weights(model: ModelProto) -> ModelProto:
    """A copy in which large initializers are inputs of the same type, so that nothing large is copied or parsed."""
    import onnx

    light = onnx.ModelProto(ir_version=max(model.ir_version, 4), opset_import=model.opset_import, functions=model.functions)
    graph = light.graph
    graph.name = model.graph.name
    graph.node.extend(model.graph.node)
    graph.output.extend(model.graph.output)
    for value in graph.output:  # what the file says of them is for other inputs
        value.type.tensor_type.ClearField("shape")
    large = [tensor for tensor in model.graph.initializer if prod(tensor.dims) > LARGE]
    names = {tensor.name for tensor in large}
    graph.initializer.extend(tensor for tensor in model.graph.initializer if tensor.name not in names)
    graph.sparse_initializer.extend(model.graph.sparse_initializer)
    graph.input.extend(value for value in model.graph.input if value.name not in names)
    graph.input.extend(onnx.helper.make_tensor_value_info(tensor.name, tensor.data_type, list(tensor.dims)) for tensor in large)
    return light
