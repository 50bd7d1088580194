"""Seeing a model: a graph that is believed only when proved, and where there is none a recording.

Nothing here changes the caller's model or inputs, nor any random state: every run happens on a copy, and generators are put back.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx, nn

from passes.chain import Chain
from passes.errors import ParityError, SurgeryError, SurgeryTypeError, SurgeryValueError
from passes.graph_meta import CHAINS, chains_of_modules
from passes.parity import assert_parity
from passes.running import arguments, kept_random_states, private_copy, quiet_run, run
from passes.site import is_layer
from passes.watching import observe_graph

__all__ = ["arguments", "capture", "private_copy", "run", "trace"]


def capture(model: nn.Module, example_inputs: Any) -> fx.Graph:
    """The model as an ``fx.Graph`` whose nodes carry their shapes in ``meta["tensor_meta"]``; layers are leaves, whatever their class.

    The graph is that of the mode (train or eval) which the model is in. It comes from ``torch.fx`` symbolic tracing of a copy, if running the
    trace on the example inputs gives the model's own output. Where it does not, or the model cannot be traced (control flow on data), the graph is
    a ``RecordedGraph``: that of one forward pass, good for shapes, calls, drawing and finding neighbours, with a chain as one node.

    Args:
        model: any module.
        example_inputs: a tensor, a tuple of positional arguments, or a mapping of keyword arguments.

    Raises:
        SurgeryTypeError: the model is itself a layer or a chain, and so would be nameless in a graph, or cannot be copied.
        SurgeryValueError: it does not accept the inputs.
    """
    try:
        return trace(model, example_inputs).graph
    except (SurgeryTypeError, SurgeryValueError):
        raise
    except SurgeryError:
        from passes.recording import record

        return record(model, example_inputs)


def trace(model: nn.Module, example_inputs: Any) -> fx.GraphModule:
    """The model as a flat ``GraphModule`` with weights of its own, proved on the example inputs; a chain becomes its layers' nodes.

    Raises:
        SurgeryError: the model cannot be traced, or its trace computes something else; the message says why.
        SurgeryTypeError: the model is itself a layer or a chain, and so would be nameless in a graph.
    """
    if is_layer(model) or isinstance(model, Chain):
        raise SurgeryTypeError(f"model: it is itself a {type(model).__name__}, without a name in a graph; wrap it: nn.Sequential(model)")
    twin = private_copy(model)
    tracer = _LayerTracer()
    try:
        with kept_random_states():
            graph = tracer.trace(twin)
    except Exception as error:  # tracing runs the model's own code on proxies: it may raise anything
        raise SurgeryError(
            f"{type(model).__name__} cannot be traced symbolically ({type(error).__name__}: {error}); "
            "surgery on the module itself (surgery.decompose) needs no trace"
        ) from error
    # Some models cache proxies while they are traced, so the graph takes its weights from a copy that was not.
    fresh = private_copy(model)
    for node in graph.find_nodes(op="get_attr"):
        if "." not in node.target and not hasattr(fresh, node.target):  # a tensor that the model made while it was traced
            setattr(fresh, node.target, getattr(twin, node.target))
    traced = fx.GraphModule(fresh, graph, type(model).__name__)
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
    with quiet_run():
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
    shapes = observe_graph(traced, example_inputs).shapes
    for node in traced.graph.nodes:
        if node.name in shapes:
            node.meta["tensor_meta"] = shapes[node.name]
