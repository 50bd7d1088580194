"""A pipeline: passes one after the other on one host, and what ran when one fails."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from passes.host import Host
from passes.result import PassResult

__all__ = ["Pass", "name_of", "run_pipeline"]


class Pass(Protocol):
    """A rewrite of a model: a frozen dataclass whose fields are its options."""

    def __call__(self, host: Host) -> PassResult:
        """Rewrite the model of ``host``, wholly or not at all."""


def name_of(step: Pass) -> str:
    """The pass ``step`` as records and errors name it."""
    return type(step).__name__


def run_pipeline(passes: Sequence[Pass], host: Host) -> tuple[PassResult, ...]:
    """Run ``passes`` one after the other on ``host``: one result a pass, in order.

    Each pass is wholly done before the next begins. Where one fails, its error goes on with a note of what had run: the model then is as that
    pass found it.
    """
    results: list[PassResult] = []
    for step in passes:
        try:
            results.append(step(host))
        except BaseException as error:  # goes on, with a note; an interrupt too
            ran = [f"{name_of(done)}{'' if result.modified else ' (nothing to do)'}" for done, result in zip(passes, results, strict=False)]
            error.add_note(f"in the pass {name_of(step)}, number {len(ran) + 1} of {len(passes)}; before it ran: {', '.join(ran) or 'none'}")
            raise
    return tuple(results)
