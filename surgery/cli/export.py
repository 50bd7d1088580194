"""``surgery export``: a model as a file, checked against it."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import surgery
from surgery.cli.arguments import Commands, add_command, open_model
from surgery.cli.targets import check_file

if TYPE_CHECKING:
    from torch import Tensor, nn

__all__ = ["export_to"]

ENDINGS = {
    ".onnx": "onnx",
    ".pt": "torchscript",
    ".ts": "torchscript",
    ".torchscript": "torchscript",
    ".pt2": "program",
    ".xml": "openvino",
}
ONLY_FOR = {"opset": ("onnx",), "exporter": ("onnx", "openvino")}
TEXT = "Export a model and check the file against it. The ending of OUT names the format: .onnx (ONNX), .pt or .torchscript (TorchScript), "
TEXT += ".pt2 (torch.export), .xml (OpenVINO, with its weights in a .bin beside it)."


def add(commands: Commands) -> None:
    export = add_command(commands, "export", _export, TEXT)
    export.add_argument("out", metavar="OUT", type=Path)
    export.add_argument("--dynamic-batch", action="store_true", help="leave the batch dimension open")
    export.add_argument("--dynamic-size", action="store_true", help="leave height, width and the like open, as far as the network takes other sizes")
    export.add_argument("--opset", type=int, help="ONNX operator set")
    export.add_argument(
        "--fuse", action="store_true", help="first fuse linear runs into layers: chains of surgery too, runs written by hand, batch norms"
    )
    export.add_argument("--deploy", action="store_true", help="first fold batch norms, drop identities and merge 1x1 layers where that lowers MACs")
    export.add_argument("--exporter", choices=("auto", "dynamo", "torchscript"), help="torch's exporter to ONNX, for .onnx and .xml (default: auto)")


def _export(options: argparse.Namespace) -> None:
    chosen = {name: getattr(options, name) for name in ("dynamic_batch", "dynamic_size", "opset", "exporter")}
    try:
        format_for(options.out, chosen)  # before minutes are spent on a model
    except surgery.SurgeryValueError as error:
        options.wrong(str(error))
    check_file("OUT", options.out)
    model, inputs = open_model(options)
    if options.fuse:
        model = surgery.reconstruct(model, foreign=True, example_inputs=inputs)
    if options.deploy:
        model = surgery.deploy(model, inputs)
    export_to(model, options.out, inputs, as_json=options.json, **chosen)


def export_to(model: nn.Module, out: Path, inputs: Tensor, *, as_json: bool = False, **options: Any) -> None:
    """Export in the format that the file's ending names, and print what came out. Options that are None are left to their defaults."""
    export = {
        "onnx": surgery.export_onnx,
        "torchscript": surgery.export_torchscript,
        "program": surgery.export_program,
        "openvino": surgery.export_openvino,
    }
    given = {key: value for key, value in options.items() if value is not None}
    done = export[format_for(out, given)](model, out, inputs, **given)
    print(json.dumps(done.to_data()) if as_json else done)


def format_for(out: Path, options: Mapping[str, Any]) -> str:
    """The format that an ending names.

    Raises:
        SurgeryValueError: it names none, or one that has no such option.
    """
    if out.suffix not in ENDINGS:
        raise surgery.SurgeryValueError(f"OUT {str(out)!r}: the ending names the format, one of {', '.join(ENDINGS)}")
    name = ENDINGS[out.suffix]
    for key, formats in ONLY_FOR.items():
        if options.get(key) is not None and name not in formats:
            raise surgery.SurgeryValueError(f"--{key} is for {' and '.join(formats)}; {out} is to be {name}")
    return name
