"""What one forward pass tells beyond calls: who reads weights behind their layers' backs, and layers written as functions."""

from __future__ import annotations

import pytest
import torch
from torch import fx, nn
from torch.nn import functional
from torch.utils.flop_counter import FlopCounterMode

import surgery
from passes import GraphHost, ModuleHost, host_for, observe, trace
from passes.errors import SurgeryValueError
from passes.parity import assert_parity
from passes.site import Call
from passes.watching import SHAPE_ONLY
from tests.networks import ReadsAttributes

X = torch.randn(2, 4, 9, 9, generator=torch.Generator().manual_seed(61))


class Net(nn.Module):
    """Two convolutions and whatever forward a test gives it, in a module of their own."""

    def __init__(self, forward):
        super().__init__()
        self.body = self.Body(forward)

    def forward(self, x):
        return self.body(x)

    class Body(nn.Module):
        def __init__(self, forward):
            super().__init__()
            self.conv, self.other = nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)
            self.gain = nn.Parameter(torch.randn(4, 4, 3, 3))
            self.mix = nn.Parameter(torch.randn(3, 6 * 4 * 9))
            self.todo = forward

        def forward(self, x):
            return self.todo(self, x)


READS = {
    "as a function": lambda net, x: functional.conv2d(x, net.conv.weight, padding=1),
    "with its bias": lambda net, x: functional.conv2d(x, weight=net.conv.weight, bias=net.conv.bias),
    "computed": lambda net, x: functional.conv2d(x, net.conv.weight * 2),
    "its data": lambda net, x: functional.conv2d(x, net.conv.weight.data),
    "a view": lambda net, x: net.conv(x) + net.conv.weight[0, 0].mean(),
    "detached": lambda net, x: net.conv(x) + net.conv.weight.detach().flatten().sum(),
    "a number": lambda net, x: net.conv(x) * net.conv.weight.norm().item(),
    "written": lambda net, x: (net.conv.weight.data.clamp_(-1, 1), net.conv(x))[1],
    "stacked": lambda net, x: net.conv(x) + torch.stack([net.conv.weight, net.gain]).sum(),
    "converted": lambda net, x: functional.conv2d(x.double(), net.conv.weight.to(torch.float64)),
    "by numpy": lambda net, x: net.conv(x) * float(net.conv.weight.detach().numpy().sum()),
    "as a list": lambda net, x: net.conv(x) * net.conv.weight.tolist()[0][0][0][0],
    "its memory": lambda net, x: net.conv(x) * net.conv.weight.data.untyped_storage()[0],
    "a view's numbers": lambda net, x: net.conv(x) + net.conv.weight.data.view(-1).detach()[1:].sum(),
    "a view written": lambda net, x: (net.conv.weight.data.view(-1).mul_(0.5), net.conv(x))[1],
    "shared": lambda net, x: net.conv(x) + torch.from_dlpack(net.conv.weight.detach()).sum(),
    "from the state": lambda net, x: net.conv(x) + net.state_dict()["conv.weight"].sum(),
}
NO_READS = {
    "shape": lambda net, x: net.conv(x) * net.conv.weight.shape[0] * net.conv.weight.size(1) * net.conv.weight.numel() * net.conv.weight.dim(),
    "type and place": lambda net, x: net.conv(x.to(net.conv.weight.dtype).to(net.conv.weight.device).to(net.conv.weight).type_as(net.conv.weight)),
    "alike": lambda net, x: (
        net.conv(x) + torch.zeros_like(net.conv.weight).sum() + net.conv.weight.new_ones(1) + torch.empty_like(net.conv.bias).numel()
    ),
    "attributes": lambda net, x: net.conv(x) * net.conv.kernel_size[0] * (2 if net.conv.weight.requires_grad else 3) + len(net.conv.weight),
    "its own forward": lambda net, x: net.conv.forward(x),
    "of an alias": lambda net, x: net.conv(x.to(net.conv.weight.data.device).to(net.conv.weight.detach().dtype)),
    "of a view": lambda net, x: net.conv(x) * net.conv.weight.view(-1).shape[0] * net.conv.weight.flatten(1).size(1),
    "same size": lambda net, x: net.conv(x) if net.conv.weight.is_same_size(net.other.weight) else x,
    "the names of the state": lambda net, x: net.conv(x) * ("gain" in net.state_dict()),
}


