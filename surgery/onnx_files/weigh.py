"""What the outputs of an ONNX file make of those of its layers: measured, by changing each layer a little, as a file cannot be differentiated."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from passes.metric import Metric, alike
from passes.site import Site
from surgery.calibration import LEAST, Calibration
from surgery.onnx_files.feeds import Feed
from surgery.onnx_files.host import OnnxHost
from surgery.onnx_files.watch import watched
from surgery.progress import tracked

if TYPE_CHECKING:
    from onnx import ModelProto

__all__ = ["weighed"]

NOISE = 0.05  # of a layer's output, root mean square
MOST = 32  # batches that each layer is tried on


def weighed(learnt: Calibration, model: ModelProto, host: OnnxHost, sites: Sequence[Site], feeds: Sequence[Feed], *, external: bool) -> Calibration:
    """What was learnt of the layers' inputs, and a weighting of each layer's outputs by which errors of different layers can be added up.

    White noise is added to one weight at a time, of ``NOISE`` of what the layer gives on the batches; the relative squared change of the network's
    outputs, for each squared change of the layer's, is the weighting, the same for all its channels.

    Raises:
        SurgeryError: onnxruntime cannot run the file with weights that may change.
    """
    tried = {site.name: site for site in sites if site.name in learnt.metrics}
    outputs = [value.name for value in model.graph.output]
    some = feeds[:: -(-len(feeds) // MOST)]
    generator = torch.Generator().manual_seed(0)
    energies: dict[str, float] = {}
    changed: dict[str, tuple[str, Tensor]] = {}
    for name, site in tried.items():
        weight = site.weight
        noise = torch.randn(weight.shape, generator=generator, device="cpu")
        whole, part = (_energy(site, each, learnt.metrics[name]) for each in (weight, noise))
        size = NOISE**2 * whole / part if part else 0.0
        energies[name], changed[name] = size * part, host.written(name, weight.float() + size**0.5 * noise)
    changes = dict.fromkeys(tried, 0.0)
    with watched(model, (), external=external, loose=[constant for constant, _ in changed.values()]) as run:
        for feed in tracked(some, "weighing layers"):  # outputs of one batch are held, and all changed weights
            expected = _floats(run(feed), outputs)
            for name, (constant, other) in changed.items():
                changes[name] += _distance(_floats(run({**feed, constant: other}), outputs), expected)
    found = {name: changes[name] / len(some) / energies[name] if energies[name] else 0.0 for name in tried}
    least = LEAST * max(found.values(), default=0.0)
    return replace(learnt, metrics={name: _with_weighting(metric, tried, name, max(found[name], least)) for name, metric in learnt.metrics.items()})


def _with_weighting(metric: Metric, sites: Mapping[str, Site], name: str, weighting: float) -> Metric:
    return replace(metric, outputs=alike(sites[name].geometry, weighting)) if weighting else metric


def _energy(site: Site, weight: Tensor, metric: Metric) -> float:
    """Mean square that a weight makes of the layer's inputs, summed over its channels."""
    blocks = site.geometry.forward_blocks(weight.double())
    blocks = blocks.reshape(*blocks.shape[:3], -1)
    return float(torch.einsum("goip,gij,gojp->", blocks, metric.inputs, blocks))


def _floats(values: Mapping[str, Tensor], names: Sequence[str]) -> list[Tensor]:
    return [values[name].double() for name in names if name in values and values[name].is_floating_point()]


def _distance(values: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """Relative squared difference, summed over the outputs; as far as they can be compared where sizes depend on the numbers or some are infinite."""
    total = 0.0
    for a, b in zip(values, expected, strict=True):
        if a.shape == b.shape:
            told = a.isfinite() & b.isfinite()
            total += float((a - b)[told].square().sum() / b[told].square().sum().clamp(min=1e-300))
    return total
