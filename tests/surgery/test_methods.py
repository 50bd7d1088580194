"""``method=``: every kind under rules and by name, and the choice among them."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import pytest
import torch
from torch import nn

import surgery
from passes import kinds
from passes.errors import SurgeryError, SurgeryValueError
from passes.geometry import Geometry
from passes.kinds import KINDS, kind_named, kind_of, register_kind
from passes.parity import assert_parity
from surgery import CP, SVD, Channel, Depthwise, Keep, Spatial, Tucker
from surgery.cost import chain_macs
from surgery.ranks.rules import Energy
from tests.networks import Kinds, Small

X = torch.randn(2, 3, 6, 8, generator=torch.Generator().manual_seed(4))


def cuts(model, ranks, **options):
    return {name: d for name, d in surgery.plan(model, ranks, **options).items() if not isinstance(d, Keep)}


@pytest.mark.parametrize("kind", [k for k in KINDS if k.has_spectra], ids=[k.name for k in KINDS if k.has_spectra])
@pytest.mark.parametrize("ranks", [0.5, "energy:0.7", "stable", "evbmf:weaken=0.3"])
def test_every_kind_takes_every_rule(kind, ranks):
    model = Kinds().eval()
    plan = surgery.plan(model, ranks, method=kind.name, guard="none", example_inputs=X)
    sites = {row.name: row for row in surgery.report(model).layers}
    assert set(plan) == set(sites)
    for name, decision in plan.items():
        if isinstance(decision, Keep):
            assert decision.reason
        else:
            assert decision.kind in (kind.name, "svd")
            assert all(r is None or r % model.get_submodule(name).groups == 0 for r in decision.ranks) or kind.name == "depthwise"
    net = surgery.decompose(model, plan)
    made = {name: decision for name, decision in surgery.plan(net, {}).items() if not isinstance(decision, Keep)}
    assert made == {name: decision for name, decision in plan.items() if not isinstance(decision, Keep)}


def test_ranks_of_a_rule_are_rounded_to_multiples_of_groups_and_of_round_to():
    conv = nn.Sequential(nn.Conv2d(48, 48, 3, groups=4))
    assert cuts(conv, 0.3, guard="none") == {"0": Tucker(16, 16)}  # 14.4, in multiples of 4
    assert cuts(conv, 0.3, guard="none", round_to=6) == {"0": Tucker(24, 24)}  # multiples of 12
    assert cuts(conv, {"0": 0.3}) == {"0": Tucker(16, 16)}
    with pytest.raises(SurgeryValueError, match="rank 15 is no multiple of its 4 groups"):
        surgery.plan(conv, {"0": (15, 16)})


def test_evbmf_of_a_grouped_layer_is_that_of_one_group():
    generator = torch.Generator().manual_seed(0)
    conv = nn.Conv2d(48, 64, 3, groups=2)
    with torch.no_grad():
        for half in conv.weight.split(32):
            core = torch.randn(4, 3, 3, 3, generator=generator)
            half.copy_(torch.einsum("ar,bs,rshw->abhw", torch.randn(32, 4, generator=generator), torch.randn(24, 3, generator=generator), core))
        conv.weight += 0.05 * conv.weight.std() * torch.randn(conv.weight.shape, generator=generator)
    assert cuts(nn.Sequential(conv), "evbmf") == {"0": Tucker(8, 6)}


def test_energy_of_a_grouped_layer_is_that_of_the_whole():
    torch.manual_seed(1)
    conv = nn.Conv2d(16, 24, 3, groups=4, bias=False)
    (rank_out, _) = cuts(nn.Sequential(conv), "energy:0.6", guard="none")["0"].ranks
    per_group = [torch.linalg.svdvals(block.flatten(1).double()).square() for block in conv.weight.detach().split(6)]
    held = torch.stack(per_group).sum(0).cumsum(0) / torch.stack(per_group).sum()
    assert rank_out == 4 * (1 + int((held < 0.6).sum()))


def test_transposed_layers_are_cut_in_forward_direction():
    up = nn.ConvTranspose2d(6, 10, 4, stride=2, padding=1)
    with torch.no_grad():
        up.weight.copy_(torch.einsum("r,rohw->rohw", torch.tensor([1.0, 1, 0, 0, 0, 0]), torch.randn(6, 10, 4, 4)))
    net = surgery.decompose(nn.Sequential(up), {"0": (10, 2)})
    assert surgery.report(net)["0"].error < 1e-6  # only two of the six input channels are used
    assert type(net[0].core) is nn.ConvTranspose2d
    assert type(net[0].reduce) is type(net[0].expand) is nn.Conv2d
    assert net[0].output_padding == (0, 0)


@pytest.mark.parametrize("method", ["tucker", "spatial", "channel", "depthwise"])
def test_a_transposed_chain_takes_an_output_size(method):
    class Up(nn.Module):
        def __init__(self):
            super().__init__()
            self.up = nn.ConvTranspose2d(6, 5, (3, 4), stride=(2, 3), padding=1)

        def forward(self, x, size):
            return self.up(x, output_size=size)

    model = Up().double().eval()
    net = surgery.decompose(model, {"up": 1.0}, method=method)
    x = torch.randn(1, 6, 4, 5, dtype=torch.float64)
    for size in ((8, 15), (7, 14), (1, 5, 8, 16)):
        assert_parity(net(x, size), model(x, size))
    assert_parity(surgery.reconstruct(net)(x, (8, 16)), model(x, (8, 16)))


def test_cp_refuses_rules_and_takes_names():
    with pytest.raises(SurgeryValueError, match=r"'cp' has no spectra.*ranks="):
        surgery.plan(Small(), "evbmf", method="cp")
    for rule in (surgery.ranks.Evbmf(), surgery.ranks.Fraction(0.5), Energy(0.9)):
        with pytest.raises(SurgeryValueError, match=r"'cp' has no spectra.*ranks="):
            surgery.plan(Small(), {"conv2": rule}, method="cp")
    assert cuts(Small(), {"conv2": lambda site, spectra: 5}, method="cp") == {"conv2": CP(5)}  # a rule of one's own needs none
    assert cuts(Small(), {"conv2": 5, "mix": 4}, method="cp") == {"conv2": CP(5), "mix": SVD(4)}
    with pytest.raises(SurgeryError, match="cp takes an int"):
        surgery.plan(Small(), {"conv2": (5, 5)}, method="cp")
    with pytest.raises(SurgeryValueError, match="without fitting"):
        surgery.ranks.error_surface(torch.randn(4, 4, 3, 3), "cp")


def test_a_plan_may_mix_kinds_and_survives_saving(tmp_path):
    model = Kinds().eval()
    mixed = {"plain": Spatial(5), "grouped": Channel(6), "up": Depthwise(3), "both": Tucker(4, 4), "line": CP(4), "space": Spatial(3)}
    net = surgery.decompose(model, mixed, example_inputs=X)
    assert {row.name: row.factorization for row in surgery.report(net).layers if row.factorization} == mixed
    surgery.save(net, tmp_path / "net")
    again = surgery.load(tmp_path / "net", Kinds())
    assert torch.equal(again.eval()(X), net(X))
    assert_parity(surgery.reconstruct(again)(X), net(X))
    recut = surgery.decompose(net, {"up": Depthwise(2), "space": Tucker(2, 2)})
    assert surgery.report(recut)["space"].ranks == (2, 2)


def separable(out, into, generator):
    """A kernel of rank 2 in its directions, of full rank in its channels."""
    return torch.einsum("rih,orw->oihw", torch.randn(2, into, 3, generator=generator), torch.randn(out, 2, 3, generator=generator))


def test_auto_takes_the_kind_that_fits_the_weight():
    generator = torch.Generator().manual_seed(2)
    weights = {
        Spatial: separable(24, 20, generator),
        Channel: torch.einsum("or,rihw->oihw", torch.randn(24, 8, generator=generator), torch.randn(8, 20, 3, 3, generator=generator)),
        Depthwise: torch.einsum("oi,ihw->oihw", torch.randn(24, 20, generator=generator), torch.randn(20, 3, 3, generator=generator)),
        Tucker: torch.einsum(
            "or,is,rshw->oihw",
            torch.randn(24, 6, generator=generator),
            torch.randn(20, 5, generator=generator),
            torch.randn(6, 5, 3, 3, generator=generator),
        ),
    }
    x = torch.randn(1, 20, 8, 8)
    for kind, weight in weights.items():
        model = nn.Sequential(nn.Conv2d(20, 24, 3, padding=1))
        with torch.no_grad():
            model[0].weight.copy_(weight)
        for inputs in (None, x):
            (found,) = cuts(model, lambda site, spectra: (10, 9), method="auto", example_inputs=inputs).values()
            assert type(found) is kind


@pytest.mark.parametrize("inputs", [None, X])
def test_auto_is_never_worse_nor_dearer_than_tucker(inputs):
    model = Kinds().eval()
    auto = surgery.decompose(model, 0.5, method="auto", example_inputs=inputs)
    tucker = surgery.decompose(model, 0.5, example_inputs=inputs)
    kinds = set()
    for best, usual in zip(surgery.report(auto).layers, surgery.report(tucker).layers, strict=True):
        assert best.status == usual.status
        if best.status == "decomposed":
            kinds.add(best.kind)
            assert best.error <= usual.error + 1e-9
            assert best.macs_after <= usual.macs_after if inputs is not None else best.params_after <= usual.params_after
    assert len(kinds) > 2


def test_auto_takes_kinds_of_several_modes_too(monkeypatch):
    tucker = kind_named("tucker")

    @dataclass(frozen=True, slots=True)
    class Twin(Tucker):
        kind = "twin"

    monkeypatch.setattr(kinds, "_registered", {})
    register_kind(type("TwinKind", (type(tucker.kind),), {"factorization": Twin})())
    monkeypatch.setattr(kinds, "KINDS", (kind_named("svd"),))  # and without Tucker's among those to choose from
    monkeypatch.setattr(kinds, "_registered", kinds._registered | {"tucker": tucker})
    conv = nn.Conv2d(24, 32, 3)
    for ranks in ((20, 10), (10, 20), (1, 1)):
        asked = Tucker(*ranks)
        (found,) = surgery.plan(nn.Sequential(conv), lambda site, spectra, asked=asked: asked.ranks, method="auto", guard="none").values()
        assert found.kind in ("tucker", "twin")
        cost = [sum(s.params for s in kind_of(f).shapes(Geometry.of(conv), f, False)) for f in (found, asked)]
        assert cost[0] <= cost[1]


@pytest.mark.parametrize("name", ["weight", "bias", "a.b"])
def test_a_kind_whose_layers_have_names_that_no_module_can_have(name, monkeypatch):
    tucker = type(kind_named("tucker").kind)

    @dataclass(frozen=True, slots=True)
    class Named(Tucker):
        kind = "named"

    def shapes(self, geometry, factorization):
        reduce, *others = tucker.shapes(self, geometry, factorization).items()
        return dict([(name, reduce[1]), *others])

    def from_ranks(self, geometry, ranks):
        return Named(*tucker.from_ranks(self, geometry, ranks).ranks)

    monkeypatch.setattr(kinds, "_registered", {})
    register_kind(type("NamedKind", (tucker,), {"factorization": Named, "shapes": shapes, "from_ranks": from_ranks})())
    model = Small()
    for network in (model, surgery.trace(model, X)):
        with pytest.raises(SurgeryValueError, match=f"named: a layer of its chains is named '{name}'; it must be an identifier"):
            surgery.decompose(network, {"conv2": Named(4, 4)}, inplace=True)
    assert type(model.conv2) is nn.Conv2d


def test_auto_leaves_explicit_ranks_to_tucker_and_rounds():
    assert cuts(Small(), {"conv2": (6, 4)}, method="auto") == {"conv2": Tucker(6, 4)}
    model = Small()
    for name, found in cuts(model, 0.4, method="auto", round_to=4).items():
        full = kind_of(found).full_ranks(Geometry.of(model.get_submodule(name)))
        assert all(r is None or r % 4 == 0 or r == most for r, most in zip(found.ranks, full, strict=True))


def test_rules_see_the_spectra_of_the_kind():
    seen = {}

    def rule(site, spectra):
        seen[site.name] = [(s.mode, s.full) for s in spectra]
        return Energy(0.5)(site, spectra)

    surgery.plan(Small(), rule, method="depthwise")
    assert seen["conv2"] == [("pairs", 9)]
    assert seen["mix"] == [("channels", 24)]


@pytest.mark.parametrize("kind", KINDS, ids=[k.name for k in KINDS])
def test_torch_s_own_verbs_work_on_every_chain(kind, tmp_path):
    model = Kinds().eval()
    ranks = {"re:.*": 0.5} if kind.has_spectra else {"re:.*": 4}
    net = surgery.decompose(model, ranks, method=kind.name)
    assert any(row.kind == kind.name for row in surgery.report(net).layers)
    expected = net(X)
    assert torch.equal(copy.deepcopy(net)(X), expected)
    torch.save(net, tmp_path / "net.pt")
    assert torch.equal(torch.load(tmp_path / "net.pt", weights_only=False)(X), expected)
    assert_parity(copy.deepcopy(net).to(torch.float64)(X.double()).float(), expected, tolerance=1e-4)
    flat = surgery.decompose(nn.Sequential(model.plain, model.grouped, model.up, model.both, model.mix), ranks, method=kind.name)
    assert_parity(copy.deepcopy(flat).to(memory_format=torch.channels_last)(X), flat(X), tolerance=1e-4)
    assert {p.dtype for p in copy.deepcopy(net).half().parameters()} == {torch.float16}
    assert_parity(torch.jit.trace(net, X)(X), expected)
    assert_parity(torch.compile(net, backend="aot_eager", fullgraph=True)(X), expected, tolerance=1e-4)
    with torch.no_grad():
        assert_parity(copy.deepcopy(net).half().float()(X), expected, tolerance=5e-2)


def test_costs_come_from_the_shapes():
    conv = nn.Conv2d(8, 12, 3, padding=1)
    (site,) = surgery.decompose.__globals__["host_for"](nn.Sequential(conv), torch.randn(1, 8, 6, 6)).sites()
    told = {
        Tucker(3, 2): 36 * (8 * 2 + 2 * 3 * 9 + 3 * 12),
        Spatial(4): 36 * (8 * 4 * 3 + 4 * 12 * 3),
        Channel(4): 36 * (8 * 4 * 9 + 4 * 12),
        Depthwise(2): 36 * (8 * 2 * 9 + 16 * 12),
        CP(5): 36 * (8 * 5 + 5 * 3 + 5 * 3 + 5 * 12),
    }
    for factorization, macs in told.items():
        shapes = kind_of(factorization).shapes(site.geometry, factorization, True)
        assert chain_macs(shapes, site.calls) == macs
        assert kind_named(factorization.kind) is kind_of(factorization)


def test_auto_leaves_a_factorization_that_a_rule_answers_as_it_is():
    asked = {"conv1": Tucker(6, None), "conv2": Channel(8), "mix": SVD(5), "tail.1": Spatial(6)}
    assert cuts(Small(), lambda site, spectra: asked.get(site.name), method="auto", guard="none") == asked


@pytest.mark.parametrize("kind", [k for k in KINDS if k.name != "svd"], ids=[k.name for k in KINDS if k.name != "svd"])
def test_chains_of_transposed_layers_can_be_scripted(kind, tmp_path):
    model = nn.Sequential(nn.ConvTranspose2d(8, 6, 4, stride=2, padding=1), nn.ReLU(), nn.ConvTranspose2d(6, 4, 3, groups=2)).eval()
    net = surgery.decompose(model, {"re:.*": kind.factorization(*[2] * len(kind.modes))})
    x = torch.randn(1, 8, 5, 7)
    scripted = torch.jit.script(net)
    assert_parity(scripted(x), net(x))
    scripted.save(tmp_path / "net.pt")
    assert_parity(torch.jit.load(tmp_path / "net.pt")(x), net(x))


class Sized(nn.Module):
    """A decoder's step: as large as the picture that it is added to. Its kernel is a single padded pixel in one direction."""

    def __init__(self, kernel=(4, 1), stride=(2, 1), padding=(1, 1)):
        super().__init__()
        self.up = nn.ConvTranspose2d(6, 5, kernel, stride=stride, padding=padding)

    def forward(self, x, like):
        return self.up(x, output_size=like.shape[-2:]) + like


