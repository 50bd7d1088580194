"""The contract of every pass on both hosts: applies, keeps with reasons, is idempotent, atomic, and undone by its inverse."""

from __future__ import annotations

import copy
from functools import partial

import pytest
import torch
from torch import fx, nn
from torch.utils.flop_counter import FlopCounterMode

from passes import Decompose, GraphHost, ModuleHost, Reconstruct, capture, host_for, trace
from passes.chain import Chain
from passes.errors import SurgeryValueError
from passes.factorization import Keep
from passes.graph_view import same_graph, to_networkx
from passes.kinds import KINDS, kind_of, usual_kind
from passes.parity import assert_parity, difference
from passes.tucker import Tucker
from surgery.cost import chain_macs, site_macs
from tests.networks import Kinds, Small, Twice

X = torch.randn(2, 3, 12, 12, generator=torch.Generator().manual_seed(7))


def on_module(model, inputs):
    return copy.deepcopy(model)


def on_graph(model, inputs):
    return trace(model, inputs)


every_kind = pytest.mark.parametrize("kind", KINDS, ids=[k.name for k in KINDS])
IMAGE = torch.randn(2, 3, 6, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(8))


def macs_of(site):
    if site.chain is None:
        return site_macs(site)
    return chain_macs(kind_of(site.chain).shapes(site.geometry, site.chain, site.bias is not None), site.calls)


both_hosts = pytest.mark.parametrize("host_model", [on_module, on_graph], ids=["module", "graph"])


def full_rank(host, method="tucker"):
    """Every site that the kind accepts, at full rank (at rank 3 of one group where the kind has no spectra: there is no telling its full rank)."""
    assignment = {}
    for site in host.sites():
        kind = usual_kind(site.geometry, method)
        if site.keep is None and kind.refuses(site.geometry) is None:
            full = kind.full_ranks(site.geometry) if kind.has_spectra else [3 * kind.unit(site.geometry)]
            assignment[site.name] = kind.from_ranks(site.geometry, full)
    return assignment


