"""Chains of an ONNX file corrected for the errors made before them, as ``surgery.correction`` does it with those of a module."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import torch

from surgery.correction import STAGES, Refit, can_be_refitted
from surgery.onnx_files.feeds import Feed
from surgery.onnx_files.host import OnnxHost
from surgery.onnx_files.watch import watched
from surgery.progress import tracked

if TYPE_CHECKING:
    from onnx import ModelProto

__all__ = ["correct_file"]


@torch.no_grad()
def correct_file(original: ModelProto, host: OnnxHost, names: Iterable[str], feeds: Sequence[Feed], *, external: bool) -> dict[str, float]:
    """Refit the last layer of each chain, in place, in the order in which they stand in the graph.

    For every chain the inputs of its last layer, as the file is then, and the outputs that its layer had in the original give the moments. Weights
    and biases that something else reads too stay as they are. Where there are many chains they are taken in ``STAGES`` groups: every group is two
    runs of all batches, no further than to its last chain.

    Args:
        original: the model before the cut.
        host: of the decomposed model.
        names: of the chains.
        feeds: batches of inputs.
        external: write weights in a file of their own.

    Returns:
        For each layer that could be corrected |Y - Y'|_F / |Y|_F of its outputs over the batches, with the errors made before it.

    Raises:
        SurgeryError: onnxruntime cannot run one of the models.
    """
    ends = {name: end for name in names if (end := host.end(name)) is not None and can_be_refitted(end.piece.geometry)}
    ordered = sorted(ends, key=lambda name: ends[name].node)
    size = max(1, -(-len(ordered) // STAGES))
    errors: dict[str, float] = {}
    for start in tracked(range(0, len(ordered), size), "correcting"):
        group = ordered[start : start + size]
        sums = {name: Refit(ends[name].piece, lower=ends[name].lower) for name in group}
        wanted, given = [ends[name].gives for name in group], [ends[name].reads for name in group]
        with watched(original, wanted, external=external, only=True) as before, watched(host.model, given, external=external, only=True) as after:
            for feed in feeds:
                made, seen = before(feed), after(feed)
                for name in group:
                    sums[name].add(seen[ends[name].reads], made[ends[name].gives])
        for name in group:
            found = sums[name].solve()
            if found is not None:
                host.put(name, found[0])
                errors |= {} if found[1] is None else {name: found[1]}
    return errors
