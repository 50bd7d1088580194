"""Factors go a part of the way: as at a lower rate of their own, whatever the optimizer, and nothing else is slowed down."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import surgery
from passes import host_for
from surgery import DecompositionSchedule, SurgeryValueError
from surgery.training.chain_map import ChainMap
from surgery.training.shorter_steps import ShorterSteps, gains_of
from tests.networks import Small

X = torch.randn(4, 3, 12, 12, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
OPTIMIZERS = {
    "rprop": lambda groups: torch.optim.Rprop(groups, 0.001),
    "sgd": lambda groups: torch.optim.SGD(groups, 0.05, momentum=0.9, weight_decay=1e-2, nesterov=True),
    "adamw": lambda groups: torch.optim.AdamW(groups, 0.01, weight_decay=0.1),
    "rmsprop": lambda groups: torch.optim.RMSprop(groups, 0.001, momentum=0.5),
}


def cut():
    torch.manual_seed(0)
    return surgery.decompose(Small().double(), {"conv1": (4, 2), "conv2": surgery.Spatial(6)}).train()


def train(model, optimizer, steps=4):
    for _ in range(steps):
        optimizer.zero_grad()
        model(X).square().mean().backward()
        optimizer.step()


def factors(model, name):
    return [layer.weight for layer in model.get_submodule(name).children()]


def jacobians(site):
    """Of the chain's product by each of its factors, as matrices."""
    chain = ChainMap.of(site.geometry, site.chain, site.pieces)
    found = torch.autograd.functional.jacobian(chain.weight, chain.factors)
    return [j.reshape(-1, factor.numel()) for j, factor in zip(found, chain.factors, strict=True)]


def test_gains_are_mean_squared_singular_values():
    model = cut()
    told = gains_of(model)
    sites = [site for site in host_for(model).sites() if site.chain is not None]
    assert set(told) == {"conv1", "conv2"} == {site.name for site in sites}
    for site in sites:
        exact = [float(torch.linalg.svdvals(j).square().sum()) / j.shape[1] for j in jacobians(site)]
        assert told[site.name] == pytest.approx(exact, rel=0.25)
    for factor in factors(model, "conv1")[1:]:
        factor.data *= 3
    assert gains_of(model)["conv1"] == pytest.approx([a * b for a, b in zip(told["conv1"], (81, 9, 9), strict=True)], rel=1e-3)


@pytest.mark.parametrize("build", OPTIMIZERS.values(), ids=OPTIMIZERS)
@pytest.mark.parametrize("rate", ["auto", 0.25])
def test_it_is_a_lower_rate_of_the_factors(build, rate):
    model = cut()
    twin = copy.deepcopy(model)
    optimizer = build(model.parameters())
    gains = gains_of(model)
    shorter = ShorterSteps(model, optimizer, rate, gains, {})
    train(model, optimizer)
    slow = {name: factors(twin, name) for name in ("conv1", "conv2")}
    known = {id(p) for each in slow.values() for p in each}
    reference = build([{"params": [p]} for each in slow.values() for p in each] + [{"params": [p for p in twin.parameters() if id(p) not in known]}])
    parts = []
    for name, each in slow.items():
        n = len(each)
        if rate == "auto":  # where the gradient sets how far a step goes, what the Jacobian tells
            parts += [min(1, 1 / gain) / n for gain in gains[name]] if isinstance(optimizer, torch.optim.SGD) else [1 / n] * n
        else:
            parts += [rate] * n
    for group, part in zip(reference.param_groups[:-1], parts, strict=True):
        group["lr"] *= part
    train(twin, reference)
    for (name, mine), expected in zip(model.named_parameters(), twin.parameters(), strict=True):
        assert torch.allclose(mine, expected, atol=1e-9), name
    assert [group["lr"] for group in optimizer.param_groups] == [optimizer.defaults["lr"]]
    shorter.remove()
    again = copy.deepcopy(model)
    plain = build(again.parameters())
    plain.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    train(model, optimizer, 1)
    train(again, plain, 1)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))


def test_large_factors_move_their_product_no_further_than_the_layer_would_go():
    """The same function in factors of other sizes: at the rate of layers the product flies off, at the measured one it does not."""

    def way(rate, sizes):
        torch.manual_seed(0)
        model = Small().double().train()
        if sizes is not None:
            model = surgery.decompose(model, {"conv1": (8, 3)}).train()
            for factor, size in zip(factors(model, "conv1"), sizes, strict=True):
                factor.data *= size
        optimizer = torch.optim.SGD(model.parameters(), 1e-3)
        if sizes is not None and rate != 1:
            ShorterSteps(model, optimizer, rate, gains_of(model), {})
        before = surgery.reconstruct(model).conv1.weight.detach().clone()
        train(model, optimizer, 3)
        return float((surgery.reconstruct(model).conv1.weight.detach() - before).norm())

    layer = way(1, None)
    for sizes in ((1, 1, 1), (4, 0.25, 1), (8, 0.125, 1)):
        assert 0.1 * layer < way("auto", sizes) < 1.5 * layer
    assert way(1, (8, 0.125, 1)) > 5 * layer


