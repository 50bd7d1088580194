"""The paper's training runs on ImageNet, or on any other folder of pictures: ``train_cifar.py`` for ``ROOT/train/CLASS/`` and ``ROOT/val/CLASS/``.

    python benchmarks/train_imagenet.py --data ROOT --out RUNS --device cuda --bf16 [--network torchvision:resnet50] [--epochs 90]

Batch 256, rate 0.1, a tenth after each third of the epochs. The network must have at least as many outputs as there are folders of classes.
"""

from __future__ import annotations

import argparse

from training.command import add_arguments, main
from training.data import Folder
from training.recipe import Recipe


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(made, Recipe(network="torchvision:resnet50", epochs=90, batch=256, drops=(1 / 3, 2 / 3)))
    made.add_argument("--size", type=int, default=224, help="of the crops (default: %(default)s)")
    made.add_argument("--workers", type=int, default=8, help="processes that read pictures (default: %(default)s)")
    return made


if __name__ == "__main__":
    main(parser(), lambda options: Folder(options.data, options.batch, options.device, options.size, options.workers, options.subset))
