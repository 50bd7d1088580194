"""Two linear layers as one: whatever is accepted is exact, what must be accepted is, and every refusal has its reason."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from passes.errors import SurgeryValueError
from passes.fusion import batch_norm_piece, fuse, fused_geometry, refuses
from passes.geometry import Geometry, Piece
from passes.parity import difference
from tests.geometries import CONVS

TRANSPOSED = {1: nn.ConvTranspose1d, 2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}
NORMS = {0: nn.BatchNorm1d, 1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}


def piece_of(module):
    if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d):
        dims = module.dims
        return batch_norm_piece(dims, module.running_mean, module.running_var, module.weight, module.bias, module.eps)
    return Piece("", Geometry.of(module), module.weight.detach(), None if module.bias is None else module.bias.detach())


def applied(piece, x):
    """The piece by torch's own functions."""
    g = piece.geometry
    if g.is_linear:
        return nn.functional.linear(x, piece.weight, piece.bias)
    kind = (TRANSPOSED if g.transposed else CONVS)[g.dims]
    options = {"output_padding": g.output_padding} if g.transposed else {"padding_mode": g.padding_mode}
    layer = kind(g.in_channels, g.out_channels, g.kernel, stride=g.stride, padding=g.padding, dilation=g.dilation, groups=g.groups, **options)
    layer = layer.double()
    with torch.no_grad():
        layer.weight.copy_(piece.weight)
        layer.bias.copy_(torch.zeros(g.out_channels) if piece.bias is None else piece.bias)
        return layer(x)


def batch_norm(dims, channels, affine=True):
    norm = NORMS[dims](channels, affine=affine, dtype=torch.float64).eval()
    norm.dims = dims
    norm.running_mean = torch.randn(channels, dtype=torch.float64)
    norm.running_var = torch.rand(channels, dtype=torch.float64) + 0.1
    if affine:
        nn.init.normal_(norm.weight)
        nn.init.normal_(norm.bias)
    return norm


@st.composite
def linear_modules(draw, dims, into):
    """A convolution, transposed or not, grouped or not, a linear layer, or a batch norm, float64, of ``into`` channels."""
    sort = draw(st.sampled_from(["conv", "conv", "conv", "pointwise", "pointwise", "transposed", "norm"]))
    if sort == "norm":
        return batch_norm(dims, into, draw(st.booleans()))
    groups = draw(st.sampled_from([g for g in (1, 1, 2, 4) if into % g == 0]))
    out, bias = groups * draw(st.integers(1, 4)) * draw(st.sampled_from([1, 2])), draw(st.booleans())
    if dims == 0:
        return nn.Linear(into, out, bias, dtype=torch.float64)

    def each(strategy):
        return draw(st.tuples(*[strategy] * dims))

    one = sort == "pointwise" or (sort == "transposed" and draw(st.booleans()))
    kernel = (1,) * dims if one else each(st.sampled_from([1, 1, 2, 3]))
    rare = st.sampled_from([1, 1, 1, 2])
    stride, dilation = each(rare), each(rare)
    if sort == "transposed":
        padding, extra = each(st.integers(0, 1)), tuple(draw(st.integers(0, s - 1)) for s in stride)
        if draw(st.booleans()):
            stride, padding, extra = (1,) * dims, (0,) * dims, (0,) * dims
        return TRANSPOSED[dims](into, out, kernel, stride, padding, extra, groups, bias, dilation, dtype=torch.float64)
    padding = draw(st.one_of(st.just((0,) * dims), st.tuples(*[st.integers(0, 2)] * dims), st.sampled_from(["same", "valid"])))
    stride = (1,) * dims if padding == "same" else stride
    mode = draw(st.sampled_from(["zeros", "zeros", "reflect", "replicate", "circular"]))
    return CONVS[dims](into, out, kernel, stride, padding, dilation, groups, bias, mode, dtype=torch.float64)


