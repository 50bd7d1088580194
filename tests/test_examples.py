"""The examples run as they are, with settings that take seconds, and do what they say."""

from __future__ import annotations

import importlib.util
import re
import sys

import pytest
import torch

import surgery
from tests.conftest import ROOT

SMALL = ["tests.networks:Small", "--input-shape", "2,3,12,12"]


def run(name, *arguments):
    spec = importlib.util.spec_from_file_location(f"examples_{name}", ROOT / "examples" / f"{name}.py")
    sys.modules[spec.name] = module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
        return module.main([str(argument) for argument in arguments])
    finally:
        del sys.modules[spec.name]


def test_every_example_is_tested_and_told_of():
    names = {path.stem for path in (ROOT / "examples").glob("*.py")}
    assert names == set(re.findall(r'run\("(\w+)"', (ROOT / "tests" / "test_examples.py").read_text()))
    assert all(f"python examples/{name}.py" in (ROOT / "examples" / f"{name}.py").read_text() for name in names)


def test_ship(tmp_path, capsys):
    torch.save(torch.randn(8, 3, 12, 12), tmp_path / "inputs.pt")
    options = ["--budget", 0.7, "--inputs", tmp_path / "inputs.pt", "--exporter", "torchscript", "--seconds", 0.2, "--out", tmp_path / "out"]
    assert run("ship", *SMALL, *options) == 0
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"before.onnx", "after.onnx", "plan.json"}
    assert any(not isinstance(decision, surgery.Keep) for decision in surgery.Plan.load(tmp_path / "out" / "plan.json").values())
    assert "onnxruntime" in capsys.readouterr().out


@pytest.mark.parametrize("content", [b"\x93NUMPY", {"weight": torch.ones(2)}], ids=["numpy", "weights"])
def test_ship_says_what_inputs_are(content, tmp_path, capsys):
    file = tmp_path / "inputs"
    file.write_bytes(content) if isinstance(content, bytes) else torch.save(content, file)
    assert run("ship", *SMALL, "--inputs", file, "--out", tmp_path / "out") == 1
    assert re.search(r"^error: --inputs: .*(was not written by torch\.save|holds no tensor but dict)$", capsys.readouterr().err)
    assert not (tmp_path / "out").exists()


def test_train(capsys):
    assert run("train", "--epochs", 3, "--batches", 6, "--cut-at", 1, "--fuse-at", 2) == 0
    told = capsys.readouterr().out
    sizes = [int(found.replace(",", "")) for found in re.findall(r"right, ([\d,]+) parameters", told)]
    assert sizes[0] == sizes[2] > sizes[1]
    assert all(float(found) > 20 for found in re.findall(r"([\d.]+) % right", told))  # of ten patterns: all three learn


def test_plan(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    options = [
        "--budget",
        0.7,
        "--shares",
        0.9,
        0.7,
        "--kinds",
        "tucker",
        "auto",
        "--out",
        tmp_path / "plan.json",
        "--picture",
        tmp_path / "curves.png",
    ]
    assert run("plan", *SMALL, *options) == 0
    rows = re.findall(r"^ +0\.\d0 +([\d.]+) +([\d.]+)$", capsys.readouterr().out, re.MULTILINE)
    assert len(rows) == 2
    assert all(float(auto) <= float(tucker) for tucker, auto in rows)
    assert (tmp_path / "curves.png").stat().st_size > 1000
    assert surgery.Plan.load(tmp_path / "plan.json")
    for wrong in (["--picture", tmp_path / "curves.none"], ["--out", tmp_path / "none" / "plan.json"]):
        assert run("plan", *SMALL, *wrong) == 1
        told = capsys.readouterr()
        assert told.out == ""  # before any work
        assert told.err.startswith("error: ")


@pytest.mark.parametrize("error", [0.3, 0.6])
def test_extend_keeps_its_promise(error, capsys):
    assert run("extend", *SMALL, "--error", error) == 0
    rule, budget = re.findall(r"(\d+) layers cut, largest error of a layer ([\d.]+)", capsys.readouterr().out)
    assert float(rule[1]) <= error
    assert int(budget[0]) > 0
