"""Everything that could be done with a layer, as numbers: what it would cost and how much of the layer it would lose."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from math import lcm
from typing import Any

import numpy as np

from passes.blockwise import Blockwise
from passes.factorization import Decision, Factorization, Keep
from passes.kind import Rank
from passes.site import Site
from passes.spectra import Spectra
from surgery.ranks.knapsack import pareto

__all__ = ["Candidates", "Cost", "Pays", "candidates_of"]

MOST = 400  # choices a layer; between two neighbours of them the error changes by a percent or two

Numbers = Any  # a one-dimensional float64 numpy array
Cost = Callable[[Factorization | None], float]
Table = Callable[[Blockwise, Sequence[Sequence[Rank]]], Numbers]
Pays = Callable[[Blockwise, Sequence[Sequence[Rank]]], Any]  # a boolean numpy array


@dataclass(frozen=True, slots=True, eq=False)
class Candidates:
    """The choices that are worth looking at for one layer, by rising cost; the last one keeps it, unless another is both cheaper and exact.

    Attributes:
        site: the layer.
        decisions: a factorization each, or ``Keep``.
        costs: of each.
        errors: |W - W'|_F / |W|_F of each.
        losses: what adds up over layers: squared errors; where the store has a metric for the layer, in its unit, so that they compare.
        before: what the layer costs as it is.
        energy: the loss of the whole layer, to which losses compare.
    """

    site: Site
    decisions: tuple[Decision, ...]
    costs: Numbers
    errors: Numbers
    losses: Numbers
    before: float
    energy: float = 1.0

    @property
    def shares(self) -> Numbers:
        """The losses as shares of what the layer has to lose."""
        return self.losses / self.energy if self.energy else self.losses


def candidates_of(
    site: Site,
    kinds: Iterable[Blockwise],
    spectra: Spectra,
    *,
    cost: Cost,
    guards: Sequence[Cost] = (),
    round_to: int,
    keep: Keep,
    table: Table | None = None,
    pays: Pays | None = None,
) -> Candidates:
    """All rank choices of the kinds, and to keep the layer, without those that another beats in both cost and error.

    Args:
        site: the layer.
        kinds: those to choose from; kinds without spectra and those that refuse the layer are left out.
        spectra: the store to take spectra from.
        cost: of the layer under a factorization, or (None) as it is. For ranks of one kind it is linear in each rank.
        guards: further costs, of the same form, which a factorization must lower.
        round_to: ranks are multiples of this, or full.
        keep: the decision that leaves the layer as it is.
        table: costs of a kind at every choice of the ranks given for its modes, for costs that are not linear; infinite where a choice is out.
            ``cost`` is then asked for the layer as it is only.
        pays: which choices of the ranks given for the modes of a kind may be made, where something beside the costs has a say.
    """
    fitting = [kind for kind in kinds if kind.has_spectra and kind.refuses(site.geometry) is None]
    families = [family for kind in fitting for family in _families(site, kind, spectra, cost, guards, round_to, table, pays)]
    costs = np.concatenate([family.costs for family in families] + [np.array([float(cost(None))])])
    errors = np.concatenate([family.errors for family in families] + [np.zeros(1)])
    losses = np.concatenate([family.energy * family.errors**2 for family in families] + [np.zeros(1)])
    energy = max((family.energy for family in families), default=1.0)
    starts = np.cumsum([0, *(len(family.costs) for family in families)])
    chosen = pareto(costs, losses, MOST)

    def decision(index: int) -> Decision:
        if index == starts[-1]:
            return keep
        number = int(np.searchsorted(starts, index, side="right")) - 1
        return families[number].at(index - int(starts[number]))

    return Candidates(
        site,
        tuple(decision(int(index)) for index in chosen),
        costs[chosen],
        errors[chosen],
        losses[chosen],
        float(cost(None)),
        energy,
    )


@dataclass(frozen=True, slots=True, eq=False)
class _Family:
    """All choices of ranks of one kind in which the same modes stay uncut."""

    costs: Numbers
    errors: Numbers
    energy: float
    grids: tuple[Sequence[Rank], ...]
    build: Callable[[Sequence[Rank]], Factorization]

    def at(self, index: int) -> Factorization:
        places = np.unravel_index(index, [len(grid) for grid in self.grids])
        return self.build([grid[int(place)] for grid, place in zip(self.grids, places, strict=True)])


def _families(
    site: Site,
    kind: Blockwise,
    spectra: Spectra,
    cost: Cost,
    guards: Sequence[Cost],
    round_to: int,
    table: Table | None,
    pays: Pays | None,
) -> Iterator[_Family]:
    unit, full = kind.unit(site.geometry), kind.full_ranks(site.geometry)
    surface = spectra.error_surface(site, kind).cpu().numpy()
    energy = float(spectra.weight(site, kind).square().sum()) if site.name in spectra.metrics else 1.0
    step = lcm(round_to, unit)
    grids = [list(range(step, most, step)) or [most] for most in full]
    uncut = (False, True) if len(full) > 1 else (False,)
    for whole in itertools.product(uncut, repeat=len(full)):
        if all(whole):
            continue
        ranks: tuple[Sequence[Rank], ...] = tuple([None] if w else grid for w, grid in zip(whole, grids, strict=True))
        indices = [[most // unit] if w else [rank // unit for rank in grid] for w, grid, most in zip(whole, grids, full, strict=True)]
        errors = surface[np.ix_(*indices)]
        possible = _unclipped(site, kind, ranks)
        for guard in guards:
            possible &= _costs(kind, ranks, guard) < guard(None)
        if pays is not None:
            possible &= pays(kind, ranks)
        costs = np.where(possible, _costs(kind, ranks, cost) if table is None else table(kind, ranks), np.inf)
        yield _Family(costs.ravel(), errors.ravel(), energy, ranks, lambda chosen: kind.from_ranks(site.geometry, chosen))


def _costs(kind: Blockwise, grids: Sequence[Sequence[Rank]], cost: Cost) -> Numbers:
    """Costs at every choice from few of them: linear in each rank, so that the corners of the grid say all."""
    corners = np.array(
        [cost(kind.factorization(*corner)) for corner in itertools.product(*((grid[0], grid[-1]) for grid in grids))],
        dtype=float,
    ).reshape([2] * len(grids))
    for axis, grid in enumerate(grids):
        low, high = grid[0], grid[-1]
        share = np.zeros(len(grid)) if low is None or high is None or low == high else (np.array(grid, dtype=float) - low) / (high - low)
        first, last = np.take(corners, [0], axis), np.take(corners, [1], axis)
        shape = [-1 if a == axis else 1 for a in range(corners.ndim)]
        corners = first + (last - first) * share.reshape(shape)
    return np.rint(corners)


def _unclipped(site: Site, kind: Blockwise, grids: Sequence[Sequence[Rank]]) -> Numbers:
    """Which choices are what ``from_ranks`` leaves as they are: beyond those nothing is to be had."""
    if len(grids) == 1 or any(grid[0] is None for grid in grids):
        return np.ones([len(grid) for grid in grids], dtype=bool)
    first, second = grids
    most = [kind.from_ranks(site.geometry, [rank, second[-1]]).ranks[1] for rank in first]
    least = [kind.from_ranks(site.geometry, [first[-1], rank]).ranks[0] for rank in second]
    upper = np.array(second)[None, :] <= np.array(most)[:, None]
    return upper & (np.array(first)[:, None] <= np.array(least)[None, :])
