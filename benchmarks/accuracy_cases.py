"""The trained networks of ``accuracy.py``: their calibration examples, and what is measured of them."""

from __future__ import annotations

import statistics
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cifar10
import numpy as np
import torch
from surgery_speed import Vdsr
from torch import Tensor, nn
from torch.nn import functional
from train_resnet20 import accuracy

from surgery.zoo import load_weights, make

IMAGES, DRAWS, BATCH = 1024, 3, 128
CHOICES = 2000  # other training images, to choose on
SCALE = 3
PATCH, PATCHES, PATCH_BATCH = 96, 48, 8
PHOTOGRAPHS = ("astronaut", "chelsea", "coffee", "rocket", "stereo_motorcycle")


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """A trained network: its calibration batches for each draw, an example input, and what is measured (higher is better)."""

    name: str
    model: nn.Module
    inputs: Tensor
    draws: tuple[list[Tensor], ...]
    measure: Callable[[nn.Module], float]
    unit: str
    facts: dict[str, Any]


class Residual(nn.Module):
    """VDSR as it is run: what its layers predict is added to its input (Kim et al. 2016)."""

    def __init__(self, body: Vdsr) -> None:
        super().__init__()
        self.body = body

    def forward(self, x: Tensor) -> Tensor:
        y = functional.relu(self.body.input(x))
        for block in self.body.residual_layer:
            y = functional.relu(block.conv(y))  # type: ignore[operator]
        out: Tensor = x + self.body.output(y)
        return out


def cifar_case(name: str, data: Path, cifar: Path, choosing: bool) -> Case:
    """A ResNet on CIFAR-10, measured on all test images, or (``choosing``) on training images that no draw has."""
    model, shape = make(f"surgery:{name}")
    load_weights(model, next((data / "weights").glob(f"{name}-*.th")))
    train, labels = cifar10.read(cifar, ("data_batch_1",))
    order = torch.randperm(len(train), generator=torch.Generator().manual_seed(0))
    draws = tuple(list(train[order[IMAGES * k : IMAGES * (k + 1)]].split(BATCH)) for k in range(DRAWS))
    if choosing:
        rest = order[IMAGES * DRAWS :][:CHOICES]
        images, labels = train[rest], labels[rest]
    else:
        images, labels = cifar10.read(cifar, cifar10.TEST_FILES)
    return Case(
        name=name,
        model=model.eval(),
        inputs=torch.zeros(shape),
        draws=draws,
        measure=lambda net: accuracy(net, images, labels),
        unit="% top-1",
        facts={"calibration_examples": IMAGES, "measured_examples": len(images)},
    )


def vdsr_case(data: Path, choosing: bool) -> Case | None:
    """VDSR, measured on Set5, or (``choosing``) on patches of the photographs that no draw has; None without scikit-image."""
    given = list(_photographs())
    if not given:
        return None
    body = Vdsr()
    load_weights(body, data / "vdsr" / "vdsr_state_dict.pt")
    patches = torch.cat([_patches(photograph) for photograph in given])  # (N, 2, PATCH, PATCH): blurred, sharp
    order = torch.randperm(len(patches), generator=torch.Generator().manual_seed(0))
    size = min(PATCHES, (len(patches) - PATCH_BATCH) // DRAWS)
    draws = tuple(list(patches[order[size * k : size * (k + 1)], :1].split(PATCH_BATCH)) for k in range(DRAWS))
    if choosing:
        pairs = [(patch[None, :1], patch[1]) for patch in patches[order[size * DRAWS :][:16]]]
    else:
        pairs = [_luma_pair(path) for path in sorted((data / "vdsr" / "Set5").glob("*_GT.bmp"))]
    return Case(
        name="vdsr",
        model=Residual(body).eval(),
        inputs=torch.zeros(1, 1, PATCH, PATCH),
        draws=draws,
        measure=lambda net: psnr(net, pairs),
        unit="dB on Set5 x3",
        facts={"calibration_examples": size, "patch": PATCH, "measured_examples": len(pairs)},
    )


def _photographs() -> Iterator[np.ndarray[Any, Any]]:
    """Colour photographs (H, W, 3) uint8 that scikit-image has with it."""
    try:
        from skimage import data as photographs
    except ImportError:
        return
    for name in PHOTOGRAPHS:
        try:
            found = getattr(photographs, name)()
        except (ImportError, OSError) as error:  # scikit-image fetches some of them, where there are pooch and a network
            print(f"{name} is left out: {error}", file=sys.stderr)
            continue
        yield (found[0] if isinstance(found, tuple) else found)[..., :3]


def _luma(picture: np.ndarray[Any, Any]) -> Tensor:
    """Y of BT.601 in [0, 1], as MATLAB's rgb2ycbcr has it."""
    weights = np.array([65.481, 128.553, 24.966]) / 255
    return torch.from_numpy((picture.astype(np.float64) @ weights + 16) / 255).float()


def _patches(photograph: np.ndarray[Any, Any]) -> Tensor:
    """(N, 2, PATCH, PATCH): the luma scaled down and up again by bicubic interpolation, and as it was, in pieces."""
    luma = _luma(photograph)
    height, width = (n // PATCH * PATCH for n in luma.shape)
    whole = luma[:height, :width][None, None]
    small = functional.interpolate(whole, scale_factor=1 / SCALE, mode="bicubic", antialias=True)
    blurred = functional.interpolate(small, size=(height, width), mode="bicubic")
    both = torch.cat([blurred, whole], 1)[0]
    return both.unfold(1, PATCH, PATCH).unfold(2, PATCH, PATCH).flatten(1, 2).transpose(0, 1).contiguous()


def _luma_pair(path: Path) -> tuple[Tensor, Tensor]:
    from PIL import Image

    wanted = _luma(np.asarray(Image.open(path).convert("RGB")))
    given = _luma(np.asarray(Image.open(path.with_name(f"{path.stem}_scale_{SCALE}.bmp")).convert("RGB")))
    return given[None, None], wanted[: given.shape[0], : given.shape[1]]  # cut to a multiple of the scale


def psnr(net: nn.Module, pairs: list[tuple[Tensor, Tensor]]) -> float:
    """Mean over the pictures, on the luma, without a border of SCALE pixels."""
    values = []
    for given, wanted in pairs:
        with torch.inference_mode():
            got = net(given)[0, 0].clamp(0, 1)
        gap = (got - wanted)[SCALE:-SCALE, SCALE:-SCALE].double()
        values.append(-10 * float(torch.log10(gap.square().mean())))
    return statistics.fmean(values)
