"""Surgery on an ONNX graph: one node becomes one node for each layer of its chain, and back."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, NoReturn

import torch
from torch import Tensor

from passes.errors import SurgeryError, SurgeryTypeError
from passes.factorization import Factorization, Keep
from passes.geometry import Piece
from passes.host import Host, Undo
from passes.site import COMPUTING_DTYPES, Call, Site, kept_together
from surgery.export.onnx_layers import numbered
from surgery.onnx_files.edit import Edit, apply_edits
from surgery.onnx_files.graph import Constant, Graph, read_tensor, tensor_dtype, write_tensor
from surgery.onnx_files.layers import InnerLayer, Layer, bias_of, find_layers, inner_layers
from surgery.onnx_files.nodes import auto_pad, piece_node, stored
from surgery.onnx_files.record import read_file_record, write_plan
from surgery.onnx_files.shapes import Shapes

if TYPE_CHECKING:
    from onnx import ModelProto, NodeProto

__all__ = ["End", "OnnxHost"]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class End:
    """The last layer of a chain: the place of its node, the values that it reads and gives, its weight and bias.

    ``lower``: its padding is SAME_LOWER.
    """

    node: int
    reads: str
    gives: str
    piece: Piece
    lower: bool


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
        return kept_together(sites) + tuple(_kept(inner) for inner in inner_layers(self._graph, set(self._layers)))

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
        node, added = self._graph.nodes[index], bias_of(self._graph.nodes[index])
        piece = self._pieces(layer)[-1]
        bias = None if added is None else self._graph.constant(added)
        numbers = [layer.constants[-1], *([bias] if isinstance(bias, Constant) else [])]  # what is held, behind whatever Identity nodes
        own = all(len(self._graph.readers_of_constant(each.name)) == 1 for each in numbers)
        if not own or (bias is not None and (piece.bias is None or not isinstance(bias, Constant))):
            return None
        return End(node=index, reads=node.input[0], gives=node.output[0], piece=piece, lower=auto_pad(node) == b"SAME_LOWER")

    def put(self, name: str, piece: Piece) -> None:
        """Give the last layer of a chain other numbers."""
        layer = self._layers[name]
        bias = bias_of(self._graph.nodes[layer.nodes[-1]])
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
        self._layers = find_layers(self._graph, self._plan, self._shapes)
        self._alike: dict[tuple[object, ...], set[int]] = {}
        for found in self._layers.values():
            self._alike.setdefault(found.tie, set()).update(found.nodes)

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
            read_weight=partial(getattr, layer, "weight"),
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
        name = bias_of(node)
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
        weights = layer.weights()
        last = self._graph.nodes[layer.nodes[-1]]
        biases = [None] * (len(weights) - 1) + [self._bias_numbers(last, layer.geometry.out_channels)]
        return tuple(Piece(name, g, weight, bias) for (name, g), weight, bias in zip(layer.pieces, weights, biases, strict=True))

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
        value, bias, output = old[0].input[0], bias_of(old[-1]), old[-1].output[0]
        same = next((found for node in old if (found := auto_pad(node)) is not None), None)
        nodes = []
        for number, (name, piece) in enumerate(pieces, 1):
            last = number == len(pieces)
            lies = piece.geometry.is_linear and (not last or layer.lies[-1])  # as in the layer: those tied to it read the same weight, bias or not
            values = [value, self._stored_name(piece, lies=lies)]
            made = output if last else self._fresh(f"{name}.output")
            nodes.append(piece_node(piece.geometry, name, values + ([bias] if last and bias is not None else []), made, same, lies=lies))
            value = made
        weights = tuple(node.input[1] for node in old)
        self._edits.append(Edit(nodes=layer.nodes, instead=tuple(nodes), weights=weights))

    def _stored_name(self, piece: Piece, *, lies: bool) -> str:
        numbers, name = self._placed_names[id(piece.weight)]
        self._new[name] = stored(numbers, lies)
        return name

    def _fresh(self, name: str) -> str:
        unique = numbered(name, self._taken)
        self._taken.add(unique)
        return unique


def _unusable(dtype: torch.dtype | None, layer: Layer) -> str | None:
    if not layer.geometry.weights:
        return "its weight is empty"
    if dtype not in COMPUTING_DTYPES:
        return f"its weight is {dtype or 'of a type that torch has not'}, not floating point of 16 bits or more"
    return None


def _kept(layer: InnerLayer) -> Site:
    return Site(
        name=layer.name,
        aliases=(layer.name,),
        layer=layer.op,
        geometry=layer.geometry,
        bias=None,
        dtype=torch.float32,
        device=torch.device("cpu"),
        calls=None,
        keep=f"it is in the body of {layer.body_of}",
        tied_to=None,
        chain=None,
        read_weight=partial(torch.empty, layer.geometry.weight_shape, device="meta"),
        read_pieces=tuple,
    )
