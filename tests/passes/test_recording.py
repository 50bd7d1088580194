"""Recording what cannot be traced: every call of one forward pass, joined by the tensors that flowed, and nothing changed by looking."""

from __future__ import annotations

import copy
import operator
import random
from dataclasses import dataclass

import numpy
import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import checkpoint

import surgery
from passes import RecordedGraph, record
from passes.errors import SurgeryTypeError, SurgeryValueError
from passes.parity import difference
from passes.recording import QUESTIONS, after, alias
from surgery.zoo import make
from tests.networks import Branching, Keyword, Mistraced, Small, Twice

X = torch.randn(2, 3, 12, 12, generator=torch.Generator().manual_seed(51))


def replayed(graph, model, *inputs):
    """What the recorded calls compute, in order, on the model's own modules: right only if the edges are."""
    torch.manual_seed(3)
    with torch.no_grad():
        return fx.Interpreter(copy.deepcopy(model), graph=graph).run(*(x.clone() for x in inputs))


def output_of(model, *inputs):
    torch.manual_seed(3)
    with torch.no_grad():
        return copy.deepcopy(model)(*(x.clone() for x in inputs))


def nodes(graph, target):
    return [n for n in graph.nodes if n.target == target]


def shape(node):
    return tuple(node.meta["tensor_meta"].shape)


class Net(nn.Module):
    """A body of three convolutions and whatever forward a test gives it."""

    def __init__(self, forward):
        super().__init__()
        self.a, self.b, self.c = (nn.Conv2d(3, 3, 3, padding=1) for _ in range(3))
        self.relu, self.same, self.drop = nn.ReLU(inplace=True), nn.Identity(), nn.Dropout(0.5)
        self.gain = nn.Parameter(torch.tensor([2.0]))
        self.register_buffer("steps", torch.zeros(()))
        self.shift = torch.tensor([0.5])
        self.body = forward

    def forward(self, x):
        return self.body(self, x)


def shortcut(net, x):
    y = net.same(x)  # the same tensor under another name
    return net.a(y) + net.b(x)


def in_place(net, x):
    y = net.a(x)
    y += net.b(x)
    net.relu(y)
    return net.c(y.mul_(0.5))


def written_through_a_view(net, x):
    y = net.a(x)
    first, second = y.chunk(2, dim=2)
    first.mul_(3.0)
    return net.b(y), net.c(second)


def filled_slice_by_slice(net, x):
    out = torch.zeros_like(x)
    out[:, :, :6] = net.a(x[:, :, :6])
    out[:, :, 6:] = net.b(x[:, :, 6:])
    return net.c(out)


def makes_tensors(net, x):
    mask = (torch.arange(12) > 5).to(x.dtype) * torch.ones(12)
    net.steps += 1
    return net.a(x * mask + torch.tensor([1.0, 2.0, 3.0])[:, None, None]) * net.gain + net.shift + net.steps


def splits(net, x):
    parts = x.split([4, 8], dim=2)
    values, indices = torch.cat(parts, dim=3 - 1).max(dim=1, keepdim=True)
    low, high = values.chunk(2, dim=3)
    return net.a(torch.cat([low, high], 3).expand(-1, 3, -1, -1)) * indices


def branches_on_data(net, x):
    y = net.a(x)
    while y.abs().mean() > 0.1:
        y = net.b(y) * 0.3
    return y if bool(y.sum() > 1e9) else net.c(y)


def draws_random_numbers(net, x):
    return net.drop(net.a(x) + torch.rand(1)) + functional.dropout(x, training=net.training)


def checkpointed(net, x):
    y = checkpoint(lambda t: functional.relu(net.a(t)), x, use_reentrant=False)
    return checkpoint(lambda t: net.b(t) * 2, y, use_reentrant=True)


class Swapping(TorchFunctionMode):
    def __torch_function__(self, func, types, args=(), kwargs=None):
        return torch.sigmoid(*args) if func is torch.relu else func(*args, **(kwargs or {}))


def with_a_mode_of_its_own(net, x):
    with Swapping(), torch.device("cpu"):
        return torch.relu(net.a(x)) + torch.ones(1)


def gives_up_and_tries_again(net, x):
    try:
        return net.a(x[:, :2])
    except RuntimeError:
        return net.b.forward(x)


