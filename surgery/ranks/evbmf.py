"""Ranks by empirical variational Bayes matrix factorization, from its analytic solution.

Nakajima, Sugiyama, Babacan, Tomioka, "Global analytic solution of fully-observed variational Bayesian matrix factorization", JMLR 14 (2013),
theorems 2 and 3 and section 3.3 for the noise variance; first published as Nakajima et al., "Perfect dimensionality recovery by variational
Bayesian PCA", NIPS 2012. Used for the ranks of convolutions by Kim et al. 2016.
"""

from __future__ import annotations

from math import ceil, sqrt
from typing import Any

import numpy as np
import torch
from torch import Tensor

from passes.errors import SurgeryTypeError, SurgeryValueError
from passes.linalg import spectrum

__all__ = ["evbmf", "evbmf_rank", "usable"]

TAU_SLOPE = 2.5129  # tau_bar / sqrt(alpha), JMLR 14, equation 24
RESOLUTION = 1e-5  # of the noise variance, absolute, as in published implementations: ranks reported with them depend on it
FINEST_SHARE = 1 / 40  # of the variance's upper bound: a weight of small numbers is never searched more coarsely than this


def evbmf(weight: Tensor) -> tuple[int, int]:
    """Raw ranks (rank_out, rank_in) of a weight's two channel unfoldings, before any guard; 0 says that nothing but noise is seen.

    Args:
        weight: (C_out, C_in, *kernel) of a convolution, or (C_out, C_in) of a linear layer; any float dtype.

    Returns:
        The ranks of the (C_out) x (C_in * kernel) and the (C_in) x (C_out * kernel) matrix.

    Raises:
        SurgeryTypeError: not a floating-point tensor.
        SurgeryValueError: fewer than two dimensions, no elements, or values that are not finite.

    Source: Nakajima et al. 2013 (JMLR 14), theorems 2 and 3, section 3.3; on convolutions Kim et al. 2016, section 3.2.
    """
    usable(weight, "evbmf")
    weight = weight.detach().double()
    spectra = (spectrum(weight.movedim(mode, 0).flatten(1), name) for mode, name in ((0, "out"), (1, "in")))
    rank_out, rank_in = (evbmf_rank(s.values, s.shape) for s in spectra)
    return rank_out, rank_in


def usable(weight: Tensor, caller: str) -> None:
    """Refuse what is no weight of a layer, in the name of the caller."""
    if not isinstance(weight, Tensor) or not weight.is_floating_point():
        raise SurgeryTypeError(f"{caller}: weight must be a floating-point tensor, got {getattr(weight, 'dtype', type(weight).__name__)}")
    if weight.ndim < 2 or weight.numel() == 0:
        raise SurgeryValueError(f"{caller}: weight must be (C_out, C_in, *kernel) and not empty, got shape {tuple(weight.shape)}")
    if not bool(torch.isfinite(weight).all()):
        raise SurgeryValueError(f"{caller}: weight has values that are not finite")


def evbmf_rank(values: Tensor, shape: tuple[int, int]) -> int:
    """Rank of a matrix of this shape from its singular values alone; unchanged by transposition.

    The noise variance minimises the free energy by one bounded search (Brent) between the bounds of theorem 9. On trained weights the free
    energy can fall all the way to a noise variance of almost nothing, and then the rank depends on where the search stops: it stops at the
    same absolute resolution as published implementations, so that ranks compare with theirs. Where the minimum is well inside the bounds, as
    for a low-rank matrix with noise, the rank is also unchanged by scaling.

    Args:
        values: (min(shape),) singular values, largest first.
        shape: (rows, columns) of the matrix, in any order.
    """
    rows, columns = min(shape), max(shape)
    squares = values.detach().to("cpu", torch.float64).square().numpy()
    total = float(squares.sum())
    if total <= 0:
        return 0
    squares = np.maximum(squares, total * np.finfo(np.float64).eps ** 2)  # an exact zero would make the free energy infinite
    alpha = rows / columns
    tau_bar = TAU_SLOPE * sqrt(alpha)
    x_bar = (1 + tau_bar) * (1 + alpha / tau_bar)
    variance = _noise_variance(squares, rows, columns, x_bar)
    return int((squares > columns * variance * x_bar).sum())


def _noise_variance(squares: np.ndarray[Any, Any], rows: int, columns: int, x_bar: float) -> float:
    """The noise variance of least free energy within the bounds of JMLR 14, theorem 9."""
    from scipy.optimize import minimize_scalar

    alpha = rows / columns
    most = min(ceil(rows / (1 + alpha)) - 1, rows) - 1  # index of the last component that could be signal
    rest = squares[most + 1 :]
    upper = float(squares.sum()) / (rows * columns)
    lower = min(max(float(rest[0]) / (columns * x_bar), float(rest.mean()) / columns), upper)
    found = minimize_scalar(
        _free_energy,
        args=(squares, columns, alpha, x_bar),
        bounds=(lower, upper),
        method="bounded",
        options={"xatol": min(RESOLUTION, FINEST_SHARE * upper)},
    )
    return float(found.x)


def _free_energy(variance: float, squares: np.ndarray[Any, Any], columns: int, alpha: float, x_bar: float) -> float:
    """The free energy at a noise variance, up to a constant (JMLR 14, equation 29)."""
    x = squares / (columns * variance)
    noise, signal = x[x <= x_bar], x[x > x_bar]
    centred = signal - (1 + alpha)
    tau = (centred + np.sqrt(np.maximum(centred**2 - 4 * alpha, 0))) / 2
    above = signal - tau + np.log((tau + 1) / signal) + alpha * np.log(tau / alpha + 1)
    return float((noise - np.log(noise)).sum() + above.sum())
