"""OpenVINO: the ONNX graph as an intermediate representation (.xml and .bin), read back and compared with the network on the CPU."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, nn

from passes.errors import SurgeryError, SurgeryValueError
from passes.parity import tensors_in
from passes.running import first_line, shorten
from surgery.export.common import ExportReport, Job, exporting, installed, need, prepare, quiet, written
from surgery.export.inputs import DynamicSize
from surgery.export.onnx import Exporter, check_exporter, with_exporter, write_onnx
from surgery.files import as_path

__all__ = ["export_openvino", "openvino_errors", "openvino_tensor"]

EXACT = {"INFERENCE_PRECISION_HINT": "f32"}
"""Where the processor has bfloat16 the CPU plugin computes in it unless told otherwise, and then no check could tell a wrong graph from rounding."""


@exporting()
def export_openvino(
    model: nn.Module,
    path: str | os.PathLike[str],
    example_inputs: Any,
    *,
    check: bool = True,
    dynamic_batch: bool = False,
    dynamic_size: DynamicSize = False,
    exporter: Exporter = "auto",
) -> ExportReport:
    """Write a model for OpenVINO, its weights in a ``.bin`` beside the ``.xml``, and prove that the files, read back, compute the same.

    The model goes through ONNX (``export_onnx``), so that operators of convolutions are named after their layers (but for those into which OpenVINO
    folds a batch norm, which torch's newer exporter has folded before); weights keep their dtype. The check runs in float32. The files say how the
    network was made (``surgery.exported_plan``). Nothing is left behind if the export or the check fails.

    Args:
        model: plain, decomposed, reconstructed or deployed module, or a ``GraphModule``.
        path: file to write, ending in .xml.
        example_inputs: a tensor, a tuple of positional or a mapping of keyword arguments; what is no tensor in them is fixed in the file.
        check: compare on fresh random inputs (on two sizes of what is open).
        dynamic_batch: leave the first dimension of the first input open, and of all that have as many entries there.
        dynamic_size: leave the dimensions from the third on (N, C, ...) open where the network takes other sizes, or those named, as ``{"x": [1]}``.
        exporter: torch's exporter to ONNX, as for ``export_onnx``.

    Raises:
        MissingExtra: openvino is not installed, or onnxscript.
        ParityError: OpenVINO computes something else.
        SurgeryError: torch cannot export the model, or OpenVINO cannot read or run it; the reason is in the message.
        SurgeryValueError: the arguments do not fit the model.
        OSError: the files cannot be written.
    """
    if as_path("path", path).suffix != ".xml":
        raise SurgeryValueError(f"path: {path} must end in .xml; the weights go into a .bin of the same name")
    job = prepare(model, path, example_inputs, check=check, dynamic_batch=dynamic_batch, dynamic_size=dynamic_size)
    check_exporter(exporter, "OpenVINO export", "openvino")
    need("openvino", "OpenVINO export", "openvino")

    def attempt(name: str) -> ExportReport:
        with installed(job.target) as work:
            with TemporaryDirectory() as folder:
                onnx_file = Path(folder) / "network.onnx"
                opset = write_onnx(job, onnx_file, name, None)
                _convert(onnx_file, work, job)
            load = (lambda: _loaded(work, job)) if check else None
            return written(job, work, "openvino", exporter=name, load=load, what="OpenVINO", computes_in=torch.float32, opset=opset)

    return with_exporter(exporter, attempt, check=check)


def _convert(onnx_file: Path, work: Path, job: Job) -> None:
    import openvino

    with quiet(), openvino_errors("read the ONNX graph of the network"):
        converted = openvino.convert_model(str(onnx_file))
        for key, text in job.metadata.items():
            converted.set_rt_info(text, key.split("."))
        openvino.save_model(converted, str(work), compress_to_fp16=False)


def _loaded(file: Path, job: Job) -> Callable[[Any], list[Tensor]]:
    import openvino

    with openvino_errors("run the exported network (check=False writes it unchecked)"):
        compiled = openvino.Core().compile_model(str(file), "CPU", EXACT)
        used = {name for port in compiled.inputs for name in port.get_names()}

    def call(inputs: Any) -> list[Tensor]:
        feed = {name: openvino_tensor(t) for name, t in zip(job.names, tensors_in(inputs), strict=True) if name in used}
        with openvino_errors("run the exported network (check=False writes it unchecked)"):
            request = compiled.create_infer_request()
            request.infer(feed)
            return [_tensor(request.get_output_tensor(index)) for index in range(len(compiled.outputs))]

    return call


def openvino_tensor(tensor: Tensor) -> Any:
    """As OpenVINO takes it."""
    import openvino

    plain = tensor.detach().cpu().contiguous()
    if plain.dtype == torch.bfloat16:  # numpy has none
        return openvino.Tensor(plain.view(torch.uint16).numpy(), list(plain.shape), openvino.Type.bf16)
    return openvino.Tensor(plain.numpy())


def _tensor(value: Any) -> Tensor:
    import openvino

    array = torch.from_numpy(value.data.copy())
    return array.view(torch.bfloat16) if value.element_type == openvino.Type.bf16 else array


@contextmanager
def openvino_errors(what: str) -> Iterator[None]:
    """Whatever OpenVINO raises becomes one error that says what it could not do."""
    try:
        yield
    except (OSError, SurgeryError):
        raise
    except Exception as error:  # its exceptions are RuntimeErrors of its own, with the reason far below
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        reason = next((line for line in lines if "onversion failed" in line or "not supported" in line.lower()), first_line(error))
        raise SurgeryError(f"OpenVINO cannot {what}: {shorten(reason)}") from error
