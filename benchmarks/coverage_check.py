"""The checks of ``coverage.py`` for one network: inputs are found, weights made fit to compare, and what surgery gives is held against the original.

Nothing here knows a network by name: what is tried is the same for all of them, in the same order.
"""

from __future__ import annotations

import math
import random
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import surgery
from passes.capture import private_copy
from passes.parity import difference, private_inputs, tensors_in

__all__ = ["Given", "Network", "check", "layers_of"]

SEED = 0
LAYERS = (nn.Linear, nn.modules.conv._ConvNd)
SIZES = (64, 96, 128, 160, 192, 224, 256, 288, 320, 384, 448, 512, 640)
FRAMES = (8, 16)
BATCHES = (2, 4, 1, 8, 16)
ENOUGH = 16  # values that a batch norm should average over: with two of them it hardly depends on what it normalizes, or all too much
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4}
RIPPLE = 10  # how many times the effect of one rounding of the weights a decomposed network may be off by, where that is beyond the tolerance
DRAWS = 2  # such roundings
# Operators whose result jumps where their input hardly moves; boxes, tokens and experts are chosen with them.
SELECTING = ("topk", "sort", "argsort", "argmax", "argmin", "max.dim", "nms", "nonzero", "multinomial", "bucketize", "searchsorted", "round")
VISIBLE = 0.5  # least size of a parameter that is one number repeated and small, such as a layer scale of 1e-6

