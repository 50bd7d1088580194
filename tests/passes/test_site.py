"""Which layers could be cut, and why the others must stay as they are."""

from __future__ import annotations

import functools
import warnings
from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, prune
from torch.utils.checkpoint import checkpoint

import surgery
from passes import host_for
from passes.chain import Chain
from passes.errors import SurgeryValueError
from passes.parity import difference
from passes.site import find_layers
from passes.spectra import usable_weight

OPTION = "; effective_weights=True may cut it"


def reason(model, name="0"):
    return next(f.keep for f in find_layers(model) if name in f.names)


class OwnForward(nn.Conv2d):
    def forward(self, x):
        return super().forward(x) * 2


class OwnConvForward(nn.Conv2d):
    def _conv_forward(self, x, weight, bias):
        return super()._conv_forward(x, weight - weight.mean(), bias)


class WithExtras(nn.Conv2d):
    def __init__(self, *args):
        super().__init__(*args)
        self.gain = nn.Parameter(torch.ones(()))


def test_plain_layers_and_subclasses_that_compute_alike():
    class Same(nn.Conv2d):
        pass

    model = nn.Sequential(nn.Conv1d(2, 2, 3), nn.Conv3d(2, 2, 3), nn.Linear(2, 2), Same(2, 2, 3), nn.ConvTranspose2d(2, 2, 3))
    assert [f.keep for f in find_layers(model)] == [None] * 5


@pytest.mark.parametrize("layer", [OwnForward(3, 4, 3), OwnConvForward(3, 4, 3)])
def test_layers_that_compute_in_their_own_way(layer):
    assert reason(nn.Sequential(layer)) == f"{type(layer).__name__} computes its output in its own way{OPTION}"


def test_a_forward_patched_on_the_instance():
    layer = nn.Conv2d(3, 4, 3)
    layer.forward = lambda x: x
    assert "in its own way" in reason(nn.Sequential(layer))


def test_extra_parameters_would_be_lost():
    assert reason(nn.Sequential(WithExtras(3, 4, 3))) == f"WithExtras holds more than a weight and a bias{OPTION}"


def test_computed_weights():
    assert reason(nn.Sequential(parametrizations.weight_norm(nn.Conv2d(3, 4, 3)))) == f"its weight is computed by a parametrization{OPTION}"
    pruned = nn.Conv2d(3, 4, 3)
    prune.random_unstructured(pruned, "weight", 0.5)
    assert "pruning" in reason(nn.Sequential(pruned))
    with pytest.warns(FutureWarning):
        normed = nn.utils.weight_norm(nn.Conv2d(3, 4, 3))
    assert "weight_norm" in reason(nn.Sequential(normed))


def test_quantization_aware_layers_are_left_alone():
    class FakeQuantized(nn.Conv2d):  # as torch's qat modules do
        def forward(self, x):
            return self._conv_forward(x, torch.round(self.weight * 16) / 16, self.bias)

    assert "in its own way" in reason(nn.Sequential(FakeQuantized(3, 4, 3)))


def test_weights_tied_with_anything_but_a_like_layer_are_kept_and_stay_tied():
    model = nn.ModuleList([nn.Conv2d(6, 6, 3, padding=1), nn.ConvTranspose2d(6, 6, 3), nn.Embedding(5, 4), nn.Linear(4, 5), nn.Conv2d(6, 6, 3)])
    model[1].weight = model[0].weight  # the other way round
    model[3].weight = model[2].weight
    assert reason(model, "0") == "its weight is shared with 1"
    assert reason(model, "1") == "its weight is shared with 0"
    assert reason(model, "3") == "its weight is shared with 2"
    assert reason(model, "4") is None
    net = surgery.decompose(model, {"re:.*": 0.5})
    assert net[0].weight is net[1].weight
    assert net[2].weight is net[3].weight
    assert isinstance(net[4], Chain)


def test_a_tied_layer_that_must_stay_keeps_the_others():
    class Twisted(nn.Conv2d):
        def forward(self, x):
            return super().forward(x.flip(-1))

    model = nn.ModuleList([nn.Conv2d(6, 6, 3), Twisted(6, 6, 3), nn.Conv2d(6, 6, 3)])
    model[1].weight = model[2].weight = model[0].weight
    assert reason(model, "0") == "its weight is shared with 1"
    assert "in its own way" in reason(model, "1")
    assert reason(model, "2") == "its weight is shared with 1"


def test_a_shared_bias_stays_shared():
    model = nn.Sequential(nn.Conv2d(4, 8, 3), nn.Conv2d(8, 8, 3))
    model[1].bias = model[0].bias
    net = surgery.decompose(model, {"re:.*": 0.5})
    assert net[0].bias is net[1].bias
    back = surgery.reconstruct(net)
    assert back[0].bias is back[1].bias


