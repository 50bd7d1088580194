"""Networks that do something of their own around their layers: they are cut, kept with a reason, or refused; never cut without effect."""

from __future__ import annotations

import copy
from collections import deque
from dataclasses import dataclass, field

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune

import surgery
from passes import host_for
from passes.errors import SurgeryTypeError
from passes.parity import assert_parity, tensors_in
from passes.running import private_copy, without_waiting
from passes.site import find_layers

X = torch.randn(2, 8, 10, 10, generator=torch.Generator().manual_seed(3))


class Tapped(nn.Module):
    """What a hook noted is what the head works on."""

    def __init__(self):
        super().__init__()
        self.conv, self.head, self.seen = nn.Conv2d(8, 8, 3), nn.Conv2d(8, 8, 3), None

    def forward(self, x):
        self.conv(x)
        return self.head(self.seen)

    def note(self, module, inputs, output):
        self.seen = output


def test_a_hook_that_no_copy_would_follow_is_refused():
    model = Tapped()
    handle = model.conv.register_forward_hook(lambda module, inputs, output: setattr(model, "seen", output))
    with pytest.raises(SurgeryTypeError, match=r"conv: one of its hooks is a function that reaches the model \(Tapped\).*functools.partial"):
        surgery.decompose(model, {"head": 1.0})
    handle.remove()
    model.conv.register_forward_hook(model.note)
    net = surgery.decompose(model, {"head": 1.0})
    assert_parity(net(X), model(X))


def test_compiled_networks_are_copied():
    model = nn.Sequential(nn.Conv2d(8, 8, 3), nn.Sequential(nn.Conv2d(8, 8, 3)))
    model[1].compile(backend="eager")
    model.compile(backend="eager")
    private_copy(model)
    model[1] = torch.compile(model[1], backend="eager")
    private_copy(model)


