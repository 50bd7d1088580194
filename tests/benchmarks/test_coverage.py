"""The comparisons of ``benchmarks/coverage.py`` pass what is right and can fail."""

from __future__ import annotations

import importlib.util
import json
import re
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional

import surgery

sys.path.insert(1, str(Path(__file__).parents[2] / "benchmarks"))

import coverage_check
import coverage_models
from coverage_check import Given, Network, check, find_inputs

BENCHMARK = importlib.util.spec_from_file_location("coverage_benchmark", Path(coverage_check.__file__).with_name("coverage.py"))
coverage = importlib.util.module_from_spec(BENCHMARK)  # by its file: a well-known package has the same name
BENCHMARK.loader.exec_module(coverage)
needs_torchvision = pytest.mark.skipif(importlib.util.find_spec("torchvision") is None, reason="torchvision is not installed")
RIGHT = {"decompose": surgery.decompose, "reconstruct": surgery.reconstruct, "report": surgery.report}


class Net(nn.Module):
    """A layer scale that hides a branch, zeros that would silence it, and a linear layer."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.bn = nn.BatchNorm2d(8)
        self.branch = nn.Conv2d(8, 8, 3, padding=1)
        self.scale = nn.Parameter(torch.full((8, 1, 1), 1e-6))
        self.head = nn.Linear(8, 5)
        nn.init.zeros_(self.branch.weight)

    def forward(self, x):
        x = functional.relu(self.bn(self.conv(x)))
        x = functional.dropout(x + self.scale * self.branch(x), 0.5, self.training)
        return self.head(x.mean((2, 3)))


def network(make=Net, given=None):
    return Network(name="mine:net", library="mine", make=make, given=given)


def test_a_right_network_passes_with_all_its_numbers():
    row = check(network())
    assert row["failures"] == []
    assert row["passed"]
    assert row["layers"] == {"convolution": 2, "linear": 1}
    assert row["decomposed"] == 2
    assert sum(row["kept"].values()) == 1
    assert row["dtype"] == "float64"
    for key in ("full_eval", "full_train", "back"):
        assert row[key]["calls"] == 3
        assert max(row[key]["output"], row[key]["layers"]) <= 1e-9
    assert row["meaning"]["eval"]["silent"] == 0  # the zeros were filled
    assert min(row["half_errors"]) > 0.01  # what comes back comes back from a real cut


@needs_torchvision
def test_a_tiny_network_of_torchvision_passes():
    row = check(coverage_models.network_named("torchvision:squeezenet1_1"))
    assert row["failures"] == []
    assert row["passed"]
    assert row["capture"] == "traced"


def nudged(layer):
    def decompose(model, ranks, **options):
        net = RIGHT["decompose"](model, ranks, **options)
        with torch.no_grad():
            next(net.get_submodule(layer).parameters()).mul_(1 + 1e-7)
        return net

    return decompose


def forgetful(model):
    report = RIGHT["report"](model)
    return replace(report, layers=report.layers[1:])


def mute(model):
    report = RIGHT["report"](model)
    return replace(report, layers=tuple(replace(row, reason=None) for row in report.layers))


def renamed(model):
    net = RIGHT["reconstruct"](model)
    net.register_buffer("extra", torch.zeros(1))
    return net


def half_back(model):
    net = RIGHT["reconstruct"](model)
    net.conv.weight.data[0] *= 1.001
    return net


def raises(*_, **__):
    raise RuntimeError("out of order")


@pytest.mark.parametrize(
    ("name", "wrong", "said"),
    [
        ("decompose", nudged("conv"), r"full, eval: beyond 1e-09: .* the first layer that is: conv, call 1"),
        ("decompose", nudged("branch"), r"full, train: beyond 1e-09: .* branch"),
        ("decompose", nudged("head"), r"full, eval: .* head, call 1"),
        ("decompose", raises, "full: RuntimeError: out of order"),
        ("report", forgetful, r"account: without exactly one row: \['conv'\]"),
        ("report", mute, r"account: .* kept without a reason: \['head'\]"),
        ("reconstruct", renamed, "keys: the state dict after reconstruction differs: .*extra"),
        ("reconstruct", half_back, "back: beyond 1e-09"),
        ("capture", raises, "capture: RuntimeError: out of order"),
    ],
)
def test_what_is_wrong_is_reported(monkeypatch, name, wrong, said):
    monkeypatch.setattr(surgery, name, wrong)
    row = check(network())
    assert not row["passed"]
    assert any(re.search(said, failure) for failure in row["failures"]), row["failures"]


class Blown(Net):
    def forward(self, x):
        return super().forward(x) * float("inf")


class Constant(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, bias=False)

    def forward(self, x):
        return self.conv(x * 0)


@pytest.mark.parametrize(("make", "said"), [(Blown, "not all finite"), (Constant, "the same number everywhere")])
def test_a_comparison_that_would_tell_nothing_fails(make, said):
    row = check(network(make))
    assert any(said in failure for failure in row["failures"]), row["failures"]


class Sized(nn.Module):
    """Images of one size only, and in train mode with at least four of them."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)

    def forward(self, x):
        if x.shape[-1] != 96 or (self.training and len(x) < 4):
            raise ValueError("not these")
        return self.conv(x)


