"""The contract of every kind, by the registry: a new kind is tested the day it is added."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from types import SimpleNamespace
from typing import ClassVar, Optional

import numpy as np
import pytest
import tensorly
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from passes import Decompose, ModuleHost
from passes.errors import SurgeryError, SurgeryTypeError, SurgeryValueError
from passes.factorization import Factorization, Keep
from passes.geometry import Geometry, Piece
from passes.kinds import KINDS, METHODS, all_kinds, decision_from_json, kind_named, kind_of, register_kind, usual_kind
from passes.one_rank import OneRank
from passes.parity import assert_parity
from passes.site import Call
from passes.spectra import Spectra
from surgery.cost import chain_macs, chain_params
from tests.conftest import LONG
from tests.geometries import layers

every_kind = pytest.mark.parametrize("kind", KINDS, ids=[k.name for k in KINDS])
with_spectra = pytest.mark.parametrize("kind", [k for k in KINDS if k.has_spectra], ids=[k.name for k in KINDS if k.has_spectra])
MOST_OF_CP = 2  # alternating least squares takes time at every rank


def split(layer, kind, ranks):
    geometry = Geometry.of(layer)
    factorization = kind.from_ranks(geometry, ranks)
    (site,) = ModuleHost(layer).sites()
    spectra = Spectra().of(site, kind)
    return factorization, kind.split(layer.weight.detach(), site.bias, geometry, factorization, spectra)


def relative_error(layer, kind, pieces):
    merged = kind.merge([Piece(p.name, p.geometry, p.weight.double(), None) for p in pieces], Geometry.of(layer))
    weight = layer.weight.detach()
    return float((merged - weight).norm() / weight.norm())


def draw_ranks(data, kind, geometry):
    """Ranks up to full, as multiples of what ranks are multiples of."""
    unit = kind.unit(geometry)
    most = [f // unit if kind.has_spectra else min(f // unit, MOST_OF_CP) for f in kind.full_ranks(geometry)]
    return [unit * data.draw(st.integers(1, m)) for m in most]


@with_spectra
@given(drawn=layers())
def test_full_rank_is_the_layer(kind, drawn):
    layer, inputs = drawn
    geometry = Geometry.of(layer)
    assume(kind.refuses(geometry) is None)
    factorization, pieces = split(layer, kind, kind.full_ranks(geometry))
    assert relative_error(layer, kind, pieces) < 1e-12
    result = Decompose(assignment={"": factorization})(ModuleHost(layer))
    assert result.modified
    assert_parity(result.model(inputs), layer(inputs))


@every_kind
@given(drawn=layers(), data=st.data())
def test_error_never_grows_with_rank(kind, drawn, data):
    layer, _ = drawn
    geometry = Geometry.of(layer)
    assume(kind.refuses(geometry) is None)
    full = kind.full_ranks(geometry)
    low = draw_ranks(data, kind, geometry)
    mode = data.draw(st.integers(0, len(full) - 1))
    unit = kind.unit(geometry)
    high = [min(r + unit * (i == mode), f) for i, (r, f) in enumerate(zip(low, full, strict=True))]
    errors = [relative_error(layer, kind, split(layer, kind, ranks)[1]) for ranks in (low, high)]
    assert errors[1] <= errors[0] + 1e-4


@every_kind
@given(drawn=layers(), data=st.data())
def test_shapes_are_those_of_the_pieces_and_of_the_chain(kind, drawn, data):
    layer, inputs = drawn
    geometry = Geometry.of(layer)
    assume(kind.refuses(geometry) is None)
    factorization, pieces = split(layer, kind, draw_ranks(data, kind, geometry))
    shapes = kind.shapes(geometry, factorization, layer.bias is not None)
    assert [(s.name, s.geometry, s.bias) for s in shapes] == [(p.name, p.geometry, p.bias is not None) for p in pieces]
    assert all(tuple(p.weight.shape) == p.geometry.weight_shape for p in pieces)
    chain = Decompose(assignment={"": factorization})(ModuleHost(layer)).model
    assert chain_params(shapes) == sum(p.numel() for p in chain.parameters())
    call = Call(tuple(inputs.shape), tuple(layer(inputs).shape))
    with FlopCounterMode(display=False) as counter:
        output = chain(inputs)
    assert chain_macs(shapes, [call]) == counter.get_total_flops() // 2
    assert tuple(output.shape) == call.output_shape == geometry.output_shape(call.input_shape)


@every_kind
@given(drawn=layers(), data=st.data())
def test_ranks_are_clipped_to_what_the_chain_can_use(kind, drawn, data):
    geometry = Geometry.of(drawn[0])
    assume(kind.refuses(geometry) is None)
    ranks = draw_ranks(data, kind, geometry)
    clipped = kind.from_ranks(geometry, ranks)
    assert all(c <= r for c, r in zip(clipped.ranks, ranks, strict=True))
    assert kind.from_ranks(geometry, clipped.ranks) == clipped


@given(st.integers(1, 40), st.integers(1, 40))
def test_tucker_ranks_are_those_that_the_other_mode_can_use(out, into):
    found = kind_named("tucker").from_ranks(Geometry.of(torch.nn.Conv2d(40, 40, 3)), (out, into))
    assert found.ranks == (min(out, 9 * into), min(into, 9 * out))


@with_spectra
@given(drawn=layers(), data=st.data())
def test_the_error_surface_bounds_what_a_split_reaches(kind, drawn, data):
    """The surface is where the iteration starts from: a split reaches at most that error, and with one mode exactly that."""
    layer, _ = drawn
    geometry = Geometry.of(layer)
    assume(kind.refuses(geometry) is None)
    (site,) = ModuleHost(layer).sites()
    spectra = Spectra().of(site, kind)
    full = kind.full_ranks(geometry)
    surface = kind.error_surface(layer.weight.detach(), geometry, spectra)
    unit = kind.unit(geometry)
    assert tuple(surface.shape) == tuple(f // unit + 1 for f in full)
    factorization, pieces = split(layer, kind, draw_ranks(data, kind, geometry))
    reached, told = relative_error(layer, kind, pieces), float(surface[tuple(r // unit for r in factorization.ranks)])
    assert reached <= told + 1e-9
    if len(full) == 1:
        assert told == pytest.approx(reached, rel=1e-9, abs=1e-9)
    assert float(surface[tuple(f // unit for f in full)]) < 1e-12
    assert bool((surface[0] == 1).all())
    for dim in range(surface.ndim):
        assert bool((surface.diff(dim=dim) <= 1e-15).all())


@every_kind
@given(drawn=layers(), data=st.data())
def test_json_round_trip(kind, drawn, data):
    geometry = Geometry.of(drawn[0])
    assume(kind.refuses(geometry) is None)
    factorization = kind.from_ranks(geometry, draw_ranks(data, kind, geometry))
    assert decision_from_json(factorization.to_json()) == factorization
    assert kind_of(factorization) is kind


@every_kind
def test_refusals_say_why(kind):
    square = {"kernel": (3, 3), "stride": (1, 1), "padding": (1, 1), "dilation": (1, 1), "output_padding": (0, 0)}
    pointwise = square | {"kernel": (1, 1), "padding": (0, 0)}
    for base in (square, pointwise):
        depthwise = Geometry(in_channels=8, out_channels=16, groups=8, **base)
        assert "depthwise" in kind.refuses(depthwise)
    fits = [kind.refuses(Geometry(in_channels=8, out_channels=8, **base)) for base in (square, pointwise)]
    assert fits.count(None) == 1


@every_kind
def test_ranks_of_groups_are_totals(kind):
    conv = torch.nn.Conv2d(12, 8, 1 if kind.name == "svd" else 3, groups=4, dtype=torch.float64)
    geometry = Geometry.of(conv)
    if kind.unit(geometry) == 1:
        pytest.skip("its rank counts no channels")
    wrong = kind.factorization(*[6] * len(kind.modes))
    assert "no multiple of its 4 groups" in kind.refuses_ranks(geometry, wrong.ranks)
    _, pieces = split(conv, kind, [4] * len(kind.modes))
    assert {p.geometry.groups % 4 for p in pieces} == {0}
    alone = []
    for block in conv.weight.detach().split(2):
        part = torch.nn.Conv2d(3, 2, conv.kernel_size, bias=False, dtype=torch.float64)
        part.weight.data = block.clone()
        alone.append(relative_error(part, kind, split(part, kind, [1] * len(kind.modes))[1]) * float(block.norm()))
    assert relative_error(conv, kind, pieces) * float(conv.weight.norm()) == pytest.approx(float(torch.tensor(alone).norm()), rel=1e-6)


@with_spectra
@given(drawn=layers(), scale=st.sampled_from([1e-4, 1.0, 1e4]))
def test_unfoldings_have_the_norm_of_the_weight(kind, drawn, scale):
    layer, _ = drawn
    geometry = Geometry.of(layer)
    assume(kind.refuses(geometry) is None)
    weight = layer.weight.detach() * scale
    for stack, full in zip(kind.unfoldings(weight, geometry), kind.full_ranks(geometry), strict=True):
        assert min(stack.shape[1:]) * kind.unit(geometry) == full
        assert float(stack.norm()) == pytest.approx(float(weight.norm()))
    (site,) = ModuleHost(layer).sites()
    for spectrum, full in zip(Spectra().of(site, kind), kind.full_ranks(geometry), strict=True):
        assert spectrum.full == min(spectrum.shape) == full
        assert bool((spectrum.values.diff() <= 1e-12).all())


@given(drawn=layers())
def test_macs_by_formula_equal_a_counter(drawn):
    layer, inputs = drawn
    with FlopCounterMode(display=False) as counter:
        layer(inputs)
    assert Geometry.of(layer).macs(tuple(inputs.shape)) == counter.get_total_flops() // 2


def test_one_pixel_takes_svd_whatever_the_method():
    one = Geometry.of(torch.nn.Conv2d(4, 4, 1))
    assert usual_kind(one, "tucker").factorization.kind == "svd"
    assert usual_kind(Geometry.of(torch.nn.Conv2d(4, 4, (1, 3))), "tucker").factorization.kind == "tucker"


def test_tucker_one_has_no_layer_for_the_uncut_mode():
    tucker = kind_named("tucker")
    layer = torch.nn.Conv2d(6, 8, 3, dtype=torch.float64)
    for ranks, names in (((3, None), ["core", "expand"]), ((None, 3), ["reduce", "core"]), ((3, 2), ["reduce", "core", "expand"])):
        _, pieces = split(layer, tucker, ranks)
        assert [p.name for p in pieces] == names
        assert [p.bias is not None for p in pieces] == [False] * (len(names) - 1) + [True]


def test_wrong_factorizations_are_told_apart():
    tucker, svd = (kind_named(name).factorization for name in ("tucker", "svd"))
    for bad in (0, -3):
        with pytest.raises(SurgeryValueError, match="at least 1"):
            tucker(bad, 2)
    for bad in (2.0, "4", True):
        with pytest.raises(SurgeryTypeError, match="rank_in"):
            tucker(2, bad)
    with pytest.raises(SurgeryValueError, match="at least one rank"):
        tucker(None, None)
    with pytest.raises(SurgeryTypeError, match="must be an int"):
        svd(None)
    with pytest.raises(SurgeryTypeError, match="reason"):
        Keep("")


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"kind": "tuker", "rank_out": 1, "rank_in": 1}, "did you mean 'tucker'"),
        ({"kind": "tucker", "rank_out": 1}, "rank_in"),
        ({"kind": "tucker", "rank_out": 1, "rank_in": 1, "rank": 1}, "exactly the fields"),
        ({"kind": "svd", "rank": "3"}, "rank must be an int"),
        ({"kind": "keep"}, "reason"),
        ({"rank": 3}, "kind"),
        ([], "kind"),
        (None, "kind"),
    ],
)
def test_wrong_json_names_the_field(data, message):
    with pytest.raises(SurgeryError, match=message):
        decision_from_json(data)


def test_a_kind_that_is_none_is_not_registered():
    class Mine(Factorization):
        kind = "mine"

    taken = type(kind_named("svd").kind)()
    with pytest.raises(SurgeryValueError, match="the name 'svd' is taken"):
        register_kind(taken)
    with pytest.raises(SurgeryTypeError, match="must be a frozen dataclass"):
        register_kind(Keep("no kind"))
    with pytest.raises(SurgeryTypeError, match="must be the name of the kind"):
        register_kind(with_factorization(Factorization))
    with pytest.raises(SurgeryTypeError, match="modes must name the ranks of Mine, 0 of them"):
        register_kind(with_factorization(Mine))
    with pytest.raises(SurgeryTypeError, match=r"Empty: lacks refuses, full_ranks, .*, merge, .*has_spectra of passes.kind.Kind"):
        register_kind(type("Empty", (), {"factorization": Mine, "modes": ()})())
    assert [kind.name for kind in all_kinds()] == [kind.name for kind in KINDS]


def with_factorization(cls):
    """SVD with the ranks of another class."""
    return type("Odd", (type(kind_named("svd").kind),), {"factorization": cls})()


def test_cp_is_tensorly_s_sum_of_outer_products_and_finds_a_tensor_of_its_rank():
    cp = kind_named("cp")
    conv = torch.nn.Conv2d(9, 12, (3, 4), dtype=torch.float64)
    generator = torch.Generator().manual_seed(3)
    factors = [torch.randn(n, 4, generator=generator, dtype=torch.float64) for n in (12, 9, 3, 4)]
    with torch.no_grad():
        conv.weight.copy_(torch.einsum("az,bz,cz,dz->abcd", *factors))
    state = np.random.get_state()[1].copy(), torch.get_rng_state()
    errors = [relative_error(conv, cp, split(conv, cp, [rank])[1]) for rank in range(1, 7)]
    assert errors[2] > 0.05
    assert errors[3] < 1e-5
    assert all(after <= before + 1e-12 for before, after in itertools.pairwise(errors))
    assert np.array_equal(state[0], np.random.get_state()[1])
    assert torch.equal(state[1], torch.get_rng_state())
    _, pieces = split(conv, cp, [3])
    assert [p.name for p in pieces] == ["reduce", "height", "width", "expand"]
    assert [p.geometry.groups for p in pieces] == [1, 3, 3, 1]
    out, into, height, width = (pieces[i].weight for i in (3, 0, 1, 2))
    columns = [out.flatten(1), into.flatten(1).T, height.flatten(1).T, width.flatten(1).T]
    whole = tensorly.cp_to_tensor((None, [c.numpy() for c in columns]))
    assert np.allclose(whole, cp.merge(pieces, Geometry.of(conv)).numpy())


def test_cp_of_a_random_weight_never_gets_worse_with_rank():
    cp = kind_named("cp")
    conv = torch.nn.Conv2d(6, 7, 3, dtype=torch.float64)
    errors = [relative_error(conv, cp, split(conv, cp, [rank])[1]) for rank in range(1, 10)]
    assert all(after <= before for before, after in itertools.pairwise(errors))
    assert errors[-1] < 0.8 * errors[0]
    first, again = (split(conv, cp, [4])[1] for _ in range(2))
    assert all(torch.equal(a.weight, b.weight) for a, b in zip(first, again, strict=True))


@pytest.mark.parametrize("share", [0.0, 1.0], ids=["zero", "of rank one"])
def test_cp_components_without_weight_can_be_trained(share):
    conv = torch.nn.Conv2d(6, 5, 3, dtype=torch.float64)
    with torch.no_grad():
        conv.weight.copy_(share * torch.einsum("a,b,c,d->abcd", *(torch.randn(n, dtype=torch.float64) for n in (5, 6, 3, 3))))
    _, pieces = split(conv, kind_named("cp"), [4])
    assert [bool((p.weight.flatten(1).norm(dim=0 if p.name == "expand" else 1) > 0).all()) for p in pieces] == [True, True, True, False]
    assert torch.allclose(kind_named("cp").merge(pieces, Geometry.of(conv)), conv.weight, atol=1e-8)
    factorization = kind_named("cp").factorization(4)
    chain = Decompose(assignment={"": factorization})(ModuleHost(conv)).model
    chain(torch.randn(2, 6, 5, 5, dtype=torch.float64)).square().sum().backward()
    torch.optim.SGD(chain.parameters(), 0.1).step()
    chain.expand.weight.grad = None
    chain(torch.randn(2, 6, 5, 5, dtype=torch.float64)).sum().backward()
    assert bool((chain.expand.weight.grad.flatten(1).norm(dim=0) > 0).all())


@pytest.mark.parametrize("shape", [(20, 24, 3, 3), (7, 9, 4), (1, 9, 3, 3), (5, 4, 2, 3, 2)])
def test_cp_never_gets_worse_from_one_rank_to_the_next_and_is_exact_at_the_last(shape):
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(*shape, generator=generator, dtype=torch.float64)
    conv = {3: torch.nn.Conv1d, 4: torch.nn.Conv2d, 5: torch.nn.Conv3d}[len(shape)](shape[1], shape[0], shape[2:], dtype=torch.float64)
    conv.weight.data = weight
    cp = kind_named("cp")
    (full,) = cp.full_ranks(Geometry.of(conv))
    ranks = [*range(1, min(full, 36 if LONG else 9)), full]
    errors = [relative_error(conv, cp, split(conv, cp, [rank])[1]) for rank in ranks]
    assert all(after <= before for before, after in itertools.pairwise(errors))
    assert errors[-1] == 0
    conv.weight.data = weight.bfloat16()
    (_, pieces) = split(conv, cp, [full])
    merged = cp.merge([Piece(p.name, p.geometry, p.weight.bfloat16(), None) for p in pieces], Geometry.of(conv))
    assert torch.equal(merged, conv.weight)


def test_cp_is_as_good_as_tensorly_s():
    from tensorly.decomposition import parafac

    generator = torch.Generator().manual_seed(2)
    mixing = torch.linalg.qr(torch.randn(32, 32, generator=generator, dtype=torch.float64))[0] * torch.arange(1, 33) ** -0.7
    conv = torch.nn.Conv2d(32, 32, 3, dtype=torch.float64)
    conv.weight.data = torch.einsum("ab,bchw->achw", mixing, torch.randn(32, 32, 3, 3, generator=generator, dtype=torch.float64))
    tensor = conv.weight.detach().numpy()
    for rank in (12, 20, 25):
        ours = relative_error(conv, kind_named("cp"), split(conv, kind_named("cp"), [rank])[1])
        theirs = tensorly.cp_to_tensor(parafac(tensor, rank, n_iter_max=100, tol=1e-6, random_state=0, init="svd"))
        assert ours <= 1.01 * np.linalg.norm(theirs - tensor) / np.linalg.norm(tensor)


def test_a_kind_that_leaves_out_what_it_must_say_is_refused():
    class Unfinished(OneRank):
        modes = ("rank", "other")

    @dataclass(frozen=True, slots=True)
    class Mine(Factorization):
        kind: ClassVar[str] = "mine"
        rank: int
        other: Optional[int] = None  # noqa: UP045 - written as many write it

    Unfinished.factorization = Mine
    with pytest.raises(SurgeryTypeError, match=r"lacks .*shapes, split, .*merge"):
        register_kind(Unfinished())
    assert Mine(4).other is None
    duck = SimpleNamespace(factorization=Mine, modes=("rank", "other"), **dict.fromkeys(METHODS, lambda *_: None))
    with pytest.raises(SurgeryTypeError, match=r"lacks ranks_are_channels, mixes_inputs, has_spectra"):
        register_kind(duck)

    @dataclass(frozen=True, slots=True)
    class Three(Factorization):
        kind: ClassVar[str] = "three"
        a: int
        b: int
        c: int

    flags = {"ranks_are_channels": True, "mixes_inputs": True, "has_spectra": True}
    with pytest.raises(SurgeryTypeError, match="at most 2 ranks"):
        register_kind(SimpleNamespace(factorization=Three, modes=("a", "b", "c"), **flags, **dict.fromkeys(METHODS, lambda *_: None)))
