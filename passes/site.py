"""Sites: the layers of a model that could be factorized, found by identity, and why some of them must stay as they are."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.utils import parametrize

from passes.chain import BUILT, HOOKS, Chain, wraps_numbers
from passes.errors import SurgeryValueError
from passes.factorization import Factorization
from passes.geometry import Geometry, Piece
from passes.held import held_by, values_in

__all__ = [
    "COMPUTING_DTYPES",
    "Call",
    "Found",
    "Site",
    "computes_weight",
    "find_layers",
    "for_all_tied",
    "held_outside",
    "is_layer",
    "kept_together",
    "named_groups",
    "owners_of",
    "reason_to_keep",
]

COMPUTING_METHODS = ("forward", "_conv_forward", "__call__")
COMPUTING_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)

# Modules of torch that hand parameters of their children to a fused kernel instead of calling the child.
READERS: dict[type[nn.Module], tuple[str, ...]] = {
    nn.MultiheadAttention: ("out_proj",),
    nn.TransformerEncoderLayer: ("linear1", "linear2"),
}


@dataclass(frozen=True, slots=True)
class Call:
    """One call of a layer in one forward pass of the example inputs."""

    input_shape: tuple[int, ...]
    output_shape: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Site:
    """One layer that could be factorized, or the chain that stands where one stood.

    Attributes:
        name: first qualified name; empty where the model itself is the layer.
        aliases: every name under which the same module is found, the first included.
        layer: class name of the (original) layer.
        geometry: of the (original) layer.
        bias: what it adds to its output, detached, or None.
        dtype: of its weight.
        device: of its weight.
        calls: its calls in one forward pass of the example inputs; None where none were given.
        keep: why it must stay as it is, whatever is asked; None where it may be cut.
        tied_to: name of the first site with the very same weight (parameters, not numbers); None where it is the first or the only one.
        chain: the factorization of the chain that stands here; None for a layer.
        read_weight: gives the effective weight, detached; for a chain the weight of the layer it stands for.
        read_pieces: gives a chain's layers as plain data; nothing for a layer.
        others: sites with the very same weight and another geometry (strides, say), where this one stands for all in a decision.
    """

    name: str
    aliases: tuple[str, ...]
    layer: str
    geometry: Geometry
    bias: Tensor | None
    dtype: torch.dtype
    device: torch.device
    calls: tuple[Call, ...] | None
    keep: str | None
    tied_to: str | None
    chain: Factorization | None
    read_weight: Callable[[], Tensor]
    read_pieces: Callable[[], tuple[Piece, ...]]
    others: tuple[Site, ...] = ()

    @property
    def weight(self) -> Tensor:
        return self.read_weight()

    @property
    def pieces(self) -> tuple[Piece, ...]:
        return self.read_pieces()

    def __str__(self) -> str:
        return self.name or "(the model itself)"


def for_all_tied(first: Site, sites: Sequence[Site]) -> Site:
    """The first of tied sites, to stand for all of them: with their names, the calls of those of its geometry, and the others."""
    tied = [site for site in sites if site is first or site.tied_to == first.name]
    alike = [site for site in tied if site.geometry == first.geometry]
    calls = None if first.calls is None else tuple(call for site in alike for call in site.calls or ())
    others = tuple(site for site in tied if site.geometry != first.geometry)
    return replace(first, aliases=tuple(alias for site in tied for alias in site.aliases), calls=calls, others=others)


@dataclass(frozen=True, slots=True, eq=False)
class Found:
    """A convolution, linear layer or chain in a model.

    Attributes:
        module: it, or the plain layer that it amounts to where its weight is computed.
        names: all its qualified names.
        keep: why it must stay, if so.
        tied_to: first name of the first of all layers or chains that hold the very same weights; None where this is it.
    """

    module: nn.Module
    names: tuple[str, ...]
    keep: str | None
    tied_to: str | None = None


def is_layer(module: nn.Module) -> bool:
    """Whether the module is a convolution or a linear layer, of whatever subclass."""
    return isinstance(module, nn.Linear | nn.modules.conv._ConvNd)


def named_groups(model: nn.Module) -> Iterator[tuple[nn.Module, tuple[str, ...]]]:
    """Every module once, by identity, with all its qualified names in order of appearance."""
    names: dict[nn.Module, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        names.setdefault(module, []).append(name)
    for module, found in names.items():
        yield module, tuple(found)


def find_layers(model: nn.Module, plain: Callable[[nn.Module], nn.Module | str] | None = None) -> tuple[Found, ...]:
    """All convolutions, linear layers and chains of the model, in order, each once.

    Args:
        model: to be looked at.
        plain: gives for a layer whose weight is computed the plain layer that it amounts to, or why there is none; without it all are kept.

    Raises:
        SurgeryValueError: a lazy layer has no shape yet.
    """
    groups = list(named_groups(model))
    inside_chains = {id(child) for module, _ in groups if isinstance(module, Chain) for child in module.children()}
    holders, owners, readers = dict(held_outside(groups)), owners_of(groups), _readers(groups)
    everyone = owners_of([(module, (name,)) for module, names in groups for name in names])  # under all their names
    found = []
    for module, names in groups:
        keep = holders.get(id(module))
        if isinstance(module, Chain):
            found.append(Found(module, names, keep))
        elif is_layer(module) and id(module) not in inside_chains:
            if id(module) in readers:
                keep = keep or f"its weight is read by {readers[id(module)]}"
            computed = computes_weight(module, names[0])
            if computed is not None and plain is None:
                computed = f"{computed}; effective_weights=True may cut it"
            elif computed is not None and plain is not None and keep is None:
                sources = [p for p in module.parameters() if p is not module._parameters.get("bias")]
                shared = next((owners[id(p)] for p in sources if any(not _within(owner, names) for owner in everyone[id(p)])), None)
                told = " and ".join(name or "the model" for name in shared or ())
                amounts_to = f"its weight is computed from one shared by {told}" if shared else plain(module)
                computed, module = (amounts_to, module) if isinstance(amounts_to, str) else (None, amounts_to)
            found.append(Found(module, names, keep or computed or _unusable(module)))
    return _with_ties(found, owners)


def owners_of(groups: Sequence[tuple[nn.Module, tuple[str, ...]]]) -> dict[int, list[str]]:
    """First names of the modules that hold a parameter, by its identity."""
    owners: dict[int, list[str]] = {}
    for module, names in groups:
        for parameter in module._parameters.values():
            if parameter is not None:
                owners.setdefault(id(parameter), []).append(names[0])
    return owners


def _within(owner: str, names: Sequence[str]) -> bool:
    """Whether the name of a module is that of one of these, or of a module inside it."""
    return any(owner == name or owner.startswith(f"{name}.") or not name for name in names)


def _readers(groups: Sequence[tuple[nn.Module, tuple[str, ...]]]) -> dict[int, str]:
    """Layers whose weight some module of torch takes without calling them, by identity."""
    readers: dict[int, str] = {}
    for module, names in groups:
        for reader, children in READERS.items():
            if isinstance(module, reader):
                held = [read for child in children if (read := getattr(module, child, None)) is not None]
                readers |= {id(read): f"{names[0] or 'the model'} ({reader.__name__})" for read in held}
    return readers


def _with_ties(found: Sequence[Found], owners: Mapping[int, Sequence[str]]) -> tuple[Found, ...]:
    """Who shares its weight with layers of the same shape is tied to the first of them; who shares it otherwise is kept."""
    alike: dict[tuple[object, ...], list[Found]] = {}
    for item in found:
        alike.setdefault(_tie(item.module), []).append(item)
    tied = []
    for item in found:
        twins = alike[_tie(item.module)]
        where = {name for weight in _weights(item.module).values() for name in owners.get(id(weight), ())}
        mine = {".".join(part for part in (twin.names[0], child) if part) for twin in twins for child in _weights(twin.module)}
        other = next((name for name in sorted(where) if name not in mine), None)
        if other is None:
            other = next((twin.names[0] for twin in twins if twin is not item and twin.keep is not None), None)
        if other is not None:
            item = replace(item, keep=item.keep or f"its weight is shared with {other or 'the model'}")
        elif twins[0].names != item.names:
            item = replace(item, tied_to=twins[0].names[0])
        tied.append(item)
    return tuple(tied)


def kept_together(sites: Sequence[Site]) -> tuple[Site, ...]:
    """Sites with one weight can only be cut together: where one of them must stay, all do, and say for which and why."""
    kept: dict[str, Site] = {}
    for site in sites:
        if site.keep is not None:
            kept.setdefault(site.name if site.tied_to is None else site.tied_to, site)
    return tuple(_kept_like(site, kept.get(site.name if site.tied_to is None else site.tied_to)) for site in sites)


def _kept_like(site: Site, other: Site | None) -> Site:
    return site if other is None or site.keep is not None else replace(site, keep=f"its weight is shared with {other}: {other.keep}")


def _weights(module: nn.Module) -> dict[str, Tensor | None]:
    """The weight of a layer, or those of a chain's layers by name."""
    if not isinstance(module, Chain):
        return {"": module._parameters.get("weight")}
    return {name: layer._parameters.get("weight") for name, layer in module.named_children()}


