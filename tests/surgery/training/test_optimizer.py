"""Optimizers, gradients and averaged copies live through a cut and a reconstruction."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel

import surgery
from passes import host_for
from passes.errors import SurgeryTypeError, SurgeryValueError
from passes.parity import assert_parity
from surgery import CP, SVD, Channel, Depthwise, Spatial, Tucker
from surgery.training.chain_map import ChainMap
from tests.networks import Kinds, Small
from tests.surgery.test_tied import Siamese
from tests.surgery.test_tied import X as SIAMESE_INPUT

KINDS = [Tucker(5, 4), Tucker(5, None), Tucker(None, 3), Spatial(4), Channel(5), Depthwise(2), CP(4)]
OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, 0.05, momentum=0.9, nesterov=True),
    "adam": lambda p: torch.optim.Adam(p, 1e-3, amsgrad=True),
    "adamw-foreach": lambda p: torch.optim.AdamW(p, 1e-3, foreach=True),
    "adamw-fused": lambda p: torch.optim.AdamW(p, 1e-3, fused=True),
    "nadam": lambda p: torch.optim.NAdam(p, 1e-3),
    "radam": lambda p: torch.optim.RAdam(p, 1e-3),
    "adamax": lambda p: torch.optim.Adamax(p, 1e-3),
    "adagrad": lambda p: torch.optim.Adagrad(p, 1e-2),
    "adadelta": lambda p: torch.optim.Adadelta(p),
    "rmsprop": lambda p: torch.optim.RMSprop(p, 1e-3, momentum=0.9, centered=True),
    "asgd": lambda p: torch.optim.ASGD(p, 1e-2),
}


def chain_map(layer, factorization, noise=0.1):
    """The map of a layer's chain, its factors moved off the point of the split, as training does."""
    net = surgery.decompose(nn.Sequential(layer.double()), {"0": factorization})
    (site,) = host_for(net).sites()
    with torch.no_grad():
        for piece in site.pieces:
            piece.weight.add_(noise * torch.randn_like(piece.weight) * piece.weight.std())
    return ChainMap.of(site.geometry, site.chain, site.pieces)


def dense(chain):
    """The Jacobian as a matrix, weights x factors, by finite differences: nothing of the code under test but ``weight``."""
    flat = torch.cat([f.flatten() for f in chain.factors])
    columns = []
    for k in range(len(flat)):
        step = torch.zeros_like(flat)
        step[k] = 0.5  # multilinear: in one entry the weight is a straight line
        ends = [chain.weight(*unflat(flat + sign * step, chain)) for sign in (1, -1)]
        columns.append((ends[0] - ends[1]).flatten())
    return torch.stack(columns, 1)


def unflat(flat, chain):
    return [part.reshape(f.shape) for part, f in zip(flat.split([f.numel() for f in chain.factors]), chain.factors, strict=True)]


def flat(tensors):
    return torch.cat([t.flatten() for t in tensors])


def layers():
    yield from [(nn.Conv2d(6, 7, 3), k) for k in KINDS]
    yield nn.Conv2d(6, 8, 3, groups=2), Tucker(4, 4)
    yield nn.ConvTranspose2d(6, 7, 3), Tucker(4, 3)
    yield nn.ConvTranspose2d(4, 8, 3, groups=2), Spatial(4)
    yield nn.Linear(9, 7), SVD(4)
    yield nn.Conv1d(5, 6, 3), Tucker(3, 3)


cases = pytest.mark.parametrize(("layer", "factorization"), list(layers()), ids=lambda v: str(v)[:40])


@cases
def test_moments_go_by_the_jacobian(layer, factorization):
    chain = chain_map(layer, factorization)
    jacobian = dense(chain)
    gradient = torch.randn_like(chain.weight())
    torch.testing.assert_close(flat(chain.pull_back(gradient)), jacobian.mT @ gradient.flatten())
    for moments in (chain.pull_back(gradient), [torch.randn_like(f) for f in chain.factors]):  # one that can be had exactly, one that cannot
        expected = torch.linalg.pinv(jacobian.mT, rtol=1e-9) @ flat(moments)
        found = chain.least_norm(moments, tolerance=1e-10)
        torch.testing.assert_close(found.flatten(), expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))


