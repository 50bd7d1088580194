"""Layers whose weight is computed (parametrized, weight-normed, standardised): the plain layer that they amount to, where that is proved.

Nothing is known of how a layer computes its weight: it is run, and the one convolution or matrix product that it makes is looked at.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import prune
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm
from torch.overrides import TorchFunctionMode

from passes.chain import HOOKS, plain_layer
from passes.errors import ParityError
from passes.geometry import Geometry, Piece
from passes.parity import assert_parity
from passes.running import private_copy, quiet_run

__all__ = ["effective_layer"]

PRODUCTS: tuple[Callable[..., Any], ...] = (
    torch.conv1d,
    torch.conv2d,
    torch.conv3d,
    torch.conv_transpose1d,
    torch.conv_transpose2d,
    torch.conv_transpose3d,
    nn.functional.linear,
)
COMPUTING_HOOKS = (WeightNorm, SpectralNorm, prune.BasePruningMethod)  # torch's hooks that set a weight before each call
PROBES = 2  # inputs of different sizes and numbers: a weight or a padding that depends on them is found out


def effective_layer(layer: nn.Module) -> nn.Module | str:
    """A plain layer (``nn.Conv2d``, ``nn.Linear``, ...) that computes in eval mode what ``layer`` does, or why there is none.

    Its weight is a new parameter with the numbers that ``layer`` computes now; the bias is the layer's own parameter, where it is one. Training
    mode and hooks are those of ``layer``, without the hooks that computed the weight. The layer itself is not touched: a copy of it is run, on
    random inputs of its own generator.
    """
    tensors = [t for t in (*layer.parameters(), *layer.buffers()) if t.is_floating_point()]
    if not tensors or any(t.is_meta for t in tensors):
        return "its weight is computed, and there are no numbers yet"
    if any(not isinstance(hook, COMPUTING_HOOKS) for hook in layer._forward_pre_hooks.values()):
        return "its weight is computed, and it has hooks that may take part in that"
    try:
        plain = _observed(layer, Geometry.of(layer), tensors[0])
    except ParityError:
        return f"its weight is computed, and {type(layer).__name__} does more than to convolve or multiply with it"
    except Exception as error:  # the layer's own code runs here: it may raise anything
        return f"its weight is computed, and {type(layer).__name__} cannot be run on its own ({type(error).__name__})"
    if plain is None:
        return f"its weight is computed, and {type(layer).__name__} does not simply convolve or multiply with it"
    for name in HOOKS:
        if name not in ("_forward_pre_hooks", "_forward_pre_hooks_with_kwargs"):
            plain.__dict__[name] = getattr(layer, name)
    return plain.train(layer.training)


def _observed(layer: nn.Module, geometry: Geometry, like: Tensor) -> nn.Module | None:
    """The plain layer without hooks, or None where the layer makes no single product with a weight of its shape."""
    twin = private_copy(layer).eval()
    for name in HOOKS:
        if name not in ("_forward_pre_hooks", "_forward_pre_hooks_with_kwargs"):
            twin.__dict__[name] = getattr(nn.Module(), name)
    generator = torch.Generator().manual_seed(0)
    plain: nn.Module | None = None
    with quiet_run():
        for number in range(PROBES):
            probe = torch.randn(_probe_shape(geometry, number), generator=generator).to(like.device, like.dtype)
            with _Products() as seen:
                expected = twin(probe.clone())
            if len(seen.calls) != 1 or tuple(seen.calls[0][0].shape) != geometry.weight_shape:
                return None
            if plain is None:
                weight, bias = seen.calls[0]
                own = bias is not None and layer._parameters.get("bias") is not None
                plain = plain_layer(Piece("", geometry, weight, bias), layer._parameters["bias"] if own else bias).eval()
                plain._parameters["weight"].requires_grad_(any(p.requires_grad for p in layer.parameters()))  # type: ignore[union-attr]
            assert_parity(plain(probe), expected)
    return plain


def _probe_shape(geometry: Geometry, number: int) -> tuple[int, ...]:
    size = [2 * d * (k - 1) + 3 + 2 * s + number for k, d, s in zip(geometry.kernel, geometry.dilation, geometry.stride, strict=True)]
    return (2, geometry.in_channels, *size)


class _Products(TorchFunctionMode):
    """Notes the weight and bias of each convolution and matrix product of a layer."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Tensor, Tensor | None]] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in PRODUCTS:
            given = dict(zip(("input", "weight", "bias"), args, strict=False)) | (kwargs or {})
            bias = given.get("bias")
            self.calls.append((given["weight"].detach().clone(), None if bias is None else bias.detach().clone()))
        return func(*args, **(kwargs or {}))
