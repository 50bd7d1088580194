"""All or nothing, whatever comes in between: what was changed is put back after an error or Ctrl-C."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from passes.host import Undo

__all__ = ["Undo", "undone_on_error", "uninterrupted"]


@contextmanager
def undone_on_error() -> Iterator[Undo]:
    """A list of steps that are taken back, the last one first, if the block does not come to its end. Each is added before what it takes back."""
    undo = Undo()
    try:
        try:
            yield undo
        except BaseException:
            with uninterrupted():
                undo()
            raise
    except BaseException:  # where Ctrl-C came just before it had to wait
        undo()
        raise


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Ctrl-C is heard only when this is over. For blocks that take no time; outside the main thread, where nobody hears it, nothing is done."""
    before: Any = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or before is None:
        yield
        return
    heard: list[tuple[Any, ...]] = []
    signal.signal(signal.SIGINT, lambda *call: heard.append(call))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
        if heard and callable(before):
            before(*heard[0])
        elif heard and before == signal.SIG_DFL:
            signal.raise_signal(signal.SIGINT)
