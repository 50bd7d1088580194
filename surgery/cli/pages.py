"""``--html``: the report as one page, with what the command knows beside the network."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import surgery
from surgery.cli.arguments import runtime_names

if TYPE_CHECKING:
    from torch import nn

__all__ = ["add_page_arguments", "check_page_arguments", "save_page"]


def add_page_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--html", metavar="FILE", type=Path, help="also write the report as one self-contained page")
    parser.add_argument(
        "--time",
        metavar="RUNTIME,...",
        type=runtime_names,
        default=[],
        help="with times for the page: the network's and each cut layer's, beside those before",
    )


def check_page_arguments(options: argparse.Namespace) -> None:
    """Refuse times that nothing would show, and runtimes without a clock for layers, before any work."""
    if options.time and options.html is None:
        options.wrong("--time: it is for the page; give --html FILE")
    if options.time:
        from surgery.benchmarking.layers import check_runtimes

        check_runtimes(options.time)


def save_page(options: argparse.Namespace, model: nn.Module, inputs: Any, before: nn.Module | None) -> None:
    """The page with the graph, the trade-off where the original is known, and the times asked for; what cannot be had is said on stderr.

    What is timed before the cut is the network fused back: its weights are those of the chains, which time does not depend on.
    """
    path, found = options.html, None
    if options.time:
        found = surgery.benchmark(surgery.reconstruct(model), model, inputs, runtimes=options.time, layers=True)
    try:
        report = surgery.report(model, example_inputs=inputs, before=before, benchmark=found)
    except surgery.SurgeryError as error:
        print(f"{path}: without graph and trade-off: {error}", file=sys.stderr)
        report = surgery.report(model, benchmark=found)
    if before is None:
        print(f"{path}: without trade-off, which needs the weights from before the cut: give --before MODEL", file=sys.stderr)
    report.save_html(path, f"Surgery report: {options.model}")
