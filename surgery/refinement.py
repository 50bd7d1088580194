"""All factors polished together, so that the cut network says again what the original said: distillation without labels (Hinton et al. 2015)."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import cos, pi
from numbers import Integral, Real
from typing import Any

import torch
from torch import Tensor, nn

from passes.errors import SurgeryError, SurgeryTypeError, SurgeryValueError
from passes.parity import private_inputs, tensors_in
from passes.running import arguments, evaluating_copy, first_line, kept_random_states, seed_all

__all__ = ["Refine", "distance", "outputs_on", "refine"]

SEED = 0  # of the first batch: what a network draws for a batch is the same in every run of it
SHORTER = 0.3  # what becomes of the rate after an epoch that did not help
NARROW = (torch.float16, torch.bfloat16)  # in which steps are lost to rounding, and Adam's squares are nothing


@dataclass(frozen=True, slots=True, kw_only=True)
class Refine:
    """How factors are polished.

    Attributes:
        epochs: how often all calibration batches are gone through.
        rate: the step of Adam, as a share of the root mean square of each parameter; it falls to nothing along a cosine, and after each epoch that
            did not help.
    """

    epochs: int = 10
    rate: float = 3e-3

    def __post_init__(self) -> None:
        if not isinstance(self.epochs, Integral) or isinstance(self.epochs, bool):
            raise SurgeryTypeError(f"Refine: epochs must be an int, got {self.epochs!r}")
        if self.epochs < 1:
            raise SurgeryValueError(f"Refine: epochs must be at least 1, got {self.epochs}")
        if not isinstance(self.rate, Real) or isinstance(self.rate, bool) or not self.rate > 0:
            raise SurgeryValueError(f"Refine: rate must be a positive number, got {self.rate!r}")


def refine(
    original: nn.Module,
    model: nn.Module,
    parameters: Sequence[nn.Parameter],
    batches: Sequence[Any],
    how: Refine,
    progress: Callable[[int, float], None] | None = None,
) -> None:
    """Change ``parameters`` of ``model``, in place, so that its outputs on the batches come nearer to those of ``original``.

    Both run in eval mode: statistics of batch norms stay. What is made small is the squared distance of the outputs, relative to their own squares.
    The parameters of the epoch with the least distance are kept, the ones before among them.

    Args:
        original: the network before the cut.
        model: the decomposed network.
        parameters: those to change.
        batches: as for ``calibrate``.
        how: epochs and rate.
        progress: called after each epoch with its number and the distance.
    """
    modes = {module: module.training for module in (*original.modules(), *model.modules())}
    trainable = {p: p.requires_grad for p in model.parameters()}
    grads = {p: p.grad for p in model.parameters()}
    chosen = set(map(id, parameters))
    with kept_random_states():
        try:
            original.eval()
            model.eval()
            for p in model.parameters():
                p.requires_grad_(id(p) in chosen)
                p.grad = None
            targets = outputs_on(original, batches)
            _descend(model, parameters, batches, targets, how, progress)
        except (
            RuntimeError,
            ValueError,
            IndexError,
        ) as error:  # code of the model, whose outputs may have sizes that numbers decide, or no gradients
            what = type(model).__name__
            raise SurgeryError(f"refine: {what} cannot be trained to the original's outputs ({first_line(error)}); leave refine out") from error
        finally:
            for p, wanted in trainable.items():
                p.requires_grad_(wanted)
                p.grad = grads[p]
            for module, mode in modes.items():
                module.training = mode


def _descend(
    model: nn.Module,
    parameters: Sequence[nn.Parameter],
    batches: Sequence[Any],
    targets: Sequence[Sequence[Tensor]],
    how: Refine,
    progress: Callable[[int, float], None] | None,
) -> None:
    scales = _scales(targets)
    sizes = [float(p.detach().square().mean().sqrt()) for p in parameters]
    resting = evaluating_copy(model, share_parameters=True)  # in the state that the targets were made from, and free of what training leaves behind
    best, kept = distance(resting, batches, targets), [p.detach().clone() for p in parameters]
    wide = [p.detach().float() if p.dtype in NARROW else p for p in parameters]  # what is stepped
    optimizer, rate = torch.optim.Adam([{"params": [w]} for w in wide]), how.rate
    order = torch.Generator().manual_seed(SEED)
    larger = float(sum(t.numel() for t in itertools.chain(*targets))) if any(p.dtype == torch.float16 for p in parameters) else 1.0
    for epoch in range(how.epochs):
        falling = (1 + cos(pi * epoch / how.epochs)) / 2
        for group, size in zip(optimizer.param_groups, sizes, strict=True):
            group["lr"] = rate * falling * size
        for index in torch.randperm(len(batches), generator=order, device="cpu").tolist():
            loss = _loss(_outputs(model, batches[index], index), targets[index], scales) * len(batches)
            optimizer.zero_grad()
            (loss * larger).backward()  # type: ignore[no-untyped-call] # Adam does not mind; in float16 derivatives of the loss itself would be 0
            for w, p in zip(wide, parameters, strict=True):
                if w is not p:
                    w.grad, p.grad = None if p.grad is None else p.grad.float(), None
            optimizer.step()
            _copy_to(parameters, wide)
        reached = distance(resting, batches, targets)
        if reached < best:
            best, kept = reached, [p.detach().clone() for p in parameters]
        else:  # the steps were too long: once more from the best so far, with shorter ones
            rate *= SHORTER
            _copy_to(parameters, kept)
            _copy_to(wide, kept)
            optimizer = torch.optim.Adam([{"params": [w]} for w in wide])
        if progress is not None:
            progress(epoch + 1, reached)
    _copy_to(parameters, kept)


def _copy_to(tensors: Sequence[Tensor], values: Sequence[Tensor]) -> None:
    with torch.no_grad():
        for tensor, value in zip(tensors, values, strict=True):
            if tensor is not value:
                tensor.copy_(value)


def outputs_on(model: nn.Module, batches: Sequence[Any]) -> list[list[Tensor]]:
    """All floating-point tensors that the model, which is in eval mode, gives for each batch."""
    model = evaluating_copy(model, share_parameters=True)  # which begins in the state that the model is in, and leaves it there
    with kept_random_states(), torch.no_grad():
        return [[t.detach() for t in _outputs(model, batch, number)] for number, batch in enumerate(batches)]


def distance(model: nn.Module, batches: Sequence[Any], targets: Sequence[Sequence[Tensor]]) -> float:
    """The squared distance of the outputs of the model, in eval mode, from targets as ``outputs_on`` gives them, relative to their squares."""
    scales, model = _scales(targets), evaluating_copy(model, share_parameters=True)
    with kept_random_states(), torch.no_grad():
        pairs = enumerate(zip(batches, targets, strict=True))
        return sum(float(_loss(_outputs(model, batch, number), target, scales)) for number, (batch, target) in pairs)


def _scales(targets: Sequence[Sequence[Tensor]]) -> list[float]:
    return [sum(float(target[i].double().square().sum()) for target in targets) or 1.0 for i in range(len(targets[0]))]


def _outputs(model: nn.Module, batch: Any, number: int) -> list[Tensor]:
    """What the model gives for a batch, under the seed of its number; to be used inside of ``kept_random_states``."""
    seed_all(SEED + number)
    args, kwargs = arguments(private_inputs(batch))
    return [t for t in tensors_in(model(*args, **kwargs)) if t.is_floating_point()]


def _loss(got: Sequence[Tensor], wanted: Sequence[Tensor], scales: Sequence[float]) -> Tensor:
    """The squared distance of all outputs, each relative to its own squares over all batches."""
    parts = [(a.float() - b.float()).square().sum() / scale for a, b, scale in zip(got, wanted, scales, strict=True)]
    return torch.stack(parts).sum() / len(parts)
