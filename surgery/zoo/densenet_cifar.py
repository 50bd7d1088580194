"""DenseNets in their CIFAR form (Huang et al. 2017, section 4, "basic" DenseNet): no bottlenecks, no compression.

Three blocks on 32, 16 and 8 pixels; every layer sees the outputs of all before it in its block and adds ``growth`` channels. Between blocks
a 1x1 convolution and an average over 2 x 2 pixels. Elhoushi et al. 2019 trained the one of 40 layers with growth 12.
"""

from __future__ import annotations

from math import sqrt

import torch
from torch import Tensor, nn
from torch.nn import functional

from passes.errors import SurgeryValueError

__all__ = ["CifarDenseNet", "densenet40"]

BLOCKS = 3


class DenseLayer(nn.Module):
    """Batch norm, ReLU, 3x3 convolution, and the input before the result: (N, C, H, W) -> (N, C + growth, H, W)."""

    def __init__(self, in_channels: int, growth: int) -> None:
        super().__init__()
        self.bn = nn.BatchNorm2d(in_channels)
        self.conv = nn.Conv2d(in_channels, growth, 3, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x, self.conv(functional.relu(self.bn(x)))], 1)


class Transition(nn.Module):
    """Batch norm, ReLU, 1x1 convolution, and the average over 2 x 2 pixels: (N, C, H, W) -> (N, C, H / 2, W / 2)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.bn = nn.BatchNorm2d(channels)
        self.conv = nn.Conv2d(channels, channels, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return functional.avg_pool2d(self.conv(functional.relu(self.bn(x))), 2)


class CifarDenseNet(nn.Module):
    """A CIFAR DenseNet: images (N, 3, 32, 32) -> logits (N, num_classes).

    Args:
        depth: weighted layers, ``3 n + 4``.
        growth: channels that a layer adds.
        num_classes: length of the output.

    Raises:
        SurgeryValueError: no such depth, or a growth below 1.
    """

    def __init__(self, depth: int, growth: int, num_classes: int = 10) -> None:
        super().__init__()
        layers, rest = divmod(depth - BLOCKS - 1, BLOCKS)
        if rest or layers < 1 or growth < 1:
            raise SurgeryValueError(f"depth and growth: expected 3 n + 4 with n at least 1, and at least 1; got {depth} and {growth}")
        channels = 2 * growth
        self.conv1 = nn.Conv2d(3, channels, 3, padding=1, bias=False)
        blocks: list[nn.Module] = []
        for number in range(BLOCKS):
            blocks += [Transition(channels)] if number else []
            blocks.append(nn.Sequential(*(DenseLayer(channels + k * growth, growth) for k in range(layers))))
            channels += layers * growth
        self.blocks = nn.Sequential(*blocks)
        self.bn = nn.BatchNorm2d(channels)
        self.linear = nn.Linear(channels, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, std=sqrt(2 / (module.kernel_size[0] * module.kernel_size[1] * module.out_channels)))
        nn.init.zeros_(self.linear.bias)

    def forward(self, x: Tensor) -> Tensor:
        x = functional.relu(self.bn(self.blocks(self.conv1(x))))
        logits: Tensor = self.linear(torch.flatten(functional.adaptive_avg_pool2d(x, 1), 1))
        return logits


def densenet40(num_classes: int = 10) -> CifarDenseNet:
    """DenseNet of 40 layers and growth 12 for 32 x 32 images, 1.06 M parameters."""
    return CifarDenseNet(40, 12, num_classes)
