"""What a pass returns: the model, whether anything changed, and what became of every site."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import nn

__all__ = ["Outcome", "PassResult"]


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of one site. ``error`` is |W - W'|_F / |W|_F for a weight that was replaced by W', else None."""

    site: str
    status: Literal["applied", "kept"]
    reason: str | None = None
    error: float | None = None


@dataclass(frozen=True, slots=True, eq=False)
class PassResult:
    """Result of one pass."""

    model: nn.Module
    modified: bool
    outcomes: tuple[Outcome, ...]
