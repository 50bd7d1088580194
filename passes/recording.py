"""Recording a model that cannot be traced: one real forward pass, written down call by call as an ``fx.Graph``.

Two modes listen while a private copy runs: torch functions are taken where the model calls them, and the operators below them only where no torch
function stood around them (TorchScript functions, extensions). Calls of leaf modules are taken by hooks, and hide everything inside.
"""

from __future__ import annotations

import builtins
import inspect
import operator
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields, is_dataclass
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from passes.chain import Chain
from passes.errors import SurgeryTypeError
from passes.parity import private_inputs
from passes.running import arguments, callable_of, check_initialized, model_errors, private_copy, quietly, tensor_metadata, watch
from passes.site import is_layer, named_groups

__all__ = ["RecordedGraph", "after", "alias", "record"]

# What is asked of a tensor without looking at its numbers: no node of the graph. Getters of properties such as shape and dtype count as well.
QUESTIONS = (
    {"size", "dim", "ndimension", "numel", "nelement", "stride", "storage_offset", "element_size", "__len__", "is_same_size", "__hash__"}
    | {"is_floating_point", "is_complex", "is_signed", "is_inference", "is_tensor", "is_storage", "result_type", "can_cast"}
    | {"is_contiguous", "is_pinned", "is_shared", "get_device", "untyped_storage", "storage"}
    | {"lift_fresh.default"}  # how torch says that a tensor is new
)
PLAIN = (str, int, float, bool, complex, type(None), type(...), torch.dtype, torch.device, torch.layout, torch.memory_format)

Path = tuple[tuple[Callable[..., Any], Any], ...]


class RecordedGraph(fx.Graph):
    """One execution of a model, as ``record`` saw it.

    It is good for shapes, calls, drawing and finding neighbours. It is never a licence to fuse, nor to compute anything else: on other inputs the
    model may take another way, numbers that were read from tensors are constants here, and what was not made by torch functions (numpy) is a
    ``get_attr`` of a ``_tensor_constant`` that no module holds.
    """

    def __deepcopy__(self, memo: dict[int, Any] | None = None) -> RecordedGraph:
        copied = super().__deepcopy__(memo)
        copied.__class__ = type(self)
        return copied  # type: ignore[return-value]


def after(value: Tensor, write: Any) -> Tensor:
    """``value``, read after ``write`` changed memory that it shares; in recorded graphs the edge from a write to those who read what it wrote."""
    return value


def alias(value: Tensor) -> Tensor:
    """``value`` as another tensor in the same memory; in recorded graphs the edge to tensors that were made of it without a torch function."""
    return value


def record(model: nn.Module, example_inputs: Any) -> RecordedGraph:
    """The graph of one forward pass of a copy, in the mode (train or eval) that the model is in; every node knows its shapes.

    Convolutions, linear layers, chains, TorchScript modules and the other modules of ``torch.nn`` are leaves: each call is a ``call_module`` node
    whose target is the module's first name. Torch functions and methods outside of leaves are ``call_function`` and ``call_method`` nodes, parts of
    their results ``getitem`` and ``getattr`` nodes, parameters and buffers that they read ``get_attr`` nodes; the input tensors, however deep in the
    inputs, are the placeholders. What shares memory with a tensor that was written to is read through a node ``after`` from then on, and what lies
    in known memory without a torch function having made it (a subclass's view, numpy) is an ``alias``. Arguments that are neither plain nor
    containers stand as the name of their class.

    Args:
        model: any module but a leaf.
        example_inputs: a tensor, a tuple of positional arguments, or a mapping of keyword arguments.

    Raises:
        SurgeryTypeError: the model is itself a leaf and so would be nameless, or cannot be copied.
        SurgeryValueError: it does not accept the inputs; its own error is the cause.
    """
    if is_layer(model) or isinstance(model, Chain | torch.jit.ScriptModule):
        raise SurgeryTypeError(f"model: it is itself a {type(model).__name__}, without a name in a graph; wrap it: nn.Sequential(model)")
    check_initialized(model)
    return quietly(lambda: _recorded(model, example_inputs))


def _recorded(model: nn.Module, example_inputs: Any) -> RecordedGraph:
    twin = private_copy(model)
    recorder = _Recorder(twin)
    for module, names in named_groups(twin):
        if module is not twin and _is_leaf(module):
            watch(module, partial(recorder.enter_leaf, names[0]), recorder.leave_leaf)
    args, kwargs = arguments(private_inputs(example_inputs))
    recorder.take_inputs(twin, args, kwargs)
    with model_errors(model, example_inputs), _Operators(recorder), _Functions(recorder):
        output = callable_of(twin)(*args, **kwargs)
    return recorder.finish(output)


