"""Inputs for an ONNX file: those that a user gives, or noise of the shapes that the file declares."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy
import torch
from torch import Tensor

from passes.errors import SurgeryTypeError, SurgeryValueError
from surgery.onnx_files.graph import tensor_dtype, true_inputs
from surgery.onnx_files.shapes import declared_shapes

if TYPE_CHECKING:
    from onnx import ModelProto

__all__ = ["Feed", "example_feed", "noise_like", "open_inputs", "shaken", "shapes_of_feed", "shuffled", "takes_numbers"]

Feed = Mapping[str, Tensor]


def example_feed(
    model: ModelProto, example_inputs: Any = None, sizes: Mapping[str, tuple[int, ...]] | None = None, *, argument: str = "example_inputs"
) -> Feed | None:
    """One tensor for each input.

    Args:
        model: of the file.
        example_inputs: an array or tensor, several of them in the order of the inputs, or a mapping from their names; None for noise of the declared
            shapes, where a first dimension that is open counts as 1.
        sizes: what noise has to be like where more is open.
        argument: what errors call them.

    Returns:
        None where nothing is given and other dimensions are open as well.

    Raises:
        SurgeryValueError, SurgeryTypeError: they do not fit the inputs that the file declares.
    """
    shapes = declared_shapes(model)
    dtypes = {value.name: tensor_dtype(value.type.tensor_type.elem_type) for value in model.graph.input}
    if example_inputs is None:
        wanted = {name: (sizes or {}).get(name) or (None if shape is None else _with_one(shape)) for name, shape in shapes.items()}
        if any(shape is None for shape in wanted.values()):
            return None
        return {name: _noise(name, shape or (), dtypes[name], torch.Generator().manual_seed(0)) for name, shape in wanted.items()}
    given = _by_name(true_inputs(model.graph), example_inputs, argument)
    return {name: _fitting(f"{argument}: {name!r}", value, shapes[name], dtypes[name]) for name, value in given.items()}


def takes_numbers(model: ModelProto) -> bool:
    """Whether every input of a file is of a type that torch has: no text, no numbers of four bits."""
    inputs = {value.name: value for value in model.graph.input}
    return all(tensor_dtype(inputs[name].type.tensor_type.elem_type) is not None for name in true_inputs(model.graph))


def open_inputs(model: ModelProto) -> str:
    """The inputs of a file whose sizes it leaves open, in words."""
    shapes = {name: None if shape is None else _with_one(shape) for name, shape in declared_shapes(model).items()}
    declared = declared_shapes(model)
    told = []
    for name, shape in shapes.items():
        if shape is None:
            sizes = declared[name]
            told.append(f"{name} ({'of unknown rank' if sizes is None else ' x '.join('?' if size is None else str(size) for size in sizes)})")
    return ", ".join(told)


def shapes_of_feed(feed: Feed | None) -> dict[str, tuple[int, ...]]:
    return {} if feed is None else {name: tuple(tensor.shape) for name, tensor in feed.items()}


def noise_like(feed: Feed, seed: int) -> Feed:
    """Other numbers in floating-point inputs, of the same shapes, with their mean and spread; the other inputs as they are."""
    generator = torch.Generator().manual_seed(seed)

    def noisy(tensor: Tensor) -> Tensor:
        if not tensor.is_floating_point() or not tensor.numel():
            return tensor
        wide = tensor.double()
        spread = float(wide.std(correction=0)) or 1.0
        return (torch.randn(tensor.shape, generator=generator, device="cpu", dtype=torch.float64) * spread + wide.mean()).to(tensor.dtype)

    return {name: noisy(tensor) for name, tensor in feed.items()}


def shuffled(feed: Feed, seed: int) -> Feed:
    """The numbers of floating-point inputs in another order; the other inputs as they are."""
    generator = torch.Generator().manual_seed(seed)

    def other(tensor: Tensor) -> Tensor:
        order = torch.randperm(tensor.numel(), generator=generator, device="cpu")
        return tensor.flatten()[order].reshape(tensor.shape) if tensor.is_floating_point() else tensor

    return {name: other(tensor) for name, tensor in feed.items()}


def shaken(feed: Feed, share: float) -> Feed:
    """Floating-point inputs with each number a share larger or smaller."""
    generator = torch.Generator().manual_seed(2)

    def other(tensor: Tensor) -> Tensor:
        if not tensor.is_floating_point():
            return tensor
        signs = torch.randint(0, 2, tensor.shape, generator=generator, device="cpu") * 2 - 1
        return (tensor.double() * (1 + share * signs)).to(tensor.dtype)

    return {name: other(tensor) for name, tensor in feed.items()}


def _with_one(shape: Sequence[int | None]) -> tuple[int, ...] | None:
    sizes = [1 if place == 0 and size is None else size for place, size in enumerate(shape)]
    known = tuple(size for size in sizes if size is not None)
    return known if len(known) == len(sizes) else None


def _noise(name: str, shape: Sequence[int], dtype: torch.dtype | None, generator: torch.Generator) -> Tensor:
    if dtype is None:
        raise SurgeryValueError(
            f"example_inputs: the input {name!r} takes no numbers that torch has, so nothing can be run; write the file with check=False"
        )
    if dtype.is_floating_point or dtype.is_complex:
        return torch.randn(tuple(shape), generator=generator, device="cpu").to(dtype)
    return torch.randint(0, 2, tuple(shape), generator=generator, device="cpu").to(dtype)


def _by_name(names: Sequence[str], given: Any, argument: str) -> dict[str, Any]:
    if isinstance(given, Mapping):
        found = dict(given)
    elif isinstance(given, Tensor | numpy.ndarray):
        found = dict(zip(names, [given], strict=False))
        if len(names) != 1:
            raise SurgeryValueError(f"{argument}: the file has {len(names)} inputs ({', '.join(names)}), got one; give a mapping from their names")
    elif isinstance(given, Sequence) and not isinstance(given, str | bytes):
        found = dict(zip(names, given, strict=False))
        if len(given) != len(names):
            raise SurgeryValueError(f"{argument}: the file has {len(names)} inputs ({', '.join(names)}), got {len(given)}")
    else:
        raise SurgeryTypeError(f"{argument}: expected arrays or tensors, or a mapping from names to them, got {type(given).__name__}")
    if set(found) != set(names):
        raise SurgeryValueError(f"{argument}: the inputs of the file are {', '.join(names) or 'none'}; got {', '.join(map(str, found)) or 'none'}")
    return {name: found[name] for name in names}


def _array(value: Any) -> numpy.ndarray[Any, Any]:
    """An array of its own, in this machine's order of bytes."""
    array = numpy.array(value)
    return array.astype(array.dtype.newbyteorder("="), copy=False)


def _fitting(name: str, value: Any, shape: Sequence[int | None] | None, dtype: torch.dtype | None) -> Tensor:
    """A private tensor, in the type that the input has; ``name`` says which in errors."""
    try:
        tensor = value.detach().cpu().clone() if isinstance(value, Tensor) else torch.from_numpy(_array(value))
    except (TypeError, ValueError) as error:
        raise SurgeryTypeError(f"{name}: expected an array or a tensor of numbers, got {type(value).__name__}") from error
    if shape is not None and (len(shape) != tensor.ndim or any(n is not None and n != m for n, m in zip(shape, tensor.shape, strict=True))):
        declared = " x ".join("?" if size is None else str(size) for size in shape)
        raise SurgeryValueError(f"{name} is {' x '.join(map(str, tensor.shape))}, the file takes {declared}")
    if dtype is None:
        raise SurgeryValueError(
            f"{name}: the input is of a type that torch has not, so nothing can be run; leave them out, and write with check=False"
        )
    return tensor.to(dtype)
