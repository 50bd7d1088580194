"""Exporters: what they write computes the same on another runtime, and a failure leaves nothing."""

from __future__ import annotations

import contextlib

import onnx
import pytest
import torch
from torch import nn

import surgery
from passes.errors import MissingExtra, ParityError, SurgeryError, SurgeryValueError
from surgery.export import common
from surgery.export.common import fresh_inputs
from surgery.export.onnx import onnx_session, run_session
from tests.networks import Keyword, Random, random_states

X = torch.randn(2, 3, 12, 12, generator=torch.Generator().manual_seed(51))


def convolutions(path):
    return [node for node in onnx.load(path).graph.node if node.op_type == "Conv"]


def test_onnx_of_a_decomposed_network_has_the_convolutions_of_its_plan(small, tmp_path):
    net = surgery.decompose(small, {"re:conv.*": 0.5, "mix": 3})
    report = surgery.export_onnx(net, tmp_path / "net.onnx", X, dynamic_batch=True)
    assert report.difference < 1e-5
    assert report.batch_sizes == (3, 1)
    assert report.size_bytes == sum(p.stat().st_size for p in tmp_path.iterdir())
    assert len(convolutions(tmp_path / "net.onnx")) == 3 + 3 + 2 + 2  # conv1, conv2, mix, and wide and tail.1 as they were
    session = onnx_session(tmp_path / "net.onnx")
    for batch in (1, 7):
        x = torch.randn(batch, 3, 12, 12)
        assert torch.allclose(run_session(session, x)[0], net(x), atol=1e-5)


@pytest.mark.parametrize("cut", [False, True])
@pytest.mark.parametrize("export", [surgery.export_onnx, surgery.export_torchscript], ids=["onnx", "torchscript"])
def test_graphs_export_too(small, tmp_path, cut, export):
    graph = surgery.trace(small, X)
    if cut:
        graph = surgery.decompose(graph, 0.5)
    report = export(graph, tmp_path / "net.bin", X)
    assert report.difference < 1e-5
    assert report.batch_sizes == (2,)
    assert str(report).startswith(str(tmp_path / "net.bin"))


def test_torchscript_round_trip(small, tmp_path):
    net = surgery.decompose(small, 0.5)
    report = surgery.export_torchscript(net.train(), tmp_path / "net.pt", X)
    assert (report.format, report.opset) == ("torchscript", None)
    assert net.training  # exported from a copy in eval mode
    loaded = torch.jit.load(tmp_path / "net.pt")
    assert torch.allclose(loaded(X), net.eval()(X), atol=1e-6)


def test_inputs_by_keyword_and_outputs_in_a_dict(tmp_path):
    inputs = {"sound": torch.randn(2, 4, 20), "gain": torch.ones(1)}
    net = surgery.decompose(Keyword().eval(), {"conv": 0.5})
    assert surgery.export_onnx(net, tmp_path / "net.onnx", inputs).difference < 1e-5
    assert surgery.export_torchscript(net, tmp_path / "checked.pt", inputs).difference < 1e-5
    assert surgery.export_torchscript(net, tmp_path / "net.pt", inputs, check=False).difference is None


def test_a_chosen_opset(small, tmp_path):
    assert surgery.export_onnx(small, tmp_path / "net.onnx", X, opset=20).opset == 20


@pytest.mark.parametrize("export", [surgery.export_onnx, surgery.export_torchscript], ids=["onnx", "torchscript"])
def test_a_failed_check_leaves_no_file(small, tmp_path, monkeypatch, export):
    monkeypatch.setattr(common, "TOLERANCE", dict.fromkeys(common.TOLERANCE, -1.0))
    (tmp_path / "net.bin").write_text("the one before")
    with pytest.raises(ParityError, match="differ"):
        export(small, tmp_path / "net.bin", X)
    assert [p.name for p in tmp_path.iterdir()] == ["net.bin"]
    assert (tmp_path / "net.bin").read_text() == "the one before"


class Unexportable(nn.Module):
    def forward(self, x):
        return torch.from_numpy(x.numpy() + 1) if x.sum() > 1e9 else x * float(x.sum())


def test_a_network_that_torch_cannot_export(tmp_path):
    with pytest.raises(SurgeryError, match="torch cannot export Unexportable to ONNX"):
        surgery.export_onnx(Unexportable(), tmp_path / "net.onnx", X)
    assert list(tmp_path.iterdir()) == []


def test_a_trace_that_depends_on_data_is_caught_by_the_check(tmp_path):
    with pytest.raises(ParityError, match="TorchScript file and the network"):
        surgery.export_torchscript(Unexportable(), tmp_path / "net.pt", X)
    assert list(tmp_path.iterdir()) == []


def test_interrupted(small, tmp_path, monkeypatch):
    monkeypatch.setattr("torch.jit.save", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        surgery.export_torchscript(small, tmp_path / "net.pt", X)
    assert list(tmp_path.iterdir()) == []


def test_wrong_arguments(small, tmp_path):
    for export in (surgery.export_onnx, surgery.export_torchscript):
        with pytest.raises(SurgeryValueError, match="does not exist; make it first"):
            export(small, tmp_path / "nowhere" / "net.onnx", X)
        with pytest.raises(SurgeryValueError, match="is a folder"):
            export(small, tmp_path, X)
        with pytest.raises(SurgeryValueError, match="example_inputs: Small fails on them"):
            export(small, tmp_path / "net", X[:, :2])


def test_a_missing_extra_is_named(small, tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(MissingExtra, match=r"ONNX export needs onnxscript: pip install 'surgery\[export\]'"):
        surgery.export_onnx(small, tmp_path / "net.onnx", X)


def test_fresh_inputs_have_the_shape_and_dtype_and_are_not_the_example():
    inputs = {"picture": X, "ids": torch.tensor([[3, 7, 9], [3, 7, 9]]), "flag": True}
    fresh = fresh_inputs(inputs, torch.Generator().manual_seed(0), batch=5)
    assert fresh["picture"].shape == (5, 3, 12, 12)
    assert fresh["ids"].shape == (5, 3)
    assert set(fresh["ids"].flatten().tolist()) <= {3, 7, 9}
    assert fresh["flag"] is True
    assert not torch.equal(fresh["picture"][:2], X)


def test_wrong_parity_would_be_seen(small, tmp_path):
    """The check must be able to fail: another network's file does not pass for this one."""
    surgery.export_onnx(surgery.decompose(small, {"conv2": (1, 1)}), tmp_path / "other.onnx", X)
    session = onnx_session(tmp_path / "other.onnx")
    with pytest.raises(ParityError):
        common.check_network(small, lambda inputs: run_session(session, inputs), X, (None,), "onnxruntime and the network")


def test_a_tuple_that_ends_in_a_dict(tmp_path):
    class Named(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 3)

        def forward(self, pair):
            return self.conv(pair["a"]) + self.conv(pair["b"])

    inputs = ({"b": torch.randn(1, 3, 8, 8), "a": torch.randn(1, 3, 8, 8)},)
    for dynamic in (False, True):
        assert surgery.export_onnx(Named(), tmp_path / "net.onnx", inputs, dynamic_batch=dynamic).difference < 1e-4


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("export", [surgery.export_onnx, surgery.export_torchscript], ids=["onnx", "torchscript"])
def test_random_states_are_left_as_found(export, fails, tmp_path):
    net, before = Random(fails).eval(), random_states()
    with contextlib.suppress(SurgeryError):
        export(net, tmp_path / "net", X)
    assert random_states() == before
