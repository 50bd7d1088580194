"""Truncated singular value decomposition of a layer of one pixel: a 1x1 convolution or a linear layer.

Conv C_in -> C_out, 1x1  ->  reduce: Conv C_in -> rank, 1x1; expand: Conv rank -> C_out, 1x1; the same with linear layers.
Stride and padding are the first layer's, so that both run on as few pixels as the original; the bias is the second's. Source: Eckart and
Young 1936; Elhoushi et al. 2019, equations 1 and 2.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, cast

import torch
from torch import Tensor

from passes.factorization import Factorization
from passes.geometry import Geometry, Piece, PieceShape
from passes.kind import Kind, Rank
from passes.linalg import Spectrum, tail_energy

__all__ = ["SVD", "SVD_KIND"]


@dataclass(frozen=True, slots=True)
class SVD(Factorization):
    """The one rank of a two-factor chain."""

    kind: ClassVar[str] = "svd"

    rank: int


class SVDKind(Kind):
    """1x1  ->  1x1, 1x1. Assumes one group and a kernel of one pixel."""

    factorization = SVD
    modes = ("channels",)

    def refuses(self, geometry: Geometry) -> str | None:
        if not geometry.is_pointwise:
            return f"SVD factorizes 1x1 convolutions and linear layers only, this kernel is {'x'.join(map(str, geometry.kernel))}"
        if geometry.transposed:
            return "transposed convolution"
        if geometry.groups != 1:
            return f"grouped convolution (groups={geometry.groups})"
        return None

    def full_ranks(self, geometry: Geometry) -> tuple[int, ...]:
        return (min(geometry.out_channels, geometry.in_channels),)

    def from_ranks(self, geometry: Geometry, ranks: Sequence[Rank]) -> SVD:
        (rank,) = ranks
        return SVD(self.full_ranks(geometry)[0] if rank is None else rank)

    def unfoldings(self, weight: Tensor, geometry: Geometry) -> tuple[Tensor, ...]:
        matrix = weight.flatten(1)
        return (matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T,)

    def shapes(self, geometry: Geometry, factorization: Factorization, bias: bool) -> tuple[PieceShape, ...]:
        rank = cast(SVD, factorization).rank
        first = geometry.between(geometry.in_channels, rank)
        second = geometry.pointwise(rank, geometry.out_channels)
        return PieceShape("reduce", first, False), PieceShape("expand", second, bias)

    def split(
        self,
        weight: Tensor,
        bias: Tensor | None,
        geometry: Geometry,
        factorization: Factorization,
        spectra: Sequence[Spectrum],
    ) -> tuple[Piece, ...]:
        first, second = self.shapes(geometry, factorization, bias is not None)
        matrix = weight.flatten(1).double()
        basis = spectra[0].basis[:, : cast(SVD, factorization).rank]
        if matrix.shape[0] <= matrix.shape[1]:  # the basis spans the outputs
            reduce, expand = basis.T @ matrix, basis
        else:
            reduce, expand = basis.T, matrix @ basis
        return first.filled(reduce, None), second.filled(expand, bias)

    def error_surface(self, weight: Tensor, geometry: Geometry, spectra: Sequence[Spectrum]) -> Tensor:
        """Exact (Eckart and Young 1936): the singular values that are left out."""
        tails = tail_energy(spectra[0].values.square())
        return (tails / tails[0].clamp(min=torch.finfo(tails.dtype).tiny)).sqrt()

    def merge(self, pieces: Sequence[Piece]) -> Tensor:
        reduce, expand = pieces
        return (expand.weight.flatten(1) @ reduce.weight.flatten(1)).reshape(
            expand.geometry.out_channels, reduce.geometry.in_channels, *reduce.geometry.kernel
        )


SVD_KIND: Kind = SVDKind()
