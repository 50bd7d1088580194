"""Surgery on ONNX files: cut and fused back by the same kinds, rules, budgets and passes, whatever exporter wrote them."""

from __future__ import annotations

from math import prod

import numpy
import onnx
import onnxruntime
import pytest
import torch
from onnx import numpy_helper

import surgery
from passes import Decompose, Reconstruct
from passes.errors import ParityError, SurgeryError, SurgeryValueError
from passes.kinds import KINDS, usual_kind
from passes.parity import assert_parity, difference
from surgery import Budget, Keep, Tucker
from surgery.onnx_files import OnnxHost, check
from tests.networks import Kinds, Small

X = torch.randn(2, 3, 12, 12, generator=torch.Generator().manual_seed(7))
EVERYTHING = {"re:.*": 1.0}


@pytest.fixture(scope="module", params=["dynamo", "torchscript"])
def small_file(request, tmp_path_factory):
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("onnx") / f"{request.param}.onnx"
    surgery.export_onnx(Small().eval(), path, X, dynamic_batch=True, exporter=request.param)
    return path


@pytest.fixture(scope="module")
def one_file(tmp_path_factory):
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("onnx") / "small.onnx"
    surgery.export_onnx(Small().eval(), path, X, dynamic_batch=True, exporter="torchscript")
    return path


def run(model, x=X):
    content = model.SerializeToString() if isinstance(model, onnx.ModelProto) else model.read_bytes()
    session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
    return [torch.from_numpy(y) for y in session.run(None, {session.get_inputs()[0].name: x.numpy()})]


def weights(model):
    return {tensor.name: tuple(tensor.dims) for tensor in model.graph.initializer}


def convolution_macs(path, size):
    """By shape inference, from the shapes of outputs and weights alone."""
    model = onnx.load(path)
    for dim, n in zip(model.graph.input[0].type.tensor_type.shape.dim, size, strict=True):
        dim.dim_value = n
    del model.graph.value_info[:]
    shapes = {v.name: [d.dim_value for d in v.type.tensor_type.shape.dim] for v in onnx.shape_inference.infer_shapes(model).graph.value_info}
    held = weights(model)
    return sum(prod(shapes[node.output[0]]) * prod(held[node.input[1]][1:]) for node in model.graph.node if node.op_type == "Conv")


def test_there_and_back(small_file, tmp_path):
    before = small_file.read_bytes()
    done = surgery.decompose_onnx(small_file, tmp_path / "cut.onnx", {"re:.*": 1.0, "head": 1.0})
    assert small_file.read_bytes() == before
    assert done.difference < 1e-4
    assert done.rounding < 1e-5
    assert done.size_bytes == (tmp_path / "cut.onnx").stat().st_size
    assert [row.name for row in done.report.layers if row.status == "decomposed"] == ["conv1", "conv2", "mix", "tail.1", "head"]
    assert "depthwise" in done.report["wide"].reason
    assert_parity(run(tmp_path / "cut.onnx"), run(small_file))
    names = [node.name for node in onnx.load(tmp_path / "cut.onnx").graph.node]
    assert [f"conv2.{part}" for part in ("reduce", "core", "expand")] == [name for name in names if name.startswith("conv2")]
    plan = surgery.exported_plan(tmp_path / "cut.onnx")
    assert plan["conv2"] == Tucker(24, 16)
    assert surgery.report_onnx(tmp_path / "cut.onnx").to_data() == done.report.to_data()

    back = surgery.reconstruct_onnx(tmp_path / "cut.onnx", tmp_path / "back.onnx")
    assert back.rounding < 1e-5
    assert back.report.passes == ("Decompose", "Reconstruct")
    restored, original = onnx.load(tmp_path / "back.onnx"), onnx.load(small_file)
    assert [(n.name, n.op_type) for n in restored.graph.node] == [(n.name, n.op_type) for n in original.graph.node]
    assert weights(restored) == weights(original)
    assert_parity(run(tmp_path / "back.onnx"), run(small_file))


def test_numbers_are_those_of_the_network_itself(small_file, tmp_path):
    torch.manual_seed(0)
    net = surgery.decompose(Small().eval(), 0.5, example_inputs=X[:1])
    done = surgery.decompose_onnx(small_file, tmp_path / "cut.onnx", 0.5)
    ours, theirs = done.report, surgery.report(net)
    assert [(r.name, r.ranks, r.macs_before, r.macs_after) for r in ours.layers] == [
        (r.name, r.ranks, r.macs_before, r.macs_after) for r in theirs.layers
    ]
    assert (ours.macs_before, ours.macs_after) == (theirs.macs_before, theirs.macs_after)
    assert done.difference > 1e-3
    if "torchscript" in small_file.name:  # the other exporter folds batch norms, so that weights are others
        assert_parity(run(tmp_path / "cut.onnx"), [net(X)])


