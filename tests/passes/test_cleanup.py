"""The contract of the clean-up passes on both hosts: apply, keep with reasons, idempotent, atomic, exact, also for shared modules."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import fx, nn
from torch.nn import functional

from passes import (
    Decompose,
    DropIdentities,
    FoldBatchNorm,
    FuseLinearRuns,
    GraphHost,
    MergePointwise,
    ModuleHost,
    Reconstruct,
    host_for,
    module_host,
    run_pipeline,
    runs,
    trace,
)
from passes.chain import Chain
from passes.errors import SurgeryError
from passes.parity import assert_parity, difference
from passes.svd import SVD
from passes.tucker import Tucker
from tests.passes.test_passes import Explosive

X = torch.randn(2, 3, 12, 12, generator=torch.Generator().manual_seed(17))


class Handmade(nn.Module):
    """A stem with batch norm, a chain written by hand, k x 1 with 1 x k, things that do nothing, a shortcut, a head with batch norm."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(8)
        self.squeeze = nn.Conv2d(8, 4, 1, bias=False)
        self.core = nn.Conv2d(4, 6, 3, stride=2, padding=1, bias=False)
        self.stretch = nn.Conv2d(6, 12, 1)
        self.tail = nn.Sequential(
            nn.Conv2d(12, 12, (3, 1), padding=(1, 0), bias=False),
            nn.Identity(),
            nn.Conv2d(12, 12, (1, 3), padding=(0, 1)),
            nn.Dropout(0.5),
            nn.BatchNorm2d(12),
            nn.AvgPool2d(1),
        )
        self.head = nn.Linear(12, 12)
        self.scale = nn.BatchNorm1d(12)

    def forward(self, x):
        x = functional.relu(self.norm(self.stem(x)))
        x = functional.relu(self.stretch(self.core(self.squeeze(x))))
        x = x + self.tail(x)
        return self.scale(self.head(x.mean((2, 3))))


def randomized(model, seed=3):
    """The model in eval mode with statistics and affine parameters unlike those at birth."""
    generator = torch.Generator().manual_seed(seed)
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is not None:
            module.running_mean.copy_(torch.randn(module.num_features, generator=generator))
            module.running_var.copy_(torch.rand(module.num_features, generator=generator) + 0.5)
            for parameter in module.parameters(recurse=False):
                torch.nn.init.normal_(parameter, generator=generator)
    return model.eval()


def chained():
    """Convolutions whose chains stand next to each other, between a plain 1x1 and a batch norm."""
    net = randomized(
        nn.Sequential(nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 3, bias=False), nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8))
    )
    return Decompose(assignment={"1": Tucker(3, 2), "2": Tucker(2, 3), "3": SVD(2)})(ModuleHost(net)).model


def on_module(model, inputs=X):
    model = copy.deepcopy(model)
    return model, host_for(model, inputs)


def on_graph(model, inputs=X):
    model = trace(model, inputs)
    return model, host_for(model)


both_hosts = pytest.mark.parametrize("host_of", [on_module, on_graph], ids=["module", "graph"])
PASSES = {
    "runs": (FuseLinearRuns(), Handmade, {"norm", "squeeze", "stretch", "scale"}),
    "norms": (FoldBatchNorm(), Handmade, {"norm", "scale"}),
    "norm after a chain": (FoldBatchNorm(), chained, {"4"}),
    "pointwise": (MergePointwise(), chained, {"1.reduce", "2.reduce", "3.reduce", "3.expand"}),
    "identities": (DropIdentities(), Handmade, {"tail.1", "tail.3", "tail.5"}),
}
every_pass = pytest.mark.parametrize(("apply", "build", "gone"), PASSES.values(), ids=PASSES)
every_fusing_pass = pytest.mark.parametrize(("apply", "build", "gone"), list(PASSES.values())[:4], ids=list(PASSES)[:4])


def made(build):
    return randomized(build())


def by_site(result):
    return {o.site: o for o in result.outcomes}


def targets(graph):
    return [n.target for n in graph.graph.nodes if n.op == "call_module"]


