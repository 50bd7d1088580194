"""Chains corrected for the errors made before them: each last layer in turn, by least squares against what the original network had there."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from math import prod, sqrt
from operator import itemgetter
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from passes.chain import pieces_of, plain_layer
from passes.errors import SurgeryValueError
from passes.geometry import Geometry, Piece
from passes.parity import private_inputs, tensors_in
from passes.refit import refit, rows
from passes.running import arguments, evaluating_copy, is_out_of_memory, model_errors, quiet_run, random_state, seed_all, uncompiled
from surgery.inspection import no_longer_runs
from surgery.lockstep import Enough, OutOfStep, Pass
from surgery.progress import tracked
from surgery.storages import Storages

__all__ = ["STAGES", "Refit", "can_be_refitted", "correct"]

LARGEST = 1152  # numbers that a kernel sees, of which the second moments are taken
HELD = 0.25  # share of the machine's, or the GPU's, memory that networks which are stopped on their way may take
THREADS = 1024  # of the operating system that they may take: each has a pool of its own for what torch computes in parallel
STAGES = 16  # where one of them is too little, layers are taken in at most so many groups, in order
SLICE = 2**25  # numbers of what a layer sees that are laid out at once, where a batch has more than one example
CONTAINER = (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"))  # where Linux tells its memory
SEED = 0  # of every pass: both networks draw the same random numbers, if they draw some


def correct(original: nn.Module, model: nn.Module, chains: Mapping[str, str], batches: Sequence[Any]) -> dict[str, float]:
    """Refit the last layer of each chain of ``model``, in place, in the order in which the batches reach them.

    For every chain the inputs of its last layer in ``model``, as it is then, and the outputs that its layer had in ``original`` give the moments.
    Later chains are so corrected for what earlier ones have left. Both networks run in eval mode.

    All batches go through both networks once, side by side, and stop at every chain until it is corrected: what the rest of the pass needs is held
    for all of them. Where that is too much memory, or too many threads, or the networks draw random numbers, passes begin anew for each of up to
    ``STAGES`` groups of chains.

    Args:
        original: the network before the cut.
        model: the decomposed network.
        chains: for the name of each layer in ``original`` that of its chain's last layer in ``model``.
        batches: as for ``calibrate``.

    Returns:
        For each layer that could be corrected |Y - Y'|_F / |Y|_F of its outputs over the batches, with the errors made before it.

    Raises:
        SurgeryValueError: a network does not run on a batch.
    """
    original, model = (evaluating_copy(network, share_parameters=True) for network in (original, model))  # buffers may count what goes through
    with quiet_run(), uncompiled():
        look = partial(_first_pass, list(chains.values()), batches)
        try:
            calls, needed, draws = look(model)
        except SurgeryValueError as error:
            if is_out_of_memory(error):
                raise
            with torch.enable_grad(), suppress(SurgeryValueError):
                look(model)
                return {}  # it differentiates by its inputs, and what is done here is done without gradients
            raise no_longer_runs(error) from error
        refitted = [name for name, last in chains.items() if last in calls and can_be_refitted(Geometry.of(model.get_submodule(last)))]
        refitted.sort(key=lambda name: list(calls).index(chains[name]))
        ordered = {name: chains[name] for name in refitted}
        errors = {} if draws or not _fit(model, needed, len(batches)) else _in_step(original, model, ordered, calls, batches)
        rest = refitted[len(errors) :]
        size = -(-len(rest) // STAGES) or 1
        for start in range(0, len(rest), size):
            stage = {name: chains[name] for name in rest[start : start + size]}
            errors |= _correct_together(original, model, stage, calls, batches)
    return {name: error for name, error in errors.items() if error is not None}


def _in_step(
    original: nn.Module, model: nn.Module, chains: Mapping[str, str], calls: Mapping[str, int], batches: Sequence[Any]
) -> dict[str, float | None]:
    """All chains, or those before the first that some batch does not reach in this order, each with the error that is left."""
    found: dict[str, float | None] = {}
    pairs = []
    for number, batch in enumerate(batches):
        told = f"calibration: batch {number}"
        before, after = Pass(original, chains, batch, outputs=True, argument=told), Pass(model, chains.values(), batch, outputs=False, argument=told)
        pairs.append((before, after))
    try:
        for name, last in tracked(chains.items(), "correcting", name=itemgetter(0)):
            layer = model.get_submodule(last)
            sums = _sums(layer)
            for before, after in pairs:
                wanted, given = before.reach(name), after.reach(last)
                if wanted is not None and given is not None and calls[last] == 1:
                    sums.add(given, wanted)
            if calls[last] == 1:
                found[name] = _put(layer, sums)
            else:  # it is needed before all is known: a look ahead, with what has been corrected
                found |= _correct_together(original, model, {name: last}, calls, batches)
    except OutOfStep:
        pass
    except (SurgeryValueError, RuntimeError, MemoryError) as error:  # what is held was foretold too low: passes that begin anew hold less
        if not is_out_of_memory(error):
            raise
    finally:
        for one in (each for pair in pairs for each in pair):
            one.close()
    return found


def _fit(model: nn.Module, needed: float, batches: int) -> bool:
    """Whether passes of all batches through both networks can be held, in memory and in threads. Each has buffers of its own."""
    buffers = sum(b.numel() * b.element_size() for b in model.buffers())
    threads = torch.get_num_threads() if _device(model).type == "cpu" else 1
    return 2 * (needed + batches * buffers) <= HELD * _memory(model) and 2 * batches * threads <= THREADS


def _device(model: nn.Module) -> torch.device:
    return next((p.device for p in model.parameters()), torch.device("cpu"))


def _memory(model: nn.Module) -> float:
    """Bytes of memory: of a GPU what is not in use, of a machine what it has, or what its container may take."""
    device = _device(model)
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return float(free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device))
    try:
        limits = [float(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))]
    except (AttributeError, ValueError, OSError):  # not on every system
        limits = [16 * 2.0**30]
    for file in CONTAINER:
        with suppress(OSError, ValueError):  # it is not there, or says "max"
            limits.append(float(file.read_text()))
    return min(limits)


def _first_pass(names: Sequence[str], batches: Sequence[Any], model: nn.Module) -> tuple[dict[str, int], float, bool]:
    """How often each module is called, in the order of the first calls, the bytes that passes of all batches hold at most, stopped there, and whether
    random numbers are drawn on the way.

    Learnt from the first batch, on a copy: what it leaves behind in the model would be seen by the passes that are compared.

    Raises:
        SurgeryValueError: the model fails on it.
    """
    twin = evaluating_copy(model, share_parameters=True)
    calls: dict[str, int] = {}
    most = 0

    def note(name: str, *_: Any) -> None:
        nonlocal most
        calls[name] = calls.get(name, 0) + 1
        most = max(most, alive.held())

    seed_all(SEED)
    before = random_state()
    with Storages() as alive, model_errors(model, batches[0], "calibration"):
        _watched(twin, names, note, batches[0])
    sizes = [sum(t.numel() for t in tensors_in(batch)) for batch in batches]
    return calls, most * sum(sizes) / max(sizes[0], 1), random_state() != before


def _watched(model: nn.Module, names: Iterable[str], note: Callable[..., None], batch: Any) -> None:
    """One pass of a batch, under one seed, with ``note(name, module, args, output)`` after each call of the named modules; it may end the pass by
    ``Enough``.
    """
    handles = [model.get_submodule(name).register_forward_hook(partial(note, name), prepend=True) for name in names]  # before hooks of its own
    args, kwargs = arguments(private_inputs(batch))
    seed_all(SEED)
    try:
        with suppress(Enough):
            model(*args, **kwargs)
    finally:
        for handle in handles:
            handle.remove()


def _correct_together(
    original: nn.Module, model: nn.Module, stage: Mapping[str, str], calls: Mapping[str, int], batches: Sequence[Any]
) -> dict[str, float | None]:
    sums = {name: _sums(model.get_submodule(last)) for name, last in stage.items()}
    for number, batch in enumerate(tracked(batches, "correcting")):
        with model_errors(model, batch, f"calibration: batch {number}"):
            wanted = _seen(original, {name: calls[last] for name, last in stage.items()}, batch, outputs=True)
            given = _seen(model, {last: calls[last] for last in stage.values()}, batch, outputs=False)
        for name, last in stage.items():
            for x, y in zip(given[last], wanted[name], strict=False):
                sums[name].add(x, y)
    return {name: _put(model.get_submodule(last), sums[name]) for name, last in stage.items()}


def _seen(model: nn.Module, calls: Mapping[str, int], batch: Any, *, outputs: bool) -> dict[str, list[Tensor]]:
    """What the modules give, or get, in each call of one pass; the pass ends when each has been called that often."""
    found: dict[str, list[Tensor]] = {name: [] for name in calls}

    def note(name: str, _: nn.Module, args: Any, output: Any) -> None:
        value = next(tensors_in(output if outputs else args), None)
        if value is not None:
            found[name].append(value.detach().clone())  # what comes next may work in place
        if all(len(found[name]) >= often for name, often in calls.items()):
            raise Enough

    _watched(model, calls, note, batch)
    return found


class Refit:
    """Sums over what one layer sees, and what should come out of it.

    Args:
        piece: the layer.
        lower: where padding ``"same"`` shares out an odd number of pixels, one more comes at the beginning, not at the end.
    """

    def __init__(self, piece: Piece, *, lower: bool = False) -> None:
        self.piece = piece
        self.patches = _patches(piece, lower=lower)
        self.xtx: Tensor | None = None
        self.xty: Tensor | None = None
        self.yty = 0.0
        self.comparable = True

    def add(self, x: Tensor, y: Tensor) -> None:
        """Rows that the layer sees, and those wanted of it; where what goes into a layer hangs on numbers there may be another count of them."""
        g = self.piece.geometry
        if g.dims and x.ndim == y.ndim == g.dims + 2 and len(x) == len(y) > 1 and x.numel() * prod(g.kernel) > SLICE * prod(g.stride):
            for a, b in zip(x.tensor_split(2), y.tensor_split(2), strict=True):
                self.add(a, b)
            return
        given = rows(x if self.patches is None else self.patches(x), g.dims, g.groups)
        given = torch.cat([given, given.new_ones(*given.shape[:2], 1)], 2)
        wanted = rows(y, g.dims, g.groups)
        if given.shape[1] != wanted.shape[1]:
            self.comparable = False
            return
        xtx, xty = given.mT @ given, given.mT @ wanted
        self.xtx = xtx if self.xtx is None else self.xtx + xtx
        self.xty = xty if self.xty is None else self.xty + xty
        self.yty += float(wanted.square().sum())

    def solve(self) -> tuple[Piece, float | None] | None:
        """The layer that comes nearest, float64, and the relative error that it leaves; None where that cannot be told: nothing was seen, or other
        positions than there were, or the sums are not finite.
        """
        if self.xtx is None or self.xty is None or not self.comparable:
            return None
        new = refit(self.piece, self.xtx, self.xty)
        if not bool(new.weight.isfinite().all()):
            return None
        g = self.piece.geometry
        kept = g.forward_blocks(new.weight).reshape(g.groups, g.out_channels // g.groups, -1).mT
        bias = kept.new_zeros(g.groups, 1, kept.shape[2]) if new.bias is None else new.bias.reshape(g.groups, 1, -1)
        kept = torch.cat([kept, bias], 1)
        left = self.yty - 2 * float((kept * self.xty).sum()) + float((kept * (self.xtx @ kept)).sum())
        return new, sqrt(max(left, 0.0) / self.yty) if self.yty > 0 else None


def _sums(layer: nn.Module) -> Refit:
    (piece,) = pieces_of({"": layer})
    return Refit(piece)


def _put(layer: nn.Module, sums: Refit) -> float | None:
    """Put the refitted numbers in the layer; the relative error that is left, or None where nothing was seen."""
    found = sums.solve()
    if found is None:
        return None
    new, error = found
    parameters: Any = layer._parameters
    parameters["weight"].copy_(new.weight)
    if new.bias is not None:
        parameters["bias"].copy_(new.bias)
    return error


def can_be_refitted(geometry: Geometry) -> bool:
    """Whether the moments of what its kernel sees can be afforded, and are those of a plain least-squares problem."""
    return not geometry.transposed and geometry.in_channels // geometry.groups * prod(geometry.kernel) <= LARGEST


def _patches(piece: Piece, *, lower: bool) -> Callable[[Tensor], Tensor] | None:
    """What gives, at each position, all numbers that the piece's kernel sees there; None where that is its input itself."""
    g = piece.geometry
    one = (1,) * g.dims
    if g.is_pointwise and g.stride == one and (isinstance(g.padding, str) or not any(g.padding)):
        return None
    pixels = prod(g.kernel)
    seeing = replace(g, out_channels=g.in_channels * pixels, groups=g.in_channels)
    each = torch.eye(pixels, dtype=piece.weight.dtype, device=piece.weight.device).reshape(pixels, 1, *g.kernel)
    weight = each.repeat(g.in_channels, 1, *one)
    if g.padding_mode != "zeros" or not (g.padding_end or g.padding == "same"):
        return plain_layer(Piece("", seeing, weight, None), None)
    unpadded = plain_layer(Piece("", replace(seeing, padding=(0,) * g.dims, padding_end=()), weight, None), None)

    def padded(x: Tensor) -> Tensor:
        pads = [_pads(g, axis, x.shape[axis - g.dims], lower=lower) for axis in range(g.dims)]
        return unpadded(nn.functional.pad(x, [pixels for pair in reversed(pads) for pixels in pair]))  # type: ignore[no-any-return]

    return padded


def _pads(g: Geometry, axis: int, size: int, *, lower: bool) -> tuple[int, int]:
    """Zeros before and after an input of this size. ``"same"`` is what ONNX calls SAME_UPPER or SAME_LOWER, torch's where the stride is 1."""
    if g.padding != "same":
        return g.pads(axis)
    extent = g.dilation[axis] * (g.kernel[axis] - 1) + 1
    total = max((-(-size // g.stride[axis]) - 1) * g.stride[axis] + extent - size, 0)
    less, more = total // 2, total - total // 2
    return (more, less) if lower else (less, more)
