"""ONNX files of cut networks, made from the original's: where a layer is cut its nodes give way to those of a chain, and all else is shared.

To export a network takes seconds and its weights' size on disk; here that is done once for all plans that are raced.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from passes.factorization import Decision, Factorization
from passes.geometry import Geometry
from passes.kinds import kind_of
from passes.parity import tensors_in
from passes.running import arguments
from passes.site import Site
from surgery.cost.chains import noise_scale, onnx_nodes

__all__ = ["Exported", "quick_onnx"]

CONVOLUTIONS = ("Conv", "ConvTranspose")
WEIGHTS = "weights"


@dataclass(slots=True)
class Exported:
    """The original as an ONNX file with its weights beside it.

    Attributes:
        file: of the original.
        model: its graph, the weights left where they are.
        cuts: how many files were made of it.
    """

    file: Path
    model: Any
    cuts: int = 0

    @classmethod
    def of(cls, network: nn.Module, inputs: Any, folder: Path) -> Exported | None:
        """Export into a folder by torch's older exporter, which takes a second instead of half a minute; None where it cannot do it."""
        import onnx

        from surgery.export.onnx_layers import name_layers
        from surgery.onnx_files.files import move_out

        raw, file = folder / "raw.onnx", folder / "original.onnx"
        if not quick_onnx(network, inputs, raw):
            return None
        model = onnx.load(str(raw))
        if len(model.graph.input) != len(list(tensors_in(inputs))):
            return None
        name_layers(model, network, "")
        move_out(model, WEIGHTS)
        onnx.save_model(model, str(file))
        raw.unlink()
        return cls(file, onnx.load(str(file), load_external_data=False))

    def cut(self, sites: Sequence[Site], decisions: Mapping[str, Decision]) -> Path | None:
        """A file of the network cut as decided, with noise for the chains' weights; None where the nodes of a layer are not known for certain."""
        import onnx

        model = onnx.ModelProto()
        model.CopyFrom(self.model)
        graph = model.graph
        instead: dict[str, list[Any]] = {}
        for site in sites:
            decision = decisions.get(site.name)
            if not isinstance(decision, Factorization):
                continue
            nodes = [node for node in graph.node if node.op_type in CONVOLUTIONS and node.name.partition("#")[0] in site.aliases]
            shapes = {tensor.name: tensor for tensor in graph.initializer}
            if len(nodes) != len(site.calls or ()) or not all(_is_layer(node, site.geometry, shapes) for node in nodes):
                return None
            layers = [shape.geometry for shape in kind_of(decision).shapes(site.geometry, decision, True)]
            graph.initializer.extend(_noise(layers, site.name, shapes[nodes[0].input[1]].data_type))
            instead |= {node.name: _chain(node, layers, site) for node in nodes}
        kept = [made for node in graph.node for made in instead.get(node.name, [node])]
        del graph.node[:]
        graph.node.extend(kept)
        _forget_unused(graph)
        self.cuts += 1
        file = self.file.with_name(f"cut{self.cuts}.onnx")
        file.write_bytes(model.SerializeToString())
        return file


def quick_onnx(network: nn.Module, inputs: Any, file: Path) -> bool:
    """Whether torch's older exporter could write the network."""
    import torch

    from surgery.export.common import quiet

    args, kwargs = arguments(inputs)
    if args and isinstance(args[-1], dict):
        args = (*args, {})
    try:
        with quiet():
            torch.onnx.export(network, args, str(file), kwargs=kwargs, dynamo=False, verbose=False)
    except Exception:  # whatever it cannot do, the newer exporter is asked next, and its error is the one to show
        return False
    return file.exists()


def _is_layer(node: Any, geometry: Geometry, weights: Mapping[str, Any]) -> bool:
    """Whether a node does all that a layer of this geometry does, and nothing else."""
    weight = weights.get(node.input[1])
    made, constants = onnx_nodes(geometry, "", "x", geometry.dims + 2)
    if weight is None or tuple(weight.dims) != geometry.weight_shape or len(made) != 1 or constants or made[0].op_type != node.op_type:
        return False
    found, zeros, ones = _attributes(node), [0] * geometry.dims, [1] * geometry.dims
    usual = {"auto_pad": b"NOTSET", "dilations": ones, "group": 1, "output_padding": zeros, "pads": zeros * 2, "strides": ones}
    expected = usual | _attributes(made[0])
    return all((usual | found).get(name) == value for name, value in expected.items())


def _attributes(node: Any) -> dict[str, Any]:
    from onnx import helper

    return {attribute.name: helper.get_attribute_value(attribute) for attribute in node.attribute}


def _noise(layers: Sequence[Geometry], name: str, number: int) -> list[Any]:
    """Weights of a chain's layers, and the last one's bias."""
    import numpy as np
    from onnx import helper, numpy_helper

    random, dtype = np.random.default_rng(0), helper.tensor_dtype_to_np_dtype(number)
    found = []
    for index, g in enumerate(layers):
        weight = random.standard_normal(g.weight_shape, np.float32) * noise_scale(g)
        found.append(numpy_helper.from_array(weight.astype(dtype), f"w{name}/{index}"))
    bias = np.zeros(layers[-1].out_channels, dtype)
    return [*found, numpy_helper.from_array(bias, f"b{name}/{len(layers) - 1}")]


def _chain(node: Any, layers: Sequence[Geometry], site: Site) -> list[Any]:
    """The nodes of a chain between the input and the output of a layer's node."""
    found: list[Any] = []
    name = node.input[0]
    for index, g in enumerate(layers):
        (made,), _ = onnx_nodes(g, f"{site.name}/{index}", name, g.dims + 2)
        last = index == len(layers) - 1
        if not last:
            made.input[:] = made.input[:2]
        made.name = f"{node.name}/{index}"
        made.output[0] = node.output[0] if last else f"{made.output[0]} of {node.name}"
        name = made.output[0]
        found.append(made)
    return found


def _forget_unused(graph: Any) -> None:
    """Drop the weights that no node reads, unless there are graphs inside of nodes that may."""
    if any(attribute.HasField("g") or attribute.graphs for node in graph.node for attribute in node.attribute):
        return
    used = {name for node in graph.node for name in node.input}
    kept = [tensor for tensor in graph.initializer if tensor.name in used]
    del graph.initializer[:]
    graph.initializer.extend(kept)
