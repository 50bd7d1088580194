"""``benchmarks/latency.py`` goes on where it was stopped, and its table recommends nothing that is slower."""

from __future__ import annotations

import argparse
import importlib.util
import sys
from pathlib import Path

import pytest
import torch

import surgery
from surgery.benchmarking.result import NO_VERDICT

sys.path.insert(1, str(Path(__file__).parents[2] / "benchmarks"))

import latency
from latency_table import draw, markdown, recommended
from networks import UNet, network


def row(policy="macs=0.5", ratio=1.5, spread=0.1, **more):
    said = "faster" if ratio - spread > 1 else "slower" if ratio + spread < 1 else NO_VERDICT
    numbers = {"time_ratio": ratio, "time_ratio_low": ratio - spread, "time_ratio_high": ratio + spread, "spread": spread, "verdict": said}
    facts = {"layers_cut": 3, "layers": 4, "rms_error": 0.25, "flops_ratio": 2.0, "quotient": ratio / 2, "before_ms": 3.0, "after_ms": 2.0}
    which = {"network": "resnet18", "policy": policy, "runtime": "eager", "threads": 1, "batch": 1}
    return which | {"load_average": 0.5, "environment": {"torch": "2"}} | numbers | facts | more


def test_only_the_fastest_of_the_faster_at_half_the_macs_is_recommended():
    a, b, c, d = ("macs=0.5" + more for more in ("", " b", " c", " d"))
    rows = [row(a, 1.3), row(b, 1.6), row(c, 2.5, 2.0), row(d, 0.8), row(a, 0.7, network="vgg16"), row(a, 1.2, runtime="train"), row("evbmf", 3.0)]
    assert [(r["network"], r["runtime"], r["policy"]) for r in recommended(rows)] == [("resnet18", "eager", b), ("resnet18", "train", a)]


def test_the_table_holds_every_row_those_that_lose_and_those_that_were_refused():
    refused = {k: v for k, v in row("latency=0.7").items() if k in (*latency.KEY, "load_average", "environment")} | {"refused": "out of reach"}
    text = markdown([row("macs=0.5", 1.3), row("b", 0.8), row("c", 1.05), refused])
    lines = {line.split(" | ")[1]: line for line in text.splitlines() if line.startswith("| resnet18")}
    assert "**1.30 ± 0.10** | 0.65 | faster" in lines["macs=0.5"]
    assert "0.80 ± 0.10 | 0.40 | slower" in lines["b"]
    assert "1.05 ± 0.10 | 0.53 | none" in lines["c"]
    assert "refused: out of reach" in lines["latency=0.7"]
    assert text.count("**1") == 1


BY_MACS, BY_TIME = {"macs=0.5 round_to=8"}, {"macs=0.5 round_to=8 guard=latency", "latency=0.7"}


@pytest.mark.parametrize(
    ("name", "policies", "least"),
    [
        ("resnet18", BY_MACS, 0.80),
        ("resnet50", BY_MACS, 0.68),
        ("vgg16", BY_MACS, 0.72),
        ("resnet18", BY_TIME, 0.85),
        ("resnet50", BY_TIME, 0.75),
        ("vgg16", BY_TIME, 0.85),
    ],
)
def test_time_follows_flops_in_onnxruntime(name, policies, least):
    """Of the rows of the repository; only what is faster counts, since what cuts nothing has a quotient of 1 too."""
    rows = [r for r in latency.read(latency.RESULTS) if (r["network"], r["runtime"]) == (name, "onnxruntime") and r["policy"] in policies]
    assert max(r["quotient"] for r in rows if r["verdict"] == "faster") >= least


def test_the_picture_is_drawn(tmp_path):
    pytest.importorskip("matplotlib")
    draw([row(), row("b", 0.7, runtime="train", network="vgg16")], tmp_path / "latency.png")
    assert (tmp_path / "latency.png").stat().st_size > 5000


def test_rows_are_kept_at_once_and_a_torn_line_is_done_again(tmp_path):
    file = tmp_path / "results" / "rows.jsonl"
    assert latency.read(file) == []
    latency.append({"a": 1}, file)
    with file.open("a") as lines:
        lines.write('{"a": 2, "b"')  # a run was killed here
    latency.append({"a": 3}, file)
    assert latency.read(file) == [{"a": 1}, {"a": 3}]


def test_a_row_is_measured_and_a_refusal_is_a_row(monkeypatch):
    monkeypatch.setitem(latency.POLICIES, "impossible", latency.Policy(lambda *_: {"ranks": surgery.Budget(macs=1e-6)}))
    monkeypatch.setattr(latency, "network", lambda name: (torch.nn.Sequential(torch.nn.Conv2d(3, 16, 3), torch.nn.Conv2d(16, 16, 3)), (1, 3, 8, 8)))
    options = argparse.Namespace(threads=1, batch=2, precision=0.5, seconds=0.05)
    kept, refused = latency.rows("small", [("fraction=0.5", "eager"), ("impossible", "eager")], options)
    assert (kept["batch"], kept["layers"], kept["macs_before"]) == (2, 2, 2 * (27 * 16 * 36 + 9 * 256 * 16))
    assert kept["flops_ratio"] > 1
    assert kept["time_ratio_low"] <= kept["time_ratio"] <= kept["time_ratio_high"]
    assert "refused" in refused


def test_the_u_net_keeps_the_size_and_looks_at_every_scale():
    torch.manual_seed(0)
    net = UNet(classes=2, width=4, depth=2).eval()
    x = torch.randn(1, 3, 16, 16)
    with torch.no_grad():
        y = net(x)
        x[..., 0, 0] += 1
        moved = (net(x) - y).abs().amax(1)[0]
    assert y.shape == (1, 2, 16, 16)
    assert moved[0, 0] > 0
    assert (moved > 0).sum() > 25  # what the four convolutions at full resolution alone carry it to


@pytest.mark.skipif(importlib.util.find_spec("torchvision") is None, reason="torchvision is not installed")
def test_the_backbone_of_the_detector_gives_a_pyramid():
    with torch.device("meta"):
        net, shape = network("fasterrcnn_backbone")
        maps = net(torch.empty(shape))
    assert [tuple(m.shape[1:]) for m in maps.values()] == [(256, 80, 80), (256, 40, 40), (256, 20, 20), (256, 10, 10), (256, 5, 5)]
