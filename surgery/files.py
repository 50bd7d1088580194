"""Files that are either written whole or not at all, and paths as users give them."""

from __future__ import annotations

import errno
import os
import secrets
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from passes.errors import SurgeryTypeError, SurgeryValueError

__all__ = ["as_path", "naming", "replacing", "temporary_beside", "usable_target", "write_atomically"]


def as_path(argument: str, value: Any) -> Path:
    """A path that a user gave.

    Raises:
        SurgeryTypeError: neither text nor a path.
        SurgeryValueError: it is empty or holds a NUL, which no file system takes.
    """
    if not isinstance(value, str | os.PathLike):
        raise SurgeryTypeError(f"{argument}: expected the path of a file or folder, got {type(value).__name__}")
    text = os.fspath(value)
    if not isinstance(text, str) or not text or "\0" in text:
        raise SurgeryValueError(f"{argument}: {text!r} is no path")
    return Path(text)


def usable_target(argument: str, value: Any) -> Path:
    """The file to write that a user named.

    Raises:
        SurgeryTypeError, SurgeryValueError: no path; a folder, a device or a pipe; or its folder does not exist.
    """
    target = as_path(argument, value)
    if target.is_dir():
        raise SurgeryValueError(f"{argument}: {target} is a folder; give the name of a file in it")
    if target.exists() and not target.is_file():
        raise SurgeryValueError(f"{argument}: {target} is a device or a pipe; give the name of a file")
    if not target.parent.is_dir():
        raise SurgeryValueError(f"{argument}: the folder {target.parent} does not exist; make it first")
    return target


def write_atomically(path: Path, content: bytes) -> None:
    """Write ``path`` so that readers see the old file or the new one, never a part. ``OSError`` passes through."""
    with replacing(path) as work:
        work.write_bytes(content)


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A file name to write to; when the block ends without an error that file takes the place of ``path``, else all is as it was.

    Links go on pointing where they did, permissions stay, and a device or pipe is written to, not replaced.

    Raises:
        OSError: the file cannot be written; it names ``path``.
    """
    _check_folder(path)
    special = path.exists() and not path.is_file() and not path.is_dir()  # what /dev/stdout leads to may have no name of its own
    target = path if special else path.resolve()
    if target.is_dir():
        raise IsADirectoryError(errno.EISDIR, "it is a folder; give the name of a file in it", str(path))
    if special:
        with tempfile.TemporaryDirectory() as elsewhere, naming(path):
            yield Path(elsewhere) / target.name
            target.write_bytes((Path(elsewhere) / target.name).read_bytes())
        return
    with temporary_beside(target) as folder, naming(path):
        yield folder / target.name
        if target.is_file():
            shutil.copymode(target, folder / target.name)
        os.replace(folder / target.name, target)


@contextmanager
def temporary_beside(path: Path) -> Iterator[Path]:
    """A temporary folder on the same file system as ``path``, removed with all that is still in it, also after Ctrl-C.

    Raises:
        OSError: there can be none; it names ``path`` or its folder.
    """
    _check_folder(path)
    folder = path.parent / f".{path.name[:100]}.{secrets.token_hex(6)}"  # named first, so that it is found again whatever comes in between
    try:
        try:
            with naming(path):
                folder.mkdir(mode=0o700)
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)
    finally:  # where Ctrl-C came while that was done
        shutil.rmtree(folder, ignore_errors=True)


def _check_folder(path: Path) -> None:
    if not path.parent.exists():
        raise FileNotFoundError(errno.ENOENT, "there is no such folder; make it first", str(path.parent))


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Errors of the file system name the file that was asked for, not the temporary one."""
    try:
        yield
    except OSError as error:
        if error.errno is None:
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error
