"""What can run a network: each runtime prepares one on its example inputs, and gives what is then called and timed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from passes.errors import SurgeryError, SurgeryValueError
from passes.parity import private_inputs, tensors_in
from passes.running import arguments, callable_of, first_line, private_copy, run, without_waiting
from surgery.benchmarking import cuda, memory, onnx_files
from surgery.benchmarking.ready import Ready
from surgery.benchmarking.sampling import Clock, wall_clock
from surgery.cost.calls import check_installed, compiled, waited_for

__all__ = ["RUNTIMES", "Runtime", "known"]

Prepare = Callable[[nn.Module, Any], AbstractContextManager[Ready]]


@dataclass(frozen=True, slots=True)
class Runtime:
    """How a runtime runs networks, called with a network in eval mode and its inputs.

    Attributes:
        name: as users write it.
        prepare: gives a context in which the network is ready to be called.
        clock: what times it.
        memory: bytes that a call takes at most, of (ready, network, inputs); None where nobody tells.
        rests: whether its worker threads go on for a moment after a call.
        trains: whether a call is a training step.
        opens: makes an ONNX file ready for inputs by name; None where the runtime reads none.
    """

    name: str
    prepare: Prepare
    clock: Clock = wall_clock
    memory: memory.Measure | None = None
    rests: bool = False
    trains: bool = False
    opens: Callable[[Path, Mapping[str, Tensor]], Ready] | None = None

    def __call__(self, network: nn.Module, example_inputs: Any) -> AbstractContextManager[Ready]:
        return self.prepare(network, example_inputs)

    @property
    def pause(self) -> float:
        """Seconds to wait between two networks, so that the workers of one do not take the cores of the other."""
        return 0.002 if self.rests and torch.get_num_threads() > 1 else 0.0

    def check(self) -> None:
        """Refuse what cannot run here.

        Raises:
            MissingExtra: its package is not installed.
            SurgeryValueError: there is no CUDA device.
        """
        check_installed(self.name)
        if self.name.startswith("cuda"):
            cuda.check(self.name)


def known(names: Sequence[str]) -> list[Runtime]:
    """The runtimes of these names.

    Raises:
        SurgeryValueError: there is none of a name, no name at all, or no CUDA device.
        MissingExtra: a runtime is not installed.
    """
    if isinstance(names, str) or not isinstance(names, Sequence) or not names:
        raise SurgeryValueError(f"runtimes: expected a list of names such as ['eager', 'onnxruntime'], got {names!r}")
    for name in names:
        if name not in RUNTIMES:
            raise SurgeryValueError(f"runtimes: {name!r} is none of {list(RUNTIMES)}")
        RUNTIMES[name].check()
    return [RUNTIMES[name] for name in dict.fromkeys(names)]


@contextmanager
def _eager(network: nn.Module, example_inputs: Any) -> Iterator[Ready]:
    """Where the inputs are; on an accelerator each call waits for its result."""
    run(network, example_inputs)
    args, kwargs = arguments(private_inputs(example_inputs))
    yield Ready(waited_for(partial(callable_of(network), *args, **kwargs), _tensors(network, example_inputs)))


def _tensors(network: nn.Module, example_inputs: Any) -> list[Tensor]:
    """A network may move its inputs to where its parameters are."""
    return [*tensors_in(example_inputs), *network.parameters()]


@contextmanager
def _train(network: nn.Module, example_inputs: Any) -> Iterator[Ready]:
    """Forward in train mode, and backward from all floating-point outputs to all parameters. Nothing is accumulated in ``grad``."""
    wanted = [p for p in network.parameters() if p.requires_grad]

    def call() -> object:
        with torch.enable_grad():
            reached = [t for t in tensors_in(run(network, example_inputs)) if t.requires_grad]
            return torch.autograd.grad(reached, wanted, [torch.ones_like(t) for t in reached], allow_unused=True) if reached and wanted else ()

    network.train()
    try:
        with without_waiting(network):
            yield Ready(waited_for(call, _tensors(network, example_inputs)))
    finally:
        network.eval()


@contextmanager
def _compile(network: nn.Module, example_inputs: Any) -> Iterator[Ready]:
    call = compiled(network)
    run(network, example_inputs)
    args, kwargs = arguments(private_inputs(example_inputs))
    try:
        call(*args, **kwargs)
    except Exception as error:  # a compiler that is not there, or that fails on this network
        raise SurgeryError(f"runtime 'compile': torch.compile fails on this network: {first_line(error)}") from error
    yield Ready(waited_for(partial(call, *args, **kwargs), _tensors(network, example_inputs)))


@contextmanager
def _torchscript(network: nn.Module, example_inputs: Any) -> Iterator[Ready]:
    """Traced, then frozen as for deployment: weights become constants."""
    from surgery.export.common import quiet
    from surgery.export.inputs import Flat

    run(network, example_inputs)
    inputs = private_inputs(example_inputs)
    tensors = tuple(tensors_in(inputs))
    flat = Flat(private_copy(network).requires_grad_(False), inputs).eval()  # what is frozen must not be the caller's parameters
    try:
        with quiet():
            script: Any = torch.jit.freeze(torch.jit.trace(flat, tensors, check_trace=False, strict=False))  # type: ignore[no-untyped-call]
            size = len(script.save_to_buffer())
    except Exception as error:  # tracing runs the model's own code
        raise SurgeryError(f"runtime 'torchscript': this network cannot be traced: {first_line(error)}") from error
    yield Ready(waited_for(partial(script, *tensors), _tensors(network, example_inputs)), file_bytes=size)


RUNTIMES: dict[str, Runtime] = {
    runtime.name: runtime
    for runtime in (
        Runtime("eager", _eager, memory=memory.of_tensors),
        Runtime("onnxruntime", onnx_files.onnxruntime, opens=onnx_files.onnxruntime_file),
        Runtime("openvino", onnx_files.openvino, rests=True, opens=onnx_files.openvino_file),
        Runtime("compile", _compile),
        Runtime("train", _train, memory=memory.of_tensors, trains=True),
        Runtime("torchscript", _torchscript),
        Runtime("cuda", cuda.eager, clock=cuda.clock, memory=memory.on_cuda),
        Runtime("cuda-graph", cuda.graph, clock=cuda.clock),  # what a graph takes it has taken when it was captured
    )
}
