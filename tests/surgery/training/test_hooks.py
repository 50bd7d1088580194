"""What a schedule hangs into the steps of optimizers: its order, steps that call the one of a base class, wrappers, optimizers of other libraries."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional

import surgery
from passes import host_for
from surgery import DecompositionSchedule, Settled, SurgeryTypeError, SurgeryValueError
from surgery.training.chain_map import ChainMap
from surgery.training.decay import frobenius_decay
from tests.networks import Small

X, Y = torch.randn(8, 3, 12, 12, generator=torch.Generator().manual_seed(3)), torch.arange(8) % 5


def train(model, optimizer, steps=3):
    for _ in range(steps):
        optimizer.zero_grad()
        functional.cross_entropy(model(X), Y).backward()
        optimizer.step()


def network():
    torch.manual_seed(0)
    return Small()


def chains(model):
    return [site for site in host_for(model).sites() if site.chain is not None and site.tied_to is None]


class Calls(torch.optim.SGD):
    """Its step calls the one of its base class: torch hangs the hooks into both."""

    def step(self, closure=None):
        return super().step(closure)


class CallsAdamW(torch.optim.AdamW):
    def step(self, closure=None):
        return super().step(closure)


@pytest.mark.parametrize("closure", [False, True])
def test_a_shortened_step_shortens_the_decay_of_the_product_with_it(closure):
    model, share = network(), 0.25
    optimizer = torch.optim.AdamW(model.parameters(), 0.1, weight_decay=0.2)
    DecompositionSchedule(0, ranks=0.5, decay="product", rate=share, balanced=False).step(0, model, optimizer)
    wanted = {}
    for site in chains(model):
        chain = ChainMap.of(site.geometry, site.chain, site.pieces)
        for piece, slope in zip(site.pieces, chain.pull_back(chain.weight()), strict=True):
            wanted[piece.weight] = piece.weight.detach() - share * 0.1 * 0.2 * slope
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step((lambda: torch.zeros(())) if closure else None)
    for parameter, value in wanted.items():
        torch.testing.assert_close(parameter.detach(), value.float())


@pytest.mark.parametrize(("calls", "plain"), [(Calls, torch.optim.SGD), (CallsAdamW, torch.optim.AdamW)])
@pytest.mark.parametrize("options", [{}, {"decay": "product"}, {"warm_up": 4}, {"decay": "product", "rate": 0.5}], ids=str)
def test_a_step_that_calls_the_one_of_its_base_class_does_everything_once(calls, plain, options):
    plain([nn.Parameter(torch.ones(1))], 0.1)  # hooks come into a class with its first instance
    found = []
    for build in (calls, plain):
        model = network()
        optimizer = build(model.parameters(), 0.05, weight_decay=0.1)
        schedule = DecompositionSchedule(0, ranks=0.5, **options)
        schedule.step(0, model, optimizer)
        train(model, optimizer)
        found.append(([p.detach().clone() for p in model.parameters()], schedule.state_dict()["warmed_up"]))
    assert found[0][1] == found[1][1]
    for mine, wanted in zip(found[0][0], found[1][0], strict=True):
        assert torch.equal(mine, wanted)


def test_a_step_that_failed_is_made_again_with_its_decay_once():
    models = [surgery.decompose(network(), 0.5) for _ in range(2)]
    optimizers = [torch.optim.SGD(model.parameters(), 0.05, weight_decay=0.1) for model in models]
    for model, optimizer in zip(models, optimizers, strict=True):
        frobenius_decay(model, optimizer)
        functional.cross_entropy(model(X), Y).backward()

    def fail(*_):
        raise RuntimeError("on the way")

    hook = optimizers[0].register_step_pre_hook(fail)
    with pytest.raises(RuntimeError, match="on the way"):
        optimizers[0].step()
    hook.remove()
    for optimizer in optimizers:
        optimizer.step()
    for mine, wanted in zip(*(model.parameters() for model in models), strict=True):
        assert torch.equal(mine, wanted)


class Foreign(torch.optim.Optimizer):
    """Of no library that is known here: it shrinks parameters, and goes by the sign of gradients."""

    def __init__(self, parameters, lr, weight_decay):
        super().__init__(parameters, {"lr": lr, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                p.mul_(1 - group["lr"] * group["weight_decay"]).sub_(group["lr"] * p.grad.sign())


def test_decay_of_products_asks_how_an_unknown_optimizer_decays():
    model = network()
    before, names = copy.deepcopy(model.state_dict()), list(model.state_dict())
    optimizer = Foreign(model.parameters(), 0.01, 0.5)
    schedule = DecompositionSchedule(0, ranks=0.5, decay="product", rate=1)
    with pytest.raises(SurgeryTypeError, match=r"whether Foreign adds weight_decay to gradients.*decoupled_weight_decay"):
        schedule.step(0, model, optimizer)
    assert names == list(model.state_dict())
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    optimizer.param_groups[0]["decoupled_weight_decay"] = True
    schedule.step(0, model, optimizer)
    site = next(site for site in chains(model) if site.name == "conv2")
    chain = ChainMap.of(site.geometry, site.chain, site.pieces)
    wanted = [f - 0.01 * 0.5 * slope for f, slope in zip(chain.factors, chain.pull_back(chain.weight()), strict=True)]
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    for piece, value in zip(site.pieces, wanted, strict=True):
        torch.testing.assert_close(piece.weight.detach(), value.float())


class Around:
    """As Lookahead of timm is made: groups of the optimizer inside, and no step that hooks know of."""

    def __init__(self, inside):
        self._base_optimizer, self.param_groups, self.state = inside, inside.param_groups, {}

    def step(self, closure=None):
        return self._base_optimizer.step(closure)

    def zero_grad(self):
        self._base_optimizer.zero_grad()


def test_the_optimizer_inside_of_a_wrapper_is_what_follows():
    found = []
    for wrap in (Around, lambda inside: inside):
        model = network()
        inside = torch.optim.AdamW(model.parameters(), 0.01)
        optimizer = wrap(inside)
        train(model, optimizer)
        DecompositionSchedule(0, ranks=0.5).step(0, model, optimizer)
        assert set(inside.state) <= set(model.parameters())
        inside.state_dict()
        train(model, optimizer)
        found.append([p.detach().clone() for p in model.parameters()])
    for mine, wanted in zip(*found, strict=True):
        assert torch.equal(mine, wanted)


def test_what_calls_no_hooks_is_refused_before_the_cut():
    class NoHooks:
        def __init__(self, parameters):
            self.param_groups, self.state = [{"params": list(parameters), "lr": 0.1}], {}

        def step(self):
            pass

    model = network()
    optimizer = NoHooks(model.parameters())
    with pytest.raises(SurgeryTypeError, match="NoHooks calls no hooks"):
        DecompositionSchedule(0, ranks=0.5).step(0, model, optimizer)
    assert not chains(model)
    DecompositionSchedule(0, ranks=0.5, rate=1).step(0, model, optimizer)
    assert {id(p) for p in optimizer.param_groups[0]["params"]} == set(map(id, model.parameters()))


class OwnRate(torch.optim.Optimizer):
    """It finds its rate by itself, as Adafactor of transformers does."""

    def __init__(self, parameters):
        super().__init__(parameters, {"lr": None, "eps": 1e-3})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                p.sub_(0.01 * p.grad)


def test_an_optimizer_without_a_learning_rate():
    model = network()
    optimizer = OwnRate(model.parameters())
    with pytest.raises(SurgeryValueError, match="warm_up: OwnRate has no learning rate in its groups"):
        DecompositionSchedule(0, ranks=0.5, warm_up=3).step(0, model, optimizer)
    assert not chains(model)
    DecompositionSchedule(0, ranks=0.5).step(0, model, optimizer)
    before = {p: p.detach().clone() for p in model.parameters()}
    train(model, optimizer, 1)
    parts = {piece.weight: len(site.pieces) for site in chains(model) for piece in site.pieces}
    for parameter, start in before.items():
        torch.testing.assert_close(parameter.detach(), start - 0.01 * parameter.grad / parts.get(parameter, 1))


def test_groups_stay_in_the_order_of_the_model_where_weights_are_computed():
    model = network()
    nn.utils.parametrizations.weight_norm(model.conv2)
    assert model.conv2.bias is not None
    optimizer = torch.optim.SGD(model.named_parameters(), 0.05, momentum=0.9)
    train(model, optimizer)
    with pytest.warns(UserWarning, match="is begun again"):
        surgery.decompose(model, {"conv2": (4, 4)}, effective_weights=True, optimizer=optimizer, inplace=True)
    for _ in range(2):  # cut, and fused back
        group = optimizer.param_groups[0]
        assert list(map(id, group["params"])) == list(map(id, model.parameters()))
        assert group["param_names"] == [name for name, _ in model.named_parameters()]
        surgery.reconstruct(model, optimizer=optimizer, inplace=True)


def test_settling_looks_at_what_is_going_to_be_cut():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 24), nn.ReLU(), nn.Linear(24, 8))
    schedule = DecompositionSchedule(Settled(earliest=0, patience=2), ranks={"re:.*": 0.5}, method="svd")
    schedule.step(0, model, torch.optim.SGD(model.parameters(), 0.1))
    assert set(schedule.history[0]) == {"0", "2"}
    normed = network()
    nn.utils.parametrizations.weight_norm(normed.conv2)
    schedule = DecompositionSchedule(Settled(), ranks=0.5, include="conv2", effective_weights=True)
    schedule.step(1, normed, torch.optim.SGD(normed.parameters(), 0.1))
    assert set(schedule.history[0]) == {"conv2"}
    schedule = DecompositionSchedule(Settled(), ranks={"conv2": 8}, method="cp")
    schedule.step(1, network(), None)
    assert set(schedule.history[0]) == {"conv2"}
    with pytest.raises(SurgeryValueError, match=r"decompose_at: Settled\(\.\.\.\) finds no layer to look at"):
        DecompositionSchedule(Settled(), ranks=0.5).step(1, model, torch.optim.SGD(model.parameters(), 0.1))


def test_nothing_is_cut_to_be_fused_back_at_once():
    for when in (Settled(earliest=0, latest=None, tolerance=100.0), 1):
        model = network()
        before = list(map(id, model.parameters()))
        schedule = DecompositionSchedule(when, reconstruct_at=3, ranks=0.5)
        assert [schedule.step(position, model, torch.optim.SGD(model.parameters(), 0.1)) for position in (3, 4, 5)] == [None] * 3
        assert before == list(map(id, model.parameters()))


def test_a_default_device_changes_nothing():
    """As ``torch.set_default_device("cuda")`` does it; there is always "meta"."""
    model, other, batches = network(), network(), [X]
    optimizer = torch.optim.SGD(model.parameters(), 0.05)
    with torch.device("meta"):
        schedule = DecompositionSchedule(0, ranks=0.5, calibration=batches, batch_norm=batches, decay="product")
        assert schedule.step(0, model, optimizer) is not None
        train(model, optimizer, 1)
        surgery.decompose(other, {"conv2": 4}, method="cp")
    assert schedule.state_dict()["plan"] is not None
    assert all(p.device.type == "cpu" and bool(p.isfinite().all()) for p in model.parameters())
