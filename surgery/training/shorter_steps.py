"""Shorter steps for the factors of chains than for layers, since every factor moves the product of all.

A step against the gradient moves a layer's weight W by r G. The factors F_i of a chain, trained at the same rate, move their product by the sum of
r J_i J_i^T G, where J_i is the derivative of the product by F_i: along the directions that a factor reaches, by its squared singular values times as
far. In a network that has been trained for some epochs these are well above 1, and the first steps after a cut can undo more than the cut did.
With n factors, and g_i the mean squared singular value of J_i, each at 1 / (n g_i) of the rate moves the product by its share of the layer's step.
At the highest rate so far none has more than 1 / n, which is the share of each where all are in equilibrium with weight decay before a normalization:
each turns by sqrt(2 rate decay) a step, whatever its size (Wan et al. 2021, "Spherical Motion Dynamics", section 3), the product by sqrt(n) times as
much. When the rate falls later, they go on with steps of that length until these are whole: at a low rate none is too long, and shorter ones learn
too slowly. Optimizers that set the size of a step by themselves (Adam and its kin) take 1 / n all the time.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from passes import host_for
from surgery.training.chain_map import ChainMap
from surgery.training.optimizer import as_optimizers

__all__ = ["Gains", "ShorterSteps", "gains_of"]

DRAWS, NUMBERS = 8, 2**14  # random directions a chain, at least, and random numbers in them
OF_THEIR_OWN_SIZE = ("betas", "eps", "etas")  # options that optimizers have whose steps do not grow with the gradient

Gains = dict[str, list[float]]


def gains_of(model: nn.Module) -> Gains:
    """The mean squared singular value of each factor's Jacobian, |J_i|_F^2 / entries of F_i, by the chain's name, in the order of its layers.

    Estimated from random directions u, since E |J_i^T u|^2 = |J_i|_F^2 (Hutchinson 1990).
    """
    found: Gains = {}
    for site in host_for(model).sites():
        if site.chain is None or site.tied_to is not None:
            continue
        chain = ChainMap.of(site.geometry, site.chain, site.pieces, torch.float32)
        with torch.autocast(site.device.type, enabled=False):  # in whose precision the caller may be training
            found[site.name] = _gains(chain)
    return found


def _gains(chain: ChainMap) -> list[float]:
    weight = chain.weight()
    draws = max(DRAWS, NUMBERS // max(weight.numel(), 1))
    generator = torch.Generator().manual_seed(0)
    totals = [0.0] * len(chain.factors)
    for _ in range(draws):
        pulled = chain.pull_back(torch.randn(weight.shape, generator=generator, device="cpu").to(weight))
        totals = [total + float(p.square().sum()) for total, p in zip(totals, pulled, strict=True)]
    return [total / draws / factor.numel() for total, factor in zip(totals, chain.factors, strict=True)]


class ShorterSteps:
    """Factors go a part of the way that each step of their optimizer would take them, which is what a lower rate would do, with any optimizer.

    Neither groups nor schedulers see any of it. A step that fails leaves the factors where it left them.

    Args:
        model: with chains; all other parameters take whole steps.
        optimizer: one, or a list of several.
        part: of the way, in (0, 1]; ``"auto"`` is what the module's text says.
        gains: what ``gains_of`` told when the chains were made.
        highest: learning rate so far, by the chain's name; kept up to date here.
    """

    def __init__(self, model: nn.Module, optimizer: Any, part: float | str, gains: Gains, highest: dict[str, float]) -> None:
        self._handles: list[Any] = []
        chains = [site for site in host_for(model).sites() if site.chain is not None and site.tied_to is None]
        for each in as_optimizers(optimizer):
            own_size = any(name in getattr(each, "defaults", {}) for name in OF_THEIR_OWN_SIZE)
            measured = isinstance(part, str) and not own_size
            factors: Factors = {
                piece.weight: _Factor(
                    chain=site.name,
                    part=1 / len(site.pieces) if isinstance(part, str) else part,
                    gain=gains[site.name][k] if measured and site.name in gains else 0.0,
                )
                for site in chains
                for k, piece in enumerate(site.pieces)
            }
            before: Before = {}
            self._handles.append(each.register_step_pre_hook(partial(_note, factors, before)))
            self._handles.append(each.register_step_post_hook(partial(_go, factors, before, highest)))

    def remove(self) -> None:
        """Whole steps from now on."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()


@dataclass(frozen=True, slots=True, kw_only=True)
class _Factor:
    """Of which chain, its share of a step where its gain is 1, and its gain; 0 where that does not matter."""

    chain: str
    part: float
    gain: float

    def share(self, rate: float, highest: float) -> float:
        """How much of a step to go, at this rate, when the highest so far was that."""
        if self.gain <= 0 or rate <= 0:
            return self.part
        return min(1.0, self.part / max(1.0, self.gain) * highest / rate)


Factors = Mapping[Tensor, _Factor]
Before = dict[Tensor, Tensor]  # factors as they were when the step began


@torch.no_grad()
def _note(factors: Factors, before: Before, optimizer: Any, args: Any, kwargs: Any) -> None:
    """Groups are looked at anew each step: a state that is loaded brings others, and parameters may be frozen and thawed."""
    before.clear()
    before.update({p: p.detach().clone() for group in optimizer.param_groups for p in group["params"] if p in factors})


@torch.no_grad()
def _go(factors: Factors, before: Before, highest: dict[str, float], optimizer: Any, args: Any, kwargs: Any) -> None:
    """From where they were a share of the way to where they are; once: a step that calls the one of its base class runs all hooks twice."""
    for group in optimizer.param_groups:
        rate = float(group.get("lr") or 0.0)  # none, or None, where an optimizer finds its rate by itself
        for parameter in group["params"]:
            start = before.pop(parameter, None)
            if start is not None:
                factor = factors[parameter]
                highest[factor.chain] = max(highest.get(factor.chain, 0.0), rate)
                parameter.lerp_(start, 1 - factor.share(rate, highest[factor.chain]))
    before.clear()
