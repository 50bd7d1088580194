"""The main job, on the bundled network: decompose, report, export, check, time, reconstruct.

    tools/quickstart [--ranks evbmf] [--out FOLDER]

Every step is one call that works the same in any other program.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

import torch

import surgery
from passes.parity import difference
from surgery.cli import guarded, parse_ranks_text
from surgery.zoo import make


def run(ranks: object, out: Path) -> None:
    model, shape = make("surgery:resnet20")
    inputs = torch.randn(shape, generator=torch.Generator().manual_seed(0))

    print(f"1. Decompose a trained ResNet-20 (CIFAR-10), ranks={ranks!r}\n")
    net = surgery.decompose(model, ranks, example_inputs=inputs)
    print(surgery.report(net))

    print("\n2. Export both to ONNX, and check the files with onnxruntime\n")
    for network, name in ((model, "before.onnx"), (net, "after.onnx")):
        print(surgery.export_onnx(network, out / name, inputs, dynamic_batch=True))

    print("\n3. Time both, side by side (a ratio above 1 means faster)\n")
    print(surgery.benchmark(model, net, inputs, seconds=5))

    print("\n4. Reconstruct: the original architecture, the same function\n")
    back = surgery.reconstruct(net)
    same_keys = list(back.state_dict()) == list(model.state_dict())
    with torch.no_grad():
        gap = difference(back(inputs), net(inputs))
    print(f"state_dict keys as in the original: {'yes' if same_keys else 'NO'}; largest difference from the decomposed network: {gap:.1e}")
    print(
        "\nA cut by EVBMF without training costs accuracy (surgery/zoo/weights/README.md has the figures): train on, or choose higher ranks."
        "\nThe files are in " + str(out)
    )
    if not same_keys or not gap <= 1e-5:
        raise surgery.ParityError("the reconstructed network is not the one that was decomposed")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=parse_ranks_text, default="evbmf", help="as in surgery decompose --ranks (default: %(default)s)")
    parser.add_argument("--out", type=Path, help="folder for the ONNX files (default: a new temporary one)")
    options = parser.parse_args()
    out = options.out or Path(tempfile.mkdtemp(prefix="surgery-quickstart-"))
    return guarded(lambda: run(options.ranks, out))


if __name__ == "__main__":
    sys.exit(main())
