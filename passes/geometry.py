"""What a layer is without its numbers: geometry of convolutions and linear layers, and pieces of a chain as plain data."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass, replace
from math import prod
from operator import index

import torch
from torch import Tensor, nn

from passes.errors import SurgeryValueError

__all__ = ["Geometry", "Piece", "PieceShape"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Geometry:
    """A convolution of ``len(kernel)`` dimensions, or a linear layer (``kernel == ()``).

    ``padding`` is one number a dimension, or the word ``"same"`` or ``"valid"`` as torch has it. ``padding_end`` is that at the end of each dimension
    where it differs from the one at the beginning, as ONNX allows; empty for layers of torch.
    """

    in_channels: int
    out_channels: int
    kernel: tuple[int, ...] = ()
    stride: tuple[int, ...] = ()
    padding: tuple[int, ...] | str = ()
    padding_end: tuple[int, ...] = ()
    dilation: tuple[int, ...] = ()
    groups: int = 1
    padding_mode: str = "zeros"
    transposed: bool = False
    output_padding: tuple[int, ...] = ()

    @classmethod
    def of(cls, layer: nn.Module) -> Geometry:
        """The geometry of an ``nn.Linear`` or of any ``nn.Conv*`` layer."""
        if isinstance(layer, nn.Linear):
            return cls(in_channels=index(layer.in_features), out_channels=index(layer.out_features))
        if not isinstance(layer, nn.modules.conv._ConvNd):
            raise SurgeryValueError(f"{type(layer).__name__} is neither a convolution nor a linear layer")
        lengths = [len(v) for v in (layer.kernel_size, layer.stride, layer.dilation, layer.output_padding) if isinstance(v, Iterable)]
        dims = max(lengths) if lengths else len(layer._reversed_padding_repeated_twice) // 2
        return cls(
            in_channels=index(layer.in_channels),  # numpy's would not be written to a file
            out_channels=index(layer.out_channels),
            kernel=_each(layer.kernel_size, dims),
            stride=_each(layer.stride, dims),
            padding=layer.padding if isinstance(layer.padding, str) else _each(layer.padding, dims),
            dilation=_each(layer.dilation, dims),
            groups=index(layer.groups),
            padding_mode=layer.padding_mode,
            transposed=layer.transposed,
            output_padding=_each(layer.output_padding, dims),
        )

    @property
    def dims(self) -> int:
        """Spatial dimensions: 0 for a linear layer."""
        return len(self.kernel)

    @property
    def is_linear(self) -> bool:
        return not self.kernel

    @property
    def is_pointwise(self) -> bool:
        """A linear layer, or a convolution whose kernel is a single pixel."""
        return all(k == 1 for k in self.kernel)

    @property
    def weight_shape(self) -> tuple[int, ...]:
        """The shape in which torch stores the weight."""
        first, second = self.out_channels, self.in_channels
        if self.transposed:
            first, second = second, first
        return (first, second // self.groups, *self.kernel)

    @property
    def weights(self) -> int:
        """How many numbers the weight holds."""
        return prod(self.weight_shape)

    @property
    def is_depthwise(self) -> bool:
        """Each output is made from one input channel only, out of several."""
        return self.groups > 1 and self.in_channels == self.groups

    @property
    def one_group(self) -> Geometry:
        """One of the layer's groups, as a layer of its own."""
        return replace(self, in_channels=self.in_channels // self.groups, out_channels=self.out_channels // self.groups, groups=1)

    def times(self, count: int) -> Geometry:
        """So many of this layer side by side, none seeing the others' channels."""
        return replace(self, in_channels=self.in_channels * count, out_channels=self.out_channels * count, groups=self.groups * count)

    def forward_blocks(self, weight: Tensor) -> Tensor:
        """A stored weight as (groups, C_out / groups, C_in / groups, *kernel): forward direction also where torch stores the channels swapped."""
        one = self.one_group
        if self.transposed:
            return weight.reshape(self.groups, one.in_channels, one.out_channels, *self.kernel).transpose(1, 2)
        return weight.reshape(self.groups, one.out_channels, one.in_channels, *self.kernel)

    def stored(self, blocks: Tensor) -> Tensor:
        """The inverse of ``forward_blocks``."""
        return (blocks.transpose(1, 2) if self.transposed else blocks).flatten(0, 1)

    def pointwise(self, in_channels: int, out_channels: int) -> Geometry:
        """A layer without any spatial extent of its own between the given channels: a 1x1 convolution, or linear."""
        ones, zeros = (1,) * self.dims, (0,) * self.dims
        return Geometry(
            in_channels=in_channels,
            out_channels=out_channels,
            kernel=ones,
            stride=ones,
            padding=zeros,
            dilation=ones,
            output_padding=zeros,
        )

    def between(self, in_channels: int, out_channels: int) -> Geometry:
        """The same kernel, stride and padding between other numbers of channels."""
        return replace(self, in_channels=in_channels, out_channels=out_channels)

    def along(self, axes: Collection[int], in_channels: int, out_channels: int, groups: int = 1) -> Geometry:
        """The kernel, stride, padding and dilation of this layer in the given dimensions, and a single pixel in all others."""

        def only(values: tuple[int, ...], otherwise: int) -> tuple[int, ...]:
            return tuple(value if axis in axes else otherwise for axis, value in enumerate(values))

        padding, padding_end = self.padding if isinstance(self.padding, str) else only(self.padding, 0), only(self.padding_end, 0)
        return replace(
            self,
            in_channels=in_channels,
            out_channels=out_channels,
            groups=groups,
            kernel=only(self.kernel, 1),
            stride=only(self.stride, 1),
            padding=padding,
            padding_end=() if padding_end == padding else padding_end,
            dilation=only(self.dilation, 1),
            output_padding=only(self.output_padding, 0),
        )

    def extends_in(self, axis: int) -> bool:
        """Whether the layer does more than to look at single pixels in this direction, so that the size there can change."""
        padded = self.padding != "valid" if isinstance(self.padding, str) else any(self.pads(axis))
        return self.kernel[axis] > 1 or self.stride[axis] > 1 or padded

    def pads(self, axis: int) -> tuple[int, int]:
        """Padding at the beginning and the end of a direction, where it is given as numbers."""
        return (0, 0) if isinstance(self.padding, str) else (self.padding[axis], (self.padding_end or self.padding)[axis])

    def output_size(self, input_size: tuple[int, ...]) -> tuple[int, ...]:
        """Spatial size of the output for a spatial size of the input."""
        if self.padding == "same":
            return tuple(-(-n // s) for n, s in zip(input_size, self.stride, strict=True))
        padding = [sum(self.pads(axis)) for axis in range(self.dims)]
        if self.transposed:
            return tuple(
                (n - 1) * s - p + d * (k - 1) + o + 1
                for n, k, s, p, d, o in zip(input_size, self.kernel, self.stride, padding, self.dilation, self.output_padding, strict=True)
            )
        return tuple(
            (n + p - d * (k - 1) - 1) // s + 1 for n, k, s, p, d in zip(input_size, self.kernel, self.stride, padding, self.dilation, strict=True)
        )

    def output_shape(self, input_shape: tuple[int, ...]) -> tuple[int, ...]:
        """Shape of the output for the shape of an input: (..., C, *spatial), or (..., C) for a linear layer."""
        if self.is_linear:
            return (*input_shape[:-1], self.out_channels)
        lead, size = input_shape[: -self.dims - 1], input_shape[-self.dims :]
        return (*lead, self.out_channels, *self.output_size(size))

    def fits(self, input_shape: tuple[int, ...]) -> bool:
        """Whether a call can have an input of this shape: (..., C, *spatial) with at most one leading dimension, or (..., C) for a linear layer."""
        if any(n < 0 for n in input_shape):
            return False
        if self.is_linear:
            return len(input_shape) >= 1 and input_shape[-1] == self.in_channels
        return len(input_shape) - self.dims in (1, 2) and input_shape[-self.dims - 1] == self.in_channels

    def macs(self, input_shape: tuple[int, ...]) -> int:
        """Multiply-accumulates of one call (the bias is not counted): each weight times the pixels it is applied at."""
        shape = input_shape if self.transposed else self.output_shape(input_shape)
        pixels = prod(shape[:-1]) if self.is_linear else prod(shape[: -self.dims - 1]) * prod(shape[-self.dims :])
        return self.weights * pixels

    def __str__(self) -> str:
        if self.is_linear:
            return f"Linear {self.in_channels}->{self.out_channels}"
        size = "x".join(map(str, self.kernel))
        text = f"Conv{'Transpose' if self.transposed else ''}{self.dims}d {self.in_channels}->{self.out_channels} {size}"
        if any(s != 1 for s in self.stride):
            text += "/" + "x".join(map(str, self.stride if len(set(self.stride)) > 1 else self.stride[:1]))
        return text + (f" groups={self.groups}" if self.groups > 1 else "")


@dataclass(frozen=True, slots=True)
class PieceShape:
    """One layer of a chain without its weights: its name in the chain, its geometry, and whether it has a bias."""

    name: str
    geometry: Geometry
    bias: bool

    @property
    def params(self) -> int:
        return self.geometry.weights + (self.geometry.out_channels if self.bias else 0)

    def empty(self, like: Tensor) -> Piece:
        """The piece with weights not yet filled in, of the dtype and on the device of ``like``."""
        weight = torch.empty(self.geometry.weight_shape, dtype=like.dtype, device=like.device)
        bias = torch.empty(self.geometry.out_channels, dtype=like.dtype, device=like.device) if self.bias else None
        return Piece(self.name, self.geometry, weight, bias)

    def filled(self, weight: Tensor, bias: Tensor | None) -> Piece:
        """The piece with these numbers, the weight as torch stores it; ``bias`` is taken only where the shape has one."""
        return Piece(self.name, self.geometry, weight.reshape(self.geometry.weight_shape), bias if self.bias else None)


@dataclass(frozen=True, slots=True, eq=False)
class Piece:
    """One layer of a chain as plain data."""

    name: str
    geometry: Geometry
    weight: Tensor
    bias: Tensor | None


def _each(value: int | Iterable[int], dims: int) -> tuple[int, ...]:
    """A number for each direction, as torch's functions take one number for all of them, also in a tuple; layers may have been given one later."""
    values = tuple(map(index, value if isinstance(value, Iterable) else (value,)))  # of numpy, too
    return values * dims if len(values) == 1 else values
