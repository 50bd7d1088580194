"""What a file takes: the tensors of the example inputs by name, in structures filled anew, and which of their dimensions are open."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass
from itertools import repeat
from typing import Any

import torch
from torch import Tensor, nn

from passes.errors import SurgeryTypeError, SurgeryValueError, nearest
from passes.parity import tensors_in
from passes.running import arguments, first_line, run

__all__ = [
    "DynamicSize",
    "Flat",
    "Openings",
    "Shapes",
    "filled",
    "fresh_inputs",
    "input_names",
    "only_tensors",
    "openings",
    "shapes_of",
    "tensor_names",
    "unique",
]

Shapes = tuple[tuple[int, ...], ...]
"""Shapes of all tensors in example inputs, in order."""

DynamicSize = bool | Mapping[str, Sequence[int]]

DIRECTIONS = {1: ("length",), 2: ("height", "width"), 3: ("depth", "height", "width")}
CHANGES: tuple[Callable[[int, int], int], ...] = (
    lambda size, k: size + 32 * (k + 1),
    lambda size, k: size + 32,
    lambda size, k: 2 * size,
    lambda size, k: size + 8,
    lambda size, k: size + 1,
    lambda size, k: max(size // 2, 1),
)
"""Other sizes to try, by the size and the number of the direction; first such as tell the directions apart."""


class _Slot:
    """Stands in the template of a structure where a tensor goes."""


SLOT = _Slot()


class Flat(nn.Module):
    """A network that takes its input tensors one by one, whatever else it takes being fixed, and gives its output's tensors as a tuple."""

    def __init__(self, network: nn.Module, example_inputs: Any) -> None:
        super().__init__()
        self.network = network
        self.template = filled(example_inputs, repeat(SLOT))
        self.training = network.training

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        args, kwargs = arguments(filled(self.template, iter(tensors)))
        return tuple(tensors_in(self.network(*args, **kwargs)))


@dataclass(frozen=True, slots=True, kw_only=True)
class Openings:
    """Which dimensions of each input are open, and the shapes to check on.

    Attributes:
        dims: for each input tensor the names of its open dimensions, by index.
        exported: shapes to export with: what is open has at least two entries, since torch takes a dimension of one for fixed.
        checked: shapes to check with, two sets of them where something is open.
    """

    dims: tuple[dict[int, str], ...]
    exported: Shapes
    checked: tuple[Shapes, ...]


def filled(structure: Any, items: Iterator[Any], rest: Callable[[Any], Any] = lambda value: value) -> Any:
    """The same containers with the next item for each tensor (or slot of a template), and ``rest`` of whatever else they hold.

    Raises:
        SurgeryTypeError: a container that no other can be made of holds tensors.
    """
    if isinstance(structure, Tensor | _Slot):
        return next(items)
    if isinstance(structure, Mapping):
        values = {key: filled(value, items, rest) for key, value in structure.items()}
        if type(structure) is dict:
            return values
        try:  # a shallow copy may keep its entries in the same place
            made: Any = copy.deepcopy(structure, {id(t): t for t in tensors_in(structure)})
            for key, value in values.items():
                made[key] = value
        except TypeError as error:
            raise _cannot_be_made(structure) from error
        return made
    if isinstance(structure, list | tuple):
        entries = [filled(value, items, rest) for value in structure]
        return type(structure)(*entries) if hasattr(structure, "_fields") else type(structure)(entries)
    if is_dataclass(structure) and not isinstance(structure, type):
        made = copy.copy(structure)
        for field in fields(structure):
            object.__setattr__(made, field.name, filled(getattr(structure, field.name), items, rest))
        return made
    if any(True for _ in tensors_in(structure)):
        raise _cannot_be_made(structure)
    return rest(structure)


def _cannot_be_made(structure: Any) -> SurgeryTypeError:
    return SurgeryTypeError(
        f"example_inputs: a {type(structure).__name__} holds tensors; a file takes tensors in tuples, lists, mappings that can be changed and "
        "dataclasses, so wrap the model in one that makes it from these"
    )


def only_tensors(structure: Any) -> bool:
    """Whether there is nothing but tensors in plain tuples, lists and dicts with names for keys."""
    if isinstance(structure, Tensor):
        return True
    if type(structure) in (list, tuple):
        return all(only_tensors(value) for value in structure)
    return type(structure) is dict and all(isinstance(key, str) and only_tensors(value) for key, value in structure.items())


def input_names(network: nn.Module, example_inputs: Any) -> tuple[str, ...]:
    """A name for each input tensor: the parameter of ``forward`` that it goes to, with the way to it inside of containers."""
    args, kwargs = arguments(example_inputs)
    parameters = [p for p in inspect.signature(network.forward).parameters.values() if p.kind not in (p.KEYWORD_ONLY, p.VAR_KEYWORD)]
    named: list[tuple[str, Any]] = []
    for index, value in enumerate(args):
        parameter = parameters[min(index, len(parameters) - 1)] if parameters else None
        if parameter is None or parameter.kind is parameter.VAR_POSITIONAL:
            named.append((f"{parameter.name if parameter else 'input'}_{index}", value))
        else:
            named.append((parameter.name, value))
    return unique(name for top, value in [*named, *kwargs.items()] for name in tensor_names(value, top))


