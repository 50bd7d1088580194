"""What matters in a weight: which inputs a layer sees, and which of its outputs count. Tensors only.

A change D of a weight W changes the layer's output by D x; its mean square over inputs x with second moment S, in a weighting G of the outputs, is
tr(G D S D^T) (Zhang et al. 2016, section 3.2; Martens and Grosse 2015 for G and S as Kronecker factors of the curvature). That is the squared
Frobenius norm of G^(1/2) D S^(1/2): so the weighted weight G^(1/2) W S^(1/2) is factorized instead of W, and the outermost layers of the chain take
the roots back.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from passes.blockwise import Blockwise
from passes.geometry import Geometry, Piece

__all__ = ["Metric", "alike", "unweighted", "weighted"]

FLOOR = 1e-6  # of the mean eigenvalue, added to all: directions that were never seen still have a root

NOTHING = 1e-60  # a mean eigenvalue so small that factors would overflow by its inverse root


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Metric:
    """Second moments, float64; None stands for the identity.

    Attributes:
        inputs: (groups, C_in / groups, C_in / groups), the mean of x x^T over what each group of channels sees.
        outputs: (groups, C_out / groups, C_out / groups), positive semidefinite weightings of the outputs.
    """

    inputs: Tensor | None = None
    outputs: Tensor | None = None


def alike(geometry: Geometry, weighting: float) -> Tensor:
    """The same weighting of all outputs of a layer, as ``Metric.outputs``."""
    each = geometry.out_channels // geometry.groups
    return weighting * torch.eye(each, dtype=torch.float64).expand(geometry.groups, each, each)


def weighted(weight: Tensor, geometry: Geometry, metric: Metric, kind: Blockwise) -> Tensor:
    """G^(1/2) W S^(1/2) in the place of a weight as torch stores it, float64.

    Where a kind does not mix the inputs in its first layer, only the diagonal of S can be taken back, and only it is used.
    """
    blocks = geometry.forward_blocks(weight.double())
    if metric.inputs is not None:
        blocks = torch.einsum("goi...,gij->goj...", blocks, _root(_usable(metric.inputs, kind), blocks))
    if metric.outputs is not None:
        blocks = torch.einsum("goi...,gop->gpi...", blocks, _root(metric.outputs, blocks))
    return geometry.stored(blocks)


def unweighted(pieces: Sequence[Piece], geometry: Geometry, metric: Metric, kind: Blockwise) -> tuple[Piece, ...]:
    """The chain for W from the chain that stands for the weighted weight."""
    found = list(pieces)
    if metric.inputs is not None:
        found[0] = _times(found[0], geometry.groups, _root(_usable(metric.inputs, kind), found[0].weight, inverse=True), "inputs")
    if metric.outputs is not None:
        found[-1] = _times(found[-1], geometry.groups, _root(metric.outputs, found[-1].weight, inverse=True), "outputs")
    return tuple(found)


def _usable(moment: Tensor, kind: Blockwise) -> Tensor:
    return moment if kind.mixes_inputs else torch.diag_embed(moment.diagonal(dim1=-2, dim2=-1))


def _root(moment: Tensor, like: Tensor, *, inverse: bool = False) -> Tensor:
    """Symmetric roots (groups, n, n) of second moments, or their inverses."""
    moment = moment.to(like.device, torch.float64)
    values, vectors = torch.linalg.eigh((moment + moment.mT) / 2)
    mean = values.mean(-1, keepdim=True).clamp(min=torch.finfo(torch.float64).tiny)
    seen = mean > NOTHING  # where nothing was seen (a dead layer) all directions count alike
    roots = torch.where(seen, (values.clamp(min=0) + FLOOR * mean).sqrt(), 1.0)
    root: Tensor = (vectors * (roots.reciprocal() if inverse else roots).unsqueeze(-2)) @ vectors.mT
    return root


def _times(piece: Piece, groups: int, roots: Tensor, side: str) -> Piece:
    """A piece with its input or output channels multiplied by (groups, n, n)."""
    g = piece.geometry
    blocks = g.forward_blocks(piece.weight)  # (groups of the piece, out, in, *kernel)
    if side == "outputs" or g.groups == groups:
        equation = "goi...,gij->goj..." if side == "inputs" else "goi...,gop->gpi..."
        blocks = torch.einsum(equation, blocks, roots)
    else:  # a depthwise layer: one input channel a group, so that only the diagonal is there
        scale = roots.diagonal(dim1=-2, dim2=-1).reshape(-1)
        blocks = blocks * scale.reshape(-1, *(1,) * (blocks.ndim - 1))
    return Piece(piece.name, g, g.stored(blocks), piece.bias)
