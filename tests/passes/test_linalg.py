"""The numerics against outside oracles: full singular value decompositions and tensorly, also where Gram matrices alone would fail."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from passes import ModuleHost
from passes.kinds import kind_named
from passes.linalg import channels_apart, hooi, spectra, spectrum, tail_energy
from passes.parity import difference
from passes.spectra import Spectra


def generator(seed):
    return torch.Generator().manual_seed(seed)


def channel_spectra(tensor):
    return [spectrum(tensor.movedim(mode, 0).flatten(1), name) for mode, name in ((0, "out"), (1, "in"))]


def test_tucker_agrees_with_tensorly():
    """An outside oracle: tensorly's partial_tucker (higher-order orthogonal iteration from the same start) reaches no lower error."""
    import tensorly
    from tensorly.decomposition import partial_tucker

    tensor = torch.randn(20, 16, 3, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    tensor += 3 * torch.einsum("a,b,hw->abhw", tensor[:, 0, 0, 0], tensor[0, :, 0, 0], tensor[0, 0])
    spectra = channel_spectra(tensor)
    core, bases = hooi(tensor, (7, 5), spectra, tolerance=1e-9)
    ours = torch.einsum("ar,bs,rshw->abhw", bases[0], bases[1], core)
    (their_core, factors), _ = partial_tucker(tensor.numpy(), rank=[7, 5], modes=[0, 1], n_iter_max=200, tol=1e-9)
    theirs = torch.from_numpy(tensorly.tenalg.multi_mode_dot(their_core, factors, modes=[0, 1]))
    norm = tensor.norm()
    assert float((tensor - ours).norm() / norm) <= float((tensor - theirs).norm() / norm) + 1e-6
    assert difference(ours, theirs) < 1e-2


def test_bases_are_orthonormal_with_fixed_signs():
    tensor = torch.randn(10, 8, 3, 3, generator=torch.Generator().manual_seed(4))
    spectra = channel_spectra(tensor)
    _, bases = hooi(tensor, (4, 3), spectra)
    for basis in bases:
        assert torch.allclose(basis.T @ basis, torch.eye(basis.shape[1], dtype=torch.float64), atol=1e-12)
        peak = basis.abs().argmax(0)
        assert bool((basis[peak, torch.arange(basis.shape[1])] > 0).all())


@pytest.mark.parametrize("shape", [(5, 40), (40, 5), (6, 6)])
def test_singular_values_are_those_of_svd(shape):
    matrix = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    found = spectrum(matrix, "out")
    assert torch.allclose(found.values, torch.linalg.svdvals(matrix), atol=1e-10)
    assert found.full == min(shape)


def projector(basis):
    return basis @ basis.mT


def with_singular_values(values, columns, seed):
    """A matrix (len(values), columns) float64 with exactly these singular values."""
    rows = len(values)
    left = torch.linalg.qr(torch.randn(rows, rows, dtype=torch.float64, generator=generator(seed)))[0]
    right = torch.linalg.qr(torch.randn(columns, rows, dtype=torch.float64, generator=generator(seed + 1)))[0]
    return left @ torch.diag(torch.tensor(values, dtype=torch.float64)) @ right.mT


@pytest.mark.parametrize("columns", [12, 100])
@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
def test_small_singular_values_of_a_nearly_singular_matrix_are_exact(columns, scale):
    """A Gram matrix would lose everything below 1e-8 of the largest singular value; so would a rank chosen from it."""
    values = [1.0, 0.5, 1e-3, 1e-6, 1e-9, 1e-11]
    matrix = scale * with_singular_values(values, columns, 3)
    found = spectrum(matrix, "out")
    assert torch.allclose(found.values / scale, torch.tensor(values, dtype=torch.float64), rtol=1e-4, atol=0)
    gram = torch.linalg.eigvalsh(matrix @ matrix.mT / scale**2).flip(0).clamp(min=0).sqrt()
    assert not torch.allclose(gram, torch.tensor(values, dtype=torch.float64), rtol=1e-4, atol=0)  # the test is one
    left, _, _ = torch.linalg.svd(matrix, full_matrices=False)
    for rank in range(1, 6):
        assert torch.allclose(projector(found.basis[:, :rank]), projector(left[:, :rank]), atol=1e-4)
        rest = matrix - projector(found.basis[:, :rank]) @ matrix
        assert float(torch.linalg.matrix_norm(rest, 2)) / scale == pytest.approx(values[rank], rel=1e-3)


def test_nearly_singular_float32_weights_are_cut_as_exactly_as_by_svd():
    """A layer whose channels nearly repeat: cutting it to the numerical rank must cost float32 rounding, not its square root."""
    base = torch.randn(6, 40, 9, dtype=torch.float64, generator=generator(5))
    mixed = torch.einsum("or,rip->oip", torch.randn(40, 6, dtype=torch.float64, generator=generator(6)), base)
    mixed += 1e-6 * torch.randn(40, 40, 9, dtype=torch.float64, generator=generator(7))
    conv = nn.Conv2d(40, 40, 3, bias=False)
    with torch.no_grad():
        conv.weight.copy_(mixed.view(40, 40, 3, 3))
    (site,) = ModuleHost(conv).sites()
    kind = kind_named("tucker")
    found = Spectra().of(site, kind)
    exact = torch.linalg.svdvals(conv.weight.detach().double().flatten(1))
    assert torch.allclose(found[0].values, exact, rtol=1e-6, atol=0)
    pieces = kind.split(conv.weight.detach().double(), None, site.geometry, kind.from_ranks(site.geometry, (6, 40)), found)
    error = float((kind.merge(pieces, site.geometry) - conv.weight.detach().double()).norm())
    assert error == pytest.approx(float(exact[6:].norm()), rel=1e-6)


@given(st.integers(1, 20), st.integers(1, 60), st.integers(1, 4), st.integers(0, 1000), st.sampled_from([1.0, 1e-7, 0.0]))
def test_spectra_of_a_stack_are_those_of_svd(rows, columns, count, seed, last):
    stack = torch.randn(count, rows, columns, dtype=torch.float64, generator=generator(seed))
    stack[-1, -1] *= last  # the last matrix nearly or exactly singular, the others not
    found = spectra(stack, "out")
    assert len(found) == count
    for one, matrix in zip(found, stack, strict=True):
        assert torch.allclose(one.values, torch.linalg.svdvals(matrix), rtol=1e-6, atol=1e-12)
        assert one.basis.shape == (rows, min(rows, columns))
        assert torch.allclose(one.basis.mT @ one.basis, torch.eye(one.full, dtype=torch.float64), atol=1e-10)
        assert torch.allclose(projector(one.basis) @ matrix, matrix, atol=1e-9)
        assert (one.full, one.shape) == (min(rows, columns), (rows, columns))


def test_zero_and_one_dimensional_weights():
    found = spectrum(torch.zeros(4, 9), "out")
    assert found.values.tolist() == [0.0] * 4
    assert torch.allclose(found.basis.mT @ found.basis, torch.eye(4, dtype=torch.float64))
    kind = kind_named("tucker")
    conv = nn.Conv2d(4, 5, 3, bias=False)
    with torch.no_grad():
        conv.weight.zero_()
    (site,) = ModuleHost(conv).sites()
    surface = kind.error_surface(conv.weight.detach(), site.geometry, Spectra().of(site, kind))
    assert float(surface.abs().max()) == 0.0


@given(st.integers(1, 8), st.integers(1, 8), st.integers(0, 100))
def test_tail_energy_is_what_a_corner_leaves_out(rows, columns, seed):
    energy = torch.rand(rows, columns, dtype=torch.float64, generator=generator(seed))
    tails = tail_energy(energy)
    for r in range(rows + 1):
        for s in range(columns + 1):
            rest = energy.clone()
            rest[:r, :s] = 0
            assert float(tails[r, s]) == pytest.approx(float(rest.sum()), rel=1e-12, abs=1e-300)
    assert torch.allclose(tail_energy(energy[0]), tail_energy(energy[:1])[1], rtol=1e-12)


def test_the_error_surface_keeps_small_errors_apart():
    """Cumulative sums taken from the total would lose every error below 1e-8."""
    tensor = torch.zeros(4, 4, 3, 3, dtype=torch.float64)
    for channel, size in enumerate((1.0, 1e-4, 1e-7, 1e-10)):
        tensor[channel, channel, 1, 1] = size
    kind = kind_named("tucker")
    conv = nn.Conv2d(4, 4, 3, bias=False, dtype=torch.float64)
    with torch.no_grad():
        conv.weight.copy_(tensor)
    (site,) = ModuleHost(conv).sites()
    surface = kind.error_surface(tensor, site.geometry, Spectra().of(site, kind))
    assert torch.allclose(surface.diagonal()[1:4], torch.tensor([1e-4, 1e-7, 1e-10], dtype=torch.float64), rtol=1e-5)


@pytest.mark.parametrize("dims", [1, 2, 3])
def test_channels_apart_needs_no_copy_in_channels_last(dims):
    weight = torch.randn(3, 4, *[2, 3, 5][:dims])
    apart = channels_apart(weight)
    assert torch.equal(apart, weight.flatten(2).transpose(1, 2))
    if dims > 1:
        last = weight.to(memory_format=torch.channels_last if dims == 2 else torch.channels_last_3d)
        assert channels_apart(last).data_ptr() == last.data_ptr()


def test_iteration_ends_near_where_it_converges():
    """The default tolerance is worth a few 1e-4 of the error at most, on a tensor that converges slowly (it has no structure at all)."""
    tensor = torch.randn(24, 20, 3, 3, dtype=torch.float64, generator=generator(11))
    start = channel_spectra(tensor)
    errors = []
    for tolerance in (2e-5, 1e-12):
        core, _ = hooi(tensor, (9, 7), start, tolerance)
        errors.append(float((tensor.square().sum() - core.square().sum()).sqrt()))
    assert errors[1] <= errors[0] <= errors[1] * (1 + 3e-4)
    first = tensor.square().sum() - torch.einsum("ar,bs,abhw->rshw", start[0].basis[:, :9], start[1].basis[:, :7], tensor).square().sum()
    assert errors[0] < float(first.sqrt())


def test_only_the_leading_eigenpairs_of_a_wide_layer_are_computed(monkeypatch):
    """Where that is faster; the cut is the same."""
    from scipy import linalg as scipy_linalg

    from passes import linalg

    tensor = torch.randn(40, 36, 9, dtype=torch.float64, generator=generator(12))
    start = channel_spectra(tensor)
    whole = hooi(tensor, (4, 4), start)
    asked = []
    real = scipy_linalg.eigh
    monkeypatch.setattr(scipy_linalg, "eigh", lambda *a, **k: asked.append(k["subset_by_index"]) or real(*a, **k))
    monkeypatch.setattr(linalg, "FEW_FROM", 36)
    few = hooi(tensor, (4, 4), start)
    assert set(asked) == {(36, 39), (32, 35)}
    for a, b in zip((few[0], *few[1]), (whole[0], *whole[1]), strict=True):
        assert torch.allclose(a, b, atol=1e-9)
    asked.clear()
    hooi(tensor, (9, 9), start)
    assert asked == []


def test_no_gram_matrix_of_the_many_outputs_of_a_layer_with_few_inputs(monkeypatch):
    """A layer that predicts the kernels of others has thousands of times more outputs than inputs."""
    import passes.linalg

    def gram_of_rows(matrix):
        squares, vectors = passes.linalg._eigh(matrix @ matrix.mT)
        return squares.clamp(min=0).sqrt(), vectors

    tensor = torch.randn(600, 6, 3, generator=generator(15), dtype=torch.float64)
    start = channel_spectra(tensor)
    monkeypatch.setattr(passes.linalg, "_thin", gram_of_rows)
    core, (basis_out, basis_in) = hooi(tensor, (5, 3), start)
    monkeypatch.undo()
    sizes = []
    eigh = torch.linalg.eigh
    monkeypatch.setattr(torch.linalg, "eigh", lambda gram: sizes.append(len(gram)) or eigh(gram))
    narrow, (narrow_out, narrow_in) = hooi(tensor, (5, 3), start)
    assert max(sizes) == 6
    assert float(core.norm()) == pytest.approx(float(narrow.norm()), rel=1e-12)
    assert difference(narrow_out @ narrow_out.mT, basis_out @ basis_out.mT) < 1e-8
    assert difference(narrow_in @ narrow_in.mT, basis_in @ basis_in.mT) < 1e-8


def test_same_shaped_layers_computed_together_have_the_spectra_that_each_has_alone():
    model = nn.Sequential(*[nn.Conv2d(6, 8, 3) for _ in range(5)], nn.Conv2d(8, 6, 3), nn.Conv2d(24, 24, 3))
    kind = kind_named("tucker")
    sites = ModuleHost(model).sites()
    together, alone = (Spectra([(site, kind) for site in sites], together=choice) for choice in (True, False))
    for store in (together, alone):
        store.of(sites[0], kind)
    assert len(together._found) == 5  # all of that shape: they hold fewer numbers than the largest layer
    assert len(alone._found) == 1
    for site in sites:
        for a, b in zip(together.of(site, kind), alone.of(site, kind), strict=True):
            assert torch.allclose(a.values, b.values, rtol=1e-12)
            assert torch.allclose(a.basis, b.basis, atol=1e-9)
    for site in sites:
        together.let_go(site)
    assert together._found == {}


def test_each_spectrum_is_computed_once(monkeypatch, small):
    import surgery
    from passes import spectra as module

    computed = []
    real = module.spectra
    monkeypatch.setattr(module, "spectra", lambda stack, mode: computed.append(tuple(stack.shape)) or real(stack, mode))
    surgery.decompose(small, 0.5)
    assert len(computed) == 2 + 2 + 1 + 2  # conv1, conv2 and tail.1 in two modes, mix in one


@pytest.mark.parametrize("smallest", [1e-2, 1e-4, 1e-6, 1e-8, 1e-10])
def test_a_weight_of_exact_rank_is_cut_exactly_however_its_channels_are_scaled(smallest):
    """Iterating on Gram matrices of such a weight would lose what the higher-order SVD had."""
    scale = torch.logspace(0, torch.log10(torch.tensor(smallest)), 8, dtype=torch.float64)
    core = torch.randn(8, 8, 3, 3, dtype=torch.float64, generator=generator(1)) * scale.view(-1, 1, 1, 1) * scale.view(1, -1, 1, 1)
    left, right = (torch.linalg.qr(torch.randn(16, 8, dtype=torch.float64, generator=generator(seed)))[0] for seed in (2, 3))
    weight = torch.einsum("or,rshw,is->oihw", left, core, right)
    for ranks, worst in (((8, 8), 1e-14), ((7, 7), None)):
        core, (basis_out, basis_in) = hooi(weight, ranks, channel_spectra(weight))
        error = float((torch.einsum("or,rshw,is->oihw", basis_out, core, basis_in) - weight).norm() / weight.norm())
        start = channel_spectra(weight)
        projected = torch.einsum("op,pihw,iq->oqhw", projector(start[0].basis[:, : ranks[0]]), weight, projector(start[1].basis[:, : ranks[1]]))
        assert error <= (worst if worst is not None else float((projected - weight).norm() / weight.norm()) * (1 + 1e-6) + 1e-15)


@pytest.mark.parametrize("scale", [1e160, 1e-200])
def test_weights_beyond_use_are_an_error(scale):
    import surgery

    model = nn.Sequential(nn.Conv2d(8, 8, 3, dtype=torch.float64))
    model[0].weight.data.mul_(scale)
    for ranks in ({"0": (4, 4)}, "stable", "energy:0.9", 0.5):
        with pytest.raises(surgery.SurgeryValueError, match=r"0: its weights are of size .*, whose squares float64 cannot hold"):
            surgery.decompose(model, ranks)


def test_an_ordinary_layer_is_cut_without_a_singular_value_decomposition(monkeypatch):
    """Of its channels' Gram matrices instead, which are far smaller."""
    import surgery

    sizes, eigh = [], torch.linalg.eigh
    for name in ("svd", "svdvals"):
        monkeypatch.setattr(torch.linalg, name, None)
    monkeypatch.setattr(torch.linalg, "eigh", lambda gram: sizes.append(gram.shape[-1]) or eigh(gram))
    net = surgery.decompose(nn.Sequential(nn.Conv2d(32, 48, 3)), 0.25)
    assert surgery.report(net)["0"].ranks == (12, 8)
    assert set(sizes) == {48, 32}
