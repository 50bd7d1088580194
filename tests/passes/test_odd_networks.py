"""Networks that do something of their own around their layers: they are cut, kept with a reason, or refused; never cut without effect."""

from __future__ import annotations

import copy
import functools
import json
import re
import warnings
import weakref
from collections import deque
from dataclasses import dataclass, field

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune

import surgery
from passes import host_for
from passes.errors import SurgeryTypeError
from passes.geometry import Geometry
from passes.parity import assert_parity, tensors_in
from passes.running import private_copy, without_waiting
from passes.site import find_layers
from surgery.original import is_original
from surgery.zoo import load_weights

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


@torch.compile(backend="eager", fullgraph=True)
def doubled(x):
    return x.relu() * 2


class Doubling(nn.Module):
    def forward(self, x):
        return doubled(x)


def test_parts_that_must_be_compiled_whole_run_as_they_are_written():
    """Under modes that look on torch would refuse them."""
    model = nn.Sequential(nn.Conv2d(8, 8, 3), nn.Sequential(nn.Conv2d(8, 8, 3), nn.ReLU()), Doubling()).eval()
    wanted = model(X)
    model[1] = torch.compile(model[1], backend="eager", fullgraph=True)
    net = surgery.decompose(model, {"0": 1.0}, example_inputs=X, calibration=[X, X + 1])
    assert surgery.report(net)["0"].calls == 1
    assert_parity(net(X), wanted)
    assert surgery.capture(model, X) is not None


class Choosing(nn.Module):
    """Runs one of two layers by an operator that takes functions."""

    def __init__(self):
        super().__init__()
        self.first, self.one, self.other = (nn.Conv2d(8, 8, 3, padding=1) for _ in range(3))

    def forward(self, x):
        x = self.first(x)
        return torch.cond(x.mean() > 0, lambda x: self.one(x), lambda x: self.other(x), (x,))


def test_operators_that_take_functions_can_be_looked_at():
    model = Choosing().eval()
    with torch.no_grad():
        wanted = model(X)
    net = surgery.decompose(model, {"first": 1.0}, example_inputs=X, calibration=[X])
    with torch.no_grad():
        assert_parity(net(X), wanted)


@pytest.mark.parametrize("name", ["weight", "bias"])
def test_layers_that_hold_plain_tensors_are_kept_or_cut_by_what_they_compute(name):
    conv = nn.Conv2d(8, 8, 3)
    if name == "bias":
        bias = conv.bias.detach()
        del conv.bias
        conv.bias = bias
    else:
        object.__setattr__(conv, "weight", 2 * conv.weight.detach())
    model = nn.Sequential(conv, nn.ReLU()).eval()
    row = surgery.report(surgery.decompose(model, {"re:.*": 1.0}, example_inputs=X))["0"]
    assert row.reason == "Conv2d holds its weight or bias as a plain attribute; effective_weights=True may cut it"
    net = surgery.decompose(model, {"0": 1.0}, example_inputs=X, effective_weights=True)
    assert surgery.report(net)["0"].status == "decomposed"
    assert_parity(net(X), model(X))


def test_sizes_of_numpy_are_numbers_like_others():
    first, second = np.array([8, 12])
    model = nn.Sequential(nn.Conv2d(first, second, np.int64(3)), nn.Conv2d(second, first, 3)).eval()
    assert Geometry.of(model[0]) == Geometry.of(nn.Conv2d(8, 12, 3))
    model[1].stride = np.int64(1)
    assert Geometry.of(model[1]) == Geometry.of(nn.Conv2d(12, 8, 3))
    model[1].stride = (1, 1)
    net = surgery.decompose(model, 0.5, example_inputs=X)
    assert json.loads(surgery.report(net).to_json())["layers"][0]["params_before"] == 9 * 8 * 12 + 12
    assert net(X).shape == model(X).shape


def test_hooks_that_were_removed_are_gone():
    net = surgery.decompose(nn.Sequential(nn.Conv2d(8, 8, 3)), {"0": (4, 4)})
    handle = next(net[0].children()).register_full_backward_hook(lambda *_: None)
    assert surgery.report(surgery.reconstruct(net))["0"].kind is not None
    handle.remove()
    assert type(surgery.reconstruct(net)[0]) is nn.Conv2d


