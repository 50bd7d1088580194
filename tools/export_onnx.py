#!/usr/bin/env python3
"""Export a network to ONNX, decomposed on request, and check the file against the network.

    python tools/export_onnx.py torchvision:resnet18 out.onnx
    python tools/export_onnx.py surgery:resnet20 out.onnx --ranks evbmf
    python tools/export_onnx.py package.module:factory out.onnx --weights weights.pt --input-shape 1,3,64,64

The batch dimension is open unless ``--fixed-batch`` is given. Exit code 1 and no file left when the export or its check fails, 2 for wrong usage.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import surgery
from surgery.cli import add_model_arguments, check_file, export_to, guarded, open_model, parse_ranks_text


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_model_arguments(parser)
    parser.add_argument("out", metavar="OUT", type=Path, help="file to write, ending in .onnx")
    parser.add_argument("--ranks", type=parse_ranks_text, help="decompose first, with these ranks (see surgery decompose --help)")
    parser.add_argument("--fixed-batch", action="store_true", help="fix the batch dimension to that of the input")
    parser.add_argument("--opset", type=int, help="ONNX operator set")
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    options = parser.parse_args()
    if options.out.suffix != ".onnx":
        parser.error(f"OUT {str(options.out)!r}: the name must end in .onnx")

    def run() -> None:
        check_file("OUT", options.out)  # before minutes are spent on a model
        model, inputs = open_model(options)
        if options.ranks is not None:
            model = surgery.decompose(model, options.ranks, example_inputs=inputs, progress=True)
        export_to(model, options.out, inputs, opset=options.opset, dynamic_batch=not options.fixed_batch, as_json=options.json)

    return guarded(run)


if __name__ == "__main__":
    sys.exit(main())
