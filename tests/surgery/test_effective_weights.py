"""Layers whose weight is computed: kept by default, cut by what it amounts to where that is asked for and proved."""

from __future__ import annotations

import copy
import random

import numpy
import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.nn.utils import parametrizations, parametrize, prune

import surgery
from passes.chain import Chain
from passes.effective import effective_layer
from passes.errors import SurgeryValueError
from passes.parity import assert_parity
from passes.running import private_copy
from tests.networks import random_states

X = torch.randn(2, 6, 12, 12, generator=torch.Generator().manual_seed(6))


class Standardised(nn.Conv2d):
    """Weight standardisation (Qiao et al. 2019) with a gain of its own."""

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        self.gain = nn.Parameter(torch.rand(self.out_channels, 1, 1, 1) + 0.5)

    def forward(self, x):
        mean, std = self.weight.mean((1, 2, 3), keepdim=True), self.weight.std((1, 2, 3), keepdim=True)
        return functional.conv2d(x, self.gain * (self.weight - mean) / std, self.bias, self.stride, self.padding, self.dilation, self.groups)


class Dynamic(nn.Conv2d):
    """Its weight depends on its input."""

    def forward(self, x):
        return self._conv_forward(x, self.weight * x.mean(), self.bias)


class PaddedBySize(nn.Conv2d):
    """Its padding depends on the size of its input, as TensorFlow's does."""

    def forward(self, x):
        extra = (-x.shape[-1]) % 2
        return functional.conv2d(functional.pad(x, (0, extra)), self.weight, self.bias)


class Scaled(nn.Module):
    def forward(self, weight):
        return 2 * torch.tanh(weight)


def parametrized():
    conv = nn.Conv2d(6, 8, 3, padding=1)
    parametrize.register_parametrization(conv, "weight", Scaled())
    return conv


def old_weight_norm():
    with pytest.warns(FutureWarning):
        return nn.utils.weight_norm(nn.Conv2d(6, 8, 3, stride=2))


def pruned():
    conv = nn.Conv2d(6, 8, 3)
    prune.l1_unstructured(conv, "weight", 0.3)
    return conv


MAKERS = {
    "weight_norm": lambda: parametrizations.weight_norm(nn.Conv2d(6, 8, 3, groups=2)),
    "spectral_norm": lambda: parametrizations.spectral_norm(nn.ConvTranspose2d(6, 8, 3, stride=2)),
    "parametrized": parametrized,
    "old weight_norm": old_weight_norm,
    "old spectral_norm": lambda: nn.utils.spectral_norm(nn.Conv2d(6, 8, 3, bias=False)),
    "pruned": pruned,
    "standardised": lambda: Standardised(6, 8, 3, padding=1),
}
every = pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)


@every
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_kept_by_default_and_cut_on_request(make, training, tmp_path):
    model = nn.Sequential(make(), nn.ReLU(), nn.Conv2d(8, 8, 3)).train(training)
    model(X)
    before = copy.deepcopy(model.state_dict())
    keeps = surgery.report(surgery.decompose(model, {"re:.*": 1.0}))
    assert keeps["0"].status == "kept"
    assert "computed" in keeps["0"].reason or "in its own way" in keeps["0"].reason
    state = torch.get_rng_state()
    net = surgery.decompose(model, {"0": 1.0, "2": 0.5}, effective_weights=True)
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    assert isinstance(net[0], Chain)
    assert net.training == training
    half = surgery.decompose(model, {"0": 0.5}, effective_weights=True)
    assert 0 < surgery.report(half)["0"].error < 1
    reference = private_copy(model).eval()
    assert_parity(net.eval()[0](X), reference[0](X))
    back = surgery.reconstruct(half)
    assert type(back[0]) in (nn.Conv2d, nn.ConvTranspose2d)
    assert_parity(back.eval()(X), half.eval()(X))
    surgery.save(half, tmp_path / "net")
    again = surgery.load(tmp_path / "net", nn.Sequential(make(), nn.ReLU(), nn.Conv2d(8, 8, 3))).eval()
    assert torch.equal(again(X), half.eval()(X))


