"""The schedule: when it cuts, what it keeps, and that a run goes on after an interruption as if there had been none."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import surgery
from passes import host_for
from passes.errors import SurgeryTypeError, SurgeryValueError
from surgery import DecompositionSchedule, Keep, Settled, Tucker
from surgery.cost.outcome import LatencyOutcome
from surgery.training.deeper import onto
from surgery.training.warm_up import WarmUp
from tests.networks import Small

INPUTS = torch.randn(8, 3, 12, 12, generator=torch.Generator().manual_seed(3))


def chains(model):
    return {site.name: site.chain for site in host_for(model).sites() if site.chain is not None}


def epoch(model, optimizer, number, ema=None):
    generator = torch.Generator().manual_seed(number)
    model.train()
    for _ in range(3):
        x, y = torch.randn(8, 3, 12, 12, generator=generator), torch.randint(0, 5, (8,), generator=generator)
        optimizer.zero_grad()
        functional.cross_entropy(model(x), y).backward()
        optimizer.step()
        if ema is not None:
            ema.update_parameters(model)


def sgd(model):
    return torch.optim.SGD(model.parameters(), 0.05, momentum=0.9, weight_decay=1e-3)


def test_it_acts_once_at_its_positions_and_says_what_it_did():
    model = Small()
    optimizer = sgd(model)
    schedule = DecompositionSchedule(decompose_at=1, reconstruct_at=3, ranks=0.5)
    told = []
    for number in range(5):
        told.append(schedule.step(number, model, optimizer))
        epoch(model, optimizer, number)
    assert [report is not None for report in told] == [False, True, False, True, False]
    assert told[1].passes == ("Decompose",)
    assert told[3].passes == ("Decompose", "Reconstruct")
    assert "conv2" in schedule.plan
    assert not chains(model)


def test_later_cuts_go_deeper_and_never_back():
    model = Small()
    optimizer = sgd(model)
    schedule = DecompositionSchedule(decompose_at=[0, 2, 4], ranks=[0.6, 0.3, 0.9], guard="none")
    ranks = []
    for number in range(5):
        schedule.step(number, model, optimizer)
        epoch(model, optimizer, number)
        ranks.append(chains(model)["conv2"])
    assert ranks[0] == ranks[1] == Tucker(15, 10)
    assert ranks[2] == ranks[3] == ranks[4] == Tucker(8, 5)
    assert set(map(id, optimizer.param_groups[0]["params"])) == set(map(id, model.parameters()))


EVERYTHING = {"warm_up": 4, "decay": "product", "balanced": False, "batch_norm": [INPUTS]}


@pytest.mark.parametrize(("options", "stop"), [({}, 3), (EVERYTHING, 3), (EVERYTHING, 5), (EVERYTHING, 7)])
def test_a_run_that_is_resumed_has_the_same_numbers_to_the_bit(options, stop):
    def begin():
        torch.manual_seed(7)
        model = Small().to(memory_format=torch.channels_last)
        optimizer = sgd(model)
        ema = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.8))
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 8)
        return model, optimizer, scheduler, ema, DecompositionSchedule(decompose_at=[2, 4], reconstruct_at=6, ranks=[0.7, 0.4], **options)

    def go(state, first, last):
        model, optimizer, scheduler, ema, schedule = state
        for number in range(first, last):
            schedule.step(number, model, optimizer, scheduler, also=[ema])
            epoch(model, optimizer, number, ema)
            scheduler.step()
        return state

    whole = go(begin(), 0, 8)
    half = go(begin(), 0, stop)
    file = io.BytesIO()
    torch.save([part.state_dict() for part in half], file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    resumed = begin()
    resumed[4].load_state_dict(saved[4], resumed[0], resumed[1], also=resumed[3])
    for part, numbers in zip(resumed[:4], saved[:4], strict=True):
        part.load_state_dict(numbers)
    assert surgery.report(resumed[0]).to_json() == surgery.report(half[0]).to_json()
    go(resumed, stop, 8)
    for index in (0, 3):
        mine, theirs = resumed[index].state_dict(), whole[index].state_dict()
        assert list(mine) == list(theirs)
        for key, value in theirs.items():
            assert torch.equal(mine[key], value), key


def test_training_goes_on_after_a_cut_for_the_current_batches():
    model, asked = Small(), []
    optimizer = sgd(model)
    epoch(model, optimizer, 0)

    def batches():
        asked.append(1)
        return [(INPUTS, torch.zeros(8, dtype=torch.long))]

    report = DecompositionSchedule(1, ranks=0.6, calibration=batches).step(1, model, optimizer)
    assert (len(asked), report.calibrated) == (1, 8)
    assert report["conv2"].output_error is not None
    for number in range(4):
        epoch(model, optimizer, number)
    assert all(float(p.detach().abs().max()) < 20 for p in model.parameters())


def test_an_optimizer_made_after_loading_has_the_same_order():
    model = Small()
    optimizer = sgd(model)
    schedule = DecompositionSchedule(decompose_at=0, ranks=0.5)
    schedule.step(0, model, optimizer)
    epoch(model, optimizer, 0)
    fresh = Small()
    resumed = DecompositionSchedule(decompose_at=0, ranks=0.5)
    resumed.load_state_dict(schedule.state_dict(), fresh, hooks=False)
    fresh.load_state_dict(model.state_dict())
    later = sgd(fresh)
    later.load_state_dict(optimizer.state_dict())
    for a, b in zip(model.parameters(), fresh.parameters(), strict=True):
        assert torch.equal(optimizer.state[a]["momentum_buffer"], later.state[b]["momentum_buffer"])


def test_computed_weights_come_back_plain_also_in_a_resumed_run():
    def build():
        model = Small()
        model.conv2 = nn.utils.parametrizations.weight_norm(model.conv2)
        return model

    model, schedule = build(), DecompositionSchedule(0, 2, 0.5, effective_weights=True)
    schedule.step(0, model)
    schedule.step(2, model)
    fresh = build()
    DecompositionSchedule(0, 2, 0.5, effective_weights=True).load_state_dict(schedule.state_dict(), fresh)
    fresh.load_state_dict(model.state_dict())
    assert torch.equal(fresh.eval()(INPUTS), model.eval()(INPUTS))


def test_it_cuts_by_itself_when_stable_ranks_have_settled():
    torch.manual_seed(0)
    model, schedule = Small(), DecompositionSchedule(Settled(tolerance=0.02, patience=2, earliest=2), ranks=0.5)
    optimizer = torch.optim.SGD(model.parameters(), 0.0)
    when = []
    for number in range(8):
        if number < 4:  # the spectrum moves: a growing direction in each layer
            with torch.no_grad():
                for layer in (model.conv1, model.conv2, model.tail[1], model.mix):
                    layer.weight[0] += 0.3 * (number + 1)
        if schedule.step(number, model, optimizer) is not None:
            when.append(number)
    assert when == [5]
    assert set(schedule.history[0]) == {"conv1", "conv2", "mix", "tail.1"}
    criterion = Settled(tolerance=1e-9, patience=3, earliest=0, latest=4)
    assert [criterion.has(k, [{"a": [float(j)]} for j in range(k + 1)]) for k in range(6)] == [False] * 4 + [True] * 2


def test_stable_ranks_are_those_of_the_unfoldings():
    from surgery.training.settling import stable_ranks

    model = Small().double()
    found = stable_ranks(model, include="conv2")
    w = model.conv2.weight.detach()
    for mine, matrix in zip(found["conv2"], (w.flatten(1), w.transpose(0, 1).flatten(1)), strict=True):
        assert mine == pytest.approx(float(matrix.square().sum() / torch.linalg.matrix_norm(matrix, 2) ** 2))


def test_the_warm_up_is_seen_by_no_scheduler_and_ends():
    model = Small()
    optimizer = sgd(model)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
    schedule = DecompositionSchedule(0, ranks=0.5, warm_up=4)
    schedule.step(0, model, optimizer, scheduler)
    used = []
    optimizer.register_step_pre_hook(lambda o, *_: used.append(o.param_groups[0]["lr"]))
    for number in range(3):
        epoch(model, optimizer, number)
        assert optimizer.param_groups[0]["lr"] == 0.05 * 0.9**number
        scheduler.step()
    rates = [0.05, 0.05, 0.05, 0.045, 0.045, 0.045]
    assert used[:6] == pytest.approx([rate * min((k + 1) / 5, 1) for k, rate in enumerate(rates)])


def test_each_cut_warms_up_anew_and_a_resumed_run_goes_on_where_it_was():
    model = Small()
    optimizer = sgd(model)
    schedule = DecompositionSchedule([0, 1], ranks=[0.7, 0.4], warm_up=5)
    for number in range(2):
        schedule.step(number, model, optimizer)
        epoch(model, optimizer, number)
    assert schedule.state_dict()["warmed_up"] == 3
    fresh = Small()
    later = sgd(fresh)
    resumed = DecompositionSchedule([0, 1], ranks=[0.7, 0.4], warm_up=5)
    resumed.load_state_dict(schedule.state_dict(), fresh, later)
    fresh.load_state_dict(model.state_dict())
    rates = []
    later.register_step_pre_hook(lambda o, *_: rates.append(o.param_groups[0]["lr"] / 0.05))
    epoch(fresh, later, 2)
    assert rates == pytest.approx([4 / 6, 5 / 6, 1])


def test_a_plateau_is_counted_anew_after_a_cut():
    model = Small()
    optimizer = sgd(model)
    scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=1)
    schedule = DecompositionSchedule(2, ranks=0.5)
    for number, loss in enumerate([1.0, 1.0, 3.0, 2.5, 2.4]):
        schedule.step(number, model, optimizer, scheduler)
        scheduler.step(loss)
    assert optimizer.param_groups[0]["lr"] == 0.05


@pytest.mark.parametrize("build", [torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW, torch.optim.NAdam], ids=lambda c: c.__name__)
@pytest.mark.parametrize("maximize", [False, True])
def test_decay_of_the_product_is_that_of_the_layer(build, maximize):
    """One step with it is the step, without decay, on the loss with half the squared norm of the product added."""
    model = Small().double()
    net = surgery.decompose(model, 0.5)
    twin = copy.deepcopy(net)
    decay, rate = 0.1, 0.01
    optimizer = build(net.parameters(), rate, weight_decay=decay, maximize=maximize)
    surgery.frobenius_decay(net, optimizer)
    plain = build(twin.parameters(), rate, weight_decay=0, maximize=maximize)
    sites = {site.name: site for site in host_for(twin).sites() if site.chain is not None}
    assert len(sites) >= 3
    loss = net(INPUTS.double()).square().sum()
    loss.backward()
    optimizer.step()
    penalty = sum(twin.get_submodule(name).weight.square().sum() for name in sites)
    inside = {id(p) for name in sites for piece in sites[name].pieces for p in [piece.weight]}
    penalty = decay / 2 * (penalty + sum(p.square().sum() for p in twin.parameters() if id(p) not in inside))
    if optimizer.param_groups[0].get("decoupled_weight_decay"):
        slopes = torch.autograd.grad(penalty, list(twin.parameters()))
        twin(INPUTS.double()).square().sum().backward()
        plain.step()
        with torch.no_grad():
            for p, slope in zip(twin.parameters(), slopes, strict=True):
                p.sub_(rate * slope)
    else:
        (twin(INPUTS.double()).square().sum() + (-penalty if maximize else penalty)).backward()
        plain.step()
    for a, b in zip(net.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("build", [torch.optim.SGD, torch.optim.AdamW], ids=lambda c: c.__name__)
@pytest.mark.parametrize("by_name", [False, True])
def test_decay_of_the_product_where_the_step_makes_its_gradients_itself(build, by_name):
    nets = [surgery.decompose(Small().double(), 0.5) for _ in range(2)]
    nets[1].load_state_dict(nets[0].state_dict())
    for net, inside in zip(nets, (False, True), strict=True):
        optimizer = build(net.parameters(), 0.01, weight_decay=0.1)
        surgery.frobenius_decay(net, optimizer)

        def closure(net=net, optimizer=optimizer):
            optimizer.zero_grad()
            loss = net(INPUTS.double()).square().mean()
            loss.backward()
            return loss

        for _ in range(2):
            if not inside:
                closure()
                optimizer.step()
            else:
                assert (optimizer.step(closure=closure) if by_name else optimizer.step(closure)) > 0
    for a, b in zip(*(net.parameters() for net in nets), strict=True):
        assert torch.equal(a, b)


def test_statistics_of_batch_norms_are_averages_over_the_batches_and_all_else_stays():
    from surgery.training.batch_norm import reestimate

    model = Small().train()
    model.tail.add_module("drop", nn.Dropout(0.5))
    model.bn1.num_batches_tracked += 5
    batches = [torch.randn(16, 3, 12, 12) for _ in range(3)]
    state, modes = torch.get_rng_state(), [m.training for m in model.modules()]
    assert reestimate(model, batches) == 2
    outputs = [model.conv1(x).detach() for x in batches]
    torch.testing.assert_close(model.bn1.running_mean, torch.stack([y.mean((0, 2, 3)) for y in outputs]).mean(0))
    torch.testing.assert_close(model.bn1.running_var, torch.stack([y.var((0, 2, 3)) for y in outputs]).mean(0))
    assert torch.equal(state, torch.get_rng_state())
    assert modes == [m.training for m in model.modules()]
    assert (model.bn1.momentum, int(model.bn1.num_batches_tracked)) == (0.1, 5)
    before = model.bn1.running_mean.clone()
    with pytest.raises(SurgeryValueError):
        reestimate(model, [batches[0], torch.randn(2, 4, 12, 12)])
    assert torch.equal(before, model.bn1.running_mean)


def test_a_step_that_would_be_slower_is_not_made(monkeypatch):
    """With a made-up clock: chains of layers with few channels lose, and the whole network wins only with at most one cut."""
    from surgery.training import step_time

    model, raced = Small(), []

    def pays(self, site, factorization, runtime):
        assert runtime == "train"
        return Keep("slow") if site.name == "conv1" else None

    def entry(seconds):
        return surgery.cost.profile.Entry(seconds)

    def race(now, after, inputs, runtimes, repeats):
        cut = sorted(chains(after))
        raced.append(cut)
        row = type("Row", (), {"verdict": "faster" if len(cut) <= 1 else "slower"})
        return type("Benchmark", (), {"rows": (row,)})

    monkeypatch.setattr("surgery.latency.Stopwatch.pays", pays)
    monkeypatch.setattr("surgery.latency.Stopwatch.times", lambda s, site, f, r: (entry(float(len(site.name))), entry(1.0)))
    monkeypatch.setattr(step_time, "benchmark", race)
    report = DecompositionSchedule(0, ranks=0.4, example_inputs=INPUTS).step(0, model)  # guard="step" is the default with inputs
    assert raced == [["conv2", "mix", "tail.1"], ["tail.1"]]
    assert list(chains(model)) == ["tail.1"]
    assert report["conv1"].reason == "slow"
    assert report["conv2"].reason == step_time.KEPT


@pytest.mark.parametrize(
    ("ranks", "guard", "held"),
    [(0.5, None, True), (surgery.Budget(macs=0.7), "step", True), (surgery.Budget(macs=0.7), None, False), ({"conv1": 0.5}, "step", False)],
)
def test_what_is_held_to_the_time_of_the_whole_step(monkeypatch, ranks, guard, held):
    from surgery.training import schedule

    model = Small()
    monkeypatch.setattr(schedule, "plan", lambda whole, *_, **__: surgery.plan(whole, {"conv1": 0.5, "conv2": 0.5}))
    monkeypatch.setattr(schedule, "never_slower", lambda now, whole, chosen, inputs: surgery.Plan({**chosen, "conv1": Keep("slow")}))
    DecompositionSchedule(0, ranks=ranks, guard=guard, example_inputs=INPUTS).step(0, model)
    assert list(chains(model)) == (["conv2"] if held else ["conv1", "conv2"])


def test_a_budget_of_step_time_is_measured(monkeypatch, tmp_path):
    """Real clock: whatever comes out, it is a plan with a measured share, or a reason."""
    monkeypatch.setenv("SURGERY_CACHE", str(tmp_path))
    monkeypatch.setattr("surgery.latency.race.RACE_SECONDS", 0.5)
    monkeypatch.setattr("surgery.cost.timing.GROUP_SECONDS", 1.0)
    model = nn.Sequential(nn.Conv2d(8, 24, 3, padding=1), nn.BatchNorm2d(24), nn.Conv2d(24, 24, 3, padding=1), nn.Dropout(), nn.Flatten())
    x, before, state = torch.randn(4, 8, 8, 8), copy.deepcopy(model.state_dict()), torch.get_rng_state()
    plan = surgery.plan(model, surgery.Budget(latency=0.9, runtime="train"), example_inputs=x)
    assert plan.latency.runtime.startswith("train")
    assert plan.latency.kept or plan.latency.measured < 1
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert all(m.training for m in model.modules())
    assert all(p.grad is None for p in model.parameters())


def test_layers_in_which_evbmf_sees_noise_can_be_cut_all_the_same():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(32, 48, 3))
    assert "noise" in surgery.plan(model)["0"].reason
    assert surgery.plan(model, "evbmf:noise=0.25")["0"] == Tucker(12, 8)
    assert surgery.plan(model, "evbmf:noise=tucker-1,weaken=0.2")["0"] == Tucker(24, None)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"decompose_at": -1}, SurgeryValueError, "at least 0"),
        ({"decompose_at": 2.5}, SurgeryTypeError, "an int"),
        ({"decompose_at": True}, SurgeryTypeError, "an int"),
        ({"decompose_at": []}, SurgeryValueError, "rising"),
        ({"decompose_at": [5, 5]}, SurgeryValueError, "rising"),
        ({"decompose_at": 5, "reconstruct_at": 5}, SurgeryValueError, "after the last cut at 5"),
        ({"decompose_at": [1, 2], "ranks": [0.5]}, SurgeryValueError, "2 cuts, got 1"),
        ({"ranks": "evbfm"}, SurgeryValueError, "ranks"),
        ({"guard": "step"}, SurgeryValueError, "example_inputs"),
        ({"guard": "no"}, SurgeryValueError, "guard"),
        ({"decay": "none"}, SurgeryValueError, "decay"),
        ({"warm_up": -3}, SurgeryValueError, "warm_up"),
        ({"rate": 0}, SurgeryValueError, r"rate: expected a share in \(0, 1\], got 0"),
        ({"rate": 1.5}, SurgeryValueError, r"rate: expected a share in \(0, 1\], got 1.5"),
        ({"rate": "lower"}, SurgeryTypeError, "rate: expected 'auto' or a number, got 'lower'"),
        ({"state": "keep"}, SurgeryValueError, "state"),
        ({"method": "tuckr"}, SurgeryValueError, "method"),
    ],
)
def test_arguments_that_mean_nothing_are_refused_at_once(arguments, error, message):
    with pytest.raises(error, match=message):
        DecompositionSchedule(**arguments)


@pytest.mark.parametrize(
    "arguments", [{"tolerance": 0}, {"patience": 0}, {"earliest": -1}, {"earliest": 5, "latest": 4}, {"every": 0}, {"tolerance": float("nan")}]
)
def test_criteria_that_mean_nothing_are_refused(arguments):
    with pytest.raises(SurgeryValueError, match="Settled"):
        Settled(**arguments)


def test_wrong_calls_are_refused_and_change_nothing():
    model = Small()
    optimizer = sgd(model)
    schedule = DecompositionSchedule(0, ranks={"re:conv2": (8, 8)}, warm_up=2)
    before = list(map(id, model.parameters()))
    with pytest.raises(SurgeryTypeError, match=r"do the surgery on model\.module"):
        schedule.step(0, nn.DataParallel(model), optimizer)
    with pytest.raises(SurgeryTypeError, match=r"do the surgery on model\._orig_mod"):
        schedule.step(0, torch.compile(model), optimizer)
    with pytest.raises(SurgeryTypeError, match="position"):
        schedule.step(0.0, model, optimizer)
    with pytest.raises(SurgeryTypeError, match="scheduler"):
        schedule.step(0, model, optimizer, optimizer)
    with pytest.raises(SurgeryValueError, match="rate, warm_up and decay"):
        schedule.step(0, model)
    with pytest.raises(SurgeryValueError, match="fails on them"):
        DecompositionSchedule(0, ranks=0.5, batch_norm=[torch.randn(2, 4, 12, 12)]).step(0, model, optimizer)
    with pytest.raises(SurgeryValueError, match="no layer"):
        DecompositionSchedule(0, ranks={"conv9": (8, 8)}).step(0, model, optimizer)
    assert before == list(map(id, model.parameters())) == list(map(id, optimizer.param_groups[0]["params"]))
    assert schedule.step(0, model, optimizer) is not None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": "x"}, "format"),
        ({"version": 9}, "version 9"),
        ({"plan": 3}, "'plan'"),
        ({"cuts_done": "1"}, "'cuts_done'"),
        ({"plan": {"format": "surgery.plan", "version": 1, "sites": {"conv7": {"kind": "tucker", "rank_out": 2, "rank_in": 2}}}}, "conv7"),
    ],
)
def test_states_that_do_not_fit_are_refused_and_change_nothing(change, message):
    model = Small()
    schedule = DecompositionSchedule(0, ranks=0.5)
    schedule.step(0, model)
    fresh = Small()
    optimizer = sgd(fresh)
    before = list(map(id, fresh.parameters()))
    with pytest.raises(SurgeryValueError, match=message):
        DecompositionSchedule(0, ranks=0.5).load_state_dict(schedule.state_dict() | change, fresh, optimizer)
    assert before == list(map(id, fresh.parameters())) == list(map(id, optimizer.param_groups[0]["params"]))


def test_cutting_again_leaves_what_is_to_be_kept_and_changes_the_kind_where_it_is_asked_to():
    net = surgery.decompose(Small(), {"conv1": (8, 2), "conv2": (8, 4), "tail.1": (8, 8)})
    wanted = surgery.Plan(
        {
            "conv1": surgery.Keep("mine"),
            "conv2": surgery.Spatial(5),
            "tail.1": surgery.Tucker(12, 4),
            "mix": surgery.SVD(3),
            "head": surgery.Keep("no"),
        }
    )
    found = onto(net, wanted)
    assert found["conv1"] == surgery.Keep("already decomposed")
    assert found["conv2"] == surgery.Spatial(5)
    assert found["tail.1"] == surgery.Tucker(8, 4)
    assert found["mix"] == surgery.SVD(3)
    assert onto(net, surgery.Plan({"tail.1": surgery.Tucker(16, 16)}))["tail.1"] == surgery.Keep("already decomposed")


def test_the_outcome_of_a_latency_budget_goes_with_the_network(monkeypatch):
    model, inputs = Small(), torch.randn(2, 3, 12, 12)
    outcome = LatencyOutcome(runtime="train", asked=0.9, predicted=0.9, measured=0.9, low=0.8, high=1.0, replans=0, batch=2, threads=1)
    chosen = surgery.Plan({"conv2": Tucker(8, 4)})
    chosen.latency = outcome
    monkeypatch.setattr("surgery.training.schedule.plan", lambda *_, **__: chosen)
    report = surgery.DecompositionSchedule(0, ranks=surgery.Budget(latency=0.9), example_inputs=inputs).step(0, model)
    assert report.latency == outcome


def test_a_step_that_fails_during_the_warm_up_leaves_the_rate_to_its_scheduler():
    parameter = torch.nn.Parameter(torch.ones(2))
    optimizer = torch.optim.SGD([parameter], lr=1.0)
    warming = WarmUp([optimizer], 3)

    def out_of_memory():
        raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        optimizer.step(out_of_memory)
    parameter.grad = torch.ones(2)
    optimizer.step()
    assert parameter.tolist() == pytest.approx([0.75, 0.75])  # a quarter of the rate, once
    assert optimizer.param_groups[0]["lr"] == 1.0
    with pytest.raises(RuntimeError):
        optimizer.step(out_of_memory)
    warming.remove()
    assert optimizer.param_groups[0]["lr"] == 1.0


def test_batches_for_batch_norms_that_do_not_fit_are_said_before_the_cut():
    model = Small().train()
    batches = [torch.randn(2, 3, 12, 12), torch.randn(2, 4, 12, 12)]
    schedule = DecompositionSchedule(0, ranks=0.5, batch_norm=batches)
    with pytest.raises(SurgeryValueError, match="batch_norm: Small fails on them"):
        schedule.step(0, model)
    assert schedule.cuts_done == 0
    assert surgery.report(model)["conv2"].status == "kept"


def test_a_state_that_does_not_fit_leaves_a_model_that_was_cut_before_as_it_was():
    schedule, model = DecompositionSchedule(0, ranks={"conv2": (8, 4)}), Small()
    schedule.step(0, model)
    other = DecompositionSchedule(0, ranks={"0": (4, 2)})
    other.step(0, nn.Sequential(nn.Conv2d(3, 8, 3)))
    keys = list(model.state_dict())
    with pytest.raises(SurgeryValueError, match="'0', which is no layer"):
        schedule.load_state_dict(other.state_dict(), model, hooks=False)
    assert list(model.state_dict()) == keys
    assert schedule.plan == surgery.Plan({"conv2": Tucker(8, 4)})


class NormAndAct(nn.BatchNorm2d):
    """As timm's: a batch norm that does more, and holds what does it."""

    def __init__(self, channels):
        super().__init__(channels)
        self.drop = nn.Dropout(0.9)

    def forward(self, x):
        return self.drop(super().forward(x)).relu()


