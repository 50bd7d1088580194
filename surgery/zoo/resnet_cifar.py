"""Residual networks in their CIFAR form (He et al. 2016, section 4.2).

Three stages of 16, 32 and 64 channels on 32 x 32 images, ``6 n + 2`` weighted layers, and option-A shortcuts:
where a stage begins, the identity is subsampled by two and padded with zero channels, so shortcuts have no parameters.
Attribute names follow the convention under which trained weights of these networks are commonly shared.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

__all__ = ["CifarResNet", "resnet20", "resnet56"]


class BasicBlock(nn.Module):
    """Two 3x3 convolutions with batch norm and an option-A shortcut: (N, C_in, H, W) -> (N, C_out, H / stride, W / stride)."""

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.stride = stride
        self.new_channels = out_channels - in_channels

    def shortcut(self, x: Tensor) -> Tensor:
        if self.stride == 1 and self.new_channels == 0:
            return x
        before = self.new_channels // 2
        padding = (0, 0, 0, 0, before, self.new_channels - before)
        return functional.pad(x[:, :, :: self.stride, :: self.stride], padding)

    def forward(self, x: Tensor) -> Tensor:
        out = functional.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        return functional.relu(out + self.shortcut(x))


class CifarResNet(nn.Module):
    """A CIFAR residual network: images (N, 3, 32, 32) -> logits (N, num_classes).

    Args:
        blocks_per_stage: ``n`` of the paper; the network has ``6 n + 2`` weighted layers (3 for ResNet-20, 9 for ResNet-56).
        num_classes: length of the output.
    """

    def __init__(self, blocks_per_stage: int, num_classes: int = 10) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.layer1 = self._stage(16, 16, blocks_per_stage, stride=1)
        self.layer2 = self._stage(16, 32, blocks_per_stage, stride=2)
        self.layer3 = self._stage(32, 64, blocks_per_stage, stride=2)
        self.linear = nn.Linear(64, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                nn.init.kaiming_normal_(module.weight)

    @staticmethod
    def _stage(in_channels: int, out_channels: int, blocks: int, stride: int) -> nn.Sequential:
        first = BasicBlock(in_channels, out_channels, stride)
        return nn.Sequential(first, *(BasicBlock(out_channels, out_channels, 1) for _ in range(blocks - 1)))

    def forward(self, x: Tensor) -> Tensor:
        out = functional.relu(self.bn1(self.conv1(x)))
        out = self.layer3(self.layer2(self.layer1(out)))
        out = torch.flatten(functional.adaptive_avg_pool2d(out, 1), 1)
        logits: Tensor = self.linear(out)
        return logits


def resnet20(num_classes: int = 10) -> CifarResNet:
    """ResNet-20 for 32 x 32 images, 0.27 M parameters."""
    return CifarResNet(3, num_classes)


def resnet56(num_classes: int = 10) -> CifarResNet:
    """ResNet-56 for 32 x 32 images, 0.85 M parameters."""
    return CifarResNet(9, num_classes)
