"""What tensors hold in memory: the bytes of their storages, each counted once, while a piece of code runs."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

__all__ = ["Storages", "bytes_of"]


class Storages(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Within ``with``, notes the storages of what torch's operators give, but of those that these tensors have.

    Attributes:
        most: bytes that were alive at once, at most, after an operator.
    """

    supports_higher_order_operators = True

    def __init__(self, known: Iterable[Tensor] = ()) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.most = 0
        self._known = {_storage(tensor)[0] for tensor in known}
        self._made: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        for tensor in (leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor)):
            key, size = _storage(tensor)
            if size and key not in self._known:
                self._made[key] = StorageWeakRef(tensor.untyped_storage()), size  # type: ignore[no-untyped-call]
        self.most = max(self.most, self.held())
        return output

    def held(self) -> int:
        """Bytes of those that are there."""
        self._made = {key: (storage, size) for key, (storage, size) in self._made.items() if not storage.expired()}  # type: ignore[no-untyped-call]
        return sum(size for _, size in self._made.values())


def bytes_of(tensors: Iterable[Tensor]) -> int:
    """Bytes of their storages."""
    return sum(dict(map(_storage, tensors)).values())


def _storage(tensor: Tensor) -> tuple[int, int]:
    """What tells a tensor's storage from others, and its bytes; nothing where it has none of torch's."""
    try:
        storage = tensor.untyped_storage()
    except (NotImplementedError, RuntimeError):  # sparse, nested, or another library's
        return 0, 0
    return storage._cdata, storage.nbytes()