def half_rank(host, method="tucker"):
    assignment = {}
    units = {site.name: usual_kind(site.geometry, method).unit(site.geometry) for site in host.sites()}
    for name, factorization in full_rank(host, method).items():
        unit = units[name]
        assignment[name] = type(factorization)(*(unit * max(1, r // unit // 2) for r in factorization.ranks))
    return assignment


def cut(model, assign=full_rank):
    return Decompose(assignment=assign(host_for(model)))(host_for(model))


@both_hosts
def test_decompose_applies_and_computes_the_same(host_model, small):
    model = host_model(small, X)
    result = cut(model)
    assert result.modified
    assert_parity(result.model(X), small(X))
    applied = [o.site for o in result.outcomes if o.status == "applied"]
    assert applied == ["conv1", "conv2", "mix", "tail.1", "head"]
    assert all(o.error is not None and o.error < 1e-6 for o in result.outcomes if o.status == "applied")
    names = [name for name in result.model.state_dict() if name.startswith("conv2")]
    assert names == [f"conv2.{n}" for n in ("reduce.weight", "core.weight", "expand.weight", "expand.bias")]


@both_hosts
@every_kind
def test_every_kind_on_every_layer_there_and_back(host_model, kind):
    """The contract: what is cut computes what the merged weights compute, has the shapes and MACs that were told, and goes back."""
    net = Kinds().double().eval()
    model = host_model(net, IMAGE)
    result = cut(model, partial(full_rank, method=kind.name))
    if host_model is on_graph:
        model.graph.lint()
    applied = {o.site for o in result.outcomes if o.status == "applied"}
    assert applied >= ({"mix"} if kind.name == "svd" else {"grouped", "up", "both", "mix", "space"})
    assert ("line" in applied) == (kind.name not in ("svd", "spatial"))
    assert all(o.reason for o in result.outcomes if o.status == "kept")
    if kind.has_spectra:
        assert_parity(model(IMAGE), net(IMAGE), tolerance=1e-9)
        assert max(o.error for o in result.outcomes if o.status == "applied") < 1e-9
    with FlopCounterMode(display=False) as counter:
        expected = model(IMAGE)
    assert sum(macs_of(site) for site in host_for(model, IMAGE).sites()) == counter.get_total_flops() // 2
    assert not cut(model, partial(full_rank, method=kind.name)).modified
    back = Reconstruct()(host_for(model)).model
    assert_parity(back(IMAGE), expected, tolerance=1e-9)
    assert [(k, v.shape) for k, v in back.state_dict().items()] == [(k, v.shape) for k, v in net.state_dict().items()]
    assert {name: type(m) for name, m in back.named_modules() if name in applied} == {name: type(net.get_submodule(name)) for name in applied}
    if host_model is on_graph:
        back.graph.lint()
        assert same_graph(back, trace(net, IMAGE))


@every_kind
def test_both_hosts_cut_alike_with_every_kind(kind):
    net = Kinds().eval()
    traced = trace(net, IMAGE.float())
    half = partial(half_rank, method=kind.name)
    assert cut(net, half).outcomes == cut(traced, half).outcomes
    left, right = traced.state_dict(), net.state_dict()
    assert set(left) == set(right)
    assert all(torch.equal(left[name], right[name]) for name in left)
    known = {n.name: n.meta["tensor_meta"].shape for n in traced.graph.nodes if "tensor_meta" in n.meta}
    host_for(traced, IMAGE.float())  # measures all shapes anew
    assert {n.name: n.meta["tensor_meta"].shape for n in traced.graph.nodes if "tensor_meta" in n.meta} == known


@both_hosts
def test_a_second_run_changes_nothing(host_model, small):
    model = host_model(small, X)
    cut(model, half_rank)
    before = copy.deepcopy(model.state_dict())
    again = Decompose(assignment=half_rank(host_for(host_model(small, X))))(host_for(model))
    assert not again.modified
    assert {o.reason for o in again.outcomes if o.site != "wide"} == {"already decomposed"}
    assert list(before) == list(model.state_dict())
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    assert Reconstruct()(host_for(model)).modified
    assert not Reconstruct()(host_for(model)).modified


@both_hosts
def test_reconstruct_is_the_way_back(host_model, small):
    model = host_model(small, X)
    original = copy.deepcopy(model)
    cut(model, half_rank)
    expected = model(X)
    result = Reconstruct()(host_for(model))
    assert_parity(result.model(X), expected)
    assert difference(expected, small(X)) > 1e-3  # something had been cut
    state, before = result.model.state_dict(), original.state_dict()
    assert [(k, v.shape, v.dtype) for k, v in state.items()] == [(k, v.shape, v.dtype) for k, v in before.items()]
    copy.deepcopy(small).load_state_dict(state, strict=True)


@both_hosts
def test_both_hosts_cut_alike(host_model, small):
    model = host_model(small, X)
    reference = copy.deepcopy(small)
    outcomes = cut(model, half_rank).outcomes
    assert outcomes == cut(reference, half_rank).outcomes
    left, right = model.state_dict(), reference.state_dict()
    assert set(left) == set(right)
    assert all(torch.equal(left[name], right[name]) for name in left)


@both_hosts
def test_reasons(host_model, small):
    model = host_model(small, X)
    assignment = full_rank(host_for(model)) | {"conv1": Keep("mine")}
    del assignment["mix"]
    conv2 = usual_kind(host_for(model).sites()[1].geometry, "tucker").factorization
    assignment["wide"] = conv2(2, 2)
    assignment["head"] = conv2(2, 2)
    assignment["tail.1"] = conv2(33, 2)
    reasons = {o.site: o.reason for o in Decompose(assignment=assignment)(host_for(model)).outcomes}
    assert reasons["conv1"] == "mine"
    assert reasons["mix"] == "not assigned"
    assert reasons["wide"] == "depthwise convolution (groups=32): each output sees one input channel, so there is nothing to share"
    assert "SVD" in reasons["head"]
    assert reasons["tail.1"] == "rank 33 of mode 'out' is above its full rank 32"


@both_hosts
def test_unknown_names_are_errors(host_model, small):
    model = host_model(small, X)
    factorization = next(iter(full_rank(host_for(model)).values()))
    with pytest.raises(SurgeryValueError, match=r"'tail\.2'.*did you mean 'tail\.1'"):
        Decompose(assignment={"tail.2": factorization})(host_for(model))


@both_hosts
@pytest.mark.parametrize("failing", range(5))
@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_an_error_at_any_site_leaves_the_model_as_it_was(host_model, small, failing, error):
    model = host_model(small, X)
    before = {name: (id(p), p.clone()) for name, p in model.named_parameters()}
    modules = [(name, id(m)) for name, m in model.named_modules()]
    seen = []

    def explode(site):
        seen.append(site.name)
        if len(seen) > failing:
            raise error("in the middle")

    with pytest.raises(error):
        Decompose(assignment=full_rank(host_for(model)), progress=explode)(host_for(model))
    assert [(name, id(m)) for name, m in model.named_modules()] == modules
    assert all(id(p) == before[n][0] and torch.equal(p, before[n][1]) for n, p in model.named_parameters())
    assert_parity(model(X), small(X))


class Explosive(dict):
    """A table of submodules that refuses to take one of them."""

    def __init__(self, slots, key):
        super().__init__(slots)
        self.key, self.armed = key, True

    def __setitem__(self, key, value):
        if key == self.key and self.armed:
            self.armed = False
            raise KeyboardInterrupt
        super().__setitem__(key, value)


@both_hosts
@pytest.mark.parametrize("name", ["conv1", "conv2", "mix", "head"])
@pytest.mark.parametrize("direction", ["decompose", "reconstruct"])
def test_an_error_while_committing_is_undone(host_model, small, name, direction):
    model = host_model(small, X)
    if direction == "reconstruct":
        cut(model, half_rank)
    expected, keys = model(X), list(model.state_dict())
    ids = [id(m) for m in model.modules()]
    apply = Decompose(assignment=full_rank(host_for(model))) if direction == "decompose" else Reconstruct()
    host = host_for(model)
    model.__dict__["_modules"] = Explosive(model._modules, name)
    with pytest.raises(KeyboardInterrupt):
        apply(host)
    assert [id(m) for m in model.modules()] == ids
    assert list(model.state_dict()) == keys
    assert difference(model(X), expected) == 0.0


def test_a_graph_gets_three_nodes_with_shapes(small):
    traced = trace(small, X)
    before = len(traced.graph.nodes)
    cut(traced, half_rank)
    traced.graph.lint()
    targets = {n.target: n for n in traced.graph.nodes if n.op == "call_module"}
    assert {"conv2.reduce", "conv2.core", "conv2.expand"} <= set(targets)
    assert len(traced.graph.nodes) == before + 3 * 2 + 2 * 1  # three Tucker chains, two SVD chains
    assert tuple(targets["conv2.reduce"].meta["tensor_meta"].shape) == (2, 8, 12, 12)
    assert tuple(targets["conv2.core"].meta["tensor_meta"].shape) == (2, 12, 6, 6)
    assert tuple(targets["conv2.expand"].meta["tensor_meta"].shape) == (2, 24, 6, 6)
    propagated = copy.deepcopy(traced)
    host_for(propagated, X)  # measures all shapes anew
    for known, measured in zip(traced.graph.nodes, propagated.graph.nodes, strict=True):
        assert known.meta["tensor_meta"].shape == measured.meta["tensor_meta"].shape


def test_reconstruct_gives_back_an_isomorphic_graph(small):
    traced = trace(small, X)
    original = copy.deepcopy(traced)
    cut(traced, half_rank)
    assert not same_graph(traced, original)
    moved = copy.deepcopy(traced)  # what is known of the chains must survive this
    for model in (traced, moved):
        assert Reconstruct()(GraphHost(model)).modified
        model.graph.lint()
        assert same_graph(model, original)
    assert list(original.state_dict()) == list(moved.state_dict())


def test_isomorphism_looks_at_kind_shape_and_order():
    class Minus(nn.Module):
        def __init__(self, swapped, relu, size):
            super().__init__()
            self.swapped, self.act = swapped, nn.ReLU() if relu else nn.Tanh()
            self.size = size

        def forward(self, x):
            y = self.act(x[:, : self.size])
            z = y + 1
            return z - y if self.swapped else y - z

    graphs = [trace(Minus(*options), torch.randn(2, 6)) for options in ((0, 1, 4), (0, 1, 4), (1, 1, 4), (0, 0, 4), (0, 1, 3))]
    assert same_graph(graphs[0], graphs[1])
    assert not any(same_graph(graphs[0], other) for other in graphs[2:])
    assert to_networkx(graphs[0]).number_of_nodes() == len(graphs[0].graph.nodes)


@both_hosts
def test_a_module_called_twice_under_two_names(host_model):
    net = Twice().eval()
    inputs = torch.randn(1, 8, 8, 8)
    model = host_model(net, inputs)
    host = host_for(model, inputs)
    sites = {site.name: site for site in host.sites()}
    assert list(sites) == ["conv", "other"]
    assert sites["conv"].aliases[0] == "conv"
    assert [c.input_shape for c in sites["conv"].calls] == [(1, 8, 8, 8), (1, 8, 4, 4)]
    result = cut(model, half_rank)
    expected = model(inputs)
    if host_model is on_module:
        assert model.conv is model.again
    back = Reconstruct()(host_for(result.model)).model
    assert_parity(back(inputs), expected)
    if host_model is on_module:
        assert back.conv is back.again
        assert list(back.state_dict()) == list(net.state_dict())


def test_a_chain_whose_middle_is_read_is_kept(small):
    traced = trace(small, X)
    cut(traced, half_rank)
    core = next(n for n in traced.graph.nodes if n.target == "conv2.core")
    output = next(n for n in traced.graph.nodes if n.op == "output")
    output.args = ((output.args[0], core),)
    traced.recompile()
    result = Reconstruct()(GraphHost(traced))
    reasons = {o.site: o.reason for o in result.outcomes}
    assert "no longer called one right after the other" in reasons["conv2"]
    assert reasons["conv1"] is None
    assert len(traced(X)) == 2


def test_a_graph_with_an_opaque_module_keeps_what_is_inside():
    class Leafy(fx.Tracer):
        def is_leaf_module(self, module, name):
            return isinstance(module, nn.Sequential) or super().is_leaf_module(module, name)

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = nn.Sequential(nn.Conv2d(3, 4, 3))

        def forward(self, x):
            return self.body(x)

    net = Net()
    graph = Leafy().trace(net)
    host = host_for(fx.GraphModule(net, graph))
    (site,) = host.sites()
    assert "inside a module that the graph calls as a whole" in site.keep


@both_hosts
def test_recutting_a_chain_goes_on_from_its_weight(host_model, small):
    model = host_model(small, X)
    cut(model, half_rank)
    merged = {s.name: s.weight.clone() for s in host_for(model).sites()}
    tucker = usual_kind(host_for(model).sites()[1].geometry, "tucker").factorization
    result = Decompose(assignment={"conv2": tucker(3, 2)})(host_for(model))
    assert [o.site for o in result.outcomes if o.status == "applied"] == ["conv2"]
    site = next(s for s in host_for(model).sites() if s.name == "conv2")
    assert site.chain == tucker(3, 2)
    fresh = nn.Conv2d(16, 24, 3)
    with torch.no_grad():
        fresh.weight.copy_(merged["conv2"])
    direct = Decompose(assignment={"": tucker(3, 2)})(ModuleHost(fresh)).outcomes[0].error
    recut = next(o.error for o in result.outcomes if o.site == "conv2")
    assert recut == pytest.approx(direct, rel=1e-4)
    assert type(Reconstruct()(host_for(model)).model.get_submodule("conv2")) is nn.Conv2d


def test_capture_has_shapes_and_leaves_for_every_layer(small):
    graph = capture(small, X)
    shapes = {n.target: tuple(n.meta["tensor_meta"].shape) for n in graph.nodes if n.op == "call_module"}
    assert shapes["conv2"] == (2, 24, 6, 6)
    assert shapes["tail.1"] == (2, 32, 6, 6)


def test_macs_of_a_chain_node_for_node_equal_a_counter(small):
    traced = trace(small, X)
    cut(traced, half_rank)
    with FlopCounterMode(display=False) as counter:
        traced(X)
    sites = host_for(traced, X).sites()
    assert sum(map(macs_of, sites)) == counter.get_total_flops() // 2


def test_train_mode_is_kept_on_both_hosts():
    for build in (on_module, on_graph):
        model = build(Small().train(), X)
        cut(model)
        assert all(m.training for m in model.modules())
        model.eval()
        assert not any(m.training for m in model.modules())


def test_hooks_are_never_lost_on_a_graph(small):
    small.conv1.register_forward_hook(lambda module, args, output: output * 2)
    traced = trace(small, X)
    result = cut(traced)
    assert "has hooks" in host_for(traced).sites()[0].keep
    assert_parity(result.model(X), small(X))
    module = copy.deepcopy(small)
    cut(module)
    back = Reconstruct()(host_for(trace(module, X))).model
    assert_parity(back(X), small(X))


def test_a_node_that_asks_for_an_output_size_keeps_its_layer():
    class Up(nn.Module):
        def __init__(self):
            super().__init__()
            self.up = nn.ConvTranspose2d(4, 6, 3, stride=2, padding=1)

        def forward(self, x):
            return self.up(x, output_size=[8, 8])

    model, x = Up(), torch.randn(1, 4, 4, 4)
    traced = trace(model, x)
    assert host_for(traced).sites()[0].keep == "a node calls it with more than its input"
    net = Decompose(assignment=full_rank(host_for(model)))(host_for(copy.deepcopy(model))).model
    assert_parity(net(x), model(x))
    chain = trace(net, x)
    assert "more than its input" in host_for(chain).sites()[0].keep
    assert not Reconstruct()(host_for(chain)).modified
    assert_parity(chain(x), model(x))


def test_a_failed_or_undone_commit_of_a_model_that_is_itself_a_layer_leaves_the_layer():
    conv = nn.Conv2d(4, 8, 3)
    host = ModuleHost(conv)
    Decompose(assignment={"": Tucker(4, 2)})(host)
    assert isinstance(host.model, Chain)
    host.rollback()
    assert host.model is conv
