"""The chain: the module that stands where a layer stood, and the way back to that layer."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, List, Optional  # noqa: UP035 - TorchScript reads the annotations

import torch
from torch import Tensor, nn

from passes.errors import SurgeryValueError
from passes.factorization import Factorization
from passes.geometry import Geometry, Piece
from passes.kinds import kind_of
from passes.whole_weight import WholeWeight, can_wait

__all__ = [
    "BUILT",
    "FORMATS",
    "HOOKS",
    "MODULE_ATTRIBUTES",
    "Chain",
    "ChainInfo",
    "TransposedChain",
    "chain_module",
    "changed_since_cut",
    "cut_chain",
    "cut_layer",
    "has_hooks",
    "in_format_of",
    "is_channels_last",
    "merge",
    "merged_piece",
    "original_layer",
    "pieces_of",
    "plain_layer",
    "twin_of",
    "weightless",
    "without_hooks",
    "wraps_numbers",
]

HOOKS = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_backward_hooks",
    "_backward_pre_hooks",
    "_is_full_backward_hook",
)
MODULE_ATTRIBUTES = frozenset(vars(nn.Module()))
CONVOLUTIONS: dict[int, type[nn.Module]] = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
TRANSPOSED: dict[int, type[nn.Module]] = {1: nn.ConvTranspose1d, 2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}
FORMATS = {4: torch.channels_last, 5: torch.channels_last_3d}
LAYER_ATTRIBUTES = frozenset({*vars(nn.Linear(1, 1, device="meta")), *vars(nn.Conv1d(1, 1, 1, device="meta"))}) - MODULE_ATTRIBUTES
BUILT: tuple[type[nn.Module], ...] = (nn.Linear, *CONVOLUTIONS.values(), *TRANSPOSED.values())


@dataclass(frozen=True, slots=True, eq=False)
class ChainInfo:
    """What a chain is and what it replaced: its factorization, and its layer without the weights."""

    factorization: Factorization
    original: nn.Module


class Chain(nn.Sequential):
    """Layers that together stand for one: for Tucker ``reduce``, ``core``, ``expand``.

    Carries the attributes of the layer it replaced (``in_channels``, ``stride``, ``weight``, ...), derived and read-only, because parents
    read them. The layer itself, without its weights, is kept outside the module tree, so that its class, attributes and hooks come back.
    """

    __jit_unused_properties__: ClassVar[list[str]] = ["weight", "bias"]

    def __init__(self, layers: dict[str, nn.Module], info: ChainInfo) -> None:
        super().__init__(OrderedDict(layers))
        self.__dict__["_surgery"] = info
        self.training = info.original.training
        for name in HOOKS:
            self.__dict__[name] = getattr(info.original, name)

    @property
    def weight(self) -> Tensor:
        """The weight of the one layer that computes what this chain computes; gradients flow to the factors.

        Where none can, it is multiplied out when its numbers are asked for (``WholeWeight``); ``clone()`` gives a plain tensor.
        """
        factors: list[Tensor] = [layer.weight for layer in self._modules.values()]  # type: ignore[union-attr,misc]
        if not can_wait(factors):
            return merged_piece(self).weight
        return WholeWeight.of(Geometry.of(self.__dict__["_surgery"].original).weight_shape, factors[0], lambda: merged_piece(self).weight)

    @property
    def bias(self) -> Tensor | None:
        """The bias, held by the chain's last layer."""
        last = list(self._modules.values())[-1]
        return None if last is None else last._parameters.get("bias")

    def __getattr__(self, name: str) -> Any:
        info = self.__dict__.get("_surgery")
        if info is not None and not name.startswith("_") and name not in self._modules:
            if name in vars(info.original):
                return getattr(info.original, name)
            if hasattr(type(info.original), name) and not any(hasattr(plain, name) for plain in (nn.Linear, nn.Conv2d, nn.ConvTranspose2d)):
                # what a subclass adds; it may look at the weight
                whole = copy.copy(info.original)
                whole.__dict__["_parameters"] = {"weight": self.weight, "bias": self.bias}
                return getattr(whole, name)
        return super().__getattr__(name)

    def __setattr__(self, name: str, value: Any) -> None:
        info = self.__dict__.get("_surgery")
        if info is not None and name in ("weight", "bias"):
            raise AttributeError(f"{name!r} of a chain is that of its layers and cannot be set; fuse it back first (surgery.reconstruct)")
        if info is not None and name in LAYER_ATTRIBUTES and name in vars(info.original):  # what others note on a layer they may note on its chain
            if _is_same(info.original, name, value):
                return
            raise AttributeError(f"{name!r} of a chain is derived from the layer it replaced and cannot be set")
        super().__setattr__(name, value)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):  # a part of a chain is no chain
            return nn.Sequential(OrderedDict(list(self._modules.items())[index]))  # type: ignore[arg-type]
        return super().__getitem__(index)


