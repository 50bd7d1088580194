"""From times to plans on a machine that is busy: noise, bad times, lucky races, other sorts of plans. Every clock here is made up."""

from __future__ import annotations

import itertools
import random
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

import surgery
from passes import host_for, observe
from passes.factorization import Factorization
from passes.kinds import kind_named
from passes.spectra import Spectra
from passes.svd import SVD
from surgery import Budget, Keep
from surgery.cost import macs_under
from surgery.cost.chains import timed_in
from surgery.cost.profile import Entry
from surgery.latency import race, stopwatch
from surgery.latency.families import FRACTIONS, Proposal, rungs_of
from surgery.latency.onnx_cut import Exported
from surgery.latency.race import Raced, race_against, with_noise
from surgery.latency.replan import Attempt, Search, corrected_share
from surgery.latency.times import timed_chain, timed_layer
from surgery.options import runtime_of
from surgery.tables import explain_table, render, tradeoff_table
from tests.surgery.test_latency import Clock, X, resnet


class Line:
    """Plans of any share; the same loss at each. ``real`` is what a plan of that share takes."""

    def __init__(self, name="measured times", real=lambda share: share, loss=lambda share: (1 - share) ** 2):
        self.name, self.real, self.loss = name, real, loss

    def at_share(self, share):
        share = max(share, 0.1)
        return Proposal({self.name: SVD(round(1000 * share))} if share < 1 else {}, share, self.loss(share))

    def at_loss(self, loss):
        fitting = [share / 100 for share in range(10, 100) if self.loss(share / 100) <= loss]
        return self.at_share(min(fitting)) if fitting else None


def racing(*families, noise=lambda number: 0.0, spread=0.005):
    """What races give: each family's own truth, and the noise of that race."""
    by_name, seen = {family.name: family for family in families}, []

    def run(decisions):
        ((name, cut),) = decisions.items()
        share = by_name[name].real(cut.rank / 1000) + noise(len(seen))
        seen.append((name, cut.rank / 1000))
        return Raced(share, share - spread, share + spread)

    return run, seen


def never(proposal):
    raise AssertionError("these times are not to be measured again")


def attempt(predicted, measured):
    return Attempt(Proposal({"a": SVD(1)}, predicted, 0.0), Raced(measured, measured, measured), "measured times")


def test_after_a_race_that_was_no_faster_more_is_cut():
    assert corrected_share([], 0.7) == 0.7
    assert corrected_share([attempt(0.7, 1.0)], 0.7) == pytest.approx(0.4)
    assert corrected_share([attempt(0.7, 1.3), attempt(0.4, 1.1)], 0.7) == pytest.approx(-0.2)


def test_corrections_go_between_what_was_measured():
    assert corrected_share([attempt(0.6, 0.8)], 0.9) == pytest.approx(0.8)
    assert corrected_share([attempt(0.6, 0.8)], 0.7) == pytest.approx(0.4)  # cuts save half of what is foretold
    assert corrected_share([attempt(0.6, 0.8), attempt(0.4, 0.66)], 0.7) == pytest.approx(0.4 + 0.2 * 4 / 14)
    assert corrected_share([attempt(0.6, 0.8), attempt(0.4, 1.1)], 0.7) == pytest.approx(0.4)  # a race that says nothing is left out


@pytest.mark.parametrize("real", [lambda s: s, lambda s: 0.4 + 0.6 * s, lambda s: 1 - 1.3 * (1 - s)], ids=["right", "saves less", "saves more"])
def test_the_share_asked_for_is_found(real):
    family = Line(real=real)
    run, seen = racing(family)
    search = Search(0.75, run)
    replans = search.aim(family, never)
    assert abs(search.best.raced.share - 0.75) <= 0.03 * 0.75
    assert replans == len(seen) - 1 <= 3


def test_one_race_on_a_busy_machine_does_not_stop_the_search():
    """The first race falls into other work: the network looks slower than the original."""
    family = Line()
    run, seen = racing(family, noise=lambda number: 0.4 if number == 0 else 0.0)
    search, again = Search(0.7, run), []

    def mended(proposal):
        again.append(proposal.share)
        return family

    search.aim(family, mended)
    assert again == [0.7]  # what it rests on was measured again, once
    assert len(set(seen)) == len(seen) > 1
    assert search.best.raced.faster
    assert search.best.raced.share < 0.72


def test_times_that_foretell_less_than_nothing_are_measured_again():
    bad, good = Line(real=lambda s: 0.95), Line()
    bad.at_share = lambda share: Proposal({bad.name: SVD(500)}, -0.3, 0.1)
    run, seen = racing(good)
    search, again = Search(0.6, run), []
    search.aim(bad, lambda proposal: again.append(proposal) or good)
    assert len(again) == 1
    assert search.best.predicted == pytest.approx(0.6)
    assert len(seen) == 1


