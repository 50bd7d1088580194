"""ONNX: layers found by name, the convolutions of the plan, torch's two exporters, operator sets, names of inputs and outputs."""

from __future__ import annotations

import os
from collections import Counter
from time import process_time, sleep

import onnx
import pytest
import torch
from torch import nn
from torch.nn import functional

import surgery
from passes import host_for
from passes.errors import ParityError, SurgeryError, SurgeryValueError
from passes.kinds import kind_of
from surgery.export import onnx as exporter_file
from surgery.export import onnx_convolutions
from surgery.export.onnx import onnx_session, run_session
from surgery.export.onnx_layers import check_chains
from tests.networks import Keyword, Refused, Small

X = torch.randn(2, 3, 12, 12, generator=torch.Generator().manual_seed(51))
BOTH = pytest.mark.parametrize("exporter", ["dynamo", "torchscript"])


def planned(net):
    """Name and weight shape of every convolution, by the plan: those of a chain from its factorization alone."""
    found = Counter()
    for site in host_for(net).sites():
        if site.chain is None:
            found[site.name, site.geometry.weight_shape] += not site.geometry.is_linear
        else:
            pieces = kind_of(site.chain).shapes(site.geometry, site.chain, site.bias is not None)
            found.update((f"{site.name}.{piece.name}", piece.geometry.weight_shape) for piece in pieces)
    return +found


def in_file(path):
    return Counter((c.layer, c.weight_shape) for c in onnx_convolutions(path))


@BOTH
def test_onnx_of_a_decomposed_network_has_the_convolutions_of_its_plan(small, tmp_path, exporter):
    net = surgery.decompose(small, {"re:conv.*": 0.5, "mix": 3, "tail.1": surgery.Spatial(4)})
    report = surgery.export_onnx(net, tmp_path / "net.onnx", X, dynamic_batch=True, dynamic_size=True, exporter=exporter)
    assert report.exporter == exporter
    assert in_file(report.path) == planned(net)
    assert sum(in_file(report.path).values()) == 3 + 3 + 2 + 2 + 1  # conv1, conv2, mix, tail.1, and wide as it was
    session = onnx_session(tmp_path / "net.onnx")
    for batch, height in ((1, 12), (7, 20)):
        x = torch.randn(batch, 3, height, 12)
        assert torch.allclose(run_session(session, x)[0], net(x), atol=1e-5)


class Everywhere(nn.Module):
    """Layers in containers that are never called, one called twice, two with one weight and batch norms, a function, a computed weight."""

    def __init__(self):
        super().__init__()
        blocks = [nn.ModuleDict({"c": nn.Conv2d(4, 4, 3, padding=1)}) for _ in range(2)]
        self.a, self.b = nn.ModuleDict({"x": nn.Conv2d(3, 4, 1)}), nn.ModuleList(blocks)
        self.tied, self.norms = nn.ModuleList([nn.Conv2d(4, 4, 3, bias=False) for _ in range(2)]), nn.ModuleList(nn.BatchNorm2d(4) for _ in "ab")
        self.tied[1].weight = self.tied[0].weight
        self.computed = nn.utils.parametrizations.weight_norm(nn.Conv2d(4, 4, 1))
        self.head = nn.Linear(4, 2)

    def forward(self, x):
        x = self.a["x"](x)
        for block in (*self.b, self.b[1]):
            x = block["c"](x).relu()
        for tied, norm in zip(self.tied, self.norms, strict=True):
            x = norm(tied(x))
        x = functional.conv2d(self.computed(x), x.new_ones(4, 4, 1, 1))
        return self.head(x.mean((2, 3)))


