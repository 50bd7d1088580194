"""From races to the next plan, and to the best one."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from passes.factorization import Decision
from surgery.latency.families import Family, Proposal
from surgery.latency.race import Raced

__all__ = ["Attempt", "Search", "corrected_share"]

REPLANS = 3
NEAR = 0.03  # of the share asked for: closer than this nothing is corrected
SURPRISING = 0.5  # of what was foretold to be saved: where the race differs by more, the times are not to be trusted
HOPELESS = 0.10  # of the share asked for: what is foretold to be slower than the best by more is not raced, where what was foretold came true
SURE = 4.0  # standard errors below the original's time: nearer than this the winner runs once more

Foretold = Callable[[Proposal], float]
"""The share of time that any plan takes by the times of its layers."""
Mended = Callable[[Proposal], Family]
"""The family anew, after the times that a plan rests on were measured again."""


@dataclass(frozen=True, slots=True, eq=False)
class Attempt:
    """A plan that was raced."""

    proposal: Proposal
    raced: Raced
    family: str

    @property
    def predicted(self) -> float:
        return self.proposal.share

    @property
    def surprising(self) -> bool:
        """What was measured has little to do with what was foretold, beyond noise."""
        missed = abs(self.raced.share - self.predicted)
        return missed > SURPRISING * (1 - self.predicted) and missed > 2 * self.raced.doubt


@dataclass(slots=True)
class Search:
    """Races plans until one takes the share of time that was asked for.

    Attributes:
        asked: the share.
        race: times a plan against the original.
        tried: all plans that ran, in order.
    """

    asked: float
    race: Callable[[Mapping[str, Decision]], Raced]
    tried: list[Attempt] = field(default_factory=list)

    def aim(self, family: Family, mended: Mended) -> int:
        """Plan, measure, and correct the nominal share by what was measured, at most ``REPLANS`` times; how often it was.

        Where a plan is foretold to take less than no time, or its race has little to do with what was foretold, the times that it rests on are bad:
        they are measured again, once, and planning begins anew.
        """
        points: list[Attempt] = []
        before, trusted = len(self.tried), False
        for _ in range(REPLANS + 1):
            proposal = family.at_share(corrected_share(points, self.asked))
            if proposal.share < 0 and not trusted:
                family, points, trusted = mended(proposal), [], True
                proposal = family.at_share(self.asked)
            if any(point.proposal.cuts == proposal.cuts for point in points):
                break
            attempt = self._run(proposal, family)
            if self._hit(attempt):
                break
            if attempt.surprising and not trusted:
                family, points, trusted = mended(proposal), [], True
            else:
                points.append(attempt)
        return max(len(self.tried) - before - 1, 0)

    def challenge(self, family: Family, foretold: Foretold | None = None) -> None:
        """Race a plan of another family that loses no more than the best so far; where it is faster, one that takes the share asked for.

        Where the best plan's race was as the times of layers foretell (``foretold``), they are right, and what is far slower by them need not run.
        """
        best = self.best
        proposal = family.at_loss(best.proposal.loss) if best.raced.faster else family.at_share(self.asked)
        if proposal is None or not proposal.cuts or self._known(proposal) is not None:
            return
        if foretold is not None and self._hopeless(proposal, foretold):
            return
        attempt = self._run(proposal, family)
        if attempt.raced.share >= best.raced.share or attempt.raced.share >= (1 - NEAR) * self.asked:
            return
        nearer = family.at_share(corrected_share([attempt], self.asked))
        if nearer.cuts and nearer.loss < proposal.loss and self._known(nearer) is None:
            self._run(nearer, family)

    def push(self, family: Family) -> None:
        """Race the plan of the least share: whether what was asked for can be reached at all."""
        proposal = family.at_share(0.0)
        if self._known(proposal) is None:
            self._run(proposal, family)

    @property
    def best(self) -> Attempt:
        """Of those within reach of the share the one that loses least, else the fastest."""
        near = [attempt for attempt in self.tried if attempt.raced.share <= (1 + NEAR) * self.asked and attempt.raced.faster]
        if near:
            return min(near, key=lambda attempt: attempt.proposal.loss)
        return min(self.tried, key=lambda attempt: attempt.raced.share)

    def confirmed(self) -> Attempt:
        """The best; where it is not faster by far it runs once more, since the luckiest of several races looks better than it is."""
        best = self.best
        if not best.raced.faster or best.raced.share + SURE * best.raced.doubt < 1:
            return best
        return Attempt(best.proposal, best.raced.slower_of(self.race(best.proposal.decisions)), best.family)

    def _hit(self, attempt: Attempt) -> bool:
        return self._near(attempt.raced.share, self.asked)

    def _hopeless(self, proposal: Proposal, foretold: Foretold) -> bool:
        best = self.best
        right = best.raced.faster and self._near(foretold(best.proposal), best.raced.share)
        return right and foretold(proposal) > best.raced.share + HOPELESS * self.asked

    def _near(self, one: float, other: float) -> bool:
        return abs(one - other) <= NEAR * self.asked

    def _known(self, proposal: Proposal) -> Attempt | None:
        return next((attempt for attempt in self.tried if attempt.proposal.cuts == proposal.cuts), None)

    def _run(self, proposal: Proposal, family: Family) -> Attempt:
        """Each plan runs once; what a new table foretells of it may differ."""
        known = self._known(proposal)
        attempt = Attempt(proposal, self.race(proposal.decisions) if known is None else known.raced, family.name)
        if known is None:
            self.tried.append(attempt)
        return attempt


def corrected_share(tried: Sequence[Attempt], asked: float) -> float:
    """The nominal share to plan for, so that the one asked for is measured: linear between the plans that ran, the uncut network among them.

    Beyond the fastest plan, what is saved is taken to be as many times what is foretold as it was there. Where no plan was faster than the uncut
    network, nobody knows how many times: twice as much is cut as was.
    """
    faster = sorted({(a.raced.share, a.predicted) for a in tried if a.raced.share < 1})
    if tried and not faster:
        return 1 - 2 * (1 - min(a.predicted for a in tried))
    share, predicted = faster[0] if faster else (1.0, 1.0)
    if asked < share:
        return 1 - (1 - asked) * min(max((1 - predicted) / (1 - share), 0.2), 5.0) if share < 1 else asked
    points = [*faster, (1.0, 1.0)]
    return float(np.interp(asked, [s for s, _ in points], [p for _, p in points]))
