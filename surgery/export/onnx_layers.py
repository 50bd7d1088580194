"""The layers of a network in its ONNX graph: nodes that carry their names, and the check that the convolutions are those of the plan."""

from __future__ import annotations

import ast
import os
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from passes.chain import Chain
from passes.errors import ParityError
from surgery.files import as_path

if TYPE_CHECKING:
    from onnx import GraphProto, ModelProto, NodeProto

__all__ = ["OnnxConvolution", "check_chains", "name_layers", "numbered", "onnx_convolutions"]

CONVOLUTIONS = ("Conv", "ConvTranspose")
LAYERS = (*CONVOLUTIONS, "Gemm", "MatMul")
SCOPES = "pkg.torch.onnx.name_scopes"
ABOUT_THE_MAKER = ("pkg.torch.onnx.stack_trace", "pkg.torch.onnx.fx_node")
"""Notes by which the exporter writes paths and code of the machine that exported into the file."""


@dataclass(frozen=True, slots=True, kw_only=True)
class OnnxConvolution:
    """One convolution node.

    Attributes:
        layer: qualified name of the layer that it is a call of, empty where it is none (a convolution that was called as a function).
        op: ``"Conv"`` or ``"ConvTranspose"``.
        weight_shape: as in torch; None where the graph computes the weight.
    """

    layer: str
    op: str
    weight_shape: tuple[int, ...] | None


def onnx_convolutions(model: str | os.PathLike[str] | ModelProto) -> tuple[OnnxConvolution, ...]:
    """All convolution nodes of a file that ``export_onnx`` wrote, in the graph's order, those of a layer that is called twice both.

    ``OSError`` passes through.
    """
    if isinstance(model, str | os.PathLike):
        from surgery.onnx_files.files import read_graph

        model = read_graph(as_path("model", model))
    found = []
    for graph in _graphs(model.graph):
        shapes = _shapes(graph)
        found += [
            OnnxConvolution(layer=_layer_of(node), op=node.op_type, weight_shape=shapes.get(node.input[1]))
            for node in graph.node
            if node.op_type in CONVOLUTIONS
        ]
    return tuple(found)


def check_chains(model: ModelProto, network: nn.Module, called: Mapping[str, tuple[int, ...]]) -> None:
    """Refuse a graph in which the convolutions of a chain are others than the chain's.

    Of a chain whose outputs the network throws away, exporters leave nothing in the graph, and of layers with equal weights and one input a single
    one, which is right.

    Args:
        model: the graph, its layers named.
        network: what was exported.
        called: weight shape of every convolution module that was called, by name.

    Raises:
        ParityError: one is absent where others of its chain are not, has another shape, or is there in addition; or one stands for a whole chain.
    """
    there = onnx_convolutions(model)
    left = {name for c in there for name in (c.layer, c.layer.rpartition(".")[0])}
    chains = {name for name, module in network.named_modules() if isinstance(module, Chain) and name in left}
    expected = {(name, shape) for name, shape in called.items() if name.rpartition(".")[0] in chains}
    found = {(c.layer, c.weight_shape) for c in there if c.layer.rpartition(".")[0] in chains}
    absent = expected - found
    holders = _layers(network)[1] if absent else {}
    absent = {(name, shape) for name, shape in absent if left.isdisjoint({*holders.get(f"{name}.weight", ())} - {name})}
    if odd := sorted(f"{name} {shape}" for name, shape in (found - expected) | absent):
        raise ParityError(f"the ONNX graph has other convolutions than the network's chains: {', '.join(odd)}")


def name_layers(model: ModelProto, network: nn.Module, prefix: str) -> None:
    """Give every convolution and linear node the qualified name of its layer, in place, and take the wrapper's prefix from all names.

    A layer that is called several times gives ``name``, ``name#2``, ...; the name of any other convolution has a slash in it. Both exporters keep
    the names of weights; where several layers share one, or have equal ones, which exporters make one, or the weight is computed, the module in whose
    scope the node was made tells which it is.
    """
    for graph in _graphs(model.graph):
        for node in graph.node:
            for entry in [entry for entry in node.metadata_props if entry.key in ABOUT_THE_MAKER]:
                node.metadata_props.remove(entry)
    _strip(model.graph, prefix)
    layers, holders = _layers(network)
    taken: set[str] = set()
    for graph in _graphs(model.graph):
        for node in graph.node:
            layer = _layer(node, layers, holders) if node.op_type in LAYERS else None
            if layer is not None:
                node.name = numbered(layer, taken)
            elif node.op_type in CONVOLUTIONS and "/" not in node.name:
                node.name = f"/{node.name}"
            taken.add(node.name)


