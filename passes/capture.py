"""Seeing a model: a graph that is believed only when proved, and where there is none a recording.

Nothing here changes the caller's model or inputs, nor any random state: every run happens on a copy, and generators are put back.
"""

from __future__ import annotations

from collections.abc import Sequence
from operator import attrgetter
from typing import Any

from torch import fx, nn
from torch.fx.proxy import TraceError

from passes.chain import Chain
from passes.errors import ParityError, SurgeryError, SurgeryTypeError, SurgeryValueError
from passes.graph_meta import CHAINS, chains_of_modules
from passes.parity import assert_parity, difference, tensors_in
from passes.running import (
    arguments,
    check_initialized,
    first_line,
    kept_random_states,
    outputs_in_a_row,
    private_copy,
    proof_runs,
    quietly,
    random_state,
    run,
    seed_all,
)
from passes.shared_state import kept_shared_state
from passes.site import is_layer, named_groups
from passes.watching import observe_graph

__all__ = ["arguments", "capture", "private_copy", "run", "trace"]

TRACING_SEED = 11  # not one of those of the proof


def capture(model: nn.Module, example_inputs: Any) -> fx.Graph:
    """The model as an ``fx.Graph`` whose nodes carry their shapes in ``meta["tensor_meta"]``; layers are leaves, whatever their class.

    The graph is that of the mode (train or eval) which the model is in. It comes from ``torch.fx`` symbolic tracing of a copy, if the trace, run
    twice in a row, gives the model's own outputs. Where it does not, or the model cannot be traced (control flow on data), the graph is a
    ``RecordedGraph``: that of one forward pass, good for shapes, calls, drawing and finding neighbours, with a chain as one node.

    Args:
        model: any module.
        example_inputs: a tensor, a tuple of positional arguments, or a mapping of keyword arguments.

    Raises:
        SurgeryTypeError: the model is itself a layer or a chain, and so would be nameless in a graph; it or the inputs cannot be copied.
        SurgeryValueError: it does not accept the inputs; it or they hold no numbers.
    """
    try:
        return trace(model, example_inputs).graph
    except (SurgeryTypeError, SurgeryValueError):
        raise
    except SurgeryError:
        from passes.recording import record

        return record(model, example_inputs)


def trace(model: nn.Module, example_inputs: Any) -> fx.GraphModule:
    """The model as a flat ``GraphModule`` with weights of its own; a chain becomes its layers' nodes.

    It is proved by two calls in a row, the first on the example inputs and the second on other numbers of the same shapes, since what a first call
    leaves behind (counts, caches, written constants) shows in the second. No random number may be drawn while it is traced: it would stand in
    the graph for good.

    Args:
        model: any module but a single layer.
        example_inputs: a tensor, a tuple of positional arguments, or a mapping of keyword arguments.

    Raises:
        SurgeryError: the model cannot be traced, or its trace computes something else; the message says why.
        SurgeryTypeError: the model is itself a layer or a chain, and so would be nameless in a graph; it or the inputs cannot be copied.
        SurgeryValueError: it does not accept the inputs; it or they hold no numbers.
    """
    if is_layer(model) or isinstance(model, Chain):
        raise SurgeryTypeError(f"model: it is itself a {type(model).__name__}, without a name in a graph; wrap it: nn.Sequential(model)")
    _check_numbers(model, example_inputs)
    inputs, expected = proof_runs(model, example_inputs)  # before tracing, so that caches which copies share are filled with real tensors
    twin = private_copy(model)
    tracer = _LayerTracer()
    try:
        with kept_shared_state(model), kept_random_states():
            seed_all(TRACING_SEED)
            before = random_state()
            graph = tracer.trace(twin)
            drawn = random_state() != before
    except Exception as error:  # tracing runs the model's own code on proxies: it may raise anything
        raise SurgeryError(
            f"{type(model).__name__} cannot be traced symbolically ({first_line(error)}); "
            "surgery on the module itself (surgery.decompose) needs no trace"
        ) from error
    if drawn:
        raise SurgeryError(
            f"{type(model).__name__} cannot be traced symbolically (its code draws random numbers, which would be constants of the graph); "
            "surgery on the module itself (surgery.decompose) needs no trace"
        )
    # Some models cache proxies while they are traced, so the graph takes its weights from a copy that was not.
    fresh = private_copy(model)
    constants = []
    for node in graph.find_nodes(op="get_attr"):
        if "." not in node.target and not hasattr(fresh, node.target):  # a tensor that the model made while it was traced
            setattr(fresh, node.target, getattr(twin, node.target))
            constants.append(node.target)
            continue
        try:
            attrgetter(node.target)(fresh)
        except AttributeError as error:
            why = f"its code makes {node.target} only when it runs"
            raise SurgeryError(f"{type(model).__name__} cannot be traced symbolically ({why}); run it once before") from error
    del twin, tracer  # before the proof, which needs the memory of another copy
    traced = fx.GraphModule(fresh, graph, type(model).__name__)
    modes = {name: module.training for module, names in named_groups(fresh) for name in names}
    for module, names in named_groups(traced):
        module.training = modes[names[0]]  # submodules may be in another mode than the model, as frozen batch norms are
    _prove(traced, model, inputs, expected, constants)
    shapes = observe_graph(traced, example_inputs).shapes
    for node in traced.graph.nodes:
        if node.name in shapes:
            node.meta["tensor_meta"] = shapes[node.name]
    called = {name for _, names in named_groups(traced) for name in names}
    chains = {name: info for name, info in chains_of_modules(model).items() if name in called}
    if chains:
        traced.meta[CHAINS] = chains
    return traced


