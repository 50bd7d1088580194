"""What kinds share whose one rank truncates a singular value decomposition: the singular values that are left out are the error."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from passes.factorization import Factorization
from passes.geometry import Geometry
from passes.kind import Kind, Rank
from passes.linalg import Spectrum, relative_tails

__all__ = ["OneRank"]


class OneRank(Kind):
    """Base of kinds with one rank and one unfolding, or one stack of unfoldings that share the rank."""

    def from_ranks(self, geometry: Geometry, ranks: Sequence[Rank]) -> Factorization:
        (rank,) = ranks
        return self.factorization(self.full_ranks(geometry)[0] if rank is None else rank)  # type: ignore[call-arg]

    def error_surface(self, weight: Tensor, spectra: Sequence[Spectrum]) -> Tensor:
        """Exact (Eckart and Young 1936)."""
        return relative_tails(spectra[0].values)
