"""Timing of layers and chains with a made-up clock: medians beside a reference, however busy the machine, and never longer than it may take."""

from __future__ import annotations

import random
from types import SimpleNamespace

import pytest
from torch import nn

from passes.errors import SurgeryValueError
from passes.geometry import Geometry
from surgery.cost import timing
from surgery.cost.chains import Setup
from surgery.cost.profile import TimedShape
from surgery.cost.timing import in_terms_of_layers, time_shapes

HERE = Setup(runtime="eager", threads=1)


def shape(channels):
    pair = {"stride": (1, 1), "padding": (1, 1), "dilation": (1, 1), "output_padding": (0, 0)}
    return TimedShape((Geometry(in_channels=channels, out_channels=channels, kernel=(3, 3), **pair),), (1, channels, 8, 8))


class Machine:
    """Time passes only in calls. A call takes its shape's seconds, as many times over as other work makes of it just then."""

    def __init__(self, busy=lambda now: 1.0, mac=1e-9):
        self.now, self.busy, self.mac, self.calls = 0.0, busy, mac, 0

    def prepared(self, shape, setup):
        return lambda: self.work(self.mac * shape.macs)

    def work(self, seconds):
        self.calls += 1
        self.now += seconds * self.busy(self.now)


@pytest.fixture
def machine(monkeypatch):
    def made(**facts):
        device = Machine(**facts)
        monkeypatch.setattr(timing, "time", SimpleNamespace(perf_counter=lambda: device.now, sleep=lambda seconds: None))
        monkeypatch.setattr(timing, "_prepared", device.prepared)
        return device

    return made


SHAPES = [shape(channels) for channels in (16, 32, 64)]


def test_on_a_quiet_machine_times_are_those_of_the_calls(machine):
    machine()
    found, reference = time_shapes(SHAPES, HERE)
    assert reference == pytest.approx(1e-9 * 64 * 64 * 9 * 28 * 28)
    for each in SHAPES:
        assert found[each.key].seconds == pytest.approx(1e-9 * each.macs)
        assert found[each.key].spread < 1e-6


def test_drifts_of_the_machine_fall_on_all_alike(machine):
    machine(busy=lambda now: 1 + now)  # ever slower
    found, _ = time_shapes(SHAPES, HERE)
    small, middle, large = (found[each.key].seconds for each in SHAPES)
    assert middle / small == pytest.approx(4, rel=0.05)
    assert large / middle == pytest.approx(4, rel=0.05)


def test_bursts_of_other_work_are_seen_in_the_spread_and_not_in_the_median(machine):
    noise = random.Random(0)
    machine(busy=lambda now: 10.0 if noise.random() < 0.05 else 1 + 0.1 * noise.random())
    found, _ = time_shapes(SHAPES, HERE)
    small, large = found[SHAPES[0].key], found[SHAPES[2].key]
    assert large.seconds / small.seconds == pytest.approx(16, rel=0.15)
    assert large.spread > 1e-3
    assert large.low <= 16 * small.high
    assert large.high >= 16 * small.low


def test_timing_many_shapes_takes_no_longer_than_it_may(machine, monkeypatch):
    """Calls of seconds: each group gets its share of what is left, then as few rounds as may be."""
    monkeypatch.setattr(timing, "TOGETHER", 3)
    monkeypatch.setattr(timing, "TOTAL_SECONDS", 20.0)
    many = [shape(channels) for channels in range(16, 64, 2)]
    slow = machine(mac=1e-7)
    found, _ = time_shapes(many, HERE)
    assert set(found) == {each.key for each in many}
    rounds = 3 + timing.FEWEST_ROUNDS  # warm-up beside them
    once = sum(1e-7 * each.macs for each in many)
    reference = 1e-7 * 64 * 64 * 9 * 28 * 28
    assert slow.now < 20.0 + rounds * (once + 3 * len(many) / 3 * reference)
    assert all(entry.seconds == pytest.approx(1e-7 * each.macs) for each, entry in ((each, found[each.key]) for each in many))
    quick = machine(mac=1e-10)
    time_shapes(many, HERE)
    assert quick.now < 20.0


def test_a_network_in_terms_of_its_layers(machine):
    device = machine()
    layers = [SHAPES[0], SHAPES[1], SHAPES[1]]
    alone = sum(1e-9 * each.macs for each in layers)
    assert in_terms_of_layers(lambda: device.work(1.5 * alone), layers, HERE) == pytest.approx(1.5)


def test_layers_on_single_examples_and_flat_inputs_are_timed_in_onnxruntime():
    conv = Geometry.of(nn.Conv2d(3, 4, 3))
    linear = Geometry.of(nn.Linear(6, 5))
    shapes = [
        TimedShape((conv,), (3, 8, 8), "float32", False),
        TimedShape((linear,), (2, 6), "float32", False),
        TimedShape((linear,), (2, 4, 6), "float32", False),
    ]
    found, _ = time_shapes(shapes, Setup(runtime="onnxruntime", threads=1))
    assert {shape.key for shape in shapes} == set(found)
    with pytest.raises(SurgeryValueError, match="onnxruntime and openvino are timed with"):
        time_shapes([TimedShape((conv,), (1, 3, 8, 8), "bfloat16", False)], Setup(runtime="onnxruntime", threads=1))
