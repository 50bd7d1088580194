"""When the layers' stable ranks have settled: the time to cut, found while training (Wang et al. 2023, "Cuttlefish", section 4.1 and algorithm 1)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import inf
from numbers import Integral, Real
from typing import Any

from torch import nn

from passes.errors import SurgeryTypeError, SurgeryValueError
from passes.factorization import Keep
from passes.kinds import kind_named
from passes.linalg import Spectrum
from passes.site import Site
from surgery.decompose import plan
from surgery.options import AUTO

__all__ = ["Settled", "stable_ranks"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Settled:
    """Cut when the stable ranks |W|_F^2 / s_1^2 of the layers have stopped to change.

    Looked at on each call of ``schedule.step``. Settled means: ``patience`` looks in a row, the mean over all layers and modes of the relative change
    of the stable rank since the look before was at most ``tolerance``. (Cuttlefish asks it of every layer; of the mean, no single noisy layer
    holds the others up.)

    Attributes:
        tolerance: largest mean relative change from look to look.
        patience: looks in a row.
        earliest: position (epoch, or step) before which nothing is cut.
        latest: position at which it is cut in any case; None for never.
        every: positions between two looks.
    """

    tolerance: float = 0.02
    patience: int = 2
    earliest: int = 1
    latest: int | None = None
    every: int = 1

    def __post_init__(self) -> None:
        if not isinstance(self.tolerance, Real) or isinstance(self.tolerance, bool) or not self.tolerance > 0:
            raise SurgeryValueError(f"Settled: tolerance must be a positive number, got {self.tolerance!r}")
        for name, least in (("patience", 1), ("earliest", 0), ("latest", 0), ("every", 1)):
            value = getattr(self, name)
            if value is None and name == "latest":
                continue
            if not isinstance(value, Integral) or isinstance(value, bool):
                raise SurgeryTypeError(f"Settled: {name} must be an int, got {value!r}")
            if value < least:
                raise SurgeryValueError(f"Settled: {name} must be at least {least}, got {value}")
        if self.latest is not None and self.latest < self.earliest:
            raise SurgeryValueError(f"Settled: latest ({self.latest}) is before earliest ({self.earliest})")

    def changes(self, history: Sequence[Mapping[str, Sequence[float]]]) -> list[float]:
        """The mean relative change from each look of ``history`` (stable ranks by layer name) to the next."""
        found = []
        for before, after in pairwise(history):
            pairs = [(a, b) for name in after if name in before for a, b in zip(before[name], after[name], strict=True)]
            found.append(sum(abs(b - a) / max(a, 1.0) for a, b in pairs) / len(pairs) if pairs else inf)
        return found

    def has(self, position: int, history: Sequence[Mapping[str, Sequence[float]]]) -> bool:
        """Whether it is time, at this position, after the looks of ``history``."""
        if position < self.earliest:
            return False
        if self.latest is not None and position >= self.latest:
            return True
        last = self.changes(history[-self.patience - 1 :])
        return len(last) == self.patience and max(last) <= self.tolerance


def stable_ranks(model: nn.Module, request: Any = "evbmf", **options: Any) -> dict[str, list[float]]:
    """|W|_F^2 / s_1^2 of each mode of each layer that is going to be decided about, by name.

    Args:
        model: not touched.
        request: the ranks that are going to be asked for: with a dict or a plan its layers are looked at, otherwise those that a rule is asked about.
        options: ``method``, ``include``, ``exclude``, ``device`` and ``effective_weights``, as for ``surgery.plan``.

    Raises:
        SurgeryValueError: there is no such layer.
    """
    found: dict[str, list[float]] = {}

    def look(site: Site, spectra: Sequence[Spectrum]) -> Keep:
        tops = [float(s.values[0]) ** 2 for s in spectra]
        found[site.name] = [float(s.values.square().sum()) / top if top > 0 else 0.0 for s, top in zip(spectra, tops, strict=True)]
        return Keep("looked at")

    kept = (type(None), Keep)
    named = {name: d if isinstance(d, kept) else look for name, d in request.items()} if isinstance(request, Mapping) else look
    method = options.pop("method", AUTO)
    if method != AUTO and not kind_named(method).has_spectra:
        method = "tucker"  # its layers have stable ranks all the same
    plan(model, named, guard="none", method=method, **options)
    if not found:
        raise SurgeryValueError(
            "decompose_at: Settled(...) finds no layer to look at; name layers in ranks, see include and exclude, or give a position instead"
        )
    return found
