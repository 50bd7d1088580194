"""Timing layers and chains in a runtime: each a tiny network of its own, all of them called in turn."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from math import sqrt
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn

from passes.chain import plain_layer
from passes.errors import MissingExtra, SurgeryError, SurgeryValueError
from passes.geometry import Geometry, Piece
from surgery.cost import threads_set
from surgery.cost.profile import Entry, TimedShape
from surgery.progress import tracked

__all__ = [
    "RUNTIMES",
    "Conditions",
    "describe",
    "in_terms_of_layers",
    "need",
    "onnx_model",
    "onnx_nodes",
    "time_shapes",
    "timed_in",
]

REFERENCE = Geometry(in_channels=64, out_channels=64, kernel=(3, 3), stride=(1, 1), padding=(1, 1), dilation=(1, 1), output_padding=(0, 0))
REFERENCE_INPUT = (1, 64, 28, 28)
TOGETHER = 40  # networks called in turn; that many keep each other's weights out of the caches, as the layers of a network do
WEIGHTS_TOGETHER = 60_000_000
ROUNDS = (5, 25)
FEWEST_ROUNDS = 3  # where even the least number of rounds takes twice as long as it may
SLOW_SECONDS = 5e-3  # calls that take longer are not repeated before they count
GROUP_SECONDS = 4.0  # no further rounds are begun after this long
TOTAL_SECONDS = 240.0  # in all; the later groups get what the earlier ones have left
SURE = 0.015  # standard error, as a share of the time, at which no further rounds are needed
SAMPLE_SECONDS = 2e-4  # shorter calls are repeated
NUMBER_TYPES = {"float16": 10, "float32": 1, "float64": 11}  # of ONNX


@dataclass(frozen=True, slots=True, kw_only=True)
class Conditions:
    """What a time depends on beside the shape and the machine."""

    runtime: str
    threads: int
    device: str = "cpu"


Call = Callable[[], object]


def time_shapes(shapes: Sequence[TimedShape], conditions: Conditions) -> tuple[dict[str, Entry], float]:
    """Times of these shapes by key, and of the reference layer beside them.

    Calls go in turn, one of each shape a round, so that other work on the machine falls on all alike, and weights come from where they come from in
    a network. Each time is taken relative to the reference layer, which is called again and again in between, and the median of the ratios counts.
    On a slow or busy machine there are fewer rounds, and the spread says so.

    Raises:
        MissingExtra: the runtime is not installed.
        SurgeryError: the runtime refuses a shape.
    """
    from statistics import median

    need(conditions.runtime)
    found: dict[str, Entry] = {}
    with threads_set(conditions.threads), torch.no_grad():
        reference_shape = TimedShape((REFERENCE,), REFERENCE_INPUT)
        reference = _prepared(reference_shape, conditions)
        typical = _loops_and_time(reference)[1]
        references: list[float] = []
        groups, began = list(_groups(shapes)), time.perf_counter()
        for number, group in enumerate(tracked(groups, f"timing {len(shapes)} shapes in {conditions.runtime}")):
            left = max(TOTAL_SECONDS - (time.perf_counter() - began), 0.0)
            calls = [_prepared(shape, conditions) for shape in group]
            entries, seen = _in_turn(calls, reference, _pause(conditions), min(GROUP_SECONDS, left / (len(groups) - number)))
            references += seen
            found |= {shape.key: entry for shape, entry in zip(group, entries, strict=True)}
        base = median(references) if references else typical
    return {key: Entry(entry.seconds * base, entry.spread) for key, entry in found.items()}, base


def in_terms_of_layers(call: Call, shapes: Sequence[TimedShape], conditions: Conditions) -> float:
    """How many times as long a call takes as these layers together (each as often as it is named), all of them timed in turn."""
    often = {shape: shapes.count(shape) for shape in dict.fromkeys(shapes)}
    with threads_set(conditions.threads), torch.no_grad():
        calls = [call, *(_prepared(shape, conditions) for shape in often)]
        entries, _ = _in_turn(calls, _prepared(TimedShape((REFERENCE,), REFERENCE_INPUT), conditions), _pause(conditions))
    return entries[0].seconds / sum(n * entry.seconds for n, entry in zip(often.values(), entries[1:], strict=True))


def describe(conditions: Conditions) -> dict[str, str]:
    """What tells the devices of profiles apart."""
    from surgery.benchmark import environment

    runtime = conditions.runtime
    known = environment([runtime])
    version = known.get(runtime, known["torch"])
    place = known.get("cuda_device", conditions.device) if conditions.device.startswith("cuda") else conditions.device
    return {
        "runtime": f"{runtime} {version}",
        "processor": known["processor"],
        "system": known["system"],
        "device": place,
        "threads": str(conditions.threads),
    }


def need(runtime: str) -> None:
    """Raise ``MissingExtra`` where a runtime is not installed."""
    import importlib.util

    package = {"onnxruntime": "onnxruntime", "openvino": "openvino"}.get(runtime)
    if package is not None and importlib.util.find_spec(package) is None:
        extra = "export" if package == "onnxruntime" else package
        raise MissingExtra.of(f"runtime {runtime!r} is not installed", extra)


def _groups(shapes: Sequence[TimedShape]) -> Iterator[list[TimedShape]]:
    group: list[TimedShape] = []
    for shape in dict.fromkeys(shapes):
        if group and (len(group) == TOGETHER or sum(s.weights for s in group) + shape.weights > WEIGHTS_TOGETHER):
            yield group
            group = []
        group.append(shape)
    if group:
        yield group


def _pause(conditions: Conditions) -> float:
    """Seconds between two calls: worker threads of one network stop spinning before the next one needs the cores."""
    return 0.002 if conditions.threads > 1 and conditions.runtime == "openvino" else 0.0


def _in_turn(calls: Sequence[Call], reference: Call, pause: float, seconds: float = GROUP_SECONDS) -> tuple[list[Entry], list[float]]:
    """Times relative to the reference's, and those of the reference in seconds; after so many seconds as few rounds as may be."""
    from statistics import median

    loops = [_loops_and_time(call)[0] for call in calls]
    often = _loops_and_time(reference)[0]
    ratios: list[list[float]] = [[] for _ in calls]
    seen: list[float] = []
    began = time.perf_counter()
    for number in range(ROUNDS[1]):
        beside = _sample(reference, often, pause)
        seen.append(beside)
        for start in range(0, len(calls), 8):
            times = [_sample(call, n, pause) for call, n in zip(calls[start : start + 8], loops[start : start + 8], strict=True)]
            following = _sample(reference, often, pause)
            seen.append(following)
            for index, mine in enumerate(times):
                ratios[start + index].append(2 * mine / (beside + following))
            beside = following
        taken = time.perf_counter() - began
        if number + 1 >= ROUNDS[0] and (taken > seconds or all(_standard_error(values) < SURE for values in ratios)):
            break
        if number + 1 >= FEWEST_ROUNDS and taken > 2 * seconds:
            break
    return [Entry(median(values), _standard_error(values)) for values in ratios], seen