class Untrainable(Net):
    def forward(self, x):
        if self.training:
            raise ValueError("targets are missing")
        return super().forward(x)


def test_inputs_are_found_by_trying():
    given, batch, refusal = find_inputs(Sized(), None)
    assert (given.text, batch, refusal) == ("images 96x96", 4, None)


def test_train_mode_is_given_up_only_with_the_original_s_own_reason():
    row = check(network(Untrainable))
    assert row["failures"] == []
    assert "full_train" not in row
    assert row["notes"] == ["not run in train mode: the original network cannot (ValueError: targets are missing)"]


class Narrow(Net):
    """Runs in float32 only: it asks for it."""

    def forward(self, x):
        return super().forward(x.float())


class Overflowing(Net):
    """In float64 a number too large for the float32 that it is multiplied in."""

    def forward(self, x):
        return super().forward(x) + torch.zeros(1, dtype=torch.float32) * float(torch.finfo(x.dtype).min)


@pytest.mark.parametrize(("make", "said"), [(Narrow, "refuses float64 (RuntimeError"), (Overflowing, "finite in float32 and not in float64")])
def test_networks_that_refuse_float64_are_compared_in_float32(make, said):
    row = check(network(make))
    assert row["failures"] == []
    assert row["dtype"] == "float32"
    assert said in row["notes"][0]
    assert row["full_eval"]["tolerance"] == 1e-4


class Choosing(nn.Module):
    """The largest pixel goes through a second layer."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.head = nn.Linear(4, 2)

    def forward(self, x):
        x = self.conv(x).flatten(2)
        best = x[:, :1].topk(1, dim=2).indices.expand(-1, 4, 1)
        return self.head(x.gather(2, best)[..., 0])


def test_after_a_choice_of_the_data_only_what_was_before_must_agree():
    model, inputs = Choosing().double().eval(), torch.rand(2, 3, 8, 8, dtype=torch.float64)
    reference = coverage_check.run(model, inputs)
    assert reference.choice == "topk"
    assert {name for name, _ in reference.late} == {"head"}
    with torch.no_grad():
        model.head.weight.mul_(2)
    assert coverage_check.compare(reference, model, inputs)["compared"] == "layers before the first topk"
    with torch.no_grad():
        model.conv.weight.mul_(1 + 1e-6)
    with pytest.raises(coverage_check.Checked, match="the first layer that is: conv"):
        coverage_check.compare(reference, model, inputs)


class Chaotic(nn.Module):
    """Batch norm after batch norm: in train mode each layer makes a little more of what rounding did in those before."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([nn.Sequential(nn.Conv2d(8, 8, 1, bias=False), nn.BatchNorm2d(8), nn.ReLU()) for _ in range(130)])

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return x


