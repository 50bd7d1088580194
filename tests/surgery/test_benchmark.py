"""``benchmark``: interleaved, with a spread, and a verdict only where the spread allows one."""

from __future__ import annotations

import contextlib
import itertools
import json
import re
from dataclasses import fields, replace

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper
from torch import nn

import surgery
from passes.errors import SurgeryError, SurgeryTypeError, SurgeryValueError
from surgery import cli
from surgery.benchmarking import compare, layers, memory, sampling
from surgery.benchmarking.conditions import conditions_of
from surgery.benchmarking.environment import environment
from surgery.benchmarking.files import FileInput, macs_of_file, made_up
from surgery.benchmarking.onnx_files import size_of
from surgery.benchmarking.result import NO_VERDICT, LayerResult, RuntimeResult, verdict
from surgery.benchmarking.table import benchmark_table
from surgery.cost.profile import Entry
from surgery.onnx_files.files import write_model
from surgery.tables import render
from tests.networks import Branching, Random, Refused, Small, random_states

X = torch.randn(1, 3, 12, 12)


class Slow(nn.Module):
    """Takes the stated time by the clock below, and knows when it was called."""

    log: list[str] = []  # noqa: RUF012
    now = 0.0

    def __init__(self, name, seconds):
        super().__init__()
        self.name, self.seconds = name, seconds

    def forward(self, x):
        Slow.log.append(self.name)
        Slow.now += self.seconds
        return x


@pytest.fixture
def slow_time(monkeypatch):
    """A clock that only ``Slow`` moves, so that these tests do not depend on what else runs on the machine."""
    monkeypatch.setattr(sampling, "perf_counter", lambda: Slow.now)
    Slow.log.clear()


def raced(before, after, **options):
    return surgery.benchmark(Slow("before", before), Slow("after", after), X, runtimes=["eager"], **options).rows[0]


def test_a_network_that_takes_half_the_time(slow_time):
    row = raced(0.012, 0.006, repeats=8)
    assert row.time_ratio == pytest.approx(2)
    assert row.before_ms == pytest.approx(12)
    assert row.time_ratio_low <= row.time_ratio <= row.time_ratio_high
    assert (row.verdict, row.pairs) == ("faster", 8)
    assert raced(0.006, 0.012).verdict == "slower"


def test_networks_are_called_in_turn(slow_time):
    raced(0.012, 0.006, repeats=8)
    timed = Slow.log[-20:-4]  # the last four count MACs and memory
    samples = [name for name, _ in itertools.groupby(timed)]
    assert len(samples) >= 8  # taken in turn, not one network after the other


def test_the_same_network_is_not_called_faster(slow_time):
    row = raced(0.006, 0.006)
    assert (row.time_ratio, row.verdict, row.settled) == (pytest.approx(1), NO_VERDICT, True)


def test_both_runtimes_and_the_flops_beside():
    model = Small().eval()
    net = surgery.decompose(model, {"conv2": (2, 2)}, example_inputs=X)
    threads = torch.get_num_threads()
    measured = surgery.benchmark(model, net, X, repeats=8, threads=1)
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
    for wrong, message in [
        ({"repeats": 7}, "repeats: at least 8"),
        ({"runtimes": []}, "runtimes: expected a list"),
        ({"runtimes": "eager"}, "runtimes: expected a list"),
        ({"batch": 0}, "batch: expected whole numbers"),
        ({"batch": []}, "batch: expected whole numbers"),
        ({"dtype": "int8"}, "dtype: 'int8' is none of"),
        ({"memory_format": "nhwc"}, "memory_format: expected 'channels_last'"),
        ({"precision": 0}, "precision: expected a number above 0"),
        ({"seconds": float("inf")}, "seconds: expected a number above 0"),
        ({"threads": 0}, "threads: expected"),
    ]:
        with pytest.raises(SurgeryValueError, match=message):
            surgery.benchmark(Small(), Small(), X, **wrong)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
