"""The pass that merges neighbouring pointwise layers, also across the borders of chains."""

from __future__ import annotations

from dataclasses import dataclass

from passes.fusion import fused_geometry
from passes.geometry import Geometry
from passes.host import Host
from passes.neighbours import Neighbour
from passes.result import PassResult
from passes.runs import Part, fuse_runs
from passes.site import is_layer

__all__ = ["MergePointwise"]


@dataclass(frozen=True, slots=True, kw_only=True)
class MergePointwise:
    """1x1, 1x1 -> 1x1 where that lowers MACs: the ``expand`` of a chain and the ``reduce`` of the next, or a plain 1x1 or linear layer beside one.

    Where the calls are not known, parameters must fall instead. Layers of one chain alone are never merged with each other: that is what
    ``Reconstruct`` does. A chain that lost a layer, or has one of other channels, is a chain no more: its layers stay under their names, and it
    cannot be reconstructed. A layer is kept where it is not proved that nothing else reads in between, and where it must stay itself. A second
    run changes nothing.
    """

    def __call__(self, host: Host) -> PassResult:
        return fuse_runs(host, wanted=_is_pointwise, rule=_rule, subject=_is_pointwise)


def _is_pointwise(member: Neighbour) -> bool:
    return is_layer(member.module) and Geometry.of(member.module).is_pointwise


def _rule(left: Part, right: Part) -> str | None:
    chain = left.members[-1].chain
    if chain is not None and all(member.chain == chain for member in left.members + right.members):
        return f"both are layers of the chain {chain}, which Reconstruct fuses"
    whole = fused_geometry(left.piece.geometry, right.piece.geometry)
    if isinstance(whole, str):
        return whole
    before, after = (left.macs(), right.macs()), left.macs(whole)
    if before[0] is None or before[1] is None or after is None:
        grown = whole.weights >= left.piece.geometry.weights + right.piece.geometry.weights
        return "merged they would have no fewer parameters" if grown else None
    return "merged they would take no fewer MACs" if after >= before[0] + before[1] else None
