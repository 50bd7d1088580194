"""Under which conditions networks are timed: batch sizes, dtype, memory format. The caller's models and inputs stay as they are."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from passes.chain import FORMATS
from passes.errors import SurgeryValueError
from passes.parity import private_inputs, tensors_in
from passes.running import evaluating_copy

__all__ = ["Conditions", "conditions_of"]

DTYPES = {name: getattr(torch, name) for name in ("float32", "float64", "bfloat16", "float16")}
CHANNELS_LAST = "channels_last"


@dataclass(frozen=True, slots=True, kw_only=True)
class Conditions:
    """What to cast networks and inputs to; None leaves them as they are."""

    batches: tuple[int, ...] | None
    dtype: torch.dtype | None
    memory_format: str | None

    @property
    def dtype_name(self) -> str | None:
        return None if self.dtype is None else str(self.dtype).removeprefix("torch.")

    def network(self, model: nn.Module) -> nn.Module:
        """A copy in eval mode; its parameters are the caller's own where nothing is cast."""
        if self.dtype is None and self.memory_format is None:
            return evaluating_copy(model, share_parameters=True)
        twin = evaluating_copy(model)
        if self.dtype is not None:
            twin.to(self.dtype)
        if self.memory_format is not None:
            with torch.no_grad():
                for parameter in twin.parameters():
                    parameter.data = _channels_last(parameter.data)
        return twin

    def inputs(self, example_inputs: Any) -> Iterator[Any]:
        """The inputs of each batch size.

        Raises:
            SurgeryValueError: they have no batch.
        """
        from surgery.export.common import fresh_inputs

        if self.batches is None:
            yield self.cast(example_inputs)
            return
        if all(t.ndim == 0 for t in tensors_in(example_inputs)):
            raise SurgeryValueError("batch: the example inputs have no dimension that could be a batch; leave it out")
        generator = torch.Generator().manual_seed(0)
        for size in self.batches:
            yield self.cast(fresh_inputs(example_inputs, generator, size))

    def cast(self, example_inputs: Any) -> Any:
        """Inputs in this dtype and memory format."""
        from surgery.export.inputs import filled

        if self.dtype is None and self.memory_format is None:
            return example_inputs
        inputs = private_inputs(example_inputs)
        return filled(inputs, (self._cast(t) for t in tensors_in(inputs)))

    def _cast(self, tensor: Tensor) -> Tensor:
        if self.dtype is not None and tensor.is_floating_point():
            tensor = tensor.to(self.dtype)
        return tensor if self.memory_format is None else _channels_last(tensor)


def conditions_of(*, batch: int | Iterable[int] | None, dtype: torch.dtype | str | None, memory_format: str | None) -> Conditions:
    """The arguments of ``benchmark``, checked.

    Raises:
        SurgeryValueError: one is none of those allowed.
    """
    wanted = DTYPES.get(dtype.removeprefix("torch.")) if isinstance(dtype, str) else dtype
    if dtype is not None and wanted not in DTYPES.values():
        raise SurgeryValueError(f"dtype: {dtype!r} is none of {list(DTYPES)}")
    if memory_format not in (None, CHANNELS_LAST):
        raise SurgeryValueError(f"memory_format: expected {CHANNELS_LAST!r} or None, got {memory_format!r}")
    return Conditions(batches=None if batch is None else _batches(batch), dtype=wanted, memory_format=memory_format)


def _batches(batch: int | Iterable[int]) -> tuple[int, ...]:
    sizes = (batch,) if isinstance(batch, int) or not isinstance(batch, Iterable) else tuple(batch)
    if not sizes or any(not isinstance(size, int) or isinstance(size, bool) or size < 1 for size in sizes):
        raise SurgeryValueError(f"batch: expected whole numbers of at least 1, got {batch!r}")
    return tuple(dict.fromkeys(sizes))


def _channels_last(tensor: Tensor) -> Tensor:
    layout = FORMATS.get(tensor.ndim)
    return tensor if layout is None or tensor.layout != torch.strided else tensor.contiguous(memory_format=layout)
