"""The pass that cuts: each assigned layer becomes the chain of its factorization."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from passes.errors import SurgeryError, SurgeryValueError, nearest
from passes.factorization import Decision, Factorization, Keep
from passes.geometry import Piece
from passes.host import Host
from passes.kinds import kind_of
from passes.linalg import Spectrum, spectrum
from passes.result import Outcome, PassResult
from passes.site import Site

__all__ = ["ALREADY", "Decompose", "site_spectra"]

ALREADY = "already decomposed"


def site_spectra(site: Site, kind: Any, device: torch.device | str | None = None) -> tuple[Spectrum, ...]:
    """Spectra of the site's weight, one for each unfolding of the kind, computed in float64 on ``device`` (the weight's by default).

    Raises:
        SurgeryValueError: the weight has values that are not finite, or has none (meta device).
    """
    weight = _usable(site).to(device=device, dtype=torch.float64)
    matrices = kind.unfoldings(weight, site.geometry)
    return tuple(spectrum(matrix, mode) for matrix, mode in zip(matrices, kind.modes, strict=True))


@dataclass(frozen=True, slots=True, kw_only=True)
class Decompose:
    """Layer -> chain, for every site that ``assignment`` names.

    Assumes nothing of the model; what it cannot cut it keeps, with a reason. A chain that is named is merged and cut again at the new ranks.
    A second run changes nothing. Everything is computed before anything is put in place.

    Args:
        assignment: a factorization or ``Keep`` for each site name; sites not named are kept.
        spectra: those of sites where they are known already; the others are computed.
        device: where to compute; results go back to the weight's own device.
        progress: called with each site before it is cut.
    """

    assignment: Mapping[str, Decision]
    spectra: Mapping[str, Sequence[Spectrum]] = field(default_factory=dict)
    device: torch.device | str | None = None
    progress: Callable[[Site], None] | None = None

    def __call__(self, host: Host) -> PassResult:
        sites = host.sites()
        _check_names(self.assignment, sites)
        outcomes = tuple(self._treat(host, site) for site in sites)
        model = host.commit()
        return PassResult(model, any(o.status == "applied" for o in outcomes), outcomes)

    def _treat(self, host: Host, site: Site) -> Outcome:
        if self.progress is not None:
            self.progress(site)
        decision = self.assignment.get(site.name, Keep(ALREADY if site.chain else "not assigned"))
        if isinstance(decision, Keep):
            return Outcome(site.name, "kept", decision.reason)
        if site.keep is not None:
            return Outcome(site.name, "kept", site.keep)
        if site.chain == decision:
            return Outcome(site.name, "kept", ALREADY)
        refusal = refusal_of(site, decision)
        if refusal is not None:
            return Outcome(site.name, "kept", refusal)
        pieces, error = self._split(site, decision)
        host.replace(site, decision, pieces)
        return Outcome(site.name, "applied", None, error)

    def _split(self, site: Site, factorization: Factorization) -> tuple[tuple[Piece, ...], float]:
        kind = kind_of(factorization)
        weight = _usable(site).to(device=self.device, dtype=torch.float64)
        spectra = self.spectra.get(site.name)
        if spectra is None or site.chain is not None:
            spectra = site_spectra(site, kind, self.device)
        pieces = kind.split(weight, site.bias, site.geometry, factorization, spectra)
        rounded = [Piece(p.name, p.geometry, p.weight.to(site.dtype).double(), None) for p in pieces]
        if not all(bool(torch.isfinite(p.weight).all()) for p in rounded):
            raise SurgeryValueError(f"{site}: the factors of its weight overflow {site.dtype}; decompose in a wider dtype or exclude this layer")
        norm = float(weight.norm())
        error = float((kind.merge(rounded) - weight).norm()) / norm if norm > 0 else 0.0
        return pieces, error


def refusal_of(site: Site, factorization: Factorization) -> str | None:
    """Why this factorization cannot be applied to the site's layer, or None where it can."""
    kind = kind_of(factorization)
    reason = kind.refuses(site.geometry)
    if reason is not None:
        return reason
    for mode, rank, full in zip(kind.modes, factorization.ranks, kind.full_ranks(site.geometry), strict=True):
        if rank is not None and rank > full:
            return f"rank {rank} of mode {mode!r} is above its full rank {full}"
    return None


def _usable(site: Site) -> Tensor:
    weight = site.weight
    if weight.is_meta:
        raise SurgeryValueError(f"{site}: its weight is on the meta device and has no numbers; load weights first")
    if not bool(torch.isfinite(weight).all()):
        count = int((~torch.isfinite(weight)).sum())
        raise SurgeryValueError(f"{site}: {count} of {weight.numel()} weights are not finite; repair or exclude this layer")
    return weight


def _check_names(assignment: Mapping[str, Decision], sites: Sequence[Site]) -> None:
    known = {site.name for site in sites}
    for name in assignment:
        if name not in known:
            raise SurgeryValueError(f"the assignment names {name!r}, which is no layer of this model: {nearest(name, known)}")
    for name, decision in assignment.items():
        if not isinstance(decision, Factorization | Keep):
            raise SurgeryError(f"the assignment of {name!r} must be a factorization or Keep, got {decision!r}")
