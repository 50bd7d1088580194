"""Exporters: what they write computes the same on another runtime, and a failure leaves nothing. What holds for every format is tried on each."""

from __future__ import annotations

import collections
import contextlib
import importlib.util
from collections import namedtuple
from dataclasses import dataclass
from functools import partial

import pytest
import torch
from torch import Tensor, nn

import surgery
from passes.errors import MissingExtra, ParityError, SurgeryError, SurgeryTypeError, SurgeryValueError
from surgery.export import common
from surgery.export.onnx import onnx_session, run_session
from tests.networks import Branching, Keyword, Kinds, Random, Twice, random_states

X = torch.randn(2, 3, 12, 12, generator=torch.Generator().manual_seed(51))
OPENVINO = pytest.mark.skipif(importlib.util.find_spec("openvino") is None, reason="needs openvino")
EXPORTS = {
    "onnx": ("net.onnx", partial(surgery.export_onnx, exporter="torchscript")),
    "torchscript": ("net.pt", surgery.export_torchscript),
    "program": ("net.pt2", surgery.export_program),
    "openvino": ("net.xml", partial(surgery.export_openvino, exporter="torchscript")),
}
EVERY = pytest.mark.parametrize("form", [pytest.param(form, marks=OPENVINO if form == "openvino" else ()) for form in EXPORTS])


def export(form, model, folder, inputs, **options):
    name, function = EXPORTS[form]
    return function(model, folder / name, inputs, **options)


@EVERY
@pytest.mark.parametrize("state", ["plain", "decomposed", "reconstructed", "trace", "deployed"])
def test_every_state_of_a_network_goes_out_with_its_plan(small, tmp_path, form, state):
    net = small if state == "plain" else surgery.decompose(small, {"re:conv.*": 0.5, "mix": 3})
    if state == "reconstructed":
        net = surgery.reconstruct(net)
    elif state != "plain":
        net = {"decomposed": lambda: net, "trace": lambda: surgery.trace(net, X), "deployed": lambda: surgery.deploy(net, X)}[state]()
    report = export(form, net.train(), tmp_path, X)
    assert report.difference < 1e-5
    assert report.checked_shapes == (((2, 3, 12, 12),),)
    assert report.size_bytes == sum(p.stat().st_size for p in tmp_path.iterdir())
    assert str(report).startswith(f"{report.path}: {report.format}, ")
    assert net.training  # exported from a copy in eval mode
    found = surgery.exported_plan(report.path)
    assert {name: None if isinstance(d, surgery.Keep) else d for name, d in found.items()} == {
        row.name: row.factorization for row in surgery.report(net).layers
    }
    if state == "decomposed":
        assert found["mix"] == surgery.SVD(3)


@EVERY
def test_open_dimensions_are_proved_on_two_sizes(small, tmp_path, form):
    report = export(form, surgery.decompose(small, 0.5), tmp_path, X[:1], dynamic_batch=True, dynamic_size=True)
    assert report.inputs == ("x: batch x 3 x height x width",)
    (first,), (second,) = report.checked_shapes
    assert first == (3, 3, 12, 12)
    assert (second[0], second[1]) == (1, 3)
    assert second[2] != second[3]
    assert 12 not in second
    assert report.batch_sizes == (3, 1)


@pytest.mark.parametrize("form", ["torchscript", "program"])
def test_files_are_called_as_the_model_is(tmp_path, form):
    inputs = {"gain": torch.ones(1), "sound": torch.randn(2, 4, 20)}
    net = surgery.decompose(Keyword().eval(), {"conv": 0.5})
    path = export(form, net, tmp_path, inputs).path
    loaded = torch.jit.load(path) if form == "torchscript" else torch.export.load(path).module()
    got = loaded(**inputs)
    assert list(got) == ["sound", "total"]
    assert torch.allclose(got["sound"], net(**inputs)["sound"], atol=1e-6)


Two = namedtuple("Two", "one other")


@dataclass
class Named:
    one: Tensor
    other: Tensor


class Structured(nn.Module):
    """Takes tensors in containers, and constants; gives what it is told to."""

    def __init__(self, output="tuple"):
        super().__init__()
        self.conv, self.output = nn.Conv2d(3, 4, 3, padding=1), output

    def forward(self, pair, *others, scale=1.0):
        a, b = self.conv(pair["a"]) * scale, self.conv(pair["b"][0])
        b = b + sum(others)
        return {"tuple": (a, [b, None]), "namedtuple": Two(a, b), "dataclass": Named(a, b), "dict": {"deep": {"a": a}, "b": b, "n": 3}}[self.output]


