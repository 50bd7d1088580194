"""What users may write for ``ranks=``, ``include``, ``exclude``, ``guard`` and ``round_to``, and what each of it means."""

from __future__ import annotations

from math import ceil

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import surgery
from passes.errors import SurgeryTypeError, SurgeryValueError
from surgery import SVD, Keep, Plan, Tucker
from surgery.ranks.rules import Energy, Evbmf, Fraction, fraction_of
from tests.networks import Small, Twice, low_rank_conv

DEPTHWISE = "depthwise convolution (groups=32): each output sees one input channel, so there is nothing to share"
X = torch.randn(2, 3, 12, 12, generator=torch.Generator().manual_seed(11))


def cuts(model, ranks, **options):
    """What is cut, by name."""
    return {name: d for name, d in surgery.plan(model, ranks, **options).items() if not isinstance(d, Keep)}


def reasons(model, ranks, **options):
    return {name: d.reason for name, d in surgery.plan(model, ranks, **options).items() if isinstance(d, Keep)}


def conv(rank_out=6, rank_in=4, noise=0.02, seed=0):
    return nn.Sequential(low_rank_conv(torch.Generator().manual_seed(seed), rank_out, rank_in, noise))


def test_evbmf_finds_the_rank_that_was_put_in():
    assert cuts(conv(), "evbmf") == {"0": Tucker(6, 4)}
    assert surgery.decompose(conv())[0].core.weight.shape == (6, 4, 3, 3)  # it is the default


def test_evbmf_weakened():
    assert cuts(conv(), "evbmf:weaken=0.5", guard="none") == {"0": Tucker(ceil(6 + 0.5 * 26), ceil(4 + 0.5 * 20))}
    assert cuts(conv(), "evbmf:weaken=0.0") == cuts(conv(), "evbmf")


def test_energy_is_the_smallest_rank_that_holds_the_share():
    weight = torch.zeros(6, 5, 3, 3)
    for i, value in enumerate([4.0, 3.0, 2.0, 1.0]):
        weight[i, i, 1, 1] = value  # squares 16, 9, 4, 1 of 30
    model = nn.Sequential(nn.Conv2d(5, 6, 3))
    with torch.no_grad():
        model[0].weight.copy_(weight)
    for share, rank in ((0.5, 1), (16 / 30, 1), (0.54, 2), (25 / 30, 2), (0.9, 3), (1.0, 4)):
        assert cuts(model, f"energy:{share}", guard="none") == {"0": Tucker(rank, rank)}


def test_stable_rank():
    weight = torch.zeros(6, 5, 3, 3)
    for i, value in enumerate((2.0, 2.0, 1.0)):  # 9 / 4, rounded up
        weight[i, i, 1, 1] = value
    model = nn.Sequential(nn.Conv2d(5, 6, 3))
    with torch.no_grad():
        model[0].weight.copy_(weight)
    assert cuts(model, "stable") == {"0": Tucker(3, 3)}


def test_a_fraction_of_the_full_rank_of_each_mode():
    model = nn.Sequential(nn.Conv2d(30, 40, 3), nn.Conv2d(40, 20, 1))
    assert cuts(model, 0.1) == {"0": Tucker(4, 3), "1": SVD(2)}  # 0.1 * 30 rounds to 3, not up to 4
    assert cuts(model, 0.001) == {"0": Tucker(1, 1), "1": SVD(1)}


@given(st.integers(1, 4096), st.floats(1e-6, 1.0))
def test_fraction_of(full, share):
    rank = fraction_of(full, share)
    assert 1 <= rank <= full
    assert rank - 1 < share * full + 1e-9 or rank == 1


def test_a_mode_at_full_rank_is_left_uncut_by_rules_and_cut_when_named():
    model = nn.Sequential(nn.Conv2d(16, 24, 3))
    assert reasons(model, 1.0) == {"0": "at full rank (24, 16) a chain saves nothing"}
    assert cuts(model, {"0": 1.0}) == {"0": Tucker(24, 16)}
    assert cuts(model, lambda site, spectra: (24, 4)) == {"0": Tucker(None, 4)}
    assert cuts(model, lambda site, spectra: (4, 0)) == {"0": Tucker(4, None)}
    assert cuts(model, lambda site, spectra: (None, 4)) == {"0": Tucker(None, 4)}