@pytest.mark.parametrize("wrong", [None, 1e-8])
def test_what_makes_much_of_rounding_is_compared_layer_by_layer(wrong):
    torch.manual_seed(0)
    model, inputs = Chaotic().double(), torch.rand(4, 8, 2, 2, dtype=torch.float64)
    reference = coverage_check.run(coverage_check.private_copy(model), inputs)
    net = surgery.decompose(model, {"re:.*": 1.0})
    if wrong is not None:
        with torch.no_grad():
            next(net.layers[100].parameters()).mul_(1 + wrong)
    with pytest.raises(coverage_check.Checked, match="beyond 1e-09"):
        coverage_check.compare(reference, net, inputs)
    if wrong is not None:
        with pytest.raises(coverage_check.Checked, match="beyond 1e-09"):
            coverage_check.compare_conditioned(reference, model, net, inputs)
    else:
        found = coverage_check.compare_conditioned(reference, model, net, inputs)
        assert found["layers"] <= 1e-12
        assert "a unit in the last place" in found["compared"]


def test_given_inputs_are_used():
    row = check(network(given=Given(text="small", inputs=lambda b: torch.rand(b, 3, 8, 8))))
    assert row["passed"]
    assert row["given"] == "small"
    assert row["inputs"] == [[2, 3, 8, 8]]


@needs_torchvision
def test_kernels_for_detectors():
    from torchvision_kernels import nms, roi_align

    boxes = torch.tensor([[0.0, 0, 10, 10], [0, 0, 10, 9], [20, 20, 30, 30]])
    assert nms(boxes, torch.tensor([0.5, 0.9, 0.1]), 0.5).tolist() == [1, 2]
    assert nms(boxes, torch.tensor([0.5, 0.9, 0.1]), 0.95).tolist() == [1, 0, 2]
    ramp = torch.arange(16.0).expand(1, 1, 16, 16)
    pooled = roi_align(ramp, torch.tensor([[0.0, 4, 4, 12, 12]]), 1.0, 2, 2, 2, True)
    assert torch.allclose(pooled[0, 0], torch.tensor([[5.5, 9.5], [5.5, 9.5]]))


def test_a_table_goes_on_from_the_published_one_and_counts_what_has_no_row(tmp_path, monkeypatch):
    names = ["torchvision:one", "torchvision:two", "torchvision:three"]
    row = check(network()) | {"library": "torchvision", "name": names[0]}
    out = tmp_path / "coverage.json"
    coverage.publish([row], [], names[1:], "a command", out)
    tried = []

    def tries(name, *_):
        tried.append(name)
        return row | {"name": name, "passed": name == names[1], "failures": [] if name == names[1] else ["output: off"]}

    monkeypatch.setattr(coverage, "listed", lambda *_: [(name, size) for size, name in enumerate(names)])
    monkeypatch.setattr(coverage, "in_a_process", tries)
    command = ["coverage.py", "--library", "torchvision", "--out", str(out), "--work", str(tmp_path / "work")]
    monkeypatch.setattr(sys, "argv", [*command, "--table"])
    coverage.main()
    found = json.loads(out.read_text())
    assert (tried, found["networks"], found["passed"], found["without_a_row"]) == ([], 1, 1, names[1:])
    assert "**2 networks have no row yet.**" in out.with_suffix(".md").read_text()
    monkeypatch.setattr(sys, "argv", [*command, "--resume"])
    coverage.main()
    found = json.loads(out.read_text())
    assert (tried, found["networks"], found["passed"], found["without_a_row"]) == (names[1:], 3, 2, [])
    assert "torchvision:three: output: off" in out.with_suffix(".md").read_text()
