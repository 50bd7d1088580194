"""Seeing a model without changing it, and believing a trace only when it is proved."""

from __future__ import annotations

import copy
import functools
import random
import threading
import types

import numpy
import pytest
import torch
from torch import nn
from torch.nn import functional

import surgery
from passes import RecordedGraph, observe
from passes.errors import SurgeryError, SurgeryTypeError, SurgeryValueError
from passes.parity import assert_parity, difference
from passes.running import private_copy, run
from tests.networks import Branching, Keyword, Mistraced, Twice

X = torch.randn(2, 3, 12, 12, generator=torch.Generator().manual_seed(9))


def test_a_trace_computes_the_same_and_has_weights_of_its_own(small):
    traced = surgery.trace(small, X)
    assert_parity(traced(X), small(X))
    assert not {p.data_ptr() for p in traced.parameters()} & {p.data_ptr() for p in small.parameters()}
    assert not traced.training


def test_control_flow_on_data_is_refused_with_the_reason():
    with pytest.raises(SurgeryError, match=r"Branching cannot be traced symbolically \(TraceError"):
        surgery.trace(Branching(), X)


def test_a_wrong_trace_is_not_believed():
    with pytest.raises(SurgeryError, match=r"Mistraced was traced, but the trace is wrong: .*differ"):
        surgery.trace(Mistraced(), X)


@pytest.mark.parametrize("model", [Branching(), Mistraced()])
def test_surgery_needs_no_trace(model):
    net = surgery.decompose(model, {"re:.*": 1.0}, example_inputs=X)
    assert_parity(net(X), model(X))
    assert surgery.report(net).layers[0].speedup is not None


