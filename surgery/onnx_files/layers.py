"""Which nodes of an ONNX graph are layers, and which runs of nodes are chains that its plan names."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING

from torch import Tensor

from passes.factorization import Decision, Factorization
from passes.geometry import Geometry, Piece
from passes.kinds import kind_of
from surgery.export.onnx_layers import numbered
from surgery.onnx_files.graph import Constant, Graph, inner_graphs, read_tensor, told
from surgery.onnx_files.nodes import layer_node, stored, weight_place, whole_geometry
from surgery.onnx_files.shapes import Shapes

if TYPE_CHECKING:
    from onnx import NodeProto

__all__ = ["InnerLayer", "Layer", "bias_of", "find_layers", "inner_layers"]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Layer:
    """A layer or a chain in the graph.

    Attributes:
        name: of the site.
        nodes: places of its nodes, first to last.
        geometry: of the (original) layer.
        constants: the weights of its nodes; none where one is computed, and ``keep`` says how.
        pieces: names and geometries of a chain's layers.
        lies: for each node, whether its weight lies.
        keep: why it must stay, if so.
        factorization: of a chain.
    """

    name: str
    nodes: tuple[int, ...]
    geometry: Geometry
    constants: tuple[Constant, ...]
    lies: tuple[bool, ...]
    keep: str | None = None
    pieces: tuple[tuple[str, Geometry], ...] = ()
    factorization: Factorization | None = None

    @property
    def tie(self) -> tuple[object, ...]:
        """Equal for layers that hold the same weights and can share the factors of one."""
        g = self.geometry
        shape = (g.in_channels, g.out_channels, g.kernel, g.groups, g.transposed, self.lies)
        return (*(constant.name for constant in self.constants), shape, self.factorization)

    @property
    def weight(self) -> Tensor:
        """That of the one layer that a chain stands for, where it is one."""
        weights = self.weights()
        if self.factorization is None:
            return weights[0]
        wide = [Piece(name, geometry, weight.double(), None) for (name, geometry), weight in zip(self.pieces, weights, strict=True)]
        return kind_of(self.factorization).merge(wide, self.geometry).to(weights[0].dtype)

    def weights(self) -> list[Tensor]:
        """Of each of its nodes, as torch has them."""
        return [stored(read_tensor(c.tensor), lies) for c, lies in zip(self.constants, self.lies, strict=True)]


@dataclass(frozen=True, slots=True, kw_only=True)
class InnerLayer:
    """A layer in the body of another node: the name and operator of its node, and that node in words."""

    name: str
    op: str
    geometry: Geometry
    body_of: str


def find_layers(graph: Graph, plan: Mapping[str, Decision], shapes: Shapes | None) -> dict[str, Layer]:
    """All layers of the main graph by name, in its order, a chain that the plan names as one.

    Args:
        graph: to be looked at.
        plan: of the file.
        shapes: of values, where known: a weight that is computed has none otherwise.
    """
    chains = {chain.nodes[0]: chain for chain in _chains(graph, plan)}
    inside = {index for chain in chains.values() for index in chain.nodes}
    names: set[str] = {chain.name for chain in chains.values()}
    found: dict[str, Layer] = {}
    for index, node in enumerate(graph.nodes):
        layer = chains.get(index) or (None if index in inside else _layer(graph, shapes or {}, index, node, names))
        if layer is not None:
            names.add(layer.name)
            found[layer.name] = layer
    return found


def inner_layers(graph: Graph, names: set[str]) -> Iterator[InnerLayer]:
    """Layers in the bodies of other nodes (``If``, ``Loop``, ``Scan``), under names that are not among these."""
    names = set(names)
    for outer in graph.nodes:
        for inner in inner_graphs(outer):
            own = {tensor.name: tuple(tensor.dims) for tensor in inner.initializer}
            own |= {n.output[0]: tuple(a.t.dims) for n in inner.node if n.op_type == "Constant" for a in n.attribute if a.name == "value"}
            for node in inner.node:
                place = weight_place(node)
                constant = None if place is None else graph.constant(node.input[place])
                shape = None if place is None else own.get(node.input[place])
                shape = tuple(constant.tensor.dims) if shape is None and isinstance(constant, Constant) else shape
                found = None if shape is None else layer_node(node, shape)
                if found is not None:
                    name = _name(node, names, prefix=f"{outer.name or outer.output[0]}/")
                    names.add(name)
                    yield InnerLayer(name=name, op=node.op_type, geometry=found.geometry, body_of=told(outer))


def _layer(graph: Graph, shapes: Shapes, index: int, node: NodeProto, names: set[str]) -> Layer | None:
    """The layer that a node is, or None."""
    place = weight_place(node)
    if place is None:
        return None
    constant = graph.constant(node.input[place])
    known = isinstance(constant, Constant)
    shape = tuple(constant.tensor.dims) if isinstance(constant, Constant) else shapes.get(node.input[place])
    if not known and "MatMul" in node.op_type and "quantized" not in str(constant) and node.input[place] not in graph.fixed:
        return None  # a product of two things that depend on the inputs is no layer
    found = None if shape is None else layer_node(node, shape)
    if found is None:
        return None
    keep = found.keep
    if isinstance(constant, str):
        keep = keep or f"its weight is {constant}"
    return Layer(
        name=_name(node, names),
        nodes=(index,),
        geometry=found.geometry,
        constants=(constant,) if isinstance(constant, Constant) else (),
        lies=(found.lies,),
        keep=keep,
    )


def _chains(graph: Graph, plan: Mapping[str, Decision]) -> Iterator[Layer]:
    """Chains that the plan names and whose nodes are still what it says, each call of a layer one of its own."""
    runs: dict[tuple[str, str], list[int]] = {}
    for index, node in enumerate(graph.nodes):
        for name, call in _chain_names(node.name):
            if isinstance(plan.get(name), Factorization):
                runs.setdefault((name, call), []).append(index)
    for (name, call), run in runs.items():
        found = (chain for part in _parts(graph, run) if (chain := _chain(graph, plan, name, call, part)) is not None)
        yield from islice(found, 1)


def _parts(graph: Graph, run: Sequence[int]) -> Iterator[list[int]]:
    """Layers of a run that follow each other, longest first: other nodes may have names that begin like those of the chain's layers."""
    members = [index for index in run if weight_place(graph.nodes[index]) == 1]
    follows = {}
    for index in members:
        readers = graph.readers.get(graph.nodes[index].output[0], [])
        if len(readers) == 1 and readers[0].node in members and readers[0].input == 0:
            follows[index] = readers[0].node
    paths = []
    for start in (index for index in members if index not in follows.values()):
        path = [start]
        while path[-1] in follows:
            path.append(follows[path[-1]])
        paths.append(path)
    for length in range(max(map(len, paths), default=0), 1, -1):
        for path in paths:
            yield from (path[first : first + length] for first in range(len(path) - length + 1))


