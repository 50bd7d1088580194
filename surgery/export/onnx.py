"""ONNX: written by one of torch's two exporters, read back and compared with the network by onnxruntime."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import is_dataclass
from pathlib import Path
from typing import Any, Literal
from unittest.mock import patch

import torch
from torch import Tensor, nn

from passes.errors import SurgeryError, SurgeryTypeError, SurgeryValueError
from passes.parity import tensors_in
from passes.running import first_line, shorten
from surgery.export.common import ExportReport, Job, exporting, installed, need, prepare, torch_errors, written
from surgery.export.inputs import DynamicSize, Flat, tensor_names, unique
from surgery.export.onnx_layers import check_chains, name_layers
from surgery.export.program import exported_program

__all__ = ["Exporter", "check_exporter", "export_onnx", "onnx_session", "run_session", "session_call", "with_exporter", "write_onnx"]

Exporter = Literal["auto", "dynamo", "torchscript"]

NO_KERNEL = ("NOT_IMPLEMENTED", "Type Error")  # how onnxruntime says that it cannot compute in a dtype
UNCHECKED = "check=False writes it unchecked"
OLDEST_OPSET = 7  # that torch writes
BRANCH = "GuardOnDataDependentSymNode"  # how torch.export says that the network's way depends on numbers


@exporting()
def export_onnx(
    model: nn.Module,
    path: str | os.PathLike[str],
    example_inputs: Any,
    *,
    check: bool = True,
    dynamic_batch: bool = False,
    dynamic_size: DynamicSize = False,
    opset: int | None = None,
    exporter: Exporter = "auto",
) -> ExportReport:
    """Write a model as ONNX and prove that onnxruntime computes the same.

    The model is exported in eval mode, from a copy. Nothing is left behind if the export or the check fails. In the graph the nodes of convolutions
    and linear layers have the qualified names of their layers, and the convolutions of chains (of modules, not of a ``GraphModule``) are proved to be
    those of the plan, which the file's metadata holds (``surgery.exported_plan``). Inputs have the names of the parameters of ``forward``.

    Args:
        model: plain, decomposed, reconstructed or deployed module, or a ``GraphModule``.
        path: file to write; weights of very large models go beside it.
        example_inputs: a tensor, a tuple of positional or a mapping of keyword arguments; what is no tensor in them is fixed in the file.
        check: compare with onnxruntime on fresh random inputs (on two sizes of what is open).
        dynamic_batch: leave the first dimension of the first input open, and of all that have as many entries there.
        dynamic_size: leave the dimensions from the third on (N, C, ...) open where the network takes other sizes, or those named, as ``{"x": [1]}``.
        opset: ONNX operator set; torch's default where None.
        exporter: ``"dynamo"``, which proves by ``torch.export`` that one graph holds for all inputs and folds batch norms; ``"torchscript"``, which
            traces one call, is several times as fast, and keeps batch norms as nodes (``surgery.deploy`` folds them); ``"auto"``: the first, and
            where it fails the second, unless the network's way depends on its numbers, of which a trace would keep one, or nothing is checked.

    Raises:
        MissingExtra: onnxscript, or onnxruntime for the check, is not installed.
        ParityError: onnxruntime computes something else.
        SurgeryError: torch cannot export the model, or onnxruntime cannot run the file; the reason is in the message.
        SurgeryValueError: the arguments do not fit the model.
        OSError: the file cannot be written.
    """
    _check_opset(opset)
    job = prepare(model, path, example_inputs, check=check, dynamic_batch=dynamic_batch, dynamic_size=dynamic_size)
    check_exporter(exporter, "ONNX export", "export")
    _check_ending(Path(path))
    if check:
        need("onnxruntime", "the check of an ONNX file", "export")

    def attempt(name: str) -> ExportReport:
        with installed(job.target) as work:
            written_opset = write_onnx(job, work, name, opset)
            load = (lambda: _loaded(work, job)) if check else None
            return written(job, work, "onnx", exporter=name, load=load, what="onnxruntime", opset=written_opset)

    return with_exporter(exporter, attempt, check=check)


def _check_ending(path: Path) -> None:
    """Refuse names of files that are read as text."""
    from onnx.serialization import registry

    format_of = registry.get_format_from_file_extension(path.suffix)
    if format_of not in (None, "protobuf"):
        raise SurgeryValueError(f"path: {str(path)!r} would be read as {format_of}, by its ending; take a name that ends in .onnx")


def _check_opset(opset: Any) -> None:
    """Before minutes are spent: whether there is such an operator set at all."""
    from onnx.defs import onnx_opset_version

    if opset is None:
        return
    if not isinstance(opset, int) or isinstance(opset, bool):
        raise SurgeryTypeError(f"opset: expected an int, got {opset!r}")
    if not OLDEST_OPSET <= opset <= onnx_opset_version():
        raise SurgeryValueError(f"opset: torch and this onnx know the operator sets {OLDEST_OPSET} to {onnx_opset_version()}, got {opset}")


def check_exporter(exporter: Exporter, what: str, extra: str) -> None:
    """Refuse an exporter that does not exist, or whose package is not installed."""
    if exporter not in ("auto", "dynamo", "torchscript"):
        raise SurgeryValueError(f"exporter: expected 'auto', 'dynamo' or 'torchscript', got {exporter!r}")
    if exporter != "torchscript":
        need("onnxscript", what, extra)


def with_exporter(exporter: Exporter, attempt: Callable[[Exporter], ExportReport], *, check: bool) -> ExportReport:
    """What an attempt with the exporter gives, or for ``"auto"`` the first that succeeds.

    Raises:
        SurgeryError: that of the first attempt; what the second came to is in its message.
    """
    if exporter != "auto":
        return attempt(exporter)
    try:
        return attempt("dynamo")
    except SurgeryValueError:
        raise
    except SurgeryError as first:
        if _branches(first):
            raise type(first)(f"{first}; exporter='torchscript' would keep the one way that the example inputs take") from first
        if not check:
            raise
        try:
            return attempt("torchscript")
        except SurgeryError as second:
            raise type(first)(f"{first}; and with exporter='torchscript': {second}") from first


def _branches(error: BaseException) -> bool:
    """Whether an export failed because the network's way depends on its numbers."""
    cause: BaseException | None = error
    while cause is not None:
        if any(kind.__name__ == BRANCH for kind in type(cause).__mro__):
            return True
        cause = cause.__cause__
    return False


