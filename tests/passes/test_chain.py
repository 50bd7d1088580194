"""A chain in the place of a layer: what parents, hooks, copies and compilers see of it."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from torch import nn

import surgery
from passes.chain import MODULE_ATTRIBUTES, Chain
from passes.parity import assert_parity, difference
from passes.whole_weight import WholeWeight
from surgery.cost import count_macs
from tests.networks import ReadsAttributes

X = torch.randn(2, 3, 12, 12, generator=torch.Generator().manual_seed(8))
ALL = {"re:.*": 1.0}
HALF = {"re:.*": 0.5}


def test_names_and_order(small):
    net = surgery.decompose(small, HALF)
    assert isinstance(net.conv2, Chain)
    assert [name for name, _ in net.conv2.named_children()] == ["reduce", "core", "expand"]
    assert [name for name, _ in net.mix.named_children()] == ["reduce", "expand"]
    assert net.conv2.core.stride == (2, 2)
    assert net.conv2.reduce.stride == net.conv2.expand.stride == (1, 1)
    assert net.conv1.expand.bias is None
    assert net.conv2.reduce.bias is None
    assert net.conv2.core.bias is None
    assert torch.equal(net.conv2.expand.bias, small.conv2.bias)


def test_parents_can_read_what_they_read_before():
    model = ReadsAttributes().eval()
    inputs = torch.randn(2, 4, 9, 9)
    net = surgery.decompose(model, ALL)
    assert_parity(net(inputs), model(inputs))
    for name in ("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups", "padding_mode"):
        assert getattr(net.conv, name) == getattr(model.conv, name)
    assert_parity(net.conv.weight, model.conv.weight)
    assert torch.equal(net.conv.bias, model.conv.bias)
    with pytest.raises(AttributeError, match="no_such"):
        _ = net.conv.no_such


def test_attributes_are_read_only():
    net = surgery.decompose(ReadsAttributes(), HALF)
    for name, value in (("stride", (3, 3)), ("out_channels", 9), ("padding", (0, 0))):
        with pytest.raises(AttributeError, match="derived from the layer it replaced"):
            setattr(net.conv, name, value)
    net.conv.stride = net.conv.stride  # what it is
    net.conv.note = "mine"  # anything else may be set
    assert net.conv.note == "mine"


LAYERS = [nn.Linear(6, 8), nn.Conv1d(6, 8, 3, padding="same"), nn.Conv3d(6, 8, 3), nn.ConvTranspose2d(6, 8, 3, stride=2, output_padding=1)]


@pytest.mark.parametrize("layer", LAYERS, ids=lambda layer: type(layer).__name__)
def test_every_attribute_of_a_layer_is_its_chains(layer):
    net = surgery.decompose(nn.Sequential(layer), {"0": 0.5})
    told = [name for name in vars(layer).keys() - MODULE_ATTRIBUTES if not name.startswith("_")]
    assert len(told) >= 2
    assert {name: getattr(net[0], name) for name in told} == {name: getattr(layer, name) for name in told}


VERBS = {"decompose": lambda m: surgery.decompose(m, ALL), "reconstruct": surgery.reconstruct, "deploy": lambda m: surgery.deploy(m, X)}


@pytest.mark.parametrize("verb", VERBS.values(), ids=VERBS)
def test_no_verb_shares_storage_with_what_it_was_given(small, verb):
    given = surgery.decompose(small, {"conv1": 0.5})
    held = [{t.untyped_storage().data_ptr() for t in m.state_dict().values()} for m in (given, verb(given))]
    assert not held[0] & held[1]


def test_gradients_reach_the_factors_through_the_weight():
    net = surgery.decompose(ReadsAttributes(), HALF)
    net.conv.weight.square().sum().backward()
    assert all(layer.weight.grad is not None for layer in net.conv)


def test_no_storage_is_shared_with_the_original(small):
    net = surgery.decompose(small, ALL)
    theirs = {p.untyped_storage().data_ptr() for p in small.parameters()}
    assert not theirs & {p.untyped_storage().data_ptr() for p in net.parameters()}
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.zero_()
    assert all(p.abs().sum() > 0 for p in small.parameters() if p.ndim > 1)


def test_requires_grad_and_mode_follow_the_layer(small):
    small.train()
    small.conv2.weight.requires_grad_(False)
    small.mix.eval()
    net = surgery.decompose(small, HALF)
    assert not any(layer.weight.requires_grad for layer in net.conv2)
    assert net.conv2.expand.bias.requires_grad
    assert all(layer.weight.requires_grad for layer in net.conv1)
    assert net.conv1.training
    assert net.conv1.core.training
    assert not net.mix.training
    assert not net.mix.reduce.training
    back = surgery.reconstruct(net)
    assert not back.conv2.weight.requires_grad
    assert back.conv2.bias.requires_grad
    assert back.conv1.weight.requires_grad
    assert back.conv1.training
    assert not back.mix.training


def test_hooks_come_along_and_back(small):
    seen = []
    handle = small.conv2.register_forward_hook(lambda module, args, output: seen.append((type(module).__name__, tuple(output.shape))))
    net = surgery.decompose(small, HALF, inplace=True)
    net(X)
    assert seen == [("Chain", (2, 24, 6, 6))]
    back = surgery.reconstruct(net, inplace=True)
    back(X)
    assert seen[-1] == ("Conv2d", (2, 24, 6, 6))
    handle.remove()
    back(X)
    assert len(seen) == 2


def test_a_hook_added_to_the_chain_stays_at_reconstruction(small):
    net = surgery.decompose(small, HALF)
    seen = []
    net.conv2.register_forward_pre_hook(lambda module, args: seen.append(type(module).__name__))
    surgery.reconstruct(net)(X)
    assert seen == ["Conv2d"]


class Named(nn.Conv2d):
    """A subclass that computes as its base does, with an attribute of its own."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.note = "kept"


