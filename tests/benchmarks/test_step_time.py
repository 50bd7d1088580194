"""Plans of ``benchmarks/step_time.py``."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import surgery
from surgery import Channel, Keep, Plan, Tucker

sys.path.insert(1, str(Path(__file__).parents[2] / "benchmarks"))

import step_time


def test_the_lower_of_two_plans():
    one = Plan({"a": Tucker(8, None), "b": Keep("b"), "c": Keep("c"), "d": Channel(3)})
    other = Plan({"a": Tucker(16, 8), "b": Tucker(4, 4), "c": Keep("other"), "d": Channel(2)})
    lower = step_time.lower_of(one, other)
    assert dict(lower) == {"a": Tucker(8, 8), "b": Tucker(4, 4), "c": Keep("other"), "d": Channel(2)}


def test_a_plan_stays_within_parameters_and_drops_cuts_that_cost_time(monkeypatch, tmp_path):
    monkeypatch.setenv("SURGERY_CACHE", str(tmp_path))
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 32, 3, padding=1), nn.Conv2d(32, 64, 3, padding=1), nn.Conv2d(64, 64, 3, padding=1))
    x = torch.randn(2, 3, 8, 8)
    case = step_time.Case(2, 8, 30_000, 0.6)
    slow = {"1"}

    def times(self, site, decision, runtime):
        from surgery.cost.profile import Entry

        return Entry(1.0, 0.0), Entry(2.0 if site.name in slow else 0.5, 0.0)

    monkeypatch.setattr(step_time.Stopwatch, "times", times)
    plan = step_time.plan_for(model, x, case)
    net = surgery.decompose(model, plan, example_inputs=x)
    assert step_time.parameters(net) <= case.params
    assert surgery.report(net).macs_after <= 0.6 * surgery.report(net).macs_before
    slow.add("2")
    all_slow = step_time.plan_for(model, x, case)
    left = {name for name, decision in all_slow.items() if not isinstance(decision, Keep)}
    assert left < {name for name, decision in plan.items() if not isinstance(decision, Keep)} | {"1"}
    assert step_time.parameters(surgery.decompose(model, all_slow)) <= case.params


@pytest.mark.parametrize(("name", "least"), [("vgg19", 4.0), ("resnet56", 1.4), ("densenet40", 1.15), ("resnet50", 1.25)])
def test_steps_at_no_more_parameters_than_the_papers(name, least):
    """Of the rows of the repository."""
    rows = json.loads(step_time.RESULTS.read_text())
    mine = [row for row in rows if row["plan"] == f"step_time/{name}.json"]
    assert all(row["parameters"] <= row["paper_parameters"] for row in mine)
    assert max(row["time_ratio"] for row in mine) >= least


def test_it_is_the_plans_of_the_repository_that_are_timed_wherever_rows_go(tmp_path, monkeypatch):
    timed = []

    def measure(name, case, plan, repeats, threads, replan):
        timed.append((plan, replan))
        return {"network": name, "plan": plan.name, "batch": case.batch, "size": case.size, "threads": threads, "environment": {"processor": "x"}}

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["step_time.py", "--only", "surgery:vgg19", "--out", str(tmp_path / "steps.json"), *arguments])
        step_time.main()

    monkeypatch.setattr(step_time, "measure", measure)
    run()
    run("--replan")
    assert timed == [(step_time.RESULTS.with_suffix("") / "vgg19.json", False), (tmp_path / "steps" / "vgg19.json", True)]
    assert timed[0][0].exists()
    with pytest.raises(SystemExit):
        run("--replan", "--plan", "plan.json")
    assert len(timed) == 2


def test_a_measured_row(tmp_path, monkeypatch):
    monkeypatch.setenv("SURGERY_CACHE", str(tmp_path))
    case = step_time.Case(2, 32, 150_000, 0.5)
    plan = tmp_path / "resnet20.json"
    surgery.plan(step_time.make("surgery:resnet20")[0], 0.5, round_to=8).save(plan)
    row = step_time.measure("surgery:resnet20", case, plan, repeats=8, threads=1, replan=False)
    assert row["parameters"] < row["parameters_before"] == 269_722
    assert row["time_ratio_low"] <= row["time_ratio"] <= row["time_ratio_high"]
    assert row["macs_ratio"] > 1
    assert step_time.key(row)[1] == f"{tmp_path.name}/resnet20.json"
