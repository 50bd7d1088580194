"""``deploy`` and ``reconstruct(foreign=True)`` as users call them: the same function, honest reports, refusals, and the caller's model untouched."""

from __future__ import annotations

import contextlib
import copy

import pytest
import torch
from torch import fx, nn
from torch.utils.flop_counter import FlopCounterMode

import surgery
from passes.errors import SurgeryError, SurgeryTypeError, SurgeryValueError
from passes.parity import assert_parity, difference
from passes.running import run
from surgery.deployment import PASSES
from tests.networks import Branching, Keyword, Random, Small, random_states
from tests.passes.test_cleanup import Handmade, ReadsLayers, randomized

X = torch.randn(2, 3, 12, 12, generator=torch.Generator().manual_seed(61))


def macs_of(model, inputs=X):
    with FlopCounterMode(display=False) as counter:
        run(model, inputs)
    return counter.get_total_flops() // 2


def params_of(model):
    return sum(p.numel() for p in model.parameters())


def neighbours_net():
    """Two convolutions with nothing between them, so that their chains meet."""
    return randomized(
        nn.Sequential(
            nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 16, 3, bias=False), nn.BatchNorm2d(16), nn.ReLU(), nn.Dropout(), nn.Conv2d(16, 4, 1)
        )
    )


def cut(net):
    return surgery.decompose(net, {"0": (4, 2), "1": (4, 4)}, example_inputs=X)


NETWORKS = {
    "small": lambda: randomized(Small()),
    "by hand": lambda: randomized(Handmade()),
    "chains that meet": lambda: cut(neighbours_net()),
    "in train mode": lambda: randomized(Small()).train(),
    "a graph": lambda: surgery.trace(neighbours_net(), X),
    "a cut graph": lambda: surgery.decompose(surgery.trace(neighbours_net(), X), {"0": (4, 2), "1": (4, 4)}, example_inputs=X),
}


@pytest.mark.parametrize("build", NETWORKS.values(), ids=NETWORKS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_deploy_computes_the_same_and_reports_what_it_costs(build, dtype):
    net, inputs = build().to(dtype), X.to(dtype)
    before = surgery.report(surgery.decompose(net, {}, example_inputs=inputs))
    state, training = copy.deepcopy(net.state_dict()), net.training
    ids = [id(m) for m in net.modules()]
    deployed = surgery.deploy(net, inputs)
    assert net.training == training
    assert [id(m) for m in net.modules()] == ids
    assert all(torch.equal(v, state[k]) for k, v in net.state_dict().items())
    assert isinstance(deployed, fx.GraphModule)
    assert not any(m.training for m in deployed.modules())
    assert not any(isinstance(m, nn.BatchNorm2d | nn.Identity | nn.Dropout) for m in deployed.modules())
    assert_parity(deployed(inputs), copy.deepcopy(net).eval()(inputs))
    report = surgery.report(deployed)
    assert (report.params_before, report.macs_before) == (before.params_before, before.macs_before)
    assert (report.params_after, report.macs_after) == (params_of(deployed), macs_of(deployed, inputs))
    assert "FoldBatchNorm" in report.passes


def test_deploying_again_changes_nothing():
    once = surgery.deploy(randomized(Handmade()), X)
    twice = surgery.deploy(once, X)
    assert difference(twice(X), once(X)) == 0.0
    assert surgery.report(twice).passes == surgery.report(once).passes
    assert surgery.report(twice).params_after == surgery.report(once).params_after


def test_the_report_says_what_became_of_chains():
    report = surgery.report(surgery.deploy(cut(neighbours_net()), X))
    assert report.passes == ("Decompose", "DropIdentities", "FoldBatchNorm", "MergePointwise")
    assert [row.name for row in report.layers] == ["0.reduce", "0.core", "0.expand", "1.core", "1.expand", "5"]
    assert report["0.expand"].reason == "MergePointwise: stands for 0.expand, 1.reduce"
    assert report["1.expand"].reason == "FoldBatchNorm: stands for 1.expand, 2"
    assert report["0.core"].reason.startswith("a layer of 0 (MergePointwise: no longer a chain")
    assert report["0.expand"].output_shape == (2, 4, 12, 12)
    kept = surgery.report(surgery.deploy(surgery.decompose(randomized(Small()), 0.5), X))
    assert kept["conv1"].ranks == surgery.report(surgery.decompose(Small(), 0.5))["conv1"].ranks  # a folded batch norm leaves a chain one


def test_a_model_that_cannot_be_traced_is_cleaned_where_that_is_proved():
    body = [nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3), nn.Dropout()]
    net = randomized(nn.Sequential(*body, Branching()))
    deployed = surgery.deploy(net, X)
    assert type(deployed) is nn.Sequential
    assert type(deployed[1]) is nn.Identity
    assert type(deployed[2]) is nn.Dropout
    assert_parity(deployed(X), net(X))
    assert surgery.report(deployed).passes == ("FoldBatchNorm",)
    assert surgery.report(deployed).macs_after == macs_of(deployed)
    untouched = surgery.deploy(Branching(), X)
    assert surgery.report(untouched).passes == ()