@pytest.mark.parametrize("name", ["parametrized", "standardised", "old weight_norm"])
def test_on_a_graph(name):
    model = nn.Sequential(MAKERS[name](), nn.ReLU()).eval()
    traced = surgery.trace(model, X)
    assert surgery.report(surgery.decompose(traced, {"re:.*": 1.0}))["0"].status == "kept"
    net = surgery.decompose(traced, {"0": 1.0}, effective_weights=True)
    assert surgery.report(net)["0"].status == "decomposed"
    assert_parity(net(X), model(X))


@pytest.mark.parametrize(("layer", "why"), [(Dynamic, "does more than"), (PaddedBySize, "does more than")])
def test_what_is_no_plain_layer_is_kept_with_the_reason(layer, why):
    model = nn.Sequential(layer(6, 8, 3))
    net = surgery.decompose(model, {"re:.*": 0.5}, effective_weights=True)
    assert why in surgery.report(net)["0"].reason


def test_layers_that_cannot_be_run_alone_or_do_something_else_are_kept():
    class Needy(nn.Conv2d):
        def forward(self, x, scale):
            return super().forward(x) * scale

    class Picky(nn.Conv2d):
        def forward(self, x):
            raise TypeError("not today")

    class Double(nn.Conv2d):
        def forward(self, x):
            return super().forward(x) + super().forward(-x)

    class Noisy(nn.Conv2d):
        def forward(self, x):
            return super().forward(x) + torch.randn(1)

    assert "Needy.forward takes more than its input (scale)" in effective_layer(Needy(3, 4, 3))
    assert "cannot be run on its own (TypeError)" in effective_layer(Picky(3, 4, 3))
    assert "does not simply" in effective_layer(Double(3, 4, 3))
    assert "does more than" in effective_layer(Noisy(3, 4, 3))
    hooked = MAKERS["old spectral_norm"]()
    hooked.register_forward_pre_hook(lambda module, args: None)
    assert "hooks that may take part" in effective_layer(hooked)
    assert "no numbers" in effective_layer(Standardised(3, 4, 3, device="meta"))


class Noisy(nn.Conv2d):
    """Draws from every generator, to no effect."""

    def forward(self, x):
        return self._conv_forward(x, self.weight * 2, self.bias) + 0 * (torch.rand(()) + random.random() + numpy.random.rand())


def test_random_states_are_left_as_found():
    layer, before = Noisy(6, 4, 3), random_states()
    assert isinstance(effective_layer(layer), nn.Conv2d)
    assert random_states() == before


def test_a_hook_on_the_layer_runs_on_its_chain():
    layer = MAKERS["parametrized"]()
    seen = []
    layer.register_forward_hook(lambda module, args, output: seen.append(output.shape))
    net = surgery.decompose(nn.Sequential(layer), {"0": 0.5}, effective_weights=True)
    assert seen == []
    net(X)
    assert seen == [(2, 8, 12, 12)]


def test_a_parametrization_shared_by_two_layers_is_kept():
    model = nn.Sequential(MAKERS["parametrized"](), nn.Conv2d(8, 6, 3), MAKERS["parametrized"]())
    model[2].parametrizations.weight.original = model[0].parametrizations.weight.original
    net = surgery.decompose(model, {"re:.*": 0.5}, effective_weights=True)
    assert "computed from one shared" in surgery.report(net)["0"].reason
    assert surgery.report(net)["1"].status == "decomposed"


class WithNothing(nn.Conv2d):
    def forward(self, x):
        return super().forward(x), None


class Scalable(nn.Conv2d):
    def forward(self, x, scale=1.0):
        return super().forward(x) * scale