def _tie(module: nn.Module) -> tuple[object, ...]:
    """Equal for layers, or chains, that hold the same weights and can share the factors of one: stride and padding may differ."""
    info = module.__dict__.get("_surgery") if isinstance(module, Chain) else None
    g = Geometry.of(module if info is None else info.original)
    shape = (g.in_channels, g.out_channels, g.kernel, g.groups, g.transposed)
    held = [id(module) if weight is None else id(weight) for weight in _weights(module).values()]  # one that is computed is nobody else's
    return (*held, shape, None if info is None else info.factorization)


def held_outside(groups: Sequence[tuple[nn.Module, tuple[str, ...]]]) -> Iterator[tuple[int, str]]:
    """Modules that are also held in a container, object, hook or module outside the tree, and why to keep them.

    A replacement would not reach there.
    """
    tree, whole = {id(module) for module, _ in groups}, groups[0][0]
    nearest: dict[int, list[nn.Module]] = {}  # of the modules that are held
    for holder, names in groups:
        for attribute, value in held_by(holder):
            if isinstance(holder, fx.GraphModule) and attribute not in HOOKS:  # its graph, and what belongs to that
                continue
            where = f"a hook of {names[0] or 'the model'}" if attribute in HOOKS else ".".join(part for part in (names[0], attribute) if part)
            held_here = [held for held in values_in(value) if isinstance(held, nn.Module)]
            if attribute in HOOKS and any(held is whole for held in held_here):  # a register of the network, as those who look at it keep
                held_here = _bound_to(value)
            for held in held_here:
                if id(held) not in nearest:
                    nearest[id(held)] = list(_nearest(held, tree, set()))
                for module in nearest[id(held)]:
                    if module is not holder:
                        yield id(module), f"it is also held in {where}, outside the tree of modules, where its chain would not be put"


