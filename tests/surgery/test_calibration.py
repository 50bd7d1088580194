"""Cuts that know the data: what inputs a layer sees and which outputs count, correction in turn, polishing."""

from __future__ import annotations

import copy
import importlib
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

import surgery
from passes import host_for
from passes.chain import pieces_of
from passes.geometry import Geometry, Piece
from passes.kinds import KINDS, kind_named
from passes.metric import Metric, unweighted, weighted
from passes.parity import assert_parity
from passes.refit import refit
from passes.spectra import Spectra
from surgery import Budget, Refine, calibration, correction
from surgery.calibration import batches_of, calibrate
from surgery.correction import Refit, correct
from surgery.ranks.budget import Totals
from surgery.ranks.candidates import Candidates
from surgery.ranks.solve import solve
from surgery.training.batch_norm import reestimate, reestimate_where_it_helps
from tests.networks import Kinds, Small, Twice, random_states

with_spectra = [k for k in KINDS if k.has_spectra]
generator = torch.Generator().manual_seed(9)
IMAGES = torch.randn(64, 3, 12, 12, generator=generator)


def spread(channels, groups=1):
    """A second moment with a wide spectrum, (groups, n, n)."""
    n = channels // groups
    scales = torch.logspace(0, -2, n, dtype=torch.float64)
    basis = torch.linalg.qr(torch.randn(groups, n, n, dtype=torch.float64, generator=torch.Generator().manual_seed(n)))[0]
    return basis @ torch.diag(scales) @ basis.mT


def output_error(layer, pieces, kind, metric):
    """sqrt(tr(G D S D^T)) of the change D, by its definition."""
    geometry = Geometry.of(layer)
    merged = kind.merge([Piece(p.name, p.geometry, p.weight.double(), None) for p in pieces], geometry)
    change = geometry.forward_blocks(merged - layer.weight.detach()).flatten(3)
    return float(torch.einsum("goik,gij,gpjk,gop->", change, metric.inputs, change, metric.outputs).sqrt())


@pytest.mark.parametrize("kind", with_spectra, ids=[k.name for k in with_spectra])
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("transposed", [False, True])
def test_a_metric_lowers_the_error_that_it_measures(kind, groups, transposed):
    torch.manual_seed(0)
    build = nn.ConvTranspose2d if transposed else nn.Conv2d
    layer = build(12, 16, 1 if kind.name == "svd" else 3, groups=groups, dtype=torch.float64)
    metric = Metric(inputs=spread(12, groups), outputs=spread(16, groups))
    if not kind.mixes_inputs:  # it can make use of the diagonal alone
        metric = Metric(inputs=torch.diag_embed(metric.inputs.diagonal(dim1=1, dim2=2)), outputs=metric.outputs)
    (site,) = host_for(nn.Sequential(layer)).sites()
    ranks = [kind.unit(site.geometry) * max(1, r // kind.unit(site.geometry) // 2) for r in kind.full_ranks(site.geometry)]
    factorization = kind.from_ranks(site.geometry, ranks)
    plain = Spectra().split(site, kind, factorization)
    aware = Spectra(metrics={"0": metric}).split(site, kind, factorization)
    assert [p.geometry for p in aware] == [p.geometry for p in plain]
    assert output_error(layer, aware, kind, metric) < 0.8 * output_error(layer, plain, kind, metric)
    whole = kind.from_ranks(site.geometry, kind.full_ranks(site.geometry))
    exact = kind.merge(Spectra(metrics={"0": metric}).split(site, kind, whole), site.geometry)
    assert float((exact - layer.weight.detach()).norm() / layer.weight.norm()) < 1e-9


@pytest.mark.parametrize("kind", with_spectra, ids=[k.name for k in with_spectra])
def test_the_weighted_weight_has_the_norm_of_the_output(kind):
    layer = nn.Conv2d(6, 8, 1 if kind.name == "svd" else 3, dtype=torch.float64)
    metric = Metric(inputs=torch.diag_embed(torch.rand(1, 6, dtype=torch.float64) + 0.1), outputs=spread(8))
    found = weighted(layer.weight.detach(), Geometry.of(layer), metric, kind).square().sum()
    expected = torch.einsum("oik,ij,pjk,op->", layer.weight.flatten(2), metric.inputs[0], layer.weight.flatten(2), metric.outputs[0])
    assert float(found) == pytest.approx(float(expected), rel=1e-4)
    assert unweighted((), Geometry.of(layer), Metric(), kind) == ()


def test_moments_are_those_of_the_inputs_and_of_the_derivatives():
    model = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(inplace=True), nn.Conv2d(4, 6, 1, groups=2)).double().eval()
    x = torch.randn(5, 3, 7, 7, dtype=torch.float64)
    before = copy.deepcopy(model.state_dict())
    state = torch.get_rng_state()
    learnt = calibrate(model, [x[:2], x[2:]], host_for(model).sites())
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(before[k], v) and v.grad is None for k, v in model.state_dict(keep_vars=True).items())
    assert learnt.examples == 5
    rows = x.movedim(1, -1).reshape(-1, 3)
    assert torch.allclose(learnt.metrics["0"].inputs[0], rows.T @ rows / len(rows))
    inner = model[:2](x).movedim(1, -1).reshape(-1, 2, 2).detach()
    assert torch.allclose(learnt.metrics["2"].inputs, torch.einsum("ngi,ngj->gij", inner, inner) / len(inner))
    # the last layer gives the output itself: derivatives of a white projection are white
    white = learnt.metrics["2"].outputs / 49
    assert torch.allclose(white, torch.eye(3, dtype=torch.float64).expand(2, 3, 3), atol=0.3)


