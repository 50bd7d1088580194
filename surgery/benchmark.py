"""Is it really faster? Two networks timed in turn on the same inputs, FLOPs beside time."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from importlib import import_module
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from passes.running import kept_random_states

if TYPE_CHECKING:
    from surgery.benchmarking.environment import environment
    from surgery.benchmarking.result import Benchmark, LayerResult, RuntimeResult
    from surgery.benchmarking.runtimes import RUNTIMES

__all__ = ["RUNTIMES", "Benchmark", "LayerResult", "RuntimeResult", "benchmark", "environment"]

LATER = {
    "RUNTIMES": "surgery.benchmarking.runtimes",
    "Benchmark": "surgery.benchmarking.result",
    "LayerResult": "surgery.benchmarking.result",
    "RuntimeResult": "surgery.benchmarking.result",
    "environment": "surgery.benchmarking.environment",
}
"""Names that are imported when they are first asked for, and from where: ``import surgery`` needs this file, but not all that it stands for."""


def __getattr__(name: str) -> Any:
    if name not in LATER:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(LATER[name]), name)


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
    from surgery.benchmarking.compare import check_sampling, compare_files, compare_modules

    sampling = check_sampling(pairs=repeats, precision=precision, seconds=seconds, threads=threads)
    with torch.inference_mode(False):  # a caller's own would leave a training step without its backward pass
        if isinstance(before, str | os.PathLike) and isinstance(after, str | os.PathLike):
            options = {"batch": batch, "dtype": dtype, "memory_format": memory_format, "layers": layers or None}
            return compare_files(before, after, example_inputs, runtimes, threads, sampling, options)
        return compare_modules(
            before, after, example_inputs, runtimes, threads, sampling, batch=batch, dtype=dtype, memory_format=memory_format, layers=layers
        )
