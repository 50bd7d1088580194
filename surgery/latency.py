"""Latency in plans: candidate chains are timed, the ranks of all layers chosen by those times, the whole network timed, and the plan corrected.

What a cut saves is the difference of two times measured side by side, its layer's and its chain's; what both pay in isolation (entering and leaving
the runtime's memory layout) cancels. The network's time is foretold as its own measured time less what all cuts save.
"""

from __future__ import annotations

import itertools
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field, replace
from math import lcm, sqrt
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from torch import nn

from passes import host_for, observe
from passes.blockwise import Blockwise
from passes.chain import Chain
from passes.errors import SurgeryError, SurgeryValueError
from passes.factorization import Decision, Factorization, Keep
from passes.kind import Rank
from passes.kinds import kind_of
from passes.parity import tensors_in
from passes.running import arguments, kept_random_states, private_copy
from passes.site import Call, Site
from passes.spectra import Spectra
from surgery.cost import threads_set
from surgery.cost.outcome import LatencyOutcome
from surgery.cost.profile import Entry, Profile, TimedShape, cache_file, write_shapes
from surgery.cost.timing import COARSE, Conditions, describe, in_terms_of_layers, need, time_shapes
from surgery.ranks.budget import Budget
from surgery.ranks.candidates import Candidates, Cost, candidates_of
from surgery.ranks.knapsack import least_loss, least_worst

__all__ = ["LatencyOutcome", "Stopwatch", "interpolated", "profile_of", "with_noise"]

REPLANS = 3
NEAR = 0.03  # of the share asked for: closer than this nothing is corrected
FAR = 0.10  # of the share asked for: what is slower than this has missed it
MARGIN = 0.02  # by which a chain must be faster than its layer, beside the spread of both
POINTS = {False: 8, True: 3}  # ranks timed in each mode; True in runtimes where each takes long
STEPS = ((128, 16), (48, 8), (24, 4))  # full rank from which ranks are multiples of this: kernels work in blocks of channels
RACE_SECONDS = 6.0
PAIRS = (9, 101)
WORDS = {"train": "a training step"}

Numbers = Any  # a float64 numpy array


@dataclass(slots=True)
class _Times:
    """Times of shapes, from a profile; what it lacks is measured, or an error where it is another device's."""

    conditions: Conditions
    profile: Profile
    file: Path
    foreign: bool

    @classmethod
    def of(cls, conditions: Conditions, path: str | os.PathLike[str] | None) -> _Times:
        need_here = describe(conditions)
        if path is None:
            file = cache_file(need_here)
            try:
                profile = Profile.load(file)
            except (SurgeryError, OSError):  # absent, or damaged: measured anew
                profile = Profile(need_here)
            if profile.device != need_here:
                profile = Profile(need_here)
            return cls(conditions, profile, file, False)
        file = Path(path)
        profile = Profile.load(file)
        return cls(conditions, profile, file, profile.device != need_here)

    def __getitem__(self, shape: TimedShape) -> Entry:
        return self.profile.entries[shape.key]

    def __contains__(self, shape: TimedShape) -> bool:
        return shape.key in self.profile.entries

    def measure(self, shapes: Sequence[TimedShape]) -> None:
        """Time what is not there yet, and keep it."""
        missing = [shape for shape in dict.fromkeys(shapes) if shape not in self]
        if not missing or self.foreign:
            return
        found, reference = time_shapes(missing, self.conditions)
        with suppress(SurgeryError, OSError):  # what another process has found meanwhile stays
            self.profile = Profile.load(self.file)
        self.profile.add(found, reference)
        with suppress(OSError):  # a cache that cannot be written costs time only
            self.file.parent.mkdir(parents=True, exist_ok=True)
            self.profile.save(self.file)

    def lacks(self, shapes: Sequence[TimedShape]) -> SurgeryValueError:
        """The error that names what another device has to time, in a file."""
        file = self.file.with_suffix(".missing.json")
        missing = [shape for shape in dict.fromkeys(shapes) if shape not in self]
        try:
            write_shapes(missing, file)
            told = f"they are listed in {file}: run `surgery profile {file} --out {self.file}` on that device"
        except OSError as error:
            told = f"their list could not be written to {file} ({error}); give a profile in a folder that can be written"
        return SurgeryValueError(f"ranks: the profile {self.file} lacks {len(missing)} shapes, the first is {missing[0].key!r}; {told}")


