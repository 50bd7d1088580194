"""Networks to time: those of the registries by name, and two that no registry has."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from surgery.zoo import make
from surgery.zoo.torchvision_ops import import_torchvision

__all__ = ["NETWORKS", "UNet", "detector_backbone", "network"]


def network(name: str) -> tuple[nn.Module, tuple[int, ...]]:
    """A network in eval mode with fresh weights, and the shape of its input.

    Args:
        name: a key of ``NETWORKS``, or any name that ``surgery.zoo.make`` takes.
    """
    factory = NETWORKS.get(name)
    model, shape = factory() if factory else make(name)
    return model.eval(), shape


class UNet(nn.Module):
    """The U-Net of Ronneberger et al. (2015), figure 1, padded so that maps keep their size, with batch norms.

    Args:
        classes: channels of the output.
        width: channels at the full resolution; each of the ``depth`` halvings doubles them.
        depth: halvings of the resolution; height and width must be multiples of 2 ** depth.
    """

    def __init__(self, classes: int = 2, width: int = 32, depth: int = 4) -> None:
        super().__init__()
        widths = [width * 2**level for level in range(depth + 1)]
        self.down = nn.ModuleList(_double(before, after) for before, after in zip([3, *widths], widths, strict=False))
        self.up = nn.ModuleList(nn.ConvTranspose2d(wide, wide // 2, 2, stride=2) for wide in reversed(widths[1:]))
        self.join = nn.ModuleList(_double(wide, wide // 2) for wide in reversed(widths[1:]))
        self.head = nn.Conv2d(width, classes, 1)

    def forward(self, x: Tensor) -> Tensor:
        """(N, 3, H, W) -> (N, classes, H, W)."""
        kept = []
        for step in self.down:
            x = step(x)
            kept.append(x)
            x = nn.functional.max_pool2d(x, 2) if len(kept) < len(self.down) else x
        kept.pop()
        for enlarge, join in zip(self.up, self.join, strict=True):
            x = join(torch.cat([kept.pop(), enlarge(x)], dim=1))
        return self.head(x)


def _double(before: int, after: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for channels in (before, after):
        layers += [nn.Conv2d(channels, after, 3, padding=1, bias=False), nn.BatchNorm2d(after), nn.ReLU(inplace=True)]
    return nn.Sequential(*layers)


def detector_backbone() -> nn.Module:
    """What Faster R-CNN looks at pictures with: ResNet-50 with a feature pyramid, as torchvision builds it."""
    import_torchvision()
    from torchvision.models.detection import fasterrcnn_resnet50_fpn

    backbone: nn.Module = fasterrcnn_resnet50_fpn(weights=None, weights_backbone=None).backbone
    return backbone


NETWORKS: dict[str, Callable[[], tuple[nn.Module, tuple[int, ...]]]] = {
    "resnet18": lambda: make("torchvision:resnet18"),
    "resnet50": lambda: make("torchvision:resnet50"),
    "vgg16": lambda: make("torchvision:vgg16"),
    "densenet121": lambda: make("torchvision:densenet121"),
    "r3d_18": lambda: make("torchvision:r3d_18"),
    "unet": lambda: (UNet(), (1, 3, 256, 256)),
    "fasterrcnn_backbone": lambda: (detector_backbone(), (1, 3, 320, 320)),
}