@pytest.mark.parametrize("forward", READS.values(), ids=READS)
def test_weights_that_others_read(forward):
    model = Net(lambda net, x: net.other(forward(net, x).float()))
    assert observe(model, X).readers == {"body.conv": "its weight is read by body (Body)"}
    net = surgery.decompose(model, {"re:.*": 0.5}, example_inputs=X)
    assert surgery.report(net)["body.conv"].reason == "its weight is read by body (Body)"
    assert surgery.report(net)["body.other"].status == "decomposed"
    with pytest.raises(SurgeryValueError, match=r"'body\.conv' cannot be cut as asked: its weight is read by body \(Body\)"):
        surgery.plan(model, {"body.conv": 0.5}, example_inputs=X)


@pytest.mark.parametrize("forward", NO_READS.values(), ids=NO_READS)
def test_attributes_are_no_reads(forward):
    model = Net(lambda net, x: net.other(forward(net, x)))
    seen = observe(model, X)
    assert seen.readers == {}
    assert len(seen.calls["body.conv"]) == 1
    net = surgery.decompose(model, {"re:.*": 1.0}, example_inputs=X)
    assert surgery.report(net)["body.conv"].status == "decomposed"
    assert_parity(net(X), model(X))


def test_operators_that_look_at_no_numbers_exist():
    assert all(hasattr(torch.ops.aten, name) for name in SHAPE_ONLY)


def test_a_bias_that_is_read():
    assert observe(Net(lambda net, x: net.conv(x) + net.conv.bias.sum()), X).readers == {"body.conv": "its bias is read by body (Body)"}
    both = Net(lambda net, x: net.conv(x) + net.conv.bias.sum() + net.conv.weight.sum())
    assert observe(both, X).readers == {"body.conv": "its weight is read by body (Body)"}


def test_the_model_itself_and_what_it_reads_without_inputs():
    model = ReadsAttributes().eval()
    assert (
        surgery.report(surgery.decompose(model, {"re:.*": 0.5}, example_inputs=X))["conv"].reason
        == "its weight is read by the model (ReadsAttributes)"
    )
    assert surgery.report(surgery.decompose(model, {"re:.*": 0.5}))["conv"].status == "decomposed"  # who reads is seen only by running it


def test_attention():
    class Attends(nn.Module):
        """A projection whose weights a function takes, as in pooling by attention."""

        def __init__(self):
            super().__init__()
            self.q, self.k, self.v, self.out = (nn.Linear(8, 8) for _ in range(4))

        def forward(self, x):
            bias = torch.cat([self.q.bias, self.k.bias, self.v.bias])
            separate = {"q_proj_weight": self.q.weight, "k_proj_weight": self.k.weight, "v_proj_weight": self.v.weight}
            rest = (8, 2, None, bias, None, None, False, 0.0, self.out.weight, self.out.bias)
            return functional.multi_head_attention_forward(x, x, x, *rest, use_separate_proj_weight=True, **separate)[0]

    class Both(nn.Module):
        def __init__(self):
            super().__init__()
            self.mha, self.own, self.encoder = nn.MultiheadAttention(8, 2), Attends(), nn.TransformerEncoderLayer(8, 2, 16)

        def forward(self, x):
            return self.encoder(self.own(self.mha(x, x, x)[0]))

    net = surgery.decompose(Both().eval(), {"re:.*": 0.5}, example_inputs=torch.randn(3, 2, 8))
    reasons = {row.name: row.reason for row in surgery.report(net).layers}
    assert reasons["mha.out_proj"] == "its weight is read by mha (MultiheadAttention)"
    assert {reasons[f"own.{name}"] for name in ("q", "k", "v", "out")} == {"its weight is read by own (Attends)"}
    assert reasons["encoder.linear1"] == "its weight is read by encoder (TransformerEncoderLayer)"


