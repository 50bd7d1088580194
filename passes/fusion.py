"""Two linear layers one after the other as one: which pairs have an exact product, and the product itself, as pure tensor mathematics.

In each dimension a convolution reads ``x[stride * i + dilation * t - padding]``; put into one another, two of them read

    x[s1 s2 * i + s1 d2 * t2 + d1 * t1 - (s1 p2 + p1)],

which is again one convolution wherever at most one of the two kernels extends along the dimension. What stands between them is their padding:
the second pads the values of the first, the product pads the input. Both are the same where the padding values of the second are what the first
would have computed there: zeros, if the first adds no bias; copies, if the first looks at one pixel only. A batch norm in eval mode is a
pointwise layer with as many groups as channels.
"""

from __future__ import annotations

from dataclasses import replace
from math import gcd

from torch import Tensor

from passes.errors import SurgeryValueError
from passes.geometry import Geometry, Piece

__all__ = ["batch_norm_piece", "fuse", "fused_geometry", "refuses"]

Pads = tuple[tuple[int, int], ...]


def refuses(first: Piece, second: Piece) -> str | None:
    """Why no one layer computes exactly ``second(first(x))`` at every size of ``x``, or None where ``fuse`` gives it."""
    geometry = fused_geometry(first.geometry, second.geometry)
    if isinstance(geometry, str):
        return geometry
    if first.bias is not None and bool(first.bias.any()):
        after = _unrolled(second.geometry)
        if after.transposed:
            return "the first adds a bias, which the transposed convolution after it spreads unevenly"
        if after.padding_mode == "zeros" and any(map(any, _pads(after))):
            return "the first adds a bias, which is absent in the zeros that the second pads with"
    return None


def fused_geometry(first: Geometry, second: Geometry) -> Geometry | str:
    """The one layer of the shape of ``second`` after ``first``, biases aside, or why there is none."""
    a, b = _unrolled(first), _unrolled(second)
    if a.dims != b.dims:
        return f"the first works on {_dimensions(a)}, the second on {_dimensions(b)}"
    if a.out_channels != b.in_channels:
        return f"the first gives {a.out_channels} channels, the second takes {b.in_channels}"
    groups = gcd(a.groups, b.groups)
    if _is_trivial(b):
        return replace(a, out_channels=b.out_channels, groups=groups)
    if _is_trivial(a):
        return replace(b, in_channels=a.in_channels, groups=groups)
    if a.transposed or b.transposed:
        return "beside a transposed convolution only a pointwise layer of stride 1 without padding can be fused"
    reason = _clash(a, b)
    if reason is not None:
        return reason
    pads = tuple((s * l2 + l1, s * r2 + r1) for s, (l1, r1), (l2, r2) in zip(a.stride, _pads(a), _pads(b), strict=True))
    fused = Geometry(
        in_channels=a.in_channels,
        out_channels=b.out_channels,
        kernel=tuple(map(max, a.kernel, b.kernel)),
        stride=tuple(s * t for s, t in zip(a.stride, b.stride, strict=True)),
        padding=tuple(left for left, _ in pads),
        dilation=tuple(
            d if k > 1 else s * e if m > 1 else 1 for k, m, d, e, s in zip(a.kernel, b.kernel, a.dilation, b.dilation, a.stride, strict=True)
        ),
        groups=groups,
        padding_mode=b.padding_mode if any(map(any, _pads(b))) else a.padding_mode,
        output_padding=(0,) * a.dims,
    )
    if all(left == right for left, right in pads):
        return fused
    same = replace(fused, padding="same")
    if all(s == 1 for s in fused.stride) and _pads(same) == pads:
        return same
    return "together they pad unevenly on the two sides, which one layer cannot"


