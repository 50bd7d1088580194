"""Surgery on an ONNX graph: one node becomes one node for each layer of its chain, and back."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, NoReturn

import torch
from torch import Tensor

from passes.errors import SurgeryError, SurgeryTypeError
from passes.factorization import Factorization, Keep
from passes.geometry import Geometry, Piece
from passes.host import Host, Undo
from passes.kinds import kind_of
from passes.site import COMPUTING_DTYPES, Call, Site, kept_together
from surgery.onnx_files.edit import Edit, apply_edits
from surgery.onnx_files.graph import Constant, Graph, inner_graphs, read_tensor, tensor_dtype, told, write_tensor
from surgery.onnx_files.nodes import auto_pad, layer_node, piece_node, stored, weight_place, whole_geometry
from surgery.onnx_files.record import read_file_record, write_plan
from surgery.onnx_files.shapes import Shapes

if TYPE_CHECKING:
    from onnx import ModelProto, NodeProto

__all__ = ["End", "OnnxHost"]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Layer:
    """A layer or a chain in the graph.

    Attributes:
        name: of the site.
        nodes: places of its nodes, first to last.
        geometry: of the (original) layer.
        constants: the weights of its nodes; the reason why it has none where one is computed.
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


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class End:
    """The last layer of a chain: the place of its node, the values that it reads and gives, its weight and bias."""

    node: int
    reads: str
    gives: str
    piece: Piece