@both_hosts
@every_pass
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_applies_and_computes_the_same(host_of, apply, build, gone, dtype):
    net, inputs = made(build).to(dtype), X.to(dtype)
    expected = net(inputs)
    model, host = host_of(net, inputs)
    result = apply(host)
    assert result.model is model
    assert_parity(model(inputs), expected)
    outcomes = by_site(result)
    if host_of is on_module and isinstance(apply, DropIdentities):
        assert not result.modified
        assert all("its parent calls it" in outcomes[name].reason for name in gone)
        return
    assert result.modified
    fused = {o.site for o in result.outcomes if o.status == "applied"}
    assert gone <= fused
    present = dict(model.named_modules())
    for name in gone:
        if host_of is on_graph:
            assert name not in targets(model)
            assert name not in present
        else:
            assert type(present.get(name, nn.Identity())) is nn.Identity  # a chain's layers go with it
    if host_of is on_graph:
        model.graph.lint()
    assert type(present.get("tail.2", nn.Conv2d(1, 1, 1))) is nn.Conv2d


@both_hosts
@every_pass
def test_a_second_run_changes_nothing(host_of, apply, build, gone):
    model, host = host_of(made(build))
    apply(host)
    before = {name: (id(m), [id(p) for p in m.parameters()]) for name, m in model.named_modules()}
    for again in (host, host_for(model, X)):
        result = apply(again)
        assert not result.modified
        assert all(o.status == "kept" and o.reason for o in result.outcomes)
    assert {name: (id(m), [id(p) for p in m.parameters()]) for name, m in model.named_modules()} == before


@both_hosts
@every_fusing_pass
def test_costs_before_and_after(host_of, apply, build, gone):
    from torch.utils.flop_counter import FlopCounterMode

    def cost(model):
        with FlopCounterMode(display=False) as counter:
            model(X)
        return counter.get_total_flops() // 2, sum(p.numel() for p in model.parameters())

    model, host = host_of(made(build))
    before = cost(model)
    told = [o for o in apply(host).outcomes if o.params_after is not None]
    after = cost(model)
    assert told
    assert before[0] - after[0] == sum(o.macs_before - o.macs_after for o in told)
    assert before[1] - after[1] == sum(o.params_before - o.params_after for o in told)


@both_hosts
@every_fusing_pass
@pytest.mark.parametrize("place", range(3))
@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_an_error_while_committing_is_undone(host_of, apply, build, gone, place, error):
    net = made(build)
    changed = [o.site.partition(".")[0] for o in apply(host_of(net)[1]).outcomes if o.status == "applied"]
    key = changed[place % len(changed)]
    model, host = host_of(net)
    expected, keys = model(X), list(model.state_dict())
    modules = [(name, id(m)) for name, m in model.named_modules()]

    class Failing(Explosive):
        def __setitem__(self, key, value):
            if key == self.key and self.armed:
                self.armed = False
                raise error
            dict.__setitem__(self, key, value)

        def __delitem__(self, key):
            self.__setitem__(key, None)
            dict.__delitem__(self, key)

    model.__dict__["_modules"] = Failing(model._modules, key)
    try:
        apply(host)
    except error:
        assert [(name, id(m)) for name, m in model.named_modules()] == modules
        assert list(model.state_dict()) == keys
        assert difference(model(X), expected) == 0.0
    else:  # that key was not touched: what changes lies deeper
        assert model._modules.armed
        host.rollback()
        assert [(name, id(m)) for name, m in model.named_modules()] == modules
        assert difference(model(X), expected) == 0.0


@both_hosts
@every_fusing_pass
def test_a_commit_can_be_taken_back(host_of, apply, build, gone):
    model, host = host_of(made(build))
    expected, keys = model(X), list(model.state_dict())
    sites = [(s.name, s.chain, s.calls) for s in host.sites()]
    assert apply(host).modified
    host.rollback()
    assert list(model.state_dict()) == keys
    assert difference(model(X), expected) == 0.0
    assert [(s.name, s.chain, s.calls) for s in host.sites()] == sites


@both_hosts
def test_runs_written_by_hand_become_one_layer(host_of):
    net = made(Handmade)
    model, host = host_of(net)
    outcomes = by_site(FuseLinearRuns()(host))
    core = model.get_submodule("core")
    assert str(core) == "Conv2d(8, 12, kernel_size=(3, 3), stride=(2, 2), padding=(1, 1))"
    assert outcomes["core"].reason == "stands for squeeze, core, stretch"
    effect = "its nodes are gone" if host_of is on_graph else "now an Identity: its parent calls it"
    assert outcomes["squeeze"].reason == f"fused into core: {effect}"
    assert (outcomes["core"].params_before, outcomes["core"].params_after) == (32 + 216 + 84, 864 + 12)
    assert outcomes["core"].macs_before == 2 * (144 * 32 + 36 * 216 + 36 * 72)
    assert outcomes["core"].macs_after == 2 * 36 * 864
    assert outcomes["tail.0"].reason == "tail.1 (Identity) stands after it"
    assert model.get_submodule("stem").bias is not None
    assert {s.name: s.calls[0].input_shape for s in host.sites()}["core"] == (2, 8, 12, 12)