@cases
def test_second_moments_are_those_of_uncorrelated_gradients_and_never_negative(layer, factorization):
    chain = chain_map(layer, factorization)
    squares = torch.rand_like(chain.weight()) ** 4
    found, expected = chain.pull_back_squares(squares), dense(chain).square().mT @ squares.flatten()
    assert all(bool((f >= 0).all()) for f in found)
    if isinstance(factorization, Tucker) and None not in factorization.ranks:  # exact for the core; on the average for the two beside it
        sizes = [f.numel() for f in chain.factors]
        torch.testing.assert_close(found[1].flatten(), expected.split(sizes)[1])
        for mine, theirs in zip(found, expected.split(sizes), strict=True):
            assert 0.5 < float(mine.sum() / theirs.sum()) < 2
    else:
        torch.testing.assert_close(flat(found), expected)
    constant = torch.full_like(squares, 0.3)
    torch.testing.assert_close(chain.squares_of(chain.pull_back_squares(constant)), constant)
    back = chain.squares_of(found)
    assert bool((back >= 0).all())
    torch.testing.assert_close(flat(chain.pull_back_squares(back)), flat(found), rtol=0.5, atol=0.05 * float(flat(found).max()))


@pytest.mark.parametrize("build", [torch.optim.Adam, torch.optim.Adamax], ids=["adam", "adamax"])
def test_second_moments_of_correlated_gradients_are_of_the_size_that_the_factors_see(build):
    """Gradients of a real layer lie along the directions that a cut keeps, and add up there; their average tells by how much."""
    generator = torch.Generator().manual_seed(3)
    patterns = surgery.reconstruct(surgery.decompose(nn.Sequential(nn.Conv2d(24, 32, 3, bias=False).double()), {"0": (4, 4)}))[0].weight.detach()
    net = nn.Sequential(nn.Conv2d(24, 32, 3, bias=False).double())
    net[0].weight.data = patterns + 0.02 * torch.randn(patterns.shape, generator=generator)
    bases = [torch.linalg.svd(patterns.transpose(0, k).flatten(1), full_matrices=False)[0][:, :4] for k in (0, 1)]
    optimizer = build(net.parameters(), 0.0, betas=(0.9, 0.99))
    seen = []
    for _ in range(300):
        inside = torch.randn(4, 4, 3, 3, generator=generator, dtype=torch.float64)
        gradient = torch.einsum("oa,ib,abhw->oihw", *bases, inside) + 0.02 * torch.randn(patterns.shape, generator=generator)
        net[0].weight.grad = gradient
        optimizer.step()
        seen.append(gradient)
    (key,) = {"exp_avg_sq", "exp_inf"} & set(optimizer.state[net[0].weight])
    whole = float(optimizer.state[net[0].weight][key].square().sum())
    surgery.decompose(net, {"0": (4, 4)}, optimizer=optimizer, balanced=True, inplace=True)
    (site,) = host_for(net).sites()
    chain = ChainMap.of(site.geometry, site.chain, site.pieces)
    under = [chain.pull_back(g) for g in seen]
    for k, piece in enumerate(site.pieces):
        told = optimizer.state[piece.weight][key]
        real = torch.stack([u[k] for u in under]).square()
        real = real.mean(0) if key == "exp_avg_sq" else real.amax(0).sqrt()
        assert 0.5 < float(told.sum() / real.sum()) < 2, piece.name
    surgery.reconstruct(net, optimizer=optimizer, inplace=True)
    assert 0.2 < float(optimizer.state[net[0].weight][key].square().sum()) / whole < 5


