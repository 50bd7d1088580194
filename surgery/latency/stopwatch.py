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
from passes.site import Site, for_all_tied
from surgery.cost.calls import check_installed
from surgery.cost.chains import Setup, timed_in
from surgery.cost.outcome import LatencyOutcome
from surgery.cost.profile import Entry, together
from surgery.latency.families import Solved
from surgery.latency.solving import Task, Terms
from surgery.latency.table import MARGIN, Table
from surgery.latency.times import Times, timed_chain, timed_layer
from surgery.ranks.budget import RUNTIMES, Budget

__all__ = ["Stopwatch"]

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
        where = WORDS.get(runtime, timed_in(runtime))
        return Keep(f"ranks ({ranks}): measured {1e3 * new.seconds:.3g} ms instead of {1e3 * old.seconds:.3g} ms in {where}{noise}")

    def times(self, site: Site, factorization: Factorization, runtime: str) -> tuple[Entry, Entry]:
        """What a layer takes over all its calls, and what its chain would take."""
        times = self._times_in(runtime)
        before, after = timed_layer(site, timed_in(runtime)), timed_chain(site, factorization, timed_in(runtime))
        times.measure([*before, *after])
        return together(map(times.__getitem__, before)), together(map(times.__getitem__, after))

    def tables(self, free: Sequence[Site], kinds: Callable[[Site], Sequence[Blockwise]], runtime: str, round_to: int) -> dict[str, Table]:
        """The times of all chains of these layers, by name, measured where they are not known."""
        times = self._times_in(runtime)
        found = {site.name: Table(site, kinds(site), times, round_to) for site in free}
        times.measure([shape for table in found.values() for shape in table.shapes])
        return found

    def decide(self, budget: Budget, free: Sequence[Site], terms: Terms) -> dict[str, Decision]:
        """One decision for each free site, so that the network takes the share of time that the budget says.

        Raises:
            SurgeryValueError: no example inputs; another device's profile lacks shapes; or the share is out of reach, with the least that is not.
            MissingExtra: the runtime is not installed.
        """
        decisions, self.outcome = self._task(budget, free, terms).solve()
        return decisions

    def choices(self, budget: Budget, free: Sequence[Site], terms: Terms) -> Solved:
        """All that could be done with these sites under the conditions of a latency budget, whatever its share."""
        return self._task(budget, free, terms).choices()

    def _task(self, budget: Budget, free: Sequence[Site], terms: Terms) -> Task:
        runtime = budget.runtime or "onnxruntime"
        if self.example_inputs is None:
            raise SurgeryValueError(f"ranks: {budget} needs example_inputs: without them there is nothing to time")
        check_installed(runtime)
        inputs, known = self._batched(budget.batch)
        if known is not None:
            free = [replace(site, calls=known[site.name].calls, others=known[site.name].others) if site.name in known else site for site in free]
        setup = Setup(runtime=timed_in(runtime), threads=int(budget.threads or torch.get_num_threads()), device=_device_of(self.model, inputs))
        times = Times.of(setup, budget.profile)
        named = times.profile.device.get("runtime", "").partition(" ")[0]
        if named in RUNTIMES and timed_in(named) != setup.runtime:
            told = f"its times are of {named!r}, the budget is of {runtime!r}; say runtime={named!r}, or name another"
            raise SurgeryValueError(f"ranks: the profile {times.file}: {told}")
        return Task(model=self.model, inputs=inputs, budget=budget, runtime=runtime, free=free, terms=terms, times=times)

    def _times_in(self, runtime: str) -> Times:
        runtime = timed_in(runtime)
        if runtime not in self._guarding:
            check_installed(runtime)
            setup = Setup(runtime=runtime, threads=torch.get_num_threads(), device=_device_of(self.model, self.example_inputs))
            self._guarding[runtime] = Times.of(setup, None)
        return self._guarding[runtime]

    def _batched(self, batch: int | None) -> tuple[Any, dict[str, Site] | None]:
        """Inputs of this batch size, and the layers as they are called then, by name; None where they stay those that are known."""
        first = next((t for t in tensors_in(self.example_inputs) if t.ndim), None)
        if batch is None or first is None or first.shape[0] == batch:
            return self.example_inputs, None
        from surgery.export.common import fresh_inputs

        inputs = fresh_inputs(self.example_inputs, torch.Generator().manual_seed(0), batch)
        sites = host_for(self.model, observed=observe(self.model, inputs), effective_weights=True).sites()
        return inputs, {site.name: for_all_tied(site, sites) for site in sites if site.tied_to is None}


def _device_of(model: nn.Module, inputs: Any) -> str:
    """The layers', which may be another than that of the first input (lengths on the CPU)."""
    return next((str(t.device) for t in (*model.parameters(), *tensors_in(inputs))), "cpu")
