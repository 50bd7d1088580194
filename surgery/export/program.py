"""``torch.export``: a program without the model's code (``.pt2``), saved, read back and compared with the network."""

from __future__ import annotations

import inspect
import io
import os
from collections.abc import Callable, Mapping
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from passes.errors import SurgeryError
from passes.parity import private_inputs, tensors_in
from passes.running import arguments
from surgery.export.common import ExportReport, Job, exporting, installed, prepare, quiet, torch_errors, written
from surgery.export.inputs import DynamicSize, filled

if TYPE_CHECKING:
    from torch.export import ExportedProgram

__all__ = ["export_program", "exported_program"]

PLAIN = (Tensor, int, float, bool, str, type(None))


@exporting()
def export_program(
    model: nn.Module,
    path: str | os.PathLike[str],
    example_inputs: Any,
    *,
    check: bool = True,
    dynamic_batch: bool = False,
    dynamic_size: DynamicSize = False,
) -> ExportReport:
    """Write a model as a program of ``torch.export`` and prove that the file, read back, computes the same.

    The model is exported in eval mode, from a copy. Nothing is left behind if the export or the check fails. ``torch.export.load(path).module()`` is
    called as the model is; in its output mappings and dataclasses are dicts, so that reading the file needs none of the model's classes. The file's
    extra files say how the network was made (``surgery.exported_plan``).

    Args:
        model: plain, decomposed, reconstructed or deployed module, or a ``GraphModule``.
        path: file to write, ending in .pt2 by torch's convention.
        example_inputs: a tensor, a tuple of positional or a mapping of keyword arguments.
        check: compare on fresh random inputs (on two sizes of what is open).
        dynamic_batch: leave the first dimension of the first input open, and of all that have as many entries there.
        dynamic_size: leave the dimensions from the third on (N, C, ...) open where the network takes other sizes, or those named, as ``{"x": [1]}``.

    Raises:
        ParityError: the file computes something else.
        SurgeryError: torch cannot export the model, or not with open dimensions; its error is the cause.
        SurgeryValueError: the arguments do not fit the model.
        OSError: the file cannot be written.
    """
    job = prepare(model, path, example_inputs, check=check, dynamic_batch=dynamic_batch, dynamic_size=dynamic_size)
    args, kwargs = arguments(private_inputs(job.example_inputs))
    network = job.network if _is_plain(job.output) else _PlainOutput(job.network)
    program = exported_program(job, network, args, kwargs, "a torch.export program")
    with installed(job.target) as work:
        with torch_errors(job, "a torch.export program"):
            content = io.BytesIO()  # where the disk is full, torch's own writing of a file ends the whole process
            torch.export.save(program, content, extra_files=job.metadata)
        work.write_bytes(content.getbuffer())
        load = (lambda: _loaded(work)) if check else None
        return written(job, work, "program", exporter="dynamo", load=load, what="the exported program")


def exported_program(job: Job, network: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], to: str) -> ExportedProgram:
    """The network as a program of ``torch.export``, with the job's dimensions open.

    Raises:
        SurgeryError: torch cannot export it, or fixed a dimension that is to be open.
    """
    auto = torch.export.Dim.AUTO
    dims = [dict.fromkeys(open_dims, auto) for open_dims in job.openings.dims]
    shapes: Any = None
    if any(dims):
        bound = inspect.signature(network.forward).bind(*filled(args, iter(dims), _none), **filled(kwargs, iter(dims), _none))
        shapes = dict(bound.arguments)
    with torch_errors(job, to):
        program = torch.export.export(network, args, kwargs, dynamic_shapes=shapes, strict=False)
    _all_open(job, program, to)
    return program


def _none(_: Any) -> None:
    return None


def _all_open(job: Job, program: ExportedProgram, to: str) -> None:
    """Refuse a program in which a dimension that is to be open has one size: torch fixes it without a word."""
    from torch.fx.experimental.symbolic_shapes import is_concrete_int

    values = [node.meta.get("val") for node in program.graph.nodes if node.op == "placeholder" and node.name in program.graph_signature.user_inputs]
    tensors = [value for value in values if isinstance(value, Tensor)]
    for name, dims, tensor in zip(job.names, job.openings.dims, tensors, strict=True):
        for index, word in dims.items():
            if is_concrete_int(tensor.shape[index]):
                raise SurgeryError(
                    f"torch cannot export {job.title} to {to} with an open {word}: torch.export fixed dimension {index} of {name!r} at "
                    f"{tensor.shape[index]}, as the network computes with it as with a plain number"
                )


def _loaded(file: Path) -> Callable[[Any], Any]:
    with quiet(), file.open("rb") as stream:
        module = torch.export.load(stream).module()

    def call(inputs: Any) -> Any:
        args, kwargs = arguments(inputs)
        return module(*args, **kwargs)

    return call


class _PlainOutput(nn.Module):
    """A network whose output is made of builtin containers, tensors and constants."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network
        self.training = network.training

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return _plain(self.network(*args, **kwargs))


def _is_plain(output: Any) -> bool:
    if type(output) is dict:
        return all(isinstance(key, str) and _is_plain(value) for key, value in output.items())
    return isinstance(output, PLAIN) or (type(output) in (list, tuple) and all(_is_plain(value) for value in output))


def _plain(output: Any) -> Any:
    """The same in dicts, lists and tuples; what is something else becomes the tuple of its tensors."""
    if isinstance(output, PLAIN):
        return output
    if isinstance(output, Mapping):
        return {str(key): _plain(value) for key, value in output.items()}
    if is_dataclass(output) and not isinstance(output, type):
        return {field.name: _plain(getattr(output, field.name)) for field in fields(output)}
    if isinstance(output, list | tuple):
        return [_plain(v) for v in output] if isinstance(output, list) else tuple(_plain(v) for v in output)
    return tuple(tensors_in(output))