def test_named_full_rank_cuts_every_convolution_and_no_linear_layer():
    assert list(cuts(Small(), {"re:.*": 1.0})) == ["conv1", "conv2", "mix", "tail.1"]
    assert reasons(Small(), {"re:.*": 1.0}) == {"wide": DEPTHWISE, "head": "not named"}


def test_a_dict():
    table = {"conv2": (8, 4), "re:conv.*": 0.5, "re:.*": None, "mix": 7, "head": 2}
    assert cuts(Small(), table) == {"conv1": Tucker(8, 2), "conv2": Tucker(8, 4), "mix": SVD(7), "head": SVD(2)}
    assert reasons(Small(), table)["tail.1"] == "asked to keep it"
    assert cuts(Small(), {"conv2": Tucker(None, 3)}) == {"conv2": Tucker(None, 3)}
    assert cuts(Small(), {"conv2": (3, None)}) == {"conv2": Tucker(3, None)}


def test_the_first_pattern_that_matches_wins_and_must_match_the_whole_name():
    assert cuts(Small(), {"re:conv1": 0.5, "re:.*1": 0.25}) == {"conv1": Tucker(8, 2), "tail.1": Tucker(8, 8)}


def test_a_pattern_reaches_linear_layers_only_where_it_matches_no_convolution():
    model = nn.ModuleDict({"a": nn.Conv2d(8, 8, 3), "mlp": nn.Linear(8, 8)})
    assert list(cuts(model, {"re:.*": 0.5})) == ["a"]
    assert list(cuts(model, {"re:ml.": 0.5})) == ["mlp"]


def test_named_cuts_are_done_even_where_they_cost_more():
    named, ruled = {"conv1": (16, 3)}, lambda site, spectra: (15, 3) if site.name == "conv1" else None
    assert cuts(Small(), named) == {"conv1": Tucker(16, 3)}
    assert "would take" in reasons(Small(), ruled)["conv1"]
    assert "conv1" in cuts(Small(), ruled, guard="none")


def test_the_guard_counts_macs_of_all_three_layers_at_their_own_resolution():
    """At stride 2 the first 1x1 runs on four times the pixels: fewer parameters, more MACs."""
    model = nn.Sequential(nn.Conv2d(32, 8, 3, stride=2, padding=1, bias=False))
    rule = lambda site, spectra: (None, 17)  # noqa: E731
    assert cuts(model, rule) == {"0": Tucker(None, 17)}
    inputs = torch.randn(1, 32, 8, 8)
    before, after = 9 * 32 * 8 * 16, 32 * 17 * 64 + 9 * 17 * 8 * 16
    assert reasons(model, rule, example_inputs=inputs) == {"0": f"no gain: ranks (full, 17) would take {after:,} MACs instead of {before:,}"}
    assert cuts(model, rule, example_inputs=inputs, guard="none") == {"0": Tucker(None, 17)}


def test_round_to():
    model = nn.Sequential(nn.Conv2d(30, 40, 3))
    assert cuts(model, 0.25, round_to=8) == {"0": Tucker(16, 8)}
    assert cuts(model, 0.9, round_to=8, guard="none") == {}  # 36 -> 40 and 27 -> 32: both full
    assert cuts(model, 0.8, round_to=16, guard="none") == {"0": Tucker(32, None)}  # 24 -> 32, clamped to the full 30
    assert cuts(model, {"0": (5, 3)}, round_to=8) == {"0": Tucker(5, 3)}  # named ranks are done as asked


def test_ranks_are_clipped_to_what_the_other_mode_allows():
    assert cuts(nn.Sequential(nn.Conv2d(40, 40, 3)), {"0": (40, 2)}) == {"0": Tucker(18, 2)}


def test_include_and_exclude():
    assert list(cuts(Small(), 0.5, include="conv2")) == ["conv2"]
    assert list(cuts(Small(), 0.5, include=["re:conv.*", "head"])) == ["conv1", "conv2", "head"]
    assert list(cuts(Small(), 0.25, exclude=["re:conv.*"])) == ["mix", "tail.1"]
    assert list(cuts(Small(), {"re:.*": 0.5}, exclude="mix")) == ["conv1", "conv2", "tail.1"]
    assert reasons(Small(), 0.5, include="conv2")["mix"] == "not included"
    assert reasons(Small(), 0.5, exclude="mix")["mix"] == "excluded"
    with pytest.raises(SurgeryValueError, match="include: 'out_proj' cannot be cut: its weight is read"):
        surgery.plan(nn.MultiheadAttention(8, 2), 0.5, include="out_proj")