@st.composite
def pairs(draw):
    torch.manual_seed(draw(st.integers(0, 2**20)))
    dims, into = draw(st.integers(0, 3)), draw(st.sampled_from([1, 2, 4, 6, 8]))
    first = draw(linear_modules(dims, into))
    middle = into if not hasattr(first, "weight") or isinstance(first, nn.modules.batchnorm._BatchNorm) else piece_of(first).geometry.out_channels
    second = draw(linear_modules(dims, middle))
    size = [draw(st.integers(13, 17)) for _ in range(dims)]
    return first, second, torch.randn(2, into, *size, dtype=torch.float64)


def test_what_is_accepted_is_exact():
    answers = []

    @settings(max_examples=200)
    @given(pairs())
    def check(pair):
        answers.append(accepted_is_exact(*pair))

    check()
    assert min(answers.count(True), answers.count(False)) >= 10  # both are seen; how often depends on what hypothesis makes of the source


def accepted_is_exact(first, second, x):
    left, right = piece_of(first), piece_of(second)
    reason = refuses(left, right)
    if reason is not None:
        assert len(reason) > 10
        with pytest.raises(SurgeryValueError, match="cannot be fused"):
            fuse(left, right)
        return False
    with torch.no_grad():
        expected = second(first(x))
    whole = fuse(left, right)
    if not whole.geometry.is_linear or whole.geometry.groups == 1:
        assert difference(applied(whole, x), expected) < 1e-10
    assert whole.geometry.output_shape(tuple(x.shape)) == tuple(expected.shape)
    assert (whole.bias is None) == (right.bias is None and (left.bias is None or not left.bias.any()))
    return True


def conv(into=4, out=6, kernel=3, bias=False, **options):
    return nn.Conv2d(into, out, kernel, bias=bias, dtype=torch.float64, **options)


MUST = {
    "1x1, kxk": (lambda: conv(kernel=1), lambda: conv(6, 5, 3, stride=2, padding=1, dilation=2, bias=True)),
    "1x1 with bias, kxk without padding": (lambda: conv(kernel=1, bias=True), lambda: conv(6, 5, 3, bias=True)),
    "1x1 with bias, reflected": (lambda: conv(kernel=1, bias=True), lambda: conv(6, 5, 3, padding=1, padding_mode="reflect")),
    "strided 1x1, kxk": (lambda: conv(kernel=1, stride=2), lambda: conv(6, 5, 3, padding=1)),
    "kxk, 1x1": (lambda: conv(padding="same", kernel=4), lambda: conv(6, 5, 1, bias=True)),
    "kxk, strided 1x1": (lambda: conv(padding=1), lambda: conv(6, 5, 1, stride=2)),
    "kx1, 1xk": (lambda: conv(kernel=(3, 1), padding=(1, 0), stride=(2, 1)), lambda: conv(6, 5, (1, 5), padding=(0, 2), stride=(1, 2))),
    "even kernels, same": (lambda: conv(kernel=(4, 1), padding="same"), lambda: conv(6, 5, (1, 2), padding="same")),
    "circular": (
        lambda: conv(kernel=(3, 1), padding=(1, 0), padding_mode="circular", bias=True),
        lambda: conv(6, 5, (1, 3), padding=(0, 1), padding_mode="circular"),
    ),
    "grouped": (lambda: conv(groups=2), lambda: conv(6, 4, 1, groups=2)),
    "depthwise, pointwise": (lambda: conv(4, 4, 3, groups=4, padding=1), lambda: conv(4, 5, 1)),
    "coprime groups": (lambda: conv(6, 6, 3, groups=3), lambda: conv(6, 4, 1, groups=2)),
    "1x1, transposed": (lambda: conv(kernel=1), lambda: nn.ConvTranspose2d(6, 4, 3, 2, 1, 1, groups=2, dtype=torch.float64)),
    "transposed, batch norm": (lambda: nn.ConvTranspose2d(4, 6, 3, 2, groups=2, dtype=torch.float64), lambda: batch_norm(2, 6)),
    "transposed 1x1, kxk": (lambda: nn.ConvTranspose2d(4, 6, 1, groups=2, bias=False, dtype=torch.float64), lambda: conv(6, 4, 3, padding=1)),
    "conv, batch norm": (lambda: conv(groups=2, padding=1, bias=True), lambda: batch_norm(2, 6)),
    "batch norm, conv": (lambda: batch_norm(2, 4), lambda: conv(4, 6, 3, groups=2)),
}