class OnnxHost(Host):
    """Host for the model of an ONNX file; works in place on the model it is given.

    A site is a node ``Conv``, ``ConvTranspose``, ``Gemm`` or ``MatMul`` with a weight that the file holds (an initializer, also one that is an
    input with a default, or a ``Constant`` node), under the name of its node, or of its output where the node has none. Nodes with one weight are
    tied. All else is kept with a reason: weights that are computed, quantized or read otherwise, nodes in the bodies of ``If``, ``Loop`` and
    ``Scan``. Chains are found by the plan in the file's metadata and the names of their nodes, also in files that ``export_onnx`` wrote.

    Args:
        model: of the file, its external data loaded.
        shapes: of its values, where known (``value_shapes``): MACs come from them.
    """

    def __init__(self, model: ModelProto, shapes: Shapes | None = None) -> None:
        if type(model).__name__ != "ModelProto":
            raise SurgeryTypeError(f"model: expected an onnx.ModelProto, got {type(model).__name__}")
        self.model = model
        self._shapes = shapes
        self._undo = Undo()
        self._read()

    def sites(self) -> tuple[Site, ...]:
        firsts: dict[tuple[object, ...], str] = {}
        sites = []
        for layer in self._layers.values():
            first = firsts.setdefault(layer.tie, layer.name) if layer.constants else layer.name
            sites.append(self._site(layer, None if first == layer.name else first))
        return kept_together(sites) + tuple(self._inner_sites())

    def reads(self) -> dict[str, str]:
        """By name of a layer or chain, the value that it reads."""
        return {name: self._graph.nodes[layer.nodes[0]].input[0] for name, layer in self._layers.items()}

    def replace(self, site: Site, factorization: Factorization, pieces: Sequence[Piece]) -> tuple[Piece, ...]:
        layer = self._layers[site.name]
        placed = tuple(self._placed(piece, f"{site.name}.{piece.name}.weight", site.dtype) for piece in pieces)
        self._prepare(layer, [(f"{site.name}.{piece.name}", piece) for piece in placed])
        self._plan[site.name] = factorization
        if layer.factorization is None:
            self._weights[site.name] = layer.constants[0].name
        return placed

    def restore(self, site: Site, piece: Piece) -> Piece:
        layer = self._layers[site.name]
        placed = self._placed(piece, self._weights.get(site.name, f"{site.name}.weight"), site.dtype)
        self._prepare(layer, [(site.name, placed)])
        self._plan[site.name] = Keep("reconstructed")
        self._weights.pop(site.name, None)
        return placed

    def written(self, name: str, weight: Tensor) -> tuple[str, Tensor]:
        """The constant that a layer's weight is, and another weight, as torch has it, as it would stand there."""
        layer = self._layers[name]
        constant = layer.constants[0]
        return constant.name, stored(weight, layer.lies[0]).to(tensor_dtype(constant.tensor.data_type))

    def end(self, name: str) -> End | None:
        """The last layer of a chain, if nothing else reads its numbers."""
        layer = self._layers.get(name)
        if layer is None or layer.factorization is None:
            return None
        index = layer.nodes[-1]
        node, bias = self._graph.nodes[index], _bias(self._graph.nodes[index])
        piece = self._pieces(layer)[-1]
        numbers = [layer.constants[-1].name, *([] if bias is None else [bias])]
        own = all(len(self._graph.readers_of_constant(each)) == 1 for each in numbers)
        if not own or (bias is not None and (piece.bias is None or not isinstance(self._graph.constant(bias), Constant))):
            return None
        return End(node=index, reads=node.input[0], gives=node.output[0], piece=piece)

    def put(self, name: str, piece: Piece) -> None:
        """Give the last layer of a chain other numbers."""
        layer = self._layers[name]
        bias = _bias(self._graph.nodes[layer.nodes[-1]])
        found = [(layer.constants[-1], stored(piece.weight, layer.lies[-1]))]
        if bias is not None and piece.bias is not None and isinstance(constant := self._graph.constant(bias), Constant):
            found.append((constant, piece.bias.reshape(tuple(constant.tensor.dims))))
        for constant, numbers in found:
            constant.tensor.CopyFrom(write_tensor(constant.tensor.name, numbers.to(tensor_dtype(constant.tensor.data_type))))

    def neighbours(self) -> NoReturn:
        raise SurgeryError("clean-up passes work on modules and graph modules, not on ONNX files; runtimes fold and fuse those by themselves")

    def fuse(self, names: Sequence[str], at: str, layer: Any) -> NoReturn:
        self.neighbours()

    def drop(self, name: str) -> NoReturn:
        self.neighbours()

    def commit(self) -> ModelProto:
        self._undo = undo = Undo()
        if self._edits:
            before = list(self.model.metadata_props)
            undo.later(lambda: self._set_metadata(before))
            try:
                apply_edits(self.model, self._graph, self._edits, self._new, undo)
                record = read_file_record(self.model)
                record.plan, record.weights = self._plan, self._weights
                write_plan(self.model, record)
            except BaseException:
                undo()
                raise
            self._read()
        return self.model

    def rollback(self) -> None:
        self._undo()
        self._read()

    def _set_metadata(self, entries: Sequence[Any]) -> None:
        del self.model.metadata_props[:]
        self.model.metadata_props.extend(entries)

    def _read(self) -> None:
        """Everything that is derived from the model, anew."""
        record = read_file_record(self.model)
        self._plan, self._weights = record.plan, record.weights
        self._graph = Graph(self.model)
        self._taken = self._graph.names() | {value.name for value in self.model.graph.input}
        self._edits: list[Edit] = []
        self._new: dict[str, Tensor] = {}
        self._placed_names: dict[int, tuple[Tensor, str]] = {}
        self._layers: dict[str, Layer] = {}
        chains = {chain.nodes[0]: chain for chain in self._chains()}
        inside = {index for chain in chains.values() for index in chain.nodes}
        names: set[str] = {chain.name for chain in chains.values()}
        for index, node in enumerate(self._graph.nodes):
            found = chains.get(index) or (None if index in inside else self._layer(index, node, names))
            if found is not None:
                names.add(found.name)
                self._layers[found.name] = found
        self._alike: dict[tuple[object, ...], set[int]] = {}
        for found in self._layers.values():
            self._alike.setdefault(found.tie, set()).update(found.nodes)

    def _layer(self, index: int, node: NodeProto, names: set[str]) -> Layer | None:
        """The layer that a node is, or None."""
        place = weight_place(node)
        if place is None:
            return None
        constant = self._graph.constant(node.input[place])
        known = isinstance(constant, Constant)
        shape = tuple(constant.tensor.dims) if isinstance(constant, Constant) else (self._shapes or {}).get(node.input[place])
        if not known and "MatMul" in node.op_type and "quantized" not in str(constant):
            return None  # a product of two things that are computed is no layer
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

    def _chains(self) -> Iterator[Layer]:
        """Chains that the plan names and whose nodes are still what it says, each call of a layer one of its own."""
        runs: dict[tuple[str, str], list[int]] = {}
        for index, node in enumerate(self._graph.nodes):
            for name, call in _chain_names(node.name):
                if isinstance(self._plan.get(name), Factorization):
                    runs.setdefault((name, call), []).append(index)
        for (name, call), run in runs.items():
            chain = self._chain(name, call, run)
            if chain is not None:
                yield chain

    def _chain(self, name: str, call: str, run: Sequence[int]) -> Layer | None:
        nodes = [self._graph.nodes[index] for index in run]
        constants = [self._graph.constant(node.input[1]) if weight_place(node) == 1 else "" for node in nodes]
        weights = [constant for constant in constants if isinstance(constant, Constant)]
        found = [layer_node(node, tuple(weight.tensor.dims)) for node, weight in zip(nodes, weights, strict=False)]
        layers = [layer for layer in found if layer is not None and layer.keep is None]
        if len(layers) != len(nodes) or not self._is_run(run):
            return None
        pieces = [(node.name.removesuffix(call).removeprefix(f"{name}."), layer.geometry) for node, layer in zip(nodes, layers, strict=True)]
        factorization = self._plan[name]
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

    def _is_run(self, run: Sequence[int]) -> bool:
        """Whether each node is all that reads the one before, and none but the last has a bias."""
        nodes = [self._graph.nodes[index] for index in run]
        readers = [[(r.node, r.input) for r in self._graph.readers.get(node.output[0], [])] for node in nodes[:-1]]
        return readers == [[(index, 0)] for index in run[1:]] and all(_bias(node) is None for node in nodes[:-1])

    def _site(self, layer: Layer, tied_to: str | None) -> Site:
        nodes = [self._graph.nodes[index] for index in layer.nodes]
        keep = layer.keep or self._shared(layer)
        dtype = tensor_dtype(layer.constants[0].tensor.data_type) if layer.constants else None
        if layer.constants and keep is None:
            keep = _unusable(dtype, layer)
        return Site(
            name=layer.name,
            aliases=(layer.name,),
            layer=nodes[-1].op_type if layer.factorization is None else next((n.op_type for n in nodes if n.op_type != "Conv"), "Conv"),
            geometry=layer.geometry,
            bias=self._bias_numbers(nodes[-1], layer.geometry.out_channels),
            dtype=dtype or torch.float32,
            device=torch.device("cpu"),
            calls=self._calls(nodes),
            keep=keep,
            tied_to=tied_to,
            chain=layer.factorization,
            read_weight=partial(_weight, layer),
            read_pieces=partial(self._pieces, layer),
        )

    def _shared(self, layer: Layer) -> str | None:
        """Who else reads the weights of a layer in another way, in words."""
        alike = self._alike[layer.tie]
        for constant in layer.constants:
            for reader in self._graph.readers_of_constant(constant.name):
                if reader.inside or reader.node not in alike or reader.input != 1:
                    return f"its weight is shared with {self._graph.told_reader(reader)}"
        return None

    def _bias_numbers(self, node: NodeProto, channels: int) -> Tensor | None:
        """The bias that a node adds, None where it has none or one that is computed."""
        name = _bias(node)
        constant = None if name is None else self._graph.constant(name)
        if not isinstance(constant, Constant):
            return None
        numbers = read_tensor(constant.tensor).flatten()
        return numbers if len(numbers) == channels else None

    def _calls(self, nodes: Sequence[NodeProto]) -> tuple[Call, ...] | None:
        shapes = self._shapes or {}
        given, made = shapes.get(nodes[0].input[0]), shapes.get(nodes[-1].output[0])
        return None if given is None or made is None else (Call(given, made),)

    def _pieces(self, layer: Layer) -> tuple[Piece, ...]:
        if layer.factorization is None:
            return ()
        weights = [stored(read_tensor(c.tensor), lies) for c, lies in zip(layer.constants, layer.lies, strict=True)]
        last = self._graph.nodes[layer.nodes[-1]]
        biases = [None] * (len(weights) - 1) + [self._bias_numbers(last, layer.geometry.out_channels)]
        return tuple(Piece(name, g, weight, bias) for (name, g), weight, bias in zip(layer.pieces, weights, biases, strict=True))

    def _inner_sites(self) -> Iterator[Site]:
        """Layers in the bodies of other nodes: kept."""
        names = set(self._layers)
        for outer in self._graph.nodes:
            for graph in inner_graphs(outer):
                own = {tensor.name: tuple(tensor.dims) for tensor in graph.initializer}
                own |= {n.output[0]: tuple(a.t.dims) for n in graph.node if n.op_type == "Constant" for a in n.attribute if a.name == "value"}
                for node in graph.node:
                    place = weight_place(node)
                    constant = None if place is None else self._graph.constant(node.input[place])
                    shape = None if place is None else own.get(node.input[place])
                    shape = tuple(constant.tensor.dims) if shape is None and isinstance(constant, Constant) else shape
                    found = None if shape is None else layer_node(node, shape)
                    if found is not None:
                        name = _name(node, names, prefix=f"{outer.name or outer.output[0]}/")
                        names.add(name)
                        yield _kept(name, node.op_type, found.geometry, f"it is in the body of {told(outer)}")

    def _placed(self, piece: Piece, name: str, dtype: torch.dtype) -> Piece:
        """A piece with the numbers that will stand in the file, under a name of its own; what was placed before is shared."""
        known = self._placed_names.get(id(piece.weight))
        if known is not None:
            return piece
        numbers = piece.weight.detach().to("cpu", dtype).contiguous()
        self._placed_names[id(numbers)] = (numbers, self._fresh(name))
        return Piece(piece.name, piece.geometry, numbers, piece.bias)

    def _prepare(self, layer: Layer, pieces: Sequence[tuple[str, Piece]]) -> None:
        """Note that the nodes of a layer become those of these pieces."""
        old = [self._graph.nodes[index] for index in layer.nodes]
        value, bias, output = old[0].input[0], _bias(old[-1]), old[-1].output[0]
        same = next((found for node in old if (found := auto_pad(node)) is not None), None)
        nodes = []
        for number, (name, piece) in enumerate(pieces, 1):
            last = number == len(pieces)
            values = [value, self._stored_name(piece, lies=piece.geometry.is_linear and not (last and bias is not None))]
            made = output if last else self._fresh(f"{name}.output")
            nodes.append(piece_node(piece.geometry, name, values + ([bias] if last and bias is not None else []), made, same))
            value = made
        weights = tuple(node.input[1] for node in old)
        self._edits.append(Edit(nodes=layer.nodes, instead=tuple(nodes), weights=weights))

    def _stored_name(self, piece: Piece, *, lies: bool) -> str:
        numbers, name = self._placed_names[id(piece.weight)]
        self._new[name] = stored(numbers, lies)
        return name

    def _fresh(self, name: str) -> str:
        unique = _numbered(name, self._taken)
        self._taken.add(unique)
        return unique


