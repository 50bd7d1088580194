"""The network that a decomposed one was made from: whether it is that one, and what else could have been done with it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import nn

from passes import host_for
from passes.errors import SurgeryValueError
from passes.kinds import kind_named
from surgery.alternatives import Tradeoff, tradeoff
from surgery.inspection import usable_model
from surgery.tables import USUAL

if TYPE_CHECKING:
    from surgery.report import Report

__all__ = ["is_original", "tradeoff_before"]

SAME = 1e-3  # how far, of itself, an error may be from the recorded one: factors are rounded to the network's dtype


def tradeoff_before(before: nn.Module, after: nn.Module, report: Report, example_inputs: Any) -> Tradeoff:
    """The trade-off of the original network, with the kinds that were used in the cut.

    Raises:
        SurgeryValueError: ``before`` does not have the layers that ``after`` had.
    """
    usable_model(before)
    difference = _other_layers(before, after)
    if difference is not None:
        raise SurgeryValueError(f"before: it is not the network that this one was made from: {difference}")
    kinds = {row.kind for row in report.layers if row.kind is not None and row.kind not in USUAL}
    method = (
        "tucker" if not kinds else "auto" if len(kinds) > 1 or not all(kind_named(kind).has_spectra for kind in kinds) else str(next(iter(kinds)))
    )
    return tradeoff(before, example_inputs=example_inputs, method=method)


def is_original(before: nn.Module, after: nn.Module, report: Report) -> bool:
    """Whether ``before`` is, in its numbers too, what ``after`` was cut from, and nothing was trained since: errors are then those recorded."""
    if _other_layers(before, after) is not None:
        return False
    originals = {site.name: site for site in host_for(before).sites()}
    for site in host_for(after).sites():
        try:
            was, now, error = originals[site.name].weight.double(), site.weight.double(), report[site.name].error
        except AttributeError:  # a kept layer that has no weight
            continue
        gap, norm = float((was - now).norm()), float(was.norm())
        if not abs(gap / norm - (error or 0.0) if norm else gap) <= SAME * (error or SAME):
            return False
    return True


def _other_layers(before: nn.Module, after: nn.Module) -> str | None:
    originals = {site.name: site.geometry for site in host_for(before).sites()}
    mine = {site.name: site.geometry for site in host_for(after).sites()}
    for name in (*mine, *originals):
        if originals.get(name) != mine.get(name):
            return f"at {name or 'the model itself'} it has {originals.get(name) or 'no layer'}, this one had {mine.get(name) or 'none'}"
    return None
