"""Weight decay of a chain taken on its product, as its layer had it, instead of on each factor.

Decay of each factor, |E|^2 + |C|^2 + |R|^2, is a penalty of its own kind on the product (for two factors its nuclear norm), and takes from the small
singular values first. Frobenius decay penalizes |W|_F^2 of the product W as the original layer did: the gradient of half of it by a factor is J^T W.
Source: Khodak et al. 2021, "Initialization and Regularization of Factorized Neural Layers", section 4.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from passes import host_for
from passes.errors import SurgeryTypeError
from passes.site import Site
from surgery.training.chain_map import ChainMap
from surgery.training.optimizer import as_optimizers, check_hooks, check_rates

__all__ = ["FrobeniusDecay", "check_decay", "frobenius_decay"]

DECOUPLED = {"AdamW", "Muon", "Adafactor"}  # classes that shrink parameters themselves; their groups need not say so


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
    group's own decay it is ``weight_decay`` J^T W; where decay is decoupled (AdamW), F itself is moved by as much, times the rate, after the step.
    After another cut call it anew.

    Args:
        model: decomposed; layers that are no chains keep the decay they have.
        optimizer: the one that trains it, or a list of several.

    Returns:
        The hooks; ``remove()`` takes them out again.

    Raises:
        SurgeryTypeError: something that is no optimizer, or one of another library, of which it is not known whether its decay is decoupled.
        SurgeryValueError: a decoupled one without learning rate in its groups.

    Source: Khodak et al. 2021, section 4.
    """
    optimizers = as_optimizers(optimizer)
    check_decay(optimizers)
    sites = [site for site in host_for(model).sites() if site.chain is not None and site.tied_to is None]
    handles: list[Any] = []
    for each in optimizers:
        now = _Step()
        handles.append(each.register_step_pre_hook(_hook(sites, now)))
        handles.append(each.register_step_post_hook(partial(_after_step, now)))
    return FrobeniusDecay(handles)


def check_decay(optimizers: Sequence[Any]) -> None:
    """Refuse optimizers whose decay cannot be turned into one of products.

    Raises:
        SurgeryTypeError, SurgeryValueError: see ``frobenius_decay``.
    """
    check_hooks(optimizers)
    for each in optimizers:
        for group in each.param_groups:
            if group.get("weight_decay") and _decoupled(each, group) is None:
                raise SurgeryTypeError(
                    f"optimizer: whether {type(each).__name__} adds weight_decay to gradients or shrinks parameters by it is not known, and decay of "
                    'products needs to; say it in each group, group["decoupled_weight_decay"] = False or True'
                )
        if any(_decoupled(each, group) for group in each.param_groups):
            check_rates([each], "decay='product'")


@dataclass(slots=True, eq=False)
class _Step:
    """What was prepared in the step that is being made. A step that calls the one of its base class runs all hooks twice; one may fail, too."""

    gradients: dict[int, tuple[Tensor, int]] = field(default_factory=dict)  # that were changed, by factor, and their version then
    moves: dict[Tensor, Tensor] = field(default_factory=dict)  # of factors, to be made after the step


def _hook(sites: Sequence[Site], now: _Step) -> Any:
    def decay(optimizer: Any) -> None:
        groups = {id(p): group for group in optimizer.param_groups for p in group["params"] if group.get("weight_decay")}
        with torch.no_grad():
            _decay(optimizer, sites if groups else (), groups, now)

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


def _decay(optimizer: Any, sites: Sequence[Site], groups: Mapping[int, Mapping[str, Any]], now: _Step) -> None:
    """All chains at once: of half the sum of their squared norms one backward pass gives J^T W of each factor."""
    now.moves.clear()
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
        if group is None or factor.grad is None:
            continue
        change = slope - factor  # more than the factor itself, which the optimizer takes
        if _decoupled(optimizer, group):
            now.moves[factor] = change * (float(group["lr"]) * float(group["weight_decay"]))
            continue
        before = now.gradients.get(id(factor))
        if before is None or before[0] is not factor.grad or before[1] != factor.grad._version:
            _turn(factor.grad, change, group, getattr(optimizer, "grad_scale", None))
            now.gradients[id(factor)] = factor.grad, factor.grad._version


def _turn(gradient: Tensor, change: Tensor, group: Mapping[str, Any], scale: Tensor | None) -> None:
    decay = float(group["weight_decay"])
    if group.get("maximize"):
        decay = -decay
    if scale is not None:  # a fused optimizer divides by it in its step
        decay *= float(scale)
    gradient.add_(change, alpha=decay)


@torch.no_grad()
def _after_step(now: _Step, optimizer: Any, args: Any, kwargs: Any) -> None:
    now.gradients.clear()
    overflown = getattr(optimizer, "found_inf", None)  # a fused optimizer has made no step then
    if overflown is None or not float(overflown):
        for factor, move in now.moves.items():
            factor.sub_(move)
    now.moves.clear()


def _decoupled(optimizer: Any, group: Mapping[str, Any]) -> bool | None:
    """Whether the optimizer shrinks parameters by their decay, instead of adding it to their gradients; None where nobody knows."""
    if "decoupled_weight_decay" in group:
        return bool(group["decoupled_weight_decay"])
    classes = [cls for cls in type(optimizer).__mro__ if issubclass(cls, torch.optim.Optimizer) and cls is not torch.optim.Optimizer]
    if DECOUPLED & {cls.__name__ for cls in classes}:
        return True
    return False if any(cls.__module__.startswith("torch.optim.") for cls in classes) else None
