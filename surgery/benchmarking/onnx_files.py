"""ONNX files in the runtimes that read them, both on the CPU."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from passes.errors import SurgeryError
from passes.parity import tensors_in
from surgery.benchmarking.ready import Ready

if TYPE_CHECKING:
    from surgery.export.common import ExportReport
    from surgery.export.onnx import Exporter

__all__ = ["onnxruntime", "onnxruntime_file", "openvino", "openvino_call", "openvino_file", "size_of"]

PRECISIONS = {torch.float32: "f32", torch.float16: "f16", torch.bfloat16: "bf16"}


@contextmanager
def onnxruntime(network: nn.Module, example_inputs: Any) -> Iterator[Ready]:
    with _exported(network, example_inputs) as (file, feed):
        yield onnxruntime_file(file, feed)


@contextmanager
def openvino(network: nn.Module, example_inputs: Any) -> Iterator[Ready]:
    with _exported(network, example_inputs) as (file, feed):
        yield openvino_file(file, feed)


def onnxruntime_file(file: Path, feed: Mapping[str, Tensor]) -> Ready:
    """An ONNX file in onnxruntime, with torch's number of threads; inputs by name."""
    from surgery.export.onnx import onnx_session, session_call

    try:
        call = session_call(onnx_session(file, torch.get_num_threads()), feed)
    except SurgeryError as error:
        raise SurgeryError(f"{file.name}: {error}") from error.__cause__
    return Ready(call, file_bytes=size_of(file))


def openvino_file(file: Path, feed: Mapping[str, Tensor]) -> Ready:
    """The same in OpenVINO."""
    return Ready(openvino_call(file, feed), file_bytes=size_of(file))


@contextmanager
def _exported(network: nn.Module, example_inputs: Any) -> Iterator[tuple[Path, dict[str, Tensor]]]:
    """A temporary ONNX file of the network, and its inputs by name."""
    from surgery.export.inputs import input_names
    from surgery.export.onnx import export_onnx, with_exporter

    names = input_names(network, example_inputs)
    with TemporaryDirectory() as folder:
        file = Path(folder) / "network.onnx"

        def attempt(exporter: Exporter) -> ExportReport:
            return export_onnx(network, file, example_inputs, check=False, exporter=exporter)

        with_exporter("auto", attempt, check=True)  # a trace, too: it keeps what the network does with these inputs, on which it is timed
        yield file, dict(zip(names, tensors_in(example_inputs), strict=True))


def size_of(file: Path) -> int:
    """Bytes of an ONNX file with the weights beside it that belong to it."""
    from surgery.onnx_files.files import data_files

    return file.stat().st_size + sum(data.stat().st_size for data in data_files(file))


def openvino_call(file: Path, example_inputs: Any) -> Callable[[], object]:
    """Calls of an ONNX file in OpenVINO on the CPU, with torch's number of threads.

    It computes in the dtype of its inputs: left alone OpenVINO takes bfloat16 where the processor has it, and would be compared with float32.

    Args:
        file: to read.
        example_inputs: as to the network; in a mapping by the names of the file's inputs those that it lacks are left out.

    Raises:
        SurgeryError: OpenVINO refuses the file or the inputs.
    """
    import openvino

    from surgery.export.openvino import openvino_errors, openvino_tensor

    tensors = list(tensors_in(example_inputs))
    precision = next((PRECISIONS[t.dtype] for t in tensors if t.dtype in PRECISIONS), "f32")
    options = {"INFERENCE_NUM_THREADS": torch.get_num_threads(), "INFERENCE_PRECISION_HINT": precision}
    with openvino_errors("run this ONNX file"):
        compiled = openvino.Core().compile_model(str(file), "CPU", options)
        request = compiled.create_infer_request()
        used = {name for port in compiled.inputs for name in port.get_names()}
        feed: dict[Any, Any] = {index: openvino_tensor(t) for index, t in enumerate(tensors)}
        if isinstance(example_inputs, Mapping) and used <= set(example_inputs):
            feed = {name: openvino_tensor(example_inputs[name]) for name in used}
        request.infer(feed)
    return lambda: request.infer(feed)
