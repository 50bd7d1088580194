"""``surgery bench``: a model before and after a cut, FLOPs beside time."""

from __future__ import annotations

import argparse
from typing import Any

import surgery
from surgery.cli.arguments import Commands, add_command, add_rank_arguments, open_model, rank_options, shape, show

RUNTIMES_HELP = "eager, compile, torchscript, train, onnxruntime, openvino, cuda, cuda-graph (default: %(default)s)"


def add(commands: Commands) -> None:
    bench = add_command(commands, "bench", _bench, "Decompose a model and time it against the original, side by side.")
    add_rank_arguments(bench)
    bench.add_argument("--runtimes", default="eager,onnxruntime", metavar="NAME,...", help=RUNTIMES_HELP)
    bench.add_argument("--batch", type=shape, metavar="N,...", help="batch sizes to time at (default: that of the input)")
    bench.add_argument("--threads", type=int, help="threads for both networks (default: torch's)")
    bench.add_argument("--dtype", help="float32, bfloat16, float16 or float64: what networks and inputs are cast to")
    bench.add_argument("--memory-format", metavar="FORMAT", help="channels_last, in runtimes of torch")
    bench.add_argument("--precision", type=float, default=0.01, help="spread, as a share of the ratio, that is small enough (default: %(default)s)")
    bench.add_argument("--seconds", type=float, default=20.0, help="no longer than this a row, but for the preparation (default: %(default)s)")
    bench.add_argument("--repeats", type=int, help="exactly so many pairs of samples instead of going on until the spread is small enough")


def _bench(options: argparse.Namespace) -> None:
    from surgery.benchmarking.table import benchmark_table

    model, inputs = open_model(options)
    net = surgery.decompose(model, options.ranks, example_inputs=inputs, progress=True, **rank_options(options))
    measured = surgery.benchmark(surgery.reconstruct(model), net, inputs, runtimes=options.runtimes.split(","), **_conditions(options))
    show(options, lambda: benchmark_table(measured), measured.to_json)


def _conditions(options: argparse.Namespace) -> dict[str, Any]:
    return {name: getattr(options, name) for name in ("batch", "threads", "dtype", "memory_format", "precision", "seconds", "repeats")}