class TwoDomains(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.first, self.second = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.BatchNorm2d(4)

    def forward(self, x, other=False):
        return (self.second if other else self.first)(self.conv(x))


def test_batch_norms_that_do_more_and_those_that_are_not_reached():
    from surgery.training.batch_norm import reestimate

    torch.manual_seed(0)
    batches = [torch.randn(16, 3, 12, 12) for _ in range(3)]
    model = nn.Sequential(nn.Conv2d(3, 8, 3), NormAndAct(8), nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8))
    reestimate(model, batches)
    with torch.no_grad():
        seen = [model[2](functional.batch_norm(y, None, None, training=True).relu()) for y in map(model[0], batches)]
    torch.testing.assert_close(model[3].running_mean, torch.stack([y.mean((0, 2, 3)) for y in seen]).mean(0))
    two = TwoDomains()
    two.second.running_mean += 3
    reestimate(two, batches)
    assert float(two.first.running_mean.abs().max()) > 0
    assert torch.equal(two.second.running_mean, torch.full((4,), 3.0))


def cut_and_trained():
    torch.manual_seed(0)
    model, schedule = Small(), DecompositionSchedule(0, 4, ranks=0.5)
    optimizer = sgd(model)
    schedule.step(0, model, optimizer)
    epoch(model, optimizer, 0)
    return model, optimizer, schedule


