"""Cuts networks: finds the layers that can be factorized, splits weights into chains, merges chains back, rewrites models.

This package computes what it is told; it never chooses a rank, never loops over data and never prints. Deciding is ``surgery``'s.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import fx, nn

from passes.capture import capture, observe_calls, observe_shapes, trace
from passes.decompose import Decompose
from passes.drop_identities import DropIdentities
from passes.fold_batch_norm import FoldBatchNorm
from passes.fuse_linear_runs import FuseLinearRuns
from passes.graph_host import GraphHost
from passes.host import Host
from passes.merge_pointwise import MergePointwise
from passes.module_host import ModuleHost
from passes.pipeline import Pass, name_of, run_pipeline
from passes.reconstruct import Reconstruct
from passes.result import Outcome, PassResult

__all__ = [
    "CLEANUP_PASSES",
    "Decompose",
    "DropIdentities",
    "FoldBatchNorm",
    "FuseLinearRuns",
    "GraphHost",
    "Host",
    "MergePointwise",
    "ModuleHost",
    "Outcome",
    "Pass",
    "PassResult",
    "Reconstruct",
    "capture",
    "host_for",
    "name_of",
    "observe",
    "run_pipeline",
    "trace",
]

CLEANUP_PASSES: tuple[type[Pass], ...] = (FuseLinearRuns, FoldBatchNorm, MergePointwise, DropIdentities)
"""Passes after which a network no longer is the architecture that it was made as: it is exported, not saved."""


def observe(model: nn.Module, example_inputs: Any) -> Mapping[str, Any]:
    """What the host of this model would learn from these inputs, for it or for the host of a copy; run on a copy that is then dropped."""
    return observe_shapes(model, example_inputs) if isinstance(model, fx.GraphModule) else observe_calls(model, example_inputs)


def host_for(model: nn.Module, example_inputs: Any = None, *, observed: Mapping[str, Any] | None = None, private: bool = False) -> Host:
    """The host for a model: node for node where it is a flat ``GraphModule``, in place on the modules of any other."""
    if isinstance(model, fx.GraphModule):
        return GraphHost(model, example_inputs, observed=observed, private=private)
    return ModuleHost(model, example_inputs, observed=observed, private=private)
