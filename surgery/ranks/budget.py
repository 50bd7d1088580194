"""Budgets: ranks and kinds of all layers at once, so that the network as a whole costs no more than it may and loses as little as it can.

The network's error is taken as the root mean square of its layers' errors |W - W'|_F / |W|_F; ``criterion="max"`` takes the largest of them instead,
as ALDS does (Liebenwein et al. 2021, with operator norms).
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, fields
from numbers import Integral, Real
from typing import Any

from passes.errors import SurgeryTypeError, SurgeryValueError
from passes.factorization import Decision
from surgery.ranks.candidates import Candidates
from surgery.ranks.knapsack import cheapest_within, least_loss, least_worst, within

__all__ = ["Budget", "Totals", "solve"]

CRITERIA = ("mean", "max")
RUNTIMES = ("onnxruntime", "openvino", "eager", "compile")
UNITS = {"macs": "MACs", "params": "parameters"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Budget:
    """What the whole network may cost, or lose. Exactly one of ``macs``, ``params``, ``latency`` and ``max_error`` is given.

    Attributes:
        macs: multiply-accumulates of one forward pass of the example inputs, everything in the network included: a float in (0, 1] is a share
            of what the network takes, an int a number.
        params: parameters, likewise.
        max_error: the error that the network may have, in (0, 1); MACs are then as few as it allows (parameters without example inputs).
        criterion: what of the layers' errors is made small: ``"mean"`` the root of their mean square, ``"max"`` the largest.
        latency: share in (0, 1) of the time that the network takes on this machine, measured (see ``surgery.latency``).
        runtime: what ``latency`` is measured in: ``"onnxruntime"`` (the default), ``"openvino"``, ``"eager"`` or ``"compile"``.
        batch: of the inputs that ``latency`` is measured with; that of the example inputs by default.
        threads: for ``latency``; torch's current number by default.
        profile: for ``latency``, a file of times: another device's, by which alone the plan is then made, or this one's, to which is added what
            it lacks. By default this machine's own, in its cache.
    """

    macs: float | int | None = None
    params: float | int | None = None
    max_error: float | None = None
    criterion: str = "mean"
    latency: float | None = None
    runtime: str | None = None
    batch: int | None = None
    threads: int | None = None
    profile: str | os.PathLike[str] | None = None

    def __post_init__(self) -> None:
        given = [name for name in ("macs", "params", "latency", "max_error") if getattr(self, name) is not None]
        if len(given) != 1:
            raise SurgeryValueError(f"Budget: give exactly one of macs, params, latency and max_error, got {given or 'none'}")
        if self.criterion not in CRITERIA:
            raise SurgeryValueError(f"Budget: criterion {self.criterion!r} is none of {list(CRITERIA)}")
        (name,) = given
        value = getattr(self, name)
        if not isinstance(value, Real) or isinstance(value, bool):
            raise SurgeryTypeError(f"Budget: {name} must be a number, got {value!r}")
        self._check_conditions()
        if name == "latency":
            if not 0 < float(value) < 1:
                raise SurgeryValueError(f"Budget: latency must be a share in (0, 1) of the time that the network takes, got {value}")
        elif isinstance(value, Integral) and name != "max_error":
            if value < 1:
                raise SurgeryValueError(f"Budget: {name} as a number must be at least 1, got {value}; a share is a float in (0, 1]")
        elif not 0 < float(value) <= 1:
            raise SurgeryValueError(f"Budget: {name} must be {'' if name == 'max_error' else 'an int, or a share '}in (0, 1], got {value}")

    def _check_conditions(self) -> None:
        """What belongs to ``latency`` alone."""
        for name in ("runtime", "batch", "threads", "profile"):
            value = getattr(self, name)
            if value is None:
                continue
            if self.latency is None:
                raise SurgeryValueError(f"Budget: {name} says how latency is measured; give it with latency only")
            if name in ("batch", "threads") and (not isinstance(value, Integral) or isinstance(value, bool) or value < 1):
                raise SurgeryValueError(f"Budget: {name} must be an int of at least 1, got {value!r}")
        if self.runtime is not None and self.runtime not in RUNTIMES:
            raise SurgeryValueError(f"Budget: runtime {self.runtime!r} is none of {list(RUNTIMES)}")
        if self.profile is not None and not isinstance(self.profile, str | os.PathLike):
            raise SurgeryTypeError(f"Budget: profile must be the path of a file, got {self.profile!r}")

    @property
    def unit(self) -> str | None:
        """What is counted: ``"macs"`` or ``"params"``; None where the error is bounded or time is measured."""
        return "macs" if self.macs is not None else "params" if self.params is not None else None

    def __str__(self) -> str:
        told = [f"{field.name}={getattr(self, field.name)!r}" for field in fields(self) if getattr(self, field.name) not in (None, "mean")]
        return f"Budget({', '.join(told)})"


@dataclass(frozen=True, slots=True, kw_only=True)
class Totals:
    """What the network takes before the surgery; MACs are None where no example inputs were given."""

    params: int = 0
    macs: int | None = None


def solve(budget: Budget, candidates: Sequence[Candidates], totals: Totals) -> dict[str, Decision]:
    """One decision for each layer, by name.

    Raises:
        SurgeryValueError: the budget is below what any choice of ranks can reach; the message names the least.
    """
    costs, losses = [c.costs for c in candidates], [c.losses for c in candidates]
    if budget.max_error is not None:
        bound = budget.max_error**2
        chosen = _within_error(budget, costs, losses, bound)
    else:
        chosen = _within_cost(budget, costs, losses, totals, [c.before for c in candidates])
    return {c.site.name: c.decisions[index] for c, index in zip(candidates, chosen, strict=True)}


def _within_error(budget: Budget, costs: Sequence[Any], losses: Sequence[Any], bound: float) -> list[int]:
    if budget.criterion == "mean":
        return cheapest_within(costs, losses, bound * len(costs)) if costs else []
    return within(costs, losses, bound)


def _within_cost(budget: Budget, costs: Sequence[Any], losses: Sequence[Any], totals: Totals, before: Sequence[float]) -> list[int]:
    unit: Any = budget.unit
    total, asked = getattr(totals, unit), getattr(budget, unit)
    allowed = int(asked) if isinstance(asked, Integral) else float(asked) * total
    rest = total - sum(before)  # what no layer here has a say in
    least = rest + sum(float(cost.min()) for cost in costs)
    if least > allowed:
        raise SurgeryValueError(
            f"ranks: {budget} allows {allowed:,.0f} {UNITS[unit]}, but the least that these layers can reach is {least:,.0f}, {least / total:.3f} of "
            f'the network\'s {total:,}; ask for more, include more layers, or allow other kinds (method="auto")'
        )
    if not costs:
        return []
    solver = least_loss if budget.criterion == "mean" else least_worst
    return solver(costs, losses, allowed - rest)
