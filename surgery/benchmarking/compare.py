"""Two networks, or two ONNX files, in each runtime in turn: what ``surgery.benchmark`` does."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from passes.errors import SurgeryError, SurgeryTypeError, SurgeryValueError
from passes.parity import tensors_in
from passes.running import run
from surgery.benchmarking.conditions import conditions_of
from surgery.benchmarking.environment import environment
from surgery.benchmarking.files import inputs_for, macs_of_file
from surgery.benchmarking.layers import check_runtimes, layer_results
from surgery.benchmarking.ready import Ready
from surgery.benchmarking.result import Benchmark, RuntimeResult
from surgery.benchmarking.runtimes import Runtime, known
from surgery.benchmarking.sampling import LEAST_PAIRS, time_in_turn
from surgery.cost import count_macs, threads_set
from surgery.inspection import usable_model
from surgery.progress import tracked

__all__ = ["check_sampling", "compare_files", "compare_modules"]


def check_sampling(*, pairs: Any, precision: Any, seconds: Any, threads: Any) -> dict[str, Any]:
    """How long to go on, as ``time_in_turn`` takes it.

    Raises:
        SurgeryValueError: an argument of ``surgery.benchmark`` is none of those allowed.
    """
    if pairs is not None and (not isinstance(pairs, int) or isinstance(pairs, bool) or pairs < LEAST_PAIRS):
        raise SurgeryValueError(f"repeats: at least {LEAST_PAIRS} pairs are needed for a median with its confidence interval, got {pairs!r}")
    for name, value in (("precision", precision), ("seconds", seconds)):
        if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value < float("inf"):
            raise SurgeryValueError(f"{name}: expected a number above 0, got {value!r}")
    if threads is not None and (not isinstance(threads, int) or isinstance(threads, bool) or threads < 1):
        raise SurgeryValueError(f"threads: expected a number of at least 1, got {threads!r}")
    return {"pairs": pairs, "precision": precision, "seconds": seconds}


def compare_modules(
    before: Any,
    after: Any,
    example_inputs: Any,
    runtimes: Sequence[str],
    threads: int | None,
    sampling: Mapping[str, Any],
    *,
    batch: int | Iterable[int] | None,
    dtype: torch.dtype | str | None,
    memory_format: str | None,
    layers: bool,
) -> Benchmark:
    """``surgery.benchmark`` of two modules; the arguments are its own, ``sampling`` what ``check_sampling`` gave."""
    models = [_model(before), _model(after)]
    chosen = known(runtimes)
    conditions = conditions_of(batch=batch, dtype=dtype, memory_format=memory_format)
    if layers:
        check_runtimes(runtimes)
    with threads_set(threads), torch.no_grad():
        networks = [conditions.network(model) for model in models]
        _check_alike(networks, conditions.cast(example_inputs))
        ways = [(inputs, runtime) for inputs in conditions.inputs(example_inputs) for runtime in chosen]
        told = layer_results(networks[0], networks[1], conditions.cast(example_inputs), runtimes) if layers else ()  # first: it may find no layer
        rows = tuple(_row(runtime, networks, inputs, sampling) for inputs, runtime in tracked(ways, "timing in", name=lambda way: way[1].name))
        macs = [_macs(network, conditions.cast(example_inputs)) for network in networks]
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


def compare_files(
    before: str | os.PathLike[str],
    after: str | os.PathLike[str],
    example_inputs: Any,
    runtimes: Sequence[str],
    threads: int | None,
    sampling: Mapping[str, Any],
    options: Mapping[str, Any],
) -> Benchmark:
    """Likewise of two ONNX files, which are timed as they are: all ``options`` must be None."""
    for name, value in options.items():
        if value is not None:
            raise SurgeryValueError(f"{name}: ONNX files are timed as they are; leave it out")
    chosen = known(runtimes)
    for runtime in chosen:
        if runtime.opens is None:
            raise SurgeryValueError(f"runtimes: {runtime.name!r} reads no ONNX files; onnxruntime and openvino do")
    paths = Path(before), Path(after)
    inputs = inputs_for(*paths, example_inputs)
    macs = [macs_of_file(file, inputs) for file in paths]
    rows = []
    with threads_set(threads), torch.no_grad():
        for runtime in chosen:
            if runtime.opens is not None:
                row = _timed(runtime, runtime.opens(paths[0], inputs), runtime.opens(paths[1], inputs), inputs, sampling)
                rows.append(replace(row, macs_before=macs[0], macs_after=macs[1]))
        used = torch.get_num_threads()
    return Benchmark(
        rows=tuple(rows),
        macs_before=macs[0],
        macs_after=macs[1],
        threads=used,
        input_shapes=tuple(tuple(t.shape) for t in inputs.values()),
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
    """Times of networks that give different things compare nothing; their numbers may differ, that is what a cut does, and sizes that follow them."""
    before, after = (_shapes(network, example_inputs) for network in networks)
    if before == after or (list(map(len, before)) == list(map(len, after)) and _follow_numbers(networks[0], example_inputs, before)):
        return
    raise SurgeryValueError(f"after: its outputs have the shapes {after}, those of before {before}; give two forms of one network")


def _shapes(network: nn.Module, example_inputs: Any) -> list[tuple[int, ...]]:
    return [tuple(t.shape) for t in tensors_in(run(network, example_inputs))]


def _follow_numbers(network: nn.Module, example_inputs: Any, seen: Sequence[tuple[int, ...]]) -> bool:
    """Whether other numbers of the same sizes give outputs of other sizes, as a detector's do."""
    from surgery.export.common import fresh_inputs

    with suppress(SurgeryError):  # a network may not take noise
        return _shapes(network, fresh_inputs(example_inputs, torch.Generator().manual_seed(0))) != seen
    return False


def _timed(runtime: Runtime, before: Ready, after: Ready, inputs: Any, sampling: Mapping[str, Any]) -> RuntimeResult:
    found = time_in_turn(before, after, clock=runtime.clock, pause=runtime.pause, **sampling)
    batch = next((t.shape[0] for t in tensors_in(inputs) if t.ndim), None)
    return RuntimeResult.of(found, runtime.name, batch=batch, file_bytes_before=before.file_bytes, file_bytes_after=after.file_bytes)


def _macs(network: nn.Module, example_inputs: Any) -> int:
    return _macs_of(lambda: run(network, example_inputs))


def _macs_of(call: Callable[[], object]) -> int:
    with count_macs() as counter:
        call()
    return counter.macs