@EVERY
@pytest.mark.parametrize("output", ["tuple", "namedtuple", "dataclass", "dict"])
def test_structures_on_both_sides(tmp_path, form, output):
    x = torch.randn(2, 3, 8, 8)
    report = export(form, Structured(output).eval(), tmp_path, ({"b": [x], "a": x}, torch.ones(2, 4, 8, 8)), dynamic_batch=True)
    assert report.inputs == ("pair_b_0: batch x 3 x 8 x 8", "pair_a: batch x 3 x 8 x 8", "others_1: batch x 4 x 8 x 8")
    assert report.difference < 1e-5


@EVERY
def test_what_is_no_tensor_is_fixed_in_the_file(tmp_path, form):
    class Scaled(nn.Module):
        def forward(self, x, scale, mask=None, flag=False):
            return x * scale if mask is None and flag else x

    assert export(form, Scaled(), tmp_path, (X, 2.5, None, True)).difference < 1e-6
    assert export(form, Scaled(), tmp_path, {"scale": 2.5, "x": X, "flag": True}).difference < 1e-6


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
@EVERY
def test_other_dtypes_and_memory_formats(small, tmp_path, form, dtype):
    net = surgery.decompose(small.to(dtype=dtype, memory_format=torch.channels_last), {"conv2": 0.5})
    x = X.to(dtype=dtype, memory_format=torch.channels_last)
    if form == "onnx" and dtype != torch.float16:
        with pytest.raises(SurgeryError, match=r"onnxruntime cannot run .* it has no kernel for this dtype on the CPU; export a float32 copy"):
            export(form, net, tmp_path, x)
        assert export(form, net, tmp_path, x, check=False).difference is None
    else:
        assert export(form, net, tmp_path, x).difference <= {torch.float64: 1e-6}.get(dtype, 1e-2)


@EVERY
def test_layers_of_all_dimensions_and_shared_ones(tmp_path, form):
    layers = dict(Kinds().named_children())
    shapes = {name: (1, layer.in_channels, *(9,) * (layer.weight.ndim - 2)) for name, layer in layers.items()}
    for name, layer in layers.items():
        cut = surgery.decompose(nn.Sequential(layer).eval(), {"0": 0.5})
        assert export(form, cut, tmp_path, torch.randn(shapes[name])).difference < 1e-5, name
    twice = surgery.decompose(Twice().eval(), {"re:.*": 0.5})
    assert export(form, twice, tmp_path, torch.randn(1, 8, 8, 8)).difference < 1e-5


@EVERY
def test_a_failed_check_leaves_all_files_as_they_were(small, tmp_path, monkeypatch, form):
    monkeypatch.setattr(common, "TOLERANCE", dict.fromkeys(common.TOLERANCE, -1.0))
    before = {name: f"{name}, the one before" for name in (EXPORTS[form][0], "net.bin")}
    for name, text in before.items():
        (tmp_path / name).write_text(text)
    with pytest.raises(ParityError, match="and the network: outputs differ"):
        export(form, small, tmp_path, X)
    assert {p.name: p.read_text() for p in tmp_path.iterdir()} == before


def test_files_that_belong_together_move_together_or_not_at_all(tmp_path):
    (tmp_path / "net.bin").write_text("weights before")
    (tmp_path / "net.xml").mkdir()

    def write():
        with common.installed(tmp_path / "net.xml") as work:
            for name in ("net.xml", "net.bin", "net.aux"):
                (work.parent / name).write_text("new")

    with pytest.raises(OSError, match=r"net\.xml"):
        write()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["net.bin", "net.xml"]
    assert (tmp_path / "net.bin").read_text() == "weights before"


class Unexportable(nn.Module):
    def forward(self, x):
        return torch.from_numpy(x.numpy() + 1) if x.sum() > 1e9 else x * float(x.sum())


@pytest.mark.parametrize("form", ["torchscript", "onnx"])
def test_a_trace_that_depends_on_data_is_caught_by_the_check(tmp_path, form):
    with pytest.raises(ParityError, match="and the network"):
        export(form, Unexportable(), tmp_path, X)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("function", [surgery.export_program, surgery.export_onnx])