class Stateful(nn.Module):
    """Counts its calls, draws random numbers, works in place on its input, caches what it saw."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3)
        self.bn = nn.BatchNorm2d(8)
        self.calls = 0
        self.cache = {}
        self.register_buffer("steps", torch.zeros(()))

    def forward(self, x):
        self.calls += 1
        self.steps += 1
        self.cache["x"] = x
        x = functional.dropout(x.mul_(0.5), training=self.training)
        return self.bn(self.conv(x))


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("act", [surgery.capture, surgery.plan, surgery.trace, surgery.decompose], ids=lambda f: f.__name__)
def test_looking_changes_nothing(act, training):
    model, inputs = Stateful().train(training), X.clone()
    state, rng = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    if act in (surgery.capture, surgery.trace):
        act(model, inputs)
    else:
        act(model, example_inputs=inputs)
    assert model.calls == 0
    assert model.cache == {}
    assert model.training == training
    assert torch.equal(inputs, X)
    assert torch.equal(rng, torch.get_rng_state())
    assert all(torch.equal(v, model.state_dict()[k]) for k, v in state.items())
    assert not model.conv._forward_hooks


@pytest.mark.parametrize("training", [False, True])
def test_a_trace_is_that_of_the_mode_the_model_is_in(training):
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Dropout(0.5)).train(training)
    traced = surgery.trace(model, X)
    assert traced.training == training
    twin = copy.deepcopy(model)
    torch.manual_seed(1)
    expected = twin(X)
    torch.manual_seed(1)
    assert difference(traced(X), expected) == 0.0


def test_inputs_by_keyword_and_outputs_in_a_dict():
    model = Keyword().eval()
    inputs = {"gain": torch.ones(1), "sound": torch.randn(2, 4, 20)}
    traced = surgery.trace(model, inputs)
    assert difference(traced(**inputs), model(**inputs)) == 0.0
    net = surgery.decompose(model, {"conv": 1.0}, example_inputs=inputs)
    assert_parity(net(**inputs), model(**inputs))
    assert surgery.report(net)["conv"].output_shape == (2, 6, 20)
    positional = (inputs["sound"], inputs["gain"])
    assert surgery.report(surgery.decompose(model, {"conv": 1.0}, example_inputs=positional)) == surgery.report(net)


def test_a_list_is_one_argument():
    class Sums(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 3)

        def forward(self, pictures):
            return sum(self.conv(p).mean() for p in pictures)

    report = surgery.report(surgery.decompose(Sums(), 1.0, example_inputs=[X, X[:1]]))
    assert report["conv"].calls == 2


def test_calls_by_first_name():
    calls = observe(Twice(), torch.randn(1, 8, 8, 8)).calls
    assert [c.input_shape[-1] for c in calls["conv"]] == [8, 4]
    assert [c.output_shape for c in calls["other"]] == [(1, 8, 4, 4)]


def test_layers_that_are_not_reached_have_no_calls():
    class FirstOnly(nn.Sequential):
        def forward(self, x):
            return self[0](x)

    model = FirstOnly(nn.Conv2d(3, 4, 3))
    model.aux = nn.Conv2d(3, 4, 3)
    net = surgery.decompose(model, 0.5, example_inputs=X)
    assert surgery.report(net)["aux"].reason == "the example inputs do not reach it"


@pytest.mark.parametrize("inputs", [torch.randn(2, 4, 12, 12), torch.randn(2, 3), (X, X), {"y": X}, "picture"])
def test_wrong_example_inputs_get_one_clear_error(small, inputs):
    with pytest.raises(SurgeryValueError, match="example_inputs: Small fails on them") as caught:
        surgery.decompose(small, example_inputs=inputs)
    assert caught.value.__cause__ is not None


def test_a_copy_may_share_parameters_but_never_buffers(small):
    twin = private_copy(small, share_parameters=True)
    assert twin.conv1.weight is small.conv1.weight
    assert twin.bn1.running_mean is not small.bn1.running_mean


def test_models_that_cannot_be_copied():
    model = nn.Sequential(nn.Conv2d(3, 4, 3))
    model.lock = __import__("threading").Lock()
    with pytest.raises(SurgeryTypeError, match="cannot be copied"):
        surgery.decompose(model)


def test_old_weight_norm_can_be_copied_and_run():
    with pytest.warns(FutureWarning):
        model = nn.Sequential(nn.utils.weight_norm(nn.Conv2d(3, 8, 3)), nn.Conv2d(8, 8, 3))
    model(X)
    net = surgery.decompose(model, {"re:.*": 1.0}, example_inputs=X)
    assert surgery.report(net)["0"].reason.startswith("its weight is computed")
    assert surgery.report(net)["1"].status == "decomposed"
    assert_parity(net(X), model(X))


def test_run_takes_a_tuple_a_mapping_or_one_argument():
    class Echo(nn.Module):
        def forward(self, a, b=2):
            return a, b

    assert run(Echo(), (1, 3)) == (1, 3)
    assert run(Echo(), {"b": 5, "a": 4}) == (4, 5)
    assert run(Echo(), [7]) == ([7], 2)


class Writing(nn.Module):
    """Writes to its own parameters in forward, as some centred or normalised layers do."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 8, 3), nn.GroupNorm(2, 8)

    def forward(self, x):
        self.norm.weight.data.mul_(0.5)
        return self.norm(self.conv(x))


@pytest.mark.parametrize("act", [surgery.plan, surgery.decompose])
def test_a_forward_that_writes_to_parameters_writes_to_nobodys(act):
    model = Writing()
    before = model.norm.weight.clone()
    result = act(model, {"conv": 1.0}, example_inputs=X)
    assert torch.equal(model.norm.weight, before)
    if act is surgery.decompose:
        assert torch.equal(result.norm.weight, before)
        assert difference(result.conv.weight, model.conv.weight) < 1e-5


class Odd(nn.Conv2d):
    """A layer of its own kind: takes the channels last, and returns a pair."""

    def forward(self, x):
        return super().forward(x.movedim(-1, 1)).movedim(1, -1), 3


def test_layers_that_take_and_give_something_else():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.odd, self.conv = Odd(3, 8, 3), nn.Conv2d(8, 8, 3)

        def forward(self, x):
            y, _ = self.odd(x)
            return self.conv(y.movedim(-1, 1))

    net = surgery.decompose(Net(), 0.5, example_inputs=torch.randn(1, 9, 9, 3))
    rows = surgery.report(net)
    assert "its own way" in rows["odd"].reason
    assert rows["conv"].status == "decomposed"


