"""``surgery bench``: a model before and after a cut, or two ONNX files, FLOPs beside time."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

import surgery
from surgery.cli.arguments import MOST, Commands, add_command, add_rank_arguments, is_onnx_file, open_model, rank_options, runtime_names, shape, show
from surgery.cli.batches import add_calibration_argument, calibration_of

if TYPE_CHECKING:
    from surgery.benchmark import Benchmark

RUNTIMES_HELP = "eager, compile, torchscript, train, onnxruntime, openvino, cuda, cuda-graph (default: eager,onnxruntime; onnxruntime for files)"
TEXT = "Decompose a model and time it against the original, side by side; or time two ONNX files, MODEL being the first."
ONLY_FOR_CUTS = (
    "ranks",
    "method",
    "include",
    "exclude",
    "guard",
    "round_to",
    "effective_weights",
    "device",
    "calibration",
    "architecture",
    "weights",
)
CONDITIONS = ("batch", "threads", "dtype", "memory_format", "precision", "seconds", "repeats", "layers")


def add(commands: Commands) -> None:
    bench = add_command(commands, "bench", _bench, TEXT)
    bench.add_argument("after", nargs="?", metavar="AFTER.onnx", type=Path, help="time this ONNX file against MODEL, one too; nothing is cut")
    add_rank_arguments(bench)
    add_calibration_argument(bench)
    bench.add_argument("--runtimes", type=runtime_names, metavar="NAME,...", help=RUNTIMES_HELP)
    bench.add_argument("--batch", type=shape, metavar="N,...", help="batch sizes to time at (default: that of the input)")
    bench.add_argument("--threads", type=int, help="threads for both networks (default: torch's)")
    bench.add_argument("--dtype", help="float32, bfloat16, float16 or float64: what networks and inputs are cast to")
    bench.add_argument("--memory-format", metavar="FORMAT", help="channels_last, in runtimes of torch")
    bench.add_argument("--precision", type=float, default=0.01, help="spread, as a share of the ratio, that is small enough (default: %(default)s)")
    bench.add_argument("--seconds", type=float, default=20.0, help="no longer than this a row, but for the preparation (default: %(default)s)")
    bench.add_argument("--repeats", type=int, help="exactly so many pairs of samples instead of going on until the spread is small enough")
    bench.add_argument("--layers", action="store_true", help="time each layer that was cut beside its chain as well")
    bench.add_argument("--size", action="append", default=[], type=size, metavar="NAME=N", help="size of an open dimension of ONNX files, repeatable")
    bench.set_defaults(by_default={name: bench.get_default(name) for name in ONLY_FOR_CUTS})


def _bench(options: argparse.Namespace) -> None:
    from surgery.benchmarking.table import benchmark_table

    if options.after is not None and not is_onnx_file(options.model):
        options.wrong(f"{options.after}: MODEL must be an ONNX file too; leave it out to time MODEL against its cut")
    _check_conditions(options)
    measured = _of_a_cut(options) if options.after is None else _of_files(options)
    show(options, lambda: benchmark_table(measured), measured.to_json)


def _of_a_cut(options: argparse.Namespace) -> Benchmark:
    from surgery.benchmarking.layers import check_runtimes
    from surgery.benchmarking.runtimes import known

    if is_onnx_file(options.model):
        options.wrong(f"{options.model}: name the ONNX file to time it against after it")
    if options.size:
        options.wrong("--size: it is for two ONNX files; give --input-shape")
    runtimes = options.runtimes or ["eager", "onnxruntime"]
    known(runtimes)  # before minutes are spent on a model
    if options.layers:
        check_runtimes(runtimes)
    batches = calibration_of(options)
    model, inputs = open_model(options)
    net = surgery.decompose(model, options.ranks, example_inputs=inputs, calibration=batches, progress=True, **rank_options(options))
    return surgery.benchmark(surgery.reconstruct(model), net, inputs, runtimes=runtimes, **_conditions(options))


def _of_files(options: argparse.Namespace) -> Benchmark:
    given = [f"--{name.replace('_', '-')}" for name in ONLY_FOR_CUTS if getattr(options, name) != options.by_default[name]]
    if given:
        options.wrong(f"{', '.join(given)}: nothing is cut where two ONNX files are timed")
    from surgery.benchmarking.files import file_inputs, made_up

    inputs = made_up(file_inputs(Path(options.model)), dict(options.size), options.input_shape)
    return surgery.benchmark(options.model, options.after, inputs, runtimes=options.runtimes or ["onnxruntime"], **_conditions(options))


def _conditions(options: argparse.Namespace) -> dict[str, Any]:
    return {name: getattr(options, name) for name in CONDITIONS}


def _check_conditions(options: argparse.Namespace) -> None:
    """Wrong usage where ``surgery.benchmark`` would refuse them in the end."""
    from surgery.benchmarking.compare import check_sampling
    from surgery.benchmarking.conditions import conditions_of

    try:
        check_sampling(pairs=options.repeats, precision=options.precision, seconds=options.seconds, threads=options.threads)
        conditions_of(batch=options.batch, dtype=options.dtype, memory_format=options.memory_format)
    except surgery.SurgeryValueError as error:
        options.wrong(str(error))


def size(text: str) -> tuple[str, int]:
    """Reads ``NAME=N``."""
    name, _, number = text.rpartition("=")
    if not name or not number.isdecimal() or not 1 <= int(number) <= MOST:
        raise argparse.ArgumentTypeError(f"expected the name of a dimension and its size, such as batch=1, got {text!r}")
    return name, int(number)
