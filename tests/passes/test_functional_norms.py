"""Batch norms that a traced class calls as functions: modules where they have their tensors to themselves, as they are elsewhere."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional

import surgery
from passes.functional_norms import norms_as_modules
from passes.parity import assert_parity
from tests.passes.test_cleanup import randomized
from tests.surgery.test_deploy import params_of

X = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(5))


class NormAct(nn.BatchNorm2d):
    """A batch norm with its activation, and a check of what it is given, as libraries of models write it."""

    def __init__(self, channels, **options):
        super().__init__(channels, **options)
        self.act = nn.ReLU()

    def forward(self, x):
        torch._assert(x.ndim == 4, f"expected 4 dimensions, got {x.ndim}")
        return self.act(functional.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, self.training, 0.1, self.eps))


class Net(nn.Module):
    def __init__(self, **options):
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(3, 8, 3, bias=False), NormAct(8, **options)
        self.conv2, self.norm2 = nn.Conv2d(8, 8, 1, bias=False), NormAct(8, **options)

    def forward(self, x):
        return self.norm2(self.conv2(self.norm1(self.conv1(x))))


class Twice(Net):
    """One norm after two layers."""

    def forward(self, x):
        return self.norm1(self.conv2(self.norm1(self.conv1(x))))


class Reads(Net):
    """A parameter of a norm is an output too."""

    def forward(self, x):
        return super().forward(x), self.norm1.weight


class Borrows(Net):
    """A norm that is a module of its own, and whose statistics another call takes too."""

    def __init__(self):
        super().__init__()
        self.norm2 = nn.BatchNorm2d(8)

    def forward(self, x):
        x = self.conv1(x)
        return self.norm2(x) + functional.batch_norm(x, self.norm2.running_mean, self.norm2.running_var)


def functions(graph_module):
    return sum(node.target is functional.batch_norm for node in graph_module.graph.nodes)


def norms(model):
    return sum(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in model.modules())


def as_modules(net, inputs=X):
    traced = surgery.trace(net, inputs)
    expected = traced(inputs)
    norms_as_modules(traced)
    traced.graph.lint()
    assert_parity(traced(inputs), expected, training=False)
    return traced


@pytest.mark.parametrize("affine", [True, False])
def test_deploy_folds_norms_of_derived_classes(affine):
    net = randomized(Net(affine=affine)).double().eval()
    state = copy.deepcopy(net.state_dict())
    deployed = surgery.deploy(net, X.double())
    assert norms(deployed) == functions(deployed) == 0
    assert_parity(deployed(X.double()), net(X.double()), training=False)
    assert [node.op for node in deployed.graph.nodes] == ["placeholder", *4 * ["call_module"], "output"]
    assert all(torch.equal(value, state[name]) for name, value in net.state_dict().items())
    assert params_of(deployed) == 3 * 8 * 9 + 8 * 8 + 2 * 8
    assert not any("running" in name for name in deployed.state_dict())


def test_cut_networks_too():
    net = surgery.decompose(randomized(Net()).eval(), {"conv1": (4, 2)})
    deployed = surgery.deploy(net, X)
    assert norms(deployed) == functions(deployed) == 0
    assert "FoldBatchNorm" in surgery.report(deployed).passes


def test_shapes_stay_known_and_checks_of_sizes_go():
    traced = as_modules(randomized(Net()).eval())
    assert functions(traced) == 0
    assert norms(traced) == 2
    assert all("tensor_meta" in node.meta for node in traced.graph.nodes if node.op == "call_module")
    assert not any(node.target in (getattr, torch._assert) for node in traced.graph.nodes)


def test_a_norm_that_is_called_twice_is_one_module_called_twice():
    traced = as_modules(randomized(Twice()).eval())
    assert (functions(traced), norms(traced)) == (0, 1)


@pytest.mark.parametrize("build", [Reads, Borrows])
def test_tensors_that_something_else_reads_stay_where_they_are(build):
    net = randomized(build()).eval()
    traced = as_modules(net)
    assert functions(traced) == 1
    assert_parity(surgery.deploy(net, X)(X), net(X), training=False)


def test_a_norm_in_train_mode_is_left_alone():
    net = randomized(Net()).eval()
    net.norm1.train()
    assert functions(as_modules(net)) == 1


def test_a_check_of_numbers_stays():
    class Checks(Net):
        def forward(self, x):
            torch._assert(x.sum() > -1e9, "too small")
            return super().forward(x)

    deployed = surgery.deploy(randomized(Checks()).eval(), X)
    assert any(node.target is torch._assert for node in deployed.graph.nodes)
    with pytest.raises(AssertionError, match="too small"):
        deployed(X - 1e9)


def test_inputs_of_unknown_shape_and_layers_of_other_dimensions():
    traced = surgery.trace(randomized(Net()).eval(), X)
    for node in traced.graph.nodes:
        node.meta.pop("tensor_meta", None)
    norms_as_modules(traced)
    assert functions(traced) == 2

    class Line(nn.BatchNorm1d):
        def forward(self, x):
            return functional.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias)

    net = randomized(nn.Sequential(nn.Conv1d(3, 8, 3), Line(8), nn.Flatten(), nn.Linear(48, 5), Line(5))).eval()
    deployed = surgery.deploy(net, X[:, :, 0])
    assert norms(deployed) == functions(deployed) == 0
    assert_parity(deployed(X[:, :, 0]), net(X[:, :, 0]), training=False)