def test_numbers_that_were_loaded_before_the_schedule_stay():
    """In whatever order a run goes back to a checkpoint: the architecture is there already, and so is the state of the optimizer."""
    model, optimizer, schedule = cut_and_trained()
    saved = copy.deepcopy({"model": model.state_dict(), "optimizer": optimizer.state_dict(), "schedule": schedule.state_dict()})
    epoch(model, optimizer, 1)
    model.load_state_dict(saved["model"])
    optimizer.load_state_dict(saved["optimizer"])
    schedule.load_state_dict(saved["schedule"], model, optimizer)
    assert all(torch.equal(value, saved["model"][key]) for key, value in model.state_dict().items())
    first = next(iter(optimizer.state_dict()["state"].values()))["momentum_buffer"]
    assert torch.equal(first, next(iter(saved["optimizer"]["state"].values()))["momentum_buffer"])
    schedule.step(4, model, optimizer)
    whole, state = copy.deepcopy(model.state_dict()), schedule.state_dict()
    fresh = Small()
    fresh.load_state_dict(whole)
    DecompositionSchedule(0, 4, ranks=0.5).load_state_dict(state, fresh, sgd(fresh))
    assert all(torch.equal(value, whole[key]) for key, value in fresh.state_dict().items())


def test_a_network_that_is_still_cut_is_fused_for_a_state_after_the_fusing():
    model, optimizer, schedule = cut_and_trained()
    twin = copy.deepcopy(model)
    later = sgd(twin)
    schedule.step(4, model, optimizer)
    DecompositionSchedule(0, 4, ranks=0.5).load_state_dict(schedule.state_dict(), twin, later)
    assert not chains(twin)
    assert set(map(id, later.param_groups[0]["params"])) == set(map(id, twin.parameters()))