def profile_of(shapes: Sequence[TimedShape], path: Path, runtime: str, threads: int | None = None) -> Profile:
    """Time a list of shapes on this machine and add them to the profile at ``path``, or make it.

    Raises:
        SurgeryValueError: the file is of another device, or none.
        MissingExtra: the runtime is not installed.
    """
    conditions = Conditions(runtime=runtime, threads=threads or torch.get_num_threads())
    need(runtime)
    if not path.exists():
        Profile(describe(conditions)).save(path)
    times = _Times.of(conditions, str(path))
    if times.foreign:
        raise SurgeryValueError(f"{path}: it is a profile of {times.profile.device}, this is {describe(conditions)}; give another file")
    times.measure(shapes)
    return times.profile


@dataclass(slots=True)
class Stopwatch:
    """Times the layers, chains and cut networks of one model on one set of example inputs. Nothing is run before something is asked.

    Attributes:
        model: never changed.
        example_inputs: None where there are none; then nothing can be timed.
        outcome: of the last latency budget.
    """

    model: nn.Module
    example_inputs: Any
    outcome: LatencyOutcome | None = None
    _guarding: dict[str, _Times] = field(default_factory=dict, repr=False)

    def pays(self, site: Site, factorization: Factorization, runtime: str = "eager") -> Keep | None:
        """Why a chain is not worth having (``guard="latency"``, ``"step"``): it was not measured faster than its layer, beyond noise."""
        old, new = self.times(site, factorization, runtime)
        if new.high < old.low and new.seconds < (1 - MARGIN) * old.seconds:
            return None
        ranks = ", ".join("full" if r is None else str(r) for r in factorization.ranks)
        noise = ", which is within the noise" if new.seconds < (1 - MARGIN) * old.seconds else ""
        where = WORDS.get(runtime, runtime)
        return Keep(f"ranks ({ranks}): measured {1e3 * new.seconds:.3g} ms instead of {1e3 * old.seconds:.3g} ms in {where}{noise}")

    def times(self, site: Site, factorization: Factorization, runtime: str) -> tuple[Entry, Entry]:
        """What a layer takes over all its calls, and what its chain would take."""
        if runtime not in self._guarding:
            conditions = Conditions(runtime=runtime, threads=torch.get_num_threads(), device=_device_of(self.example_inputs))
            self._guarding[runtime] = _Times.of(conditions, None)
        times = self._guarding[runtime]
        before, after = _timed_layer(site, runtime), _timed_chain(site, factorization, runtime)
        times.measure([*before, *after])
        return _sum(times, before), _sum(times, after)

    def decide(
        self,
        budget: Budget,
        free: Sequence[Site],
        kinds: Callable[[Site], Sequence[Blockwise]],
        spectra: Spectra,
        guards: Callable[[Site], Sequence[Cost]],
        round_to: int,
    ) -> dict[str, Decision]:
        """One decision for each free site, so that the network takes the share of time that the budget says.

        Raises:
            SurgeryValueError: no example inputs; another device's profile lacks shapes; or the share is out of reach, with the least that is not.
            MissingExtra: the runtime is not installed.
        """
        share, runtime = float(budget.latency or 0.0), budget.runtime or "onnxruntime"
        if self.example_inputs is None:
            raise SurgeryValueError(f"ranks: {budget} needs example_inputs: without them there is nothing to time")
        threads = budget.threads or torch.get_num_threads()
        need(runtime)
        inputs, calls = self._batched(budget.batch)
        free = [site if calls is None else replace(site, calls=calls.get(site.name)) for site in free]
        times = _Times.of(Conditions(runtime=runtime, threads=threads, device=_device_of(inputs)), budget.profile)
        tables = {site.name: _Table(site, kinds(site), times, round_to) for site in free}
        times.measure([shape for table in tables.values() for shape in table.shapes])
        if times.foreign and (lacking := [shape for table in tables.values() for shape in table.lacking]):
            raise times.lacks(lacking)
        slow = Keep(f"measured: no faster than the layer itself in {runtime}")
        better = Keep("the budget is better spent on other layers")
        candidates = []
        for site in free:
            table = tables[site.name]
            found = candidates_of(site, kinds(site), spectra, cost=table.layer, table=table, guards=guards(site), round_to=table.step, keep=better)
            candidates.append(found if len(found.decisions) > 1 else replace(found, decisions=(slow,)))
            spectra.let_go(site)
        told = _Told(
            runtime=describe(times.conditions)["runtime"] if not times.foreign else times.profile.device.get("runtime", "an unnamed runtime"),
            asked=share,
            batch=next((t.shape[0] for t in tensors_in(inputs) if t.ndim), 1),
            threads=threads,
        )
        if all(len(c.decisions) == 1 for c in candidates):
            self.outcome = told.nothing("no chain was measured faster than its layer")
            return {c.site.name: slow for c in candidates}
        if times.foreign:
            return self._by_profile_alone(budget, candidates, told, times)
        with threads_set(threads), kept_random_states(), torch.no_grad(), _race(self.model, inputs, runtime) as race:
            return self._by_racing(budget, candidates, told, times, race)

    def _batched(self, batch: int | None) -> tuple[Any, dict[str, tuple[Call, ...]] | None]:
        """Inputs of this batch size, and the layers' calls then; None where they stay those that are known."""
        first = next((t for t in tensors_in(self.example_inputs) if t.ndim), None)
        if batch is None or first is None or first.shape[0] == batch:
            return self.example_inputs, None
        from surgery.export.common import fresh_inputs

        inputs = fresh_inputs(self.example_inputs, torch.Generator().manual_seed(0), batch)
        calls: dict[str, tuple[Call, ...]] = {}
        for site in host_for(self.model, observed=observe(self.model, inputs), effective_weights=True).sites():
            name = site.tied_to or site.name
            calls[name] = (*calls.get(name, ()), *(site.calls or ()))
        return inputs, calls

    def _by_profile_alone(self, budget: Budget, candidates: Sequence[Candidates], told: _Told, times: _Times) -> dict[str, Decision]:
        """Where the network cannot be run, its time is that of its layers."""
        total = 0.0
        for site in host_for(self.model, observed=observe(self.model, self._batched(budget.batch)[0]), effective_weights=True).sites():
            layers = _timed_layer(site, times.conditions.runtime) if site.chain is None else []
            if any(layer not in times for layer in layers) and any(c.site.name == site.name for c in candidates):
                raise times.lacks(layers)
            total += sum(times[layer].seconds for layer in layers if layer in times)
        least = _predicted(candidates, [int(c.costs.argmin()) for c in candidates], total)
        if least > told.asked:
            raise _unreachable(budget, least, "by the profile")
        chosen = _chosen(budget, candidates, _allowed(candidates, total, told.asked))
        note = f"{len(candidates)} layers timed on {times.profile.device.get('processor', 'another device')}"
        self.outcome = told.outcome(_predicted(candidates, chosen, total), None, 0, note)
        return {c.site.name: c.decisions[index] for c, index in zip(candidates, chosen, strict=True)}

    def _by_racing(self, budget: Budget, candidates: Sequence[Candidates], told: _Told, times: _Times, race: Race) -> dict[str, Decision]:
        """Plan, measure, and correct what the cuts are taken to save by what they did save."""
        layers = [shape for c in candidates for shape in _timed_layer(c.site, times.conditions.runtime)]
        total = in_terms_of_layers(race.before, layers, times.conditions) * sum(float(c.before) for c in candidates)
        floor = sum(float(c.costs.min()) for c in candidates)
        tried: list[_Attempt] = []
        seen: set[tuple[int, ...]] = set()
        for _ in range(REPLANS + 1):
            allowed = max(_allowed(candidates, total, _corrected(tried, told.asked)), floor * (1 + 1e-9))
            chosen = _chosen(budget, candidates, allowed)
            if tuple(chosen) in seen:
                break
            seen.add(tuple(chosen))
            decisions = {c.site.name: c.decisions[index] for c, index in zip(candidates, chosen, strict=True)}
            attempt = _Attempt(decisions, _predicted(candidates, chosen, total), race.against(decisions), _loss(budget, candidates, chosen))
            tried.append(attempt)
            if abs(attempt.raced.share - told.asked) <= NEAR * told.asked:
                break
        best = _best(tried, told.asked)
        if not best.raced.faster:
            self.outcome = told.nothing(f"the best plan was measured at {best.raced} of the original's time")
            return {c.site.name: Keep(f"measured: cut networks are no faster in {budget.runtime or 'onnxruntime'}") for c in candidates}
        if best.raced.low > (1 + FAR) * told.asked:
            raise _unreachable(budget, best.raced.share, "measured")
        self.outcome = told.outcome(best.predicted, best.raced, len(tried) - 1)
        return best.decisions


