"""``surgery bench``: a model before and after a cut, FLOPs beside time."""

from __future__ import annotations

import argparse

import surgery
from surgery.cli.arguments import Commands, add_command, add_rank_arguments, open_model, rank_options, show


def add(commands: Commands) -> None:
    bench = add_command(commands, "bench", _bench, "Decompose a model and time it against the original, side by side.")
    add_rank_arguments(bench)
    bench.add_argument(
        "--runtimes", default="eager,onnxruntime", help="comma-separated: eager, compile, train, onnxruntime, openvino (default: %(default)s)"
    )
    bench.add_argument("--repeats", type=int, default=30, help="pairs of samples a runtime (default: %(default)s)")
    bench.add_argument("--threads", type=int, help="threads for both networks (default: torch's)")


def _bench(options: argparse.Namespace) -> None:
    model, inputs = open_model(options)
    net = surgery.decompose(model, options.ranks, example_inputs=inputs, progress=True, **rank_options(options))
    runtimes = options.runtimes.split(",")
    measured = surgery.benchmark(surgery.reconstruct(model), net, inputs, runtimes=runtimes, repeats=options.repeats, threads=options.threads)
    from surgery.tables import benchmark_table

    show(options, lambda: benchmark_table(measured), measured.to_json)