def test_nothing_stands_between_once_identities_are_dropped():
    net = made(Handmade)
    model, host = on_graph(net)
    results = run_pipeline([DropIdentities(), FuseLinearRuns(), DropIdentities()], host)
    assert [r.modified for r in results] == [True, True, False]
    assert targets(model) == ["stem", "core", "tail.0", "head"]
    assert model.get_submodule("tail.0").kernel_size == (3, 3)
    assert_parity(model(X), net(X))
    model.graph.lint()
    propagated = copy.deepcopy(model)
    host_for(propagated, X)
    for known, measured in zip(model.graph.nodes, propagated.graph.nodes, strict=True):
        assert known.meta["tensor_meta"].shape == measured.meta["tensor_meta"].shape


@both_hosts
def test_our_own_chains_are_not_hand_written(host_of):
    net = chained()
    result = FuseLinearRuns()(host_of(net)[1])
    assert {o.site for o in result.outcomes} == {"0", "4"}
    assert not result.modified
    assert by_site(result)["0"].reason == "1.reduce (Conv2d) stands after it"


@both_hosts
def test_a_chain_with_a_folded_batch_norm_is_still_a_chain(host_of):
    net = Decompose(assignment={"0": Tucker(3, 2)})(ModuleHost(randomized(nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8))))).model
    model, host = host_of(net)
    assert by_site(FoldBatchNorm()(host))["0.expand"].reason == "stands for 0.expand, 1"
    (site,) = host.sites()
    assert (site.name, site.chain, site.keep) == ("0", Tucker(3, 2), None)
    back = Reconstruct()(host_for(model)).model
    assert back.get_submodule("0").bias is not None
    assert_parity(back(X), net(X))


@both_hosts
def test_merging_opens_chains(host_of):
    net = chained()
    expected = net(X)
    model, host = host_of(net)
    outcomes = by_site(MergePointwise()(host))
    assert outcomes["0"].reason == "stands for 0, 1.reduce"
    assert (outcomes["0"].macs_before, outcomes["0"].macs_after) == (2 * 144 * (24 + 16), 2 * 144 * 6)
    for chain in ("1", "2", "3"):
        assert outcomes[chain].status == "applied"
        assert "cannot be reconstructed" in outcomes[chain].reason
    assert not Reconstruct()(host_for(model)).modified
    assert {s.name for s in host_for(model).sites()} == {"0", "1.core", "1.expand", "2.core", "2.expand"}
    if host_of is on_module:
        assert type(model[1]) is type(model[2]) is nn.Sequential
        assert list(dict(model[1].named_children())) == ["core", "expand"]
    assert_parity(model(X), expected)


@both_hosts
def test_a_merge_must_lower_the_cost(host_of):
    net = nn.Sequential(nn.Conv2d(3, 2, 1), nn.Conv2d(2, 16, 1))
    result = MergePointwise()(host_of(net)[1])
    assert not result.modified
    assert "no fewer MACs" in by_site(result)["0"].reason
    assert "no fewer parameters" in by_site(MergePointwise()(ModuleHost(net)))["0"].reason
    net = Decompose(assignment={"0": SVD(1)})(ModuleHost(nn.Sequential(nn.Conv2d(3, 8, 1)))).model
    assert "Reconstruct fuses" in by_site(MergePointwise()(host_of(net)[1]))["0.reduce"].reason