@dataclass(frozen=True, slots=True)
class Raced:
    """Time of a cut network as a share of the original's: median and quartiles of so many pairs of samples."""

    share: float
    low: float
    high: float
    pairs: int = 1

    @property
    def faster(self) -> bool:
        """Beyond noise: the median is below 1 by two of its standard errors."""
        return self.share + 2 * 0.93 * (self.high - self.low) / sqrt(self.pairs) < 1

    def __str__(self) -> str:
        return f"{self.share:.2f} ({self.low:.2f} to {self.high:.2f})"


@dataclass(frozen=True, slots=True)
class Race:
    """The original, ready to run, and what times a network with other decisions against it."""

    before: Callable[[], object]
    against: Callable[[Mapping[str, Decision]], Raced]


@dataclass(frozen=True, slots=True)
class _Attempt:
    decisions: dict[str, Decision]
    predicted: float
    raced: Raced
    loss: float


@dataclass(frozen=True, slots=True, kw_only=True)
class _Told:
    """What every outcome says."""

    runtime: str
    asked: float
    batch: int
    threads: int

    def outcome(self, predicted: float, raced: Raced | None, replans: int, note: str | None = None) -> LatencyOutcome:
        share, low, high = (None, None, None) if raced is None else (raced.share, raced.low, raced.high)
        return LatencyOutcome(
            runtime=self.runtime,
            asked=self.asked,
            predicted=predicted,
            measured=share,
            low=low,
            high=high,
            replans=replans,
            batch=self.batch,
            threads=self.threads,
            note=note,
        )

    def nothing(self, note: str) -> LatencyOutcome:
        return replace(self.outcome(1.0, Raced(1.0, 1.0, 1.0), 0, note), kept=True)


