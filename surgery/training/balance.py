"""Factors of one size and on orthogonal bases: one step size fits all of a chain, in all directions.

With x y = w the gradient of x is scaled by y: a chain whose energy sits in one factor learns mostly by the others, and one whose bases are oblique
learns in few directions. Gradient flow keeps the differences of squared norms as they are (Arora et al. 2018), so what is balanced at the cut stays
so; Khodak et al. 2021, section 3, begin balanced. Chains cut for the weights alone come from a decomposition with orthonormal bases; those cut for
what the layers see come from one of a weighted weight, and taking the weighting back makes them oblique.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import replace
from math import log2

import torch
from torch import Tensor, nn

from passes import host_for
from passes.geometry import Piece
from passes.site import Site

__all__ = ["balance", "orthogonalize"]


def balance(model: nn.Module, names: Collection[str] | None = None) -> None:
    """Scale the factors of each chain, in place, to equal Frobenius norms, as nearly as powers of two can.

    Powers of two that cancel: the network computes the very same numbers as before, to the last bit (where nothing under- or overflows).

    Args:
        model: with chains; layers that are none are passed over.
        names: of the chains' sites; all by default.
    """
    for site in _chains(model, names):
        weights = [piece.weight for piece in site.pieces]
        norms = [float(w.detach().double().norm()) for w in weights]
        if min(norms) <= 0:
            continue
        sizes = [log2(n) for n in norms]
        middle = sum(sizes) / len(sizes)
        powers = [round(middle - s) for s in sizes]
        worst = max(range(len(sizes)), key=lambda k: abs(sizes[k] + powers[k] - middle))
        powers[worst] -= sum(powers)
        with torch.no_grad():
            for weight, power in zip(weights, powers, strict=True):
                weight.mul_(2.0**power)


@torch.no_grad()
def orthogonalize(model: nn.Module, names: Collection[str] | None = None) -> None:
    """Give each chain, in place, the factors that are best conditioned among those with its product; the network computes the same, to rounding.

    Of three layers or more the first and the last get orthonormal bases, their neighbours take what is left (the canonical form of tensor trains,
    Holtz et al. 2012); of two each gets the square roots of the product's singular values. Where channels are not mixed between two layers
    (depthwise ones), nothing can be moved from one to the other. A chain whose new factors its number type cannot hold stays as it was.

    Args:
        model: with chains; layers that are none are passed over.
        names: of the chains' sites; all by default.
    """
    for site in _chains(model, names):
        exact = [replace(piece, weight=piece.weight.detach().double().clone()) for piece in site.pieces]
        if len(exact) == 2:
            _share(*exact)
        elif len(exact) > 2:
            _move(exact[0], exact[1], forward=True)
            _move(exact[-2], exact[-1], forward=False)
        rounded = [piece.weight.to(old.weight) for piece, old in zip(exact, site.pieces, strict=True)]
        if all(bool(weight.isfinite().all()) for weight in rounded):
            for weight, piece in zip(rounded, site.pieces, strict=True):
                piece.weight.copy_(weight)


def _chains(model: nn.Module, names: Collection[str] | None) -> Iterator[Site]:
    """Those whose factors are their own and may change."""
    for site in host_for(model).sites():
        if site.chain is not None and site.tied_to is None and site.keep is None and (names is None or site.name in names):
            yield site


def _share(first: Piece, second: Piece) -> None:
    """Two layers with one Gram matrix of the channels between them, which is diagonal."""
    split = _between(first, second)
    if split is None:
        return
    (left, q), (right, p) = split
    u, s, v = torch.linalg.svd(right.mT @ left)  # the product is p^T right^T left q
    roots = s.sqrt()
    _store(first, roots.unsqueeze(-1) * (v @ q), outputs=True)
    _store(second, roots.unsqueeze(-1) * (u.mT @ p), outputs=False)


def _move(before: Piece, after: Piece, *, forward: bool) -> None:
    """What keeps one of two neighbours from having an orthonormal basis goes into the other."""
    split = _between(before, after)
    if split is None:
        return
    (left, q), (right, p) = split
    if forward:
        _store(before, q, outputs=True)
        _store(after, left.mT @ (right @ p), outputs=False)
    else:
        _store(before, right.mT @ (left @ q), outputs=True)
        _store(after, p, outputs=False)


Split = tuple[Tensor, Tensor]


def _between(before: Piece, after: Piece) -> tuple[Split, Split] | None:
    """Both layers as (groups, channels between, everything else), each split into a square matrix times orthonormal rows; None if that cannot be."""
    rows = _rows(before, outputs=True), _rows(after, outputs=False)
    if rows[0].shape[:2] != rows[1].shape[:2] or any(r.shape[1] > r.shape[2] for r in rows):
        return None
    (q, left), (p, right) = (torch.linalg.qr(r.mT) for r in rows)
    return (left.mT, q.mT), (right.mT, p.mT)


def _rows(piece: Piece, *, outputs: bool) -> Tensor:
    blocks = piece.geometry.forward_blocks(piece.weight)
    return (blocks if outputs else blocks.transpose(1, 2)).flatten(2)


def _store(piece: Piece, rows: Tensor, *, outputs: bool) -> None:
    shape = piece.geometry.forward_blocks(piece.weight).shape
    blocks = rows.reshape(shape) if outputs else rows.reshape(shape[0], shape[2], shape[1], *shape[3:]).transpose(1, 2)
    piece.weight.copy_(piece.geometry.stored(blocks))