@pytest.mark.parametrize(("first", "second"), MUST.values(), ids=MUST)
def test_what_must_be_accepted(first, second):
    first, second = first(), second()
    x = torch.randn(2, piece_of(first).geometry.in_channels, 11, 13, dtype=torch.float64)
    assert refuses(piece_of(first), piece_of(second)) is None
    with torch.no_grad():
        assert difference(applied(fuse(piece_of(first), piece_of(second)), x), second(first(x))) < 1e-12


MUST_NOT = {
    "larger": (conv, lambda: conv(6, 5, 3), "both kernels extend along dimension 0"),
    "bias before zeros": (lambda: conv(kernel=1, bias=True), lambda: conv(6, 5, 3, padding=1), "absent in the zeros"),
    "batch norm before zeros": (lambda: batch_norm(2, 4), lambda: conv(4, 5, 3, padding=1), "absent in the zeros"),
    "bias before transposed": (lambda: conv(kernel=1, bias=True), lambda: nn.ConvTranspose2d(6, 4, 3, dtype=torch.float64), "unevenly"),
    "padded pointwise": (conv, lambda: conv(6, 5, 1, padding=1), "where the kernel of the first extends"),
    "subsampled before reflection": (
        lambda: conv(kernel=1, stride=2),
        lambda: conv(6, 5, 3, padding=1, padding_mode="reflect"),
        "stride or padding of the first",
    ),
    "two modes": (
        lambda: conv(kernel=(3, 1), padding=(1, 0), padding_mode="replicate"),
        lambda: conv(6, 5, (1, 3), padding=(0, 1)),
        "'replicate', the second with 'zeros'",
    ),
    "uneven": (lambda: conv(kernel=(2, 1), padding="same"), lambda: conv(6, 5, 1, stride=2), "unevenly on the two sides"),
    "transposed, kxk": (lambda: nn.ConvTranspose2d(4, 6, 3, dtype=torch.float64), lambda: conv(6, 5, 3), "only a pointwise layer"),
    "two transposed": (
        lambda: nn.ConvTranspose2d(4, 4, 3, dtype=torch.float64),
        lambda: nn.ConvTranspose2d(4, 4, 3, dtype=torch.float64),
        "only a pointwise layer",
    ),
    "linear and convolution": (lambda: nn.Linear(4, 6), lambda: conv(6, 5, 1), "features alone, the second on 2 spatial dimensions"),
}


@pytest.mark.parametrize(("first", "second", "reason"), MUST_NOT.values(), ids=MUST_NOT)
def test_what_must_be_refused_and_why(first, second, reason):
    assert reason in refuses(piece_of(first()), piece_of(second()))


def test_a_bias_of_zeros_is_no_bias():
    first = conv(kernel=1, bias=True)
    nn.init.zeros_(first.bias)
    left, right = piece_of(first), piece_of(conv(6, 5, 3, padding=1))
    assert refuses(left, right) is None
    assert fuse(left, right).bias is None


def test_geometry_of_a_fused_pair_is_known_without_weights():
    left, right = piece_of(conv(kernel=(3, 1), groups=2)), piece_of(conv(6, 4, (1, 3), groups=2))
    assert fused_geometry(left.geometry, right.geometry) == fuse(left, right).geometry
    assert str(fuse(left, right).geometry) == "Conv2d 4->4 3x3 groups=2"


def test_layers_that_do_not_follow_each_other_have_no_fused_geometry():
    assert (
        fused_geometry(Geometry.of(conv()), Geometry.of(nn.Conv2d(5, 4, 1))) == f"the first gives {conv().out_channels} channels, the second takes 5"
    )
    with pytest.raises(SurgeryValueError, match="ReLU is neither a convolution nor a linear layer"):
        Geometry.of(nn.ReLU())
