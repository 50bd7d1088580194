"""Is it really faster? Two networks timed in turn on the same inputs, FLOPs beside time."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from passes.errors import SurgeryTypeError, SurgeryValueError
from passes.parity import tensors_in
from passes.running import kept_random_states, run
from surgery.benchmarking.environment import environment
from surgery.benchmarking.result import Benchmark, LayerResult, RuntimeResult
from surgery.benchmarking.sampling import LEAST_PAIRS, time_in_turn
from surgery.cost import count_macs, threads_set
from surgery.inspection import usable_model
from surgery.progress import tracked

if TYPE_CHECKING:
    from surgery.benchmarking.ready import Ready
    from surgery.benchmarking.runtimes import RUNTIMES, Runtime

__all__ = ["RUNTIMES", "Benchmark", "LayerResult", "RuntimeResult", "benchmark", "environment"]


def __getattr__(name: str) -> Any:
    if name != "RUNTIMES":  # imported when it is first asked for: its file imports more than ``import surgery`` should
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from surgery.benchmarking import runtimes

    return runtimes.RUNTIMES


@kept_random_states()
def benchmark(
    before: nn.Module | str | os.PathLike[str],
    after: nn.Module | str | os.PathLike[str],
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
    layers: bool = False,
) -> Benchmark:
    """Time two networks in turn on the same inputs, in eval mode.

    After a warm-up samples alternate (before, after, after, before, ...), so that other work on the machine falls on both alike. Each pair of
    neighbouring samples gives one ratio; pairs are taken until the 99 % confidence interval of their median is narrow enough, or for so many seconds.
    A verdict is given only where the whole interval is on one side of 1.

    Args:
        before: the original network, or an ONNX file.
        after: the decomposed one, or an ONNX file where the first is one; both are then timed as they are, in onnxruntime and openvino only.
        example_inputs: a tensor, a tuple of positional or a mapping of keyword arguments. To files: tensors in the order of their inputs, a mapping
            by their names, or None: noise, where they leave no dimension open.
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
        layers: also time every layer that differs beside what stands for it, each by itself on the shapes that it sees: which chain pays, and which
            does not. Only in eager, compile, train, onnxruntime and openvino.

    Raises:
        SurgeryTypeError: a model is no module, or wrapped, or cannot be copied.
        SurgeryValueError: an argument is none of those allowed, a network does not accept the inputs or gives outputs of other shapes than the
            other, or there is no CUDA device.
        MissingExtra: a runtime is not installed.
        SurgeryError: a runtime cannot run a network; the message names the runtime or the exporter.
    """
    from surgery.benchmarking.conditions import conditions_of
    from surgery.benchmarking.layers import check_runtimes, layer_results
    from surgery.benchmarking.runtimes import known

    _check(repeats, precision, seconds, threads)
    sampling: dict[str, Any] = {"pairs": repeats, "precision": precision, "seconds": seconds}
    if isinstance(before, str | os.PathLike) and isinstance(after, str | os.PathLike):
        for name, value in (("batch", batch), ("dtype", dtype), ("memory_format", memory_format), ("layers", layers or None)):
            if value is not None:
                raise SurgeryValueError(f"{name}: ONNX files are timed as they are; leave it out")
        return _of_files(Path(before), Path(after), example_inputs, known(runtimes), threads, sampling)
    models = [_model(before), _model(after)]
    chosen = known(runtimes)
    conditions = conditions_of(batch=batch, dtype=dtype, memory_format=memory_format)
    if layers:
        check_runtimes(runtimes)
    with threads_set(threads), torch.no_grad():
        networks = [conditions.network(model) for model in models]
        _check_alike(networks, conditions.cast(example_inputs))
        ways = [(inputs, runtime) for inputs in conditions.inputs(example_inputs) for runtime in chosen]
        rows = tuple(_row(runtime, networks, inputs, sampling) for inputs, runtime in tracked(ways, "timing in", name=lambda way: way[1].name))
        macs = [_macs(network, conditions.cast(example_inputs)) for network in networks]
        told = layer_results(networks[0], networks[1], conditions.cast(example_inputs), runtimes) if layers else ()
        used = torch.get_num_threads()
    return Benchmark(
        rows=rows,
        layers=told,
        macs_before=macs[0],
        macs_after=macs[1],
        threads=used,
        dtype=conditions.dtype_name,
        memory_format=conditions.memory_format,
        input_shapes=tuple(tuple(t.shape) for t in tensors_in(example_inputs)),
        environment=environment(runtimes),
    )


def _row(runtime: Runtime, networks: Sequence[nn.Module], inputs: Any, sampling: Mapping[str, Any]) -> RuntimeResult:
    with runtime(networks[0], inputs) as before, runtime(networks[1], inputs) as after:
        row = _timed(runtime, before, after, inputs, sampling)
        pairs = list(zip((before, after), networks, strict=True))
        macs = [_macs_of(ready) if runtime.trains else _macs(network, inputs) for ready, network in pairs]
        memory = [runtime.memory(ready, network, inputs) if runtime.memory else None for ready, network in pairs]
    return replace(row, macs_before=macs[0], macs_after=macs[1], memory_bytes_before=memory[0], memory_bytes_after=memory[1])


def _model(model: Any) -> nn.Module:
    if isinstance(model, str | os.PathLike):
        raise SurgeryTypeError(f"model: {str(model)!r} is the path of a file and the other is none; give two modules, or two ONNX files")
    usable_model(model)
    found: nn.Module = model
    return found


def _check_alike(networks: Sequence[nn.Module], example_inputs: Any) -> None:
    """Times of networks that give different things compare nothing; their numbers may differ, that is what a cut does."""
    shapes = [[tuple(t.shape) for t in tensors_in(run(network, example_inputs))] for network in networks]
    if shapes[0] != shapes[1]:
        raise SurgeryValueError(f"after: its outputs have the shapes {shapes[1]}, those of before {shapes[0]}; give two forms of one network")


def _timed(runtime: Runtime, before: Ready, after: Ready, inputs: Any, sampling: Mapping[str, Any]) -> RuntimeResult:
    found = time_in_turn(before, after, clock=runtime.clock, pause=runtime.pause, **sampling)
    batch = next((t.shape[0] for t in tensors_in(inputs) if t.ndim), None)
    return RuntimeResult.of(found, runtime.name, batch=batch, file_bytes_before=before.file_bytes, file_bytes_after=after.file_bytes)


def _of_files(
    before: Path, after: Path, example_inputs: Any, runtimes: Sequence[Runtime], threads: int | None, sampling: Mapping[str, Any]
) -> Benchmark:
    from surgery.benchmarking.files import inputs_for, macs_of_file

    for runtime in runtimes:
        if runtime.opens is None:
            raise SurgeryValueError(f"runtimes: {runtime.name!r} reads no ONNX files; onnxruntime and openvino do")
    inputs = inputs_for(before, after, example_inputs)
    macs = [macs_of_file(file, inputs) for file in (before, after)]
    rows = []
    with threads_set(threads), torch.no_grad():
        for runtime in runtimes:
            if runtime.opens is not None:
                row = _timed(runtime, runtime.opens(before, inputs), runtime.opens(after, inputs), inputs, sampling)
                rows.append(replace(row, macs_before=macs[0], macs_after=macs[1]))
        used = torch.get_num_threads()
    return Benchmark(
        rows=tuple(rows),
        macs_before=macs[0],
        macs_after=macs[1],
        threads=used,
        input_shapes=tuple(tuple(t.shape) for t in inputs.values()),
        environment=environment([runtime.name for runtime in runtimes]),
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