def test_what_does_not_reach_the_output_counts_for_nothing():
    class Dead(nn.Module):
        def __init__(self, scale):
            super().__init__()
            self.used, self.dead, self.scale = nn.Conv2d(3, 8, 3), nn.Conv2d(3, 8, 3), scale

        def forward(self, x):
            self.dead(x)
            return self.scale * self.used(x)

    for scale in (1.0, 1e-3):  # what the output counts in has no part in it
        model = Dead(scale)
        plan = surgery.plan(model, Budget(macs=0.8), example_inputs=IMAGES[:1], calibration=[IMAGES])
        assert isinstance(plan["used"], surgery.Keep)
        assert not isinstance(plan["dead"], surgery.Keep)


class Patches(nn.Module):
    """One picture becomes many; one layer is called twice, and one runs without gradients."""

    def __init__(self):
        super().__init__()
        self.frozen, self.first, self.second = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1)

    def forward(self, x):
        with torch.no_grad():
            x = self.frozen(x)
        parts = self.first(x).unfold(2, 4, 4).unfold(3, 4, 4).permute(0, 2, 3, 1, 4, 5).reshape(-1, 4, 4, 4)
        return self.second(self.second(parts)).reshape(len(x), -1)


def test_weightings_have_one_unit_however_many_rows_a_layer_makes_of_a_picture():
    model, x = Patches().eval(), torch.randn(8, 3, 16, 16)
    eye = torch.eye(4).reshape(4, 4, 1, 1)
    with torch.no_grad():
        for layer in (model.first, model.second):
            layer.weight.copy_(eye)
    found = calibrate(model, x.split(4), host_for(model).sites()).metrics
    counts = {name: float(metric.outputs.diagonal(dim1=-2, dim2=-1).mean()) for name, metric in found.items()}
    assert counts["first"] == pytest.approx(256, rel=0.1)  # pixels of a picture, white derivatives
    assert counts["second"] == pytest.approx(2 * 256, rel=0.1)  # of both calls
    assert counts["frozen"] == pytest.approx((counts["first"] + counts["second"]) / 2)


def test_tied_layers_count_together():
    model = nn.Sequential(nn.Conv2d(3, 3, 1), nn.ReLU(), nn.Conv2d(3, 3, 1))
    model[2].weight = model[0].weight
    together = calibrate(model, [IMAGES], host_for(model).sites()).metrics
    apart = copy.deepcopy(model)
    apart[2].weight = nn.Parameter(apart[2].weight.detach().clone())
    alone = calibrate(apart, [IMAGES], host_for(apart).sites()).metrics
    torch.testing.assert_close(together["0"].outputs, alone["0"].outputs + alone["2"].outputs)
    torch.testing.assert_close(together["0"].inputs, (alone["0"].inputs + alone["2"].inputs) / 2)


