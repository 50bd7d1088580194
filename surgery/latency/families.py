"""Plans of one sort, from little cut to much: by measured times, by MACs, or one fraction everywhere.

Whatever the sort, a plan has a nominal share (of the time, or of the MACs) and a loss, and losses compare between sorts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import ceil, lcm
from typing import Any, Protocol

from passes.blockwise import Blockwise
from passes.factorization import Decision, Factorization, Keep
from passes.kinds import usual_kind
from passes.site import Site
from passes.spectra import Spectra
from surgery.ranks.candidates import Candidates, Cost
from surgery.ranks.knapsack import cheapest_within, least_loss, least_worst, within

__all__ = ["Family", "Proposal", "Rung", "Solved", "Uniform", "rungs_of"]

FRACTIONS = tuple(step / 40 for step in range(38, 1, -1))


@dataclass(frozen=True, slots=True, eq=False)
class Proposal:
    """A plan that could be raced.

    Attributes:
        decisions: by layer.
        share: nominal, of the whole network's time or of the layers' MACs.
        loss: what the solver makes small: the sum of the layers' losses, or the largest as a share of what its layer has to lose.
    """

    decisions: Mapping[str, Decision]
    share: float
    loss: float

    @property
    def cuts(self) -> tuple[tuple[str, Decision], ...]:
        """What tells plans apart."""
        return tuple((name, decision) for name, decision in self.decisions.items() if isinstance(decision, Factorization))


class Family(Protocol):
    """Plans of one sort."""

    @property
    def name(self) -> str:
        """For people."""

    def at_share(self, share: float) -> Proposal:
        """The plan of this nominal share, or the nearest that there is."""

    def at_loss(self, loss: float) -> Proposal | None:
        """The plan of the least nominal share that loses no more than this; None where none does."""


@dataclass(frozen=True, slots=True, eq=False)
class Solved:
    """Plans by the solver.

    Attributes:
        name: for people.
        criterion: of the budget.
        candidates: of each layer, with costs in one unit.
        total: what the network costs in that unit.
    """

    name: str
    criterion: str
    candidates: Sequence[Candidates]
    total: float

    @property
    def floor(self) -> float:
        """The least nominal share."""
        return self._share([int(c.costs.argmin()) for c in self.candidates])

    def at_share(self, share: float) -> Proposal:
        if not self.candidates:
            return Proposal({}, 1.0, 0.0)
        rest = self.total - sum(float(c.before) for c in self.candidates)
        least = sum(float(c.costs.min()) for c in self.candidates)
        solver = least_loss if self.criterion == "mean" else least_worst
        return self._proposal(solver(self._costs, self._losses, max(share * self.total - rest, least * (1 + 1e-9))))

    def at_loss(self, loss: float) -> Proposal | None:
        solver = cheapest_within if self.criterion == "mean" else within
        least = [float(losses.min()) for losses in self._losses]
        if (sum(least) if self.criterion == "mean" else max(least)) > loss:
            return None
        return self._proposal(solver(self._costs, self._losses, loss))

    @property
    def _costs(self) -> list[Any]:
        return [c.costs for c in self.candidates]

    @property
    def _losses(self) -> list[Any]:
        return [c.losses if self.criterion == "mean" else c.shares for c in self.candidates]

    def _share(self, chosen: Sequence[int]) -> float:
        saved = sum(float(c.before - c.costs[index]) for c, index in zip(self.candidates, chosen, strict=True))
        return 1 - saved / self.total if self.total else 1.0

    def _proposal(self, chosen: Sequence[int]) -> Proposal:
        decisions = {c.site.name: c.decisions[index] for c, index in zip(self.candidates, chosen, strict=True)}
        losses = [float(each[index]) for each, index in zip(self._losses, chosen, strict=True)]
        return Proposal(decisions, self._share(chosen), sum(losses) if self.criterion == "mean" else max(losses))


@dataclass(frozen=True, slots=True)
class Rung:
    """What one fraction makes of one layer; ``share`` is the loss as a share of what the layer has to lose."""

    decision: Decision
    cost: float
    loss: float
    share: float


@dataclass(frozen=True, slots=True, eq=False)
class Uniform:
    """One fraction of the full rank everywhere.

    Attributes:
        criterion: of the budget.
        rungs: of each layer, by name: one for each of ``FRACTIONS``, so that the cost falls.
        total: MACs of these layers as they are.
        name: for people.
    """

    criterion: str
    rungs: Mapping[str, Sequence[Rung]]
    total: float
    name: str = "one fraction everywhere"

    def at_share(self, share: float) -> Proposal:
        plans = self._plans()
        return next((plan for plan in plans if plan.share <= share), plans[-1])

    def at_loss(self, loss: float) -> Proposal | None:
        return next((plan for plan in reversed(self._plans()) if plan.loss <= loss and plan.cuts), None)

    def _plans(self) -> list[Proposal]:
        found = []
        for rungs in zip(*self.rungs.values(), strict=True):
            loss = sum(rung.loss for rung in rungs) if self.criterion == "mean" else max(rung.share for rung in rungs)
            decisions = dict(zip(self.rungs, (rung.decision for rung in rungs), strict=True))
            found.append(Proposal(decisions, sum(rung.cost for rung in rungs) / self.total, loss))
        return found


def rungs_of(site: Site, kinds: Sequence[Blockwise], spectra: Spectra, macs: Cost, lower: Sequence[Cost], round_to: int) -> list[Rung]:
    """What each of ``FRACTIONS`` makes of a layer: its usual kind at that fraction of the full rank in every mode, where MACs fall.

    Args:
        site: with its calls.
        kinds: those that may be used; the layer is kept where its usual one is not among them.
        spectra: the store to take spectra from.
        macs: of the layer under a factorization, or (None) as it is.
        lower: further costs that a cut must lower.
        round_to: ranks are multiples of this, or full.
    """
    kind = usual_kind(site.geometry, kinds[0].name if len(kinds) == 1 else "tucker")
    kept = Rung(Keep("at this fraction a chain saves nothing"), macs(None), 0.0, 0.0)
    if kind not in kinds or not kind.has_spectra or kind.refuses(site.geometry) is not None:
        return [kept] * len(FRACTIONS)
    surface = spectra.error_surface(site, kind).cpu().numpy()
    energy = float(spectra.weight(site, kind).square().sum()) if site.name in spectra.metrics else 1.0
    unit, full = kind.unit(site.geometry), kind.full_ranks(site.geometry)
    step = lcm(round_to, unit)
    found = []
    for fraction in FRACTIONS:
        ranks = [step * ceil(fraction * most / step) for most in full]
        uncut = [None if rank >= most else rank for rank, most in zip(ranks, full, strict=True)]
        if all(rank is None for rank in uncut):
            found.append(kept)
            continue
        factorization = kind.from_ranks(site.geometry, uncut)
        if any(cost(factorization) >= cost(None) for cost in (macs, *lower)):
            found.append(kept)
            continue
        place = tuple((most if rank is None else rank) // unit for rank, most in zip(factorization.ranks, full, strict=True))
        share = float(surface[place]) ** 2
        found.append(Rung(factorization, macs(factorization), energy * share, share))
    return found
