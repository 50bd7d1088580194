"""The contract of a host, something that holds sites and chains so that each rewrite exists once, and what all hosts share."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from passes.chain import Chain, ChainInfo, changed_since_cut, merged_piece, pieces_of
from passes.factorization import Factorization
from passes.geometry import Geometry, Piece
from passes.kinds import kind_of
from passes.neighbours import Neighbour
from passes.site import Call, Found, Site

__all__ = ["Host", "Undo", "site_of", "telling_numbers", "tied_pieces"]


class Host(Protocol):
    """A model under surgery. ``replace`` and ``restore`` only prepare; ``commit`` does everything that was prepared, or nothing.

    A *private* host was given a model that nobody else holds: it may put each chain in place at once, so that the memory of the layer is free
    again; after an error its model is of no use.
    """

    def sites(self) -> tuple[Site, ...]:
        """All layers and chains, in the model's order, each once."""

    def replace(self, site: Site, factorization: Factorization, pieces: Sequence[Piece]) -> tuple[Piece, ...]:
        """Prepare a chain of these pieces, of this ``factorization``, in the place of the site's layer or chain.

        Returns:
            The chain's layers with their own parameters. A piece whose weight is a parameter is shared, not copied: so tied chains are made.
        """

    def restore(self, site: Site, piece: Piece) -> Piece:
        """Prepare the original layer, with the numbers of ``piece``, in the place of the site's chain; parameters as for ``replace``."""

    def neighbours(self) -> Mapping[str, Neighbour]:
        """All modules that the model calls, by first name, each with the one that alone reads its output, where that is proved."""

    def fuse(self, names: Sequence[str], at: str, layer: nn.Module) -> Mapping[str, str]:
        """Prepare ``layer`` in the place of ``at``, for all modules of ``names``, each the reader of the one before.

        Returns:
            What becomes of the others, and of the chains whose layers they are, by name.
        """

    def drop(self, name: str) -> str | None:
        """Prepare the module ``name``, which gives its input back, to be called no more; or why that cannot be."""

    def commit(self) -> Any:
        """Put everything that was prepared in its place and return the model, whatever the host holds; after an error it is as before."""

    def rollback(self) -> None:
        """Undo the last commit, if there was one; not for a private host."""


class Undo:
    """Assignments that can be taken back, the last one first."""

    def __init__(self) -> None:
        self._steps: list[Callable[[], None]] = []

    def assign(self, slots: dict[str, nn.Module | None], key: str, module: nn.Module) -> None:
        before = slots[key]
        self.later(lambda: slots.__setitem__(key, before))
        slots[key] = module

    def remove(self, slots: dict[str, nn.Module | None], key: str) -> None:
        before = dict(slots)

        def put_back() -> None:  # all of them, so that the order holds
            slots.clear()
            slots.update(before)

        self.later(put_back)
        del slots[key]

    def later(self, step: Callable[[], None]) -> None:
        """Have this done when everything is taken back."""
        self._steps.append(step)

    def __call__(self) -> None:
        while self._steps:
            self._steps.pop()()


def site_of(found: Found, calls: tuple[Call, ...] | None, module_now: Callable[[], nn.Module]) -> Site:
    """The site of a layer or a chain; what it reads of the weight it reads from the module that then stands there, and so keeps none alive."""
    module = found.module
    info: ChainInfo | None = module.__dict__["_surgery"] if isinstance(module, Chain) else None
    original = module if info is None else info.original
    bias: Any = module._parameters.get("bias") if info is None else module.bias
    weight = telling_numbers(module)
    return Site(
        name=found.names[0],
        aliases=found.names,
        layer=type(original).__name__,
        geometry=Geometry.of(original),
        bias=None if bias is None else bias.detach(),
        dtype=weight.dtype,
        device=weight.device,
        calls=calls,
        keep=found.keep or (None if info is None else changed_since_cut(dict(module.named_children()), info)),
        tied_to=found.tied_to,
        chain=None if info is None else info.factorization,
        read_weight=lambda: _weight_of(module_now()),
        read_pieces=lambda: _pieces_of(module_now()),
    )


def telling_numbers(module: nn.Module) -> Tensor:
    """What tells the dtype and device of a layer or chain. A weight that is computed is not asked for: that may fail, or change the layer."""
    own = module._parameters.get("weight")
    tensors = [own] if own is not None else [*module.parameters(), *module.buffers()]
    return next((t for t in tensors if t.is_floating_point()), tensors[0] if tensors else torch.empty(0))


def tied_pieces(site: Site, factorization: Factorization, first: Sequence[Piece]) -> tuple[Piece, ...]:
    """The pieces of a site that is tied to one which has these: its own geometry and bias, the same parameters."""
    shapes = kind_of(factorization).shapes(site.geometry, factorization, site.bias is not None)
    weights = {piece.name: piece.weight for piece in first}
    return tuple(Piece(shape.name, shape.geometry, weights[shape.name], site.bias if shape.bias else None) for shape in shapes)


def _weight_of(module: nn.Module) -> Tensor:
    weight: Any = merged_piece(module).weight if isinstance(module, Chain) else module.weight
    return weight.detach()  # type: ignore[no-any-return]


def _pieces_of(module: nn.Module) -> tuple[Piece, ...]:
    return pieces_of(dict(module.named_children())) if isinstance(module, Chain) else ()