@pytest.mark.parametrize("runtime", ["cuda", "cuda-graph"])
def test_without_a_cuda_device_the_error_says_so(runtime):
    with pytest.raises(SurgeryValueError, match=f"'{runtime}' needs a CUDA device"):
        surgery.benchmark(Small(), Small(), X, runtimes=[runtime])


@pytest.mark.parametrize("fails", [False, True])
def test_random_states_are_left_as_found(fails):
    net, before = Random(fails), random_states()
    with contextlib.suppress(SurgeryError):
        surgery.benchmark(net, net, X, runtimes=["eager"], repeats=8)
    assert random_states() == before


class Clock:
    """Answers with the times it was given, by call."""

    def __init__(self, **times):
        self.times = {name: itertools.cycle(values) for name, values in times.items()}
        self.asked = []

    def __call__(self, call, loops):
        self.asked.append(call.__name__)
        return next(self.times[call.__name__])


def before():
    pass


def after():
    pass


def test_sampling_stops_when_it_is_sure_and_goes_on_until_then():
    quiet = sampling.time_in_turn(before, after, clock=Clock(before=[2.0], after=[1.0]))
    assert (quiet.ratio, quiet.low, quiet.high, quiet.pairs, quiet.settled) == (2.0, 2.0, 2.0, sampling.LEAST_PAIRS, True)
    noisy = sampling.time_in_turn(before, after, clock=Clock(before=[2.0, 2.2, 2.1, 1.9, 2.3], after=[1.0]), precision=0.05)
    assert noisy.pairs > quiet.pairs
    assert noisy.settled
    assert noisy.low <= noisy.ratio <= noisy.high


def test_sampling_ends_at_its_time_limit_and_says_that_it_is_not_sure():
    found = sampling.time_in_turn(before, after, clock=Clock(before=[1.0, 9.0, 2.0, 7.0, 3.0], after=[1.0]), seconds=1e-9)
    assert (found.pairs, found.settled) == (sampling.LEAST_PAIRS, False)
    assert found.spread > 1


@pytest.mark.parametrize(
    ("noise", "patience", "pairs"),
    [([0.8, 1.2], 1, 10), ([0.8, 1.2], 3, 20), ([0.8, 1.2], 4, 39), ([1.5, 1.9], 4, 10)],
    ids=["none", "the time is only doubled", "to the end", "faster in any case"],
)
def test_sampling_goes_on_while_it_is_open_which_is_faster(monkeypatch, noise, patience, pairs):
    clock = Clock(before=noise, after=[1.0])
    monkeypatch.setattr(sampling, "perf_counter", lambda: len(clock.asked) / 2)  # a pair takes a second
    monkeypatch.setattr(sampling, "_loops", lambda call, clock: 1)
    found = sampling.time_in_turn(before, after, clock=clock, seconds=9.5, patience=patience)
    assert (found.pairs, found.settled) == (pairs, False)


def test_sampling_takes_exactly_the_pairs_asked_for_in_turn():
    clock = Clock(before=[2.0], after=[1.0])
    assert sampling.time_in_turn(before, after, clock=clock, pairs=11).pairs == 11
    assert clock.asked[2:] == (["before", "after", "after", "before"] * 6)[:22]


def test_the_interval_of_the_median_holds_it_as_often_as_it_says():
    generator = np.random.default_rng(0)
    held = 0
    for _ in range(2000):
        low, middle, high = sampling.median_interval(generator.exponential(size=25))
        assert low <= middle <= high
        held += low <= np.log(2) <= high
    assert 0.985 < held / 2000 < 0.9999  # 99 % and what a discrete distribution adds; far from certain


def test_a_verdict_needs_the_whole_interval():
    assert verdict(1.01, 1.2) == "faster"
    assert verdict(0.8, 0.99) == "slower"
    assert verdict(0.99, 1.3) == verdict(0.7, 1.0) == NO_VERDICT


