"""Layers whose weight is computed (parametrized, weight-normed, standardised): the plain layer that they amount to, where that is proved.

Nothing is known of how a layer computes its weight: it is run, and the one convolution or matrix product that it makes is looked at.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import prune
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm
from torch.overrides import TorchFunctionMode

from passes.chain import BUILT, HOOKS, plain_layer
from passes.errors import ParityError
from passes.geometry import Geometry, Piece
from passes.parity import assert_parity
from passes.running import evaluating_copy, quiet_run

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
PLAIN_FORWARDS = {layer.forward for layer in BUILT}
COMPUTING_HOOKS = (WeightNorm, SpectralNorm, prune.BasePruningMethod)  # torch's hooks that set a weight before each call
LARGE = 1e6  # how large the numbers of one probe are, at most: bounds on what goes in or comes out are found out


def effective_layer(layer: nn.Module) -> nn.Module | str:
    """A plain layer (``nn.Conv2d``, ``nn.Linear``, ...) that computes in eval mode what ``layer`` does, or why there is none.

    Its weight is a new parameter with the numbers that ``layer`` computes now; the bias is the layer's own parameter, where it is one. Training
    mode and hooks are those of ``layer``, without the hooks that computed the weight. The layer itself is not touched: a copy of it is run, on
    random inputs of its own generator, of all sizes over one period of the strides, of different numbers of dimensions and of large numbers. What
    it multiplies must be its very input, or that input always padded alike; callers must not be able to give it, or get from it, anything that
    a plain layer does not take or give.
    """
    tensors = [t for t in (*layer.parameters(), *layer.buffers()) if t.is_floating_point()]
    if not tensors or any(t.is_meta for t in tensors):
        return "its weight is computed, and there are no numbers yet"
    if any(not isinstance(hook, COMPUTING_HOOKS) for hook in layer._forward_pre_hooks.values()):
        return "its weight is computed, and it has hooks that may take part in that"
    more = _takes_more(layer)
    if more is not None:
        return f"its weight is computed, and {type(layer).__name__}.forward takes more than its input ({more})"
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


def _takes_more(layer: nn.Module) -> str | None:
    """What a forward of the layer's own takes beside its input, None where it is nothing."""
    own: Any = layer.forward
    if getattr(own, "__func__", None) in PLAIN_FORWARDS:
        return None
    parameters = list(inspect.signature(own).parameters.values())
    several = [p for p in parameters if p.kind in (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)]
    return ", ".join(str(p) for p in parameters[1:] or several) or None


def _observed(layer: nn.Module, geometry: Geometry, like: Tensor) -> nn.Module | None:
    """The plain layer without hooks, or None where the layer makes no single product of its input with a weight of its shape."""
    twin = evaluating_copy(layer)
    for name in HOOKS:
        if name not in ("_forward_pre_hooks", "_forward_pre_hooks_with_kwargs"):
            twin.__dict__[name] = getattr(nn.Module(), name)
    generator = torch.Generator().manual_seed(0)
    plain: nn.Module | None = None
    padded: set[Any] = set()
    with quiet_run():
        for shape, scale, needed in _probes(geometry, like.dtype):
            probe = (scale * torch.randn(shape, generator=generator, device="cpu", dtype=torch.float64)).to(like.device, like.dtype)
            given = probe.clone()
            seen = _Products(given)
            try:
                with seen:
                    expected = twin(given)
            except Exception:  # the layer's own code runs here: it may raise anything
                if needed:
                    raise
                if all(call.on_input for call in seen.calls):
                    continue  # it takes less than a plain layer does
                return None
            if len(seen.calls) != 1 or not isinstance(expected, Tensor) or not torch.equal(given, probe):
                return None
            call = seen.calls[0]
            padded.add(call.padded)
            if tuple(call.weight.shape) != geometry.weight_shape or not call.on_input or len(padded) > 1:
                return None
            if plain is None:
                own = call.bias is not None and layer._parameters.get("bias") is not None
                plain = plain_layer(Piece("", geometry, call.weight, call.bias), layer._parameters["bias"] if own else call.bias).eval()
                plain._parameters["weight"].requires_grad_(any(p.requires_grad for p in layer.parameters()))  # type: ignore[union-attr]
            got = plain(probe)
            if got.dtype != expected.dtype:
                return None
            assert_parity(got, expected)
        return None if _takes_other_dtypes(twin, probe) else plain


def _probes(geometry: Geometry, dtype: torch.dtype) -> Iterator[tuple[tuple[int, ...], float, bool]]:
    """Shapes and sizes of inputs, and whether the layer must take them: a plain one takes them all."""
    channels = geometry.in_channels
    large = min(LARGE, torch.finfo(dtype).max ** 0.5)
    if geometry.is_linear:
        yield (2, channels), 1.0, True
        yield (3, channels), large, True
        yield from (((*lead, channels), 1.0, False) for lead in ((), (2, 3), (3, 2, 4)))
        return
    for number in range(max(2, *geometry.stride)):
        size = [2 * d * (k - 1) + 3 + 2 * s + number for k, d, s in zip(geometry.kernel, geometry.dilation, geometry.stride, strict=True)]
        yield (2 + number % 2, channels, *size), 1.0, True
    yield (1, channels, *size), large, True
    yield (channels, *size), 1.0, False


def _takes_other_dtypes(twin: nn.Module, probe: Tensor) -> bool:
    """Whether the layer also takes inputs that are not of its weight's dtype, as a plain one does not."""
    try:
        twin(probe.to(torch.float32 if probe.dtype == torch.float64 else torch.float64))
    except Exception:  # likewise
        return False
    return True


@dataclass(frozen=True, slots=True, eq=False)
class _Product:
    """A convolution or matrix product: its weight and bias, whether of the layer's very input, and how that was padded, if it was."""

    weight: Tensor
    bias: Tensor | None
    on_input: bool
    padded: Any


class _Products(TorchFunctionMode):
    """Notes each convolution and matrix product of a layer that is given an input."""

    def __init__(self, given: Tensor) -> None:
        super().__init__()
        self.calls: list[_Product] = []
        self._given = given
        self._padded: list[tuple[Tensor, Any]] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = dict(zip(("input", "weight", "bias"), args, strict=False)) | (kwargs or {})
        if func in PRODUCTS:
            how = next((how for tensor, how in self._padded if tensor is given["input"]), None)
            bias = given.get("bias")
            weight, bias = given["weight"].detach().clone(), None if bias is None else bias.detach().clone()
            self.calls.append(_Product(weight, bias, how is not None or given["input"] is self._given, how))
        output = func(*args, **(kwargs or {}))
        if func is nn.functional.pad and given["input"] is self._given:
            self._padded.append((output, repr((args[1:], {key: value for key, value in (kwargs or {}).items() if key != "input"}))))
        return output
