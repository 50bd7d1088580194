"""The pass that cuts: each assigned layer becomes the chain of its factorization."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from passes.blockwise import Blockwise
from passes.errors import SurgeryTypeError, SurgeryValueError, nearest
from passes.factorization import Decision, Factorization, Keep
from passes.geometry import Piece
from passes.host import Host, tied_pieces
from passes.kinds import kind_of
from passes.result import Outcome, PassResult
from passes.site import Site
from passes.spectra import Spectra, usable_weight

__all__ = ["ALREADY", "Decompose", "most_ranks", "refusal_of", "refusal_of_ranks", "settled"]

ALREADY = "already decomposed"


@dataclass(frozen=True, slots=True, kw_only=True)
class Decompose:
    """Layer -> chain, for every site that ``assignment`` names.

    Assumes nothing of the model; what it cannot cut it keeps, with a reason. A chain that is named is merged and cut again, at ranks up to its
    own; a mode given as None keeps the chain's rank. A layer that is tied to another gets the same chain, with the same parameters. A second run
    changes nothing. Everything is computed before anything is put in place, except on a private host.

    Args:
        assignment: a factorization or ``Keep`` for each site name; sites not named are kept. Each is looked up when its site's turn comes.
        spectra: the store that spectra are taken from, one's own by default; a site's are let go when it has been treated.
        device: where to compute; results go back to the weight's own device.
        progress: called with each site before it is cut.
    """

    assignment: Mapping[str, Decision]
    spectra: Spectra | None = None
    device: torch.device | str | None = None
    progress: Callable[[Site], None] | None = None

    def __call__(self, host: Host) -> PassResult:
        sites = host.sites()
        _check_names(self.assignment, sites)
        spectra = self._own_spectra(sites) if self.spectra is None else self.spectra
        done: dict[str, _Done] = {}
        outcomes = tuple(self._treat(host, site, spectra, done) for site in sites)
        model = host.commit()
        return PassResult(model, any(o.status == "applied" for o in outcomes), outcomes)

    def _own_spectra(self, sites: Sequence[Site]) -> Spectra:
        decisions = [(site, self.assignment.get(site.name)) for site in sites if site.keep is None]
        return Spectra([(site, kind_of(d)) for site, d in decisions if isinstance(d, Factorization)], self.device)

    def _treat(self, host: Host, site: Site, spectra: Spectra, done: dict[str, _Done]) -> Outcome:
        if self.progress is not None:
            self.progress(site)
        if site.tied_to is not None:
            return self._treat_alike(host, site, done[site.tied_to])
        decision = self.assignment.get(site.name, Keep(ALREADY if site.chain else "not assigned"))
        reason = _reason_to_keep(site, decision)
        if reason is None:
            factorization = settled(site, decision)  # type: ignore[arg-type]
            pieces, error = self._split(site, factorization, spectra)
            placed = host.replace(site, factorization, pieces)
            outcome = Outcome(site.name, "applied", None, error, spectra=spectra.outlines(site, kind_of(factorization)))
            done[site.name] = _Done(decision, outcome, placed, factorization)
        else:
            outcome = Outcome(site.name, "kept", reason, spectra=spectra.outlines(site))
            done[site.name] = _Done(decision, outcome)
        spectra.let_go(site)
        return outcome

    def _treat_alike(self, host: Host, site: Site, first: _Done) -> Outcome:
        """As the first layer with this weight was treated: the same factors, the very same parameters."""
        decision = self.assignment.get(site.name, first.decision)
        both_kept = isinstance(decision, Keep) and isinstance(first.decision, Keep)
        if decision != first.decision and not both_kept:
            raise SurgeryValueError(
                f"{site}: shares its weight with {site.tied_to}, which gets {first.decision}; assign the same to both, or to the first only"
            )
        if first.factorization is not None:
            host.replace(site, first.factorization, tied_pieces(site, first.factorization, first.pieces))
        if first.outcome.status == "applied":
            return replace(first.outcome, site=site.name)
        return Outcome(site.name, "kept", decision.reason if isinstance(decision, Keep) else site.keep or first.outcome.reason)

    def _split(self, site: Site, factorization: Factorization, spectra: Spectra) -> tuple[tuple[Piece, ...], float]:
        kind = kind_of(factorization)
        pieces = spectra.split(site, kind, factorization)
        weight = usable_weight(site, self.device)
        rounded = [Piece(p.name, p.geometry, p.weight.to(site.dtype), None) for p in pieces]
        if not all(bool(torch.isfinite(p.weight.abs().amax())) for p in rounded):
            raise SurgeryValueError(f"{site}: the factors of its weight overflow {site.dtype}; decompose in a wider dtype or exclude this layer")
        rounded = [Piece(p.name, p.geometry, p.weight.double(), None) for p in rounded]
        norm, gap = float(weight.norm()), float((kind.merge(rounded, site.geometry) - weight).norm())
        return pieces, gap / norm if norm > 0 else 0.0


@dataclass(frozen=True, slots=True, eq=False)
class _Done:
    """What became of a site: the chain's layers and factorization, where it was cut."""

    decision: Decision
    outcome: Outcome
    pieces: tuple[Piece, ...] = ()
    factorization: Factorization | None = None