@pytest.mark.parametrize("how", [{"rate": 0.5}, {"rate": 1, "warm_up": 50}, {"rate": 1, "decay": "product"}], ids=["rate", "warm_up", "decay"])
def test_an_optimizer_that_takes_over_after_the_cut_is_acted_on_too(how):
    """A second stage of training, or a restart: ``step`` is given the new one."""
    torch.manual_seed(0)
    model = Small()
    optimizer, schedule = sgd(model), DecompositionSchedule(0, ranks=0.5, **how)
    schedule.step(0, model, optimizer)
    plain = copy.deepcopy(model)
    second, other = sgd(model), sgd(plain)
    schedule.step(1, model, second)
    epoch(model, second, 1)
    epoch(plain, other, 1)
    assert any(not torch.equal(a, b) for a, b in zip(model.parameters(), plain.parameters(), strict=True))
    model.load_state_dict(plain.state_dict())
    before = [p.detach().clone() for p in model.parameters()]
    first = schedule._hooked
    schedule.step(2, model, second)
    assert schedule._hooked is first  # the same one is left alone
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


def test_a_schedule_is_for_one_network():
    """Folds of a cross-validation, trials of a search: the second network would never be cut."""
    model, optimizer, schedule = cut_and_trained()
    other = Small()
    with pytest.raises(SurgeryValueError, match=r"another network than the one .* make a new DecompositionSchedule"):
        schedule.step(0, other, sgd(other))
    assert not chains(other)
    schedule.step(1, model, optimizer)
    copy.deepcopy(schedule).step(0, other, sgd(other))  # a copy has seen none
    schedule.load_state_dict(schedule.state_dict(), other, later := sgd(other))
    schedule.step(0, other, later)
    assert chains(other) == chains(model)