def test_branches_on_data_are_refused_and_not_traced_instead(tmp_path, capfd, function):
    with pytest.raises(SurgeryError, match=r"torch cannot export Branching to .*data-dependent") as caught:
        function(Branching().eval(), tmp_path / "net", X)
    assert ("would keep the one way that the example inputs take" in str(caught.value)) == (function is surgery.export_onnx)
    assert list(tmp_path.iterdir()) == []
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(("write", "name"), [(surgery.export_program, "net.pt2"), (surgery.export_onnx, "net.onnx")])
def test_a_size_that_is_one_can_be_open(tmp_path, write, name):
    model = nn.Sequential(nn.Embedding(10, 4), nn.Linear(4, 3)).eval()
    done = write(model, tmp_path / name, torch.zeros(1, 1, dtype=torch.long), dynamic_size={"input": [1]})
    assert len(done.checked_shapes) == 2
    assert done.exporter == "dynamo"


@pytest.mark.parametrize("ending", ["json", "pbtxt"])
def test_names_of_texts_are_no_names_of_onnx_files(small, tmp_path, ending):
    with pytest.raises(SurgeryValueError, match=rf"net.{ending}' would be read as .*by its ending; take a name that ends in .onnx"):
        surgery.export_onnx(small, tmp_path / f"net.{ending}", X)
    assert not list(tmp_path.iterdir())


def test_a_size_that_torch_fixes_is_refused(tmp_path):
    class Odd(nn.Module):
        def forward(self, x):
            return x * x.shape[2] if x.shape[2] != 12 else x.cumsum(2)

    class Stepwise(nn.Module):
        def forward(self, x):
            return torch.stack([x[:, :, i] for i in range(x.shape[2])])

    for net in (Odd(), Stepwise()):
        with pytest.raises(SurgeryError, match=r"with an open height: torch\.export fixed dimension 2 of 'x' at 12"):
            surgery.export_program(net, tmp_path / "net.pt2", X, dynamic_size=True)
    for net in (Odd(), Stepwise()):
        with pytest.raises(ParityError):
            surgery.export_torchscript(net, tmp_path / "net.pt", X, dynamic_size=True)
    assert list(tmp_path.iterdir()) == []


def test_a_network_that_does_not_agree_with_itself_is_told_so(tmp_path):
    with pytest.raises(ParityError, match=r"the network itself differs by .* from call to call"):
        surgery.export_torchscript(Random().eval(), tmp_path / "net.pt", X)


def test_interrupted(small, tmp_path, monkeypatch):
    monkeypatch.setattr("torch.jit.save", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        surgery.export_torchscript(small, tmp_path / "net.pt", X)
    assert list(tmp_path.iterdir()) == []


@EVERY
def test_wrong_arguments(small, tmp_path, form):
    name, _ = EXPORTS[form]
    with pytest.raises(SurgeryValueError, match="does not exist; make it first"):
        export(form, small, tmp_path / "nowhere", X)
    with pytest.raises(SurgeryValueError, match="example_inputs: Small fails on them"):
        export(form, small, tmp_path, X[:, :2])
    with pytest.raises(SurgeryValueError, match="they hold no tensor"):
        export(form, small, tmp_path, {"x": 3})
    with pytest.raises(SurgeryValueError, match=r"the output of Shape holds no tensor \(list\)"):
        export(form, Shape(), tmp_path, X)
    with pytest.raises(SurgeryValueError, match=r"dynamic_batch: the network takes a batch of 2, but not of [13] \(RuntimeError"):
        export(form, FixedBatch(), tmp_path, X, dynamic_batch=True)
    with pytest.raises(SurgeryValueError, match="dynamic_size: no input is named 'y'"):
        export(form, small, tmp_path, X, dynamic_size={"y": [2]})
    with pytest.raises(SurgeryValueError, match="'x' has the dimensions 0 to 3"):
        export(form, small, tmp_path, X, dynamic_size={"x": [4]})
    with pytest.raises(SurgeryValueError, match="'x' has the dimensions 0 to 3, got 2"):
        export(form, small, tmp_path, X, dynamic_size={"x": 2})
    with pytest.raises(SurgeryTypeError, match=r"expected an nn\.Module"):
        export(form, small.forward, tmp_path, X)
    (tmp_path / name).mkdir()
    with pytest.raises(SurgeryValueError, match="is a folder"):
        export(form, small, tmp_path, X)


class Shape(nn.Module):
    def forward(self, x):
        return list(x.shape)


class FixedBatch(nn.Module):
    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(2, 1, 1, 1))

    def forward(self, x):
        return torch.cat([x, self.scale.expand_as(x)])