def test_a_single_layer_and_keyword_inputs():
    layer = nn.Conv2d(3, 4, 3)
    assert difference(surgery.deploy(layer, X)(X), layer(X)) == 0.0
    net, inputs = Keyword(), {"sound": torch.randn(2, 4, 20), "gain": torch.ones(1)}
    assert_parity(run(surgery.deploy(net, inputs), inputs), run(net, inputs))


def test_what_was_cleaned_is_exported_not_saved(tmp_path):
    deployed = surgery.deploy(cut(neighbours_net()), X)
    with pytest.raises(SurgeryValueError, match=r"DropIdentities and FoldBatchNorm and MergePointwise changed its architecture.*export"):
        surgery.save(deployed, tmp_path / "net")
    with pytest.raises(SurgeryValueError, match="FuseLinearRuns changed its architecture"):
        surgery.save(surgery.reconstruct(randomized(Handmade()), foreign=True, example_inputs=X), tmp_path / "net")
    assert not (tmp_path / "net").exists()
    report = surgery.export_onnx(deployed, tmp_path / "net.onnx", X)
    assert report.difference < 1e-5
    inner = nn.Sequential(deployed, nn.ReLU())
    with pytest.raises(SurgeryValueError, match="changed its architecture"):
        surgery.save(inner, tmp_path / "net")


def test_errors_of_deploy():
    with pytest.raises(SurgeryTypeError, match=r"expected an nn\.Module"):
        surgery.deploy("net", X)
    with pytest.raises(SurgeryValueError, match="example_inputs: Small fails on them"):
        surgery.deploy(Small(), torch.randn(2, 5, 12, 12))


def test_every_pass_of_deploy_is_refused_by_save():
    from passes import CLEANUP_PASSES

    assert {type(step) for step in PASSES} <= set(CLEANUP_PASSES)


@pytest.mark.parametrize("on", [lambda net: net, lambda net: surgery.trace(net, X)], ids=["module", "graph"])
@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("first_cut", [False, True])
def test_foreign_chains_become_layers(on, inplace, first_cut):
    net = randomized(Handmade())
    params, macs = params_of(net), macs_of(net)
    model = on(surgery.decompose(net, {"stem": (4, 2)}, example_inputs=X) if first_cut else net)
    expected, before = model(X), [id(m) for m in model.modules()]
    fused = surgery.reconstruct(model, foreign=True, example_inputs=X, inplace=inplace)
    assert (fused is model) == inplace
    if not inplace:
        assert [id(m) for m in model.modules()] == before
    assert_parity(fused(X), expected)
    report = surgery.report(fused)
    assert report.passes == (("Decompose", "Reconstruct") if first_cut else ()) + ("FuseLinearRuns",)
    assert (report.params_before, report.macs_before) == (params, macs)
    assert (report.params_after, report.macs_after) == (params_of(fused), macs_of(fused))
    assert report["core"].reason == "stands for squeeze, core, stretch"
    earlier = surgery.report(model)["tail.0"].reason + "; " if first_cut and not inplace else ""
    assert report["tail.0"].reason.endswith(earlier + "not fused: tail.1 (Identity) stands after it")
    assert report["core"].macs_after == 2 * 36 * 864
    again = surgery.reconstruct(fused, foreign=True, example_inputs=X)
    assert surgery.report(again).passes == report.passes
    assert surgery.report(again).macs_after == report.macs_after
    assert surgery.report(again)["tail.0"].reason == report["tail.0"].reason
    assert surgery.report(again)["core"].reason.startswith("stands for squeeze, core, stretch; not fused: ")