def _standard_error(values: Sequence[float]) -> float:
    """Of the median, as a share of it, by the quartiles: 1.253 standard deviations / sqrt(n), one of which is 0.741 of the distance between them."""
    from statistics import quantiles

    low, middle, high = quantiles(values, n=4)
    return 0.93 * (high - low) / middle / sqrt(len(values))


def _loops_and_time(call: Call) -> tuple[int, float]:
    call()
    seconds = _sample(call, 1, 0.0)
    if seconds < SLOW_SECONDS:
        seconds = min(_sample(call, 1, 0.0) for _ in range(2))
    return max(1, round(SAMPLE_SECONDS / max(seconds, 1e-9))), seconds


def _sample(call: Call, loops: int, pause: float) -> float:
    if pause:
        time.sleep(pause)
    began = time.perf_counter()
    for _ in range(loops):
        call()
    return (time.perf_counter() - began) / loops


def _prepared(shape: TimedShape, conditions: Conditions) -> Call:
    return RUNTIMES[conditions.runtime](shape, conditions)


def _layers(shape: TimedShape, device: str) -> tuple[nn.Sequential, Tensor]:
    """The chain as modules with noise for weights, and an input."""
    dtype, generator = getattr(torch, shape.dtype), torch.Generator().manual_seed(0)

    def noise(size: Sequence[int]) -> Tensor:
        values = torch.randn(tuple(size), generator=generator).to(device=device, dtype=dtype)
        return values.contiguous(memory_format=torch.channels_last) if shape.channels_last and values.ndim == 4 else values

    layers = []
    for g in shape.layers:
        weight = noise(g.weight_shape) * (g.groups / max(g.weights / g.out_channels, 1)) ** 0.5
        layers.append(plain_layer(Piece("", g, weight, None), torch.zeros(g.out_channels, dtype=dtype, device=device)))
    return nn.Sequential(*layers).eval(), noise(shape.input_shape)