FORWARDS = [
    shortcut,
    in_place,
    written_through_a_view,
    filled_slice_by_slice,
    makes_tensors,
    splits,
    branches_on_data,
    draws_random_numbers,
    checkpointed,
    with_a_mode_of_its_own,
    gives_up_and_tries_again,
]


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("forward", FORWARDS, ids=lambda f: f.__name__)
def test_the_recorded_calls_give_the_models_output(forward, training):
    model = Net(forward).train(training)
    graph = record(model, X)
    graph.lint()
    assert str(graph)
    assert difference(replayed(graph, model, X), output_of(model, X)) == 0.0
    for node in graph.nodes:
        assert node.op == "output" or node.meta or node.target in ("__setitem__", "__bool__")


def test_a_shortcut_around_an_identity_is_its_inputs():
    graph = record(Net(shortcut), X)
    (x,) = graph.find_nodes(op="placeholder")
    assert [user.target for user in x.users] == ["same", "b"]
    assert [user.target for user in nodes(graph, "same")[0].users] == ["a"]


def test_in_place_operations_stand_between_what_is_before_and_after():
    graph = record(Net(in_place), X)
    order = ["a", "add_", "relu", "mul_", "c"]
    chain = [nodes(graph, target)[0] for target in order]
    assert [next(iter(node.users)).target for node in chain[:-1]] == order[1:]
    assert all(len(node.users) == 1 for node in chain)


def test_whoever_shares_memory_that_was_written_to_reads_it_through_the_write():
    graph = record(Net(written_through_a_view), X)
    (write,) = nodes(graph, "mul_")
    (read,) = nodes(graph, after)
    assert read.args == (nodes(graph, "a")[0], write)
    assert [user.target for user in read.users] == ["b"]
    assert nodes(graph, "c")[0].args[0].target is operator.getitem  # the other half was not written to


def test_any_number_of_writes_that_nobody_reads_in_between():
    def rows(net, x):
        out = torch.empty(1500, 3, 2, 2)
        for row in out.unbind():
            row.fill_(1.0)
        return net.a(out)

    graph = record(Net(rows), X)
    assert len(nodes(graph, "fill_")) == len(nodes(graph, after)) == 1500
    assert nodes(graph, "a")[0].args[0].args[1] is nodes(graph, "fill_")[-1]


def test_what_is_written_into_a_tensor_reaches_its_readers():
    graph = record(Net(filled_slice_by_slice), X)

    def reaches(node, goal):
        return node is goal or any(reaches(user, goal) for user in node.users)

    (goal,) = nodes(graph, "c")
    assert all(reaches(nodes(graph, name)[0], goal) for name in ("a", "b"))


def test_parameters_buffers_and_other_tensors_have_their_names():
    graph = record(Net(makes_tensors), X)
    assert [n.target for n in graph.find_nodes(op="get_attr")] == ["steps", "gain", "shift"]
    assert next(iter(nodes(graph, "steps")[0].users)).target == "add_"


def test_what_is_read_from_a_tensor_is_a_call_and_what_is_asked_is_not():
    graph = record(Net(lambda net, x: net.a(x) * x.shape[0] * x.size(1) * x.sum().item() * len(x) * x.dim() * (1 if x.is_contiguous() else 2)), X)
    methods = [n.target for n in graph.find_nodes(op="call_module")] + [n.target for n in graph.nodes if n.op == "call_method"]
    assert methods == ["a", "mul", "mul", "sum", "item", "mul", "mul", "mul", "mul"]
    assert all(hasattr(Tensor, name) or hasattr(torch, name) or "." in name for name in QUESTIONS)


def test_control_flow_on_data_and_mistraces_are_captured():
    for model in (Branching(), Mistraced()):
        graph = surgery.capture(model, X)
        assert isinstance(graph, RecordedGraph)
        assert len(nodes(graph, "conv")) == 1
        assert difference(replayed(graph, model, X), output_of(model, X)) == 0.0
    (add,) = nodes(surgery.capture(Mistraced(), X), "add")
    assert {n.target for n in add.args} == {"conv", "x"}  # the shortcut that the trace loses