def test_weights_of_chains_cannot_be_set():
    net = surgery.decompose(nn.Sequential(nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8)), {"0": (4, 4)}).eval()
    for name in ("weight", "bias"):
        with pytest.raises(AttributeError, match=f"'{name}' of a chain is that of its layers and cannot be set; fuse it back first"):
            setattr(net[0], name, nn.Parameter(torch.zeros(1)))
    with pytest.raises(AttributeError, match="cannot be set"):
        torch.nn.utils.fusion.fuse_conv_bn_eval(net[0], net[1])


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


class Held:
    """A plain object with a method that runs what it was given; it cannot be called itself."""

    def __init__(self, inner):
        self.inner = inner

    def run(self, x):
        return self.inner(x)


class Branches(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.bn, self.ops = nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8), None

    def forward(self, x):
        op = self.ops
        while not callable(op):
            op = op.inner if isinstance(op, Held) else next(iter(op.values() if isinstance(op, dict) else op))
        return (op() if isinstance(op, weakref.ref) else op)(x)


@pytest.mark.parametrize("holder", [lambda f: [f], lambda f: {"first": (f,)}, Held], ids=["list", "dict", "object"])
def test_functions_in_containers_that_no_copy_would_follow_are_refused(holder):
    model = Branches()
    model.ops = holder(lambda x: model.bn(model.conv(x)))
    with pytest.raises(SurgeryTypeError, match=r"the model: its attribute 'ops' holds a function that reaches the model \(Branches\)"):
        surgery.decompose(model, {"conv": 0.5}, example_inputs=X)
    assert model.bn.num_batches_tracked == 0
    model.ops = holder(torch.relu)
    assert private_copy(model)(X).equal(X.relu())


def test_weak_references_into_the_model_are_refused():
    model = Branches()
    model.ops = [weakref.ref(model.conv)]
    with pytest.raises(SurgeryTypeError, match=r"'ops' holds a weak reference to conv \(Conv2d\).*hold the module itself, in a list"):
        surgery.decompose(model, {"conv": 0.5})
    other = nn.Conv2d(8, 8, 3)
    model.ops = weakref.ref(other)
    assert private_copy(model)(X).equal(other(X))


class Sliced(nn.Module):
    def __init__(self):
        super().__init__()
        self.features = nn.Sequential(nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3))
        self.stages = [self.features[:2], self.features[2:]]

    def forward(self, x):
        for stage in self.stages:
            x = stage(x)
        return x


def adapted(adapter, module, args, output):
    return output + adapter(args[0])


def with_an_adapter():
    model = nn.Sequential(nn.Sequential(nn.Conv2d(8, 8, 3)), nn.Conv2d(8, 8, 3))
    model[0].register_forward_hook(functools.partial(adapted, model[1]))
    return model


def adapted_in(whole, adapter, module, args, output):
    return adapted(adapter, module, args, output)


def with_an_adapter_and_the_whole():
    model = nn.Sequential(nn.Sequential(nn.Conv2d(8, 8, 3)), nn.Conv2d(8, 8, 3))
    model[0].register_forward_hook(functools.partial(adapted_in, model, model[1]))
    return model


def with_an_object():
    model = Sliced()
    model.stages = [Held(model.features[0]).run, Held({"last": [model.features[2]]}).inner["last"][0]]
    model.runner = Held(model.features[2])
    return model


@pytest.mark.parametrize(
    ("make", "names", "where"),
    [
        (Sliced, ["features.0", "features.2"], "stages"),
        (with_an_adapter, ["1"], "a hook of 0"),
        (with_an_adapter_and_the_whole, ["1"], "a hook of 0"),
        (with_an_object, ["features.0", "features.2"], "stages|runner"),
    ],
    ids=["module", "hook", "hook with all", "object"],
)
def test_layers_that_modules_outside_the_tree_hooks_and_objects_hold_are_kept(make, names, where):
    model = make()
    net = surgery.decompose(model, 0.5)
    report = surgery.report(net)
    kept, cut = ([row.name for row in report.layers if row.status == status] for status in ("kept", "decomposed"))
    assert kept == names
    assert all(re.search(f"it is also held in ({where}), outside the tree", report[name].reason) for name in names)
    assert_parity(surgery.decompose(model, dict.fromkeys(cut, 1.0))(X), model(X), tolerance=1e-4)


class Metric(nn.Module):
    """As torchmetrics': its methods are wrapped anew in each copy."""

    def __init__(self):
        super().__init__()
        self.seen = 0
        self.wrap()

    def wrap(self):
        self.update = functools.wraps(self.update)(lambda x, whole=self: setattr(whole, "seen", whole.seen + 1))

    def update(self, x):
        raise NotImplementedError

    def __getstate__(self):
        return {name: value for name, value in vars(self).items() if name != "update"}

    def __setstate__(self, state):
        super().__setstate__(state)
        self.wrap()