class TransposedChain(Chain):
    """The chain of a transposed convolution, which callers may ask for an output size."""

    def forward(self, input: Tensor, output_size: Optional[List[int]] = None) -> Tensor:  # noqa: UP006,UP045 - what TorchScript reads
        """As ``nn.ConvTranspose2d``: ``output_size`` is that of the pixels, or of the whole output. (A script cannot be asked for one.)"""
        if output_size is not None:
            if torch.jit.is_scripting():  # type: ignore[attr-defined]
                raise NotImplementedError("a scripted chain cannot be asked for an output size")
            else:  # noqa: RET506 - what TorchScript then leaves out
                return self._of_size(input, output_size)
        for layer in self:
            input = layer(input)
        return input

    def _of_size(self, input: Tensor, output_size: Sequence[int]) -> Tensor:
        """Each direction has the size that was asked for after the layer that extends in it, and until then the size that it has."""
        dims = Geometry.of(self.__dict__["_surgery"].original).dims
        if isinstance(output_size, Sequence):  # under symbolic tracing it may be something whose length is not known
            self._check_length(len(output_size), dims, input)
        for layer in self._modules.values():
            geometry = Geometry.of(layer)  # type: ignore[arg-type]
            if geometry.transposed:
                extends = [geometry.extends_in(axis) for axis in range(dims)]
                sizes = [output_size[axis - dims] if extends[axis] else input.shape[axis - dims] for axis in range(dims)]
                input = layer(input, sizes)  # type: ignore[misc]
            else:
                input = layer(input)  # type: ignore[misc]
        return input

    def _check_length(self, length: int, dims: int, input: Tensor) -> None:
        """As torch has it: the size of the pixels, or of an output with as many dimensions as the input."""
        allowed = {dims, input.dim()} if isinstance(input.dim(), int) else {dims, dims + 1, dims + 2}
        if length not in allowed:
            expected = " or ".join(map(str, sorted(allowed)))
            raise SurgeryValueError(f"output_size: the chain of a ConvTranspose{dims}d takes {expected} numbers, got {length}")


def chain_module(layers: dict[str, nn.Module], info: ChainInfo) -> Chain:
    """The chain of these layers."""
    return (TransposedChain if Geometry.of(info.original).transposed else Chain)(layers, info)


def pieces_of(layers: dict[str, nn.Module]) -> tuple[Piece, ...]:
    """The layers of a chain as plain data; weights are the parameters themselves."""
    return tuple(Piece(name, Geometry.of(layer), layer.weight, layer.bias) for name, layer in layers.items())  # type: ignore[arg-type]


def merged_piece(chain: Chain) -> Piece:
    """The one layer that computes what the chain computes; multiplied in float64, in the chain's dtype, differentiable."""
    info: ChainInfo = chain.__dict__["_surgery"]
    return merge(pieces_of(dict(chain.named_children())), info)


def merge(pieces: Sequence[Piece], info: ChainInfo) -> Piece:
    """As ``merged_piece``, from the pieces."""
    wide = [Piece(p.name, p.geometry, p.weight.double(), None) for p in pieces]
    geometry = Geometry.of(info.original)
    weight = kind_of(info.factorization).merge(wide, geometry).to(pieces[0].weight.dtype)
    return Piece("", geometry, weight, pieces[-1].bias)