def _chain(graph: Graph, plan: Mapping[str, Decision], name: str, call: str, run: Sequence[int]) -> Layer | None:
    nodes = [graph.nodes[index] for index in run]
    constants = [graph.constant(node.input[1]) if weight_place(node) == 1 else "" for node in nodes]
    weights = [constant for constant in constants if isinstance(constant, Constant)]
    found = [layer_node(node, tuple(weight.tensor.dims)) for node, weight in zip(nodes, weights, strict=False)]
    layers = [layer for layer in found if layer is not None and layer.keep is None]
    if len(layers) != len(nodes) or not _is_run(graph, run):
        return None
    pieces = [(node.name.removesuffix(call).removeprefix(f"{name}."), layer.geometry) for node, layer in zip(nodes, layers, strict=True)]
    factorization = plan[name]
    whole = whole_geometry([layer.geometry for layer in layers])
    if not isinstance(factorization, Factorization) or pieces != _shapes(whole, factorization):
        return None
    return Layer(
        name=name + call,
        nodes=tuple(run),
        geometry=whole,
        constants=tuple(weights),
        lies=tuple(layer.lies for layer in layers),
        pieces=tuple(pieces),
        factorization=factorization,
    )


def _is_run(graph: Graph, run: Sequence[int]) -> bool:
    """Whether each node is all that reads the one before, and none but the last has a bias."""
    nodes = [graph.nodes[index] for index in run]
    readers = [[(r.node, r.input) for r in graph.readers.get(node.output[0], [])] for node in nodes[:-1]]
    return readers == [[(index, 0)] for index in run[1:]] and all(bias_of(node) is None for node in nodes[:-1])


def _name(node: NodeProto, names: set[str], prefix: str = "") -> str:
    """The name of a node's site: its own, or of its output where it has none; numbered where it is not the first."""
    return numbered(prefix + (node.name or node.output[0]), names)


def _chain_names(node: str) -> Iterator[tuple[str, str]]:
    """Of which chains a node of this name may be a layer: the chain's name in the plan, and the number of its call as exporters write it."""
    whole, mark, number = node.rpartition("#")
    for name, call in ((node, ""), (whole, mark + number)):
        if "." in name and (not call or number.isdigit()):
            yield name.rpartition(".")[0], call


def _shapes(geometry: Geometry, factorization: Factorization) -> list[tuple[str, Geometry]] | None:
    """Names and geometries of the layers of a chain, or None where there is no such chain."""
    kind = kind_of(factorization)
    if kind.refuses(geometry) or kind.refuses_ranks(geometry, factorization.ranks):
        return None
    return [(shape.name, shape.geometry) for shape in kind.shapes(geometry, factorization, False)]


def bias_of(node: NodeProto) -> str | None:
    """The value that a node adds, if it has one."""
    return node.input[2] if len(node.input) > 2 and node.input[2] else None
