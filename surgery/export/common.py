"""What all exporters share: a private network in eval mode, fresh inputs, the check, and files that appear whole or not at all."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from passes.errors import SurgeryValueError
from passes.parity import assert_parity, private_inputs, tensors_in
from passes.running import private_copy, run
from surgery.decompose import usable_model
from surgery.files import temporary_beside

__all__ = ["ExportReport", "check_network", "fresh_inputs", "installed", "network_to_export", "quiet"]

TOLERANCE = {torch.float64: 1e-8, torch.float32: 1e-4, torch.bfloat16: 6e-2, torch.float16: 1e-2}


@dataclass(frozen=True, slots=True, kw_only=True)
class ExportReport:
    """What an export gave.

    Attributes:
        path: the file.
        format: ``"onnx"`` or ``"torchscript"``.
        size_bytes: of the file and of external data beside it.
        difference: largest max |a - b| / max |b| over the checks, None where none was made.
        batch_sizes: on which the file was checked.
        opset: ONNX operator set, None for other formats.
    """

    path: str
    format: str
    size_bytes: int
    difference: float | None
    batch_sizes: tuple[int, ...]
    opset: int | None = None

    def to_data(self) -> dict[str, Any]:
        return asdict(self)

    def __str__(self) -> str:
        checked = "not checked"
        if self.difference is not None:
            sizes = " and ".join(map(str, self.batch_sizes))
            checked = f"agrees with the network to {self.difference:.1e} (batch {sizes})"
        return f"{self.path}: {self.format}, {self.size_bytes / 1e6:.2f} MB, {checked}"


def network_to_export(model: nn.Module, path: str | os.PathLike[str], example_inputs: Any) -> tuple[nn.Module, Path]:
    """A private copy in eval mode, proved to accept the inputs, and a path whose folder exists."""
    usable_model(model)
    target = Path(path)
    if target.is_dir():
        raise SurgeryValueError(f"path: {target} is a folder; give the name of a file in it")
    if not target.parent.is_dir():
        raise SurgeryValueError(f"path: the folder {target.parent} does not exist; make it first")
    network = private_copy(model).eval()
    with torch.no_grad():
        run(network, example_inputs)
    return network, target


def fresh_inputs(example_inputs: Any, generator: torch.Generator, batch: int | None = None) -> Any:
    """New inputs of the same structure, dtypes and shapes: normal noise for floats, the example's own values shuffled for others.

    With ``batch``, the first dimension of every tensor takes that size.
    """
    import copy

    memo: dict[int, Any] = {}
    for tensor in tensors_in(example_inputs):
        shape = tensor.shape if batch is None or tensor.ndim == 0 else (batch, *tensor.shape[1:])
        count = torch.Size(shape).numel()
        if tensor.is_floating_point():
            fresh = torch.randn(shape, generator=generator, dtype=torch.float32, device="cpu").to(tensor)
        else:
            pick = torch.randint(tensor.numel(), (count,), generator=generator, device="cpu")
            fresh = tensor.detach().flatten().cpu()[pick].reshape(shape).to(tensor)
        memo[id(tensor)] = fresh
    return copy.deepcopy(example_inputs, memo)


def check_network(
    network: nn.Module, exported: Callable[[Any], Any], example_inputs: Any, batches: tuple[int | None, ...], what: str
) -> tuple[float, tuple[int, ...]]:
    """Largest difference between a network and its exported form on fresh inputs of each batch size, and the sizes.

    Raises:
        ParityError: beyond the tolerance of the outputs' dtype.
    """
    generator = torch.Generator().manual_seed(20)
    worst, sizes = 0.0, []
    for batch in batches:
        inputs = fresh_inputs(example_inputs, generator, batch)
        with torch.no_grad():
            expected = run(network, inputs)
        floats = [t.dtype for t in tensors_in(expected) if t.is_floating_point()]
        tolerance = max((TOLERANCE.get(dtype, 1e-4) for dtype in floats), default=0.0)
        got = exported(private_inputs(inputs))
        worst = max(worst, assert_parity(got, list(tensors_in(expected)), tolerance=tolerance, what=what))
        first = next((t for t in tensors_in(inputs) if t.ndim), None)
        sizes.append(1 if first is None else first.shape[0])
    return worst, tuple(sizes)


@contextmanager
def quiet() -> Iterator[None]:
    """Without the warnings by which torch's exporters announce their own deprecations and internals."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@contextmanager
def installed(target: Path) -> Iterator[Path]:
    """A file name in a temporary folder; when the block ends without an error, all files written beside it move to their places."""
    with temporary_beside(target) as folder:
        work = folder / target.name
        yield work
        others = sorted(p for p in folder.iterdir() if p != work)
        for file in (*others, work):
            os.replace(file, target.parent / file.name)


def total_size(file: Path) -> int:
    """Bytes of all files in a temporary export folder."""
    return sum(p.stat().st_size for p in file.parent.iterdir())


def tensors_or_error(example_inputs: Any) -> list[Tensor]:
    tensors = list(tensors_in(example_inputs))
    if not tensors:
        raise SurgeryValueError("example_inputs: they hold no tensor, so nothing can be exported")
    return tensors
