"""``benchmark``: interleaved, with a spread, and a verdict only where the spread allows one."""

from __future__ import annotations

import contextlib
import json
import time

import pytest
import torch
from torch import nn

import surgery
from passes.errors import SurgeryError, SurgeryValueError
from tests.networks import Random, Small, random_states

X = torch.randn(1, 3, 12, 12)


class Slow(nn.Module):
    """Takes the stated time, and knows when it was called."""

    log: list[str] = []  # noqa: RUF012

    def __init__(self, name, seconds):
        super().__init__()
        self.name, self.seconds = name, seconds

    def forward(self, x):
        self.log.append(self.name)
        time.sleep(self.seconds)
        return x


def test_a_network_that_takes_half_the_time():
    Slow.log.clear()
    measured = surgery.benchmark(Slow("before", 0.012), Slow("after", 0.006), X, runtimes=["eager"], repeats=8)
    (row,) = measured.rows
    assert 1.5 < row.time_ratio < 2.5
    assert row.time_ratio_low <= row.time_ratio <= row.time_ratio_high
    assert row.verdict == "faster"
    samples = [name for name, following in zip(Slow.log[-24:], [*Slow.log[-23:], ""], strict=True) if name != following]
    assert {"before", "after"} == set(samples)
    assert len(samples) >= 8  # taken in turn, not one network after the other


def test_the_same_network_is_not_called_faster():
    verdicts = [surgery.benchmark(Slow("a", 0.006), Slow("b", 0.006), X, runtimes=["eager"], repeats=9).rows[0] for _ in range(3)]
    assert all(0.8 < row.time_ratio < 1.25 for row in verdicts)
    assert surgery.benchmark(Slow("a", 0.006), Slow("b", 0.012), X, runtimes=["eager"], repeats=6).rows[0].verdict == "slower"


def test_both_runtimes_and_the_flops_beside():
    model = Small().eval()
    net = surgery.decompose(model, {"conv2": (2, 2)}, example_inputs=X)
    threads = torch.get_num_threads()
    measured = surgery.benchmark(model, net, X, repeats=4, threads=1)
    assert [row.runtime for row in measured.rows] == ["eager", "onnxruntime"]
    assert measured.flops_ratio == surgery.report(net).speedup
    assert measured.threads == 1
    assert torch.get_num_threads() == threads
    assert "onnxruntime" in measured.environment
    data = json.loads(measured.to_json())
    assert (data["format"], data["rows"][0]["runtime"], data["input_shapes"]) == ("surgery.benchmark", "eager", [[1, 3, 12, 12]])
    assert "FLOPs ratio" in str(measured)
    assert model.conv2.weight.requires_grad


def test_wrong_arguments():
    with pytest.raises(SurgeryValueError, match="'tensorrt' is none of"):
        surgery.benchmark(Small(), Small(), X, runtimes=["tensorrt"])
    with pytest.raises(SurgeryValueError, match="at least 4"):
        surgery.benchmark(Small(), Small(), X, repeats=1)


@pytest.mark.parametrize("fails", [False, True])
def test_random_states_are_left_as_found(fails):
    net, before = Random(fails), random_states()
    with contextlib.suppress(SurgeryError):
        surgery.benchmark(net, net, X, runtimes=["eager"], repeats=4)
    assert random_states() == before
