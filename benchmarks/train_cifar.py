"""The paper's training runs on CIFAR-10: accuracy against time, whole, decomposed in training, fused back, and decomposed after training.

    python benchmarks/train_cifar.py --data ROOT --out RUNS [--network surgery:vgg19] [--epochs 200] [--scenarios original decompose-10 ...]

ROOT holds the official ``cifar-10-batches-py``. Scenarios (Elhoushi et al. 2019, section 4): ``original``; ``decompose-N``, after N epochs;
``decompose-N-reconstruct-M``; ``after-F``, decomposed after the last epoch and fine-tuned for F more. The paper's are the default, in shorter runs
those at the same shares of the run. Beyond the paper: ``decompose-N-deeper-L`` cuts again after L epochs (``--ranks`` takes two then). The learning
rate drops to a tenth after 50 % and after 75 % of the epochs. With ``--bf16`` or ``--compile`` a cut is still planned, and timed for ``--guard``, in
float32 and uncompiled: read from the log whether its step became faster.

Each run has a folder in RUNS with a log (a row an epoch: accuracy, seconds with surgery, parameters, MACs), the report of its surgery and its last
checkpoint; started again it goes on to the bit (on a CPU). Scenarios go on from checkpoints of those that they share their first epochs with, and are
charged that time. ``benchmarks/training_tables.py`` makes tables and figures.
"""

from __future__ import annotations

import argparse

from training.command import add_arguments, main
from training.data import InMemory
from training.recipe import Recipe


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(made, Recipe(network="surgery:vgg19", epochs=200))
    return made


if __name__ == "__main__":
    main(parser(), lambda options: InMemory.cifar10(options.data, options.batch, options.device, options.subset))
