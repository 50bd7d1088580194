"""A small network, some CIFAR-10 and a plain training loop, for questions that many short runs answer better than one long one."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cifar10
import torch
from torch import Tensor, nn
from torch.nn import functional

BATCH = 64
FILES = cifar10.TRAIN_FILES[:1]
TEST_IMAGES = 2000


def network(seed: int) -> nn.Module:
    """Five 3x3 convolutions with batch norm, 24 to 96 channels: images (N, 3, 32, 32) -> logits (N, 10); 0.15 M parameters, 17 M MACs an image."""
    torch.manual_seed(seed)
    layers: list[nn.Module] = []
    for into, out, stride in ((3, 24, 1), (24, 48, 2), (48, 48, 1), (48, 96, 2), (96, 96, 1)):
        layers += [nn.Conv2d(into, out, 3, stride, padding=1, bias=False), nn.BatchNorm2d(out), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(96, 10)).to(memory_format=torch.channels_last)


def optimizer_for(name: str, model: nn.Module) -> torch.optim.Optimizer:
    if name == "sgd":
        return torch.optim.SGD(model.parameters(), 0.05, momentum=0.9, weight_decay=5e-4)
    if name == "adam":
        return torch.optim.Adam(model.parameters(), 1e-3)
    raise ValueError(f"{name!r} is neither 'sgd' nor 'adam'")


@dataclass(frozen=True, slots=True, eq=False)
class Data:
    """Normalised images and labels."""

    images: Tensor
    labels: Tensor
    test_images: Tensor
    test_labels: Tensor

    @classmethod
    def read(cls, root: Path) -> Data:
        images, labels = cifar10.read(root, FILES)
        test = [part[:TEST_IMAGES] for part in cifar10.read(root, cifar10.TEST_FILES)]
        return cls(images, labels, *test)

    def batches(self, seed: int, first: int, last: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Those of steps ``first`` to ``last``, each drawn by a generator of its own: the same for every run of a seed."""
        for step in range(first, last):
            generator = torch.Generator().manual_seed(100_003 * seed + step)
            index = torch.randint(0, len(self.images), (BATCH,), generator=generator)
            yield cifar10.augment(self.images[index], generator).contiguous(memory_format=torch.channels_last), self.labels[index]

    def accuracy(self, model: nn.Module) -> float:
        """Top-1 on the test images, percent."""
        training = model.training
        model.eval()
        with torch.inference_mode():
            parts = zip(self.test_images.split(500), self.test_labels.split(500), strict=True)
            hits = sum(int((model(x.contiguous(memory_format=torch.channels_last)).argmax(1) == y).sum()) for x, y in parts)
        model.train(training)
        return 100 * hits / len(self.test_labels)


def train(model: nn.Module, optimizer: Any, batches: Iterator[tuple[Tensor, Tensor]]) -> list[float]:
    """One step a batch; the loss of each, before its step."""
    model.train()
    losses = []
    for x, y in batches:
        loss = functional.cross_entropy(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def branch(model: nn.Module, optimizer: torch.optim.Optimizer, name: str) -> tuple[nn.Module, torch.optim.Optimizer]:
    """A copy of both to go on with."""
    twin = copy.deepcopy(model)
    other = optimizer_for(name, twin)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    return twin, other