def test_subclasses_come_back():
    model = nn.Sequential(Named(3, 8, 3))
    net = surgery.decompose(model, HALF)
    assert net[0].note == "kept"
    back = surgery.reconstruct(net)
    assert type(back[0]) is Named
    assert back[0].note == "kept"


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_dtype_and_memory_format_follow(small, dtype, memory_format):
    model = small.to(dtype=dtype, memory_format=memory_format)
    net = surgery.decompose(model, HALF)
    for name in ("conv2", "mix", "tail.1"):
        for layer in net.get_submodule(name):
            assert layer.weight.dtype == dtype
        assert net.get_submodule(name).core.weight.is_contiguous(memory_format=memory_format) if name != "mix" else True
    back = surgery.reconstruct(net)
    for name in ("conv2", "mix", "tail.1"):
        before, after = model.get_submodule(name).weight, back.get_submodule(name).weight
        assert after.dtype == dtype
        assert after.stride() == before.stride()


def test_merged_bfloat16_weight_is_the_product_of_its_factors_to_two_units():
    conv = nn.Conv2d(24, 32, 3).to(torch.bfloat16)
    net = surgery.decompose(nn.Sequential(conv), {"0": (16, 12)})
    expand, core, reduce = (net[0].get_submodule(n).weight.double() for n in ("expand", "core", "reduce"))
    exact = torch.einsum("or,rshw,si->oihw", expand[:, :, 0, 0], core, reduce[:, :, 0, 0])
    merged = surgery.reconstruct(net)[0].weight
    unit = torch.finfo(torch.bfloat16).eps * exact.abs()
    assert bool(((merged.double() - exact).abs() <= 2 * unit).all())


def test_deepcopy_pickle_to_and_half(small):
    net = surgery.decompose(small, HALF)
    expected = net(X)
    buffer = io.BytesIO()
    torch.save(net, buffer)
    buffer.seek(0)
    for other in (copy.deepcopy(net), torch.load(buffer, weights_only=False)):
        assert difference(other(X), expected) == 0.0
        assert surgery.report(other) == surgery.report(net)
        assert difference(surgery.reconstruct(other)(X), expected) < 1e-5
    wide = copy.deepcopy(net).double()
    assert_parity(wide(X.double()), expected.double(), tolerance=1e-5)
    assert surgery.reconstruct(wide).conv2.weight.dtype == torch.float64
    assert surgery.reconstruct(copy.deepcopy(net).half()).conv2.weight.dtype == torch.float16


def test_jit_trace_and_script(small):
    net = surgery.decompose(small, HALF)
    assert_parity(torch.jit.trace(net, X)(X), net(X))
    scripted = torch.jit.script(nn.Sequential(net.conv1, net.bn1))
    assert_parity(scripted(X), net.bn1(net.conv1(X)))


def test_compile_traces_through_a_chain(small):
    net = surgery.decompose(small, HALF)
    compiled = torch.compile(net, backend="eager", fullgraph=True)
    assert_parity(compiled(X), net(X))
    assert surgery.report(compiled) == surgery.report(net)