def test_what_copies_make_anew_is_not_refused():
    model = nn.Sequential(nn.Conv2d(8, 8, 3))
    model.metric = Metric()
    twin = private_copy(model)
    twin.metric.update(X)
    assert (model.metric.seen, twin.metric.seen) == (0, 1)


def test_proxies_are_let_be():
    model = nn.Sequential(nn.Sequential(nn.Conv2d(8, 8, 3)), nn.Conv2d(8, 8, 3))
    model[0].parent = [weakref.proxy(model)]
    assert {found.keep for found in find_layers(model)} == {None}
    relu = nn.ReLU()
    model[0].parent = [weakref.proxy(relu)]
    assert private_copy(model)[0].parent[0].__class__ is nn.ReLU


class Looking:
    """As those do it who explain what a network sees: it knows all its modules and calls none."""

    def __init__(self, model):
        self.modules, self.seen = dict(model.named_modules()), []
        model[0].register_forward_hook(functools.partial(self.note, place=0))

    def note(self, module, args, output, place):
        self.seen.append(place)

    def __call__(self, label):
        return self.seen


def test_who_only_looks_at_a_network_keeps_none_of_its_layers():
    model = nn.Sequential(nn.Conv2d(8, 8, 3), nn.Conv2d(8, 8, 3))
    Looking(model)
    assert {row.status for row in surgery.report(surgery.decompose(model, 0.5)).layers} == {"decomposed"}


def test_what_steps_a_network_is_no_part_of_it():
    model = nn.Sequential(nn.Conv2d(8, 8, 3))
    model.schedule = torch.optim.lr_scheduler.LambdaLR(torch.optim.SGD(model.parameters(), 0.1), lambda epoch: 1.0 if model.training else 0.5)
    assert surgery.report(surgery.decompose(model, 0.5))["0"].status == "decomposed"


def test_a_module_outside_the_tree_that_holds_the_model_keeps_nothing():
    model = nn.Sequential(nn.Conv2d(8, 8, 3))
    model.__dict__["wrapper"] = [nn.Sequential(model)]
    assert surgery.report(surgery.decompose(model, 0.5))["0"].status == "decomposed"


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.enc, self.other = nn.Conv2d(8, 8, 3), nn.Conv2d(8, 8, 3)
        self.dec_weight = self.enc.weight

    def forward(self, x):
        return nn.functional.conv_transpose2d(self.other(self.enc(x)), self.dec_weight)


@pytest.mark.parametrize("inputs", [None, X], ids=["alone", "run"])
@pytest.mark.parametrize("traced", [False, True], ids=["module", "graph"])
def test_a_weight_that_the_model_itself_holds_too_is_kept(inputs, traced):
    model = surgery.trace(Tied(), X) if traced else Tied()
    report = surgery.report(surgery.decompose(model, 0.5, example_inputs=inputs))
    assert report["enc"].status == "kept"
    assert report["other"].status == "decomposed"
    assert "shared with the model" in report["enc"].reason


class Asking(nn.Module):
    """Collects the outputs of convolutions by their class."""

    def __init__(self):
        super().__init__()
        self.features = nn.Sequential(nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3))

    def forward(self, x):
        found = []
        for layer in self.features:
            x = layer(x)
            if isinstance(layer, nn.Conv2d):
                found.append(x)
        return [x, *found]


def test_code_that_asks_for_the_class_of_layers_is_told_of():
    with pytest.warns(UserWarning, match=r"Asking gives 1 tensors instead of 3: .*isinstance.*exclude="):
        surgery.decompose(Asking(), 0.5, example_inputs=X)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        surgery.decompose(Asking(), 0.5, example_inputs=X, exclude="re:.*")


class Finding(nn.Module):
    """As detectors do it: what comes out, and whether anything does, depends on the numbers; in a collection that cannot be gone through."""

    class Instances:
        def __iter__(self):
            raise NotImplementedError("not iterable")

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(8, 8, 3, bias=False)
        self.norm = 1.0

    def forward(self, x):
        if float(self.conv(x).norm()) < self.norm:
            raise RuntimeError("stack expects a non-empty TensorList")
        return [self.Instances()]


