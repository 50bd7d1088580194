"""Spatial decomposition: k x 1, then 1 x k (Jaderberg et al. 2014, scheme 2; Lin et al. 2018; Elhoushi et al. 2019, figure 2).

Conv C_in -> C_out, kernel k x l  ->  vertical: Conv C_in -> rank, k x 1; horizontal: Conv rank -> C_out, 1 x l.
Each layer has the stride, padding, padding mode and dilation of its own direction, the bias is the second's. It is the truncated singular value
decomposition of the unfolding (C_in k) x (C_out l). In three dimensions the first direction is parted from the plane of the other two, as in the
(2+1)-dimensional convolutions of Tran et al. 2018; in one there is nothing to part.
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

__all__ = ["SPATIAL", "Spatial"]


@dataclass(frozen=True, slots=True)
class Spatial(Factorization):
    """Channels between the two directions.

    Attributes:
        rank: as channels of the layer between them; a total over the groups of a grouped layer.

    Source: Jaderberg et al. 2014, scheme 2.
    """

    kind: ClassVar[str] = "spatial"

    rank: int


class SpatialKind(OneRank):
    """Conv k x l  ->  k x 1, 1 x l. Assumes a kernel that extends in more than one direction."""

    factorization = Spatial
    modes = ("channels",)

    def refuses(self, geometry: Geometry) -> str | None:
        if sum(k > 1 for k in geometry.kernel) < 2:
            return f"its kernel ({'x'.join(map(str, geometry.kernel)) or 'linear'}) does not extend in two directions that could be parted"
        return None

    def full_ranks(self, geometry: Geometry) -> tuple[int, ...]:
        first = _first_axis(geometry.kernel)
        along = geometry.kernel[first]
        return (min(geometry.in_channels * along, geometry.out_channels * prod(geometry.kernel) // along),)

    def unfoldings(self, weight: Tensor) -> tuple[Tensor, ...]:
        return (lying(_unfold(weight)),)

    def shapes(self, geometry: Geometry, factorization: Factorization) -> Mapping[str, Geometry]:
        (rank,) = factorization.ranks
        first = _first_axis(geometry.kernel)
        others = [axis for axis in range(geometry.dims) if axis != first]
        return {
            "vertical": geometry.along([first], geometry.in_channels, rank),  # type: ignore[arg-type]
            "horizontal": geometry.along(others, rank, geometry.out_channels),  # type: ignore[arg-type]
        }

    def split(self, weight: Tensor, factorization: Factorization, spectra: Sequence[Spectrum]) -> Mapping[str, Tensor]:
        out, into, *kernel = weight.shape
        first = _first_axis(kernel)
        left, right = two_factors(_unfold(weight), factorization.ranks[0], spectra[0].basis)  # type: ignore[arg-type]
        along = [k if axis == first else 1 for axis, k in enumerate(kernel)]
        across = [1 if axis == first else k for axis, k in enumerate(kernel)]
        return {"vertical": left.mT.reshape(-1, into, *along), "horizontal": right.reshape(-1, out, *across).transpose(0, 1)}

    def merge(self, weights: Mapping[str, Tensor], geometry: Geometry) -> Tensor:
        # along every axis one of the two is a single pixel, so that the product of their kernels is one of broadcasting
        return torch.einsum("ri...,or...->oi...", weights["vertical"], weights["horizontal"])


def _first_axis(kernel: Sequence[int]) -> int:
    """The first direction in which the kernel extends."""
    return next(axis for axis, k in enumerate(kernel) if k > 1)


def _unfold(weight: Tensor) -> Tensor:
    """(C_out, C_in, *kernel) as (C_in k, C_out rest of the kernel)."""
    first = 2 + _first_axis(weight.shape[2:])
    rest = [axis for axis in range(2, weight.ndim) if axis != first]
    return weight.permute(1, first, 0, *rest).flatten(2).flatten(0, 1)


SPATIAL: Kind = SpatialKind()
