"""One choice for every layer under one budget: the multiple-choice knapsack (Sinha and Zoltners 1979). Numbers only.

The Lagrangian gives a bound and a good start; an integer program (HiGHS, by ``scipy.optimize.milp``) over the choices that the bound leaves open
finishes it.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from tempfile import TemporaryFile
from threading import Lock
from typing import Any

import numpy as np

__all__ = ["cheapest_within", "least_loss", "least_worst", "pareto", "within"]

GAP = 2e-4  # relative to the optimum, at which the integer program stops
SECONDS = 20.0
ALONE = Lock()
EXACT = 1e-10  # of the largest loss: what is below it counts as none
EXACT_UP_TO = 20_000  # choices in all up to which none is left out of the integer program

Numbers = Any  # a one-dimensional float64 numpy array


def pareto(costs: Numbers, losses: Numbers, most: int) -> Numbers:
    """Indices of the choices that no other beats in both, by rising cost; of more than ``most``, so many that their losses are spread evenly (log).

    The cheapest and the most exact are always among them.
    """
    order = np.lexsort((losses, costs))
    best = np.minimum.accumulate(losses[order])
    first = np.ones(len(order), dtype=bool)
    first[1:] = losses[order][1:] < best[:-1]
    front = order[first]
    if len(front) <= most:
        return front
    lossy = losses[front][losses[front] > 0]  # a choice without any loss would leave most of the marks where there are no choices
    least = max(float(lossy.min()), EXACT * float(lossy.max())) / 2 if len(lossy) else 1.0
    height = np.log(np.maximum(losses[front], least))
    marks = np.linspace(height[0], height[-1], most)
    chosen = np.unique(np.searchsorted(-height, -marks))
    return front[np.unique(np.clip(np.concatenate([chosen, [0, len(front) - 1]]), 0, len(front) - 1))]


def least_loss(costs: Sequence[Numbers], losses: Sequence[Numbers], budget: float) -> list[int]:
    """One index a layer, so that the sum of costs is at most ``budget`` and the sum of losses is least, within ``GAP`` of the optimum.

    Raises:
        ValueError: not even the cheapest choices fit.
    """
    if sum(float(c.min()) for c in costs) > budget:
        raise ValueError("not even the cheapest choices fit")
    price, start = _lagrangian(costs, losses, budget)
    finished = _integer_program(costs, losses, budget, price, _total(losses, start))
    found = min((start, finished), key=lambda chosen: _total(losses, chosen)) if finished is not None else start
    return _spend_the_rest(costs, losses, budget, found)


def cheapest_within(costs: Sequence[Numbers], losses: Sequence[Numbers], most: float) -> list[int]:
    """The other way round: the sum of losses is at most ``most`` and the sum of costs is least."""
    return least_loss(losses, costs, most)


def least_worst(costs: Sequence[Numbers], losses: Sequence[Numbers], budget: float) -> list[int]:
    """One index a layer, so that the sum of costs is at most ``budget`` and the largest loss is least (as ALDS has it, Liebenwein et al. 2021).

    Exact: by bisection over all losses, each layer takes its cheapest choice within the bound.

    Raises:
        ValueError: not even the cheapest choices fit.
    """
    bounds = np.unique(np.concatenate(list(losses)))
    low, high = 0, len(bounds) - 1
    if _total(costs, within(costs, losses, bounds[high])) > budget:
        raise ValueError("not even the cheapest choices fit")
    while low < high:
        middle = (low + high) // 2
        if bounds[middle] >= max(float(loss.min()) for loss in losses) and _total(costs, within(costs, losses, bounds[middle])) <= budget:
            high = middle
        else:
            low = middle + 1
    return _spend_the_rest(costs, losses, budget, within(costs, losses, bounds[high]))


def within(costs: Sequence[Numbers], losses: Sequence[Numbers], bound: float) -> list[int]:
    """For each layer the cheapest choice whose loss is at most ``bound``."""
    return [int(np.where(loss <= bound, cost, np.inf).argmin()) for cost, loss in zip(costs, losses, strict=True)]


def _total(values: Sequence[Numbers], chosen: Sequence[int]) -> float:
    return float(sum(value[index] for value, index in zip(values, chosen, strict=True)))


def _at_price(costs: Sequence[Numbers], losses: Sequence[Numbers], price: float) -> list[int]:
    """For each layer the choice of least loss + price * cost, the cheaper one of equals."""
    chosen = []
    for cost, loss in zip(costs, losses, strict=True):
        value = loss + price * cost
        equal = np.flatnonzero(value <= value.min() * (1 + 1e-12))
        chosen.append(int(equal[cost[equal].argmin()]))
    return chosen


def _lagrangian(costs: Sequence[Numbers], losses: Sequence[Numbers], budget: float) -> tuple[float, list[int]]:
    """The lowest price of cost at which the budget holds, by bisection, and what is chosen then."""
    free = _at_price(costs, losses, 0.0)
    if _total(costs, free) <= budget:
        return 0.0, free
    cheapest = [int(np.lexsort((loss, cost))[0]) for cost, loss in zip(costs, losses, strict=True)]
    low, best = 0.0, cheapest
    scale = max(float(loss.max()) for loss in losses) / max(min(float(cost.max() - cost.min()) or 1.0 for cost in costs), 1e-12)
    high = max(scale, 1e-12)
    while _total(costs, _at_price(costs, losses, high)) > budget:
        high *= 10
        if high > 1e300:
            return high, cheapest
    for _ in range(200):
        middle = (low + high) / 2
        chosen = _at_price(costs, losses, middle)
        if _total(costs, chosen) <= budget:
            high, best = middle, chosen
        else:
            low = middle
        if high - low <= 1e-12 * high:
            break
    return high, best


def _integer_program(costs: Sequence[Numbers], losses: Sequence[Numbers], budget: float, price: float, reached: float) -> list[int] | None:
    """The optimum over all choices that can be part of one better than ``reached``, or None where the solver finds none in its time."""
    from scipy.optimize import Bounds, LinearConstraint, milp
    from scipy.sparse import csr_matrix

    reduced = [loss + price * cost for cost, loss in zip(costs, losses, strict=True)]
    bound = sum(float(r.min()) for r in reduced) - price * budget  # no choice at all can be better than this
    room = max(reached - bound, 0.0)
    open_ = [np.flatnonzero(r - r.min() <= room * (1 + 1e-9) + 1e-15) for r in reduced]
    if sum(map(len, open_)) > EXACT_UP_TO:
        open_ = [o[np.argsort(r[o])[: EXACT_UP_TO // len(open_)]] for o, r in zip(open_, reduced, strict=True)]
    sizes = [len(o) for o in open_]
    loss = np.concatenate([value[o] for value, o in zip(losses, open_, strict=True)])
    cost = np.concatenate([value[o] for value, o in zip(costs, open_, strict=True)])
    if loss.max() <= 0:
        return None
    rows = np.repeat(np.arange(len(sizes)), sizes)
    one_each = csr_matrix((np.ones(len(loss)), (rows, np.arange(len(loss)))), shape=(len(sizes), len(loss)))
    unit = max(budget, 1e-300)
    with _without_remarks():
        found = milp(
            loss / loss.max(),
            constraints=[LinearConstraint(one_each, 1, 1), LinearConstraint((cost / unit)[None], -np.inf, budget / unit)],
            integrality=np.ones(len(loss)),
            bounds=Bounds(0, 1),
            options={"time_limit": SECONDS, "mip_rel_gap": GAP},
        )
    if found.x is None:
        return None
    starts = np.cumsum([0, *sizes])
    chosen = [int(o[found.x[a:b].argmax()]) for o, a, b in zip(open_, starts[:-1], starts[1:], strict=True)]
    return chosen if _total(costs, chosen) <= budget else None


@contextmanager
def _without_remarks() -> Iterator[None]:
    """Leave out what HiGHS writes to standard output past Python, though told to be quiet; what others write meanwhile comes when it is done.

    One thread at a time: the descriptor is the process's. Where there is none, or nowhere to hold what is written, nothing is left out.
    """
    with ALONE, ExitStack() as stack:
        try:
            if sys.stdout is not None:
                sys.stdout.flush()
            own = os.dup(1)
            stack.callback(os.close, own)
            held = stack.enter_context(TemporaryFile())
        except (OSError, ValueError):  # closed, or the disk is full
            yield
            return
        try:
            os.dup2(held.fileno(), 1)
            yield
        finally:
            os.dup2(own, 1)
            held.seek(0)
            with open(own, "wb", closefd=False) as out:
                out.writelines(line for line in held if not line.startswith(b"Highs"))


def _spend_the_rest(costs: Sequence[Numbers], losses: Sequence[Numbers], budget: float, chosen: Sequence[int]) -> list[int]:
    """While a better choice still fits in what is left, the one that gains most for its cost."""
    now = list(chosen)
    left = budget - _total(costs, now)
    while True:
        best, gain = None, 0.0
        for layer, (cost, loss) in enumerate(zip(costs, losses, strict=True)):
            more, less = cost - cost[now[layer]], loss[now[layer]] - loss
            fits = (more <= left) & (less > 0)
            if fits.any():
                worth = np.where(fits, less / np.maximum(more, 1e-300), -np.inf)
                index = int(worth.argmax())
                if worth[index] > gain:
                    best, gain = (layer, index), float(worth[index])
        if best is None:
            return now
        layer, index = best
        left -= float(costs[layer][index] - costs[layer][now[layer]])
        now[layer] = index
