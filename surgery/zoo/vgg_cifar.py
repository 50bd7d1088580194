"""VGG19 in its CIFAR form (Simonyan and Zisserman 2015, configuration E, for 32 x 32 images).

Sixteen 3x3 convolutions with batch norm, four max-pools between their groups, a global average, and one linear layer in place of three:
the form of Liu et al. 2017, "Network Slimming", which Elhoushi et al. 2019 trained.
"""

from __future__ import annotations

from math import sqrt

import torch
from torch import Tensor, nn

from passes.errors import SurgeryValueError

__all__ = ["CifarVGG", "vgg19", "vgg19_quarter"]

GROUPS = ((64, 2), (128, 2), (256, 4), (512, 4), (512, 4))  # channels, convolutions


class CifarVGG(nn.Module):
    """VGG19 for CIFAR: images (N, 3, 32, 32) -> logits (N, num_classes).

    Args:
        num_classes: length of the output.
        width: every layer has this share of the usual channels, rounded, at least 1.

    Raises:
        SurgeryValueError: a width that is not above 0.
    """

    def __init__(self, num_classes: int = 10, width: float = 1.0) -> None:
        super().__init__()
        if not width > 0:
            raise SurgeryValueError(f"width: expected a number above 0, got {width}")
        layers: list[nn.Module] = []
        channels = 3
        for number, (wide, convolutions) in enumerate(GROUPS):
            layers += [nn.MaxPool2d(2)] if number else []
            for _ in range(convolutions):
                out = max(round(wide * width), 1)
                layers += [nn.Conv2d(channels, out, 3, padding=1, bias=False), nn.BatchNorm2d(out), nn.ReLU()]
                channels = out
        self.features = nn.Sequential(*layers)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Linear(channels, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, std=sqrt(2 / (9 * module.out_channels)))
            elif isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=0.01)
                nn.init.zeros_(module.bias)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.classifier(torch.flatten(self.pool(self.features(x)), 1))
        return logits


def vgg19(num_classes: int = 10, width: float = 1.0) -> CifarVGG:
    """VGG19 for 32 x 32 images, 20 M parameters at full width."""
    return CifarVGG(num_classes, width)


def vgg19_quarter(num_classes: int = 10) -> CifarVGG:
    """VGG19 with a quarter of the channels, 1.3 M parameters."""
    return CifarVGG(num_classes, 0.25)
