"""The time of every chain of a layer, from a few that are measured.

What a chain saves is the difference of two measured times, and of many chains those look best whose times came out too short. So a chain counts only
where its saving is beyond the noise of both times, and its saving is taken to be less by one standard error of the difference.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from math import hypot, lcm
from typing import Any

import numpy as np

from passes.blockwise import Blockwise
from passes.factorization import Factorization
from passes.kind import Rank
from passes.kinds import kind_of
from passes.site import Site
from surgery.cost.profile import Entry, TimedShape, together
from surgery.latency.times import Times, timed_chain, timed_layer

__all__ = ["MARGIN", "Table", "interpolated"]

MARGIN = 0.02  # by which a chain must be faster than its layer, however little the spread of both
BEYOND = 2.0  # standard errors of a saving from which on it is taken to be one
POINTS = {1: 8, 2: 6}  # ranks timed in each mode, by the number of modes that are cut
STEPS = ((128, 16), (48, 8), (24, 4))  # full rank from which ranks are multiples of this: kernels work in blocks of channels

Numbers = Any  # a float64 numpy array


class Table:
    """Times of all chains of a site: measured at a few ranks of each kind, piecewise linear in between.

    Args:
        site: with its calls.
        kinds: to be timed.
        times: where times come from.
        round_to: ranks are multiples of this.
    """

    def __init__(self, site: Site, kinds: Sequence[Blockwise], times: Times, round_to: int) -> None:
        self._site, self._times, self._runtime = site, times, times.setup.runtime
        fitting = [kind for kind in kinds if kind.has_spectra and kind.refuses(site.geometry) is None]
        full = max((min(kind.full_ranks(site.geometry)) for kind in fitting), default=1)
        self.step = lcm(round_to, next((step for least, step in STEPS if full >= least), 1))
        self._layer = timed_layer(site, self._runtime)
        self._points: dict[tuple[str, tuple[bool, ...]], Points] = {}
        for kind in fitting if self._layer else ():
            for whole in itertools.product((False, True), repeat=len(kind.modes)):
                if not all(whole):
                    self._points[kind.name, whole] = self._points_of(kind, whole)

    @property
    def shapes(self) -> list[TimedShape]:
        """All that is to be timed, the layer first."""
        return [*self._layer, *(shape for points in self._points.values() for shapes in points.shapes.values() for shape in shapes)]

    @property
    def lacking(self) -> list[TimedShape]:
        """Shapes without which ranks would not be bracketed by measured ones."""
        missing = [shape for shape in self._layer if shape not in self._times]
        for points in self._points.values():
            if any(not all(shape in self._times for shape in points.shapes[corner]) for corner in points.corners):
                missing += [shape for shapes in points.shapes.values() for shape in shapes if shape not in self._times]
        return missing

    def layer(self, factorization: Factorization | None) -> float:
        """Seconds of the layer as it is, over all its calls."""
        return self._together(self._layer).seconds

    def around(self, factorization: Factorization) -> list[TimedShape]:
        """What a chain's time is taken from: its layer, and the measured chains of the nearest ranks on both sides."""
        points = self._points[factorization.kind, tuple(rank is None for rank in factorization.ranks)]
        near = [_beside(axis, rank or 0) for axis, rank in zip(points.axes, factorization.ranks, strict=True)]
        return [*self._layer, *(shape for place in itertools.product(*near) for shape in points.shapes.get(place, ()))]

    def __call__(self, kind: Blockwise, ranks: Sequence[Sequence[Rank]]) -> Numbers:
        """Seconds at every choice of these ranks, savings discounted by their noise; infinite where they are not beyond it."""
        points = self._points.get((kind.name, tuple(rank[0] is None for rank in ranks)))
        size = [len(rank) for rank in ranks]
        if points is None:
            return np.full(size, np.inf)
        layer = self._together(self._layer)
        known, noise = (np.full([len(axis) for axis in points.axes], np.nan) for _ in range(2))
        for index, shapes in points.shapes.items():
            if all(shape in self._times for shape in shapes):
                entry = self._together(shapes)
                known[index], noise[index] = entry.seconds, hypot(entry.seconds * entry.spread, layer.seconds * layer.spread)
        if np.isnan(known).all():
            return np.full(size, np.inf)
        wanted = [[0.0] if rank[0] is None else [float(r) for r in rank if r is not None] for rank in ranks]
        seconds = interpolated(points.axes, _filled(known, points.macs), wanted)
        doubt = interpolated(points.axes, _filled(noise, np.ones_like(noise)), wanted)
        faster = layer.seconds - seconds > np.maximum(BEYOND * doubt, MARGIN * layer.seconds)
        return np.where(faster, seconds + doubt, np.inf)

    def saving(self, factorization: Factorization) -> float:
        """Seconds that a chain saves, minus infinity where it is not faster beyond noise."""
        return self.layer(None) - float(self(kind_of(factorization), [[rank] for rank in factorization.ranks]).min())

    def pays(self, kind: Blockwise, ranks: Sequence[Sequence[Rank]]) -> Numbers:
        """Which choices of these ranks are faster than the layer beyond noise."""
        return np.isfinite(self(kind, ranks))

    def _together(self, shapes: Sequence[TimedShape]) -> Entry:
        return together(self._times[shape] for shape in shapes)

    def _points_of(self, kind: Blockwise, whole: Sequence[bool]) -> Points:
        geometry, site = self._site.geometry, self._site
        step = lcm(self.step, kind.unit(geometry))
        points = POINTS[min(whole.count(False), max(POINTS))]
        axes = [[0.0] if w else _spread_out(range(step, most, step), points) for w, most in zip(whole, kind.full_ranks(geometry), strict=True)]
        macs = np.full([len(axis) for axis in axes], np.inf)
        shapes: dict[tuple[int, ...], list[TimedShape]] = {}
        most = sum(shape.macs for shape in self._layer)
        for index in np.ndindex(*macs.shape):
            ranks = [None if w else int(axis[i]) for w, axis, i in zip(whole, axes, index, strict=True)]
            factorization = kind.from_ranks(geometry, ranks)
            timed = timed_chain(site, factorization, self._runtime)
            macs[index] = sum(shape.macs for shape in timed)
            if factorization.ranks == tuple(ranks) and macs[index] < most:
                shapes[index] = timed
        return Points(axes, macs, shapes)


