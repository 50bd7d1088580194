"""Files that are either written whole or not at all."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

__all__ = ["temporary_beside", "write_atomically"]


def write_atomically(path: Path, content: bytes) -> None:
    """Write ``path`` so that readers see the old file or the new one, never a part. ``OSError`` passes through."""
    with temporary_beside(path) as folder:
        (folder / path.name).write_bytes(content)
        os.replace(folder / path.name, path)


@contextmanager
def temporary_beside(path: Path) -> Iterator[Path]:
    """A temporary folder on the same file system as ``path``, removed with all that is still in it."""
    folder = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