def fuse(first: Piece, second: Piece) -> Piece:
    """The layer that computes ``second(first(x))``; float64.

    Costs one matrix product of (out, middle) with (middle, in * pixels) a group; a batch norm only scales.

    Raises:
        SurgeryValueError: ``refuses`` has a reason.
    """
    reason, geometry = refuses(first, second), fused_geometry(first.geometry, second.geometry)
    if reason is not None or isinstance(geometry, str):
        raise SurgeryValueError(f"{first.name or 'the first layer'} and {second.name or 'the second'} cannot be fused: {reason}")
    a, b = _by_output(first), _by_output(second)
    weight = _stored(_product(a, first.geometry, b, second.geometry), geometry)
    bias = None if second.bias is None else second.bias.double()
    if first.bias is not None and bool(first.bias.any()):
        g = second.geometry
        sums = b.reshape(g.groups, g.out_channels // g.groups, g.in_channels // g.groups, -1).sum(-1)
        carried = (sums @ first.bias.double().reshape(g.groups, -1, 1)).flatten()
        bias = carried if bias is None else bias + carried
    return Piece("", geometry, weight, bias)


def batch_norm_piece(dims: int, mean: Tensor, var: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Piece:
    """Batch norm with these running statistics on C channels of ``dims`` spatial dimensions as a pointwise layer of C groups; float64.

    y = (x - mean) / sqrt(var + eps) * weight + bias (Ioffe and Szegedy 2015, algorithm 2).
    """
    scale = (var.double() + eps).rsqrt()
    if weight is not None:
        scale = scale * weight.double()
    shift = -mean.double() * scale
    if bias is not None:
        shift = shift + bias.double()
    ones, zeros = (1,) * dims, (0,) * dims
    one = Geometry(in_channels=1, out_channels=1, kernel=ones, stride=ones, padding=zeros, dilation=ones, output_padding=zeros)
    geometry = one.times(len(scale))
    return Piece("", geometry, scale.reshape(geometry.weight_shape), shift)


def _clash(a: Geometry, b: Geometry) -> str | None:
    """What in the two kernels and paddings, dimension by dimension, no one convolution can do; None where one can."""
    for dim, (before, after) in enumerate(zip(_pads(a), _pads(b), strict=True)):
        if a.kernel[dim] > 1 and b.kernel[dim] > 1:
            return f"both kernels extend along dimension {dim}: the kernel of one layer would be larger than either"
        if any(after) and a.kernel[dim] > 1:
            return f"the second pads along dimension {dim}, where the kernel of the first extends"
        if any(after) and b.padding_mode != "zeros" and (a.stride[dim] > 1 or any(before)):
            return f"the second pads along dimension {dim} with values that the stride or padding of the first has changed"
    if any(map(any, _pads(a))) and any(map(any, _pads(b))) and a.padding_mode != b.padding_mode:
        return f"the first pads with {a.padding_mode!r}, the second with {b.padding_mode!r}"
    return None


def _product(a: Tensor, first: Geometry, b: Tensor, second: Geometry) -> Tensor:
    """Weight of the product, (out, in / groups, *kernel), of two weights in that order of dimensions."""
    if _is_diagonal(second):
        return a * b.reshape(-1, *(1,) * (a.ndim - 1))
    if _is_diagonal(first):
        apart = b.reshape(second.groups, -1, *b.shape[1:])
        return (apart * a.reshape(second.groups, 1, -1, *(1,) * (b.ndim - 2))).reshape(b.shape)
    groups, dims = gcd(first.groups, second.groups), first.dims
    left, right = _blocks(b, second.groups, groups), _blocks(a, first.groups, groups)
    rows = left.movedim(2, -1).flatten(1, -2)  # (groups, out * kernel of b, middle)
    columns = right.flatten(2)  # (groups, middle, in * kernel of a)
    whole = (rows @ columns).reshape(groups, left.shape[1], *left.shape[3:], right.shape[2], *right.shape[3:])
    taps = [axis for dim in range(dims) for axis in (2 + dim, 3 + dims + dim)]
    kernel = [max(n, m) for n, m in zip(left.shape[3:], right.shape[3:], strict=True)]
    return whole.permute(0, 1, 2 + dims, *taps).reshape(groups * left.shape[1], right.shape[2], *kernel)


def _blocks(weight: Tensor, groups: int, coarser: int) -> Tensor:
    """A weight (out, in / groups, *kernel) of ``groups`` groups in ``coarser`` dense ones: (coarser, out / coarser, in / coarser, *kernel)."""
    finer = groups // coarser
    apart = weight.reshape(coarser, finer, -1, *weight.shape[1:])
    if finer == 1:
        return apart[:, 0]
    whole = apart.new_zeros(coarser, finer, apart.shape[2], finer, *apart.shape[3:])
    for index in range(finer):
        whole[:, index, :, index] = apart[:, index]
    return whole.flatten(3, 4).flatten(1, 2)


def _by_output(piece: Piece) -> Tensor:
    """Its weight as (out, in / groups, *kernel), float64, also for a transposed convolution."""
    return piece.geometry.forward_blocks(piece.weight.double()).flatten(0, 1)


def _stored(weight: Tensor, g: Geometry) -> Tensor:
    """A weight (out, in / groups, *kernel) as torch stores it for this layer."""
    return g.stored(weight.reshape(g.groups, -1, *weight.shape[1:])).reshape(g.weight_shape)


def _unrolled(g: Geometry) -> Geometry:
    """A transposed convolution of one pixel, stride 1 and no padding as the pointwise convolution that it is; all else as given."""
    plain = g.transposed and g.is_pointwise and all(s == 1 for s in g.stride) and not any(g.padding) and not any(g.output_padding)
    return replace(g, transposed=False) if plain else g


def _is_trivial(g: Geometry) -> bool:
    """Whether it looks at each pixel alone and at every one once."""
    return not g.transposed and g.is_pointwise and all(s == 1 for s in g.stride) and not any(map(any, _pads(g)))


def _is_diagonal(g: Geometry) -> bool:
    return g.is_pointwise and g.groups == g.in_channels == g.out_channels


def _pads(g: Geometry) -> Pads:
    """Pixels padded before and after, a pair a dimension."""
    if g.padding == "same":
        totals = [d * (k - 1) for d, k in zip(g.dilation, g.kernel, strict=True)]
        return tuple((total // 2, total - total // 2) for total in totals)
    if isinstance(g.padding, str):
        return ((0, 0),) * g.dims
    return tuple((p, p) for p in g.padding)


def _dimensions(g: Geometry) -> str:
    return "features alone" if g.is_linear else f"{g.dims} spatial dimension{'s' if g.dims > 1 else ''}"
