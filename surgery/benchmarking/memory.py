"""What the tensors of one call take at once."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from passes.parity import tensors_in
from surgery.storages import Storages, bytes_of

__all__ = ["Measure", "of_tensors", "on_cuda"]

Measure = Callable[[Callable[[], object], nn.Module, Any], int]
"""Bytes, of (a call, its network, its inputs)."""


def of_tensors(call: Callable[[], object], network: nn.Module, example_inputs: Any) -> int:
    """Parameters, buffers, inputs, and the most that all other tensors hold at once, as each operator of torch has made its own.

    What a kernel takes for itself and gives back is not seen.
    """
    held = _held(network, example_inputs)
    made = Storages(held)
    with made:
        call()
    return bytes_of(held) + made.most


def on_cuda(call: Callable[[], object], network: nn.Module, example_inputs: Any) -> int:
    """Parameters, buffers, inputs, and the most that torch's allocator gave out beside during the call."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    torch.cuda.synchronize()
    return bytes_of(_held(network, example_inputs)) + torch.cuda.max_memory_allocated() - before


def _held(network: nn.Module, example_inputs: Any) -> list[Tensor]:
    return [*itertools.chain(network.parameters(), network.buffers(), tensors_in(example_inputs))]
