"""``decompose`` and ``reconstruct`` as users call them: parity over dtypes, formats and modes, copies, and what is left alone."""

from __future__ import annotations

import copy
import gc
import sys

import pytest
import torch
from hypothesis import assume, given
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import surgery
from passes.geometry import Geometry
from passes.parity import TOLERANCE_TRAIN, assert_parity, difference
from passes.spectra import usable_weight
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
    assume(not Geometry.of(layer).is_depthwise)
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
    assert ruled["conv2"] == Tucker(12, 8)  # as it is
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


CUDA = pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"))


@pytest.mark.parametrize("device", ["cpu", CUDA])
def test_computing_on_a_named_device(small, device, monkeypatch):
    expected, seen = surgery.decompose(small, 0.5)(X), []
    for module in ("passes.spectra", "passes.decompose"):
        monkeypatch.setattr(f"{module}.usable_weight", lambda site, device=None: seen.append(str(device)) or usable_weight(site, device))
    net = surgery.decompose(small, 0.5, device=device)
    assert set(seen) == {device}
    assert {p.device.type for p in net.parameters()} == {"cpu"}
    assert difference(net(X), expected) <= (0.0 if device == "cpu" else 1e-4)


RULES = {"fraction": 0.25, "evbmf": "evbmf", "energy": "energy:0.5", "stable": "stable", "budget": surgery.Budget(params=0.7)}
RULES["own"] = lambda site, spectra: [1] * len(spectra)


@pytest.mark.parametrize("ranks", RULES.values(), ids=RULES)
def test_no_rule_and_no_budget_touches_a_chain(small, ranks):
    net = surgery.decompose(small, {"conv2": (12, 8)}, example_inputs=X)
    again = surgery.decompose(net, ranks, example_inputs=X)
    assert surgery.report(again)["conv2"] == surgery.report(net)["conv2"]
    assert all(torch.equal(a, b) for a, b in zip(again.conv2.parameters(), net.conv2.parameters(), strict=True))


class Drops(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)

    def forward(self, x):
        return nn.functional.dropout(self.bn(self.conv(x)), 0.5, self.training)


@pytest.mark.parametrize("training", [False, True])
def test_a_cut_made_in_one_mode_is_right_in_the_other(training):
    model, outputs = Drops().train(training), []
    net = surgery.decompose(model, {"conv": 1.0}, example_inputs=X)
    for network in (net, model):
        torch.manual_seed(4)
        outputs.append(network.train(not training)(X))
    assert_parity(*outputs, training=True)


@pytest.mark.parametrize("inplace", [False, True])
def test_what_is_made_in_inference_mode_can_be_trained(small, inplace):
    with torch.inference_mode():
        net = surgery.decompose(small, 0.5, example_inputs=X, inplace=inplace)
        back = surgery.reconstruct(net)
    for model in (net, back):
        model(X).sum().backward()
        assert all(p.grad is not None for p in model.parameters())


def test_a_chain_is_cut_again_at_most_to_its_own_ranks(small):
    net = surgery.decompose(small, {"conv2": (12, 8), "mix": 10})
    with pytest.raises(surgery.SurgeryValueError, match=r"'conv2' cannot be cut as asked: rank 13 of mode 'out' is above the chain's own rank 12"):
        surgery.decompose(net, {"conv2": (13, 8)})
    with pytest.raises(surgery.SurgeryValueError, match="'conv2' cannot be cut as asked: rank 9 of mode 'in' is above the chain's own rank 8"):
        surgery.decompose(net, Plan({"conv2": Tucker(4, 9)}))
    assert surgery.plan(net, {"conv2": 0.5, "mix": 0.5}) == surgery.plan(small, {"conv2": (6, 4), "mix": 5})
    assert surgery.plan(net, {"re:.*": 1.0})["conv2"] == Tucker(12, 8)
    assert surgery.report(surgery.decompose(net, {"conv2": 1.0})).passes == ("Decompose",)
    kept = surgery.decompose(net, {"conv2": (6, None)})
    assert surgery.report(kept)["conv2"].ranks == (6, 8)
    assert surgery.report(surgery.decompose(kept, {"conv2": (6, None)})) == surgery.report(kept)


@pytest.mark.parametrize("build", [copy.deepcopy, lambda model: surgery.trace(model, X)], ids=["module", "graph"])
@pytest.mark.parametrize("act", [lambda m: surgery.decompose(m, 0.25, inplace=True), lambda m: surgery.reconstruct(m, inplace=True)])
def test_an_interrupt_while_the_record_is_written_undoes_the_surgery(small, monkeypatch, build, act):
    model = build(surgery.decompose(small, {"conv1": (8, 2)}))
    expected, report = model(X), surgery.report(model)
    ids = {name: id(p) for name, p in model.named_parameters()}

    def interrupted(*arguments):
        raise KeyboardInterrupt

    for module in ("surgery.decompose", "surgery.reconstruct"):
        monkeypatch.setattr(sys.modules[module], "write_record", interrupted)
    with pytest.raises(KeyboardInterrupt):
        act(model)
    monkeypatch.undo()
    assert {name: id(p) for name, p in model.named_parameters()} == ids
    assert surgery.report(model) == report
    assert difference(model(X), expected) == 0.0


