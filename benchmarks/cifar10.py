"""CIFAR-10 (Krizhevsky 2009) for the benchmarks: the official files as tensors, and the usual augmentation."""

from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

FOLDER = "cifar-10-batches-py"
MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)
TRAIN_FILES = tuple(f"data_batch_{k}" for k in range(1, 6))
TEST_FILES = ("test_batch",)


def read(root: Path, files: tuple[str, ...]) -> tuple[Tensor, Tensor]:
    """The named files of ``root/cifar-10-batches-py``: normalised images (N, 3, 32, 32) float32 and labels (N,) int64."""
    pixels, labels = read_pixels(root, files)
    return normalise(pixels), labels


def read_pixels(root: Path, files: tuple[str, ...]) -> tuple[Tensor, Tensor]:
    """Likewise, images as they are in the files: uint8 (N, 3, 32, 32)."""
    images, labels = [], []
    for name in files:
        with (root / FOLDER / name).open("rb") as file:
            batch = pickle.load(file, encoding="bytes")  # the data set's own format: only read files you trust
        images.append(np.asarray(batch[b"data"]).reshape(-1, 3, 32, 32))
        labels.extend(batch[b"labels"])
    return torch.from_numpy(np.concatenate(images)), torch.tensor(labels)


def normalise(images: Tensor) -> Tensor:
    """uint8 images (N, 3, H, W) to the float32 inputs that the networks were trained on."""
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (MEAN, STD))
    return (images.float() / 255 - mean) / std


def augment(images: Tensor, generator: torch.Generator) -> Tensor:
    """Each image flipped with probability one half and cropped at random from itself padded by four zeros a side."""
    count, channels, height, width = images.shape
    flip = torch.rand(count, generator=generator) < 0.5
    images = torch.where(flip.view(-1, 1, 1, 1), images.flip(3), images)
    padded = functional.pad(images, (4, 4, 4, 4))
    top, left = (torch.randint(0, 9, (count, 1), generator=generator) for _ in range(2))
    rows = (top + torch.arange(height)).view(count, 1, height, 1)
    columns = (left + torch.arange(width)).view(count, 1, 1, width)
    index = torch.arange(count).view(-1, 1, 1, 1), torch.arange(channels).view(1, -1, 1, 1)
    return padded[index[0], index[1], rows, columns]
