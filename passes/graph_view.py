"""Graphs as ``networkx`` sees them, for questions about graphs: isomorphism, paths, drawing."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import fx

if TYPE_CHECKING:
    import networkx

__all__ = ["same_graph", "to_networkx"]


def to_networkx(model: fx.GraphModule) -> networkx.MultiDiGraph[str]:
    """The data flow of a ``GraphModule``: a node for each fx node, an edge for each use of its value.

    Nodes carry ``op``, ``kind`` (class of the module called, or name of the function or method) and ``shape`` (None where not known); edges carry
    ``position`` among the user's inputs.
    """
    import networkx

    view = networkx.MultiDiGraph()
    for node in model.graph.nodes:
        view.add_node(node.name, op=node.op, kind=_kind(model, node), shape=_shape(node))
    for node in model.graph.nodes:
        for position, used in enumerate(node.all_input_nodes):
            view.add_edge(used.name, node.name, position=position)
    return view


def same_graph(left: fx.GraphModule, right: fx.GraphModule) -> bool:
    """Whether two graphs are isomorphic, node for node the same op, kind and shape, and edge for edge the same position."""
    import networkx
    from networkx.algorithms.isomorphism import categorical_multiedge_match, categorical_node_match

    return bool(
        networkx.is_isomorphic(
            to_networkx(left),
            to_networkx(right),
            node_match=categorical_node_match(["op", "kind", "shape"], [None, None, None]),
            edge_match=categorical_multiedge_match("position", None),
        )
    )


def _kind(model: fx.GraphModule, node: fx.Node) -> str:
    if node.op == "call_module":
        return type(model.get_submodule(str(node.target))).__name__
    if node.op == "call_function":
        target: Any = node.target
        return f"{getattr(target, '__module__', '')}.{getattr(target, '__name__', target)}"
    return str(node.target) if node.op == "call_method" else node.op


def _shape(node: fx.Node) -> tuple[int, ...] | None:
    meta = node.meta.get("tensor_meta")
    shape = getattr(meta, "shape", None)
    return None if shape is None else tuple(shape)
