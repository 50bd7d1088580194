"""Timing of layers and chains with a made-up clock: medians beside a reference, however busy the machine, and never longer than it may take."""

from __future__ import annotations

import copy
import random
import weakref
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from passes import host_for, observe
from passes.errors import SurgeryValueError
from passes.geometry import Geometry
from surgery.cost import chains, timing
from surgery.cost.calls import waited_for
from surgery.cost.chains import Setup
from surgery.cost.profile import TimedShape
from surgery.cost.timing import in_terms_of_layers, time_shapes
from surgery.latency.times import timed_layer

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


def test_large_inputs_are_not_all_held_at_once(machine, monkeypatch):
    """Forty chains of one layer at batch 32 and 224 pixels would take 16 GB of inputs alone; fewer are called in turn then."""
    device = machine()
    held, most = set(), 0

    def prepared(shape, setup):
        nonlocal most
        call = lambda: device.work(1e-3)  # noqa: E731 - it needs an identity
        if shape.input_shape != timing.REFERENCE_INPUT:
            held.add(id(call))
            weakref.finalize(call, held.discard, id(call))
            most = max(most, len(held))
        return call

    monkeypatch.setattr(timing, "_prepared", prepared)
    large = [replace(shape(channels), input_shape=(32, channels, 224, 224)) for channels in (68, 67, 66, 65, 64)]
    found, _ = time_shapes(large, HERE)
    assert set(found) == {each.key for each in large}
    assert most == 1
    small = [shape(channels) for channels in range(4, 44)]
    time_shapes(small, HERE)
    assert most == len(small)


def test_what_runs_on_an_accelerator_is_waited_for_wherever_it_runs(monkeypatch):
    """A call returns there before it is done; torch's current device need not be the one that the network is on."""
    waits = []
    monkeypatch.setattr("torch.accelerator.synchronize", waits.append)

    def on(*devices):
        return [SimpleNamespace(device=torch.device(name)) for name in devices]

    waited_for(lambda: None, on("cpu", "meta"))()
    assert waits == []
    waited_for(lambda: None, on("cpu", "cuda:1", "mps", "cuda:1"))()
    assert waits == [torch.device("cuda:1"), torch.device("mps")]


@pytest.mark.parametrize(
    ("layer", "size", "inputs"),
    [
        (nn.Conv2d(16, 8, 1), (2, 16, 6, 6), torch.channels_last),
        (nn.Conv2d(16, 8, 3), (2, 16, 6, 6), torch.channels_last),
        (nn.Conv3d(16, 8, 3), (2, 16, 6, 6, 6), torch.channels_last_3d),
    ],
    ids=["1x1", "3x3", "3x3x3"],
)
@pytest.mark.parametrize("last", [False, True])
def test_layers_are_timed_in_the_memory_format_of_their_network(layer, size, inputs, last):
    model = copy.deepcopy(layer).to(memory_format=inputs) if last else layer
    (site,) = host_for(model, observed=observe(model, torch.randn(size))).sites()
    (told,) = timed_layer(site, "eager")
    assert told.channels_last is last
    assert not timed_layer(site, "onnxruntime")[0].channels_last
    network, given = chains._layers(told, "cpu")
    assert given.is_contiguous(memory_format=inputs) is last
    assert network(given).is_contiguous(memory_format=inputs) is last


def test_noise_is_as_large_after_a_layer_as_before():
    for groups in (1, 4, 64):
        facts = {"stride": (1, 1), "padding": (0, 0), "dilation": (1, 1), "output_padding": (0, 0)}
        each = Geometry(in_channels=64, out_channels=64, kernel=(3, 3), groups=groups, **facts)
        network, given = chains._layers(TimedShape((each, each, each), (4, 64, 16, 16)), "cpu")
        with torch.no_grad():
            assert 0.5 < float(network(given).std() / given.std()) < 2


def test_calls_on_nothing_are_not_timed():
    """A detector that finds nothing calls its last layers on none; no device could time that."""
    model = nn.Sequential(nn.Conv2d(3, 4, 3))
    (site,) = host_for(model, observed=observe(model, torch.randn(0, 3, 8, 8))).sites()
    assert site.calls
    assert timed_layer(site, "eager") == []
