"""CP decomposition of a convolution: a sum of outer products (Lebedev et al. 2015, section 3), fitted by tensorly's alternating least squares.

Conv C_in -> C_out, kernel k x l  ->  reduce: Conv C_in -> rank, 1x1; height: depthwise k x 1; width: depthwise 1 x l; expand: 1x1.
Each depthwise layer has the stride, padding, padding mode and dilation of its direction, the bias is the last layer's. In one dimension there is
one depthwise layer, in three there are three; a direction in which the kernel is a single pixel has none.

The best factorization of a rank may not exist, and alternating least squares finds a local one (Kolda and Bader 2009, section 3.4), so nothing can
be read from spectra: ranks must be given. They are fitted one after the other, each from the one before and one more component, and from a random
start; the better of the two stays. So the error never grows with the rank.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from passes.errors import SurgeryValueError
from passes.factorization import Factorization
from passes.geometry import Geometry
from passes.kind import Kind, Rank
from passes.linalg import Spectrum

__all__ = ["CP", "CP_KIND"]

DIRECTIONS = ("depth", "height", "width")
SWEEPS = 60  # of alternating least squares for each rank and start, at most
TOLERANCE = 1e-6  # change of the relative error over one sweep at which it stops
EXACT = 1e-9  # a relative error at which nothing is left to fit


@dataclass(frozen=True, slots=True)
class CP(Factorization):
    """How many outer products are summed."""

    kind: ClassVar[str] = "cp"

    rank: int


class CPKind(Kind):
    """Conv k x l  ->  1x1, depthwise k x 1, depthwise 1 x l, 1x1. Assumes a kernel of more than one pixel."""

    factorization = CP
    modes = ("components",)
    has_spectra = False

    def refuses(self, geometry: Geometry) -> str | None:
        return "a layer of one pixel has two modes only: SVD factorizes it" if geometry.is_pointwise else None

    def full_ranks(self, geometry: Geometry) -> tuple[int, ...]:
        """An upper bound of the tensor's rank: the product of all dimensions but the largest (Kolda and Bader 2009, section 3.1)."""
        sizes = (geometry.out_channels, geometry.in_channels, *geometry.kernel)
        return (prod(sizes) // max(sizes),)

    def from_ranks(self, geometry: Geometry, ranks: Sequence[Rank]) -> CP:
        (rank,) = ranks
        return CP(self.full_ranks(geometry)[0] if rank is None else rank)

    def unfoldings(self, weight: Tensor) -> tuple[Tensor, ...]:
        return ()

    def shapes(self, geometry: Geometry, factorization: Factorization) -> Mapping[str, Geometry]:
        rank: Any = factorization.ranks[0]
        names = _directions(geometry.kernel)
        first = next(iter(names))
        flat = {axis for axis in range(geometry.dims) if axis not in names}  # a stride or padding in these is the first layer's
        along = {name: geometry.along({axis} | (flat if axis == first else set()), rank, rank, groups=rank) for axis, name in names.items()}
        return {"reduce": geometry.pointwise(geometry.in_channels, rank)} | along | {"expand": geometry.pointwise(rank, geometry.out_channels)}

    def split(self, weight: Tensor, factorization: Factorization, spectra: Sequence[Spectrum]) -> Mapping[str, Tensor]:
        rank: Any = factorization.ranks[0]
        kernel = tuple(weight.shape[2:])
        out, into, *filters = _fit(weight, rank)
        ones = (1,) * len(kernel)
        weights = {"reduce": into.mT.reshape(rank, -1, *ones), "expand": out.reshape(-1, rank, *ones)}
        for (axis, name), factor in zip(_directions(kernel).items(), filters, strict=True):
            weights[name] = factor.mT.reshape(rank, 1, *(k if a == axis else 1 for a, k in enumerate(kernel)))
        return weights

    def error_surface(self, weight: Tensor, spectra: Sequence[Spectrum]) -> Tensor:
        raise SurgeryValueError("cp: the error at a rank is not known without fitting it; decompose at the ranks in question and read the report")

    def merge(self, weights: Mapping[str, Tensor], geometry: Geometry) -> Tensor:
        first, *others = (weights[name] for name in _directions(geometry.kernel).values())
        filters = first
        for other in others:
            filters = filters * other
        return torch.einsum("or,ri,r...->oi...", weights["expand"].flatten(1), weights["reduce"].flatten(1), filters[:, 0])


def _directions(kernel: Sequence[int]) -> dict[int, str]:
    """The directions in which the kernel extends, by axis."""
    names = DIRECTIONS[len(DIRECTIONS) - len(kernel) :]
    return {axis: names[axis] for axis, k in enumerate(kernel) if k > 1}


def _fit(weight: Tensor, rank: int) -> list[Tensor]:
    """Factors (size, rank) of the output channels, the input channels and each direction of the kernel; float64, on the weight's device."""
    tensor = weight.detach().double().cpu().numpy()
    tensor = tensor.reshape([n for axis, n in enumerate(tensor.shape) if axis < 2 or n > 1])
    norm = float(np.linalg.norm(tensor))
    if norm == 0:
        return [weight.new_zeros(n, rank, dtype=torch.float64) for n in tensor.shape]
    random = np.random.RandomState(0)  # its own, so that the factors depend on the weight alone
    factors = [np.zeros((n, 0)) for n in tensor.shape]
    error = 1.0
    for count in range(1, rank + 1):
        rest = tensor - _product(factors)
        one = _sweeps(rest, [random.standard_normal((n, 1)) for n in tensor.shape])[0] if error > EXACT else [np.zeros((n, 1)) for n in tensor.shape]
        grown = [np.concatenate([f, o], axis=1) for f, o in zip(factors, one, strict=True)]
        starts = [grown] if error <= EXACT else [grown, [random.standard_normal((n, count)) for n in tensor.shape]]
        candidates = [(grown, float(np.linalg.norm(tensor - _product(grown))) / norm), *(_sweeps(tensor, start) for start in starts if error > EXACT)]
        candidates = [c for c in candidates if np.isfinite(c[1])]
        best, best_error = min(candidates, key=lambda c: c[1])
        if best_error <= error:
            factors, error = best, best_error
        else:
            factors = [np.concatenate([f, np.zeros((len(f), 1))], axis=1) for f in factors]
    return [torch.from_numpy(f).to(weight.device) for f in _balanced(factors)]


def _sweeps(tensor: Any, start: list[Any]) -> tuple[list[Any], float]:
    """Factors and relative error after alternating least squares from a start."""
    import tensorly
    from tensorly.decomposition import parafac

    rank = start[0].shape[1]
    with tensorly.backend_context("numpy", local_threadsafe=True), np.errstate(all="ignore"):
        _, factors = parafac(tensor, rank, n_iter_max=SWEEPS, tol=TOLERANCE, init=(None, [f.copy() for f in start]), normalize_factors=False)
    return factors, float(np.linalg.norm(tensor - _product(factors))) / float(np.linalg.norm(tensor))


def _product(factors: Sequence[Any]) -> Any:
    """The sum of outer products."""
    letters = "abcde"[: len(factors)]
    return np.einsum(",".join(f"{letter}z" for letter in letters) + "->" + letters, *factors, optimize=True)


def _balanced(factors: Sequence[Any]) -> list[Any]:
    """The same sum, each component's norm spread evenly over its factors, so that none of them over- or underflows in a narrow dtype."""
    norms = np.stack([np.linalg.norm(f, axis=0) for f in factors])  # (factors, rank)
    safe = np.where(norms > 0, norms, 1.0)
    even = np.where((norms > 0).all(0), np.exp(np.log(safe).mean(0)), 0.0)
    return [f / n * even for f, n in zip(factors, safe, strict=True)]


CP_KIND: Kind = CPKind()
