"""All numerics: spectra of unfoldings, truncated bases, higher-order orthogonal iteration.

Inside everything is float64, on the device of the tensors given. A matrix is never decomposed by a singular value decomposition of its full
size: its Gram matrix on the shorter side is, by ``eigh``. Squaring costs half the digits of the smallest singular values, so where a matrix is
nearly singular its triangular factor (of the same small size) is decomposed instead, which loses none.

Spectra hold all values, because rank rules look at them; the iteration computes only the eigenpairs that it keeps, where that is faster. Layers
are treated one after the other: the solvers keep all cores busy.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = [
    "Spectrum",
    "channels_apart",
    "clean_signs",
    "hooi",
    "lying",
    "mode_product",
    "pooled",
    "relative_tails",
    "running_sum",
    "spectra",
    "spectrum",
    "tail_energy",
    "two_factors",
]

HOOI_SWEEPS = 50
HOOI_TOLERANCE = 2e-5  # relative change of the error over one sweep of both modes at which the iteration stops
EPS = torch.finfo(torch.float64).eps
FEW_FROM, FEW_SHARE = 1536, 8  # from so many rows on, and for at most one in so many eigenpairs, computing only these is faster on a CPU
TRUSTED = 1e4  # an eigenvalue of a Gram matrix is used only if it is this many times its own rounding error


@dataclass(frozen=True, slots=True, eq=False)
class Spectrum:
    """Singular values of one unfolding, largest first, and its left singular vectors; or of several unfoldings which share a rank, pooled.

    Attributes:
        mode: name of the rank that it is about; for channels ``"out"``, ``"in"`` or ``"channels"``.
        values: (full,) float64 with ``full = min(rows, columns)``. Of a pool: the root mean square of the unfoldings' values; where the rank is a
            total over groups each value appears once for every group, as in the block-diagonal unfolding of the whole layer.
        basis: (rows, full) float64 with orthonormal columns, in the order of ``values``; of a pool empty.
        shape: (rows, columns) of the unfolding.
        groups: how often each value appears.
        blocks: what a pool was made from; nothing otherwise.
    """

    mode: str
    values: Tensor
    basis: Tensor
    shape: tuple[int, int]
    groups: int = 1
    blocks: tuple[Spectrum, ...] = ()

    @property
    def full(self) -> int:
        return len(self.values)

    def part(self, number: int, parts: int) -> Spectrum:
        """One of ``parts`` equal parts of a pool, whose rank is then no total."""
        if not self.blocks:
            return self
        size = len(self.blocks) // parts
        return pooled(self.blocks[number * size : (number + 1) * size], 1)


def pooled(blocks: Sequence[Spectrum], groups: int) -> Spectrum:
    """One spectrum for unfoldings of one shape that share a rank: a single one is itself, of several the energies are averaged.

    Args:
        blocks: at least one.
        groups: how often each value is to appear.
    """
    first = blocks[0]
    if len(blocks) == 1 and groups == 1:
        return first
    values = torch.stack([block.values for block in blocks]).square().mean(0).sqrt().repeat_interleave(groups)
    rows, columns = first.shape
    return Spectrum(first.mode, values, first.basis.new_empty(0), (rows * groups, columns * groups), groups, tuple(blocks))


def channels_apart(weight: Tensor) -> Tensor:
    """A weight (C_out, C_in, *kernel) as (C_out, pixels, C_in): in this order both channel unfoldings are views, without another copy.

    Free of any copy where the weight is in channels-last.
    """
    return weight.flatten(2).transpose(1, 2).contiguous() if weight.ndim < 4 else weight.movedim(1, -1).contiguous().flatten(1, -2)


def mode_product(tensor: Tensor, matrix: Tensor, mode: int) -> Tensor:
    """``tensor`` with its ``mode``-th dimension multiplied by ``matrix`` (rows of ``matrix`` become that dimension)."""
    product: Tensor = torch.tensordot(matrix, tensor, dims=([1], [mode]))
    return product.movedim(0, mode)


def clean_signs(basis: Tensor) -> Tensor:
    """Each column times +1 or -1, so that its entry of largest magnitude is positive: signs no longer depend on the solver.

    Works on the last two dimensions.
    """
    peak = basis.abs().argmax(dim=-2, keepdim=True)
    return basis * torch.where(basis.gather(-2, peak) < 0, -1.0, 1.0)


def spectrum(matrix: Tensor, mode: str) -> Spectrum:
    """Spectrum of one matrix (rows, columns), in float64."""
    return spectra(matrix[None], mode)[0]


def spectra(matrices: Tensor, mode: str) -> tuple[Spectrum, ...]:
    """Spectra of a stack of matrices (count, rows, columns), in float64, computed together.

    By ``eigh`` of the Gram matrices of rows, O(rows^3 + rows^2 columns). Singular values far below the largest (by about 1e-5, more exactly
    where rounding would take the eigenvalue's fourth digit) come from the triangular factor of the matrix, as exact as those of a full
    singular value decomposition.
    """
    matrices = matrices.double()
    count, rows, columns = matrices.shape
    full = min(rows, columns)
    if rows > 2 * columns:
        found = [_thin(matrix) for matrix in matrices]
    else:
        squares, bases = _eigh(matrices @ matrices.mT)
        smallest, largest = squares[:, full - 1], squares[:, 0]
        trusted = (smallest > TRUSTED * EPS * rows * largest).tolist()
        found = [(squares[i, :full].sqrt(), bases[i, :, :full]) if trusted[i] else _by_triangular_factor(matrices[i]) for i in range(count)]
    return tuple(Spectrum(mode, values, basis, (rows, columns)) for values, basis in found)


def hooi(
    weight: Tensor, ranks: Sequence[int | None], spectra: Sequence[Spectrum], tolerance: float = HOOI_TOLERANCE
) -> tuple[Tensor, tuple[Tensor | None, Tensor | None]]:
    """Tucker decomposition of the two channel modes by higher-order orthogonal iteration (De Lathauwer et al. 2000, algorithm 4.2).

    Starts from the truncated bases of ``spectra`` (the higher-order SVD), then renews one basis after the other from the Gram matrix of the
    tensor projected on the other, until the core's norm, which determines the error, stands still: renewing a basis changed the error by
    less than half of ``tolerance`` of itself, or all that is still to come will, going by how fast the gains shrink. Renewing one costs
    O(n^3 + n^2 r pixels) for n channels and rank r.

    Args:
        weight: (C_out, C_in, *kernel), any float dtype.
        ranks: of the output and the input channels; None where the mode stays uncut.
        spectra: of the two channel unfoldings, in the same order.
        tolerance: relative change of the error over one sweep of both modes at which the iteration stops.

    Returns:
        The core (rank_out, rank_in, *kernel), float64, uncut modes whole, and for each mode its orthonormal basis (C, rank) or None.
    """
    apart = channels_apart(weight.double())
    basis_out, basis_in = (None if r is None else s.basis[:, :r] for r, s in zip(ranks, spectra, strict=True))
    both = basis_out is not None and basis_in is not None and basis_out.shape[1] < apart.shape[0] and basis_in.shape[1] < apart.shape[2]
    if both and _left_out(ranks, spectra) > EPS:
        core, basis_out, basis_in = _iterate(apart, basis_out, basis_in, tolerance)  # type: ignore[arg-type]
    else:
        core = apart if basis_in is None else apart @ basis_in
        core = core if basis_out is None else (basis_out.mT @ core.flatten(1)).reshape(-1, *core.shape[1:])
    return core.transpose(1, 2).reshape(core.shape[0], core.shape[2], *weight.shape[2:]), (basis_out, basis_in)


def _left_out(ranks: Sequence[int | None], spectra: Sequence[Spectrum]) -> float:
    """The largest share of the energy that truncating one mode leaves out; where that is nothing, nothing is to be gained."""
    shares = [float(s.values[r:].square().sum() / s.values.square().sum()) for r, s in zip(ranks, spectra, strict=True) if r is not None]
    return max(shares, default=0.0)


def _iterate(apart: Tensor, basis_out: Tensor, basis_in: Tensor, tolerance: float) -> tuple[Tensor, Tensor, Tensor]:
    """Core (rank_out, pixels, rank_in) and the two bases once the core's norm stands still."""
    pixels = apart.shape[1]
    rank_out, rank_in = basis_out.shape[1], basis_in.shape[1]
    total = float(torch.linalg.vector_norm(apart)) ** 2
    norm = gain = 0.0
    core = apart
    for half in range(2 * HOOI_SWEEPS):
        if half % 2 == 0:
            rows = (apart @ basis_in).flatten(1)  # (C_out, pixels rank_in)
            new_norm, basis_out = _leading(rows, rank_out)
            core = (basis_out.mT @ rows).view(rank_out, pixels, rank_in)
        else:
            columns = (basis_out.mT @ apart.flatten(1)).view(rank_out * pixels, -1)  # (rank_out pixels, C_in)
            new_norm, basis_in = _leading(columns.mT, rank_in)
            core = (columns @ basis_in).view(rank_out, pixels, rank_in)
        before, gain, norm = gain, new_norm - norm if half > 0 else 0.0, new_norm
        if half > 0 and min(gain, _still_to_come(gain, before)) <= max(tolerance * (total - norm), EPS * total):
            break
    return core, basis_out, basis_in


def _still_to_come(gain: float, before: float) -> float:
    """The sum of all later gains if each is to the last as this one is to the one before; where they hardly shrink nothing is foretold."""
    return gain * gain / (before - gain) if 0 <= 2 * gain < before else float("inf")


def _leading(rows: Tensor, rank: int) -> tuple[float, Tensor]:
    """The energy of the ``rank`` leading left singular vectors of a matrix, and the vectors.

    Of a matrix much higher than wide no Gram matrix of its rows is made: a layer may have thousands of times more outputs than inputs.
    """
    if len(rows) > 2 * rows.shape[1]:
        values, vectors = _thin(rows)
        return float(values[:rank].square().sum()), vectors[:, :rank]
    squares, vectors = _few(rows @ rows.mT, rank)
    if squares[rank - 1] <= TRUSTED * EPS * len(rows) * squares[0]:
        values, vectors = _by_triangular_factor(rows)
        squares = values.square()
    return float(squares[:rank].sum()), vectors[:, :rank]


def lying(matrix: Tensor) -> Tensor:
    """The matrix (or a stack of matrices), transposed where it is higher than wide."""
    return matrix if matrix.shape[-2] <= matrix.shape[-1] else matrix.mT


def two_factors(matrix: Tensor, rank: int, basis: Tensor) -> tuple[Tensor, Tensor]:
    """The best ``left @ right`` of this rank, (rows, rank) and (rank, columns) (Eckart and Young 1936).

    Args:
        matrix: (..., rows, columns), any float dtype.
        rank: at most min(rows, columns).
        basis: (..., min(rows, columns), full), the left singular vectors of ``lying(matrix)``; the factor on that side is orthonormal.
    """
    matrix, basis = matrix.double(), basis[..., :rank]
    if matrix.shape[-2] <= matrix.shape[-1]:
        return basis, basis.mT @ matrix
    return matrix @ basis, basis.mT


def relative_tails(values: Tensor) -> Tensor:
    """|W - W'|_F / |W|_F for every number of leading singular values kept, 0 to all of them: (full + 1,)."""
    tails = tail_energy(values.square())
    return (tails / tails[0].clamp(min=torch.finfo(tails.dtype).tiny)).sqrt()


def tail_energy(energy: Tensor) -> Tensor:
    """For every number of leading entries in each dimension, the energy outside that corner; no difference of large numbers is taken.

    Args:
        energy: (n,) or (n, m), non-negative.

    Returns:
        (n + 1,) or (n + 1, m + 1): entry [r] or [r, s] is the sum of all entries but the first r (rows) and first s (columns).
    """
    if energy.ndim == 1:
        return _tails(energy, 0)
    below = _tails(energy.sum(1), 0)  # rows from r on, all columns
    beside = torch.zeros(energy.shape[0] + 1, energy.shape[1] + 1, dtype=energy.dtype, device=energy.device)
    beside[1:] = running_sum(_tails(energy, 1), 0)  # the first r rows, columns from s on
    return below[:, None] + beside


def running_sum(x: Tensor, dim: int) -> Tensor:
    """``cumsum`` on the CPU: on a GPU torch has none for those who want deterministic algorithms only."""
    return x.cpu().cumsum(dim).to(x.device)


def _tails(energy: Tensor, dim: int) -> Tensor:
    """Sums of the last entries along ``dim``: entry r is the sum from r on, one entry more than ``energy`` has."""
    sums = running_sum(energy.flip(dim), dim).flip(dim)
    return torch.cat([sums, torch.zeros_like(sums.narrow(dim, 0, 1))], dim)


def _eigh(gram: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues, largest first, and eigenvectors with clean signs."""
    values, vectors = torch.linalg.eigh(gram)
    return values.flip(-1), clean_signs(vectors.flip(-1))


def _few(gram: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """As ``_eigh``, at least the first ``count``: on a CPU only these where they are few, by LAPACK's relatively robust representations.

    Inside the iteration, on two cores, that is 1.25 to 1.4 times as fast from 1536 rows on, no faster at 1024 and slower below: torch's solver and
    scipy's bring each its own threads.
    """
    size = len(gram)
    if gram.device.type != "cpu" or size < FEW_FROM or FEW_SHARE * count > size:
        return _eigh(gram)
    from scipy.linalg import eigh

    values, vectors = eigh(gram.numpy(), subset_by_index=(size - count, size - 1), driver="evr", check_finite=False)
    return torch.from_numpy(values).flip(0), clean_signs(torch.from_numpy(vectors).flip(1))


def _by_triangular_factor(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Singular values and left singular vectors by way of M = R^T Q^T: those of R^T, which is as small as the Gram matrix would be."""
    _, factor = torch.linalg.qr(matrix.mT, mode="r")
    return _thin(factor.mT)


def _thin(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Singular values and left singular vectors with clean signs."""
    vectors, values, _ = torch.linalg.svd(matrix, full_matrices=False)
    return values, clean_signs(vectors)
