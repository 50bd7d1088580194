"""What all exporters share: a private network in eval mode, the check, and files that appear whole or not at all."""

from __future__ import annotations

import contextlib
import copy
import io
import logging
import os
import shutil
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from passes.errors import MissingExtra, ParityError, SurgeryError, SurgeryTypeError, SurgeryValueError, true_or_false
from passes.parity import difference, private_inputs, tensors_in
from passes.running import evaluating_copy, first_line, kept_random_states, run, seed_all, shorten
from surgery.export.inputs import DynamicSize, Openings, Shapes, filled, fresh_inputs, input_names, openings, shapes_of
from surgery.export.metadata import metadata_of
from surgery.files import naming, temporary_beside, usable_target
from surgery.inspection import usable_model
from surgery.progress import stage
from surgery.undoing import undone_on_error

__all__ = [
    "TOLERANCE",
    "ExportReport",
    "Job",
    "check_network",
    "exporting",
    "fresh_inputs",
    "gaps",
    "installed",
    "labels_within",
    "need",
    "prepare",
    "quiet",
    "torch_errors",
    "written",
]

TOLERANCE = {torch.float64: 1e-8, torch.float32: 1e-4, torch.bfloat16: 6e-2, torch.float16: 1e-2}
NEAR_TIES = 10  # times the tolerance of the numbers: about the share of labels whose two best scores are as near to each other
MOST_LABELS = 0.05  # of the entries: where more differ the file is wrong, however coarse its numbers are