def test_what_fails_by_its_numbers_alone_is_cut_with_a_warning():
    model = Finding()
    assert surgery.report(surgery.decompose(model, 0.5, example_inputs=X))["conv"].status == "decomposed"
    model.norm = float(model.conv(X).norm()) * 0.999
    with pytest.warns(UserWarning, match=r"Finding does not run here, perhaps by its numbers alone: example_inputs: Finding fails"):
        net = surgery.decompose(model, 0.25, example_inputs=X)
    assert surgery.report(net)["conv"].status == "decomposed"


class Dilating(nn.Module):
    """One layer in several dilations; one whose padding is set to what it is; one that is asked for what a chain does not have."""

    def __init__(self):
        super().__init__()
        self.many, self.same, self.asked = nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)

    def forward(self, x):
        total = x
        for dilation in (1, 2):
            self.many.dilation = self.many.padding = (dilation, dilation)
            total = total + self.many(x)
        self.same.padding = 1
        return self.asked(self.same(total)) if self.asked._get_name() == "Conv2d" else self.asked._conv_forward(total, None, None)


def test_layers_that_the_forward_sets_anew():
    model = Dilating()
    net = surgery.decompose(model, {"same": 1.0}, example_inputs=X)
    kept = {site.name: site.keep for site in host_for(model, X).sites()}
    assert kept == {"many": "its stride, padding or dilation is changed while the model runs", "same": None, "asked": None}
    assert surgery.report(net)["same"].status == "decomposed"
    assert_parity(net(X), model(X), tolerance=1e-4)


@pytest.mark.parametrize("inplace", [False, True])
def test_a_network_that_no_longer_runs_is_an_error_and_stays_as_it_was(inplace):
    model = Dilating()
    before = model(X)
    with pytest.raises(surgery.SurgeryValueError, match=r"the network no longer runs \(example_inputs: Dilating fails.*keep that layer"):
        surgery.decompose(model, {"asked": 0.5}, example_inputs=X, inplace=inplace)
    assert type(model.asked) is nn.Conv2d
    assert model(X).equal(before)


class Factored(nn.Conv2d):
    """Has no weight, but two factors of one."""

    def __init__(self, channels):
        super().__init__(channels, channels, 1)
        self.u, self.v = nn.Parameter(torch.randn(channels, 2)), nn.Parameter(torch.randn(2, channels))
        del self.weight

    def forward(self, x):
        return nn.functional.conv2d(x, (self.u @ self.v)[..., None, None], self.bias)


def test_a_convolution_without_a_weight_is_exported_and_compared(tmp_path):
    model = nn.Sequential(nn.Conv2d(8, 8, 3), Factored(8)).eval()
    net = surgery.decompose(model, 0.5, example_inputs=X)
    surgery.export_torchscript(net, tmp_path / "net.pt", X)
    assert_parity(torch.jit.load(tmp_path / "net.pt")(X), net(X))
    assert is_original(model, net, surgery.report(net))


def test_weights_are_read_into_old_weight_norm(tmp_path):
    with pytest.warns(FutureWarning):
        model, other = (nn.utils.weight_norm(nn.Conv2d(8, 8, 3)) for _ in range(2))
    model(X)
    other(X)
    torch.save(other.state_dict(), tmp_path / "w.pt")
    load_weights(model, tmp_path / "w.pt")
    assert model(X).equal(other(X))


def test_hooks_of_loading_that_are_given_their_layer_go_with_it():
    seen = []
    model = nn.Sequential(nn.Conv2d(8, 8, 3))
    model[0].register_load_state_dict_pre_hook(lambda module, *_: seen.append(module))
    net = surgery.decompose(model, {"0": 1.0})
    copy.deepcopy(net)
    back = surgery.reconstruct(net)
    back.load_state_dict(model.state_dict())
    assert seen == [back[0]]
    surgery.reconstruct(surgery.reconstruct(surgery.trace(net, X)))
    surgery.decompose(model, {"0": 1.0}, inplace=True)
    surgery.reconstruct(model, inplace=True)
    model.load_state_dict(back.state_dict())
    assert seen == [back[0], model[0]]


def test_an_output_that_was_noted_on_a_layer_does_not_stay_with_its_chain():
    model = nn.Sequential(nn.Conv2d(8, 8, 3))
    handle = model[0].register_forward_hook(lambda module, args, output: setattr(module, "feature", output))
    output = model(X)
    handle.remove()
    surgery.decompose(model, {"0": 1.0}, inplace=True)
    assert model[0].feature.equal(output)
    assert model[0].feature.grad_fn is None
    assert type(surgery.reconstruct(model)[0]) is nn.Conv2d