@BOTH
@pytest.mark.parametrize("form", ["module", "trace"])
def test_nodes_have_the_names_of_their_layers(tmp_path, exporter, form):
    net = Everywhere().eval()
    if form == "trace":
        net = surgery.trace(net, X)
    surgery.export_onnx(net, tmp_path / "net.onnx", X, exporter=exporter)
    graph = onnx.load(tmp_path / "net.onnx").graph
    names = [node.name for node in graph.node if node.op_type in ("Conv", "Gemm")]
    tied = names[4:6]
    if form == "module":
        assert tied == ["tied.0", "tied.1"]
    assert names[:4] + names[8:] == ["a.x", "b.0.c", "b.1.c", "b.1.c#2", "head"]
    assert [c.layer for c in onnx_convolutions(tmp_path / "net.onnx")][7] == ""  # called as a function
    everything = [t.name for t in graph.initializer] + [name for node in graph.node for name in (node.name, *node.input, *node.output)]
    assert not [name for name in everything if "network" in name]  # of the wrapper nothing is left
    assert len({node.name for node in graph.node}) == len(graph.node)


class Auxiliary(nn.Module):
    """Computes a head in vain, as networks do that need it in training only."""

    def __init__(self):
        super().__init__()
        self.body, self.aux = (nn.Conv2d(3, width, 3, padding=1) for width in (8, 5))

    def forward(self, x):
        self.aux(x)
        return self.body(x)


@BOTH
def test_a_chain_whose_output_is_thrown_away_need_not_be_in_the_file(tmp_path, exporter):
    net = surgery.decompose(Auxiliary().eval(), {"re:body|aux": 0.5})
    report = surgery.export_onnx(net, tmp_path / "net.onnx", X, exporter=exporter)
    layers = {c.layer for c in onnx_convolutions(report.path)}
    assert layers == {"body.reduce", "body.core", "body.expand"}  # torch takes the rest out