class Outer(nn.Module):
    def __init__(self, backbone):
        super().__init__()
        self.stem = nn.Conv2d(3, 3, 3, padding=1)
        self.backbone = backbone
        self.head = nn.Conv1d(1, 4, 3)

    def forward(self, x):
        return self.head(self.backbone(self.stem(x))[:, None])


@pytest.mark.parametrize("inplace", [False, True])
def test_a_decomposed_graph_inside_a_module(small, inplace):
    graph = surgery.trace(small, X)
    whole = Outer(copy.deepcopy(graph)).eval()
    model = copy.deepcopy(whole)
    model.backbone = surgery.decompose(graph, {"conv2": (12, 8), "mix": 10}, example_inputs=X)
    rows = surgery.report(model)
    assert [row.name for row in rows.layers if row.status == "decomposed"] == ["backbone.conv2", "backbone.mix"]
    assert "backbone.conv2.core" not in [row.name for row in rows.layers]
    assert rows["backbone.conv2"].error > 0
    expected = model(X)
    net = surgery.decompose(model, {"backbone.conv2": (6, 4), "backbone.tail.1": (8, 8), "head": 1.0}, example_inputs=X, inplace=inplace)
    assert (net is model) == inplace
    rows = surgery.report(net)
    assert {row.name for row in rows.layers if row.status == "decomposed"} == {"backbone.conv2", "backbone.mix", "backbone.tail.1", "head"}
    assert rows["backbone.conv2"].macs_before == 2 * 24 * 16 * 9 * 36
    with FlopCounterMode(display=False) as counter:
        got = net(X)
    assert rows.macs_after == counter.get_total_flops() // 2
    assert difference(got, expected) > 1e-4
    back = surgery.reconstruct(net)
    assert_parity(back(X), got)
    assert list(back.state_dict()) == list(whole.state_dict())
    assert surgery.plan(net, 0.5)["backbone.conv2"] == Tucker(6, 4)


def test_tracing_a_module_with_a_decomposed_graph_inside(small):
    model = Outer(surgery.decompose(surgery.trace(small, X), {"conv2": (12, 8)}, example_inputs=X)).eval()
    traced = surgery.trace(model, X)
    assert surgery.report(traced)["backbone.conv2"].ranks == (12, 8)
    back = surgery.reconstruct(traced)
    assert "backbone.conv2.weight" in back.state_dict()
    assert_parity(back(X), model(X))


@pytest.mark.parametrize("first", ["graph", "alias"])
def test_a_layer_shared_with_a_decomposed_graph_is_kept(small, first):
    graph = surgery.decompose(surgery.trace(small, X), {"conv2": (12, 8)}, example_inputs=X)

    class Sharing(nn.Module):
        def __init__(self):
            super().__init__()
            if first == "alias":
                self.alias = graph.get_submodule("mix")
            self.graph = graph
            self.alias = graph.get_submodule("mix")
            self.part = graph.get_submodule("conv2.reduce")

        def forward(self, x):
            return self.graph(x) + self.alias(torch.ones(1, 24, 2, 2)).mean()

    model = Sharing().eval()
    net = surgery.decompose(model, {"re:.*": 0.5}, example_inputs=X)
    rows = surgery.report(net)
    assert sum(row.params_before for row in rows.layers) == sum(row.params_before for row in surgery.report(model).layers)
    kept = {row.name: row.reason for row in rows.layers if row.status == "kept"}
    assert "both in a decomposed graph and outside" in kept["alias" if first == "alias" else "graph.mix"]
    assert net.alias is net.graph.get_submodule("mix")
    assert rows["graph.conv1"].status == "decomposed"
    back = surgery.reconstruct(net)
    assert list(back.state_dict()) == list(model.state_dict())  # conv2 stays a chain: its first layer is used elsewhere too
    assert_parity(back(X), net(X))


def test_a_graph_with_one_layer_under_two_names_gets_both_back(small):
    graph = surgery.trace(small, X)
    graph.add_submodule("again", graph.get_submodule("conv2"))
    keys = list(graph.state_dict())
    surgery.decompose(graph, {"conv2": 0.5}, inplace=True)
    assert {"again.core.weight", "conv2.core.weight"} <= set(graph.state_dict())
    surgery.reconstruct(graph, inplace=True)
    assert list(graph.state_dict()) == keys
    assert graph.get_submodule("again") is graph.get_submodule("conv2")


@pytest.mark.parametrize("build", [lambda m: m, lambda m: surgery.trace(m, torch.randn(1, 32, 20, 20))], ids=["module", "graph"])
def test_memory_of_a_layer_is_free_as_soon_as_its_chain_stands(build):
    """On a copy that nobody else holds, old layers must not be kept alive by anything; so surgery needs one copy of the model and no more."""
    model = build(nn.Sequential(*[nn.Conv2d(32, 32, 3, bias=False) for _ in range(6)]))
    alive = []

    def rule(site, spectra):
        gc.collect()
        alive.append(sum(type(o) is nn.Parameter and o.shape == (32, 32, 3, 3) for o in gc.get_objects()))
        return 4, 4

    net = surgery.decompose(model, rule)
    assert [count - alive[0] for count in alive] == [0, -1, -2, -3, -4, -5]
    assert len(surgery.report(net).layers) == 6


def test_progress_is_silent_without_a_terminal(small, capsys):
    surgery.decompose(small, 0.5, progress=True)
    assert capsys.readouterr() == ("", "")
