"""Train a small network three times from one start: as it is, cut after some epochs, and cut and fused back; accuracy and seconds of each.

    python examples/train.py [--epochs 8] [--cut-at 2] [--fuse-at 6] [--ranks 0.5]

The pictures are made up (ten patterns in noise, the same for all runs), so that the script needs no data; they say nothing of real accuracy. On
a network this small the cut need not save time: put your own in the place of ``network`` and ``pictures``.
"""

from __future__ import annotations

import argparse
import copy
import sys
import time
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, interpolate

import surgery
from surgery.cli import guarded, parse_ranks_text

CLASSES, SIZE = 10, 16


def network() -> nn.Module:
    layers: list[nn.Module] = []
    for inputs, outputs, stride in ((3, 32, 1), (32, 64, 2), (64, 64, 1), (64, 96, 2)):
        layers += [nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(96, CLASSES))


def pictures(count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Pictures of ten smooth patterns in strong noise, and which pattern each is."""
    patterns = interpolate(torch.randn(CLASSES, 3, 4, 4, generator=torch.Generator().manual_seed(1)), SIZE, mode="bilinear")
    labels = torch.randint(CLASSES, (count,), generator=generator)
    return patterns[labels] + torch.randn(count, 3, SIZE, SIZE, generator=generator), labels


def train(model: nn.Module, schedule: surgery.DecompositionSchedule | None, epochs: int, batches: int) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=5e-4)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)
    generator = torch.Generator().manual_seed(2)
    for epoch in range(epochs):
        if schedule is not None:
            done = schedule.step(epoch, model, optimizer)
            if done is not None:
                print(f"  epoch {epoch}: {sum(p.numel() for p in model.parameters()):,} parameters in training from here on")
        model.train()
        for _ in range(batches):
            images, labels = pictures(64, generator)
            loss = cross_entropy(model(images), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        scheduler.step()


def accuracy(model: nn.Module) -> float:
    images, labels = pictures(1000, torch.Generator().manual_seed(3))
    with torch.no_grad():
        return float((model.eval()(images).argmax(1) == labels).float().mean())


def run(options: argparse.Namespace) -> None:
    torch.manual_seed(0)
    start = network()
    runs: dict[str, surgery.DecompositionSchedule | None] = {
        "as it is": None,
        f"cut at {options.cut_at}": surgery.DecompositionSchedule(options.cut_at, ranks=options.ranks),
        f"cut at {options.cut_at}, fused at {options.fuse_at}": surgery.DecompositionSchedule(options.cut_at, options.fuse_at, options.ranks),
    }
    for name, schedule in runs.items():
        model = copy.deepcopy(start)
        print(name)
        began = time.perf_counter()
        train(model, schedule, options.epochs, options.batches)
        print(
            f"  {time.perf_counter() - began:.1f} s, {100 * accuracy(model):.1f} % right, {sum(p.numel() for p in model.parameters()):,} parameters"
        )


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=8, help="default: %(default)s")
    parser.add_argument("--batches", type=int, default=20, help="an epoch (default: %(default)s)")
    parser.add_argument("--cut-at", type=int, default=2, help="epoch (default: %(default)s)")
    parser.add_argument("--fuse-at", type=int, default=6, help="epoch (default: %(default)s)")
    parser.add_argument("--ranks", type=parse_ranks_text, default=0.5, help="as in surgery decompose --ranks (default: %(default)s)")
    options = parser.parse_args(arguments)
    return guarded(lambda: run(options))


if __name__ == "__main__":
    sys.exit(main())
