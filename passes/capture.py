"""Seeing a model: private copies, the calls of one forward pass, and a graph that is believed only when proved.

Nothing here changes the caller's model or inputs, nor torch's random state: every run happens on a copy, in a forked generator.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx, nn

from passes.chain import Chain
from passes.errors import ParityError, SurgeryError, SurgeryTypeError, SurgeryValueError
from passes.geometry import Geometry
from passes.graph_meta import CHAINS, chains_of_modules
from passes.parity import assert_parity, private_inputs, tensors_in
from passes.site import Call, is_layer, named_groups

__all__ = ["arguments", "capture", "observe_calls", "observe_shapes", "private_copy", "run", "trace"]


def private_copy(model: nn.Module, *, share_parameters: bool = False) -> nn.Module:
    """A deep copy that can be worked on; with ``share_parameters`` the parameters (never the buffers) are the caller's own.

    Tensors that are attributes and results of a computation (old-style ``weight_norm``) are copied detached.

    Raises:
        SurgeryTypeError: the model holds something that cannot be copied.
    """
    memo: dict[int, Any] = {}
    for module in model.modules():
        for value in (*vars(module).values(), *module._buffers.values()):
            if isinstance(value, Tensor) and value.grad_fn is not None:
                memo[id(value)] = value.detach().clone()
    if share_parameters:
        memo |= {id(parameter): parameter for parameter in model.parameters()}
    try:
        return copy.deepcopy(model, memo)
    except (TypeError, RuntimeError, AttributeError, ValueError) as error:
        raise SurgeryTypeError(f"the model ({type(model).__name__}) cannot be copied ({error}); give a model that copy.deepcopy accepts") from error


def run(model: nn.Module, example_inputs: Any) -> Any:
    """The model's output: a tuple is its positional arguments, a mapping its keyword arguments, anything else its one argument.

    Raises:
        SurgeryValueError: the model does not accept these inputs; the model's own error is the cause.
    """
    args, kwargs = arguments(private_inputs(example_inputs))
    with _model_errors(model, example_inputs):
        return model(*args, **kwargs)


@contextmanager
def _model_errors(model: nn.Module, example_inputs: Any) -> Iterator[None]:
    """Whatever the model's own code raises on these inputs becomes one error that says so."""
    try:
        yield
    except SurgeryError:
        raise
    except Exception as error:  # the model's own code runs here: it may raise anything
        shapes = ", ".join(f"{tuple(t.shape)} {str(t.dtype).removeprefix('torch.')} on {t.device}" for t in tensors_in(example_inputs))
        raise SurgeryValueError(
            f"example_inputs: {type(model).__name__} fails on them ({shapes or repr(example_inputs)}): {type(error).__name__}: {error}"
        ) from error


def observe_calls(model: nn.Module, example_inputs: Any) -> dict[str, tuple[Call, ...]]:
    """Calls of every convolution, linear layer and chain in one forward pass (eval mode), by the layer's first name.

    A layer that this pass does not reach has no calls. A call that a layer of this geometry cannot have (a subclass of its own kind may take
    anything) is not counted.
    """
    twin = private_copy(model).eval()
    calls: dict[str, list[Call]] = {}
    for module, names in named_groups(twin):
        if is_layer(module) or isinstance(module, Chain):
            seen = calls.setdefault(names[0], [])
            geometry = Geometry.of(module.__dict__["_surgery"].original if isinstance(module, Chain) else module)
            module.register_forward_hook(partial(_note, seen, geometry), with_kwargs=True)
    with _quiet_run():
        run(twin, example_inputs)
    return {name: tuple(seen) for name, seen in calls.items()}