class Detached(nn.Module):
    """Heads whose numbers have no derivative: one proposes, one labels, one is off, one is for nobody."""

    def __init__(self):
        super().__init__()
        self.proposes, self.labels, self.off, self.unread, self.last = (nn.Conv2d(3, 4, 1) for _ in range(5))

    def forward(self, x):
        self.unread(x)
        shift = self.proposes.forward(x).detach().mean()
        return self.last(x) + 0.0 * self.off(x) + shift, self.labels(x).argmax(1)


def test_what_an_output_depends_on_without_a_derivative_counts_like_the_others():
    model = Detached().eval()
    found = calibrate(model, [IMAGES], host_for(model).sites()).metrics
    counts = {name: float(metric.outputs.diagonal(dim1=-2, dim2=-1).mean()) for name, metric in found.items()}
    assert counts["proposes"] == counts["labels"] == pytest.approx(counts["last"])
    assert counts["unread"] == counts["off"] == pytest.approx(1e-9 * counts["last"])


class Unreached(nn.Module):
    """As networks with heads that only training needs."""

    def __init__(self):
        super().__init__()
        self.body, self.head, self.auxiliary = nn.Conv2d(3, 16, 3), nn.Conv2d(16, 16, 3), nn.Conv2d(16, 16, 3)

    def forward(self, x):
        y = self.body(x)
        return (self.head(y), self.auxiliary(y)) if self.training else self.head(y)


def test_a_budget_keeps_what_calibration_does_not_reach():
    plan = surgery.plan(Unreached(), Budget(params=0.8), calibration=[IMAGES])
    assert plan["auxiliary"].reason == "the calibration batches do not reach it"
    assert not isinstance(plan["head"], surgery.Keep)