class _Table:
    """Times of all chains of a site: measured at a few ranks of each kind, piecewise linear in between.

    Args:
        site: with its calls.
        kinds: to be timed.
        times: where times come from.
        round_to: ranks are multiples of this.
    """

    def __init__(self, site: Site, kinds: Sequence[Blockwise], times: _Times, round_to: int) -> None:
        self._site, self._times, self._runtime = site, times, times.conditions.runtime
        fitting = [kind for kind in kinds if kind.has_spectra and kind.refuses(site.geometry) is None]
        full = max((min(kind.full_ranks(site.geometry)) for kind in fitting), default=1)
        self.step = lcm(round_to, next((step for least, step in STEPS if full >= least), 1))
        self._layer = _timed_layer(site, self._runtime)
        self._points: dict[tuple[str, tuple[bool, ...]], _Points] = {}
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
        return _sum(self._times, self._layer).seconds

    def __call__(self, kind: Blockwise, ranks: Sequence[Sequence[Rank]]) -> Numbers:
        """Seconds at every choice of these ranks; infinite where the chain is not faster than the layer, beyond noise."""
        points = self._points.get((kind.name, tuple(rank[0] is None for rank in ranks)))
        size = [len(rank) for rank in ranks]
        if points is None:
            return np.full(size, np.inf)
        known, spread = np.full([len(axis) for axis in points.axes], np.nan), []
        for index, shapes in points.shapes.items():
            if all(shape in self._times for shape in shapes):
                entry = _sum(self._times, shapes)
                known[index] = entry.seconds
                spread.append(entry.spread)
        if not spread:
            return np.full(size, np.inf)
        wanted = [[0.0] if rank[0] is None else [float(r) for r in rank if r is not None] for rank in ranks]
        seconds = interpolated(points.axes, _filled(known, points.macs), wanted)
        layer = _sum(self._times, self._layer)
        faster = (seconds * (1 + 2 * float(np.median(spread))) < layer.low) & (seconds < (1 - MARGIN) * layer.seconds)
        return np.where(faster, seconds, np.inf)

    def _points_of(self, kind: Blockwise, whole: Sequence[bool]) -> _Points:
        geometry, site = self._site.geometry, self._site
        step = lcm(self.step, kind.unit(geometry))
        axes = [[0.0] if w else _spread_out(range(step, most, step), self._runtime) for w, most in zip(whole, kind.full_ranks(geometry), strict=True)]
        macs = np.full([len(axis) for axis in axes], np.inf)
        shapes: dict[tuple[int, ...], list[TimedShape]] = {}
        most = sum(shape.macs for shape in self._layer)
        for index in np.ndindex(*macs.shape):
            ranks = [None if w else int(axis[i]) for w, axis, i in zip(whole, axes, index, strict=True)]
            factorization = kind.from_ranks(geometry, ranks)
            timed = _timed_chain(site, factorization, self._runtime)
            macs[index] = sum(shape.macs for shape in timed)
            if factorization.ranks == tuple(ranks) and macs[index] < most:
                shapes[index] = timed
        return _Points(axes, macs, shapes)