def train(model, optimizer, inputs, steps=3, also=()):
    generator = torch.Generator().manual_seed(1)
    for _ in range(steps):
        optimizer.zero_grad()
        loss = model(inputs).float()
        (loss * torch.randn(loss.shape, generator=generator)).sum().backward()
        optimizer.step()
        for copied in also:
            copied.update_parameters(model)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimizer_goes_on_after_the_cut_and_after_the_way_back(name, images):
    model = Small().train()
    optimizer = OPTIMIZERS[name](model.parameters())
    train(model, optimizer, images)
    old = model.conv1.weight
    state = {k: v.clone() if isinstance(v, torch.Tensor) else v for k, v in optimizer.state[old].items()}
    order = [n for n, _ in model.named_parameters()]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert surgery.decompose(model, {"re:.*": 0.6}, optimizer=optimizer, inplace=True) is model
    held = optimizer.param_groups[0]["params"]
    assert list(map(id, held)) == list(map(id, model.parameters()))
    assert old not in optimizer.state
    for parameter in model.conv1.parameters():
        new = optimizer.state[parameter]
        assert new.keys() == state.keys()
        for key, value in state.items():
            if isinstance(value, torch.Tensor) and value.ndim:
                assert new[key].shape == parameter.shape
                assert new[key].stride() == parameter.stride()
                assert not new[key].requires_grad
                assert key in ("exp_avg", "momentum_buffer", "grad_avg", "ax") or bool((new[key] >= 0).all())
            elif isinstance(value, torch.Tensor):
                assert new[key] == value
                assert all(new[key] is not optimizer.state[p][key] for p in model.conv1.parameters() if p is not parameter)
    train(model, optimizer, images)
    surgery.reconstruct(model, optimizer=optimizer, inplace=True)
    assert [n for n, _ in model.named_parameters()] == order
    assert list(map(id, optimizer.param_groups[0]["params"])) == list(map(id, model.parameters()))
    assert optimizer.state[model.conv1.weight].keys() == state.keys()
    train(model, optimizer, images)
    assert all(bool(p.isfinite().all()) for p in model.parameters())


def test_momentum_of_a_layer_at_full_rank_survives_there_and_back(images):
    model = Small().double()
    optimizer = torch.optim.SGD(model.parameters(), 0.01, momentum=0.9)
    train(model, optimizer, images.double())
    before = optimizer.state[model.conv2.weight]["momentum_buffer"].clone()
    surgery.decompose(model, {"conv2": Tucker(24, None)}, optimizer=optimizer, inplace=True)
    surgery.reconstruct(model, optimizer=optimizer, inplace=True)
    torch.testing.assert_close(optimizer.state[model.conv2.weight]["momentum_buffer"], before, rtol=1e-3, atol=1e-5)


def test_a_chain_that_is_cut_again_takes_its_state_along(images):
    model = Small().double()
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)
    train(model, optimizer, images.double())
    surgery.decompose(model, {"conv2": (16, 12)}, optimizer=optimizer, inplace=True)
    train(model, optimizer, images.double())
    surgery.decompose(model, {"conv2": (8, 6)}, optimizer=optimizer, inplace=True)
    assert [tuple(p.shape) for p in model.conv2.parameters()][:1] == [(6, 16, 1, 1)]
    assert list(map(id, optimizer.param_groups[0]["params"])) == list(map(id, model.parameters()))
    assert all(optimizer.state[p]["exp_avg"].abs().sum() > 0 for p in model.conv2.parameters())
    train(model, optimizer, images.double())


def test_groups_their_options_and_schedulers_hold(images):
    model = Small()
    named = dict(model.named_parameters())
    groups = [{"params": [("conv1.weight", named.pop("conv1.weight"))], "lr": 0.5, "weight_decay": 0.1}, {"params": list(named.items())}]
    optimizer = torch.optim.SGD(groups, lr=0.1, momentum=0.9)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 10)
    train(model, optimizer, images)
    scheduler.step()
    twin_optimizer = torch.optim.SGD([{"params": [nn.Parameter(torch.zeros(1))], "lr": lr} for lr in (0.5, 0.1)])
    twin = torch.optim.lr_scheduler.CosineAnnealingLR(twin_optimizer, 10)
    twin_optimizer.step()
    twin.step()
    dicts = list(map(id, optimizer.param_groups))
    surgery.decompose(model, {"re:conv.*": 0.5}, optimizer=optimizer, inplace=True)
    assert list(map(id, optimizer.param_groups)) == dicts
    assert optimizer.param_groups[0]["params"] == list(model.conv1.parameters())
    assert optimizer.param_groups[0]["param_names"] == [f"conv1.{n}" for n, _ in model.conv1.named_parameters()]
    assert optimizer.param_groups[1]["param_names"][:6] == ["bn1.weight", "bn1.bias", *(f"conv2.{n}" for n, _ in model.conv2.named_parameters())]
    for _ in range(4):
        train(model, optimizer, images, 1)
        scheduler.step()
        twin_optimizer.step()
        twin.step()
        assert [g["lr"] for g in optimizer.param_groups] == [g["lr"] for g in twin_optimizer.param_groups]
    assert [(g["initial_lr"], g["weight_decay"]) for g in optimizer.param_groups] == [(0.5, 0.1), (0.1, 0)]