class Routed(nn.Module):
    """Only what the first layer makes much of goes on."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3)
        with torch.no_grad():
            self.least = self.rating(self.first(IMAGES)).median()

    def rating(self, y):
        return y.square().flatten(1).mean(1)

    def forward(self, x):
        y = self.first(x)
        return self.second(y[self.rating(y) > self.least])


def test_a_layer_that_gets_other_rows_after_the_cut_is_left_uncorrected():
    model = Routed().eval()
    net = surgery.decompose(model, {"re:.*": (1, 1)}, calibration=[IMAGES])
    assert len(net(IMAGES)) != len(model(IMAGES)) == 32
    rows = {row.name: row for row in surgery.report(net).layers}
    assert rows["first"].output_error is not None
    assert rows["second"].status == "decomposed"
    assert rows["second"].output_error is None


def test_hooks_of_the_layer_run_once_on_its_corrected_chain(monkeypatch):
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU()).eval()
    model[0].register_forward_hook(lambda module, inputs, output: 2 * output)
    for held in (correction.HELD, 0.0):  # side by side, and one pass after the other
        monkeypatch.setattr(correction, "HELD", held)
        net = surgery.decompose(model, {"0": (8, 3)}, calibration=IMAGES.split(16))
        assert distance(net, model, IMAGES) < 1e-3


def test_refit_finds_the_layer_that_made_the_data():
    layer = nn.Conv2d(6, 8, 1, groups=2, dtype=torch.float64)
    (piece,) = [Piece("", Geometry.of(layer), torch.zeros_like(layer.weight.detach()), torch.zeros(8, dtype=torch.float64))]
    x = torch.randn(40, 6, 3, 3, dtype=torch.float64)
    rows = torch.cat([x.movedim(1, -1).reshape(-1, 2, 3), torch.ones(360, 2, 1, dtype=torch.float64)], 2).transpose(0, 1)
    wanted = layer(x).detach().movedim(1, -1).reshape(-1, 2, 4).transpose(0, 1)
    found = refit(piece, rows.mT @ rows, rows.mT @ wanted)
    assert torch.allclose(found.weight, layer.weight, atol=1e-3)
    assert torch.allclose(found.bias, layer.bias, atol=1e-3)


def distance(net, model, x):
    with torch.no_grad():
        return float((net(x) - model(x)).norm() / model(x).norm())


@pytest.mark.parametrize(("kernel", "stride"), [((1, 3), 1), ((3, 3), 2), ((1, 1), 1)])
def test_large_batches_are_added_in_slices(kernel, stride, monkeypatch):
    layer = nn.Conv2d(4, 6, kernel, stride, padding=kernel[0] // 2, dtype=torch.float64)
    x = torch.randn(7, 4, 9, 8, dtype=torch.float64)
    (piece,) = pieces_of({"": layer})
    whole, sliced = Refit(piece), Refit(piece)
    whole.add(x, layer(x).detach() + 1)
    monkeypatch.setattr(correction, "SLICE", 300)
    sizes = []
    given = correction.rows
    monkeypatch.setattr(correction, "rows", lambda x, *more: sizes.append(len(x)) or given(x, *more))
    sliced.add(x, layer(x).detach() + 1)
    assert max(sizes) < 7
    torch.testing.assert_close(sliced.xtx, whole.xtx)
    torch.testing.assert_close(sliced.xty, whole.xty)
    assert sliced.yty == pytest.approx(whole.yty)


@pytest.mark.parametrize("method", ["tucker", "channel", "spatial", "depthwise", "auto"])
def test_data_correction_and_polishing_each_bring_the_outputs_nearer(method):
    model = Small().eval()
    train, test = IMAGES[:48], IMAGES[48:]
    options = {"example_inputs": IMAGES[:1], "method": method, "guard": "none"}
    plan = surgery.plan(model, 0.4, **options)
    blind = surgery.decompose(model, plan)
    aware = surgery.decompose(model, plan, calibration=train.split(16))
    polished = surgery.decompose(model, plan, calibration=train.split(16), refine=Refine(epochs=40))
    assert distance(aware, model, test) < 0.8 * distance(blind, model, test)
    assert distance(polished, model, train) < distance(aware, model, train)
    report = surgery.report(aware)
    assert report.calibrated == 48
    assert "48 calibration examples" in str(report)
    assert "weights alone" in str(surgery.report(blind))
    assert surgery.report(blind).calibrated == 0
    assert any(row.output_error is not None for row in report.layers)


def test_the_output_error_that_is_reported_is_the_one_that_is_there():
    model = nn.Sequential(nn.Conv2d(3, 12, 3, padding=1, bias=False), nn.ReLU(), nn.Conv2d(12, 8, 3)).double().eval()
    x = IMAGES.double()
    net = surgery.decompose(model, {"re:.*": 0.5}, calibration=x.split(16))
    for count, name in ((1, "0"), (3, "2")):
        wanted, got = model[:count](x), nn.Sequential(*list(net)[:count])(x)
        assert surgery.report(net)[name].output_error == pytest.approx(float((got - wanted).norm() / wanted.norm()), rel=1e-6)


def test_correction_in_place_on_graphs_and_modes(tmp_path):
    model = Small().train()
    traced = surgery.trace(copy.deepcopy(model).eval(), IMAGES[:2])
    cut = surgery.decompose(traced, 0.4, example_inputs=IMAGES[:2], guard="none", calibration=IMAGES)
    on_module = surgery.decompose(model, 0.4, example_inputs=IMAGES[:2], guard="none", calibration=IMAGES)
    assert all(m.training for m in on_module.modules())
    assert_parity(on_module.eval()(IMAGES), cut(IMAGES), tolerance=1e-4)
    other = copy.deepcopy(model)
    assert surgery.decompose(other, 0.4, example_inputs=IMAGES[:2], guard="none", calibration=IMAGES, inplace=True) is other
    assert_parity(other.eval()(IMAGES), cut(IMAGES), tolerance=1e-4)
    surgery.save(on_module, tmp_path / "net")
    again = surgery.load(tmp_path / "net", Small())
    assert surgery.report(again).calibrated == 64
    assert [r.output_error for r in surgery.report(again).layers] == [r.output_error for r in surgery.report(on_module).layers]


def test_shared_and_tied_layers_and_other_inputs():
    twice = Twice().eval()
    x = torch.randn(8, 8, 8, 8)
    net = surgery.decompose(twice, {"re:.*": 0.5}, calibration=[x])
    assert distance(net, twice, x) < distance(surgery.decompose(twice, {"re:.*": 0.5}), twice, x)
    kinds = Kinds().eval()
    images = torch.randn(8, 3, 6, 8)
    aware = surgery.decompose(kinds, {"re:.*": 0.5}, calibration=[(images,)])
    assert distance(aware, kinds, images) < distance(surgery.decompose(kinds, {"re:.*": 0.5}), kinds, images)


def test_what_others_hold_is_not_moved():
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3)).eval()
    model[2].bias = model[0].bias
    net = surgery.decompose(model, {"0": (2, 2)}, calibration=IMAGES, refine=Refine(epochs=1))
    assert torch.equal(net[2].bias, model[0].bias)
    assert net[0].bias is net[2].bias


def with_norms():
    torch.manual_seed(2)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 3), nn.BatchNorm2d(4)).train()
    reestimate(model, IMAGES.split(16))
    return model


def test_statistics_are_taken_anew_where_batches_that_had_no_part_in_it_say_so():
    model = with_norms()
    other = copy.deepcopy(model)
    other[1].running_var.mul_(3.0)
    assert reestimate_where_it_helps(model, other, IMAGES.split(16)) == 2
    assert torch.allclose(other[1].running_var, model[1].running_var, rtol=1e-4)
    assert all(m.training for net in (model, other) for m in net.modules())
    with torch.no_grad():
        assert_parity(other.eval()(IMAGES), model.eval()(IMAGES), tolerance=1e-3)


@pytest.mark.parametrize(
    "batches", [IMAGES.split(16), IMAGES.split(64), IMAGES[:3].split(1)], ids=["no worse as they are", "one batch", "three examples"]
)
def test_statistics_stay_where_nothing_says_that_new_ones_help(batches):
    model = with_norms()
    other = copy.deepcopy(model)
    if len(batches[0]) < 16:
        other[1].running_var.mul_(1.02)  # a little wrong, and three examples know less
    before = {k: v.clone() for k, v in other.state_dict().items()}
    assert reestimate_where_it_helps(model, other, batches) == 0
    assert all(torch.equal(before[k], v) for k, v in other.state_dict().items())


def test_a_cut_asks_before_it_takes_statistics_anew():
    model = Small().eval()  # its statistics are none of any data: new ones would change all that it says
    net = surgery.decompose(model, 0.6, guard="none", calibration=IMAGES.split(16))
    assert all(torch.equal(a, b) for (n, a), b in zip(model.named_buffers(), net.buffers(), strict=True))


@pytest.mark.parametrize(
    "stage", ["surgery.correction.correct", "surgery.training.batch_norm.reestimate_where_it_helps", "surgery.refinement.refine"]
)
def test_an_interrupt_while_chains_are_mended_leaves_the_model_as_it_was(stage, monkeypatch):
    model = Small().eval()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    module, name = stage.rsplit(".", 1)
    real = getattr(importlib.import_module(module), name)

    def interrupted(*args, **options):
        real(*args, **options)
        model.bn1.running_mean.add_(1.0)
        raise KeyboardInterrupt

    monkeypatch.setattr(stage, interrupted)
    with pytest.raises(KeyboardInterrupt):
        surgery.decompose(model, 0.4, guard="none", inplace=True, calibration=IMAGES, refine=Refine(epochs=1))
    assert list(model.state_dict()) == list(before)
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())


def test_labels_of_a_loader_are_dropped():
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(IMAGES, torch.arange(64)), batch_size=16)
    assert [b.shape[0] for b in batches_of(loader)] == [16] * 4
    assert len(batches_of(IMAGES)) == 1
    assert batches_of([[IMAGES, IMAGES]])[0][1] is IMAGES  # two inputs, not labels
    model = Small().eval()
    nets = [surgery.decompose(model, {"conv2": 0.5}, calibration=batches) for batches in (loader, IMAGES.split(16))]
    assert_parity(nets[0](IMAGES), nets[1](IMAGES))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"calibration": 3}, "calibration: expected batches"),
        ({"calibration": []}, "calibration: there is no batch"),
        ({"calibration": IMAGES * float("nan")}, "numbers that are not finite"),
        ({"calibration": [torch.randn(2, 5, 4, 4)]}, "fails on them"),
        ({"refine": Refine()}, "refine: needs calibration"),
        ({"calibration": IMAGES, "refine": 3}, "refine: expected surgery.Refine"),
    ],
)
def test_wrong_data(options, message):
    model = Small()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(surgery.SurgeryError, match=message):
        surgery.decompose(model, 0.5, inplace=True, **options)
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())


@pytest.mark.parametrize("options", [{"epochs": 0}, {"epochs": 1.5}, {"rate": 0.0}, {"rate": "fast"}])
def test_wrong_polishing(options):
    with pytest.raises(surgery.SurgeryError, match="Refine: "):
        Refine(**options)


def test_correcting_nothing_changes_nothing():
    model = Small().eval()
    assert correct(model, copy.deepcopy(model), {}, [IMAGES]) == {}
    assert kind_named("tucker").mixes_inputs


def test_layers_that_see_no_tensor_or_give_nothing_to_differentiate_are_passed_over():
    class Rounded(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.pair = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 1)

        def forward(self, x):
            return self.pair(self.conv(x)).argmax(1)

    model = Rounded()
    net = surgery.decompose(model, {"conv": 0.5}, calibration=[torch.randn(4, 3, 8, 8)])
    assert 0 < surgery.report(net)["conv"].output_error < 1


class InPlace(nn.Module):
    """What works without gradients only: it changes what a derivative would need, in place, or leaves torch."""

    def __init__(self, how):
        super().__init__()
        self.conv, self.how = nn.Conv2d(3, 16, 3, padding=1), how

    def forward(self, x):
        y = self.conv(x)
        if self.how == "saved":
            y = y.sigmoid()
            y[..., :2] = y[..., :2] * 2
        elif self.how == "view":
            part, _ = y.chunk(2, 1)
            part.mul_(2)
        else:
            y = torch.from_numpy(y.numpy() + 1)
        return y


@pytest.mark.parametrize("how", ["saved", "view", "numpy"])
def test_a_network_that_cannot_be_differentiated_is_fitted_to_what_its_layers_see(how):
    torch.manual_seed(0)
    net = InPlace(how)
    x = IMAGES * torch.tensor([1.0, 1.0, 0.01]).reshape(3, 1, 1)
    metric = calibrate(net, [x], host_for(net).sites()).metrics["conv"]
    seen = torch.einsum("nihw,njhw->ij", x.double(), x.double()) / (64 * 144)
    torch.testing.assert_close(metric.inputs[0], seen)
    assert metric.outputs is None
    done = surgery.decompose(net, {"conv": (8, 2)}, calibration=[x])
    assert surgery.report(done)["conv"].output_error is not None
    with pytest.raises(surgery.SurgeryError, match="refine: InPlace cannot be trained to the original's outputs"):
        surgery.decompose(net, {"conv": (8, 2)}, calibration=[x], refine=Refine(epochs=1))
    with pytest.raises(surgery.SurgeryValueError, match="calibration: batch 1: InPlace fails on them"):
        surgery.decompose(net, {"conv": (8, 2)}, calibration=[x, x[:, :2]])


class WithTime(nn.Module):
    """As the networks of diffusion models: a picture, and the number of a step."""

    def __init__(self):
        super().__init__()
        self.conv, self.steps = nn.Conv2d(3, 16, 3), nn.Embedding(10, 16)

    def forward(self, x, step):
        return self.conv(x) + self.steps(step)[:, :, None, None]


def test_a_pair_is_two_inputs_where_the_network_needs_two():
    net, pair = WithTime(), (IMAGES, torch.arange(64) % 10)
    for batches in ([pair], [list(pair)], torch.utils.data.DataLoader(torch.utils.data.TensorDataset(*pair), 16)):
        done = surgery.decompose(net, {"conv": (8, 2)}, example_inputs=pair, calibration=batches)
        assert surgery.report(done)["conv"].output_error is not None


class Pooled(nn.Module):
    """A batch norm behind global pooling: in train mode it cannot be shown a single picture."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.head = nn.Conv2d(3, 16, 3), nn.BatchNorm1d(16), nn.Linear(16, 4)

    def forward(self, x):
        return self.head(self.norm(self.conv(x).mean((2, 3))))