class Reused(nn.Module):
    """One pair of layers called twice, and one convolution followed by a batch norm of its own at each call."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3)
        self.again = self.norm
        self.shared = nn.Conv2d(3, 3, 3, padding=1)
        self.left, self.right = nn.BatchNorm2d(3), nn.BatchNorm2d(3)

    def forward(self, x):
        x = functional.relu(self.norm(self.conv(x)))
        x = functional.relu(self.again(self.conv(functional.avg_pool2d(x, 2))))
        return self.left(self.shared(x)) + self.right(self.shared(x))


@both_hosts
def test_shared_modules_fuse_where_every_call_agrees(host_of):
    net = made(Reused)
    model, host = host_of(net)
    outcomes = by_site(FoldBatchNorm()(host))
    assert outcomes["conv"].reason == "stands for conv, norm"
    assert "its calls are followed by different modules (left, right)" in outcomes["left"].reason
    assert_parity(model(X), net(X))
    if host_of is on_module:
        assert type(model.norm) is nn.Identity
        assert model.norm is model.again
    else:
        assert targets(model).count("conv") == 2
        assert not {"norm", "again"} & set(targets(model))


class Taps(nn.Module):
    """Someone reads in between, in each of the ways that a graph shows."""

    def __init__(self, how):
        super().__init__()
        self.how, self.conv, self.norm = how, nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)
        self.other = nn.BatchNorm2d(3)

    def forward(self, x):
        y = self.conv(x)
        if self.how == "read":
            return self.norm(y) + y
        if self.how == "returned":
            return self.norm(y), y
        if self.how == "in place":
            functional.relu(y, inplace=True)
        if self.how == "elsewhere":
            return self.norm(y) + self.norm(x)
        if self.how == "weight":
            return self.norm(y) + self.conv.weight.sum()
        return self.norm(y)


HOW = {
    "read": "norm and add",
    "returned": "norm and the caller of the model",
    "in place": "relu and norm",
    "elsewhere": "norm is also called after something else",
    "weight": "its parameters are also read outside its own forward",
}


@both_hosts
@pytest.mark.parametrize(("how", "reason"), HOW.items(), ids=HOW)
def test_kept_where_something_else_reads_in_between(host_of, how, reason):
    net = randomized(Taps(how))
    model, host = host_of(net)
    result = FoldBatchNorm()(host)
    assert not result.modified
    told = by_site(result)["norm"].reason
    assert reason in told or (how == "elsewhere" and "conv and the input x" in told)
    assert difference(model(X), net(X)) == 0.0


@both_hosts
def test_kept_with_the_reason(host_of):
    def reasons(net):
        result = FoldBatchNorm()(host_of(net)[1])
        assert not result.modified
        return [o.reason for o in result.outcomes]

    norm = nn.BatchNorm2d(4)
    assert "train mode" in reasons(nn.Sequential(nn.Conv2d(3, 4, 3), norm).train())[0]
    assert "no running statistics" in reasons(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, track_running_stats=False)).eval())[0]
    assert reasons(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), norm).eval()) == ["1 (ReLU) stands before it"]
    hooked = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).eval()
    hooked[0].register_forward_hook(lambda module, args, output: None)
    assert "has hooks" in reasons(hooked)[0]
    weighted = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Conv2d(3, 4, 3)), nn.BatchNorm2d(4)).eval()
    assert "parametrization" in reasons(weighted)[0]
    tied = nn.Sequential(nn.Conv2d(3, 3, 3), nn.ReLU(), nn.Conv2d(3, 3, 3), nn.BatchNorm2d(3)).eval()
    tied[0].weight = tied[2].weight
    assert "its weight is shared with 0" in reasons(tied)[0]
    small = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).eval().half()
    small[0].weight.data.fill_(6e4)
    small[1].weight.data.fill_(6e4)
    host = host_for(small)
    assert "overflow torch.float16" in FoldBatchNorm()(host).outcomes[0].reason


@both_hosts
def test_batch_norm_of_one_dimension_needs_to_know_its_input(host_of):
    net = randomized(nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5)))
    flat, deep = torch.randn(3, 6), torch.randn(3, 5, 6)
    model, host = host_of(net, flat)
    assert FoldBatchNorm()(host).modified
    assert_parity(model(flat), net(flat))
    model, host = host_of(net, deep)
    assert "the first works on features alone, the second on 1 spatial dimension" in FoldBatchNorm()(host).outcomes[0].reason
    assert "not known without example_inputs" in FoldBatchNorm()(ModuleHost(copy.deepcopy(net))).outcomes[0].reason


def test_structure_proves_only_plain_sequentials_down_to_the_root():
    inner = nn.Sequential(nn.Sequential(nn.Conv2d(3, 4, 3)), nn.Sequential(nn.BatchNorm2d(4), nn.ReLU()))
    net = randomized(inner)
    model = copy.deepcopy(net)
    assert FoldBatchNorm()(ModuleHost(model)).modified
    assert_parity(model(X), net(X))

    class Slicing(nn.Module):
        def __init__(self):
            super().__init__()
            self.features = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU())

        def forward(self, x):
            return self.features[0](x).mean() + self.features(x)

    net = randomized(Slicing())
    for inputs in (None, X):
        result = FoldBatchNorm()(ModuleHost(net, inputs))
        assert not result.modified
        assert ("not provable without example_inputs" if inputs is None else "it reads features.0: its output is read by mean") in result.outcomes[
            0
        ].reason

    class Opaque(nn.Sequential):
        pass

    shared = nn.Conv2d(3, 3, 1)
    net = randomized(nn.Sequential(shared, nn.BatchNorm2d(3), Opaque(shared)))
    assert "inside 2, which is called as a whole" in FoldBatchNorm()(ModuleHost(net)).outcomes[0].reason
    assert not FoldBatchNorm()(ModuleHost(nn.Sequential(shared, shared, nn.BatchNorm2d(3)).eval())).modified


def test_what_cannot_be_traced_is_kept():
    from tests.networks import Branching

    net = randomized(nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), Branching()))
    assert FoldBatchNorm()(ModuleHost(net, X)).modified  # by structure

    class Net(Branching):
        def __init__(self):
            super().__init__()
            self.norm = nn.BatchNorm2d(8)

        def forward(self, x):
            return self.norm(super().forward(x))

    (outcome,) = FoldBatchNorm()(ModuleHost(randomized(Net()), X)).outcomes
    assert outcome.reason.startswith("not provable: Net cannot be traced symbolically")


def test_hooks_on_a_container_see_what_passes():
    net = nn.Sequential(nn.Sequential(nn.Conv2d(3, 4, 3)), nn.BatchNorm2d(4), nn.ReLU()).eval()
    seen = []
    net[0].register_forward_hook(lambda module, args, output: seen.append(output))
    for inputs in (None, X):
        result = FoldBatchNorm()(ModuleHost(net, inputs))
        assert result.outcomes[0].reason.endswith("0 has hooks, which see what goes from it to 1")
    outer = nn.Sequential(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))).eval()
    outer[0].register_forward_hook(lambda module, args, output: seen.append(output))
    assert FoldBatchNorm()(ModuleHost(outer)).modified  # it sees the same as before


class ReadsLayers(nn.Module):
    """Reads of its layers what a trace takes for constants."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 4, 1, bias=False), nn.Conv2d(4, 5, 3)

    def forward(self, x):
        return self.second(self.first(x)) * self.first.out_channels


