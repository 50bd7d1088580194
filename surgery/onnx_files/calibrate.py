"""What the layers of an ONNX file see, from batches of inputs: second moments, by onnxruntime."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy

from passes.errors import SurgeryError, SurgeryValueError
from passes.site import Site
from surgery.calibration import Calibration, Moments, batches_of
from surgery.onnx_files.feeds import Feed, example_feed
from surgery.onnx_files.graph import true_inputs
from surgery.onnx_files.watch import watched

if TYPE_CHECKING:
    from onnx import ModelProto

__all__ = ["calibrate_file", "calibration_feeds"]


def calibration_feeds(model: ModelProto, calibration: Any) -> list[Feed]:
    """The batches that a user gave, each with a tensor for every input.

    Raises:
        SurgeryValueError, SurgeryTypeError: they are none, or do not fit.
    """
    batches = [calibration] if isinstance(calibration, numpy.ndarray) else batches_of(calibration, needed=len(true_inputs(model.graph)))
    if any(batch is None for batch in batches):
        raise SurgeryValueError("calibration: a batch is None")
    feeds = [example_feed(model, batch, argument=f"calibration: batch {number}") or {} for number, batch in enumerate(batches)]
    for number, feed in enumerate(feeds):
        if feed and not any(tensor.numel() for tensor in feed.values()):
            raise SurgeryValueError(f"calibration: batch {number} holds no example")
    return feeds


def calibrate_file(model: ModelProto, feeds: Sequence[Feed], sites: Sequence[Site], reads: Mapping[str, str], *, external: bool) -> Calibration:
    """Second moments of what each layer sees. What the output makes of the layers' is measured by ``weighed``: a file cannot be differentiated.

    Args:
        model: the file's; left as it is.
        feeds: batches of inputs.
        sites: those to look at; chains and kept layers are left out.
        reads: by name of a site the value that it reads.
        external: write weights in a file of their own.

    Raises:
        SurgeryValueError: the batches give numbers that are not finite.
        SurgeryError: onnxruntime cannot run the file on them.
    """
    seen = {site.name: Moments(site.geometry) for site in sites if site.chain is None and site.keep is None}
    examples = 0
    with watched(model, list(dict.fromkeys(reads[name] for name in seen)), external=external) as run:
        for number, feed in enumerate(feeds):
            try:
                values = run(feed)
            except SurgeryError as error:
                raise SurgeryError(f"calibration: batch {number}: {error}") from error
            for name, moments in seen.items():
                if moments.geometry.fits(tuple(values[reads[name]].shape)):
                    moments.saw(values[reads[name]])
            examples += next((len(tensor) for tensor in feed.values() if tensor.ndim), 0)
    for site in sites:
        if site.tied_to in seen and site.name in seen:  # they are cut together
            seen[site.tied_to].add(seen[site.name])
    return Calibration(metrics={name: moments.metric(name, examples) for name, moments in seen.items() if moments.positions}, examples=examples)