def test_any_number_of_inputs():
    class Adding(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 3)

        def forward(self, first, *others):
            return self.conv(first + others[0] * others[1])

    inputs = (X, X + 1, X - 1)
    traced = surgery.trace(Adding(), inputs)
    assert_parity(traced(*inputs), surgery.decompose(traced, {"conv": 1.0}, example_inputs=inputs)(*inputs))
    assert surgery.report(surgery.decompose(traced, {"conv": 1.0}))["conv"].macs_before == 2 * 4 * 100 * 27


def test_wrong_inputs_for_a_graph_get_one_clear_error(small, capsys):
    traced = surgery.trace(small, X)
    for inputs in (torch.randn(2, 5, 12, 12), (X, X), {"y": X}):
        with pytest.raises(SurgeryValueError, match="example_inputs: Small fails on them"):
            surgery.decompose(traced, 0.5, example_inputs=inputs)
    assert capsys.readouterr() == ("", "")


def test_planning_on_a_graph_leaves_its_shapes_alone(small):
    traced = surgery.trace(small, X)
    before = [node.meta["tensor_meta"].shape for node in traced.graph.nodes if "tensor_meta" in node.meta]
    plan = surgery.plan(traced, 0.5, example_inputs=torch.randn(1, 3, 20, 20))
    assert plan == surgery.plan(small, 0.5, example_inputs=torch.randn(1, 3, 20, 20))
    assert [node.meta["tensor_meta"].shape for node in traced.graph.nodes if "tensor_meta" in node.meta] == before


@pytest.mark.parametrize("layer", [nn.Conv2d(3, 4, 3), nn.Linear(3, 4), surgery.decompose(nn.Conv2d(8, 8, 3), {"": 0.5})])
def test_a_layer_alone_has_no_name_in_a_graph(layer):
    with pytest.raises(SurgeryTypeError, match=r"without a name in a graph; wrap it: nn\.Sequential"):
        surgery.trace(layer, X)


def test_a_trace_knows_what_was_done_before(small):
    net = surgery.decompose(small, 0.5, example_inputs=X)
    assert surgery.report(surgery.trace(net, X)) == surgery.report(net)
    back = surgery.reconstruct(net)
    assert surgery.report(surgery.trace(back, X)) == surgery.report(back)
    assert surgery.report(surgery.trace(small, X)).passes == ()


def test_inputs_by_any_keyword():
    class Keywords(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 3)

        def forward(self, x, **more):
            return self.conv(x * more["gain"])

    inputs = {"x": X, "gain": torch.tensor(2.0)}
    traced = surgery.trace(Keywords(), inputs)
    assert {tuple(n.meta["tensor_meta"].shape) for n in traced.graph.nodes if n.op == "call_module"} == {(2, 4, 10, 10)}


def test_an_empty_batch_shows_nothing_and_is_refused(small):
    with pytest.raises(surgery.SurgeryValueError, match="example_inputs: they hold no example"):
        surgery.plan(small, 0.5, example_inputs=X[:0])


def test_a_trace_with_tensors_made_on_the_way():
    class Positions(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 3)

        def forward(self, x):
            return self.conv(x) + torch.arange(10).float()

    model = Positions()
    assert_parity(surgery.trace(model, X)(X), model(X))
    assert not [name for name in vars(model) if "constant" in name]


class Around(nn.Module):
    """A convolution, a batch norm and state of its own, in a forward that a test gives."""

    def __init__(self, forward):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3)
        self.todo, self.n, self.kept, self.seen = forward, 0, None, []
        self.register_buffer("slots", torch.zeros(2, 3, 12, 12))

    def forward(self, x):
        return self.todo(self, x)


def collects(net, x):
    total = torch.zeros(2, 3, 12, 12)
    total += net.conv(x)
    return total


def counts(net, x):
    net.n += 1
    return net.conv(x) * net.n


def remembers(net, x):
    y = net.conv(x)
    out = y if net.kept is None else y + net.kept
    net.kept = y.detach()
    return out


def lists(net, x):
    net.seen.append(net.conv(x))
    return sum(net.seen)


def fills(net, x):
    net.slots[net.n] = net.conv(x)[0]
    net.n += 1
    return net.slots.sum(0)