def test_a_gradient_that_the_model_takes_is_a_call():
    def force(net, x):
        with torch.enable_grad():
            place = x.requires_grad_()
            (slope,) = torch.autograd.grad(net.b(place).square().sum(), [place])
        return net.a(-slope)

    graph = record(Net(force), X)
    (call,) = nodes(graph, torch.autograd.grad)
    assert [n.target for n in call.all_input_nodes] == ["sum", "requires_grad_"]
    assert nodes(graph, "a")[0].all_input_nodes[0].target == "neg"


def test_automatic_casts_are_seen_in_the_types():
    def casting(net, x):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return net.b(net.a(x)).float()

    graph = record(Net(casting), X)
    assert [n.meta["tensor_meta"].dtype for n in graph.nodes if n.op != "output"] == [torch.float32, torch.bfloat16, torch.bfloat16, torch.float32]


def test_what_can_be_traced_is_no_recording(small):
    assert not isinstance(surgery.capture(small, X), RecordedGraph)


def test_a_recording_and_a_trace_see_the_same_calls(small):
    def calls(graph):
        return [(n.target, shape(n), shape(n.all_input_nodes[0])) for n in graph.find_nodes(op="call_module", sort=True) if n.target != "tail"]

    recorded, traced = record(small, X), surgery.trace(small, X).graph
    assert sorted(calls(recorded)) == sorted(calls(traced))
    edges = [{(n.name, u.name) for n in g.nodes for u in n.users if n.op == u.op == "call_module"} for g in (recorded, traced)]
    assert edges[0] == edges[1] != set()


def test_a_module_called_twice_under_two_names():
    graph = record(Twice(), torch.randn(1, 8, 8, 8))
    assert [n.target for n in graph.find_nodes(op="call_module", sort=True)] == ["conv", "conv", "other"]
    assert [shape(n) for n in nodes(graph, "conv")] == [(1, 8, 8, 8), (1, 8, 4, 4)]


@dataclass
class Pair:
    first: Tensor
    rest: dict


class Deep(nn.Module):
    """Takes and gives nested things; one of its modules returns a dataclass, another a tuple of tuples."""

    class Pairing(nn.Linear):
        def forward(self, x, scale=1.0):
            y = super().forward(x) * scale
            return Pair(y, {"more": (y + 1, [y + 2])})

    def __init__(self):
        super().__init__()
        self.pairing = self.Pairing(4, 4)
        self.lstm = nn.LSTM(4, 5, batch_first=True)

    def forward(self, batch, *, extra):
        pair = self.pairing(batch["x"][0], scale=extra.first)
        out, (h, _) = self.lstm(pair.rest["more"][1][0])
        return {"out": out, "pair": Pair(pair.first, {"h": [h]}), "size": batch["x"][0].shape[0]}


def test_inputs_and_outputs_however_deep():
    x, y, scale = torch.randn(2, 6, 4), torch.randn(1), torch.tensor(3.0)
    graph = record(Deep(), {"batch": {"x": [x, y]}, "extra": Pair(scale, {"again": x})})
    assert [n.target for n in graph.find_nodes(op="placeholder")] == ["batch_x_0", "batch_x_1", "extra_first"]
    (call,) = nodes(graph, "pairing")
    assert [n.target for n in call.all_input_nodes] == ["batch_x_0", "extra_first"]
    assert call.meta["tensor_meta"]["rest"]["more"][1][0].shape == (2, 6, 4)
    (lstm,) = nodes(graph, "lstm")
    assert lstm.args[0].target is operator.getitem
    assert shape(lstm.args[0]) == (2, 6, 4)
    assert [m.shape for m in lstm.meta["tensor_meta"][1]] == [(1, 2, 5), (1, 2, 5)]
    output = next(n for n in graph.nodes if n.op == "output").args[0]
    assert output["size"] == 2
    assert shape(output["pair"]["first"]) == (2, 6, 4)
    assert shape(output["pair"]["rest"]["h"][0]) == (1, 2, 5)


def test_keyword_inputs_and_a_dict_output():
    model, inputs = Keyword(), {"gain": torch.ones(1), "sound": torch.randn(2, 4, 20)}
    graph = record(model, inputs)
    assert [n.target for n in graph.find_nodes(op="placeholder")] == ["sound", "gain"]
    assert difference(replayed(graph, model, inputs["sound"], inputs["gain"]), model(**inputs)) < 1e-6