def write_onnx(job: Job, work: Path, exporter: str, opset: int | None) -> int:
    """Write the job's network to a file in a temporary folder, its layers named and its metadata in it, and return the operator set.

    Raises:
        ParityError: the graph has other convolutions than the network's chains.
        SurgeryError: torch cannot export the network.
        SurgeryValueError: torch cannot write this operator set.
    """
    import onnx

    flat = Flat(job.network, job.example_inputs)
    tensors = tuple(tensors_in(job.example_inputs))
    outputs = unique(_output_names(job.output), taken=job.names)
    if exporter == "dynamo":
        program = exported_program(job, flat, tensors, {}, "ONNX")
        with torch_errors(job, "ONNX"):
            made: Any = torch.onnx.export(
                program,
                dynamo=True,
                opset_version=opset,
                input_names=list(job.names),
                output_names=list(outputs),
                dynamic_shapes=(tuple(dims or None for dims in job.openings.dims),),
                optimize=not any(p.dtype == torch.bfloat16 for p in job.network.parameters()),  # folds batch norms into float32 weights there
                verbose=False,
            )
            _settle_names(made.model, job.names, outputs)
            made.save(str(work))
    else:
        axes = {name: dims for name, dims in zip(job.names, job.openings.dims, strict=True) if dims}
        with torch_errors(job, "ONNX"), _no_graphs_printed():
            torch.onnx.export(
                flat,
                tensors,
                str(work),
                dynamo=False,
                training=torch.onnx.TrainingMode.PRESERVE,  # what it would fold loses the names of its weights
                opset_version=opset,
                input_names=list(job.names),
                output_names=list(outputs),
                dynamic_axes=axes,
                verbose=False,
            )
        _gather_data(work)
    proto = onnx.load(str(work), load_external_data=False)
    name_layers(proto, job.network, "network")
    check_chains(proto, job.network, job.layers)
    onnx.helper.set_model_props(proto, job.metadata)
    onnx.save(proto, str(work))
    found = next(int(o.version) for o in proto.opset_import if o.domain in ("", "ai.onnx"))
    if opset is not None and found != opset:
        kind = SurgeryError if exporter == "dynamo" else SurgeryValueError  # the older exporter may write it
        raise kind(f"opset: torch wrote operator set {found}, it cannot write {opset}; ask for {found} or one between, or for another exporter")
    return found


def _settle_names(model: Any, inputs: Sequence[str], outputs: Sequence[str]) -> None:
    """Inputs and outputs of a graph that torch made have these names and are values of their own; inner values of the same names give way.

    torch does the second where it optimizes a graph only, and gives the names after that.
    """
    from onnx_ir.passes import common

    if hasattr(common, "OutputFixPass"):  # from onnx_ir 0.1.13 on
        common.OutputFixPass()(model)
    for values, names in ((model.graph.inputs, inputs), (model.graph.outputs, outputs)):
        for value, name in zip(values, names, strict=True):
            value.name = name
    common.NameFixPass()(model)


def _gather_data(work: Path) -> None:
    """Weights beside a large file, of which the older exporter makes a file each, named alike in every export, as one file with its name."""
    import onnx

    from surgery.onnx_files.files import data_files, move_out

    files = data_files(work)
    if files:
        proto = onnx.load(str(work))
        for file in files:
            file.unlink()
        move_out(proto, f"{work.name}.data")
        onnx.save(proto, str(work))