def test_a_batch_that_is_not_the_examples_is_told():
    times = {"before_ms": 2.0, "after_ms": 1.0, "time_ratio": 2.0, "time_ratio_low": 1.9, "time_ratio_high": 2.1}
    row = RuntimeResult(runtime="eager", batch=8, pairs=100, settled=True, macs_before=200, macs_after=100, **times)
    layer = LayerResult(**{**{field.name: 1.0 for field in fields(LayerResult)}, "name": "conv", "runtime": "eager", "chain": "conv"})
    measured = surgery.Benchmark(
        rows=(row,), layers=(layer,), macs_before=200, macs_after=100, threads=1, input_shapes=((1, 3, 32, 32),), environment={}
    )
    text = render(benchmark_table(measured), width=80)
    assert re.search(r"runtime +batch", text)
    assert re.search(r"eager +8 ", text)
    assert "MACs on the example inputs 200 / 100" in text
    assert "each by itself on the example inputs:" in text
    text = render(benchmark_table(replace(measured, input_shapes=((8, 3, 32, 32),))), width=80)
    assert "batch" not in text
    assert "on the example" not in text


def test_the_table_fits_80_columns_and_names_what_it_refuses_to_say():
    times = {"before_ms": 12345.678, "after_ms": 12300.1, "time_ratio": 1.004, "time_ratio_low": 0.9, "time_ratio_high": 1.1}
    sizes = {f"{what}_bytes_{when}": 123456789 for what in ("file", "memory") for when in ("before", "after")}
    rows = tuple(
        RuntimeResult(runtime=name, batch=n, pairs=100, settled=False, macs_before=200, macs_after=100, **times, **sizes)
        for name, n in (("onnxruntime", 1), ("torchscript", 256))
    )
    measured = surgery.Benchmark(rows=rows, macs_before=200, macs_after=100, threads=16, input_shapes=((1, 3, 224, 224),), environment={})
    text = render(benchmark_table(measured), width=80)
    assert max(map(len, text.splitlines())) <= 80
    assert f"none: {NO_VERDICT}" in text
    assert "0.50" in text  # the quotient
    assert "..." not in text
    assert "…" not in text


def test_the_memory_of_a_call_is_that_of_the_tensors_that_live_at_once():
    network = nn.Sequential(nn.Conv2d(3, 8, 1), nn.ReLU(), nn.Conv2d(8, 8, 1), nn.Conv2d(8, 1, 1)).eval()
    x = torch.randn(1, 3, 16, 16)
    held = sum(p.numel() for p in network.parameters()) + x.numel()
    with torch.no_grad():
        found = memory.of_tensors(lambda: network(x), network, x)
    assert found == 4 * (held + 2 * 8 * 256)  # the widest layer's input and output

    def step():
        with torch.enable_grad():
            network(x).sum().backward()

    assert memory.of_tensors(step, network, x) > found  # activations are kept for the backward pass


def test_other_batches_dtypes_and_formats_on_copies():
    model = Small().eval()
    net = surgery.decompose(model, {"conv2": (2, 2)}, example_inputs=X)
    measured = surgery.benchmark(model, net, X, runtimes=["eager"], repeats=8, batch=(1, 3), dtype="bfloat16", memory_format="channels_last")
    assert [row.batch for row in measured.rows] == [1, 3]
    assert measured.rows[1].macs_before == 3 * measured.rows[0].macs_before == 3 * measured.macs_before
    assert (measured.dtype, measured.memory_format) == ("bfloat16", "channels_last")
    assert model.conv2.weight.dtype == X.dtype == torch.float32
    assert model.conv2.weight.is_contiguous()
    conditions = conditions_of(batch=None, dtype=torch.float64, memory_format="channels_last")
    weight = conditions.network(model).conv2.weight
    assert weight.dtype == torch.float64
    assert weight.is_contiguous(memory_format=torch.channels_last)
    assert conditions.cast(X).is_contiguous(memory_format=torch.channels_last)