def test_foreign_without_inputs_asks_for_a_proof():
    net = randomized(Handmade())
    report = surgery.report(surgery.reconstruct(net, foreign=True))
    assert report.passes == ()
    assert report["core"].reason.startswith("not fused: not provable without example_inputs")
    plain = randomized(nn.Sequential(nn.Conv2d(3, 2, 1, bias=False), nn.Conv2d(2, 2, 3, bias=False), nn.Conv2d(2, 8, 1)))
    fused = surgery.reconstruct(plain, foreign=True)
    assert [type(m) for m in fused] == [nn.Identity, nn.Conv2d, nn.Identity]
    assert_parity(fused(X), plain(X))
    report = surgery.report(fused)
    assert (report.params_before, report.params_after, report.macs_after) == (params_of(plain), params_of(fused), None)
    seen = surgery.report(surgery.reconstruct(surgery.decompose(plain, {}, example_inputs=X), foreign=True))
    assert (seen["1"].macs_after, seen.macs_after) == (None, None)  # what was recorded was another layer's


def test_foreign_inputs_are_for_foreign_chains():
    with pytest.raises(SurgeryValueError, match="give foreign=True with them"):
        surgery.reconstruct(Small(), example_inputs=X)


def test_own_chains_come_back_whole_if_a_foreign_one_cannot_be_fused():
    net = nn.Sequential(nn.Conv2d(3, 3, 3), nn.ReLU(), ReadsLayers()).eval()
    model = surgery.decompose(net, {"0": (2, 2)})
    expected, modules = model(X), [id(m) for m in model.modules()]
    with pytest.raises(SurgeryError, match="no longer computes the same"):
        surgery.reconstruct(model, foreign=True, example_inputs=X, inplace=True)
    assert [id(m) for m in model.modules()] == modules
    assert difference(model(X), expected) == 0.0
    assert surgery.report(model)["0"].status == "decomposed"


def test_cutting_what_was_fused():
    net = surgery.reconstruct(randomized(Handmade()), foreign=True, example_inputs=X)
    again = surgery.decompose(net, {"core": (4, 4)}, example_inputs=X)
    report = surgery.report(again)
    assert (report.params_before, report.macs_before) == (params_of(randomized(Handmade())), macs_of(randomized(Handmade())))
    assert (report.params_after, report.macs_after) == (params_of(again), macs_of(again))


