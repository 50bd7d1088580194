"""Factors of data-aware cuts get orthogonal bases, the product as it was."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

import surgery
from passes import host_for
from surgery import CP, SVD, Channel, Depthwise, Spatial, Tucker
from surgery.training import balance
from surgery.training.balance import orthogonalize
from tests.networks import Kinds, Small

INPUTS = {Small: (4, 3, 12, 12), Kinds: (4, 3, 11, 13)}


def rows(piece, *, outputs):
    """(groups, channels on that side, everything else)"""
    blocks = piece.geometry.forward_blocks(piece.weight.detach())
    return (blocks if outputs else blocks.transpose(1, 2)).flatten(2)


def gram(piece, *, outputs):
    found = rows(piece, outputs=outputs)
    return found @ found.mT


def assert_diagonal(matrices, *, like=None):
    """So many times the identity; or what is said."""
    identity = torch.eye(matrices.shape[-1], dtype=matrices.dtype) * matrices.diagonal(dim1=-2, dim2=-1).mean(-1)[:, None, None]
    diagonal = identity if like is None else like
    torch.testing.assert_close(matrices, diagonal, rtol=1e-8, atol=1e-9 * float(matrices.abs().max()))


def correlated(shape):
    """Inputs whose channels have much in common: what makes the factors of a data-aware cut oblique."""
    torch.manual_seed(2)
    x = torch.randn(shape, dtype=torch.float64)
    return x + 4 * x.mean(1, keepdim=True)


def cut(model, ranks, **options):
    return surgery.decompose(model, ranks, calibration=[correlated(INPUTS[type(model)])], guard="none", **options)


@pytest.mark.parametrize("build", [Small, Kinds])
def test_both_ends_of_a_chain_become_orthonormal_up_to_a_common_scale(build):
    torch.manual_seed(0)
    model = build().double().eval()
    with torch.no_grad():
        oblique, even = cut(model, 0.5), cut(model, 0.5, balanced=True)
    ends = changed = 0
    for before, after in zip(host_for(oblique).sites(), host_for(even).sites(), strict=True):
        if after.chain is None:
            continue
        scale = float(before.weight.abs().max())
        torch.testing.assert_close(after.weight, before.weight, rtol=1e-9, atol=1e-11 * scale)
        if len(after.pieces) < 3:
            continue
        first, last = after.pieces[0], after.pieces[-1]
        assert_diagonal(gram(first, outputs=True))
        assert_diagonal(gram(last, outputs=False))
        ends += 2
        odd = torch.linalg.cond(rows(before.pieces[0], outputs=True)).max()
        changed += bool(odd > 1.5)
    assert ends >= 4
    assert changed >= 1  # else there was nothing to do


@pytest.mark.parametrize(
    ("site", "kind"), [("conv2", Tucker(6, None)), ("conv2", Spatial(6)), ("conv2", Channel(8)), ("mix", SVD(7)), ("head", SVD(3))]
)
def test_of_two_layers_each_has_the_roots_of_the_singular_values(site, kind):
    torch.manual_seed(1)
    model = Small().double().eval()
    oblique, even = cut(model, {site: kind}), cut(model, {site: kind}, balanced=True)
    before, after = (next(s for s in host_for(net).sites() if s.name == site) for net in (oblique, even))
    torch.testing.assert_close(after.weight, before.weight, rtol=1e-9, atol=1e-11)
    first, second = gram(after.pieces[0], outputs=True), gram(after.pieces[1], outputs=False)
    assert_diagonal(first, like=torch.diag_embed(first.diagonal(dim1=-2, dim2=-1)))
    assert_diagonal(second / second.diagonal(dim1=-2, dim2=-1).mean(), like=first / first.diagonal(dim1=-2, dim2=-1).mean())


@pytest.mark.parametrize(("site", "kind"), [("conv2", CP(5)), ("conv2", Depthwise(2)), ("tail.1", Depthwise(1))])
def test_where_channels_are_not_mixed_only_sizes_change(site, kind):
    torch.manual_seed(3)
    model = Small().double().eval()
    oblique, even = cut(model, {site: kind}), cut(model, {site: kind}, balanced=True)
    before, after = (next(s for s in host_for(net).sites() if s.name == site) for net in (oblique, even))
    assert torch.equal(after.weight, before.weight)
    for old, new in zip(before.pieces, after.pieces, strict=True):
        ratios = new.weight[old.weight != 0] / old.weight[old.weight != 0]
        assert ratios.min() == ratios.max()


def test_dead_layers_and_ranks_above_a_layers_own_pass_through():
    torch.manual_seed(5)
    model = Small().double().eval()
    with torch.no_grad():
        model.conv2.weight.zero_()
        model.mix.weight[:] = model.mix.weight[:1]  # of rank one
    x = correlated(INPUTS[Small])
    net = cut(model, {"conv2": (8, 4), "mix": 7, "tail.1": (32, 32)}, balanced=True)
    assert all(bool(p.isfinite().all()) for p in net.parameters())
    torch.testing.assert_close(net(x), model(x), rtol=1e-7, atol=1e-9)


def test_what_the_number_type_cannot_hold_stays():
    torch.manual_seed(6)
    net = cut(Small().double().eval(), {"conv2": (8, 12), "tail.1": (16, 16)})
    with torch.no_grad():
        for layer in (net.conv2.reduce, net.conv2.core):
            layer.weight.fill_(60000 / 2)  # along the one direction that they have in common: its length is past what float16 holds
    before = {name: p.clone() for name, p in net.half().named_parameters()}
    orthogonalize(net)
    after = dict(net.named_parameters())
    assert all(torch.equal(after[name], before[name]) for name in before if name.startswith("conv2"))
    assert not torch.equal(after["tail.1.core.weight"], before["tail.1.core.weight"])
    assert all(bool(p.isfinite().all()) for p in after.values())


def test_chains_of_one_layer_have_nothing_to_balance(monkeypatch):
    net = surgery.decompose(nn.Sequential(nn.Conv2d(6, 8, 3)), {"0": (4, 4)})
    (site,) = host_for(net).sites()
    alone = replace(site, read_pieces=lambda: site.pieces[:1])
    monkeypatch.setattr(balance, "_chains", lambda *_: [alone])
    before = [p.clone() for p in net.parameters()]
    balance.orthogonalize(net)
    assert all(torch.equal(a, b) for a, b in zip(before, net.parameters(), strict=True))