def test_symbolic_trace_sees_the_layers_of_a_chain(small):
    net = surgery.decompose(small, HALF)
    targets = [n.target for n in surgery.trace(net, X).graph.nodes if n.op == "call_module"]
    assert "conv2.core" in targets
    assert "conv2" not in targets


def test_a_traced_decomposed_network_can_be_reconstructed(small):
    net = surgery.decompose(small, HALF, example_inputs=X)
    back = surgery.reconstruct(surgery.trace(net, X))
    assert_parity(back(X), net(X))
    assert "conv2.weight" in back.state_dict()


def test_a_slice_of_a_chain_is_a_plain_sequential(small):
    net = surgery.decompose(small, HALF)
    part = net.conv2[:2]
    assert type(part) is nn.Sequential
    assert [n for n, _ in part.named_children()] == ["reduce", "core"]
    assert net.conv2[0] is net.conv2.reduce


def test_a_root_that_is_itself_a_layer():
    conv = nn.Conv2d(8, 8, 3)
    chain = surgery.decompose(conv, HALF)
    assert isinstance(chain, Chain)
    assert surgery.report(chain).layers[0].status == "decomposed"
    back = surgery.reconstruct(chain)
    assert type(back) is nn.Conv2d
    for model, act in ((conv, surgery.decompose), (chain, surgery.reconstruct)):
        with pytest.raises(surgery.SurgeryValueError, match="inplace=True"):
            act(model, inplace=True)


def test_random_state_is_left_alone(small):
    state = torch.get_rng_state()
    net = surgery.decompose(small, HALF, example_inputs=X)
    surgery.reconstruct(net)
    surgery.trace(small, X)
    surgery.plan(small, example_inputs=X)
    assert torch.equal(state, torch.get_rng_state())


def test_a_chain_that_was_changed_after_the_cut_is_kept(small):
    net = surgery.decompose(small, HALF, example_inputs=X)
    net.conv1.core.register_forward_hook(lambda module, args, output: output * 3)
    net.conv2.core = nn.Conv2d(8, 12, 3, stride=1, padding=1)
    nn.utils.parametrizations.weight_norm(net.mix.reduce)
    expected = net(X)
    assert surgery.report(net)["conv2"].status == "decomposed"
    back = surgery.reconstruct(net)
    assert difference(back(X), expected) < 1e-5
    assert isinstance(back.conv1, Chain)
    assert isinstance(back.mix, Chain)
    assert type(back.tail[1]) is nn.Conv2d


class Scaled(nn.Conv2d):
    """A subclass that parents ask for things which are not in its instances."""

    family = "scaled"

    @property
    def fan_in(self):
        return self.weight[0].numel()

    def norm(self):
        return self.weight.norm()


def test_parents_can_read_attributes_of_the_layers_class():
    model = nn.Sequential(Scaled(4, 8, 3))
    net = surgery.decompose(model, {"0": 1.0})
    assert (net[0].family, net[0].fan_in) == ("scaled", 36)
    assert float(net[0].norm()) == pytest.approx(float(model[0].norm()), rel=1e-5)
    net[0].norm().backward()
    assert net[0].core.weight.grad is not None
    with pytest.raises(AttributeError, match="nothing"):
        _ = net[0].nothing


@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize("kind", [surgery.Depthwise(2), surgery.CP(3), surgery.Tucker(2, 2)], ids=lambda f: f.kind)
def test_memory_format_outlives_every_kind(dims, kind):
    form = {2: torch.channels_last, 3: torch.channels_last_3d}[dims]
    conv = {2: nn.Conv2d, 3: nn.Conv3d}[dims](4, 6, 3)
    model = nn.Sequential(conv).to(memory_format=form)
    net = surgery.decompose(model, {"0": kind})
    assert surgery.reconstruct(net)[0].weight.stride() == model[0].weight.stride()
    again = surgery.decompose(net, {"0": surgery.Tucker(2, 1)})
    assert again[0].core.weight.is_contiguous(memory_format=form)
    assert surgery.reconstruct(again)[0].weight.stride() == model[0].weight.stride()
    plain = surgery.decompose(nn.Sequential({2: nn.Conv2d, 3: nn.Conv3d}[dims](4, 6, 3)), {"0": kind})
    assert surgery.reconstruct(plain)[0].weight.is_contiguous()


