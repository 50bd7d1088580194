"""The contract of a host: something that holds sites and chains, so that each rewrite exists once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from torch import nn

from passes.factorization import Factorization
from passes.geometry import Piece
from passes.site import Site

__all__ = ["Host"]


class Host(Protocol):
    """A model under surgery. ``replace`` and ``restore`` only prepare; ``commit`` does everything that was prepared, or nothing."""

    def sites(self) -> tuple[Site, ...]:
        """All layers and chains, in the model's order, each once."""

    def replace(self, site: Site, factorization: Factorization, pieces: Sequence[Piece]) -> None:
        """Prepare a chain of these pieces in the place of the site's layer or chain."""

    def restore(self, site: Site, piece: Piece) -> None:
        """Prepare the original layer, with the numbers of ``piece``, in the place of the site's chain."""

    def commit(self) -> nn.Module:
        """Put everything that was prepared in its place and return the model; after an error the model is as before."""
