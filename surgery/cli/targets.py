"""What a command is to write, looked at before minutes are spent on what is to go into it."""

from __future__ import annotations

from pathlib import Path

from surgery.checkpoint import check_replaceable
from surgery.files import as_path, usable_target

__all__ = ["check_file", "check_folder"]


def check_file(option: str, path: Path | None) -> None:
    """Refuse a file that could not be written in the end. A device or pipe can be.

    Raises:
        SurgeryValueError: a folder, or its folder does not exist.
        OSError: nobody may look there.
    """
    if path is not None and (path.is_file() or path.is_dir() or not path.exists()):
        usable_target(option, path)


def check_folder(option: str, path: Path | None) -> None:
    """Refuse a folder that ``surgery.save`` could not write or replace in the end.

    Raises:
        SurgeryValueError: something else is there, or the folder that it is to stand in does not exist.
        OSError: nobody may look there.
    """
    if path is None:
        return
    folder = as_path(option, path)
    check_replaceable(folder)
    if not folder.exists():
        usable_target(option, folder.resolve())
