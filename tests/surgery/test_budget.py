"""Budgets for whole networks: inside, nearly used up, and the best that can be had."""

from __future__ import annotations

import itertools
import os
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import scipy.optimize
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import surgery
from passes.errors import SurgeryError
from passes.kinds import KINDS, kind_of
from surgery import Budget, Keep
from surgery.ranks import knapsack
from surgery.ranks.knapsack import cheapest_within, least_loss, least_worst, pareto
from surgery.zoo import make
from tests.networks import Kinds, Small

X = torch.randn(1, 3, 16, 16, generator=torch.Generator().manual_seed(3))


def total(values, chosen):
    return sum(value[index] for value, index in zip(values, chosen, strict=True))


def largest(values, chosen):
    return max(value[index] for value, index in zip(values, chosen, strict=True))


@st.composite
def knapsacks(draw):
    layers = draw(st.integers(1, 5))
    generator = np.random.default_rng(draw(st.integers(0, 2**20)))
    sizes = [draw(st.integers(1, 6)) for _ in range(layers)]
    costs = [generator.integers(1, 100, size).astype(float) for size in sizes]
    losses = [generator.random(size) ** 2 for size in sizes]
    least, most = sum(c.min() for c in costs), sum(c.max() for c in costs)
    return costs, losses, least + draw(st.floats(0, 1)) * (most - least)


@given(knapsacks())
def test_solvers_find_what_brute_force_finds(problem):
    costs, losses, budget = problem
    all_of_them = [c for c in itertools.product(*map(range, map(len, costs))) if total(costs, c) <= budget]
    found = least_loss(costs, losses, budget)
    assert total(costs, found) <= budget
    assert total(losses, found) <= 1.001 * min(total(losses, c) for c in all_of_them)
    worst = least_worst(costs, losses, budget)
    assert total(costs, worst) <= budget
    assert largest(losses, worst) == min(largest(losses, c) for c in all_of_them)


def test_what_the_solver_says_of_its_own_accord_does_not_get_into_standard_output(capfd, monkeypatch):
    def talking(*args, **kwargs):
        os.write(1, b"HighsMipSolverData::transformNewIntegerFeasibleSolution tmpSolver.run();\nof another thread\n")
        return scipy.optimize._milp.milp(*args, **kwargs)

    monkeypatch.setattr(scipy.optimize, "milp", talking)
    print("before", end=" ")
    assert least_loss([np.array([1.0, 2.0, 4.0])] * 3, [np.array([5.0, 3.0, 0.0])] * 3, 6.0)
    print("after")
    assert capfd.readouterr().out == "before of another thread\nafter\n"


def test_solvers_in_several_threads_leave_standard_output_where_it_was(capfd):
    problem = [np.array([1.0, 2.0, 4.0, 7.0])] * 8, [np.array([5.0, 3.0, 1.0, 0.0])] * 8, 21.0
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda _: least_loss(*problem), range(16)))
    assert all(total(problem[1], each) == total(problem[1], found[0]) for each in found)
    os.write(1, b"still there\n")
    assert capfd.readouterr().out == "still there\n"


def test_solvers_need_no_standard_output(monkeypatch):
    def nowhere():
        raise OSError("disk full")

    monkeypatch.setattr(knapsack, "TemporaryFile", nowhere)
    assert least_loss([np.array([1.0, 2.0])] * 2, [np.array([5.0, 0.0])] * 2, 3.0) in ([0, 1], [1, 0])


@given(knapsacks())
def test_the_other_way_round(problem):
    costs, losses, _ = problem
    bound = 0.5 * (sum(loss.min() for loss in losses) + sum(loss.max() for loss in losses))
    found = cheapest_within(costs, losses, bound)
    least = min(total(costs, c) for c in itertools.product(*map(range, map(len, costs))) if total(losses, c) <= bound)
    assert total(losses, found) <= bound
    assert total(costs, found) <= 1.001 * least


def test_what_cannot_fit_is_an_error():
    for solver in (least_loss, least_worst):
        with pytest.raises(ValueError, match="cheapest"):
            solver([np.array([3.0, 4.0])], [np.array([1.0, 0.0])], 2.0)


