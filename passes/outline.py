"""The outline of a spectrum: few numbers that are kept after the spectrum itself is let go, for people to look at."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from passes.linalg import Spectrum

__all__ = ["MOST", "Outline", "outline_of", "places"]

MOST = 48  # values that an outline keeps


@dataclass(frozen=True, slots=True, kw_only=True)
class Outline:
    """Singular values of one unfolding of a weight as it was before it was cut.

    Attributes:
        mode: name of the rank that they are about.
        full: how many singular values there are, the full rank.
        values: those at ``places(full)``, as shares of the largest, with six digits.
        weighted: they are of the weight as a metric weights it (calibration), not of the weight itself.
    """

    mode: str
    full: int
    values: tuple[float, ...]
    weighted: bool = False


def places(full: int) -> tuple[int, ...]:
    """Which of ``full`` values an outline keeps: all of few, else evenly spread ones with the first and the last, counted from 0."""
    if full <= MOST:
        return tuple(range(full))
    return tuple(round(i * (full - 1) / (MOST - 1)) for i in range(MOST))


def outline_of(spectrum: Spectrum, *, weighted: bool = False) -> Outline:
    kept: Tensor = spectrum.values[list(places(spectrum.full))]
    found = kept.tolist()
    largest = found[0] if found and found[0] > 0 else 1.0
    return Outline(mode=spectrum.mode, full=spectrum.full, values=tuple(float(f"{value / largest:.6g}") for value in found), weighted=weighted)
