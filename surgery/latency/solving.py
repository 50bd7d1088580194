"""A latency budget from its times to its decisions."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import nn

from passes import host_for, observe
from passes.blockwise import Blockwise
from passes.errors import SurgeryValueError
from passes.factorization import Decision, Factorization, Keep
from passes.parity import tensors_in
from passes.running import kept_random_states
from passes.site import Site
from passes.spectra import Spectra
from surgery.cost import macs_under, threads_set
from surgery.cost.outcome import LatencyOutcome
from surgery.cost.profile import TimedShape
from surgery.cost.timing import describe, in_terms_of_layers
from surgery.latency.families import Family, Proposal, Rung, Solved, Uniform, rungs_of
from surgery.latency.race import Race, Raced, race_against
from surgery.latency.replan import Attempt, Search
from surgery.latency.table import Table
from surgery.latency.times import Times, timed_chain, timed_layer
from surgery.ranks.budget import Budget
from surgery.ranks.candidates import Candidates, Cost, Pays, candidates_of

__all__ = ["Task", "Terms", "no_faster", "nothing_to_cut"]

FAR = 0.10  # of the share asked for: what is slower than this has missed it
BETTER = Keep("the budget is better spent on other layers")
BY_TIME = "measured times"


def no_faster(runtime: str) -> Keep:
    """Why a layer of which no chain pays is kept."""
    return Keep(f"measured: no faster than the layer itself in {runtime}")


def nothing_to_cut(candidates: Candidates) -> bool:
    """Whether all that can be done with a layer is to keep it."""
    return all(isinstance(decision, Keep) for decision in candidates.decisions)


@dataclass(frozen=True, slots=True, kw_only=True)
class Terms:
    """What may be done with a layer, whatever the budget.

    Attributes:
        kinds: of a layer.
        spectra: of the layers' weights.
        guards: costs that a chain of a layer must lower beside its time.
        round_to: ranks are multiples of this.
        pays: what a guard says of a layer's chains, None where it asks nothing.
    """

    kinds: Callable[[Site], Sequence[Blockwise]]
    spectra: Spectra
    guards: Callable[[Site], Sequence[Cost]]
    round_to: int
    pays: Callable[[Site], Pays | None] = lambda site: None


@dataclass(slots=True, kw_only=True)
class Task:
    """One latency budget for one model.

    Attributes:
        model: never changed.
        inputs: of the batch size that is asked for.
        budget: what is asked for.
        runtime: that whole networks are raced in.
        free: the layers to decide on, with their calls on these inputs.
        terms: what may be done with each.
        times: of layers and chains.
    """

    model: nn.Module
    inputs: Any
    budget: Budget
    runtime: str
    free: Sequence[Site]
    terms: Terms
    times: Times
    _tables: dict[str, Table] = field(default_factory=dict)
    _by_macs: list[Candidates] = field(default_factory=list)
    _rungs: dict[str, list[Rung]] = field(default_factory=dict)

    def solve(self) -> tuple[dict[str, Decision], LatencyOutcome]:
        """Decisions by name, and what came of them."""
        times = self.times
        candidates = self._timed(rivals=not times.foreign)
        if all(nothing_to_cut(c) for c in candidates):
            slow = no_faster(times.setup.runtime)
            return {c.site.name: slow for c in candidates}, self._nothing("no chain was measured faster than its layer")
        if times.foreign:
            return self._by_profile_alone(candidates)
        with self._racing() as race:
            return self._by_racing(candidates, race)

    def choices(self) -> Solved:
        """All that could be done, whatever the share that is asked for."""
        candidates = self._timed(rivals=False)
        if all(nothing_to_cut(c) for c in candidates):  # the network takes what it takes
            return self._family(candidates, sum(float(c.before) for c in candidates) or 1.0)
        with self._racing() as race:
            return self._by_time(candidates, race)

    def _timed(self, *, rivals: bool) -> list[Candidates]:
        """Choices of each layer, when all times that they need are there."""
        times = self.times
        self._tables = {site.name: Table(site, self.terms.kinds(site), times, self.terms.round_to) for site in self.free}
        times.measure([shape for table in self._tables.values() for shape in table.shapes])
        if times.foreign:
            lacking = [shape for table in self._tables.values() for shape in table.lacking]
            if lacking := [*lacking, *(layer for layer in self._all_layers() if layer not in times)]:
                raise times.lacks(lacking)
        return self._candidates(rivals=rivals)

    @contextmanager
    def _racing(self) -> Iterator[Race]:
        with (
            threads_set(self.times.setup.threads),
            kept_random_states(),
            torch.no_grad(),
            race_against(self.model, self.inputs, self.runtime, self.free) as race,
        ):
            yield race

    def _by_time(self, candidates: Sequence[Candidates], race: Race) -> Solved:
        """Plans by time, where the network takes as many times as long as these layers alone as it does now."""
        layers = [shape for c in candidates for shape in timed_layer(c.site, self.times.setup.runtime)]
        in_layers = in_terms_of_layers(race.before, layers, self.times.setup)
        return self._family(candidates, in_layers * sum(float(c.before) for c in candidates))

    def _candidates(self, *, rivals: bool) -> list[Candidates]:
        """Choices of each layer by their times; and, for plans to compare with, by their MACs and by one fraction."""
        found = []
        for site in self.free:
            kinds, guards, table = self.terms.kinds(site), self.terms.guards(site), self._tables[site.name]
            shared: dict[str, Any] = {"guards": guards, "round_to": table.step, "keep": BETTER, "pays": self.terms.pays(site)}
            mine = candidates_of(site, kinds, self.terms.spectra, cost=table.layer, table=table, **shared)
            found.append(replace(mine, decisions=(no_faster(self.times.setup.runtime),)) if nothing_to_cut(mine) else mine)
            if rivals:
                macs = partial(macs_under, site)
                self._by_macs.append(candidates_of(site, kinds, self.terms.spectra, cost=macs, **shared))
                self._rungs[site.name] = rungs_of(site, kinds, self.terms.spectra, macs, guards, table.step)
            self.terms.spectra.let_go(site)
        return found

    def _by_profile_alone(self, candidates: Sequence[Candidates]) -> tuple[dict[str, Decision], LatencyOutcome]:
        """Where the network cannot be run, its time is that of its layers."""
        times = self.times
        family = self._family(candidates, sum(times[layer].seconds for layer in self._all_layers()))
        if family.floor > self._asked:
            raise self._unreachable(family.floor, "by the profile")
        proposal = family.at_share(self._asked)
        note = f"{len(candidates)} layers timed on {times.profile.device.get('processor', 'another device')}"
        return dict(proposal.decisions), self._outcome(proposal.share, None, 0, note)

    def _all_layers(self) -> list[TimedShape]:
        """Of the whole network, each call once: also of those that are not to be cut, or are cut already."""
        sites = host_for(self.model, observed=observe(self.model, self.inputs), effective_weights=True).sites()
        runtime = self.times.setup.runtime
        return [s for site in sites for s in (timed_layer(site, runtime) if site.chain is None else timed_chain(site, site.chain, runtime))]

    def _by_racing(self, candidates: Sequence[Candidates], race: Race) -> tuple[dict[str, Decision], LatencyOutcome]:
        """Plan, measure, and correct what the cuts are taken to save by what they did save; then see whether other sorts of plans are better."""

        def mended(proposal: Proposal) -> Family:
            resting = [shape for name, cut in proposal.cuts if isinstance(cut, Factorization) for shape in self._tables[name].around(cut)]
            self.times.measure(resting, anew=True)
            return self._by_time(self._candidates(rivals=False), race)

        search = Search(self._asked, race.against)
        family = self._by_time(candidates, race)
        replans = search.aim(family, mended)
        for rival in self._rivals() if self.runtime != "compile" else ():  # where to prepare a network takes minutes
            search.challenge(rival, partial(self._foretold, total=family.total))
        if search.best.raced.low > (1 + FAR) * self._asked:
            search.push(family)
        return self._told(search.confirmed(), replans)

    def _foretold(self, proposal: Proposal, total: float) -> float:
        """The share of the network's time that a plan takes by the times of its layers and chains."""
        saved = 0.0
        for name, cut in proposal.cuts:
            if isinstance(cut, Factorization):
                saved += max(self._tables[name].saving(cut), 0.0)
        return 1 - saved / total

    def _told(self, best: Attempt, replans: int) -> tuple[dict[str, Decision], LatencyOutcome]:
        if not best.raced.faster:
            keep = Keep(f"measured: cut networks are no faster in {self.runtime}")
            return {site.name: keep for site in self.free}, self._nothing(f"the best plan was measured at {best.raced} of the original's time")
        if best.raced.low > (1 + FAR) * self._asked:
            raise self._unreachable(best.raced.share, "measured")
        if best.family == BY_TIME:
            return dict(best.proposal.decisions), self._outcome(best.predicted, best.raced, replans)
        note = f"a plan by {best.family} was measured better than those by {BY_TIME}"
        return dict(best.proposal.decisions), self._outcome(None, best.raced, replans, note)

    def _family(self, candidates: Sequence[Candidates], total: float) -> Solved:
        return Solved(BY_TIME, self.budget.criterion, candidates, total)

    def _rivals(self) -> list[Family]:
        total = sum(float(c.before) for c in self._by_macs)
        return [Solved("MACs", self.budget.criterion, self._by_macs, total), Uniform(self.budget.criterion, self._rungs, total)] if total else []

    @property
    def _asked(self) -> float:
        return float(self.budget.latency or 0.0)

    def _outcome(self, predicted: float | None, raced: Raced | None, replans: int, note: str | None = None) -> LatencyOutcome:
        times = self.times
        share, low, high = (None, None, None) if raced is None else (raced.share, raced.low, raced.high)
        runtime, told = times.profile.device.get("runtime", "an unnamed runtime"), times.profile.device.get("threads", "")
        return LatencyOutcome(
            runtime=runtime if times.foreign else describe(replace(times.setup, runtime=self.runtime))["runtime"],
            asked=self._asked,
            predicted=predicted,
            measured=share,
            low=low,
            high=high,
            replans=replans,
            batch=next((t.shape[0] for t in tensors_in(self.inputs) if t.ndim), 1),
            threads=int(told) if times.foreign and told.isdecimal() else times.setup.threads,
            note=note,
        )

    def _nothing(self, note: str) -> LatencyOutcome:
        return replace(self._outcome(1.0, None if self.times.foreign else Raced(1.0, 1.0, 1.0), 0, note), kept=True)

    def _unreachable(self, least: float, how: str) -> SurgeryValueError:
        return SurgeryValueError(
            f"ranks: {self.budget} is out of reach: the least that these layers can come to is {least:.3f} of the network's time ({how}); ask for "
            'more, include more layers, or allow other kinds (method="auto")'
        )
