"""A gate on the real task: the smallest budget at which the user's own metric falls no further than it may."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from numbers import Integral, Real
from typing import Any

from torch import nn

from passes.errors import SurgeryTypeError, SurgeryValueError
from passes.factorization import Keep
from passes.running import callers_code, first_line
from surgery.plan import Plan
from surgery.ranks.budget import Budget

__all__ = ["Trial", "gated_plan"]

CLOSE = 0.02  # of the network: two shares nearer than this are not told apart


@dataclass(frozen=True, slots=True)
class Trial:
    """One budget that was tried: the share of the network, and the metric of the network cut to it."""

    share: float
    score: float


def gated_plan(
    model: nn.Module, budget: Any, evaluate: Any, max_drop: Any, plan_at: Callable[[Budget], Plan], cut: Callable[[Plan], nn.Module]
) -> Plan:
    """The plan for the smallest share, from the budget's own up to the whole network, whose score is at least the original's less ``max_drop``.

    Bisection: the metric is taken to fall with the share. The budget's own share is tried first; then at most six more.

    Args:
        model: as it is; it is evaluated first.
        budget: a ``Budget`` of a share of MACs or parameters, the least that is wanted.
        evaluate: gives a network's score, higher is better.
        max_drop: how much lower the score may be, in its own unit.
        plan_at: the plan for a budget.
        cut: the network for a plan.

    Returns:
        The plan, with what was tried in ``plan.trials``, the whole network first; all layers kept where nothing passes.

    Raises:
        SurgeryTypeError, SurgeryValueError: no such budget, function or number; or ``evaluate`` gives no number.
    """
    unit, share = _checked(budget, evaluate, max_drop)
    before = _score(evaluate, model)
    trials = [Trial(1.0, before)]
    best: Plan | None = None
    low, high = share, 1.0
    attempt = share
    while True:
        found = plan_at(replace(budget, **{unit: attempt}))
        score = _score(evaluate, cut(found))
        trials.append(Trial(attempt, score))
        if score >= before - max_drop:
            best, high = found, attempt
        else:
            low = attempt
        if high - low <= CLOSE or (best is not None and high == share):
            break
        attempt = (low + high) / 2
    if best is None:
        from surgery.training.deeper import plan_of

        reason = f"the metric falls by more than {max_drop:g} however little is cut ({trials[-1].score:g} at {trials[-1].share:.2f}, was {before:g})"
        standing = plan_of(model)  # which no share of a budget takes away
        best = Plan(
            {name: decision if isinstance(decision, Keep) or standing.get(name) == decision else Keep(reason) for name, decision in found.items()}
        )
    best.trials = tuple(trials)
    return best


def _checked(budget: Any, evaluate: Any, max_drop: Any) -> tuple[str, float]:
    if not callable(evaluate):
        raise SurgeryTypeError(f"evaluate: expected a function of a network that gives a number, got {type(evaluate).__name__}")
    if not isinstance(max_drop, Real) or isinstance(max_drop, bool) or not float(max_drop) >= 0:
        raise SurgeryValueError(f"max_drop: how much lower the metric may be, a number of at least 0; got {max_drop!r}")
    shares = {unit: getattr(budget, unit) for unit in ("macs", "params") if isinstance(budget, Budget)}
    unit = next((unit for unit, share in shares.items() if isinstance(share, Real) and not isinstance(share, Integral)), None)
    if unit is None:
        raise SurgeryValueError(f"ranks: with evaluate give the least share that is wanted, for example Budget(macs=0.4); got {budget}")
    return unit, float(shares[unit])


def _score(evaluate: Callable[[nn.Module], Any], net: nn.Module) -> float:
    with callers_code("evaluate: it failed"):
        value = evaluate(net)
    if isinstance(value, bool) or not hasattr(value, "__float__"):
        raise SurgeryTypeError(f"evaluate: must give a number, gave {value!r}")
    try:
        score = float(value)
    except (TypeError, ValueError, RuntimeError) as error:  # several numbers in a tensor or an array
        raise SurgeryTypeError(f"evaluate: must give a number, gave {type(value).__name__}: {first_line(error)}") from error
    if score != score:
        raise SurgeryValueError("evaluate: gave NaN, which compares with nothing")
    return score