class _LayerTracer(fx.Tracer):
    """Symbolic tracer for which every convolution and linear layer is a leaf, also subclasses defined outside torch."""

    def is_leaf_module(self, module: nn.Module, name: str) -> bool:
        return is_layer(module) or super().is_leaf_module(module, name)


def _check_numbers(model: nn.Module, example_inputs: Any) -> None:
    """Refuse what cannot be run on numbers, and so proves nothing."""
    check_initialized(model)
    for module, names in named_groups(model):
        for key, tensor in (*module._parameters.items(), *module._buffers.items()):
            if tensor is not None and tensor.is_meta:
                name = ".".join(part for part in (names[0], key) if part)
                raise SurgeryValueError(f"{name}: it is on the meta device and has no numbers; load weights first")
    if any(tensor.is_meta for tensor in tensors_in(example_inputs)):
        raise SurgeryValueError("example_inputs: they are on the meta device and have no numbers, so that no trace can be compared with the model")


def _prove(traced: fx.GraphModule, model: nn.Module, inputs: Sequence[Any], expected: Sequence[Any], constants: Sequence[str]) -> None:
    """Compare two calls in a row of the trace with those of the model, and see that no constant of the graph changes meanwhile."""
    try:
        for what, got, wanted in zip(
            ("the trace and the model", "a second call of the trace and the model"), outputs_in_a_row(traced, inputs), expected
        ):
            assert_parity(got, wanted, training=model.training, what=what)
        changed = _written(traced, inputs, constants)
        if changed:
            raise ParityError(f"it writes to a tensor that the model makes anew in each call ({changed})")
    except (ParityError, SurgeryValueError, TraceError) as error:  # the last where a proxy was left in what the trace reads
        raise SurgeryError(
            f"{type(model).__name__} was traced, but the trace is wrong: {error}; surgery on the module itself (surgery.decompose) needs no trace"
        ) from error


def _written(traced: fx.GraphModule, inputs: Sequence[Any], constants: Sequence[str]) -> str | None:
    """The first of the graph's constants that a call writes to."""
    if not constants:
        return None
    twin = private_copy(traced)
    before = {name: getattr(twin, name)._version for name in constants}
    quietly(lambda: run(twin, inputs[0]))
    return next((n for n in constants if getattr(twin, n)._version != before[n] or difference(getattr(twin, n), getattr(traced, n)) > 0), None)