def test_gradients_that_were_accumulated_become_those_of_the_factors(images):
    model = Small().double()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    model(images.double()).square().sum().backward()
    surgery.decompose(model, {"conv2": (24, None)}, optimizer=optimizer, inplace=True)  # nothing is lost: both networks are the same function
    found = {n: p.grad.clone() for n, p in model.named_parameters()}
    optimizer.zero_grad()
    model(images.double()).square().sum().backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(found[name], parameter.grad, msg=name)


def test_several_optimizers_tied_weights_and_frozen_layers():
    model = Siamese().double()
    model.other.weight.requires_grad_(False)
    head = torch.optim.Adam([*model.query.parameters(), model.key.weight][:2], 1e-3)
    body = torch.optim.SGD([*model.left.parameters(), *model.other.parameters()], 0.01, momentum=0.9)
    for optimizer in (head, body):
        model(SIAMESE_INPUT).sum().backward()
        optimizer.step()
    surgery.decompose(model, {"left": (5, 4), "query": 4, "other": (3, 3)}, optimizer=[head, body], inplace=True)
    assert list(map(id, head.param_groups[0]["params"])) == list(map(id, [*model.query.parameters()]))
    assert model.left.core.weight is model.right.core.weight
    expected = [*model.left.parameters(), *model.other.parameters()]
    assert list(map(id, body.param_groups[0]["params"])) == list(map(id, expected))
    assert model.left.core.weight in body.state
    assert model.other.core.weight not in body.state
    assert not model.other.core.weight.requires_grad
    surgery.reconstruct(model, optimizer=[head, body], inplace=True)
    assert list(map(id, body.param_groups[0]["params"])) == list(map(id, [*model.left.parameters(), *model.other.parameters()]))
    assert model.key.weight is model.query.weight


