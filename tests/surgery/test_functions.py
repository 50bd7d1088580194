"""Convolutions and linear maps called as functions: never cut, always reported, and kept by everything that keeps a record."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from torch import nn
from torch.nn import functional

import surgery
from surgery.checkpoint import WEIGHTS_FILE

X = torch.randn(2, 4, 9, 9, generator=torch.Generator().manual_seed(71))


class Blend(nn.Module):
    """A convolution whose weight is a mixture of experts, by what the input says."""

    def __init__(self):
        super().__init__()
        self.experts = nn.Parameter(torch.randn(3, 8, 4, 3, 3))

    def forward(self, x):
        share = torch.softmax(x.mean((0, 2, 3))[:3], 0)
        return functional.conv2d(x, (share @ self.experts.flatten(1)).view(8, 4, 3, 3), padding=1)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.blend, self.conv = Blend(), nn.Conv2d(8, 8, 3, padding=1)
        self.head = nn.Parameter(torch.randn(5, 8))

    def forward(self, x):
        x = self.conv(self.blend(x))
        return functional.linear(x.mean((2, 3)), self.head) + functional.linear(x.amax((2, 3)), self.head)


@pytest.fixture
def net():
    return surgery.decompose(Net().eval(), {"conv": (3, 3)}, example_inputs=X)


def rows(model):
    return [(f.module, f.function, f.weight, f.weight_shape, len(f.calls), f.macs) for f in surgery.report(model).functions]


EXPECTED = [("blend", "conv2d", "computed", (8, 4, 3, 3), 1, 2 * 81 * 288), ("", "linear", "head", (5, 8), 2, 2 * 2 * 40)]


def test_the_report_has_them_beside_the_layers(net):
    report = surgery.report(net)
    assert rows(net) == EXPECTED
    assert [row.name for row in report.layers] == ["conv"]
    text = str(report)
    assert "function in blend: conv2d with a computed weight 8x4x3x3, 1 call, 46.7k MACs; not a layer, so never cut" in text
    assert "function in (the model): linear with head 5x8, 2 calls, 160 MACs; not a layer, so never cut" in text
    assert report.macs_before > EXPECTED[0][-1] + EXPECTED[1][-1]  # the totals count them


def test_json(net):
    data = json.loads(surgery.report(net).to_json())
    assert data["functions"][1] == {
        "module": "",
        "function": "linear",
        "weight": "head",
        "weight_shape": [5, 8],
        "calls": 2,
        "macs": 160,
        "input_shapes": [[2, 8], [2, 8]],
        "output_shapes": [[2, 5], [2, 5]],
    }


def test_they_are_known_only_from_running():
    assert rows(Net()) == rows(surgery.decompose(Net(), 0.5)) == []
    assert "function" not in str(surgery.report(surgery.decompose(Net(), 0.5)))


def test_they_survive_whatever_the_record_survives(net, tmp_path):
    surgery.save(net, tmp_path / "net")
    loaded = surgery.load(tmp_path / "net", Net().eval())
    again = surgery.decompose(net, {"conv": (2, 2)})  # without inputs: what is known stays known
    for model in (copy.deepcopy(net), loaded, again, surgery.reconstruct(net), nn.DataParallel(net), surgery.trace(net, X)):
        assert rows(model) == EXPECTED
    assert surgery.report(loaded) == surgery.report(net)


def test_on_a_graph():
    net = surgery.decompose(surgery.trace(Net().eval(), X), {"conv": (3, 3)}, example_inputs=X)
    assert [row[1:] for row in rows(net)] == [row[1:] for row in EXPECTED]
    assert {row[0] for row in rows(net)} == {""}  # the graph has no modules but layers


def test_submodules_that_were_decomposed_on_their_own_report_under_their_prefix(net):
    class Around(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = net

        def forward(self, x):
            return self.inner(x)

    assert rows(Around()) == [("inner.blend", *EXPECTED[0][1:]), ("inner", "linear", "inner.head", *EXPECTED[1][3:])]
    whole = surgery.decompose(Around(), {}, example_inputs=X)
    assert rows(whole) == rows(Around())
    assert rows(surgery.decompose(Around(), {})) == rows(Around())


def test_a_second_look_says_what_is_so_now(net):
    assert rows(surgery.decompose(net, {}, example_inputs=X[:1]))[0][-1] == 81 * 288


def test_a_damaged_record_is_one_clear_error(net, tmp_path):
    from safetensors import safe_open
    from safetensors.torch import save_file

    surgery.save(net, tmp_path / "net")
    file = tmp_path / "net" / WEIGHTS_FILE
    with safe_open(file, framework="pt") as opened:
        tensors, record = {key: opened.get_tensor(key) for key in opened.keys()}, json.loads(opened.metadata()["surgery"])  # noqa: SIM118
    record["functions"][0]["macs"] = "many"
    save_file(tensors, file, {"surgery": json.dumps(record)})
    with pytest.raises(surgery.SurgeryValueError, match=r"surgery record is damaged \(TypeError: expected int, got 'many'"):
        surgery.load(tmp_path / "net", Net())
    del record["functions"]  # as written before functions were known
    save_file(tensors, file, {"surgery": json.dumps(record)})
    assert rows(surgery.load(tmp_path / "net", Net())) == []
