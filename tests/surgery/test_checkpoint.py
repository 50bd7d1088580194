"""``save`` and ``load``: exact, atomic, without pickle, and with one clear error for everything that can be wrong with a folder."""

from __future__ import annotations

import argparse
import json
import os
import shutil
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import surgery
from passes.parity import difference
from surgery.checkpoint import PLAN_FILE, WEIGHTS_FILE, read_architecture
from surgery.cli.summary import _before
from surgery.record import read_record, write_record
from surgery.zoo import make
from tests.networks import Small, Twice

X = torch.randn(2, 3, 12, 12, generator=torch.Generator().manual_seed(41))


@pytest.fixture
def net(small):
    return surgery.decompose(small, {"re:conv.*": 0.5, "mix": 3, "head": 2}, example_inputs=X)


def test_round_trip(net, tmp_path):
    path = tmp_path / "net"
    surgery.save(net, path)
    assert {p.name for p in path.iterdir()} == {WEIGHTS_FILE, PLAN_FILE}
    fresh = Small().eval()
    state = {k: v.clone() for k, v in fresh.state_dict().items()}
    loaded = surgery.load(path, fresh)
    assert list(loaded.state_dict()) == list(net.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(loaded.state_dict().values(), net.state_dict().values(), strict=True))
    assert difference(loaded(X), net(X)) == 0.0
    assert surgery.report(loaded) == surgery.report(net)
    assert all(torch.equal(v, fresh.state_dict()[k]) for k, v in state.items())
    assert type(fresh.conv1) is nn.Conv2d
    back = surgery.reconstruct(loaded)
    assert difference(back(X), net(X)) < 1e-5


def test_the_plan_file_is_a_plan(net, tmp_path):
    surgery.save(net, tmp_path / "net")
    plan = surgery.Plan.load(tmp_path / "net" / PLAN_FILE)
    assert plan["mix"] == surgery.SVD(3)
    assert plan["tail.1"] == surgery.Keep("not named")
    assert surgery.plan(surgery.decompose(Small(), tmp_path / "net" / PLAN_FILE))["conv2"] == plan["conv2"]


def test_channels_last_half_precision_and_reconstructed(net, tmp_path):
    for number, model in enumerate((net.to(memory_format=torch.channels_last), surgery.reconstruct(net), Small())):
        surgery.save(model, tmp_path / str(number))
        assert difference(surgery.load(tmp_path / str(number), Small()).train(model.training)(X), model(X)) < 1e-6
    half = net.to(torch.bfloat16)
    surgery.save(half, tmp_path / "half")
    loaded = surgery.load(tmp_path / "half", Small().to(torch.bfloat16))
    assert loaded.conv1.core.weight.dtype == torch.bfloat16
    assert torch.equal(loaded.conv1.core.weight, half.conv1.core.weight)


def test_shared_modules_and_tied_parameters(tmp_path):
    model = Twice().eval()
    net = surgery.decompose(model, 0.5)
    net.other.expand.bias = net.conv.expand.bias
    surgery.save(net, tmp_path / "net")
    fresh = Twice().eval()
    fresh.other.bias = fresh.conv.bias
    loaded = surgery.load(tmp_path / "net", fresh)
    x = torch.randn(1, 8, 8, 8)
    assert loaded.conv is loaded.again
    assert loaded.other.expand.bias is loaded.conv.expand.bias
    assert difference(loaded(x), net(x)) == 0.0


def test_saving_replaces_an_earlier_checkpoint_whole(net, tmp_path, monkeypatch):
    path = tmp_path / "net"
    surgery.save(Small(), path)
    surgery.save(net, path)
    assert surgery.Plan.load(path / PLAN_FILE)["mix"] == surgery.SVD(3)
    before = {p.name: p.read_bytes() for p in path.iterdir()}
    real = os.rename

    def failing(source, target):
        if str(target) == str(path) and "old" not in str(source):
            raise OSError("disk full")
        real(source, target)

    monkeypatch.setattr("os.rename", failing)
    with pytest.raises(OSError, match="disk full"):
        surgery.save(Small(), path)
    assert {p.name: p.read_bytes() for p in path.iterdir()} == before
    assert [p.name for p in tmp_path.iterdir()] == ["net"]