def test_one_tensor_given_twice_is_one_placeholder():
    class Both(nn.Module):
        def forward(self, x, y):
            return x + y if (x == y).all() else x

    (x,) = record(Both(), (X, X)).find_nodes(op="placeholder")
    assert [user.target for user in x.users] == ["__eq__", "add"]


def test_a_chain_is_one_call(small):
    net = surgery.decompose(small, {"conv2": 0.5})
    graph = record(net, X)
    assert shape(nodes(graph, "conv2")[0]) == (2, 24, 6, 6)
    assert not [n for n in graph.nodes if "conv2." in str(n.target)]


def test_layers_of_any_class_are_leaves_but_containers_are_not():
    class Own(nn.Conv2d):
        def forward(self, x):
            return super().forward(x) * 2

    model = nn.Sequential(nn.Sequential(Own(3, 4, 3)), nn.utils.parametrizations.weight_norm(nn.Conv2d(4, 4, 3)), nn.BatchNorm2d(4))
    assert [n.target for n in record(model, X).find_nodes(op="call_module", sort=True)] == ["0.0", "1", "2"]


def test_a_layers_hooks_belong_to_its_call():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU())
    model[0].register_forward_hook(lambda module, args, output: output * 2)
    graph = record(model, X)
    assert [n.op for n in graph.nodes] == ["placeholder", "call_module", "call_module", "output"]
    assert difference(replayed(graph, model, X), model(X)) == 0.0


@torch.jit.script
def doubled(x: Tensor) -> Tensor:
    return x * 2 + x


def test_torchscript_inside():
    scripted, traced = torch.jit.script(nn.Sequential(nn.Conv2d(3, 3, 3))), torch.jit.trace(nn.Conv2d(3, 3, 3), X)
    model = Net(lambda net, x: doubled(net.traced(net.scripted(x))))
    model.scripted, model.traced = scripted, traced
    graph = record(model, X)
    assert [n.target for n in graph.find_nodes(op="call_module", sort=True)] == ["scripted", "traced"]
    assert [n.name for n in nodes(graph, "traced")[0].users] == ["mul_scalar", "add_tensor"]  # what runs inside the scripted function
    assert difference(replayed(graph, model, X), output_of(model, X)) == 0.0


class Marked(torch.Tensor):
    """A subclass of tensor without behaviour of its own."""


def test_tensor_subclasses_stay_connected():
    graph = record(Net(lambda net, x: net.b(net.a(x).as_subclass(Marked).mul(2).as_subclass(Tensor))), X)
    (a,), (b,) = nodes(graph, "a"), nodes(graph, "b")
    steps = [b.all_input_nodes[0]]
    while steps[-1] is not a:
        steps.append(steps[-1].all_input_nodes[0])
    assert [n.target for n in steps] == [alias, "mul", alias, "a"]


def test_what_numpy_made_is_a_constant():
    graph = record(Net(lambda net, x: net.a(torch.from_numpy(numpy.maximum(x.numpy(), 0.0)))), X)
    (constant,) = graph.find_nodes(op="get_attr")
    assert constant.target == "_tensor_constant0"
    assert [user.target for user in constant.users] == ["a"]


def test_copies_of_a_recording_are_recordings():
    graph = record(Branching(), X)
    copied = copy.deepcopy(graph)
    assert isinstance(copied, RecordedGraph)
    assert str(copied) == str(graph)


