"""ONNX: written by torch's exporter, read back and compared with the network by onnxruntime."""

from __future__ import annotations

import contextlib
import io
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from passes.errors import MissingExtra, SurgeryError, SurgeryValueError
from passes.parity import tensors_in
from passes.running import arguments, kept_random_states
from surgery.export.common import (
    ExportReport,
    check_network,
    installed,
    network_to_export,
    quiet,
    tensors_or_error,
    total_size,
)

__all__ = ["export_onnx", "onnx_session", "run_session"]


@kept_random_states()
def export_onnx(
    model: nn.Module,
    path: str | os.PathLike[str],
    example_inputs: Any,
    *,
    check: bool = True,
    dynamic_batch: bool = False,
    opset: int | None = None,
) -> ExportReport:
    """Write a model as ONNX and prove that onnxruntime computes the same.

    The model is exported in eval mode, from a copy. Nothing is left behind if the export or the check fails.

    Args:
        model: plain, decomposed or reconstructed module, or a ``GraphModule``.
        path: file to write; weights of very large models go beside it.
        example_inputs: a tensor, a tuple of positional or a mapping of keyword arguments.
        check: compare with onnxruntime on fresh random inputs (two batch sizes with ``dynamic_batch``).
        dynamic_batch: leave the first dimension of every input open.
        opset: ONNX operator set; torch's default where None.

    Raises:
        MissingExtra: onnxscript, or onnxruntime for the check, is not installed.
        ParityError: onnxruntime computes something else.
        SurgeryError: torch cannot export the model; its error is the cause.
        OSError: the file cannot be written.
    """
    network, target = network_to_export(model, path, example_inputs)
    _need("onnxscript")
    if check:
        _need("onnxruntime")
    tensors = tensors_or_error(example_inputs)
    if dynamic_batch and any(t.ndim == 0 for t in tensors):
        raise SurgeryValueError("dynamic_batch: an example input has no dimension that could be open")
    exported_inputs = _batch_of_two(example_inputs) if dynamic_batch else example_inputs
    args, kwargs = arguments(exported_inputs)
    if args and isinstance(args[-1], dict):
        args = (*args, {})  # torch takes a dict at the end of args for keyword arguments
    with installed(target) as work:
        try:
            with quiet(), _silent_exporter(), torch.no_grad():
                program = torch.onnx.export(
                    network,
                    args,
                    kwargs=kwargs,
                    dynamo=True,
                    opset_version=opset,
                    dynamic_shapes=_open_batches(exported_inputs) if dynamic_batch else None,
                    verbose=False,
                )
                if program is None:
                    raise SurgeryError("torch.onnx.export returned nothing")
                program.save(str(work))
        except (OSError, SurgeryError):
            raise
        except Exception as error:  # the exporter runs the model and wraps all kinds of errors
            raise SurgeryError(f"torch cannot export {type(model).__name__} to ONNX: {type(error).__name__}: {_first_line(error)}") from error
        written = _opset(work)
        if opset is not None and written != opset:
            raise SurgeryValueError(f"opset: torch wrote operator set {written}, it cannot write {opset}; ask for {written} or one between")
        difference: float | None = None
        sizes: tuple[int, ...] = ()
        if check:
            session = onnx_session(work)
            batches = (3, 1) if dynamic_batch else (None,)
            difference, sizes = check_network(
                network, lambda inputs: run_session(session, inputs), example_inputs, batches, "onnxruntime and the network"
            )
        return ExportReport(
            path=str(target),
            format="onnx",
            size_bytes=total_size(work),
            difference=difference,
            batch_sizes=sizes,
            opset=written,
        )


def onnx_session(file: Path, threads: int | None = None) -> Any:
    """An onnxruntime session on the CPU.

    Raises:
        SurgeryError: onnxruntime refuses the file.
    """
    _need("onnxruntime")
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    if threads is not None:
        options.intra_op_num_threads = threads
    try:
        return onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime has its own family of exceptions, none of them public
        raise SurgeryError(f"onnxruntime cannot run the exported network (check=False skips this): {_first_line(error)}") from error


def run_session(session: Any, inputs: Any) -> list[torch.Tensor]:
    """Outputs of a session for inputs given as to the network."""
    arrays = [t.detach().cpu().numpy() for t in tensors_in(inputs)]
    names = [i.name for i in session.get_inputs()]
    if isinstance(inputs, dict) and set(names) <= set(inputs):
        feed = {name: inputs[name].detach().cpu().numpy() for name in names}
    else:
        feed = dict(zip(names, arrays, strict=True))
    return [torch.from_numpy(array) for array in session.run(None, feed)]


def _need(package: str) -> None:
    import importlib.util

    if importlib.util.find_spec(package) is None:
        raise MissingExtra(f"ONNX export needs {package}: pip install 'surgery[export]'")


def _batch_of_two(example_inputs: Any) -> Any:
    """Torch specialises a dimension of size one, so an open dimension is exported with two entries."""
    from surgery.export.common import fresh_inputs

    first = next(tensors_in(example_inputs))
    if first.shape[0] > 1:
        return example_inputs
    return fresh_inputs(example_inputs, torch.Generator().manual_seed(0), 2)


def _open_batches(example_inputs: Any) -> Any:
    batch = torch.export.Dim("batch")

    def mark(value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            return {0: batch}
        if isinstance(value, dict):
            return {key: mark(item) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return type(value)(mark(item) for item in value)
        return None

    if isinstance(example_inputs, tuple | dict):
        return mark(example_inputs)
    return (mark(example_inputs),)


def _opset(file: Path) -> int:
    import onnx

    model = onnx.load(str(file), load_external_data=False)
    return next(int(o.version) for o in model.opset_import if o.domain in ("", "ai.onnx"))


def _first_line(error: BaseException) -> str:
    return next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)


@contextmanager
def _silent_exporter() -> Iterator[None]:
    """torch.onnx prints and logs its progress; callers asked for a file."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