def test_a_module_that_reads_its_layers_is_left_as_it_was():
    net = ReadsLayers().eval()
    expected, modules = net(X), [id(m) for m in net.modules()]
    with pytest.raises(SurgeryError, match=r"ReadsLayers no longer computes the same with second fused.*out_channels"):
        FuseLinearRuns()(ModuleHost(net, X))
    assert [id(m) for m in net.modules()] == modules
    assert difference(net(X), expected) == 0.0
    graph, host = on_graph(net)
    assert FuseLinearRuns()(host).modified
    assert_parity(graph(X), expected)


def test_a_decomposed_graph_inside_a_module_is_kept():
    inner = trace(nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)).eval(), X)
    Decompose(assignment={"0": Tucker(3, 2)})(GraphHost(inner))
    net = nn.Sequential(inner, nn.Conv2d(8, 4, 1)).eval()
    result = FoldBatchNorm()(ModuleHost(net, X))
    assert not result.modified
    assert "decomposed graph 0" in result.outcomes[0].reason


@both_hosts
def test_dtype_format_and_gradients_stay(host_of):
    net = made(Handmade).to(torch.bfloat16).to(memory_format=torch.channels_last)
    for parameter in net.stem.parameters():
        parameter.requires_grad_(False)
    model, host = host_of(net, X.bfloat16())
    FuseLinearRuns()(host)
    core, stem = model.get_submodule("core"), model.get_submodule("stem")
    assert core.weight.dtype == stem.bias.dtype == torch.bfloat16
    assert core.weight.is_contiguous(memory_format=torch.channels_last)
    assert core.weight.requires_grad
    assert not stem.weight.requires_grad
    assert_parity(model(X.bfloat16()), net(X.bfloat16()), training=True)


