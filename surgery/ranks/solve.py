"""From a budget and what could be done with each layer to one decision for each."""

from __future__ import annotations

from collections.abc import Sequence
from numbers import Integral
from typing import Any

from passes.errors import SurgeryValueError
from passes.factorization import Decision
from surgery.ranks.budget import Budget, Totals
from surgery.ranks.candidates import Candidates
from surgery.ranks.knapsack import cheapest_within, least_loss, least_worst, within

__all__ = ["solve"]

UNITS = {"macs": "MACs", "params": "parameters"}


def solve(budget: Budget, candidates: Sequence[Candidates], totals: Totals) -> dict[str, Decision]:
    """One decision for each layer, by name.

    Raises:
        SurgeryValueError: the budget is below what any choice of ranks can reach; the message names the least.
    """
    chosen = _within_cost(budget, candidates, totals) if budget.max_error is None else _within_error(budget, candidates, budget.max_error**2)
    return {c.site.name: c.decisions[index] for c, index in zip(candidates, chosen, strict=True)}


def _within_error(budget: Budget, candidates: Sequence[Candidates], bound: float) -> list[int]:
    """The cheapest whose losses are at most this share: of what all layers together have to lose, or each of its own."""
    costs, losses = [c.costs for c in candidates], [c.losses for c in candidates]
    if budget.criterion == "mean":
        return cheapest_within(costs, losses, bound * sum(c.energy for c in candidates)) if costs else []
    return within(costs, [c.shares for c in candidates], bound)


def _within_cost(budget: Budget, candidates: Sequence[Candidates], totals: Totals) -> list[int]:
    costs, losses = [c.costs for c in candidates], [c.losses for c in candidates]
    unit: Any = budget.unit
    total, asked = getattr(totals, unit), getattr(budget, unit)
    allowed = int(asked) if isinstance(asked, Integral) else float(asked) * total
    rest = total - sum(c.before for c in candidates)  # what no layer here has a say in
    least = rest + sum(float(cost.min()) for cost in costs)
    if least > allowed:
        raise SurgeryValueError(
            f"ranks: {budget} allows {allowed:,.0f} {UNITS[unit]}, but the least that these layers can reach is {least:,.0f}, {least / total:.3f} of "
            f'the network\'s {total:,}; ask for more, include more layers, or allow other kinds (method="auto")'
        )
    if not costs:
        return []
    if budget.criterion == "mean":
        return least_loss(costs, losses, allowed - rest)
    return least_worst(costs, [c.shares for c in candidates], allowed - rest)