def test_another_sort_of_plan_that_is_measured_faster_wins_and_loses_less():
    """The table is wrong: plans by MACs take less time at the same loss than those that it likes."""
    mine, other = Line(real=lambda s: 0.3 + 0.7 * s), Line("MACs", real=lambda s: s)
    run, _ = racing(mine, other)
    search = Search(0.7, run)
    search.aim(mine, never)
    alone = search.best
    search.challenge(other)
    best = search.best
    assert best.family == "MACs"
    assert abs(best.raced.share - 0.7) <= 0.03 * 0.7
    assert best.proposal.loss < alone.proposal.loss


def test_another_sort_of_plan_that_is_slower_costs_one_race():
    mine, other = Line(), Line("one fraction everywhere", real=lambda s: 0.2 + 0.8 * s)
    run, seen = racing(mine, other)
    search = Search(0.7, run)
    search.aim(mine, never)
    search.challenge(other)
    assert search.best.family == mine.name
    assert len(seen) == 2


@pytest.mark.parametrize(("saves", "races"), [(1.0, 1), (0.6, 4)], ids=["the times are right", "the times are wrong"])
def test_what_is_far_slower_by_times_that_came_true_is_not_raced(saves, races):
    mine, other = Line(real=lambda s: 1 - saves * (1 - s)), Line("MACs", real=lambda s: 0.3 + 0.7 * s)
    run, seen = racing(mine, other)
    search = Search(0.7, run)
    search.aim(mine, never)
    search.challenge(other, lambda proposal: proposal.share + 0.2 * (mine.name not in proposal.decisions))
    assert len(seen) == races
    assert ("MACs" in dict(seen)) == (saves < 1)


def test_where_nothing_is_faster_the_others_are_tried_at_the_share_itself():
    mine, other = Line(real=lambda s: 1.1), Line("MACs", real=lambda s: s)
    run, _ = racing(mine, other)
    search = Search(0.7, run)
    search.aim(mine, lambda proposal: mine)
    assert not search.best.raced.faster
    search.challenge(other)
    assert search.best.family == "MACs"
    assert search.best.raced.share == pytest.approx(0.7)


def test_the_luckiest_of_several_races_runs_once_more():
    family = Line(real=lambda s: 1.0)
    run, _ = racing(family, noise=lambda number: -0.03 if number == 0 else 0.0, spread=0.025)
    search = Search(0.97, run)
    search.aim(family, never)
    assert search.best.raced.faster
    assert not search.confirmed().raced.faster


@pytest.mark.parametrize("seed", range(8))
def test_whatever_the_noise_no_slower_plan_is_confirmed(seed):
    """A network that no cut makes faster, on a machine whose races are off by tens of percents."""
    family, noise = Line(real=lambda s: 1.05), random.Random(seed)
    run, _ = racing(family, noise=lambda number: noise.gauss(0, 0.1), spread=0.2)
    search = Search(0.7, run)
    search.aim(family, lambda proposal: family)
    assert not search.confirmed().raced.faster


class Noisy(Clock):
    """Times of layers are off by as much as they say."""

    def __init__(self, spread, seed):
        super().__init__()
        self.spread, self.random = spread, random.Random(seed)

    def time_shapes(self, shapes, setup):
        self.timed += [shape.key for shape in shapes]
        return {s.key: Entry(self.seconds(s) * max(1 + self.random.gauss(0, self.spread), 0.1), self.spread) for s in shapes}, 1.0


@pytest.fixture
def noisy(monkeypatch, tmp_path):
    def made(spread, seed=0):
        device = Noisy(spread, seed)
        monkeypatch.setenv("SURGERY_CACHE", str(tmp_path / f"{spread}-{seed}"))
        monkeypatch.setattr("surgery.latency.times.time_shapes", device.time_shapes)
        monkeypatch.setattr("surgery.latency.solving.race_against", device.race)
        monkeypatch.setattr("surgery.latency.solving.in_terms_of_layers", lambda *a: 1.25)
        return device

    return made


def two_layers():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 64, 3, padding=1), nn.ReLU(), nn.Conv2d(64, 64, 3, padding=1), nn.ReLU(), nn.Conv2d(64, 32, 3)).eval()


def test_noise_that_hides_every_saving_leaves_all_as_it_is(noisy):
    noisy(0.6)
    plan = surgery.plan(two_layers(), Budget(latency=0.7), example_inputs=X)
    assert all(isinstance(decision, Keep) for decision in plan.values())
    assert plan.latency.kept


@pytest.mark.parametrize("seed", range(3))
def test_plans_by_noisy_times_take_what_was_asked_for(noisy, seed):
    device, model = noisy(0.1, seed), two_layers()
    plan = surgery.plan(model, Budget(latency=0.7), example_inputs=X)
    truth = device.whole(model, plan).share
    assert truth == pytest.approx(plan.latency.measured)
    assert plan.latency.kept or truth <= 1.1 * 0.7


