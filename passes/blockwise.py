"""A kind lifted to every layer: grouped ones block by block, transposed ones in forward direction.

A layer of g groups is g layers side by side. Each is factorized on its own at the same ranks, and the chain's layers have g groups too, so that
together they are the block-diagonal factorization of the whole. A transposed layer stores its weight with the channels swapped; the same chain
stands for it, with its kernel transposed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from passes.errors import SurgeryValueError
from passes.factorization import Factorization
from passes.geometry import Geometry, Piece, PieceShape
from passes.kind import Kind, Rank
from passes.linalg import Spectrum, pooled

__all__ = ["Blockwise"]

TAKEN = ("weight", "bias")  # what a chain answers for its layer


@dataclass(frozen=True, slots=True)
class Blockwise:
    """What the passes and ``surgery`` see of a kind: its mathematics for layers of any geometry, with weights as torch stores them.

    Ranks that count channels are totals over all groups, and multiples of the groups.
    """

    kind: Kind

    @property
    def factorization(self) -> type[Factorization]:
        """The dataclass that holds this kind's ranks."""
        return self.kind.factorization

    @property
    def name(self) -> str:
        return self.kind.factorization.kind

    @property
    def modes(self) -> tuple[str, ...]:
        """Names of the ranks, in order."""
        return self.kind.modes

    @property
    def mixes_inputs(self) -> bool:
        """Whether the first layer sees all input channels of its group at once."""
        return self.kind.mixes_inputs

    @property
    def has_spectra(self) -> bool:
        """Whether a rank rule has something to look at."""
        return self.kind.has_spectra

    def unit(self, geometry: Geometry) -> int:
        """Ranks are multiples of this."""
        return geometry.groups if self.kind.ranks_are_channels else 1

    def refuses(self, geometry: Geometry) -> str | None:
        """Why a layer of this geometry cannot be factorized this way, or None where it can."""
        if geometry.is_depthwise:
            return f"depthwise convolution (groups={geometry.groups}): each output sees one input channel, so there is nothing to share"
        return self.kind.refuses(geometry.one_group)

    def refuses_ranks(self, geometry: Geometry, ranks: Sequence[Rank]) -> str | None:
        """Why this geometry cannot have these ranks, or None where it can."""
        unit = self.unit(geometry)
        wrong = next((rank for rank in ranks if rank is not None and rank % unit), None)
        return None if wrong is None else f"rank {wrong} is no multiple of its {unit} groups; ranks are totals over all groups"

    def full_ranks(self, geometry: Geometry) -> tuple[int, ...]:
        """For each mode the rank at which nothing is lost."""
        return tuple(self.unit(geometry) * rank for rank in self.kind.full_ranks(geometry.one_group))

    def from_ranks(self, geometry: Geometry, ranks: Sequence[Rank]) -> Factorization:
        """The factorization with these ranks (each at most its full rank), clipped to what the chain can use."""
        unit = self.unit(geometry)
        return _scaled(self.kind.from_ranks(geometry.one_group, [None if r is None else r // unit for r in ranks]), unit)

    def unfoldings(self, weight: Tensor, geometry: Geometry) -> tuple[Tensor, ...]:
        """For each mode the matrices whose singular values a rank rule looks at, as a stack (blocks, rows, columns) of those which share a rank."""
        found = [self.kind.unfoldings(block) for block in geometry.forward_blocks(weight)]
        stacks = [[matrix if matrix.ndim == 3 else matrix[None] for matrix in mode] for mode in zip(*found, strict=True)]
        return tuple(stack[0] if len(stack) == 1 else torch.cat(stack) for stack in stacks)

    def spectrum(self, blocks: Sequence[Spectrum], geometry: Geometry) -> Spectrum:
        """The one spectrum of a mode, from those of its unfoldings."""
        return pooled(blocks, self.unit(geometry))

    def shapes(self, geometry: Geometry, factorization: Factorization, bias: bool) -> tuple[PieceShape, ...]:
        """The chain's layers, first to last, without weights. The bias, if any, is the last layer's."""
        found = self.kind.shapes(geometry.one_group, _scaled(factorization, self.unit(geometry), down=True))
        last = list(found)[-1]
        for name in found:
            if not name.isidentifier() or name in TAKEN:
                raise SurgeryValueError(
                    f"{self.name}: a layer of its chains is named {name!r}; it must be an identifier, and neither weight nor bias"
                )
        return tuple(PieceShape(name, shape.times(geometry.groups), bias and name == last) for name, shape in found.items())

    def split(
        self, weight: Tensor, bias: Tensor | None, geometry: Geometry, factorization: Factorization, spectra: Sequence[Spectrum]
    ) -> tuple[Piece, ...]:
        """The chain that stands for ``weight``; weights of the pieces are float64, the bias is the one given."""
        one = _scaled(factorization, self.unit(geometry), down=True)
        blocks = geometry.forward_blocks(weight)
        parts = [self.kind.split(block, one, mine) for block, mine in zip(blocks, _shared_out(spectra, len(blocks)), strict=True)]
        shapes = self.shapes(geometry, factorization, bias is not None)
        return tuple(shape.filled(_stored([part[shape.name] for part in parts], shape.geometry), bias) for shape in shapes)

    def merge(self, pieces: Sequence[Piece], geometry: Geometry) -> Tensor:
        """The weight of the one layer of this geometry that computes what the chain computes, in the dtype of the pieces; differentiable."""
        groups = geometry.groups
        forward = {p.name: _by_groups(p, groups) for p in pieces}
        blocks = [self.kind.merge({name: weight[group] for name, weight in forward.items()}, geometry.one_group) for group in range(groups)]
        return geometry.stored(blocks[0][None] if groups == 1 else torch.stack(blocks))

    def error_surface(self, weight: Tensor, geometry: Geometry, spectra: Sequence[Spectrum]) -> Tensor:
        """|W - W'|_F / |W|_F at every choice of ranks, without factorizing at any of them.

        Returns:
            float64, one dimension a mode: entry [r, ...] is the error at rank r times ``unit(geometry)`` (0: nothing is left), up to the full rank.
        """
        blocks = geometry.forward_blocks(weight)
        surfaces = [self.kind.error_surface(block, mine) for block, mine in zip(blocks, _shared_out(spectra, len(blocks)), strict=True)]
        if len(surfaces) == 1:
            return surfaces[0]
        energies = blocks.double().flatten(1).square().sum(1)
        lost = torch.stack([energy * surface.square() for energy, surface in zip(energies, surfaces, strict=True)]).sum(0)
        return (lost / lost.flatten()[0].clamp(min=torch.finfo(lost.dtype).tiny)).sqrt()  # of nothing left, so that its error is 1 to the bit


def _scaled(factorization: Factorization, unit: int, *, down: bool = False) -> Factorization:
    if unit == 1:
        return factorization
    return type(factorization)(*(None if r is None else (r // unit if down else r * unit) for r in factorization.ranks))


def _shared_out(spectra: Sequence[Spectrum], groups: int) -> list[list[Spectrum]]:
    """For each group the spectra, one a mode, of its own unfoldings."""
    return [[spectrum.part(group, groups) for spectrum in spectra] for group in range(groups)]


def _by_groups(piece: Piece, groups: int) -> Tensor:
    """A piece's weight as (groups, C_out / groups, C_in / groups of the piece, *kernel)."""
    g = piece.geometry
    return g.forward_blocks(piece.weight).reshape(groups, g.out_channels // groups, g.in_channels // g.groups, *g.kernel)


def _stored(parts: Sequence[Tensor], geometry: Geometry) -> Tensor:
    """Weights of one layer of the chain, one a group, as torch stores the whole layer's."""
    weight = parts[0] if len(parts) == 1 else torch.cat(list(parts))
    return geometry.stored(weight.reshape(geometry.groups, geometry.out_channels // geometry.groups, -1, *geometry.kernel))
