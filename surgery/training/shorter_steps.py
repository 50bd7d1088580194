"""Shorter steps for the factors of chains than for layers, since every factor moves the product of all.

Where a normalization follows a layer, the scale of its weight means nothing, and gradient and weight decay come to an equilibrium in which the weight
turns by sqrt(2 rate decay) a step, whatever its size (Wan et al. 2021, "Spherical Motion Dynamics", section 3). In a chain each of n factors turns by
as much, and the product by about sqrt(n) times as much: that is a layer at n times the rate. A rate of 1 / n for the factors makes up for it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from passes import host_for
from surgery.training.optimizer import as_optimizers

__all__ = ["ShorterSteps"]


class ShorterSteps:
    """Factors go a part of the way that each step of their optimizer would take them, which is what a lower rate would do, with any optimizer.

    Neither groups nor schedulers see any of it. A step that fails leaves the factors where it left them.

    Args:
        model: with chains; all other parameters take whole steps.
        optimizer: one, or a list of several.
        part: of the way, in (0, 1]; ``"auto"`` is 1 / number of factors, chain by chain.
    """

    def __init__(self, model: nn.Module, optimizer: Any, part: float | str) -> None:
        parts = dict[Tensor, float]()
        for site in host_for(model).sites():
            if site.chain is not None and site.tied_to is None:
                factors = [piece.weight for piece in site.pieces]
                parts |= dict.fromkeys(factors, 1 / len(factors) if isinstance(part, str) else part)
        self._handles: list[Any] = []
        for each in as_optimizers(optimizer):
            mine = [p for group in each.param_groups for p in group["params"] if parts.get(p, 1.0) != 1]
            if mine:
                shares = [parts[p] for p in mine]
                before = list[Tensor]()
                self._handles.append(each.register_step_pre_hook(lambda *_, mine=mine, before=before: _note(mine, before)))
                self._handles.append(each.register_step_post_hook(lambda *_, mine=mine, before=before, shares=shares: _go(mine, before, shares)))

    def remove(self) -> None:
        """Whole steps from now on."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()


@torch.no_grad()
def _note(parameters: Sequence[Tensor], before: list[Tensor]) -> None:
    before[:] = [p.detach().clone() for p in parameters]


@torch.no_grad()
def _go(parameters: Sequence[Tensor], before: list[Tensor], shares: Sequence[float]) -> None:
    """From where they were a share of the way to where they are."""
    for parameter, start, share in zip(parameters, before, shares, strict=True):
        parameter.lerp_(start, 1 - share)
    before.clear()
