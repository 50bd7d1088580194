"""What is learnt of a model before anything is decided: whether surgery can be done on it, and what one forward pass shows."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from passes import Observation, observe
from passes.errors import SurgeryTypeError, SurgeryValueError
from passes.kinds import kind_of
from passes.parity import tensors_in
from passes.running import check_initialized, evaluating_copy, output_of, quietly, run
from passes.site import Site
from passes.watching import count_of_tensors
from surgery.cost import chain_macs, count_macs, site_macs
from surgery.progress import stage
from surgery.ranks.budget import Totals
from surgery.record import unwrap

__all__ = [
    "Seen",
    "check_hooks_kept",
    "check_not_quantized",
    "check_still_runs",
    "hooked_parameters",
    "look",
    "no_longer_runs",
    "saved_macs",
    "totals_of",
    "usable_model",
]


BROKEN = (AttributeError, TypeError, AssertionError)  # what code raises for a layer that is not what it takes it for; anything else may be numbers


def usable_model(model: Any) -> None:
    """Refuse what is no module, or hides one.

    Raises:
        SurgeryTypeError: not a module, compiled, wrapped for parallel training, sharded, or TorchScript.
        SurgeryValueError: it holds itself, or a lazy module of it was never run.
    """
    if not isinstance(model, nn.Module):
        raise SurgeryTypeError(f"model: expected an nn.Module, got {type(model).__name__}")
    if isinstance(model, torch.jit.ScriptModule):
        raise SurgeryTypeError("model: a TorchScript module cannot be rewritten; give the module that it was made from")
    if unwrap(model) is not model:
        kind = "compiled" if "_orig_mod" in model._modules else f"wrapped in {type(model).__name__}"
        inner = "model._orig_mod" if "_orig_mod" in model._modules else "model.module"
        raise SurgeryTypeError(f"model: it is {kind}; do the surgery on {inner}, then compile or wrap the result anew")
    if any(cls.__name__ == "FullyShardedDataParallel" for cls in type(model).__mro__) or any(
        type(p).__name__ == "DTensor" for p in model.parameters()
    ):
        raise SurgeryTypeError(
            "model: its parameters are shared out over several processes, and a cut needs all of a weight; do the surgery before fully_shard, or "
            "gather them (torch.distributed.checkpoint.state_dict.get_state_dict, full_state_dict=True) into a fresh model, cut that, and shard it"
        )
    try:
        check_initialized(model)
    except RecursionError as error:
        raise SurgeryValueError("model: a module holds itself, directly or further down, and torch cannot even set its mode; take it out") from error


def check_not_quantized(model: nn.Module, sites: Sequence[Site]) -> None:
    """Refuse a model all of whose layers torch has quantized: silence about layers that are not even listed would mislead.

    Raises:
        SurgeryTypeError: it is one.
    """
    packed = [(name, module) for name, module in model.named_modules() if ".quantized" in type(module).__module__ and hasattr(module, "_weight_bias")]
    if packed and not sites:
        name, module = packed[0]
        raise SurgeryTypeError(f"model: {name or 'it'} ({type(module).__name__}) is quantized, its weight packed; do the surgery before that")


def hooked_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Parameters with hooks of their own, by name: gradient masks and clips, optimizers that step in the backward pass."""
    found = model.named_parameters(remove_duplicate=False)
    return {name: p for name, p in found if p._backward_hooks or getattr(p, "_post_accumulate_grad_hooks", None)}


def check_hooks_kept(model: nn.Module, hooked: Mapping[str, nn.Parameter]) -> None:
    """Refuse to do surgery in place of parameters with hooks, which the new ones would not have.

    Raises:
        SurgeryValueError: one of these is no longer in the model.
    """
    there = {id(p) for p in model.parameters()}
    gone = [name for name, parameter in hooked.items() if id(parameter) not in there]
    if gone:
        more = f" and {len(gone) - 1} more" if len(gone) > 1 else ""
        raise SurgeryValueError(
            f"{gone[0]}{more}: hooks are registered on it (register_hook, register_post_accumulate_grad_hook), which the parameters in its place "
            "would not have; remove them before and register them on the new parameters, or keep the layer by exclude="
        )


@dataclass(frozen=True, slots=True)
class Seen:
    """One forward pass of the example inputs: what a host learns from it, the MACs that ran, and the shapes of the inputs; None without inputs."""

    observed: Observation | None = None
    macs: int | None = None
    input_shapes: tuple[tuple[int, ...], ...] | None = None


def look(model: nn.Module, example_inputs: Any) -> Seen:
    """Run the model once on the example inputs, if there are any: on a copy, which is gone before any other is made."""
    if example_inputs is None:
        return Seen()
    sizes = [t.numel() for t in tensors_in(example_inputs)]
    if sizes and not any(sizes):
        raise SurgeryValueError("example_inputs: they hold no example, all their tensors are empty")
    with stage("running the example inputs"), count_macs() as counter:
        observed = observe(model, example_inputs)
    if observed.gradients:  # the run without them, which failed, was counted as well
        with count_macs() as counter:
            output_of(evaluating_copy(model), example_inputs, gradients=True)
    return Seen(observed, counter.macs, tuple(tuple(t.shape) for t in tensors_in(example_inputs)))


def no_longer_runs(error: SurgeryValueError) -> SurgeryValueError:
    """The error for a network that ran, and with its chains does not."""
    told = "perhaps by its numbers alone: cut less"
    if isinstance(error.__cause__, BROKEN):
        told = "its code does with a layer what a chain does not take; keep that layer by exclude="
    return SurgeryValueError(f"with its chains the network no longer runs ({error}): {told}")


def check_still_runs(model: nn.Module, seen: Seen, example_inputs: Any) -> None:
    """Run a copy of the network once more with its chains, where example inputs were given.

    Warns where it fails by what may be its numbers, and where the output holds another number of tensors: code may ask for the class of a layer,
    which a chain does not have.

    Raises:
        SurgeryValueError: its code fails on a chain.
    """
    if seen.observed is None:
        return
    try:  # on a copy of all of it: some write to parameters, or leave gradients there
        found = quietly(lambda: count_of_tensors(run(evaluating_copy(model), example_inputs)))
    except SurgeryValueError as error:
        if isinstance(error.__cause__, BROKEN):
            raise no_longer_runs(error) from error
        warnings.warn(f"with its chains {type(model).__name__} does not run here, perhaps by its numbers alone: {error}", stacklevel=3)
        return
    if found != seen.observed.outputs:
        told = "by its numbers, or its code asks for the class of a layer (isinstance), which a chain does not have: then keep it by exclude="
        warnings.warn(f"with its chains {type(model).__name__} gives {found} tensors instead of {seen.observed.outputs}: {told}", stacklevel=3)


def totals_of(model: nn.Module, seen: Seen) -> Totals:
    """What the network takes now."""
    return Totals(params=sum(p.numel() for p in model.parameters()), macs=seen.macs)


def saved_macs(site: Site) -> int | None:
    """MACs that the chain at a site saves over the layer it replaced; 0 where there is none, None where the calls are not known."""
    if site.chain is None:
        return 0
    shapes = kind_of(site.chain).shapes(site.geometry, site.chain, site.bias is not None)
    before, after = site_macs(site), chain_macs(shapes, site.calls)
    return None if before is None or after is None else before - after
