"""The draft of a plan, from a model and what a user asks for."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import nn

from passes import host_for
from surgery.fitting import learn, usable_batches
from surgery.inspection import check_not_quantized, look, totals_of
from surgery.options import Options
from surgery.planning import Draft

if TYPE_CHECKING:
    from surgery.latency import Stopwatch

__all__ = ["draft_of", "stopwatch_of"]


def draft_of(model: nn.Module, ranks: Any, options: Options, example_inputs: Any, calibration: Any) -> tuple[Draft, Stopwatch]:
    """The draft of a plan for a model that is not touched."""
    seen = look(model, example_inputs)
    sites = host_for(model, observed=seen.observed, effective_weights=options.effective_weights).sites()
    check_not_quantized(model, sites)
    metrics = {} if calibration is None else learn(model, usable_batches(calibration), sites)[0]
    stopwatch = stopwatch_of(model, example_inputs)
    return Draft(sites, ranks, options, totals_of(model, seen), metrics=metrics, stopwatch=stopwatch), stopwatch


def stopwatch_of(model: nn.Module, example_inputs: Any) -> Stopwatch:
    """What times this model on these inputs, if it is asked to."""
    from surgery.latency import Stopwatch

    return Stopwatch(model, example_inputs)