def weightless(layer: nn.Module) -> nn.Module:
    """A copy of the layer without its parameters: class, attributes and hooks (the same hook tables) stay.

    What was noted on it of a computation, its last output perhaps, is kept without the way in which it was computed.
    """
    husk = twin_of(layer)
    husk.__dict__["_parameters"] = dict.fromkeys(layer._parameters)
    for name, value in vars(husk).items():
        if isinstance(value, Tensor) and value.grad_fn is not None:
            husk.__dict__[name] = value.detach()
    return husk


def _is_same(layer: nn.Module, name: str, value: Any) -> bool:
    """Whether a layer with this attribute set to this value would be the layer that it is."""
    changed = copy.copy(layer)
    changed.__dict__[name] = value
    try:
        return not name.startswith("_") and Geometry.of(changed) == Geometry.of(layer)
    except (TypeError, ValueError):  # nothing that a layer could have there
        return False


def twin_of(layer: nn.Module) -> nn.Module:
    """A shallow copy. Hooks of loading that are given their module, which torch refers to weakly, are given this one."""
    twin = copy.copy(layer)
    hooks = vars(layer).get("_load_state_dict_pre_hooks", {})
    if any(getattr(hook, "with_module", False) for hook in hooks.values()):
        own = {key: type(hook)(hook.hook, twin) if getattr(hook, "with_module", False) else hook for key, hook in hooks.items()}
        twin.__dict__["_load_state_dict_pre_hooks"] = OrderedDict(own)
    return twin


def without_hooks(layer: nn.Module) -> nn.Module:
    """A shallow copy of the layer around which nothing else runs."""
    bare = twin_of(layer)
    plain = nn.Module()
    for name in HOOKS:
        bare.__dict__[name] = getattr(plain, name)
    return bare


def wraps_numbers(tensor: Tensor) -> bool:
    """Whether a tensor keeps its numbers in other tensors, as torchao's quantized ones do: most of torch's functions then do not take it."""
    return hasattr(tensor, "__tensor_flatten__")


def changed_since_cut(layers: dict[str, nn.Module], info: ChainInfo) -> str | None:
    """Why the layers of a chain no longer are what its factorization says, or None where they are."""
    weights = [layer._parameters.get("weight") for layer in layers.values() if type(layer) in BUILT]
    plain = len(weights) == len(layers) and not any(weight is None or wraps_numbers(weight) for weight in weights)
    if plain and layers and not any(has_hooks(layer) for layer in layers.values()):
        bias = list(layers.values())[-1]._parameters.get("bias") is not None
        shapes = kind_of(info.factorization).shapes(Geometry.of(info.original), info.factorization, bias)
        found = [(name, Geometry.of(layer), layer._parameters["bias"] is not None) for name, layer in layers.items()]
        if found == [(shape.name, shape.geometry, shape.bias) for shape in shapes]:
            return None
    return "its layers were changed after the cut"


def has_hooks(module: nn.Module) -> bool:
    """Whether anything is registered to run around the module's forward or backward. (A mark of backward hooks stays when they are removed.)"""
    return any(vars(module).get(name) for name in HOOKS if name != "_is_full_backward_hook")


def cut_layer(layer: nn.Module, factorization: Factorization, pieces: Sequence[Piece]) -> tuple[dict[str, nn.Module], ChainInfo]:
    """The layers of the chain that stands for a layer, and what is to be known of it.

    Dtype, device, memory format, training mode and ``requires_grad`` are those of the layer. The bias is the layer's own parameter, so that
    whoever holds or shares it still does; where the layer has none there is none.
    """
    layers = {piece.name: _build_layer(piece, layer, layer._parameters["weight"]) for piece in pieces}  # type: ignore[arg-type]
    return layers, ChainInfo(factorization, weightless(layer))


