"""Weight decay of a chain taken on its product, as its layer had it, instead of on each factor.

Decay of each factor, |E|^2 + |C|^2 + |R|^2, is a penalty of its own kind on the product (for two factors its nuclear norm), and takes from the small
singular values first. Frobenius decay penalizes |W|_F^2 of the product W as the original layer did: the gradient of half of it by a factor is J^T W.
Source: Khodak et al. 2021, "Initialization and Regularization of Factorized Neural Layers", section 4.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from passes import host_for
from passes.site import Site
from surgery.training.chain_map import ChainMap
from surgery.training.optimizer import as_optimizers

__all__ = ["FrobeniusDecay", "frobenius_decay"]


@dataclass(slots=True, eq=False)
class FrobeniusDecay:
    """Hooks that turn the decay of factors into that of their product; ``remove`` takes them out again."""

    handles: list[Any] = field(default_factory=list)

    def remove(self) -> None:
        """Decay goes on each factor by itself from now on."""
        for handle in self.handles:
            handle.remove()
        self.handles.clear()


def frobenius_decay(model: nn.Module, optimizer: Any) -> FrobeniusDecay:
    """Have the ``weight_decay`` of each group act on the products of the chains that are in the model now, instead of on their factors.

    Groups stay as they are. Before each step of the optimizer the gradient of every factor F gets ``weight_decay`` (J^T W - F), so that with the
    group's own decay it is ``weight_decay`` J^T W; where decay is decoupled (AdamW), F itself is moved by as much. After another cut call it anew.

    Args:
        model: decomposed; layers that are no chains keep the decay they have.
        optimizer: the one that trains it, or a list of several.

    Returns:
        The hooks; ``remove()`` takes them out again.

    Raises:
        SurgeryTypeError: something that is no optimizer.

    Source: Khodak et al. 2021, section 4.
    """
    sites = [site for site in host_for(model).sites() if site.chain is not None and site.tied_to is None]
    return FrobeniusDecay([each.register_step_pre_hook(_hook(sites)) for each in as_optimizers(optimizer)])


def _hook(sites: Sequence[Site]) -> Any:
    def decay(optimizer: Any) -> None:
        groups = {id(p): group for group in optimizer.param_groups for p in group["params"] if group.get("weight_decay")}
        with torch.no_grad():
            _decay(optimizer, sites if groups else (), groups)

    def before_step(optimizer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        closure = kwargs.get("closure", args[1] if len(args) > 1 else None)  # args begin with the optimizer
        if closure is None:
            decay(optimizer)
            return None

        def then_decay() -> Any:  # it makes the gradients, inside of the step
            loss = closure()
            decay(optimizer)
            return loss

        return args[:1], {**kwargs, "closure": then_decay}

    return before_step


def _decay(optimizer: Any, sites: Sequence[Site], groups: Mapping[int, Mapping[str, Any]]) -> None:
    """All chains at once: of half the sum of their squared norms one backward pass gives J^T W of each factor."""
    weights, points, factors = [], [], []
    for site in sites:
        pieces = site.pieces
        if site.chain is None or not any(id(p.weight) in groups and p.weight.grad is not None for p in pieces):
            continue
        chain = ChainMap.of(site.geometry, site.chain, pieces, dtype=None)
        with torch.enable_grad():
            points += [factor.requires_grad_() for factor in chain.factors]
            weights.append(chain.weight(*chain.factors))
        factors += [p.weight for p in pieces]
    slopes = torch.autograd.grad(weights, points, [weight.detach() for weight in weights]) if weights else ()
    for factor, slope in zip(factors, slopes, strict=True):
        group = groups.get(id(factor))
        if group is not None and factor.grad is not None:
            _turn(factor, slope - factor, group, _decoupled(optimizer, group), getattr(optimizer, "grad_scale", None))


def _turn(factor: Tensor, change: Tensor, group: Mapping[str, Any], decoupled: bool, scale: Tensor | None) -> None:
    """Make what is decayed of a factor ``change`` more than the factor itself."""
    decay = float(group["weight_decay"])
    if decoupled:
        shrink = float(group["lr"]) * decay
        factor.sub_(shrink / (1 - shrink) * change)  # the step itself multiplies by 1 - shrink
        return
    if group.get("maximize"):
        decay = -decay
    if scale is not None:  # a fused optimizer divides by it in its step
        decay *= float(scale)
    factor.grad.add_(change, alpha=decay)  # type: ignore[union-attr]


def _decoupled(optimizer: Any, group: Mapping[str, Any]) -> bool:
    names = {cls.__name__ for cls in type(optimizer).__mro__}
    return bool(group.get("decoupled_weight_decay", names & {"AdamW", "Muon", "Adafactor"}))
