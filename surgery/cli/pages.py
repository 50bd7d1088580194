"""``--html``: the report as one page, with what the command knows beside the network."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import surgery
from surgery.cli.arguments import timed_names
from surgery.files import usable_target

if TYPE_CHECKING:
    from torch import nn

    from surgery.benchmark import Benchmark

__all__ = ["add_page_arguments", "check_page_arguments", "save_page"]

SECONDS = 5.0  # of timing the whole network, in each runtime
TIME_HELP = "with times for the page, the network's and each cut layer's beside those before: eager, compile, train, onnxruntime, openvino"


def add_page_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--html", metavar="FILE", type=Path, help="also write the report as one self-contained page")
    parser.add_argument("--time", metavar="RUNTIME,...", type=timed_names, default=[], help=TIME_HELP)


def check_page_arguments(options: argparse.Namespace) -> None:
    """Refuse a page that cannot be written, times that nothing would show, and runtimes that are not installed, before any work."""
    if options.html is not None:
        usable_target("--html", options.html)
    if options.time and options.html is None:
        options.wrong("--time: it is for the page; give --html FILE")
    if options.time:
        from surgery.benchmarking.runtimes import known

        known(options.time)


def save_page(options: argparse.Namespace, model: nn.Module, inputs: Any, before: nn.Module | None) -> Benchmark | None:
    """The page with the graph, the trade-off where the original is known, and the times asked for, which are returned.

    What cannot be had is said on stderr. What is timed before the cut is the network fused back: its weights are those of the chains, which time
    does not depend on.
    """
    path, found = options.html, None
    try:
        found = _times(options.time, model, inputs)
    except surgery.SurgeryError as error:
        print(f"{path}: without times: {error}", file=sys.stderr)
    try:
        report = surgery.report(model, example_inputs=inputs, before=before, benchmark=found)
    except surgery.SurgeryError as error:
        print(f"{path}: without graph and trade-off: {error}", file=sys.stderr)
        report = surgery.report(model, benchmark=found)
    if before is None:
        print(f"{path}: without trade-off, which needs the weights from before the cut: give --before MODEL", file=sys.stderr)
    report.save_html(path, f"Surgery report: {options.model}")
    return found


def _times(runtimes: list[str], model: nn.Module, inputs: Any) -> Benchmark | None:
    if not runtimes:
        return None
    if all(row.status == "kept" for row in surgery.report(model).layers):
        raise surgery.SurgeryValueError("nothing was cut, so there is nothing to compare")
    return surgery.benchmark(surgery.reconstruct(model), model, inputs, runtimes=runtimes, seconds=SECONDS, layers=True)