class Chosen(Pooled):
    """As many numbers as there are above 0."""

    def forward(self, x):
        y = super().forward(x)
        return y[y > 0]


@pytest.mark.parametrize("build", [Pooled, Chosen])
def test_what_statistics_cannot_be_taken_of_is_cut_all_the_same(build):
    torch.manual_seed(0)
    model = build().eval()
    batches = [IMAGES[:32], IMAGES[32:63], IMAGES[63:]] if build is Pooled else list(IMAGES.split(16))
    net = surgery.decompose(model, {"conv": (4, 2)}, calibration=batches)
    assert surgery.report(net)["conv"].output_error is not None
    assert torch.equal(net.norm.running_mean, model.norm.running_mean)
    if build is Chosen:
        with pytest.raises(surgery.SurgeryError, match="refine: Chosen cannot be trained to the original's outputs"):
            surgery.decompose(model, {"conv": (4, 2)}, calibration=batches, refine=Refine(epochs=1))


def test_a_loader_leaves_the_random_state_as_it_was():
    loader, model = torch.utils.data.DataLoader(IMAGES, batch_size=16, shuffle=True), nn.Sequential(nn.Conv2d(3, 8, 3))
    before = random_states()
    surgery.decompose(model, 0.5, calibration=loader)
    assert random_states() == before


