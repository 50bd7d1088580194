"""What times one model: its layers and chains for guards, and for budgets the whole network too."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn

from passes import host_for, observe
from passes.blockwise import Blockwise
from passes.errors import SurgeryValueError
from passes.factorization import Decision, Factorization, Keep
from passes.parity import tensors_in
from passes.running import kept_random_states
from passes.site import Call, Site
from passes.spectra import Spectra
from surgery.cost import threads_set
from surgery.cost.outcome import LatencyOutcome
from surgery.cost.profile import Entry
from surgery.cost.timing import Conditions, describe, in_terms_of_layers, need
from surgery.latency.race import Race, race_against
from surgery.latency.replan import (
    NEAR,
    Attempt,
    Told,
    allowed_seconds,
    best_of,
    choose,
    corrected_share,
    loss_of,
    predicted_share,
    unreachable,
)
from surgery.latency.table import MARGIN, Table
from surgery.latency.times import Times, timed_chain, timed_layer, together
from surgery.ranks.budget import Budget
from surgery.ranks.candidates import Candidates, Cost, candidates_of

__all__ = ["Stopwatch"]

REPLANS = 3
FAR = 0.10  # of the share asked for: what is slower than this has missed it
WORDS = {"train": "a training step"}


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
    _guarding: dict[str, Times] = field(default_factory=dict, repr=False)

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
            self._guarding[runtime] = Times.of(conditions, None)
        times = self._guarding[runtime]
        before, after = timed_layer(site, runtime), timed_chain(site, factorization, runtime)
        times.measure([*before, *after])
        return together(times, before), together(times, after)

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
        times = Times.of(Conditions(runtime=runtime, threads=threads, device=_device_of(inputs)), budget.profile)
        tables = {site.name: Table(site, kinds(site), times, round_to) for site in free}
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
        told = Told(
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
        with threads_set(threads), kept_random_states(), torch.no_grad(), race_against(self.model, inputs, runtime) as race:
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

    def _by_profile_alone(self, budget: Budget, candidates: Sequence[Candidates], told: Told, times: Times) -> dict[str, Decision]:
        """Where the network cannot be run, its time is that of its layers."""
        total = 0.0
        for site in host_for(self.model, observed=observe(self.model, self._batched(budget.batch)[0]), effective_weights=True).sites():
            layers = timed_layer(site, times.conditions.runtime) if site.chain is None else []
            if any(layer not in times for layer in layers) and any(c.site.name == site.name for c in candidates):
                raise times.lacks(layers)
            total += sum(times[layer].seconds for layer in layers if layer in times)
        least = predicted_share(candidates, [int(c.costs.argmin()) for c in candidates], total)
        if least > told.asked:
            raise unreachable(budget, least, "by the profile")
        chosen = choose(budget, candidates, allowed_seconds(candidates, total, told.asked))
        note = f"{len(candidates)} layers timed on {times.profile.device.get('processor', 'another device')}"
        self.outcome = told.outcome(predicted_share(candidates, chosen, total), None, 0, note)
        return {c.site.name: c.decisions[index] for c, index in zip(candidates, chosen, strict=True)}

    def _by_racing(self, budget: Budget, candidates: Sequence[Candidates], told: Told, times: Times, race: Race) -> dict[str, Decision]:
        """Plan, measure, and correct what the cuts are taken to save by what they did save."""
        layers = [shape for c in candidates for shape in timed_layer(c.site, times.conditions.runtime)]
        total = in_terms_of_layers(race.before, layers, times.conditions) * sum(float(c.before) for c in candidates)
        floor = sum(float(c.costs.min()) for c in candidates)
        tried: list[Attempt] = []
        seen: set[tuple[int, ...]] = set()
        for _ in range(REPLANS + 1):
            allowed = max(allowed_seconds(candidates, total, corrected_share(tried, told.asked)), floor * (1 + 1e-9))
            chosen = choose(budget, candidates, allowed)
            if tuple(chosen) in seen:
                break
            seen.add(tuple(chosen))
            decisions = {c.site.name: c.decisions[index] for c, index in zip(candidates, chosen, strict=True)}
            attempt = Attempt(decisions, predicted_share(candidates, chosen, total), race.against(decisions), loss_of(budget, candidates, chosen))
            tried.append(attempt)
            if abs(attempt.raced.share - told.asked) <= NEAR * told.asked:
                break
        best = best_of(tried, told.asked)
        if not best.raced.faster:
            self.outcome = told.nothing(f"the best plan was measured at {best.raced} of the original's time")
            return {c.site.name: Keep(f"measured: cut networks are no faster in {budget.runtime or 'onnxruntime'}") for c in candidates}
        if best.raced.low > (1 + FAR) * told.asked:
            raise unreachable(budget, best.raced.share, "measured")
        self.outcome = told.outcome(best.predicted, best.raced, len(tried) - 1)
        return best.decisions


def _device_of(inputs: Any) -> str:
    return next((str(t.device) for t in tensors_in(inputs)), "cpu")