def _eager(shape: TimedShape, conditions: Conditions) -> Call:
    network, inputs = _layers(shape, conditions.device)
    return _called(network, inputs)


def _train(shape: TimedShape, conditions: Conditions) -> Call:
    """Forward and backward: derivatives by the input and all parameters."""
    network, inputs = _layers(shape, conditions.device)
    wanted = [inputs.requires_grad_(), *network.parameters()]
    with torch.enable_grad():
        slope = torch.ones_like(network(inputs))

    def step() -> object:
        with torch.enable_grad():
            found = torch.autograd.grad(network(inputs), wanted, slope)
        if inputs.is_cuda:
            torch.cuda.synchronize()
        return found

    return step


def _compile(shape: TimedShape, conditions: Conditions) -> Call:
    network, inputs = _layers(shape, conditions.device)

    def forward(inputs: Tensor) -> Any:
        return network(inputs)

    # a code object of its own: torch.compile keeps its results by code, and only a few for each
    own = FunctionType(forward.__code__.replace(co_name=f"chain_{id(network)}"), forward.__globals__, "chain", None, forward.__closure__)
    return _called(torch.compile(own, dynamic=False), inputs)


def _called(network: Callable[[Tensor], Any], inputs: Tensor) -> Call:
    if not inputs.is_cuda:
        return lambda: network(inputs)

    def call() -> object:
        output = network(inputs)
        torch.cuda.synchronize()
        return output

    return call


def _onnxruntime(shape: TimedShape, conditions: Conditions) -> Call:
    from surgery.export.onnx import onnx_session

    model, inputs = onnx_model(shape)
    try:
        session = onnx_session(model.SerializeToString(), conditions.threads)
        session.run(None, {"input": inputs})
    except Exception as error:  # onnxruntime has its own family of exceptions, none of them public
        raise SurgeryError(f"onnxruntime cannot run {shape.key}: {error}") from error
    return lambda: session.run(None, {"input": inputs})


def _openvino(shape: TimedShape, conditions: Conditions) -> Call:
    import openvino

    model, inputs = onnx_model(shape)
    try:
        core = openvino.Core()
        options = {"INFERENCE_NUM_THREADS": conditions.threads, "INFERENCE_PRECISION_HINT": "f16" if shape.dtype == "float16" else "f32"}
        compiled = core.compile_model(core.read_model(model.SerializeToString(), b""), "CPU", options)
        request = compiled.create_infer_request()
        request.infer({0: inputs})
    except RuntimeError as error:
        raise SurgeryError(f"openvino cannot run {shape.key}: {error}") from error
    return lambda: request.infer({0: inputs})


RUNTIMES: dict[str, Callable[[TimedShape, Conditions], Call]] = {
    "eager": _eager,
    "onnxruntime": _onnxruntime,
    "openvino": _openvino,
    "compile": _compile,
    "train": _train,
}


