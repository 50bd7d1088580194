"""Two ONNX files beside each other: what they take, made up where nobody gives it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from passes.errors import SurgeryError, SurgeryTypeError, SurgeryValueError
from passes.parity import tensors_in

__all__ = ["FileInput", "file_inputs", "inputs_for", "macs_of_file", "made_up"]


@dataclass(frozen=True, slots=True)
class FileInput:
    """One input of an ONNX file; open dimensions have a name, the file's own where it has one, else ``name[index]``."""

    name: str
    dtype: torch.dtype
    dims: tuple[int | str, ...]

    def __str__(self) -> str:
        return f"{self.name}: {' x '.join(map(str, self.dims)) or 'one number'} {str(self.dtype).removeprefix('torch.')}"

    def accepts(self, tensor: Tensor) -> bool:
        sizes = zip(self.dims, tensor.shape, strict=False)
        return tensor.dtype == self.dtype and tensor.ndim == len(self.dims) and all(isinstance(dim, str) or dim == size for dim, size in sizes)


def file_inputs(file: Path) -> tuple[FileInput, ...]:
    """What an ONNX file takes.

    Raises:
        SurgeryValueError: it is no ONNX file.
        SurgeryError: it takes something that is no tensor of numbers, or says nothing of a shape.
        OSError: it cannot be read.
    """
    from surgery.onnx_files.files import read_graph
    from surgery.onnx_files.graph import tensor_dtype, true_inputs

    graph = read_graph(file).graph
    given = true_inputs(graph)
    found = []
    for value in graph.input:
        if value.name not in given:
            continue
        kind = value.type.tensor_type
        dtype = tensor_dtype(kind.elem_type)
        if dtype is None or not kind.HasField("shape"):
            raise SurgeryError(
                f"{file}: its input {value.name!r} is no tensor of numbers with a known count of dimensions; nothing can be made up for it"
            )
        named = ((dim.dim_value, dim.dim_param or f"{value.name}[{index}]") for index, dim in enumerate(kind.shape.dim))
        found.append(FileInput(value.name, dtype, tuple(size if size > 0 else name for size, name in named)))
    return tuple(found)


def made_up(inputs: Sequence[FileInput], sizes: Mapping[str, int] | None = None, shape: Sequence[int] | None = None) -> dict[str, Tensor]:
    """A tensor for each input: noise where it is floats, else zeros.

    Args:
        inputs: of one file.
        sizes: of open dimensions, by name.
        shape: of the only input.

    Raises:
        SurgeryValueError: an open dimension has no size, a size has no dimension, or the shape does not fit.
    """
    sizes = dict(sizes or {})
    if shape is not None:
        if len(inputs) != 1:
            raise SurgeryValueError(f"--input-shape: the file has {len(inputs)} inputs ({'; '.join(map(str, inputs))}); give --size NAME=N instead")
        dims = inputs[0].dims
        if len(dims) != len(shape) or any(isinstance(dim, int) and dim != size for dim, size in zip(dims, shape, strict=False)):
            raise SurgeryValueError(f"--input-shape: {'x'.join(map(str, shape))} does not fit the file's input {inputs[0]}")
        sizes |= {dim: size for dim, size in zip(dims, shape, strict=True) if isinstance(dim, str)}
    names = dict.fromkeys(dim for one in inputs for dim in one.dims if isinstance(dim, str))
    if unknown := [name for name in sizes if name not in names]:
        raise SurgeryValueError(f"--size: {unknown[0]!r} is no open dimension of the file; it has {list(names) or 'none'}")
    if missing := [name for name in names if name not in sizes]:
        asked = " ".join(f"--size {name}=N" for name in missing)
        raise SurgeryValueError(f"the file leaves dimensions open ({'; '.join(map(str, inputs))}): give {asked}")
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for one in inputs:
        actual = tuple(sizes[dim] if isinstance(dim, str) else dim for dim in one.dims)
        noise = torch.randn(actual, generator=generator, device="cpu") if one.dtype.is_floating_point else torch.zeros(actual)
        tensors[one.name] = noise.to(one.dtype)
    return tensors


def inputs_for(before: Path, after: Path, example_inputs: Any) -> dict[str, Tensor]:
    """The example inputs by the names of the files' inputs.

    Args:
        before: one file.
        after: the other; it must take the same.
        example_inputs: a tensor, tensors in the order of the file's inputs, or a mapping by their names; made up where None and no dimension is open.

    Raises:
        SurgeryValueError: the files take different inputs, or others than these.
    """
    old, new = file_inputs(before), file_inputs(after)
    if {(one.name, one.dtype, len(one.dims)) for one in old} != {(one.name, one.dtype, len(one.dims)) for one in new}:
        raise SurgeryValueError(f"the files take different inputs: {before} {'; '.join(map(str, old))}, {after} {'; '.join(map(str, new))}")
    if example_inputs is None:
        return made_up(old)
    given = list(tensors_in(example_inputs))
    by_name = dict(example_inputs) if isinstance(example_inputs, Mapping) else dict(zip((one.name for one in old), given, strict=False))
    if len(given) != len(old) or set(by_name) != {one.name for one in old} or not all(isinstance(value, Tensor) for value in by_name.values()):
        raise SurgeryTypeError(f"example_inputs: {before} takes {'; '.join(map(str, old))}; got {len(given)} tensors")
    for file, inputs in ((before, old), (after, new)):
        for one in inputs:
            if not one.accepts(by_name[one.name]):
                got = f"{tuple(by_name[one.name].shape)} {by_name[one.name].dtype}"
                raise SurgeryValueError(f"example_inputs: {file} takes {one}; got {got}")
    return by_name


def macs_of_file(file: Path, inputs: Mapping[str, Tensor]) -> int | None:
    """Of one call with these inputs, by shape inference; None where some shape cannot be told."""
    from surgery.onnx_files.files import read_graph, without_functions
    from surgery.onnx_files.shapes import network_macs, value_shapes

    model = without_functions(read_graph(file))
    try:
        return network_macs(model, value_shapes(model, {name: tuple(tensor.shape) for name, tensor in inputs.items()}))
    except SurgeryError:  # a file whose shapes do not fit together may run all the same
        return None
