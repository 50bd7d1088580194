"""The graph on the page: layers and meeting points, chains with their pieces, whatever the network's way of calling them."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import surgery
from surgery.flow import flow_of
from tests.networks import Branching, Small, Twice
from tests.surgery.page.test_page import Page, X, closed_off


def shown(flow):
    return [node.name for node in flow.nodes], [(flow.nodes[a].name, flow.nodes[b].name) for a, b in flow.edges]


def test_layers_and_meeting_points_are_joined_as_the_data_flows(small):
    nodes, edges = shown(flow_of(small, X))
    assert nodes == ["x", "conv1", "conv2", "mix", "wide", "tail.1", "add", "head", "output"]
    assert ("mix", "add") in edges
    assert ("tail.1", "add") in edges
    assert len(edges) == 9


@pytest.mark.parametrize("on_graph", [False, True])
def test_a_chain_is_one_node_that_knows_its_pieces(small, on_graph):
    before = flow_of(small, X)
    model = surgery.trace(small, X) if on_graph else small
    net = surgery.decompose(model, {"conv1": (6, None), "conv2": (8, 4), "head": 2}, example_inputs=X)
    after = flow_of(net, X)
    assert shown(after)[0] == shown(before)[0]
    assert after.edges == before.edges
    pieces = {node.name: node.pieces for node in after.nodes if node.pieces}
    assert pieces["conv2"] == (("reduce", "Conv2d 16->4 1x1"), ("core", "Conv2d 4->8 3x3/2"), ("expand", "Conv2d 8->24 1x1"))
    assert [name for name, _ in pieces["conv1"]] == ["core", "expand"]
    assert set(pieces) == {"conv1", "conv2", "head"}


def test_a_chain_that_is_called_twice_in_a_row_is_two_nodes():
    class Again(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(8, 8, 3, padding=1)

        def forward(self, x):
            return self.conv(self.conv(x))

    x = torch.randn(1, 8, 6, 6)
    for model, name in ((Again(), "conv"), (Twice(), "conv")):
        net = surgery.decompose(model, {name: (4, 4)})
        assert shown(flow_of(net, x)) == shown(flow_of(model, x))


def test_a_network_that_cannot_be_traced_is_drawn_as_it_ran():
    model, x = Branching(), torch.randn(1, 3, 8, 8)
    net = surgery.decompose(model, {"conv": (4, 2)}, example_inputs=x)
    report = surgery.report(net, example_inputs=x)
    assert report.flow.recorded
    assert [node.name for node in report.flow.nodes if node.pieces] == ["conv"]
    assert "one execution" in Page(report.to_html()).text


def test_the_drawing_has_every_node_and_edge_and_boxes_do_not_overlap():
    class Wide(nn.Module):
        def __init__(self):
            super().__init__()
            self.ways = nn.ModuleList(nn.Conv2d(4, 4, 3, padding=1) for _ in range(5))

        def forward(self, x):
            return torch.cat([way(x) for way in self.ways], 1)

    x = torch.randn(1, 4, 6, 6)
    report = surgery.report(surgery.decompose(Wide(), {"ways.3": (2, 2)}), example_inputs=x)
    page = Page(report.to_html())
    assert closed_off(page)
    boxes = [a for tag, a in page.elements if tag == "rect"]
    assert len(boxes) == 2 * len(report.flow.nodes)
    assert sum(a.get("class") == "edge" for _, a in page.elements) == 2 * len(report.flow.edges)
    areas = [[float(a[key]) for key in ("x", "y", "width", "height")] for a in boxes[: len(boxes) // 2]]
    for number, (x1, y1, w1, h1) in enumerate(areas):
        for x2, y2, w2, h2 in areas[number + 1 :]:
            assert x1 + w1 <= x2 or x2 + w2 <= x1 or y1 + h1 <= y2 or y2 + h2 <= y1


def test_too_much_for_a_picture_is_said():
    from dataclasses import replace

    from surgery.flow import Flow, FlowNode

    many = Flow(nodes=tuple(FlowNode(name=f"n{i}", text="add") for i in range(1501)), edges=())
    page = Page(replace(surgery.report(Small()), flow=many).to_html())
    assert "1,501 layers and meeting points are too many" in page.text
    assert not any(tag == "rect" for tag, _ in page.elements)


def test_the_trade_off_of_the_original_and_where_this_network_is(small):
    net = surgery.decompose(small, surgery.Budget(macs=0.6), example_inputs=X)
    report = surgery.report(net, example_inputs=X, before=small)
    expected = surgery.tradeoff(small, example_inputs=X)
    assert report.tradeoff == expected
    share, error = report.place
    assert share == report.macs_after / report.macs_before
    row = next(row for row in expected.rows if row.share == 0.6)
    assert share == pytest.approx(row.used)
    assert error == pytest.approx(row.error, rel=0.05)
    assert error <= row.error * (1 + 1e-6)  # the iteration can only do better than the curve foretells
    page = Page(report.to_html())
    assert f"This network: {share:.3f} of the MACs, error {error:.3f}" in page.text
    assert sum(tag == "circle" for tag, _ in page.elements) == len(expected.rows) + 1


def test_another_network_is_not_the_one_before(small):
    from surgery.original import is_original

    net = surgery.decompose(small, {"conv2": (8, 4)})
    other = Small().eval()
    assert is_original(small, net, surgery.report(net))
    assert not is_original(other, net, surgery.report(net))
    with torch.no_grad():
        net.conv1.weight.mul_(1.5)
    assert not is_original(small, net, surgery.report(net))
    other.conv2 = nn.Conv2d(16, 24, 5, stride=2, padding=2)
    with pytest.raises(surgery.SurgeryValueError, match="before: it is not the network that this one was made from: at conv2"):
        surgery.report(net, before=other)