def test_a_subclass_stays_what_it_was():
    class Marked(nn.Conv2d):
        pass

    net = randomized(nn.Sequential(Marked(3, 4, 3), nn.BatchNorm2d(4)))
    net[0].tag = "mine"
    FoldBatchNorm()(ModuleHost(net))
    assert (type(net[0]), net[0].tag) == (Marked, "mine")


def test_the_graph_of_a_module_found_under_two_names():
    net = made(Reused)
    graph = fx.GraphModule(net, fx.Tracer().trace(net))
    node = next(n for n in graph.graph.nodes if n.target == "norm")
    graph.add_submodule("other", graph.norm)
    node.target = "other"
    graph.recompile()
    assert FoldBatchNorm()(GraphHost(graph)).modified
    assert_parity(graph(X), net(X))
    assert not {"norm", "other"} & set(dict(graph.named_modules(remove_duplicate=False)))


def test_dropping_keeps_a_copy_that_matters():
    class InPlace(nn.Module):
        def __init__(self):
            super().__init__()
            self.pool, self.drop, self.same = nn.MaxPool2d(1), nn.Dropout(0.3), nn.Identity()

        def forward(self, x):
            return self.pool(self.same(x)).relu_() + self.drop(x)

    net = InPlace().eval()
    model, host = on_graph(net)
    outcomes = by_site(DropIdentities()(host))
    assert "makes a copy" in outcomes["pool"].reason
    assert {outcomes[name].status for name in ("drop", "same")} == {"applied"}
    inputs = X.clone()
    assert difference(model(inputs), net(X.clone())) == 0.0
    assert torch.equal(inputs, X)
    model, host = on_graph(InPlace().train())
    assert by_site(DropIdentities()(host))["drop"].reason == "it is in train mode"


def test_a_pipeline_says_what_ran_when_one_fails():
    class Failing:
        def __call__(self, host):
            raise RuntimeError("on purpose")

    net = made(Handmade)
    model, host = on_graph(net)
    with pytest.raises(RuntimeError, match="on purpose") as caught:
        run_pipeline([FoldBatchNorm(), MergePointwise(), Failing()], host)
    (note,) = caught.value.__notes__
    assert note == "in the pass Failing, number 3 of 3; before it ran: FoldBatchNorm, MergePointwise (nothing to do)"
    assert_parity(model(X), net(X))


def test_private_hosts_do_the_same():
    for model, build in ((chained(), lambda m: m), (chained(), lambda m: trace(m, X))):
        target = build(model)
        expected = target(X)
        results = run_pipeline([FoldBatchNorm(), MergePointwise()], host_for(target, X, private=True))
        assert all(r.modified for r in results)
        assert_parity(target(X), expected)
        assert not any(isinstance(m, Chain) for m in target.modules())


@both_hosts
@every_fusing_pass
@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_an_error_while_computing_leaves_the_model_as_it_was(host_of, apply, build, gone, error, monkeypatch):
    model, host = host_of(made(build))
    expected, modules = model(X), [(name, id(m)) for name, m in model.named_modules()]
    exact, count = runs.fuse, []

    def explode(left, right):
        count.append(1)
        if len(count) == len(gone):  # in the last of the fusions
            raise error
        return exact(left, right)

    monkeypatch.setattr(runs, "fuse", explode)
    with pytest.raises(error):
        apply(host)
    assert [(name, id(m)) for name, m in model.named_modules()] == modules
    assert difference(model(X), expected) == 0.0


def test_an_interrupt_while_the_result_is_checked_is_undone(monkeypatch):
    model = made(Handmade)
    expected, modules = model(X), [id(m) for m in model.modules()]
    checked = []

    def interrupted(changed, inputs):
        checked.append(type(changed.norm))
        raise KeyboardInterrupt

    monkeypatch.setattr(module_host, "outputs_in_a_row", interrupted)
    with pytest.raises(KeyboardInterrupt):
        FuseLinearRuns()(ModuleHost(model, X))
    assert checked == [nn.Identity]
    assert [id(m) for m in model.modules()] == modules
    assert difference(model(X), expected) == 0.0