def test_steps_keep_their_length_while_the_rate_falls_until_they_are_whole():
    model = cut()
    optimizer = torch.optim.SGD(model.parameters(), 1.0)
    highest = {}
    ShorterSteps(model, optimizer, "auto", {"conv1": [1.0, 4.0, 100.0], "conv2": [1.0, 1.0]}, highest)

    def lengths(rate):
        optimizer.param_groups[0]["lr"] = rate
        before = [f.detach().clone() for f in factors(model, "conv1")]
        train(model, optimizer, 1)
        return [float((f.detach() - b).norm() / f.grad.norm()) for f, b in zip(factors(model, "conv1"), before, strict=True)]

    third = 1e-3 / 3
    assert lengths(1e-4) == pytest.approx([third / 10, third / 40, third / 1000], rel=1e-3)  # a rate that rises: as at first
    assert lengths(1e-3) == pytest.approx([third, third / 4, third / 100], rel=1e-3)
    assert lengths(5e-4) == pytest.approx([third, third / 4, third / 100], rel=1e-3)
    assert lengths(1e-4) == pytest.approx([1e-4, third / 4, third / 100], rel=1e-3)
    assert lengths(1e-6) == pytest.approx([1e-6] * 3, rel=1e-3)
    assert highest == {"conv1": 1e-3, "conv2": 1e-3}


def test_a_failed_step_leaves_nothing_behind():
    model = cut()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    ShorterSteps(model, optimizer, 0.25, {}, {})
    before = [p.detach().clone() for p in model.parameters()]

    def out_of_memory():
        raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        optimizer.step(out_of_memory)
    assert all(torch.equal(p, old) for p, old in zip(model.parameters(), before, strict=True))
    train(model, optimizer, 1)
    first = factors(model, "conv1")[0]
    twin = cut()
    plain = torch.optim.SGD(twin.parameters(), 0.1)
    train(twin, plain, 1)
    old = factors(cut(), "conv1")[0]
    assert torch.allclose(4 * (first - old), factors(twin, "conv1")[0] - old, atol=1e-9)


def test_the_schedule_shortens_steps_from_the_cut_until_chains_are_fused():
    gain = 0.0

    def lengths(rate):
        nonlocal gain
        torch.manual_seed(0)
        model = Small().double().train()
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        schedule = DecompositionSchedule(1, 2, ranks={"conv1": (4, 2)}, rate=rate)
        found = []
        for position in range(3):
            schedule.step(position, model, optimizer)
            module = model.conv1
            gain = gains_of(model)["conv1"][0] if position == 1 else gain
            weight = module.weight if isinstance(module, nn.Conv2d) else next(module.children()).weight
            before = weight.detach().clone()
            train(model, optimizer, 1)
            found.append(float((weight.detach() - before).norm() / weight.grad.norm()))
        return found

    measured = lengths("auto")  # which also sets the gain
    assert measured == pytest.approx([0.1, 0.1 / 3 * min(1, 1 / gain), 0.1], rel=1e-4)
    assert lengths(1) == pytest.approx([0.1, 0.1, 0.1], rel=1e-4)
    assert lengths(0.5) == pytest.approx([0.1, 0.05, 0.1], rel=1e-4)


def test_a_run_that_goes_on_needs_the_optimizer():
    model = Small().double().train()
    schedule = DecompositionSchedule(0, ranks={"conv1": (4, 2)})
    schedule.step(0, model, torch.optim.SGD(model.parameters(), 0.1))
    later = DecompositionSchedule(0, ranks={"conv1": (4, 2)})
    fresh = Small().double().train()
    with pytest.raises(SurgeryValueError, match="optimizer: rate acts on it; give it here, or hooks=False"):
        later.load_state_dict(schedule.state_dict(), fresh)
    assert isinstance(fresh.conv1, nn.Conv2d)
    later.load_state_dict(schedule.state_dict(), fresh, hooks=False)
    optimizer = torch.optim.SGD(fresh.parameters(), 0.1)
    later.attach(fresh, optimizer)
    fresh.load_state_dict(model.state_dict())
    before = factors(fresh, "conv1")[0].detach().clone()
    train(fresh, optimizer, 1)
    first = factors(fresh, "conv1")[0]
    part = min(1, 1 / schedule.state_dict()["gains"]["conv1"][0]) / 3
    assert float((first.detach() - before).norm()) == pytest.approx(float(first.grad.norm()) * 0.1 * part, rel=1e-4)


def test_groups_may_come_and_go_after_the_cut():
    """Layers are thawed, or frozen, while training goes on: their factors go a part of the way as well."""
    model = cut()
    plain = copy.deepcopy(model)
    mine, other = (torch.optim.SGD([{"params": [net.head.weight]}], 0.05) for net in (model, plain))
    shorter = ShorterSteps(model, mine, 0.5, {}, {})
    for net, optimizer in ((model, mine), (plain, other)):
        optimizer.add_param_group({"params": factors(net, "conv2"), "lr": 0.02})
        del optimizer.param_groups[0]
    starts = [p.detach().clone() for p in factors(model, "conv2")]
    train(model, mine, 1)
    train(plain, other, 1)
    for start, whole, part in zip(starts, factors(plain, "conv2"), factors(model, "conv2"), strict=True):
        assert not torch.equal(whole, start)
        assert torch.allclose(part - start, 0.5 * (whole - start))
    shorter.remove()
    train(model, mine, 1)