def test_other_folders_and_files_are_not_overwritten(net, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    (tmp_path / "file").write_text("x")
    for name in ("mine", "file"):
        with pytest.raises(surgery.SurgeryValueError, match=r"not a folder written by surgery\.save"):
            surgery.save(net, tmp_path / name)
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "years of work"
    with pytest.raises(OSError, match="nowhere"):
        surgery.save(net, tmp_path / "nowhere" / "net")


def edited(path, change):
    plan = json.loads((path / PLAN_FILE).read_text())
    change(plan["sites"])
    (path / PLAN_FILE).write_text(json.dumps(plan))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda p: (p / PLAN_FILE).write_text("{"), "plan.json: plan: not JSON"),
        (lambda p: (p / WEIGHTS_FILE).write_bytes((p / WEIGHTS_FILE).read_bytes()[:-40]), "damaged or not a safetensors file"),
        (lambda p: (p / WEIGHTS_FILE).write_bytes(b"\x80\x04pickle"), "damaged or not a safetensors file"),
        (lambda p: (p / WEIGHTS_FILE).write_bytes(b""), "damaged or not a safetensors file"),
        (
            lambda p: edited(p, lambda s: s.pop("conv2")),
            "does not fit this Small with its plan: 2 keys are missing and 4 unexpected|1 keys are missing and 3 unexpected",
        ),
        (lambda p: edited(p, lambda s: s.update(conv9=s["conv1"])), "'conv9', which is no layer of this Small: did you mean"),
        (lambda p: edited(p, lambda s: s["conv2"].update(rank_out=5)), "'conv2.core.weight' has shape"),
        (lambda p: edited(p, lambda s: s["conv2"].update(rank_out=500)), "'conv2' cannot be Tucker.*above its full rank"),
        (lambda p: edited(p, lambda s: s.update(wide=s["conv2"])), "'wide' cannot be Tucker.*depthwise"),
    ],
)
def test_damaged_folders(net, tmp_path, damage, message):
    path = tmp_path / "net"
    surgery.save(net, path)
    damage(path)
    with pytest.raises(surgery.SurgeryValueError, match=message):
        surgery.load(path, Small())


def test_a_folder_for_another_architecture(net, tmp_path):
    surgery.save(net, tmp_path / "net")
    with pytest.raises(surgery.SurgeryValueError, match="which is no layer of this Twice"):
        surgery.load(tmp_path / "net", Twice())
    with pytest.raises(surgery.SurgeryValueError, match="already decomposed; give a fresh model"):
        surgery.load(tmp_path / "net", net)
    with pytest.raises(FileNotFoundError):
        surgery.load(tmp_path / "absent", Small())
    (tmp_path / "net" / WEIGHTS_FILE).unlink()
    with pytest.raises(FileNotFoundError):
        surgery.load(tmp_path / "net", Small())


@given(st.data())
def test_a_tampered_record_is_our_error(tmp_path_factory, data):
    from safetensors.torch import load_file, save_file

    path = tmp_path_factory.mktemp("tampered") / "net"
    surgery.save(nn.Sequential(nn.Conv2d(3, 4, 3)), path)
    values = st.none() | st.booleans() | st.integers() | st.text(max_size=3) | st.lists(st.integers(), max_size=2)
    record = data.draw(
        st.one_of(
            values,
            st.dictionaries(
                st.sampled_from(["sites", "passes", "macs", "input_shapes", "architecture"]), st.one_of(values, st.lists(values, max_size=2))
            ),
        )
    )
    save_file(load_file(path / WEIGHTS_FILE), path / WEIGHTS_FILE, {"surgery": json.dumps(record)})
    error = None
    try:
        surgery.report(surgery.load(path, nn.Sequential(nn.Conv2d(3, 4, 3))))
    except surgery.SurgeryValueError as caught:
        error = str(caught)
    assert error is None or "surgery record is damaged" in error
    shutil.rmtree(path)