def test_layers_that_share_a_weight_do_not_read_each_others():
    def forward(net, x):
        return net.other(net.conv(x))

    model = Net(forward)
    model.body.other.weight = model.body.conv.weight
    assert observe(model, X).readers == {}


def test_a_hook_of_the_layer_is_the_layers_own():
    model = Net(lambda net, x: net.other(net.conv(x)))
    model.body.conv.register_forward_hook(lambda module, args, output: output + module.weight.sum())
    assert observe(model, X).readers == {}


@pytest.mark.parametrize("key", ["weight", "bias"])
def test_on_a_graph_a_node_that_reads_keeps_the_layer(key):
    model = Net(lambda net, x: net.other(net.conv(x)) + getattr(net.conv, key).sum())
    traced = trace(model, X)
    for inputs in (None, X):
        reasons = {site.name: site.keep for site in host_for(traced, inputs).sites()}
        assert reasons == {"body.conv": f"its {key} is read by node body_conv_{key} (get_attr)", "body.other": None}
    net = surgery.decompose(traced, {"re:.*": 1.0})
    assert_parity(net(X), model(X))
    assert surgery.report(net)["body.other"].status == "decomposed"


def test_on_a_graph_a_node_that_reads_keeps_the_chain():
    model = ReadsAttributes().eval()
    traced = trace(surgery.decompose(model, {"conv": 0.5}), X)  # the weight is multiplied out of the factors, which nodes read
    (site,) = GraphHost(traced).sites()
    assert "is read by node conv_" in site.keep
    back = surgery.reconstruct(traced)
    assert_parity(back(X), traced(X))


def test_inside_a_decomposed_graph_of_another_model():
    class Around(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, x):
            return self.inner(x) + self.inner.get_submodule("body.conv").weight.sum()

    inner = surgery.decompose(trace(Net(lambda net, x: net.other(net.conv(x))), X), {"body.other": 0.5})
    keep = {site.name: site.keep for site in ModuleHost(Around(inner), X).sites()}
    assert keep == {"inner.body.conv": "its weight is read by the model (Around)", "inner.body.other": None}


def functions(model, inputs=X):
    return [(f.module, f.function, f.weight, f.weight_shape, len(f.calls), f.macs) for f in observe(model, inputs).functions]


def mixed(net, x):
    """Experts' weights mixed by what the input says, as in conditionally parametrized convolutions."""
    weight = (torch.softmax(x.mean((0, 2, 3))[:3], 0)[:, None] * net.mix).sum(0).view(6, 4, 3, 3)
    return functional.conv2d(x, weight, padding=1)


USES = {
    "a parameter": (lambda net, x: functional.conv2d(x, net.gain, padding=1), ("body", "conv2d", "body.gain", (4, 4, 3, 3), 1, 2 * 81 * 144)),
    "a view": (lambda net, x: functional.conv1d(x.flatten(2), net.gain[..., 0]), ("body", "conv1d", "body.gain", (4, 4, 3), 1, 2 * 79 * 48)),
    "grouped": (lambda net, x: torch.conv2d(x, net.gain[:, :1], groups=4), ("body", "conv2d", "body.gain", (4, 1, 3, 3), 1, 2 * 49 * 36)),
    "twice": (
        lambda net, x: functional.conv2d(functional.conv2d(x, net.gain), net.gain),
        ("body", "conv2d", "body.gain", (4, 4, 3, 3), 2, 2 * (49 + 25) * 144),
    ),
    "transposed": (
        lambda net, x: functional.conv_transpose2d(x, net.gain, stride=2),
        ("body", "conv_transpose2d", "body.gain", (4, 4, 3, 3), 1, 2 * 81 * 144),
    ),
    "convolution": (
        lambda net, x: torch.convolution(x, net.gain, None, [1, 1], [0, 0], [1, 1], False, [0, 0], 1),
        ("body", "convolution", "body.gain", (4, 4, 3, 3), 1, 2 * 49 * 144),
    ),
    "unbatched": (lambda net, x: functional.conv2d(input=x[0], weight=net.gain), ("body", "conv2d", "body.gain", (4, 4, 3, 3), 1, 49 * 144)),
    "computed": (mixed, ("body", "conv2d", "computed", (6, 4, 3, 3), 1, 2 * 81 * 216)),
    "linear": (lambda net, x: functional.linear(x, net.gain[0, 0].repeat(3, 3)), ("body", "linear", "computed", (9, 9), 1, 2 * 36 * 81)),
}


