"""Networks by name, their weights, and the bundled network's accuracy on real pictures."""

from __future__ import annotations

import io
import sys

import numpy as np
import pytest
import torch
from torch import nn

import surgery
from passes.parity import assert_parity
from surgery.zoo import BUNDLED, load_weights, make
from surgery.zoo.densenet_cifar import CifarDenseNet
from surgery.zoo.resnet_cifar import resnet20
from surgery.zoo.vgg_cifar import vgg19
from tests.conftest import ROOT, data

sys.path.insert(0, str(ROOT / "benchmarks"))
import cifar10


def real_images(count):
    from PIL import Image

    pixels = np.asarray(Image.open(data("cifar10/test_00.webp")).convert("RGB"))
    tiles = pixels.reshape(40, 32, 25, 32, 3).transpose(0, 2, 4, 1, 3).reshape(1000, 3, 32, 32)
    labels = np.frombuffer(data("cifar10/labels_test.u8").read_bytes(), dtype=np.uint8)[:1000]
    return cifar10.normalise(torch.from_numpy(tiles[:count].copy())), torch.from_numpy(labels[:count].astype(np.int64))


def top1(model, images, labels):
    with torch.inference_mode():
        return 100 * float((model(images).argmax(1) == labels).double().mean())


def test_the_bundled_network_sees_what_is_on_real_pictures():
    images, labels = real_images(1000)
    model, shape = make("surgery:resnet20")
    assert shape == (1, 3, 32, 32)
    assert not model.training
    whole = top1(model, images, labels)
    assert whole >= 88.0  # 90.5 on all 10,000; three standard errors of 1,000 pictures are 2.8
    back = surgery.reconstruct(surgery.decompose(model, {"re:.*": 1.0}))
    assert abs(top1(back, images, labels) - whole) <= 0.2


def test_weights_of_others_load(tmp_path):
    model = resnet20()
    load_weights(model, data("weights/resnet20-12fca82f.th"))
    images, labels = real_images(500)
    assert top1(model.eval(), images, labels) > 88


def test_state_dicts_in_their_usual_wrappings(tmp_path):
    from safetensors.torch import save_file

    source = resnet20().eval()
    state = source.state_dict()
    forms = {
        "plain.pt": state,
        "wrapped.pt": {"state_dict": state, "epoch": 3},
        "parallel.pt": {"model": {f"module.{k}": v for k, v in state.items()}},
    }
    for name, content in forms.items():
        torch.save(content, tmp_path / name)
    save_file(state, tmp_path / "plain.safetensors")
    x = torch.randn(1, 3, 32, 32)
    for file in tmp_path.iterdir():
        model = resnet20().eval()
        load_weights(model, file)
        assert_parity(model(x), source(x))


def test_files_that_hold_no_weights(tmp_path):
    buffer = io.BytesIO()
    torch.save(nn.Linear(2, 2), buffer)  # a pickled module: never executed
    for name, content in (("module.pt", buffer.getvalue()), ("text.pt", b"hello"), ("text.safetensors", b"hello")):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(surgery.SurgeryValueError, match=name):
            load_weights(resnet20(), tmp_path / name)
    torch.save([1], tmp_path / "list.pt")
    with pytest.raises(surgery.SurgeryValueError, match="holds a list"):
        load_weights(resnet20(), tmp_path / "list.pt")
    torch.save(nn.Linear(2, 2).state_dict(), tmp_path / "other.pt")
    with pytest.raises(surgery.SurgeryValueError, match="does not fit CifarResNet"):
        load_weights(resnet20(), tmp_path / "other.pt")


def test_a_factory_in_a_module(tmp_path, monkeypatch):
    (tmp_path / "my_networks.py").write_text("from torch import nn\ndef build():\n    return nn.Sequential(nn.Conv2d(3, 8, 3))\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", ["", *sys.path])
    model, _ = make("my_networks:build")
    assert isinstance(model[0], nn.Conv2d)


@pytest.mark.parametrize("name", ["torchvision:resnet18", "timm:resnet10t"])
def test_networks_of_others(name):
    try:
        model, _ = make(name)
    except surgery.MissingExtra as error:
        pytest.skip(str(error))
    x = torch.randn(1, 3, 64, 64)
    net = surgery.decompose(model, {"re:.*": 1.0}, example_inputs=x)
    assert_parity(net(x), model(x))
    traced = surgery.trace(model, x)
    from passes.graph_view import same_graph

    assert same_graph(surgery.reconstruct(surgery.decompose(traced, 0.5)), traced)


def test_parameters_are_those_of_the_published_networks():
    published = {"resnet20": 269_722, "resnet56": 853_018, "vgg19": 20_035_018, "densenet40": 1_059_298, "vgg19_quarter": 1_255_546}
    assert set(published) == set(BUNDLED)
    for name, count in published.items():
        assert sum(p.numel() for p in make(f"surgery:{name}")[0].parameters()) == count, name


@pytest.mark.parametrize(("make_it", "cut"), [(lambda: vgg19(7, width=1 / 16), 16), (lambda: CifarDenseNet(13, 6, 7), 12)], ids=["vgg", "densenet"])
def test_cifar_networks_give_logits_and_are_cut_and_fused_back(make_it, cut):
    torch.manual_seed(0)
    model, x = make_it().eval(), torch.randn(2, 3, 32, 32)
    assert model(x).shape == (2, 7)
    net = surgery.decompose(model, {"re:.*": 1.0}, example_inputs=x)
    assert sum(row.status == "decomposed" for row in surgery.report(net).layers) == cut
    assert_parity(net(x), model(x))
    assert_parity(surgery.reconstruct(net)(x), model(x))


def test_sizes_that_cifar_networks_cannot_have():
    with pytest.raises(surgery.SurgeryValueError, match="width"):
        vgg19(width=0)
    with pytest.raises(surgery.SurgeryValueError, match="3 n"):
        CifarDenseNet(41, 12)


def test_names_that_mean_nothing():
    for name, message in (
        ("torchvision:resnet19", "did you mean"),
        ("timm:resnet19q", "timm has no such network"),
        ("resnet18", "expected torchvision:NAME"),
    ):
        with pytest.raises((surgery.SurgeryValueError, surgery.MissingExtra), match=message):
            make(name)


def test_a_saved_folder_is_a_name(tmp_path):
    model, shape = make("surgery:resnet20")
    net = surgery.decompose(model, 0.5)
    surgery.save(net, tmp_path / "net")
    loaded, same_shape = make(str(tmp_path / "net"))
    x = torch.randn(shape)
    assert same_shape == shape
    assert_parity(loaded(x), net(x), tolerance=0.0)
    surgery.save(nn.Sequential(nn.Conv2d(3, 4, 3)), tmp_path / "mine")
    with pytest.raises(surgery.SurgeryValueError, match=r"use surgery\.load"):
        make(str(tmp_path / "mine"))


def test_a_cut_learnt_from_pictures_keeps_what_one_by_weights_alone_loses():
    images, labels = real_images(1000)
    model = resnet20()
    load_weights(model, data("weights/resnet20-12fca82f.th"))
    options = {"ranks": surgery.Budget(macs=0.7), "example_inputs": images[:1]}
    blind = surgery.decompose(model.eval(), **options)
    aware = surgery.decompose(model, calibration=images[500:].split(125), **options)
    whole, lost, kept = (top1(net, images[:500], labels[:500]) for net in (model, blind, aware))
    assert kept >= whole - 5
    assert lost <= kept - 5