def test_state_that_is_no_tensor_is_refused(tmp_path):
    class Odd(nn.Linear):
        def get_extra_state(self):
            return {"anything": 1}

        def set_extra_state(self, state):
            pass

    with pytest.raises(surgery.SurgeryTypeError, match="_extra_state: the state dict holds a dict"):
        surgery.save(nn.Sequential(Odd(2, 2)), tmp_path / "net")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("tensor", "kind"),
    [
        (torch.eye(3).to_sparse(), "sparse or nested"),
        (torch.eye(3, dtype=torch.complex128), "complex128"),
        (torch.quantize_per_tensor(torch.eye(3), 0.1, 0, torch.qint8), "quantized"),
    ],
    ids=["sparse", "complex", "quantized"],
)
def test_tensors_that_the_file_cannot_hold_are_named(tmp_path, tensor, kind):
    model = nn.Sequential(nn.Conv2d(3, 3, 3))
    model.register_buffer("graph", tensor)
    with pytest.raises(surgery.SurgeryTypeError, match=f"graph: a {kind} tensor cannot be kept in a safetensors file"):
        surgery.save(model, tmp_path / "net")
    assert list(tmp_path.iterdir()) == []


def test_a_record_names_nothing_that_is_run(net):
    write_record(net, replace(read_record(net), architecture="builtins:exit"))
    assert _before(argparse.Namespace(before=None, architecture=None), net) is None


def test_the_architecture_is_recorded_for_registry_names_only(net, tmp_path):
    surgery.save(net, tmp_path / "mine")
    assert read_architecture(tmp_path / "mine") is None
    model, _ = make("surgery:resnet56")
    surgery.save(surgery.decompose(model, 0.25), tmp_path / "named")
    assert read_architecture(tmp_path / "named") == "surgery:resnet56"


def test_a_state_dict_of_copies_cannot_be_filled_and_says_so(tmp_path):
    class Copies(nn.Sequential):
        def state_dict(self, *args, **kwargs):
            return {name: value.detach().clone() for name, value in super().state_dict(*args, **kwargs).items()}

    surgery.save(surgery.decompose(Copies(nn.Conv2d(8, 8, 3)), 0.25), tmp_path / "net")
    with pytest.raises(surgery.SurgeryValueError, match=r"gives a copy of '0\.reduce\.weight'"):
        surgery.load(tmp_path / "net", Copies(nn.Conv2d(8, 8, 3)))


def test_parameters_that_are_views_of_one_storage(tmp_path):
    net = surgery.decompose(Small(), 0.5)
    flat = torch.cat([p.detach().flatten() for p in net.parameters()])
    at = 0
    for parameter in net.parameters():
        parameter.data = flat[at : at + parameter.numel()].view(parameter.shape)
        at += parameter.numel()
    surgery.save(net, tmp_path / "net")
    loaded = surgery.load(tmp_path / "net", Small())
    assert all(torch.equal(a, b) for a, b in zip(loaded.state_dict().values(), net.state_dict().values(), strict=True))
    assert (tmp_path / "net" / WEIGHTS_FILE).stat().st_size < 2 * 4 * at


def test_a_model_without_numbers_cannot_be_saved(tmp_path):
    with torch.device("meta"):
        model = Small()
    with pytest.raises(surgery.SurgeryValueError, match=r"conv1\.weight: it is on the meta device"):
        surgery.save(model, tmp_path / "net")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("shape", [[], [2, 3], [2, 4, 12, 12], [-2, 3, 12, 12], [2, 3, 1, 1, 12, 12]])
def test_recorded_calls_that_no_layer_can_have(net, tmp_path, shape):
    from safetensors.torch import load_file, save_file

    path = tmp_path / "net"
    surgery.save(net, path)
    record = {"version": 1, "sites": [{"name": "conv1", "reason": None, "error": 0.1, "calls": [[shape, [2, 16, 12, 12]]]}]}
    save_file(load_file(path / WEIGHTS_FILE), path / WEIGHTS_FILE, {"surgery": json.dumps(record)})
    with pytest.raises(surgery.SurgeryValueError, match=r"record is damaged.*(cannot have been called with|expected a count)"):
        surgery.load(path, Small())


