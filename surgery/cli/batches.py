"""``--calibration``: inputs of the user's own, from files that ``numpy.save`` and ``numpy.savez`` write."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from passes.errors import SurgeryValueError
from passes.running import first_line

if TYPE_CHECKING:
    import argparse

    from torch import Tensor

__all__ = ["add_calibration_argument", "calibration_of"]

HELP = "inputs to choose ranks and factors for: a batch in a .npy file, or in a .npz with an array for every input by name, or a folder of such files"


def add_calibration_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--calibration", metavar="PATH", type=Path, help=HELP)


def calibration_of(options: argparse.Namespace) -> list[Tensor | dict[str, Tensor]] | None:
    """The batches that ``--calibration`` names, those of a folder in the order of their names; None without it. Double precision becomes single.

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
        with file.open("rb") as stream:
            found: Any = numpy.load(stream, allow_pickle=False)
            arrays = {"": found} if isinstance(found, numpy.ndarray) else dict(found)
    except OSError:
        raise
    except Exception as error:  # numpy's readers, zipfile and zlib have no family of errors of their own
        raise SurgeryValueError(f"--calibration: {file}: no batch that numpy.save or numpy.savez wrote: {first_line(error)}") from error
    tensors = {name: _tensor(array, file) for name, array in arrays.items()}
    return tensors[""] if list(tensors) == [""] else tensors


def _tensor(array: Any, file: Path) -> Tensor:
    import numpy
    import torch

    if not isinstance(array, numpy.ndarray) or array.dtype.kind not in "fiub":
        what = f"an array of {array.dtype}" if isinstance(array, numpy.ndarray) else "something that is no array"
        raise SurgeryValueError(f"--calibration: {file}: {what} in it is no batch of inputs; write real numbers by numpy.save")
    native = array.astype(numpy.float32 if array.dtype.kind == "f" and array.dtype.itemsize > 4 else array.dtype.newbyteorder("="))
    return torch.from_numpy(native)
