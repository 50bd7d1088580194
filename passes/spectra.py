"""Spectra of a model's layers: each computed once, shared by whoever needs it, and let go when its layer is done."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from math import isfinite
from typing import Any

import torch
from torch import Tensor

from passes.blockwise import Blockwise
from passes.errors import SurgeryValueError
from passes.factorization import Factorization
from passes.geometry import Piece
from passes.linalg import Spectrum, spectra
from passes.metric import Metric, unweighted, weighted
from passes.outline import Outline, outline_of
from passes.site import Site

__all__ = ["Spectra", "usable_weight"]

SMALLEST, LARGEST = 1e-120, 1e120


class Spectra:
    """A store of spectra, one for each unfolding that a kind looks at, in float64.

    Args:
        wanted: sites whose spectra will be asked for, in that order, and the kinds; others may be asked for as well. On a GPU those of one shape
            are computed together, as many as hold no more numbers than the largest of them all. (On a CPU one after the other: there a stack of
            matrices is not decomposed any faster than its matrices, and each alone already keeps all cores busy.)
        device: where to compute; each weight's own by default.
        together: compute same-shaped sites together on any device, or on none.
        metrics: by site name, what matters in its weight; spectra, errors and factors are then those of the weighted weight.
    """

    def __init__(
        self,
        wanted: Iterable[tuple[Site, Blockwise]] = (),
        device: torch.device | str | None = None,
        *,
        together: bool | None = None,
        metrics: Mapping[str, Metric] | None = None,
    ) -> None:
        self._device, self._together = device, together
        self.metrics: Mapping[str, Metric] = metrics or {}
        self._found: dict[tuple[str, str], tuple[Spectrum, ...]] = {}
        self._weighted: dict[tuple[str, str], Tensor] = {}
        self._surfaces: dict[tuple[str, str], Tensor] = {}
        self._waiting: dict[tuple[object, ...], dict[str, tuple[Site, Blockwise]]] = {}
        self._room = 0
        for site, kind in wanted:
            self._waiting.setdefault(_group(site, kind), {})[site.name] = (site, kind)
            self._room = max(self._room, site.geometry.weights)

    def of(self, site: Site, kind: Blockwise) -> tuple[Spectrum, ...]:
        """The spectra of a site's weight, one for each unfolding of the kind.

        Raises:
            SurgeryValueError: the weight has values that are not finite, or has none (meta device).
        """
        key = (site.name, kind.name)
        if key not in self._found:
            self._compute(self._companions(site, kind), kind)
        return self._found[key]

    def weight(self, site: Site, kind: Blockwise) -> Tensor:
        """The site's weight in float64, weighted by its metric if it has one."""
        weight, metric = usable_weight(site, self._device), self.metrics.get(site.name)
        if metric is None:
            return weight
        key = (site.name, kind.name)
        if key not in self._weighted:
            self._weighted[key] = weighted(weight, site.geometry, metric, kind)
        return self._weighted[key]

    def split(self, site: Site, kind: Blockwise, factorization: Factorization) -> tuple[Piece, ...]:
        """The chain that stands for the site's weight; with a metric the one that loses least in it."""
        pieces = kind.split(self.weight(site, kind), site.bias, site.geometry, factorization, self.of(site, kind))
        metric = self.metrics.get(site.name)
        return pieces if metric is None else unweighted(pieces, site.geometry, metric, kind)

    def error_surface(self, site: Site, kind: Blockwise) -> Tensor:
        """The kind's error surface of the site's weight, in its metric if it has one."""
        key = (site.name, kind.name)
        if key not in self._surfaces:
            self._surfaces[key] = kind.error_surface(self.weight(site, kind), site.geometry, self.of(site, kind))
        return self._surfaces[key]

    def outlines(self, site: Site, kind: Blockwise | None = None) -> tuple[Outline, ...]:
        """What is known now of the site's spectra, in outline, one a mode: those of the kind, or of the first kind that was asked for."""
        found = next((known for (name, of), known in self._found.items() if name == site.name and (kind is None or kind.name == of)), ())
        return tuple(outline_of(each, weighted=site.name in self.metrics) for each in found)

    def let_go(self, site: Site) -> None:
        """Forget what is known of a site."""
        stores: tuple[dict[tuple[str, str], Any], ...] = (self._found, self._weighted, self._surfaces)
        for known in stores:
            for key in [key for key in known if key[0] == site.name]:
                del known[key]

    def _companions(self, site: Site, kind: Blockwise) -> list[Site]:
        """The site, and those waiting sites that are computed together with it."""
        waiting = self._waiting.get(_group(site, kind), {})
        waiting.pop(site.name, None)
        device = torch.device(self._device) if self._device is not None else site.device
        together = self._together if self._together is not None else device.type != "cpu"
        more = max(self._room // max(site.geometry.weights, 1) - 1, 0) if together else 0
        names = list(waiting)[:more]
        return [site, *(waiting.pop(name)[0] for name in names)]

    def _compute(self, sites: list[Site], kind: Blockwise) -> None:
        unfoldings = [kind.unfoldings(self.weight(site, kind), site.geometry) for site in sites]
        found: list[list[Spectrum]] = [[] for _ in sites]
        for mode, stacks in zip(kind.modes if kind.has_spectra else (), zip(*unfoldings, strict=True), strict=True):
            together = spectra(stacks[0] if len(stacks) == 1 else torch.cat(stacks), mode)
            blocks = len(together) // len(sites)
            for number, (site, mine) in enumerate(zip(sites, found, strict=True)):
                mine.append(kind.spectrum(together[number * blocks : (number + 1) * blocks], site.geometry))
        for site, mine in zip(sites, found, strict=True):
            self._found[site.name, kind.name] = tuple(mine)


def usable_weight(site: Site, device: torch.device | str | None = None) -> Tensor:
    """The site's weight in float64 on a device (its own by default).

    Raises:
        SurgeryValueError: it has values that are not finite or are extreme beyond use, or has none (meta device).
    """
    weight = site.weight
    if weight.is_meta:
        raise SurgeryValueError(f"{site}: its weight is on the meta device and has no numbers; load weights first")
    least, most = (float(bound) for bound in weight.aminmax())
    size = max(abs(least), abs(most))
    if not (isfinite(least) and isfinite(most)):
        count = int((~torch.isfinite(weight)).sum())
        raise SurgeryValueError(f"{site}: {count} of {weight.numel()} weights are not finite; repair or exclude this layer")
    if size > 0 and not SMALLEST < size < LARGEST:
        raise SurgeryValueError(f"{site}: its weights are of size {size:.0e}, whose squares float64 cannot hold; rescale or exclude this layer")
    if torch.device(device or weight.device).type == "mps":
        raise SurgeryValueError(f"{site}: surgery computes in float64, which mps has not; do it on the CPU (model.cpu()) and move the result")
    return weight.to(device=device, dtype=torch.float64)


def _group(site: Site, kind: Blockwise) -> tuple[object, ...]:
    return kind.name, site.geometry.weight_shape, site.geometry.transposed, site.geometry.groups, site.device