def test_what_is_loaded_in_inference_mode_can_be_trained(net, tmp_path):
    surgery.save(net, tmp_path / "net")
    with torch.inference_mode():
        loaded = surgery.load(tmp_path / "net", Small())
    loaded(X).sum().backward()
    assert all(p.grad is not None for p in loaded.parameters())


def test_a_fresh_model_without_numbers_cannot_be_filled(net, tmp_path):
    surgery.save(net, tmp_path / "net")
    with torch.device("meta"):
        fresh = Small()
    with pytest.raises(surgery.SurgeryValueError, match=r"on the meta device and cannot be filled; call fresh_model\.to_empty"):
        surgery.load(tmp_path / "net", fresh)


def test_saving_into_the_working_folder_and_through_a_link(net, tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "here")
    monkeypatch.chdir(tmp_path / "here")
    surgery.save(net, ".")
    monkeypatch.chdir(tmp_path)
    surgery.save(surgery.reconstruct(net), "link")
    assert (tmp_path / "link").is_symlink()
    assert surgery.report(surgery.load(tmp_path / "here", Small()))["conv2"].status == "kept"


def test_chains_that_were_changed_after_the_cut_are_not_saved(tmp_path):
    net = surgery.decompose(Small(), {"conv2": (8, 8)})
    surgery.save(net, tmp_path / "net")
    before = (tmp_path / "net" / "plan.json").read_bytes()
    nn.utils.prune.l1_unstructured(net.conv2.core, "weight", 0.3)
    with pytest.raises(surgery.SurgeryValueError, match=r"conv2: the layers of its chain were changed after the cut \(conv2.core.weight"):
        surgery.save(net, tmp_path / "net")
    assert (tmp_path / "net" / "plan.json").read_bytes() == before
    nn.utils.prune.remove(net.conv2.core, "weight")
    net.conv2.core.register_forward_hook(lambda *_: None)  # nothing that is saved
    surgery.save(net, tmp_path / "net")
    surgery.load(tmp_path / "net", Small())


def test_tensors_that_are_marked_as_conjugate_or_negative_are_saved_as_they_are(tmp_path):
    class Transforms(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 8, 3)
            self.register_buffer("inverse", torch.fft.fft(torch.eye(8)).conj())
            self.register_buffer("imaginary", torch.fft.fft(torch.eye(8)).conj().imag)

    net, fresh = Transforms(), Transforms()
    assert net.inverse.is_conj()
    assert net.imaginary.is_neg()
    fresh.inverse.zero_()
    surgery.save(net, tmp_path / "net")
    loaded = surgery.load(tmp_path / "net", fresh)
    assert torch.equal(loaded.inverse, net.inverse)
    assert torch.equal(loaded.imaginary, net.imaginary)


def test_graphs_with_layers_of_another_layout_are_saved(tmp_path):
    class ChannelsBehind(nn.Conv2d):
        def forward(self, x):
            return super().forward(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)

    x = torch.randn(2, 9, 9, 4)
    model = nn.Sequential(ChannelsBehind(4, 8, 3), nn.Flatten()).eval()
    net = surgery.decompose(surgery.trace(model, x), 0.5, example_inputs=x)
    assert surgery.report(net)["0"].status == "kept"
    surgery.save(net, tmp_path / "net")
    assert torch.equal(surgery.load(tmp_path / "net", surgery.trace(model, x))(x), net(x))


def test_a_factory_that_a_folder_names_is_never_imported(net, tmp_path, monkeypatch):
    (tmp_path / "harm.py").write_text("import pathlib\npathlib.Path(__file__).with_name('ran').touch()")
    monkeypatch.syspath_prepend(tmp_path)
    write_record(net, replace(read_record(net), architecture="harm:make"))
    surgery.save(net, tmp_path / "net")
    assert read_architecture(tmp_path / "net") == "harm:make"
    with pytest.raises(surgery.SurgeryValueError, match="does not say which registered network it is"):
        make(str(tmp_path / "net"))
    assert not (tmp_path / "ran").exists()
