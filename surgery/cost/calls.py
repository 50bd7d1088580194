"""Calls that are timed: whole, also where a device goes on by itself, and in runtimes that are there."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from types import FunctionType
from typing import Any

import torch
from torch import nn

from passes.errors import MissingExtra

__all__ = ["ON_PROCESSORS", "Call", "check_installed", "compiled", "waited_for"]

ON_PROCESSORS = ("onnxruntime", "openvino")
"""Runtimes that compute there, from ONNX, whatever device and memory format the network has."""

Call = Callable[[], object]


def waited_for(call: Call, tensors: Iterable[torch.Tensor]) -> Call:
    """The call, and after it a wait for all that it began on the accelerators that these tensors are on: a call there returns before it is done."""
    there = [device for device in dict.fromkeys(tensor.device for tensor in tensors) if device.type not in ("cpu", "meta")]
    if not there:
        return call

    def waiting() -> object:
        output = call()
        for device in there:
            torch.accelerator.synchronize(device)
        return output

    return waiting


def compiled(network: nn.Module) -> Callable[..., Any]:
    """The network by ``torch.compile``, for inputs of one shape. What others have compiled before does not matter."""

    def forward(*args: Any, **kwargs: Any) -> Any:
        return network(*args, **kwargs)

    # a code object of its own: torch.compile keeps its results by code, and only a few for each
    own = FunctionType(forward.__code__.replace(co_name=f"network_{id(network)}"), forward.__globals__, "network", None, forward.__closure__)
    made: Callable[..., Any] = torch.compile(own, dynamic=False)
    return made


def check_installed(runtime: str) -> None:
    """Raise ``MissingExtra`` where a runtime is not installed."""
    import importlib.util

    package = {"onnxruntime": "onnxruntime", "openvino": "openvino"}.get(runtime)
    if package is not None and importlib.util.find_spec(package) is None:
        extra = "export" if package == "onnxruntime" else package
        raise MissingExtra.of(f"runtime {runtime!r} is not installed", extra)
