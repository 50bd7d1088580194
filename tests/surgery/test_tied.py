"""Layers with one weight: one factorization, tied factors, there and back, on both hosts."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import surgery
from passes import Decompose, host_for, observe
from passes.errors import SurgeryValueError
from passes.parity import assert_parity
from passes.site import for_all_tied
from surgery import Tucker
from surgery.cost import macs_under, site_macs
from surgery.latency.times import timed_chain, timed_layer

X = torch.randn(2, 8, 10, 10, dtype=torch.float64, generator=torch.Generator().manual_seed(5))


class Siamese(nn.Module):
    """Two convolutions with one weight, strides and biases of their own; one more convolution and a pair of tied linear layers."""

    def __init__(self):
        super().__init__()
        self.left = nn.Conv2d(8, 12, 3, padding=1)
        self.right = nn.Conv2d(8, 12, 3, stride=2, padding=2, dilation=2)
        self.other = nn.Conv2d(12, 12, 3, padding=1)
        self.query, self.key = nn.Linear(12, 10), nn.Linear(12, 10, bias=False)
        self.right.weight = self.left.weight
        self.key.weight = self.query.weight

    def forward(self, x):
        y = self.other(self.left(x)).mean((2, 3)) + self.right(x).mean((2, 3))
        return self.query(y) * self.key(y)


def on_module(model):
    return model


def on_graph(model):
    return surgery.trace(model, X)


hosts = pytest.mark.parametrize("build", [on_module, on_graph], ids=["module", "graph"])


@pytest.fixture
def model():
    return Siamese().double().eval()


def same(net, first, second):
    left, right = net.get_submodule(first), net.get_submodule(second)
    return [name for name, p in left.named_parameters() if name.endswith("weight") and dict(right.named_parameters())[name] is p]


@hosts
@pytest.mark.parametrize("ranks", [{"left": (5, 4)}, {"right": (5, 4)}, {"re:left|right": (5, 4)}])
def test_tied_layers_get_tied_factors_and_come_back_tied(build, model, ranks):
    ranks = ranks | {"query": 4}
    net = surgery.decompose(build(model), ranks, example_inputs=X)
    assert same(net, "left", "right") == ["reduce.weight", "core.weight", "expand.weight"]
    assert same(net, "query", "key") == ["reduce.weight", "expand.weight"]
    assert net.get_submodule("right.core").stride == (2, 2)
    assert net.get_submodule("left.expand").bias is not net.get_submodule("right.expand").bias
    rows = {row.name: row for row in surgery.report(net).layers}
    assert rows["left"].factorization == rows["right"].factorization == Tucker(5, 4)
    assert rows["left"].error == rows["right"].error > 0
    assert rows["right"].params_after == 12  # its bias: the weights count where they come first
    report = surgery.report(net)
    assert report.params_after == sum(p.numel() for p in net.parameters())
    assert report.params_before == sum(p.numel() for p in model.parameters())
    back = surgery.reconstruct(net)
    assert same(back, "left", "right") == same(back, "query", "key") == ["weight"]
    assert_parity(back(X), net(X))
    assert [(k, v.shape) for k, v in back.state_dict().items()] == [(k, v.shape) for k, v in build(model).state_dict().items()]
    assert same(model, "left", "right") == ["weight"]


@hosts
def test_rules_decide_once_on_all_calls(build, model):
    seen = []

    def rule(site, spectra):
        seen.append((site.name, len(site.calls), [(other.name, len(other.calls)) for other in site.others]))
        return (6, 6)

    net = surgery.decompose(build(model), rule, example_inputs=X, include=["re:left|right"])
    assert seen == [("left", 1, [("right", 1)])]
    assert same(net, "left", "right")
    full = surgery.decompose(build(model), {"re:.*": 1.0})
    assert_parity(full(X), model(X))


@pytest.mark.parametrize("share", [0.3, 0.5])
def test_a_budget_counts_every_call_at_its_own_stride(model, share):
    """The second one's output has a quarter of the pixels: counted like the first, the budget would be overdrawn."""
    whole = surgery.report(surgery.decompose(model, {}, example_inputs=X)).macs_before
    found = surgery.decompose(model, surgery.Budget(macs=share), example_inputs=X, include=["left", "other"])
    report = surgery.report(found)
    assert report.macs_after <= share * whole
    assert report.macs_after > (share - 0.1) * whole  # and it is used
    (point,) = surgery.tradeoff(model, example_inputs=X, shares=[share], include=["left", "other"]).rows
    assert point.used == pytest.approx(report.macs_after / whole)


def test_each_of_tied_layers_is_timed_as_it_is_called(model):
    sites = host_for(model, observed=observe(model, X)).sites()
    left = for_all_tied(next(site for site in sites if site.name == "left"), sites)
    assert left.aliases == ("left", "right")
    assert [shape.layers[0].stride for shape in timed_layer(left, "eager")] == [(1, 1), (2, 2)]
    assert [shape.layers[1].stride for shape in timed_chain(left, Tucker(5, 4), "eager")] == [(1, 1), (2, 2)]
    assert macs_under(left, None) == site_macs(left) == sum(shape.macs for shape in timed_layer(left, "eager"))
    assert macs_under(left, Tucker(5, 4)) == sum(shape.macs for shape in timed_chain(left, Tucker(5, 4), "eager"))


