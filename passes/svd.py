"""Truncated singular value decomposition of a layer of one pixel: a 1x1 convolution or a linear layer.

Conv C_in -> C_out, 1x1  ->  reduce: Conv C_in -> rank, 1x1; expand: Conv rank -> C_out, 1x1; the same with linear layers.
Stride and padding are the first layer's (a transposed layer's are the last's), so that both run on as few pixels as they can; the bias is the
second's. Source: Eckart and Young 1936; Elhoushi et al. 2019, equations 1 and 2.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from passes.factorization import Factorization
from passes.geometry import Geometry
from passes.kind import Kind
from passes.linalg import Spectrum, lying, two_factors
from passes.one_rank import OneRank

__all__ = ["SVD", "SVD_KIND"]


@dataclass(frozen=True, slots=True)
class SVD(Factorization):
    """The one rank of a two-factor chain, for layers of one pixel.

    Attributes:
        rank: channels between the two layers; a total over the groups of a grouped layer.

    Source: Eckart and Young 1936; Elhoushi et al. 2019, equations 1 and 2.
    """

    kind: ClassVar[str] = "svd"

    rank: int


class SVDKind(OneRank):
    """1x1  ->  1x1, 1x1. Assumes a kernel of one pixel."""

    factorization = SVD
    modes = ("channels",)

    def refuses(self, geometry: Geometry) -> str | None:
        if not geometry.is_pointwise:
            return f"SVD factorizes 1x1 convolutions and linear layers only, this kernel is {'x'.join(map(str, geometry.kernel))}"
        return None

    def full_ranks(self, geometry: Geometry) -> tuple[int, ...]:
        return (min(geometry.out_channels, geometry.in_channels),)

    def unfoldings(self, weight: Tensor) -> tuple[Tensor, ...]:
        return (lying(weight.flatten(1)),)

    def shapes(self, geometry: Geometry, factorization: Factorization) -> Mapping[str, Geometry]:
        (rank,) = factorization.ranks
        into, out = geometry.in_channels, geometry.out_channels
        if geometry.transposed:
            return {"reduce": geometry.pointwise(into, rank), "expand": geometry.between(rank, out)}  # type: ignore[arg-type]
        return {"reduce": geometry.between(into, rank), "expand": geometry.pointwise(rank, out)}  # type: ignore[arg-type]

    def split(self, weight: Tensor, factorization: Factorization, spectra: Sequence[Spectrum]) -> Mapping[str, Tensor]:
        expand, reduce = two_factors(weight.flatten(1), factorization.ranks[0], spectra[0].basis)  # type: ignore[arg-type]
        ones = weight.shape[2:]
        return {"reduce": reduce.reshape(*reduce.shape, *ones), "expand": expand.reshape(*expand.shape, *ones)}

    def merge(self, weights: Mapping[str, Tensor], geometry: Geometry) -> Tensor:
        reduce, expand = weights["reduce"], weights["expand"]
        return (expand.flatten(1) @ reduce.flatten(1)).reshape(geometry.out_channels, geometry.in_channels, *geometry.kernel)


SVD_KIND: Kind = SVDKind()
