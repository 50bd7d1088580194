"""All numerics: spectra of unfoldings, truncated bases, higher-order orthogonal iteration.

Inside everything is float64, on the device of the tensors given. A matrix is never decomposed by a singular value decomposition of its full
size: its Gram matrix on the shorter side is, by ``eigh``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Spectrum", "clean_signs", "hooi", "mode_product", "spectrum", "unfold"]

HOOI_STEPS = 50
HOOI_TOLERANCE = 1e-7  # relative change of the core's squared norm at which the iteration stops


@dataclass(frozen=True, slots=True, eq=False)
class Spectrum:
    """Singular values of one unfolding, largest first, and its left singular vectors.

    Attributes:
        mode: which channels the rows are, ``"out"`` or ``"in"``.
        values: (full,) float64 with ``full = min(rows, columns)``.
        basis: (rows, rows) float64 orthogonal; its first ``full`` columns belong to ``values``.
        shape: (rows, columns) of the unfolding.
    """

    mode: str
    values: Tensor
    basis: Tensor
    shape: tuple[int, int]

    @property
    def full(self) -> int:
        return len(self.values)


def unfold(tensor: Tensor, mode: int) -> Tensor:
    """The matrix whose rows are the ``mode``-th dimension of ``tensor``: (n_mode, product of the others)."""
    return tensor.movedim(mode, 0).flatten(1)


def mode_product(tensor: Tensor, matrix: Tensor, mode: int) -> Tensor:
    """``tensor`` with its ``mode``-th dimension multiplied by ``matrix`` (rows of ``matrix`` become that dimension)."""
    product: Tensor = torch.tensordot(matrix, tensor, dims=([1], [mode]))
    return product.movedim(0, mode)


def clean_signs(basis: Tensor) -> Tensor:
    """Each column times +1 or -1, so that its entry of largest magnitude is positive: signs no longer depend on the solver."""
    peak = basis.abs().argmax(dim=0, keepdim=True)
    return basis * torch.where(basis.gather(0, peak) < 0, -1.0, 1.0)


def spectrum(matrix: Tensor, mode: str) -> Spectrum:
    """Spectrum of ``matrix`` (rows, columns) from ``eigh`` of its Gram matrix of rows, in float64."""
    values, basis = _eigh(_gram(matrix.double()))
    full = min(matrix.shape)
    return Spectrum(mode, values[:full].clamp(min=0).sqrt(), basis, (matrix.shape[0], matrix.shape[1]))


def hooi(tensor: Tensor, ranks: Sequence[int | None], spectra: Sequence[Spectrum]) -> tuple[Tensor, list[Tensor | None]]:
    """Tucker decomposition of the first two modes by higher-order orthogonal iteration (De Lathauwer et al. 2000, algorithm 4.2).

    Starts from the truncated bases of ``spectra`` (the higher-order SVD), then renews one basis after the other from the Gram matrix of
    the tensor projected on the other, until the core's norm stands still.

    Args:
        tensor: (n_0, n_1, ...), any float dtype.
        ranks: for each of the two modes its rank, or None where the mode stays uncut.
        spectra: of the unfoldings of modes 0 and 1.

    Returns:
        The core, float64, with the given ranks in place of n_0 and n_1, and for each mode its orthonormal basis (n, rank) or None.
    """
    tensor = tensor.double()
    bases = [None if r is None else s.basis[:, :r] for r, s in zip(ranks, spectra, strict=True)]
    cut = [mode for mode, rank in enumerate(ranks) if rank is not None]
    iterated = [mode for mode in cut if ranks[mode] != tensor.shape[mode]]
    if len(iterated) == 2:
        total = float(tensor.square().sum())
        before = -1.0
        for _ in range(HOOI_STEPS):
            norm = 0.0
            for mode in iterated:
                other = bases[1 - mode]
                projected = tensor if other is None else mode_product(tensor, other.T, 1 - mode)
                values, vectors = _eigh(_gram(unfold(projected, mode)))
                bases[mode] = vectors[:, : ranks[mode]]
                norm = float(values[: ranks[mode]].sum())
            if abs(norm - before) <= HOOI_TOLERANCE * total:
                break
            before = norm
    core = tensor
    for mode in cut:
        basis = bases[mode]
        if basis is not None:
            core = mode_product(core, basis.T, mode)
    return core, bases


def _gram(matrix: Tensor) -> Tensor:
    return matrix @ matrix.T


def _eigh(gram: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues, largest first, and eigenvectors with clean signs."""
    values, vectors = torch.linalg.eigh(gram)
    return values.flip(0), clean_signs(vectors.flip(1))