@torch.jit.script
def scripted(x, weight):
    return torch.nn.functional.conv2d(x, weight)


DENSE = (None, [1, 1], [0, 0], [1, 1], False, [0, 0], 1)
BELOW = {
    "operator": lambda net, x: torch.ops.aten.conv2d(x, net.gain),
    "overload": lambda net, x: torch.ops.aten.convolution.default(x, net.gain, *DENSE),
    "private": lambda net, x: torch._convolution(x, net.gain, *DENSE, False, False, False, False),
}
AS_CONVOLUTION = ("body", "convolution", "body.gain", (4, 4, 3, 3), 1, 2 * 49 * 144)
USES |= {name: (forward, AS_CONVOLUTION) for name, forward in BELOW.items()}


def test_inside_scripted_functions():
    assert functions(Net(lambda net, x: scripted(x, net.gain))) == [AS_CONVOLUTION]


@pytest.mark.parametrize(("forward", "expected"), USES.values(), ids=USES)
def test_layers_written_as_functions(forward, expected):
    model = Net(forward).eval()
    assert functions(model) == [expected]
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(X)
    assert counter.get_total_flops() // 2 == expected[-1]
    assert observe(model, X).readers == {}
    (on_graph,) = functions(trace(model, X))
    assert (on_graph[0], *on_graph[1:]) == ("", *expected[1:])


def test_ordinary_layers_are_no_functions():
    class Scaled(nn.Conv2d):
        def forward(self, x):
            return functional.conv2d(x, self.weight / self.weight.std(), self.bias)

    model = nn.Sequential(nn.Conv2d(4, 8, 3), Scaled(8, 4, 3), nn.utils.parametrizations.weight_norm(nn.Conv2d(4, 8, 3)))
    net = surgery.decompose(model, {"0": 0.5})
    assert functions(model) == functions(net) == []
    assert functions(trace(nn.Sequential(nn.Conv2d(4, 8, 3)), X)) == []


def test_a_layers_weight_used_as_a_function_is_a_read_and_no_function():
    model = Net(lambda net, x: functional.conv2d(x, net.conv.weight))
    assert functions(model) == []
    assert list(observe(model, X).readers) == ["body.conv"]


def test_shapes_of_functions_calls():
    (use,) = observe(Net(lambda net, x: functional.conv2d(x, net.gain)), X).functions
    assert use.calls == (Call((2, 4, 9, 9), (2, 4, 7, 7)),)


def test_watching_changes_nothing():
    model = Net(lambda net, x: functional.conv2d(x, net.conv.weight))
    observe(model, X)
    assert not any(m._forward_hooks or m._forward_pre_hooks or (isinstance(m, nn.Conv2d) and "forward" in vars(m)) for m in model.modules())
    assert not torch._C._is_torch_function_mode_enabled()
    assert isinstance(trace(model, X), fx.GraphModule)


def test_calls_of_batch_norms_are_no_layers_calls():
    seen = observe(nn.Sequential(nn.Conv2d(4, 8, 3), nn.BatchNorm2d(8)), X)
    assert seen.norms == {"1": (Call((2, 8, 7, 7), (2, 8, 7, 7)),)}
    assert list(seen.calls) == ["0"]