def test_a_training_step_is_timed_and_the_networks_stay_in_eval_mode():
    model = Small().eval()
    net = surgery.decompose(model, {"conv2": (2, 2)}, example_inputs=X)
    train, eager = surgery.benchmark(model, net, X, runtimes=["train", "eager"], repeats=8).rows
    assert train.macs_before > 2 * eager.macs_before  # derivatives by inputs and by weights
    assert train.memory_bytes_before > eager.memory_bytes_before
    assert not model.training
    assert all(p.grad is None for p in model.parameters())


def test_a_traced_network_is_frozen_without_touching_the_model():
    model = Small().eval()
    net = surgery.decompose(model, {"conv2": (2, 2)}, example_inputs=X)
    (row,) = surgery.benchmark(model, net, X, runtimes=["torchscript"], repeats=8).rows
    assert row.file_bytes_before > row.file_bytes_after > 0
    assert all(p.requires_grad for p in model.parameters())


def test_openvino_computes_in_the_dtype_that_it_is_given(tmp_path):
    pytest.importorskip("openvino")
    from surgery.benchmarking.onnx_files import PRECISIONS, openvino_call

    model = Small().eval()
    surgery.export_onnx(model, tmp_path / "net.onnx", X, exporter="torchscript")
    (found,) = (torch.from_numpy(value) for value in openvino_call(tmp_path / "net.onnx", X)().values())
    with torch.no_grad():
        assert (found - model(X)).abs().max() < 1e-4 * model(X).abs().max()  # bfloat16 is off by a hundredth
    assert PRECISIONS[torch.float32] == "f32"


@pytest.fixture
def layer_clock(monkeypatch):
    """Times layers by their MACs, but for one chain that takes as long as its layer and one that takes longer."""

    def time_shapes(shapes, conditions):
        slow = {8: 3.0, 12: 1.0}
        found = {}
        for shape in shapes:
            factor = slow.get(shape.layers[0].out_channels, 1.0) if len(shape.layers) > 1 else 1.0
            found[shape.key] = Entry(1e-9 * shape.macs * factor, 0.01)
        return found, 1e-3

    monkeypatch.setattr(layers, "time_shapes", time_shapes)


def test_the_layers_that_differ_are_timed_on_the_shapes_they_see(layer_clock):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 16, 3, stride=2), nn.Conv2d(16, 16, 3)).eval()
    net = surgery.decompose(model, {"1": (4, 4), "2": (8, 8)}, example_inputs=X)
    measured = surgery.benchmark(model, net, X, runtimes=["eager"], repeats=8, layers=True)
    report = {row.name: row for row in surgery.report(net).layers}
    assert [row.name for row in measured.layers] == ["1", "2"]
    for row in measured.layers:
        assert (row.macs_before, row.macs_after) == (report[row.name].macs_before, report[row.name].macs_after)
        assert row.flops_ratio == pytest.approx(report[row.name].speedup)
    pays, loses = measured.layers
    assert (pays.verdict, pays.quotient) == ("faster", pytest.approx(1.0))
    assert (loses.verdict, loses.quotient) == ("slower", pytest.approx(1 / 3))
    assert "conv 16>4 1x1; conv 4>4 3x3 /2x2; conv 4>16 1x1" in pays.chain
    text = render(benchmark_table(measured), width=80)
    assert "layers in eager" in text
    assert json.loads(measured.to_json())["layers"][1]["verdict"] == "slower"


def test_layers_for_real():
    model = Small().eval()
    net = surgery.decompose(model, {"conv2": (2, 2)}, example_inputs=X)
    (row,) = surgery.benchmark(model, net, X, runtimes=["eager"], repeats=8, layers=True).layers
    assert row.name == "conv2"
    assert row.before_ms > 0 < row.after_ms