def cut_chain(
    layers: dict[str, nn.Module], info: ChainInfo, factorization: Factorization, pieces: Sequence[Piece]
) -> tuple[dict[str, nn.Module], ChainInfo]:
    """As ``cut_layer``, for a chain that is cut again."""
    last = list(layers.values())[-1]
    weight = _telling_weight(layers)
    return {piece.name: _build_layer(piece, last, weight) for piece in pieces}, ChainInfo(factorization, info.original)


def original_layer(info: ChainInfo, piece: Piece, layers: dict[str, nn.Module], hooks_from: nn.Module | None = None) -> nn.Module:
    """The layer that a chain replaced, with the weight of ``piece``; its class, attributes and hooks as they were."""
    layer = twin_of(info.original)
    core = max(layers.values(), key=lambda m: m.weight.numel())  # type: ignore[operator,union-attr]
    trainable = any(m.weight.requires_grad for m in layers.values())  # type: ignore[union-attr]
    weight = piece.weight
    if not isinstance(weight, nn.Parameter):
        weight = nn.Parameter(in_format_of(weight.detach(), _telling_weight(layers)), requires_grad=trainable)
    own = dict(info.original._parameters)
    own["weight"] = weight
    own["bias"] = list(layers.values())[-1]._parameters["bias"]
    layer.__dict__["_parameters"] = own
    layer.training = core.training
    if hooks_from is not None:
        for name in HOOKS:
            layer.__dict__[name] = getattr(hooks_from, name)
    return layer


def plain_layer(piece: Piece, bias: Tensor | None) -> nn.Module:
    """The layer of torch with a piece's geometry and weight, and this bias; a weight or bias that is a parameter is shared, not copied."""
    g = piece.geometry
    has_bias = bias is not None
    built: nn.Module
    if g.is_linear:
        built = nn.Linear(g.in_channels, g.out_channels, has_bias, device="meta")
    elif g.transposed:
        channels, padding = (g.in_channels, g.out_channels), (g.padding, g.output_padding)
        built = TRANSPOSED[g.dims](*channels, g.kernel, g.stride, *padding, g.groups, has_bias, g.dilation, g.padding_mode, device="meta")
    else:
        built = CONVOLUTIONS[g.dims](
            g.in_channels, g.out_channels, g.kernel, g.stride, g.padding, g.dilation, g.groups, has_bias, g.padding_mode, device="meta"
        )
    built._parameters["weight"] = _parameter(piece.weight)
    built._parameters["bias"] = None if bias is None else _parameter(bias)
    return built


def _parameter(tensor: Tensor) -> nn.Parameter:
    return tensor if isinstance(tensor, nn.Parameter) else nn.Parameter(tensor)


def _build_layer(piece: Piece, layer: nn.Module, weight: Tensor) -> nn.Module:
    if not isinstance(piece.weight, nn.Parameter):
        numbers = in_format_of(piece.weight.detach().to(device=weight.device, dtype=weight.dtype), weight)
        piece = Piece(piece.name, piece.geometry, nn.Parameter(numbers, requires_grad=weight.requires_grad), piece.bias)
    return plain_layer(piece, layer._parameters["bias"] if piece.bias is not None else None).train(layer.training)


def _telling_weight(layers: dict[str, nn.Module]) -> Tensor:
    """The weight that tells the memory format of a chain's layers: one that is channels last if any is, since depthwise layers look alike in both."""
    weights: list[Tensor] = [layer._parameters["weight"] for layer in layers.values()]  # type: ignore[misc]
    return next((weight for weight in weights if is_channels_last(weight)), weights[0])


def in_format_of(tensor: Tensor, like: Tensor) -> Tensor:
    """``tensor`` in storage of its own, in the memory format of ``like`` (contiguous, or channels last in two or three dimensions)."""
    return tensor.clone(memory_format=FORMATS[tensor.ndim] if is_channels_last(like) else torch.contiguous_format)


def is_channels_last(weight: Tensor) -> bool:
    """By its strides: those of 1x1 kernels tell it too, though torch takes such a weight for contiguous in both formats."""
    return weight.ndim in FORMATS and weight.shape[1] > 1 and weight.stride(-1) == weight.shape[1]
