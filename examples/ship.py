"""Cut a network to a budget, clean it up, export it beside the original, and time the two files' networks against each other.

    python examples/ship.py [MODEL] [--budget 0.6] [--inputs FILE] [--out FOLDER]

MODEL is written as on the command line (``surgery export --help``). ``--inputs`` is a tensor (N, C, H, W) of real inputs, written by ``torch.save``;
with it the factors are fitted to what the network sees, without labels. Everything is left in FOLDER: both ONNX files and the plan.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

import surgery
from surgery.cli import add_model_arguments, guarded, open_model


def read_inputs(file: Path) -> torch.Tensor:
    try:
        found = torch.load(file, weights_only=True)
    except OSError:
        raise
    except Exception as error:  # reading what is something else may fail in any way
        raise surgery.SurgeryValueError(f"--inputs: {file} was not written by torch.save") from error
    if not isinstance(found, torch.Tensor):
        raise surgery.SurgeryValueError(f"--inputs: {file} holds no tensor but {type(found).__name__}")
    return found


def run(options: argparse.Namespace) -> None:
    model, inputs = open_model(options)
    seen = None if options.inputs is None else read_inputs(options.inputs).split(64)
    net = surgery.decompose(model, surgery.Budget(macs=options.budget), example_inputs=inputs, calibration=seen, round_to=8)
    print(surgery.report(net))

    before, after = surgery.deploy(model, inputs), surgery.deploy(net, inputs)  # both cleaned up, so that the cut alone is compared
    options.out.mkdir(parents=True, exist_ok=True)
    for network, name in ((before, "before.onnx"), (after, "after.onnx")):
        print(surgery.export_onnx(network, options.out / name, inputs, dynamic_batch=True, exporter=options.exporter))
    surgery.plan(model, {row.name: row.factorization for row in surgery.report(net).layers if row.factorization}).save(options.out / "plan.json")
    print(surgery.benchmark(before, after, inputs, seconds=options.seconds))


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_model_arguments(parser, default="surgery:resnet20")
    parser.add_argument("--budget", type=float, default=0.6, help="share of the MACs that the network may take (default: %(default)s)")
    parser.add_argument("--inputs", type=Path, help="real inputs to fit the factors to (default: the weights alone decide)")
    parser.add_argument("--exporter", default="auto", help="torch's exporter: auto, dynamo or torchscript (default: %(default)s)")
    parser.add_argument("--seconds", type=float, default=10.0, help="of timing, at most, a runtime (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=Path("shipped"), help="folder (default: %(default)s)")
    options = parser.parse_args(arguments)
    return guarded(lambda: run(options))


if __name__ == "__main__":
    sys.exit(main())