def test_layers_are_looked_for_before_anything_is_timed(monkeypatch):
    monkeypatch.setattr(compare, "_row", None)
    with pytest.raises(SurgeryValueError, match="there is nothing to compare"):
        surgery.benchmark(Small(), Small(), X, runtimes=["eager"], layers=True)


def test_layers_need_a_clock_and_a_difference():
    with pytest.raises(SurgeryValueError, match="not in 'torchscript'"):
        surgery.benchmark(Small(), Small(), X, runtimes=["torchscript"], layers=True)
    with pytest.raises(SurgeryValueError, match="nothing to compare"):
        surgery.benchmark(Small(), Small(), X, runtimes=["eager"], repeats=8, layers=True)


@pytest.fixture(scope="module")
def two_files(tmp_path_factory):
    """A network and its cut, as ONNX files with an open batch."""
    folder, model = tmp_path_factory.mktemp("onnx"), Small().eval()
    net = surgery.decompose(model, {"conv2": (2, 2)}, example_inputs=X)
    files = folder / "a.onnx", folder / "b.onnx"
    for network, file in zip((model, net), files, strict=True):
        surgery.export_onnx(network, file, X, dynamic_batch=True, exporter="torchscript", check=False)
    return files


def test_two_onnx_files(two_files):
    measured = surgery.benchmark(*two_files, X, runtimes=["onnxruntime"], repeats=8)
    (row,) = measured.rows
    assert (row.runtime, row.batch) == ("onnxruntime", 1)
    assert row.file_bytes_before == two_files[0].stat().st_size
    assert row.file_bytes_after == two_files[1].stat().st_size
    assert measured.input_shapes == (tuple(X.shape),)
    model = Small().eval()
    report = surgery.report(surgery.decompose(model, {"conv2": (2, 2)}, example_inputs=X))
    assert (row.macs_before, row.macs_after) == (report.macs_before, report.macs_after)


def test_what_two_files_refuse(two_files, tmp_path):
    first, second = two_files
    with pytest.raises(SurgeryValueError, match="'eager' reads no ONNX files"):
        surgery.benchmark(first, second, X)
    with pytest.raises(SurgeryValueError, match="dtype: ONNX files are timed as they are"):
        surgery.benchmark(first, second, X, runtimes=["onnxruntime"], dtype="float64")
    with pytest.raises(SurgeryTypeError, match="two modules, or two ONNX files"):
        surgery.benchmark(first, Small(), X)
    with pytest.raises(SurgeryValueError, match=r"takes x: batch x 3 x 12 x 12 float32; got \(1, 4, 12, 12\)"):
        surgery.benchmark(first, second, torch.zeros(1, 4, 12, 12), runtimes=["onnxruntime"])
    with pytest.raises(SurgeryTypeError, match="got 2 tensors"):
        surgery.benchmark(first, second, (X, X), runtimes=["onnxruntime"])
    with pytest.raises(SurgeryValueError, match=r"leaves dimensions open.*--size batch=N"):
        surgery.benchmark(first, second, None, runtimes=["onnxruntime"])
    (tmp_path / "no.onnx").write_bytes(b"\x00\x01 no graph")
    with pytest.raises(SurgeryValueError, match="no ONNX file"):
        surgery.benchmark(first, tmp_path / "no.onnx", X, runtimes=["onnxruntime"])
    with pytest.raises(FileNotFoundError):
        surgery.benchmark(first, tmp_path / "absent.onnx", X, runtimes=["onnxruntime"])