class Streaming(nn.Module):
    """Goes on where the last call ended."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv1d(8, 8, 3)
        self.register_buffer("past", torch.zeros(1, 8, 2))

    def forward(self, x):
        x = torch.cat([self.past, x], -1)
        self.past = x[..., -2:].detach()
        return self.conv(x)


def test_both_networks_go_on_from_the_same_state():
    model = Streaming()
    chunks = [torch.randn(1, 8, 10) for _ in range(3)]
    net = surgery.decompose(model, {"conv": (8, 8)}, calibration=chunks)
    assert surgery.report(net)["conv"].output_error < 1e-5
    assert not model.past.any()
    assert not net.past.any()
    assert_parity(net(chunks[0]), model(chunks[0]), tolerance=1e-4)


class Counting(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.head = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 4, 3)
        self.register_buffer("calls", torch.zeros(()))
        self.noted = []

    def forward(self, x):
        self.calls += 1
        self.noted.append(len(x))
        return self.head(self.norm(self.conv(x)))


def test_what_code_counts_is_not_counted_in_the_callers_model(monkeypatch):
    def taken(original, model, batches):
        assert model(batches[0]).shape == original(batches[0]).shape
        model.norm.running_mean.fill_(1.0)

    monkeypatch.setattr("surgery.training.batch_norm.reestimate_where_it_helps", taken)
    model = Counting()
    surgery.decompose(model, {"conv": (3, 2), "head": (2, 4)}, calibration=IMAGES.split(16), refine=Refine(epochs=1), inplace=True)
    assert int(model.calls) == 0
    assert model.noted == []
    assert surgery.report(model)["head"].status == "decomposed"
    assert bool((model.norm.running_mean == 1.0).all())


class Collecting(nn.Module):
    """Keeps what its layers gave."""

    def __init__(self):
        super().__init__()
        self.conv, self.head, self.maps = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, 3), []

    def forward(self, x):
        self.maps.append(self.conv(x))
        return self.head(self.maps[-1])


def test_networks_that_keep_their_activations_are_refined():
    model = Collecting()
    net = surgery.decompose(model, {"conv": (3, 2), "head": (2, 4)}, calibration=IMAGES.split(16), refine=Refine(epochs=2))
    assert net.maps == model.maps == []


class Forces(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3)

    def forward(self, x):
        x = x.detach().requires_grad_()
        return -torch.autograd.grad(self.conv(x).square().sum(), x)[0]


def test_a_model_that_differentiates_by_its_inputs_is_cut_and_not_corrected():
    row = surgery.report(surgery.decompose(Forces(), {"conv": (3, 2)}, calibration=IMAGES.split(16)))["conv"]
    assert (row.status, row.output_error) == ("decomposed", None)


class Insisting(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3)

    def forward(self, x):
        assert isinstance(self.conv, nn.Conv2d)
        return self.conv(x)


def test_code_that_a_chain_breaks_is_told_of():
    model = Insisting()
    with pytest.raises(surgery.SurgeryValueError, match=r"no longer runs \(calibration: Insisting fails on them .*AssertionError.*exclude="):
        surgery.decompose(model, {"conv": (3, 2)}, calibration=[IMAGES], inplace=True)
    assert type(model.conv) is nn.Conv2d


class Reader(nn.Module):
    """Convolutions, and a recurrent layer behind them."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv1d(3, 8, 3)
        self.words = nn.LSTM(8, 6, num_layers=2, dropout=0.5, batch_first=True)

    def forward(self, x):
        return self.words(self.conv(x).mT)[0]


