"""Networks on a CUDA device: call by call, or replayed as one CUDA graph; timed on the device by events."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from passes.errors import SurgeryError, SurgeryValueError
from passes.parity import private_inputs, tensors_in
from passes.running import arguments, callable_of, first_line, private_copy, run
from surgery.benchmarking.ready import Ready

__all__ = ["check", "clock", "eager", "graph"]

BEFORE_CAPTURE = 3  # calls on a side stream, in which libraries choose kernels and take workspace, as torch.cuda.graphs asks for


def check(name: str) -> None:
    """Raise ``SurgeryValueError`` where there is no CUDA device."""
    if not torch.cuda.is_available():
        raise SurgeryValueError(f"runtimes: {name!r} needs a CUDA device, and torch {torch.__version__} finds none here; leave it out, or run there")


def clock(call: Callable[[], object], loops: int) -> float:
    """Seconds that one call takes on the device, between events in its stream."""
    began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    torch.cuda.synchronize()
    began.record()
    for _ in range(loops):
        call()
    ended.record()
    torch.cuda.synchronize()
    return float(began.elapsed_time(ended)) / 1e3 / loops


@contextmanager
def eager(network: nn.Module, example_inputs: Any) -> Iterator[Ready]:
    """Calls follow one another without waiting, as in a server."""
    yield Ready(_there(network, example_inputs))


@contextmanager
def graph(network: nn.Module, example_inputs: Any) -> Iterator[Ready]:
    """Captured once and replayed: what remains is the kernels' own time.

    Raises:
        SurgeryError: the network does something that cannot be captured.
    """
    call = _there(network, example_inputs)
    side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(BEFORE_CAPTURE):
            call()
    torch.cuda.current_stream().wait_stream(side)
    captured = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(captured):
            held = call()  # noqa: F841 - the graph writes into it
    except RuntimeError as error:
        raise SurgeryError(f"runtime 'cuda-graph': this network cannot be captured as a CUDA graph: {first_line(error)}") from error
    yield Ready(captured.replay)


def _there(network: nn.Module, example_inputs: Any) -> Callable[[], object]:
    """A call of a copy on the device, with the inputs there."""
    from surgery.export.inputs import filled

    twin = private_copy(network).to("cuda")
    inputs = private_inputs(example_inputs)
    inputs = filled(inputs, (t.to("cuda") for t in tensors_in(inputs)))
    run(twin, inputs)
    args, kwargs = arguments(inputs)
    forward = callable_of(twin)
    return lambda: forward(*args, **kwargs)
