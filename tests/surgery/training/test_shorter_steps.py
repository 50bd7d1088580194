"""Factors go a part of the way: as at a lower rate of their own, whatever the optimizer, and nothing else is slowed down."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import surgery
from surgery import DecompositionSchedule, SurgeryValueError
from surgery.training.shorter_steps import ShorterSteps
from tests.networks import Small

X = torch.randn(4, 3, 12, 12, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
OPTIMIZERS = {
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


@pytest.mark.parametrize("build", OPTIMIZERS.values(), ids=OPTIMIZERS)
@pytest.mark.parametrize("rate", ["auto", 0.25])
def test_it_is_a_lower_rate_of_the_factors(build, rate):
    model = cut()
    twin = copy.deepcopy(model)
    optimizer = build(model.parameters())
    shorter = ShorterSteps(model, optimizer, rate)
    train(model, optimizer)
    threes, twos = factors(twin, "conv1"), factors(twin, "conv2")
    slow = {id(p) for p in (*threes, *twos)}
    others = [p for p in twin.parameters() if id(p) not in slow]
    reference = build([{"params": others}, {"params": threes}, {"params": twos}])
    for group, part in zip(reference.param_groups[1:], (1 / 3, 1 / 2) if rate == "auto" else (rate, rate), strict=True):
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


def test_a_failed_step_leaves_nothing_behind():
    model = cut()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    ShorterSteps(model, optimizer, "auto")
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
    assert torch.allclose(3 * (first - old), factors(twin, "conv1")[0] - old, atol=1e-9)


def test_the_schedule_shortens_steps_from_the_cut_until_chains_are_fused():
    def lengths(rate):
        torch.manual_seed(0)
        model = Small().double().train()
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        schedule = DecompositionSchedule(1, 2, ranks={"conv1": (4, 2)}, rate=rate)
        found = []
        for position in range(3):
            schedule.step(position, model, optimizer)
            module = model.conv1
            weight = module.weight if isinstance(module, nn.Conv2d) else next(module.children()).weight
            before = weight.detach().clone()
            train(model, optimizer, 1)
            found.append(float((weight.detach() - before).norm() / weight.grad.norm()))
        return found

    assert lengths("auto") == pytest.approx([0.1, 0.1 / 3, 0.1], rel=1e-4)
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
    assert float((first.detach() - before).norm()) == pytest.approx(float(first.grad.norm()) * 0.1 / 3, rel=1e-4)
