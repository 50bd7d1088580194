"""TorchScript: traced, saved, read back and compared with the network."""

from __future__ import annotations

import io
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from passes.parity import private_inputs, tensors_in
from passes.running import arguments
from surgery.export.common import ExportReport, exporting, installed, prepare, quiet, torch_errors, written
from surgery.export.inputs import DynamicSize, Flat, only_tensors

__all__ = ["export_torchscript"]


@exporting()
def export_torchscript(
    model: nn.Module,
    path: str | os.PathLike[str],
    example_inputs: Any,
    *,
    check: bool = True,
    dynamic_batch: bool = False,
    dynamic_size: DynamicSize = False,
) -> ExportReport:
    """Write a model as TorchScript (by tracing) and prove that the file, read back, computes the same.

    The model is exported in eval mode, from a copy. Nothing is left behind if the export or the check fails. The file is called as the model is;
    where it takes other things than tensors it is called with its tensors one by one, and an output that TorchScript cannot hold becomes the tuple
    of its tensors. Its extra files say how the network was made (``surgery.exported_plan``).

    Args:
        model: plain, decomposed, reconstructed or deployed module, or a ``GraphModule``.
        path: file to write.
        example_inputs: a tensor, a tuple of positional or a mapping of keyword arguments.
        check: compare on fresh random inputs.
        dynamic_batch: the file shall take any batch: traced with two entries or more, and checked with three and with one.
        dynamic_size: the file shall take any size of the dimensions from the third on, or of those named, as ``{"x": [1]}``: checked with two.

    Raises:
        ParityError: the file computes something else.
        SurgeryError: torch cannot trace the model; its error is the cause.
        SurgeryValueError: the arguments do not fit the model.
        OSError: the file cannot be written.
    """
    job = prepare(model, path, example_inputs, check=check, dynamic_batch=dynamic_batch, dynamic_size=dynamic_size)
    args, kwargs = arguments(private_inputs(job.example_inputs))
    natural = only_tensors([*args, *kwargs.values()]) and _holds(job.output)
    traced = job.network if natural else Flat(job.network, job.example_inputs)
    if not natural:
        args, kwargs = tuple(tensors_in([*args, *kwargs.values()])), {}
    with installed(job.target) as work:
        with torch_errors(job, "TorchScript"):
            script: Any = torch.jit.trace(traced, args or None, example_kwarg_inputs=kwargs or None, check_trace=False, strict=False)  # type: ignore[no-untyped-call]
            content = io.BytesIO()  # where the disk is full, torch's own writing of a file ends the whole process
            torch.jit.save(script, content, _extra_files=job.metadata)  # type: ignore[no-untyped-call]
        work.write_bytes(content.getbuffer())
        load = (lambda: _loaded(work, natural=natural)) if check else None
        return written(job, work, "torchscript", exporter="torchscript", load=load, what="the TorchScript file")


def _loaded(file: Path, *, natural: bool) -> Callable[[Any], Any]:
    with quiet():
        loaded = torch.jit.load(str(file))  # type: ignore[no-untyped-call]

    def call(inputs: Any) -> Any:
        args, kwargs = arguments(inputs if natural else tuple(tensors_in(inputs)))
        return loaded(*args, **kwargs)

    return call


def _holds(output: Any) -> bool:
    """Whether TorchScript has a type for this output: tensors in lists and tuples, or a dict of tensors."""
    if type(output) is dict:
        return all(isinstance(key, str) and isinstance(value, Tensor) for key, value in output.items())
    return isinstance(output, Tensor) or (type(output) in (list, tuple) and all(_holds(value) for value in output))
