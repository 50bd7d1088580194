"""Plans that are held to a metric of the user's own."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import surgery
from surgery import Budget, Keep
from surgery.zoo import make

X = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def model():
    return make("surgery:resnet20")[0]


def likeness(model):
    """How near a network's outputs are to the model's, at most 0."""
    with torch.no_grad():
        wanted = model(X)
        return lambda net: -float((net(X) - wanted).norm() / wanted.norm())


@pytest.mark.parametrize("unit", ["macs", "params"])
def test_the_smallest_share_that_passes_is_found(model, unit):
    evaluate = likeness(model)
    plan = surgery.plan(model, Budget(**{unit: 0.3}), example_inputs=X[:1], evaluate=evaluate, max_drop=0.5)
    tried = {trial.share: trial.score for trial in plan.trials}
    passed = min(share for share, score in tried.items() if score >= -0.5)
    failed = max(share for share, score in tried.items() if score < -0.5)
    assert 0.3 < passed < 1
    assert 0 < passed - failed <= 0.02
    assert len(tried) <= 8
    assert evaluate(surgery.decompose(model, plan)) == pytest.approx(tried[passed])


def test_what_is_wanted_is_tried_first(model):
    plan = surgery.plan(model, Budget(macs=np.float32(0.8)), example_inputs=X[:1], evaluate=lambda net: 1, max_drop=0)
    assert [trial.share for trial in plan.trials] == pytest.approx([1.0, 0.8])


def test_where_nothing_passes_all_is_kept(model):
    scores = iter([1.0] + [0.0] * 20)
    plan = surgery.plan(model, Budget(macs=0.8), example_inputs=X[:1], evaluate=lambda net: next(scores), max_drop=0.1)
    assert all(isinstance(decision, Keep) for decision in plan.values())
    assert "falls by more than 0.1" in plan["layer1.0.conv1"].reason


def test_calibration_takes_part(model):
    evaluate = likeness(model)
    options = {"example_inputs": X[:1], "evaluate": evaluate, "max_drop": 0.5}
    blind = surgery.plan(model, Budget(macs=0.3), **options)
    aware = surgery.plan(model, Budget(macs=0.3), calibration=iter([X]), **options)
    least = [min(t.share for t in plan.trials if t.score >= -0.5) for plan in (blind, aware)]
    assert least[1] < least[0]


@pytest.mark.parametrize(
    ("ranks", "evaluate", "drop", "message"),
    [
        ("evbmf", len, 0, "Budget"),
        (Budget(macs=1000), len, 0, "share"),
        (Budget(max_error=0.1), len, 0, "share"),
        (Budget(macs=0.5), 3, 0, "evaluate: expected a function"),
        (Budget(macs=0.5), lambda net: "good", 0, "must give a number"),
        (Budget(macs=0.5), lambda net: float("nan"), 0, "NaN"),
        (Budget(macs=0.5), lambda net: 1.0, -1, "max_drop"),
    ],
)
def test_wrong_gates(model, ranks, evaluate, drop, message):
    with pytest.raises(surgery.SurgeryError, match=message):
        surgery.plan(model, ranks, example_inputs=X[:1], evaluate=evaluate, max_drop=drop)


@pytest.mark.parametrize("score", [torch.ones(10), "high", None, [1.0]])
def test_a_score_is_one_number(model, score):
    with pytest.raises(surgery.SurgeryTypeError, match="evaluate: must give a number"):
        surgery.plan(model, Budget(params=0.5), evaluate=lambda net: score)


def test_chains_that_stood_before_stay_in_the_plan_where_nothing_passes(model):
    name = "layer3.1.conv2"
    net = surgery.decompose(model, {name: (8, 4)})
    scores = iter([1.0, *[0.0] * 20])
    found = surgery.plan(net, Budget(macs=0.8), example_inputs=X[:1], evaluate=lambda _: next(scores))
    assert found[name] == surgery.Tucker(8, 4)
    assert {other for other, decision in found.items() if isinstance(decision, Keep)} == set(found) - {name}