def test_contradictions_are_errors(model):
    with pytest.raises(SurgeryValueError, match="'left' and 'right' are one layer or one weight, but get"):
        surgery.decompose(model, {"left": (5, 4), "right": (4, 4)})
    with pytest.raises(SurgeryValueError, match=r"right: shares its weight with left, which gets Tucker\(rank_out=5, rank_in=4\)"):
        Decompose(assignment={"left": Tucker(5, 4), "right": Tucker(4, 4)})(host_for(copy.deepcopy(model)))
    plan = surgery.plan(model, {"left": (5, 4)})
    assert plan["left"] == plan["right"] == Tucker(5, 4)
    again = surgery.plan(surgery.decompose(model, plan))
    assert again["left"] == again["right"] == Tucker(5, 4)


@hosts
def test_training_keeps_tied_factors_one_and_cutting_again_too(build, model):
    net = surgery.decompose(build(model), {"left": (5, 4)})
    net(X).sum().backward()
    core = net.get_submodule("left.core").weight
    with torch.no_grad():
        core -= 0.1 * core.grad
    again = surgery.decompose(net, {"left": (3, 2)})
    assert same(again, "left", "right") == ["reduce.weight", "core.weight", "expand.weight"]
    assert_parity(surgery.reconstruct(again)(X), again(X))


def test_saving_and_loading_keeps_the_tie(model, tmp_path):
    net = surgery.decompose(model, {"left": (5, 4), "query": 3})
    surgery.save(net, tmp_path / "net")
    again = surgery.load(tmp_path / "net", Siamese().double()).eval()
    assert same(again, "left", "right") == ["reduce.weight", "core.weight", "expand.weight"]
    assert torch.equal(again(X), net(X))


def test_factors_shared_in_part_keep_the_chain(model):
    net = surgery.decompose(model, {"left": (5, 4)})
    net.right.core.weight = nn.Parameter(net.right.core.weight.detach().clone())
    sites = {site.name: site for site in host_for(net).sites()}
    assert "shared with" in sites["left"].keep
    assert "shared with" in sites["right"].keep


def with_a_hook(model):
    model.right.register_forward_hook(lambda module, args, output: None)
    return surgery.trace(model, X)


def with_an_output_size(model):
    traced = surgery.trace(model, X)
    node = next(n for n in traced.graph.nodes if n.target == "right")
    node.args = (*node.args, None)
    traced.recompile()
    return traced


@pytest.mark.parametrize(("build", "why"), [(with_a_hook, "it has hooks"), (with_an_output_size, "more than its input")])
def test_what_keeps_the_second_keeps_the_first(build, why, model):
    traced = build(model)
    net = surgery.decompose(traced, {"re:left|right": (5, 4)})
    rows = {row.name: row for row in surgery.report(net).layers}
    assert why in rows["right"].reason
    assert rows["left"].reason == f"its weight is shared with right: {rows['right'].reason}"
    with pytest.raises(SurgeryValueError, match="'left' cannot be cut as asked: its weight is shared with right: "):
        surgery.decompose(traced, {"left": (5, 4)})
    outcomes = Decompose(assignment={"left": Tucker(5, 4)})(host_for(copy.deepcopy(traced))).outcomes
    assert not any(outcome.status == "applied" for outcome in outcomes)


def test_a_changed_second_chain_keeps_the_first(model):
    net = surgery.decompose(model, {"left": (5, 4)})
    net.right.core.register_forward_hook(lambda module, args, output: output * 2)
    expected = net(X)
    again = surgery.decompose(net, {"re:left|right": (3, 2)})
    assert {site.chain for site in host_for(again).sites()} == {Tucker(5, 4), None}
    back = surgery.reconstruct(again)
    assert same(back, "left", "right") == ["reduce.weight", "core.weight", "expand.weight"]
    assert_parity(back(X), expected)


def test_a_second_bias_that_the_parent_reads_keeps_the_first():
    class Reads(Siamese):
        def forward(self, x):
            return super().forward(x) + self.query.bias + self.right.bias[:10]

    net = surgery.decompose(Reads().double().eval(), {"re:left|right": (5, 4)}, example_inputs=X)
    rows = {row.name: row for row in surgery.report(net).layers}
    assert "its bias is read by the model" in rows["right"].reason
    assert rows["left"].reason == f"its weight is shared with right: {rows['right'].reason}"
    plan = surgery.plan(Reads().double().eval(), 0.5, example_inputs=X)
    assert plan["left"] != plan["right"]  # kept, each in words of its own
    again = surgery.decompose(Reads().double().eval(), surgery.Plan.from_json(plan.to_json()), example_inputs=X)
    assert {row.name: row.status for row in surgery.report(again).layers} == {**dict.fromkeys(plan, "kept"), "other": "decomposed"}