def _reason_to_keep(site: Site, decision: Decision) -> str | None:
    if isinstance(decision, Keep):
        return decision.reason
    if not isinstance(decision, Factorization):
        raise SurgeryTypeError(f"the assignment of {site.name!r} must be a factorization or Keep, got {decision!r}")
    if site.keep is not None:
        return site.keep
    refusal = refusal_of(site, decision)
    if refusal is None and site.chain == settled(site, decision):
        return ALREADY
    return refusal


def refusal_of(site: Site, factorization: Factorization) -> str | None:
    """Why this factorization cannot be applied to the site's layer or chain, or None where it can."""
    kind = kind_of(factorization)
    return kind.refuses(site.geometry) or refusal_of_ranks(site, kind, factorization.ranks)


def refusal_of_ranks(site: Site, kind: Blockwise, ranks: tuple[int | None, ...]) -> str | None:
    """Likewise for ranks of a kind that can be applied to the layer."""
    refused = kind.refuses_ranks(site.geometry, ranks)
    if refused is not None:
        return refused
    whose = "the chain's own rank" if _cut_again(site, kind) else "its full rank"
    for mode, rank, most in zip(kind.modes, ranks, most_ranks(site, kind), strict=True):
        if rank is not None and rank > most:
            return f"rank {rank} of mode {mode!r} is above {whose} {most}"
    return None


def most_ranks(site: Site, kind: Blockwise) -> tuple[int, ...]:
    """For each mode the largest rank that a cut can have: the full rank; for a chain of the same kind its own, since nothing more is there."""
    full = kind.full_ranks(site.geometry)
    if not _cut_again(site, kind):
        return full
    return tuple(f if rank is None else min(f, rank) for f, rank in zip(full, site.chain.ranks, strict=True))  # type: ignore[union-attr]


def settled(site: Site, factorization: Factorization) -> Factorization:
    """What a factorization that is not refused comes to at this site: clipped to what its chain can use; on a chain, None keeps its rank."""
    kind = kind_of(factorization)
    ranks = factorization.ranks
    if _cut_again(site, kind):
        ranks = tuple(had if rank is None else rank for rank, had in zip(ranks, site.chain.ranks, strict=True))  # type: ignore[union-attr]
    return kind.from_ranks(site.geometry, ranks)


def _cut_again(site: Site, kind: Blockwise) -> bool:
    return site.chain is not None and kind_of(site.chain) is kind


def _check_names(assignment: Mapping[str, Decision], sites: Sequence[Site]) -> None:
    known = {site.name for site in sites}
    for name in assignment:
        if name not in known:
            raise SurgeryValueError(f"the assignment names {name!r}, which is no layer of this model: {nearest(name, known)}")
