"""The contract of a kind: a way to factorize one weight, as pure tensor mathematics."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor

from passes.factorization import Factorization
from passes.geometry import Geometry, Piece, PieceShape
from passes.linalg import Spectrum

__all__ = ["Kind", "Rank"]

Rank = int | None
"""A rank, or None for a mode that stays uncut."""


class Kind(Protocol):
    """A way to factorize. It knows tensors and geometries only: no modules, no data, no costs.

    A new kind is one file with one such object, added to ``passes.kinds.KINDS``.
    """

    @property
    def factorization(self) -> type[Factorization]:
        """The dataclass that holds this kind's ranks."""

    @property
    def modes(self) -> tuple[str, ...]:
        """Names of the unfoldings, in the order of the ranks."""

    def refuses(self, geometry: Geometry) -> str | None:
        """Why a layer of this geometry cannot be factorized this way, or None where it can."""

    def full_ranks(self, geometry: Geometry) -> tuple[int, ...]:
        """For each mode the rank at which nothing is lost: min(channels, product of the other dimensions)."""

    def from_ranks(self, geometry: Geometry, ranks: Sequence[Rank]) -> Factorization:
        """The factorization with these ranks (each at most its full rank), clipped to what the chain can use."""

    def unfoldings(self, weight: Tensor, geometry: Geometry) -> tuple[Tensor, ...]:
        """The matrices whose singular values a rank rule looks at, one a mode."""

    def shapes(self, geometry: Geometry, factorization: Factorization, bias: bool) -> tuple[PieceShape, ...]:
        """The chain's layers, first to last, without weights. The bias, if any, is the last layer's."""

    def split(
        self,
        weight: Tensor,
        bias: Tensor | None,
        geometry: Geometry,
        factorization: Factorization,
        spectra: Sequence[Spectrum],
    ) -> tuple[Piece, ...]:
        """The chain that stands for ``weight``; weights of the pieces are float64, the bias is a copy."""

    def error_surface(self, weight: Tensor, geometry: Geometry, spectra: Sequence[Spectrum]) -> Tensor:
        """|W - W'|_F / |W|_F at every choice of ranks, without factorizing at any of them.

        Returns:
            float64, one dimension a mode, ``full rank + 1`` entries each: entry [r, ...] is the error at rank r (0: nothing is left).
        """

    def merge(self, pieces: Sequence[Piece]) -> Tensor:
        """The weight of the one layer that computes what the chain computes, in the dtype of the pieces."""
