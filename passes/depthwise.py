"""Depthwise decomposition, network decoupling: a sum of depthwise and pointwise pairs (Guo et al. 2018, theorem 1; Elhoushi et al. 2019, figure 2).

Conv C_in -> C_out, kernel k  ->  depthwise: Conv C_in -> rank C_in, kernel k, groups=C_in; pointwise: Conv rank C_in -> C_out, 1x1.
The rank pairs run as one: the depthwise layer has ``rank`` filters for every input channel, and the pointwise layer adds the pairs up. Stride,
padding, padding mode and dilation are the depthwise layer's, the bias is the second's. For every input channel it is the truncated singular value
decomposition of its C_out x k filters, so that the sum over pairs is the best one, in any number of dimensions.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import ClassVar

import torch
from torch import Tensor

from passes.factorization import Factorization
from passes.geometry import Geometry
from passes.kind import Kind
from passes.linalg import Spectrum, lying, two_factors
from passes.one_rank import OneRank

__all__ = ["DEPTHWISE", "Depthwise"]


@dataclass(frozen=True, slots=True)
class Depthwise(Factorization):
    """How many depthwise and pointwise pairs are summed.

    Attributes:
        rank: filters of the depthwise layer for each input channel.

    Source: Guo et al. 2018, theorem 1.
    """

    kind: ClassVar[str] = "depthwise"

    rank: int


class DepthwiseKind(OneRank):
    """Conv k  ->  depthwise k, 1x1. Assumes a kernel of more than one pixel."""

    factorization = Depthwise
    modes = ("pairs",)
    ranks_are_channels = False
    mixes_inputs = False

    def refuses(self, geometry: Geometry) -> str | None:
        return "a layer of one pixel is pointwise already: SVD factorizes it" if geometry.is_pointwise else None

    def full_ranks(self, geometry: Geometry) -> tuple[int, ...]:
        return (min(geometry.out_channels, prod(geometry.kernel)),)

    def unfoldings(self, weight: Tensor) -> tuple[Tensor, ...]:
        return (lying(_filters(weight)),)

    def shapes(self, geometry: Geometry, factorization: Factorization) -> Mapping[str, Geometry]:
        (rank,) = factorization.ranks
        into = geometry.in_channels
        between: int = into * rank  # type: ignore[operator]
        return {"depthwise": replace(geometry, out_channels=between, groups=into), "pointwise": geometry.pointwise(between, geometry.out_channels)}

    def split(self, weight: Tensor, factorization: Factorization, spectra: Sequence[Spectrum]) -> Mapping[str, Tensor]:
        (rank,) = factorization.ranks
        blocks = spectra[0].blocks or (spectra[0],)
        basis = torch.stack([block.basis for block in blocks])
        # (C_in, C_out, rank) and (C_in, rank, pixels)
        left, right = two_factors(_filters(weight), rank, basis)  # type: ignore[arg-type]
        out, _, *kernel = weight.shape
        pointwise = left.transpose(0, 1).reshape(out, -1, *(1,) * len(kernel))
        return {"depthwise": right.reshape(-1, 1, *kernel), "pointwise": pointwise}

    def merge(self, weights: Mapping[str, Tensor], geometry: Geometry) -> Tensor:
        out, into = geometry.out_channels, geometry.in_channels
        filters = weights["depthwise"].reshape(into, -1, prod(geometry.kernel))  # (C_in, rank, pixels)
        mixing = weights["pointwise"].reshape(out, into, -1)  # (C_out, C_in, rank)
        return torch.einsum("irk,oir->oik", filters, mixing).reshape(out, into, *geometry.kernel)


def _filters(weight: Tensor) -> Tensor:
    """(C_out, C_in, *kernel) as (C_in, C_out, pixels)."""
    return weight.flatten(2).transpose(0, 1)


DEPTHWISE: Kind = DepthwiseKind()
