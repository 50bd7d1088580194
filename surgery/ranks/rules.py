"""Rank rules: how many channels to leave in each mode of a layer, from its spectra.

A rule is any callable ``(site, spectra) -> answer``. ``spectra`` has one entry a mode (for Tucker the output channels, then the input channels; for
a layer of one pixel a single one) with ``values``, ``full``, ``mode`` and ``shape``. Of a grouped layer values and ranks are those of all groups
together: ranks are totals, and are rounded up to multiples of the groups. The answer is one rank a mode (an int where there is one mode),
None in the place of a mode that stays uncut, or a ``Keep`` with a reason. Rank 0 says that the rule saw nothing in that mode.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import ceil
from typing import Any

from passes.errors import SurgeryValueError
from passes.factorization import Factorization, Keep
from passes.linalg import Spectrum, running_sum
from passes.site import Site
from surgery.ranks.evbmf import evbmf_rank

__all__ = ["Energy", "Evbmf", "Fraction", "Rule", "Stable", "fraction_of"]

Answer = int | Sequence[int | None] | Factorization | Keep | None
Rule = Callable[[Site, tuple[Spectrum, ...]], Answer] | Callable[..., Any]


@dataclass(frozen=True, slots=True)
class Evbmf:
    """EVBMF's rank r of each mode (see ``evbmf``), weakened: r + weaken (full - r). A mode of rank 0 stays 0.

    ``weaken`` in [0, 1): 0 takes EVBMF as it is (Kim et al. 2016); the idea of weakening is MUSCO's (Gusak et al. 2019).
    ``noise``: what becomes of layers in which EVBMF sees nothing but noise, as early in training. None keeps them; a share in (0, 1] leaves them
    that share of the full rank in each mode; ``"tucker-1"`` half of it in the largest mode, the other uncut.
    """

    weaken: float = 0.0
    noise: float | str | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.weaken, int | float) or isinstance(self.weaken, bool) or not 0 <= self.weaken < 1:
            raise SurgeryValueError(f"Evbmf: weaken must be in [0, 1), got {self.weaken!r}")
        if self.noise is not None and self.noise != "tucker-1":
            _check_share("Evbmf: noise", self.noise)

    def __call__(self, site: Site, spectra: Sequence[Spectrum]) -> Answer:
        """One rank for each of the ``spectra`` of the ``site``, or why it is kept."""
        ranks = [_evbmf(s) for s in spectra]
        if not any(ranks):
            return self._of_noise(spectra)
        return [r and ceil(r + self.weaken * (s.full - r) - 1e-9) for r, s in zip(ranks, spectra, strict=True)]

    def _of_noise(self, spectra: Sequence[Spectrum]) -> Answer:
        if self.noise is None:
            return Keep("EVBMF sees nothing but noise in its weight (rank 0)")
        if isinstance(self.noise, str):
            largest = max(range(len(spectra)), key=lambda k: spectra[k].full)
            return [fraction_of(s.full, 0.5) if k == largest else None for k, s in enumerate(spectra)]
        return [fraction_of(s.full, self.noise) for s in spectra]


@dataclass(frozen=True, slots=True)
class Energy:
    """The smallest rank of each mode whose squared singular values hold ``share`` of their sum, share in (0, 1]."""

    share: float

    def __post_init__(self) -> None:
        _check_share("Energy: share", self.share)

    def __call__(self, site: Site, spectra: Sequence[Spectrum]) -> Answer:
        """One rank for each of the ``spectra`` of the ``site``, or why it is kept."""
        ranks = []
        for s in spectra:
            held = running_sum(s.values.square(), 0)
            if float(held[-1]) <= 0:
                return Keep("its weight is zero")
            ranks.append(1 + int((held < self.share * held[-1] * (1 - 1e-12)).sum()))
        return ranks


@dataclass(frozen=True, slots=True)
class Fraction:
    """The same share of the full rank in each mode, max(1, ceil(share * full)), share in (0, 1]."""

    share: float

    def __post_init__(self) -> None:
        _check_share("Fraction: share", self.share)

    def __call__(self, site: Site, spectra: Sequence[Spectrum]) -> Answer:
        """One rank for each of the ``spectra`` of the ``site``."""
        return [fraction_of(s.full, self.share) for s in spectra]


@dataclass(frozen=True, slots=True)
class Stable:
    """The stable rank of each mode, ceil(|W|_F^2 / s_1^2) (Rudelson and Vershynin 2007)."""

    def __call__(self, site: Site, spectra: Sequence[Spectrum]) -> Answer:
        """One rank for each of the ``spectra`` of the ``site``, or why it is kept."""
        if any(float(s.values[0]) <= 0 for s in spectra):
            return Keep("its weight is zero")
        return [ceil(float(s.values.square().sum() / s.values[0].square()) - 1e-9) for s in spectra]


def _evbmf(spectrum: Spectrum) -> int:
    """Of one group, times the groups: the solution is one for matrices without blocks of zeros."""
    groups = spectrum.groups
    return groups * evbmf_rank(spectrum.values[::groups], (spectrum.shape[0] // groups, spectrum.shape[1] // groups))


def fraction_of(full: int, share: float) -> int:
    """max(1, ceil(share * full)); rounding of the product does not raise the rank."""
    return max(1, ceil(share * full - 1e-9))


def _check_share(what: str, value: Any) -> None:
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value <= 1:
        raise SurgeryValueError(f"{what} must be in (0, 1], got {value!r}")
