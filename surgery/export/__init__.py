"""Out of the door: networks as files for other runtimes, each checked against the network it came from."""

from __future__ import annotations

from surgery.export.common import ExportReport
from surgery.export.metadata import exported_plan
from surgery.export.onnx import export_onnx
from surgery.export.onnx_layers import OnnxConvolution, onnx_convolutions
from surgery.export.openvino import export_openvino
from surgery.export.program import export_program
from surgery.export.torchscript import export_torchscript

__all__ = [
    "ExportReport",
    "OnnxConvolution",
    "export_onnx",
    "export_openvino",
    "export_program",
    "export_torchscript",
    "exported_plan",
    "onnx_convolutions",
]
