"""Putting one layer in the place of several: what a host is told, what becomes of the others, and the modules' part of it."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import nn

from passes.geometry import Geometry
from passes.host import Undo
from passes.neighbours import Neighbour
from passes.site import Call, is_layer, named_groups

__all__ = ["Fusion", "assign", "known_calls", "layers_of_chains", "place_in_modules"]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Fusion:
    """A layer that stands for several modules, each the only reader of the one before.

    Attributes:
        members: the modules, first to last.
        at: the name of the one whose place the layer takes.
        layer: the layer.
    """

    members: tuple[Neighbour, ...]
    at: str
    layer: nn.Module

    @classmethod
    def of(cls, neighbours: Mapping[str, Neighbour], names: Sequence[str], at: str, layer: nn.Module) -> Fusion:
        return cls(members=tuple(neighbours[name] for name in names), at=at, layer=layer)

    @property
    def opened(self) -> tuple[str, ...]:
        """Chains that no longer are what they were: a layer is gone, or has other channels."""
        changed = [m for m in self.members if m.chain is not None and (m.name != self.at or not _same_shape(m.module, self.layer))]
        return tuple(dict.fromkeys(m.chain for m in changed if m.chain is not None))

    @property
    def calls(self) -> tuple[Call, ...] | None:
        """Calls of the new layer."""
        first, last = known_calls(self.members), known_calls(self.members[::-1])
        if first is None or last is None or len(first) != len(last):
            return None
        return tuple(Call(a.input_shape, b.output_shape) for a, b in zip(first, last, strict=True))

    def effects(self, removed: str) -> dict[str, str]:
        """What becomes of the other modules and of the chains, by name; ``removed`` says it of a module outside any chain."""
        others = {m.name: removed if m.chain is None else "taken out of its chain" for m in self.members if m.name != self.at}
        return others | dict.fromkeys(self.opened, "no longer a chain but its layers one by one: it cannot be reconstructed")


def known_calls(members: Sequence[Neighbour]) -> tuple[Call, ...] | None:
    """Calls of the first module, or of the next whose calls are known if only batch norms, which keep the shape, come before it."""
    for member in members:
        if member.calls is not None or is_layer(member.module):
            return member.calls
    return None


def layers_of_chains(chains: Mapping[str, nn.Module]) -> dict[str, str]:
    """The chain's name for the name of each of its layers."""
    return {f"{name}.{child}" if name else child: name for name, chain in chains.items() for child, _ in chain.named_children()}


def place_in_modules(model: nn.Module, fusions: Sequence[Fusion], undo: Undo) -> None:
    """Put fused layers in place in a tree of modules.

    The places of the others get an ``nn.Identity``, because their parents go on calling them; layers of a chain are taken out of it, which then
    is an ordinary ``nn.Sequential`` of those that remain.
    """
    names_of = {names[0]: (module, names) for module, names in named_groups(model)}
    edits: dict[str, dict[str, nn.Module | None]] = {}
    opened = {chain for fusion in fusions for chain in fusion.opened}
    for fusion in fusions:
        for member in fusion.members:
            new = fusion.layer if member.name == fusion.at else None
            if member.chain is not None:
                edits.setdefault(member.chain, {})[member.name.rpartition(".")[2]] = new
            else:
                assign(model, member.aliases, new or nn.Identity().train(member.module.training), undo)
    for chain, changes in edits.items():
        module, aliases = names_of[chain]
        if chain in opened:
            layers = {child: changes.get(child, layer) for child, layer in module.named_children()}
            kept = OrderedDict((child, layer) for child, layer in layers.items() if layer is not None)
            assign(model, aliases, nn.Sequential(kept).train(module.training), undo)
        else:
            for child, layer in changes.items():
                if layer is not None:
                    undo.assign(module._modules, child, layer)


def assign(model: nn.Module, aliases: Sequence[str], module: nn.Module, undo: Undo) -> None:
    """Put a module wherever one of these names says."""
    for alias in aliases:
        path, _, child = alias.rpartition(".")
        undo.assign(model.get_submodule(path)._modules, child, module)


def _same_shape(old: nn.Module, new: nn.Module) -> bool:
    return is_layer(old) and is_layer(new) and Geometry.of(old) == Geometry.of(new)