def _name(node: NodeProto, names: set[str], prefix: str = "") -> str:
    """The name of a node's site: its own, or of its output where it has none; numbered where it is not the first."""
    return _numbered(prefix + (node.name or node.output[0]), names)


def _numbered(name: str, taken: set[str]) -> str:
    unique, number = name, 1
    while unique in taken:
        number += 1
        unique = f"{name}#{number}"
    return unique


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


def _bias(node: NodeProto) -> str | None:
    return node.input[2] if len(node.input) > 2 and node.input[2] else None


def _unusable(dtype: torch.dtype | None, layer: Layer) -> str | None:
    if not layer.geometry.weights:
        return "its weight is empty"
    if dtype not in COMPUTING_DTYPES:
        return f"its weight is {dtype or 'of a type that torch has not'}, not floating point of 16 bits or more"
    return None


def _weight(layer: Layer) -> Tensor:
    """The weight of a layer, or that of the one layer that a chain stands for."""
    weights = [stored(read_tensor(c.tensor), lies) for c, lies in zip(layer.constants, layer.lies, strict=True)]
    if layer.factorization is None:
        return weights[0]
    wide = [Piece(name, geometry, weight.double(), None) for (name, geometry), weight in zip(layer.pieces, weights, strict=True)]
    return kind_of(layer.factorization).merge(wide, layer.geometry).to(weights[0].dtype)


def _kept(name: str, op: str, geometry: Geometry, reason: str) -> Site:
    return Site(
        name=name,
        aliases=(name,),
        layer=op,
        geometry=geometry,
        bias=None,
        dtype=torch.float32,
        device=torch.device("cpu"),
        calls=None,
        keep=reason,
        tied_to=None,
        chain=None,
        read_weight=partial(torch.empty, geometry.weight_shape, device="meta"),
        read_pieces=tuple,
    )
