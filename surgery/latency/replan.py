"""From times to plans, and from what was measured to better ones."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from passes.errors import SurgeryValueError
from passes.factorization import Decision
from surgery.cost.outcome import LatencyOutcome
from surgery.latency.race import Raced
from surgery.ranks.budget import Budget
from surgery.ranks.candidates import Candidates
from surgery.ranks.knapsack import least_loss, least_worst

__all__ = ["Attempt", "Told", "allowed_seconds", "best_of", "choose", "corrected_share", "loss_of", "predicted_share", "unreachable"]

NEAR = 0.03  # of the share asked for: closer than this nothing is corrected


@dataclass(frozen=True, slots=True)
class Attempt:
    decisions: dict[str, Decision]
    predicted: float
    raced: Raced
    loss: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Told:
    """What every outcome says."""

    runtime: str
    asked: float
    batch: int
    threads: int

    def outcome(self, predicted: float, raced: Raced | None, replans: int, note: str | None = None) -> LatencyOutcome:
        share, low, high = (None, None, None) if raced is None else (raced.share, raced.low, raced.high)
        return LatencyOutcome(
            runtime=self.runtime,
            asked=self.asked,
            predicted=predicted,
            measured=share,
            low=low,
            high=high,
            replans=replans,
            batch=self.batch,
            threads=self.threads,
            note=note,
        )

    def nothing(self, note: str) -> LatencyOutcome:
        return replace(self.outcome(1.0, Raced(1.0, 1.0, 1.0), 0, note), kept=True)


def _saved(candidates: Sequence[Candidates], chosen: Sequence[int]) -> float:
    return sum(float(c.before - c.costs[index]) for c, index in zip(candidates, chosen, strict=True))


def predicted_share(candidates: Sequence[Candidates], chosen: Sequence[int], total: float) -> float:
    return 1 - _saved(candidates, chosen) / total if total else 1.0


def allowed_seconds(candidates: Sequence[Candidates], total: float, share: float) -> float:
    """Seconds for the candidates' layers, the rest of the network staying as it is."""
    return share * total - (total - sum(float(c.before) for c in candidates))


def choose(budget: Budget, candidates: Sequence[Candidates], allowed: float) -> list[int]:
    solver = least_loss if budget.criterion == "mean" else least_worst
    return solver([c.costs for c in candidates], [c.losses for c in candidates], allowed)


def loss_of(budget: Budget, candidates: Sequence[Candidates], chosen: Sequence[int]) -> float:
    losses = [float(c.losses[index]) for c, index in zip(candidates, chosen, strict=True)]
    return sum(losses) if budget.criterion == "mean" else max(losses)


def corrected_share(tried: Sequence[Attempt], asked: float) -> float:
    """The share to plan for, so that the one asked for is measured: linear between the plans that were measured, the uncut network among them.

    Beyond the fastest plan, what is saved is taken to be as many times what is predicted as it was there.
    """
    points = sorted({(a.raced.share, a.predicted) for a in tried} | {(1.0, 1.0)})
    share, predicted = points[0]
    if asked < share:
        return 1 - (1 - asked) * min(max((1 - predicted) / (1 - share), 0.2), 5.0) if share < 1 else asked
    return float(np.interp(asked, [s for s, _ in points], [p for _, p in points]))


def best_of(tried: Sequence[Attempt], asked: float) -> Attempt:
    """Of those within reach of the share the one that loses least, else the fastest."""
    near = [attempt for attempt in tried if attempt.raced.share <= (1 + NEAR) * asked]
    if near:
        return min(near, key=lambda attempt: attempt.loss)
    return min(tried, key=lambda attempt: attempt.raced.share)


def unreachable(budget: Budget, least: float, how: str) -> SurgeryValueError:
    return SurgeryValueError(
        f"ranks: {budget} is out of reach: the least that these layers can come to is {least:.3f} of the network's time ({how}); ask for more, "
        'include more layers, or allow other kinds (method="auto")'
    )
