"""The pass that folds batch norms in eval mode into the layers before them."""

from __future__ import annotations

from dataclasses import dataclass

from passes.host import Host
from passes.neighbours import is_norm
from passes.result import PassResult
from passes.runs import Part, fuse_runs

__all__ = ["FoldBatchNorm"]


@dataclass(frozen=True, slots=True, kw_only=True)
class FoldBatchNorm:
    """Layer, batch norm -> layer;  chain, batch norm -> chain, folded into its last layer.

    w' = w * g / sqrt(var + eps), b' = (b - mean) * g / sqrt(var + eps) + beta (Jacob et al. 2018, section 3.2), for convolutions of any kind and
    linear layers. A chain stays a chain. A batch norm is kept in train mode, without running statistics, where it is not proved to be the only
    reader of one layer, and where layer or batch norm must stay itself: hooks, shared or computed weights. A second run changes nothing.
    """

    def __call__(self, host: Host) -> PassResult:
        return fuse_runs(host, wanted=lambda member: True, rule=_rule, subject=lambda member: is_norm(member.module), backward=True)


def _rule(left: Part, right: Part) -> str | None:
    if right.layers:
        return "no batch norm follows"
    return None if left.layers else "no layer stands before the batch norm"
