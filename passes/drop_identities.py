"""The pass that drops modules which give their input back."""

from __future__ import annotations

from collections.abc import Mapping, Set
from dataclasses import dataclass
from typing import Any

from torch import nn

from passes.host import Host
from passes.neighbours import Neighbour, is_batch_norm
from passes.result import Outcome, PassResult
from passes.site import is_layer

__all__ = ["DropIdentities"]

DROPOUTS = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout)
AVERAGES = (nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d)
MAXIMA = (nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d)


@dataclass(frozen=True, slots=True, kw_only=True)
class DropIdentities:
    """x -> x  ->  nothing, for ``nn.Identity``, dropout in eval mode or of probability 0, and pooling over a single pixel.

    Pooling makes a copy, which matters to whoever works in place on it: it is dropped only right after a layer or batch norm whose output it alone
    reads. On a graph the nodes disappear; inside a module of any class they are kept, because their parent calls them. A second run changes
    nothing.
    """

    def __call__(self, host: Host) -> PassResult:
        neighbours = host.neighbours()
        outcomes = []
        dropped: set[str] = set()
        for name, member in neighbours.items():  # in the order of their calls: what comes before is decided
            reason = _why_it_works(member, neighbours, dropped)
            if reason is not None:
                reason = member.keep or reason or host.drop(name)
                if reason is None:
                    dropped.add(name)
                outcomes.append(Outcome(name, "applied" if reason is None else "kept", reason))
        model = host.commit()
        return PassResult(model, any(o.status == "applied" for o in outcomes), tuple(outcomes))


def _why_it_works(member: Neighbour, neighbours: Mapping[str, Neighbour], dropped: Set[str]) -> str | None:
    """Why a module that could be an identity still does something, empty where it does nothing; None for any other module."""
    module: Any = member.module
    if "forward" in vars(module):
        return None
    if type(module) is nn.Identity:
        return ""
    if type(module) in DROPOUTS:
        return "it is in train mode" if module.training and module.p > 0 else ""
    if type(module) in AVERAGES + MAXIMA and _is_one_pixel(module):
        before = member.source
        while before is not None and before in dropped:
            before = neighbours[before].source
        source = None if before is None else neighbours[before].module
        fresh = source is not None and (is_layer(source) or is_batch_norm(source))
        return "" if fresh else "it makes a copy, and something else may read what it copies"
    return None


def _is_one_pixel(pool: Any) -> bool:
    def every(value: Any, number: int) -> bool:
        return all(n == number for n in (value if isinstance(value, tuple) else (value,)))

    one = every(pool.kernel_size, 1) and every(pool.stride, 1) and every(pool.padding, 0)
    return one and not getattr(pool, "return_indices", False) and getattr(pool, "divisor_override", None) in (None, 1)
