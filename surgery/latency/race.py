"""Whole networks timed against the original, in turn."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import nn

from passes import host_for
from passes.factorization import Decision, Factorization
from passes.parity import tensors_in
from passes.running import evaluating_copy
from passes.site import Site
from surgery.cost.calls import ON_PROCESSORS
from surgery.latency.onnx_cut import Exported, quick_onnx
from surgery.progress import stage

__all__ = ["Race", "Raced", "race_against", "with_noise"]

RACE_SECONDS = 6.0
PATIENCE = 4.0  # times as long, while it is open whether the cut network is faster: slow networks, busy machines
PRECISION = 0.005  # half the width of the interval around a share of time at which a race is over sooner
WIDTH = 2 * 2.58  # of a 99 % confidence interval, in standard errors


@dataclass(frozen=True, slots=True)
class Raced:
    """Time of a cut network as a share of the original's: the median over pairs of samples, and its 99 % confidence interval."""

    share: float
    low: float
    high: float

    @property
    def doubt(self) -> float:
        """Standard error of the median."""
        return (self.high - self.low) / WIDTH

    @property
    def faster(self) -> bool:
        """Beyond noise: the median is below 1 by two of its standard errors."""
        return self.share + 2 * self.doubt < 1

    def slower_of(self, again: Raced) -> Raced:
        """Of two races of one plan the one that speaks less for it."""
        return max(self, again, key=lambda raced: raced.share + 2 * raced.doubt)

    def __str__(self) -> str:
        return f"{self.share:.2f} ({self.low:.2f} to {self.high:.2f})"


@dataclass(frozen=True, slots=True)
class Race:
    """The original, ready to run, and what times a network with other decisions against it."""

    before: Callable[[], object]
    against: Callable[[Mapping[str, Decision]], Raced]


@contextmanager
def race_against(model: nn.Module, inputs: Any, runtime: str, sites: Sequence[Site]) -> Iterator[Race]:
    """The original prepared once; each cut network against it, in turn, as ``surgery.benchmark`` does.

    Raises:
        SurgeryError: the runtime cannot run the network.
    """
    from surgery.benchmarking.runtimes import RUNTIMES
    from surgery.benchmarking.sampling import time_in_turn

    known = RUNTIMES[runtime]
    with ExitStack() as stack:
        original = evaluating_copy(model, share_parameters=True)
        exported = None
        if runtime in ON_PROCESSORS:
            exported = Exported.of(original, inputs, Path(stack.enter_context(TemporaryDirectory())))
        before = stack.enter_context(_running(original, inputs, runtime)) if exported is None else _on_file(exported.file, inputs, runtime)

        def against(decisions: Mapping[str, Decision]) -> Raced:
            with stage(f"timing the whole network in {runtime}"), ExitStack() as own:
                file = None if exported is None else exported.cut(sites, decisions)
                if file is None:
                    after = own.enter_context(_running(with_noise(model, decisions), inputs, runtime))
                else:
                    after = _on_file(file, inputs, runtime)
                found = time_in_turn(
                    before, after, clock=known.clock, pause=known.pause, precision=PRECISION, seconds=RACE_SECONDS, patience=PATIENCE
                )
            return Raced(1 / found.ratio, 1 / found.high, 1 / found.low)

        yield Race(before, against)


@contextmanager
def _running(network: nn.Module, inputs: Any, runtime: str) -> Iterator[Callable[[], object]]:
    """A network ready to be called."""
    from surgery.benchmarking.runtimes import RUNTIMES

    with ExitStack() as stack:
        if runtime in ON_PROCESSORS:
            file = Path(stack.enter_context(TemporaryDirectory())) / "network.onnx"
            if quick_onnx(network, inputs, file) and _takes_all(file, inputs):
                yield _on_file(file, inputs, runtime)
                return
        yield stack.enter_context(RUNTIMES[runtime](network, inputs))


def _takes_all(file: Path, inputs: Any) -> bool:
    """Whether a file has an input for each tensor: torch's older exporter leaves out those that nothing reads."""
    import onnx

    return len(onnx.load(str(file), load_external_data=False).graph.input) == len(list(tensors_in(inputs)))


def _on_file(file: Path, inputs: Any, runtime: str) -> Callable[[], object]:
    """Calls of an ONNX file."""
    if runtime == "openvino":
        from surgery.benchmarking.onnx_files import openvino_call

        return openvino_call(file, inputs)
    from surgery.export.onnx import onnx_session, session_call

    session = onnx_session(file, torch.get_num_threads())
    names = [i.name for i in session.get_inputs()]
    named = isinstance(inputs, Mapping) and set(names) <= set(inputs)
    return session_call(session, {name: inputs[name] for name in names} if named else dict(zip(names, tensors_in(inputs), strict=True)))


def with_noise(model: nn.Module, decisions: Mapping[str, Decision]) -> nn.Module:
    """The model cut as decided, with noise for the chains' weights: time does not depend on them."""
    from surgery.checkpoint import with_empty_chains
    from surgery.plan import Plan

    plan = Plan()
    twin, own = evaluating_copy(model, share_parameters=True), {id(p) for p in model.parameters()}
    for site in host_for(twin, effective_weights=True).sites():
        decision = decisions.get(site.tied_to or site.name)
        if isinstance(decision, Factorization):
            plan[site.name] = decision
    network = with_empty_chains(twin, plan, Path("the plan"))
    generator = torch.Generator().manual_seed(0)
    for parameter in (p for p in network.parameters() if id(p) not in own):  # of the chains
        if parameter.ndim > 1:
            noise = torch.randn(parameter.shape, generator=generator, device="cpu") / max(parameter[0].numel(), 1) ** 0.5
        else:
            noise = torch.zeros(parameter.shape, device="cpu")
        parameter.data.copy_(noise)
    network.eval()
    return network