def test_recurrent_layers_can_be_differentiated_on_gpus(monkeypatch):
    """There torch refuses it in eval mode; in train mode without dropout they give the same."""
    model, batches = Reader().eval(), [torch.randn(4, 3, 12) for _ in range(3)]
    wanted = calibrate(model, batches, host_for(model).sites()).metrics["conv"]
    real, modes = nn.LSTM.forward, []

    def forward(self, *args):
        modes.append(self.training)
        if torch.is_grad_enabled() and not self.training:
            raise RuntimeError("cudnn RNN backward can only be called in training mode")
        return real(self, *args)

    monkeypatch.setattr(nn.LSTM, "forward", forward)
    found = calibrate(model, batches, host_for(model).sites()).metrics["conv"]
    assert any(modes)
    assert torch.equal(found.outputs, wanted.outputs)
    assert model.words.dropout == 0.5
    assert not model.words.training


class Large(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3)

    def forward(self, x):
        if torch.is_grad_enabled():
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return self.conv(x)


def test_too_little_memory_is_told_and_does_not_change_what_is_learnt():
    with pytest.raises(surgery.SurgeryValueError, match=r"calibration.*out of memory"):
        surgery.decompose(Large(), {"conv": (3, 2)}, calibration=[IMAGES])


def test_the_largest_error_is_that_of_a_share_of_each_layer():
    """By the outputs, where one layer has little to lose, a budget for the largest error does not take all of it."""

    def layer(name, energy):
        losses = energy * np.array([0.01 if name == "much" else 1.0, 0.0])
        place = SimpleNamespace(name=name)
        return Candidates(place, (f"{name} cut", f"{name} whole"), np.array([1.0, 4.0]), np.sqrt(losses / energy), losses, 4.0, energy)

    layers = [layer("much", 100.0), layer("little", 0.001)]
    found = {criterion: solve(Budget(params=0.625, criterion=criterion), layers, Totals(params=8, macs=None)) for criterion in ("max", "mean")}
    assert found["max"] == {"much": "much cut", "little": "little whole"}
    assert found["mean"] == {"much": "much whole", "little": "little cut"}


