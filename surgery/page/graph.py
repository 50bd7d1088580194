"""The network's graph before and after: layers, and where values meet."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from surgery.page.markup import Markup, element

if TYPE_CHECKING:
    from surgery.flow import Flow, FlowNode
    from surgery.report import Report

__all__ = ["section"]

MOST_NODES, MOST_EDGES = 1500, 6000
WIDE, NARROW, LINE, GAP, BESIDE, MARGIN = 210, 60, 15, 16, 26, 40
LETTERS = 32


def section(report: Report) -> Markup | None:
    flow = report.flow
    if flow is None:
        return None
    heading = element("h2", "Graph")
    told = "Layers and the places where values meet; what has one input and is no layer (activations, norms, views) is left out."
    if flow.recorded:
        told += " This network cannot be traced, so this is one execution, on the example inputs."
    if len(flow.nodes) > MOST_NODES or len(flow.edges) > MOST_EDGES:
        return element("section", heading, element("p", f"{len(flow.nodes):,} layers and meeting points are too many to be read as a picture."))
    panels = [_panel("Before", flow, opened=False)]
    if any(node.pieces for node in flow.nodes):
        panels.append(_panel("After", flow, opened=True))
    return element("section", heading, element("p", told), element("div", *panels, class_="graphs"))


def _panel(title: str, flow: Flow, *, opened: bool) -> Markup:
    return element("div", element("h3", title), element("div", _drawing(flow, opened), class_="graph"), class_="card")


@dataclass(frozen=True, slots=True)
class _Box:
    """Where a node is drawn: the middle of its upper edge, and its height."""

    x: float
    y: float
    height: float
    half: float

    @property
    def bottom(self) -> float:
        return self.y + self.height


def _drawing(flow: Flow, opened: bool) -> Markup:
    lines = [_lines(node, opened) for node in flow.nodes]
    boxes = _layout(flow, [LINE * len(text) + 8 for text in lines])
    left = min((box.x for box in boxes), default=0) - WIDE / 2 - MARGIN
    right = max((box.x for box in boxes), default=0) + WIDE / 2 + MARGIN
    bottom = max((box.bottom for box in boxes), default=0) + 4
    ranks = _generations(flow)
    edges = [_edge(boxes[a], boxes[b], straight=ranks[b] - ranks[a] == 1) for a, b in flow.edges]
    nodes = [_node(node, text, box, opened) for node, text, box in zip(flow.nodes, lines, boxes, strict=True)]
    size = {"viewBox": f"{left:.0f} -4 {right - left:.0f} {bottom + 4:.0f}", "style": f"width:{right - left:.0f}px"}
    return element("svg", *edges, *nodes, role="img", aria_label=f"Graph {'after' if opened else 'before'}", **size)


def _layout(flow: Flow, heights: Sequence[int]) -> list[_Box]:
    """Rows by the longest way from the inputs, and in each row every node near those that it reads."""
    ranks = _generations(flow)
    above: list[list[int]] = [[] for _ in flow.nodes]
    for a, b in flow.edges:
        above[b].append(a)
    x = [0.0] * len(flow.nodes)
    boxes: dict[int, _Box] = {}
    y = 0.0
    for rank in range(max(ranks, default=-1) + 1):
        row = [node for node, mine in enumerate(ranks) if mine == rank]
        wanted = {node: sum(x[a] for a in above[node]) / len(above[node]) if above[node] else 0.0 for node in row}
        row.sort(key=wanted.__getitem__)
        place = float("-inf")
        for node in row:
            x[node] = place = max(wanted[node], place + WIDE + BESIDE)
        shift = sum(x[node] - wanted[node] for node in row) / len(row)
        for node in row:
            x[node] -= shift
            boxes[node] = _Box(x[node], y, heights[node], WIDE / 2 if flow.nodes[node].is_layer else NARROW / 2)
        y += max(heights[node] for node in row) + GAP
    return [boxes[node] for node in range(len(flow.nodes))]


def _generations(flow: Flow) -> list[int]:
    import networkx

    graph = networkx.DiGraph(list(flow.edges))
    graph.add_nodes_from(range(len(flow.nodes)))
    ranks = [0] * len(flow.nodes)
    for rank, nodes in enumerate(networkx.topological_generations(graph)):
        for node in nodes:
            ranks[node] = rank
    return ranks


def _edge(start: _Box, end: _Box, *, straight: bool) -> Markup:
    """From the bottom of one to the top of the next; past the boxes in between where it skips some."""
    if straight or abs(start.x - end.x) > WIDE:
        middle = (start.bottom + end.y) / 2
        path = f"M{start.x:.1f} {start.bottom:.1f}C{start.x:.1f} {middle:.1f} {end.x:.1f} {middle:.1f} {end.x:.1f} {end.y:.1f}"
    else:
        a, b = start.y + start.height / 2, end.y + end.height / 2
        lane, turn = max(start.x, end.x) + WIDE / 2 + MARGIN / 2, 10.0
        way = f"M{start.x + start.half:.1f} {a:.1f}H{lane - turn:.1f}Q{lane:.1f} {a:.1f} {lane:.1f} {a + turn:.1f}"
        path = f"{way}V{b - turn:.1f}Q{lane:.1f} {b:.1f} {lane - turn:.1f} {b:.1f}H{end.x + end.half:.1f}"
    return element("path", d=path, class_="edge")


def _node(node: FlowNode, lines: Sequence[tuple[str, str]], box: _Box, opened: bool) -> Markup:
    kind = "cut" if opened and node.pieces else "layer" if node.is_layer else "join"
    texts = [
        element("text", text, x=f"{box.x:.1f}", y=f"{box.y + LINE * (number + 1):.1f}", text_anchor="middle", class_=style)
        for number, (text, style) in enumerate(lines)
    ]
    frame = element("rect", x=f"{box.x - WIDE / 2:.1f}", y=f"{box.y:.1f}", width=WIDE, height=f"{box.height:.1f}", rx=5, class_=f"node {kind}")
    return element("g", element("title", _title(node)), frame, *texts)


def _lines(node: FlowNode, opened: bool) -> list[tuple[str, str]]:
    if not node.is_layer:
        return [(_short(node.text), "soft")]
    if opened and node.pieces:
        return [(_short(node.name), "strong"), *((_short(f"{name}: {text}"), "soft") for name, text in node.pieces)]
    return [(_short(node.name), "strong"), (_short(node.text), "soft")]


def _title(node: FlowNode) -> str:
    shape = "" if node.shape is None else f" gives {'x'.join(map(str, node.shape))}"
    return f"{node.name}: {node.text}{shape}"


def _short(text: str) -> str:
    """The end of a long text: that is where names differ. The whole one is the title of its box."""
    return text if len(text) <= LETTERS else f"…{text[1 - LETTERS :]}"