def test_layers_whose_weight_a_parent_reads():
    attention = nn.MultiheadAttention(8, 2)
    encoder = nn.TransformerEncoderLayer(8, 2, 16)
    model = nn.ModuleDict({"attention": attention, "encoder": encoder})
    assert reason(model, "attention.out_proj") == "its weight is read by attention (MultiheadAttention)"
    assert reason(model, "encoder.linear1") == "its weight is read by encoder (TransformerEncoderLayer)"
    with pytest.raises(SurgeryValueError, match=r"'encoder\.self_attn\.out_proj' cannot be cut as asked: its weight is read"):
        surgery.decompose(model, {"encoder.self_attn.out_proj": 0.5})
    net = surgery.decompose(model.eval(), {"re:.*": 0.5})
    x = torch.randn(3, 2, 8)
    assert difference(net.encoder(x), encoder(x)) == 0.0


def test_lazy_layers_are_a_clear_error():
    with pytest.raises(SurgeryValueError, match="0: LazyConv2d has no shape yet; run the model once"):
        surgery.decompose(nn.Sequential(nn.LazyConv2d(4, 3)))


def test_complex_and_integer_weights_are_kept():
    assert "torch.complex64, not floating point" in reason(nn.Sequential(nn.Conv2d(2, 2, 3, dtype=torch.complex64)))


def test_weights_without_numbers():
    with pytest.raises(SurgeryValueError, match="0: its weight is on the meta device"):
        surgery.decompose(nn.Sequential(nn.Conv2d(4, 8, 3, device="meta")))
    broken = nn.Sequential(nn.Conv2d(4, 8, 3))
    with torch.no_grad():
        broken[0].weight[0, 0, 0, :2] = float("nan")
    with pytest.raises(SurgeryValueError, match="0: 2 of 288 weights are not finite"):
        surgery.decompose(broken)
    with pytest.raises(SurgeryValueError, match="not finite"):
        surgery.decompose(broken, {"0": 0.5}, inplace=True)
    assert type(broken[0]) is nn.Conv2d
    assert surgery.report(surgery.decompose(broken, exclude="0")).layers[0].reason == "excluded"


def test_a_device_without_float64_is_refused():
    (site,) = host_for(nn.Sequential(nn.Conv2d(4, 8, 3))).sites()
    with pytest.raises(SurgeryValueError, match="0: surgery computes in float64, which mps has not; do it on the CPU"):
        usable_weight(site, "mps")


def test_zero_weights_are_kept_by_rules_and_cut_when_named():
    model = nn.Sequential(nn.Conv2d(8, 8, 3, bias=False))
    nn.init.zeros_(model[0].weight)
    for rule in ("evbmf", "energy:0.9", "stable"):
        assert surgery.report(surgery.decompose(model, rule)).layers[0].status == "kept"
    net = surgery.decompose(model, {"0": (2, 2)})
    x = torch.randn(1, 8, 5, 5)
    assert bool((net(x) == 0).all())
    assert surgery.report(net).layers[0].error == 0.0


class Listed(nn.Module):
    """Runs its layers from a plain list, which no replacement in the tree of modules reaches."""

    def __init__(self, holder):
        super().__init__()
        self.conv, self.other = nn.Conv2d(8, 8, 3), nn.Conv2d(8, 8, 3)
        self.todo = holder(self.conv)

    def forward(self, x):
        todo = next(iter(self.todo.values())) if isinstance(self.todo, dict) else self.todo
        for module in todo:
            x = module(x)
        return self.other(x)


@dataclass
class Held:
    layers: list


class Calling(Listed):
    """It calls what it holds."""

    def forward(self, x):
        return self.other(
            self.todo.c(x) if isinstance(self.todo, SimpleNamespace) else self.todo.layers[0](x) if isinstance(self.todo, Held) else self.todo(x)
        )


@pytest.mark.parametrize(
    "holder",
    [
        functools.partial,
        lambda c: functools.partial(checkpoint, c, use_reentrant=False),
        lambda c: c.forward,
        lambda c: SimpleNamespace(c=c),
        lambda c: Held([c]),
    ],
    ids=["partial", "argument", "method", "namespace", "dataclass"],
)
def test_layers_held_where_they_are_called_from_are_kept(holder):
    model = Calling(holder)
    net = surgery.decompose(model, 0.5)
    assert "also held in todo, outside the tree of modules" in surgery.report(net)["conv"].reason
    assert surgery.report(net)["other"].status == "decomposed"


