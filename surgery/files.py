"""Files that are either written whole or not at all."""

from __future__ import annotations

import os
import secrets
import shutil
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
    """A temporary folder on the same file system as ``path``, removed with all that is still in it, also after Ctrl-C."""
    folder = path.parent / f".{path.name}.{secrets.token_hex(6)}"  # named before it is made, so that it is found again whatever comes in between
    try:
        try:
            folder.mkdir(mode=0o700)
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)
    finally:  # where Ctrl-C came while that was done
        shutil.rmtree(folder, ignore_errors=True)
