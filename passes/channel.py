"""Channel decomposition: few filters of the full kernel, then a 1x1 convolution (Zhang et al. 2016, section 3.1; Elhoushi et al. 2019, figure 2).

Conv C_in -> C_out, kernel k  ->  core: Conv C_in -> rank, kernel k; expand: Conv rank -> C_out, 1x1.
Stride, padding, padding mode and dilation are the core's, the bias is the last layer's. It is the truncated singular value decomposition of
the unfolding C_out x (C_in k), in any number of dimensions.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import ClassVar

import torch
from torch import Tensor

from passes.factorization import Factorization
from passes.geometry import Geometry
from passes.kind import Kind
from passes.linalg import Spectrum, lying, two_factors
from passes.one_rank import OneRank

__all__ = ["CHANNEL", "Channel"]


@dataclass(frozen=True, slots=True)
class Channel(Factorization):
    """How many filters of the full kernel are left.

    Attributes:
        rank: channels between ``core`` and ``expand``; a total over the groups of a grouped layer.

    Source: Zhang et al. 2016, section 3.1.
    """

    kind: ClassVar[str] = "channel"

    rank: int


class ChannelKind(OneRank):
    """Conv k  ->  k, 1x1. Assumes a kernel of more than one pixel."""

    factorization = Channel
    modes = ("channels",)

    def refuses(self, geometry: Geometry) -> str | None:
        return "a layer of one pixel has two modes only: SVD factorizes it" if geometry.is_pointwise else None

    def full_ranks(self, geometry: Geometry) -> tuple[int, ...]:
        return (min(geometry.out_channels, geometry.in_channels * prod(geometry.kernel)),)

    def unfoldings(self, weight: Tensor) -> tuple[Tensor, ...]:
        return (lying(weight.flatten(1)),)

    def shapes(self, geometry: Geometry, factorization: Factorization) -> Mapping[str, Geometry]:
        (rank,) = factorization.ranks
        return {
            "core": geometry.between(geometry.in_channels, rank),  # type: ignore[arg-type]
            "expand": geometry.pointwise(rank, geometry.out_channels),  # type: ignore[arg-type]
        }

    def split(self, weight: Tensor, factorization: Factorization, spectra: Sequence[Spectrum]) -> Mapping[str, Tensor]:
        expand, core = two_factors(weight.flatten(1), factorization.ranks[0], spectra[0].basis)  # type: ignore[arg-type]
        return {"core": core.reshape(-1, *weight.shape[1:]), "expand": expand.reshape(*expand.shape, *(1,) * (weight.ndim - 2))}

    def merge(self, weights: Mapping[str, Tensor], geometry: Geometry) -> Tensor:
        product: Tensor = torch.tensordot(weights["expand"].flatten(1), weights["core"], dims=1)
        return product


CHANNEL: Kind = ChannelKind()