def test_one_fraction_everywhere_is_a_ladder():
    model = two_layers()
    sites = host_for(model, observed=observe(model, X)).sites()
    kind = kind_named("tucker")
    spectra = Spectra([(site, kind) for site in sites], None)
    rungs = rungs_of(sites[1], [kind], spectra, lambda f: macs_under(sites[1], f), [], 8)
    assert len(rungs) == len(FRACTIONS)
    cut = [rung for rung in rungs if isinstance(rung.decision, Factorization)]
    assert all(a.cost >= b.cost and a.loss <= b.loss for a, b in itertools.pairwise(cut))
    half = rungs[FRACTIONS.index(0.5)]
    assert half.decision.ranks == (32, 32)
    net = surgery.decompose(model, {"2": half.decision})
    assert 0.9 * half.loss < surgery.report(net)["2"].error ** 2 <= half.loss  # a cut refines its ranks together, a ladder does not


@pytest.mark.parametrize(("guard", "runtime"), [("latency", "eager"), ("latency:openvino", "openvino"), ("step", "train"), ("macs", None), (3, None)])
def test_what_a_guard_measures_in(guard, runtime):
    assert runtime_of(guard) == runtime


def test_under_a_budget_cuts_that_do_not_pay_are_left_to_others(noisy):
    """With dear calls small layers are slower as chains: without the guard they are cut, with it the others bear it all."""
    model, clock = resnet(), noisy(0.001)
    clock.call = 6e-4  # a chain of three layers pays where it saves half of the MACs
    budget = Budget(macs=0.7)

    def slower(plan):
        sites = {site.name: site for site in host_for(model, observed=observe(model, X)).sites()}
        cut = {name: d for name, d in plan.items() if isinstance(d, Factorization)}
        before = {name: sum(clock.seconds(s) for s in timed_layer(sites[name], "onnxruntime")) for name in cut}
        after = {name: sum(clock.seconds(s) for s in timed_chain(sites[name], d, "onnxruntime")) for name, d in cut.items()}
        return [name for name in cut if after[name] >= before[name]]

    free = surgery.plan(model, budget, example_inputs=X)
    assert slower(free)
    guarded = surgery.plan(model, budget, example_inputs=X, guard="latency:onnxruntime")
    assert slower(guarded) == []
    assert any(isinstance(d, Factorization) for d in guarded.values())
    report = surgery.report(surgery.decompose(model, guarded, example_inputs=X))
    assert report.macs_after <= 0.7 * report.macs_before
    assert clock.races == 0
    noisy(0.001, seed=1).call = 1.0
    with pytest.raises(
        surgery.SurgeryValueError, match=r"the least that these layers can reach.*no chain was measured faster \(guard='latency:openvino'\)"
    ):
        surgery.plan(model, budget, example_inputs=X, guard="latency:openvino")


def test_the_tradeoff_and_the_alternatives_by_measured_time(noisy, tmp_path):
    pytest.importorskip("matplotlib")
    device, model = noisy(0.001), two_layers()
    found = surgery.tradeoff(model, by="latency", example_inputs=X)
    assert found.unit == "latency:onnxruntime"
    assert len(found.rows) >= 4
    assert all(row.used <= row.share for row in found.rows)
    assert all(a.error < b.error for a, b in itertools.pairwise(found.rows))
    assert device.races == 0  # by the times of layers; only plans are raced
    found.save_picture(tmp_path / "p.png")
    assert "share of time in onnxruntime" in render(tradeoff_table(found))
    plan = surgery.plan(model, Budget(latency=0.6), example_inputs=X)
    near = surgery.explain(model, "2", plan, by="latency:onnxruntime", example_inputs=X)
    assert all(a.cost < b.cost and a.error > b.error for a, b in itertools.pairwise(near))
    (mine,) = [one for one in near if one.chosen]
    site = next(site for site in host_for(model, observed=observe(model, X)).sites() if site.name == "2")
    truth = sum(device.seconds(shape) for shape in timed_chain(site, plan["2"], "onnxruntime"))
    assert mine.cost == pytest.approx(truth, rel=0.05)
    assert " ms" in render(explain_table(near))


def test_torch_compile_is_timed_by_layers_in_eager_mode_and_raced_as_it_is(monkeypatch):
    assert timed_in("compile") == "eager"
    assert timed_in("onnxruntime") == "onnxruntime"
    model, compiled = two_layers(), []
    monkeypatch.setattr(race, "RACE_SECONDS", 0.01)
    monkeypatch.setattr(torch, "compile", lambda function, dynamic: compiled.append(function.__code__) or function)
    sites = host_for(model, observed=observe(model, X)).sites()
    with race_against(model, X, "compile", sites) as found:
        raced = found.against({"2": surgery.Tucker(8, 8)})
    assert raced.share > 0
    assert len(set(compiled)) == 2  # each network under its own code: torch.compile forgets all but a few of one