@contextmanager
def _no_graphs_printed() -> Iterator[None]:
    """The older exporter prints the whole graph where it fails, from C++, and its switch for that is always on."""
    log = "_jit_onnx_log"
    with patch.object(torch._C, log, lambda *_: None) if hasattr(torch._C, log) else nullcontext():
        yield


def _output_names(output: Any) -> list[str]:
    """Keys of an output in a mapping or dataclass, else ``output`` with the way to each tensor."""
    top = "" if isinstance(output, Mapping) or is_dataclass(output) else "output"
    names = [f"output_{name}" if not name or name[0].isdigit() else name for name in tensor_names(output, top)]  # torch has no others
    count = sum(1 for _ in tensors_in(output))
    return names if len(names) == count else [f"output_{index}" for index in range(count)]


def onnx_session(model: Path | bytes, threads: int | None = None) -> Any:
    """An onnxruntime session on the CPU, of a file or of what would be in it.

    Its worker threads spin within a call and stop with it; onnxruntime's own default is that they go on spinning for tens of milliseconds, in
    which another session has to share its cores with them.

    Raises:
        SurgeryError: onnxruntime refuses the file.
    """
    need("onnxruntime", "running an ONNX file", "export")
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.add_session_config_entry("session.force_spinning_stop", "1")
    if threads is not None:
        options.intra_op_num_threads = threads
    try:
        return onnxruntime.InferenceSession(model if isinstance(model, bytes) else str(model), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime has its own family of exceptions, none of them public
        raise _refused(error) from error


def run_session(session: Any, inputs: Any) -> list[Tensor]:
    """Outputs of a session for inputs given as to the network.

    Raises:
        SurgeryError: onnxruntime cannot compute with them.
    """
    names = [i.name for i in session.get_inputs()]
    if isinstance(inputs, Mapping) and set(names) <= set(inputs):
        defaults = [i.name for i in session.get_overridable_initializers()]
        return _outputs(session, {name: inputs[name] for name in (*names, *defaults) if name in inputs})
    return _outputs(session, dict(zip(names, tensors_in(inputs), strict=True)))


def session_call(session: Any, feed: Mapping[str, Tensor]) -> Callable[[], object]:
    """A call of a session that is done over and over on these inputs, by name; those that the graph does not read are left out.

    Raises:
        SurgeryError: onnxruntime cannot compute with them.
    """
    used = {i.name for i in session.get_inputs()}
    values = {name: _value(tensor) for name, tensor in feed.items() if name in used}

    def call() -> object:
        return session.run_with_ort_values(None, values)

    try:
        call()
    except Exception as error:  # as for a session
        raise _refused(error) from error
    return call


def _loaded(file: Path, job: Job) -> Callable[[Any], list[Tensor]]:
    with _what_else_to_do():
        session = onnx_session(file)
    used = {i.name for i in session.get_inputs()}  # what the network does not read may be no input of the graph

    def call(inputs: Any) -> list[Tensor]:
        with _what_else_to_do():
            return _outputs(session, {name: t for name, t in zip(job.names, tensors_in(inputs), strict=True) if name in used})

    return call


@contextmanager
def _what_else_to_do() -> Iterator[None]:
    """Errors of onnxruntime with the advice of an export."""
    try:
        yield
    except SurgeryError as error:
        float32 = "export a float32 copy of the network, or " if any(sign in str(error) for sign in NO_KERNEL) else ""
        raise SurgeryError(f"{error}; {float32}{UNCHECKED}") from error.__cause__


def _outputs(session: Any, feed: Mapping[str, Tensor]) -> list[Tensor]:
    try:
        values = session.run_with_ort_values(None, {name: _value(tensor) for name, tensor in feed.items()})
    except Exception as error:  # as for a session
        raise _refused(error) from error
    return [_tensor(value) for value in values]


def _value(tensor: Tensor) -> Any:
    import onnx
    from onnxruntime import OrtValue

    plain = tensor.detach().cpu().contiguous()
    if plain.dtype == torch.bfloat16:  # numpy has none
        return OrtValue.ortvalue_from_numpy_with_onnx_type(plain.view(torch.uint16).numpy(), onnx.TensorProto.BFLOAT16)
    return OrtValue.ortvalue_from_numpy(plain.numpy())


def _tensor(value: Any) -> Tensor:
    if not value.is_tensor() or "string" in value.data_type():
        raise SurgeryError(f"an output is no tensor of numbers ({value.data_type()}) and cannot be compared")
    array = value.numpy()
    return torch.from_numpy(array).view(torch.bfloat16) if "bfloat16" in value.data_type() else torch.from_numpy(array)


def _refused(error: Exception) -> SurgeryError:
    text = shorten(first_line(error))
    no_kernel = "; it has no kernel for this dtype on the CPU" if any(sign in text for sign in NO_KERNEL) else ""
    return SurgeryError(f"onnxruntime cannot run the network: {text}{no_kernel}")