def writes(net, x):
    """The constant is written to, and the outputs do not tell."""
    scratch = torch.zeros(2, 3, 12, 12)
    scratch.copy_(net.conv(x))
    return scratch


@pytest.mark.parametrize("forward", [collects, counts, remembers, lists, fills, writes])
@pytest.mark.parametrize("training", [False, True])
def test_what_is_right_only_once_is_no_trace(forward, training):
    model = Around(forward).train(training)
    with pytest.raises(SurgeryError, match=r"the trace is wrong|cannot be traced"):
        surgery.trace(model, X)
    assert isinstance(surgery.capture(model, X), RecordedGraph)
    assert (model.n, model.kept, model.seen) == (0, None, [])


def test_a_cache_that_is_always_the_same_is_traced():
    def cached(net, x):
        if net.kept is None:
            net.kept = torch.arange(12.0) / 12
        return net.conv(x) + net.kept

    model = Around(cached).eval()
    traced = surgery.trace(model, X)
    for inputs in (X, -X):
        assert_parity(traced(inputs), model(inputs))


def drops(net, x):
    return net.bn(net.conv(x)) if random.random() < 0.9 else x


RANDOM = {
    "a layer is left out": drops,
    "by numpy": lambda net, x: net.conv(x) if numpy.random.rand() < 0.9 else x,
    "by torch": lambda net, x: net.conv(x) if torch.rand(()) < 0.9 else x,
    "noise": lambda net, x: net.conv(x) + torch.randn(2, 3, 12, 12),
}


@pytest.mark.parametrize("forward", RANDOM.values(), ids=RANDOM)
@pytest.mark.parametrize("seed", range(3))
def test_random_numbers_are_no_constants(forward, seed):
    torch.manual_seed(seed)
    random.seed(seed)
    model = Around(forward).eval()
    with pytest.raises(SurgeryError, match="draws random numbers"):
        surgery.trace(model, X)
    assert isinstance(surgery.capture(model, X), RecordedGraph)


def test_noise_that_the_graph_draws_itself_is_traced():
    model = Around(lambda net, x: net.conv(x) + torch.randn_like(x)).eval()
    traced = surgery.trace(model, X)
    torch.manual_seed(4)
    expected = model(X)
    torch.manual_seed(4)
    assert_parity(traced(X), expected)


FEATURES = {}
STATE = types.SimpleNamespace(feature=None)


class Shares(Around):
    """Keeps what it computed where copies do not own it."""

    cache = {}  # noqa: RUF012
    last = None

    def forward(self, x):
        y = self.conv(x)
        Shares.last = y
        FEATURES["y"] = y
        STATE.feature = [y]
        if "grid" not in self.cache:
            self.cache["grid"] = x.new_ones(12).cumsum(0)
        return self.todo(self, y + self.cache["grid"])


@pytest.mark.parametrize("traceable", [True, False])
def test_tracing_leaves_no_proxies_behind(traceable):
    Shares.cache.clear()
    feats, depth = [], []

    def hook(module, args, output):
        feats.append(output)
        depth.append({"deep": [output]})

    def forward(net, x):
        return net.bn(x) if traceable or x.sum() > 0 else x

    model = Shares(forward).eval()
    model.conv.register_forward_hook(hook)
    graph = surgery.capture(model, X)
    assert isinstance(graph, RecordedGraph) != traceable
    held = [*feats, *(d["deep"][0] for d in depth), *STATE.feature, *Shares.cache.values(), FEATURES["y"], Shares.last]
    assert {type(value) for value in held} == {torch.Tensor}
    assert type(model(X)) is torch.Tensor


def test_submodules_keep_their_own_mode():
    frozen = nn.Sequential(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)), nn.Dropout(0.5)).train()
    frozen[0].eval()
    frozen[0][1].running_mean.normal_()
    sampled = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Dropout(0.5)).eval()
    sampled[1].train()
    for model in (frozen, sampled):
        traced = surgery.trace(model, X)
        assert {n: m.training for n, m in traced.named_modules()} == {n: m.training for n, m in model.named_modules()}
        torch.manual_seed(2)
        expected = model(X)
        torch.manual_seed(2)
        assert_parity(traced(X), expected)