class Frozen(nn.Module):
    """As detection toolboxes have it: batch norms stay in eval mode, and ``train`` gives nothing back."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.last = Mute(8, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 4, 1)

    def train(self, mode=True):
        super().train(mode)
        self.norm.eval()

    def forward(self, x):
        return self.last(self.norm(self.conv(x)))


class Mute(nn.Conv2d):
    def train(self, mode=True):
        super().train(mode)


def test_train_may_give_nothing_back():
    model = Frozen()
    net = surgery.decompose(model, {"conv": (8, 8)}, example_inputs=X, calibration=[X])
    net.train(False)
    model.train(False)
    assert_parity(net(X), model(X), tolerance=1e-4)
    assert_parity(surgery.deploy(net, X)(X), model(X), tolerance=1e-4)


class EqualRate:
    """A weight that is there only after the first call."""

    def __call__(self, module, inputs):
        module.weight = module.weight_orig * 0.5


def test_layers_whose_weight_is_not_there_yet_are_kept(tmp_path):
    early, without = nn.Conv2d(8, 8, 3), nn.Conv2d(8, 8, 3)
    weight = early._parameters.pop("weight")
    early.register_parameter("weight_orig", weight)
    early.register_forward_pre_hook(EqualRate())
    without.register_parameter("weight", None)
    model = nn.Sequential(early, nn.Conv2d(8, 8, 3), without)
    net = surgery.decompose(model, 0.5)
    rows = {row.name: row for row in surgery.report(net).layers}
    assert "its weight is computed" in rows["0"].reason
    assert "its weight is computed" in rows["2"].reason
    assert rows["1"].status == "decomposed"
    surgery.save(net, tmp_path / "net")


def test_a_computed_weight_is_not_computed_to_look_at_the_layer(tmp_path):
    model = nn.Sequential(parametrizations.spectral_norm(nn.Conv2d(8, 8, 3)), nn.Conv2d(8, 8, 3)).train()
    before = copy.deepcopy(model.state_dict())
    surgery.report(model)
    surgery.plan(model)
    surgery.save(model, tmp_path / "net")
    surgery.decompose(model, {"1": 0.5}, inplace=True)
    kept = {key: value for key, value in before.items() if key.startswith("0.")}
    assert all(torch.equal(model.state_dict()[key], value) for key, value in kept.items())


def test_chains_pruned_alike_are_not_tied():
    net = surgery.decompose(nn.Sequential(nn.Conv2d(8, 8, 3), nn.Conv2d(8, 8, 3)), {"re:.*": (4, 4)})
    for layer in net.modules():
        if type(layer) is nn.Conv2d:
            prune.l1_unstructured(layer, "weight", 0.3)
    assert surgery.report(net).params_before == 2 * (8 * 8 * 9 + 8)


@pytest.mark.filterwarnings("ignore")
def test_chains_quantized_or_pruned_after_the_cut_are_kept():
    quantization = pytest.importorskip("torch.ao.quantization", reason="this torch has no dynamic quantization")
    if not [engine for engine in torch.backends.quantized.supported_engines if engine != "none"]:
        pytest.skip("torch has no engine for quantized layers here")
    net = surgery.decompose(nn.Sequential(nn.Conv2d(8, 8, 3), nn.Flatten(), nn.Linear(512, 64)), {"2": 8}, example_inputs=X[:1]).eval()
    graph = surgery.trace(net, X[:1])
    for layer in (graph.get_submodule("2.reduce"), graph.get_submodule("2.expand")):
        prune.l1_unstructured(layer, "weight", 0.3)
    quantized = quantization.quantize_dynamic(net, {nn.Linear})
    for changed in (graph, quantized):
        assert [site.keep for site in host_for(changed).sites() if site.name == "2"] == ["its layers were changed after the cut"]
        row = surgery.report(changed)["2"]
        assert (row.status, row.macs_before) == ("decomposed", 512 * 64)


@dataclass(slots=True)
class Slotted:
    layer: nn.Module

    def __call__(self, x):
        return self.layer(x)


class Helper:
    def __init__(self, layer):
        self.layer = layer

    def __call__(self, x):
        return self.layer(x)


class Helped(nn.Module):
    def __init__(self, hold):
        super().__init__()
        self.conv = nn.Conv2d(8, 8, 3)
        self.helper = hold(self.conv)

    def forward(self, x):
        return self.helper[0](x) if isinstance(self.helper, deque) else self.helper(x)


@pytest.mark.parametrize("hold", [Helper, Slotted, lambda layer: deque([layer])], ids=["object", "slots", "deque"])
def test_layers_that_an_object_calls_are_kept(hold):
    (found,) = find_layers(Helped(hold))
    assert "also held in helper" in found.keep


def test_complex_outputs_have_the_tolerance_of_their_parts():
    wanted = torch.fft.rfft2(X)
    assert_parity(wanted * (1 + 1e-7), wanted)
    assert_parity(wanted.to(torch.complex128) * (1 + 1e-12), wanted.to(torch.complex128))
    with pytest.raises(surgery.ParityError):
        assert_parity(wanted * 1.001, wanted)


@pytest.mark.filterwarnings("ignore:Sparse CSR")
def test_sparse_weights_are_kept_and_sparse_outputs_compared():
    layer = nn.Linear(8, 8)
    layer.weight = nn.Parameter(layer.weight.detach().to_sparse_csr())
    (found,) = find_layers(nn.Sequential(layer))
    assert found.keep == "its weight is sparse (sparse_csr)"
    matrix = torch.eye(4).to_sparse()
    assert_parity(matrix, torch.eye(4))


class Experts(nn.TransformerEncoderLayer):
    def __init__(self):
        super().__init__(8, 2)
        del self.linear1, self.linear2
        self.mixed = nn.Conv1d(8, 8, 3, padding=1)


def test_an_encoder_layer_without_its_linear_layers_is_looked_at():
    assert surgery.report(surgery.decompose(nn.Sequential(Experts()), {"0.mixed": (4, 4)}))["0.mixed"].status == "decomposed"


def test_padding_in_words_that_was_given_later_is_kept():
    later = nn.Conv2d(8, 8, 3, padding=0, padding_mode="circular")
    later.padding = "same"
    wider = nn.Conv2d(8, 8, 3, padding="same", padding_mode="reflect")
    wider.dilation = (2, 2)
    as_built = nn.Conv2d(8, 8, (3, 2), padding="same", padding_mode="reflect", dilation=(2, 1))
    model = nn.Sequential(later, wider, as_built)
    assert [found.keep for found in find_layers(model)] == ["its padding was changed after it was built"] * 2 + [None]
    net = surgery.decompose(model, {"2": (8, 8)})
    assert_parity(net[2](X), as_built(X), tolerance=1e-4)


class Gain(nn.Module):
    def __init__(self):
        super().__init__()
        self.gain = nn.Parameter(torch.tensor(2.0))

    def forward(self, weight):
        return self.gain * weight


def test_a_parametrization_that_two_layers_hold_keeps_both():
    model, gain = nn.Sequential(nn.Conv2d(8, 8, 3), nn.Conv2d(8, 8, 3)), Gain()
    for layer in model:
        parametrize.register_parametrization(layer, "weight", gain)
    net = surgery.decompose(model, 0.5, effective_weights=True)
    assert all("shared by" in row.reason for row in surgery.report(net).layers)


@dataclass
class Output:
    y: Tensor
    cache: Tensor = field(init=False)


def test_fields_that_are_not_set_hold_no_tensors():
    assert list(tensors_in(Output(X))) == [X]


def test_norms_that_wait_are_looked_for_past_scripted_modules():
    model = nn.Sequential(torch.jit.script(nn.Sequential(nn.Conv2d(8, 8, 1), nn.ReLU())), nn.SyncBatchNorm(8))
    with without_waiting(model):
        assert "forward" in vars(model[1])
    assert "forward" not in vars(model[1])
