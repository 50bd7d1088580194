"""How data flows from layer to layer: a model's graph without what has one input, for drawing."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import fx, nn

from passes import host_for
from passes.kinds import kind_of
from passes.recording import RecordedGraph
from passes.site import Site

__all__ = ["Flow", "FlowNode", "flow_of"]


@dataclass(frozen=True, slots=True, kw_only=True)
class FlowNode:
    """An input, an output, a layer, or a place where several values meet.

    Attributes:
        name: of the layer, else of the node in the graph.
        text: what it is; for a chain the layer that it stands for.
        pieces: of a chain, in the order in which they are called: name and what each is.
        shape: of its output, None where that is not known.
        is_layer: it is a layer or a chain.
    """

    name: str
    text: str
    pieces: tuple[tuple[str, str], ...] = ()
    shape: tuple[int, ...] | None = None
    is_layer: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Flow:
    """Nodes in the order in which they are computed, and edges between them, as pairs of their places.

    ``recorded`` says that it is one execution, of a model that cannot be traced.
    """

    nodes: tuple[FlowNode, ...]
    edges: tuple[tuple[int, int], ...]
    recorded: bool = False


def flow_of(model: nn.Module, example_inputs: Any) -> Flow:
    """The flow of a model, decomposed or not; a chain is one node that knows its pieces.

    Nodes of one input that are no layers (activations, norms, views) are left out, and so are constants.

    Raises:
        SurgeryTypeError, SurgeryValueError: as ``surgery.capture``.
    """
    from surgery.tracing import capture

    graph = capture(model, example_inputs)
    return _Reader(model).read(graph)


class _Reader:
    """Takes up one fx node after the other; ``sources`` has, for each, the places of the flow's nodes that its value comes from."""

    def __init__(self, model: nn.Module) -> None:
        self._sites = {alias: site for site in host_for(model).sites() for alias in site.aliases}
        self._nodes: list[FlowNode] = []
        self._edges: list[tuple[int, int]] = []
        self._sources: dict[fx.Node, tuple[int, ...]] = {}

    def read(self, graph: fx.Graph) -> Flow:
        for node in graph.nodes:
            self._sources[node] = self._take(node)
        return Flow(nodes=tuple(self._nodes), edges=tuple(self._edges), recorded=isinstance(graph, RecordedGraph))

    def _take(self, node: fx.Node) -> tuple[int, ...]:
        sources = tuple(dict.fromkeys(place for used in node.all_input_nodes for place in self._sources[used]))
        if node.op == "placeholder":
            return self._add(FlowNode(name=node.name, text="input", shape=_shape(node)), ()) if node.users else ()
        if node.op == "output":
            return self._add(FlowNode(name=node.name, text="output"), sources)
        target = str(node.target)
        found = self._layer(target) if node.op == "call_module" else None
        if found is not None:
            name, site = found
            pieces = _pieces(site)
            first = not pieces or target in (name, f"{name}.{pieces[0][0]}")
            if not first and len(sources) == 1 and self._nodes[sources[0]].name == name:
                return sources  # a further piece of the chain that is being called
            return self._add(FlowNode(name=name, text=str(site.geometry), pieces=pieces, shape=_shape(node), is_layer=True), sources)
        if len(sources) > 1:
            return self._add(FlowNode(name=node.name, text=_verb(node), shape=_shape(node)), sources)
        return sources

    def _layer(self, target: str) -> tuple[str, Site] | None:
        """The layer that a module is, or whose chain it is a piece of."""
        if target in self._sites:
            return target, self._sites[target]
        name = target.rpartition(".")[0]
        while name:
            if name in self._sites and self._sites[name].chain is not None:
                return name, self._sites[name]
            name = name.rpartition(".")[0]
        return None

    def _add(self, node: FlowNode, sources: tuple[int, ...]) -> tuple[int, ...]:
        self._nodes.append(node)
        place = len(self._nodes) - 1
        self._edges += [(source, place) for source in sources]
        return (place,)


def _pieces(site: Site) -> tuple[tuple[str, str], ...]:
    def named() -> Iterator[tuple[str, str]]:
        if site.chain is not None:
            for shape in kind_of(site.chain).shapes(site.geometry, site.chain, site.bias is not None):
                yield shape.name, str(shape.geometry)

    return tuple(named())


def _verb(node: fx.Node) -> str:
    target: Any = node.target
    return str(target).rpartition(".")[2] if isinstance(target, str) else str(getattr(target, "__name__", target))


def _shape(node: fx.Node) -> tuple[int, ...] | None:
    shape = getattr(node.meta.get("tensor_meta"), "shape", None)
    return None if shape is None else tuple(shape)
