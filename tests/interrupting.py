"""Ctrl-C at any line: for tests that something is left whole whatever comes in between."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

__all__ = ["interrupted_at", "lines_of", "places"]


@contextmanager
def _watching(files: tuple[str, ...], at_line: Callable[[], None]) -> Iterator[None]:
    def local(frame: FrameType, event: str, _: Any) -> Any:
        if event == "line":
            at_line()
        return local

    def on_call(frame: FrameType, event: str, _: Any) -> Any:
        return local if frame.f_code.co_filename.endswith(files) else None

    before = sys.gettrace()
    sys.settrace(on_call)
    try:
        yield
    finally:
        sys.settrace(before)


def lines_of(files: tuple[str, ...], action: Callable[[], object]) -> int:
    """How many lines of these files an action runs."""
    count = [0]

    def at_line() -> None:
        count[0] += 1

    with _watching(files, at_line):
        action()
    return count[0]


def interrupted_at(number: int, files: tuple[str, ...], action: Callable[[], object]) -> None:
    """Run an action that a KeyboardInterrupt meets before the ``number``-th line of these files, counted from 0, and that lets it through."""
    left = [number]

    def at_line() -> None:
        left[0] -= 1
        if left[0] == -1:
            raise KeyboardInterrupt

    try:
        with _watching(files, at_line):
            action()
    except KeyboardInterrupt:
        return
    raise AssertionError(f"no interrupt came through at line {number}")


def places(total: int, last: int, others: int) -> list[int]:
    """The last lines, where things are put in place, all of them, and some of those before, evenly spread."""
    early = max(total - last, 0)
    return sorted({early * i // others for i in range(others)} | set(range(early, total)))
