"""``surgery export``: a model as a file, checked against it."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING

import surgery
from surgery.cli.arguments import Commands, add_command, open_model

if TYPE_CHECKING:
    from torch import Tensor, nn


def add(commands: Commands) -> None:
    export = add_command(commands, "export", _export, "Export a model and check the file against it: OUT.onnx or OUT.pt (TorchScript).")
    export.add_argument("out", metavar="OUT", type=Path)
    export.add_argument("--opset", type=int, help="ONNX operator set")
    export.add_argument("--dynamic-batch", action="store_true", help="leave the batch dimension open (ONNX)")


def _export(options: argparse.Namespace) -> None:
    model, inputs = open_model(options)
    export_to(model, options.out, inputs, opset=options.opset, dynamic_batch=options.dynamic_batch, as_json=options.json)


def export_to(model: nn.Module, out: Path, inputs: Tensor, *, opset: int | None, dynamic_batch: bool, as_json: bool) -> None:
    """Export in the format that the file's ending names, and print what came out."""
    if out.suffix == ".onnx":
        done = surgery.export_onnx(model, out, inputs, dynamic_batch=dynamic_batch, opset=opset)
    elif out.suffix in (".pt", ".torchscript", ".ts"):
        if opset is not None or dynamic_batch:
            raise surgery.SurgeryValueError("--opset and --dynamic-batch are for ONNX; TorchScript takes any batch as it is")
        done = surgery.export_torchscript(model, out, inputs)
    else:
        raise surgery.SurgeryValueError(f"OUT {str(out)!r}: the ending names the format: .onnx for ONNX, .pt for TorchScript")
    print(json.dumps(done.to_data()) if as_json else done)