def tensor_names(value: Any, top: str) -> Iterator[str]:
    """A name for each tensor in nested containers: keys, fields and numbers on the way to it, after ``top``."""

    def below(part: object) -> str:
        return f"{top}_{part}" if top else str(part)

    if isinstance(value, Tensor):
        yield top
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from tensor_names(item, below(key))
    elif is_dataclass(value) and not isinstance(value, type):
        for field in fields(value):
            yield from tensor_names(getattr(value, field.name), below(field.name))
    elif isinstance(value, list | tuple):
        for part, item in zip(getattr(value, "_fields", range(len(value))), value, strict=True):
            yield from tensor_names(item, below(part))


def unique(names: Iterable[str], taken: Iterable[str] = ()) -> tuple[str, ...]:
    """The names, each with a number where it was there before."""
    seen, found = set(taken), []
    for name in names:
        candidate, number = name, 1
        while candidate in seen:
            number += 1
            candidate = f"{name}_{number}"
        seen.add(candidate)
        found.append(candidate)
    return tuple(found)


def shapes_of(example_inputs: Any) -> Shapes:
    return tuple(tuple(t.shape) for t in tensors_in(example_inputs))


def fresh_inputs(
    example_inputs: Any, generator: torch.Generator, batch: int | None = None, *, shapes: Shapes | None = None, noise: bool = True
) -> Any:
    """New inputs of the same structure, dtypes, memory formats and shapes: normal noise for floats, the example's own values shuffled for others.

    With ``batch``, the first dimension of every tensor that has the batch there takes that size; ``shapes`` are all shapes at once. Without ``noise``
    floats are the example's own values too.
    """
    tensors = list(tensors_in(example_inputs))
    if shapes is None:
        shapes = shapes_of(example_inputs) if batch is None else _with_batch(shapes_of(example_inputs), batch)
    return filled(example_inputs, iter([_fresh(t, shape, generator, noise) for t, shape in zip(tensors, shapes, strict=True)]), copy.deepcopy)


def _fresh(tensor: Tensor, shape: tuple[int, ...], generator: torch.Generator, noise: bool) -> Tensor:
    if noise and tensor.is_floating_point():
        numbers = torch.randn(shape, generator=generator, dtype=torch.float32, device="cpu")
    else:
        pick = torch.randint(max(tensor.numel(), 1), (torch.Size(shape).numel(),), generator=generator, device="cpu")
        numbers = tensor.detach().flatten().cpu()[pick].reshape(shape)
    fresh = numbers.to(device=tensor.device, dtype=tensor.dtype)
    for layout in (torch.channels_last, torch.channels_last_3d):
        if tensor.ndim == (4 if layout == torch.channels_last else 5) and tensor.is_contiguous(memory_format=layout) and not tensor.is_contiguous():
            fresh = fresh.contiguous(memory_format=layout)
    return fresh


def _batch_of(shapes: Shapes) -> int | None:
    return next((shape[0] for shape in shapes if shape), None)


def _with_batch(shapes: Shapes, batch: int) -> Shapes:
    now = _batch_of(shapes)
    return tuple((batch, *shape[1:]) if shape and shape[0] == now else shape for shape in shapes)


def openings(network: nn.Module, example_inputs: Any, names: Sequence[str], *, dynamic_batch: bool, dynamic_size: DynamicSize) -> Openings:
    """Which dimensions are open, found by running the network on other sizes.

    The batch is the first dimension of the first input, and of all inputs that have as many entries there. Sizes are the dimensions from the third
    on, (N, C, ...), as far as the network takes others there; or those that ``dynamic_size`` names.

    Raises:
        SurgeryValueError: there is no such dimension, or the network takes no other size there.
    """
    shapes = shapes_of(example_inputs)
    dims: tuple[dict[int, str], ...] = tuple({} for _ in shapes)
    exported, other_batch = shapes, shapes
    if dynamic_batch:
        exported, other_batch = _open_batch(network, example_inputs, dims)
    other = seen = exported
    if dynamic_size:
        candidates = _named(dynamic_size, names, shapes) if isinstance(dynamic_size, Mapping) else [list(range(2, len(s))) for s in shapes]
        other = _open_sizes(network, example_inputs, exported, candidates, names, dims, exact=isinstance(dynamic_size, Mapping))
        if any(shape[index] < 2 for shape, open_dims in zip(exported, dims, strict=True) for index in open_dims):
            exported = other
    if dynamic_batch:
        last = tuple(tuple(a if i == 0 and 0 in d else b for i, (a, b) in enumerate(zip(*s))) for s, d in zip(zip(other_batch, other), dims))
        three = tuple((3, *shape[1:]) if 0 in open_dims else shape for shape, open_dims in zip(seen, dims, strict=True))
        return Openings(dims=dims, exported=exported, checked=(three, last))
    return Openings(dims=dims, exported=exported, checked=(shapes, other) if dynamic_size else (shapes,))


