"""One layer of a chain by least squares, so that it makes of what it now sees what was to come out (He et al. 2017). Tensors only."""

from __future__ import annotations

import torch
from torch import Tensor

from passes.geometry import Geometry, Piece

__all__ = ["refit", "rows"]

RIDGE = 1e-4  # of the mean square of what a channel sees: pulls towards the weight as it is, where the data say little


def rows(x: Tensor, dims: int, groups: int) -> Tensor:
    """What a layer sees, or gives, at every position: (..., C, *spatial), or (..., C) for ``dims`` 0, as (groups, positions, C / groups), float64."""
    if dims:
        x = x.movedim(-dims - 1, -1)
    return x.reshape(-1, groups, x.shape[-1] // groups).transpose(0, 1).double()


def refit(piece: Piece, xtx: Tensor, xty: Tensor) -> Piece:
    """The piece with the weight, and the bias if it has one, that brings W x + b nearest to y in the mean square.

    Args:
        piece: a convolution or linear layer, not transposed, in any groups.
        xtx: (groups, n + 1, n + 1) float64, the sum of x x^T over all positions, with the n = C_in / groups * pixels numbers that the kernel sees at
            each; the last row and column are of a constant 1.
        xty: (groups, n + 1, m) float64, the sum of x y^T, m = C_out / groups.

    Returns:
        A piece with float64 numbers on the device of the moments.
    """
    g: Geometry = piece.geometry
    count = xtx[:, -1:, -1:]
    old = g.forward_blocks(piece.weight).to(xtx).reshape(g.groups, g.out_channels // g.groups, -1).mT  # (groups, n, m)
    if piece.bias is None:
        xtx, xty = xtx[:, :-1, :-1], xty[:, :-1]
    else:
        old = torch.cat([old, piece.bias.to(xtx).reshape(g.groups, 1, -1)], 1)
    size = old.shape[1]
    level = xtx.diagonal(dim1=1, dim2=2).mean(1).clamp(min=torch.finfo(torch.float64).tiny)
    ridge = RIDGE * level[:, None, None] * torch.eye(size, dtype=xtx.dtype, device=xtx.device)
    new = torch.linalg.solve(xtx + ridge, xty + ridge @ old) if bool((count > 0).all()) else old
    bias = None if piece.bias is None else new[:, -1].reshape(-1)
    weight = new if piece.bias is None else new[:, :-1]
    blocks = weight.mT.reshape(g.groups, g.out_channels // g.groups, -1, *g.kernel)
    return Piece(piece.name, g, g.stored(blocks), bias)
