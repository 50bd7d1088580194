"""Surgery in place on a module of any class: a chain stands at the layer's own name on its parent, at every alias."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn

from passes.capture import observe_calls
from passes.chain import Chain, ChainInfo, build_layers, changed_since_cut, merged_piece, original_layer, pieces_of, weightless
from passes.factorization import Factorization
from passes.geometry import Geometry, Piece
from passes.host import Host
from passes.site import Call, Found, Site, find_layers

__all__ = ["ModuleHost", "site_of", "site_of_layer"]


class ModuleHost(Host):
    """Host for any ``nn.Module``; works in place on the model it is given.

    Args:
        model: the module; if it is itself a layer or a chain, ``commit`` returns its replacement.
        example_inputs: with them, sites know their calls. A tensor, a tuple of positional or a mapping of keyword arguments.
    """

    def __init__(self, model: nn.Module, example_inputs: Any = None) -> None:
        self.model = model
        self._found = {found.names[0]: found for found in find_layers(model)}
        self._calls = None if example_inputs is None else observe_calls(model, example_inputs)
        self._prepared: dict[str, nn.Module] = {}

    def sites(self) -> tuple[Site, ...]:
        calls = self._calls
        return tuple(site_of(f, None if calls is None else calls.get(f.names[0], ())) for f in self._found.values())

    def replace(self, site: Site, factorization: Factorization, pieces: Sequence[Piece]) -> None:
        module = self._found[site.name].module
        if isinstance(module, Chain):
            old = module.__dict__["_surgery"].original
            weight = next(module.children())._parameters["weight"]
            donor = list(module.children())[-1]
        else:
            old, weight, donor = weightless(module), module._parameters["weight"], module
        layers = build_layers(pieces, donor, weight=weight)  # type: ignore[arg-type]
        chain = Chain(layers, ChainInfo(factorization, old))
        self._prepared[site.name] = chain.train(module.training)

    def restore(self, site: Site, piece: Piece) -> None:
        chain = self._found[site.name].module
        info: ChainInfo = chain.__dict__["_surgery"]
        self._prepared[site.name] = original_layer(info, piece, dict(chain.named_children()), hooks_from=chain)

    def commit(self) -> nn.Module:
        undo: list[Callable[[], None]] = []
        model = self.model
        try:
            for name, module in self._prepared.items():
                for alias in self._found[name].names:
                    if alias == "":
                        model = module
                        continue
                    path, _, child = alias.rpartition(".")
                    slots = self.model.get_submodule(path)._modules
                    undo.append(_setter(slots, child, slots[child]))
                    slots[child] = module  # the key exists, so the order of the state dict holds
        except BaseException:
            for step in reversed(undo):
                step()
            raise
        self._prepared = {}
        self.model = model
        self._found = {found.names[0]: found for found in find_layers(model)}
        return model


def site_of(found: Found, calls: tuple[Call, ...] | None) -> Site:
    """The site of a layer or a chain."""
    module = found.module
    if not isinstance(module, Chain):
        return site_of_layer(module, found.names, calls, found.keep)
    info: ChainInfo = module.__dict__["_surgery"]
    first = next(module.parameters())
    return Site(
        name=found.names[0],
        aliases=found.names,
        layer=type(info.original).__name__,
        geometry=Geometry.of(info.original),
        bias=None if module.bias is None else module.bias.detach(),
        dtype=first.dtype,
        device=first.device,
        calls=calls,
        keep=found.keep or changed_since_cut(dict(module.named_children()), info),
        chain=info.factorization,
        read_weight=lambda: merged_piece(module).weight.detach(),
        read_pieces=lambda: pieces_of(dict(module.named_children())),
    )


def site_of_layer(layer: nn.Module, names: tuple[str, ...], calls: tuple[Call, ...] | None, keep: str | None) -> Site:
    """The site of a layer that has not been cut."""
    weight: Tensor = layer.weight.detach()  # type: ignore[operator,union-attr,assignment]
    return Site(
        name=names[0],
        aliases=names,
        layer=type(layer).__name__,
        geometry=Geometry.of(layer),
        bias=None if layer.bias is None else layer.bias.detach(),  # type: ignore[operator,union-attr,arg-type]
        dtype=weight.dtype,
        device=weight.device,
        calls=calls,
        keep=keep,
        chain=None,
        read_weight=lambda: layer.weight.detach(),  # type: ignore[operator,union-attr,return-value]
        read_pieces=tuple,
    )


def _setter(slots: dict[str, nn.Module | None], key: str, value: nn.Module | None) -> Callable[[], None]:
    def undo() -> None:
        slots[key] = value

    return undo
