"""What a pass returns: the model, whether anything changed, and what became of every site."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import nn

from passes.outline import Outline

__all__ = ["Outcome", "PassResult"]


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of one site.

    Attributes:
        site: its name.
        status: ``"applied"`` or ``"kept"``.
        reason: why it was kept; for a fused layer what it stands for, for the others what became of them.
        error: |W - W'|_F / |W|_F for a weight that was replaced by W', else None.
        params_before: parameters of all modules that a fused layer stands for, else None.
        params_after: its own.
        macs_before: MACs of those modules in one forward pass of the example inputs; None where their calls are not known.
        macs_after: its own.
        spectra: of the weight before, one a mode of the kind, in outline; none where none were looked at.
    """

    site: str
    status: Literal["applied", "kept"]
    reason: str | None = None
    error: float | None = None
    params_before: int | None = None
    params_after: int | None = None
    macs_before: int | None = None
    macs_after: int | None = None
    spectra: tuple[Outline, ...] = ()


@dataclass(frozen=True, slots=True, eq=False)
class PassResult:
    """Result of one pass.

    Attributes:
        model: what the pass was given, changed in place; another module only where the root itself is a layer.
        modified: whether anything changed.
        outcomes: what became of every site that the pass looks at, in the model's order.
    """

    model: nn.Module
    modified: bool
    outcomes: tuple[Outcome, ...]
