"""Cuts networks: finds the layers that can be factorized, splits weights into chains, merges chains back, rewrites models.

This package computes what it is told; it never chooses a rank, never loops over data and never prints. Deciding is ``surgery``'s.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import fx, nn

from passes.capture import capture, trace
from passes.decompose import Decompose
from passes.graph_host import GraphHost
from passes.host import Host
from passes.kinds import register_kind
from passes.module_host import ModuleHost
from passes.pipeline import Pass, name_of, run_pipeline
from passes.reconstruct import Reconstruct
from passes.result import Outcome, PassResult
from passes.watching import FunctionUse, Observation, observe_graph, observe_module

__all__ = [
    "CLEANUP_PASSES",
    "Decompose",
    "DropIdentities",
    "FoldBatchNorm",
    "FunctionUse",
    "FuseLinearRuns",
    "GraphHost",
    "Host",
    "MergePointwise",
    "ModuleHost",
    "Observation",
    "Outcome",
    "Pass",
    "PassResult",
    "Reconstruct",
    "RecordedGraph",
    "capture",
    "host_for",
    "name_of",
    "observe",
    "record",
    "register_kind",
    "run_pipeline",
    "trace",
]

if TYPE_CHECKING:
    from passes.cleanup import CLEANUP_PASSES, DropIdentities, FoldBatchNorm, FuseLinearRuns, MergePointwise
    from passes.recording import RecordedGraph, record

LATER = dict.fromkeys(["CLEANUP_PASSES", "DropIdentities", "FoldBatchNorm", "FuseLinearRuns", "MergePointwise"], "passes.cleanup")
LATER |= dict.fromkeys(["RecordedGraph", "record"], "passes.recording")
"""Names that are imported when they are first used, and from where, so that ``import surgery`` stays cheap."""


def __getattr__(name: str) -> Any:
    if name not in LATER:
        raise AttributeError(f"module 'passes' has no attribute {name!r}")
    from importlib import import_module

    globals()[name] = found = getattr(import_module(LATER[name]), name)
    return found


def observe(model: nn.Module, example_inputs: Any) -> Observation:
    """What the host of ``model`` would learn from ``example_inputs``, for it or for the host of a copy; run on a copy that is then dropped.

    Raises:
        SurgeryValueError: the model does not accept the inputs.
        SurgeryTypeError: it cannot be copied.
    """
    return observe_graph(model, example_inputs) if isinstance(model, fx.GraphModule) else observe_module(model, example_inputs)


def host_for(
    model: nn.Module, example_inputs: Any = None, *, observed: Observation | None = None, private: bool = False, effective_weights: bool = False
) -> Host:
    """The host for a model: node for node where it is a flat ``GraphModule``, in place on the modules of any other.

    Args:
        model: what is to be rewritten.
        example_inputs: a tensor, a tuple of positional or a mapping of keyword arguments; with them calls, their shapes and readers of weights are
            known. The model is run once, on a copy.
        observed: what ``observe`` found, in their place.
        private: nobody else holds the model, so that each chain may be put in place at once; after an error it is of no use.
        effective_weights: layers whose weight is computed may be cut by what it amounts to.

    Raises:
        SurgeryValueError: the model does not accept the inputs.
        SurgeryTypeError: it cannot be copied.
    """
    if isinstance(model, fx.GraphModule):
        return GraphHost(model, example_inputs, observed=observed, private=private, effective_weights=effective_weights)
    return ModuleHost(model, example_inputs, observed=observed, private=private, effective_weights=effective_weights)