class Bounded(nn.Conv2d):
    def forward(self, x):
        return super().forward(x.clamp(-8, 8))


class BoundedInPlace(nn.Conv2d):
    def forward(self, x):
        return super().forward(x.clamp_(-8, 8))


class BoundedAfter(nn.Conv2d):
    def forward(self, x):
        return super().forward(x).clamp(-60000, 60000)


class AnyDtype(nn.Conv2d):
    def forward(self, x):
        return functional.conv2d(x, self.weight.to(x.dtype), self.bias.to(x.dtype))


class TensorFlows(nn.Conv2d):
    """As much padding as the size of its input needs: none at two sizes of every four."""

    def forward(self, x):
        extra = [max((-n) % s + k - s, 0) for n, k, s in zip(x.shape[:1:-1], self.kernel_size, self.stride, strict=True)]
        return functional.conv2d(functional.pad(x, (0, extra[0], 0, extra[1])), self.weight, self.bias, self.stride)


class Flattening(nn.Linear):
    def forward(self, x):
        return super().forward(x.flatten(1))


class Permuting(nn.Linear):
    def forward(self, x):
        return super().forward(x.permute(0, 2, 3, 1) if x.ndim == 4 else x)


@pytest.mark.parametrize(
    "layer",
    [
        *(cls(6, 8, 3) for cls in (WithNothing, Scalable, Bounded, BoundedInPlace, BoundedAfter, AnyDtype)),
        TensorFlows(6, 8, 3, stride=4),
        TensorFlows(6, 8, 3, stride=3),
        Flattening(6, 8),
        Permuting(6, 6),
    ],
    ids=lambda layer: type(layer).__name__,
)
def test_what_a_plain_layer_would_not_do_for_every_caller_is_kept(layer):
    net = surgery.decompose(nn.Sequential(layer), {"re:.*": 0.5}, effective_weights=True)
    row = surgery.report(net)["0"]
    assert row.status == "kept"
    assert any(why in row.reason for why in ("does not simply", "does more than", "takes more than its input"))


@pytest.mark.parametrize("mode", ["zeros", "reflect", "circular"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_constant_padding_in_every_mode_and_dtype_is_plain(mode, dtype):
    layer = parametrizations.weight_norm(nn.Conv2d(6, 8, 3, padding=(1, 2), stride=(3, 1), padding_mode=mode)).to(dtype)
    assert type(effective_layer(layer)) is nn.Conv2d
    assert type(effective_layer(parametrizations.weight_norm(nn.Linear(6, 8)).to(dtype))) is nn.Linear


def test_a_bias_can_be_shared_where_the_weight_is_computed():
    model = nn.Sequential(MAKERS["parametrized"](), nn.Conv2d(8, 8, 3))
    model[1].bias = model[0].bias
    net = surgery.decompose(model, {"0": 1.0}, effective_weights=True)
    assert net[0].bias is net[1].bias
    assert_parity(net(X), model(X))


def test_the_reason_of_a_reader_is_told_whether_or_not_the_weight_is_computed():
    model = nn.TransformerEncoderLayer(8, 2, 16)
    parametrizations.weight_norm(model.linear1)
    for flag in (False, True):
        net = surgery.decompose(model, {"re:linear.*": 0.5}, effective_weights=flag)
        assert "read by the model (TransformerEncoderLayer)" in surgery.report(net)["linear1"].reason


def test_the_option_is_named_where_it_is_missing():
    model = nn.Sequential(MAKERS["parametrized"]())
    plan = surgery.plan(model, {"0": 0.5}, effective_weights=True)
    for ranks in ({"0": 0.5}, plan):
        with pytest.raises(SurgeryValueError, match=r"'0' cannot be cut as asked: its weight is computed.*effective_weights=True"):
            surgery.decompose(model, ranks)
    assert "effective_weights=True" in surgery.report(surgery.decompose(model, 0.5))["0"].reason