@pytest.mark.parametrize("holder", [lambda c: [c], lambda c: (c,), lambda c: {c}, lambda c: {"first": [c]}], ids=["list", "tuple", "set", "dict"])
def test_layers_held_outside_the_tree_of_modules_are_kept(holder):
    model = Listed(holder)
    net = surgery.decompose(model, 0.5)
    report = surgery.report(net)
    assert "also held in todo, outside the tree of modules" in report["conv"].reason
    assert report["other"].status == "decomposed"
    with pytest.raises(surgery.SurgeryValueError, match=r"'conv' cannot be cut as asked: it is also held in todo"):
        surgery.decompose(model, {"conv": 0.5})


def test_a_subclass_with_a_call_of_its_own_is_kept():
    class Louder(nn.Conv2d):
        def __call__(self, x):
            return super().__call__(x) * 3

    net = surgery.decompose(nn.Sequential(Louder(8, 8, 3)), 0.5)
    assert "computes its output in its own way" in surgery.report(net)["0"].reason


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_weights_of_eight_bits_are_kept(dtype):
    model = nn.Sequential(nn.Conv2d(4, 4, 3))
    model[0].weight.data = model[0].weight.data.to(dtype)
    assert "not floating point of 16 bits or more" in surgery.report(surgery.decompose(model, 0.5))["0"].reason


def test_weights_that_do_not_fit_their_layer_are_kept():
    odd = nn.Conv2d(4, 8, 3)
    odd.weight = nn.Parameter(torch.randn(8, 4, 1, 1))
    assert reason(nn.Sequential(odd)) == "its weight has the shape (8, 4, 1, 1), a Conv2d of its attributes has (8, 4, 3, 3)"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that initializing it does nothing
        assert reason(nn.Sequential(nn.Linear(0, 4))) == "its weight is empty"


def test_factors_that_the_dtype_cannot_hold_are_an_error():
    model = nn.Sequential(nn.Conv2d(8, 8, 3)).half()
    nn.init.constant_(model[0].weight, 6e4)
    with pytest.raises(SurgeryValueError, match=r"0: the factors of its weight overflow torch\.float16"):
        surgery.decompose(model, {"0": (4, 4)})


@pytest.mark.parametrize("name", ["stride", "padding", "dilation"])
def test_a_number_given_later_is_for_all_directions(name):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(6, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=2)).eval()
    setattr(model[0], name, 2)
    x = torch.randn(1, 6, 12, 12)
    net = surgery.decompose(model, {"0": (8, 6)}, example_inputs=x)
    assert surgery.report(net)["0"].macs_after is not None
    torch.testing.assert_close(net(x), model(x), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(surgery.reconstruct(net)(x), net(x), rtol=1e-4, atol=1e-5)


def test_padding_that_is_not_what_the_layer_says_is_kept():
    model = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1, padding_mode="circular"), nn.Conv2d(8, 8, 3, padding=(2, 1), padding_mode="reflect"))
    for padding in ((0, 0), 2):
        model[0].padding = padding  # torch goes on with one pixel
        net = surgery.decompose(model, 0.5)
        assert surgery.report(net)["0"].reason == "its padding was changed after it was built"
        assert surgery.report(net)["1"].status == "decomposed"


@pytest.mark.parametrize(
    "change",
    [
        lambda: setattr_on(nn.Conv1d(8, 8, 3), kernel_size=3),
        lambda: setattr_on(nn.Conv1d(8, 8, 3), kernel_size=3, stride=1, dilation=1),
        lambda: nn.Conv1d(8, 8, 3, padding=(1,)),
    ],
)
def test_a_number_for_the_kernel_is_one_too(change):
    layer, x = change().eval(), torch.randn(2, 8, 9)
    net = surgery.decompose(nn.Sequential(layer, nn.Conv1d(8, 8, 3)), {"0": (4, 4), "1": (4, 4)}, example_inputs=x)
    assert surgery.report(net)["0"].status == "decomposed"
    assert surgery.reconstruct(net)[0].kernel_size == layer.kernel_size


def test_numbers_in_a_tuple_of_one_are_for_all_directions():
    layer, x = nn.Conv2d(8, 8, 3, padding=(1,), stride=(2,)).eval(), torch.randn(2, 8, 9, 9)
    net = surgery.decompose(nn.Sequential(layer), {"0": (8, 8)}, example_inputs=x)
    assert torch.allclose(net(x), layer(x), atol=1e-5)
    assert surgery.report(net)["0"].output_shape == (2, 8, 5, 5)


def setattr_on(layer, **values):
    for name, value in values.items():
        setattr(layer, name, value)
    return layer