@dataclass(frozen=True, slots=True, eq=False)
class _Points:
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
    """Where nothing is known (NaN), the time a MAC of the nearest point that is known, times the MACs."""
    known = np.argwhere(~np.isnan(values))
    filled = values.copy()
    for index in np.argwhere(np.isnan(values)):
        nearest = tuple(known[np.abs(known - index).sum(1).argmin()])
        filled[tuple(index)] = values[nearest] * macs[tuple(index)] / macs[nearest]
    return filled


def _spread_out(ranks: range, runtime: str) -> list[float]:
    """A few of the ranks, closer where they are small: there a step changes more."""
    most = POINTS[runtime in COARSE]
    if len(ranks) <= most:
        return [float(rank) for rank in ranks] or [float(ranks.start)]
    places = np.unique(np.rint(np.geomspace(1, len(ranks), most)).astype(int)) - 1
    return [float(ranks[int(place)]) for place in places]


def _timed_layer(site: Site, runtime: str) -> list[TimedShape]:
    return [TimedShape((site.geometry,), call.input_shape, *_format(site, runtime)) for call in site.calls or ()]


def _timed_chain(site: Site, factorization: Factorization, runtime: str) -> list[TimedShape]:
    layers = tuple(shape.geometry for shape in kind_of(factorization).shapes(site.geometry, factorization, True))
    return [TimedShape(layers, call.input_shape, *_format(site, runtime)) for call in site.calls or ()]


def _format(site: Site, runtime: str) -> tuple[str, bool]:
    dtype = str(site.dtype).removeprefix("torch.")
    if runtime not in ("eager", "compile", "train") or site.geometry.dims != 2:
        return dtype, False
    weight = site.weight
    return dtype, not weight.is_contiguous() and weight.is_contiguous(memory_format=torch.channels_last)


def _sum(times: _Times, shapes: Sequence[TimedShape]) -> Entry:
    """Of several calls, together."""
    entries = [times[shape] for shape in shapes]
    total = sum(entry.seconds for entry in entries)
    return Entry(total, sum(entry.spread * entry.seconds for entry in entries) / total if total else 0.0)


def _device_of(inputs: Any) -> str:
    return next((str(t.device) for t in tensors_in(inputs)), "cpu")


def _saved(candidates: Sequence[Candidates], chosen: Sequence[int]) -> float:
    return sum(float(c.before - c.costs[index]) for c, index in zip(candidates, chosen, strict=True))


def _predicted(candidates: Sequence[Candidates], chosen: Sequence[int], total: float) -> float:
    return 1 - _saved(candidates, chosen) / total if total else 1.0


def _allowed(candidates: Sequence[Candidates], total: float, share: float) -> float:
    """Seconds for the candidates' layers, the rest of the network staying as it is."""
    return share * total - (total - sum(float(c.before) for c in candidates))


def _chosen(budget: Budget, candidates: Sequence[Candidates], allowed: float) -> list[int]:
    solver = least_loss if budget.criterion == "mean" else least_worst
    return solver([c.costs for c in candidates], [c.losses for c in candidates], allowed)


def _loss(budget: Budget, candidates: Sequence[Candidates], chosen: Sequence[int]) -> float:
    losses = [float(c.losses[index]) for c, index in zip(candidates, chosen, strict=True)]
    return sum(losses) if budget.criterion == "mean" else max(losses)


def _corrected(tried: Sequence[_Attempt], asked: float) -> float:
    """The share to plan for, so that the one asked for is measured: linear between the plans that were measured, the uncut network among them.

    Beyond the fastest plan, what is saved is taken to be as many times what is predicted as it was there.
    """
    points = sorted({(a.raced.share, a.predicted) for a in tried} | {(1.0, 1.0)})
    share, predicted = points[0]
    if asked < share:
        return 1 - (1 - asked) * min(max((1 - predicted) / (1 - share), 0.2), 5.0) if share < 1 else asked
    return float(np.interp(asked, [s for s, _ in points], [p for _, p in points]))


