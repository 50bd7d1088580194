"""Out of the door: networks as files for other runtimes, each checked against the network it came from."""

from __future__ import annotations

from surgery.export.common import ExportReport
from surgery.export.onnx import export_onnx
from surgery.export.torchscript import export_torchscript

__all__ = ["ExportReport", "export_onnx", "export_torchscript"]