@pytest.mark.parametrize("method", ["tucker", "channel", "depthwise", "spatial", "cp"])
def test_output_sizes_where_the_kernel_is_a_pixel_and_under_tracing(method):
    model = Sized() if method != "spatial" else Sized((4, 3), (2, 1), (1, 2))
    model = model.double().eval()
    inputs = torch.randn(1, 6, 4, 7, dtype=torch.float64), torch.randn(1, 5, 9, 5, dtype=torch.float64)
    net = surgery.decompose(model, {"up": 4 if method != "tucker" else (5, 6)}, method=method)
    expected = net(*inputs)
    if method == "tucker":
        assert_parity(expected, model(*inputs))
    assert expected.shape == (1, 5, 9, 5)
    assert_parity(surgery.reconstruct(net)(*inputs), expected)
    traced = surgery.trace(net, inputs)
    assert_parity(traced(*inputs), expected)
    back = surgery.reconstruct(traced)  # its nodes are asked for sizes, which one layer's node would have to be as well
    assert_parity(back(*inputs), expected)


def test_an_output_size_of_wrong_length_is_an_error():
    net = surgery.decompose(nn.Sequential(nn.ConvTranspose2d(6, 5, 3)), {"0": (4, 4)})
    with pytest.raises(SurgeryValueError, match=r"output_size: .* takes 2 or 4 numbers, got 3"):
        net[0](torch.randn(1, 6, 4, 4), output_size=[6, 6, 6])
    with pytest.raises(SurgeryValueError, match="takes 2 or 3 numbers, got 1"):
        net[0](torch.randn(6, 4, 4), output_size=[6])
    assert net[0](torch.randn(6, 4, 4), output_size=[5, 6, 6]).shape == (5, 6, 6)


def test_a_kind_that_is_slow_leaves_what_the_rule_asked_for(monkeypatch):
    model = nn.Sequential(nn.Conv2d(16, 16, 3))
    monkeypatch.setattr("surgery.latency.Stopwatch.pays", lambda s, site, chain, runtime: None if isinstance(chain, Tucker) else surgery.Keep("slow"))
    monkeypatch.setattr("surgery.ranks.auto.best_kind", lambda site, asked, spectra, round_to: surgery.Depthwise(rank=1))
    plan = surgery.plan(model, 0.5, method="auto", guard="latency", example_inputs=torch.randn(1, 16, 8, 8))
    assert plan["0"] == Tucker(8, 8)