def patched(how):
    model = nn.Sequential(nn.Conv2d(3, 3, 3), nn.BatchNorm2d(3)).train()
    old = model.forward
    helper = {"model": model}
    model.forward = {
        "closure": lambda z: old(z) * 2,
        "default": lambda z, old=old: old(z) * 2,
        "container": lambda z: helper["model"][1](helper["model"][0](z)),
        "partial": functools.partial(lambda gain, z: old(z) * gain, 2),
        "wrapped": functools.wraps(old)(lambda z: old(z) * 2),
        "method": types.MethodType(lambda self, z: old(z) * 2, model),
    }[how]
    return model


@pytest.mark.parametrize("how", ["closure", "default", "container", "partial", "wrapped", "method"])
@pytest.mark.parametrize("act", [surgery.capture, surgery.deploy, lambda m, x: surgery.decompose(m, 0.5, example_inputs=x)])
def test_a_forward_that_no_copy_would_follow_is_refused(how, act):
    model = patched(how)
    with pytest.raises(SurgeryTypeError, match=r"the model: its attribute 'forward' is a function that reaches the model \(Sequential\).*make it a"):
        act(model, X)
    assert model[1].num_batches_tracked == 0


def test_a_forward_that_copies_follow_is_not_refused():
    def doubled(self, z):
        return nn.Sequential.forward(self, z) * 2

    stranger = nn.Conv2d(3, 3, 1)
    for bound in (lambda m: types.MethodType(doubled, m), lambda m: functools.partial(doubled, m)):
        model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)).eval()
        model.forward = bound(model)
        model.unrelated = lambda z, other=stranger: other(z)
        model[0].forward = model[0].forward
        net = surgery.decompose(model, {}, example_inputs=X)
        assert_parity(net(X), model(X))
        net[0].weight.data.zero_()
        assert difference(net(X), model(X)) > 0.1


@pytest.mark.parametrize("array", [numpy.array(3.0), numpy.zeros(3), numpy.float64(2)])
def test_inputs_that_are_no_tensors(array):
    model = Takes().eval()
    assert surgery.capture(model, {"x": X, "n": array})
    assert surgery.decompose(model, {"conv": 1.0}, example_inputs={"x": X, "n": array})
    with pytest.raises(SurgeryTypeError, match="example_inputs: they cannot be copied"):
        surgery.capture(model, {"x": X, "n": threading.Lock()})


class Takes(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)

    def forward(self, x, n=None, mask=None):
        y = self.conv(x)
        return y if mask is None else y * mask


LOOKS = {
    "capture": surgery.capture,
    "trace": surgery.trace,
    "deploy": surgery.deploy,
    "foreign": lambda m, x: surgery.reconstruct(m, foreign=True, example_inputs=x),
}


@pytest.mark.parametrize("look", LOOKS.values(), ids=LOOKS)
def test_what_has_no_numbers_or_shapes_is_refused_in_one_line(look):
    meta = nn.Sequential(nn.Conv2d(3, 3, 3), nn.BatchNorm2d(3)).eval()
    with pytest.raises(SurgeryValueError, match=r"^example_inputs: they are on the meta device.*$"):
        look(nn.Sequential(nn.Conv2d(3, 3, 3), nn.ReLU()).eval(), X.to("meta"))
    with pytest.raises(SurgeryValueError, match=r"^0\.weight: it is on the meta device and has no numbers; load weights first$"):
        look(meta.to("meta"), X.to("meta"))
    with pytest.raises(SurgeryValueError, match=r"^0: LazyConv2d has no shape yet; run the model once"):
        look(nn.Sequential(nn.LazyConv2d(3, 3)), X)


@pytest.mark.parametrize("inputs", [None, [X], 3, "x"])
def test_the_models_own_error_is_told_in_one_line(inputs):
    with pytest.raises(SurgeryValueError, match=r"example_inputs: Sequential fails on them .*TypeError: ") as caught:
        surgery.capture(nn.Sequential(nn.Conv2d(3, 3, 3)), inputs)
    assert len(str(caught.value).splitlines()) == 1


