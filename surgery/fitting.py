"""Surgery that fits a network to data: what its layers see before the cut, and what the chains are corrected by after it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from passes import host_for
from passes.errors import SurgeryTypeError
from passes.result import PassResult
from passes.running import evaluating_copy
from passes.site import Site
from surgery.progress import stage
from surgery.undoing import Undo

if TYPE_CHECKING:
    from surgery.calibration import Calibration
    from surgery.refinement import Refine

__all__ = ["learn", "mend", "usable_batches"]


def usable_batches(model: nn.Module, calibration: Any, refine: Any = None, argument: str = "calibration") -> list[Any]:
    """The batches that a user gave for a model.

    Raises:
        SurgeryTypeError, SurgeryValueError: they are none, or ``refine`` is no ``Refine``.
    """
    from surgery.calibration import batches_of, inputs_needed
    from surgery.refinement import Refine

    if refine is not None and not isinstance(refine, Refine):
        raise SurgeryTypeError(f"refine: expected surgery.Refine(epochs=..., rate=...), got {refine!r}")
    return batches_of(calibration, argument, needed=inputs_needed(model))


def learn(model: nn.Module, batches: Sequence[Any], sites: Sequence[Site]) -> Calibration:
    """What matters in the weights of these layers, and on how many examples that was seen."""
    from surgery.calibration import calibrate

    return calibrate(model, batches, sites)


def mend(teacher: nn.Module, result: PassResult, batches: Sequence[Any], how: Refine | None, undo: Undo) -> dict[str, float]:
    """Correct the chains that a cut has made, one after the other, then polish them together; output errors by layer, as ``correct`` has them.

    In between the statistics of batch norms are taken anew where that is seen to help.

    What is also held elsewhere in the network (tied factors, a shared bias) is left as it is. What puts the
    numbers back is added to ``undo``: biases and statistics are the caller's own where the surgery is in place.
    """
    from surgery.correction import correct
    from surgery.refinement import refine
    from surgery.training.batch_norm import reestimate_where_it_helps, statistics_of

    cut = {outcome.site for outcome in result.outcomes if outcome.status == "applied"}
    model = result.model
    holders = Counter(id(p) for module in model.modules() for p in module._parameters.values() if p is not None)
    sites = [site for site in host_for(model).sites() if site.name in cut and site.name]
    layers = {site.name: [f"{site.name}.{piece.name}" for piece in site.pieces] for site in sites}
    own = {name: [p for layer in names for p in model.get_submodule(layer).parameters() if holders[id(p)] == 1] for name, names in layers.items()}
    lasts = {name: names[-1] for name, names in layers.items() if all(holders[id(p)] == 1 for p in model.get_submodule(names[-1]).parameters())}
    factors = [p for parameters in own.values() for p in parameters]
    changing = [*factors, *statistics_of(model)]
    before = [t.detach().clone() for t in changing]
    undo.later(partial(_put_back, changing, before))
    errors = correct(teacher, model, lasts, batches) if lasts else {}
    if sites:
        with stage("taking the statistics of batch norms anew"):
            quiet = evaluating_copy(model, share_parameters=True)  # what else its code changes while it runs is not for the model
            reestimate_where_it_helps(teacher, quiet, batches)
            _put_back(statistics_of(model), statistics_of(quiet))
    if how is not None and factors:
        with stage("refining", how.epochs) as step:
            quiet = evaluating_copy(model, share_parameters=True)
            refine(teacher, quiet, factors, batches, how, progress=lambda _, distance: step(f"to {distance:.3g}"))
    return errors


def _put_back(tensors: Sequence[Tensor], values: Sequence[Tensor]) -> None:
    with torch.no_grad():
        for tensor, value in zip(tensors, values, strict=True):
            tensor.copy_(value)
