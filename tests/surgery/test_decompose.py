"""``decompose`` and ``reconstruct`` as users call them: parity over dtypes, formats and modes, copies, and what is left alone."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given
from torch import nn

import surgery
from passes.parity import TOLERANCE_TRAIN, assert_parity, difference
from surgery import Chain, Plan, Tucker
from surgery.zoo import load_weights
from surgery.zoo.resnet_cifar import resnet56
from tests.conftest import data
from tests.geometries import layers
from tests.networks import Small, Twice

X = torch.randn(2, 3, 12, 12, generator=torch.Generator().manual_seed(21))
LAST = {4: torch.channels_last, 5: torch.channels_last_3d}
FORMATS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}


@given(drawn=layers())
def test_full_rank_of_any_layer_inside_a_model(drawn):
    layer, inputs = drawn
    model = nn.Sequential(layer)
    net = surgery.decompose(model, {"0": 1.0}, example_inputs=inputs)
    assert isinstance(net[0], Chain)
    assert_parity(net(inputs), model(inputs))
    back = surgery.reconstruct(net)
    assert_parity(back(inputs), net(inputs))
    assert type(back[0]) is type(layer)
    assert [(k, v.shape) for k, v in back.state_dict().items()] == [(k, v.shape) for k, v in model.state_dict().items()]
    if layer.weight.ndim in LAST:
        assert all(
            a.is_contiguous(memory_format=LAST[a.ndim])
            for a, b in zip(back.parameters(), model.parameters(), strict=True)
            if a.ndim in LAST and not b.is_contiguous()
        )


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("memory_format", FORMATS.values(), ids=FORMATS)
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_parity_of_full_rank_cuts_and_of_reconstruction(dtype, memory_format, training):
    model = Small().to(dtype=dtype, memory_format=memory_format).train(training)
    inputs = X.to(dtype=dtype, memory_format=memory_format)
    full = surgery.decompose(model, {"re:.*": 1.0})
    half = surgery.decompose(model, {"re:.*": 0.5})
    back = surgery.reconstruct(half)
    tolerance = TOLERANCE_TRAIN[dtype] if training else None
    with torch.no_grad():
        assert_parity(full(inputs), copy.deepcopy(model)(inputs), tolerance=tolerance)
        assert_parity(back(inputs), half(inputs), tolerance=tolerance)
    assert full.training == half.training == back.training == training


def test_training_through_a_full_rank_cut_has_the_same_loss_and_input_gradient():
    model = Small().double().train()
    net = surgery.decompose(model, {"re:.*": 1.0})
    gradients = []
    for network in (model, net):
        inputs = X.double().requires_grad_()
        loss = network(inputs).square().sum()
        loss.backward()
        gradients.append((loss.detach(), inputs.grad))
    assert_parity(gradients[1], gradients[0])


def test_resnet56_at_evbmf_has_a_row_for_every_convolution():
    model = resnet56().eval()
    load_weights(model, data("weights/resnet56-4bfd9763.th"))
    x = torch.randn(4, 3, 32, 32)
    net = surgery.decompose(model, ranks="evbmf", example_inputs=x)
    report = surgery.report(net)
    convs = [row for row in report.layers if row.layer.endswith(("3x3", "3x3/2"))]
    assert len(convs) == 55
    assert {row.status for row in convs} == {"decomposed"}
    assert len(report.layers) == 56
    back = surgery.reconstruct(net)
    assert_parity(back(x), net(x))
    resnet56().load_state_dict(back.state_dict(), strict=True)
    assert_parity(surgery.decompose(model, {"re:.*": 1.0})(x), model(x))


def test_the_model_is_left_alone_unless_inplace(small):
    before, ids = copy.deepcopy(small.state_dict()), [id(m) for m in small.modules()]
    net = surgery.decompose(small, 0.5, example_inputs=X)
    assert net is not small
    assert [id(m) for m in small.modules()] == ids
    assert all(torch.equal(v, small.state_dict()[k]) for k, v in before.items())
    assert "surgery_record" not in vars(small)
    same = surgery.decompose(small, 0.5, example_inputs=X, inplace=True)
    assert same is small
    assert difference(small(X), net(X)) == 0.0
    assert surgery.reconstruct(small, inplace=True) is small
    assert list(small.state_dict()) == list(before)


def test_class_forward_and_other_state_stay(small):
    small.note = {"mine": 1}
    net = surgery.decompose(small, 0.5)
    assert type(net) is Small
    assert net.note == {"mine": 1}
    assert net.note is not small.note
    assert not net.training


def test_state_dict_order_holds(small):
    net = surgery.decompose(small, 0.5)
    layers_in_order = list(dict.fromkeys(key.split(".")[0] for key in net.state_dict()))
    assert layers_in_order == list(dict.fromkeys(key.split(".")[0] for key in small.state_dict()))
    back = surgery.reconstruct(net)
    assert list(back.state_dict()) == list(small.state_dict())


def test_a_second_decompose_or_reconstruct_changes_nothing(small):
    net = surgery.decompose(small, 0.5, example_inputs=X)
    again = surgery.decompose(net, 0.5, example_inputs=X)
    assert surgery.report(again) == surgery.report(net)
    assert difference(again(X), net(X)) == 0.0
    replayed = surgery.decompose(net, surgery.plan(net))
    assert surgery.report(replayed).passes == ("Decompose",)
    back = surgery.reconstruct(net)
    twice = surgery.reconstruct(back)
    assert surgery.report(twice) == surgery.report(back)
    assert all(torch.equal(a, b) for a, b in zip(back.state_dict().values(), twice.state_dict().values(), strict=True))
    untouched = surgery.reconstruct(small)
    assert all(torch.equal(a, b) for a, b in zip(untouched.state_dict().values(), small.state_dict().values(), strict=True))


def test_a_chain_is_no_site_for_rules_but_can_be_cut_again_by_name(small):
    net = surgery.decompose(small, {"conv2": (12, 8)}, example_inputs=X)
    ruled = surgery.plan(net, 0.25)
    assert ruled["conv2"] == Tucker(12, 8)  # as it is; the report of a rule says "already decomposed"
    deeper = surgery.decompose(net, {"conv2": (4, 3)}, example_inputs=X)
    assert deeper.conv2.core.weight.shape == (4, 3, 3, 3)
    row = surgery.report(deeper)["conv2"]
    assert row.ranks == (4, 3)
    assert row.params_before == 24 * 16 * 9 + 24
    assert type(surgery.reconstruct(deeper).conv2) is nn.Conv2d


def test_replaying_a_plan_on_another_instance(small):
    plan = surgery.plan(small, 0.25, example_inputs=X)
    other = Small().eval()
    net = surgery.decompose(other, plan)
    assert surgery.plan(net) == plan
    for key, shape in {k: v.shape for k, v in surgery.decompose(small, plan).state_dict().items()}.items():
        assert net.state_dict()[key].shape == shape


def test_a_plan_may_be_given_as_a_file_and_edited(small, tmp_path):
    path = tmp_path / "plan.json"
    plan = surgery.plan(small, 0.25)
    plan["mix"] = surgery.Keep("needed whole")
    del plan["tail.1"]
    plan.save(path)
    for ranks in (str(path), path, Plan.load(path)):
        report = surgery.report(surgery.decompose(small, ranks))
        assert report["mix"].reason == "needed whole"
        assert report["tail.1"].reason == "not in the plan"
        assert report["conv2"].ranks == (6, 4)


def test_one_module_under_two_names_is_decided_once():
    model = Twice().eval()
    inputs = torch.randn(1, 8, 8, 8)
    net = surgery.decompose(model, 0.5, example_inputs=inputs)
    assert net.conv is net.again
    report = surgery.report(net)
    assert [row.name for row in report.layers] == ["conv", "other"]
    assert report["conv"].calls == 2
    assert report["conv"].macs_before == 9 * 8 * 8 * (64 + 16)
    assert surgery.decompose(model, {"again": (4, 4)}).conv.core.weight.shape == (4, 4, 3, 3)
    back = surgery.reconstruct(net)
    assert back.conv is back.again
    assert list(back.state_dict()) == list(model.state_dict())


def test_graph_modules_are_cut_node_for_node(small):
    traced = surgery.trace(small, X)
    net = surgery.decompose(traced, 0.5)
    assert "conv2.core" in {n.target for n in net.graph.nodes}
    assert "conv2" in {n.target for n in traced.graph.nodes}
    assert surgery.report(net)["conv2"].speedup == surgery.report(surgery.decompose(small, 0.5, example_inputs=X))["conv2"].speedup
    assert_parity(surgery.reconstruct(net)(X), net(X))


def test_a_submodule_may_be_decomposed_on_its_own(small):
    small.tail = surgery.decompose(small.tail, 0.25)
    assert surgery.report(small)["tail.1"].status == "decomposed"
    assert surgery.report(small)["tail.1"].error > 0
    net = surgery.decompose(small, 0.25, example_inputs=X)
    rows = surgery.report(net)
    assert rows["tail.1"].error == surgery.report(small)["tail.1"].error
    assert rows["conv2"].status == "decomposed"
    assert rows.macs_before == surgery.report(surgery.decompose(Small(), 0.25, example_inputs=X)).macs_before


def test_wrong_models():
    compiled = torch.compile(Small())
    for model, message in (
        (compiled, "compiled; do the surgery on model._orig_mod"),
        (nn.DataParallel(Small()), "wrapped in DataParallel; do the surgery on model.module"),
        (Small, "expected an nn.Module, got type"),
        ("resnet18", "expected an nn.Module, got str"),
    ):
        for act in (surgery.decompose, surgery.plan, surgery.reconstruct):
            with pytest.raises(surgery.SurgeryTypeError, match=message):
                act(model)


def test_a_model_without_layers():
    net = surgery.decompose(nn.Sequential(nn.ReLU()), example_inputs=X)
    report = surgery.report(net)
    assert (report.layers, report.params_before, report.compression) == ((), 0, 1.0)
    assert "0 of 0 layers" in str(report)


def test_computing_on_a_named_device(small):
    net = surgery.decompose(small, 0.5, device="cpu")
    assert difference(net(X), surgery.decompose(small, 0.5)(X)) == 0.0


def test_progress_is_silent_without_a_terminal(small, capsys):
    surgery.decompose(small, 0.5, progress=True)
    assert capsys.readouterr() == ("", "")
