"""What the tensors of one call take at once."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from passes.parity import tensors_in

__all__ = ["Measure", "of_tensors", "on_cuda"]

Measure = Callable[[Callable[[], object], nn.Module, Any], int]
"""Bytes, of (a call, its network, its inputs)."""


def of_tensors(call: Callable[[], object], network: nn.Module, example_inputs: Any) -> int:
    """Parameters, buffers, inputs, and the most that all other tensors hold at once, as each operator of torch has made its own.

    What a kernel takes for itself and gives back is not seen.
    """
    held = _held(network, example_inputs)
    watch = _Watch({_storage(t)[0] for t in held})
    with watch:
        call()
    return _bytes(held) + watch.most


def on_cuda(call: Callable[[], object], network: nn.Module, example_inputs: Any) -> int:
    """Parameters, buffers, inputs, and the most that torch's allocator gave out beside during the call."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    torch.cuda.synchronize()
    return _bytes(_held(network, example_inputs)) + torch.cuda.max_memory_allocated() - before


def _held(network: nn.Module, example_inputs: Any) -> list[Tensor]:
    return [*itertools.chain(network.parameters(), network.buffers(), tensors_in(example_inputs))]


class _Watch(TorchDispatchMode):
    """Adds up the storages that are alive after each operator; ``most`` is the largest sum."""

    def __init__(self, known: set[int]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.most = 0
        self._known = known
        self._alive: dict[int, tuple[Any, int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        from torch.multiprocessing.reductions import StorageWeakRef

        output = func(*args, **(kwargs or {}))
        for tensor in (leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor)):
            key, size = _storage(tensor)
            if size and key not in self._known:
                self._alive[key] = (StorageWeakRef(tensor.untyped_storage()), size)  # type: ignore[no-untyped-call]
        self._alive = {key: held for key, held in self._alive.items() if not held[0].expired()}  # type: ignore[no-untyped-call]
        self.most = max(self.most, sum(size for _, size in self._alive.values()))
        return output


def _bytes(tensors: list[Tensor]) -> int:
    return sum(dict(map(_storage, tensors)).values())


def _storage(tensor: Tensor) -> tuple[int, int]:
    """What tells a tensor's storage from others, and its bytes; nothing where it has none of torch's."""
    try:
        storage = tensor.untyped_storage()
    except (NotImplementedError, RuntimeError):  # sparse, nested, or another library's
        return 0, 0
    return storage._cdata, storage.nbytes()
