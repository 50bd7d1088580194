"""Surgery on what others have worked on: pruned, made aware of quantization, reparameterized. Cut, or kept with a reason."""

from __future__ import annotations

import copy
import importlib.util
import warnings

import pytest
import torch
from torch import nn

import surgery
from passes.parity import difference
from surgery.zoo import make
from tests.networks import Small

X = torch.randn(2, 3, 12, 12, generator=torch.Generator().manual_seed(31))


def round_trip(model, inputs, ranks):
    """Cut, compare at full rank, and fuse back."""
    model = model.eval()
    with torch.no_grad():
        expected = model(inputs)
        net = surgery.decompose(model, ranks, example_inputs=inputs)
        whole = surgery.decompose(model, dict.fromkeys([r.name for r in surgery.report(net).layers if r.status == "decomposed"], 1.0))
        torch.testing.assert_close(whole(inputs), expected, rtol=1e-3, atol=1e-4)
        back = surgery.reconstruct(net)
        torch.testing.assert_close(back(inputs), net(inputs), rtol=1e-3, atol=1e-4)
    assert list(back.state_dict()) == list(model.state_dict())
    return net


def test_a_network_pruned_by_torch_pruning_is_cut_at_its_new_widths():
    pruning = pytest.importorskip("torch_pruning")
    model = Small().eval()
    pruner = pruning.pruner.MagnitudePruner(
        model, X, importance=pruning.importance.MagnitudeImportance(p=2), pruning_ratio=0.5, ignored_layers=[model.head]
    )
    pruner.step()
    assert model.conv1.out_channels == 8
    net = round_trip(model, X, {"conv2": (4, 3), "tail.1": (5, 5)})
    report = surgery.report(net)
    assert report["conv2"].layer.startswith("Conv2d 8->12")
    assert report.params_after == sum(p.numel() for p in net.parameters())
    again = pruning.pruner.MagnitudePruner(
        net, X, importance=pruning.importance.MagnitudeImportance(p=2), pruning_ratio=0.25, ignored_layers=[net.head]
    )
    again.step()  # a chain is convolutions: it can be pruned in turn
    assert net(X).shape == (2, 5)


def quantization():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return pytest.importorskip("torch.ao.quantization")


def test_layers_that_pretend_to_be_quantized_are_kept_by_name_and_the_others_cut():
    quantize = quantization()
    model = Small().train()
    model.conv2.qconfig = quantize.get_default_qat_qconfig("fbgemm")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        quantize.prepare_qat(model, inplace=True)
    assert type(model.conv2) is not nn.Conv2d
    model.eval()
    net = surgery.decompose(model, {"re:conv.*": (4, 2)}, example_inputs=X)
    rows = surgery.report(net)
    assert rows["conv1"].status == "decomposed"
    assert rows["conv2"].status == "kept"
    assert rows["conv2"].reason
    with pytest.raises(surgery.SurgeryValueError, match="conv2"):
        surgery.decompose(model, {"conv2": (4, 2)})
    with torch.no_grad():
        assert net.conv2(torch.ones(1, 16, 6, 6)).equal(model.conv2(torch.ones(1, 16, 6, 6)))


def test_a_chain_is_made_aware_of_quantization_as_any_convolutions_are():
    quantize = quantization()
    net = surgery.decompose(Small(), {"conv2": (8, 4)}).train()
    net.conv2.qconfig = quantize.get_default_qat_qconfig("fbgemm")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        quantize.prepare_qat(net, inplace=True)
    assert net(X).shape == (2, 5)
    assert all(hasattr(layer, "weight_fake_quant") for layer in net.conv2)
    back = surgery.reconstruct(net)
    for network in (net, back):  # its layers are others now: it stays a chain
        assert surgery.report(network)["conv2"].status == "decomposed"
    torch.testing.assert_close(back.eval()(X), net.eval()(X), rtol=1e-3, atol=1e-4)


def test_quantized_layers_are_no_sites_and_stay():
    quantize = quantization()
    if "fbgemm" not in torch.backends.quantized.supported_engines:
        pytest.skip("needs the fbgemm engine")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = quantize.quantize_dynamic(Small().eval(), {nn.Linear})
    net = round_trip_of_state(model)
    assert type(net.head) is type(model.head)


def round_trip_of_state(model):
    net = surgery.decompose(model, {"conv2": (8, 4)}, example_inputs=X)
    assert surgery.report(net)["conv2"].status == "decomposed"
    assert net(X).shape == model(X).shape
    return net


def test_weights_that_torchao_quantized_stay_and_their_chains_are_left_alone(tmp_path):
    quantization = pytest.importorskip("torchao.quantization")
    model = Small().eval()
    quantization.quantize_(model, quantization.Int8WeightOnlyConfig())
    net = surgery.decompose(model, {"re:.*": 0.5}, example_inputs=X)
    assert surgery.report(net)["conv2"].status == "decomposed"
    assert surgery.report(net)["head"].status == "kept"
    with pytest.raises(surgery.SurgeryValueError, match=r"head.*Int8Tensor"):
        surgery.decompose(model, {"head": 3})
    cut = surgery.decompose(Small().eval(), {"head": 3, "conv2": (8, 4)})
    expected = cut(X)
    quantization.quantize_(cut, quantization.Int8WeightOnlyConfig())
    assert difference(cut(X), expected) < 0.05
    back = surgery.reconstruct(cut)
    assert surgery.report(back)["conv2"].status == "kept"
    assert type(back.head) is type(cut.head)
    assert back(X).allclose(cut(X), atol=1e-5)
    with pytest.raises(surgery.SurgeryTypeError, match=r"head\.\w+\.weight: a Int8Tensor"):
        surgery.save(cut, tmp_path / "net")


@pytest.mark.parametrize("name", ["mobileone_s1", "repvgg_a0"])
def test_reparameterized_networks_are_cut_before_and_after(name):
    if importlib.util.find_spec("timm") is None:
        pytest.skip("needs timm")
    torch.manual_seed(0)
    model = make(f"timm:{name}")[0].eval()
    from timm.utils.model import reparameterize_model  # after make, which sees to what timm imports

    inputs = torch.randn(1, 3, 32, 32)
    first = surgery.report(surgery.decompose(model, {}, example_inputs=inputs))
    branches = [r.name for r in first.layers if r.layer.startswith("Conv2d") and "groups" not in r.layer][3:5]
    net = surgery.decompose(model, dict.fromkeys(branches, 0.25), example_inputs=inputs)
    assert {surgery.report(net)[branch].status for branch in branches} == {"decomposed"}
    with torch.no_grad():
        merged = reparameterize_model(model)
        assert difference(merged(inputs), model(inputs)) < 1e-3
        layers = surgery.report(surgery.decompose(merged, {}, example_inputs=inputs)).layers
        wide = [r.name for r in layers if r.layer.startswith("Conv2d") and "groups" not in r.layer][1:3]
        cut = surgery.decompose(merged, dict.fromkeys(wide, 1.0), example_inputs=inputs)
        assert difference(cut(inputs), merged(inputs)) < 1e-3
    assert {surgery.report(cut)[each].status for each in wide} == {"decomposed"}
    with torch.no_grad():
        back = surgery.reconstruct(net)
        again = reparameterize_model(copy.deepcopy(back))  # fused back, the branches can still be merged
        assert difference(again(inputs), net(inputs)) < 1e-3
