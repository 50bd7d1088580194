"""The map from a chain's factors to the weight that they amount to, its Jacobian J, and what moments of gradients become under it.

All kinds are multilinear in their factors with coefficients of one, so everything here is made of ``merge`` and its derivatives. Gradients go by the
chain rule, dL/dF = J^T dL/dW, and so do their averages (momentum). Of averages of squared gradients, whose correlations nobody kept, the entries
are taken as uncorrelated: E[(J^T g)^2] = (J * J)^T E[g^2] entry by entry. That is the transposed Jacobian of ``merge`` at the squared
factors wherever an entry of a factor reaches an entry of the weight by one path; of Tucker's 1x1 layers beside a core, which have one path for
each channel of the core, the paths are taken as uncorrelated too. Non-negative by construction.

Entries of a real gradient are correlated, along the very directions that a cut keeps. Where an average m of the same gradients is known (Adam), it is
a sample of them: the second moments of each factor are multiplied by |J^T m|^2 over what uncorrelated entries of those sizes would come to.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from passes.factorization import Factorization
from passes.geometry import Geometry, Piece
from passes.kinds import kind_of

__all__ = ["ChainMap"]

TOLERANCE = 1e-5  # of the normal equations' residual, relative to its first: what is left are directions that the factors hardly move the weight in
ITERATIONS = 300
SWEEPS = 30  # of the multiplicative iteration for second moments

Factors = tuple[Tensor, ...]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ChainMap:
    """Factors of one chain, as torch stores them, and the layer that they stand for.

    Attributes:
        geometry: of the layer.
        factorization: of the chain.
        names: of the chain's layers, first to last.
        geometries: theirs.
        factors: theirs: the point at which derivatives are taken.
    """

    geometry: Geometry
    factorization: Factorization
    names: tuple[str, ...]
    geometries: tuple[Geometry, ...]
    factors: Factors

    @classmethod
    def of(cls, geometry: Geometry, factorization: Factorization, pieces: Sequence[Piece], dtype: torch.dtype | None = torch.float64) -> ChainMap:
        """The map of a chain of these pieces; with ``dtype=None`` in their own."""
        return cls(
            geometry=geometry,
            factorization=factorization,
            names=tuple(p.name for p in pieces),
            geometries=tuple(p.geometry for p in pieces),
            factors=tuple(p.weight.detach().to(dtype or p.weight.dtype) for p in pieces),
        )

    def weight(self, *factors: Tensor) -> Tensor:
        """The layer's weight, as torch stores it, for these factors (for its own where none are given); differentiable."""
        pieces = [Piece(n, g, f, None) for n, g, f in zip(self.names, self.geometries, factors or self.factors, strict=True)]
        return kind_of(self.factorization).merge(pieces, self.geometry)

    def pull_back(self, moment: Tensor) -> Factors:
        """J^T m: what a gradient of the weight (its shape, float64) is for the factors."""
        found: Factors = torch.func.vjp(self.weight, *self.factors)[1](moment)
        return found

    def push_forward(self, moments: Sequence[Tensor]) -> Tensor:
        """J x: by how much the weight changes, to first order, when the factors change by these."""
        return torch.stack([self.weight(*self._with(k, moment)) for k, moment in enumerate(moments)]).sum(0)

    def least_norm(self, moments: Sequence[Tensor], tolerance: float = TOLERANCE) -> Tensor:
        """J (J^T J)^+ m: the smallest gradient of the weight which is this for the factors; the nearest, where none is exactly.

        Conjugate gradients on the least-squares problem min |J^T x - m|, from zero, so that no other solution can be reached (Hestenes and Stiefel
        1952; Björck 1996, section 7.4). No matrix is formed. It stops early, which leaves out what the factors hardly tell.
        """
        start = torch.zeros_like(self.weight())
        return _least_squares(self.pull_back, self.push_forward, start, tuple(moments), tolerance)

    def pull_back_squares(self, squares: Tensor) -> Factors:
        """Mean squared gradients of the weight as those of the factors; see the module."""
        return self._squared().pull_back(squares)

    def correlation(self, moment: Tensor) -> tuple[float, ...]:
        """For each factor |J^T m|^2 over its value for uncorrelated entries of the same sizes; 1 where there is no slope."""
        pairs = zip(self.pull_back(moment), self.pull_back_squares(moment.square()), strict=True)
        sums = [(float(real.square().sum()), float(alone.sum())) for real, alone in pairs]
        return tuple(real / alone if real > 0 and alone > 0 else 1.0 for real, alone in sums)

    def squares_of(self, squares: Sequence[Tensor]) -> Tensor:
        """Mean squared gradients of the weight, non-negative, that come to these for the factors.

        From a constant by multiplicative steps, which keep the sign (expectation maximization, Shepp and Vardi 1982): exact where they were constant.
        """
        squared = self._squared()
        ones = tuple(torch.ones_like(f) for f in squared.factors)
        reached = squared.push_forward(ones)
        scale = sum(float(s.sum()) for s in squares) / max(float(reached.sum()), torch.finfo(reached.dtype).tiny)
        found = torch.full_like(reached, scale)
        for _ in range(SWEEPS):
            seen = squared.pull_back(found)
            ratios = [torch.where(s > 0, wanted / s.clamp(min=torch.finfo(s.dtype).tiny), 0.0) for wanted, s in zip(squares, seen, strict=True)]
            factor = squared.push_forward(ratios) / reached.clamp(min=torch.finfo(reached.dtype).tiny)
            found = torch.where(reached > 0, found * factor, found)
        return found

    def projected(self, weight: Tensor) -> Factors:
        """Factors of another weight on the same bases: the layer with most weights takes what it can of it, by least squares; the others stay."""
        which = max(range(len(self.factors)), key=lambda k: self.factors[k].numel())

        def alone(factor: Tensor) -> Tensor:
            return self.weight(*self._with(which, factor))

        start = self.factors[which]
        transposed = torch.func.vjp(alone, start)[1]
        gap = weight - self.weight()
        change = _least_squares(lambda x: (alone(x),), lambda r: transposed(r[0])[0], torch.zeros_like(start), (gap,), 1e-10)
        return self._with(which, start + change)

    def _with(self, which: int, factor: Tensor) -> Factors:
        return tuple(factor if k == which else f for k, f in enumerate(self.factors))

    def _squared(self) -> ChainMap:
        return replace(self, factors=tuple(f.square() for f in self.factors))


def _least_squares(
    apply: Callable[[Tensor], Factors], transposed: Callable[[Factors], Tensor], start: Tensor, wanted: Factors, tolerance: float
) -> Tensor:
    """The x nearest to ``start`` (zeros) with the least |apply(x) - wanted|, by conjugate gradients (CGLS)."""
    found, left = start, wanted
    slope = transposed(left)
    step, steepness = slope, float(slope.square().sum())
    first = steepness
    for _ in range(ITERATIONS):
        if steepness <= tolerance**2 * first or steepness == 0:
            break
        moved = apply(step)
        length = steepness / sum(float(m.square().sum()) for m in moved)
        found = found + length * step
        left = tuple(a - length * b for a, b in zip(left, moved, strict=True))
        slope = transposed(left)
        before, steepness = steepness, float(slope.square().sum())
        step = slope + (steepness / before) * step
    return found