def test_where_torch_compile_fails_the_reason_is_given(monkeypatch):
    def failing(function, dynamic):
        def call(*args):
            raise RuntimeError("no C++ compiler was found")

        return call

    monkeypatch.setattr(torch, "compile", failing)
    with (
        pytest.raises(surgery.SurgeryError, match=r"torch.compile fails on this network: .*no C.. compiler"),
        race_against(two_layers(), X, "compile", []),
    ):
        pass


class Mixed(nn.Module):
    """Batch norms that are folded, a transposed and a grouped layer, one that is called twice."""

    def __init__(self):
        super().__init__()
        self.first = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU())
        self.twice = nn.Conv2d(16, 16, 3, padding=2, dilation=2)
        self.grouped = nn.Conv2d(16, 32, 3, stride=2, padding=1, groups=2)
        self.up = nn.ConvTranspose2d(32, 16, 3, stride=2, output_padding=1)
        self.round = nn.Conv2d(16, 16, 3, padding=1, padding_mode="circular")

    def forward(self, x):
        return self.round(self.up(self.grouped(self.twice(self.twice(self.first(x)).relu()))))


@pytest.fixture(scope="module")
def mixed():
    torch.manual_seed(0)
    model = Mixed().eval()
    return model, host_for(model, observed=observe(model, X)).sites()


def test_cut_onnx_files_have_the_nodes_of_an_export_and_share_the_weights(mixed, tmp_path, monkeypatch):
    import onnx
    import onnxruntime

    model, sites = mixed
    (tmp_path / "here" / "weights").mkdir(parents=True)  # the caller's own, which are nobody's business
    monkeypatch.chdir(tmp_path / "here")
    decisions = {"first.0": surgery.Tucker(8, 2), "twice": surgery.Tucker(None, 8), "grouped": surgery.Channel(8), "up": surgery.Tucker(8, 16)}
    made = Exported.of(model, X, tmp_path)
    file = made.cut(sites, decisions)

    def layers(path):
        graph = onnx.load(str(path), load_external_data=False).graph
        shapes = {tensor.name: tuple(tensor.dims) for tensor in graph.initializer}
        return [(node.op_type, shapes.get(node.input[1])) for node in graph.node if "Conv" in node.op_type]

    whole = Exported.of(with_noise(model, decisions), X, tmp_path / "whole") if (tmp_path / "whole").mkdir() is None else None
    assert layers(file) == layers(whole.file)
    session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    (out,) = session.run(None, {session.get_inputs()[0].name: X.numpy()})
    assert out.shape == tuple(model(X).shape)
    assert np.isfinite(out).all()
    assert np.abs(out).max() > 1e-6
    assert onnx.load(str(made.file), load_external_data=False).graph.node == made.model.graph.node  # the original is as it was


def test_layers_whose_nodes_are_not_certain_are_exported_anew(mixed, tmp_path):
    model, sites = mixed
    made = Exported.of(model, X, tmp_path)
    assert made.cut(sites, {"round": surgery.Tucker(8, 8)}) is None  # its padding is a node of its own
    assert made.cut([], {}) is not None
    calls = [site for site in sites if site.name == "twice"]
    assert made.cut([replace(calls[0], calls=calls[0].calls[:1])], {"twice": surgery.Tucker(8, 8)}) is None


@pytest.mark.parametrize("of", [lambda model: model, lambda model: surgery.trace(model, torch.randn(1, 3, 8, 8))], ids=["module", "graph"])
def test_noise_goes_into_chains_only(of):
    model = of(two_layers())
    layers = {name: type(module) for name, module in model.named_modules()}
    before = {name: p.clone() for name, p in model.named_parameters()}
    net = with_noise(model, {"2": surgery.Tucker(8, 8)})
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    assert net.get_submodule("0").weight is model.get_submodule("0").weight  # no copy is made of what stays
    chain = [m for name, m in net.named_modules() if name.startswith("2.") and name not in layers]
    assert len(chain) == 3
    for layer in chain:
        assert 0.7 < float(layer.weight.std() * layer.weight[0].numel() ** 0.5) < 1.4
        assert layer.bias is None or layer.bias is model.get_submodule("2").bias


def test_layers_are_timed_where_they_are_whatever_the_first_input_is():
    """Lengths stay on the CPU beside a network that does not; no such device is needed to be asked."""
    with torch.device("meta"):
        model = two_layers()
    assert stopwatch._device_of(model, (torch.tensor([3, 4]), torch.randn(2, 3, 8, 8))) == "meta"
    assert stopwatch._device_of(nn.Flatten(), torch.randn(2, 3)) == "cpu"
