"""Statistics of batch norms taken anew: after a cut those from before no longer are those of what comes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from passes.errors import SurgeryError
from passes.parity import private_inputs
from passes.running import arguments, kept_random_states, model_errors, without_waiting
from surgery.refinement import distance, outputs_on

__all__ = ["reestimate", "reestimate_where_it_helps", "statistics_of"]

HELD_OUT = 4  # one in so many batches


def reestimate(model: nn.Module, batches: Sequence[Any], argument: str = "batch_norm") -> int:
    """Running means and variances of all batch norms of the model, in place, as plain averages over these batches.

    All batches go through once, without gradients, with batch norms in train mode and everything else in eval mode; modes, momentum, counts and
    random states are afterwards as before. A few hundred inputs at least: too few make it worse. After an error the old statistics are back, and so
    they are where the new ones would not be finite, and in batch norms that the batches do not reach.

    Args:
        model: with or without batch norms that keep statistics.
        batches: each a tensor, a tuple of positional or a mapping of keyword arguments.
        argument: what errors call them.

    Returns:
        How many batch norms there are.

    Raises:
        SurgeryValueError: the model does not accept a batch.

    Source: Wu and Johnson 2021, "Rethinking 'Batch' in BatchNorm", section 3 (precise batch norm).
    """
    norms = _norms(model)
    if not norms or not batches:
        return len(norms)
    modes = {module: module.training for module in model.modules()}
    before = [(norm, norm.momentum, {name: b.clone() for name, b in norm._buffers.items() if b is not None}) for norm in norms]
    done = False
    try:
        model.eval()
        for norm in norms:
            norm.reset_running_stats()
            norm.training = True  # not what it may hold beside
            norm.momentum = None  # the average of all
        with kept_random_states(), torch.no_grad(), without_waiting(model):
            for batch in batches:
                args, kwargs = arguments(private_inputs(batch))
                with model_errors(model, batch, argument):
                    model(*args, **kwargs)
        done = all(bool(t.isfinite().all()) for norm in norms for t in (norm.running_mean, norm.running_var) if t is not None)
    finally:
        for norm, momentum, buffers in before:
            norm.momentum = momentum
            reached = done and (norm.num_batches_tracked is None or int(norm.num_batches_tracked) > 0)
            for name, value in buffers.items():
                if not reached or name == "num_batches_tracked":
                    norm._buffers[name].copy_(value)  # type: ignore[union-attr]
        for module, mode in modes.items():
            module.training = mode
    return len(norms)


def reestimate_where_it_helps(original: nn.Module, model: nn.Module, batches: Sequence[Any]) -> int:
    """``reestimate``, but only if it brings the model's outputs nearer to the original's, in eval mode, on batches that had no part in it.

    Every fourth batch, or of fewer the last, is held out for that; if the outputs there are nearer all batches are used, otherwise the statistics
    stay. With one batch there is nothing to tell it by, and they stay too; likewise where the model cannot run with batch norms in train mode (a
    batch of one picture behind global pooling), or its outputs do not compare.

    Args:
        original: the network before the cut.
        model: the decomposed network, corrected: what its chains' last layers can do about the errors is done.
        batches: as for ``calibrate``.

    Returns:
        How many batch norms have new statistics.
    """
    held_out = batches[HELD_OUT - 1 :: HELD_OUT] or batches[-1:]
    others = [batch for batch in batches if not any(batch is held for held in held_out)]
    before = statistics_of(model)
    if not before or not others:
        return 0
    kept, done = [t.clone() for t in before], 0
    modes = {module: module.training for module in (*original.modules(), *model.modules())}
    original.eval()
    model.eval()
    try:
        with kept_random_states():
            wanted = outputs_on(original, held_out)
            as_it_is = distance(model, held_out, wanted)
            reestimate(model, others)
            if distance(model, held_out, wanted) < as_it_is:
                done = reestimate(model, batches)
    except (SurgeryError, RuntimeError, ValueError, IndexError):  # it was a thing to try
        done = 0
    finally:
        for module, mode in modes.items():
            module.training = mode
        if not done:
            for tensor, value in zip(before, kept, strict=True):
                tensor.copy_(value)
    return done


def statistics_of(model: nn.Module) -> list[Tensor]:
    """The running means and variances of the model's batch norms."""
    return [t for norm in _norms(model) for t in (norm.running_mean, norm.running_var) if t is not None]


def _norms(model: nn.Module) -> list[_BatchNorm]:
    return [m for m in model.modules() if isinstance(m, _BatchNorm) and m.running_mean is not None and m.running_var is not None]
