"""Whole networks timed against the original, in turn."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from math import sqrt
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import nn

from passes import host_for
from passes.chain import Chain
from passes.factorization import Decision, Factorization
from passes.running import arguments, private_copy

__all__ = ["Race", "Raced", "race_against", "with_noise"]

RACE_SECONDS = 6.0
PAIRS = (9, 101)


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


@contextmanager
def race_against(model: nn.Module, inputs: Any, runtime: str) -> Iterator[Race]:
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