@pytest.mark.parametrize(("form", "package"), [("onnx", "onnxruntime"), ("openvino", "openvino")])
def test_a_missing_extra_is_named(small, tmp_path, monkeypatch, form, package):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(MissingExtra, match=rf"needs {package}: pip install '\.\[(export|openvino)\]'"):
        export(form, small, tmp_path, X)
    with pytest.raises(MissingExtra, match="needs onnxscript"):
        export(form, small, tmp_path, X, exporter="dynamo")


@pytest.mark.parametrize("fails", [False, True])
@EVERY
def test_random_states_are_left_as_found(form, fails, tmp_path):
    net, before = Random(fails).eval(), random_states()
    with contextlib.suppress(SurgeryError):
        export(form, net, tmp_path, X)
    assert random_states() == before


@EVERY
def test_the_model_and_its_inputs_are_left_alone_also_in_inference_mode(small, tmp_path, form):
    state, x = {name: t.clone() for name, t in small.state_dict().items()}, X.clone().requires_grad_()
    hooks = {name: [module.__dict__ for module in (small, small.conv1)] for name in "ab"}
    with torch.inference_mode():
        export(form, small.train(), tmp_path, x)
    assert all(torch.equal(t, state[name]) for name, t in small.state_dict().items())
    assert all(p.requires_grad and not p.is_inference() for p in small.parameters())
    assert small.training
    assert not any(d["_forward_pre_hooks"] or d["_forward_hooks"] for d in hooks["a"])
    assert x.requires_grad
    assert torch.equal(x, X)


def test_wrong_parity_would_be_seen(small, tmp_path):
    """The check must be able to fail: another network's file does not pass for this one."""
    surgery.export_onnx(surgery.decompose(small, {"conv2": (1, 1)}), tmp_path / "other.onnx", X, exporter="torchscript")
    session = onnx_session(tmp_path / "other.onnx")
    with pytest.raises(ParityError):
        common.check_network(small, lambda inputs: run_session(session, inputs), X, (((2, 3, 12, 12),),), "onnxruntime and the network")


@OPENVINO
def test_operators_of_openvino_have_the_names_of_layers(small, tmp_path):
    export("openvino", surgery.decompose(small, {"conv2": 0.5}), tmp_path, X)
    text = (tmp_path / "net.xml").read_text()
    assert all(f'name="{name}' in text for name in ("conv2.reduce", "conv2.core", "conv2.expand", "mix", "wide"))
    assert str(tmp_path) not in text


