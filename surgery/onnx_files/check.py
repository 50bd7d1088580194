"""The proof of a written ONNX file: valid, runs in onnxruntime, and computes what the network computes that has its merged weights."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from passes import Reconstruct
from passes.errors import ParityError, SurgeryError
from surgery.export.common import TOLERANCE, gaps, labels_within
from surgery.export.onnx import onnx_session, run_session
from surgery.onnx_files.feeds import Feed, noise_like, shaken, shuffled
from surgery.onnx_files.files import check_valid, copied, read_graph, write_model
from surgery.onnx_files.graph import tensor_dtype
from surgery.onnx_files.host import OnnxHost

if TYPE_CHECKING:
    from onnx import ModelProto

__all__ = ["compare_files", "merged_copy", "prove"]

MAGNIFIED = 8  # times what a network makes of a change in the last digit of its inputs: its layers round as well
MOST = 0.05  # of the largest value, or of all labels: what is further off is wrong, whatever the network makes of its inputs


def compare_files(written: Path, source: Path, feeds: Sequence[Feed]) -> tuple[float, float]:
    """Largest of the ``gaps`` between two files over the inputs: of numbers, and of labels.

    Raises:
        SurgeryError: onnxruntime refuses one of them, or these inputs.
    """
    after, before = onnx_session(written), onnx_session(source)
    found = []
    for feed in feeds:
        expected = _run(before, feed, source)
        found.append(gaps(_run(after, feed, written), expected))
    return max(numbers for numbers, _ in found), max(labels for _, labels in found)


def prove(written: Path, merged: ModelProto | None, source: Path, feed: Feed, *, external: bool) -> tuple[float, float]:
    """Compare a written file with the network whose chains are merged into single layers, and with the file it was made from.

    Args:
        written: the file.
        merged: the network in it, its chains merged; None where it must compute the same as the source.
        source: the file that it was made from.
        feed: inputs; noise like them is tried as well, or where the network refuses that, their own numbers in another order.
        external: keep weights in files of their own.

    Returns:
        The difference to the merged network, which is rounding alone, and that to the source, which is what truncation did; of integer and bool
        outputs the share of entries that differ.

    Raises:
        ParityError: the first is beyond the tolerance of the coarsest dtype, and beyond what the network makes of a change in the last digit of
            its inputs.
        SurgeryError: a file is not valid, or does not run.
    """
    check_valid(written, source)
    feeds = [feed, *_others_like(feed, source)]
    change = compare_files(written, source, feeds)
    if merged is None:
        rounding, what = change, "the file"
    else:
        with tempfile.TemporaryDirectory() as folder:
            whole = Path(folder) / "merged.onnx"
            write_model(merged, whole, external=external)
            rounding, what = compare_files(written, whole, feeds), "the network with its chains merged"
    tolerance = TOLERANCE[_coarsest(source)]
    if not _within(rounding, (tolerance, labels_within(tolerance))) and not _within(rounding, allowed := _allowed(source, feeds)):
        by_labels = rounding[0] <= allowed[0]
        told = f"in {rounding[1]:.3g} of the entries of an integer output" if by_labels else f"by {rounding[0]:.3g} of the largest value"
        raise ParityError(
            f"{source}: {what} and what was made of it differ {told}, the tolerance is {allowed[by_labels]:.3g}"
            f"{_own_noise(source, feeds)}; check=False writes it unchecked"
        )
    return max(rounding), max(change)


def merged_copy(model: ModelProto) -> ModelProto:
    """The model with every chain merged into one layer."""
    copy = copied(model)
    Reconstruct()(OnnxHost(copy))
    return copy


def _run(session: object, feed: Feed, file: Path) -> list[Tensor]:
    try:
        return run_session(session, feed)
    except SurgeryError as error:
        raise SurgeryError(f"{file.name}: {error}; give example_inputs that the network takes, or write it unchecked with check=False") from error


def _others_like(feed: Feed, file: Path) -> list[Feed]:
    """Other inputs that a network takes: noise, or else its own numbers in another order. None where some say sizes and may be no others."""
    session = onnx_session(file)
    for other in (noise_like(feed, seed=1), shuffled(feed, seed=1)):
        with suppress(SurgeryError):
            run_session(session, other)
            return [other]
    return []


def _within(found: tuple[float, float], allowed: tuple[float, float]) -> bool:
    return found[0] <= allowed[0] and found[1] <= allowed[1]


def _own_noise(file: Path, feeds: Sequence[Feed]) -> str:
    """What to add where a file gives something else each time."""
    own = max(compare_files(file, file, feeds))
    return f"; the network itself differs by {own:.3g} from call to call (it draws random numbers)" if own else ""


def _allowed(file: Path, feeds: Sequence[Feed]) -> tuple[float, float]:
    """The tolerances; more where the network itself magnifies a change in the last digit of its inputs (a saturated output does, a near tie too)."""
    dtype = _coarsest(file)
    session = onnx_session(file)
    numbers, labels = 0.0, 0.0
    for feed in feeds:
        with suppress(SurgeryError):  # inputs that say sizes may be no others
            own = gaps(run_session(session, shaken(feed, 2 * torch.finfo(dtype).eps)), run_session(session, feed))
            numbers, labels = max(numbers, own[0]), max(labels, own[1])
    return max(TOLERANCE[dtype], min(MAGNIFIED * numbers, MOST)), max(labels_within(TOLERANCE[dtype]), min(MAGNIFIED * labels, MOST))


def _coarsest(file: Path) -> torch.dtype:
    """The coarsest dtype of the weights in a file."""
    model = read_graph(file)
    tensors = [
        *model.graph.initializer,
        *(a.t for node in model.graph.node if node.op_type == "Constant" for a in node.attribute if a.name == "value"),
    ]
    dtypes = {tensor_dtype(tensor.data_type) for tensor in tensors if math.prod(tensor.dims) > 1} | {torch.float32}
    return max((dtype for dtype in dtypes if dtype in TOLERANCE), key=lambda dtype: TOLERANCE[dtype])