class Zeros(nn.Module):
    """Layers that begin as zeros, as ControlNet's do: exporters make one constant of equal weights."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.third = (nn.Conv2d(3, 8, 1) for _ in range(3))
        for parameter in self.parameters():
            nn.init.zeros_(parameter)

    def forward(self, x):
        return self.first(x) + 1, self.second(x.relu()), self.third(x.sigmoid())


@BOTH
def test_layers_with_equal_weights_keep_their_own_names(tmp_path, exporter):
    plain = surgery.export_onnx(Zeros().eval(), tmp_path / "plain.onnx", X, exporter=exporter)
    assert in_file(plain.path) == Counter((name, (8, 3, 1, 1)) for name in ("first", "second", "third"))
    net = surgery.decompose(Zeros().eval(), {"re:.*": 2})
    assert in_file(surgery.export_onnx(net, tmp_path / "net.onnx", X, exporter=exporter).path) == planned(net)


class Twice(nn.Module):
    """Two layers on one channel: both chains begin with a multiplication by one of it, which exporters do once."""

    def __init__(self):
        super().__init__()
        self.left, self.right = nn.Conv2d(1, 6, 3, padding=1), nn.Conv2d(1, 4, 3, padding=1)

    def forward(self, x):
        return self.left(x), self.right(x)


@BOTH
def test_layers_that_compute_the_same_may_be_one(tmp_path, exporter):
    torch.manual_seed(0)
    net = surgery.decompose(Twice().eval(), {"re:.*": (3, 1)})
    with torch.no_grad():
        net.right.reduce.weight.copy_(net.left.reduce.weight)
    report = surgery.export_onnx(net, tmp_path / "net.onnx", X[:, :1], exporter=exporter)
    layers = {c.layer for c in onnx_convolutions(report.path)}
    assert {"left.core", "left.expand", "right.core", "right.expand"} < layers <= {name for name, _ in planned(net)}


def test_files_hold_no_paths_of_the_machine(small, tmp_path):
    surgery.export_onnx(small, tmp_path / "net.onnx", X, exporter="dynamo", check=False)
    assert __file__.encode() not in (tmp_path / "net.onnx").read_bytes()
    assert b".py" not in (tmp_path / "net.onnx").read_bytes()


def test_chains_with_other_convolutions_are_refused(small, tmp_path):
    net = surgery.decompose(small, {"conv2": (8, 6)})
    report = surgery.export_onnx(net, tmp_path / "net.onnx", X, exporter="torchscript")
    called = {name: shape for name, shape in in_file(report.path) if name}
    graph = onnx.load(report.path)
    check_chains(graph, net, called)
    other = surgery.decompose(small, {"conv2": (8, 5)})
    with pytest.raises(ParityError, match=r"other convolutions than the network's chains: conv2\.core \(8, 5, 3, 3\), conv2\.core \(8, 6, 3, 3\)"):
        check_chains(graph, other, dict(planned(other).keys()))
    with pytest.raises(ParityError, match=r"conv1\.reduce"):
        check_chains(graph, surgery.decompose(small, 0.5), called | {"conv1.reduce": (2, 3, 1, 1)})


@BOTH
def test_a_chosen_opset(small, tmp_path, exporter):
    assert surgery.export_onnx(small, tmp_path / "net.onnx", X, opset=19, exporter=exporter).opset == 19
    with pytest.raises(SurgeryError, match=r"opset|version"):
        surgery.export_onnx(small, tmp_path / "other.onnx", X, opset=99, exporter=exporter)
    assert [p.name for p in tmp_path.iterdir()] == ["net.onnx"]


@BOTH
def test_inputs_and_outputs_have_the_names_of_the_model(tmp_path, exporter):
    inputs = {"sound": torch.randn(2, 4, 20), "gain": torch.ones(1)}
    net = surgery.decompose(Keyword().eval(), {"conv": 0.5})
    assert surgery.export_onnx(net, tmp_path / "net.onnx", inputs, exporter=exporter).difference < 1e-5
    graph = onnx.load(tmp_path / "net.onnx").graph
    assert [i.name for i in graph.input] == ["sound", "gain"]
    assert [o.name for o in graph.output] == ["sound_2", "total"]  # an input has the first one's name


def test_auto_takes_the_second_exporter_where_the_first_fails(tmp_path):
    report = surgery.export_onnx(Refused(), tmp_path / "net.onnx", X)
    assert report.exporter == "torchscript"
    with pytest.raises(SurgeryError, match="torch cannot export Refused to ONNX"):
        surgery.export_onnx(Refused(), tmp_path / "net.onnx", X, check=False)  # a trace that nobody checks is no proof
    with pytest.raises(SurgeryValueError, match="expected 'auto', 'dynamo' or 'torchscript', got 'old'"):
        surgery.export_onnx(Refused(), tmp_path / "net.onnx", X, exporter="old")


def test_where_both_fail_both_reasons_are_told(small, tmp_path, monkeypatch):
    def write(job, work, name, opset):
        raise ParityError(f"not with {name}") if name == "dynamo" else SurgeryError(f"nor with {name}")

    monkeypatch.setattr(exporter_file, "write_onnx", write)
    with pytest.raises(ParityError, match="not with dynamo; and with exporter='torchscript': nor with torchscript"):
        surgery.export_onnx(small, tmp_path / "net.onnx", X)
    assert list(tmp_path.iterdir()) == []


def test_weights_of_bfloat16_stay_so(tmp_path):
    net = Small().bfloat16().eval()
    surgery.export_onnx(net, tmp_path / "net.onnx", X.bfloat16(), check=False, exporter="dynamo")
    kinds = {t.data_type for t in onnx.load(tmp_path / "net.onnx").graph.initializer if t.name.endswith("weight")}
    assert kinds == {onnx.TensorProto.BFLOAT16}  # what torch folds batch norms into is float32, and no valid graph


def test_inputs_that_the_network_does_not_read(tmp_path):
    class Half(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 3)

        def forward(self, x, unused):
            return self.conv(x)

    for exporter in ("dynamo", "torchscript"):
        assert surgery.export_onnx(Half(), tmp_path / "net.onnx", (X, torch.ones(2)), exporter=exporter).difference < 1e-5


def test_weights_beside_the_file_as_of_very_large_models(small, tmp_path, monkeypatch):
    save = torch.onnx.ONNXProgram.save
    monkeypatch.setattr(torch.onnx.ONNXProgram, "save", lambda program, path: save(program, path, external_data=True))
    net = surgery.decompose(small, {"conv2": 0.5})
    report = surgery.export_onnx(net, tmp_path / "net.onnx", X, exporter="dynamo")
    files = sorted(p.name for p in tmp_path.iterdir())
    assert files == ["net.onnx", "net.onnx.data"]
    assert report.size_bytes == sum(p.stat().st_size for p in tmp_path.iterdir())
    assert in_file(report.path) == planned(net)
    assert torch.allclose(run_session(onnx_session(tmp_path / "net.onnx"), X)[0], net(X), atol=1e-5)


@pytest.mark.skipif((os.cpu_count() or 1) < 2, reason="on one core onnxruntime has no worker threads")
def test_workers_of_a_session_rest_between_its_calls(tmp_path):
    """Or they take the cores of what is timed next: onnxruntime's own way is to let them spin for tens of milliseconds."""
    inputs = torch.randn(1, 64, 56, 56)  # large enough to be shared out among threads
    surgery.export_onnx(nn.Conv2d(64, 64, 3, padding=1), tmp_path / "net.onnx", inputs, check=False)

    def seconds_after_a_call(session):
        run_session(session, inputs)
        began = process_time()
        sleep(0.05)
        return process_time() - began

    ours = onnx_session(tmp_path / "net.onnx", threads=2)
    assert sorted(seconds_after_a_call(ours) for _ in range(5))[2] < 0.005