def test_a_graph_and_its_optimizer(small, images):
    graph = surgery.trace(small, images)
    optimizer = torch.optim.SGD(graph.parameters(), 0.01, momentum=0.9)
    train(graph, optimizer, images)
    ema = AveragedModel(graph)
    surgery.decompose(graph, 0.5, example_inputs=images, optimizer=optimizer, also=ema, inplace=True)
    assert set(map(id, optimizer.param_groups[0]["params"])) == set(map(id, graph.parameters()))
    train(graph, optimizer, images, also=[ema])
    surgery.reconstruct(graph, optimizer=optimizer, also=ema, inplace=True)
    assert set(map(id, optimizer.param_groups[0]["params"])) == set(map(id, graph.parameters()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_memory_format_and_dtype_follow(images, dtype):
    model = Small().to(dtype=dtype, memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(model.parameters(), 0.01, momentum=0.9)
    train(model, optimizer, images.to(dtype))
    surgery.decompose(model, 0.5, optimizer=optimizer, inplace=True)
    core = model.conv2.core.weight
    assert core.is_contiguous(memory_format=torch.channels_last)
    assert optimizer.state[core]["momentum_buffer"].stride() == core.stride()
    assert optimizer.state[core]["momentum_buffer"].dtype == dtype
    train(model, optimizer, images.to(dtype))


def test_the_gradient_scaler_of_mixed_precision_goes_on(images):
    model = Small()
    optimizer = torch.optim.SGD(model.parameters(), 0.01, momentum=0.9)
    scaler = torch.amp.GradScaler("cpu")

    def step():
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(images).float().square().mean()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()

    step()
    surgery.decompose(model, 0.5, optimizer=optimizer, inplace=True)
    before = model.conv2.core.weight.detach().clone()
    step()
    assert not torch.equal(before, model.conv2.core.weight)
    assert scaler.get_scale() == 65536.0


def test_reset_begins_the_state_of_what_was_cut_again(images):
    model = Small()
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)
    train(model, optimizer, images)
    surgery.decompose(model, {"conv2": (8, 8)}, optimizer=optimizer, state="reset", inplace=True)
    assert not any(p in optimizer.state for n, p in model.conv2.named_parameters() if n != "expand.bias")
    assert model.conv1.weight in optimizer.state
    train(model, optimizer, images)


class Novel(torch.optim.SGD):
    """Keeps something of the parameter's shape that nobody knows."""

    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                self.state[p]["speed"] = torch.ones_like(p)
        super().step(closure)


def test_unknown_state_is_begun_again_with_a_word_or_carried_where_it_is_said_what_it_is(images):
    for state, expected in (("project", False), ({"speed": "gradient"}, True)):
        model = Small()
        optimizer = Novel(model.parameters(), 0.01)
        train(model, optimizer, images)
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            surgery.decompose(model, {"conv1": (8, 3), "conv2": (8, 8)}, optimizer=optimizer, state=state, inplace=True)
        assert (model.conv2.core.weight in optimizer.state) is expected
        assert [("speed" in str(w.message), "2 layers" in str(w.message)) for w in told] == ([] if expected else [(True, True)])


def test_weights_that_were_computed_leave_the_optimizer_and_plain_ones_come(images):
    model = Small()
    model.conv2 = nn.utils.parametrizations.weight_norm(model.conv2)
    optimizer = torch.optim.SGD(model.parameters(), 0.01, momentum=0.9)
    train(model, optimizer, images)
    with pytest.warns(UserWarning, match="1 layers is begun again: their weight was computed"):
        surgery.decompose(model, {"conv2": (8, 8)}, effective_weights=True, optimizer=optimizer, inplace=True)
    assert set(map(id, optimizer.param_groups[0]["params"])) == set(map(id, model.parameters()))
    train(model, optimizer, images)


def test_averaged_copies_are_cut_on_the_same_bases_and_go_on(images):
    model = Small().double()
    optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9)
    ema = AveragedModel(model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.9))
    plain = copy.deepcopy(model)
    train(model, optimizer, images.double(), also=[ema])
    whole = copy.deepcopy(ema.module)
    surgery.decompose(model, {"conv2": (12, 10), "mix": 10}, optimizer=optimizer, also=[ema, plain], balanced=True, inplace=True)
    torch.testing.assert_close(ema.module.conv2.reduce.weight, model.conv2.reduce.weight)
    assert ema.module.conv2.reduce.weight is not model.conv2.reduce.weight
    assert not torch.equal(ema.module.conv2.core.weight, model.conv2.core.weight)
    w, w2 = whole.conv2.weight, ema.module.conv2.weight
    out, into = (q.flatten(1) for q in (model.conv2.expand.weight, model.conv2.reduce.weight))
    projected = torch.einsum("ab,bchw,cd->adhw", out @ torch.linalg.pinv(out), w, torch.linalg.pinv(into) @ into)
    torch.testing.assert_close(w2, projected)
    torch.testing.assert_close(ema.module.conv2.bias, whole.conv2.bias)
    train(model, optimizer, images.double(), also=[ema])
    assert surgery.report(ema.module)["conv2"].status == "decomposed"
    output = ema.module.eval()(images.double())
    surgery.reconstruct(model, optimizer=optimizer, also=[ema, plain], inplace=True)
    assert_parity(ema.module(images.double()), output)
    assert [n for n, _ in plain.named_parameters()] == [n for n, _ in Small().named_parameters()]


def snapshot(model, optimizer):
    parameters = [(n, id(p)) for n, p in model.named_parameters()]
    groups = [list(map(id, g["params"])) for g in optimizer.param_groups]
    return parameters, groups, {id(p): {k: id(v) for k, v in s.items()} for p, s in optimizer.state.items()}