def test_a_trace_that_fails_prints_nothing(capsys):
    class Masked(Takes):
        def forward(self, x, n=None, mask=None):
            return super().forward(x, n, mask)

    assert isinstance(surgery.capture(Masked().eval(), X), RecordedGraph)
    assert capsys.readouterr() == ("", "")


class Forces(nn.Module):
    """Energy of points, and the forces on them."""

    def __init__(self, prepare):
        super().__init__()
        self.inner, self.out, self.prepare = nn.Linear(3, 8), nn.Linear(8, 1), prepare

    def forward(self, points):
        points = self.prepare(points)
        energy = self.out(torch.tanh(self.inner(points))).sum()
        return energy, -torch.autograd.grad(energy, points, create_graph=True)[0]


@pytest.mark.parametrize("prepare", [lambda p: p, lambda p: p.requires_grad_(True)], ids=["by the caller", "by itself"])
def test_models_that_differentiate_by_their_input(prepare):
    points = torch.randn(4, 3, requires_grad=True)
    graph = surgery.capture(Forces(prepare), points)
    assert [n.target for n in graph.nodes if n.op == "call_module"] == ["inner", "out"]
    net = surgery.decompose(Forces(prepare), {"inner": 2}, example_inputs=points)
    report = surgery.report(net)
    assert report["inner"].calls == 1
    assert report.macs_before > report.macs_after > report["inner"].macs_after  # the backward pass runs in it too
    assert points.grad is None
    assert surgery.report(surgery.deploy(net, points)).macs_after < report.macs_before


@torch.fx.wrap
def clamped(sizes, x):
    """Writes to the list that it is given."""
    for i, size in enumerate(sizes):
        sizes[i] = min(size, x.shape[2 + i])
    return sizes


class WritesToItsLists(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.sizes = nn.Conv2d(3, 4, 3), [20, 2]

    def forward(self, x):
        sizes = clamped(self.sizes.copy(), x)
        return self.conv(torch.roll(x, (sizes[0], sizes[1]), (2, 3)))


def test_a_function_that_is_left_whole_may_write_to_its_lists():
    model = WritesToItsLists().eval()
    traced = surgery.trace(model, X)
    assert_parity(traced(X), model(X))
    assert traced.graph.find_nodes(op="call_module", target="conv")[0].meta["tensor_meta"].shape == (2, 4, 10, 10)
    assert model.sizes == [20, 2]


class Lazy(nn.Module):
    """Makes its kernel when it is first called."""

    def forward(self, x):
        if not hasattr(self, "kernel"):
            self.register_buffer("kernel", torch.ones(3, 1, 3, 3) / 9)
        return nn.functional.conv2d(x, self.kernel, groups=3)


def test_tensors_that_a_submodule_makes_when_it_is_called_are_recorded():
    model = nn.Sequential(Lazy(), nn.Conv2d(3, 4, 3)).eval()
    x = torch.randn(1, 3, 9, 9)
    with pytest.raises(SurgeryError, match=r"its code makes 0.kernel only when it runs\); run it once before"):
        surgery.trace(model, x)
    assert isinstance(surgery.capture(model, x), RecordedGraph)
    surgery.deploy(model, x)
    assert not hasattr(model[0], "kernel")
    expected = model(x)
    assert_parity(surgery.trace(model, x)(x), expected)


@pytest.mark.parametrize("instead", [None, nn.Conv2d(8, 8, 3)], ids=["gone", "a layer"])
def test_chains_that_were_taken_out_of_a_graph_are_forgotten(instead):
    x = torch.randn(1, 3, 9, 9)
    graph = surgery.trace(surgery.decompose(nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3)), 0.5, guard="none"), x)
    (output,) = graph.graph.find_nodes(op="output")
    last = next(node for node in graph.graph.nodes if node.target == "0.expand")
    output.args = (last,)
    graph.graph.eliminate_dead_code()
    graph.delete_all_unused_submodules()
    if instead is not None:
        graph.add_submodule("1", instead)
        with graph.graph.inserting_before(output):
            output.args = (graph.graph.call_module("1", (last,)),)
    graph.recompile()
    assert {row.name: row.status for row in surgery.report(graph).layers} == {"0": "decomposed"} | ({} if instead is None else {"1": "kept"})
