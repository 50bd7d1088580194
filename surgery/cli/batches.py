"""``--calibration``: inputs of the user's own, from files that ``numpy.save`` and ``numpy.savez`` write."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from passes.errors import SurgeryValueError

if TYPE_CHECKING:
    import argparse

    from torch import Tensor

__all__ = ["add_calibration_argument", "calibration_of"]

HELP = "inputs to choose ranks and factors for: a batch in a .npy file, or in a .npz with an array for every input by name, or a folder of such files"


def add_calibration_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--calibration", metavar="FILE", type=Path, help=HELP)


def calibration_of(options: argparse.Namespace) -> list[Tensor | dict[str, Tensor]] | None:
    """The batches that ``--calibration`` names, those of a folder in the order of their names; None without it.

    Raises:
        SurgeryValueError: a file holds no array of numbers, or a folder no file.
        OSError: one cannot be read.
    """
    path: Path | None = options.calibration
    if path is None:
        return None
    files = sorted(each for each in path.iterdir() if each.suffix in (".npy", ".npz")) if path.is_dir() else [path]
    if not files:
        raise SurgeryValueError(f"--calibration: {path}: there is no .npy or .npz file in this folder")
    return [_batch_in(file) for file in files]


def _batch_in(file: Path) -> Tensor | dict[str, Tensor]:
    import numpy

    try:
        found: Any = numpy.load(file, allow_pickle=False)
        return _tensor(found) if isinstance(found, numpy.ndarray) else {name: _tensor(found[name]) for name in found.files}
    except (ValueError, TypeError, EOFError) as error:
        raise SurgeryValueError(f"--calibration: {file}: not an array that numpy.save wrote, or several by numpy.savez: {error}") from error


def _tensor(array: Any) -> Tensor:
    import torch

    return torch.from_numpy(array.copy())
