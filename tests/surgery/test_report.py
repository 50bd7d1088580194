"""The report: every number a second way, and the table as people see it."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import surgery
from surgery.cost import count_macs
from tests.networks import Small

X = torch.randn(2, 3, 12, 12, generator=torch.Generator().manual_seed(31))


def counted(model, inputs=X):
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(inputs)
    return counter.get_total_flops() // 2


@pytest.fixture
def net(small):
    return surgery.decompose(small, {"conv1": (6, None), "conv2": (8, 4), "mix": 5, "head": 2}, example_inputs=X)


def test_totals_equal_a_counter(small, net):
    report = surgery.report(net)
    assert report.macs_before == counted(small)
    assert report.macs_after == counted(net)
    assert report.params_before == sum(p.numel() for p in small.parameters())
    assert report.params_after == sum(p.numel() for p in net.parameters())
    assert report.compression == report.params_before / report.params_after
    assert report.speedup == report.macs_before / report.macs_after


def test_attention_counts_in_the_total():
    class Attends(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv1d(16, 16, 3, padding=1)

        def forward(self, x):
            q = self.conv(x).transpose(1, 2)[:, None]
            return nn.functional.scaled_dot_product_attention(q, q, q)

    model, x = Attends().eval(), torch.randn(2, 16, 10)
    report = surgery.report(surgery.decompose(model, {"conv": (4, 4)}, example_inputs=x))
    attention = 2 * (10 * 16 * 10) * 2
    assert report.macs_before == counted(model, x) == report["conv"].macs_before + attention
    assert report.macs_after == report["conv"].macs_after + attention


def test_attention_and_recurrent_layers_count_where_cpus_have_operators_of_their_own():
    class Attends(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.project, self.lstm = (
                nn.Conv1d(16, 16, 3, padding=1),
                nn.Linear(16, 48),
                nn.LSTM(16, 8, 2, bidirectional=True, batch_first=True),
            )

        def forward(self, x):
            y = self.conv(x).transpose(1, 2)
            q, k, v = self.project(y).view(2, 10, 3, 2, 8).permute(2, 0, 3, 1, 4)
            return nn.functional.scaled_dot_product_attention(q, k, v), self.lstm(y)[0]

    model, x = Attends().eval(), torch.randn(2, 16, 10)
    attention = 2 * (2 * 2 * 10 * 10 * 8)
    recurrent = 2 * 10 * 2 * (4 * 8 * (16 + 8) + 4 * 8 * (16 + 8))  # the second layer sees both directions of the first
    with torch.no_grad():
        report = surgery.report(surgery.decompose(model, {"conv": (4, 4)}, example_inputs=x))
    assert report.macs_before == report["conv"].macs_before + 2 * 10 * 16 * 48 + attention + recurrent


def test_a_training_step_counts_attention_and_recurrent_layers_three_times_as_all_else():
    class Attends(nn.Module):
        def __init__(self):
            super().__init__()
            self.project, self.lstm = nn.Linear(16, 48), nn.LSTM(16, 16, batch_first=True)

        def forward(self, x):
            q, k, v = self.project(self.lstm(x)[0]).view(2, 10, 3, 2, 8).permute(2, 0, 3, 1, 4)
            return nn.functional.scaled_dot_product_attention(q, k, v)

    model, x = Attends(), torch.randn(2, 10, 16, requires_grad=True)
    with torch.no_grad(), count_macs() as forward:
        model(x)
    with count_macs() as step:
        model(x).sum().backward()
    attention = 2 * (2 * 2 * 10 * 10 * 8)
    assert forward.macs == 2 * 10 * 16 * 48 + attention + 2 * 10 * (64 * 16 + 64 * 16)
    assert step.macs == 3 * forward.macs + attention // 2  # one of attention's two products is computed once more on the way back


def test_compression_and_speedup_are_equations_10_and_11(net):
    row = surgery.report(net)["conv2"]
    c_in, c_out, k1, k2, pixels_in, pixels_out = 16, 24, 4, 8, 144, 36
    assert row.compression == 9 * c_in * c_out / (c_in * k1 + 9 * k1 * k2 + c_out * k2)
    macs = c_in * k1 * pixels_in + 9 * k1 * k2 * pixels_out + c_out * k2 * pixels_out
    assert row.speedup == 9 * c_in * c_out * pixels_out / macs
    assert row.speedup < row.compression  # as the paper says of strides over one
    assert row.macs_before == 2 * 9 * c_in * c_out * pixels_out  # two pictures
    assert row.macs_after == 2 * macs
    assert row.output_shape == (2, 24, 6, 6)
    assert (row.kind, row.ranks, row.calls, row.status, row.reason) == ("tucker", (8, 4), 1, "decomposed", None)


def test_error_is_that_of_the_weight(small, net):
    back = surgery.reconstruct(net)
    for name in ("conv1", "conv2", "mix", "head"):
        before, after = small.get_submodule(name).weight.detach(), back.get_submodule(name).weight.detach()
        assert surgery.report(net)[name].error == pytest.approx(float((before - after).norm() / before.norm()), rel=1e-5)


def test_kept_layers_have_rows_with_reasons(net):
    row = surgery.report(net)["wide"]
    assert (row.status, row.reason, row.kind, row.ranks, row.error) == ("kept", "not named", None, None, None)
    assert (row.compression, row.speedup) == (1.0, 1.0)
    assert [r.name for r in surgery.report(net).layers] == ["conv1", "conv2", "mix", "wide", "tail.1", "head"]


def test_without_example_inputs_macs_are_not_known(small):
    report = surgery.report(surgery.decompose(small, 0.5))
    assert report.macs_before is report.macs_after is report.speedup is None
    assert all(row.macs_before is None and row.calls is None and row.speedup is None for row in report.layers)


def test_an_untouched_model_says_so(small):
    report = surgery.report(small)
    assert {row.reason for row in report.layers} == {"not decomposed"}
    assert report.passes == ()
    with pytest.raises(KeyError):
        report["conv9"]


def test_it_survives_copies_moves_wrappers_and_tracing(net):
    expected = surgery.report(net)
    assert surgery.report(copy.deepcopy(net)) == expected
    assert surgery.report(nn.DataParallel(net)) == expected
    assert surgery.report(copy.deepcopy(net).double()) == expected
    traced = surgery.report(surgery.trace(net, X))
    assert {r.name: (r.status, r.ranks, r.macs_after) for r in traced.layers} == {r.name: (r.status, r.ranks, r.macs_after) for r in expected.layers}


def test_after_reconstruction(net):
    report = surgery.report(surgery.reconstruct(net))
    assert report.passes == ("Decompose", "Reconstruct")
    row = report["conv2"]
    assert (row.status, row.reason, row.params_after) == ("kept", "reconstructed", row.params_before)
    assert row.error > 0  # what truncation took away did not come back
    assert report.macs_after == report.macs_before


def test_a_part_taken_out_still_knows_its_chains(net):
    report = surgery.report(nn.Sequential(net.conv1))
    assert report["0"].status == "decomposed"
    assert report["0"].params_before == 3 * 16 * 9


def test_json(net):
    data = json.loads(surgery.report(net).to_json())
    assert (data["format"], data["version"]) == ("surgery.report", 1)
    assert data["layers"][1]["factorization"] == {"kind": "tucker", "rank_out": 8, "rank_in": 4}
    assert data["macs_after"] == surgery.report(net).macs_after


def test_the_table(golden):
    torch.manual_seed(0)
    model = Small().eval()
    net = surgery.decompose(model, {"conv1": (16, 3), "conv2": (24, 16), "mix": None, "head": 5}, example_inputs=X)
    golden("report.txt", str(surgery.report(net)) + "\n")


def test_the_table_names_kinds_that_ranks_do_not_tell(small):
    ranks = {"conv1": surgery.Spatial(5), "conv2": surgery.CP(4), "mix": 5, "tail.1": (8, None)}
    lines = {line.split()[0]: line for line in str(surgery.report(surgery.decompose(small, ranks))).splitlines() if line}
    assert "  spatial 5  " in lines["conv1"]
    assert "  cp 4  " in lines["conv2"]
    assert "svd" not in lines["mix"]
    assert "  8, full  " in lines["tail.1"]


class Adapted(nn.Module):
    """A low-rank addition to a weight, as LoRA has it."""

    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Parameter(torch.randn(24, 2)), nn.Parameter(torch.randn(2, 16 * 9))

    def forward(self, weight):
        return weight + (self.up @ self.down).reshape(weight.shape)


@pytest.mark.parametrize(
    "compute",
    [nn.utils.parametrizations.weight_norm, lambda conv: nn.utils.parametrize.register_parametrization(conv, "weight", Adapted())],
    ids=["weight_norm", "adapted"],
)
def test_what_a_weight_was_computed_from_counts_before(small, compute, tmp_path):
    compute(small.conv2)
    own = sum(p.numel() for p in small.conv2.parameters())
    net = surgery.decompose(small, {"conv2": (8, 4), "mix": 5}, effective_weights=True, example_inputs=X)
    surgery.save(net, tmp_path / "net")
    fresh = Small()
    compute(fresh.conv2)
    for model in (net, surgery.load(tmp_path / "net", fresh), surgery.decompose(net, {"conv2": (4, 4)}), surgery.reconstruct(net)):
        report = surgery.report(model)
        assert report["conv2"].params_before == own
        assert report.params_before == sum(p.numel() for p in small.parameters())
        assert report.params_after == sum(p.numel() for p in model.parameters())


class Up(nn.Module):
    def __init__(self):
        super().__init__()
        self.up = nn.ConvTranspose2d(16, 20, (3, 4), stride=(3, 2), padding=1)

    def forward(self, x):
        return self.up(x, output_size=[24, 11])


@pytest.mark.parametrize("method", ["tucker", "spatial", "channel", "depthwise", "cp"])
def test_macs_of_chains_that_are_asked_for_an_output_size(method):
    model, x = Up().eval(), torch.randn(2, 16, 8, 5)
    net = surgery.decompose(model, {"up": (6, 5) if method == "tucker" else 2}, method=method, example_inputs=x)
    report = surgery.report(net)
    assert report.macs_before == counted(model, x)
    assert report["up"].macs_after == report.macs_after == counted(net, x)