def test_what_is_noted_on_a_layer_may_be_noted_on_its_chain():
    model = ReadsAttributes()
    model.conv.register_forward_hook(lambda module, args, output: setattr(module, "feature", output.detach()))
    x = torch.randn(2, 3, 8, 8) if model.conv.in_channels == 3 else torch.randn(2, model.conv.in_channels, 8, 8)
    model.conv(x)
    net = surgery.decompose(model, HALF)
    y = net.conv(x)
    assert torch.equal(net.conv.feature, y)


class Casts(nn.Module):
    """As vision transformers do with the layer that takes patches: its input gets the dtype, and the device, of its weight."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 32, 4, stride=4)
        self.head = nn.Linear(32, 5)

    def forward(self, x):
        x = x.to(self.conv.weight.device, dtype=self.conv.weight.dtype)
        return self.head(self.conv(x).flatten(self.conv.weight.ndim - 2).mean(-1))


def test_a_look_at_the_dtype_of_a_weight_multiplies_nothing():
    model, x = Casts().eval(), torch.randn(2, 3, 16, 16)
    net = surgery.decompose(model, {"conv": (8, 3)}, example_inputs=x)
    with torch.no_grad(), count_macs() as counter:
        net(x)
    assert counter.macs == surgery.report(net).macs_after
    with torch.no_grad():
        weight, plain = net.conv.weight, surgery.reconstruct(net).conv.weight
    assert isinstance(weight, WholeWeight)
    for told in ("dtype", "device", "shape", "ndim", "is_cuda"):
        assert getattr(weight, told) == getattr(plain, told)
    assert (weight.size(), weight.size(1), weight.dim(), weight.numel(), len(weight)) == (plain.size(), 3, 4, plain.numel(), 32)
    assert (weight.is_floating_point(), weight.element_size(), torch.numel(weight)) == (True, 4, plain.numel())


@pytest.mark.parametrize("gradients", [False, True])
def test_the_numbers_of_a_chains_weight_are_there_for_all_who_ask(gradients):
    net = surgery.decompose(Casts(), {"conv": (8, 3)})
    with torch.set_grad_enabled(gradients):
        weight, plain = net.conv.weight, surgery.reconstruct(net).conv.weight.detach()
    assert isinstance(weight, WholeWeight) is not gradients
    assert weight.requires_grad is gradients
    for same in (weight.detach(), weight.clone(), weight + 0, weight[:], weight.data, torch.cat([weight]), weight.permute(0, 1, 2, 3)):
        assert type(same) is torch.Tensor
        assert torch.equal(same, plain)
    assert torch.equal(torch.from_numpy(weight.detach().numpy()), plain)
    assert "tensor(" in repr(weight)
    assert weight.data_ptr() == weight.data_ptr() != 0
    assert torch.equal(pickle.loads(pickle.dumps(weight.detach())), plain)
    assert torch.equal(copy.deepcopy(weight.detach()), plain)
    x = torch.ones(1, 3, 8, 8)
    assert torch.equal(torch.nn.functional.conv2d(x, weight, stride=4), torch.nn.functional.conv2d(x, plain, stride=4))


def test_a_weight_that_is_held_is_that_of_its_moment():
    net = surgery.decompose(Casts(), {"conv": (8, 3)})
    with torch.no_grad():
        weight = net.conv.weight
        before = weight.clone()
        net.conv.core.weight.mul_(2)
        assert torch.equal(weight, before)
        assert torch.equal(net.conv.weight, 2 * before)


def test_derivatives_go_through_a_chains_weight():
    net = surgery.decompose(Casts(), {"conv": (8, 3)})
    slopes = torch.autograd.grad(net.conv.weight.square().sum(), [layer.weight for layer in net.conv])
    assert all(bool(slope.any()) for slope in slopes)


@pytest.mark.parametrize("way", ["trace", "export", "compile", "graph", "call"])
def test_who_writes_down_what_is_done_to_a_chains_weight_sees_the_numbers(way):
    x = torch.randn(2, 3, 16, 16)
    net = surgery.decompose(Casts().eval(), {"conv": (8, 3)}, example_inputs=x)
    expected = net(x)
    if way == "trace":
        found = torch.jit.trace(net, x)(x)
    elif way == "export":
        found = torch.export.export(net, (x,)).module()(x)
    elif way == "compile":
        found = torch.compile(net, backend="aot_eager", fullgraph=True)(x)
    elif way == "graph":
        found = surgery.trace(net, x)(x)
    else:
        twice = {name: 2 * p for name, p in net.named_parameters()}
        found = torch.func.functional_call(net, twice, (x,))
        expected = copy.deepcopy(net)
        expected.load_state_dict(twice)
        expected = expected(x)
    torch.testing.assert_close(found, expected)
