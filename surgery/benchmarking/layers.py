"""Which chain pays: every layer that differs between two networks, timed by itself beside what stands for it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from passes import host_for, observe
from passes.chain import is_channels_last
from passes.errors import SurgeryValueError
from passes.parity import tensors_in
from passes.site import Site
from surgery.benchmarking.result import LayerResult
from surgery.cost import sizes_of
from surgery.cost.calls import ON_PROCESSORS
from surgery.cost.chains import RUNTIMES, Setup
from surgery.cost.profile import Entry, TimedShape, together
from surgery.cost.timing import time_shapes

__all__ = ["check_runtimes", "layer_results"]


def check_runtimes(names: Sequence[str]) -> None:
    """Refuse runtimes that have no clock for single layers.

    Raises:
        SurgeryValueError: one of them has none.
    """
    for name in names:
        if name not in RUNTIMES:
            raise SurgeryValueError(f"layers: single layers are timed in {', '.join(RUNTIMES)} only, not in {name!r}; leave it out, or layers=False")


def layer_results(before: nn.Module, after: nn.Module, example_inputs: Any, runtimes: Sequence[str]) -> tuple[LayerResult, ...]:
    """For each runtime a row for every layer that has the same name in both networks and is another in the second.

    Both are timed on noise of the input shapes that the layer of the first network sees, all of a runtime's in turn
    (``surgery.cost.timing.time_shapes``), in torch's current number of threads.

    Raises:
        SurgeryValueError: no layer differs.
        SurgeryError: a runtime refuses a layer.
    """
    pairs = _pairs(before, after, example_inputs)
    if not pairs:
        raise SurgeryValueError("layers: no layer of the first network is another in the second under the same name; there is nothing to compare")
    device = next((str(t.device) for t in (*before.parameters(), *tensors_in(example_inputs))), "cpu")
    found: list[LayerResult] = []
    for runtime in dict.fromkeys(runtimes):
        shapes = {name: (_shapes(old, old, runtime), _shapes(new, old, runtime)) for name, (old, new) in pairs.items()}
        wanted = [shape for both in shapes.values() for side in both for shape in side]
        times, _ = time_shapes(wanted, Setup(runtime=runtime, threads=torch.get_num_threads(), device=device))
        found += [_result(name, runtime, times, *shapes[name]) for name in pairs]
    return tuple(found)


def _pairs(before: nn.Module, after: nn.Module, example_inputs: Any) -> dict[str, tuple[Site, Site]]:
    old, new = _sites(before, example_inputs), _sites(after, example_inputs)
    return {name: (old[name], new[name]) for name in old if name in new and sizes_of(old[name]) and _layers(old[name]) != _layers(new[name])}


def _sites(network: nn.Module, example_inputs: Any) -> dict[str, Site]:
    return {site.name: site for site in host_for(network, observed=observe(network, example_inputs), effective_weights=True).sites()}


def _layers(site: Site) -> tuple[Any, ...]:
    return (site.geometry,) if site.chain is None else tuple(piece.geometry for piece in site.pieces)


def _shapes(site: Site, called: Site, runtime: str) -> list[TimedShape]:
    dtype = str(site.dtype).removeprefix("torch.")
    weight = called.weight if called.chain is None else called.pieces[-1].weight
    last = runtime not in ON_PROCESSORS and is_channels_last(weight)
    return [TimedShape(_layers(site), size, dtype, last) for size in sizes_of(called)]


def _result(name: str, runtime: str, times: dict[str, Entry], old: Sequence[TimedShape], new: Sequence[TimedShape]) -> LayerResult:
    before, after = (together(times[shape.key] for shape in shapes) for shapes in (old, new))
    return LayerResult(
        runtime=runtime,
        name=name,
        chain=new[0].key.partition(" | ")[2],
        before_ms=1e3 * before.seconds,
        after_ms=1e3 * after.seconds,
        spread=2 * (before.spread + after.spread) * before.seconds / after.seconds,
        macs_before=sum(shape.macs for shape in old),
        macs_after=sum(shape.macs for shape in new),
    )