def _open_batch(network: nn.Module, example_inputs: Any, dims: tuple[dict[int, str], ...]) -> tuple[Shapes, Shapes]:
    """Shapes to export with and shapes of a batch of one."""
    shapes = shapes_of(example_inputs)
    now = _batch_of(shapes)
    if now is None:
        raise SurgeryValueError("dynamic_batch: no example input has a dimension that could be open")
    exported = shapes if now > 1 else _with_batch(shapes, 2)
    for batch in {2, 3, 1} - {now}:
        if (error := _refusal(network, example_inputs, _with_batch(shapes, batch))) is not None:
            raise SurgeryValueError(f"dynamic_batch: the network takes a batch of {now}, but not of {batch} ({_own_words(error)})") from error
    for open_dims, shape in zip(dims, shapes, strict=True):
        if shape and shape[0] == now:
            open_dims[0] = "batch"
    return exported, _with_batch(shapes, 1)


def _named(dynamic_size: Mapping[str, Sequence[int]], names: Sequence[str], shapes: Shapes) -> list[list[int]]:
    for name, chosen in dynamic_size.items():
        if name not in names:
            raise SurgeryValueError(f"dynamic_size: no input is named {name!r}; {nearest(name, names)}")
        ndim = len(shapes[list(names).index(name)])
        if isinstance(chosen, str) or not isinstance(chosen, Iterable) or not all(isinstance(i, int) and 0 <= i < ndim for i in chosen):
            raise SurgeryValueError(f"dynamic_size: {name!r} has the dimensions 0 to {ndim - 1}, got {chosen!r}")
    return [list(dynamic_size.get(name, ())) for name in names]


def _open_sizes(
    network: nn.Module,
    example_inputs: Any,
    shapes: Shapes,
    candidates: Sequence[Sequence[int]],
    names: Sequence[str],
    dims: tuple[dict[int, str], ...],
    *,
    exact: bool,
) -> Shapes:
    """Other shapes that the network takes, with all candidates changed, or else those that it takes changed one input by one."""
    if not any(candidates):
        raise SurgeryValueError("dynamic_size: no input has a third dimension (N, C, ...); name the dimensions, for example {'x': [1]}")
    chosen, (other, error) = candidates, _other_size(network, example_inputs, shapes, candidates)
    if other is None and not exact:
        alone = [[c if i == j else [] for j, c in enumerate(candidates)] for i in range(len(candidates)) if candidates[i]]
        accepted = [one for one in alone if _other_size(network, example_inputs, shapes, one)[0] is not None]
        chosen = [[d for one in accepted for d in one[i]] for i in range(len(candidates))]
        other = _other_size(network, example_inputs, shapes, chosen)[0] if any(chosen) else None
    if other is None:
        raise SurgeryValueError(
            f"dynamic_size: the network takes no other size than that of the example inputs ({_own_words(error)}); to open single dimensions name "
            f"them, for example {{{next(n for n, c in zip(names, candidates) if c)!r}: [2]}}"
        ) from error
    several = sum(map(bool, chosen)) > 1
    for name, open_dims, indices, shape in zip(names, dims, chosen, shapes, strict=True):
        directions = DIRECTIONS.get(len(shape) - 2, ())
        for index in indices:
            word = directions[index - 2] if 2 <= index < 2 + len(directions) else f"size_{index}"
            open_dims.setdefault(index, f"{name}_{word}" if several else word)
    return other


def _other_size(network: nn.Module, example_inputs: Any, shapes: Shapes, chosen: Sequence[Sequence[int]]) -> tuple[Shapes | None, Exception]:
    error: Exception = SurgeryValueError("nothing was tried")
    for change in CHANGES:
        other = tuple(
            tuple(change(size, indices.index(i)) if i in indices else size for i, size in enumerate(shape))
            for shape, indices in zip(shapes, chosen, strict=True)
        )
        refusal = _refusal(network, example_inputs, other)
        if refusal is None:
            return other, error
        error = refusal
    return None, error


def _refusal(network: nn.Module, example_inputs: Any, shapes: Shapes) -> SurgeryValueError | None:
    """The error of the network on inputs of these shapes, noise or else the example's own numbers in another order; None where it takes them."""
    refusal = None
    for noise in (True, False):
        inputs = fresh_inputs(example_inputs, torch.Generator().manual_seed(0), shapes=shapes, noise=noise)
        try:
            with torch.no_grad():
                run(network, inputs)
        except SurgeryValueError as error:
            refusal = error
        else:
            return None
    return refusal


def _own_words(error: Exception) -> str:
    """What the network itself said."""
    return first_line(error.__cause__ or error)
