"""Rows of ``benchmarks/latency_budget.py``: each is measured once, whenever the run is stopped, and the table says what they say."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import surgery
from surgery import Tucker
from tests.networks import Small

sys.path.insert(1, str(Path(__file__).parents[2] / "benchmarks"))

import latency_budget
from latency_budget_table import table

X = torch.randn(1, 3, 12, 12)


@pytest.fixture
def run(tmp_path, monkeypatch):
    """The script on a small network, whose time is its share of MACs."""
    monkeypatch.setenv("SURGERY_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(latency_budget, "network", lambda name: (Small().eval(), X))
    budgets = []

    def plan(model, budget, example_inputs):
        budgets.append(budget)
        if budget.runtime == "eager":
            raise surgery.SurgeryValueError("ranks: out of reach: the least is 0.912")
        return surgery.Plan({"conv2": Tucker(8, 8)})

    def benchmark(model, net, inputs, *, runtimes, repeats, threads):
        report = surgery.report(net)
        share = 0.4 + 0.6 * report.macs_after / report.macs_before
        row = {
            "time_ratio": 1 / share,
            "time_ratio_low": 0.99 / share,
            "time_ratio_high": 1.01 / share,
            "verdict": "faster" if share < 1 else "slower",
        }
        return SimpleNamespace(rows=(SimpleNamespace(**row),))

    monkeypatch.setattr(surgery, "plan", plan)
    monkeypatch.setattr(surgery, "benchmark", benchmark)
    out = tmp_path / "latency_budget.jsonl"

    def script(*arguments):
        monkeypatch.setattr(sys, "argv", ["latency_budget.py", "--only", "surgery:small", "--out", str(out), *arguments])
        latency_budget.main()
        return latency_budget.read(out)

    return SimpleNamespace(script=script, budgets=budgets, out=out)


def test_a_run_that_was_stopped_goes_on_and_ends_in_a_table(run, monkeypatch, capsys):
    pytest.importorskip("matplotlib")

    def stopped(*arguments):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(latency_budget, "uniform", stopped)
        with pytest.raises(KeyboardInterrupt):
            run.script("--runtimes", "onnxruntime")
    (first,) = latency_budget.read(run.out)
    assert first["way"] == "plan"
    assert len(run.budgets) == 2  # cold and warm
    rows = run.script("--runtimes", "onnxruntime", "eager")
    assert rows[0] == first
    assert [(row["runtime"], row["way"]) for row in rows] == [("onnxruntime", "plan"), ("onnxruntime", "uniform"), ("eager", "plan")]
    assert len(rows[1]["tried"]) == latency_budget.STEPS
    assert rows[1]["best"]["share"] <= latency_budget.NO_SLOWER * first["share"]
    assert "0.912" in rows[2]["refused"]
    assert run.script("--runtimes", "onnxruntime", "eager") == rows  # nothing is left to do
    text = run.out.with_suffix(".md").read_text()
    assert f"{first['share']:.3f}" in text
    assert run.out.with_suffix(".png").read_bytes()[1:4] == b"PNG"
    run.out.with_suffix(".md").unlink()
    assert run.script("--table") == rows
    assert run.out.with_suffix(".md").read_text() == text


def test_the_table_marks_what_misses_what_is_accepted():
    key = {"network": "torchvision:resnet18", "runtime": "onnxruntime", "asked": 0.7, "threads": 1}
    spread = {"low": 0.6, "high": 0.8}
    good = key | spread | {"way": "plan", "share": 0.69, "error": 0.2, "cut": 9, "seconds_cold": 300.0, "seconds_warm": 30.0, "verdict": "faster"}
    beside = key | {"way": "uniform", "tried": [], "best": {"error": 0.25, "share": 0.7}}
    assert "**" not in "\n".join(line for line in table([good, beside]).splitlines() if line.startswith("| resnet"))
    for change in ({"share": 0.8}, {"error": 0.3}, {"seconds_cold": 500.0}, {"seconds_warm": 61.0}, {"verdict": "slower"}):
        assert "**" in "\n".join(line for line in table([good | change, beside]).splitlines() if line.startswith("| resnet"))
