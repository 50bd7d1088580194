"""Cuts networks: finds the layers that can be factorized, splits weights into chains, merges chains back, rewrites models.

This package computes what it is told; it never chooses a rank, never loops over data and never prints. Deciding is ``surgery``'s.
"""

from __future__ import annotations

from typing import Any

from torch import fx, nn

from passes.capture import capture, trace
from passes.decompose import Decompose
from passes.graph_host import GraphHost
from passes.host import Host
from passes.module_host import ModuleHost
from passes.reconstruct import Reconstruct
from passes.recording import RecordedGraph, record
from passes.result import Outcome, PassResult
from passes.watching import FunctionUse, Observation, observe_graph, observe_module

__all__ = [
    "Decompose",
    "FunctionUse",
    "GraphHost",
    "Host",
    "ModuleHost",
    "Observation",
    "Outcome",
    "PassResult",
    "Reconstruct",
    "RecordedGraph",
    "capture",
    "host_for",
    "observe",
    "record",
    "trace",
]


def observe(model: nn.Module, example_inputs: Any) -> Observation:
    """What the host of this model would learn from these inputs, for it or for the host of a copy; run on a copy that is then dropped."""
    return observe_graph(model, example_inputs) if isinstance(model, fx.GraphModule) else observe_module(model, example_inputs)


def host_for(model: nn.Module, example_inputs: Any = None, *, observed: Observation | None = None, private: bool = False) -> Host:
    """The host for a model: node for node where it is a flat ``GraphModule``, in place on the modules of any other."""
    if isinstance(model, fx.GraphModule):
        return GraphHost(model, example_inputs, observed=observed, private=private)
    return ModuleHost(model, example_inputs, observed=observed, private=private)
