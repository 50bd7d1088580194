"""Factors of one size: where one factor is far larger than the others, one step size does not fit all of a chain.

With x y = w the gradient of x is scaled by y: a chain whose energy sits in one factor learns mostly by the others. Gradient flow keeps the
differences of squared norms as they are (Arora et al. 2018), so what is balanced at the cut stays so; Khodak et al. 2021, section 3, begin balanced.
"""

from __future__ import annotations

from collections.abc import Collection
from math import log2

import torch
from torch import nn

from passes import host_for

__all__ = ["balance"]


def balance(model: nn.Module, names: Collection[str] | None = None) -> None:
    """Scale the factors of each chain, in place, to equal Frobenius norms, as nearly as powers of two can.

    Powers of two that cancel: the network computes the very same numbers as before, to the last bit (where nothing under- or overflows).

    Args:
        model: with chains; layers that are none are passed over.
        names: of the chains' sites; all by default.
    """
    for site in host_for(model).sites():
        if site.chain is None or site.tied_to is not None or site.keep is not None or (names is not None and site.name not in names):
            continue
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
