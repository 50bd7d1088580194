"""The contract of every kind, by the registry: a new kind is tested the day it is added."""

from __future__ import annotations

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from passes import Decompose, ModuleHost
from passes.errors import SurgeryError, SurgeryTypeError, SurgeryValueError
from passes.factorization import Keep
from passes.geometry import Geometry, Piece
from passes.kinds import KINDS, decision_from_json, kind_named, kind_of, usual_kind
from passes.parity import assert_parity
from passes.site import Call
from passes.spectra import Spectra
from surgery.cost import chain_macs, chain_params
from tests.geometries import layers

every_kind = pytest.mark.parametrize("kind", KINDS, ids=[k.factorization.kind for k in KINDS])


def split(layer, kind, ranks):
    geometry = Geometry.of(layer)
    factorization = kind.from_ranks(geometry, ranks)
    (site,) = ModuleHost(layer).sites()
    spectra = Spectra().of(site, kind)
    return factorization, kind.split(layer.weight.detach(), site.bias, geometry, factorization, spectra)


def relative_error(layer, kind, pieces):
    merged = kind.merge([Piece(p.name, p.geometry, p.weight.double(), None) for p in pieces])
    weight = layer.weight.detach()
    return float((merged - weight).norm() / weight.norm())


def draw_ranks(data, full):
    return [data.draw(st.integers(1, f)) for f in full]


@every_kind
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
    low = draw_ranks(data, full)
    mode = data.draw(st.integers(0, len(full) - 1))
    high = [min(r + (i == mode), f) for i, (r, f) in enumerate(zip(low, full, strict=True))]
    errors = [relative_error(layer, kind, split(layer, kind, ranks)[1]) for ranks in (low, high)]
    assert errors[1] <= errors[0] + 1e-4


@every_kind
@given(drawn=layers(), data=st.data())
def test_shapes_are_those_of_the_pieces_and_of_the_chain(kind, drawn, data):
    layer, inputs = drawn
    geometry = Geometry.of(layer)
    assume(kind.refuses(geometry) is None)
    factorization, pieces = split(layer, kind, draw_ranks(data, kind.full_ranks(geometry)))
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
    ranks = draw_ranks(data, kind.full_ranks(geometry))
    clipped = kind.from_ranks(geometry, ranks)
    assert all(c <= r for c, r in zip(clipped.ranks, ranks, strict=True))
    assert kind.from_ranks(geometry, clipped.ranks) == clipped


@every_kind
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
    assert tuple(surface.shape) == tuple(f + 1 for f in full)
    factorization, pieces = split(layer, kind, draw_ranks(data, full))
    reached, told = relative_error(layer, kind, pieces), float(surface[factorization.ranks])
    assert reached <= told + 1e-9
    if len(full) == 1:
        assert told == pytest.approx(reached, rel=1e-9, abs=1e-9)
    assert float(surface[full]) < 1e-12
    assert bool((surface[0] == 1).all())
    for dim in range(surface.ndim):
        assert bool((surface.diff(dim=dim) <= 1e-15).all())


@every_kind
@given(drawn=layers(), data=st.data())
def test_json_round_trip(kind, drawn, data):
    geometry = Geometry.of(drawn[0])
    assume(kind.refuses(geometry) is None)
    factorization = kind.from_ranks(geometry, draw_ranks(data, kind.full_ranks(geometry)))
    assert decision_from_json(factorization.to_json()) == factorization
    assert kind_of(factorization) is kind


@every_kind
def test_refusals_say_why(kind):
    square = {"kernel": (3, 3), "stride": (1, 1), "padding": (1, 1), "dilation": (1, 1), "output_padding": (0, 0)}
    pointwise = square | {"kernel": (1, 1), "padding": (0, 0)}
    for base in (square, pointwise):
        grouped = Geometry(in_channels=8, out_channels=8, groups=2, **base)
        transposed = Geometry(in_channels=8, out_channels=8, transposed=True, **base)
        assert kind.refuses(grouped)
        assert kind.refuses(transposed)
    fits = [kind.refuses(Geometry(in_channels=8, out_channels=8, **base)) for base in (square, pointwise)]
    assert fits.count(None) == 1


@every_kind
@given(drawn=layers(), scale=st.sampled_from([1e-4, 1.0, 1e4]))
def test_unfoldings_have_the_norm_of_the_weight(kind, drawn, scale):
    layer, _ = drawn
    geometry = Geometry.of(layer)
    assume(kind.refuses(geometry) is None)
    weight = layer.weight.detach() * scale
    for matrix, full in zip(kind.unfoldings(weight, geometry), kind.full_ranks(geometry), strict=True):
        assert min(matrix.shape) == full
        assert float(matrix.norm()) == pytest.approx(float(weight.norm()))


@given(drawn=layers())
def test_macs_by_formula_equal_a_counter(drawn):
    layer, inputs = drawn
    with FlopCounterMode(display=False) as counter:
        layer(inputs)
    assert Geometry.of(layer).macs(tuple(inputs.shape)) == counter.get_total_flops() // 2


@pytest.mark.parametrize(
    "layer", [torch.nn.ConvTranspose2d(4, 6, 3, 2, 1, 1), torch.nn.ConvTranspose1d(4, 6, 5, 3), torch.nn.Conv2d(8, 4, 3, groups=4)]
)
def test_geometry_of_layers_that_no_kind_takes_yet(layer):
    inputs = torch.randn(2, layer.in_channels, *[7] * (layer.weight.ndim - 2))
    geometry = Geometry.of(layer)
    assert geometry.weight_shape == tuple(layer.weight.shape)
    assert geometry.output_shape(tuple(inputs.shape)) == tuple(layer(inputs).shape)
    with FlopCounterMode(display=False) as counter:
        layer(inputs)
    assert geometry.macs(tuple(inputs.shape)) == counter.get_total_flops() // 2


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