def timed_in(runtime: str) -> str:
    """The runtime in which layers and chains are timed for plans in another.

    ``torch.compile`` leaves convolutions to the kernels of eager mode, and takes seconds for each of hundreds of chains; so theirs are eager mode's
    times, and only whole networks are compiled.
    """
    return "eager" if runtime == "compile" else runtime


def onnx_model(shape: TimedShape) -> tuple[Any, Any]:
    """The chain as an ONNX model, written node by node, and an input for it (numpy).

    Raises:
        SurgeryValueError: ONNX has no such layer.
    """
    import numpy as np
    from onnx import helper, numpy_helper

    if shape.dtype not in NUMBER_TYPES:
        raise SurgeryValueError(f"{shape.key}: onnxruntime and openvino are timed with {', '.join(NUMBER_TYPES)} only")
    number, random = np.dtype(shape.dtype), np.random.default_rng(0)
    input_shape = shape.input_shape
    if shape.layers[0].dims and len(input_shape) == shape.layers[0].dims + 1:
        input_shape = (1, *input_shape)
    nodes: list[Any] = []
    constants: list[Any] = []
    name, size = "input", input_shape
    for index, g in enumerate(shape.layers):
        bias = np.zeros(g.out_channels, number)
        weight = (random.standard_normal(g.weight_shape, np.float32) * (g.groups / max(g.weights / g.out_channels, 1)) ** 0.5).astype(number)
        constants += [numpy_helper.from_array(weight.T if g.is_linear else weight, f"w{index}"), numpy_helper.from_array(bias, f"b{index}")]
        made, extra = onnx_nodes(g, str(index), name, len(size))
        nodes, constants = nodes + made, constants + extra
        name, size = f"y{index}", g.output_shape(size)
    kind = NUMBER_TYPES[shape.dtype]
    ends = [helper.make_tensor_value_info("input", kind, list(input_shape))], [helper.make_tensor_value_info(name, kind, list(size))]
    model = helper.make_model(helper.make_graph(nodes, "chain", *ends, constants), opset_imports=[helper.make_opsetid("", 19)], ir_version=9)
    return model, random.standard_normal(input_shape, np.float32).astype(number)


def onnx_nodes(g: Geometry, label: str, name: str, ndim: int) -> tuple[list[Any], list[Any]]:
    """Nodes of one layer from ``name`` to ``y{label}`` with weight ``w{label}`` and bias ``b{label}``, and constants beside these."""
    import numpy as np
    from onnx import helper, numpy_helper

    weight, bias, out = f"w{label}", f"b{label}", f"y{label}"
    if g.is_linear:
        if ndim == 2:
            return [helper.make_node("Gemm", [name, weight, bias], [out])], []
        return [helper.make_node("MatMul", [name, weight], [f"m{label}"]), helper.make_node("Add", [f"m{label}", bias], [out])], []
    same = [d * (k - 1) for k, d in zip(g.kernel, g.dilation, strict=True)]
    if g.padding == "same":
        pads = [s // 2 for s in same] + [s - s // 2 for s in same]
    else:
        pads = [0] * (2 * g.dims) if isinstance(g.padding, str) else [*g.padding, *g.padding]
    options: dict[str, Any] = {"kernel_shape": list(g.kernel), "strides": list(g.stride), "dilations": list(g.dilation), "group": g.groups}
    if g.transposed:
        return [helper.make_node("ConvTranspose", [name, weight, bias], [out], pads=pads, output_padding=list(g.output_padding), **options)], []
    if g.padding_mode == "zeros" or not any(pads):
        return [helper.make_node("Conv", [name, weight, bias], [out], pads=pads, **options)], []
    mode = {"reflect": "reflect", "replicate": "edge", "circular": "wrap"}[g.padding_mode]
    sides = numpy_helper.from_array(np.array([0, 0, *pads[: g.dims], 0, 0, *pads[g.dims :]], np.int64), f"p{label}")
    padded = helper.make_node("Pad", [name, f"p{label}"], [f"q{label}"], mode=mode)
    return [padded, helper.make_node("Conv", [f"q{label}", weight, bias], [out], **options)], [sides]