@pytest.fixture(scope="module")
def kinds_model(tmp_path_factory):
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("onnx") / "kinds.onnx"
    surgery.export_onnx(Kinds().eval(), path, torch.randn(2, 3, 6, 8), exporter="dynamo")
    return onnx.load(path)


@pytest.mark.parametrize("kind", KINDS, ids=[k.name for k in KINDS])
def test_every_kind_on_every_layer_there_and_back(kind, kinds_model):
    """The contract of passes, as on the other hosts: one, two and three dimensions, grouped, transposed, dilated."""
    x = torch.randn(2, 3, 6, 8)
    model = onnx.ModelProto()
    model.CopyFrom(kinds_model)
    expected = run(model, x)

    def assigned():
        found = {}
        for site in OnnxHost(model).sites():
            mine = usual_kind(site.geometry, kind.name)
            if mine.refuses(site.geometry) is None:
                ranks = mine.full_ranks(site.geometry) if mine.has_spectra else [3 * mine.unit(site.geometry)]
                found[site.name] = mine.from_ranks(site.geometry, ranks)
        return found

    factorizations = assigned()
    host = OnnxHost(model)
    result = Decompose(assignment=factorizations)(host)
    assert {o.site for o in result.outcomes if o.status == "applied"} >= (
        {"mix"} if kind.name == "svd" else {"grouped", "up", "both", "mix", "space"}
    )
    assert {site.name: site.chain for site in host.sites() if site.chain is not None} == factorizations
    cut = run(model, x)
    if kind.has_spectra:
        assert_parity(cut, expected, tolerance=1e-4)
    assert not Decompose(assignment=factorizations)(OnnxHost(model)).modified
    onnx.checker.check_model(model)
    Reconstruct()(OnnxHost(model))
    assert_parity(run(model, x), cut, tolerance=1e-4)
    assert not Reconstruct()(OnnxHost(model)).modified
    assert weights(model) == weights(kinds_model)


def test_chains_of_an_exported_network_are_found_and_fused(tmp_path):
    torch.manual_seed(0)
    net = surgery.decompose(Small().eval(), 0.5, example_inputs=X)
    surgery.export_onnx(net, tmp_path / "net.onnx", X, exporter="torchscript")
    found = surgery.report_onnx(tmp_path / "net.onnx")
    assert {r.name: r.ranks for r in found.layers} == {r.name: r.ranks for r in surgery.report(net).layers}
    assert found.macs_after == surgery.report(net).macs_after
    surgery.reconstruct_onnx(tmp_path / "net.onnx", tmp_path / "back.onnx")
    assert weights(onnx.load(tmp_path / "back.onnx"))["conv2.weight"] == (24, 16, 3, 3)
    assert_parity(run(tmp_path / "back.onnx"), [net(X)])


def test_a_chain_is_cut_again_by_name(one_file, tmp_path):
    surgery.decompose_onnx(one_file, tmp_path / "a.onnx", {"conv2": (12, 8)})
    done = surgery.decompose_onnx(tmp_path / "a.onnx", tmp_path / "b.onnx", {"conv2": (6, 8)})
    assert done.report["conv2"].ranks == (6, 8)
    with pytest.raises(SurgeryValueError, match="chain's own rank"):
        surgery.decompose_onnx(tmp_path / "b.onnx", tmp_path / "c.onnx", {"conv2": (12, 8)})
    assert surgery.decompose_onnx(tmp_path / "b.onnx", tmp_path / "c.onnx", 0.5).report["conv2"].ranks == (6, 8)
    surgery.reconstruct_onnx(tmp_path / "b.onnx", tmp_path / "b.onnx")
    assert weights(onnx.load(tmp_path / "b.onnx")) == weights(onnx.load(one_file))


@pytest.mark.parametrize("share", [0.6, 0.85])
def test_a_budget_of_macs_holds_in_the_written_file(one_file, tmp_path, share):
    x = numpy.zeros((2, 3, 12, 12), dtype=numpy.float32)
    done = surgery.decompose_onnx(one_file, tmp_path / "cut.onnx", Budget(macs=share), example_inputs=x, method="auto")
    before, after = convolution_macs(one_file, x.shape), convolution_macs(tmp_path / "cut.onnx", x.shape)
    assert 0 < after <= share * before
    assert done.report.macs_before - done.report.macs_after == before - after


