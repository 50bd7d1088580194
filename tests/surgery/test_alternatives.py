"""What a budget would cost, and what else could be done with a layer."""

from __future__ import annotations

import itertools
import json

import pytest
import torch

import surgery
from surgery import Budget
from surgery.cli import main
from surgery.zoo import make

X = torch.randn(1, 3, 32, 32)


@pytest.fixture(scope="module")
def model():
    return make("surgery:resnet20")[0]


def test_error_rises_as_budgets_fall_and_is_what_a_cut_has(model):
    found = surgery.tradeoff(model, example_inputs=X)
    assert found.unit == "macs"
    assert [row.share for row in found.rows] == sorted((row.share for row in found.rows), reverse=True)
    assert all(a.error < b.error for a, b in itertools.pairwise(found.rows))
    assert all(0.98 * row.share <= row.used <= row.share for row in found.rows)
    half = next(row for row in found.rows if row.share == 0.5)
    net = surgery.decompose(model, Budget(macs=0.5), example_inputs=X)
    errors = [row.error or 0.0 for row in surgery.report(net).layers if row.name != "linear"]
    reached = (sum(e * e for e in errors) / len(errors)) ** 0.5
    assert reached == pytest.approx(half.error, rel=0.05)
    assert half.cut == sum(row.status == "decomposed" for row in surgery.report(net).layers)


def test_shares_that_cannot_be_reached_are_left_out(model):
    found = surgery.tradeoff(model, shares=(0.5, 0.001), method="auto")
    assert found.unit == "params"
    assert [row.share for row in found.rows] == [0.5]


def test_a_share_that_means_nothing_is_an_error(model):
    with pytest.raises(surgery.SurgeryValueError, match="must be an int, or a share"):
        surgery.tradeoff(model, shares=(2.0,))


@pytest.mark.parametrize("ranks", [0.5, Budget(macs=0.5)])
def test_alternatives_lie_around_what_the_plan_does(model, ranks):
    plan = surgery.plan(model, ranks, example_inputs=X)
    near = surgery.explain(model, "layer2.1.conv1", plan, example_inputs=X)
    assert all(a.cost < b.cost and a.error > b.error for a, b in itertools.pairwise(near))
    assert len(near) > 3
    if isinstance(ranks, Budget):
        (mine,) = [a for a in near if a.chosen]
        assert mine.decision == plan["layer2.1.conv1"]


def test_layers_that_cannot_be_explained(model):
    plan = surgery.plan(model, 0.5)
    with pytest.raises(surgery.SurgeryValueError, match="did you mean"):
        surgery.explain(model, "layer2.1.conv9", plan)
    with pytest.raises(surgery.SurgeryValueError, match="nothing can be done with 'linear': linear layers are cut only"):
        surgery.explain(model, "linear", plan)


def test_on_the_command_line(capsys, tmp_path):
    pytest.importorskip("matplotlib")
    assert main(["plan", "surgery:resnet20", "--pareto", "--json", "--picture", str(tmp_path / "p.png")]) == 0
    assert json.loads(capsys.readouterr().out)["rows"][0]["share"] == 0.9
    assert (tmp_path / "p.png").read_bytes()[1:4] == b"PNG"
    assert main(["plan", "surgery:resnet20", "--ranks", "budget:macs=0.5", "--explain", "layer3.0.conv2"]) == 0
    assert "->" in capsys.readouterr().out
    assert main(["plan", "surgery:resnet20", "--explain", "nothing"]) == 1
