"""Cuts networks: finds the layers that can be factorized, splits weights into chains, merges chains back, rewrites models.

This package computes what it is told; it never chooses a rank, never loops over data and never prints. Deciding is ``surgery``'s.
"""

from __future__ import annotations

from torch import fx, nn

from passes.capture import capture, trace
from passes.decompose import Decompose
from passes.graph_host import GraphHost
from passes.host import Host
from passes.module_host import ModuleHost
from passes.reconstruct import Reconstruct
from passes.result import Outcome, PassResult

__all__ = ["Decompose", "GraphHost", "Host", "ModuleHost", "Outcome", "PassResult", "Reconstruct", "capture", "host_for", "trace"]


def host_for(model: nn.Module, example_inputs: object = None) -> Host:
    """The host for a model: node for node where it is a flat ``GraphModule``, in place on the modules of any other."""
    if isinstance(model, fx.GraphModule):
        return GraphHost(model, example_inputs)
    return ModuleHost(model, example_inputs)