def _bound_to(hook: Any) -> list[nn.Module]:
    """The modules that are themselves arguments of a ``partial``."""
    given = (*hook.args, *hook.keywords.values()) if isinstance(hook, partial) else ()
    return [value for value in given if isinstance(value, nn.Module)]


def _nearest(module: nn.Module, tree: Set[int], seen: set[int]) -> Iterator[nn.Module]:
    """The module if it is in the tree, else the first ones inside it that are."""
    if id(module) in tree:
        yield module
    elif id(module) not in seen:
        seen.add(id(module))
        for child in module.children():
            yield from _nearest(child, tree, seen)


def computes_weight(layer: nn.Module, name: str) -> str | None:
    """Why this layer's weight is not simply a parameter that its forward convolves or multiplies with; None where it is.

    Raises:
        SurgeryValueError: a lazy layer has no shape yet.
    """
    parameters = [p for p in layer._parameters.values() if p is not None]
    if any(isinstance(p, nn.parameter.UninitializedParameter) for p in parameters):
        raise SurgeryValueError(f"{name or 'the model'}: {type(layer).__name__} has no shape yet; run the model once, then come back")
    if parametrize.is_parametrized(layer):
        return "its weight is computed by a parametrization"
    if layer._parameters.get("weight") is None:
        return "its weight is computed (weight_norm, spectral_norm, pruning or the like)"
    plain = next((cls for cls in BUILT if isinstance(layer, cls)), None)
    changed = plain is None or any(getattr(type(layer), m, None) is not getattr(plain, m, None) or m in vars(layer) for m in COMPUTING_METHODS)
    if changed:
        return f"{type(layer).__name__} computes its output in its own way"
    if set(layer._parameters) - {"weight", "bias"} or layer._modules or layer._buffers:
        return f"{type(layer).__name__} holds more than a weight and a bias"
    if any(vars(layer).get(name) is not None for name in ("weight", "bias")):
        return f"{type(layer).__name__} holds its weight or bias as a plain attribute"
    return None


def _pads_as_it_says(layer: nn.Module) -> bool:
    """Where padding is not of zeros, torch's layers go by pixels that were worked out when they were built."""
    if layer.__dict__.get("padding_mode", "zeros") == "zeros":
        return True
    g = Geometry.of(layer)
    if isinstance(g.padding, str):
        totals = [d * (k - 1) if g.padding == "same" else 0 for d, k in zip(g.dilation, g.kernel, strict=True)]
        sides = [(total // 2, total - total // 2) for total in totals]
    else:
        sides = [(pixels, pixels) for pixels in g.padding]
    return list(layer.__dict__.get("_reversed_padding_repeated_twice", ())) == [pixels for side in reversed(sides) for pixels in side]


def reason_to_keep(layer: nn.Module, name: str) -> str | None:
    """Why nothing can be made of this layer's own weight; None where something can."""
    return computes_weight(layer, name) or _unusable(layer)


def _unusable(layer: nn.Module) -> str | None:
    weight: Tensor = layer._parameters["weight"]  # type: ignore[assignment]
    if wraps_numbers(weight):
        return f"its weight is a {type(weight).__name__}, which holds its numbers in a form of its own (quantized or the like)"
    if weight.layout is not torch.strided:
        return f"its weight is sparse ({str(weight.layout).removeprefix('torch.')})"
    if weight.numel() == 0:
        return "its weight is empty"
    if not _pads_as_it_says(layer):
        return "its padding was changed after it was built"
    needed = Geometry.of(layer).weight_shape
    if tuple(weight.shape) != needed:
        return f"its weight has the shape {tuple(weight.shape)}, a {type(layer).__name__} of its attributes has {needed}"
    if weight.dtype not in COMPUTING_DTYPES:
        return f"its weight is {weight.dtype}, not floating point of 16 bits or more"
    return None
