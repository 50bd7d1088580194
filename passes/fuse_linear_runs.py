"""The pass that fuses linear runs somebody wrote by hand: chains that are not this project's."""

from __future__ import annotations

from dataclasses import dataclass

from passes.host import Host
from passes.neighbours import Neighbour, is_norm
from passes.result import PassResult
from passes.runs import fuse_runs
from passes.site import is_layer

__all__ = ["FuseLinearRuns"]


@dataclass(frozen=True, slots=True, kw_only=True)
class FuseLinearRuns:
    """1x1, k x k, 1x1 -> k x k;  k x 1, 1 x k -> k x k;  layer, batch norm in eval -> layer;  and all other linear runs with an exact product.

    Assumes eval semantics. Fuses whatever the cost, as it is asked to undo what was written: outcomes hold parameters and MACs before and after.
    Chains of this project it never touches. A layer is kept where it is not proved that nothing else reads in between, where the product is not
    one layer (see ``passes.fusion``), or where it must stay itself: hooks, shared or computed weights. A second run changes nothing.
    """

    def __call__(self, host: Host) -> PassResult:
        return fuse_runs(host, wanted=_ours_not, rule=lambda left, right: None, subject=_subject)


def _ours_not(member: Neighbour) -> bool:
    return member.chain is None


def _subject(member: Neighbour) -> bool:
    return member.chain is None and (is_layer(member.module) or is_norm(member.module))