def test_other_budgets(one_file, tmp_path):
    done = surgery.decompose_onnx(one_file, tmp_path / "cut.onnx", Budget(params=0.7))
    assert done.report.params_after <= 0.7 * done.report.params_before
    held = sum(prod(t.dims) for t in onnx.load(tmp_path / "cut.onnx").graph.initializer if t.data_type == onnx.TensorProto.FLOAT)
    assert held == done.report.params_after
    done = surgery.decompose_onnx(one_file, tmp_path / "cut.onnx", Budget(max_error=0.3))
    errors = [row.error or 0.0 for row in done.report.layers if row.name in ("conv1", "conv2", "mix", "tail.1")]
    assert 0 < (sum(e * e for e in errors) / len(errors)) ** 0.5 <= 0.3
    with pytest.raises(SurgeryValueError, match="time is not measured"):
        surgery.decompose_onnx(one_file, tmp_path / "x.onnx", Budget(latency=0.7))


def test_a_plan_is_made_edited_and_replayed(one_file, tmp_path):
    plan = surgery.plan_onnx(one_file, 0.5, round_to=4)
    assert list(plan) == ["conv1", "conv2", "mix", "wide", "tail.1", "head"]
    plan["conv1"] = Keep("first layer")
    plan["tail.1"] = Tucker(8, 8)
    plan.save(tmp_path / "plan.json")
    done = surgery.decompose_onnx(one_file, tmp_path / "cut.onnx", str(tmp_path / "plan.json"))
    assert done.report["conv1"].reason == "first layer"
    assert done.report["tail.1"].ranks == (8, 8)
    assert surgery.exported_plan(tmp_path / "cut.onnx")["tail.1"] == Tucker(8, 8)


def test_in_place_on_the_same_path(one_file, tmp_path):
    path = tmp_path / "net.onnx"
    path.write_bytes(one_file.read_bytes())
    surgery.decompose_onnx(path, path, EVERYTHING)
    surgery.reconstruct_onnx(path, path)
    assert [p.name for p in tmp_path.iterdir()] == ["net.onnx"]
    assert_parity(run(path), run(one_file))


def test_what_fails_leaves_no_file(one_file, tmp_path, monkeypatch):
    out = tmp_path / "cut.onnx"
    with pytest.raises(SurgeryValueError, match="did you mean 'conv1'"):
        surgery.decompose_onnx(one_file, out, {"conv11": (2, 2)})
    with pytest.raises(SurgeryValueError, match="no chain that surgery made"):
        surgery.reconstruct_onnx(one_file, out)
    with pytest.raises(SurgeryValueError, match="12 x 13, the file takes"):
        surgery.decompose_onnx(one_file, out, 0.5, example_inputs=torch.zeros(1, 3, 12, 13))
    with pytest.raises(SurgeryValueError, match="does not exist; make it"):
        surgery.decompose_onnx(one_file, tmp_path / "no" / "cut.onnx", 0.5)
    (tmp_path / "text.onnx").write_text("no network at all")
    with pytest.raises(SurgeryValueError, match="no ONNX file"):
        surgery.decompose_onnx(tmp_path / "text.onnx", out, 0.5)
    with pytest.raises(FileNotFoundError):
        surgery.decompose_onnx(tmp_path / "absent.onnx", out, 0.5)
    good = check.merged_copy

    def wrong(model):
        merged = good(model)
        tensor = next(t for t in merged.graph.initializer if t.name == "conv2.weight")
        tensor.CopyFrom(numpy_helper.from_array(1.01 * numpy_helper.to_array(tensor), tensor.name))
        return merged

    monkeypatch.setattr("surgery.onnx_files.verbs.merged_copy", wrong)
    with pytest.raises(ParityError, match="chains merged"):
        surgery.decompose_onnx(one_file, out, EVERYTHING)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["text.onnx"]


def test_an_error_in_the_middle_leaves_the_model_as_it_was(kinds_model, monkeypatch):
    model = onnx.ModelProto()
    model.CopyFrom(kinds_model)
    host = OnnxHost(model)
    assignment = {"grouped": Tucker(4, 4), "up": Tucker(4, 4)}
    with monkeypatch.context() as patched:
        patched.setattr("surgery.onnx_files.host.write_plan", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            Decompose(assignment=assignment)(host)
    assert model == kinds_model
    host = OnnxHost(model)
    Decompose(assignment=assignment)(host)
    assert difference(run(model, torch.ones(2, 3, 6, 8)), run(kinds_model, torch.ones(2, 3, 6, 8))) > 1e-4
    host.rollback()
    assert [n.name for n in model.graph.node] == [n.name for n in kinds_model.graph.node]
    assert weights(model) == weights(kinds_model)
    assert [site.chain for site in host.sites()] == [None] * len(host.sites())


def test_clean_up_passes_say_that_they_are_not_for_files(kinds_model):
    import passes

    with pytest.raises(SurgeryError, match="not on ONNX files"):
        passes.FoldBatchNorm()(OnnxHost(kinds_model))
