"""The proof of a written ONNX file: valid, runs in onnxruntime, and computes what the network computes that has its merged weights."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from passes import Reconstruct
from passes.errors import ParityError, SurgeryError
from passes.parity import difference
from surgery.export.common import TOLERANCE
from surgery.export.onnx import onnx_session, run_session
from surgery.onnx_files.feeds import Feed, noise_like, shaken
from surgery.onnx_files.files import check_valid, copied, read_graph, write_model
from surgery.onnx_files.graph import tensor_dtype
from surgery.onnx_files.host import OnnxHost

if TYPE_CHECKING:
    from onnx import ModelProto

__all__ = ["compare_files", "merged_copy", "prove"]

MAGNIFIED = 8  # times what a network makes of a change in the last digit of its inputs: its layers round as well
MOST = 0.05  # of the largest value: what is further off is wrong, whatever the network makes of its inputs


def compare_files(written: Path, source: Path, feeds: Sequence[Feed]) -> float:
    """Largest max |a - b| / max |b| between two files over the inputs.

    Raises:
        SurgeryError: onnxruntime refuses one of them, or these inputs.
    """
    after, before = onnx_session(written), onnx_session(source)
    worst = 0.0
    for feed in feeds:
        expected = _run(before, feed, source)
        worst = max(worst, difference(_run(after, feed, written), expected))
    return worst


def prove(written: Path, merged: ModelProto | None, source: Path, feed: Feed, *, external: bool) -> tuple[float, float]:
    """Compare a written file with the network whose chains are merged into single layers, and with the file it was made from.

    Args:
        written: the file.
        merged: the network in it, its chains merged; None where it must compute the same as the source.
        source: the file that it was made from.
        feed: inputs; noise like them is tried as well.
        external: keep weights in files of their own.

    Returns:
        The difference to the merged network, which is rounding alone, and that to the source, which is what truncation did.

    Raises:
        ParityError: the first is beyond the tolerance of the coarsest dtype, and beyond what the network makes of a change in the last digit of
            its inputs.
        SurgeryError: a file is not valid, or does not run.
    """
    check_valid(written, source)
    feeds = [feed, noise_like(feed, seed=1)]
    change = compare_files(written, source, feeds)
    if merged is None:
        rounding, what = change, "the file"
    else:
        with tempfile.TemporaryDirectory() as folder:
            whole = Path(folder) / "merged.onnx"
            write_model(merged, whole, external=external)
            rounding, what = compare_files(written, whole, feeds), "the network with its chains merged"
    dtype = _coarsest(source)
    if not rounding <= TOLERANCE[dtype] and not rounding <= (allowed := _allowed(source, feeds, dtype)):
        raise ParityError(
            f"{source}: {what} and what was made of it differ by {rounding:.3g} of the largest value, the tolerance is {allowed:.3g}"
            f"{_own_noise(source, feeds)}; check=False writes it unchecked"
        )
    return rounding, change


def merged_copy(model: ModelProto) -> ModelProto:
    """The model with every chain merged into one layer."""
    copy = copied(model)
    Reconstruct()(OnnxHost(copy))
    return copy


def _run(session: object, feed: Feed, file: Path) -> list[Tensor]:
    try:
        return run_session(session, feed)
    except SurgeryError as error:
        raise SurgeryError(f"{file.name}: {error}; give example_inputs that the network takes") from error


def _own_noise(file: Path, feeds: Sequence[Feed]) -> str:
    """What to add where a file gives something else each time."""
    own = compare_files(file, file, feeds)
    return f"; the network itself differs by {own:.3g} from call to call (it draws random numbers)" if own else ""


def _allowed(file: Path, feeds: Sequence[Feed], dtype: torch.dtype) -> float:
    """The tolerance for a dtype; more where the network itself magnifies a change in the last digit of its inputs (a saturated output does)."""
    last = 2 * torch.finfo(dtype).eps
    session = onnx_session(file)
    own = [difference(_run(session, shaken(feed, last), file), _run(session, feed, file)) for feed in feeds]
    return max(TOLERANCE[dtype], min(MAGNIFIED * max(own), MOST))


def _coarsest(file: Path) -> torch.dtype:
    """The coarsest dtype of the weights in a file."""
    model = read_graph(file)
    tensors = [
        *model.graph.initializer,
        *(a.t for node in model.graph.node if node.op_type == "Constant" for a in node.attribute if a.name == "value"),
    ]
    dtypes = {tensor_dtype(tensor.data_type) for tensor in tensors if math.prod(tensor.dims) > 1} | {torch.float32}
    return max((dtype for dtype in dtypes if dtype in TOLERANCE), key=lambda dtype: TOLERANCE[dtype])