def _layers(network: nn.Module) -> tuple[set[str], dict[str, list[str]]]:
    """First names of all convolution and linear modules, and those that hold a weight or its equal, by each name that the weight has."""
    layers = {name: module for name, module in network.named_modules() if name and isinstance(module, nn.modules.conv._ConvNd | nn.Linear)}
    by_weight: dict[int, list[str]] = {}
    alike: dict[tuple[Any, ...], list[tuple[Tensor, list[str]]]] = {}
    for name, module in layers.items():
        weight = module._parameters.get("weight")
        if weight is None:
            continue
        if id(weight) not in by_weight:
            group = alike.setdefault((weight.shape, weight.dtype, weight.device, weight.detach().sum().item()), [])
            names = next((names for other, names in group if torch.equal(other, weight)), [])
            group.append((weight, names))
            by_weight[id(weight)] = names
        by_weight[id(weight)].append(name)
    weights = network.named_parameters(remove_duplicate=False)
    return set(layers), {name: by_weight[id(weight)] for name, weight in weights if id(weight) in by_weight}


def _layer(node: NodeProto, layers: Collection[str], holders: Mapping[str, Sequence[str]]) -> str | None:
    """The layer whose call a node is."""
    candidates = next((holders[name] for name in node.input if name in holders), ())
    if len(candidates) == 1:
        return candidates[0]
    for scope in reversed(_scopes(node)):
        if scope in (candidates or layers):
            return scope
    return candidates[0] if candidates else None


def _scopes(node: NodeProto) -> list[str]:
    """Qualified names of the modules in which a node was made, the innermost last."""
    for entry in node.metadata_props:
        if entry.key == SCOPES:
            return [str(scope) for scope in ast.literal_eval(entry.value)]
    path, scopes = "", []
    for part in node.name.split("/")[1:-1]:  # /layer1/layer1.0/conv1/Conv: each part begins with the last name that is no number
        before, _, last = part.rpartition(".")
        path = ".".join(p for p in (path, last if path.endswith(before) else part) if p)
        scopes += [path, re.sub(r"_\d+$", "", path)]  # a second call has a number
    return scopes


def numbered(layer: str, taken: Collection[str]) -> str:
    """The name, with a number where it is taken."""
    name, number = layer, 1
    while name in taken:
        number += 1
        name = f"{layer}#{number}"
    return name


def _strip(graph: GraphProto, prefix: str) -> None:
    """Take ``prefix.`` and ``/prefix/`` from the names of values, nodes and scopes, but where another value has the shorter name."""
    names = {name for g in _graphs(graph) for name in _values(g)}

    def shorter(name: str) -> str:
        for start, instead in ((f"{prefix}.", ""), (f"/{prefix}/", "/")):
            if name.startswith(start) and instead + name.removeprefix(start) not in names:
                return instead + name.removeprefix(start)
        return name

    for g in _graphs(graph):
        held = {tensor.name for tensor in g.initializer}
        listed = [value for value in g.input if value.name in held]  # operator sets below 9 list weights as inputs too
        for value in (*g.initializer, *g.value_info, *g.output, *listed):
            value.name = shorter(value.name)
        for node in g.node:
            node.name = shorter(node.name)
            node.input[:] = [shorter(name) for name in node.input]
            node.output[:] = [shorter(name) for name in node.output]
            for entry in node.metadata_props:
                if entry.key == SCOPES:
                    scopes = [scope.removeprefix(prefix).removeprefix(".") for scope in ast.literal_eval(entry.value)]
                    entry.value = repr(scopes)


def _values(graph: GraphProto) -> Iterator[str]:
    for value in (*graph.input, *graph.initializer):
        yield value.name
    for node in graph.node:
        yield from node.output


def _graphs(graph: GraphProto) -> Iterator[GraphProto]:
    """A graph and those inside of its nodes."""
    yield graph
    for node in graph.node:
        for attribute in node.attribute:
            for inner in (attribute.g, *attribute.graphs):
                if inner.node:
                    yield from _graphs(inner)


def _shapes(graph: GraphProto) -> dict[str, tuple[int, ...]]:
    """Shapes of constants, by name, those of their second names too."""
    found = {tensor.name: tuple(tensor.dims) for tensor in graph.initializer}
    for node in graph.node:
        if node.op_type == "Identity" and node.input[0] in found:
            found[node.output[0]] = found[node.input[0]]
        elif node.op_type == "Constant" and (value := next((a.t for a in node.attribute if a.name == "value"), None)) is not None:
            found[node.output[0]] = tuple(value.dims)
    return found


def _layer_of(node: NodeProto) -> str:
    return "" if "/" in node.name else node.name.partition("#")[0]