def test_pareto_keeps_the_ends_and_nothing_beaten():
    costs, losses = np.array([5.0, 1, 2, 3, 4, 4]), np.array([0.0, 9, 9, 5, 6, 1])
    assert [int(i) for i in pareto(costs, losses, 100)] == [1, 3, 5, 0]
    many = np.arange(1000.0)
    thinned = pareto(many, 1 / (1 + many), 50)
    assert len(thinned) <= 52
    assert {0, 999} <= set(thinned.tolist())


def test_the_choice_without_loss_does_not_take_the_marks_of_the_others():
    costs = np.arange(1.0, 4001.0)
    losses = np.append(np.geomspace(1.0, 1e-3, 3999), 0.0)  # the last one keeps the layer
    thinned = pareto(costs, losses, 400)
    steps = losses[thinned][:-2] / losses[thinned][1:-1]
    assert len(thinned) > 350
    assert steps.max() < 1.05
    assert int(thinned[-1]) == 3999


def macs_of(model):
    with FlopCounterMode(display=False) as counter:
        model(X)
    return counter.get_total_flops() / 2


@pytest.mark.parametrize("method", ["tucker", "auto", "spatial"])
@pytest.mark.parametrize("share", [0.75, 0.5])
def test_a_budget_of_macs_is_kept_and_used(method, share):
    model = make("surgery:resnet20")[0]
    inputs = torch.randn(1, 3, 32, 32)
    net = surgery.decompose(model, Budget(macs=share), example_inputs=inputs, method=method)
    with FlopCounterMode(display=False) as before:
        model(inputs)
    with FlopCounterMode(display=False) as after:
        net(inputs)
    used = after.get_total_flops() / before.get_total_flops()
    assert 0.98 * share <= used <= share


def test_budgets_of_parameters_and_numbers():
    model = make("surgery:resnet20")[0]
    whole = sum(p.numel() for p in model.parameters())
    for budget, allowed in ((Budget(params=0.6), 0.6 * whole), (Budget(params=150_000), 150_000)):
        net = surgery.decompose(model, budget)
        assert 0.98 * allowed <= sum(p.numel() for p in net.parameters()) <= allowed
    allowed = int(0.5 * macs_of(Small()))
    assert macs_of(surgery.decompose(Small(), Budget(macs=allowed), example_inputs=X)) <= allowed


def network_error(net, criterion="mean"):
    errors = [row.error or 0.0 for row in surgery.report(net).layers if not row.layer.startswith("Linear")]
    return max(errors) if criterion == "max" else float(np.sqrt(np.mean(np.square(errors))))


def test_it_beats_one_fraction_everywhere_and_each_criterion_is_best_at_its_own():
    model = make("surgery:resnet20")[0]
    inputs = torch.randn(1, 3, 32, 32)
    uniform = surgery.decompose(model, 0.6, example_inputs=inputs)
    report = surgery.report(uniform)
    budget = report.macs_after
    mean = surgery.decompose(model, Budget(macs=budget), example_inputs=inputs)
    worst = surgery.decompose(model, Budget(macs=budget, criterion="max"), example_inputs=inputs)
    auto = surgery.decompose(model, Budget(macs=budget), example_inputs=inputs, method="auto")
    assert network_error(mean) < network_error(uniform)
    assert network_error(auto) < network_error(mean)
    assert network_error(worst, "max") < network_error(mean, "max")
    assert network_error(mean) < network_error(worst)


@pytest.mark.parametrize("criterion", ["mean", "max"])
def test_max_error_is_the_other_way_round(criterion):
    model = make("surgery:resnet20")[0]
    inputs = torch.randn(1, 3, 32, 32)
    nets = [surgery.decompose(model, Budget(max_error=e, criterion=criterion), example_inputs=inputs) for e in (0.2, 0.4)]
    assert network_error(nets[0], criterion) <= 0.2
    assert 0.3 < network_error(nets[1], criterion) <= 0.4
    assert surgery.report(nets[1]).macs_after < surgery.report(nets[0]).macs_after < surgery.report(nets[0]).macs_before


def test_rounding_leaves_no_cheaper_move():
    """With ranks in multiples of 8 the budget may not be used up, but then nothing better fits."""
    model = make("surgery:resnet20")[0]
    inputs = torch.randn(1, 3, 32, 32)
    net = surgery.decompose(model, Budget(macs=0.5), example_inputs=inputs, round_to=8)
    for row in surgery.report(net).layers:
        if row.factorization is not None:
            full = kind_of(row.factorization).full_ranks(site_geometry(model, row.name))
            assert all(r is None or r % 8 == 0 or r == f for r, f in zip(row.ranks, full, strict=True))
    assert surgery.report(net).macs_after <= 0.5 * surgery.report(net).macs_before


