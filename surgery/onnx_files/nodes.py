"""One layer in ONNX: from a node to the geometry that torch's layer would have, and from the pieces of a chain to nodes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from torch import Tensor

from passes.geometry import Geometry

if TYPE_CHECKING:
    from onnx import NodeProto

__all__ = ["LAYERS", "LayerNode", "auto_pad", "layer_node", "piece_node", "stored", "weight_place", "whole_geometry"]

CONVOLUTIONS = ("Conv", "ConvTranspose")
LAYERS = (*CONVOLUTIONS, "Gemm", "MatMul")
OTHER_LAYERS = {"FusedConv": 1, "FusedGemm": 1, "FusedMatMul": 1, "QLinearConv": 3, "ConvInteger": 1, "QLinearMatMul": 3, "MatMulInteger": 1}
"""Layers that are never cut, and which of their inputs is the weight."""
OWN_DOMAINS = ("", "ai.onnx")


@dataclass(frozen=True, slots=True)
class LayerNode:
    """What a node says of its layer.

    Attributes:
        geometry: as torch's layer would have it.
        keep: why the node cannot be replaced by others, whatever its weight is.
        lies: whether the weight is stored as (inputs, outputs), the other way round than torch's.
    """

    geometry: Geometry
    keep: str | None = None
    lies: bool = False


def weight_place(node: NodeProto) -> int | None:
    """Which input of a node is the weight of a layer, None where it is no layer."""
    place = 1 if node.op_type in LAYERS and node.domain in OWN_DOMAINS else OTHER_LAYERS.get(node.op_type)
    return place if place is not None and place < len(node.input) and node.input[place] else None


def layer_node(node: NodeProto, weight_shape: Sequence[int]) -> LayerNode | None:
    """The layer that a node is with a weight of this shape; None where it is none (a weight of a batch of matrices, for example)."""
    from onnx import helper

    told: dict[str, Any] = {a.name: helper.get_attribute_value(a) for a in node.attribute}
    convolution = "Conv" in node.op_type
    if len(weight_shape) < 3 if convolution else len(weight_shape) != 2:
        return None
    found = _convolution(node, told, tuple(weight_shape)) if convolution else _linear(node, told, tuple(weight_shape))
    if node.op_type in OTHER_LAYERS:
        what = "fused with what follows it" if node.op_type.startswith("Fused") else "quantized"
        return replace(found, keep=f"it is {what} ({node.op_type})")
    return found


def _linear(node: NodeProto, told: Mapping[str, Any], shape: tuple[int, ...]) -> LayerNode:
    lies = not told.get("transB", 0)
    into, out = shape if lies else shape[::-1]
    keep = None
    if told.get("transA", 0):
        keep = "it transposes its input (transA)"
    elif told.get("alpha", 1.0) != 1.0 or told.get("beta", 1.0) != 1.0:
        keep = "it scales its product or its bias (alpha, beta)"
    elif "broadcast" in told:
        keep = "it is a Gemm of an operator set below 7, which spreads its bias in another way"
    return LayerNode(Geometry(in_channels=into, out_channels=out), keep, lies)


def _convolution(node: NodeProto, told: Mapping[str, Any], shape: tuple[int, ...]) -> LayerNode:
    dims, groups, transposed = len(shape) - 2, int(told.get("group", 1)), node.op_type == "ConvTranspose"
    first, second = shape[0], shape[1] * groups
    padding, padding_end, keep = _padding(told, dims, transposed)
    geometry = Geometry(
        in_channels=first if transposed else second,
        out_channels=second if transposed else first,
        kernel=shape[2:],
        stride=tuple(told.get("strides", (1,) * dims)),
        padding=padding,
        padding_end=padding_end,
        dilation=tuple(told.get("dilations", (1,) * dims)),
        groups=groups,
        transposed=transposed,
        output_padding=tuple(told.get("output_padding", (0,) * dims)),
    )
    return LayerNode(geometry, keep)


def _padding(told: Mapping[str, Any], dims: int, transposed: bool) -> tuple[tuple[int, ...] | str, tuple[int, ...], str | None]:
    """Padding at the beginning, at the end where that differs, and why the layer must stay for its sake."""
    automatic = told.get("auto_pad", b"NOTSET").decode()
    zeros = (0,) * dims
    if transposed and "output_shape" in told:
        return zeros, (), "it is told the size of its output (output_shape)"
    if automatic in ("SAME_UPPER", "SAME_LOWER"):
        return ("same", (), None) if not transposed else (zeros, (), f"a transposed convolution with auto_pad={automatic}")
    pads = tuple(told.get("pads", zeros * 2)) if automatic == "NOTSET" else zeros * 2
    begin, end = pads[:dims], pads[dims:]
    keep = "its padding is negative" if min(pads, default=0) < 0 else None
    return begin, () if begin == end else end, keep


def auto_pad(node: NodeProto) -> bytes | None:
    """How a node with padding ``"same"`` shares an odd number of pixels out."""
    return next((a.s for a in node.attribute if a.name == "auto_pad" and a.s.startswith(b"SAME")), None)


def stored(weight: Tensor, lies: bool) -> Tensor:
    """A weight as torch has it in the order of a file, or back."""
    return weight.mT.contiguous() if lies else weight


def piece_node(geometry: Geometry, name: str, values: Sequence[str], output: str, same: bytes | None, *, lies: bool) -> NodeProto:
    """The node of a layer.

    Args:
        geometry: of the layer.
        name: of the node.
        values: names of its input, its weight and, if it has one, its bias.
        output: name of its output.
        same: how padding ``"same"`` shares an odd number of pixels out.
        lies: whether the weight of a linear layer lies; where it does not, or there is a bias, the input must be a matrix.
    """
    from onnx import helper

    if geometry.is_linear:
        if len(values) == 2 and lies:
            return helper.make_node("MatMul", values, [output], name=name)
        return helper.make_node("Gemm", values, [output], name=name, transB=0 if lies else 1)
    told: dict[str, Any] = {"kernel_shape": geometry.kernel, "strides": geometry.stride, "dilations": geometry.dilation, "group": geometry.groups}
    if geometry.padding == "same":
        told["auto_pad"] = same or b"SAME_UPPER"
    else:
        begin, end = zip(*(geometry.pads(axis) for axis in range(geometry.dims)), strict=True)
        told["pads"] = (*begin, *end)
    if geometry.transposed and any(geometry.output_padding):
        told["output_padding"] = geometry.output_padding
    return helper.make_node("ConvTranspose" if geometry.transposed else "Conv", values, [output], name=name, **told)


def whole_geometry(pieces: Sequence[Geometry]) -> Geometry:
    """The geometry of the layer that a chain stands for: in every direction that of the piece which does something there."""
    dims = pieces[0].dims
    if not dims:
        return Geometry(in_channels=pieces[0].in_channels, out_channels=pieces[-1].out_channels)
    acting = [next((g for g in pieces if _acts(g, axis)), pieces[0]) for axis in range(dims)]
    same = any(g.padding == "same" for g in pieces)
    ends = tuple(g.pads(axis)[1] for axis, g in enumerate(acting))
    begins = tuple(g.pads(axis)[0] for axis, g in enumerate(acting))
    return Geometry(
        in_channels=pieces[0].in_channels,
        out_channels=pieces[-1].out_channels,
        kernel=tuple(g.kernel[axis] for axis, g in enumerate(acting)),
        stride=tuple(g.stride[axis] for axis, g in enumerate(acting)),
        padding="same" if same else begins,
        padding_end=() if same or begins == ends else ends,
        dilation=tuple(g.dilation[axis] for axis, g in enumerate(acting)),
        groups=min(g.groups for g in pieces),
        transposed=any(g.transposed for g in pieces),
        output_padding=tuple(g.output_padding[axis] for axis, g in enumerate(acting)),
    )


def _acts(geometry: Geometry, axis: int) -> bool:
    return max(geometry.kernel[axis], geometry.stride[axis], geometry.dilation[axis]) > 1 or any(geometry.pads(axis))
