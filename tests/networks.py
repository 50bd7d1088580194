"""Small networks for the tests, each with something that breaks careless surgery."""

from __future__ import annotations

import random

import numpy
import torch
from torch import Tensor, nn
from torch.nn import functional


class Small(nn.Module):
    """Six layers of all sorts: conv1 plain, conv2 strided with bias, mix 1x1, wide depthwise, conv3 in a Sequential, head linear."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.conv2 = nn.Conv2d(16, 24, 3, stride=2, padding=1)
        self.mix = nn.Conv2d(24, 32, 1)
        self.wide = nn.Conv2d(32, 32, 3, padding=1, groups=32)
        self.tail = nn.Sequential(nn.ReLU(), nn.Conv2d(32, 32, 3, padding=1, bias=False), nn.BatchNorm2d(32), nn.ReLU())
        self.head = nn.Linear(32, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = functional.relu(self.bn1(self.conv1(x)))
        x = self.mix(functional.relu(self.conv2(x)))
        x = x + self.tail(self.wide(x))
        return self.head(x.mean((2, 3)))


class Kinds(nn.Module):
    """Layers that decompose by groups or backwards: grouped, transposed, both, one and three dimensions, dilated, padded in every way."""

    def __init__(self) -> None:
        super().__init__()
        self.plain = nn.Conv2d(3, 8, 3, padding=1, padding_mode="reflect")
        self.grouped = nn.Conv2d(8, 12, (3, 5), stride=(1, 2), padding=(1, 2), groups=2, bias=False)
        self.up = nn.ConvTranspose2d(12, 8, 4, stride=2, padding=1)
        self.both = nn.ConvTranspose2d(8, 8, 3, stride=2, padding=1, output_padding=1, groups=4)
        self.mix = nn.Conv2d(8, 6, 1, groups=2)
        self.line = nn.Conv1d(6, 10, 3, padding="same", dilation=2, padding_mode="circular")
        self.space = nn.Conv3d(2, 4, 3, padding=1, padding_mode="replicate")

    def forward(self, x: Tensor) -> Tensor:
        x = functional.relu(self.grouped(self.plain(x)))
        x = self.mix(functional.relu(self.both(self.up(x))))
        y = self.line(functional.adaptive_avg_pool2d(x, (4, 5)).flatten(2))
        z = self.space(y.reshape(y.shape[0], 2, 5, 4, 5))
        return z.mean((2, 3)) + x.mean()


class Twice(nn.Module):
    """One convolution called twice at different resolutions, and found under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(8, 8, 3, padding=1)
        self.again = self.conv
        self.other = nn.Conv2d(8, 8, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        return self.other(self.again(functional.avg_pool2d(x, 2)))


class Branching(nn.Module):
    """Control flow on data: cannot be traced symbolically."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x) if x.sum() > 0 else -self.conv(x)


class Mistraced(nn.Module):
    """Traces without an error, to a graph that computes something else."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        return y + x if isinstance(y, Tensor) else y  # a proxy is no tensor: the shortcut gets lost


class ReadsAttributes(nn.Module):
    """A parent that reads attributes and the weight of its convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 8, 5, stride=2, padding=2)

    def forward(self, x: Tensor) -> Tensor:
        size = self.conv.kernel_size[0] * self.conv.stride[0]
        return self.conv(x.to(self.conv.weight.dtype)) * size + self.conv.out_channels + self.conv.weight.sum()


class Random(nn.Module):
    """Draws from all generators, in eval mode too, and fails after that if it is told so."""

    def __init__(self, fails: bool = False) -> None:
        super().__init__()
        self.conv, self.norm, self.fails = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), fails

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.conv(x))
        y = y + torch.randn_like(y) + torch.rand(4, 1, 1) * numpy.random.rand() + random.random()
        if self.fails:
            raise RuntimeError("no")
        return y


def random_states() -> tuple[object, ...]:
    """Those of torch, Python and numpy, to be compared."""
    kind, keys, *rest = numpy.random.get_state()
    return torch.get_rng_state().tolist(), random.getstate(), kind, keys.tolist(), rest


class ByHand(nn.Module):
    """A chain that somebody wrote by hand, with a batch norm behind it."""

    def __init__(self) -> None:
        super().__init__()
        self.squeeze, self.core, self.expand = nn.Conv2d(3, 6, 1, bias=False), nn.Conv2d(6, 6, 3, padding=1, bias=False), nn.Conv2d(6, 12, 1)
        self.norm = nn.BatchNorm2d(12)

    def forward(self, x: Tensor) -> Tensor:
        return functional.relu(self.norm(self.expand(self.core(self.squeeze(x)))))


class Keyword(nn.Module):
    """Inputs by keyword, a dict as output."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(4, 6, 3, padding="same", padding_mode="reflect")

    def forward(self, sound: Tensor, gain: Tensor) -> dict[str, Tensor]:
        y = self.conv(sound)
        return {"sound": y * gain, "total": y.sum()}


def low_rank_conv(generator: torch.Generator, rank_out: int, rank_in: int, noise: float = 0.0) -> nn.Conv2d:
    """A 3x3 convolution of 24 to 32 channels whose weight has the given multilinear rank, plus noise."""
    conv = nn.Conv2d(24, 32, 3, padding=1)
    core = torch.randn(rank_out, rank_in, 3, 3, generator=generator)
    out, into = torch.randn(32, rank_out, generator=generator), torch.randn(24, rank_in, generator=generator)
    weight = torch.einsum("ar,bs,rshw->abhw", out, into, core)
    weight = weight / weight.std() + noise * torch.randn(32, 24, 3, 3, generator=generator)
    with torch.no_grad():
        conv.weight.copy_(weight)
    return conv


class Refused(nn.Module):
    """Exports only by tracing: what it calls has no meaning to torch.export."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        return y + float(torch.tensor([len(repr(type(y)))]).numpy()[0] > 1e6)