def test_inputs_are_made_up_by_the_names_of_open_dimensions():
    inputs = [FileInput("image", torch.float32, ("batch", 3, "image[2]")), FileInput("ids", torch.int64, ("batch",))]
    made = made_up(inputs, {"batch": 2, "image[2]": 5})
    assert {name: (tuple(t.shape), t.dtype) for name, t in made.items()} == {"image": ((2, 3, 5), torch.float32), "ids": ((2,), torch.int64)}
    assert made_up(inputs[:1], shape=(4, 3, 7))["image"].shape == (4, 3, 7)
    for wrong, message in [
        ({"sizes": {"batch": 2}}, r"--size image\[2\]=N"),
        ({"sizes": {"batch": 2, "image[2]": 5, "width": 1}}, "'width' is no open dimension"),
        ({"shape": (1, 3, 2)}, "the file has 2 inputs"),
    ]:
        with pytest.raises(SurgeryValueError, match=message):
            made_up(inputs, **wrong)
    with pytest.raises(SurgeryValueError, match="1x4x2 does not fit"):
        made_up(inputs[:1], shape=(1, 4, 2))


def test_the_command_takes_two_files(two_files, capsys):
    command = ["bench", *map(str, two_files), "--repeats", "8"]
    assert cli.main(command) == 1
    assert "--size batch=N" in capsys.readouterr().err
    for wrong, message in [(["bench", command[1]], "to time it against"), (["bench", "surgery:resnet20", command[2]], "MODEL must be an ONNX file")]:
        with pytest.raises(SystemExit) as ended:
            cli.main(wrong)
        assert ended.value.code == 2
        assert message in capsys.readouterr().err
    assert cli.main([*command, "--size", "batch=2", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["rows"][0]["batch"] == 2
    assert cli.main([*command, "--input-shape", "1,3,12,12"]) == 0
    assert "onnxruntime" in capsys.readouterr().out


@pytest.mark.parametrize(("dtype", "memory_format"), [("float64", None), (None, "channels_last")])
def test_one_condition_without_the_other(dtype, memory_format):
    conditions = conditions_of(batch=None, dtype=dtype, memory_format=memory_format)
    model, inputs = conditions.network(Small()), conditions.cast(X)
    assert inputs.dtype == model.conv1.weight.dtype == (torch.float64 if dtype else torch.float32)
    for tensor in (inputs, model.conv1.weight):
        assert tensor.is_contiguous(memory_format=torch.channels_last) == (memory_format is not None)


def test_inputs_without_a_batch():
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(4, 4))

        def forward(self, x):
            return self.weight * x

    with pytest.raises(SurgeryValueError, match="batch: the example inputs have no dimension that could be a batch"):
        surgery.benchmark(Scaled(), Scaled(), torch.tensor(3.0), runtimes=["eager"], batch=4)


def test_the_environment_tells_older_instructions(monkeypatch):
    for name in ("ATEN_CPU_CAPABILITY", "ONEDNN_MAX_CPU_ISA", "MKL_ENABLE_INSTRUCTIONS"):
        monkeypatch.delenv(name, raising=False)
    whole = environment()["processor"]
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "AVX2")
    monkeypatch.setenv("ATEN_CPU_CAPABILITY", "avx2")
    assert environment()["processor"] == f"{whole} (ATEN_CPU_CAPABILITY=avx2, ONEDNN_MAX_CPU_ISA=AVX2)"


class Backwards(torch.autograd.Function):
    """Nothing, which counts how often it is differentiated."""

    times = 0

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        Backwards.times += 1
        return gradient


class Counted(Small):
    def forward(self, x):
        return Backwards.apply(super().forward(x))


def test_a_training_step_is_whole_in_inference_mode_too():
    model, before = Counted(), Backwards.times
    with torch.inference_mode():
        surgery.benchmark(model, surgery.decompose(model, 0.5), torch.randn(2, 3, 12, 12), runtimes=["train"], repeats=8, layers=True)
    assert Backwards.times - before >= 2 * 8


def test_networks_that_only_a_trace_exports_are_timed_by_their_trace():
    measured = surgery.benchmark(Refused(), Refused(), X, runtimes=["onnxruntime"], repeats=8)
    assert [row.runtime for row in measured.rows] == ["onnxruntime"]
    with pytest.raises(SurgeryError, match="would keep the one way that the example inputs take"):
        surgery.benchmark(Branching(), Branching(), X, runtimes=["onnxruntime"], repeats=8)