@both_hosts
def test_looking_for_neighbours_changes_nothing(host_of):
    net = made(Handmade).train()
    net.head.register_forward_hook(lambda module, args, output: None)
    state, random = copy.deepcopy(net.state_dict()), torch.get_rng_state()
    _, host = host_of(net)
    names = list(host.neighbours())
    assert names[:3] == ["stem", "norm", "squeeze"]
    assert torch.equal(random, torch.get_rng_state())
    assert all(torch.equal(v, state[k]) for k, v in net.state_dict().items())
    assert net.training


def test_links_go_both_ways():
    found = ModuleHost(made(Handmade), X).neighbours()
    assert {n: m.reader for n, m in found.items() if m.reader} == {
        "stem": "norm",
        "squeeze": "core",
        "core": "stretch",
        "tail.0": "tail.1",
        "tail.1": "tail.2",
        "tail.2": "tail.3",
        "tail.3": "tail.4",
        "tail.4": "tail.5",
        "head": "scale",
    }
    assert all(found[m.reader].source == n for n, m in found.items() if m.reader)
    assert all((m.reader is None) == bool(m.no_reader) and (m.source is None) == bool(m.no_source) for m in found.values())
    assert found["stem"].no_source == "it reads the input x"
    assert found["scale"].no_reader == "its output is read by the caller of the model"
    assert found["head"].no_source == "it reads mean"


class Activated(nn.BatchNorm2d):
    """A batch norm with an activation of its own, which a trace looks through."""

    def forward(self, x):
        return functional.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, eps=self.eps).relu()


@both_hosts
def test_a_batch_norm_of_ones_own_is_kept_and_said_so(host_of):
    net = randomized(nn.Sequential(nn.Conv2d(3, 4, 3), Activated(4)))
    runs_of = by_site(FuseLinearRuns()(host_of(net)[1]))
    assert runs_of["0"].reason == "its output is read by batch_norm"
    if host_of is on_module:
        assert "no call of it is seen: Activated" in by_site(FoldBatchNorm()(host_of(net)[1]))["1"].reason
    assert "Activated computes its output in its own way" in by_site(FoldBatchNorm()(ModuleHost(net)))["1"].reason
    assert "Activated computes its output in its own way" in by_site(FuseLinearRuns()(ModuleHost(net)))["0"].reason


@both_hosts
def test_layers_that_are_not_called_are_named(host_of):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.unused = nn.Conv2d(3, 4, 3), nn.Conv2d(3, 4, 3)

        def forward(self, x):
            return self.used(x)

    outcomes = by_site(FuseLinearRuns()(host_of(Net())[1]))
    assert set(outcomes) == ({"used", "unused"} if host_of is on_module else {"used"})
    if host_of is on_module:
        assert "is unused" in outcomes["unused"].reason


class InPlaceBetween(nn.Module):
    """Works in place on the input of a run while the run is under way."""

    def __init__(self):
        super().__init__()
        self.squeeze, self.core = nn.Conv2d(3, 2, 1, bias=False), nn.Conv2d(2, 3, 3, padding=1)
        self.norm, self.conv = nn.BatchNorm2d(3), nn.Conv2d(3, 3, 1)

    def forward(self, x):
        x = x + 1
        y = self.squeeze(x)
        x.relu_()
        z = self.norm(self.core(y))
        x.relu_().neg_()
        return self.conv(z) + x


@both_hosts
def test_the_fused_layer_reads_its_input_when_the_first_did(host_of):
    net = made(InPlaceBetween)
    model, host = host_of(net)
    outcomes = by_site(FuseLinearRuns()(host))
    assert outcomes["squeeze"].reason == "stands for squeeze, core, norm, conv"
    assert_parity(model(X), net(X))
    assert_parity(model(-X), net(-X))
    net.squeeze, net.core = nn.BatchNorm2d(3).eval(), nn.Conv2d(3, 3, 3, padding=0)
    net.conv = nn.Conv2d(3, 3, 1, padding=1)
    model, host = host_of(net)
    outcomes = by_site(FuseLinearRuns()(host))
    assert outcomes["squeeze"].reason == "with core after it: something else runs in between, before the first layer"
    assert_parity(model(X), net(X))


@both_hosts
@pytest.mark.parametrize("private", [False, True])
def test_a_host_sees_what_the_pass_before_did(host_of, private):
    net = Decompose(assignment={"1": Tucker(3, 2)})(ModuleHost(nn.Sequential(nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 3)).eval())).model
    model, _ = host_of(net)
    results = run_pipeline([FoldBatchNorm(), Reconstruct(), FuseLinearRuns()], host_for(model, X, private=private))
    assert [r.modified for r in results] == [False, True, True]
    assert by_site(results[2])["1"].reason == "stands for 0, 1"
    assert_parity(model(X), net(X))


