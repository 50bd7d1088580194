"""Accuracy of the bundled ResNet-20 on the 10,000 CIFAR-10 test images: whole, cut by several rules without any training, reconstructed.

    python benchmarks/bundled_accuracy.py --data ROOT

ROOT holds the official ``cifar-10-batches-py``. The rows go to ``benchmarks/results/bundled_accuracy.json`` and are those of the model card.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import cifar10
import torch
from train_resnet20 import accuracy

import surgery
from surgery.benchmark import environment
from surgery.zoo import make

RULES: tuple[str | float, ...] = ("evbmf", "evbmf:weaken=0.5", "energy:0.9", 0.5, 0.75)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder that holds cifar-10-batches-py")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "bundled_accuracy.json")
    options = parser.parse_args()
    images, labels = cifar10.read(options.data, cifar10.TEST_FILES)
    model, shape = make("surgery:resnet20")
    inputs = torch.randn(shape)
    rows = [{"ranks": None, "top1": accuracy(model, images, labels), "params": sum(p.numel() for p in model.parameters())}]
    for ranks in RULES:
        net = surgery.decompose(model, ranks, example_inputs=inputs)
        report = surgery.report(net)
        rows.append(
            {
                "ranks": ranks,
                "top1": accuracy(net, images, labels),
                "top1_reconstructed": accuracy(surgery.reconstruct(net), images, labels),
                "params": report.params_after,
                "macs_ratio": report.speedup,
            }
        )
        print(rows[-1], flush=True)
    options.out.write_text(json.dumps({"environment": environment(), "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
