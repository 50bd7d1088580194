"""Weights with a stated spectrum, for timing networks whose trained weights are not at hand.

Fresh random weights are noise, in which EVBMF finds nothing; trained ones have a decaying spectrum with noise under it. Each convolution gets

    W = U (G scaled by i^-decay j^-decay) V^T + noise N,

with random orthogonal U and V of the output and input channels, standard normal G and N, the first term scaled to unit mean square, and the whole
scaled to the mean square 2 / (C_in pixels) of a fresh layer.
"""

from __future__ import annotations

import torch
from torch import nn

DECAY = 0.75
NOISE = 0.3


def fill(model: nn.Module, *, decay: float = DECAY, noise: float = NOISE, seed: int = 0) -> nn.Module:
    """Fill every ungrouped convolution of a model in place, in the model's order, from one generator of this seed; return the model."""
    generator = torch.Generator().manual_seed(seed)
    for layer in model.modules():
        if isinstance(layer, nn.Conv1d | nn.Conv2d | nn.Conv3d) and layer.groups == 1:
            with torch.no_grad():
                layer.weight.copy_(_weight(layer.weight.shape, decay, noise, generator))
    return model


def _weight(shape: torch.Size, decay: float, noise: float, generator: torch.Generator) -> torch.Tensor:
    out, into = shape[:2]
    pixels = shape[2:].numel()
    core = torch.randn(out, into, pixels, generator=generator)
    core *= (torch.arange(1, out + 1) ** -decay).view(-1, 1, 1) * (torch.arange(1, into + 1) ** -decay).view(1, -1, 1)
    left, right = (torch.linalg.qr(torch.randn(n, n, generator=generator))[0] for n in (out, into))
    weight = torch.einsum("or,rsp,is->oip", left, core, right)
    weight /= weight.square().mean().sqrt()
    weight += noise * torch.randn(weight.shape, generator=generator)
    weight *= (2 / (into * pixels)) ** 0.5 / weight.square().mean().sqrt()
    return weight.view(shape)
