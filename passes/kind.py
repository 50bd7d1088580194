"""The contract of a kind: a way to factorize one weight, as pure tensor mathematics."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar, Protocol

from torch import Tensor

from passes.factorization import Factorization
from passes.geometry import Geometry
from passes.linalg import Spectrum

__all__ = ["Kind", "Rank"]

Rank = int | None
"""A rank, or None for a mode that stays uncut."""


class Kind(Protocol):
    """A way to factorize. It knows tensors and geometries only: no modules, no data, no costs.

    It sees one group of a layer in forward direction: weights are (C_out, C_in, *kernel) also of transposed layers, and ``geometry.groups`` is 1.
    ``passes.blockwise`` does the rest. A new kind is one file with one such object, added to ``passes.kinds.KINDS``; or, in a program of one's own,
    given to ``passes.register_kind``. Weights and MACs of ``shapes`` grow linearly with each rank: budgets count them at few ranks only.

    Attributes:
        factorization: the dataclass that holds this kind's ranks.
        modes: names of the ranks, in order.
        ranks_are_channels: ranks count channels between the layers, so that a layer of g groups has g times those of one group.
        mixes_inputs: the first layer sees all input channels of its group at once.
        has_spectra: ``unfoldings`` and ``error_surface`` mean something; otherwise rank rules are refused, and the ranks must be given.
    """

    factorization: ClassVar[type[Factorization]]
    modes: ClassVar[tuple[str, ...]]
    ranks_are_channels: ClassVar[bool] = True
    mixes_inputs: ClassVar[bool] = True
    has_spectra: ClassVar[bool] = True

    def refuses(self, geometry: Geometry) -> str | None:
        """Why a layer of this geometry cannot be factorized this way, or None where it can."""

    def full_ranks(self, geometry: Geometry) -> tuple[int, ...]:
        """For each mode the rank at which nothing is lost: min(channels, product of the other dimensions)."""

    def from_ranks(self, geometry: Geometry, ranks: Sequence[Rank]) -> Factorization:
        """The factorization with these ranks (each at most its full rank), clipped to what the chain can use."""

    def unfoldings(self, weight: Tensor) -> tuple[Tensor, ...]:
        """For each mode the matrix whose singular values a rank rule looks at, or a stack (blocks, rows, columns) of those which share a rank."""

    def shapes(self, geometry: Geometry, factorization: Factorization) -> Mapping[str, Geometry]:
        """The chain's layers, first to last, by name; the last one holds the bias, and no other can."""

    def split(self, weight: Tensor, factorization: Factorization, spectra: Sequence[Spectrum]) -> Mapping[str, Tensor]:
        """Weights of the chain's layers by name, in float64, each (C_out, C_in / groups, *kernel)."""

    def error_surface(self, weight: Tensor, spectra: Sequence[Spectrum]) -> Tensor:
        """|W - W'|_F / |W|_F at every choice of ranks, without factorizing at any of them.

        Returns:
            float64, one dimension a mode, ``full rank + 1`` entries each: entry [r, ...] is the error at rank r (0: nothing is left).
        """

    def merge(self, weights: Mapping[str, Tensor], geometry: Geometry) -> Tensor:
        """The weight (C_out, C_in, *kernel) of the one layer that computes what the chain computes; differentiable."""
