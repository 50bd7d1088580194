"""Is it really faster? Two networks timed in turn on the same inputs, FLOPs beside time."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from passes.errors import SurgeryValueError
from passes.parity import tensors_in
from passes.running import kept_random_states, run
from surgery.benchmarking.environment import environment
from surgery.benchmarking.result import Benchmark, LayerResult, RuntimeResult
from surgery.benchmarking.sampling import LEAST_PAIRS, SAMPLE_SECONDS, time_in_turn
from surgery.cost import count_macs, threads_set
from surgery.inspection import usable_model

if TYPE_CHECKING:
    from surgery.benchmarking.onnx_files import openvino_call
    from surgery.benchmarking.runtimes import RUNTIMES, Runtime

__all__ = ["RUNTIMES", "SAMPLE_SECONDS", "Benchmark", "LayerResult", "RuntimeResult", "benchmark", "compare", "environment", "openvino_call"]

LATER = {"RUNTIMES": "surgery.benchmarking.runtimes", "openvino_call": "surgery.benchmarking.onnx_files"}


def __getattr__(name: str) -> Any:
    if name not in LATER:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(LATER[name]), name)


@kept_random_states()
def benchmark(
    before: nn.Module,
    after: nn.Module,
    example_inputs: Any,
    *,
    runtimes: Sequence[str] = ("eager", "onnxruntime"),
    batch: int | Iterable[int] | None = None,
    threads: int | None = None,
    dtype: torch.dtype | str | None = None,
    memory_format: str | None = None,
    precision: float = 0.01,
    seconds: float = 20.0,
    repeats: int | None = None,
) -> Benchmark:
    """Time two networks in turn on the same inputs, in eval mode.

    After a warm-up samples alternate (before, after, after, before, ...), so that other work on the machine falls on both alike. Each pair of
    neighbouring samples gives one ratio; pairs are taken until the 99 % confidence interval of their median is narrow enough, or for so many seconds.
    A verdict is given only where the whole interval is on one side of 1.

    Args:
        before: the original network.
        after: the decomposed one.
        example_inputs: a tensor, a tuple of positional or a mapping of keyword arguments.
        runtimes: ``"eager"`` (torch as it is, where the inputs are), ``"compile"`` (``torch.compile``), ``"torchscript"`` (traced and frozen),
            ``"onnxruntime"`` and ``"openvino"`` (both on the CPU, in the dtype of the inputs), ``"train"`` (a training step in eager mode, forward
            and backward, without the optimizer's), ``"cuda"`` (eager mode, timed by events) and ``"cuda-graph"`` (replayed as one CUDA graph).
        batch: batch sizes to time at, each with noise for inputs; the example inputs as they are where None.
        threads: for both networks; torch's current number where None.
        dtype: networks and floating-point inputs are cast to it, on copies.
        memory_format: ``"channels_last"`` stores weights and inputs of two and three dimensions so, on copies; runtimes that read ONNX files have
            layouts of their own.
        precision: half the width of that interval, as a share of the ratio, which is narrow enough.
        seconds: a row takes no longer than this, but for the preparation and the least number of pairs.
        repeats: take exactly so many pairs instead.

    Raises:
        SurgeryTypeError: a model is no module, or wrapped, or cannot be copied.
        SurgeryValueError: an argument is none of those allowed, a network does not accept the inputs, or there is no CUDA device.
        MissingExtra: a runtime is not installed.
        SurgeryError: a runtime cannot run a network; the message names the runtime or the exporter.
    """
    from surgery.benchmarking.conditions import conditions_of
    from surgery.benchmarking.runtimes import known

    for model in (before, after):
        usable_model(model)
    chosen = known(runtimes)
    _check(repeats, precision, seconds, threads)
    conditions = conditions_of(batch=batch, dtype=dtype, memory_format=memory_format)
    with threads_set(threads), torch.no_grad():
        networks = [conditions.network(model) for model in (before, after)]
        rows = tuple(
            _row(runtime, networks, inputs, repeats=repeats, precision=precision, seconds=seconds)
            for inputs in conditions.inputs(example_inputs)
            for runtime in chosen
        )
        macs = [_macs(network, conditions.cast(example_inputs)) for network in networks]
        used = torch.get_num_threads()
    return Benchmark(
        rows=rows,
        macs_before=macs[0],
        macs_after=macs[1],
        threads=used,
        dtype=conditions.dtype_name,
        memory_format=conditions.memory_format,
        input_shapes=tuple(tuple(t.shape) for t in tensors_in(example_inputs)),
        environment=environment(runtimes),
    )


def compare(runtime: str, before: Callable[[], object], after: Callable[[], object], repeats: int) -> RuntimeResult:
    """Times of two calls in turn, which the runtime of this name has prepared: so many pairs of samples."""
    from surgery.benchmarking.runtimes import RUNTIMES

    with_clock = RUNTIMES[runtime]
    return RuntimeResult.of(time_in_turn(before, after, clock=with_clock.clock, pairs=repeats, pause=with_clock.pause), runtime)


def _row(runtime: Runtime, networks: Sequence[nn.Module], inputs: Any, *, repeats: int | None, precision: float, seconds: float) -> RuntimeResult:
    with runtime(networks[0], inputs) as before, runtime(networks[1], inputs) as after:
        found = time_in_turn(before, after, clock=runtime.clock, pairs=repeats, precision=precision, seconds=seconds, pause=runtime.pause)
        pairs = list(zip((before, after), networks, strict=True))
        macs = [_macs_of(ready) if runtime.trains else _macs(network, inputs) for ready, network in pairs]
        memory = [runtime.memory(ready, network, inputs) if runtime.memory else None for ready, network in pairs]
    return RuntimeResult.of(
        found,
        runtime.name,
        batch=next((t.shape[0] for t in tensors_in(inputs) if t.ndim), None),
        macs_before=macs[0],
        macs_after=macs[1],
        file_bytes_before=before.file_bytes,
        file_bytes_after=after.file_bytes,
        memory_bytes_before=memory[0],
        memory_bytes_after=memory[1],
    )


def _macs(network: nn.Module, example_inputs: Any) -> int:
    return _macs_of(lambda: run(network, example_inputs))


def _macs_of(call: Callable[[], object]) -> int:
    with count_macs() as counter:
        call()
    return counter.macs


def _check(repeats: object, precision: object, seconds: object, threads: object) -> None:
    if repeats is not None and (not isinstance(repeats, int) or repeats < LEAST_PAIRS):
        raise SurgeryValueError(f"repeats: at least {LEAST_PAIRS} pairs are needed for a median with its confidence interval, got {repeats!r}")
    for name, value in (("precision", precision), ("seconds", seconds)):
        if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value < float("inf"):
            raise SurgeryValueError(f"{name}: expected a number above 0, got {value!r}")
    if threads is not None and (not isinstance(threads, int) or threads < 1):
        raise SurgeryValueError(f"threads: expected a number of at least 1, got {threads!r}")
