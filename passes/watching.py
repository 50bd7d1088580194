"""What one forward pass of the example inputs tells: calls of layers, who else reads their weights, and layers written as functions.

Two modes listen while a private copy runs: operators tell which parameters are read, however the model comes by them (``.data``, a view, a torch
function, an extension); torch functions tell what was convolved. Hooks tell which modules are running meanwhile.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from math import prod
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from passes.chain import Chain
from passes.geometry import Geometry
from passes.neighbours import is_norm
from passes.parity import private_inputs, tensors_in
from passes.running import arguments, check_initialized, evaluating_copy, model_errors, quietly, run, tensor_metadata, watch
from passes.site import Call, is_layer, named_groups

__all__ = ["COMPUTED", "FunctionUse", "Observation", "count_of_tensors", "observe_graph", "observe_module"]

COMPUTED = "computed"

# Convolutions and linear maps as functions, by name; input and weight are their first two arguments.
FUNCTIONS: dict[Callable[..., Any], str] = {
    torch.conv1d: "conv1d",
    torch.conv2d: "conv2d",
    torch.conv3d: "conv3d",
    torch.conv_transpose1d: "conv_transpose1d",
    torch.conv_transpose2d: "conv_transpose2d",
    torch.conv_transpose3d: "conv_transpose3d",
    torch.convolution: "convolution",
    functional.linear: "linear",
}
# Operators whose result has the shape or type of a tensor and none of its numbers, beside those that only give its memory another name.
SHAPE_ONLY = {"is_same_size", "zeros_like", "ones_like", "empty_like", "full_like", "rand_like", "randn_like", "randint_like"} | {
    "new_empty",
    "new_empty_strided",
    "new_zeros",
    "new_ones",
    "new_full",
}
# Methods that hand a tensor's memory or numbers to code that calls no operators.
HANDS_OUT = {"numpy", "tolist", "untyped_storage", "storage", "_typed_storage", "data_ptr", "__array__", "__dlpack__"} | {
    "__repr__",
    "__format__",
    "__reduce_ex__",
}
# Operators below all ways to convolve, for calls that go around torch's functions (scripted code, ``torch.ops``).
CONVOLUTIONS = {"convolution", "_convolution", "convolution_overrideable"}


@dataclass(frozen=True, slots=True, kw_only=True)
class FunctionUse:
    """A convolution or linear map that a module calls as a function, with a weight that is no layer's. It cannot be cut, only reported.

    Attributes:
        module: first name of the innermost module that runs it; empty for the model itself.
        function: its name, without the package.
        weight: qualified name of the parameter or buffer that its weight is or is a view of; ``"computed"`` for any other.
        weight_shape: of the weight.
        calls: in one forward pass of the example inputs.
        macs: of all these calls.
    """

    module: str
    function: str
    weight: str
    weight_shape: tuple[int, ...]
    calls: tuple[Call, ...]
    macs: int


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Observation:
    """What one forward pass of the example inputs tells, in eval mode.

    Attributes:
        calls: of every convolution, linear layer and chain, by the layer's first name; none where the pass does not reach it. A call that a layer
            of this geometry cannot have (a subclass of its own kind may take anything) is not counted.
        readers: the reason to keep a layer whose weight or bias is read while it is not running, with who reads it, or whose geometry is changed
            meanwhile.
        functions: convolutions and linear maps called as functions.
        shapes: for a graph module ``tensor_meta`` of every node that gives a tensor, by the node's name.
        norms: calls of every batch norm, as ``calls``.
        gradients: whether the model runs only with gradients: it differentiates by its inputs.
        outputs: how many tensors the output holds.
    """

    calls: Mapping[str, tuple[Call, ...]] = field(default_factory=dict)
    readers: Mapping[str, str] = field(default_factory=dict)
    functions: tuple[FunctionUse, ...] = ()
    shapes: Mapping[str, Any] = field(default_factory=dict)
    norms: Mapping[str, tuple[Call, ...]] = field(default_factory=dict)
    gradients: bool = False
    outputs: int = 0


def observe_module(model: nn.Module, example_inputs: Any) -> Observation:
    """Run a copy of a module once (eval mode), with gradients only where it fails without them.

    Raises:
        SurgeryTypeError: the model cannot be copied.
        SurgeryValueError: it has no shapes yet, or does not accept the inputs.
    """
    check_initialized(model)

    def attempt() -> Observation:
        twin = evaluating_copy(model)
        seen = _Watch(twin)
        with _Operators(seen), _Functions(seen):
            outputs = count_of_tensors(run(twin, example_inputs))
        return replace(seen.observation(), outputs=outputs)

    return quietly(attempt)


def count_of_tensors(output: Any) -> int:
    """How many tensors an output holds. What a generator would give is not asked for."""
    return 0 if isinstance(output, Iterator) else len(list(tensors_in(output)))


def observe_graph(traced: fx.GraphModule, example_inputs: Any) -> Observation:
    """Run a copy of a graph module once (eval mode), node for node: its shapes and functions. Who reads weights the graph itself says.

    Raises:
        SurgeryValueError: the graph does not accept these inputs.
    """
    return quietly(lambda: _observed_graph(traced, example_inputs))


def _observed_graph(traced: fx.GraphModule, example_inputs: Any) -> Observation:
    from torch.fx.node import map_aggregate

    shapes: dict[str, Any] = {}

    class Watching(fx.Interpreter):
        def run_node(self, node: fx.Node) -> Any:
            result = super().run_node(node)
            if next(tensors_in(result), None) is not None:
                with torch._C.DisableTorchFunction():
                    shapes[node.name] = map_aggregate(result, lambda value: tensor_metadata(value) if isinstance(value, Tensor) else value)
            return result

        def fetch_args_kwargs_from_env(self, n: fx.Node) -> tuple[tuple[Any, ...], dict[str, Any]]:
            return _plain(super().fetch_args_kwargs_from_env(n))  # type: ignore[no-any-return]

        def placeholder(self, target: Any, args: Any, kwargs: Any) -> Any:
            return next(self.args_iter) if str(target).startswith("**") else super().placeholder(target, args, kwargs)

    twin: Any = evaluating_copy(traced)
    seen = _Watch(twin)
    args, kwargs = arguments(private_inputs(example_inputs))
    with model_errors(traced, example_inputs):
        bound = inspect.signature(traced.forward).bind(*args, **kwargs)
        bound.apply_defaults()
        flat: list[Any] = []
        for name, value in bound.arguments.items():
            flat.extend(value if bound.signature.parameters[name].kind is inspect.Parameter.VAR_POSITIONAL else [value])
        with _Operators(seen), _Functions(seen):
            outputs = count_of_tensors(Watching(twin).run(*flat))
    return replace(seen.observation(), calls={}, readers={}, norms={}, shapes=shapes, outputs=outputs)


def _plain(value: Any) -> Any:
    """Lists and dicts of a graph as those that its generated code makes: functions may write to them."""
    if isinstance(value, list):
        return [_plain(item) for item in value]
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return tuple(map(_plain, value)) if type(value) is tuple else value


class _Watch:
    """What is known of the run so far, and which modules are running, the innermost last."""

    def __init__(self, model: nn.Module) -> None:
        self.functions_running = 0
        self._running: list[nn.Module] = [model]
        self._names = {id(module): names[0] for module, names in named_groups(model)}
        self._calls: dict[str, list[Call]] = {}
        self._norms: dict[str, list[Call]] = {}
        self._reads: dict[tuple[str, str], str] = {}
        self._functions: dict[tuple[str, str, str, tuple[int, ...]], FunctionUse] = {}
        self._given: list[tuple[int, ...] | None] = []
        self._parameters = _Parameters(model)
        self._geometries: dict[int, Geometry] = {}  # of layers, as they were before the run
        for module, names in named_groups(model):
            layer = is_layer(module) or isinstance(module, Chain)
            if layer:
                seen = self._calls.setdefault(names[0], [])
                geometry = Geometry.of(module.__dict__["_surgery"].original if isinstance(module, Chain) else module)
                if not isinstance(module, Chain):
                    self._geometries[id(module)] = geometry
                watch(module, self._enter_layer, partial(self._leave_layer, seen, geometry.fits))
            elif is_norm(module):
                watch(module, self._enter_layer, partial(self._leave_layer, self._norms.setdefault(names[0], []), lambda shape: True))
            elif module is not model:
                watch(module, self._enter, self._leave)

    def observation(self) -> Observation:
        calls = {name: tuple(seen) for name, seen in self._calls.items()}
        readers = {name: reason for wanted in ("bias", "weight") for (name, key), reason in self._reads.items() if key == wanted}
        norms = {name: tuple(seen) for name, seen in self._norms.items()}
        gradients, functions = torch.is_grad_enabled(), tuple(self._functions.values())
        return Observation(calls=calls, readers=readers, functions=functions, norms=norms, gradients=gradients)

    def read(self, tensors: Iterable[Tensor]) -> None:
        """Note which layers' parameters an operator reads while none of their owners is running."""
        for tensor in tensors:
            held = self._parameters.held_by(tensor)
            if held is None or any(owner in self._running for owner in held.owners):
                continue
            reader = self._running[-1]
            for name, key in held.layers:
                self._reads.setdefault((name, key), f"its {key} is read by {self._names[id(reader)] or 'the model'} ({type(reader).__name__})")

    def called(self, function: str, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        """Note a convolution or linear map, unless it is that of a layer that is running, or has the weight of a layer (which then is kept)."""
        given, weight = _argument(args, kwargs, 0, "input"), _argument(args, kwargs, 1, "weight")
        if not isinstance(given, Tensor) or not isinstance(weight, Tensor) or not isinstance(output, Tensor):
            return
        if any(is_layer(module) or isinstance(module, Chain) for module in self._running):
            return
        held = self._parameters.held_by(weight)
        if held is not None and held.layers:
            return
        module = self._names[id(self._running[-1])]
        shape = tuple(weight.shape)
        key = (module, function, COMPUTED if held is None else held.name, shape)
        transposed = "transpose" in function or (function == "convolution" and bool(_argument(args, kwargs, 6, "transposed")))
        before = self._functions.get(key) or FunctionUse(module=module, function=function, weight=key[2], weight_shape=shape, calls=(), macs=0)
        call = Call(tuple(given.shape), tuple(output.shape))
        macs = _macs(function, shape, call.input_shape if transposed else call.output_shape)
        self._functions[key] = replace(before, calls=(*before.calls, call), macs=before.macs + macs)

    @contextmanager
    def inside_function(self) -> Iterator[None]:
        """While a convolution or linear map runs that is noted by its own name."""
        self.functions_running += 1
        try:
            yield
        finally:
            self.functions_running -= 1

    def _enter(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        self._running.append(module)

    def _leave(self, module: nn.Module, output: Any, returned: bool) -> None:
        self._running.pop()

    def _enter_layer(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        self._enter(module, args, kwargs)
        before = self._geometries.get(id(module))
        if before is not None and Geometry.of(module) != before:
            self._reads.setdefault((self._names[id(module)], "weight"), "its stride, padding or dilation is changed while the model runs")
        given = next(tensors_in((args, kwargs)), None)
        self._given.append(None if given is None else tuple(given.shape))

    def _leave_layer(self, seen: list[Call], fits: Callable[[tuple[int, ...]], bool], module: nn.Module, output: Any, returned: bool) -> None:
        self._leave(module, output, returned)
        given, got = self._given.pop(), next(tensors_in(output), None)
        if returned and given is not None and got is not None and fits(given):
            seen.append(Call(given, tuple(got.shape)))


class _Functions(TorchFunctionMode):
    def __init__(self, seen: _Watch) -> None:
        super().__init__()
        self._seen = seen

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func not in FUNCTIONS:
            if getattr(func, "__name__", "") in HANDS_OUT:
                with torch._C.DisableTorchFunction():
                    self._seen.read(_tensors_among((args, kwargs)))
            return func(*args, **(kwargs or {}))
        with self._seen.inside_function():
            output = func(*args, **(kwargs or {}))
        with torch._C.DisableTorchFunction():
            self._seen.called(FUNCTIONS[func], args, kwargs or {}, output)
        return output


class _Operators(TorchDispatchMode):
    supports_higher_order_operators = True  # torch.cond and the like: what they are given is read

    def __init__(self, seen: _Watch) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._seen = seen

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if torch._C._current_autograd_node() is not None:  # a derivative of what ran before, which follows whatever stands for a layer
            return func(*args, **(kwargs or {}))
        if isinstance(func, torch._ops.HigherOrderOperator):
            with torch._C.DisableTorchFunction():
                self._seen.read(_tensors_among((args, kwargs)))
            return func(*args, **(kwargs or {}))
        name = func._schema.name.partition("::")[2]
        if name not in SHAPE_ONLY and (func._schema.is_mutable or not func.is_view):
            with torch._C.DisableTorchFunction():
                self._seen.read(_tensors_among((args, kwargs)))
        output = func(*args, **(kwargs or {}))
        if name in CONVOLUTIONS and not self._seen.functions_running:
            with torch._C.DisableTorchFunction():
                self._seen.called("convolution", args, kwargs or {}, output)
        return output


@dataclass(frozen=True, slots=True, eq=False)
class _Held:
    """A parameter or buffer: its first qualified name, the modules that hold it, and (layer, key) for each convolution or linear layer among them."""

    tensor: Tensor
    name: str
    owners: list[nn.Module]
    layers: list[tuple[str, str]]


class _Parameters:
    """Parameters and buffers of a model by the memory that they lie in."""

    def __init__(self, model: nn.Module) -> None:
        self._held: dict[int, _Held] = {}
        inside_chains = {id(child) for module in model.modules() if isinstance(module, Chain) for child in module.children()}
        for module, names in named_groups(model):
            for key, tensor in (*module._parameters.items(), *module._buffers.items()):
                if not isinstance(tensor, Tensor):
                    continue
                held = self._held.setdefault(id(tensor), _Held(tensor, ".".join(part for part in (names[0], key) if part), [], []))
                held.owners.append(module)
                if is_layer(module) and id(module) not in inside_chains and key in ("weight", "bias"):
                    held.layers.append((names[0], key))
        self._storages = [
            held.tensor.untyped_storage() for held in self._held.values() if _memory(held.tensor) is not None
        ]  # no number is given twice
        self._by_memory: dict[int, _Held] = {}
        for held in self._held.values():
            memory = _memory(held.tensor)
            if memory is not None:
                self._by_memory[memory] = held

    def held_by(self, tensor: Tensor) -> _Held | None:
        """The parameter or buffer that a tensor is, or is a view of."""
        held = self._held.get(id(tensor))
        memory = None if held is not None else _memory(tensor)
        return held if memory is None else self._by_memory.get(memory)


def _memory(tensor: Tensor) -> int | None:
    """A number for the tensor's memory, None where it has none that can be named. In a deep copy every parameter has memory of its own."""
    try:
        return int(tensor.untyped_storage()._cdata)
    except (NotImplementedError, RuntimeError):
        return None


def _tensors_among(arguments: Any) -> Iterator[Tensor]:
    """Tensors in the arguments of an operator: there they are bare or in lists."""
    for value in (*arguments[0], *(arguments[1] or {}).values()):
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, list | tuple):
            yield from (item for item in value if isinstance(item, Tensor))


def _argument(args: tuple[Any, ...], kwargs: dict[str, Any], position: int, name: str) -> Any:
    return args[position] if len(args) > position else kwargs.get(name)


def _macs(function: str, weight: tuple[int, ...], shape: tuple[int, ...]) -> int:
    """MACs of one call: each weight times the pixels at which it is applied, those of ``shape``, whose channels are the weight's first dimension."""
    if function == "linear":
        return prod(shape[:-1] if len(weight) == 2 else shape) * prod(weight)
    return prod(shape) // weight[0] * prod(weight) if weight[0] else 0