class Sampling(nn.Module):
    """A mean and a draw around it, as in variational autoencoders."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)

    def forward(self, x):
        y = self.norm(self.conv(x))
        return y + torch.randn_like(y)


def test_networks_that_are_random_in_eval_mode():
    net = randomized(Sampling())
    deployed = surgery.deploy(net, X)
    assert surgery.report(deployed).passes == ("FoldBatchNorm",)
    torch.manual_seed(5)
    expected = net(X)
    torch.manual_seed(5)
    assert_parity(deployed(X), expected)
    assert surgery.report(surgery.deploy(Random(), X)).passes == ()


ACTS = {
    "deploy": surgery.deploy,
    "foreign": lambda m, x: surgery.reconstruct(m, foreign=True, example_inputs=x),
    "inplace": lambda m, x: surgery.reconstruct(m, foreign=True, example_inputs=x, inplace=True),
    "trace": surgery.trace,
    "capture": surgery.capture,
}


@pytest.mark.parametrize("act", ACTS.values(), ids=ACTS)
@pytest.mark.parametrize("build", [Random, lambda: Random(fails=True), Sampling, lambda: nn.Sequential(Sampling())])
def test_random_states_are_left_as_found(act, build):
    net, before = build().eval(), random_states()
    with contextlib.suppress(SurgeryError):
        act(net, X)
    assert random_states() == before


@pytest.mark.parametrize("was_cut", [False, True])
@pytest.mark.parametrize("on_record", [False, True])
def test_a_failure_in_place_leaves_the_record_as_it_was(was_cut, on_record):
    net = nn.Sequential(nn.Conv2d(3, 3, 3), nn.ReLU(), ReadsLayers()).eval()
    if was_cut:
        net = surgery.decompose(net, {"0": (2, 2)}, example_inputs=X)
    if not on_record:
        net.__dict__.pop("surgery_record", None)
    before = net.__dict__.get("surgery_record")
    with pytest.raises(SurgeryError, match="no longer computes the same"):
        surgery.reconstruct(net, foreign=True, example_inputs=X, inplace=True)
    assert net.__dict__.get("surgery_record") == before
    assert ("surgery_record" in net.__dict__) == (before is not None)
    if before is not None:
        assert surgery.report(net).passes == ("Decompose",)


@pytest.mark.parametrize("act", [ACTS["foreign"], surgery.deploy], ids=["foreign", "deploy"])
def test_calls_and_macs_where_the_proof_is_structure(act):
    net = randomized(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), OnData()))
    report = surgery.report(act(net, X))
    assert (report["0"].calls, report["0"].macs_before) == (1, 2 * 100 * 108)
    assert (report.macs_before, report.macs_after) == (macs_of(net), macs_of(act(net, X)))
    line = randomized(nn.Sequential(nn.Linear(12, 4), nn.BatchNorm1d(3), OnData()))
    inputs = X[:, :, 0]
    assert surgery.report(act(line, inputs))["0"].reason.find("example_inputs") == -1


class OnData(nn.Module):
    """Control flow on data, without a layer."""

    def forward(self, x):
        return x if x.sum() > 0 else x * 2


def test_parameters_that_layers_share_count_once():
    left, right = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1)
    right.bias = left.bias
    norms = nn.BatchNorm2d(3), nn.BatchNorm2d(3)
    norms[1].weight = norms[0].weight
    net = randomized(nn.Sequential(left, norms[0], nn.ReLU(), right, norms[1]))
    for fused in (surgery.reconstruct(net, foreign=True), surgery.reconstruct(net, foreign=True, example_inputs=X), surgery.deploy(net, X)):
        report = surgery.report(fused)
        assert (report.params_before, report.params_after) == (params_of(net), params_of(fused))


class Holds(nn.Module):
    def __init__(self, body):
        super().__init__()
        self.body, self.head = body, nn.Conv2d(4, 8, 3)

    def forward(self, x):
        return self.head(self.body(x))


@pytest.mark.parametrize("clean", [surgery.deploy, ACTS["foreign"]], ids=["deploy", "foreign"])
def test_what_was_cleaned_inside_a_model_counts_in_its_report(clean):
    body = neighbours_net()
    whole, outer = Holds(body).eval(), Holds(clean(cut(body), X)).eval()
    assert surgery.report(outer).params_before == params_of(whole)
    assert surgery.report(outer).params_after == params_of(outer)
    for net in (surgery.decompose(outer, {"head": (2, 2)}, example_inputs=X), surgery.deploy(outer, X), ACTS["foreign"](outer, X)):
        report = surgery.report(net)
        assert (report.params_before, report.macs_before) == (params_of(whole), macs_of(whole))
        assert (report.params_after, report.macs_after) == (params_of(net), macs_of(net))


def test_a_chain_that_is_never_called_is_not_in_the_trace(tmp_path):
    class Spare(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.spare = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3)

        def forward(self, x):
            return self.conv(x)

    net = surgery.decompose(Spare().eval(), {"re:.*": 0.5})
    for graph in (surgery.trace(net, X), surgery.deploy(net, X)):
        rows = {row.name: row for row in surgery.report(graph).layers}
        assert [name for name in rows if "spare" not in name] == ["conv"]
        assert torch.allclose(graph(X), net(X), atol=1e-6)