@dataclass(frozen=True, slots=True, eq=False)
class Points:
    """Where a kind is timed: coordinates in each mode (one, 0, in an uncut one), MACs everywhere, shapes where they are fewer than the layer's."""

    axes: Sequence[Sequence[float]]
    macs: Numbers
    shapes: dict[tuple[int, ...], list[TimedShape]]

    @property
    def corners(self) -> list[tuple[int, ...]]:
        """Of all that is timed, what is least or most in some mode with the others at their least."""
        if not self.shapes:
            return []
        least = tuple(min(index[axis] for index in self.shapes) for axis in range(len(self.axes)))
        ends = [least] if least in self.shapes else []
        for axis in range(len(self.axes)):
            line = [i for i in self.shapes if all(i[a] == least[a] for a in range(len(self.axes)) if a != axis)]
            ends += [max(line)] if line else []
        return ends


def interpolated(axes: Sequence[Sequence[float]], values: Numbers, wanted: Sequence[Sequence[float]]) -> Numbers:
    """Piecewise linear in each coordinate in turn; beyond the ends as at the ends."""
    for axis, (known, new) in enumerate(zip(axes, wanted, strict=True)):
        lines = np.moveaxis(values, axis, -1)
        found = np.array([np.interp(new, known, line) for line in lines.reshape(-1, len(known))])
        values = np.moveaxis(found.reshape(*lines.shape[:-1], len(new)), -1, axis)
    return values


def _filled(values: Numbers, macs: Numbers) -> Numbers:
    """Where nothing is known (NaN), the value a MAC of the nearest point that is known, times the MACs."""
    known = np.argwhere(~np.isnan(values))
    filled = values.copy()
    for index in np.argwhere(np.isnan(values)):
        nearest = tuple(known[np.abs(known - index).sum(1).argmin()])
        filled[tuple(index)] = values[nearest] * macs[tuple(index)] / macs[nearest]
    return filled


def _spread_out(ranks: range, most: int) -> list[float]:
    """A few of the ranks, closer where they are small: there a step changes more."""
    if len(ranks) <= most:
        return [float(rank) for rank in ranks] or [float(ranks.start)]
    places = np.unique(np.rint(np.geomspace(1, len(ranks), most)).astype(int)) - 1
    return [float(ranks[int(place)]) for place in places]


def _beside(axis: Sequence[float], at: float) -> list[int]:
    """Places of the known ranks on both sides of one."""
    place = int(np.searchsorted(axis, at))
    return sorted({max(place - 1, 0), min(place, len(axis) - 1)})
