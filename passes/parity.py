"""Do two networks compute the same? One comparison, one table of tolerances, for the tests and for everybody else."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import fields, is_dataclass
from enum import Enum
from typing import Any

import torch
from torch import Tensor

from passes.errors import ParityError, SurgeryTypeError

__all__ = ["TOLERANCE_EVAL", "TOLERANCE_TRAIN", "assert_parity", "difference", "private_inputs", "tensors_in"]

TOLERANCE_EVAL = {torch.float64: 1e-10, torch.float32: 1e-5, torch.bfloat16: 3e-2, torch.float16: 5e-3}
TOLERANCE_TRAIN = {torch.float64: 1e-10, torch.float32: 1e-4, torch.bfloat16: 6e-2, torch.float16: 1e-2}
REAL = {torch.complex32: torch.float16, torch.complex64: torch.float32, torch.complex128: torch.float64}


def tensors_in(value: Any) -> Iterator[Tensor]:
    """All tensors in nested dicts, lists, tuples and dataclasses, in order; numpy arrays hold none."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from tensors_in(item)
    elif is_dataclass(value) and not isinstance(value, type):
        for field in fields(value):
            yield from tensors_in(getattr(value, field.name, None))
    elif isinstance(value, Iterable) and not isinstance(value, str | bytes | Enum) and not hasattr(value, "__array_interface__"):
        try:
            items = iter(value)
        except (TypeError, NotImplementedError):  # some collections say so when they are asked
            return
        for item in items:
            yield from tensors_in(item)


def difference(got: Any, expected: Any) -> float:
    """Largest ``max |a - b| / max |b|`` over all pairs of tensors; infinite where numbers, shapes or finiteness differ."""
    left, right = list(tensors_in(got)), list(tensors_in(expected))
    if len(left) != len(right) or not right:
        return float("inf")
    return max(_tensor_difference(a, b) for a, b in zip(left, right, strict=True))


def assert_parity(got: Any, expected: Any, *, tolerance: float | None = None, training: bool = False, what: str = "networks") -> float:
    """Raise ``ParityError`` unless ``difference`` is within the tolerance (by default that of the expected dtype); return it."""
    found = difference(got, expected)
    if tolerance is None:
        table = TOLERANCE_TRAIN if training else TOLERANCE_EVAL
        dtypes = [REAL.get(t.dtype, t.dtype) for t in tensors_in(expected) if t.is_floating_point() or t.is_complex()]
        tolerance = max((table.get(dtype, max(table.values())) for dtype in dtypes), default=0.0)
    if not found <= tolerance:
        raise ParityError(f"{what}: outputs differ by {found:.3g} of the largest value, the tolerance is {tolerance:.3g}")
    return found


def private_inputs(example_inputs: Any, instead: Mapping[int, Tensor] | None = None) -> Any:
    """A deep copy of inputs, detached, so that a model which works in place cannot change the caller's; leaves go on requiring gradients.

    Args:
        example_inputs: tensors in containers of any kind, and whatever else a model takes.
        instead: tensors to stand in the copy for others, by the identity of those.

    Raises:
        SurgeryTypeError: they hold something that cannot be copied.
    """
    memo: dict[int, Any] = {id(t): t.detach().clone().requires_grad_(t.requires_grad and t.is_leaf) for t in tensors_in(example_inputs)}
    memo |= instead or {}
    try:
        return copy.deepcopy(example_inputs, memo)
    except (TypeError, RuntimeError, AttributeError, ValueError, NotImplementedError) as error:
        raise SurgeryTypeError(f"example_inputs: they cannot be copied ({error}); give inputs that copy.deepcopy accepts") from error


def _tensor_difference(a: Tensor, b: Tensor) -> float:
    if a.shape != b.shape:
        return float("inf")
    if b.numel() == 0:
        return 0.0
    dtype = torch.complex128 if a.is_complex() or b.is_complex() else torch.float64
    x, y = (t.detach().to("cpu", dtype) if t.layout is torch.strided else t.detach().cpu().to_dense().to(dtype) for t in (a, b))
    same_specials = torch.equal(torch.isnan(x), torch.isnan(y)) and torch.equal(x[torch.isinf(x)], y[torch.isinf(y)])
    if not same_specials:
        return float("inf")
    finite = torch.isfinite(x) & torch.isfinite(y)
    if not torch.equal(finite, torch.isfinite(y)):
        return float("inf")
    gap = (x[finite] - y[finite]).abs()
    if gap.numel() == 0 or float(gap.max()) == 0.0:
        return 0.0
    scale = float(y[finite].abs().max())
    return float(gap.max()) / scale if scale > 0 else float("inf")