def test_an_average_inside_of_the_model_is_refused():
    class Task(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = Small()
            self.average = AveragedModel(self.net)

    task = Task()
    with pytest.raises(SurgeryValueError, match=r"'average' in it is an averaged copy .* give the part itself"):
        DecompositionSchedule(0, ranks=0.5).step(0, task)
    assert not chains(task)
    assert DecompositionSchedule(0, ranks=0.5).step(0, task.net, also=task.average) is not None
    assert chains(task.average.module) == chains(task.net)


def test_a_plateau_that_another_scheduler_holds_is_counted_anew_too():
    class Prepared:
        """As accelerate's."""

        def __init__(self, scheduler):
            self.scheduler = scheduler

        def step(self, loss):
            self.scheduler.step(loss)

    model = Small()
    optimizer = sgd(model)
    scheduler = Prepared(torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=1))
    schedule = DecompositionSchedule(2, ranks=0.5)
    for number, loss in enumerate([1.0, 1.0, 3.0, 2.5, 2.4]):
        schedule.step(number, model, optimizer, scheduler)
        scheduler.step(loss)
    assert optimizer.param_groups[0]["lr"] == 0.05


@pytest.mark.parametrize("register", ["register_hook", "register_post_accumulate_grad_hook"])
def test_hooks_of_a_weight_are_not_lost_in_silence(register):
    """Gradient masks, and optimizers that step in the backward pass: the factors would not have them."""
    model = Small()
    optimizer = sgd(model)
    before = copy.deepcopy(model.state_dict())
    handle = getattr(model.conv2.weight, register)(lambda gradient: None)
    schedule = DecompositionSchedule(0, 1, ranks=0.5)
    with pytest.raises(SurgeryValueError, match=r"conv2\.weight: hooks are registered on it"):
        schedule.step(0, model, optimizer)
    assert schedule.cuts_done == 0
    assert list(model.state_dict()) == list(before)
    assert surgery.report(surgery.decompose(model, 0.5))["conv2"].status == "decomposed"  # a copy never had it
    DecompositionSchedule(0, ranks=0.5, exclude="conv2").step(0, model, optimizer)
    assert "conv1" in chains(model)
    handle.remove()
    DecompositionSchedule(0, ranks=0.5).step(0, model, optimizer)
    getattr(model.conv2.core.weight, register)(lambda gradient: None)
    with pytest.raises(SurgeryValueError, match=r"conv2\.core\.weight: hooks"):
        surgery.reconstruct(model, optimizer=optimizer, inplace=True)
    assert "conv2" in chains(model)
