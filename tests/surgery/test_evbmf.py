"""EVBMF: ranks as published code gives them, and the laws that hold for matrices with a clear answer."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.optimize import minimize_scalar

import surgery
from passes.errors import SurgeryTypeError, SurgeryValueError
from surgery.ranks import evbmf, evbmf_rank
from surgery.zoo import make

VDSR = {
    "residual_layer.0.conv.weight": (11, 8),
    "residual_layer.3.conv.weight": (41, 41),
    "residual_layer.9.conv.weight": (11, 9),
    "residual_layer.17.conv.weight": (21, 22),
    "input.weight": (6, 0),
    "output.weight": (0, 0),
}


@pytest.mark.parametrize(("name", "ranks"), VDSR.items())
def test_ranks_of_vdsr(vdsr_weights, name, ranks):
    assert evbmf(vdsr_weights[name]) == ranks


def low_rank(rows, columns, rank, noise, seed):
    generator = torch.Generator().manual_seed(seed)
    signal = torch.randn(rows, rank, generator=generator) @ torch.randn(rank, columns, generator=generator)
    return signal + noise * torch.randn(rows, columns, generator=generator)


@given(st.integers(8, 40), st.integers(8, 120), st.integers(1, 4), st.integers(0, 1000), st.sampled_from([1e-6, 1e-3, 1.0, 1e3, 1e6]))
def test_a_low_rank_matrix_with_noise_at_any_scale_and_either_way_up(rows, columns, rank, seed, scale):
    matrix = low_rank(rows, columns, rank, 0.05, seed)
    found = evbmf(matrix)
    assert found == (rank, rank)
    assert evbmf(matrix * scale) == found
    assert evbmf(matrix.T.contiguous()) == found


@given(st.integers(2, 64), st.integers(2, 64), st.integers(0, 1000))
def test_noise_alone_has_rank_zero_or_nearly(rows, columns, seed):
    noise = torch.randn(rows, columns, 3, 3, generator=torch.Generator().manual_seed(seed))
    assert max(evbmf(noise)) <= 1


def test_noise_alone_in_a_layer_of_usual_size_has_rank_zero():
    for seed in range(5):
        assert evbmf(0.05 * torch.randn(64, 64, 3, 3, generator=torch.Generator().manual_seed(seed))) == (0, 0)


@given(st.integers(3, 12), st.integers(12, 40), st.integers(0, 100))
def test_only_singular_values_matter(rows, columns, seed):
    matrix = low_rank(rows, columns, 2, 0.1, seed).double()
    values = torch.linalg.svdvals(matrix)
    assert evbmf(matrix)[0] == evbmf_rank(values, (rows, columns)) == evbmf_rank(values, (columns, rows))


def test_more_rows_than_columns_and_the_two_unfoldings():
    weight = torch.einsum("ar,br,rhw->abhw", torch.randn(200, 3), torch.randn(4, 3), torch.randn(3, 3, 3)) + 0.02 * torch.randn(200, 4, 3, 3)
    assert evbmf(weight)[0] == 3
    assert evbmf(weight.transpose(0, 1).contiguous()) == evbmf(weight)[::-1]


def test_exactly_low_rank_without_noise():
    assert evbmf(low_rank(30, 50, 4, 0.0, 0)) == (4, 4)
    assert evbmf(torch.zeros(8, 8, 3, 3)) == (0, 0)


def test_the_dtype_does_not_matter(vdsr_weights):
    weight = vdsr_weights["residual_layer.9.conv.weight"]
    assert evbmf(weight.double()) == evbmf(weight.to(memory_format=torch.channels_last)) == (11, 9)


def test_the_noise_variance_is_a_minimum_of_the_free_energy_written_out_again():
    """The free energy of JMLR 14 (equation 29), written a second time and minimised on a fine grid."""
    matrix = low_rank(24, 60, 3, 0.3, 7).double()
    values = torch.linalg.svdvals(matrix)
    alpha = 24 / 60
    x_bar = (1 + 2.5129 * alpha**0.5) * (1 + alpha**0.5 / 2.5129)

    def energy(variance):
        total = 0.0
        for value in values.tolist():
            x = value**2 / (60 * variance)
            if x <= x_bar:
                total += x - torch.log(torch.tensor(x)).item()
            else:
                tau = 0.5 * (x - 1 - alpha + ((x - 1 - alpha) ** 2 - 4 * alpha) ** 0.5)
                total += x - tau + torch.log(torch.tensor((tau + 1) / x)).item() + alpha * torch.log(torch.tensor(tau / alpha + 1)).item()
        return total

    best = minimize_scalar(energy, bounds=(0.01, 0.3), method="bounded", options={"xatol": 1e-7}).x
    assert best == pytest.approx(0.09, rel=0.15)  # the noise that was put in, squared
    assert evbmf_rank(values, (24, 60)) == int((values**2 > 60 * best * x_bar).sum()) == 3


@pytest.mark.parametrize(("bad", "error"), [([1, 2], SurgeryTypeError), (torch.ones(3, 3, dtype=torch.int32), SurgeryTypeError)])
def test_wrong_types(bad, error):
    with pytest.raises(error, match="floating-point tensor"):
        evbmf(bad)


@pytest.mark.parametrize("bad", [torch.ones(3), torch.ones(0, 3), torch.tensor([[1.0, float("nan")]])])
def test_wrong_values(bad):
    with pytest.raises(SurgeryValueError, match="evbmf: weight"):
        evbmf(bad)


def test_a_fresh_network_comes_back_unchanged_with_reasons():
    torch.manual_seed(0)
    model, shape = make("surgery:resnet56")
    fresh = type(model)(3).eval()
    net = surgery.decompose(fresh, ranks="evbmf", example_inputs=torch.randn(shape))
    assert [type(m) for m in net.modules()] == [type(m) for m in fresh.modules()]
    state = fresh.state_dict()
    assert all(torch.equal(v, state[k]) for k, v in net.state_dict().items())
    report = surgery.report(net)
    convs = [row for row in report.layers if row.layer.startswith("Conv")]
    assert len(convs) == 19
    assert {row.reason for row in convs} == {"EVBMF sees nothing but noise in its weight (rank 0)"}
    assert report.passes == ()
