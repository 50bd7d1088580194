"""CP decomposition of a convolution: a sum of outer products (Lebedev et al. 2015, section 3), fitted by alternating least squares.

Conv C_in -> C_out, kernel k x l  ->  reduce: Conv C_in -> rank, 1x1; height: depthwise k x 1; width: depthwise 1 x l; expand: 1x1.
Each depthwise layer has the stride, padding, padding mode and dilation of its direction, the bias is the last layer's. In one dimension there is
one depthwise layer, in three there are three; a direction in which the kernel is a single pixel has none.

The best factorization of a rank may not exist, and alternating least squares finds a local one (Kolda and Bader 2009, section 3.4), so nothing can
be read from spectra: ranks must be given. Fits climb a fixed ladder of ranks, every rank up to 16 and then eight in each doubling. At a rung all
factors are fitted anew, from the rung before with components appended and from a random start, and the best of these stays, appended components
alone included. A rank between two rungs has the lower one's factors and appended components (see ``_appended``). So the error never grows with the
rank: that holds of the float64 factors, before they are rounded to a narrower dtype. At full rank the sum is exact in every dtype.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import isfinite, prod, sqrt
from typing import Any, ClassVar

import torch
from torch import Tensor

from passes.errors import SurgeryValueError
from passes.factorization import Factorization
from passes.geometry import Geometry
from passes.kind import Kind, Rank
from passes.linalg import Spectrum

__all__ = ["CP", "CP_KIND"]

DIRECTIONS = ("depth", "height", "width")
STEPS = 8  # rungs between a rank and twice that rank
SWEEPS = 60  # of alternating least squares for each rung and start, at most
SWEEPS_OF_ONE = 15  # for one component
TOLERANCE = 1e-6  # change of the relative error over one sweep at which it stops
EXACT = 1e-9  # a relative error at which nothing is left to fit
RIDGE = 1e-11  # of the mean squared norm of what spans a least squares fit


@dataclass(frozen=True, slots=True)
class CP(Factorization):
    """How many outer products are summed.

    Attributes:
        rank: channels of all layers between the first and the last; a total over the groups of a grouped layer.

    Source: Lebedev et al. 2015, section 3.
    """

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
    tensor = weight.detach().double()
    tensor = tensor.reshape([n for axis, n in enumerate(tensor.shape) if axis < 2 or n > 1])
    if rank >= tensor.numel() // max(tensor.shape):
        return _exact(tensor)
    norm = float(tensor.norm())
    fit = _Fit([tensor.new_zeros(n, 0) for n in tensor.shape], 1.0 if norm > 0 else 0.0)
    low = 0
    while low < rank:
        high = _next_rung(low)
        fit = _appended(tensor, fit, min(high, rank) - low, _generator(low))
        if high <= rank and fit.error > EXACT:
            random = [torch.randn(n, high, generator=_generator(-high), device="cpu", dtype=torch.float64).to(tensor.device) for n in tensor.shape]
            found = [fit, *(_sweeps(tensor, start, SWEEPS) for start in (fit.factors, random))]
            fit = min((f for f in found if isfinite(f.error)), key=lambda f: f.error)  # the first of equals
        low = high
    return _balanced(fit.factors)


@dataclass(frozen=True, slots=True, eq=False)
class _Fit:
    """Factors (size, rank), and the norm of what they leave over that of the tensor."""

    factors: list[Tensor]
    error: float


def _next_rung(rank: int) -> int:
    """The rank after this one at which all factors are fitted anew: each up to 16, then in steps of an eighth of a power of two."""
    step = 1 if rank < 2 * STEPS else 2 ** (rank.bit_length() - 1) // STEPS
    return (rank // step + 1) * step


def _generator(seed: int) -> torch.Generator:
    """Random numbers of its own, so that the factors depend on the weight alone."""
    return torch.Generator().manual_seed(seed)


def _exact(tensor: Tensor) -> list[Tensor]:
    """As many components as the tensor has fibers in its longest mode: each is one of them, and in every dtype nothing is lost."""
    longest = max(range(tensor.ndim), key=lambda mode: tensor.shape[mode])
    others = [n for mode, n in enumerate(tensor.shape) if mode != longest]
    count = prod(others)
    places = torch.stack(torch.unravel_index(torch.arange(count, device=tensor.device), others))  # (modes, components)
    factors = [torch.nn.functional.one_hot(place, n).to(tensor).mT for place, n in zip(places, others, strict=True)]
    factors.insert(longest, tensor.movedim(longest, 0).reshape(-1, count))
    return factors


def _appended(tensor: Tensor, fit: _Fit, count: int, generator: torch.Generator) -> _Fit:
    """``count`` components more, one after the other: the best outer product for what is left, then the output channels' factor of all of them
    by least squares. What spans the fit grows each time, so that the error cannot. Where nothing is left, components of no weight.
    """
    matrix, norm = tensor.flatten(1), float(tensor.norm())
    out, *others = _normalised(fit.factors)
    error, rest = fit.error, matrix - out @ _khatri_rao(others).mT
    for _ in range(count):
        start = [torch.randn(n, 1, generator=generator, device="cpu", dtype=torch.float64).to(tensor.device) for n in tensor.shape]
        if error > EXACT:
            one, *along = _normalised(_sweeps(rest.reshape(tensor.shape), start, SWEEPS_OF_ONE).factors)
            wider = [torch.cat([f, a], 1) for f, a in zip(others, along, strict=True)]
            spanned = _khatri_rao(wider)
            new = _least_squares(matrix @ spanned, _grams(wider), torch.cat([out, one], 1))
            left = matrix - new @ spanned.mT
            if (reached := float(left.norm()) / norm) <= error:
                out, others, rest, error = new, wider, left, reached
                continue
        _, *along = _normalised(start)
        out, others = torch.cat([out, torch.zeros_like(start[0])], 1), [torch.cat([f, a], 1) for f, a in zip(others, along, strict=True)]
    return _Fit([out, *others], error)


def _sweeps(tensor: Tensor, start: Sequence[Tensor], most: int) -> _Fit:
    """Alternating least squares from a start (Kolda and Bader 2009, figure 3.3), with two products of the size of the tensor a sweep: the
    factors of all modes but the first share the one with the first mode's factor (Phan et al. 2013, section III).
    """
    matrix, norm = tensor.flatten(1), float(tensor.norm())
    rank = start[0].shape[1]
    out, *others = _normalised(start)
    before = float("inf")
    for _ in range(most):
        out = _least_squares(matrix @ _khatri_rao(others), _grams(others), out)
        shared = (matrix.mT @ out).reshape(*tensor.shape[1:], rank)
        for mode, factor in enumerate(others):
            rest = [f for m, f in enumerate(others) if m != mode]
            product = _contracted(shared, others, mode)
            gram = _grams([out, *rest])
            new = _least_squares(product, gram, factor)
            squared = norm**2 - 2 * float((product * new).sum()) + float((new.mT @ new * gram).sum())
            lengths = _lengths(new)
            others[mode], out, shared = new / lengths, out * lengths, shared * lengths
        error = sqrt(max(squared, 0.0)) / norm if norm > 0 else 0.0
        if abs(before - error) < TOLERANCE:
            break
        before = error
    left = float((matrix - out @ _khatri_rao(others).mT).norm())
    return _Fit([out, *others], left / norm if norm > 0 else 0.0)


def _least_squares(product: Tensor, gram: Tensor, before: Tensor) -> Tensor:
    """The factor F that solves F gram = product, drawn a very little towards the one before, so that it is unique and never worse."""
    drawn = RIDGE * gram.diagonal().mean() + torch.finfo(gram.dtype).tiny
    identity = torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    factor: Tensor = torch.linalg.solve(gram + drawn * identity, product + drawn * before, left=False)
    return factor


def _grams(factors: Sequence[Tensor]) -> Tensor:
    """The Gram matrix of the Khatri-Rao product."""
    gram = factors[0].mT @ factors[0]
    for factor in factors[1:]:
        gram = gram * (factor.mT @ factor)
    return gram


def _khatri_rao(factors: Sequence[Tensor]) -> Tensor:
    """(product of sizes, rank): the outer products of the factors' columns, the last factor's index running fastest."""
    product = factors[0]
    for factor in factors[1:]:
        product = (product[:, None] * factor).flatten(0, 1)
    return product


def _contracted(shared: Tensor, factors: Sequence[Tensor], mode: int) -> Tensor:
    """(size of the mode, rank): a tensor (*sizes, rank) summed over all other modes, each weighted by its factor."""
    for other in reversed(range(len(factors))):
        if other != mode:
            weights = factors[other].reshape(-1, *(1,) * (shared.ndim - other - 2), factors[other].shape[1])
            shared = (shared * weights).sum(other)
    return shared


def _lengths(factor: Tensor) -> Tensor:
    """Norms of the columns, one where a column is zero."""
    lengths: Tensor = torch.linalg.vector_norm(factor, dim=0)
    return torch.where(lengths > 0, lengths, 1.0)


def _normalised(factors: Sequence[Tensor]) -> list[Tensor]:
    """The same sum, with columns of norm one in all factors but the first."""
    out, *others = factors
    for factor in others:
        out = out * torch.linalg.vector_norm(factor, dim=0)
    return [out, *(factor / _lengths(factor) for factor in others)]


def _balanced(factors: Sequence[Tensor]) -> list[Tensor]:
    """The same sum, each component's norm spread evenly over its factors, so that none of them over- or underflows in a narrow dtype.

    Of a component of no weight only the output channels' factor is zero: training can bring it to life.
    """
    out, *others = _normalised(factors)
    even = _lengths(out).pow(1 / len(factors))
    return [out / even.pow(len(others)), *(factor * even for factor in others)]


CP_KIND: Kind = CPKind()