def test_method_svd_cuts_layers_of_one_pixel():
    assert cuts(Small(), 0.25, method="svd") == {"mix": SVD(6), "head": SVD(2)}
    assert "SVD factorizes 1x1" in reasons(Small(), 0.25, method="svd")["conv1"]


def test_linear_layers_are_kept_by_default():
    assert reasons(Small(), 0.25)["head"] == "linear layers are cut only where they are named"


def test_a_rule_of_your_own():
    def rule(site, spectra):
        if site.geometry.stride == (2, 2):
            return Keep("strided")
        return [max(1, s.full // 4) for s in spectra]

    plan = surgery.plan(Small(), rule)
    assert plan["conv2"] == Keep("strided")
    assert plan["tail.1"] == Tucker(8, 8)
    assert cuts(Small(), lambda site, spectra: Tucker(3, 3) if site.name == "conv2" else None) == {"conv2": Tucker(3, 3)}


def test_a_rule_of_your_own_for_single_layers():
    def rule(site, spectra):
        return Keep("mine") if site.name == "mix" else 0.5

    plan = surgery.plan(Small(), {"re:conv.*|mix": rule, "tail.1": None})
    assert plan["conv2"] == surgery.plan(Small(), 0.5)["conv2"]
    assert plan["mix"].reason == "mine"
    assert plan["tail.1"].reason == "asked to keep it"
    guarded = surgery.plan(Small(), {"conv1": lambda site, spectra: (15, 3)})
    assert "would take" in guarded["conv1"].reason  # guards apply to rules, wherever they are
    with pytest.raises(SurgeryValueError, match="a fraction must be in"):
        surgery.plan(Small(), lambda site, spectra: 1.5)


def test_a_rule_sees_the_spectra():
    seen = {}
    surgery.plan(Small(), lambda site, spectra: seen.setdefault(site.name, spectra) and None)
    assert [(s.mode, s.full, s.shape) for s in seen["conv2"]] == [("out", 24, (24, 144)), ("in", 16, (16, 216))]
    assert [s.full for s in seen["mix"]] == [24]
    assert all(bool((s.values.diff() <= 0).all()) for spectra in seen.values() for s in spectra)


@pytest.mark.parametrize(
    ("ranks", "error", "message"),
    [
        (4, SurgeryTypeError, "ranks=4 is ambiguous"),
        (True, SurgeryTypeError, "ambiguous"),
        (None, SurgeryTypeError, "got NoneType"),
        (0.0, SurgeryValueError, r"must be in \(0, 1\], got 0.0"),
        (1.5, SurgeryValueError, r"must be in \(0, 1\]"),
        (float("nan"), SurgeryValueError, r"must be in \(0, 1\]"),
        ("evmbf", SurgeryValueError, "no rule and no file"),
        ("evbmf:weaken", SurgeryValueError, "not a number"),
        ("evbmf:weaken=1", SurgeryValueError, r"\[0, 1\)"),
        ("evbmf:strengthen=1", SurgeryValueError, "has the options"),
        ("evbmf:noise=2", SurgeryValueError, "a fraction must be in"),
        ("energy:2", SurgeryValueError, "fraction"),
        ("energy:much", SurgeryValueError, "not a number"),
        ({"conv3": 0.5}, SurgeryValueError, "did you mean 'conv2' or 'conv1'"),
        ({"re:conv3.*": 0.5}, SurgeryValueError, "matches no layer"),
        ({"re:(": 0.5}, SurgeryValueError, "no regular expression"),
        ({3: 0.5}, SurgeryTypeError, "layer names are strings"),
        ({"conv1": 3}, SurgeryTypeError, "tucker takes 2 ranks"),
        ({"conv1": (3,)}, SurgeryTypeError, "tucker takes 2 ranks"),
        ({"conv1": (3, 3, 3)}, SurgeryTypeError, "tucker takes 2 ranks"),
        ({"conv1": "3, 3"}, SurgeryTypeError, "tucker takes 2 ranks"),
        ({"conv1": (2.0, 3)}, SurgeryTypeError, "a rank is an int, got 2.0"),
        ({"conv1": (True, 3)}, SurgeryTypeError, "a rank is an int"),
        ({"conv1": (0, 3)}, SurgeryValueError, "at least 1, got 0"),
        ({"conv1": (17, 3)}, SurgeryValueError, "cannot be cut as asked: rank 17 of mode 'out' is above its full rank 16"),
        ({"conv1": (None, None)}, SurgeryValueError, "no mode is cut"),
        ({"conv1": 1.5}, SurgeryValueError, "'conv1': a fraction"),
        ({"mix": (3, 3)}, SurgeryTypeError, "svd takes an int"),
        ({"mix": Tucker(3, 3)}, SurgeryValueError, "'mix' cannot be cut as asked: .*SVD"),
        ({"conv1": SVD(3)}, SurgeryValueError, "'conv1' cannot be cut as asked"),
        ({"wide": (3, 3)}, SurgeryValueError, "'wide' cannot be cut as asked: depthwise"),
        (Plan({"nothing": Keep("x")}), SurgeryValueError, "'nothing' is no layer"),
        (Plan({"conv1": Tucker(99, 2)}), SurgeryValueError, "above its full rank"),
        (lambda site, spectra: "many", SurgeryTypeError, "the rank rule's answer for conv1"),
        (lambda site, spectra: (99, 3), SurgeryValueError, "rank 99 is above the full rank 16"),
        (lambda site, spectra: (-1, 3), SurgeryValueError, "at least 0"),
        (lambda site, spectra: SVD(2), SurgeryValueError, "the rank rule answered SVD"),
        (np.int64(3), SurgeryTypeError, "is ambiguous"),
        (
            Plan({"conv1": Tucker(5, 2)}).to_json() + " " * 5000,
            SurgeryValueError,
            r"a Plan or the path of one.*got .*\.\.\., which is no rule and no file",
        ),
    ],
)
def test_wrong_ranks_get_one_clear_error(ranks, error, message):
    model = Small()
    with pytest.raises(error, match=message):
        surgery.decompose(model, ranks, inplace=True)
    assert type(model.conv1) is nn.Conv2d


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"method": "tuker"}, SurgeryValueError, "did you mean 'tucker'"),
        ({"guard": "flops"}, SurgeryValueError, "'flops' is none of"),
        ({"round_to": 0}, SurgeryValueError, "at least 1"),
        ({"round_to": 2.0}, SurgeryTypeError, "round_to: expected an int"),
        ({"include": ["conv9"]}, SurgeryValueError, "include: 'conv9' is no layer"),
        ({"exclude": "re:layer.*"}, SurgeryValueError, "exclude: .* matches no layer"),
        ({"include": 3}, SurgeryTypeError, "include: expected layer names"),
        ({"device": "gpu"}, SurgeryValueError, "device: 'gpu' is no device"),
        ({"device": "cuda:99"}, SurgeryValueError, "device: 'cuda:99' is no device"),
        ({"device": 1.5}, SurgeryValueError, "device: 1.5 is no device"),
        ({"device": "meta"}, SurgeryValueError, "holds no numbers"),
    ],
)
def test_wrong_options_get_one_clear_error(options, error, message):
    with pytest.raises(error, match=message):
        surgery.plan(Small(), 0.5, **options)


