"""Calls that are timed: whole, also where a device goes on by itself, and in runtimes that are there."""

from __future__ import annotations

from collections.abc import Callable
from types import FunctionType
from typing import Any

import torch
from torch import nn

from passes.errors import MissingExtra

__all__ = ["Call", "check_installed", "compiled", "waited_for"]

Call = Callable[[], object]


def waited_for(call: Call, on_cuda: bool) -> Call:
    """The call, and on CUDA after it a wait for all that it began."""
    if not on_cuda:
        return call

    def waiting() -> object:
        output = call()
        torch.cuda.synchronize()
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