def _is_leaf(module: nn.Module) -> bool:
    """Layers, chains and TorchScript of whatever class, and what ``fx.Tracer`` takes for leaves by default: torch's own modules but containers."""
    if is_layer(module) or isinstance(module, Chain | torch.jit.ScriptModule):
        return True
    return module.__module__.startswith(("torch.nn", "torch.ao.nn")) and not isinstance(module, nn.Sequential)


class _Recorder:
    """The graph as it grows, and which node gave each tensor."""

    def __init__(self, model: nn.Module) -> None:
        self.graph = RecordedGraph()
        self.depth = 0  # of leaves and functions that are running; what happens inside them is theirs
        self._held = list(_attributes(model))  # kept alive, like all tensors that are met, so that no id is given twice
        self._names = {id(tensor): name for name, tensor in reversed(self._held)}
        self._nodes: dict[int, fx.Node | Callable[[], fx.Node]] = {}  # by the tensor's id; made when first used where it is a part of a result
        self._parts: dict[tuple[fx.Node, Path], fx.Node] = {}
        self._sharing: dict[int, list[tuple[int, int, Tensor]]] = {}  # every tensor that was met, with its extent, by storage
        self._leaves: list[tuple[str, Any, Any, _Versions]] = []
        self._constants = 0

    def take_inputs(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        taken: set[str] = set()
        for name, value in _named_inputs(model, args, kwargs):
            for path, tensor in _parts_of(value):
                if id(tensor) in self._nodes:
                    continue
                base = re.sub(r"\W", "_", "_".join(str(part) for part in (name, *(key for _, key in path))))
                target = next(t for t in (base, *(f"{base}_{n}" for n in range(1, len(taken) + 2))) if t not in taken)
                taken.add(target)
                node = self.graph.placeholder(target)
                node.meta["tensor_meta"] = tensor_metadata(tensor)
                self._know(tensor, node)

    def enter_leaf(self, name: str, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.depth += 1
        if self.depth == 1:
            with self._unheard():
                self._leaves.append((name, self._refer(args), self._refer(kwargs), _Versions((args, kwargs))))

    def leave_leaf(self, _: nn.Module, output: Any, returned: bool) -> Any:
        self.depth -= 1
        if self.depth > 0:
            return None
        name, args, kwargs, versions = self._leaves.pop()
        return self._note("call_module", name, args, kwargs, versions, output) if returned else None

    def call(self, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], *, rename: bool) -> Any:
        """Call a function and write it down, unless it is called from inside of another call or has nothing to do with tensors' numbers.

        ``rename``: a result that is one of the arguments, unchanged, may come back as another tensor object with the same memory.
        """
        if self.depth > 0 or _is_question(function):
            return function(*args, **kwargs)
        with self._unheard():
            versions = _Versions((args, kwargs))
            refs = (self._refer(args), self._refer(kwargs)) if versions.tensors else None
        self.depth += 1
        try:
            result = function(*args, **kwargs)
        finally:
            self.depth -= 1
        if refs is None:
            if next(_parts_of(result), None) is None:
                return result
            refs = (self._refer(args), self._refer(kwargs))
        op, target, refs = _callee(function, *refs)
        in_place = op == "call_method" and target.endswith("_") and not target.endswith("__")
        return self._note(op, target, *refs, versions, result, rename=rename and not in_place)

    def finish(self, output: Any) -> RecordedGraph:
        self.graph.output(self._refer(output))
        for node in reversed(self.graph.nodes):  # what was written down in case that somebody reads it
            unread = isinstance(node.target, torch._ops.OpOverload) and not node.target._schema.is_mutable
            if (unread or node.target is after) and not node.users:
                self.graph.erase_node(node)
        self.graph.lint()
        return self.graph

    def _note(self, op: str, target: Any, args: Any, kwargs: Any, versions: _Versions, result: Any, *, rename: bool = True) -> Any:
        with self._unheard():
            node = self.graph.create_node(op, target, args, kwargs)
            parts = list(_parts_of(result))
            if parts:
                node.meta["tensor_meta"] = _described(result)
            written = versions.written()
            if rename and type(result) is Tensor and id(result) in versions.tensors and not written and not _is_special(result):
                result = result.view_as(result)  # else whoever reads the argument (a shortcut around an Identity) would seem to read the result
                parts = [((), result)]
            fresh: set[int] = set()
            for path, tensor in parts:
                known = id(tensor) in self._nodes and not any(tensor is t for t in written)
                if id(tensor) not in fresh and (not path or not known):
                    fresh.add(id(tensor))
                    self._know(tensor, partial(self._part, node, path, tensor) if path else node)
            for tensor in written:
                self._wrote(tensor, node, fresh)
        return result

    def _know(self, tensor: Tensor, node: fx.Node | Callable[[], fx.Node]) -> None:
        if id(tensor) not in self._nodes:
            self._sharing.setdefault(_storage(tensor), []).append((*_extent(tensor), tensor))
        self._nodes[id(tensor)] = node

    def _wrote(self, written: Tensor, write: fx.Node, fresh: set[int]) -> None:
        """From now on, whoever reads a tensor in this memory reads what was written, unless it is a result of the write itself."""
        for tensor in {id(t): t for t in (written, *self._in_memory_of(written))}.values():
            if id(tensor) not in fresh:
                self._nodes[id(tensor)] = partial(self._after, tensor, self._node_of(tensor), write)

    def _in_memory_of(self, tensor: Tensor) -> Iterator[Tensor]:
        """Tensors that have been met and share an element with this one, the latest first."""
        memory, (first, end) = _storage(tensor), _extent(tensor)
        near = (t for a, b, t in reversed(self._sharing.get(memory, ())) if a < end and first < b)
        return (t for t in near if _storage(t) == memory and _overlap(t, tensor))

    def _after(self, tensor: Tensor, before: fx.Node, write: fx.Node) -> fx.Node:
        node = self.graph.call_function(after, (before, write))
        node.meta["tensor_meta"] = tensor_metadata(tensor)
        return node

    def _part(self, node: fx.Node, path: Path, tensor: Tensor) -> fx.Node:
        """The node that takes a tensor out of a node's result."""
        if not path:
            return node
        if (node, path) not in self._parts:
            function, key = path[-1]
            part = self.graph.call_function(function, (self._part(node, path[:-1], tensor), key))
            part.meta["tensor_meta"] = _at(node.meta["tensor_meta"], path)
            self._parts[node, path] = part
        return self._parts[node, path]

    def _node_of(self, tensor: Tensor) -> fx.Node:
        if id(tensor) not in self._nodes:
            node = self._origin(tensor)
            node.meta["tensor_meta"] = tensor_metadata(tensor)
            self._know(tensor, node)
        found = self._nodes[id(tensor)]
        if not isinstance(found, fx.Node):
            found = self._nodes[id(tensor)] = found()
        return found

    def _origin(self, tensor: Tensor) -> fx.Node:
        """A node for a tensor that no call gave: it is held by a module, lies in the memory of one that is known, or was made by other means."""
        name = self._names.get(id(tensor))
        if name is None:
            source = next(self._in_memory_of(tensor), None)
            if source is not None:
                return self.graph.call_function(alias, (self._node_of(source),))
            name, self._constants = f"_tensor_constant{self._constants}", self._constants + 1
        return self.graph.create_node("get_attr", name)

    def _refer(self, value: Any) -> Any:
        """An argument as the graph holds it: tensors are nodes, containers stay what they are."""
        if isinstance(value, Tensor):
            return self._node_of(value)
        if isinstance(value, PLAIN):
            return value
        if isinstance(value, Mapping):
            return {key if isinstance(key, PLAIN) else str(key): self._refer(item) for key, item in value.items()}
        if isinstance(value, slice):
            return slice(self._refer(value.start), self._refer(value.stop), self._refer(value.step))
        if isinstance(value, list):
            return [self._refer(item) for item in value]
        if isinstance(value, tuple):
            return tuple(self._refer(item) for item in value)
        if is_dataclass(value) and not isinstance(value, type):
            return {field.name: self._refer(getattr(value, field.name)) for field in fields(value)}
        return f"<{type(value).__name__}>"

    @contextmanager
    def _unheard(self) -> Iterator[None]:
        """What the recorder itself asks of tensors goes to no mode and no subclass."""
        self.depth += 1
        try:
            with torch._C.DisableTorchFunction():
                yield
        finally:
            self.depth -= 1


class _Functions(TorchFunctionMode):
    def __init__(self, recorder: _Recorder) -> None:
        super().__init__()
        self._recorder = recorder

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return self._recorder.call(func, args, kwargs or {}, rename=True)


class _Operators(TorchDispatchMode):
    supports_higher_order_operators = True

    def __init__(self, recorder: _Recorder) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._recorder = recorder

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return self._recorder.call(func, args, kwargs or {}, rename=False)


class _Versions:
    """The tensors among some arguments, and how often each had been written to."""

    def __init__(self, value: Any) -> None:
        self.tensors = {id(tensor): tensor for _, tensor in _parts_of(value)}
        self._before = {key: _version(tensor) for key, tensor in self.tensors.items()}

    def written(self) -> list[Tensor]:
        """Those that have been written to since, or given other memory."""
        return [tensor for key, tensor in self.tensors.items() if _version(tensor) != self._before[key]]


def _version(tensor: Tensor) -> tuple[int | None, int]:
    return (None if tensor.is_inference() else tensor._version), _storage(tensor)


def _is_special(tensor: Tensor) -> bool:
    return tensor.layout != torch.strided or tensor.is_nested


def _storage(tensor: Tensor) -> int:
    """A number for the tensor's memory; of its own where it has none that can be named."""
    try:
        storage = tensor.untyped_storage()
        return storage.data_ptr() or -int(storage._cdata)
    except (NotImplementedError, RuntimeError):
        return id(tensor)


def _overlap(left: Tensor, right: Tensor) -> bool:
    """Whether two tensors in the same storage have an element in common, exactly: chunks along channels interleave without one.

    numpy solves this from addresses, shapes and strides alone, and looks at no memory.
    """
    import numpy

    if left.layout != torch.strided or right.layout != torch.strided:
        return True
    try:
        return bool(numpy.shares_memory(_addresses(left), _addresses(right), max_work=100_000))  # type: ignore[arg-type]
    except numpy.exceptions.TooHardError:
        return True


def _extent(tensor: Tensor) -> tuple[int, int]:
    """The bytes of the storage that the tensor lies in, from the first to behind the last."""
    if tensor.layout != torch.strided:
        return (0, 1)
    if tensor.numel() == 0:
        return (0, 0)
    first, size = int(tensor.storage_offset()), tensor.element_size()
    return first * size, (1 + first + sum((n - 1) * int(step) for n, step in zip(tensor.shape, tensor.stride(), strict=True))) * size


def _addresses(tensor: Tensor) -> Any:
    import numpy

    size = tensor.element_size()
    holder = SimpleNamespace(
        __array_interface__={
            "version": 3,
            "typestr": f"|V{size}",
            "data": ((1 + tensor.storage_offset()) * size, True),
            "shape": tuple(tensor.shape),
            "strides": tuple(step * size for step in tensor.stride()),
        }
    )
    return numpy.asarray(holder)


def _attributes(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Every tensor that a module holds as parameter, buffer or plain attribute, by qualified name."""
    for module, names in named_groups(model):
        if isinstance(module, torch.jit.ScriptModule):
            continue
        for table in (module._parameters, module._buffers, vars(module)):
            for key, value in table.items():
                if isinstance(value, Tensor):
                    yield ".".join(part for part in (names[0], key) if part), value


def _named_inputs(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[tuple[str, Any]]:
    try:
        signature = inspect.signature(model.forward)
        bound = signature.bind(*args, **kwargs).arguments
    except (TypeError, ValueError):  # no signature, or the call will fail in its own words
        return [(f"arg{n}", value) for n, value in enumerate(args)] + list(kwargs.items())
    named: list[tuple[str, Any]] = []
    for name, value in bound.items():
        named += value.items() if signature.parameters[name].kind is inspect.Parameter.VAR_KEYWORD else [(name, value)]
    return named


def _parts_of(value: Any, path: Path = ()) -> Iterator[tuple[Path, Tensor]]:
    """Every tensor in nested containers, with the way to it."""
    if isinstance(value, Tensor):
        yield path, value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from _parts_of(item, (*path, (operator.getitem, key)))
    elif isinstance(value, list | tuple):
        for index, item in enumerate(value):
            yield from _parts_of(item, (*path, (operator.getitem, index)))
    elif is_dataclass(value) and not isinstance(value, type):
        for field in fields(value):
            yield from _parts_of(getattr(value, field.name, None), (*path, (builtins.getattr, field.name)))


def _described(value: Any) -> Any:
    """The metadata of every tensor, in containers like those that hold them; None for everything else."""
    if isinstance(value, Tensor):
        return tensor_metadata(value)
    if isinstance(value, Mapping):
        return {key: _described(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return tuple(_described(item) for item in value)
    if is_dataclass(value) and not isinstance(value, type):
        return {field.name: _described(getattr(value, field.name, None)) for field in fields(value)}
    return None


def _at(described: Any, path: Path) -> Any:
    for _, key in path:
        described = described[key]
    return described


def _is_question(function: Callable[..., Any]) -> bool:
    name = getattr(function, "__name__", "")
    if name == "__get__":
        return _property_name(function) not in ("data", "T", "mT", "H", "mH", "real", "imag", "grad")
    return name in QUESTIONS


def _property_name(accessor: Any) -> str:
    owner = accessor.__self__
    named: Any = owner.fget if isinstance(owner, property) else owner
    return str(named.__name__)


def _callee(function: Any, args: Any, kwargs: Any) -> tuple[str, Any, tuple[Any, Any]]:
    """How a graph names what was called: op, target, and the arguments to go with it."""
    name = getattr(function, "__name__", "")
    if name == "__get__":
        return "call_function", builtins.getattr, ((args[0], _property_name(function)), {})
    if name == "__set__":
        return "call_function", builtins.setattr, ((args[0], _property_name(function), *args[1:]), {})
    if getattr(Tensor, name, None) is function and args:
        return "call_method", name, (args, kwargs)
    return "call_function", function, (args, kwargs)
