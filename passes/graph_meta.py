"""What a flat ``GraphModule`` remembers of its chains, in ``gm.meta``: it survives deepcopy, where the chain's module does not."""

from __future__ import annotations

from torch import fx, nn

from passes.chain import Chain, ChainInfo, without_hooks
from passes.site import named_groups

__all__ = ["CHAINS", "chains_of_modules", "decomposed_graphs"]

CHAINS = "surgery_chains"
"""Key in ``gm.meta``: a mapping from a chain's name to its ``ChainInfo``, replaced as a whole and never changed in place."""


def chains_of_modules(model: nn.Module) -> dict[str, ChainInfo]:
    """The chains of a model by first name."""
    chains = {}
    for module, names in named_groups(model):
        if isinstance(module, Chain):
            info: ChainInfo = module.__dict__["_surgery"]
            chains[names[0]] = ChainInfo(info.factorization, without_hooks(info.original))  # the trace has recorded what its hooks did
    for prefix, graph in decomposed_graphs(model).items():
        chains |= {f"{prefix}.{name}": info for name, info in graph.meta[CHAINS].items()}
    return chains


def decomposed_graphs(model: nn.Module) -> dict[str, fx.GraphModule]:
    """The graph modules inside a model, by first name, whose chains are nodes."""
    return {names[0]: module for module, names in named_groups(model) if names[0] and isinstance(module, fx.GraphModule) and module.meta.get(CHAINS)}