class Several(nn.Module):
    """Gives a list, with a mapping and something of its own in it."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)

    def forward(self, x):
        y = self.conv(x)
        return [Scored({"y": y, 3: y + 1}), [y, (y * 2, None)]]


class Scored(collections.UserDict):
    pass


def test_programs_with_containers_that_torch_export_does_not_know(tmp_path):
    done = surgery.export_program(Several(), tmp_path / "net.pt2", torch.randn(1, 3, 8, 8))
    assert done.difference < 1e-5
    loaded = torch.export.load(tmp_path / "net.pt2").module()(torch.ones(1, 3, 8, 8))
    assert list(loaded[0]) == ["y", "3"]


def test_what_was_not_checked_says_so(tmp_path):
    done = surgery.export_onnx(Several().conv, tmp_path / "net.onnx", torch.randn(1, 3, 8, 8), exporter="torchscript", check=False)
    assert done.difference is None
    assert "not checked" in str(done)
    cut = surgery.decompose_onnx(tmp_path / "net.onnx", tmp_path / "cut.onnx", {"re:.*": 0.5}, check=False)
    assert "not checked" in str(cut)


class Beside(nn.Module):
    """Pictures, and a table that has as many rows as it is asked for, or two."""

    def __init__(self, two=False):
        super().__init__()
        self.conv, self.two = nn.Conv2d(3, 4, 3), two

    def forward(self, x, table):
        if self.two:
            torch._assert(table.shape[0] == 2, "two rows")
        return self.conv(x).mean((2, 3)) @ table.T


@EVERY
@pytest.mark.parametrize("two", [False, True])
def test_what_is_not_open_keeps_its_size_when_batches_are_tried(tmp_path, form, two):
    if form == "program" and two:
        pytest.skip("torch.export takes an assertion for a fact")
    inputs = torch.randn(1, 3, 8, 8), torch.randn(2, 4)
    report = export(form, Beside(two), tmp_path, inputs, dynamic_batch=True)
    assert report.checked_shapes[0] == ((3, 3, 8, 8), (2, 4))
    assert report.difference < 1e-5


class ByNumber(nn.Module):
    """Class numbers as floating-point numbers: noise is none."""

    def __init__(self):
        super().__init__()
        self.conv, self.names = nn.Conv2d(3, 4, 3), nn.Embedding(5, 4)

    def forward(self, image, ids):
        return self.conv(image) + self.names(ids.long())[..., None, None]


@EVERY
def test_open_sizes_are_tried_with_numbers_that_the_network_takes(tmp_path, form):
    for batch in (1, 2):
        inputs = torch.randn(batch, 3, 8, 8), torch.arange(batch).float() + 1
        assert export(form, ByNumber(), tmp_path, inputs, dynamic_batch=True).difference < 1e-5


def test_positional_inputs_beside_keywords_have_their_own_names():
    from surgery.export.inputs import input_names

    class Wrapper(nn.Module):
        def forward(self, first, *args, **kwargs):
            return first

    assert input_names(Wrapper(), (X, X, X)) == ("first", "args_1", "args_2")


def test_large_weights_of_the_older_exporter_are_one_file_with_the_name_of_the_network(tmp_path, monkeypatch):
    """It writes a file each, named alike whatever the network: the next one would take the weights of the first."""
    import onnx

    plain = torch.onnx.export

    def large(*args, **kwargs):
        plain(*args, **kwargs)
        onnx.save(onnx.load(args[2]), args[2], save_as_external_data=True, all_tensors_to_one_file=False, size_threshold=0)

    monkeypatch.setattr(torch.onnx, "export", large)
    nets = {}
    for name in ("before", "after"):
        nets[name] = nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 16, 3)).eval()
        surgery.export_onnx(nets[name], tmp_path / f"{name}.onnx", X, exporter="torchscript")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["after.onnx", "after.onnx.data", "before.onnx", "before.onnx.data"]
    for name, net in nets.items():
        (y,) = run_session(onnx_session(tmp_path / f"{name}.onnx"), X)
        torch.testing.assert_close(y, net(X).detach(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("flipped", "allowed"), [(3, True), (400, False)])
def test_few_labels_may_differ_where_scores_are_nearly_equal(flipped, allowed):
    class Labels(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 5, 3, padding=1)

        def forward(self, x):
            scores = self.conv(x)
            return {"labels": scores.argmax(1), "scores": scores}

    def rounded(x):
        found = net(x)
        found["labels"].view(-1)[:flipped] += 3
        return found

    net, shapes = Labels().eval(), (((1, 3, 64, 64),),)
    if allowed:
        assert common.check_network(net, rounded, torch.randn(1, 3, 64, 64), shapes, "the file and the network") == 3 / 4096
    else:
        with pytest.raises(ParityError, match=r"0.09\d+ of the entries of an integer output differ, the tolerance is 0.001; check=False"):
            common.check_network(net, rounded, torch.randn(1, 3, 64, 64), shapes, "the file and the network")


def test_gaps_tell_numbers_from_labels():
    scores, labels = torch.tensor([1.0, 2.0]), torch.tensor([1, 2, 3, 4])
    assert common.gaps([scores, labels], [scores, labels]) == (0.0, 0.0)
    assert common.gaps([scores * 1.5, labels.flip(0)], [scores, labels]) == (0.5, 1.0)
    assert common.gaps([labels != 2], [labels != 3]) == (0.0, 0.5)
    assert common.gaps([labels[:3]], [labels]) == (0.0, float("inf"))
    assert common.gaps([labels], [labels, scores]) == (float("inf"), float("inf"))
    assert common.gaps([torch.zeros(0).long()], [torch.zeros(0).long()]) == (0.0, 0.0)
