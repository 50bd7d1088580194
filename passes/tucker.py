"""Tucker decomposition of a convolution on its two channel modes (Kim et al. 2016; Elhoushi et al. 2019, equations 7 to 9).

Conv C_in -> C_out, kernel k  ->  reduce: Conv C_in -> rank_in, 1x1; core: Conv rank_in -> rank_out, kernel k; expand: Conv rank_out -> C_out, 1x1.
Stride, padding, padding mode and dilation are the core's, the bias is the last layer's. A mode whose rank is None stays uncut and its 1x1
layer is absent (Tucker-1).
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
from passes.kind import Kind, Rank
from passes.linalg import Spectrum, channels_apart, hooi, mode_product, tail_energy

__all__ = ["TUCKER", "Tucker"]


@dataclass(frozen=True, slots=True)
class Tucker(Factorization):
    """Ranks of the output and input channels; either may be None (that mode is uncut, its layer is absent), not both.

    Attributes:
        rank_out: channels between ``core`` and ``expand``.
        rank_in: channels between ``reduce`` and ``core``; both are totals over the groups of a grouped layer, and multiples of the groups.

    Source: Kim et al. 2016; Elhoushi et al. 2019, equations 7 to 9.
    """

    kind: ClassVar[str] = "tucker"

    rank_out: int | None
    rank_in: int | None


class TuckerKind(Kind):
    """Conv k  ->  1x1, k, 1x1. Assumes a kernel of more than one pixel."""

    factorization = Tucker
    modes = ("out", "in")

    def refuses(self, geometry: Geometry) -> str | None:
        return "a layer of one pixel has two modes only: SVD factorizes it" if geometry.is_pointwise else None

    def full_ranks(self, geometry: Geometry) -> tuple[int, ...]:
        pixels = prod(geometry.kernel)
        out, into = geometry.out_channels, geometry.in_channels
        return min(out, into * pixels), min(into, out * pixels)

    def from_ranks(self, geometry: Geometry, ranks: Sequence[Rank]) -> Tucker:
        rank_out, rank_in = ranks
        pixels = prod(geometry.kernel)
        if rank_out is not None:
            rank_out = min(rank_out, pixels * (geometry.in_channels if rank_in is None else rank_in))
        if rank_in is not None:
            rank_in = min(rank_in, pixels * (geometry.out_channels if rank_out is None else rank_out))
        return Tucker(rank_out, rank_in)

    def unfoldings(self, weight: Tensor) -> tuple[Tensor, ...]:
        apart = channels_apart(weight)  # the order of an unfolding's columns changes nothing of its spectrum
        return apart.flatten(1), apart.flatten(0, 1).mT

    def shapes(self, geometry: Geometry, factorization: Factorization) -> Mapping[str, Geometry]:
        rank_out, rank_in = factorization.ranks
        into = geometry.in_channels if rank_in is None else rank_in
        out = geometry.out_channels if rank_out is None else rank_out
        reduce = {} if rank_in is None else {"reduce": geometry.pointwise(geometry.in_channels, rank_in)}
        expand = {} if rank_out is None else {"expand": geometry.pointwise(rank_out, geometry.out_channels)}
        return reduce | {"core": geometry.between(into, out)} | expand

    def split(self, weight: Tensor, factorization: Factorization, spectra: Sequence[Spectrum]) -> Mapping[str, Tensor]:
        core, (basis_out, basis_in) = hooi(weight, factorization.ranks, spectra)
        ones = (1,) * (weight.ndim - 2)
        weights = {"core": core}
        if basis_in is not None:
            weights["reduce"] = basis_in.mT.reshape(*basis_in.mT.shape, *ones)
        if basis_out is not None:
            weights["expand"] = basis_out.reshape(*basis_out.shape, *ones)
        return weights

    def error_surface(self, weight: Tensor, spectra: Sequence[Spectrum]) -> Tensor:
        """Of the truncated higher-order SVD, from the energies of the core rotated into both bases.

        Never more than sqrt(2) times the error of the best factorization of these ranks (De Lathauwer et al. 2000, property 10), and so of
        ``split``'s, which iterates on from there. Measured at EVBMF's ranks (``benchmarks/surgery_speed.py``): above what ``split`` reaches by 2 %
        of it in the median and less than 4 % at most on trained networks (ResNet-56, VDSR).
        """
        apart = channels_apart(weight.double())
        out, into = spectra
        rotated = (out.basis.mT @ (apart @ into.basis).flatten(1)).view(out.full, apart.shape[1], into.full)
        tails = tail_energy(rotated.square().sum(1))
        return (tails / tails[0, 0].clamp(min=torch.finfo(tails.dtype).tiny)).sqrt()

    def merge(self, weights: Mapping[str, Tensor], geometry: Geometry) -> Tensor:
        weight = weights["core"]
        if "reduce" in weights:
            weight = mode_product(weight, weights["reduce"].flatten(1).mT, 1)
        if "expand" in weights:
            weight = mode_product(weight, weights["expand"].flatten(1), 0)
        return weight


TUCKER: Kind = TuckerKind()
