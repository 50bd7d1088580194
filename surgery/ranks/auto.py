"""``method="auto"``: at the cost of the Tucker chain that a rule asks for, the kind with the smallest error."""

from __future__ import annotations

from math import lcm, sqrt

from passes.blockwise import Blockwise
from passes.factorization import Factorization
from passes.kinds import all_kinds, kind_of
from passes.site import Site
from passes.spectra import Spectra
from surgery.cost import macs_under

__all__ = ["best_kind", "error_at"]


def best_kind(site: Site, asked: Factorization, spectra: Spectra, round_to: int) -> Factorization:
    """``asked``, or the factorization of another kind that has a smaller error at no more MACs (weights, where the calls are not known).

    Each kind that has spectra takes its largest rank within that cost, a multiple of ``round_to`` and of its unit. What alternating methods reach
    is computed only where their bounds leave the choice open.
    """
    budget = _cost(site, asked)
    best, least = asked, float("inf")
    for kind in all_kinds():
        if kind is kind_of(asked) or not kind.has_spectra or kind.refuses(site.geometry) is not None:
            continue
        found = _largest_within(site, kind, budget, round_to)
        if found is not None and (error := error_at(site, found, spectra)) < least:
            best, least = found, error
    most = error_at(site, asked, spectra)  # an upper bound, and at most sqrt(2) times what the iteration can reach
    if best is asked or most <= least or (least >= most / sqrt(2) and _reached(site, asked, spectra) <= least):
        return asked
    return best


def _cost(site: Site, factorization: Factorization) -> int:
    return macs_under(site, factorization) or sum(shape.params for shape in kind_of(factorization).shapes(site.geometry, factorization, False))


def _largest_within(site: Site, kind: Blockwise, budget: int, round_to: int) -> Factorization | None:
    """The largest rank of a kind, of several modes the largest share of all, by bisection: cost grows with rank."""
    step = lcm(round_to, kind.unit(site.geometry))
    steps = [full // step for full in kind.full_ranks(site.geometry)]
    low, high = 0, max(steps) if min(steps) else 0

    def at(count: int) -> Factorization:
        return kind.from_ranks(site.geometry, [step * max(1, own * count // max(steps)) for own in steps])

    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if _cost(site, at(middle)) <= budget else (low, middle - 1)
    return at(low) if low else None


def error_at(site: Site, factorization: Factorization, spectra: Spectra) -> float:
    """The relative error of a factorization, from the error surface of its kind; a mode that is uncut is at its full rank."""
    kind = kind_of(factorization)
    surface = spectra.error_surface(site, kind)
    unit = kind.unit(site.geometry)
    full = kind.full_ranks(site.geometry)
    return float(surface[tuple((f if r is None else r) // unit for r, f in zip(factorization.ranks, full, strict=True))])


def _reached(site: Site, factorization: Factorization, spectra: Spectra) -> float:
    kind = kind_of(factorization)
    weight = spectra.weight(site, kind)
    pieces = kind.split(weight, None, site.geometry, factorization, spectra.of(site, kind))
    return float((kind.merge(pieces, site.geometry) - weight).norm() / weight.norm())
