"""Layers and chains as tiny networks of their own, with noise for weights, ready to be called in a runtime."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from passes.chain import FORMATS, plain_layer
from passes.errors import SurgeryError, SurgeryValueError
from passes.geometry import Geometry, Piece
from surgery.cost.calls import Call, compiled, waited_for
from surgery.cost.profile import TimedShape

__all__ = ["RUNTIMES", "Setup", "noise_scale", "onnx_model", "onnx_nodes", "timed_in"]

NUMBER_TYPES = {"float16": 10, "float32": 1, "float64": 11}  # of ONNX


@dataclass(frozen=True, slots=True, kw_only=True)
class Setup:
    """What a time depends on beside the shape and the machine."""

    runtime: str
    threads: int
    device: str = "cpu"


def noise_scale(g: Geometry) -> float:
    """Of a layer's weights, so that what comes out is as large as what goes in: numbers that overflow, or become 0, take other times."""
    return float(max(g.weights / g.out_channels, 1) ** -0.5)


def _layers(shape: TimedShape, device: str) -> tuple[nn.Sequential, Tensor]:
    """The chain as modules with noise for weights, and an input."""
    dtype, generator = getattr(torch, shape.dtype), torch.Generator().manual_seed(0)

    def noise(size: Sequence[int]) -> Tensor:
        values = torch.randn(tuple(size), generator=generator, device="cpu").to(device=device, dtype=dtype)
        return values.contiguous(memory_format=FORMATS[values.ndim]) if shape.channels_last and values.ndim in FORMATS else values

    layers = []
    for g in shape.layers:
        weight = noise(g.weight_shape) * noise_scale(g)
        layers.append(plain_layer(Piece("", g, weight, None), torch.zeros(g.out_channels, dtype=dtype, device=device)))
    return nn.Sequential(*layers).eval(), noise(shape.input_shape)


def _eager(shape: TimedShape, setup: Setup) -> Call:
    network, inputs = _layers(shape, setup.device)
    return waited_for(partial(network, inputs), [inputs])


def _train(shape: TimedShape, setup: Setup) -> Call:
    """Forward and backward: derivatives by the input and all parameters."""
    network, inputs = _layers(shape, setup.device)
    wanted = [inputs.requires_grad_(), *network.parameters()]
    with torch.enable_grad():
        slope = torch.ones_like(network(inputs))

    def step() -> object:
        with torch.enable_grad():
            return torch.autograd.grad(network(inputs), wanted, slope)

    return waited_for(step, [inputs])


def _compile(shape: TimedShape, setup: Setup) -> Call:
    network, inputs = _layers(shape, setup.device)
    return waited_for(partial(compiled(network), inputs), [inputs])


def _onnxruntime(shape: TimedShape, setup: Setup) -> Call:
    from surgery.export.onnx import onnx_session

    model, inputs = onnx_model(shape)
    try:
        session = onnx_session(model.SerializeToString(), setup.threads)
        session.run(None, {"input": inputs})
    except Exception as error:  # onnxruntime has its own family of exceptions, none of them public
        raise SurgeryError(f"onnxruntime cannot run {shape.key}: {error}") from error
    return lambda: session.run(None, {"input": inputs})


def _openvino(shape: TimedShape, setup: Setup) -> Call:
    import openvino

    model, inputs = onnx_model(shape)
    try:
        core = openvino.Core()
        options = {"INFERENCE_NUM_THREADS": setup.threads, "INFERENCE_PRECISION_HINT": "f16" if shape.dtype == "float16" else "f32"}
        compiled = core.compile_model(core.read_model(model.SerializeToString(), b""), "CPU", options)
        request = compiled.create_infer_request()
        request.infer({0: inputs})
    except RuntimeError as error:
        raise SurgeryError(f"openvino cannot run {shape.key}: {error}") from error
    return lambda: request.infer({0: inputs})


RUNTIMES: dict[str, Callable[[TimedShape, Setup], Call]] = {
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
        weight = (random.standard_normal(g.weight_shape, np.float32) * noise_scale(g)).astype(number)
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