def _best(tried: Sequence[_Attempt], asked: float) -> _Attempt:
    """Of those within reach of the share the one that loses least, else the fastest."""
    near = [attempt for attempt in tried if attempt.raced.share <= (1 + NEAR) * asked]
    if near:
        return min(near, key=lambda attempt: attempt.loss)
    return min(tried, key=lambda attempt: attempt.raced.share)


def _unreachable(budget: Budget, least: float, how: str) -> SurgeryValueError:
    return SurgeryValueError(
        f"ranks: {budget} is out of reach: the least that these layers can come to is {least:.3f} of the network's time ({how}); ask for more, "
        'include more layers, or allow other kinds (method="auto")'
    )


@contextmanager
def _race(model: nn.Module, inputs: Any, runtime: str) -> Iterator[Race]:
    """The original prepared once; each cut network against it, in turn, as ``surgery.benchmark`` does."""
    from surgery.benchmark import SAMPLE_SECONDS, compare

    with _running(private_copy(model, share_parameters=True).eval(), inputs, runtime) as before:

        def against(decisions: Mapping[str, Decision]) -> Raced:
            with _running(with_noise(model, decisions), inputs, runtime) as after:
                before(), after()  # the first calls take longer
                began = time.perf_counter()
                before(), after()
                pair = max(time.perf_counter() - began, 2 * SAMPLE_SECONDS)
                pairs = int(min(max(RACE_SECONDS / pair, PAIRS[0]), PAIRS[1]))
                result = compare(runtime, before, after, pairs)
            return Raced(1 / result.time_ratio, 1 / result.time_ratio_high, 1 / result.time_ratio_low, pairs)

        yield Race(before, against)


@contextmanager
def _running(network: nn.Module, inputs: Any, runtime: str) -> Iterator[Callable[[], object]]:
    """A network ready to be called. ONNX comes from torch's older exporter where that can do it: it takes a second instead of half a minute."""
    from surgery.benchmark import RUNTIMES as WHOLE
    from surgery.benchmark import openvino_call

    with ExitStack() as stack:
        if runtime in ("onnxruntime", "openvino"):
            file = Path(stack.enter_context(TemporaryDirectory())) / "network.onnx"
            if _quick_onnx(network, inputs, file):
                from surgery.export.onnx import onnx_session, run_session

                if runtime == "openvino":
                    yield openvino_call(file, inputs)
                    return
                session = onnx_session(file, torch.get_num_threads())
                yield lambda: run_session(session, inputs)
                return
        yield stack.enter_context(WHOLE[runtime](network, inputs))


def _quick_onnx(network: nn.Module, inputs: Any, file: Path) -> bool:
    from surgery.export.common import quiet

    args, kwargs = arguments(inputs)
    if args and isinstance(args[-1], dict):
        args = (*args, {})
    try:
        with quiet():
            torch.onnx.export(network, args, str(file), kwargs=kwargs, dynamo=False, verbose=False)
    except Exception:  # whatever it cannot do, the newer exporter is asked next, and its error is the one to show
        return False
    return file.exists()


def with_noise(model: nn.Module, decisions: Mapping[str, Decision]) -> nn.Module:
    """The model cut as decided, with noise for the chains' weights: time does not depend on them."""
    from surgery.checkpoint import with_empty_chains
    from surgery.plan import Plan

    plan = Plan()
    twin = private_copy(model).eval()
    for site in host_for(twin, effective_weights=True).sites():
        decision = decisions.get(site.tied_to or site.name)
        if isinstance(decision, Factorization):
            plan[site.name] = decision
    network = with_empty_chains(twin, plan, Path("the plan"))
    generator = torch.Generator().manual_seed(0)
    for name, module in network.named_modules():
        if isinstance(module, Chain) and name in plan:
            for parameter in module.parameters():
                size = max(parameter[0].numel(), 1)
                noise = torch.randn(parameter.shape, generator=generator) / size**0.5 if parameter.ndim > 1 else torch.zeros(parameter.shape)
                parameter.data.copy_(noise)
    return network.eval()