def test_macs_in_the_functions_of_a_file_are_counted(tmp_path):
    weight = helper.make_tensor("w", TensorProto.FLOAT, (6, 4, 3, 3), np.ones(6 * 4 * 9, np.float32).tobytes(), raw=True)
    inside = helper.make_function("own", "Block", ["a", "b"], ["o"], [helper.make_node("Conv", ["a", "b"], ["o"])], [helper.make_opsetid("", 17)])
    ends = (helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in (("x", (1, 4, 8, 8)), ("y", None)))
    graph = helper.make_graph([helper.make_node("Block", ["x", "w"], ["y"], domain="own")], "net", *([end] for end in ends), [weight])
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("own", 1)]
    onnx.save(helper.make_model(graph, ir_version=8, opset_imports=opsets, functions=[inside]), tmp_path / "net.onnx")
    assert macs_of_file(tmp_path / "net.onnx", {"x": torch.zeros(1, 4, 8, 8)}) == 6 * 36 * 4 * 9


def test_the_size_of_a_file_counts_weights_of_inner_graphs_beside_it(tmp_path):
    weight = helper.make_tensor("w", TensorProto.FLOAT, (1024,), np.ones(1024, np.float32).tobytes(), raw=True)
    out = helper.make_tensor_value_info("o", TensorProto.FLOAT, None)
    bodies = {name: helper.make_graph([helper.make_node("Add", ["x", "w"], ["o"])], name, [], [out], [weight]) for name in ("then", "else")}
    node = helper.make_node("If", ["c"], ["y"], then_branch=bodies["then"], else_branch=bodies["else"])
    inputs = [helper.make_tensor_value_info("x", TensorProto.FLOAT, (1024,)), helper.make_tensor_value_info("c", TensorProto.BOOL, ())]
    graph = helper.make_graph([node], "net", inputs, [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)])
    write_model(helper.make_model(graph, ir_version=8, opset_imports=[helper.make_opsetid("", 17)]), tmp_path / "net.onnx", external=True)
    assert size_of(tmp_path / "net.onnx") == sum(file.stat().st_size for file in tmp_path.iterdir()) > 2 * 4096


class Finds(nn.Module):
    """Gives as many rows as it finds, as detectors do."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3)

    def forward(self, x):
        y = self.conv(x).flatten(1).T
        return y[y[:, 0] > 0]


def test_networks_whose_output_sizes_follow_the_numbers_are_compared():
    torch.manual_seed(0)
    model, x = Finds().eval(), torch.randn(1, 3, 12, 12)
    net = surgery.decompose(model, {"conv": (2, 2)})
    assert len(model(x)) != len(net(x))
    (row,) = surgery.benchmark(model, net, x, runtimes=["eager"], repeats=8).rows
    assert row.time_ratio > 0
    with pytest.raises(SurgeryValueError, match="its outputs have the shapes"):
        surgery.benchmark(model, nn.Sequential(net, nn.Flatten(0)), x, runtimes=["eager"], repeats=8)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--repeats", "3"], "repeats: at least"),
        (["--threads", "0"], "threads: expected"),
        (["--seconds", "0"], "seconds: expected"),
        (["--dtype", "half"], "dtype: 'half' is none of"),
        (["--memory-format", "nhwc"], "memory_format: expected"),
    ],
)
def test_the_command_refuses_wrong_conditions_before_any_work(options, message, capsys):
    with pytest.raises(SystemExit) as ended:
        cli.main(["bench", "absent:net", *options])
    assert ended.value.code == 2
    assert message in capsys.readouterr().err


def test_the_command_refuses_layers_where_they_have_no_clock_before_any_work(capsys):
    assert cli.main(["bench", "absent:net", "--layers", "--runtimes", "eager,torchscript"]) == 1
    assert "not in 'torchscript'" in capsys.readouterr().err