class Careless(nn.Module):
    """Caches what it sees, draws random numbers of every sort, writes to its input, parameters and buffers, then branches on data."""

    def __init__(self):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)
        self.cache, self.calls = {}, 0
        self.register_buffer("steps", torch.zeros(()))

    def forward(self, x):
        self.calls += 1
        self.cache[self.calls] = x
        self.noise = torch.rand(1) + random.random() + numpy.random.rand()
        self.steps += 1
        self.bn.weight.data.mul_(0.5)
        y = self.bn(self.conv(x.mul_(0.5)))
        self.conv.register_forward_hook(lambda *_: None)
        self.eval()
        return y if y.sum() > self.noise else -y


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("act", [surgery.capture, record], ids=["after a failing trace", "at once"])
def test_nothing_changes(act, training):
    model, inputs = Careless().train(training), X.clone()
    state, attributes = copy.deepcopy(model.state_dict()), set(vars(model))
    generators = torch.get_rng_state(), random.getstate(), numpy.random.get_state()[1].tolist()
    assert isinstance(act(model, inputs), RecordedGraph)
    assert (model.calls, model.cache, set(vars(model))) == (0, {}, attributes)
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert all(module.training == training for module in model.modules())
    assert not any(module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module) for module in model.modules())
    assert torch.equal(inputs, X)
    assert torch.equal(torch.get_rng_state(), generators[0])
    assert (random.getstate(), numpy.random.get_state()[1].tolist()) == generators[1:]
    assert torch.is_grad_enabled()
    assert not torch._C._is_torch_function_mode_enabled()


def test_the_mode_decides_what_is_recorded():
    model = Net(lambda net, x: net.a(functional.dropout(x)) if net.training else net.b(x))
    assert nodes(record(model.train(), X), "a")
    assert nodes(record(model.eval(), X), "b")


@pytest.mark.parametrize("act", [surgery.capture, record])
def test_what_cannot_be_recorded_is_one_clear_error(act, small):
    for inputs in (torch.randn(2, 5, 12, 12), (X, X), {"y": X}):
        with pytest.raises(SurgeryValueError, match="example_inputs: Small fails on them"):
            act(small, inputs)
    for layer in (nn.Conv2d(3, 4, 3), surgery.decompose(nn.Conv2d(8, 8, 3), {"": 0.5})):
        with pytest.raises(SurgeryTypeError, match="without a name in a graph"):
            act(layer, X)
    with pytest.raises(SurgeryValueError, match="Branching fails on them"):
        act(Branching(), torch.randn(2, 5, 12, 12))


def registered(name):
    torch.manual_seed(0)
    try:
        return make(name)[0].eval()
    except surgery.MissingExtra as error:
        pytest.skip(str(error))


@pytest.mark.parametrize(
    ("name", "size"),
    [("timm:mobilevit_xxs", 64), ("timm:convit_tiny", 224), ("timm:nest_tiny", 224), ("torchvision:raft_small", 128), ("torchvision:swin_v2_t", 64)],
)
def test_networks_of_others(name, size):
    model = registered(name)
    inputs = tuple(torch.randn(1, 3, size, size, generator=torch.Generator().manual_seed(n)) for n in range(2 if "raft" in name else 1))
    graph = record(model, inputs)
    if "swin" not in name:
        assert isinstance(surgery.capture(model, inputs), RecordedGraph)
    assert difference(replayed(graph, model, *inputs), output_of(model, *inputs)) == 0.0
    assert {n.target for n in graph.find_nodes(op="call_module")} <= {name for name, _ in model.named_modules()}


def test_a_decomposed_network_is_captured_as_well():
    net = surgery.decompose(Branching(), {"conv": 1.0}, example_inputs=X)
    assert nodes(surgery.capture(net, X), "conv")
    assert isinstance(surgery.capture(Small().train(), X), fx.Graph)


class Unusual(nn.Module):
    """Hands a layer of torch a container of its own kind, reads an empty part of a tensor that is written to, and sets what a tensor holds."""

    def __init__(self):
        super().__init__()
        self.pass_on, self.conv = nn.Identity(), nn.Conv2d(3, 4, 3)

    def forward(self, x):
        pair = self.pass_on(Halves(x, x + 1))
        held = torch.zeros_like(x)
        held.data = pair.first * 2
        none = held[:0]
        held[0] = 1.0
        return self.conv(held + pair.second) if not len(none) else none


@dataclass
class Halves:
    first: Tensor
    second: Tensor


def test_containers_of_ones_own_and_what_tensors_are_told_to_hold():
    model = Unusual().eval()
    graph = record(model, X)
    assert [str(n.target) for n in graph.nodes if n.op == "call_module"] == ["pass_on", "conv"]
    handed = next(n for n in graph.nodes if n.target == "pass_on")
    assert set(handed.args[0]) == {"first", "second"}
    assert any(n.target is setattr and n.args[1] == "data" for n in graph.nodes)
