"""What a cut in the middle of training leaves as it was: chains that it does not touch, optimizers of all makes, copies that lie elsewhere."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional

import surgery
from surgery import DecompositionSchedule, SurgeryValueError
from surgery.training import step_time
from surgery.training.deeper import plan_of
from surgery.training.followers import Followers
from surgery.training.resuming import rebuild
from surgery.training.settling import stable_ranks
from surgery.training.shorter_steps import gains_of
from tests.networks import Small

X, Y = torch.randn(8, 3, 12, 12, generator=torch.Generator().manual_seed(3)), torch.arange(8) % 5


def network():
    torch.manual_seed(0)
    return Small()


def train(model, optimizer, steps=2):
    for _ in range(steps):
        optimizer.zero_grad()
        functional.cross_entropy(model(X), Y).backward()
        optimizer.step()


@pytest.mark.parametrize("state", ["reset", "project"])
@pytest.mark.parametrize("trained", [False, True])
def test_fused_sgd_goes_on_where_some_have_no_momentum_yet(state, trained):
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), 0.01, momentum=0.9, fused=True)
    if trained:
        train(model, optimizer)
    surgery.decompose(model, {"conv2": 0.5}, optimizer=optimizer, state=state, inplace=True)
    train(model, optimizer)
    assert all(optimizer.state[p]["momentum_buffer"] is not None for p in model.parameters())


def test_chains_that_a_second_cut_leaves_keep_their_highest_rate():
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    schedule = DecompositionSchedule([0, 1], ranks=[{"conv1": (8, 3), "conv2": 0.9}, {"conv1": (8, 3), "conv2": 0.4}])
    schedule.step(0, model, optimizer)
    train(model, optimizer)
    optimizer.param_groups[0]["lr"] = 0.01
    before = plan_of(model)
    gains = schedule.state_dict()["gains"]
    schedule.step(1, model, optimizer)
    assert schedule.state_dict()["gains"]["conv1"] == gains["conv1"]
    assert schedule.state_dict()["gains"]["conv2"] != gains["conv2"]
    assert [name for name, chain in plan_of(model).items() if chain != before[name]] == ["conv2"]
    train(model, optimizer)
    assert schedule.state_dict()["highest_rates"] == {"conv1": 0.1, "conv2": 0.01}


def test_a_copy_in_more_digits_has_its_statistics_taken_too():
    model, batches = network(), list(X.split(4))
    twin = copy.deepcopy(model).double()
    DecompositionSchedule(0, ranks=0.5, batch_norm=batches).step(0, model, also=twin)
    torch.testing.assert_close(twin.bn1.running_mean.float(), model.bn1.running_mean, rtol=1e-4, atol=1e-5)


def test_a_copy_that_cannot_run_the_batches_is_said_before_anything_is_cut():
    class Broken(Small):
        def forward(self, x):
            if self.broken:
                raise ValueError("no more")
            return super().forward(x)

    model = Broken()
    model.broken = False
    twin = copy.deepcopy(model)
    twin.broken = True
    before = list(map(id, model.parameters()))
    with pytest.raises(SurgeryValueError, match="batch_norm: Broken fails on them"):
        DecompositionSchedule(0, ranks=0.5, batch_norm=[X]).step(0, model, also=twin)
    assert before == list(map(id, model.parameters()))


def test_a_deeper_cut_races_what_would_result(monkeypatch):
    """Where a cut is taken back the chain that stands there stays: so it runs in the race, too."""
    raced = []

    def race(now, after, inputs, runtimes, repeats):
        raced.append((dict(plan_of(now)), dict(plan_of(after))))
        return type("Benchmark", (), {"rows": (type("Row", (), {"verdict": "slower" if len(raced) == 1 else "faster"}),)})

    def times(stopwatch, site, factorization, runtime):
        size = float(sum(r or 0 for r in factorization.ranks))
        return surgery.cost.profile.Entry(100.0), surgery.cost.profile.Entry(size if site.name == "conv1" else 0.0)

    model = surgery.decompose(network(), {"conv1": (12, 3), "conv2": (12, 8), "mix": 6}, method="tucker")
    before = dict(plan_of(model))
    whole = surgery.reconstruct(model)
    wanted = surgery.plan(whole, {"conv1": (8, 3), "conv2": (6, 4), "mix": 6})
    monkeypatch.setattr(step_time, "benchmark", race)
    monkeypatch.setattr("surgery.latency.Stopwatch.times", times)
    found = step_time.never_slower(model, whole, wanted, X)
    assert raced[0] == (before, {name: wanted[name] for name in before})
    assert raced[1] == (before, {**before, "conv1": wanted["conv1"]})
    assert found["conv1"] == wanted["conv1"]
    assert found["conv2"] == surgery.Keep(step_time.KEPT)
    assert found["mix"] == wanted["mix"]


class Tied(nn.Module):
    """Two layers with one weight, and one beside them."""

    def __init__(self):
        super().__init__()
        self.left, self.right, self.last = (nn.Conv2d(12, 12, 3, padding=1) for _ in range(3))
        self.right.weight = self.left.weight

    def forward(self, x):
        return self.last(self.left(x) + self.right(x.flip(-1)))


@pytest.mark.parametrize(
    ("saves", "kept"), [({"left": 0.2, "right": 1.0, "last": 0.5}, {"left", "right"}), ({"left": 0.9, "right": -0.8, "last": 0.5}, {"last"})]
)
def test_layers_with_one_weight_are_cut_together_or_not_at_all(saves, kept, monkeypatch):
    raced = []

    def race(now, after, inputs, runtimes, repeats):
        raced.append(set(plan_of(after)))
        return type("Benchmark", (), {"rows": (type("Row", (), {"verdict": "slower" if len(raced) == 1 else "faster"}),)})

    def times(stopwatch, site, factorization, runtime):
        return surgery.cost.profile.Entry(2.0), surgery.cost.profile.Entry(2.0 - saves[site.name])

    monkeypatch.setattr(step_time, "benchmark", race)
    monkeypatch.setattr("surgery.latency.Stopwatch.times", times)
    model, x = Tied(), torch.randn(2, 12, 8, 8)
    found = step_time.never_slower(model, model, surgery.plan(model, 0.5, guard="none"), x)
    assert raced == [{"left", "right", "last"}, kept]
    assert {name for name, decision in found.items() if not isinstance(decision, surgery.Keep)} == kept
    assert surgery.report(surgery.decompose(model, found))["left"].status == ("decomposed" if "left" in kept else "kept")


def test_a_chain_on_whose_layers_hooks_hang_stays_at_the_next_cut(monkeypatch):
    """Also where another process made the cut, whose result is built here."""
    fast = type("Benchmark", (), {"rows": (type("Row", (), {"verdict": "faster"}),)})
    monkeypatch.setattr(step_time, "benchmark", lambda *_, **__: fast)
    monkeypatch.setattr("surgery.latency.Stopwatch.times", lambda *_: (surgery.cost.profile.Entry(2.0), surgery.cost.profile.Entry(1.0)))
    model = network()
    schedule = DecompositionSchedule([0, 1], ranks=[0.9, 0.4], guard="step", example_inputs=X)
    schedule.step(0, model)
    seen = []
    next(model.conv2.children()).register_forward_hook(lambda *_: seen.append("here"))
    before, twin = plan_of(model), copy.deepcopy(model)
    schedule.step(1, model)
    assert plan_of(model)["conv2"] == before["conv2"]
    assert plan_of(model)["mix"] != before["mix"]
    rebuild(Followers(model=twin), schedule.plan)
    assert plan_of(twin) == plan_of(model)
    seen.clear()
    twin(X)
    assert seen == ["here"]


def test_batches_for_batch_norms_run_as_they_will_be_run():
    """In eval mode but for the norms, since a network in train mode may want what these batches do not have."""

    class Detector(Small):
        def forward(self, x, targets=None):
            assert not self.training or targets is not None, "targets should not be none when in training mode"
            return super().forward(x)

    model = Detector().train()
    before = model.bn1.running_mean.clone()
    DecompositionSchedule(0, ranks=0.5, batch_norm=list(X.split(4))).step(0, model)
    assert not torch.equal(model.bn1.running_mean, before)
    assert model.training


def test_an_optimizer_that_was_unhooked_is_hooked_again():
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    schedule = DecompositionSchedule(0, ranks=0.5, warm_up=4, rate=1)
    schedule.step(0, model, optimizer)
    schedule.load_state_dict(schedule.state_dict(), model, optimizer, hooks=False)
    rates = []
    schedule.step(1, model, optimizer)
    optimizer.register_step_pre_hook(lambda *_: rates.append(optimizer.param_groups[0]["lr"]))
    train(model, optimizer)
    assert rates == pytest.approx([0.1 / 5, 0.2 / 5])


@pytest.mark.parametrize("kept", [None, surgery.Keep("mine")])
def test_layers_that_are_to_stay_have_no_say_in_when_to_cut(kept):
    ranks = {"conv1": kept, "re:conv.*": 0.5}
    assert set(stable_ranks(network(), ranks)) == {"conv2"}
    model = network()
    torch.nn.utils.parametrizations.weight_norm(model.conv1)  # it could not be cut either
    assert set(stable_ranks(model, ranks)) == {"conv2"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ranks": surgery.Budget(macs=0.5)}, "needs example_inputs: without them MACs are not known"),
        ({"ranks": ["evbmf", surgery.Budget(latency=0.5)], "decompose_at": [1, 2]}, "needs example_inputs: without them there is nothing to time"),
        ({"method": "cp"}, "has no spectra"),
    ],
)
def test_what_no_cut_could_answer_is_refused_at_once(options, message):
    with pytest.raises(SurgeryValueError, match=message):
        DecompositionSchedule(**{"decompose_at": 30, **options})


def test_a_cut_inside_of_autocast_is_the_cut_outside():
    nets = [network(), network()]
    for net, enabled in zip(nets, (False, True), strict=True):
        optimizer = torch.optim.SGD(net.parameters(), 0.1, momentum=0.9)
        train(net, optimizer)
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            DecompositionSchedule(0, ranks=0.5).step(0, net, optimizer)
            gains = gains_of(net)
        assert gains == gains_of(net)
    for one, other in zip(*(net.parameters() for net in nets), strict=True):
        torch.testing.assert_close(one, other)
