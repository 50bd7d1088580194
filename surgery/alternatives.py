"""What a network's error is at every budget, and what else could be done with one of its layers: for looking before choosing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from passes.errors import SurgeryError, SurgeryValueError, nearest
from passes.factorization import Decision, Keep
from surgery.drafting import draft_of
from surgery.inspection import usable_model
from surgery.options import Options
from surgery.plan import Plan
from surgery.planning import Draft
from surgery.ranks.budget import Budget
from surgery.ranks.candidates import Candidates
from surgery.ranks.solve import solve

__all__ = ["Alternative", "Tradeoff", "TradeoffRow", "explain", "tradeoff"]

SHARES = (0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1)
BESIDE = 3  # alternatives on either side


@dataclass(frozen=True, slots=True, kw_only=True)
class TradeoffRow:
    """One budget.

    Attributes:
        share: of the network that was allowed.
        used: share that is used.
        error: root mean square of the layers' errors |W - W'|_F / |W|_F; with calibration the root of the predicted share of the output's change.
        cut: layers that are cut.
    """

    share: float
    used: float
    error: float
    cut: int


@dataclass(frozen=True, slots=True)
class Tradeoff:
    """Budgets from large to small, down to the least that can be reached; ``unit`` is ``"macs"`` or ``"params"``.

    ``layers`` are those that could be cut, over which errors are averaged; ``calibrated`` says that errors are weighted by what calibration saw.
    """

    unit: str
    rows: tuple[TradeoffRow, ...]
    layers: tuple[str, ...] = ()
    calibrated: bool = False

    def to_data(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return {"unit": self.unit, "rows": [asdict(row) for row in self.rows]}

    def save_picture(self, path: Any) -> None:
        """Error against share, as a picture.

        Raises:
            MissingExtra: Matplotlib is not installed.
        """
        from surgery.plots import tradeoff_figure

        tradeoff_figure(self).savefig(path, dpi=130)


@dataclass(frozen=True, slots=True)
class Alternative:
    """Something that could be done with a layer: its cost in the unit asked for, its error, and whether it is what the plan does.

    Attributes:
        decision: a factorization, or ``Keep``.
        cost: MACs of all calls of the layer (parameters without example inputs).
        error: |W - W'|_F / |W|_F; with calibration in the metric that was learnt.
        chosen: whether the plan does this.
    """

    decision: Decision
    cost: int
    error: float
    chosen: bool


def tradeoff(model: nn.Module, *, example_inputs: Any = None, shares: Sequence[float] = SHARES, calibration: Any = None, **options: Any) -> Tradeoff:
    """The least error at each budget: MACs with example inputs, else parameters. The model is not touched.

    Args:
        model: any module.
        example_inputs: as for ``decompose``.
        shares: of the whole network; those below what can be reached are left out.
        calibration: as for ``decompose``.
        options: ``method``, ``include``, ``exclude``, ``guard``, ``round_to``, ``device``, ``effective_weights`` as for ``decompose``.

    Raises:
        SurgeryTypeError, SurgeryValueError: as for ``plan``.
    """
    draft, unit = _draft(model, example_inputs, calibration, options)
    total = getattr(draft.totals, unit)
    rows = []
    for share in shares:
        budget = _share_of(unit, float(share))
        try:
            chosen = solve(budget, draft.candidates, draft.totals)
        except SurgeryError:
            break  # less cannot be reached
        rows.append(_row(draft.candidates, chosen, float(share), total))
    return Tradeoff(unit, tuple(rows), tuple(each.site.name for each in draft.candidates), calibration is not None)


def explain(
    model: nn.Module, site: str, plan: Plan, *, example_inputs: Any = None, calibration: Any = None, **options: Any
) -> tuple[Alternative, ...]:
    """What a plan does with one layer, among its nearest alternatives by cost, each better in cost or error than all others that were possible.

    Args:
        model: any module; it is not touched.
        site: the layer's name.
        plan: of this model.
        example_inputs: as for ``decompose``; with them cost is in MACs, else in parameters.
        calibration: as for ``decompose``.
        options: as for ``tradeoff``.

    Returns:
        Up to seven, from the cheapest on.

    Raises:
        SurgeryValueError: there is no such layer, or nothing can be done with it; the message says why.
    """
    if site not in plan:
        raise SurgeryValueError(f"explain: {site!r} is no layer of this model: {nearest(site, plan)}")
    draft, _ = _draft(model, example_inputs, calibration, options)
    mine = next((c for c in draft.candidates if site in c.site.aliases), None)
    if mine is None:
        raise SurgeryValueError(f"explain: nothing can be done with {site!r}: {getattr(draft[site], 'reason', draft[site])}")
    chosen = plan[site]
    costs = mine.costs
    same = [i for i, decision in enumerate(mine.decisions) if decision == chosen or (isinstance(decision, Keep) and isinstance(chosen, Keep))]
    place = same[0] if same else int(np.searchsorted(costs, draft.cost_of(mine.site, chosen)))
    around = range(max(0, place - BESIDE), min(len(costs), place + BESIDE + 1))
    found = [Alternative(mine.decisions[i], int(costs[i]), float(mine.errors[i]), i in same) for i in around]
    return tuple(found)


def _draft(model: nn.Module, example_inputs: Any, calibration: Any, options: dict[str, Any]) -> tuple[Draft, str]:
    usable_model(model)
    unit = "params" if example_inputs is None else "macs"
    with torch.inference_mode(False):
        return draft_of(model, _share_of(unit, 1.0), Options(**options), example_inputs, calibration)[0], unit


def _share_of(unit: str, share: float) -> Budget:
    return Budget(macs=share) if unit == "macs" else Budget(params=share)


def _row(candidates: Sequence[Candidates], chosen: dict[str, Decision], share: float, total: int) -> TradeoffRow:
    saved, lost, energy, cut = 0.0, 0.0, 0.0, 0
    for each in candidates:
        index = each.decisions.index(chosen[each.site.name])
        saved += each.before - float(each.costs[index])
        lost += float(each.losses[index])
        energy += each.energy
        cut += not isinstance(chosen[each.site.name], Keep)
    return TradeoffRow(share=share, used=1 - saved / total, error=(lost / energy) ** 0.5 if energy else 0.0, cut=cut)
