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
from tests.networks import Small

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
    with pytest.raises(surgery.SurgeryValueError, match=r"each must be a share of the network in \(0, 1\]"):
        surgery.tradeoff(model, shares=(2.0,))


@pytest.mark.parametrize(
    ("by", "inputs", "message"),
    [("time", X, "did you mean|is none of"), ("latency", None, "needs example_inputs"), ("macs", None, "needs example_inputs")],
)
def test_units_that_cannot_be_counted(model, by, inputs, message):
    with pytest.raises(surgery.SurgeryValueError, match=message):
        surgery.tradeoff(model, by=by, example_inputs=inputs)


def test_parameters_can_be_counted_where_macs_are_known(model):
    found = surgery.tradeoff(model, by="params", example_inputs=X, shares=(0.5,))
    assert found.unit == "params"
    assert found.rows[0].used <= 0.5
    plan = surgery.plan(model, 0.5, example_inputs=X)
    params = {a.decision: a.cost for a in surgery.explain(model, "layer2.1.conv1", plan, by="params", example_inputs=X)}
    macs = {a.decision: a.cost for a in surgery.explain(model, "layer2.1.conv1", plan, by="macs", example_inputs=X)}
    assert all(params[decision] < macs[decision] for decision in set(params) & set(macs))


@pytest.mark.parametrize("ranks", [0.5, Budget(macs=0.5)])
def test_alternatives_lie_around_what_the_plan_does(model, ranks):
    plan = surgery.plan(model, ranks, example_inputs=X)
    near = surgery.explain(model, "layer2.1.conv1", plan, example_inputs=X)
    others = [a for a in near if isinstance(ranks, Budget) or not a.chosen]
    assert all(a.cost < b.cost and a.error > b.error for a, b in itertools.pairwise(others))
    assert len(near) > 3
    assert [a.cost for a in near] == sorted(a.cost for a in near)
    (mine,) = [a for a in near if a.chosen]
    assert mine.decision == plan["layer2.1.conv1"]
    row = surgery.report(surgery.decompose(model, plan, example_inputs=X))["layer2.1.conv1"]
    assert mine.cost == row.macs_after
    assert mine.error == pytest.approx(row.error, rel=0.1)


def test_layers_that_cannot_be_explained(model):
    plan = surgery.plan(model, 0.5)
    with pytest.raises(surgery.SurgeryValueError, match="did you mean"):
        surgery.explain(model, "layer2.1.conv9", plan)
    with pytest.raises(surgery.SurgeryValueError, match="nothing can be done with 'linear': linear layers are cut only"):
        surgery.explain(model, "linear", plan)
    twice = torch.nn.Sequential(torch.nn.Linear(4, 4))
    twice.append(twice[0])
    with pytest.raises(surgery.SurgeryValueError, match="nothing can be done with '1': linear layers are cut only"):
        surgery.explain(twice, "1", surgery.Plan({"1": surgery.Keep("mine")}))


def test_on_the_command_line(capsys, tmp_path):
    pytest.importorskip("matplotlib")
    assert main(["plan", "surgery:resnet20", "--pareto", "--json", "--picture", str(tmp_path / "p.png")]) == 0
    assert json.loads(capsys.readouterr().out)["rows"][0]["share"] == 0.9
    assert (tmp_path / "p.png").read_bytes()[1:4] == b"PNG"
    assert main(["plan", "surgery:resnet20", "--ranks", "budget:macs=0.5", "--explain", "layer3.0.conv2"]) == 0
    assert "->" in capsys.readouterr().out
    assert main(["plan", "surgery:resnet20", "--explain", "nothing"]) == 1
    surgery.plan(make("surgery:resnet20")[0], 0.5, example_inputs=X).save(tmp_path / "half.json")
    capsys.readouterr()
    assert main(["plan", "surgery:resnet20", "--ranks", "0.5", "--diff", str(tmp_path / "half.json")]) == 0
    assert capsys.readouterr().out == "nothing changes\n"
    assert main(["plan", "surgery:resnet20", "--ranks", "0.4", "--diff", str(tmp_path / "half.json"), "--json"]) == 0
    changes = json.loads(capsys.readouterr().out)
    change = next(change for change in changes if change["site"] == "layer3.1.conv2")
    assert change["before"] == {"kind": "tucker", "rank_out": 32, "rank_in": 32}
    assert change["after"] == {"kind": "tucker", "rank_out": 26, "rank_in": 26}


def test_shares_may_come_in_any_order(small):
    x = torch.randn(1, 3, 12, 12)
    rising = surgery.tradeoff(small, shares=(0.001, 0.6, 0.9), example_inputs=x)
    assert [row.share for row in rising.rows] == [0.9, 0.6]
    assert rising.rows == surgery.tradeoff(small, shares=(0.9, 0.6, 0.001), example_inputs=x).rows


def test_a_plan_of_another_network_is_told():
    model = Small()
    plan = surgery.plan(model, 0.5)
    plan["conv2"] = surgery.Tucker(500, 16)
    with pytest.raises(surgery.SurgeryValueError, match=r"explain: 'conv2' cannot be cut as the plan says: rank 500 .*is it a plan of this model"):
        surgery.explain(model, "conv2", plan)


def test_a_layer_of_another_network_is_said_to_be_one(model):
    plan = surgery.Plan({"conv9": surgery.Tucker(4, 4)})
    with pytest.raises(surgery.SurgeryValueError, match="'conv9' is no layer of this model, but of the plan's"):
        surgery.explain(model, "conv9", plan)


def test_a_network_that_is_cut_only_where_its_tradeoff_does_not_look_has_no_place_beside_it():
    model, x = Small(), torch.randn(1, 3, 12, 12)
    net = surgery.decompose(model, {"head": 2}, example_inputs=x)
    assert surgery.report(net, before=model, example_inputs=x).place is None
    assert surgery.report(surgery.decompose(model, {"conv2": 0.5}, example_inputs=x), before=model, example_inputs=x).place is not None


def test_nothing_that_could_be_cut_is_no_error_by_time_either():
    pytest.importorskip("onnxruntime")
    model, x = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.ReLU()), torch.randn(2, 8)
    for by in ("macs", "latency"):
        found = surgery.tradeoff(model, example_inputs=x, by=by)
        assert all(row.cut == 0 for row in found.rows)
        assert found.layers == ()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--pareto", "--explain", "conv1"], "--pareto, --picture and --explain: one of them at a time"),
        (["--explain", "conv1", "--diff", "half.json"], "--explain and --diff: one of them at a time"),
        (["--by", "params"], "--by: it is for --pareto, --picture and --explain"),
        (["--pareto", "--by", "time"], "by: 'time' is none of"),
    ],
)
def test_the_command_refuses_what_means_nothing_before_any_work(options, message, capsys):
    with pytest.raises(SystemExit) as ended:
        main(["plan", "absent:net", *options])
    assert ended.value.code == 2
    assert message in capsys.readouterr().err


def test_the_command_looks_at_files_before_any_work(capsys, tmp_path):
    pytest.importorskip("matplotlib")
    for options, message in (
        (["--diff", str(tmp_path / "absent.json")], "absent.json"),
        (["--picture", str(tmp_path / "p.xyz")], "the ending names"),
    ):
        assert main(["plan", "absent:net", *options]) == 1
        assert message in capsys.readouterr().err
    assert main(["export", "absent:net", str(tmp_path / "nowhere" / "net.onnx"), "--deploy"]) == 1
    assert "does not exist; make it first" in capsys.readouterr().err
