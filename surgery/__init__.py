"""Model surgery for PyTorch: decompose convolutions into small chains, fuse them back, export and measure.

net = surgery.decompose(model, ranks="evbmf")
print(surgery.report(net))
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from passes.chain import Chain
from passes.channel import Channel
from passes.cp import CP
from passes.depthwise import Depthwise
from passes.errors import MissingExtra, ParityError, SurgeryError, SurgeryTypeError, SurgeryValueError
from passes.factorization import Factorization, Keep
from passes.spatial import Spatial
from passes.svd import SVD
from passes.tucker import Tucker
from surgery import ranks
from surgery.benchmark import benchmark
from surgery.decompose import decompose
from surgery.decompose import plan as _plan
from surgery.plan import Plan
from surgery.progress import show_progress
from surgery.ranks.budget import Budget
from surgery.reconstruct import reconstruct
from surgery.report import LayerReport, Report, report
from surgery.tracing import capture, trace
from surgery.version import __version__

if TYPE_CHECKING:
    from passes.recording import RecordedGraph
    from surgery.alternatives import explain, tradeoff
    from surgery.benchmarking.result import Benchmark
    from surgery.checkpoint import load, save
    from surgery.deployment import deploy
    from surgery.export import ExportReport, export_onnx, export_openvino, export_program, export_torchscript, exported_plan
    from surgery.onnx_files import OnnxResult, decompose_onnx, plan_onnx, reconstruct_onnx, report_onnx
    from surgery.refinement import Refine
    from surgery.training.decay import frobenius_decay
    from surgery.training.schedule import DecompositionSchedule
    from surgery.training.settling import Settled

plan = _plan  # the function, not the module of the same name

LATER = {
    "Benchmark": "surgery.benchmarking.result",
    "DecompositionSchedule": "surgery.training.schedule",
    "RecordedGraph": "passes.recording",
    "Refine": "surgery.refinement",
    "Settled": "surgery.training.settling",
    "deploy": "surgery.deployment",
    "explain": "surgery.alternatives",
    "tradeoff": "surgery.alternatives",
    "ExportReport": "surgery.export",
    "export_onnx": "surgery.export",
    "export_openvino": "surgery.export",
    "export_program": "surgery.export",
    "export_torchscript": "surgery.export",
    "exported_plan": "surgery.export",
    "frobenius_decay": "surgery.training.decay",
    "decompose_onnx": "surgery.onnx_files",
    "plan_onnx": "surgery.onnx_files",
    "reconstruct_onnx": "surgery.onnx_files",
    "report_onnx": "surgery.onnx_files",
    "OnnxResult": "surgery.onnx_files",
    "load": "surgery.checkpoint",
    "save": "surgery.checkpoint",
}
"""Names that are imported when they are first used, and from where, so that ``import surgery`` stays cheap."""


def __getattr__(name: str) -> Any:
    if name not in LATER:
        raise AttributeError(f"module 'surgery' has no attribute {name!r}")
    from importlib import import_module

    globals()[name] = found = getattr(import_module(LATER[name]), name)
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


__all__ = [
    "CP",
    "SVD",
    "Benchmark",
    "Budget",
    "Chain",
    "Channel",
    "DecompositionSchedule",
    "Depthwise",
    "ExportReport",
    "Factorization",
    "Keep",
    "LayerReport",
    "MissingExtra",
    "OnnxResult",
    "ParityError",
    "Plan",
    "RecordedGraph",
    "Refine",
    "Report",
    "Settled",
    "Spatial",
    "SurgeryError",
    "SurgeryTypeError",
    "SurgeryValueError",
    "Tucker",
    "__version__",
    "benchmark",
    "capture",
    "decompose",
    "decompose_onnx",
    "deploy",
    "explain",
    "export_onnx",
    "export_openvino",
    "export_program",
    "export_torchscript",
    "exported_plan",
    "frobenius_decay",
    "load",
    "plan",
    "plan_onnx",
    "ranks",
    "reconstruct",
    "reconstruct_onnx",
    "report",
    "report_onnx",
    "save",
    "show_progress",
    "trace",
    "tradeoff",
]
