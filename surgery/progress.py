"""Progress on stderr, only where that is a terminal."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from passes.site import Site

__all__ = ["site_progress"]


@contextmanager
def site_progress(total: int, what: str) -> Iterator[Callable[[Site], None] | None]:
    """A callback to be called with each site before it is worked on; None where stderr is no terminal."""
    if not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(what, total=total)

        def step(site: Site) -> None:
            bar.update(task, advance=1, description=f"{what} {site}")

        yield step
