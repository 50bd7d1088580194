"""The pass that fuses back: each chain becomes the layer it replaced."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from passes.geometry import Piece
from passes.host import Host
from passes.result import Outcome, PassResult
from passes.site import Site

__all__ = ["Reconstruct"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Reconstruct:
    """Chain -> layer, for every chain of the model that this project made.

    The function stays the same to rounding; the weight is that of the chain, not the one before truncation. Class, attributes and hooks of the
    layer come back. A second run changes nothing.
    """

    def __call__(self, host: Host) -> PassResult:
        restored: dict[str, Piece] = {}
        outcomes = tuple(self._treat(host, site, restored) for site in host.sites() if site.chain is not None)
        model = host.commit()
        return PassResult(model, any(o.status == "applied" for o in outcomes), outcomes)

    def _treat(self, host: Host, site: Site, restored: dict[str, Piece]) -> Outcome:
        if site.keep is not None:
            return Outcome(site.name, "kept", site.keep)
        if site.tied_to in restored:
            weight = restored[site.tied_to].weight
        else:
            with torch.no_grad():
                weight = site.weight
        restored[site.name] = host.restore(site, Piece("", site.geometry, weight, None))
        return Outcome(site.name, "applied")