def test_only_what_may_be_cut_is_looked_at(monkeypatch):
    """Second moments of the inputs of a VGG's first linear layer would take 5 GB, and nobody has asked to cut it."""
    looked_at = []

    class Watched(calibration.Moments):
        def __init__(self, geometry):
            looked_at.append(geometry)
            super().__init__(geometry)

    monkeypatch.setattr(calibration, "Moments", Watched)
    model = Small().eval()
    first, second, head = (Geometry.of(model.get_submodule(name)) for name in ("conv1", "conv2", "head"))
    surgery.plan(model, 0.5, calibration=IMAGES)
    assert {first, second} < set(looked_at)
    assert head not in looked_at
    looked_at.clear()
    surgery.plan(model, 0.5, calibration=IMAGES, exclude="conv1")
    assert first not in looked_at
    looked_at.clear()
    surgery.plan(model, 0.5, calibration=IMAGES, include=["conv2", "head"])
    assert looked_at == [second, head]
    looked_at.clear()
    net = surgery.decompose(model, {"conv2": 0.5}, calibration=IMAGES)
    assert [geometry.out_channels for geometry in looked_at] == [model.conv2.out_channels]
    assert surgery.report(net).calibrated == len(IMAGES)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_networks_of_few_digits_are_refined_too(dtype):
    """Adam in half precision steps to infinity, or not at all."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(24, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 8)).to(dtype).eval()
    x = torch.randn(256, 24).to(dtype)
    ranks = {"0": 6, "2": 8}
    before, after = (surgery.decompose(model, ranks, calibration=x.split(64), refine=how, balanced=False) for how in (None, Refine(epochs=40)))
    with torch.no_grad():
        wrong, right = (float((net(x).float() - model(x).float()).norm()) for net in (before, after))
    assert right < 0.95 * wrong
    assert all(p.dtype == dtype and p.grad is None for p in after.parameters())
