"""What layers, chains and networks cost. A multiply-accumulate is one MAC; FLOPs are twice as many."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from math import prod
from typing import Any

import torch

from passes.factorization import Factorization
from passes.geometry import Geometry, PieceShape
from passes.kinds import kind_of
from passes.running import uncompiled
from passes.site import Call, Site

__all__ = [
    "MacCounter",
    "chain_macs",
    "chain_params",
    "count_macs",
    "macs_under",
    "params_under",
    "site_macs",
    "site_params",
    "sizes_of",
    "threads_set",
]


def site_params(site: Site) -> int:
    """Parameters of the original layer, bias included."""
    return PieceShape("", site.geometry, site.bias is not None).params


def site_macs(site: Site) -> int | None:
    """MACs of all calls of the original layer in one forward pass, and of those it stands for; None where the calls are not known."""
    if site.calls is None:
        return None
    return sum(each.geometry.macs(call.input_shape) for each in (site, *site.others) for call in each.calls or ())


def macs_under(site: Site, factorization: Factorization | None) -> int:
    """MACs of a layer, and of those it stands for, over all calls under a factorization, or (None) as it is; 0 where the calls are not known."""
    if factorization is None:
        return site_macs(site) or 0
    chains = [(kind_of(factorization).shapes(each.geometry, factorization, each.bias is not None), each.calls) for each in (site, *site.others)]
    return sum(chain_macs(shapes, calls) or 0 for shapes, calls in chains)


def params_under(site: Site, factorization: Factorization | None) -> int:
    """Parameters of a layer under a factorization, or (None) as it is."""
    if factorization is None:
        return site_params(site)
    return chain_params(kind_of(factorization).shapes(site.geometry, factorization, site.bias is not None))


def chain_params(shapes: Sequence[PieceShape]) -> int:
    """Parameters of a chain, bias included."""
    return sum(shape.params for shape in shapes)


def chain_macs(shapes: Sequence[PieceShape], calls: Sequence[Call] | None) -> int | None:
    """MACs of a chain over all calls, each layer at the resolution that it runs on (Elhoushi et al. 2019, denominator of equation 11)."""
    if calls is None:
        return None
    total = 0
    for call in calls:
        size = call.input_shape
        for shape in shapes:
            total += shape.geometry.macs(size)
            size = _size_after(shape.geometry, size, call)
    return total


def _size_after(geometry: Geometry, size: tuple[int, ...], call: Call) -> tuple[int, ...]:
    """Shape after one layer of a chain. A caller may have asked a transposed one for a size: then it is the call's where that layer extends."""
    after = geometry.output_shape(size)
    if not geometry.transposed or len(call.output_shape) != len(after):
        return after
    lead = len(after) - geometry.dims
    sizes = [call.output_shape[lead + axis] if geometry.extends_in(axis) else after[lead + axis] for axis in range(geometry.dims)]
    return (*after[:lead], *sizes)


def sizes_of(site: Site) -> list[tuple[int, ...]]:
    """Input shapes of the calls that have anything to compute: a detector that finds nothing calls its last layers on nothing."""
    return [call.input_shape for call in site.calls or () if all(call.input_shape)]


Size = Sequence[int]


class MacCounter:
    """Holds ``macs`` of a network once ``count_macs`` has ended."""

    macs: int = 0


class _OneModule:
    """Stands for the counter's tracker of modules, whose hooks forbid a network to differentiate in its forward pass; only the total is asked for."""

    parents = frozenset({"Global"})

    def __enter__(self) -> None:
        pass

    def __exit__(self, *error: object) -> None:
        pass


@contextmanager
def count_macs() -> Iterator[MacCounter]:
    """Count all MACs that run inside, attention included, by ``torch.utils.flop_counter``."""
    from torch.utils.flop_counter import FlopCounterMode

    counter = MacCounter()
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)  # its fused kernels are invisible to the counter
    mode = FlopCounterMode(display=False, custom_mapping=_unknown_to_torch())
    mode.mod_tracker = _OneModule()  # type: ignore[assignment]
    try:
        with mode, uncompiled():
            yield counter
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
    counter.macs = mode.get_total_flops() // 2


def _unknown_to_torch() -> dict[Any, Callable[..., int]]:
    """Operators of CPUs that its counter passes over: attention, and each layer and direction of an LSTM, forward and backward."""
    from torch.utils.flop_counter import sdpa_backward_flop_count, sdpa_flop_count

    def attention(query: Size, key: Size, value: Size, *_: Any, **__: Any) -> int:
        return int(sdpa_flop_count(query, key, value))  # type: ignore[no-untyped-call]

    def recurrent(x: Size, inputs: Size, states: Size, *_: Any, **__: Any) -> int:
        return 2 * prod(x[:2]) * (prod(inputs) + prod(states))

    def attention_backward(slope: Size, query: Size, key: Size, value: Size, *_: Any, **__: Any) -> int:
        return int(sdpa_backward_flop_count(slope, query, key, value))  # type: ignore[no-untyped-call]

    def recurrent_backward(x: Size, inputs: Size, states: Size, *_: Any, **__: Any) -> int:
        return 2 * recurrent(x, inputs, states)

    named: dict[str, Callable[..., int]] = {
        "_scaled_dot_product_flash_attention_for_cpu": attention,
        "_scaled_dot_product_flash_attention_for_cpu_backward": attention_backward,
        "mkldnn_rnn_layer": recurrent,
        "mkldnn_rnn_layer_backward": recurrent_backward,
    }
    return {getattr(torch.ops.aten, name): formula for name, formula in named.items() if hasattr(torch.ops.aten, name)}


@contextmanager
def threads_set(wanted: int | None) -> Iterator[None]:
    """Torch's number of threads inside; afterwards as it was."""
    before = torch.get_num_threads()
    try:
        if wanted is not None:
            torch.set_num_threads(wanted)
        yield
    finally:
        torch.set_num_threads(before)