def test_after_an_error_model_optimizer_and_copies_are_as_they_were(images):
    model = Small()
    optimizer = torch.optim.SGD(model.parameters(), 0.01, momentum=0.9)
    train(model, optimizer, images)
    good, other = copy.deepcopy(model), copy.deepcopy(model)
    other.conv2 = nn.Conv2d(16, 24, 5, stride=2, padding=2)
    before = snapshot(model, optimizer), [(n, id(p)) for n, p in good.named_parameters()]
    with pytest.raises(SurgeryValueError, match=r"also\[1\]: it is no copy of the model: at conv2"):
        surgery.decompose(model, {"re:conv.*": 0.5}, optimizer=optimizer, also=[good, other], inplace=True)
    assert (snapshot(model, optimizer), [(n, id(p)) for n, p in good.named_parameters()]) == before
    assert surgery.report(model).passes == surgery.report(good).passes == ()


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (lambda m: {"optimizer": torch.optim.SGD(m.parameters(), 0.1)}, SurgeryValueError, "inplace=True"),
        (lambda m: {"also": copy.deepcopy(m)}, SurgeryValueError, "inplace=True"),
        (lambda m: {"optimizer": m, "inplace": True}, SurgeryTypeError, "torch optimizer"),
        (lambda m: {"optimizer": torch.optim.LBFGS(m.parameters()), "inplace": True}, SurgeryTypeError, "LBFGS"),
        (lambda m: {"optimizer": torch.optim.SGD(Small().parameters(), 0.1), "inplace": True}, SurgeryValueError, "no parameter of this model"),
        (lambda m: {"also": [nn.Linear(2, 2)], "inplace": True}, SurgeryTypeError, r"also\[0\]"),
        (lambda m: {"also": m, "inplace": True}, SurgeryValueError, "the model itself"),
        (lambda m: {"optimizer": torch.optim.SGD(m.parameters(), 0.1), "state": "keep", "inplace": True}, SurgeryValueError, "'project', 'reset'"),
        (lambda m: {"optimizer": torch.optim.SGD(m.parameters(), 0.1), "state": {"a": "b"}, "inplace": True}, SurgeryValueError, "'gradient'"),
    ],
)
@pytest.mark.parametrize("verb", [surgery.decompose, surgery.reconstruct])
def test_what_cannot_follow_is_refused(verb, arguments, error, message):
    model = Small()
    with pytest.raises(error, match=message):
        verb(model, **arguments(model))


@pytest.mark.parametrize("build", [Small, Kinds])
def test_balanced_chains_are_of_one_size_and_the_same_function_to_the_bit(build):
    model = build()
    plain = surgery.decompose(model, {"re:.*": 0.5})
    even = surgery.decompose(model, {"re:.*": 0.5}, balanced=True)
    chains = 0
    for before, after in zip(host_for(plain).sites(), host_for(even).sites(), strict=True):
        if after.chain is not None:
            chains += 1
            sizes = [float(p.weight.detach().norm()) for p in after.pieces]
            assert max(sizes) / min(sizes) < 4.01
            assert torch.equal(before.weight, after.weight)
    assert chains >= 4


def test_states_that_are_not_those_of_all_factors_are_said_and_dropped():
    model, x = Small(), torch.randn(2, 3, 12, 12)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    net = surgery.decompose(model, {"conv2": (8, 4)}, optimizer=optimizer, inplace=True)
    net(x).sum().backward()
    optimizer.step()
    optimizer.state.pop(net.conv2.core.weight)
    with pytest.warns(UserWarning, match=r"knows some of a chain's factors only"):
        surgery.reconstruct(net, optimizer=optimizer, inplace=True)
    odd = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    odd.state[net.conv2.weight] = {"momentum_buffer": torch.zeros(3)}
    with pytest.warns(UserWarning, match=r"'momentum_buffer' does not have the shape of its parameter"):
        surgery.decompose(net, {"conv2": (8, 4)}, optimizer=odd, inplace=True)
    sharded = type("ZeroRedundancyOptimizer", (torch.optim.SGD,), {})(net.parameters(), lr=0.1)
    with pytest.raises(surgery.SurgeryTypeError, match="ZeroRedundancyOptimizer holds a part of the state only"):
        surgery.decompose(net, 0.5, optimizer=sharded, inplace=True)


def test_the_gradient_of_a_weight_is_solved_for_once_however_many_keys_need_it(monkeypatch):
    torch.manual_seed(0)
    model = surgery.decompose(Small(), {"conv1": (4, 2), "conv2": surgery.Spatial(6)}).train()
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3, amsgrad=True)
    model(torch.randn(2, 3, 12, 12)).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()  # gradients that wait for their step would be solved for as well
    solve, solved = ChainMap.least_norm, []
    monkeypatch.setattr(ChainMap, "least_norm", lambda self, *args: solved.append(self.geometry) or solve(self, *args))
    surgery.reconstruct(model, optimizer=optimizer, inplace=True)
    assert len(solved) == 2
    assert {"exp_avg", "exp_avg_sq", "max_exp_avg_sq"} <= set(optimizer.state[model.conv1.weight])
