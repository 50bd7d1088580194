"""Rows of ``benchmarks/accuracy.py``: each is measured once, whenever the run is stopped, and the table says what they say."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(1, str(Path(__file__).parents[2] / "benchmarks"))

import accuracy
from accuracy_cases import Case, psnr
from accuracy_table import lost, table

from tests.networks import Small

WAYS = {("resnet20", 0.7): ("data", "fraction", "plan")}


def case(network, options):
    images = torch.randn(16, 3, 12, 12)
    model = Small().eval()
    facts = {"calibration_examples": 16}
    return Case(
        name=network,
        model=model,
        inputs=images[:1],
        draws=tuple([images] for _ in range(3)),
        measure=lambda net: 100 - float((net(images) - model(images)).detach().norm()),
        unit="% top-1",
        facts=facts,
    )


def test_a_run_that_was_stopped_goes_on_and_ends_in_a_table(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(accuracy, "WAYS", WAYS)
    monkeypatch.setattr(accuracy, "case_of", case)
    out = tmp_path / "accuracy.jsonl"
    monkeypatch.setattr(sys, "argv", ["accuracy.py", "--data", "x", "--cifar", "x", "--out", str(out)])
    real, cuts = accuracy.cut, []

    def cut(case, share, way, number):
        if len(cuts) == 3:
            raise KeyboardInterrupt
        cuts.append((share, way, number))
        return real(case, share, way, number)

    monkeypatch.setattr(accuracy, "cut", cut)
    with pytest.raises(KeyboardInterrupt):
        accuracy.main()
    first = accuracy.read(out)
    assert cuts == [(1.0, "original", 0), (0.7, "data", 0), (0.7, "fraction", 0)]
    monkeypatch.setattr(accuracy, "cut", real)
    accuracy.main()
    rows = accuracy.read(out)
    assert rows[:3] == first
    assert [(row["way"], row["draw"]) for row in rows[3:]] == [("plan", 0), ("data", 1), ("data", 2)]
    assert all(row["seconds"] > 0 and row["environment"]["torch"] == torch.__version__ for row in rows)
    assert first[0]["score"] == 100
    assert first[1]["score"] > first[2]["score"]  # what was learnt from data is nearer
    assert all(row["macs"] <= 0.7 for row in rows if row["way"] in ("data", "fraction"))
    text = out.with_suffix(".md").read_text()
    mean = sum(100 - row["score"] for row in rows if row["way"] == "data") / 3
    assert f"| {mean:.2f} (" in text
    assert text == table(rows)
    assert out.with_suffix(".png").stat().st_size > 1000
    accuracy.main()
    assert [json.loads(line) for line in out.read_text().splitlines()] == rows


def test_what_a_cut_may_cost_on_the_trained_networks():
    """Of the rows of the repository, mean over the draws; points of top-1, or dB."""
    rows = accuracy.read(accuracy.RESULTS)
    most = {("resnet56", 0.5, "data"): 2.8, ("resnet56", 0.5, "refine"): 1.5, ("resnet56", 0.7, "data"): 0.8, ("resnet20", 0.7, "data"): 1.3}
    most |= {("vdsr", 0.5, "data"): 1.0, ("vdsr", 0.5, "refine"): 0.3}
    for case, accepted in most.items():
        gone = lost(rows, *case)
        assert len(gone) == 3, case
        assert sum(gone) / 3 <= accepted, case


def test_psnr_is_that_of_a_known_error():
    wanted = torch.full((1, 1, 12, 12), 0.5)
    assert psnr(torch.nn.Identity(), [(wanted + 0.1, wanted[0, 0])]) == pytest.approx(20.0, abs=1e-4)
