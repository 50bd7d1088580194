"""Surgery on ONNX files, for networks whose source nobody has any more: the same kinds, rules, budgets and passes, on nodes instead of modules."""

from __future__ import annotations

from surgery.onnx_files.host import OnnxHost
from surgery.onnx_files.verbs import OnnxResult, decompose_onnx, plan_onnx, reconstruct_onnx, report_onnx

__all__ = ["OnnxHost", "OnnxResult", "decompose_onnx", "plan_onnx", "reconstruct_onnx", "report_onnx"]
