"""A network that a runtime has prepared."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

__all__ = ["Ready"]


@dataclass(frozen=True, slots=True)
class Ready:
    """Called with nothing, it runs the network once on its example inputs.

    Attributes:
        call: does that.
        file_bytes: of the file that the runtime reads; None where there is none.
    """

    call: Callable[[], object]
    file_bytes: int | None = None

    def __call__(self) -> object:
        return self.call()
