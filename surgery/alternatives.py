"""What a network's error is at every budget, and what else could be done with one of its layers: for looking before choosing."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields
from numbers import Real
from typing import Any

import numpy as np
import torch
from torch import nn

from passes.decompose import refusal_of
from passes.errors import SurgeryTypeError, SurgeryValueError, nearest
from passes.factorization import Decision, Factorization, Keep
from passes.kinds import kind_of
from passes.site import Site
from surgery.cost import macs_under, params_under
from surgery.draft import Draft
from surgery.files import replacing
from surgery.inspection import usable_model
from surgery.latency.families import Solved
from surgery.options import Options
from surgery.plan import Plan
from surgery.progress import tracked
from surgery.ranks.auto import error_at
from surgery.ranks.budget import RUNTIMES, Budget

__all__ = ["Alternative", "Tradeoff", "TradeoffRow", "explain", "tradeoff", "unit_of"]

SHARES = (0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1)
BESIDE = 3  # alternatives on either side
COUNTS: dict[str, Callable[[Site, Factorization], int]] = {"macs": macs_under, "params": params_under}


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
    """Budgets from large to small, down to the least that can be reached; ``unit`` is ``"macs"``, ``"params"`` or ``"latency:RUNTIME"``.

    ``layers`` are those that could be cut, over which errors are averaged; ``calibrated`` says that errors are weighted by what calibration saw.
    """

    unit: str
    rows: tuple[TradeoffRow, ...]
    layers: tuple[str, ...] = ()
    calibrated: bool = False

    @property
    def words(self) -> str:
        """The unit, for people."""
        return {"macs": "MACs", "params": "parameters"}.get(self.unit, self.unit.replace("latency:", "time in "))

    def to_data(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return {"unit": self.unit, "rows": [asdict(row) for row in self.rows]}

    def save_picture(self, path: Any) -> None:
        """Error against share, as a picture in the format that the file's ending names.

        Raises:
            MissingExtra: Matplotlib is not installed.
            SurgeryValueError: it knows no such format.
            OSError: the file cannot be written.
        """
        from surgery.plots import picture_file, tradeoff_figure

        file, figure = picture_file(path), tradeoff_figure(self)
        with replacing(file) as work:
            figure.savefig(work, dpi=130)


@dataclass(frozen=True, slots=True)
class Alternative:
    """Something that could be done with a layer: its cost in the unit asked for, its error, and whether it is what the plan does.

    Attributes:
        decision: a factorization, or ``Keep``.
        cost: of all calls of the layer in the unit asked for: MACs, parameters, or seconds.
        error: |W - W'|_F / |W|_F; with calibration in the metric that was learnt.
        chosen: whether the plan does this.
    """

    decision: Decision
    cost: int | float
    error: float
    chosen: bool


def tradeoff(
    model: nn.Module,
    *,
    example_inputs: Any = None,
    shares: Sequence[float] = SHARES,
    by: str | None = None,
    calibration: Any = None,
    **options: Any,
) -> Tradeoff:
    """The least error at each budget, of cuts before any training. The model is not touched.

    Args:
        model: any module.
        example_inputs: as for ``decompose``.
        shares: of the whole network; those below what can be reached are left out.
        by: ``"macs"``, ``"params"``, ``"latency"`` (in onnxruntime) or ``"latency:RUNTIME"``; MACs with example inputs, else parameters, where None.
            Shares of time are foretold by the measured times of layers and chains; plans themselves are raced.
        calibration: as for ``decompose``.
        options: ``method``, ``include``, ``exclude``, ``guard``, ``round_to``, ``device``, ``effective_weights`` as for ``decompose``.

    Returns:
        A row a share, from the largest on.

    Raises:
        SurgeryTypeError, SurgeryValueError: as for ``plan``.
    """
    if isinstance(shares, str) or not isinstance(shares, Sequence) or not shares:
        raise SurgeryTypeError(f"shares: expected a list of numbers in (0, 1], got {shares!r}")
    unit = unit_of(by, example_inputs)
    draft = _draft(model, unit, example_inputs, calibration, options)
    family = _family(draft, unit)
    asked = sorted((_checked(share) for share in shares), reverse=True)
    rows = tuple(_row(family, share) for share in itertools.takewhile(lambda share: family.floor <= share, tracked(asked, "budget", name=str)))
    return Tradeoff(unit, rows, tuple(each.site.name for each in draft.candidates), calibration is not None)


def explain(
    model: nn.Module,
    site: str,
    plan: Plan,
    *,
    example_inputs: Any = None,
    by: str | None = None,
    calibration: Any = None,
    **options: Any,
) -> tuple[Alternative, ...]:
    """What a plan does with one layer, among its nearest alternatives by cost, each better in cost or error than all others that were possible.

    Args:
        model: any module; it is not touched.
        site: the layer's name.
        plan: of this model.
        example_inputs: as for ``decompose``.
        by: what cost counts, as for ``tradeoff``.
        calibration: as for ``decompose``.
        options: as for ``tradeoff``.

    Returns:
        Up to seven, from the cheapest on; and what the plan does, where it is none of them (a rule may choose what others beat) and is counted,
        not timed.

    Raises:
        SurgeryValueError: there is no such layer, or nothing can be done with it; the message says why.
        MissingExtra: the runtime is not installed.
    """
    if not isinstance(plan, Plan) or not isinstance(site, str):
        raise SurgeryTypeError(f"explain: expected the name of a layer and a plan, got {type(site).__name__} and {type(plan).__name__}")
    if site not in plan:
        raise SurgeryValueError(f"explain: {site!r} is no layer of this model: {nearest(site, plan)}")
    unit = unit_of(by, example_inputs)
    draft = _draft(model, unit, example_inputs, calibration, options)
    known = [alias for each in draft.all_sites for alias in each.aliases]
    if site not in known:
        raise SurgeryValueError(f"explain: {site!r} is no layer of this model, but of the plan's: {nearest(site, known)}")
    if not any(site in each.site.aliases for each in draft.candidates):
        decision = draft[next(each.name for each in draft.all_sites if site in each.aliases)]
        raise SurgeryValueError(f"explain: nothing can be done with {site!r}: {getattr(decision, 'reason', decision)}")
    mine = next(each for each in _family(draft, unit).candidates if site in each.site.aliases)
    chosen = plan[site]
    if isinstance(chosen, Factorization) and (refusal := refusal_of(mine.site, chosen)) is not None:
        raise SurgeryValueError(f"explain: {site!r} cannot be cut as the plan says: {refusal}; is it a plan of this model?")
    same = [i for i, decision in enumerate(mine.decisions) if decision == chosen or (isinstance(decision, Keep) and isinstance(chosen, Keep))]
    sizes = np.array([draft.cost_of(mine.site, decision) for decision in mine.decisions])
    place = same[0] if same else int(np.abs(sizes - draft.cost_of(mine.site, chosen)).argmin())
    around = range(max(0, place - BESIDE), min(len(sizes), place + BESIDE + 1))
    whole = int if unit in COUNTS else float
    near = [Alternative(mine.decisions[i], whole(mine.costs[i]), float(mine.errors[i]), i in same) for i in around]
    if not same and isinstance(chosen, Factorization) and unit in COUNTS and kind_of(chosen).has_spectra:
        near.append(Alternative(chosen, COUNTS[unit](mine.site, chosen), error_at(mine.site, chosen, draft.spectra), True))
        near.sort(key=lambda each: each.cost)
    return tuple(near)


def unit_of(by: str | None, example_inputs: Any) -> str:
    """What is counted."""
    if by is None:
        return "params" if example_inputs is None else "macs"
    unit = f"latency:{RUNTIMES[0]}" if by == "latency" else by
    known = ["macs", "params", *(f"latency:{runtime}" for runtime in RUNTIMES)]
    if unit not in known:
        raise SurgeryValueError(f"by: {by!r} is none of {known}; {nearest(str(by), known)}")
    if example_inputs is None and unit != "params":
        raise SurgeryValueError(f"by: {by!r} needs example_inputs: without them nothing can be counted or timed but parameters")
    return unit


def _draft(model: nn.Module, unit: str, example_inputs: Any, calibration: Any, options: dict[str, Any]) -> Draft:
    usable_model(model)
    with torch.inference_mode(False):
        budget = Budget(params=1.0) if unit == "params" else Budget(macs=1.0)
        return Draft.of(model, budget, _options(options), example_inputs, calibration)


def _options(given: dict[str, Any]) -> Options:
    known = [field.name for field in fields(Options)]
    for name in given:
        if name not in known:
            raise SurgeryTypeError(f"there is no argument {name!r}; beside its own there are {', '.join(known)}")
    return Options(**given)


def _family(draft: Draft, unit: str) -> Solved:
    """All plans, by cost in a unit."""
    if unit.startswith("latency:"):
        with torch.inference_mode(False):
            return draft.choices_by_time(unit.partition(":")[2])
    return Solved(unit, "mean", draft.candidates, float(getattr(draft.totals, unit)))


def _checked(share: Any) -> float:
    if not isinstance(share, Real) or isinstance(share, bool) or not 0 < float(share) <= 1:
        raise SurgeryValueError(f"shares: each must be a share of the network in (0, 1], got {share!r}")
    return float(share)


def _row(family: Solved, share: float) -> TradeoffRow:
    found = family.at_share(share)
    energy = sum(each.energy for each in family.candidates)
    return TradeoffRow(share=share, used=found.share, error=(found.loss / energy) ** 0.5 if energy else 0.0, cut=len(found.cuts))
