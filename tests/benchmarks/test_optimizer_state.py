"""The optimizer's state projected at a cut, or begun again: ``benchmarks/optimizer_state.py``."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

sys.path.insert(1, str(Path(__file__).parents[2] / "benchmarks"))

import optimizer_state

from tests.benchmarks.test_training import root  # noqa: F401  a fixture


def test_branches_differ_in_what_they_are_said_to_differ_in(root, tmp_path, monkeypatch, capsys):  # noqa: F811
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(optimizer_state, "BETWEEN", 2)
    monkeypatch.setattr(optimizer_state.small, "BATCH", 8)
    monkeypatch.setattr(optimizer_state, "OPTIMIZERS", ("sgd",))
    out = tmp_path / "state.json"
    command = ["--data", str(root), "--steps", "2", "--after", "5", "--seeds", "1", "--ranks", "0.5", "--out", str(out)]
    optimizer_state.main(command)
    rows = json.loads(out.read_text())["rows"]
    losses = {(row["case"], row["optimizer"], row["branch"]): row["losses"] for row in rows}
    assert len(losses) == len(rows) == len(optimizer_state.CASES) * len(optimizer_state.OPTIMIZERS) * len(optimizer_state.BRANCHES)
    for (case, name, branch), one in losses.items():
        whole, project, reset, fresh = (losses[case, name, b] for b in ("whole", "project", "reset", "whole, reset"))
        assert [project[0], whole[0]] == [reset[0], fresh[0]]  # nothing but the state differs, which no step has used
        assert (project[0] == pytest.approx(whole[0], rel=1e-4)) == (case == "fuse")  # fusing keeps the function, cutting does not
        assert len(one) == 5
        assert branch == "project" or one[1:] != project[1:]
    assert all((row["chains"] > 0) == ((row["case"] == "fuse") == row["branch"].startswith("whole")) for row in rows)
    assert out.with_suffix(".png").stat().st_size > 5000

    capsys.readouterr()
    optimizer_state.main(command)
    assert capsys.readouterr().out == ""
    assert json.loads(out.read_text())["rows"] == rows