def _note(seen: list[Call], geometry: Geometry, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
    given, got = next(tensors_in((args, kwargs)), None), next(tensors_in(output), None)
    if given is not None and got is not None and geometry.fits(tuple(given.shape)):
        seen.append(Call(tuple(given.shape), tuple(got.shape)))


def observe_shapes(traced: fx.GraphModule, example_inputs: Any) -> dict[str, Any]:
    """``tensor_meta`` of every node that gives a tensor, by the node's name, from running the graph once (eval mode).

    Raises:
        SurgeryValueError: the graph does not accept these inputs.
    """
    from torch.fx.node import map_aggregate
    from torch.fx.passes.shape_prop import TensorMetadata

    shapes: dict[str, Any] = {}

    class Watching(fx.Interpreter):
        def run_node(self, node: fx.Node) -> Any:
            result = super().run_node(node)
            if next(tensors_in(result), None) is not None:
                shapes[node.name] = map_aggregate(result, metadata)
            return result

        def placeholder(self, target: Any, args: Any, kwargs: Any) -> Any:
            return next(self.args_iter) if str(target).startswith("**") else super().placeholder(target, args, kwargs)

    def metadata(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        return TensorMetadata(value.shape, value.dtype, value.requires_grad, value.stride(), None, False, {})

    twin: Any = private_copy(traced)
    args, kwargs = arguments(private_inputs(example_inputs))
    with _quiet_run(), _model_errors(traced, example_inputs):
        bound = inspect.signature(traced.forward).bind(*args, **kwargs)
        bound.apply_defaults()
        flat: list[Any] = []
        for name, value in bound.arguments.items():
            flat.extend(value if bound.signature.parameters[name].kind is inspect.Parameter.VAR_POSITIONAL else [value])
        Watching(twin.eval()).run(*flat)
    return shapes


def capture(model: nn.Module, example_inputs: Any) -> fx.Graph:
    """The model as an ``fx.Graph`` whose nodes carry their shapes in ``meta["tensor_meta"]``; layers are leaves, whatever their class.

    The graph is that of the mode (train or eval) which the model is in. It comes from ``torch.fx`` symbolic tracing of a copy, and is
    returned only if running it on the example inputs gives the model's own output.

    Args:
        model: any module.
        example_inputs: a tensor, a tuple of positional arguments, or a mapping of keyword arguments.

    Raises:
        SurgeryError: the model cannot be traced, or its trace computes something else; the message says why.
    """
    return trace(model, example_inputs).graph


def trace(model: nn.Module, example_inputs: Any) -> fx.GraphModule:
    """The model as a flat ``GraphModule`` with weights of its own, proved as ``capture`` says; a chain becomes its layers' nodes.

    Raises:
        SurgeryError: as for ``capture``.
        SurgeryTypeError: the model is itself a layer or a chain, and so would be nameless in a graph.
    """
    if is_layer(model) or isinstance(model, Chain):
        raise SurgeryTypeError(f"model: it is itself a {type(model).__name__}, without a name in a graph; wrap it: nn.Sequential(model)")
    twin = private_copy(model)
    tracer = _LayerTracer()
    try:
        graph = tracer.trace(twin)
    except Exception as error:  # tracing runs the model's own code on proxies: it may raise anything
        raise SurgeryError(
            f"{type(model).__name__} cannot be traced symbolically ({type(error).__name__}: {error}); "
            "surgery on the module itself (surgery.decompose) needs no trace"
        ) from error
    # Some models cache proxies while they are traced, so the graph takes its weights from a copy that was not.
    traced = fx.GraphModule(private_copy(model), graph, type(model).__name__)
    traced.train(model.training)
    _prove(traced, model, example_inputs)
    chains = chains_of_modules(model)
    if chains:
        traced.meta[CHAINS] = chains
    return traced


class _LayerTracer(fx.Tracer):
    """Symbolic tracer for which every convolution and linear layer is a leaf, also subclasses defined outside torch."""

    def is_leaf_module(self, module: nn.Module, name: str) -> bool:
        return is_layer(module) or super().is_leaf_module(module, name)


def _prove(traced: fx.GraphModule, model: nn.Module, example_inputs: Any) -> None:
    with _quiet_run():
        torch.manual_seed(0)
        expected = run(private_copy(model), example_inputs)
        torch.manual_seed(0)
        try:
            got = run(private_copy(traced), example_inputs)
            assert_parity(got, expected, training=model.training, what="the trace and the model")
        except (ParityError, SurgeryValueError) as error:
            raise SurgeryError(
                f"{type(model).__name__} was traced, but the trace is wrong: {error}; surgery on the module itself (surgery.decompose) needs no trace"
            ) from error
    shapes = observe_shapes(traced, example_inputs)
    for node in traced.graph.nodes:
        if node.name in shapes:
            node.meta["tensor_meta"] = shapes[node.name]


def arguments(example_inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Example inputs as positional and keyword arguments, by the convention that ``run`` states."""
    if isinstance(example_inputs, tuple):
        return example_inputs, {}
    if isinstance(example_inputs, Mapping):
        return (), dict(example_inputs)
    return (example_inputs,), {}


@contextmanager
def _quiet_run() -> Iterator[None]:
    """No gradients, and the random state afterwards as it was."""
    with torch.random.fork_rng(), torch.no_grad():
        yield
