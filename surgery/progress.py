"""Progress of long work on stderr, only where that is a terminal and somebody asked for it.

Work says what it does by ``stage`` and ``tracked``, wherever it is; ``show_progress`` around it, once, makes that visible.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Sized
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from rich.progress import Progress

__all__ = ["show_progress", "stage", "tracked"]

Item = TypeVar("Item")
_shown: ContextVar[_Shown | None] = ContextVar("surgery_progress", default=None)


class _Shown:
    """A bar for each stage that is going on, one below the other; nothing is on the terminal while there is none."""

    def __init__(self, bars: Progress) -> None:
        self.bars = bars
        self._stages = 0

    @contextmanager
    def stage(self, what: str, total: int | None) -> Iterator[Callable[[object], None]]:
        if self._stages == 0:
            self.bars.start()
        self._stages += 1
        task = self.bars.add_task(what, total=total)
        try:
            yield lambda name: self.bars.update(task, advance=1, description=f"{what} {name}".rstrip())
        finally:
            self._stages -= 1
            self.bars.remove_task(task)
            if self._stages == 0:
                self.bars.stop()


@contextmanager
def show_progress(wanted: bool = True) -> Iterator[None]:
    """Within, long work (planning, timing, calibration, export, ...) shows how far it is, on stderr where that is a terminal.

        with surgery.show_progress():
            schedule.step(epoch, model, optimizer)

    Args:
        wanted: False changes nothing; neither does asking for what is shown already.
    """
    if not wanted or _shown.get() is not None or not sys.stderr.isatty():
        yield
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn("{task.description}", markup=False), BarColumn(), TimeElapsedColumn())
    bars = Progress(*columns, console=Console(stderr=True), transient=True, redirect_stdout=False, redirect_stderr=False)
    token = _shown.set(_Shown(bars))
    try:
        yield
    finally:
        _shown.reset(token)
        bars.stop()


@contextmanager
def stage(what: str, total: int | None = None) -> Iterator[Callable[[object], None]]:
    """Work of so many steps (None: not known): call what it gives with the name of each step that begins."""
    shown = _shown.get()
    if shown is None:
        yield _silent
        return
    with shown.stage(what, total) as step:
        yield step


def tracked(items: Iterable[Item], what: str, *, name: Callable[[Item], object] = lambda _: "") -> Iterator[Item]:
    """The items, one after the other, as a stage."""
    with stage(what, len(items) if isinstance(items, Sized) else None) as step:
        for item in items:
            step(name(item))
            yield item


def _silent(_: object) -> None:
    pass