@dataclass(frozen=True, slots=True, kw_only=True)
class ExportReport:
    """What an export gave.

    Attributes:
        path: the file.
        format: ``"onnx"``, ``"torchscript"``, ``"program"`` or ``"openvino"``.
        size_bytes: of the file and of the files beside it that belong to it.
        difference: largest max |a - b| / max |b| over the checks, of integer and bool outputs the share of entries that differ; None where no
            check was made.
        checked_shapes: of all inputs, an entry a check.
        inputs: name and shape of each input, open dimensions by name.
        exporter: that of torch which wrote it, ``"dynamo"`` or ``"torchscript"``.
        opset: ONNX operator set, None for other formats.
    """

    path: str
    format: str
    size_bytes: int
    difference: float | None
    checked_shapes: tuple[Shapes, ...]
    inputs: tuple[str, ...]
    exporter: str
    opset: int | None = None

    @property
    def batch_sizes(self) -> tuple[int, ...]:
        """First dimension of the first input in each check, 1 where it has none."""
        return tuple(next((shape[0] for shape in shapes if shape), 1) for shapes in self.checked_shapes)

    def to_data(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return asdict(self) | {"batch_sizes": self.batch_sizes}

    def _repr_html_(self) -> str:
        from surgery.tables import export_table, to_html

        return to_html(export_table(self))

    def __str__(self) -> str:
        checked = "not checked"
        if self.difference is not None:
            shapes = " and ".join(", ".join("x".join(map(str, shape)) for shape in shapes) for shapes in self.checked_shapes)
            checked = f"agrees with the network to {self.difference:.1e} (on {shapes})"
        return f"{self.path}: {self.format}, {self.size_bytes / 1e6:.2f} MB, {checked}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """A network that is about to be exported: a private copy in eval mode that accepts its inputs.

    Attributes:
        title: the model's class, for messages.
        network: the copy; its parameters are the caller's own.
        target: the file to write; its folder exists.
        example_inputs: what to export with, private.
        names: of the input tensors.
        openings: their open dimensions, and what to check on.
        output: what the network gives for ``example_inputs``.
        layers: weight shape of every convolution module that was called, by name.
        metadata: how the network was made, as texts by key.
    """

    title: str
    network: nn.Module
    target: Path
    example_inputs: Any
    names: tuple[str, ...]
    openings: Openings
    output: Any
    layers: dict[str, tuple[int, ...]]
    metadata: dict[str, str]

    @property
    def inputs(self) -> tuple[str, ...]:
        """Name and shape of each input in words."""
        shapes = zip(self.names, shapes_of(self.example_inputs), self.openings.dims, strict=True)
        return tuple(f"{name}: {' x '.join(dims.get(i, str(size)) for i, size in enumerate(shape)) or 'one number'}" for name, shape, dims in shapes)


@contextmanager
def exporting() -> Iterator[None]:
    """What surrounds every export: no gradients, and the callers' random states and inference mode left as found."""
    with stage("exporting"), kept_random_states(), torch.inference_mode(False), torch.no_grad():
        yield


def prepare(
    model: nn.Module,
    path: str | os.PathLike[str],
    example_inputs: Any,
    *,
    check: bool = True,
    dynamic_batch: bool = False,
    dynamic_size: DynamicSize = False,
) -> Job:
    """All that is wrong with the arguments is found here, before anything is written.

    Raises:
        SurgeryTypeError: no module, or one that hides another; inputs that cannot be copied or hold tensors in containers of their own.
        SurgeryValueError: no such folder; the model does not take the inputs, or no others where dimensions are to be open; they hold no tensor.
    """
    usable_model(model)
    target = usable_target("path", path)
    true_or_false("check", check)
    true_or_false("dynamic_batch", dynamic_batch)
    if not isinstance(dynamic_size, bool | Mapping):
        raise SurgeryTypeError(f'dynamic_size: expected True, False or the dimensions of each input, as {{"x": [2, 3]}}, got {dynamic_size!r}')
    check_numbers(model)
    if next(tensors_in(example_inputs), None) is None:
        raise SurgeryValueError("example_inputs: they hold no tensor, so nothing can be exported")
    twin = evaluating_copy(model, share_parameters=True)
    names = input_names(twin, example_inputs)
    run(twin, example_inputs)
    found = openings(twin, example_inputs, names, dynamic_batch=dynamic_batch, dynamic_size=dynamic_size)
    # each tensor by itself: torch.export takes one that is given twice for one input
    inputs = filled(example_inputs, iter([t.detach().clone() for t in tensors_in(example_inputs)]), copy.deepcopy)
    if found.exported != shapes_of(example_inputs):
        inputs, _ = _example(twin, example_inputs, found.exported, torch.Generator().manual_seed(0))
    output, layers = _observed(evaluating_copy(model, share_parameters=True), inputs)
    if next(tensors_in(output), None) is None:
        raise SurgeryValueError(
            f"model: the output of {type(model).__name__} holds no tensor ({type(output).__name__}), so there is nothing to export"
        )
    return Job(
        title=type(model).__name__,
        network=evaluating_copy(model, share_parameters=True),
        target=target,
        example_inputs=inputs,
        names=names,
        openings=found,
        output=output,
        layers=layers,
        metadata=metadata_of(model),
    )


def check_numbers(model: nn.Module) -> None:
    """Refuse a model on the meta device.

    Raises:
        SurgeryValueError: it holds no numbers.
    """
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if tensor.is_meta:
            raise SurgeryValueError(f"model: {name} is on the meta device and has no numbers; load weights first")


def _observed(network: nn.Module, inputs: Any) -> tuple[Any, dict[str, tuple[int, ...]]]:
    """The output, and the weight shapes of the convolution modules that were called for it, by first name."""
    called: dict[str, tuple[int, ...]] = {}

    def note(name: str) -> Callable[..., None]:
        return lambda layer, _: called.update({name: tuple(layer.weight.shape)})

    for name, module in network.named_modules():
        if isinstance(module, nn.modules.conv._ConvNd) and getattr(module, "weight", None) is not None:
            nn.Module.register_forward_pre_hook(module, note(name))
    return run(network, inputs), called


def check_network(
    network: nn.Module,
    exported: Callable[[Any], Any],
    example_inputs: Any,
    shapes: tuple[Shapes, ...],
    what: str,
    *,
    computes_in: torch.dtype | None = None,
) -> float:
    """Largest of the ``gaps`` between a network and its exported form on fresh inputs of each set of shapes.

    Args:
        network: the one that was exported.
        exported: takes inputs like the network and gives its output's tensors, in containers or not.
        example_inputs: what fresh inputs look like.
        shapes: of all inputs, one set a check.
        what: the two, for the error.
        computes_in: the dtype inside of the runtime where it is not the network's.

    Raises:
        ParityError: beyond the tolerance of the coarsest dtype that the numbers go through, or more labels differ than rounding makes differ; it
            says so where the network does not agree with itself.
        SurgeryError: the exported form does not take inputs that the network takes.
    """
    generator = torch.Generator().manual_seed(20)
    worst = 0.0
    for one in shapes:
        inputs, expected = _example(network, example_inputs, one, generator)
        dtypes = {t.dtype for t in (*tensors_in(expected), *network.parameters()) if t.is_floating_point()} | {computes_in or torch.float64}
        tolerance = max(TOLERANCE.get(dtype, 1e-4) for dtype in dtypes)
        try:
            got = exported(private_inputs(inputs))
        except SurgeryError:
            raise
        except Exception as error:  # of whatever runtime it is
            raise SurgeryError(f"{what}: the first fails on inputs {one} that the second takes ({shorten(first_line(error))})") from error
        numbers, labels = gaps(got, expected)
        if not numbers <= tolerance:
            told = f"{what}: outputs differ by {numbers:.3g} of the largest value, the tolerance is {tolerance:.3g}"
            raise ParityError(told + _own_noise(network, inputs, expected, tolerance))
        if not labels <= labels_within(tolerance):
            told = f"{what}: {labels:.3g} of the entries of an integer output differ, the tolerance is {labels_within(tolerance):.3g}"
            raise ParityError(told + (_own_noise(network, inputs, expected, tolerance) or "; check=False writes it unchecked"))
        worst = max(worst, numbers, labels)
    return worst


def gaps(got: Any, expected: Any) -> tuple[float, float]:
    """The largest ``difference`` of floating-point and complex tensors, and the largest share of entries in which integer and bool ones differ.

    Integers are labels and the like: how far apart two of them are says nothing, and where two scores are nearly equal rounding alone makes one of
    the other. Both are infinite where there are more or fewer tensors than expected, and where shapes differ.
    """
    left, right = list(tensors_in(got)), list(tensors_in(expected))
    if len(left) != len(right) or not right:
        return float("inf"), float("inf")
    numbers, labels = 0.0, 0.0
    for a, b in zip(left, right, strict=True):
        if b.is_floating_point() or b.is_complex():
            numbers = max(numbers, difference(a, b))
        else:
            labels = max(labels, _share_that_differs(a, b))
    return numbers, labels


def labels_within(tolerance: float) -> float:
    """The share of integer entries that may differ where numbers may by this tolerance."""
    return min(NEAR_TIES * tolerance, MOST_LABELS)


def _share_that_differs(a: Tensor, b: Tensor) -> float:
    if a.shape != b.shape:
        return float("inf")
    x, y = (t.detach().to("cpu", torch.float64) for t in (a, b))
    return float((x != y).double().mean()) if b.numel() else 0.0


def _example(network: nn.Module, example_inputs: Any, shapes: Shapes, generator: torch.Generator) -> tuple[Any, Any]:
    """Fresh inputs that the network takes, and its output: noise, or else the example's own numbers in another order, or else as they are."""
    for noise in (True, False):
        inputs = fresh_inputs(example_inputs, generator, shapes=shapes, noise=noise)
        with contextlib.suppress(SurgeryValueError):
            return inputs, run(network, inputs)
    return example_inputs, run(network, example_inputs)


def _own_noise(network: nn.Module, inputs: Any, expected: Any, tolerance: float) -> str:
    """What to add where the network gives something else each time, so that no file could agree with it."""
    seed_all(1)
    numbers, labels = gaps(run(network, inputs), expected)
    if numbers <= tolerance and labels <= labels_within(tolerance):
        return ""
    again = max(numbers, labels)
    return (
        f"; the network itself differs by {again:.3g} from call to call (random numbers or memory of earlier calls); check=False writes it unchecked"
    )


def written(
    job: Job,
    work: Path,
    format: str,
    *,
    exporter: str,
    load: Callable[[], Callable[[Any], Any]] | None,
    what: str,
    computes_in: torch.dtype | None = None,
    opset: int | None = None,
) -> ExportReport:
    """The report of a file in its temporary folder, checked by what ``load`` makes of it, unless that is None.

    Raises:
        ParityError: the file computes something else.
    """
    worst: float | None = None
    if load is not None:
        with stage(f"checking {job.target.name}"):
            worst = check_network(job.network, load(), job.example_inputs, job.openings.checked, f"{what} and the network", computes_in=computes_in)
    return ExportReport(
        path=str(job.target),
        format=format,
        size_bytes=sum(p.stat().st_size for p in work.parent.iterdir()),
        difference=worst,
        checked_shapes=job.openings.checked if load is not None else (),
        inputs=job.inputs,
        exporter=exporter,
        opset=opset,
    )


@contextmanager
def torch_errors(job: Job, to: str) -> Iterator[None]:
    """Whatever torch's exporters raise becomes one error that says what could not be exported, and the innermost reason."""
    try:
        with quiet():
            yield
    except (OSError, SurgeryError):
        raise
    except Exception as error:  # exporters run the model's own code and wrap all kinds of errors
        inner: BaseException = error
        while inner.__cause__ is not None:
            inner = inner.__cause__
        raise SurgeryError(f"torch cannot export {job.title} to {to}: {shorten(first_line(inner))}") from error


@contextmanager
def quiet() -> Iterator[None]:
    """Without what torch's exporters print, log and warn of: their own deprecations, progress and internals."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "torch.export", "torch.fx", "onnxscript", "onnx_ir", "openvino")]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.CRITICAL)
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


@contextmanager
def installed(target: Path) -> Iterator[Path]:
    """A file name in a temporary folder; when the block ends without an error, all files written beside it move to their places.

    Either all of them move or none: files that were there before come back where a later one cannot be moved. Links go on pointing where they did,
    permissions stay.
    """
    target = target.resolve()
    with temporary_beside(target) as folder, naming(target):
        work = folder / target.name
        yield work
        _move([*sorted(p for p in folder.iterdir() if p != work), work], target)


def _move(files: Sequence[Path], target: Path) -> None:
    with temporary_beside(target) as kept, undone_on_error() as undo:
        for file in files:
            place = target.parent / file.name
            if place.is_file():
                shutil.copymode(place, file)
            if not place.exists():
                undo.later(partial(place.unlink, missing_ok=True))
            elif len(files) > 1:
                undo.later(partial(_put_back, kept / file.name, place))
                _second_name(place, kept / file.name)
            os.replace(file, place)


def _put_back(kept: Path, place: Path) -> None:
    if kept.exists():
        os.replace(kept, place)


def _second_name(file: Path, other: Path) -> None:
    try:
        os.link(file, other)
    except OSError:  # a file system without links
        shutil.copy2(file, other)


def need(package: str, what: str, extra: str) -> None:
    """Raise ``MissingExtra`` where an optional package is not installed."""
    import importlib.util

    if importlib.util.find_spec(package) is None:
        raise MissingExtra.of(f"{what} needs {package}", extra)