@pytest.mark.parametrize("opset", [7, 8, 9, 11])
def test_old_operator_sets(small, tmp_path, opset):
    """Below 9 weights are inputs too."""
    net = surgery.decompose(small, {"conv2": (4, 4)})
    report = surgery.export_onnx(net, tmp_path / "net.onnx", X, opset=opset, exporter="torchscript")
    assert report.opset == opset
    assert report.difference < 1e-4
    graph = onnx.load(tmp_path / "net.onnx").graph
    held = {tensor.name for tensor in graph.initializer}
    assert [value.name for value in graph.input if value.name not in held] == ["x"]
    if opset < 9:
        assert held <= {value.name for value in graph.input}


class Encoder(nn.Module):
    """Its outputs are called as values inside of the graph are, one twice over; the input is given back."""

    def __init__(self):
        super().__init__()
        self.conv, self.mean, self.variance = nn.Conv2d(3, 8, 3), nn.Linear(8, 4), nn.Linear(8, 4)

    def forward(self, x):
        h = self.conv(x).mean((2, 3))
        mean = self.mean(h)
        return {"mean": mean, "conv2d": self.variance(h), "again": mean, "given": x}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_outputs_with_the_names_of_inner_values(tmp_path, dtype):
    model, x = Encoder().to(dtype).eval(), torch.randn(2, 3, 8, 8).to(dtype)
    surgery.export_onnx(model, tmp_path / "net.onnx", x, exporter="dynamo", check=dtype == torch.float32)
    graph = onnx.load(tmp_path / "net.onnx").graph
    assert [value.name for value in graph.input] == ["x"]
    assert [value.name for value in graph.output] == ["mean", "conv2d", "again", "given"]
    made = [name for node in graph.node for name in node.output]
    assert len(made) == len(set(made))
    assert {value.name for value in graph.output} <= set(made)
    onnx.checker.check_model(onnx.load(tmp_path / "net.onnx"))


@BOTH
def test_outputs_whose_keys_are_numbers(tmp_path, exporter):
    class Pyramid(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 8, 3)

        def forward(self, x):
            y = self.conv(x)
            return {"0": y, 1: y.relu(), "pool": y.mean((2, 3))}

    surgery.export_onnx(Pyramid().eval(), tmp_path / "net.onnx", X, exporter=exporter)
    assert [value.name for value in onnx.load(tmp_path / "net.onnx").graph.output] == ["output_0", "output_1", "pool"]


def test_pooling_to_what_is_no_factor_goes_by_the_newer_exporter(tmp_path):
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(3)).eval()
    with pytest.raises(SurgeryError, match=r"torch cannot export Sequential to ONNX: .*not factor of input size"):
        surgery.export_onnx(model, tmp_path / "net.onnx", X, exporter="torchscript")
    assert list(tmp_path.iterdir()) == []
    assert surgery.export_onnx(model, tmp_path / "net.onnx", X).exporter == "dynamo"
