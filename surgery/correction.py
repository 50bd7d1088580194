"""Chains corrected for the errors made before them: each last layer in turn, by least squares against what the original network had there."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from math import prod, sqrt
from typing import Any

import torch
from torch import Tensor, nn

from passes.chain import pieces_of, plain_layer
from passes.geometry import Geometry, Piece
from passes.parity import private_inputs, tensors_in
from passes.refit import refit, rows
from passes.running import arguments, quiet_run

__all__ = ["can_be_refitted", "correct"]

LARGEST = 1152  # numbers that a kernel sees, of which the second moments are taken
STAGES = 16  # layers are taken one after the other where there are no more than so many, else in so many groups, in order


def correct(original: nn.Module, model: nn.Module, chains: Mapping[str, str], batches: Sequence[Any]) -> dict[str, float]:
    """Refit the last layer of each chain of ``model``, in place, in the order in which the batches reach them.

    For every chain the inputs of its last layer in ``model``, as it is then, and the outputs that its layer had in ``original`` give the moments.
    Later chains are so corrected for what earlier ones have left. Both networks run in eval mode.

    Args:
        original: the network before the cut; of no other use afterwards than to be run again.
        model: the decomposed network.
        chains: for the name of each layer in ``original`` that of its chain's last layer in ``model``.
        batches: as for ``calibrate``; they are gone through as often as there are stages.

    Returns:
        For each layer that could be corrected |Y - Y'|_F / |Y|_F of its outputs over the batches, with the errors made before it.
    """
    training = {module: module.training for module in (*original.modules(), *model.modules())}
    original.eval()
    model.eval()
    found: dict[str, float] = {}
    try:
        with quiet_run():
            calls = _calls(model, list(chains.values()), batches[0])
            refitted = [name for name, last in chains.items() if last in calls and can_be_refitted(Geometry.of(model.get_submodule(last)))]
            refitted.sort(key=lambda name: list(calls).index(chains[name]))
            size = -(-len(refitted) // STAGES) or 1
            for start in range(0, len(refitted), size):
                stage = {name: chains[name] for name in refitted[start : start + size]}
                found |= _correct_together(original, model, stage, calls, batches)
    finally:
        for module, mode in training.items():
            module.training = mode
    return found


class _Enough(BaseException):
    """All that was to be seen of this pass has been seen. No ``Exception``, which a model might catch."""


def _watched(model: nn.Module, names: Iterable[str], note: Callable[..., None], batch: Any) -> None:
    """One pass of a batch, with ``note(name, module, args, output)`` after each call of the named modules; it may end the pass by ``_Enough``."""
    handles = [model.get_submodule(name).register_forward_hook(partial(note, name)) for name in names]
    args, kwargs = arguments(private_inputs(batch))
    try:
        with suppress(_Enough):
            model(*args, **kwargs)
    finally:
        for handle in handles:
            handle.remove()


def _calls(model: nn.Module, names: Sequence[str], batch: Any) -> dict[str, int]:
    """How often each module is called, in the order of the first calls."""
    found: dict[str, int] = {}

    def note(name: str, *_: Any) -> None:
        found[name] = found.get(name, 0) + 1

    _watched(model, names, note, batch)
    return found


def _correct_together(
    original: nn.Module, model: nn.Module, stage: Mapping[str, str], calls: Mapping[str, int], batches: Sequence[Any]
) -> dict[str, float]:
    moments = {name: _Moments(model.get_submodule(last)) for name, last in stage.items()}
    for batch in batches:
        wanted = _seen(original, {name: calls[last] for name, last in stage.items()}, batch, outputs=True)
        given = _seen(model, {last: calls[last] for last in stage.values()}, batch, outputs=False)
        for name, last in stage.items():
            for x, y in zip(given[last], wanted[name], strict=False):
                moments[name].add(x, y)
    return {name: error for name, each in moments.items() if (error := each.solve()) is not None}


def _seen(model: nn.Module, calls: Mapping[str, int], batch: Any, *, outputs: bool) -> dict[str, list[Tensor]]:
    """What the modules give, or get, in each call of one pass; the pass ends when each has been called that often."""
    found: dict[str, list[Tensor]] = {name: [] for name in calls}

    def note(name: str, _: nn.Module, args: Any, output: Any) -> None:
        value = next(tensors_in(output if outputs else args), None)
        if value is not None:
            found[name].append(value.detach().clone())  # what comes next may work in place
        if all(len(found[name]) >= often for name, often in calls.items()):
            raise _Enough

    _watched(model, calls, note, batch)
    return found


class _Moments:
    """Sums over what one layer sees, and what should come out."""

    def __init__(self, layer: nn.Module) -> None:
        self.layer = layer
        (self.piece,) = pieces_of({"": layer})
        self.patches = _patches(self.piece)
        self.xtx: Tensor | None = None
        self.xty: Tensor | None = None
        self.yty = 0.0

    def add(self, x: Tensor, y: Tensor) -> None:
        g = self.piece.geometry
        given = rows(x if self.patches is None else self.patches(x), g.dims, g.groups)
        given = torch.cat([given, given.new_ones(*given.shape[:2], 1)], 2)
        wanted = rows(y, g.dims, g.groups)
        xtx, xty = given.mT @ given, given.mT @ wanted
        self.xtx = xtx if self.xtx is None else self.xtx + xtx
        self.xty = xty if self.xty is None else self.xty + xty
        self.yty += float(wanted.square().sum())

    def solve(self) -> float | None:
        """Put the refitted numbers in the layer; the relative error that is left, or None where nothing was seen."""
        if self.xtx is None or self.xty is None:
            return None
        new = refit(self.piece, self.xtx, self.xty)
        parameters: Any = self.layer._parameters
        if not bool(new.weight.isfinite().all()):
            return None
        parameters["weight"].copy_(new.weight)
        if new.bias is not None:
            parameters["bias"].copy_(new.bias)
        g = self.piece.geometry
        kept = g.forward_blocks(new.weight).reshape(g.groups, g.out_channels // g.groups, -1).mT
        bias = kept.new_zeros(g.groups, 1, kept.shape[2]) if new.bias is None else new.bias.reshape(g.groups, 1, -1)
        kept = torch.cat([kept, bias], 1)
        left = self.yty - 2 * float((kept * self.xty).sum()) + float((kept * (self.xtx @ kept)).sum())
        return sqrt(max(left, 0.0) / self.yty) if self.yty > 0 else None


def can_be_refitted(geometry: Geometry) -> bool:
    """Whether the moments of what its kernel sees can be afforded, and are those of a plain least-squares problem."""
    return not geometry.transposed and geometry.in_channels // geometry.groups * prod(geometry.kernel) <= LARGEST


def _patches(piece: Piece) -> nn.Module | None:
    """A layer that gives, at each position, all numbers that the piece's kernel sees there; None where that is its input itself."""
    g = piece.geometry
    one = (1,) * g.dims
    if g.is_pointwise and g.stride == one and (isinstance(g.padding, str) or not any(g.padding)):
        return None
    pixels = prod(g.kernel)
    seeing = replace(g, out_channels=g.in_channels * pixels, groups=g.in_channels)
    each = torch.eye(pixels, dtype=piece.weight.dtype, device=piece.weight.device).reshape(pixels, 1, *g.kernel)
    return plain_layer(Piece("", seeing, each.repeat(g.in_channels, 1, *one), None), None)