Inputs = Callable[[int], Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Given:
    """What a network is called with: a text that says it, its form without the size, and the example inputs for a number of samples in a batch."""

    text: str
    form: str = ""
    inputs: Inputs


@dataclass(frozen=True, slots=True, kw_only=True)
class Network:
    """A network to check. ``given`` is None where its inputs are to be found by trying; ``size`` is its parameters, if they are known."""

    name: str
    library: str
    make: Callable[[], nn.Module]
    given: Given | None = None
    size: int = 0


@dataclass(slots=True, eq=False)
class Run:
    """One forward pass: the output, and for every call of a layer its output tensor.

    ``late`` are the calls after the first choice that the data made (``choice``, an operator), if there was one.
    """

    output: Any
    calls: dict[tuple[str, int], Tensor] = field(default_factory=dict)
    late: set[tuple[str, int]] = field(default_factory=set)
    choice: str | None = None
    narrowed: bool = False


class Checked(Exception):
    """A check that failed, in words."""


def check(network: Network) -> dict[str, Any]:
    """One row of the table: everything that is claimed of one network, measured. It fails where ``failures`` is not empty."""
    row: dict[str, Any] = {"name": network.name, "library": network.library, "failures": [], "notes": [], "seconds": {}}
    step = Steps(row)
    with step("make"):
        torch.manual_seed(SEED)
        model = network.make().eval()
        row["parameters"] = sum(p.numel() for p in model.parameters())
    if not row["failures"]:
        with step("inputs"):
            given, batch, training = find_inputs(model, network.given)
            row["given"], row["batch"], row["train"] = given.text, batch, training is None
            if training is not None:
                row["notes"].append(f"not run in train mode: the original network cannot ({training})")
    if not row["failures"]:
        with step("prepare"):
            inputs = given.inputs(batch)
            row["inputs"] = [list(t.shape) for t in tensors_in(inputs)]
            dtype = torch.float64
            refusal = refuses_float64(model, inputs, (False, True) if row["train"] else (False,))
            if refusal is not None:
                dtype = torch.float32
                row["notes"].append(f"refuses float64 ({refusal[:200]})")
            else:
                prepare(model, inputs)
            row["dtype"] = _short(dtype)
    if not row["failures"]:
        with tempfile.TemporaryDirectory() as folder:
            _check_prepared(model, inputs, dtype, row, step, Path(folder))
    row["seconds"]["all"] = round(sum(row["seconds"].values()), 2)
    row["passed"] = not row["failures"]
    return row


class Steps:
    """Times the steps of a row, and turns what a step raises into a failure of the row."""

    def __init__(self, row: dict[str, Any]) -> None:
        self._row = row

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        began = time.perf_counter()
        try:
            yield
        except Checked as error:
            self._row["failures"].append(f"{name}: {error}")
        except Exception as error:  # the network's code and ours run here: whatever is raised is the result
            where = traceback.extract_tb(error.__traceback__)[-1]
            text = f"{name}: {type(error).__name__}: {str(error)[:1500]} [{where.filename.rpartition('/')[2]}:{where.lineno}]"
            self._row["failures"].append(text)
        finally:
            self._row["seconds"][name] = round(time.perf_counter() - began, 2)


def _check_prepared(model: nn.Module, inputs: Any, dtype: torch.dtype, row: dict[str, Any], step: Steps, folder: Path) -> None:
    """What each layer gave waits in a file until it is compared with, and so do the original's weights: all of that may take more than there is."""
    with step("capture"):
        graph = surgery.capture(model, inputs)
        row["capture"] = "recorded" if type(graph).__name__ == "RecordedGraph" else "traced"
        row["nodes"] = len(graph.nodes)
        del graph  # and with it a copy of all weights
    references: dict[str, Run] = {}
    with step("reference"):
        inputs = to_dtype(inputs, dtype)
        original = private_copy(model.to(dtype))
        for mode in ("eval", "train") if row["train"] else ("eval",):
            reference = run(original.train(mode == "train"), inputs)
            row.setdefault("meaning", {})[mode] = meaning(reference)
            torch.save(reference.calls, folder / mode)
            reference.calls = {}
            references[mode] = reference
        del original
        rest_in_file(model, folder / "weights")
    if row["failures"] and not references:
        return
    full = half = None
    with step("full"):
        full = surgery.decompose(model, {"re:.*": 1.0})
    if full is not None:
        with step("account"):
            account(model, full, row)
        for mode, reference in references.items():
            with step(f"full, {mode}"):
                reference.calls = torch.load(folder / mode, weights_only=True)
                row[f"full_{mode}"] = compare_conditioned(reference, model, full.train(mode == "train"), inputs)
            reference.calls = {}
    del full
    references.clear()
    keys = state_of(model)
    with step("half"):
        half = surgery.decompose(model, {"re:.*": 0.5}, inplace=not isinstance(model, LAYERS))
    if half is None:
        return
    with step("back"):
        row["half_errors"] = [r.error for r in surgery.report(half).layers if r.error is not None]
        reference = run(half.eval(), inputs)
        half = surgery.reconstruct(half)
        row["back"] = compare(reference, half, inputs)
    with step("keys"):
        got = state_of(half)
        if got != keys:
            odd = sorted(set(map(str, got)) ^ set(map(str, keys)))
            raise Checked(f"the state dict after reconstruction differs: {odd[:4] or 'the order of its keys'}")


def rest_in_file(model: nn.Module, file: Path) -> None:
    """Weights in a file that is mapped into memory, which need none while nobody reads them; what is written to them stays in memory."""
    with file.open("wb") as out:
        places = [(p, out.tell(), out.write(p.detach().numpy().tobytes())) for p in _plain(model)]
    for parameter, start, size in places:
        mapped = torch.from_numpy(numpy.memmap(file, numpy.uint8, "c", start, (size,)))
        parameter.data = mapped.view(parameter.dtype).view(parameter.shape)


def _plain(model: nn.Module) -> Iterator[nn.Parameter]:
    """Large parameters whose numbers lie in their order."""
    return (p for p in model.parameters() if p.is_contiguous() and p.numel() > 2**16 and p.dtype in TOLERANCE)


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


# Inputs


def find_inputs(model: nn.Module, given: Given | None) -> tuple[Given, int, str | None]:
    """What the network runs on, how many samples, and why it cannot run in train mode, or None where it can.

    Tried in this order: one batch of images, a list of images, a batch of videos, two batches of images; each from small to large, and each with 2,
    4, 1, 8 and 16 samples. The first on which the network runs in both modes and gives every batch norm ``ENOUGH`` values is taken; or else, in
    the same form, that which gives them most; or else the first on which it runs in eval mode.
    """
    errors: list[str] = []
    refusal: str | None = None
    first: tuple[Given, int] | None = None
    best: tuple[Given, int] | None = None
    most = 0
    for candidate in [given] if given is not None else candidates():
        if first is not None and candidate.form != first[0].form:
            break
        ran = False
        for batch in BATCHES:
            inputs = candidate.inputs(batch)
            if first is None:
                error, _ = attempt(model, inputs)
                if error is not None:
                    errors.append(f"{candidate.text}: {error}")
                    break
                first = (candidate, batch)
            error, values = attempt(model, inputs, train=True)
            ran = ran or error is None
            if error is not None:
                refusal = refusal or error
                if batch == 1 and not ran:
                    break
            elif values > most and attempt(model, inputs)[0] is None:
                best, most = (candidate, batch), values
                if values >= ENOUGH:
                    return candidate, batch, None
    if first is None:
        raise Checked(f"no inputs were found on which the original network runs; {errors[0]}; {errors[-1]}")
    return (*first, refusal) if best is None else (*best, None)


def candidates() -> Iterator[Given]:
    for size in SIZES:
        yield Given(form="images", text=f"images {size}x{size}", inputs=lambda b, s=size: image(b, 3, s, s))
    for size in SIZES:
        yield Given(form="list of images", text=f"list of images {size}x{size}", inputs=lambda b, s=size: [image(3, s, s) for _ in range(b)])
    for size in SIZES:
        for frames in FRAMES:
            yield Given(form="videos", text=f"videos {frames}x{size}x{size}", inputs=lambda b, s=size, f=frames: image(b, 3, f, s, s))
    for size in SIZES:
        yield Given(form="pairs of images", text=f"pairs of images {size}x{size}", inputs=lambda b, s=size: (image(b, 3, s, s), image(b, 3, s, s)))


def image(*shape: int) -> Tensor:
    """Numbers in [0, 1], from a generator of its own, so that the same shape is the same image."""
    return torch.rand(shape, generator=torch.Generator().manual_seed(SEED + math.prod(shape)))


def attempt(model: nn.Module, inputs: Any, train: bool = False) -> tuple[str | None, int]:
    """Why the model cannot run on these inputs, or None where it can, and the fewest values that a batch norm averages over; on a copy."""
    twin = private_copy(model).train(train)
    fewest = ENOUGH

    def note(_: nn.Module, args: tuple[Any, ...]) -> None:
        nonlocal fewest
        if args and isinstance(args[0], Tensor):
            fewest = min(fewest, args[0].numel() // args[0].shape[1])

    for module in twin.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.register_forward_pre_hook(note)
    try:
        seeded(twin, inputs)
    except Exception as error:  # the network's own code refuses these inputs in its own way
        return f"{type(error).__name__}: {str(error).strip()[:300]}", 0
    return None, fewest


def refuses_float64(model: nn.Module, inputs: Any, modes: Sequence[bool]) -> str | None:
    """Why the network cannot be run in float64 in one of the modes (train or not), or None where it can in all; on copies."""
    for train in modes:
        try:
            wide = seeded(private_copy(model).double().train(train), to_dtype(inputs, torch.float64))
        except Exception as error:  # likewise
            return f"{type(error).__name__}: {str(error).strip()[:300]}"
        if not finite(wide) and finite(seeded(private_copy(model).train(train), inputs)):
            return "its output is finite in float32 and not in float64"
    return None


def finite(output: Any) -> bool:
    return all(bool(torch.isfinite(t).all()) for t in tensors_in(output))


def to_dtype(inputs: Any, dtype: torch.dtype) -> Any:
    if isinstance(inputs, Tensor):
        return inputs.to(dtype) if inputs.is_floating_point() else inputs
    if isinstance(inputs, dict):
        return {key: to_dtype(value, dtype) for key, value in inputs.items()}
    if isinstance(inputs, list | tuple):
        return type(inputs)(to_dtype(value, dtype) for value in inputs)
    return inputs


# Weights


def prepare(model: nn.Module, inputs: Any) -> None:
    """Weights on which a comparison means something, in place: none that hides a layer, none that lets the signal grow or vanish.

    Not for networks that are compared in float32, where weights that carry the signal so well carry rounding errors as well.

    A parameter that is one number repeated (the zeros with which residual branches begin, layer scales of 1e-6) becomes random; then each layer in
    the order of the first calls is scaled so that its outputs have variance 1 (layer-sequential unit variance; Mishkin and Matas 2016, algorithm 1).
    """
    generator = torch.Generator().manual_seed(SEED)
    seen: set[int] = set()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if id(parameter) not in seen and parameter.is_floating_point() and parameter.numel() > 1:
                seen.add(id(parameter))
                _vary(name, parameter, generator)
        twin = private_copy(model, share_parameters=True).eval()  # whatever a network keeps of a pass stays in the copy
        scaled: set[nn.Module] = set()
        for _, module in layers_of(twin):
            module.register_forward_hook(partial(_unit_variance, scaled), with_kwargs=True)
        torch.manual_seed(SEED)
        call(twin, inputs)


def _vary(name: str, parameter: Tensor, generator: torch.Generator) -> None:
    value = parameter.flatten()[0]
    if not bool((parameter == value).all()):
        return
    spread = torch.rand(parameter.shape, generator=generator)
    if value != 0:
        size = max(abs(float(value)), VISIBLE) if abs(float(value)) <= 1 else abs(float(value))
        parameter.copy_(math.copysign(size, float(value)) * (0.5 + spread))
    elif parameter.ndim > 1:
        parameter.copy_(torch.randn(parameter.shape, generator=generator) / math.sqrt(parameter[0].numel()))
    elif name.endswith("bias"):
        parameter.copy_(0.2 * (spread - 0.5))
    else:
        parameter.copy_(0.5 + spread)


def _unit_variance(scaled: set[nn.Module], module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
    """Hook: scale the layer's own weight so that the output's standard deviation is 1, at its first call, and call it again."""
    weight = module._parameters.get("weight")
    if module in scaled or weight is None or not isinstance(output, Tensor) or output.numel() < 2:
        return None
    scaled.add(module)
    deviation = float(output.double().std())
    if not math.isfinite(deviation) or deviation == 0:
        return None
    for parameter in module._parameters.values():
        if parameter is not None:
            parameter.div_(deviation)
    return module.forward(*args, **kwargs)


# Runs


def call(model: nn.Module, inputs: Any) -> Any:
    """The output, by the convention of ``surgery``: a tuple is positional arguments, a dict keyword arguments."""
    inputs = private_inputs(inputs)
    if isinstance(inputs, tuple):
        return model(*inputs)
    return model(**inputs) if isinstance(inputs, dict) else model(inputs)


def layers_of(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """Every convolution and linear layer with its first name, once."""
    return [(name, m) for name, m in model.named_modules() if isinstance(m, LAYERS)]


def sites_of(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """As ``layers_of``, with a chain in the place of the layer that it stands for."""
    chains = {name: m for name, m in model.named_modules() if isinstance(m, surgery.Chain)}
    inside = {id(layer) for chain in chains.values() for layer in chain.children()}
    return [*chains.items(), *((name, m) for name, m in layers_of(model) if id(m) not in inside)]


def state_of(model: nn.Module) -> list[tuple[str, tuple[int, ...], torch.dtype]]:
    """Keys, shapes and dtypes of the state dict, in its order."""
    return [(key, tuple(value.shape), value.dtype) for key, value in model.state_dict().items() if isinstance(value, Tensor)]


class Watching(TorchDispatchMode):
    """Notes the first operator with which the data chooses, and whether float64 is narrowed to float32."""

    def __init__(self) -> None:
        super().__init__()
        self.choice: str | None = None
        self.narrowed = False

    def __torch_dispatch__(self, operator: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = operator(*args, **(kwargs or {}))
        name = str(operator).partition(".")[2]
        if self.choice is None and any(name == s or name.startswith(s + ".") for s in SELECTING):
            self.choice = name.partition(".")[0]
        if isinstance(result, Tensor) and result.dtype == torch.float32 and not self.narrowed:
            self.narrowed = any(isinstance(a, Tensor) and a.dtype == torch.float64 for a in args)
        return result


def run(model: nn.Module, inputs: Any) -> Run:
    """The model's output, and the output of every layer at every call.

    In eval mode they come from two passes, the first without hooks, because there are networks that then take another way where there are any.
    """
    result = Run(None)
    watching = Watching()

    def note(key: tuple[str, int], output: Tensor) -> None:  # the module's own output goes on
        result.calls[key] = output.clone()
        if watching.choice is not None:
            result.late.add(key)

    output = None if model.training else seeded(model, inputs)
    with watching, hooked(sites_of(model), note):
        hooked_output = seeded(model, inputs)
    result.output = hooked_output if model.training else output
    result.choice, result.narrowed = watching.choice, watching.narrowed
    return result


def seeded(model: nn.Module, inputs: Any) -> Any:
    """The output without gradients, from fixed random states; tensors that the network makes are by default of its own dtype."""
    usual = torch.get_default_dtype()
    with torch.no_grad():
        torch.manual_seed(SEED)
        random.seed(SEED)
        numpy.random.seed(SEED)
        try:
            torch.set_default_dtype(dtype_of(model))
            return call(model, inputs)
        finally:
            torch.set_default_dtype(usual)


def dtype_of(model: nn.Module) -> torch.dtype:
    return next((p.dtype for p in model.parameters() if p.dtype in TOLERANCE), torch.float32)


@contextmanager
def hooked(modules: Sequence[tuple[str, nn.Module]], note: Callable[[tuple[str, int], Tensor], Tensor | None]) -> Iterator[None]:
    """While this lasts, ``note`` gets the name of each module that is called, which of its calls it is, and the tensor that it gives.

    A tensor from ``note`` takes the place of the module's output, where that is a tensor.
    """
    counts: dict[str, int] = {}

    def hook(name: str, output: Any) -> Tensor | None:
        tensor = next(tensors_in(output), None)
        if tensor is None:
            return None
        index = counts.get(name, 0)
        counts[name] = index + 1
        instead = note((name, index), tensor)
        return instead if isinstance(output, Tensor) else None

    handles = [m.register_forward_hook(lambda _, __, output, name=name: hook(name, output)) for name, m in modules]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


# Comparisons


def meaning(reference: Run) -> dict[str, Any]:
    """How much a comparison with this run can see.

    Raises:
        Checked: the output is not finite, or is one number throughout, and no layer says more.
    """
    floats = [t for t in tensors_in(reference.output) if t.is_floating_point() or t.is_complex()]
    calls = [t for key, t in reference.calls.items() if key not in reference.late]
    silent = sum(t.numel() > 1 and bool((t == t.flatten()[0]).all()) for t in calls)
    if not all(bool(torch.isfinite(t).all()) for t in (*floats, *reference.calls.values())) and reference.choice is None:
        bad = [name for (name, _), t in reference.calls.items() if not bool(torch.isfinite(t).all())]
        raise Checked(f"the original's own numbers are not all finite (first in {bad[0] if bad else 'its output'})")
    dull = all(bool((t == t.flatten()[0]).all()) for t in floats if t.numel() > 1)
    if dull and silent == len(calls):
        raise Checked("the original's output is the same number everywhere: nothing could be told apart")
    return {"calls": len(calls), "silent": silent, "after_choice": len(reference.late), "choice": reference.choice}


def compare(reference: Run, model: nn.Module, inputs: Any) -> dict[str, Any]:
    """Errors, as max |a - b| / max |b|, of the output (None where it has no floats) and of every layer's output at every call.

    Where the data choose (``Run.choice``) and what comes after differs, all layers before that must agree.

    Raises:
        Checked: something is further off than the tolerance of the model's dtype; of float32 where the network narrows to that inside.
    """
    errors, gap, unknown = gaps(reference, model, inputs)
    strict = TOLERANCE[dtype_of(model)]
    early = [error for key, error in errors.items() if key not in reference.late]
    found = {"output": gap, "layers": max(errors.values(), default=0.0), "compared": "output and layers", "calls": len(errors)}
    for tolerance in sorted({strict, TOLERANCE[torch.float32]} if reference.narrowed else {strict}):
        # in float32 rounding grows from layer to layer, and only what the network says is held to the tolerance, if it says anything
        held = [gap] if gap is not None and tolerance == TOLERANCE[torch.float32] else [*errors.values(), gap or 0.0]
        if max(held) <= tolerance and not unknown:
            return found | {"tolerance": tolerance}
        if reference.choice is not None and early and max(early) <= tolerance:
            seen = f"layers before the first {reference.choice}"
            return {"output": None, "layers": max(early), "compared": seen, "calls": len(early), "tolerance": tolerance}
    first = next((f"{name}, call {call + 1}" for (name, call), error in errors.items() if error > strict), None)
    worst = max(errors, key=errors.__getitem__, default=("none", 0))
    gap_text, beyond = "nothing" if gap is None else f"{gap:.3g}", sum(error > strict for error in errors.values())
    raise Checked(
        f"beyond {strict:.0e}: the output is off by {gap_text}; the first layer that is: {first} ({beyond} of {len(errors)} calls); "
        f"the worst: {worst[0]} by {found['layers']:.3g}" + (f"; calls that the original has not: {sorted(set(unknown))[:3]}" if unknown else "")
    )


def gaps(reference: Run, model: nn.Module, inputs: Any, forced: bool = False) -> tuple[dict[tuple[str, int], float], float | None, list[str]]:
    """Errors of every layer's output, in the order of the reference's calls, and of the network's; and calls that the reference has not.

    ``forced`` hands on the reference's output in the place of each layer's own, so that each layer gets the inputs that it had there.
    """
    errors: dict[tuple[str, int], float] = {}
    unknown: list[str] = []

    def note(key: tuple[str, int], got: Tensor) -> Tensor | None:
        if key not in reference.calls:
            unknown.append(key[0])
            return None
        errors[key] = difference(got, reference.calls[key])
        return reference.calls[key].clone() if forced else None

    output = None if model.training or forced else seeded(model, inputs)
    with hooked(sites_of(model), note):
        hooked_output = seeded(model, inputs)
    has_floats = any(t.is_floating_point() or t.is_complex() for t in tensors_in(reference.output))
    gap = difference(hooked_output if output is None else output, reference.output) if has_floats else None
    return {key: errors.get(key, math.inf) for key in reference.calls}, gap, unknown


def compare_conditioned(reference: Run, original: nn.Module, model: nn.Module, inputs: Any) -> dict[str, Any]:
    """``compare``, also for networks that make more of rounding than the tolerance allows, whoever rounds.

    Batch norms in train mode do, layer after layer (Yang et al. 2019, "A mean field theory of batch normalization", section 4). Where the plain
    comparison fails, each layer must agree within the tolerance on the inputs that it had in the original, and all that the free pass is off by must
    be within ``RIPPLE`` times what the original itself is off by with its weights moved by a unit in the last place.

    Raises:
        Checked: as ``compare``.
    """
    try:
        return compare(reference, model, inputs)
    except Checked:
        free, free_gap, _ = gaps(reference, model, inputs)
        forced, gap, unknown = gaps(reference, model, inputs, forced=True)
        strict = TOLERANCE[dtype_of(model)]
        worst = max([*forced.values(), gap or 0.0])
        if unknown or worst > strict:
            raise
        ripple = [gaps(reference, moved(original, seed).train(model.training), inputs) for seed in range(DRAWS)]
        layers = max(max(errors.values(), default=0.0) for errors, _, _ in ripple)
        output = max(gap or 0.0 for _, gap, _ in ripple)
        if max(free.values(), default=0.0) > RIPPLE * layers or (free_gap or 0.0) > RIPPLE * output:
            raise
        seen = (
            f"layers, each on the inputs that it had in the original: the output is off by {free_gap or 0.0:.1e}, and by {output:.1e} where only the "
        )
        seen += "original's weights are moved by a unit in the last place"
        return {"output": None, "layers": worst, "compared": seen, "calls": len(forced), "tolerance": strict}


def moved(model: nn.Module, seed: int) -> nn.Module:
    """A copy whose parameters are each moved by up to a unit in the last place, up or down."""
    twin = private_copy(model)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in twin.parameters():
            if parameter.is_floating_point():
                spread = 2 * torch.rand(parameter.shape, generator=generator, dtype=torch.float64) - 1
                parameter.copy_(parameter.double() * (1 + torch.finfo(parameter.dtype).eps * spread))
    return twin


def account(model: nn.Module, net: nn.Module, row: dict[str, Any]) -> None:
    """Count the layers, and what became of them.

    Raises:
        Checked: a convolution or linear layer of the original has not exactly one row in the report, or one that says nothing.
    """
    layers, rows = layers_of(model), surgery.report(net).layers
    row["layers"] = {
        "convolution": sum(not isinstance(m, nn.Linear) for _, m in layers),
        "linear": sum(isinstance(m, nn.Linear) for _, m in layers),
    }
    row["decomposed"] = sum(r.status == "decomposed" for r in rows)
    kept: dict[str, int] = {}
    for r in rows:
        if r.status == "kept":
            kept[r.reason or ""] = kept.get(r.reason or "", 0) + 1
    row["kept"] = kept
    names = [r.name for r in rows]
    missing = [name for name, _ in layers if names.count(name) != 1]
    strange = sorted(set(names) - {name for name, _ in layers})
    mute = [r.name for r in rows if r.status == "kept" and r.reason in (None, "", "not decomposed")]
    if missing or strange or mute:
        raise Checked(f"without exactly one row: {missing[:5]}; rows of no layer: {strange[:5]}; kept without a reason: {mute[:5]}")