def test_a_pattern_keeps_what_a_kind_refuses():
    plan = surgery.plan(Small(), {"re:wide|conv1": Tucker(3, 3), "re:mix|conv2": Tucker(3, 3)})
    assert plan["wide"] == Keep(DEPTHWISE)
    assert plan["conv1"] == Tucker(3, 3)
    assert "SVD" in plan["mix"].reason


def test_exclude_reaches_linear_layers_too():
    model = nn.ModuleDict({"h": nn.Sequential(nn.Conv2d(16, 16, 1), nn.Flatten(), nn.Linear(16, 16))})
    assert cuts(model, 0.3, method="svd", exclude=r"re:h\..*") == {}
    assert list(cuts(model, 0.3, method="svd", include=r"re:h\..*")) == ["h.0", "h.2"]


def test_ranks_under_a_pattern_keep_what_they_do_not_fit():
    plan = surgery.plan(Small(), {"re:.*": (16, 4)})
    assert plan["conv2"] == Tucker(16, 4)
    assert "above its full rank 3" in plan["conv1"].reason
    assert "svd takes an int" in plan["mix"].reason


def test_numbers_of_numpy_are_numbers():
    model = Small()
    plan = surgery.plan(model, {"conv1": (np.int64(4), np.int32(2)), "conv2": np.float32(0.5), "mix": np.int64(3)})
    assert (plan["conv1"], plan["conv2"], plan["mix"]) == (Tucker(4, 2), Tucker(12, 8), SVD(3))
    assert Plan.from_json(plan.to_json()) == plan
    assert surgery.plan(model, np.float32(0.5)) == surgery.plan(model, 0.5)
    assert surgery.plan(model, lambda site, spectra: [np.int64(-(-s.full // 2)) for s in spectra]) == surgery.plan(model, 0.5)


def test_round_to_holds_for_whatever_a_rule_answers():
    answers = {"conv1": Tucker(5, None), "conv2": Tucker(9, 3)}
    plan = surgery.plan(Small(), lambda site, spectra: answers.get(site.name, Keep("mine")), round_to=8, guard="none")
    assert (plan["conv1"], plan["conv2"]) == (Tucker(8, None), Tucker(16, 8))


def test_names_of_one_layer_must_not_contradict():
    with pytest.raises(SurgeryValueError, match=r"'conv' and 'again' are one layer or one weight, but get 0\.5 and None"):
        surgery.plan(Twice(), {"conv": 0.5, "again": None})
    assert surgery.plan(Twice(), {"conv": 0.5, "again": 0.5})["conv"] == Tucker(4, 4)


def test_a_request_that_cannot_be_carried_out_is_told_before_any_work(small):
    seen = []
    with pytest.raises(SurgeryValueError, match="'wide' cannot be cut"):
        surgery.decompose(small, {"conv1": (3, 2), "wide": (3, 3)}, inplace=True)
    assert type(small.conv1) is nn.Conv2d
    with pytest.raises(SurgeryValueError, match="rank 99"):
        surgery.decompose(small, lambda site, spectra: seen.append(site.name) or ((99, 3) if site.name == "conv2" else (3, 2)), inplace=True)
    assert seen == ["conv1", "conv2"]
    assert type(small.conv1) is nn.Conv2d


@pytest.mark.parametrize("method", ["tucker", "svd"])
def test_the_error_surface_of_a_weight(method):
    weight = torch.randn(8, 6, *((3, 3) if method == "tucker" else (1, 1)), generator=torch.Generator().manual_seed(1))
    surface = surgery.ranks.error_surface(weight, method=method)
    assert tuple(surface.shape) == ((9, 7) if method == "tucker" else (7,))
    assert float(surface.flatten()[0]) == 1
    assert float(surface.flatten()[-1]) < 1e-12
    model = nn.Sequential(nn.Conv2d(6, 8, weight.shape[-1], bias=False))
    with torch.no_grad():
        model[0].weight.copy_(weight)
    cut = surgery.decompose(model, {"0": (8, 3) if method == "tucker" else 3})
    assert float(surface[(8, 3) if method == "tucker" else 3]) == pytest.approx(surgery.report(cut)["0"].error, rel=1e-4)
    with pytest.raises(SurgeryTypeError, match="error_surface: weight must be a floating-point tensor"):
        surgery.ranks.error_surface([1, 2])
    with pytest.raises(SurgeryValueError, match=r"error_surface: (svd|tucker) does not take"):
        surgery.ranks.error_surface(torch.randn(8, 6, *((3, 3) if method == "svd" else (1, 1))), method=method)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Evbmf(weaken=1.0), "weaken must be in"),
        (lambda: Evbmf(noise="tucker-2"), "noise must be in"),
        (lambda: Evbmf(noise=0), "noise must be in"),
        (lambda: Energy(0), "share must be in"),
        (lambda: Fraction(1.5), "share must be in"),
        (lambda: Fraction(True), "share must be in"),
    ],
)
def test_rules_that_mean_nothing_are_refused_where_they_are_made(make, message):
    with pytest.raises(SurgeryValueError, match=message):
        make()
