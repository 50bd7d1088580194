"""What a network's layers see and which of their outputs count, from unlabelled batches: second moments, streamed, in float64.

For each layer the mean of x x^T over the channels that it sees, and the mean of g g^T over the channels that it gives, where g is the derivative of
a random projection of the network's output: together the Kronecker factors of the Gauss-Newton matrix of the squared change of the output (Grosse and
Martens 2016, section 3, with white noise in the place of the loss's gradient). A change of a layer's weight that is small in this metric
changes what the network says little, wherever the layer is: so errors of different layers can be added up.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from functools import partial, wraps
from typing import Any

import torch
from torch import Tensor, nn

from passes.errors import SurgeryError, SurgeryTypeError, SurgeryValueError
from passes.geometry import Geometry
from passes.metric import Metric, alike
from passes.parity import private_inputs, tensors_in
from passes.refit import rows
from passes.running import (
    arguments,
    callers_code,
    evaluating_copy,
    is_out_of_memory,
    kept_random_states,
    model_errors,
    quiet_run,
    seed_all,
    uncompiled,
)
from passes.site import Site
from surgery.progress import tracked

__all__ = ["LEAST", "Calibration", "Moments", "batches_of", "calibrate", "inputs_needed"]

SEED = 0
LEAST = 1e-9  # of what counts most: layers that nothing was seen to depend on are cut first, but not as if they were not there


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Calibration:
    """What was learnt.

    Attributes:
        metrics: for each layer that ran, by name.
        examples: how many went through.
    """

    metrics: Mapping[str, Metric] = field(default_factory=dict)
    examples: int = 0


def calibrate(model: nn.Module, batches: Sequence[Any], sites: Iterable[Site]) -> Calibration:
    """Second moments of the sites' inputs and output derivatives, from one pass of each batch through a copy of the model in eval mode.

    Memory: two matrices a site, of the channels of a group each, and what one batch needs for a backward pass.

    Args:
        model: any module. Where its output cannot be differentiated by a layer's, that layer's outputs count alike; so do all layers' where its code
            works without gradients only, as some does that changes values in place.
        batches: each a tensor, a tuple of positional or a mapping of keyword arguments; labels are not used.
        sites: those to look at; chains are left out.

    Raises:
        SurgeryValueError: a batch does not fit the model, or gives numbers that are not finite.
    """
    twin = evaluating_copy(model)
    for parameter in twin.parameters():
        parameter.requires_grad_(False)
    for module in twin.modules():
        if isinstance(module, nn.RNNBase):  # cuDNN differentiates them in train mode only; without dropout that is the same
            module.training, module.dropout = True, 0.0
    looked_at = [site for site in sites if site.chain is None and site.keep is None]
    try:
        seen = _moments(twin, model, batches, looked_at, gradients=True)
    except (SurgeryValueError, RuntimeError) as error:
        if is_out_of_memory(error):
            raise  # without gradients there might be room, but what is learnt would be less, and nothing would say so
        seen = _moments(twin, model, batches, looked_at, gradients=False)
    for site in looked_at:
        if site.tied_to in seen:  # they are cut together
            seen[site.tied_to].add(seen[site.name])
    examples = sum(next((len(t) for t in tensors_in(batch) if t.ndim), 0) for batch in batches)
    return Calibration(metrics=_metrics(seen, examples, lambda name: _changes_output(model, batches[0], name)), examples=examples)


def _metrics(seen: Mapping[str, Moments], examples: int, matters: Callable[[str], bool]) -> dict[str, Metric]:
    """All in one unit: the squared change of the network's output for an example, however many rows each layer makes of one.

    What no output depends on counts next to nothing. Where one does, but not by a derivative (it was detached, or gives labels), the layer's outputs
    count like those of the others on average.
    """
    seen = {name: moments for name, moments in seen.items() if moments.positions}
    found = {name: moments.metric(name, examples) for name, moments in seen.items()}
    counts = {name: float(m.outputs.diagonal(dim1=-2, dim2=-1).mean()) for name, m in found.items() if m.outputs is not None}
    least = LEAST * max(counts.values(), default=0.0)
    counting = [count for count in counts.values() if count > least]
    typical = sum(counting) / max(len(counting), 1)
    for name, moments in seen.items() if least else ():
        if counts.get(name, 0.0) <= least:
            weighting = typical if name not in counts and matters(name) else least
            found[name] = replace(found[name], outputs=alike(moments.geometry, weighting))
    return found


def _changes_output(model: nn.Module, batch: Any, name: str) -> bool:
    """Whether other outputs of a layer change anything that the network gives for a batch, labels included. An error is a change."""

    def outputs(then: Callable[[Any], Any]) -> list[Tensor]:
        net = evaluating_copy(model, share_parameters=True)  # each begins in the same state
        seed_all(SEED)
        args, kwargs = arguments(private_inputs(batch))
        with _forward_of(net.get_submodule(name), lambda _, __, output: then(output)):
            return [t.clone() for t in tensors_in(net(*args, **kwargs))]

    def disturbed(x: Any) -> Any:
        if not isinstance(x, Tensor) or not x.is_floating_point():
            return x
        noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(SEED), device="cpu").to(x.device, x.dtype)
        return x + x.std(correction=0) * noise

    try:
        with quiet_run(), uncompiled():
            before, after = outputs(lambda x: x), outputs(disturbed)
    except (SurgeryError, RuntimeError, ValueError, IndexError, TypeError):
        return True
    return len(before) != len(after) or not all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


@contextmanager
def _forward_of(layer: nn.Module, then: Callable[[tuple[Any, ...], dict[str, Any], Any], Any]) -> Iterator[None]:
    """Inside, a layer of a private copy gives what ``then(args, kwargs, output)`` does, to whoever calls its ``forward``, before hooks of its own."""
    own = layer.__dict__.get("forward")
    forward = layer.forward

    @wraps(forward)
    def changed(*args: Any, **kwargs: Any) -> Any:
        return then(args, kwargs, forward(*args, **kwargs))

    layer.__dict__["forward"] = changed
    try:
        yield
    finally:
        if own is None:
            del layer.__dict__["forward"]
        else:
            layer.__dict__["forward"] = own


def _moments(twin: nn.Module, model: nn.Module, batches: Sequence[Any], sites: Sequence[Site], *, gradients: bool) -> dict[str, Moments]:
    """What the sites of ``twin``, a copy of ``model``, see of the batches and, with gradients, how much of their outputs counts."""
    seen = {site.name: Moments(site.geometry) for site in sites}
    with ExitStack() as stack:
        for name, moments in seen.items():
            stack.enter_context(_forward_of(twin.get_submodule(name), partial(_note, moments)))
        stack.enter_context(kept_random_states())
        stack.enter_context(uncompiled())
        stack.enter_context(torch.set_grad_enabled(gradients))
        generator = torch.Generator().manual_seed(SEED)
        for index, batch in enumerate(tracked(batches, "calibrating")):
            args, kwargs = arguments(private_inputs(batch))
            with model_errors(model, batch, f"calibration: batch {index}"):
                _project(twin(*args, **kwargs), generator)
    return seen


def inputs_needed(model: Any) -> int:
    """How many positional arguments a model cannot do without; 1 where its ``forward`` does not tell."""
    try:
        parameters = inspect.signature(model.forward).parameters.values()
    except (AttributeError, TypeError, ValueError):
        return 1
    return max(1, sum(p.default is p.empty and p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD) for p in parameters))


def batches_of(calibration: Any, argument: str = "calibration", *, needed: int = 1) -> list[Any]:
    """The batches of what a user gave as ``calibration``: a tensor or a mapping is one batch; in ``(inputs, labels)`` of a loader labels are dropped.

    Args:
        calibration: it.
        argument: what errors call it.
        needed: inputs that the network cannot do without; a pair is kept whole where there are two.

    Raises:
        SurgeryTypeError: it cannot be iterated.
        SurgeryValueError: it holds no batch, or one without examples.
        SurgeryError: it fails on the way.
    """
    if isinstance(calibration, Tensor | Mapping):
        return [calibration]
    if not isinstance(calibration, Iterable) or isinstance(calibration, str | bytes):
        raise SurgeryTypeError(f"{argument}: expected batches to iterate over, got {type(calibration).__name__}")
    with callers_code(f"{argument}: iterating over it failed"), kept_random_states():  # of which a loader draws a seed
        batches = [_without_labels(batch) if needed < 2 else _as_given(batch) for batch in calibration]
    if not batches:
        used = "; it is an iterator that was used up: give a list or a DataLoader" if isinstance(calibration, Iterator) else ""
        raise SurgeryValueError(f"{argument}: there is no batch in it{used}")
    for index, batch in enumerate(batches):
        if any(t.numel() == 0 for t in tensors_in(batch)) and all(t.numel() == 0 for t in tensors_in(batch)):
            raise SurgeryValueError(f"{argument}: batch {index} holds no example")
    return batches


def _without_labels(batch: Any) -> Any:
    pair = isinstance(batch, list | tuple) and len(batch) == 2 and all(isinstance(part, Tensor) for part in batch)
    if pair and not batch[1].is_floating_point():
        return batch[0]  # as torchvision's data sets give them: (images, labels)
    return _as_given(batch)


def _as_given(batch: Any) -> Any:
    return tuple(batch) if isinstance(batch, list) else batch


@dataclass(slots=True, eq=False)
class Moments:
    """Sums over what one layer saw and gave."""

    geometry: Geometry
    inputs: Tensor | None = None
    outputs: Tensor | None = None
    positions: int = 0

    def add(self, other: Moments) -> None:
        """What another layer with the same weight saw and gave."""
        self.inputs, self.outputs = _sum(self.inputs, other.inputs), _sum(self.outputs, other.outputs)
        self.positions += other.positions

    def saw(self, x: Tensor) -> None:
        seen = rows(x.detach(), self.geometry.dims, self.geometry.groups)
        self.inputs = _sum(self.inputs, seen.mT @ seen)
        self.positions += seen.shape[1]

    def gave(self, gradient: Tensor) -> None:
        given = rows(gradient, self.geometry.dims, self.geometry.groups)
        self.outputs = _sum(self.outputs, given.mT @ given)

    def metric(self, name: str, examples: int) -> Metric:
        if not all(bool(moment.isfinite().all()) for moment in (self.inputs, self.outputs) if moment is not None):
            raise SurgeryValueError(f"calibration: {name or 'the model'} sees, or its output has, numbers that are not finite on these batches")
        inputs = None if self.inputs is None else self.inputs / max(self.positions, 1)
        return Metric(inputs=inputs, outputs=None if self.outputs is None else self.outputs / max(examples, 1))


def _note(moments: Moments, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
    given, got = next(tensors_in((args, kwargs)), None), next(tensors_in(output), None)
    if given is None or got is None or not moments.geometry.fits(tuple(given.shape)):
        return output
    moments.saw(given)
    if torch.is_grad_enabled() and not got.requires_grad and got is output and got.is_floating_point():
        output = got = got + torch.zeros((), dtype=got.dtype, device=got.device, requires_grad=True)  # no leaf, which nothing could change in place
    if got.requires_grad:
        got.register_hook(moments.gave)
    return output


def _sum(total: Tensor | None, more: Tensor | None) -> Tensor | None:
    return more if total is None else total if more is None else total + more


def _project(output: Any, generator: torch.Generator) -> None:
    """The derivative of a random projection of all floating-point outputs, independent for every example and number."""
    reached = [t for t in tensors_in(output) if t.requires_grad]
    directions = [torch.randn(t.shape, generator=generator, device="cpu", dtype=torch.float32).to(t.device, t.dtype) for t in reached]
    if reached:
        torch.autograd.backward(reached, directions)