def site_geometry(model, name):
    from passes.geometry import Geometry

    return Geometry.of(model.get_submodule(name))


def test_every_layer_gets_a_decision_and_a_reason():
    plan = surgery.plan(Kinds().eval(), Budget(params=0.7), method="auto")
    assert set(plan) == {"plain", "grouped", "up", "both", "mix", "line", "space"}
    assert all(isinstance(d, Keep) or d.kind in {k.name for k in KINDS} for d in plan.values())
    assert surgery.plan(Kinds().eval(), Budget(params=1.0))["up"] == Keep("the budget is better spent on other layers")


def test_include_and_exclude_hold():
    plan = surgery.plan(Small(), Budget(params=0.85), exclude=["conv2"], include=["conv2", "tail.1", "head"])
    assert plan["conv2"] == Keep("excluded")
    assert plan["conv1"] == Keep("not included")
    assert not isinstance(plan["tail.1"], Keep)


@pytest.mark.parametrize(
    ("budget", "options", "message"),
    [
        (Budget(macs=0.01), {"example_inputs": X}, "allows .* MACs, but the least that these layers can reach is .*ask for more"),
        (Budget(params=3), {}, "allows 3 parameters, but the least"),
        (Budget(macs=0.5), {}, "needs example_inputs"),
    ],
)
def test_budgets_that_cannot_be_kept(budget, options, message):
    model = Small()
    before = {name: p.clone() for name, p in model.named_parameters()}
    with pytest.raises(surgery.SurgeryValueError, match=message):
        surgery.decompose(model, budget, inplace=True, **options)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"macs": 0.5, "params": 0.5},
        {"macs": 0},
        {"macs": 1.5},
        {"macs": -0.1},
        {"params": True},
        {"macs": "half"},
        {"max_error": 0.0},
        {"macs": 0.5, "criterion": "median"},
    ],
)
def test_budgets_that_mean_nothing(options):
    with pytest.raises(SurgeryError, match="Budget: "):
        Budget(**options)


def test_a_budget_as_text():
    model = Small()
    assert surgery.plan(model, "budget:params=0.8") == surgery.plan(model, Budget(params=0.8))
    assert surgery.plan(model, "budget:max_error=0.3,criterion=max") == surgery.plan(model, Budget(max_error=0.3, criterion="max"))
    with pytest.raises(surgery.SurgeryValueError, match="budget:macs=SHARE"):
        surgery.plan(model, "budget:flops=0.5")
    with pytest.raises(surgery.SurgeryValueError, match="not a number"):
        surgery.plan(model, "budget:params=half")


def test_a_network_without_layers_to_cut():
    with pytest.raises(surgery.SurgeryValueError, match="least"):
        surgery.plan(nn.Sequential(nn.ReLU(), nn.BatchNorm2d(3)), Budget(params=0.5))


@pytest.mark.parametrize("criterion", ["mean", "max"])
def test_an_error_asked_for_under_calibration_is_a_share_whatever_the_unit_of_the_output(criterion):
    torch.manual_seed(0)
    model, batches = Small().eval(), [torch.randn(16, 3, 12, 12)]
    plans = []
    for scale in (1e-2, 1e5):
        with torch.no_grad():
            model.head.weight *= scale
            model.head.bias *= scale
        plans.append(surgery.plan(model, Budget(max_error=0.3, criterion=criterion), example_inputs=batches[0], calibration=batches))
    assert plans[0] == plans[1]
    kinds = {type(decision) for decision in plans[0].values()}
    assert Keep in kinds
    assert surgery.Tucker in kinds


def test_a_share_is_of_the_whole_network_attention_too():
    class Attends(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv1d(16, 16, 3, padding=1)

        def forward(self, x):
            q = self.conv(x).mT[:, None]
            return nn.functional.scaled_dot_product_attention(q, q, q)

    report = surgery.report(surgery.decompose(Attends().eval(), Budget(macs=0.6), example_inputs=torch.randn(2, 16, 10)))
    assert report.macs_before == 15_360 + 6_400
    assert report["conv"].status == "decomposed"
    assert report.macs_after <= 0.6 * report.macs_before
