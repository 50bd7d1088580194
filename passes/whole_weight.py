"""The weight of the one layer that a chain stands for, multiplied out when its numbers are asked for, and not for its dtype, device or shape.

Networks look at a layer's weight in every call to cast their inputs: vision transformers at that of their patches, T5 at that of its last projection.
If it were multiplied out each time, which takes far more than the layer, a chain would make them slower.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.overrides import _get_current_function_mode
from torch.utils._pytree import tree_map_only

__all__ = ["WholeWeight", "can_wait"]

NO_NUMBERS = {
    *(getattr(Tensor, name).__get__ for name in ("dtype", "device", "shape", "ndim", "is_cuda")),
    *(getattr(Tensor, name) for name in ("size", "dim", "numel", "nelement", "element_size", "is_floating_point", "__len__")),
    *(torch.numel, torch.is_floating_point),
}


def can_wait(factors: Sequence[Tensor]) -> bool:
    """Whether it is safe to hand out a tensor without numbers.

    Not where somebody writes down what is done to it (compilers, tracers, recorders), nor where factors are to get derivatives: not all that takes
    part in these asks a tensor of another class.
    """
    if torch.compiler.is_compiling() or torch.jit.is_tracing():  # type: ignore[no-untyped-call,attr-defined]
        return False
    if _get_current_function_mode() is not None:  # type: ignore[no-untyped-call]
        return False
    plain = all(type(factor) in (Tensor, torch.nn.Parameter) for factor in factors)
    return plain and not (torch.is_grad_enabled() and any(factor.requires_grad for factor in factors))


class WholeWeight(Tensor):
    """A tensor of that dtype, device and shape; for all but these it is what ``multiplied`` gives when it is first asked."""

    _multiplied: Callable[[], Tensor]
    _numbers: Tensor | None

    @staticmethod
    def of(shape: tuple[int, ...], like: Tensor, multiplied: Callable[[], Tensor]) -> WholeWeight:
        made: WholeWeight = Tensor._make_wrapper_subclass(WholeWeight, shape, dtype=like.dtype, device=like.device)  # type: ignore[attr-defined]
        made._multiplied, made._numbers = multiplied, None
        return made

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in NO_NUMBERS:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **(kwargs or {}))
        return func(*_with_numbers(args), **_with_numbers(kwargs or {}))

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        return func(*_with_numbers(args), **_with_numbers(kwargs or {}))


def _with_numbers(value: Any) -> Any:
    def numbers(weight: WholeWeight) -> Tensor:
        if weight._numbers is None:
            with torch.no_grad():  # as it was when the weight was asked for
                weight._numbers = weight._multiplied()
        return weight._numbers

    return tree_map_only(WholeWeight, numbers, value)