class Delayed(nn.Module):
    """Adds what its batch norm was given in the call before."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.kept = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), None

    def forward(self, x):
        y = self.conv(x)
        out = self.norm(y)
        out = out if self.kept is None else out + self.kept
        self.kept = y
        return out


def test_what_only_a_second_call_shows_is_not_fused():
    net = made(Delayed)
    model = copy.deepcopy(net)
    result = FuseLinearRuns()(ModuleHost(model, X))
    assert not result.modified
    assert "not provable" in by_site(result)["conv"].reason
    for _ in range(3):
        assert difference(model(X), net(X)) == 0.0


class Data(nn.Module):
    """Control flow on data."""

    def forward(self, x):
        return x if x.sum() > 0 else x * 2


@pytest.mark.parametrize(
    ("layers", "inputs", "macs"),
    [
        ((nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)), X, 2 * 100 * 108),
        ((nn.BatchNorm2d(3), nn.Conv2d(3, 4, 3)), X, 2 * 100 * 108),
        ((nn.Linear(8, 4), nn.BatchNorm1d(4)), torch.randn(2, 8), 2 * 32),
    ],
    ids=["after", "before", "linear"],
)
def test_calls_are_known_where_the_proof_is_structure(layers, inputs, macs):
    net = randomized(nn.Sequential(*layers, Data()))
    host = ModuleHost(copy.deepcopy(net), inputs)
    (fused,) = [o for o in FuseLinearRuns()(host).outcomes if o.params_after is not None]
    assert (fused.macs_before, fused.macs_after) == (macs, macs)
    (site,) = host.sites()
    assert [c.input_shape for c in site.calls] == [tuple(inputs.shape)]
    assert_parity(host.model(inputs), net(inputs))


def test_what_a_norm_scales_is_not_known_without_inputs():
    body = nn.Sequential(nn.Linear(8, 4), nn.BatchNorm1d(4)).eval()
    reasons = {o.site: o.reason for o in FuseLinearRuns()(ModuleHost(body)).outcomes}
    assert "is not known without example_inputs" in reasons["0"]


def test_pooling_over_one_pixel_goes_all_at_once():
    body = [nn.Conv2d(3, 3, 1), nn.AvgPool2d(1), nn.Dropout(), nn.MaxPool2d(1), nn.Identity(), nn.AvgPool2d(1)]
    net = nn.Sequential(*body, nn.ReLU(), nn.AvgPool2d(1), nn.AvgPool2d(1)).eval()
    model, host = on_graph(net)
    assert [DropIdentities()(host).modified for _ in range(3)] == [True, False, False]
    assert targets(model) == ["0", "6", "7", "8"]
    assert difference(model(X), net(X)) == 0.0


def test_what_cannot_be_fused_says_why():
    def reasons(*layers, **options):
        result = FuseLinearRuns()(host_for(nn.Sequential(*layers).eval(), **options))
        return [outcome.reason for outcome in result.outcomes]

    spoilt = nn.BatchNorm2d(4)
    spoilt.running_mean[0] = float("nan")
    assert "they differ in dtype or device" in reasons(nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 3).double())[0]
    assert "on the meta device" in reasons(nn.Conv2d(4, 4, 1, device="meta"), nn.Conv2d(4, 4, 3))[0]
    assert "a scale or shift that is not finite" in reasons(nn.Conv2d(4, 4, 1), spoilt)[1]
    assert any("neither is a layer" in reason for reason in reasons(nn.BatchNorm2d(4), nn.BatchNorm2d(4)))


class Backwards(nn.Module):
    """Registers its layers in another order than it calls them; every order would fit."""

    def __init__(self):
        super().__init__()
        self.last, self.core, self.first = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 3, bias=False), nn.Conv2d(3, 3, 1, bias=False)

    def forward(self, x):
        return self.last(self.core(self.first(x)))


@both_hosts
def test_runs_are_fused_in_the_order_of_calls(host_of):
    net = made(Backwards)
    model, host = host_of(net)
    assert by_site(FuseLinearRuns()(host))["core"].reason == "stands for first, core, last"
    assert_parity(model(X), net(X))
